"""channel_magnitude, topk_rows and row_grad against what they are defined to be."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import INSTRUCTION_SETS, Spec, assert_close, bits, one_thread, threads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from longact.backends import native
from longact.kernels import row_grad as row_grad_module
from longact.kernels.channel_magnitude import METRICS, channel_magnitude, native_cpu, reference
from longact.kernels.row_grad import linear_grads, row_grad
from longact.kernels.topk_rows import (
    CHOSEN,
    NOT_COUNTED,
    NOT_FINITE,
    select_rows,
    topk_rows,
    topk_rows_over,
)

pytestmark = pytest.mark.usefixtures(one_thread.__name__)
needs_native = pytest.mark.skipif(native is None, reason="needs the native build")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
MASKS = ["absent", "bool", "int64", "float", "all", "none"]
#: fp32 sums of values that were read exactly.
SUMS = Spec(1e-6, 1e-30)


def exact(y: Tensor, mask: Tensor | None, metric: str) -> Tensor:
    """The definition in float64, of the values as they are stored (fp64 ones are read as fp32)."""
    values = y.detach().float().double().abs()
    if mask is not None:
        values = values[mask.bool()]
    if metric == "mean_abs":
        return values.sum(0)
    if metric == "rms":
        return values.square().sum(0)
    return values.amax(0) if len(values) else values.new_zeros(values.shape[1])


def make_mask(kind: str, tokens: int) -> Tensor | None:
    if kind == "absent":
        return None
    if kind in ("all", "none"):
        return torch.full((tokens,), kind == "all")
    chosen = torch.rand(tokens) < 0.6
    # An int64 mask of 256s has a zero in every low byte; 0.5 is 0 as an integer.
    return {"bool": chosen, "int64": chosen.long() * 256, "float": chosen * 0.5}[kind]


# ---- channel_magnitude ---------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask_kind", MASKS)
def test_magnitude_of_every_shape(mask_kind: str, dtype: torch.dtype, metric: str) -> None:
    for tokens in (0, 1, 3, 63, 257, 4097):
        for channels in (0, 1, 63, 130, 1025):
            if tokens * channels > 600_000:
                continue
            # Channels of very different sizes, as those of q and k: each within its own.
            y = torch.randn(tokens, channels) * 10 ** (torch.rand(channels) * 4 - 3)
            y = y.to(dtype)
            mask = make_mask(mask_kind, tokens)
            if mask is not None and channels:
                y[mask == 0] = math.nan  # padding is never read into the totals
            total = channel_magnitude(y, mask, metric)
            assert total.dtype == torch.float32
            assert_close(total, exact(y, mask, metric), SUMS, f"{tokens} x {channels}")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_magnitude_of_any_strides(dtype: torch.dtype, metric: str) -> None:
    base = torch.randn(40, 3, 70).to(dtype)
    views = {
        "rows of a wider tensor": base[:, 1],
        "every second row": base[::2, 1],
        "columns": base[:, 1].t(),
        "every second column": base[:, 1, ::2],
        "one row repeated": base[:1, 1].expand(40, 70),
        "one column repeated": base[:, 1, :1].expand(40, 70),
        "odd offset": base.flatten()[1:2001].view(50, 40),
        "one channel of many": base[:, 1, 3:4],
    }
    for name, y in views.items():
        mask = torch.rand(2 * y.shape[0])[::2] < 0.5
        total = channel_magnitude(y, mask, metric)
        assert_close(total, exact(y, mask, metric), SUMS, name)


@pytest.mark.parametrize("metric", ["mean_abs", "rms"])
@pytest.mark.parametrize("mask_kind", ["absent", "bool"])
def test_magnitude_stays_accurate_over_100k_tokens(mask_kind: str, metric: str) -> None:
    """A plain fp32 running sum is off by 1e-4 here."""
    y = torch.rand(100_003, 5) * torch.tensor([1e-3, 1.0, 0.3, 7.0, 1e3])
    mask = make_mask(mask_kind, 100_003)
    total = channel_magnitude(y, mask, metric)
    assert_close(total, exact(y, mask, metric), Spec(2e-6, 0), metric)


@needs_native
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_changes_no_bit(dtype: torch.dtype, metric: str) -> None:
    """Wherever the padding stands, whatever it holds: tokens are summed in their own order."""
    y = torch.randn(1000, 70).to(dtype)
    plain = channel_magnitude(y, None, metric)
    for seed in range(3):
        chosen = torch.rand(1700, generator=torch.Generator().manual_seed(seed)).argsort() < 1000
        padded = torch.full((1700, 70), [math.nan, 1e30, -1.0][seed]).to(dtype)
        padded[chosen] = y
        assert torch.equal(bits(channel_magnitude(padded, chosen, metric)), bits(plain))


@needs_native
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_magnitude_has_the_same_bits_on_every_processor(dtype: torch.dtype, metric: str) -> None:
    y = torch.randn(300, 1041).to(dtype)
    mask = torch.rand(300) < 0.7
    results = []
    for isa in INSTRUCTION_SETS:
        for count in (1, 2, 3):
            with threads(count):
                results.append(bits(native_cpu(y, mask, metric, isa=isa)))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_activations_show(value: float, dtype: torch.dtype, metric: str) -> None:
    """In their channel only, wherever the token stands; not where it does not count."""
    for token in (0, 1, 5, 299, 300):
        y = torch.randn(301, 40).to(dtype)
        y[token, 7] = value
        total = channel_magnitude(y, None, metric)
        assert (~total.isfinite()).nonzero().flatten().tolist() == [7]
        assert total[7].isnan().item() == math.isnan(value)
        mask = torch.ones(301, dtype=torch.bool)
        mask[token] = False
        assert bool(channel_magnitude(y, mask, metric).isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_no_gradient_flows_through_magnitudes(dtype: torch.dtype) -> None:
    """Also where the reference runs: totals that hold on to the graph would hold every forward."""
    y = torch.randn(5, 3).to(dtype).requires_grad_()
    assert not channel_magnitude(y, None, "rms").requires_grad


def test_magnitude_reference_is_the_definition() -> None:
    y = torch.tensor([[1.0, -2.0], [3.0, 4.0], [-5.0, 0.5]])
    mask = torch.tensor([1, 0, 1])
    assert reference(y, mask, "mean_abs").tolist() == [6.0, 2.5]
    assert reference(y, mask, "rms").tolist() == [26.0, 4.25]
    assert reference(y, mask, "max_abs").tolist() == [5.0, 2.0]
    assert reference(y, mask * 0, "max_abs").tolist() == [0.0, 0.0]
    assert reference(y, None, "max_abs").tolist() == [5.0, 4.0]


@pytest.mark.parametrize("metric", METRICS)
def test_totals_add_up_in_the_tensors_given(metric: str) -> None:
    ys, masks = torch.randn(3, 5, 4), torch.rand(3, 5) < 0.6
    masks[0] = True
    totals, tokens = torch.zeros(4), torch.tensor(0)
    for y, mask in zip(ys, [None, *(2.0 * masks[1:])], strict=True):
        assert channel_magnitude(y, mask, metric, out=totals, counted=tokens) is totals
    expected = exact(ys.flatten(0, 1), masks.flatten(), metric)
    assert_close(totals, expected, SUMS, metric)
    assert int(tokens) == int(masks.sum())


@pytest.mark.parametrize("metric", METRICS)
def test_magnitude_under_vmap(metric: str) -> None:
    """Its tensors have no memory that the native core could read."""
    y = torch.randn(3, 5, 4)
    totals = torch.func.vmap(lambda y: channel_magnitude(y, None, metric))(y)
    for got, one in zip(totals, y, strict=True):
        assert_close(got, exact(one, None, metric), SUMS, metric)


Y = torch.ones(4, 3)


@pytest.mark.parametrize(
    "out",
    [
        torch.zeros(4), torch.zeros(3, dtype=torch.float64), torch.zeros(6)[::2],
        torch.zeros(3, device="meta"),
    ],
)  # fmt: skip
def test_magnitude_refuses_totals_that_do_not_fit(out: Tensor) -> None:
    with pytest.raises(ValueError, match=r"out must be a contiguous float32 \[3\]"):
        channel_magnitude(Y, out=out)


@pytest.mark.parametrize(
    "counted", [torch.tensor(0.0), torch.zeros(1).long(), torch.tensor(0, device="meta")]
)
def test_magnitude_refuses_counts_that_do_not_fit(counted: Tensor) -> None:
    before = torch.zeros(3)
    with pytest.raises(ValueError, match="counted must be an int64 scalar"):
        channel_magnitude(Y, out=before, counted=counted)
    assert not before.any()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((Y, None, "mean"), "metric='mean': use one of mean_abs, rms, max_abs"),
        ((Y[0], None, "rms"), r"y must be .* got torch.float32 \[3\]"),
        ((Y[None], None, "rms"), "y must be"),
        ((Y.long(), None, "rms"), "y must be .* got torch.int64"),
        ((Y.cfloat(), None, "rms"), "y must be"),
        ((Y, torch.ones(3), "rms"), r"token_mask must have shape \[4\]"),
        ((Y, torch.ones(4, 1), "rms"), "token_mask must have shape"),
        ((Y, torch.ones(4, device="meta"), "rms"), "on cpu.* on meta"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("call", [channel_magnitude, "op"])
def test_magnitude_refuses_what_does_not_fit(
    call: Any, args: tuple[Any, ...], message: str
) -> None:
    function = torch.ops.longact.channel_magnitude if call == "op" else call
    with pytest.raises(ValueError, match=message):
        function(*args)


# ---- topk_rows -----------------------------------------------------------------------------------


def brute_force(values: list[float], k: int) -> list[int]:
    """The k largest, ties to the lower index, in ascending order: by the definition, one by one."""
    left, chosen = list(range(len(values))), []
    for _ in range(k):
        best = left[0]
        for i in left[1:]:
            if values[i] > values[best]:
                best = i
        chosen.append(best)
        left.remove(best)
    return sorted(chosen)


@pytest.mark.parametrize("dtype", DTYPES)
def test_topk_with_ties(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    for n in (0, 1, 7, 64, 300):
        for levels in (1, 2, 5, 10_000):
            magnitude = torch.randint(0, levels, (n,), generator=generator).to(dtype)
            for k in {0, 1, n // 3, n - 1, n} - {-1}:
                if k > n:
                    continue
                rows = topk_rows(magnitude, k)
                assert rows.dtype == torch.int32
                assert rows.tolist() == brute_force(magnitude.tolist(), k), (n, levels, k)


TINY = [0.0, -0.0, 1e-45, 2e-45, 1e-40, 1.17e-38, math.inf, -math.inf, -1e-45, 1.0]


def test_rows_of_projections_of_one_size_with_other_counts_and_heads() -> None:
    totals, kinds = torch.rand(4, 8), [(2, 8), (3, 8), (2, 4), (1, 4)]
    tokens = torch.tensor(1)
    counts, head_dims = zip(*kinds, strict=True)
    rows, _ = select_rows([*totals], [tokens] * 4, [None] * 4, counts, head_dims, "max_abs")
    for total, (k, head_dim), own in zip(totals, kinds, rows, strict=True):
        (alone,), _ = select_rows([total], [tokens], [None], [k], [head_dim], "max_abs")
        assert own.tolist() == alone.tolist()
        assert len(own) == 8 // head_dim * k


def test_roots_tie_where_squares_do_not() -> None:
    totals = torch.tensor([1.0, 1.0 + 2**-23])
    for metric, row in (("mean_abs", 1), ("rms", 0)):
        (rows,), _ = select_rows([totals], [torch.tensor(1)], [None], [1], [2], metric)
        assert rows.tolist() == [row]


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.sampled_from(TINY) | st.floats(width=32, allow_nan=False), min_size=1, max_size=40),
    st.data(),
)
def test_topk_of_anything(values: list[float], data: st.DataObject) -> None:
    """Denormals are not zero, -0.0 equals 0.0, inf comes first."""
    k = data.draw(st.integers(0, len(values)))
    magnitude = torch.tensor(values, dtype=torch.float32)
    assert topk_rows(magnitude, k).tolist() == brute_force(magnitude.tolist(), k)


@pytest.mark.parametrize("shape", [(4, 9), (2, 3, 9), (0, 9), (1, 1)])
def test_topk_of_batches(shape: tuple[int, ...]) -> None:
    magnitude = torch.randint(0, 4, shape).float()
    rows = topk_rows(magnitude, min(4, shape[-1]))
    assert rows.shape == (*shape[:-1], min(4, shape[-1]))
    for index in torch.cartesian_prod(*(torch.arange(n) for n in shape[:-1])).reshape(
        -1, len(shape) - 1
    ):
        at = tuple(index.tolist())
        assert rows[at].tolist() == brute_force(magnitude[at].tolist(), rows.shape[-1])


def test_topk_of_strided_magnitudes() -> None:
    magnitude = torch.randint(0, 5, (20, 6)).float()
    expected = [brute_force(column, 7) for column in magnitude.t().tolist()]
    assert topk_rows(magnitude.t(), 7).tolist() == expected
    assert topk_rows(magnitude[::2, 0], 4).tolist() == brute_force(magnitude[::2, 0].tolist(), 4)


@pytest.mark.parametrize("call", ["function", "op"])
def test_topk_refuses_what_does_not_fit(call: str) -> None:
    function = topk_rows if call == "function" else torch.ops.longact.topk_rows
    for k in (-1, 4):
        with pytest.raises(ValueError, match=f"k={k}: must lie between 0 and the 3 channels"):
            function(torch.ones(3), k)
    with pytest.raises(ValueError, match="at least one dimension"):
        function(torch.tensor(1.0), 1)


# ---- row_grad ------------------------------------------------------------------------------------

ROWS = [[], [0], [4], [1, 2, 4], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("tokens", [0, 1, 63])
def test_row_grad_is_the_rows_of_the_dense_gradient(tokens: int, rows: list[int]) -> None:
    x, weight = torch.randn(tokens, 7).double(), torch.randn(5, 7).double().requires_grad_()
    dy = torch.randn(tokens, 5).double()
    (dense,) = torch.autograd.grad(F.linear(x, weight), weight, dy)
    for dtype in (torch.int32, torch.int64):
        got = row_grad(dy, x, torch.tensor(rows, dtype=dtype))
        assert_close(got, dense[rows], Spec(1e-12, 1e-13), f"{rows}")
        # What is not selected is not read.
        spoiled = torch.full_like(dy, math.nan)
        spoiled[:, rows] = dy[:, rows]
        assert_close(row_grad(spoiled, x, torch.tensor(rows, dtype=dtype)), got, Spec(0, 0), "NaN")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_grad_of_strided_tensors(dtype: torch.dtype) -> None:
    dy, x = torch.randn(5, 40).to(dtype).t(), torch.randn(40, 14).to(dtype)[:, ::2]
    rows = torch.tensor([0, 3], dtype=torch.int32)
    got = row_grad(dy, x, rows)
    assert got.dtype == dtype
    expected = dy.double()[:, [0, 3]].t() @ x.double()
    spec = Spec(1e-5, 1e-5) if dtype == torch.float32 else Spec(2**-7, 2**-6)
    assert_close(got, expected, spec, "row_grad")


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (63, 200), (4097, 64), (8, 3)])
def test_gathered_columns_are_the_same_bits(
    shape: tuple[int, int], count: int, dtype: torch.dtype
) -> None:
    tokens, channels = shape
    wide = torch.randn(tokens, 2 * channels + 1).to(dtype)
    for y in (wide[:, :channels], wide[:, 1::2], wide[:, :channels].contiguous()):
        for keep in (0.0, 0.3, 1.0):
            rows = torch.randperm(channels)[: round(keep * channels)].sort().values.int()
            assert row_grad_module._is_for_native(y, rows)
            with threads(count):
                got = row_grad_module._columns(y, rows)
            assert torch.equal(bits(got), bits(y.index_select(1, rows).t()))


def test_columns_with_a_tangent_or_a_pending_sign_are_read_right() -> None:
    dy, x, rows = torch.randn(6, 5), torch.randn(6, 3), torch.tensor([1, 4], dtype=torch.int32)
    negative = torch._neg_view(dy)  # what a complex parameter's gradient can be
    torch.testing.assert_close(row_grad(negative, x, rows), -(dy.t() @ x)[rows.long()])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(dy, 2 * dy)
        tangent = torch.autograd.forward_ad.unpack_dual(row_grad(dual, x, rows)).tangent
    torch.testing.assert_close(tangent, 2 * (dy.t() @ x)[rows.long()])


def test_row_grad_is_differentiable_again() -> None:
    dy, x = torch.randn(6, 5).double().requires_grad_(), torch.randn(6, 3).double().requires_grad_()
    rows = torch.tensor([1, 4], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda a, b: row_grad(a, b, rows), (dy, x))


def test_row_grad_refuses_what_does_not_fit() -> None:
    dy, x, rows = torch.ones(6, 5), torch.ones(6, 3), torch.tensor([1], dtype=torch.int32)
    for function in (row_grad, torch.ops.longact.row_grad):
        for bad in ((dy[0], x, rows), (dy, x[0], rows), (dy, x[:5], rows), (dy[None], x, rows)):
            with pytest.raises(ValueError, match=r"grad_output must be \[tokens, out\]"):
                function(*bad)
        for bad_rows in (rows[None], rows.float(), rows.bool(), torch.tensor(1)):
            with pytest.raises(ValueError, match=r"rows must be int32 or int64 \[k\]"):
                function(dy, x, bad_rows)
        for beyond in ([5], [-1]):
            with pytest.raises((IndexError, RuntimeError, ValueError)):
                function(dy, x, torch.tensor(beyond, dtype=torch.int32))


# ---- selecting for several projections -----------------------------------------------------------


def test_select_rows_of_every_kind_of_projection() -> None:
    """One by one by the definition; those that cannot be chosen keep what they had."""
    totals = [torch.rand(12), torch.rand(6), torch.rand(8), torch.rand(8), torch.rand(4)]
    totals[1][:] = 1.0  # ties
    totals[2][5] = math.nan
    totals[3][2] = math.inf
    tokens = [torch.tensor(n) for n in (7, 7, 7, 0, 0)]
    previous = [torch.tensor(r, dtype=torch.int32) for r in ([1, 2], [3, 4], [0, 1, 2])]
    previous = [None, None, *previous]
    for metric in METRICS:
        rows, status = select_rows(
            totals, tokens, previous, [2, 2, 2, 2, 2], [4, 6, 8, 8, 4], metric
        )
        assert status.tolist() == [CHOSEN, CHOSEN, NOT_FINITE, NOT_COUNTED, NOT_COUNTED]
        heads = totals[0].view(3, 4).tolist()
        by_head = [4 * i + r for i, head in enumerate(heads) for r in brute_force(head, 2)]
        assert [r.tolist() for r in rows[:4]] == [by_head, [0, 1], [1, 2], [3, 4]]
        assert len(rows[4]) == 2  # three do not fit
        assert all(r.dtype == torch.int32 for r in rows)


@pytest.mark.parametrize(
    ("k", "head_dim", "metric", "message"),
    [
        (1, 6, "mean", "metric='mean': use one of"),
        (1, 4, "rms", "head_dim=4: 6 channels"),
        (1, 0, "rms", "head_dim=0"),
        (4, 3, "rms", "k=4: must lie between 0 and the 3 channels of a head"),
        (-1, 3, "rms", "k=-1"),
    ],
)
def test_select_rows_refuses_what_does_not_fit(
    k: int, head_dim: int, metric: str, message: str
) -> None:
    total, tokens = torch.rand(6), torch.tensor(3)
    with pytest.raises(ValueError, match=message):
        select_rows([total], [tokens], [None], [k], [head_dim], metric)
    with pytest.raises(ValueError, match=message):
        torch.ops.longact.select_rows(total, tokens, None, k, head_dim, metric)


def test_magnitudes_are_means_before_they_are_ranked() -> None:
    """Division makes ties, which then go to the lower index, and infinities."""
    smallest = torch.tensor(1e-45)
    totals = torch.stack([smallest, 2 * smallest, smallest * 0])
    rows, _ = select_rows([totals], [torch.tensor(4)], [None], [1], [3], "mean_abs")
    assert rows[0].tolist() == [0]  # all of them 0
    rows, _ = select_rows([totals], [torch.tensor(4)], [None], [1], [3], "max_abs")
    assert rows[0].tolist() == [1]


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=4), st.data()
)
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
def test_topk_over_several_projections(values: list[list[int]], data: st.DataObject) -> None:
    together = [float(v) for projection in values for v in projection]
    k = data.draw(st.integers(0, len(together)))
    rows = topk_rows_over([torch.tensor(v).float() for v in values], k)
    start, expected = 0, brute_force(together, k)
    for projection, own in zip(values, rows, strict=True):
        end = start + len(projection)
        assert own.tolist() == [i - start for i in expected if start <= i < end]
        assert own.dtype == torch.int32
        start = end


# ---- the gradients of a linear layer -------------------------------------------------------------


@pytest.mark.parametrize("rows", [[], [0], [1, 4], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_grads_are_the_row_gradient_in_its_place(bias: bool, rows: list[int]) -> None:
    dy, x = torch.randn(6, 5), torch.randn(6, 3)
    weight, of_bias = linear_grads(dy, x, torch.tensor(rows, dtype=torch.int32), bias)
    others = [r for r in range(5) if r not in rows]
    torch.testing.assert_close(weight[rows], (dy.t() @ x)[rows])
    assert not weight[others].any()
    if bias:
        torch.testing.assert_close(of_bias[rows], dy.sum(0)[rows])
        assert not of_bias[others].any()


# ---- the ops -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", [None, torch.tensor([1, 0, 1, 1])])
def test_opcheck_of_channel_magnitude(mask: Tensor | None, dtype: torch.dtype) -> None:
    for metric in METRICS:
        arguments = (torch.randn(4, 6).to(dtype), mask, metric)
        torch.library.opcheck(torch.ops.longact.channel_magnitude.default, arguments)


@pytest.mark.parametrize("shape", [(6,), (2, 6)])
def test_opcheck_of_topk_rows(shape: tuple[int, ...]) -> None:
    for k in (0, 2, 6):
        torch.library.opcheck(torch.ops.longact.topk_rows.default, (torch.randn(shape), k))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_of_row_grad(dtype: torch.dtype, requires_grad: bool) -> None:
    dy, x = (torch.randn(6, n).to(dtype).requires_grad_(requires_grad) for n in (5, 3))
    arguments = (dy, x, torch.tensor([1, 4], dtype=torch.int32))
    torch.library.opcheck(torch.ops.longact.row_grad.default, arguments)


@pytest.mark.parametrize("previous", [None, torch.tensor([1, 2], dtype=torch.int32)])
def test_opcheck_of_select_rows(previous: Tensor | None) -> None:
    for head_dim, tokens in ((6, 3), (3, 3), (6, 0)):
        arguments = (torch.rand(6), torch.tensor(tokens), previous, 2, head_dim, "rms")
        torch.library.opcheck(torch.ops.longact.select_rows.default, arguments)


@pytest.mark.parametrize("bias", [False, True])
def test_opcheck_of_linear_grads(bias: bool) -> None:
    rows = torch.tensor([1, 4], dtype=torch.int32)
    arguments = (torch.randn(6, 5), torch.randn(6, 3), rows, bias)
    torch.library.opcheck(torch.ops.longact.linear_grads.default, arguments)


def _magnitude(y: Tensor, mask: Tensor) -> Tensor:
    return channel_magnitude(y * 2, mask, "rms") + 1


def _topk(y: Tensor, mask: Tensor) -> Tensor:
    return topk_rows(channel_magnitude(y, mask), 3) + 0


def _row_grad(y: Tensor, mask: Tensor) -> Tensor:
    rows = topk_rows(y.abs().sum(0), 2)
    return row_grad(y, y * mask[:, None], rows) * 2


def _ops(y: Tensor, mask: Tensor) -> Tensor:
    ops = torch.ops.longact
    return ops.row_grad(y, y, ops.topk_rows(ops.channel_magnitude(y, mask, "max_abs"), 2))


@pytest.mark.parametrize("function", [_magnitude, _topk, _row_grad, _ops])
def test_compiled_ops_give_the_eager_results(function: Callable[..., Tensor]) -> None:
    """In one graph; also with shapes that change. The results, not only that it compiles."""
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (9, 30):
        y, mask = torch.randn(tokens, 8), torch.rand(tokens) < 0.6
        got, expected = compiled(y, mask), function(y, mask)
        assert got.dtype == expected.dtype
        assert_close(got, expected, Spec(1e-6, 1e-7), "compiled")
