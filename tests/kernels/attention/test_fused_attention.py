"""Attention against its textbook form, and on paper against what each card's kernel is known to allocate."""

from __future__ import annotations

import pytest
import torch
from lowvram_kernels.attention.sdpa import attention, causal_flops, reference
from lowvram_kernels.dispatch import (
    Card,
    Choice,
    HiddenWork,
    card_of,
    choose_attention,
    is_simulated,
    note_work,
    simulate_card,
)
from lowvram_kernels.errors import ShapeError
from torch import Tensor

from tests.kernels.measures import LiveBytes, relative_error

AMPERE, TURING, MPS, CPU = Card("cuda", (8, 6)), Card("cuda", (7, 5)), Card("mps"), Card("cpu")
RELATIVE = 1e-5
BATCH, HEADS, GROUPS, ROWS, WIDTH = 2, 6, 2, 130, 24


def qkv(
    device: str = "cpu", dtype: torch.dtype = torch.float32, groups: int = GROUPS, width: int = WIDTH
) -> list[Tensor]:
    with torch.device(device):
        shapes = [(BATCH, heads, ROWS, width) for heads in (HEADS, groups, groups)]
        return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("groups", [1, 2, 6], ids=lambda n: f"{n}-groups")
def test_it_is_the_textbook_form_with_its_gradients(groups: int) -> None:
    ours, theirs = qkv(groups=groups), []
    out = attention(*ours, 0.2, causal=True)
    theirs = [tensor.detach().double().requires_grad_() for tensor in ours]
    q, k, v = theirs
    truth = reference(q, *(x.repeat_interleave(HEADS // groups, 1) for x in (k, v)), 0.2, causal=True)
    dout = torch.randn_like(out)
    out.backward(dout)
    truth.backward(dout.double())
    assert relative_error(out, truth) < RELATIVE
    for own, other in zip(ours, theirs, strict=True):
        assert relative_error(own.grad, other.grad) < RELATIVE


def test_a_mask_hides_what_it_says() -> None:
    q, k, v = qkv()
    seen_TS = torch.ones(ROWS, ROWS, dtype=torch.bool).tril()
    torch.testing.assert_close(attention(q, k, v, 0.2, mask=seen_TS), attention(q, k, v, 0.2, causal=True))


@pytest.mark.parametrize(
    "card, dtype, is_masked, backend",
    [
        (CPU, torch.float32, False, "flash"),
        (MPS, torch.bfloat16, False, "math"),
        (TURING, torch.float16, False, "efficient"),
        (AMPERE, torch.bfloat16, False, "flash"),
        (AMPERE, torch.float32, False, "efficient"),
        (AMPERE, torch.bfloat16, True, "efficient"),
        (AMPERE._replace(has_flash=False), torch.bfloat16, False, "efficient"),
        (Card("cuda", (12, 0)), torch.float16, False, "flash"),
    ],
    ids=str,
)
def test_the_kernel_follows_from_card_numbers_and_mask(
    card: Card, dtype: torch.dtype, is_masked: bool, backend: str
) -> None:
    choice = choose_attention(card, dtype, is_masked)
    assert choice.backend == backend
    assert choice.reason


def test_every_profile_states_the_kernel_that_is_chosen_for_it() -> None:
    from lowvram.hardware.profile import load_profile, profile_names
    from lowvram.objective import DTYPES

    for name in profile_names():
        profile = load_profile(name)
        card = Card(profile.platform, profile.capability)
        assert profile.attention == choose_attention(card, DTYPES[profile.dtype], is_masked=False).backend, name


def peak_on_paper(card: Card, groups: int = GROUPS, width: int = WIDTH) -> tuple[int, int]:
    """Return the bytes after a forward pass and at the peak of backward, beyond q, k, v, for 16-bit numbers."""
    with simulate_card(card):
        given = qkv("meta", torch.bfloat16, groups, width)
        with LiveBytes().ignore(*given) as live:
            out = attention(*given, 0.2, causal=True)
            kept = live.now
            out.backward(torch.empty_like(out))
    return kept, live.peak


ROW, TENSOR = BATCH * HEADS * ROWS * 4, BATCH * HEADS * ROWS * WIDTH * 2


def test_flash_keeps_its_result_and_a_number_per_row_and_adds_up_dq_in_fp32() -> None:
    kept, peak = peak_on_paper(AMPERE, groups=HEADS)
    assert kept == TENSOR + ROW
    accumulator = BATCH * HEADS * 256 * 32 * 4  # rows in steps of 128, width of 32
    # The result, its gradient, dq, dk, dv, two numbers per row, the accumulator.
    assert peak == 5 * TENSOR + 2 * ROW + accumulator


def test_flash_makes_dk_and_dv_for_every_head_before_it_sums_groups() -> None:
    kept, peak = peak_on_paper(AMPERE)
    assert kept == TENSOR + ROW
    group = TENSOR * GROUPS // HEADS
    assert peak == 5 * TENSOR + 2 * group + 2 * ROW + BATCH * HEADS * 256 * 32 * 4


def test_cards_without_flash_repeat_the_heads_and_metal_keeps_every_score() -> None:
    repeated = 2 * TENSOR
    assert peak_on_paper(TURING)[0] == TENSOR + ROW + repeated
    assert peak_on_paper(MPS)[0] >= BATCH * HEADS * ROWS * ROWS * 2


@pytest.mark.parametrize("learns", [True, False], ids=["learning", "reading"])
@pytest.mark.parametrize("width", [64, 192, 193, 224, 225, 256, 257, 6400, 25_600])
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)], ids=str)
def test_flash_takes_the_widths_that_torch_gives_it_and_the_ledger_knows(
    capability: tuple[int, int], width: int, learns: bool
) -> None:
    has_gap = learns and capability in ((8, 6), (8, 9), (12, 0))
    is_flash = width <= 256 and not (has_gap and 192 < width <= 224)
    card = Card("cuda", capability)
    choice = choose_attention(card, torch.bfloat16, False, width, learns)
    assert choice.backend == ("flash" if is_flash else "efficient")
    assert is_flash or str(width) in choice.reason
    repeated: list[int] = []
    with simulate_card(card):
        q, k, v = qkv("meta", torch.bfloat16, width=width)
        with LiveBytes().ignore(q, k, v) as live, torch.set_grad_enabled(learns):
            attention(q, k, v, 0.2, causal=True)
            repeated.append(live.peak)
    # Without groups k and v lie there once for every query head.
    assert (repeated[0] > 3 * BATCH * HEADS * ROWS * width * 2) == (not is_flash)


