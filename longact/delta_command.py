"""`python -m longact delta`: files of the rows that training changed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any


def add_command(commands: Any) -> None:
    """Adds `delta` to argparse's subparsers."""
    parser = commands.add_parser(
        "delta",
        help="files of only the rows that training changed",
        description="Deltas: safetensors files of only the rows that training changed.",
    )
    parser.set_defaults(run=run)
    actions = parser.add_subparsers(dest="action", metavar="action", required=True)
    info = actions.add_parser("info", help="check a delta and say what it holds")
    info.add_argument("file", type=Path)
    info.set_defaults(act=info_of)
    merge = actions.add_parser("apply", help="base and delta -> a checkpoint for transformers")
    merge.add_argument("base", help="directory of a checkpoint, or its name on the hub")
    merge.add_argument("delta", type=Path)
    merge.add_argument("output", type=Path, help="a new directory")
    merge.set_defaults(act=apply)
    diff = actions.add_parser(
        "diff", help="the rows that differ: of two checkpoints, or two deltas"
    )
    diff.add_argument("a", type=Path, help="directory of a checkpoint, or a delta")
    diff.add_argument("b", type=Path, help="the same kind")
    diff.add_argument(
        "--output", type=Path, metavar="FILE", help="write the delta that turns checkpoint A into B"
    )
    diff.set_defaults(act=diff_of)


def run(arguments: argparse.Namespace) -> None:
    """Errors of its user are one line, and exit code 2."""
    try:
        arguments.act(arguments)
    except (ValueError, OSError, ImportError) as error:
        message = " ".join(str(error).split())  # those of transformers have many lines
        print(f"longact delta {arguments.action}: {message}", file=sys.stderr)
        sys.exit(2)


def info_of(arguments: argparse.Namespace) -> None:
    from longact.delta import read_info

    info = read_info(arguments.file)
    kind = f" ({info.model_type})" if info.model_type else ""
    keep_ratio = "not noted" if info.keep_ratio is None else f"{info.keep_ratio:g}"
    print(f"file         {arguments.file}, {info.bytes:,} bytes, intact")
    print(f"written by   longact {info.longact_version}, format {info.format_version}")
    print(f"model        {info.model_class}{kind}")
    print(f"keep ratio   {keep_ratio}")
    print(
        f"changed      {info.rows:,} rows of {info.parameters:,} parameters: {info.elements:,} "
        f"elements, {info.share:.2%} of the model's"
    )
    print(f"fingerprint  {info.fingerprint}")


def apply(arguments: argparse.Namespace) -> None:
    from longact.delta import merge_delta

    merge_delta(arguments.base, arguments.delta, arguments.output)
    print(f"wrote {arguments.output}: {arguments.base} with the rows of {arguments.delta}")


def diff_of(arguments: argparse.Namespace) -> None:
    for path in (arguments.a, arguments.b):
        if not path.exists():
            raise ValueError(
                f"{path} does not exist: pass two checkpoint directories or two deltas"
            )
    directories = [path.is_dir() for path in (arguments.a, arguments.b)]
    if all(directories):
        diff_checkpoints(arguments.a, arguments.b, arguments.output)
    elif any(directories):
        raise ValueError("one of A and B is a directory: pass two checkpoints or two deltas")
    elif arguments.output is not None:
        raise ValueError("--output is for two checkpoint directories: A and B are files")
    else:
        diff_deltas(arguments.a, arguments.b)


def diff_checkpoints(a: Path, b: Path, output: Path | None) -> None:
    from longact.delta import changed_rows, load_checkpoint, save

    if output is not None and not output.absolute().parent.is_dir():
        raise ValueError(f"--output {output}: its folder does not exist")
    trained = load_checkpoint(b)
    # As a delta is applied: the base in the class and dtypes of the trained model.
    dtypes = {name: t.dtype for name, t in trained.state_dict(keep_vars=True).items()}
    base = load_checkpoint(a, type(trained).__name__, dtypes)
    rows = changed_rows(base, trained)
    parameters = dict(trained.named_parameters())
    lines, changed = [], 0
    for name, index in rows.items():
        shape = parameters[name].shape
        lines.append(
            [name, f"{index.numel():,}", f"{shape[0]:,}", f"{index.numel() / shape[0]:.1%}"]
        )
        changed += index.numel() * prod(shape[1:])
    if lines:
        print_table(["parameter", "changed rows", "of", "share"], lines)
    of_all = sum(param.numel() for param in parameters.values())
    print(
        f"{len(rows):,} of {len(parameters):,} parameters, {changed:,} of {of_all:,} elements "
        f"({changed / of_all:.2%}) in rows that differ"
    )
    if output is not None:
        save(trained, rows, output)
        print(f"wrote {output}: {output.stat().st_size:,} bytes")
        if changed > of_all / 2:
            print("more than half of the elements changed: a delta saves little over a checkpoint")


def diff_deltas(a: Path, b: Path) -> None:
    from longact.delta import compare

    overlaps = compare(a, b)
    columns = ["rows only in A", "only in B", "in both", "with other values"]
    lines = [[name, *(f"{count:,}" for count in counts)] for name, counts in overlaps.items()]
    totals = [sum(counts) for counts in zip(*overlaps.values(), strict=True)] or [0] * len(columns)
    lines.append(["all", *(f"{total:,}" for total in totals)])
    print_table(["parameter", *columns], lines)


def print_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Names to the left, numbers to the right."""
    columns = zip(header, *lines, strict=True)
    widths = [max(len(cell) for cell in column) for column in columns]
    for name, *cells in (header, *lines):
        numbers = (f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        print("  ".join([f"{name:{widths[0]}}", *numbers]))
