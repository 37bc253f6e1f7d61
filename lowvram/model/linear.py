"""Linear layers and RMSNorm; each owns one weight (trainable, or 8-bit codes).  Knows no attention and no FFN."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from lowvram_kernels.dispatch import card_of
from lowvram_kernels.layers.norm_linears import norm_linears
from lowvram_kernels.layers.rms_norm import add_rms_norm, rms_norm
from lowvram_kernels.matmul.linear import linear
from lowvram_kernels.matmul.quant_linear import MatmulFormat
from lowvram_kernels.matmul.weight_only import decoded, multiply_packed, takes_packed, weight_only_linear
from lowvram_kernels.quant.quantise import QuantTensor
from torch import Tensor, nn

from lowvram.config.train import Rotation


class ParamOptions(NamedTuple):
    """How a model stores and multiplies its weights: device, dtype of matrices, and which experts of a layer learn.

    Norms and routers are always fp32.  matmul_format: the number format of the products of every Linear and expert; the
    embedding, the head and the router use "plain".  is_hollow: matrices are on the meta device, without memory;
    `generate/weights.py` replaces them by what it reads, in the format that it reads.
    """

    device: torch.device | str | None = None
    dtype: torch.dtype = torch.float32
    rotation: Rotation | None = None
    matmul_format: MatmulFormat = "plain"
    is_hollow: bool = False

    def matrix(self, *shape: int) -> nn.Parameter:
        """Return an uninitialised matrix, or a stack of them; loading or initialisation fills it."""
        device = "meta" if self.is_hollow else self.device
        return nn.Parameter(torch.empty(*shape, dtype=self.dtype, device=device))


DEFAULT_OPTIONS = ParamOptions()
# On a CPU without 16-bit instructions, an fp32 copy of the weight beats 16-bit products from this many rows on.
# Measured: EPYC (AVX2), torch 2.13, one thread, bf16, 8192×512: 3.5 ms against 4.4 at 4 rows, 7.2 and 5.6 at 8.
_MIN_WIDENED_ROWS = 8


class Linear(nn.Module):
    """y = x Wᵀ without bias, computed in x's dtype, whatever the dtype of the weight.

    weight_scale: the scales of an 8-bit weight, which is for inference only; None for a plain weight.
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
        """Return the weight in dtype, [outputs, inputs]: the weight itself if it has that dtype, else a copy."""
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

    def add(self, x: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return x + added, or x where there is nothing to add, and its norm."""
        return (x, self(x)) if added is None else add_rms_norm(x, added, self.weight, self.eps)


def multiply(x_NI: Tensor, weight_OI: Tensor | QuantTensor) -> Tensor:
    """Return x Wᵀ in x's dtype without gradients: the same as `linear`, by the fastest way for this number of rows.

    x: [N, inputs], or one row as a vector.
    """
    if isinstance(weight_OI, QuantTensor):
        if x_NI.dim() == 1 and takes_packed(x_NI, weight_OI.code):
            return multiply_packed(x_NI[None], weight_OI)[0]
        return weight_only_linear(x_NI, weight_OI)
    if weight_OI.dtype != x_NI.dtype:
        weight_OI = weight_OI.to(x_NI.dtype)
    if x_NI.dim() == 1:
        # With instructions for bf16 a product of one row takes half the time of torch's product with a vector.
        if x_NI.dtype == torch.bfloat16 and not is_slow_in_half(x_NI):
            return F.linear(x_NI[None], weight_OI)[0]
        return torch.mv(weight_OI, x_NI)
    if x_NI.shape[0] >= _MIN_WIDENED_ROWS and is_slow_in_half(x_NI):
        return F.linear(x_NI.float(), weight_OI.float()).to(x_NI.dtype)
    return F.linear(x_NI, weight_OI)


def is_slow_in_half(x: Tensor) -> bool:
    """Say whether x has 16 bits and is on a CPU without instructions for 16-bit products."""
    has_none = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX", "AVX2")
    return card_of(x.device).platform == "cpu" and x.dtype in (torch.bfloat16, torch.float16) and has_none


def project(norm: RmsNorm, x: Tensor, *layers: Linear, added: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    """Return the stream, x or x + added, and the output of each layer for its norm, which is not saved for backward.

    layers: all of the same matmul_format.  x, added: [..., dim].  Returns [..., outputs] in x's dtype, one per layer.
    A residual connection goes on with the stream that is returned, not with x: see `norm_linears`.
    """
    if any(layer.weight_scale is not None for layer in layers):
        stream, normed = norm.add(x, added)
        return stream, [layer(normed) for layer in layers]
    weights: list[Tensor] = [layer.weight for layer in layers]
    return norm_linears(x, norm.weight, weights, norm.eps, layers[0].matmul_format, added)
