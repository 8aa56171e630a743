"""docs/results.md and its figures, from the records of the store and nothing else."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import statistics as plain
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.figures import PICTURES, figures
from experiments.findings import (
    CHANCE,
    CLAIMS,
    KINDS,
    MAIN,
    MAIN_ARMS,
    REFERENCES,
    Comparison,
    Family,
    Findings,
    Record,
    against,
    as_text,
    details,
    estimate_of,
    families_of,
    family_of,
    head_overlap,
    holm_corrected,
    layers_of,
    moved_overlap,
    natural,
    setting_of,
    task_text,
    variant_of,
)
from experiments.statistics import (
    ALPHA,
    FEWEST,
    RESAMPLES,
    Estimate,
    estimate,
    verdict,
)

__all__ = ["page", "report"]


def report(records: Iterable[Record], folder: Path, says: Mapping[str, str] | None = None) -> None:
    """Writes `folder/results.md` and the figures in `folder/results/`.

    Args:
        records: of the store, in any order; some or all of the runs.
        says: what each arm trains, in the order of the tables. None: of `experiments.arms`.

    Raises:
        ImportError: without matplotlib.
    """
    defaults: Mapping[str, Mapping[str, Any]] = {}
    if says is None:
        says, defaults = _of_the_code()
    records = [_complete(record, defaults.get(record["kind"], {})) for record in records]
    text, drawn = page(records, says), figures(records, says)
    (folder / "results").mkdir(parents=True, exist_ok=True)
    for name in PICTURES:
        path = folder / "results" / f"{name}.png"
        path.unlink(missing_ok=True)  # one of other records
        if name in drawn:
            drawn[name].savefig(path, dpi=100, metadata={"Software": None})
    (folder / "results.md").write_text(text, encoding="utf-8")


def _of_the_code() -> tuple[Mapping[str, str], Mapping[str, Mapping[str, Any]]]:
    """What each arm trains; and what a specification leaves out, by the kind of the record."""
    from experiments.arms import ARMS
    from experiments.models import Pretraining
    from experiments.training import Training

    defaults = {
        kind: {
            f.name: f.default
            for f in dataclasses.fields(cls)
            if f.default is not dataclasses.MISSING
        }
        for kind, cls in (("pretrain", Pretraining), ("train", Training))
    }
    return {name: arm.says for name, arm in ARMS.items()}, defaults


def _complete(record: Record, defaults: Mapping[str, Any]) -> Record:
    if "model" in record["spec"]:  # which is not pretrained here
        return record
    return {**record, "spec": {**defaults, **record["spec"]}}


class Column(NamedTuple):
    measure: str
    format: str


FORGETTING = Column("forgetting", "+.3f")
REWARD = Column("final reward", ".3f")
TRAINING = (
    FORGETTING,
    REWARD,
    Column("mean reward", ".3f"),
    Column("GFLOP a step", ",.3g"),
    Column("gain per PFLOP", "+,.3g"),
    Column("concentration q", "+.3f"),
    Column("concentration k", "+.3f"),
)
SELECTION = (
    Column("trained rows", ".2f"),
    Column("share of abs. activation", ".3f"),
    Column("overlap, steps", ".3f"),
    Column("overlap, first and last", ".3f"),
    *(Column(f"changed in bf16, {kind}", ".3f") for kind in KINDS),
)


# ---- the page ------------------------------------------------------------------------------------


def page(records: Iterable[Record], says: Mapping[str, str]) -> str:
    """The text of docs/results.md: the same records, the same text."""
    records = list(records)
    main, small = Findings(records, says, *MAIN), Findings(records, says, "smollm2")
    families = families_of(main)
    parts = [
        ["# Do salient rows help?"],
        _intro(),
        ["## What was found"],
        _found(main, families["claims"]),
        ["## How"],
        _how(main, small, families, says),
        ["## Accuracy, reward, cost"],
        _columns(),
        _picture(main, "lengths"),
        _picture(main, "rewards"),
        *(_method(main, method, families) for method in main.methods),
        _others(main, families),
        _same_rate(Findings(records, says, "same_rate")),
        ["## Where the magnitude is"],
        _concentration(main),
        _picture(main, "concentration"),
        _emergence(Findings(records, says, "emergence")),
        ["## What the selection does"],
        _selection(main),
        _picture(main, "moved"),
        ["## SmolLM2"],
        _small(small),
        ["## Limits"],
        _limits(main),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _intro() -> list[str]:
    return [
        *_code("python -m experiments run --config main", "python -m experiments report"),
        "",
        *_prose(
            "Small transformers are pretrained on recall, and trained further by SFT, GRPO and "
            "DAPO under arms that differ in the rows of q and k that they update. Every number "
            "on this page is computed from the records of these runs by the second command. "
            f"Intervals are of 95 %, bootstraps over seeds ({RESAMPLES:,} resamples); a dash is a "
            "run that is not there, or a measure that it does not have."
        ),
    ]


def _found(findings: Findings, family: Family) -> list[str]:
    command = f"`python -m experiments run --config {findings.configs[0]}`"
    corrected = holm_corrected(family)
    head = ["verdict", "difference", "p, t test", "p, sign flips", "p, Holm", "n"]

    def row(name: str, comparison: Comparison) -> list[str]:
        if (found := family.get(comparison)) is None:
            return [name, *"-" * len(head)]
        return [
            name,
            f"**{verdict(found, corrected[comparison])}**",
            _show(found.estimate, "+.3f"),
            _p(found.t_p),
            _p(found.flip_p),
            _p(corrected[comparison]),
            _n(found.estimate),
        ]

    return [
        *_table(
            ["claim", *head, "command"],
            [[*row(claim.text, claim.comparison), command] for claim in CLAIMS],
        ),
        "",
        *_prose(
            "Differences are of accuracy on held-out prompts at the trained length (1x), over "
            "all methods, if the claim does not say otherwise; (a) is of the share of the summed "
            "|activation| that the top 30 % of the channels carry in the pretrained models. Runs "
            "are paired by base and seed; n counts these, in brackets the pairs. p is two-sided, "
            f"and corrected (Holm) over the {len(family)} comparisons of this section."
        ),
        "",
        *_prose(
            "**Supported**: the interval is above 0, and the corrected p of the t test is below "
            f"{ALPHA}. **Not supported**: the interval has no value above 0. **Undecided**: all "
            f"else, and whatever has fewer than {FEWEST} seeds, of which these intervals are too "
            "short, or no difference in any seed, as where both arms answer everything or nothing."
        ),
        "",
        "Claim (b), longact minus full, in detail:",
        "",
        *_table(
            ["method, length", *head],
            [row(f"{c.method or 'all methods'}, {c.measure}", c) for c in details(findings)],
        ),
    ]


def _how(
    main: Findings, small: Findings, families: Mapping[str, Family], says: Mapping[str, str]
) -> list[str]:
    records = [*main.records, *small.records]
    commits = sorted({r["commit"][:12] + ("+" if r.get("dirty") else "") for r in records})
    versions = sorted({f"{k} {v}" for r in records for k, v in r["versions"].items()})
    # A base that two configurations look at is one piece of work.
    hours = math.fsum(_cpu_seconds(r) for r in {_when(r): r for r in records}.values()) / 3600
    counts = [
        f"{' and '.join(s.configs)}: bases {len(s.bases)}, tuning runs {len(s.tuning)}, "
        f"final runs {len(s.runs)}"
        for s in (main, small)
    ]
    comparisons = sum(map(len, families.values()))
    groups = sum(map(bool, families.values()))
    return [
        *_prose(
            f"Records of {'; '.join(counts)} (a run that was repeated counts once, as it came out "
            f"last). {comparisons} comparisons in {groups} families, each "
            "corrected by itself: the claims, and of each method the main arms and the others. "
            f"{hours:,.1f} hours of CPU (where a record does not have it: time x threads)."
        ),
        "",
        *_prose(f"Commits (+: with changes not committed): {', '.join(commits) or '-'}."),
        *_prose(f"Versions: {', '.join(versions) or '-'}."),
        "",
        "Models, pretrained here:",
        "",
        *_models(main),
        "",
        "Training (a prompt is one example in SFT times the completions):",
        "",
        *_training(main),
        "",
        "Arms:",
        "",
        *_table(["arm", "what is trained"], [[arm, says.get(arm, "-")] for arm in main.arms]),
        "",
        *_tuning(main),
    ]


def _when(record: Record) -> tuple[str, str]:
    return record["key"], record["finished"]


def _cpu_seconds(record: Record) -> float:
    return float(record.get("cpu_seconds", record["seconds"] * record.get("threads", 1)))


def _models(findings: Findings) -> list[str]:
    groups: dict[str, list[Record]] = {}
    for base in findings.bases:
        groups.setdefault(as_text({**base["spec"], "seed": None}), []).append(base)
    fields = {
        "model": ("architecture",),
        "layers x width": ("layers", "width"),
        "heads x of k and v": ("heads", "kv_heads"),
        "rope_theta": ("rope_theta",),
        "steps x tokens": ("steps", "tokens"),
        "lr": ("learning_rate",),
    }

    def row(bases: Sequence[Record]) -> list[str]:
        spec = bases[0]["spec"]
        return [
            *(" x ".join(str(spec.get(f, "-")) for f in names) for names in fields.values()),
            f"{bases[0]['metrics']['parameters']:,}",
            str(len(bases)),
        ]

    accuracy = [base["metrics"]["accuracy"] for base in findings.bases]
    names = sorted({name for scores in accuracy for name in scores}, key=natural)
    return [
        *_table([*fields, "parameters", "seeds"], map(row, groups.values())),
        "",
        *_table(
            ["evaluated on", "accuracy"],
            [[n, _show(estimate(a[n] for a in accuracy if n in a), ".3f")] for n in names],
        ),
    ]


def _training(findings: Findings) -> list[str]:
    rows = []
    for method in findings.methods:
        runs = [run for run in findings.runs if run.method == method]
        for setting in sorted({setting_of(run) for run in runs}):
            spec = json.loads(setting)
            same = [run for run in runs if setting_of(run) == setting]
            tasks = {name: task_text(task) for name, task in spec["evaluations"].items()}
            rows.append(
                [
                    method,
                    task_text(spec["task"]),
                    f"{spec['steps']:,}",
                    f"{spec.get('prompts', '-')} x {spec.get('generations', '-')}",
                    f"{spec.get('examples', '-')} ({spec.get('split', '-')})",
                    "; ".join(f"{name}: {tasks[name]}" for name in sorted(tasks, key=natural)),
                    str(len({run.unit for run in same})),
                    str(len(same)),
                ]
            )
    head = ["method", "task", "steps", "prompts x completions", "prompts of an evaluation"]
    return _table([*head, "evaluations", "seeds", "runs"], rows)


def _tuning(findings: Findings) -> list[str]:
    grids, used = _grids(findings), _used(findings)
    rates = sorted({rate for grid in grids.values() for rate in grid})
    seeds = ", ".join(map(str, sorted({run.seed for run in findings.tuning}))) or "-"

    def show(cell: Cell, rate: float) -> str:
        if (score := grids.get(cell, {}).get(rate)) is None:
            return "-"
        return f"**{score:.3f}**" if rate in used[cell] else f"{score:.3f}"

    chosen = _chosen(findings)
    best = sum(grid[rate] == max(grid.values()) for rate, grid in chosen)
    return [
        *_prose(
            "Learning rates: of each arm, in each method, the one of a grid with the best "
            "validation accuracy at the trained length, of equals the lowest, in a run of the "
            f"tuning seed ({seeds}) at each. Of the "
            f"final runs' {len(chosen)} rates that are in a grid {best} are its best. Validation "
            "accuracy, in bold where the final runs have that rate:"
        ),
        "",
        *_table(
            ["method", "arm", *(f"{rate:g}" for rate in rates), "final runs"],
            [[*cell, *(show(cell, rate) for rate in rates), _rates(used[cell])] for cell in used],
        ),
    ]


Cell = tuple[str, str]  # method and arm


def _grids(findings: Findings) -> dict[Cell, dict[float, float]]:
    """Learning rate -> validation accuracy, of each method and arm that was tuned."""
    scores: dict[Cell, dict[float, list[float]]] = {}
    for run in findings.tuning:
        if "validation" in run.measures:
            grid = scores.setdefault((run.method, run.arm), {})
            grid.setdefault(run.learning_rate, []).append(run.measures["validation"])
    return {
        cell: {rate: plain.fmean(found) for rate, found in grid.items()}
        for cell, grid in scores.items()
    }


def _chosen(findings: Findings) -> list[tuple[float, dict[float, float]]]:
    """Learning rates of the final runs, each with the grid that it is from."""
    used = _used(findings)
    return [
        (rate, grid)
        for cell, grid in _grids(findings).items()
        for rate in sorted(used[cell])
        if rate in grid
    ]


def _used(findings: Findings) -> dict[Cell, set[float]]:
    """Learning rates of the final runs, of each method and arm that was tuned or run."""
    tuned = {(run.method, run.arm) for run in findings.tuning}
    arms = [*findings.arms, *sorted({arm for _, arm in tuned} - set(findings.arms))]
    methods = [*findings.methods, *sorted({method for method, _ in tuned} - set(findings.methods))]
    return {
        (method, arm): {run.learning_rate for run in findings.of(arm, method)}
        for method in methods
        for arm in arms
        if (method, arm) in tuned or findings.of(arm, method)
    }


def _rates(rates: Iterable[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in sorted(rates)) or "-"


def _arms_table(findings: Findings, method: str, arms: Iterable[str]) -> list[str]:
    columns = [*(Column(name, ".3f") for name in findings.evaluations), *TRAINING]

    def row(arm: str) -> list[str]:
        runs = findings.of(arm, method)
        cells = [_show(findings.estimate(c.measure, arm, method), c.format) for c in columns]
        return [arm, _rates({run.learning_rate for run in runs}), str(len(runs)), *cells]

    before = {
        (run.method, run.unit): run.before for run in findings.runs if run.method == method
    }  # the same of every arm
    start = [
        _show(estimate_of({k: a[name] for k, a in before.items() if name in a}), ".3f")
        for name in findings.evaluations
    ]
    return _table(
        ["arm", "lr", "n", *(c.measure for c in columns)],
        [
            ["before", "-", str(len(before)), *start, *("-" for _ in TRAINING)],
            *(row(arm) for arm in arms if findings.of(arm, method)),
        ],
    )


def _differences(
    findings: Findings, family: Family, method: str, pairs: Iterable[tuple[str, str]]
) -> list[str]:
    corrected = holm_corrected(family)

    def cell(comparison: Comparison) -> str:
        if (found := family.get(comparison)) is None:
            return "-"
        p = f"p {_p(found.t_p)} ({_p(corrected[comparison])})"
        return f"{_show(found.estimate, '+.3f')}, {p}"

    return _table(
        ["difference", *findings.evaluations],
        [
            [f"{a} - {b}", *(cell(Comparison(a, b, method, at)) for at in findings.evaluations)]
            for a, b in pairs
            if findings.of(a, method)
        ],
    )


def _columns() -> list[str]:
    return _prose(
        "1x, 2x, 4x: accuracy by length, of the trained one. Forgetting: accuracy on the "
        "pretraining task, after minus before. Final reward: mean of the last tenth of the steps. "
        "Gain per PFLOP: of the accuracy at the trained length. Concentration: change of the share "
        "of |activation| in the top 30 % of the channels. n: seeds."
    )


def _method(findings: Findings, method: str, families: Mapping[str, Family]) -> list[str]:
    main = [arm for arm in findings.arms if arm in MAIN_ARMS]
    family = families[f"{method} main"]
    lines = [
        f"### {method.upper()}",
        "",
        *_arms_table(findings, method, main),
        "",
        *_prose(
            "Paired differences, with p of the t test and in brackets after Holm over the "
            f"{len(family)} of these tables:"
        ),
    ]
    for other in REFERENCES:
        lines += ["", *_differences(findings, family, method, against(main, other))]
    return lines


def _others(findings: Findings, families: Mapping[str, Family]) -> list[str]:
    others = [arm for arm in findings.arms if arm not in MAIN_ARMS]
    lines = ["## Other arms"]
    if not others:
        return [*lines, "", "-"]
    lines += [
        "",
        *_code(f"python -m experiments run --config {findings.configs[1]}"),
        "",
        *_prose(
            "Variants, each against the arm that it is a variant of (longact, or sparse). Tables "
            "and differences as above; Holm within each method."
        ),
    ]
    for method in findings.methods:
        if not any(findings.of(arm, method) for arm in others):
            continue
        references = [arm for arm in ("longact", "sparse") if findings.of(arm, method)]
        lines += [
            "",
            f"### {method.upper()}: other arms",
            "",
            *_arms_table(findings, method, [*references, *others]),
            "",
            *_differences(
                findings,
                families[f"{method} others"],
                method,
                [(arm, variant_of(arm)) for arm in others],
            ),
        ]
    return lines


def _same_rate(findings: Findings) -> list[str]:
    """The main arms where the learning rate is no difference between them."""
    if not findings.runs:
        return []
    pairs = [
        pair
        for other in REFERENCES
        if other in findings.arms
        for pair in against(findings.arms, other)
    ]
    lines = [
        "## At the same learning rate",
        "",
        *_code(f"python -m experiments run --config {findings.configs[0]}"),
        "",
        *_prose(
            "Tuning has one run at each rate, and may give an arm another rate than the others by "
            "a prompt or two of the validation. Here all have one. This was added after the "
            "results above were seen: no claim is judged by it."
        ),
    ]
    for method in findings.methods:
        family = family_of(
            findings,
            [Comparison(*pair, method, at) for pair in pairs for at in findings.evaluations],
        )
        lines += [
            "",
            *_arms_table(findings, method, findings.arms),
            "",
            *_differences(findings, family, method, pairs),
        ]
    return lines


def _concentration(findings: Findings) -> list[str]:
    columns = {"top_share": "top 30 % of the channels", "largest_over_median": "largest / median"}
    return [
        *_prose(
            "Share of the summed |activation| in the largest 30 % of the channels, and the largest "
            "channel over the median one; means over the layers of the pretrained models. Were all "
            f"channels equal, the share would be {CHANCE}."
        ),
        "",
        *_table(
            ["", *columns.values(), "n"],
            [
                [
                    kind,
                    _show(estimate(findings.concentration(kind).values()), ".3f"),
                    _show(
                        estimate(findings.concentration(kind, "largest_over_median").values()),
                        ".2f",
                    ),
                    str(len(findings.bases)),
                ]
                for kind in KINDS
            ],
        ),
    ]


def _emergence(findings: Findings) -> list[str]:
    """The pretrained models of a configuration, by what their specifications do not share."""
    groups: dict[str, list[Record]] = {}
    for base in findings.bases:
        groups.setdefault(as_text({**base["spec"], "seed": None}), []).append(base)
    specs = [dict(json.loads(text)) for text in groups]
    differing = [
        name
        for name in sorted({name for spec in specs for name in spec})
        if len({as_text(spec.get(name)) for spec in specs}) > 1
    ]
    if not differing:
        return []

    lengths = {n for base in findings.bases for n in base["metrics"]["accuracy"] if "0 hops" in n}
    longest = max(lengths, key=natural)

    def row(spec: Mapping[str, Any], bases: Sequence[Record]) -> list[str]:
        found = [base["metrics"] for base in bases]
        of_kinds = [
            _show(estimate(m["concentration"][kind][measure] for m in found), style)
            for measure, style in (("top_share", ".3f"), ("largest_over_median", ".1f"))
            for kind in KINDS
        ]
        return [
            ", ".join(f"{name} {spec.get(name)}" for name in differing),
            *of_kinds,
            _show(estimate(m["accuracy"][longest] for m in found), ".3f"),
            str(len(bases)),
        ]

    return [
        *_code("python -m experiments run --config emergence"),
        "",
        *_prose(
            "What makes them concentrate: models pretrained with one thing changed in each; shares "
            "and ratios as above, and the accuracy on the longest contexts "
            f"({longest})."
        ),
        "",
        *_table(
            [
                "model",
                *(f"share {kind}" for kind in KINDS),
                *(f"ratio {kind}" for kind in KINDS),
                "accuracy",
                "n",
            ],
            [row(spec, bases) for spec, bases in zip(specs, groups.values(), strict=True)],
        ),
    ]


def _selection(findings: Findings) -> list[str]:
    return [
        *_prose(
            "What a step selects: share of the rows of q and k, what they carry of |activation|, "
            "their overlap with those of the step before, and of the first with the last (for "
            "arms that do not select: of what they would). Last, the share of the weights whose "
            "bf16 rounding the run changed (arXiv 2505.11711 finds 5 to 30 % of the weights of a "
            "model after RL):"
        ),
        "",
        *_selection_table(findings),
        "",
        *_prose(
            "Overlap of the rows that the full update moves most with those that were salient "
            f"before (chance: {CHANCE}), mean over the layers, and layer by layer:"
        ),
        "",
        *_moved_layers(findings),
        "",
        "The same within each head, mean over all methods:",
        "",
        *_moved_heads(findings),
        "",
        *_overlaps(findings),
    ]


def _selection_table(findings: Findings) -> list[str]:
    return _table(
        ["method", "arm", "n", *(c.measure for c in SELECTION)],
        [
            [
                method,
                arm,
                str(len(runs)),
                *(_show(findings.estimate(c.measure, arm, method), c.format) for c in SELECTION),
            ]
            for method in findings.methods
            for arm in findings.arms
            if (runs := findings.of(arm, method))
        ],
    )


def _moved_layers(findings: Findings) -> list[str]:
    layers = layers_of(findings)
    return _table(
        ["method", "", "all layers", *(f"layer {layer}" for layer in layers)],
        [
            [
                method,
                kind,
                _show(findings.estimate(f"moved {kind}", "full", method), ".3f"),
                *(
                    _show(estimate_of(moved_overlap(findings, kind, i, method)), ".3f")
                    for i in layers
                ),
            ]
            for method in findings.methods
            for kind in KINDS
        ],
    )


def _moved_heads(findings: Findings) -> list[str]:
    layers = layers_of(findings)
    counts = [
        len(heads)
        for run in findings.of("full")
        for kind in KINDS
        for heads in run.record["metrics"]["moved"][kind]["head_overlap"]
    ]
    heads = range(max(counts, default=0))
    return _table(
        ["", "layer", *(f"head {head}" for head in heads)],
        [
            [
                kind,
                str(i),
                *(_show(estimate_of(head_overlap(findings, kind, i, h)), ".3f") for h in heads),
            ]
            for kind in KINDS
            for i in layers
        ],
    )


def _overlaps(findings: Findings) -> list[str]:
    metrics = [record["metrics"] for record in findings.selections]
    lengths = sorted(
        {n for m in metrics for kind in m.get("lengths", {}).values() for n in kind}, key=natural
    )

    def show(*path: str) -> str:
        found = [functools.reduce(lambda d, name: d.get(name, {}), path, m) for m in metrics]
        return _show(estimate(value for value in found if value not in (None, {})), ".3f")

    return [
        *_prose(
            f"Overlap of what {len(metrics)} bases select (chance: {CHANCE}): from other texts, "
            "from another task, in other heads, and from shorter contexts against the longest:"
        ),
        "",
        *_table(
            ["", "texts", "tasks", "heads", *(f"length {length}" for length in lengths)],
            [
                [
                    kind,
                    *(show(what, kind) for what in ("texts", "tasks", "heads")),
                    *(show("lengths", kind, length) for length in lengths),
                ]
                for kind in KINDS
            ],
        ),
    ]


def _small(findings: Findings) -> list[str]:
    columns = [*(Column(name, ".3f") for name in findings.evaluations), *TRAINING, *SELECTION]
    ordered = sorted(findings.runs, key=lambda run: findings.methods.index(run.method))
    lines = [
        *_code("python -m experiments run --config smollm2", "python -m experiments report"),
        "",
        *_prose(
            "SmolLM2-135M-Instruct, each run for itself: too few seeds for intervals, or for any "
            "of the claims above. Rows `before` are of the model as it is."
        ),
        "",
        *_table(
            ["method", "arm", "seed", "lr", *(c.measure for c in columns)],
            [
                *_before(findings, len(TRAINING) + len(SELECTION)),
                *(
                    [
                        run.method,
                        run.arm,
                        str(run.seed),
                        f"{run.learning_rate:g}",
                        *(_number(run.measures.get(c.measure), c.format) for c in columns),
                    ]
                    for run in ordered
                ),
            ],
        ),
    ]
    return [*lines, "", *_overlaps(findings)] if findings.selections else lines


def _before(findings: Findings, others: int) -> list[list[str]]:
    """A row for each set of scores that the runs of a configuration found before they trained."""
    rows = [
        (
            run.method,
            "before",
            *"--",
            *(_number(run.before.get(name), ".3f") for name in findings.evaluations),
            *"-" * others,
        )
        for method in findings.methods
        for run in findings.runs
        if run.method == method
    ]
    return [list(row) for row in dict.fromkeys(rows)]


def _limits(findings: Findings) -> list[str]:
    chosen = _chosen(findings)
    edges = sum(rate in (min(grid), max(grid)) for rate, grid in chosen)
    bases = len({as_text(run.record["spec"]["base"]) for run in findings.runs})
    seeds = len({run.seed for run in findings.runs})
    sizes = sorted({base["metrics"]["parameters"] for base in findings.bases})
    size = " and ".join(f"{n / 1e6:.2f}" for n in sizes) or "-"
    items = [
        f"The models have {size} million parameters and are pretrained on the task family that "
        "they are then trained on. The paper's have billions: that something is not found here "
        "does not say that it is not there.",
        f"Intervals and p are over seeds, which vary the pretrained model ({bases} for {seeds} "
        "seeds; those that share one count as independent), the data and the sampling: not over "
        "tasks, or learning rates.",
        f"Learning rates come from a coarse grid and the tuning seed; {edges} of {len(chosen)} are "
        "at an edge of their grid, where a better one may lie outside.",
        "Bootstrap intervals of few seeds are too short, and the t test takes the differences to "
        "be normal; sign flips take less for granted, but of n seeds their p is never below 2 / "
        "2^n.",
        "Tables of a method hold many comparisons that no claim asks for: they are to look at, and "
        "those of other families are not corrected for.",
        "FLOPs are counted from tokens, those of generation with them, and of the decoder alone: "
        "they are no measure of time.",
    ]
    return [line for item in items for line in _prose(item, "- ")]


# ---- text ----------------------------------------------------------------------------------------


def _prose(text: str, bullet: str = "") -> list[str]:
    return textwrap.wrap(
        text,
        112,
        initial_indent=bullet,
        subsequent_indent=" " * len(bullet),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _code(*commands: str) -> list[str]:
    return ["```bash", *commands, "```"]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    rows = list(rows) or [["-"] * len(head)]
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _number(value: float | None, style: str) -> str:
    if value is None:
        return "-"
    text = format(value, style)
    # No difference has no sign.
    return text if any(c in "123456789n" for c in text.split("e")[0]) else text.lstrip("+-")


def _show(found: Estimate | None, style: str) -> str:
    """Mean and interval."""
    if found is None:
        return "-"
    number = functools.partial(_number, style=style)
    if math.isnan(found.low):
        return number(found.mean)
    return f"{number(found.mean)} [{number(found.low)}, {number(found.high)}]"


def _p(p: float) -> str:
    if math.isnan(p):
        return "-"
    return "<0.0001" if p < 0.0001 else f"{p:.2g}" if p < 0.1 else f"{p:.2f}"


def _n(found: Estimate) -> str:
    pairs = f" ({found.values})" if found.values != found.seeds else ""
    return f"{found.seeds}{pairs}"


def _picture(findings: Findings, name: str) -> list[str]:
    picture = PICTURES[name]
    return [f"![{picture.title}](results/{name}.png)"] if picture.shown(findings) else []
