"""The projections' Triton kernels on a GPU, and the training that they are part of: what neither
Triton's interpreter nor ahead-of-time compilation can show.

Kernels get the sizes of real models. Training gets a tiny model whose rows are known beforehand:
the channels of its projections are about as large as the features of its input.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import Spec, assert_close, assert_same_bits, exact_sums, no_waiting
from models import adam, forward_backward, rows_of, tiny_model, token_ids
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import longact
from longact.backends import adamw_backend, cuda_capability
from longact.kernels import projection, topk_rows
from longact.kernels.channel_magnitude import METRICS, channel_magnitude

projection_triton: Any = pytest.importorskip("longact.kernels.projection_triton")
row_grad_triton: Any = pytest.importorskip("longact.kernels.row_grad_triton")
topk_rows_triton: Any = pytest.importorskip("longact.kernels.topk_rows_triton")
backends = sys.modules["longact.backends"]  # longact.backends is the function

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
CPU = torch.device("cpu")
_CHOSEN, _WHY = adamw_backend(DEVICE)
needs_native = pytest.mark.skipif(
    torch.cuda.is_available() and _CHOSEN != "native", reason=f"needs the CUDA kernel: {_WHY}"
)
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
KEEP = 0.3

# Tokens and channels.
MAGNITUDES = {"32k tokens": (32768, 4096), "odd": (4096 + 63, 1000)}
HUGE = (2**19 + 65, 4096)  # more than 2**31 elements
# Tokens, features, channels of q and of k.
PROJECTIONS = {"Qwen3-8B": (4096 + 63, 4096, 4096, 1024), "odd": (777, 1096, 264, 40)}
# Channels of each projection, and of a head.
MODELS = {"Qwen3-8B": ([4096, 1024] * 36, 128), "8192 wide": ([8192] * 80, 128)}
# Tokens, channels and features. Few rows: the fused kernel divides the tokens.
ROW_GRADS = {
    "q of Qwen3-8B": (8192, 4096, 4096),
    "k of Qwen3-8B": (8192, 1024, 4096),
    "odd": (4097, 1001, 999),
}
#: Tokens, and features and channels of a layer whose gradient is what takes memory.
WIDE_LAYER = (64, 4096)


# ---- what the tests share ------------------------------------------------------------------------


def needs_memory(num_bytes: int) -> None:
    if DEVICE.type == "cuda" and torch.cuda.mem_get_info()[0] < num_bytes:
        pytest.skip(f"needs {num_bytes / 1e9:.0f} GB of free GPU memory")


def random(*shape: int, dtype: torch.dtype = FP32, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Made on the GPU: these are large."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=DEVICE, dtype=dtype).mul_(scale)


def kernels_of(run: Callable[[], object]) -> list[str]:
    """The names of the kernels that it launches; copies and fills by the driver are none."""
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    return [
        event.name
        for event in profile.events()
        if event.device_type.name == "CUDA"
        and not getattr(event, "is_user_annotation", False)
        and not event.name.startswith(("Memcpy", "Memset"))
    ]


@pytest.fixture(name="exact_sums")
def _exact_sums() -> Iterator[None]:
    with exact_sums():
        yield


# ---- magnitudes ----------------------------------------------------------------------------------


def pick_mask(kind: str, tokens: int) -> Tensor | None:
    if kind == "none":
        return None
    share = {"all": 2.0, "some": 0.6, "empty": -1.0}[kind]
    generator = torch.Generator(DEVICE).manual_seed(tokens)
    return torch.rand(tokens, generator=generator, device=DEVICE) < share


def exact_totals(y: Tensor, mask: Tensor | None, metric: str) -> Tensor:
    """In float64, a part of the tokens at a time."""
    total = torch.zeros(y.shape[1], dtype=torch.float64, device=y.device)
    for first in range(0, y.shape[0], 4096):
        part = slice(first, first + 4096)
        values = y[part].double().abs()
        if mask is not None:
            values.masked_fill_(~mask[part, None], 0.0)
        if metric == "max_abs":
            total = torch.maximum(total, values.amax(0))
        else:
            total += (values if metric == "mean_abs" else values.square()).sum(0)
    return total


def check_magnitudes(y: Tensor, mask: Tensor | None, metric: str) -> None:
    """Added to what was counted before, and the same bits in another run."""
    if mask is not None:
        y[~mask] = float("nan")  # tokens that do not count are not looked at
    before = torch.rand(y.shape[1], device=DEVICE)
    results = []
    for _ in range(2):
        out, counted = before.clone(), torch.tensor(2**40, device=DEVICE)
        assert channel_magnitude(y, mask, metric, out=out, counted=counted) is out
        assert int(counted) == 2**40 + (y.shape[0] if mask is None else int(mask.sum()))
        results.append(out)
    assert_same_bits(results[1], results[0], "another run")
    exact = exact_totals(y, mask, metric)
    if metric == "max_abs":
        assert torch.equal(results[0].double(), torch.maximum(exact, before.double()))
    else:  # fp32 additions in a row: of a program's tokens, of its 32 lanes, of the programs
        additions = y.shape[0] / 2048 + 100
        assert_close(results[0], exact + before, Spec(additions * 2.0**-24, 0.0), metric)


@pytest.mark.parametrize("kind", ["none", "all", "some", "empty"])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("shape", MAGNITUDES)
def test_magnitudes(shape: str, dtype: torch.dtype, metric: str, kind: str) -> None:
    tokens, channels = MAGNITUDES[shape]
    check_magnitudes(random(tokens, channels, dtype=dtype), pick_mask(kind, tokens), metric)


@pytest.mark.parametrize("metric", METRICS)
def test_magnitudes_of_parts_of_a_packed_projection(metric: str) -> None:
    """q, k and v of one matmul, and where tokens are the faster dimension."""
    tokens, channels = MAGNITUDES["odd"]
    qkv = random(tokens, 2 * channels, dtype=BF16)
    for y in (qkv[:, :channels], qkv[:, channels + 1 :: 3], qkv.t().contiguous().t()):
        check_magnitudes(y, pick_mask("some", tokens), metric)


@pytest.mark.parametrize("metric", METRICS)
def test_magnitudes_of_more_than_2_to_the_31_elements(metric: str) -> None:
    tokens, channels = HUGE
    needs_memory(3 * tokens * channels)
    y = torch.empty(tokens, channels, dtype=BF16, device=DEVICE)
    y.normal_(generator=torch.Generator(DEVICE).manual_seed(0))
    y[-1] *= 100  # seen, or else
    check_magnitudes(y, None, metric)


# ---- the fused projection ------------------------------------------------------------------------


def projection_inputs(
    name: str, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    """Outputs of about 1; k has no bias."""
    tokens, features, *channels = PROJECTIONS[name]
    scale = features**-0.5
    x = random(tokens, features, dtype=dtype)
    weights = [random(n, features, dtype=dtype, scale=scale, seed=n) for n in channels]
    return x, weights, [random(channels[0], dtype=dtype), None]


def check_totals_of(y: Tensor, mask: Tensor, metric: str, total: Tensor, counted: Tensor) -> None:
    """By a pass over the values that were returned."""
    exact = exact_totals(y, mask, metric)
    assert int(counted) == int(mask.sum())
    if metric == "max_abs":
        assert torch.equal(total.double(), exact)
    else:  # 256 tokens at most in a thread, then as for `channel_magnitude`
        assert_close(total, exact, Spec((256 + 64) * 2.0**-24, 0.0), metric)


@pytest.mark.usefixtures(exact_sums.__name__)
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("name", PROJECTIONS)
def test_every_configuration_of_the_fused_projection(name: str, dtype: torch.dtype) -> None:
    x, weights, biases = projection_inputs(name, dtype)
    tokens, features = x.shape
    mask = pick_mask("some", tokens)
    assert mask is not None
    assert projection_triton.supports(x, weights, biases)
    exact = [
        F.linear(x.double(), w.double(), None if b is None else b.double())
        for w, b in zip(weights, biases, strict=True)
    ]
    theirs = [F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
    # A rounding; and matrix units that cut off each sum of 16 products, of partial sums below 4.
    spec = Spec(torch.finfo(dtype).eps / 2, features / 16 * 4 * 2.0**-23)
    for i, config in enumerate(projection_triton.candidates(cuda_capability(DEVICE))):
        metric = list(METRICS)[i % 3]  # each variant is compiled anew
        results = []
        for _ in range(2):
            totals = [torch.zeros(w.shape[0], device=DEVICE) for w in weights]
            counted = [torch.zeros((), dtype=torch.int64, device=DEVICE) for _ in weights]
            ys = projection_triton.project(
                x, weights, biases, mask, METRICS[metric], totals, counted, config
            )
            results.append([*ys, *totals])
        for first, second in zip(*results, strict=True):
            assert_same_bits(second, first, f"{config}, another run")
        for y, want, their, total, count in zip(ys, exact, theirs, totals, counted, strict=True):
            assert_close(y, want, spec, f"{config}")
            assert_close(y, their, Spec(2 * spec.rtol, 2 * spec.atol), f"{config}, F.linear")
            check_totals_of(y, mask, metric, total, count)


def test_tuning_times_once_and_leaves_the_totals_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weights, biases = projection_inputs("odd", BF16)
    timed: list[int] = []
    milliseconds = projection_triton._milliseconds

    def watched(run: Callable[[], object]) -> float:
        took = milliseconds(run)
        assert 0 < took < math.inf  # every candidate fits the card
        timed[-1] += 1
        return float(took)

    monkeypatch.setattr(projection_triton, "_milliseconds", watched)
    monkeypatch.setattr(projection_triton, "_fastest", {})
    fits = projection_triton.candidates(cuda_capability(DEVICE))
    for tokens in (777, 600, 400, 777):  # two powers of two
        timed.append(0)
        mask = torch.arange(tokens, device=DEVICE) % 3 != 0
        totals = [torch.zeros(w.shape[0], device=DEVICE) for w in weights]
        counted = [torch.zeros((), dtype=torch.int64, device=DEVICE) for _ in weights]
        ys = projection_triton.project(x[:tokens], weights, biases, mask, 0, totals, counted)
        for y, total, count in zip(ys, totals, counted, strict=True):
            check_totals_of(y, mask, "mean_abs", total, count)
    assert timed == [len(fits), 0, len(fits), 0]
    assert len(projection_triton._fastest) == 2
    assert all(config in fits for config in projection_triton._fastest.values())


# ---- rows ----------------------------------------------------------------------------------------


def model_totals(name: str) -> tuple[list[Tensor], list[Tensor]]:
    """Of each projection; every other one full of ties. And its tokens."""
    channels, _ = MODELS[name]
    totals = [random(n, seed=i).abs() * 8 for i, n in enumerate(channels)]
    totals = [t.round() if i % 2 else t for i, t in enumerate(totals)]
    return totals, [torch.tensor(1000 + i, device=DEVICE) for i in range(len(channels))]


def count_of(channels: int) -> int:
    return max(1, int(KEEP * channels + 0.5))


@pytest.mark.parametrize("scope", ["layer", "head"])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", MODELS)
def test_rows_of_a_model(name: str, metric: str, scope: str) -> None:
    channels, head_dim = MODELS[name]
    totals, tokens = model_totals(name)
    head_dims = channels if scope == "layer" else [head_dim] * len(channels)
    counts = [count_of(n) for n in head_dims]
    previous = [
        torch.arange(n // h * k, dtype=torch.int32, device=DEVICE)
        for n, h, k in zip(channels, head_dims, counts, strict=True)
    ]
    totals[3][-1] = float("nan")
    tokens[4].zero_()
    for context in (nullcontext(), no_waiting(DEVICE)):  # sizes are uploaded at first
        with context:
            rows, status = topk_rows_triton.select_rows(
                totals, tokens, previous, counts, head_dims, metric
            )
    codes = [topk_rows.CHOSEN] * len(channels)
    codes[3:5] = topk_rows.NOT_FINITE, topk_rows.NOT_COUNTED
    assert status.tolist() == codes
    for i, (total, count, k, h) in enumerate(zip(totals, tokens, counts, head_dims, strict=True)):
        heads = topk_rows.magnitude_of(total.cpu(), count.cpu(), metric).view(-1, h)
        first = h * torch.arange(len(heads), dtype=torch.int32)[:, None]
        want = (topk_rows.reference(heads, k) + first).flatten()
        if codes[i] != topk_rows.CHOSEN:
            want = previous[i].cpu()
        assert torch.equal(rows[i].cpu(), want), i


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_rows_over_a_model(name: str, ties: bool) -> None:
    totals, _ = model_totals(name)
    if ties:  # among all of them
        totals = [t.round() for t in totals]
    k = count_of(sum(t.shape[0] for t in totals))
    topk_rows_triton.topk_rows_over(totals, k)  # uploads the sizes
    with no_waiting(DEVICE):
        padded, counts = topk_rows_triton.topk_rows_over(totals, k)
    on_cpu = [t.cpu() for t in totals]  # where the definition is used
    chosen = torch.zeros(sum(t.shape[0] for t in on_cpu), dtype=torch.bool)
    chosen[topk_rows.reference(torch.cat(on_cpu), k).long()] = True
    assert int(counts.sum()) == k
    parts = chosen.split([t.shape[0] for t in on_cpu])
    for row, n, part in zip(padded.cpu(), counts.tolist(), parts, strict=True):
        assert row[:n].tolist() == part.nonzero().flatten().tolist()


@pytest.mark.parametrize("name", MODELS)
def test_the_rows_of_a_model_are_one_launch(name: str) -> None:
    channels, _ = MODELS[name]
    totals, tokens = model_totals(name)
    counts = [count_of(n) for n in channels]

    def select() -> object:
        return topk_rows_triton.select_rows(
            totals, tokens, [None] * len(channels), counts, channels, "mean_abs"
        )

    def select_over() -> object:
        return topk_rows_triton.topk_rows_over(totals, count_of(sum(channels)))

    for run, ours in (
        (select, {"_select_kernel": 1}),
        (select_over, {"_count_kernel": 4, "_write_kernel": 1}),
    ):
        run()
        names = kernels_of(run)
        for kernel, number in ours.items():
            assert len([n for n in names if kernel in n]) == number, names
        # Beside them the projections' totals, and their tokens, are put together.
        others = [n for n in names if not any(kernel in n for kernel in ours)]
        assert len(others) <= 4, others


# ---- the row gradient ----------------------------------------------------------------------------


def check_row_grad(
    name: str, dtype: torch.dtype, method: str, *, grad_dtype: torch.dtype, atol: float
) -> Tensor:
    """Written, then added to, twice each; with a bias. Products of about 1."""
    tokens, out, features = ROW_GRADS[name]
    k = count_of(out)
    rows = torch.randperm(out, generator=torch.Generator().manual_seed(1))[:k].sort().values
    rows = rows.to(DEVICE, torch.int32)
    selected = rows.long()
    others = torch.ones(out, dtype=torch.bool, device=DEVICE).index_fill_(0, selected, False)
    grad_output = random(tokens, out, dtype=dtype, scale=tokens**-0.5)
    grad_output[:, others] = float("nan")  # nor are these looked at
    input = random(tokens, features, dtype=dtype, seed=1)
    packed = grad_output[:, selected].double()
    ones = torch.ones(tokens, 1, dtype=torch.float64, device=DEVICE)
    sums = torch.cat([packed.t() @ input.double(), packed.t() @ ones], 1)
    rounding = torch.finfo(grad_dtype).eps / 2
    # gather's product is rounded before it is added or widened.
    product = torch.finfo(dtype).eps / 2 if method == "gather" else 0.0

    for accumulate in (False, True):
        results = []
        for _ in range(2):
            both = random(out, features + 1, dtype=grad_dtype, seed=2)
            both[others] = float("nan")
            grad, bias_grad = both[:, :features].contiguous(), both[:, features].contiguous()
            with no_waiting(DEVICE):
                row_grad_triton.row_grad_(
                    grad, grad_output, input, rows, bias_grad, accumulate=accumulate, method=method
                )
            results.append(torch.cat([grad, bias_grad[:, None]], 1))
        assert_same_bits(results[1], results[0], "another run")
        assert_same_bits(results[0][others], both[others], "rows that are not selected")
        exact = sums + both[selected].double() if accumulate else sums
        error = (results[0][selected].double() - exact).abs()
        allowed = atol + rounding * (1 + 2**-6) * exact.abs() + product * sums.abs()
        assert bool((error <= allowed).all()), (error - allowed).max()
    return results[0][selected]


def sum_error(dtype: torch.dtype, tokens: int) -> float:
    """Of sums below 4, in fp32: of as many roundings, half of them up; of matrix units that cut off
    each sum of 16 products."""
    return 4 * 2.0**-24 * (tokens**0.5 if dtype == FP32 else 2 * tokens / 16)


@pytest.mark.usefixtures(exact_sums.__name__)
@pytest.mark.parametrize("method", ["gather", "fused"])
@pytest.mark.parametrize(("dtype", "grad_dtype"), [(BF16, BF16), (BF16, FP32), (FP32, FP32)])
@pytest.mark.parametrize("name", ROW_GRADS)
def test_row_grad(name: str, dtype: torch.dtype, grad_dtype: torch.dtype, method: str) -> None:
    atol = sum_error(dtype, ROW_GRADS[name][0])
    check_row_grad(name, dtype, method, grad_dtype=grad_dtype, atol=atol)


@pytest.mark.parametrize("name", ROW_GRADS)
def test_row_grad_in_tf32_where_torch_may_use_it(name: str) -> None:
    """10 bits behind a factor's point, the rest cut off; and not without being asked for."""
    exact = check_row_grad(
        name, FP32, "fused", grad_dtype=FP32, atol=sum_error(FP32, ROW_GRADS[name][0])
    )
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        rounded = check_row_grad(name, FP32, "fused", grad_dtype=FP32, atol=16 * 2.0**-10)
    finally:
        matmul.fp32_precision = before
    if DEVICE.type == "cuda" and torch.version.hip is None:
        assert bool((rounded - exact).abs().max() > 2.0**-14)