@pytest.mark.parametrize("head_dim, form", [(252, "flash"), (254, "efficient")])
def test_the_extra_columns_of_alibi_count_among_a_heads_numbers(
    monkeypatch: pytest.MonkeyPatch, head_dim: int, form: str
) -> None:
    from lowvram.config.model import ModelConfig
    from lowvram.model.transformer import Transformer

    chosen: list[str] = []

    def choose(*given: object) -> Choice:
        chosen.append(choose_attention(*given).backend)  # type: ignore[arg-type]
        return Choice(chosen[-1], "as chosen")

    monkeypatch.setattr("lowvram_kernels.attention.sdpa.choose_attention", choose)
    table = {
        "layers": 1, "dim": 32, "vocabulary": 16, "positions": {"kind": "alibi"},
        "attention": {"kind": "gqa", "heads": 2, "kv_heads": 1, "head_dim": head_dim},
        "ffn": {"kind": "swiglu", "hidden": 32},
    }  # fmt: skip
    model = Transformer(ModelConfig.model_validate(table), seed=None).to("meta")
    with simulate_card(AMPERE):
        model(torch.zeros(1, 8, dtype=torch.long, device="meta"), torch.bfloat16)
    assert chosen == [form]


@pytest.mark.parametrize("card", [AMPERE, TURING], ids=["flash", "efficient"])
def test_odd_widths_are_padded_so_that_every_fused_kernel_takes_them(card: Card) -> None:
    kept, _ = peak_on_paper(card, groups=HEADS, width=20)
    assert kept == 4 * TENSOR + ROW, "q, k and v in width 24, and the result"


def test_paper_tells_the_work_of_the_kernels_that_it_replaces() -> None:
    told: list[HiddenWork] = []
    with simulate_card(AMPERE, told.append):
        assert is_simulated()
        assert card_of(torch.device("meta")) == AMPERE
        q, k, v = qkv("meta", torch.bfloat16)
        attention(q, k, v, 0.2, causal=True).sum().backward()
    assert [work.flops for work in told] == [causal_flops(q, k), 2.5 * causal_flops(q, k)]
    assert causal_flops(q, k) == 2 * BATCH * HEADS * ROWS * ROWS * WIDTH, "two products of half the scores"
    note_work(flops=1.0)
    assert not is_simulated()
    assert len(told) == 2, "off paper nobody counts"
    assert card_of(torch.device("cpu")) == CPU


def test_wrong_shapes_are_named() -> None:
    q, k, v = qkv()
    with pytest.raises(ShapeError, match="divisor"):
        attention(q[:, :5], k, v, 0.2)
    with pytest.raises(ShapeError, match="attention"):
        attention(q, k[..., :8], v[..., :8], 0.2)
