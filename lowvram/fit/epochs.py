"""Counts how often a run reads its text, and says what to do if it is too often; opens shards, never imports torch."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from lowvram.config.mix import is_mix, name_folders, read_mix
from lowvram.config.model import ModelConfig
from lowvram.config.run import DataConfig
from lowvram.config.run_file import load_preset, preset_names
from lowvram.config.train import TrainConfig
from lowvram.errors import DataError
from lowvram.evaluate.verdict import warn_of_few_tokens
from lowvram.fit.folders import find_folders
from lowvram.units import count_of, show_bytes, show_count

# Up to four passes over a text teach nearly as much as fresh text of that length; later passes teach less and less.
# Source: Muennighoff et al. 2023, Scaling Data-Constrained Language Models, section 5.
ENOUGH_PASSES = 4.0
# Tokens per parameter at which training is compute-optimal.
# Source: Hoffmann et al. 2022, Training Compute-Optimal Large Language Models, table 3.
TOKENS_PER_PARAMETER = 20
OUR_PRESETS = "tr-"
# Of so many sources each is named in a sentence.
_MOST_NAMED = 4
_MEMORISES = (
    f"Beyond about {ENOUGH_PASSES:.0f} passes over its text a model memorises it rather than learns from it "
    "(Muennighoff et al. 2023)."
)
_HELD_OUT = (
    "Nothing is held out: data.valid is not set, so overfitting cannot be seen. "
    "`lowvram data pack --holdout 0.5%` keeps a part of the text for that."
)


class Part(NamedTuple):
    """One corpus of a run: its tokens, the bytes of its text, and its share of the tokens that the run reads."""

    path: Path
    tokens: int
    text_bytes: int
    share: float = 1.0


class Remark(NamedTuple):
    """A sentence about the text.  is_warning: something should be done."""

    says: str
    is_warning: bool = False


class RunText(NamedTuple):
    """The text of a run.  is_held_out: a part of the text is kept for validation.

    held_out_tokens: how many, None where the part cannot be read, or there is none.
    """

    parts: tuple[Part, ...]
    is_held_out: bool
    held_out_tokens: int | None = None

    @property
    def tokens(self) -> int:
        """The tokens of all parts."""
        return sum(part.tokens for part in self.parts)

    def passes(self, train: TrainConfig) -> list[float]:
        """Return how often a run reads each part, counted like the loader in whole windows of seq_len tokens.

        Raises DataError where a part is shorter than one window.
        """
        samples = train.steps * train.batch_samples
        return [samples * part.share / _windows(part, train.seq_len) for part in self.parts]

    def most_tokens(self, train: TrainConfig) -> int:
        """Return the largest number of tokens, in whole steps, at which no part is read more than ENOUGH_PASSES times.

        Returns 0 if a single step already reads a part more often.  Raises DataError if a part is shorter than one
        window.
        """
        samples = min(ENOUGH_PASSES * _windows(part, train.seq_len) / part.share for part in self.parts)
        return int(samples) // train.batch_samples * train.batch_tokens

    def suits(self) -> int:
        """Return the model size in parameters for which ENOUGH_PASSES over this text give TOKENS_PER_PARAMETER."""
        supply = min(ENOUGH_PASSES * part.tokens / part.share for part in self.parts)
        return int(supply / TOKENS_PER_PARAMETER)


def _windows(part: Part, seq_len: int) -> int:
    windows = (part.tokens - 1) // seq_len
    if windows < 1:
        why = f"A window of seq_len = {seq_len} takes {seq_len + 1}."
        raise DataError(
            f"{part.path} holds {count_of(part.tokens, 'token')}.", why, "Pack more text, or lower train.seq_len."
        )
    return windows


def open_text(data: DataConfig) -> RunText:
    """Return the text of a run's shards, as their indexes describe it; raises DataError if missing or damaged."""
    total = sum(corpus.weight for corpus in data.train)
    parts = tuple(_open(corpus.path, corpus.weight / total) for corpus in data.train)
    return RunText(parts, data.valid is not None, _count_held_out(path for _, path in data.held_out))


def open_folder(data: Path) -> RunText:
    """Return the text in a folder of shards, in one that holds `train` and perhaps `valid`, or of a mix.

    Raises DataError if there are no shards, and ConfigError as `find_folders` does.
    """
    folders = find_folders(data)
    if is_mix(data):
        mix = read_mix(data)
        parts = tuple(_open(path, share) for path, share in mix.train(data))
        return RunText(parts, folders.valid is not None, _count_held_out(path for _, path in mix.valid(data)))
    part = _open(folders.train if folders.train.is_dir() else data, 1.0)
    held_out = [] if folders.valid is None else [folders.valid]
    return RunText((part,), bool(held_out), _count_held_out(held_out))


