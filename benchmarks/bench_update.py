"""How fast a masked AdamW step is: longact.FusedMaskedAdam beside torch.optim.AdamW.

    python benchmarks/bench_update.py                # SmolLM2-135M, under a minute on 2 cores
    python benchmarks/bench_update.py --model qwen3-8b --dtype bfloat16 --keep 0.3
    python benchmarks/bench_update.py --json bench.json --plot bench.png
    python benchmarks/bench_update.py --device cuda  # beside torch.compile, apex and others, too

A  the masked parameters alone (q_proj and k_proj of each layer)
B  the whole model: q_proj and k_proj masked, everything else dense
C  large projections alone: 4 of 4096 x 4096, 16.8 M elements each
D  300 parameters of 64 elements: what a step costs the host
E  the layers: channel magnitude beside its projection's forward, row gradient beside the dense one

Every optimizer that is timed first makes two steps; a sample of its rows, of parameters and of
moments, is compared with the float64 reference. If one differs, the run ends with exit code 1 and
prints no timing. (Of torch.compile, apex, bitsandbytes and DeepSpeed a note says instead why they
are not timed.) The variants of a table take turns, each once a round, in an order that rotates;
figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import torch
from shapes import MODELS, ModelShape, ParamShape
from timing import MAX_ROUNDS, MIN_ROUNDS, Clock, Limits, Timing, make_clock, measure
from torch import Tensor, nn
from torch.nn import functional as F

import longact
from longact.kernels.channel_magnitude import channel_magnitude, channel_magnitude_unchecked
from longact.kernels.masked_adamw import AdamWGroup, ParamUpdate, reference

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PAPER_KEEP = 0.3  # of tables D and E
LR, BETAS, EPS, WEIGHT_DECAY = 1e-3, (0.9, 0.999), 1e-8, 0.1

# What an element may differ by from the float64 reference, as a share of its size and its update's.
# torch's single and foreach round to 16 bits after each of their operations.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
# torch's capturable AdamW computes 1 - beta2 ** step in float32: 6e-8 of 2e-3 at the second step.
COMPILED_TOLERANCE = 1e-4

LARGE = 4  # projections in table C: as many make the cost of a step's call small
DEFAULT_MODEL = {"cpu": "smollm2-135m", "cuda": "qwen3-8b"}
MAX_ELEMENTS = {"cpu": 256_000_000, "cuda": 1_000_000_000}  # of the model
GPU_BYTES = 32  # of a GPU's memory for each of them: 16 in float32, and what torch's foreach takes
SAMPLE_ELEMENTS = 1 << 15  # of a parameter, in rows spread over it, are checked


class CheckFailed(Exception):
    """A variant's result differs from the reference."""


# ---- variants ------------------------------------------------------------------------------------


Kind = Literal[
    "single", "foreach", "fused", "compiled", "apex", "bitsandbytes", "deepspeed", "full", "compact"
]
# What is timed on a GPU where it is installed: the package, its optimizer's module and name.
OTHERS: dict[Kind, tuple[str, str, str]] = {
    "apex": ("apex", "apex.optimizers", "FusedAdam"),
    "bitsandbytes": ("bitsandbytes", "bitsandbytes.optim", "AdamW"),
    "deepspeed": ("DeepSpeed", "deepspeed.ops.adam", "FusedAdam"),
}


@dataclass(frozen=True)
class Spec:
    """What one line of a table measures."""

    kind: Kind
    keep: float | None = None  # None: no selection, every parameter is dense

    @property
    def is_torch(self) -> bool:
        return self.kind in ("single", "foreach", "fused", "compiled")

    @property
    def is_longact(self) -> bool:
        return self.kind in ("full", "compact")

    @property
    def is_optional(self) -> bool:
        """Another's, which may not run here; a table goes without it then."""
        return self.kind == "compiled" or self.kind in OTHERS

    @property
    def label(self) -> str:
        if self.is_torch:
            return f"torch AdamW {self.kind}"
        if self.kind in OTHERS:
            package, _, name = OTHERS[self.kind]
            return f"{package} {name}"
        if self.keep is None:
            return "longact, no selection"
        return f"longact keep {self.keep:g} {self.kind}"

    def moment_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """torch and DeepSpeed store moments in the parameter's dtype, the others in float32."""
        return dtype if self.is_torch or self.kind == "deepspeed" else torch.float32

    def tolerance(self, stored: torch.dtype) -> float:
        return max(TOLERANCE[stored], COMPILED_TOLERANCE if self.kind == "compiled" else 0.0)


def gpu_specs(compiled: bool = True) -> tuple[list[Spec], list[str]]:
    """What only a GPU run times beside the rest, and the packages for it that are not installed."""
    specs = [Spec("compiled")] if compiled else []
    missing = []
    for kind, (package, _, _) in OTHERS.items():
        if importlib.util.find_spec(kind) is not None:
            specs.append(Spec(kind))
        else:
            missing.append(package)
    return specs, missing


