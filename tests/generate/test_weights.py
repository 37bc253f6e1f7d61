"""What is loaded to be read: the same function as the weights that were saved, in the bytes that were promised."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from lowvram_kernels.dispatch import Card, simulate_card
from lowvram_kernels.quant.quantise import QuantTensor, dequantise, quantise_weight
from torch import Tensor

from lowvram.config.model import ModelConfig
from lowvram.config.run_file import load_preset
from lowvram.data.tokenizer import Tokenizer
from lowvram.errors import CheckpointError
from lowvram.generate.weights import CheckpointReader, load_for_inference, weight_bytes
from lowvram.model.transformer import Transformer
from lowvram.storage.checkpoint import Store, open_checkpoint
from tests.kernels.measures import LiveBytes
from tests.model.outside import randomise
from tests.model.variants import VARIANTS

every_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
KEPT_IN_16_BITS = "kv_b_proj.weight"
FORMS = {"fp8": "e4m3", "int8": "int8"}


class Given:
    """Tensors in memory as a Source, and how often each was read."""

    def __init__(self, config: ModelConfig, tensors: dict[str, Tensor | QuantTensor]) -> None:
        self.config, self.tensors = config, tensors
        self.reads: list[str] = []

    def names(self) -> list[str]:
        return list(self.tensors)

    def read(self, name: str) -> Tensor | QuantTensor:
        self.reads.append(name)
        return self.tensors[name]


class RealBytes(LiveBytes):
    """Count what has memory: a hollow model's matrices have none."""

    def _born(self, storage: torch.UntypedStorage) -> None:
        if storage.device.type != "meta":
            super()._born(storage)


def source_of(config: ModelConfig, **others: Tensor | QuantTensor) -> Given:
    return Given(config, dict(randomise(Transformer(config)).state_dict()) | others)


def tokens(config: ModelConfig, count: int = 9) -> Tensor:
    return torch.randint(config.vocabulary, (2, count), generator=torch.Generator().manual_seed(5))


def is_matrix(name: str, tensor: Tensor) -> bool:
    return tensor.dim() > 1 and not name.endswith("router.weight")


def rounded(source: Given, precision: str) -> Transformer:
    """A plain model whose weights went through the precision's round trip: what reading must equal."""
    model = Transformer(source.config, seed=None)
    there: dict[str, Tensor] = {}
    for name, tensor in source.tensors.items():
        assert isinstance(tensor, Tensor)
        there[name] = tensor
        if is_matrix(name, tensor):
            keeps_bf16 = precision == "bf16" or name.endswith(KEPT_IN_16_BITS)
            there[name] = (
                tensor.to(torch.bfloat16).float()
                if keeps_bf16
                else dequantise(quantise_weight(tensor, FORMS[precision]), torch.float32)
            )
    model.load_state_dict(there)
    return model


@every_variant
@pytest.mark.parametrize("precision", ["fp8", "int8", "bf16"])
@pytest.mark.parametrize("count", [1, 9], ids=["few-rows", "many-rows"])
def test_reading_computes_what_the_rounded_weights_stand_for(config: ModelConfig, precision: str, count: int) -> None:
    source = source_of(config)
    model = load_for_inference(source, precision, flow=torch.float32)
    with torch.no_grad():
        found = model.logits(tokens(config, count), torch.float32)
        truth = rounded(source, precision).logits(tokens(config, count))
    assert (found - truth).norm() < 1e-5 * truth.norm()
    assert not model.training
    assert not any(weight.requires_grad for weight in model.parameters())


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_plain_precisions_answer_with_the_bits_of_the_masters(config: ModelConfig, dtype: torch.dtype) -> None:
    source = source_of(config)
    masters = Transformer(config, seed=None)
    masters.load_state_dict(source.tensors)  # type: ignore[arg-type]
    read = load_for_inference(source, "bf16" if dtype == torch.bfloat16 else "fp32", flow=dtype)
    with torch.no_grad():
        assert torch.equal(read.logits(tokens(config), dtype), masters.logits(tokens(config), dtype))
    assert read.embedding.dtype == dtype


