"""What a step costs on a card: the launches and bytes of a micro-batch, with the plan that fills an RTX 5070 best."""

from __future__ import annotations

import pytest

from lowvram.config.plan import Plan
from lowvram.config.run_file import load_preset
from lowvram.fit.rehearse import imagine, rehearse
from lowvram.hardware.profile import load_profile

# Launches and GB of one micro-batch in bf16; when the counter was made they were 4,040 and 84.6, 4,678 and 59.5, 4,453
# and 57.6, 5,354 and 94.0; the update's launches were 1,749, 1,313, 2,105 and 2,799.
COSTS = {
    "tr-125m": (8, 1024, "none", True, 570, 26.8, 75),
    "tiny-llm-v1": (32, 512, "none", True, 440, 23.4, 75),
    "tr-130m-moe": (8, 1024, "none", True, 740, 23.8, 186),
    "tr-1b": (1, 2048, "none", False, 1000, 39.0, 231),
}
# The same in 8 bits, with codes of the weights kept.  When each operand was rounded by a launch of its own, these took
# 1,238 launches and 35.2 GB, 1,494 and 38.4; 1,737 and 48.8, 2,111 and 54.4; 1,638 and 32.3.
LOW_COSTS = {
    ("tr-125m", "fp8"): (8, 1024, "none", True, 680, 24.3, 75),
    ("tr-125m", "int8"): (8, 1024, "none", True, 940, 31.9, 75),
    ("tr-1b", "fp8"): (1, 2048, "none", True, 1100, 34.4, 231),
    ("tr-1b", "int8"): (1, 2048, "none", True, 1370, 40.4, 231),
    ("tr-130m-moe", "fp8"): (8, 1024, "none", True, 1150, 28.1, 186),
}


@pytest.mark.parametrize("name, precision", [*((name, "bf16") for name in COSTS), *LOW_COSTS])
def test_a_micro_batch_takes_few_launches_and_bytes(name: str, precision: str) -> None:
    costs = COSTS[name] if precision == "bf16" else LOW_COSTS[name, precision]
    micro_batch, seq_len, recompute, keeps, launches, gigabytes, updates = costs
    model, train = load_preset(name)
    train = train.model_copy(update={"seq_len": seq_len, "precision": precision})
    chunk = 2048 if micro_batch * seq_len > 2048 else None
    plan = Plan(micro_batch=micro_batch, accumulate=4, recompute=recompute, loss_chunk=chunk, keep_casts=keeps)
    rehearsal = rehearse(model, train, plan, imagine(load_profile("rtx5070")))
    assert 0.9 * launches <= rehearsal.micro.ops <= launches
    assert 0.9 * gigabytes <= rehearsal.micro.moved_bytes / 1e9 <= gigabytes
    assert 0.9 * updates <= rehearsal.update.ops <= updates
