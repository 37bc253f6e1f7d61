"""What this machine has: driver, installed torch, card, memory; never imports torch."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import psutil

from lowvram.errors import ConfigError
from lowvram.profile import Profile, find_profile, generic_profile, load_profile
from lowvram.units import show_bytes

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Driver:
    """An NVIDIA driver: the first card's name, and the newest CUDA that the driver can run, as (major, minor)."""

    card: str
    cuda: tuple[int, int]


@dataclass(frozen=True)
class TorchBuild:
    """The installed torch: its version, and the CUDA that it was built for, None for a CPU-only build."""

    version: str
    cuda: tuple[int, int] | None


class NvidiaCard(NamedTuple):
    """The first NVIDIA card as its driver sees it now.  free_bytes: what no other program holds, desktop included."""

    name: str
    capability: tuple[int, int]
    total_bytes: int
    free_bytes: int


class Detected(NamedTuple):
    """This machine's profile, the bytes that are free on it now (None: nobody can say), and a sentence about both."""

    profile: Profile
    free_bytes: int | None
    sentence: str


def find_driver() -> Driver | None:
    """Return the NVIDIA driver of this machine, or None where there is none."""
    return _ask_nvml(_read_driver)


def find_card() -> NvidiaCard | None:
    """Return the first NVIDIA card of this machine with its memory now, or None where there is none."""
    return _ask_nvml(_read_card)


def _ask_nvml(question: Callable[[Any], Answer]) -> Answer | None:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return question(pynvml)
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def _read_driver(nvml: Any) -> Driver:
    number = nvml.nvmlSystemGetCudaDriverVersion_v2()
    return Driver(_read_name(nvml), (number // 1000, number % 1000 // 10))


def _read_card(nvml: Any) -> NvidiaCard:
    """Return the card that CUDA calls its first: the one named, or the fastest, and not the one in the first slot."""
    cards = [_read_one(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
    if os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        cards.sort(key=lambda card: (card.capability, card.total_bytes), reverse=True)
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0].strip()
    return cards[int(first)] if first.isdecimal() and int(first) < len(cards) else cards[0]


def _read_one(nvml: Any, index: int) -> NvidiaCard:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    return NvidiaCard(_read_name(nvml, index), (major, minor), int(memory.total), int(memory.free))


def _read_name(nvml: Any, index: int = 0) -> str:
    name = nvml.nvmlDeviceGetName(nvml.nvmlDeviceGetHandleByIndex(index))
    return name if isinstance(name, str) else name.decode()


def find_torch() -> TorchBuild | None:
    """Return what is installed as torch, read from its version file: importing it would take seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    version = re.search(r"__version__ = '([^']+)'", text)
    cuda = re.search(r"^cuda[^=]*= '(\d+)\.(\d+)'", text, re.MULTILINE)
    return TorchBuild(version[1] if version else "unknown", (int(cuda[1]), int(cuda[2])) if cuda else None)


def explain_mismatch(driver: Driver | None, build: TorchBuild | None) -> str | None:
    """Return one sentence with the exact command where torch leaves the NVIDIA card idle; None where all is well."""
    if driver is None or build is None:
        return None
    # Within a major version a driver also runs what was built for a newer minor one (NVIDIA, minor compatibility).
    same_major = [cuda for cuda in reversed(_WHEELS) if cuda[0] == driver.cuda[0]]
    newest = next((cuda for cuda in _WHEELS if cuda <= driver.cuda), next(iter(same_major), None))
    if newest is None:
        command = "update the NVIDIA driver, since none of torch's builds runs on it"
    else:
        index = f"https://download.pytorch.org/whl/cu{newest[0]}{newest[1]}"
        command = f'type: pip install --force-reinstall "torch>=2.10,<2.14" --index-url {index}'
    if build.cuda is None:
        idle = f"torch {build.version} is a CPU-only build, so training would not use it"
        return f"{driver.card} is here, but {idle}; {command}"
    if build.cuda[0] > driver.cuda[0]:
        had, needed = (".".join(map(str, version)) for version in (driver.cuda, build.cuda))
        idle = f"its driver runs CUDA {had} at most and torch {build.version} needs {needed}"
        return f"{driver.card} is here, but {idle}; {'update the driver, or ' if newest else ''}{command}"
    return None


# CUDA versions that PyTorch's own index holds wheels for, newest first (pytorch.org/get-started/previous-versions).
_WHEELS = ((13, 0), (12, 8), (12, 6))


def machine_memory_bytes() -> int:
    """Return the host's memory."""
    return int(psutil.virtual_memory().total)


def describe_machine() -> str:
    """Return the machine in a few words: system, processors, memory, card."""
    driver = find_driver()
    card = f", {driver.card}" if driver else ""
    processors = f"{psutil.cpu_count(logical=True)} processors"
    memory = show_bytes(machine_memory_bytes())
    return f"{platform.system()} {platform.machine()}, {processors}, {memory}{card}"


def detect() -> Detected:
    """Return the profile of what this machine trains on: its first NVIDIA card, its Apple chip, or its processor."""
    card = find_card()
    if card is not None:
        return describe_card(card)
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return _describe_apple(_read_chip(), machine_memory_bytes())
    return describe_processor()


def describe_processor() -> Detected:
    """Return the processor's profile and what is free of this machine's memory."""
    memory = psutil.virtual_memory()
    profile, _ = find_profile("cpu", memory.total)
    room = f"{show_bytes(memory.total)} of memory, {show_bytes(memory.available)} of it free"
    return Detected(profile, memory.available, f"No GPU here that PyTorch can train on; the processor has {room}.")


def describe_card(card: NvidiaCard) -> Detected:
    """Return the profile of a card that is here: the catalogue's, or a generic one with the driver's own answers."""
    room = f"{card.name} with {show_bytes(card.total_bytes)}, {show_bytes(card.free_bytes)} of it free."
    try:
        profile, note = find_profile(card.name, card.total_bytes)
    except ConfigError:
        profile = generic_profile(card.total_bytes, card.name, card.capability)
        note = "The catalogue does not know it, so its memory is known and its speed is not."
    return Detected(profile, card.free_bytes, f"{room} {note}".strip())


def _describe_apple(chip: str, ram_bytes: int) -> Detected:
    room = f"{chip} with {show_bytes(ram_bytes)} of unified memory."
    try:
        return Detected(find_profile(chip, ram_bytes)[0], None, room)
    except ConfigError:
        # What is the same on every Apple chip is taken from the oldest; speeds and sold sizes are not.
        unknown = dict.fromkeys(
            ("memory_range_bytes", "bandwidth_bytes_per_s", "watts", "theory_tflops", "tflops_source")
        ) | {"id": "generic", "name": chip, "memory_bytes": ram_bytes, "tflops": {}, "sources": ()}
        profile = load_profile("m1").model_copy(update=unknown)
        return Detected(profile, None, f"{room} The catalogue does not know it, so its speed is not known.")


def _read_chip() -> str:
    command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
