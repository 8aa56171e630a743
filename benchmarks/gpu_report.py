"""Builds, tests, sanitizes and measures longact on a GPU, in one command of under 9 minutes.

    python benchmarks/gpu_report.py              # needs no network
    python benchmarks/gpu_report.py --dry-run    # the same path on a machine without a GPU

Writes benchmarks/results/<gpu>-<date>-<commit>.json and .md: the machine, what each phase came to,
and the tables of bench_update.py and bench_projection.py. A phase that fails or takes too long does
not stop the others; the exit code is then 1. Goals that are not reached are stated and do not
change it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TOTAL_SECONDS = 530.0
TAIL = 40  # lines of a phase's output are kept
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
TRITON_TESTS = [
    "test_channel_magnitude_triton.py",
    "test_topk_rows_triton.py",
    "test_row_grad_triton.py",
    "test_projection_triton.py",
    "test_masked_adamw_triton.py",
    "test_triton_device.py",
]
Report = dict[str, Any]


# ---- phases --------------------------------------------------------------------------------------


@dataclass
class Phase:
    """One command, and what it came to."""

    name: str
    command: list[str]
    seconds_limit: float
    env: dict[str, str] = field(default_factory=dict)
    cwd: Path = ROOT
    skip: str = ""  # why it is not run
    # Of a failed phase's output: why it could not run here, if it is no failure.
    excuse: Callable[[str], str] = lambda output: ""


@dataclass
class Outcome:
    name: str
    status: str  # "ok", "failed", "timed out" or "not run"
    command: str
    returncode: int | None = None
    seconds: float = 0.0
    note: str = ""
    tail: list[str] = field(default_factory=list)

    @property
    def is_bad(self) -> bool:
        return self.status in ("failed", "timed out")


def shown(command: Sequence[str], env: dict[str, str]) -> str:
    """A command line without this machine's paths."""
    words = [f"{k}={v}" for k, v in env.items()]
    words += ["python" if word == sys.executable else word for word in command]
    return neutral(shlex.join(words))


def neutral(text: str) -> str:
    text = text.replace(f"{ROOT}/", "")
    return re.sub(re.escape(str(ROOT)) + r"(?![\w-])", ".", text)


def run_phase(phase: Phase, seconds: float, tail: int = TAIL) -> Outcome:
    """Runs it for `seconds` at most; its whole process group ends with it."""
    command = shown(phase.command, phase.env)
    if phase.skip:
        return Outcome(phase.name, "not run", command, note=phase.skip)
    limit = min(phase.seconds_limit, seconds)
    if limit < 5.0:
        return Outcome(phase.name, "timed out", command, note="no time was left for it")
    started = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            phase.command, cwd=phase.cwd, env={**os.environ, **phase.env}, stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        text = output.read()
    outcome = Outcome(
        phase.name,
        "timed out" if code is None else "ok" if code == 0 else "failed",
        command,
        code,
        round(time.monotonic() - started, 1),
        tail=[neutral(line) for line in text.rstrip().splitlines()[-tail:]],
    )
    if code is None:
        outcome.note = f"stopped after {limit:.0f} s"
    elif code != 0 and (excuse := phase.excuse(text)):
        outcome.status, outcome.note = "not run", excuse
    return outcome


def find_sanitizer() -> str | None:
    home = os.environ.get("CUDA_HOME")
    folders = [*([str(Path(home) / "bin")] if home else []), "/usr/local/cuda/bin"]
    path = os.pathsep.join([os.environ.get("PATH", ""), *folders])
    return shutil.which("compute-sanitizer", path=path)


