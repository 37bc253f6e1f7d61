"""A card that the catalogue does not have is told what is true of it."""

from __future__ import annotations

import pytest

from lowvram.errors import ConfigError
from lowvram.hardware.card_names import explain_unknown
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
                "Tesla P40",
                "quadro p2000",
                "Quadro 3000",
                "mx150",
            ],
        ),
        (ULTRA, ["m2 ultra", "mac studio m1 ultra", "M3 Ultra 96gb"]),
        (CHIP, ["mac", "MacBook Pro", "imac", "Apple", "apple silicon"]),
        (MEMORY, ["a100", "A100 80GB", "rtx a4000", "RTX 6000 Ada", "quadro rtx 5000", "T4", "L40S", "titan rtx"]),
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


def test_an_ultra_is_told_the_max_of_its_own_generation() -> None:
    assert "--gpu m3-max --ram 192GB" in explain_unknown("Apple M3 Ultra", profile_names())
    assert "--gpu m1-max " in explain_unknown("m1ultra", profile_names())


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
