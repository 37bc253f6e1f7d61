"""Scores continuations after contexts: the negative log-likelihood of each token; knows neither text nor tasks.

Requests that begin alike read that beginning once.  Which ones are read together depends on the set of requests alone
and not on their order, so neither do the last bits of a result.  Logits are computed in fp32 and only where a token is
scored: those of bf16 are too coarse to compare two sentences that differ in one suffix.

Legend: T tokens of a text, P tokens of a shared beginning, N beginnings, B texts, D model width, V vocabulary,
Q scored tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from lowvram_kernels.matmul.weight_only import look_up
from lowvram_kernels.quant.quantise import QuantTensor
from torch import Tensor

from lowvram.errors import NumbersError
from lowvram.evaluate.prefix_cache import PrefixCache
from lowvram.model.transformer import Transformer

# Tokens that are read at once, padding included, on a processor and elsewhere.  A processor was fastest with up to
# 2,048 (Xeon, AVX-512, one thread, tr-25m, fp32, 1,500 minimal pairs: 19.5 s of CPU, 22.9 s with 8,192).
_CPU_TOKENS, _CARD_TOKENS = 2048, 16384
# Tokens that must be saved before a beginning is read in a pass of its own.  On the same processor that made questions
# of SIB-200 1.9 times as fast, of ARC 1.4 times, and minimal pairs, which differ early, hardly.
_MIN_SAVED = 4
_MOST_MEMBERS = 64
# fp32 logits that exist at once: 64 MiB.
_LOGITS = 2**24
# Numbers of the output matrix that are copied to fp32 at once where it is kept in fewer bits: 32 MiB.
_HEAD_NUMBERS = 2**23


class Request(NamedTuple):
    """A continuation to be scored after a context, both as ids; the context begins with BOS and so is never empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class Likelihood(NamedTuple):
    """nat_T: the negative log-likelihood of each token of the continuation, [T] float64, in nats.

    is_greedy: whether each of them was the likeliest token, so that greedy decoding would write the continuation.
    was_cut: whether the text was longer than the model reads, so that its beginning was left out.
    """

    nat_T: np.ndarray
    is_greedy: bool
    was_cut: bool

    @property
    def nats(self) -> float:
        """The negative log-likelihood of the whole continuation."""
        return math.fsum(self.nat_T)


class _Text(NamedTuple):
    """Ids of which those from number `first` on are scored."""

    ids: tuple[int, ...]
    first: int


class _Group(NamedTuple):
    """Texts that share their first `shared` tokens, which are read once."""

    shared: int
    texts: list[_Text]


class _Found(NamedTuple):
    nat_T: np.ndarray
    is_greedy: bool


Scoring = Generator[tuple[int, int], None, list[Likelihood]]


def score_requests(
    model: Transformer,
    requests: Sequence[Request],
    dtype: torch.dtype,
    max_context: int,
    batch_tokens: int | None = None,
) -> Scoring:
    """Return the likelihood of each request; yields the texts that are done and those that there are.

    max_context: tokens that the model reads at once.  Of a longer text the newest tokens are read; a continuation that
    is longer itself is read in windows without overlap.  A request that occurs twice is computed once.  batch_tokens:
    tokens that are read at once, padding included; None takes what suits the device.
    Raises NumbersError where a likelihood is not finite.
    """
    if batch_tokens is None:
        batch_tokens = _CPU_TOKENS if model.embedding.device.type == "cpu" else _CARD_TOKENS
    parts = [_cut(request, max_context) for request in requests]
    texts = sorted({text for cut in parts for text in cut})
    groups = sorted(_find_groups(texts, batch_tokens), key=_order, reverse=True)
    found: dict[_Text, _Found] = {}
    for batch in _fill_batches(groups, batch_tokens):
        found |= _score_batch(model, batch, dtype)
        yield len(found), len(texts)
    return [
        Likelihood(
            np.concatenate([np.empty(0), *(found[text].nat_T for text in cut)]),
            all(found[text].is_greedy for text in cut),
            len(request.context) + len(request.continuation) - 1 > max_context,
        )
        for request, cut in zip(requests, parts, strict=True)
    ]


