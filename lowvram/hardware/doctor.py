"""Checks what prevents a machine from training, or from training fast, and names the fix: pure functions of facts."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from lowvram_kernels.capabilities import FIRST_IN_TORCH_WHEELS, features_of

from lowvram.hardware.card_names import TAKE_ANOTHER
from lowvram.hardware.detect import TORCH, UPDATE_DRIVER, find_mismatch, find_wheel, install_command
from lowvram.hardware.inspect import Facts
from lowvram.units import show_bytes

TRITON = ">=3.5,<3.8"
_GIB = 2**30


class Finding(NamedTuple):
    """A problem: what is here, what follows from it, what to type or do ("" if nothing helps).

    is_fatal: training would fail, and not only be slower.
    """

    value: str
    consequence: str
    command: str = ""
    is_fatal: bool = False

    @property
    def sentence(self) -> str:
        """The whole finding in one sentence."""
        return f"{self.value}: {self.consequence}" + (f"; to repair it: {self.command}" if self.command else "") + "."


def check_torch(facts: Facts) -> Finding | None:
    """Torch must be installed, in a version for which this code is written, and importing it must work."""
    build, says = facts.build, facts.says
    minor = read_minor(build.version) if build else None
    if build is not None and not says.problem and (minor is None or (2, 10) <= minor < (2, 14)):
        return None
    if facts.is_translated:
        value = "Python is an Intel build that macOS translates"
        consequence = "PyTorch has no wheels for it, so nothing can be trained"
        return Finding(value, consequence, "arch -arm64 brew install python && python3 -m venv .venv", True)
    if facts.system == "Darwin" and facts.processor == "x86_64":
        consequence = "PyTorch's last wheels for Intel Macs are 2.2, so nothing can be trained"
        return Finding("this is an Intel Mac", consequence, "", True)
    command = _install_torch(facts)
    if build is None:
        return Finding("torch is not installed", "nothing can be trained", command, True)
    if says.problem:
        value = f"torch {build.version} does not import ({says.problem})"
        return Finding(value, "nothing can be trained", command, True)
    return Finding(f"torch is {build.version}", f"lowvram needs {TORCH}, and training would fail", command, True)


def _install_torch(facts: Facts) -> str:
    is_forced = facts.build is not None
    wheel = find_wheel(facts.driver, facts.capability) if facts.driver else None
    if wheel is not None:
        return install_command(f"cu{wheel[0]}{wheel[1]}", is_forced)
    return install_command("" if facts.system == "Darwin" else "cpu", is_forced)


def check_idle_card(facts: Facts) -> Finding | None:
    """Torch must be able to use the NVIDIA card that is here."""
    driver, build = facts.driver, facts.build
    if driver is None or build is None or facts.says.problem or facts.says.device == "cuda":
        return None
    idle = "so training runs on the processor and the card stays idle"
    mismatch = find_mismatch(driver, build, facts.capability)
    if mismatch is not None:
        consequence = f"{mismatch.reason}, {idle}"
        return Finding(f"{driver.card} is here", consequence, mismatch.command or UPDATE_DRIVER)
    if facts.visible_cards is not None:
        command = "set CUDA_VISIBLE_DEVICES=" if facts.system == "Windows" else "unset CUDA_VISIBLE_DEVICES"
        return Finding(f"CUDA_VISIBLE_DEVICES is {facts.visible_cards!r}", f"torch sees no card, {idle}", command)
    consequence = f"torch {build.version} does not see it, {idle}; the command shows why"
    return Finding(f"{driver.card} is here", consequence, 'python -c "import torch; torch.cuda.init()"')


def check_start(facts: Facts) -> Finding | None:
    """The card must start; after an update of the driver, or after the computer slept, it may not."""
    if not facts.says.card_problem:
        return None
    value = f"the card does not start ({facts.says.card_problem})"
    return Finding(value, "training on it would fail", "restart the computer", True)


def check_architecture(facts: Facts) -> Finding | None:
    """Torch must hold code for the card: its wheels for CUDA 12.8 and 13 have none for those before RTX 20."""
    capability, build = facts.capability, facts.build
    if not facts.has_cuda or capability is None or build is None:
        return None
    name = f"capability {capability[0]}.{capability[1]}"
    has_code = not facts.says.architectures or any(_runs(code, capability) for code in facts.says.architectures)
    if capability < FIRST_IN_TORCH_WHEELS:
        return _find_too_old(facts, f"this card has {name}", has_code)
    if has_code:
        return None
    consequence = f"torch {build.version} has no code for it, and training would fail"
    return Finding(f"this card has {name}", consequence, _install_torch(facts), True)


def _find_too_old(facts: Facts, value: str, has_code: bool) -> Finding:
    """Return the finding for a card before RTX 20; torch's wheels for CUDA 12.6 still support those from Maxwell on."""
    assert facts.build is not None, "torch sees the card"
    if has_code:
        consequence = "it is too old for Triton: lowvram's kernels need 7.5, so plain PyTorch computes, far slower"
        return Finding(value, f"{consequence}; better {TAKE_ANOTHER}")
    consequence = (
        f"it is too old for Triton, and torch {facts.build.version} has no code for it, and training would fail"
    )
    wheel = find_wheel(facts.driver, facts.capability) if facts.driver else None
    if wheel is None:
        return Finding(value, consequence, TAKE_ANOTHER, True)
    return Finding(value, f"{consequence}; {TAKE_ANOTHER}, or let plain PyTorch compute", _install_torch(facts), True)


