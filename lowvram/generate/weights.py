"""From mapped weights to a model that only reads, tensor by tensor, each rounded as it comes; knows no directory.

Every matrix is kept in the numbers asked for: layers, experts, embedding and head alike.  Three kinds stay as they
are: norms, routers and balancing biases in fp32, and with 8 bits MLA's `kv_b_proj` in 16 bits, because decoding
multiplies by its parts in another order and would need them decoded beside the codes.
"""

from __future__ import annotations

import torch
from lowvram_kernels.dispatch import bytes_of
from lowvram_kernels.quantise import Scaled, dequantise, quantise_weight
from torch import Tensor, nn

from lowvram.checkpoint import Checkpoint
from lowvram.config import ModelConfig
from lowvram.errors import CheckpointError
from lowvram.generate.source import Source
from lowvram.model.transformer import Transformer

_FORMS = {"fp8": "e4m3", "int8": "int8"}
_CODES = {"fp8": torch.uint8, "int8": torch.int8}
_PLAIN = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


class CheckpointSource:
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


@torch.no_grad()
def load_for_reading(
    source: Source,
    precision: str,
    device: torch.device | str = "cpu",
    flow: torch.dtype = torch.bfloat16,
) -> Transformer:
    """Return the model of a source, frozen, on the device; its matrices in fp8, int8, bf16, fp16 or fp32.

    flow: what is computed in, by which the one matrix that 8 bits leave out is kept.  What is stored in the precision
    asked for is taken over: codes without a round trip, and on the CPU as the file's own bytes.
    Alive besides the model: one tensor, and what rounding it has at work.
    Raises CheckpointError where a tensor is missing, unknown or of another shape.
    """
    model = Transformer(source.config, seed=None, device=device, is_hollow=True).eval().requires_grad_(False)
    own = model.state_dict()
    _compare(sorted(own.keys() - set(source.names())), "is missing")
    _compare(sorted(set(source.names()) - own.keys()), "belongs to no layer")
    for name, place in own.items():
        found = source.read(name)
        shape = list(found.code.shape if isinstance(found, Scaled) else found.shape)
        if shape != list(place.shape):
            _compare([name], f"has shape {shape} where the model has {list(place.shape)}")
        if not place.is_meta:
            place.copy_(_decode(found, place.dtype))
            continue
        if precision in _FORMS and not name.endswith("kv_b_proj.weight"):
            put(model, name, _round(found, precision, torch.device(device)))
        else:
            wide = torch.float32 if precision == "fp32" else _PLAIN.get(precision, flow)
            put(
                model,
                name,
                _decode(found, torch.bfloat16 if precision in _FORMS and wide.itemsize > 2 else wide).to(device),
            )
    return model


def put(model: Transformer, name: str, weight: Tensor | Scaled) -> None:
    """Put a matrix in its place in the model: plain, or codes with their scales beside them."""
    owner, _, attribute = name.rpartition(".")
    layer = model.get_submodule(owner)
    code, scale = (weight.code, weight.scale) if isinstance(weight, Scaled) else (weight, None)
    layer._parameters[attribute] = nn.Parameter(code, requires_grad=False)
    if f"{attribute}_scale" in layer._buffers:
        layer._buffers[f"{attribute}_scale"] = scale


def weight_bytes(model: Transformer) -> int:
    """Return the bytes of everything that a model holds: matrices, scales, norms and tables."""
    return bytes_of(*model.parameters(), *model.buffers())


def _round(found: Tensor | Scaled, precision: str, device: torch.device) -> Scaled:
    if isinstance(found, Scaled) and found.code.dtype == _CODES[precision]:
        return Scaled(found.code.to(device), found.scale.to(device))
    whole = _decode(found, torch.float32) if isinstance(found, Scaled) else found
    return quantise_weight(whole.to(device), _FORMS[precision])


def _decode(found: Tensor | Scaled, dtype: torch.dtype) -> Tensor:
    return dequantise(found, dtype) if isinstance(found, Scaled) else found.to(dtype)


def _compare(names: list[str], problem: str) -> None:
    if names:
        raise CheckpointError(
            "The weights are not those of the model that their configuration describes.",
            f"Of {len(names)} tensors the first, {names[0]}, {problem}."
            if len(names) > 1
            else f"{names[0]} {problem}.",
            "The directory was altered or mixed from two: copy it anew.",
        )
