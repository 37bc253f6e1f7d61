"""How answers about what fits look: a table, a ledger line by line, a JSON object; decides nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from lowvram.cli.show import err, out, result
from lowvram.fit.answer import Answer, Place
from lowvram.fit.changes import Change
from lowvram.units import show_bytes, show_count, show_duration

_BAR_CELLS = 16


def show_table(answers: Sequence[Answer], place: Place) -> None:
    """Print one row per model."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, side in (
        ("preset", "left"),
        ("parameters", "right"),
        ("fits", "left"),
        ("plan", "right"),
        ("technique", "left"),
        ("peak of the limit", "left"),
        ("tokens/s", "right"),
        ("to its tokens", "right"),
        ("kWh", "right"),
        ("written", "right"),
        ("disk", "right"),
    ):
        table.add_column(name, justify=side, no_wrap=True)  # type: ignore[arg-type]
    for answer in answers:
        table.add_row(*_row(answer, place))
    # A pipe has no width: nothing may be cut there.
    out.print(table, soft_wrap=False, width=None if out.is_terminal and out.width >= 130 else 140)


def _row(answer: Answer, place: Place) -> list[Any]:
    found, speed = answer.found, answer.speed
    bar = Text.assemble(_bar(found.peak_bytes, place), f" {show_bytes(found.peak_bytes)}")
    model = answer.model
    size = show_count(model.num_parameters())
    if model.active_parameters() != model.num_parameters():
        size += f" ({show_count(model.active_parameters())})"
    row = [answer.name, size, _fits(answer), _cut(answer), describe_technique(answer), bar]
    if not speed or answer.days is None:
        return [*row, "–", "–", "–", *_disk(answer)]
    return [
        *row,
        f"{show_count(speed.tokens_per_second)} ± {_range(answer):.0%}",
        show_duration(answer.days * 86_400),
        f"{answer.kwh:.1f}" if answer.kwh is not None else "–",
        *_disk(answer),
    ]


def _fits(answer: Answer) -> Text:
    if answer.found.fits:
        return Text("yes", "green")
    return Text("no desktop", "yellow") if answer.fits_headless else Text("no", "red")


def _cut(answer: Answer) -> str:
    plan = answer.found.plan
    return f"{plan.micro_batch} × {plan.accumulate}"


def _disk(answer: Answer) -> tuple[str, str]:
    return f"{answer.written_bytes_per_day / 1e9:.0f} GB/day", f"{answer.disk_bytes / 1e9:.0f} GB"


def _range(answer: Answer) -> float:
    assert answer.speed is not None, "only asked where there is a speed"
    return (answer.speed.high - answer.speed.low) / 2 / answer.speed.tokens_per_second


def describe_technique(answer: Answer) -> str:
    """Say what makes the step smaller: recomputation, 8-bit states; a dash where nothing does."""
    again = answer.found.plan.recompute
    words = [f"recompute {again}"] if again != "none" else []
    words += ["8-bit"] if answer.train.optimizer.bits == 8 else []
    return ", ".join(words) or "–"


def _bar(peak_bytes: int, place: Place) -> Text:
    """Draw the peak over the whole limit; a mark stands where a desktop begins."""
    whole = max(1, place.headless_bytes)
    filled = min(_BAR_CELLS, max(1, round(peak_bytes / whole * _BAR_CELLS)))
    desktop = min(_BAR_CELLS - 1, int(place.limit_bytes / whole * _BAR_CELLS))
    cells = ["█" if cell < filled else "░" for cell in range(_BAR_CELLS)]
    if place.limit_bytes < place.headless_bytes:
        cells[desktop] = "▓" if desktop < filled else "│"
    colour = "green" if peak_bytes <= place.limit_bytes else "yellow" if peak_bytes <= whole else "red"
    return Text("".join(cells), colour)