def _runs(code: str, capability: tuple[int, int]) -> bool:
    """Say whether a card runs code for an architecture: a binary for its major version, PTX for any older version.

    Source: CUDA C++ Programming Guide, binary and PTX compatibility; "a" is for one card only, "f" for its family.
    """
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", code)
    if match is None:
        return False
    built_for = (int(match[2]), int(match[3]))
    if match[4] == "a":
        return built_for == capability
    is_binary = match[1] == "sm" or match[4] == "f"
    return built_for <= capability and (built_for[0] == capability[0] or not is_binary)


def check_numbers(facts: Facts) -> Finding | None:
    """A card whose tensor cores support fp16 but not bf16 is slow in bf16."""
    if not facts.has_cuda or facts.capability is None:
        return None
    features = features_of(facts.capability)
    if features.has_bf16 or not features.has_half:
        return None
    # Rate of matrix products in fp16 divided by that in bf16, measured: RTX 2070 7.2, RTX 2080 7.6, T4 17 (profiles/).
    consequence = "its products are 7 to 17 times as fast in fp16"
    command = "lowvram train RUN.toml --set train.precision=fp16"
    return Finding("this card has no tensor cores for bf16", consequence, command)


def check_triton(facts: Facts) -> Finding | None:
    """With CUDA there must be a Triton that can be imported, in the version that this torch was built with."""
    if not facts.has_cuda:
        return None
    triton, pair = facts.triton, find_pair(facts)
    exact = f"=={pair[0]}.{pair[1]}.*" if pair else TRITON
    package = "triton-windows" if facts.system == "Windows" else "triton"
    if triton is None:
        wanted = TRITON if pair == _NEWEST_TRITON else exact
        return Finding("Triton is not installed", "plain PyTorch computes, slower", f'pip install "{package}{wanted}"')
    if triton.problem:
        value = f"Triton {triton.version} does not import ({triton.problem})"
        consequence = "the first launch of a kernel fails, and training with it"
        return Finding(value, consequence, f'pip install --force-reinstall "{package}{exact}"', True)
    minor = read_minor(triton.version)
    if minor is not None and not (3, 5) <= minor <= _NEWEST_TRITON:
        consequence = f"lowvram's kernels are written for {TRITON} and may not compile"
        return Finding(f"Triton is {triton.version}", consequence, f'pip install "{package}{exact}"')
    if minor is not None and pair is not None and minor != pair and facts.build is not None:
        consequence = f"torch {facts.build.version} was built with {pair[0]}.{pair[1]}, and compiling blocks may fail"
        return Finding(f"Triton is {triton.version}", consequence, f'pip install "{package}{exact}"')
    return None


# The Triton that each torch's wheels for CUDA require (their metadata on PyPI); wheels for Windows require none.
_PAIRS = {(2, 10): (3, 6), (2, 11): (3, 6), (2, 12): (3, 7), (2, 13): (3, 7)}
_NEWEST_TRITON = (3, 7)


def find_pair(facts: Facts) -> tuple[int, int] | None:
    """Return the (major, minor) of the Triton that belongs to the installed torch, None if it is not known."""
    for wanted in facts.torch_wants:
        if pinned := re.match(r"(?:pytorch-)?triton(?:-windows)?\s*\(?==\s*([\d.]+)", wanted):
            return read_minor(pinned[1])
    minor = read_minor(facts.build.version) if facts.build else None
    return _PAIRS.get(minor) if minor else None


def read_minor(version: str) -> tuple[int, int] | None:
    """Return (2, 13) for "2.13.0+cu130", None if the text is no version."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else None


def _builds_launcher(facts: Facts) -> bool:
    """Say whether Triton needs a C compiler at its first launch; Triton for Windows includes one."""
    return facts.has_cuda and facts.triton is not None and facts.system == "Linux"


def check_compiler(facts: Facts) -> Finding | None:
    """Triton builds its launcher with a C compiler."""
    if not _builds_launcher(facts) or facts.compiler is not None:
        return None
    consequence = "Triton builds its launcher with one, so the first launch of a kernel fails, and training with it"
    if facts.compiler_asked is not None:
        return Finding(f"CC is {facts.compiler_asked!r}, which is no compiler here", consequence, "unset CC", True)
    return Finding("there is no C compiler", consequence, "sudo apt install gcc", True)


def check_headers(facts: Facts) -> Finding | None:
    """Triton builds its launcher against Python's headers."""
    if not _builds_launcher(facts) or facts.has_headers:
        return None
    minor = ".".join(facts.python.split(".")[:2])
    consequence = "Triton builds its launcher with them, so the first launch of a kernel fails, and training with it"
    return Finding(f"Python {minor}'s headers are missing", consequence, f"sudo apt install python{minor}-dev", True)


