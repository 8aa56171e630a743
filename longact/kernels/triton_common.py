# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
"""What the Triton kernels of several ops share.

Imports Triton: import this module only where it is used.
"""

from __future__ import annotations

import contextlib
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Whether the kernels run in Triton's interpreter, on the CPU (TRITON_INTERPRET=1, for tests).
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def to_fp32(value):
    """Exact. The interpreter's own conversion of bf16 is not (triton 4972)."""
    if _INTERPRETED and value.dtype == tl.bfloat16:
        bits = value.to(tl.uint16, bitcast=True).to(tl.uint32)
        return (bits << 16).to(tl.float32, bitcast=True)
    else:
        return value.to(tl.float32)


@triton.jit
def from_fp32(value, dtype: tl.constexpr):
    """Rounded to nearest even, which the interpreter's own conversion to bf16 is not."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        rounded = (bits.to(tl.uint64) + ((bits >> 16) & 1) + 0x7FFF) >> 16
        rounded = tl.where(is_nan, 0x7FC0, rounded).to(tl.uint16)
        return rounded.to(tl.bfloat16, bitcast=True)
    else:
        return value.to(dtype)


@triton.jit
def dot_operand(value):
    """As the matrix unit takes it; the interpreter multiplies bf16 wrongly."""
    if _INTERPRETED:
        return to_fp32(value)
    else:
        return value


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device."""
    if tensor.is_cpu:
        return contextlib.nullcontext()
    return torch.get_device_module(tensor.device).device(tensor.device)  # type: ignore[no-any-return]


@triton.jit
def _empty_kernel():
    pass


def try_launch(device: torch.device) -> None:
    """Raises what keeps Triton from compiling and launching a kernel there."""
    with on_device_of(torch.empty(0, device=device)):
        _empty_kernel[(1,)]()
