"""The ledger is what the allocator says: the same step really run, its memory events read from torch's profiler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lowvram_kernels.dispatch import Card
from lowvram_kernels.moe import experts
from lowvram_kernels.optim.adamw8 import build_maps
from torch.profiler import ProfilerActivity, profile

from lowvram.config.model import ModelConfig
from lowvram.config.plan import LEDGER_LINES, Ledger, Plan
from lowvram.config.train import TrainConfig
from lowvram.fit.rehearse import rehearse
from lowvram.model.transformer import Transformer
from lowvram.objective import Batch
from lowvram.train.cuda_graph import SPARE_BYTES
from lowvram.train.state import build_state
from lowvram.train.step import gradients, learn_in_backward, loss_for, update
from tests.kernels.measures import LiveBytes
from tests.sweeps import cover

CPU = Card("cpu")
# What a ledger may differ from the allocator's own events: scratch that kernels take inside one op.
RELATIVE = 0.01

ATTENTIONS: dict[str, dict[str, Any]] = {
    "gqa-rope": {"attention": {"kind": "gqa", "heads": 6, "kv_heads": 2, "head_dim": 32}},
    "gqa-alibi": {
        "attention": {"kind": "gqa", "heads": 6, "kv_heads": 2, "head_dim": 32},
        "positions": {"kind": "alibi"},
    },
    "mla-rope": {
        "attention": {"kind": "mla", "heads": 4, "kv_lora_rank": 96, "nope_dim": 32, "rope_dim": 16, "value_dim": 40}
    },
}
FFNS: dict[str, dict[str, Any]] = {
    "swiglu": {"kind": "swiglu", "hidden": 520},
    "moe": {
        "kind": "moe",
        "hidden": 520,
        "dense_layers": 1,
        "experts": 4,
        "top_k": 2,
        "shared": 1,
        "expert_hidden": 256,
    },
}
SEQ_LEN, MICRO_BATCH = 150, 3


def model_of(attention: str, ffn: str) -> ModelConfig:
    shape = {"layers": 2, "dim": 200, "vocabulary": 1_500}
    return ModelConfig.model_validate({**shape, **ATTENTIONS[attention], "ffn": FFNS[ffn]})


def train_of(accumulate: int, bits: int = 32, **more: Any) -> TrainConfig:
    batch_tokens = SEQ_LEN * MICRO_BATCH * accumulate
    given = {"tokens": batch_tokens, "seq_len": SEQ_LEN, "batch_tokens": batch_tokens, "optimizer": {"bits": bits}}
    return TrainConfig.model_validate({**given, "precision": "fp32", **more})


def batches(plan: Plan, vocabulary: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        Batch(
            torch.randint(0, vocabulary, (plan.micro_batch, SEQ_LEN + 1), generator=generator), torch.arange(i, i + 3)
        )
        for i in range(plan.accumulate)
    ]


def real_steps(model: ModelConfig, train: TrainConfig, plan: Plan, steps: int = 2) -> None:
    """Two steps of the trainer on real tensors: the second has the optimizer's states from the beginning."""
    state = build_state(model, train, plan, torch.device("cpu"), 0)
    network, optimizer = state.model, state.optimizer
    loss_of = loss_for(network, train, plan)
    for step in range(steps):
        if state.rotation is not None:
            state.rotation.rotate_to(step)
        given = batches(plan, model.vocabulary)
        if train.update_during_backward:
            learn_in_backward(network, loss_of, given[0], optimizer, train.batch_tokens, 1e-3, 1.0)
            continue
        found = gradients(network, loss_of, given, train.batch_tokens)
        update(network, optimizer, found.loads, 1e-3, 0.5)
        del found


