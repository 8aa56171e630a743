"""The Triton row gradient: against float64, in Triton's interpreter or on a GPU, and compiled ahead
of time for GPUs that are not here.
"""

from __future__ import annotations

import ctypes
import mmap
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton_tools
from helpers import exact_sums, one_thread
from torch import Tensor
from triton_tools import (
    AMD,
    DEVICE,
    NVIDIA,
    SHARED_MEMORY,
    assert_no_spills,
    compile_kernel,
    compiled,
    cuobjdump,
    no_reads_by_the_host,
    registers,
    target_id,
)

triton = pytest.importorskip("triton")
row_grad_triton = pytest.importorskip("longact.kernels.row_grad_triton")
row_grad_ = row_grad_triton.row_grad_

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
#: "split" is the fused method with its tokens divided.
METHODS = ["gather", "fused", "split"]
BITS = {4: torch.int32, 2: torch.int16}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several programs along each dimension, and rounds of their loops, even for small tensors."""
    if DEVICE == "cpu":  # a GPU runs what it would run
        blocks = row_grad_triton.Blocks(rows=16, columns=32, tokens=16, num_warps=4, num_stages=2)
        monkeypatch.setattr(
            row_grad_triton, "BLOCKS", dict.fromkeys(row_grad_triton.BLOCKS, blocks)
        )
        monkeypatch.setattr(row_grad_triton, "_PACK_ROWS", 16)
        monkeypatch.setattr(row_grad_triton, "_PACK_TOKENS", 8)
        monkeypatch.setattr(row_grad_triton, "_MAX_PARTS", 8)
        monkeypatch.setattr(row_grad_triton, "_WRITE_COLUMNS", 64)
    monkeypatch.setattr(row_grad_triton, "_MIN_SPLIT_TOKENS", 16)
    with exact_sums():
        yield


def runs_kernels(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.usefixtures(small_blocks.__name__)(triton_tools.runs_kernels(test))


def same_bits(a: Tensor, b: Tensor) -> bool:
    bits = BITS[a.element_size()]
    return torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


def call(method: str, *args: Any, **options: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if method != "split":
            patch.setattr(row_grad_triton, "_MAX_SPLITS", 1)
        row_grad_(*args, method="gather" if method == "gather" else "fused", **options)


def make_operands(
    tokens: int, out: int, in_features: int, rows: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """grad_output, poisoned outside of the rows' columns, and input."""
    grad_output = torch.full((tokens, out), float("nan"), dtype=dtype)
    grad_output[:, ::2] = float("inf")
    grad_output[:, rows.long()] = torch.randn(tokens, rows.numel()).to(dtype)
    return grad_output, torch.randn(tokens, in_features).to(dtype)


