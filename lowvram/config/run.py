"""Configuration of a whole run: model, training, data, checkpoints and logs; knows no device and no tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, PositiveInt, Tag, model_validator

from lowvram.config.base import Count, FrozenConfig, Size, as_list
from lowvram.config.guard import GuardConfig
from lowvram.config.model import ModelConfig
from lowvram.config.train import TrainConfig, check_rotation
from lowvram.errors import ConfigError

# Limits of automatic saving: bytes written per day, and seconds between two checkpoints.
WRITTEN_PER_DAY_BYTES = 50e9
LEAST_SAVE_INTERVAL_S = 600.0
# Smaller checkpoints are written in less time than a copy of them and a thread are worth.
LEAST_COPIED_BYTES = 1 << 26


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


class HeldOut(FrozenConfig):
    """Packed text that is held out of one source."""

    source: Annotated[str, Field(min_length=1)]
    """Its name in validations."""
    path: Path
    """Directory that `lowvram data pack` wrote."""


def _as_held_out(value: Any) -> Any:
    """Name the folders of a list: the folder `valid` of a source is called as the source."""
    if not isinstance(value, list | tuple):
        return value
    if not value:
        raise ValueError("data.valid names no folder; leave the key out")
    tables = [{"path": one} if isinstance(one, str | Path) else one for one in value]
    return [{"source": _name_source(each["path"])} | each if _lacks_name(each) else each for each in tables]


def _lacks_name(table: Any) -> bool:
    return isinstance(table, dict) and "source" not in table and isinstance(table.get("path"), str | Path)


def _name_source(path: str | Path) -> str:
    path = Path(path)
    return path.parent.name if path.name == "valid" and path.parent.name else path.name


def _one_or_several(value: Any) -> str:
    return "several" if isinstance(value, list | tuple) else "one"


class DataConfig(FrozenConfig):
    """Where the tokens are."""

    train: Annotated[tuple[Corpus, ...], BeforeValidator(_as_corpora), Field(min_length=1)]
    """Packed text to learn: one folder, a list of folders, or a list of `{ path, weight }`.  A folder that
    `lowvram data mix` wrote stands for its sources and their shares."""
    valid: Annotated[
        Annotated[Path | None, Tag("one")] | Annotated[tuple[HeldOut, ...], Tag("several")],
        Discriminator(_one_or_several),
        BeforeValidator(_as_held_out),
    ] = None
    """Packed text that is held out, for validation; without it overfitting cannot be seen.  A list of folders, or of
    `{ source, path }`, is measured by source too; beside a mix this follows from it."""
    tokenizer: Path
    """Directory of the tokenizer with which the text was packed."""

    @property
    def held_out(self) -> tuple[tuple[str, Path], ...]:
        """The names and folders of what is held out; a single folder has an empty name."""
        if self.valid is None:
            return ()
        return (("", self.valid),) if isinstance(self.valid, Path) else tuple((o.source, o.path) for o in self.valid)

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        names = [name for name, _ in self.held_out]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f'data.valid names the source "{twice[0]}" twice; write {{ source, path }} with other names'
            )
        return self


class RunOptions(FrozenConfig):
    """What a run saves and logs; it may change between two starts of the same run."""

    dir: Path
    """Directory of checkpoints and logs."""
    save_every_minutes: Annotated[float, Field(gt=0.0)] | None = None
    """Minutes between two checkpoints; without it ten, or more for large models, so that at most 50 GB a day are
    written."""
    keep: PositiveInt = 2
    """Checkpoints that are kept; older ones are deleted."""
    keep_best: bool = True
    """Whether the checkpoint that was best in validation is kept, too."""
    milestone_steps: PositiveInt | None = None
    """Checkpoints at multiples of so many steps are kept for good."""
    disk_budget: Size | None = None
    """Most bytes that checkpoints may take, such as `"40GB"`."""
    on_divergence: Literal["stop", "go back"] = "stop"
    """After 25 skipped steps in a row: end the run, or go on with the weights of the last good checkpoint behind the
    steps that were skipped; a run does not go back to the same checkpoint twice in a row."""
    validate_every: PositiveInt = 250
    """Steps between two validations."""
    validate_tokens: Count = 262_144
    """Tokens of `data.valid` that a validation reads; of several sources the same number each, and more of the others
    where one has fewer."""
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
    wake_lock: bool = True
    """Keep the computer from going to sleep while it trains."""
    guard: GuardConfig = GuardConfig()
    """When the run slows or waits, and what its energy costs."""

    def save_interval_s(self, state_bytes: float) -> float:
        """Return the seconds between two checkpoints: as configured, or so that a disk does not wear out early.

        state_bytes: the size of a checkpoint.
        """
        if self.save_every_minutes is not None:
            return 60.0 * self.save_every_minutes
        return max(LEAST_SAVE_INTERVAL_S, state_bytes / WRITTEN_PER_DAY_BYTES * 86_400)

    def disk_bytes(self, checkpoint_bytes: int, steps: int) -> int:
        """Return the most bytes that a run of so many steps takes for its checkpoints.

        Beside those that are kept there is the one being written, which is whole before an old one is deleted, and the
        space that is reserved for the last save.
        """
        milestones = steps // self.milestone_steps if self.milestone_steps is not None else 0
        kept = (self.keep + self.keep_best + milestones) * checkpoint_bytes
        if self.disk_budget is not None:
            kept = min(kept, max(self.disk_budget, checkpoint_bytes))
        return kept + 2 * checkpoint_bytes


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
