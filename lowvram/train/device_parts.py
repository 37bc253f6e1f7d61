"""The parts of a model, each computed on a device and on the processor at the shapes of a run; judges nothing.

The batch on the device is made of few sequences that return again and again (every third is zeros), so what each row
and each sum of gradients must be follows from those few, which the processor computes in fp32: every row is compared,
and the processor does a small part of the work.  Zeros, and a prime number of rows, keep a fault that reads a row some
power of two before or after from finding the same numbers there.

Legend: B batch, T tokens, N = B·T, D model width, V vocabulary, S sequences and R rows that the processor computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from lowvram_kernels.layers.embedding import embedding
from lowvram_kernels.loss.linear_cross_entropy import linear_cross_entropy
from lowvram_kernels.matmul.quant_linear import MatmulFormat
from lowvram_kernels.moe.idle import write_copy_
from torch import Tensor, nn

from lowvram.config.model import ModelConfig
from lowvram.config.plan import Plan
from lowvram.config.train import TrainConfig
from lowvram.model.attention import GqaAttention, MlaAttention, Table
from lowvram.model.ffn import MoeFfn, SwiGluFfn
from lowvram.model.linear import ParamOptions
from lowvram.model.positions import RotaryTable
from lowvram.model.transformer import INIT_STD, Block, draw_
from lowvram.objective import DTYPES, MATMUL_FORMATS

# Tokens of the sequences that the processor computes: two of them, or one where two are longer.  Of a block with 45
# million weights that takes 14 seconds of one core (Xeon with AVX-512, torch 2.13).
_MOST_TOKENS = 2_048
# Rows of the head that the processor computes; a prime, so that no power of two is a multiple of it.
_HEAD_ROWS = 127
_SEED = 0
# How near to a tie the scores of two experts may be before rounding decides: a part of the router's weights' norm.
_TIES = {"fp32": 2.0**-10, "fp16": 2.0**-9, "bf16": 2.0**-7, "fp8": 2.0**-7, "int8": 2.0**-7}


Kind = Literal["embedding", "attention", "ffn", "head"]


class Part(NamedTuple):
    """A part of a model that is checked.  layer: the number of the first block that has it, 0 outside of blocks."""

    name: str
    kind: Kind
    layer: int = 0


class Setup(NamedTuple):
    """What parts are computed with, and how large."""

    model: ModelConfig
    train: TrainConfig
    plan: Plan
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations between layers."""
        return DTYPES[self.train.precision]

    @property
    def weights(self) -> torch.dtype:
        """The dtype in which matrices are kept."""
        return DTYPES[self.train.weights]

    @property
    def rows(self) -> int:
        """Tokens of a micro-batch."""
        return self.plan.micro_batch * self.train.seq_len


class Compared(NamedTuple):
    """A tensor, or some rows of it, as it was found and as it should be.  scale: the root mean square of all of it."""

    name: str
    found: Tensor
    expected: Tensor
    scale: float


def list_parts(model: ModelConfig) -> tuple[Part, ...]:
    """Return a model's embedding, its head, and each kind of attention and of feed-forward layer that it has."""
    ends = (Part("the embedding", "embedding"), Part("the head and its loss", "head"))
    parts: dict[str, Part] = {}
    for layer in range(model.layers):
        window = model.window_of(layer)
        name = "attention" if window is None else f"attention to the last {window} tokens"
        parts.setdefault(name, Part(name, "attention", layer))
        name = "the experts" if model.is_moe(layer) else "the feed-forward layer"
        parts.setdefault(name, Part(name, "ffn", layer))
    return *ends, *parts.values()


def compute(part: Part, setup: Setup) -> Iterator[Compared]:
    """Compute a part forward and backward, and yield its outputs and gradients."""
    if part.kind == "embedding":
        return _embed(setup)
    return _read_out(setup) if part.kind == "head" else _run_layer(part, setup)


def shape_of(part: Part, setup: Setup) -> tuple[int, ...]:
    """Return the shape of a part's input on the device."""
    if part.kind == "head":
        return setup.rows, setup.model.dim
    shape = (setup.plan.micro_batch, setup.train.seq_len)
    return shape if part.kind == "embedding" else (*shape, setup.model.dim)


def _whole(name: str, found: Tensor, expected: Tensor) -> Compared:
    return Compared(name, found, expected, _scale_of(expected))


def _gradient_of(tensor: Tensor) -> Tensor:
    """Return the gradient that backward has left."""
    assert tensor.grad is not None, "everything takes part"
    return tensor.grad


def _scale_of(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt())


