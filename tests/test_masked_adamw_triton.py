"""The Triton masked update: against the reference, in Triton's interpreter or on a GPU, and
compiled ahead of time for GPUs that are not here.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import triton_tools
from helpers import (
    HALF,
    Case,
    assert_same_bits,
    bits,
    guarded,
    one_thread,
    pick_rows,
)
from torch import Tensor
from triton_tools import (
    AMD,
    DEVICE,
    INTERPRETED,
    NVIDIA,
    assert_no_spills,
    compile_kernel,
    compiled,
    cuobjdump,
    no_reads_by_the_host,
    target_id,
)

from longact.backends import DTYPE_CODES, native
from longact.kernels.masked_adamw import AdamWGroup, NativeTable, ParamUpdate, dispatch
from longact.kernels.rounding import _philox, stochastic_round

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
masked_adamw_triton = pytest.importorskip("longact.kernels.masked_adamw_triton")

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

# Rows of 8 n elements at aligned addresses are read in vectors, the others element by element.
SHAPES: list[tuple[int, ...]] = [
    (1,), (70,), (3, 1), (21, 13), (7, 3, 5), (2, 500), (24, 8), (2, 304), (256,), (), (0,),
    (0, 5), (5, 0),
]  # fmt: skip
DTYPES = [
    (torch.float32, torch.float32, torch.float32),
    (torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float32, torch.bfloat16),
    (torch.float16, torch.float16, torch.float32),
]
KINDS = ["none", "empty", "one", "random", "all"]


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many programs, and blocks to a program, even for small tensors."""
    monkeypatch.setattr(masked_adamw_triton, "_CHUNK", 256)
    monkeypatch.setattr(masked_adamw_triton, "_BLOCK", 128)
    monkeypatch.setattr(masked_adamw_triton, "_ROWS", 16)
    monkeypatch.setattr(masked_adamw_triton, "_FLAT_ROW", 512)


