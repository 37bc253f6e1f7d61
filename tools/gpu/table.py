"""Evaluates the GPU report's rows (shares of a roof, ratios to rivals, aims met or missed) and writes its tables.

Knows no torch and measures nothing: a row holds a worker's results in seconds, bytes and operations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]
_GIB = 2**30
# The modes in which steps are timed; a row has those that were possible.
_MODES = ("eager", "played", "compiled", "compiled and played")


class Roofs(NamedTuple):
    """The bytes and operations per second that bound a kernel, under "copy", "bf16", "fp8" and "int8"."""

    measured: Mapping[str, float]
    published: Mapping[str, float]


def roofs_of(rows: Sequence[Row], published: Mapping[str, float]) -> Roofs:
    """Return the measured rates, and those of the card's profile."""
    return Roofs(
        {row["numbers"]: row["per_second"] for row in rows if row.get("kind") == "rate" and is_ok(row)}, published
    )


def is_ok(row: Row) -> bool:
    """Say whether a row was measured and its result is right."""
    return row["status"] == "ok"


def figures_of(row: Row, roofs: Roofs) -> Row:
    """Return a kernel's rates, and its shares of the roofs; None for shares that are not known."""
    seconds = row["seconds"]
    return {
        "bytes_per_second": row["moved_bytes"] / seconds,
        "operations_per_second": row["operations"] / seconds,
        "of_copy": _share(row["moved_bytes"], roofs.measured.get("copy"), seconds),
        "of_roof": _share_of_roof(row, roofs.measured),
        "of_published_roof": _share_of_roof(row, roofs.published),
    }


def _share(amount: float, rate: float | None, seconds: float) -> float | None:
    return amount / rate / seconds if rate else None


def _share_of_roof(row: Row, rates: Mapping[str, float]) -> float | None:
    """Return the least time that the bytes or the operations need, divided by the measured time."""
    shares = [_share(row["moved_bytes"], rates.get("copy"), row["seconds"])]
    if row["operations"]:
        shares.append(_share(row["operations"], rates.get(row["numbers"]), row["seconds"]))
    known = [share for share in shares if share is not None]
    return max(known) if len(known) == len(shares) else None


def judge_aims(row: Row, roofs: Roofs) -> list[Row]:
    """Return each aim with the value reached and whether it is met; both are None if they are not known."""
    return [aim | _judge(aim, row, roofs) for aim in row.get("aims", ())]


def _judge(aim: Row, row: Row, roofs: Roofs) -> Row:
    reached: float | None = None
    if is_ok(row) and aim["of"] == "copy":
        reached = figures_of(row, roofs)["of_copy"]
    elif is_ok(row) and aim["of"] == "tokens_per_second":
        reached = row["tokens_per_second"]
    elif is_ok(row):
        rival: Row = next((rival for rival in row["rivals"] if rival["name"] == aim["of"]), {})
        reached = rival["seconds"] / row["seconds"] if "seconds" in rival else None
    return {"reached": reached, "is_met": None if reached is None else reached >= aim["least"]}


def page(facts: Row, rows: Sequence[Row], missing: Sequence[str], roofs: Roofs) -> str:
    """Return the Markdown page of a report."""
    parts = [_head(facts), _rates(rows, roofs), _tests(rows), _kernels(rows, roofs), _trainings(rows, roofs)]
    return "\n".join([*(part for part in parts if part), _rest(rows, missing)])


def _head(facts: Row) -> str:
    card = facts["card"]
    capability = ".".join(map(str, facts.get("capability", ()))) or "none"
    how = (
        "Times are medians of many samples between CUDA events, behind a wait that hides the host, on inputs and "
        "results that rotate through four times the L2 cache. Aims are those for an H200."
    )
    if facts["device"] != "cuda":
        how = "Triton's interpreter on a processor, tiny shapes: only to see that every case runs. Times mean nothing."
    return "\n".join(
        [
            f"# {card}, measured",
            "",
            f"Written by machine: `{facts['command']}`, {facts['date']}, {facts['took_s']:.0f} s.",
            f"Driver {facts['driver']}, CUDA {facts['cuda']}, compute capability {capability}, torch {facts['torch']}, "
            f"Triton {facts['triton']}, Python {facts['python']}, commit {facts['commit']}.",
            "",
            how,
            "",
        ]
    )


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines)) + "\n"


def _rates(rows: Sequence[Row], roofs: Roofs) -> str:
    lines = []
    for row in rows:
        if row.get("kind") == "rate" and is_ok(row):
            unit, scale = ("GB/s", 1e9) if row["numbers"] == "copy" else ("TFLOP/s", 1e12)
            published = roofs.published.get(row["numbers"])
            expected = f"{published / scale:,.0f} {unit}" if published else "–"
            lines.append([row["numbers"], f"{row['per_second'] / scale:,.0f} {unit}", row["shape"], expected])
    title = "## Roofs\n\nA copy reads and writes; products are cuBLAS's, the best of a few shapes.\n\n"
    return title + _table(["what", "measured", "at", "profile"], lines) if lines else ""


