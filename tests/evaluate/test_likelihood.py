"""Likelihoods of continuations against the plain forward pass, one request at a time; beginnings that are shared."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from lowvram_kernels.matmul.weight_only import decoded
from torch.overrides import TorchFunctionMode

from lowvram.errors import NumbersError
from lowvram.evaluate import likelihood as module
from lowvram.evaluate.likelihood import Likelihood, Request, score_requests
from lowvram.generate.weights import load_for_inference
from lowvram.model.transformer import Transformer
from tests.generate.test_weights import source_of
from tests.model.outside import randomise
from tests.model.variants import VARIANTS

CONTEXT = 48
CLOSE = 2e-4  # nats of a token: fp32 sums in another order, the two forms of MLA included
KINDS = ["gqa-rope", "gqa-alibi-window", "gqa-window", "mla-moe", "mla-window", "mla-yarn-q_lora", "gqa-moe-untied"]


def requests_of(vocabulary: int, seed: int = 0) -> list[Request]:
    """Choices after one context, pairs that differ late, one that ends where another goes on, long and short ones."""
    drawn = random.Random(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(drawn.randrange(1, vocabulary) for _ in range(count))

    context = (0, *ids(14))
    found = [Request(context, ids(count)) for count in (1, 2, 5, 5)]
    for length in (3, 9, 9, 20):
        start = ids(length)
        found += [Request((0,), start + ids(count)) for count in (1, 4)]
    base = ids(12)
    found += [Request((0,), base), Request((0,), base + ids(3)), Request((0, *base[:5]), base[5:])]
    found += [Request((0,), ids(1)), Request((0, *ids(40)), ids(30)), Request((0, *ids(7)), ids(CONTEXT * 2 + 5))]
    return [*found, found[2], Request(context, ())]


def plain(model: Transformer, request: Request) -> tuple[list[float], bool]:
    """The definition: windows of one text, softmax in double precision of every position's logits."""
    ids, count = [*request.context, *request.continuation], len(request.continuation)
    if count <= CONTEXT:
        windows = [(ids[-CONTEXT - 1 :], count)] if count else []
    else:
        first = len(request.context)
        windows = [(ids[at - 1 : at + CONTEXT], len(ids[at : at + CONTEXT])) for at in range(first, len(ids), CONTEXT)]
    nats, is_greedy = [], True
    for window, scored in windows:
        with torch.no_grad():
            logit_TV = model.logits(torch.tensor([window[:-1]]))[0].double()
        for logit_V, target in list(zip(logit_TV, window[1:], strict=True))[-scored:]:
            nats.append(-logit_V.log_softmax(-1)[target].item())
            is_greedy &= bool(logit_V.argmax() == target)
    return nats, is_greedy


def score(model: Transformer, requests: list[Request], batch_tokens: int = 256) -> list[Likelihood]:
    scoring = score_requests(model, requests, torch.float32, CONTEXT, batch_tokens)
    while True:
        try:
            next(scoring)
        except StopIteration as end:
            return end.value


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_costs_what_the_plain_forward_pass_says(kind: str) -> None:
    model = randomise(Transformer(VARIANTS[kind]))
    requests = requests_of(VARIANTS[kind].vocabulary)
    # One that greedy decoding would write, so that both answers occur.
    with torch.no_grad():
        best = model.logits(torch.tensor([requests[0].context]))[0, -1].argmax().item()
    requests.append(Request(requests[0].context, (int(best),)))
    found = score(model, requests)
    for request, likelihood in zip(requests, found, strict=True):
        nats, is_greedy = plain(model, request)
        np.testing.assert_allclose(likelihood.nat_T, nats, rtol=0, atol=CLOSE)
        assert likelihood.nats == pytest.approx(math.fsum(nats), abs=CLOSE * max(1, len(nats)))
        assert likelihood.is_greedy == is_greedy
        assert likelihood.was_cut == (len(request.context) + len(request.continuation) - 1 > CONTEXT)
    assert {likelihood.is_greedy for likelihood in found} == {True, False}


