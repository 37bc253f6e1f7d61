"""From mapped weights to a model that only reads, tensor by tensor, each rounded as it comes; knows no directory.

Every matrix is kept in the numbers asked for: layers, experts, embedding and head alike.  Three kinds stay as they
are: norms, routers and balancing biases in fp32, and with 8 bits MLA's `kv_b_proj` in 16 bits, because decoding
multiplies by its parts in another order and would need them decoded beside the codes.
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
# Of a model whose other matrices are codes.
_IN_16_BITS = "kv_b_proj.weight"
_PLAIN = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


class CheckpointReader:
    """A checkpoint of ours as a Source."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig) -> None:
        self.config = config
        self._tensors = checkpoint.map_weights()

    def names(self) -> list[str]:
        """Return the names of the model's tensors."""
        return self._tensors.names()

    def read(self, name: str) -> Tensor:
        """Return one tensor, mapped."""
        return self._tensors.read(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor, from the file's header."""
        return self._tensors.shape(name)


@torch.no_grad()
def load_for_inference(
    source: WeightReader,
    precision: str,
    device: torch.device | str = "cpu",
    flow: torch.dtype = torch.bfloat16,
) -> Transformer:
    """Return the model of a source, frozen, on the device; its matrices in fp8, int8, bf16, fp16 or fp32.

    flow: what is computed in, by which the one matrix that 8 bits leave out is kept.  What is stored in the precision
    asked for is taken over: codes without a round trip, and on the CPU as the file's own bytes.
    Alive besides the model: one tensor, and what rounding it has at work.
    Raises CheckpointError where a tensor is missing, unknown, of another shape, or no number.
    """
    model = Transformer(source.config, seed=None, device=device, is_hollow=True).eval().requires_grad_(False)
    own = model.state_dict()
    _refuse_other_names(own, source)
    for name, place in own.items():
        found = source.read(name)
        shape = list(found.code.shape if isinstance(found, QuantTensor) else found.shape)
        _refuse_other_shape(name, shape, place)
        if is_matrix(name, shape):
            put(model, name, _keep(name, found, precision, torch.device(device), flow))
        else:
            place.copy_(_decode(found, place.dtype))
    return model


def refuse_other_tensors(source: CheckpointReader) -> None:
    """Raise CheckpointError where a tensor is missing, unknown or of another shape; reads none of them."""
    own = Transformer(source.config, seed=None, device="meta").state_dict()
    _refuse_other_names(own, source)
    for name, place in own.items():
        _refuse_other_shape(name, list(source.shape(name)), place)


def _refuse_other_names(own: Mapping[str, Tensor], source: WeightReader) -> None:
    stored = set(source.names())
    _refuse(sorted(own.keys() - stored), "is missing")
    _refuse(sorted(stored - own.keys()), "belongs to no layer")


def _refuse_other_shape(name: str, shape: list[int], place: Tensor) -> None:
    _refuse([name] if shape != list(place.shape) else [], f"is {shape}, and the model needs {list(place.shape)}")


def is_matrix(name: str, shape: Sequence[int]) -> bool:
    """Say whether a tensor is kept in the precision asked for: all but norms, biases and routers are."""
    return len(shape) > 1 and not name.endswith("router.weight")


def put(model: Transformer, name: str, weight: Tensor | QuantTensor) -> None:
    """Put a matrix in its place in the model: plain, or codes with their scales beside them."""
    owner, _, attribute = name.rpartition(".")
    layer = model.get_submodule(owner)
    code, scale = (weight.code, weight.scale) if isinstance(weight, QuantTensor) else (weight, None)
    layer._parameters[attribute] = nn.Parameter(code, requires_grad=False)
    if scale is not None:
        layer._buffers[f"{attribute}_scale"] = scale


def weight_bytes(model: Transformer) -> int:
    """Return the bytes of everything that a model holds: matrices, scales, norms and tables."""
    return bytes_of(*model.parameters(), *model.buffers())


def _keep(
    name: str, found: Tensor | QuantTensor, precision: str, device: torch.device, flow: torch.dtype
) -> Tensor | QuantTensor:
    """Return a matrix as the model keeps it."""
    if precision not in _FORMS or name.endswith(_IN_16_BITS):
        sixteen = torch.bfloat16 if flow == torch.float32 else flow
        return _decode(found, _PLAIN.get(precision, sixteen)).to(device)
    if not isinstance(found, QuantTensor):
        return quantise_weight(found.to(device), _FORMS[precision])
    if found.code.dtype != _CODES[precision]:
        return quantise_weight(dequantise(found, torch.float32).to(device), _FORMS[precision])
    if found.code.dtype == torch.uint8:
        # Decoding at every use leaves the question out.
        _refuse([name] if bool(((found.code & 0x7F) == 0x7F).any()) else [], "holds NaN")
    return QuantTensor(found.code.to(device), found.scale.to(device))


def _decode(found: Tensor | QuantTensor, dtype: torch.dtype) -> Tensor:
    return dequantise(found, dtype) if isinstance(found, QuantTensor) else found.to(dtype)


def _refuse(names: list[str], problem: str) -> None:
    if names:
        more = f", and so it is with {len(names) - 1} more" if len(names) > 1 else ""
        raise CheckpointError(
            "The weights are not those of the model that their configuration describes.",
            f"{names[0]} {problem}{more}.",
            "The directory was altered, or mixed from two: copy it anew.",
        )
