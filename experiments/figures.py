"""The figures of docs/results.md."""

from __future__ import annotations

import math
import statistics as plain
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.findings import (
    CHANCE,
    KINDS,
    MAIN,
    MAIN_ARMS,
    Findings,
    Record,
    estimate_of,
    layers_of,
    moved_overlap,
    variant_of,
)
from experiments.statistics import Estimate, estimate


class Picture(NamedTuple):
    title: str
    shown: Callable[[Findings], bool]  # whether there is something to draw
    draw: Callable[[Findings], Any]


def figures(records: Iterable[Record], says: Mapping[str, str]) -> dict[str, Any]:
    """Name -> matplotlib Figure, of those that there is something to draw for."""
    findings = Findings(records, says, *MAIN)
    return {name: p.draw(findings) for name, p in PICTURES.items() if p.shown(findings)}


def _axes(rows: int, columns: int, height: float = 3.2, width: float = 4.6) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure((width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, sharey="row")


def _sides(findings: Findings) -> dict[str, list[str]]:
    """The main arms: those that train all else, and those that freeze it."""
    main = [arm for arm in findings.arms if arm in MAIN_ARMS]
    sides = {
        title: [arm for arm in main if variant_of(arm) == name]
        for title, name in (("all else trained", "longact"), ("all else frozen", "sparse"))
    }
    return {title: arms for title, arms in sides.items() if arms}


def _rewarded(findings: Findings) -> list[str]:
    return [
        m
        for m in findings.methods
        if any("mean reward" in run.measures for run in findings.runs if run.method == m)
    ]


def _draw_rewards(findings: Findings) -> Any:
    import numpy as np

    methods = _rewarded(findings)
    figure, axes = _axes(len(methods), len(_sides(findings)))
    for method, line in zip(methods, axes, strict=True):
        for (title, arms), axis in zip(_sides(findings).items(), line, strict=True):
            for color, arm in enumerate(arms):
                runs = findings.of(arm, method)
                curves = [r.record["metrics"].get("curves", {}).get("reward", []) for r in runs]
                curves = [_smooth(curve) for curve in curves if curve]
                if not curves:
                    continue
                values = np.array([curve[: min(map(len, curves))] for curve in curves])
                mean, error = values.mean(0), values.std(0, ddof=min(1, len(values) - 1))
                error = error / math.sqrt(len(values))
                steps = np.arange(1, len(mean) + 1)
                axis.plot(steps, mean, color=f"C{color}", lw=1.2, label=f"{arm} ({len(values)})")
                axis.fill_between(steps, mean - error, mean + error, color=f"C{color}", alpha=0.15)
            _label(axis, f"{method.upper()}, {title}", "step", "reward (band: standard error)")
    return figure


def _smooth(curve: Sequence[float]) -> list[float]:
    """Mean of the last twentieth of the steps."""
    width = max(1, len(curve) // 20)
    return [plain.fmean(curve[max(0, i + 1 - width) : i + 1]) for i in range(len(curve))]


def _draw_lengths(findings: Findings) -> Any:
    figure, axes = _axes(len(findings.methods), len(_sides(findings)))
    for method, line in zip(findings.methods, axes, strict=True):
        for (title, arms), axis in zip(_sides(findings).items(), line, strict=True):
            for color, arm in enumerate(arms):
                points = [
                    (i + 0.06 * (color - (len(arms) - 1) / 2), found)
                    for i, name in enumerate(findings.evaluations)
                    if (found := findings.estimate(name, arm, method)) is not None
                ]
                _points(axis, points, color, arm, "o-")
            axis.set_xticks(range(len(findings.evaluations)), findings.evaluations)
            _label(axis, f"{method.upper()}, {title}", "length, of the trained one", "accuracy")
    return figure


def _draw_concentration(findings: Findings) -> Any:
    figure, [[axis]] = _axes(1, 1, 3.4, 7.5)
    groups: dict[str, list[Estimate | None]] = {
        "pretrained": [estimate(findings.concentration(kind).values()) for kind in KINDS]
    }
    for method in findings.methods:
        for arm in ("full", "longact"):
            groups[f"{method}\n{arm}"] = [
                findings.estimate(f"share {kind}", arm, method) for kind in KINDS
            ]
    for color, kind in enumerate(KINDS):
        points = [
            (i + 0.27 * (color - 1), group[color])
            for i, group in enumerate(groups.values())
            if group[color] is not None
        ]
        axis.bar([x for x, _ in points], [e.mean for _, e in points if e], 0.25, label=kind)
        _points(axis, points, "black", None, "none")
    axis.axhline(CHANCE, color="gray", ls=":", lw=1)
    axis.set_xticks(range(len(groups)), groups)
    _label(axis, "Share of |activation| in the top 30 % of the channels", "", "share")
    return figure


def _draw_moved(findings: Findings) -> Any:
    methods = [method for method in findings.methods if findings.of("full", method)]
    figure, axes = _axes(1, len(methods), 3.2, 3.8)
    for method, axis in zip(methods, axes[0], strict=True):
        for color, kind in enumerate(KINDS):
            points = [
                (i + 0.06 * (color - 1), found)
                for i in layers_of(findings)
                if (found := estimate_of(moved_overlap(findings, kind, i, method))) is not None
            ]
            _points(axis, points, color, kind, "o-")
        axis.axhline(CHANCE, color="gray", ls=":", lw=1, label="chance")
        axis.set_xticks(layers_of(findings))
        axis.set_ylim(0, 1)
        _label(axis, f"{method.upper()}, full update", "layer", "overlap of moved and salient")
    return figure


def _points(
    axis: Any, points: Sequence[tuple[float, Any]], color: int | str, label: str | None, style: str
) -> None:
    """Means with their intervals."""
    if not points:
        return
    x, found = zip(*points, strict=True)
    mean = [e.mean for e in found]
    # A percentile interval need not hold the mean.
    low = [0.0 if math.isnan(e.low) else max(0.0, e.mean - e.low) for e in found]
    high = [0.0 if math.isnan(e.high) else max(0.0, e.high - e.mean) for e in found]
    axis.errorbar(
        x,
        mean,
        [low, high],
        fmt=style,
        color=color if isinstance(color, str) else f"C{color}",
        lw=1,
        ms=3,
        capsize=2,
        label=label,
    )


def _label(axis: Any, title: str, x: str, y: str) -> None:
    axis.set_title(title, fontsize=9)
    axis.set_xlabel(x, fontsize=8)
    axis.set_ylabel(y, fontsize=8)
    axis.tick_params(labelsize=7)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=6)


PICTURES = {
    "lengths": Picture(
        "Accuracy of each arm by length", lambda findings: bool(_sides(findings)), _draw_lengths
    ),
    "rewards": Picture(
        "Mean reward of each step",
        lambda findings: bool(_rewarded(findings) and _sides(findings)),
        _draw_rewards,
    ),
    "concentration": Picture(
        "What the top 30 % of the channels of q, k and v carry",
        lambda findings: bool(findings.bases),
        _draw_concentration,
    ),
    "moved": Picture(
        "Overlap of moved and salient rows in each layer",
        lambda findings: bool(layers_of(findings)),
        _draw_moved,
    ),
}
