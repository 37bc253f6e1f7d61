"""Validation and samples between training steps, one event each; changes no state and decides nothing."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

from lowvram.config.run import RunConfig
from lowvram.data.shards import ShardSet
from lowvram.data.source_set import SourceSet
from lowvram.data.tokenizer import Tokenizer
from lowvram.errors import DataError, NumbersError
from lowvram.evaluate.bits_per_byte import score
from lowvram.evaluate.by_source import add_up, score_sources
from lowvram.evaluate.minimal_pairs import Pair, answer_pairs, choose_light_subset, read_pairs
from lowvram.evaluate.scorer import Scorer
from lowvram.finish import finish
from lowvram.generate.decoder import Decoder
from lowvram.generate.engine import Engine
from lowvram.generate.sampling import Sampler
from lowvram.objective import DTYPES
from lowvram.train.events import Evaluated, Sampled, SourceLoss
from lowvram.train.oom import free_memory, is_out_of_memory
from lowvram.train.rotation import ExpertRotation
from lowvram.train.state import TrainState

# Some seconds on a processor for 25 M parameters.
PAIRS = 256


def evaluate(
    config: RunConfig, state: TrainState, tokenizer: Tokenizer, valid: ShardSet | SourceSet, batch: int
) -> Evaluated:
    """Validate on the first `run.validate_tokens` tokens of `valid`, of several sources as `SourceSet.limit` shares.

    batch: windows at a time.
    """
    dtype, most = DTYPES[config.train.precision], config.run.validate_tokens
    bos_id, byte_count_V, seq_len = tokenizer.bos_id, tokenizer.byte_count_V, config.train.seq_len
    by_source: dict[str, SourceLoss] = {}
    if isinstance(valid, SourceSet):
        sources = valid.limit(most)
        scores = finish(score_sources(state.model, sources, bos_id, byte_count_V, seq_len, dtype, batch))
        by_source = {name: SourceLoss(s.loss, s.bits_per_byte, s.text_bytes) for name, s in scores.items()}
        result = add_up(scores.values())
    else:
        result = score(state.model, valid, bos_id, byte_count_V, seq_len, dtype, most, batch)
    right, problem = _answer_pairs(config, state, tokenizer, batch)
    return Evaluated(
        state.step,
        result.loss,
        result.bits_per_byte,
        pairs_right=right,
        pairs_problem=problem,
        by_source=by_source,
    )


@functools.lru_cache(maxsize=1)
def read_run_pairs(file: Path) -> list[Pair]:
    """Return the pairs that each validation of a run asks; raises DataError where the file is none of pairs."""
    pairs = choose_light_subset(read_pairs(file), PAIRS)
    if not pairs:
        raise DataError(f"{file} holds no pair whose sentences differ.", "run.pairs names it.", "Name another file.")
    return pairs


def _answer_pairs(config: RunConfig, state: TrainState, tokenizer: Tokenizer, batch: int) -> tuple[float | None, str]:
    """Return the share of right answers, and why memory did not suffice for them, else an empty text.

    None where the run has no pairs, where the model's numbers are broken or memory ran out: a run goes on without them.
    """
    if config.run.pairs is None:
        return None, ""
    pairs, seq_len = read_run_pairs(config.run.pairs), config.train.seq_len
    # No more tokens at once than in a step, whose memory the plan has counted.
    scorer = Scorer(state.model, DTYPES[config.train.precision], tokenizer, seq_len, batch_tokens=batch * seq_len)
    work = answer_pairs(scorer, pairs)
    try:
        return sum(finish(work).by_sum) / len(pairs), ""
    except NumbersError:  # later steps may repair the weights; a diverged run is stopped by the trainer
        return None, ""
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    # Behind the handler, since the error's frames keep the tensors alive.
    del work
    free_memory(state.model.embedding.device)
    return None, "Memory ran out while the minimal pairs were asked; training goes on without their share."


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
