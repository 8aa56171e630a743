"""`python -m longact doctor`: it says what is there, names each fault, and does not fail itself."""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import one_thread  # noqa: F401

import longact
from longact import doctor
from longact.backends import native
from longact.doctor import Row
from longact.kernels import channel_magnitude, masked_adamw, row_grad, topk_rows
from longact.optim import FusedMaskedAdam

PACKAGE = Path(longact.__file__).parent
ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


#: An editable install finds its own longact._native.
WITHOUT_EDITABLE = """
import runpy, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
runpy.run_module("longact.doctor", run_name="__main__")
"""


def run_doctor(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100"} | env
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_a_sound_install_passes(tmp_path: Path) -> None:
    done = run_doctor("-m", "longact", "doctor", "--json", "report.json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAIL" not in done.stdout
    assert "\033" not in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["faults"], report["exit_code"]) == (0, 0)
    rows = {(row["check"], row["what"]): row for row in report["rows"]}
    assert all(what in done.stdout for _, what in rows)
    assert rows["imports", "import longact"]["detail"].startswith(longact.__version__)
    assert rows["packages", "torch"]["detail"].startswith(metadata.version("torch"))
    tests = {what: row["status"] for (check, what), row in rows.items() if check.endswith(" cpu")}
    names = ["channel_magnitude", "topk_rows, select_rows", "row_grad, linear_grads"]
    if native is not None:
        names.append("masked_adamw_ native")
    assert tests == dict.fromkeys([*names, "masked_adamw_ reference", "a model's step"], "ok")


@pytest.mark.parametrize("module", [None, b"no shared object"], ids=["removed", "damaged"])
def test_names_a_missing_native_module(tmp_path: Path, module: bytes | None) -> None:
    """It is slower, and right: a warning."""
    copy = tmp_path / "longact"
    leave = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    shutil.copytree(PACKAGE, copy, ignore=leave)
    if module is not None:
        (copy / "_native.so").write_bytes(module)
    strict = ["--strict"] if module is None else []
    done = run_doctor("-c", WITHOUT_EDITABLE, "--json", "r.json", *strict, cwd=tmp_path)
    assert done.returncode == len(strict), done.stdout + done.stderr
    rows = {row["what"]: row for row in json.loads((tmp_path / "r.json").read_text())["rows"]}
    fault = rows["native module"]
    assert fault["status"] == "warn"
    why = f"no native module in {copy}" if module is None else "longact._native cannot be imported"
    assert why in fault["detail"]
    assert "pip install --force-reinstall --no-deps ." in fault["remedy"]
    assert re.search(r"^  warn  native module", done.stdout, re.MULTILINE)
    assert rows["masked_adamw_ cpu"]["status"] == "warn"
    assert rows["masked_adamw_ reference"]["status"] == rows["a model's step"]["status"] == "ok"


def test_a_torch_that_does_not_load_is_a_line(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open')")
    path = str(PACKAGE / "doctor.py")
    done = run_doctor(path, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stderr) == (1, "")
    assert re.search(r"FAIL  import torch +OSError: libcudart.so.13: cannot open", done.stdout)
    assert "self-test" not in done.stdout


def test_a_longact_that_does_not_load_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str) -> object:
        if name == "longact":
            raise metadata.PackageNotFoundError("longact")
        return torch

    monkeypatch.setattr(doctor.importlib, "import_module", fails)
    *_, row = doctor.imports()
    assert row.status == "fail"
    assert row.what == "import longact"
    assert "pip install" in row.remedy


def test_an_installed_package_that_is_hidden_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "longact").mkdir()
    installed = SimpleNamespace(locate_file=lambda name: tmp_path / name)
    monkeypatch.setattr(metadata, "distribution", lambda name: installed)
    *_, row = doctor.imports()
    assert row.status == "warn"
    assert str(tmp_path / "longact") in row.detail


@pytest.mark.skipif(native is None, reason="needs the native module")
def test_a_native_module_of_another_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PACKAGE", Path("/elsewhere/longact"))
    row, *_ = doctor.native_build()
    assert row.status == "warn"
    assert str(native.__file__) in row.detail


def of_self_test(seconds: float = 60.0) -> dict[str, Row]:
    return {row.what: row for row in doctor.self_test(CPU, seconds)}


magnitude = channel_magnitude.channel_magnitude_unchecked


def forgets_totals(*arguments: Any) -> torch.Tensor:
    *inputs, out, counted = arguments
    totals = magnitude(*inputs, None, counted)
    return totals if out is None else out.copy_(totals)  # type: ignore[no-any-return]


def counts_padding(*arguments: Any) -> torch.Tensor:
    *inputs, out, counted = arguments
    if counted is not None:
        counted.add_(len(inputs[0]))
    return magnitude(*inputs, out)


def first_rows(totals: list[torch.Tensor], *others: object) -> tuple[list[torch.Tensor], None]:
    return [torch.arange(60, dtype=torch.int32)], None


