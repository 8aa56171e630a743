"""`channel_magnitude`: how large each channel of a projection's output is over its tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from longact.backends import DTYPE_CODES, is_plain, native, runs_triton

#: Metric to its code in the native core (csrc/cpu_kernels.h).
METRICS: dict[str, int] = {"mean_abs": 0, "rms": 1, "max_abs": 2}


def reference(y: Tensor, token_mask: Tensor | None, metric: str) -> Tensor:
    magnitude = y.detach().float().abs()
    if token_mask is not None:
        magnitude = magnitude[token_mask != 0]
    if metric == "mean_abs":
        return magnitude.sum(0)
    if metric == "rms":
        return magnitude.square().sum(0)
    if magnitude.shape[0] == 0:
        return magnitude.new_zeros(magnitude.shape[1])
    return magnitude.amax(0)


def native_cpu(
    y: Tensor,
    token_mask: Tensor | None,
    metric: str,
    out: Tensor | None = None,
    counted: Tensor | None = None,
    isa: str = "",
) -> Tensor:
    # Few operations: a matmul before it has left none of their code in the cache.
    assert native is not None
    tokens, channels = y.shape
    if y.stride(1) != 1:
        y = y.contiguous()
    if token_mask is not None and not (
        token_mask.dtype == torch.bool and token_mask.is_contiguous()
    ):
        token_mask = token_mask.to(torch.bool).contiguous()
    if out is None:
        out = torch.zeros(channels, dtype=torch.float32)
    native.channel_magnitude(
        METRICS[metric],
        DTYPE_CODES[y.dtype],
        y.data_ptr(),
        y.stride(0),
        0 if token_mask is None else token_mask.data_ptr(),
        tokens,
        channels,
        out.data_ptr(),
        0 if counted is None else counted.data_ptr(),
        torch.get_num_threads(),
        isa,
    )
    return out


def _triton(
    y: Tensor,
    token_mask: Tensor | None,
    metric: str,
    out: Tensor | None = None,
    counted: Tensor | None = None,
) -> Tensor:
    from longact.kernels import channel_magnitude_triton

    if out is None:
        out = torch.zeros(y.shape[1], dtype=torch.float32, device=y.device)
    channel_magnitude_triton.channel_magnitude(
        y.detach(), token_mask, METRICS[metric], out, counted
    )
    return out


_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def channel_magnitude_unchecked(
    y: Tensor,
    token_mask: Tensor | None,
    metric: str,
    out: Tensor | None = None,
    counted: Tensor | None = None,
) -> Tensor:
    """`channel_magnitude` for layers, which know that their tensors fit."""
    if is_compiling():
        return _add(_op(y, token_mask, metric), y, token_mask, metric, out, counted)
    if runs_triton(y) and y.dtype in _TRITON_DTYPES:
        return _triton(y, token_mask, metric, out, counted)
    if native is not None and y.is_cpu and y.dtype in DTYPE_CODES and is_plain(y):
        return native_cpu(y, token_mask, metric, out, counted)
    return _add(reference(y, token_mask, metric), y, token_mask, metric, out, counted)


def _add(
    totals: Tensor,
    y: Tensor,
    token_mask: Tensor | None,
    metric: str,
    out: Tensor | None,
    counted: Tensor | None,
) -> Tensor:
    if counted is not None:
        counted.add_(y.shape[0] if token_mask is None else (token_mask != 0).sum())
    if out is None:
        return totals
    return torch.maximum(out, totals, out=out) if metric == "max_abs" else out.add_(totals)


@torch.library.custom_op("longact::channel_magnitude", mutates_args=())
def _op(y: Tensor, token_mask: Tensor | None, metric: str) -> Tensor:
    _check(y, token_mask, metric)
    return channel_magnitude_unchecked(y, token_mask, metric)


@_op.register_fake
def _fake(y: Tensor, token_mask: Tensor | None, metric: str) -> Tensor:
    _check(y, token_mask, metric)
    return y.new_empty(y.shape[1], dtype=torch.float32)


def _check(y: Tensor, token_mask: Tensor | None, metric: str) -> None:
    if metric not in METRICS:
        raise ValueError(f"metric={metric!r}: use one of {', '.join(METRICS)}")
    if y.dim() != 2 or not y.is_floating_point():
        raise ValueError(
            f"y must be a floating [tokens, channels] tensor, got {y.dtype} {[*y.shape]}"
        )
    if token_mask is None:
        return
    if token_mask.shape != y.shape[:1] or token_mask.device != y.device:
        raise ValueError(
            f"token_mask must have shape [{y.shape[0]}] on {y.device}, one value for each token, "
            f"got {[*token_mask.shape]} on {token_mask.device}"
        )


def _check_out(y: Tensor, out: Tensor | None, counted: Tensor | None) -> None:
    if out is not None and (
        out.dtype != torch.float32
        or out.shape != y.shape[1:]
        or out.device != y.device
        or not out.is_contiguous()
    ):
        raise ValueError(
            f"out must be a contiguous float32 [{y.shape[1]}] tensor on {y.device}, got "
            f"{out.dtype} {[*out.shape]} on {out.device}"
        )
    if counted is not None and (
        counted.dtype != torch.int64 or counted.dim() != 0 or counted.device != y.device
    ):
        raise ValueError(
            f"counted must be an int64 scalar tensor on {y.device}, got {counted.dtype} "
            f"{[*counted.shape]} on {counted.device}"
        )


def channel_magnitude(
    y: Tensor,
    token_mask: Tensor | None = None,
    metric: str = "mean_abs",
    *,
    out: Tensor | None = None,
    counted: Tensor | None = None,
) -> Tensor:
    """Totals from which a channel's magnitude follows, over the counted tokens.

    Args:
        y: `[tokens, channels]`, any floating dtype; the output of a projection.
        token_mask: `[tokens]`, a token counts where it is not 0; None counts every token.
        metric: `"mean_abs"` gives sum|y|, `"rms"` sum y^2, `"max_abs"` max|y|.
        out: fp32 `[channels]` on y's device, contiguous: earlier totals, which these are added to
            (max_abs: the larger stays).
        counted: int64 scalar on y's device, which the number of counted tokens is added to.

    Returns:
        `out`, or fp32 `[channels]` on y's device. No gradient flows through it.

    Raises:
        ValueError: an unknown metric, or shapes or devices that do not fit.
    """
    if not is_compiling():  # the op checks when it runs
        _check(y, token_mask, metric)
        _check_out(y, out, counted)
    return channel_magnitude_unchecked(y, token_mask, metric, out, counted)
