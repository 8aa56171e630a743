"""Means, paired differences and verdicts, over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeVar

import numpy as np
from scipy import stats  # type: ignore[import-untyped]

__all__ = ["Difference", "Estimate", "Verdict", "difference", "estimate", "holm", "verdict"]

Verdict = Literal["supported", "not supported", "undecided"]
Key = TypeVar("Key", bound=Hashable)

RESAMPLES = 10_000
SEED = 0
ALPHA = 0.05
FEWEST = 5  # seeds: the bootstrap interval of fewer is far too short to conclude from


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval; nan where one seed, or a nan, leaves nothing to tell."""

    mean: float
    low: float
    high: float
    seeds: int
    values: int  # more than seeds where a seed has several, as of several methods


@dataclass(frozen=True)
class Difference:
    """A mean difference of pairs, and the probabilities of one as large where there is none."""

    estimate: Estimate
    t_p: float  # paired t test; of differences without spread, where there is none, `flip_p`
    flip_p: float  # each seed's sign flipped at random


def estimate(values: Iterable[float], seeds: Iterable[Hashable] | None = None) -> Estimate | None:
    """The mean of values, with a percentile bootstrap interval; None of no values.

    Args:
        seeds: of each value, where several can have one: seeds are drawn again, with all that
            they have. None: each value has its own.
    """
    values = list(values)
    groups = _grouped(values, range(len(values)) if seeds is None else seeds)
    if not groups:
        return None
    mean = math.fsum(values) / len(values)
    low, high = _interval(tuple(map(math.fsum, groups)), tuple(map(len, groups)))
    return Estimate(mean, low, high, len(groups), len(values))


def difference(
    one: Mapping[Key, float],
    other: Mapping[Key, float],
    seed: Callable[[Key], Hashable] = lambda key: key,
) -> Difference | None:
    """The mean of `one - other` over the keys that both have; None where they share none.

    Args:
        seed: of a key. Seeds are what is drawn again and tested: pairs of one seed, as those of
            several methods, are not independent, and count as their mean in the tests.
    """
    keys = [key for key in one if key in other]
    values = [one[key] - other[key] for key in keys]
    found = estimate(values, map(seed, keys))
    if found is None:
        return None
    means = tuple(math.fsum(group) / len(group) for group in _grouped(values, map(seed, keys)))
    return Difference(found, *_tests(means))


def holm(p: Mapping[Key, float]) -> dict[Key, float]:
    """Corrected for the number of tests; nan is not a test, and stays."""
    ordered = sorted((key for key in p if not math.isnan(p[key])), key=p.__getitem__)
    raised = [(len(ordered) - i) * p[key] for i, key in enumerate(ordered)]
    corrected = zip(ordered, np.maximum.accumulate(np.minimum(raised, 1.0)), strict=True)
    return {**p, **{key: float(value) for key, value in corrected}}


def verdict(found: Difference, corrected_p: float) -> Verdict:
    """Of the claim that the difference is above 0.

    The burden is the claim's: for "supported" both the interval and the corrected p must say so,
    for "not supported" it is enough that the interval has no value above 0. Where there is no
    difference at all, as where all runs answer everything or nothing, there was no test.
    """
    if found.estimate.seeds < FEWEST:
        return "undecided"
    if found.estimate.low > 0 and corrected_p < ALPHA:
        return "supported"
    return "not supported" if found.estimate.low < 0 >= found.estimate.high else "undecided"


def _grouped(values: Sequence[float], seeds: Iterable[Hashable]) -> list[list[float]]:
    groups: dict[Hashable, list[float]] = {}
    for value, seed in zip(values, seeds, strict=True):
        groups.setdefault(seed, []).append(value)
    return list(groups.values())


def _ratio(sums: np.ndarray, counts: np.ndarray, axis: int = -1) -> np.ndarray:
    result: np.ndarray = sums.sum(axis) / counts.sum(axis)
    return result


@cache  # the same arms are compared in several tables
def _interval(sums: tuple[float, ...], counts: tuple[int, ...]) -> tuple[float, float]:
    means = np.divide(sums, counts)
    if len(means) < 2 or not np.isfinite(means).all():
        return math.nan, math.nan
    if _flat(means):
        return float(means[0]), float(means[0])
    found = stats.bootstrap(
        (np.array(sums), np.array(counts)),
        _ratio,
        paired=True,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=SEED,
    ).confidence_interval
    return float(found.low), float(found.high)


@cache
def _tests(values: tuple[float, ...]) -> tuple[float, float]:
    """p of a t test and of sign flips."""
    if len(values) < 2 or not np.isfinite(values).all():
        return math.nan, math.nan
    flips = stats.permutation_test(
        (np.array(values),), np.mean, permutation_type="samples", n_resamples=RESAMPLES, rng=SEED
    )
    if _flat(np.array(values)):
        return float(flips.pvalue), float(flips.pvalue)
    return float(stats.ttest_1samp(values, 0).pvalue), float(flips.pvalue)


def _flat(values: np.ndarray) -> bool:
    """Whether they differ by no more than rounding."""
    return bool(np.ptp(values) <= 1e-12)
