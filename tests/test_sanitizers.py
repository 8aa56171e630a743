"""The kernel tests again, on a build of the native core under AddressSanitizer and UBSan."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from native_builds import ROOT, WHY_NO_BUILD, build

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "LONGACT_TEST_NATIVE" in os.environ, reason="already running on a sanitizer build"
    ),
    pytest.mark.skipif(WHY_NO_BUILD is not None, reason=WHY_NO_BUILD or ""),
]


def runtime(name: str) -> str:
    """The sanitizer's library, which must be loaded before the uninstrumented Python."""
    return subprocess.run(
        ["gcc", f"-print-file-name={name}"], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture(scope="module")
def sanitized_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(
        tmp_path_factory.mktemp("sanitized"),
        LONGACT_SANITIZE="address,undefined",
        CMAKE_CXX_FLAGS="-DLONGACT_BLOCK_THREADS=64",
        # Half as long to build as with -O1, and no slower to test: most of that is Python.
        CMAKE_CXX_FLAGS_DEBUG="-O0 -g1",
    )


def run(module: Path, *args: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {
        "LONGACT_TEST_NATIVE": str(module),
        "LD_PRELOAD": f"{runtime('libasan.so')}:{runtime('libubsan.so')}",
        # Python and torch keep what they allocate until the end.
        "ASAN_OPTIONS": "detect_leaks=0",
        # The installed package, not the source folder that the tests run in.
        "PYTHONSAFEPATH": "1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    return subprocess.run(
        [sys.executable, *args], env=env, cwd=ROOT, capture_output=True, text=True, check=False
    )


#: Tests that run no native code, or none that the others do not run over other values.
LEFT_OUT = [
    "compile",
    "topk",
    "select_rows",
    "opcheck",
    "has_the_bits",
    # Chunks, threads and instruction sets are the same for bf16 (dtype1) as for other types.
    "test_instruction_sets_and_threads and not dtype1",
    "test_tensors_of_many_chunks and not dtype1",
    "test_rows_that_change_between_steps and not dtype1",
]


def test_kernel_tests_pass_under_sanitizers(sanitized_build: Path) -> None:
    done = run(
        sanitized_build, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
        "tests/test_masked_adamw.py", "tests/test_cuda_kernel.py",
        "tests/test_native_corners.py", "tests/test_ops.py",
        "-m", "not slow", "-k", " and ".join(f"not ({tests})" for tests in LEFT_OUT),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]


OUT_OF_BOUNDS = """
import os, importlib.util, array
spec = importlib.util.spec_from_file_location("longact._native", os.environ["LONGACT_TEST_NATIVE"])
native = importlib.util.module_from_spec(spec); spec.loader.exec_module(native)
# Large enough to come from malloc, not from Python's own pools.
floats = [array.array("f", [0.0] * 5 * 64) for _ in range(4)]
step, ages, rows = array.array("f", [0.0]), array.array("i", [0] * 6), array.array("i", [5])
p, g, m, v = (a.buffer_info()[0] for a in floats)
table = native.AdamWTable(); table.resize(1)
table.set(0, p, 0, m, v, 0, step.buffer_info()[0], ages.buffer_info()[0], rows.buffer_info()[0], 0,
          1, 6, 64, 0, 0, 0, 0, 0, False)
groups = [(1e-3, 0, 0.9, 0.999, 1e-8, 0.0, False, False, False, 0)]
"""
ON_CPU = "table.update([g], groups, 1.0, 1)"
ON_CUDA = """
image = array.array("b", [0] * table.pack([g], groups)); done = array.array("i", [0])
table.write(image.buffer_info()[0], len(image))
table.launch(image.buffer_info()[0], done.buffer_info()[0], 0, 0, 0, 0)
"""


@pytest.mark.parametrize("call", [ON_CPU, ON_CUDA], ids=["cpu", "cuda"])
def test_sanitizers_see_an_out_of_bounds_row(sanitized_build: Path, call: str) -> None:
    """The harness itself: were this not reported, the test above would be blind."""
    done = run(sanitized_build, "-c", OUT_OF_BOUNDS + call)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
