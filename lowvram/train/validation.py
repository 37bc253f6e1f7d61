"""Validation and samples between training steps, one event each; changes no state and decides nothing."""

from __future__ import annotations

import dataclasses

from lowvram.config.run import RunConfig
from lowvram.data.shards import ShardSet
from lowvram.data.source_set import SourceSet
from lowvram.data.tokenizer import Tokenizer
from lowvram.errors import NumbersError
from lowvram.evaluate.by_source import score_held_out
from lowvram.evaluate.scorer import Scorer
from lowvram.finish import finish
from lowvram.generate.decoder import Decoder
from lowvram.generate.engine import Engine
from lowvram.generate.sampling import Sampler
from lowvram.objective import DTYPES
from lowvram.train.events import Evaluated, Sampled, SourceLoss
from lowvram.train.light_subset import measure_light_subset
from lowvram.train.rotation import ExpertRotation
from lowvram.train.state import TrainState


def evaluate(
    config: RunConfig, state: TrainState, tokenizer: Tokenizer, valid: ShardSet | SourceSet, batch: int
) -> Evaluated:
    """Validate on the first `run.validate_tokens` tokens of `valid`, of several sources as `SourceSet.limit` shares.

    batch: windows at a time.
    """
    dtype, most, seq_len = DTYPES[config.train.precision], config.run.validate_tokens, config.train.seq_len
    bos_id, byte_count_V = tokenizer.bos_id, tokenizer.byte_count_V
    work = score_held_out(state.model, valid, bos_id, byte_count_V, seq_len, dtype, most, batch)
    result, scores = finish(work)
    by_source = {name: SourceLoss(s.loss, s.bits_per_byte, s.text_bytes) for name, s in scores.items()}
    # No more tokens at once than in a step, whose memory the plan has counted.
    scorer = Scorer(state.model, dtype, tokenizer, seq_len, batch_tokens=batch * seq_len)
    light = measure_light_subset(config.run, scorer)
    return Evaluated(state.step, result.loss, result.bits_per_byte, by_source=by_source, **light)


def evaluate_masters(
    config: RunConfig,
    state: TrainState,
    tokenizer: Tokenizer,
    valid: ShardSet | SourceSet,
    batch: int,
    rotation: ExpertRotation,
) -> Evaluated:
    """Validate with the experts' masters, which a checkpoint saves, in place of the card's low-precision copies."""
    with rotation.reading_masters():
        return dataclasses.replace(evaluate(config, state, tokenizer, valid, batch), reads_masters=True)


def write_sample(config: RunConfig, state: TrainState, tokenizer: Tokenizer, prompt: str) -> Sampled:
    """Let the model continue a prompt; where its logits are not finite, the event says so."""
    # A sample is short, and during training the card has no memory for CUDA graphs of decoding.
    decoder = Decoder(state.model, config.train.seq_len, dtype=DTYPES[config.train.precision], captures=False)
    id_T = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    pieces = Engine(decoder, tokenizer).generate(id_T, Sampler(seed=config.train.seed), config.run.sample_tokens)
    text, problem = "", ""
    try:
        text = "".join(pieces)
    except NumbersError as error:  # later steps may repair the weights; a diverged run is stopped by the trainer
        problem = error.what
    return Sampled(state.step, prompt, text, problem)
