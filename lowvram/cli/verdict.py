"""How answers about what fits look: a table, a ledger line by line, a JSON object; decides nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from lowvram.cli.show import lay_out, literal, out, result, table_width
from lowvram.config import TrainConfig
from lowvram.fit.answer import Answer, Place
from lowvram.fit.changes import Change
from lowvram.units import show_bytes, show_count, show_duration

_BAR_CELLS = 16
# What a window that is not wide enough leaves out, the last first; the columns before these are always shown.
_DISPENSABLE = 5
_LEFT = {"preset", "fits", "peak", "technique"}


def show_table(answers: Sequence[Answer], place: Place, advice: tuple[Answer, str] | None) -> None:
    """Print one row per model, and the one that is recommended."""
    rows = [_row(answer, place, advice) for answer in answers]
    shown = list(rows[0])
    while table_width(_tabulate(rows, shown)) > out.width and out.is_terminal and len(shown) > _DISPENSABLE:
        shown.pop()
    lay_out(_tabulate(rows, shown))
    result()
    result(
        f"Peak: of the {show_bytes(place.headless_bytes)} that tensors may take on {place.profile.name}" + _mark(place)
    )
    if left_out := list(rows[0])[len(shown) :]:
        result(f"A wider window shows also: {', '.join(left_out)}.")
    result("Time and kWh: until all of the preset's tokens are seen.  Parameters in brackets: active for a token.")
    if lacking := [answer for answer in answers if answer.lacks_host_bytes and answer.found.fits]:
        needs = ", ".join(f"{answer.name} {show_bytes(answer.host_bytes)}" for answer in lacking)
        result(f"The computer's memory of {show_bytes(place.ram_bytes or 0)} is too small for: {needs}.")
    result()
    if advice is None:
        least = min(answers, key=lambda answer: answer.found.peak_bytes).name
        result(
            f"None of them fits.  `lowvram fit --model {least}` with the same options shows what the smallest needs."
        )
        return
    answer, reason = advice
    result(f"Recommended: {answer.name}, {reason}.")
    result(f"  Its ledger: --model {answer.name}.  To make it a run: --out run.toml.")


def _tabulate(rows: Sequence[dict[str, Any]], shown: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in shown:
        table.add_column(name, justify="left" if name in _LEFT else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(row[name] for name in shown))
    return table


def _row(answer: Answer, place: Place, advice: tuple[Answer, str] | None) -> dict[str, Any]:
    """Return the cells by column, what matters most first."""
    found, model, speed = answer.found, answer.model, answer.speed
    size = show_count(model.num_parameters())
    if model.active_parameters() != model.num_parameters():
        size += f" ({_round(model.active_parameters())})"
    is_advised = advice is not None and advice[0].name == answer.name
    return {
        "preset": Text(answer.name, "bold" if is_advised else ""),
        "parameters": size,
        "fits": _fits(answer, place),
        "peak": Text.assemble(_bar(found.peak_bytes, place), f" {show_bytes(found.peak_bytes):>9}"),
        "time": show_duration(answer.days * 86_400) if answer.days is not None else "–",
        "tokens/s": f"{show_count(speed.tokens_per_second)} ({_range(answer)})" if speed else "–",
        "kWh": f"{answer.kwh:.1f}" if answer.kwh is not None else "–",
        "plan": f"{found.plan.micro_batch} × {found.plan.accumulate}",
        "technique": describe_technique(answer),
        "tokens": show_count(answer.train.tokens),
        "saves a day": _gigabytes(answer.written_bytes_per_day),
        "disk needed": _gigabytes(answer.disk_bytes),
    }


def _fits(answer: Answer, place: Place) -> Text:
    if answer.fits:
        return Text("yes", "green")
    if answer.found.fits:
        return Text("too little RAM", "red")
    return Text(f"without {place.beside}", "yellow") if answer.fits_headless else Text("no", "red")


def _range(answer: Answer) -> str:
    assert answer.speed is not None, "only asked where there is a speed"
    return f"{_round(answer.speed.low)}–{_round(answer.speed.high)}"


def _round(count: float) -> str:
    """Return a count with two or three digits, for an end of a range: `8.4k`, `187k`, `1.1B`."""
    power = sum(count >= 999.5 * 1000**power for power in range(3))
    value = count / 1000**power
    return f"{value:.{1 if value < 9.95 else 0}f}{('', 'k', 'M', 'B')[power]}"


def _gigabytes(count: int) -> str:
    """Return bytes as disks are sold."""
    if count < 0.95e9:
        return f"{count / 1e6:.0f} MB"
    return f"{count / 1e9:.1f} GB" if count < 9.95e9 else f"{count / 1e9:.0f} GB"


def describe_technique(answer: Answer) -> str:
    """Say what makes the step smaller: recomputation, lower precision, rotation; a dash where nothing does."""
    plan, train, ffn = answer.found.plan, answer.train, answer.model.ffn
    words = [f"recompute {plan.recompute}"] if plan.recompute != "none" else []
    words += ["bf16 weights"] if train.weights == "bf16" else []
    words += [describe_optimizer(train)] if train.optimizer.bits != 32 else []
    if train.rotation is not None and ffn.kind == "moe":
        words += [f"{train.rotation.window} of {ffn.experts} experts learn"]
    words += ["update during backward"] if train.update_during_backward else []
    words += ["states in RAM"] if plan.offload == "optimizer" else []
    return ", ".join(words) or "–"


def describe_optimizer(train: TrainConfig) -> str:
    """Return `8-bit AdamW`, `16-bit Muon`."""
    name = {"adamw": "AdamW", "muon": "Muon"}[train.optimizer.name]
    return f"{train.optimizer.bits}-bit {name}"


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


def _mark(place: Place) -> str:
    if place.limit_bytes == place.headless_bytes:
        return "."
    return f"; the mark │ stands at the {show_bytes(place.limit_bytes)} that are left beside {place.beside}."


def show_one(
    answer: Answer, place: Place, changes: Sequence[Change] | None, faster: Sequence[Change], is_preset: bool
) -> None:
    """Print one model's ledger line by line, what it costs, what would be faster, and what would make it fit."""
    found, ledger, plan = answer.found, answer.found.rehearsal.ledger, answer.found.plan
    cut = f"{plan.micro_batch} {'sequence' if plan.micro_batch == 1 else 'sequences'} × {plan.accumulate} a step"
    again = "" if plan.recompute == "none" else f", {plan.recompute} computed again in backward"
    result(f"{answer.name} {_verdict(answer, place)}: {cut}{again}.")
    result(f"  {found.reason[:1].upper()}{found.reason[1:]}.")
    result()
    for name, size in ledger.lines().items():
        cells = round(size / ledger.peak_bytes * 40)
        result(f"  {name:<12} {show_bytes(size):>10}  {'█' * cells}".rstrip())
    result(f"  {'peak':<12} {show_bytes(ledger.peak_bytes):>10}  during {ledger.moment}")
    if not found.is_rehearsed:
        result("               these lines lie between two rehearsals; a run file is rehearsed itself")
    result(f"  {'limit':<12} {show_bytes(place.limit_bytes):>10}  {_headless(place)}")
    ram = "" if place.ram_bytes is None else f", which has {show_bytes(place.ram_bytes)}"
    kept = f", {show_bytes(ledger.kept_on_host)} of it for experts and states that wait" if ledger.kept_on_host else ""
    result(f"  {'host':<12} {show_bytes(answer.host_bytes):>10}  in the computer's memory{ram}{kept}")
    result()
    if answer.lacks_host_bytes:
        result(f"  The computer lacks {show_bytes(answer.lacks_host_bytes)} of memory for it.")
    if answer.speed and answer.days is not None:
        kind = "measured here" if answer.speed.is_measured else "estimated"
        speed = f"{show_count(answer.speed.tokens_per_second)} tokens/s ({kind}, {_range(answer)} expected)"
        energy = f", {answer.kwh:.1f} kWh" if answer.kwh is not None else ""
        tokens = f"{show_count(answer.train.tokens)} tokens in {show_duration(answer.days * 86_400)}{energy}"
        result(f"  {speed}: {tokens}.")
    elif answer.fits_headless:
        result(f"  How fast {place.profile.name} is, is not known.")
    for change in faster:
        result(f"  {change.says} (--set {change.sets[0]}): {change.costs}; peak {show_bytes(change.peak_bytes)}.")
    writes, disk = _gigabytes(answer.written_bytes_per_day), _gigabytes(answer.disk_bytes)
    saves = f"A checkpoint has {show_bytes(answer.state_bytes)}; saving writes up to {writes} a day"
    result(f"  {saves}; {disk} of disk must be free.")
    if not (answer.fits_headless and answer.fits_host):
        _show_changes(answer, changes, is_preset)


