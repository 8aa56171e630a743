"""What only the GPU path has: the table in its memory, one launch, captured steps, device scalars.

The kernel's own source runs on the CPU (tests/cuda_on_host); test_masked_adamw.py compares what it
computes, step by step, with the reference and with the CPU path.
"""

from __future__ import annotations

import ctypes
import math
import re
from types import ModuleType

import pytest
import torch
from helpers import Case, assert_same_bits, guarded, one_thread, pick_rows
from test_masked_adamw import make_cases, make_groups, run
from torch import Tensor

import longact
from longact.backends import native
from longact.kernels.masked_adamw import AdamWGroup, CudaTable, NativeTable
from longact.selection import selection_of

pytestmark = [
    pytest.mark.usefixtures(one_thread.__name__),
    pytest.mark.skipif(native is None, reason="needs the native build"),
]
CPU = torch.device("cpu")
INT32 = torch.int32


@pytest.fixture
def table(cuda_on_host: ModuleType) -> CudaTable:
    return CudaTable(CPU, module=cuda_on_host)


def untouched(cases: list[Case], before: list[list[Tensor | None]]) -> bool:
    return all(
        a is None or torch.equal(a, b)
        for case, old in zip(cases, before, strict=True)
        for a, b in zip(old, case.snapshot(), strict=True)
    )


# ---- what is uploaded, and when ------------------------------------------------------------------


