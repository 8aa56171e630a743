"""`python -m longact`: what each op runs on here and why. `python -m longact train`: see below."""

import argparse

import longact


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m longact",
        description="Without a command: what each op runs on here and why.",
    )
    parser.add_argument("--version", action="version", version=f"longact {longact.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command")
    train = commands.add_parser(
        "train",
        help="GRPO or DAPO with LongAct, from a YAML file",
        description="Trains with TRL's GRPOTrainer and LongAct: checkpoints, progress, a final "
        "evaluation. Keys are those of TRL's GRPOConfig, ModelConfig and script arguments, and of "
        "longact.train.LongActArguments and TaskArguments.",
    )
    train.add_argument("config", help="a YAML file, or a recipe that comes along: grpo, dapo")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="in place of the file's")
    arguments = parser.parse_args()

    if arguments.command == "train":
        try:
            from longact.train import check, read_config
            from longact.train import train as run
        except ImportError as error:
            parser.exit(
                2, f"longact train needs the rl extra: pip install 'longact[rl]' ({error})\n"
            )
        try:
            config = read_config(arguments.config, arguments.overrides)
            check(config)
        except ValueError as error:
            train.error(str(error))
        run(config)
        return
    for op, devices in longact.backends().items():
        for device, backend in devices.items():
            print(f"{op:18} {device:5} {backend}")


if __name__ == "__main__":
    main()
