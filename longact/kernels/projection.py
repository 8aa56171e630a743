"""A projection with the magnitudes of its output: `F.linear` and a pass over what it wrote, or one
Triton kernel that measures each tile before it leaves the registers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from longact.backends import cuda_capability, runs_triton
from longact.kernels.channel_magnitude import METRICS, channel_magnitude


class Rule(NamedTuple):
    """Where the fused kernel was measured to be faster."""

    capability: tuple[int, int]  # of the card
    dtype: torch.dtype
    in_features: int  # this many or fewer
    tokens: int  # this many or more
    source: str  # the file under benchmarks/results


# The pass over y costs its bytes, itemsize * peak / (2 * bandwidth * in_features) of the matmul: by
# an H100's data sheet 5 % with 4,096 in_features, 20 % with 1,024. The fused kernel costs what
# Triton's matmul takes longer than the vendor's, which only a measurement can tell. Until there is
# one nothing is fused; `benchmarks/bench_projection.py --device cuda` prints the rows for here.
RULES: tuple[Rule, ...] = ()


def fuses(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> bool:
    """Whether `projections` of these runs as one kernel, by RULES."""
    if not RULES or torch.compiler.is_compiling():
        return False
    tensors = [x, *weights, *(bias for bias in biases if bias is not None)]
    if not runs_triton(*tensors):
        return False
    capability = cuda_capability(x.device)
    if not any(
        rule.capability == capability
        and rule.dtype == x.dtype
        and x.shape[1] <= rule.in_features
        and x.shape[0] >= rule.tokens
        for rule in RULES
    ):
        return False
    from longact.kernels import projection_triton

    return projection_triton.supports(x, weights, biases)


def projections(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    token_mask: Tensor | None,
    metric: str,
    outs: Sequence[Tensor],
    counted: Sequence[Tensor],
) -> list[Tensor]:
    """`x W^T + b` of projections that read the same x (q and k of one attention block), with the
    totals of their outputs added up as `channel_magnitude` does. No gradient flows.

    Args:
        x: `[tokens, in]`.
        weights: `[out, in]` each; on the fused path one or two.
        biases: `[out]` each, or None.
        token_mask: `[tokens]`, a token counts where it is not 0; None counts every token.
        metric: `"mean_abs"`, `"rms"` or `"max_abs"`.
        outs: fp32 `[out]` each, which the totals are added to (max_abs: the larger stays).
        counted: int64 scalars, which the number of counted tokens is added to.

    Returns:
        `[tokens, out]` each.
    """
    if fuses(x, weights, biases):
        from longact.kernels import projection_triton

        return projection_triton.project(
            x, weights, biases, token_mask, METRICS[metric], outs, counted
        )
    ys = [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    for y, out, tokens in zip(ys, outs, counted, strict=True):
        channel_magnitude(y, token_mask, metric, out=out, counted=tokens)
    return ys
