"""Matrices as block-scaled FP8 in DeepSeek's convention: codes, one scale a block, and what config.json says of them.

    weight            float8_e4m3fn [R, C]
    weight_scale_inv  fp32 [⌈R/128⌉, ⌈C/128⌉]      number = weight · weight_scale_inv, a power of two here

Source: DeepSeek-AI 2024 (DeepSeek-V3), README_WEIGHTS.md of its published files.

transformers 5.24 divides a side by the number of its blocks where it turns codes back into numbers, so that a side that
128 does not divide would come out wrong there: such a matrix stays in bf16, and config.json names it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lowvram_kernels.quant.quantise import BLOCK, quantise_weight
from torch import Tensor

SCALE = "_scale_inv"


class UnquantisedModules:
    """The modules whose matrices stay as they are."""

    def __init__(self) -> None:
        self._modules: set[str] = {"lm_head"}

    def add(self, weight: str) -> None:
        """Note a weight's module; of experts the stack that holds them all."""
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
    """Say whether every block of a matrix is as large as the others."""
    return all(side <= BLOCK or side % BLOCK == 0 for side in (rows, columns))


def quantise_piece(name: str, piece: Tensor, kept: UnquantisedModules) -> Iterator[tuple[str, Tensor]]:
    """Return a matrix's codes and scales by name, or the matrix itself where it has to stay.  piece: [R, C]."""
    if not is_divisible(*piece.shape):
        kept.add(name)
        yield name, piece.to(torch.bfloat16)
        return
    code, scale = quantise_weight(piece, "e4m3")
    yield name, code.view(torch.float8_e4m3fn)
    yield name + SCALE, scale
