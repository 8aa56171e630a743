"""Stochastic rounding to bf16: what every backend must give, bit for bit (csrc/rounding.h)."""

from __future__ import annotations

import torch
from torch import Tensor

_GROUP = 8  # elements that share the 128 bits of one counter


def _philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: int) -> Tensor:
    """Philox4x32-10 (Salmon et al., SC 2011): four 32-bit words for each counter, `[n, 4]`."""
    low = 0xFFFFFFFF
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        # A product of 64 bits may come out negative: its bits are right.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c2 = ((b >> 32) & low) ^ c1 ^ k0, ((a >> 32) & low) ^ c3 ^ k1
        c1, c3 = b & low, a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return torch.stack((c0, c1, c2, c3), dim=1)


def stochastic_round(
    values: Tensor, elements: Tensor, seed: int, key: int, step: int | Tensor
) -> Tensor:
    """Rounds to bf16, up with the probability of the part that is cut off.

    The random bits are a function of the other arguments alone: the same on every device and rank.

    Args:
        values: fp32, any shape. inf stays inf, NaN stays NaN.
        elements: int64, the same shape: each value's index in its parameter, row by row.
        seed: 64 bits.
        key: the parameter's index in its optimizer.
        step: which update of the parameter this is, from 1.

    Returns:
        bf16, the shape of `values`.
    """
    index = elements.flatten()
    groups = index // _GROUP
    step = torch.as_tensor(step, device=index.device).long()  # a GPU's is not read here
    counter = (
        groups & 0xFFFFFFFF,
        groups >> 32,
        torch.full_like(groups, key),
        step.expand_as(groups),
    )
    words = _philox(*counter, seed)
    lane = index % _GROUP
    word = words.gather(1, (lane // 2)[:, None]).squeeze(1)
    random = (word >> (lane % 2 * 16)) & 0xFFFF
    bits = values.flatten().view(torch.int32).long() & 0xFFFFFFFF
    rounded = ((bits + random) >> 16) & 0xFFFF
    rounded = torch.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded)
    # int16 holds the same 16 bits with the upper half of the range below zero.
    return (
        (rounded - ((rounded >> 15) << 16)).to(torch.int16).view(torch.bfloat16).view(values.shape)
    )
