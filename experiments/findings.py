"""What the records say: runs and their measures, and the comparisons that are made of them."""

from __future__ import annotations

import json
import re
import statistics as plain
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from experiments.statistics import Difference, Estimate, difference, estimate, holm

Record = Mapping[str, Any]
Values = dict[tuple[str, Hashable], float]  # of a method, and a base and a seed

METHODS = ("sft", "grpo", "dapo")
LENGTHS = ("1x", "2x", "4x")
KINDS = ("q", "k", "v")
PRETRAINING = "pretraining"  # the evaluation that training may make worse
CHANCE = 0.3  # experiments.measures.moved compares 30 % of the rows with 30 %
MAIN = ("main", "options")  # the configurations whose runs are compared with each other


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
        (as_text(spec["base"]), spec["seed"]),
        {name: value for name, value in measures.items() if value is not None},
        before,
        record,
    )


def _trained(spec: Mapping[str, Any]) -> str:
    """The evaluation of the task that is trained on."""
    same = [
        name
        for name, task in spec["evaluations"].items()
        if task_text(task) == task_text(spec["task"])
    ]
    return min(same, default=LENGTHS[0], key=natural)


def _mean(values: Sequence[float]) -> float | None:
    return plain.fmean(values) if values else None


def _minus(one: float | None, other: float | None, scale: float = 1.0) -> float | None:
    return None if one is None or other is None or not scale else (one - other) / scale


def as_text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def natural(name: str) -> list[Any]:
    """Sorts 2x before 16x."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _latest(records: Iterable[Record], identity: Callable[[Record], Hashable]) -> list[Record]:
    """The last of those that are one run, in an order that does not depend on the store's."""
    ordered = sorted(records, key=lambda r: (r["finished"], r["key"]))
    return sorted({identity(record): record for record in ordered}.values(), key=_spec)


def _spec(record: Record) -> str:
    return as_text(record["spec"])


def _cell(record: Record) -> Hashable:
    """What a run is, whatever its learning rate."""
    spec = record["spec"]
    return spec["method"], spec["arm"], as_text(spec["base"]), spec["seed"]


def setting_of(run: Run) -> str:
    """What runs must have in common to be compared."""
    own = {"method", "arm", "learning_rate", "seed", "base"}
    return as_text({key: value for key, value in run.record["spec"].items() if key not in own})


class Findings:
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
        self.evaluations = sorted(names - {PRETRAINING}, key=natural)

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
        return estimate_of(self.values(measure, arm, method))

    def difference(
        self, arm: str, other: str, method: str | None = None, measure: str = LENGTHS[0]
    ) -> Difference | None:
        """Of one arm and the other, over the bases and seeds that both have."""
        settings = [
            {(run.method, run.unit): setting_of(run) for run in self.of(name, method)}
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


def estimate_of(values: Mapping[tuple[str, Hashable], float]) -> Estimate | None:
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


def against(arms: Sequence[str], reference: str) -> list[tuple[str, str]]:
    """What is compared with a reference; with another reference is done the other way round."""
    done = REFERENCES[: REFERENCES.index(reference) + 1]
    return [(arm, reference) for arm in arms if arm not in done]


def variant_of(arm: str) -> str:
    return "sparse" if arm.startswith("sparse") else "longact"


def family_of(findings: Findings, comparisons: Iterable[Comparison]) -> Family:
    found = {}
    for c in dict.fromkeys(comparisons):
        if c.measure == SHARE:
            result = difference(findings.concentration(c.arm), findings.concentration(c.other))
        else:
            result = findings.difference(*c)
        if result is not None:
            found[c] = result
    return found


def details(findings: Findings) -> list[Comparison]:
    """Claim (b) at each length, per method and over all of them."""
    return [
        Comparison("longact", "full", method, length)
        for method in (*findings.methods, None)
        for length in LENGTHS
    ]


def families_of(findings: Findings) -> dict[str, Family]:
    """Of the claims, and of each method's tables: against the references, and of the variants."""
    main = [arm for arm in findings.arms if arm in MAIN_ARMS]
    others = [arm for arm in findings.arms if arm not in MAIN_ARMS]
    families = {
        "claims": family_of(findings, [*(c.comparison for c in CLAIMS), *details(findings)])
    }
    for method in findings.methods:
        references = [pair for other in REFERENCES for pair in against(main, other)]
        variants = [(arm, variant_of(arm)) for arm in others]
        for name, pairs in (("main", references), ("others", variants)):
            families[f"{method} {name}"] = family_of(
                findings,
                [Comparison(*pair, method, at) for pair in pairs for at in findings.evaluations],
            )
    return families


def holm_corrected(family: Family) -> dict[Comparison, float]:
    return holm({comparison: found.t_p for comparison, found in family.items()})


def moved_overlap(findings: Findings, kind: str, layer: int, method: str | None = None) -> Values:
    """Overlap of moved and salient rows in one layer, of the runs that mask nothing."""
    overlaps = {
        (run.method, run.unit): run.record["metrics"]["moved"][kind]["overlap"]
        for run in findings.of("full", method)
    }
    return {key: layers[layer] for key, layers in overlaps.items() if layer < len(layers)}


def head_overlap(findings: Findings, kind: str, layer: int, head: int) -> Values:
    overlaps = {
        (run.method, run.unit): run.record["metrics"]["moved"][kind]["head_overlap"]
        for run in findings.of("full")
    }
    return {
        key: layers[layer][head]
        for key, layers in overlaps.items()
        if layer < len(layers) and head < len(layers[layer])
    }


def layers_of(findings: Findings) -> range:
    moved = [run.record["metrics"]["moved"]["q"]["overlap"] for run in findings.of("full")]
    return range(max(map(len, moved), default=0))


def task_text(task: Mapping[str, Any]) -> str:
    options = [f"{key} {value}" for key, value in sorted(task.get("options", {}).items())]
    return ", ".join([f"{task.get('name', 'recall')} of {task['length']:,}", *options])
