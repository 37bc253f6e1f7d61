"""The GPU report's cases: what they declare is what the kernels tell of themselves, a wrong one is not timed."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lowvram_kernels.dispatch import HiddenWork, Launch, is_interpreted, simulate_card
from torch import Tensor
from torch.utils._pytree import tree_map

from lowvram.config.plan import Ledger, Plan
from lowvram.config.run_file import preset_names
from lowvram.fit.memory_curve import Rehearsal, Work
from lowvram.hardware.profile import load_profile

pytest.importorskip("triton", reason="Triton is not installed")
from tools.gpu import timing as gpu_timing
from tools.gpu import training as gpu_training
from tools.gpu import worker as gpu_worker
from tools.gpu.cases import kernels
from tools.gpu.kernel import Kernel, Rival, Scene, change_error, error_of, first_line
from tools.gpu.timing import count_sets, distance, time_runs
from tools.gpu.training import Training, trainings
from tools.gpu.worker import INTERPRETED, find_cases, interpreting, measure

PACKAGE = Path(__file__).parents[2] / "kernels/lowvram_kernels"
CPU = torch.device("cpu")
TINY = Scene(CPU, True, torch.float16)
FULL = Scene(CPU, False, torch.float16)
# Libraries of device code that other kernels call.
CALLED = {"quant.e4m3_triton", "random.counter_rng_triton"}


interpreted = pytest.mark.skipif(not is_interpreted(), reason="a processor's tensors need Triton's interpreter")
each_kernel = pytest.mark.parametrize("kernel", kernels(TINY), ids=lambda kernel: kernel.name)


def simulated_work(kernel: Kernel) -> tuple[HiddenWork, list[Launch]]:
    """Return the work of the launches that a run makes, and the launches."""
    with interpreting(TINY):
        inputs = kernel.inputs()
    inputs = tree_map(lambda value: value.to("meta") if isinstance(value, Tensor) else value, inputs)
    works: list[HiddenWork] = []
    launches: list[Launch] = []
    with simulate_card(INTERPRETED, works.append, note_launch=launches.append):
        kernel.run(*inputs)
    return HiddenWork(*(sum(values) for values in zip(*works, strict=True))), launches


@interpreted
@each_kernel
def test_what_a_case_declares_is_what_its_launches_do(kernel: Kernel) -> None:
    if kernel.op in ("attention", "linear_cross_entropy", "muon_"):
        return  # whose products are the library's
    work, launches = simulated_work(kernel)
    assert launches
    if kernel.operations and kernel.op != "latent_attention":
        assert work.product_flops + work.grouped_flops + work.low_flops == pytest.approx(kernel.operations)
        is_low = any(launch.expected_mma in ("e4m3", "s8", "mxf8") for launch in launches)
        assert is_low <= (kernel.numbers != "bf16")
    # The least, without scales: launches tell of those too, of partial sums and of a second reading.
    assert 0.5 * work.moved_bytes <= kernel.moved_bytes <= 1.02 * work.moved_bytes


@interpreted
def test_every_file_of_device_code_has_a_case() -> None:
    launched = {launch.module for kernel in kernels(TINY) for launch in simulated_work(kernel)[1]}
    assert launched | CALLED == {f"{path.parent.name}.{path.stem}" for path in PACKAGE.rglob("*_triton.py")}


def test_cases_have_names_of_their_own_and_the_most_important_come_first() -> None:
    names = [case.name for case in find_cases(TINY, [])]
    assert len(set(names)) == len(names)
    assert names[:2] == ["rate copy", "rate bf16"]
    ranks = [kernel.rank for kernel in kernels(FULL)]
    assert ranks == sorted(ranks)
    full = [kernel.name for kernel in kernels(FULL)]
    assert len(set(full)) == len(full)
    assert {name.split()[0] for name in full} == {name.split()[0] for name in (k.name for k in kernels(TINY))}


def test_only_takes_parts_of_names_and_always_the_rates() -> None:
    names = [case.name for case in find_cases(TINY, ["adamw8_", "tests"])]
    assert names[:2] == ["rate copy", "rate bf16"]
    assert set(names[2:]) == {"adamw8_ bf16 2,560", "adamw8_ fp32 2,560", "tests"}


def test_the_aims_that_were_set_stand_with_their_cases() -> None:
    found = {(k.op, aim.of, aim.least) for k in kernels(FULL) for aim in k.aims}
    assert {(op, least) for op, of, least in found if of == "copy"} == {
        ("quantise_rows", 0.8),
        ("quantise_columns", 0.8),
        ("quantise_weight", 0.8),
        ("quantise_both_ways", 0.8),
        ("quantise_both_ways", 0.5),
        ("small_matmul", 0.75),
        ("latent_attention", 0.45),
        *(
            (op, 0.8)
            for op in ("rms_norm", "rms_norm_backward", "rotate", "rotate_and_back", "swiglu", "swiglu_backward")
        ),
        *((op, 0.8) for op in ("mla_heads", "mla_heads_and_back", "widened_heads", "widened_heads_and_back")),
        *((op, 0.8) for op in ("rms_norm_codes", "normed_columns", "swiglu_codes", "swiglu_backward_codes")),
        *((op, 0.8) for op in ("combine", "weighted_swiglu", "weighted_swiglu_backward")),
    }
    assert ("scaled_matmul", "cuBLAS bf16", 1.0) in found
    assert ("scaled_matmul", "_scaled_mm by block", 0.75) in found
    assert ("grouped_matmul", "one dense cuBLAS bf16 product", 0.9) in found
    rates = {t.name: t.aims[0].least for t in trainings(FULL) if t.aims}
    assert sorted(rates.values()) == [250e3, 0.9e6, 1.2e6]


def double(x: Tensor) -> Tensor:
    return x * 2


def kernel_of(**others: Any) -> Kernel:
    settings = {"op": "double", "shape": "3", "inputs": lambda: (torch.arange(3.0),), "run": double}
    settings |= {"error": error_of(double, double), "tolerance": 1e-6, "moved_bytes": 24.0}
    return Kernel(**(settings | others))


def test_a_right_kernel_is_timed_with_its_rivals_and_one_that_refuses_says_why() -> None:
    def refuse(x: Tensor) -> Tensor:
        raise NotImplementedError("only for other cards\nmore")

    inputs = kernel_of().inputs
    row = kernel_of(rivals=(Rival("same", inputs, double), Rival("none", inputs, refuse))).measure(TINY)
    assert row["status"] == "ok"
    assert 0 < row["low"] <= row["seconds"] <= row["high"]
    assert row["rivals"][0]["seconds"] > 0
    assert row["rivals"][1] == {"name": "none", "note": "NotImplementedError: only for other cards"}


@pytest.mark.parametrize("off", [1.01, math.nan, math.inf])
def test_a_wrong_kernel_is_reported_and_not_timed(off: float) -> None:
    row = kernel_of(error=error_of(double, lambda x: x * 2 * off), run=lambda x: pytest.fail("timed")).measure(TINY)
    assert row["status"] == "wrong"
    assert "seconds" not in row


def test_an_op_in_place_is_held_against_its_plain_form_on_equal_inputs() -> None:
    def grow(x: Tensor, by: tuple[Tensor, None]) -> None:
        x.add_(by[0])

    error = change_error(grow, lambda x, by: [x])
    assert error(torch.ones(3), (torch.ones(3), None)) == 0.0
    calls: Iterator[float] = iter([1.0, 2.0])
    assert change_error(lambda x: x.add_(next(calls)), lambda x: [x])(torch.zeros(2)) == pytest.approx(0.5)


def test_a_case_that_refuses_is_failed_and_others_go_on() -> None:
    def run(scene: Scene) -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    row = measure(gpu_worker.Case("train it", run, 1.0, 1.0), TINY)
    assert row == {"status": "failed", "note": "OutOfMemoryError: CUDA out of memory"}
    assert first_line(KeyError()) == "KeyError: "


def test_distance_is_relative_and_what_is_not_finite_must_be_so_in_both() -> None:
    truth = torch.tensor([3.0, 4.0])
    assert distance(truth, truth) == 0.0
    assert distance(torch.tensor([3.0, 4.5]), truth) == pytest.approx(0.1)
    assert distance(torch.tensor([3.0, math.nan]), truth) == math.inf
    assert distance(torch.tensor([3.0, math.nan]), torch.tensor([3.0, math.nan])) == 0.0
    assert distance(torch.zeros(2), torch.zeros(2)) == 0.0


class Card:
    """Stands in for torch.cuda: a queue in which each call takes 2 ms of the card and almost none of the host."""

    L2_cache_size = 50 * 2**20
    now = 0.0
    waits: list[int]

    def __init__(self) -> None:
        self.waits = []

    def Event(self, enable_timing: bool) -> Event:
        return Event(self)

    def synchronize(self) -> None:
        time.sleep(0.001)

    def _sleep(self, cycles: int) -> None:
        self.waits.append(cycles)
        self.now += 1.0  # a wait in front of an event is not timed

    def get_device_properties(self, device: torch.device) -> Card:
        return self


class Event:
    def __init__(self, card: Card) -> None:
        self.card, self.at = card, 0.0

    def record(self) -> None:
        self.at = self.card.now

    def synchronize(self) -> None:
        assert self.at

    def elapsed_time(self, later: Event) -> float:
        return 1e3 * (later.at - self.at)


def test_on_a_card_events_time_each_call_and_inputs_rotate(monkeypatch: pytest.MonkeyPatch) -> None:
    card, order = Card(), []
    monkeypatch.setattr(gpu_timing.torch, "cuda", card)

    def run(number: int) -> Tensor:
        order.append(number)
        card.now += 2e-3
        return torch.zeros(1)

    timing = time_runs([lambda n=n: run(n) for n in range(4)], torch.device("cuda"))
    assert timing.seconds == pytest.approx(2e-3)
    assert timing.low == pytest.approx(timing.high)
    assert timing.samples == len(card.waits) >= gpu_timing.LEAST_SAMPLES
    assert order == [index % 4 for index in range(len(order))]
    assert all(cycles > 0 for cycles in card.waits)


def test_inputs_are_so_many_that_the_cache_holds_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_timing.torch, "cuda", Card())
    for moved_bytes in (2.0**20, 2.0**24, 2.0**30):
        assert count_sets(moved_bytes, torch.device("cuda")) * moved_bytes >= 4 * Card.L2_cache_size
    assert count_sets(1.0, torch.device("cuda")) == gpu_timing.MOST_SETS
    assert count_sets(2.0**40, torch.device("cuda")) == 2


def test_presets_that_are_timed_exist_and_so_do_the_cards_whose_memory_they_get() -> None:
    for training in trainings(FULL):
        assert training.preset in preset_names()
        assert load_profile(training.gpu).limit_bytes() > 0
    assert [t.preset for t in trainings(FULL) if t.rank == 0] == ["tiny-llm-v1", "tiny-llm-v1", "ismail-512", "tr-1b"]


def test_a_steps_operations_are_those_of_all_its_micro_batches_and_the_update() -> None:
    ledger = Ledger(0, 0, 0, 0, 0, 0, "forward")
    rehearsal = Rehearsal(ledger, Work(10.0, 1.0, 1.0, 5.0, 0.0, 2.0), Work(7.0, 1.0, 1.0))
    assert gpu_training._operations(rehearsal, Plan(micro_batch=2, accumulate=3)) == 3 * 17.0 + 7.0


@pytest.mark.parametrize("preset", ["tiny-llm-v1", "ismail-512"])
def test_steps_are_timed_within_a_smaller_cards_memory(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_training, "BUDGET_S", 0.0)
    monkeypatch.setattr(gpu_training, "_TIMED_S", 0.0)
    training = Training(preset=preset, gpu="rtx4060")
    row = training.measure(TINY)
    assert row["status"] == "ok"
    assert row["limit_bytes"] == load_profile("rtx4060").limit_bytes() > row["ledger_bytes"]
    eager = row["modes"]["eager"]
    assert row["tokens_per_second"] == eager["tokens_per_second"]
    assert eager["tokens_per_second"] * eager["step_seconds"] == pytest.approx(row["batch_tokens"])
    assert eager["repeats"] == gpu_training.LEAST_REPEATS
    assert row["losses"][0] == pytest.approx(math.log(256), rel=0.2)
    assert row["losses"][-1] < row["losses"][0]


def test_what_does_not_fit_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    small = load_profile("rtx4060").model_copy(update={"memory_bytes": 575 * 2**20})
    monkeypatch.setattr(gpu_training, "load_profile", lambda name: small)
    row = Training(preset="tiny-llm-v1").measure(TINY)
    assert row["status"] == "left out"
    assert row["note"].startswith("no plan fits into rtx5070: this is the smallest plan")


def test_a_training_is_named_by_preset_changes_and_card() -> None:
    training = Training(preset="tr-1b", sets=("train.precision=fp8",), gpu="rtx4060")
    assert training.name == "train tr-1b precision=fp8 in rtx4060"
    assert dataclasses.replace(training, sets=()).name == "train tr-1b in rtx4060"
