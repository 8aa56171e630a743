"""The corners of the native cores and their table that breaking the code on purpose showed."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import Case, Guarded, assert_same_bits, bits, guarded, one_thread, pick_rows
from test_masked_adamw import MakeTable, make_groups, make_table, run
from torch import Tensor

from longact.kernels.masked_adamw import CudaTable, NativeTable, dispatch, native_supports
from longact.kernels.rounding import stochastic_round

__all__ = ["make_table"]
pytestmark = pytest.mark.usefixtures(one_thread.__name__)
CPU = torch.device("cpu")
INT32 = torch.int32


@pytest.fixture
def table(cuda_on_host: ModuleType) -> CudaTable:
    return CudaTable(CPU, module=cuda_on_host)


@pytest.mark.parametrize("shift", [1, 8])  # single elements, whole vectors
@pytest.mark.parametrize(
    "bad",
    [
        {0: 3, 1: 1}, {1: 1}, {1: 200}, {138: 200}, {0: -1}, {0: -5, 1: -3}, {1: 2**31 - 1},
        {64: 64}, {64: 5},  # the first of a chunk of 64 rows
    ],
    ids=str,
)  # fmt: skip
def test_rows_that_do_not_fit_are_left_alone(
    table: CudaTable, bad: dict[int, int], shift: int
) -> None:
    """Overwritten in place after they were checked: nothing may be written out of bounds."""
    case = Case((200, 8), rows=torch.arange(1, 140, dtype=INT32), shift=shift)
    case.new_grad()
    case.grad.tensor.nan_to_num_(nan=1.0)
    table.prepare([case.update], make_groups())
    before = case.snapshot()
    for position, row in bad.items():
        case.rows[position] = row
    table.run(make_groups(), 1.0, None)
    case.check_guards("bad rows")
    previous, times = -(2**31), torch.zeros(200, dtype=INT32)
    for row in case.rows.tolist():
        if 0 <= row < 200 and previous < row:
            times[row] += 1
        previous = row
    assert torch.equal(case.ages.tensor, times)
    for i, (old, new) in enumerate(zip(before, case.snapshot(), strict=True)):
        if old is not None and old.dim():
            assert torch.equal(old[times == 0], new[times == 0]), f"buffer {i}"


@pytest.mark.parametrize(
    "name", ["param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master"]
)
def test_one_misaligned_buffer_is_enough(cuda_on_host: ModuleType, name: str) -> None:
    """A GPU faults on a misaligned access of 16 bytes; so does the CPU that plays it."""
    results = []
    for table in (NativeTable(), CudaTable(CPU, module=cuda_on_host)):
        rows = pick_rows("random", 40, torch.Generator().manual_seed(1))
        cases = [
            Case((40, 24), torch.bfloat16, rows=rows, shift=8, amsgrad=True, master=True),
            Case((4099,), torch.bfloat16, shift=8, amsgrad=True, master=True, seed=1),
        ]
        for case in cases:
            case.new_grad()
            setattr(case, name, guarded(getattr(case, name).tensor, 1))
        table.update([case.update for case in cases], make_groups())
        for case in cases:
            case.check_guards(name)
        results.append([case.snapshot() for case in cases])
    for mine, theirs in zip(*results, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("shift", [1, 8])
def test_table_follows_a_change_of_policy(make_table: MakeTable, shift: int) -> None:
    """The ages that freeze left behind go on growing, of every row."""
    generator = torch.Generator().manual_seed(2)
    case = Case((200, 24), rows=pick_rows("random", 200, generator), shift=shift)  # 2 chunks, or 4
    table = make_table()
    run([case], make_groups(), 2, table=table)
    case.zero_grad = True
    run([case], make_groups(True), 2, table=table)
    rows, case.rows = case.rows, None
    run([case], make_groups(True), 2, table=table)
    case.rows, case.zero_grad = rows, False
    run([case], make_groups(), 2, table=table)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("shift", [0, 1])
def test_elements_beyond_32_bits(
    table: CudaTable, tmp_path: Path, shift: int, compact: bool
) -> None:
    """64 GiB of bf16 in files without content: only the pages of a few rows ever exist."""
    num_rows, row_len = 2**20 + 2, 2**15
    # After the first one the bytes are beyond 2**32, then the elements, then the groups of 8.
    rows = torch.tensor([1, 2**16 + 3, 2**17 + 1, 2**20 + 1], dtype=INT32)
    picked = rows.long()

    def sparse(name: str) -> Tensor:
        return torch.from_file(
            str(tmp_path / name), shared=True, size=num_rows * row_len + 64, dtype=torch.bfloat16
        )[shift : shift + num_rows * row_len].view(num_rows, row_len)

    small = Case(
        (len(rows), row_len), torch.bfloat16, rows=torch.arange(len(rows), dtype=INT32),
        moment_dtype=torch.bfloat16,
    )  # fmt: skip
    small.new_grad()
    param, grad = sparse("param"), sparse("grad")
    like = small.exp_avg.tensor
    m, v = (guarded(like, shift).tensor for _ in "mv") if compact else (sparse("m"), sparse("v"))
    ages = torch.zeros(len(rows) if compact else num_rows, dtype=INT32)
    for i, row in enumerate(picked.tolist()):
        param[row], grad[row] = small.param.tensor[i], small.grad.tensor[i]
    seed, key = 77, 3
    group = make_groups()[0]
    update = (param, grad, m, v, None, torch.zeros(()), ages, rows, None, key, 0)
    assert table.update([update], [group._replace(seed=seed)]) == []

    twin = [t.clone() if isinstance(t, Tensor) else t for t in small.update]
    twin[0] = twin[0].float()
    NativeTable().update([tuple(twin)], [group])
    elements = picked[:, None] * row_len + torch.arange(row_len)
    at = slice(None) if compact else picked
    assert_same_bits(param[picked], stochastic_round(twin[0], elements, seed, key, 1), "param")
    assert_same_bits(m[at], twin[2], "exp_avg")
    assert_same_bits(v[at], twin[3], "exp_avg_sq")
    for path in tmp_path.iterdir():  # nothing else was ever written
        assert path.stat().st_blocks * 512 <= 2**24
        path.unlink()


@pytest.mark.parametrize(
    ("shape", "rows", "dtype", "vector", "rest"),
    [
        ((40, 24), None, torch.float32, 4, 0),
        ((40, 24), None, torch.bfloat16, 8, 0),
        ((4099,), None, torch.float32, 4, 3),
        ((4099,), None, torch.bfloat16, 8, 3),
        ((5, 7), None, torch.bfloat16, 8, 3),  # flat: 35 elements
        ((3, 16_400), [0, 2], torch.float32, 4, 0),
        ((200, 16), [5], torch.float16, 8, 0),
        ((9, 12), [1, 2], torch.bfloat16, 4, 0),
        ((9, 12), [1, 2], torch.float32, 4, 0),
        ((9, 10), [1, 2], torch.float32, 4, 20),
        ((9, 10), [1, 2], torch.bfloat16, 4, 20),
    ],
)
def test_aligned_elements_go_in_the_widest_vectors(
    table: CudaTable,
    cuda_on_host: ModuleType,
    shape: tuple[int, ...],
    rows: list[int] | None,
    dtype: torch.dtype,
    vector: int,
    rest: int,
) -> None:
    """Slower ones give the same bits: only their number shows them."""
    counter = ctypes.CDLL(cuda_on_host.__file__).cuda_on_host_accesses
    counter.restype = ctypes.c_int64
    chosen = None if rows is None else torch.tensor(rows, dtype=INT32)
    case = Case(shape, dtype, rows=chosen, shift=8, moment_dtype=dtype)
    case.new_grad()
    counter()
    table.update([case.update], make_groups())
    elements = case.param.tensor.numel() if rows is None else len(rows) * shape[1]
    # p, m and v read and written, g read.
    assert counter() == 7 * ((elements - rest) // vector + rest)


@pytest.mark.parametrize("shift", [1, 8])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("target", ["grad", "exp_avg", "param"])
def test_what_is_not_finite_becomes_bf16_as_torch_writes_it(
    make_table: MakeTable, target: str, seed: int | None, amsgrad: bool, shift: int
) -> None:
    """NaN has many patterns; a GPU's own, 0x7fffffff, would turn into -0 if rounded as a number."""
    patterns = [0x7FFFFFFF, -1, 0x7FC00000, -0x400000, 0x7F800001, 0x7F800000, -0x800000]
    values = torch.tensor(patterns).to(INT32).view(torch.float32).repeat(8)
    nan, inf = values.isnan(), values.isinf()
    case = Case((56,), torch.bfloat16, torch.float32, shift=shift, amsgrad=amsgrad)
    case.new_grad()
    getattr(case, target).tensor.copy_(values)
    make_table().update([case.update], [g._replace(seed=seed) for g in make_groups()])
    param = case.param.tensor
    assert (bits(param)[nan] == 0x7FC0).all()
    if target == "param":
        assert torch.equal(param[inf].float(), values[inf])
    if target == "grad" and amsgrad:
        assert torch.equal(case.max_exp_avg_sq.tensor.isnan(), nan)


