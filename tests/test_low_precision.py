"""Parameters of 16 bits: master weights, stochastic rounding, bf16 moments, checkpoints of them."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from helpers import Spec, assert_close, assert_same_bits, assert_same_tree, one_thread
from torch import Tensor
from torch.nn import Parameter

import longact
from longact import FusedMaskedAdam
from longact.backends import native

pytestmark = pytest.mark.usefixtures(one_thread.__name__)
HYPER: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.2}
BACKENDS = [pytest.param("reference"), pytest.param("native", marks=pytest.mark.skipif(
    native is None, reason="needs the native build"))]  # fmt: skip


def grad_of(param: Tensor, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(param.shape, generator=generator).to(param.dtype)


def steps(optimizer: FusedMaskedAdam, first: int, count: int) -> None:
    for step in range(first, first + count):
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = grad_of(param, step)
        optimizer.step()


def new_param(dtype: torch.dtype = torch.bfloat16) -> Parameter:
    return Parameter(torch.randn(6, 5, generator=torch.Generator().manual_seed(99)).to(dtype))


# ---- master weights ------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [None, [0, 2, 3]])
def test_the_master_is_trained_as_an_fp32_parameter_is(
    dtype: torch.dtype, rows: list[int] | None, backend: str
) -> None:
    """Updates far below the parameter's resolution add up, as they do in an fp32 twin."""
    param = new_param(dtype)
    start = param.detach().clone()
    twin = Parameter(param.detach().float())
    longact.set_rows(param, rows)
    longact.set_rows(twin, rows)
    ours = FusedMaskedAdam([param], lr=1e-5, master_weights=True, backend=backend)
    theirs = FusedMaskedAdam([twin], lr=1e-5, backend=backend)
    for step in range(200):
        param.grad = grad_of(param, step).abs()
        twin.grad = param.grad.float()
        ours.step()
        theirs.step()
    assert_same_bits(ours.state[param]["master"], twin.detach(), "master")
    assert_same_bits(param.detach(), twin.detach().to(dtype), "param")
    # Rounded at each step, nothing would ever move.
    assert not torch.equal(param, start)
    plain = Parameter(start.clone())
    lost = FusedMaskedAdam([plain], lr=1e-5, backend=backend)
    for step in range(200):
        plain.grad = grad_of(plain, step).abs()
        lost.step()
    moved = (param - start).abs().max()
    assert (plain - start).abs().max() < moved


def test_fp32_parameters_have_no_master() -> None:
    params = [new_param(), new_param(torch.float32)]
    optimizer = FusedMaskedAdam(params, **HYPER, master_weights=True)
    steps(optimizer, 0, 1)
    assert "master" in optimizer.state[params[0]]
    assert "master" not in optimizer.state[params[1]]


def test_compact_masters_follow_the_selection() -> None:
    """Rows that stay keep their master; one that enters starts at the parameter's value."""
    param = new_param()
    longact.set_rows(param, [1, 4])
    optimizer = FusedMaskedAdam([param], **HYPER, state="compact", master_weights=True)
    steps(optimizer, 0, 3)
    state = optimizer.state[param]
    assert state["master"].shape == (2, 5)
    kept = state["master"][1].clone()
    assert not torch.equal(kept, kept.bfloat16().float())
    left = param.detach()[1].clone()
    longact.set_rows(param, [0, 4])
    param.grad = torch.zeros_like(param)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    assert_same_bits(state["master"][1], kept, "the row that stays")
    assert_same_bits(state["master"][0], param.detach()[0].float(), "the row that enters")
    assert_same_bits(param.detach()[1], left, "the row that left")


def test_a_selection_that_was_empty_gets_its_masters() -> None:
    param = new_param()
    longact.set_rows(param, [])
    optimizer = FusedMaskedAdam([param], **HYPER, state="compact", master_weights=True)
    steps(optimizer, 0, 1)
    longact.set_rows(param, [2])
    steps(optimizer, 1, 2)
    assert optimizer.state[param]["master"].shape == (1, 5)
    assert_same_bits(optimizer.state[param]["master"][0].bfloat16(), param.detach()[2], "param")


def test_masters_cost_what_compact_state_says() -> None:
    param = Parameter(torch.zeros(100, 64, dtype=torch.bfloat16))
    longact.set_rows(param, range(30))
    optimizer = FusedMaskedAdam([param], **HYPER, state="compact", master_weights=True)
    steps(optimizer, 0, 1)
    state = optimizer.state[param]
    size = sum(state[key].nbytes for key in ("exp_avg", "exp_avg_sq", "master"))
    assert size == 3 * 4 * 30 * 64


