"""Detects what this machine has: driver, installed torch, card, memory; never imports torch."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import psutil
from lowvram_kernels.capabilities import FIRST_IN_TORCH_WHEELS

from lowvram.errors import ConfigError
from lowvram.hardware.card_names import explain_too_old
from lowvram.hardware.profile import Profile, find_profile, generic_profile, load_profile
from lowvram.units import show_bytes

Result = TypeVar("Result")


@dataclass(frozen=True)
class Driver:
    """An NVIDIA driver: its card's name, and the newest CUDA that the driver can run, as (major, minor).

    card: the card that a run would use if the environment hid none.
    """

    card: str
    cuda: tuple[int, int]


@dataclass(frozen=True)
class TorchBuild:
    """The installed torch: its version, and the CUDA that it was built for, None for a CPU-only build."""

    version: str
    cuda: tuple[int, int] | None


class NvidiaCard(NamedTuple):
    """An NVIDIA card as its driver reports it now.  free_bytes: what no program or desktop has allocated."""

    name: str
    capability: tuple[int, int]
    total_bytes: int
    free_bytes: int


class TritonBuild(NamedTuple):
    """The installed Triton: its version, and its error if importing it fails, "" otherwise."""

    version: str
    problem: str = ""


class Bitsandbytes(NamedTuple):
    """The installed bitsandbytes: its version, and the names of the native libraries that came with it."""

    version: str
    libraries: tuple[str, ...]


class Mismatch(NamedTuple):
    """Why torch cannot use the NVIDIA card, and the command that installs a torch that can, "" if there is none.

    is_driver_old: whether a newer driver would solve it too.
    """

    reason: str
    command: str
    is_driver_old: bool


class Detected(NamedTuple):
    """This machine's profile, the bytes that are free on it now (None: not known), and a sentence about both."""

    profile: Profile
    free_bytes: int | None
    sentence: str


def find_driver() -> Driver | None:
    """Return the NVIDIA driver of this machine, None if there is no driver or no card for it."""
    return _query_nvml(_read_driver)


def find_driver_version() -> str | None:
    """Return the version of the NVIDIA driver, such as `580.95.05`; None if there is no driver."""
    return _query_nvml(_read_version)


def _read_version(nvml: Any) -> str:
    version = nvml.nvmlSystemGetDriverVersion()
    return version if isinstance(version, str) else str(version.decode())


def find_card() -> NvidiaCard | None:
    """Return the NVIDIA card that a run would use, with its memory now; None if there is none or all are hidden."""
    return _query_nvml(_read_card)


def _query_nvml(read: Callable[[Any], Result]) -> Result | None:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return read(pynvml)
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def _read_driver(nvml: Any) -> Driver | None:
    number = nvml.nvmlSystemGetCudaDriverVersion_v2()
    indices = _list_indices(nvml)
    if not indices:
        return None
    return Driver(_read_name(nvml, (_list_visible(nvml, indices) or indices)[0]), (number // 1000, number % 1000 // 10))


def _read_card(nvml: Any) -> NvidiaCard | None:
    index = first_visible_index(nvml)
    if index is None:
        return None
    memory = nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(index))
    name, capability = _read_name(nvml, index), _read_capability(nvml, index)
    return NvidiaCard(name, capability, int(memory.total), int(memory.free))


def first_visible_index(nvml: Any) -> int | None:
    """Return NVML's index of the card that a run would use; None if there is none or all are hidden."""
    visible = _list_visible(nvml, _list_indices(nvml))
    return visible[0] if visible else None


def _list_indices(nvml: Any) -> list[int]:
    """Return NVML's indices of all cards in the order in which CUDA counts them.

    NVML counts by slot.  CUDA begins with the fastest card, taken here to be the one with the highest capability and
    then the most memory, unless CUDA_DEVICE_ORDER is PCI_BUS_ID (CUDA C++ Programming Guide, CUDA environment
    variables).  A card whose memory NVML does not know comes after the others of its capability.
    """
    indices = list(range(nvml.nvmlDeviceGetCount()))
    if os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or len(indices) < 2:
        return indices

    def rank(index: int) -> tuple[tuple[int, int], int]:
        try:
            total_bytes = int(nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(index)).total)
        except nvml.NVMLError:  # "not supported": such a card shares the computer's memory
            total_bytes = 0
        return _read_capability(nvml, index), total_bytes

    return sorted(indices, key=rank, reverse=True)


