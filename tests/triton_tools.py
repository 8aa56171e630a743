"""What the tests of Triton kernels share: running them in Triton's interpreter or on a GPU, and
compiling them ahead of time for GPUs that are not here.

Interpreted kernels must be imported with TRITON_INTERPRET=1, and other tests import Triton without
it: where there is no GPU, the tests that run kernels (`@runs_kernels`) are collected only in a
process of their own, which test_triton_interpreter.py starts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
GPUTarget = pytest.importorskip("triton.backends.compiler").GPUTarget

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
KERNELS_RUN = INTERPRETED or torch.cuda.is_available()

# ---- running -------------------------------------------------------------------------------------


def runs_kernels(test: Callable[..., None]) -> Callable[..., None]:
    """For a test that launches kernels: it is collected only where they run."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        if not INTERPRETED:
            test(*args, **kwargs)
            return
        from triton.runtime import interpreter

        builder = interpreter.interpreter_builder
        # Compiled kernels do not check integers for overflow either.
        options = dataclasses.replace(builder.options, sanitize_overflow=False)
        with pytest.MonkeyPatch.context() as patch, patched_once(interpreter, patch):
            patch.setattr(builder, "options", options)
            patch.setattr(interpreter, "_get_np_dtype", by_name(interpreter._get_np_dtype))
            test(*args, **kwargs)

    run.__test__ = KERNELS_RUN  # type: ignore[attr-defined]
    return run


def by_name(np_dtype: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The interpreter builds a table of all dtypes to look one up: a tenth of its time."""
    known: dict[str, Any] = {}

    def of(dtype: Any) -> Any:
        if dtype.name not in known:
            known[dtype.name] = np_dtype(dtype)
        return known[dtype.name]

    return of


@contextlib.contextmanager
def patched_once(interpreter: Any, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """The interpreter replaces triton.language's functions by its own at each call of each device
    function, which is half of its time: here it does so once for each module that has such calls.
    """
    patch_lang = interpreter._patch_lang
    scopes: dict[int, Any] = {}

    def patch_first(fn: Any) -> object:
        if id(fn.__globals__) not in scopes:
            scopes[id(fn.__globals__)] = patch_lang(fn)
        return SimpleNamespace(restore=lambda: None)

    patch.setattr(interpreter, "_patch_lang", patch_first)
    try:
        yield
    finally:
        for scope in reversed(scopes.values()):
            if scope is not None:  # Triton 3.4 restores nothing
                scope.restore()


@contextlib.contextmanager
def no_reads_by_the_host() -> Iterator[None]:
    """Fails where the host looks at a tensor's values, and so would wait for the device."""

    def refuse(*_: object) -> None:
        raise AssertionError("read by the host")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("item", "tolist", "__float__", "__int__", "__bool__", "__index__", "nonzero"):
            patch.setattr(torch.Tensor, name, refuse)
        yield


# ---- compiled for GPUs that are not here ---------------------------------------------------------


def compiled(test: Callable[..., None]) -> Callable[..., None]:
    """For a test that compiles kernels."""
    skip = pytest.mark.skipif(INTERPRETED, reason="compiled where the kernels are not interpreted")
    return pytest.mark.slow(skip(test))  # type: ignore[no-any-return]


NVIDIA = [GPUTarget("cuda", arch, 32) for arch in (80, 90, 100)]
AMD = GPUTarget("hip", "gfx942", 64)
#: Shared memory that one block may have, in bytes (CUDA C++ programming guide, table 30).
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


def target_id(target: Any) -> str:
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def compile_kernel(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    target: Any,
    folder: Path,
    *,
    aligned: tuple[str, ...] | None = None,
    **options: Any,
) -> Any:
    """Compiles ahead of time; what another test of this session has compiled, only once.

    Args:
        folder: pytest's `tmp_path`.
        types: of the arguments that are not constants, as Triton writes them: `"*bf16"`, `"i32"`,
            `"tensordesc<bf16[128, 64]>"`.
        aligned: arguments that are multiples of 16; None: every pointer.
        options: num_warps, num_stages, ...
    """
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    if aligned is None:
        aligned = tuple(name for name in names if signature[name][0] == "*")
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = triton.compiler.ASTSource(kernel, signature, values, attributes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder.parent / "triton"))
        # Nothing here reads the numbers of lines, which are a fifth of the time.
        patch.setenv("TRITON_DISABLE_LINE_INFO", "1")
        return triton.compile(source, target=target, options=options)


def cuobjdump(option: str, kernel: Any, folder: Path) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton comes without cuobjdump")
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    return subprocess.run([tool, option, cubin], check=True, capture_output=True, text=True).stdout


def registers(kernel: Any, folder: Path) -> int:
    usage = cuobjdump("-res-usage", kernel, folder)
    return int(re.findall(r"REG:(\d+)", usage)[0])


def assert_no_spills(kernel: Any, folder: Path) -> None:
    usage = cuobjdump("-res-usage", kernel, folder)
    assert re.search(r"STACK:0\b", usage), usage
    assert re.search(r"LOCAL:0\b", usage), usage
