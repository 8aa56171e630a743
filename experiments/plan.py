"""From a configuration to the runs it asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from experiments.arms import ARMS
from experiments.store import Record, key_of

__all__ = ["CONFIGS", "Run", "plan", "read_config"]

CONFIGS = Path(__file__).with_name("configs")


@dataclass(frozen=True)
class Run:
    """`kind` says which function computes its metrics, `stage` what they are for."""

    kind: str
    stage: str
    spec: Mapping[str, Any]

    @property
    def key(self) -> str:
        return key_of(self.kind, self.spec)


def read_config(name: str) -> dict[str, Any]:
    """A file of `configs/`, or a path.

    Raises:
        ValueError: there is none; an arm or a key that does not exist.
    """
    known = {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}
    path = known.get(name, Path(name))
    if not path.is_file():
        raise ValueError(f"config={name!r}: give one of {', '.join(known)}, or a YAML file")
    config: dict[str, Any] = {"name": path.stem, **yaml.safe_load(path.read_text())}
    unknown = set(config) - {"name", "bases", "models", "selection", "groups"}
    if unknown:
        raise ValueError(f"config={name!r}: {sorted(unknown)} mean nothing here")
    for group in config.get("groups", ()):
        for arm in group["arms"]:
            if arm not in ARMS:
                raise ValueError(f"config={name!r}: arm {arm!r} does not exist: {', '.join(ARMS)}")
    return config


def plan(config: Mapping[str, Any], records: Mapping[str, Record]) -> list[Run]:
    """The runs of the first stage that is not complete; none, when all are.

    What is tuned must be known before the final runs are: their learning rates depend on it.
    """
    for runs in _stages(config, records):
        missing = [run for run in runs if run.key not in records]
        if missing:
            return list({run.key: run for run in missing}.values())
    return []


def _stages(config: Mapping[str, Any], records: Mapping[str, Record]) -> Iterator[list[Run]]:
    yield [Run("pretrain", "base", base) for base in bases(config) if "model" not in base]
    groups = config.get("groups", ())
    yield [
        Run("selection", "selection", {"base": base, **config["selection"]})
        for base in bases(config)
        if "selection" in config
    ] + [run for group in groups for run in tuning(config, group)]
    runs = [run for group in groups for run in final(config, group, records)]
    yield sorted(runs, key=lambda run: run.spec["seed"])  # cut short, a store has all arms alike


def bases(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The models to start from: one for each seed of each pretraining, or one by its name."""
    given = config["bases"]
    return [
        {**{name: value for name, value in fields.items() if name != "seeds"}, **seed}
        for fields in (given if isinstance(given, list) else [given])
        for seed in ([{"seed": n} for n in fields["seeds"]] if "seeds" in fields else [{}])
    ]


def tuning(config: Mapping[str, Any], group: Mapping[str, Any]) -> list[Run]:
    """Each arm at each learning rate, on examples and a seed that no final run has."""
    tune = group.get("tuning")
    if tune is None:
        return []
    return [
        run
        for method in group["methods"]
        for arm in group["arms"]
        for run in candidates(config, group, method, arm)
    ]


def candidates(
    config: Mapping[str, Any], group: Mapping[str, Any], method: str, arm: str
) -> list[Run]:
    """One arm's runs at the learning rates of its kind, with the evaluation that chooses alone."""
    tune = group["tuning"]
    kind = "sparse" if arm.startswith("sparse") else "others"
    judged = {**group, "evaluations": dict([next(iter(group["evaluations"].items()))])}
    return [
        Run(
            "train",
            "tune",
            _spec(config, judged, method, arm, rate, tune["seed"], split="validation"),
        )
        for rate in tune["learning_rates"][method][kind]
    ]


def final(
    config: Mapping[str, Any], group: Mapping[str, Any], records: Mapping[str, Record]
) -> list[Run]:
    """Every seed of each arm, at the arm's learning rate."""
    return [
        Run("train", "final", _spec(config, group, method, arm, rate, seed, split="test"))
        for seed in group["seeds"]
        for method in group["methods"]
        for arm in group["arms"]
        for rate in [learning_rate(config, group, method, arm, records)]
    ]


def learning_rate(
    config: Mapping[str, Any],
    group: Mapping[str, Any],
    method: str,
    arm: str,
    records: Mapping[str, Record],
) -> float:
    """The group's, or the one whose tuning run answers most of the first evaluation; of equals the
    lowest."""
    if "tuning" not in group:
        return float({**group, **group["methods"][method]}["learning_rate"])
    found = [records[run.key] for run in candidates(config, group, method, arm)]
    measure = next(iter(group["evaluations"]))
    scores: dict[float, float] = {
        record["spec"]["learning_rate"]: record["metrics"]["after"]["accuracy"][measure]
        for record in found
    }
    return max(sorted(scores), key=lambda rate: scores[rate])


def _spec(
    config: Mapping[str, Any],
    group: Mapping[str, Any],
    method: str,
    arm: str,
    learning_rate: float,
    seed: int,
    split: str,
) -> dict[str, Any]:
    all_bases = bases(config)
    shared = {name: value for name, value in group.items() if name not in _OF_GROUPS}
    return {
        "base": all_bases[seed % len(all_bases)],
        "method": method,
        "arm": arm,
        **shared,
        **group["methods"][method],
        "learning_rate": learning_rate,
        "seed": seed,
        "split": split,
    }


_OF_GROUPS = {"methods", "arms", "seeds", "tuning"}
