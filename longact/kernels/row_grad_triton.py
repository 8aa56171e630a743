# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
"""The row gradient in Triton: `grad[rows] = grad_output[:, rows]^T input`, written or added
straight into those rows of the full-size gradient, the bias' rows in the same pass.

Two methods, both deterministic:

    gather   _pack_kernel copies the selected columns of grad_output side by side,
             torch.mm multiplies, _write_rows_kernel brings the product to its rows
    fused    _matmul_kernel reads the selected columns where they are; where its tiles are too few,
             each sums a part of the tokens and _write_rows_kernel adds the parts up

Which one, and in what blocks: `choose_method` and `choose_blocks`. Nothing is read back, and
nothing but dtypes and layout is a compile-time constant.

Imports Triton: import this module only where it is used.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from longact.backends import is_plain
from longact.kernels.triton_common import dot_operand, from_fp32, on_device_of, to_fp32

__all__ = [
    "BLOCKS",
    "Blocks",
    "Method",
    "choose_blocks",
    "choose_method",
    "row_grad",
    "row_grad_",
    "supports",
]

Method = Literal["gather", "fused"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# A program of _pack_kernel takes so many rows, and so many tokens at a time.
_PACK_ROWS = 128
_PACK_TOKENS = 32
# cuBLAS reads 16 bytes at a time only where each token's columns begin on a multiple of that, so
# columns of zeros make their number a multiple of 8.
_PACK_MULTIPLE = 8
# Into how many parts the tokens are divided at most, a power of two: _write_rows_kernel adds up the
# bias' parts all at once.
_MAX_PARTS = 128
_WRITE_COLUMNS = 1024  # of a program of _write_rows_kernel


class Blocks(NamedTuple):
    """How _matmul_kernel divides its work."""

    rows: int
    columns: int
    tokens: int  # of a round of the loop
    num_warps: int
    num_stages: int


#: Every configuration of _matmul_kernel. Wide rather than high: each block of columns gathers
#: grad_output's columns anew, and 128 x 256 does not fit the registers. What is not read 16 bytes
#: at a time goes through the registers too: smaller blocks.
BLOCKS: dict[str, Blocks] = {
    "wide": Blocks(rows=64, columns=256, tokens=64, num_warps=8, num_stages=4),
    "small": Blocks(rows=64, columns=64, tokens=32, num_warps=8, num_stages=4),
    "fp32": Blocks(rows=64, columns=64, tokens=16, num_warps=8, num_stages=3),
    "tf32": Blocks(rows=128, columns=128, tokens=32, num_warps=8, num_stages=3),
}
# Too few blocks leave a card idle: the tokens are divided until there are about so many programs.
# A constant, so that results do not depend on the card.
_PROGRAMS = 256
_MAX_SPLITS = 16
_MIN_SPLIT_TOKENS = 512


def choose_method(k: int, in_features: int, tokens: int, dtype: torch.dtype) -> Method:
    """The rule. An estimate: no GPU has measured it (benchmarks/results).

    A q projection of 4,096 x 4,096 in bf16, 8,192 tokens, 30 % of the rows: torch.mm has 82 GFLOP
    to do, about 0.12 ms of an H100. "gather" adds the packing, tokens * (out + k) * 2 bytes = 87 MB
    (nearly every 32 bytes hold a selected column), and k * in * 4 bytes = 20 MB for the rows: about
    0.035 ms at its bandwidth. "fused" saves that, but each of its 16 blocks of columns gathers the
    67 MB of grad_output again, 2 bytes a lane and through registers (cp.async copies 4 bytes at
    least, TMA 16), and on Hopper Triton's matmul is the slower one to begin with.
    """
    return "gather"


def choose_blocks(
    k: int, in_features: int, tokens: int, dtype: torch.dtype, tf32: bool, aligned: bool
) -> tuple[Blocks, int]:
    """The configuration of _matmul_kernel, and into how many parts the tokens are divided.

    aligned: input and grad can be read 16 bytes at a time.
    """
    if dtype == torch.float32:
        blocks = BLOCKS["tf32" if tf32 and aligned else "fp32"]
    else:
        blocks = BLOCKS["wide" if in_features > 128 and aligned else "small"]
    programs = triton.cdiv(k, blocks.rows) * triton.cdiv(in_features, blocks.columns)
    splits = min(_PROGRAMS // max(programs, 1), tokens // _MIN_SPLIT_TOKENS, _MAX_SPLITS)
    return blocks, max(splits, 1)


# ---- kernels -------------------------------------------------------------------------------------
#
# Rows of a captured backward lie 4 bytes into a buffer; no capture must compile a kernel for that.


@triton.jit
def _write(pointer, value, mask, ACCUMULATE: tl.constexpr):
    """fp32 values, added to what is there or in its place."""
    if ACCUMULATE:
        value += to_fp32(tl.load(pointer, mask=mask, other=0.0))
    tl.store(pointer, from_fp32(value, pointer.dtype.element_ty), mask=mask)


@triton.jit
def _load_tokens(matrix, stride, first, end, column, has_column, TOKENS: tl.constexpr):
    """Columns of the tokens from `first` on, `[TOKENS, columns]`, zeros from `end` on.

    Lanes go along the columns: selected ones lie close to each other.
    """
    token = tl.arange(0, TOKENS)
    # The offsets inside the block stay the same from block to block.
    offset = token.to(tl.int64)[:, None] * stride + column[None, :]
    mask = (first + token < end)[:, None] & has_column[None, :]
    return tl.load(matrix + first.to(tl.int64) * stride + offset, mask=mask, other=0)


@triton.jit(
    do_not_specialize=["tokens", "k", "vectors", "tokens_per_part"],
    do_not_specialize_on_alignment=["rows"],
)
def _pack_kernel(
    grad_output,
    stride,
    rows,
    packed,  # [tokens, 8 * vectors]: the columns of the rows, then zeros
    bias_parts,  # fp32 [k, parts]
    tokens,
    k,
    vectors,
    tokens_per_part,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    MULTIPLE: tl.constexpr,
):
    part = tl.program_id(1)
    item = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.load(rows + item, mask=item < k, other=0).to(tl.int64)
    width = vectors * MULTIPLE
    begin = part * tokens_per_part
    end = tl.minimum(begin + tokens_per_part, tokens)
    total = tl.zeros([TOKENS, ROWS], tl.float32)
    first = begin
    for _ in range(begin, end, TOKENS):
        value = _load_tokens(grad_output, stride, first, end, row, item < k, TOKENS)
        token = first + tl.arange(0, TOKENS)
        tl.store(
            packed + token.to(tl.int64)[:, None] * width + item[None, :],
            value,
            mask=(token < end)[:, None] & (item < width)[None, :],
        )
        if HAS_BIAS:
            total += to_fp32(value)
        first += TOKENS
    if HAS_BIAS:
        parts = tl.num_programs(1)
        tl.store(bias_parts + item.to(tl.int64) * parts + part, tl.sum(total, 0), mask=item < k)


@triton.jit(
    do_not_specialize=["tokens", "k", "tokens_per_split"], do_not_specialize_on_alignment=["rows"]
)
def _matmul_kernel(
    grad_output,
    grad_output_stride,
    input,
    input_stride,
    rows,
    grad,  # the gradient; SPLIT: fp32 [splits, k, in]
    grad_stride,
    bias_grad,  # the bias' gradient; SPLIT: fp32 [k, splits]
    tokens,
    k,
    in_features,
    tokens_per_split,
    HAS_BIAS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """With a bias there is one block of columns more, which sums grad_output's columns."""
    split = tl.program_id(2)
    first_column = tl.program_id(1) * COLUMNS
    item = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    has_row = item < k
    row = tl.load(rows + item, mask=has_row, other=0).to(tl.int64)
    begin = split * tokens_per_split
    end = tl.minimum(begin + tokens_per_split, tokens)
    first = begin
    if first_column < in_features:
        column = first_column + tl.arange(0, COLUMNS)
        has_column = column < in_features
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        # Through registers, so a round ahead: the matrix unit works while the next block is read.
        # As bits, because Triton 3.5 cannot compile a loop's own variable as operand for Blackwell.
        BITS: tl.constexpr = tl.int32 if input.dtype.element_ty == tl.float32 else tl.int16
        dy = grad_output.to(tl.pointer_type(BITS))
        ahead = _load_tokens(dy, grad_output_stride, first, end, row, has_row, TOKENS)
        for _ in range(begin, end, TOKENS):
            selected = ahead.to(input.dtype.element_ty, bitcast=True)
            x = _load_tokens(input, input_stride, first, end, column, has_column, TOKENS)
            first += TOKENS
            ahead = _load_tokens(dy, grad_output_stride, first, end, row, has_row, TOKENS)
            total = tl.dot(
                tl.trans(dot_operand(selected)), dot_operand(x), total, input_precision=PRECISION
            )
        place = split.to(tl.int64) * k + item if SPLIT else row
        _write(
            grad + place[:, None] * grad_stride + column[None, :],
            total,
            has_row[:, None] & has_column[None, :],
            ACCUMULATE,
        )
    elif HAS_BIAS:
        sums = tl.zeros([TOKENS, ROWS], tl.float32)
        for _ in range(begin, end, TOKENS):
            sums += to_fp32(
                _load_tokens(grad_output, grad_output_stride, first, end, row, has_row, TOKENS)
            )
            first += TOKENS
        place = item.to(tl.int64) * tl.num_programs(2) + split if SPLIT else row
        _write(bias_grad + place, tl.sum(sums, 0), has_row, ACCUMULATE)