def _draw(seed: int, *shape: int) -> Tensor:
    """Return normal numbers that 16 bits hold exactly, so that no difference comes from rounding them."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(_SEED + seed)).bfloat16().float()


def _embed(setup: Setup) -> Iterator[Compared]:
    model, device = setup.model, setup.device
    table_VD = _draw(1, model.vocabulary, model.dim).mul_(INIT_STD).bfloat16().float()
    generator = torch.Generator().manual_seed(_SEED)
    ids_BT = torch.randint(model.vocabulary, (setup.plan.micro_batch, setup.train.seq_len), generator=generator)
    upstream_RD = _draw(2, _HEAD_ROWS, model.dim)
    row_N = torch.arange(setup.rows) % _HEAD_ROWS
    weight = nn.Parameter(table_VD.to(device, setup.weights))
    out_BTD = embedding(ids_BT.to(device), weight, setup.dtype)
    out_BTD.backward(upstream_RD.to(device, setup.dtype)[row_N.to(device)].view(out_BTD.shape))
    for ids_T, out_TD in zip(ids_BT, out_BTD.detach(), strict=True):
        yield Compared("output", out_TD, table_VD[ids_T], INIT_STD)
    expected_VD = torch.zeros_like(table_VD).index_add_(0, ids_BT.flatten(), upstream_RD[row_N])
    yield _whole("gradient of the table", _gradient_of(weight), expected_VD)


def _read_out(setup: Setup) -> Iterator[Compared]:
    model, device = setup.model, setup.device
    rows = min(_HEAD_ROWS, setup.rows)
    x_RD, head_VD = _draw(3, rows, model.dim), _draw(4, model.vocabulary, model.dim).mul_(INIT_STD).bfloat16().float()
    target_R = torch.randint(model.vocabulary, (rows,), generator=torch.Generator().manual_seed(_SEED))
    row_N = torch.arange(setup.rows) % rows
    count_R = torch.bincount(row_N, minlength=rows)

    x_ND = x_RD.to(device, setup.dtype)[row_N.to(device)].requires_grad_()
    head = nn.Parameter(head_VD.to(device, setup.weights))
    loss = linear_cross_entropy(x_ND, head, target_R[row_N].to(device), setup.plan.loss_chunk)
    loss.backward()

    x_RD.requires_grad_()
    head_VD.requires_grad_()
    loss_R = nn.functional.cross_entropy(x_RD @ head_VD.T, target_R, reduction="none")
    (loss_R * count_R).sum().backward()
    total = (loss_R * count_R).sum().detach()
    yield _whole("loss", loss.detach().reshape(1, 1), total.reshape(1, 1))
    dx_RD, dx_ND = _gradient_of(x_RD) / count_R[:, None], _gradient_of(x_ND)
    scale = _scale_of(dx_RD)
    for start in range(0, setup.rows, setup.train.seq_len):
        end = start + setup.train.seq_len
        yield Compared("gradient of the input", dx_ND[start:end], dx_RD[row_N[start:end]], scale)
    yield _whole("gradient of the head", _gradient_of(head), _gradient_of(head_VD))


Layer = GqaAttention | MlaAttention | SwiGluFfn | MoeFfn


class _Batch(NamedTuple):
    """The layer's input: S sequences, and which of them, or −1 for zeros, each sequence of the batch is.

    Every sum of gradients counts sequence s `count_S[s]` times.
    """

    x_STD: Tensor
    added_STD: Tensor
    upstream_STD: Tensor
    which_B: Tensor
    count_S: Tensor

    def spread(self, x_STD: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the whole batch on a device, [B, T, D]."""
        with_zeros = torch.cat([x_STD, torch.zeros_like(x_STD[:1])]).to(device, dtype)
        return with_zeros[self.which_B.to(device)]


def _draw_batch(setup: Setup) -> _Batch:
    micro_batch, length = setup.plan.micro_batch, setup.train.seq_len
    count = 2 if micro_batch > 1 and 2 * length <= _MOST_TOKENS else 1
    from_end_B = torch.arange(micro_batch).flip(0) % 3
    which_B = torch.where(from_end_B == 2, -1, from_end_B % count)
    x, added, upstream = (_draw(seed, count, length, setup.model.dim) for seed in (5, 6, 7))
    return _Batch(x, added, upstream, which_B, torch.bincount(which_B[which_B >= 0], minlength=count))


