"""Decoding over a latent cache against the textbook, sequence by sequence, in fp64."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from lowvram_kernels.attention import latent_attention as op
from lowvram_kernels.attention.latent_attention import encode_latent, latent_attention, on_card, reference
from lowvram_kernels.dispatch import Card, HiddenWork, Launch, is_interpreted, override_card, simulate_card
from lowvram_kernels.errors import ShapeError
from lowvram_kernels.quant import e4m3
from torch import Tensor

from tests.kernels.cards import CARDS, DEVICE, running_on
from tests.kernels.measures import LiveBytes, relative_error

# One rounding of the result, of the weights and of the latent's decoded numbers, in units of the last place.  In fp32
# the scores' own roundings are larger: beyond 16 a last place is 1.9e-6, which exp passes on, and the order in which a
# processor adds 336 products decides how many there are (AVX-512 stays below 1e-6 here, AVX2 does not).
TOLERANCE = {torch.float32: 4e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
# The interpreter cannot multiply in bf16, a card's kernels never get fp32.
EXACT = torch.float32 if is_interpreted() else torch.bfloat16
SCALE = 0.11
TILES = {
    "narrow": op._NARROW,
    "wide": op._WIDE,
    "shallow": op._WIDE_SHALLOW,
    "turned": op._TRANSPOSED,
    "turned-coded": op._TRANSPOSED_CODED,
}


class Case(NamedTuple):
    """The arguments of the op, as it takes them."""

    q_latent: Tensor
    q_rope: Tensor
    latent: Tensor
    rope: Tensor
    lengths: Tensor
    scale: float
    latent_scale: Tensor | None
    window: int | None

    def truth(self) -> Tensor:
        return reference(self.q_latent.double(), self.q_rope.double(), *self[2:])


def make(
    heads: int,
    channels: int,
    rotated: int,
    capacity: int,
    lengths: tuple[int, ...],
    dtype: torch.dtype = EXACT,
    is_coded: bool = False,
    window: int | None = None,
) -> Case:
    """Make queries and a cache that is NaN wherever a sequence has not written."""
    generator = torch.Generator().manual_seed(heads * channels + capacity)
    q = torch.randn(len(lengths), heads, channels + rotated, generator=generator)
    cache = torch.randn(len(lengths), capacity, channels + rotated, generator=generator)
    for index, length in enumerate(lengths):
        cache[index, length:] = torch.nan
    # Blocks of unlike size, so that a scale put in the wrong place shows.
    cache[..., : channels // 2] *= 3.0
    q, cache = q.to(dtype).to(DEVICE), cache.to(dtype).to(DEVICE)
    length_B = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    latent, rope = cache[..., :channels], cache[..., channels:]
    latent, latent_scale = encode_latent(latent) if is_coded else (latent, None)
    return Case(q[..., :channels], q[..., channels:], latent, rope, length_B, SCALE, latent_scale, window)


def assert_true(out: Tensor, case: Case, what: str = "") -> None:
    assert out.shape == case.q_latent.shape
    assert out.dtype == case.q_latent.dtype
    assert relative_error(out, case.truth()) < TOLERANCE[out.dtype], what


@pytest.mark.parametrize("window", [None, 1, 9, 400], ids=lambda w: f"window-{w}")
@pytest.mark.parametrize("is_coded", [False, True], ids=["floating", "e4m3"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_the_plain_form_is_the_textbook(dtype: torch.dtype, is_coded: bool, window: int | None) -> None:
    case = make(5, 200, 6, 40, (0, 1, 17, 40), dtype, is_coded, window)
    with override_card(Card("cpu")):
        assert_true(latent_attention(*case), case)


@pytest.mark.parametrize(
    "tile, arguments",
    [
        ("narrow", (4, 64, 16, 70, (0, 1, 17, 70), EXACT, False, None)),
        ("narrow", (12, 96, 32, 130, (130, 65), torch.float16, True, None)),
        ("narrow", (3, 20, 8, 70, (70, 5), EXACT, True, 40)),
        ("wide", (16, 192, 32, 70, (33, 70, 0), EXACT, True, None)),
        ("wide", (20, 256, 64, 50, (50,), torch.float16, False, 33)),
        ("wide", (4, 512, 64, 45, (45, 17), EXACT, False, None)),
        ("turned-coded", (17, 512, 64, 40, (40,), torch.float16, True, None)),
        ("wide", (4, 300, 10, 70, (70, 1), EXACT, True, 31)),
        ("shallow", (2, 512, 128, 33, (33,), EXACT, False, None)),
        ("turned", (4, 512, 64, 45, (45, 0, 17), torch.float16, False, None)),
        ("turned", (20, 96, 16, 70, (70,), EXACT, False, 9)),
        ("turned-coded", (5, 320, 16, 40, (40,), EXACT, True, None)),
    ],
    ids=lambda value: str(value).replace("torch.", ""),
)
def test_a_kernel_is_the_textbook(tile: str, arguments: tuple[Any, ...]) -> None:
    case = make(*arguments)
    with running_on("sm90" if tile == "turned" else "sm86"):
        assert_true(on_card(*case, tile=TILES[tile]), case)


@pytest.mark.parametrize("splits", [1, 2, 5, 11])
@pytest.mark.parametrize("tile", ["narrow", "turned"])
def test_every_number_of_splits_gives_the_same_result(tile: str, splits: int) -> None:
    case = make(3, 64, 16, 330, (330, 64, 65, 1, 0))
    with running_on("sm90"):
        out = on_card(*case, tile=TILES[tile], splits=splits)
        assert_true(out, case)
        assert torch.equal(on_card(*case, tile=TILES[tile], splits=splits), out), "twice the same bits"


def test_a_short_sequence_in_a_large_cache_is_split_too() -> None:
    case = make(2, 32, 8, 3000, (150,))
    with running_on("sm86"):
        assert_true(on_card(*case, splits=3), case)
        alone = case._replace(latent=case.latent[:, :150], rope=case.rope[:, :150])
        assert torch.equal(on_card(*case, splits=3), on_card(*alone, splits=3)), "the capacity changes nothing"


@pytest.mark.parametrize("form", ["plain", "narrow", "turned"])
def test_nothing_seen_is_zero_and_not_nan(form: str) -> None:
    case = make(3, 64, 16, 20, (0, 0))
    with running_on("sm90"):
        out = op._plain(*case) if form == "plain" else on_card(*case, tile=TILES[form], splits=2)
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("part", ["latent", "rope"])
@pytest.mark.parametrize("form", ["plain", "narrow", "turned"])
def test_what_is_not_finite_spoils_its_sequence_and_no_other(form: str, part: str, value: float) -> None:
    case = make(3, 64, 16, 70, (70, 70))

    def run() -> Tensor:
        return op._plain(*case) if form == "plain" else on_card(*case, tile=TILES[form], splits=2)

    with running_on("sm90"):
        clean = run()
        getattr(case, part)[1, 40, 3] = value
        spoilt = run()
    assert torch.equal(spoilt[0], clean[0])
    # Infinity weighs all or nothing, by its sign and the query's; it may not come out as another finite number.
    is_ignored = torch.isclose(spoilt[1].double(), case.truth()[1], rtol=100 * TOLERANCE[EXACT], atol=TOLERANCE[EXACT])
    assert (spoilt[1].isnan() | is_ignored).all()
    assert spoilt[1].isnan().any()
    if value != value:
        assert spoilt[1].isnan().all()


def test_a_query_that_is_nan_spoils_its_head_alone() -> None:
    case = make(3, 64, 16, 40, (40, 40))
    case.q_rope[0, 1, 2] = torch.nan
    with running_on("sm86"):
        out = on_card(*case)
    assert out[0, 1].isnan().all()
    assert not torch.cat([out[0, ::2], out[1]]).isnan().any()


@pytest.mark.parametrize("form", ["plain", "card"])
def test_bytes_and_scales_of_nan_come_out_as_nan(form: str) -> None:
    case = make(2, 200, 16, 40, (40, 40, 40), is_coded=True)
    assert case.latent_scale is not None
    case.latent[0, 7, 5] = 0x7F
    case.latent_scale[1, 7, 1] = torch.nan
    with running_on("sm86"):
        out = op._plain(*case) if form == "plain" else on_card(*case)
    assert out[:2].isnan().all()
    assert not out[2].isnan().any()


@pytest.mark.parametrize("tile", ["narrow", "turned"])
def test_large_scores_neither_overflow_nor_vanish(tile: str) -> None:
    case = make(3, 64, 16, 70, (70, 70))
    case = case._replace(scale=300.0)
    with running_on("sm90"):
        out = on_card(*case, tile=TILES[tile], splits=2)
    # Scores of some 20,000 keep fp32's 2⁻²⁴ of that, so weights err by a thousandth.
    assert relative_error(out, case.truth()) < max(5e-3, TOLERANCE[EXACT])


def test_parts_of_one_cache_and_turned_queries_give_the_same_bits() -> None:
    case = make(3, 64, 16, 70, (70, 20))
    parts = [case.latent.contiguous(), case.rope.contiguous()]
    turned = [q.transpose(0, 1).contiguous().transpose(0, 1) for q in (case.q_latent, case.q_rope)]
    spread = [q.mT.contiguous().mT for q in (case.q_latent, case.q_rope)]
    with running_on("sm86"):
        out = on_card(*case)
        for q in (turned, spread):
            assert torch.equal(on_card(*q, *parts, *case[4:]), out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_rounded_latent_is_near_and_a_row_of_nan_stays_one(dtype: torch.dtype) -> None:
    latent = torch.randn(2, 5, 200).to(dtype)
    latent[1, 3, 150] = torch.nan
    code, scale = encode_latent(latent)
    assert (code.shape, code.dtype, scale.shape, scale.dtype) == ((2, 5, 200), torch.uint8, (2, 5, 2), torch.float32)
    found = e4m3.decode(code, torch.float32) * scale.repeat_interleave(128, 2)[..., :200]
    assert found[1, 3, 128:].isnan().all()
    found[1, 3, 128:] = latent[1, 3, 128:] = 0.0
    assert relative_error(found, latent.float()) < 2**-5  # half of the last of three bits, at most 2⁻⁴, on average less


@pytest.mark.parametrize("card", ["sm86", "sm89", "sm90", "sm120"])
def test_a_compiler_sees_one_op_and_no_break(card: str) -> None:
    case = make(3, 64, 16, 40, (40, 7), torch.float16)
    with running_on(card):
        run = torch.compile(latent_attention, backend="eager", fullgraph=True)
        assert torch.equal(run(*case), latent_attention(*case))


def on_meta(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def paper_case(dtype: torch.dtype, channels: int, rotated: int, is_coded: bool = False, heads: int = 12) -> list[Any]:
    q, cache = on_meta(dtype, 2, heads, channels + rotated), on_meta(dtype, 2, 4096, channels + rotated)
    lengths, scale = on_meta(torch.int32, 2), on_meta(torch.float32, 2, 4096, -(-channels // 128))
    latent = on_meta(torch.uint8, 2, 4096, channels) if is_coded else cache[..., :channels]
    parts = [q[..., :channels], q[..., channels:], latent, cache[..., channels:]]
    return [*parts, lengths, 0.1, scale if is_coded else None]


@pytest.mark.parametrize("is_coded", [False, True], ids=["floating", "e4m3"])
def test_on_paper_the_card_s_memory_and_launches_are_counted(is_coded: bool) -> None:
    arguments = paper_case(torch.bfloat16, 512, 64, is_coded)
    launches: list[Launch] = []
    work: list[HiddenWork] = []
    card = CARDS["sm89"]._replace(multiprocessors=30)
    with simulate_card(card, note=work.append, note_launch=launches.append), LiveBytes() as live:
        out = latent_attention(*arguments)
    assert (out.shape, out.dtype) == ((2, 12, 512), torch.bfloat16)
    splits = 2 * 30 // 2
    partial_bytes = 2 * 12 * splits * (512 + 2) * 4
    assert live.peak == 2 * 12 * 512 * 2 + partial_bytes
    assert [what.kernel for what in launches] == ["attend_kernel", "combine_kernel"]
    assert [what.grid for what in launches] == [(1, splits, 2), (24, 4)]
    assert launches[0].expected_mma == "bf16"
    assert launches[0].constants["NATIVE"] is (not is_interpreted())
    position_bytes = 512 + 4 * 4 + 128 if is_coded else 1024 + 128
    assert work[0].moved_bytes == 2 * 4096 * position_bytes + 2 * 12 * 576 * 2 + partial_bytes
    assert work[0].product_flops == 2 * 2 * 4096 * 12 * (2 * 512 + 64)
    assert work[1].moved_bytes == partial_bytes + out.numel() * 2


def test_a_window_bounds_what_is_moved_and_split() -> None:
    launches: list[Launch] = []
    work: list[HiddenWork] = []
    with simulate_card(CARDS["sm86"], note=work.append, note_launch=launches.append):
        latent_attention(*paper_case(torch.float16, 512, 64), window=100)
    assert launches[0].grid == (1, 2, 2)
    assert launches[0].expected_mma == "f16"
    assert work[0].product_flops == 2 * 2 * 100 * 12 * (2 * 512 + 64)


@pytest.mark.parametrize(
    "card, dtype, channels, rotated",
    [
        ("sm75", torch.float16, 512, 64),
        ("sm89", torch.float32, 512, 64),
        ("sm89", torch.float16, 520, 64),
        ("sm89", torch.float16, 512, 136),
    ],
    ids=["no tensor cores", "fp32", "too many channels", "too many rotated"],
)
def test_what_no_kernel_takes_is_computed_plainly(card: str, dtype: torch.dtype, channels: int, rotated: int) -> None:
    launches: list[Launch] = []
    with simulate_card(CARDS[card], note_launch=launches.append):
        latent_attention(*paper_case(dtype, channels, rotated))
    assert launches == []


@pytest.mark.parametrize("is_coded", [False, True], ids=["floating", "e4m3"])
@pytest.mark.parametrize("channels, rotated", [(512, 64), (512, 128), (300, 128), (256, 32), (256, 128), (64, 16)])
@pytest.mark.parametrize("card", ["sm80", "sm86", "sm89", "sm90", "sm120"])
def test_the_chosen_tile_fits_the_card(card: str, channels: int, rotated: int, is_coded: bool) -> None:
    tile = op.choose_attention_tile(CARDS[card], channels, rotated, is_coded)
    needed = op._shared_bytes(tile, op._padded(channels), op._padded(rotated), is_coded)
    assert needed <= CARDS[card].shared_bytes
    assert op._is_transposed(tile) == (channels > 256 and (card == "sm90" or is_coded))


@pytest.mark.parametrize(
    "batch, heads, positions, splits",
    [(1, 12, 100_000, 96), (32, 16, 8192, 3), (32, 128, 8192, 1), (200, 12, 8192, 1), (1, 12, 65, 2), (1, 12, 1, 1)],
    ids=["one", "many", "many heads", "more than the card", "short", "first token"],
)
def test_splits_fill_the_card_and_leave_none_without_work(batch: int, heads: int, positions: int, splits: int) -> None:
    assert op.count_splits(CARDS["sm120"], batch, heads, positions, op._WIDE) == splits


def replaced(**parts: Any) -> dict[str, Any]:
    """Return arguments that fit, but for the parts given."""
    fitting = make(3, 64, 16, 10, (10, 5))._asdict()
    return {**fitting, **{name: change(fitting[name]) for name, change in parts.items()}}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q_rope": lambda x: x[:, :2]}, r"\[2, 2, 16\].*needs \[B, H, C\]"),
        ({"latent": lambda x: x[:1]}, r"\[1, 10, 64\].*needs \[B, H, C\]"),
        ({"rope": lambda x: x[:, :9]}, r"\[2, 9, 16\].*needs \[B, H, C\]"),
        ({"lengths": lambda x: x[:1]}, r"\[1\]\]; needs"),
        ({"lengths": lambda x: x[0]}, r"\[\]\]; needs"),
        ({"latent": lambda x: x[:, :0], "rope": lambda x: x[:, :0]}, r"\[2, 0, 64\]"),
        ({"lengths": lambda x: x.long()}, r"lengths is torch.int64; needs int32"),
        ({"lengths": lambda x: x.to("meta")}, r"lengths on meta; needs one device"),
        ({"latent": lambda x: x.mT.contiguous().mT}, r"the last needs to be 1"),
        ({"q_rope": lambda x: x.half()}, r"needs q's two alike"),
        ({"latent": lambda x: x.to(torch.uint8)}, r"all floating but a coded latent"),
        ({"latent_scale": lambda _: torch.ones(2, 10, 1, device=DEVICE)}, r"latent_scale \[2, 10, 1\].*needs uint8"),
        ({"window": lambda _: 0}, r"window is 0; needs 1"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        latent_attention(**replaced(**change))


def test_scales_that_do_not_fit_are_named() -> None:
    case = make(3, 200, 16, 10, (10, 5), is_coded=True)
    assert case.latent_scale is not None
    for scale in (case.latent_scale[..., :1], case.latent_scale.double()):
        with pytest.raises(ShapeError, match=r"needs uint8 and fp32 \[2, 10, 2\]"):
            latent_attention(*case._replace(latent_scale=scale))
