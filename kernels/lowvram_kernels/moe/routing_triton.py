"""Triton kernels of a router: scores, choice and weights of each token in one launch, and its gradient in another."""

from __future__ import annotations

import triton
import triton.language as tl

from lowvram_kernels.layers.rms_norm_triton import load_fp32, store_nearest
from lowvram_kernels.layers.swiglu_triton import sigmoid


@triton.jit
def route_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    weights_ptr,
    ids_ptr,
    score_ptr,
    N,
    D,
    E,
    stride,
    factor,
    K: tl.constexpr,
    CHOICES: tl.constexpr,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Choose K of E experts for each of N rows of x, by sigmoid score plus bias: weights, ids and scores, [N, K].

    stride: of x's rows.  CHOICES, EXPERTS: K and E rounded up to powers of two.  COLUMNS: of x at a time.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    expert, place = tl.arange(0, EXPERTS), tl.arange(0, CHOICES)
    is_row, is_expert = row < N, expert < E
    logit = tl.zeros([ROWS, EXPERTS], tl.float32)
    for start in range(0, D, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        in_row = column < D
        x = load_fp32(x_ptr + row[:, None] * stride + column[None, :], is_row[:, None] & in_row[None, :])
        at = weight_ptr + expert[None, :] * D + column[:, None]
        logit = tl.dot(x, load_fp32(at, is_expert[None, :] & in_row[:, None]), logit, input_precision="ieee")
    score = sigmoid(logit)
    key = score + tl.load(bias_ptr + expert, mask=is_expert, other=0.0)[None, :]
    # A row that is not a number still needs experts that exist.
    key = tl.where(key == key, key, float("inf"))
    key = tl.where(is_expert[None, :], key, float("-inf"))
    chosen_score = tl.zeros([ROWS, CHOICES], tl.float32)
    chosen_id = tl.zeros([ROWS, CHOICES], tl.int32)
    for k in tl.static_range(K):
        best = tl.max(key, 1)[:, None]
        candidate = tl.where(key == best, expert[None, :], EXPERTS)
        choice = tl.min(candidate, 1)[:, None]
        is_choice = expert[None, :] == choice
        taken = tl.sum(tl.where(is_choice, score, 0.0), 1)[:, None]
        chosen_score = tl.where(place[None, :] == k, taken, chosen_score)
        chosen_id = tl.where(place[None, :] == k, choice, chosen_id)
        key = tl.where(is_choice, float("-inf"), key)
    total = tl.sum(chosen_score, 1)[:, None] + 1e-20
    at, inside = row[:, None] * K + place[None, :], is_row[:, None] & (place < K)[None, :]
    tl.store(weights_ptr + at, chosen_score / total * factor, mask=inside)
    tl.store(ids_ptr + at, chosen_id.to(tl.int64), mask=inside)
    tl.store(score_ptr + at, chosen_score, mask=inside)


@triton.jit
def route_backward_kernel(
    d_weights_ptr,
    ids_ptr,
    score_ptr,
    x_ptr,
    weight_ptr,
    dx_ptr,
    partial_ptr,
    N,
    D,
    E,
    stride,
    share,
    factor,
    K: tl.constexpr,
    CHOICES: tl.constexpr,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dx [N, D], and each program's sum over its `share` of the rows for the router's weight: [programs, E, D]."""
    first = tl.program_id(1).to(tl.int64) * share
    last = tl.minimum(first + share, N)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    expert, place = tl.arange(0, EXPERTS), tl.arange(0, CHOICES)
    in_weight = (expert < E)[:, None] & (column < D)[None, :]
    matrix_at = expert[:, None] * D + column[None, :]
    weight = load_fp32(weight_ptr + matrix_at, in_weight)
    partial = tl.zeros([EXPERTS, COLUMNS], tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        at, chosen = row[:, None] * K + place[None, :], (row < last)[:, None] & (place < K)[None, :]
        score = tl.load(score_ptr + at, mask=chosen, other=0.0)
        d_weights = load_fp32(d_weights_ptr + at, chosen)
        ids = tl.load(ids_ptr + at, mask=chosen, other=0).to(tl.int32)
        inverse = 1.0 / (tl.sum(score, 1)[:, None] + 1e-20)
        mean = tl.sum(d_weights * score, 1)[:, None] * inverse
        slope = factor * (d_weights - mean) * inverse * score * (1.0 - score)
        d_logit = tl.zeros([ROWS, EXPERTS], tl.float32)
        for k in tl.static_range(K):
            is_k = place[None, :] == k
            choice = tl.sum(tl.where(is_k, ids, 0), 1)[:, None]
            amount = tl.sum(tl.where(is_k, slope, 0.0), 1)[:, None]
            d_logit += tl.where(expert[None, :] == choice, amount, 0.0)
        inside = (row < last)[:, None] & (column < D)[None, :]
        dx = tl.dot(d_logit, weight, input_precision="ieee")
        store_nearest(dx_ptr + row[:, None] * D + column[None, :], dx, inside)
        x = load_fp32(x_ptr + row[:, None] * stride + column[None, :], inside)
        partial = tl.dot(tl.trans(d_logit), x, partial, input_precision="ieee")
    partial_ptr += tl.program_id(1).to(tl.int64) * E * D
    tl.store(partial_ptr + matrix_at, partial, mask=in_weight)
