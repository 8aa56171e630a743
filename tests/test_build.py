"""Installing: the wheel and the sdist, and what happens when the native build cannot be had."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "MANIFEST.in")

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the source tree")


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of the source tree, so that a build here leaves the checkout alone."""
    return copy_sources(tmp_path / "source")


@pytest.fixture(scope="module")
def built_sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for the tests that build for the CPU: what one has compiled the next only links."""
    return copy_sources(tmp_path_factory.mktemp("build") / "source")


def copy_sources(copy: Path) -> Path:
    copy.mkdir()
    for name in SOURCES:
        shutil.copy(ROOT / name, copy)
    ignored = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    for name in ("longact", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    return copy


def build(sources: Path, target: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """What pip runs, without its environment: this one has the build requirements. With --debug the
    compiler is not asked to optimise, which takes most of its time."""
    command = [sys.executable, "setup.py", "-q", "build", "--debug", "--build-lib", str(target)]
    return subprocess.run(
        command, cwd=sources, env=os.environ | env, capture_output=True, text=True, check=False
    )


def run_built(target: Path, script: str) -> str:
    """Runs `script` with the package that was just built, not the installed one."""
    # An editable install would win over the path.
    path = f"import sys; sys.path.insert(0, {str(target)!r})"
    finders = "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]"
    code = f"{path}; {finders}\n{script}"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=target, check=True, capture_output=True, text=True
    ).stdout


ONE_STEP = """
import torch, longact
p = torch.nn.Parameter(torch.ones(4, 3)); p.grad = torch.ones(4, 3)
longact.set_rows(p, [1, 3])
longact.FusedMaskedAdam([p], lr=0.1).step()
print(p.detach().ne(1).any(1).tolist())
print(longact.backends()["masked_adamw_"]["cpu"])
"""


def test_cpu_build_has_every_instruction_set(built_sources: Path, tmp_path: Path) -> None:
    done = build(built_sources, tmp_path / "lib", LONGACT_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert "CPU-only build: LONGACT_CUDA=0" in done.stderr
    changed, backend = run_built(tmp_path / "lib", ONE_STEP).splitlines()
    assert changed == "[False, True, False, True]"
    assert backend.startswith("native")


def test_auto_without_a_compiler_installs_the_reference_and_says_why(
    sources: Path, tmp_path: Path
) -> None:
    done = build(sources, tmp_path / "lib", LONGACT_CUDA="auto", CXX="/no/such/compiler")
    assert done.returncode == 0, done.stderr
    assert "the native build failed" in done.stderr
    changed, backend = run_built(tmp_path / "lib", ONE_STEP).splitlines()
    assert changed == "[False, True, False, True]"
    assert backend.startswith("reference: the native build failed when longact was installed")


def path_without_nvcc() -> str:
    """PATH without the folders that hold nvcc; skips where the compilers are in one of them."""
    folders = [Path(folder) for folder in os.environ["PATH"].split(os.pathsep)]
    path = os.pathsep.join(str(f) for f in folders if not (f / "nvcc").exists())
    if not all(shutil.which(tool, path=path) for tool in ("c++", "cmake", "ninja")):
        pytest.skip("nvcc lies in one folder with the other compilers")
    return path


def test_cuda_required_fails_clearly_without_nvcc(sources: Path, tmp_path: Path) -> None:
    env = {"PATH": path_without_nvcc(), "CUDA_HOME": "", "CUDA_PATH": ""}
    done = build(sources, tmp_path / "lib", LONGACT_CUDA="1", **env)
    assert done.returncode != 0
    assert "LONGACT_CUDA=1: nvcc not found on PATH or under CUDA_HOME" in done.stderr
    assert not list((tmp_path / "lib").rglob("*.so"))


@pytest.fixture
def broken_nvcc(tmp_path: Path) -> str:
    """A CUDA_HOME whose nvcc fails."""
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho 'nvcc fatal: no license' >&2; exit 1\n")
    nvcc.chmod(0o755)
    return str(tmp_path / "cuda")


def test_auto_with_a_broken_nvcc_builds_for_the_cpu_and_says_why(
    built_sources: Path, tmp_path: Path, broken_nvcc: str
) -> None:
    done = build(built_sources, tmp_path / "lib", LONGACT_CUDA="auto", CUDA_HOME=broken_nvcc)
    assert done.returncode == 0, done.stderr
    script = "import longact; print(longact.backends()['masked_adamw_'])"
    backends = run_built(tmp_path / "lib", script)
    assert "'cpu': 'native" in backends
    assert f"CPU-only build: the CUDA build with {broken_nvcc}/bin/nvcc failed" in backends


def test_cuda_required_with_a_broken_nvcc_fails(
    sources: Path, tmp_path: Path, broken_nvcc: str
) -> None:
    done = build(sources, tmp_path / "lib", LONGACT_CUDA="1", CUDA_HOME=broken_nvcc)
    assert done.returncode != 0
    assert not list((tmp_path / "lib").rglob("*.so"))


def test_unknown_switch_is_refused(sources: Path, tmp_path: Path) -> None:
    done = build(sources, tmp_path / "lib", LONGACT_CUDA="yes")
    assert done.returncode != 0
    assert "LONGACT_CUDA='yes': use auto, 0 or 1" in done.stderr


def test_sdist_holds_what_a_build_needs(sources: Path, tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(tmp_path)]
    subprocess.run(command, cwd=sources, check=True, capture_output=True)
    (archive,) = tmp_path.glob("longact-*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    for source in (*(sources / "csrc").iterdir(), sources / "CMakeLists.txt"):
        assert (unpacked / source.relative_to(sources)).is_file(), source


def test_native_core_links_no_torch() -> None:
    from longact import _native

    linked = subprocess.run(
        ["ldd", _native.__file__], check=True, capture_output=True, text=True
    ).stdout
    names = [line.split()[0] for line in linked.splitlines()]  # what follows are random addresses
    assert names
    assert not [name for name in names if "torch" in name or "c10" in name]


def test_import_is_light() -> None:
    """`import longact` brings in no optional dependency."""
    script = (
        "import sys, torch; before = set(sys.modules); import longact;"
        "print(*sorted({m.partition('.')[0] for m in set(sys.modules) - before}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    loaded = set(done.stdout.split())
    assert not loaded & {"transformers", "numpy", "matplotlib", "accelerate", "trl", "triton"}


def test_command_line_says_what_runs_where() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "longact"], check=True, capture_output=True, text=True
    )
    for op in ("masked_adamw_", "channel_magnitude", "topk_rows", "row_grad"):
        assert op in done.stdout
