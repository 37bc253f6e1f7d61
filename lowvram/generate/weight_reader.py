"""Where a model's weights lie: one tensor at a time, by our names; knows neither device nor precision."""

from __future__ import annotations

from typing import Protocol

from lowvram_kernels.quant.quantise import QuantTensor
from torch import Tensor

from lowvram.config.model import ModelConfig


class WeightReader(Protocol):
    """Weights that are mapped, not loaded: our own checkpoint, or a directory that another program wrote."""

    config: ModelConfig

    def names(self) -> list[str]:
        """Return the names that `Transformer(config).state_dict()` has for them."""

    def read(self, name: str) -> Tensor | QuantTensor:
        """Return one tensor on the CPU, or its codes and scales where it is stored in 8 bits."""