def _count_held_out(valid: Iterable[Path]) -> int | None:
    try:
        return sum(_open(path, 1.0).tokens for path in valid) or None
    except DataError:  # told by what reads the text
        return None


def _open(path: Path, share: float) -> Part:
    from lowvram.data.shard_set import ShardSet  # imports numpy, which `fit` does not need without a text

    shards = ShardSet.open(path)
    return Part(path, shards.tokens, shards.text_bytes, share)


@functools.cache
def _dense_presets() -> list[tuple[str, ModelConfig, TrainConfig]]:
    """Return our presets without experts, the smallest first."""
    presets = [(name, *load_preset(name)) for name in preset_names() if name.startswith(OUR_PRESETS)]
    dense = [preset for preset in presets if preset[1].ffn.kind != "moe"]
    return sorted(dense, key=lambda preset: preset[1].num_parameters())


def suitable_preset(text: RunText) -> str | None:
    """Return our largest dense preset for which a text is enough, None if it is too little for the smallest."""
    fitting = [name for name, model, _ in _dense_presets() if model.num_parameters() <= text.suits()]
    return fitting[-1] if fitting else None


def wanted_tokens(model: ModelConfig) -> int:
    """Return the tokens of text that are enough for a model: TOKENS_PER_PARAMETER, read ENOUGH_PASSES times."""
    return math.ceil(model.num_parameters() * TOKENS_PER_PARAMETER / ENOUGH_PASSES)


def remark_on(text: RunText, model: ModelConfig, train: TrainConfig) -> Iterator[Remark]:
    """Yield remarks about a run's text: how often it is read and, if that is too often, what to do."""
    passes = text.passes(train)
    is_too_often = max(passes) > ENOUGH_PASSES
    yield Remark(_count(text.parts, passes, train), is_too_often)
    if is_too_often:
        yield Remark(_MEMORISES, True)
        yield Remark(_propose(text, max(passes), train), True)
        yield Remark(_compare_sizes(text, model), True)
    if not text.is_held_out:
        yield Remark(_HELD_OUT, True)
    elif text.held_out_tokens is not None and (warning := warn_of_few_tokens(text.held_out_tokens)):
        yield Remark(warning, True)


def _count(parts: Sequence[Part], passes: Sequence[float], train: TrainConfig) -> str:
    names = name_folders([part.path for part in parts])
    each = [
        f"{name} has {show_count(part.tokens)} tokens and is read {times:,.2f} times"
        for name, part, times in zip(names, parts, passes, strict=True)
    ]
    if len(parts) > _MOST_NAMED:  # those that are read most often are where memorising begins
        by_passes = sorted(range(len(parts)), key=lambda number: -passes[number])
        named, others = by_passes[: _MOST_NAMED - 1], by_passes[_MOST_NAMED - 1 :]
        least, most = (f"{passes[number]:,.2f}" for number in (others[-1], others[0]))
        rest = f"{least} to {most} times" if least != most else f"{most} times"
        each = [*(each[number] for number in named), f"{len(others)} other sources are read {rest}"]
    read = "; ".join(each)
    return f"{show_count(train.tokens)} tokens in {count_of(train.steps, 'step')}: {read}."


def _propose(text: RunText, most: float, train: TrainConfig) -> str:
    wanted = 1 + int(text.tokens * most / ENOUGH_PASSES)
    text_bytes = wanted * sum(part.text_bytes for part in text.parts) / text.tokens
    more = f"more text, at least {show_count(wanted)} tokens ({show_bytes(text_bytes)} of such text) for this run"
    tokens = text.most_tokens(train)
    if not tokens:
        return f"What helps: {more}. A single step reads it more often: lower train.batch_tokens, and train.tokens too."
    return f'What helps: train.tokens = "{round_down(tokens)}", which is {ENOUGH_PASSES:.0f} passes; or {more}.'


def _compare_sizes(text: RunText, model: ModelConfig) -> str:
    rule = f"about {TOKENS_PER_PARAMETER} tokens a parameter (Hoffmann et al. 2022)"
    size, suits = model.num_parameters(), text.suits()
    if size <= suits:
        return f"The size suits: by {rule} this text is enough for {show_count(suits)} parameters."
    says = f"Or a smaller model: by {rule} this text suits {show_count(suits)} parameters, and this model has "
    name = suitable_preset(text)
    if name is not None:
        return f"{says}{show_count(size)}. The preset for it is {name}."
    smallest, model, _ = _dense_presets()[0]
    wants = show_count(wanted_tokens(model))
    return f"{says}{show_count(size)}. The smallest recommended preset, {smallest}, wants {wants} tokens of text."


def round_down(count: int) -> str:
    """Return a count in three digits that is never above it, as run files take it: `6.29M`, `524k`, `960`."""
    for factor, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= factor:
            digits = 10 ** max(0, len(str(count)) - 3)
            return f"{count // digits * digits / factor:g}{unit}"
    return str(count)
