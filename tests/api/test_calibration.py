"""What `fit` times when it is asked to measure: on a card of NVIDIA's all kinds of products."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
import torch

from lowvram.api import calibration
from lowvram.api.target import describe_target
from lowvram.api.tasks import Notice
from lowvram.config.run_file import load_preset


@pytest.mark.parametrize(
    ("precision", "timed"), [("bf16", ["bf16", "fp8", "int8"]), ("fp32", ["fp32"]), ("int8", ["int8"])]
)
def test_on_a_card_a_run_in_16_bits_is_timed_in_8_bits_too(
    precision: str, timed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []

    def time(name: str, model: Any, train: Any, *_: Any) -> Generator[Notice, None, bool]:
        found.append(train.precision)
        yield from ()
        return train.precision != "int8" or precision == "int8"

    monkeypatch.setattr(calibration, "_calibrate", time)
    monkeypatch.setattr("lowvram.api.device.choose_device", lambda _: (torch.device("cuda"), ()))
    model, train = load_preset("tr-25m")
    chosen = train.model_copy(update={"precision": precision})
    notices = list(calibration.calibrate("tr-25m", model, chosen, describe_target("rtx5070")))
    assert found == timed
    told = [notice.text for notice in notices if "does not fit here in int8" in notice.text]
    assert len(told) == (1 if precision == "bf16" else 0)
