"""The experiment's statistics, and the page that it writes from a store."""

from __future__ import annotations

import copy
import math
import random
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("scipy", reason="needs scipy")
# experiments is not installed; last, so that the longact that is tested is the installed one.
sys.path.append(str(Path(__file__).parents[1]))

from experiments import statistics
from experiments.figures import PICTURES, figures
from experiments.report import page, report
from experiments.statistics import Difference, Estimate, difference, estimate, holm, verdict
from experiments.store import Store

Record = dict[str, Any]

SAYS = {
    "full": "all",
    "longact": "the top rows",
    "random": "rows at random",
    "lowest": "the lowest rows",
    "v": "the top rows of v",
    "sparse": "the top rows alone",
    "sparse random": "rows at random alone",
    "keep 0.1": "fewer",
}


# ---- synthetic records ---------------------------------------------------------------------------


def task(length: int) -> Record:
    return {"length": length, "name": "recall", "options": {"hops": 1}}


EVALUATIONS = {"1x": task(128), "2x": task(256), "4x": task(512), "pretraining": task(64)}


def record(kind: str, stage: str, spec: Record, metrics: Record, config: str = "main") -> Record:
    name = f"{config} {kind} {stage} {sorted(spec.items(), key=str)}"
    return {
        "key": name,
        "config": config,
        "kind": kind,
        "stage": stage,
        "spec": spec,
        "commit": "abc",
        "dirty": False,
        "versions": {"torch": "2.14.1"},
        "threads": 1,
        "seconds": 36.0,
        "finished": "2026-11-27T14:00:00",
        "metrics": metrics,
    }


def base(seed: int) -> Record:
    return {
        "seed": seed,
        "architecture": "llama",
        "layers": 2,
        "width": 64,
        "heads": 2,
        "kv_heads": 1,
        "rope_theta": 10_000.0,
        "steps": 100,
        "tokens": 4096,
        "learning_rate": 2e-3,
    }


def concentration(rng: random.Random) -> Record:
    return {
        kind: {"top_share": share + rng.uniform(0, 0.05), "largest_over_median": 9 * share}
        for kind, share in (("q", 0.6), ("k", 0.55), ("v", 0.4))
    }


def pretrained(seed: int) -> Record:
    rng = random.Random(seed)
    accuracy = {name: rng.uniform(0.4, 0.6) for name in EVALUATIONS}
    metrics = {"loss": [1.0], "parameters": 300_000, "accuracy": accuracy}
    metrics["concentration"] = concentration(rng)
    return record("pretrain", "base", base(seed), metrics)


def trained(
    method: str, arm: str, seed: int, benefit: float, stage: str = "final", lr: float = 1e-3
) -> Record:
    """Of a run that gets 0.5, and the benefit, and noise."""
    rng = random.Random(f"{method} {arm} {seed} {lr}")

    def look(level: float) -> Record:
        accuracy = {name: level + rng.uniform(-0.02, 0.02) for name in EVALUATIONS}
        return {"accuracy": accuracy, "concentration": concentration(rng)}

    curves = {"loss": [1.0] * 20}
    if method != "sft":
        curves["reward"] = [rng.random() for _ in range(20)]
    if arm != "full":
        curves["overlap"] = [rng.random() for _ in range(20)]
        curves["activation_share"] = [rng.random() for _ in range(20)]
    metrics = {
        "before": look(0.3),
        "after": look(0.5 + benefit),
        "flops": 2e12 + seed,
        "tokens": {"forward": 10, "backward": 10},
        "curves": curves,
        "first_last_overlap": rng.random(),
        "trained_rows": None if arm == "full" else 0.3,
        "moved": {
            kind: {
                "overlap": [rng.random() for _ in range(2)],
                "head_overlap": [[rng.random() for _ in range(heads)] for _ in range(2)],
                "bf16_changed": rng.random(),
            }
            for kind, heads in (("q", 2), ("k", 1), ("v", 1))
        },
    }
    spec = {
        "base": base(seed),
        "method": method,
        "arm": arm,
        "learning_rate": lr,
        "seed": seed,
        "steps": 20,
        "task": task(128),
        "evaluations": EVALUATIONS,
        "split": "test" if stage == "final" else "validation",
        "examples": 128,
        "prompts": 4,
        "generations": 8,
    }
    return record("train", stage, spec, metrics)


