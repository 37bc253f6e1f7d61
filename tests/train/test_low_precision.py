"""Training whose products are made of 8 bits: which layers, that it learns, and that plans agree."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lowvram_kernels.matmul import kept_codes
from torch import Tensor

from lowvram.objective import Batch, causal_loss
from lowvram.train.events import Evaluated, StepDone
from tests.tiny import KINDS, prepare_home, tensors_of, tiny_run, trainer_of, unequal

PRECISIONS = ("fp8", "int8")
# Rounding operands to 8 bits moves a loss of some 6 nats by less than this, in six steps from the same start.
CLOSE = 0.02
each_precision = pytest.mark.parametrize("precision", PRECISIONS)
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("home")
    prepare_home(place)
    return place


def losses_of(home: Path, kind: str, precision: str, beside: str) -> list[float]:
    what = tiny_run(home, kind, f"{kind}-{precision}-beside-{beside}", precision=precision)
    return [event.loss for event in trainer_of(what).run() if isinstance(event, StepDone)]


@each_precision
@each_kind
def test_it_learns_nearly_what_bf16_learns(home: Path, kind: str, precision: str) -> None:
    plain, low = losses_of(home, kind, "bf16", precision), losses_of(home, kind, precision, "bf16")
    assert low != plain, "it is another precision"
    assert low[-1] < low[0]
    for own, other in zip(low, plain, strict=True):
        assert math.isclose(own, other, rel_tol=CLOSE)


@each_precision
@each_kind
def test_attention_and_feed_forward_layers_multiply_in_8_bits_and_nothing_else_does(
    home: Path, kind: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    quantise_weight = kept_codes.quantise_weight

    def watched(weight: Tensor, *rest: Any, **more: Any) -> Any:
        seen.append(weight)
        return quantise_weight(weight, *rest, **more)

    monkeypatch.setattr(kept_codes, "quantise_weight", watched)
    trainer = trainer_of(tiny_run(home, kind, f"which-{kind}-{precision}", precision=precision))
    model = trainer.state.model
    batch = Batch(trainer.loader.batch(0, 2), torch.arange(2))
    causal_loss(model, batch, dtype=torch.bfloat16).total.backward()
    quantised = {
        name for name, weight in model.named_parameters() if any(weight.data_ptr() == own.data_ptr() for own in seen)
    }
    kept_higher = {name for name, _ in model.named_parameters() if "norm" in name or "router" in name}
    assert quantised == {name for name, _ in model.named_parameters()} - kept_higher - {"embedding", "head"}
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())


@each_precision
def test_the_same_run_gives_the_same_bits(home: Path, precision: str) -> None:
    first, second = (trainer_of(tiny_run(home, "mla-moe", f"twice-{n}-{precision}", precision=precision)) for n in "ab")
    assert [list(trainer.run()) for trainer in (first, second)]
    assert unequal(tensors_of(first), tensors_of(second)) == []


@each_precision
def test_validation_sees_the_function_that_training_saw(home: Path, precision: str) -> None:
    what = tiny_run(home, "gqa-rope", f"seen-{precision}", precision=precision)
    trainer = trainer_of(what)
    told = [event.loss for event in trainer.run() if isinstance(event, Evaluated)]
    assert trainer.state.model.blocks[0].attention.q_proj.matmul_format == {"fp8": "e4m3", "int8": "int8"}[precision]
    assert told
    assert all(0.0 < loss < 10.0 for loss in told)


@each_precision
def test_weights_and_checkpoint_are_those_of_a_plain_model(home: Path, precision: str) -> None:
    low, plain = (
        trainer_of(tiny_run(home, "mla-moe", f"names-{name}", precision=name)).state.tensors()
        for name in (precision, "bf16")
    )
    for own, other in zip(low, plain, strict=True):
        assert {name: (t.shape, t.dtype) for name, t in own.items()} == {
            name: (t.shape, t.dtype) for name, t in other.items()
        }
