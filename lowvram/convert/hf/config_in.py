"""Reads transformers' config.json as a ModelConfig, or names the unsupported key; knows no tensor and no file.

Source of each class's defaults: transformers 5.24, models/*/configuration_*.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError

from lowvram.config.allowed import describe_allowed
from lowvram.config.architecture import Gqa, Mla, Moe, Rope, SwiGlu, Window, Yarn
from lowvram.config.model import ModelConfig
from lowvram.convert.hf.config_out import MLA_NORM_EPS
from lowvram.errors import ExportError

# Keys for which our model supports only one value.
_SUPPORTED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_interleave": True,
    "n_group": 1,
    "topk_group": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "moe_layer_freq": 1,
}
_FAMILIES = ("llama", "mistral", "ministral", "qwen3", "glm4_moe", "dots1", "deepseek_v3")
# Each class's defaults for keys that config.json leaves out, where they differ from those of `_Settings`.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 4096},
    "ministral": {"sliding_window": 4096},
    "qwen3": {"head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
    "glm4_moe": {"partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5},
    "dots1": {"sliding_window": 4096, "max_window_layers": 62, "norm_topk_prob": False, "first_k_dense_replace": 0},
    "deepseek_v3": {"n_group": 8, "topk_group": 4, "first_k_dense_replace": 3, "routed_scaling_factor": 2.5},
}
_LAYER_KINDS = {"full_attention": "F", "sliding_attention": "S"}


_LONGEST_VALUE = 120
# Larger than in any existing model: a damaged number must not cause much work before the files are checked.
_Count = Annotated[int, Field(gt=0, le=100_000)]
_Width = Annotated[int, Field(gt=0, le=1 << 31)]


class _Table(BaseModel):
    # Infinities are refused; JSON's 1e999 becomes one, too.
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)


class _Own(_Table):
    trained_positions: _Width | None = None
    balance_rate: float | None = None
    window_pattern: str | None = None


class _Rotary(_Table):
    rope_type: str = "default"
    rope_theta: PositiveFloat = 10_000.0
    factor: PositiveFloat | None = None
    original_max_position_embeddings: _Width | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    partial_rotary_factor: float = 1.0
    truncate: bool | None = None


class _Settings(_Table):
    vocab_size: _Width
    hidden_size: _Width
    intermediate_size: _Width
    num_hidden_layers: _Count
    num_attention_heads: _Width
    num_key_value_heads: _Width | None = None
    head_dim: _Width | None = None
    rms_norm_eps: PositiveFloat = 1e-6
    tie_word_embeddings: bool = False
    max_position_embeddings: _Width = 2048
    use_qk_norm: bool = False
    use_sliding_window: bool = False
    sliding_window: _Width | None = None
    max_window_layers: int | None = None
    layer_types: list[str] | None = None
    kv_lora_rank: _Width | None = None
    q_lora_rank: _Width | None = None
    qk_nope_head_dim: _Width | None = None
    qk_rope_head_dim: _Width | None = None
    v_head_dim: _Width | None = None
    n_routed_experts: _Count | None = None
    num_experts_per_tok: _Count | None = None
    n_shared_experts: _Count | None = 1
    moe_intermediate_size: _Width | None = None
    first_k_dense_replace: int = Field(default=1, ge=0)
    routed_scaling_factor: PositiveFloat = 1.0
    rope_parameters: _Rotary
    lowvram: _Own = _Own()


class ImportedConfig(NamedTuple):
    """The contents of a config.json.

    max_positions: the longest text that the model supports.  trained_positions: the longest text in training where
    config.json says that, else max_positions.
    """

    model: ModelConfig
    max_positions: int
    trained_positions: int


def read_hf_config(table: Mapping[str, Any]) -> ImportedConfig:
    """Return the model that the values of a config.json describe.

    Raises ExportError naming the key and the value that is missing, malformed, or not supported by our model.
    """
    family = table.get("model_type")
    if family not in _FAMILIES:
        raise ExportError(
            f"model_type is {quote_value(family)}.",
            "Only models of these types have a form that lowvram knows.",
            f"It can take: {', '.join(_FAMILIES)}.",
        )
    table = _DEFAULTS.get(family, {}) | dict(table)
    for key, supported in _SUPPORTED.items():
        if key in table and table[key] != supported:
            why = f"our model supports only {supported!r} here, and would compute something else"
            raise _cannot(key, table[key], why)
    table["rope_parameters"] = _gather_rotary(table)
    try:
        settings = _Settings.model_validate(table)
        model = ModelConfig(
            layers=settings.num_hidden_layers,
            dim=settings.hidden_size,
            vocabulary=settings.vocab_size,
            attention=_attention(family, settings, table),
            positions=_positions(family, settings),
            ffn=_ffn(family, settings),
            window=_window(family, settings),
            tied=settings.tie_word_embeddings,
            norm_eps=settings.rms_norm_eps,
        )
    except ValidationError as error:
        raise ExportError(*_explain(error)) from error
    if family == "deepseek_v3" and model.norm_eps != MLA_NORM_EPS:
        why = f"the norms inside MLA have {MLA_NORM_EPS:g}, and ours are all alike"
        raise _cannot("rms_norm_eps", model.norm_eps, why)
    longest = settings.max_position_embeddings
    return ImportedConfig(model, longest, settings.lowvram.trained_positions or longest)


def quote_value(value: Any) -> str:
    """Return a value's Python repr, cut to the length of one line of an error."""
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"


