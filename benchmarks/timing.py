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
GPU_COPY_BYTES = 512 << 20  # long enough that starting and ending do not count


class Clock:
    """Times calls on a device, and what its memory can do at best."""

    warm_up = 0  # rounds that are not counted

    def __init__(self, device: torch.device, copy_bytes: int = COPY_BYTES) -> None:
        self.device = device
        self.copy_bytes = copy_bytes
        elements = copy_bytes // 4
        self._source = torch.ones(elements, dtype=torch.float32, device=device)
        self._target = torch.zeros(elements, dtype=torch.float32, device=device)
        self.calls = self.interrupted = 0  # how many the scheduler took the processor from

    @property
    def interrupted_share(self) -> float:
        return self.interrupted / max(1, self.calls)

    def empty_caches(self) -> None:
        self._source.sum()  # reads only: nothing is left to be written back during the next call

    def copy(self) -> None:
        self._target.copy_(self._source)

    def add(self) -> None:
        self._target.add_(self._source)

    def forget(self) -> None:
        """Lets go of the calls it has timed."""

    def launch(self) -> None:
        """As little as a kernel can do."""
        self._target[:1].zero_()

    def seconds(self, call: Callable[[], object]) -> float:
        """What the call takes the device."""
        return self.host_seconds(call)

    def host_seconds(self, call: Callable[[], object]) -> float:
        """What the call takes the host, which does not wait for the device."""
        switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        self.calls += 1
        self.interrupted += resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw > switches
        return seconds


class CudaClock(Clock):
    """Times of a GPU are its own, between two events in its stream."""

    warm_up = 3
    cycles_per_second = 2e9  # of torch.cuda._sleep; slower clocks sleep longer, which does no harm
    longest_lead = 0.03  # seconds

    def __init__(self, device: torch.device) -> None:
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        super().__init__(device, max(GPU_COPY_BYTES, 4 * l2))
        self._lead: dict[Callable[[], object], float] = {}

    def empty_caches(self) -> None:
        # Written, not read: a call then pays for writing back as many old lines as it leaves behind
        # of its own, and so for all of its bytes.
        self._target.zero_()

    def forget(self) -> None:
        self._lead.clear()

    def seconds(self, call: Callable[[], object]) -> float:
        torch.cuda.synchronize(self.device)
        # The device waits until the host is through with the call: the pauses in which it would
        # wait for the next kernel are the host's.
        lead = self._lead.get(call, 0.0)
        torch.cuda._sleep(int(lead * self.cycles_per_second))  # type: ignore[no-untyped-call]
        start, end = (
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )
        start.record()
        host = super().host_seconds(call)
        end.record()
        end.synchronize()
        self._lead[call] = min(max(lead, 1.5 * host), self.longest_lead)
        return 1e-3 * float(start.elapsed_time(end))

    def host_seconds(self, call: Callable[[], object]) -> float:
        torch.cuda.synchronize(self.device)
        return super().host_seconds(call)


def make_clock(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else Clock(device)


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
    """Seconds of every call in every round; `cold` empties the caches before each.

    Not `cold`: what the calls take the host.
    """
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    seconds_of = clock.seconds if cold else clock.host_seconds
    for _ in range(clock.warm_up):
        for call in calls.values():
            seconds_of(call)
    started = time.perf_counter()
    done = 0
    while limits.more(done, started, seconds):
        shift = done % len(names)
        for name in names[shift:] + names[:shift]:
            if cold:
                clock.empty_caches()
            samples[name].append(seconds_of(calls[name]))
        done += 1
    clock.forget()
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
