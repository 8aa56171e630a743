"""`python -m experiments`: runs a configuration, and writes the report from what was found."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.driver import run_all
from experiments.plan import CONFIGS, read_config
from experiments.store import Store

HERE = Path(__file__).parent


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    commands = parser.add_subparsers(required=True)

    run = commands.add_parser("run", help="run what a configuration asks for and the store lacks")
    run.add_argument(
        "--config",
        required=True,
        help=f"one of {', '.join(sorted(path.stem for path in CONFIGS.glob('*.yaml')))}, or a file",
    )
    run.add_argument(
        "--models", type=Path, default=Path("runs/experiments"), help="pretrained models go here"
    )
    run.add_argument("--workers", type=int, default=2, help="runs side by side, a core each")
    run.add_argument("--minutes", type=float, help="begin no run after so many")
    run.add_argument("--device", default="cpu", help="cuda: all on one GPU")
    run.add_argument("--model", help="start from this model: a path, or a name on the hub")
    run.set_defaults(command=run_config)

    report = commands.add_parser("report", help="write docs/results.md from the store alone")
    report.add_argument("--docs", type=Path, default=HERE.parent / "docs", help="where it goes")
    report.set_defaults(command=write_report)

    for command in (run, report):
        command.add_argument(
            "--store", type=Path, default=HERE / "results", help="folder of the results"
        )
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.command(arguments))
    except ValueError as error:
        parser.error(str(error))


def run_config(arguments: argparse.Namespace) -> int:
    config = read_config(arguments.config)
    if arguments.model is not None:
        config["bases"] = {"model": arguments.model}
    failed = run_all(
        config,
        Store(arguments.store / f"{config['name']}.jsonl"),
        arguments.models,
        device=arguments.device,
        workers=arguments.workers,
        minutes=arguments.minutes,
    )
    return 1 if failed else 0


def write_report(arguments: argparse.Namespace) -> int:
    from experiments.report import report

    stores = [Store(path) for path in sorted(arguments.store.glob("*.jsonl"))]
    report([record for store in stores for record in store.records.values()], arguments.docs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