def _cannot(key: str, value: Any, why: str) -> ExportError:
    return ExportError(
        f"{key} is {quote_value(value)}.", f"{why[0].upper()}{why[1:]}.", "lowvram cannot open this model."
    )


def _explain(error: ValidationError) -> tuple[str, str, str]:
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "missing":
        what = f"config.json has no {key}."
    elif key:
        what = f"{key} is {quote_value(problem['input'])}; {describe_allowed(problem)}."
    else:
        what = f"config.json describes no model: {problem['msg'].removeprefix('Value error, ')}."
    return what, "Without it the form of the model is not known.", "Copy the directory anew, or mend that key."


def _need(settings: _Settings, key: str) -> Any:
    value = getattr(settings, key)
    if value is None:
        fix = "Copy the directory anew, or write it in."
        raise ExportError(f"config.json has no {key}.", "This model_type has no form without it.", fix)
    return value


def _attention(family: str, settings: _Settings, table: Mapping[str, Any]) -> Gqa | Mla:
    heads = settings.num_attention_heads
    if family != "deepseek_v3":
        return Gqa(
            heads=heads,
            kv_heads=settings.num_key_value_heads or heads,
            head_dim=settings.head_dim or settings.hidden_size // heads,
            qk_norm=family in ("qwen3", "dots1") or (family == "glm4_moe" and settings.use_qk_norm),
        )
    if "q_lora_rank" not in table:
        raise ExportError("config.json has no q_lora_rank.", "It may be a number or null.", "Write which.")
    return Mla(
        heads=heads,
        kv_lora_rank=_need(settings, "kv_lora_rank"),
        q_lora_rank=settings.q_lora_rank,
        nope_dim=_need(settings, "qk_nope_head_dim"),
        rope_dim=_need(settings, "qk_rope_head_dim"),
        value_dim=_need(settings, "v_head_dim"),
    )


def _ffn(family: str, settings: _Settings) -> SwiGlu | Moe:
    dense = SwiGlu(hidden=settings.intermediate_size)
    if family not in ("deepseek_v3", "glm4_moe", "dots1"):
        return dense
    if settings.first_k_dense_replace >= settings.num_hidden_layers:
        return dense
    own = {} if settings.lowvram.balance_rate is None else {"balance_rate": settings.lowvram.balance_rate}
    return Moe(
        hidden=settings.intermediate_size,
        dense_layers=settings.first_k_dense_replace,
        experts=_need(settings, "n_routed_experts"),
        top_k=_need(settings, "num_experts_per_tok"),
        shared=_need(settings, "n_shared_experts"),
        expert_hidden=_need(settings, "moe_intermediate_size"),
        route_scale=settings.routed_scaling_factor,
        **own,
    )


