"""Names of cards as people type them and drivers say them: each finds its file in the catalogue."""

from __future__ import annotations

import pytest

from lowvram.errors import ConfigError
from lowvram.hardware.profile import find_profile, load_profile

GIB = 2**30


@pytest.mark.parametrize(
    "text, profile",
    [
        ("rtx5070", "rtx5070"),
        ("RTX 5070", "rtx5070"),
        ("NVIDIA GeForce RTX 5070", "rtx5070"),
        ("5070", "rtx5070"),
        ("rtx-5070", "rtx5070"),
        ("rtx 5070 ti", "rtx5070ti"),
        ("RTX5070Ti", "rtx5070ti"),
        ("4070 super", "rtx4070super"),
        ("RTX 4070 Ti SUPER", "rtx4070tisuper"),
        ("4070tisuper", "rtx4070tisuper"),
        ("rtx4070laptop", "rtx4070-laptop"),
        ("NVIDIA GeForce RTX 4070 Laptop GPU", "rtx4070-laptop"),
        ("RTX 4070 mobile", "rtx4070-laptop"),
        ("laptop 4070", "rtx4070-laptop"),
        ("rtx 5060 ti 16gb", "rtx5060ti-16gb"),
        ("RTX 5060 Ti (8 GiB)", "rtx5060ti-8gb"),
        ("3080 12g", "rtx3080-12gb"),
        ("rtx 3060", "rtx3060-12gb"),
        ("m3 max", "m3-max"),
        ("M3Max", "m3-max"),
        ("Apple M2 Pro", "m2-pro"),
        ("Apple M4", "m4"),
        ("H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("h100 sxm5", "h100"),
        ("T4", "t4"),
        ("Tesla T4", "t4"),
        ("nvidia-tesla-t4", "t4"),
        ("NVIDIA T4 Tensor Core GPU", "t4"),
        ("Google Colab T4", "t4"),
        ("kaggle t4", "t4"),
        ("NVIDIA L4", "l4"),
        ("colab l4 24gb", "l4"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("A100-SXM4-80GB", "a100-80gb"),
        ("A100 80GB", "a100-80gb"),
        ("a100", "a100-40gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-pcie-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie-80gb"),
        ("CPU", "cpu"),
    ],
    ids=str,
)
def test_a_card_is_found_by_what_people_type_and_drivers_say(text: str, profile: str) -> None:
    assert find_profile(text)[0] == find_profile(profile)[0] == load_profile(profile)


@pytest.mark.parametrize(
    "text, profile",
    [
        ("M1 MacBook Pro", "m1"),
        ("Apple M2 MacBook Pro", "m2"),
        ("M1 Mac Pro", "m1"),
        ("M3 MacBook Air", "m3"),
        ("M1 Pro MacBook Pro", "m1-pro"),
        ("m3 max macbook pro", "m3-max"),
        ("M4 Max Mac Studio", "m4-max"),
        ("MacBook Pro M3 Max", "m3-max"),
        ("MacBook M1 Pro", "m1-pro"),
        ("MacBook Pro 14 M3", "m3"),
        ("MacBook Pro 16 M1 Pro", "m1-pro"),
        ("MacBook Pro (14-inch, M3 Pro)", "m3-pro"),
        ('MacBook Pro 16.2" M4 Max', "m4-max"),
        ("MacBook Air 15 inç M2", "m2"),
        ("MacBook Pro 2021 M1 Max", "m1-max"),
        ("14 inch M3 MacBook Pro", "m3"),
        ("macbookpro m3", "m3"),
        ("iMac 24 M1", "m1"),
        ("Mac mini M2 Pro", "m2-pro"),
    ],
)
def test_an_apple_chip_is_found_in_its_computer_whose_name_says_nothing_about_it(text: str, profile: str) -> None:
    assert find_profile(text)[0] == load_profile(profile)


@pytest.mark.parametrize(
    "text, memory", [("MacBook Pro 14 M3 16GB", 16), ("MacBook Air 16 GB M2", 16), ("MacBook Pro 16 M1 Pro 32 gb", 32)]
)
def test_the_screen_of_a_computer_is_not_its_memory(text: str, memory: int) -> None:
    assert find_profile(text)[0].memory_bytes == memory * GIB


@pytest.mark.parametrize(
    "text", ["MacBook Pro", "MacBook Air 13", "MacBook Pro 14 inch 16 GB", "Mac Pro", "iMac 27 2020"]
)
def test_a_computer_without_its_chip_is_asked_for_it(text: str) -> None:
    with pytest.raises(ConfigError, match='Name the chip and the memory, such as `gpu="m3-pro"`'):
        find_profile(text)
