"""A compiled kernel is launched without Triton's own way, with the same arguments; a stand-in is its driver."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from lowvram_kernels import compiled_launch


class Kernel:
    """What Triton's function is to a launch: it compiles once for each way in which arguments are specialised."""

    def __init__(self) -> None:
        self.pre_run_hooks: list[Any] = []
        self.device_caches = {0: ("other", "things", self.bind)}
        self.own_way: list[tuple[Any, ...]] = []
        self.short_way: list[tuple[Any, ...]] = []

    def bind(self, pointer: str, count: int, *, ROWS: int, **options: Any) -> Any:
        specialised = ["*fp32", ("i32", "D" if count % 16 == 0 else ""), ("constexpr", ROWS)]
        return {"pointer": pointer, "count": count, "ROWS": ROWS}, specialised, options

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **constants: Any) -> Any:
            self.own_way.append((grid, arguments, constants))
            return SimpleNamespace(function="f", packed_metadata="m", run=lambda *given: self.short_way.append(given))

        return launch


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel()
    driver = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda _: 77)
    hooks = SimpleNamespace(launch_enter_hook=SimpleNamespace(calls=[]), launch_exit_hook=None)
    stand_in = SimpleNamespace(
        runtime=SimpleNamespace(driver=SimpleNamespace(active=driver)), knobs=SimpleNamespace(runtime=hooks)
    )
    monkeypatch.setattr(compiled_launch, "_triton", stand_in)
    monkeypatch.setattr(compiled_launch, "_kernels", {})
    monkeypatch.setattr(compiled_launch, "_is_short", True)
    monkeypatch.setattr(compiled_launch, "_load", lambda module, name: kernel)
    return kernel


def start(count: int, rows: int = 4, grid: tuple[int, ...] = (5,), **options: Any) -> None:
    compiled_launch.start("room.file_triton", "a_kernel", grid, ("x", count), {"ROWS": rows, **options}, 8, 2)


def test_the_first_launch_takes_tritons_way_and_the_next_ones_what_it_compiled(kernel: Kernel) -> None:
    for count in (32, 48, 64):
        start(count, grid=(5, count))
    assert kernel.own_way == [((5, 32), ("x", 32), {"ROWS": 4, "num_warps": 8, "num_stages": 2})]
    launched = [(5, count, 1, 77, "f", "m", None, None, None, "x", count, 4) for count in (48, 64)]
    assert kernel.short_way == launched


def test_another_specialisation_constant_or_option_is_compiled_anew(kernel: Kernel) -> None:
    for _ in range(2):
        start(32)
        start(33)
        start(32, rows=8)
        start(32, enable_fp_fusion=False)
    assert [len(kernel.own_way), len(kernel.short_way)] == [4, 4]


def test_a_profiler_is_told_of_every_launch(kernel: Kernel) -> None:
    start(32)
    compiled_launch._triton.knobs.runtime.launch_enter_hook.calls.append(print)
    start(32)
    compiled_launch._triton.knobs.runtime.launch_enter_hook = None
    kernel.pre_run_hooks.append(print)
    start(32)
    assert [len(kernel.own_way), len(kernel.short_way)] == [3, 0]


def test_the_interpreters_functions_are_called_as_they_are(kernel: Kernel) -> None:
    del kernel.device_caches
    for _ in range(2):
        start(32)
    assert [len(kernel.own_way), len(kernel.short_way)] == [2, 0]


def test_with_another_triton_inside_its_own_way_is_taken_from_then_on(kernel: Kernel) -> None:
    kernel.device_caches = {0: ("one", "that", "cannot be called")}
    for _ in range(3):
        start(32)
    assert [len(kernel.own_way), len(kernel.short_way)] == [3, 0]
    assert not compiled_launch._is_short