def _run_layer(part: Part, setup: Setup) -> Iterator[Compared]:
    batch = _draw_batch(setup)
    truth, own = _build(part, setup, torch.device("cpu"), "plain"), _build_own(part, setup)
    _fill(truth, setup)
    _copy_(own, truth)
    is_clear_ST = torch.ones(batch.x_STD.shape[:2], dtype=torch.bool)
    if isinstance(truth, MoeFfn):
        is_clear_ST = _choose_clearly(truth, batch, _TIES[setup.train.precision])
        batch = batch._replace(upstream_STD=batch.upstream_STD * is_clear_ST[..., None])
    given = (batch.x_STD, batch.added_STD, batch.upstream_STD)
    count_S11 = batch.count_S[:, None, None]
    expected = _run(truth, setup.model, *given[:2], given[2] * count_S11)
    found = _run(own, setup.model, *(batch.spread(each, setup.device, setup.dtype) for each in given))
    pairs = (
        ("stream", found.stream, expected.stream),
        ("output", found.output, expected.output),
        ("gradient of the input", found.gradient, expected.gradient / count_S11),
    )
    for name, found_BTD, expected_STD in pairs:
        scale = _scale_of(expected_STD)
        for sequence, which in enumerate(batch.which_B.tolist()):
            found_TD, expected_TD = found_BTD[sequence].cpu(), expected_STD[which]
            if which >= 0:
                yield Compared(name, found_TD[is_clear_ST[which]], expected_TD[is_clear_ST[which]], scale)
            else:
                yield Compared(name, found_TD, torch.zeros_like(expected_TD), scale)
    for name, weight in truth.named_parameters():
        found_grad, expected_grad = _gradient_of(own.get_parameter(name)), _gradient_of(weight)
        rows = expected_grad.flatten(0, -2) if expected_grad.dim() > 1 else expected_grad[None]
        yield _whole(f"gradient of {name}", found_grad.reshape(rows.shape), rows.float())


def _build(part: Part, setup: Setup, device: torch.device, matmul_format: MatmulFormat) -> Layer:
    """Return a layer with uninitialised weights."""
    options = ParamOptions(device, setup.weights, setup.train.rotation, matmul_format)
    block = Block(setup.model, part.layer, options)
    return block.attention if part.kind == "attention" else block.ffn


def _build_own(part: Part, setup: Setup) -> Layer:
    return _build(part, setup, setup.device, MATMUL_FORMATS[setup.train.precision])


@torch.no_grad()
def _fill(layer: Layer, setup: Setup) -> None:
    """Draw the weights as a new run would, but that 16 bits hold them exactly, and norms are not 1."""
    for number, (name, weight) in enumerate(layer.named_parameters()):
        if weight.dim() == 1:
            weight.copy_(1.0 + 0.125 * _draw(100 + number, *weight.shape))
        else:
            draw_(weight, name, _SEED, setup.model)
        weight.copy_(weight.bfloat16())
    if isinstance(layer, MoeFfn) and layer.slot_E is not None:
        for number, (stack, weight) in enumerate(zip(layer.idle(), (layer.gate_up_EHD, layer.down_EDI), strict=True)):
            for place in range(layer.slot_E.shape[0] - layer.window):
                master = _draw(200 + 1000 * number + place, *weight.shape[1:]).mul_(INIT_STD)
                write_copy_(stack, place, master)


@torch.no_grad()
def _copy_(layer: Layer, truth: Layer) -> None:
    """Give a layer the weights and buffers of another."""
    for name, weight in truth.named_parameters():
        layer.get_parameter(name).copy_(weight)
    for name, buffer in truth.named_buffers():
        layer.get_buffer(name).copy_(buffer)


@torch.no_grad()
def _choose_clearly(layer: MoeFfn, batch: _Batch, ties: float) -> Tensor:
    """Return which tokens are so far from a tie of experts that rounding does not decide for another one: [S, T]."""
    router = layer.router
    normed_STD = layer.norm(batch.x_STD + batch.added_STD)
    score_STE = (normed_STD @ router.weight.float().T).sigmoid() + router.bias_E
    if router.top_k >= score_STE.shape[-1]:
        return torch.ones(score_STE.shape[:2], dtype=torch.bool)
    best_STK = score_STE.topk(router.top_k + 1, dim=-1).values
    return best_STK[..., -2] - best_STK[..., -1] > ties * float(router.weight.float().norm(dim=-1).max())


class _Computed(NamedTuple):
    """What a layer computes.  gradient: of its input."""

    stream: Tensor
    output: Tensor
    gradient: Tensor


def _run(layer: Layer, model: ModelConfig, x_BTD: Tensor, added_BTD: Tensor, upstream_BTD: Tensor) -> _Computed:
    """Run a layer forward, and backward from its output alone: the stream's gradient would hide errors in the rest."""
    length, device, x_BTD = x_BTD.shape[1], x_BTD.device, x_BTD.detach().requires_grad_()
    if isinstance(layer, GqaAttention | MlaAttention):
        table: Table = None
        if isinstance(layer, GqaAttention) and layer.slope_H is not None:
            table = layer.alibi_columns(length, x_BTD.dtype)
        elif model.positions.kind == "rope":
            table = RotaryTable(model.positions, model.attention.rope_dim, device)(0, length)
        stream, output = layer(x_BTD, table, None, added_BTD)
    else:
        stream, output = layer(x_BTD, added_BTD)[:2]
    output.backward(upstream_BTD)
    return _Computed(stream.detach(), output.detach(), _gradient_of(x_BTD))
