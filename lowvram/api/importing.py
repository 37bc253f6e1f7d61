"""Another program's model as a checkpoint to start from or to talk to; prints nothing."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram.api.arguments import PATH, refuse_missing, refuse_type
from lowvram.api.progress import carry_out
from lowvram.api.tasks import Notice, Task, count_progress

if TYPE_CHECKING:
    from lowvram.config.model import ModelConfig
    from lowvram.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Imported:
    """A model that was imported.

    path: the run directory, which `load` and `train.start_from` take.  checkpoint: the step in it.
    has_foreign_template: whether another program's chat template came with it and can be used; whether the model has
    learnt to answer in turns, no file says.
    """

    path: Path
    checkpoint: Path
    model: ModelConfig
    has_foreign_template: bool
    notices: tuple[Notice, ...] = ()


def import_model(
    directory: str | Path, out: str | Path, *, tokenizer: str | Path | None = None, progress: bool = False
) -> Imported:
    """Convert a Hugging Face directory into a checkpoint; all values are exact.

    directory: with config.json and safetensors (Llama, Mistral, Qwen3, DeepSeek-V3 and their like; fp32, bf16, fp16 or
    block-scaled FP8).  out: the run directory to write; must not exist.  tokenizer: the folder of tokenizer.json, None:
    the directory itself.  progress: show a progress bar, in a terminal or a notebook.

    Raises CheckpointError where `out` exists, a weight holds no numbers or the tokenizer is not the model's;
    ExportError for a model that lowvram cannot compute; TokenizerError; DiskFullError.
    """
    refuse_missing("directory", directory, *PATH)
    refuse_missing("out", out, *PATH)
    refuse_type("tokenizer", tokenizer, *PATH)
    task = import_task(Path(directory), Path(out), Path(tokenizer) if tokenizer is not None else None)
    found, notices = carry_out(task, progress)
    return dataclasses.replace(found, notices=notices)


def import_task(directory: Path, out: Path, tokenizer: Path | None = None) -> Task[Imported]:
    """Do what `import_model` does, and yield its notices and its progress."""
    from lowvram.convert.hf.importer import import_each_tensor
    from lowvram.convert.hf.reader import open_hf
    from lowvram.convert.hf.writer import refuse_existing
    from lowvram.data.hf_tokenizer import HfTokenizer, load_tokenizer

    refuse_existing(out)
    outside = open_hf(directory)
    loaded = load_tokenizer(tokenizer or directory, outside.config.vocabulary)
    for problem in outside.notices:
        yield Notice(problem, "warning")
    checkpoint = yield from count_progress(import_each_tensor(outside, loaded, out), "Reading")
    # No file says whether another program's model was trained on dialogues; a template may lie beside any model.
    has_template = isinstance(loaded, HfTokenizer) and (yield from _has_template(loaded))
    return Imported(out, checkpoint.directory, outside.config, has_template)


def _has_template(tokenizer: Tokenizer) -> Task[bool]:
    """Return whether a model can be asked in turns; yields what is wrong with a template that cannot be used."""
    from lowvram.errors import LowvramError
    from lowvram.generate.chat_template import Message, load_chat_template

    try:
        template = load_chat_template(tokenizer)
        if template is not None:
            template.render([Message("user", "Merhaba")])
    except LowvramError as error:
        yield Notice(f"The model is imported; its chat template cannot be used: {error}", "warning")
        return False
    return template is not None
