"""`topk_rows`: the k largest channels, ties to the lower index, in ascending order; `select_rows`:
the same for the projections of a model, from what was counted, where it can be used."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longact.backends import runs_triton
from longact.kernels.channel_magnitude import METRICS

#: What `select_rows` came to: rows chosen; no token counted; a non-finite magnitude.
CHOSEN, NOT_COUNTED, NOT_FINITE = 0, 1, 2

#: Channels that the Triton kernel ranks together, at most: one program holds them all.
MAX_CHANNELS = 16_384


def reference(magnitude: Tensor, k: int) -> Tensor:
    # A stable descending sort keeps the lower index first among equals; torch.topk promises no
    # order.
    order = torch.sort(magnitude, dim=-1, descending=True, stable=True).indices
    return order[..., :k].sort(dim=-1).values.to(torch.int32)


def magnitude_of(total: Tensor, tokens: Tensor, metric: str) -> Tensor:
    """A channel's magnitude from its total over the tokens; NaN where there are none."""
    if metric == "max_abs":
        return total
    mean = total / tokens
    # torch.sqrt is not rounded to nearest on every device; through fp64 it is, and ties are ties.
    return mean.double().sqrt().float() if metric == "rms" else mean


def status_of(magnitude: Tensor, tokens: Tensor) -> Tensor:
    """int32 `[...]` of `[..., channels]`: whether rows can be chosen by them, and why not."""
    spoiled = torch.where(torch.isfinite(magnitude).all(-1), CHOSEN, NOT_FINITE)
    return torch.where(tokens == 0, NOT_COUNTED, spoiled).to(torch.int32)


def select_reference(
    totals: Tensor, tokens: Tensor, k: int, head_dim: int, metric: str
) -> tuple[Tensor, Tensor]:
    """Rows and states of projections of one size, from totals `[projections, channels]`."""
    magnitude = magnitude_of(totals, tokens[:, None], metric)
    rows = reference(magnitude.view(len(totals), -1, head_dim), k)
    first = torch.arange(0, totals.shape[1], head_dim, dtype=torch.int32, device=rows.device)
    return (rows + first[:, None]).flatten(1), status_of(magnitude, tokens)


def _dispatch(magnitude: Tensor, k: int) -> Tensor:
    if _is_for_triton(magnitude, ranked=magnitude.shape[-1]):
        from longact.kernels import topk_rows_triton

        return topk_rows_triton.topk_rows(magnitude, k)
    return reference(magnitude, k)


def _is_for_triton(*magnitudes: Tensor, ranked: int) -> bool:
    return (
        runs_triton(*magnitudes)
        and all(magnitude.dtype == torch.float32 for magnitude in magnitudes)
        and ranked <= MAX_CHANNELS
    )


@torch.library.custom_op("longact::topk_rows", mutates_args=())
def _op(magnitude: Tensor, k: int) -> Tensor:
    _check(magnitude, k)
    return _dispatch(magnitude, k)


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
    return _dispatch(magnitude, k)


@torch.library.custom_op("longact::select_rows", mutates_args=())
def _select_op(
    total: Tensor, tokens: Tensor, previous: Tensor | None, k: int, head_dim: int, metric: str
) -> tuple[Tensor, Tensor]:
    rows, status = _select([total], [tokens], [previous], [k], [head_dim], metric)
    return rows[0], status[0].clone()


@_select_op.register_fake
def _select_fake(
    total: Tensor, tokens: Tensor, previous: Tensor | None, k: int, head_dim: int, metric: str
) -> tuple[Tensor, Tensor]:
    rows = total.shape[0] // head_dim * k
    return total.new_empty(rows, dtype=torch.int32), total.new_empty((), dtype=torch.int32)


