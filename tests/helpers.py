"""What tests share: buffers, references, tolerances, and the code that the documentation shows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from longact.backends import native
from longact.kernels.masked_adamw import AdamWGroup, ParamUpdate, reference

INSTRUCTION_SETS: list[str] = [] if native is None else native.instruction_sets()
HALF = (torch.bfloat16, torch.float16)
PAD = 64  # elements of poison on each side of a guarded buffer
LN_10 = math.log(10)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Spec(NamedTuple):
    """How far a result may lie from the float64 reference."""

    rtol: float
    atol: float
    share: float = 0.0  # of the elements may lie outside, by 4 times as much at most


#: One step of a parameter of this type. Half types round once: half a unit in the last place.
PARAM_SPEC = {
    torch.float64: Spec(1e-13, 1e-14),
    torch.float32: Spec(2e-6, 5e-7),
    torch.bfloat16: Spec(2**-8 * 1.001, 1e-7),
    torch.float16: Spec(2**-11 * 1.001, 2**-25 * 1.001),
}
#: Moments after any number of steps, by their own type.
MOMENT_SPEC = {
    torch.float64: Spec(1e-13, 1e-15),
    torch.float32: Spec(2e-6, 1e-6),
    torch.bfloat16: Spec(2**-8 * 1.001, 1e-8),
}


def assert_close(actual: Tensor, expected: Tensor, spec: Spec, what: str) -> None:
    """NaN where NaN, inf where inf, and the rest within `spec`."""
    assert actual.shape == expected.shape, f"{what}: {[*actual.shape]} {[*expected.shape]}"
    actual, expected = actual.detach().double(), expected.detach().double()
    if bool(((actual - expected).abs() <= spec.atol + spec.rtol * expected.abs()).all()):
        return  # what nearly every call finds, in a third of the time of all that follows
    equal = (actual == expected) | (actual.isnan() & expected.isnan())
    error = torch.where(equal, 0.0, (actual - expected).abs())
    error = torch.where(error.isnan(), torch.inf, error)
    allowed = spec.atol + spec.rtol * expected.abs().nan_to_num()
    outside = error > allowed
    if not bool(outside.any()):
        return
    share = outside.double().mean().item()
    assert share <= spec.share, (
        f"{what}: {share:.2%} of the elements differ, the first by "
        f"{error[outside].flatten()[0].item():g} from {expected[outside].flatten()[0].item():g}"
    )
    assert bool((error <= 4 * allowed).all()), f"{what}: off by {error.max().item():g}"


def bits(tensor: Tensor) -> Tensor:
    """A copy of the bits: what `torch.equal` compares then, NaN and the sign of zero included."""
    tensor = tensor.detach()
    if tensor.dtype.is_complex:
        tensor = torch.view_as_real(tensor)
    return tensor.contiguous().view(_BITS[tensor.element_size()]).clone()


def assert_same_bits(actual: Tensor, expected: Tensor, what: str) -> None:
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {[*actual.shape]} {[*expected.shape]}"
    assert torch.equal(bits(actual), bits(expected)), f"{what}: bits differ"


def assert_same_tree(actual: object, expected: object, what: str = "state") -> None:
    """Nested dicts and lists with the same keys, types and values, tensors bit for bit."""
    if isinstance(expected, Tensor):
        assert isinstance(actual, Tensor), f"{what}: {type(actual)}"
        assert_same_bits(actual, expected, what)
    elif isinstance(expected, dict):
        assert isinstance(actual, dict), f"{what}: {type(actual)}"
        assert set(actual) == set(expected), f"{what}: {list(actual)} {list(expected)}"
        for key in expected:
            assert_same_tree(actual[key], expected[key], f"{what}[{key!r}]")
    elif isinstance(expected, (list, tuple)):
        assert isinstance(actual, (list, tuple))
        assert len(actual) == len(expected), what
        for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
            assert_same_tree(a, e, f"{what}[{i}]")
    else:
        assert actual == expected, f"{what}: {actual!r} {expected!r}"


def code_after(text: str, page: str = "docs/frameworks.md") -> str:
    """The first block of code that follows a text of the documentation."""
    found = (Path(__file__).parents[1] / page).read_text().partition(text)[2]
    assert found, f"{page} has no {text!r}"
    return found.split("```", 2)[1].partition("\n")[2]


def snippet(name: str) -> str:
    """A marked block of code of docs/frameworks.md."""
    return code_after(f"<!-- snippet: {name} -->\n")


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small tensors are slower on many threads, and much slower on a busy machine."""
    with threads(1):
        yield


