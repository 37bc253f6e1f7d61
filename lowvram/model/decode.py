"""Decodes one token of each of several sequences, with as few operations as possible; knows no sampling and no text.

It computes the same as `Transformer.forward` up to rounding, without gradients, losses or checks: for one row, the time
is spent on reading weights and on launching operations.

Legend: N rows (one row may be a vector, without N), D model width, H heads, G key/value heads, K width of a head,
C kv_lora_rank, R rotated width, L = C + R, E experts, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict

import torch
import torch.nn.functional as F
from lowvram_kernels.layers.swiglu import gated_product
from lowvram_kernels.quant.quantise import QuantTensor, join_parts
from torch import Tensor

from lowvram.model.attention import GqaAttention, MlaAttention
from lowvram.model.ffn import MoeFfn, SharedExpert, SwiGluFfn
from lowvram.model.linear import Linear, RmsNorm, multiply
from lowvram.model.positions import Turn, rotate_one, turn_at
from lowvram.model.slot_attention import SlotAttention
from lowvram.model.transformer import Block, Transformer


def decode_one_token(model: Transformer, token_N: Tensor, rows: SlotAttention, dtype: torch.dtype) -> Tensor:
    """Append one token to each sequence and return the logits after it, [N, V] in dtype.

    token: [N] int64.  The token is stored in the cache; the caller must advance the sequences' lengths.
    """
    x_ND = model.embed(token_N, dtype)
    is_vector = x_ND.shape[0] == 1 and x_ND.device.type == "cpu"
    if is_vector:
        x_ND = x_ND[0]  # one row is a vector, [D]: reshaping it back and forth costs as much as a small sum
    is_mla = model.config.attention.kind == "mla"
    turn = None if model.table is None else turn_at(model.table, rows.position_N, interleaved=is_mla)
    for block in model.blocks:
        assert isinstance(block, Block), "a Transformer has no other blocks"
        attention, ffn = block.attention, block.ffn
        if isinstance(attention, MlaAttention):
            x_ND = x_ND + _attend_latent(attention, x_ND, turn, rows)
        else:
            x_ND = x_ND + _attend(attention, x_ND, turn, rows)
        x_ND = x_ND + (_moe_ffn(ffn, x_ND) if isinstance(ffn, MoeFfn) else _dense_ffn(ffn, x_ND))
    logit_NV = read_out(model, _normed(model.norm, x_ND))
    return logit_NV[None] if is_vector else logit_NV


def read_out(model: Transformer, stream_ND: Tensor) -> Tensor:
    """Return the logits of normalised hidden states, [N, V] from [N, D] or [V] from [D], in their dtype."""
    return multiply(stream_ND, join_parts(*model.head_parts()))


def _normed(norm: RmsNorm, x: Tensor) -> Tensor:
    wide, weight_D = x.float(), norm.weight.float()
    if x.dim() == 1:
        # For one row, a mean that is computed as a Python number takes a third of the time of F.rms_norm.
        mean = float(torch.dot(wide, wide)) / x.shape[0]
        return torch.mul(wide, weight_D).mul_((mean + norm.eps) ** -0.5).to(x.dtype)
    return F.rms_norm(wide, (x.shape[-1],), weight_D, norm.eps).to(x.dtype)


def _project(layer: Linear, x_ND: Tensor) -> Tensor:
    """Multiply as the layer does; a plain layer skips what only training needs."""
    is_plain = layer.matmul_format == "plain"
    return multiply(x_ND, join_parts(layer.weight, layer.weight_scale)) if is_plain else layer(x_ND)


def _attend(layer: GqaAttention, x_ND: Tensor, turn: Turn | None, rows: SlotAttention) -> Tensor:
    y_ND = _normed(layer.norm, x_ND)
    heads, groups, width = layer.heads, layer.kv_heads, layer.head_dim
    if layer.qkv is None:
        parts = [_project(to, y_ND).view(-1, width) for to in (layer.q_proj, layer.k_proj, layer.v_proj)]
        q_NHK, k_NGK, v_NGK = (part.view(-1, n, width) for part, n in zip(parts, (heads, groups, groups), strict=True))
        qk_NHK = torch.cat([q_NHK, k_NGK], dim=1)
    else:
        qk_NHK, v_NGK = multiply(y_ND, layer.qkv).view(-1, heads + 2 * groups, width).split([heads + groups, groups], 1)
    if layer.q_norm is not None and layer.k_norm is not None:
        q_NHK, k_NGK = qk_NHK.split([heads, groups], 1)
        qk_NHK = torch.cat([_normed(layer.q_norm, q_NHK), _normed(layer.k_norm, k_NGK)], dim=1)
    if turn is not None:
        qk_NHK = rotate_one(qk_NHK, turn)
    q_NHK, k_NGK = qk_NHK.split([heads, groups], 1)
    out_ND = rows.attend(layer.layer, q_NHK, k_NGK, v_NGK, layer.scale, layer.slope_H)
    return _project(layer.o_proj, out_ND.view(-1) if x_ND.dim() == 1 else out_ND)


def _attend_latent(layer: MlaAttention, x_ND: Tensor, turn: Turn | None, rows: SlotAttention) -> Tensor:
    """Apply W_uk to the query and W_uv after the weighted sum, so that the latents are keys and values of all heads."""
    assert turn is not None, "MLA needs RoPE"
    config, y_ND = layer.config, _normed(layer.norm, x_ND)
    if config.q_lora_rank is None:
        q_ND = _project(layer.q_proj, y_ND)
    else:
        q_ND = _project(layer.q_b_proj, _normed(layer.q_a_norm, _project(layer.q_a_proj, y_ND)))
    q_NHK = q_ND.view(-1, config.heads, config.query_dim)
    new_NL = _project(layer.kv_a_proj, y_ND).view(-1, config.kv_lora_rank + config.rope_dim)
    q_nope, q_rope = q_NHK.split([config.nope_dim, config.rope_dim], dim=-1)
    latent_NC, k_rope_NR = new_NL.split([config.kv_lora_rank, config.rope_dim], dim=-1)
    rotated = rotate_one(torch.cat([q_rope, k_rope_NR[:, None]], dim=1), turn)
    # In fp32 where the matrices are: a cast of a row costs less than one of a matrix.
    wide = torch.float32 if layer.kv_b_proj.weight.dtype == torch.float32 else x_ND.dtype
    up_k_HNC, up_v_HVC = layer.up_matrices(wide)
    q_latent_NHC = torch.bmm(q_nope.transpose(0, 1).to(wide), up_k_HNC).transpose(0, 1).to(x_ND.dtype)
    q_NHL = torch.cat([q_latent_NHC, rotated[:, :-1]], dim=-1)
    normed_NC = _normed(layer.kv_a_norm, latent_NC[0])[None] if x_ND.dim() == 1 else _normed(layer.kv_a_norm, latent_NC)
    new_NL = torch.cat([normed_NC, rotated[:, -1]], dim=-1)
    mixed_NHC = rows.attend_latent(layer.layer, q_NHL, new_NL, config.kv_lora_rank, layer.scale)
    out_HNV = torch.bmm(mixed_NHC.transpose(0, 1).to(wide), up_v_HVC.mT).to(x_ND.dtype)
    return _project(layer.o_proj, out_HNV.transpose(0, 1).reshape(*x_ND.shape[:-1], -1))


def _dense_ffn(layer: SwiGluFfn, x_ND: Tensor) -> Tensor:
    return _swiglu(layer, _normed(layer.norm, x_ND))


def _swiglu(layer: SwiGluFfn | SharedExpert, y_ND: Tensor) -> Tensor:
    return _project(layer.down_proj, gated_product(_project(layer.gate_up_proj, y_ND)))


def _moe_ffn(layer: MoeFfn, x_ND: Tensor) -> Tensor:
    is_plain = layer.matmul_format == "plain" and layer.slot_E is None
    if not is_plain or x_ND.device.type != "cpu":
        return layer(x_ND.view(1, -1, x_ND.shape[-1]))[1].view(x_ND.shape)
    # On a CPU only the experts that a row chose are multiplied, as ordinary matrices.
    y_ND = _normed(layer.norm, x_ND)
    out_ND = _swiglu(layer.shared, y_ND)
    weight_NK, id_NK = layer.router(y_ND.view(-1, y_ND.shape[-1]))
    if x_ND.dim() == 1:
        for weight, expert in zip(weight_NK[0].tolist(), id_NK[0].tolist(), strict=True):
            gate_up, down = _matrices_of(layer, expert)
            out_ND += multiply(gated_product(multiply(y_ND, gate_up)).mul_(weight), down)
        return out_ND
    rows = defaultdict[int, list[int]](list)
    for row, experts in enumerate(id_NK.tolist()):
        for expert in experts:
            rows[expert].append(row)
    for expert in sorted(rows):
        gate_up, down = _matrices_of(layer, expert)
        row_R = torch.tensor(rows[expert])
        weight_R1 = weight_NK[row_R].masked_fill(id_NK[row_R] != expert, 0.0).sum(-1, keepdim=True)
        product_RI = gated_product(multiply(y_ND[row_R], gate_up)).mul_(weight_R1)
        out_ND.index_add_(0, row_R, multiply(product_RI, down))
    return out_ND


def _matrices_of(layer: MoeFfn, expert: int) -> tuple[Tensor | QuantTensor, Tensor | QuantTensor]:
    """Return an expert's two matrices: gate and up, and down."""
    gate_up, down = layer.gate_up_EHD_scale, layer.down_EDI_scale
    return (
        join_parts(layer.gate_up_EHD[expert], None if gate_up is None else gate_up[expert]),
        join_parts(layer.down_EDI[expert], None if down is None else down[expert]),
    )
