"""The public Python interface: `from lowvram.api import fit, train, load, …`; nothing in it prints.

Each function returns a frozen value, a model, or a run to iterate over; each error is a `LowvramError`, which says what
happened, why, and what to do.  What the commands print as notices are values here (`.notices`), or events of a run.
Names are imported when they are first used, so that importing this package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowvram.api.cleaning import Cleaned as Cleaned
    from lowvram.api.cleaning import clean as clean
    from lowvram.api.comparing import Compared as Compared
    from lowvram.api.comparing import compare as compare
    from lowvram.api.evaluation import Evaluation as Evaluation
    from lowvram.api.evaluation import evaluate as evaluate
    from lowvram.api.excluding import ExcludedDocuments as ExcludedDocuments
    from lowvram.api.excluding import exclude as exclude
    from lowvram.api.fit_result import FitOptions as FitOptions
    from lowvram.api.fit_result import FitResult as FitResult
    from lowvram.api.fitting import fit as fit
    from lowvram.api.importing import Imported as Imported
    from lowvram.api.importing import import_model as import_model
    from lowvram.api.looking import Looked as Looked
    from lowvram.api.looking import SeenDocument as SeenDocument
    from lowvram.api.looking import SourceScore as SourceScore
    from lowvram.api.looking import look as look
    from lowvram.api.mixing import Mixed as Mixed
    from lowvram.api.mixing import mix as mix
    from lowvram.api.models import Model as Model
    from lowvram.api.models import load as load
    from lowvram.api.packing import Packed as Packed
    from lowvram.api.packing import PackedShards as PackedShards
    from lowvram.api.packing import pack as pack
    from lowvram.api.receipts import receipt as receipt
    from lowvram.api.run_file import write_run_file as write_run_file
    from lowvram.api.target import Target as Target
    from lowvram.api.tasks import Notice as Notice
    from lowvram.api.texts import TextCheck as TextCheck
    from lowvram.api.texts import check_texts as check_texts
    from lowvram.api.tokenizer_comparing import TokenizerComparison as TokenizerComparison
    from lowvram.api.tokenizer_comparing import compare_tokenizers as compare_tokenizers
    from lowvram.api.tokenizer_training import TrainedTokenizer as TrainedTokenizer
    from lowvram.api.tokenizer_training import train_tokenizer as train_tokenizer
    from lowvram.api.training import TrainingRun as TrainingRun
    from lowvram.api.training import train as train
    from lowvram.api.verifying import Verification as Verification
    from lowvram.api.verifying import verify as verify
    from lowvram.errors import LowvramError as LowvramError
    from lowvram.fit.receipts import Receipt as Receipt
    from lowvram.fit.report import MemoryBudget as MemoryBudget
    from lowvram.train.events import Evaluated as Evaluated
    from lowvram.train.events import Event as Event
    from lowvram.train.events import Halved as Halved
    from lowvram.train.events import Metered as Metered
    from lowvram.train.events import Paused as Paused
    from lowvram.train.events import Recorded as Recorded
    from lowvram.train.events import Resumed as Resumed
    from lowvram.train.events import Rotated as Rotated
    from lowvram.train.events import Sampled as Sampled
    from lowvram.train.events import Saved as Saved
    from lowvram.train.events import Slowed as Slowed
    from lowvram.train.events import Started as Started
    from lowvram.train.events import StepDone as StepDone
    from lowvram.train.events import Stopped as Stopped
    from lowvram.train.events import WentBack as WentBack
    from lowvram.train.settings import RunSettings as RunSettings

_HOMES = {
    "Cleaned": "lowvram.api.cleaning",
    "Compared": "lowvram.api.comparing",
    "Evaluated": "lowvram.train.events",
    "Evaluation": "lowvram.api.evaluation",
    "Event": "lowvram.train.events",
    "ExcludedDocuments": "lowvram.api.excluding",
    "FitOptions": "lowvram.api.fit_result",
    "FitResult": "lowvram.api.fit_result",
    "Halved": "lowvram.train.events",
    "Imported": "lowvram.api.importing",
    "Looked": "lowvram.api.looking",
    "LowvramError": "lowvram.errors",
    "MemoryBudget": "lowvram.fit.report",
    "Metered": "lowvram.train.events",
    "Mixed": "lowvram.api.mixing",
    "Model": "lowvram.api.models",
    "Notice": "lowvram.api.tasks",
    "Packed": "lowvram.api.packing",
    "PackedShards": "lowvram.api.packing",
    "Paused": "lowvram.train.events",
    "Receipt": "lowvram.fit.receipts",
    "Recorded": "lowvram.train.events",
    "Resumed": "lowvram.train.events",
    "Rotated": "lowvram.train.events",
    "RunSettings": "lowvram.train.settings",
    "Sampled": "lowvram.train.events",
    "Saved": "lowvram.train.events",
    "SeenDocument": "lowvram.api.looking",
    "Slowed": "lowvram.train.events",
    "SourceScore": "lowvram.api.looking",
    "Started": "lowvram.train.events",
    "StepDone": "lowvram.train.events",
    "Stopped": "lowvram.train.events",
    "WentBack": "lowvram.train.events",
    "Target": "lowvram.api.target",
    "TextCheck": "lowvram.api.texts",
    "TokenizerComparison": "lowvram.api.tokenizer_comparing",
    "TrainedTokenizer": "lowvram.api.tokenizer_training",
    "TrainingRun": "lowvram.api.training",
    "Verification": "lowvram.api.verifying",
    "check_texts": "lowvram.api.texts",
    "clean": "lowvram.api.cleaning",
    "compare": "lowvram.api.comparing",
    "compare_tokenizers": "lowvram.api.tokenizer_comparing",
    "evaluate": "lowvram.api.evaluation",
    "exclude": "lowvram.api.excluding",
    "fit": "lowvram.api.fitting",
    "import_model": "lowvram.api.importing",
    "load": "lowvram.api.models",
    "look": "lowvram.api.looking",
    "mix": "lowvram.api.mixing",
    "pack": "lowvram.api.packing",
    "receipt": "lowvram.api.receipts",
    "train": "lowvram.api.training",
    "train_tokenizer": "lowvram.api.tokenizer_training",
    "verify": "lowvram.api.verifying",
    "write_run_file": "lowvram.api.run_file",
}
__all__ = [
    "Cleaned",
    "Compared",
    "Evaluated",
    "Evaluation",
    "Event",
    "ExcludedDocuments",
    "FitOptions",
    "FitResult",
    "Halved",
    "Imported",
    "Looked",
    "LowvramError",
    "MemoryBudget",
    "Metered",
    "Mixed",
    "Model",
    "Notice",
    "Packed",
    "PackedShards",
    "Paused",
    "Receipt",
    "Recorded",
    "Resumed",
    "Rotated",
    "RunSettings",
    "Sampled",
    "Saved",
    "SeenDocument",
    "Slowed",
    "SourceScore",
    "Started",
    "StepDone",
    "Stopped",
    "Target",
    "TextCheck",
    "TokenizerComparison",
    "TrainedTokenizer",
    "TrainingRun",
    "Verification",
    "WentBack",
    "check_texts",
    "clean",
    "compare",
    "compare_tokenizers",
    "evaluate",
    "exclude",
    "fit",
    "import_model",
    "load",
    "look",
    "mix",
    "pack",
    "receipt",
    "train",
    "train_tokenizer",
    "verify",
    "write_run_file",
]


def __getattr__(name: str) -> object:
    """Import a public name on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'lowvram.api' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