class Guarded(NamedTuple):
    """A tensor in the middle of a larger poisoned buffer, at an odd offset."""

    tensor: Tensor
    buffer: Tensor

    def check(self, what: str) -> None:
        start = self.tensor.storage_offset()
        around = torch.cat((self.buffer[:start], self.buffer[start + self.tensor.numel() :]))
        poisoned = around.isnan() if around.is_floating_point() else around == -77
        assert bool(poisoned.all()), f"{what}: written outside of the buffer"


def guarded(tensor: Tensor, shift: int = 1) -> Guarded:
    """`shift` elements off any alignment."""
    poison = math.nan if tensor.is_floating_point() else -77
    buffer = torch.full((tensor.numel() + 2 * PAD + shift,), poison, dtype=tensor.dtype)
    start = PAD + shift
    inner = buffer[start : start + tensor.numel()].view(tensor.shape)
    inner.copy_(tensor)
    return Guarded(inner, buffer)


def pick_rows(kind: str, num_rows: int, generator: torch.Generator) -> Tensor | None:
    """none (None), empty, one, random (about a third, in runs and alone) or all."""
    if kind == "none":
        return None
    if kind == "empty":
        chosen = torch.zeros(num_rows, dtype=torch.bool)
    elif kind == "one":
        chosen = torch.arange(num_rows) == (2 * num_rows) // 3
    elif kind == "random":
        chosen = torch.rand(num_rows, generator=generator) < 0.35
    else:
        chosen = torch.ones(num_rows, dtype=torch.bool)
    return chosen.nonzero().squeeze(1).to(torch.int32)


