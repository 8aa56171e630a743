"""docs/results.md and its figures, from the records of the store and nothing else."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import statistics as plain
import textwrap
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from experiments.statistics import (
    ALPHA,
    FEWEST,
    RESAMPLES,
    Difference,
    Estimate,
    difference,
    estimate,
    holm,
    verdict,
)

__all__ = ["figures", "page", "report"]

Record = Mapping[str, Any]
Values = dict[tuple[str, Hashable], float]  # of a method, and a base and a seed

METHODS = ("sft", "grpo", "dapo")
LENGTHS = ("1x", "2x", "4x")
KINDS = ("q", "k", "v")
PRETRAINING = "pretraining"  # the evaluation that training may make worse
CHANCE = 0.3  # experiments.measures.moved compares 30 % of the rows with 30 %


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


# ---- records -> runs -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A training run, with all that is told of it in one flat mapping."""

    method: str
    arm: str
    learning_rate: float
    seed: int
    unit: Hashable  # base and seed: what runs of other arms are paired by
    measures: Mapping[str, float]  # what it does not have is not in it
    before: Mapping[str, float]  # accuracy
    record: Record


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


def _run(record: Record) -> Run:
    spec, metrics = record["spec"], record["metrics"]
    before, after = metrics["before"]["accuracy"], metrics["after"]["accuracy"]
    curves = metrics.get("curves", {})
    reward = curves.get("reward", [])
    steps = len(curves.get("loss", [])) or spec["steps"]  # taken: DAPO can end early
    trained = _trained(spec)
    measures = {
        **after,
        "validation": next(iter(after.values()), None),
        "forgetting": _minus(after.get(PRETRAINING), before.get(PRETRAINING)),
        "final reward": _mean(reward[-max(1, len(reward) // 10) :]),
        "mean reward": _mean(reward),
        "GFLOP a step": metrics["flops"] / steps / 1e9,
        "gain per PFLOP": _minus(after.get(trained), before.get(trained), metrics["flops"] / 1e15),
        "trained rows": metrics.get("trained_rows"),
        "share of abs. activation": _mean(curves.get("activation_share", [])),
        "overlap, steps": _mean(curves.get("overlap", [])),
        "overlap, first and last": metrics.get("first_last_overlap"),
    }
    for kind in KINDS:
        share = [metrics[when]["concentration"][kind]["top_share"] for when in ("before", "after")]
        measures[f"share {kind}"] = share[1]
        measures[f"concentration {kind}"] = share[1] - share[0]
        measures[f"changed in bf16, {kind}"] = metrics["moved"][kind]["bf16_changed"]
        measures[f"moved {kind}"] = _mean(metrics["moved"][kind]["overlap"])
    return Run(
        spec["method"],
        spec["arm"],
        spec["learning_rate"],
        spec["seed"],
        (_text(spec["base"]), spec["seed"]),
        {name: value for name, value in measures.items() if value is not None},
        before,
        record,
    )


def _trained(spec: Mapping[str, Any]) -> str:
    """The evaluation of the task that is trained on."""
    same = [
        name for name, task in spec["evaluations"].items() if _task(task) == _task(spec["task"])
    ]
    return min(same, default=LENGTHS[0], key=_natural)


def _mean(values: Sequence[float]) -> float | None:
    return plain.fmean(values) if values else None


def _minus(one: float | None, other: float | None, scale: float = 1.0) -> float | None:
    return None if one is None or other is None or not scale else (one - other) / scale


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _natural(name: str) -> list[Any]:
    """Sorts 2x before 16x."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _latest(records: Iterable[Record], identity: Callable[[Record], Hashable]) -> list[Record]:
    """The last of those that are one run, in an order that does not depend on the store's."""
    ordered = sorted(records, key=lambda r: (r["finished"], r["key"]))
    return sorted({identity(record): record for record in ordered}.values(), key=_spec)


def _spec(record: Record) -> str:
    return _text(record["spec"])


def _cell(record: Record) -> Hashable:
    """What a run is, whatever its learning rate."""
    spec = record["spec"]
    return spec["method"], spec["arm"], _text(spec["base"]), spec["seed"]


def _setting(run: Run) -> str:
    """What runs must have in common to be compared."""
    own = {"method", "arm", "learning_rate", "seed", "base"}
    return _text({key: value for key, value in run.record["spec"].items() if key not in own})


class Store:
    """The records of a configuration, and of others that add runs to it."""

    def __init__(self, records: Iterable[Record], says: Mapping[str, str], *configs: str) -> None:
        self.configs = configs
        self.records = [record for record in records if record["config"] in configs]
        order = {arm: i for i, arm in enumerate(says)}
        self.bases = _latest(self._of("pretrain", "base"), _spec)
        self.selections = _latest(self._of("selection"), _spec)
        self.tuning = [_run(record) for record in _latest(self._of("train", "tune"), _spec)]
        self.runs = [_run(record) for record in _latest(self._of("train", "final"), _cell)]
        self.runs.sort(key=lambda run: (order.get(run.arm, len(order)), run.arm))
        found = dict.fromkeys(run.method for run in self.runs)
        self.methods = [*(m for m in METHODS if m in found), *sorted(found.keys() - METHODS)]
        self.arms = list(dict.fromkeys(run.arm for run in self.runs))
        names = {name for run in self.runs for name in run.record["spec"]["evaluations"]}
        self.evaluations = sorted(names - {PRETRAINING}, key=_natural)

    def _of(self, kind: str, stage: str | None = None) -> list[Record]:
        return [r for r in self.records if r["kind"] == kind and stage in (None, r["stage"])]

    def of(self, arm: str, method: str | None = None) -> list[Run]:
        """Runs of an arm; `method=None`: of all methods."""
        return [run for run in self.runs if run.arm == arm and method in (None, run.method)]

    def values(self, measure: str, arm: str, method: str | None = None) -> Values:
        return {
            (run.method, run.unit): run.measures[measure]
            for run in self.of(arm, method)
            if measure in run.measures
        }

    def estimate(self, measure: str, arm: str, method: str | None = None) -> Estimate | None:
        return _estimate(self.values(measure, arm, method))

    def difference(
        self, arm: str, other: str, method: str | None = None, measure: str = LENGTHS[0]
    ) -> Difference | None:
        """Of one arm and the other, over the bases and seeds that both have."""
        settings = [
            {(run.method, run.unit): _setting(run) for run in self.of(name, method)}
            for name in (arm, other)
        ]
        alike = {key for key in settings[0] if settings[0][key] == settings[1].get(key)}
        one, two = (
            {k: v for k, v in self.values(measure, name, method).items() if k in alike}
            for name in (arm, other)
        )
        return difference(one, two, _unit)

    def concentration(self, kind: str, measure: str = "top_share") -> dict[Hashable, float]:
        """Of the pretrained bases."""
        return {_spec(base): base["metrics"]["concentration"][kind][measure] for base in self.bases}


def _unit(key: tuple[str, Hashable]) -> Hashable:
    return key[1]


def _estimate(values: Mapping[tuple[str, Hashable], float]) -> Estimate | None:
    return estimate(values.values(), map(_unit, values))


# ---- claims --------------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """Of two arms, or of two of q, k and v; `method=None`: over all methods."""

    arm: str
    other: str
    method: str | None = None
    measure: str = LENGTHS[0]


class Claim(NamedTuple):
    text: str
    comparison: Comparison


SHARE = "top share"  # of |activation|, in the bases
CLAIMS = (
    Claim(
        "(a) q concentrates its magnitude in few channels, v does not",
        Comparison("q", "v", measure=SHARE),
    ),
    Claim("(a) k does, v does not", Comparison("k", "v", measure=SHARE)),
    Claim(
        "(b) updating only the salient rows of q and k beats the full update",
        Comparison("longact", "full"),
    ),
    Claim("(c) it is the salience: better than random rows", Comparison("longact", "random")),
    Claim("(c) better than the lowest rows", Comparison("longact", "lowest")),
    Claim(
        "(d) with all else frozen: better than random rows", Comparison("sparse", "sparse random")
    ),
    Claim("(d) better than the lowest rows", Comparison("sparse", "sparse lowest")),
    Claim("(d) better than all rows", Comparison("sparse", "sparse all")),
    Claim("(e) q and k matter, not v", Comparison("longact", "v")),
    Claim("(e) with all else frozen", Comparison("sparse", "sparse v")),
    Claim("(f) it beats the full update with GRPO", Comparison("longact", "full", "grpo")),
    Claim("(f) with DAPO", Comparison("longact", "full", "dapo")),
    *(
        Claim(
            f"(g) it does at {length}, longer than trained",
            Comparison("longact", "full", None, length),
        )
        for length in LENGTHS[1:]
    ),
)

#: Those that a claim names; the others are compared with the one that they are a variant of.
MAIN_ARMS = {arm for _, c in CLAIMS if c.measure != SHARE for arm in (c.arm, c.other)}
REFERENCES = ("full", "random")

Family = dict[Comparison, Difference]  # what is corrected together


def _against(arms: Sequence[str], reference: str) -> list[tuple[str, str]]:
    """What is compared with a reference; with another reference is done the other way round."""
    done = REFERENCES[: REFERENCES.index(reference) + 1]
    return [(arm, reference) for arm in arms if arm not in done]


def _variant_of(arm: str) -> str:
    return "sparse" if arm.startswith("sparse") else "longact"


def _family(store: Store, comparisons: Iterable[Comparison]) -> Family:
    found = {}
    for c in dict.fromkeys(comparisons):
        if c.measure == SHARE:
            result = difference(store.concentration(c.arm), store.concentration(c.other))
        else:
            result = store.difference(*c)
        if result is not None:
            found[c] = result
    return found


def _details(store: Store) -> list[Comparison]:
    """Claim (b) at each length, per method and over all of them."""
    return [
        Comparison("longact", "full", method, length)
        for method in (*store.methods, None)
        for length in LENGTHS
    ]


def _families(store: Store) -> dict[str, Family]:
    """Of the claims, and of each method's tables: against the references, and of the variants."""
    main = [arm for arm in store.arms if arm in MAIN_ARMS]
    others = [arm for arm in store.arms if arm not in MAIN_ARMS]
    families = {"claims": _family(store, [*(c.comparison for c in CLAIMS), *_details(store)])}
    for method in store.methods:
        against = [pair for other in REFERENCES for pair in _against(main, other)]
        variants = [(arm, _variant_of(arm)) for arm in others]
        for name, pairs in (("main", against), ("others", variants)):
            families[f"{method} {name}"] = _family(
                store,
                [Comparison(*pair, method, at) for pair in pairs for at in store.evaluations],
            )
    return families


def _corrected(family: Family) -> dict[Comparison, float]:
    return holm({comparison: found.t_p for comparison, found in family.items()})


# ---- the page ------------------------------------------------------------------------------------


def page(records: Iterable[Record], says: Mapping[str, str]) -> str:
    """The text of docs/results.md: the same records, the same text."""
    records = list(records)
    main, small = Store(records, says, "main", "options"), Store(records, says, "smollm2")
    families = _families(main)
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
        _same_rate(Store(records, says, "same_rate")),
        ["## Where the magnitude is"],
        _concentration(main),
        _picture(main, "concentration"),
        _emergence(Store(records, says, "emergence")),
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


def _found(store: Store, family: Family) -> list[str]:
    command = f"`python -m experiments run --config {store.configs[0]}`"
    corrected = _corrected(family)
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
            [row(f"{c.method or 'all methods'}, {c.measure}", c) for c in _details(store)],
        ),
    ]


def _how(
    main: Store, small: Store, families: Mapping[str, Family], says: Mapping[str, str]
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


def _models(store: Store) -> list[str]:
    groups: dict[str, list[Record]] = {}
    for base in store.bases:
        groups.setdefault(_text({**base["spec"], "seed": None}), []).append(base)
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

    accuracy = [base["metrics"]["accuracy"] for base in store.bases]
    names = sorted({name for scores in accuracy for name in scores}, key=_natural)
    return [
        *_table([*fields, "parameters", "seeds"], map(row, groups.values())),
        "",
        *_table(
            ["evaluated on", "accuracy"],
            [[n, _show(estimate(a[n] for a in accuracy if n in a), ".3f")] for n in names],
        ),
    ]


def _training(store: Store) -> list[str]:
    rows = []
    for method in store.methods:
        runs = [run for run in store.runs if run.method == method]
        for setting in sorted({_setting(run) for run in runs}):
            spec = json.loads(setting)
            same = [run for run in runs if _setting(run) == setting]
            tasks = {name: _task(task) for name, task in spec["evaluations"].items()}
            rows.append(
                [
                    method,
                    _task(spec["task"]),
                    f"{spec['steps']:,}",
                    f"{spec.get('prompts', '-')} x {spec.get('generations', '-')}",
                    f"{spec.get('examples', '-')} ({spec.get('split', '-')})",
                    "; ".join(f"{name}: {tasks[name]}" for name in sorted(tasks, key=_natural)),
                    str(len({run.unit for run in same})),
                    str(len(same)),
                ]
            )
    head = ["method", "task", "steps", "prompts x completions", "prompts of an evaluation"]
    return _table([*head, "evaluations", "seeds", "runs"], rows)


def _task(task: Mapping[str, Any]) -> str:
    options = [f"{key} {value}" for key, value in sorted(task.get("options", {}).items())]
    return ", ".join([f"{task.get('name', 'recall')} of {task['length']:,}", *options])


def _tuning(store: Store) -> list[str]:
    grids, used = _grids(store), _used(store)
    rates = sorted({rate for grid in grids.values() for rate in grid})
    seeds = ", ".join(map(str, sorted({run.seed for run in store.tuning}))) or "-"

    def show(cell: Cell, rate: float) -> str:
        if (score := grids.get(cell, {}).get(rate)) is None:
            return "-"
        return f"**{score:.3f}**" if rate in used[cell] else f"{score:.3f}"

    chosen = _chosen(store)
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


def _grids(store: Store) -> dict[Cell, dict[float, float]]:
    """Learning rate -> validation accuracy, of each method and arm that was tuned."""
    scores: dict[Cell, dict[float, list[float]]] = {}
    for run in store.tuning:
        if "validation" in run.measures:
            grid = scores.setdefault((run.method, run.arm), {})
            grid.setdefault(run.learning_rate, []).append(run.measures["validation"])
    return {
        cell: {rate: plain.fmean(found) for rate, found in grid.items()}
        for cell, grid in scores.items()
    }


def _chosen(store: Store) -> list[tuple[float, dict[float, float]]]:
    """Learning rates of the final runs, each with the grid that it is from."""
    used = _used(store)
    return [
        (rate, grid)
        for cell, grid in _grids(store).items()
        for rate in sorted(used[cell])
        if rate in grid
    ]


def _used(store: Store) -> dict[Cell, set[float]]:
    """Learning rates of the final runs, of each method and arm that was tuned or run."""
    tuned = {(run.method, run.arm) for run in store.tuning}
    arms = [*store.arms, *sorted({arm for _, arm in tuned} - set(store.arms))]
    methods = [*store.methods, *sorted({method for method, _ in tuned} - set(store.methods))]
    return {
        (method, arm): {run.learning_rate for run in store.of(arm, method)}
        for method in methods
        for arm in arms
        if (method, arm) in tuned or store.of(arm, method)
    }


def _rates(rates: Iterable[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in sorted(rates)) or "-"


def _arms_table(store: Store, method: str, arms: Iterable[str]) -> list[str]:
    columns = [*(Column(name, ".3f") for name in store.evaluations), *TRAINING]

    def row(arm: str) -> list[str]:
        runs = store.of(arm, method)
        cells = [_show(store.estimate(c.measure, arm, method), c.format) for c in columns]
        return [arm, _rates({run.learning_rate for run in runs}), str(len(runs)), *cells]

    before = {
        (run.method, run.unit): run.before for run in store.runs if run.method == method
    }  # the same of every arm
    start = [
        _show(_estimate({k: a[name] for k, a in before.items() if name in a}), ".3f")
        for name in store.evaluations
    ]
    return _table(
        ["arm", "lr", "n", *(c.measure for c in columns)],
        [
            ["before", "-", str(len(before)), *start, *("-" for _ in TRAINING)],
            *(row(arm) for arm in arms if store.of(arm, method)),
        ],
    )


def _differences(
    store: Store, family: Family, method: str, pairs: Iterable[tuple[str, str]]
) -> list[str]:
    corrected = _corrected(family)

    def cell(comparison: Comparison) -> str:
        if (found := family.get(comparison)) is None:
            return "-"
        p = f"p {_p(found.t_p)} ({_p(corrected[comparison])})"
        return f"{_show(found.estimate, '+.3f')}, {p}"

    return _table(
        ["difference", *store.evaluations],
        [
            [f"{a} - {b}", *(cell(Comparison(a, b, method, at)) for at in store.evaluations)]
            for a, b in pairs
            if store.of(a, method)
        ],
    )


def _columns() -> list[str]:
    return _prose(
        "1x, 2x, 4x: accuracy by length, of the trained one. Forgetting: accuracy on the "
        "pretraining task, after minus before. Final reward: mean of the last tenth of the steps. "
        "Gain per PFLOP: of the accuracy at the trained length. Concentration: change of the share "
        "of |activation| in the top 30 % of the channels. n: seeds."
    )


def _method(store: Store, method: str, families: Mapping[str, Family]) -> list[str]:
    main = [arm for arm in store.arms if arm in MAIN_ARMS]
    family = families[f"{method} main"]
    lines = [
        f"### {method.upper()}",
        "",
        *_arms_table(store, method, main),
        "",
        *_prose(
            "Paired differences, with p of the t test and in brackets after Holm over the "
            f"{len(family)} of these tables:"
        ),
    ]
    for other in REFERENCES:
        lines += ["", *_differences(store, family, method, _against(main, other))]
    return lines


def _others(store: Store, families: Mapping[str, Family]) -> list[str]:
    others = [arm for arm in store.arms if arm not in MAIN_ARMS]
    lines = ["## Other arms"]
    if not others:
        return [*lines, "", "-"]
    lines += [
        "",
        *_code(f"python -m experiments run --config {store.configs[1]}"),
        "",
        *_prose(
            "Variants, each against the arm that it is a variant of (longact, or sparse). Tables "
            "and differences as above; Holm within each method."
        ),
    ]
    for method in store.methods:
        if not any(store.of(arm, method) for arm in others):
            continue
        references = [arm for arm in ("longact", "sparse") if store.of(arm, method)]
        lines += [
            "",
            f"### {method.upper()}: other arms",
            "",
            *_arms_table(store, method, [*references, *others]),
            "",
            *_differences(
                store,
                families[f"{method} others"],
                method,
                [(arm, _variant_of(arm)) for arm in others],
            ),
        ]
    return lines


def _same_rate(store: Store) -> list[str]:
    """The main arms where the learning rate is no difference between them."""
    if not store.runs:
        return []
    pairs = [
        pair for other in REFERENCES if other in store.arms for pair in _against(store.arms, other)
    ]
    lines = [
        "## At the same learning rate",
        "",
        *_code(f"python -m experiments run --config {store.configs[0]}"),
        "",
        *_prose(
            "Tuning has one run at each rate, and may give an arm another rate than the others by "
            "a prompt or two of the validation. Here all have one. This was added after the "
            "results above were seen: no claim is judged by it."
        ),
    ]
    for method in store.methods:
        family = _family(
            store, [Comparison(*pair, method, at) for pair in pairs for at in store.evaluations]
        )
        lines += [
            "",
            *_arms_table(store, method, store.arms),
            "",
            *_differences(store, family, method, pairs),
        ]
    return lines


def _concentration(store: Store) -> list[str]:
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
                    _show(estimate(store.concentration(kind).values()), ".3f"),
                    _show(
                        estimate(store.concentration(kind, "largest_over_median").values()), ".2f"
                    ),
                    str(len(store.bases)),
                ]
                for kind in KINDS
            ],
        ),
    ]


