"""What each op runs on here and why: the native build, Triton, or the PyTorch reference.

Each op's own file in `longact/kernels` holds its dispatch; this file holds what they share: the
native module, or the reason for its absence.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import warnings
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.compiler import is_compiling

__all__ = [
    "DTYPE_CODES",
    "adamw_backend",
    "backends",
    "cuda_capability",
    "is_capturing",
    "is_plain",
    "native",
    "native_error",
    "runs_triton",
    "triton_error",
]

#: Storage types of the native core (csrc/dtypes.h).
DTYPE_CODES: dict[torch.dtype, int] = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float64: 3,
}


def _build_report(key: str) -> str | None:
    """What setup.py wrote down when it built."""
    try:
        report: dict[str, str | None] = json.loads(
            (Path(__file__).parent / "_build.json").read_text()
        )
        return report[key]
    except (OSError, ValueError, KeyError):
        return None


def _why_not_native(error: ImportError) -> str:
    """What setup.py wrote down when it built, or the likeliest reason otherwise."""
    package = Path(__file__).parent
    failure = _build_report("error")
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


def _on_cpu() -> tuple[str, str]:
    if native is None:
        return "reference", native_error or ""
    return "native", f"{native.instruction_sets()[0]}, {'OpenMP' if native.openmp else '1 thread'}"


_ON_CPU = _on_cpu()


def _why_not_native_cuda(index: int) -> str | None:
    if native is None:
        return native_error
    if native.cuda is None:
        return f"built without CUDA ({_build_report('cuda') or 'no report of the build'})"
    if torch.version.hip is not None:
        return "this torch is for ROCm"
    if not torch.cuda.is_available():
        reason: str = native.cuda_unusable(index)
    else:
        with torch.cuda.device(index):  # the native core sets the device, in a runtime of its own
            reason = native.cuda_unusable(index)
    return reason or None


def is_capturing() -> bool:
    """Whether the current CUDA stream records a graph: what runs now runs at each replay."""
    initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return initialized and torch.cuda.is_current_stream_capturing()


_TRITON_DEVICES = ("cuda", "xpu")  # ROCm is "cuda" to torch
_has_triton = importlib.util.find_spec("triton") is not None


def is_plain(*tensors: Tensor) -> bool:
    """Whether kernels may read their memory, which tensors under function transforms, DTensors,
    fake tensors and other wrappers do not have."""
    for t in tensors:
        kind = type(t)
        if kind is not Tensor and kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
            return False
    if is_compiling():
        return True
    if torch._C._are_functorch_transforms_active():
        return False
    # A generator more is much where a matmul has just emptied the cache.
    for t in tensors:  # noqa: SIM110
        if torch._C._functorch.is_legacy_batchedtensor(t):
            return False
    return True


_triton_errors: dict[torch.device, str | None] = {}


def triton_error(device: torch.device) -> str | None:
    """Why Triton kernels do not run there: no Triton, no compiler for its launcher, an old GPU."""
    if device in _triton_errors or is_capturing():  # a trial has no place in a graph
        return _triton_errors.get(device)
    error = None if _has_triton else "Triton is not installed"
    if error is None:
        try:
            from longact.kernels import triton_common

            triton_common.try_launch(device)
        except Exception as reason:  # whatever it is, torch's own ops do the work
            error = f"Triton does not run on {device}: {type(reason).__name__}: {reason}"
            error = error.splitlines()[0]
            warnings.warn(f"{error}; longact uses torch's own ops, which are slower", stacklevel=4)
    _triton_errors[device] = error
    return error


def runs_triton(*tensors: Tensor) -> bool:
    """Whether Triton kernels can be launched on them."""
    if tensors[0].is_cpu and "cpu" not in _TRITON_DEVICES:  # in fewer operations than below
        return False
    device = tensors[0].device
    return (
        device.type in _TRITON_DEVICES
        and is_plain(*tensors)
        # Compiled code calls ops, which ask again when they run.
        and (is_compiling() or triton_error(device) is None)
    )


@functools.lru_cache
def cuda_capability(device: torch.device) -> tuple[int, int] | None:
    """Of an NVIDIA GPU; None for others."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


_native_devices: set[torch.device] = set()


def adamw_backend(device: torch.device) -> tuple[str, str]:
    """What `masked_adamw_` runs on there: "native", "triton" or "reference"; and why, or what."""
    if device.type == "cpu":
        return _ON_CPU
    why = None
    if device.type == "cuda":
        # A failure is looked at anew: it may pass, as a lack of memory does.
        if device not in _native_devices:
            why = _why_not_native_cuda(device.index or 0)
        if why is None:
            assert native is not None
            _native_devices.add(device)
            return "native", native.cuda
    if device.type in _TRITON_DEVICES:
        if _has_triton:
            return "triton", why or f"no native kernels for {device.type}"
        return "reference", f"{why}; and Triton is not installed"
    return "reference", f"no kernels for {device.type}"


def backends() -> dict[str, dict[str, str]]:
    """What each op runs on here and why.

    Returns:
        `{op: {"cpu": ..., "cuda": ...}}`: for each device type the backend's name, followed by what
        it uses, or by the reason wherever it is not the fastest one that the op has.
    """

    def text(backend: tuple[str, str]) -> str:
        name, detail = backend
        return f"{name} ({detail})" if name == "native" else f"{name}: {detail}"

    cpu, cuda = (text(adamw_backend(torch.device(kind))) for kind in ("cpu", "cuda"))
    torch_ops = "torch (this op is made of torch's own kernels)"
    triton = "triton" if _has_triton else "reference: Triton is not installed"
    if not torch.cuda.is_available():
        no_device = "; torch finds no CUDA device"
        cuda, triton = cuda + no_device, triton + no_device
    elif error := triton_error(torch.device("cuda", torch.cuda.current_device())):
        triton = f"reference: {error}"
    return {
        "masked_adamw_": {"cpu": cpu, "cuda": cuda},
        "channel_magnitude": {"cpu": cpu, "cuda": triton},
        "topk_rows": {"cpu": torch_ops, "cuda": triton},
        "row_grad": {"cpu": torch_ops, "cuda": triton},
    }
