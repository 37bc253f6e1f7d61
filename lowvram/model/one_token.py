"""One token of each of several texts through the model: what decoding computes, in as few operations as it takes.

The same function as `Transformer.forward` up to rounding, without gradients, losses or checks: at one row the time goes
into reading weights, and into starting operations.

Legend: N rows, D model width, H heads, G key/value heads, K width of a head, C kv_lora_rank, R rotated width,
L = C + R, E experts, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lowvram_kernels.dispatch import card_of, is_on_paper
from lowvram_kernels.swiglu import gated_product
from torch import Tensor

from lowvram.model.attention import GqaAttention, MlaAttention
from lowvram.model.ffn import MoeFfn, SharedExpert, SwiGluFfn
from lowvram.model.linear import Linear, RmsNorm, multiply
from lowvram.model.positions import Turn, rotate_one, turn_at
from lowvram.model.rows import Rows
from lowvram.model.transformer import Transformer


def read_one_token(model: Transformer, token_N: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
    """Read one token behind each text and return the logits after it, [N, V] in dtype.

    token: [N] int64.  What the texts hold grows; counting it is the caller's.
    """
    x_ND = model.embed(token_N, dtype)
    is_mla = model.config.attention.kind == "mla"
    turn = None if model.table is None else turn_at(model.table, rows.position_N, interleaved=is_mla)
    for block in model.blocks:
        attend = _attend_latent if is_mla else _attend
        x_ND = x_ND + attend(block.attention, x_ND, turn, rows)  # type: ignore[operator]
        x_ND = x_ND + (_mix if isinstance(block.ffn, MoeFfn) else _gate)(block.ffn, x_ND)  # type: ignore[operator]
    return read_out(model, _normed(model.norm, x_ND))


def read_out(model: Transformer, stream_ND: Tensor) -> Tensor:
    """Return the logits behind normed streams: [N, V] from [N, D], in their dtype."""
    head_VD = model.head_VD
    return multiply(stream_ND, head_VD) if head_VD.dtype.is_floating_point else model.read_out(stream_ND)


def _normed(norm: RmsNorm, x: Tensor) -> Tensor:
    return F.rms_norm(x.float(), (x.shape[-1],), norm.weight.float(), norm.eps).to(x.dtype)


def _project(layer: Linear, x_ND: Tensor) -> Tensor:
    """Multiply as the layer does; a plain one without what only training needs."""
    is_plain = layer.form == "plain" and layer.weight.dtype.is_floating_point
    return multiply(x_ND, layer.weight) if is_plain else layer(x_ND)


def _attend(layer: GqaAttention, x_ND: Tensor, turn: Turn | None, rows: Rows) -> Tensor:
    y_ND = _normed(layer.norm, x_ND)
    q_NHK = _project(layer.q_proj, y_ND).view(-1, layer.heads, layer.head_dim)
    k_NGK = _project(layer.k_proj, y_ND).view(-1, layer.kv_heads, layer.head_dim)
    v_NGK = _project(layer.v_proj, y_ND).view(-1, layer.kv_heads, layer.head_dim)
    if layer.q_norm is not None and layer.k_norm is not None:
        q_NHK, k_NGK = _normed(layer.q_norm, q_NHK), _normed(layer.k_norm, k_NGK)
    if turn is not None:
        q_NHK, k_NGK = rotate_one(q_NHK, turn), rotate_one(k_NGK, turn)
    out_ND = rows.attend(layer.layer, q_NHK, k_NGK, v_NGK, layer.scale, layer.slope_H)
    return _project(layer.o_proj, out_ND)


def _attend_latent(layer: MlaAttention, x_ND: Tensor, turn: Turn | None, rows: Rows) -> Tensor:
    """W_uk moves to the query and W_uv behind the sum: the latents are keys and values of all heads."""
    assert turn is not None, "MLA goes with RoPE"
    config, y_ND = layer.config, _normed(layer.norm, x_ND)
    if config.q_lora_rank is None:
        q_ND = _project(layer.q_proj, y_ND)
    else:
        q_ND = _project(layer.q_b_proj, _normed(layer.q_a_norm, _project(layer.q_a_proj, y_ND)))
    q_NHK = q_ND.view(-1, config.heads, config.query_dim)
    new_NL = _project(layer.kv_a_proj, y_ND)
    q_nope, q_rope = q_NHK.split([config.nope_dim, config.rope_dim], dim=-1)
    latent_NC, k_rope_NR = new_NL.split([config.kv_lora_rank, config.rope_dim], dim=-1)
    turned = rotate_one(torch.cat([q_rope, k_rope_NR[:, None]], dim=1), turn)
    up_k_HNC, up_v_HVC = layer.up_matrices(x_ND.dtype)
    q_latent_NHC = torch.bmm(q_nope.transpose(0, 1), up_k_HNC).transpose(0, 1)
    q_NHL = torch.cat([q_latent_NHC, turned[:, :-1]], dim=-1)
    new_NL = torch.cat([_normed(layer.kv_a_norm, latent_NC), turned[:, -1]], dim=-1)
    mixed_NHC = rows.attend_latent(layer.layer, q_NHL, new_NL, config.kv_lora_rank, layer.scale)
    out_HNV = torch.bmm(mixed_NHC.transpose(0, 1), up_v_HVC.mT)
    return _project(layer.o_proj, out_HNV.transpose(0, 1).flatten(1))


def _gate(layer: SwiGluFfn, x_ND: Tensor) -> Tensor:
    return _swiglu(layer, _normed(layer.norm, x_ND))


def _swiglu(layer: SwiGluFfn | SharedExpert, y_ND: Tensor) -> Tensor:
    return _project(layer.down_proj, gated_product(_project(layer.gate_up_proj, y_ND)))


def _mix(layer: MoeFfn, x_ND: Tensor) -> Tensor:
    stacks = layer.gate_up_EHD, layer.down_EDI
    is_plain = layer.form == "plain" and layer.slot_E is None and stacks[0].dtype.is_floating_point
    if not is_plain or len(x_ND) > 1 or is_on_paper() or card_of(x_ND.device).platform != "cpu":
        return layer(x_ND[None])[0][0]
    # One row on a processor: the few experts it goes to are matrices like any other, and the rest are not looked at.
    y_ND = _normed(layer.norm, x_ND)
    out_ND = _swiglu(layer.shared, y_ND)
    weight_NK, id_NK = layer.router.choose(y_ND)
    for weight, expert in zip(weight_NK[0].tolist(), id_NK[0].tolist(), strict=True):
        product = gated_product(multiply(y_ND, stacks[0][expert])).mul_(weight)
        out_ND += multiply(product, stacks[1][expert])
    return out_ND
