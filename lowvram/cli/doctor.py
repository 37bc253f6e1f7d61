"""`lowvram doctor`: what this machine is, which backend computes each op on it and why, and what to repair."""

from __future__ import annotations

import argparse
import itertools
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lowvram_kernels.dispatch import Card, Choice
    from rich.table import Table

    from lowvram.hardware.doctor import Finding
    from lowvram.hardware.inspect import Facts


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "doctor",
        help="what this machine is, which backend computes each op, what to repair",
        description="Show what this machine is, which backend computes each op on it and why, and what keeps it from "
        "training or makes it slower, each with the command that repairs it. Nothing is trained, installed or "
        "changed. The exit code is 1 if training would fail, and 0 if it works or is only slower.",
    )
    parser.add_argument(
        "--gpu",
        metavar="CARD",
        help='the ops on another card, which need not be here: rtx5070, "RTX 4060 Laptop", m3-max, cpu, …',
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check and print; returns 1 where training would fail."""
    if arguments.gpu is not None:
        return _show_other_card(arguments.gpu, arguments.json)
    from lowvram.api.device import ask_torch
    from lowvram.cli.console import result
    from lowvram.hardware.doctor import find_all
    from lowvram.hardware.inspect import gather

    facts = gather(ask_torch())
    findings, ops = find_all(facts), {} if facts.says.problem or facts.says.card_problem else _find_ops(facts)
    device = None if facts.says.problem else facts.says.device
    if arguments.json:
        _show_json(device, None, _describe(facts), ops, findings)
    else:
        for name, words in _lines(facts).items():
            result(f"{name:<12}  {words}")
        if ops:
            result()
            _show_ops(ops)
        _show_findings(findings)
    return int(any(finding.is_fatal for finding in findings))


def _show_other_card(gpu: str, is_json: bool) -> int:
    from lowvram.api.target import describe_target
    from lowvram.cli.console import notice
    from lowvram.fit.rehearse import imagine

    named = describe_target(gpu)
    notice(named.sentence)
    ops = choose_all(imagine(named.profile))
    if is_json:
        _show_json(named.profile.platform, named.profile.id, None, ops, [])
    else:
        _show_ops(ops)
    return 0


def choose_all(card: Card) -> dict[str, Choice]:
    """Return what computes each op on a card, attention in the 16-bit numbers that the card is trained in."""
    import torch
    from lowvram_kernels.dispatch import OPS, choose, choose_attention

    dtype = torch.bfloat16 if card.capability is None or card.features.has_bf16 else torch.float16
    attention = {
        "attention": choose_attention(card, dtype, is_masked=False),
        "masked_attention": choose_attention(card, dtype, is_masked=True),
    }
    return attention | {op: choose(op, card) for op in OPS}


def _find_ops(facts: Facts) -> dict[str, Choice]:
    import torch
    from lowvram_kernels.dispatch import card_of

    return choose_all(card_of(torch.device(facts.says.device)))


def _lines(facts: Facts) -> dict[str, str]:
    """Return the machine in a few lines, each by its name."""
    from lowvram.units import show_bytes

    told = _describe(facts)
    memory, free = show_bytes(told["memory_bytes"]), show_bytes(told["free_memory_bytes"])
    lines = {
        "system": told["system"],
        "processor": told["processor"],
        "memory": f"{memory}, {free} of it free",
        "disk": f"{show_bytes(facts.free_disk_bytes)} free in this folder",
        "card": _describe_card(facts),
        "driver": "runs CUDA {}.{} and older".format(*facts.driver.cuda) if facts.driver else "",
        "Python": facts.python,
        "torch": _describe_torch(facts),
        "Triton": facts.triton.version if facts.triton else "not installed",
        "bitsandbytes": _describe_bitsandbytes(facts),
        "trains on": "nothing" if facts.says.problem else _DEVICES[facts.says.device],
    }
    return {name: words for name, words in lines.items() if words}


_DEVICES = {"cuda": "the card (cuda)", "mps": "Apple's GPU (mps)", "cpu": "the processor (cpu)"}


def _describe_card(facts: Facts) -> str:
    from lowvram.hardware.detect import detect
    from lowvram.units import show_bytes

    card = facts.card
    if card is None and facts.capability is not None:
        return "capability {}.{}, says torch; its driver does not answer".format(*facts.capability)
    if card is None:
        is_apple = facts.system == "Darwin" and facts.processor == "arm64"
        return f"{detect().profile.name}'s own" if is_apple else "no NVIDIA card"
    major, minor = card.capability
    room = f"{show_bytes(card.total_bytes)}, {show_bytes(card.free_bytes)} of it free"
    return f"{card.name}, capability {major}.{minor}, {room}"


def _describe_bitsandbytes(facts: Facts) -> str:
    version = facts.bitsandbytes.version if facts.bitsandbytes else "not installed"
    if facts.says.device != "cuda":
        return version
    why = "our own kernel is the default, since it never waits for the processor"
    return f'{version}; optimizer.backend = "bitsandbytes" takes its 8-bit AdamW, and {why}'


def _describe_torch(facts: Facts) -> str:
    if facts.build is None:
        return "not installed"
    built_for = "CUDA {}.{}".format(*facts.build.cuda) if facts.build.cuda else None
    return facts.build.version + (f", built for {built_for}" if built_for else "")


def _describe(facts: Facts) -> dict[str, Any]:
    """Return the machine for programs."""
    import platform

    import psutil

    memory, card, build = psutil.virtual_memory(), facts.card, facts.build
    cores, threads = psutil.cpu_count(logical=False), psutil.cpu_count()
    return {
        "system": f"{facts.system} {platform.mac_ver()[0] or platform.release()}",
        "processor": f"{facts.processor}, {cores or threads} cores, {threads} threads",
        "memory_bytes": memory.total,
        "free_memory_bytes": memory.available,
        "free_disk_bytes": facts.free_disk_bytes,
        "card": None if card is None else card._asdict(),
        "driver_cuda": facts.driver.cuda if facts.driver else None,
        "python": facts.python,
        "torch": build.version if build else None,
        "torch_cuda": build.cuda if build else None,
        "triton": facts.triton.version if facts.triton else None,
        "bitsandbytes": facts.bitsandbytes.version if facts.bitsandbytes else None,
    }


def _show_ops(ops: dict[str, Choice]) -> None:
    """Print a row for each op; in a narrow window neighbours with the same values share a row."""
    from lowvram.cli.console import lay_out, out, table_width

    table = _tabulate([[op] for op in ops], ops)
    if out.is_terminal and table_width(table) > out.width:
        table = _tabulate([list(alike) for _, alike in itertools.groupby(ops, ops.__getitem__)], ops)
    lay_out(table, is_folded=True)


def _tabulate(groups: Sequence[Sequence[str]], ops: dict[str, Choice]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("op", "backend"):
        table.add_column(name, no_wrap=True)
    table.add_column("why")
    is_changeable = any(choice.remedy for choice in ops.values())
    if is_changeable:
        table.add_column("what would change it")
    for group in groups:
        choice = ops[group[0]]
        words = [choice.reason, choice.remedy] if is_changeable else [choice.reason]
        table.add_row("\n".join(group), "\n".join([choice.backend] * len(group)), *words)
    return table


def _show_findings(findings: Sequence[Finding]) -> None:
    from lowvram.cli.console import literal, result
    from lowvram.cli.next_step import next_step
    from lowvram.cli.spelling import as_options

    for finding in findings:
        result()
        result(f"{'Fatal' if finding.is_fatal else 'Note'}: {finding.value}")
        result(f"  what follows  {as_options(finding.consequence)}")
        if finding.command:
            literal(f"  to repair it  {finding.command}")
    result()
    if any(finding.is_fatal for finding in findings):
        result("Training would fail here. Repair what is fatal, then type `lowvram doctor` again.")
    else:
        result("Training works here." if findings else "All is well.")
        literal(next_step("fit", why="which models fit this machine"))


def _show_json(
    device: str | None,
    gpu: str | None,
    machine: dict[str, Any] | None,
    ops: dict[str, Choice],
    findings: Sequence[Finding],
) -> None:
    """Print one JSON object; its schema is kept by a test.  device: None where torch does not import."""
    from lowvram.cli.console import literal
    from lowvram.cli.spelling import as_options

    values = {
        "gpu": gpu,
        "device": device,
        "machine": machine,
        "ops": [{"op": op, **choice._asdict()} for op, choice in ops.items()],
        "findings": [{**finding._asdict(), "consequence": as_options(finding.consequence)} for finding in findings],
        "can_train": not any(finding.is_fatal for finding in findings),
    }
    literal(json.dumps(values, ensure_ascii=False))
