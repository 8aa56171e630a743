"""Optimizer checkpoints: to and from torch's, in mid-run, bit for bit, or refused with a reason."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Spec, assert_close, assert_same_bits, assert_same_tree, bits, one_thread
from torch import Tensor, nn

import longact
from longact import FusedMaskedAdam

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

FP32 = Spec(3e-6, 1e-6)
SHAPES: list[tuple[int, ...]] = [(6, 5), (7,), (), (0, 3)]


def make_params(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def train(optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for param in parameters(optimizer):
            grad = torch.randn(param.shape, generator=generator)
            param.grad = grad.to(param.dtype)
        optimizer.step()


def through_a_file(state_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True, **kwargs)


def copy_params(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in parameters(optimizer)]


def compare(a: torch.optim.Optimizer, b: torch.optim.Optimizer, what: str) -> None:
    for x, y in zip(parameters(a), parameters(b), strict=True):
        assert_close(x, y, FP32, f"{what}: param")
        assert set(a.state[x]) >= set(b.state[y]) or set(a.state[x]) <= set(b.state[y])
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert_close(a.state[x][key], b.state[y][key], FP32, f"{what}: {key}")


# ---- torch.optim.AdamW and Adam ------------------------------------------------------------------


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("source", [torch.optim.AdamW, torch.optim.Adam])
def test_adamw_checkpoint_resumes_here(source: type, amsgrad: bool) -> None:
    """Mid-run, with the checkpoint's hyperparameters; a plain Adam's has other keys."""
    kwargs = {"lr": 0.02, "betas": (0.8, 0.95), "weight_decay": 0.3, "amsgrad": amsgrad}
    if source is torch.optim.Adam:
        kwargs["weight_decay"] = 0.0  # where Adam and AdamW are the same
    theirs = source(make_params(), **kwargs)
    train(theirs, 0, 10)
    ours = FusedMaskedAdam(copy_params(theirs), lr=9.0, eps=9.0)
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    group = ours.param_groups[0]
    for key in ("lr", "betas", "eps", "weight_decay", "amsgrad"):
        assert group[key] == theirs.param_groups[0][key]
    assert group["inactive"] == "freeze"
    compare(ours, theirs, "loaded")
    for step in range(10, 25):
        train(ours, step, step + 1)
        train(theirs, step, step + 1)
        compare(ours, theirs, f"step {step}")


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("target", [torch.optim.AdamW, torch.optim.Adam])
def test_checkpoint_resumes_in_adamw(target: type, amsgrad: bool) -> None:
    """Also of a parameter that was masked: all rows go on from its step."""
    kwargs = {"lr": 0.02, "betas": (0.8, 0.95), "weight_decay": 0.3, "amsgrad": amsgrad}
    ours = FusedMaskedAdam(make_params(), **kwargs)
    train(ours, 0, 10)
    theirs = target(copy_params(ours), lr=9.0)
    theirs.load_state_dict(through_a_file(ours.state_dict()))
    assert theirs.param_groups[0]["weight_decay"] == 0.3
    compare(theirs, ours, "loaded")
    if target is torch.optim.AdamW:
        train(ours, 10, 25)
        train(theirs, 10, 25)
        compare(theirs, ours, "continued")


def test_dense_state_dict_has_the_keys_of_adamw() -> None:
    ours, theirs = FusedMaskedAdam(make_params()), torch.optim.AdamW(make_params())
    train(ours, 0, 2)
    train(theirs, 0, 2)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys()
    assert mine["param_groups"][0].keys() - other["param_groups"][0].keys() == {"inactive"}
    for i, entry in other["state"].items():
        assert list(mine["state"][i]) == list(entry)
        for key, value in entry.items():
            assert mine["state"][i][key].dtype == value.dtype
            assert mine["state"][i][key].shape == value.shape


def test_masked_checkpoint_loads_into_adamw_and_back() -> None:
    """rows and ages travel through torch's own optimizer, and are not read there."""
    params = make_params()
    longact.set_rows(params[0], [1, 4])
    ours = FusedMaskedAdam(params, lr=0.02)
    train(ours, 0, 5)
    theirs = torch.optim.AdamW(copy_params(ours), lr=0.02)
    theirs.load_state_dict(ours.state_dict())
    train(theirs, 5, 6)
    back = FusedMaskedAdam(copy_params(theirs), lr=0.02)
    back.load_state_dict(through_a_file(theirs.state_dict()))
    assert longact.get_rows(parameters(back)[0]).tolist() == [1, 4]
    assert back.state[parameters(back)[0]]["ages"].dtype == torch.int32
    assert back.state[parameters(back)[0]]["ages"].tolist() == [0, 5, 0, 0, 5, 0]


