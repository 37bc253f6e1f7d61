"""When a step's loss is a spike: a rule over the losses of earlier steps, which are saved with the run; knows no loop.

A step is a spike where its loss is above the median of the last WINDOW losses by more than DEVIATIONS robust standard
deviations (1.4826 times the median distance from the median) and by more than LEAST_RISE of the median.  Spikes cannot
poison the window: what is not finite, or was skipped, never enters it, and a spike that was learnt from enters it as
the limit that it was above.  The rule for a step does not see the loss of the step right before it: on CUDA that one is
read only after the step was launched, and the rule must not depend on how early a number is read.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np

WINDOW = 64
# With fewer losses nothing is a spike.
LEAST_LOSSES = 16
DEVIATIONS = 6.0
LEAST_RISE = 0.1
# The median distance from the median of a normal distribution, times this, is its standard deviation.
_OF_NORMAL = 1.4826

# The number of a step, and its loss.
History = list[tuple[int, float]]


def limit_for(step: int, history: Sequence[tuple[int, float]]) -> float:
    """Return the loss above which `step` is a spike, an fp32 number; infinity where too little is known."""
    losses = [loss for number, loss in history if number < step - 1]
    if len(losses) < LEAST_LOSSES:
        return math.inf
    median = statistics.median(losses)
    deviation = _OF_NORMAL * statistics.median(abs(loss - median) for loss in losses)
    return float(np.float32(median + max(DEVIATIONS * deviation, LEAST_RISE * abs(median))))


def is_spike(loss: float, limit: float) -> bool:
    """Say whether a step with this loss is a spike."""
    return math.isfinite(loss) and loss > limit


def add_loss(history: History, step: int, loss: float, limit: float) -> History:
    """Return the history with the loss of a step that was learnt from; limit: that of the step."""
    if not math.isfinite(loss):
        return history
    # One more than the window, because the newest loss does not count for the next step.
    return [*history, (step, min(loss, limit))][-(WINDOW + 1) :]


def is_history(value: object) -> bool:
    """Say whether a value from a file is a history: at most WINDOW + 1 pairs of a step and a finite loss."""
    return isinstance(value, list) and len(value) <= WINDOW + 1 and all(map(_is_pair, value))


def _is_pair(value: object) -> bool:
    if not isinstance(value, list) or len(value) != 2:
        return False
    step, loss = value
    is_step = isinstance(step, int) and not isinstance(step, bool) and step >= 0
    return is_step and isinstance(loss, float) and math.isfinite(loss)