@every_variant
def test_norms_and_routers_stay_exact_in_every_precision(config: ModelConfig) -> None:
    source = source_of(config)
    for precision in ("fp8", "int8", "bf16"):
        state = load_for_inference(source, precision).state_dict()
        for name, tensor in source.tensors.items():
            assert isinstance(tensor, Tensor)
            if not is_matrix(name, tensor):
                assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_whole_matrices_are_read_in_one_way(precision: str) -> None:
    source = source_of(VARIANTS["mla-moe"])
    model, plain = load_for_inference(source, precision), rounded(source, precision)
    attention, its = model.blocks[1].attention, plain.blocks[1].attention
    for layer, truth in ((attention.o_proj, its.o_proj), (attention.kv_b_proj, its.kv_b_proj)):
        assert torch.equal(layer.matrix(torch.float32), truth.weight)
    assert attention.kv_b_proj.matrix(torch.bfloat16).data_ptr() == attention.kv_b_proj.weight.data_ptr()
    assert torch.equal(model.head_matrix(torch.float32), plain.head_VD)
    assert torch.equal(model.embed(torch.tensor([3, 66]), torch.float32), plain.embedding[[3, 66]])


def test_8_bits_that_a_source_has_are_taken_over_as_they_are() -> None:
    config = VARIANTS["gqa-moe-untied"]
    plain = source_of(config)
    # Scales that are no powers of two, as older files of others have them.
    codes: dict[str, Tensor | QuantTensor] = {
        name: quantise_weight(tensor, "e4m3", fp32_scales=True)
        for name, tensor in plain.tensors.items()
        if isinstance(tensor, Tensor) and is_matrix(name, tensor)
    }
    source = Given(config, plain.tensors | codes)
    model = load_for_inference(source, "fp8", flow=torch.float32)
    state = model.state_dict()
    for name, scaled in codes.items():
        assert isinstance(scaled, QuantTensor)
        assert torch.equal(state[name], scaled.code), name
        assert torch.equal(state[f"{name}_scale"], scaled.scale), name
    decoded = {
        name: dequantise(t, torch.float32) if isinstance(t, QuantTensor) else t for name, t in source.tensors.items()
    }
    truth = Transformer(config, seed=None)
    truth.load_state_dict(decoded)
    others = {"fp32": truth, "int8": rounded(Given(config, dict(decoded)), "int8")}
    with torch.no_grad():
        for precision, expected in ({"fp8": truth} | others).items():
            read = load_for_inference(source, precision, flow=torch.float32)
            found, wanted = (m.logits(tokens(config), torch.float32) for m in (read, expected))
            assert (found - wanted).norm() < 1e-5 * wanted.norm(), precision


def test_each_tensor_is_read_once_and_none_lives_beside_its_rounded_form() -> None:
    config = VARIANTS["gqa-rope"].model_copy(update={"vocabulary": 300, "dim": 256, "layers": 16})
    source = source_of(config)
    sizes = [tensor.numel() * 4 for tensor in source.tensors.values() if isinstance(tensor, Tensor)]
    with RealBytes().ignore(*[t for t in source.tensors.values() if isinstance(t, Tensor)]) as live:
        model = load_for_inference(source, "fp8", flow=torch.float32)
    assert sorted(source.reads) == sorted(source.names())
    # Of the largest tensor, what encodes it has 8 bytes for each number at work.
    assert live.peak <= weight_bytes(model) + 2 * max(sizes)
    assert weight_bytes(model) + 2 * max(sizes) < sum(sizes)


def save(home: Path, config: ModelConfig, tokenizer: Tokenizer) -> CheckpointReader:
    weights = dict(randomise(Transformer(config)).state_dict())
    saved = Store(home).save(weights, {}, {"step": 1}, {}, tokenizer.directory, {})
    return CheckpointReader(saved, config)