@triton.jit(do_not_specialize=["splits", "parts"], do_not_specialize_on_alignment=["rows"])
def _write_rows_kernel(
    product,  # [splits, k or more, in]
    rows,
    grad,
    grad_stride,
    bias_parts,  # fp32 [k, parts]
    bias_grad,
    splits,
    split_stride,
    parts,
    in_features,
    HAS_BIAS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    COLUMNS: tl.constexpr,
    MAX_PARTS: tl.constexpr,
):
    """A row of the product a program, its parts added up in their order."""
    item = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + item).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < in_features
    total = tl.zeros([COLUMNS], tl.float32)
    addend = product + item * in_features
    for _ in range(0, splits):
        total += to_fp32(tl.load(addend + column, mask=mask, other=0.0))
        addend += split_stride
    _write(grad + row * grad_stride + column, total, mask, ACCUMULATE)
    if HAS_BIAS:
        part = tl.arange(0, MAX_PARTS)
        sums = tl.load(bias_parts + item * parts + part, mask=part < parts, other=0.0)
        _write(bias_grad + row, tl.sum(sums, 0), tl.program_id(1) == 0, ACCUMULATE)


# ---- launch --------------------------------------------------------------------------------------


def supports(grad: Tensor, grad_output: Tensor, input: Tensor) -> bool:
    """The kernels want plain tensors of types they know, and a gradient whose rows are contiguous.

    grad_output and input have one dtype; grad's may be another.
    """
    tensors = (grad, grad_output, input)
    return (
        is_plain(*tensors)
        and all(t.dim() == 2 and t.dtype in _DTYPES and not t.is_neg() for t in tensors)
        and all(t.layout == torch.strided and t.device == grad.device for t in tensors)
        and grad_output.dtype == input.dtype
        and (grad.stride(1) == 1 or grad.shape[1] <= 1)
        and (grad.stride(0) >= grad.shape[1] or grad.shape[0] <= 1)  # rows that do not overlap
    )


