"""Draws next tokens from logits: a frozen Sampler, one draw for several texts on their device; knows no model.

A card draws for all texts together, and nothing is read before all have their tokens.  A processor draws for one text
after the other: it may look at any number at once, and so sorts only tokens that may be kept.  Both draw the same.

Legend: N texts that take a token, R some of them, V vocabulary, C likeliest tokens of a text, S slots,
D values of a digit, W columns in which a processor lays out a vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import numpy as np
import torch
from lowvram_kernels.dispatch import card_of
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from lowvram.config.base import FrozenConfig
from lowvram.errors import NumbersError


class Sampler(FrozenConfig):
    """How to draw a token; temperature 0 takes the likeliest.  The same seed and logits give the same token.

    top_k: keeps only so many likeliest tokens (0: all).  top_p: keeps only the likeliest tokens that together reach
    this probability (Holtzman et al. 2020).  min_p: keeps only tokens with at least this share of the likeliest one's
    probability.  repetition_penalty: divides positive logits of tokens that the text already has, and multiplies
    negative ones (Keskar et al. 2019).
    """

    temperature: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.8
    top_k: Annotated[int, Field(ge=0)] = 50
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 0.95
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1.1
    seed: int = 0


class Wish(NamedTuple):
    """What one text's next token is drawn by.

    position: the token's place in the text, part of the random key.  top: how many of the likeliest tokens'
    log-probabilities are returned besides the drawn one's; None: none at all.
    """

    sampler: Sampler
    position: int
    top: int | None = None


class Drawn(NamedTuple):
    """A token.  logprob: of the model itself, without a sampler; None where it was not wished for.

    top: the likeliest ids and their log-probabilities, the greatest first.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


# Logits at work at once, in whole rows; they take up to 60 bytes each, and fewer where a processor draws.
_LOGITS_AT_ONCE, _LOGITS_IN_CACHE = 2**20, 2**17
# The digits, greatest first, of a number's 32 bits by which tokens are sought: how far right each lies, and its bits.
_DIGITS = ((21, 11), (10, 11), (0, 10))
# Without top_k a processor looks at so many of the likeliest tokens first, and at all where these do not suffice.
_FIRST_LOOK = 1024


class History:
    """Which ids the text of each slot has, as the repetition penalty needs them: V bytes a slot, allocated once.

    Nothing is allocated before a text has a penalty.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._seen_SV: Tensor | None = None
        # Texts that were begun and whose ids are not in `_seen_SV` yet.
        self._begun: dict[int, list[int]] = {}

    def begin(self, slot: int, sampler: Sampler, id_T: Sequence[int]) -> None:
        """Forget the slot's text and begin another."""
        self._begun.pop(slot, None)
        if sampler.repetition_penalty != 1.0:
            self._begun[slot] = list(id_T)

    def read(self, slot_N: Sequence[int], wishes: Sequence[Wish], logit_NV: Tensor) -> Tensor | None:
        """Return which ids each text has, [N, V] bool on the logits' device; None where no text has a penalty."""
        penalised = [slot for slot, wish in zip(slot_N, wishes, strict=True) if wish.sampler.repetition_penalty != 1.0]
        if not penalised:
            return None
        if self._seen_SV is None:
            shape = self._slots, logit_NV.shape[-1]
            self._seen_SV = torch.zeros(shape, dtype=torch.bool, device=logit_NV.device)
        for slot in penalised:
            if slot in self._begun:
                self._seen_SV[slot] = False
                self._seen_SV[slot, torch.tensor(self._begun.pop(slot), device=logit_NV.device)] = True
        return self._seen_SV[list(slot_N)]

    def add(self, slot_N: Sequence[int], id_N: Sequence[int]) -> None:
        """Note each text's new token."""
        if self._seen_SV is not None:
            self._seen_SV[list(slot_N), list(id_N)] = True