def _select(
    totals: Sequence[Tensor],
    tokens: Sequence[Tensor],
    previous: Sequence[Tensor | None],
    counts: Sequence[int],
    head_dims: Sequence[int],
    metric: str,
) -> tuple[list[Tensor], Tensor]:
    if metric not in METRICS:
        raise ValueError(f"metric={metric!r}: use one of {', '.join(METRICS)}")
    for total, k, head_dim in zip(totals, counts, head_dims, strict=True):
        if head_dim < 1 or total.shape[0] % head_dim != 0:
            raise ValueError(f"head_dim={head_dim}: {total.shape[0]} channels are not such heads")
        if not 0 <= k <= head_dim:
            raise ValueError(f"k={k}: must lie between 0 and the {head_dim} channels of a head")
    if _is_for_triton(*totals, ranked=max(head_dims)):
        from longact.kernels import topk_rows_triton

        return topk_rows_triton.select_rows(totals, tokens, previous, counts, head_dims, metric)
    sizes: dict[tuple[int, int, int], list[int]] = {}  # what can be ranked in one call
    for i, (total, k, head_dim) in enumerate(zip(totals, counts, head_dims, strict=True)):
        sizes.setdefault((total.shape[0], k, head_dim), []).append(i)
    rows, states = list(totals), list(totals)
    for (_, k, head_dim), members in sizes.items():
        ranked = torch.stack([totals[i] for i in members])
        over = torch.stack([tokens[i] for i in members])
        chosen = select_reference(ranked, over, k, head_dim, metric)
        for i, new, state in zip(members, *chosen, strict=True):
            old = previous[i]
            keeps = old is not None and old.shape == new.shape
            rows[i] = torch.where(state == CHOSEN, new, old) if keeps else new  # type: ignore[arg-type]
            states[i] = state
    return rows, torch.stack(states)


def select_rows(
    totals: Sequence[Tensor],
    tokens: Sequence[Tensor],
    previous: Sequence[Tensor | None],
    counts: Sequence[int],
    head_dims: Sequence[int],
    metric: str,
) -> tuple[list[Tensor], Tensor]:
    """The rows of largest magnitude of each of some projections; nothing is read by the host.

    Args:
        totals: fp32 `[channels]` each, on one device: what `channel_magnitude` added up.
        tokens: int64 scalars, over how many tokens.
        previous: int32 `[rows]` each, which stay where nothing can be chosen; or None.
        counts: how many channels of each head are chosen.
        head_dims: how many channels are ranked together: those of a head, or of the projection.
        metric: `"mean_abs"`, `"rms"` or `"max_abs"`.

    Returns:
        int32 rows of each, ascending; and their states, int32 `[projections]`: CHOSEN, NOT_COUNTED
        or NOT_FINITE. Where it is not CHOSEN they are the previous rows, if there are as many; else
        the largest all the same, NaN before the others.

    Raises:
        ValueError: an unknown metric, or heads and counts that do not fit the channels.
    """
    if not torch.compiler.is_compiling():
        return _select(totals, tokens, previous, counts, head_dims, metric)
    each = zip(totals, tokens, previous, counts, head_dims, strict=True)
    chosen = [_select_op(*one, metric) for one in each]
    return [rows for rows, _ in chosen], torch.stack([status for _, status in chosen])


def topk_rows_over(magnitudes: Sequence[Tensor], k: int) -> list[Tensor]:
    """The k largest channels of all projections together; waits for the device once.

    Args:
        magnitudes: fp32 `[channels]` each, on one device, without NaN.
        k: how many in all.

    Returns:
        int32 rows of each, ascending; ties go to the earlier projection, then the lower index.
    """
    if _is_for_triton(*magnitudes, ranked=0):  # any number of channels
        from longact.kernels import topk_rows_triton

        padded, counts = topk_rows_triton.topk_rows_over(magnitudes, k)
        return [rows[:n] for rows, n in zip(padded, counts.tolist(), strict=True)]
    channels = [magnitude.shape[0] for magnitude in magnitudes]
    chosen = torch.zeros(sum(channels), dtype=torch.bool, device=magnitudes[0].device)
    chosen[reference(torch.cat(list(magnitudes)), k).long()] = True
    return [part.nonzero().squeeze(1).to(torch.int32) for part in torch.split(chosen, channels)]