def test_on_a_processor_the_weights_are_the_files_own_bytes(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    config = VARIANTS["mla-moe"].model_copy(update={"dim": 256})
    source = save(tmp_path, config, small_tokenizer)
    matrices = sum(t.numel() * 4 for name, t in Transformer(config).state_dict().items() if is_matrix(name, t))
    with RealBytes() as live:
        model = load_for_inference(source, "fp32", flow=torch.float32)
    in_memory = Transformer(config, seed=None)
    in_memory.load_state_dict({name: source.read(name) for name in source.names()})
    with torch.no_grad():
        assert torch.equal(model.logits(tokens(config)), in_memory.logits(tokens(config)))
    # Mapped storages are seen as born; nothing else is of a matrix's size.
    assert live.peak <= weight_bytes(model) + 2**16 < 2 * matrices
    model.embedding.data.zero_()
    open_checkpoint(tmp_path / "step-00000001")  # writing to what is mapped has reached no file


PROMISED = ["tr-25m", "tr-60m", "tr-125m", "tr-130m-moe", "tr-600m-moe", "ismail-512", "tiny-llm-v1"]


class Imagined:
    """A preset's tensors on paper."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.state = Transformer(config, seed=None, device="meta").state_dict()

    def names(self) -> list[str]:
        return list(self.state)

    def read(self, name: str) -> Tensor:
        return self.state[name]


@pytest.mark.parametrize("preset", PROMISED)
def test_fp8_takes_at_most_55_percent_of_bf16s_bytes(preset: str) -> None:
    config, _ = load_preset(preset)
    with simulate_card(Card("cuda", (8, 9))):
        fp8, bf16 = (weight_bytes(load_for_inference(Imagined(config), kept, "meta")) for kept in ("fp8", "bf16"))
    assert bf16 >= 2 * config.num_parameters()
    assert fp8 <= 0.55 * bf16


def test_what_is_missing_strange_misshapen_or_no_number_is_named() -> None:
    config = VARIANTS["gqa-rope"]
    full = source_of(config).tensors
    name = "blocks.0.attention.q_proj.weight"
    nan = quantise_weight(full[name], "e4m3")  # type: ignore[arg-type]
    nan.code[0, 0] = 0xFF
    cases: list[tuple[dict[str, Tensor | QuantTensor], str]] = [
        ({key: t for key, t in full.items() if key != name}, rf"{name} is missing\."),
        ({key: t for key, t in full.items() if "q_proj" not in key}, rf"{name} is missing, and so it is with 1 more\."),
        (full | {"blocks.0.bias": torch.zeros(3)}, r"blocks\.0\.bias belongs to no layer\."),
        (full | {name: torch.zeros(3, 36)}, rf"{name} is \[3, 36\], and the model needs \[48, 36\]\."),
        (full | {name: nan}, rf"{name} holds NaN\."),
    ]
    for tensors, message in cases:
        with pytest.raises(CheckpointError, match=message) as caught:
            load_for_inference(Given(config, tensors), "fp8")
        assert all((caught.value.what, caught.value.why, caught.value.fix))


def bits_per_token(model: Transformer, token_BT: Tensor) -> float:
    with torch.no_grad():
        logit_BTV = model.logits(token_BT[:, :-1], torch.float32)
    nats = torch.nn.functional.cross_entropy(logit_BTV.flatten(0, 1), token_BT[:, 1:].flatten())
    return nats.item() / math.log(2)


@pytest.mark.parametrize("kind", ["gqa-rope", "mla-moe"])
def test_a_trained_model_loses_less_than_one_percent_in_8_bits(
    kind: str, small_tokenizer: Tokenizer, turkish: tuple[str, ...]
) -> None:
    """A stand-in for the measurement on the real corpus: forty steps on sixteen sentences."""
    config = VARIANTS[kind].model_copy(update={"vocabulary": small_tokenizer.size, "dim": 64})
    model = Transformer(config)
    ids = list(
        itertools.chain.from_iterable([small_tokenizer.bos_id, *small_tokenizer.encode(text)] for text in turkish)
    )
    token_BT = torch.tensor(ids[: len(ids) // 32 * 32]).view(-1, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    untrained = bits_per_token(model, token_BT)
    for _ in range(40):
        logit_NV = model.logits(token_BT[:, :-1]).flatten(0, 1)
        torch.nn.functional.cross_entropy(logit_NV, token_BT[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    source = Given(config, dict(model.state_dict()))
    bits = {kept: bits_per_token(load_for_inference(source, kept), token_BT) for kept in ("bf16", "fp8", "int8")}
    assert bits["bf16"] < 0.75 * untrained, "it has learnt something"
    assert bits["fp8"] <= 1.01 * bits["bf16"]
    assert bits["int8"] <= 1.01 * bits["bf16"]