WRONG: dict[str, tuple[object, str, Callable[..., object]]] = {
    "channel_magnitude": (
        channel_magnitude,
        "channel_magnitude_unchecked",
        lambda y, *_: torch.ones(y.shape[1]),
    ),
    "running": (channel_magnitude, "channel_magnitude_unchecked", forgets_totals),
    "tokens counted": (channel_magnitude, "channel_magnitude_unchecked", counts_padding),
    "topk_rows": (topk_rows, "_dispatch", lambda y, k: torch.arange(k, dtype=torch.int32)),
    "select_rows": (topk_rows, "_select", first_rows),
    "row_grad": (row_grad, "_columns", lambda dy, rows: dy[:, : len(rows)].t()),
    "bias": (row_grad, "row_sums", lambda dy, rows: dy.sum(0)),
    "masked_adamw_ reference": (masked_adamw, "reference", lambda *_: None),
    "a model's step": (FusedMaskedAdam, "step", torch.optim.SGD.step),
}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_result_is_a_fault(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    where, attribute, wrong = WRONG[name]
    monkeypatch.setattr(where, attribute, wrong)
    rows = of_self_test()
    faults = [row for row in rows.values() if row.status == "fail"]
    assert any(name in row.what or name in row.detail for row in faults), rows
    assert all("do not train" in row.remedy for row in faults)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.skipif(native is None, reason="needs the native module")
def test_a_native_update_that_moves_other_rows_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    run = masked_adamw.NativeTable.run

    def spoils(table: masked_adamw.NativeTable, *arguments: object) -> None:
        run(table, *arguments)  # type: ignore[arg-type]
        for entry in table._entries:
            entry[0].data[1] += 1  # type: ignore[index]

    monkeypatch.setattr(masked_adamw.NativeTable, "run", spoils)
    rows = of_self_test()
    assert "other rows changed" in rows["masked_adamw_ native"].detail
    assert rows["masked_adamw_ reference"].status == "ok"


@pytest.mark.usefixtures("one_thread")
def test_what_raises_is_a_fault_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*_: object) -> None:
        raise RuntimeError("no\nkernel")

    monkeypatch.setattr(topk_rows, "_dispatch", raises)
    rows = of_self_test()
    assert rows["topk_rows, select_rows"].status == "fail"
    assert rows["topk_rows, select_rows"].detail == "RuntimeError: no kernel"
    assert rows["row_grad, linear_grads"].status == rows["channel_magnitude"].status == "ok"


def test_the_self_test_ends_in_time() -> None:
    rows = of_self_test(seconds=-1.0)
    assert {row.status for row in rows.values()} == {"info"}
    assert "run it again" in rows["a model's step"].detail


def test_the_self_test_leaves_the_random_state() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    of_self_test()
    assert torch.equal(torch.rand(3), expected)


def test_a_check_that_breaks_is_a_line() -> None:
    def breaks() -> Iterator[Row]:
        yield Row("ok", "first", "")
        raise KeyError("second")

    rows = [*doctor.rows_of("title", breaks)]
    assert [row.status for row in rows] == ["ok", "fail"]
    assert rows[1].what == "title"
    assert rows[1].detail == "KeyError: 'second'"


ONE_OF_EACH = {
    kind: Row(kind, f"a {kind}", "detail", "") for kind in ("ok", "info", "warn", "fail")
}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kinds", "strict", "code"),
    [
        (["ok", "info"], True, 0),
        (["ok", "warn"], False, 0),
        (["ok", "warn"], True, 1),
        (["fail", "ok"], False, 1),
    ],
)
def test_exit_code(
    monkeypatch: pytest.MonkeyPatch, kinds: list[str], strict: bool, code: int
) -> None:
    rows = [ONE_OF_EACH[kind] for kind in kinds]
    monkeypatch.setattr(doctor, "checks", lambda: iter([("title", lambda: iter(rows))]))
    with pytest.raises(SystemExit) as ended:
        doctor.run(argparse.Namespace(strict=strict, json=None))
    assert ended.value.code == code


def test_command_and_a_report_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    doctor.add_command(parser.add_subparsers())
    arguments = parser.parse_args(["doctor", "--json", str(tmp_path / "none" / "report.json")])
    monkeypatch.setattr(doctor, "checks", lambda: iter([]))
    with pytest.raises(SystemExit) as ended:
        arguments.run(arguments)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--json" in line
    assert "report.json" in line


def test_colours_are_for_terminals_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal, pipe = (SimpleNamespace(isatty=lambda is_tty=is_tty: is_tty) for is_tty in (1, 0))
    assert doctor.is_coloured(terminal)  # type: ignore[arg-type]
    assert not doctor.is_coloured(pipe)  # type: ignore[arg-type]
    monkeypatch.setenv("NO_COLOR", "1")
    assert not doctor.is_coloured(terminal)  # type: ignore[arg-type]
    green, red = (doctor.format_row(ONE_OF_EACH[kind], True, 80) for kind in ("ok", "fail"))
    assert "\033[32mok" in green
    assert "\033[31mFAIL" in red
    plain = doctor.format_row(ONE_OF_EACH["fail"], False, 80)
    assert re.sub(r"\033\[\d+m", "", red) == plain