class BatchSampler:
    """Draws the next tokens of several texts together, on the device; the host reads once for all of them."""

    def __init__(self, slots: int) -> None:
        self._history = History(slots)

    def begin(self, slot: int, sampler: Sampler, id_T: Sequence[int]) -> None:
        """Begin a text in a slot.  id_T: what it has already."""
        self._history.begin(slot, sampler, id_T)

    @torch.inference_mode()
    def draw(self, slot_N: Sequence[int], wishes: Sequence[Wish], logit_NV: Tensor) -> list[Drawn | NumbersError]:
        """Return each text's token, or the error of a row whose greatest logit is not finite.

        slot: all different.  logit: [N, V].  No row depends on another one.
        """
        # Apple chips have no fp64: there the processor draws, which has the same memory.
        logit_NV = logit_NV.to("cpu") if logit_NV.device.type == "mps" else logit_NV
        drawn = draw_rows(logit_NV, wishes, self._history.read(slot_N, wishes, logit_NV))
        self._history.add(slot_N, [0 if isinstance(one, NumbersError) else one.id for one in drawn])
        return drawn


def sample(logit_V: Tensor, sampler: Sampler, seen: Tensor, index: int) -> int:
    """Draw one token id.

    logit_V: [V].  seen: ids that the text already has.  index: the token's position, part of the random key.
    Raises NumbersError where the greatest logit is NaN or infinite: there is no distribution then.
    """
    logit_V = logit_V.to("cpu") if logit_V.device.type == "mps" else logit_V
    seen_NV = None
    if sampler.repetition_penalty != 1.0:
        seen_NV = torch.zeros(1, *logit_V.shape, dtype=torch.bool, device=logit_V.device)
        seen_NV[0, seen.to(logit_V.device)] = True
    (drawn,) = draw_rows(logit_V[None].detach(), [Wish(sampler, index)], seen_NV)
    if isinstance(drawn, NumbersError):
        raise drawn
    return drawn.id


def draw_rows(logit_NV: Tensor, wishes: Sequence[Wish], seen_NV: Tensor | None) -> list[Drawn | NumbersError]:
    """Draw a token for each row; of a card the host reads once.

    seen: which ids each text has already, bool; None where no sampler has a penalty.
    """
    draw = _draw_in_turn if logit_NV.device.type == "cpu" else _draw_together
    return draw(logit_NV, wishes, seen_NV)


def _draw_in_turn(logit_NV: Tensor, wishes: Sequence[Wish], seen_NV: Tensor | None) -> list[Drawn | NumbersError]:
    seen_of_rows = [None] * len(wishes) if seen_NV is None else seen_NV
    return [_draw_row(*row) for row in zip(logit_NV, wishes, seen_of_rows, strict=True)]


def _draw_together(logit_NV: Tensor, wishes: Sequence[Wish], seen_NV: Tensor | None) -> list[Drawn | NumbersError]:
    found = launch_draws(logit_NV, wishes, seen_NV).tolist()
    return [_unpack(numbers, wish) for numbers, wish in zip(found, wishes, strict=True)]


