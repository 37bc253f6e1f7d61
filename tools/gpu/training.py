"""The training steps of the GPU report: presets within the memory of a consumer card, eager and compiled.

The step is lowvram's own, on random tokens: gradients of micro-batches, reading loss and norm, the update.  Torch's
allocator is limited to what the consumer card leaves for tensors, and the plan is the one that `lowvram fit` chooses
for this card within that limit.  Of a step with many micro-batches only some are timed, and the update separately.
"""

from __future__ import annotations

import functools
import statistics
import time
from dataclasses import dataclass

import torch
from lowvram_kernels.dispatch import card_of

from lowvram.api.rehearsals import memory_curve_of_run
from lowvram.api.target import detect_target_of
from lowvram.config.model import ModelConfig
from lowvram.config.plan import Plan
from lowvram.config.run_file import load_preset
from lowvram.config.train import LOW_PRECISIONS, TrainConfig
from lowvram.errors import MachineError
from lowvram.fit.ledgers import find_memory_curve, path_of
from lowvram.fit.memory_curve import Rehearsal
from lowvram.fit.rehearse import rehearse
from lowvram.fit.report import FitReport, MemoryBudget, evaluate_fit
from lowvram.hardware.profile import load_profile
from lowvram.objective import Batch
from lowvram.train.compilation import compiled, forget_compiled
from lowvram.train.cuda_graph import CapturedPass
from lowvram.train.oom import cap_memory, free_memory
from lowvram.train.state import build_state
from lowvram.train.step import Add, add_gradients, discard, gradients, loss_for, update
from tools.gpu.kernel import Aim, Row, Scene, first_line

LEAST_REPEATS, MOST_REPEATS = 3, 7
BUDGET_S = 3.0  # for the timed steps of one mode
_TIMED_S = 0.6  # for the micro-batches that represent a whole step's
_RATE = 1e-4
_TINY = (
    "model.layers=4",
    "model.dim=32",
    "model.vocabulary=256",
    "train.seq_len=16",
    "train.batch_tokens=64",
    "train.precision=fp32",
)


@dataclass(frozen=True, kw_only=True)
class Training:
    """One preset to train.  sets: changed values.  gpu: the card whose memory limits the run.  rank: 0 comes first."""

    preset: str
    sets: tuple[str, ...] = ()
    gpu: str = "rtx5070"
    aims: tuple[Aim, ...] = ()
    rank: int = 1

    @property
    def name(self) -> str:
        """Return preset, changes and card, which --only searches."""
        changes = "".join(f" {change.removeprefix('train.')}" for change in self.sets)
        return f"train {self.preset}{changes} in {self.gpu}"

    def measure(self, scene: Scene) -> Row:
        """Choose the plan, rehearse it and time its steps."""
        model, train = load_preset(self.preset, (*(_TINY if scene.is_tiny else ()), *self.sets))
        limit_bytes = load_profile(self.gpu).limit_bytes()
        report = self._judge(model, train, scene, limit_bytes)
        plan = report.search_result.plan
        rehearsal = rehearse(model, train, plan, card_of(scene.device))
        row: Row = {
            "kind": "training",
            "preset": self.preset,
            "sets": list(self.sets),
            "gpu": self.gpu,
            "limit_bytes": limit_bytes,
            "plan": plan.model_dump(mode="json"),
            "why": report.search_result.reason,
            "batch_tokens": train.batch_tokens,
            "parameters": model.num_parameters(),
            "operations": _operations(rehearsal, plan),
            "ledger_bytes": rehearsal.ledger.peak_bytes,
            "aims": [] if scene.is_tiny else [aim._asdict() for aim in self.aims],
        }
        if rehearsal.ledger.peak_bytes > limit_bytes:
            return row | {"status": "left out", "note": f"no plan fits into {self.gpu}: {report.search_result.reason}"}
        if scene.is_card:
            forget_compiled()
        free_memory(scene.device)
        cap_memory(scene.device, load_profile(self.gpu).allocator_bytes(limit_bytes))
        try:
            return row | _time_modes(model, train, plan, scene)
        finally:
            if scene.is_card:
                torch.cuda.set_per_process_memory_fraction(1.0, scene.device)
            free_memory(scene.device)

    def _judge(self, model: ModelConfig, train: TrainConfig, scene: Scene, limit_bytes: int) -> FitReport:
        """Choose a plan as `fit` does.  An 8-bit run takes the 16-bit run's, so that the two can be compared."""
        here = detect_target_of(scene.device).profile
        train = train.model_copy(update={"precision": "bf16"}) if train.precision in LOW_PRECISIONS else train
        sketch = find_memory_curve(self.preset, model, train, path_of(here, train)) or memory_curve_of_run(
            model, train, here
        )
        return evaluate_fit(self.name, model, train, sketch, MemoryBudget(here, limit_bytes, limit_bytes))


