"""Compiles every Triton kernel for every kind of card, without a card.

python tools/compile_gate.py [--write]

Every launch that an op makes for the shapes and tiles below, and that the presets' steps make, is compiled for compute
capability 7.5, 8.6, 8.9, 9.0 and 12.0.  It fails on a type that a card refuses, on more shared memory than one of its
blocks may use, on registers spilt to memory, and where a promised tensor-core instruction is missing.  --write puts the
table into kernels/README.md.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # read when Triton is imported
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import triton
from lowvram_kernels.dispatch import Card, Launch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CAPABILITIES = ((7, 5), (8, 6), (8, 9), (9, 0), (12, 0))
# What the PTX of each promised product must hold.
INSTRUCTIONS = {
    "f16": r"(mma\.sync|wgmma\.mma_async)\S*\.f16\.f16",
    "bf16": r"(mma\.sync|wgmma\.mma_async)\S*\.bf16\.bf16",
    "e4m3": r"(mma\.sync|wgmma\.mma_async)\S*\.e4m3\.e4m3",
    "mxf8": r"mma\.sync\S*kind::mxf8f6f4\S*block_scale",
    "s8": r"(mma\.sync|wgmma\.mma_async)\S*\.s8\.s8",
}


class Compiled(NamedTuple):
    """What one launch became on one card."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    instruction: str


def source_of(what: Launch) -> ASTSource:
    """Return the kernel as Triton specialises it for these arguments: types, divisibility by 16, ones as constants."""
    kernel = getattr(importlib.import_module(f"lowvram_kernels.{what.module}"), what.kernel)
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    values = [*what.arguments, *(what.constants[name] for name in kernel.arg_names[len(what.arguments) :])]
    for index, (name, value) in enumerate(zip(kernel.arg_names, values, strict=True)):
        is_constant = index >= len(what.arguments) or value is None or (type(value) is int and value == 1)
        if is_constant:
            signature[name], constants[(index,)] = "constexpr", value
            continue
        signature[name] = _type_of(value)
        place = value.storage_offset() * value.element_size() if isinstance(value, Tensor) else value
        if type(place) is int and place % 16 == 0:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + triton.runtime.jit.type_canonicalisation_dict[str(value.dtype).removeprefix("torch.")]
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def compile_launch(what: Launch, card: Card) -> Compiled:
    """Compile a launch for a card; raises triton's errors where the card refuses it."""
    assert card.capability is not None
    target = GPUTarget("cuda", card.capability[0] * 10 + card.capability[1], 32)
    options = {"num_warps": what.warps, "num_stages": what.stages}
    found = triton.compile(source_of(what), target=target, options=options)
    pattern = INSTRUCTIONS.get(what.promise)
    match = re.search(pattern, found.asm["ptx"]) if pattern else None
    return Compiled(*_resources(found.asm["cubin"]), found.metadata.shared, match[0] if match else "")


def _resources(cubin: bytes) -> tuple[int, int]:
    """Return registers of a thread and bytes of its stack, which is where spilt registers go."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert numbers is not None, text
    return int(numbers[1]), int(numbers[2])


def judge(what: Launch, card: Card, found: Compiled) -> list[str]:
    """Return what is wrong with a compiled launch."""
    wrong = []
    if found.shared_bytes > card.shared_bytes:
        wrong.append(f"{found.shared_bytes} bytes of shared memory; the card has {card.shared_bytes}")
    if found.stack_bytes:
        wrong.append(f"{found.stack_bytes} bytes of stack: registers spill")
    if what.promise and not found.instruction:
        wrong.append(f"no tensor-core instruction for {what.promise}")
    return wrong


def main() -> None:
    """Compile everything and print the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()


if __name__ == "__main__":
    main()
