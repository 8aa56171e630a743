"""Fixtures and switches that all tests share."""

from __future__ import annotations

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


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """All tests at once go to a few processes, a file at a time; without pytest-xdist, with -n0 or
    --pdb, and where they would share a GPU, to this one."""
    option = config.option
    if (
        config.pluginmanager.hasplugin("xdist")
        and config.args_source is pytest.Config.ArgsSource.TESTPATHS
        and not hasattr(config, "workerinput")
        and option.numprocesses is None
        and not (option.usepdb or option.collectonly or torch.cuda.is_available())
    ):
        option.numprocesses = min(4, os.cpu_count() or 1)
        option.dist = "loadfile"
        option.loadscopereorder = False  # see pytest_collection_modifyitems


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # a share of the cores
        count = int(config.workerinput["workercount"])
        torch.set_num_threads(max(1, torch.get_num_threads() // count))
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
    return load(build(tmp_path_factory.mktemp("cuda_on_host"), CMAKE_BUILD_TYPE="Release"))
