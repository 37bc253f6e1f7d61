"""What is proposed where nothing fits: only what really fits, the mildest first, and nothing that is not needed."""

from __future__ import annotations

import re
from typing import Any

import pytest

from lowvram.config.model import ModelConfig
from lowvram.config.run_file import load_preset
from lowvram.config.train import AdamW, Rotation, TrainConfig
from lowvram.fit.suggestions import LEAST_GAIN, Change, Weighed, propose, propose_faster

LAYER, TOKEN, FIXED, WAITING = 1_000, 2, 5_000, 3_000
STATES = {("adamw", 32): 8_000, ("adamw", 8): 2_000, ("muon", 16): 2_500, ("muon", 8): 1_000}
WEIGHTS, GRADIENTS = {"fp32": 4_000, "bf16": 2_000}, {"fp32": 4_000, "bf16": 2_000}
MODEL, PRESET = load_preset("tr-25m")  # 12 layers, 1,024 tokens
MIXTURE, _ = load_preset("tr-600m-moe")
TRAIN = PRESET.model_copy(update={"optimizer": AdamW()})


def peak(model: ModelConfig, train: TrainConfig) -> int:
    """An invented step: every layer, token, weight, gradient and moment takes its bytes."""
    bytes_now = FIXED + LAYER * model.layers + TOKEN * train.seq_len + WEIGHTS[train.weights]
    bytes_now += STATES[train.optimizer.name, train.optimizer.bits]
    bytes_now += 0 if train.update_during_backward else GRADIENTS[train.weights]
    return bytes_now + (WAITING if model.ffn.kind == "moe" and train.rotation is None else 0)


def weigh(model: ModelConfig, train: TrainConfig) -> Weighed:
    return Weighed(peak(model, train), 1_000.0 if train.rotation is None else 800.0)


def changes(limit_bytes: int, model: ModelConfig = MODEL, train: TrainConfig = TRAIN) -> list[Change]:
    return list(propose(model, train, limit_bytes, weigh))


def with_lightest() -> TrainConfig:
    """Return a recipe that has nothing to give but context and layers."""
    muon = PRESET.model_copy(update={"weights": "bf16", "update_during_backward": True})
    assert (muon.optimizer.name, muon.optimizer.bits) == ("muon", 8)
    return muon


NEEDS = peak(MODEL, TRAIN)


def test_the_mildest_comes_first_and_each_that_is_enough_stands_alone() -> None:
    found = changes(NEEDS - 3_900)
    assert [change.sets for change in found] == [
        ("optimizer.bits=8",),
        ("optimizer.name=muon", "optimizer.bits=8"),
        ("train.weights=bf16",),
        ("train.update_during_backward=true", "train.batch_tokens=8192"),
        ("model.layers=8",),
    ]
    assert found[0].peak_bytes == NEEDS - 6_000
    assert all(re.fullmatch(r"no slower; \w.+", change.costs) for change in found), "both costs are named"
    assert "steps of 8,192 tokens instead of 65,536" in found[3].costs


def test_what_no_change_can_do_alone_is_done_by_as_few_as_it_takes() -> None:
    found = changes(NEEDS - 10_500)
    assert found[0].sets == ("optimizer.bits=8", "optimizer.name=muon", "train.weights=bf16")
    assert found[0].peak_bytes == NEEDS - 11_000


def test_with_a_shorter_context_or_fewer_layers_go_8_bits_and_bf16_weights_where_they_must() -> None:
    found = changes(NEEDS - 11_400)
    assert found[1].sets == ("optimizer.bits=8", "train.weights=bf16", "train.seq_len=256")
    assert found[1].says == "a shorter context, the optimizer's memory in 8 bits, weights and gradients in bf16"
    assert found[2].sets == ("optimizer.bits=8", "train.weights=bf16", "model.layers=10")


def test_a_recipe_that_has_all_of_it_is_told_to_take_none_again() -> None:
    train = with_lightest()
    found = changes(peak(MODEL, train) - 1_500, train=train)
    assert [change.sets for change in found] == [("train.seq_len=256",), ("model.layers=10",)]


def test_experts_take_turns_where_there_are_any_and_the_computer_has_room() -> None:
    limit_bytes = peak(MIXTURE, TRAIN) - WAITING
    sets = ("rotation.window=2", "rotation.interval=80", "rotation.idle=int8")
    by_sets = {change.sets: change for change in changes(limit_bytes, MIXTURE)}
    assert by_sets[sets].costs.startswith("1.25 times as long; ")
    assert sets not in {change.sets for change in changes(NEEDS - 3_000)}, "a dense model has none"
    crowded = list(propose(MIXTURE, TRAIN, limit_bytes, weigh, can_move=False))
    assert sets not in {change.sets for change in crowded}, "one memory has no other side"

    def without_room(model: ModelConfig, train: TrainConfig) -> Weighed:
        return weigh(model, train)._replace(fits_host=train.rotation is None)

    assert sets not in {change.sets for change in propose(MIXTURE, TRAIN, limit_bytes, without_room)}


def test_a_computer_with_too_little_memory_is_told_to_let_no_expert_wait_there() -> None:
    rotating = TRAIN.model_copy(update={"rotation": Rotation(window=2)})

    def crowded(model: ModelConfig, train: TrainConfig) -> Weighed:
        return weigh(model, train)._replace(fits_host=train.rotation is None)

    found = list(propose(MIXTURE, rotating, peak(MIXTURE, TRAIN), crowded))
    assert ("train.rotation=none",) in {change.sets for change in found}