def _cut(request: Request, max_context: int) -> list[_Text]:
    """Return the texts that are read for a request; none for an empty continuation."""
    assert request.context, "a context begins with BOS"
    ids, count = request.context + request.continuation, len(request.continuation)
    if not count:
        return []
    if count <= max_context:
        text = ids[-max_context - 1 :]
        return [_Text(text, len(text) - count)]
    starts = range(len(request.context), len(ids), max_context)
    return [_Text(ids[start - 1 : start + max_context], 1) for start in starts]


def _find_groups(texts: Sequence[_Text], batch_tokens: int) -> Iterator[_Group]:
    """Join texts in sorted order to groups, as long as each new one saves tokens."""
    members: list[_Text] = []
    shared = 0
    for text in texts:
        joint = _count_shared([*members, text])
        saved = len(members) * joint - (len(members) - 1) * shared
        rest = max(len(each.ids) for each in (*members, text)) - 1 - joint
        is_full = len(members) == _MOST_MEMBERS or joint + (len(members) + 1) * rest > batch_tokens
        if members and (saved < _MIN_SAVED or is_full):
            yield _Group(shared, members)
            members, shared = [], 0
        elif members:
            shared = joint
        members.append(text)
    if members:
        yield _Group(shared, members)


def _count_shared(texts: Sequence[_Text]) -> int:
    """Return how many tokens of sorted texts are read once: they and what follows each of them are the same in all.

    At least one token of each text is left for its own pass.
    """
    first, last = texts[0].ids, texts[-1].ids
    pairs = enumerate(zip(first, last, strict=False))
    common = next((place for place, (a, b) in pairs if a != b), min(len(first), len(last)))
    return max(0, min(common - 1, min(len(text.ids) for text in texts) - 2))


def _order(group: _Group) -> tuple[int, int, list[_Text]]:
    return group.shared, _rest_of(group), group.texts


def _rest_of(group: _Group) -> int:
    """Return the most tokens that a text of the group has behind the shared ones; its last token is never read."""
    return max(len(text.ids) for text in group.texts) - 1 - group.shared


def _fill_batches(groups: Sequence[_Group], batch_tokens: int) -> Iterator[list[_Group]]:
    """Join groups with equally long beginnings, the longest first, to batches of about so many tokens."""
    for shared, alike in itertools.groupby(groups, lambda group: group.shared):
        batch: list[_Group] = []
        rows = longest = 0
        for group in alike:
            rows, longest = rows + len(group.texts), max(longest, _rest_of(group))
            if batch and (len(batch) + 1) * shared + rows * longest > batch_tokens:
                yield batch
                batch, rows, longest = [], len(group.texts), _rest_of(group)
            batch.append(group)
        yield batch


@torch.no_grad()
def _score_batch(model: Transformer, batch: Sequence[_Group], dtype: torch.dtype) -> dict[_Text, _Found]:
    shared, device = batch[0].shared, model.embedding.device
    texts = [text for group in batch for text in group.texts]
    streams, cache = [], None
    # Of each scored token: its row among the streams, and its id.
    scored = _Scored()
    if shared:
        cache = PrefixCache()
        beginning_NP = torch.tensor([group.texts[0].ids[:shared] for group in batch], device=device)
        stream_NPD, _ = model(beginning_NP, dtype, cache=cache)
        streams.append(stream_NPD.flatten(0, 1))
        for number, group in enumerate(batch):
            first = min(text.first for text in group.texts)
            scored.add(group.texts[0].ids, range(first, shared + 1), number * shared - 1)
        row_B = [number for number, group in enumerate(batch) for _ in group.texts]
        cache = cache.fork(torch.tensor(row_B, device=device))
    longest = max(map(_rest_of, batch))
    # Behind the end of a text stands padding that no token before it sees; which id it is does not matter.
    rest_BT = np.zeros((len(texts), longest), np.int64)
    for row, text in enumerate(texts):
        rest_BT[row, : len(text.ids) - 1 - shared] = text.ids[shared:-1]
        places = range(max(text.first, shared + 1), len(text.ids))
        scored.add(text.ids, places, len(batch) * shared + row * longest - shared - 1)
    stream_BTD, _ = model(torch.from_numpy(rest_BT).to(device), dtype, cache=cache)
    streams.append(stream_BTD.flatten(0, 1))
    nat_Q, is_best_Q = _read_targets(model, torch.cat(streams), scored)
    return _distribute(batch, nat_Q, is_best_Q, scored.spans)


