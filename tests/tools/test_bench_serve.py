"""The server's benchmark: its prompts share nothing, its tokenizer has every id, and it sees what differs."""

from __future__ import annotations

from typing import Any

import pytest

from tools.bench.serve import bodies_of, difference, tokenizer_of


def answer(tokens: list[str], logprobs: list[float]) -> dict[str, Any]:
    return {"choices": [{"logprobs": {"tokens": tokens, "token_logprobs": logprobs}}]}


def test_no_two_prompts_begin_alike_and_the_same_seed_asks_the_same() -> None:
    bodies = bodies_of(16, 8, 4, 32768, seed=1)
    assert len({body["prompt"][0] for body in bodies}) == 16
    assert {len(body["prompt"]) for body in bodies} == {8}
    assert bodies_of(16, 8, 4, 32768, seed=1) == bodies
    assert bodies_of(16, 8, 4, 32768, seed=2) != bodies


def test_the_tokenizer_has_bytes_for_every_id_of_the_model() -> None:
    tokenizer = tokenizer_of(1000)
    assert tokenizer.size == 1000
    assert len({tokenizer.token_bytes(id) for id in range(600, 1000)}) == 400, "no two texts look alike by chance"


def test_texts_that_part_are_counted_and_the_greatest_gap_before_is_told() -> None:
    first = [answer(["a", "b"], [-1.0, -2.0]), answer(["a"], [-1.0])]
    second = [answer(["a", "b"], [-1.0, -2.5]), answer(["c"], [-9.0])]
    parted = [answer(["a", "c"], [-1.25, -9.0]), answer(["a"], [-1.0])]
    assert difference(first, first) == (0, 0.0)
    assert difference(first, second) == (1, pytest.approx(0.5))
    assert difference(first, parted) == (1, pytest.approx(0.25)), "what follows the first other token is another text"
