# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
"""Channel magnitudes in Triton: one pass over y, and no atomics, so that equal inputs give equal
bits.

    _partials_kernel       totals over each span of tokens, [parts, channels]
    _add_partials_kernel   sums them in order, into the running totals

How y is cut into spans depends on its shape alone, not on the card.

Imports Triton: import this module only where it is used.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longact.kernels.triton_common import on_device_of, to_fp32

# A tile: with bf16 a warp reads 16 bytes a thread along a token, 8 tokens at a time.
_TOKENS, _CHANNELS = 32, 256
_PROGRAMS = 1024  # to aim at: 7 to 8 for each multiprocessor of an H100
_PARTS_TILE, _CHANNELS_TILE = 32, 32  # of _add_partials_kernel
_COUNT_BLOCK = 4096  # tokens that are counted at once

_MEAN_ABS, _RMS, _MAX_ABS = (tl.constexpr(i) for i in range(3))  # METRICS in channel_magnitude.py


# ---- kernels -------------------------------------------------------------------------------------


@triton.jit
def measure(y, METRIC: tl.constexpr):
    """|y| or y^2 of fp32; for max_abs the bits of |y|, as integers: in their order NaN is largest,
    where a maximum of floats would lose it."""
    if METRIC == _RMS:
        return y * y
    elif METRIC == _MAX_ABS:
        return y.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    else:
        return tl.abs(y)


@triton.jit
def combine(a, b, METRIC: tl.constexpr):
    if METRIC == _MAX_ABS:
        return tl.maximum(a, b)
    else:
        return a + b


@triton.jit
def reduce_tokens(measured, METRIC: tl.constexpr):
    """Over the first axis; fp32, of max_abs too."""
    if METRIC == _MAX_ABS:
        return tl.max(measured, 0).to(tl.float32, bitcast=True)
    else:
        return tl.sum(measured, 0)


# Not of `channels`: that it is a multiple of 16 lets the compiler read 16 bytes at a time.
@triton.jit(do_not_specialize=["num_tokens", "span"])
def _partials_kernel(
    y,
    token_mask,
    partials,
    num_tokens,
    channels,
    span,
    token_stride,
    channel_stride,
    METRIC: tl.constexpr,
    HAS_MASK: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    part = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    begin = part * span
    end = tl.minimum(begin + span, num_tokens)
    column = y + channel * channel_stride
    total = measure(tl.zeros([TOKENS, CHANNELS], tl.float32), METRIC)
    for first in range(begin, end, TOKENS):
        token = first + tl.arange(0, TOKENS)
        counted = token < end
        if HAS_MASK:
            counted &= tl.load(token_mask + token, mask=counted, other=0) != 0
        inside = counted[:, None] & (channel < channels)[None, :]
        values = tl.load(column[None, :] + token[:, None] * token_stride, mask=inside, other=0.0)
        total = combine(total, measure(to_fp32(values), METRIC), METRIC)
    result = reduce_tokens(total, METRIC)
    tl.store(partials + part * channels + channel, result, mask=channel < channels)


@triton.jit(do_not_specialize=["num_tokens", "parts", "channels"])
def _add_partials_kernel(
    partials,
    part_stride,
    total,
    token_mask,
    counted,
    num_tokens,
    parts,
    channels,
    METRIC: tl.constexpr,
    HAS_MASK: tl.constexpr,
    COUNTS: tl.constexpr,
    PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    COUNT_BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * CHANNELS
    if first < channels:
        channel = first + tl.arange(0, CHANNELS)
        row = tl.arange(0, PARTS)
        total_part = measure(tl.zeros([PARTS, CHANNELS], tl.float32), METRIC)
        for begin in range(0, parts, PARTS):
            part = (begin + row).to(tl.int64)
            inside = (part < parts)[:, None] & (channel < channels)[None, :]
            at = partials + part[:, None] * part_stride + channel[None, :]
            values = tl.load(at, mask=inside, other=0.0)
            if METRIC == _MAX_ABS:
                total_part = combine(total_part, measure(values, METRIC), METRIC)
            else:
                total_part += values
        before = tl.load(total + channel, mask=channel < channels, other=0.0)
        result = reduce_tokens(total_part, METRIC)
        if METRIC == _MAX_ABS:
            both = combine(measure(before, METRIC), measure(result, METRIC), METRIC)
            result = both.to(tl.float32, bitcast=True)
        else:
            result += before
        tl.store(total + channel, result, mask=channel < channels)
    elif COUNTS:  # one program more
        number = tl.load(counted)
        if HAS_MASK:
            for begin in range(0, num_tokens, COUNT_BLOCK):
                token = (begin + tl.arange(0, COUNT_BLOCK)).to(tl.int64)
                counts = tl.load(token_mask + token, mask=token < num_tokens, other=0) != 0
                number += tl.sum(counts.to(tl.int32), 0)
        else:
            number += num_tokens
        tl.store(counted, number)


# ---- launch --------------------------------------------------------------------------------------


def channel_magnitude(
    y: Tensor, token_mask: Tensor | None, metric: int, out: Tensor, counted: Tensor | None = None
) -> None:
    """Adds the totals of y to `out` (max_abs: takes the larger), and the tokens to `counted`.

    Args:
        y: `[tokens, channels]` of any strides, fp32, bf16 or fp16.
        token_mask: `[tokens]`, of any type and strides; a token counts where it is not 0.
        metric: a value of METRICS (channel_magnitude.py).
        out: fp32 `[channels]`, contiguous.
        counted: int64 scalar.
    """
    num_tokens, channels = y.shape
    blocks, parts, span = cut(num_tokens, channels, _TOKENS, _CHANNELS, _PROGRAMS)
    mask = as_bytes(token_mask)
    partials = torch.empty(parts, channels, dtype=torch.float32, device=y.device)
    if partials.numel() > 0:
        with on_device_of(y):
            _partials_kernel[(blocks, parts)](
                y,
                mask,
                partials,
                num_tokens,
                channels,
                span,
                *y.stride(),
                METRIC=metric,
                HAS_MASK=mask is not None,
                TOKENS=_TOKENS,
                CHANNELS=_CHANNELS,
            )
    add_partials(partials, metric, out, mask, num_tokens, counted)


def cut(
    num_tokens: int, channels: int, tile_tokens: int, tile_channels: int, programs: int
) -> tuple[int, int, int]:
    """Blocks of channels, spans of tokens, and tokens of a span (whole tiles), for so many programs
    or fewer."""
    blocks = triton.cdiv(channels, tile_channels)
    parts = min(triton.cdiv(programs, max(blocks, 1)), triton.cdiv(num_tokens, tile_tokens))
    span = triton.cdiv(triton.cdiv(num_tokens, max(parts, 1)), tile_tokens) * tile_tokens
    return blocks, triton.cdiv(num_tokens, max(span, 1)), span


def as_bytes(token_mask: Tensor | None) -> Tensor | None:
    """As the kernels read it: contiguous, one byte a token."""
    if token_mask is None:
        return None
    return token_mask.to(torch.bool).contiguous().view(torch.uint8)


def add_partials(
    partials: Tensor,
    metric: int,
    out: Tensor,
    mask: Tensor | None,
    num_tokens: int,
    counted: Tensor | None,
) -> None:
    """Adds totals over spans of tokens, fp32 `[parts, channels]` (contiguous along the channels),
    to `out`; and the tokens that `mask` (`as_bytes`) counts to `counted`."""
    parts, channels = partials.shape
    with on_device_of(out):
        _add_partials_kernel[(triton.cdiv(channels, _CHANNELS_TILE) + 1,)](
            partials,
            partials.stride(0),
            out,
            mask,
            counted,
            num_tokens,
            parts,
            channels,
            METRIC=metric,
            HAS_MASK=mask is not None,
            COUNTS=counted is not None,
            PARTS=_PARTS_TILE,
            CHANNELS=_CHANNELS_TILE,
            COUNT_BLOCK=_COUNT_BLOCK,
        )