def show_one(answer: Answer, place: Place, changes: Sequence[Change]) -> None:
    """Print one model's ledger line by line, what it costs, and what would make it fit."""
    found, ledger, plan = answer.found, answer.found.rehearsal.ledger, answer.found.plan
    verdict = "fits" if found.fits else "fits only without a desktop" if answer.fits_headless else "does not fit"
    result(f"{answer.name} {verdict}: {plan.micro_batch} sequences × {plan.accumulate}, recompute {plan.recompute}.")
    result(f"  {found.reason[:1].upper()}{found.reason[1:]}.")
    result()
    for name, size in ledger.lines().items():
        cells = round(size / ledger.peak_bytes * 40)
        result(f"  {name:<12} {show_bytes(size):>10}  {'█' * cells}")
    result(f"  {'peak':<12} {show_bytes(ledger.peak_bytes):>10}  during {ledger.moment}")
    result(f"  {'limit':<12} {show_bytes(place.limit_bytes):>10}  {_headless(place)}")
    result(f"  {'host':<12} {show_bytes(answer.host_bytes):>10}  in the computer's memory")
    result()
    if answer.speed and answer.days is not None:
        kind = "measured here" if answer.speed.is_measured else "estimated"
        speed = f"{show_count(answer.speed.tokens_per_second)} tokens/s ± {_range(answer):.0%} ({kind})"
        energy = f", {answer.kwh:.1f} kWh" if answer.kwh is not None else ""
        tokens = f"{show_count(answer.train.tokens)} tokens in {show_duration(answer.days * 86_400)}{energy}"
        result(f"  {speed}: {tokens}.")
    writes, disk = _disk(answer)
    result(f"  A checkpoint has {show_bytes(answer.state_bytes)}; saving writes {writes}; keep {disk} of disk free.")
    if not (found.fits or answer.fits_headless):
        _show_changes(answer, changes)


def _headless(place: Place) -> str:
    if place.limit_bytes == place.headless_bytes:
        return "for tensors"
    return f"for tensors beside a desktop, {show_bytes(place.headless_bytes)} without one"


def _show_changes(answer: Answer, changes: Sequence[Change]) -> None:
    largest = sorted(answer.found.rehearsal.ledger.lines().items(), key=lambda line: -line[1])[:3]
    lines = ", ".join(f"{name} {show_bytes(size)}" for name, size in largest)
    result(f"  This is the smallest plan. Its largest lines: {lines}.")
    for change in changes:
        sets = " ".join(f"--set {assignment}" for assignment in change.sets)
        result(f"  Would fit with {sets}  ({change.says}; {show_bytes(change.peak_bytes)})")
    if not changes:
        result("  Nothing milder than a smaller preset would fit: see `lowvram fit` without a run file.")


def explain(answer: Answer, place: Place) -> None:
    """Print why each choice of an answer was made."""
    found, profile = answer.found, place.profile
    why = [
        f"plan: {found.reason}",
        f"attention: {profile.attention} kernel on {profile.name}",
        f"precision: {answer.train.precision}",
        f"optimizer: AdamW with {answer.train.optimizer.bits}-bit states, as the run says",
        f"peak: {show_bytes(found.peak_bytes)} during {found.rehearsal.ledger.moment}",
    ]
    if answer.speed:
        figures = "this machine's own measurement" if answer.speed.is_measured else "the card's figures in its profile"
        why.append(f"speed: {figures}, {found.rehearsal.micro.flops / 1e12:.2f} TFLOP a micro-batch")
    for line in why:
        err.print(Text(f"  {answer.name}: {line}", "dim"))


def show_json(answers: Sequence[Answer], place: Place, recommended: str | None) -> None:
    """Print one JSON object; its schema is kept by a test."""
    values = {
        "gpu": place.profile.id,
        "gpu_name": place.profile.name,
        "limit_bytes": place.limit_bytes,
        "limit_bytes_without_desktop": place.headless_bytes,
        "recommended": recommended,
        "models": [_values(answer) for answer in answers],
    }
    result(json.dumps(values, ensure_ascii=False))


def _values(answer: Answer) -> dict[str, Any]:
    found, speed = answer.found, answer.speed
    return {
        "name": answer.name,
        "parameters": answer.model.num_parameters(),
        "active_parameters": answer.model.active_parameters(),
        "fits": found.fits,
        "fits_without_desktop": answer.fits_headless,
        "plan": found.plan.model_dump(),
        "reason": found.reason,
        "peak_bytes": found.peak_bytes,
        "host_bytes": answer.host_bytes,
        "ledger": found.rehearsal.ledger.lines() | {"moment": found.rehearsal.ledger.moment},
        "tokens_per_second": round(speed.tokens_per_second, 1) if speed else None,
        "tokens_per_second_range": [round(speed.low, 1), round(speed.high, 1)] if speed else None,
        "is_measured": speed.is_measured if speed else None,
        "days": round(answer.days, 3) if answer.days is not None else None,
        "kwh": round(answer.kwh, 2) if answer.kwh is not None else None,
        "checkpoint_bytes": answer.state_bytes,
        "written_bytes_per_day": answer.written_bytes_per_day,
        "disk_bytes": answer.disk_bytes,
    }
