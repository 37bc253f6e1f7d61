"""The catalogue: every file is plausible, every spelling finds its card, and limits are those one can plan with."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError

import lowvram.hardware.profile
from lowvram.errors import ConfigError
from lowvram.hardware.profile import Number, Profile, find_profile, generic_profile, load_profile, profile_names
from lowvram.units import parse_memory
from tests.flows.typed import environment

ROOT = Path(__file__).parents[2]
GIB = 2**30
CARDS = [load_profile(name) for name in profile_names()]
NVIDIA = [card for card in CARDS if card.platform == "cuda"]
GEFORCE = [card for card in NVIDIA if "GeForce" in card.name]
DATA_CENTRE = [card for card in NVIDIA if card not in GEFORCE]
APPLE = [card for card in CARDS if card.platform == "mps"]

each_card = pytest.mark.parametrize("card", CARDS, ids=lambda card: card.id)
each_nvidia = pytest.mark.parametrize("card", NVIDIA, ids=lambda card: card.id)
each_geforce = pytest.mark.parametrize("card", GEFORCE, ids=lambda card: card.id)
each_data_centre = pytest.mark.parametrize("card", DATA_CENTRE, ids=lambda card: card.id)
each_apple = pytest.mark.parametrize("card", APPLE, ids=lambda card: card.id)

# Of each compute capability: shared memory of a block, how FP8 is multiplied, the attention kernel, the best 16 bits.
PATHS = {
    (7, 5): (64 * 1024, "storage", "efficient", "fp16"),
    (8, 0): (163 * 1024, "storage", "flash", "bf16"),
    (8, 6): (99 * 1024, "storage", "flash", "bf16"),
    (8, 9): (99 * 1024, "tensor", "flash", "bf16"),
    (9, 0): (227 * 1024, "tensor", "flash", "bf16"),
    (12, 0): (99 * 1024, "mxfp8", "flash", "bf16"),
}
SERIES = {"2": (7, 5), "3": (8, 6), "4": (8, 9), "5": (12, 0)}


def test_the_catalogue_has_every_series_and_kind() -> None:
    assert len(CARDS) == 60
    assert {card.capability for card in NVIDIA} == set(PATHS)
    assert sum("laptop" in card.id for card in GEFORCE) == 8
    assert [card.id for card in CARDS if card.platform == "cpu"] == ["cpu"]
    generations = {f"m{number}{kind}" for number in (1, 2, 3, 4) for kind in ("", "-pro", "-max")}
    assert {card.id for card in APPLE} == generations


@each_card
def test_a_file_says_who_says_so_and_calls_itself_by_its_name(card: Profile) -> None:
    assert card.sources
    assert card.tflops_source is not None
    found, _ = find_profile(card.name)
    assert found == card
    assert find_profile(card.id)[0] == card


@each_nvidia
def test_a_cards_paths_follow_from_its_compute_capability(card: Profile) -> None:
    assert card.capability is not None
    assert (card.shared_memory_bytes, card.fp8, card.attention, card.dtype) == PATHS[card.capability]


@each_geforce
def test_a_geforce_is_of_the_series_in_its_name_and_of_a_size_that_is_sold(card: Profile) -> None:
    assert card.capability == SERIES[card.id.removeprefix("rtx")[0]]
    assert card.memory_bytes in {size * GIB for size in (6, 8, 10, 12, 16, 24, 32)}
    assert not card.unified
    assert card.uncertainty == (0.25 if "laptop" in card.id else 0.10)
    assert card.watts is not None
    assert 80 <= card.watts <= 575


@each_geforce
def test_the_theory_follows_from_multiprocessors_clock_and_the_makers_headline(card: Profile) -> None:
    assert card.multiprocessors is not None
    assert card.boost_mhz is not None
    computed = 512 * card.multiprocessors * card.boost_mhz / 1e6
    assert card.theory_tflops == pytest.approx(computed, rel=0.005)
    if card.ai_tops is not None:
        factor = {(8, 6): 4, (8, 9): 8, (12, 0): 16}[card.capability]
        assert card.ai_tops / factor == pytest.approx(computed, rel=0.02)
    assert (card.ai_tops is None) == (card.capability == (7, 5) or "laptop" in card.id)


@each_data_centre
def test_a_card_of_a_data_centre_halves_nothing_and_has_two_sources(card: Profile) -> None:
    assert len(card.sources) >= 2
    assert card.watts is not None
    if card.multiprocessors is not None and card.boost_mhz is not None:
        flop_per_clock = 2048 if card.capability == (8, 0) else 1024
        assert card.theory_tflops == pytest.approx(
            flop_per_clock * card.multiprocessors * card.boost_mhz / 1e6, rel=0.005
        )
    assert card.uncertainty == (0.25 if card.watts < 100 else 0.10)


@pytest.mark.parametrize("name", ["t4", "l4", "a100-40gb", "a100-80gb", "a100-pcie-40gb", "a100-pcie-80gb"])
def test_a_card_without_outputs_draws_no_desktop(name: str) -> None:
    card = load_profile(name)
    assert card.limit_bytes("linux") == card.limit_bytes("windows") == card.limit_bytes()


# What torch calls the total capacity, the least in error messages; each file says so.
@pytest.mark.parametrize(
    "name, shown",
    [("t4", 14.56), ("l4", 22.03), ("a100-40gb", 39.38), ("a100-80gb", 79.14)],
    ids=lambda value: str(value),
)
def test_no_more_memory_is_planned_with_than_torch_has_been_seen_to_find(name: str, shown: float) -> None:
    card = load_profile(name)
    assert 0 <= shown - (card.memory_bytes - card.reserved_bytes) / GIB < 0.05


@each_nvidia
def test_the_speeds_of_one_card_agree_with_each_other(card: Profile) -> None:
    speeds, theory = card.tflops, card.theory_tflops
    assert theory is not None
    assert ("fp8" in speeds) == (card.fp8 != "storage")
    assert speeds["fp32"] < speeds["fp16"] < speeds["int8"]
    if card.dtype == "fp16":
        # A GeForce halves fp16 that is accumulated in fp32; a T4 does not, and its bf16 is as slow.
        assert speeds["fp16"] / speeds["bf16"] == pytest.approx(7.5 if card in GEFORCE else 17, rel=0.1)
    else:
        assert speeds["fp16"] == pytest.approx(speeds["bf16"], rel=0.1)
        assert speeds.get("fp8", theory * 2) >= speeds["bf16"]
    # Power holds Hopper at 0.8 of its theory and a T4, which has 70 W, at 0.66; a laptop's clock may be far from the
    # published one.
    rel = 0.5 if "laptop" in card.id else 0.35 if card.id == "t4" else 0.25
    assert speeds["fp16"] == pytest.approx(theory, rel=rel)
    if card.tflops_source == "theory":
        assert speeds["fp16"] == pytest.approx(1.05 * theory, rel=0.005)


@each_apple
def test_an_apple_chip_shares_its_memory_and_multiplies_every_type_alike(card: Profile) -> None:
    assert card.unified
    assert card.memory_range_bytes is not None
    least, most = card.memory_range_bytes
    assert card.memory_bytes == least < most
    assert (card.fp8, card.attention, card.capability, card.dtype) == ("storage", "math", None, "bf16")
    assert set(card.tflops) == {"fp32", "fp16", "bf16"}
    assert max(card.tflops.values()) < 1.15 * min(card.tflops.values())
    assert card.theory_tflops is not None
    assert card.tflops["fp32"] == pytest.approx(0.8 * card.theory_tflops, rel=0.06)


def test_a_better_card_is_faster() -> None:
    for ladder in (
        ["rtx3060-12gb", "rtx3070", "rtx3080-10gb", "rtx3090"],
        ["rtx4060", "rtx4070", "rtx4070super", "rtx4080", "rtx4090"],
        ["rtx5050", "rtx5060", "rtx5060ti-8gb", "rtx5070", "rtx5070ti", "rtx5080", "rtx5090", "h100"],
        ["t4", "l4", "a100-40gb", "a100-80gb", "h100", "h200"],
        ["m1", "m1-pro", "m1-max", "m2-max", "m4-max"],
    ):
        speeds = [load_profile(name).tflops["bf16"] for name in ladder]
        assert speeds == sorted(speeds)
        assert len(set(speeds)) == len(speeds)


@pytest.mark.parametrize(
    "name, headless, desktop",
    [("rtx5070", 10.8, 10.0), ("rtx3060-12gb", 10.8, 10.0), ("rtx4060", 7.0, 6.3)],
    ids=["5070", "3060", "4060"],
)
def test_the_limit_is_the_one_to_plan_with(name: str, headless: float, desktop: float) -> None:
    card = load_profile(name)
    assert card.limit_bytes() / GIB == pytest.approx(headless, abs=0.05)
    linux, windows = card.limit_bytes("linux"), card.limit_bytes("windows")
    assert linux / GIB == pytest.approx(desktop, abs=0.2)
    assert windows / GIB == pytest.approx(desktop, abs=0.2)
    assert windows < linux < card.limit_bytes()
    assert card.limit_bytes(ram_bytes=64 * GIB) == card.limit_bytes(), "a card's memory is its own"


def test_the_limit_is_written_out_once() -> None:
    card = load_profile("rtx5070")
    rest = 12 * GIB - card.reserved_bytes - card.desktop_linux_bytes - card.context_bytes
    assert card.limit_bytes("linux") == int(rest * 0.94) - 8_519_680


def test_what_is_free_now_lowers_the_limit_and_never_raises_it() -> None:
    card = load_profile("rtx5070")
    assert card.limit_bytes(free_bytes=4 * GIB) == int((4 * GIB - card.context_bytes) * 0.94) - card.workspace_bytes
    assert card.limit_bytes(free_bytes=99 * GIB) == card.limit_bytes()
    assert card.limit_bytes(free_bytes=0) == 0


@pytest.mark.parametrize("ram, share", [(8, 0.66), (32, 0.66), (36, 0.75), (128, 0.75)])
def test_metal_lends_a_share_of_memory_whatever_the_desktop(ram: int, share: float) -> None:
    card = load_profile("m3-max")
    limit = card.limit_bytes("none", ram * GIB)
    assert limit == int((int(ram * GIB * share) - card.context_bytes) * 0.94)
    assert card.limit_bytes("linux", ram * GIB) == limit
    assert card.limit_bytes() == card.limit_bytes(ram_bytes=36 * GIB)


def test_the_processor_leaves_memory_to_the_system_and_to_the_process() -> None:
    card = load_profile("cpu")
    limit = card.limit_bytes(ram_bytes=16 * GIB)
    assert limit == int((15 * GIB - card.host_process_bytes) * 0.94)
    assert card.limit_bytes("windows", 16 * GIB) == pytest.approx(limit - 0.94 * 3 * GIB, abs=1)
    assert card.limit_bytes(ram_bytes=GIB) == 0


@pytest.mark.parametrize(
    "text, near",
    [
        ("rtx 4080 super", "rtx4070super"),
        ("RTX 5070 Tie", "rtx5070ti"),
        ("rtx6070", "rtx5070"),
        ("NVIDIA H100 PCIe", "h100"),
        ("rtx", "rtx50"),
        ("", "cpu"),
        ("8gb", "size of memory"),
        ("rtx 5070 0gb", "rtx5070"),
    ],
)
def test_an_unknown_card_is_answered_with_the_nearest_and_with_a_way_on(text: str, near: str) -> None:
    with pytest.raises(ConfigError, match=rf'no card "{re.escape(text)}".*{near}.*`memory="8GB"` works'):
        find_profile(text)
    with pytest.raises(ConfigError, match=r'no profile "rtx 5070"\. Did you mean rtx5070'):
        load_profile("rtx 5070")


@pytest.mark.parametrize(
    "text, memory, profile",
    [
        ("NVIDIA GeForce RTX 3080", 9.78, "rtx3080-10gb"),
        ("NVIDIA GeForce RTX 3080", 12.0, "rtx3080-12gb"),
        ("NVIDIA GeForce RTX 5060 Ti", 15.48, "rtx5060ti-16gb"),
        ("NVIDIA GeForce RTX 2060", 5.8, "rtx2060-6gb"),
        ("NVIDIA H200", 139.8, "h200"),
        ("Tesla T4", 15.0, "t4"),
        ("Tesla T4", 14.56, "t4"),
        ("NVIDIA L4", 22.49, "l4"),
        ("NVIDIA L4", 22.03, "l4"),
        ("NVIDIA A100-SXM4-40GB", 39.38, "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", 79.14, "a100-80gb"),
        ("NVIDIA A100-PCIE-40GB", 39.4, "a100-pcie-40gb"),
        ("rtx 5060 ti 16gb", 8, "rtx5060ti-8gb"),
    ],
)
def test_what_the_driver_counts_chooses_the_variant_and_is_no_news(text: str, memory: float, profile: str) -> None:
    assert find_profile(text, int(memory * GIB)) == (load_profile(profile), "")


def test_without_memory_the_smallest_variant_is_taken_aloud() -> None:
    assert find_profile("rtx 3080") == (
        load_profile("rtx3080-10gb"),
        "There are rtx3080-10gb and rtx3080-12gb; the smallest is taken.",
    )
    assert find_profile("5060ti")[0].id == "rtx5060ti-8gb"
    assert find_profile("rtx5070")[1] == ""
    assert find_profile("m3 max")[1] == "Apple M3 Max is sold with 36.0 GiB to 128.0 GiB; 36.0 GiB is taken."
    assert find_profile("cpu")[1] == "16.0 GiB is taken as the memory of the computer."


@pytest.mark.parametrize("text", ["T4 x2", "GPU T4 x2", "2x T4", "t4 x 2"])
def test_of_several_cards_one_is_planned_for(text: str) -> None:
    assert find_profile(text) == (load_profile("t4"), "A run uses one of the cards.")


def test_a_size_that_the_catalogue_does_not_have_is_believed_aloud() -> None:
    card, note = find_profile("NVIDIA GeForce RTX 3060", 8 * GIB)
    assert (card.id, card.memory_bytes) == ("rtx3060-12gb", 8 * GIB)
    assert note == (
        "The catalogue knows GeForce RTX 3060 12GB with 12.0 GiB; with 8.0 GiB its speed may be another."
    )  # fmt: skip
    assert find_profile("rtx 3060 8gb") == (card, note)


@pytest.mark.parametrize("text", ["m3 max 64gb", "m3 max"])
def test_a_shared_memory_is_as_large_as_the_machine_says(text: str) -> None:
    card, note = find_profile(text, None if "64" in text else 64 * GIB)
    assert (card.memory_bytes, note) == (64 * GIB, "")
    assert card.limit_bytes() == load_profile("m3-max").limit_bytes(ram_bytes=64 * GIB)


def test_a_card_without_a_name_has_memory_and_no_speed() -> None:
    card = generic_profile(parse_memory("8GB"))
    assert card.limit_bytes("linux") == load_profile("rtx4060").limit_bytes("linux")
    assert (card.dtype, card.attention, card.capability) == ("bf16", "flash", (8, 6))
    assert (card.tflops, card.bandwidth_bytes_per_s, card.watts, card.tflops_source) == ({}, None, None, None)
    assert card.name == "NVIDIA card with 8.0 GiB"


@each_nvidia
def test_a_card_without_a_file_takes_the_path_of_its_capability(card: Profile) -> None:
    assert card.capability is not None
    generic = generic_profile(card.memory_bytes, "some card", card.capability)
    assert generic.name == "some card"
    for field in ("shared_memory_bytes", "fp8", "attention", "dtype"):
        assert getattr(generic, field) == getattr(card, field)


def test_an_older_or_a_newer_card_than_any_known_is_given_no_more_than_it_surely_has() -> None:
    assert generic_profile(11 * GIB, capability=(6, 1)).shared_memory_bytes == 48 * 1024
    assert generic_profile(11 * GIB, capability=(6, 1)).attention == "efficient"
    assert generic_profile(16 * GIB, capability=(13, 0)).shared_memory_bytes == 99 * 1024
    assert generic_profile(16 * GIB, capability=(13, 0)).fp8 == "tensor"


def test_a_profile_is_closed_to_unknown_keys_and_cannot_be_changed() -> None:
    known = load_profile("cpu").model_dump()
    with pytest.raises(ValidationError, match="wishes"):
        Profile.model_validate(known | {"wishes": 1})
    with pytest.raises(ValidationError, match="fp4"):
        Profile.model_validate(known | {"tflops": {"fp4": 1.0}})
    with pytest.raises(ValidationError, match="frozen"):
        load_profile("cpu").watts = 1.0  # type: ignore[misc]


def test_the_page_beside_the_files_explains_every_field_and_default() -> None:
    page = (ROOT / "profiles/README.md").read_text(encoding="utf-8")
    for name, field in Profile.model_fields.items():
        assert name == "id" or f"`{name}`" in page, name
        if name.endswith("_bytes") and isinstance(field.default, int):
            shown = f"{field.default:,}" if name == "workspace_bytes" else f"{round(field.default / GIB, 2):g} GiB"
            assert f"| `{name}` | {shown} |" in page
    assert f"{load_profile('rtx5070').limit_bytes() / GIB:.1f} GiB of a 12 GB card" in page
    assert set(get_args(Number)) == {number for card in CARDS for number in card.tflops}


def test_the_wheel_and_the_source_distribution_take_the_cards_along() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"]
    assert build["wheel"]["force-include"] == {"profiles": "lowvram/profiles"}
    assert "profiles" in build["sdist"]["include"]


def test_an_installed_package_reads_the_cards_inside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles/rtx1.toml").write_bytes((ROOT / "profiles/rtx4060.toml").read_bytes())
    (tmp_path / "profiles/README.md").touch()
    monkeypatch.setattr(lowvram.hardware.profile, "__file__", str(tmp_path / "hardware/profile.py"))
    assert profile_names() == ["rtx1"]
    assert load_profile("rtx1").name == "GeForce RTX 4060"


def test_the_catalogue_answers_without_importing_torch() -> None:
    code = (
        "import lowvram.hardware.profile as p, sys; p.find_profile('5070'); "
        "assert not {'torch', 'psutil'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())