# ---- a model whose rows are known ----------------------------------------------------------------

FEATURES, HEAD_DIM = 64, 16
BATCH, LENGTH = 2, 24
LR = 5e-5  # channels stay about as large as their features
SCALES = (1.0, 1.025)  # of the two blocks: between two features, for scope="model"
Q0, K0, Q1, K1 = (f"blocks.{i}.{name}_proj" for i in range(2) for name in "qk")


def sizes_of_features(seed: int) -> Tensor:
    """5 % apart, in an order of their own; none as large as one of the batch before."""
    order = torch.randperm(FEATURES, generator=torch.Generator().manual_seed(seed))
    return 0.05 * 1.05 ** (order + seed % 2 / 2)


def make_batch(seed: int) -> tuple[Tensor, Tensor]:
    """Of features that differ in sign alone, and its mask. If padding counted, the smallest ones
    would be the largest."""
    generator = torch.Generator().manual_seed(100 + seed)
    signs = torch.randint(0, 2, (BATCH, LENGTH, FEATURES), generator=generator) * 2 - 1
    mask = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    mask[1, : 5 + seed % 3] = 0
    sizes = sizes_of_features(seed)
    return torch.where(mask[..., None] == 1, signs * sizes, signs * 20 * (1.2 - sizes)), mask


