"""`row_grad`: the weight gradient of a linear layer for selected output channels only;
`linear_grads`: the same as rows of a gradient of full size, with the bias' rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from longact.backends import DTYPE_CODES, is_plain, native, runs_triton


def reference(grad_output: Tensor, input: Tensor, rows: Tensor) -> Tensor:
    # Gather k columns, then one matmul of keep_ratio of the dense gradient's size.
    return grad_output.index_select(1, rows).t() @ input


def _columns(grad_output: Tensor, rows: Tensor) -> Tensor:
    """`grad_output[:, rows]^T`, `[k, tokens]`."""
    if not _is_for_native(grad_output, rows):
        return grad_output.index_select(1, rows).t()
    assert native is not None
    if grad_output.is_neg():
        grad_output = grad_output.resolve_neg()
    if grad_output.stride(1) != 1:
        grad_output = grad_output.contiguous()
    rows = rows.contiguous()
    columns = grad_output.new_empty(rows.shape[0], grad_output.shape[0])
    native.gather_columns(
        grad_output.element_size(),
        grad_output.data_ptr(),
        grad_output.stride(0),
        *grad_output.shape,
        rows.data_ptr(),
        rows.shape[0],
        columns.data_ptr(),
        torch.get_num_threads(),
    )
    return columns


def _is_for_native(grad_output: Tensor, rows: Tensor) -> bool:
    # Few operations: a matmul before it has left none of their code in the cache.
    return (
        native is not None
        and grad_output.is_cpu
        and grad_output.dtype in DTYPE_CODES
        and rows.is_cpu
        and rows.dtype is torch.int32
        and not is_compiling()
        and is_plain(grad_output, rows)
        and not (grad_output.requires_grad and torch.is_grad_enabled())
        and forward_ad._current_level < 0  # else there may be a tangent
    )


def is_for_triton(grad_output: Tensor, input: Tensor, into: Tensor | None = None) -> bool:
    """Whether the Triton kernels can compute it, and add it to the rows of `into`."""
    grad = input if into is None else into
    if not runs_triton(grad_output, input, grad):
        return False
    from longact.kernels import row_grad_triton

    return row_grad_triton.supports(grad, grad_output, input)


@torch.library.custom_op("longact::row_grad", mutates_args=())
def _op(grad_output: Tensor, input: Tensor, rows: Tensor) -> Tensor:
    _check(grad_output, input, rows)
    if not is_for_triton(grad_output, input):
        return reference(grad_output, input, rows)
    from longact.kernels import row_grad_triton

    return row_grad_triton.row_grad(grad_output, input, rows)


@_op.register_fake
def _fake(grad_output: Tensor, input: Tensor, rows: Tensor) -> Tensor:
    _check(grad_output, input, rows)
    return input.new_empty(rows.shape[0], input.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    grad_output, input, rows = ctx.saved_tensors
    of_output = torch.zeros_like(grad_output).index_copy(1, rows.long(), input @ grad.t())
    return of_output, grad_output.index_select(1, rows) @ grad, None


_op.register_autograd(_backward, setup_context=_setup_context)


def _check(grad_output: Tensor, input: Tensor, rows: Tensor) -> None:
    if grad_output.dim() != 2 or input.dim() != 2 or grad_output.shape[0] != input.shape[0]:
        raise ValueError(
            "grad_output must be [tokens, out] and input [tokens, in] with the same tokens, got "
            f"{[*grad_output.shape]} and {[*input.shape]}"
        )
    if rows.dim() != 1 or rows.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"rows must be int32 or int64 [k], got {rows.dtype} {[*rows.shape]}")


def row_grad(grad_output: Tensor, input: Tensor, rows: Tensor) -> Tensor:
    """`dW[rows] = grad_output[:, rows]^T input`, the row gradient of `y = x W^T`.

    Args:
        grad_output: `[tokens, out]`.
        input: `[tokens, in]`, the same dtype.
        rows: int32 `[k]` output channels.

    Returns:
        `[k, in]` in input's dtype. Differentiable again.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    if runs_triton(grad_output, input):
        return _op(grad_output, input, rows)  # type: ignore[no-any-return]
    _check(grad_output, input, rows)
    return _columns(grad_output, rows) @ input


def _linear_grads(
    grad_output: Tensor, input: Tensor, rows: Tensor, bias: bool
) -> tuple[Tensor, Tensor]:
    out_features = grad_output.shape[1]
    compact = _columns(grad_output, rows) @ input
    rows = rows.long()  # index_copy wants int64
    weight_grad = compact.new_zeros(out_features, input.shape[1]).index_copy_(0, rows, compact)
    return weight_grad, row_sums(grad_output, rows) if bias else compact.new_empty(0)


def row_sums(grad_output: Tensor, rows: Tensor) -> Tensor:
    """`[out]`: the bias' gradient, 0 but in the selected rows."""
    rows = rows.long()
    selected = grad_output.index_select(1, rows).sum(0)
    return selected.new_zeros(grad_output.shape[1]).index_copy_(0, rows, selected)


@torch.library.custom_op("longact::linear_grads", mutates_args=())
def _linear_op(
    grad_output: Tensor, input: Tensor, rows: Tensor, bias: bool
) -> tuple[Tensor, Tensor]:
    return linear_grads(grad_output, input, rows, bias)


@_linear_op.register_fake
def _linear_fake(
    grad_output: Tensor, input: Tensor, rows: Tensor, bias: bool
) -> tuple[Tensor, Tensor]:
    out_features = grad_output.shape[1]
    return (
        input.new_empty(out_features, input.shape[1]),
        grad_output.new_empty(out_features if bias else 0),
    )


def linear_grads(
    grad_output: Tensor, input: Tensor, rows: Tensor, bias: bool, into: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias of `y = x W^T + b`, which are 0 but in the selected rows.

    Args:
        grad_output: `[tokens, out]`.
        input: `[tokens, in]`, the same dtype.
        rows: int32 `[k]` output channels, ascending.
        bias: whether the bias' gradient is wanted.
        into: `[out, in]`: the weight's gradient so far, to whose rows this one is added in place.
            Only where `is_for_triton`.

    Returns:
        `[out, in]` (`into`, if given) and `[out]` (empty without a bias). Differentiable again
        where grad mode is on.
    """
    if is_compiling():  # on the CPU it sees torch's own ops, to fuse them
        compiled = _linear_op if runs_triton(grad_output, input) else _linear_grads
        return compiled(grad_output, input, rows, bias)
    if into is None and (torch.is_grad_enabled() or not is_for_triton(grad_output, input)):
        return _linear_grads(grad_output, input, rows, bias)
    from longact.kernels import row_grad_triton

    out_features = grad_output.shape[1]
    accumulate = into is not None
    weight_grad = input.new_zeros(out_features, input.shape[1]) if into is None else into
    bias_grad = grad_output.new_zeros(out_features if bias else 0)
    row_grad_triton.row_grad_(
        weight_grad,
        grad_output,
        input,
        rows,
        bias_grad if bias else None,
        accumulate=accumulate,
    )
    return weight_grad, bias_grad