def capture(table: CudaTable, updates: list, groups: list, *scalars: object) -> None:
    """A capture as far as the table sees it: it runs nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "_capturing", lambda: True)
        patch.setattr(table, "_launch", lambda *_: None)
        table.prepare(updates, groups)
        table.run(groups, *(scalars or (1.0, None)))


def test_a_capture_of_a_table_that_has_grown(table: CudaTable) -> None:
    """Its pinned memory grows with the steps before; a capture of more than that is refused."""
    updates = [Case((8,), seed=i).update for i in range(40)]
    groups = make_groups()
    table.update(updates[:2], groups)
    with pytest.raises(RuntimeError, match="makes something that it has not made before"):
        capture(table, updates, groups)
    table.update(updates[:2], groups)
    table.update(updates, groups)
    capture(table, updates, groups)
    assert table._captured[0].numel() == table._table.packed_size


def test_what_a_captured_step_reads_stays_alive(table: CudaTable) -> None:
    """The converted copies of scale and found_inf are the table's own: nobody else has them."""
    updates = [Case((8,)).update]
    table.update(updates, make_groups())
    scale, found_inf = torch.tensor(4.0).double(), torch.tensor(0.0).double()
    capture(table, updates, make_groups(), scale, found_inf)
    assert [t.item() for t in table._captured if t.dtype == torch.float32] == [4.0, 0.0]