def _tests(rows: Sequence[Row]) -> str:
    row = next((row for row in rows if row.get("kind") == "tests"), None)
    return f"## Tests on the card\n\n{row['note']}\n" if row else ""


def _kernels(rows: Sequence[Row], roofs: Roofs) -> str:
    lines = []
    for row in rows:
        if row.get("kind") != "kernel" or not is_ok(row):
            continue
        figures = figures_of(row, roofs)
        speed = f"{figures['operations_per_second'] / 1e12:,.1f}" if row["operations"] else "–"
        lines.append(
            [
                row["name"],
                f"{_micro(row['seconds'])} ({_micro(row['low'])}–{_micro(row['high'])})",
                _micro(row["host_seconds"]),
                f"{figures['bytes_per_second'] / 1e9:,.0f}",
                speed,
                f"{_percent(figures['of_roof'])} / {_percent(figures['of_published_roof'])}",
                "<br>".join(_say_rival(rival, row) for rival in row["rivals"]) or "–",
                _say_aims(row, roofs),
            ]
        )
    head = [
        "kernel",
        "µs (quartiles)",
        "host µs",
        "GB/s",
        "TFLOP/s",
        "of the roof: measured / published",
        "rivals",
        "aim",
    ]
    title = "## Kernels\n\nA rival's factor is its time by ours: above 1 ours is faster.\n\n"
    return title + _table(head, lines) if lines else ""


def _micro(seconds: float) -> str:
    return f"{seconds * 1e6:,.1f}" if seconds < 1e-3 else f"{seconds * 1e6:,.0f}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"


def _say_rival(rival: Row, row: Row) -> str:
    if "seconds" not in rival:
        return f"{rival['name']}: refused ({_one_line(rival['note'])})"
    return f"{rival['name']}: {_micro(rival['seconds'])} µs, {rival['seconds'] / row['seconds']:.2f}×"


def _one_line(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")[:160]


def _say_aims(row: Row, roofs: Roofs) -> str:
    words = {True: "met", False: "missed", None: "not known"}
    sentences = []
    for aim in judge_aims(row, roofs):
        show: Callable[[float], str] = (
            "{:,.0f} tokens/s".format if aim["of"] == "tokens_per_second" else "{:.2f}".format
        )
        of = "" if aim["of"] == "tokens_per_second" else f" of {aim['of']}"
        reached = "" if aim["reached"] is None else f" ({show(aim['reached'])})"
        sentences.append(f"{show(aim['least'])}{of}: {words[aim['is_met']]}{reached}")
    return "<br>".join(sentences) or "–"


def _trainings(rows: Sequence[Row], roofs: Roofs) -> str:
    lines = []
    for row in rows:
        if row.get("kind") != "training" or not is_ok(row):
            continue
        best = max(row["modes"].values(), key=lambda mode: mode["tokens_per_second"])
        speed = row["operations"] / best["step_seconds"]
        plan = row["plan"]
        lines.append(
            [
                row["name"].removeprefix("train "),
                f"{plan['micro_batch']} × {plan['accumulate']}, {plan['recompute']}",
                *(_say_mode(row["modes"].get(mode)) for mode in _MODES),
                f"{speed / 1e12:,.1f} ({_percent(_share(speed, roofs.measured.get('bf16'), 1.0))})",
                " / ".join(_say_peak(row["modes"].get(mode)) for mode in _MODES),
                _say_bytes(row["ledger_bytes"]),
                _say_bytes(row["limit_bytes"]),
                _say_aims(row, roofs),
            ]
        )
    head = ["preset and card whose memory it has", "plan", *(f"{mode} tokens/s" for mode in _MODES)]
    head += ["TFLOP/s (of cuBLAS bf16)", f"peak GiB: {' / '.join(_MODES)}", "ledger GiB", "limit GiB", "aim"]
    title = (
        "## Training\n\nlowvram's own steps on random tokens, with the plan that `fit` chooses within the smaller "
        "card's memory (sequences × accumulation, what is recomputed). Operations are the rehearsal's, what is "
        "recomputed included. Played: a micro-batch's passes come from CUDA graphs; its peak is what the allocator "
        "holds.\n\n"
    )
    return title + _table(head, lines) if lines else ""


def _say_peak(mode: Row | None) -> str:
    return _say_bytes(None if mode is None else mode["peak_bytes"])


def _say_mode(mode: Row | None) -> str:
    return "–" if mode is None else f"{mode['tokens_per_second']:,.0f}"


def _say_bytes(count: int | None) -> str:
    return "–" if count is None else f"{count / _GIB:.2f}"


def _rest(rows: Sequence[Row], missing: Sequence[str]) -> str:
    lines = [f"- {row['name']}: {row['status']}, {_one_line(row.get('note', ''))}" for row in rows if not is_ok(row)]
    lines += [f"- {name}: not reached" for name in missing]
    return "\n".join(["## Wrong, failed or left out", "", *(lines or ["Nothing."])]) + "\n"