class _Scored:
    """Which tokens of a batch are scored: the rows of the hidden states before them, their ids, and whose they are."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.targets: list[int] = []
        # Where the tokens of each call of `add` begin and end among all.
        self.spans: list[slice] = []

    def add(self, ids: Sequence[int], places: range, offset: int) -> None:
        """Score the tokens of a text at these places; the row of the hidden state before a place is place + offset."""
        begin = len(self.rows)
        self.rows += [place + offset for place in places]
        self.targets += [ids[place] for place in places]
        self.spans.append(slice(begin, len(self.rows)))


def _read_targets(model: Transformer, stream_ND: Tensor, scored: _Scored) -> tuple[np.ndarray, np.ndarray]:
    """Return the nats of each scored token, float64, and whether it was the likeliest one."""
    row_Q = torch.tensor(scored.rows, device=stream_ND.device)
    target_Q = torch.tensor(scored.targets, device=stream_ND.device)
    nats, bests = [], []
    step = max(1, _LOGITS // model.config.vocabulary)
    for start in range(0, len(scored.rows), step):
        logit_QV = _read_out(model, stream_ND[row_Q[start : start + step]].float())
        target_Q1 = logit_QV.gather(1, target_Q[start : start + step, None])
        nats.append(logit_QV.logsumexp(1) - target_Q1[:, 0])
        bests.append(target_Q1[:, 0] >= logit_QV.amax(1))
    nat_Q = torch.cat(nats).cpu().double().numpy()  # MPS has no float64
    if not np.isfinite(nat_Q).all():
        raise NumbersError(
            "The model's likelihoods are not finite numbers.",
            "Training has diverged, or its weights are damaged.",
            "Evaluate an earlier checkpoint of the run.",
        )
    return nat_Q, torch.cat(bests).cpu().numpy()


def _read_out(model: Transformer, stream_QD: Tensor) -> Tensor:
    """Return logits, [Q, V] fp32; of an output matrix in fewer bits only a part is in fp32 at once."""
    head_VD, scale = model.head_parts()
    if head_VD.dtype == torch.float32:
        return stream_QD @ head_VD.mT
    logit_QV = stream_QD.new_empty(len(stream_QD), len(head_VD))
    step = max(1, _HEAD_NUMBERS // head_VD.shape[1])
    for start in range(0, len(head_VD), step):
        part_VD = head_VD[start : start + step]
        if scale is not None:
            row_V = torch.arange(start, start + len(part_VD), device=head_VD.device)
            part_VD = look_up(row_V, QuantTensor(head_VD, scale), torch.float32)
        logit_QV[:, start : start + len(part_VD)] = stream_QD @ part_VD.float().mT
    return logit_QV


def _distribute(
    batch: Sequence[_Group], nat_Q: np.ndarray, is_best_Q: np.ndarray, spans: Sequence[slice]
) -> dict[_Text, _Found]:
    """Give each text the nats of its own tokens and, of the shared ones, of those from its first scored token on."""
    found: dict[_Text, _Found] = {}
    shared = batch[0].shared
    # The spans of the beginnings come first, one for each group if there are any.
    beginnings = list(spans[: len(batch)]) if shared else [slice(0, 0)] * len(batch)
    own = iter(spans[len(batch) if shared else 0 :])
    for group, beginning in zip(batch, beginnings, strict=True):
        for text in group.texts:
            count = max(0, shared + 1 - text.first)
            before = slice(beginning.stop - count, beginning.stop)
            span = next(own)
            nat_T = np.concatenate([nat_Q[before], nat_Q[span]])
            found[text] = _Found(nat_T, bool(is_best_Q[before].all() and is_best_Q[span].all()))
    return found
