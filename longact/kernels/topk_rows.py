"""`topk_rows`: the k largest channels, ties to the lower index, in ascending order."""

from __future__ import annotations

import torch
from torch import Tensor


def reference(magnitude: Tensor, k: int) -> Tensor:
    # A stable descending sort keeps the lower index first among equals; torch.topk promises no
    # order.
    order = torch.sort(magnitude, dim=-1, descending=True, stable=True).indices
    return order[..., :k].sort(dim=-1).values.to(torch.int32)


@torch.library.custom_op("longact::topk_rows", mutates_args=())
def _op(magnitude: Tensor, k: int) -> Tensor:
    _check(magnitude, k)
    return reference(magnitude, k)


@_op.register_fake
def _fake(magnitude: Tensor, k: int) -> Tensor:
    _check(magnitude, k)
    return magnitude.new_empty((*magnitude.shape[:-1], k), dtype=torch.int32)


def _check(magnitude: Tensor, k: int) -> None:
    if magnitude.dim() == 0:
        raise ValueError("magnitude must have at least one dimension")
    if not 0 <= k <= magnitude.shape[-1]:
        raise ValueError(f"k={k}: must lie between 0 and the {magnitude.shape[-1]} channels")


def topk_rows(magnitude: Tensor, k: int) -> Tensor:
    """Indices of the k largest values along the last dimension.

    Args:
        magnitude: `[..., channels]`, floating, without NaN.
        k: how many, 0 to channels.

    Returns:
        int32 `[..., k]`, ascending; among equal values the lower indices are taken.

    Raises:
        ValueError: k out of range.
    """
    if torch.compiler.is_compiling():
        return _op(magnitude, k)  # type: ignore[no-any-return]
    _check(magnitude, k)
    return reference(magnitude, k)
