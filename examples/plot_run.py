"""Draw reward and selection curves of runs of `python -m longact train`.

    pip install 'longact[plot]'
    python examples/plot_run.py runs/grpo runs/dapo --out curves.png

A run is its output_dir (its last checkpoint is read), or a JSON-lines file of a trainer's logs,
which `--logs DIR` writes, one for each run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

PANELS = {
    "mean reward of a step": ["dynamic_sampling/reward|reward"],
    "share of |activation| in the selected rows": [
        "longact/q_proj/activation_share",
        "longact/k_proj/activation_share",
    ],
    "overlap with the step before": ["longact/q_proj/overlap", "longact/k_proj/overlap"],
    "gradient norm: all, before clipping; selection": ["grad_norm", "longact/grad_norm"],
}


def logs_of(run: Path) -> list[dict[str, Any]]:
    """What the trainer logged at its steps."""
    if run.is_file():
        return [json.loads(line) for line in run.read_text().splitlines()]
    states = sorted(run.glob("checkpoint-*/trainer_state.json"), key=lambda p: p.stat().st_mtime)
    if not states:
        raise SystemExit(f"{run} has no checkpoint with a trainer_state.json")
    history = json.loads(states[-1].read_text())["log_history"]
    return [log for log in history if "loss" in log]


def smooth(values: list[float], width: int = 5) -> list[float]:
    """Mean of the last `width` values."""
    return [
        sum(w) / len(w) for i in range(len(values)) if (w := values[max(0, i + 1 - width) : i + 1])
    ]


def draw(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    mpl.use("agg")
    figure, axes = plt.subplots(1, len(PANELS), figsize=(4.2 * len(PANELS), 3.4))
    for axis, (title, keys) in zip(axes, PANELS.items(), strict=True):
        for color, (name, logs) in enumerate(runs.items()):
            for key, style in zip(keys, ("-", "--"), strict=False):
                # The first of the alternatives that the run logged.
                found = next((k for k in key.split("|") if any(k in log for log in logs)), key)
                points = [(log["step"], float(log[found])) for log in logs if found in log]
                if not points:
                    continue
                steps, values = zip(*points, strict=True)
                label = f"{name} {found.removeprefix('longact/')}" if len(keys) > 1 else name
                if key is keys[0] and title.endswith("step"):
                    axis.plot(steps, values, ".", color=f"C{color}", alpha=0.4)
                    values = tuple(smooth(list(values)))
                axis.plot(steps, values, style, color=f"C{color}", label=label)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("optimizer step")
        if "norm" in title:
            axis.set_yscale("log")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("curves.png"))
    parser.add_argument("--logs", type=Path, help="folder to write each run's logs to")
    arguments = parser.parse_args()
    runs = {run.stem: logs_of(run) for run in arguments.runs}
    if arguments.logs:
        arguments.logs.mkdir(parents=True, exist_ok=True)
        for name, logs in runs.items():
            lines = "".join(json.dumps(log) + "\n" for log in logs)
            (arguments.logs / f"{name}.jsonl").write_text(lines)
    draw(runs, arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