def test_a_row_of_2_to_the_31_elements_is_not_for_the_gpu() -> None:
    for length, fits in ((2**31 - 2**10 - 1, True), (2**31 - 2**10, False)):
        p = torch.empty(1, length, device="meta")
        update = (p, p, p, p, None, torch.zeros((), device="meta"), None, None, None, 0, 0)
        assert native_supports(update, "meta", True) == fits
        assert native_supports(update, "meta", False)


def test_table_follows_the_number_of_groups(make_table: MakeTable) -> None:
    """A group whose parameters have no gradients yet: the same tensors, at another place."""
    case, table, groups = Case((63, 65)), make_table(), make_groups()
    for some in (groups[:1], groups * 3, groups[:1]):
        run([case], some, 2, table=table)


def test_table_follows_every_other_part_of_an_update(make_table: MakeTable) -> None:
    """Ages and a master that move while the rest stays; a key that changes."""
    rows = torch.tensor([1, 5, 6], dtype=INT32)
    case = Case((9, 8), torch.bfloat16, rows=rows, master=True)
    groups, table = make_groups(), make_table()
    run([case], groups, 2, table=table)
    for name in ("ages", "master", "grad", "step"):
        old = getattr(case, name)
        setattr(case, name, guarded(old.tensor.clone(), 3))
        old.buffer.fill_(99)
        run([case], groups, 2, table=table)
        assert bool((old.buffer == 99).all()), f"{name}: written to where it no longer is"


