"""Every problem of a machine has its finding: what follows, and the exact command; and a sound machine has none."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lowvram.hardware.detect import TORCH, Bitsandbytes, Driver, NvidiaCard, TorchBuild, TritonBuild
from lowvram.hardware.doctor import CHECKS, LAUNCH_CHECKS, TRITON, Finding, find_all, find_pair, read_minor
from lowvram.hardware.inspect import Facts, TorchSays

GIB = 2**30
CARD = "NVIDIA GeForce RTX 5070"
INDEX = "--index-url https://download.pytorch.org/whl/"
CPU_BUILD = TorchBuild("2.13.0+cpu", None)
CODE = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")
PIN = 'triton==3.7.1; platform_system == "Linux"'

BARE = Facts(TorchSays(), build=CPU_BUILD)
SOUND = Facts(
    TorchSays(device="cuda", capability=(12, 0), architectures=CODE),
    driver=Driver(CARD, (13, 0)),
    card=NvidiaCard(CARD, (12, 0), 12 * GIB, 11 * GIB),
    build=TorchBuild("2.13.0+cu130", (13, 0)),
    torch_wants=("filelock", PIN),
    triton=TritonBuild("3.7.1"),
    bitsandbytes=Bitsandbytes("0.50.2", ("libbitsandbytes_cpu", "libbitsandbytes_cuda130")),
    compiler="/usr/bin/gcc",
)
WINDOWS = replace(SOUND, system="Windows", torch_wants=("filelock",), compiler=None, has_headers=False)
MAC = Facts(
    TorchSays(device="mps", has_metal=True),
    system="Darwin",
    system_version=(15, 2),
    processor="arm64",
    build=TorchBuild("2.13.0", None),
)


def only(facts: Facts) -> Finding:
    """The one thing that is wrong there."""
    found = find_all(facts)
    assert len(found) == 1, found
    return found[0]


def on_card(capability: tuple[int, int], facts: Facts = SOUND) -> Facts:
    assert facts.card is not None
    says = facts.says._replace(capability=capability)
    return replace(facts, says=says, card=facts.card._replace(capability=capability))


def saying(facts: Facts, **changes: Any) -> Facts:
    return replace(facts, says=facts.says._replace(**changes))


@pytest.mark.parametrize("facts", [BARE, SOUND, WINDOWS], ids=["processor", "card", "windows"])
def test_a_sound_machine_has_nothing_to_mend(facts: Facts) -> None:
    assert find_all(facts) == []


@pytest.mark.parametrize("facts", [BARE, SOUND, WINDOWS, MAC], ids=["processor", "card", "windows", "mac"])
@pytest.mark.parametrize(
    "system, driver, command",
    [
        ("Linux", None, f'pip install "{TORCH}" {INDEX}cpu'),
        ("Windows", None, f'pip install "{TORCH}" {INDEX}cpu'),
        ("Darwin", None, f'pip install "{TORCH}"'),
        ("Linux", Driver(CARD, (12, 8)), f'pip install "{TORCH}" {INDEX}cu128'),
        ("Windows", Driver(CARD, (13, 1)), f'pip install "{TORCH}" {INDEX}cu130'),
    ],
    ids=str,
)
def test_without_torch_nothing_can_be_trained(facts: Facts, system: str, driver: Driver | None, command: str) -> None:
    says = TorchSays("No module named 'torch'")
    without = replace(facts, says=says, build=None, system=system, driver=driver, processor="arm64", bitsandbytes=None)
    assert only(without) == Finding("torch is not installed", "nothing can be trained", command, True)


@pytest.mark.parametrize(
    "version, is_refused",
    [("2.9.1+cpu", True), ("2.10.0", False), ("2.13.1+cpu", False), ("2.14.0", True), ("3", False), ("unknown", False)],
)
def test_torch_outside_the_range_is_fatal(version: str, is_refused: bool) -> None:
    facts = replace(BARE, build=TorchBuild(version, None))
    if not is_refused:
        assert find_all(facts) == []
        return
    found = only(facts)
    assert (found.value, found.is_fatal) == (f"torch is {version}", True)
    assert found.command == f'pip install --force-reinstall "{TORCH}" {INDEX}cpu'


def test_torch_that_does_not_import_is_fatal_and_says_why() -> None:
    facts = replace(SOUND, says=TorchSays("libcudart.so.13: cannot open shared object file"))
    [found] = [finding for finding in find_all(facts) if finding.is_fatal]
    assert found.value == "torch 2.13.0+cu130 does not import (libcudart.so.13: cannot open shared object file)"
    assert found.command.endswith("/cu130")
    assert only(facts) == found, "what cannot be asked is not guessed"


@pytest.mark.parametrize(
    "is_translated, value, command",
    [
        (True, "Python is an Intel build that macOS translates", "arch -arm64 brew install python"),
        (False, "this is an Intel Mac", ""),
    ],
)
def test_an_intel_python_on_a_mac_has_no_torch(is_translated: bool, value: str, command: str) -> None:
    says = TorchSays("No module named 'torch'")
    found = only(replace(MAC, says=says, build=None, processor="x86_64", is_translated=is_translated))
    assert (found.value, found.is_fatal) == (value, True)
    assert found.command.startswith(command)
    assert bool(found.command) == bool(command)


def test_a_cpu_build_beside_a_card_trains_on_the_processor_and_is_not_fatal() -> None:
    found = only(replace(BARE, driver=SOUND.driver, card=SOUND.card))
    assert found.value == f"{CARD} is here"
    assert found.consequence.startswith("torch 2.13.0+cpu is a CPU-only build, so training runs on the processor")
    assert (found.command, found.is_fatal) == (f'pip install --force-reinstall "{TORCH}" {INDEX}cu130', False)


@pytest.mark.parametrize(
    "runs, command",
    [((12, 8), f'pip install --force-reinstall "{TORCH}" {INDEX}cu128'), ((11, 4), "update the NVIDIA driver, since")],
    ids=str,
)
def test_a_driver_that_is_too_old_leaves_the_card_idle(runs: tuple[int, int], command: str) -> None:
    facts = saying(replace(SOUND, driver=Driver(CARD, runs)), device="cpu", capability=None)
    found = only(replace(facts, bitsandbytes=None))
    assert f"runs CUDA {runs[0]}.{runs[1]} at most and torch 2.13.0+cu130 needs 13.0" in found.consequence
    assert found.command.startswith(command)
    assert not found.is_fatal


@pytest.mark.parametrize(
    "system, visible, value, command",
    [
        ("Linux", "", "CUDA_VISIBLE_DEVICES is ''", "unset CUDA_VISIBLE_DEVICES"),
        ("Windows", "-1", "CUDA_VISIBLE_DEVICES is '-1'", "set CUDA_VISIBLE_DEVICES="),
        ("Linux", None, f"{CARD} is here", 'python -c "import torch; torch.cuda.init()"'),
    ],
)
def test_a_card_that_torch_does_not_see_is_named(system: str, visible: str | None, value: str, command: str) -> None:
    found = only(replace(saying(SOUND, device="cpu", capability=None), system=system, visible_cards=visible))
    assert (found.value, found.command, found.is_fatal) == (value, command, False)


@pytest.mark.parametrize(
    "capability, code, runs",
    [
        ((8, 6), ("sm_80",), True),
        ((8, 6), ("sm_89",), False),
        ((9, 0), ("sm_80", "sm_86"), False),
        ((12, 0), ("sm_90", "compute_90"), True),
        ((8, 0), ("compute_90",), False),
        ((9, 0), ("sm_90a",), True),
        ((12, 1), ("sm_120f",), True),
        ((12, 0), ("compute_90a",), False),
        ((12, 0), ("compute_100f",), False),
        ((8, 6), ("nonsense",), False),
        ((8, 6), (), True),
    ],
    ids=str,
)
def test_torch_must_hold_code_for_the_card(capability: tuple[int, int], code: tuple[str, ...], runs: bool) -> None:
    found = find_all(saying(on_card(capability), architectures=code))
    assert [finding.is_fatal for finding in found] == ([] if runs else [True])
    for finding in found:
        assert finding.value == f"this card has capability {capability[0]}.{capability[1]}"
        assert "no code for it, and training would fail" in finding.consequence


def test_a_card_before_rtx_20_is_led_to_the_wheels_that_still_know_it() -> None:
    found = only(on_card((6, 1)))
    assert found.is_fatal
    assert found.command == f'pip install --force-reinstall "{TORCH}" {INDEX}cu126'
    with_old_wheel = replace(on_card((6, 1)), build=TorchBuild("2.13.0+cu126", (12, 6)), bitsandbytes=None)
    found = only(saying(with_old_wheel, architectures=("sm_50", "sm_60", "sm_70")))
    assert (found.is_fatal, found.command) == (False, "")
    assert "lowvram's kernels need 7.5" in found.consequence


def test_a_card_that_is_too_old_is_told_so_and_what_to_take_instead() -> None:
    p100 = only(on_card((6, 0)))
    assert "too old for Triton, and torch 2.13.0+cu130 has no code for it" in p100.consequence
    assert "on Kaggle and Colab the T4" in p100.consequence
    k80 = only(on_card((3, 7)))  # no wheel of torch knows it
    assert (k80.is_fatal, k80.command) == (True, "choose another card: on Kaggle and Colab the T4")


def test_a_card_newer_than_its_torch_is_led_to_a_newer_wheel() -> None:
    old = replace(SOUND, build=TorchBuild("2.11.0+cu126", (12, 6)), torch_wants=(), triton=TritonBuild("3.6.0"))
    found = find_all(saying(old, architectures=("sm_80", "sm_90")))[0]
    assert found.is_fatal
    assert found.command.endswith("/cu130")


def test_a_card_that_does_not_start_is_fatal() -> None:
    found = only(saying(SOUND, card_problem="CUDA error: unknown error", capability=None))
    assert found.value == "the card does not start (CUDA error: unknown error)"
    assert found.is_fatal


def test_turing_trains_in_fp16() -> None:
    found = only(on_card((7, 5)))
    assert (found.command, found.is_fatal) == ("lowvram train RUN.toml --set train.precision=fp16", False)


@pytest.mark.parametrize(
    "facts, torch, command",
    [
        (SOUND, "2.13.0+cu130", 'pip install "triton>=3.5,<3.8"'),
        (replace(SOUND, torch_wants=("triton==3.6.0",)), "2.11.0", 'pip install "triton==3.6.*"'),
        (WINDOWS, "2.12.0+cu130", 'pip install "triton-windows>=3.5,<3.8"'),
        (WINDOWS, "2.10.0+cu130", 'pip install "triton-windows==3.6.*"'),
        (WINDOWS, "unknown", 'pip install "triton-windows>=3.5,<3.8"'),
    ],
    ids=["linux", "linux, older", "windows", "windows, older", "unknown torch"],
)
def test_a_missing_triton_is_slower_and_not_fatal(facts: Facts, torch: str, command: str) -> None:
    found = only(replace(facts, triton=None, build=TorchBuild(torch, (13, 0))))
    assert found == Finding("Triton is not installed", "plain PyTorch computes, slower", command)
    assert found.sentence == f"Triton is not installed: plain PyTorch computes, slower; to repair it: {command}."


def test_a_triton_that_does_not_import_is_fatal() -> None:
    found = only(replace(SOUND, triton=TritonBuild("3.7.1", "libtriton.so: undefined symbol")))
    assert found.value == "Triton 3.7.1 does not import (libtriton.so: undefined symbol)"
    assert (found.command, found.is_fatal) == ('pip install --force-reinstall "triton==3.7.*"', True)


@pytest.mark.parametrize(
    "version, words",
    [("3.9.0", "written for >=3.5,<3.8"), ("3.4.0", "written for >=3.5,<3.8"), ("3.6.0", "was built with 3.7")],
)
def test_another_triton_than_torchs_own_is_named_with_the_right_one(version: str, words: str) -> None:
    found = only(replace(SOUND, triton=TritonBuild(version)))
    assert found.value == f"Triton is {version}"
    assert words in found.consequence
    assert (found.command, found.is_fatal) == ('pip install "triton==3.7.*"', False)


@pytest.mark.parametrize(
    "wants, torch, pair",
    [
        ((PIN,), "2.13.0", (3, 7)),
        (("triton==3.6.0 ; platform_system == 'Linux'",), "2.13.0", (3, 6)),
        (("pytorch-triton (==3.5.1)",), "2.13.0", (3, 5)),
        (("tritonclient==2.1",), "2.12.1", (3, 7)),
        ((), "2.10.0+cu128", (3, 6)),
        ((), "2.11.0", (3, 6)),
        ((), "2.99.0", None),
        ((), "unknown", None),
    ],
    ids=str,
)
def test_the_triton_of_a_torch_is_what_its_wheel_asks_for(
    wants: tuple[str, ...], torch: str, pair: tuple[int, int] | None
) -> None:
    assert find_pair(replace(SOUND, torch_wants=wants, build=TorchBuild(torch, (13, 0)))) == pair


def test_without_torch_or_with_nonsense_no_version_is_known() -> None:
    assert find_pair(replace(BARE, build=None)) is None
    assert read_minor("nightly") is None
    assert read_minor("3.7.1+git") == (3, 7)


@pytest.mark.parametrize(
    "asked, value, command",
    [
        (None, "there is no C compiler", "sudo apt install gcc"),
        ("gcc-99", "CC is 'gcc-99', which is no compiler here", "unset CC"),
    ],
)
def test_triton_on_linux_needs_a_compiler(asked: str | None, value: str, command: str) -> None:
    found = only(replace(SOUND, compiler=None, compiler_asked=asked))
    assert (found.value, found.command, found.is_fatal) == (value, command, True)
    assert "the first launch of a kernel fails" in found.consequence


def test_triton_on_linux_needs_pythons_headers() -> None:
    found = only(replace(SOUND, has_headers=False, python="3.12.3"))
    assert (found.value, found.is_fatal) == ("Python 3.12's headers are missing", True)
    assert found.command == "sudo apt install python3.12-dev"


def test_without_a_card_or_triton_no_compiler_is_missed() -> None:
    assert find_all(replace(BARE, compiler=None, has_headers=False, triton=TritonBuild("3.9.0", "broken"))) == []
    bare = replace(SOUND, triton=None, compiler=None, has_headers=False)
    assert only(bare).value == "Triton is not installed"


@pytest.mark.parametrize(
    "facts, libraries, library",
    [
        (BARE, (), "library"),
        (SOUND, (), "library for CUDA 13"),
        (SOUND, ("libbitsandbytes_cpu", "libbitsandbytes_cuda128"), "library for CUDA 13"),
    ],
    ids=["none", "none on a card", "another CUDA"],
)
def test_bitsandbytes_without_its_library_is_a_note(facts: Facts, libraries: tuple[str, ...], library: str) -> None:
    found = only(replace(facts, bitsandbytes=Bitsandbytes("0.50.2", libraries)))
    assert found.value == f"bitsandbytes 0.50.2 has no native {library}"
    assert not found.is_fatal
    assert find_all(replace(facts, bitsandbytes=Bitsandbytes("0.50.2", ("libbitsandbytes_cuda132",)))) == []


def test_a_mac_says_what_metal_lacks_and_trains() -> None:
    attention, numbers = find_all(MAC)
    assert attention.value == "attention on Metal writes out every score"
    assert attention.command == "lowvram train RUN.toml --recompute attention"
    assert "8-bit floats" in numbers.value
    assert not attention.is_fatal | numbers.is_fatal


@pytest.mark.parametrize(
    "version, has_metal, value, command",
    [
        ((13, 6), True, "this is macOS 13.6", "update macOS"),
        ((15, 2), False, "torch is 2.13.0", f'pip install --force-reinstall "{TORCH}"'),
        ((15, 2), True, "torch 2.13.0 was built for Metal", "type it in a terminal of the Mac itself"),
    ],
    ids=["old macOS", "no Metal", "virtual"],
)
def test_a_mac_whose_gpu_torch_cannot_use_trains_on_its_processor(
    version: tuple[int, ...], has_metal: bool, value: str, command: str
) -> None:
    found = only(replace(MAC, system_version=version, says=TorchSays(has_metal=has_metal)))
    assert (found.value, found.is_fatal) == (value, False)
    assert "so training runs on the processor" in found.consequence
    assert found.command.startswith(command)


@pytest.mark.parametrize(
    "total, free, is_told",
    [(12, 10.6, False), (12, 10.4, True), (6, 4.6, False), (6, 4.4, True), (24, 21.5, False), (24, 20.5, True)],
)
def test_memory_that_others_hold_is_told_beyond_a_desktops(total: float, free: float, is_told: bool) -> None:
    card = NvidiaCard(CARD, (12, 0), int(total * GIB), int(free * GIB))
    found = find_all(replace(SOUND, card=card))
    assert [finding.command for finding in found] == (["nvidia-smi"] if is_told else [])
    if is_told:
        assert found[0].value == f"other programs hold {total - free:.1f} GiB of the card's {total:.1f} GiB"


def test_a_disk_that_is_nearly_full_is_told() -> None:
    assert find_all(replace(BARE, free_disk_bytes=5 * GIB)) == []
    found = only(replace(BARE, free_disk_bytes=5 * GIB - 2**29))
    assert (found.value, found.is_fatal) == ("4.5 GiB of disk are free in this folder", False)
    assert found.command == "lowvram train RUN.toml --set run.dir=/ANOTHER/DISK/run"


def test_an_amd_card_has_other_rules_than_these() -> None:
    amd = saying(replace(BARE, build=TorchBuild("2.13.0+rocm7", None)), device="cuda", architectures=("gfx1100",))
    assert find_all(saying(amd, capability=(11, 0))) == []


def test_what_is_fatal_comes_first_and_every_problem_is_told() -> None:
    found = find_all(replace(SOUND, free_disk_bytes=GIB, compiler=None, has_headers=False))
    assert [finding.is_fatal for finding in found] == [True, True, False]


def test_a_start_is_told_only_of_what_its_launches_meet() -> None:
    facts = replace(on_card((7, 5)), triton=None, free_disk_bytes=GIB)
    assert [finding.value for finding in find_all(facts, LAUNCH_CHECKS)] == ["Triton is not installed"]
    assert set(LAUNCH_CHECKS) < set(CHECKS)


def test_the_ranges_are_those_that_the_package_asks_for() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    asked = tomllib.loads(text)["project"]["dependencies"]
    assert TORCH in asked
    assert any(line.startswith(f"triton{TRITON};") for line in asked)
    assert any(line.startswith(f"triton-windows{TRITON};") for line in asked)
