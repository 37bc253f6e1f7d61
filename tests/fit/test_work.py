"""The work that a rehearsal counts is what the formulas say: products, attention, and what recomputation adds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lowvram_kernels.attention.sdpa import attention
from lowvram_kernels.dispatch import Card, simulate_card
from lowvram_kernels.moe.experts import experts
from lowvram_kernels.moe.idle import new_idle
from lowvram_kernels.quant.quantise import quantise_rows

from lowvram.config.model import ModelConfig
from lowvram.config.plan import Plan
from lowvram.config.train import TrainConfig
from lowvram.fit.memory_curve import Work
from lowvram.fit.rehearse import LiveStorage, rehearse

CPU, AMPERE, TURING, APPLE = Card("cpu"), Card("cuda", (8, 6)), Card("cuda", (7, 5)), Card("mps")
SEQ_LEN, MICRO_BATCH = 72, 3
LAYERS, HEADS, HEAD_DIM = 2, 4, 24
MODEL = ModelConfig.model_validate(
    {
        "layers": LAYERS,
        "dim": 88,
        "vocabulary": 500,
        "attention": {"kind": "gqa", "heads": HEADS, "kv_heads": 2, "head_dim": HEAD_DIM},
        "ffn": {"kind": "swiglu", "hidden": 200},
    }
)


def work_of(
    card: Card,
    recompute: Any = "none",
    precision: str = "bf16",
    model: ModelConfig = MODEL,
    seq_len: int = SEQ_LEN,
) -> Work:
    tokens = 2 * MICRO_BATCH * seq_len
    given = {"tokens": tokens, "seq_len": seq_len, "batch_tokens": tokens, "precision": precision}
    plan = Plan(micro_batch=MICRO_BATCH, accumulate=2, recompute=recompute)
    return rehearse(model, TrainConfig.model_validate(given), plan, card).micro


@pytest.mark.parametrize(
    ("card", "flops_of_norm"), [(CPU, 2), (AMPERE, 0), (TURING, 0)], ids=["cpu", "ampere", "turing"]
)
def test_a_matrix_costs_six_flops_a_weight_and_token_and_a_plain_norm_two(card: Card, flops_of_norm: int) -> None:
    norms = (2 * LAYERS + 1) * MODEL.dim
    matrices = MODEL.num_parameters() - norms
    assert work_of(card).flops == (6 * matrices + flops_of_norm * norms) * MICRO_BATCH * SEQ_LEN


@pytest.mark.parametrize("card", [AMPERE, TURING], ids=["flash", "efficient"])
def test_a_cards_attention_is_seven_products_over_half_of_the_scores(card: Card) -> None:
    scores = LAYERS * MICRO_BATCH * HEADS * SEQ_LEN**2
    assert work_of(card).attention_flops == 7 * scores * HEAD_DIM


@pytest.mark.parametrize(
    ("precision", "capability", "is_low"),
    [
        ("fp8", (8, 9), True),
        ("fp8", (12, 0), True),
        ("fp8", (8, 6), False),
        ("int8", (8, 6), True),
        ("int8", (7, 5), False),
    ],
    ids=["fp8-ada", "fp8-blackwell", "fp8-ampere", "int8-ampere", "int8-turing"],
)
def test_products_of_8_bits_are_counted_apart_where_tensor_cores_make_them(
    precision: str, capability: tuple[int, int], is_low: bool
) -> None:
    card, seq_len = Card("cuda", capability), 80
    # Everything that is summed over is a multiple of 16, as the kernels want it.
    model = MODEL.model_copy(update={"dim": 96, "ffn": MODEL.ffn.model_copy(update={"hidden": 208})})
    plain, low = (work_of(card, precision=p, model=model, seq_len=seq_len) for p in ("bf16", precision))
    matrices = model.num_parameters() - (model.vocabulary + 2 * LAYERS + 1) * model.dim
    in_layers = 6 * matrices * MICRO_BATCH * seq_len
    assert low.low_flops == (in_layers if is_low else 0)
    assert low.flops + low.low_flops == plain.flops
    assert low.attention_flops == plain.attention_flops
    assert low.ops > plain.ops


def test_a_launch_tells_its_own_bytes_and_is_not_counted_again() -> None:
    counter = LiveStorage(1)
    x = torch.empty(256, 512, dtype=torch.bfloat16, device="meta")
    with simulate_card(Card("cuda", (8, 9)), counter.add_hidden), counter:
        quantise_rows(x, "e4m3")
    (values,) = counter.work.values()
    assert Work(*values) == Work(0.0, 256 * (512 * 3 + 512 // 128 * 4), 1.0)


def test_attention_that_writes_out_its_scores_is_made_of_products() -> None:
    apple = work_of(APPLE)
    assert apple.attention_flops == 0.0
    scores = LAYERS * MICRO_BATCH * HEADS * SEQ_LEN**2
    assert apple.flops == work_of(CPU).flops + 6 * 2 * scores * HEAD_DIM
    assert apple.moved_bytes > work_of(AMPERE).moved_bytes


@pytest.mark.parametrize(
    ("tokens", "seen"),
    [(200, 200 * 200), (512, 512 * 512), (1_024, 512 * 512 + 512 * 1_024), (700, 512 * 512 + 188 * 700)],
    ids=["short", "one-block", "two-blocks", "part-of-a-block"],
)
def test_a_processor_attends_to_whole_blocks_of_keys(tokens: int, seen: int) -> None:
    counter = LiveStorage(1)
    q, k, v = (torch.empty(2, 3, tokens, 40, device="meta", requires_grad=True) for _ in range(3))
    with simulate_card(CPU), counter:
        out = attention(q, k, v, 0.1, causal=True)
        out.backward(torch.empty_like(out))
    (values,) = counter.work.values()
    assert Work(*values).attention_flops == (2 + 5) * 2 * 2 * 3 * 40 * seen


def experts_work(resident: int, idle_count: int, form: str) -> Work:
    rows, width, inner = 400, 24, 16
    counter = LiveStorage(1)
    x, gate_up, down, weights = (
        torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)
        for shape, dtype in [
            ((rows // 2, width), torch.bfloat16),
            ((resident, 2 * inner, width), torch.float32),
            ((resident, width, inner), torch.float32),
            ((rows // 2, 2), torch.float32),
        ]
    )
    ids = torch.empty(rows // 2, 2, dtype=torch.int64, device="meta")
    idle = new_idle(idle_count, 2 * inner, width, form, "meta"), new_idle(idle_count, width, inner, form, "meta")
    with simulate_card(CPU, counter.add_hidden), counter:
        y = experts(x, gate_up, down, weights, ids, idle if idle_count else None)
        y.backward(torch.empty_like(y))
    (values,) = counter.work.values()
    return Work(*values)


@pytest.mark.parametrize("form", ["bf16", "int8", "e4m3"])
def test_idle_experts_cost_four_flops_a_weight_and_row_a_launch_a_product_and_two_to_decode(form: str) -> None:
    full, mixed = experts_work(5, 0, form), experts_work(2, 3, form)
    products = 2 * 400 * 3 * 24 * 16
    assert full.flops == 3 * products
    assert mixed.flops == pytest.approx((2 + 2 / 5) * products)
    # Forward and dx launch once for every expert of both stacks, the masters' gradients for residents only.
    assert mixed.ops == full.ops - 2 * 3 + (0 if form == "bf16" else 4 * 3 * 2)
    assert form == "bf16" or mixed.moved_bytes > experts_work(2, 3, "bf16").moved_bytes


def test_recomputing_attention_adds_its_forward_products_once_more() -> None:
    kept, again = work_of(AMPERE), work_of(AMPERE, recompute="attention")
    matrices = LAYERS * MODEL.attention.num_parameters(MODEL.dim)
    assert again.flops - kept.flops <= 2 * matrices * MICRO_BATCH * SEQ_LEN
    assert again.flops > kept.flops
    assert again.attention_flops == kept.attention_flops * 9 / 7
    assert again.ops > kept.ops


def test_a_product_moves_its_operands_too() -> None:
    counter = LiveStorage(1)
    x, weight = torch.empty(30, 50, device="meta"), torch.empty(50, 70, device="meta")
    with simulate_card(CPU), counter:
        x @ weight
    (values,) = counter.work.values()
    operand_bytes = 4 * (30 * 50 + 50 * 70)
    assert Work(*values) == Work(2.0 * 30 * 50 * 70, operand_bytes + 4 * 30 * 70, 1, operand_bytes=operand_bytes)