def _list_visible(nvml: Any, indices: list[int]) -> list[int]:
    """Return the indices of the cards that CUDA_VISIBLE_DEVICES lists, in its order; all if it is not set.

    Its entries are positions in CUDA's own order, or beginnings of UUIDs.  An entry that names no card hides all cards
    after it, so that an empty value and -1 hide every card; a card that is named twice hides all.
    """
    setting = os.environ.get("CUDA_VISIBLE_DEVICES")
    if setting is None:
        return indices
    visible: list[int] = []
    for entry in setting.split(","):
        index = _find_named(nvml, indices, entry.strip())
        if index is None:
            break
        if index in visible:
            return []
        visible.append(index)
    return visible


def _find_named(nvml: Any, indices: list[int], entry: str) -> int | None:
    if entry.isdecimal():
        return indices[int(entry)] if int(entry) < len(indices) else None
    if entry.startswith("MIG-"):
        return indices[0] if indices else None  # a part of some card; torch reports its memory when a run begins
    if not entry.startswith("GPU-"):
        return None
    matches = [index for index in indices if _read_uuid(nvml, index).startswith(entry)]
    return matches[0] if len(matches) == 1 else None


def _read_capability(nvml: Any, index: int) -> tuple[int, int]:
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(nvml.nvmlDeviceGetHandleByIndex(index))
    return int(major), int(minor)


def _read_uuid(nvml: Any, index: int) -> str:
    uuid = nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetHandleByIndex(index))
    return uuid if isinstance(uuid, str) else str(uuid.decode())


def _read_name(nvml: Any, index: int) -> str:
    name = nvml.nvmlDeviceGetName(nvml.nvmlDeviceGetHandleByIndex(index))
    return name if isinstance(name, str) else str(name.decode())


def find_torch() -> TorchBuild | None:
    """Return the installed torch, read from its version file: importing it would take seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    version = re.search(r"__version__ = '([^']+)'", text)
    cuda = re.search(r"^cuda[^=]*= '(\d+)\.(\d+)'", text, re.MULTILINE)
    return TorchBuild(version[1] if version else "unknown", (int(cuda[1]), int(cuda[2])) if cuda else None)


def find_triton() -> TritonBuild | None:
    """Return the installed Triton, None if there is none; it is imported to see whether that works."""
    if importlib.util.find_spec("triton") is None:
        return None
    version = next(filter(None, map(_find_version, ("triton", "triton-windows", "pytorch-triton"))), "unknown")
    try:
        importlib.import_module("triton")
    except (ImportError, OSError) as error:
        return TritonBuild(version, first_line(error))
    return TritonBuild(version)


def find_bitsandbytes() -> Bitsandbytes | None:
    """Return the installed bitsandbytes, read from its files: importing it would take seconds."""
    spec = importlib.util.find_spec("bitsandbytes")
    if spec is None or spec.origin is None:
        return None
    files = Path(spec.origin).parent.glob("libbitsandbytes_*")
    libraries = sorted(file.stem for file in files if file.suffix in (".so", ".dll", ".dylib"))
    return Bitsandbytes(_find_version("bitsandbytes") or "unknown", tuple(libraries))


def find_compiler() -> str | None:
    """Return the C compiler that Triton would use: CC, else gcc, else clang (triton/runtime/build.py)."""
    configured = os.environ.get("CC")
    return shutil.which(configured) if configured is not None else shutil.which("gcc") or shutil.which("clang")


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type's name if it has no message."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _find_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


# The requirement of pyproject.toml.
TORCH = "torch>=2.10,<2.14"
# CUDA versions for which PyTorch's own index has wheels, newest first (pytorch.org/get-started/previous-versions).
_WHEELS = ((13, 0), (12, 8), (12, 6))
# The first CUDA whose wheels have no code for cards before RTX 20, and have some for RTX 50 (pytorch/pytorch#172352).
_MODERN = (12, 8)


def find_wheel(driver: Driver, capability: tuple[int, int] | None = None) -> tuple[int, int] | None:
    """Return the CUDA version of the newest torch wheels that this driver and card can run, None if there are none."""
    # Within a major version a driver also runs programs for a newer minor one (NVIDIA, minor version compatibility).
    wheels = [cuda for cuda in _WHEELS if cuda[0] <= driver.cuda[0]]
    if capability is not None and capability < FIRST_IN_TORCH_WHEELS:
        wheels = [cuda for cuda in wheels if cuda < _MODERN and capability >= (5, 0)]
    if capability is not None and capability >= (10, 0):
        wheels = [cuda for cuda in wheels if cuda >= _MODERN]
    return next((cuda for cuda in wheels if cuda <= driver.cuda), wheels[-1] if wheels else None)


def install_command(index: str, is_forced: bool = True) -> str:
    """Return the command that installs torch from PyTorch's own index; index: "cu130", "cpu", or "" for PyPI."""
    force = "--force-reinstall " if is_forced else ""
    return f'pip install {force}"{TORCH}"' + (f" --index-url https://download.pytorch.org/whl/{index}" if index else "")


