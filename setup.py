"""Builds the native core with CMake; all metadata is in pyproject.toml.

LONGACT_CUDA=auto (default): CUDA kernels where nvcc is found (no GPU is needed), else CPU only; a
build that fails leaves an install that runs without what failed and says why (`python -m longact`).
LONGACT_CUDA=0: CPU only. LONGACT_CUDA=1: CUDA kernels, or a failed install.
LONGACT_CUDA_ARCHS="90" or "80;90": GPU architectures to build for, in place of every common one.
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


def cuda_plan(mode: str) -> tuple[str | None, str]:
    """The nvcc to build the CUDA kernels with, or None, and the line that says so."""
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"LONGACT_CUDA={mode!r}: use auto, 0 or 1")
    if mode == "0":
        return None, "CPU-only build: LONGACT_CUDA=0"
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    search = [str(Path(home) / "bin")] if home else []
    nvcc = shutil.which("nvcc", path=os.pathsep.join([*search, os.environ.get("PATH", "")]))
    if nvcc is not None:
        nvcc = os.path.abspath(nvcc)
        return nvcc, f"CUDA build with {nvcc}"
    line = "nvcc not found on PATH or under CUDA_HOME"
    if mode == "1":
        raise SystemExit(f"LONGACT_CUDA=1: {line}")
    return None, f"CPU-only build: {line}"


class CMakeBuild(build_ext):  # type: ignore[misc]
    """One CMake build for the one extension module."""

    def build_extension(self, ext: Extension) -> None:
        mode = os.environ.get("LONGACT_CUDA", "auto")
        nvcc, line = cuda_plan(mode)
        print(f"longact: {line}", file=sys.stderr)
        package = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        package.mkdir(parents=True, exist_ok=True)
        error = None
        try:
            try:
                self.run_cmake(package, nvcc)
            except (OSError, subprocess.CalledProcessError) as failure:
                if mode == "1" or nvcc is None:
                    raise
                line = f"CPU-only build: the {line} failed: {failure}"
                print(f"longact: {line}", file=sys.stderr)
                self.run_cmake(package, None)
        except (OSError, subprocess.CalledProcessError) as failure:
            if mode == "1":
                raise
            error = f"the native build failed when longact was installed: {failure}"
            print(f"longact: {error}; installing without it", file=sys.stderr)
        # Read by longact/backends.py, which tells the user what was built and why.
        report = json.dumps({"cuda": line, "error": error}) + "\n"
        (package / "_build.json").write_text(report)
        if self.editable_mode:  # setuptools copies the module alone into the source folder
            (ROOT / "longact" / "_build.json").write_text(report)

    def run_cmake(self, package: Path, nvcc: str | None) -> None:
        import pybind11

        # A folder for each: CMake does not change a compiler that it has configured.
        build = Path(self.build_temp).resolve() / ("cpu" if nvcc is None else "cuda")
        configure = [
            "cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DLONGACT_CUDA={'OFF' if nvcc is None else 'ON'}",
            *([] if nvcc is None else [f"-DCMAKE_CUDA_COMPILER={nvcc}"]),
            f"-DLONGACT_CUDA_ARCHS={os.environ.get('LONGACT_CUDA_ARCHS', '')}",
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