def trainings(scene: Scene) -> list[Training]:
    """Return all presets that are timed, those of rank 0 first; with is_tiny only one of each kind."""
    fp8, int8 = ("train.precision=fp8",), ("train.precision=int8",)
    first = [
        Training(preset="tiny-llm-v1", aims=_aim(1.2e6), rank=0),
        Training(preset="ismail-512", aims=_aim(250e3), rank=0),
    ]
    if scene.is_tiny:
        return [*first, Training(preset="tr-25m", sets=fp8)]
    return [
        first[0],
        Training(preset="tiny-llm-v1", sets=("train.seq_len=2048",), aims=_aim(0.9e6), rank=0),
        first[1],
        Training(preset="tr-1b", gpu="rtx4060", rank=0),
        Training(preset="tr-1b", sets=fp8, gpu="rtx4060"),
        Training(preset="tr-125m"),
        Training(preset="tr-600m-moe"),
        Training(preset="tr-1b", sets=int8, gpu="rtx4060"),
        Training(preset="tr-25m", gpu="rtx4060"),
        Training(preset="tr-125m", sets=fp8, rank=2),
        Training(preset="tiny-llm-v1", gpu="rtx4060", rank=2),
        Training(preset="ismail-512", gpu="rtx4060", rank=2),
        Training(preset="tr-350m", gpu="rtx4060", rank=2),
    ]


def _aim(tokens_per_second: float) -> tuple[Aim, ...]:
    return (Aim("tokens_per_second", tokens_per_second),)


def _operations(rehearsal: Rehearsal, plan: Plan) -> float:
    """Return the operations of a whole step, as the rehearsal counts them, recomputation included."""
    parts = [rehearsal.micro] * plan.accumulate + [rehearsal.update]
    return sum(part.flops + part.attention_flops + part.low_flops + part.grouped_flops for part in parts)


