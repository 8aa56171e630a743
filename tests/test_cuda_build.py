"""The CUDA kernels as nvcc builds them: every architecture, their resources and machine code.

No GPU is needed. What the kernels compute is tested in test_masked_adamw.py, on the CPU.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from native_builds import WHY_NO_BUILD, build, build_target, load

NVCC = shutil.which("nvcc")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(WHY_NO_BUILD is not None, reason=WHY_NO_BUILD or ""),
    pytest.mark.skipif(NVCC is None, reason="needs nvcc"),
]


def _cuobjdump() -> str:
    """Triton's package carries one."""
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if path.is_file():
            return str(path)
    found = shutil.which("cuobjdump")
    if found is None:
        pytest.skip("needs cuobjdump, which Triton for NVIDIA carries")
    return found


#: As it is installed, but for the host's code.
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "CMAKE_CXX_FLAGS_RELEASE": "-O0",
    "CMAKE_CUDA_COMPILER": str(NVCC),
    "LONGACT_CUDA_ON_HOST": "",
}


@pytest.fixture(scope="module")
def module_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Warnings are errors there, those of ptxas about spills among them.
    return build(tmp_path_factory.mktemp("cuda"), **OPTIONS)


@pytest.fixture(scope="module")
def module(module_path: Path) -> ModuleType:
    return load(module_path)


class Kernel(NamedTuple):
    arch: str
    text: str


def dump(path: Path, what: str) -> list[Kernel]:
    """What cuobjdump says of each architecture's machine code."""
    out = subprocess.run(
        [_cuobjdump(), what, str(path)], check=True, capture_output=True, text=True
    ).stdout
    parts = re.split(r"Fatbin elf code:\n=+\n", out)[1:]
    return [Kernel(re.search(r"arch = (\w+)", part)[1], part) for part in parts]  # type: ignore[index]


@pytest.fixture(scope="module")
def code(module_path: Path) -> dict[str, list[str]]:
    """The instructions of each architecture, in order."""
    return {
        kernel.arch: re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(.*?) *;", kernel.text)
        for kernel in dump(module_path, "-sass")
    }


def newest_toolkit() -> bool:
    version = subprocess.run([str(NVCC), "--version"], check=True, capture_output=True, text=True)
    found = re.search(r"release (\d+)\.(\d+)", version.stdout)
    assert found is not None
    return (int(found[1]), int(found[2])) >= (12, 8)


ARCHS = ["sm_80", "sm_86", "sm_89", "sm_90"]


def test_every_architecture_is_in_it_and_ptx_for_later_ones(module_path: Path) -> None:
    archs = [*ARCHS, "sm_100", "sm_120"] if newest_toolkit() else ARCHS
    assert sorted(k.arch for k in dump(module_path, "-res-usage")) == sorted(archs)
    ptx = subprocess.run(
        [_cuobjdump(), "-lptx", str(module_path)], check=True, capture_output=True, text=True
    ).stdout
    assert f".{archs[-1]}.ptx" in ptx
    assert ".sm_90.ptx" in ptx


def test_no_spills_and_half_of_the_threads_at_least(module_path: Path) -> None:
    """65,536 registers for 1,024 threads of at most 2,048."""
    for kernel in dump(module_path, "-res-usage"):
        assert "masked_adamw" in kernel.text
        usage = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", kernel.text))
        assert int(usage["REG"]) <= 64, kernel
        assert int(usage["STACK"]) == int(usage["LOCAL"]) == 0, kernel
        assert int(usage["SHARED"]) <= 8192, kernel


def test_accesses_are_of_16_bytes_and_in_flight_together(code: dict[str, list[str]]) -> None:
    """Two loops: vectors of 8 where all buffers are of 16 bits, else vectors of 4."""
    assert code
    for arch, instructions in code.items():

        def where(pattern: str, text: list[str] = instructions) -> list[int]:
            return [i for i, line in enumerate(text) if re.search(pattern, line)]

        # p, g, m, v and vmax in each loop; written: p, m, v and vmax, and in one the master.
        loads, stores = where(r"LDG\.E\S*\.128 "), where(r"STG\.E\S*\.128 ")
        assert len(loads) == 10, arch
        assert len(stores) == 9, arch
        # The same in 16 bits for the vectors of 4.
        assert len(where(r"LDG\.E\.EF\S*\.64 ")) == 5, arch
        assert len(where(r"STG\.E\.EF\S*\.64 ")) == 4, arch
        # Which of the loops comes first is the compiler's to say.
        for loop in (loads[:5], loads[5:]):
            first_use = next(i for i in where(r"\bFMUL\b") if i > loop[0])
            assert loop[3] < first_use < loop[4], f"{arch}: p, g, m, v are not loaded together"
        # A block has read its step before it counts itself.
        fence, count = where(r"\bMEMBAR\b"), where(r"\bATOMG\b.*\bADD\b|\bATOMG\.E\.ADD")
        assert len(fence) == len(count) == 1, arch
        assert fence[0] < count[0], arch
        assert len(where(r"\bBAR\.SYNC")) == 2, arch
        # Streaming: one step's data does not push out what other kernels keep in the cache.
        assert all(".EF" in instructions[i] for i in (*loads, *stores)), arch


def test_arithmetic_is_not_fused(code: dict[str, list[str]]) -> None:
    """Multiply-add in one rounding would differ from the CPU path; division's own steps use it."""
    for arch, instructions in code.items():
        # 8 elements by 3 products and sums each in the moments alone.
        assert sum(bool(re.search(r"\bFADD", text)) for text in instructions) >= 24, arch


def test_it_loads_and_says_why_it_cannot_run(module: ModuleType) -> None:
    assert module.cuda.startswith("CUDA ")
    assert all(arch in module.cuda for arch in ARCHS)
    if torch.cuda.is_available():
        assert module.cuda_unusable(0) == ""
        assert "invalid device" in module.cuda_unusable(10_000)
        return
    assert re.search("driver|no CUDA device", module.cuda_unusable(0))
    table = module.AdamWTable()
    table.pack([], [])
    with pytest.raises(
        RuntimeError, match=r"CUDA kernel cannot run on device 0: .*(driver|device)"
    ):
        table.launch(0, 0, 0, 0, 0, 0)


def test_chosen_architectures(tmp_path: Path) -> None:
    """In the kernels and in the names, which the rest of the module says as it is told."""
    kernels = "CMakeFiles/_native.dir/csrc/masked_adamw.cu.o"
    build_target(tmp_path, kernels, LONGACT_CUDA_ARCHS="86, 90", **OPTIONS)
    assert sorted(k.arch for k in dump(tmp_path / kernels, "-res-usage")) == ["sm_86", "sm_90"]
    assert b" sm_86 sm_90" in (tmp_path / kernels).read_bytes()