def launch_draws(logit_NV: Tensor, wishes: Sequence[Wish], seen_NV: Tensor | None) -> Tensor:
    """Draw a token for each row without reading anything on the host; returns [N, X] fp64, by the columns below."""
    at_once = _LOGITS_AT_ONCE if card_of(logit_NV.device).platform == "cuda" else _LOGITS_IN_CACHE
    height = max(1, at_once // logit_NV.shape[-1])
    parts = [slice(start, start + height) for start in range(0, len(wishes), height)]
    most = min(max(wish.top or 0 for wish in wishes), logit_NV.shape[-1])
    packed = [
        _launch_draw(logit_NV[part], wishes[part], None if seen_NV is None else seen_NV[part], most) for part in parts
    ]
    return packed[0] if len(packed) == 1 else torch.cat(packed)


# Columns of a packed draw: the id, the greatest logit, the token's log-probability; behind them the likeliest ids, and
# as many log-probabilities.
_ID, _GREATEST, _LOGPROB, _TOP = range(4)


def _unpack(numbers: Sequence[float], wish: Wish) -> Drawn | NumbersError:
    if not math.isfinite(numbers[_GREATEST]):
        return NumbersError(
            f"The model's greatest logit is {numbers[_GREATEST]}.",
            "A next token cannot be drawn from numbers that are not finite: the weights are broken, or too large for "
            "the precision.",
            'Try `precision="bf16"` or fp32; if that gives the same, go back to an earlier checkpoint.',
        )
    if wish.top is None:
        return Drawn(int(numbers[_ID]))
    middle = (_TOP + len(numbers)) // 2
    top = [(int(id), value) for id, value in zip(numbers[_TOP:middle], numbers[middle:], strict=True)]
    return Drawn(int(numbers[_ID]), numbers[_LOGPROB], tuple(top[: wish.top]))


def _launch_draw(logit_NV: Tensor, wishes: Sequence[Wish], seen_NV: Tensor | None, most: int) -> Tensor:
    """Draw for so many rows as are at work at once.  most: of the likeliest tokens' log-probabilities."""
    logit_NV = logit_NV.float()
    options = [_options(sampler, keyed_uniform(sampler.seed, position)) for sampler, position, _ in wishes]
    options_N6 = torch.tensor(options, dtype=torch.float64).to(logit_NV.device)
    fair_NV = logit_NV if seen_NV is None else _penalise(logit_NV, options_N6[:, 4:5].float(), seen_NV)
    greatest_N, id_N = fair_NV.max(-1)
    # Rows of one kind are drawn together: those that sort as many tokens, rounded so that there are few such kinds.
    groups = defaultdict[int | str, list[int]](list)
    for row, (sampler, _, _) in enumerate(wishes):
        if 0 < sampler.top_k < logit_NV.shape[-1]:
            kind: int | str = min(1 << (sampler.top_k - 1).bit_length(), logit_NV.shape[-1])
        else:
            kind = "nucleus" if sampler.top_p < 1.0 else "all"
        if sampler.temperature > 0.0:
            groups[kind].append(row)
    for kind, rows in groups.items():
        row_R = slice(None) if len(rows) == len(wishes) else torch.tensor(rows, device=logit_NV.device)
        part = fair_NV[row_R], greatest_N[row_R], options_N6[row_R]
        id_N[row_R] = _draw_from_likeliest(*part, kind) if isinstance(kind, int) else _draw_from_all(*part, kind)
    packed_N2 = torch.stack([id_N.double(), greatest_N.double()], 1)
    return torch.cat([packed_N2, _logprobs(logit_NV, id_N, wishes, most)], 1)


def _options(sampler: Sampler, uniform: float) -> tuple[float, ...]:
    s = sampler
    return s.temperature, s.top_k or math.inf, s.top_p, s.min_p, s.repetition_penalty, uniform


def _penalise(logit_NV: Tensor, penalty_N1: Tensor, seen_NV: Tensor) -> Tensor:
    return torch.where(seen_NV, torch.where(logit_NV > 0, logit_NV / penalty_N1, logit_NV * penalty_N1), logit_NV)


def _draw_from_all(logit_RV: Tensor, greatest_R: Tensor, options_R6: Tensor, kind: str) -> Tensor:
    """Return ids [R] of rows without top_k.  kind: "nucleus" where a row has top_p."""
    weight_RV = _weigh(logit_RV, greatest_R, options_R6)
    keep_RV = weight_RV >= options_R6[:, 3:4]
    if kind == "nucleus":
        keep_RV &= _find_nucleus(logit_RV, weight_RV, options_R6[:, 2:3] * weight_RV.sum(-1, keepdim=True))
    return _find(weight_RV.mul_(keep_RV), options_R6)[:, 0]


def _weigh(logit_RV: Tensor, greatest_R: Tensor, options_R6: Tensor) -> Tensor:
    """Return each token's probability relative to the likeliest one's, fp64: no temperature above 0 overflows there."""
    return (logit_RV.double() - greatest_R[:, None]).div_(options_R6[:, 0:1]).exp_()


def _find(weight_RC: Tensor, options_R6: Tensor) -> Tensor:
    """Return the place [R, 1] of each row's token: the inverse of the cumulative distribution at the keyed number."""
    cumulated_RC = weight_RC.cumsum(-1)
    place_R1 = torch.searchsorted(cumulated_RC, options_R6[:, 5:6] * cumulated_RC[:, -1:], right=True)
    return place_R1.clamp_max_(weight_RC.shape[1] - 1)  # NaN is found nowhere


def _draw_from_likeliest(logit_RV: Tensor, greatest_R: Tensor, options_R6: Tensor, count: int) -> Tensor:
    """Return ids [R] of rows with a top_k of at most `count`."""
    top_k_R1, top_p_R1, min_p_R1 = options_R6[:, 1:4].split(1, 1)
    weight_RV, id_RC = _weigh(logit_RV, greatest_R, options_R6), _likeliest(logit_RV, count)
    weight_RC = weight_RV.gather(1, id_RC)
    most_R1 = torch.where(top_p_R1 < 1.0, top_p_R1 * weight_RV.sum(-1, keepdim=True), torch.inf)
    keep_RC = torch.arange(count, device=id_RC.device) < top_k_R1
    keep_RC &= weight_RC >= min_p_R1
    keep_RC &= weight_RC.cumsum(-1) - weight_RC < most_R1
    # In the order of their ids, as all tokens would be; those that are left out weigh nothing and are never found.
    id_RC, order_RC = id_RC.sort(-1)
    weight_RC = (weight_RC * keep_RC).gather(1, order_RC)
    return id_RC.gather(1, _find(weight_RC, options_R6))[:, 0]


def _ordered_bits(logit_RV: Tensor) -> Tensor:
    """Return each number's bits as int32 of the numbers' order."""
    bits_RV = (logit_RV + 0.0).view(torch.int32)  # -0 becomes 0
    return bits_RV ^ ((bits_RV >> 31) & 0x7FFFFFFF)


def _likeliest(logit_RV: Tensor, count: int) -> Tensor:
    """Return the ids [R, count] of the greatest logits, the greatest first; of equal ones the first id comes first.

    A number's bits and below them its id are one key, so that no two are equal.
    """
    last = logit_RV.shape[1] - 1
    key_RV = _ordered_bits(logit_RV).long().bitwise_left_shift_(32)
    return key_RV.bitwise_or_(torch.arange(last, -1, -1, device=logit_RV.device)).topk(count).indices


def _find_nucleus(logit_RV: Tensor, weight_RV: Tensor, most_R1: Tensor) -> Tensor:
    """Return which tokens are kept, [R, V] bool: those before which the likelier ones weigh less than `most`.

    Nothing is sorted: the first number that is not kept is found digit by digit, by the weight of all tokens with each
    digit (radix selection).  Of equal tokens the first ids are kept.
    """
    order_RV = _ordered_bits(logit_RV)
    keep_RV = torch.zeros_like(order_RV, dtype=torch.bool)
    is_left_RV, above_R1 = ~keep_RV, torch.zeros_like(most_R1)  # tokens with the digits so far, and what is above them
    for shift, bits in _DIGITS:
        # Counted down from the greatest digit; the sign makes the first one's half of what it has.
        digit_RV = ((1 << bits) - 1 - ((order_RV >> shift) & ((1 << bits) - 1))).long()
        if shift == _DIGITS[0][0]:
            digit_RV ^= 1 << (bits - 1)
        mass_RD = weight_RV.new_zeros(len(weight_RV), 1 << bits).scatter_add_(1, digit_RV, weight_RV * is_left_RV)
        sum_RD = mass_RD.cumsum(-1)
        found_R1 = torch.searchsorted(sum_RD, most_R1 - above_R1).clamp_max_((1 << bits) - 1)
        above_R1 = above_R1 + sum_RD.gather(1, found_R1) - mass_RD.gather(1, found_R1)
        keep_RV |= is_left_RV & (digit_RV < found_R1)
        is_left_RV &= digit_RV == found_R1
    number_RV = is_left_RV.cumsum(-1) - 1
    return keep_RV | (is_left_RV & (above_R1 + number_RV * weight_RV < most_R1))


def _draw_row(logit_V: Tensor, wish: Wish, seen_V: Tensor | None) -> Drawn | NumbersError:
    """Draw one text's token on a processor.  numpy takes less time than torch for so few numbers."""
    sampler, fair_V = wish.sampler, logit_V.float().numpy()
    if seen_V is not None and sampler.repetition_penalty != 1.0:
        id_C, penalty = seen_V.numpy().nonzero()[0], np.float32(sampler.repetition_penalty)
        value_C, fair_V = fair_V[id_C], fair_V.copy()
        fair_V[id_C] = np.where(value_C > 0, value_C / penalty, value_C * penalty)
    id = int(fair_V.argmax())
    greatest = float(fair_V[id])
    if sampler.temperature > 0.0 and math.isfinite(greatest):
        uniform = keyed_uniform(sampler.seed, wish.position)
        id = _draw_by_weight(fair_V, greatest, sampler, uniform)
    numbers = [float(id), greatest]
    if wish.top is not None:
        most = min(wish.top, len(logit_V))
        numbers += _logprobs(logit_V.float()[None], torch.tensor([id]), [wish], most)[0].tolist()
    return _unpack(numbers, wish)


def _draw_by_weight(logit_V: NDArray[np.float32], greatest: float, sampler: Sampler, uniform: float) -> int:
    """Return the id of a row whose likeliest token is not simply taken."""
    options_16 = torch.tensor([_options(sampler, uniform)], dtype=torch.float64)
    row_1V, greatest_1 = torch.from_numpy(logit_V)[None], torch.tensor([greatest], dtype=torch.float64)
    count, most = min(sampler.top_k or _FIRST_LOOK, len(logit_V)), math.inf
    if not sampler.top_k and sampler.top_p == 1.0:
        if sampler.min_p == 0.0:
            return int(_find(_weigh(row_1V, greatest_1, options_16), options_16))
        return int(_draw_from_all(row_1V, greatest_1, options_16, "all"))
    if sampler.top_p < 1.0:
        most = sampler.top_p * float(_weigh(row_1V, greatest_1, options_16).sum())
    id_C = _likeliest_of_row(logit_V, count)
    weight_C = _weigh(torch.from_numpy(logit_V[id_C])[None], greatest_1, options_16)[0].numpy()
    keep_C = (weight_C >= sampler.min_p) & (weight_C.cumsum() - weight_C < most)
    if not sampler.top_k and keep_C[-1]:
        return int(_draw_from_all(row_1V, greatest_1, options_16, "nucleus"))
    id_C, weight_C = id_C[keep_C], weight_C[keep_C]
    order_C = id_C.argsort()
    cumulated_C = weight_C[order_C].cumsum()
    place = cumulated_C.searchsorted(uniform * cumulated_C[-1], side="right")
    return int(id_C[order_C[min(place, len(id_C) - 1)]])


def _likeliest_of_row(logit_V: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Return the ids [count] of a row's greatest logits, the greatest first; of equal ones the first id comes first.

    Of columns in which the vocabulary is laid out, the one with the `count`-th greatest maximum gives a number that at
    least `count` logits reach: only columns that reach it are looked at, and what is left over behind whole rows.
    """
    width = max(1024, 1 << (4 * count - 1).bit_length())
    end = len(logit_V) // width * width
    if end < 2 * width:
        least = np.partition(logit_V, -count)[-count]
        id_C = (logit_V >= least).nonzero()[0]
    else:
        greatest_W = logit_V[:end].reshape(-1, width).max(0)
        least = np.partition(greatest_W, -count)[-count]
        column_C = (greatest_W >= least).nonzero()[0]
        id_C = (np.arange(0, end, width)[:, None] + column_C).ravel()
        id_C = np.concatenate([id_C, np.arange(end, len(logit_V))])
        id_C = id_C[logit_V[id_C] >= least]
    return id_C[(-logit_V[id_C]).argsort(kind="stable")[:count]]


def _logprobs(logit_NV: Tensor, id_N: Tensor, wishes: Sequence[Wish], most: int) -> Tensor:
    """Return the log-probability of each drawn token, the likeliest ids and theirs, [N, 1 + 2·most] fp64."""
    tops = [wish.top for wish in wishes]
    packed_NX = torch.zeros(len(tops), 1 + 2 * most, dtype=torch.float64, device=logit_NV.device)
    rows = [row for row, top in enumerate(tops) if top is not None]
    if rows:
        row_R = slice(None) if len(rows) == len(tops) else torch.tensor(rows, device=logit_NV.device)
        logprob_RV = logit_NV[row_R].log_softmax(-1)
        value_RT, top_id_RT = logprob_RV.topk(most)
        own_R1 = logprob_RV.gather(1, id_N[row_R][:, None])
        packed_NX[row_R] = torch.cat([own_R1, top_id_RT, value_RT], 1).double()
    return packed_NX


def keyed_uniform(seed: int, index: int) -> float:
    """Return a number in [0, 1) that depends on seed and index alone."""
    digest = hashlib.blake2b(f"{seed}/sample/{index}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53
