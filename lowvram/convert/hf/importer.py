"""Imports another program's model as a checkpoint of ours: step 0 of a run, from which other runs can start."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import torch
from lowvram_kernels.quant.quantise import QuantTensor, dequantise
from torch import Tensor

from lowvram.config.run import Corpus, DataConfig, RunConfig, RunOptions
from lowvram.config.run_file import to_portable
from lowvram.config.train import TrainConfig
from lowvram.convert.hf.reader import HfReader
from lowvram.convert.hf.tensor_names import name_pieces
from lowvram.data.tokenizer import Tokenizer
from lowvram.errors import CheckpointError
from lowvram.storage.checkpoint import Checkpoint, Store
from lowvram.storage.disk import DISK, Disk

# Stands for the path of the training data, which is unknown for another program's model.
_NO_DATA = "unknown"


def import_each_tensor(
    outside: HfReader, tokenizer: Tokenizer, run: Path, disk: Disk = DISK
) -> Generator[tuple[int, int], None, Checkpoint]:
    """Write another program's model as the first checkpoint of the run directory `run`, with its tokenizer beside it.

    Yields how many tensors of how many are read.  All values are exact: fp16 becomes fp32, and FP8 becomes bf16 where
    that is exact, else fp32.
    Raises CheckpointError where the tokenizer has ids that the model has no row for.
    """
    config = outside.config
    if tokenizer.size != config.vocabulary:
        raise CheckpointError(
            f"The tokenizer has {tokenizer.size} ids, and the model {config.vocabulary} rows for them (vocab_size).",
            "Every id needs its row, and every row that is drawn an id.",
            "Name the model's own tokenizer with `tokenizer`.",
        )
    weights = {}
    for done, name in enumerate(outside.names(), 1):
        weights[name] = _widen_exactly(outside.read(name))
        _check_finite(outside, name, weights[name])
        yield done, len(outside.names())
    what = _describe(outside, weights["embedding"].dtype, run)
    tokenizer.save(run / "tokenizer", disk)
    hashes = {"tokenizer": tokenizer.hash}
    numbers = {"step": 0, "tokens": 0, "imported_from": outside.directory.resolve().name}
    return Store(run, disk=disk).save(weights, {}, numbers, to_portable(what, run), run / "tokenizer", hashes)


def _widen_exactly(tensor: Tensor | QuantTensor) -> Tensor:
    """Return a tensor of a file in one of our dtypes that holds all its values exactly."""
    if isinstance(tensor, QuantTensor):
        wide = dequantise(tensor, torch.float32)
        narrow = wide.to(torch.bfloat16)
        return narrow if torch.equal(narrow.float(), wide) else wide
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def _check_finite(outside: HfReader, name: str, weight: Tensor) -> None:
    not_finite = weight.numel() - int(torch.isfinite(weight).sum())
    if not_finite:
        pieces = name_pieces(name, outside.config)
        raise CheckpointError(
            f"{pieces[0]}{f' or one of {len(pieces) - 1} beside it' if len(pieces) > 1 else ''} holds no numbers.",
            f"{not_finite:,} of {weight.numel():,} values are infinite or NaN, so that every answer would be, too.",
            "The training went wrong, or the file is damaged: copy it anew, or take another one.",
        )


def _describe(outside: HfReader, dtype: torch.dtype, run: Path) -> RunConfig:
    """Return a run with this model; its recipe contains only what the model's files say."""
    length = outside.form.trained_positions
    numbers = "bf16" if dtype == torch.bfloat16 else "fp32"
    return RunConfig(
        model=outside.config,
        data=DataConfig(train=(Corpus(path=run / _NO_DATA),), tokenizer=run / "tokenizer"),
        train=TrainConfig.model_validate(
            {"tokens": length, "seq_len": length, "batch_tokens": length, "precision": numbers, "weights": numbers}
        ),
        run=RunOptions(dir=run),
    )
