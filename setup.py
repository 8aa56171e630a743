"""Builds the native core with CMake; all metadata is in pyproject.toml.

LONGACT_CUDA=auto (default): CUDA kernels where nvcc is found, else CPU only; a build that fails
leaves an install that runs on the PyTorch reference paths and says why (`python -m longact`).
LONGACT_CUDA=0: CPU only. LONGACT_CUDA=1: CUDA kernels, or a failed install.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def cuda_plan(mode: str) -> tuple[bool, str]:
    """Whether to build the CUDA kernels, and the line that says so."""
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"LONGACT_CUDA={mode!r}: use auto, 0 or 1")
    if mode == "0":
        return False, "CPU-only build: LONGACT_CUDA=0"
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    search = [str(Path(home) / "bin")] if home else []
    nvcc = shutil.which("nvcc", path=os.pathsep.join([*search, os.environ.get("PATH", "")]))
    if nvcc is None:
        line = "nvcc not found on PATH or under CUDA_HOME"
    elif not list((ROOT / "csrc").glob("*.cu")):
        line = f"nvcc found ({nvcc}), but this version of longact has no CUDA kernels yet"
    else:
        return True, f"CUDA build with {nvcc}"
    if mode == "1":
        raise SystemExit(f"LONGACT_CUDA=1: {line}")
    return False, f"CPU-only build: {line}"


class CMakeBuild(build_ext):  # type: ignore[misc]
    """One CMake build for the one extension module."""

    def build_extension(self, ext: Extension) -> None:
        mode = os.environ.get("LONGACT_CUDA", "auto")
        cuda, line = cuda_plan(mode)
        print(f"longact: {line}", file=sys.stderr)
        package = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        package.mkdir(parents=True, exist_ok=True)
        error = None
        try:
            self.run_cmake(package, cuda)
        except (OSError, subprocess.CalledProcessError) as failure:
            if mode == "1":
                raise
            error = f"the native build failed when longact was installed: {failure}"
            print(f"longact: {error}; installing the PyTorch reference paths only", file=sys.stderr)
        # Read by longact/backends.py, which tells the user what was built and why.
        (package / "_build.json").write_text(json.dumps({"cuda": line, "error": error}) + "\n")

    def run_cmake(self, package: Path, cuda: bool) -> None:
        import pybind11

        build = Path(self.build_temp).resolve()
        configure = [
            "cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DLONGACT_CUDA={'ON' if cuda else 'OFF'}",
            f"-DCMAKE_INSTALL_PREFIX={package.parent}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
        ]  # fmt: skip
        subprocess.run([*configure, *os.environ.get("CMAKE_ARGS", "").split()], check=True)
        subprocess.run(["cmake", "--build", str(build), "--target", "install"], check=True)

    def get_outputs(self) -> list[str]:
        # The module may be missing (see above); the report is always there.
        outputs = [Path(p) for p in super().get_outputs()]
        found = [str(p) for p in outputs if p.exists()]
        return [*found, *(str(p.parent / "_build.json") for p in outputs)]


setup(
    ext_modules=[Extension("longact._native", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
