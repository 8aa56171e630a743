"""What `python -m longact doctor` runs: each op on small inputs against its definition, written out
in float64, and one step of a small model. Each returns what it looked at, or raises what is wrong.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, cast

import torch
from torch import Tensor, nn

import longact
from longact.backends import adamw_backend, triton_error
from longact.kernels.channel_magnitude import channel_magnitude
from longact.kernels.row_grad import linear_grads, row_grad
from longact.kernels.topk_rows import select_rows, topk_rows

Backend = Literal["native", "triton", "reference"]


def tests_of(device: torch.device) -> dict[str, Callable[[], str]]:
    """By name, the fastest way first."""
    backends = [adamw_backend(device)[0], "reference"]
    if device.type == "cuda" and triton_error(device) is None:
        backends.insert(1, "triton")
    tests: dict[str, Callable[[torch.device], str]] = {
        "channel_magnitude": _channel_magnitude,
        "topk_rows, select_rows": _rows,
        "row_grad, linear_grads": _row_grad,
    }
    for backend in dict.fromkeys(backends):
        update = functools.partial(_masked_adamw, backend=cast(Backend, backend))
        tests[f"masked_adamw_ {backend}"] = update
    tests["a model's step"] = _step
    return {name: functools.partial(_seeded, test, device) for name, test in tests.items()}


def _seeded(test: Callable[[torch.device], str], device: torch.device) -> str:
    with torch.random.fork_rng(devices=[]):  # inputs come from the CPU's generator
        torch.manual_seed(0)
        return test(device)


def _compare(what: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """`tolerance`: of the largest value."""
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    if actual.shape != expected.shape:
        raise ArithmeticError(f"{what}: shape {[*actual.shape]}, not {[*expected.shape]}")
    error = float((actual - expected).abs().max() / expected.abs().max())
    if not error <= tolerance:
        raise ArithmeticError(f"{what}: off by {error:.2g} of the largest value")


def _channel_magnitude(device: torch.device) -> str:
    mask = torch.rand(300) < 0.8
    for dtype in (torch.float32, torch.bfloat16):
        y = torch.randn(300, 97).to(dtype)
        size = y[mask].double().abs()
        expected = {"mean_abs": size.sum(0), "rms": size.square().sum(0), "max_abs": size.amax(0)}
        for metric, of_metric in expected.items():
            inputs = (y.to(device), mask.to(device), metric)
            _compare(f"{metric} of {dtype}", channel_magnitude(*inputs), of_metric, 1e-5)
            totals = torch.zeros(97, device=device)
            counted = torch.zeros((), dtype=torch.int64, device=device)
            for _ in range(2):  # as layers count: added to what was counted before
                channel_magnitude(*inputs, out=totals, counted=counted)
            twice = of_metric if metric == "max_abs" else 2 * of_metric
            _compare(f"running {metric} of {dtype}", totals, twice, 1e-5)
            if int(counted) != 2 * int(mask.sum()):
                raise ArithmeticError(f"{metric} of {dtype}: {int(counted)} tokens counted")
    return "float32, bfloat16; mean_abs, rms, max_abs"


def _rows(device: torch.device) -> str:
    magnitude = torch.randint(0, 40, (200,)).float()  # with ties

    def largest(k: int, first: int, last: int) -> list[int]:
        return sorted(sorted(range(first, last), key=lambda i: (-float(magnitude[i]), i))[:k])

    on_device, tokens = magnitude.to(device), torch.tensor(7, device=device)
    rows = topk_rows(on_device, 60)
    if rows.tolist() != largest(60, 0, 200):
        raise ArithmeticError("topk_rows: not the rows of largest magnitude")
    (rows,), _ = select_rows([on_device], [tokens], [None], [15], [50], "rms")
    if rows.tolist() != [
        row for head in range(4) for row in largest(15, 50 * head, 50 * head + 50)
    ]:
        raise ArithmeticError("select_rows: not the rows of largest magnitude in each head")
    return "the same rows, ties included"


def _row_grad(device: torch.device) -> str:
    rows = torch.arange(1, 64, 3, dtype=torch.int32)
    for dtype, tolerance in ((torch.float32, 5e-3), (torch.bfloat16, 2e-2)):  # TF32 is allowed
        dy, x = torch.randn(96, 64).to(dtype), torch.randn(96, 48).to(dtype)
        weight, bias = torch.zeros(64, 48).double(), torch.zeros(64).double()
        weight[rows], bias[rows] = (dy.double().t() @ x.double())[rows], dy.double().sum(0)[rows]
        inputs = (dy.to(device), x.to(device), rows.to(device))
        _compare(f"row_grad of {dtype}", row_grad(*inputs), weight[rows], tolerance)
        with torch.no_grad():
            of_weight, of_bias = linear_grads(*inputs, True)
        _compare(f"linear_grads of {dtype}", of_weight, weight, tolerance)
        _compare(f"linear_grads' bias of {dtype}", of_bias, bias, tolerance)
    return "float32, bfloat16"


def _masked_adamw(device: torch.device, backend: Backend) -> str:
    """Against torch's AdamW in float64, which moves the selected rows alike."""
    tolerances = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
    if device.type == "cpu":
        tolerances[torch.float64] = 1e-12
    selected = torch.arange(0, 512, 2)  # with 600 elements each: enough for several threads
    for dtype, tolerance in tolerances.items():
        start = torch.randn(512, 600).to(dtype)
        param = nn.Parameter(start.to(device, copy=True))
        exact = nn.Parameter(start.to(torch.float64, copy=True))
        longact.set_rows(param, selected.to(device, torch.int32))
        optimizers = [
            longact.FusedMaskedAdam([param], lr=0.1, backend=backend),
            torch.optim.AdamW([exact], lr=0.1),
        ]
        for _ in range(2):
            param.grad = torch.randn(512, 600).to(device, dtype)
            exact.grad = param.grad.cpu().double()
            for optimizer in optimizers:
                optimizer.step()
        trained = param.detach().cpu()
        _compare(f"{dtype}", trained[selected], exact[selected], tolerance)
        _check_changed(f"{dtype}", start, trained, selected)
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in tolerances)


