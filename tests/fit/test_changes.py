"""What is proposed where nothing fits: only what really fits, the mildest first, and nothing that is not needed."""

from __future__ import annotations

import pytest

from lowvram.config import ModelConfig, TrainConfig
from lowvram.fit.changes import Change, propose
from lowvram.plan import Ledger
from lowvram.runfile import load_preset

LAYER, TOKEN, FIXED = 1_000, 2, 5_000
OPTIMIZER = {32: 8_000, 8: 2_000}
MODEL, TRAIN = load_preset("tr-25m")  # 12 layers, 1,024 tokens
NEEDS = FIXED + 12 * LAYER + 1024 * TOKEN + OPTIMIZER[32]


def smallest(model: ModelConfig, train: TrainConfig) -> Ledger:
    """An invented step: every layer, every token and every moment takes its bytes."""
    return Ledger(FIXED, LAYER * model.layers, OPTIMIZER[train.optimizer.bits], TOKEN * train.seq_len, 0, 0, "backward")


def changes(limit_bytes: int, model: ModelConfig = MODEL, train: TrainConfig = TRAIN) -> list[Change]:
    return list(propose(model, train, limit_bytes, smallest))


def with_bits(bits: int) -> TrainConfig:
    return TRAIN.model_copy(update={"optimizer": TRAIN.optimizer.model_copy(update={"bits": bits})})


def test_the_mildest_comes_first_and_8_bits_stand_alone_where_they_are_enough() -> None:
    found = changes(NEEDS - 1_000)
    assert found == [
        Change(("optimizer.bits=8",), "the optimizer's memory in 8 bits", NEEDS - 6_000),
        Change(("train.seq_len=512",), "a shorter context", NEEDS - 1_024),
        Change(("model.layers=11",), "fewer layers", NEEDS - 1_000),
    ]


def test_what_one_change_cannot_do_is_tried_with_8_bits() -> None:
    found = changes(NEEDS - 7_000)
    assert [change.sets for change in found] == [
        ("optimizer.bits=8", "train.seq_len=512"),
        ("optimizer.bits=8", "model.layers=11"),
    ]
    assert found[0].says == "a shorter context, and the optimizer's memory in 8 bits"


def test_a_run_with_8_bits_is_not_told_to_take_them() -> None:
    found = changes(NEEDS - 6_000 - 1_500, train=with_bits(8))
    assert [change.sets for change in found] == [("train.seq_len=256",), ("model.layers=10",)]


def test_nothing_is_proposed_that_does_not_fit() -> None:
    for limit_bytes in range(FIXED, NEEDS, 777):
        for change in changes(limit_bytes):
            assert change.peak_bytes <= limit_bytes
            values = dict(assignment.split("=") for assignment in change.sets)
            model = MODEL.model_copy(update={"layers": int(values.get("model.layers", MODEL.layers))})
            train = with_bits(int(values.get("optimizer.bits", 32)))
            train = train.model_copy(update={"seq_len": int(values.get("train.seq_len", TRAIN.seq_len))})
            assert smallest(model, train).peak_bytes == change.peak_bytes


def test_where_nothing_helps_nothing_is_proposed() -> None:
    assert changes(FIXED) == []


@pytest.mark.parametrize("seq_len, expected", [(1024, 256), (768, 384), (510, None), (257, None)], ids=str)
def test_a_shorter_context_still_divides_the_step(seq_len: int, expected: int | None) -> None:
    train = with_bits(8).model_copy(update={"seq_len": seq_len, "batch_tokens": seq_len * 8})
    needs = smallest(MODEL, train).peak_bytes
    limit_bytes = needs - TOKEN * (seq_len - (expected or 256))
    found = [change.sets[0] for change in changes(limit_bytes, train=train) if "seq_len" in change.sets[0]]
    assert found == ([f"train.seq_len={expected}"] if expected else [])
    assert expected is None or train.batch_tokens % expected == 0


def test_a_mixture_of_experts_keeps_its_dense_layers_and_one_with_experts() -> None:
    model, _ = load_preset("tr-600m-moe")
    least = model.ffn.dense_layers + 1
    fixed = FIXED + OPTIMIZER[8] + TOKEN * 1024
    found = changes(fixed + least * LAYER, model, with_bits(8))
    assert found[-1].sets == (f"model.layers={least}",)
    assert not [
        change for change in changes(fixed + least * LAYER - 1, model, with_bits(8)) if "layers" in change.sets[0]
    ]


def test_fewer_layers_are_found_where_another_moment_is_the_greatest_of_a_small_model() -> None:
    def bent(model: ModelConfig, _: TrainConfig) -> Ledger:
        # Down to six layers each takes 1,000; below, the update is the peak, and a layer takes 100.
        return Ledger(0, 0, 0, max(1_000 * model.layers, 5_400 + 100 * model.layers), 0, 0, "update")

    found = list(propose(MODEL, with_bits(8), 5_750, bent))
    assert found == [Change(("model.layers=3",), "fewer layers", 5_700)]
    assert list(propose(MODEL, with_bits(8), 5_450, bent)) == []


def test_a_model_of_one_layer_has_none_to_give() -> None:
    model = MODEL.model_copy(update={"layers": 1})
    assert changes(FIXED, model) == []
