"""The Triton projection that measures its channels: against float64, in Triton's interpreter or on
a GPU, and compiled ahead of time for GPUs that are not here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import triton_tools
from torch import Tensor
from triton_tools import (
    AMD,
    DEVICE,
    INTERPRETED,
    NVIDIA,
    SHARED_MEMORY,
    assert_no_spills,
    compile_kernel,
    compiled,
    cuobjdump,
    no_reads_by_the_host,
    target_id,
)

from longact.kernels.channel_magnitude import METRICS

triton = pytest.importorskip("triton")
projection_triton = pytest.importorskip("longact.kernels.projection_triton")
Config = projection_triton.Config
CONFIGS: dict[str, tuple[Any, ...]] = projection_triton.CONFIGS
ALL = [config for configs in CONFIGS.values() for config in configs]
choose_config = projection_triton.choose_config
candidates = projection_triton.candidates

DTYPES = [torch.bfloat16, torch.float16]
#: Several tiles in each direction, groups of them and rounds of the loop even for small tensors.
SMALL = Config(32, 16, 32, num_warps=4, num_stages=2, group=2)
WIDE = Config(16, 64, 16, num_warps=4, num_stages=3, group=4)
GUARD = 64  # elements before and behind every output


def config_id(config: Any) -> str:
    return "x".join(map(str, config[:3])) + f"_{config.num_stages}_stages"


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.empty gives NaN, in the middle of memory that nobody may write to."""
    empty = torch.empty
    outputs: list[tuple[Tensor, Tensor]] = []

    def guarded_empty(*shape: int, **options: Any) -> Tensor:
        inside = empty(*shape, **options)
        memory = inside.new_full((inside.numel() + 2 * GUARD,), float("nan"))
        outputs.append((memory, inside))
        return memory[GUARD:-GUARD].view(inside.shape)

    monkeypatch.setattr(projection_triton.torch, "empty", guarded_empty)
    yield
    monkeypatch.undo()
    for memory, inside in outputs:
        assert memory[:GUARD].isnan().all()
        assert memory[-GUARD:].isnan().all()
        assert not memory[GUARD:-GUARD].isnan().all() or inside.numel() == 0