def row_grad_(
    grad: Tensor,
    grad_output: Tensor,
    input: Tensor,
    rows: Tensor,
    bias_grad: Tensor | None = None,
    *,
    accumulate: bool = False,
    method: Method | None = None,
) -> None:
    """`grad[rows] = grad_output[:, rows]^T input`, and `bias_grad[rows]` the columns' sums.

    In place; other rows are neither read nor written. Does not wait for the device.

    Sums are fp32 and rounded once; only "gather" rounds the product to the operands' dtype before
    it is added or widened, as the dense gradient's matmul does.

    Args:
        grad: `[out, in]`, fp32, bf16 or fp16, of which `supports` is true.
        grad_output: `[tokens, out]`, fp32, bf16 or fp16.
        input: `[tokens, in]`, the same dtype.
        rows: int32 or int64 `[k]`, different rows, on the device; ascending ones are read fastest.
        bias_grad: contiguous `[out]`, fp32, bf16 or fp16.
        accumulate: add to the rows that are there, rather than overwrite them.
        method: "gather" or "fused"; None: what `choose_method` says.

    Raises:
        ValueError: shapes or dtypes that do not fit, an unknown method.
    """
    if not (
        supports(grad, grad_output, input)
        and grad_output.shape == (input.shape[0], grad.shape[0])
        and input.shape[1] == grad.shape[1]
    ):
        raise ValueError(
            "grad [out, in], grad_output [tokens, out] and input [tokens, in] must fit each other "
            "and longact's Triton kernels, got "
            + ", ".join(f"{t.dtype} {[*t.shape]}" for t in (grad, grad_output, input))
        )
    if rows.dim() != 1 or rows.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"rows must be int32 or int64 [k], got {rows.dtype} {[*rows.shape]}")
    if bias_grad is not None and not (
        bias_grad.shape == grad.shape[:1]
        and bias_grad.dtype in _DTYPES
        and bias_grad.is_contiguous()
    ):
        raise ValueError(
            f"bias_grad must be contiguous [{grad.shape[0]}] in fp32, bf16 or fp16, got "
            f"{bias_grad.dtype} {[*bias_grad.shape]}"
        )
    k, in_features, tokens = rows.shape[0], grad.shape[1], input.shape[0]
    if method is None:
        method = choose_method(k, in_features, tokens, input.dtype)
    if method not in ("gather", "fused"):
        raise ValueError(f'method={method!r}: use "gather" or "fused"')
    if k == 0 or (accumulate and tokens == 0):
        return
    if grad_output.stride(1) != 1:
        grad_output = grad_output.contiguous()
    launch = _gather if method == "gather" else _fused
    with on_device_of(grad):
        launch(grad, grad_output, input, rows.contiguous(), bias_grad, accumulate)


