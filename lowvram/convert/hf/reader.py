"""A directory that another program wrote, or `lowvram export`, as a Source: mapped files, read a tensor at a time.

Knows transformers' layout of files and DeepSeek's FP8; never unpickles anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from lowvram_kernels.quant.quantise import BLOCK, QuantTensor, dequantise
from torch import Tensor

from lowvram.config.model import ModelConfig
from lowvram.convert.fp8 import SCALE
from lowvram.convert.hf.config_in import ImportedConfig, quote_value, read_hf_config
from lowvram.convert.hf.tensor_names import EMBEDDING, HEAD, join, join_scaled, name_pieces, shapes_of
from lowvram.errors import CheckpointError, ExportError
from lowvram.storage.json_files import JsonError, read_object

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_PLAIN = {"F32", "BF16", "F16"}
_CODES = "F8_E4M3"
# Tables that old files hold and that are computed here.
_COMPUTED = ("rotary_emb.inv_freq",)
_QUANTISED: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}


def is_hf_directory(directory: Path) -> bool:
    """Say whether a directory is a model in transformers' layout, and no checkpoint of ours."""
    return (directory / "config.json").is_file() and not (directory / "manifest.json").is_file()


def open_hf(directory: Path) -> HfReader:
    """Return the model in a directory as transformers lays it out: config.json and safetensors.

    Raises ExportError for a form that our model has not, CheckpointError for files that are missing, damaged or hold
    other tensors.
    """
    table = _read_table(directory / "config.json")
    quantised = table.get("quantization_config")
    if quantised is not None:
        _check_quantised(quantised)
    try:
        form = read_hf_config(table)
    except ExportError as error:
        raise ExportError(f"{directory / 'config.json'}: {error.what}", error.why, error.fix) from error
    return HfReader(directory, form, quantised is not None)


