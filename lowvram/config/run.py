"""Configuration of a whole run: model, training, data, checkpoints and logs; knows no device and no tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from lowvram.config.base import Count, FrozenConfig, Size, as_list
from lowvram.config.model import ModelConfig
from lowvram.config.train import TrainConfig, check_rotation
from lowvram.errors import ConfigError

# Limits of automatic saving: bytes written per day, and seconds between two checkpoints.
WRITTEN_PER_DAY_BYTES = 50e9
LEAST_SAVE_INTERVAL_S = 600.0


class Corpus(FrozenConfig):
    """A directory of shards and its share among the corpora."""

    path: Path
    """Directory that `lowvram data pack` wrote."""
    weight: Annotated[float, Field(gt=0.0)] = 1.0
    """Share among the corpora, relative to the others'."""


def _as_corpora(value: Any) -> Any:
    """Turn a folder into one corpus, and a list of folders into corpora of equal weight."""
    several = as_list(value)
    if not isinstance(several, list | tuple):
        return value
    return [{"path": one} if isinstance(one, str | Path) else one for one in several]


class DataConfig(FrozenConfig):
    """Where the tokens are."""

    train: Annotated[tuple[Corpus, ...], BeforeValidator(_as_corpora), Field(min_length=1)]
    """Packed text to learn: one folder, a list of folders, or a list of `{ path, weight }`."""
    valid: Path | None = None
    """Packed text that is held out, for validation; without it overfitting cannot be seen."""
    tokenizer: Path
    """Directory of the tokenizer with which the text was packed."""


class RunOptions(FrozenConfig):
    """What a run saves and logs; it may change between two starts of the same run."""

    dir: Path
    """Directory of checkpoints and logs."""
    save_every_minutes: Annotated[float, Field(gt=0.0)] | None = None
    """Minutes between two checkpoints; without it ten, or more for large models, so that at most 50 GB a day are
    written."""
    keep: PositiveInt = 2
    """Checkpoints that are kept; older ones are deleted."""
    milestone_steps: PositiveInt | None = None
    """Checkpoints at multiples of so many steps are kept for good."""
    disk_budget: Size | None = None
    """Most bytes that checkpoints may take, such as `"40GB"`."""
    validate_every: PositiveInt = 250
    """Steps between two validations."""
    validate_tokens: Count = 262_144
    """Tokens of `data.valid` that a validation reads."""
    sample_every: PositiveInt = 500
    """Steps between two samples."""
    sample_tokens: PositiveInt = 40
    """Tokens of a sample."""
    prompts: Annotated[tuple[str, ...], BeforeValidator(as_list)] = ("Bir gün", "Türkiye'nin", "Bu yüzden")
    """Texts that samples continue; `[]` for none."""
    pairs: Path | None = None
    """Minimal pairs, as for `lowvram evaluate --pairs`: each validation shows how many of 256 of them are right."""
    suffixes: Path | None = None
    """Analysed sentences, as for `lowvram evaluate --suffixes`: each validation shows what stems and each class of
    suffix cost in at most 512 of them."""
    choices: Path | None = None
    """Questions, as for `lowvram evaluate --choices`: each validation shows how many of at most 96 are right."""
    log: Annotated[tuple[Literal["tensorboard", "wandb"], ...], BeforeValidator(as_list)] = ()
    """Where figures go beside `log.jsonl`: `"tensorboard"`, `"wandb"` or both."""

    def save_interval_s(self, state_bytes: float) -> float:
        """Return the seconds between two checkpoints: as configured, or so that a disk does not wear out early.

        state_bytes: the size of a checkpoint.
        """
        if self.save_every_minutes is not None:
            return 60.0 * self.save_every_minutes
        return max(LEAST_SAVE_INTERVAL_S, state_bytes / WRITTEN_PER_DAY_BYTES * 86_400)


class RunConfig(FrozenConfig):
    """A whole run file."""

    model: ModelConfig
    """What the network is."""
    data: DataConfig
    """What it reads."""
    train: TrainConfig
    """How it learns."""
    run: RunOptions
    """What is saved and logged; it may change between two starts."""

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        check_rotation(self.model, self.train)
        return self


def check_vocabulary(stated: int | None, tokenizer_size: int, tokenizer: Path) -> None:
    """Raise ConfigError if a run file states another vocabulary than its tokenizer has."""
    if stated is not None and stated != tokenizer_size:
        raise ConfigError(
            f"model.vocabulary is {stated}.",
            f"The tokenizer {tokenizer} has {tokenizer_size} ids, and every id needs its row.",
            "Leave model.vocabulary out: it then follows the tokenizer.",
        )
