"""A card that the catalogue does not have is told what is true of it."""

from __future__ import annotations

import pytest

from lowvram.errors import ConfigError
from lowvram.hardware.card_names import explain_too_old, explain_unknown
from lowvram.hardware.profile import find_profile, profile_names

GIB = 2**30
AMD, INTEL, GTX16 = "AMD cards are not supported", "Intel's graphics are not supported", "no tensor cores"
OLD, ULTRA, CHIP, MEMORY = "It is too old", "Name the Max", "Name the chip", "Name its memory instead"


@pytest.mark.parametrize(
    "said, names",
    [
        (
            AMD,
            ["rx 7900xt", "RX 7900 XTX", "rx7900xt", "Radeon VII", "AMD Radeon RX 580", "ryzen ai max 395", "MI300X"],
        ),
        (INTEL, ["arc a770", "Intel Arc B580", "a770", "intel", "Iris Xe"]),
        (GTX16, ["gtx 1660", "GTX 1650 Super", "1660 ti", "gtx1630", "GeForce MX450"]),
        (
            OLD,
            [
                "gtx 1080 ti",
                "1060",
                "GTX 970",
                "gtx980ti",
                "titan v",
                "V100",
                "Tesla V100-SXM2-16GB",
                "Tesla P40",
                "Tesla P100-PCIE-16GB",
                "K80",
                "GTX 780",
                "quadro p2000",
                "Quadro 3000",
                "mx150",
            ],
        ),
        (ULTRA, ["m2 ultra", "mac studio m1 ultra", "M3 Ultra 96gb"]),
        (CHIP, ["mac", "MacBook Pro", "imac", "Apple", "apple silicon"]),
        (MEMORY, ["a40", "A10", "rtx a4000", "RTX 6000 Ada", "quadro rtx 5000", "L40S", "titan rtx"]),
        ("Did you mean rtx5070", ["rtx5071", "rtx 507o"]),
        ("Did you mean rtx2080", ["gtx 2080"]),
        ("Did you mean rtx3080", ["3081"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_said_is_true_of_the_card(said: str, names: list[str]) -> None:
    for name in names:
        with pytest.raises(ConfigError, match="The catalogue has no card") as caught:
            find_profile(name)
        assert said in str(caught.value), name


@pytest.mark.parametrize(
    "name, wheels, capability",
    [
        ("p100", "only those for CUDA 12.6 have", "6.0"),
        ("Tesla V100-SXM2-16GB", "only those for CUDA 12.6 have", "7.0"),
        ("GTX 750 Ti", "at most those for CUDA 12.6 have", "6.2 or less"),
        ("k80", "none of torch's wheels has", "3.7 or less"),
        ("GT 730", "none of torch's wheels has", "3.7 or less"),
    ],
)
def test_a_card_that_is_too_old_is_told_for_what_and_what_to_take(name: str, wheels: str, capability: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_profile(name)
    said = str(caught.value)
    assert "too old for torch's wheels and for Triton" in said
    assert f"{wheels} code for its compute capability ({capability})" in said
    assert "on Kaggle and Colab the T4" in said
    assert ("With the CUDA 12.6 wheels plain PyTorch would compute" in said) == ("none of" not in wheels)


@pytest.mark.parametrize(
    "capability, has_wheel", [((3, 7), False), ((5, 0), True), ((6, 0), True), ((7, 0), True)], ids=str
)
def test_what_a_driver_answers_is_told_the_same(capability: tuple[int, int], has_wheel: bool) -> None:
    said = explain_too_old(capability)
    assert f"({capability[0]}.{capability[1]})" in said
    assert ("CUDA 12.6" in said) == has_wheel


def test_an_ultra_is_told_the_max_of_its_own_generation() -> None:
    assert '`gpu="m3-max"` with `ram="192GB"`' in explain_unknown("Apple M3 Ultra", profile_names())
    assert '`gpu="m1-max"` ' in explain_unknown("m1ultra", profile_names())


def test_no_card_of_the_catalogue_is_called_old_or_foreign() -> None:
    for name in profile_names():
        assert "Did you mean" in explain_unknown(name, profile_names()), name


@pytest.mark.parametrize(
    "name, found, gigabytes",
    [
        ("mac m4 pro 24gb", "m4-pro", 24),
        ("macbook pro m3 max 36gb", "m3-max", 36),
        ("MacBook Pro M3 Pro", "m3-pro", 18),
        ("MacBook Air M2 16 GB", "m2", 16),
        ("mac mini m4", "m4", 16),
        ("Mac Studio M2 Max", "m2-max", 32),
        ("Apple M4 chip", "m4", 16),
        ("m4 pro 24 gb ram", "m4-pro", 24),
    ],
)
def test_a_mac_is_found_by_its_chip_and_memory(name: str, found: str, gigabytes: int) -> None:
    profile, _ = find_profile(name)
    assert (profile.id, profile.memory_bytes) == (found, gigabytes * GIB)
