"""Does a device compute the parts of a model as the processor does, at the shapes of the run; knows no trainer."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowvram.config.model import ModelConfig
from lowvram.config.plan import Plan
from lowvram.config.train import TrainConfig
from lowvram.errors import MachineError, argument
from lowvram.train.device_parts import Part, Setup, compute, list_parts, shape_of
from lowvram.train.oom import free_memory, halve, is_out_of_memory

# Seconds after which no further part is begun; a check should take half a minute at most.
MOST_S = 20.0
# The greatest error of a row (see `row_error`) by the run's precision: three to four times the worst that rounding was
# measured to make in the layers of the presets, on a processor (bf16 0.013, fp16 0.0012, fp8 0.17, int8 0.05).  A layer
# has some four products with a rounding between them, to 2⁻⁹ of a number in bf16, 2⁻¹² in fp16, 2⁻⁵ in E4M3, to 1/254
# of a row's greatest in INT8.  In fp32 (0.00002) a library may choose TF32, which rounds operands to 2⁻¹².  A row of
# wrong numbers errs by 1 or more.
TOLERANCES = {"fp32": 0.005, "bf16": 0.05, "fp16": 0.005, "fp8": 0.5, "int8": 0.2}


@dataclass(frozen=True)
class PartCheck:
    """What was compared of a part, and where it errs most.

    tensor: the output or gradient whose row errs most.  shape: of the part's input on the device.  error: see
    `row_error`; infinite where a number is not finite.  tensors: how many were compared.
    """

    part: str
    tensor: str
    shape: tuple[int, ...]
    error: float
    tolerance: float
    tensors: int

    @property
    def agrees(self) -> bool:
        """Say whether the device computes as the processor does."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class DeviceCheck:
    """A device's check.  left_out: parts that time or memory did not suffice for.  took_s: seconds."""

    parts: tuple[PartCheck, ...]
    left_out: tuple[str, ...]
    took_s: float

    @property
    def worst(self) -> PartCheck | None:
        """The part that errs most, measured by its tolerance; None where nothing was compared."""
        return max(self.parts, key=lambda check: check.error / check.tolerance, default=None)


def check_device(
    model: ModelConfig,
    train: TrainConfig,
    plan: Plan,
    device: torch.device,
    clock: Callable[[], float] = time.monotonic,
) -> Generator[Part, None, DeviceCheck]:
    """Compute each part on the device and on the processor; yields each part before it begins.

    Takes the memory of one layer of the plan at a time.  Parts that memory does not suffice for, or that would begin
    after `MOST_S`, are left out.
    """
    began, checks, left_out = clock(), list[PartCheck](), list[str]()
    for part in list_parts(model):
        if clock() - began > MOST_S:
            left_out.append(part.name)
            continue
        yield part
        check = _try_part(part, Setup(model, train, plan, device))
        if check is None:
            left_out.append(part.name)
        else:
            checks.append(check)
    free_memory(device)
    return DeviceCheck(tuple(checks), tuple(left_out), clock() - began)


def find_right_micro_batch(
    wrong: Iterable[PartCheck], model: ModelConfig, train: TrainConfig, plan: Plan, device: torch.device
) -> int | None:
    """Return the largest micro-batch, of those that halving reaches, at which parts that were wrong are right."""
    names = {check.part for check in wrong}
    parts = [part for part in list_parts(model) if part.name in names]
    smaller = halve(plan) if not train.update_during_backward else None
    while smaller is not None:
        setup = Setup(model, train, smaller, device)
        if all(check is not None and check.agrees for check in (_try_part(part, setup) for part in parts)):
            return smaller.micro_batch
        smaller = halve(smaller)
    return None


def explain_wrong_device(check: DeviceCheck, device: torch.device, right_micro_batch: int | None) -> MachineError:
    """Return the error of a device that computes wrongly.  right_micro_batch: one at which it does not, if any."""
    wrong = [part for part in check.parts if not part.agrees]
    worst = max(wrong, key=lambda part: part.error / part.tolerance)
    others = f" ({len(wrong)} of {len(check.parts)} parts are wrong)" if len(wrong) > 1 else ""
    shape = " × ".join(f"{size:,}" for size in worst.shape)
    if right_micro_batch is not None:
        first = f"{argument('micro_batch', right_micro_batch)} is computed rightly here: train with it."
    else:
        first = f"Train on the processor with {argument('device', 'cpu')}."
    return MachineError(
        f"This device ({device.type}) computes {worst.part} wrongly, so nothing was trained{others}.",
        f"At the run's shape, {shape}, a row of its {worst.tensor} errs by {worst.error:.3g} of its scale against the "
        f"processor; rounding explains {worst.tolerance:g}.",
        f"{first} A newer torch (here {torch.__version__}) or driver may repair it; "
        f"{argument('device_check', False)} trains all the same.",
    )


def row_error(found: Tensor, expected: Tensor, scale: float) -> float:
    """Return the greatest root-mean-square error of a row, as a part of the row's own or of `scale`, if that is larger.

    found, expected: [rows, columns].  Infinite where a number is not finite.
    """
    error_R = (found.float() - expected).square().mean(-1).sqrt()
    norm_R = expected.square().mean(-1).sqrt().clamp(min=max(scale, 1e-30))
    return float((error_R / norm_R).nan_to_num(torch.inf, torch.inf).max())


def _try_part(part: Part, setup: Setup) -> PartCheck | None:
    """Check a part; return None where memory runs out, and free what the attempt has left."""
    try:
        return _check_part(part, setup)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    free_memory(setup.device)
    return None


def _check_part(part: Part, setup: Setup) -> PartCheck:
    worst, name, names = -1.0, "", set[str]()
    for each in compute(part, setup):
        error = row_error(each.found.cpu(), each.expected, each.scale)
        names.add(each.name)
        if error > worst:
            worst, name = error, each.name
    return PartCheck(part.name, name, shape_of(part, setup), worst, TOLERANCES[setup.train.precision], len(names))
