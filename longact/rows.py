"""What a list of rows must be, wherever one comes from, and which of them lie on this rank."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_INDEX_DTYPES = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)


def check_rows(rows: Tensor, param: Tensor, num_rows: int | None = None) -> None:
    """Raises ValueError unless `rows` are ascending distinct rows of `param`, on its device.

    `num_rows`: of what `param` holds some rows of.
    """
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
    num_rows = param.shape[0] if num_rows is None else num_rows
    if low < 0 or high >= num_rows:
        raise ValueError(
            f"rows has index {low if low < 0 else high}: param has rows 0 to {num_rows - 1}"
        )
    steps = rows[1:].long() - rows[:-1].long()
    if bool((steps <= 0).any()):
        at = int((steps <= 0).nonzero()[0])
        what = "twice" if int(steps[at]) == 0 else f"before {int(rows[at + 1])}"
        raise ValueError(
            f"rows has {int(rows[at])} {what}: pass ascending distinct indices, torch.unique(rows)"
        )


class Shard(NamedTuple):
    """The rows of a sharded parameter that lie on this rank."""

    first: int
    num_rows: int


def is_sharded(tensor: Tensor | type[Tensor]) -> bool:
    """Whether it is a DTensor, of whatever placements; these are not imported to be asked."""
    return hasattr(tensor, "device_mesh")


def local_of(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, the same object each time (to_local() of a parameter makes a
    new one); of others the tensor itself."""
    local: Tensor = getattr(tensor, "_local_tensor", tensor)
    return local


def shard_of(param: Any) -> Shard:
    """The rows of a DTensor on this rank, where it is sharded by rows alone.

    That is what FSDP2 makes, `Shard(0)` over one dimension of the mesh, `Replicate()` over others;
    what `ColwiseParallel` makes; and the first of the second, where each rank of tensor parallelism
    has consecutive rows and FSDP2 shards these once more.
    """
    from torch.distributed import tensor

    num_rows, mesh = param.shape[0], param.device_mesh
    sharded = [(i, p) for i, p in enumerate(param.placements) if not p.is_replicate()]
    if not sharded:
        return Shard(0, num_rows)
    plain = [i for i, p in sharded if type(p) is tensor.Shard and p.dim == 0]
    # FSDP2's over tensor parallelism: a shard of the other shards, wherever its dimension stands.
    strided = [i for i, p in sharded if type(p).__name__ == "_StridedShard" and p.dim == 0]
    if len(plain) <= 1 and len(strided) <= 1 and len(plain) + len(strided) == len(sharded):
        shard = Shard(0, num_rows)
        for dim in (*plain, *strided):
            shard = _chunk(shard, mesh.get_local_rank(dim), mesh.size(dim))
        if shard.num_rows == local_of(param).shape[0]:
            return shard
    raise NotImplementedError(
        f"is sharded as {[*param.placements]} over a mesh of {[*mesh.shape]}: selected rows are "
        "trained where parameters are sharded by rows alone, as torch.distributed.fsdp.fully_shard "
        "does by default (no shard_placement_fn) and ColwiseParallel (not RowwiseParallel)"
    )


def _chunk(shard: Shard, index: int, chunks: int) -> Shard:
    """One of the chunks of a shard, as torch.chunk has it: the last may be empty."""
    size = -(-shard.num_rows // chunks)
    start = min(index * size, shard.num_rows)
    return Shard(shard.first + start, min(size, shard.num_rows - start))


def shard_index(param: Any) -> int:
    """Which of the different parts of a DTensor this rank has; replicas have the same."""
    index, mesh = 0, param.device_mesh
    for dim, placement in enumerate(param.placements):
        if not placement.is_replicate():
            index = index * mesh.size(dim) + mesh.get_local_rank(dim)
    return index


def local_rows(rows: Tensor, shard: Shard) -> Tensor:
    """Those of ascending `rows` that lie in the shard, counted from its start. Reads them."""
    ends = torch.tensor([shard.first, shard.first + shard.num_rows], device=rows.device)
    begin, end = torch.searchsorted(rows, ends).tolist()
    return rows[begin:end] - shard.first


def local_row_buffer(rows: Tensor, shard: Shard) -> Tensor:
    """The same behind their number, int32 `[shard.num_rows + 1]`, with whatever after them: nothing
    waits for a GPU to know how many they are."""
    begin = (rows < shard.first).sum()
    count = (rows < shard.first + shard.num_rows).sum() - begin
    at = begin + torch.arange(shard.num_rows, device=rows.device)
    here = F.pad(rows, (0, shard.num_rows)).index_select(0, at) - shard.first
    return torch.cat((count.view(1).to(torch.int32), here))