def check_bitsandbytes(facts: Facts) -> Finding | None:
    """An installed bitsandbytes must include its native library; runs that ask for its AdamW need it, and tests."""
    installed, build = facts.bitsandbytes, facts.build
    if installed is None:
        return None
    major = build.cuda[0] if build is not None and build.cuda is not None and facts.has_cuda else None
    wanted = "libbitsandbytes_" if major is None else f"libbitsandbytes_cuda{major}"
    if any(name.startswith(wanted) for name in installed.libraries):
        return None
    library = "library" if major is None else f"library for CUDA {major}"
    consequence = 'a run with optimizer.backend = "bitsandbytes" cannot start, and tests that compare with it fail'
    command = 'pip install --force-reinstall --no-deps "bitsandbytes>=0.50"'
    return Finding(f"bitsandbytes {installed.version} has no native {library}", consequence, command)


def check_metal(facts: Facts) -> Finding | None:
    """On an Apple chip torch must see its GPU.  Source: torch, aten/src/ATen/mps/MPSDevice.mm."""
    if facts.system != "Darwin" or facts.says.device == "mps" or facts.build is None or facts.says.problem:
        return None
    processor = "so training runs on the processor"
    version = ".".join(map(str, facts.system_version))
    if not facts.says.has_metal:
        consequence = f"it was built without Metal, {processor}"
        return Finding(f"torch is {facts.build.version}", consequence, install_command(""))
    if facts.system_version and facts.system_version < (14,):
        consequence = f"torch's Metal backend, and bf16 on it, need macOS 14, {processor}"
        return Finding(f"this is macOS {version}", consequence, "update macOS in System Settings, Software Update")
    command = "type it in a terminal of the Mac itself: virtual machines and sandboxes hide the GPU"
    return Finding(f"torch {facts.build.version} was built for Metal", f"it sees no GPU, {processor}", command)


def check_metal_attention(facts: Facts) -> Finding | None:
    """On Metal torch has no fused attention with a backward pass."""
    if facts.says.device != "mps":
        return None
    consequence = "its memory grows with the square of seq_len; lowvram fit counts it, and recomputing saves most of it"
    command = "lowvram train RUN.toml --recompute attention"
    return Finding("attention on Metal writes out every score", consequence, command)


def check_metal_numbers(facts: Facts) -> Finding | None:
    """Metal has no 8-bit floats, and Triton does not compile for it."""
    if facts.says.device != "mps":
        return None
    consequence = "their bytes are decoded, and 8-bit AdamW computed, by plain PyTorch: less memory, no speed"
    return Finding("Metal has no 8-bit floats and no Triton", consequence)


def check_card_memory(facts: Facts) -> Finding | None:
    """Memory of the card that other programs hold is missing for training; a desktop's usual share is ignored."""
    card = facts.card
    if card is None or facts.says.device != "cuda":
        return None
    held = card.total_bytes - card.free_bytes
    if held <= max(card.total_bytes // 8, 3 * _GIB // 2):
        return None
    value = f"other programs hold {show_bytes(held)} of the card's {show_bytes(card.total_bytes)}"
    return Finding(value, "training plans with the rest; nvidia-smi names them", "nvidia-smi")


def check_disk(facts: Facts) -> Finding | None:
    """Checkpoints need disk space: 1.4 GB for the smallest preset, tens of GB for the largest (`lowvram fit`)."""
    if facts.free_disk_bytes >= 5 * _GIB:
        return None
    value = f"{show_bytes(facts.free_disk_bytes)} of disk are free in this folder"
    consequence = "most presets' checkpoints need more; lowvram fit says how much"
    return Finding(value, consequence, "lowvram train RUN.toml --set run.dir=/ANOTHER/DISK/run")


Check = Callable[[Facts], Finding | None]
# Checks of what a run on a CUDA card needs at its first launch.
LAUNCH_CHECKS: tuple[Check, ...] = (check_start, check_architecture, check_triton, check_compiler, check_headers)
CHECKS: tuple[Check, ...] = (
    check_torch,
    check_idle_card,
    *LAUNCH_CHECKS,
    check_numbers,
    check_metal,
    check_metal_attention,
    check_metal_numbers,
    check_bitsandbytes,
    check_card_memory,
    check_disk,
)


def find_all(facts: Facts, checks: tuple[Check, ...] = CHECKS) -> list[Finding]:
    """Return the findings of the checks, those that would make training fail first."""
    findings = [finding for check in checks if (finding := check(facts)) is not None]
    return sorted(findings, key=lambda finding: not finding.is_fatal)