def only_our_kernel(sanitizer: str) -> list[str]:
    """torch's kernels would only take time; the option's name depends on the version."""
    try:
        help_text = subprocess.run(
            [sanitizer, "--help"], capture_output=True, text=True, timeout=30, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    for option in ("--kernel-regex", "--kernel-name"):
        if f"{option} " in help_text:
            return [option, "kns=masked_adamw"]
    return []


def sanitizer_excuse(output: str) -> str:
    refused = "Device not supported" in output
    return "compute-sanitizer does not support this device or its runtime" if refused else ""


def sanitizer_phase(tool: str, dry_run: bool) -> Phase:
    sanitizer = find_sanitizer()
    script = [sys.executable, "benchmarks/exercise_kernel.py"]
    if dry_run:
        return Phase(tool, ["compute-sanitizer", "--tool", tool, *script], 60, skip="dry run")
    if sanitizer is None:
        why = "compute-sanitizer is not on PATH, in CUDA_HOME/bin or in /usr/local/cuda/bin"
        return Phase(tool, ["compute-sanitizer", "--tool", tool, *script], 60, skip=why)
    options = ["--tool", tool, "--error-exitcode", "9", *only_our_kernel(sanitizer)]
    if tool == "memcheck":
        options += ["--report-api-errors", "no"]
    # One allocation for each tensor: torch's cache would hide accesses beyond its end.
    env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Phase(tool, [sanitizer, *options, *script], 70, env, excuse=sanitizer_excuse)


def bench_phase(dtype: str, folder: Path, dry_run: bool) -> Phase:
    command = [sys.executable, "benchmarks/bench_update.py", "--dtype", dtype]
    command += ["--json", str(folder / f"{dtype}.json"), "--keep", "1", "0.3"]
    if dry_run:
        command += ["--device", "cpu", "--max-elements", "200000", "--rounds", "1"]
        command += ["--tokens", "16", "--large", "1"]
    else:
        command += ["--device", "cuda"]
        if dtype != "float32":
            command += ["--no-compile"]
    return Phase(f"bench {dtype}", command, 120)


def projection_phase(folder: Path, dry_run: bool) -> Phase:
    command = [sys.executable, "benchmarks/bench_projection.py"]
    command += ["--json", str(folder / "projection.json")]
    if dry_run:
        command += ["--device", "cpu", "--tokens", "64", "--rounds", "1"]
    else:
        command += ["--device", "cuda", "--dtype", "bfloat16"]
    return Phase("bench projection", command, 110)


def make_phases(args: argparse.Namespace, folder: Path) -> list[Phase]:
    """In the order in which they count, as the time may end before the last."""
    python, dry = sys.executable, args.dry_run
    install = [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
    install += ["--target", str(args.target)] if args.target else []
    no_build = "dry run" if dry else "--skip-build" if args.skip_build else ""
    this = [python, "benchmarks/gpu_report.py"]
    return [
        Phase("build", [*install, "."], 150, {"LONGACT_CUDA": "1"}, skip=no_build),
        Phase("environment", [*this, "--print-environment", str(folder / "env.json")], 60),
        Phase(
            "tests",
            [*PYTEST, "-m", "gpu", "--continue-on-collection-errors"],
            220,
            # Not the root, where Python would find longact's sources in place of the installed one.
            cwd=ROOT / "tests",
        ),
        Phase("triton tests", [*this, *(["--dry-run"] if dry else []), "--triton-tests"], 150),
        bench_phase("float32", folder, dry),
        projection_phase(folder, dry),
        Phase(
            "exercise",
            [python, "benchmarks/exercise_kernel.py", "--device", "cpu" if dry else "cuda"],
            60,
        ),
        sanitizer_phase("memcheck", dry),
        sanitizer_phase("racecheck", dry),
        bench_phase("bfloat16", folder, dry),
    ]


def run_triton_tests(dry_run: bool) -> int:
    """The Triton kernels' tests, which run on a GPU where there is one. Each file in a process of
    its own, as most of their time one processor compiles; what compiles for other GPUs is left out.
    """
    command = [*PYTEST, "-k", "not compile or compiled_model"]
    if dry_run:
        command.append("--collect-only")

    def run(file: str) -> tuple[str, int, list[str]]:
        done = subprocess.run(
            [*command, file], cwd=ROOT / "tests", capture_output=True, text=True, check=False
        )
        return file, done.returncode, (done.stdout + done.stderr).rstrip().splitlines()

    bad = 0
    with ThreadPoolExecutor(len(TRITON_TESTS)) as pool:
        for result in as_completed([pool.submit(run, file) for file in TRITON_TESTS]):
            file, code, lines = result.result()
            if code:
                bad += 1
                print("\n".join(lines[-TAIL // 2 :]))
            print(f"{file}: {lines[-1] if lines else code}", flush=True)
    print(f"{bad} of {len(TRITON_TESTS)} files failed")
    return 1 if bad else 0


# ---- what ran where ------------------------------------------------------------------------------


def query_driver() -> str | None:
    try:
        found = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=30, check=True,
        )  # fmt: skip
        return found.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def package_version(name: str) -> str | None:
    try:
        return str(importlib.import_module(name).__version__)
    except ImportError:
        return None


def environment() -> Report:
    """The machine and the packages, as the phases see them. In a process that may be new."""
    import torch

    import longact
    from longact.backends import adamw_backend

    found: Report = {
        "gpu": None,
        "driver": query_driver(),
        "cuda_runtime_of_torch": torch.version.cuda,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "longact": longact.__version__,
        "backends": {op: where["cuda"] for op, where in longact.backends().items()},
        "masked_adamw": list(adamw_backend(torch.device("cuda"))),
        "cpus": os.cpu_count(),
        "system": platform.platform(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = {
            "name": properties.name,
            "count": torch.cuda.device_count(),
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "l2_mib": properties.L2_cache_size / 2**20,
        }
    return found


def print_environment(path: Path) -> int:
    """Fails where there is a GPU on which the CUDA kernel does not run: the rest proves nothing."""
    found = environment()
    path.write_text(json.dumps(found))
    print(json.dumps(found, indent=1))
    backend, why = found["masked_adamw"]
    if found["gpu"] is not None and backend != "native":
        print(f"FAILED: the update runs on {backend}, not on the CUDA kernel: {why}")
        return 1
    return 0


def git(*arguments: str) -> str | None:
    try:
        found = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def commit_of_tree(given: str | None) -> tuple[str, bool | None]:
    """(commit, whether tracked files differ from it); unknown in a copy without its .git."""
    if given:
        return given, None
    commit = git("rev-parse", "--short=10", "HEAD")
    status = git("status", "--porcelain")
    return commit or "unknown", None if status is None else status != ""


def gpu_name() -> str | None:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


# ---- Markdown ------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(header), "|" + "---|" * len(header), *(line(row) for row in rows)]


def in_ms(ms: float) -> str:
    return f"{ms:.2f}" if ms >= 1.0 else f"{ms:.4f}"


def percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def machine_lines(report: Report) -> list[str]:
    env = report["environment"] or {}
    gpu = env.get("gpu") or {}
    dirty = {True: ", with local changes", False: ""}.get(report["dirty"], ", state not known")
    rows = [
        ("GPU", gpu.get("name", "none")),
        ("driver", env.get("driver") or "not known"),
        ("CUDA runtime of torch", env.get("cuda_runtime_of_torch") or "none"),
        ("torch, triton", f"{env.get('torch')}, {env.get('triton')}"),
        ("Python", str(env.get("python"))),
        ("the update runs on", env.get("backends", {}).get("masked_adamw_", "not known")),
        ("commit", f"{report['commit']}{dirty}"),
        ("time", report["time"]),
    ]
    if gpu:
        rows.insert(1, ("GPU, more", f"sm_{gpu['capability'].replace('.', '')}, "
                        f"{gpu['memory_gib']} GiB, {gpu['multiprocessors']} multiprocessors, "
                        f"L2 {gpu['l2_mib']:.0f} MiB, {gpu['count']} in the machine"))  # fmt: skip
    return table(("", ""), rows)


def phase_lines(report: Report) -> list[str]:
    rows = []
    for phase in report["phases"]:
        code = "" if phase["returncode"] is None else str(phase["returncode"])
        last = phase["note"] or (phase["tail"][-1] if phase["tail"] else "")
        rows.append((phase["name"], phase["status"], code, f"{phase['seconds']:.0f} s", last))
    return table(("phase", "result", "exit code", "time", "last line"), rows)


def goal_lines(goals: Sequence[Report]) -> list[str]:
    rows = []
    for goal in goals:
        scale, unit = (100.0, " %") if goal["unit"] == " %" else (1.0, goal["unit"])
        sign = ">=" if goal["at_least"] else "<="
        verdict = "reached" if goal["reached"] else "**not reached**"
        measured = f"{goal['measured'] * scale:.2f}{unit}"
        rows.append((goal["text"], measured, f"{sign} {goal['limit'] * scale:g}{unit}", verdict))
    return table(("goal", "measured", "limit", ""), rows)


def bench_table_lines(found: Report) -> list[str]:
    head = f"{found['parameters']} parameters, {found['elements'] / 1e6:.3g} M elements, "
    head += f"{found['rounds']} rounds"
    if found["copy_gb_per_s"]:
        head += f"; copy {found['copy_gb_per_s']:.0f} GB/s, add {found['add_gb_per_s']:.0f} GB/s"
    rows = [
        (
            row["variant"],
            in_ms(row["ms"]["median"]),
            f"{in_ms(row['ms']['q1'])} to {in_ms(row['ms']['q3'])}",
            f"{row['gb_per_s']:.0f}" if row["gb_per_s"] else "",
            percent(row["of_copy"]),
            f"{row['vs_fused']:.2f}x",
            f"{row['state_bytes'] / 1e6:.1f}",
        )
        for row in found["rows"]
    ]
    header = ("", "ms", "quartiles", "GB/s", "of copy", "against torch fused", "state, MB")
    lines = [f"### {found['key']}. {found['title']}", "", head + ".", ""]
    for note in found["notes"]:
        lines += [note + ".", ""]
    return [*lines, *table(header, rows), ""]


def bench_lines(name: str, bench: Report) -> list[str]:
    model = bench["model"]
    lines = [f"## Measured, {name}", ""]
    lines += [f"Model shapes: {model['name']}, {model['layers']} layers.", ""]
    limits = bench["device_limits"]
    if limits:
        lines += [
            f"Floors: copy {limits['copy_gb_per_s']:.0f} GB/s (reads and writes), in-place add "
            f"{limits['add_gb_per_s']:.0f} GB/s; a kernel of one element "
            f"{limits['launch_us']:.1f} us.",
            "",
        ]
    if bench["not_installed"]:
        lines += [f"Not installed, so not compared: {', '.join(bench['not_installed'])}.", ""]
    if bench["goals"]:
        lines += [*goal_lines(bench["goals"]), ""]
    for found in bench["tables"]:
        lines += bench_table_lines(found)
    return lines


def projection_table_lines(found: Report) -> list[str]:
    rows = []
    for group in found["groups"]:
        tokens = "" if group["tokens"] is None else f", {group['tokens']} tokens"
        for line in group["lines"]:
            ms, host = line["ms"], line["host_ms"]
            rate = [("TFLOP/s", line["tflop_per_s"]), ("GB/s", line["gb_per_s"])]
            rows.append(
                (
                    group["what"] + tokens,
                    line["variant"],
                    in_ms(ms["median"]),
                    f"{in_ms(ms['q1'])} to {in_ms(ms['q3'])}",
                    "".join(f"{value:.0f} {unit}" for unit, value in rate if value),
                    f"{line['ratio']['median']:.3f}",
                    f"{line['ratio']['q1']:.3f} to {line['ratio']['q3']:.3f}",
                    "" if host is None else in_ms(host["median"]),
                    "" if host is None else f"{line['host_ratio']['median']:.3f}",
                )
            )
    header = ("", "", "ms", "quartiles", "rate", "of the first's time", "quartiles",
              "host, ms", "of the first's")  # fmt: skip
    lines = [f"### {found['key']}. {found['title']}", ""]
    for note in found["notes"]:
        lines += [note + ".", ""]
    return [*lines, *table(header, rows), ""]


def projection_lines(bench: Report) -> list[str]:
    arguments = bench["arguments"]
    lines = [f"## Measured, q and k projections, {arguments['dtype']}", ""]
    lines += [f"Model shapes: {bench['model']['name']}; keep {arguments['keep']:g}.", ""]
    for cut in bench["cuts"]:
        lines += [cut + ".", ""]
    if bench["goals"]:
        lines += [*goal_lines(bench["goals"]), ""]
    for found in bench["tables"]:
        lines += projection_table_lines(found)
    if bench["advice"]:
        lines += ["What that says about longact's rules:", "", "```", *bench["advice"], "```", ""]
    return lines


def to_markdown(report: Report) -> str:
    """The report as a page; a dry run's shows no figure."""
    dry = report["dry_run"]
    gpu = ((report["environment"] or {}).get("gpu") or {}).get("name", "a GPU")
    title = "Dry run without a GPU" if dry else f"longact on {gpu}"
    lines = [f"# {title}", ""]
    if dry:
        lines += [
            "**This is a dry run on a machine without a GPU: it shows that the report's own path "
            "works, and nothing about speed or about the CUDA kernel.**",
            "",
        ]
    else:
        lines += ["Written by `python benchmarks/gpu_report.py`.", ""]
    lines += [*machine_lines(report), "", "## Phases", "", *phase_lines(report), ""]
    for name, bench in report["benches"].items():
        if bench is not None:
            lines += bench_lines(name, bench)
    if report["projection"] is not None:
        lines += projection_lines(report["projection"])
    for phase in report["phases"]:
        if phase["status"] in ("failed", "timed out"):
            lines += [f"## Last lines of {phase['name']}", "", "```"]
            lines += [f"$ {phase['command']}", *phase["tail"], "```", ""]
    return "\n".join(lines)


# ---- command line --------------------------------------------------------------------------------


def progress(text: str) -> None:
    print(f"[{datetime.now():%H:%M:%S}] {text}", file=sys.stderr, flush=True)


def run_report(args: argparse.Namespace) -> Report:
    ends = time.monotonic() + args.seconds
    commit, dirty = commit_of_tree(args.commit)
    outcomes = []
    if args.target:
        os.environ["PYTHONPATH"] = os.pathsep.join(
            [str(args.target), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for phase in make_phases(args, folder):
            progress(phase.name)
            outcome = run_phase(phase, ends - time.monotonic())
            for path, name in ((folder, "OUT"), (args.target, "DIR")):
                outcome.command = (
                    outcome.command.replace(str(path), name) if path else outcome.command
                )
            if args.dry_run and phase.name.startswith("bench") and not outcome.is_bad:
                outcome.tail = ["(figures of a dry run are not kept)"]
            progress(f"{phase.name}: {outcome.status} {outcome.note}".rstrip())
            outcomes.append(outcome)
        benches = {d: read_json(folder / f"{d}.json") for d in ("float32", "bfloat16")}
        projection = read_json(folder / "projection.json")
        env = read_json(folder / "env.json")
    return {
        "dry_run": args.dry_run,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "environment": env,
        "phases": [asdict(outcome) for outcome in outcomes],
        "benches": dict.fromkeys(benches) if args.dry_run else benches,
        "projection": None if args.dry_run else projection,
    }


def write_report(report: Report, name: str, folder: Path) -> tuple[Path, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{slug(name)}-{report['time'][:10]}-{slug(report['commit'])}"
    files = folder / f"{stem}.json", folder / f"{stem}.md"
    files[0].write_text(json.dumps(report, indent=1) + "\n")
    files[1].write_text(to_markdown(report))
    return files


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dry-run", action="store_true", help="without a GPU: every phase as far as it goes")
    add("--skip-build", action="store_true", help="use the longact that is installed")
    add("--target", type=Path, metavar="DIR",
        help="install into DIR and run from there, instead of into this environment")  # fmt: skip
    add("--out", type=Path, metavar="DIR",
        help="default: benchmarks/results, of a dry run a new temporary folder")  # fmt: skip
    add("--commit", help="what to name the commit, in a copy of the tree without its .git")
    add("--seconds", type=float, default=TOTAL_SECONDS,
        help="for all phases together (default: %(default)g)")  # fmt: skip
    add("--print-environment", type=Path, help=argparse.SUPPRESS)
    add("--triton-tests", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.target:
        args.target = args.target.absolute()
    if args.print_environment is None and not args.triton_tests:
        args.gpu = gpu_name()
        if args.gpu is None and not args.dry_run:
            parser.error(
                "torch finds no CUDA device here, and GPU figures come from a GPU only; "
                "--dry-run goes through the phases without one"
            )
        if args.gpu is not None and args.dry_run:
            parser.error("--dry-run is for machines without a GPU, and here is one: " + args.gpu)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.print_environment is not None:
        return print_environment(args.print_environment)
    if args.triton_tests:
        return run_triton_tests(args.dry_run)
    report = run_report(args)
    folder = args.out
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="longact-dry-run-")) if args.dry_run else RESULTS
    for path in write_report(report, "dry-run" if args.dry_run else args.gpu, folder):
        print(path)
    bad = [p["name"] for p in report["phases"] if p["status"] in ("failed", "timed out")]
    if bad:
        print(f"FAILED: {', '.join(bad)}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