def _step(device: torch.device) -> str:
    """Selected rows move as AdamW moves them, all others keep every bit."""

    class TwoProjections(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj = nn.Linear(32, 60), nn.Linear(32, 20)

        def forward(self, x: Tensor) -> Tensor:
            loss: Tensor = self.q_proj(x).square().mean() + self.k_proj(x).square().mean()
            return loss

    model, dense = TwoProjections().to(device), TwoProjections().to(device)
    dense.load_state_dict(model.state_dict())
    before = {name: value.cpu().clone() for name, value in model.state_dict().items()}
    handle = longact.apply(model, keep_ratio=0.3, targets=["q_proj", "k_proj"])
    x = torch.randn(50, 32, device=device)
    for trained, optimizer in (
        (model, longact.FusedMaskedAdam(model.parameters(), lr=1e-2)),
        (dense, torch.optim.AdamW(dense.parameters(), lr=1e-2)),
    ):
        trained(x).backward()
        optimizer.step()
    for name, count in (("q_proj", 18), ("k_proj", 6)):
        rows = handle.rows[name]
        if rows is None or rows.numel() != count:
            raise ArithmeticError(f"{name}: {rows} selected, not {count} rows")
        selected = rows.long().cpu()
        for key in (f"{name}.weight", f"{name}.bias"):
            after, expected = model.state_dict()[key].cpu(), dense.state_dict()[key].cpu()
            _check_changed(key, before[key], after, selected)
            _compare(key, after[selected], expected[selected], 1e-3)
    return "24 of 80 rows trained, the others keep every bit"


def _check_changed(what: str, before: Tensor, after: Tensor, rows: Tensor) -> None:
    bits = [tensor.view(len(tensor), -1).view(torch.uint8) for tensor in (before, after)]
    changed = (bits[0] != bits[1]).any(1)
    if changed.nonzero().squeeze(1).tolist() != rows.tolist():
        raise ArithmeticError(f"{what}: other rows changed than those that are selected")
