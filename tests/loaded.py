"""The tasks of lowvram.api that load a model, run to their end: what tests ask for is the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lowvram.api import context, loading
from lowvram.api.context import Context
from lowvram.api.loading import LoadedModel
from lowvram.api.tasks import finish
from lowvram.generate.precision import InferencePrecision, Precision


def load_model(path: Path, *words: Any, **named: Any) -> LoadedModel:
    """Return the model of a run or checkpoint."""
    return finish(loading.load_model(path, *words, **named))[0]


def choose_reading_on(device: torch.device, precision: Precision | None) -> InferencePrecision:
    """Return how a model is read on a device."""
    return finish(loading.choose_reading_on(device, precision))[0]


def find_max_context(loaded: LoadedModel, *words: Any, **named: Any) -> Context:
    """Return how long a text may get."""
    return finish(context.find_max_context(loaded, *words, **named))[0]
