"""The attention layers (GQA and MLA), for training and for decoding with a cache; knows no feed-forward layer.

Legend: B batch, T queries, S keys, D model width, H heads, G key/value heads, K width of a query and key,
V width of a value, C kv_lora_rank, R half the rotated width, W window.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lowvram_kernels.attention.mla_heads import mla_heads_
from lowvram_kernels.attention.sdpa import attention
from lowvram_kernels.attention.widened_heads import widened_heads
from lowvram_kernels.dispatch import runs_kernels
from lowvram_kernels.layers.rotary import rotate
from lowvram_kernels.quant.quantise import QuantTensor
from torch import Tensor, nn

from lowvram.config.architecture import Gqa, Mla
from lowvram.config.model import ModelConfig
from lowvram.model.fp32_buffers import Fp32Buffers
from lowvram.model.kv_cache import CacheSlot
from lowvram.model.linear import Linear, ParamOptions, RmsNorm, project
from lowvram.model.positions import AlibiColumns, add_alibi_columns, alibi_columns, slopes

# Cosines and sines of the positions, or ALiBi's columns; None where a model has neither or a layer makes its own.
Table = tuple[Tensor, Tensor] | AlibiColumns | None


def attend(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSV: Tensor, scale: float, window: int | None = None) -> Tensor:
    """Return causal attention of the last T of S tokens over all S, or over the last `window` keys of each query.

    Returns [B, H, T, V].  Values narrower than keys are padded: fused kernels refuse unequal widths.
    """
    queries, keys, value_width = q_BHTK.shape[2], k_BGSK.shape[2], v_BGSV.shape[3]
    v_BGSK = F.pad(v_BGSV, (0, k_BGSK.shape[3] - value_width)) if value_width != k_BGSK.shape[3] else v_BGSV
    if queries == keys:
        if window is None or window >= keys:
            out = attention(q_BHTK, k_BGSK, v_BGSK, scale, causal=True)
        else:
            out = _sliding_window(q_BHTK, k_BGSK, v_BGSK, scale, window)
    elif queries == 1:
        first = max(0, keys - window) if window is not None else 0
        out = attention(q_BHTK, k_BGSK[:, :, first:], v_BGSK[:, :, first:], scale)
    else:
        mask_TS = _visibility_mask(queries, keys, window, q_BHTK.device)
        out = attention(q_BHTK, k_BGSK, v_BGSK, scale, mask=mask_TS)
    return out[..., :value_width]


def _visibility_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    distance_TS = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)[None]
    visible_TS = distance_TS >= 0
    return visible_TS if window is None else visible_TS & (distance_TS < window)


def _sliding_window(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, scale: float, window: int) -> Tensor:
    """Let blocks of `window` queries attend to their own and the previous block of keys; nothing is T × T in size."""
    length = q_BHTK.shape[2]
    padding = -length % window
    q, k, v = (F.pad(x, (0, 0, 0, padding)) for x in (q_BHTK, k_BGTK, v_BGTK))
    blocks = q.shape[2] // window

    def fold(x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, window)).transpose(1, 2).flatten(0, 1)

    def with_previous(x: Tensor) -> Tensor:
        x_BNGWK = x.unflatten(2, (blocks, window)).transpose(1, 2)
        return torch.cat([x_BNGWK[:, :-1], x_BNGWK[:, 1:]], dim=3).flatten(0, 1)

    first = attention(q[:, :, :window], k[:, :, :window], v[:, :, :window], scale, causal=True)
    mask = _visibility_mask(window, 2 * window, window, q.device)
    rest = attention(fold(q[:, :, window:]), with_previous(k), with_previous(v), scale, mask=mask)
    rest = rest.unflatten(0, (q.shape[0], blocks - 1)).transpose(1, 2).flatten(2, 3)
    return torch.cat([first, rest], dim=2)[:, :, :length]


class GqaAttention(Fp32Buffers):
    """Grouped-query attention with RoPE or ALiBi."""

    slope_H: Tensor | None

    def __init__(self, model: ModelConfig, config: Gqa, layer: int, options: ParamOptions) -> None:
        super().__init__()
        self.layer, self.window = layer, model.window_of(layer)
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        yarn = model.positions.yarn if model.positions.kind == "rope" else None
        self.scale = self.head_dim**-0.5 * (yarn.magnitude**2 if yarn else 1.0)
        self.norm = RmsNorm(model.dim, model.norm_eps, options.device)
        self.q_proj = Linear(model.dim, config.heads * config.head_dim, options)
        self.k_proj = Linear(model.dim, config.kv_heads * config.head_dim, options)
        self.v_proj = Linear(model.dim, config.kv_heads * config.head_dim, options)
        self.o_proj = Linear(config.heads * config.head_dim, model.dim, options)
        self.q_norm = RmsNorm(config.head_dim, model.norm_eps, options.device) if config.qk_norm else None
        self.k_norm = RmsNorm(config.head_dim, model.norm_eps, options.device) if config.qk_norm else None
        # The weights of the three projections as one matrix, of which theirs are views: see `lay_by_columns`.
        self.qkv: Tensor | QuantTensor | None = None
        slope_H = slopes(config.heads).to(options.device or "cpu") if model.positions.kind == "alibi" else None
        self.register_buffer("slope_H", slope_H, persistent=False)

    @torch.no_grad()
    def join_projections(self) -> None:
        """Make the weights of the three projections views of one matrix, which is column-major in fp32.

        Codes of INT8 are joined too, with their scales; those of E4M3 have scales of whole blocks and stay apart.
        """
        layers = (self.q_proj, self.k_proj, self.v_proj)
        if self.q_proj.matmul_format != "plain" or any(layer.weight.dtype == torch.uint8 for layer in layers):
            return
        qkv, heights = torch.cat([layer.weight for layer in layers]), [layer.weight.shape[0] for layer in layers]
        if qkv.dtype == torch.float32:
            qkv = qkv.mT.contiguous().mT
        for layer, part in zip(layers, qkv.split(heights), strict=True):
            layer.weight.data = part
        scales = [layer.weight_scale for layer in layers if layer.weight_scale is not None]
        if scales:
            joined = torch.cat(scales)
            for layer, part in zip(layers, joined.split(heights), strict=True):
                layer.weight_scale = part
        self.qkv = QuantTensor(qkv, joined) if scales else qkv

    def joinable_weights(self) -> tuple[Tensor, ...]:
        """Return the weights whose products may be views of one: those of a whole that is kept for backward anyway."""
        # Queries and keys are kept for their norms; where all three are widened for ALiBi, the whole lives no longer.
        is_widened = self.slope_H is not None and runs_kernels("rms_norm", self.q_proj.weight.device)
        return self.weights_of_norm() if self.q_norm is not None or is_widened else ()

    def weights_of_norm(self) -> tuple[Tensor, ...]:
        """Return the weights that multiply the rows of the layer's norm."""
        return self.q_proj.weight, self.k_proj.weight, self.v_proj.weight

    def forward(
        self, x_BTD: Tensor, table: Table, cache: CacheSlot | None = None, added_BTD: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attend causally over the norm of x + added, and over the cache if there is one.

        x, added: [B, T, D].  Returns x + added, with which the residual stream goes on, and attention's output.
        """
        layers = (self.q_proj, self.k_proj, self.v_proj)
        x_BTD, (q, k, v) = project(self.norm, x_BTD, *layers, added=added_BTD)
        q_BTHK = q.unflatten(-1, (self.heads, self.head_dim))
        k_BTGK = k.unflatten(-1, (self.kv_heads, self.head_dim))
        v_BTGK = v.unflatten(-1, (self.kv_heads, self.head_dim))
        q_BTHK, k_BTGK = self._position(q_BTHK, self.q_norm, table), self._position(k_BTGK, self.k_norm, table)
        if self.slope_H is not None and cache is None:
            columns = table if isinstance(table, AlibiColumns) else self.alibi_columns(k_BTGK.shape[1], k_BTGK.dtype)
            q_BTHK, k_BTGK, v_BTGK = widened_heads(q_BTHK, k_BTGK, v_BTGK, *columns)
        q_BHTK, k_BGSK, v_BGSK = q_BTHK.transpose(1, 2), k_BTGK.transpose(1, 2), v_BTGK.transpose(1, 2)
        if cache is not None:
            k_BGSK, v_BGSK = cache.store_keys(self.layer, k_BTGK, v_BTGK)
            if self.slope_H is not None:
                columns = self.alibi_columns(k_BGSK.shape[2], k_BGSK.dtype)
                q_BHTK, k_BGSK = add_alibi_columns(q_BHTK, k_BGSK, columns)
        out_BHTK = attend(q_BHTK, k_BGSK, v_BGSK, self.scale, self.window)
        return x_BTD, self.o_proj(out_BHTK[..., : self.head_dim].transpose(1, 2).flatten(2))

    def alibi_columns(self, keys: int, dtype: torch.dtype) -> AlibiColumns:
        """Return ALiBi's columns for so many keys, which are the same in every layer."""
        assert self.slope_H is not None, "only models with ALiBi have slopes"
        return alibi_columns(self.slope_H, self.scale, keys, self.head_dim, dtype)

    def _position(self, x_BTHK: Tensor, norm: RmsNorm | None, table: Table) -> Tensor:
        """Normalise the values of each head and rotate them, each where the model has it."""
        if table is None or isinstance(table, AlibiColumns):
            return x_BTHK if norm is None else norm(x_BTHK)
        weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
        return rotate(x_BTHK, table, False, weight, eps)


class MlaAttention(nn.Module):
    """Multi-head latent attention: the expanded form for training, the absorbed form for decoding with a cache."""

    def __init__(self, model: ModelConfig, config: Mla, layer: int, options: ParamOptions) -> None:
        super().__init__()
        self.layer, self.window, self.config = layer, model.window_of(layer), config
        yarn = model.positions.yarn if model.positions.kind == "rope" else None
        self.scale = config.query_dim**-0.5 * (yarn.magnitude**2 if yarn else 1.0)
        self.norm = RmsNorm(model.dim, model.norm_eps, options.device)
        queries = config.heads * config.query_dim
        if config.q_lora_rank is None:
            self.q_proj = Linear(model.dim, queries, options)
        else:
            self.q_a_proj = Linear(model.dim, config.q_lora_rank, options)
            self.q_a_norm = RmsNorm(config.q_lora_rank, model.norm_eps, options.device)
            self.q_b_proj = Linear(config.q_lora_rank, queries, options)
        self.kv_a_proj = Linear(model.dim, config.kv_lora_rank + config.rope_dim, options)
        self.kv_a_norm = RmsNorm(config.kv_lora_rank, model.norm_eps, options.device)
        self.kv_b_proj = Linear(config.kv_lora_rank, config.heads * (config.nope_dim + config.value_dim), options)
        self.o_proj = Linear(config.heads * config.value_dim, model.dim, options)

    def joinable_weights(self) -> tuple[Tensor, ...]:
        """Return the weights whose products may be views of one: those of a whole that is kept for backward anyway."""
        # Both latents are kept for their norms; queries are kept too where they are turned in their product's memory.
        return self.weights_of_norm() if runs_kernels("rms_norm", self.kv_a_proj.weight.device) else ()

    def weights_of_norm(self) -> tuple[Tensor, ...]:
        """Return the weights that multiply the rows of the layer's norm."""
        return (self.q_proj if self.config.q_lora_rank is None else self.q_a_proj).weight, self.kv_a_proj.weight

    def forward(
        self, x_BTD: Tensor, table: Table, cache: CacheSlot | None = None, added_BTD: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attend causally over the norm of x + added, and over the cache if there is one.

        x, added: [B, T, D].  Returns x + added, with which the residual stream goes on, and attention's output.
        """
        assert table is not None, "MLA needs RoPE"
        x_BTD, q_BTHK, latent_BTC, k_rope_BTR = self._project(x_BTD, added_BTD)
        if cache is None:
            out_BTHV = self._expanded(q_BTHK, latent_BTC, k_rope_BTR, table)
        else:
            q_BTHK = rotate(q_BTHK, table, interleaved=True)
            k_rope_BTR = rotate(k_rope_BTR.unsqueeze(2), table, interleaved=True).squeeze(2)
            new_BTL = torch.cat([self.kv_a_norm(latent_BTC), k_rope_BTR], dim=-1)
            cached_BSL = cache.store_latent(self.layer, new_BTL)
            attend_cache = self._absorbed if x_BTD.shape[1] < self._min_expanded_queries else self._expanded_cache
            out_BTHV = attend_cache(q_BTHK, cached_BSL)
        return x_BTD, self.o_proj(out_BTHV.flatten(2))

    def _project(self, x_BTD: Tensor, added_BTD: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return x + added, queries [B, T, H, K], latents before their norm [B, T, C], rotated keys [B, T, 2R]."""
        config = self.config
        if config.q_lora_rank is None:
            x_BTD, (q, latent) = project(self.norm, x_BTD, self.q_proj, self.kv_a_proj, added=added_BTD)
        else:
            x_BTD, (q_latent, latent) = project(self.norm, x_BTD, self.q_a_proj, self.kv_a_proj, added=added_BTD)
            _, (q,) = project(self.q_a_norm, q_latent, self.q_b_proj)
        latent_BTC, k_rope = latent.split([config.kv_lora_rank, config.rope_dim], dim=-1)
        return x_BTD, q.unflatten(-1, (config.heads, config.query_dim)), latent_BTC, k_rope

    def _expanded(self, q_BTHK: Tensor, latent_BTC: Tensor, k_rope_BTR: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        """Attend with k = [W_uk c | k_rope], v = W_uv c and c = norm(latent), so every head has keys and values."""
        _, (kv,) = project(self.kv_a_norm, latent_BTC, self.kv_b_proj)
        heads = mla_heads_(q_BTHK, self._by_head(kv), k_rope_BTR, table)
        q_BHTK, k_BHTK, v_BHTK = (x_BTHK.transpose(1, 2) for x_BTHK in heads)
        out_BHTK = attend(q_BHTK, k_BHTK, v_BHTK, self.scale, self.window)
        return out_BHTK[..., : self.config.value_dim].transpose(1, 2)

    def _by_head(self, kv: Tensor) -> Tensor:
        """Return keys without positions beside values, of each head: [B, T, H, N + V]."""
        return kv.unflatten(-1, (self.config.heads, self.config.nope_dim + self.config.value_dim))

    def _expanded_cache(self, q_BTHK: Tensor, cached_BSL: Tensor) -> Tensor:
        """Attend to the expanded cache; the expanded keys and values of a layer live only during this call."""
        config = self.config
        latent_BSC, k_rope_BSR = cached_BSL.split([config.kv_lora_rank, config.rope_dim], dim=-1)
        k_nope, v_BSHV = self._by_head(self.kv_b_proj(latent_BSC)).split([config.nope_dim, config.value_dim], dim=-1)
        k_BSHK = torch.cat([k_nope, k_rope_BSR.unsqueeze(2).expand(-1, -1, config.heads, -1)], dim=-1)
        q_BHTK, k_BHSK, v_BHSV = (x.transpose(1, 2) for x in (q_BTHK, k_BSHK, v_BSHV))
        return attend(q_BHTK, k_BHSK, v_BHSV, self.scale, self.window).transpose(1, 2)

    def _absorbed(self, q_BTHK: Tensor, cached_BSL: Tensor) -> Tensor:
        """Apply W_uk to the query and W_uv after the weighted sum, so that the latents serve as keys and values."""
        up_k_HNC, up_v_HVC = self.up_matrices(q_BTHK.dtype)
        q_nope, q_rope = q_BTHK.split([self.config.nope_dim, self.config.rope_dim], dim=-1)
        q_latent = torch.einsum("bthn,hnc->bhtc", q_nope, up_k_HNC)
        mixed_BTHC = self._attend_latents(torch.cat([q_latent, q_rope.transpose(1, 2)], dim=-1), cached_BSL)
        return torch.einsum("bthc,hvc->bthv", mixed_BTHC, up_v_HVC)

    def up_matrices(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return W_uk [H, nope_dim, C] and W_uv [H, V, C] in dtype; they are views if the weight is in that dtype."""
        config = self.config
        up = self.kv_b_proj.matrix(dtype).view(config.heads, config.nope_dim + config.value_dim, config.kv_lora_rank)
        up_k_HNC, up_v_HVC = up.split([config.nope_dim, config.value_dim], dim=1)
        return up_k_HNC, up_v_HVC

    @torch.no_grad()
    def widen_by_head(self) -> None:
        """Make `kv_b_proj` fp32 where it is in 16 bits."""
        layer = self.kv_b_proj
        if layer.weight.dtype in (torch.bfloat16, torch.float16):
            layer.weight = nn.Parameter(layer.weight.float(), requires_grad=layer.weight.requires_grad)

    @property
    def _min_expanded_queries(self) -> float:
        """The number of queries from which on the expanded form costs less than the absorbed one.

        Expanding costs C·(N + V) per head and position once.  Each query then costs N + R + V per head and position;
        in the absorbed form it costs 2C + R.
        """
        config = self.config
        expanded = config.nope_dim + config.value_dim
        saved = 2 * config.kv_lora_rank - expanded
        return config.kv_lora_rank * expanded / saved if saved > 0 else torch.inf

    def _attend_latents(self, q_BHTL: Tensor, cached_BSL: Tensor) -> Tensor:
        """Return the weighted sums of the cached latents for the last T tokens: [B, T, H, C]."""
        queries, keys = q_BHTL.shape[2], cached_BSL.shape[1]
        score_BHTS = torch.einsum("bhtl,bsl->bhts", q_BHTL, cached_BSL).float() * self.scale
        hidden_TS = ~_visibility_mask(queries, keys, self.window, score_BHTS.device)
        weight_BHTS = score_BHTS.masked_fill(hidden_TS, -torch.inf).softmax(-1).to(q_BHTL.dtype)
        return torch.einsum("bhts,bsc->bthc", weight_BHTS, cached_BSL[..., : self.config.kv_lora_rank])
