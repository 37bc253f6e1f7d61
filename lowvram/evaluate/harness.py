"""A model as lm-evaluation-harness asks it (package lm_eval, extra `eval`); knows no task.

Scores are those of `likelihood`, so an accuracy of the harness and one of ours on the same pairs are the same number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from lowvram.data.nfc import nfc
from lowvram.errors import DataError
from lowvram.evaluate.likelihood import Request
from lowvram.evaluate.scorer import Scorer
from lowvram.finish import finish
from lowvram.generate.decoder import Decoder
from lowvram.generate.engine import Engine
from lowvram.generate.sampling import Sampler

# As the harness's own models have it where a task names no length.
_ANSWER_TOKENS = 256
_RESAMPLES = 1000


@dataclass(frozen=True)
class HarnessRow:
    """One figure of one task.  error: the harness's standard error, None where it gives none."""

    task: str
    metric: str
    value: float
    error: float | None


class HarnessModel(LM):
    """The harness's three questions, answered by a scorer and an engine."""

    def __init__(self, scorer: Scorer) -> None:
        super().__init__()
        self._scorer = scorer
        self._opened: Engine | None = None

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Return of each pair (context, continuation) the log-probability, and whether greedy decoding writes it."""
        found = finish(self._scorer.score([self._scorer.encode(*request.args) for request in requests]))
        return [(-likelihood.nats, likelihood.is_greedy) for likelihood in found]

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """Return the log-probability of each whole text; every token is scored once, with as much before it as fits."""
        parts: list[Request] = []
        counts = []
        for request in requests:
            context, id_T = self._scorer.encode("", request.args[0])
            starts = range(0, len(id_T), self._scorer.max_context)
            counts.append(len(starts))
            parts += [Request(context + id_T[:start], id_T[start : start + starts.step]) for start in starts]
        nats = iter([likelihood.nats for likelihood in finish(self._scorer.score(parts))])
        return [-sum(next(nats) for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Return what is written behind each context up to the first of the texts that end it."""
        return [self._write(*request.args) for request in requests]

    def _write(self, context: str, settings: dict[str, Any]) -> str:
        engine, tokenizer = self._engine(), self._scorer.tokenizer
        until = settings.get("until") or []
        ends = [until] if isinstance(until, str) else [end for end in until if end]
        most = int(settings.get("max_gen_toks", _ANSWER_TOKENS))
        room = max(1, engine.max_context - 1 - min(most, engine.max_context // 2))
        id_T = [tokenizer.bos_id, *tokenizer.encode(nfc(context))[-room:]]
        temperature = float(settings.get("temperature", 0.0)) if settings.get("do_sample") else 0.0
        text = ""
        for piece in engine.generate(id_T, Sampler(temperature=temperature, repetition_penalty=1.0), most):
            text += piece
            places = [text.find(end) for end in ends if end in text]
            if places:
                return text[: min(places)]
        return text

    def _engine(self) -> Engine:
        if self._opened is None:
            scorer = self._scorer
            decoder = Decoder(scorer.model, scorer.max_context, dtype=scorer.dtype, captures=False)
            self._opened = Engine(decoder, scorer.tokenizer)
        return self._opened


def run_harness(scorer: Scorer, tasks: Sequence[str], items: int | None = None) -> list[HarnessRow]:
    """Run tasks of the harness, by its names for them or as paths of YAML files.  items: the first so many of each.

    Raises DataError where a task is not known or its data cannot be read.
    """
    # The index of the harness's own thousands of tasks takes a while to read.
    manager = TaskManager(include_defaults=not all(task.endswith((".yaml", ".yml")) for task in tasks))
    try:
        loaded = manager.load(list(tasks))
    except (OSError, KeyError, ValueError) as error:
        what = f"lm-evaluation-harness cannot load {', '.join(tasks)}."
        fix = "Look names up with `lm-eval ls tasks`; tasks of its own fetch their data from the network."
        raise DataError(what, f"{type(error).__name__}: {' '.join(str(error).split())}", fix) from error
    groups = loaded["groups"].values()
    inside = {name for group in groups for name in group.child_names}
    inside |= {task.task_name for group in groups for task in group.get_all_tasks()}
    wanted = [each for kind in ("groups", "tasks") for name, each in loaded[kind].items() if name not in inside]
    settings = {"limit": items, "bootstrap_iters": _RESAMPLES, "log_samples": False}
    found = simple_evaluate(HarnessModel(scorer), tasks=wanted, task_manager=manager, **settings)
    assert found is not None, "there is one process"
    return [row for task, figures in found["results"].items() for row in _read_figures(task, figures)]


def _read_figures(task: str, figures: dict[str, Any]) -> list[HarnessRow]:
    rows = []
    for name, value in figures.items():
        metric, comma, filtered = name.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            error = figures.get(f"{metric}_stderr,{filtered}")
            named = metric if filtered == "none" else f"{metric} ({filtered})"
            rows.append(HarnessRow(task, named, float(value), error if isinstance(error, float) else None))
    return rows
