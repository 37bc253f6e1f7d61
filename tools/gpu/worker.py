"""Measures the cases of the GPU report one after the other and prints each result as a line of JSON; stores nothing.

report.py starts it, and starts another one if a kernel crashes the process, loses the card or does not return.
Lines on stdout that belong to the report are JSON objects with an "event"; it ignores other lines.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch
from lowvram_kernels.dispatch import Card, is_interpreted, override_card

from lowvram.errors import LowvramError
from tools.gpu.cases import kernels
from tools.gpu.kernel import Refusal, Row, Scene, first_line, is_lost
from tools.gpu.timing import time_runs
from tools.gpu.training import trainings

TESTS = "tests"
# The card whose kernels run in Triton's interpreter.
INTERPRETED = Card("cuda", (8, 6))
_GIB = 2**30


class Case(NamedTuple):
    """A name and a measurement.  needs_s: the least time that it takes.  limit_s: after this time it is stopped."""

    name: str
    measure: Callable[[Scene], Row] | None
    needs_s: float
    limit_s: float


def find_scene(is_tiny: bool) -> Scene:
    """Return the card, or the processor for --tiny: with fp16, since Triton's interpreter is not exact in bf16."""
    if torch.cuda.is_available():
        torch.backends.cuda.enable_cudnn_sdp(False)  # as lowvram does when it chooses its device
        return Scene(torch.device("cuda", 0), is_tiny, torch.bfloat16)
    return Scene(torch.device("cpu"), is_tiny, torch.float16)


def describe(scene: Scene) -> Row:
    """Return the facts about this machine: device and versions."""
    triton_version = "none"
    with contextlib.suppress(ImportError):
        import triton

        triton_version = triton.__version__
    facts: Row = {"torch": torch.__version__, "triton": triton_version, "python": sys.version.split()[0]}
    if not scene.is_card:
        return facts | {"device": "cpu", "card": "processor", "cuda": None}
    card = torch.cuda.get_device_properties(scene.device)
    return facts | {
        "device": "cuda",
        "card": card.name,
        "capability": [card.major, card.minor],
        "multiprocessors": card.multi_processor_count,
        "memory_bytes": card.total_memory,
        "cache_bytes": card.L2_cache_size,
        "cuda": torch.version.cuda,
    }


def copy_rate(scene: Scene) -> Row:
    """Measure the bytes per second that torch's copy of a GiB reads and writes."""
    count = 2**12 if scene.is_tiny else _GIB // 4
    source, target = torch.zeros(count, device=scene.device), torch.empty(count, device=scene.device)
    timing = time_runs([functools.partial(target.copy_, source)], scene.device)
    moved = 2.0 * source.nbytes
    return {"kind": "rate", "numbers": "copy", "shape": f"{source.nbytes:,} bytes", **timing._asdict()} | {
        "per_second": moved / timing.seconds,
        "status": "ok",
    }


def product_rate(scene: Scene, numbers: str) -> Row:
    """Measure the best rate of the library's own products, over large square and long matrices."""
    sizes = [(32, 32, 32)] if scene.is_tiny else [(4_096,) * 3, (8_192,) * 3, (16_384, 8_192, 4_096)]
    best: Row = {}
    for rows, columns, inner in sizes:
        x, y = scene.randn(rows, inner), scene.randn(columns, inner)
        if numbers == "fp8":
            one = torch.ones((), device=scene.device)
            x, y = x.to(torch.float8_e4m3fn), y.to(torch.float8_e4m3fn)
            run = functools.partial(torch._scaled_mm, x, y.mT, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
        elif numbers == "int8":
            x, y = x.mul(20).to(torch.int8), y.mul(20).to(torch.int8)
            run = functools.partial(torch._int_mm, x, y.mT)
        else:
            run = functools.partial(torch.mm, x, y.mT)
        timing = time_runs([run], scene.device)
        rate = 2.0 * rows * columns * inner / timing.seconds
        if rate > best.get("per_second", 0.0):
            best = {"per_second": rate, "shape": f"{rows} × {columns} × {inner}", **timing._asdict()}
    return {"kind": "rate", "numbers": numbers, **best, "status": "ok"}


def find_cases(scene: Scene, only: list[str]) -> list[Case]:
    """Return the cases, the most important first.  only: parts of the wanted cases' names; empty for all cases."""
    rates = [Case("rate copy", copy_rate, 2.0, 60.0)]
    for numbers in ("bf16", "fp8", "int8") if scene.is_card else ("bf16",):
        rates.append(Case(f"rate {numbers}", functools.partial(product_rate, numbers=numbers), 2.0, 60.0))
    every, steps, cases = kernels(scene), trainings(scene), list[Case]()
    ranks = [*(one.rank for one in every), *(one.rank for one in steps)]
    for rank in range(1 + max(ranks)):
        cases += [Case(one.name, one.measure, 2.0, 60.0) for one in every if one.rank == rank]
        if rank == 0:
            cases.append(Case(TESTS, None, 20.0, 1e9))
        cases += [Case(one.name, one.measure, 30.0, 180.0) for one in steps if one.rank == rank]
    return [*rates, *(case for case in cases if not only or any(word in case.name for word in only))]


@contextlib.contextmanager
def interpreting(scene: Scene) -> Iterator[None]:
    """On a processor, run the kernels of a card in Triton's interpreter."""
    if scene.is_card:
        yield
        return
    assert is_interpreted(), "report.py turns it on before Triton is imported"
    with override_card(INTERPRETED):
        yield


def tell(event: str, **values: Any) -> None:
    """Write one line."""
    print(json.dumps({"event": event, **values}), flush=True)


def measure(case: Case, scene: Scene) -> Row:
    """Measure one case, or return why it failed; raises the error if the card was lost."""
    assert case.measure is not None, "tests are not measured here"
    refusals: tuple[type[Exception], ...] = (*Refusal, LowvramError, *_triton_errors())
    own = contextlib.nullcontext() if case.name.startswith("train") else interpreting(scene)
    try:
        with own:
            return case.measure(scene)
    except refusals as error:
        if is_lost(scene):
            raise
        return {"status": "failed", "note": first_line(error)}


def _triton_errors() -> tuple[type[Exception], ...]:
    try:
        from triton.errors import TritonError
    except ImportError:
        return ()
    return (TritonError,)


def main() -> None:
    """Measure the wanted cases that are not done yet, until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--until", type=float, required=True, help="seconds since the epoch")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--done", type=Path, required=True, help="a JSON list of names that are not to be measured")
    options = parser.parse_args()
    if not (torch.cuda.is_available() or options.tiny):
        raise SystemExit("torch finds no CUDA card")
    scene = find_scene(options.tiny)
    tell("facts", **describe(scene))
    with interpreting(scene):
        cases = find_cases(scene, options.only)
    tell("plan", names=[case.name for case in cases])
    done = set(json.loads(options.done.read_text(encoding="utf-8")))
    for case in cases:
        if case.name in done:
            continue
        if time.time() + case.needs_s > options.until:
            tell("row", name=case.name, status="left out", note="no time was left")
        elif case.measure is None:
            tell("tests")
            sys.stdin.readline()  # wait until report.py has run the tests, which use the card
        else:
            tell("begin", name=case.name, limit_s=case.limit_s)
            if scene.is_card:
                torch.cuda.empty_cache()
            tell("row", name=case.name, **measure(case, scene))
    tell("end")


if __name__ == "__main__":
    main()
