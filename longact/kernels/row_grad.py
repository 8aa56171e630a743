"""`row_grad`: the weight gradient of a linear layer for selected output channels only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def reference(grad_output: Tensor, input: Tensor, rows: Tensor) -> Tensor:
    # Gather k columns, then one matmul of keep_ratio of the dense gradient's size.
    return grad_output.index_select(1, rows).t() @ input


@torch.library.custom_op("longact::row_grad", mutates_args=())
def _op(grad_output: Tensor, input: Tensor, rows: Tensor) -> Tensor:
    _check(grad_output, input, rows)
    return reference(grad_output, input, rows)


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
        `[k, in]` in input's dtype. Differentiable again, as it is made of torch's own ops.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    _check(grad_output, input, rows)
    return reference(grad_output, input, rows)
