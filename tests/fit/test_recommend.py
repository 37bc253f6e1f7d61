"""Which preset is recommended for a first run and for a long one: by time, by kind, and by the text that there is."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowvram.config.plan import Ledger
from lowvram.config.run_file import load_preset
from lowvram.fit.epochs import Part, RunText
from lowvram.fit.memory_curve import MemoryCurve, Rehearsal, Work
from lowvram.fit.recommend import TOO_SLOW_DAYS, explain_too_little, limit_tokens, recommend, recommend_first
from lowvram.fit.report import FitReport, MemoryBudget, evaluate_fit
from lowvram.hardware.profile import load_profile

HOUR = 1 / 24
MODEL, TRAIN = load_preset("tr-25m")
REHEARSAL = Rehearsal(Ledger(1, 1, 1, 1, 1, 1, "backward"), Work(1e12, 1e9, 1000.0), Work(0.0, 5e8, 100.0))
REPORT = evaluate_fit(
    "tr-25m",
    MODEL,
    TRAIN,
    MemoryCurve([64], lambda _: REHEARSAL, 1024),
    MemoryBudget(load_profile("rtx5070"), 2**33, 2**33),
)


def invented(name: str, days: float | None, lacks: int = 0, fits: bool = True) -> FitReport:
    """A report about a preset that takes so many days."""
    model, train = load_preset(name)
    speed = None if days is None else REPORT.speed._replace(tokens_per_second=train.tokens / days / 86_400)
    found = REPORT.search_result._replace(fits=fits)
    return REPORT._replace(
        name=name, model=model, train=train, search_result=found, speed=speed, days=days, lacks_host_bytes=lacks
    )


def text(tokens: int) -> RunText:
    return RunText((Part(Path("train"), tokens, 4 * tokens),), True)


def test_the_largest_that_ends_in_time_is_recommended() -> None:
    reports = [invented("tr-25m", 0.1), invented("tr-125m", 5.0), invented("tr-350m", 30.0)]
    advice = recommend(reports)
    assert (advice.report, advice.tokens) == (reports[1], None)
    assert advice.reason == "the largest dense preset that is expected to see all of its tokens within 21 days"
    assert recommend(reports, 30.0).report == reports[2]
    assert recommend(reports, 29.9).report == reports[1]
    assert recommend(reports, 0.5).report.name == "tr-25m"


def test_dense_goes_before_mixtures_and_ours_before_others_however_large() -> None:
    dense, moe, other = invented("tr-25m", 1.0), invented("tr-2b-moe", 1.0), invented("ismail-1024", 1.0)
    assert recommend([dense, moe, other]).report == dense
    assert recommend([moe, other]).report == moe
    assert recommend([moe, other]).reason.startswith("the largest preset that is expected to see")
    assert recommend([other]).report == other
    assert recommend([dense._replace(search_result=dense.search_result._replace(fits=False)), moe]).report == moe


def test_of_mixtures_the_worth_lies_between_all_and_active_parameters() -> None:
    many, few = invented("tr-600m-moe", 1.0), invented("tr-130m-moe", 1.0)
    assert recommend([few, many]).report == many


def test_where_none_ends_in_time_the_quickest_is_recommended() -> None:
    reports = [invented("tr-25m", 33.0), invented("tr-125m", 90.0)]
    advice = recommend(reports)
    assert advice.report == reports[0]
    assert advice.reason == "the quickest; none is expected to see all of its tokens within 21 days"


def test_where_no_speed_is_known_the_largest_that_fits_is_recommended_and_the_smallest_first() -> None:
    reports = [invented("tr-25m", None), invented("tr-125m", None)]
    assert recommend(reports).report == reports[1]
    assert recommend(reports).reason == "the largest dense preset that fits; how fast this card is, is not known"
    assert recommend_first(reports).report == reports[0]


def test_what_does_not_fit_card_or_computer_is_never_recommended() -> None:
    reports = [invented("tr-25m", 0.01), invented("tr-125m", 0.01, lacks=1), invented("tr-350m", 0.01, fits=False)]
    for choose in (recommend, recommend_first):
        assert choose(reports).report.name == "tr-25m"
        assert choose(reports[1:]) is None


@pytest.mark.parametrize("hours, name", [(2.0, "tr-60m"), (2.01, "tr-25m")])
def test_a_first_run_ends_within_two_hours(hours: float, name: str) -> None:
    advice = recommend_first([invented("tr-25m", HOUR), invented("tr-60m", hours * HOUR), invented("tr-125m", 1.0)])
    assert (advice.report.name, advice.tokens) == (name, None)


def test_a_first_run_on_a_slow_card_is_as_many_tokens_as_an_hour_allows() -> None:
    slow = invented("tr-25m", 10 * HOUR)
    advice = recommend_first([slow, invented("tr-125m", 3.0)])
    assert advice.report == slow
    assert advice.tokens == 50_000_000 // 65_536 * 65_536
    assert advice.days == pytest.approx(HOUR, rel=0.01)


@pytest.mark.parametrize("tokens_per_parameter, is_offered", [(1.01, True), (0.99, False)])
def test_where_an_hour_teaches_nothing_no_first_run_is_named(tokens_per_parameter: float, is_offered: bool) -> None:
    in_an_hour = tokens_per_parameter * MODEL.num_parameters()
    report = invented("tr-25m", TRAIN.tokens / in_an_hour * HOUR)
    assert (recommend_first([report]) is not None) == is_offered
    assert report.days < TOO_SLOW_DAYS


def test_with_a_text_only_presets_that_it_suits_are_recommended_and_no_more_tokens_than_four_passes() -> None:
    reports = [invented("tr-25m", HOUR), invented("tr-60m", 5 * HOUR), invented("tr-350m", 5.0)]
    advice = recommend(reports, text=text(320_000_000))
    assert (advice.report.name, advice.tokens) == ("tr-60m", None), "3.75 passes"
    assert advice.reason.startswith("the largest dense preset that this text suits and that is expected to see all")
    little = recommend(reports, text=text(6_000_000))
    assert little.report.name == "tr-25m"
    assert little.reason == "4 passes over this text in 366 steps, which is little for any preset"
    assert little.tokens == limit_tokens(reports[0], text(6_000_000))
    assert 0.98 * 24e6 < little.tokens < 24e6
    assert little.days == pytest.approx(HOUR * little.tokens / 500e6)
    assert recommend_first(reports, text(6_000_000)) is not None


# A window of tr-25m takes 1,025 tokens, and its step reads 64 windows: 16 windows give four passes.
@pytest.mark.parametrize(
    "tokens, limit",
    [(2, 0), (1_024, 0), (1_025, 0), (3_000, 0), (16 * 1024, 0), (16 * 1024 + 1, 65_536), (32 * 1024 + 1, 131_072)],
)
def test_a_text_that_gives_no_step_is_recommended_no_run_and_one_that_gives_one_is(tokens: int, limit: int) -> None:
    assert limit_tokens(REPORT, text(tokens)) == limit
    reports = [invented("tr-25m", HOUR), invented("tr-60m", 5 * HOUR)]
    advised = recommend(reports, text=text(tokens)), recommend_first(reports, text(tokens))
    assert [advice and advice.tokens for advice in advised] == ([limit] * 2 if limit else [None] * 2)
    assert (advised[0] is None) == (limit == 0)


def test_a_text_that_is_enough_limits_no_tokens() -> None:
    assert limit_tokens(REPORT, None) is None
    assert limit_tokens(REPORT, text(125_100_000)) is None


def test_a_text_that_suits_no_preset_is_never_said_to_suit_one() -> None:
    """500M tokens are 3.997 passes over it, and a preset of 25.2M parameters wants 125.9M."""
    reports = [invented("tr-25m", HOUR), invented("tr-60m", 5 * HOUR)]
    advice = recommend(reports, text=text(125_100_000))
    assert (advice.report.name, advice.tokens) == ("tr-25m", None)
    assert advice.reason == (
        "the smallest dense preset, since this text is little for any, and one that is expected to see all of its "
        "tokens within 21 days"
    )
    suited = recommend([invented("tr-25m", HOUR)], text=text(125_900_000))
    assert suited.reason.startswith("the largest dense preset that this text suits")


def test_too_little_text_is_told_why_and_how_much_is_wanted() -> None:
    said = explain_too_little([invented("tr-60m", 1.0), REPORT, invented("tiny-llm-v1", 1.0)], text(2_049))
    assert said == (
        "This text of 2,049 tokens is too little for tr-25m.",
        "A single step of tr-25m reads 65,536 tokens, which is this text 32 times.",
        "Pack more text: tr-25m wants 125.9M tokens.",
    )
    assert explain_too_little([REPORT], text(1_024))[1] == "One window of tr-25m is 1,025 tokens long."
