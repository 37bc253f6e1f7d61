"""Writes a model as a directory that transformers opens with no code of ours; knows no run and no command line.

    config.json  generation_config.json  model.safetensors (in parts, with an index, where it is large)
    tokenizer.json  tokenizer_config.json  README.md and other files that the caller passes

The directory gets its final name only when it is complete.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lowvram_kernels.quant.quantise import QuantTensor, dequantise
from torch import Tensor

from lowvram.convert.fp8 import UnquantisedModules, quantise_piece
from lowvram.convert.hf.config_out import to_hf_config
from lowvram.convert.hf.tensor_names import EMBEDDING, HEAD, cut, name_pieces, shapes_of
from lowvram.data.hf_tokenizer import HfTokenizer
from lowvram.data.tokenizer import Tokenizer
from lowvram.errors import CheckpointError
from lowvram.generate.chat_template import is_dialogue
from lowvram.generate.sampling import Sampler
from lowvram.generate.weight_reader import WeightReader
from lowvram.storage.disk import DISK, Disk, explain_full_disk, free_bytes, name_beside
from lowvram.storage.tensor_files import write_tensors

MOST_BYTES = 5_000_000_000  # the largest size of one file, as in transformers' own save_pretrained
Numbers = Literal["fp32", "bf16", "fp8"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True)
class ExportOptions:
    """How a model is written.

    numbers: the number format of its matrices; norms, routers and their biases are then fp32.  None keeps all stored
    formats.  max_positions: the longest text that it was trained on.  most_bytes: the size limit of one weights file.
    """

    max_positions: int
    numbers: Numbers | None = None
    most_bytes: int = MOST_BYTES


def write_each_tensor(
    source: WeightReader,
    tokenizer: Tokenizer,
    out: Path,
    options: ExportOptions,
    more: Mapping[str, bytes],
    disk: Disk = DISK,
) -> Generator[tuple[int, int], None, int]:
    """Write a model, its tokenizer and `more` files by name; yields which tensor of how many begins.

    Returns the bytes of its weights.  Raises ExportError where transformers has no such class, CheckpointError where
    `out` exists, DiskFullError.
    """
    settings = to_hf_config(source.config, options.max_positions)
    refuse_existing(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = name_beside(out, "tmp")
    needed = estimate_bytes(source, options.numbers)
    try:
        with explain_full_disk(out.parent, needed):
            if free_bytes(out.parent) < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(draft))
            draft.mkdir()
            parts, unquantised = _Parts(draft, options.most_bytes, disk), UnquantisedModules()
            progress = (0, 0)
            for begun, name, tensor in _tensors(source, options.numbers, unquantised):
                if begun != progress:
                    yield begun
                progress = begun
                if name == EMBEDDING:
                    settings["dtype"] = settings["torch_dtype"] = _NAMES[tensor.dtype]
                parts.add(name, tensor)
            written = parts.finish()
            if options.numbers == "fp8":
                settings["quantization_config"] = unquantised.settings()
            disk.write(draft / "config.json", as_json(settings | _special_ids(tokenizer)))
            disk.write(draft / "generation_config.json", as_json(_generation(tokenizer)))
            tokenizer.save(draft, disk)
            if not _keeps_chat_template(tokenizer):
                without_template = {key: value for key, value in tokenizer.settings.items() if key != "chat_template"}
                disk.write(draft / "tokenizer_config.json", as_json(without_template))
            for name, data in more.items():
                disk.write(draft / name, data)
            disk.sync_directory(draft)
            disk.rename(draft, out)
    finally:
        if draft.exists():
            disk.remove_tree(draft, ignore_errors=True)
    return written


def refuse_existing(out: Path) -> None:
    """Raise CheckpointError where `out` exists, since it would be overwritten."""
    if out.exists():
        raise CheckpointError(
            f"{out} exists already.", "It is not overwritten.", "Give `out` another name, or delete it."
        )


def as_json(value: Any) -> bytes:
    """Return a value as the text of a JSON file."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def estimate_bytes(source: WeightReader, numbers: Numbers | None) -> int:
    """Return about how many bytes the weights will take; fp8 takes a little more than this."""
    count = sum(shape.numel() for shape in shapes_of(source.config).values())
    embedding = source.read("embedding")
    stored_bytes = 1 if isinstance(embedding, QuantTensor) else embedding.element_size()
    return count * {"fp32": 4, "bf16": 2, "fp8": 1, None: stored_bytes}[numbers]


