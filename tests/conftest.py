"""Fixtures and switches that all tests share."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from types import ModuleType

import pytest

# A build of the native core to test in place of the installed one: tests/test_sanitizers.py runs
# the kernel tests again with it. Before longact is imported, which would load the installed one.
if path := os.environ.get("LONGACT_TEST_NATIVE"):
    spec = importlib.util.spec_from_file_location("longact._native", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["longact._native"] = module
    # An earlier import would have brought the installed one, and pybind11 keeps the first.
    assert "longact" not in sys.modules
    assert os.path.samefile(module.__file__ or "", path)

import torch
from native_builds import WHY_NO_BUILD, build, load


def pytest_configure(config: pytest.Config) -> None:
    # Not in pyproject.toml: pytest would import longact before this file runs.
    config.addinivalue_line("filterwarnings", "error::longact.LongActWarning")


def pytest_report_header() -> list[str]:
    import longact

    return [
        f"longact {longact.__version__}, torch {torch.__version__}",
        *(f"  {op}: {where['cpu']}" for op, where in longact.backends().items()),
    ]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # What DeepSpeed loads changes the last bits of bf16 matmuls in its process: its tests are last.
    items.sort(key=lambda item: item.path.name == "test_deepspeed.py")
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU: torch.cuda.is_available() is false")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    # Trainers and torch.compile collect garbage as they start: not what the imports have made.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def cuda_on_host(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The native core with the CUDA kernels' own source compiled for the CPU."""
    from longact.backends import native

    if "LONGACT_TEST_NATIVE" in os.environ:
        assert native is not None
        return native
    if WHY_NO_BUILD is not None:
        pytest.skip(WHY_NO_BUILD)
    return load(build(tmp_path_factory.mktemp("cuda_on_host")))