def test_lines_are_aligned_and_wrapped() -> None:
    text = doctor.format_row(Row("warn", "name", "word " * 30, "do " * 30), False, 80)
    first, *rest = text.splitlines()
    assert first.startswith("  warn  name   ")
    assert all(len(line) <= 80 for line in text.splitlines())
    assert all(line.startswith(" " * 33) and line[33] != " " for line in rest)
    assert sum(line.strip().startswith("-> do do") for line in rest) == 1


@pytest.mark.parametrize(
    ("version", "versions", "within"),
    [
        ("2.9.0", ">=2.9", True),
        ("2.10.1+cu130", ">=2.9", True),
        ("2.8.1", ">=2.9", False),
        ("1.16.3", "==1.16.*", True),
        ("1.17.0", "==1.16.*", False),
        ("1.4", ">=1.2,<2", True),
        ("2.0", ">=1.2,<2", False),
        ("0.1", "", True),
    ],
)
def test_versions_within_a_range(version: str, versions: str, within: bool) -> None:
    assert doctor._is_within(version, versions) is within


def test_packages_are_those_that_longact_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["torch>=2.9", 'trl==1.16.*; extra == "rl"', 'cmake>=3.22; extra == "test"']
    installed = {"longact": "0.1.0", "torch": "2.8.0", "safetensors": "0.5", "verl": "0.9.1"}

    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(metadata, "requires", lambda _: asked)
    monkeypatch.setattr(metadata, "version", version)
    rows = {row.what: row for row in doctor.packages()}
    assert rows["torch"] == Row("fail", "torch", "2.8.0; needed: >=2.9", "pip install 'torch>=2.9'")
    assert rows["trl"] == Row("info", "trl", "not installed; comes with longact[rl]")
    assert rows["safetensors"] == Row("ok", "safetensors", "0.5")
    assert rows["verl"].status == "ok"
    assert "cmake" not in rows
    installed |= {"trl": "1.17.0"}
    rows = {row.what: row for row in doctor.packages()}
    assert rows["trl"].status == "warn"
    assert rows["trl"].remedy == "pip install 'trl==1.16.*'"
    assert "does not start" in rows["verl"].detail


def test_cards_and_what_the_native_build_has_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with three cards, as torch and the native build describe them."""
    card = SimpleNamespace(name="H100", major=9, minor=0, total_memory=80 * 2**30)
    newer = SimpleNamespace(name="B300", major=10, minor=3, total_memory=288 * 2**30)
    answers = [
        ("native", "CUDA 12.8 sm_90 sm_100"),
        ("native", "CUDA 12.8 sm_90 sm_100"),
        (
            "triton",
            "built without CUDA (CPU-only build: nvcc not found on PATH or under CUDA_HOME)",
        ),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", [card, newer, card].__getitem__)
    monkeypatch.setattr(
        sys.modules["longact.backends"], "adamw_backend", lambda device: answers[device.index]
    )
    rows = {row.what: row for row in doctor.gpus()}
    assert rows["cuda:0"].detail.startswith("H100, sm_90, 80 GiB")
    assert rows["cuda:0 native"] == Row("ok", "cuda:0 native", "CUDA 12.8 sm_90 sm_100")
    assert rows["cuda:1 native"].detail.endswith("for sm_103 from its PTX")
    assert rows["cuda:2 native"].status == "warn"
    assert "nvcc not found" in rows["cuda:2 native"].detail
    assert "LONGACT_CUDA=1" in rows["cuda:2 native"].remedy


OPEN_DRIVER = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build"
DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5"


@pytest.mark.parametrize(
    ("cuda", "version", "number"), [(None, DRIVER, "550.54.15"), ("13.0", OPEN_DRIVER, "580.65.06")]
)
def test_a_driver_without_a_card_that_torch_sees(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, version: str, number: str
) -> None:
    monkeypatch.setattr(doctor, "_read", lambda path: version if "nvidia" in str(path) else "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    (row,) = doctor.gpus()
    assert row.status == "warn"
    assert ("not built for CUDA" if cuda is None else "finds no CUDA device") in row.detail
    assert f"driver {number}," in row.detail


def constants(path: Path) -> Iterator[str]:
    """The pieces of text between what a message puts into them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_the_page_quotes_messages_that_exist() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(quoted) > 60
    text = "\n".join(piece for path in PACKAGE.rglob("*.py") for piece in constants(path))
    text += (ROOT / "setup.py").read_text() + (ROOT / "csrc" / "masked_adamw.cu").read_text()
    pieces = [piece for message in quoted for piece in message.split(" ... ")]
    assert [piece for piece in pieces if piece not in text] == []
