"""What finding and training salient rows costs inside the q and k projections of a model.

    python benchmarks/bench_projection.py                # SmolLM2-135M, under a minute on 2 cores
    python benchmarks/bench_projection.py --model qwen3-8b --tokens 512 --dtype bfloat16
    python benchmarks/bench_projection.py --json bench.json --plot bench.png
    python benchmarks/bench_projection.py --device cuda  # Qwen3-8B in bf16, the Triton kernels

A  forward: F.linear alone and with its channels' magnitudes; nn.Linear beside SalientLinear
B  weight gradient: of the selected rows beside the dense one; written, and added to an earlier one
C  top-k of the whole model: in one call beside one torch.topk for each projection

Every variant is run once and compared with a float64 reference first: magnitudes over all tokens,
gradients in all elements, outputs in a sample of their tokens, selected rows one by one. If one
differs, the run ends with exit code 1 and prints no timing. The variants of a group take turns,
each once a round, in an order that rotates; times are medians over the rounds, and so are ratios,
each of two times of the same round.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from bench_update import (
    DEFAULT_MODEL,
    DTYPES,
    PAPER_KEEP,
    CheckFailed,
    Goal,
    in_ms,
    keep_ratio,
    machine,
    positive,
    print_end,
    progress,
    random_rows,
)
from shapes import MODELS, ModelShape, ParamShape
from timing import Clock, Limits, Timing, make_clock, measure
from torch import Tensor, nn
from torch.nn import functional as F

import longact
from longact.kernels.channel_magnitude import METRICS, channel_magnitude
from longact.kernels.projection import fuses
from longact.kernels.row_grad import linear_grads
from longact.kernels.topk_rows import CHOSEN, magnitude_of, select_rows, topk_rows_over

METRIC: Literal["mean_abs"] = "mean_abs"
TOKENS = [4096, 32768, 131072]
DEFAULT_DTYPE = {"cpu": "float32", "cuda": "bfloat16"}
CPU_FLOP = 16e9  # of q and k for default tokens: 0.1 s or so of two cores
SECONDS = {"cpu": 2.0, "cuda": 0.7}  # of measuring each group
MOST_ROUNDS = 100
SHARE_GOAL = {"cpu": 0.05, "cuda": 0.03}
GRADIENT_GOAL = {"cpu": 0.45, "cuda": 0.40}
SAMPLE = 64  # tokens of an output that are checked
CHUNK = 8192  # tokens that are in float64 at a time

BOTH = "q_proj and k_proj"
LINEAR = "F.linear"
COUNTED, COUNTED_MASKED = "+ channel_magnitude", "+ channel_magnitude, token mask"
FUSED = "fused kernel, token mask"
PLAIN, SALIENT = "nn.Linear", "SalientLinear"
DENSE, ROWS = "dense dy^T x", "selected rows"
METHODS: tuple[Literal["gather", "fused"], ...] = ("gather", "fused")
DENSE_ADDED = "dense, added by autograd"
ROWS_ADDED = "selected rows, added by autograd"
ROWS_IN_PLACE = "selected rows, added in place"
TOPK, TOPK_SORTED, SELECT = "torch.topk each", "torch.topk each, sorted", "longact, one call"
TOPK_OVER, SELECT_OVER = "torch.topk of all together", "longact, all together"


@dataclass
class Bench:
    """How to measure."""

    clock: Clock
    dtype: torch.dtype
    keep: float
    rounds: int | None
    on_gpu: bool

    @property
    def kind(self) -> str:
        return "cuda" if self.on_gpu else "cpu"

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.clock.device).to(self.dtype)


class Variant(NamedTuple):
    """One way to do a thing."""

    label: str
    call: Callable[[], object]
    baseline: str  # the variant that it is compared with
    flop: float = 0.0
    bytes: float = 0.0


@dataclass
class Ratio:
    """One variant's time over another's: the median and the quartiles around it."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, seconds: Sequence[float], others: Sequence[float]) -> Ratio:
        """Of each round."""
        ratios = [a / b for a, b in zip(seconds, others, strict=True)]
        if len(ratios) == 1:
            ratios *= 2
        q1, median, q3 = statistics.quantiles(ratios, method="inclusive")
        return cls(median, q1, q3)


@dataclass
class Line:
    """What a variant took."""

    variant: str
    baseline: str
    ms: Timing
    ratio: Ratio  # to the baseline
    tflop_per_s: float | None = None
    gb_per_s: float | None = None
    host_ms: Timing | None = None  # in a warm cache, not waiting for the device
    host_ratio: Ratio | None = None


