"""From the path of a run or checkpoint to a model that is ready to use, for every command that reads one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from lowvram.config.model import ModelConfig
    from lowvram.config.run import RunConfig
    from lowvram.data.tokenizer import Tokenizer
    from lowvram.generate.precision import InferencePrecision, Precision
    from lowvram.generate.weight_reader import WeightReader
    from lowvram.model.transformer import Transformer
    from lowvram.storage.checkpoint import Checkpoint


@dataclass(frozen=True)
class Loaded:
    """A model on its device and its tokenizer.

    checkpoint, what: what it was trained as; None where another program wrote it.  dtype: to compute in.  precision:
    of its matrices.  reason: why that one, as half a sentence.  trained_len: tokens of the longest text that it was
    trained on.
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
    """Open the newest whole checkpoint of a run, or the one named, or a directory as `lowvram export` writes it.

    precision: of its matrices; without it the card's choice or, as_trained, the one that a run validates in.
    """
    from lowvram.cli.console import notice
    from lowvram.cli.machine import choose_device
    from lowvram.convert.hf.reader import is_hf_directory, open_hf
    from lowvram.data.hf_tokenizer import load_tokenizer
    from lowvram.generate.precision import inference_precision_as_trained
    from lowvram.generate.weights import CheckpointReader
    from lowvram.storage.checkpoint import find_checkpoint
    from lowvram.train.start import check_readable

    place = choose_device(device)
    if is_hf_directory(path):
        outside = open_hf(path)
        for said in outside.notices:
            notice(said, "yellow")
        tokenizer, reading = load_tokenizer(path, outside.config.vocabulary), choose_here(place, precision)
        return _load(outside, tokenizer, reading, place, outside.form.trained_positions)
    checkpoint, passed_over = find_checkpoint(path, needs_state=False, check=check_readable)
    for problem in passed_over:
        notice(f"Passed over a corrupt checkpoint: {problem}", "yellow")
    if checkpoint.notice:
        notice(checkpoint.notice)
    what, tokenizer = read_config(checkpoint), load_tokenizer(checkpoint.directory)
    is_asked = precision is not None or not as_trained
    reading = choose_here(place, precision) if is_asked else inference_precision_as_trained(what.train.precision)
    source = CheckpointReader(checkpoint, what.model)
    return _load(source, tokenizer, reading, place, what.train.seq_len, checkpoint, what)


def _load(
    source: WeightReader,
    tokenizer: Tokenizer,
    reading: InferencePrecision,
    device: torch.device,
    trained_len: int,
    checkpoint: Checkpoint | None = None,
    what: RunConfig | None = None,
) -> Loaded:
    from lowvram.generate.weights import load_for_inference
    from lowvram.model.transformer import lay_by_columns
    from lowvram.objective import DTYPES
    from lowvram.train.oom import free_memory

    dtype = DTYPES[reading.flow]
    model = load_for_inference(source, reading.kept, device, dtype)
    if device.type == "cpu":
        model = lay_by_columns(model)
    free_memory(device)
    read_in = (dtype, reading.kept, reading.reason)
    return Loaded(checkpoint, what, source.config, tokenizer, model, *read_in, trained_len)


def choose_here(device: torch.device, precision: Precision | None) -> InferencePrecision:
    """Choose how a model is read on a device of this machine; on a processor by a measurement that is made once."""
    from lowvram_kernels.dispatch import card_of

    from lowvram.cli.console import notice
    from lowvram.generate.precision import choose_inference_precision
    from lowvram.generate.processor import find_pace, pace_path

    card, has_bf16 = card_of(device), multiplies_bf16()
    if device.type != "cpu" or not has_bf16 or precision in ("bf16", "fp32"):
        return choose_inference_precision(card, precision, has_bf16)
    pace, is_new = find_pace()
    if is_new:
        notice(f"Timed this processor's products in bf16 and fp32, kept in {pace_path()}.", "dim")
    return choose_inference_precision(card, precision, pace.is_bf16_faster, pace.reason)


def multiplies_bf16() -> bool:
    """Return whether this processor has instructions that multiply bf16."""
    import torch

    # Of x86 and of ARM; torch before 2.10 tells of none.
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def read_config(checkpoint: Checkpoint) -> RunConfig:
    """Return the run that a checkpoint is of; raises CheckpointError where this lowvram does not know such a run."""
    from lowvram.train.start import saved_config

    return saved_config(checkpoint)
