"""Experts where Triton runs: the textbook's values and gradients, no wait for the device, what paper tells of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from lowvram_kernels.dispatch import Card, HiddenWork, Launch, override_card, simulate_card
from lowvram_kernels.layers import swiglu
from lowvram_kernels.matmul.quant_linear import MatmulFormat
from lowvram_kernels.moe import experts as module
from lowvram_kernels.moe.experts import experts, reference
from lowvram_kernels.moe.idle import COPY_FORMATS, Stack, new_idle, write_copy_
from lowvram_kernels.moe.sorting import sort_choices
from lowvram_kernels.quant.quantise import parts_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.kernels.cards import CARDS, DEVICE, running_on
from tests.kernels.measures import LiveBytes, relative_error, saved_bytes

# The interpreter's bf16 is wrong, its fp16 and fp32 are right.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}
# Two products, each with the error that tests/kernels/matmul/test_quant_linear.py gives one.
BOUND = {"e4m3": 2 * 0.045, "int8": 2 * 0.02}
# Between two ways of adding: of a thousand numbers one that rounds to its neighbour, which is up to an eighth away
# (E4M3), or the 127th part of some 3 σ (INT8).  In fp16 one of sixteen does, for 2⁻¹¹ of 127 steps is a sixteenth.
SAME = {
    ("e4m3", torch.float32): 1e-2,
    ("e4m3", torch.float16): 1e-2,
    ("int8", torch.float32): 2e-3,
    ("int8", torch.float16): 6e-3,
}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_form = pytest.mark.parametrize("form", [None, *COPY_FORMATS], ids=["all resident", *COPY_FORMATS])
each_low = pytest.mark.parametrize("form", ["e4m3", "int8"])
Idle = tuple[Stack, Stack] | None


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    """Fill what torch.empty returns with NaN: a row that nobody wrote then shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(dtype: torch.dtype, form: str | None, resident: int = 2) -> tuple[list[Tensor], Tensor, Idle]:
    """41 tokens that each choose 2 of 5 experts; with a form the experts after the resident ones are idle copies."""
    torch.manual_seed(1)
    tokens, choices, count, width, inner = 41, 2, 5, 37, 13
    x = torch.randn(tokens, width).to(dtype)
    gate_up, down = torch.randn(count, 2 * inner, width) / width**0.5, torch.randn(count, width, inner) / inner**0.5
    weights = torch.rand(tokens, choices).bfloat16().float()
    ids = torch.rand(tokens, count).argsort(-1)[:, :choices].contiguous().to(DEVICE)
    idle = None
    if form is not None:
        stacks = []
        for master in (gate_up, down):
            stack = new_idle(count - resident, *master.shape[1:], form, DEVICE)
            for index, matrix in enumerate(master[resident:]):
                write_copy_(stack, index, matrix)
            stacks.append(stack)
        idle = stacks[0], stacks[1]
        gate_up, down = gate_up[:resident].clone(), down[:resident].clone()
    return [t.to(DEVICE).requires_grad_() for t in (x, gate_up, down, weights)], ids, idle


def compare(leaves: list[Tensor], ids: Tensor, idle: Idle, card: str = "sm86") -> tuple[Tensor, ...]:
    dtype = leaves[0].dtype
    with running_on(card):
        y = experts(*leaves, ids, idle)
        upstream = torch.randn(y.shape).to(dtype).to(DEVICE)
        gradients = torch.autograd.grad(y, leaves, upstream)
    truths = [t.detach().to(dtype).double().requires_grad_() for t in leaves]
    truth = reference(*truths, ids, idle)
    assert relative_error(y, truth) < TOLERANCE[dtype]
    assert [g.dtype for g in gradients] == [t.dtype for t in leaves]
    for gradient, expected in zip(gradients, torch.autograd.grad(truth, truths, upstream.double()), strict=True):
        assert relative_error(gradient, expected) < TOLERANCE[dtype]
    return gradients


@each_form
@each_dtype
def test_values_and_all_four_gradients_are_the_textbooks(dtype: torch.dtype, form: str | None) -> None:
    compare(*draw(dtype, form))