def check(
    method: str,
    grad_output: Tensor,
    input: Tensor,
    rows: Tensor,
    *,
    grad_dtype: torch.dtype | None = None,
    accumulate: bool = False,
    bias: bool = True,
    padding: int = 0,
) -> tuple[Tensor, Tensor]:
    """Runs it on poisoned gradients and compares every element of them."""
    (tokens, out), in_features = grad_output.shape, input.shape[1]
    dtype, grad_dtype = input.dtype, grad_dtype or input.dtype
    selected = rows.long()
    buffer = torch.full((out + 2, in_features + padding), float("nan"), dtype=grad_dtype)
    bias_buffer = torch.full((out + 2,), float("nan"), dtype=grad_dtype)
    grad, bias_grad = buffer[1:-1, :in_features], bias_buffer[1:-1]
    if accumulate:
        grad[selected] = (3 * torch.randn(rows.numel(), in_features)).to(grad_dtype)
        bias_grad[selected] = (3 * torch.randn(rows.numel())).to(grad_dtype)
    before, bias_before = buffer.clone(), bias_buffer.clone()

    there, bias_there = buffer.to(DEVICE), bias_buffer.to(DEVICE)
    call(
        method,
        there[1:-1, :in_features],
        move(grad_output),
        move(input),
        move(rows),
        bias_there[1:-1] if bias else None,
        accumulate=accumulate,
    )
    buffer.copy_(there)
    bias_buffer.copy_(bias_there)

    a, b = grad_output[:, selected].double(), input.double()
    ones = torch.ones(tokens, 1, dtype=torch.float64)
    for result, old, x, is_bias in (
        (buffer, before, b, False),
        (bias_buffer[:, None], bias_before[:, None], ones, True),
    ):
        touched = torch.zeros(result.shape, dtype=torch.bool)
        if bias or not is_bias:
            touched[selected + 1, : x.shape[1]] = True
        assert same_bits(result[~touched], old[~touched]), "wrote outside of the rows"
        if is_bias and not bias:
            continue
        values = result[selected + 1, : x.shape[1]].double()
        added = old[selected + 1, : x.shape[1]].double() if accumulate else torch.zeros_like(values)
        product = a.t() @ x
        # Sums in fp32, a rounding to the gradient's dtype; and of gather's product, torch.mm's.
        error = (tokens + 32) * 2.0**-23 * (a.abs().t() @ x.abs() + added.abs())
        if method == "gather" and not is_bias:
            error += torch.finfo(dtype).eps / 2 * product.abs() + torch.finfo(dtype).tiny
        expected = product + added
        error += torch.finfo(grad_dtype).eps / 2 * (expected.abs() + error)
        error += torch.finfo(grad_dtype).smallest_normal * torch.finfo(grad_dtype).eps
        assert ((values - expected).abs() <= error).all(), (values - expected).abs().max()
    return grad, bias_grad


def move(tensor: Tensor) -> Tensor:
    """To the device, strides and all."""
    if DEVICE == "cpu":
        return tensor
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())  # type: ignore[call-overload]
    return storage.to(DEVICE).as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


def pick(out: int, k: int) -> Tensor:
    return torch.randperm(out)[:k].sort().values.int()


# ---- values --------------------------------------------------------------------------------------


@runs_kernels
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("dtype", "grad_dtype"),
    [(FP32, FP32), (BF16, BF16), (FP16, FP16), (BF16, FP32), (FP16, FP32), (FP32, BF16)],
)
def test_every_dtype_matches_float64(
    dtype: torch.dtype, grad_dtype: torch.dtype, method: str, accumulate: bool
) -> None:
    rows = pick(50, 21)
    grad_output, input = make_operands(77, 50, 71, rows, dtype)
    check(method, grad_output, input, rows, grad_dtype=grad_dtype, accumulate=accumulate)


@runs_kernels
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("tokens", "out", "in_features", "k"),
    [
        (1, 1, 1, 1),
        (63, 63, 63, 63),  # every row
        (65, 4097, 1, 9),
        (33, 3, 1025, 1),
        (129, 40, 33, 17),
        (16, 32, 32, 16),  # whole blocks
        (128, 48, 64, 32),
    ],
)
def test_odd_shapes(method: str, tokens: int, out: int, in_features: int, k: int) -> None:
    rows = pick(out, k)
    rows[-1] = out - 1
    for dtype, accumulate in ((FP32, False), (BF16, True)):
        grad_output, input = make_operands(tokens, out, in_features, rows, dtype)
        check(method, grad_output, input, rows, accumulate=accumulate)


@runs_kernels
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_the_rows_by_themselves(dtype: torch.dtype) -> None:
    for tokens, out, in_features, k in (
        (77, 50, 71, 21),
        (1, 1, 1, 1),
        (33, 9, 5, 0),
        (0, 9, 5, 3),
    ):
        rows = pick(out, k)
        grad_output, input = make_operands(tokens, out, in_features, rows, dtype)
        found = row_grad_triton.row_grad(move(grad_output), move(input), move(rows)).cpu()
        assert found.dtype == dtype
        a, b = grad_output[:, rows.long()].double(), input.double()
        bound = (torch.finfo(dtype).eps + 1e-5) * (a.abs().t() @ b.abs()) + 1e-12
        assert found.shape == (k, in_features)
        assert bool(((found.double() - a.t() @ b).abs() <= bound).all())
    expanded = torch.ones(1, 1).expand(8, 6)  # as the gradient of a sum is
    rows = pick(6, 2)
    found = row_grad_triton.row_grad(move(expanded), move(torch.ones(8, 3)), move(rows))
    assert found.tolist() == [[8.0] * 3] * 2


