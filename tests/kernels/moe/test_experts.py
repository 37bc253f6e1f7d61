"""Routed experts against every expert run on every token in fp64; uneven and empty slices; idle ones; bytes; paper."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from lowvram_kernels.errors import ShapeError
from lowvram_kernels.moe import experts as module
from lowvram_kernels.moe.experts import experts, reference
from lowvram_kernels.moe.idle import COPY_FORMATS, Stack, new_idle, read_copy, write_copy_
from lowvram_kernels.quant.quantise import parts_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.kernels.measures import LiveBytes, hidden_bytes, relative_error, saved_bytes

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    """Fill what torch.empty returns with NaN: a row that nobody wrote then shows."""
    torch.use_deterministic_algorithms(True)  # fill_uninitialized_memory is on by default and needs this
    yield
    torch.use_deterministic_algorithms(False)


def draw(
    tokens: int, choices: int, count: int, width: int, inner: int, dtype: torch.dtype, master: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(1)
    x = torch.randn(tokens, width).to(dtype)
    gate_up = (torch.randn(count, 2 * inner, width) / width**0.5).to(dtype).to(master)
    down = (torch.randn(count, width, inner) / inner**0.5).to(dtype).to(master)
    ids = torch.rand(tokens, count).argsort(-1)[:, :choices].contiguous()
    weights = torch.rand(tokens, choices).bfloat16().float()
    return [t.requires_grad_() for t in (x, gate_up, down, weights)], ids


def put_idle(leaves: list[Tensor], resident: int, form: str) -> tuple[list[Tensor], tuple[Stack, Stack]]:
    """Leave the first experts resident and bring the others into low precision."""
    x, gate_up, down, weights = (t.detach() for t in leaves)
    stacks = []
    for master in (gate_up, down):
        stack = new_idle(master.shape[0] - resident, *master.shape[1:], form)
        for index, matrix in enumerate(master[resident:]):
            write_copy_(stack, index, matrix)
        stacks.append(stack)
    mixed = [x.clone(), gate_up[:resident].clone(), down[:resident].clone(), weights.clone()]
    return [t.requires_grad_() for t in mixed], (stacks[0], stacks[1])


def fill_up(mixed: list[Tensor], idle: tuple[Stack, Stack]) -> list[Tensor]:
    """Full stacks in x's dtype whose idle experts are their decoded copies."""
    x, gate_up, down, weights = (t.detach().clone() for t in mixed)
    full = [
        torch.stack([*master.to(x.dtype), *(read_copy(stack, i, x.dtype) for i in range(len(parts_of(stack)[0])))])
        for master, stack in zip((gate_up, down), idle, strict=True)
    ]
    return [t.requires_grad_() for t in (x, *full, weights)]


def compare(leaves: list[Tensor], ids: Tensor, idle: tuple[Stack, Stack] | None = None) -> None:
    dtype = leaves[0].dtype
    truths = [t.detach().double().requires_grad_() for t in leaves]
    y, truth = experts(*leaves, ids, idle), reference(*truths, ids, idle)
    upstream = torch.randn(y.shape).to(dtype)
    gradients = torch.autograd.grad(y, leaves, upstream)
    assert y.dtype == dtype
    assert [g.dtype for g in gradients] == [t.dtype for t in leaves]
    assert relative_error(y, truth) < TOLERANCE[dtype]
    for gradient, expected in zip(gradients, torch.autograd.grad(truth, truths, upstream.double()), strict=True):
        assert relative_error(gradient, expected) < max(TOLERANCE[dtype], TOLERANCE[gradient.dtype])


