"""What each option of a Sampler does to hand-made logits, and that draws have the frequencies that they should have."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from lowvram.errors import NumbersError
from lowvram.generate.sampling import Sampler, keyed_uniform, sample

DRAWS = 4_000
NOTHING = torch.tensor([], dtype=torch.long)
PLAIN = Sampler(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)


def with_options(**options: float) -> Sampler:
    return PLAIN.model_copy(update=options)


def logits_of(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log().float()


def drawn(logit_V: torch.Tensor, sampler: Sampler, seen: torch.Tensor = NOTHING, draws: int = 300) -> set[int]:
    return {sample(logit_V, sampler, seen, index) for index in range(draws)}


def within(share: float, draws: int = DRAWS) -> float:
    """Five standard deviations of a binomial share: one run in about two million would stray further."""
    return 5 * math.sqrt(share * (1 - share) / draws) + 1e-9


def test_temperature_zero_takes_the_likeliest_token_whatever_the_seed() -> None:
    logit_V = torch.tensor([0.3, 2.0, -1.0, 1.999])
    greedy = Sampler(temperature=0.0, repetition_penalty=1.0)
    assert {sample(logit_V, greedy.model_copy(update={"seed": seed}), NOTHING, seed) for seed in range(50)} == {1}


def test_the_same_seed_and_place_give_the_same_token_and_another_seed_another_row() -> None:
    logit_V = torch.zeros(101)
    rows = [[sample(logit_V, with_options(seed=seed), NOTHING, index) for index in range(40)] for seed in (7, 7, 8)]
    assert rows[0] == rows[1]
    assert rows[0] != rows[2]
    assert len(set(rows[0])) > 20


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_tokens_come_as_often_as_softmax_says(temperature: float) -> None:
    logit_V = torch.tensor([1.2, -0.4, 0.0, 2.1, -3.0, 0.7, 1.9])
    found = [sample(logit_V, with_options(temperature=temperature), NOTHING, index) for index in range(DRAWS)]
    for token, share in enumerate((logit_V.double() / temperature).softmax(-1).tolist()):
        assert abs(found.count(token) / DRAWS - share) < within(share), token


def test_filtered_tokens_keep_their_relative_shares() -> None:
    found = [sample(logits_of(0.1, 0.4, 0.2, 0.3), with_options(top_k=2), NOTHING, index) for index in range(DRAWS)]
    assert set(found) == {1, 3}
    assert abs(found.count(1) / DRAWS - 4 / 7) < within(4 / 7)


@pytest.mark.parametrize(
    "options, kept",
    [
        ({"top_k": 1}, {1}),
        ({"top_k": 3}, {1, 3, 2}),
        ({"top_k": 9}, {0, 1, 2, 3}),
        ({"top_p": 0.39}, {1}),
        ({"top_p": 0.41}, {1, 3}),
        ({"top_p": 0.69}, {1, 3}),
        ({"top_p": 0.71}, {1, 3, 2}),
        ({"top_p": 1e-9}, {1}),
        ({"min_p": 0.26}, {1, 3, 2}),
        ({"min_p": 0.51}, {1, 3}),
        ({"min_p": 1.0}, {1}),
        ({"top_k": 3, "top_p": 0.5}, {1, 3}),
        ({"top_k": 1, "min_p": 0.26}, {1}),
    ],
    ids=str,
)
def test_a_filter_keeps_exactly_the_tokens_that_it_should(options: dict[str, float], kept: set[int]) -> None:
    assert drawn(logits_of(0.1, 0.4, 0.2, 0.3), with_options(**options)) == kept


def test_of_equal_tokens_top_k_keeps_the_first_ones() -> None:
    assert drawn(torch.zeros(5), with_options(top_k=2)) == {0, 1}


@pytest.mark.parametrize(
    "seen, best",
    [((), 0), ((0,), 1), ((0, 0, 0), 1), ((0, 1), 2), ((0, 1, 2), 0)],
    ids=str,
)
def test_a_penalty_divides_positive_logits_and_multiplies_negative_ones_once(seen: tuple[int, ...], best: int) -> None:
    # 1.9 / 2 = 0.95 < 1.0;  1.0 / 2 = 0.5 < 0.96;  of 0.95, 0.5, 0.48, -0.1 the first is best again.
    logit_V = torch.tensor([1.9, 1.0, 0.96, -0.1])
    sampler = Sampler(temperature=0.0, repetition_penalty=2.0)
    assert sample(logit_V, sampler, torch.tensor(seen, dtype=torch.long), 0) == best
    below = torch.tensor([-1.0, -1.5, -1.9, -9.0])
    assert sample(below, sampler, torch.tensor([0]), 0) == 1, "dividing -1.0 would have made it likelier"


def test_a_penalty_changes_shares_as_the_formula_says() -> None:
    found = [sample(torch.tensor([1.0, 1.0]), with_options(repetition_penalty=2.0), torch.tensor([0]), i)
             for i in range(DRAWS)]  # fmt: skip
    share = 1 / (1 + math.exp(0.5))
    assert abs(found.count(0) / DRAWS - share) < within(share)


def test_sampling_leaves_the_logits_alone() -> None:
    logit_V = torch.tensor([1.0, -2.0, 0.5])
    before = logit_V.clone()
    sample(logit_V, Sampler(repetition_penalty=3.0, top_k=1), torch.tensor([0, 1]), 0)
    assert torch.equal(logit_V, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_logits_are_sampled_in_fp32(dtype: torch.dtype) -> None:
    logit_V = torch.zeros(60_000, dtype=dtype)
    # The 60,000 shares of 1/60,000 would cumulate to a fraction of 1 in 16 bits, and high ids would never come.
    assert max(drawn(logit_V, PLAIN, draws=100)) > 50_000


def test_the_last_token_can_be_drawn_and_none_behind_it() -> None:
    assert drawn(torch.zeros(3), PLAIN) == {0, 1, 2}
    assert drawn(torch.tensor([-torch.inf, -torch.inf, 0.0]), PLAIN) == {2}


def by_sorting_everything(logit_V: torch.Tensor, sampler: Sampler, index: int) -> int:
    """The definition: all tokens in their order, cut by each rule, then one draw among what is left."""
    probability_V = ((logit_V.double() - logit_V.max()) / sampler.temperature).softmax(-1)
    sorted_V, order_V = probability_V.sort(descending=True, stable=True)
    keep_V = sorted_V >= sampler.min_p * sorted_V[0]
    keep_V &= sorted_V.cumsum(-1) - sorted_V < sampler.top_p
    if sampler.top_k:
        keep_V[sampler.top_k :] = False
    left_V = torch.zeros_like(probability_V).scatter_(0, order_V[keep_V], sorted_V[keep_V])
    cumulated_V = left_V.cumsum(-1)
    point = keyed_uniform(sampler.seed, index) * cumulated_V[-1]
    return int(torch.searchsorted(cumulated_V, point, right=True))


@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0], ids=["flat", "wide", "steep"])
@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 50}, {"top_p": 0.95}, {"min_p": 0.02}, {"top_k": 50, "top_p": 0.9, "min_p": 0.01}, {"top_k": 9000}],
    ids=str,
)
def test_no_more_is_sorted_than_is_needed_and_the_draw_is_that_of_sorting_all(
    options: dict[str, float], spread: float
) -> None:
    generator = torch.Generator().manual_seed(1)
    # Rounded, so that many are equal at every cut.
    logit_V = (spread * torch.randn(5000, generator=generator)).bfloat16().float()
    sampler = with_options(temperature=0.7, **options)
    drawn_ids = [sample(logit_V, sampler, NOTHING, index) for index in range(40)]
    assert drawn_ids == [by_sorting_everything(logit_V, sampler, index) for index in range(40)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_numbers_that_are_no_distribution_are_an_error(bad: float, temperature: float) -> None:
    logit_V = torch.full((9,), bad) if bad < 0 else torch.tensor([0.5, bad, 2.0])
    with pytest.raises(NumbersError, match="greatest logit is"):
        sample(logit_V, with_options(temperature=temperature), NOTHING, 0)


def test_keyed_numbers_fill_the_unit_interval_evenly() -> None:
    found = [keyed_uniform(seed, index) for seed in range(20) for index in range(200)]
    assert min(found) >= 0.0
    assert max(found) < 1.0
    assert len(set(found)) == len(found)
    for tenth in range(10):
        share = sum(tenth / 10 <= number < (tenth + 1) / 10 for number in found) / len(found)
        assert abs(share - 0.1) < within(0.1, len(found))


@pytest.mark.parametrize(
    "options", [{"temperature": -0.1}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": 2.0},
                {"repetition_penalty": 0.0}, {"topk": 3}], ids=str,
)  # fmt: skip
def test_an_impossible_sampler_cannot_be_made(options: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Sampler(**options)