def _emergence(store: Store) -> list[str]:
    """The pretrained models of a configuration, by what their specifications do not share."""
    groups: dict[str, list[Record]] = {}
    for base in store.bases:
        groups.setdefault(_text({**base["spec"], "seed": None}), []).append(base)
    specs = [dict(json.loads(text)) for text in groups]
    differing = [
        name
        for name in sorted({name for spec in specs for name in spec})
        if len({_text(spec.get(name)) for spec in specs}) > 1
    ]
    if not differing:
        return []

    lengths = {n for base in store.bases for n in base["metrics"]["accuracy"] if "0 hops" in n}
    longest = max(lengths, key=_natural)

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


def _selection(store: Store) -> list[str]:
    return [
        *_prose(
            "What a step selects: share of the rows of q and k, what they carry of |activation|, "
            "their overlap with those of the step before, and of the first with the last (for "
            "arms that do not select: of what they would). Last, the share of the weights whose "
            "bf16 rounding the run changed (arXiv 2505.11711 finds 5 to 30 % of the weights of a "
            "model after RL):"
        ),
        "",
        *_selection_table(store),
        "",
        *_prose(
            "Overlap of the rows that the full update moves most with those that were salient "
            f"before (chance: {CHANCE}), mean over the layers, and layer by layer:"
        ),
        "",
        *_moved_layers(store),
        "",
        "The same within each head, mean over all methods:",
        "",
        *_moved_heads(store),
        "",
        *_overlaps(store),
    ]