class FindsDoubles(TorchFunctionMode):
    """Collects what becomes float64 before it is on the processor: MPS has no float64."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[torch.Tensor] = []
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            source = args[0] if args else None
            if func is torch.Tensor.cpu:
                self.fetched.append(result)
            elif result.dtype == torch.float64 and not any(source is each for each in self.fetched):
                self.found.append(str(func))
            elif result.dtype == torch.float64:
                self.fetched.append(result)
        return result


def test_nothing_becomes_double_on_the_device() -> None:
    model = randomise(Transformer(VARIANTS["mla-moe"]))
    with FindsDoubles() as doubles:
        score(model, requests_of(VARIANTS["mla-moe"].vocabulary))
    assert doubles.fetched
    assert doubles.found == []


@pytest.mark.parametrize("precision", ["bf16", "fp8", "int8"])
def test_an_output_matrix_in_fewer_bits_is_read_in_parts(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_for_inference(source_of(VARIANTS["gqa-moe-untied"]), precision)
    requests = requests_of(VARIANTS["gqa-moe-untied"].vocabulary)
    monkeypatch.setattr(module, "_HEAD_NUMBERS", 7 * VARIANTS["gqa-moe-untied"].dim)
    monkeypatch.setattr(Transformer, "head_matrix", None)
    found = score(model, requests)
    whole = whole_head_of(model)
    monkeypatch.setattr(module, "_read_out", lambda _, stream_QD: stream_QD @ whole.mT)
    for one, other in zip(found, score(model, requests), strict=True):
        np.testing.assert_allclose(one.nat_T, other.nat_T, rtol=0, atol=1e-5)


def whole_head_of(model: Transformer) -> torch.Tensor:
    """The output matrix in fp32, decoded at once."""
    return decoded(*model.head_parts(), torch.float32)


def test_the_order_of_requests_and_repeats_change_no_bit() -> None:
    model = randomise(Transformer(VARIANTS["gqa-rope"]))
    requests = requests_of(VARIANTS["gqa-rope"].vocabulary)
    shuffled = random.Random(3).sample([*requests, *requests], 2 * len(requests))
    first, second = dict(zip(requests, score(model, requests), strict=True)), score(model, shuffled)
    for request, likelihood in zip(shuffled, second, strict=True):
        np.testing.assert_array_equal(likelihood.nat_T, first[request].nat_T)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of each forward pass of any model."""
    read: list[int] = []
    forward = Transformer.forward

    def counted(self: Transformer, token_BT: torch.Tensor, *given: object, **named: object) -> object:
        read.append(token_BT.numel())
        return forward(self, token_BT, *given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Transformer, "forward", counted)
    return read


def test_a_shared_beginning_is_read_once_and_a_repeat_not_at_all(read: list[int]) -> None:
    model = randomise(Transformer(VARIANTS["gqa-rope"]))
    context = tuple(range(1, 31))
    choices = [Request((0, *context), (40 + number, 50)) for number in range(4)]
    score(model, choices * 3)
    assert sum(read) == 30 + 4 * 2
    read.clear()
    score(model, choices, batch_tokens=48)
    assert sum(read) == 30 + 4 * 2, "what fits is the beginning and four short ends, not four whole texts"
    read.clear()
    score(model, [Request((0, number), (*context[:20],)) for number in range(60, 64)])
    assert sum(read) == 4 * 21, "texts that differ early share nothing"


def test_a_batch_keeps_within_its_tokens_however_many_texts_share_a_beginning(read: list[int]) -> None:
    model = randomise(Transformer(VARIANTS["gqa-rope"]))
    requests = [Request((0, *range(1, 21)), (one, two)) for one in range(1, 20) for two in range(1, 20)]
    score(model, requests, batch_tokens=128)
    assert max(read) <= 128
    assert len(read) > 3


def test_numbers_that_are_not_finite_are_an_error() -> None:
    model = randomise(Transformer(VARIANTS["gqa-rope"]))
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    with pytest.raises(NumbersError, match="not finite"):
        score(model, [Request((0,), (1, 2))])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_card_says_what_a_processor_says(kind: str) -> None:
    model = randomise(Transformer(VARIANTS[kind]))
    requests = requests_of(VARIANTS[kind].vocabulary)
    expected = score(model, requests)
    for likelihood, truth in zip(score(model.cuda(), requests), expected, strict=True):
        np.testing.assert_allclose(likelihood.nat_T, truth.nat_T, rtol=0, atol=10 * CLOSE)
