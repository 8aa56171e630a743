"""The native cores of the masked update against its float64 reference, and the op around them.

The CUDA kernel runs here too: its own source, compiled for the CPU (tests/cuda_on_host).
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Sequence
from types import ModuleType

import pytest
import torch
from helpers import (
    HALF,
    INSTRUCTION_SETS,
    Case,
    Spec,
    assert_close,
    assert_same_bits,
    bits,
    guarded,
    one_thread,
    pick_rows,
    threads,
)
from torch import Tensor

import longact
from longact.backends import native
from longact.kernels.masked_adamw import (
    AdamWGroup,
    CudaTable,
    NativeTable,
    dispatch,
    masked_adamw_,
    reference,
)
from longact.kernels.rounding import stochastic_round

pytestmark = pytest.mark.usefixtures(one_thread.__name__)
MakeTable = Callable[[], NativeTable]
needs_native = pytest.mark.skipif(native is None, reason="needs the native build")

SHAPES: list[tuple[int, ...]] = [
    (1,), (63,), (4097,), (3, 1), (63, 65), (7, 3, 5), (2, 2000), (), (0,), (0, 5), (5, 0),
]  # fmt: skip
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
]
MOMENTS = [
    (torch.float32, torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32, torch.bfloat16),
]
# Sanitizers look for bad accesses, not for errors that add up.
STEPS = 4 if "LONGACT_TEST_NATIVE" in os.environ else 22


@pytest.fixture(params=["cpu", "cuda"])
def make_table(request: pytest.FixtureRequest) -> MakeTable:
    """Makes the table of the CPU path, or of the CUDA kernel on the CPU."""
    if request.param == "cpu":
        return NativeTable
    module = request.getfixturevalue("cuda_on_host")
    return lambda: CudaTable(torch.device("cpu"), module=module)


def is_cuda(make_table: MakeTable) -> bool:
    return make_table is not NativeTable


def make_groups(zero_grad: bool = False) -> list[AdamWGroup]:
    """Nothing at its default; eps large enough that its place in the formula shows."""
    return [
        AdamWGroup(0.02, 0.8, 0.95, 1e-3, 0.3, maximize=False, zero_grad=zero_grad),
        AdamWGroup(0.005, 0.95, 0.9, 1e-5, 0.7, maximize=True, zero_grad=zero_grad),
    ]


def make_cases(
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    rows_kind: str,
    policy: str,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    **options: object,
) -> list[Case]:
    """One parameter of each shape; both groups, with and without amsgrad, every misalignment."""
    generator = torch.Generator().manual_seed(7)
    cases = []
    for i, shape in enumerate(shapes):
        cases += [
            Case(
                shape,
                dtype,
                grad_dtype,
                pick_rows(rows_kind, shape[0], generator) if shape else None,
                group=i % 2,
                compact=policy == "compact",
                amsgrad=i % 3 == 1,
                zero_grad=policy == "zero_grad",
                shift=i % 8,
                seed=i,
                key=i,
                **options,
            )
        ]
    return cases


def run(
    cases: Sequence[Case],
    groups: Sequence[AdamWGroup],
    steps: int = STEPS,
    grad_scale: float = 1.0,
    *,
    table: NativeTable,
    each: Callable[[int], None] = lambda step: None,
) -> None:
    """The native core step by step, everything compared after each one."""
    for step in range(steps):
        each(step)
        before = []
        for case in cases:
            case.new_grad(grad_scale)
            before.append(case.snapshot())
        assert table.update([case.update for case in cases], groups, grad_scale) == []
        for case, old in zip(cases, before, strict=True):
            what = f"{[*case.param.tensor.shape]} step {step}"
            case.step_reference(groups, grad_scale)
            case.compare(what)
            case.check_untouched(old, what)
    for case in cases:
        case.check_guards(f"{[*case.param.tensor.shape]}")


# ---- the formula, every step ---------------------------------------------------------------------


#: Without rows the policies are the same.
ROWS_AND_POLICIES = [
    ("none", "freeze"),
    *itertools.product(["empty", "one", "random", "all"], ["freeze", "compact", "zero_grad"]),
]


@needs_native
@pytest.mark.parametrize(("rows_kind", "policy"), ROWS_AND_POLICIES)
@pytest.mark.parametrize(("dtype", "grad_dtype"), DTYPES)
def test_every_step_matches_the_reference(
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    rows_kind: str,
    policy: str,
    make_table: MakeTable,
) -> None:
    cases = make_cases(dtype, grad_dtype, rows_kind, policy)
    groups = make_groups(policy == "zero_grad")
    if dtype == torch.float64 and is_cuda(make_table):  # left to the reference
        assert len(make_table().update([case.update for case in cases], groups)) == len(cases)
        return
    run(cases, groups, table=make_table())


@needs_native
@pytest.mark.parametrize("policy", ["freeze", "compact", "zero_grad"])
@pytest.mark.parametrize(("dtype", "grad_dtype", "moment_dtype"), MOMENTS)
def test_bf16_moments(
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    moment_dtype: torch.dtype,
    policy: str,
    make_table: MakeTable,
) -> None:
    """Each step is judged by itself: what is stored is rounded, what is computed is not."""
    cases = make_cases(dtype, grad_dtype, "random", policy, moment_dtype=moment_dtype)
    run(cases, make_groups(policy == "zero_grad"), table=make_table())


@needs_native
@pytest.mark.parametrize("rows_kind", ["none", "random"])
@pytest.mark.parametrize("policy", ["freeze", "compact", "zero_grad"])
@pytest.mark.parametrize("dtype", HALF)
def test_master_weights(
    dtype: torch.dtype, policy: str, rows_kind: str, make_table: MakeTable
) -> None:
    """The master is trained as an fp32 parameter is, and the parameter is the master rounded."""
    cases = make_cases(dtype, dtype, rows_kind, policy, master=True)
    run(cases, make_groups(policy == "zero_grad"), table=make_table())
    for case in cases:
        touched = case.touched if case.param.tensor.dim() else ...
        master = case.master.tensor if case.compact else case.master.tensor[touched]
        assert_same_bits(case.param.tensor[touched], master.to(dtype), "parameter of the master")


@needs_native
@pytest.mark.parametrize("policy", ["none", "freeze", "compact", "zero_grad"])
def test_stochastic_rounding_has_the_bits_of_the_reference(
    policy: str, make_table: MakeTable
) -> None:
    """From the same fp32 values: those of an fp32 twin, rounded by the reference."""
    kind = "none" if policy == "none" else "random"
    shapes = [(63, 65), (7, 3, 5), (), (0, 5), (4097,), (40, 24), (3, 16400)]
    seed = 2**63 + 12345
    groups = [g._replace(seed=seed) for g in make_groups(policy == "zero_grad")]
    # Aligned and not: whole vectors and single elements must draw the same bits.
    for shift in (0, 1):
        cases = make_cases(torch.bfloat16, torch.float32, kind, policy, shapes)
        for case in cases:
            case.param, case.grad = (guarded(x.tensor, 8 * shift) for x in (case.param, case.grad))
        table = make_table()
        for step in range(1, 4):
            twins = []
            for case in cases:
                case.new_grad()
                twin = [None if not isinstance(t, Tensor) else t.clone() for t in case.update[:9]]
                twin[0] = twin[0].float()
                twins.append((*twin, case.key, case.group))
            table.update([case.update for case in cases], groups)
            NativeTable().update(twins, make_groups(policy == "zero_grad"))
            for case, twin in zip(cases, twins, strict=True):
                param = case.param.tensor
                elements = torch.arange(param.numel()).view(param.shape)
                expected = stochastic_round(twin[0], elements, seed, case.key, step)
                touched = case.touched if param.dim() else ...
                assert_same_bits(param[touched], expected[touched], f"{[*param.shape]} {step}")
                case.check_guards(f"{[*param.shape]} {step}")


def test_stochastic_rounding_is_right_on_average() -> None:
    """Between two bf16 values, up with the probability of the part that is cut off."""
    low, high = 1.0, 1.0 + 2**-7
    for share in (0.0, 0.25, 0.9):
        values = torch.full((40_000,), low + share * (high - low))
        rounded = stochastic_round(values, torch.arange(40_000), 3, 1, 7)
        assert set(rounded.tolist()) <= {low, high}
        assert abs((rounded == high).double().mean().item() - share) < 0.01
    special = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 3.3961e38])
    out = stochastic_round(special, torch.arange(6), 0, 0, 1)
    assert out.tolist()[:2] == [math.inf, -math.inf]
    assert out[2].isnan()
    assert bits(out[3:5]).tolist() == [0, -(2**15)]


def test_random_bits_are_those_of_philox() -> None:
    """The known answers of Random123's own test vectors, and every argument matters."""
    from longact.kernels.rounding import _philox

    def words(c0: int, c1: int, c2: int, c3: int, seed: int) -> list[int]:
        return _philox(*(torch.tensor([c]) for c in (c0, c1, c2, c3)), seed)[0].tolist()

    ones = 0xFFFFFFFF
    assert words(0, 0, 0, 0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert words(ones, ones, ones, ones, 2**64 - 1) == [
        0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD,
    ]  # fmt: skip
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert words(*pi, 0x299F31D0_A4093822) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]
    values = torch.rand(4096) + 1
    elements = torch.arange(4096)
    base = stochastic_round(values, elements, 1, 2, 3)
    for other in ((elements, 1, 2, 4), (elements, 1, 3, 3), (elements, 2, 2, 3),
                  (elements, 1 + 2**32, 2, 3), (elements + 8, 1, 2, 3),
                  (elements + 2**35, 1, 2, 3)):  # fmt: skip
        assert not torch.equal(base, stochastic_round(values, *other))