def _selection_table(store: Store) -> list[str]:
    return _table(
        ["method", "arm", "n", *(c.measure for c in SELECTION)],
        [
            [
                method,
                arm,
                str(len(runs)),
                *(_show(store.estimate(c.measure, arm, method), c.format) for c in SELECTION),
            ]
            for method in store.methods
            for arm in store.arms
            if (runs := store.of(arm, method))
        ],
    )


def _moved(store: Store, kind: str, layer: int, method: str | None = None) -> Values:
    """Overlap of moved and salient rows in one layer, of the runs that mask nothing."""
    overlaps = {
        (run.method, run.unit): run.record["metrics"]["moved"][kind]["overlap"]
        for run in store.of("full", method)
    }
    return {key: layers[layer] for key, layers in overlaps.items() if layer < len(layers)}


def _head(store: Store, kind: str, layer: int, head: int) -> Values:
    overlaps = {
        (run.method, run.unit): run.record["metrics"]["moved"][kind]["head_overlap"]
        for run in store.of("full")
    }
    return {
        key: layers[layer][head]
        for key, layers in overlaps.items()
        if layer < len(layers) and head < len(layers[layer])
    }


def _layers(store: Store) -> range:
    moved = [run.record["metrics"]["moved"]["q"]["overlap"] for run in store.of("full")]
    return range(max(map(len, moved), default=0))


