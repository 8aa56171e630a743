"""`FusedMaskedAdam` on a GPU: against torch's fused AdamW, the float64 reference, and the CPU path.

Parameters and gradients are made on the CPU and copied, so that every path gets the same numbers.
"""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers import (
    MOMENT_SPEC,
    PARAM_SPEC,
    Spec,
    assert_close,
    assert_same_bits,
    assert_same_tree,
    bits,
    no_waiting,
    pick_rows,
)
from torch import Tensor, nn

import longact
from longact import FusedMaskedAdam
from longact.backends import adamw_backend
from longact.kernels.masked_adamw import AdamWGroup, reference

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
CPU = torch.device("cpu")
_CHOSEN, _WHY = adamw_backend(DEVICE)
needs_native = pytest.mark.skipif(
    torch.cuda.is_available() and _CHOSEN != "native", reason=f"needs the CUDA kernel: {_WHY}"
)
BACKENDS = [pytest.param("native", marks=needs_native), "triton", "reference"]

# Whole and odd row lengths, one row, rows of one element, longer than a chunk of 16,384 elements.
SHAPES: list[tuple[int, ...]] = [
    (64, 96), (33, 7), (130, 1), (4097,), (5, 3, 8), (1, 20_000), (3, 16_390), (40_003,), (),
]  # fmt: skip
EMPTY: list[tuple[int, ...]] = [(0,), (0, 5), (5, 0)]
KINDS = ["none", "one", "random", "all"]
POLICIES = ["full", "compact", "zero_grad"]
HYPER: dict[str, Any] = {"lr": 0.02, "betas": (0.85, 0.95), "eps": 1e-6, "weight_decay": 0.2}
# Two correct fp32 paths over 100 steps of lr 0.02 with parameters and gradients of size 1: each
# step rounds differently once more, and the fused one of torch has multiply-adds.
HUNDRED_STEPS = Spec(1e-5, 4e-6)


# ---- what the tests share ------------------------------------------------------------------------


