"""What each option of a Sampler does to hand-made logits, and that draws have the frequencies that they should have."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from pydantic import ValidationError

from lowvram.errors import NumbersError
from lowvram.generate import sampling
from lowvram.generate.sampling import BatchSampler, Drawn, Sampler, Wish, keyed_uniform, launch_draws, sample

DRAWS = 4_000
NOTHING = torch.tensor([], dtype=torch.long)
PLAIN = Sampler(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)


@pytest.fixture(params=["in turn", "together"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A processor's way to draw and a card's, which a processor runs as well."""
    if request.param == "together":
        monkeypatch.setattr(sampling, "_draw_in_turn", sampling._draw_together)
    return str(request.param)


def with_options(**options: float) -> Sampler:
    return PLAIN.model_copy(update=options)


def logits_of(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log().float()


def drawn(logit_V: torch.Tensor, sampler: Sampler, seen: torch.Tensor = NOTHING, draws: int = 300) -> set[int]:
    return {sample(logit_V, sampler, seen, index) for index in range(draws)}


def within(share: float, draws: int = DRAWS) -> float:
    """Five standard deviations of a binomial share: one run in about two million would stray further."""
    return 5 * math.sqrt(share * (1 - share) / draws) + 1e-9


@pytest.mark.usefixtures("way")
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


@pytest.mark.usefixtures("way")
def test_filtered_tokens_keep_their_relative_shares() -> None:
    found = [sample(logits_of(0.1, 0.4, 0.2, 0.3), with_options(top_k=2), NOTHING, index) for index in range(DRAWS)]
    assert set(found) == {1, 3}
    assert abs(found.count(1) / DRAWS - 4 / 7) < within(4 / 7)


@pytest.mark.usefixtures("way")
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


@pytest.mark.usefixtures("way")
def test_of_equal_tokens_top_k_keeps_the_first_ones() -> None:
    assert drawn(torch.zeros(5), with_options(top_k=2)) == {0, 1}


@pytest.mark.usefixtures("way")
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


@pytest.mark.usefixtures("way")
def test_the_last_token_can_be_drawn_and_none_behind_it() -> None:
    assert drawn(torch.zeros(3), PLAIN) == {0, 1, 2}
    assert drawn(torch.tensor([-torch.inf, -torch.inf, 0.0]), PLAIN) == {2}


def by_sorting_everything(logit_V: torch.Tensor, sampler: Sampler, index: int, seen: Sequence[int] = ()) -> int:
    """The definition: all tokens in their order, cut by each rule, then one draw among what is left."""
    logit_V = logit_V.clone()
    for id in set(seen):
        value = logit_V[id]
        logit_V[id] = value / sampler.repetition_penalty if value > 0 else value * sampler.repetition_penalty
    if sampler.temperature == 0.0:
        return int(logit_V.argmax())
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


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0], ids=["flat", "wide", "steep"])
@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 50}, {"top_p": 0.95}, {"min_p": 0.02}, {"top_k": 50, "top_p": 0.9, "min_p": 0.01}, {"top_k": 9000}],
    ids=str,
)
def test_the_draw_is_that_of_sorting_all_tokens(options: dict[str, float], spread: float) -> None:
    generator = torch.Generator().manual_seed(1)
    # Rounded, so that many are equal at every cut.
    logit_V = (spread * torch.randn(5000, generator=generator)).bfloat16().float()
    sampler = with_options(temperature=0.7, **options)
    drawn_ids = [sample(logit_V, sampler, NOTHING, index) for index in range(40)]
    assert drawn_ids == [by_sorting_everything(logit_V, sampler, index) for index in range(40)]