def _moved_layers(store: Store) -> list[str]:
    layers = _layers(store)
    return _table(
        ["method", "", "all layers", *(f"layer {layer}" for layer in layers)],
        [
            [
                method,
                kind,
                _show(store.estimate(f"moved {kind}", "full", method), ".3f"),
                *(_show(_estimate(_moved(store, kind, i, method)), ".3f") for i in layers),
            ]
            for method in store.methods
            for kind in KINDS
        ],
    )


def _moved_heads(store: Store) -> list[str]:
    layers = _layers(store)
    counts = [
        len(heads)
        for run in store.of("full")
        for kind in KINDS
        for heads in run.record["metrics"]["moved"][kind]["head_overlap"]
    ]
    heads = range(max(counts, default=0))
    return _table(
        ["", "layer", *(f"head {head}" for head in heads)],
        [
            [kind, str(i), *(_show(_estimate(_head(store, kind, i, h)), ".3f") for h in heads)]
            for kind in KINDS
            for i in layers
        ],
    )


def _overlaps(store: Store) -> list[str]:
    metrics = [record["metrics"] for record in store.selections]
    lengths = sorted(
        {n for m in metrics for kind in m.get("lengths", {}).values() for n in kind}, key=_natural
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


def _small(store: Store) -> list[str]:
    columns = [*(Column(name, ".3f") for name in store.evaluations), *TRAINING, *SELECTION]
    ordered = sorted(store.runs, key=lambda run: store.methods.index(run.method))
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
                *_before(store, len(TRAINING) + len(SELECTION)),
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
    return [*lines, "", *_overlaps(store)] if store.selections else lines


def _before(store: Store, others: int) -> list[list[str]]:
    """A row for each set of scores that the runs of a configuration found before they trained."""
    rows = [
        (
            run.method,
            "before",
            *"--",
            *(_number(run.before.get(name), ".3f") for name in store.evaluations),
            *"-" * others,
        )
        for method in store.methods
        for run in store.runs
        if run.method == method
    ]
    return [list(row) for row in dict.fromkeys(rows)]


def _limits(store: Store) -> list[str]:
    chosen = _chosen(store)
    edges = sum(rate in (min(grid), max(grid)) for rate, grid in chosen)
    bases = len({_text(run.record["spec"]["base"]) for run in store.runs})
    seeds = len({run.seed for run in store.runs})
    sizes = sorted({base["metrics"]["parameters"] for base in store.bases})
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


def _picture(store: Store, name: str) -> list[str]:
    picture = PICTURES[name]
    return [f"![{picture.title}](results/{name}.png)"] if picture.shown(store) else []


# ---- figures -------------------------------------------------------------------------------------


class Picture(NamedTuple):
    title: str
    shown: Callable[[Store], bool]  # whether there is something to draw
    draw: Callable[[Store], Any]


def figures(records: Iterable[Record], says: Mapping[str, str]) -> dict[str, Any]:
    """Name -> matplotlib Figure, of those that there is something to draw for."""
    store = Store(records, says, "main", "options")
    return {name: p.draw(store) for name, p in PICTURES.items() if p.shown(store)}


def _axes(rows: int, columns: int, height: float = 3.2, width: float = 4.6) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure((width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, sharey="row")


def _sides(store: Store) -> dict[str, list[str]]:
    """The main arms: those that train all else, and those that freeze it."""
    main = [arm for arm in store.arms if arm in MAIN_ARMS]
    sides = {
        title: [arm for arm in main if _variant_of(arm) == name]
        for title, name in (("all else trained", "longact"), ("all else frozen", "sparse"))
    }
    return {title: arms for title, arms in sides.items() if arms}


def _rewarded(store: Store) -> list[str]:
    return [
        m
        for m in store.methods
        if any("mean reward" in run.measures for run in store.runs if run.method == m)
    ]


def _draw_rewards(store: Store) -> Any:
    import numpy as np

    methods = _rewarded(store)
    figure, axes = _axes(len(methods), len(_sides(store)))
    for method, line in zip(methods, axes, strict=True):
        for (title, arms), axis in zip(_sides(store).items(), line, strict=True):
            for color, arm in enumerate(arms):
                runs = store.of(arm, method)
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


def _draw_lengths(store: Store) -> Any:
    figure, axes = _axes(len(store.methods), len(_sides(store)))
    for method, line in zip(store.methods, axes, strict=True):
        for (title, arms), axis in zip(_sides(store).items(), line, strict=True):
            for color, arm in enumerate(arms):
                points = [
                    (i + 0.06 * (color - (len(arms) - 1) / 2), found)
                    for i, name in enumerate(store.evaluations)
                    if (found := store.estimate(name, arm, method)) is not None
                ]
                _points(axis, points, color, arm, "o-")
            axis.set_xticks(range(len(store.evaluations)), store.evaluations)
            _label(axis, f"{method.upper()}, {title}", "length, of the trained one", "accuracy")
    return figure


def _draw_concentration(store: Store) -> Any:
    figure, [[axis]] = _axes(1, 1, 3.4, 7.5)
    groups: dict[str, list[Estimate | None]] = {
        "pretrained": [estimate(store.concentration(kind).values()) for kind in KINDS]
    }
    for method in store.methods:
        for arm in ("full", "longact"):
            groups[f"{method}\n{arm}"] = [
                store.estimate(f"share {kind}", arm, method) for kind in KINDS
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


def _draw_moved(store: Store) -> Any:
    methods = [method for method in store.methods if store.of("full", method)]
    figure, axes = _axes(1, len(methods), 3.2, 3.8)
    for method, axis in zip(methods, axes[0], strict=True):
        for color, kind in enumerate(KINDS):
            points = [
                (i + 0.06 * (color - 1), found)
                for i in _layers(store)
                if (found := _estimate(_moved(store, kind, i, method))) is not None
            ]
            _points(axis, points, color, kind, "o-")
        axis.axhline(CHANCE, color="gray", ls=":", lw=1, label="chance")
        axis.set_xticks(_layers(store))
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
        "Accuracy of each arm by length", lambda store: bool(_sides(store)), _draw_lengths
    ),
    "rewards": Picture(
        "Mean reward of each step",
        lambda store: bool(_rewarded(store) and _sides(store)),
        _draw_rewards,
    ),
    "concentration": Picture(
        "What the top 30 % of the channels of q, k and v carry",
        lambda store: bool(store.bases),
        _draw_concentration,
    ),
    "moved": Picture(
        "Overlap of moved and salient rows in each layer",
        lambda store: bool(_layers(store)),
        _draw_moved,
    ),
}
