"""From a path to a model: every precision by command, a reason with each, and one paragraph for what cannot be read."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowvram.generate.processor import Pace
from lowvram.generate.weights import weight_bytes
from tests.flows.typed import typed
from tests.loaded import choose_reading_on, load_model
from tests.resign import sign_anew

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "precision, code, dtype",
    [("fp8", torch.uint8, None), ("int8", torch.int8, None), ("bf16", torch.bfloat16, torch.bfloat16)],
)
def test_the_precision_asked_for_is_what_the_matrices_are_in(
    run: Path, precision: Any, code: torch.dtype, dtype: torch.dtype | None
) -> None:
    loaded, exact = load_model(run, "cpu", precision), load_model(run, "cpu", "fp32")
    assert (loaded.precision, loaded.reason) == (precision, "as asked")
    assert loaded.model.embedding.dtype == code
    assert loaded.dtype == (dtype or choose_reading_on(CPU, "fp8").compute_dtype) or loaded.dtype in (
        torch.bfloat16,
        torch.float32,
    )
    share = {"fp8": 0.3, "int8": 0.3, "bf16": 0.55}[precision]
    assert weight_bytes(loaded.model) <= share * weight_bytes(exact.model)
    assert loaded.trained_len == exact.trained_len == 32


def test_without_a_precision_the_machine_chooses_and_says_why(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowvram.api.loading.multiplies_bf16", lambda: False)
    loaded, chosen = load_model(run, "cpu"), choose_reading_on(CPU, None)
    assert (loaded.precision, loaded.reason) == (chosen.weight_precision, chosen.reason)
    assert "instructions" in loaded.reason


@pytest.mark.parametrize(
    "fp32_s, int8_s, weight_precision", [(2.0, 3.0, "bf16"), (0.5, 3.0, "fp32"), (0.5, 0.4, "int8")]
)
def test_a_processor_with_bf16_reads_in_what_is_faster_there_and_says_so(
    run: Path, monkeypatch: pytest.MonkeyPatch, fp32_s: float, int8_s: float, weight_precision: str
) -> None:
    pace = Pace(processor="any", torch="2", fp32_s=fp32_s, bf16_s=1.0, int8_s=int8_s)
    news = iter([True, False])
    monkeypatch.setattr("lowvram.api.loading.multiplies_bf16", lambda: True)
    monkeypatch.setattr("lowvram.generate.processor.find_pace", lambda: (pace, next(news)))
    first, second = (typed("chat", run, "--prompt", "Kış", "--tokens", 1, "--device", "cpu") for _ in range(2))
    assert (first.code, second.code) == (0, 0)
    assert "Timed this processor's products in fp32, bf16 and INT8, kept in " in first.err
    assert "Timed" not in second.err
    monkeypatch.setattr("lowvram.generate.processor.find_pace", lambda: (pace, False))
    loaded = load_model(run, "cpu")
    assert (loaded.precision, loaded.reason) == (weight_precision, pace.reason)
    assert load_model(run, "cpu", "bf16").reason == "as asked"
    assert load_model(run, "cpu", "int8").dtype == (torch.float32 if weight_precision == "fp32" else torch.bfloat16)


def test_evaluation_reads_as_the_run_validates(run: Path) -> None:
    loaded = load_model(run, "cpu", as_trained=True)
    assert (loaded.precision, loaded.dtype, loaded.reason) == ("fp32", torch.float32, "as the run validates")


def altered(run: Path, home: Path, name: str, change: Callable[[Path], None]) -> Path:
    """Return a copy of a checkpoint in which one file was changed by somebody who mended the manifest too."""
    copy = home / "step-00000006"
    shutil.copytree(run / "step-00000006", copy)
    change(copy / name)
    sign_anew(copy, versions={"lowvram": "7.8.9"})
    return copy


def without_a_tensor(path: Path) -> None:
    tensors = load_file(path)
    save_file({name: tensor.clone() for name, tensor in tensors.items() if name != "norm.weight"}, path)


def with_another_shape(path: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(tensors | {"norm.weight": torch.ones(7)}, path)


def with_a_strange_tensor(path: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(tensors | {"blocks.9.norm.weight": torch.ones(32)}, path)


def from_the_future(path: Path) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    config["model"]["attention"]["kind"] = "telepathy"
    path.write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("weights.safetensors", without_a_tensor, r"norm\.weight is missing\."),
        ("weights.safetensors", with_another_shape, r"norm\.weight is \[7\], and the model needs \[32\]\."),
        ("weights.safetensors", with_a_strange_tensor, r"blocks\.9\.norm\.weight belongs to no layer\."),
        (
            "config.json",
            from_the_future,
            r"describes a run that this lowvram does not know\. .*Update lowvram to 7\.8\.9",
        ),
    ],
    ids=["missing", "shape", "strange", "newer"],
)
def test_what_is_not_a_models_is_one_paragraph(
    run: Path, tmp_path: Path, name: str, change: Callable[[Path], None], message: str
) -> None:
    place = altered(run, tmp_path, name, change)
    for command in (("evaluate", place, "--data", run.parent / "shards/valid"), ("chat", place, "--prompt", "Kış")):
        answer = typed(*command, "--device", "cpu")
        assert (answer.code, answer.out) == (1, "")
        assert answer.err.count("Error: ") == 1
        assert "Traceback" not in answer.err
        assert re.search(message, answer.err.replace("\n", " ")), answer.err


def test_a_missing_tokenizer_is_named(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "step-00000006"
    shutil.copytree(run / "step-00000006", copy)
    (copy / "tokenizer.json").unlink()
    answer = typed("evaluate", copy, "--device", "cpu")
    assert answer.code == 1
    assert re.search(r"tokenizer\.json is missing\.", answer.err.replace("\n", " "))
