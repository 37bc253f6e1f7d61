"""Quantises matrices to block-scaled FP8 in DeepSeek's convention, and describes that for config.json; knows no file.

    weight            float8_e4m3fn [R, C]
    weight_scale_inv  fp32 [⌈R/128⌉, ⌈C/128⌉]      number = weight · weight_scale_inv, a power of two here

Source: DeepSeek-AI 2024 (DeepSeek-V3), README_WEIGHTS.md of its published files.

When transformers 5.24 dequantises, it divides a side by the number of its blocks, which is wrong for a side that is not
a multiple of 128.  Such a matrix therefore stays in bf16, and config.json names it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lowvram_kernels.quant.quantise import BLOCK, quantise_weight
from torch import Tensor

SCALE = "_scale_inv"


class UnquantisedModules:
    """Collects the modules whose matrices are not quantised."""

    def __init__(self) -> None:
        self._modules: set[str] = {"lm_head"}

    def add(self, weight: str) -> None:
        """Add a weight's module; for an expert, add the stack of all experts."""
        module = weight.removesuffix(".weight")
        self._modules.add(module.split(".experts.")[0] + ".experts" if ".experts." in module else module)

    def settings(self) -> dict[str, Any]:
        """Return `quantization_config`."""
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": sorted(self._modules),
        }


def is_divisible(rows: int, columns: int) -> bool:
    """Say whether all blocks of a matrix have the same size."""
    return all(side <= BLOCK or side % BLOCK == 0 for side in (rows, columns))


def quantise_piece(name: str, piece: Tensor, kept: UnquantisedModules) -> Iterator[tuple[str, Tensor]]:
    """Yield a matrix's codes and scales by name, or the matrix itself if it cannot be quantised.  piece: [R, C]."""
    if not is_divisible(*piece.shape):
        kept.add(name)
        yield name, piece.to(torch.bfloat16)
        return
    code, scale = quantise_weight(piece, "e4m3")
    yield name, code.view(torch.float8_e4m3fn)
    yield name + SCALE, scale
