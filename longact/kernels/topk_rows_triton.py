# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
"""The largest channels in Triton: the rows of kernels/topk_rows.py, of a whole model in one launch.

Values are compared as unsigned keys in the order that torch.sort has, so that every bit counts
(denormals, infinities, NaN) and equal values have equal keys:

    topk_rows        of one tensor
    select_rows      of many projections, from their totals: one launch
    topk_rows_over   of many projections together (scope="model"): a radix search of their k-th
                     largest key, 8 bits in each of 4 launches, then a launch that writes the rows

A program of the first two holds its channels in registers, finds their k-th largest key bit by bit
and gives each selected channel its place by one prefix sum. The host reads nothing, and uploads a
table of sizes once for each combination of them.

Imports Triton: import this module only where it is used.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from longact.backends import is_capturing
from longact.kernels.channel_magnitude import METRICS
from longact.kernels.topk_rows import CHOSEN, MAX_CHANNELS, NOT_COUNTED, NOT_FINITE
from longact.kernels.triton_common import on_device_of

_TILE = 4096  # channels of a program: as many heads as fit, or one wider one
_PART = 1024  # of these, how many at a time when rows are written: more would spill registers
_MIN_WIDTH = 64  # of a head in the tile: fewer tiles to compile
_PER_THREAD = 16  # channels of a thread
_WARP = 32 if torch.version.hip is None else 64
_BLOCK = 2048  # channels at a time of the programs that rank a model
_ALIGN = 4  # rows of each projection begin on a multiple of 16 bytes

_RMS, _MAX_ABS = (tl.constexpr(METRICS[metric]) for metric in ("rms", "max_abs"))
_PROJECTIONS = tl.constexpr(32)  # whose counts are added up at a time
_CHOSEN, _NOT_COUNTED, _NOT_FINITE = (tl.constexpr(i) for i in (CHOSEN, NOT_COUNTED, NOT_FINITE))

# ---- the table: one row of int32 words for each program of _select_kernel ------------------------

_WORDS = tl.constexpr(8)
(
    _PROJECTION,
    _CHANNELS,  # of the projection
    _HEAD_DIM,
    _K,  # of each head
    _TOTALS,  # where the projection begins among the totals,
    _ROWS,  # the rows,
    _PREVIOUS,  # and the previous rows; negative: there are none
    _BEGIN,  # first channel of the program
) = (tl.constexpr(i) for i in range(8))  # fmt: skip


# ---- kernels -------------------------------------------------------------------------------------


@triton.jit
def _is_finite(value):
    return (value.to(tl.uint32, bitcast=True) & 0x7FFFFFFF) < 0x7F800000


@triton.jit
def _keys(value, inside):
    """uint32 in the order of torch.sort: NaN is the largest, -0.0 equals 0.0; outside 0, as no
    value has.
    """
    bits = value.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    keys = tl.where((bits >> 31) == 0, bits | 0x80000000, bits ^ 0xFFFFFFFF)
    keys = tl.where(size == 0, 0x80000000, keys)
    keys = tl.where(size > 0x7F800000, 0xFFFFFFFF, keys)
    return tl.where(inside, keys, 0)


@triton.jit
def _threshold(keys, k):
    """Of each row: its k-th largest key, and how many of those that equal it are among the k."""
    found = tl.zeros([keys.shape[0], 1], tl.uint32)
    bit = found | 0x80000000
    for _ in range(32):  # the largest number that at least k keys reach
        reached = tl.sum((keys >= (found | bit)).to(tl.int32), 1, keep_dims=True)
        found = tl.where(reached >= k, found | bit, found)
        bit = bit >> 1
    return found, k - tl.sum((keys > found).to(tl.int32), 1, keep_dims=True)


@triton.jit
def _take(keys, threshold, need):
    """Of each row the keys beyond its threshold and the first `need` that equal it: which they are,
    each one's place among them, and how many there are; how many equal ones are needed after them.
    """
    greater = keys > threshold
    equal = (keys == threshold) & (keys != 0)
    # Both counts in one prefix sum: neither passes 16,384.
    counts = tl.cumsum((greater.to(tl.int32) << 16) | equal.to(tl.int32), 1)
    equals = counts & 0xFFFF
    taken = greater | (equal & (equals <= need))
    place = (counts >> 16) + tl.minimum(equals, need) - 1
    still = tl.maximum(need - tl.sum(equal.to(tl.int32), 1, keep_dims=True), 0)
    return taken, place, tl.sum(taken.to(tl.int32), 1, keep_dims=True), still


@triton.jit
def _magnitude(totals, inside, tokens, METRIC: tl.constexpr):
    """What the totals amount to over the tokens, rounded as torch rounds it, so that ties agree
    (but Triton 3.4 flushes subnormal numbers).
    """
    value = tl.load(totals, mask=inside, other=0.0)
    if METRIC == _MAX_ABS:
        return value
    elif METRIC == _RMS:
        return tl.sqrt_rn(tl.div_rn(value, tokens.to(tl.float32)))
    else:
        return tl.div_rn(value, tokens.to(tl.float32))


@triton.jit
def _select(
    totals,
    exists,
    head_dim,
    k,
    tokens,
    rows,
    first,
    METRIC: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
):
    """Writes the k largest channels of some heads, counted from `first`.

    totals, exists, rows: of each head `[HEADS, 1]`; pointers to its first ones.
    """
    lane = tl.arange(0, WIDTH)[None, :]
    inside = exists & (lane < head_dim)
    value = _magnitude(totals + lane, inside, tokens, METRIC)
    threshold, need = _threshold(_keys(value, inside), k)
    # Again, in parts: no registers are left where a head has many channels.
    for start in range(0, WIDTH, LANES):
        part = start + tl.arange(0, LANES)[None, :]
        inside_part = exists & (part < head_dim)
        again = _magnitude(totals + part, inside_part, tokens, METRIC)
        taken, place, count, need = _take(_keys(again, inside_part), threshold, need)
        tl.store(rows + place, first + part, mask=taken)
        rows += count


@triton.jit(do_not_specialize=["num_rows", "channels", "k", "row_stride"])
def _topk_kernel(
    magnitude,
    rows,
    num_rows,
    channels,
    k,
    row_stride,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * HEADS + tl.arange(0, HEADS)[:, None]
    _select(
        magnitude + row * row_stride,
        row < num_rows,
        channels,
        k,
        1,
        rows + row * k,
        0,
        _MAX_ABS,
        WIDTH,
        LANES,
    )


@triton.jit
def _select_kernel(
    totals,
    tokens,
    previous,
    table,
    rows,
    status,
    METRIC: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
):
    t = table + tl.program_id(0) * _WORDS
    projection = tl.load(t + _PROJECTION)
    channels, begin = tl.load(t + _CHANNELS), tl.load(t + _BEGIN)
    head_dim, k = tl.load(t + _HEAD_DIM), tl.load(t + _K)
    totals += tl.load(t + _TOTALS)
    counted = tl.load(tokens + projection)

    # One non-finite channel spoils the whole projection, of which this program may have a part.
    spoiled = 0
    for start in range(0, channels, HEADS * WIDTH):
        at = tl.arange(0, HEADS * WIDTH)
        value = _magnitude(totals + start + at, at < channels - start, counted, METRIC)
        spoiled = tl.maximum(spoiled, tl.max((_is_finite(value) == 0).to(tl.int32), 0))
    state = tl.where(spoiled != 0, _NOT_FINITE, _CHOSEN)
    state = tl.where(counted > 0, state, _NOT_COUNTED)
    if begin == 0:
        tl.store(status + projection, state)

    first_row = begin // head_dim * k
    rows += tl.load(t + _ROWS) + first_row
    kept = tl.load(t + _PREVIOUS)
    if (state == _CHOSEN) | (kept < 0):
        head = tl.arange(0, HEADS)[:, None]
        first = begin + head * head_dim
        _select(
            totals + first.to(tl.int64),
            first < channels,
            head_dim,
            k,
            counted,
            rows + head * k,
            first,
            METRIC,
            WIDTH,
            LANES,
        )
    else:
        num_rows = tl.minimum(HEADS * k, channels // head_dim * k - first_row)
        for start in range(0, num_rows, 1024):
            at = start + tl.arange(0, 1024)
            old = tl.load(previous + kept + first_row + at, mask=at < num_rows)
            tl.store(rows + at, old, mask=at < num_rows)


@triton.jit
def _digits_found(counts, num_projections, k, digits):
    """The first `digits` of 4 digits of the k-th largest key, and how many keys to take of those
    that begin with them; from counts `[digit, projection, 256]`.
    """
    bins = tl.arange(0, 256)
    found = tl.full([], 0, tl.uint32)
    need = k
    for digit in range(digits):
        total = tl.zeros([256], tl.int32)
        for first in range(0, num_projections, _PROJECTIONS):
            projection = first + tl.arange(0, _PROJECTIONS)[:, None]
            at = (digit * num_projections + projection) * 256 + bins[None, :]
            total += tl.sum(tl.load(counts + at, mask=projection < num_projections, other=0), 0)
        not_below = tl.cumsum(total, 0, reverse=True)
        last = tl.sum((not_below >= need).to(tl.int32), 0) - 1
        need -= tl.sum(tl.where(bins > last, total, 0), 0)
        found = (found << 8) | last.to(tl.uint32)
    return found, need


@triton.jit(do_not_specialize=["num_projections", "k", "digits"])
def _count_kernel(magnitudes, firsts, counts, num_projections, k, digits, BLOCK: tl.constexpr):
    """How many keys of a projection have each next digit, of those that begin as the k-th does."""
    projection = tl.program_id(0)
    found, _ = _digits_found(counts, num_projections, k, digits)
    end = tl.load(firsts + projection + 1)
    shift = (24 - 8 * digits).to(tl.uint32)
    count = tl.zeros([256], tl.int32)
    for start in range(tl.load(firsts + projection), end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        keys = _keys(tl.load(magnitudes + at, mask=at < end, other=0.0), at < end) >> shift
        # What is beyond the end counts as 0, below every key: no digit depends on it.
        count += tl.histogram((keys & 0xFF).to(tl.int32), 256, mask=(keys >> 8) == found)
    at = (digits * num_projections + projection) * 256 + tl.arange(0, 256)
    tl.store(counts + at, count)


@triton.jit(do_not_specialize=["num_projections", "k", "width"])
def _write_kernel(
    magnitudes, firsts, counts, rows, taken_counts, num_projections, k, width, BLOCK: tl.constexpr
):
    projection = tl.program_id(0)
    threshold, need = _digits_found(counts, num_projections, k, 4)
    # Ties go to the earlier projections. The last digit's counts are those of whole keys.
    last = counts + 3 * num_projections * 256 + (threshold & 0xFF)
    for first in range(0, projection, _PROJECTIONS):
        earlier = first + tl.arange(0, _PROJECTIONS)
        need -= tl.sum(tl.load(last + earlier * 256, mask=earlier < projection, other=0), 0)
    need = tl.full([1, 1], 0, tl.int32) + tl.maximum(need, 0)
    begin, end = tl.load(firsts + projection), tl.load(firsts + projection + 1)
    rows += projection.to(tl.int64) * width
    written = tl.zeros([1, 1], tl.int32)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)[None, :]
        keys = _keys(tl.load(magnitudes + at, mask=at < end, other=0.0), at < end)
        taken, place, count, need = _take(keys, threshold, need)
        tl.store(rows + written + place, at - begin, mask=taken)
        written += count
    tl.store(taken_counts + projection, tl.sum(written))


# ---- launches ------------------------------------------------------------------------------------


def _tile(head_dim: int) -> dict[str, int]:
    """How a program holds heads of this many channels."""
    width = max(_MIN_WIDTH, triton.next_power_of_2(head_dim))
    heads = max(1, _TILE // width)
    num_warps = max(1, heads * width // (_PER_THREAD * _WARP))
    return {
        "HEADS": heads,
        "WIDTH": width,
        "LANES": min(width, max(1, _PART // heads)),
        "num_warps": num_warps,
    }


def topk_rows(magnitude: Tensor, k: int) -> Tensor:
    """Indices of the k largest values along the last dimension; NaN counts as the largest.

    Args:
        magnitude: fp32 `[..., channels]`, any strides, at most `MAX_CHANNELS` channels.
        k: how many, 0 to channels.

    Returns:
        int32 `[..., k]`, ascending; among equal values the lower indices are taken.

    Raises:
        ValueError: another dtype, too many channels, or k out of range.
    """
    if magnitude.dtype != torch.float32 or magnitude.dim() == 0:
        raise ValueError(
            f"magnitude must be fp32 [..., channels], got {magnitude.dtype} {[*magnitude.shape]}"
        )
    channels = magnitude.shape[-1]
    _check_k(k, channels)
    rows = torch.empty((*magnitude.shape[:-1], k), dtype=torch.int32, device=magnitude.device)
    if rows.numel() == 0:
        return rows
    ranked = magnitude.resolve_neg().reshape(-1, channels)
    if ranked.stride(1) != 1:
        ranked = ranked.contiguous()
    tile = _tile(channels)
    with on_device_of(magnitude):
        _topk_kernel[(triton.cdiv(ranked.shape[0], tile["HEADS"]),)](
            ranked, rows, ranked.shape[0], channels, k, ranked.stride(0), **tile
        )
    return rows


def _check_k(k: int, channels: int) -> None:
    if channels > MAX_CHANNELS:
        raise ValueError(f"{channels} channels ranked together: at most {MAX_CHANNELS} are")
    if not 0 <= k <= channels:
        raise ValueError(f"k={k}: must lie between 0 and the {channels} channels")


class _Plan(NamedTuple):
    table: Tensor
    pieces: list[int]  # rows of each projection and then the gap behind them, one after the other
    tile: dict[str, int]


# Captured graphs read their tables at every replay: these stay when the cache drops them.
_captured: set[Tensor] = set()


@functools.lru_cache(maxsize=256)
def _plan(projections: tuple[tuple[int, int, int, bool], ...], device: torch.device) -> _Plan:
    """Of (channels, head_dim, k, whether there are previous rows) of each projection."""
    tile = _tile(max(head_dim for _, head_dim, _, _ in projections))
    table, pieces = [], []
    first_total = first_row = first_previous = 0
    for projection, (channels, head_dim, k, kept) in enumerate(projections):
        if head_dim < 1 or channels < 1 or channels % head_dim != 0:
            raise ValueError(f"{channels} channels are not heads of {head_dim}")
        _check_k(k, head_dim)
        for begin in range(0, channels, tile["HEADS"] * head_dim):
            table.append([
                projection, channels, head_dim, k, first_total, first_row,
                first_previous if kept else -1, begin,
            ])  # fmt: skip
        num_rows = channels // head_dim * k
        pieces += [num_rows, -num_rows % _ALIGN]
        first_total += channels
        first_row += sum(pieces[-2:])
        first_previous += num_rows if kept else 0
    return _Plan(_upload(table, device), pieces, tile)


def _upload(table: list[Any], device: torch.device) -> Tensor:
    if is_capturing():
        raise RuntimeError(
            "sizes that are new to longact's Triton kernels cannot be captured: select once with "
            "them before the capture"
        )
    # The host waits for the copy, so that every stream may read it.
    return torch.tensor(table, dtype=torch.int32).to(device)


def select_rows(
    totals: Sequence[Tensor],
    tokens: Sequence[Tensor],
    previous: Sequence[Tensor | None],
    counts: Sequence[int],
    head_dims: Sequence[int],
    metric: str,
) -> tuple[list[Tensor], Tensor]:
    """`select_rows` of topk_rows.py, in one launch; totals `[channels]`, at most `MAX_CHANNELS` of
    which are ranked together. The rows are views of one buffer.

    Raises:
        ValueError: an unknown metric, or dtypes, sizes or counts that do not fit.
        RuntimeError: the first call with these sizes is being captured into a CUDA graph.
    """
    if metric not in METRICS:
        raise ValueError(f"metric={metric!r}: use one of {', '.join(METRICS)}")
    if not totals:
        return [], torch.empty(0, dtype=torch.int32)
    if any(t.dtype != torch.float32 or t.dim() != 1 for t in totals):
        raise ValueError("totals must be fp32 [channels]")
    device = totals[0].device
    projections, kept = [], []
    for total, old, k, head_dim in zip(totals, previous, counts, head_dims, strict=True):
        channels = total.shape[0]
        keep = old is not None and old.shape[0] * head_dim == channels * k
        projections.append((channels, head_dim, k, keep))
        if keep and old is not None:
            kept.append(old)
    table, pieces, tile = plan = _plan(tuple(projections), device)
    if is_capturing():
        _captured.add(plan.table)
    buffer = torch.empty(sum(pieces), dtype=torch.int32, device=device)
    status = torch.empty(len(totals), dtype=torch.int32, device=device)
    with on_device_of(buffer):
        _select_kernel[(table.shape[0],)](
            torch.cat(list(totals)),
            torch.stack(list(tokens)),
            torch.cat(kept) if kept else buffer,
            table,
            buffer,
            status,
            METRIC=METRICS[metric],
            **tile,
        )
    return list(buffer.split(pieces)[::2]), status


@functools.lru_cache(maxsize=256)
def _firsts(channels: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each projection begins among all channels, and where the last one ends."""
    firsts = [0]
    for count in channels:
        firsts.append(firsts[-1] + count)
    return _upload(firsts, device)


