"""From the path of a run or checkpoint to a model that is ready to use, for every command that reads one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from lowvram.checkpoint import Checkpoint
    from lowvram.config import RunConfig
    from lowvram.data.tokenizer import Tokenizer
    from lowvram.model.transformer import Transformer


@dataclass(frozen=True)
class Loaded:
    """A checkpoint's model on its device, its tokenizer, and what it was trained as."""

    checkpoint: Checkpoint
    what: RunConfig
    tokenizer: Tokenizer
    model: Transformer
    dtype: torch.dtype


def load_model(path: Path, device: str) -> Loaded:
    """Open the newest whole checkpoint of a run, or the one named; the dtype is the one it was trained in."""
    from lowvram.checkpoint import find_checkpoint
    from lowvram.cli.machine import choose_device
    from lowvram.cli.show import notice
    from lowvram.data.tokenizer import Tokenizer
    from lowvram.model.transformer import Transformer, cast_for_reading, lay_by_columns
    from lowvram.objective import DTYPES
    from lowvram.runfile import from_portable
    from lowvram.train.state import load_weights

    checkpoint, passed_over = find_checkpoint(path, needs_state=False)
    for problem in passed_over:
        notice(f"Passed over a corrupt checkpoint: {problem}", "yellow")
    what = from_portable(checkpoint.config(), checkpoint.directory.parent)
    dtype = DTYPES[what.train.precision]
    model = Transformer(what.model, seed=None, device=choose_device(device), dtype=dtype).eval()
    load_weights(model, checkpoint)
    tokenizer = Tokenizer.load(checkpoint.directory)
    model = cast_for_reading(model, dtype)
    if model.embedding.device.type == "cpu":
        model = lay_by_columns(model)
    return Loaded(checkpoint, what, tokenizer, model, dtype)