def selected(seed: int) -> Record:
    rng = random.Random(seed)
    metrics = {what: {"q": rng.random(), "k": rng.random()} for what in ("texts", "tasks", "heads")}
    metrics["heads"]["v"] = None  # it has one head
    metrics["lengths"] = {
        kind: {"64": rng.random(), "128": rng.random(), "1024": 1.0} for kind in ("q", "k")
    }
    return record("selection", "selection", {"base": base(seed)}, metrics)


def store(
    benefits: dict[str, float],
    methods: Sequence[str] = ("sft", "grpo", "dapo"),
    seeds: int = 6,
) -> list[Record]:
    """Of arms, each with its benefit in accuracy."""
    records = [pretrained(seed) for seed in range(seeds)]
    records += [selected(seed) for seed in range(2)]
    records += [
        trained(method, arm, seed, benefit)
        for method in methods
        for arm, benefit in benefits.items()
        for seed in range(seeds)
    ]
    records += [
        trained("sft", arm, 99, 0.0, "tune", lr) for arm in benefits for lr in (1e-4, 1e-3, 1e-2)
    ]
    return records


def small() -> list[Record]:
    """Of SmolLM2, whose evaluations have other names."""
    found = []
    for seed in range(2):
        one = trained("grpo", "longact", seed, 0.1)
        evaluations = {"niah 16x": task(4096), "niah 1x": task(128), "niah 2x": task(256)}
        one["config"] = "smollm2"
        one["spec"].update(base={"path": "somewhere"}, evaluations=evaluations)
        for when, add in (("before", 0.0), ("after", 0.2 + 0.1 * seed)):
            one["metrics"][when]["accuracy"] = {
                "niah 1x": 0.5 + add,
                "niah 2x": 0.25,
                "niah 16x": 0.125,
            }
        found.append(one)
    return found