class Case:
    """One parameter with its state, every buffer guarded, and the same in float64 beside it."""

    def __init__(
        self,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        grad_dtype: torch.dtype | None = None,
        rows: Tensor | None = None,
        *,
        group: int = 0,
        compact: bool = False,
        amsgrad: bool = False,
        zero_grad: bool = False,
        ages: Sequence[int] | None = None,
        step: int = 0,
        shift: int = 1,
        seed: int = 0,
        key: int = 0,
        moment_dtype: torch.dtype | None = None,
        master: bool = False,
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.rows, self.group, self.zero_grad = rows, group, zero_grad
        self.compact = compact and rows is not None
        self.shift = shift
        self.moment_dtype = moment_dtype or (torch.float32 if dtype in HALF else dtype)
        self.key = key
        num_state_rows = shape[0] if shape else 1
        if self.compact:
            assert rows is not None
            num_state_rows = rows.numel()
        state_shape = (num_state_rows, *shape[1:]) if shape else ()
        self.param = guarded(self._randn(shape).to(dtype), shift)
        self.grad = guarded(torch.zeros(shape).to(grad_dtype or dtype), shift)
        zeros = torch.zeros(state_shape, dtype=self.moment_dtype)
        self.exp_avg, self.exp_avg_sq = guarded(zeros, shift), guarded(zeros, shift)
        self.max_exp_avg_sq = guarded(zeros, shift) if amsgrad else None
        self.master = None
        if master and dtype in HALF:
            mine = self.param.tensor if not self.compact else self.param.tensor[rows.long()]
            # Not what the parameter holds: the update must read the master.
            self.master = guarded(mine.float() * (1 + 2**-12), shift)
        self.step = guarded(torch.tensor(float(step)), shift)
        self.ages = None
        if rows is not None and not zero_grad:
            start = torch.tensor(ages if ages is not None else [step] * num_state_rows)
            self.ages = guarded(start.to(torch.int32), shift)
        self.expected = tuple(
            tensor.double() if tensor is not None and tensor.is_floating_point() else tensor
            for tensor in (None if t is None else t.clone() for t in self.update[:9])
        )

    def _randn(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape), generator=self.generator)

    @property
    def update(self) -> ParamUpdate:
        def inner(guard: Guarded | None) -> Tensor | None:
            return None if guard is None else guard.tensor

        return (
            self.param.tensor, self.grad.tensor, self.exp_avg.tensor, self.exp_avg_sq.tensor,
            inner(self.max_exp_avg_sq), self.step.tensor, inner(self.ages), self.rows,
            inner(self.master), self.key, self.group,
        )  # fmt: skip

    @property
    def touched(self) -> Tensor:
        """Which rows the update may change; every row is selected where there is no selection."""
        param = self.param.tensor
        mask = torch.ones(param.shape[0] if param.dim() else 1, dtype=torch.bool)
        if self.rows is not None and not self.zero_grad:
            mask = torch.zeros_like(mask).index_fill_(0, self.rows.long(), True)
        return mask

    def new_grad(self, scale: float = 1.0) -> None:
        """Magnitudes from 1e-6 to 10, some exact zeros, and NaN in rows that are not selected."""
        grad = self.grad.tensor
        magnitude, drawn = torch.rand((2, *grad.shape), generator=self.generator)
        value = self._randn(grad.shape) * torch.exp(magnitude.mul_(7 * LN_10).sub_(6 * LN_10))
        value = value.masked_fill_(drawn < 0.1, 0.0).mul_(scale).to(grad.dtype)
        if self.rows is not None:
            unread = torch.ones(grad.shape[0], dtype=torch.bool)
            value[unread.index_fill_(0, self.rows.long(), False)] = float("nan")
        grad.copy_(value)

    def snapshot(self) -> list[Tensor | None]:
        return [None if t is None else bits(t) for t in (*self.update[:7], self.update[8])]

    def step_reference(self, groups: Sequence[AdamWGroup], grad_scale: float = 1.0) -> None:
        expected = list(self.expected)
        expected[1] = self.grad.tensor.double()
        expected[7] = self.rows
        # The step is fp32 by contract, in the reference too.
        expected[5] = expected[5].float()
        reference((*expected, self.key, self.group), groups[self.group], grad_scale)
        expected[5] = expected[5].double()
        self.expected = tuple(expected)

    def compare(self, what: str) -> None:
        """With the reference after a step, each buffer to its tolerance; ages and step exactly."""
        dtype = self.param.tensor.dtype
        moment = MOMENT_SPEC[self.moment_dtype]
        p, _, m, v, vmax, step, ages, _, master = self.expected
        assert_close(self.param.tensor, p, PARAM_SPEC[dtype], f"{what}: param")
        assert_close(self.exp_avg.tensor, m, moment, f"{what}: exp_avg")
        # No cancellation in sums of squares: relative throughout.
        relative = Spec(moment.rtol, 1e-30)
        assert_close(self.exp_avg_sq.tensor, v, relative, f"{what}: exp_avg_sq")
        if self.max_exp_avg_sq is not None:
            assert_close(self.max_exp_avg_sq.tensor, vmax, relative, f"{what}: max_exp_avg_sq")
        assert self.step.tensor.item() == step.item(), f"{what}: step"
        if self.ages is not None:
            assert torch.equal(self.ages.tensor, ages), f"{what}: ages"
        if self.master is not None:
            assert_close(self.master.tensor, master, PARAM_SPEC[torch.float32], f"{what}: master")
        elif dtype in HALF:
            # Each step is judged by itself: two correct roundings of a sum drift apart.
            self.expected = (self.param.tensor.double(), *self.expected[1:])
        if self.moment_dtype in HALF:
            state = (self.exp_avg, self.exp_avg_sq, self.max_exp_avg_sq)
            moments = (None if t is None else t.tensor.double() for t in state)
            self.expected = (*self.expected[:2], *moments, *self.expected[5:])

    def check_untouched(self, before: list[Tensor | None], what: str) -> None:
        """Rows that are not selected keep every bit; so does the gradient, and what lies around."""
        untouched = ~self.touched
        names = (
            "param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step", "ages", "master",
        )  # fmt: skip
        for name, old, new in zip(names, before, self.snapshot(), strict=True):
            if old is None or name == "step":
                continue
            assert new is not None
            if name == "grad":
                assert torch.equal(old, new), f"{what}: the gradient was written"
            elif self.param.tensor.dim() and not (self.compact and name != "param"):
                assert torch.equal(old[untouched], new[untouched]), f"{what}: unselected {name}"

    def check_guards(self, what: str) -> None:
        names = (
            "param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step", "ages", "master",
        )  # fmt: skip
        for name in names:
            if (guard := getattr(self, name)) is not None:
                guard.check(f"{what}: {name}")


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Any call of torch that waits for the GPU raises."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def exact_sums() -> Iterator[None]:
    """cuBLAS may otherwise add up its parts in 16 bits. (monkeypatch cannot restore these.)"""
    matmul = torch.backends.cuda.matmul
    names = [f"allow_{name}_reduced_precision_reduction" for name in ("fp16", "bf16")]
    saved = [getattr(matmul, name) for name in names]
    for name in names:
        setattr(matmul, name, False)
    yield
    for name, value in zip(names, saved, strict=True):
        setattr(matmul, name, value)
