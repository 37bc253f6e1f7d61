"""Attention of one query per sequence over a latent cache: MLA's absorbed form, for decoding.

    score_bhs = scale · (q_latent_bh · latent_bs + q_rope_bh · rope_bs)        for the positions s that b sees
    out_bh    = Σ_s softmax(score_bh)_s · latent_bs

Sequence b sees its first lengths[b] positions, or the last `window` of these; what lies elsewhere is never used, NaN
neither.  The latent is both keys and values, so it is read once and no head has keys of its own.  Its numbers are
floating, or bytes of E4M3 with one fp32 scale, a power of two, for 128 of a position's channels (`e4m3.py`).

On a card the positions are cut into splits, as many as fill its multiprocessors; a second kernel joins them in their
order:  with m = max_i m_i,  out = Σ_i 2^(m_i − m) partial_i / Σ_i 2^(m_i − m) total_i.  The result is deterministic;
another batch or capacity may split otherwise and so round otherwise.
Products are of q's dtype with fp32 sums.  In bf16 a decoded byte is exact.  In fp16 it is as exact as a cache of fp16:
what is beyond 65,504 becomes infinite and the result NaN, and scales below 2⁻¹⁵ lose last bits.  fp32 has no tensor
cores that keep its digits, so it takes the plain form everywhere, and so do C above 512 and R above 128.

Alive inside, on a card: partial [B, H, I, C] and two [B, H, I], fp32.  In the plain form: a copy of the cache in q's
dtype, one in fp32 while bytes are decoded, and three [B, H, S].
Moved: the seen positions of the cache once for all heads, q, the result; the partial results twice.
Operations: 2·(2C + R) for each head and seen position.

Sources: DeepSeek-AI 2024 (DeepSeek-V2), section 2.1.2 (absorbed matrices); Dao et al. 2023, "Flash-Decoding for
long-context inference" (splits); Milakov & Gimelshein 2018, "Online normalizer calculation for softmax".

Shapes: B sequences, H heads, S capacity in positions, C latent channels, R rotated channels, K scales = ⌈C/128⌉,
I splits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowvram_kernels.dispatch import Card, Launch, Tile, bytes_of, card_of, choose, converts_e4m3, launch
from lowvram_kernels.errors import ShapeError
from lowvram_kernels.opaque import opaque
from lowvram_kernels.quant import e4m3
from lowvram_kernels.quant.quantise import BLOCK, QuantTensor, quantise_rows
from lowvram_kernels.remembered import remembered

_MOST_CHANNELS, _MOST_ROTATED = 512, 128
# Rows of the smallest product on tensor cores; of one tile's heads.  More heads are more tiles, which find the cache
# in L2.
_HEADS = 16
# Two programs for each multiprocessor: one loads while the other computes.
_PROGRAMS = 2
# Of a split at least: its partial result is written and read, and weighs as much as two tiles of cache.
_LEAST_TILES = 2
_JOINED_SPLITS, _JOINED_CHANNELS = 8, 128


# A tile is heads × positions of the cache, or transposed; the depth of its first product is all the channels.
_NARROW = Tile(_HEADS, 64, _MOST_CHANNELS, 4, 3)
_WIDE = Tile(_HEADS, 32, _MOST_CHANNELS, 8, 3)
_WIDE_SHALLOW = Tile(_HEADS, 32, _MOST_CHANNELS, 8, 2)
# Transposed, a warp holds fewer queries in registers.  Wide rows of bytes need that, since the next ones wait in
# registers too.  Others gain on Hopper, where four warps are then enough and two programs share a multiprocessor;
# elsewhere Triton does not pipeline the form.
_TRANSPOSED = Tile(32, _HEADS, _MOST_CHANNELS, 4, 3)
_TRANSPOSED_CODED = Tile(32, _HEADS, _MOST_CHANNELS, 8, 3)


def reference(
    q_latent: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    rope: Tensor,
    lengths: Tensor,
    scale: float,
    latent_scale: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Attend sequence by sequence, in q's dtype, which may be fp64."""
    out = torch.zeros_like(q_latent)
    for index, length in enumerate(lengths.tolist()):
        seen = slice(max(0, length - window) if window else 0, length)
        c_SC, k_SR = latent[index, seen].to(q_latent.dtype), rope[index, seen].to(q_latent.dtype)
        if latent_scale is not None:
            values = latent[index, seen].view(torch.float8_e4m3fn).to(q_latent.dtype)
            c_SC = values * latent_scale[index, seen].to(q_latent.dtype).repeat_interleave(BLOCK, 1)[:, : c_SC.shape[1]]
        score_HS = scale * (q_latent[index] @ c_SC.mT + q_rope[index] @ k_SR.mT)
        if length:
            out[index] = score_HS.softmax(-1) @ c_SC
    return out


