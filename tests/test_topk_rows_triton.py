"""The Triton top-k: against the reference, in Triton's interpreter or on a GPU, and compiled ahead
of time for GPUs that are not here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import triton_tools
from helpers import one_thread
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton_tools import (
    AMD,
    DEVICE,
    INTERPRETED,
    NVIDIA,
    SHARED_MEMORY,
    assert_no_spills,
    compile_kernel,
    compiled,
    no_reads_by_the_host,
    registers,
    target_id,
)

from longact.kernels.channel_magnitude import METRICS
from longact.kernels.topk_rows import reference

triton = pytest.importorskip("triton")
topk_rows_triton = pytest.importorskip("longact.kernels.topk_rows_triton")

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

SIZES = [1, 2, 63, 64, 65, 576, 1000]
POISON = -7
NAN = [0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0xFFC00000, 0xFF800001]  # of either sign
FEW = [0.0, -0.0, 1e-45, -1e-45, 2e-45, 1.17e-38, 1.0, -1.0, 3e38, math.inf, -math.inf]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Many programs, and rounds of every loop, even for small tensors."""
    for name, value in {"_TILE": 64, "_PART": 16, "_MIN_WIDTH": 8, "_BLOCK": 32}.items():
        monkeypatch.setattr(topk_rows_triton, name, value)
    topk_rows_triton._plan.cache_clear()
    yield
    topk_rows_triton._plan.cache_clear()


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors hold a value that no row has."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(POISON))


def runs_kernels(test: Callable[..., None]) -> Callable[..., None]:
    fixtures = pytest.mark.usefixtures(small_tiles.__name__, poison.__name__)
    return fixtures(triton_tools.runs_kernels(test))


def floats(bits: Sequence[int]) -> Tensor:
    return torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)


def make(kind: str, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)

    def pick(values: Tensor) -> Tensor:
        return values[torch.randint(0, len(values), shape, generator=generator)]

    if kind == "random":
        return torch.randn(shape, generator=generator)
    if kind == "bits":  # every class of number, NaN of all kinds
        return torch.randint(-(2**31), 2**31, shape, generator=generator).int().view(torch.float32)
    if kind == "near":  # that differ in their last bits only
        return (torch.randint(0, 9, shape, generator=generator).int() + 0x3F800000).view(
            torch.float32
        )
    if kind == "denormals":
        return torch.randint(0, 40, shape, generator=generator).int().view(torch.float32)
    values = {
        "ties": [1.0, 2.0, 3.0],
        "equal": [0.25],
        "zeros": [0.0, -0.0],
        "few": FEW,
        "huge": [3.4e38, 3.3999e38, math.inf],
    }
    return pick(floats([*NAN, 0, 0x3F800000]) if kind == "nan" else torch.tensor(values[kind]))


KINDS = [
    "random", "bits", "near", "denormals", "ties", "equal", "zeros", "few", "huge", "nan",
]  # fmt: skip


def topk(magnitude: Tensor, k: int) -> Tensor:
    rows = topk_rows_triton.topk_rows(magnitude.to(DEVICE), k)
    assert rows.dtype == torch.int32
    return rows.cpu()


# ---- topk_rows -----------------------------------------------------------------------------------