def expected_rows(seed: int, scope: str = "layer") -> dict[str, list[int]]:
    """What a forward of this batch selects."""
    sizes = sizes_of_features(seed)
    names, channels = (Q0, K0, Q1, K1), (FEATURES, FEATURES // 2) * 2
    magnitudes = [sizes[:n] * SCALES[int(name[7])] for name, n in zip(names, channels, strict=True)]
    if scope == "model":  # q's and k's channels among themselves
        chosen = {}
        for i in range(2):
            kind = torch.cat(magnitudes[i::2])
            mask = torch.zeros_like(kind, dtype=torch.bool)
            mask[kind.topk(count_of(kind.numel())).indices] = True
            chosen |= dict(zip(names[i::2], mask.chunk(2), strict=True))
        return {name: chosen[name].nonzero().flatten().tolist() for name in names}
    heads = [m.view(-1, HEAD_DIM) if scope == "head" else m[None] for m in magnitudes]
    masks = [
        torch.zeros_like(h, dtype=torch.bool).scatter_(
            1, h.topk(count_of(h.shape[1]), 1).indices, True
        )
        for h in heads
    ]
    return {
        name: mask.flatten().nonzero().flatten().tolist()
        for name, mask in zip(names, masks, strict=True)
    }


class Block(nn.Module):
    """Attention of plain matmuls, whose gradients have the same bits every time. Channel c of q and
    k is feature c and a little of the others."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.q_proj = nn.Linear(FEATURES, FEATURES)
        self.k_proj = nn.Linear(FEATURES, FEATURES // 2, bias=False)
        self.v_proj = nn.Linear(FEATURES, FEATURES // 2)
        self.o_proj = nn.Linear(FEATURES, FEATURES)
        with torch.no_grad():
            for layer in (self.q_proj, self.k_proj):
                layer.weight.mul_(0.01).add_(torch.eye(*layer.weight.shape), alpha=scale)
            self.q_proj.bias.mul_(0.01)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        k, v = (torch.cat([t, t], 1) for t in (k, v))
        scores = (q @ k.transpose(-1, -2) * 4).masked_fill(mask[:, None, None] == 0, -1e4)
        y: Tensor = self.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return y


class Model(nn.Module):
    """Two blocks side by side. Nothing in it waits for the GPU."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.config = SimpleNamespace(head_dim=HEAD_DIM)
        self.blocks = nn.ModuleList(Block(scale) for scale in SCALES)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for block in self.blocks:
            if self.checkpointed:
                total = total + checkpoint(block, x, attention_mask, use_reentrant=False)
            else:
                total = total + block(x, attention_mask)
        return total


class Training:
    """A model, its optimizer, and a batch that stays where it is."""

    def __init__(
        self,
        device: torch.device | None = None,
        dtype: torch.dtype = FP32,
        *,
        scope: Any = "layer",
        metric: Any = "mean_abs",
        every: Any = 1,
        others: Any = "train",
        checkpointed: bool = False,
        **options: Any,
    ) -> None:
        device = device or DEVICE
        torch.manual_seed(0)
        self.model = Model(checkpointed).to(device, dtype).train()
        self.handle = longact.apply(
            self.model, KEEP, targets=["q_proj", "k_proj"], scope=scope, metric=metric,
            refresh_every=every, others=others,
        )  # fmt: skip
        self.optimizer = longact.FusedMaskedAdam(
            self.model.parameters(), **{"lr": LR, "eps": 1e-5, "weight_decay": 0.2, **options}
        )
        x, mask = make_batch(0)
        self.x, self.mask = x.to(device, dtype), mask.to(device)

    def load(self, seed: int) -> None:
        x, mask = make_batch(seed)
        self.x.copy_(x)
        self.mask.copy_(mask)

    def forward_backward(self) -> None:
        error = (self.model(self.x, self.mask).float() - 1) * self.mask[..., None]
        loss = error.square().mean()
        loss.backward()
        self.loss = loss.detach()

    def step(self, seed: int, micro_batches: int = 1) -> float:
        self.optimizer.zero_grad()
        self.load(seed)
        for _ in range(micro_batches):
            self.forward_backward()
        self.optimizer.step()
        return float(self.loss)

    @property
    def rows(self) -> dict[str, list[int] | None]:
        return rows_of(self.handle)

    @property
    def rows_of_gradients(self) -> dict[str, list[int]]:
        """In which rows there is one."""
        return {
            name: layer.weight.grad.any(1).nonzero().flatten().tolist()
            for name, layer in self.handle.projections.items()
            if layer.weight.grad is not None
        }

    @property
    def params(self) -> list[Tensor]:
        return [p.detach().cpu() for p in self.model.parameters()]


def assert_same_training(ours: Training, other: Training, what: str = "") -> None:
    """Rows, and parameters to much less than a step."""
    assert ours.rows == other.rows, what
    for mine, theirs in zip(ours.params, other.params, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.0, atol=LR / 25)


def test_each_batch_has_rows_of_its_own() -> None:
    """Else the tests below could not tell which it was that was selected."""
    for scope in ("layer", "head", "model"):
        rows = [expected_rows(seed, scope) for seed in range(10)]
        assert all(len({str(each[name]) for each in rows}) == 10 for name in rows[0])


@pytest.mark.parametrize(
    ("scope", "every"), [("layer", 1), ("head", 1), ("model", 1), ("layer", "forward"), ("head", 2)]
)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_rows_are_those_of_the_cpu(dtype: torch.dtype, metric: str, scope: str, every: Any) -> None:
    options = {"scope": scope, "metric": metric, "every": every}
    ours, cpu = Training(DEVICE, dtype, **options), Training(CPU, dtype, **options)
    for step in range(4):
        losses = [training.step(step, micro_batches=2) for training in (ours, cpu)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5 if dtype == FP32 else 2e-2)
        assert ours.rows == cpu.rows
        if every != 2 or step < 2:  # later both of two steps count
            assert ours.rows == expected_rows(step, scope)
        gradients = ours.rows_of_gradients
        if every == "forward":
            assert gradients == expected_rows(step, scope)
        elif step > 0 and every == 1:
            assert gradients == expected_rows(step - 1, scope)
    if dtype == FP32:
        assert_same_training(ours, cpu)


@pytest.mark.parametrize("every", [0, 1])
def test_rows_that_are_parameters_train_as_on_the_cpu(every: int) -> None:
    ours, cpu = (Training(device, every=every, others="freeze") for device in (DEVICE, CPU))
    for step in range(4):
        for training in (ours, cpu):
            training.step(step, micro_batches=2)
        assert ours.rows == cpu.rows == expected_rows(step if every else 0)
    assert_same_training(ours, cpu)
    start = Training(CPU, others="freeze").model.state_dict()
    # Each step trains what the one before selected.
    used = [expected_rows(step) for step in range(3 if every else 1)]
    for name, weight in ours.model.state_dict().items():
        differs = weight.cpu() != start[name]
        rows = differs.any(1) if differs.dim() > 1 else differs
        trained = {r for of_step in used for r in of_step.get(name.rpartition(".")[0], [])}
        assert set(rows.nonzero().flatten().tolist()) == trained, name


def fuse_everything(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> list[int]:
    """As if measured to be faster; how many projections each launch is of."""
    launches: list[int] = []
    project = projection_triton.project

    def watched(x: Tensor, weights: Sequence[Tensor], *args: Any) -> Any:
        launches.append(len(weights))
        return project(x, weights, *args)

    rule = projection.Rule(cuda_capability(DEVICE), dtype, 10**6, 0, "a test")  # type: ignore[arg-type]
    monkeypatch.setattr(projection, "RULES", (rule,))
    monkeypatch.setattr(projection_triton, "project", watched)
    return launches


@pytest.mark.parametrize("every", [1, "forward"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_training_with_fused_projections(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, every: Any
) -> None:
    separate = Training(dtype=dtype, every=every)
    expected = [separate.step(step) for step in range(4)]
    fused = Training(dtype=dtype, every=every)
    launches = fuse_everything(monkeypatch, dtype)
    for step in range(4):
        assert fused.step(step) == pytest.approx(expected[step], rel=1e-2)
        assert fused.rows == expected_rows(step)
    # Before there are rows, projections are as ever; then q and k of each block are one.
    assert launches == [2, 2] * (4 if every == "forward" else 3)


# ---- the host does not wait ----------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "fused"), [(FP32, False), (BF16, False), (BF16, True)])
@pytest.mark.parametrize(
    ("every", "others"),
    [(1, "train"), (2, "train"), (0, "train"), ("forward", "train"), (1, "freeze")],
)
def test_nothing_waits_for_the_gpu(
    monkeypatch: pytest.MonkeyPatch, every: Any, others: str, dtype: torch.dtype, fused: bool
) -> None:
    """Once kernels are loaded, and there are rows."""
    training = Training(dtype=dtype, every=every, others=others)
    if fused:
        fuse_everything(monkeypatch, dtype)
    for step in range(3):
        training.step(step, micro_batches=2)
    for _ in range(3):
        training.optimizer.zero_grad()
        with no_waiting(DEVICE):
            training.forward_backward()
            training.forward_backward()
        # The union of its forwards' rows is the one thing that is looked at.
        with nullcontext() if every == "forward" else no_waiting(DEVICE):
            training.optimizer.step()
    assert all(bool(p.isfinite().all()) for p in training.params)
    assert training.rows == expected_rows(0 if every == 0 else 2)


def test_training_goes_on_while_the_gpu_is_busy() -> None:
    training = Training(dtype=BF16)
    for step in range(3):
        training.step(step)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    start = time.perf_counter()
    training.optimizer.zero_grad()
    training.forward_backward()
    training.optimizer.step()
    seconds = time.perf_counter() - start
    assert not torch.cuda.current_stream().query(), "the GPU was done already: nothing was shown"
    assert seconds < 0.3
    torch.cuda.synchronize()
    assert training.rows == expected_rows(2)


# ---- CUDA graphs ---------------------------------------------------------------------------------


@contextmanager
def side_stream() -> Iterator[None]:
    """For the warm-up, as PyTorch's recipe has it."""
    if DEVICE.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def capture(run: Callable[[], object]) -> Callable[[], object]:
    """Launches again what it launches now."""
    if DEVICE.type != "cuda":
        return run
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


@needs_native
@pytest.mark.parametrize("scope", ["layer", "head"])
@pytest.mark.parametrize("grads", ["made", "zeroed"])
@pytest.mark.parametrize(("every", "others"), [(1, "train"), (0, "train"), (0, "freeze")])
def test_captured_training_equals_eager(every: int, others: str, grads: str, scope: str) -> None:
    """Forward, backward and step in one graph. Its gradients are made by the capture, or are there
    already, filled with zeros and added to in place."""
    ours = Training(every=every, scope=scope, others=others, capturable=True)
    eager = Training(every=every, scope=scope, others=others)

    def step() -> None:
        ours.optimizer.zero_grad(set_to_none=grads == "made")
        ours.forward_backward()
        ours.optimizer.step()

    for seed in range(3):
        ours.load(seed)
        with side_stream():
            step()
        eager.step(seed)
    assert_same_training(ours, eager, "before the capture")
    replay = capture(step)
    for seed in range(3, 9):
        before = eager.rows
        ours.load(seed)
        replay()
        assert float(ours.loss) == pytest.approx(eager.step(seed), rel=1e-5)
        assert_same_training(ours, eager, f"replay {seed}")
        # What a step selects is what the next backward computes.
        assert before == expected_rows(seed - 1 if every else 0, scope)
        assert others == "freeze" or ours.rows_of_gradients == before
    # Afterwards training goes on without the graph.
    for seed in range(9, 11):
        ours.step(seed)
        eager.step(seed)
    assert_same_training(ours, eager, "after the replays")


@needs_native
def test_replays_follow_rows_that_are_set_by_hand() -> None:
    ours = Training(every=0, capturable=True)
    with side_stream():
        for seed in range(3):
            ours.step(seed)

    def step() -> None:
        ours.optimizer.zero_grad()
        ours.forward_backward()
        ours.optimizer.step()

    replay = capture(step)
    layer = ours.handle.projections[Q0]
    for rows in (range(count_of(FEATURES)), range(3, 3 + count_of(FEATURES))):
        longact.set_rows(layer.weight, [*rows])
        before = layer.weight.detach().clone()
        replay()
        assert ours.rows_of_gradients[Q0] == [*rows]
        changed = (layer.weight.detach() != before).any(1).nonzero().flatten().tolist()
        assert changed == [*rows]
        assert ours.rows_of_gradients[K1] == expected_rows(0)[K1]


@pytest.mark.parametrize("scope", ["layer", "head"])
def test_captured_forwards_select_their_own_rows(scope: str) -> None:
    """refresh_every="forward": the backward is for the rows that the same replay selects. The step
    updates their union; it is not captured."""
    ours, eager = (Training(every="forward", scope=scope) for _ in range(2))
    for seed in range(3):
        with side_stream():
            ours.step(seed)
        eager.step(seed)

    def forward_backward() -> None:
        ours.optimizer.zero_grad()  # its gradients are the graph's
        ours.forward_backward()

    replay = capture(forward_backward)
    for seed in range(3, 8):
        ours.load(seed)
        replay()
        assert ours.rows_of_gradients == expected_rows(seed, scope)
        ours.optimizer.step()
        assert float(ours.loss) == pytest.approx(eager.step(seed), rel=1e-5)
        assert ours.rows == expected_rows(seed, scope)
        assert_same_training(ours, eager, f"replay {seed}")


@pytest.mark.parametrize("steps", [0, 2])
def test_a_capture_without_a_place_for_the_rows_is_refused(steps: int) -> None:
    training = Training()
    with side_stream():
        for seed in range(steps):
            training.step(seed)
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(RuntimeError, match=r"needs its rows in a place that stays.*capturable=True"),
        torch.cuda.graph(graph),
    ):
        training.forward_backward()
    torch.cuda.synchronize()
    training.step(2)  # and training goes on
    assert training.rows == expected_rows(2)


# ---- compiled, checkpointed, under autocast ------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "mode"), [(1, "reduce-overhead"), ("forward", "default")], ids=str
)
def test_a_compiled_llama_trains_as_the_eager_one(every: Any, mode: str) -> None:
    torch._dynamo.reset()
    models = [tiny_model(num_hidden_layers=1).to(DEVICE) for _ in range(2)]
    handles = [longact.apply(m, refresh_every=every) for m in models]
    # A large eps: gradients that are all rounding do not decide the direction of a step.
    optimizers = [adam(m, lr=1e-3, eps=1e-3) for m in models]
    runs: list[Any] = [torch.compile(models[0], fullgraph=True, mode=mode), models[1]]
    seen = []
    for step in range(5):
        ids = token_ids(2, 16, seed=step).to(DEVICE)
        losses = []
        for model, run, optimizer in zip(models, runs, optimizers, strict=True):
            # The first two without the compiler: it would compile for there being no rows, too.
            losses.append(forward_backward(model if step < 2 else run, ids))
            optimizer.step()
            optimizer.zero_grad()
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        assert rows_of(handles[0]) == rows_of(handles[1])
        seen.append(str(rows_of(handles[0])))
    assert len({*seen}) > 2
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("every", [1, "forward"])
def test_checkpointing_changes_no_bit(every: Any) -> None:
    results = []
    for checkpointed in (False, True):
        training = Training(every=every, checkpointed=checkpointed)
        for step in range(4):
            training.optimizer.zero_grad()
            training.load(step)
            for _ in range(2):
                training.forward_backward()
            counted = [int(p.selection.tokens) for p in training.handle.projections.values()]
            assert counted == [2 * int(training.mask.sum())] * 4
            training.optimizer.step()
            assert training.rows == expected_rows(step)
        results.append(training.params)
    for plain, again in zip(*results, strict=True):
        assert_same_bits(again, plain, "parameter")


@pytest.mark.parametrize("every", [1, "forward"])
def test_autocast_with_fp32_weights(every: Any) -> None:
    """Gradients in fp32, the selected rows those of the dense ones under autocast."""
    training = Training(every=every)
    dense = Model().to(DEVICE).train()
    for step in range(3):
        with torch.no_grad():
            for theirs, ours in zip(dense.parameters(), training.model.parameters(), strict=True):
                theirs.copy_(ours)
        dense.zero_grad()
        training.load(step)
        training.optimizer.zero_grad()
        rows = expected_rows(step) if every == "forward" else training.rows
        for model in (training.model, dense):
            with torch.autocast(DEVICE.type, BF16):
                y = model(training.x, training.mask)
                ((y.float() - 1) * training.mask[..., None]).square().mean().backward()
        for (name, ours), theirs in zip(
            training.model.named_parameters(), dense.parameters(), strict=True
        ):
            assert ours.grad is not None
            assert theirs.grad is not None
            assert ours.grad.dtype == FP32
            want = theirs.grad.clone()
            mine = rows.get(name.rpartition(".")[0])
            if mine is not None:
                others = torch.ones(want.shape[0], dtype=torch.bool, device=DEVICE)
                others[mine] = False
                assert not bool(ours.grad[others].any()), name
                want[others] = 0
                assert bool(ours.grad[mine].any()), name
            atol = 2.0**-8 * float(want.abs().max())
            torch.testing.assert_close(ours.grad, want, rtol=2.0**-7, atol=atol)
        training.optimizer.step()
        assert training.rows == expected_rows(step)


# ---- micro-batches add up in place ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_no_gradient_of_full_size_is_made_twice(dtype: torch.dtype) -> None:
    tokens, width = WIDE_LAYER
    layer = longact.nn.SalientLinear(width, width, device=DEVICE, dtype=dtype)
    rows = [*range(0, width, 4)]
    longact.set_rows(layer.weight, rows)
    taken, places = [], []
    expected = torch.zeros(len(rows), width, dtype=torch.float64, device=DEVICE)
    for seed in range(3):
        x = random(tokens, width, dtype=dtype, seed=seed)
        y = layer(x)
        expected += 2 * y.detach()[:, rows].double().t() @ x.double()
        loss = y.float().square().sum()
        del y
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        loss.backward()
        if DEVICE.type == "cuda":
            taken.append(torch.cuda.max_memory_allocated() - before)
        assert layer.weight.grad is not None
        places.append(layer.weight.grad.data_ptr())
    assert len({*places}) == 1
    full = layer.weight.nbytes
    if DEVICE.type == "cuda":
        assert taken[0] >= full
        # The product for a quarter of the rows, and what is as large as the tokens.
        assert max(taken[1:]) < full / 2, [n / full for n in taken]
    grad = layer.weight.grad
    assert grad is not None
    assert grad.any(1).nonzero().flatten().tolist() == rows
    size = float(expected.abs().max())
    assert_close(grad[rows], expected, Spec(0.0, 4 * torch.finfo(dtype).eps * size), "sum")


# ---- another device ------------------------------------------------------------------------------


def test_training_on_a_device_that_is_not_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 GPUs, there is {torch.cuda.device_count()}")
    second = torch.device("cuda", 1)
    for every in (1, "forward"):
        training = Training(second, every=every)
        for step in range(4):
            training.step(step, micro_batches=2)
            assert training.rows == expected_rows(step)
            assert all(r is not None and r.device == second for r in training.handle.rows.values())
    fused = Training(second, BF16)
    fuse_everything(monkeypatch, BF16)
    for step in range(3):
        fused.step(step)
        assert fused.rows == expected_rows(step)
    assert torch.cuda.current_device() == 0