def runs_kernels(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.usefixtures(runner.__name__)(triton_tools.runs_kernels(test))


def update(
    updates: Sequence[ParamUpdate],
    groups: Sequence[AdamWGroup],
    grad_scale: float | Tensor = 1.0,
    found_inf: Tensor | None = None,
) -> None:
    """`masked_adamw_triton.update`; on a GPU, of copies, guards and all, that are copied back."""
    assert all(masked_adamw_triton.supports(u) for u in updates)
    moved: dict[int, tuple[Tensor, Tensor]] = {}

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        storage = value.untyped_storage()
        whole = torch.empty(0, dtype=value.dtype).set_(storage)  # type: ignore[call-overload]
        # Not id(): the storage's Python object is made anew each time.
        there = moved.setdefault(storage.data_ptr() or id(value), (whole, whole.to(DEVICE)))[1]
        return there.as_strided(value.size(), value.stride(), value.storage_offset())

    def run(updates: Sequence[ParamUpdate]) -> None:
        masked_adamw_triton.update(
            updates,
            [g._replace(lr=move(g.lr)) for g in groups],
            move(grad_scale),
            move(found_inf),
        )

    if DEVICE == "cpu":
        run(updates)
        return
    run([tuple(move(t) for t in u) for u in updates])  # type: ignore[misc]
    for here, there in moved.values():
        here.copy_(there)


def make_groups(zero_grad: bool = False, **options: Any) -> list[AdamWGroup]:
    """Nothing at its default; eps large enough that its place in the formula shows."""
    groups = [
        AdamWGroup(0.02, 0.8, 0.95, 1e-3, 0.3, maximize=False, zero_grad=zero_grad),
        AdamWGroup(0.005, 0.95, 0.9, 1e-5, 0.7, maximize=True, zero_grad=zero_grad),
    ]
    return [group._replace(**options) for group in groups]


def make_cases(
    dtype: torch.dtype = torch.float32,
    grad_dtype: torch.dtype | None = None,
    kinds: Sequence[str] = KINDS,
    policy: str = "freeze",
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    **options: Any,
) -> list[Case]:
    """One parameter of each shape, with the kinds of selection in turn; some are misaligned."""
    generator = torch.Generator().manual_seed(7)
    return [
        Case(
            shape,
            dtype,
            grad_dtype,
            pick_rows(kinds[i % len(kinds)], shape[0], generator) if shape else None,
            group=i % 2,
            compact=policy == "compact",
            zero_grad=policy == "zero_grad",
            shift=0 if math.prod(shape[1:]) % 8 == 0 else i % 8,
            seed=i,
            key=i + 3,
            **{"amsgrad": i % 3 == 1, **options},
        )
        for i, shape in enumerate(shapes)
    ]


def run(
    cases: Sequence[Case],
    groups: Sequence[AdamWGroup],
    steps: int = 3,
    grad_scale: float = 1.0,
    *,
    each: Callable[[int], None] = lambda step: None,
    as_tensor: bool = False,
) -> None:
    """Step by step, everything compared after each one."""
    for step in range(steps):
        each(step)
        before = []
        for case in cases:
            case.new_grad(grad_scale)
            before.append(case.snapshot())
        update(
            [case.update for case in cases],
            [g._replace(lr=torch.tensor(g.lr)) for g in groups] if as_tensor else groups,
            torch.tensor([grad_scale]) if as_tensor else grad_scale,
            torch.tensor([0.0]) if as_tensor else None,
        )
        for case, old in zip(cases, before, strict=True):
            what = f"{[*case.param.tensor.shape]} step {step}"
            case.step_reference(groups, grad_scale)
            case.compare(what)
            case.check_untouched(old, what)
    for case in cases:
        case.check_guards(f"{[*case.param.tensor.shape]}")


# ---- the formula, every step ---------------------------------------------------------------------


@runs_kernels
@pytest.mark.parametrize("policy", ["freeze", "compact", "zero_grad"])
@pytest.mark.parametrize(("dtype", "grad_dtype", "moment_dtype"), DTYPES)
def test_every_step_matches_the_reference(
    dtype: torch.dtype, grad_dtype: torch.dtype, moment_dtype: torch.dtype, policy: str
) -> None:
    first = DTYPES.index((dtype, grad_dtype, moment_dtype))  # each shape meets every kind
    kinds = KINDS[first:] + KINDS[:first]
    cases = make_cases(dtype, grad_dtype, kinds, policy, moment_dtype=moment_dtype)
    run(cases, make_groups(policy == "zero_grad"))


@runs_kernels
def test_many_steps_match_the_reference() -> None:
    cases = make_cases(kinds=["none", "random"], shapes=[(40,), (6, 8), (3, 1), ()])
    run(cases, make_groups(), 22)


@runs_kernels
@pytest.mark.parametrize("policy", ["freeze", "compact", "zero_grad"])
@pytest.mark.parametrize("dtype", HALF)
def test_master_weights(dtype: torch.dtype, policy: str) -> None:
    """The master is trained as an fp32 parameter is, and the parameter is the master rounded."""
    shapes = [(21, 13), (12, 16), (63,), ()]
    cases = make_cases(dtype, dtype, ["random", "none"], policy, shapes, master=True)
    run(cases, make_groups(policy == "zero_grad"))
    for case in cases:
        touched = case.touched if case.param.tensor.dim() else ...
        master = case.master.tensor if case.compact else case.master.tensor[touched]
        assert_same_bits(case.param.tensor[touched], master.to(dtype), "parameter of the master")


@runs_kernels
@pytest.mark.parametrize("policy", ["none", "freeze", "compact", "zero_grad"])
def test_stochastic_rounding_has_the_bits_of_the_reference(policy: str) -> None:
    """From the same fp32 values: those of an fp32 twin, rounded by the reference."""
    kinds = ["none" if policy == "none" else "random"]
    shapes = [(21, 13), (7, 3, 5), (), (24, 8), (2, 304)]
    seed = 2**63 + 12345
    groups = make_groups(policy == "zero_grad")
    for aligned in (True, False):
        cases = make_cases(torch.bfloat16, torch.float32, kinds, policy, shapes)
        for case in cases:
            names = ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
            for name in names if aligned else ():
                if (guard := getattr(case, name)) is not None:
                    setattr(case, name, guarded(guard.tensor, 0))
        for step in range(1, 3):
            twins = []
            for case in cases:
                case.new_grad()
                twin = [t.clone() if isinstance(t, Tensor) else t for t in case.update]
                twin[0] = twin[0].float()
                twins.append(tuple(twin))
            seeded = [g._replace(seed=seed) for g in groups]
            update([*(case.update for case in cases), *twins], seeded)
            for case, twin in zip(cases, twins, strict=True):
                param = case.param.tensor
                elements = torch.arange(param.numel()).view(param.shape)
                expected = stochastic_round(twin[0], elements, seed, case.key, step)
                touched = case.touched if param.dim() else ...
                assert_same_bits(param[touched], expected[touched], f"{[*param.shape]} {step}")
                if param[touched].numel() > 100:
                    assert not torch.equal(param, twin[0].bfloat16()), "rounded to nearest"
                case.check_guards(f"{[*param.shape]} {step}")


@triton.jit
def _random_bits_kernel(out, at, key, step, seed, VECTOR: tl.constexpr):
    vectors = tl.arange(0, 16 // VECTOR)[:, None] * VECTOR
    lane = tl.arange(0, VECTOR)[None, :]
    key, step, seed = tl.load(key), tl.load(step), tl.load(seed)
    random = masked_adamw_triton._random_bits(tl.load(at) + vectors, lane, key, step, seed, VECTOR)
    tl.store(out + vectors + lane, random.to(tl.int32))


@runs_kernels
@pytest.mark.parametrize("vector", [1, 8])
@pytest.mark.parametrize("at", [0, 2**31 - 8, 2**35 + 2**34 + 16])
def test_random_bits_are_those_of_the_reference(at: int, vector: int) -> None:
    """Also where the counter's high half counts, and for every half of seed and key."""
    key, step, seed = 2**31 + 5, 12_345_678, -(2**62) - 99
    out = torch.empty(16, dtype=torch.int32, device=DEVICE)
    arguments = (torch.tensor([x], device=DEVICE) for x in (at, key, float(step), seed))
    _random_bits_kernel[(1,)](out, *arguments, VECTOR=vector)
    groups = torch.tensor([at // 8, at // 8 + 1])
    words = _philox(
        groups & 0xFFFFFFFF, groups >> 32, torch.tensor([key] * 2), torch.tensor([step] * 2),
        seed % 2**64,
    )  # fmt: skip
    expected = torch.stack((words & 0xFFFF, words >> 16), dim=2).flatten()
    assert out.tolist() == expected.tolist()


@runs_kernels
@pytest.mark.parametrize("policy", ["freeze", "zero_grad"])
def test_rows_that_change_between_steps(policy: str) -> None:
    """Rows of many ages side by side: each is corrected by its own."""
    cases = make_cases(kinds=["random"], policy=policy, shapes=[(63,), (21, 13), (24, 8)])

    def reselect(step: int) -> None:
        for case in cases:
            kind = ["random", "one", "random", "all", "random", "empty"][step % 6]
            case.rows = pick_rows(kind, case.param.tensor.shape[0], case.generator)

    run(cases, make_groups(policy == "zero_grad"), 12, each=reselect)
    if policy == "freeze":
        assert all(case.ages.tensor.unique().numel() > 3 for case in cases)
        for case in cases:
            case.rows = None  # dense again, its rows of different ages
        run(cases, make_groups(), 2)


@runs_kernels
@pytest.mark.parametrize("age", [1, 1000, 100_000, 16_000_000])
def test_bias_correction_at_high_ages(age: int) -> None:
    """beta**age in fp32 would be off long before these."""
    rows = torch.tensor([1, 2], dtype=torch.int32)
    group = AdamWGroup(0.01, 0.9, 0.99999, 1e-8, 0.1, maximize=False, zero_grad=False)
    run([Case((4, 9), rows=rows, ages=[age] * 4, step=age), Case((9,), step=age)], [group])


@runs_kernels
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("grad_scale", [1024.0, 3.0])
def test_gradients_are_divided_by_the_scale(grad_scale: float, as_tensor: bool) -> None:
    """Tensors, that of lr too, are read on the device."""
    cases = make_cases(kinds=["random", "none"], shapes=[(21, 13), (300,), ()])
    run(cases, make_groups(), grad_scale=grad_scale, as_tensor=as_tensor)


@runs_kernels
@pytest.mark.parametrize(
    ("policy", "value"), [("freeze", 1.0), ("compact", math.inf), ("zero_grad", math.nan)]
)
def test_found_inf_writes_nothing(policy: str, value: float) -> None:
    shapes = [(21, 13), (24, 8), (5,), ()]
    cases = make_cases(torch.bfloat16, kinds=["random", "none"], policy=policy, shapes=shapes)
    for case in cases:
        case.new_grad()
    before = [case.snapshot() for case in cases]
    groups = make_groups(policy == "zero_grad", seed=1)
    update([case.update for case in cases], groups, found_inf=torch.tensor([value]))
    for case, old in zip(cases, before, strict=True):
        for x, y in zip(old, case.snapshot(), strict=True):
            assert x is None or torch.equal(x, y)
    run(cases, make_groups(policy == "zero_grad"), 1)  # the first step all the same


# ---- bits ----------------------------------------------------------------------------------------


@runs_kernels
@pytest.mark.skipif(native is None, reason="needs the native build")
@pytest.mark.parametrize("policy", ["none", "freeze", "compact", "zero_grad"])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float16, {"grad_dtype": torch.float32}),
        (torch.bfloat16, {"moment_dtype": torch.bfloat16}),
        (torch.bfloat16, {"master": True}),
    ],
)
def test_bits_are_those_of_the_native_core(
    dtype: torch.dtype, options: dict[str, Any], policy: str
) -> None:
    """No fused multiply-add, correct division and square root: nothing is left to chance."""
    kinds = ["none" if policy == "none" else "random"]
    shapes = [(21, 13), (), (70,), (24, 8), (2, 304)]
    ours, theirs = (
        make_cases(dtype, kinds=kinds, policy=policy, shapes=shapes, **options) for _ in range(2)
    )
    # The bf16 case is rounded at random.
    groups, table = make_groups(policy == "zero_grad", seed=77), NativeTable()
    for _ in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            mine.new_grad()
            grad = mine.grad.tensor.flatten()
            if grad.numel() > 60 and policy == "none":
                grad[:3] = torch.tensor([math.inf, -math.inf, math.nan])
            other.grad.tensor.copy_(mine.grad.tensor)
        update([case.update for case in ours], groups, 3.0)
        table.update([case.update for case in theirs], groups, 3.0)
        for mine, other in zip(ours, theirs, strict=True):
            for x, y in zip(mine.update[:9], other.update[:9], strict=True):
                if x is not None and x is not mine.grad.tensor:
                    # NaN is NaN, but in bf16, whose NaN is torch's.
                    nan = x.isnan() & (x.dtype != torch.bfloat16)
                    assert torch.equal(nan, y.isnan() & (y.dtype != torch.bfloat16))
                    assert_same_bits(x.masked_fill(nan, 0), y.masked_fill(nan, 0), "buffer")


def _identity_update(param: Tensor, grad: Tensor, exp_avg: Tensor) -> ParamUpdate:
    moments = (exp_avg, torch.zeros_like(exp_avg), None)
    step = torch.zeros((), device=param.device)
    return (param, grad, *moments, step, None, None, None, 0, 0)


#: Leaves the parameter's value alone and puts the gradient into exp_avg.
IDENTITY = AdamWGroup(0.0, 0.0, 0.0, 1.0, 0.0, maximize=False, zero_grad=False)


@runs_kernels
@pytest.mark.parametrize("dtype", HALF)
def test_half_types_convert_exactly(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """All 65,536 patterns to fp32 and back; every tie, and the values beside it, to the type."""
    monkeypatch.setattr(masked_adamw_triton, "_CHUNK", 2**16)
    monkeypatch.setattr(masked_adamw_triton, "_BLOCK", 2**14 if INTERPRETED else 2**10)
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    param, exp_avg = every.clone(), torch.zeros(2**16)
    values = every.float()[every.isfinite()].sort().values
    ties = (values[1:].double() / 2 + values[:-1].double() / 2).float()
    ends = torch.tensor([65519.99, 65520.0, 65536.0, 3.39e38, 3.4e38, 2.0**-25, 2.0**-26, 1e-45])
    near = [torch.nextafter(ties, torch.tensor(s * math.inf)) for s in (1, -1)]
    exact = torch.cat((ties, ends, -ends, *near, torch.tensor([math.inf, -math.inf, math.nan])))
    rounded = exact.to(dtype)
    updates = [
        _identity_update(torch.zeros_like(every), every, exp_avg),
        _identity_update(param, torch.zeros_like(every), torch.zeros(2**16)),
        # The master is rounded to the parameter.
        (*_identity_update(rounded, torch.zeros_like(exact), torch.zeros_like(exact))[:8],
         exact.clone(), 0, 0),
    ]  # fmt: skip
    with torch.no_grad():
        rounded.zero_()
    update(updates, [IDENTITY])
    nan = every.isnan()
    assert torch.equal(exp_avg[~nan], every[~nan].float())
    assert bool(exp_avg[nan].isnan().all())
    assert torch.equal(bits(param)[~nan], bits(every)[~nan])
    assert bool(param[nan].isnan().all())
    expected = exact.to(dtype)
    nan = expected.isnan()
    assert torch.equal(bits(rounded)[~nan], bits(expected)[~nan])
    assert bool(rounded[nan].isnan().all())


# ---- lists of rows, layouts, launches ------------------------------------------------------------


@runs_kernels
@pytest.mark.parametrize("policy", ["freeze", "zero_grad", "compact"])
@pytest.mark.parametrize(
    ("rows", "valid"),
    [
        ([1, 6], [1]), ([-1, 3], [3]), ([3, 1], [3]), ([2, 2, 4], [2, 4]), ([-5, -3, 2], [2]),
        ([2**31 - 1, -(2**31), 0], [0]), ([4, 5, 900_000_000], [4, 5]),
    ],
)  # fmt: skip
def test_rows_that_do_not_exist_are_left_alone(
    rows: list[int], valid: list[int], policy: str
) -> None:
    """The optimizer checks rows when they are set; they may be written to after that."""
    good = torch.arange(len(rows), dtype=torch.int32)
    for columns in (3, 8):
        case = Case(
            (6, columns), rows=good, compact=policy == "compact", zero_grad=policy == "zero_grad"
        )
        case.new_grad()
        case.grad.tensor.fill_(1.0)
        case.rows = torch.tensor(rows, dtype=torch.int32)
        before = case.param.tensor.clone()
        update([case.update], make_groups(policy == "zero_grad"))
        case.check_guards("after")
        changed = (case.param.tensor != before).any(dim=1).nonzero().flatten().tolist()
        assert changed == ([*range(6)] if policy == "zero_grad" else valid)
        if case.ages is not None:
            assert case.ages.tensor.sum() == len(valid)


@runs_kernels
@pytest.mark.parametrize("policy", ["freeze", "zero_grad"])
def test_rows_in_a_buffer_with_their_count(policy: str) -> None:
    """What the buffer holds beyond the count is not looked at; nor is a count beyond the buffer."""
    case = Case((9, 8), rows=torch.tensor([1, 4], dtype=torch.int32), zero_grad=policy != "freeze")
    rows = [torch.tensor(r, dtype=torch.int32) for r in ([1, 4], [], [*range(9)], [0, 2, 8])]
    for step, selected in enumerate(rows):
        case.rows = selected
        case.new_grad()
        before = case.snapshot()
        count = [len(selected) if len(selected) < 9 else 1_000_000]
        buffer = torch.tensor(
            [*count, *selected.tolist(), *[7] * (9 - len(selected))], dtype=torch.int32
        )
        update([(*case.update[:7], buffer, *case.update[8:])], make_groups(policy == "zero_grad"))
        case.step_reference(make_groups(policy == "zero_grad"))
        case.compare(f"step {step}")
        case.check_untouched(before, f"step {step}")
    case.check_guards("after")
    empty = torch.tensor([-3, *range(9)], dtype=torch.int32)
    before = case.snapshot()
    case.grad.tensor.fill_(1.0)
    update([(*case.update[:7], empty, *case.update[8:])], make_groups())
    assert_same_bits(bits(case.param.tensor), before[0], "a count below zero")


@runs_kernels
@pytest.mark.parametrize("layout", ["transposed", "negative"])
def test_gradients_of_any_layout(layout: str) -> None:
    """torch keeps the minus sign of a negative view in a flag, not in its bytes."""
    values = [[1.0, 3.0, 5.0], [2.0, 4.0, 6.0]]
    if layout == "transposed":
        grad = torch.arange(1.0, 7.0, device=DEVICE).view(3, 2).t()
    else:
        grad = torch._neg_view(-torch.tensor(values, device=DEVICE))
    param, exp_avg = (torch.zeros(2, 3, device=DEVICE) for _ in range(2))
    masked_adamw_triton.update([_identity_update(param, grad, exp_avg)], [IDENTITY])
    assert exp_avg.tolist() == values


class Launches:
    """Counts the launches of a kernel."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.grids = kernel, []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            assert kwargs["enable_fp_fusion"] is False
            self.grids.append(grid[0])
            self.kernel[grid](*args, **kwargs)

        return launch


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Launches, Launches]]:
    counters = []
    for name in ("_prepare_kernel", "_update_kernel"):
        counters.append(Launches(getattr(masked_adamw_triton, name)))
        monkeypatch.setattr(masked_adamw_triton, name, counters[-1])
    return counters[0], counters[1]


@runs_kernels
def test_one_launch_for_each_combination(launches: tuple[Launches, Launches]) -> None:
    cases = [Case((3,), group=i % 2, seed=i, shift=1) for i in range(30)]
    run(cases, make_groups(), 1)
    assert launches[0].grids == [30]
    assert launches[1].grids == [30]
    mixed = make_cases(torch.bfloat16, kinds=["none"], shapes=[(9,), (8, 8), (5,)], amsgrad=False)
    run([*cases[:3], *mixed], make_groups(), 1)
    assert len(launches[0].grids) == 2
    assert sorted(launches[1].grids[1:]) == [1, 2, 3]
    update([], make_groups())
    assert len(launches[0].grids) == 2


@triton.jit
def _find_kernel(out, items, firsts, count):
    i = tl.program_id(0)
    tl.store(out + i, masked_adamw_triton._find(firsts, count, tl.load(items + i)))


@runs_kernels
@pytest.mark.parametrize("count", [1, 256, 257, 700])
def test_a_program_finds_its_tensor(count: int) -> None:
    """Among more tensors than are looked at at once, too."""
    middle = count // 2
    firsts = torch.arange(count, dtype=torch.int32)
    firsts[middle + 1 :] += 6  # the one in the middle has 7 items
    items = [0, middle - 1, middle, middle + 6, middle + 7, count + 4, count + 5]
    items = torch.tensor([i for i in items if 0 <= i < count + 6], dtype=torch.int32)
    out = torch.empty_like(items, device=DEVICE)
    _find_kernel[(items.numel(),)](out, items.to(DEVICE), firsts.to(DEVICE), count)
    assert out.tolist() == [int((firsts <= i).sum()) - 1 for i in items]


@runs_kernels
def test_unselected_rows_cost_no_programs(launches: tuple[Launches, Launches]) -> None:
    rows = torch.tensor([0, 40], dtype=torch.int32)
    run([Case((100, 128), rows=rows)], make_groups(), 1)
    assert launches[1].grids == [1]  # of 256 elements: the two rows


@runs_kernels
def test_nothing_waits_for_the_device() -> None:
    """Not for lr, the scale or found_inf, which may be tensors there."""
    rows = torch.tensor([1, 2], dtype=torch.int32)
    updates: list[Any] = [
        tuple(t.to(DEVICE) if isinstance(t, Tensor) else t for t in case.update)
        for case in (Case((3, 8), rows=rows), Case((5,), seed=1))
    ]
    groups = make_groups(lr=torch.tensor(0.5, device=DEVICE))
    scale, found_inf = torch.ones(1, device=DEVICE), torch.zeros(1, device=DEVICE)
    with no_reads_by_the_host():
        masked_adamw_triton.update(updates, groups, scale, found_inf)
    assert [u[5].item() for u in updates] == [1.0, 1.0]


@runs_kernels
def test_dispatch_sends_the_rest_to_the_reference() -> None:
    if DEVICE != "cpu":
        pytest.skip("cases live on the CPU")
    cases = [Case((5, 8)), Case((5, 8), torch.float64, seed=1)]
    for case in cases:
        case.new_grad()
    dispatch([case.update for case in cases], make_groups(), backend="triton")
    for case in cases:
        case.step_reference(make_groups())
        case.compare("dispatch")


# ---- what runs without kernels -------------------------------------------------------------------


def test_longact_imports_without_triton() -> None:
    script = "import sys, longact; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_supports() -> None:
    supports = masked_adamw_triton.supports

    def with_(shape: tuple[int, ...] = (4, 6), **options: Any) -> list[Any]:
        return list(Case(shape, rows=torch.tensor([1], dtype=torch.int32), **options).update)

    for dtype in (torch.float32, *HALF):
        assert supports(tuple(with_(dtype=dtype, grad_dtype=torch.bfloat16)))  # type: ignore[arg-type]
    assert supports(tuple(with_(dtype=torch.bfloat16, moment_dtype=torch.bfloat16, master=True)))  # type: ignore[arg-type]
    assert not supports(tuple(with_(dtype=torch.float64)))  # type: ignore[arg-type]
    assert not supports(tuple(with_(dtype=torch.complex64)))  # type: ignore[arg-type]
    for i in (0, 2, 3, 4, 7, 8):
        strided = with_(dtype=torch.bfloat16, amsgrad=True, master=True)
        other = strided[i]
        strided[i] = torch.empty(*other.shape, 2, dtype=other.dtype)[..., 0]
        if strided[i].numel() < 2:
            strided[i] = torch.empty(4, 2, dtype=other.dtype)[:, 0]
        assert not supports(tuple(strided)), i  # type: ignore[arg-type]
    long = torch.empty(1, 2**30, device="meta")
    assert not supports((long, long, long, long, None, *with_()[5:]))  # type: ignore[arg-type]
    flat = torch.empty(2**32, device="meta")
    assert supports((flat, flat, flat, flat, None, *with_()[5:]))  # type: ignore[arg-type]


# ---- compiled for GPUs that are not here ---------------------------------------------------------

TYPES = {
    "tensors": "*i64", "groups": "*fp64", "firsts": "*i32", "num_tensors": "i32",
    "scalars": "*fp32", "entries": "*i64", "coefficients": "*i64",
}  # fmt: skip
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
FP32, BF16 = torch.float32, torch.bfloat16
COMBINATIONS: dict[str, tuple[torch.dtype, torch.dtype, torch.dtype, bool, bool, bool]] = {
    "fp32": (FP32, FP32, FP32, False, False, False),
    "amsgrad": (FP32, FP32, FP32, False, True, False),
    "bf16": (BF16, BF16, FP32, False, False, False),
    "master": (BF16, BF16, FP32, True, False, False),
    "stochastic": (BF16, BF16, BF16, False, False, True),
}


# Every combination for one architecture; for the others the two that need most registers.
@compiled
@pytest.mark.parametrize("vector", [8, 1])
@pytest.mark.parametrize(
    ("name", "target"),
    [
        pytest.param(name, target, id=f"{name}-{target_id(target)}")
        for target in NVIDIA
        for name in (COMBINATIONS if target.arch == 90 else ["amsgrad", "stochastic"])
    ],
)
def test_update_kernel_compiles_for_nvidia(
    name: str,
    target: Any,
    vector: int,
    tmp_path: Path,
) -> None:
    param, grad, moment, master, amsgrad, stochastic = COMBINATIONS[name]
    module = masked_adamw_triton
    constants = {
        "PARAM": DTYPE_CODES[param], "GRAD": DTYPE_CODES[grad], "MOMENT": DTYPE_CODES[moment],
        "MASTER": master, "AMSGRAD": amsgrad, "STOCHASTIC": stochastic, "VECTOR": vector,
        "BLOCK": module._BLOCK, "CHUNK": module._CHUNK,
    }  # fmt: skip
    kernel = compile_kernel(
        module._update_kernel, TYPES, constants, target, tmp_path, **OPTIONS | {"num_warps": 8}
    )
    assert_no_spills(kernel, tmp_path)
    # Multiplication and addition apart, division and square root rounded to nearest.
    ptx = kernel.asm["ptx"]
    assert "fma" not in ptx
    # Triton 3.4 flushes subnormal numbers there.
    assert set(re.findall(r"div\.\S*f32", ptx)) in ({"div.rn.f32"}, {"div.rn.ftz.f32"})
    assert set(re.findall(r"sqrt\.\S*f32", ptx)) in ({"sqrt.rn.f32"}, {"sqrt.rn.ftz.f32"})
    if vector == 8:
        sass = cuobjdump("-sass", kernel, tmp_path)
        # 16 bytes an access of fp32, 8 of bf16: 4 elements a thread.
        buffers = [torch.float32 if master else param, grad, moment, moment]
        buffers += [moment] * amsgrad
        written = [b for i, b in enumerate(buffers) if i != 1] + [param] * master
        assert len(re.findall(r"LDG\.E\S*\.128", sass)) == buffers.count(torch.float32)
        assert len(re.findall(r"STG\.E\S*\.128", sass)) == written.count(torch.float32)
        assert len(re.findall(r"STG\.E\S*\.64", sass)) == written.count(torch.bfloat16)


@compiled
@pytest.mark.parametrize("target", NVIDIA, ids=target_id)
def test_prepare_kernel_compiles_for_nvidia(target: Any, tmp_path: Path) -> None:
    constants = {"ROWS": masked_adamw_triton._ROWS}
    kernel = compile_kernel(
        masked_adamw_triton._prepare_kernel, TYPES, constants, target, tmp_path, **OPTIONS
    )
    assert_no_spills(kernel, tmp_path)


@compiled
@pytest.mark.parametrize("name", ["fp32", "stochastic"])
def test_kernels_compile_for_amd(name: str, tmp_path: Path) -> None:
    param, grad, moment, master, amsgrad, stochastic = COMBINATIONS[name]
    module = masked_adamw_triton
    constants = {
        "PARAM": DTYPE_CODES[param], "GRAD": DTYPE_CODES[grad], "MOMENT": DTYPE_CODES[moment],
        "MASTER": master, "AMSGRAD": amsgrad, "STOCHASTIC": stochastic, "VECTOR": 8,
        "BLOCK": module._BLOCK, "CHUNK": module._CHUNK,
    }  # fmt: skip
    rows = {"ROWS": module._ROWS}
    try:
        kernels = [
            compile_kernel(module._update_kernel, TYPES, constants, AMD, tmp_path, **OPTIONS),
            compile_kernel(module._prepare_kernel, TYPES, rows, AMD, tmp_path, **OPTIONS),
        ]
    except Exception as error:
        if "TRITON_HIP_LLD_PATH" not in str(error):
            raise
        pytest.skip(f"older Tritons need ROCm's linker: {error}")
    for kernel in kernels:
        assert re.search(r"\.vgpr_spill_count:\s*0\b", kernel.asm["amdgcn"])
    if name == "fp32":
        assert kernels[0].asm["amdgcn"].count("global_store_dwordx4") >= 3
