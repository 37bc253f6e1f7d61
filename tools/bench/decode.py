"""Measures tokens per CPU-second of this project's decoder and of transformers' generate() with the same weights.

python tools/bench/decode.py [--preset tr-60m tr-130m-moe] [--dtype int8 bf16 fp32] [--theirs fp32]
                             [--context 128 1024] [--tokens 16] [--rounds 5] [--cache plain] [--tiny]

Weights are random: speed does not depend on them. Both models have the same weights and compute with one thread, in the
same dtype unless `--theirs` says another; our INT8 weights are computed with in bf16. They alternate in one process, so
that a busy machine slows both; figures are medians, over rounds, of this process's CPU seconds. Decoding is greedy with
batch 1. Time per token: `tokens` tokens after a prompt of `context` tokens; for generate(), the time for 1 + tokens
minus the time for one. First token: prefill of the prompt, compared with one forward pass of this model without a
cache. Cache bytes are counted; theirs follow from the configuration.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[2]))

from lowvram.config.model import ModelConfig
from lowvram.config.run_file import load_preset
from lowvram.generate.decoder import Decoder
from lowvram.generate.sampling import Sampler, sample
from lowvram.model.kv_cache import CacheFormat
from lowvram.model.transformer import Transformer
from tests.model.outside import outside_twin
from tests.model.variants import VARIANTS
from tools.bench.reading_model import DTYPES, describe_machine, lay_for_reading

GREEDY = Sampler(temperature=0.0, repetition_penalty=1.0)
NOTHING = torch.empty(0, dtype=torch.int64)
# Widths that are multiples of 16 bytes: transformers' grouped product of experts needs them.
_MOE = VARIANTS["mla-moe"].ffn.model_copy(update={"hidden": 48, "expert_hidden": 24})
TINY = {"gqa": VARIANTS["gqa-rope"], "mla-moe": VARIANTS["mla-moe"].model_copy(update={"dim": 40, "ffn": _MOE})}


class Figures(NamedTuple):
    """CPU seconds per token (ours, theirs), of the first token and of a forward pass; cache bytes per token."""

    ours_s: float
    theirs_s: float
    first_s: float
    forward_s: float
    bytes_per_token: float
    theirs_bytes_per_token: float
    ratio: float


def seconds_of(run: Callable[[], object]) -> float:
    """Return the CPU seconds that a call takes."""
    began = time.process_time()
    run()
    return time.process_time() - began


def write(decoder: Decoder, logit_V: torch.Tensor, count: int) -> list[int]:
    """Decode `count` tokens greedily after slot 0's context, as the engine does; returns the ids."""
    ids: list[int] = []
    for _ in range(count):
        ids.append(sample(logit_V, GREEDY, NOTHING, len(ids)))
        logit_V = decoder.decode_one_token([0], ids[-1:])[0]
    return ids


def their_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Return the bytes of transformers' cache per token: latent and rotated part of MLA, keys and values of GQA."""
    attention = config.attention
    if attention.kind == "mla":
        values = attention.kv_lora_rank + attention.rope_dim
    else:
        values = 2 * attention.kv_heads * attention.head_dim
    return config.layers * values * dtype.itemsize


@torch.inference_mode()
def measure(
    config: ModelConfig,
    precision: str,
    context: int,
    tokens: int,
    rounds: int,
    cache: CacheFormat = "plain",
    theirs: str | None = None,
) -> Figures:
    """Let both decode `tokens` tokens after the same prompt, alternately; a first round is not counted.

    precision: of our weights, a key of DTYPES.  theirs: their dtype, None for that in which ours is computed.
    """
    model, dtype = Transformer(config), DTYPES[precision]
    their_dtype = dtype if theirs is None else DTYPES[theirs]
    twin = outside_twin(model).to(their_dtype)
    assert isinstance(twin, transformers.GenerationMixin), "it has generate()"
    model = lay_for_reading(model, precision)
    # No zeros, which generate() treats as padding.
    prompt_BT = torch.randint(1, config.vocabulary, (1, context), generator=torch.Generator().manual_seed(0))
    decoder = Decoder(model, context + tokens + 1, dtype=dtype, cache=cache)
    settings = {"do_sample": False, "use_cache": True, "pad_token_id": 0, "eos_token_id": None}

    def generate(count: int) -> object:
        return twin.generate(prompt_BT, max_new_tokens=count, min_new_tokens=count, **settings)

    taken: list[list[float]] = []
    for _ in range(rounds + 1):
        decoder.rewind(0, 0)
        forward_s = seconds_of(lambda: model(prompt_BT, dtype))
        first_s = seconds_of(lambda: decoder.prefill(0, prompt_BT[0].tolist()))
        logit_V = torch.zeros(config.vocabulary, dtype=dtype)
        ours_s = seconds_of(functools.partial(write, decoder, logit_V, tokens)) / tokens
        one_s, all_s = (seconds_of(functools.partial(generate, count)) for count in (1, 1 + tokens))
        theirs_s = (all_s - one_s) / tokens
        taken.append([ours_s, theirs_s, first_s, forward_s, theirs_s / ours_s])
    ours_s, theirs_s, first_s, forward_s, ratio = (statistics.median(column) for column in zip(*taken[1:], strict=True))
    bytes_per_token, theirs_bytes_per_token = (
        decoder.cache.bytes_per_token(),
        their_bytes_per_token(config, their_dtype),
    )
    return Figures(ours_s, theirs_s, first_s, forward_s, bytes_per_token, theirs_bytes_per_token, ratio)


def show(name: str, dtype: str, context: int, figures: Figures) -> str:
    """Return one line of a table."""
    rates = (
        f"ours {1 / figures.ours_s:6.1f} tokens/CPU-s, transformers {1 / figures.theirs_s:6.1f}, {figures.ratio:5.2f} x"
    )
    first = f"first token {figures.first_s:.3f} s, {figures.first_s / figures.forward_s:.2f} of a forward pass"
    kept = f"cache {figures.bytes_per_token:,.0f} B a token, theirs {figures.theirs_bytes_per_token:,.0f}"
    return f"{name} {dtype} {context:>5}: {rates}; {first}; {kept}"


def main() -> None:
    """Read the options and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", default=["tr-60m", "tr-130m-moe"])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["int8", "bf16", "fp32"])
    parser.add_argument("--theirs", choices=("fp32", "bf16"), help="their dtype; without it that of our computation")
    parser.add_argument("--context", nargs="+", type=int, default=[128, 1024])
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cache", choices=("plain", "e4m3"), default="plain")
    parser.add_argument("--tiny", action="store_true", help="two tiny models instead of presets, to try the tool")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(describe_machine(), f"transformers {transformers.__version__}", sep=", ")
    for name in TINY if options.tiny else options.preset:
        config = TINY[name] if options.tiny else load_preset(name)[0]
        for dtype in options.dtype:
            for context in options.context:
                figures = measure(config, dtype, context, options.tokens, options.rounds, options.cache, options.theirs)
                against = dtype if options.theirs is None else f"{dtype} against {options.theirs}"
                print(show(name, against, context, figures), flush=True)


if __name__ == "__main__":
    main()
