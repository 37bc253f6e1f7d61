"""From the path of a run or checkpoint to a model that is ready to use, for every command that reads one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from lowvram.checkpoint import Checkpoint
    from lowvram.config import ModelConfig, RunConfig
    from lowvram.data.tokenizer import Tokenizer
    from lowvram.generate.precision import Precision, Reading
    from lowvram.model.transformer import Transformer


@dataclass(frozen=True)
class Loaded:
    """A model on its device and its tokenizer.

    checkpoint, what: what it was trained as; None where another program wrote it.  dtype: to compute in.  precision:
    of its matrices.  reason: why that one, as half a sentence.  trained_len: tokens of the longest text that it was trained on.
    """

    checkpoint: Checkpoint | None
    what: RunConfig | None
    config: ModelConfig
    tokenizer: Tokenizer
    model: Transformer
    dtype: torch.dtype
    precision: str
    reason: str
    trained_len: int


def load_model(path: Path, device: str, precision: Precision | None = None, as_trained: bool = False) -> Loaded:
    """Open the newest whole checkpoint of a run, or the one named.

    precision: of its matrices; without it the card's choice or, as_trained, the one that the run validates in.
    """
    from lowvram.checkpoint import find_checkpoint
    from lowvram.cli.machine import choose_device
    from lowvram.cli.show import notice
    from lowvram.data.tokenizer import Tokenizer
    from lowvram.generate.precision import read_as_trained
    from lowvram.generate.weights import CheckpointSource, load_for_reading
    from lowvram.objective import DTYPES
    from lowvram.runfile import from_portable

    checkpoint, passed_over = find_checkpoint(path, needs_state=False)
    for problem in passed_over:
        notice(f"Passed over a corrupt checkpoint: {problem}", "yellow")
    what = from_portable(checkpoint.config(), checkpoint.directory.parent)
    tokenizer = Tokenizer.load(checkpoint.directory)
    place = choose_device(device)
    if as_trained and precision is None:
        reading = read_as_trained(what.train.precision)
    else:
        reading = choose_here(place, precision)
    dtype = DTYPES[reading.flow]
    model = load_for_reading(CheckpointSource(checkpoint, what.model), reading.kept, place, dtype)
    seq_len = what.train.seq_len
    return Loaded(checkpoint, what, what.model, tokenizer, model, dtype, reading.kept, reading.reason, seq_len)


def choose_here(device: torch.device, precision: Precision | None) -> Reading:
    """Choose how a model is read on a device of this machine."""
    import torch
    from lowvram_kernels.dispatch import card_of

    from lowvram.generate.precision import choose_reading

    # Of x86 and of ARM; torch before 2.10 tells of none.
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    has_fast_bf16 = any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return choose_reading(card_of(device), precision, has_fast_bf16)