def has_kernel(q_latent: Tensor, rope: Tensor) -> bool:
    """Say whether the Triton kernel, and not the plain form, takes such a query and cache.

    q_latent: [..., C], rope: [..., R].
    """
    is_half = q_latent.dtype in (torch.bfloat16, torch.float16)
    is_narrow = q_latent.shape[-1] <= _MOST_CHANNELS and rope.shape[-1] <= _MOST_ROTATED
    return is_half and is_narrow and choose("latent_attention", card_of(q_latent.device)).backend == "triton"


@remembered
def choose_attention_tile(card: Card, channels: int, rotated: int, is_coded: bool) -> Tile:
    """Choose a tile for C and R; is_coded: the cache is bytes."""
    width = _padded(channels)
    if width <= 128:
        return _NARROW
    if width > 256 and (is_coded or card.capability == (9, 0)):
        return _TRANSPOSED_CODED if is_coded else _TRANSPOSED
    return _WIDE if _shared_bytes(_WIDE, width, _padded(rotated), is_coded) <= card.shared_bytes else _WIDE_SHALLOW


def count_splits(card: Card, batch: int, heads: int, positions: int, tile: Tile) -> int:
    """Return into how many splits the positions are cut: enough programs for the card, some tiles for each."""
    programs = batch * -(-heads // _HEADS)
    most = -(-positions // (_positions_of(tile) * _LEAST_TILES))
    return min(max(1, _PROGRAMS * card.multiprocessors // programs), most)


def _is_transposed(tile: Tile) -> bool:
    """Say whether heads are the columns of a tile's products."""
    return tile.rows != _HEADS


def _positions_of(tile: Tile) -> int:
    """Return how many positions of the cache a program reads at a time."""
    return tile.rows if _is_transposed(tile) else tile.columns


def _padded(width: int) -> int:
    """Return the power of two, 16 or more, that a product takes a width for."""
    return max(16, 1 << (width - 1).bit_length())


def _shared_bytes(tile: Tile, width: int, rotated: int, is_coded: bool) -> int:
    """Return what a program keeps in shared memory, of 16-bit numbers: queries, the tiles under way, some scores."""
    positions = _positions_of(tile)
    queries, tile_latent, tile_rope = _HEADS * (width + rotated), positions * width, positions * rotated
    ahead = tile.stages - 1
    scales = ahead * positions * width // BLOCK * 4 if is_coded else 0
    return 2 * (queries + tile_latent * (1 if is_coded else ahead) + ahead * tile_rope) + scales + 1024


def _launch_both(
    q_latent: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    rope: Tensor,
    latent_scale: Tensor | None,
    lengths: Tensor,
    out: Tensor,
    partial: Tensor,
    largest: Tensor,
    total: Tensor,
    scale: float,
    window: int,
    tile: list[int],
) -> None:
    chosen = Tile(*tile)
    batch, heads, splits, channels = partial.shape
    rotated = rope.shape[2]
    tensors = (q_latent, q_rope, latent, rope)
    strides = [stride for tensor in tensors for stride in tensor.stride()[:2]]
    strides += latent_scale.stride()[:2] if latent_scale is not None else (0, 0)
    arguments = (*tensors, latent_scale, lengths, partial, largest, total, *strides, heads, latent.shape[1], splits)
    constants = {"C": channels, "CHANNELS": _padded(channels), "R": rotated, "ROTATED": _padded(rotated)}
    constants |= {"HEADS": _HEADS, "POSITIONS": _positions_of(chosen), "TURNED": _is_transposed(chosen)}
    constants["NATIVE"] = converts_e4m3(out.device)
    what = Launch(
        "attention.latent_attention_triton",
        "attend_kernel",
        (-(-heads // _HEADS), splits, batch),
        (*arguments, window, scale * math.log2(math.e)),
        constants,
        chosen.warps,
        chosen.stages,
        {torch.bfloat16: "bf16", torch.float16: "f16"}.get(q_latent.dtype, ""),
    )
    seen = batch * min(window, latent.shape[1])
    position_bytes = channels * latent.element_size() + rotated * rope.element_size()
    position_bytes += 4 * latent_scale.shape[2] if latent_scale is not None else 0
    flops = 2.0 * heads * seen * (2 * channels + rotated)
    launch(what, flops, seen * position_bytes + bytes_of(q_latent, q_rope, partial, largest, total))
    width = min(_padded(channels), _JOINED_CHANNELS)
    grid = (batch * heads, -(-channels // width))
    constants = {"C": channels, "CHANNELS": width, "SPLITS": _JOINED_SPLITS}
    what = Launch(
        "attention.latent_attention_triton", "combine_kernel", grid, (partial, largest, total, out, splits), constants
    )
    launch(what, moved=(partial, largest, total, out))


# One op, which a compiler does not look into; its memory is allocated outside, where a rehearsal sees it.
_attend = opaque("latent_attention", _launch_both, ("out", "partial", "largest", "total"))


def on_card(
    q_latent: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    rope: Tensor,
    lengths: Tensor,
    scale: float,
    latent_scale: Tensor | None,
    window: int | None,
    tile: Tile | None = None,
    splits: int | None = None,
) -> Tensor:
    """Compute `latent_attention` by the kernels; tile, splits: instead of the chosen ones."""
    card = card_of(q_latent.device)
    batch, heads, channels = q_latent.shape
    capacity = latent.shape[1]
    window = capacity if window is None else min(window, capacity)
    tile = tile or choose_attention_tile(card, channels, rope.shape[2], latent_scale is not None)
    splits = splits or count_splits(card, batch, heads, window, tile)
    out = q_latent.new_empty(batch, heads, channels)
    partial = q_latent.new_empty(batch, heads, splits, channels, dtype=torch.float32)
    largest, total = (q_latent.new_empty(batch, heads, splits, dtype=torch.float32) for _ in range(2))
    q_latent, q_rope = (q if q.stride(2) == 1 else q.contiguous() for q in (q_latent, q_rope))
    _attend(
        q_latent, q_rope, latent, rope, latent_scale, lengths, out, partial, largest, total, scale, window, list(tile)
    )
    return out


def _plain(
    q_latent: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    rope: Tensor,
    lengths: Tensor,
    scale: float,
    latent_scale: Tensor | None,
    window: int | None,
) -> Tensor:
    """Attend in plain PyTorch: every score exists, no head's keys do."""
    dtype, (_, capacity, channels) = q_latent.dtype, latent.shape
    place_S = torch.arange(capacity, device=latent.device)
    seen_BS = place_S < lengths[:, None]
    if window is not None:
        seen_BS &= place_S >= lengths[:, None] - window
    if latent_scale is not None:
        spread_BSC = latent_scale.repeat_interleave(BLOCK, 2)[..., :channels]
        latent = e4m3.decode(latent, torch.float32).mul_(spread_BSC)
    # Zeros where nothing is seen, since a weight of zero does not stop NaN.
    latent, rope = (x.to(dtype).masked_fill(~seen_BS[..., None], 0.0) for x in (latent, rope))
    score_BHS = torch.einsum("bhc,bsc->bhs", q_latent, latent) + torch.einsum("bhr,bsr->bhs", q_rope, rope)
    hidden_B1S = ~seen_BS[:, None]
    weight_BHS = (score_BHS.float() * scale).masked_fill_(hidden_B1S, -torch.inf).softmax(-1)
    # Nothing seen is 0/0, which must not be NaN.
    return torch.einsum("bhs,bsc->bhc", weight_BHS.masked_fill_(hidden_B1S, 0.0).to(dtype), latent)


def latent_attention(
    q_latent: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    rope: Tensor,
    lengths: Tensor,
    scale: float,
    latent_scale: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Attend with one query per sequence and head to the positions of a latent cache that the sequence has filled.

    q_latent: [B, H, C], q_rope: [B, H, R] fp32|bf16|fp16, the query after W_uk and its rotated part.  latent: [B, S, C]
    fp32|bf16|fp16, or uint8, bytes of E4M3; rope: [B, S, R], floating; both may be views of one [B, S, C + R], their
    last dimension contiguous.  lengths: [B] int32, on the same device, from 0 to S.  latent_scale: fp32 [B, S, ⌈C/128⌉]
    for bytes, and only for these.  window: each query sees the last so many positions at most.
    Returns [B, H, C] in q's dtype: zeros where the length is 0, NaN where anything seen is NaN.  Not differentiable.
    Raises ShapeError if shapes, dtypes or devices do not fit together.
    Source: DeepSeek-AI 2024 (DeepSeek-V2), section 2.1.2.
    """
    _check(q_latent, q_rope, latent, rope, lengths, latent_scale, window)
    run = on_card if has_kernel(q_latent, rope) else _plain
    return run(q_latent, q_rope, latent, rope, lengths, scale, latent_scale, window)


def encode_latent(latent: Tensor) -> QuantTensor:
    """Round rows of a latent cache to E4M3.

    latent: [..., C] fp32|bf16|fp16.  Returns code [..., C] uint8, scale [..., ⌈C/128⌉] fp32: what `latent_attention`
    takes as latent and latent_scale.  128 channels with NaN or infinity among them come back as NaN.
    Raises ShapeError if latent is not floating.
    """
    code, scale = quantise_rows(latent.reshape(-1, latent.shape[-1]), "e4m3")
    return QuantTensor(code.view(latent.shape), scale.view(*latent.shape[:-1], -1))


def _check(
    q_latent: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    rope: Tensor,
    lengths: Tensor,
    latent_scale: Tensor | None,
    window: int | None,
) -> None:
    tensors = [q_latent, q_rope, latent, rope]
    fits = all(tensor.dim() == 3 and tensor.numel() for tensor in tensors) and lengths.dim() == 1
    if fits:
        (batch, heads, channels), (capacity, rotated) = q_latent.shape, rope.shape[1:]
        fits = q_rope.shape == (batch, heads, rotated) and latent.shape == (batch, capacity, channels)
        fits = fits and rope.shape[0] == batch and lengths.shape[0] == batch
    if not fits:
        shapes = [list(tensor.shape) for tensor in (*tensors, lengths)]
        raise ShapeError(f"latent_attention: got {shapes}; needs [B, H, C], [B, H, R], [B, S, C], [B, S, R] and [B].")
    if any(tensor.device != q_latent.device for tensor in (*tensors, lengths)):
        raise ShapeError(f"latent_attention: q is on {q_latent.device}, lengths on {lengths.device}; needs one device.")
    if lengths.dtype != torch.int32 or not lengths.is_contiguous():
        raise ShapeError(f"latent_attention: lengths is {lengths.dtype}; needs int32, contiguous.")
    if latent.stride(2) != 1 or rope.stride(2) != 1:
        strides = [list(tensor.stride()) for tensor in (latent, rope)]
        raise ShapeError(f"latent_attention: latent and rope have strides {strides}; the last needs to be 1.")
    floating = [tensor for tensor in tensors if tensor is not latent or latent_scale is None]
    if q_latent.dtype != q_rope.dtype or not all(tensor.dtype.is_floating_point for tensor in floating):
        dtypes = [tensor.dtype for tensor in tensors]
        raise ShapeError(f"latent_attention: got {dtypes}; needs q's two alike, and all floating but a coded latent.")
    if latent_scale is not None:
        needed = [*latent.shape[:2], -(-latent.shape[2] // BLOCK)]
        found = f"latent is {latent.dtype}, latent_scale {list(latent_scale.shape)} {latent_scale.dtype}"
        is_scale = latent_scale.dtype == torch.float32 and latent_scale.stride(-1) == 1
        is_scale = is_scale and latent_scale.device == latent.device
        if latent.dtype != torch.uint8 or list(latent_scale.shape) != needed or not is_scale:
            raise ShapeError(f"latent_attention: {found}; needs uint8 and fp32 {needed} beside it, contiguous.")
    if window is not None and window < 1:
        raise ShapeError(f"latent_attention: window is {window}; needs 1 or more.")