@runs_kernels
@pytest.mark.parametrize("method", METHODS)
def test_without_a_bias(method: str) -> None:
    rows = pick(50, 21)
    grad_output, input = make_operands(77, 50, 71, rows, FP32)
    check(method, grad_output, input, rows, bias=False)
    check(method, grad_output, input, rows, bias=False, accumulate=True)


@runs_kernels
@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_add_up(method: str) -> None:
    """Three calls into one gradient are the gradient of all tokens."""
    rows = pick(20, 7)
    grad_output, input = make_operands(90, 20, 40, rows, BF16)
    grad, bias_grad = torch.zeros(20, 40, device=DEVICE), torch.zeros(20, device=DEVICE)
    for part in range(3):
        tokens = slice(30 * part, 30 * part + 30)
        parts = (move(grad_output[tokens]), move(input[tokens]), move(rows))
        call(method, grad, *parts, bias_grad, accumulate=part > 0)
    a = grad_output[:, rows.long()].double()
    exact = method != "gather"
    product, places = a.t() @ input.double(), rows.long()
    error = 2e-5 if exact else 3 * 2.0**-9 * (a.abs().t() @ input.double().abs()).max()
    assert (grad.cpu()[places] - product).abs().max() <= error
    assert (bias_grad.cpu()[places] - a.sum(0)).abs().max() <= 2e-5
    assert grad.count_nonzero() == 7 * 40
    assert bias_grad.count_nonzero() == 7


@runs_kernels
@pytest.mark.parametrize("method", METHODS)
def test_nothing_selected_and_no_tokens(method: str) -> None:
    rows = pick(5, 3)
    grad_output, input = make_operands(20, 5, 40, rows, FP32)
    for accumulate in (False, True):
        check(method, grad_output, input, rows[:0], accumulate=accumulate)
        check(method, grad_output[:0], input[:0], rows, accumulate=accumulate)
        check(method, grad_output, input[:, :0], rows, accumulate=accumulate)
    # A sum over no tokens leaves even the sign of zero.
    grad, bias_grad = torch.full((5, 40), -0.0), torch.full((5,), -0.0)
    there, bias_there = grad.clone().to(DEVICE), bias_grad.clone().to(DEVICE)
    empty = (move(grad_output[:0]), move(input[:0]), move(rows))
    call(method, there, *empty, bias_there, accumulate=True)
    assert same_bits(there.cpu(), grad)
    assert same_bits(bias_there.cpu(), bias_grad)


# ---- layouts -------------------------------------------------------------------------------------


@runs_kernels
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "layout", ["slice of qkv", "transposed", "column of 1", "one token for all", "y.sum()"]
)
def test_layouts_of_grad_output(method: str, layout: str) -> None:
    rows = pick(30, 11)
    grad_output, input = make_operands(41, 30, 37, rows, FP16)
    if layout == "slice of qkv":
        fused = torch.full((41, 95), float("nan"), dtype=FP16)
        fused[:, 33:63] = grad_output
        grad_output = fused[:, 33:63]
    elif layout == "transposed":
        grad_output = grad_output.t().contiguous().t()
    elif layout == "column of 1":
        rows = torch.zeros(1, dtype=torch.int32)
        grad_output = torch.randn(41, 7, dtype=FP16)[:, 2:3]
        assert grad_output.stride() == (7, 1)
        check(method, grad_output.as_strided((41, 1), (7, 3), 2), input, rows)
    elif layout == "one token for all":
        grad_output = grad_output[:1].expand(41, 30)
    else:
        grad_output = torch.ones((), dtype=FP16).expand(41, 30)
    check(method, grad_output, input, rows)


