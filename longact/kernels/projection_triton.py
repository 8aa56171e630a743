# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
"""Projections that measure their channels, in Triton: `y = x W^T + b`, whose tiles add up the
magnitudes of their channels while they are still in registers, so that y is not read again. One
launch computes q and k, which share x.

A program computes a tile transposed, W x^T: the matrix units keep most of a row of their result in
one thread, so that the sums over tokens are sums in a thread. Over the columns they would be
exchanges between threads, at ten times the instructions.

Each tile leaves one row of totals, which `add_partials` (channel_magnitude_triton.py) adds up in
order. Nothing is read back, and nothing but dtypes, layout and blocks is a compile-time constant.

Imports Triton: import this module only where it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from longact.backends import cuda_capability, is_plain
from longact.kernels.channel_magnitude_triton import (
    add_partials,
    as_bytes,
    measure,
    reduce_tokens,
)
from longact.kernels.triton_common import dot_operand, from_fp32, on_device_of, to_fp32

__all__ = ["CONFIGS", "Config", "choose_config", "project", "supports", "tune"]

_VECTOR = tl.constexpr(8)  # elements in 16 bytes, of which addresses and row strides are multiples


class Config(NamedTuple):
    """How the kernel divides its work."""

    block_tokens: int
    block_channels: int
    block_in: int  # of one round of the loop
    num_warps: int
    num_stages: int
    group: int = 8  # tiles of tokens that run at the same time as their neighbours in channels

    @property
    def shared_memory(self) -> int:
        """In bytes: the blocks of x and W of all stages."""
        return self.num_stages * (self.block_tokens + self.block_channels) * self.block_in * 2


#: Every configuration that may be chosen, by how blocks are loaded: the largest first, and last one
#: that fits everywhere.
CONFIGS: dict[str, tuple[Config, ...]] = {
    "descriptors": (
        Config(256, 128, 64, num_warps=8, num_stages=4),
        Config(256, 128, 64, num_warps=8, num_stages=3),
        Config(128, 256, 64, num_warps=8, num_stages=3),
        Config(128, 128, 64, num_warps=4, num_stages=3),
        Config(64, 128, 64, num_warps=4, num_stages=3),
    ),
    # Pointers take registers: blocks of 64 would spill.
    "pointers": (
        Config(256, 128, 32, num_warps=8, num_stages=4),
        Config(128, 256, 32, num_warps=8, num_stages=4),
        Config(128, 128, 32, num_warps=4, num_stages=4),
        Config(64, 128, 32, num_warps=4, num_stages=4),
    ),
}
#: Shared memory that one block may have, in bytes (CUDA C++ programming guide, table 30).
_SHARED_MEMORY = {
    (8, 0): 163 * 1024,
    (8, 7): 163 * 1024,
    (9, 0): 227 * 1024,
    (10, 0): 227 * 1024,
    (10, 3): 227 * 1024,
}
_LEAST_SHARED_MEMORY = 99 * 1024  # of NVIDIA's since Ampere
_LEAST_SHARED_MEMORY_ELSEWHERE = 64 * 1024
# To aim at where none is timed: the large GPUs have 108 to 148 multiprocessors.
_PROGRAMS = 256
# In a short loop, two smaller programs to a multiprocessor are better: one multiplies while the
# other measures and stores.
_SHORT = 1024


def candidates(capability: tuple[int, int] | None) -> list[Config]:
    """The configurations that fit; None: a GPU that is not NVIDIA's."""
    if capability is None or capability < (8, 0):
        memory = _LEAST_SHARED_MEMORY_ELSEWHERE
    else:
        memory = _SHARED_MEMORY.get(capability, _LEAST_SHARED_MEMORY)
    configs = CONFIGS["descriptors" if _has_descriptors(capability) else "pointers"]
    return [config for config in configs if config.shared_memory <= memory]


def choose_config(
    tokens: int, in_features: int, out_features: int, capability: tuple[int, int] | None
) -> Config:
    """For `out_features` channels of all projections together, without a trial."""
    fits = candidates(capability)
    for config in fits:
        tiles = triton.cdiv(tokens, config.block_tokens)
        tiles *= triton.cdiv(out_features, config.block_channels)
        if tiles >= _PROGRAMS and (in_features > _SHORT or config.num_warps == 4):
            return config
    return fits[-1]


def _has_descriptors(capability: tuple[int, int] | None) -> bool:
    """Where the hardware copies blocks. Elsewhere Triton takes a descriptor apart without knowing
    what its strides are multiples of, and reads 2 bytes at a time."""
    return capability is not None and capability >= (9, 0)


# ---- kernel --------------------------------------------------------------------------------------