@pytest.mark.parametrize("card", ["sm90", "sm120"])
def test_every_kind_of_card_computes_the_same(card: str) -> None:
    compare(*draw(torch.float16, "e4m3"), card=card)


@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param([[0, 0]] * 5, id="all to the first"),
        pytest.param([[4, 4]] * 5, id="all to the last"),
        pytest.param([[1, 3], [3, 1], [1, 3]], id="every other one"),
        pytest.param([[2, 4]] * 5, id="idle ones alone"),
    ],
)
@each_form
def test_experts_that_nobody_chose_get_zero_gradients(form: str | None, chosen: list[list[int]]) -> None:
    (x, gate_up, down, weights), _, idle = draw(torch.float32, form)
    ids, count = torch.tensor(chosen, device=DEVICE), len(chosen)
    few = [t.detach().requires_grad_() for t in (x[:count], gate_up, down, weights[:count])]
    _, dgate_up, ddown, _ = compare(few, ids, idle)
    for expert in set(range(len(gate_up))) - set(ids.flatten().tolist()):
        assert (dgate_up[expert] == 0).all()
        assert (ddown[expert] == 0).all()


def test_no_token_is_a_batch_too() -> None:
    (x, gate_up, down, weights), _, idle = draw(torch.float16, "int8")
    with running_on("sm86"):
        y = experts(x[:0], gate_up, down, weights[:0], torch.zeros(0, 2, dtype=torch.int64, device=DEVICE), idle)
        (gradient,) = torch.autograd.grad(y.sum(), gate_up)
    assert y.shape == (0, 37)
    assert (gradient == 0).all()


@pytest.mark.parametrize("form", ["e4m3", "int8"])
@pytest.mark.parametrize("card", ["sm86", "sm120", "cpu"])
def test_experts_that_are_only_read_may_all_be_copies(form: str, card: str) -> None:
    (x, gate_up, down, weights), ids, idle = draw(torch.float16, form, resident=0)
    assert len(gate_up) == len(down) == 0
    with torch.no_grad():
        with override_card(Card("cpu")) if card == "cpu" else running_on(card):
            y = experts(x, gate_up, down, weights, ids, idle)
        truth = reference(*(part.double() for part in (x, gate_up, down, weights)), ids, idle)
    assert relative_error(y, truth) < TOLERANCE[torch.float16]


def test_stacks_without_idle_copies_change_no_bit() -> None:
    leaves, ids, _ = draw(torch.float16, None)
    none = new_idle(0, 26, 37, "e4m3", DEVICE), new_idle(0, 37, 13, "e4m3", DEVICE)
    with running_on("sm86"):
        assert torch.equal(experts(*leaves, ids, none), experts(*leaves, ids))


def test_it_repeats_itself_bit_for_bit_and_saves_what_the_loop_saves() -> None:
    leaves, ids, idle = draw(torch.float16, "int8")
    with running_on("sm86"):
        found = [torch.autograd.grad(experts(*leaves, ids, idle).float().square().sum(), leaves) for _ in range(2)]
        parts = [part for stack in idle or () for part in parts_of(stack) if part is not None]
        kept = saved_bytes(lambda: experts(*leaves, ids, idle), [*leaves[1:3], *parts])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert kept == 41 * 37 * 2 + 82 * 4 + 82 * 8 + 5 * 8 + 82 * 26 * 2


@each_form
def test_nothing_reads_the_device(form: str | None) -> None:
    torch.use_deterministic_algorithms(False)
    with FakeTensorMode(allow_non_fake_inputs=True), override_card(CARDS["sm86"]):
        leaves, ids, idle = [torch.ones(9, 8), torch.ones(2, 12, 8), torch.ones(2, 8, 6), torch.ones(9, 2)], None, None
        if form is not None:
            idle = new_idle(3, 12, 8, form), new_idle(3, 8, 6, form)
        ids = torch.zeros(9, 2, dtype=torch.int64)
        leaves = [t.requires_grad_() for t in leaves]
        y = experts(*leaves, ids, idle)
        gradients = torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert [g.shape for g in gradients] == [t.shape for t in leaves]