# ---- stochastic rounding -------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_stochastic_rounding_moves_by_the_update_on_average(backend: str) -> None:
    """Each update is a 256th of the distance to the next bf16 value: rounded, none would count."""
    param = Parameter(torch.ones(20_000, dtype=torch.bfloat16))
    optimizer = FusedMaskedAdam(
        [param], lr=2**-7 / 256, weight_decay=0.0, stochastic_rounding=True, backend=backend
    )
    for _ in range(64):
        param.grad = -torch.ones_like(param)
        optimizer.step()
    moved = (param.double() - 1).mean().item()
    assert moved == pytest.approx(64 * 2**-7 / 256, rel=0.05)


@pytest.mark.skipif(native is None, reason="needs the native build")
def test_every_rank_rounds_alike_and_every_seed_otherwise() -> None:
    """A replica is another process with other addresses, threads and nothing in common but these
    arguments; a masked row draws what it would draw in a dense update."""

    def train(seed: int, threads: int = 1, rows: list[int] | None = None, backend: str = "native"):  # type: ignore[no-untyped-def]
        params = [Parameter(torch.full((700, 130), 1.0 + i, dtype=torch.bfloat16)) for i in (0, 1)]
        for param in params:
            longact.set_rows(param, rows)
        optimizer = FusedMaskedAdam(
            params, lr=1e-3, stochastic_rounding=True, seed=seed, backend=backend
        )
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            for _ in range(2):
                for param in params:
                    param.grad = torch.ones_like(param)
                optimizer.step()
        finally:
            torch.set_num_threads(before)
        return [p.detach() for p in params]

    first, other = train(1), train(1, threads=2)
    for a, b in zip(first, other, strict=True):
        assert_same_bits(a, b, "another replica")
    for a, b in zip(first, train(1, rows=[3, 698], backend="reference"), strict=True):
        assert_same_bits(a[[3, 698]], b[[3, 698]], "a masked row, another backend")
    assert not torch.equal(first[0], train(2)[0])
    # The two parameters get the same update at values of one binade apart: other bits.
    ups = [p != p.flatten()[0] for p in first]
    assert not torch.equal(*ups)


def test_stochastic_rounding_leaves_other_types_alone() -> None:
    for dtype in (torch.float32, torch.float16):
        results = []
        for stochastic in (False, True):
            param = new_param(dtype)
            optimizer = FusedMaskedAdam([param], **HYPER, stochastic_rounding=stochastic)
            steps(optimizer, 0, 3)
            results.append(param.detach())
        assert_same_bits(*results, str(dtype))


# ---- bf16 moments --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_moment_dtype(backend: str) -> None:
    params = [new_param(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)]
    twins = [Parameter(p.detach().clone()) for p in params]
    optimizer = FusedMaskedAdam(
        params, **HYPER, moment_dtype=torch.bfloat16, amsgrad=True, backend=backend
    )
    exact = FusedMaskedAdam(twins, **HYPER, amsgrad=True, backend=backend)
    steps(optimizer, 0, 5)
    steps(exact, 0, 5)
    for param, twin in zip(params, twins, strict=True):
        wanted = torch.float64 if param.dtype == torch.float64 else torch.bfloat16
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            mine, theirs = optimizer.state[param][key], exact.state[twin][key]
            assert mine.dtype == wanted
            assert_close(mine, theirs, Spec(0.03, 1e-3), key)
    default = FusedMaskedAdam([new_param()], **HYPER)
    steps(default, 0, 1)
    (state,) = default.state.values()
    assert state["exp_avg"].dtype == torch.float32


# ---- arguments -----------------------------------------------------------------------------------