@needs_native
@pytest.mark.parametrize("policy", ["freeze", "zero_grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_change_between_steps(
    dtype: torch.dtype, policy: str, make_table: MakeTable
) -> None:
    """Rows of many ages side by side: each is corrected by its own."""
    cases = make_cases(dtype, dtype, "random", policy, [(4097,), (63, 65), (7, 3, 5)])

    def reselect(step: int) -> None:
        for case in cases:
            kind = ["random", "one", "random", "all", "random", "empty"][step % 6]
            case.rows = pick_rows(kind, case.param.tensor.shape[0], case.generator)

    run(cases, make_groups(policy == "zero_grad"), 30, table=make_table(), each=reselect)
    if policy == "freeze":
        assert all(case.ages.tensor.unique().numel() > 3 for case in cases)


@needs_native
@pytest.mark.parametrize("grad_scale", [1024.0, 3.0])
def test_gradients_are_divided_by_the_scale(grad_scale: float, make_table: MakeTable) -> None:
    cases = make_cases(torch.float32, torch.float32, "random", "freeze", [(63, 65), (4097,), ()])
    run(cases, make_groups(), grad_scale=grad_scale, table=make_table())


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policy", ["none", "freeze", "compact", "zero_grad"])
def test_tensors_of_many_chunks(policy: str, dtype: torch.dtype, make_table: MakeTable) -> None:
    """More than 65,536 elements: many rows to a chunk, a row longer than a chunk, flat."""
    kind = "none" if policy == "none" else "random"
    shapes = [(700, 130), (3, 70_001), (140_001,)]
    cases = make_cases(dtype, dtype, kind, policy, shapes)
    run(cases, make_groups(policy == "zero_grad"), steps=2, table=make_table())


@needs_native
@pytest.mark.parametrize("age", [1, 1000, 100_000, 16_000_000])
def test_bias_correction_at_high_ages(age: int, make_table: MakeTable) -> None:
    """beta**age in fp32 would be off long before these."""
    rows = torch.tensor([1, 2], dtype=torch.int32)
    group = AdamWGroup(0.01, 0.9, 0.99999, 1e-8, 0.1, maximize=False, zero_grad=False)
    cases = [Case((4, 9), rows=rows, ages=[age] * 4, step=age), Case((9,), step=age)]
    run(cases, [group], 20, table=make_table())


# ---- bits ----------------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("policy", ["none", "freeze", "compact", "zero_grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_instruction_sets_and_threads_give_the_same_bits(dtype: torch.dtype, policy: str) -> None:
    kind = "none" if policy == "none" else "random"
    shapes = [(63, 65), (7, 3, 5), (), (1200, 130), (1, 70_001), (140_001,)]
    fastest, *others = INSTRUCTION_SETS
    results = []
    for isa, count in ((fastest, 1), (fastest, 2), (fastest, 3), *((isa, 2) for isa in others)):
        cases = make_cases(dtype, dtype, kind, policy, shapes)
        if not results:
            # torch's own arithmetic depends on its threads: everyone gets these gradients.
            for case in cases:
                case.new_grad()
            grads = [case.grad.tensor.clone() for case in cases]
        groups, table = make_groups(policy == "zero_grad"), NativeTable(isa=isa)
        with threads(count):
            for sign in (1, -1):
                for case, grad in zip(cases, grads, strict=True):
                    case.grad.tensor.copy_(grad * sign)
                table.update([case.update for case in cases], groups)
        # Without the gradients: torch writes NaN in more than one way.
        results.append([[t for i, t in enumerate(case.snapshot()) if i != 1] for case in cases])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            for x, y in zip(a, b, strict=True):
                assert (x is None) == (y is None)
                assert x is None or torch.equal(x, y)


OPTIONS: list[dict[str, object]] = [
    {},
    {"amsgrad": True},
    {"master": True},
    {"moment_dtype": torch.bfloat16},
    {"moment_dtype": torch.bfloat16, "amsgrad": True},
    {"moment_dtype": torch.bfloat16, "master": True, "amsgrad": True},
]


@needs_native
@pytest.mark.parametrize("policy", ["none", "freeze", "compact", "zero_grad"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
@pytest.mark.parametrize(("dtype", "grad_dtype"), [d for d in DTYPES if torch.float64 not in d])
def test_the_cuda_kernel_has_the_bits_of_the_cpu(
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    options: dict[str, object],
    policy: str,
    cuda_on_host: ModuleType,
) -> None:
    """Aligned tensors, whose rows go in whole vectors, and others; every size of chunk."""
    kind = "none" if policy == "none" else "random"
    shapes = [(40, 24), (20_000,), (130, 8), (3, 16_400), (110, 160), (33, 12), (3, 16_390), ()]
    groups = [g._replace(seed=7) for g in make_groups(policy == "zero_grad")]
    for shift in (0, 1):
        results = []
        for table in (NativeTable(), CudaTable(torch.device("cpu"), module=cuda_on_host)):
            generator = torch.Generator().manual_seed(3)
            cases = [
                Case(
                    shape, dtype, grad_dtype,
                    pick_rows(kind, shape[0], generator) if shape else None,
                    group=i % 2, compact=policy == "compact", zero_grad=policy == "zero_grad",
                    shift=8 * shift + shift, seed=i, key=i, **options,
                )
                for i, shape in enumerate(shapes)
            ]  # fmt: skip
            for _ in range(2):
                for case in cases:
                    case.new_grad()
                assert table.update([case.update for case in cases], groups, 4.0) == []
            for case in cases:
                case.check_guards(f"{[*case.param.tensor.shape]}")
            results.append([case.snapshot() for case in cases])
        for mine, theirs, shape in zip(*results, shapes, strict=True):
            for number, (a, b) in enumerate(zip(mine, theirs, strict=True)):
                assert a is None or torch.equal(a, b), f"{shape}: buffer {number}"


@needs_native
def test_unknown_instruction_set_is_refused() -> None:
    case = Case((3,))
    before = case.snapshot()
    with pytest.raises(ValueError, match=r"'mmx' is not available here; .*: .*baseline"):
        NativeTable(isa="mmx").update([case.update], make_groups())
    assert all(x is None or torch.equal(x, y) for x, y in zip(before, case.snapshot(), strict=True))


def _identity_group(beta1: float = 0.0) -> AdamWGroup:
    """Leaves the parameter's value alone and puts the gradient into exp_avg."""
    return AdamWGroup(0.0, beta1, 0.0, 1.0, 0.0, maximize=False, zero_grad=False)


def _update(param: Tensor, grad: Tensor, exp_avg: Tensor) -> list[object]:
    return [
        param,
        grad,
        exp_avg,
        torch.zeros_like(exp_avg),
        None,
        torch.zeros(()),
        None,
        None,
        None,
        0,
        0,
    ]


@needs_native
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", HALF)
def test_half_types_convert_exactly(dtype: torch.dtype, isa: str) -> None:
    """All 65,536 patterns: to fp32 as torch does, and back to themselves."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    param, exp_avg = every.clone(), torch.zeros(2**16)
    updates = [
        tuple(_update(torch.zeros_like(every), every, exp_avg)),
        tuple(_update(param, torch.zeros_like(every), torch.zeros(2**16))),
    ]
    NativeTable(isa=isa).update(updates, [_identity_group()])
    nan = every.isnan()
    assert torch.equal(exp_avg[~nan], every[~nan].float())
    assert bool(exp_avg[nan].isnan().all())
    assert torch.equal(bits(param)[~nan], bits(every)[~nan])
    assert bool(param[nan].isnan().all())


@needs_native
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", HALF)
def test_half_types_round_to_nearest_even(dtype: torch.dtype, isa: str) -> None:
    """Around every value, every tie between two neighbours, and random patterns."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    values = every[every.isfinite()].sort().values
    ties = (values[1:].double() / 2 + values[:-1].double() / 2).float()
    ends = torch.tensor([65519.99, 65520.0, 65536.0, 3.39e38, 3.4e38, 2.0**-25, 2.0**-26, 1e-45])
    random = torch.randint(-(2**31), 2**31, (100_000,)).to(torch.int32).view(torch.float32)
    near = [torch.nextafter(x, torch.tensor(s * math.inf)) for x in (values, ties) for s in (1, -1)]
    grad = torch.cat((values, ties, ends, -ends, *near, random, torch.tensor([math.inf, math.nan])))
    exp_avg = torch.zeros_like(grad).to(dtype)
    param = torch.zeros_like(grad)
    NativeTable(isa=isa).update([tuple(_update(param, grad, exp_avg))], [_identity_group()])
    expected = (grad + 0.0).to(dtype)  # 0 + -0 is 0
    nan = expected.isnan()
    assert torch.equal(bits(exp_avg)[~nan], bits(expected)[~nan])
    assert bool(exp_avg[nan].isnan().all())


# ---- the table, kept between steps ---------------------------------------------------------------


@needs_native
def test_table_follows_tensors_that_move(make_table: MakeTable) -> None:
    """One table over steps whose tensors move; a stale address or type would show at once."""
    groups = make_groups()
    table = make_table()
    case, other = Case((63, 65), amsgrad=True), Case((7, 3, 5), torch.bfloat16, seed=1)
    run([case, other], groups, 2, table=table)
    for name in ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step", "grad"):
        old = getattr(case, name)
        setattr(case, name, guarded(old.tensor.clone(), 3))
        old.buffer.fill_(1e9)  # where a stale pointer would read
        run([case, other], groups, 2, table=table)
        assert bool((old.buffer == 1e9).all()), f"{name}: written to where it no longer is"
    for kind in ("one", "random", "all", "empty", "random"):
        case.rows = pick_rows(kind, 63, case.generator)
        if case.ages is None:
            start = torch.full((63,), int(case.step.tensor), dtype=torch.int32)
            case.ages = guarded(start)
            case.expected = (*case.expected[:6], case.ages.tensor.clone(), None, None)
        run([case, other], groups, 2, table=table)
    case.rows = None  # dense again, its rows of different ages
    run([case, other], groups, 2, table=table)
    case.group = 1
    run([case, other], groups, 2, table=table)


@needs_native
def test_table_follows_rows_that_are_written_in_place(make_table: MakeTable) -> None:
    case = Case((9, 4), rows=torch.tensor([1, 5], dtype=torch.int32))
    table = make_table()
    run([case], make_groups(), 2, table=table)
    case.rows.copy_(torch.tensor([0, 8]))
    run([case], make_groups(), 2, table=table)


@needs_native
def test_table_follows_changes_of_type_and_number(make_table: MakeTable) -> None:
    """A set of parameters that grows, shrinks and changes type."""
    groups, table = make_groups(), make_table()
    other = Case((63,), torch.float16 if is_cuda(make_table) else torch.float64, seed=1)
    fp32, half = Case((63, 65)), Case((63, 65), torch.bfloat16, seed=2)
    for cases in ([fp32], [fp32, other], [half, other], [other], [other, half, fp32], [], [half]):
        run(cases, groups, 2, table=table)
    half.grad = guarded(half.grad.tensor.float())  # fp32 gradients from now on
    run([half], groups, 2, table=table)


@needs_native
def test_table_follows_a_parameter_that_is_reshaped_in_place(make_table: MakeTable) -> None:
    """Same address, same number of elements, rows of another length."""
    rows = torch.tensor([1], dtype=torch.int32)
    table, group = make_table(), make_groups()[0]

    def update_of(shape: tuple[int, int], flat: list[Tensor], step: Tensor) -> None:
        p, g, m, v = (t.view(shape) for t in flat)
        table.update([(p, g, m, v, None, step, None, rows, None, 0, 0)], [group])

    flat = [torch.ones(24), torch.ones(24), torch.zeros(24), torch.zeros(24)]
    step = torch.zeros(())
    update_of((4, 6), flat, step)
    flat[0].fill_(1.0)
    update_of((6, 4), flat, step)
    assert (flat[0] != 1).nonzero().flatten().tolist() == [4, 5, 6, 7]


@needs_native
def test_table_leaves_what_it_cannot_do_and_recovers(make_table: MakeTable) -> None:
    """A non-contiguous parameter is handed back untouched; made contiguous, it is taken over."""
    groups, table = make_groups(), make_table()
    ordinary, strided = Case((63, 65)), Case((8, 8), seed=1)
    run([ordinary, strided], groups, 2, table=table)  # its entry must not stay behind
    transposed = tuple(t.t() if isinstance(t, Tensor) and t.dim() == 2 else t
                       for t in strided.update)  # fmt: skip
    ordinary.new_grad()
    before = strided.snapshot()
    rest = table.update([ordinary.update, transposed], groups)
    assert len(rest) == 1
    assert rest[0] is transposed
    for x, y in zip(before, strided.snapshot(), strict=True):
        assert x is None or torch.equal(x, y)
    ordinary.step_reference(groups)
    ordinary.compare("beside it")
    run([ordinary, strided], groups, 2, table=table)


@needs_native
def test_a_refused_update_changes_nothing_and_is_not_remembered(make_table: MakeTable) -> None:
    table, groups = make_table(), make_groups()
    good, bad = Case((63, 65)), Case((8, 8), seed=1)
    run([good, bad], groups, 1, table=table)
    before = [good.snapshot(), bad.snapshot()]
    wrong = list(bad.update)
    wrong[2] = torch.zeros(8, 7)
    for _ in range(2):  # the second time is refused too
        with pytest.raises(ValueError, match=r"exp_avg must be torch.float32 \[8, 8\]"):
            table.update([good.update, tuple(wrong)], groups)
    for case, old in zip((good, bad), before, strict=True):
        assert all(x is None or torch.equal(x, y)
                   for x, y in zip(old, case.snapshot(), strict=True))  # fmt: skip
    run([good, bad], groups, 1, table=table)


# ---- layouts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [None, torch.tensor([0, 3, 4], dtype=torch.int32)])
@pytest.mark.parametrize("layout", ["transposed", "strided", "channels_last", "expanded_grad"])
def test_any_layout_gives_the_result_of_the_contiguous_one(
    layout: str, rows: Tensor | None
) -> None:
    shape = (6, 3, 4, 2) if layout == "channels_last" else (6, 5)

    def lay_out(tensor: Tensor) -> Tensor:
        if layout == "transposed":
            return tensor.t().contiguous().t()
        if layout == "strided":
            wide = torch.full((6, 10), math.nan)
            wide[:, ::2] = tensor
            return wide[:, ::2]
        if layout == "channels_last":
            return tensor.to(memory_format=torch.channels_last)
        return tensor

    group = make_groups()[0]
    ages = None if rows is None else torch.zeros(6, dtype=torch.int32)
    plain = [torch.randn(shape), torch.zeros(shape), torch.zeros(shape)]
    laid = [lay_out(t.clone()) for t in plain]
    steps = [torch.zeros(()), torch.zeros(())]
    all_ages = [None if ages is None else ages.clone() for _ in range(2)]
    for _ in range(5):
        grad = torch.randn(shape)
        if layout == "expanded_grad":
            grad = torch.randn(6, 1).expand(shape)
        for (p, m, v), s, a, g in zip(
            (plain, laid), steps, all_ages, (grad.contiguous(), lay_out(grad)), strict=True
        ):
            dispatch([(p, g, m, v, None, s, a, rows, None, 0, 0)], [group])
        for x, y in zip(plain, laid, strict=True):
            assert_close(y, x, Spec(2e-6, 2e-7), layout)
    if rows is not None:
        assert torch.equal(all_ages[0], all_ages[1])


def test_negative_and_conjugate_views_are_read_by_value() -> None:
    """torch keeps the minus sign of such a gradient in a flag, not in its bytes."""
    param, exp_avg = torch.zeros(3), torch.zeros(3)
    group = AdamWGroup(0.1, 0.9, 0.9, 1e-8, 0.0, maximize=False, zero_grad=False)
    grad = torch._neg_view(torch.tensor([1.0, 2.0, 3.0]))
    dispatch([tuple(_update(param, grad, exp_avg))], [group])
    assert_close(param, torch.full((3,), 0.1), Spec(1e-6, 0), "param")


# ---- non-finite gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_non_finite_gradients_do_what_adamw_does(dtype: torch.dtype, amsgrad: bool) -> None:
    values = [1.0, math.nan, math.inf, -math.inf, 1e30, -1e-30, 0.0]
    param = torch.nn.Parameter(torch.ones(7, dtype=dtype))
    other = torch.nn.Parameter(torch.ones(7, dtype=dtype))
    ours = longact.FusedMaskedAdam([param], lr=0.1, weight_decay=0.2, amsgrad=amsgrad)
    theirs = torch.optim.AdamW([other], lr=0.1, weight_decay=0.2, amsgrad=amsgrad)
    for grad in (torch.tensor(values), torch.full((7,), 0.5), torch.tensor(values[::-1])):
        param.grad, other.grad = grad.to(dtype), grad.to(dtype)
        ours.step()
        theirs.step()
        spec = Spec(2**-7, 2**-7) if dtype == torch.bfloat16 else Spec(1e-6, 1e-7)
        assert_close(param, other, spec, "param")
        # In bf16 AdamW's own moments are rounded: only where they are not finite is compared.
        for key in ours.state[param].keys() - {"step"}:
            # An infinite moment stays inf here and becomes NaN there: the parameter is NaN in both.
            mine, adamw = ours.state[param][key], theirs.state[other][key]
            assert torch.equal(mine.isfinite(), adamw.isfinite())
    assert bool(param[1].isnan())  # the NaN stays, as it does in AdamW


# ---- known bugs of the field ---------------------------------------------------------------------


def _optimizer(param: Tensor, **kwargs: object) -> longact.FusedMaskedAdam:
    return longact.FusedMaskedAdam([param], **{"lr": 0.01, "weight_decay": 0.0, **kwargs})


def test_each_parameter_counts_its_own_steps() -> None:
    """One counter for all would correct `late` as if it had been there from the start."""
    early, late = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    optimizer = longact.FusedMaskedAdam([early, late], lr=0.01, weight_decay=0.0)
    for step in range(50):
        early.grad = torch.ones(3)
        late.grad = torch.ones(3) if step >= 49 else None
        optimizer.step()
    assert optimizer.state[early]["step"].item() == 50
    assert optimizer.state[late]["step"].item() == 1
    assert_close(late, torch.full((3,), -0.01), Spec(1e-5, 0), "late")


@pytest.mark.parametrize("backend", [None, "reference"])
def test_steps_and_ages_of_a_bf16_parameter_pass_256(backend: str | None) -> None:
    param = torch.nn.Parameter(torch.zeros(2, 3, dtype=torch.bfloat16))
    longact.set_rows(param, [1])
    optimizer = _optimizer(param, backend=backend)
    for _ in range(260):
        param.grad = torch.ones_like(param)
        optimizer.step()
    state = optimizer.state[param]
    assert state["step"].dtype == torch.float32
    assert state["step"].item() == 260
    assert state["ages"].tolist() == [0, 260]


@pytest.mark.parametrize("state", ["full", "compact"])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_row_that_enters_late_moves_by_lr(backend: str | None, state: str) -> None:
    """Corrected with step 1,000 instead of its age it would move by 2.5 lr or more."""
    param = torch.nn.Parameter(torch.zeros(2, 3))
    longact.set_rows(param, [0])
    optimizer = _optimizer(param, state=state, backend=backend)
    for _ in range(1000 if backend is None else 200):
        param.grad = torch.ones_like(param)
        optimizer.step()
    assert param[1].tolist() == [0.0, 0.0, 0.0]
    longact.set_rows(param, [0, 1])
    param.grad = torch.full_like(param, 3.0)
    optimizer.step()
    assert_close(param[1], torch.full((3,), -0.01), Spec(1e-4, 0), "first move")


@pytest.mark.parametrize("state", ["full", "compact"])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_an_empty_selection_is_a_step_that_changes_no_row(backend: str | None, state: str) -> None:
    param = torch.nn.Parameter(torch.randn(4, 3))
    before = param.detach().clone()
    longact.set_rows(param, [])
    optimizer = _optimizer(param, weight_decay=0.5, state=state, backend=backend)
    for _ in range(3):
        param.grad = torch.full_like(param, math.nan)
        optimizer.step()
    assert_same_bits(param, before, "param")
    assert optimizer.state[param]["step"].item() == 3


@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_zero_gradient_is_not_taken_for_unselected(backend: str | None) -> None:
    """Momentum, decay and age go on in a selected row whose gradient happens to be zero."""
    param = torch.nn.Parameter(torch.ones(2, 3))
    longact.set_rows(param, [1])
    optimizer = _optimizer(param, weight_decay=0.5, backend=backend)
    param.grad = torch.ones_like(param)
    optimizer.step()
    after_one = param.detach().clone()
    param.grad = torch.zeros_like(param)
    optimizer.step()
    state = optimizer.state[param]
    assert state["ages"].tolist() == [0, 2]
    assert_close(state["exp_avg"][1], torch.full((3,), 0.09), Spec(1e-6, 0), "exp_avg")
    assert bool((param[1] < after_one[1]).all())
    assert param[0].tolist() == [1.0, 1.0, 1.0]


# ---- torch.ops.longact.masked_adamw_ -------------------------------------------------------------

HYPER = {"lr": 0.02, "beta1": 0.8, "beta2": 0.95, "eps": 1e-3, "weight_decay": 0.3}
NO_AGES = torch.empty(0, dtype=torch.int32)


def op_args(cases: Sequence[Case]) -> list[list[Tensor | None]]:
    columns: list[list[Tensor | None]] = [list(c) for c in zip(*(c.update for c in cases))]  # noqa: B905
    columns[4] = [t for t in columns[4] if t is not None]
    columns[6] = [NO_AGES if t is None else t for t in columns[6]]
    return columns[:8]


@pytest.mark.parametrize("call", ["function", "op"])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("policy", ["freeze", "compact", "zero_grad"])
def test_op_matches_the_reference(policy: str, amsgrad: bool, call: str) -> None:
    rows = torch.tensor([1, 2, 5], dtype=torch.int32)
    options = {"compact": policy == "compact", "zero_grad": policy == "zero_grad"}
    cases = [
        Case((6, 5), rows=rows, amsgrad=amsgrad, **options),
        Case((63,), torch.bfloat16, amsgrad=amsgrad, seed=1),
        Case((), torch.float64, amsgrad=amsgrad, seed=2),
    ]
    switches = {"maximize": True, "zero_grad": policy == "zero_grad", "grad_scale": 4.0}
    group = AdamWGroup(*HYPER.values(), switches["maximize"], switches["zero_grad"])
    for step in range(20):
        before = []
        for case in cases:
            case.new_grad(4.0)
            before.append(case.snapshot())
        if call == "op":
            values = (*HYPER.values(), *switches.values())
            torch.ops.longact.masked_adamw_(*op_args(cases), *values)
        else:
            masked_adamw_(*op_args(cases), **HYPER, **switches)
        for case, old in zip(cases, before, strict=True):
            case.step_reference([group], 4.0)
            case.compare(f"step {step}")
            case.check_untouched(old, f"step {step}")
            case.check_guards(f"step {step}")


INT32 = torch.int32
OP_ARGS = ["params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps", "ages", "rows"]
BAD_ARGS: list[tuple[str, object, str]] = [
    ("grads", [], "grads has 0 entries for 1 params"),
    ("rows", [None, None], "rows has 2 entries for 1 params"),
    ("max_exp_avg_sqs", [torch.zeros(6, 5)] * 2, "max_exp_avg_sqs has 2 entries"),
    ("grads", [torch.zeros(5, 6)], r"grad must be .*\[6, 5\].* got .*\[5, 6\]"),
    ("grads", [torch.zeros(6, 5, device="meta")], "grad must be .* on cpu .* on meta"),
    ("exp_avgs", [torch.zeros(6, 4)], "exp_avg must be"),
    ("exp_avgs", [torch.zeros(6, 5, dtype=torch.float64)], "exp_avg"),
    ("exp_avg_sqs", [torch.zeros(3, 5)], "exp_avg_sq must be"),
    ("exp_avg_sqs", [torch.zeros(6, 5, dtype=torch.bfloat16)], "exp_avg_sq must be"),
    ("max_exp_avg_sqs", [torch.zeros(6)], "max_exp_avg_sq must be"),
    ("steps", [torch.zeros(1)], "step must be torch.float32"),
    ("steps", [torch.zeros((), dtype=torch.float64)], "step must be torch.float32"),
    ("steps", [torch.zeros((), device="meta")], "step must be"),
    ("ages", [torch.zeros(6, dtype=torch.int64)], "ages must be torch.int32"),
    ("ages", [torch.zeros(5, dtype=torch.int32)], r"ages must be torch.int32 \[6\]"),
    ("rows", [torch.tensor([1, 2])], "rows must be torch.int32"),
    ("rows", [torch.tensor([1, 6], dtype=INT32)], "rows has index 6"),
    ("rows", [torch.tensor([-1, 3], dtype=INT32)], "rows has index -1"),
    ("rows", [torch.tensor([3, 1], dtype=INT32)], "rows has 3 before 1"),
    ("rows", [torch.tensor([1, 1], dtype=INT32)], "rows has 1 twice"),
    ("rows", [torch.tensor([[1, 2]], dtype=INT32)], "rows"),
    ("rows", [torch.ones(6, dtype=torch.bool)], "rows"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "message"), BAD_ARGS)
def test_op_refuses_what_does_not_fit(name: str, value: object, message: str) -> None:
    case = Case((6, 5), rows=torch.tensor([1, 3], dtype=INT32))
    first = Case((7,), seed=1)  # comes before the bad one, and must not be updated either
    first.new_grad()
    case.new_grad()
    arguments = dict(zip(OP_ARGS, op_args([case]), strict=True))
    arguments[name] = value
    before = [first.snapshot(), case.snapshot()]
    with pytest.raises(ValueError, match=message):
        masked_adamw_(**arguments, **HYPER)
    if all(len(arguments[key]) == 1 for key in OP_ARGS if key != "max_exp_avg_sqs"):
        ahead = dict(zip(OP_ARGS, op_args([first]), strict=True))
        both = {key: [*ahead[key], *arguments[key]] for key in OP_ARGS}
        # Against one maximum too few it is the first parameter that has the wrong one.
        message = "max_exp_avg_sq" if name == "max_exp_avg_sqs" else message
        with pytest.raises(ValueError, match=message):
            masked_adamw_(**both, **HYPER)
    for c, old in zip((first, case), before, strict=True):
        assert all(x is None or torch.equal(x, y)
                   for x, y in zip(old, c.snapshot(), strict=True))  # fmt: skip


def test_op_refuses_compact_moments_with_zero_grad() -> None:
    """Unselected rows have no moments there: the update would write past their end."""
    case = Case((6, 5), rows=torch.tensor([1, 3], dtype=INT32), compact=True)
    case.new_grad()
    before = case.snapshot()
    with pytest.raises(ValueError, match=r"compact|zero_grad"):
        masked_adamw_(*op_args([case]), **HYPER, zero_grad=True)
    case.check_guards("after the refusal")
    assert all(x is None or torch.equal(x, y) for x, y in zip(before, case.snapshot(), strict=True))


@pytest.mark.parametrize("name", ["rows", "ages", "exp_avg_sqs", "max_exp_avg_sqs", "exp_avgs"])
def test_op_takes_every_argument_with_strides(name: str) -> None:
    """The native core reads addresses: a strided tensor must not be read as a dense one."""
    results = []
    for strided in (False, True):
        case = Case((6, 5), rows=torch.tensor([1, 3], dtype=INT32), amsgrad=True)
        case.new_grad()
        arguments = dict(zip(OP_ARGS, op_args([case]), strict=True))
        if strided:
            (tensor,) = arguments[name]
            wide = torch.zeros(*tensor.shape, 2, dtype=tensor.dtype)
            wide[..., 0] = tensor
            arguments[name] = [wide[..., 0]]
        masked_adamw_(**arguments, **HYPER)
        results.append({key: value[0].clone() for key, value in arguments.items()})
    for key in OP_ARGS:
        assert_close(results[1][key], results[0][key], Spec(2e-6, 2e-7), key)


@pytest.mark.parametrize("rows", [None, torch.tensor([1, 3], dtype=INT32)])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_opcheck(rows: Tensor | None, amsgrad: bool) -> None:
    cases = [Case((6, 5), rows=rows, amsgrad=amsgrad), Case((7,), amsgrad=amsgrad, seed=1)]
    for case in cases:
        case.grad.tensor.copy_(torch.randn(case.grad.tensor.shape))
    arguments = [
        [t if t is None or t is NO_AGES else t.clone() for t in column] for column in op_args(cases)
    ]
    torch.library.opcheck(
        torch.ops.longact.masked_adamw_.default, (*arguments, *HYPER.values()), {}
    )


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_op_gives_the_eager_result(backend: str) -> None:
    """Its results, not only that it compiles: mutated buffers could be clones."""

    def two_steps(p: Tensor, g: Tensor, m: Tensor, v: Tensor, s: Tensor, rows: Tensor) -> Tensor:
        for _ in range(2):
            torch.ops.longact.masked_adamw_(
                [p], [g * 2], [m], [v], [], [s], [NO_AGES], [rows], *HYPER.values()
            )
        return p.sum() + m.sum()

    rows = torch.tensor([1, 3], dtype=INT32)
    start = [torch.randn(6, 5), torch.randn(6, 5), torch.zeros(6, 5), torch.zeros(6, 5)]
    results = []
    compiled = torch.compile(two_steps, fullgraph=True, backend=backend)
    for function in (two_steps, compiled):
        tensors = [*(t.clone() for t in start), torch.zeros(())]
        total = function(*tensors, rows)
        results.append([*tensors, total])
    for eager, other in zip(*results, strict=True):
        assert_close(other, eager, Spec(1e-6, 1e-7), "compiled")


def test_reference_of_fp32_is_the_formula() -> None:
    """The definition itself, against the page: one row by hand."""
    p, g = torch.tensor([[2.0], [5.0]]), torch.tensor([[math.nan], [3.0]])
    m, v = torch.tensor([[7.0], [0.5]]), torch.tensor([[7.0], [0.25]])
    ages, step = torch.tensor([4, 2], dtype=torch.int32), torch.tensor(9.0)
    group = AdamWGroup(0.1, 0.9, 0.99, 0.01, 0.2, maximize=True, zero_grad=False)
    reference(
        (p, g, m, v, None, step, ages, torch.tensor([1], dtype=INT32), None, 0, 0), group, 2.0
    )
    grad = -1.5
    first, second = 0.9 * 0.5 + 0.1 * grad, 0.99 * 0.25 + 0.01 * grad**2
    corrected = first / (1 - 0.9**3), math.sqrt(second / (1 - 0.99**3))
    value = 5.0 * (1 - 0.1 * 0.2) - 0.1 * corrected[0] / (corrected[1] + 0.01)
    assert_close(p, torch.tensor([[2.0], [value]]), Spec(1e-6, 0), "param")
    assert_close(m, torch.tensor([[7.0], [first]]), Spec(1e-6, 0), "exp_avg")
    assert_close(v, torch.tensor([[7.0], [second]]), Spec(1e-6, 0), "exp_avg_sq")
    assert ages.tolist() == [4, 3]
    assert step.item() == 10.0