def _verdict(answer: Answer, place: Place) -> str:
    if answer.fits:
        return "fits"
    if answer.found.fits:
        return "fits the card, but not the computer's memory"
    return f"fits only without {place.beside}" if answer.fits_headless else "does not fit"


def _headless(place: Place) -> str:
    if place.limit_bytes == place.headless_bytes:
        return "for tensors"
    return f"for tensors beside {place.beside}, {show_bytes(place.headless_bytes)} without"


def _show_changes(answer: Answer, changes: Sequence[Change] | None, is_preset: bool) -> None:
    largest = sorted(answer.found.rehearsal.ledger.lines().items(), key=lambda line: -line[1])[:3]
    lines = ", ".join(f"{name} {show_bytes(size)}" for name, size in largest)
    result(f"  Its largest lines: {lines}.")
    if changes is None:
        result("  Another plan may fit: leave --micro-batch and --recompute out.")
        return
    if not changes:
        tried = "a lighter recipe, experts that take turns, a shorter context, fewer layers"
        result(f"  None of these would do: {tried}.  Take a smaller preset.")
        return
    where = "as a run (--out run.toml) " if is_preset else ""
    result(f"  What would fit, {where}with other results:")
    for change in changes:
        sets = " ".join(f"--set {assignment}" for assignment in change.sets)
        result(f"    {sets}")
        result(f"      {change.says}; peak {show_bytes(change.peak_bytes)}; {change.costs}")