@dataclass
class Group:
    """Variants that took turns."""

    what: str
    shape: list[int]  # [out, in] of a projection, else empty
    tokens: int | None
    rounds: int
    lines: list[Line]
    judged: list[str]  # what longact does by its own choice: the variants that goals are about

    @property
    def title(self) -> str:
        return self.what if self.tokens is None else f"{self.what}, {self.tokens} tokens"

    def line(self, variant: str) -> Line | None:
        return next((line for line in self.lines if line.variant == variant), None)

    def judged_lines(self) -> list[Line]:
        return [line for line in self.lines if line.variant in self.judged]


@dataclass
class Table:
    key: str
    title: str
    groups: list[Group] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def time_group(
    bench: Bench,
    what: str,
    variants: Sequence[Variant],
    *,
    shape: Sequence[int] = (),
    tokens: int | None = None,
    judged: Sequence[str] = (),
    host: bool = False,
) -> Group:
    """`host`: also what the calls take the host."""
    calls = {variant.label: variant.call for variant in variants}
    limits = Limits(bench.rounds, MOST_ROUNDS)

    def samples(cold: bool) -> dict[str, list[float]]:
        return measure(calls, bench.clock, limits, SECONDS[bench.kind], cold=cold)

    seconds = samples(cold=True)
    host_seconds = samples(cold=False) if host else {}
    lines = []
    for label, _, baseline, flop, moved in variants:
        ms, ratio = Timing.of(seconds[label]), Ratio.of(seconds[label], seconds[baseline])
        line = Line(label, baseline, ms, ratio)
        if flop:
            line.tflop_per_s = 1e-9 * flop / ms.median
        if moved:
            line.gb_per_s = 1e-6 * moved / ms.median
        if host:
            line.host_ms = Timing.of(host_seconds[label])
            line.host_ratio = Ratio.of(host_seconds[label], host_seconds[baseline])
        lines.append(line)
    rounds = len(seconds[variants[0].label])
    return Group(what, list(shape), tokens, rounds, lines, list(judged))


def kind_of(param: ParamShape) -> str:
    return param.name.rsplit(".", 1)[-1]


def projections_of(model: ModelShape) -> list[ParamShape]:
    """q_proj and k_proj of each layer, in this order."""
    return [param for param in model.parameters() if param.masked]


def count_of(keep: float, channels: int) -> int:
    return max(1, int(keep * channels + 0.5))


# ---- correctness ---------------------------------------------------------------------------------


def sampled(count: int, device: torch.device) -> Tensor:
    """Indices spread over all of them, the first and the last among them."""
    at = torch.linspace(0, count - 1, min(count, SAMPLE), dtype=torch.float64).round()
    return at.long().to(device)


def product64(a: Tensor, b: Tensor) -> Tensor:
    """`a^T b` in float64, of matrices with many rows."""
    total = torch.zeros(a.shape[1], b.shape[1], dtype=torch.float64, device=a.device)
    for some_a, some_b in zip(torch.split(a, CHUNK), torch.split(b, CHUNK), strict=True):
        total += some_a.double().t() @ some_b.double()
    return total


def check_product(what: str, got: Tensor, want: Tensor, terms: int, dtype: torch.dtype) -> None:
    """Elements that are sums of so many products, rounded once or twice.

    fp32 sums err by their own eps, in proportion to the root of how many terms they have.
    """
    rms = float(want.square().mean().sqrt())
    summed = 4 * torch.finfo(torch.float32).eps * terms**0.5 * rms
    rounded = 2 * torch.finfo(dtype).eps * (want.abs() + rms)
    excess = float(((got.double() - want).abs() / (summed + rounded)).max())
    if not excess <= 1.0:  # NaN too
        raise CheckFailed(f"{what}: differs from the reference by {excess:.1f} of what is allowed")


def check_magnitude(what: str, y: Tensor, mask: Tensor | None, out: Tensor, tokens: Tensor) -> None:
    """Totals of y's channels, of which there were none before."""
    counted = torch.ones(y.shape[0], dtype=torch.bool, device=y.device) if mask is None else mask
    want = torch.zeros(y.shape[1], dtype=torch.float64, device=y.device)
    for part, keep in zip(torch.split(y.detach(), CHUNK), torch.split(counted, CHUNK), strict=True):
        want += (part.double().abs() * keep[:, None]).sum(0)
    error = float(((out.double() - want).abs() / want).max())
    if not error <= 2 * torch.finfo(torch.float32).eps * max(64, y.shape[0]) ** 0.5:
        raise CheckFailed(f"{what}: magnitudes differ from the reference by {error:.1e}")
    if int(tokens) != int(counted.sum()):
        raise CheckFailed(f"{what}: counted {int(tokens)} tokens, not {int(counted.sum())}")