def test_what_the_run_file_would_refuse_is_not_proposed() -> None:
    odd = MIXTURE.model_copy(update={"ffn": MIXTURE.ffn.model_copy(update={"expert_hidden": 100}), "dim": 40})
    rotating = TRAIN.model_copy(update={"rotation": Rotation(window=2)})
    found = list(propose(odd, rotating, peak(odd, rotating) - 1, weigh))
    assert found
    assert not [change for change in found if "optimizer.bits=8" in change.sets]


def test_too_short_a_run_for_everybodys_turn_is_not_told_to_rotate() -> None:
    short = TRAIN.model_copy(update={"tokens": 3 * TRAIN.batch_tokens})
    assert not [change for change in changes(peak(MIXTURE, short) - 1, MIXTURE, short) if "rotation" in change.sets[0]]


@pytest.mark.parametrize("model", [MODEL, MIXTURE], ids=["dense", "moe"])
def test_nothing_is_proposed_that_does_not_fit(model: ModelConfig) -> None:
    for limit_bytes in range(FIXED, peak(model, TRAIN), 777):
        for change in changes(limit_bytes, model):
            assert change.peak_bytes <= limit_bytes
            values = dict(assignment.split("=") for assignment in change.sets)
            layers = int(values.get("model.layers", model.layers))
            assert peak(model.model_copy(update={"layers": layers}), overlaid(values)) == change.peak_bytes


def overlaid(values: dict[str, str]) -> TrainConfig:
    """Return the recipe under what was proposed, as the run file's own reading makes it."""
    tables = TRAIN.model_dump(mode="json", exclude_none=True)
    for key, value in values.items():
        home, name = key.split(".")
        if home != "model":
            table = tables if home == "train" else tables.setdefault(home, {})
            table[name] = {"true": True}.get(value, int(value) if value.isdigit() else value)
    return TrainConfig.model_validate(tables)


def test_where_nothing_helps_nothing_is_proposed() -> None:
    assert changes(FIXED) == []


@pytest.mark.parametrize("seq_len, expected", [(1024, 256), (768, 384), (510, None), (257, None)], ids=str)
def test_a_shorter_context_still_divides_the_step(seq_len: int, expected: int | None) -> None:
    train = with_lightest().model_copy(update={"seq_len": seq_len, "batch_tokens": seq_len * 8})
    limit_bytes = peak(MODEL, train) - TOKEN * (seq_len - (expected or 256))
    found = [change.sets[0] for change in changes(limit_bytes, train=train) if "seq_len" in change.sets[0]]
    assert found == ([f"train.seq_len={expected}"] if expected else [])
    assert expected is None or train.batch_tokens % expected == 0


def test_a_mixture_of_experts_keeps_its_dense_layers_and_one_with_experts() -> None:
    train = with_lightest().model_copy(update={"seq_len": 1025, "batch_tokens": 1025 * 8})
    least = MIXTURE.ffn.dense_layers + 1
    limit_bytes = peak(MIXTURE.model_copy(update={"layers": least}), train)
    found = list(propose(MIXTURE, train, limit_bytes, weigh, can_move=False))
    assert found[-1].sets == (f"model.layers={least}",)
    assert list(propose(MIXTURE, train, limit_bytes - 1, weigh, can_move=False)) == []


def test_fewer_layers_are_found_where_another_moment_is_the_greatest_of_a_small_model() -> None:
    def bent(model: ModelConfig, _: TrainConfig) -> Weighed:
        # Down to six layers each takes 1,000; below, the update is the peak, and a layer takes 100.
        return Weighed(max(1_000 * model.layers, 5_400 + 100 * model.layers), None)

    found = list(propose(MODEL, with_lightest(), 5_750, bent))
    assert found == [Change(("model.layers=3",), "fewer layers", 5_700, "time not known; a smaller model")]
    assert list(propose(MODEL, with_lightest(), 5_450, bent)) == []


def test_a_model_of_one_layer_has_none_to_give() -> None:
    model = MODEL.model_copy(update={"layers": 1})
    assert changes(FIXED, model) == []


def weigh_precision(fp8: float | None, int8: float | None, int8_bytes: int = 0) -> Any:
    """An invented card: 1,000 tokens/s in bf16, and so many times as much in 8 bits."""
    speeds = {"bf16": 1.0, "fp8": fp8, "int8": int8}

    def weigh(model: ModelConfig, train: TrainConfig) -> Weighed:
        times, more = speeds[train.precision], int8_bytes if train.precision == "int8" else 0
        return Weighed(peak(model, train) + more, 1_000.0 * times if times is not None else None)

    return weigh


def test_precisions_of_8_bits_are_offered_where_they_are_faster_and_fit() -> None:
    found = list(propose_faster(MODEL, TRAIN, NEEDS, weigh_precision(1.3, 1.62)))
    assert [change.sets for change in found] == [("train.precision=fp8",), ("train.precision=int8",)]
    assert [change.costs for change in found] == [
        "about 1.3 times as fast; learns as well, within 1 %",
        "about 1.6 times as fast; 0.6 % more loss",
    ]


@pytest.mark.parametrize(
    "weigh",
    [
        pytest.param(weigh_precision(LEAST_GAIN - 0.01, 0.7), id="hardly faster"),
        pytest.param(weigh_precision(None, None), id="not known"),
        pytest.param(weigh_precision(None, 3.0, int8_bytes=1), id="does not fit"),
    ],
)
def test_others_are_not(weigh: Any) -> None:
    assert list(propose_faster(MODEL, TRAIN, NEEDS, weigh)) == []


def test_a_run_in_8_bits_or_in_fp32_is_offered_none() -> None:
    for precision in ("fp8", "int8", "fp32"):
        train = TRAIN.model_copy(update={"precision": precision})
        assert list(propose_faster(MODEL, train, NEEDS, weigh_precision(9.0, 9.0))) == []