def test_rows_that_another_optimizer_rounded_are_refused() -> None:
    """AdamW casts what it loads to the parameter's type: in bf16, row 301 is row 300."""
    param = nn.Parameter(torch.randn(400, 2).bfloat16())
    longact.set_rows(param, [3, 301])
    ours = FusedMaskedAdam([param])
    train(ours, 0, 2)
    theirs = torch.optim.AdamW(copy_params(ours))
    theirs.load_state_dict(ours.state_dict())
    back = FusedMaskedAdam(copy_params(ours))
    with pytest.raises(ValueError, match="rows"):
        back.load_state_dict(theirs.state_dict())
    assert longact.get_rows(parameters(back)[0]) is None


# ---- our own, in mid-run -------------------------------------------------------------------------


def masked(state: str, dtype: torch.dtype = torch.float32, **kwargs: Any) -> FusedMaskedAdam:
    """Selections that changed on the way: rows of several ages."""
    params = make_params(dtype)
    optimizer = FusedMaskedAdam(params, lr=0.02, state=state, amsgrad=True, **kwargs)
    for start, rows in ((0, None), (2, [0, 1, 4]), (4, [1, 3, 4]), (6, [0, 1, 3])):
        longact.set_rows(params[0], rows)
        longact.set_rows(params[1], None if rows is None else [6])
        train(optimizer, start, start + 2)
    return optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("state", ["full", "compact"])
def test_resume_is_bit_exact(state: str, dtype: torch.dtype) -> None:
    """Selections, ages and moments; fp32 moments of bf16 parameters are not rounded on the way."""
    optimizer = masked(state, dtype)
    saved = optimizer.state_dict()
    ages = optimizer.state[parameters(optimizer)[0]]["ages"].tolist()
    assert ages == ([2, 8, 4] if state == "compact" else [6, 8, 2, 6, 6, 2])
    twin = FusedMaskedAdam(copy_params(optimizer), lr=0.5, state=state)
    twin.load_state_dict(through_a_file(saved))
    assert_same_tree(twin.state_dict(), saved)
    rows = [longact.get_rows(p) for p in parameters(twin)]
    assert rows[0].tolist() == [0, 1, 3]
    assert rows[0].dtype == torch.int32
    assert rows[1].tolist() == [6]
    assert rows[2:] == [None, None]
    for o in (optimizer, twin):
        longact.set_rows(parameters(o)[0], [1, 2])
    train(optimizer, 8, 14)
    train(twin, 8, 14)
    assert_same_tree(twin.state_dict(), optimizer.state_dict())
    for x, y in zip(parameters(twin), parameters(optimizer), strict=True):
        assert_same_bits(x, y, "param")


