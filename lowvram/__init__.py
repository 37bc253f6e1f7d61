"""lowvram: pretrain a Turkish language model at home; this file knows the version and where public names live."""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_HOMES = {
    "LowvramError": "lowvram.errors",
    "ModelConfig": "lowvram.config.model",
    "TrainConfig": "lowvram.config.train",
    "RunConfig": "lowvram.config.run",
    "load_run": "lowvram.config.run_file",
    "load_preset": "lowvram.config.run_file",
    "Plan": "lowvram.config.plan",
    "Transformer": "lowvram.model.transformer",
    "Tokenizer": "lowvram.data.tokenizer",
    "Loader": "lowvram.data.loader",
    "Trainer": "lowvram.train.trainer",
    "Engine": "lowvram.generate.engine",
    "Sampler": "lowvram.generate.sampling",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> object:
    """Import a public name on first use, so that `import lowvram` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'lowvram' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
