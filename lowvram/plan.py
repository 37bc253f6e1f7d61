"""HOW a run is carried out on one machine: nothing in here changes what is learnt, up to rounding."""

from __future__ import annotations

from pydantic import PositiveInt

from lowvram.config import TrainConfig, Words
from lowvram.errors import ConfigError

# Tokens of one micro-batch while nothing has been measured: enough to fill a small card's matrix units.
DEFAULT_MICRO_TOKENS = 4_096


class Plan(Words):
    """How a step is cut: micro_batch × accumulate = its sequences.

    loss_chunk: rows of logits that exist at a time (None: the op's own choice).
    """

    micro_batch: PositiveInt
    accumulate: PositiveInt
    loss_chunk: PositiveInt | None = None


def choose_plan(train: TrainConfig, micro_batch: int | None = None) -> tuple[Plan, str]:
    """Return a plan that keeps `batch_tokens`, and the reason for its micro-batch.

    micro_batch: sequences at a time, as the user asked; it must divide the step's sequences (ConfigError).
    """
    samples = train.batch_samples
    if micro_batch is not None:
        if micro_batch < 1 or samples % micro_batch:
            divisors = ", ".join(str(n) for n in range(1, samples + 1) if samples % n == 0)
            raise ConfigError(
                f"--micro-batch is {micro_batch}.",
                f"A step has {samples} sequences (batch_tokens / seq_len), which it must divide.",
                f"Possible: {divisors}.",
            )
        return Plan(micro_batch=micro_batch, accumulate=samples // micro_batch), "you asked for it"
    most = max(1, DEFAULT_MICRO_TOKENS // train.seq_len)
    chosen = max(n for n in range(1, samples + 1) if samples % n == 0 and n <= most)
    within = f"the most sequences of {train.seq_len} within {DEFAULT_MICRO_TOKENS} tokens"
    reason = f"{within} that divide the step's {samples}"
    return Plan(micro_batch=chosen, accumulate=samples // chosen), reason