def _window(family: str, settings: _Settings) -> Window | None:
    size, layers = settings.sliding_window, settings.num_hidden_layers
    if size is None or family in ("llama", "glm4_moe", "deepseek_v3"):
        return None
    if family == "qwen3" and not settings.use_sliding_window:
        return None
    if family == "mistral":
        pattern = "S" * layers
    elif settings.layer_types is not None:
        strange = [kind for kind in settings.layer_types if kind not in _LAYER_KINDS]
        if strange or len(settings.layer_types) != layers:
            value = strange[0] if strange else settings.layer_types
            raise _cannot("layer_types", value, f"it must name {' or '.join(_LAYER_KINDS)} for each of {layers} layers")
        pattern = "".join(_LAYER_KINDS[kind] for kind in settings.layer_types)
    else:
        first = 0 if family == "ministral" else int(_need(settings, "max_window_layers"))
        pattern = "".join("S" if layer >= first else "F" for layer in range(layers))
    own = settings.lowvram.window_pattern
    if own and "".join(own[n % len(own)] for n in range(layers)) == pattern:
        pattern = own
    return Window(size=size, pattern=pattern) if own or "S" in pattern else None


def _gather_rotary(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return `rope_parameters`, or the older keys that stand in for it."""
    newer, older = table.get("rope_parameters"), table.get("rope_scaling")
    for key, value in (("rope_parameters", newer), ("rope_scaling", older)):
        if value is not None and not isinstance(value, dict):
            raise ExportError(
                f"{key} is {quote_value(value)}.", "It must be a table or null.", "Copy the directory anew."
            )
    # Where both exist, the older one is used, as in transformers.
    settings = dict(older or newer or {})
    settings.setdefault("rope_type", settings.get("type", "default"))
    for key in ("rope_theta", "partial_rotary_factor"):
        if table.get(key) is not None:
            settings.setdefault(key, table[key])
    return {key: value for key, value in settings.items() if value is not None}


def _positions(family: str, settings: _Settings) -> Rope:
    rotary = settings.rope_parameters
    if rotary.partial_rotary_factor != 1.0:
        raise _cannot("partial_rotary_factor", rotary.partial_rotary_factor, "our heads are rotated whole")
    if rotary.rope_type == "default":
        return Rope(theta=rotary.rope_theta)
    if rotary.rope_type != "yarn":
        raise _cannot("rope_type", rotary.rope_type, 'our positions are "default" or "yarn"')
    if rotary.truncate is False:
        raise _cannot("truncate", False, "our YaRN rounds the bounds of its ramp")
    original = rotary.original_max_position_embeddings or settings.max_position_embeddings
    factor = rotary.factor or settings.max_position_embeddings / original
    read_mscale = _mla_mscale if family == "deepseek_v3" else _gqa_mscale
    yarn = Yarn(
        factor=factor,
        original_len=original,
        beta_fast=rotary.beta_fast or 32.0,
        beta_slow=rotary.beta_slow or 1.0,
        mscale=read_mscale(rotary, factor),
    )
    return Rope(theta=rotary.rope_theta, yarn=yarn)


def _mla_mscale(rotary: _Rotary, factor: float) -> float:
    """Return mscale_all_dim, with which DeepSeek scales the softmax; its rotary table is unscaled if both are equal."""
    if not rotary.mscale_all_dim or rotary.mscale != rotary.mscale_all_dim or rotary.attention_factor is not None:
        values = (rotary.mscale, rotary.mscale_all_dim, rotary.attention_factor)
        raise _cannot(
            "rope_parameters", values, "mscale and mscale_all_dim must be equal and not 0, without attention_factor"
        )
    return rotary.mscale_all_dim


def _gqa_mscale(rotary: _Rotary, factor: float) -> float:
    """Return mscale from the factor of Llama's rotary table (queries and keys): 0.1 · mscale · ln(factor) + 1."""
    magnitude = rotary.attention_factor
    if magnitude is None and rotary.mscale and rotary.mscale_all_dim:
        magnitude = _magnitude(rotary.mscale, factor) / _magnitude(rotary.mscale_all_dim, factor)
    if factor <= 1.0:
        return rotary.mscale or 1.0
    if magnitude is None:
        return 1.0
    if rotary.mscale and math.isclose(_magnitude(rotary.mscale, factor), magnitude, rel_tol=1e-12):
        return rotary.mscale
    mscale = (magnitude - 1.0) / (0.1 * math.log(factor))
    if mscale <= 0.0:
        raise _cannot("attention_factor", magnitude, "with YaRN ours is above 1")
    return mscale


def _magnitude(mscale: float, factor: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0