@triton.jit
def _load_block(
    source, first_row, first_column, rows, columns, stride,
    DESCRIPTORS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Zeros past the columns; rows past the last are of no use to anyone."""
    if DESCRIPTORS:
        return source.load([first_row, first_column])
    else:
        row = tl.minimum(first_row + tl.arange(0, ROWS), rows - 1).to(tl.int64)
        column = first_column + tl.arange(0, COLUMNS)
        pointer = source + row[:, None] * stride + column[None, :]
        return tl.load(pointer, mask=(column < columns)[None, :], other=0.0)


@triton.jit(
    do_not_specialize=[
        "num_tokens", "in_vectors", "channel_vectors0", "channel_vectors1",
        "x_vectors", "weight_vectors0", "weight_vectors1",
    ],
    do_not_specialize_on_alignment=["bias0", "bias1", "token_mask"],
)  # fmt: skip
def _project_kernel(
    x,  # descriptors of blocks, or pointers
    weight0,
    weight1,  # None: there is one projection
    bias0,
    bias1,
    y0,
    y1,
    token_mask,
    partials,  # fp32 [tiles of tokens, channels of both]
    num_tokens,
    in_vectors,  # sizes and row strides in vectors: so the compiler sees what divides them
    channel_vectors0,
    channel_vectors1,
    x_vectors,
    weight_vectors0,
    weight_vectors1,
    METRIC: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    IN: tl.constexpr,
    GROUP: tl.constexpr,
):
    in_features = in_vectors * _VECTOR
    channels = channel_vectors0 * _VECTOR
    all_channels = channels
    token_tiles = tl.cdiv(num_tokens, TOKENS)
    tiles0 = tl.cdiv(channels, CHANNELS)
    channel_tiles = tiles0
    if weight1 is not None:
        all_channels += channel_vectors1 * _VECTOR
        channel_tiles += tl.cdiv(channel_vectors1 * _VECTOR, CHANNELS)

    # Programs that run at the same time share tiles of x and of the weights.
    program = tl.program_id(0)
    group_tiles = GROUP * channel_tiles
    first_tile = program // group_tiles * GROUP
    group = tl.minimum(token_tiles - first_tile, GROUP)
    token_tile = first_tile + program % group_tiles % group
    channel_tile = program % group_tiles // group

    weight, weight_vectors, bias, y = weight0, weight_vectors0, bias0, y0
    first_channel = channel_tile * CHANNELS
    totals = partials + token_tile.to(tl.int64) * all_channels
    if weight1 is not None:  # noqa: SIM102 (only this is known to the compiler)
        if channel_tile >= tiles0:
            weight, weight_vectors, bias, y = weight1, weight_vectors1, bias1, y1
            first_channel = (channel_tile - tiles0) * CHANNELS
            totals += channels
            channels = channel_vectors1 * _VECTOR

    first_token = token_tile * TOKENS
    total = tl.zeros([CHANNELS, TOKENS], tl.float32)
    for first_in in range(0, in_features, IN):
        w = _load_block(
            weight, first_channel, first_in, channels, in_features, weight_vectors * _VECTOR,
            DESCRIPTORS, CHANNELS, IN,
        )  # fmt: skip
        x_block = _load_block(
            x, first_token, first_in, num_tokens, in_features, x_vectors * _VECTOR,
            DESCRIPTORS, TOKENS, IN,
        )  # fmt: skip
        total = tl.dot(dot_operand(w), dot_operand(x_block).T, total)

    channel = first_channel + tl.arange(0, CHANNELS)
    token = first_token + tl.arange(0, TOKENS)
    has_channel = channel < channels
    counted = token < num_tokens
    if bias is not None:
        total += to_fp32(tl.load(bias + channel, mask=has_channel, other=0.0))[:, None]
    rounded = from_fp32(total, y.dtype.element_ty)
    tl.store(
        y + token.to(tl.int64)[:, None] * channels + channel[None, :],
        rounded.T,
        mask=counted[:, None] & has_channel[None, :],
    )
    if token_mask is not None:
        counted &= tl.load(token_mask + token, mask=counted, other=0) != 0
    measured = measure(tl.where(counted[None, :], to_fp32(rounded), 0.0), METRIC)
    tl.store(totals + channel, reduce_tokens(measured.T, METRIC), mask=has_channel)


# ---- launch --------------------------------------------------------------------------------------


def supports(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> bool:
    """bf16 or fp16 matrices of one dtype on one device, with rows that are contiguous and on
    multiples of 16 bytes, y's too; plain tensors with memory of their own; nothing empty."""
    matrices = [x, *weights]
    present = [bias for bias in biases if bias is not None]
    return (
        x.dtype in (torch.bfloat16, torch.float16)
        and len(weights) in (1, 2)
        and is_plain(*matrices, *present)
        and all(
            t.dtype == x.dtype and t.device == x.device and not t.is_neg()
            for t in matrices + present
        )
        and all(
            t.dim() == 2
            and t.numel() > 0
            and t.stride(1) == 1
            and t.stride(0) >= t.shape[1]
            and t.stride(0) % _VECTOR.value == 0
            and t.shape[1] % _VECTOR.value == 0
            and t.data_ptr() % 16 == 0
            for t in matrices
        )
        and all(w.shape[0] % _VECTOR.value == 0 and w.shape[1] == x.shape[1] for w in weights)
        and all(
            bias is None or (bias.shape == w.shape[:1] and bias.is_contiguous())
            for bias, w in zip(biases, weights, strict=True)
        )
    )


def project(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    token_mask: Tensor | None,
    metric: int,
    outs: Sequence[Tensor],
    counted: Sequence[Tensor | None],
    config: Config | None = None,
) -> list[Tensor]:
    """`x W^T + b` of one or two projections that `supports` has passed, and their channels' totals.
    Does not wait for the device, except to time the configurations for a new shape (`tune`).

    Args:
        x: `[tokens, in]`.
        weights: each `[channels, in]`.
        biases: each `[channels]`.
        token_mask: `[tokens]`, of any type and strides; a token counts where it is not 0.
        metric: a value of METRICS (channel_magnitude.py).
        outs: each fp32 `[channels]`, contiguous, which the totals of the projection are added to
            (max_abs: the larger stays).
        counted: int64 scalars, which the tokens are added to.
        config: how to divide the work; None: the fastest one where trials are possible.

    Returns:
        Each `[tokens, channels]`, contiguous. The totals are those of these rounded values.
    """
    mask = as_bytes(token_mask)
    if config is None:
        config = tune(x, weights, biases, mask, metric)
    ys, partials = _launch(x, weights, biases, mask, metric, config)
    parts = partials.split([w.shape[0] for w in weights], 1)
    for part, out, count in zip(parts, outs, counted, strict=True):
        add_partials(part, metric, out, mask, x.shape[0], count)
    return ys


def _launch(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    mask: Tensor | None,
    metric: int,
    config: Config,
) -> tuple[list[Tensor], Tensor]:
    """What is written is new: y and the tiles' totals."""
    num_tokens, in_features = x.shape
    channels = [w.shape[0] for w in weights]
    ys = [torch.empty(num_tokens, n, dtype=x.dtype, device=x.device) for n in channels]
    token_tiles = triton.cdiv(num_tokens, config.block_tokens)
    channel_tiles = sum(triton.cdiv(n, config.block_channels) for n in channels)
    partials = torch.empty(token_tiles, sum(channels), dtype=torch.float32, device=x.device)
    descriptors = _has_descriptors(cuda_capability(x.device))

    def blocks_of(matrix: Tensor, rows: int) -> Any:
        if not descriptors:
            return matrix
        return TensorDescriptor.from_tensor(matrix, [rows, config.block_in])

    if any(bias is not None for bias in biases):  # the kernel has one for all or for none
        biases = [
            w.new_zeros(w.shape[0]) if bias is None else bias
            for bias, w in zip(biases, weights, strict=True)
        ]

    def pair(values: Sequence[Any], second: Any = None) -> tuple[Any, Any]:
        return values[0], values[1] if len(values) == 2 else second

    with on_device_of(x):
        _project_kernel[(token_tiles * channel_tiles,)](
            blocks_of(x, config.block_tokens),
            *pair([blocks_of(w, config.block_channels) for w in weights]),
            *pair(biases),
            *pair(ys),
            mask,
            partials,
            num_tokens,
            in_features // _VECTOR.value,
            *pair([n // _VECTOR.value for n in channels], 0),
            x.stride(0) // _VECTOR.value,
            *pair([w.stride(0) // _VECTOR.value for w in weights], 0),
            METRIC=metric,
            DESCRIPTORS=descriptors,
            TOKENS=config.block_tokens,
            CHANNELS=config.block_channels,
            IN=config.block_in,
            GROUP=config.group,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return ys, partials


# ---- tuning --------------------------------------------------------------------------------------

_fastest: dict[tuple[object, ...], Config] = {}


def _milliseconds(run: Callable[[], object]) -> float:
    try:
        return float(triton.testing.do_bench(run, warmup=5, rep=25, return_mode="median"))
    except triton.OutOfResources:
        return float("inf")


def _may_time(device: torch.device) -> bool:
    return (
        device.type == "cuda"  # HIP's name too
        and not torch.cuda.is_current_stream_capturing()
        # Another tiling adds the magnitudes in another order.
        and not torch.are_deterministic_algorithms_enabled()
    )


def tune(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    mask: Tensor | None,
    metric: int,
) -> Config:
    """The fastest configuration, timed once for each device, dtype, widths and power of two of
    tokens; `choose_config`'s where trials are not possible: outside of CUDA and ROCm, while a graph
    is captured, with deterministic algorithms. A trial writes to new memory only."""
    num_tokens, in_features = x.shape
    channels = tuple(w.shape[0] for w in weights)
    capability = cuda_capability(x.device)
    key = (x.device, x.dtype, in_features, channels, triton.next_power_of_2(num_tokens))
    if not _may_time(x.device):
        return choose_config(num_tokens, in_features, sum(channels), capability)
    if key not in _fastest:
        times = {
            config: _milliseconds(partial(_launch, x, weights, biases, mask, metric, config))
            for config in candidates(capability)
        }
        _fastest[key] = min(times, key=lambda config: times[config])
    return _fastest[key]
