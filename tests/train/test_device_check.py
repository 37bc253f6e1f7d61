"""A device that computes as the processor does passes; one that errs from some number of rows on is found and named."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lowvram.api
from lowvram.api.device_checking import check_device, describe_check, is_worth_a_check
from lowvram.api.tasks import Notice, Progress, finish
from lowvram.config.plan import Plan, choose_plan
from lowvram.config.run import RunConfig
from lowvram.errors import MachineError
from lowvram.model.linear import ParamOptions
from lowvram.model.transformer import Block
from lowvram.train import device_check as module
from lowvram.train.device_check import DeviceCheck, PartCheck, row_error
from lowvram.train.device_parts import Part, Setup, compute, list_parts
from lowvram.train.settings import RunSettings
from tests.tiny import KINDS, prepare_home, tiny_run

CPU = torch.device("cpu")
WINDOW = {"window": {"size": 8, "pattern": "SF"}}
MANY_EXPERTS = {"ffn": KINDS["mla-moe"]["ffn"] | {"experts": 64, "top_k": 4}}
MATRICES = ("aten::mm", "aten::addmm", "aten::_scaled_mm")


def run_of(kind: str = "gqa-rope", model: dict[str, Any] | None = None, **train: Any) -> RunConfig:
    """Return the configuration of a run whose shards are never opened."""
    what = tiny_run(Path("home"), kind, vocabulary=96, batch_tokens=1024, tokens=12 * 1024, **train)
    return RunConfig.model_validate(
        {**what.model_dump(), "model": {**what.model.model_dump(), **(model or {})}},
    )


def settings_of(what: RunConfig, micro_batch: int = 16, device: torch.device = CPU) -> RunSettings:
    return RunSettings(what, choose_plan(what.train, micro_batch)[0], device)


def check(what: RunConfig, micro_batch: int = 16, clock: Callable[[], float] | None = None) -> DeviceCheck:
    """Check the processor against itself, in the run's precision."""
    plan = choose_plan(what.train, micro_batch)[0]
    parts = module.check_device(what.model, what.train, plan, CPU, *([clock] if clock is not None else []))
    while True:
        try:
            next(parts)
        except StopIteration as end:
            return end.value


class FaultyDevice(TorchDispatchMode):
    """Computes some operations wrongly where a matrix has more than `limit` rows, by `spoil`, which gets what is right.

    inner: what counts is the length of the sums of a product, not its rows.
    """

    def __init__(self, limit: int, spoil: Callable[[Tensor, int], None], names: Any = MATRICES, inner: bool = False):
        super().__init__()
        self._limit, self._spoil, self._names, self._inner = limit, spoil, names, inner

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.name().split(".")[0] in self._names:
            rows = args[-1].shape[0] if self._inner else result.shape[0]
            if rows > self._limit:
                self._spoil(result, self._limit)
        return result


def scale_last(result: Tensor, limit: int) -> None:
    result[limit:] *= 1.5


def wrap_around(result: Tensor, limit: int) -> None:
    """Return rows that lie `limit`, a power of two, before those that were asked for."""
    for start in range(limit, result.shape[0], limit):
        result[start : start + limit] = result[: result.shape[0] - start][:limit]


def break_one(result: Tensor, limit: int) -> None:
    result[-1, 0] = torch.nan


def lose_terms(result: Tensor, limit: int) -> None:
    result *= 0.9


HONEST: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "windows and bf16 weights": ("gqa-rope", WINDOW, {"precision": "bf16", "weights": "bf16"}),
    "ALiBi in fp16": ("gqa-alibi", {"tied": False}, {"precision": "fp16"}),
    "many experts in bf16, some in a tie": ("mla-moe", MANY_EXPERTS, {"precision": "bf16", "seq_len": 256}),
    "experts that rotate, in fp8": ("mla-moe", {}, {"precision": "fp8", "rotation": {"window": 2, "interval": 2}}),
    "int8": ("gqa-rope", {}, {"precision": "int8"}),
    "fp32": ("mla-moe", {}, {"precision": "fp32"}),
}


