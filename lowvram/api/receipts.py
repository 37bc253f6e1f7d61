"""The receipt of a run on a card: kept while it trains, and read afterwards; prints nothing."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import lowvram
from lowvram.errors import DataError
from lowvram.fit.receipts import RECEIPT_FILE, Receipt, read_receipt, write_receipt
from lowvram.hardware.detect import find_driver_version, find_triton
from lowvram.train.events import Event, Halved, Started, StepDone, Stopped

if TYPE_CHECKING:
    from lowvram.api.plan_monitor import PlanMonitor
    from lowvram.train.trainer import Trainer

# Steps after a start or a halving that compile kernels, and so count for nothing.
_WARM_UP_STEPS = 3
_WRITE_EVERY_S = 60.0


def receipt(run: str | Path) -> Receipt:
    """Return the receipt of a run directory, or that in a file.

    Raises DataError where there is none (only runs on an NVIDIA card write one), where it was edited, or where another
    version wrote it.
    """
    from lowvram.api.arguments import PATH, refuse_missing

    refuse_missing("run", run, *PATH)
    path = Path(run)
    return read_receipt(path / RECEIPT_FILE if path.is_dir() or path.suffix != ".json" else path)


def conditions(trainer: Trainer, monitor: PlanMonitor) -> Receipt:
    """Return the receipt of a run that has measured nothing yet: its card, versions, plan and predictions."""
    import torch

    config, profile = trainer.config, monitor.budget.profile
    peak_bytes, tokens_per_s = monitor.prediction
    device = torch.cuda.get_device_properties(trainer.state.model.embedding.device)
    triton = find_triton()
    return Receipt.model_validate(
        {
            "profile_id": profile.id,
            "card": device.name,
            "card_bytes": device.total_memory,
            "driver": find_driver_version() or "unknown",
            "lowvram": lowvram.__version__,
            "torch": str(torch.__version__),
            "triton": triton.version if triton is not None else "none",
            "python": platform.python_version(),
            "system": platform.system(),
            "parameters": config.model.num_parameters(),
            "seq_len": config.train.seq_len,
            "batch_tokens": config.train.batch_tokens,
            "precision": config.train.precision,
            "plan": trainer.plan,
            "compiled": trainer.plan.compile,
            "recorded": trainer.captured_pass is not None,
            "predicted_peak_bytes": peak_bytes,
            "predicted_tokens_per_s": tokens_per_s,
        }
    )


class ReceiptLog:
    """A log that keeps the run's receipt up to date.

    Hours are added to those of an earlier start under the same conditions; under others the receipt begins anew.  Only
    time from one step to the next counts: what follows a validation, a sample or a save is left out.
    read_conditions: called at a start and after a halving.  clock: seconds.
    """

    def __init__(
        self, run: Path, read_conditions: Callable[[], Receipt], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._path, self._read, self._clock = run / RECEIPT_FILE, read_conditions, clock
        self._receipt: Receipt | None = None
        self._steps = 0
        self._last: tuple[float, int] | None = None
        self._written_at = clock()

    def write(self, event: Event) -> None:
        """Count a step; write the file once a minute and at the end."""
        if isinstance(event, Started | Halved):
            self._begin()
        elif isinstance(event, StepDone):
            self._count(event)
        else:
            self._last = None
        if isinstance(event, Stopped) or self._clock() - self._written_at >= _WRITE_EVERY_S:
            self._store()

    def close(self) -> None:
        """Write the file."""
        self._store()

    def _begin(self) -> None:
        self._store()
        self._steps, self._last, self._receipt = 0, None, self._read()
        try:
            earlier = read_receipt(self._path)
        except DataError:  # there is none, or not one of ours: begin anew
            return
        if earlier.is_of_same_conditions(self._receipt):
            self._receipt = earlier

    def _count(self, step: StepDone) -> None:
        self._steps += 1
        now = self._clock()
        if self._receipt is not None and self._last is not None and self._steps > _WARM_UP_STEPS:
            began, tokens = self._last
            self._receipt = self._receipt.add(step.tokens - tokens, now - began, step.memory_bytes)
        self._last = (now, step.tokens)

    def _store(self) -> None:
        self._written_at = self._clock()
        if self._receipt is not None and self._receipt.hours:
            write_receipt(self._receipt, self._path)