def test_table_follows_a_key_that_changes(make_table: MakeTable) -> None:
    """It names the random bits; the same tensors under another key round another way."""
    groups = [g._replace(seed=5) for g in make_groups()]
    case = Case((63, 65), torch.bfloat16)
    case.new_grad()
    start = [t.clone() if isinstance(t, Tensor) else t for t in case.update]

    def step(table: NativeTable, key: int) -> Tensor:
        for mine, old in zip(case.update, start, strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(old)
        table.update([(*case.update[:9], key, 0)], groups)
        return case.param.tensor.clone()

    table = make_table()
    first, second = step(table, 3), step(table, 4)
    assert not torch.equal(first, second)
    assert_same_bits(second, step(make_table(), 4), "a new table's")


def test_table_follows_data_that_is_swapped(make_table: MakeTable) -> None:
    """`.data = ...`: the same objects, in another place."""
    case, table = Case((63, 65)), make_table()
    run([case], make_groups(), 2, table=table)
    for name in ("param", "exp_avg", "exp_avg_sq"):
        tensor, old = getattr(case, name)
        fresh = guarded(tensor.clone(), 3)
        tensor.data = fresh.tensor
        setattr(case, name, Guarded(tensor, fresh.buffer))
        old.fill_(1e9)
        run([case], make_groups(), 2, table=table)
        assert bool((old == 1e9).all()), f"{name}: written to where it no longer is"


def test_table_follows_a_shape_and_a_layout_that_are_swapped(make_table: MakeTable) -> None:
    """`.data = ...` again: the same objects in the same place."""
    rows = torch.tensor([1], dtype=INT32)
    table, group, step = make_table(), make_groups()[0], torch.zeros(())
    tensors = [torch.ones(4, 16), torch.ones(4, 16), torch.zeros(4, 16), torch.zeros(4, 16)]
    update = (*tensors, None, step, None, rows, None, 0, 0)
    assert table.update([update], [group]) == []
    for t in tensors:
        t.data = t.data.view(8, 8)
    tensors[0].fill_(1.0)
    assert table.update([update], [group]) == []
    assert (tensors[0] != 1).any(1).nonzero().flatten().tolist() == [1]
    tensors[0].data = tensors[0].data.t()
    before = tensors[0].clone()
    assert table.update([update], [group]) == [update]
    assert torch.equal(tensors[0], before)


def test_a_block_counts_itself_after_its_last_look_at_the_step(
    table: CudaTable, cuda_on_host: ModuleType
) -> None:
    """On a GPU the last of the others may write it from then on."""
    watch = ctypes.CDLL(cuda_on_host.__file__).cuda_on_host_watch
    cases = [Case((50_000,)), Case((300, 24), rows=torch.arange(0, 300, 2, dtype=INT32))]
    for case in cases:
        try:
            watch(ctypes.c_void_p(case.step.tensor.data_ptr()))
            run(cases, make_groups(), 2, table=table)
        finally:
            watch(None)


def test_table_forgets_what_it_could_not_do(make_table: MakeTable) -> None:
    """What was handed back at the last step and is gone from this one."""
    table, groups = make_table(), make_groups()
    ordinary, strided = Case((63, 65)), Case((8, 8), seed=1)
    transposed = tuple(t.t() if isinstance(t, Tensor) and t.dim() == 2 else t
                       for t in strided.update)  # fmt: skip
    assert table.update([ordinary.update, transposed], groups) == [transposed]
    assert table.update([ordinary.update], groups) == []


def test_rows_that_the_cpu_refuses_leave_the_gpu_unchanged() -> None:
    class OnGpu:
        on_gpu, runs = True, 0

        def prepare(self, *_: object) -> list[object]:
            return []

        def run(self, *_: object) -> None:
            self.runs += 1

    gpu = OnGpu()
    there = torch.zeros(2, 3, device="meta")
    case = Case((6, 8), rows=torch.tensor([1, 3, 4], dtype=INT32))
    case.new_grad()
    updates = [
        (there, there, there, there, None, there[0, 0], None, None, None, 0, 0),
        case.update,
    ]
    tables = {CPU: NativeTable(), there.device: gpu}
    dispatch(updates, make_groups(), tables=tables, backend="native")
    assert gpu.runs == 1
    case.rows[1] = 9
    with pytest.raises(ValueError, match="rows has 9 after 1"):
        dispatch(updates, make_groups(), tables=tables, backend="native")
    assert gpu.runs == 1
