"""`python -m longact`: what each op runs on here and why; and the commands."""

from __future__ import annotations

import argparse
import gc
import sys
from typing import Any

import torch.distributed as dist

import longact
from longact import delta_command, doctor, evaluate, inspection, plan


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m longact",
        description="Without a command: what each op runs on here and why.",
    )
    parser.add_argument("--version", action="version", version=f"longact {longact.__version__}")
    parser.set_defaults(run=print_backends)
    commands = parser.add_subparsers(dest="command", metavar="command")
    add_train_command(commands)
    for module in (delta_command, evaluate, inspection, plan, doctor):
        module.add_command(commands)
    arguments = parser.parse_args()
    arguments.run(arguments)


def print_backends(arguments: argparse.Namespace) -> None:
    for op, devices in longact.backends().items():
        for device, backend in devices.items():
            print(f"{op:18} {device:5} {backend}")


def add_train_command(commands: Any) -> None:
    """Here, as longact.train imports what only the rl extra brings."""
    parser = commands.add_parser(
        "train",
        help="GRPO or DAPO with LongAct, from a YAML file",
        description="Trains with TRL's GRPOTrainer and LongAct: checkpoints, progress, a final "
        "evaluation. Keys are those of TRL's GRPOConfig, ModelConfig and script arguments, and of "
        "longact.train.LongActArguments and TaskArguments.",
    )
    parser.add_argument("config", help="a YAML file, or a recipe that comes along: grpo, dapo")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="in place of the file's")
    parser.set_defaults(run=train, parser=parser)


def train(arguments: argparse.Namespace) -> None:
    try:
        from longact.train import check, read_config
        from longact.train import train as run
    except ImportError as error:
        print(
            f"longact train needs the rl extra: pip install 'longact[rl]' ({error})",
            file=sys.stderr,
        )
        sys.exit(2)
    try:
        config = read_config(arguments.config, arguments.overrides)
        check(config)
    except ValueError as error:
        arguments.parser.error(str(error))
    run(config)
    if dist.is_initialized():
        # By accelerate. Its threads hold tensors and end with the last trainer that uses them,
        # which must not be while the interpreter ends.
        gc.collect()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