def all_specs(keeps: Sequence[float], others: Sequence[Spec] = ()) -> list[Spec]:
    specs = [Spec("single"), Spec("foreach"), Spec("fused"), *others]
    for keep in keeps:
        specs += [Spec("full", keep), Spec("compact", keep)]
    return specs


class Buffers:
    """Parameters, gradients and full moments, which the variants share.

    A step moves the same bytes whatever the values are; eleven models would not fit into memory.
    """

    def __init__(
        self, shapes: Sequence[ParamShape], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.shapes = list(shapes)
        self.dtype, self.device = dtype, device
        self.params = [self._empty(s).uniform_(-0.05, 0.05) for s in shapes]
        self.grads = [self._empty(s).uniform_(-1.0, 1.0) for s in shapes]
        for grad in self.grads:  # away from 0: its square must not underflow in float16
            grad.add_(grad.sign(), alpha=0.5)
        self._moments: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}

    def _empty(self, shape: ParamShape, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape.shape, dtype=dtype or self.dtype, device=self.device)

    def moments(self, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        if dtype not in self._moments:
            self._moments[dtype] = [
                (self._empty(s, dtype).zero_(), self._empty(s, dtype).zero_()) for s in self.shapes
            ]
        return self._moments[dtype]

    def masked(self) -> Buffers:
        """The masked parameters alone, in the same memory."""
        part = Buffers([], self.dtype, self.device)
        chosen = [i for i, s in enumerate(self.shapes) if s.masked]
        part.shapes = [self.shapes[i] for i in chosen]
        part.params = [self.params[i] for i in chosen]
        part.grads = [self.grads[i] for i in chosen]
        for dtype, moments in self._moments.items():
            part._moments[dtype] = [moments[i] for i in chosen]
        return part


@dataclass
class Variant:
    spec: Spec
    params: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    compiled: Callable[[], object] | None = None

    def step(self) -> None:
        if self.compiled is not None:
            self.compiled()
        else:
            self.optimizer.step()


def random_rows(index: int, channels: int, keep: float) -> Tensor:
    generator = torch.Generator().manual_seed(index)
    count = max(1, int(keep * channels + 0.5))
    return torch.randperm(channels, generator=generator)[:count].sort().values.to(torch.int32)


def make_variant(spec: Spec, buffers: Buffers) -> Variant:
    params = []
    for i, shape in enumerate(buffers.shapes):
        param = nn.Parameter(buffers.params[i])  # a selection of its own, in the same memory
        param.grad = buffers.grads[i]
        if spec.keep is not None and shape.masked:
            rows = random_rows(i, shape.shape[0], spec.keep)
            longact.set_rows(param, rows.to(buffers.device))
        params.append(param)
    optimizer = make_optimizer(spec, params)
    moments = buffers.moments(spec.moment_dtype(buffers.dtype))
    for param, (exp_avg, exp_avg_sq) in zip(params, moments, strict=True):
        if spec.kind == "compact" and longact.get_rows(param) is not None:
            continue  # its moments have another shape: the optimizer makes them
        first, second = moment_names(spec)
        optimizer.state[param] = {first: exp_avg, second: exp_avg_sq}
        if spec.kind in ("bitsandbytes", "deepspeed"):
            optimizer.state[param]["step"] = 0
        elif spec.kind != "apex":  # which counts in its group
            optimizer.state[param]["step"] = torch.zeros(
                (),
                dtype=torch.float32,
                device="cpu" if spec.kind in ("single", "foreach") else buffers.device,
            )
    variant = Variant(spec, params, optimizer)
    if spec.kind == "compiled":
        torch.compiler.reset()  # of the last table's, which would count as recompilations
        variant.compiled = torch.compile(optimizer.step)
    return variant


def make_optimizer(spec: Spec, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    if spec.is_torch:
        return torch.optim.AdamW(
            params, LR, BETAS, EPS, WEIGHT_DECAY,
            foreach=spec.kind in ("foreach", "compiled"), fused=spec.kind == "fused",
            capturable=spec.kind == "compiled" and params[0].is_cuda,
        )  # fmt: skip
    if spec.kind in OTHERS:
        _, module, name = OTHERS[spec.kind]
        make = getattr(importlib.import_module(module), name)
        options = {} if spec.kind == "bitsandbytes" else {"adam_w_mode": True}
        optimizer: torch.optim.Optimizer = make(
            params, lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, **options
        )
        return optimizer
    state: Literal["full", "compact"] = "compact" if spec.kind == "compact" else "full"
    return longact.FusedMaskedAdam(params, LR, BETAS, EPS, WEIGHT_DECAY, state=state)


def moment_names(spec: Spec) -> tuple[str, str]:
    return ("state1", "state2") if spec.kind == "bitsandbytes" else ("exp_avg", "exp_avg_sq")


def elements_updated(variant: Variant) -> int:
    total = 0
    for param in variant.params:
        rows = longact.get_rows(param)
        total += param.numel() if rows is None else rows.numel() * (param.numel() // param.shape[0])
    return total


def bytes_per_element(spec: Spec, dtype: torch.dtype) -> int:
    """Reads p, g, m, v and writes p, m, v."""
    return 3 * dtype.itemsize + 4 * spec.moment_dtype(dtype).itemsize


def state_bytes(variant: Variant, *, moments_only: bool) -> int:
    return sum(
        value.numel() * value.element_size()
        for state in variant.optimizer.state.values()
        for key, value in state.items()
        if isinstance(value, Tensor) and (not moments_only or key in moment_names(variant.spec))
    )


# ---- correctness ---------------------------------------------------------------------------------


def sample(variant: Variant, index: int, at: Tensor, steps: int) -> ParamUpdate:
    """Rows `at` of one parameter and of its state, copied to float64, as `reference` takes them.

    `steps`: how many the variant has made.
    """
    param = variant.params[index]
    state = variant.optimizer.state[param]
    rows = longact.get_rows(param)
    assert param.grad is not None
    selected = torch.arange(at.numel(), device=at.device)
    if rows is not None:
        selected = torch.isin(at, rows).nonzero().squeeze(1)

    def of_state(key: str, like: Tensor) -> Tensor:
        value: Tensor | None = state.get(key)
        if value is None:  # made by the first step
            return torch.zeros_like(like)
        if rows is None or "moment_rows" not in state:
            return value.index_select(0, at).to(like.dtype)
        out = torch.zeros_like(like)
        out[selected] = value.index_select(0, torch.searchsorted(rows, at[selected])).to(like.dtype)
        return out

    p, g = (t.detach().index_select(0, at).double() for t in (param, param.grad))
    m, v = (of_state(name, p) for name in moment_names(variant.spec))
    step = torch.tensor(float(steps), device=p.device)
    if rows is None:
        return p, g, m, v, None, step, None, None, None, 0, 0
    ages = of_state("ages", torch.zeros_like(at, dtype=torch.int32))
    return p, g, m, v, None, step, ages, selected.to(torch.int32), None, 0, 0


def compare(variant: Variant, name: str, before: ParamUpdate, after: ParamUpdate) -> None:
    p, g, m, v, _, step, ages, rows, *_ = before
    wanted: ParamUpdate = (
        p.clone(), g, m.clone(), v.clone(), None,
        step.clone(), None if ages is None else ages.clone(), rows, None, 0, 0,
    )  # fmt: skip
    decay_last = variant.spec.kind == "bitsandbytes" and p.is_cuda  # p decays after its update
    decay = 0.0 if decay_last else WEIGHT_DECAY
    reference(wanted, AdamWGroup(LR, *BETAS, EPS, decay, maximize=False, zero_grad=False))
    if decay_last:
        wanted[0].mul_(1.0 - LR * WEIGHT_DECAY)
    trained = torch.full((p.shape[0],), rows is None, device=p.device)
    if rows is not None:
        trained[rows.long()] = True
    dtype = variant.params[0].dtype
    moment_dtype = variant.spec.moment_dtype(dtype)
    for part, old, want, got, stored in (
        ("param", p, wanted[0], after[0], dtype),
        ("exp_avg", m, wanted[2], after[2], moment_dtype),
        ("exp_avg_sq", v, wanted[3], after[3], moment_dtype),
    ):
        where = f"{variant.spec.label}: {part} of {name}"
        if not torch.equal(got[~trained], old[~trained]):
            raise CheckFailed(f"{where}: rows outside of the selection changed")
        # Also fails where nothing was updated: the tolerance is far below the update's own size.
        error = (got - want).abs() / (want.abs() + (want - old).abs()).clamp_min(1e-30)
        worst = float(error.max())
        if not worst <= variant.spec.tolerance(stored):
            raise CheckFailed(f"{where}: differs from the reference by {worst:.1e} of its value")


def check(variant: Variant, shapes: Sequence[ParamShape], steps: int = 2) -> None:
    """Makes steps; compares the first and the last parameter of each shape with the reference."""
    first = {(s.shape, s.masked): i for i, s in reversed(list(enumerate(shapes)))}
    last = {(s.shape, s.masked): i for i, s in enumerate(shapes)}
    samples: dict[int, Tensor] = {}
    for index in sorted({*first.values(), *last.values()}):
        rows = shapes[index].shape[0]
        count = min(rows, max(2, SAMPLE_ELEMENTS * rows // shapes[index].numel))
        at = torch.linspace(0, rows - 1, count, dtype=torch.float64).round().long()
        samples[index] = at.to(variant.params[index].device)
    for step in range(steps):
        before = {i: sample(variant, i, at, step) for i, at in samples.items()}
        variant.step()
        for i, at in samples.items():
            compare(variant, shapes[i].name, before[i], sample(variant, i, at, step + 1))


# ---- tables A to D: optimizer steps --------------------------------------------------------------


@dataclass
class Row:
    """One variant's line."""

    variant: str
    keep: float | None
    kind: str
    elements: int  # that a step updates
    ms: Timing
    vs_fused: float
    state_bytes: int
    moment_bytes: int
    gb_per_s: float | None = None
    of_copy: float | None = None
    of_add: float | None = None


@dataclass
class Table:
    key: str
    title: str
    parameters: int
    elements: int
    rounds: int
    notes: list[str] = field(default_factory=list)
    copy_gb_per_s: float | None = None  # reads and writes
    add_gb_per_s: float | None = None
    rows: list[Row] = field(default_factory=list)

    def row(self, kind: str, keep: float | None) -> Row | None:
        return next((r for r in self.rows if r.kind == kind and r.keep == keep), None)


def make_checked(specs: Sequence[Spec], buffers: Buffers, notes: list[str]) -> dict[str, Variant]:
    """Every variant, checked; `notes` gets why one of another package is left out.

    Raises:
        CheckFailed: a result of longact's or of torch's own differs from the reference.
    """
    variants = {}
    for spec in specs:
        try:
            variant = make_variant(spec, buffers)
            check(variant, buffers.shapes)
        except Exception as error:
            if not spec.is_optional:
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            notes.append(
                f"not timed: {reason if spec.label in reason else f'{spec.label}: {reason}'}"
            )
        else:
            variants[spec.label] = variant
    return variants


def bench_updates(
    key: str,
    title: str,
    specs: Sequence[Spec],
    buffers: Buffers,
    clock: Clock,
    limits: Limits,
    seconds: float,
    *,
    cold: bool = True,
) -> Table:
    """Checks every variant, then times them all. `cold=False`: host overhead, in a warm cache."""
    progress(f"table {key}: {len(specs)} variants, checking")
    notes: list[str] = []
    variants = make_checked(specs, buffers, notes)
    progress(f"table {key}: all correct, measuring")
    calls: dict[str, Callable[[], object]] = {name: v.step for name, v in variants.items()}
    if cold:
        calls |= {"copy": clock.copy, "add": clock.add}
    samples = measure(calls, clock, limits, seconds, cold=cold)
    timings = {name: Timing.of(values) for name, values in samples.items()}
    fused = timings[Spec("fused").label].median
    table = Table(
        key,
        title,
        parameters=len(buffers.shapes),
        elements=sum(s.numel for s in buffers.shapes),
        rounds=len(samples[Spec("fused").label]),
        notes=notes,
    )
    if cold:
        table.copy_gb_per_s = 2e-6 * clock.copy_bytes / timings["copy"].median
        table.add_gb_per_s = 3e-6 * clock.copy_bytes / timings["add"].median
    for name, variant in variants.items():
        spec, ms = variant.spec, timings[name]
        elements = elements_updated(variant)
        row = Row(
            name,
            spec.keep,
            spec.kind,
            elements,
            ms,
            vs_fused=fused / ms.median,
            state_bytes=state_bytes(variant, moments_only=False),
            moment_bytes=state_bytes(variant, moments_only=True),
        )
        if table.copy_gb_per_s and table.add_gb_per_s:
            row.gb_per_s = 1e-6 * elements * bytes_per_element(spec, buffers.dtype) / ms.median
            row.of_copy = row.gb_per_s / table.copy_gb_per_s
            row.of_add = row.gb_per_s / table.add_gb_per_s
        table.rows.append(row)
    return table


def whole_model_note(shapes: Sequence[ParamShape]) -> str:
    share = sum(s.numel for s in shapes if s.masked) / sum(s.numel for s in shapes)
    moved = 1 - (1 - PAPER_KEEP) * share
    return (
        f"q_proj and k_proj are {share:.1%} of the elements: keep {PAPER_KEEP:g} moves {moved:.1%} "
        f"of keep 1's bytes, so it can be {1 / moved:.2f}x as fast at best"
    )


# ---- table E: layers -----------------------------------------------------------------------------


@dataclass
class LayerRow:
    """One projection; shares are of the forward, `row_grad_ratio` of the dense weight gradient."""

    projection: str
    forward_ms: Timing
    magnitude_ms: Timing
    magnitude_masked_ms: Timing
    dense_grad_ms: Timing
    row_grad_ms: Timing
    magnitude_share: float
    magnitude_masked_share: float
    row_grad_ratio: float


def check_magnitude(y: Tensor, mask: Tensor | None) -> None:
    counted = y if mask is None else y[mask]
    want = counted.double().abs().sum(0)
    error = float(((channel_magnitude(y, mask).double() - want).abs() / want).max())
    if not error <= 1e-5:
        raise CheckFailed(
            f"channel_magnitude: differs from the reference by {error:.1e} of its value"
        )


def check_row_grad(grad: Tensor, rows: Tensor, x: Tensor, dy: Tensor) -> None:
    some = rows[:: max(1, rows.numel() // 64)].long()
    want = dy[:, some].double().t() @ x.double()
    # Each element sums `tokens` products; its error is measured against what such a sum amounts to.
    error = float((grad[some].double() - want).abs().max() / want.square().mean().sqrt())
    if not error <= 4 * torch.finfo(x.dtype).eps * x.shape[0] ** 0.5:
        raise CheckFailed(f"row gradient: differs from the reference by {error:.1e} of its size")
    others = torch.ones(grad.shape[0], dtype=torch.bool, device=grad.device)
    others[rows.long()] = False
    if bool(grad[others].any()):
        raise CheckFailed("row gradient: not zero outside of the selected rows")


def bench_layer(
    shape: ParamShape, tokens: int, dtype: torch.dtype, clock: Clock, limits: Limits, seconds: float
) -> LayerRow:
    """A projection's forward and magnitudes; its weight gradient, dense and by rows."""
    out_features, in_features = shape.shape
    kind = shape.name.rsplit(".", 1)[-1]
    progress(f"table E: {kind}")
    device = clock.device
    dense = nn.Linear(in_features, out_features, bias=False, device=device, dtype=dtype)
    salient = longact.nn.SalientLinear(
        in_features, out_features, bias=False, device=device, dtype=dtype
    )
    rows = random_rows(0, out_features, PAPER_KEEP).to(device)
    longact.set_rows(salient.weight, rows)
    x = torch.randn(tokens, in_features, device=device).to(dtype)
    dy = torch.randn(tokens, out_features, device=device).to(dtype)
    mask = torch.arange(tokens, device=device) >= tokens // 10  # a tenth of the tokens is padding
    # x needs no gradient, so each layer's own backward computes that of its weight alone.
    outputs = {layer: layer(x) for layer in (dense, salient)}
    y = outputs[dense].detach()

    def forward() -> None:
        nonlocal y
        y = F.linear(x, dense.weight.detach())

    def weight_grad(layer: nn.Linear) -> Tensor:
        grads: tuple[Tensor, ...] = torch.autograd.grad(
            outputs[layer], layer.weight, dy, retain_graph=True
        )
        return grads[0]

    check_magnitude(y, None)
    check_magnitude(y, mask)
    check_row_grad(weight_grad(salient), rows, x, dy)
    totals, counted = torch.zeros(out_features, device=device), torch.tensor(0, device=device)

    def magnitude(token_mask: Tensor | None) -> None:
        channel_magnitude_unchecked(y, token_mask, "mean_abs", totals, counted)

    # As in SalientLinear: each follows a forward, finds y where that left it, and adds to totals.
    calls: list[tuple[str, Callable[[], object]]] = [
        ("forward", forward),
        ("magnitude", lambda: magnitude(None)),
        ("forward", forward),
        ("masked", lambda: magnitude(mask)),
        ("dense", lambda: weight_grad(dense)),
        ("rows", lambda: weight_grad(salient)),
    ]
    samples: dict[str, list[float]] = {name: [] for name, _ in calls}
    for _, call in calls:
        call()  # warm-up
    started = time.perf_counter()
    while limits.more(len(samples["dense"]), started, seconds):
        for name, call in calls:
            samples[name].append(clock.seconds(call))
    ms = {name: Timing.of(values) for name, values in samples.items()}
    return LayerRow(
        f"{kind} {out_features} x {in_features}",
        ms["forward"],
        ms["magnitude"],
        ms["masked"],
        ms["dense"],
        ms["rows"],
        ms["magnitude"].median / ms["forward"].median,
        ms["masked"].median / ms["forward"].median,
        ms["rows"].median / ms["dense"].median,
    )


# ---- goals ---------------------------------------------------------------------------------------


@dataclass
class Goal:
    text: str
    measured: float
    limit: float
    at_least: bool
    unit: str = "x"

    @property
    def reached(self) -> bool:
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    def line(self) -> str:
        sign = ">=" if self.at_least else "<="
        scale = 100 if self.unit == " %" else 1
        measured, limit = f"{self.measured * scale:.3f}", f"{self.limit * scale:g}"
        verdict = "reached" if self.reached else "NOT reached"
        return (
            f"  {verdict:11}  {self.text}: {measured}{self.unit} (goal {sign} {limit}{self.unit})"
        )


def host_goal(tables: dict[str, Table]) -> Goal:
    host = tables["D"].row("full", None)
    assert host is not None
    text = "D: time of a step over 300 small parameters, of torch fused's"
    return Goal(text, 1 / host.vs_fused, 0.5, at_least=False)


def find_gpu_goals(tables: dict[str, Table]) -> list[Goal]:
    """The update's; those of the layers' ops are bench_projection.py's."""
    goals = []
    table = tables["C"]
    for keep, share in ((1.0, 0.92), (0.3, 0.85)):
        row = table.row("full", keep)
        if row is not None and row.of_copy is not None:
            text = f"C: update at keep {keep:g}, full state, of the copy bandwidth"
            goals.append(Goal(text, row.of_copy, share, at_least=True, unit=" %"))
    ours = table.row("full", 0.3)
    for kind in ("fused", "apex"):
        other = table.row(kind, None)
        if ours is not None and other is not None:
            text = f"C: update at keep 0.3, full state, against {other.variant}"
            goals.append(Goal(text, other.ms.median / ours.ms.median, 3.0, at_least=True))
    return [*goals, host_goal(tables)]


def find_goals(model: str, tables: dict[str, Table], layers: Sequence[LayerRow]) -> list[Goal]:
    """The project's speed lines, as far as this run measured them."""
    goals = []

    def speed(key: str, keep: float, limit: float) -> None:
        row = tables[key].row("full", keep)
        if row is not None:
            text = f"{key}: update at keep {keep:g}, full state, against torch fused"
            goals.append(Goal(text, row.vs_fused, limit, at_least=True))

    speed("C", 1.0, 1.0)
    speed("C", 0.3, 3.0)
    if model == "smollm2-135m":
        speed("A", 0.3, 2.5)
    goals.append(host_goal(tables))
    share = max(max(r.magnitude_share, r.magnitude_masked_share) for r in layers)
    goals.append(
        Goal("E: channel magnitude, of its projection's forward", share, 0.05, False, " %")
    )
    ratio = max(r.row_grad_ratio for r in layers)
    goals.append(Goal("E: row gradient at keep 0.3, of the dense one's time", ratio, 0.45, False))
    compact, fused = tables["A"].row("compact", 0.3), tables["A"].row("fused", None)
    if compact is not None and fused is not None:
        # 0.30 is rounded: 0.3 of 576 rows are 173.
        text = "A: moments in compact state at keep 0.3, of torch's bytes"
        goals.append(Goal(text, compact.moment_bytes / fused.moment_bytes, 0.305, False))
    return goals


# ---- output --------------------------------------------------------------------------------------

_START = time.perf_counter()


def progress(text: str) -> None:
    print(f"[{time.perf_counter() - _START:4.0f} s] {text}", file=sys.stderr, flush=True)


def in_ms(ms: float) -> str:
    return f"{ms:.2f} ms" if ms >= 1.0 else f"{ms:.3f} ms"


def print_table(table: Table) -> None:
    measured = f"{table.parameters} parameters, {table.elements / 1e6:.3g} M elements; "
    measured += f"{table.rounds} rounds"
    if table.copy_gb_per_s:
        measured += f"; copy {table.copy_gb_per_s:.1f} GB/s, add {table.add_gb_per_s:.1f} GB/s"
    print(f"\n{table.key}. {table.title}")
    for note in [measured, *table.notes]:
        print(f"   {note}")
    header = f"   {'':24}{'median':>10}{'spread':>8}"
    if table.copy_gb_per_s:
        header += f"{'GB/s':>7}{'of copy':>9}{'of add':>8}"
    print(header + f"{'state':>11}  against torch fused")
    for row in table.rows:
        line = f"   {row.variant:24}{in_ms(row.ms.median):>10}{row.ms.spread:8.0%}"
        if row.gb_per_s is not None:
            line += f"{row.gb_per_s:7.1f}{row.of_copy:9.0%}{row.of_add:8.0%}"
        slower = "  slower" if row.vs_fused < 0.995 and row.variant.startswith("longact") else ""
        print(line + f"{row.state_bytes / 1e6:8.1f} MB{row.vs_fused:8.2f}x{slower}")


def print_layers(layers: Sequence[LayerRow], tokens: int) -> None:
    print(f"\nE. The layers, {tokens} tokens (a tenth of them padding where masked)")
    print(
        f"   {'projection':22}{'forward':>10}  {'+ magnitude':>16}  {'masked':>16}  "
        f"{'dense dW':>10}  {f'dW of {PAPER_KEEP:g} rows':>18}"
    )
    for r in layers:
        print(
            f"   {r.projection:22}{in_ms(r.forward_ms.median):>10}  "
            f"{in_ms(r.magnitude_ms.median):>9} {r.magnitude_share:6.1%}  "
            f"{in_ms(r.magnitude_masked_ms.median):>9} {r.magnitude_masked_share:6.1%}  "
            f"{in_ms(r.dense_grad_ms.median):>10}  "
            f"{in_ms(r.row_grad_ms.median):>10} {r.row_grad_ratio:6.2f}x"
        )


def bytes_model_text(dtype: torch.dtype, clock: Clock) -> str:
    name = str(dtype).removeprefix("torch.")
    ours, theirs = bytes_per_element(Spec("full"), dtype), bytes_per_element(Spec("fused"), dtype)
    if ours == theirs:
        size = f"{ours} bytes an element in {name}"
    else:
        size = (
            f"in {name} {theirs} bytes an element with torch's {name} moments,\n"
            f"{ours} with longact's float32 ones"
        )
    copied = clock.copy_bytes >> 20
    text = f"""\
GB/s: the bytes that an update must move, over its median time. AdamW reads p, g, m, v and writes
p, m, v: {size}; a masked step moves that for its selected rows.
of copy: share of what torch's copy_ of {copied} MiB reaches in the same rounds, its reads
and writes counted. A processor may fetch each line before it overwrites it, which is not counted,
so above 100 % is possible. of add: the same of an in-place add, which has no such hidden bytes.
spread: interquartile range over median. state: what the optimizer holds.
Rows are random, from a fixed seed. Before each step the caches are emptied, as a forward and a
backward do."""
    if clock.device.type == "cuda":
        text += f"""
Times are the device's, between two CUDA events, the host being ahead; those of table D are the
host's, without waiting for the device. The caches are emptied by writing {copied} MiB."""
    return text


def machine(device: torch.device) -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(": ", 1)[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "cpu": name,
        "cpus": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else name,
        "system": platform.platform(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "longact": longact.__version__,
        "backends": {op: devices[device.type] for op, devices in longact.backends().items()},
        "threads": torch.get_num_threads(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


@dataclass
class DeviceLimits:
    """What a GPU can do at best: the two floors under a step's time."""

    copy_gb_per_s: float  # reads and writes
    add_gb_per_s: float
    launch_us: float  # one kernel that has next to nothing to do
    l2_mib: float

    @classmethod
    def of(cls, clock: Clock, limits: Limits) -> DeviceLimits:
        calls: dict[str, Callable[[], object]] = {
            "copy": clock.copy,
            "add": clock.add,
            "launch": clock.launch,
        }
        samples = measure(calls, clock, limits, 1.0, cold=True)
        ms = {name: Timing.of(values).median for name, values in samples.items()}
        return cls(
            2e-6 * clock.copy_bytes / ms["copy"],
            3e-6 * clock.copy_bytes / ms["add"],
            1e3 * ms["launch"],
            torch.cuda.get_device_properties(clock.device).L2_cache_size / 2**20,
        )


def print_device(found: DeviceLimits, missing: Sequence[str]) -> None:
    print(
        f"Measured here: copy {found.copy_gb_per_s:.0f} GB/s, in-place add "
        f"{found.add_gb_per_s:.0f} GB/s, a kernel of one element {found.launch_us:.1f} us; "
        f"L2 {found.l2_mib:.0f} MiB"
    )
    if missing:
        print(f"Not installed, so not compared: {', '.join(missing)}")


def print_header(
    args: argparse.Namespace, info: dict[str, Any], model: ModelShape, clock: Clock
) -> None:
    print(f"longact {info['longact']}, torch {info['torch']}, Python {info['python']}")
    print(f"{info['device']}, {info['threads']} threads, {args.dtype}")
    print(f"longact's update runs on: {info['backends']['masked_adamw_']}")
    whole = MODELS[args.model]
    if model == whole:
        print(f"{model.name}: all {whole.layers} layers, {whole.numel / 1e6:.1f} M elements")
    else:
        print(
            f"{model.name}: cut to {model.layers} of {whole.layers} layers and the same share of "
            "its vocabulary, to fit\ninto time and memory (--max-elements): "
            f"{model.numel / 1e6:.1f} M of {whole.numel / 1e6:.1f} M elements"
        )
    print()
    print(bytes_model_text(DTYPES[args.dtype], clock))


def print_end(clock: Clock) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
    seconds = time.perf_counter() - _START
    print("\nAll variants agreed with the float64 reference.")
    print(f"{seconds:.0f} s, {peak:.1f} GiB of memory at most.")
    share = clock.interrupted_share
    advice = ": repeat this on an idle machine" if share > 0.25 else ""
    print(f"Other processes interrupted {share:.0%} of the timed calls{advice}.")


def plot(path: Path, tables: dict[str, Table], subtitle: str) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    shown = [tables[key] for key in "ACB"]
    keeps = [r.keep for r in shown[0].rows if r.kind == "full"]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    width = 0.8 / len(shown)
    for i, table in enumerate(shown):
        speeds = [r.vs_fused for r in table.rows if r.kind == "full"]
        at = [x + (i - (len(shown) - 1) / 2) * width for x in range(len(keeps))]
        bars = axes.bar(
            at, speeds, width * 0.92, label=table.title, color=("#1b5e8a", "#4fa3d1", "#b8b8b8")[i]
        )
        axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(keeps)), [f"keep {keep:g}" for keep in keeps])
    axes.set_ylabel("speed, torch fused AdamW = 1")
    axes.set_title(f"longact.FusedMaskedAdam, full state\n{subtitle}", fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


# ---- command line --------------------------------------------------------------------------------


def keep_ratio(text: str) -> float:
    value = float(text)
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text}: must lie in (0, 1]")
    return value


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return value


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", choices=MODELS,
        help="default: {cpu}, on a GPU {cuda}".format(**DEFAULT_MODEL))  # fmt: skip
    add("--keep", type=keep_ratio, nargs="+", default=[1.0, 0.5, 0.3, 0.1], metavar="RATIO")
    add("--dtype", choices=DTYPES, default="float32", help="of parameters and gradients")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=positive, help="default: torch's own choice")
    add("--rounds", type=positive, help=f"default: {MIN_ROUNDS} to {MAX_ROUNDS}, as time allows")
    add("--tokens", type=positive, default=2048, help="of table E (default: %(default)s)")
    add("--max-elements", type=positive, metavar="N",
        help="cut larger models to about this size "
             "(default: {cpu}, on a GPU {cuda} or what fits)".format(**MAX_ELEMENTS))  # fmt: skip
    add("--large", type=positive, metavar="N", help=f"projections in table C (default: {LARGE})")
    add("--no-compile", action="store_true", help="do not time torch.compile's AdamW on a GPU")
    add("--json", type=Path, metavar="FILE", help="write everything there")
    add("--plot", type=Path, metavar="FILE.png", help="draw the speeds (needs matplotlib)")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} finds no CUDA device here")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install 'longact[plot]'")
    for path in (args.json, args.plot):
        if path and not path.absolute().parent.is_dir():
            parser.error(f"{path}: there is no directory {path.absolute().parent}")
    args.keep = sorted(set(args.keep), reverse=True)
    args.model = args.model or DEFAULT_MODEL[args.device]
    if args.max_elements is None:
        args.max_elements = MAX_ELEMENTS[args.device]
        if args.device == "cuda":
            memory = torch.cuda.get_device_properties(0).total_memory
            args.max_elements = min(args.max_elements, memory // GPU_BYTES)
    return args


def run_tables(
    args: argparse.Namespace, model: ModelShape, clock: Clock, others: Sequence[Spec]
) -> tuple[dict[str, Table], list[LayerRow]]:
    device, dtype = clock.device, DTYPES[args.dtype]
    limits = Limits(args.rounds)
    small = Limits(args.rounds, most=200)  # a round of these takes milliseconds
    specs = all_specs(args.keep, others)
    tables = {}

    buffers = Buffers(model.parameters(), dtype, device)
    for spec in specs:
        buffers.moments(spec.moment_dtype(dtype))
    title = f"q_proj and k_proj of {model.name} alone"
    tables["A"] = bench_updates("A", title, specs, buffers.masked(), clock, limits, 6.0)
    title = f"{model.name} whole, all but q_proj and k_proj dense"
    tables["B"] = bench_updates("B", title, specs, buffers, clock, limits, 12.0)
    tables["B"].notes.append(whole_model_note(buffers.shapes))
    del buffers
    gc.collect()  # optimizers are reference cycles, and these hold most of the memory

    large = args.large or LARGE
    shapes = [ParamShape(f"large.{i}", (4096, 4096), masked=True) for i in range(large)]
    buffers = Buffers(shapes, dtype, device)
    title = f"{large} projections of 4096 x 4096 alone"
    tables["C"] = bench_updates("C", title, specs, buffers, clock, limits, 6.0)

    shapes = [ParamShape(f"small.{i}", (64,), masked=True) for i in range(300)]
    buffers = Buffers(shapes, dtype, device)
    title = "Host overhead: a step over 300 parameters of 64 elements"
    # Compiling 300 parameters' step takes longer than all else.
    others = [spec for spec in others if spec.kind != "compiled"]
    host = [Spec("fused"), *others, Spec("full"), Spec("full", PAPER_KEEP)]
    tables["D"] = bench_updates("D", title, host, buffers, clock, small, 3.0, cold=False)

    q_and_k = [s for s in model.parameters() if s.masked][:2]
    layers = [bench_layer(s, args.tokens, dtype, clock, small, 3.0) for s in q_and_k]
    return tables, layers


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    torch.manual_seed(0)
    if args.threads:
        torch.set_num_threads(args.threads)
    clock = make_clock(torch.device(args.device))
    on_gpu = args.device == "cuda"
    info = machine(clock.device)
    model = MODELS[args.model].cut(args.max_elements)
    others, missing = gpu_specs(not args.no_compile) if on_gpu else ([], [])
    found = DeviceLimits.of(clock, Limits(args.rounds)) if on_gpu else None
    try:
        tables, layers = run_tables(args, model, clock, others)
    except CheckFailed as error:
        print(f"FAILED, no timings: {error}", file=sys.stderr)
        return 1
    has_goals = args.dtype == "float32"
    goals = []
    if has_goals:
        goals = find_gpu_goals(tables) if on_gpu else find_goals(args.model, tables, layers)

    print_header(args, info, model, clock)
    if found is not None:
        print_device(found, missing)
    for table in tables.values():
        print_table(table)
    print_layers(layers, args.tokens)
    print("\nGoals" if has_goals else "\nGoals are set for float32.")
    for goal in goals:
        print(goal.line())
    print_end(clock)

    if args.json:
        report = {
            "machine": info,
            "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
            "model": asdict(model),
            "device_limits": None if found is None else asdict(found),
            "not_installed": missing,
            "tables": [asdict(table) for table in tables.values()],
            "layers": [asdict(row) for row in layers],
            "interrupted_calls": clock.interrupted_share,
            "goals": [asdict(goal) | {"reached": goal.reached} for goal in goals],
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.plot:
        plot(args.plot, tables, f"{args.dtype}, {info['device']}, {info['threads']} threads")
    return 0


if __name__ == "__main__":
    sys.exit(main())
