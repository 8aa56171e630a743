"""Timing calls that take turns, so that whatever disturbs the machine disturbs them alike."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

MIN_ROUNDS, MAX_ROUNDS = 5, 25
COPY_BYTES = 128 << 20  # several times the last-level cache


class Clock:
    """Times calls on a device, and what its memory can do at best."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        elements = COPY_BYTES // 4
        self._source = torch.ones(elements, dtype=torch.float32, device=device)
        self._target = torch.zeros(elements, dtype=torch.float32, device=device)
        self.calls = self.interrupted = 0  # how many the scheduler took the processor from

    @property
    def interrupted_share(self) -> float:
        return self.interrupted / max(1, self.calls)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def empty_caches(self) -> None:
        self._source.sum()  # reads only: nothing is left to be written back during the next call

    def copy(self) -> None:
        self._target.copy_(self._source)

    def add(self) -> None:
        self._target.add_(self._source)

    def seconds(self, call: Callable[[], object]) -> float:
        self.synchronize()
        switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
        start = time.perf_counter()
        call()
        self.synchronize()
        seconds = time.perf_counter() - start
        self.calls += 1
        self.interrupted += resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw > switches
        return seconds


@dataclass
class Limits:
    """How often a table is measured: `rounds`, or as many rounds as fit into its seconds."""

    rounds: int | None
    most: int = MAX_ROUNDS

    def more(self, done: int, started: float, seconds: float) -> bool:
        if self.rounds is not None:
            return done < self.rounds
        if done < MIN_ROUNDS:
            return True
        return done < self.most and time.perf_counter() - started < seconds


def measure(
    calls: dict[str, Callable[[], object]],
    clock: Clock,
    limits: Limits,
    seconds: float,
    *,
    cold: bool,
) -> dict[str, list[float]]:
    """Seconds of every call in every round; `cold` empties the caches before each."""
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    started = time.perf_counter()
    done = 0
    while limits.more(done, started, seconds):
        shift = done % len(names)
        for name in names[shift:] + names[:shift]:
            if cold:
                clock.empty_caches()
            samples[name].append(clock.seconds(calls[name]))
        done += 1
    return samples


@dataclass
class Timing:
    """Milliseconds: the median and the quartiles around it."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        ms = [1e3 * s for s in seconds]
        q1, median, q3 = statistics.quantiles(ms, method="inclusive") if len(ms) > 1 else ms * 3
        return cls(median, q1, q3)

    @property
    def spread(self) -> float:
        return (self.q3 - self.q1) / self.median
