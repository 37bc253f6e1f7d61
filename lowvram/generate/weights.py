"""Loads mapped weights into a model for inference, and converts each tensor as it is read; knows no directory.

Every matrix gets the requested precision: layers, experts, embedding and head alike.  There are two exceptions: norms,
routers and balancing biases stay in fp32, and with 8 bits MLA's `kv_b_proj` stays in 16 bits, because decoding
multiplies by its parts in another order and would need decoded copies of them beside the codes.  A processor that
decodes keeps those 16 bits in fp32 (`lay_by_columns`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from lowvram_kernels.dispatch import bytes_of
from lowvram_kernels.quant.quantise import QuantTensor, dequantise, quantise_weight
from torch import Tensor, nn

from lowvram.config.model import ModelConfig
from lowvram.errors import CheckpointError
from lowvram.generate.weight_reader import WeightReader
from lowvram.model.transformer import Transformer
from lowvram.storage.checkpoint import Checkpoint

_FORMS = {"fp8": "e4m3", "int8": "int8"}
_CODES = {"fp8": torch.uint8, "int8": torch.int8}
# The matrix that stays in 16 bits in a model whose other matrices are 8-bit codes.
_IN_16_BITS = "kv_b_proj.weight"
_PLAIN = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


class CheckpointReader:
    """Reads a checkpoint of lowvram: a WeightReader."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig) -> None:
        self.config = config
        self._tensors = checkpoint.map_weights()

    def names(self) -> list[str]:
        """Return the names of the model's tensors."""
        return self._tensors.names()

    def read(self, name: str) -> Tensor:
        """Return one tensor, memory-mapped."""
        return self._tensors.read(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor, from the file's header."""
        return self._tensors.shape(name)


@torch.no_grad()
def load_for_inference(
    reader: WeightReader,
    precision: str,
    device: torch.device | str = "cpu",
    compute_dtype: torch.dtype = torch.bfloat16,
) -> Transformer:
    """Return a reader's model, frozen, on the device; its matrices in fp8, int8, bf16, fp16 or fp32.

    compute_dtype: of the activations; with 8-bit precisions also of `kv_b_proj` (bf16 where it is fp32).  A matrix that
    is stored in the requested precision is used as it is: codes without a round trip, on the CPU the mapped file.
    Memory besides the model: one tensor, and what rounding it needs.
    Raises CheckpointError where a tensor is missing, unknown, of another shape, or NaN.
    """
    model = Transformer(reader.config, seed=None, device=device, is_hollow=True).eval().requires_grad_(False)
    expected = model.state_dict()
    _refuse_other_names(expected, reader)
    for name, parameter in expected.items():
        present = reader.read(name)
        shape = list(present.code.shape if isinstance(present, QuantTensor) else present.shape)
        _refuse_other_shape(name, shape, parameter)
        if is_matrix(name, shape):
            put(model, name, convert(name, present, precision, torch.device(device), compute_dtype))
        else:
            parameter.copy_(_decode(present, parameter.dtype))
    return model


def refuse_other_tensors(reader: CheckpointReader) -> None:
    """Raise CheckpointError where a tensor is missing, unknown or of another shape; reads none of them."""
    expected = Transformer(reader.config, seed=None, device="meta").state_dict()
    _refuse_other_names(expected, reader)
    for name, parameter in expected.items():
        _refuse_other_shape(name, list(reader.shape(name)), parameter)


def _refuse_other_names(expected: Mapping[str, Tensor], reader: WeightReader) -> None:
    present = set(reader.names())
    _refuse(sorted(expected.keys() - present), "is missing")
    _refuse(sorted(present - expected.keys()), "belongs to no layer")


def _refuse_other_shape(name: str, shape: list[int], parameter: Tensor) -> None:
    needed = list(parameter.shape)
    _refuse([name] if shape != needed else [], f"is {shape}, and the model needs {needed}")


def is_matrix(name: str, shape: Sequence[int]) -> bool:
    """Say whether a tensor gets the requested precision: all but norms, biases and routers do."""
    return len(shape) > 1 and not name.endswith("router.weight")


def put(model: Transformer, name: str, weight: Tensor | QuantTensor) -> None:
    """Set a matrix of the model: a plain tensor, or codes and beside them their scales."""
    owner, _, attribute = name.rpartition(".")
    layer = model.get_submodule(owner)
    code, scale = (weight.code, weight.scale) if isinstance(weight, QuantTensor) else (weight, None)
    layer._parameters[attribute] = nn.Parameter(code, requires_grad=False)
    if scale is not None:
        layer._buffers[f"{attribute}_scale"] = scale


def weight_bytes(model: Transformer) -> int:
    """Return the bytes of everything that a model holds: matrices, scales, norms and tables."""
    return bytes_of(*model.parameters(), *model.buffers())


def convert(
    name: str, present: Tensor | QuantTensor, precision: str, device: torch.device, compute_dtype: torch.dtype
) -> Tensor | QuantTensor:
    """Return a matrix in the precision in which the model keeps it."""
    if precision not in _FORMS or name.endswith(_IN_16_BITS):
        sixteen = torch.bfloat16 if compute_dtype == torch.float32 else compute_dtype
        return _decode(present, _PLAIN.get(precision, sixteen)).to(device)
    if not isinstance(present, QuantTensor):
        return quantise_weight(present.to(device), _FORMS[precision])
    if present.code.dtype != _CODES[precision]:
        return quantise_weight(dequantise(present, torch.float32).to(device), _FORMS[precision])
    if present.code.dtype == torch.uint8:
        # The kernels that decode e4m3 at every use do not check for NaN.
        _refuse([name] if bool(((present.code & 0x7F) == 0x7F).any()) else [], "holds NaN")
    return QuantTensor(present.code.to(device), present.scale.to(device))


def _decode(present: Tensor | QuantTensor, dtype: torch.dtype) -> Tensor:
    return dequantise(present, dtype) if isinstance(present, QuantTensor) else present.to(dtype)


def _refuse(names: list[str], problem: str) -> None:
    if names:
        more = f", and so it is with {len(names) - 1} more" if len(names) > 1 else ""
        raise CheckpointError(
            "The weights are not those of the model that their configuration describes.",
            f"{names[0]} {problem}{more}.",
            "The directory was altered, or mixed from two: copy it anew.",
        )