def topk_rows_over(magnitudes: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The k largest of all projections' channels together (scope="model"), on one device.

    Args:
        magnitudes: of each projection, fp32 `[channels]`, any number of channels; NaN counts as
            the largest.
        k: how many, 0 to all of them; ties go to the earlier projection, then to the lower index.

    Returns:
        Rows: int32 `[projections, most channels]`, of which the first `n[i]` of row i are the rows
        of projection i, ascending, and the rest is undefined. n: int32 `[projections]`.

    Raises:
        ValueError: no projections, another dtype, or k out of range.
        RuntimeError: the first call with these sizes is being captured into a CUDA graph.
    """
    if not magnitudes or any(m.dtype != torch.float32 or m.dim() != 1 for m in magnitudes):
        raise ValueError("magnitudes must be fp32 [channels], one or more")
    channels = tuple(m.shape[0] for m in magnitudes)
    if not 0 <= k <= sum(channels):
        raise ValueError(f"k={k}: must lie between 0 and the {sum(channels)} channels")
    device, projections = magnitudes[0].device, len(magnitudes)
    firsts = _firsts(channels, device)
    if is_capturing():
        _captured.add(firsts)
    together = torch.cat(list(magnitudes))
    width = max(channels)
    counts = torch.empty((4, projections, 256), dtype=torch.int32, device=device)
    rows = torch.empty((projections, width), dtype=torch.int32, device=device)
    taken = torch.empty(projections, dtype=torch.int32, device=device)
    options = {"BLOCK": _BLOCK, "num_warps": max(1, _BLOCK // (_PER_THREAD * _WARP))}
    with on_device_of(together):
        for digits in range(4):
            _count_kernel[(projections,)](
                together, firsts, counts, projections, k, digits, **options
            )
        _write_kernel[(projections,)](
            together, firsts, counts, rows, taken, projections, k, width, **options
        )
    return rows, taken