@runs_kernels
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", ["slice", "transposed", "one token for all", "one value"])
def test_layouts_of_input(method: str, layout: str) -> None:
    rows = pick(30, 11)
    grad_output, input = make_operands(41, 30, 37, rows, BF16)
    input = {
        "slice": torch.cat([input.neg(), input, input.neg()], 1)[:, 37:74],
        "transposed": input.t().contiguous().t(),
        "one token for all": input[:1].expand(41, 37),
        "one value": torch.ones((), dtype=BF16).expand(41, 37),
    }[layout]
    check(method, grad_output, input, rows)


@runs_kernels
@pytest.mark.parametrize("method", METHODS)
def test_layouts_of_grad_and_rows(method: str) -> None:
    rows = pick(30, 11)
    grad_output, input = make_operands(41, 30, 70, rows, FP32)
    plain, plain_bias = check(method, grad_output, input, rows)
    other, other_bias = check(
        method, grad_output, input, rows.long().repeat_interleave(2)[::2], padding=5
    )
    selected = rows.long()
    assert same_bits(other[selected], plain[selected])
    assert same_bits(other_bias[selected], plain_bias[selected])


@runs_kernels
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("which", ["grad_output", "input", "grad"])
def test_offsets_beyond_32_bits(method: str, which: str, tmp_path: Path) -> None:
    stride = 2**30 + 8
    size = 2 * stride + 64

    def far(matrix: Tensor) -> Tensor:
        if DEVICE == "cpu":  # a file with holes
            path = str(tmp_path / "far")
            memory = torch.from_file(path, shared=True, size=size, dtype=matrix.dtype)
        else:
            memory = torch.empty(size, dtype=matrix.dtype, device=DEVICE)
        return memory.as_strided(matrix.shape, (stride, 1)).copy_(matrix)

    rows = torch.tensor([0, 2], dtype=torch.int32, device=DEVICE)
    tensors = {
        "grad": torch.zeros(3, 20, dtype=BF16, device=DEVICE),
        "grad_output": torch.randn(3, 3).to(DEVICE, BF16),
        "input": torch.randn(3, 20).to(DEVICE, BF16),
    }
    expected = tensors["grad_output"].double().t() @ tensors["input"].double()
    expected[1] = 0
    tensors[which] = far(tensors[which])
    call(method, tensors["grad"], tensors["grad_output"], tensors["input"], rows)
    torch.testing.assert_close(tensors["grad"].double(), expected, rtol=2.0**-8, atol=1e-6)


@runs_kernels
@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU's allocations do not end at a guarded page")
@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_read_beyond_the_end(method: str) -> None:
    """Behind the operands and the rows lies memory that must not be touched: a crash."""

    def before_a_guarded_page(tensor: Tensor) -> Tensor:
        page = mmap.PAGESIZE
        size = -(-tensor.nbytes // page) * page
        memory = mmap.mmap(-1, size + page)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + size), page, 0) == 0
        whole = torch.frombuffer(memory, dtype=torch.uint8, count=size)
        return whole[size - tensor.nbytes :].view(tensor.dtype).view(tensor.shape).copy_(tensor)

    rows = torch.tensor([0, 2, 9], dtype=torch.int32)
    operands = make_operands(41, 10, 37, rows, FP32)
    grad_output, input, rows = (before_a_guarded_page(t) for t in (*operands, rows))
    check(method, grad_output, input, rows)


# ---- the launch ----------------------------------------------------------------------------------