def find_mismatch(
    driver: Driver | None, build: TorchBuild | None, capability: tuple[int, int] | None = None
) -> Mismatch | None:
    """Return why the installed torch cannot use this machine's NVIDIA card, None if it can or there is no card."""
    if driver is None or build is None:
        return None
    wheel = find_wheel(driver, capability)
    command = install_command(f"cu{wheel[0]}{wheel[1]}") if wheel else ""
    if build.cuda is None:
        return Mismatch(f"torch {build.version} is a CPU-only build", command, False)
    if build.cuda[0] > driver.cuda[0]:
        had, needed = (".".join(map(str, version)) for version in (driver.cuda, build.cuda))
        reason = f"its driver runs CUDA {had} at most and torch {build.version} needs {needed}"
        return Mismatch(reason, command, True)
    return None


UPDATE_DRIVER = "update the NVIDIA driver, since none of torch's builds runs on it"


def explain_mismatch(
    driver: Driver | None, build: TorchBuild | None, capability: tuple[int, int] | None = None
) -> str | None:
    """Return one sentence with the exact command if torch cannot use the NVIDIA card, None if it can."""
    mismatch = find_mismatch(driver, build, capability)
    if driver is None or mismatch is None:
        return None
    idle = mismatch.reason + ("" if mismatch.is_driver_old else ", so training would not use it")
    remedy = f"type: {mismatch.command}" if mismatch.command else UPDATE_DRIVER
    either = "update the driver, or " if mismatch.is_driver_old and mismatch.command else ""
    return f"{driver.card} is here, but {idle}; {either}{remedy}"


def machine_memory_bytes() -> int:
    """Return the size of the host's memory."""
    return int(psutil.virtual_memory().total)


def describe_machine() -> str:
    """Return the machine in a few words: system, processors, memory, card."""
    driver = find_driver()
    card = f", {driver.card}" if driver else ""
    processors = f"{psutil.cpu_count(logical=True)} processors"
    memory = show_bytes(machine_memory_bytes())
    return f"{platform.system()} {platform.machine()}, {processors}, {memory}{card}"


def detect() -> Detected:
    """Return the profile of this machine's training device: its first NVIDIA card, its Apple chip, or its processor."""
    card = find_card()
    if card is not None:
        return describe_card(card)
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return _describe_apple(_read_chip(), machine_memory_bytes())
    return describe_processor()


def describe_processor() -> Detected:
    """Return the processor's profile and how much of this machine's memory is free."""
    memory = psutil.virtual_memory()
    profile, _ = find_profile("cpu", memory.total)
    room = f"{show_bytes(memory.total)} of memory, {show_bytes(memory.available)} of it free"
    return Detected(profile, memory.available, f"No GPU here that PyTorch can train on; the processor has {room}.")


def describe_card(card: NvidiaCard) -> Detected:
    """Return the profile of a card in this machine: the catalogue's, or a generic one with what the driver reports."""
    room = f"{card.name} with {show_bytes(card.total_bytes)}, {show_bytes(card.free_bytes)} of it free."
    try:
        profile, note = find_profile(card.name, card.total_bytes)
    except ConfigError:
        profile = generic_profile(card.total_bytes, card.name, card.capability)
        note = "The catalogue does not know it, so its memory is known and its speed is not."
        if card.capability < FIRST_IN_TORCH_WHEELS:
            note = explain_too_old(card.capability)
    return Detected(profile, card.free_bytes, f"{room} {note}".strip())


def _describe_apple(chip: str, ram_bytes: int) -> Detected:
    room = f"{chip} with {show_bytes(ram_bytes)} of unified memory."
    try:
        return Detected(find_profile(chip, ram_bytes)[0], None, room)
    except ConfigError:
        # The properties that all Apple chips share are taken from the oldest; speeds and sizes are not known.
        unknown = dict.fromkeys(
            ("memory_range_bytes", "bandwidth_bytes_per_s", "watts", "theory_tflops", "tflops_source")
        ) | {"id": "generic", "name": chip, "memory_bytes": ram_bytes, "tflops": {}, "sources": ()}
        profile = load_profile("m1").model_copy(update=unknown)
        return Detected(profile, None, f"{room} The catalogue does not know it, so its speed is not known.")


def _read_chip() -> str:
    command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