def test_full_and_compact_states_convert_into_each_other() -> None:
    full, compact = masked("full"), masked("compact")
    start = copy_params(full)
    # Compact to full: the moments of selected rows where they belong, the rest new.
    to_full = FusedMaskedAdam([nn.Parameter(p.detach().clone()) for p in start], state="full")
    to_full.load_state_dict(through_a_file(compact.state_dict()))
    param, old = parameters(to_full)[0], compact.state[parameters(compact)[0]]
    state = to_full.state[param]
    assert "moment_rows" not in state
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "ages"):
        assert state[key].shape[0] == 6
        assert_same_bits(state[key][[0, 1, 3]], old[key], key)
        assert not bool(state[key][[2, 4, 5]].any())
    # Full to compact: at the next step the moments of selected rows are what is left.
    to_compact = FusedMaskedAdam([nn.Parameter(p.detach().clone()) for p in start], state="compact")
    to_compact.load_state_dict(through_a_file(full.state_dict()))
    train(to_compact, 8, 12)
    train(full, 8, 12)
    entry, reference = to_compact.state[parameters(to_compact)[0]], full.state[parameters(full)[0]]
    assert entry["exp_avg"].shape == (3, 5)
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "ages"):
        assert_same_bits(entry[key], reference[key][[0, 1, 3]], key)
    for x, y in zip(parameters(to_compact), parameters(full), strict=True):
        assert_same_bits(x, y, "param")
    # And the other way the run goes on as a compact one would while the selection stays.
    for a, b in zip(parameters(to_full), parameters(compact), strict=True):
        with torch.no_grad():
            a.copy_(b)
    train(to_full, 8, 12)
    train(compact, 8, 12)
    for x, y in zip(parameters(to_full), parameters(compact), strict=True):
        assert_same_bits(x, y, "param")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_moments_of_half_parameters_are_loaded_as_fp32(dtype: torch.dtype) -> None:
    optimizer = FusedMaskedAdam(make_params(dtype))
    train(optimizer, 0, 3)
    exact = optimizer.state[parameters(optimizer)[0]]["exp_avg"].clone()
    assert not torch.equal(exact, exact.to(dtype).float())
    twin = FusedMaskedAdam(copy_params(optimizer))
    twin.load_state_dict(optimizer.state_dict())
    assert_same_bits(twin.state[parameters(twin)[0]]["exp_avg"], exact, "exp_avg")
    # AdamW's own moments of such parameters are 16-bit: widened.
    theirs = torch.optim.AdamW(make_params(dtype))
    train(theirs, 0, 3)
    twin.load_state_dict(theirs.state_dict())
    for mine, other in zip(parameters(twin), parameters(theirs), strict=True):
        assert twin.state[mine]["exp_avg"].dtype == torch.float32
        assert torch.equal(twin.state[mine]["exp_avg"], theirs.state[other]["exp_avg"].float())
    train(twin, 3, 5)