def _keeps_chat_template(tokenizer: Tokenizer) -> bool:
    """Say whether the chat template is exported: ours only with a dialogue tokenizer, another program's always."""
    return is_dialogue(tokenizer) or isinstance(tokenizer, HfTokenizer)


def _special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the ids that begin, end and pad texts; programs stop at each of eos_token_id."""
    stops = list(tokenizer.stop_ids)
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": stops, "pad_token_id": tokenizer.pad_id}


def _generation(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the generation settings with which other programs sample and stop as `lowvram chat` does."""
    defaults = Sampler()
    return {
        **_special_ids(tokenizer),
        "do_sample": True,
        "temperature": defaults.temperature,
        "top_k": defaults.top_k,
        "top_p": defaults.top_p,
        "repetition_penalty": defaults.repetition_penalty,
    }


def _tensors(
    source: WeightReader, numbers: Numbers | None, unquantised: UnquantisedModules
) -> Iterator[tuple[tuple[int, int], str, Tensor]]:
    """Yield every tensor under transformers' name and in its layout, after the number of ours that it is part of."""
    config, shapes = source.config, shapes_of(source.config)
    for number, (ours, shape) in enumerate(shapes.items(), 1):
        begun = (number, len(shapes))
        pieces = name_pieces(ours, config)
        stored = source.read(ours)
        tensor = dequantise(stored, torch.float32) if isinstance(stored, QuantTensor) else stored
        is_matrix = len(shape) > 1 and not ours.endswith("router.weight")
        dtype = tensor.dtype if numbers is None else _DTYPES[numbers] if is_matrix else torch.float32
        for name, piece in zip(pieces, cut(tensor, len(pieces)), strict=True):
            if numbers == "fp8" and is_matrix and ours.startswith("blocks."):
                # The stored values are quantised directly: rounding to bf16 first would round twice.
                yield from ((begun, *part) for part in quantise_piece(name, piece, unquantised))
            else:
                yield begun, name, piece.to(dtype)
            # MLX and others do not support DeepSeek or GLM models whose head is the embedding.
            if name == EMBEDDING and config.tied and (config.attention.kind == "mla" or config.ffn.kind == "moe"):
                yield begun, HEAD, piece.to(dtype, copy=True)


class _Parts:
    """Writes weights to several files, each when it is full; the files get their final names when all are written."""

    def __init__(self, directory: Path, most_bytes: int, disk: Disk) -> None:
        self._directory, self._most_bytes, self._disk = directory, most_bytes, disk
        self._waiting: dict[str, Tensor] = {}
        self._waiting_bytes = 0
        self._written: list[list[str]] = []
        self._total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Add one tensor."""
        size = tensor.numel() * tensor.element_size()
        if self._waiting and self._waiting_bytes + size > self._most_bytes:
            self._flush()
        self._waiting[name] = tensor
        self._waiting_bytes += size
        self._total_bytes += size

    def finish(self) -> int:
        """Write the last file and give all files their names; returns the bytes of all tensors."""
        self._flush()
        count = len(self._written)
        if count == 1:
            self._disk.rename(self._draft(0), self._directory / "model.safetensors")
            return self._total_bytes
        where: dict[str, str] = {}
        for number, names in enumerate(self._written):
            final = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._disk.rename(self._draft(number), self._directory / final)
            where |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(where.items()))}
        self._disk.write(self._directory / "model.safetensors.index.json", as_json(index))
        return self._total_bytes

    def _draft(self, number: int) -> Path:
        return self._directory / f"part-{number}.safetensors"

    def _flush(self) -> None:
        # transformers requires this entry in the header.
        write_tensors(self._draft(len(self._written)), self._waiting, self._disk, {"format": "pt"})
        self._written.append(list(self._waiting))
        self._waiting, self._waiting_bytes = {}, 0