@runs_kernels
@pytest.mark.parametrize("method", METHODS)
def test_the_host_reads_nothing_and_results_repeat(method: str) -> None:
    rows = pick(50, 21)
    grad_output, input = (move(t) for t in make_operands(77, 50, 71, rows, FP32))
    results = []
    for _ in range(2):
        grad, bias_grad = torch.zeros(50, 71, device=DEVICE), torch.zeros(50, device=DEVICE)
        with no_reads_by_the_host():
            call(method, grad, grad_output, input, move(rows), bias_grad)
        results.append(torch.cat([grad, bias_grad[:, None]], 1))
    assert same_bits(*results)
    assert results[0].count_nonzero() == 21 * 72


@runs_kernels
def test_method_by_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    for name in ("_gather", "_fused"):
        monkeypatch.setattr(row_grad_triton, name, lambda *_, name=name: called.append(name))
    args = (torch.zeros(5, 9), torch.zeros(7, 5), torch.zeros(7, 9), torch.tensor([1, 2]))
    row_grad_(*args)

    def rule(*shape: Any) -> str:
        called.append(shape)
        return "fused"

    monkeypatch.setattr(row_grad_triton, "choose_method", rule)
    row_grad_(*args)
    row_grad_(*args, method="gather")
    assert called == ["_gather", (2, 9, 7, FP32), "_fused", "_gather"]


def test_blocks_by_shape() -> None:
    choose, blocks = row_grad_triton.choose_blocks, row_grad_triton.BLOCKS
    common = {"tokens": 8192, "tf32": False, "aligned": True}
    # q and k of an 8B model, 30 % of the rows: enough blocks, and too few.
    assert choose(1229, 4096, dtype=BF16, **common) == (blocks["wide"], 1)
    assert choose(307, 4096, dtype=FP16, **common) == (blocks["wide"], 3)
    assert choose(19, 576, dtype=BF16, **common) == (blocks["wide"], 16)
    assert choose(19, 576, dtype=BF16, **common | {"tokens": 1535}) == (blocks["wide"], 2)
    assert choose(19, 576, dtype=BF16, **common | {"tokens": 0}) == (blocks["wide"], 1)
    assert choose(19, 128, dtype=BF16, **common)[0] == blocks["small"]
    assert choose(1229, 4096, dtype=BF16, **common | {"aligned": False})[0] == blocks["small"]
    assert choose(1229, 4096, dtype=FP32, **common)[0] == blocks["fp32"]
    assert choose(1229, 4096, dtype=FP32, **common | {"tf32": True})[0] == blocks["tf32"]
    unaligned = common | {"tf32": True, "aligned": False}
    assert choose(1229, 4096, dtype=FP32, **unaligned)[0] == blocks["fp32"]


