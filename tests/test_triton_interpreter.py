"""The tests that run Triton kernels, on the CPU: in Triton's interpreter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from triton_tools import KERNELS_RUN

TESTS = Path(__file__).parent
FILES = [
    "test_channel_magnitude_triton.py", "test_masked_adamw_triton.py", "test_projection_triton.py",
    "test_row_grad_triton.py", "test_topk_rows_triton.py", "test_triton_device.py",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(KERNELS_RUN, reason="the kernels run in this process")
def test_kernels_in_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-m", "", "-p", "no:cacheprovider", *FILES],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=TESTS,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    for file in FILES:
        assert len(re.findall(rf"{file}::.* PASSED", done.stdout)) >= 10, file


def test_every_file_with_kernels_is_run() -> None:
    runs = re.compile("^@runs_kernels", re.MULTILINE)
    found = [path.name for path in TESTS.glob("test_*.py") if runs.search(path.read_text())]
    assert sorted(found) == FILES