@pytest.mark.nightly
@each_form
def test_it_compiles_into_one_graph(form: str | None) -> None:
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    leaves, ids, idle = draw(torch.float32, form)
    compiled = torch.compile(lambda *some: experts(*some, ids, idle), fullgraph=True, backend="eager")
    found = []
    with running_on("sm86"):
        for op in (lambda *some: experts(*some, ids, idle), compiled):
            y = op(*leaves)
            found.append((y, *torch.autograd.grad(y, leaves, torch.ones_like(y))))
    for got, expected in zip(*found, strict=True):
        assert relative_error(got, expected) < TOLERANCE[torch.float32]


def compare_low(leaves: list[Tensor], ids: Tensor, idle: Idle, form: MatmulFormat, card: str = "sm86") -> list[Tensor]:
    """Hold values and gradients against the loop, which rounds the same operands, and against the textbook."""
    dtype, found = leaves[0].dtype, []
    upstream = torch.randn(leaves[0].shape).to(dtype).to(DEVICE)
    for where in (running_on(card), override_card(Card(DEVICE))):
        with where:
            y = experts(*leaves, ids, idle, form)
            found.append([y, *torch.autograd.grad(y, leaves, upstream)])
    truths = [t.detach().double().requires_grad_() for t in leaves]
    truth = reference(*truths, ids, idle)
    textbook = [truth, *torch.autograd.grad(truth, truths, upstream.double())]
    for own, loop, right in zip(*found, textbook, strict=True):
        assert own.dtype == loop.dtype
        assert relative_error(own, loop) < SAME[form, dtype]
        assert SAME[form, torch.float32] < relative_error(own, right) < BOUND[form]
    return found[0]