class _Steps:
    """A real model on the device, and its steps.  timed: the number of micro-batches that represent a whole step."""

    def __init__(self, model: ModelConfig, train: TrainConfig, plan: Plan, device: torch.device) -> None:
        state = build_state(model, train, plan, device, train.seed)
        self.network, self.optimizer = state.model, state.optimizer
        self._loss_of, self._train, self._plan = loss_for(state.model, train, plan), train, plan
        shape = (train.batch_samples, train.seq_len + 1)
        self._token_BT = torch.randint(0, model.vocabulary, shape, device=device)
        self._sample_B = torch.arange(shape[0], device=device)
        self.timed = min(2, plan.accumulate)
        self.losses: list[float] = []
        self._add: Add | None = None

    def record(self) -> None:
        """Record the passes as CUDA graphs, and replay these from now on."""
        batch = Batch(*(part[: self._plan.micro_batch] for part in (self._token_BT, self._sample_B)))
        add = functools.partial(add_gradients, self.network, self._loss_of, self._train.seed)
        self._add = CapturedPass(self.network, add, batch, self._plan.accumulate > 1).add

    def launch(self) -> None:
        """Launch every kernel from Python again, without CUDA graphs."""
        self._add = None

    def learn(self) -> tuple[float, float]:
        """Run a step of the timed micro-batches; returns the seconds of its gradients and of its update."""
        size = self._plan.micro_batch
        parts = [slice(start * size, (start + 1) * size) for start in range(self.timed)]
        batches = [Batch(self._token_BT[part], self._sample_B[part]) for part in parts]
        began = time.perf_counter()
        targets = self.timed * size * self._train.seq_len
        result = gradients(self.network, self._loss_of, batches, targets, 1.0, self._train.seed, self._add)
        loss, norm, _ = result.stats.tolist()  # waits for the device, as the trainer does
        gradients_end = time.perf_counter()
        self.losses.append(loss)
        update(self.network, self.optimizer, result.loads, _RATE, min(1.0, self._train.clip / (norm + 1e-6)))
        _wait(self._token_BT.device)
        return gradients_end - began, time.perf_counter() - gradients_end


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _time_modes(model: ModelConfig, train: TrainConfig, plan: Plan, scene: Scene) -> Row:
    """Time eager steps, then CUDA-graph and compiled ones of the same model; on a processor only eager ones."""
    held_bytes = torch.cuda.memory_allocated(scene.device) if scene.is_card else 0
    steps = _Steps(model, train, plan, scene.device)
    modes = {"eager": _time_mode(steps, plan, train, scene, held_bytes)}
    notes: list[str] = []
    if scene.is_card:
        modes |= _time_played("played", steps, plan, train, scene, held_bytes, notes)
        try:
            with compiled(steps.network):
                modes["compiled"] = _time_mode(steps, plan, train, scene, held_bytes)
                modes |= _time_played("compiled and played", steps, plan, train, scene, held_bytes, notes)
        except MachineError as error:
            notes.append(f"not compiled: {error.why}")
        except torch.OutOfMemoryError as error:
            notes.append(f"not compiled within this memory: {first_line(error)}")
    is_finite = all(abs(loss) < float("inf") for loss in steps.losses)
    return {
        "modes": modes,
        "tokens_per_second": max(mode["tokens_per_second"] for mode in modes.values()),
        "losses": [steps.losses[0], steps.losses[-1]],
        "status": "ok" if is_finite else "wrong",
        "note": "; ".join(notes if is_finite else ["a loss is not finite", *notes]),
    }


def _time_played(
    name: str, steps: _Steps, plan: Plan, train: TrainConfig, scene: Scene, held_bytes: int, notes: list[str]
) -> dict[str, Row]:
    """Time steps whose passes are replayed from CUDA graphs; their peak is what the allocator has reserved then."""
    discard(steps.optimizer)
    free_memory(scene.device)
    modes = {}
    try:
        steps.record()
        modes[name] = _time_mode(steps, plan, train, scene, held_bytes)
        modes[name]["peak_bytes"] = torch.cuda.memory_reserved(scene.device) - held_bytes
    except RuntimeError as error:
        notes.append(f"not {name}: {first_line(error)}")
    steps.launch()
    discard(steps.optimizer)
    free_memory(scene.device)
    return modes


def _time_mode(steps: _Steps, plan: Plan, train: TrainConfig, scene: Scene, held_bytes: int) -> Row:
    began = time.perf_counter()
    steps.learn()  # compiles, or makes the optimizer's states
    first_s = time.perf_counter() - began
    steps.learn()
    gradients_s, _ = steps.learn()
    micro_s = gradients_s / steps.timed
    steps.timed = min(plan.accumulate, max(min(2, plan.accumulate), round(_TIMED_S / micro_s)))
    if scene.is_card:
        torch.cuda.reset_peak_memory_stats(scene.device)
    began, taken = time.perf_counter(), [steps.learn() for _ in range(LEAST_REPEATS)]
    while len(taken) < MOST_REPEATS and time.perf_counter() - began < BUDGET_S:
        taken.append(steps.learn())
    gradients_s, update_s = (statistics.median(part) for part in zip(*taken, strict=True))
    step_s = gradients_s * plan.accumulate / steps.timed + update_s
    return {
        "step_seconds": step_s,
        "update_seconds": update_s,
        "tokens_per_second": train.batch_tokens / step_s,
        "peak_bytes": torch.cuda.max_memory_allocated(scene.device) - held_bytes if scene.is_card else None,
        "reserved_bytes": torch.cuda.max_memory_reserved(scene.device) if scene.is_card else None,
        "micro_batches_timed": steps.timed,
        "repeats": len(taken),
        "first_seconds": first_s,
    }