@pytest.fixture
def uploads(table: CudaTable, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each upload of `table`."""
    sizes: list[int] = []
    staging = table._staging

    def counted(size: int) -> Tensor:
        sizes.append(size)
        return staging(size)

    monkeypatch.setattr(table, "_staging", counted)
    return sizes


def test_only_what_changed_is_uploaded(table: CudaTable, uploads: list[int]) -> None:
    cases = make_cases(torch.float32, torch.float32, "random", "freeze", [(63, 65), (40, 24)])
    groups = make_groups()
    run(cases, groups, 1, table=table)
    whole = table._table.packed_size
    assert uploads == [whole, whole]  # the second is the spare of a capture
    uploads.clear()
    run(cases, groups, 3, table=table)
    assert uploads == []  # same gradients in the same place: nothing to say
    cases[1].grad = guarded(cases[1].grad.tensor.clone())
    run(cases, groups, 2, table=table)
    assert len(uploads) == 1
    assert uploads[0] < whole / 2  # the gradients' addresses, not the table
    uploads.clear()
    groups = [group._replace(lr=group.lr / 2) for group in groups]
    run(cases, groups, 2, table=table)
    assert len(uploads) == 1  # a scheduled lr
    assert uploads[0] < whole / 2
    uploads.clear()
    cases[0].rows = pick_rows("one", 63, cases[0].generator)
    run(cases, groups, 2, table=table)
    assert uploads == [whole]


def test_a_table_that_grows_gets_room(table: CudaTable, uploads: list[int]) -> None:
    cases = make_cases(torch.float32, torch.float32, "random", "freeze")
    for count in (1, 5, len(cases), 2):
        run(cases[:count], make_groups(), 1, table=table)
    assert uploads  # and every step was right


# ---- the plan: one launch, and the bytes it moves ------------------------------------------------


def test_qwen3_8b_is_one_launch_of_the_bytes_that_the_model_says(cuda_on_host: ModuleType) -> None:
    """bf16 parameters and gradients, fp32 moments, keep 0.3 of the rows of q and k."""
    shapes = [(151_936, 4096), (151_936, 4096), (4096,)]
    masked = []
    for _ in range(36):
        shapes += [(1024, 4096), (4096, 4096), (128,), (128,), (4096,), (4096,)]
        shapes += [(12_288, 4096), (12_288, 4096), (4096, 12_288)]
        masked += [(4096, 4096), (1024, 4096)]
    table = cuda_on_host.AdamWTable()
    table.resize(len(shapes) + len(masked))
    elements = index_bytes = 0
    for i, shape in enumerate((*shapes, *masked)):
        rows, row_len = shape[0], math.prod(shape[1:])
        kept = -1
        if i >= len(shapes):
            kept = int(0.3 * rows + 0.5)
            index_bytes += 12 * kept  # the row's index, and its age read and written
        elements += (rows if kept < 0 else kept) * row_len
        address = 4096 * (i + 1)
        ages, indices = (address, address) if kept >= 0 else (0, 0)
        table.set(i, address, 0, address, address, 0, address, ages, indices, 0, kept, rows,
                  row_len, 1, 1, 0, 0, i, False)  # fmt: skip
    count = sum(math.prod(shape) for shape in (*shapes, *masked))
    assert count == 8_190_735_360  # the model's published size
    table.pack([4096] * len(table), [(1e-6, 0, 0.9, 0.999, 1e-8, 0.0, False, False, False, 0)])
    chunks, size = table.plan()
    expected = elements * (2 * 2 + 2 + 4 * 4)  # p read and written, g read, m and v
    assert size == expected + index_bytes
    assert abs(size / expected - 1) < 0.01
    # One launch: chunks are its thread blocks, of about equal work.
    assert elements / 16_384 <= chunks < min(2**31, elements / 16_384 * 1.01 + len(table))
    assert table.packed_size < 100_000


@pytest.mark.parametrize("policy", ["none", "freeze", "compact", "zero_grad"])
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"master": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plan_counts_what_the_kernel_moves(
    table: CudaTable,
    cuda_on_host: ModuleType,
    dtype: torch.dtype,
    options: dict[str, object],
    policy: str,
) -> None:
    """Unselected rows cost no traffic at all; every access of an element is counted."""
    counter = ctypes.CDLL(cuda_on_host.__file__).cuda_on_host_bytes
    counter.restype = ctypes.c_int64
    kind = "none" if policy == "none" else "random"
    for shift in (0, 1):
        generator = torch.Generator().manual_seed(1)
        cases = [
            Case(
                shape, dtype, rows=pick_rows(kind, shape[0], generator), shift=shift,
                compact=policy == "compact", zero_grad=policy == "zero_grad", **options,
            )
            for shape in [(40, 24), (4099,), (7, 3, 5), (3, 16_400)]
        ]  # fmt: skip
        for case in cases:
            case.new_grad()
        counter()
        table.update([case.update for case in cases], make_groups(policy == "zero_grad"))
        rows = sum(0 if case.rows is None else case.rows.numel() for case in cases)
        aged = 0 if policy in ("none", "zero_grad") else rows
        assert table.plan()[1] == counter() + 4 * rows + 8 * aged


def test_thousands_of_tensors_in_one_launch(table: CudaTable) -> None:
    """Empty ones among them; every table entry must be found."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(0, 40, (3000,), generator=generator).tolist()
    params = [torch.randn(n, generator=generator) for n in sizes]
    twins = [p.clone() for p in params]
    grads = [torch.randn(n, generator=generator) for n in sizes]

    def updates(tensors: list[Tensor]) -> list[tuple[object, ...]]:
        return [
            (p, g, torch.zeros_like(p), torch.zeros_like(p), None, torch.zeros(()),
             None, None, None, i, 0)
            for i, (p, g) in enumerate(zip(tensors, grads, strict=True))
        ]  # fmt: skip

    mine, theirs = updates(params), updates(twins)
    table.update(mine, make_groups())
    NativeTable().update(theirs, make_groups())
    assert table.plan()[0] == sum(n > 0 for n in sizes)
    for a, b in zip(mine, theirs, strict=True):
        assert_same_bits(a[0], b[0], "param")
        assert a[5].item() == 1.0


# ---- scalars on the device -----------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["none", "freeze", "compact", "zero_grad"])
def test_a_skipped_step_writes_nothing(table: CudaTable, policy: str) -> None:
    kind = "none" if policy == "none" else "random"
    cases = make_cases(torch.float32, torch.float32, kind, policy)
    groups = make_groups(policy == "zero_grad")
    run(cases, groups, 1, table=table)
    for case in cases:
        case.new_grad()
    before = [case.snapshot() for case in cases]
    for value in (1.0, math.inf, math.nan):
        found_inf = torch.tensor([value])
        table.update([case.update for case in cases], groups, 1.0, found_inf)
        assert untouched(cases, before)
    table.update([case.update for case in cases], groups, 1.0, torch.zeros(1))
    assert not untouched(cases, before)
    for case in cases:
        case.step_reference(groups)
        case.compare("after skipped steps")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lr_and_scale_are_read_where_they_are(table: CudaTable, dtype: torch.dtype) -> None:
    """Changed in place between two launches of one table: the kernel must see the new values."""
    cases = make_cases(torch.float32, torch.float32, "random", "freeze", [(63, 65), (4097,)])
    lr, scale = torch.tensor(0.01, dtype=dtype), torch.tensor([4.0])
    groups = [group._replace(lr=lr) for group in make_groups()]
    for step in range(4):
        lr.fill_(0.01 * (step + 1))
        scale.fill_(4.0 * (step + 1))
        for case in cases:
            case.new_grad(float(scale))
        table.update([case.update for case in cases], groups, scale)
        plain = [group._replace(lr=float(lr.float())) for group in groups]
        for case in cases:
            case.step_reference(plain, float(scale))
            case.compare(f"step {step}")


# ---- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_grad", [False, True])
def test_a_buffer_of_rows_changes_between_launches(table: CudaTable, zero_grad: bool) -> None:
    """As a captured step reads it: same addresses, other rows and another number of them."""
    group = make_groups(zero_grad)[0]
    case = Case((200, 24), rows=torch.tensor([1, 3], dtype=INT32), zero_grad=zero_grad)
    buffer = torch.full((201,), -5, dtype=INT32)
    for step, kind in enumerate(("random", "one", "all", "empty", "random", "none")):
        rows = pick_rows(kind, 200, case.generator)
        case.rows = torch.arange(200, dtype=INT32) if rows is None else rows
        case.new_grad()
        buffer[0] = case.rows.numel()
        buffer[1 : 1 + case.rows.numel()] = case.rows
        buffer[1 + case.rows.numel() :] = 0  # rows of before must not be read
        before = case.snapshot()
        if step == 0:
            table.prepare([(*case.update[:7], buffer, *case.update[8:])], [group])
        table.run([group], 1.0, None)
        case.step_reference([group])
        case.compare(f"{kind} {step}")
        case.check_untouched(before, kind)
    case.check_guards("buffer")


@pytest.mark.parametrize("count", [-3, 201, 2**31 - 1])
@pytest.mark.parametrize("zero_grad", [False, True])
def test_a_count_that_does_not_fit_is_cut(table: CudaTable, count: int, zero_grad: bool) -> None:
    case = Case((200, 24), rows=torch.arange(200, dtype=INT32), zero_grad=zero_grad)
    buffer = torch.arange(-1, 200, dtype=INT32)  # row r at its place
    buffer[0] = count
    if count < 0:
        case.rows = torch.empty(0, dtype=INT32)
    case.new_grad()
    group = make_groups(zero_grad)[0]
    table.update([(*case.update[:7], buffer, *case.update[8:])], [group])
    case.step_reference([group])
    case.compare("all rows, or none")
    case.check_guards("all rows, or none")


def test_a_selection_keeps_its_buffer_and_fills_it() -> None:
    param = torch.nn.Parameter(torch.zeros(6, 2))
    longact.set_rows(param, [1, 4])
    selection = selection_of(param)
    buffer = selection.buffer_for(param)
    assert buffer[:3].tolist() == [2, 1, 4]
    longact.set_rows(param, [0, 2, 5])
    assert selection.buffer_for(param) is buffer
    assert buffer[:4].tolist() == [3, 0, 2, 5]
    longact.set_rows(param, [])
    assert buffer[0].item() == 0
    longact.set_rows(param, None)  # all rows: a captured step has no other way to say it
    assert buffer.tolist() == [6, 0, 1, 2, 3, 4, 5]


# ---- capture -------------------------------------------------------------------------------------

NEW_IN_CAPTURE = r"makes something that it has not made before: call step\(\)"


def test_a_capture_makes_no_state_and_no_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays would make them anew, zeros and all."""

    def optimizer_of(param: torch.nn.Parameter) -> longact.FusedMaskedAdam:
        param.grad = torch.zeros_like(param)
        return longact.FusedMaskedAdam([param], capturable=True)

    monkeypatch.setattr(longact.optim, "is_capturing", lambda: True)
    param = torch.nn.Parameter(torch.zeros(4, 3, device="meta"))
    optimizer = optimizer_of(param)
    with pytest.raises(RuntimeError, match=NEW_IN_CAPTURE):
        optimizer.step()
    assert optimizer.state[param] == {}
    selection = longact.selection.Selection(rows=torch.tensor([1], dtype=INT32, device="meta"))
    longact.selection.attach(param, selection)
    with pytest.raises(RuntimeError, match=NEW_IN_CAPTURE):
        optimizer.step()
    assert selection.buffer is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refresh_every": 2}, "refresh_every=2, scope='layer', with rows"),
        ({"refresh_every": "forward"}, "refresh_every='forward'"),
        ({"scope": "model"}, "scope='model'"),
        ({}, "no rows"),
    ],
)
def test_a_capture_of_what_the_host_counts_is_refused(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, object], message: str
) -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(4, 8))
    longact.apply(layer, targets=["0"], **options)
    selection = layer[0].selection
    selection.rows = None if message == "no rows" else torch.tensor([1], dtype=INT32)
    monkeypatch.setattr(longact.selection, "is_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=message):
        longact.selection.before_step([selection])


def test_a_refresh_falls_back_to_rows_that_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured, it reads at each replay what the buffer holds then, not the rows of the capture."""
    monkeypatch.setattr(longact.selection, "_is_remote", lambda tensor: True)
    layer = torch.nn.Sequential(torch.nn.Linear(4, 8))
    longact.apply(layer, 0.25, targets=["0"])
    selection, weight = layer[0].selection, layer[0].weight
    longact.set_rows(weight, [0, 1])
    buffer = selection.buffer_for(weight)
    buffer[1:3] = torch.tensor([5, 7])
    selection.magnitude = torch.full((8,), math.nan)
    selection.tokens = torch.tensor(3)
    longact.selection.refresh([selection], wait=False)
    assert selection.rows.tolist() == [5, 7]
    assert buffer[:3].tolist() == [2, 5, 7]


def test_an_interrupted_upload_is_made_up_for(
    table: CudaTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the next step would run on gradients that are freed by then."""
    cases = make_cases(torch.float32, torch.float32, "random", "freeze", [(63, 65), (4097,)])
    run(cases, make_groups(), 1, table=table)
    old = cases[0].grad
    cases[0].grad = guarded(old.tensor.clone())
    old.buffer.fill_(1e9)

    def interrupted(size: int) -> Tensor:
        raise KeyboardInterrupt

    before = [case.snapshot() for case in cases]
    with monkeypatch.context() as patch:
        patch.setattr(table, "_staging", interrupted)
        with pytest.raises(KeyboardInterrupt):
            table.update([case.update for case in cases], make_groups())
    assert untouched(cases, before)
    run(cases, make_groups(), 2, table=table)


def test_a_captured_step_has_a_table_of_its_own(
    table: CudaTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A capture runs nothing: the next step outside must not take its upload for done."""
    cases = make_cases(torch.float32, torch.float32, "random", "freeze", [(63, 65), (4097,)])
    groups = make_groups()
    run(cases, groups, 1, table=table)
    before = table._memory
    with monkeypatch.context() as patch:
        patch.setattr(table, "_capturing", lambda: True)
        launched: list[int] = []
        fake = type("Fake", (), {})()
        real = table._table
        fake.pack, fake.write, fake.packed_size = real.pack, real.write, real.packed_size
        fake.launch = lambda memory, *_: launched.append(memory)
        patch.setattr(table, "_table", fake)
        cases[0].grad = guarded(cases[0].grad.tensor.clone())
        table.prepare([case.update for case in cases], groups)
        table.run(groups, 1.0, None)
        memory, spare = table._captured[:2]
        assert launched == [memory.data_ptr()]
        assert memory is not before
        assert torch.equal(memory, spare)  # what a replay copies again
        with pytest.raises(RuntimeError, match=NEW_IN_CAPTURE):
            table.run(groups, 1.0, None)
        lr = [group._replace(lr=torch.tensor(0.1)) for group in groups]
        with pytest.raises(RuntimeError, match="lr is a tensor on the CPU"):
            table.run(lr, 1.0, None)
    run(cases, groups, 2, table=table)
    assert table._memory is not memory


# ---- through the optimizer -----------------------------------------------------------------------


def on_cuda_table(
    optimizer: longact.FusedMaskedAdam, module: ModuleType
) -> longact.FusedMaskedAdam:
    optimizer._tables[CPU] = CudaTable(CPU, module=module)
    return optimizer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"state": "compact"},
        {"inactive": "zero_grad"},
        {"amsgrad": True, "maximize": True},
        {"master_weights": True, "state": "compact"},
        {"stochastic_rounding": True, "seed": 5},
        {"moment_dtype": torch.bfloat16},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_the_optimizer_on_the_kernel_is_the_optimizer_on_the_cpu(
    cuda_on_host: ModuleType, options: dict[str, object]
) -> None:
    """22 steps with a selection that changes, parameters that come and go, a scheduled lr."""
    results = []
    for on_cuda in (False, True):
        generator = torch.Generator().manual_seed(11)
        params = [
            torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
            for shape in ((40, 24), (63, 65), (130,))
            for dtype in (torch.float32, torch.bfloat16)
        ]
        optimizer = longact.FusedMaskedAdam(params, lr=0.01, weight_decay=0.2, **options)
        if on_cuda:
            on_cuda_table(optimizer, cuda_on_host)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        for step in range(22):
            for i, param in enumerate(params[:4]):
                if step % 3 == i % 3:
                    rows = pick_rows("random" if step % 2 else "one", param.shape[0], generator)
                    longact.set_rows(param, rows)
            for i, param in enumerate(params):
                grad = torch.randn(param.shape, generator=generator).to(param.dtype)
                param.grad = None if step % 5 == i else grad
            optimizer.step()
            schedule.step()
        results.append(([p.detach() for p in params], [optimizer.state[p] for p in params]))
    for a, b in zip(results[0][0], results[1][0], strict=True):
        assert_same_bits(a, b, "param")
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_bits(a[key], b[key], key)


def test_grad_scaler_skips_and_unscales_on_the_kernel(cuda_on_host: ModuleType) -> None:
    param = torch.nn.Parameter(torch.ones(4, 8))
    longact.set_rows(param, [1, 2])
    optimizer = on_cuda_table(longact.FusedMaskedAdam([param], lr=0.1), cuda_on_host)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    twin = torch.nn.Parameter(torch.ones(4, 8))
    longact.set_rows(twin, [1, 2])
    plain = longact.FusedMaskedAdam([twin], lr=0.1)
    for step in range(3):
        factor = math.inf if step == 1 else 2.0
        optimizer.zero_grad()
        scaler.scale((param * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        if step != 1:
            twin.grad = torch.full_like(twin, 2.0)
            plain.step()
    assert_same_bits(param.detach(), twin.detach(), "param")
    assert optimizer.state[param]["step"].item() == 2.0


# ---- why it cannot run ---------------------------------------------------------------------------

ERRORS: list[tuple[int, int, str]] = [
    (1, 0, r"no NVIDIA driver found: .* built with CUDA 13\.0, install a driver"),
    (1, 12040, r"driver is for CUDA 12\.4: .* built with CUDA 13\.0.* or build .* with an older"),
    (2, 0, "no CUDA device is visible: .*CUDA_VISIBLE_DEVICES"),
    (4, 0, r"built for the host, for tests and this GPU is sm_75: .*LONGACT_CUDA_ARCHS=75"),
    (6, 0, r"this GPU is sm_75: .*LONGACT_CUDA_ARCHS=75"),
    (7, 0, "an error of the fake runtime"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "driver", "message"), ERRORS)
def test_why_cuda_cannot_run(
    table: CudaTable,
    cuda_on_host: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    error: int,
    driver: int,
    message: str,
) -> None:
    assert cuda_on_host.cuda_unusable(0) == ""
    monkeypatch.setenv("CUDA_ON_HOST_ERROR", str(error))
    monkeypatch.setenv("CUDA_ON_HOST_DRIVER", str(driver))
    assert re.search(message, cuda_on_host.cuda_unusable(0))
    case = Case((6, 8))
    before = [case.snapshot()]
    with pytest.raises(RuntimeError, match=message):
        table.update([case.update], [AdamWGroup(0.1, 0.9, 0.9, 1e-8, 0.0, False, False)])
    assert untouched([case], before)


def test_a_device_that_does_not_exist(cuda_on_host: ModuleType) -> None:
    assert cuda_on_host.cuda_unusable(0) == ""
    assert "fake runtime" in cuda_on_host.cuda_unusable(3)