@runs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_topk_is_the_reference(kind: str) -> None:
    for n in SIZES:
        magnitude = make(kind, n, seed=n)
        for k in (1, 2, n // 2, n - 1, n) if n == 63 else (max(1, n // 3),):
            assert torch.equal(topk(magnitude, k), reference(magnitude, k)), (n, k)


@runs_kernels
@pytest.mark.parametrize("n", [4097, 16_384])
def test_topk_of_many_channels(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the tiles that GPUs have; all of them equal, too, which is the most to count."""
    monkeypatch.undo()
    for kind in ("random", "ties", "equal"):
        magnitude = make(kind, n)
        for k in (1, n // 3, n) if kind == "random" else (n - 1,):
            assert torch.equal(topk(magnitude, k), reference(magnitude, k)), (kind, k)


@runs_kernels
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.lists(
        st.sampled_from(FEW)
        | st.floats(width=32, allow_nan=False)
        | st.sampled_from(NAN).map(lambda bits: floats([bits]).item()),
        min_size=1,
        max_size=40,
    ),
    st.data(),
)
def test_topk_of_anything(values: list[float], data: st.DataObject) -> None:
    magnitude = torch.tensor(values, dtype=torch.float32)
    k = data.draw(st.integers(0, len(values)))
    assert torch.equal(topk(magnitude, k), reference(magnitude, k))


@runs_kernels
@pytest.mark.parametrize("bits", NAN)
def test_nan_is_the_largest_whatever_its_sign(bits: int) -> None:
    magnitude = torch.tensor([math.inf, -1.0, 0.0, math.inf, 5.0, 0.0])
    magnitude[[2, 5]] = floats([bits])
    assert topk(magnitude, 1).tolist() == [2]
    assert topk(magnitude, 3).tolist() == [0, 2, 5]
    assert topk(magnitude, 5).tolist() == [0, 2, 3, 4, 5]


@runs_kernels
@pytest.mark.parametrize("shape", [(1, 5), (7, 9), (2, 3, 33), (9, 8), (40, 3), (3, 100), (3, 1)])
def test_topk_of_batches(shape: tuple[int, ...]) -> None:
    """Several rows in a program, a row in several parts, and programs that are not full."""
    for kind, k in (("ties", shape[-1] // 2 or 1), ("bits", 1), ("bits", shape[-1])):
        magnitude = make(kind, *shape)
        rows = topk(magnitude, k)
        assert rows.shape == (*shape[:-1], k)
        assert torch.equal(rows, reference(magnitude, k)), (kind, k)


@runs_kernels
def test_topk_of_any_strides() -> None:
    base = make("ties", 12, 12).to(DEVICE)
    views = [
        base.t(), base[::2], base[:, ::3], base[3:, 1:9], base[5], base[:, 4],
        base[:1].expand(9, 12),
        base.view(4, 3, 12).transpose(0, 1), base.view(4, 3, 12).transpose(1, 2),
        torch._neg_view(base),
    ]  # fmt: skip
    for i, view in enumerate(views):
        expected = reference(view.resolve_neg().contiguous().cpu(), 3)
        assert torch.equal(topk_rows_triton.topk_rows(view, 3).cpu(), expected), i


@runs_kernels
@pytest.mark.parametrize(
    ("shape", "k"), [((0,), 0), ((5,), 0), ((0, 4), 2), ((3, 0), 0), ((2, 0, 6), 6)]
)
def test_topk_of_nothing(shape: tuple[int, ...], k: int) -> None:
    rows = topk(torch.zeros(shape), k)
    assert rows.shape == (*shape[:-1], k)


# ---- select_rows ---------------------------------------------------------------------------------


def magnitude_of(total: Tensor, tokens: int, metric: str) -> Tensor:
    """In fp64, from which every step rounds right: torch's square root on the CPU may not."""
    if metric == "max_abs":
        return total
    mean = (total.double() / torch.tensor(tokens).float()).float()
    return mean.double().sqrt().float() if metric == "rms" else mean


class Projections:
    """What `select_rows` is called with, and what it must give."""

    def __init__(self, sizes: Sequence[tuple[int, int, int]], kind: str = "ties") -> None:
        """sizes: heads, channels of a head, k of a head"""
        self.sizes = sizes
        self.totals = [
            make(kind, heads * head_dim, seed=i).abs()
            for i, (heads, head_dim, _) in enumerate(sizes)
        ]
        self.tokens = [3 + i for i in range(len(sizes))]
        self.previous: list[Tensor | None] = [None for _ in sizes]

    def keep_previous(self) -> list[Tensor]:
        previous = [
            (torch.arange(heads * k) * 5 + 100_000 * (i + 1)).int()
            for i, (heads, _, k) in enumerate(self.sizes)
        ]
        self.previous = list(previous)
        return previous

    def select(self, metric: str = "mean_abs") -> tuple[list[Tensor], list[int]]:
        def there(tensors: Sequence[Any]) -> list[Any]:
            return [None if t is None else t.to(DEVICE) for t in tensors]

        rows, status = topk_rows_triton.select_rows(
            there(self.totals),
            there([torch.tensor(t) for t in self.tokens]),
            there(self.previous),
            [k for _, _, k in self.sizes],
            [head_dim for _, head_dim, _ in self.sizes],
            metric,
        )
        assert status.dtype == torch.int32
        assert all(r.dtype == torch.int32 and r.is_contiguous() for r in rows)
        self.check_buffer(rows)
        return [r.cpu() for r in rows], status.tolist()

    def check_buffer(self, rows: Sequence[Tensor]) -> None:
        """Rows begin at addresses that 16 divides, and the gaps between them are not written."""
        buffer = rows[0]._base
        assert buffer is not None
        gaps = torch.ones(buffer.shape, dtype=torch.bool)
        for r in rows:
            assert r.storage_offset() % 4 == 0
            gaps[r.storage_offset() : r.storage_offset() + r.numel()] = False
        assert gaps.sum() < 4 * len(rows)
        assert bool((buffer.cpu()[gaps] == POISON).all())

    def largest(self, i: int, metric: str = "mean_abs") -> Tensor:
        heads, head_dim, k = self.sizes[i]
        magnitude = magnitude_of(self.totals[i], self.tokens[i], metric)
        rows = reference(magnitude.view(heads, head_dim), k)
        return (rows + torch.arange(heads)[:, None] * head_dim).flatten().int()


LAYERS = {
    "one": [(1, 40, 12)],
    "smallest": [(1, 1, 1)],
    "several": [(1, 64, 19), (1, 16, 5), (1, 64, 64), (1, 100, 1), (1, 7, 2), (1, 1, 1)],
    "heads": [(9, 64, 19), (3, 64, 19), (3, 80, 24), (5, 96, 29), (1, 96, 95)],
    "many heads": [(40, 8, 2), (9, 8, 3), (1, 8, 1), (17, 5, 5), (33, 3, 1), (8, 8, 7)],
    "both": [(6, 10, 3), (1, 33, 10)],
}


@runs_kernels
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", LAYERS)
def test_rows_of_many_projections(name: str, metric: str) -> None:
    """Of any sizes and head counts in one launch, few of them whole tiles."""
    kind = {"mean_abs": "ties", "rms": "random", "max_abs": "denormals"}[metric]
    projections = Projections(LAYERS[name], kind)
    rows, status = projections.select(metric)
    for i, chosen in enumerate(rows):
        assert torch.equal(chosen, projections.largest(i, metric)), i
    assert status == [0] * len(rows)


@runs_kernels
def test_rows_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real sizes, in the tiles that GPUs have."""
    monkeypatch.undo()
    topk_rows_triton._plan.cache_clear()
    for sizes in ([(1, 4096, 1229), (1, 1024, 307)], [(32, 128, 38), (8, 128, 38), (40, 128, 38)]):
        projections = Projections(sizes, "near")
        buffer_is_checked_elsewhere = lambda rows: None  # noqa: E731
        monkeypatch.setattr(projections, "check_buffer", buffer_is_checked_elsewhere)
        rows, _ = projections.select("rms")
        for i, chosen in enumerate(rows):
            assert torch.equal(chosen, projections.largest(i, "rms")), (sizes, i)


@runs_kernels
@pytest.mark.parametrize("metric", METRICS)
def test_each_projection_is_divided_by_its_own_tokens(metric: str) -> None:
    """Totals that differ in their last bit, and means that do not: ties, to the lower index."""
    total = (torch.arange(64, dtype=torch.int32) + 0x3FFF0000).view(torch.float32)
    projections = Projections([(1, 64, 20)] * 4)
    projections.totals = [total] * 4
    projections.tokens = [1, 3, 10, 2**24 + 1]
    rows, _ = projections.select(metric)
    for i, chosen in enumerate(rows):
        assert torch.equal(chosen, projections.largest(i, metric)), i
    if metric != "max_abs":
        assert len({tuple(r.tolist()) for r in rows}) > 1


BAD = [math.nan, -math.nan, math.inf, -math.inf]


@runs_kernels
@pytest.mark.parametrize(
    ("metric", "place", "with_previous"),
    [("mean_abs", 70, True), ("rms", 0, True), ("max_abs", -1, True), ("rms", 70, False)],
)
def test_rows_stay_where_nothing_can_be_chosen(
    metric: str, place: int, with_previous: bool
) -> None:
    """No token, or a non-finite magnitude at any place: not one bit of the others changes."""
    sizes = [(9, 16, 5), (1, 64, 20), (5, 24, 7), (1, 33, 3), (9, 8, 8), (3, 16, 5)]
    projections = Projections(sizes)
    previous = projections.keep_previous()
    if not with_previous:
        projections.previous = [None] * len(sizes)
    projections.tokens[1] = projections.tokens[2] = 0
    projections.totals[1].zero_()
    for i, bad in zip((0, 2, 4), (BAD[place % 4], math.nan, math.inf), strict=True):
        projections.totals[i][min(place, projections.totals[i].numel() - 1)] = bad
    if place == 0:
        projections.totals[5][:] = 3e38  # finite, if barely
    rows, status = projections.select(metric)
    assert status == [2, 1, 1, 0, 2, 0]
    for i, chosen in enumerate(rows):
        kept = with_previous and status[i] != 0
        expected = previous[i] if kept else projections.largest(i, metric)
        assert torch.equal(chosen, expected), i


@runs_kernels
@pytest.mark.parametrize("bad", BAD)
def test_every_place_is_looked_at(bad: float) -> None:
    """Where one program has a part of the heads, the others must know."""
    for heads, head_dim, places in ((1, 70, (0, 69)), (9, 9, (0, 40, 80))):
        for place in places:
            projections = Projections([(heads, head_dim, 2)] * 2)
            (_, previous) = projections.keep_previous()
            projections.totals[1][place] = bad
            rows, status = projections.select()
            assert status == [0, 2], place
            assert torch.equal(rows[1], previous), place
            assert torch.equal(rows[0], projections.largest(0)), place


@runs_kernels
def test_a_negative_total_has_no_root() -> None:
    projections = Projections([(1, 20, 4)] * 2)
    projections.totals[1][3] = -1.0
    assert projections.select("rms")[1] == [0, 2]
    assert projections.select("mean_abs")[1] == [0, 0]


@runs_kernels
def test_previous_rows_of_another_length_do_not_stay() -> None:
    """As after the keep ratio was changed; those beside them do."""
    sizes = [(1, 40, 9), (3, 8, 2), (1, 16, 5), (3, 8, 2), (1, 7, 1)]
    projections = Projections(sizes)
    previous = projections.keep_previous()
    projections.previous[0] = torch.arange(8).int()
    projections.previous[1] = torch.arange(7).int()
    projections.previous[4] = None
    projections.tokens = [0] * len(sizes)
    rows, status = projections.select()
    assert status == [1] * len(sizes)
    for i, chosen in enumerate(rows):
        expected = previous[i] if i in (2, 3) else projections.largest(i)
        assert torch.equal(chosen, expected), i


@runs_kernels
def test_nothing_to_select() -> None:
    rows, status = topk_rows_triton.select_rows([], [], [], [], [], "rms")
    assert rows == []
    assert status.shape == (0,)


class Launches:
    """Counts the launches of a kernel, and runs it if it is given."""

    def __init__(self, kernel: Any = None) -> None:
        self.kernel, self.grids = kernel, []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.grids.append(grid[0])
            if self.kernel is not None:
                self.kernel[grid](*args, **kwargs)

        return launch


@runs_kernels
def test_a_model_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """And its table is made once for each combination of sizes."""
    launches = Launches()
    monkeypatch.setattr(topk_rows_triton, "_select_kernel", launches)
    uploads: list[list[int]] = []
    upload = topk_rows_triton._upload
    monkeypatch.setattr(
        topk_rows_triton, "_upload", lambda *args: uploads.append(args[0]) or upload(*args)
    )
    projections = Projections([(1, 32, 10), (1, 8, 2)] * 36)
    for _ in range(3):
        projections.select()
    assert launches.grids == [72] * 3
    assert len(uploads) == 1
    projections.keep_previous()
    projections.select()
    Projections([(9, 16, 5)]).select("rms")  # 4 heads of 16 to a program
    assert launches.grids == [72] * 4 + [3]
    assert len(uploads) == 3


@runs_kernels
def test_nothing_waits_for_the_device() -> None:
    projections = Projections([(1, 40, 9), (4, 8, 2)])
    previous = projections.keep_previous()
    totals = [t.to(DEVICE) for t in projections.totals]
    tokens = [torch.tensor(t, device=DEVICE) for t in (5, 0)]
    here = [p.to(DEVICE) % 8 for p in previous]
    with no_reads_by_the_host():
        rows, status = topk_rows_triton.select_rows(totals, tokens, here, [9, 2], [40, 8], "rms")
        one = topk_rows_triton.topk_rows(totals[0], 4)
        over, counts = topk_rows_triton.topk_rows_over(totals, 11)
    assert status.tolist() == [0, 1]
    assert torch.equal(rows[1], here[1])
    assert (one.numel(), over.shape, counts.sum()) == (4, (2, 40), 11)


@runs_kernels
def test_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph holds what was uploaded before it, and nothing is uploaded in it."""
    projections = Projections([(1, 19, 3), (1, 5, 2)])
    totals = [t.to(DEVICE) for t in projections.totals]

    def run() -> None:
        projections.select()
        topk_rows_triton.topk_rows_over(totals, 7)

    monkeypatch.setattr(topk_rows_triton, "_captured", set())
    run()
    assert topk_rows_triton._captured == set()
    monkeypatch.setattr(topk_rows_triton, "is_capturing", lambda: True)
    run()
    run()
    assert len(topk_rows_triton._captured) == 2
    with pytest.raises(RuntimeError, match="before the capture"):
        Projections([(1, 19, 4)]).select()
    with pytest.raises(RuntimeError, match="before the capture"):
        topk_rows_triton.topk_rows_over(totals[:1], 3)


# ---- topk_rows_over ------------------------------------------------------------------------------


def check_over(magnitudes: Sequence[Tensor], k: int) -> None:
    padded, counts = topk_rows_triton.topk_rows_over([m.to(DEVICE) for m in magnitudes], k)
    width = max(m.numel() for m in magnitudes)
    assert padded.shape == (len(magnitudes), width)
    assert padded.dtype == counts.dtype == torch.int32
    chosen = reference(torch.cat(list(magnitudes)), k).long()
    first = 0
    for i, magnitude in enumerate(magnitudes):
        end = first + magnitude.numel()
        mine = (chosen[(chosen >= first) & (chosen < end)] - first).int()
        assert counts[i] == mine.numel(), i
        assert torch.equal(padded[i].cpu()[: mine.numel()], mine), i
        assert bool((padded[i].cpu()[mine.numel() :] == POISON).all()), i
        first = end


@runs_kernels
@pytest.mark.parametrize("kind", ["random", "bits", "denormals", "ties", "equal", "zeros", "nan"])
def test_rows_over_a_model(kind: str) -> None:
    """Blocks of 32 channels, so that a projection has several, and ties across all of them."""
    magnitudes = [make(kind, n, seed=n) for n in (33, 1, 100, 64, 7)]
    for k in (0, 1, 101, 205) if kind == "ties" else (60, 204):
        check_over(magnitudes, k)


@runs_kernels
@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(
    st.lists(
        st.lists(st.sampled_from([*FEW, math.nan]) | st.floats(width=32), max_size=12),
        min_size=1,
        max_size=4,
    ),
    st.data(),
)
def test_rows_over_anything(values: list[list[float]], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, sum(map(len, values))))
    check_over([torch.tensor(v, dtype=torch.float32) for v in values], k)


@runs_kernels
def test_rows_over_many_projections() -> None:
    """More than are added up at a time, and ties that end within one of the last."""
    magnitudes = [make("equal", 1 + i % 4) for i in range(34)]
    check_over(magnitudes, 82)


@runs_kernels
def test_rows_over_a_wide_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wider than one program could hold: any number of channels will do."""
    monkeypatch.setattr(topk_rows_triton, "_BLOCK", 2048)
    check_over([make("near", 20_000), make("near", 5, seed=1)], 6000)


@runs_kernels
def test_rows_over_a_model_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many launches for any number of projections."""
    count, write = (
        Launches(getattr(topk_rows_triton, name)) for name in ("_count_kernel", "_write_kernel")
    )
    monkeypatch.setattr(topk_rows_triton, "_count_kernel", count)
    monkeypatch.setattr(topk_rows_triton, "_write_kernel", write)
    check_over([make("random", 9, seed=i) for i in range(5)], 20)
    assert (count.grids, write.grids) == ([5] * 4, [5])


class Made(TorchDispatchMode):
    """Keeps the memory of every tensor that torch makes."""

    def __init__(self, *tensors: Tensor) -> None:
        super().__init__()
        self.storages = [t.untyped_storage() for t in tensors]

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor._base is None:
                self.storages.append(tensor.untyped_storage())
        return result

    def holds(self, addresses: Any) -> bool:
        inside = torch.zeros(addresses.shape, dtype=torch.bool).numpy()
        for storage in self.storages:
            begin = storage.data_ptr()
            inside |= (addresses >= begin) & (addresses < begin + storage.nbytes())
        return bool(inside.all())


@runs_kernels
@pytest.mark.skipif(not INTERPRETED, reason="looks at the interpreter's addresses")
def test_nothing_beyond_the_tensors_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a GPU may have no memory, or somebody else's."""
    from triton.runtime.interpreter import InterpreterBuilder

    projections = Projections([(5, 9, 4), (1, 41, 7), (1, 1, 1)])
    projections.tokens[1] = 0
    projections.keep_previous()
    made = Made(*projections.totals)
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    accesses = 0

    def checked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        nonlocal accesses
        accesses += 1
        assert made.holds(ptrs.data[mask.data]), "read"
        return load(self, ptrs, mask, *rest)

    def checked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        assert made.holds(ptrs.data[mask.data]), "write"
        return store(self, ptrs, value, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", checked_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", checked_store)
    with made:
        projections.select()
        for magnitude in (*projections.totals, projections.totals[0].view(5, 9)):
            topk_rows_triton.topk_rows(magnitude, 1)
        topk_rows_triton.topk_rows_over(projections.totals, 20)
    assert accesses > 50


# ---- what runs without kernels -------------------------------------------------------------------


def refuses(message: str) -> Any:
    return pytest.raises(ValueError, match=message)


def test_what_does_not_fit_is_refused() -> None:
    topk_rows, over = topk_rows_triton.topk_rows, topk_rows_triton.topk_rows_over
    for k in (-1, 4):
        with refuses(f"k={k}: must lie between 0 and the 3 channels"):
            topk_rows(torch.ones(3), k)
        with refuses(f"k={k}: must lie between 0 and the 3 channels"):
            over([torch.ones(2), torch.ones(1)], k)
    with refuses("fp32"):
        topk_rows(torch.ones(3, dtype=torch.bfloat16), 1)
    with refuses("fp32"):
        topk_rows(torch.tensor(1.0), 1)
    with refuses("16385 channels"):
        topk_rows(torch.ones(16_385), 1)
    for magnitudes in ([], [torch.ones(3).double()], [torch.ones(3, 1)]):
        with refuses("fp32"):
            over(magnitudes, 1)

    def select(total: Tensor, k: int, head_dim: int, metric: str = "rms") -> None:
        topk_rows_triton.select_rows([total], [torch.tensor(1)], [None], [k], [head_dim], metric)

    with refuses("metric='mean'"):
        select(torch.ones(3), 1, 3, "mean")
    with refuses("fp32"):
        select(torch.ones(3).half(), 1, 3)
    with refuses("fp32"):
        select(torch.ones(3, 1), 1, 3)
    for channels, head_dim in ((6, 4), (6, 0), (0, 4)):
        with refuses(f"{channels} channels are not heads of {head_dim}"):
            select(torch.ones(channels), 1, head_dim)
    with refuses("k=4: must lie between 0 and the 3 channels"):
        select(torch.ones(6), 4, 3)
    with refuses("16385 channels"):
        select(torch.ones(16_385), 1, 16_385)


# ---- compiled for GPUs that are not here ---------------------------------------------------------

TYPES = {
    "totals": "*fp32", "tokens": "*i64", "previous": "*i32", "table": "*i32", "rows": "*i32",
    "status": "*i32", "magnitude": "*fp32", "num_rows": "i32", "channels": "i32", "k": "i32",
    "row_stride": "i32", "magnitudes": "*fp32", "firsts": "*i32", "counts": "*i32",
    "num_projections": "i32", "digits": "i32", "taken_counts": "*i32", "width": "i32",
}  # fmt: skip
WIDTHS = [2**i for i in range(6, 15)]  # every tile that there is


def compile_(name: str, target: Any, folder: Path, **constants: Any) -> Any:
    kernel = getattr(topk_rows_triton, name)
    types = {n: t for n, t in TYPES.items() if n in kernel.arg_names}
    num_warps = constants.pop("num_warps")
    return compile_kernel(kernel, types, constants, target, folder, num_warps=num_warps)


def check(kernel: Any, target: Any, folder: Path, num_warps: int) -> None:
    assert_no_spills(kernel, folder)
    assert kernel.metadata.shared <= SHARED_MEMORY[target.arch]
    assert registers(kernel, folder) * num_warps * 32 <= 65_536


def test_every_tile_is_compiled_below() -> None:
    tiles = {
        topk_rows_triton._tile(n)["WIDTH"] for n in range(1, topk_rows_triton.MAX_CHANNELS + 1)
    }
    assert sorted(tiles) == WIDTHS
    assert all(topk_rows_triton._tile(n)["WIDTH"] >= n for n in (1, 64, 65, 4096, 4097, 16_384))
    assert max(topk_rows_triton._tile(n)["num_warps"] for n in WIDTHS) == 32


# All tiles for one architecture, the smallest and the largest for the others.
TILES = [
    (width, target)
    for width in WIDTHS
    for target in NVIDIA
    if target.arch == 90 or width in (WIDTHS[0], WIDTHS[-1])
]


# The metric is a division and a root of each magnitude, whatever the tile: rms has both.
@compiled
@pytest.mark.parametrize(
    ("width", "target", "metric"),
    [
        pytest.param(width, target, metric, id=f"{width}-{target_id(target)}-{metric}")
        for width, target in TILES
        for metric in METRICS
        if metric == "rms" or (width == WIDTHS[-1] and target.arch == 90)
    ],
)
def test_select_kernel_compiles_for_nvidia(
    width: int, target: Any, metric: str, tmp_path: Path
) -> None:
    tile = topk_rows_triton._tile(width)
    kernel = compile_("_select_kernel", target, tmp_path, METRIC=METRICS[metric], **tile)
    check(kernel, target, tmp_path, tile["num_warps"])
    # Division and square root rounded to nearest (Triton 3.4 flushes subnormal numbers).
    ptx = kernel.asm["ptx"]
    divisions, roots = (set(re.findall(rf"{op}\.\S*f32", ptx)) for op in ("div", "sqrt"))
    assert divisions in ([set()] if metric == "max_abs" else [{"div.rn.f32"}, {"div.rn.ftz.f32"}])
    assert roots in ([{"sqrt.rn.f32"}, {"sqrt.rn.ftz.f32"}] if metric == "rms" else [set()])
    assert "atom" not in ptx


@compiled
@pytest.mark.parametrize(
    ("width", "target"),
    [pytest.param(width, target, id=f"{width}-{target_id(target)}") for width, target in TILES],
)
def test_topk_kernel_compiles_for_nvidia(width: int, target: Any, tmp_path: Path) -> None:
    tile = topk_rows_triton._tile(width)
    check(compile_("_topk_kernel", target, tmp_path, **tile), target, tmp_path, tile["num_warps"])


@compiled
@pytest.mark.parametrize("target", NVIDIA, ids=target_id)
@pytest.mark.parametrize("name", ["_count_kernel", "_write_kernel"])
def test_kernels_over_a_model_compile_for_nvidia(name: str, target: Any, tmp_path: Path) -> None:
    kernel = compile_(name, target, tmp_path, BLOCK=topk_rows_triton._BLOCK, num_warps=4)
    check(kernel, target, tmp_path, 4)


@compiled
@pytest.mark.parametrize("width", [128, 16_384])
def test_kernels_compile_for_amd(width: int, tmp_path: Path) -> None:
    tile = topk_rows_triton._tile(width)
    tile["num_warps"] //= 2  # of 64 threads
    block = {"BLOCK": topk_rows_triton._BLOCK, "num_warps": 2}
    try:
        kernels = [
            compile_("_topk_kernel", AMD, tmp_path, **tile),
            compile_("_select_kernel", AMD, tmp_path, METRIC=METRICS["rms"], **tile),
            compile_("_count_kernel", AMD, tmp_path, **block),
            compile_("_write_kernel", AMD, tmp_path, **block),
        ]
    except Exception as error:
        if "TRITON_HIP_LLD_PATH" not in str(error):
            raise
        pytest.skip(f"older Tritons need ROCm's linker: {error}")
    for kernel in kernels:
        assert re.search(r"\.vgpr_spill_count:\s*0\b", kernel.asm["amdgcn"])


@compiled
def test_kernels_do_not_compile_anew_for_each_size() -> None:
    for name in ("_topk_kernel", "_select_kernel", "_count_kernel", "_write_kernel"):
        for parameter in getattr(topk_rows_triton, name).params:
            if not TYPES.get(parameter.name, "*").startswith("*"):
                assert parameter.do_not_specialize, (name, parameter.name)