def allocator_peak(model: ModelConfig, train: TrainConfig, plan: Plan) -> int:
    """Return the most bytes that torch's CPU allocator had given out at once during real steps, by its own events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        real_steps(model, train, plan)
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert len(events) > 1_000, "the profiler has seen the step"
    return peak


@pytest.mark.parametrize("accumulate", [1, 4], ids=lambda n: f"accumulate-{n}")
@pytest.mark.parametrize("bits", [32, 8], ids=lambda n: f"{n}-bit")
@pytest.mark.parametrize("recompute", ["none", "attention", "block"])
@pytest.mark.parametrize("ffn", FFNS)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_ledger_is_what_the_allocator_gave_out(
    attention: str, ffn: str, recompute: Any, bits: int, accumulate: int
) -> None:
    model, train = model_of(attention, ffn), train_of(accumulate, bits)
    plan = Plan(micro_batch=MICRO_BATCH, accumulate=accumulate, recompute=recompute)
    ledger = rehearse(model, train, plan, CPU).ledger
    assert ledger.peak_bytes == pytest.approx(allocator_peak(model, train, plan), rel=RELATIVE)


MUON = {"name": "muon", "bits": 8}
# What saves more: recipe, and what lies where.  Rotation is for experts.
RECIPES: dict[str, dict[str, Any]] = {
    "bf16-weights": {"weights": "bf16", "optimizer": {"bits": 8}},
    "bf16-weights-32-bit": {"weights": "bf16"},
    "muon": {"optimizer": MUON},
    "muon-16-bit-bf16-weights": {"weights": "bf16", "optimizer": {"name": "muon", "bits": 16}},
    "during": {"update_during_backward": True},
    "during-bf16-weights": {"update_during_backward": True, "weights": "bf16", "optimizer": {"bits": 8}},
    "during-muon": {"update_during_backward": True, "weights": "bf16", "optimizer": MUON},
    "rotation": {"rotation": {"window": 1, "interval": 1}},
    "rotation-int8": {"rotation": {"window": 2, "interval": 1, "idle": "int8"}, "optimizer": {"bits": 8}},
    "rotation-muon": {"rotation": {"window": 3, "interval": 1, "idle": "e4m3"}, "weights": "bf16", "optimizer": MUON},
    "rotation-during": {"rotation": {"window": 1, "interval": 1}, "update_during_backward": True, "weights": "bf16"},
}
COMBINATIONS = cover(
    (recipe, ffn, recompute, accumulate, offload)
    for recipe, said in RECIPES.items()
    for ffn in FFNS
    for recompute in ("none", "block")
    for accumulate in (1, 4)
    for offload in ("none", "optimizer")
    if (ffn == "moe" or "rotation" not in said) and (accumulate == 1 or "update_during_backward" not in said)
)


@pytest.mark.parametrize("recipe, ffn, recompute, accumulate, offload", COMBINATIONS)
def test_the_ledger_of_what_saves_more_is_what_the_allocator_gave_out(
    recipe: str, ffn: str, recompute: Any, accumulate: int, offload: Any
) -> None:
    """Without a card both sides are one memory, so the allocator's peak is that of both together."""
    tokens = SEQ_LEN * MICRO_BATCH * accumulate * 8  # eight steps: everybody's turn comes
    model, train = model_of("gqa-rope", ffn), train_of(accumulate, **{"tokens": tokens, **RECIPES[recipe]})
    plan = Plan(micro_batch=MICRO_BATCH, accumulate=accumulate, recompute=recompute, offload=offload)
    ledger = rehearse(model, train, plan, CPU).ledger
    reckoned = ledger.peak_bytes + ledger.kept_on_host
    assert reckoned == pytest.approx(allocator_peak(model, train, plan), rel=RELATIVE)


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize(
    "attention, ffn, recipe",
    cover(
        [
            *((attention, ffn, bits) for attention in ATTENTIONS for ffn in FFNS for bits in ("32-bit", "8-bit")),
            *(("mla-rope", "moe", recipe) for recipe in RECIPES),
        ]
    ),
)
def test_in_bf16_the_ledger_is_what_real_tensors_take(
    attention: str, ffn: str, recipe: str, recompute: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its counter is another than the rehearsal's own; oneDNN's scratch is no tensor, hence not the profiler."""
    said = {"32-bit": {}, "8-bit": {"optimizer": {"bits": 8}}, **RECIPES}[recipe]
    accumulate = 1 if "update_during_backward" in said else 2
    more = {"tokens": SEQ_LEN * MICRO_BATCH * accumulate * 8, "precision": "bf16", "dropout": 0.1, **said}
    model, train = model_of(attention, ffn), train_of(accumulate, **more)
    plan = Plan(micro_batch=MICRO_BATCH, accumulate=accumulate, recompute=recompute)
    with monkeypatch.context() as patch, LiveBytes() as live:
        for name in ("_multiply_slices", "_sum_outer_slices"):  # the counter does not see into ops of ours
            patch.setattr(experts, name, getattr(experts, name)._init_fn)
        real_steps(model, train, plan)
    ledger = rehearse(model, train, plan, CPU).ledger
    assert ledger.peak_bytes + ledger.kept_on_host == pytest.approx(live.peak, rel=RELATIVE)


def ledger_of(card: Card = CPU, ffn: str = "swiglu", recompute: Any = "none", **more: Any) -> Ledger:
    model, train = model_of("gqa-rope", ffn), train_of(4, **more)
    return rehearse(model, train, Plan(micro_batch=MICRO_BATCH, accumulate=4, recompute=recompute), card).ledger


def test_every_line_is_what_it_says() -> None:
    model = model_of("gqa-rope", "swiglu")
    weights = 4 * model.num_parameters()
    ledger = ledger_of()
    rotary = 32 // 2 * 4
    assert ledger.weights == weights + rotary
    assert ledger.gradients == weights, "they accumulate, so all of them exist"
    assert ledger.optimizer == pytest.approx(2 * weights, rel=1e-3)
    assert ledger.optimizer - 2 * weights == 4 * len(list(Transformer(model, None, "meta").parameters()))
    assert ledger.loss >= 4 * model.vocabulary * model.dim, "the head's gradient"
    assert ledger.moment in ("loss", "backward")
    assert ledger.host_bytes == ledger.optimizer
    assert ledger.peak_bytes == sum(ledger.lines().values())
    assert tuple(ledger.lines()) == LEDGER_LINES


def test_each_technique_moves_its_own_line() -> None:
    plain = ledger_of()
    attention, block = ledger_of(recompute="attention"), ledger_of(recompute="block")
    eight = ledger_of(bits=8)
    for other in (attention, block, eight):
        assert other.weights == plain.weights
        assert other.gradients == plain.gradients
    assert block.activations < attention.activations < plain.activations
    assert block.optimizer == attention.optimizer == plain.optimizer
    # Two bytes and a 32nd for each of 8, against eight; norms stay.  Once for all weights, the tables of both codes.
    tables = sum(table.nbytes for codes in build_maps("meta") for table in codes)
    assert eight.optimizer - tables == pytest.approx(plain.optimizer * 2.03125 / 8, rel=0.01)
    assert eight.activations == plain.activations


def test_without_accumulation_gradients_live_only_as_long_as_backward_needs() -> None:
    model, train = model_of("gqa-rope", "swiglu"), train_of(1)
    once = rehearse(model, train, Plan(micro_batch=MICRO_BATCH, accumulate=1), CPU).ledger
    assert once.peak_bytes < ledger_of().peak_bytes


def test_a_smaller_loss_chunk_takes_less_and_dropout_takes_more() -> None:
    model, train = model_of("gqa-rope", "swiglu"), train_of(1)
    plan = Plan(micro_batch=MICRO_BATCH, accumulate=1)
    chunk = plan.model_copy(update={"loss_chunk": 50})
    assert rehearse(model, train, chunk, CPU).ledger.loss < rehearse(model, train, plan, CPU).ledger.loss
    assert ledger_of(dropout=0.1).peak_bytes > ledger_of().peak_bytes


def test_the_card_decides_the_path_and_rounds_to_its_blocks() -> None:
    ampere, turing = Card("cuda", (8, 6)), Card("cuda", (7, 5))
    sixteen = {"precision": "fp16"}
    on_ampere, on_turing, on_mps = (ledger_of(card, **sixteen) for card in (ampere, turing, Card("mps")))
    assert all(size % 512 == 0 for size in on_ampere.lines().values())
    assert on_turing.activations > on_ampere.activations, "keys and values are repeated for every head"
    assert on_mps.activations > on_turing.activations, "every score is kept"


def test_the_work_grows_with_what_is_computed_twice() -> None:
    model, train = model_of("gqa-rope", "moe"), train_of(4)

    def work(recompute: Any, micro_batch: int = MICRO_BATCH) -> Any:
        return rehearse(model, train, Plan(micro_batch=micro_batch, accumulate=4, recompute=recompute), CPU).micro

    plain, again = work("none"), work("block")
    rows = SEQ_LEN * MICRO_BATCH
    # Forward, and twice that in backward; of the embedding only the head multiplies, three times in all.
    assert plain.flops == pytest.approx(6 * rows * (model.active_parameters()), rel=0.02)
    assert 1.2 * plain.flops < again.flops < 4 / 3 * plain.flops
    assert again.attention_flops == pytest.approx(plain.attention_flops * 9 / 7), "two products more than seven"
    assert again.ops > plain.ops
    assert again.moved_bytes > plain.moved_bytes
    assert work("none", 2 * MICRO_BATCH).flops == pytest.approx(2 * plain.flops)


def test_paper_is_left_as_it_was_found() -> None:
    from lowvram_kernels.dispatch import is_simulated

    ledger_of()
    assert not is_simulated()
    assert torch.empty(1).device.type == "cpu"


def test_graphs_take_the_step_beside_a_validation_and_keep_gradients_through_the_update() -> None:
    model, rtx = model_of("gqa-rope", "swiglu"), Card("cuda", (12, 0))
    train = train_of(4, 8, optimizer={"name": "muon", "bits": 8})
    wide, narrow = (
        rehearse(model, train, Plan(micro_batch=n, accumulate=12 // n, recompute="block"), rtx) for n in (3, 1)
    )
    for found in (wide, narrow):
        assert found.recorded_bytes > found.ledger.peak_bytes + SPARE_BYTES
    assert wide.recorded_bytes > narrow.recorded_bytes
    # Launched, the update drops gradients as it goes; a graph's gradients stay, and so this is its least.
    ledger = narrow.ledger
    assert narrow.recorded_bytes > ledger.weights + ledger.optimizer + 4 * model.num_parameters() + SPARE_BYTES
    assert rehearse(model, train, Plan(micro_batch=3, accumulate=4), CPU).recorded_bytes == 0
    alone = train_of(1, 8, update_during_backward=True)
    assert rehearse(model, alone, Plan(micro_batch=3, accumulate=1), rtx).recorded_bytes == 0
