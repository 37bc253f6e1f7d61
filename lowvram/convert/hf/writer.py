"""Writes a model as a directory that transformers opens with no code of ours; knows no run and no command line.

    config.json  generation_config.json  model.safetensors (in parts, with an index, where it is large)
    tokenizer.json  tokenizer_config.json  README.md and what else the caller gives

The directory has its name only when it is whole.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping
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
from lowvram.storage.checkpoint import write_tensors
from lowvram.storage.disk import DISK, Disk, explain_full_disk, free_bytes, name_beside

MOST_BYTES = 5_000_000_000  # of one file, as transformers' own save_pretrained has it
Numbers = Literal["fp32", "bf16", "fp8"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True)
class ExportOptions:
    """How a model is written.

    numbers: of its matrices; None: as they are kept.  Norms, routers and their biases stay as they are.
    max_positions: the longest text that it was trained on.  most_bytes: of one file of weights.
    """

    max_positions: int
    numbers: Numbers | None = None
    most_bytes: int = MOST_BYTES


def write_directory(
    source: WeightReader,
    tokenizer: Tokenizer,
    out: Path,
    wish: ExportOptions,
    more: Mapping[str, bytes],
    tell: Callable[[int, int], None] = lambda done, total: None,
    disk: Disk = DISK,
) -> int:
    """Write a model, its tokenizer and `more` files by name; returns the bytes of its weights.

    tell: is told how many of how many tensors are done.
    Raises ExportError where transformers has no such class, CheckpointError where `out` exists, DiskFullError.
    """
    settings = to_hf_config(source.config, wish.max_positions)
    refuse_existing(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = name_beside(out, "tmp")
    needed = estimate_bytes(source, wish.numbers)
    try:
        with explain_full_disk(out.parent, needed):
            if free_bytes(out.parent) < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(draft))
            draft.mkdir()
            parts, kept = _Parts(draft, wish.most_bytes, disk), UnquantisedModules()
            for name, tensor in _tensors(source, wish.numbers, kept, tell):
                if name == EMBEDDING:
                    settings["dtype"] = settings["torch_dtype"] = _NAMES[tensor.dtype]
                parts.add(name, tensor)
            written = parts.finish()
            if wish.numbers == "fp8":
                settings["quantization_config"] = kept.settings()
            disk.write(draft / "config.json", as_json(settings | _special_ids(tokenizer)))
            disk.write(draft / "generation_config.json", as_json(_generation(tokenizer)))
            tokenizer.save(draft, disk)
            if not _may_speak(tokenizer):
                silent = {key: value for key, value in tokenizer.settings.items() if key != "chat_template"}
                disk.write(draft / "tokenizer_config.json", as_json(silent))
            for name, data in more.items():
                disk.write(draft / name, data)
            disk.sync_directory(draft)
            disk.rename(draft, out)
    finally:
        if draft.exists():
            disk.remove_tree(draft, ignore_errors=True)
    return written


def refuse_existing(out: Path) -> None:
    """Raise CheckpointError where something would be written over."""
    if out.exists():
        raise CheckpointError(
            f"{out} exists already.", "It is not overwritten.", "Give --out another name, or delete it."
        )


def as_json(value: Any) -> bytes:
    """Return a value as the text of a JSON file."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def estimate_bytes(source: WeightReader, numbers: Numbers | None) -> int:
    """Return about how many bytes the weights will take: fp8 a little more than one a number."""
    count = sum(shape.numel() for shape in shapes_of(source.config).values())
    embedding = source.read("embedding")
    as_kept = 1 if isinstance(embedding, QuantTensor) else embedding.element_size()
    return count * {"fp32": 4, "bf16": 2, "fp8": 1, None: as_kept}[numbers]


def _may_speak(tokenizer: Tokenizer) -> bool:
    """Say whether a chat template belongs to a model: another program's comes along, whatever the model has learnt."""
    return is_dialogue(tokenizer) or isinstance(tokenizer, HfTokenizer)


def _special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the ids that open, end and fill texts; programs stop at each of eos_token_id."""
    stops = list(tokenizer.stop_ids)
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": stops, "pad_token_id": tokenizer.pad_id}


def _generation(tokenizer: Tokenizer) -> dict[str, Any]:
    """Answers as `lowvram chat` gives them, which end where its do."""
    usual = Sampler()
    return {
        **_special_ids(tokenizer),
        "do_sample": True,
        "temperature": usual.temperature,
        "top_k": usual.top_k,
        "top_p": usual.top_p,
        "repetition_penalty": usual.repetition_penalty,
    }


def _tensors(
    source: WeightReader, numbers: Numbers | None, kept: UnquantisedModules, tell: Callable[[int, int], None]
) -> Iterator[tuple[str, Tensor]]:
    """Return every tensor under transformers' name and in its layout."""
    config, shapes = source.config, shapes_of(source.config)
    for done, (ours, shape) in enumerate(shapes.items()):
        pieces = name_pieces(ours, config)
        found = source.read(ours)
        tensor = dequantise(found, torch.float32) if isinstance(found, QuantTensor) else found
        is_matrix = len(shape) > 1 and not ours.endswith("router.weight")
        dtype = tensor.dtype if numbers is None else _DTYPES[numbers] if is_matrix else torch.float32
        for name, piece in zip(pieces, cut(tensor, len(pieces)), strict=True):
            if numbers == "fp8" and is_matrix and ours.startswith("blocks."):
                # From what is kept: rounding to bf16 between would round twice.
                yield from quantise_piece(name, piece, kept)
            else:
                yield name, piece.to(dtype)
            # MLX and others have no DeepSeek or GLM whose head is the embedding.
            if name == EMBEDDING and config.tied and (config.attention.kind == "mla" or config.ffn.kind == "moe"):
                yield HEAD, piece.to(dtype, copy=True)
        tell(done + 1, len(shapes))


class _Parts:
    """Files of weights, each written when it is full; numbered when all of them are there."""

    def __init__(self, directory: Path, most_bytes: int, disk: Disk) -> None:
        self._directory, self._most_bytes, self._disk = directory, most_bytes, disk
        self._waiting: dict[str, Tensor] = {}
        self._waiting_bytes = 0
        self._written: list[list[str]] = []
        self._total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor."""
        size = tensor.numel() * tensor.element_size()
        if self._waiting and self._waiting_bytes + size > self._most_bytes:
            self._flush()
        self._waiting[name] = tensor
        self._waiting_bytes += size
        self._total_bytes += size

    def finish(self) -> int:
        """Write the rest and give the files their names; returns the bytes of all tensors."""
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
        # transformers asks for this word in the header.
        write_tensors(self._draft(len(self._written)), self._waiting, self._disk, {"format": "pt"})
        self._written.append(list(self._waiting))
        self._waiting, self._waiting_bytes = {}, 0
