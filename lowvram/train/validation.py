"""What a run looks at between steps: validation and samples, one event each; changes nothing, decides nothing."""

from __future__ import annotations

import dataclasses

from lowvram.config.run import RunConfig
from lowvram.data.shards import ShardSet
from lowvram.data.tokenizer import Tokenizer
from lowvram.errors import NumbersError
from lowvram.evaluate.bits_per_byte import score
from lowvram.generate.decoder import Decoder
from lowvram.generate.engine import Engine
from lowvram.generate.sampling import Sampler
from lowvram.objective import DTYPES
from lowvram.train.events import Evaluated, Sampled
from lowvram.train.rotation import ExpertRotation
from lowvram.train.state import TrainState


def evaluate(what: RunConfig, state: TrainState, tokenizer: Tokenizer, valid: ShardSet, batch: int) -> Evaluated:
    """Validate on the run's part of `valid`.  batch: windows at a time."""
    dtype, most = DTYPES[what.train.precision], what.run.validate_tokens
    bos_id, byte_count_V = tokenizer.bos_id, tokenizer.byte_count_V
    found = score(state.model, valid, bos_id, byte_count_V, what.train.seq_len, dtype, most, batch)
    return Evaluated(state.step, found.loss, found.bits_per_byte)


def evaluate_masters(
    what: RunConfig, state: TrainState, tokenizer: Tokenizer, valid: ShardSet, batch: int, rotation: ExpertRotation
) -> Evaluated:
    """Validate what a checkpoint holds, where that is more than the card's copies of the experts."""
    with rotation.reading_masters():
        return dataclasses.replace(evaluate(what, state, tokenizer, valid, batch), reads_masters=True)


def write_sample(what: RunConfig, state: TrainState, tokenizer: Tokenizer, prompt: str) -> Sampled:
    """Let the model write behind a prompt; where its numbers are broken, the event says so."""
    # A sample is short, and a training card has no memory for graphs of it.
    decoder = Decoder(state.model, what.train.seq_len, dtype=DTYPES[what.train.precision], captures=False)
    id_T = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    pieces = Engine(decoder, tokenizer).generate(id_T, Sampler(seed=what.train.seed), what.run.sample_tokens)
    text, problem = "", ""
    try:
        text = "".join(pieces)
    except NumbersError as error:  # the steps to come may mend it; a run that is lost ends by its own count
        problem = error.what
    return Sampled(state.step, prompt, text, problem)
