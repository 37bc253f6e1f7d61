"""The whole network (embedding, blocks, final norm, head); knows neither loss nor data.

Legend: B batch, T tokens, D model width, V vocabulary, E experts.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from lowvram_kernels.layers.dropout import dropout
from lowvram_kernels.layers.embedding import embedding
from lowvram_kernels.matmul.kept_casts import KeptCasts
from lowvram_kernels.matmul.kept_codes import KeptCodes
from lowvram_kernels.matmul.linear import linear
from lowvram_kernels.matmul.quant_linear import MatmulFormat
from lowvram_kernels.matmul.weight_only import decoded, look_up, weight_only_linear
from lowvram_kernels.quant.quantise import QuantTensor
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowvram.config.model import ModelConfig
from lowvram.config.plan import Recompute
from lowvram.config.train import Rotation
from lowvram.model.attention import GqaAttention, MlaAttention, Table
from lowvram.model.ffn import MoeFfn, SwiGluFfn
from lowvram.model.kv_cache import CacheSlot
from lowvram.model.linear import ParamOptions, RmsNorm
from lowvram.model.positions import RotaryTable

_READ_BY_HEADS = "kv_b_proj.weight"  # each head multiplies its own part, from the left and from the right
INIT_STD = 0.02  # GPT-2's; the seed report uses it too
_SITES = 2  # dropout sites in a block: after attention, after the feed-forward layer


class Dropout(NamedTuple):
    """What decides which values are dropped: a rate, and one key per sample of the batch, [B] int64."""

    rate: float
    key_B: Tensor


class Block(nn.Module):
    """Attention and a feed-forward layer; each reads the normalised residual stream and adds to it."""

    def __init__(self, config: ModelConfig, layer: int, options: ParamOptions) -> None:
        super().__init__()
        self.layer = layer
        self.attention: GqaAttention | MlaAttention
        if config.attention.kind == "mla":
            self.attention = MlaAttention(config, config.attention, layer, options)
        else:
            self.attention = GqaAttention(config, config.attention, layer, options)
        self.ffn: SwiGluFfn | MoeFfn
        if config.ffn.kind == "moe" and config.is_moe(layer):
            self.ffn = MoeFfn(config.dim, config.ffn, config.norm_eps, options)
        else:
            self.ffn = SwiGluFfn(config.dim, config.ffn.hidden, config.norm_eps, options)

    def forward(
        self,
        x_BTD: Tensor,
        table: Table,
        drop: Dropout | None,
        cache: CacheSlot | None,
        recompute: Recompute = "none",
        added_BTD: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the residual stream, what is to be added to it, both [B, T, D], and a MoE layer's loads [E] or None.

        added: what is to be added to x.  The next norm adds it in its own pass.
        """
        attention = _recomputed(self.attention) if recompute == "attention" else self.attention
        x_BTD, out_BTD = attention(x_BTD, table, cache, added_BTD)
        added_BTD, load_E = self._dropped(out_BTD, drop, site=0), None
        if isinstance(self.ffn, MoeFfn):
            x_BTD, out_BTD, load_E = self.ffn(x_BTD, added_BTD)
        else:
            x_BTD, out_BTD = self.ffn(x_BTD, added_BTD)
        return x_BTD, self._dropped(out_BTD, drop, site=1), load_E

    def whole(self, *given: Any) -> tuple[Tensor, Tensor | None]:
        """Return `forward`'s stream with all that is to be added to it, and the loads."""
        x_BTD, added_BTD, load_E = self(*given)
        return x_BTD + added_BTD, load_E

    def _dropped(self, out_BTD: Tensor, drop: Dropout | None, site: int) -> Tensor:
        if drop is None or drop.rate == 0.0:
            return out_BTD
        return dropout(out_BTD, drop.rate, drop.key_B, 1 + self.layer * _SITES + site)


