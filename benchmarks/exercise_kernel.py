"""A short walk through every variant of the masked AdamW kernel, for compute-sanitizer.

    compute-sanitizer --tool memcheck python benchmarks/exercise_kernel.py --device cuda

Every type, state, policy and option, whole and odd lengths, aligned and not; every result is
compared bit for bit with the CPU path. `gpu_report.py` runs it; tests/test_gpu.py tests more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import longact

SHAPES: list[tuple[int, ...]] = [(40, 64), (33, 7), (3, 16_390), (4099,), (130, 1), (), (0, 5)]
STEPS = 2
HALF: list[dict[str, Any]] = [
    {"master_weights": True},
    {"stochastic_rounding": True, "seed": 7},
    {"moment_dtype": torch.bfloat16},
]
POLICIES: list[dict[str, Any]] = [{}, {"state": "compact"}, {"inactive": "zero_grad"}]


def shifted(value: Tensor, shift: int, device: torch.device) -> Tensor:
    """A copy whose first element lies `shift` elements into its memory."""
    memory = torch.zeros(value.numel() + shift, dtype=value.dtype, device=device)
    inner = memory[shift:].view(value.shape)
    return inner.copy_(value)


def run(device: torch.device, dtype: torch.dtype, shift: int, options: dict[str, Any]) -> Any:
    """Parameters and state after some steps, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in SHAPES:
        value = torch.randn(shape, generator=generator).to(dtype)
        params.append(nn.Parameter(shifted(value, shift, device)))
    optimizer = longact.FusedMaskedAdam(params, lr=0.01, weight_decay=0.1, **options)
    for step in range(STEPS):
        for i, param in enumerate(params):
            if param.dim() == 2 and i != 1:  # the second is dense
                chosen = torch.rand(param.shape[0], generator=generator) < 0.4
                rows = chosen.nonzero().squeeze(1).to(torch.int32)
                longact.set_rows(param, rows.to(device))
            grad = torch.randn(param.shape, generator=generator).to(dtype)
            param.grad = shifted(grad, (shift + step) % 8, device)
        optimizer.step()
    return [
        {"param": p.detach().cpu(), **{k: v.cpu() for k, v in optimizer.state[p].items()}}
        for p in params
    ]


def cases() -> list[tuple[torch.dtype, int, dict[str, Any]]]:
    found = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shift in (0, 1):
            extras = [{}, {"amsgrad": True, "maximize": True}]
            if dtype == torch.bfloat16:
                extras += HALF
            found += [
                (dtype, shift, {**extra, **policy}) for extra in extras for policy in POLICIES
            ]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    device = torch.device(parser.parse_args(argv).device)
    wrong = 0
    for dtype, shift, options in cases():
        mine = run(device, dtype, shift, options)
        expected = run(torch.device("cpu"), dtype, shift, options)
        for shape, got, want in zip(SHAPES, mine, expected, strict=True):
            for name, value in want.items():
                if not torch.equal(got[name], value):
                    wrong += 1
                    print(f"DIFFERS: {name} of {[*shape]}, {dtype}, shift {shift}, {options}")
    print(f"{len(cases())} variants on {device}, {wrong} buffers differ from the CPU path")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
