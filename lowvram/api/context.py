"""How long a text may get here: what the model was trained for, what the user asks for, and what fits."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from lowvram.api.tasks import Task

if TYPE_CHECKING:
    from lowvram.api.loading import LoadedModel
    from lowvram.config.model import ModelConfig
    from lowvram.model.kv_cache import CacheFormat

# Two contexts that a line is drawn through, each read in whole chunks, before the token that is decoded: there a
# reading needs the most, between them less.
_SAMPLES = (1025, 2049)


class Context(NamedTuple):
    """max_context: tokens of one text, the answer included.  reason: why, as a sentence.  warning: "" for none."""

    max_context: int
    trained_len: int
    reason: str
    warning: str = ""


def find_max_context(
    loaded: LoadedModel, slots: int = 1, asked: int | None = None, cache: CacheFormat = "plain"
) -> Task[Context]:
    """Return the longest text that each of `slots` may hold.

    asked: by the user; None: what the model is made for, or as much of it as fits.  cache: what texts are kept in.
    Raises MachineError where what is asked for, or any text, does not fit.
    """
    from lowvram.api.target import detect_target_of, notices_of

    trained, made_for = loaded.trained_len, reach(loaded.config, loaded.trained_len)
    wanted = asked or made_for
    budget = detect_target_of(loaded.model.embedding.device).budget("bf16")
    yield from notices_of(budget)
    needed = _needed(loaded, slots, wanted, cache)
    if needed <= budget.limit_bytes:
        return Context(wanted, trained, _explain(wanted, trained, made_for, asked), _warn(loaded, wanted))
    fitting = min(wanted - 1, _solve(loaded, slots, budget.limit_bytes, cache))
    # A line is drawn through two points, so its end is looked at too.
    while fitting > 1 and _needed(loaded, slots, fitting, cache) > budget.limit_bytes:
        fitting = fitting * 7 // 8
    if asked is not None or fitting <= 1:
        raise _too_long(wanted, slots, needed, budget.limit_bytes, fitting)
    reason = f"{fitting:,} tokens are what fits beside the weights; the model is made for {made_for:,}."
    return Context(fitting, trained, reason, _warn(loaded, fitting))


def reach(config: ModelConfig, trained_len: int) -> int:
    """Return the tokens that a model is made for: those that it was trained on, times what YaRN stretches them by."""
    yarn = config.positions.yarn if config.positions.kind == "rope" else None
    if yarn is None:
        return trained_len
    # A run whose sequences are longer than the original ones has been trained on stretched ones.
    return max(trained_len, int(min(trained_len, yarn.original_len) * yarn.factor))


def _needed(loaded: LoadedModel, slots: int, max_context: int, cache: CacheFormat = "plain") -> int:
    from lowvram_kernels.dispatch import card_of

    from lowvram.fit.inference_memory import rehearse_inference

    card = card_of(loaded.model.embedding.device)
    return rehearse_inference(loaded.model, loaded.dtype, slots, max_context, card, cache)


def _solve(loaded: LoadedModel, slots: int, limit_bytes: int, cache: CacheFormat) -> int:
    few, many = (_needed(loaded, slots, length, cache) for length in _SAMPLES)
    per_token = (many - few) / (_SAMPLES[1] - _SAMPLES[0])
    return max(1, int(_SAMPLES[0] + (limit_bytes - few) / per_token))


def _explain(wanted: int, trained: int, made_for: int, asked: int | None) -> str:
    if asked is not None:
        return f"{wanted:,} tokens, as asked."
    if made_for > trained:
        return f"{wanted:,} tokens: trained on {trained:,}, which YaRN stretches."
    return f"{wanted:,} tokens, the length that it was trained on."


def _warn(loaded: LoadedModel, max_context: int) -> str:
    trained, positions = loaded.trained_len, loaded.config.positions
    if max_context <= trained:
        return ""
    untested = f"Quality is untested beyond {trained:,} tokens, the longest text that this model was trained on"
    if positions.kind == "alibi":
        return f"{untested}; ALiBi's penalty goes on, and far tokens count less and less."
    if positions.yarn is None:
        return f"{untested}; plain RoPE usually fails there: train with positions.yarn, or keep to {trained:,}."
    stretched = reach(loaded.config, trained)
    if max_context > stretched:
        return f"{untested}, and YaRN stretches to {stretched:,} only."
    return f"{untested}; YaRN stretches its positions to {stretched:,}."


def _too_long(wanted: int, slots: int, needed: int, limit_bytes: int, fitting: int) -> Exception:
    from lowvram.errors import MachineError, argument
    from lowvram.units import show_bytes

    texts = f"{slots} texts of {wanted:,} tokens need" if slots > 1 else f"A text of {wanted:,} tokens needs"
    fix = (
        f"Give {argument('max_context', fitting)}, or fewer texts at once."
        if fitting > 1
        else "End what else runs on the card."
    )
    return MachineError(
        f"{texts} {show_bytes(needed)} beside the weights.", f"{show_bytes(limit_bytes)} are free.", fix
    )
