"""How long a text may get: what the model is made for, what fits, and what is said where quality is untested."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lowvram.api import context as module
from lowvram.api import target
from lowvram.api.context import reach
from lowvram.api.loading import LoadedModel
from lowvram.config.model import ModelConfig
from lowvram.data.tokenizer import Tokenizer
from lowvram.errors import MachineError
from lowvram.fit.report import MemoryBudget
from lowvram.hardware.profile import load_profile
from lowvram.model.transformer import Transformer
from tests.loaded import find_max_context
from tests.model.variants import VARIANTS


def loaded_of(kind: str, trained_len: int = 32) -> LoadedModel:
    config: ModelConfig = VARIANTS[kind]
    tokenizer = Tokenizer("", Path(), (), {})
    model = Transformer(config).requires_grad_(False)
    return LoadedModel(Path(), None, None, config, tokenizer, model, torch.float32, "fp32", "as asked", trained_len)


def with_room(monkeypatch: pytest.MonkeyPatch, limit_bytes: int) -> None:
    class Named:
        def budget(self, precision: str) -> MemoryBudget:
            return MemoryBudget(load_profile("cpu"), limit_bytes, limit_bytes, None)

    monkeypatch.setattr(target, "detect_target_of", lambda device: Named())


@pytest.mark.parametrize(
    "kind, trained_len, expected",
    [
        ("gqa-rope", 32, 32),
        ("gqa-alibi", 32, 32),
        ("gqa-rope-yarn", 16, 64),
        ("gqa-rope-yarn", 8, 32),
        ("gqa-rope-yarn", 64, 64),
        ("gqa-rope-yarn", 90, 90),
    ],
    ids=["rope", "alibi", "yarn", "yarn-shorter", "yarn-learnt", "yarn-longer"],
)
def test_a_model_is_made_for_what_it_was_trained_on_times_yarns_factor(
    kind: str, trained_len: int, expected: int
) -> None:
    assert reach(VARIANTS[kind], trained_len) == expected
    found = find_max_context(loaded_of(kind, trained_len))
    assert (found.max_context, found.trained_len) == (expected, trained_len)
    assert bool(found.warning) == (expected > trained_len)


@pytest.mark.parametrize(
    "kind, asked, message",
    [
        ("gqa-rope", 33, "Quality is untested beyond 32 tokens, .*plain RoPE usually fails there"),
        ("gqa-alibi", 100, "ALiBi's penalty goes on"),
        ("gqa-rope-yarn", 60, "YaRN stretches its positions to 64"),
        ("gqa-rope-yarn", 65, "YaRN stretches to 64 only"),
    ],
)
def test_where_quality_is_untested_is_said(kind: str, asked: int, message: str) -> None:
    trained_len = 16 if "yarn" in kind else 32
    found = find_max_context(loaded_of(kind, trained_len), asked=asked)
    assert (found.max_context, found.reason) == (asked, f"{asked} tokens, as asked.")
    assert re.search(message, found.warning)
    assert find_max_context(loaded_of(kind, trained_len), asked=8).warning == ""


@pytest.mark.parametrize("kind", ["gqa-rope", "gqa-window", "mla-moe"])
@pytest.mark.parametrize("slots", [1, 3])
def test_what_fits_is_as_long_as_it_can_be(kind: str, slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = loaded_of(kind, trained_len=10_000)
    limit = module._needed(loaded, slots, 3000)
    with_room(monkeypatch, limit)
    found = find_max_context(loaded, slots)
    assert module._needed(loaded, slots, found.max_context) <= limit
    assert module._needed(loaded, slots, found.max_context + 600) > limit, "more than a chunk is not left"
    assert (
        f"{found.max_context:,} tokens are what fits beside the weights; the model is made for 10,000" in found.reason
    )


@pytest.mark.nightly
def test_latents_in_8_bits_leave_room_for_a_longer_text(monkeypatch: pytest.MonkeyPatch) -> None:
    # Latents so wide that what layers keep outweighs what one of them works with.
    wide = VARIANTS["mla-moe"].attention.model_copy(update={"kv_lora_rank": 512})
    monkeypatch.setitem(VARIANTS, "wide", VARIANTS["mla-moe"].model_copy(update={"layers": 6, "attention": wide}))
    loaded = loaded_of("wide", trained_len=9000)
    with_room(monkeypatch, limit := module._needed(loaded, 1, 3000))
    plain, low = (find_max_context(loaded, cache=form).max_context for form in ("plain", "e4m3"))
    assert plain == pytest.approx(3000, rel=0.2)
    assert low > 1.2 * plain
    assert module._needed(loaded, 1, low, "e4m3") <= limit


@pytest.mark.parametrize("asked, room, advice", [(5000, 1000, "Give `max_context="), (64, 1, "End what else runs")])
def test_what_does_not_fit_says_what_would(asked: int, room: int, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = loaded_of("gqa-rope")
    with_room(monkeypatch, module._needed(loaded, 2, room) if room > 1 else 16)
    with pytest.raises(MachineError) as caught:
        find_max_context(loaded, 2, asked)
    error: Any = caught.value
    assert error.what.startswith(f"2 texts of {asked:,} tokens need ")
    assert advice in error.fix