@pytest.mark.parametrize("size", [3, 2047, 2048, 5000, 20_001])
def test_a_processor_finds_the_likeliest_tokens_as_a_stable_sort_does(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    steep_V = torch.randn(size, generator=generator) * torch.arange(
        size
    )  # most of the likeliest are in the last columns
    masked_V = torch.where(torch.rand(size, generator=generator) < 0.99, -torch.inf, steep_V)
    for logit_V in (steep_V, steep_V.bfloat16().float(), masked_V, torch.zeros(size), steep_V.sign() * 0.0):
        sorted_V = logit_V.sort(descending=True, stable=True).indices.tolist()
        for count in {1, 2, 50, 300, 1024, size - 1, size}:
            found_C = sampling._likeliest_of_row(logit_V.numpy(), min(count, size))
            assert found_C.tolist() == sorted_V[:count], count


@pytest.mark.usefixtures("way")
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


# Every kind of sampler that a client may have, all of one crowd.
CROWD = [
    Sampler(temperature=0.0, repetition_penalty=1.0),
    Sampler(seed=3),
    with_options(seed=5),
    with_options(top_p=0.9, seed=-7),
    with_options(min_p=0.05, temperature=1.5, repetition_penalty=1.4, seed=2**62),
    with_options(top_k=7, top_p=0.6, temperature=0.3),
    Sampler(temperature=0.0, repetition_penalty=1.8),
    with_options(top_k=3000, repetition_penalty=0.7, seed=1),
    with_options(top_p=0.999, temperature=3.0, seed=9),
    with_options(top_p=1e-6, min_p=0.3, seed=9),
]


@pytest.mark.parametrize("at_once", [2**20, 12_000, 1], ids=lambda count: f"{count} logits")
def test_each_of_a_crowd_draws_what_its_own_definition_says_and_what_it_draws_alone(
    at_once: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "in turn" and at_once != 1:
        pytest.skip("one text is drawn for at once, whatever the limit")
    monkeypatch.setattr(sampling, "_LOGITS_IN_CACHE", at_once)
    generator, slots = torch.Generator().manual_seed(2), [4, 0, 8, 1, 9, 7, 2, 3, 6, 5]
    together, alone = BatchSampler(len(CROWD)), [BatchSampler(1) for _ in CROWD]
    texts = [list(range(row, 40 + 9 * row)) for row in range(len(CROWD))]
    for row, sampler in enumerate(CROWD):
        together.begin(slots[row], CROWD[row - 1], range(4000))  # what a slot held before is forgotten
        together.begin(slots[row], sampler, texts[row])
        alone[row].begin(0, sampler, texts[row])
    for _ in range(6):
        # Rounded, so that many are equal at every cut.
        logit_NV = (2 * torch.randn(len(CROWD), 5000, generator=generator)).bfloat16()
        wishes = [Wish(sampler, len(text)) for sampler, text in zip(CROWD, texts, strict=True)]
        drawn = together.draw(slots, wishes, logit_NV)
        for row, one in enumerate(drawn):
            assert [one] == alone[row].draw([0], [wishes[row]], logit_NV[row : row + 1])
            assert isinstance(one, Drawn)
            assert one.id == by_sorting_everything(logit_NV[row].float(), CROWD[row], len(texts[row]), texts[row])
            texts[row].append(one.id)


@pytest.mark.parametrize("spread", [0.3, 3.0], ids=["flat", "steep"])
def test_both_ways_to_draw_give_the_same_tokens_of_a_whole_vocabulary(spread: float) -> None:
    generator = torch.Generator().manual_seed(3)
    logit_NV = spread * torch.randn(len(CROWD), 40_003, generator=generator)
    seen_NV = torch.rand(logit_NV.shape, generator=generator) < 0.01
    for position in range(2):
        wishes = [Wish(sampler, position, top=3) for sampler in CROWD]
        in_turn = [sampling._draw_row(*row) for row in zip(logit_NV, wishes, seen_NV, strict=True)]
        assert in_turn == sampling._draw_together(logit_NV, wishes, seen_NV)


def test_a_history_is_one_row_of_bytes_a_slot_and_made_for_a_penalty_alone() -> None:
    sampler, logit_NV = BatchSampler(3), torch.zeros(1, 50)
    sampler.begin(0, PLAIN, [1, 2])
    sampler.draw([0], [Wish(PLAIN, 2)], logit_NV)
    assert sampler._history._seen_SV is None
    places = set()
    for slot in (2, 1, 2):
        penalised = with_options(repetition_penalty=2.0, seed=slot)
        sampler.begin(slot, penalised, [1, 2])
        for position in range(2, 12):
            sampler.draw([slot], [Wish(penalised, position)], logit_NV)
            seen_SV = sampler._history._seen_SV
            assert seen_SV is not None
            places.add(seen_SV.data_ptr())
            assert 2 <= int(seen_SV[slot].sum()) <= position + 1
    assert seen_SV.nbytes == 3 * 50
    assert len(places) == 1, "no token allocates it anew"


@pytest.mark.usefixtures("way")
def test_a_row_that_is_no_distribution_ends_alone() -> None:
    samplers = [PLAIN, with_options(temperature=0.0), with_options(top_p=0.5), Sampler()]
    logit_NV = torch.randn(8, 3000, generator=torch.Generator().manual_seed(0))
    wishes = [Wish(sampler, 9, top=2) for sampler in samplers * 2]

    def draw() -> list[Drawn | NumbersError]:
        sampler = BatchSampler(8)
        for slot, wish in enumerate(wishes):
            sampler.begin(slot, wish.sampler, [5])
        return sampler.draw(range(8), wishes, logit_NV)

    whole = draw()
    for row, bad in ((0, math.nan), (1, math.inf), (2, math.nan), (3, math.inf)):
        logit_NV[row, 17] = bad
    found = draw()
    assert [type(one) for one in found] == [NumbersError] * 4 + [Drawn] * 4
    assert "greatest logit is nan" in str(found[0])
    assert "greatest logit is inf" in str(found[1])
    assert [one.id for one in found[4:]] == [one.id for one in whole[4:]]  # type: ignore[union-attr]


@pytest.mark.usefixtures("way")
def test_log_probabilities_are_the_models_own_and_only_of_those_who_wish_for_them() -> None:
    logit_NV = torch.randn(5, 400, generator=torch.Generator().manual_seed(0))
    tops, sampler = [None, 0, 3, 20, 1], Sampler(repetition_penalty=5.0, top_k=10)
    batch = BatchSampler(5)
    for slot in range(5):
        batch.begin(slot, sampler, range(200))
    drawn = batch.draw(range(5), [Wish(sampler, 4, top) for top in tops], logit_NV)
    for logit_V, top, one in zip(logit_NV, tops, drawn, strict=True):
        assert isinstance(one, Drawn)
        logprob_V = logit_V.log_softmax(-1)
        if top is None:
            assert one[1:] == (None, ())
            continue
        assert one.logprob == pytest.approx(float(logprob_V[one.id]), abs=1e-6)
        value_T, id_T = logprob_V.topk(top)
        assert [id for id, _ in one.top] == id_T.tolist()
        assert [value for _, value in one.top] == pytest.approx(value_T.tolist(), abs=1e-6)


@pytest.mark.usefixtures("way")
def test_more_log_probabilities_than_tokens_are_all_of_them() -> None:
    (drawn,) = BatchSampler(1).draw([0], [Wish(PLAIN, 0, top=20)], torch.zeros(1, 7))
    assert isinstance(drawn, Drawn)
    assert sorted(id for id, _ in drawn.top) == list(range(7))


def test_a_draw_reads_nothing_on_the_host_until_all_texts_have_theirs() -> None:
    # A meta tensor has nothing to read: any question of the host would raise.
    logit_NV = torch.empty(len(CROWD), 5000, dtype=torch.bfloat16, device="meta")
    seen_NV = torch.empty(len(CROWD), 5000, dtype=torch.bool, device="meta")
    packed_NX = launch_draws(logit_NV, [Wish(sampler, 3, top=2) for sampler in CROWD], seen_NV)
    assert packed_NX.shape == (len(CROWD), 7)
