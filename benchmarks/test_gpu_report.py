"""The report's own path, as far as it goes without a GPU: `pytest benchmarks`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import exercise_kernel
import gpu_report
import pytest
import torch
from gpu_report import Phase, run_phase, to_markdown


def python(name: str, code: str, seconds: float = 30.0, **options: Any) -> Phase:
    return Phase(name, [sys.executable, "-c", code], seconds, **options)


# ---- phases --------------------------------------------------------------------------------------


def test_a_phase_that_works() -> None:
    outcome = run_phase(python("good", "print('first'); print('last')"), 30.0, tail=1)
    assert (outcome.status, outcome.returncode, outcome.tail) == ("ok", 0, ["last"])
    assert outcome.command.startswith("python -c ")
    assert not outcome.is_bad


def test_a_phase_that_fails_keeps_its_last_lines_and_names_no_place() -> None:
    code = f"import sys; print({str(gpu_report.ROOT)!r} + '/tests/x.py'); sys.exit(3)"
    outcome = run_phase(python("bad", code), 30.0)
    assert (outcome.status, outcome.returncode, outcome.tail) == ("failed", 3, ["tests/x.py"])
    assert str(gpu_report.ROOT) not in outcome.command
    assert outcome.is_bad


def test_a_phase_that_takes_too_long_is_stopped() -> None:
    code = "import subprocess; print('hi', flush=True); subprocess.run(['sleep', '60'])"
    outcome = run_phase(python("slow", code, 5.5), 30.0)
    assert (outcome.status, outcome.returncode, outcome.tail) == ("timed out", None, ["hi"])
    assert outcome.note.startswith("stopped after")
    assert 5.0 < outcome.seconds < 20.0


def test_a_phase_without_time_or_with_a_reason_is_not_run() -> None:
    assert run_phase(python("late", "print(1)"), 2.0).status == "timed out"
    outcome = run_phase(python("skipped", "print(1)", skip="no tool"), 30.0)
    assert (outcome.status, outcome.note, outcome.is_bad) == ("not run", "no tool", False)


def test_a_sanitizer_that_refuses_the_device_is_no_failure() -> None:
    code = "print('Device not supported.'); raise SystemExit(1)"
    phase = python("memcheck", code, excuse=gpu_report.sanitizer_excuse)
    outcome = run_phase(phase, 30.0)
    assert outcome.status == "not run"
    assert "does not support this device" in outcome.note
    phase.command[-1] = "print('Invalid __global__ write'); raise SystemExit(9)"
    assert run_phase(phase, 30.0).status == "failed"


def test_triton_tests_run_file_by_file_and_a_bad_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_good.py").write_text(
        "def test_a_compiled_model(): pass\n"
        "def test_kernel(): pass\n"
        "def test_kernel_compiles(): assert False\n"
    )
    (tests / "test_bad.py").write_text("def test_kernel(): assert 1 == 2\n")
    monkeypatch.setattr(gpu_report, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_report, "TRITON_TESTS", ["test_good.py"])
    assert gpu_report.main(["--triton-tests"]) == 0
    assert "test_good.py: 2 passed, 1 deselected" in capsys.readouterr().out
    monkeypatch.setattr(gpu_report, "TRITON_TESTS", ["test_good.py", "test_bad.py"])
    assert gpu_report.main(["--triton-tests"]) == 1
    out = capsys.readouterr().out
    assert "assert 1 == 2" in out
    assert "test_bad.py: 1 failed" in out
    assert out.endswith("1 of 2 files failed\n")


def test_the_triton_tests_are_all_there_are() -> None:
    files = {path.name for path in (gpu_report.ROOT / "tests").glob("test_*triton*.py")}
    assert files == set(gpu_report.TRITON_TESTS)


@pytest.mark.parametrize("option", ["--kernel-name", "--kernel-regex", ""])
def test_the_sanitizer_looks_at_our_kernel_alone(option: str, tmp_path: Path) -> None:
    fake = tmp_path / "bin" / "compute-sanitizer"
    fake.parent.mkdir()
    fake.write_text(f"#!/bin/sh\necho '  {option} arg   which kernels'\n")
    fake.chmod(0o755)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        monkeypatch.setenv("PATH", "/usr/bin:/bin")
        phase = gpu_report.sanitizer_phase("memcheck", dry_run=False)
    assert phase.command[0] == str(fake)
    assert (option in phase.command) == bool(option)
    assert ("kns=masked_adamw" in phase.command) == bool(option)
    assert not phase.skip


def test_no_sanitizer_says_where_it_was_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_report.shutil.which", lambda name, path: None)
    assert "CUDA_HOME/bin" in gpu_report.sanitizer_phase("racecheck", dry_run=False).skip


def test_exercise_finds_a_kernel_that_differs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(exercise_kernel, "cases", lambda: [(torch.float32, 1, {})])
    assert exercise_kernel.main(["--device", "cpu"]) == 0
    right, calls = exercise_kernel.run, []

    def wrong(*arguments: Any) -> Any:
        result = right(*arguments)
        calls.append(1)
        if len(calls) == 1:
            result[2]["exp_avg"][0, 0] += 1e-7
        return result

    monkeypatch.setattr(exercise_kernel, "run", wrong)
    assert exercise_kernel.main(["--device", "cpu"]) == 1
    assert "DIFFERS: exp_avg of [3, 16390], torch.float32, shift 1" in capsys.readouterr().out


# ---- the page ------------------------------------------------------------------------------------


def bench(dtype: str) -> dict[str, Any]:
    """What bench_update.py writes, cut to one table with made-up figures."""

    def row(variant: str, keep: float | None, ms: float, share: float) -> dict[str, Any]:
        return {
            "variant": variant, "keep": keep, "kind": "full", "elements": 1000,
            "ms": {"median": ms, "q1": ms * 0.99, "q3": ms * 1.01}, "vs_fused": 1.0 / ms,
            "state_bytes": 8000, "moment_bytes": 8000,
            "gb_per_s": share * 1234.0, "of_copy": share, "of_add": share,
        }  # fmt: skip

    return {
        "model": {"name": "qwen3-8b", "layers": 4},
        "device_limits": {
            "copy_gb_per_s": 1234.0, "add_gb_per_s": 1200.0, "launch_us": 2.5, "l2_mib": 50.0
        },
        "not_installed": ["apex"],
        "goals": [
            {"text": f"{dtype}: keep 1", "measured": 0.931, "limit": 0.92, "at_least": True,
             "unit": " %", "reached": True},
            {"text": f"{dtype}: keep 0.3", "measured": 2.75, "limit": 3.0, "at_least": True,
             "unit": "x", "reached": False},
        ],
        "tables": [
            {
                "key": "C", "title": "4 projections", "parameters": 4, "elements": 67_000_000,
                "rounds": 25, "notes": ["not timed: apex"], "copy_gb_per_s": 1234.0,
                "add_gb_per_s": 1200.0,
                "rows": [row("torch AdamW fused", None, 1.0, 0.8), row("longact", 0.3, 0.25, 0.9)],
            }
        ],
    }  # fmt: skip


def bench_projection() -> dict[str, Any]:
    """What bench_projection.py writes, with made-up figures."""

    def line(variant: str, ms: float, host: float | None = None, **rates: float) -> dict[str, Any]:
        def around(value: float) -> dict[str, float]:
            return {"median": value, "q1": value * 0.9, "q3": value * 1.1}

        return {
            "variant": variant, "baseline": "F.linear", "ms": around(ms), "ratio": around(ms / 2.0),
            "tflop_per_s": rates.get("tflop"), "gb_per_s": rates.get("gb"),
            "host_ms": None if host is None else around(host),
            "host_ratio": None if host is None else around(host / 0.5),
        }  # fmt: skip

    forward = {
        "what": "q_proj", "shape": [4096, 4096], "tokens": 4096, "rounds": 25, "judged": [],
        "lines": [line("F.linear", 2.0, tflop=400.4), line("alone", 0.5, gb=1000.2)],
    }  # fmt: skip
    topk = {
        "what": "all", "shape": [], "tokens": None, "rounds": 25, "judged": [],
        "lines": [line("one call", 4.0, 1.0)],
    }  # fmt: skip
    return {
        "arguments": {"dtype": "bfloat16", "keep": 0.3},
        "model": {"name": "qwen3-8b"},
        "cuts": ["Tokens: 1024 in place of 4096"],
        "goals": [{"text": "A: statistics", "measured": 0.021, "limit": 0.03, "at_least": False,
                   "unit": " %", "reached": True}],
        "tables": [
            {"key": "A", "title": "Forward", "notes": [], "groups": [forward]},
            {"key": "C", "title": "Top-k", "notes": ["1 launch"], "groups": [topk]},
        ],
        "advice": ["choose_method: as it is"],
    }  # fmt: skip


@pytest.fixture
def report() -> dict[str, Any]:
    return {
        "dry_run": False,
        "time": "2026-01-02T03:04:05+00:00",
        "commit": "abc123",
        "dirty": True,
        "environment": {
            "gpu": {"name": "Some GPU", "count": 1, "capability": "9.0", "memory_gib": 79.1,
                    "multiprocessors": 132, "l2_mib": 50.0},
            "driver": "580.1", "cuda_runtime_of_torch": "13.0", "python": "3.12.1",
            "torch": "2.11.0", "triton": "3.6.0", "backends": {"masked_adamw_": "native (sm_90)"},
        },
        "phases": [
            {"name": "build", "status": "ok", "command": "pip install .", "returncode": 0,
             "seconds": 61.2, "note": "", "tail": ["Successfully installed"]},
            {"name": "tests", "status": "failed", "command": "pytest -m gpu", "returncode": 1,
             "seconds": 100.0, "note": "", "tail": ["E   assert a | b", "1 failed, 9 passed"]},
        ],
        "benches": {"float32": bench("float32"), "bfloat16": None},
        "projection": bench_projection(),
    }  # fmt: skip


def test_the_page_has_the_machine_the_phases_the_goals_and_the_tables(
    report: dict[str, Any],
) -> None:
    page = to_markdown(report)
    for line in (
        "# longact on Some GPU",
        "| GPU, more | sm_90, 79.1 GiB, 132 multiprocessors, L2 50 MiB, 1 in the machine |",
        "| driver | 580.1 |",
        "| commit | abc123, with local changes |",
        "| build | ok | 0 | 61 s | Successfully installed |",
        "| tests | failed | 1 | 100 s | 1 failed, 9 passed |",
        "| float32: keep 1 | 93.10 % | >= 92 % | reached |",
        "| float32: keep 0.3 | 2.75x | >= 3x | **not reached** |",
        "Floors: copy 1234 GB/s (reads and writes), in-place add 1200 GB/s; "
        "a kernel of one element 2.5 us.",
        "Not installed, so not compared: apex.",
        "### C. 4 projections",
        "| longact | 0.2500 | 0.2475 to 0.2525 | 1111 | 90.0% | 4.00x | 0.0 |",
        "## Measured, q and k projections, bfloat16",
        "| A: statistics | 2.10 % | <= 3 % | reached |",
        "Tokens: 1024 in place of 4096.",
        "| q_proj, 4096 tokens | F.linear | 2.00 | 1.80 to 2.20 | 400 TFLOP/s "
        "| 1.000 | 0.900 to 1.100 |  |  |",
        "| q_proj, 4096 tokens | alone | 0.5000 | 0.4500 to 0.5500 | 1000 GB/s "
        "| 0.250 | 0.225 to 0.275 |  |  |",
        "1 launch.",
        "| all | one call | 4.00 | 3.60 to 4.40 |  | 2.000 | 1.800 to 2.200 | 1.00 | 2.000 |",
        "choose_method: as it is",
        "## Last lines of tests",
        "E   assert a | b",
    ):
        assert line in page.splitlines(), line
    assert "Measured, bfloat16" not in page


def test_a_page_without_an_environment_still_comes(report: dict[str, Any]) -> None:
    report.update(
        environment=None, benches={"float32": None, "bfloat16": None}, projection=None, dirty=None
    )
    page = to_markdown(report)
    assert "# longact on a GPU" in page
    assert "abc123, state not known" in page


def test_files_are_named_by_gpu_date_and_commit(report: dict[str, Any], tmp_path: Path) -> None:
    files = gpu_report.write_report(report, "NVIDIA H100 80GB HBM3", tmp_path / "results")
    stem = "nvidia-h100-80gb-hbm3-2026-01-02-abc123"
    assert [f.name for f in files] == [f"{stem}.json", f"{stem}.md"]
    assert json.loads(files[0].read_text()) == report


# ---- the command ---------------------------------------------------------------------------------

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


@without_gpu
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        gpu_report.main([])
    assert error.value.code == 2
    assert "torch finds no CUDA device here" in capsys.readouterr().err


@without_gpu
@pytest.mark.slow
def test_dry_run_goes_through_every_phase_and_claims_nothing(tmp_path: Path) -> None:
    assert gpu_report.main(["--dry-run", "--out", str(tmp_path)]) == 0
    page, data = sorted(tmp_path.iterdir(), key=lambda path: path.suffix, reverse=True)
    report = json.loads(data.read_text())
    status = {phase["name"]: phase["status"] for phase in report["phases"]}
    assert status == {
        "build": "not run", "environment": "ok", "tests": "ok", "triton tests": "ok",
        "bench float32": "ok", "bench projection": "ok", "exercise": "ok", "memcheck": "not run",
        "racecheck": "not run", "bench bfloat16": "ok",
    }  # fmt: skip
    tests = next(phase for phase in report["phases"] if phase["name"] == "tests")
    assert "skipped" in tests["tail"][-1]
    assert report["dry_run"]
    assert report["environment"]["gpu"] is None
    assert report["benches"] == {"float32": None, "bfloat16": None}
    assert report["projection"] is None
    text = page.read_text()
    assert text.startswith("# Dry run without a GPU")
    assert "GB/s" not in text + data.read_text()


@without_gpu
def test_a_failed_phase_makes_the_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    phases = [python("one", "raise SystemExit(4)"), python("two", "print('fine')")]
    monkeypatch.setattr(gpu_report, "make_phases", lambda args, folder: phases)
    assert gpu_report.main(["--dry-run", "--out", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "FAILED: one" in captured.err
    report = json.loads(Path(captured.out.split()[0]).read_text())
    assert [phase["status"] for phase in report["phases"]] == ["failed", "ok"]
