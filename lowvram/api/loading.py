"""From the path of a run or checkpoint to a model on its device, with its tokenizer; generates nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram.api.tasks import Notice, Task

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
class LoadedModel:
    """A model on its device and its tokenizer.

    path: the directory that it was read from.  checkpoint, run: what it was trained as; None where another program
    wrote it.  dtype: to compute in.  precision: of its matrices.  reason: why that one, as half a sentence.
    trained_len: tokens of the longest text that it was trained on.
    """

    path: Path
    checkpoint: Checkpoint | None
    run: RunConfig | None
    config: ModelConfig
    tokenizer: Tokenizer
    model: Transformer
    dtype: torch.dtype
    precision: str
    reason: str
    trained_len: int


def load_model(
    path: Path, device: str = "auto", precision: Precision | None = None, as_trained: bool = False
) -> Task[LoadedModel]:
    """Open the newest whole checkpoint of a run, or the one named, or a directory as `lowvram export` writes it.

    precision: of its matrices; without it the card's choice or, as_trained, the one that a run validates in.
    Raises CheckpointError where there is no checkpoint that can be read, MachineError where the device is not here.
    """
    from lowvram.api.device import choose_device
    from lowvram.convert.hf.reader import is_hf_directory, open_hf
    from lowvram.data.hf_tokenizer import load_tokenizer
    from lowvram.generate.precision import inference_precision_as_trained
    from lowvram.generate.weights import CheckpointReader

    chosen = choose_device(device)
    yield from chosen.notices
    if is_hf_directory(path):
        outside = open_hf(path)
        for problem in outside.notices:
            yield Notice(problem, "warning")
        tokenizer = load_tokenizer(path, outside.config.vocabulary)
        reading = yield from choose_reading_on(chosen.device, precision)
        return _load(outside, path, tokenizer, reading, chosen.device, outside.form.trained_positions)
    checkpoint, run = yield from open_checkpoint(path)
    tokenizer = load_tokenizer(checkpoint.directory)
    if as_trained and precision is None:
        reading = inference_precision_as_trained(run.train.precision)
    else:
        reading = yield from choose_reading_on(chosen.device, precision)
    source, directory = CheckpointReader(checkpoint, run.model), checkpoint.directory
    return _load(source, directory, tokenizer, reading, chosen.device, run.train.seq_len, checkpoint, run)


def open_checkpoint(path: Path) -> Task[tuple[Checkpoint, RunConfig]]:
    """Return the newest whole checkpoint of a run, or the one named, and the run that it is of; reads no weights.

    Raises CheckpointError where there is none, or where it describes a run that this version does not know.
    """
    from lowvram.generate.saved_run import check_readable, saved_config
    from lowvram.storage.checkpoint import find_checkpoint

    checkpoint, passed_over = find_checkpoint(path, needs_state=False, check=check_readable)
    for problem in passed_over:
        yield Notice(f"Passed over a corrupt checkpoint: {problem}", "warning")
    if checkpoint.notice:
        yield Notice(checkpoint.notice)
    return checkpoint, saved_config(checkpoint)


def _load(
    source: WeightReader,
    path: Path,
    tokenizer: Tokenizer,
    reading: InferencePrecision,
    device: torch.device,
    trained_len: int,
    checkpoint: Checkpoint | None = None,
    run: RunConfig | None = None,
) -> LoadedModel:
    from lowvram.generate.weights import load_for_inference
    from lowvram.model.transformer import lay_by_columns
    from lowvram.objective import DTYPES
    from lowvram.train.oom import free_memory

    dtype = DTYPES[reading.compute_dtype]
    model = load_for_inference(source, reading.weight_precision, device, dtype)
    if device.type == "cpu":
        model = lay_by_columns(model)
    free_memory(device)
    read_in = (dtype, reading.weight_precision, reading.reason)
    return LoadedModel(path, checkpoint, run, source.config, tokenizer, model, *read_in, trained_len)


def choose_reading_on(device: torch.device, precision: Precision | None) -> Task[InferencePrecision]:
    """Return how a model is read on a device of this machine; on a processor by a measurement that is made once."""
    from lowvram_kernels.dispatch import card_of

    from lowvram.errors import refuse_unknown
    from lowvram.generate.precision import PRECISIONS, choose_inference_precision
    from lowvram.generate.processor import find_pace, pace_path

    refuse_unknown("precision", precision, PRECISIONS)
    card, has_bf16 = card_of(device), multiplies_bf16()
    if device.type != "cpu" or not has_bf16 or precision in ("bf16", "fp32"):
        return choose_inference_precision(card, precision, has_bf16)
    pace, is_new = find_pace()
    if is_new:
        yield Notice(f"Timed this processor's products in fp32, bf16 and INT8, kept in {pace_path()}.", "detail")
    return choose_inference_precision(card, precision, pace.is_bf16_faster, pace.reason, pace.fastest == "int8")


def multiplies_bf16() -> bool:
    """Return whether this processor has instructions that multiply bf16."""
    import torch

    # Of x86 and of ARM; torch before 2.10 tells of none.
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