def test_what_is_aligned() -> None:
    aligned = row_grad_triton._is_aligned
    memory = torch.zeros(32 * 64 + 32, dtype=BF16)
    memory = memory[-memory.data_ptr() % 16 // 2 :]
    assert aligned(memory.as_strided((8, 32), (64, 1)))
    assert not aligned(memory.as_strided((8, 32), (64, 1), 1))
    assert not aligned(memory.as_strided((8, 32), (56, 1)))
    assert not aligned(memory.as_strided((8, 24), (64, 1)))


@pytest.mark.parametrize("parts", [1, 3, 16, 128])
def test_divided_tokens_cover_all(parts: int) -> None:
    for tokens in [*range(200), 4097, 131071]:
        size, count = row_grad_triton._divide(tokens, parts, 32)
        assert size % 32 == 0
        assert 1 <= count <= parts
        assert size * count >= tokens
        assert count == 1 or size * (count - 1) < tokens


@compiled
def test_sizes_do_not_compile_anew() -> None:
    sizes = {
        "_pack_kernel": ["tokens", "k", "vectors", "tokens_per_part"],
        "_matmul_kernel": ["tokens", "k", "tokens_per_split"],
        "_write_rows_kernel": ["splits", "parts"],
    }
    for name, expected in sizes.items():
        parameters = getattr(row_grad_triton, name).params
        assert [p.name for p in parameters if p.do_not_specialize] == expected
        # Rows lie where they may: a captured backward's 4 bytes into a buffer.
        assert [p.name for p in parameters if p.do_not_specialize_on_alignment] == ["rows"]


def test_supports() -> None:
    supports = row_grad_triton.supports
    grad, grad_output, input = torch.zeros(5, 9), torch.zeros(7, 5), torch.zeros(7, 9)
    assert supports(grad, grad_output, input)
    assert supports(grad.bfloat16(), grad_output, input)
    assert supports(torch.zeros(5, 12)[:, :9], grad_output.t(), input)
    assert not supports(grad.t().contiguous().t(), grad_output, input)
    assert supports(torch.zeros(5, 2)[:, :1].as_strided((5, 1), (2, 2)), grad_output, input[:, :1])
    assert not supports(torch.zeros(1, 9).expand(5, 9), grad_output, input)
    assert not supports(grad.double(), grad_output.double(), input.double())
    assert not supports(grad, grad_output.bfloat16(), input)
    assert not supports(grad.double(), grad_output, input)
    assert not supports(grad, grad_output[None], input)
    assert not supports(grad, torch._neg_view(grad_output), input)
    assert not supports(grad, grad_output.to("meta"), input)
    assert not supports(grad, grad_output, input.to_sparse())


def test_errors() -> None:
    grad, grad_output, input = torch.zeros(5, 9), torch.zeros(7, 5), torch.zeros(7, 9)
    rows = torch.tensor([1, 2])
    for bad in (
        (grad[:4], grad_output, input),
        (grad[:, :8], grad_output, input),
        (grad, grad_output[:6], input),
        (grad, grad_output, input.bfloat16()),
    ):
        with pytest.raises(ValueError, match=r"must fit each other.*\[7, 5\]|\[6, 5\]"):
            row_grad_(*bad, rows)
    for bad_rows in (rows[None], rows.float(), rows.short()):
        with pytest.raises(ValueError, match="rows must be int32 or int64"):
            row_grad_(grad, grad_output, input, bad_rows)
    for bias in (torch.zeros(4), torch.zeros(5, 1), torch.zeros(10)[::2], torch.zeros(5).double()):
        with pytest.raises(ValueError, match=r"bias_grad must be contiguous \[5\]"):
            row_grad_(grad, grad_output, input, rows, bias)
    with pytest.raises(ValueError, match="method='cublas'"):
        row_grad_(grad, grad_output, input, rows, method="cublas")


# ---- compiled for GPUs that are not here ---------------------------------------------------------

NAMES = {FP32: "fp32", BF16: "bf16", FP16: "fp16"}
#: Each configuration with its operands' dtype, and whether they are read 16 bytes at a time.
CONFIGURATIONS = {
    "wide": ("wide", BF16, "ieee", True),
    "small": ("small", FP16, "ieee", True),
    "small unaligned": ("small", BF16, "ieee", False),
    "fp32": ("fp32", FP32, "ieee", True),
    "fp32 unaligned": ("fp32", FP32, "ieee", False),
    "tf32": ("tf32", FP32, "tf32", True),
    "tf32 unaligned": ("fp32", FP32, "tf32", False),
}
#: HAS_BIAS, ACCUMULATE, SPLIT and the gradient's dtype (None: the operands').
WAYS: dict[str, tuple[bool, bool, bool, torch.dtype | None]] = {
    "added to fp32": (True, True, False, FP32),
    "written": (False, False, False, None),
    "split": (True, False, True, FP32),
}


def compile_matmul(configuration: str, way: str, target: Any, folder: Path) -> Any:
    name, dtype, precision, is_aligned = CONFIGURATIONS[configuration]
    has_bias, accumulate, split, grad_dtype = WAYS[way]
    blocks = row_grad_triton.BLOCKS[name]
    pointers = {
        "grad_output": f"*{NAMES[dtype]}", "input": f"*{NAMES[dtype]}", "rows": "*i32",
        "grad": f"*{NAMES[grad_dtype or dtype]}", "bias_grad": f"*{NAMES[grad_dtype or dtype]}",
    }  # fmt: skip
    sizes = dict.fromkeys(
        ["grad_output_stride", "input_stride", "grad_stride", "tokens", "k", "in_features",
         "tokens_per_split"], "i32",
    )  # fmt: skip
    constants = {
        "HAS_BIAS": has_bias, "ACCUMULATE": accumulate, "SPLIT": split, "PRECISION": precision,
        "ROWS": blocks.rows, "COLUMNS": blocks.columns, "TOKENS": blocks.tokens,
    }  # fmt: skip
    strides = ("grad_output_stride", "input_stride", "grad_stride", "in_features")
    return compile_kernel(
        row_grad_triton._matmul_kernel, pointers | sizes, constants, target, folder,
        aligned=(*pointers, *strides) if is_aligned else (),
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages if target.backend == "cuda" else 2,
    )  # fmt: skip


def compile_pack(dtype: torch.dtype, target: Any, folder: Path) -> Any:
    types = {
        "grad_output": f"*{NAMES[dtype]}", "stride": "i32", "rows": "*i32",
        "packed": f"*{NAMES[dtype]}", "bias_parts": "*fp32", "tokens": "i32", "k": "i32",
        "vectors": "i32", "tokens_per_part": "i32",
    }  # fmt: skip
    constants = {
        "HAS_BIAS": True, "ROWS": row_grad_triton._PACK_ROWS,
        "TOKENS": row_grad_triton._PACK_TOKENS, "MULTIPLE": row_grad_triton._PACK_MULTIPLE,
    }  # fmt: skip
    return compile_kernel(
        row_grad_triton._pack_kernel, types, constants, target, folder, num_warps=4
    )


def compile_write_rows(
    dtype: torch.dtype, grad_dtype: torch.dtype, target: Any, folder: Path
) -> Any:
    types = {
        "product": f"*{NAMES[dtype]}", "rows": "*i64", "grad": f"*{NAMES[grad_dtype]}",
        "grad_stride": "i32", "bias_parts": "*fp32", "bias_grad": f"*{NAMES[grad_dtype]}",
        "splits": "i32", "split_stride": "i32", "parts": "i32", "in_features": "i32",
    }  # fmt: skip
    constants = {
        "HAS_BIAS": True, "ACCUMULATE": True, "COLUMNS": row_grad_triton._WRITE_COLUMNS,
        "MAX_PARTS": row_grad_triton._MAX_PARTS,
    }  # fmt: skip
    aligned = ("product", "rows", "grad", "bias_parts", "bias_grad")
    return compile_kernel(
        row_grad_triton._write_rows_kernel, types, constants, target, folder,
        aligned=(*aligned, "grad_stride", "split_stride", "in_features"), num_warps=4,
    )  # fmt: skip


def assert_fits(kernel: Any, target: Any, folder: Path) -> None:
    assert_no_spills(kernel, folder)
    assert kernel.metadata.shared <= SHARED_MEMORY[target.arch]
    assert registers(kernel, folder) * 32 * kernel.metadata.num_warps <= 65536


def assert_long_offsets(kernel: Any) -> None:
    """What is multiplied with a stride is int64; int32 are products with constants, and the first
    token of a part.
    """
    products = re.findall(r"arith\.muli (%\S+), (%\S+) : (\S+)", kernel.asm["ttir"])
    assert products
    for left, right, type_ in products:
        short = "i64" not in type_
        assert not (short and "tensor" in type_), (left, right, type_)
        assert not short or re.match(r"%(c\d|tokens_per)|%arg", right), (left, right, type_)
    assert any(type_.endswith("i64>") or type_ == "i64" for *_, type_ in products)


# Every way for one architecture; for the others the one that does most.
@compiled
@pytest.mark.parametrize(
    ("target", "way"),
    [
        pytest.param(target, way, id=f"{target_id(target)}-{way}")
        for target in NVIDIA
        for way in (WAYS if target.arch == 90 else ["added to fp32"])
    ],
)
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_matmul_kernel_compiles_for_nvidia(
    configuration: str, target: Any, way: str, tmp_path: Path
) -> None:
    kernel = compile_matmul(configuration, way, target, tmp_path)
    assert_fits(kernel, target, tmp_path)
    assert_long_offsets(kernel)
    ptx = kernel.asm["ptx"]
    unit = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[target.arch]
    if CONFIGURATIONS[configuration][1:3] == (FP32, "ieee"):
        assert not re.search("mma", ptx)  # no matrix unit has fp32
        assert "fma.rn.f32" in ptx
    else:
        assert unit in ptx
    # The input is copied to shared memory asynchronously: 16 bytes at a time, or 4.
    if CONFIGURATIONS[configuration][3]:
        assert "cp.async" in ptx
        if configuration != "tf32":  # there it is transposed on the way
            assert "cp.async.cg.shared.global" in ptx


@compiled
@pytest.mark.parametrize("target", NVIDIA[1:], ids=target_id)
def test_gather_is_a_round_ahead(target: Any, tmp_path: Path) -> None:
    """What a round's product takes has been asked for in the round before."""
    ptx = compile_matmul("wide", "written", target, tmp_path).asm["ptx"]
    unit = {90: "wgmma.mma_async", 100: "tcgen05.mma"}[target.arch]
    loop = ptx[: ptx.rindex(unit)]
    loop = loop[loop.rindex("Inner Loop Header") :]
    loaded = re.findall(r"ld\.global\.b16 \{ (%\w+) \}", loop)
    stored = re.findall(r"%rs\d+", "".join(re.findall(r"st\.shared.*", loop)))
    assert len(set(loaded)) == len(set(stored)) == 64 * 64 // 256
    assert not {*loaded} & {*stored}


@compiled
@pytest.mark.parametrize("target", NVIDIA, ids=target_id)
def test_other_kernels_compile_for_nvidia(target: Any, tmp_path: Path) -> None:
    # Every pair of types for one architecture.
    for dtype in (BF16, FP32) if target.arch == 90 else (BF16,):
        kernel = compile_pack(dtype, target, tmp_path)
        assert_fits(kernel, target, tmp_path)
        assert_long_offsets(kernel)
        # 32 x 128 values, 16 bytes a thread
        stores = len(re.findall(r"STG\.E\S*\.128", cuobjdump("-sass", kernel, tmp_path)))
        assert stores == 32 * 128 * dtype.itemsize // 16 // 128
    pairs = [(FP16, FP32), (BF16, BF16), (FP32, BF16)]
    for dtype, grad_dtype in pairs if target.arch == 90 else pairs[:1]:
        kernel = compile_write_rows(dtype, grad_dtype, target, tmp_path)
        assert_fits(kernel, target, tmp_path)
        assert_long_offsets(kernel)
        stores = len(re.findall(r"STG\.E\S*\.128", cuobjdump("-sass", kernel, tmp_path)))
        assert stores == 1024 * grad_dtype.itemsize // 16 // 128


@compiled
def test_kernels_compile_for_amd(tmp_path: Path) -> None:
    try:
        kernels = [
            compile_matmul("wide", "added to fp32", AMD, tmp_path),
            compile_matmul("small unaligned", "written", AMD, tmp_path),
            compile_matmul("fp32", "split", AMD, tmp_path),
            compile_pack(BF16, AMD, tmp_path),
            compile_write_rows(BF16, FP32, AMD, tmp_path),
        ]
    except Exception as error:
        if "TRITON_HIP_LLD_PATH" not in str(error):
            raise
        pytest.skip(f"older Tritons need ROCm's linker: {error}")
    for kernel in kernels:
        assert re.search(r"\.vgpr_spill_count:\s*0\b", kernel.asm["amdgcn"])
        assert kernel.metadata.shared <= 64 * 1024
    assert "v_mfma" in kernels[0].asm["amdgcn"]
