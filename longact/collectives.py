"""What the ranks of a run tell each other, so that all of them select the same rows."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["check_same", "is_alone", "over_ranks"]


def is_alone() -> bool:
    return not dist.is_initialized() or dist.get_world_size() == 1


def over_ranks(tensors: list[Tensor], op: Any) -> list[Tensor]:
    """Each tensor's sum or maximum over the ranks (of the default process group), all in one
    collective."""
    if not tensors or is_alone():
        return tensors
    device = tensors[0].device
    # fp64 holds fp32 totals, token counts and flags exactly.
    flat = torch.cat([t.to(device, torch.float64).flatten() for t in tensors])
    # A maximum over ranks may lose a NaN on the way, but not an inf.
    flat = torch.where(flat.isnan(), torch.inf, flat)
    dist.all_reduce(flat, op)
    pieces = torch.split(flat, [t.numel() for t in tensors])
    return [p.view(t.shape).to(t.device, t.dtype) for p, t in zip(pieces, tensors, strict=True)]


def check_same(sizes: Mapping[str, int], configs: Iterable[Mapping[str, Any]]) -> None:
    """Raises RuntimeError, on every rank, unless all are about to select from the same by the same
    rule: totals of others would be added up to nonsense, or wait for each other forever.

    Args:
        sizes: channels of the projections, in order, by name.
        configs: the options of each, plain values.
    """
    different = list({repr(config): config for config in configs}.values())
    names = zlib.crc32(repr(list(sizes.items())).encode())
    mine = {"configs": different, "projections": (len(sizes), names)}
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, mine)
    for rank, other in enumerate(of_ranks):
        if other != of_ranks[0]:
            raise RuntimeError(
                f"longact was applied otherwise on rank {rank} than on rank 0: "
                f"{_difference(of_ranks[0], other, rank)}. Call longact.apply with the same "
                "arguments, on the same model, on every rank"
            )


def _difference(first: Mapping[str, Any], other: Mapping[str, Any], rank: int) -> str:
    for one, two in zip(first["configs"], other["configs"], strict=False):
        for key in one:
            if one[key] != two.get(key):
                return f"{key} is {one[key]!r} on rank 0 and {two.get(key)!r} on rank {rank}"
    (count, _), (others, _) = first["projections"], other["projections"]
    return f"{count} projections on rank 0 and {others} on rank {rank}, or of other names or sizes"