@pytest.mark.parametrize("kind, model, train", HONEST.values(), ids=HONEST)
def test_an_honest_device_agrees_in_every_part(kind: str, model: dict[str, Any], train: dict[str, Any]) -> None:
    what = run_of(kind, model, **train)
    found = check(what, 512 // what.train.seq_len)
    assert [part.part for part in found.parts] == [part.name for part in list_parts(what.model)]
    assert (found.left_out, [part for part in found.parts if not part.agrees]) == ((), [])
    assert found.worst is not None
    assert 0.0 < found.worst.error < found.worst.tolerance / 2
    for part, checked in zip(list_parts(what.model)[2:], found.parts[2:], strict=True):
        block = Block(what.model, part.layer, ParamOptions(rotation=what.train.rotation))
        layer = block.attention if part.kind == "attention" else block.ffn
        assert checked.tensors == 3 + len(list(layer.parameters())), "stream, output, input, and every weight"


def test_every_kind_of_layer_is_a_part_once() -> None:
    names = [part.name for part in list_parts(run_of("mla-moe", WINDOW | {"layers": 5}).model)]
    assert names == [
        *("the embedding", "the head and its loss"),
        *("attention to the last 8 tokens", "the feed-forward layer", "attention", "the experts"),
    ]
    assert list_parts(run_of("gqa-rope").model)[2:] == (
        Part("attention", "attention", 0),
        Part("the feed-forward layer", "ffn", 0),
    )


# The processor computes two sequences of 32 tokens, so its own products have 64 rows at most.
FAULTS: dict[str, FaultyDevice] = {
    "rows beyond a limit are scaled": FaultyDevice(300, scale_last),
    "one number is NaN": FaultyDevice(300, break_one),
    "rows return after a power of two": FaultyDevice(128, wrap_around),
    "long sums lose a tenth": FaultyDevice(300, lose_terms, inner=True),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_device_that_errs_at_large_shapes_is_refused_with_a_micro_batch_that_is_right(
    fault: FaultyDevice, precision: str
) -> None:
    settings = settings_of(run_of(precision=precision))
    right = 8 if fault._limit == 300 else 4
    with fault, pytest.raises(MachineError) as raised:
        finish(check_device(settings))
    error = raised.value
    assert error.exit_code == 1
    assert error.what.startswith("This device (cpu) computes ")
    assert re.match(r"At the run's shape, (16 × 32 × 32|512 × 32), a row of its", error.why)
    assert error.fix.startswith(f"`micro_batch={right}` is computed rightly here: train with it.")
    assert "`device_check=False` trains all the same" in error.fix
    with fault:
        finish(check_device(settings_of(settings.config, right)))


def test_rows_that_return_after_a_power_of_two_are_found_in_every_layer() -> None:
    with FAULTS["rows return after a power of two"]:
        wrong = {part.part for part in check(run_of()).parts if not part.agrees}
    assert wrong == {"the head and its loss", "attention", "the feed-forward layer"}


def test_where_no_smaller_batch_is_right_the_processor_is_the_way_out() -> None:
    settings = settings_of(run_of())
    with FaultyDevice(0, scale_last, ("aten::embedding",)), pytest.raises(MachineError) as raised:
        finish(check_device(settings))
    assert "computes the embedding wrongly" in raised.value.what
    said = "At the run's shape, 16 × 32, a row of its output errs by 0.5 of its scale against the processor; rounding"
    assert f"{said} explains 0.005." in str(raised.value)
    assert raised.value.fix.startswith('Train on the processor with `device="cpu"`.')


def test_a_run_that_updates_during_backward_has_no_smaller_batch() -> None:
    what = run_of(update_during_backward=True)
    plan = Plan(micro_batch=32, accumulate=1)
    wrong = PartCheck("attention", "output", (32, 32, 32), 1.0, 0.005, 3)
    assert module.find_right_micro_batch([wrong], what.model, what.train, plan, CPU) is None


def test_an_attention_that_forgets_its_past_in_late_sequences_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowvram.model import attention

    honest = attention.attention

    def faulty(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Tensor:
        out = honest(q, k, v, *rest, **options)
        if q.shape[0] > 8:
            return torch.cat([out[:-1], v[-1:].repeat_interleave(q.shape[1] // v.shape[1], 1)])
        return out

    monkeypatch.setattr(attention, "attention", faulty)
    wrong = [part for part in check(run_of(precision="bf16")).parts if not part.agrees]
    assert [part.part for part in wrong] == ["attention"]


def test_a_fault_in_the_loss_alone_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowvram.train import device_parts

    honest = device_parts.linear_cross_entropy
    monkeypatch.setattr(device_parts, "linear_cross_entropy", lambda *given: honest(*given) * 1.02)
    (wrong,) = [part for part in check(run_of()).parts if not part.agrees]
    assert (wrong.part, wrong.shape) == ("the head and its loss", (512, 32))
    assert wrong.error == pytest.approx(0.02, rel=1e-3)


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_the_smallest_batches_are_checked_too(micro_batch: int) -> None:
    what = tiny_run(Path("home"), batch_tokens=192, tokens=1920)
    plan = Plan(micro_batch=micro_batch, accumulate=6 // micro_batch)
    for part in list_parts(what.model):
        names = {each.name for each in compute(part, Setup(what.model, what.train, plan, CPU))}
        assert any(name == "output" or name == "loss" for name in names)
        assert any(name.startswith("gradient of ") for name in names)
    assert all(part.agrees for part in check(what, micro_batch).parts)


def test_parts_that_time_or_memory_does_not_suffice_for_are_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 0.0, 20.0, 20.5, 32.0, 33.0])
    found = check(run_of(), clock=lambda: next(times))
    assert [part.part for part in found.parts] == ["the embedding", "the head and its loss"]
    assert found.left_out == ("attention", "the feed-forward layer")
    assert found.took_s == 33.0

    def short_of_memory(part: Part, setup: Setup) -> Any:
        if part.kind == "head":
            raise torch.OutOfMemoryError("out of memory")
        return compute(part, setup)

    monkeypatch.setattr(module, "compute", short_of_memory)
    _, notices = finish(check_device(settings_of(run_of())))
    assert notices[0].text.startswith("Device check: 3 parts agree with the processor (worst ")
    assert notices[1] == Notice(
        "Device check: the head and its loss were left out, since time or memory did not suffice.", "warning"
    )


def test_an_error_that_is_not_of_memory_comes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(part: Part, setup: Setup) -> Any:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(module, "compute", fail)
    with pytest.raises(RuntimeError, match="launch failure"):
        check(run_of())


def test_the_line_of_a_check_names_what_errs_most_by_its_tolerance() -> None:
    parts = tuple(
        PartCheck(name, "output", (1,), error, tolerance, 1)
        for name, error, tolerance in (("a", 0.4, 1.0), ("b", 0.0123, 0.02), ("c", 0.001, 0.02))
    )
    line = describe_check(DeviceCheck(parts, (), 4.2))
    assert line == "Device check: 3 parts agree with the processor (worst 0.012 of 0.02), 4 s."
    assert describe_check(DeviceCheck((), ("a",), 1.0)) == "Device check: nothing was compared."


def test_only_a_new_run_elsewhere_than_on_the_processor_is_checked_unasked() -> None:
    what = run_of()
    for device in ("mps", "cuda"):
        assert is_worth_a_check(settings_of(what, device=torch.device(device)))
        kept = RunSettings(what, choose_plan(what.train)[0], torch.device(device), is_kept=True)
        assert not is_worth_a_check(kept)
    assert not is_worth_a_check(settings_of(what))


def test_the_run_is_checked_before_anything_is_written_and_refused_or_told_in_one_line(tmp_path: Path) -> None:
    prepare_home(tmp_path)
    what = tiny_run(tmp_path)
    with (
        FaultyDevice(200, scale_last),
        pytest.raises(MachineError, match=r"computes .* wrongly, so nothing was trained"),
    ):
        lowvram.api.train(what, device="cpu", micro_batch=8, device_check=True)
    assert {path.name for path in (tmp_path / "run").glob("*.json*")} <= {"status.json"}
    for asked, told in ((True, 1), (None, 0), (False, 0)):
        with lowvram.api.train(what, device="cpu", device_check=asked) as run:
            lines = [notice.text for notice in run.notices if notice.text.startswith("Device check: 4 parts agree")]
            assert len(lines) == told


def test_progress_counts_the_parts() -> None:
    events = list(check_device(settings_of(run_of())))
    told = [(event.done, event.total, event.detail) for event in events if isinstance(event, Progress)]
    assert told == [
        (0, 4, ""),
        (0, 4, "the embedding"),
        (1, 4, "the head and its loss"),
        (2, 4, "attention"),
        (3, 4, "the feed-forward layer"),
    ]


def test_a_rows_error_is_a_part_of_its_own_scale_or_of_the_tensors() -> None:
    expected = torch.tensor([[100.0, 100.0], [1.0, 1.0], [0.0, 0.0]])
    found = expected + torch.tensor([[10.0, 10.0], [0.0, 0.0], [0.0, 0.0]])
    assert row_error(found, expected, 2.0) == pytest.approx(0.1)
    found = expected + torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    assert row_error(found, expected, 2.0) == pytest.approx(0.5)
    assert row_error(torch.tensor([[torch.nan]]), torch.ones(1, 1), 1.0) == torch.inf
    assert row_error(torch.zeros(1, 1), torch.zeros(1, 1), 0.0) == 0.0
    assert row_error(torch.ones(1, 1), torch.zeros(1, 1), 0.0) > 1e20
