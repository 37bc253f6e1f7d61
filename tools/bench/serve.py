"""Measures a server's tokens per second for many clients at once, and for the same clients one after the other.

python tools/bench/serve.py [--preset tr-60m] [--clients 16] [--prompt 32] [--tokens 64] [--repeats 3]
                            [--dtype auto] [--temperature 0] [--top-p 1.0] [--penalty 1.0]

A real server runs on this machine's loopback interface with random weights and one thread; one HTTP client opens as
many connections as it needs.  `auto` is the precision that `lowvram serve` takes by itself on this processor.
Temperature 0 decodes greedily; others draw with one seed for each client.  The two ways alternate in one process, so
that a busy machine slows both; figures are medians of wall time and of this process's CPU time (server, client and
model together).  All prompts are different, so no cached prefix is reused.  The texts of both ways are compared, and
the greatest difference of log-probabilities up to where two texts part: products of one row and of many are rounded
differently, and with random weights the likeliest tokens are nearly equal.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported

import httpx
import torch

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[2] / "kernels")]

from lowvram.config.run_file import load_preset
from lowvram.data.sample import sample_documents
from lowvram.data.tokenizer import Tokenizer, train_tokenizer
from lowvram.generate.decoder import Decoder
from lowvram.generate.processor import find_pace
from lowvram.model.transformer import Transformer
from lowvram.serve.app import AccessPolicy, build_app
from lowvram.serve.limits import Limits
from lowvram.serve.metrics import Metrics
from lowvram.serve.prompt import ServedModel
from lowvram.serve.scheduler import Scheduler
from lowvram.serve.server import Server, open_socket
from tools.bench.reading_model import DTYPES, describe_machine, lay_for_reading

_FIRST_ID = 300  # the lowest of the prompts' random ids: after special tokens and bytes


def tokenizer_of(vocabulary: int) -> Tokenizer:
    """Return a tokenizer with so many ids; those that its small training text did not fill stand for their number."""
    with tempfile.TemporaryDirectory() as folder:
        small = train_tokenizer(sample_documents(0, 20_000), 512, Path(folder))
    return dataclasses.replace(small, _bytes=(*small._bytes, *(b"%d " % id for id in range(small.size, vocabulary))))


@contextmanager
def serving(preset: str, slots: int, max_context: int, precision: str) -> Iterator[str]:
    """Serve a model with random weights; yields the URL."""
    config, _ = load_preset(preset)
    model = lay_for_reading(Transformer(config).eval(), precision)
    decoder, tokenizer = Decoder(model, max_context, slots, DTYPES[precision]), tokenizer_of(config.vocabulary)
    limits = Limits(slots=slots, queue=slots, prompt_tokens=max_context - 1, output_tokens=max_context - 1)
    scheduler = Scheduler(decoder, tokenizer, limits.queue, Metrics())
    app = build_app(ServedModel(preset, "fp_bench", tokenizer, max_context), scheduler, limits, AccessPolicy())
    server, listening = Server(app, scheduler, limits), open_socket("127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_on, args=(listening,))
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    thread.start()
    try:
        yield url
    finally:
        server.handle_exit(2, None)
        thread.join()


async def ask_all(url: str, bodies: list[dict[str, Any]], at_once: int) -> list[dict[str, Any]]:
    """Return the responses to all requests, with at most `at_once` requests at a time."""
    gate = asyncio.Semaphore(at_once)
    async with httpx.AsyncClient(base_url=url, timeout=None, trust_env=False) as client:

        async def ask(body: dict[str, Any]) -> dict[str, Any]:
            async with gate:
                answer = await client.post("/v1/completions", json=body)
                return answer.raise_for_status().json()

        return await asyncio.gather(*map(ask, bodies))


def bodies_of(
    clients: int, prompt: int, tokens: int, vocabulary: int, seed: int, **sampler: float
) -> list[dict[str, Any]]:
    """Return request bodies whose prompts differ from the first token on.

    sampler: fields of a request; greedy without any.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(_FIRST_ID, vocabulary, (clients, prompt), generator=generator).tolist()
    plain = {"max_tokens": tokens, "logprobs": 0, "temperature": 0}
    return [plain | sampler | {"prompt": one, "seed": number} for number, one in enumerate(ids)]


def difference(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> tuple[int, float]:
    """Return how many texts differ, and the greatest difference of log-probabilities before the texts part."""
    differing, gap = 0, 0.0
    for one, other in zip(first, second, strict=True):
        a, b = (answer["choices"][0]["logprobs"] for answer in (one, other))
        same = next((i for i, (x, y) in enumerate(zip(a["tokens"], b["tokens"], strict=False)) if x != y), None)
        differing += same is not None
        pairs = zip(a["token_logprobs"][:same], b["token_logprobs"][:same], strict=True)
        gap = max([gap, *(abs(x - y) for x, y in pairs)])
    return differing, gap


def measure(options: argparse.Namespace) -> str:
    """Return the figures in four lines."""
    sampler = {"temperature": options.temperature, "top_p": options.top_p, "repetition_penalty": options.penalty}
    max_context = options.prompt + options.tokens + 1
    config, _ = load_preset(options.preset)
    wall: dict[int, list[float]] = {1: [], options.clients: []}
    cpu: dict[int, list[float]] = {1: [], options.clients: []}
    differing, gap = 0, 0.0
    with serving(options.preset, options.clients, max_context, options.dtype) as url:
        for number in range(options.repeats + 1):
            answers = {}
            for at_once in wall:
                shape = options.clients, options.prompt, options.tokens, config.vocabulary, number
                bodies = bodies_of(*shape, **sampler)
                began, began_cpu = time.perf_counter(), time.process_time()
                answers[at_once] = asyncio.run(ask_all(url, bodies, at_once))
                written = sum(answer["usage"]["completion_tokens"] for answer in answers[at_once])
                if number:  # the first round warms up
                    wall[at_once].append(written / (time.perf_counter() - began))
                    cpu[at_once].append(written / (time.process_time() - began_cpu))
                # Overwrite the slots, so that no later request can reuse what they hold now.
                asyncio.run(ask_all(url, bodies_of(options.clients, options.prompt, 1, config.vocabulary, -1), 1))
            parted, gap_of_texts = difference(answers[1], answers[options.clients])
            differing, gap = differing + parted, max(gap, gap_of_texts)
    given = ", ".join(f"{name} {value:g}" for name, value in sampler.items())
    lines = [
        f"{options.preset}, {options.dtype}: {options.clients} clients, {options.prompt} + {options.tokens} tokens"
    ]
    lines[0] += f", {given}"
    for name, times in (("second", wall), ("CPU second", cpu)):
        one, many = (statistics.median(times[at_once]) for at_once in (1, options.clients))
        lines.append(f"  tokens per {name}: {one:.1f} in turn, {many:.1f} at once: {many / one:.2f} x")
    texts = options.clients * (options.repeats + 1)
    lines.append(f"  {differing} of {texts} texts part; log-probabilities differ by {gap:.1e} before that")
    return "\n".join(lines)


def main() -> None:
    """Read the options and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tr-60m")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto")
    for name, neutral in (("temperature", 0.0), ("top-p", 1.0), ("penalty", 1.0)):
        parser.add_argument(f"--{name}", type=float, default=neutral)
    for name, default in (("clients", 16), ("prompt", 32), ("tokens", 64), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(describe_machine())
    if options.dtype == "auto":
        with tempfile.TemporaryDirectory() as folder:
            pace, _ = find_pace(Path(folder))
        options.dtype = pace.fastest
        print(pace.reason)
    print(measure(options))


if __name__ == "__main__":
    main()
