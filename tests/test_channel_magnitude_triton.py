"""The Triton pass over a projection's output: against the definition, in Triton's interpreter or on
a GPU, and compiled ahead of time for GPUs that are not here.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_tools import (
    AMD,
    DEVICE,
    NVIDIA,
    assert_no_spills,
    compile_kernel,
    compiled,
    cuobjdump,
    no_reads_by_the_host,
    runs_kernels,
    target_id,
)

from longact.kernels.channel_magnitude import METRICS

kernels = pytest.importorskip("longact.kernels.channel_magnitude_triton")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One tile and less, several tiles with rests, no token, no channel.
SHAPES = [(1, 1), (63, 5), (16, 32), (97, 33), (300, 70), (0, 7), (7, 0)]
MASKS = ["none", "all", "some", "empty"]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many programs, and rounds to a program, even for small tensors."""
    for name, value in {
        "_TOKENS": 16, "_CHANNELS": 32, "_PROGRAMS": 6, "_PARTS_TILE": 2, "_CHANNELS_TILE": 16,
        "_COUNT_BLOCK": 64,
    }.items():  # fmt: skip
        monkeypatch.setattr(kernels, name, value)


def pick_mask(kind: str, tokens: int) -> Tensor | None:
    if kind == "none":
        return None
    share = {"all": 2.0, "some": 0.6, "empty": -1.0}[kind]
    return torch.rand(tokens) < share


def expected(y: Tensor, mask: Tensor | None, metric: str, before: Tensor) -> Tensor:
    """In float64, from the definition."""
    values = y.double().abs()
    if mask is not None:
        values = values[mask != 0]
    if metric == "max_abs":
        return torch.cat([before.double()[None], values]).amax(0)
    return before.double() + (values if metric == "mean_abs" else values.square()).sum(0)


def run(
    y: Tensor, mask: Tensor | None, metric: str, before: Tensor, counted: int = 0
) -> tuple[Tensor, int]:
    out, tokens = before.to(DEVICE, copy=True), torch.tensor(counted, device=DEVICE)
    mask = None if mask is None else mask.to(DEVICE)
    kernels.channel_magnitude(y.to(DEVICE), mask, METRICS[metric], out, tokens)
    return out.cpu(), int(tokens)


def assert_totals(actual: Tensor, exact: Tensor, metric: str) -> None:
    if metric == "max_abs":
        assert torch.equal(actual, exact.float())
    else:  # a sum of some hundred positive numbers in fp32
        torch.testing.assert_close(actual.double(), exact, rtol=2e-6, atol=0.0)


@runs_kernels
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MASKS)
def test_totals_are_those_of_the_definition(kind: str, dtype: torch.dtype, metric: str) -> None:
    for tokens, channels in SHAPES:
        y = torch.randn(tokens, channels).to(dtype)
        mask, before = pick_mask(kind, tokens), torch.rand(channels)
        actual, counted = run(y, mask, metric, before, 2**40)
        assert_totals(actual, expected(y, mask, metric, before), metric)
        assert counted == 2**40 + (tokens if mask is None else int(mask.sum()))


@runs_kernels
@pytest.mark.parametrize("metric", METRICS)
def test_micro_batches_add_up(metric: str) -> None:
    ys = [torch.randn(tokens, 40) for tokens in (50, 3, 120)]
    out, counted = torch.zeros(40), 0
    for y in ys:
        out, counted = run(y, None, metric, out, counted)
    assert_totals(out, expected(torch.cat(ys), None, metric, torch.zeros(40)), metric)
    assert counted == 173


@runs_kernels
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_totals_of_any_strides(dtype: torch.dtype, metric: str) -> None:
    """A slice of a fused projection's output, every other token, a transposed tensor."""
    wide = torch.randn(130, 100).to(dtype)
    for y in (
        wide[:, 10:50],
        wide[::2, 3:],
        wide.t()[:, :77],
        wide[:, ::3],
        wide[:5].expand(5, -1),
    ):
        before = torch.rand(y.shape[1])
        out = before.to(DEVICE, copy=True)
        there = wide.to(DEVICE).as_strided(y.size(), y.stride(), y.storage_offset())
        kernels.channel_magnitude(there, None, METRICS[metric], out)
        assert_totals(out.cpu(), expected(y, None, metric, before), metric)


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.uint8])
def test_masks_of_any_type(dtype: torch.dtype) -> None:
    """Any value but 0 counts, of a strided mask too."""
    y = torch.randn(90, 8)
    mask = torch.zeros(180).to(dtype)
    mask[10:150:4] = {torch.float32: 0.5, torch.int64: 256}.get(dtype, 1)  # 0 if cut to a byte
    actual, counted = run(y, mask[::2], "mean_abs", torch.zeros(8))
    assert_totals(actual, expected(y, mask[::2], "mean_abs", torch.zeros(8)), "mean_abs")
    assert counted == 35


