"""The tool that times decoding: both models write the same text, and what it prints can be read."""

from __future__ import annotations

import sys

import pytest
import torch

from lowvram.generate.decoder import Decoder
from lowvram.model.transformer import Transformer
from tests.model.outside import outside_twin, randomise
from tools.bench import decode
from tools.bench.decode import TINY, measure, show, their_bytes_per_token, write


@pytest.mark.parametrize("name", TINY)
def test_what_is_timed_is_the_same_text(name: str) -> None:
    model = randomise(Transformer(TINY[name]), std=0.25)
    prompt_BT = torch.arange(1, 13)[None]
    decoder = Decoder(model, 40)
    ours = write(decoder, decoder.prefill(0, prompt_BT[0].tolist()), 9)
    settings = {"do_sample": False, "use_cache": True, "pad_token_id": 0, "eos_token_id": None}
    theirs = outside_twin(model).generate(prompt_BT, max_new_tokens=9, min_new_tokens=9, **settings)
    assert theirs[0, 12:].tolist() == ours
    assert len(set(ours)) > 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", TINY)
def test_a_token_takes_as_many_bytes_as_transformers_keeps_of_it(name: str, dtype: torch.dtype) -> None:
    config = TINY[name]
    assert Decoder(Transformer(config), 40, dtype=dtype).cache.bytes_per_token() == their_bytes_per_token(config, dtype)


def test_figures_are_of_seconds_that_were_spent() -> None:
    found = measure(TINY["mla-moe"], "bf16", context=9, tokens=3, rounds=1)
    assert min(found.ours_s, found.first_s, found.forward_s) > 0
    assert found.bytes_per_token == found.theirs_bytes_per_token
    assert "tokens/CPU-s, transformers" in show("tiny", "bf16", 9, found)


def test_the_tool_says_where_its_figures_are_from(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    options = ["--tiny", "--context", "9", "--tokens", "2", "--rounds", "1", "--dtype", "fp32"]
    monkeypatch.setattr(sys, "argv", ["decode.py", *options])
    decode.main()
    first, *lines = capsys.readouterr().out.splitlines()
    assert "1 thread" in first
    assert f"torch {torch.__version__}" in first
    assert [line.split()[0] for line in lines] == list(TINY)