def make_params(
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    seed: int = 0,
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [nn.Parameter(value.to(device or DEVICE)) for value in values]


def make_grads(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, step: int) -> list[Tensor]:
    """On the CPU; the same for everyone who asks for this step."""
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def select(params: Sequence[nn.Parameter], kind: str, seed: int = 0) -> None:
    """Rows of each parameter that has any; the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        if param.dim():
            rows = pick_rows(kind, param.shape[0], generator)
            longact.set_rows(param, None if rows is None else rows.to(param.device))


def selected(param: Tensor) -> Tensor:
    """bool [rows], on the CPU: which rows are trained."""
    rows = longact.get_rows(param)
    count = param.shape[0] if param.dim() else 1
    if rows is None:
        return torch.ones(count, dtype=torch.bool)
    return torch.zeros(count, dtype=torch.bool).index_fill_(0, rows.cpu().long(), True)


def give_grads(params: Sequence[nn.Parameter], grads: Sequence[Tensor]) -> None:
    """Copies; NaN where the update has nothing to read."""
    for param, grad in zip(params, grads, strict=True):
        poisoned = grad.clone()
        if param.dim():
            poisoned[~selected(param)] = float("nan")
        param.grad = poisoned.to(param.device)


def options_of(policy: str) -> dict[str, Any]:
    if policy == "zero_grad":
        return {"inactive": "zero_grad"}
    return {"state": policy}


def parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def everything(optimizer: FusedMaskedAdam) -> list[Any]:
    """Each parameter and its state, copied to the CPU."""
    return [
        [p.detach().cpu().clone(), {k: v.cpu().clone() for k, v in optimizer.state[p].items()}]
        for p in parameters(optimizer)
    ]


def assert_same(ours: FusedMaskedAdam, other: FusedMaskedAdam, what: str) -> None:
    """Parameters and state of two optimizers, bit for bit."""
    assert_same_tree(everything(ours), everything(other), what)


def beside_the_cpu(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, kind: str, **options: Any
) -> tuple[FusedMaskedAdam, FusedMaskedAdam]:
    """The same parameters and selections on the GPU and on the CPU."""
    pair = []
    for device in (DEVICE, CPU):
        params = make_params(shapes, dtype, device)
        select(params, kind)
        pair.append(FusedMaskedAdam(params, **{**HYPER, **options}))
    return pair[0], pair[1]


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


# ---- against torch's fused AdamW -----------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"maximize": True}])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_100_steps_equal_torch_fused(
    backend: str, kind: str, policy: str, options: dict[str, Any]
) -> None:
    params = make_params(SHAPES)
    select(params, kind)
    start = [p.detach().cpu().clone() for p in params]
    ours = FusedMaskedAdam(params, **HYPER, **options, **options_of(policy), backend=backend)
    masks = [selected(p) for p in params]

    # torch gets the selected rows alone; with zero_grad all rows, with gradients of 0 elsewhere.
    def part(value: Tensor, mask: Tensor) -> Tensor:
        return value.clone() if policy == "zero_grad" or not value.dim() else value[mask]

    twins = [nn.Parameter(part(s, m).to(DEVICE)) for s, m in zip(start, masks, strict=True)]
    theirs = torch.optim.AdamW(twins, **HYPER, **options, fused=True)
    for step in range(100):
        grads = make_grads(SHAPES, torch.float32, step)
        give_grads(params, grads)
        for twin, grad, mask in zip(twins, grads, masks, strict=True):
            if grad.dim():
                grad[~mask] = 0.0
            twin.grad = part(grad, mask).to(DEVICE)
        ours.step()
        theirs.step()
        if step % 10 != 9:
            continue
        for i, (param, twin, mask) in enumerate(zip(params, twins, masks, strict=True)):
            what = f"step {step}, {[*param.shape]}"
            assert_close(part(param.detach().cpu(), mask), twin.detach().cpu(), HUNDRED_STEPS, what)
            if policy != "zero_grad" and param.dim():
                assert_same_bits(param.detach().cpu()[~mask], start[i][~mask], f"{what} unselected")
            state, expected = ours.state[param], theirs.state[twin]
            assert float(state["step"]) == step + 1
            for key in {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"} & set(expected):
                mine = state[key].cpu()
                mine = mine if policy == "compact" else part(mine, mask)
                assert_close(mine, expected[key].cpu(), HUNDRED_STEPS, f"{what} {key}")


# ---- against the float64 reference ---------------------------------------------------------------


class Oracle:
    """One parameter in float64 on the CPU, stepped by the reference."""

    def __init__(self, param: Tensor, policy: str, amsgrad: bool) -> None:
        rows = longact.get_rows(param)
        self.rows = None if rows is None else rows.cpu()
        self.param = param.detach().cpu().double()
        compact = policy == "compact" and self.rows is not None
        picked = self.rows.long() if compact and self.rows is not None else slice(None)
        like = self.param[picked] if compact else self.param
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(like), torch.zeros_like(like)
        self.max_exp_avg_sq = torch.zeros_like(like) if amsgrad else None
        self.step = torch.zeros(())
        self.ages = None
        if self.rows is not None and policy != "zero_grad":
            self.ages = torch.zeros(like.shape[0], dtype=torch.int32)

    def update(self, grad: Tensor, group: AdamWGroup) -> None:
        reference(
            (self.param, grad.cpu().double(), self.exp_avg, self.exp_avg_sq, self.max_exp_avg_sq,
             self.step, self.ages, self.rows, None, 0, 0),
            group,
        )  # fmt: skip


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_every_step_equals_the_reference(
    backend: str, dtype: torch.dtype, kind: str, policy: str, amsgrad: bool
) -> None:
    shapes = SHAPES + EMPTY
    params = make_params(shapes, dtype)
    select(params, kind)
    optimizer = FusedMaskedAdam(
        params, **HYPER, amsgrad=amsgrad, **options_of(policy), backend=backend
    )
    zero_grad = policy == "zero_grad"
    group = AdamWGroup(
        HYPER["lr"], *HYPER["betas"], HYPER["eps"], HYPER["weight_decay"], False, zero_grad
    )
    oracles = [Oracle(p, policy, amsgrad) for p in params]
    for step in range(15):
        give_grads(params, make_grads(shapes, dtype, step))
        optimizer.step()
        for param, oracle in zip(params, oracles, strict=True):
            assert param.grad is not None
            oracle.update(param.grad, group)
            what, state = f"step {step}, {[*param.shape]}", optimizer.state[param]
            assert_close(param.detach().cpu(), oracle.param, PARAM_SPEC[dtype], what)
            moment = MOMENT_SPEC[torch.float32]
            assert_close(state["exp_avg"].cpu(), oracle.exp_avg, moment, f"{what} exp_avg")
            # No cancellation in sums of squares: relative throughout.
            relative = Spec(moment.rtol, 1e-30)
            assert_close(state["exp_avg_sq"].cpu(), oracle.exp_avg_sq, relative, f"{what} v")
            if oracle.max_exp_avg_sq is not None:
                v_max = state["max_exp_avg_sq"].cpu()
                assert_close(v_max, oracle.max_exp_avg_sq, relative, f"{what} v max")
            assert float(state["step"]) == step + 1
            if oracle.ages is not None:
                assert torch.equal(state["ages"].cpu(), oracle.ages), what
            # Each step of a parameter is judged by itself: two correct roundings drift apart.
            oracle.param = param.detach().cpu().double()


@pytest.mark.parametrize("backend", BACKENDS)
def test_master_weights_follow_the_reference(backend: str) -> None:
    """In steps far below a unit in the last place of bf16, in which the parameter would stand."""
    params = make_params(SHAPES, torch.bfloat16)
    select(params, "random")
    options = {**HYPER, "lr": 1e-4}
    optimizer = FusedMaskedAdam(params, **options, master_weights=True, backend=backend)
    group = AdamWGroup(1e-4, *HYPER["betas"], HYPER["eps"], HYPER["weight_decay"], False, False)
    oracles = [Oracle(p, "full", False) for p in params]
    for step in range(30):
        give_grads(params, make_grads(SHAPES, torch.bfloat16, step))
        optimizer.step()
        for param, oracle in zip(params, oracles, strict=True):
            assert param.grad is not None
            oracle.update(param.grad, group)
    for param, oracle in zip(params, oracles, strict=True):
        master = optimizer.state[param]["master"].cpu()
        assert master.dtype == torch.float32
        assert_close(master, oracle.param, HUNDRED_STEPS, f"master {[*param.shape]}")
        mask = selected(param) if param.dim() else ...
        rounded = master.to(torch.bfloat16)
        assert_same_bits(param.detach().cpu()[mask], rounded[mask], f"param {[*param.shape]}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_stochastic_rounding_is_right_on_average(backend: str) -> None:
    """1 - 1e-3 a step, a quarter of the distance of bf16 numbers below 1."""
    param = nn.Parameter(torch.ones(256, 1024, dtype=torch.bfloat16, device=DEVICE))
    optimizer = FusedMaskedAdam(
        [param], lr=1e-3, weight_decay=0.0, stochastic_rounding=True, seed=3, backend=backend
    )
    for _ in range(20):
        param.grad = torch.ones_like(param)
        optimizer.step()
    values = param.detach().float().cpu()
    assert values.mean().item() == pytest.approx(1 - 20e-3, abs=1e-4)
    assert values.unique().numel() > 3


# ---- bits: the CPU path's ------------------------------------------------------------------------


BIT_CASES: list[tuple[torch.dtype, dict[str, Any]]] = [
    (torch.float32, {}),
    (torch.float32, {"moment_dtype": torch.bfloat16}),
    (torch.float16, {}),
    (torch.bfloat16, {}),
    (torch.bfloat16, {"moment_dtype": torch.bfloat16}),
    (torch.bfloat16, {"master_weights": True}),
    (torch.bfloat16, {"stochastic_rounding": True, "seed": 2**63 + 12345}),
    (torch.bfloat16, {"stochastic_rounding": True, "moment_dtype": torch.bfloat16}),
]


@needs_native
@pytest.mark.parametrize("more", [{}, {"amsgrad": True, "maximize": True}])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", [*KINDS, "empty"])
@pytest.mark.parametrize(("dtype", "options"), BIT_CASES)
def test_bits_are_those_of_the_cpu(
    dtype: torch.dtype, options: dict[str, Any], kind: str, policy: str, more: dict[str, Any]
) -> None:
    shapes = SHAPES + EMPTY
    ours, cpu = beside_the_cpu(
        shapes, dtype, kind, **options, **more, **options_of(policy), backend="native"
    )
    for step in range(6):
        for optimizer in (ours, cpu):
            if step in (2, 4) and kind == "random":  # rows of many ages side by side
                select(parameters(optimizer), "random", seed=step)
            give_grads(parameters(optimizer), make_grads(shapes, dtype, step))
            optimizer.step()
        assert_same(ours, cpu, f"step {step}")


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_at_extreme_values(dtype: torch.dtype) -> None:
    """Subnormal, huge, infinite and zero gradients; a NaN stays where it was."""
    values = [0.0, -0.0, 1e-38, 1e-42, -3e-45, 1e30, 3e38, float("inf"), 1.0, -1e-20, 1e-8, 65504.0]
    ours, cpu = beside_the_cpu([(7, 48), (24,)], dtype, "none", backend="native", eps=1e-8)
    for _ in range(4):
        for optimizer in (ours, cpu):
            for param in parameters(optimizer):
                grad = torch.tensor(values, dtype=torch.float32).to(dtype)
                param.grad = grad.repeat(param.numel() // 12).view(param.shape).to(param.device)
            optimizer.step()
    for mine, other in zip(everything(ours), everything(cpu), strict=True):
        for a, b in [(mine[0], other[0]), *((mine[1][k], other[1][k]) for k in mine[1])]:
            assert torch.equal(a.isnan(), b.isnan())
            assert_same_bits(a.nan_to_num(), b.nan_to_num(), "numbers")


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["none", "random"])
def test_misaligned_tensors_give_the_same_bits(kind: str, dtype: torch.dtype) -> None:
    """Views into one flat buffer, as DDP buckets and flattened models have, at every offset."""
    shapes = [(33, 24), (7, 5), (4096,), (3, 16_400), *[(9, 16)] * 8]

    def flat_views(offset: int, values: Sequence[Tensor]) -> list[Tensor]:
        flat = torch.zeros(offset + sum(v.numel() + 3 for v in values), dtype=dtype, device=DEVICE)
        views, at = [], offset
        for value in values:
            view = flat[at : at + value.numel()].view(value.shape)
            views.append(view.copy_(value))
            at += value.numel() + 3
        return views

    aligned = FusedMaskedAdam(make_params(shapes, dtype), **HYPER, backend="native")
    start = [p.detach().clone() for p in parameters(aligned)]
    views = [nn.Parameter(v) for v in flat_views(1, start)]
    ours = FusedMaskedAdam(views, **HYPER, backend="native")
    for optimizer in (aligned, ours):
        select(parameters(optimizer), kind)
    for step in range(5):
        grads = make_grads(shapes, dtype, step)
        give_grads(parameters(aligned), grads)
        for param, grad in zip(views, flat_views(step, grads), strict=True):
            param.grad = grad
        aligned.step()
        ours.step()
        assert_same(ours, aligned, f"offset {step}")


@needs_native
def test_gradients_that_are_not_contiguous() -> None:
    ours, cpu = beside_the_cpu([(48, 40), (40, 48)], torch.float32, "random", backend="native")
    for step in range(3):
        for optimizer in (ours, cpu):
            for param, grad in zip(
                parameters(optimizer),
                make_grads([(40, 48), (48, 40)], torch.float32, step),
                strict=True,
            ):
                param.grad = grad.to(param.device).t()
            optimizer.step()
        assert_same(ours, cpu, f"step {step}")


@needs_native
def test_new_gradient_memory_at_every_step() -> None:
    """zero_grad(set_to_none=True): the addresses differ every time."""
    shapes = [(64, 96), (4097,), (5, 8)]
    ours, cpu = beside_the_cpu(shapes, torch.float32, "random", backend="native")
    kept, addresses = [], set()
    for step in range(6):
        for optimizer in (ours, cpu):
            optimizer.zero_grad(set_to_none=True)
            give_grads(parameters(optimizer), make_grads(shapes, torch.float32, step))
            optimizer.step()
        grad = parameters(ours)[0].grad
        assert grad is not None
        kept.append(grad)  # so that its memory is not handed out again
        addresses.add(grad.data_ptr())
        assert_same(ours, cpu, f"step {step}")
    assert len(addresses) == 6


@needs_native
def test_thousands_of_tensors() -> None:
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(1, 300, (3000,), generator=generator).tolist()
    shapes: list[tuple[int, ...]] = [(n,) if n % 3 else (n // 3, 5) for n in sizes]
    ours, cpu = beside_the_cpu(shapes, torch.bfloat16, "random", backend="native")
    for step in range(3):
        for optimizer in (ours, cpu):
            params = parameters(optimizer)
            give_grads(params, make_grads(shapes, torch.bfloat16, step))
            for param in params[step::7]:  # some have none, others every time
                param.grad = None
            optimizer.step()
        assert_same(ours, cpu, f"step {step}")


@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("masked", [False, True])
def test_more_than_2_to_the_31_elements(masked: bool, backend: str) -> None:
    """17 GB in bf16; looked at where it starts, passes 2**31 and ends."""
    row_len, num_rows = 4096, 2**19 + 24
    needed = 10 * num_rows * row_len
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of free GPU memory")
    shape = (num_rows, row_len)
    param = nn.Parameter(torch.ones(shape, dtype=torch.bfloat16, device=DEVICE))
    param.grad = torch.full_like(param, 0.5)
    some = torch.tensor([0, 1, 2**19 - 1, 2**19, 2**19 + 1, num_rows - 1], device=DEVICE)
    with torch.no_grad():
        param[some] = torch.randn(6, row_len, device=DEVICE).to(torch.bfloat16)
        param.grad[some] = torch.randn(6, row_len, device=DEVICE).to(torch.bfloat16)
    chosen = some[1::2] if masked else some
    if masked:
        longact.set_rows(param, chosen.to(torch.int32))
    before, grad = param.detach()[some].cpu(), param.grad[some].cpu()
    optimizer = FusedMaskedAdam([param], **HYPER, moment_dtype=torch.bfloat16, backend=backend)
    optimizer.step()

    small = nn.Parameter(before.clone())
    small.grad = grad
    if masked:
        longact.set_rows(small, [1, 3, 5])
    expected = FusedMaskedAdam([small], **HYPER, moment_dtype=torch.bfloat16, backend="reference")
    expected.step()
    assert_close(param.detach()[some].cpu(), small.detach().double(), Spec(2**-7, 1e-6), "param")
    state = optimizer.state[param]
    for key in ("exp_avg", "exp_avg_sq"):
        want = expected.state[small][key].double()
        assert_close(state[key][some].cpu(), want, Spec(2**-7, 1e-6), key)
    untouched = torch.tensor([2, 7, 2**18, 2**19 - 2, 2**19 + 5, num_rows - 2], device=DEVICE)
    assert bool((param.detach()[untouched] == 1).all()) == masked
    if masked:
        assert not bool(state["exp_avg"][untouched].any())


# ---- selections ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unselected_rows_keep_every_bit(dtype: torch.dtype, backend: str) -> None:
    """NaN and -0 among them, and whatever their gradient is."""
    params = make_params(SHAPES[:-1], dtype)
    with torch.no_grad():
        for param in params:
            flat = param.view(-1)
            flat[::3] = -0.0
            flat[1::5] = float("nan")
    optimizer = FusedMaskedAdam(params, **HYPER, backend=backend)
    give_grads(params, make_grads(SHAPES[:-1], dtype, 0))
    optimizer.step()  # dense once, so that there are moments and ages to keep
    select(params, "random")
    before = [[bits(p), *(bits(v) for v in optimizer.state[p].values() if v.dim())] for p in params]
    for step in range(1, 4):
        give_grads(params, make_grads(SHAPES[:-1], dtype, step))
        optimizer.step()
    for param, old in zip(params, before, strict=True):
        state = optimizer.state[param]
        new = [bits(param), *(bits(state[k]) for k in ("exp_avg", "exp_avg_sq"))]
        kept = ~selected(param).to(DEVICE)
        for a, b in zip(new, old, strict=True):
            assert torch.equal(a[kept], b[kept])
        expected = torch.where(kept, 1, 4).to(torch.int32)
        assert torch.equal(state["ages"], expected)


class Projection(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.out = nn.Linear(24, 40), nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.q_proj(x).tanh())
        return y


@needs_native
def test_a_projection_under_apply_trains_as_on_the_cpu() -> None:
    """Forward, selection at the step boundary, row gradient and update, all on the GPU."""
    results = []
    for device in (DEVICE, CPU):
        torch.manual_seed(0)
        model = Projection().to(device).train()
        handle = longact.apply(model, 0.25, targets=["q_proj"])
        optimizer = FusedMaskedAdam(model.parameters(), **HYPER)
        chosen = []
        for step in range(5):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(16, 24, generator=generator).to(device)
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            rows = handle.rows["q_proj"]
            assert rows is not None
            assert rows.device.type == device.type
            chosen.append(rows.tolist())
        results.append((chosen, [p.detach().cpu() for p in model.parameters()]))
    (gpu_rows, gpu_params), (cpu_rows, cpu_params) = results
    assert gpu_rows == cpu_rows
    for a, b in zip(gpu_params, cpu_params, strict=True):
        assert_close(a, b, Spec(1e-4, 1e-4), "parameter")  # matmuls differ


# ---- several devices and streams -----------------------------------------------------------------


@needs_native
def test_cpu_and_gpu_parameters_in_one_optimizer() -> None:
    shapes = [(64, 96), (33, 7), (4097,), (5, 3, 8)]
    devices = [DEVICE, CPU, DEVICE, CPU]

    def mixed() -> FusedMaskedAdam:
        params = make_params(shapes, torch.bfloat16, CPU)
        params = [nn.Parameter(p.detach().to(d)) for p, d in zip(params, devices, strict=True)]
        select(params, "random")
        return FusedMaskedAdam(params, **HYPER, stochastic_rounding=True)

    ours = mixed()
    devices = [CPU] * 4
    cpu = mixed()
    for step in range(5):
        for optimizer in (ours, cpu):
            give_grads(parameters(optimizer), make_grads(shapes, torch.bfloat16, step))
            optimizer.step()
        assert_same(ours, cpu, f"step {step}")


@needs_native
def test_several_gpus_in_one_optimizer() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 GPUs, there is {torch.cuda.device_count()}")
    shapes = [(64, 96), (33, 7), (4097,), (5, 3, 8)]
    devices = [torch.device("cuda", 0), torch.device("cuda", 1)] * 2
    cpu = FusedMaskedAdam(make_params(shapes, torch.float32, CPU), **HYPER, backend="native")
    start = [p.detach() for p in parameters(cpu)]
    params = [nn.Parameter(p.to(d)) for p, d in zip(start, devices, strict=True)]
    ours = FusedMaskedAdam(params, **HYPER, backend="native")
    for optimizer in (ours, cpu):
        select(parameters(optimizer), "random")
    for step in range(5):
        with torch.cuda.device(step % 2):
            for optimizer in (ours, cpu):
                give_grads(parameters(optimizer), make_grads(shapes, torch.float32, step))
                optimizer.step()
            assert torch.cuda.current_device() == step % 2
        assert_same(ours, cpu, f"step {step}")


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_a_stream_of_its_own(backend: str) -> None:
    """The gradient comes late in that stream; the default stream would read the poison."""
    shapes = [(64, 96), (4097,)]
    results = []
    stream = torch.cuda.Stream()
    for other in (False, True):
        params = make_params(shapes)
        select(params, "random")
        optimizer = FusedMaskedAdam(params, **HYPER, backend=backend)
        for param in params:
            param.grad = torch.full_like(param, float("nan"))
        late = [g.to(DEVICE) for g in make_grads(shapes, torch.float32, 0)]
        torch.cuda.synchronize()
        with torch.cuda.stream(stream if other else torch.cuda.current_stream()):
            for param, grad in zip(params, late, strict=True):
                assert param.grad is not None
                torch.cuda._sleep(20_000_000)
                param.grad.copy_(grad)
            optimizer.step()
        torch.cuda.synchronize()
        results.append(everything(optimizer))
    assert not any(bool(param.isnan().any()) for param, _ in results[1])
    assert_same_tree(results[1], results[0])


# ---- GradScaler ----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_grad_scaler(backend: str, policy: str) -> None:
    """As without one; a step with an infinite gradient writes nothing."""
    shapes = SHAPES[:5]
    scaled, plain = make_params(shapes), make_params(shapes)
    for params in (scaled, plain):
        select(params, "random")
    ours = FusedMaskedAdam(scaled, **HYPER, **options_of(policy), backend=backend)
    other = FusedMaskedAdam(plain, **HYPER, **options_of(policy), backend=backend)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1024.0, growth_interval=1000)
    scales = []
    for step in range(8):
        grads = [g.to(DEVICE) for g in make_grads(shapes, torch.float32, step)]
        spoiled = step in (2, 3, 6)
        loss = sum((p * g).sum() for p, g in zip(scaled, grads, strict=True))
        scaler.scale(loss).backward()
        if spoiled:
            grad = scaled[-1].grad
            assert grad is not None
            grad.view(-1)[-1] = float("inf")
        before = everything(ours)
        scaler.step(ours)
        scaler.update()
        scales.append(scaler.get_scale())
        if spoiled:
            assert_same_tree(everything(ours), before, f"skipped step {step}")
        else:
            for param, grad in zip(plain, grads, strict=True):
                param.grad = grad
            other.step()
            # The scale is a power of two: dividing by it is exact.
            assert_same(ours, other, f"step {step}")
        ours.zero_grad()
    assert scales[1:4] == [1024.0, 512.0, 256.0]
    assert scales[-1] == 128.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [3.0, 1024.0])
def test_grad_scale_set_by_hand(scale: float, backend: str) -> None:
    params, plain = make_params(SHAPES), make_params(SHAPES)
    ours = FusedMaskedAdam(params, **HYPER, backend=backend)
    other = FusedMaskedAdam(plain, **HYPER, backend=backend)
    ours.grad_scale = torch.full((), scale, device=DEVICE)
    ours.found_inf = torch.zeros((), device=DEVICE)
    for step in range(5):
        grads = make_grads(SHAPES, torch.float32, step)
        give_grads(plain, grads)
        give_grads(params, [g * scale for g in grads])
        ours.step()
        other.step()
        for a, b in zip(params, plain, strict=True):
            assert_close(a.cpu(), b.cpu(), Spec(1e-5, 2e-6), f"step {step}")


# ---- the host does not wait ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"state": "compact"},
        {"inactive": "zero_grad"},
        {"amsgrad": True, "maximize": True},
        {"capturable": True},
        {"master_weights": True},
        {"stochastic_rounding": True},
    ],
)
@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_no_step_waits_for_the_gpu(backend: str, options: dict[str, Any]) -> None:
    """The first one, those after a new selection, with an lr tensor and GradScaler's tensors."""
    dtype = torch.bfloat16
    params = make_params(SHAPES, dtype)
    lr = torch.tensor(0.02, device=DEVICE)
    optimizer = FusedMaskedAdam(params, **{**HYPER, "lr": lr}, **options, backend=backend)
    optimizer.grad_scale = torch.ones((), device=DEVICE)
    optimizer.found_inf = torch.zeros((), device=DEVICE)
    if backend == "triton":  # which loads its kernel at its first launch
        give_grads(params, make_grads(SHAPES, dtype, 9))
        optimizer.step()
    for step, kind in enumerate(["none", "random", "random", "one", "all", "empty", "none"]):
        select(params, kind, seed=step)
        give_grads(params, make_grads(SHAPES, dtype, step))
        synchronize()
        with no_waiting(DEVICE):
            optimizer.step()
            lr.mul_(0.9)
    synchronize()
    assert not any(bool(p.isnan().any()) for p in params)


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_step_returns_while_the_gpu_is_busy(backend: str) -> None:
    params = make_params(SHAPES)
    select(params, "random")
    optimizer = FusedMaskedAdam(params, **HYPER, backend=backend)
    for step in range(3):
        give_grads(params, make_grads(SHAPES, torch.float32, step))
        optimizer.step()
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    start = time.perf_counter()
    optimizer.step()
    seconds = time.perf_counter() - start
    assert not torch.cuda.current_stream().query(), "the GPU was done already: nothing was shown"
    assert seconds < 0.3
    torch.cuda.synchronize()


@needs_native
@pytest.mark.parametrize("kind", ["none", "random"])
@pytest.mark.parametrize("shapes", [SHAPES, [(64, 96)] * 500])
def test_one_kernel_a_step(shapes: list[tuple[int, ...]], kind: str) -> None:
    params = make_params(shapes, torch.bfloat16)
    select(params, kind)
    optimizer = FusedMaskedAdam(params, **HYPER, backend="native")
    give_grads(params, make_grads(shapes, torch.bfloat16, 0))
    optimizer.step()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(3):
            optimizer.step()
        torch.cuda.synchronize()
    on_gpu = [
        event.name
        for event in profile.events()
        if event.device_type.name == "CUDA"
        # Not the marks that Optimizer.step leaves on the GPU's time line.
        and not getattr(event, "is_user_annotation", False)
        and not event.name.startswith("Optimizer.")
    ]
    kernels = [n for n in on_gpu if not n.startswith(("Memcpy", "Memset"))]
    assert len([n for n in kernels if "masked_adamw" in n]) == 3, on_gpu
    assert len(kernels) == 3, f"other kernels than longact's: {kernels}"


# ---- CUDA graphs ---------------------------------------------------------------------------------


def capture(optimizer: FusedMaskedAdam) -> torch.cuda.CUDAGraph:
    """A captured step; the recipe of PyTorch's documentation, one warm-up step included."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph


@needs_native
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float32, {"inactive": "zero_grad"}),
        (torch.float32, {"amsgrad": True}),
        (torch.bfloat16, {"master_weights": True}),
        (torch.bfloat16, {"stochastic_rounding": True, "seed": 5}),
    ],
)
def test_replays_follow_lr_and_rows(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Against an eager twin, bit for bit: gradients, lr and rows change between replays."""
    shapes = SHAPES
    pair = []
    for capturable in (True, False):
        params = make_params(shapes, dtype)
        select(params, "random")
        for param in params:
            param.grad = torch.zeros_like(param)
        lr = torch.tensor(0.02, device=DEVICE)
        optimizer = FusedMaskedAdam(
            params, **{**HYPER, "lr": lr}, **options, capturable=capturable, backend="native"
        )
        pair.append((optimizer, lr))
    (ours, lr), (eager, eager_lr) = pair

    def new_grads(step: int) -> None:
        for optimizer in (ours, eager):
            grads = make_grads(shapes, dtype, step)
            for param, grad in zip(parameters(optimizer), grads, strict=True):
                assert param.grad is not None
                param.grad.copy_(grad)

    new_grads(0)
    eager.step()
    graph = capture(ours)
    assert_same(ours, eager, "after the capture")
    for step in range(1, 12):
        new_grads(step)
        if step % 2:
            for value in (lr, eager_lr):
                value.fill_(0.02 / step)
        if step in (3, 5, 6, 8, 9, 10):
            kind = {5: "one", 6: "all", 9: "empty"}.get(step, "random")
            for optimizer in (ours, eager):
                select(parameters(optimizer), kind, seed=step)
        graph.replay()
        eager.step()
        assert_same(ours, eager, f"replay {step}")


@needs_native
def test_replays_read_the_grad_scale_and_skip_where_an_inf_was_found() -> None:
    params = make_params(SHAPES)
    select(params, "random")
    for param, grad in zip(params, make_grads(SHAPES, torch.float32, 0), strict=True):
        param.grad = grad.to(DEVICE)
    optimizer = FusedMaskedAdam(params, **HYPER, capturable=True, backend="native")
    scale, found = torch.ones((), device=DEVICE), torch.zeros((), device=DEVICE)
    optimizer.grad_scale, optimizer.found_inf = scale, found
    graph = capture(optimizer)
    before = everything(optimizer)
    found.fill_(1.0)
    graph.replay()
    assert_same_tree(everything(optimizer), before, "skipped")
    found.zero_()
    scale.fill_(4.0)
    with torch.no_grad():
        for param in params:
            assert param.grad is not None
            param.grad.mul_(4.0)
    graph.replay()
    for (_, old), (_, new) in zip(before, everything(optimizer), strict=True):
        assert float(new["step"]) == float(old["step"]) + 1
        # The same gradient twice: had the scale not been read, it would be four times as large.
        assert float(new["exp_avg_sq"].sum()) < 2.5 * float(old["exp_avg_sq"].sum())


@needs_native
def test_a_captured_step_and_eager_ones_take_turns() -> None:
    params, twins = make_params(SHAPES), make_params(SHAPES)
    for group in (params, twins):
        select(group, "random")
        for param in group:
            param.grad = torch.zeros_like(param)
    ours = FusedMaskedAdam(params, **HYPER, capturable=True, backend="native")
    eager = FusedMaskedAdam(twins, **HYPER, backend="native")
    graph = None
    for step in range(8):
        for group in (params, twins):
            for param, grad in zip(group, make_grads(SHAPES, torch.float32, step), strict=True):
                assert param.grad is not None
                param.grad.copy_(grad)
        if step == 0:
            graph = capture(ours)
        elif step % 2:
            assert graph is not None
            graph.replay()
        else:
            ours.step()
        eager.step()
        assert_same(ours, eager, f"step {step}")


# ---- checkpoints ---------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float32, {"state": "compact"}),
        (torch.bfloat16, {"master_weights": True}),
        (torch.bfloat16, {"master_weights": True, "state": "compact"}),
        (torch.bfloat16, {"stochastic_rounding": True, "seed": 9}),
        (torch.bfloat16, {"moment_dtype": torch.bfloat16}),
    ],
)
def test_checkpoints_travel_to_the_cpu_and_back(
    dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """A run that moves GPU -> CPU -> GPU ends in the bits of one that stays."""
    options = {**HYPER, **options, "backend": "native"}

    def train(optimizer: FusedMaskedAdam, steps: range) -> None:
        for step in steps:
            give_grads(parameters(optimizer), make_grads(SHAPES, dtype, step))
            optimizer.step()

    def moved(optimizer: FusedMaskedAdam, device: torch.device) -> FusedMaskedAdam:
        file = io.BytesIO()
        params = [p.detach() for p in parameters(optimizer)]
        torch.save({"params": params, "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, map_location=device)
        other = FusedMaskedAdam([nn.Parameter(p) for p in saved["params"]], **options)
        other.load_state_dict(saved["optimizer"])
        for param in parameters(other):
            assert param.device.type == device.type
            for key, value in other.state[param].items():
                assert value.device == param.device, key
        return other

    params = make_params(SHAPES, dtype)
    select(params, "random")
    stays = FusedMaskedAdam(params, **options)
    train(stays, range(4))
    on_cpu = moved(stays, CPU)
    assert_same(on_cpu, stays, "on the CPU")
    train(stays, range(4, 8))
    train(on_cpu, range(4, 8))
    back = moved(on_cpu, DEVICE)
    assert_same(back, stays, "back on the GPU")
    train(stays, range(8, 12))
    train(back, range(8, 12))
    assert_same(back, stays, "at the end")


def test_a_checkpoint_of_torch_fused_goes_on() -> None:
    """AdamW's own state on the GPU, loaded and continued."""
    params, twins = make_params(SHAPES), make_params(SHAPES)
    theirs = torch.optim.AdamW(twins, **HYPER, fused=True)
    for step in range(5):
        give_grads(twins, make_grads(SHAPES, torch.float32, step))
        theirs.step()
    with torch.no_grad():
        for param, twin in zip(params, twins, strict=True):
            param.copy_(twin)
    ours = FusedMaskedAdam(params, **HYPER)
    ours.load_state_dict(theirs.state_dict())
    for step in range(5, 15):
        for optimizer in (ours, theirs):
            give_grads(
                [*optimizer.param_groups[0]["params"]], make_grads(SHAPES, torch.float32, step)
            )
            optimizer.step()
    for param, twin in zip(params, twins, strict=True):
        assert_close(param.detach().cpu(), twin.detach().cpu(), HUNDRED_STEPS, "parameter")
