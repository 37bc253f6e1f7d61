"""The feed-forward layers: SwiGLU, and a mixture of experts with its router; knows no attention.

Legend: B batch, T tokens, D model width, N = B·T, E experts, K experts of a token, I hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from lowvram_kernels.layers.norm_swiglu import norm_swiglu
from lowvram_kernels.layers.swiglu import gated_product, swiglu
from lowvram_kernels.moe.experts import experts
from lowvram_kernels.moe.idle import Stack, new_idle
from lowvram_kernels.moe.routing import route
from lowvram_kernels.moe.sorting import sort_choices
from lowvram_kernels.quant.quantise import QuantTensor, join_parts, parts_of
from torch import Tensor, nn

from lowvram.config.architecture import Moe
from lowvram.model.fp32_buffers import Fp32Buffers
from lowvram.model.linear import DEFAULT_OPTIONS, Linear, ParamOptions, RmsNorm, project


class SwiGluFfn(nn.Module):
    """A dense SwiGLU layer whose gate and up projections are one matrix."""

    def __init__(self, dim: int, hidden: int, eps: float, options: ParamOptions = DEFAULT_OPTIONS) -> None:
        super().__init__()
        self.norm = RmsNorm(dim, eps, options.device)
        self.gate_up_proj = Linear(dim, 2 * hidden, options)
        self.down_proj = Linear(hidden, dim, options)

    def forward(self, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x, added: [..., D].  Returns x + added, with which the residual stream goes on, and SwiGLU of its norm."""
        up, down, norm = self.gate_up_proj, self.down_proj, self.norm
        if up.weight_scale is None and down.weight_scale is None:
            return norm_swiglu(x, norm.weight, up.weight, down.weight, norm.eps, up.matmul_format, added)
        stream, (gate_up,) = project(norm, x, up, added=added)
        return stream, _gate_and_project(gate_up, down)


def _gate_and_project(gate_up: Tensor, down_proj: Linear) -> Tensor:
    if down_proj.weight_scale is not None:
        return down_proj(gated_product(gate_up))
    return swiglu(gate_up, down_proj.weight, down_proj.matmul_format)


class SharedExpert(nn.Module):
    """The shared expert that every token passes through: SwiGLU of rows that are already normalised."""

    def __init__(self, dim: int, hidden: int, options: ParamOptions = DEFAULT_OPTIONS) -> None:
        super().__init__()
        self.gate_up_proj = Linear(dim, 2 * hidden, options)
        self.down_proj = Linear(hidden, dim, options)

    def forward(self, x_ND: Tensor) -> Tensor:
        """x: [N, D].  Returns [N, D]."""
        return _gate_and_project(self.gate_up_proj(x_ND), self.down_proj)


