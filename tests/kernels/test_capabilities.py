"""The table of compute capabilities: without torch, what dispatch chooses, and what the catalogue of cards says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lowvram_kernels.capabilities import features_of
from lowvram_kernels.dispatch import Card, choose, choose_attention

from lowvram.hardware.profile import generic_profile, load_profile, profile_names

ROOT = Path(__file__).parents[2]
# Of a block's shared memory, by the CUDA C++ Programming Guide; of 13.0, which nobody has seen, the least since 8.0.
KIBIBYTES = {
    (6, 1): 48,
    (7, 0): 96,
    (7, 5): 64,
    (8, 0): 163,
    (8, 6): 99,
    (8, 7): 163,
    (8, 9): 99,
    (9, 0): 227,
    (10, 0): 227,
    (10, 3): 227,
    (12, 0): 99,
    (12, 1): 99,
    (13, 0): 99,
}
each_capability = pytest.mark.parametrize("capability", KIBIBYTES, ids=str)


def test_the_table_is_read_without_torch() -> None:
    script = "import sys, lowvram_kernels.capabilities; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT / "kernels", check=False).returncode == 0


@pytest.mark.parametrize("capability, kibibytes", KIBIBYTES.items(), ids=str)
def test_a_block_has_the_shared_memory_that_nvidia_names(capability: tuple[int, int], kibibytes: int) -> None:
    assert features_of(capability).shared_bytes == kibibytes * 1024
    assert Card("cuda", capability).shared_bytes == kibibytes * 1024


@each_capability
def test_dispatch_and_a_card_without_a_file_say_the_same_of_a_capability(capability: tuple[int, int]) -> None:
    card, profile = Card("cuda", capability), generic_profile(2**33, capability=capability)
    assert profile.shared_memory_bytes == card.shared_bytes
    fp8 = choose("fp8_matmul", card).backend
    assert profile.fp8 == ("storage" if fp8 == "decode" else fp8)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[profile.dtype]
    assert profile.attention == choose_attention(card, dtype, is_masked=False).backend
    assert (choose("quantise", card).backend == "triton") == features_of(capability).has_triton
    assert (choose("int8_matmul", card).backend == "tensor") == features_of(capability).has_int8


@pytest.mark.parametrize("name", [name for name in profile_names() if load_profile(name).capability is not None])
def test_a_card_of_the_catalogue_can_do_what_its_capability_can(name: str) -> None:
    profile = load_profile(name)
    assert profile.capability is not None
    features = features_of(profile.capability)
    assert (profile.shared_memory_bytes, profile.fp8) == (features.shared_bytes, features.fp8)
    assert (profile.attention == "flash") == features.has_flash
    assert (profile.dtype == "bf16") == features.has_bf16
