"""Builds of the native core for tests: with sanitizers, with the CUDA kernels on the CPU."""

from __future__ import annotations

import importlib.util
import itertools
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent

_count = itertools.count()

#: Why no build is possible here, or None.
WHY_NO_BUILD: str | None = None
if not (ROOT / "csrc").is_dir():
    WHY_NO_BUILD = "needs the sources"
elif shutil.which("g++") is None or sys.platform != "linux":
    WHY_NO_BUILD = "needs GCC on Linux"


def build(folder: Path, **options: str) -> Path:
    """Builds with these CMake options, the CUDA kernels among it: compiled for the CPU."""
    build_target(folder, "all", **options)
    (module,) = folder.glob("_native*.so")
    return module


def build_target(folder: Path, target: str, **options: str) -> None:
    """Builds a part: "all", or a file in `folder`."""
    import pybind11

    options = {
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "CMAKE_CXX_COMPILER": "g++",
        "LONGACT_WERROR": "ON",
        # Quick to build; the loops give the same bits.
        "CMAKE_BUILD_TYPE": "Debug",
        "CMAKE_CXX_FLAGS_DEBUG": "-O1",
        "LONGACT_CUDA": "ON",
        "LONGACT_CUDA_ON_HOST": str(ROOT / "tests" / "cuda_on_host"),
        **options,
    }
    configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(folder)]
    for command in (
        [*configure, *(f"-D{k}={v}" for k, v in options.items())],
        ["cmake", "--build", str(folder), "--target", target],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]


def load(path: Path) -> ModuleType:
    """A build as a module of its own, beside the installed one."""
    # A name of its own: pybind11 gives out what it has made under the same one.
    name = f"{path.parent.name}_{next(_count)}._native"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