@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16], ids=["fp32-master", "bf16-master"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(
    ("tokens", "choices", "count", "width", "inner"),
    [
        pytest.param(1, 1, 1, 1, 1, id="one-of-all"),
        pytest.param(41, 2, 5, 37, 13, id="odd"),
        pytest.param(16, 4, 4, 24, 16, id="every-expert-for-every-token"),
        pytest.param(3, 2, 16, 8, 8, id="more-experts-than-choices"),
    ],
)
def test_values_and_all_four_gradients_are_the_textbooks(
    tokens: int, choices: int, count: int, width: int, inner: int, dtype: torch.dtype, master: torch.dtype
) -> None:
    compare(*draw(tokens, choices, count, width, inner, dtype, master))


@pytest.mark.parametrize(
    "ids",
    [
        pytest.param([[0, 0], [0, 0], [0, 0]], id="all-to-the-first"),
        pytest.param([[3, 3], [3, 3], [3, 3]], id="all-to-the-last"),
        pytest.param([[2, 1], [1, 2], [2, 1]], id="ends-empty"),
        pytest.param([[3, 0], [0, 3], [3, 0]], id="middle-empty"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_that_nobody_chose_get_zero_gradients(dtype: torch.dtype, ids: list[list[int]]) -> None:
    leaves, _ = draw(3, 2, 4, 12, 10, dtype, torch.float32)
    chosen = torch.tensor(ids)
    compare(leaves, chosen)
    _, dgate_up, ddown, _ = torch.autograd.grad(experts(*leaves, chosen).sum(), leaves)
    for expert in set(range(4)) - set(chosen.flatten().tolist()):
        assert dgate_up[expert].abs().sum() == 0
        assert ddown[expert].abs().sum() == 0


def test_no_token_is_a_batch_too() -> None:
    leaves, _ = draw(0, 2, 4, 12, 10, torch.float32, torch.float32)
    y = experts(*leaves, torch.zeros(0, 2, dtype=torch.int64))
    y.sum().backward()
    assert y.shape == (0, 12)
    assert leaves[1].grad is not None
    assert leaves[1].grad.abs().sum() == 0


def test_strides_do_not_matter() -> None:
    (x, gate_up, down, weights), ids = draw(9, 2, 3, 6, 4, torch.float32, torch.float32)
    plain = [t.detach() for t in (x, gate_up, down, weights)]
    strided = [plain[0].T.contiguous().T, *(t.mT.contiguous().mT for t in plain[1:3]), plain[3].T.contiguous().T]
    assert not any(t.is_contiguous() for t in strided)
    compare([t.requires_grad_() for t in strided], ids.T.contiguous().T)


def test_it_repeats_itself_bit_for_bit() -> None:
    leaves, ids = draw(64, 3, 6, 16, 8, torch.bfloat16, torch.float32)
    first, second = (torch.autograd.grad(experts(*leaves, ids).float().square().sum(), leaves) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_it_saves_x_weights_the_sort_and_gate_up_alone() -> None:
    tokens, choices, count, width, inner = 10, 2, 4, 16, 24
    leaves, ids = draw(tokens, choices, count, width, inner, torch.bfloat16, torch.float32)
    rows = tokens * choices
    kept = saved_bytes(lambda: experts(*leaves, ids), leaves[1:3])
    assert kept == tokens * width * 2 + rows * 4 + rows * 8 + count * 8 + rows * 2 * inner * 2


def test_gradients_of_masters_are_written_without_a_copy_of_the_stack() -> None:
    leaves, ids = draw(4, 1, 32, 16, 16, torch.bfloat16, torch.float32)
    y = experts(*leaves, ids)
    with LiveBytes().ignore(*leaves) as live:
        torch.autograd.grad(y, leaves, torch.ones_like(y))
    dgate_up, ddown, cast = 32 * 32 * 16 * 4, 32 * 16 * 16 * 4, 32 * 32 * 16 * 2
    assert live.peak < dgate_up + ddown + cast + 16_384


@pytest.mark.parametrize("learning", range(4), ids=["x", "gate_up", "down", "weights"])
def test_a_gradient_that_nobody_asks_for_is_not_made(learning: int) -> None:
    leaves, ids = draw(6, 2, 3, 8, 4, torch.float32, torch.float32)
    (expected,) = torch.autograd.grad(experts(*leaves, ids).sum(), leaves[learning])
    frozen = [t.detach().requires_grad_(i == learning) for i, t in enumerate(leaves)]
    experts(*frozen, ids).sum().backward()
    assert [t.grad is not None for t in frozen] == [i == learning for i in range(4)]
    torch.testing.assert_close(frozen[learning].grad, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_on_paper_it_has_the_same_shapes_and_reads_nothing(dtype: torch.dtype) -> None:
    torch.use_deterministic_algorithms(False)
    with FakeTensorMode():
        leaves, ids = draw(41, 2, 5, 37, 13, dtype, torch.float32)
        y = experts(*leaves, ids)
        gradients = torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert (y.shape, y.dtype) == ((41, 37), dtype)
    assert [(g.shape, g.dtype) for g in gradients] == [(t.shape, t.dtype) for t in leaves]


def test_the_private_ops_keep_torchs_rules() -> None:
    rows, stack, ends = torch.randn(6, 4), torch.randn(3, 4, 5), torch.tensor([2, 2, 6])
    rules = ("test_schema", "test_faketensor")
    torch.library.opcheck(module._multiply_slices, (rows, stack, ends, None, None, None, False), test_utils=rules)
    more = torch.randn(6, 5)
    for resident in (3, 2):
        torch.library.opcheck(module._sum_outer_slices, (rows, more, ends, torch.float32, resident), test_utils=rules)
    for form in COPY_FORMATS:
        idle = new_idle(1, 5, 4, form)
        mixed = (rows, stack[:2], ends, *parts_of(idle), torch.zeros(5, 4), True)
        torch.library.opcheck(module._multiply_slices, mixed, test_utils=rules)


each_form = pytest.mark.parametrize("form", COPY_FORMATS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
each_window = pytest.mark.parametrize("resident", [1, 2, 4])


@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16], ids=["fp32-master", "bf16-master"])
@each_window
@each_dtype
@each_form
def test_idle_experts_are_the_experts_that_their_copies_say(
    form: str, dtype: torch.dtype, resident: int, master: torch.dtype
) -> None:
    leaves, ids = draw(41, 2, 5, 137, 67, dtype, master)
    mixed, idle = put_idle(leaves, resident, form)
    compare(mixed, ids, idle)
    full = fill_up(mixed, idle)
    y, expected = experts(*mixed, ids, idle), experts(*full, ids)
    upstream = torch.randn(y.shape).to(dtype)
    assert torch.equal(y, expected)
    gradients = torch.autograd.grad(y, mixed, upstream)
    for got, whole in zip(gradients, torch.autograd.grad(expected, full, upstream), strict=True):
        assert torch.equal(got, whole[: len(got)].to(got.dtype))


@each_form
def test_idle_experts_learn_nothing_and_residents_that_nobody_chose_get_zeros(form: str) -> None:
    leaves, _ = draw(6, 2, 5, 12, 10, torch.bfloat16, torch.float32)
    mixed, idle = put_idle(leaves, 2, form)
    for part in (*parts_of(idle[0]), *parts_of(idle[1])):
        if part is not None and part.dtype.is_floating_point:
            part.requires_grad_()
    before = [part.detach().clone() for stack in idle for part in parts_of(stack) if part is not None]
    experts(*mixed, torch.tensor([[2, 4]] * 6), idle).sum().backward()
    assert all(part.grad is None for stack in idle for part in parts_of(stack) if part is not None)
    after = [part for stack in idle for part in parts_of(stack) if part is not None]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    for master in mixed[1:3]:
        assert master.grad is not None
        assert master.grad.shape == master.shape
        assert master.grad.abs().sum() == 0
    assert mixed[0].grad is not None
    assert mixed[0].grad.abs().sum() > 0, "idle experts let dx through"


@each_dtype
@each_form
def test_with_no_expert_idle_it_is_the_op_without(form: str, dtype: torch.dtype) -> None:
    leaves, ids = draw(41, 2, 5, 37, 13, dtype, torch.float32)
    mixed, idle = put_idle(leaves, 5, form)
    y, expected = experts(*mixed, ids, idle), experts(*leaves, ids)
    assert torch.equal(y, expected)
    pairs = zip(torch.autograd.grad(y.sum(), mixed), torch.autograd.grad(expected.sum(), leaves), strict=True)
    assert all(torch.equal(got, whole) for got, whole in pairs)


def test_which_slot_an_expert_has_changes_no_bit() -> None:
    leaves, ids = draw(41, 2, 5, 37, 13, torch.bfloat16, torch.bfloat16)
    expert_of_slot = torch.tensor([3, 0, 4, 2, 1])
    moved = [leaves[0], *(t.detach()[expert_of_slot] for t in leaves[1:3]), leaves[3]]
    found = []
    for some, slots in ((leaves, ids), (moved, expert_of_slot.argsort()[ids])):
        mixed, idle = put_idle(some, 2, "bf16")  # which rounds nothing here
        y = experts(*mixed, slots, idle)
        found.append((y, *torch.autograd.grad(y.sum(), (mixed[0], mixed[3]))))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("form", "dtype", "scratches"),
    [
        pytest.param("bf16", torch.bfloat16, 0, id="as-they-lie"),
        pytest.param("bf16", torch.float32, 1, id="cast"),
        pytest.param("int8", torch.bfloat16, 1, id="int8"),
        pytest.param("e4m3", torch.bfloat16, 1, id="e4m3"),
        pytest.param("int8", torch.float32, 1, id="int8-fp32"),
        pytest.param("e4m3", torch.float32, 1, id="e4m3-fp32"),
    ],
)
def test_idle_experts_take_one_scratch_for_all_which_a_rehearsal_sees(
    form: str, dtype: torch.dtype, scratches: int
) -> None:
    width, inner, count, resident = 256, 128, 16, 2
    leaves, ids = draw(4, 1, count, width, inner, dtype, torch.float32)
    mixed, idle = put_idle(leaves, resident, form)
    parts = [part for stack in idle for part in parts_of(stack) if part is not None]
    matrix = 2 * inner * width * torch.empty(0, dtype=dtype).element_size()
    casts = 0 if dtype == torch.float32 else resident * matrix

    def run() -> None:
        y = experts(*mixed, ids, idle)
        torch.autograd.grad(y, mixed, torch.ones_like(y))

    run()
    with LiveBytes().ignore(*mixed, ids, *parts) as live:
        run()
    expected = 3 * inner * width * 4 * resident + casts + scratches * matrix  # the gradients, as dx is made
    slack = 48 * 1024  # rows of four tokens
    assert expected <= live.peak < expected + slack < expected + matrix
    if dtype == torch.float32:  # the allocator's own word; bf16 products take scratch of oneDNN's there
        decoding = 6 * 2 * inner * width if form == "e4m3" else 0  # a chunk at work, at most `idle.CHUNK` elements
        assert hidden_bytes(run) <= live.peak + slack + decoding


@each_form
def test_idle_copies_are_saved_as_they_lie(form: str) -> None:
    leaves, ids = draw(10, 2, 5, 16, 24, torch.bfloat16, torch.float32)
    mixed, idle = put_idle(leaves, 2, form)
    parts = [part for stack in idle for part in parts_of(stack) if part is not None]
    kept = saved_bytes(lambda: experts(*mixed, ids, idle), [*mixed[1:3], *parts])
    assert kept == 10 * 16 * 2 + 20 * 4 + 20 * 8 + 5 * 8 + 20 * 48 * 2


@each_dtype
@each_form
def test_idle_experts_compile_into_one_graph(form: str, dtype: torch.dtype) -> None:
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    leaves, ids = draw(9, 2, 5, 24, 16, dtype, torch.float32)
    mixed, idle = put_idle(leaves, 2, form)
    compiled = torch.compile(lambda *some: experts(*some, ids, idle), fullgraph=True, backend="aot_eager")
    found = []
    for op in (lambda *some: experts(*some, ids, idle), compiled):
        y = op(*mixed)
        found.append((y, *torch.autograd.grad(y, mixed, torch.ones_like(y))))
    for got, expected in zip(*found, strict=True):
        assert relative_error(got, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("idle", "what"),
    [
        pytest.param((new_idle(2, 8, 6, "int8"), new_idle(3, 6, 4, "int8")), "copies are", id="number"),
        pytest.param((new_idle(2, 8, 6, "int8"), new_idle(2, 4, 6, "int8")), "copies are", id="turned"),
        pytest.param((parts_of(new_idle(2, 8, 6, "int8"))[0], new_idle(2, 6, 4, "int8")), "gate_up", id="bare"),
        pytest.param((new_idle(2, 8, 6, "int8"), torch.ones(2, 6, 4).half()), "down", id="fp16"),
    ],
)
def test_idle_copies_that_cannot_be_right_are_named(idle: tuple[Stack, Stack], what: str) -> None:
    x, gate_up, down, weights = torch.ones(3, 6), torch.ones(5, 8, 6), torch.ones(5, 6, 4), torch.ones(3, 2)
    with pytest.raises(ShapeError, match=f"experts: idle {what}"):
        experts(x, gate_up, down, weights, torch.zeros(3, 2, dtype=torch.int64), idle)


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        pytest.param(0, torch.ones(3, 9), id="x-width"),
        pytest.param(1, torch.ones(5, 8), id="gate_up-not-a-stack"),
        pytest.param(1, torch.ones(5, 7, 6), id="gate_up-odd"),
        pytest.param(2, torch.ones(4, 6, 4), id="down-number-of-experts"),
        pytest.param(3, torch.ones(3, 1), id="weights-choices"),
        pytest.param(4, torch.zeros(3, 2, dtype=torch.int32), id="ids-int32"),
        pytest.param(3, torch.ones(3, 2, dtype=torch.int64), id="weights-integer"),
    ],
)
def test_arguments_that_cannot_be_right_are_named(place: int, wrong: Tensor) -> None:
    right = [torch.ones(3, 6), torch.ones(5, 8, 6), torch.ones(5, 6, 4), torch.ones(3, 2)]
    arguments = [*right, torch.zeros(3, 2, dtype=torch.int64)]
    arguments[place] = wrong
    with pytest.raises(ShapeError, match="experts: "):
        experts(*arguments)
