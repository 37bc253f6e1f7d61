"""What a CUDA compute capability can do, in one table; imports nothing of ours and no torch.

`dispatch` chooses backends and tiles by it; the catalogue of cards, `doctor` and the warnings of `fit` read it too.

    shared_bytes        the most shared memory that one block of a launch may use
    has_triton          Triton compiles our kernels
    has_triton_dot      Triton's `tl.dot` becomes tensor-core instructions: in Triton 3.7 and 3.9 not on 7.5
    has_half            tensor cores for fp16
    has_bf16            tensor cores for bf16; before 8.0 bf16 is about 8 times as slow as fp16
    has_int8            tensor cores for INT8 that our kernels reach
    has_e4m3            instructions that convert to E4M3 and back; Triton refuses the type before 8.9
    fp8                 how E4M3 is multiplied: "mxfp8" by block-scaled tensor cores, "tensor" by FP8 tensor cores,
                        "storage" as bytes that are decoded first
    has_flash           FlashAttention 2 runs

`fp8` is what `tools/compile_gate.py` has compiled: Triton turns `tl.dot_scaled` into the block-scaled instruction on
12.0; on 10.0 that is another instruction, which nobody has compiled here, so plain FP8 is taken.

Sources: CUDA C++ Programming Guide, technical specifications per compute capability (shared memory); PTX ISA, mma and
cvt (types); Dao 2023 (FlashAttention 2).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

ComputeCapability = tuple[int, int]
Fp8Path = Literal["mxfp8", "tensor", "storage"]

# The first capability that torch's wheels for CUDA 12.8 and newer hold code for (RTX 20).
# Source: torch 2.13, torch/cuda/__init__.py (PYTORCH_RELEASES_CODE_CC).
FIRST_IN_TORCH_WHEELS: ComputeCapability = (7, 5)
# The first that Triton compiles our kernels for.
FIRST_WITH_TRITON: ComputeCapability = (7, 5)
# The first whose tensor cores Triton's `tl.dot` reaches, and the first with bf16 and FlashAttention 2.
FIRST_WITH_TRITON_DOT: ComputeCapability = (8, 0)

_SHARED_BYTES = {
    (7, 0): 98_304,
    (7, 2): 98_304,
    (7, 5): 65_536,
    (8, 0): 166_912,
    (8, 6): 101_376,
    (8, 7): 166_912,
    (8, 9): 101_376,
    (9, 0): 232_448,
    (10, 0): 232_448,
    (10, 3): 232_448,
    (12, 0): 101_376,
    (12, 1): 101_376,
}


class Features(NamedTuple):
    """What cards of one compute capability can do; the fields are explained above."""

    shared_bytes: int
    has_triton: bool
    has_triton_dot: bool
    has_half: bool
    has_bf16: bool
    has_int8: bool
    has_e4m3: bool
    fp8: Fp8Path
    has_flash: bool


_features: dict[ComputeCapability, Features] = {}


def features_of(capability: ComputeCapability) -> Features:
    """Return what a compute capability, (major, minor), can do.

    One whose shared memory is not known, such as a card that is newer than this table, is taken to have the least of
    any card since 8.0.
    """
    known = _features.get(capability)
    if known is not None:
        return known
    has_dot = capability >= FIRST_WITH_TRITON_DOT
    has_e4m3 = capability >= (8, 9)
    least_bytes = 101_376 if has_dot else 65_536 if capability >= (7, 0) else 49_152
    features = _features[capability] = Features(
        shared_bytes=_SHARED_BYTES.get(capability, least_bytes),
        has_triton=capability >= FIRST_WITH_TRITON,
        has_triton_dot=has_dot,
        has_half=capability >= (7, 0),
        has_bf16=has_dot,
        has_int8=has_dot,
        has_e4m3=has_e4m3,
        fp8=("mxfp8" if capability[0] == 12 else "tensor") if has_e4m3 else "storage",
        has_flash=has_dot,
    )
    return features
