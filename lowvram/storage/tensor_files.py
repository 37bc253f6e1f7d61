"""Tensors in a safetensors file: written until they are on the drive, and mapped one by one; nothing is unpickled."""

from __future__ import annotations

import errno
import os
import re
import sys
from pathlib import Path

import safetensors
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lowvram.errors import CheckpointError
from lowvram.storage.disk import DISK, Disk


def size_of_tensors(*tensors: dict[str, Tensor]) -> int:
    """Return the bytes of all tensors."""
    return sum(tensor.numel() * tensor.element_size() for each in tensors for tensor in each.values())


class MappedTensors:
    """The tensors of a safetensors file, each memory-mapped when it is read: bytes that nobody uses take no memory.

    A tensor is a private mapping of the file: changing it changes no file, and it stays valid when the file is deleted.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file = safe_open(path, framework="pt", device="cpu")
        except safetensors.SafetensorError as error:
            raise CheckpointError(f"{path} is not a safetensors file.", f"safetensors says: {error}.") from error

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, from the file's header alone."""
        return tuple(self._file.get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def read_all(self) -> dict[str, Tensor]:
        """Return every tensor by name."""
        return {name: self.read(name) for name in self.names()}


def write_tensors(
    path: Path, tensors: dict[str, Tensor], disk: Disk = DISK, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file and return when it is on the drive.  metadata: strings for the file's header."""
    contiguous = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}

    def save(target: Path) -> None:
        try:
            save_file(contiguous, target, metadata)
        except safetensors.SafetensorError as error:
            # safetensors reports a full disk as an error of its own; it is raised as the system's error instead.
            raise OSError(*_errno_of(error), str(target)) from error
        target.chmod(0o644)

    disk.write_with(path, save)


def _errno_of(error: Exception) -> tuple[int, str]:
    """Return number and text of the system's error that a safetensors error contains."""
    text = str(error)
    match = re.search(r"os error ([0-9]+)", text)
    if "No space left" in text or "os error 112" in text:  # 112: Windows' number
        return errno.ENOSPC, os.strerror(errno.ENOSPC)
    if match and sys.platform != "win32":
        return int(match[1]), os.strerror(int(match[1]))
    return errno.EIO, text
