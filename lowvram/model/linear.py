"""Layers that own one weight and hand it to a lean op: a master, cast where it is used, or codes of 8 bits to read."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from lowvram_kernels.dispatch import card_of
from lowvram_kernels.layers.norm_linears import norm_linears
from lowvram_kernels.layers.rms_norm import rms_norm
from lowvram_kernels.matmul.linear import linear
from lowvram_kernels.matmul.quant_linear import MatmulFormat
from lowvram_kernels.matmul.weight_only import decoded, weight_only_linear
from lowvram_kernels.quant.quantise import QuantTensor
from torch import Tensor, nn

from lowvram.config.train import Rotation


class ParamOptions(NamedTuple):
    """How a model stores and multiplies its weights: device, dtype of matrices, and which experts of a layer learn.

    Norms and routers are always fp32.  matmul_format: of the products of every Linear and expert; the embedding, the
    head and the router multiply in "plain".  is_hollow: matrices have no memory yet; `generate/weights.py` puts what it
    reads in their place, in the format that it reads.
    """

    device: torch.device | str | None = None
    dtype: torch.dtype = torch.float32
    rotation: Rotation | None = None
    matmul_format: MatmulFormat = "plain"
    is_hollow: bool = False

    def matrix(self, *shape: int) -> nn.Parameter:
        """Return a matrix, or a stack of them, for a load or a draw to fill."""
        device = "meta" if self.is_hollow else self.device
        return nn.Parameter(torch.empty(*shape, dtype=self.dtype, device=device))


DEFAULT_OPTIONS = ParamOptions()
# From so many rows on a copy in fp32 costs less than products of 16 bits without instructions for them.
# Measured: EPYC (AVX2), torch 2.13, one thread, bf16, 8192×512: 3.5 ms against 4.4 at 4 rows, 7.2 and 5.6 at 8.
_LEAST_WIDENED = 8


class Linear(nn.Module):
    """y = x Wᵀ without bias; computes in x's dtype whatever dtype the weight is kept in.

    weight_scale: the scales of a weight of 8 bits, which can be read and not learnt; None where it is plain.
    """

    weight_scale: Tensor | None

    def __init__(self, inputs: int, outputs: int, options: ParamOptions = DEFAULT_OPTIONS) -> None:
        super().__init__()
        self.weight, self.matmul_format = options.matrix(outputs, inputs), options.matmul_format
        self.register_buffer("weight_scale", None)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., inputs].  Returns [..., outputs] in x's dtype."""
        if self.weight_scale is not None:
            return weight_only_linear(x, QuantTensor(self.weight, self.weight_scale))
        return linear(x, self.weight, self.matmul_format)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """Return the weight in dtype, [outputs, inputs]: itself where it is kept so, else a copy."""
        return decoded(self.weight, self.weight_scale, dtype)


class RmsNorm(nn.Module):
    """Root-mean-square normalisation of the last dimension, then a weight."""

    def __init__(self, dim: int, eps: float, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., dim].  Returns x's shape and dtype."""
        return rms_norm(x, self.weight, self.eps)


def multiply(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    """Return x Wᵀ in x's dtype, for reading: what `linear` gives, by whatever is fastest for so few or many rows.

    x: [N, inputs], or one row as a vector.
    """
    if weight_OI.dtype != x_NI.dtype:
        weight_OI = weight_OI.to(x_NI.dtype)
    if x_NI.dim() == 1:
        return torch.mv(weight_OI, x_NI)
    if x_NI.shape[0] >= _LEAST_WIDENED and is_slow_in_half(x_NI):
        return F.linear(x_NI.float(), weight_OI.float()).to(x_NI.dtype)
    return F.linear(x_NI, weight_OI)


def is_slow_in_half(x: Tensor) -> bool:
    """Say whether products of x's numbers are of 16 bits on a processor that has no instructions for them."""
    has_none = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX", "AVX2")
    return card_of(x.device).platform == "cpu" and x.dtype in (torch.bfloat16, torch.float16) and has_none


def project(norm: RmsNorm, x: Tensor, *layers: Linear) -> list[Tensor]:
    """Return each layer's answer to norm(x); the normalised rows are not kept for backward.

    layers: of one form.  x: [..., dim].  Returns [..., outputs] in x's dtype, one per layer.
    """
    if any(layer.weight_scale is not None for layer in layers):
        normed = norm(x)
        return [layer(normed) for layer in layers]
    return norm_linears(x, norm.weight, [layer.weight for layer in layers], norm.eps, layers[0].matmul_format)
