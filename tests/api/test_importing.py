"""`import_model`: what `lowvram import` writes, as a value, with errors that name arguments."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lowvram.api import LowvramError, import_model, load
from lowvram.data.tokenizer import Tokenizer
from lowvram.storage.checkpoint import find_checkpoint
from tests.convert.forms import FORMS, SMALL
from tests.convert.sources import written
from tests.data.test_hf_tokenizer import make
from tests.flows.typed import typed


def test_what_is_imported_is_the_commands_to_the_bit_and_speaks(
    small_tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, _ = FORMS["gqa-rope"]
    _, theirs = written(config, small_tokenizer, tmp_path / "theirs")
    found = import_model(str(theirs), tmp_path / "run", progress=True)
    assert capsys.readouterr() == ("", "")
    assert (found.path, found.checkpoint) == (tmp_path / "run", tmp_path / "run/step-00000000")
    assert (found.model, found.has_foreign_template, found.notices) == (config, False, ())
    assert typed("import", theirs, "--out", tmp_path / "typed").code == 0
    weights, expected = (find_checkpoint(tmp_path / name)[0].weights() for name in ("run", "typed"))
    assert [name for name in expected if not torch.equal(weights[name], expected[name])] == []
    written_text = load(found.path, device="cpu").generate("Kış", max_tokens=3, temperature=0.0)
    assert written_text == load(theirs, device="cpu").generate("Kış", max_tokens=3, temperature=0.0)


def test_a_chat_template_of_another_program_is_tried_and_one_that_fails_is_noticed(tmp_path: Path) -> None:
    theirs = make(tmp_path / "theirs")
    LlamaForCausalLM(LlamaConfig(**(SMALL | {"vocab_size": 450}))).save_pretrained(theirs)
    tokenizer = AutoTokenizer.from_pretrained(theirs)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(theirs)
    assert import_model(theirs, tmp_path / "run").has_foreign_template
    (theirs / "chat_template.jinja").write_text("{% for", encoding="utf-8")
    broken = import_model(theirs, tmp_path / "broken")
    assert not broken.has_foreign_template
    [notice] = broken.notices
    assert notice.level == "warning"
    assert notice.text.startswith("The model is imported; its chat template cannot be used: ")


def test_errors_name_the_arguments(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    _, theirs = written(
        FORMS["gqa-rope"][0].model_copy(update={"vocabulary": 600}), small_tokenizer, tmp_path / "theirs"
    )
    with pytest.raises(LowvramError, match=r"Name the model's own tokenizer with `tokenizer`\.$"):
        import_model(theirs, tmp_path / "run")
    with pytest.raises(LowvramError, match=r"exists already\. It is not overwritten\. Give `out` another name"):
        import_model(theirs, theirs)
    with pytest.raises(LowvramError, match=r"^`directory` is None\."):
        import_model(None, tmp_path / "run")  # type: ignore[arg-type]
    with pytest.raises(LowvramError, match=r"^`tokenizer` is 3\."):
        import_model(theirs, tmp_path / "run", tokenizer=3)  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()
