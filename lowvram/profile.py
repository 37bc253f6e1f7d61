"""WHERE it runs: what this machine has, and whether its torch can use it; never imports torch."""

from __future__ import annotations

import importlib.util
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import psutil

from lowvram.units import show_bytes


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


def find_driver() -> Driver | None:
    """Return the NVIDIA driver of this machine, or None where there is none."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        number = pynvml.nvmlSystemGetCudaDriverVersion_v2()
        name = pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0))
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()
    return Driver(name if isinstance(name, str) else name.decode(), (number // 1000, number % 1000 // 10))


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