class HfReader:
    """A Source whose tensors lie in another program's files.

    notices: what was left aside, for people.
    """

    def __init__(self, directory: Path, form: ImportedConfig, is_quantised: bool) -> None:
        self.directory, self.form, self.config = directory, form, form.model
        self.notices: list[str] = []
        self._is_quantised = is_quantised
        self._files = {path: _open(path) for path in _find_files(directory)}
        self._home = {name: file for file in self._files.values() for name in file.keys()}  # noqa: SIM118
        self._check_size()
        self._shapes = shapes_of(self.config)
        self._check()

    config: ModelConfig

    def names(self) -> list[str]:
        """Return our names of all tensors."""
        return list(self._shapes)

    def read(self, name: str) -> Tensor | QuantTensor:
        """Return one of our tensors on the CPU, joined from its pieces; a view of the file where it is one piece.

        Codes and scales where all of it is stored in 8 bits and no block straddles two pieces; else fp32 numbers.
        """
        shape = self._shapes[name]
        pieces = [self._piece(piece) for piece in name_pieces(name, self.config)]
        scaled = [piece for piece in pieces if isinstance(piece, QuantTensor)]
        if scaled and len(scaled) == len(pieces):
            joined = join_scaled(scaled, shape)
            if joined is not None:
                return joined
        plain = [dequantise(piece, torch.float32) if isinstance(piece, QuantTensor) else piece for piece in pieces]
        return join(plain, shape)

    def _piece(self, name: str) -> Tensor | QuantTensor:
        tensor: Tensor = self._home[name].get_tensor(name)
        if tensor.dtype != torch.float8_e4m3fn:
            return tensor
        scale: Tensor = self._home[name + SCALE].get_tensor(name + SCALE)
        return QuantTensor(tensor.view(torch.uint8), scale.to(torch.float32))

    def _check_size(self) -> None:
        """Refuse numbers that the files cannot hold, before a model of that size is built."""
        config, count = self.config, len(self._home)
        size_bytes = sum(path.stat().st_size for path in self._files)
        routed = (config.layers - config.ffn.dense_layers) * config.ffn.experts if config.ffn.kind == "moe" else 0
        for said, least in (("num_hidden_layers", config.layers), ("n_routed_experts", routed)):
            if least > count:
                raise CheckpointError(
                    f"config.json asks for more tensors than there are: {said} alone for {least:,}.",
                    f"The files hold {count:,} tensors.",
                    "Copy the directory anew.",
                )
        if config.num_parameters() > size_bytes:
            raise CheckpointError(
                f"config.json describes a model of {config.num_parameters():,} parameters.",
                f"The weights' files have {size_bytes:,} bytes in all, less than one for each.",
                "Copy the directory anew.",
            )

    def _check(self) -> None:
        """Compare every name, shape and kind of number with what the form asks for, without reading a tensor."""
        expected = {
            piece: _piece_shape(shape, len(pieces))
            for name, shape in self._shapes.items()
            for pieces in [name_pieces(name, self.config)]
            for piece in pieces
        }
        missing = [name for name in expected if name not in self._home]
        if missing:
            raise CheckpointError(
                f"{self.directory} has no tensor {missing[0]}.",
                f"{len(missing)} of the {len(expected)} that its config.json asks for are missing.",
                "Copy the directory anew.",
            )
        for name, shape in expected.items():
            self._check_piece(name, shape)
        self._check_others(set(expected))
        if self.config.tied and HEAD in self._home:
            self._check_head()

    def _check_piece(self, name: str, shape: tuple[int, ...]) -> None:
        part = self._home[name].get_slice(name)
        found, kind = tuple(part.get_shape()), part.get_dtype()
        if found != shape:
            raise CheckpointError(
                f"{name} is {list(found)}.", f"config.json asks for {list(shape)}.", "Copy the directory anew."
            )
        if kind not in _PLAIN and not (kind == _CODES and self._is_quantised):
            raise CheckpointError(
                f"{name} holds numbers of the kind {kind}.",
                f"lowvram reads {', '.join(sorted(_PLAIN))}, and {_CODES} where quantization_config says fp8.",
                "Take the model in another precision.",
            )
        if kind != _CODES:
            return
        grid = tuple(-(-side // BLOCK) for side in shape)
        scale = self._home.get(name + SCALE)
        if scale is None or tuple(scale.get_slice(name + SCALE).get_shape()) != grid:
            raise CheckpointError(
                f"{name}{SCALE} is missing, or not {list(grid)}.",
                f"Every block of {BLOCK} × {BLOCK} codes needs its scale.",
                "Copy the directory anew.",
            )

    def _check_others(self, expected: set[str]) -> None:
        others = [name for name in self._home if name not in expected and name.removesuffix(SCALE) not in expected]
        others = [name for name in others if not name.endswith(_COMPUTED) and not (name == HEAD and self.config.tied)]
        extra = [name for name in others if self._is_behind_last_layer(name)]
        if extra:
            self.notices.append(f"{len(extra)} tensors of layers that predict further tokens are left aside (MTP).")
        strange = sorted(set(others) - set(extra))
        if strange:
            raise CheckpointError(
                f"{self.directory} holds {strange[0]}, which our model has not.",
                f"{len(strange)} tensors have no place in it, so that it would compute something else.",
                "lowvram cannot open this model.",
            )

    def _is_behind_last_layer(self, name: str) -> bool:
        parts = name.split(".")
        return parts[:2] == ["model", "layers"] and parts[2].isdigit() and int(parts[2]) >= self.config.layers

    def _check_head(self) -> None:
        head, embedding = (self._home[name].get_tensor(name) for name in (HEAD, EMBEDDING))
        if head.shape != embedding.shape or not torch.equal(head, embedding):
            raise CheckpointError(
                f"tie_word_embeddings is true, but {HEAD} is another matrix than {EMBEDDING}.",
                "One of the two is not meant.",
                "Set tie_word_embeddings to false in config.json if the head is.",
            )


def _piece_shape(shape: Sequence[int], count: int) -> tuple[int, ...]:
    if count == 1:
        return tuple(shape)
    rows = shape[0] * (shape[1] if len(shape) == 3 else 1)
    return rows // count, shape[-1]


def _read_table(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except OSError as error:
        why = f"{error.strerror or 'It cannot be read'}."
        raise CheckpointError(f"There is no {path}.", why, "Name a directory as transformers writes it.") from error
    except JsonError as error:
        raise CheckpointError(f"{path} cannot be used: {error}.", "", "Copy the directory anew.") from error


def _check_quantised(said: Any) -> None:
    if not isinstance(said, dict):
        raise ExportError(
            f"quantization_config is {quote_value(said)}.", "It must be a table.", "Copy the directory anew."
        )
    for key, wanted in _QUANTISED.items():
        if said.get(key, wanted) != wanted or (key == "quant_method" and key not in said):
            raise ExportError(
                f"quantization_config.{key} is {quote_value(said.get(key))}.",
                f"lowvram reads {wanted!r} only: E4M3 in blocks of {BLOCK} × {BLOCK}, as DeepSeek-V3 has it.",
                "Take the model in another precision.",
            )


def _find_files(directory: Path) -> list[Path]:
    index = directory / _INDEX
    if not index.is_file():
        if (directory / _SINGLE).is_file():
            return [directory / _SINGLE]
        raise CheckpointError(
            f"{directory} has neither {_SINGLE} nor {_INDEX}.",
            "Weights are read from safetensors only: other formats can hold programs.",
            "Take the model as safetensors.",
        )
    where = _read_table(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise CheckpointError(
            f"{index} has no weight_map.", "It says which file holds what.", "Copy the directory anew."
        )
    names = sorted(set(where.values()))
    for name in names:
        if Path(name).name != name or not (directory / name).is_file():
            raise CheckpointError(f"{index} names the file {name}, which is not there.", "", "Copy the directory anew.")
    return [directory / name for name in names]


def _open(path: Path) -> Any:
    try:
        return safetensors.safe_open(str(path), framework="pt")
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors.", f"{error}.", "Copy it anew.") from error
