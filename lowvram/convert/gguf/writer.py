"""Writes a model and its tokenizer as one GGUF file; knows the file, while llama_cpp.py knows names and layouts.

The file is written tensor by tensor, so that only one of ours is in memory, and appears only when it is complete.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from lowvram_kernels.quant.quantise import QuantTensor, dequantise
from torch import Tensor

from lowvram.config.model import ModelConfig
from lowvram.convert.gguf.llama_cpp import TensorLayout, Value, architecture_of, keys_of, layouts_of
from lowvram.data.tokenizer import SPECIALS, Tokenizer
from lowvram.errors import ExportError, MachineError
from lowvram.generate.chat_template import is_dialogue
from lowvram.generate.weight_reader import WeightReader
from lowvram.model.transformer import Transformer
from lowvram.storage.disk import DISK, Disk, explain_full_disk, name_beside

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

Numbers = Literal["f32", "f16", "bf16", "q8_0"]

# The name of `EXPRESSION` (data/tokenizer.py) in llama.cpp's src/llama-vocab.cpp.
_PRE_TOKENIZER = "ufakzeka"
# The first builds that know it: ggml-org/llama.cpp pull request 29033, September 2026; llama-cpp-python was tested.
LEAST_BUILD, LEAST_PYTHON = "b11034", "0.3.36"
# Above this, an fp16 number is infinite; q8_0 stores its scales in fp16, too.
_FP16_MAX = 65_504.0


class Written(NamedTuple):
    """The written file.  kept_wider: tensors in f16 although q8_0 was requested, as their rows are not blocks of 32."""

    path: Path
    size_bytes: int
    tensors: int
    kept_wider: tuple[str, ...]


class _Entry(NamedTuple):
    """A tensor of the file: `cut` out of our tensor `ours` and stored in `kind`."""

    ours: str
    cut: TensorLayout
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    size_bytes: int


def write_gguf(
    source: WeightReader,
    tokenizer: Tokenizer,
    out: Path,
    context_len: int,
    numbers: Numbers = "bf16",
    metadata: Mapping[str, str] | None = None,
    disk: Disk = DISK,
) -> Written:
    """Write the file `out`, with matrices in the format `numbers` and everything else in fp32.

    context_len: how many tokens the model can read.  metadata: values for the keys `general.*`: name, license, …
    Raises ExportError where llama.cpp cannot compute this model or hold its numbers, MachineError without `gguf`,
    DiskFullError.
    """
    gguf = _import_gguf()
    config = source.config
    architecture = architecture_of(config)
    _check_tokenizer(config, tokenizer)
    entries = _entries(config, numbers)
    needed = sum(entry.size_bytes for entry in entries)
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = name_beside(out, "tmp")
    with closing(gguf.GGUFWriter(None, architecture)) as writer:
        _add_keys(writer, keys_of(config, context_len) | _general_keys(numbers, metadata or {}))
        _add_tokenizer(writer, tokenizer)
        for entry in entries:
            # The dtype is given as fp32, because with bytes the package would take the shape for a shape in bytes.
            writer.add_tensor_info(entry.cut.name, entry.shape, np.dtype(np.float32), entry.size_bytes, entry.kind)

        def write(path: Path) -> None:
            with closing(writer):
                _write_head(writer, path, needed, disk)
                for array in _arrays(source, entries):
                    writer.write_tensor_data(array)

        try:
            with explain_full_disk(out.parent, needed):
                disk.write_with(draft, write)
                disk.rename(draft, out)
        finally:
            writer.close()
            draft.unlink(missing_ok=True)
    wider = tuple(entry.cut.name for entry in entries if numbers == "q8_0" and entry.kind.name == "F16")
    return Written(out, out.stat().st_size, len(entries), wider)


def _import_gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise MachineError(
            "GGUF files need the package gguf, which is not installed.",
            f"{error}.",
            "Install it in the folder of lowvram: pip install -e '.[export]'",
        ) from error
    return gguf


def _check_tokenizer(config: ModelConfig, tokenizer: Tokenizer) -> None:
    if tokenizer.size != config.vocabulary:
        raise ExportError(
            f"The model has rows for {config.vocabulary} ids and the tokenizer {tokenizer.size} ids.",
            "llama.cpp needs exactly one token for every row.",
            "Name the tokenizer that the model was trained with.",
        )


def _entries(config: ModelConfig, numbers: Numbers) -> list[_Entry]:
    """List the file's tensors in the order of ours; shapes come from a model on the meta device."""
    gguf = _import_gguf()
    kinds = gguf.GGMLQuantizationType
    entries = []
    for name, tensor in Transformer(config, seed=None, device="meta").state_dict().items():
        for cut in layouts_of(config, name):
            shape = tuple(cut.take(tensor).shape)
            kind = kinds.F32 if cut.is_exact or len(shape) == 1 else kinds[numbers.upper()]
            if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
                kind = kinds.F16
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            entries.append(_Entry(name, cut, shape, kind, prod(shape) // block * block_bytes))
    return entries


def _general_keys(numbers: Numbers, metadata: Mapping[str, str]) -> dict[str, Value]:
    gguf = _import_gguf()
    file_type = gguf.LlamaFileType["ALL_F32" if numbers == "f32" else f"MOSTLY_{numbers.upper()}"]
    general = {f"general.{key}": value for key, value in metadata.items()}
    fixed: dict[str, Value] = {"general.type": "model", "general.file_type": int(file_type)}
    if numbers == "q8_0":
        fixed["general.quantization_version"] = gguf.GGML_QUANT_VERSION
    return fixed | general


def _add_keys(writer: GGUFWriter, keys: Mapping[str, Value]) -> None:
    add: dict[type, Any] = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    add[str] = writer.add_string
    for key, value in keys.items():
        add[type(value)](key, value)


def _add_tokenizer(writer: GGUFWriter, tokenizer: Tokenizer) -> None:
    from gguf import TokenType

    model = tokenizer.parsed("tokenizer.json")["model"]
    writer.add_tokenizer_model("gpt2")  # what llama.cpp calls every byte-level BPE
    writer.add_tokenizer_pre(_PRE_TOKENIZER)
    writer.add_token_list(sorted(model["vocab"], key=model["vocab"].__getitem__))
    plain = tokenizer.size - len(SPECIALS)
    writer.add_token_types([TokenType.CONTROL] * len(SPECIALS) + [TokenType.NORMAL] * plain)
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(tokenizer.bos_id)
    # llama.cpp stops at this id and at eot.  In the packed data a text ends where the BOS of the next one follows.
    writer.add_eos_token_id(tokenizer.bos_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_mask_token_id(tokenizer.mask_id)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    if not is_dialogue(tokenizer):
        return  # with a template, programs would hold a dialogue with a model that has not learnt any
    writer.add_eot_token_id(tokenizer.end_of_turn_id)
    template = tokenizer.settings.get("chat_template")
    if template is not None:
        writer.add_chat_template(template)


def _write_head(writer: GGUFWriter, path: Path, needed: int, disk: Disk) -> None:
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    # numpy does not report a full disk clearly, only that fewer bytes were written, so the space is reserved first.
    disk.preallocate(writer.fout[0], writer.fout[0].tell() + needed)


def _arrays(source: WeightReader, entries: list[_Entry]) -> Iterator[np.ndarray]:
    """Yield the entries' data; each of our tensors is read once for all entries that are cut out of it."""
    from gguf.quants import quantize

    name, tensor = "", torch.empty(0)
    for entry in entries:
        if entry.ours != name:
            name, tensor = entry.ours, _read(source, entry.ours)
        part = entry.cut.take(tensor)
        _check_part(entry, part)
        yield quantize(part.contiguous().numpy(), entry.kind)


def _read(source: WeightReader, name: str) -> Tensor:
    tensor = source.read(name)
    return dequantise(tensor, torch.float32) if isinstance(tensor, QuantTensor) else tensor.detach().float()


def _check_part(entry: _Entry, part: Tensor) -> None:
    if tuple(part.shape) != entry.shape:
        raise ExportError(
            f"The weights' {entry.ours} makes a {entry.cut.name} of {list(part.shape)}.",
            f"The model's configuration asks for {list(entry.shape)}.",
            "They do not belong together: export the checkpoint as it was written.",
        )
    largest = part.abs().max().item()
    limit = _FP16_MAX if entry.kind.name in ("F16", "Q8_0") else torch.finfo(torch.float32).max
    if not largest <= limit:  # which is also true of NaN
        raise ExportError(
            f"The weights' {entry.ours} holds a {largest:g}.",
            f"Numbers of {entry.kind.name.lower()} end at {limit:g}.",
            "Export in bf16 or f32." if largest < float("inf") else "The training went wrong: take an earlier one.",
        )
