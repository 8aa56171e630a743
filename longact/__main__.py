"""`python -m longact`: what each op runs on here and why."""

import argparse

import longact


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m longact", description=__doc__)
    parser.add_argument("--version", action="version", version=f"longact {longact.__version__}")
    parser.parse_args()
    for op, devices in longact.backends().items():
        for device, backend in devices.items():
            print(f"{op:18} {device:5} {backend}")


if __name__ == "__main__":
    main()