@runs_kernels
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", METRICS)
def test_non_finite_activations_show_where_they_count(
    metric: str, dtype: torch.dtype, value: float
) -> None:
    y = torch.randn(70, 40).to(dtype)
    y[65, 33] = value
    mask = torch.ones(70, dtype=torch.bool)
    for counts in (True, False):
        mask[65] = counts
        actual, _ = run(y, mask, metric, torch.zeros(40))
        assert actual.isfinite().tolist() == [c != 33 or not counts for c in range(40)]
        assert not counts or bool(actual[33].isnan()) == math.isnan(value)
    before = torch.zeros(40)
    before[7] = value if math.isnan(value) else math.inf  # what was non-finite stays
    actual, _ = run(torch.randn(70, 40).to(dtype), None, metric, before)
    assert actual.isfinite().tolist() == [c != 7 for c in range(40)]


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_is_read_exactly(dtype: torch.dtype) -> None:
    y = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(1, -1)
    out = torch.zeros(2**16, device=DEVICE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_CHANNELS", 4096)
        patch.setattr(kernels, "_CHANNELS_TILE", 4096)
        kernels.channel_magnitude(y.to(DEVICE), None, METRICS["max_abs"], out)
    assert torch.equal(out.cpu().nan_to_num(-1.0), y[0].float().abs().nan_to_num(-1.0))


@runs_kernels
def test_equal_inputs_give_equal_bits_and_padding_changes_none() -> None:
    y, before = torch.randn(200, 50), torch.rand(50)
    first = run(y, torch.ones(200), "mean_abs", before)
    assert torch.equal(first[0], run(y, None, "mean_abs", before)[0])
    padded = torch.cat([y, torch.full((30, 50), math.nan)])
    mask = torch.arange(230) < 200
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_PROGRAMS", 10**6)  # spans of one tile, whatever the length
        alone = run(y, None, "mean_abs", before)
        assert torch.equal(alone[0], run(padded, mask, "mean_abs", before)[0])


@runs_kernels
def test_sums_stay_accurate_over_many_tokens() -> None:
    """One running fp32 sum would be off by 1e-4 and more."""
    y = torch.rand(100_000, 2) + 0.5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_TOKENS", 1024)
        actual, _ = run(y, None, "mean_abs", torch.zeros(2))
    torch.testing.assert_close(actual.double(), y.double().sum(0), rtol=1e-6, atol=0.0)


@runs_kernels
def test_partials_may_be_columns_of_a_wider_table() -> None:
    """As the fused projection's are, whose q and k lie side by side."""
    table = torch.rand(9, 100)
    out = torch.zeros(37, device=DEVICE)
    kernels.add_partials(table.to(DEVICE)[:, 50:87], 0, out, None, 0, None)
    assert_totals(out.cpu(), table[:, 50:87].double().sum(0), "mean_abs")


@runs_kernels
def test_nothing_waits_for_the_device() -> None:
    y, mask = torch.randn(40, 8, device=DEVICE), torch.ones(40, device=DEVICE)
    out, counted = torch.zeros(8, device=DEVICE), torch.tensor(0, device=DEVICE)
    with no_reads_by_the_host():
        kernels.channel_magnitude(y, mask, 0, out, counted)
    assert int(counted) == 40


def test_how_y_is_cut() -> None:
    """Programs enough to fill a card, of spans as long as that allows."""
    cut = {
        (tokens, channels): kernels.cut(tokens, channels, 32, 256, 1024)
        for tokens, channels in (
            (32768, 4096), (131072, 1024), (4096, 1024), (32800, 256), (10944, 700), (1, 64),
            (0, 8),
        )
    }  # fmt: skip
    assert cut == {
        (32768, 4096): (16, 64, 512),
        (131072, 1024): (4, 256, 512),
        (4096, 1024): (4, 128, 32),
        (32800, 256): (1, 513, 64),
        (10944, 700): (3, 342, 32),
        (1, 64): (1, 1, 32),
        (0, 8): (1, 0, 0),
    }


# ---- compiled for GPUs that are not here ---------------------------------------------------------

TYPES = {
    "token_mask": "*u8", "partials": "*fp32", "num_tokens": "i32", "channels": "i32",
    "span": "i32", "token_stride": "i64", "total": "*fp32", "counted": "*i64", "parts": "i32",
    "part_stride": "i64",
}  # fmt: skip
POINTER = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


@compiled
@pytest.mark.parametrize("target", [*NVIDIA, AMD], ids=target_id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_partials_kernel_compiles(target: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    constants = {
        "channel_stride": 1, "METRIC": METRICS["mean_abs"], "HAS_MASK": True, "TOKENS": 32,
        "CHANNELS": 256,
    }  # fmt: skip
    kernel = compile_for(kernels._partials_kernel, dtype, constants, target, tmp_path)
    if target.backend == "cuda":
        assert_no_spills(kernel, tmp_path)
        sass = cuobjdump("-sass", kernel, tmp_path)
        assert len(re.findall(r"LDG\.E\S*\.128", sass)) >= 8  # as many in flight at once


@compiled
@pytest.mark.parametrize(
    ("metric", "target"),
    [
        pytest.param(metric, target, id=f"{metric}-{target_id(target)}")
        for target in [*NVIDIA, AMD]
        for metric in (METRICS if target.arch == 90 else ["rms"])
    ],
)
def test_add_partials_kernel_compiles(target: Any, metric: str, tmp_path: Path) -> None:
    constants = {
        "METRIC": METRICS[metric], "HAS_MASK": True, "COUNTS": True, "PARTS": 32, "CHANNELS": 32,
        "COUNT_BLOCK": 4096,
    }  # fmt: skip
    kernel = compile_for(kernels._add_partials_kernel, None, constants, target, tmp_path)
    if target.backend == "cuda":
        assert_no_spills(kernel, tmp_path)


def compile_for(
    kernel: Any, dtype: torch.dtype | None, constants: dict[str, Any], target: Any, folder: Path
) -> Any:
    types = TYPES if dtype is None else TYPES | {"y": POINTER[dtype]}
    aligned = tuple(n for n in kernel.arg_names if types.get(n, " ")[0] == "*")
    aligned += tuple(
        n for n in ("token_stride", "part_stride", "channels") if n in kernel.arg_names
    )
    try:
        return compile_kernel(kernel, types, constants, target, folder, aligned=aligned)
    except Exception as error:
        if "TRITON_HIP_LLD_PATH" not in str(error):
            raise
        pytest.skip(f"older Tritons need ROCm's linker: {error}")