class Transformer(nn.Module):
    """A decoder built from a ModelConfig, with weights drawn from `seed`; if it is None, they stay uninitialised.

    dtype: of the matrices; norms and routers are always fp32.  rotation: how many experts of a layer are weights, and
    in which format the others are stored; `train/rotation.py` initialises those others.  matmul_format: the number
    format of the products in the blocks.  is_hollow: matrices have no memory, see `ParamOptions`.
    """

    embedding_scale: Tensor | None
    head_scale: Tensor | None

    def __init__(
        self,
        config: ModelConfig,
        seed: int | None = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        rotation: Rotation | None = None,
        matmul_format: MatmulFormat = "plain",
        is_hollow: bool = False,
    ) -> None:
        super().__init__()
        self.config, options = config, ParamOptions(device, dtype, rotation, matmul_format, is_hollow)
        self.matmul_format = matmul_format
        self.embedding = options.matrix(config.vocabulary, config.dim)
        self.register_buffer("embedding_scale", None)
        self.register_buffer("head_scale", None)
        self.blocks = nn.ModuleList(Block(config, layer, options) for layer in range(config.layers))
        self.norm = RmsNorm(config.dim, config.norm_eps, device)
        if not config.tied:
            self.head = options.matrix(config.vocabulary, config.dim)
        self.table = None
        if config.positions.kind == "rope":
            self.table = RotaryTable(config.positions, config.attention.rope_dim, device)
        self.is_compiled = False  # whether the blocks go through torch.compile now
        # 16-bit copies or codes of the weights, where the plan keeps them; only gradients are computed with them.
        self.kept_casts: KeptCasts | None = None
        if seed is not None:
            initialise(self, seed)

    def keep_casts(self, dtype: torch.dtype) -> None:
        """Make the copies of the matrices that are multiplied: in dtype, or as codes where products are of 8 bits.

        `kept_casts.refresh` fills them.
        """
        skipped = {self.embedding, self.head_VD, *(layer.router.weight for layer in self.moe_layers())}
        in_blocks = [weight for weight in self.parameters() if weight.dim() > 1 and weight not in skipped]
        layers = [block.attention for block in self.blocks if isinstance(block, Block)]
        viewed = [layer.joinable_weights() for layer in layers]
        if self.matmul_format == "plain":
            self.kept_casts = KeptCasts([*in_blocks, self.head_VD], dtype, viewed)
            return
        groups = [layer.weights_of_norm() for layer in layers]
        codes = KeptCodes(in_blocks, self.matmul_format, groups, viewed)
        self.kept_casts = KeptCasts([self.head_VD], dtype, codes=codes)

    @property
    def head_VD(self) -> Tensor:
        """The output matrix [V, D] as it is stored, perhaps as codes; if the two are tied, it is the embedding."""
        return self.head_parts()[0]

    def head_matrix(self, dtype: torch.dtype) -> Tensor:
        """Return the output matrix in dtype, [V, D]: the matrix itself if it has that dtype, else a copy."""
        return decoded(*self.head_parts(), dtype)

    def head_parts(self) -> tuple[Tensor, Tensor | None]:
        """Return the output matrix as it is stored and the scales of its codes, None where it is plain."""
        return (self.embedding, self.embedding_scale) if self.config.tied else (self.head, self.head_scale)

    def embed(self, token_BT: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return the rows of the embedding, [B, T, D] in dtype (None: the dtype of the weights, or fp32 for codes)."""
        if self.embedding_scale is not None:
            return look_up(token_BT, QuantTensor(self.embedding, self.embedding_scale), dtype or torch.float32)
        return embedding(token_BT, self.embedding, dtype)

    def read_out(self, stream_D: Tensor) -> Tensor:
        """Return the logits of normalised hidden states: [..., V] from [..., D], in their dtype."""
        head_VD, scale = self.head_parts()
        if scale is not None:
            return weight_only_linear(stream_D, QuantTensor(head_VD, scale))
        return linear(stream_D, head_VD)

    def forward(
        self,
        token_BT: Tensor,
        dtype: torch.dtype | None = None,
        drop: Dropout | None = None,
        cache: CacheSlot | None = None,
        recompute: Recompute = "none",
    ) -> tuple[Tensor, Tensor | None]:
        """Return the normalised hidden states [B, T, D] in `dtype` and the loads of all experts [MoE layers, E].

        dtype: None for that of the weights.  With a cache, the tokens continue its sequence and are stored in it.
        recompute: what backward computes again.
        """
        x_BTD = self.embed(token_BT, dtype)
        if drop is not None and drop.rate > 0.0:
            x_BTD = dropout(x_BTD, drop.rate, drop.key_B, 0)
        start = cache.length if cache is not None else 0
        table: Table = self.table(start, token_BT.shape[1]) if self.table is not None else None
        first = self.blocks[0].attention
        if cache is None and isinstance(first, GqaAttention) and first.slope_H is not None:
            table = first.alibi_columns(token_BT.shape[1], x_BTD.dtype)
        loads = []
        # What a block adds is passed on to the next norm, except where that would have to be kept for recomputation,
        # and where blocks are compiled: the first one, to which nothing is added, would be a graph of its own.
        added_BTD: Tensor | None = None
        for block in self.blocks:
            assert isinstance(block, Block), "the list holds nothing else"
            if recompute == "none" and not self.is_compiled:
                x_BTD, added_BTD, load_E = block(x_BTD, table, drop, cache, recompute, added_BTD)
            else:
                run = _recomputed(block.whole) if recompute == "block" else block.whole
                x_BTD, load_E = run(x_BTD, table, drop, cache, recompute)
            if load_E is not None:
                loads.append(load_E)
        if cache is not None:
            cache.advance(token_BT.shape[1])
        _, normed_BTD = self.norm.add(x_BTD, added_BTD)
        return normed_BTD, torch.stack(loads) if loads else None

    def logits(self, token_BT: Tensor, dtype: torch.dtype | None = None, cache: CacheSlot | None = None) -> Tensor:
        """Return the logits of every position, [B, T, V] in `dtype`; for a loss use `linear_cross_entropy`."""
        stream_BTD, _ = self(token_BT, dtype, cache=cache)
        return self.read_out(stream_BTD)

    def moe_layers(self) -> list[MoeFfn]:
        """Return the layers that have experts, in the order of the rows of `forward`'s loads."""
        return [block.ffn for block in self.blocks if isinstance(block.ffn, MoeFfn)]


def _recomputed(layer: Callable[..., Any]) -> Callable[..., Any]:
    """Save only the layer's inputs, and compute the layer again in backward (Chen et al. 2016).

    No RNG state is saved: dropout is keyed, and nothing that routing depends on changes within a step.
    """
    return functools.partial(checkpoint, layer, use_reentrant=False, preserve_rng_state=False)


@torch.no_grad()
def lay_by_columns(model: Transformer) -> Transformer:
    """Change how plain weights lie in memory on a CPU so that decoding is fastest; shapes and values stay equal.

    The weights of queries, keys and values of GQA become views of one matrix.  In fp32, matrices with more outputs than
    inputs become column-major: one row times such a matrix is a sum of long columns; many rows are as fast as before.
    Measured: EPYC (AVX2), torch 2.13, one thread: 0.31 ms against 0.54 at 2816×512, 3.4 against 5.0 at 32768×512; at
    512×1408 0.26 against 0.21.  It works in place and needs memory for one more matrix.  For inference only.
    MLA's `kv_b_proj` becomes fp32, since heads multiply parts of it: both products of a token took 170 µs in bf16 and
    take 20 (Xeon with AMX, torch 2.13, 8 heads of 64 and 96 over 192 latents).
    """
    for block in model.blocks:
        if isinstance(block.attention, GqaAttention):
            block.attention.join_projections()
        elif isinstance(block.attention, MlaAttention):
            block.attention.widen_by_head()
    for name, weight in model.named_parameters():
        rows, columns = weight.shape[-2:] if weight.dim() > 1 else (0, 0)
        is_by_columns = rows > 0 and weight.stride(-2) == 1
        if weight.dtype == torch.float32 and rows > columns and not is_by_columns and not name.endswith(_READ_BY_HEADS):
            weight.data = weight.data.mT.contiguous().mT
    return model


@torch.no_grad()
def initialise(model: Transformer, seed: int) -> None:
    """Draw every matrix from N(0, 0.02²) and set norms to 1; output projections are scaled by 1 / √(2 · layers).

    Each weight has a generator keyed by seed and name, so its initial values depend on nothing else.
    """
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            weight.fill_(1.0)
        else:
            draw_(weight, name, seed, model.config)


@torch.no_grad()
def draw_(weight: Tensor, name: str, seed: int, config: ModelConfig) -> None:
    """Draw one matrix, or a stack of matrices, as `initialise` does; its values depend on seed, name and shape."""
    key = hashlib.sha256(f"{seed}/initialise/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))
    drawn = torch.empty(weight.shape, dtype=torch.float32).normal_(0.0, INIT_STD, generator=generator)
    if name.endswith(("o_proj.weight", "down_proj.weight", "down_EDI")):
        drawn *= 1.0 / math.sqrt(2 * config.layers)
    weight.copy_(drawn)