def check_output(what: str, x: Tensor, weight: Tensor, y: Tensor) -> None:
    at = sampled(x.shape[0], x.device)
    want = x[at].double() @ weight.detach().double().t()
    check_product(what, y.detach()[at], want, x.shape[1], x.dtype)


def check_grad(
    what: str, got: Tensor, want: Tensor, rows: Tensor, tokens: int, before: Tensor | None
) -> None:
    """`want`: the dense gradient in float64; `before`: what the rows were added to."""
    at = rows.long()
    exact = want[at] if before is None else want[at] + before[at].double()
    check_product(what, got[at], exact, tokens, got.dtype)
    others = torch.ones(got.shape[0], dtype=torch.bool, device=got.device)
    others[at] = False
    expected = torch.zeros_like(got) if before is None else before
    if not torch.equal(got[others], expected[others]):
        raise CheckFailed(f"{what}: rows outside of the selection changed")


def ranked(values: Sequence[float], k: int) -> list[int]:
    """The k largest, ties to the lower index, ascending."""
    return sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:k])


def check_rows(what: str, got: Sequence[Tensor], want: Sequence[Sequence[int]]) -> None:
    for index, (rows, expected) in enumerate(zip(got, want, strict=True)):
        if rows.dtype != torch.int32 or rows.tolist() != list(expected):
            raise CheckFailed(f"{what}: wrong rows of projection {index}")


def check_topk(
    what: str, got: Sequence[Tensor], values: Sequence[Tensor], k: Sequence[int]
) -> None:
    """torch's: any of those that are equal."""
    for index, (rows, all_values, n) in enumerate(zip(got, values, k, strict=True)):
        chosen = all_values[rows.long()].sort(descending=True).values
        if not torch.equal(chosen, all_values.sort(descending=True).values[:n]):
            raise CheckFailed(f"{what}: not the largest of projection {index}")


# ---- table A: forward ----------------------------------------------------------------------------


@dataclass
class Totals:
    """What the outputs of some projections add up to."""

    outs: list[Tensor]
    counted: list[Tensor]

    @classmethod
    def of(cls, weights: Sequence[Tensor]) -> Totals:
        return cls(
            [torch.zeros(w.shape[0], dtype=torch.float32, device=w.device) for w in weights],
            [torch.zeros((), dtype=torch.int64, device=w.device) for w in weights],
        )