@pytest.mark.parametrize("is_idle", [False, True], ids=["all resident", "with idle copies"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@each_low
def test_low_forms_compute_what_the_loop_computes(form: MatmulFormat, dtype: torch.dtype, is_idle: bool) -> None:
    compare_low(*draw(dtype, "e4m3" if is_idle else None), form)


@pytest.mark.default_cases("e4m3")
@each_low
def test_low_forms_give_zeros_where_nobody_chose(form: MatmulFormat) -> None:
    for idle_form, chosen in ((None, [1, 3]), ("int8", [0, 4])):
        leaves, ids, idle = draw(torch.float32, idle_form)
        _, _, dgate_up, ddown, _ = compare_low(leaves, torch.tensor([chosen] * len(ids), device=DEVICE), idle, form)
        for expert in set(range(len(dgate_up))) - set(chosen):
            assert (dgate_up[expert] == 0).all()
            assert (ddown[expert] == 0).all()


@each_low
def test_tokens_that_are_rounded_before_they_are_repeated_have_the_same_bits(form: MatmulFormat) -> None:
    (x, gate_up, *_), ids, _ = draw(torch.float16, None)
    with running_on("sm86"):
        order, _, ends, _ = sort_choices(ids, 5)
        early = module._multiply_tokens(x, order, 2, gate_up, (None, None), ends, True, form)
        late = module._multiply(x[order // 2], gate_up, (None, None), ends, True, form)
    assert torch.equal(early, late)


@pytest.mark.default_cases("e4m3")
@each_low
def test_low_forms_are_one_graph_and_read_nothing_of_the_device(
    form: MatmulFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swiglu, "has_kernels", lambda _: False)  # as in a compiled block, for equal bits
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()

    def run(*given: Tensor) -> Tensor:
        return experts(*given, matmul_format=form)

    (x, gate_up, down, weights), ids, _ = draw(torch.float32, None)
    leaves = [t.detach().requires_grad_() for t in (x[:7], gate_up[:2], down[:2], weights[:7])]
    ids = ids[:7] % 2
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    with running_on("sm86"):
        eager, traced = run(*leaves, ids), compiled(*leaves, ids)
        found = [torch.autograd.grad(y, leaves, torch.ones_like(y)) for y in (eager, traced)]
        with FakeTensorMode(allow_non_fake_inputs=True):
            y = run(*leaves, ids)
            shapes = [gradient.shape for gradient in torch.autograd.grad(y, leaves, torch.ones_like(y))]
    assert torch.equal(eager, traced)
    assert all(torch.equal(own, other) for own, other in zip(*found, strict=True))
    assert shapes == [leaf.shape for leaf in leaves]


@pytest.mark.parametrize(("form", "kind"), [("e4m3", "fp8"), ("int8", "int8")])
def test_on_paper_low_forms_make_low_products_alone_and_round_each_token_once(form: MatmulFormat, kind: str) -> None:
    launches: list[Launch] = []
    work: list[HiddenWork] = []
    with torch.device("meta"), simulate_card(CARDS["sm86"], work.append, note_launch=launches.append):
        leaves = [torch.ones(96, 64), torch.ones(8, 96, 64), torch.ones(8, 64, 48), torch.ones(96, 2)]
        ids = torch.zeros(96, 2, dtype=torch.int64)
        y = experts(*(leaf.requires_grad_() for leaf in leaves), ids, matmul_format=form)
        forward = len(launches)
        torch.autograd.grad(y, leaves, torch.ones_like(y))
    kernels = [what.kernel for what in launches]
    assert kernels.count(f"multiply_{kind}_kernel") == 4
    assert kernels.count(f"outer_{kind}_kernel") == 2
    assert not {"multiply_kernel", "outer_kernel"} & set(kernels)
    rounded = [what.arguments[0].shape for what in launches[:forward] if "rows" in what.kernel]
    assert (96, 64) in rounded
    assert (192, 64) not in rounded, "the tokens, repeated"
    told = sum(part.low_flops + part.product_flops + part.grouped_flops for part in work)
    assert told == 3 * 2 * 192 * 64 * (96 + 48)


def on_paper_of(card: Card, form: str | None, tokens: int = 96) -> tuple[list[str], list[HiddenWork], int]:
    """Kernels, work and peak of a pass and its gradients: each token chooses 2 of 8 experts, 2 of them resident."""
    kernels: list[str] = []
    work: list[HiddenWork] = []
    resident = 8 if form is None else 2

    def note(what: Launch) -> None:
        kernels.append(what.kernel)  # not the launch, which holds its tensors

    with torch.device("meta"), simulate_card(card, work.append, note_launch=note):
        shapes = ((tokens, 64), (resident, 80, 64), (resident, 64, 40), (tokens, 2))
        dtypes = (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32)
        leaves = [torch.ones(s, dtype=d).requires_grad_() for s, d in zip(shapes, dtypes, strict=True)]
        idle = None if form is None else (new_idle(6, 80, 64, form), new_idle(6, 64, 40, form))
        parts = [part for stack in idle or () for part in parts_of(stack) if part is not None]
        with LiveBytes().ignore(*leaves, *parts) as live:
            y = experts(*leaves, torch.zeros(tokens, 2, dtype=torch.int64), idle)
            torch.autograd.grad(y, leaves, torch.ones_like(y))
    return kernels, work, live.peak


@each_form
def test_on_paper_each_product_is_a_launch_that_tells_of_its_operations(form: str | None) -> None:
    kernels, work, _ = on_paper_of(CARDS["sm86"], form)
    assert kernels.count("multiply_kernel") == (4 if form is None else 8)
    assert kernels.count("outer_kernel") == 2
    told = sum(part.product_flops + part.grouped_flops for part in work)
    both = 2 * 192 * 64 * (80 + 40)
    assert told == pytest.approx(2 * both + both * (1 if form is None else 2 / 8))


@pytest.mark.parametrize("form", ["int8", "e4m3"])
def test_on_paper_nothing_is_decoded_into_memory(form: str) -> None:
    (_, _, one_launch), (_, _, loop) = (on_paper_of(CARDS[name], form, tokens=1) for name in ("sm86", "sm75"))
    scratch, rows_of_one_token = 80 * 64 * 2, 512
    spread = 80 * 4 if form == "e4m3" else 0  # a block's scale for each of its rows
    assert scratch - rows_of_one_token < loop - one_launch <= scratch + spread + rows_of_one_token
