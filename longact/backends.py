"""What each op runs on here and why: the native build, Triton, or the PyTorch reference.

Each op's own file in `longact/kernels` holds its dispatch; this file holds what they share: the
native module, or the reason for its absence.
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from types import ModuleType

import torch

__all__ = ["DTYPE_CODES", "backends", "native", "native_error"]

#: Storage types of the native core (csrc/dtypes.h).
DTYPE_CODES: dict[torch.dtype, int] = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float64: 3,
}


def _why_not_native(error: ImportError) -> str:
    """What setup.py wrote down when it built, or the likeliest reason otherwise."""
    package = Path(__file__).parent
    try:
        failure: str | None = json.loads((package / "_build.json").read_text())["error"]
    except (OSError, ValueError, KeyError):
        failure = None
    if failure is not None:
        return failure
    if not any(package.glob("_native.*so")):
        return (
            f"no native module in {package}: install longact (pip install .), and do not run "
            "Python in its source folder unless it is an editable install (pip install -e .)"
        )
    return f"longact._native cannot be imported: {error}"


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        from longact import _native
    except ImportError as error:
        return None, _why_not_native(error)
    return _native, None


native: ModuleType | None
native_error: str | None
native, native_error = _load()


def backends() -> dict[str, dict[str, str]]:
    """What each op runs on here and why.

    Returns:
        `{op: {"cpu": ..., "cuda": ...}}`: for each device type the backend's name, followed by the
        reason wherever it is not the fastest one that the op has.
    """
    if native is not None:
        cpu = (
            f"native ({native.instruction_sets()[0]}, {'OpenMP' if native.openmp else '1 thread'})"
        )
    else:
        cpu = f"reference: {native_error}"
    cuda = f"reference: no CUDA kernels in longact {importlib.metadata.version('longact')}"
    if not torch.cuda.is_available():
        cuda += "; and torch finds no CUDA device"
    torch_ops = "torch (this op is made of torch's own kernels)"
    return {
        "masked_adamw_": {"cpu": cpu, "cuda": cuda},
        "channel_magnitude": {"cpu": cpu, "cuda": cuda},
        "topk_rows": {"cpu": torch_ops, "cuda": torch_ops},
        "row_grad": {"cpu": torch_ops, "cuda": torch_ops},
    }
