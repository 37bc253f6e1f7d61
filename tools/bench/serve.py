"""Measures a server's tokens per second for many clients at once, and for the same clients one after the other.

python tools/bench/serve.py [--preset tr-60m] [--clients 16] [--prompt 32] [--tokens 64] [--repeats 3] [--dtype fp32]

A real server runs on this machine's loopback interface with random weights, one thread and greedy decoding; one HTTP
client opens as many connections as it needs.  The two ways alternate in one process, so that a busy machine slows both;
figures are medians of wall time and of this process's CPU time (server, client and model together).  All prompts are
different, so no cached prefix is reused.  The texts of both ways are compared, and the greatest difference of
log-probabilities is printed.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
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
from lowvram.model.transformer import Transformer
from lowvram.serve.app import AccessPolicy, build_app
from lowvram.serve.limits import Limits
from lowvram.serve.metrics import Metrics
from lowvram.serve.prompt import ServedModel
from lowvram.serve.scheduler import Scheduler
from lowvram.serve.server import Server, open_socket
from tools.bench.reading_model import DTYPES, lay_for_reading

_FIRST_ID = 300  # the lowest of the prompts' random ids: after special tokens and bytes


def tokenizer_of(vocabulary: int) -> Tokenizer:
    """Return a tokenizer with so many ids; those that its small training text did not fill stand for a letter."""
    with tempfile.TemporaryDirectory() as folder:
        small = train_tokenizer(sample_documents(0, 20_000), 512, Path(folder))
    return dataclasses.replace(small, _bytes=(*small._bytes, *(b"x" for _ in range(vocabulary - small.size))))


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


def bodies_of(clients: int, prompt: int, tokens: int, vocabulary: int, seed: int) -> list[dict[str, Any]]:
    """Return request bodies whose prompts differ from the first token on."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(_FIRST_ID, vocabulary, (clients, prompt), generator=generator).tolist()
    return [{"prompt": one, "max_tokens": tokens, "temperature": 0, "logprobs": 0} for one in ids]


def difference(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> tuple[int, float]:
    """Return how many texts differ, and the greatest difference of log-probabilities in the texts that do not."""
    pairs = [(a["choices"][0], b["choices"][0]) for a, b in zip(first, second, strict=True)]
    equal = [(a, b) for a, b in pairs if a["logprobs"]["tokens"] == b["logprobs"]["tokens"]]
    gaps = (
        abs(x - y)
        for a, b in equal
        for x, y in zip(a["logprobs"]["token_logprobs"], b["logprobs"]["token_logprobs"], strict=True)
    )
    return len(pairs) - len(equal), max(gaps, default=0.0)


def measure(options: argparse.Namespace) -> str:
    """Return the figures in three lines."""
    max_context = options.prompt + options.tokens + 1
    config, _ = load_preset(options.preset)
    wall: dict[int, list[float]] = {1: [], options.clients: []}
    cpu: dict[int, list[float]] = {1: [], options.clients: []}
    differing, gap = 0, 0.0
    with serving(options.preset, options.clients, max_context, options.dtype) as url:
        for number in range(options.repeats + 1):
            answers = {}
            for at_once in wall:
                bodies = bodies_of(options.clients, options.prompt, options.tokens, config.vocabulary, number)
                began, began_cpu = time.perf_counter(), time.process_time()
                answers[at_once] = asyncio.run(ask_all(url, bodies, at_once))
                written = sum(answer["usage"]["completion_tokens"] for answer in answers[at_once])
                if number:  # the first round warms up
                    wall[at_once].append(written / (time.perf_counter() - began))
                    cpu[at_once].append(written / (time.process_time() - began_cpu))
                # Overwrite the slots, so that no later request can reuse what they hold now.
                asyncio.run(ask_all(url, bodies_of(options.clients, options.prompt, 1, config.vocabulary, -1), 1))
            texts, difference_of_texts = difference(answers[1], answers[options.clients])
            differing, gap = differing + texts, max(gap, difference_of_texts)
    lines = [
        f"{options.preset}, {options.dtype}: {options.clients} clients, {options.prompt} + {options.tokens} tokens"
    ]
    for name, times in (("second", wall), ("CPU second", cpu)):
        one, many = (statistics.median(times[at_once]) for at_once in (1, options.clients))
        lines.append(f"  tokens per {name}: {one:.1f} in turn, {many:.1f} at once: {many / one:.2f} x")
    lines.append(f"  {differing} texts differ; log-probabilities by {gap:.1e} at most")
    return "\n".join(lines)


def main() -> None:
    """Read the options and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tr-60m")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    for name, default in (("clients", 16), ("prompt", 32), ("tokens", 64), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()} {platform.system()}, 1 thread, "
        f"{torch.backends.cpu.get_cpu_capability()}, Python {platform.python_version()}, torch {torch.__version__}"
    )
    print(measure(options))


if __name__ == "__main__":
    main()