class Router(Fp32Buffers):
    """Chooses each token's experts by sigmoid score plus a balancing bias, and weighs them by the score alone.

    The bias is used for selection only, has no gradient and is updated by the function `balance`.
    Source: DeepSeek-V3, section 2.1.2 (auxiliary-loss-free load balancing).
    """

    bias_E: Tensor

    def __init__(self, dim: int, config: Moe, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.top_k, self.scale, self.rate = config.top_k, config.route_scale, config.balance_rate
        self.weight = nn.Parameter(torch.empty(config.experts, dim, device=device))
        self.register_buffer("bias_E", torch.zeros(config.experts, device=device))

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights [N, K] fp32 and expert ids [N, K]."""
        return route(x_ND, self.weight, self.bias_E, self.top_k, self.scale)


@torch.no_grad()
def balance(routers: list[Router], load_LE: Tensor) -> None:
    """Raise the biases of experts that were chosen less than their layer's mean, lower the others, by `rate`."""
    move_LE = (load_LE.mean(-1, keepdim=True) - load_LE).sign()
    torch._foreach_add_([router.bias_E for router in routers], list(move_LE.unbind()), alpha=routers[0].rate)


class MoeFfn(Fp32Buffers):
    """Routed experts and shared ones; no token is dropped.

    With expert rotation, the experts in the window are weights in the first slots.  The others are frozen: they are
    low-precision copies in buffers, which are used in forward but not trained.  `slot_E` holds each expert's slot;
    only `place_experts` changes it.
    In inference all experts may be 8-bit codes; their scales are then in buffers beside the stacks.
    """

    slot_E: Tensor | None
    gate_up_EHD_scale: Tensor | None
    down_EDI_scale: Tensor | None
    # Only with expert rotation; copies in bf16 have no scales.
    idle_gate_up_code: Tensor
    idle_gate_up_scale: Tensor | None
    idle_down_code: Tensor
    idle_down_scale: Tensor | None

    def __init__(self, dim: int, config: Moe, eps: float, options: ParamOptions = DEFAULT_OPTIONS) -> None:
        super().__init__()
        self.norm = RmsNorm(dim, eps, options.device)
        self.router = Router(dim, config, options.device)
        hidden = config.expert_hidden
        self.window = window = config.experts if options.rotation is None else options.rotation.window
        self.gate_up_EHD = options.matrix(window, 2 * hidden, dim)
        self.down_EDI = options.matrix(window, dim, hidden)
        self.matmul_format = options.matmul_format
        self.shared = SharedExpert(dim, config.shared * hidden, options)
        self.register_buffer("gate_up_EHD_scale", None)
        self.register_buffer("down_EDI_scale", None)
        self.register_buffer("slot_E", None, persistent=False)
        # Set while master weights are used instead of the copies: returns those of the idle slots of this layer.
        self.read_masters: Callable[[], tuple[Stack, Stack]] | None = None
        if options.rotation is None:
            return
        self.slot_E = torch.arange(config.experts, device=options.device)
        idle = config.experts - window
        for name, rows, columns in (("gate_up", 2 * hidden, dim), ("down", dim, hidden)):
            stack = new_idle(idle, rows, columns, options.rotation.idle, options.device)
            for part, tensor in zip(("code", "scale"), parts_of(stack), strict=True):
                self.register_buffer(f"idle_{name}_{part}", tensor, persistent=False)

    def forward(self, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x, added: [B, T, D].  Returns x + added, the experts' output for its norm, [B, T, D], and their loads [E]."""
        stream, normed = self.norm.add(x, added)
        x_ND = normed.flatten(0, 1)
        weight_NK, id_NK = self.router(x_ND)
        chosen, idle = sort_choices(id_NK, self.router.bias_E.shape[0], self.slot_E), None
        if self.slot_E is not None:
            idle = self.idle() if self.read_masters is None else self.read_masters()
        gate_up: Tensor = self.gate_up_EHD
        down: Tensor = self.down_EDI
        if self.gate_up_EHD_scale is not None and self.down_EDI_scale is not None:
            # All experts are frozen copies, so none is resident.
            idle = QuantTensor(gate_up, self.gate_up_EHD_scale), QuantTensor(down, self.down_EDI_scale)
            gate_up, down = (x_ND.new_empty(0, *stack.shape[1:]) for stack in (gate_up, down))
        shared_ND = self.shared(x_ND)
        out_ND = experts(x_ND, gate_up, down, weight_NK, chosen, idle, self.matmul_format, added=shared_ND)
        return stream, out_ND.unflatten(0, x.shape[:2]), chosen.load

    def idle(self) -> tuple[Stack, Stack]:
        """Return the copies of the frozen experts: gate and up, and down."""
        gate_up = join_parts(self.idle_gate_up_code, self.idle_gate_up_scale)
        return gate_up, join_parts(self.idle_down_code, self.idle_down_scale)

    def place_experts(self, slots: Sequence[int]) -> None:
        """Set the slot of each expert; the first slots are those of the window."""
        assert self.slot_E is not None, "only where experts rotate"
        self.slot_E.copy_(torch.tensor(slots))