def cells(text: str, *starts: str, after: str = "") -> list[str]:
    """Of the only row that starts with these cells, from `after` to the end of its section."""
    begin = "| " + " | ".join(starts) + " |"
    if after:
        text = re.split("\n##+ ", text[text.index(after) :], maxsplit=1)[0]
    [line] = [x for x in text.splitlines() if x.startswith(begin)]
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Those of the real page take seconds."""
    monkeypatch.setattr(statistics, "RESAMPLES", 500)
    statistics._interval.cache_clear()
    statistics._tests.cache_clear()
    yield
    statistics._interval.cache_clear()
    statistics._tests.cache_clear()


# ---- statistics ----------------------------------------------------------------------------------


def test_mean_and_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 10_000)
    found = estimate([0.2, 0.4, 0.9])
    assert found is not None
    assert found.mean == pytest.approx(0.5)
    assert (found.seeds, found.values) == (3, 3)
    # Of three values the smallest is drawn three times in one of 27 resamples, which is more
    # than 2.5 %: the interval is the range.
    assert (found.low, found.high) == (pytest.approx(0.2), pytest.approx(0.9))


def test_interval_narrows_as_the_standard_error() -> None:
    rng = random.Random(0)
    found = estimate([rng.gauss(1, 2) for _ in range(400)])
    assert found is not None
    assert found.high - found.low == pytest.approx(2 * 1.96 * 2 / 20, rel=0.15)


def test_estimates_of_what_has_no_spread() -> None:
    assert estimate([]) is None
    one = estimate([0.5])
    assert one is not None
    assert one.mean == 0.5
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    assert estimate([0.5, 0.5, 0.5]) == Estimate(0.5, 0.5, 0.5, 3, 3)
    broken = estimate([0.5, math.nan])
    assert broken is not None
    assert math.isnan(broken.mean)
    assert math.isnan(broken.low)


def test_seeds_are_drawn_with_all_that_they_have() -> None:
    """Values of one seed that agree are no more evidence than one of them."""
    values = [0.1, 0.3, 0.2, 0.7, 0.4]
    alone = estimate(values)
    tripled = estimate([v for v in values for _ in range(3)], [i for i in range(5) for _ in "abc"])
    independent = estimate([v for v in values for _ in range(3)])
    assert alone is not None
    assert tripled is not None
    assert independent is not None
    assert (tripled.seeds, tripled.values) == (5, 15)
    assert tripled.mean == pytest.approx(alone.mean)
    assert (tripled.low, tripled.high) == (pytest.approx(alone.low), pytest.approx(alone.high))
    assert independent.high - independent.low < 0.8 * (alone.high - alone.low)


def test_mean_is_of_all_values_where_seeds_have_unequal_many() -> None:
    found = estimate([1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"])
    assert found is not None
    assert found.mean == 0.75


def test_paired_difference() -> None:
    # Student's t of 1, 2, 3: 2 / (1 / sqrt 3) = 3.4641 with 2 degrees of freedom, p = 0.0742.
    found = difference({1: 1.0, 2: 2.0, 3: 3.0, 4: 9.0}, {3: 0.0, 2: 0.0, 1: 0.0, 5: 9.0})
    assert found is not None
    assert found.estimate.mean == 2
    assert found.estimate.seeds == 3
    assert found.t_p == pytest.approx(0.0742, abs=1e-4)
    # All 8 ways to give signs; two are as far from 0.
    assert found.flip_p == pytest.approx(2 / 8)
    assert difference({1: 1.0}, {2: 1.0}) is None


def test_pairing_removes_what_seeds_share() -> None:
    base = {seed: seed / 10 for seed in range(8)}
    better = {seed: value + 0.01 + 0.001 * (seed % 2) for seed, value in base.items()}
    found = difference(better, base)
    assert found is not None
    assert found.t_p < 1e-6
    assert found.estimate.low > 0.01


def test_differences_without_spread_are_not_certain() -> None:
    found = difference({1: 0.2, 2: 0.3, 3: 0.4}, {1: 0.1, 2: 0.2, 3: 0.3})
    assert found is not None
    assert found.t_p == found.flip_p == 0.25
    none = difference({1: 0.2, 2: 0.3}, {1: 0.2, 2: 0.3})
    assert none is not None
    assert none.t_p == none.flip_p == 1


def test_pooled_tests_are_of_seeds() -> None:
    deltas = {1: 0.1, 2: 0.3, 3: 0.2, 4: 0.25, 5: 0.05}
    alone = difference(deltas, dict.fromkeys(deltas, 0.0))
    pooled = {(m, seed): value for seed, value in deltas.items() for m in ("sft", "grpo")}
    both = difference(pooled, dict.fromkeys(pooled, 0.0), lambda key: key[1])
    assert alone is not None
    assert both is not None
    assert (both.t_p, both.flip_p) == (pytest.approx(alone.t_p), alone.flip_p)
    assert both.flip_p == 2 / 32


def test_holm() -> None:
    # Holm (1979): times 4, 3, 2, 1 from the smallest, never less than the one before.
    p = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005, "no test": math.nan}
    corrected = holm(p)
    assert list(corrected) == list(p)
    assert corrected["d"] == pytest.approx(0.02)
    assert corrected["a"] == pytest.approx(0.03)
    assert corrected["c"] == corrected["b"] == pytest.approx(0.06)
    assert math.isnan(corrected["no test"])
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


@pytest.mark.parametrize(
    ("low", "high", "seeds", "p", "expected"),
    [
        (0.01, 0.03, 8, 0.01, "supported"),
        (0.01, 0.03, 8, 0.06, "undecided"),
        (0.01, 0.03, 4, 0.01, "undecided"),
        (0.01, 0.03, 8, math.nan, "undecided"),
        (-0.01, 0.03, 8, 0.01, "undecided"),
        (-0.03, -0.01, 8, 0.9, "not supported"),
        (-0.03, 0.0, 8, 0.9, "not supported"),
        (0.0, 0.0, 8, 1.0, "undecided"),
        (-0.03, -0.01, 4, 0.01, "undecided"),
        (math.nan, math.nan, 8, 0.01, "undecided"),
    ],
)
def test_verdict(low: float, high: float, seeds: int, p: float, expected: str) -> None:
    assert verdict(Difference(Estimate(0.0, low, high, seeds, seeds), 0.0, 0.0), p) == expected


# ---- the page ------------------------------------------------------------------------------------

BETTER = "(b) updating only the salient rows of q and k beats the full update"


@pytest.mark.parametrize(
    ("benefit", "expected"),
    [(0.2, "supported"), (-0.2, "not supported"), (0.0, "undecided")],
)
def test_verdicts_of_the_page(benefit: float, expected: str) -> None:
    text = page(store({"full": 0.0, "longact": benefit}), SAYS)
    for row in [
        BETTER,
        "(f) it beats the full update with GRPO",
        "(g) it does at 4x, longer than trained",
        "dapo, 2x",
        "all methods, 1x",
    ]:
        name, found, shown, *_ = cells(text, row)
        assert found == f"**{expected}**", name
        assert float(shown.split()[0]) == pytest.approx(benefit, abs=0.02)
    assert cells(text, BETTER)[6] == "6 (18)"
    assert cells(text, "grpo, 1x")[6] == "6"
    # By construction q and k concentrate, whatever the benefit.
    assert cells(text, "(a) k does, v does not")[1] == "**supported**"
    assert cells(text, "(c) better than the lowest rows")[1:7] == ["-"] * 6


def test_claims_compare_the_arms_that_they_name() -> None:
    arms = {arm: 0.1 * i for i, arm in enumerate(sorted({"sparse lowest", "sparse all", *SAYS}))}
    text = page(store({**arms, "sparse v": 0.9}, methods=["sft"], seeds=5), SAYS)
    for row, one, other in [
        (BETTER, "longact", "full"),
        ("(c) it is the salience: better than random rows", "longact", "random"),
        ("(c) better than the lowest rows", "longact", "lowest"),
        ("(d) with all else frozen: better than random rows", "sparse", "sparse random"),
        ("(d) better than the lowest rows", "sparse", "sparse lowest"),
        ("(d) better than all rows", "sparse", "sparse all"),
        ("(e) q and k matter, not v", "longact", "v"),
    ]:
        expected = arms[one] - arms[other]
        assert float(cells(text, row)[2].split()[0]) == pytest.approx(expected, abs=0.03), row
    assert float(cells(text, "(e) with all else frozen")[2].split()[0]) < -0.2
    # Variants are compared with what they are a variant of.
    tail = text[text.index("### SFT: other arms") :]
    assert float(cells(tail, "keep 0.1 - longact")[1].split()[0]) == pytest.approx(
        arms["keep 0.1"] - arms["longact"], abs=0.03
    )
    assert "| sparse - keep" not in text


def test_cells_of_an_arm() -> None:
    records = store({"full": 0.0, "longact": 0.1}, methods=["grpo"], seeds=3)
    runs = [r for r in records if r["stage"] == "final" and r["spec"]["arm"] == "longact"]
    for i, run in enumerate(runs):
        metrics = run["metrics"]
        metrics["before"]["accuracy"].update({"1x": 0.25, "pretraining": 0.75})
        metrics["after"]["accuracy"].update({"1x": 0.5 + i / 10, "2x": 0.125, "pretraining": 0.5})
        metrics["flops"] = 4e12
        metrics["curves"]["reward"] = [0.0] * 18 + [0.5, 1.0]
        for kind, change in (("q", 0.125), ("k", -0.0625)):
            metrics["before"]["concentration"][kind]["top_share"] = 0.5
            metrics["after"]["concentration"][kind]["top_share"] = 0.5 + change
    row = cells(page(records, SAYS), "longact", "0.001", "3", after="### GRPO")
    assert row[3].startswith("0.600 [0.5")
    assert row[4] == "0.125 [0.125, 0.125]"
    assert row[6] == "-0.250 [-0.250, -0.250]"  # forgetting
    assert row[7] == "0.750 [0.750, 0.750]"  # of the last two steps
    assert row[8] == "0.075 [0.075, 0.075]"
    assert row[9] == "200 [200, 200]"  # 4e12 in 20 steps
    assert row[10].startswith("+87.5 [")  # 0.35 for 0.004 PFLOP
    assert row[11] == "+0.125 [+0.125, +0.125]"
    assert row[12] == "-0.062 [-0.062, -0.062]"


def test_sparse_variants_are_compared_with_sparse() -> None:
    benefits = {"longact": 0.0, "sparse": 0.2, "keep 0.1": 0.3, "sparse once": 0.3}
    text = page(store(benefits, methods=["sft"], seeds=2), SAYS)
    for row, expected in (("keep 0.1 - longact", 0.3), ("sparse once - sparse", 0.1)):
        assert float(cells(text, row)[1].split()[0]) == pytest.approx(expected, abs=0.05)
    assert "| sparse once - longact" not in text


def test_several_methods_are_no_more_seeds() -> None:
    records = store({"full": 0.0}, seeds=4)
    for one in records:
        if one["stage"] == "final":
            seed = one["spec"]["seed"]
            one["metrics"]["moved"]["q"]["head_overlap"] = [[seed / 10, seed**2 / 10]] * 2
    alone = [r for r in records if r["spec"].get("method") in (None, "sft")]
    rows = [cells(page(some, SAYS), "q", "1")[2:] for some in (records, alone)]
    assert rows[0] == rows[1]
    assert rows[0][0].startswith("0.150 [0.0")


def test_sft_has_no_reward() -> None:
    text = page(store({"full": 0.0}, methods=["sft"], seeds=2), SAYS)
    assert cells(text, "full", "0.001", "2", after="### SFT")[7:9] == ["-", "-"]


def test_options_are_compared_with_main_and_a_base_counts_once() -> None:
    """The records of the two configurations are those of one, but for the bases of both."""
    records = store({"longact": 0.0, "head": 0.1}, methods=["grpo"], seeds=2)
    moved = [{**r, "config": "options"} if r["spec"].get("arm") == "head" else r for r in records]
    again = [{**r, "config": "options"} for r in records if r["stage"] == "base"]
    assert again
    assert page(moved + again, SAYS) == page(records, SAYS)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        if isinstance(inner, dict | list):
            yield from leaves(inner, (*path, key))
        elif inner is not None:
            yield (*path, key)


def dotted(path: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in path if isinstance(part, str))


def test_every_number_comes_from_its_record() -> None:
    """Each measure of each kind of record is changed: the page changes, or does not show it."""
    records = store({"full": 0.0, "longact": 0.1}, methods=["grpo"], seeds=2) + small()
    original = page(records, SAYS)
    kinds = {
        (r["config"], r["kind"], r["stage"], r["spec"].get("arm")): i for i, r in enumerate(records)
    }
    ignored: dict[tuple[str, str, str | None], set[str]] = {}
    for (config, _, stage, arm), i in kinds.items():
        unseen = ignored.setdefault((config, stage, arm), set())
        for path in leaves(records[i]["metrics"]):
            changed = [*records[:i], copy.deepcopy(records[i]), *records[i + 1 :]]
            place = changed[i]["metrics"]
            for step in path[:-1]:
                place = place[step]
            place[path[-1]] = place[path[-1]] * 1.5 + 0.125
            if page(changed, SAYS) == original:
                unseen.add(dotted(path))
    nowhere = {
        # Of v, and of the largest channel, it is what the bases have that is shown.
        *(f"{when}.concentration.{kind}.largest_over_median" for when in WHEN for kind in "qkv"),
        *(f"{when}.concentration.v.top_share" for when in WHEN),
        "tokens.forward",  # in flops
        "tokens.backward",
        "curves.loss",
    }
    moved = {f"moved.{kind}.{what}" for kind in "qkv" for what in ("overlap", "head_overlap")}
    # Accuracy before is the same of all arms.
    start = {f"before.accuracy.{name}" for name in ("2x", "4x")}
    assert ignored["main", "final", "full"] == nowhere | start
    assert ignored["main", "final", "longact"] == nowhere | moved
    assert ignored["smollm2", "final", "longact"] == nowhere | moved
    assert ignored["main", "base", None] == {"loss"}
    assert ignored["main", "selection", None] == set()
    # The learning rate is chosen by the first evaluation.
    scores = {f"after.accuracy.{name}" for name in EVALUATIONS}
    assert scores - ignored["main", "tune", "longact"] == {"after.accuracy.1x"}


WHEN = ("before", "after")


def test_changing_one_arm_changes_no_other() -> None:
    records = store({"full": 0.0, "longact": 0.1, "random": 0.0}, methods=["sft"], seeds=3)
    changed = copy.deepcopy(records)
    for one in changed:
        if one["stage"] == "final" and one["spec"]["arm"] == "random":
            one["metrics"]["after"]["accuracy"]["2x"] += 0.1
    before, after = (page(some, SAYS) for some in (records, changed))
    pairs = zip(before.splitlines(), after.splitlines(), strict=True)
    rows = {old.split(" | ")[0] for old, new in pairs if old != new}
    # The last for p after Holm, which depends on the others.
    assert {"| random", "| random - full", "| longact - random"} <= rows
    assert rows <= {"| random", "| random - full", "| longact - random", "| longact - full"}
    for arm in ("full", "longact"):
        row = [cells(text, arm, "0.001", "3", after="### SFT") for text in (before, after)]
        assert row[0] == row[1]
        assert row[0][4] != "-"


def test_same_records_same_bytes(tmp_path: Path) -> None:
    arms = {"full": 0.0, "longact": 0.1, "sparse": 0.0, "keep 0.1": 0.1}
    records = store(arms, methods=["grpo", "sft"], seeds=2) + small()
    report(records, tmp_path / "a", SAYS)
    random.Random(0).shuffle(records)
    report(iter(records), tmp_path / "b", SAYS)
    for name in ("results.md", "results/lengths.png", "results/rewards.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_files(tmp_path: Path) -> None:
    report(store({"full": 0.0, "longact": 0.1}, methods=["grpo"], seeds=2), tmp_path, SAYS)
    text = (tmp_path / "results.md").read_text()
    pictures = {path.name for path in (tmp_path / "results").iterdir()}
    assert pictures == set(re.findall(r"\(results/(.+?)\)", text))
    assert pictures == {f"{name}.png" for name in PICTURES}
    assert all(path.stat().st_size < 150_000 for path in (tmp_path / "results").iterdir())
    # A figure of other records does not stay.
    report([], tmp_path, SAYS)
    assert not list((tmp_path / "results").iterdir())
    assert "results/" not in (tmp_path / "results.md").read_text()


PARTS = {
    "nothing": lambda r: False,
    "bases alone": lambda r: r["kind"] == "pretrain",
    "tuning alone": lambda r: r["stage"] == "tune",
    "selections alone": lambda r: r["kind"] == "selection",
    "one run": lambda r: r["stage"] == "final" and r["key"].count("'seed': 0") > 1,
    "no full": lambda r: r["spec"].get("arm") != "full",
    "other seeds": lambda r: r["spec"].get("arm") != "full" or r["spec"]["seed"] > 1,
    "smollm2 alone": lambda r: r["config"] == "smollm2",
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("part", PARTS)
def test_partial_stores(part: str) -> None:
    records = store({"full": 0.0, "longact": 0.1}, methods=["sft", "dapo"], seeds=3) + small()
    some = [r for r in records if PARTS[part](r)]
    text = page(some, SAYS)
    figures(some, SAYS)
    assert cells(text, "(f) it beats the full update with GRPO")[1] == "-"
    assert "nan" not in text
    assert all(len(line) <= 112 for line in text.splitlines() if not line.startswith("|"))
    tables = re.findall(r"(?:^\|.*\n)+", text, re.M)
    assert all(len({line.count("|") for line in t.splitlines()}) == 1 for t in tables)


def test_only_equal_seeds_and_settings_are_compared() -> None:
    records = store({"full": 0.0, "longact": 0.1}, methods=["sft"], seeds=6)
    full = [r for r in records if r["stage"] == "final" and r["spec"]["arm"] == "full"]
    records.remove(full[0])
    assert cells(page(records, SAYS), "sft, 1x")[6] == "5"
    full[1]["spec"]["steps"] = 21
    assert cells(page(records, SAYS), "sft, 1x")[6] == "4"


def test_a_repeated_run_counts_once_as_it_came_out_last() -> None:
    records = store({"full": 0.0, "longact": 0.1}, methods=["sft"], seeds=2)
    expected = page(records, SAYS)
    [run, *_] = [r for r in records if r["stage"] == "final"]
    old = copy.deepcopy(run)
    old.update(key="old", finished="2026-11-26T14:00:00", seconds=0.0)
    old["metrics"]["after"]["accuracy"]["1x"] = 0.0
    old["spec"]["learning_rate"] = 5.0
    assert page([*records, old], SAYS) == expected
    assert page([old, *records], SAYS) == expected


def test_learning_rates() -> None:
    records = store({"full": 0.0, "longact": 0.1}, methods=["sft"], seeds=2)
    text = page(records, SAYS)
    [tuned] = [
        r["metrics"]["after"]["accuracy"]["1x"]
        for r in records
        if r["stage"] == "tune" and (r["spec"]["arm"], r["spec"]["learning_rate"]) == ("full", 1e-3)
    ]
    row = cells(text, "sft", "full", after="Learning rates:")
    assert row[3] == f"**{tuned:.3f}**"
    assert row[5] == "0.001"
    assert "of the tuning seed (99)" in " ".join(text.split())
    assert "0 of 2 are at an edge" in " ".join(text.split())
    tuning = {
        (r["spec"]["arm"], r["spec"]["learning_rate"]): r["metrics"]["after"]["accuracy"]["1x"]
        for r in records
        if r["stage"] == "tune"
    }
    best = sum(
        max((1e-4, 1e-3, 1e-2), key=lambda lr: tuning[arm, lr]) == 1e-3
        for arm in ("full", "longact")
    )
    assert f"2 rates that are in a grid {best} are its best" in " ".join(text.split())
    for one in records:
        if one["stage"] == "tune":
            one["metrics"]["after"]["accuracy"]["1x"] = 9 * (one["spec"]["learning_rate"] == 1e-3)
    assert "grid 2 are its best" in " ".join(page(records, SAYS).split())
    for one in records:
        if one["stage"] == "final" and one["spec"]["arm"] == "full":
            one["spec"]["learning_rate"] = 1e-2
    assert "1 of 2 are at an edge" in " ".join(page(records, SAYS).split())


def test_smollm2_is_told_run_by_run() -> None:
    text = page(small(), SAYS)
    section = text[text.index("## SmolLM2") :]
    head = cells(section, "method")
    assert head[4:7] == ["niah 1x", "niah 2x", "niah 16x"]
    assert cells(section, "grpo", "before")[4:7] == ["0.500", "0.250", "0.125"]
    assert cells(section, "grpo", "longact", "1")[4:7] == ["0.800", "0.250", "0.125"]
    # The gain is of the task that is trained on, whatever its name.
    gain = cells(section, "grpo", "longact", "1")[head.index("gain per PFLOP")]
    assert float(gain) == pytest.approx(0.3 / 0.002)


def test_arms_at_the_same_rate_have_tables_of_their_own() -> None:
    """And change nothing of the others."""
    main = store({"full": 0.0, "longact": 0.1}, methods=["grpo"], seeds=3)
    same = [
        {**trained("grpo", arm, seed, benefit, lr=7e-4), "config": "same_rate"}
        for arm, benefit in {"full": 0.0, "random": 0.1, "longact": 0.3}.items()
        for seed in range(3)
    ]
    text, before = page([*main, *same], SAYS), page(main, SAYS)
    section = text[text.index("## At the same learning rate") :]
    assert text.replace(section[: section.index("\n## ")] + "\n", "") == before
    assert cells(section, "longact")[1:3] == ["0.0007", "3"]
    for row, expected in (("longact - full", 0.3), ("longact - random", 0.2)):
        found = float(cells(section, row)[1].split()[0])
        assert found == pytest.approx(expected, abs=0.05)


def test_what_makes_channels_large_is_told_model_by_model() -> None:
    """Of variants, by what differs between them."""
    found = []
    for layers, share in ((2, 0.4), (8, 0.6)):
        for seed in range(3):
            one = pretrained(seed)
            one["config"] = "emergence"
            one["spec"]["layers"] = layers
            one["metrics"]["concentration"]["k"] = {"top_share": share, "largest_over_median": 3.5}
            one["metrics"]["accuracy"] = {"32 words, 0 hops": 1.0, "640 words, 0 hops": share / 2}
            found.append(one)
    text = page(found, SAYS)
    section = text[text.index("--config emergence") :]
    head = cells(section, "model")
    for layers, share in ((2, "0.400"), (8, "0.600")):
        row = dict(zip(head, cells(section, f"layers {layers}"), strict=True))
        assert row["share k"].startswith(f"{share} [")
        assert row["ratio k"].startswith("3.5 [")
        assert row["accuracy"].startswith(f"{float(share) / 2:.3f} [")
        assert row["n"] == "3"
    assert "--config emergence" not in page(found[:3], SAYS)  # one model is no comparison


def test_records_as_the_driver_writes_them() -> None:
    """With fields of their specifications left out, and CPU time in place of threads."""
    records = store({"full": 0.0, "longact": 0.1}, methods=["grpo"], seeds=2)
    for one in records:
        del one["threads"]
        one.update(cpu_seconds=3600.0)
        if one["kind"] == "pretrain":
            one["spec"] = {"seed": one["spec"]["seed"]}
        if one["kind"] == "train":
            del one["spec"]["prompts"], one["spec"]["generations"], one["spec"]["examples"]
    base = record("pretrain", "base", {"model": "somewhere"}, records[0]["metrics"], "smollm2")
    text = page([*records, base], SAYS)
    assert f"{len(records) + 0.01:.1f} hours of CPU" in " ".join(text.split())
    assert cells(text, "grpo", "recall of 128, hops 1")[3:5] == ["- x -", "- (test)"]


def test_defaults_of_the_code_complete_a_specification(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="needs the rl extra")
    from experiments.models import Pretraining
    from experiments.training import Training

    records = store({"full": 0.0, "longact": 0.1}, methods=["grpo"], seeds=1)
    for one in records:
        if one["kind"] == "pretrain":
            one["spec"] = {"seed": 0, "layers": 7}
        if one["kind"] == "train":
            del one["spec"]["prompts"]
    report(records, tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert cells(text, Pretraining.architecture)[1] == f"7 x {Pretraining.width}"
    generations = records[-1]["spec"]["generations"]
    found = cells(text, "grpo", "recall of 128, hops 1")[3]
    assert found == f"{Training.prompts} x {generations}"
    assert cells(text, "full", after="Arms:")[1] == "all parameters, AdamW"


def test_commits_and_time() -> None:
    records = store({"full": 0.0}, methods=["sft"], seeds=1)
    records[0].update(commit="0123456789abcdef", dirty=True, seconds=36_000.0, threads=2)
    text = " ".join(page(records, SAYS).split())
    assert "0123456789ab+, abc." in text
    hours = (72_000 + 36 * (len(records) - 1)) / 3600
    assert f"{hours:.1f} hours of CPU" in text


@pytest.mark.slow
def test_the_documentation_is_what_the_store_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 10_000)
    root = Path(__file__).parents[1]
    stores = [Store(path) for path in sorted((root / "experiments" / "results").glob("*.jsonl"))]
    report([record for store in stores for record in store.records.values()], tmp_path)
    assert (tmp_path / "results.md").read_text() == (root / "docs" / "results.md").read_text()
