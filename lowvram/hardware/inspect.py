"""Everything that a check-up of this machine asks, gathered in one place; never imports torch."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from lowvram.hardware.detect import (
    Bitsandbytes,
    Driver,
    NvidiaCard,
    TorchBuild,
    TritonBuild,
    find_bitsandbytes,
    find_card,
    find_compiler,
    find_driver,
    find_torch,
    find_triton,
)


class TorchSays(NamedTuple):
    """What torch says once it is imported.

    problem: why it does not import.  device: the best that it finds here.  card_problem: why its CUDA card does not
    start.  capability: that card's.  architectures: what it has code for, as "sm_86" or "compute_120".  has_metal: it
    was built for Apple's GPUs.
    """

    problem: str = ""
    device: Literal["cuda", "mps", "cpu"] = "cpu"
    card_problem: str = ""
    capability: tuple[int, int] | None = None
    architectures: tuple[str, ...] = ()
    has_metal: bool = False


@dataclass(frozen=True)
class Facts:
    """Everything that a check asks.

    system_version: macOS's, empty elsewhere.  is_translated: Python is an Intel build on an Apple chip.
    torch_wants: the packages that the installed torch asks for.  compiler: what Triton would call, None where there is
    none.  compiler_asked: the environment's CC.  visible_cards: the environment's CUDA_VISIBLE_DEVICES.
    """

    says: TorchSays
    system: str = "Linux"
    system_version: tuple[int, ...] = ()
    processor: str = "x86_64"
    is_translated: bool = False
    python: str = "3.11.0"
    driver: Driver | None = None
    card: NvidiaCard | None = None
    build: TorchBuild | None = None
    torch_wants: tuple[str, ...] = ()
    triton: TritonBuild | None = None
    bitsandbytes: Bitsandbytes | None = None
    compiler: str | None = None
    compiler_asked: str | None = None
    has_headers: bool = True
    visible_cards: str | None = None
    free_disk_bytes: int = 1 << 40

    @property
    def capability(self) -> tuple[int, int] | None:
        """The first card's, by torch where it sees one, else by the driver."""
        return self.says.capability or (self.card.capability if self.card else None)

    @property
    def has_cuda(self) -> bool:
        """Say whether torch can use an NVIDIA card; AMD's have torch's same name and other rules."""
        return self.says.device == "cuda" and self.build is not None and self.build.cuda is not None


def gather(says: TorchSays) -> Facts:
    """Gather the facts of this machine and of the current folder."""
    system, processor = platform.system(), platform.machine()
    return Facts(
        says=says,
        system=system,
        system_version=tuple(map(int, re.findall(r"\d+", platform.mac_ver()[0]))),
        processor=processor,
        is_translated=system == "Darwin" and processor == "x86_64" and _is_translated(),
        python=platform.python_version(),
        driver=find_driver(),
        card=find_card(),
        build=find_torch(),
        torch_wants=_find_wants(),
        triton=find_triton(),
        bitsandbytes=find_bitsandbytes(),
        compiler=find_compiler(),
        compiler_asked=os.environ.get("CC"),
        has_headers=(_find_headers() / "Python.h").is_file(),
        visible_cards=os.environ.get("CUDA_VISIBLE_DEVICES"),
        free_disk_bytes=shutil.disk_usage(Path.cwd()).free,
    )


def _is_translated() -> bool:
    command = ["/usr/sbin/sysctl", "-in", "sysctl.proc_translated"]
    return subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip() == "1"


def _find_wants() -> tuple[str, ...]:
    try:
        return tuple(importlib.metadata.requires("torch") or ())
    except importlib.metadata.PackageNotFoundError:
        return ()


def _find_headers() -> Path:
    """Return where Triton looks for Python's headers (triton/runtime/build.py)."""
    scheme = sysconfig.get_default_scheme()
    return Path(sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme))