_ATTENTION = {
    "flash": "a fused kernel (FlashAttention), so that scores never stand in memory",
    "efficient": "a fused kernel (memory-efficient attention); FlashAttention needs an RTX 30 or later",
    "math": "written out, every score in memory: Metal has no fused kernel for training",
}
_PRECISION = {
    "bf16": "half the memory of fp32, and no loss scaling",
    "fp16": "this card has tensor cores for it and none for bf16, which would be 8 times slower",
}


def explain(answers: Sequence[Answer], place: Place) -> Iterator[str]:
    """Yield why each choice was made: first what is the card's, then model by model."""
    profile, train = place.profile, answers[0].train
    yield ""
    rest = "driver, context, workspaces and the gaps between tensors" if profile.platform == "cuda" else "the system"
    yield f"limit: {show_bytes(place.headless_bytes)} of {show_bytes(profile.memory_bytes)}; the rest is for {rest}"
    yield f"attention: {_ATTENTION[profile.attention]}"
    is_own = train.precision == profile.dtype
    yield f"precision: {train.precision}, {_PRECISION[profile.dtype] if is_own else 'as the run says'}"
    is_measured = any(answer.speed is not None and answer.speed.is_measured for answer in answers)
    has_figures = bool(profile.tflops)
    source = "not known" if not has_figures else "reckoned from the card's published figures; --measure times it here"
    yield f"speed: {'measured on this machine' if is_measured else source}"
    for answer in answers:
        states = f"{describe_optimizer(answer.train)}, as the recipe says"
        moment = f"peak during {answer.found.rehearsal.ledger.moment}"
        yield f"{answer.name}: {answer.found.reason}; {states}; {moment}"


def show_json(
    answers: Sequence[Answer],
    place: Place,
    recommended: str | None,
    changes: Sequence[Change],
    faster: Sequence[Change],
) -> None:
    """Print one JSON object; its schema is kept by a test.

    changes: what would make a single model fit.  faster: in which precisions a run would be faster.
    """
    values = {
        "gpu": place.profile.id,
        "gpu_name": place.profile.name,
        "limit_bytes": place.limit_bytes,
        "limit_bytes_without_desktop": place.headless_bytes,
        "recommended": recommended,
        "models": [_values(answer) for answer in answers],
        "changes": [change._asdict() for change in changes],
        "faster": [change._asdict() for change in faster],
    }
    literal(json.dumps(values, ensure_ascii=False))


def _values(answer: Answer) -> dict[str, Any]:
    found, speed = answer.found, answer.speed
    return {
        "name": answer.name,
        "parameters": answer.model.num_parameters(),
        "active_parameters": answer.model.active_parameters(),
        "fits": answer.fits,
        "fits_without_desktop": answer.fits_headless and not answer.lacks_host_bytes,
        "plan": found.plan.model_dump(),
        "reason": found.reason,
        "peak_bytes": found.peak_bytes,
        "host_bytes": answer.host_bytes,
        "kept_on_host_bytes": found.rehearsal.ledger.kept_on_host,
        "lacks_host_bytes": answer.lacks_host_bytes,
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
