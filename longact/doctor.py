"""`python -m longact doctor`: what is installed and built, what each op runs on and why, a short
self-test, and what to do about each problem.

Only the standard library is imported at the top: a torch that does not load is a line of the table.
Where `import longact` itself fails, run this file: `python longact/doctor.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import functools
import importlib
import json
import os
import platform
import re
import shutil
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TextIO

if TYPE_CHECKING:
    import torch

Status = Literal["ok", "warn", "fail", "info"]


class Row(NamedTuple):
    """One line of the table: `warn` is slower or lacks an option, and right; `info` is neither."""

    status: Status
    what: str
    detail: str
    remedy: str = ""


Check = Callable[[], Iterator[Row]]

SECONDS = 20.0  # of the self-test, on one device: it takes one, and more on a busy machine
_NOT_FOR_USERS = {"demo", "test", "dev", "docs"}
#: What longact works with and does not ask pip for.
_TESTED_WITH = {"safetensors": "", "peft": "", "verl": "==0.9.*", "deepspeed": "==0.19.*"}
_PACKAGE = Path(__file__).resolve().parent
_REINSTALL = "in longact's source folder: pip install --force-reinstall --no-deps ."
_REPORT = "report it with the file that --json FILE writes"
_WRONG = (
    f"do not train on this device. Install again, {_REINSTALL}; if that does not help {_REPORT}"
)


def packages() -> Iterator[Row]:
    """Versions by their metadata: nothing is imported."""
    wants = metadata.metadata("longact")["Requires-Python"] if _has("longact") else "?"
    yield Row("ok", "Python", f"{platform.python_version()} ({wants}), {sys.executable}")
    wanted: dict[str, tuple[str, str]] = {}  # name -> versions, extra
    for line in (metadata.requires("longact") or []) if _has("longact") else ["torch>=2.9"]:
        requirement, _, marker = line.partition(";")
        found = re.fullmatch(r"\s*([\w.-]+)\s*(\[.*\])?\s*\(?([^)]*?)\)?\s*", requirement)
        extra = (re.findall(r"""extra == ["'](\w+)["']""", marker) or [""])[0]
        if "sys_platform" in marker and sys.platform not in marker:
            continue
        if found and found[1] != "longact" and extra not in _NOT_FOR_USERS:
            wanted.setdefault(found[1], (found[3], extra))
    for name, versions in _TESTED_WITH.items():
        wanted.setdefault(name, (versions, "-"))
    for name, (versions, extra) in wanted.items():
        yield _package(name, versions, extra)


def _package(name: str, versions: str, extra: str) -> Row:
    """`extra`: that asks for it; "" where longact itself does, "-" where nothing does."""
    remedy = f"pip install {name + versions!r}"
    missing: Status = "info" if extra else "fail" if name == "torch" else "warn"
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        for_extra = "" if extra == "-" else f"; comes with longact[{extra}]" if extra else ""
        return Row(missing, name, f"not installed{for_extra}", "" if extra else remedy)
    if not _is_within(version, versions):
        what = "tested with" if extra == "-" else "needed:"
        wrong: Status = "fail" if name == "torch" else "warn"
        return Row(wrong, name, f"{version}; {what} {versions}", remedy)
    if name == "verl" and _has("trl"):
        both = f"{version}, beside TRL: verl 0.9.1 does not start where TRL 1.x is installed"
        return Row("warn", name, both, "keep them in two environments (docs/frameworks.md)")
    return Row("ok", name, f"{version} ({versions})" if versions else version)


def _has(package: str) -> bool:
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


def _is_within(version: str, versions: str) -> bool:
    """Of `>=1.2`, `<2` and `==1.2.*`, which are all that longact asks for."""

    def numbers(text: str) -> list[int]:
        return [int(n) for n in re.findall(r"\d+", text.partition("+")[0])]

    have = numbers(version)

    def holds(kind: str, asked: list[int]) -> bool:
        if kind == "==":
            return have[: len(asked)] == asked
        return (have >= asked) == (kind == ">=")

    found = re.findall(r"(>=|<|==)\s*([\d.]+)", versions)
    return all(holds(kind, numbers(asked)) for kind, asked in found)


def imports() -> Iterator[Row]:
    try:
        torch = importlib.import_module("torch")
    except Exception as error:
        remedy = "see https://pytorch.org/get-started/locally for the build that fits this machine"
        yield Row("fail", "import torch", _text(error), remedy)
        return
    cuda, hip = torch.version.cuda, torch.version.hip
    build = f"for CUDA {cuda}" if cuda else f"for ROCm {hip}" if hip else "for the CPU only"
    yield Row("ok", "import torch", f"{torch.__version__}, {build}")
    try:
        longact = importlib.import_module("longact")
    except Exception as error:
        yield Row("fail", "import longact", f"{_text(error)} ({_PACKAGE})", _REINSTALL)
        return
    here = Path(str(longact.__file__)).resolve().parent
    installed = Path(str(metadata.distribution("longact").locate_file("longact"))).resolve()
    detail = f"{longact.__version__}, from {here}"
    if installed != here and installed.is_dir():
        detail = f"{detail}, which hides the installed one in {installed}"
        yield Row("warn", "import longact", detail, "run Python in another folder")
    else:
        yield Row("ok", "import longact", detail)


def machine() -> Iterator[Row]:
    import torch

    if sys.platform == "linux":
        yield Row("ok", "system", platform.platform())
    else:
        yield Row("warn", "system", f"{platform.platform()}: longact is tested on Linux alone")
    model = re.search(r"model name\s*: (.*)", _read("/proc/cpuinfo"))
    simd = torch.backends.cpu.get_cpu_capability()
    yield Row("ok", "CPU", f"{model[1] if model else platform.machine()}, {simd} in torch")
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    threads, asked = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    detail = f"{threads} of {usable} CPUs{f' (OMP_NUM_THREADS={asked})' if asked else ''}"
    if threads > usable:
        yield Row("warn", "threads", detail, f"set OMP_NUM_THREADS={usable}")
    else:
        yield Row("ok", "threads", detail)


def native_build() -> Iterator[Row]:
    from longact.backends import native, native_error

    if native is None:
        compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
        first = f"there is a compiler, {compiler}: " if compiler else "install a C++17 compiler; "
        remedy = f"{first}{_REINSTALL} (what runs until then is right, and slower)"
        yield Row("warn", "native module", native_error or "missing", remedy)
        return
    file, simd = Path(str(native.__file__)).resolve(), native.instruction_sets()[0]
    if file.parent == _PACKAGE:
        yield Row("ok", "native module", f"{file.name}, {simd}")
    else:
        detail = f"of another longact, {file}"
        yield Row("warn", "native module", detail, "run Python in another folder")
    if not native.openmp:
        remedy = f"install the compiler's OpenMP (libgomp, libomp), then {_REINSTALL}"
        yield Row("warn", "OpenMP", "built without: the update runs on one thread", remedy)
    built = json.loads(_read(_PACKAGE / "_build.json") or "{}").get("cuda", "not built")
    yield Row("ok" if native.cuda else "info", "CUDA kernels", native.cuda or built)


def gpus() -> Iterator[Row]:
    import torch

    found = re.search(r"\b\d+\.[\d.]+\b", _read("/proc/driver/nvidia/version"))
    driver = f"driver {found[0]}" if found else ""
    with warnings.catch_warnings(record=True) as said:  # torch says there why it sees none
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available and not driver:
        yield Row("info", "GPU", "torch finds none, and there is no NVIDIA driver")
    elif not available:
        why = " ".join(str(said[0].message).split()) if said else "torch finds no CUDA device"
        if torch.version.cuda is None:
            why = "this torch is not built for CUDA"
        remedy = "see CUDA_VISIBLE_DEVICES and nvidia-smi, or install a torch for this driver"
        yield Row("warn", "GPU", f"there is NVIDIA's {driver}, and {why}", remedy)
    for index in _cards():
        card = torch.cuda.get_device_properties(index)
        detail = f"{card.name}, sm_{card.major}{card.minor}, {card.total_memory / 2**30:.0f} GiB"
        yield Row("ok", f"cuda:{index}", f"{detail}{driver and f', {driver}'}")
        yield _on_card(index, f"{card.major}{card.minor}")


def _cards() -> range:
    import torch

    return range(torch.cuda.device_count() if torch.cuda.is_available() else 0)


def _on_card(index: int, capability: str) -> Row:
    """Whether the native build has kernels for a card."""
    import torch

    from longact.backends import adamw_backend

    what = f"cuda:{index} native"
    name, detail = adamw_backend(torch.device("cuda", index))
    if name == "native":
        exact = re.search(rf"\bsm_{capability}\b", detail)
        return Row("ok", what, detail if exact else f"{detail}; for sm_{capability} from its PTX")
    if torch.version.hip is not None:
        return Row("info", what, f"{name}: {detail}")
    build = "with nvcc 12.4 or later on PATH (it needs no GPU), LONGACT_CUDA=1 and "
    return Row("warn", what, f"{name} in its place: {detail}", build + _REINSTALL)


def ops() -> Iterator[Row]:
    import torch

    from longact import backends

    for op, devices in backends().items():
        for device, backend in devices.items():
            what, status, remedy = f"{op} {device}", "ok", ""
            if device == "cuda" and not torch.cuda.is_available():
                status = "info"
            elif backend.startswith("reference"):
                status, remedy = "warn", "see the native module above"
                if device == "cuda":
                    remedy = "Triton needs a C compiler, Python's headers and a card that it knows"
            yield Row(status, what, backend, remedy)  # type: ignore[arg-type]


def self_test(device: torch.device, seconds: float = SECONDS) -> Iterator[Row]:
    """What begins within `seconds` is finished."""
    from longact.self_test import tests_of

    end = time.monotonic() + seconds
    for what, test in tests_of(device).items():
        if time.monotonic() > end:
            why = f"left out: {seconds:g} s were over; kernels are compiled at first: run it again"
            yield Row("info", what, why)
            continue
        try:
            yield Row("ok", what, test())
        except Exception as error:
            yield Row("fail", what, _text(error), _WRONG)


def checks() -> Iterator[tuple[str, Check]]:
    """Each is made when those before it have run."""
    yield "packages", packages
    yield "imports", imports
    yield "machine", machine
    yield "native build", native_build
    yield "GPUs", gpus
    yield "what each op runs on", ops
    import torch

    for name in ("cpu", *(f"cuda:{index}" for index in _cards())):
        yield f"self-test on {name}", functools.partial(self_test, torch.device(name))


def rows_of(title: str, check: Check) -> Iterator[Row]:
    """A check that breaks is a line of the table, too."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield from check()
    except Exception as error:
        yield Row("fail", title, _text(error), _REPORT)


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


_WORDS = {"ok": "ok", "warn": "warn", "fail": "FAIL", "info": "-"}
_COLOURS = {"ok": 32, "warn": 33, "fail": 31, "info": 0}


def is_coloured(stream: TextIO) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR")


def format_row(row: Row, coloured: bool, width: int) -> str:
    status = f"{_WORDS[row.status]:4}"
    if coloured and _COLOURS[row.status]:
        status = f"\033[{_COLOURS[row.status]}m{status}\033[0m"
    wrap = functools.partial(
        textwrap.wrap, width=max(width - 33, 30), break_long_words=False, break_on_hyphens=False
    )
    lines = [*wrap(row.detail), *wrap(f"-> {row.remedy}" if row.remedy else "")] or [""]
    return f"  {status}  {row.what:24} " + f"\n{'':33}".join(lines)


def run(arguments: argparse.Namespace) -> None:
    """Prints the table while it is made: what a crash in native code leaves says where it was."""
    with contextlib.suppress(OSError, ValueError):  # where stderr is no file
        faulthandler.enable()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    coloured, width = is_coloured(sys.stdout), min(shutil.get_terminal_size((100, 24)).columns, 120)
    found: list[tuple[str, Row]] = []
    for title, check in checks():
        print(title)
        for row in rows_of(title, check):
            found.append((title, row))
            print(format_row(row, coloured, width), flush=True)
        if title == "imports" and found[-1][1].status == "fail":
            break  # nothing else could run
    faults, warned = (sum(row.status == kind for _, row in found) for kind in ("fail", "warn"))
    code = int(faults > 0 or (arguments.strict and warned > 0))
    if arguments.json is not None:
        rows = [{"check": title, **row._asdict()} for title, row in found]
        report = {"faults": faults, "warnings": warned, "exit_code": code, "rows": rows}
        try:
            arguments.json.write_text(json.dumps(report, indent=1) + "\n")
        except OSError as error:
            print(f"longact doctor: --json {arguments.json}: {error}", file=sys.stderr)
            sys.exit(2)
    told = "; attach what --json FILE writes to a bug report" if faults else ""
    print(f"\n{faults} faults, {warned} warnings{told}" if faults or warned else "\nall is well")
    sys.exit(code)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write it all, for a bug report")
    parser.add_argument("--strict", action="store_true", help="exit with 1 on warnings, too")
    parser.set_defaults(run=run)


def add_command(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    _add_options(
        subparsers.add_parser(
            "doctor",
            help="what is built, what runs where, a self-test, and what to do",
            description="Says what is installed and built, which backend each op takes and why, "
            "tests each op for some seconds, and says what to do about each problem. Exits with 0, "
            "or with 1 where something is wrong; what is only slower or missing is a warning.",
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m longact doctor")
    _add_options(parser)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    if Path(sys.path[0] or ".").resolve() == _PACKAGE:  # run as a file: its folder is no place
        sys.path = [*sys.path[1:], str(_PACKAGE.parent)]
    main()