def linear(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    return [F.linear(x, weight) for weight in weights]


def separate(
    x: Tensor, weights: Sequence[Tensor], mask: Tensor | None, totals: Totals
) -> list[Tensor]:
    """Each output is measured while some of it may lie in a cache still."""
    ys = []
    for weight, out, counted in zip(weights, totals.outs, totals.counted, strict=True):
        ys.append(F.linear(x, weight))
        channel_magnitude(ys[-1], mask, METRIC, out=out, counted=counted)
    return ys


def fused(x: Tensor, weights: Sequence[Tensor], mask: Tensor, totals: Totals) -> list[Tensor]:
    from longact.kernels import projection_triton

    ys: list[Tensor] = projection_triton.project(
        x, weights, [None] * len(weights), mask, METRICS[METRIC], totals.outs, totals.counted
    )
    return ys


def has_fused(bench: Bench, x: Tensor, weights: Sequence[Tensor]) -> bool:
    if not bench.on_gpu or x.dtype == torch.float32:
        return False
    from longact.kernels import projection_triton

    return bool(projection_triton.supports(x, weights, [None] * len(weights)))


def forward_variants(bench: Bench, x: Tensor, weights: list[Tensor], mask: Tensor) -> list[Variant]:
    """All of them checked."""
    all_counted, masked, by_kernel, alone = (Totals.of(weights) for _ in range(4))
    ways: list[tuple[str, Callable[[], list[Tensor]], Tensor | None, Totals | None]] = [
        (LINEAR, lambda: linear(x, weights), None, None),
        (COUNTED, lambda: separate(x, weights, None, all_counted), None, all_counted),
        (COUNTED_MASKED, lambda: separate(x, weights, mask, masked), mask, masked),
    ]
    if has_fused(bench, x, weights):
        ways.append((FUSED, lambda: fused(x, weights, mask, by_kernel), mask, by_kernel))
    flop = 2.0 * x.shape[0] * sum(weight.numel() for weight in weights)
    variants = []
    for label, call, counted, totals in ways:
        for i, (y, weight) in enumerate(zip(call(), weights, strict=True)):
            check_output(label, x, weight, y)
            if totals is not None:
                check_magnitude(label, y, counted, totals.outs[i], totals.counted[i])
        variants.append(Variant(label, call, LINEAR, flop))
    ys = linear(x, weights)

    def magnitude_alone() -> None:
        for y, out in zip(ys, alone.outs, strict=True):
            channel_magnitude(y, None, METRIC, out=out)

    read = float(sum(y.numel() * y.element_size() for y in ys))
    variants.append(Variant("channel_magnitude alone", magnitude_alone, LINEAR, bytes=read))
    return variants


class Block(nn.Module):
    """The projections of an attention block, as a model holds them."""

    def __init__(self, q: ParamShape, k: ParamShape, bench: Bench) -> None:
        super().__init__()
        device, dtype = bench.clock.device, bench.dtype
        self.q_proj, self.k_proj = (
            nn.Linear(p.shape[1], p.shape[0], bias=False, device=device, dtype=dtype)
            for p in (q, k)
        )

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.q_proj(x), self.k_proj(x)


def module_variants(bench: Bench, x: Tensor, block: Block, mask: Tensor) -> list[Variant]:
    """A training forward through the modules, before and after `longact.apply`; checked."""
    salient = copy.deepcopy(block)
    weights = {"q_proj": block.q_proj.weight, "k_proj": block.k_proj.weight}
    handle = longact.apply(salient, bench.keep, targets=list(weights), metric=METRIC)
    batch, attention_mask = x[None], mask[None].long()

    def call() -> tuple[Tensor, Tensor]:
        ys: tuple[Tensor, Tensor] = salient(batch, attention_mask=attention_mask)
        return ys

    wanted = {}
    for name, y in zip(weights, call(), strict=True):
        counts = handle.state_dict()["projections"][name]
        total, tokens = counts["magnitude"], counts["tokens"]
        check_magnitude(f"{SALIENT} {name}", y[0], mask, total, tokens)
        magnitude = magnitude_of(total, tokens, METRIC).tolist()
        wanted[name] = ranked(magnitude, count_of(bench.keep, len(magnitude)))
    handle.refresh()
    for (name, weight), y in zip(weights.items(), call(), strict=True):  # with rows now
        check_output(f"{SALIENT} {name}", x, weight, y[0])
        rows = handle.rows[name]
        check_rows(f"{SALIENT} {name}", [] if rows is None else [rows], [wanted[name]])
    flop = 2.0 * x.shape[0] * sum(p.numel() for p in block.parameters())
    return [
        Variant(PLAIN, lambda: block(batch), PLAIN, flop),
        Variant(SALIENT, call, PLAIN, flop),
    ]


def bench_forward(bench: Bench, model: ModelShape, tokens: int) -> list[Group]:
    q, k = projections_of(model)[:2]
    block = Block(q, k, bench)
    x = bench.randn(tokens, model.hidden)
    # A tenth of the tokens is padding.
    mask = torch.arange(tokens, device=x.device) >= tokens // 10
    q_weight, k_weight = (layer.weight.detach() for layer in (block.q_proj, block.k_proj))
    groups = []
    for name, weights in (
        ("q_proj", [q_weight]),
        ("k_proj", [k_weight]),
        (BOTH, [q_weight, k_weight]),
    ):
        progress(f"table A: {name}, {tokens} tokens")
        with torch.no_grad():
            variants = forward_variants(bench, x, weights, mask)
            shape = [sum(w.shape[0] for w in weights), model.hidden]
            is_fused = fuses(x, weights, [None] * len(weights))
            judged = [FUSED] if is_fused else [COUNTED, COUNTED_MASKED]
            groups.append(
                time_group(bench, name, variants, shape=shape, tokens=tokens, judged=judged)
            )
    progress(f"table A: modules, {tokens} tokens")
    variants = module_variants(bench, x, block, mask)
    groups.append(time_group(bench, "modules, with autograd", variants, tokens=tokens))
    return groups


# ---- table B: weight gradient --------------------------------------------------------------------


def bench_grad(bench: Bench, param: ParamShape, tokens: int) -> Group:
    """One projection's weight gradient from its output's. No gradient flows through any of it."""
    out_features, in_features = param.shape
    name = kind_of(param)
    progress(f"table B: {name}, {tokens} tokens")
    x = bench.randn(tokens, in_features)
    dy = bench.randn(tokens, out_features) / tokens**0.5  # so that gradients are of size 1
    rows = random_rows(0, out_features, bench.keep).to(x.device)
    every = torch.arange(out_features, device=x.device)
    before = bench.randn(out_features, in_features)

    def dense() -> Tensor:
        return torch.mm(dy.t(), x)

    def selected() -> Tensor:
        return linear_grads(dy, x, rows, False)[0]

    def by_method(method: Literal["gather", "fused"]) -> Tensor:
        from longact.kernels import row_grad_triton

        grad = x.new_zeros(out_features, in_features)
        row_grad_triton.row_grad_(grad, dy, x, rows, method=method)
        return grad

    # Each adds to a gradient of its own.
    to_dense, to_rows = before.clone(), before.clone()
    ways: list[tuple[str, Callable[[], Tensor], str, Tensor, Tensor | None]] = [
        (DENSE, dense, DENSE, every, None),
        (ROWS, selected, DENSE, rows, None),
    ]
    if bench.on_gpu:
        ways += [
            (f"{ROWS}, {method}", partial(by_method, method), DENSE, rows, None)
            for method in METHODS
        ]
    ways += [
        (DENSE_ADDED, lambda: to_dense.add_(dense()), DENSE_ADDED, every, before),
        (ROWS_ADDED, lambda: to_rows.add_(selected()), DENSE_ADDED, rows, before),
    ]
    if bench.on_gpu:
        in_place = before.clone()
        ways.append(
            (ROWS_IN_PLACE, lambda: linear_grads(dy, x, rows, False, in_place)[0],
             DENSE_ADDED, rows, before)
        )  # fmt: skip
    variants = []
    with torch.no_grad():
        want = product64(dy, x)
        for label, call, baseline, trained, added_to in ways:
            check_grad(f"{name}, {label}", call(), want, trained, tokens, added_to)
            flop = 2.0 * tokens * in_features * trained.numel()
            variants.append(Variant(label, call, baseline, flop))
        what = f"{name}, {rows.numel()} of {out_features} rows"
        return time_group(bench, what, variants, shape=param.shape, tokens=tokens, judged=[ROWS])


# ---- table C: top-k ------------------------------------------------------------------------------


def bench_topk(bench: Bench, model: ModelShape) -> tuple[list[Group], list[str]]:
    """Of all projections of the model, from totals over 4,096 tokens with many equal ones.

    Also the names of the kernels that longact's one call launches on a GPU.
    """
    projections = projections_of(model)
    progress(f"table C: {len(projections)} projections")
    device = bench.clock.device
    channels = [p.shape[0] for p in projections]
    ks = [count_of(bench.keep, n) for n in channels]
    totals = [torch.randn(n).abs().mul_(100.0).round_().to(device) for n in channels]
    tokens = [torch.tensor(4096, device=device) for _ in channels]
    previous = [None] * len(channels)
    values = [magnitude_of(t, n, METRIC) for t, n in zip(totals, tokens, strict=True)]
    wanted = [ranked(v.tolist(), k) for v, k in zip(values, ks, strict=True)]

    def topk() -> list[Tensor]:
        return [torch.topk(t, k).indices for t, k in zip(totals, ks, strict=True)]

    def topk_sorted() -> list[Tensor]:
        return [rows.sort().values.to(torch.int32) for rows in topk()]

    def select() -> tuple[list[Tensor], Tensor]:
        return select_rows(totals, tokens, previous, ks, channels, METRIC)

    check_topk(TOPK, topk(), values, ks)
    check_topk(TOPK_SORTED, topk_sorted(), values, ks)
    rows, status = select()
    check_rows(SELECT, rows, wanted)
    if bool((status != CHOSEN).any()):
        raise CheckFailed(f"{SELECT}: did not choose")
    variants = [
        Variant(TOPK, topk, TOPK),
        Variant(TOPK_SORTED, topk_sorted, TOPK),
        Variant(SELECT, select, TOPK),
    ]
    what = f"scope='layer', each of {len(channels)} projections by itself"
    groups = [time_group(bench, what, variants, judged=[SELECT], host=True)]

    # Query projections compete with each other, and so do key projections.
    kinds = [[v for v, p in zip(values, projections, strict=True) if kind_of(p) == kind]
             for kind in ("q_proj", "k_proj")]  # fmt: skip
    sizes = [sum(v.numel() for v in kind) for kind in kinds]
    ks = [count_of(bench.keep, size) for size in sizes]

    def topk_over() -> list[Tensor]:
        return [torch.topk(torch.cat(kind), k).indices for kind, k in zip(kinds, ks, strict=True)]

    def select_over() -> list[list[Tensor]]:
        return [topk_rows_over(kind, k) for kind, k in zip(kinds, ks, strict=True)]

    check_topk(TOPK_OVER, topk_over(), [torch.cat(kind) for kind in kinds], ks)
    for kind, k, chosen in zip(kinds, ks, select_over(), strict=True):
        best = ranked(torch.cat(kind).tolist(), k)
        begin = 0
        for v, some in zip(kind, chosen, strict=True):
            end = begin + v.numel()
            check_rows(SELECT_OVER, [some], [[i - begin for i in best if begin <= i < end]])
            begin = end
    variants = [
        Variant(TOPK_OVER, topk_over, TOPK_OVER),
        Variant(SELECT_OVER, select_over, TOPK_OVER),
    ]
    what = "scope='model', all of q_proj together, then all of k_proj"
    groups.append(time_group(bench, what, variants, host=True))
    # Last, as a profiler may slow down what comes after it.
    return groups, kernels_of(select, device) if bench.on_gpu else []


def kernels_of(call: Callable[[], object], device: torch.device) -> list[str]:
    """The names of the kernels that a call launches on a GPU; none where they cannot be traced."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    try:
        with torch.profiler.profile(activities=activities) as profile:
            call()
            torch.cuda.synchronize(device)
    except RuntimeError:
        return []
    on_device = torch._C._autograd.DeviceType.CUDA
    return [event.name for event in profile.events() if event.device_type == on_device]


# ---- goals, and what a GPU's figures say about the rules -----------------------------------------


def find_goals(bench: Bench, tables: dict[str, Table], kernels: Sequence[str]) -> list[Goal]:
    """The project's speed lines for what longact does by its own choice, at the worst shape."""
    share = max(
        line.ratio.median - 1 for group in tables["A"].groups for line in group.judged_lines()
    )
    text = "A: what statistics add to their projection"
    goals = [Goal(text, share, SHARE_GOAL[bench.kind], False, " %")]
    if bench.keep == PAPER_KEEP:
        ratio = max(
            line.ratio.median for group in tables["B"].groups for line in group.judged_lines()
        )
        text = f"B: row gradient at keep {PAPER_KEEP:g}, of the dense one's time"
        goals.append(Goal(text, ratio, GRADIENT_GOAL[bench.kind], False))
    if bench.on_gpu:
        line = tables["C"].groups[0].line(SELECT)
        assert line is not None
        assert line.host_ratio is not None
        text = "C: top-k of the model, against one torch.topk for each projection"
        goals.append(Goal(f"{text}, the device's time", 1 / line.ratio.median, 10.0, True))
        goals.append(Goal(f"{text}, the host's time", 1 / line.host_ratio.median, 10.0, True))
        if kernels:
            text = "C: launches of longact's kernel for it"
            goals.append(Goal(text, float(own_launches(kernels)), 1.0, False, ""))
    return goals


def own_launches(kernels: Sequence[str]) -> int:
    return sum(name.startswith("_select_kernel") for name in kernels)


def won(group: Group, ours: str, other: str) -> bool | None:
    """Whether a variant was faster than another; None where they were not both timed."""
    first, second = group.line(ours), group.line(other)
    return None if first is None or second is None else first.ms.median < second.ms.median


def comparison(group: Group, **labels: str) -> str:
    """Two variants by their short names, and which was faster."""
    lines = {name: group.line(label) for name, label in labels.items()}
    ms = {name: line.ms.median for name, line in lines.items() if line is not None}
    times = ", ".join(f"{name} {in_ms(median)}" for name, median in ms.items())
    return f"{group.title}: {times}: {min(ms, key=lambda name: ms[name])}"


def advice_on_fusing(
    groups: Sequence[Group], dtype: torch.dtype, capability: tuple[int, int]
) -> list[str]:
    """What table A says about RULES of longact/kernels/projection.py."""
    timed = [group for group in groups if won(group, FUSED, COUNTED_MASKED) is not None]
    if not timed:
        return []
    lines = [comparison(group, fused=FUSED, separate=COUNTED_MASKED) for group in timed]
    # A rule holds from some number of tokens on. SalientLinear computes q and k at once.
    both = [group for group in timed if group.what == BOTH]
    since, in_features = None, both[0].shape[1]
    for group in sorted(both, key=lambda group: group.tokens or 0, reverse=True):
        if not won(group, FUSED, COUNTED_MASKED):
            break
        since = group.tokens
    if since is None:
        return [*lines, "RULES: no row from this run, as at its most tokens separate was faster"]
    source = '"the report under benchmarks/results"'
    row = f"Rule({capability}, {dtype}, {in_features}, {since}, {source}),"
    return [*lines, "RULES, for this card and dtype:", f"    {row}"]


def advice_on_row_grad(groups: Sequence[Group]) -> list[str]:
    """What table B says about choose_method of longact/kernels/row_grad_triton.py."""
    gather, fused = (f"{ROWS}, {method}" for method in METHODS)
    timed = [group for group in groups if won(group, fused, gather) is not None]
    if not timed:
        return []
    lines = [comparison(group, fused=fused, gather=gather) for group in timed]
    better = [group for group in timed if won(group, fused, gather)]
    if len(better) in (0, len(timed)):
        rule = f'return "{"fused" if better else "gather"}" for all of these'
    else:
        rule = f'return "fused" for {"; ".join(group.title for group in better)}; else "gather"'
    return [*lines, f"choose_method: {rule}"]


# ---- which sizes ---------------------------------------------------------------------------------


def most_tokens(model: ModelShape, dtype: torch.dtype, memory: int) -> int:
    """As many as take a quarter of the memory."""
    width = model.hidden + sum(param.shape[0] for param in projections_of(model)[:2])
    return memory // 4 // (4 * width * dtype.itemsize)


def most_tokens_in_time(model: ModelShape) -> int:
    return int(CPU_FLOP / (2 * sum(param.numel for param in projections_of(model)[:2])))


def cut_tokens(asked: Sequence[int], most: int, why: str) -> tuple[list[int], str]:
    """No more than `most`, rounded down to a power of two; and a line that says so."""
    limit = 1 << (max(1, most).bit_length() - 1)
    too_many = [tokens for tokens in asked if tokens > most]
    kept = sorted({tokens for tokens in asked if tokens <= most} | ({limit} if too_many else set()))
    cut = ", ".join(map(str, too_many))
    return kept, f"Tokens: {limit} in place of {cut}, {why}" if too_many else ""


# ---- output --------------------------------------------------------------------------------------


def ratio_text(table: str, line: Line) -> str:
    """What the table is about: more than the baseline, its share, or its speed."""
    ratio = line.ratio
    if line.variant == line.baseline:
        return ""
    if line.gb_per_s:
        return f" {ratio.median:7.1%} of it"
    if table == "A":
        quartiles = f"({ratio.q1 - 1:+.1%} to {ratio.q3 - 1:+.1%})"
        return f"{ratio.median - 1:+8.1%} {quartiles}"
    slower = "  slower" if ratio.median > 1.005 else ""
    if table == "B":
        return f"{ratio.median:8.2f}x ({ratio.q1:.2f} to {ratio.q3:.2f}){slower}"
    host = line.host_ratio
    assert host is not None
    return f"{1 / ratio.median:8.2f}x{1 / host.median:8.2f}x{slower}"


def line_text(table: str, line: Line) -> str:
    text = f"     {line.variant:32}{in_ms(line.ms.median):>10}{line.ms.spread:7.0%}"
    if line.host_ms is not None:
        text += f"{in_ms(line.host_ms.median):>11}{line.host_ms.spread:7.0%}"
    else:
        text += f"{line.tflop_per_s:9.3f}" if line.tflop_per_s else " " * 9
        text += f"{line.gb_per_s:7.1f}" if line.gb_per_s else " " * 7
    return (text + ratio_text(table, line)).rstrip()


HEADERS = {
    "A": "  TFLOP/s   GB/s   added (quartiles)",
    "B": "  TFLOP/s   GB/s   of the dense time (quartiles)",
    "C": "       host spread    speed    host (torch.topk = 1)",
}


def print_table(table: Table) -> None:
    print(f"\n{table.key}. {table.title}")
    for note in table.notes:
        print(f"   {note}")
    print(f"     {'':32}{'median':>10}{'spread':>7}{HEADERS[table.key]}")
    for group in table.groups:
        print(f"   {group.title} ({group.rounds} rounds)")
        for line in group.lines:
            print(line_text(table.key, line))


def print_header(args: argparse.Namespace, info: dict[str, Any], model: ModelShape) -> None:
    q, k = projections_of(model)[:2]
    shapes = " and ".join(f"{p.shape[0]} x {p.shape[1]}" for p in (q, k))
    print(f"longact {info['longact']}, torch {info['torch']}, Python {info['python']}")
    print(f"{info['device']}, {info['threads']} threads, {args.dtype}")
    for op in ("channel_magnitude", "row_grad", "topk_rows"):
        print(f"longact's {op} runs on: {info['backends'][op]}")
    print(f"{model.name}: q_proj and k_proj {shapes} in {model.layers} layers; keep {args.keep:g}")
    print(
        "spread: interquartile range over median. Before each call the caches are emptied, as the\n"
        "layers between do; host times are of a warm cache, without waiting for the device."
    )


def plot(path: Path, tables: dict[str, Table], subtitle: str) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
    for axis, key, title in (
        (axes[0], "A", "statistics, added to the forward (%)"),
        (axes[1], "B", "row gradient, of the dense one's time (%)"),
    ):
        for group in tables[key].groups:
            less = 1 if key == "A" else 0
            shown = [(line, 100 * (line.ratio.median - less)) for line in group.judged_lines()]
            for line, percent in shown:
                bar = axis.barh(f"{group.title}\n{line.variant}", percent, color="#1b5e8a")
                axis.bar_label(bar, fmt="%.1f", fontsize=7, padding=2)
        axis.set_title(title, fontsize=10)
        axis.tick_params(labelsize=6)
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(subtitle, fontsize=10)
    figure.savefig(path, dpi=150)


# ---- command line --------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", choices=MODELS,
        help="default: {cpu}, on a GPU {cuda}".format(**DEFAULT_MODEL))  # fmt: skip
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", choices=DTYPES,
        help="default: {cpu}, on a GPU {cuda}".format(**DEFAULT_DTYPE))  # fmt: skip
    add("--tokens", type=positive, nargs="+", metavar="N",
        help=f"default: {' '.join(map(str, TOKENS))}, on a CPU cut to its speed; "
             "always cut to memory")  # fmt: skip
    add("--keep", type=keep_ratio, default=PAPER_KEEP, metavar="RATIO",
        help="default: %(default)s")  # fmt: skip
    add("--threads", type=positive, help="default: torch's own choice")
    add("--rounds", type=positive, help="default: as many as take a second or two for each group")
    add("--json", type=Path, metavar="FILE", help="write everything there")
    add("--plot", type=Path, metavar="FILE.png", help="draw shares and ratios (needs matplotlib)")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} finds no CUDA device here")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install 'longact[plot]'")
    for path in (args.json, args.plot):
        if path and not path.absolute().parent.is_dir():
            parser.error(f"{path}: there is no directory {path.absolute().parent}")
    args.model = args.model or DEFAULT_MODEL[args.device]
    args.dtype = args.dtype or DEFAULT_DTYPE[args.device]
    return args