@pytest.mark.parametrize(
    "step", [5, 5.0, torch.tensor(5), torch.tensor(5.0), torch.tensor(5.0, dtype=torch.float64),
             torch.tensor([5.0]), torch.tensor(5.0, dtype=torch.bfloat16)]
)  # fmt: skip
def test_step_of_any_kind_becomes_fp32_beside_the_parameter(step: Any) -> None:
    """Old checkpoints hold a number; map_location and half casts do what they like to a tensor."""
    optimizer = FusedMaskedAdam(make_params())
    train(optimizer, 0, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    for entry in saved["state"].values():
        entry["step"] = step
    optimizer.load_state_dict(saved)
    for param in parameters(optimizer):
        got = optimizer.state[param]["step"]
        assert (got.dtype, got.shape, got.device) == (torch.float32, (), param.device)
        assert got.item() == 5.0
    train(optimizer, 1, 2)
    assert optimizer.state[parameters(optimizer)[0]]["step"].item() == 6.0


def test_map_location() -> None:
    optimizer = masked("full")
    saved = through_a_file(optimizer.state_dict(), map_location="cpu")
    twin = FusedMaskedAdam(copy_params(optimizer))
    twin.load_state_dict(saved)
    assert_same_tree(twin.state_dict(), optimizer.state_dict())


def test_loading_copies() -> None:
    """Neither training goes into the other, nor into the checkpoint."""
    optimizer = masked("compact")
    saved = optimizer.state_dict()
    twin = FusedMaskedAdam(copy_params(optimizer), state="compact")
    twin.load_state_dict(saved)
    before = copy.deepcopy(saved)
    train(twin, 8, 10)
    assert_same_tree(optimizer.state_dict(), before)
    assert twin.state[parameters(twin)[0]]["step"].item() == 10


def test_a_selection_set_since_stays_where_the_checkpoint_has_none() -> None:
    theirs = torch.optim.AdamW(make_params())
    train(theirs, 0, 3)
    params = copy_params(theirs)
    longact.set_rows(params[0], [2])
    optimizer = FusedMaskedAdam(params)
    optimizer.load_state_dict(theirs.state_dict())
    assert longact.get_rows(params[0]).tolist() == [2]
    train(optimizer, 3, 4)
    assert optimizer.state[params[0]]["ages"].tolist() == [3, 3, 4, 3, 3, 3]


def test_empty_state_loads() -> None:
    optimizer = masked("full")
    optimizer.load_state_dict(FusedMaskedAdam(make_params()).state_dict())
    assert not optimizer.state_dict()["state"]
    train(optimizer, 0, 1)


# ---- refused, with nothing changed ---------------------------------------------------------------


def _edit(path: tuple[Any, ...], value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(saved: dict[str, Any]) -> None:
        target = saved
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value

    return edit


def _delete(*path: Any) -> Callable[[dict[str, Any]], None]:
    def edit(saved: dict[str, Any]) -> None:
        target = saved
        for key in path[:-1]:
            target = target[key]
        del target[path[-1]]

    return edit


I32 = torch.int32
BAD_STATES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "shape": (_edit(("state", 1, "exp_avg"), torch.zeros(8)), r"parameter 1 .*exp_avg"),
    "dimensions": (_edit(("state", 0, "exp_avg_sq"), torch.zeros(30)), "exp_avg_sq"),
    "maximum": (_edit(("state", 0, "max_exp_avg_sq"), torch.zeros(5, 6)), "max_exp_avg_sq"),
    "complex": (_edit(("state", 1, "exp_avg"), torch.zeros(7, dtype=torch.cfloat)), "exp_avg"),
    "integer": (_edit(("state", 1, "exp_avg"), torch.zeros(7, dtype=torch.int64)), "exp_avg"),
    "number": (_edit(("state", 1, "exp_avg"), 0.0), "exp_avg"),
    "no moment": (_delete("state", 1, "exp_avg_sq"), "no 'exp_avg_sq'"),
    "no step": (_delete("state", 1, "step"), "no 'step'"),
    "steps": (_edit(("state", 1, "step"), torch.zeros(2)), "step"),
    "age shape": (_edit(("state", 0, "ages"), torch.zeros(5, dtype=I32)), "ages"),
    "age type": (_edit(("state", 0, "ages"), torch.full((6,), 0.5)), "ages"),
    "rows out of range": (_edit(("state", 0, "rows"), torch.tensor([6])), "rows has index 6"),
    "rows unsorted": (_edit(("state", 0, "rows"), torch.tensor([3, 1], dtype=I32)), "rows"),
    "rows fractional": (_edit(("state", 0, "rows"), torch.tensor([0.5, 1.5])), "rows"),
    "rows mask": (_edit(("state", 0, "rows"), torch.tensor([False, True])), "rows"),
    "rows list": (_edit(("state", 0, "rows"), [0, 99]), "rows"),
    "rows beyond int32": (_edit(("state", 0, "rows"), torch.tensor([2**32])), "rows"),
    "moment rows": (_edit(("state", 0, "moment_rows"), torch.tensor([0, 7], dtype=I32)), "rows"),
    "moment rows count": (
        _edit(("state", 0, "moment_rows"), torch.tensor([0, 1], dtype=I32)),
        "exp_avg",
    ),
    "more groups": (lambda s: s["param_groups"].append(s["param_groups"][0]), "groups"),
    "fewer parameters": (lambda s: s["param_groups"][0]["params"].pop(), "group"),
    "lr": (_edit(("param_groups", 0, "lr"), -1.0), "lr=-1.0"),
    "policy": (_edit(("param_groups", 0, "inactive"), "drop"), "inactive='drop'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_STATES)
def test_what_does_not_fit_is_refused_and_nothing_changes(name: str) -> None:
    edit, message = BAD_STATES[name]
    optimizer = masked("full")
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = 123.0
    saved["state"][0]["rows"] = torch.tensor([5], dtype=I32)
    edit(saved)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert_same_tree(optimizer.state_dict(), before)
    assert longact.get_rows(parameters(optimizer)[0]).tolist() == [0, 1, 3]
    train(optimizer, 8, 9)  # and it goes on
    twin = masked("full")
    train(twin, 8, 9)
    assert_same_tree(optimizer.state_dict(), twin.state_dict())


def test_zero_grad_checkpoint_is_refused_by_compact_state() -> None:
    source = FusedMaskedAdam(make_params(), inactive="zero_grad")
    train(source, 0, 2)
    optimizer = masked("compact")
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="state='compact'"):
        optimizer.load_state_dict(source.state_dict())
    assert_same_tree(optimizer.state_dict(), before)


def test_another_models_checkpoint_is_refused() -> None:
    theirs = torch.optim.AdamW([nn.Parameter(p.detach().t().clone()) for p in make_params()])
    train(theirs, 0, 2)
    optimizer = masked("full")
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="the checkpoint belongs to another model"):
        optimizer.load_state_dict(theirs.state_dict())
    assert_same_tree(optimizer.state_dict(), before)


# ---- hooks, and torch.distributed.checkpoint -----------------------------------------------------


def test_hooks_of_the_user_run_and_see_plain_dicts() -> None:
    optimizer = masked("full")
    saved = optimizer.state_dict()
    twin = FusedMaskedAdam(copy_params(optimizer))
    seen: list[str] = []

    def check(state: dict[Any, Any], when: str) -> None:
        for entry in state.values():
            assert isinstance(entry, dict)
            assert {"step", "exp_avg", "exp_avg_sq"} <= set(entry)
        seen.append(when)

    def pre(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        check(state_dict["state"], "pre")
        groups = [{**group, "lr": 0.125} for group in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    twin.register_load_state_dict_pre_hook(pre)
    twin.register_load_state_dict_post_hook(lambda o: check(o.state, "post"))
    twin.load_state_dict(saved)
    assert seen == ["pre", "post"]
    assert twin.param_groups[0]["lr"] == 0.125  # what the hook returned is what is loaded
    twin.load_state_dict(saved)
    assert seen == ["pre", "post"] * 2
    assert len(twin._optimizer_load_state_dict_pre_hooks) == 1


def test_state_dict_hooks_see_rows() -> None:
    optimizer = masked("full")
    seen = []
    optimizer.register_state_dict_post_hook(lambda _, s: seen.append(set(s["state"][0])))
    optimizer.state_dict()
    assert len(seen) == 1
    assert "rows" in seen[0]


@pytest.mark.parametrize("state", ["full", "compact"])
def test_torch_distributed_checkpoint_state_dict(state: str) -> None:
    """The names of torch.distributed.checkpoint, on one process without a process group."""
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    def build() -> tuple[nn.Module, FusedMaskedAdam]:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
        return model, FusedMaskedAdam(model.parameters(), lr=0.02, state=state)

    model, optimizer = build()
    longact.set_rows(model[0].weight, [1, 4])
    train(optimizer, 0, 5)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    assert saved["state"]["0.weight"]["rows"].tolist() == [1, 4]
    twin_model, twin = build()
    twin_model.load_state_dict(model.state_dict())
    start = [bits(p) for p in twin_model.parameters()]
    set_optimizer_state_dict(twin_model, twin, saved)
    for param, old in zip(twin_model.parameters(), start, strict=True):
        assert torch.equal(bits(param), old)
    assert longact.get_rows(twin_model[0].weight).tolist() == [1, 4]
    for x, y in zip(parameters(twin), parameters(optimizer), strict=True):
        mine, other = (dict(sorted(o.state[p].items())) for o, p in ((twin, x), (optimizer, y)))
        assert_same_tree(mine, other)
    train(optimizer, 5, 9)
    train(twin, 5, 9)
    for x, y in zip(parameters(twin), parameters(optimizer), strict=True):
        assert_same_bits(x, y, "param")