BAD: list[tuple[dict[str, Any], str]] = [
    ({"master_weights": True, "stochastic_rounding": True}, "master_weights=True and stochastic"),
    ({"moment_dtype": torch.float16}, "moment_dtype=torch.float16: use None, torch.float32"),
    ({"seed": -1}, "seed=-1: use an integer from 0"),
    ({"seed": 2**64}, "seed=18446744073709551616: use an integer"),
    ({"seed": 1.0}, "seed=1.0: use an integer"),
    ({"capturable": True, "state": "compact"}, "capturable=True with state='compact'"),
    ({"backend": "cuda"}, "backend='cuda': use None, 'native', 'triton' or 'reference'"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FusedMaskedAdam([new_param()], **options)


# ---- checkpoints ---------------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {"master_weights": True},
    {"master_weights": True, "state": "compact"},
    {"stochastic_rounding": True, "seed": 9},
    {"moment_dtype": torch.bfloat16},
]


@pytest.mark.parametrize("options", OPTIONS, ids="-".join)
@pytest.mark.parametrize("way", ["state_dict", "pickle", "deepcopy"])
def test_a_resumed_run_equals_an_uninterrupted_one(options: dict[str, Any], way: str) -> None:
    param = new_param()
    longact.set_rows(param, [0, 3, 5])
    optimizer = FusedMaskedAdam([param], **HYPER, **options)
    steps(optimizer, 0, 5)
    if way == "state_dict":
        file = io.BytesIO()
        torch.save((param.detach(), optimizer.state_dict()), file)
        file.seek(0)
        value, saved = torch.load(file)
        other = Parameter(value)
        resumed = FusedMaskedAdam([other], **HYPER, **options)
        resumed.load_state_dict(saved)
    else:
        how = copy.deepcopy if way == "deepcopy" else lambda o: pickle.loads(pickle.dumps(o))
        resumed = how(optimizer)
        (other,) = resumed.param_groups[0]["params"]
        longact.set_rows(other, [0, 3, 5])
    steps(optimizer, 5, 5)
    steps(resumed, 5, 5)
    assert_same_bits(param.detach(), other.detach(), "param")
    mine, theirs = (
        {k: v for k, v in o.state[p].items() if k != "moment_rows"}
        for o, p in ((optimizer, param), (resumed, other))
    )
    assert_same_tree(mine, theirs)


@pytest.mark.parametrize("to", ["full", "compact"])
def test_masters_move_between_full_and_compact_state(to: str) -> None:
    param = new_param()
    longact.set_rows(param, [0, 3, 5])
    source = "compact" if to == "full" else "full"
    optimizer = FusedMaskedAdam([param], **HYPER, master_weights=True, state=source)
    steps(optimizer, 0, 5)
    master = optimizer.state[param]["master"]
    rows = torch.tensor([0, 3, 5])
    master = master if source == "compact" else master[rows]
    other = Parameter(param.detach().clone())
    moved = FusedMaskedAdam([other], **HYPER, master_weights=True, state=to)
    moved.load_state_dict(optimizer.state_dict())
    other.grad = torch.zeros_like(other)
    moved.param_groups[0]["lr"] = 0.0
    moved.step()
    loaded = moved.state[other]["master"]
    assert loaded.shape == ((6, 5) if to == "full" else (3, 5))
    assert_same_bits(loaded[rows] if to == "full" else loaded, master, "master")
    if to == "full":
        assert_same_bits(loaded[1], other.detach()[1].float(), "a row without one")


def test_a_checkpoint_of_adamw_gets_masters_and_one_with_masters_goes_without() -> None:
    param, other = new_param(), new_param()
    adamw = torch.optim.AdamW([param], **HYPER)
    param.grad = grad_of(param, 0)
    adamw.step()
    ours = FusedMaskedAdam([other], **HYPER, master_weights=True)
    other.data.copy_(param)
    ours.load_state_dict(adamw.state_dict())
    before = other.detach().float()
    ours.param_groups[0]["lr"] = 0.0
    other.grad = torch.zeros_like(other)
    ours.step()
    assert_same_bits(ours.state[other]["master"], before, "master")
    plain = FusedMaskedAdam([new_param()], **HYPER)
    plain.load_state_dict(ours.state_dict())
    (state,) = plain.state.values()
    assert "master" not in state


@pytest.mark.parametrize("bad", [torch.zeros(6, 4), 3.0])
def test_a_master_that_does_not_fit_is_refused(bad: object) -> None:
    param = new_param()
    optimizer = FusedMaskedAdam([param], **HYPER, master_weights=True)
    steps(optimizer, 0, 1)
    saved = optimizer.state_dict()
    before = copy.deepcopy(optimizer.state_dict())
    saved = {**saved, "state": {0: {**saved["state"][0], "master": bad}}}
    with pytest.raises(ValueError, match=r"state of parameter 0 of group 0: master has shape"):
        optimizer.load_state_dict(saved)
    assert_same_tree(optimizer.state_dict(), before)


def test_moments_are_loaded_into_their_type() -> None:
    param = new_param(torch.float32)
    adamw = torch.optim.AdamW([param], **HYPER)
    param.grad = grad_of(param, 0)
    adamw.step()
    for dtype in (torch.bfloat16, None):
        ours = FusedMaskedAdam([new_param(torch.float32)], **HYPER, moment_dtype=dtype)
        ours.load_state_dict(adamw.state_dict())
        (state,) = ours.state.values()
        expected = adamw.state[param]["exp_avg"].to(dtype or torch.float32)
        assert_same_bits(state["exp_avg"], expected, "exp_avg")