def runs_kernels(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.usefixtures(guarded.__name__)(triton_tools.runs_kernels(test))


@pytest.fixture(params=["pointers", "descriptors"])
def loads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of loading a block."""
    load_by(request.param, monkeypatch)
    return str(request.param)


def load_by(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "descriptors" and INTERPRETED and triton.__version__.startswith("3.4."):
        pytest.skip("Triton 3.4's interpreter wants multiples of 16 elements, not bytes")
    monkeypatch.setattr(projection_triton, "_has_descriptors", lambda _: way == "descriptors")


# ---- inputs, and what must come out --------------------------------------------------------------


def make_inputs(
    tokens: int,
    in_features: int,
    channels: Sequence[int],
    dtype: torch.dtype,
    biases: Sequence[bool] | bool = True,
    *,
    integers: bool = False,
) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    generator = torch.Generator().manual_seed(tokens + in_features)

    def values(*shape: int) -> Tensor:
        if integers:
            return torch.randint(-2, 3, shape, generator=generator).to(DEVICE, dtype)
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    if isinstance(biases, bool):
        biases = [biases] * len(channels)
    x = values(tokens, in_features)
    weights = [values(n, in_features) for n in channels]
    # Large: left out, it would show beside the sum of so many products.
    return (
        x,
        weights,
        [
            values(n) * 16 if has_bias else None
            for n, has_bias in zip(channels, biases, strict=True)
        ],
    )


def make_mask(kind: str, tokens: int) -> Tensor | None:
    if kind == "no mask":
        return None
    if kind in ("all", "none"):
        return torch.full((tokens,), int(kind == "all"), device=DEVICE)
    mask = torch.randint(0, 2, (tokens,), generator=torch.Generator().manual_seed(tokens))
    mask[-1] = 1
    return mask.to(DEVICE)


class Result:
    """What `project` gave, on top of totals that are not zero."""

    def __init__(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        mask: Tensor | None = None,
        metric: str = "mean_abs",
        config: Any = SMALL,
    ) -> None:
        assert projection_triton.supports(x, weights, biases)
        self.mask, self.metric = mask, metric
        self.before = [
            torch.linspace(0, 1, w.shape[0], dtype=torch.float32, device=DEVICE) for w in weights
        ]
        self.totals = [before.clone() for before in self.before]
        self.counted = [torch.tensor(5 + i, device=DEVICE) for i in range(len(weights))]
        self.ys = projection_triton.project(
            x, weights, biases, mask, METRICS[metric], self.totals, self.counted, config
        )

    def check(self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
        assert len(self.ys) == len(weights)
        for y, weight, bias in zip(self.ys, weights, biases, strict=True):
            check_y(y, x, weight, bias)
        self.check_totals()

    def check_totals(self) -> None:
        """Of the values that were returned."""
        for i, (y, before, total) in enumerate(zip(self.ys, self.before, self.totals, strict=True)):
            magnitude = y.double().abs()
            number = y.shape[0]
            if self.mask is not None:
                magnitude = magnitude[self.mask != 0]
                number = magnitude.shape[0]
            assert self.counted[i].item() == 5 + i + number
            if self.metric == "max_abs":
                largest = torch.cat([magnitude.float(), before[None]]).amax(0)
                assert torch.equal(total, largest)
                continue
            if self.metric == "rms":
                magnitude = magnitude.square()
            expected = before.double() + magnitude.sum(0)
            # fp32: a rounding for each square and each sum of numbers that are not negative.
            relative = (number + 3) * torch.finfo(torch.float32).eps / 2
            error = (total.double() - expected).abs()
            assert (error <= relative * expected).all(), error.div(expected).max()


def check_y(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """The sum in fp32, rounded once."""
    assert y.shape == (x.shape[0], weight.shape[0])
    assert y.dtype == x.dtype
    assert y.is_contiguous()
    exact = x.double() @ weight.double().t()
    size = x.double().abs() @ weight.double().abs().t()
    if bias is not None:
        exact += bias.double()
        size += bias.double().abs()
    of_sum = (x.shape[1] + 1) * torch.finfo(torch.float32).eps / 2 * size
    info = torch.finfo(y.dtype)
    of_rounding = (exact.abs() + of_sum) * info.eps / 2 + info.smallest_normal * info.eps / 2
    error = (y.double() - exact).abs()
    assert (error <= of_sum + of_rounding).all(), (error - of_sum - of_rounding).max()


# ---- values --------------------------------------------------------------------------------------


@runs_kernels
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_totals(dtype: torch.dtype, metric: str, loads: str) -> None:
    """Tiles that end inside: tokens 130 of 32, q 72 and k 24 of 16, in 72 of 32."""
    x, weights, biases = make_inputs(130, 72, [72, 24], dtype)
    mask = make_mask("some", 130)
    Result(x, weights, biases, mask, metric).check(x, weights, biases)


@runs_kernels
@pytest.mark.parametrize("config", [SMALL, WIDE], ids=["small", "wide"])
@pytest.mark.parametrize(
    ("tokens", "in_features", "channels"),
    [
        (1, 8, [8]),
        (1, 72, [8, 64]),
        (16, 16, [64]),
        (63, 8, [64, 8]),
        (63, 576, [8, 16]),
        (96, 72, [136]),
        (130, 72, [80, 64]),
        (257, 8, [24, 8]),
    ],
    ids=str,
)
def test_shapes(
    tokens: int, in_features: int, channels: list[int], config: Any, loads: str
) -> None:
    x, weights, biases = make_inputs(tokens, in_features, channels, torch.bfloat16)
    Result(x, weights, biases, None, "rms", config).check(x, weights, biases)


@runs_kernels
@pytest.mark.parametrize("config", ALL, ids=config_id)
def test_every_configuration(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    capability = projection_triton.cuda_capability(torch.device(DEVICE))
    if DEVICE == "cuda" and config not in candidates(capability):
        pytest.skip("does not fit this GPU")
    load_by("descriptors" if config in CONFIGS["descriptors"] else "pointers", monkeypatch)
    x, weights, biases = make_inputs(300, 136, [264, 136], torch.float16)
    mask = make_mask("some", 300)
    Result(x, weights, biases, mask, "mean_abs", config).check(x, weights, biases)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_where_every_sum_is(dtype: torch.dtype, loads: str) -> None:
    """Small integers: y and the totals to the bit."""
    x, weights, biases = make_inputs(130, 40, [40, 24], dtype, integers=True)
    result = Result(x, weights, biases, None, "rms")
    for y, before, total, weight, bias in zip(
        result.ys, result.before, result.totals, weights, biases, strict=True
    ):
        exact = x.double() @ weight.double().t() + bias.double()
        assert torch.equal(y, exact.to(dtype))
        squares = y.double().square().sum(0)
        assert squares.max() < 2**24
        assert torch.equal(total, squares.float() + before)


@runs_kernels
@pytest.mark.parametrize("biases", [(False, False), (True, False), (False, True)], ids=str)
def test_biases(biases: tuple[bool, bool]) -> None:
    x, weights, present = make_inputs(63, 72, [40, 24], torch.bfloat16, biases)
    Result(x, weights, present).check(x, weights, present)


@runs_kernels
def test_rounds_once() -> None:
    """The bias is added to the sum in fp32, not to the rounded one."""
    x = torch.ones(1, 8, dtype=torch.bfloat16, device=DEVICE)
    weight = torch.zeros(8, 8, dtype=torch.bfloat16, device=DEVICE)
    weight[:, 0], weight[:, 1] = 1.0, 2.0**-8  # halfway to the next bf16
    bias = torch.full((8,), 2.0**-9, dtype=torch.bfloat16, device=DEVICE)
    result = Result(x, [weight], [bias])
    assert (result.ys[0] == 1 + 2.0**-7).all()
    # The totals are those of the rounded values.
    assert torch.equal(result.totals[0], result.before[0] + (1 + 2.0**-7))


# ---- masks ---------------------------------------------------------------------------------------


@runs_kernels
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["no mask", "some", "all", "none"])
@pytest.mark.parametrize("tokens", [1, 63, 96])
def test_masks(tokens: int, kind: str, metric: str) -> None:
    x, weights, biases = make_inputs(tokens, 24, [24, 16], torch.float16)
    result = Result(x, weights, biases, make_mask(kind, tokens), metric)
    result.check(x, weights, biases)
    if kind == "none":
        assert torch.equal(result.totals[0], result.before[0])


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32], ids=str)
def test_mask_of_any_type_and_strides(dtype: torch.dtype) -> None:
    """1/2 and 256 count too."""
    x, weights, biases = make_inputs(63, 24, [24], torch.bfloat16)
    mask = torch.zeros(126, dtype=dtype, device=DEVICE)
    mask[::4] = 0.5 if dtype.is_floating_point else 256 if dtype == torch.int64 else 1
    Result(x, weights, biases, mask[::2]).check(x, weights, biases)


@runs_kernels
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_masked_tokens_may_be_anything(bad: float, metric: str, loads: str) -> None:
    x, weights, biases = make_inputs(70, 40, [24, 40], torch.bfloat16)
    mask = make_mask("some", 70)
    assert mask is not None
    clean = Result(x, weights, biases, mask, metric)
    x[mask == 0] = bad
    result = Result(x, weights, biases, mask, metric)
    for i in range(2):
        assert torch.equal(result.totals[i], clean.totals[i])
        assert torch.equal(result.ys[i][mask != 0], clean.ys[i][mask != 0])
        assert not result.ys[i][mask == 0].isfinite().any()


@runs_kernels
@pytest.mark.parametrize("metric", METRICS)
def test_nan_that_counts_is_seen(metric: str) -> None:
    """In its channel only: in the last token of a tile, and a negative NaN."""
    x, weights, biases = make_inputs(63, 24, [24, 24], torch.bfloat16)
    weights[1][7] = -float("nan")
    x[31] = x[31].abs() + 1
    result = Result(x, weights, biases, None, metric)
    assert result.totals[0].isfinite().all()
    assert result.totals[1].isnan().nonzero().flatten().tolist() == [7]


# ---- layouts -------------------------------------------------------------------------------------


@runs_kernels
def test_rows_apart_from_each_other(loads: str) -> None:
    """Views of larger tensors; what lies between the rows is NaN."""
    x, weights, biases = make_inputs(63, 72, [24, 40], torch.bfloat16)

    def apart(matrix: Tensor, left: int, right: int) -> Tensor:
        rows, columns = matrix.shape
        whole = matrix.new_full((rows + 2, left + columns + right), float("nan"))
        whole[1:-1, left : left + columns] = matrix
        return whole[1:-1, left : left + columns]

    strided = Result(
        apart(x, 8, 24),
        [apart(weights[0], 16, 8), apart(weights[1], 0, 32)],
        biases,
        make_mask("some", 63),
    )
    strided.check(x, weights, biases)
    plain = Result(x, weights, biases, strided.mask)
    for i in range(2):
        assert torch.equal(strided.ys[i], plain.ys[i])
        assert torch.equal(strided.totals[i], plain.totals[i])


@runs_kernels
def test_packed_projections(loads: str) -> None:
    """q and k as rows of one weight, their biases of one bias."""
    x, (weight,), (bias,) = make_inputs(63, 40, [64], torch.float16)
    weights, biases = weight.split([40, 24]), bias.split([40, 24])
    Result(x, weights, biases).check(x, weights, biases)


@runs_kernels
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("channels", [[32, 16], [40, 24], [8, 72]], ids=str)
def test_one_launch_or_two(channels: list[int], metric: str, loads: str) -> None:
    """The same bits: k's tiles begin behind q's last, full or not."""
    x, weights, biases = make_inputs(63, 72, channels, torch.bfloat16)
    mask = make_mask("some", 63)
    both = Result(x, weights, biases, mask, metric)
    for i in range(2):
        alone = Result(x, weights[i : i + 1], biases[i : i + 1], mask, metric)
        # Of the totals before, which depend on the width alone, too.
        assert torch.equal(both.ys[i], alone.ys[0])
        assert torch.equal(both.totals[i], alone.totals[0])


@runs_kernels
def test_loads_by_descriptors_and_pointers_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weights, biases = make_inputs(70, 72, [24, 40], torch.bfloat16)
    results = []
    for way in CONFIGS:
        load_by(way, monkeypatch)
        results.append(Result(x, weights, biases))
    for i in range(2):
        assert torch.equal(results[0].ys[i], results[1].ys[i])
        assert torch.equal(results[0].totals[i], results[1].totals[i])


@runs_kernels
def test_only_the_group_may_differ() -> None:
    """The order of the tiles changes nothing."""
    x, weights, biases = make_inputs(150, 24, [40, 24], torch.bfloat16)
    results = [
        Result(x, weights, biases, config=SMALL._replace(group=group)) for group in (1, 3, 8)
    ]
    results[0].check(x, weights, biases)
    for result in results[1:]:
        for i in range(2):
            assert torch.equal(results[0].ys[i], result.ys[i])
            assert torch.equal(results[0].totals[i], result.totals[i])


# ---- totals --------------------------------------------------------------------------------------


@runs_kernels
@pytest.mark.parametrize("metric", METRICS)
def test_adds_up_over_calls(metric: str) -> None:
    """With and without a count, which is optional for each projection."""
    x, weights, biases = make_inputs(100, 24, [24, 16], torch.bfloat16, integers=True)
    totals = [torch.zeros(w.shape[0], device=DEVICE) for w in weights]
    counted = torch.zeros((), dtype=torch.int64, device=DEVICE)
    ys = []
    for part in (x[:40], x[40:]):
        ys.append(
            projection_triton.project(
                part, weights, biases, None, METRICS[metric], totals, [None, counted], SMALL
            )
        )
    assert counted.item() == 100
    for i in range(2):
        y = torch.cat([ys[0][i], ys[1][i]]).double().abs()
        expected = {
            "mean_abs": y.sum(0), "rms": y.square().sum(0), "max_abs": y.amax(0)
        }[metric]  # fmt: skip
        assert torch.equal(totals[i], expected.float())


@runs_kernels
def test_equal_inputs_give_equal_bits() -> None:
    x, weights, biases = make_inputs(70, 40, [24, 24], torch.bfloat16)
    first, second = Result(x, weights, biases), Result(x, weights, biases)
    for i in range(2):
        assert torch.equal(first.totals[i], second.totals[i])
        assert torch.equal(first.ys[i], second.ys[i])


@runs_kernels
def test_host_reads_nothing() -> None:
    x, weights, biases = make_inputs(63, 40, [24, 16], torch.bfloat16)
    mask = make_mask("some", 63)
    totals = [torch.zeros(w.shape[0], device=DEVICE) for w in weights]
    counted = torch.zeros((), dtype=torch.int64, device=DEVICE)
    arguments = (x, weights, biases, mask, 0, totals, [counted, None], SMALL)
    if DEVICE == "cuda":
        projection_triton.project(*arguments)  # compiles
        torch.cuda.set_sync_debug_mode("error")
    try:
        with no_reads_by_the_host():
            projection_triton.project(*arguments)
    finally:
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert counted.item() == (1 + (DEVICE == "cuda")) * (mask != 0).sum().item()


@runs_kernels
def test_chooses_a_configuration_by_itself() -> None:
    x, weights, biases = make_inputs(63, 40, [24, 16], torch.bfloat16)
    Result(x, weights, biases, config=None).check(x, weights, biases)


# ---- what is supported ---------------------------------------------------------------------------


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_supports(dtype: torch.dtype) -> None:
    x, weight, bias = empty(3, 24, dtype=dtype), empty(16, 24, dtype=dtype), empty(16, dtype=dtype)
    supports = projection_triton.supports
    assert supports(x, [weight], [bias])
    assert supports(x, [weight], [None])
    assert supports(x, [weight, empty(8, 24, dtype=dtype)], [None, empty(8, dtype=dtype)])
    assert supports(empty(3, 48, dtype=dtype)[:, 8:32], [weight], [bias])
    assert supports(empty(1, 24, dtype=dtype), [weight], [bias])


@pytest.mark.parametrize(
    ("x", "weights", "biases"),
    [
        (empty(3, 24), [], []),
        (empty(3, 24), [empty(8, 24)] * 3, [None] * 3),
        (empty(3, 24, dtype=torch.float32), [empty(8, 24, dtype=torch.float32)], [None]),
        (empty(3, 24), [empty(8, 24, dtype=torch.float16)], [None]),
        (empty(3, 24), [empty(8, 24), empty(8, 24, dtype=torch.float16)], [None, None]),
        (empty(3, 24), [empty(8, 24)], [empty(8, dtype=torch.float32)]),
        (empty(3, 24), [empty(8, 24)], [empty(16)[::2]]),
        (empty(3, 24), [empty(8, 24)], [empty(16)]),
        (empty(3, 24), [empty(8, 16)], [None]),
        (empty(3, 20), [empty(8, 20)], [None]),
        (empty(3, 24)[:, :20], [empty(8, 24)[:, :20]], [None]),
        (empty(3, 24), [empty(12, 24)], [None]),
        (empty(0, 24), [empty(8, 24)], [None]),
        (empty(3, 0), [empty(8, 0)], [None]),
        (empty(3, 24), [empty(0, 24)], [None]),
        (empty(2, 3, 24), [empty(8, 24)], [None]),
        (empty(24, 3).t(), [empty(8, 24)], [None]),
        (empty(3, 24), [empty(24, 8).t()], [None]),
        (empty(1, 24).expand(3, 24), [empty(8, 24)], [None]),
        (empty(3, 28)[:, :24], [empty(8, 24)], [None]),
        (empty(3, 32)[:, 4:28], [empty(8, 24)], [None]),
        (empty(3, 24), [empty(8, 32)[:, 4:28]], [None]),
        (empty(3, 24), [empty(8, 24).to("meta")], [None]),
        (torch._neg_view(empty(3, 24)), [empty(8, 24)], [None]),
    ],
)
def test_supports_not(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> None:
    assert not projection_triton.supports(x, weights, biases)


def test_supports_no_wrappers() -> None:
    class Wrapper(Tensor):
        @classmethod
        def __torch_dispatch__(cls, *_: Any, **__: Any) -> Any:
            raise NotImplementedError

    wrapper = Tensor._make_wrapper_subclass(Wrapper, (8, 24), dtype=torch.bfloat16)  # type: ignore[attr-defined]
    assert not projection_triton.supports(empty(3, 24), [wrapper], [None])
    assert not projection_triton.supports(wrapper, [empty(8, 24)], [None])


# ---- which configuration -------------------------------------------------------------------------

CAPABILITIES = [None, (7, 5), (8, 0), (8, 6), (9, 0), (10, 0), (12, 0), (13, 0)]


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
def test_chosen_configurations_fit(capability: tuple[int, int] | None) -> None:
    fits = candidates(capability)
    memory = 64 if capability in (None, (7, 5)) else 99
    memory = {(8, 0): 163, (9, 0): 227, (10, 0): 227}.get(capability or (0, 0), memory)
    assert all(config.shared_memory <= memory * 1024 for config in fits)
    descriptors = capability is not None and capability >= (9, 0)
    configs = CONFIGS["descriptors" if descriptors else "pointers"]
    assert fits
    assert fits[-1] == configs[-1]
    left_out = set(configs) - set(fits)
    assert set(fits) | left_out == set(configs)
    assert all(config.shared_memory > memory * 1024 for config in left_out)
    for tokens in (1, 100, 4096, 131072):
        for in_features in (64, 576, 4096):
            for out_features in (8, 768, 5120):
                assert choose_config(tokens, in_features, out_features, capability) in fits


def test_choice_by_size() -> None:
    deep, _, _, medium, small = CONFIGS["descriptors"]
    assert choose_config(131072, 4096, 5120, (9, 0)) == deep
    assert choose_config(131072, 4096, 5120, (12, 0)) == medium
    # 256 tiles of 256 x 128, and 240
    assert choose_config(2048, 4096, 4096, (9, 0)) == deep
    assert choose_config(2048, 4096, 3840, (9, 0)) == medium
    assert choose_config(131072, 1024, 768, (9, 0)) == medium
    assert choose_config(131072, 1032, 768, (9, 0)) == deep
    assert choose_config(100, 4096, 5120, (9, 0)) == small
    assert choose_config(131072, 4096, 5120, (8, 0)) == CONFIGS["pointers"][0]
    assert choose_config(131072, 4096, 5120, None) == CONFIGS["pointers"][2]
    assert choose_config(100, 4096, 5120, None) == CONFIGS["pointers"][3]


class Timer:
    """Runs what it times, and finds one configuration the fastest."""

    def __init__(self, fastest: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fastest, self.timed = fastest, list[Any]()
        fits = [SMALL, WIDE, Config(16, 16, 16, num_warps=4, num_stages=2)]
        monkeypatch.setattr(projection_triton, "_may_time", lambda _: True)
        monkeypatch.setattr(projection_triton, "candidates", lambda _: fits)
        monkeypatch.setattr(projection_triton, "_milliseconds", self)
        monkeypatch.setattr(projection_triton, "_fastest", {})

    def __call__(self, run: Any) -> float:
        run()
        self.timed.append(run.args[-1])
        return 1.0 if run.args[-1] == self.fastest else 2.0 + len(self.timed)


@runs_kernels
def test_trials_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The totals and the count are those of one call."""
    x, weights, biases = make_inputs(63, 40, [24, 16], torch.bfloat16)
    mask = make_mask("some", 63)
    timer = Timer(WIDE, monkeypatch)
    tuned = Result(x, weights, biases, mask, config=None)
    assert len(timer.timed) == 3
    tuned.check(x, weights, biases)
    chosen = Result(x, weights, biases, mask, config=WIDE)
    for i in range(2):
        assert torch.equal(tuned.totals[i], chosen.totals[i])
    assert len(timer.timed) == 3


@pytest.mark.parametrize("fastest", [SMALL, WIDE], ids=["small", "wide"])
def test_times_once_for_each_kind_of_shape(fastest: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    timer = Timer(fastest, monkeypatch)
    monkeypatch.setattr(projection_triton, "_launch", lambda *_: None)

    def trials(tokens: int, in_features: int, channels: list[int], dtype: torch.dtype) -> int:
        before = len(timer.timed)
        weights = [empty(n, in_features, dtype=dtype) for n in channels]
        x = empty(tokens, in_features, dtype=dtype)
        config = projection_triton.tune(x, weights, [None] * len(channels), None, 0)
        assert config == fastest
        return len(timer.timed) - before

    assert trials(65, 24, [16, 8], torch.bfloat16) == 3
    assert trials(128, 24, [16, 8], torch.bfloat16) == 0
    assert trials(129, 24, [16, 8], torch.bfloat16) == 3
    assert trials(65, 32, [16, 8], torch.bfloat16) == 3
    assert trials(65, 24, [8, 16], torch.bfloat16) == 3
    assert trials(65, 24, [16], torch.bfloat16) == 3
    assert trials(65, 24, [16, 8], torch.float16) == 3
    assert trials(65, 24, [16, 8], torch.bfloat16) == 0


def test_when_it_times(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    may_time = projection_triton._may_time
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert may_time(cuda)
    assert not may_time(torch.device("cpu"))
    assert not may_time(torch.device("xpu"))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert not may_time(cuda)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not may_time(cuda)


def test_heuristic_where_it_does_not_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if another call has timed the shape: deterministic means the same every time."""
    timer = Timer(WIDE, monkeypatch)
    monkeypatch.setattr(projection_triton, "_launch", lambda *_: None)
    x, weights = empty(65, 24), [empty(16, 24)]
    assert projection_triton.tune(x, weights, [None], None, 0) == WIDE
    monkeypatch.setattr(projection_triton, "_may_time", lambda _: False)
    monkeypatch.setattr(projection_triton, "candidates", candidates)
    chosen = projection_triton.tune(x, weights, [None], None, 0)
    assert chosen == choose_config(65, 24, 16, projection_triton.cuda_capability(x.device))
    assert len(timer.timed) == 3


def test_too_large_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def do_bench(run: Callable[[], object], **_: Any) -> float:
        run()
        return 1.0

    def fail() -> None:
        raise triton.OutOfResources(300000, 232448, "shared memory")

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    assert projection_triton._milliseconds(lambda: None) == 1.0
    assert projection_triton._milliseconds(fail) == float("inf")


# ---- ahead of time -------------------------------------------------------------------------------

CANDIDATES = [
    (target, config) for target in NVIDIA for config in candidates((target.arch // 10, 0))
]
each_candidate = pytest.mark.parametrize(
    ("target", "config"),
    CANDIDATES,
    ids=[f"{target_id(target)}-{config_id(config)}" for target, config in CANDIDATES],
)


def compile_projection(
    target: Any,
    config: Any,
    folder: Path,
    *,
    dtype: str = "bf16",
    projections: int = 2,
    bias: bool = True,
    mask: bool = True,
    metric: str = "mean_abs",
) -> Any:
    descriptors = target.backend == "cuda" and target.arch >= 90

    def blocks(rows: int) -> str:
        return f"tensordesc<{dtype}[{rows}, {config.block_in}]>" if descriptors else f"*{dtype}"

    types = {"x": blocks(config.block_tokens), "partials": "*fp32"}
    for i in range(projections):
        types |= {f"weight{i}": blocks(config.block_channels), f"y{i}": f"*{dtype}"}
        types |= {f"bias{i}": f"*{dtype}"} if bias else {}
    types |= {"token_mask": "*u8"} if mask else {}
    constants: dict[str, Any] = {
        "METRIC": METRICS[metric],
        "DESCRIPTORS": descriptors,
        "TOKENS": config.block_tokens,
        "CHANNELS": config.block_channels,
        "IN": config.block_in,
        "GROUP": config.group,
    }
    kernel = projection_triton._project_kernel
    for name in kernel.arg_names:
        if name == "num_tokens" or "vectors" in name:
            types[name] = "i32"
        elif name not in types and name not in constants:
            constants[name] = None
    return compile_kernel(
        kernel,
        types,
        constants,
        target,
        folder,
        aligned=tuple(
            name
            for name, type_ in types.items()
            if type_[0] == "*" and name not in ("bias0", "bias1", "token_mask")
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def check_compiled(kernel: Any, target: Any, config: Any, folder: Path) -> None:
    if not (target.arch == 100 and triton.__version__.startswith("3.4.")):  # it spills a few
        assert_no_spills(kernel, folder)
    barriers = 256
    # By which a configuration is left out:
    assert kernel.metadata.shared <= config.shared_memory + barriers
    assert kernel.metadata.shared <= SHARED_MEMORY[target.arch]
    ptx = kernel.asm["ptx"]
    multiply, copy = {
        80: ("mma.sync.aligned.m16n8k16", "cp.async.cg.shared.global"),  # cg: 16 bytes
        90: ("wgmma.mma_async.sync", "cp.async.bulk.tensor.2d.shared"),
        100: ("tcgen05.mma.cta_group", "cp.async.bulk.tensor.2d.shared"),
    }[target.arch]
    assert multiply in ptx
    assert copy in ptx
    assert "cp.async.ca" not in ptx
    # y is written 16 bytes at a time.
    assert "st.global.v4.b32" in ptx
    assert not re.search(r"st\.global(\.v\d)?\.b16", ptx)


@compiled
@each_candidate
def test_compiled(target: Any, config: Any, tmp_path: Path) -> None:
    """Every configuration that may be chosen, for q and k together."""
    kernel = compile_projection(target, config, tmp_path)
    check_compiled(kernel, target, config, tmp_path)


@compiled
@pytest.mark.parametrize("target", NVIDIA, ids=target_id)
@pytest.mark.parametrize(
    "variant",
    [
        {"dtype": "fp16", "metric": "rms"},
        {"bias": False, "mask": False, "metric": "max_abs"},
    ],
    ids=["fp16_rms", "max_abs"],
)
def test_compiled_variants(target: Any, variant: dict[str, Any], tmp_path: Path) -> None:
    """One projection alone, in the configuration that is tried first."""
    config = candidates((target.arch // 10, 0))[0]
    kernel = compile_projection(target, config, tmp_path, projections=1, **variant)
    check_compiled(kernel, target, config, tmp_path)


@compiled
def test_not_compiled_for_each_size() -> None:
    """Sizes and strides are no constants; biases and masks may lie anywhere."""
    params = projection_triton._project_kernel.params
    sizes = {p.name for p in params if p.name == "num_tokens" or "vectors" in p.name}
    assert {p.name for p in params if p.do_not_specialize} == sizes
    anywhere = {p.name for p in params if p.do_not_specialize_on_alignment}
    assert anywhere == {"bias0", "bias1", "token_mask"}
    constants = {p.name for p in params if p.is_constexpr}
    assert constants == {"METRIC", "DESCRIPTORS", "TOKENS", "CHANNELS", "IN", "GROUP"}


@compiled
@pytest.mark.parametrize("target", NVIDIA, ids=target_id)
def test_sums_stay_in_a_thread(target: Any, tmp_path: Path) -> None:
    """Few exchanges between threads: a product that is not transposed takes hundreds."""
    config = candidates((target.arch // 10, 0))[0]
    kernel = compile_projection(target, config, tmp_path)
    assert len(re.findall(r"\bSHFL\b", cuobjdump("-sass", kernel, tmp_path))) <= 48


@compiled
def test_compiled_for_amd(tmp_path: Path) -> None:
    for config in candidates(None):
        try:
            kernel = compile_projection(AMD, config, tmp_path)
        except Exception as error:
            if "TRITON_HIP_LLD_PATH" not in str(error):
                raise
            pytest.skip(f"older Tritons need ROCm's linker: {error}")
        assert re.search(r"\.vgpr_spill_count:\s*0\b", kernel.asm["amdgcn"])
        assert kernel.metadata.shared <= 64 * 1024
        assert "v_mfma" in kernel.asm["amdgcn"]
