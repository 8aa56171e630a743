"""What a list of rows must be, wherever one comes from."""

from __future__ import annotations

import torch
from torch import Tensor

_INDEX_DTYPES = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)


def check_rows(rows: Tensor, param: Tensor) -> None:
    """Raises ValueError unless `rows` are ascending distinct rows of `param`, on its device."""
    if param.dim() == 0:
        raise ValueError("param has no rows: it is 0-dimensional")
    if rows.dtype == torch.bool:
        raise ValueError("rows is a bool mask: pass the indices, mask.nonzero().squeeze(1)")
    if rows.dtype not in _INDEX_DTYPES:
        raise ValueError(f"rows has dtype {rows.dtype}: pass integer row indices (int32)")
    if rows.dim() != 1:
        raise ValueError(
            f"rows has shape {[*rows.shape]}: pass a 1-dimensional list of row indices"
        )
    if rows.device != param.device:
        raise ValueError(
            f"rows is on {rows.device} and param on {param.device}: pass "
            f"rows.to({str(param.device)!r})"
        )
    if rows.numel() == 0:
        return
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or high >= param.shape[0]:
        raise ValueError(
            f"rows has index {low if low < 0 else high}: param has rows 0 to {param.shape[0] - 1}"
        )
    steps = rows[1:].long() - rows[:-1].long()
    if bool((steps <= 0).any()):
        at = int((steps <= 0).nonzero()[0])
        what = "twice" if int(steps[at]) == 0 else f"before {int(rows[at + 1])}"
        raise ValueError(
            f"rows has {int(rows[at])} {what}: pass ascending distinct indices, torch.unique(rows)"
        )