def row_grad(grad_output: Tensor, input: Tensor, rows: Tensor) -> Tensor:
    """`grad_output[:, rows]^T input`, `[k, in]`, by "gather"; arguments as of `row_grad_`."""
    if grad_output.stride(1) != 1:
        grad_output = grad_output.contiguous()
    with on_device_of(grad_output):
        packed, _ = _pack(grad_output, rows.contiguous(), None)
        return torch.mm(packed.t(), input)[: rows.shape[0]]


def _pack(
    grad_output: Tensor, rows: Tensor, bias_grad: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The rows' columns side by side, `[tokens, k or more]`; and for `bias_grad` their sums over
    parts of the tokens, fp32 `[k, parts]`."""
    k, tokens = rows.shape[0], grad_output.shape[0]
    vectors = triton.cdiv(k, _PACK_MULTIPLE)
    tokens_per_part, parts = _divide(tokens, _MAX_PARTS, _PACK_TOKENS)
    packed = grad_output.new_empty(tokens, vectors * _PACK_MULTIPLE)
    bias_parts = _bias_parts(bias_grad, k, parts)
    if k > 0:
        _pack_kernel[(triton.cdiv(k, _PACK_ROWS), parts)](
            grad_output,
            grad_output.stride(0),
            rows,
            packed,
            bias_parts,
            tokens,
            k,
            vectors,
            tokens_per_part,
            HAS_BIAS=bias_grad is not None,
            ROWS=_PACK_ROWS,
            TOKENS=_PACK_TOKENS,
            MULTIPLE=_PACK_MULTIPLE,
        )
    return packed, bias_parts


def _gather(
    grad: Tensor,
    grad_output: Tensor,
    input: Tensor,
    rows: Tensor,
    bias_grad: Tensor | None,
    accumulate: bool,
) -> None:
    packed, bias_parts = _pack(grad_output, rows, bias_grad)
    product = torch.mm(packed.t(), input)
    _write_rows(product[None], grad, rows, bias_parts, bias_grad, accumulate)


def _fused(
    grad: Tensor,
    grad_output: Tensor,
    input: Tensor,
    rows: Tensor,
    bias_grad: Tensor | None,
    accumulate: bool,
) -> None:
    if input.stride(1) != 1:
        input = input.contiguous()
    k, (tokens, in_features) = rows.shape[0], input.shape
    tf32 = input.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32"
    aligned = _is_aligned(input) and _is_aligned(grad)
    blocks, splits = choose_blocks(k, in_features, tokens, input.dtype, tf32, aligned)
    tokens_per_split, splits = _divide(tokens, splits, blocks.tokens)
    split = splits > 1
    has_bias = bias_grad is not None
    product = grad
    bias_parts = bias_grad
    if split:
        product = grad.new_empty(splits, k, in_features, dtype=torch.float32)
        bias_parts = _bias_parts(bias_grad, k, splits)
    columns = triton.cdiv(in_features, blocks.columns) + has_bias
    _matmul_kernel[(triton.cdiv(k, blocks.rows), columns, splits)](
        grad_output,
        grad_output.stride(0),
        input,
        input.stride(0),
        rows,
        product,
        product.stride(-2),
        bias_parts,
        tokens,
        k,
        in_features,
        tokens_per_split,
        HAS_BIAS=has_bias,
        ACCUMULATE=accumulate and not split,
        SPLIT=split,
        PRECISION="tf32" if tf32 else "ieee",
        ROWS=blocks.rows,
        COLUMNS=blocks.columns,
        TOKENS=blocks.tokens,
        num_warps=blocks.num_warps,
        # AMD's local memory, 64 KiB, has no room for more.
        num_stages=blocks.num_stages if torch.version.hip is None else 2,
    )
    if split:
        _write_rows(product, grad, rows, bias_parts, bias_grad, accumulate)


def _write_rows(
    product: Tensor,
    grad: Tensor,
    rows: Tensor,
    bias_parts: Tensor | None,
    bias_grad: Tensor | None,
    accumulate: bool,
) -> None:
    """The sum of product `[splits, k or more, in]`, and of bias_parts `[k, parts]`."""
    in_features = grad.shape[1]
    columns = max(triton.cdiv(in_features, _WRITE_COLUMNS), 1)
    _write_rows_kernel[(rows.shape[0], columns)](
        product,
        rows,
        grad,
        grad.stride(0),
        bias_parts,
        bias_grad,
        product.shape[0],
        product.stride(0),
        0 if bias_parts is None else bias_parts.shape[1],
        in_features,
        HAS_BIAS=bias_grad is not None,
        ACCUMULATE=accumulate,
        COLUMNS=_WRITE_COLUMNS,
        MAX_PARTS=_MAX_PARTS,
    )


def _is_aligned(matrix: Tensor) -> bool:
    """As Triton sees it: multiples of 16, whatever the dtype."""
    return all(n % 16 == 0 for n in (matrix.data_ptr(), matrix.stride(0), matrix.shape[1]))


def _divide(tokens: int, parts: int, multiple: int) -> tuple[int, int]:
    """Tokens of a part, a multiple of a block's, and how many parts that makes: one at least."""
    size = max(triton.cdiv(triton.cdiv(tokens, parts), multiple), 1) * multiple
    return size, max(triton.cdiv(tokens, size), 1)


def _bias_parts(bias_grad: Tensor | None, k: int, parts: int) -> Tensor | None:
    return None if bias_grad is None else bias_grad.new_empty(k, parts, dtype=torch.float32)