def plan_tokens(args: argparse.Namespace, model: ModelShape) -> tuple[list[int], list[str]]:
    """What is measured, and lines that say what is not."""
    tokens, notes = sorted(set(args.tokens or TOKENS)), []
    if args.device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if args.tokens is None:
            why = "which take a CPU too long (--tokens measures them)"
            tokens, note = cut_tokens(tokens, most_tokens_in_time(model), why)
            notes.append(note)
    why = "which take more than a quarter of the memory"
    tokens, note = cut_tokens(tokens, most_tokens(model, DTYPES[args.dtype], memory), why)
    return tokens, [line for line in (*notes, note) if line]


def run_tables(
    bench: Bench, model: ModelShape, tokens: Sequence[int]
) -> tuple[dict[str, Table], list[str]]:
    forward = Table("A", "Forward, and what statistics of its output add to it")
    grad = Table("B", "Weight gradient")
    topk = Table("C", f"Top-k of the model's {len(projections_of(model))} projections")
    for n in tokens:
        forward.groups += bench_forward(bench, model, n)
        grad.groups += [bench_grad(bench, param, n) for param in projections_of(model)[:2]]
    topk.groups, kernels = bench_topk(bench, model)
    if kernels:
        topk.notes.append(
            f"longact's one call for scope='layer' launches {len(kernels)} kernels, "
            f"{own_launches(kernels)} of them its own"
        )
    return {table.key: table for table in (forward, grad, topk)}, kernels


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    torch.manual_seed(0)
    if args.threads:
        torch.set_num_threads(args.threads)
    clock = make_clock(torch.device(args.device))
    on_gpu = args.device == "cuda"
    bench = Bench(clock, DTYPES[args.dtype], args.keep, args.rounds, on_gpu)
    info = machine(clock.device)
    model = MODELS[args.model]
    tokens, cuts = plan_tokens(args, model)
    try:
        tables, kernels = run_tables(bench, model, tokens)
    except CheckFailed as error:
        print(f"FAILED, no timings: {error}", file=sys.stderr)
        return 1
    has_goals = on_gpu or args.dtype == "float32"
    goals = find_goals(bench, tables, kernels) if has_goals else []
    advice = []
    if on_gpu:
        capability = torch.cuda.get_device_capability(0)
        advice = advice_on_fusing(tables["A"].groups, bench.dtype, capability)
        advice += advice_on_row_grad(tables["B"].groups)

    print_header(args, info, model)
    for line in cuts:
        print(line)
    for table in tables.values():
        print_table(table)
        if table.key == "A":
            for line in advice:
                print(f"   {line}")
    print("\nGoals" if has_goals else "\nOn a CPU goals are set for float32.")
    for goal in goals:
        print(goal.line())
    print_end(clock)

    if args.json:
        report = {
            "machine": info,
            "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
            "model": asdict(model),
            "tokens": tokens,
            "cuts": cuts,
            "tables": [asdict(table) for table in tables.values()],
            "advice": advice,
            "interrupted_calls": clock.interrupted_share,
            "goals": [asdict(goal) | {"reached": goal.reached} for goal in goals],
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.plot:
        plot(args.plot, tables, f"{model.name}, {args.dtype}, {info['device']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
