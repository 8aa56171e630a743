"""Several processes: ranks that see different data select the same rows and stay replicas."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from helpers import code_after, threads
from ranks import backward, check_untouched, compare, run_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import longact
from longact.distributed import ChangedRows, RowHookState, allreduce_rows, write_rows

STEPS = 20
FEWER = 9  # each example has had each of its lengths
MOMENTS = ("exp_avg", "exp_avg_sq", "ages")


class Unused(nn.Module):
    """A model with a layer that no forward reads."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.unused = nn.Linear(4, 4).double()

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


@dataclass(frozen=True)
class Run:
    """One way to train under DDP."""

    apply: dict[str, Any] = field(default_factory=dict)
    adam: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)
    micro_batches: int = 1
    clip: float | None = None
    unused: bool = False
    hook: bool = False


def make(run: Run) -> tuple[Any, Any, Any]:
    """In fp64: gradients of ranks are added up in another order than those of one batch."""
    model: Any = models.tiny_model("qwen2").double()
    handle = longact.apply(model, 0.4, **run.apply)
    if run.unused:
        torch.manual_seed(0)
        model = Unused(model)
    return model, handle, models.adam(model, **run.adam)


def batch(step: int, micro: int, world: int) -> dict[str, Tensor]:
    """Of all ranks, each with its own number of tokens; rank 1 has none that counts at times."""
    ids = models.token_ids(2 * world, 10, seed=100 * step + micro)
    mask = torch.ones_like(ids)
    for row in range(len(ids)):
        mask[row, 10 - (3 * row + step) % 9 :] = 0
    if step % 3 == 2:
        mask[2:4] = 0
    return {"input_ids": ids.masked_fill(mask == 0, models.PAD), "attention_mask": mask}


def train(run: Run, world: int, steps: int) -> tuple[list[Any], RowHookState]:
    """What each step left behind: of one process that sees everything, or of a rank."""
    model, handle, optimizer = make(run)
    is_rank = dist.is_initialized()
    state = RowHookState()
    trained = model
    if is_rank and run.hook:
        names: dict[str, Any] = {
            "DistributedDataParallel": partial(DistributedDataParallel, **run.ddp),
            "RowHookState": lambda: state,
            "allreduce_rows": allreduce_rows,
            "model": model,
        }
        exec(code_after("<!-- snippet: hook -->\n", "docs/scaling.md"), names)
        trained = names["ddp"]
    elif is_rank:
        trained = DistributedDataParallel(model, **run.ddp)
    history = []
    for step in range(steps):
        for micro in range(run.micro_batches):
            inputs = batch(step, micro, world)
            tokens, share = inputs["attention_mask"][:, 1:].sum(), 1
            is_last = micro == run.micro_batches - 1
            if is_rank:
                inputs = {k: v.chunk(world)[dist.get_rank()] for k, v in inputs.items()}
                share = world  # DDP averages
            with nullcontext() if is_last or not is_rank else trained.no_sync():
                backward(trained, inputs, share / tokens)
        if run.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), run.clip)
        before = handle.rows
        optimizer.step()
        optimizer.zero_grad()
        rows = {name: r.clone() for name, r in handle.rows.items()}
        by_forward = handle.config.refresh_every == "forward"
        left: dict[str, Any] = {"trained": rows if by_forward else before, "rows": rows}
        tiny = model.model if run.unused else model
        for name, param in tiny.named_parameters():
            left[name] = param.detach().clone()
            for key in MOMENTS:
                if key in optimizer.state.get(param, {}):
                    left[f"{name}.{key}"] = optimizer.state[param][key].clone()
        history.append(left)
    return history, state


def train_in(tmp: Path, run: Run, world: int, steps: int) -> tuple[list[Any], RowHookState]:
    return train(run, world, steps)


def single(name: str, world: int, steps: int) -> list[Any]:
    """Of one process, which sees the data of all ranks."""
    with threads(1):
        return train(RUNS[name], world, steps)[0]


RUNS = {
    "plain": Run(),
    "no_sync, clip": Run(micro_batches=3, clip=0.5),
    "unused": Run(unused=True, ddp={"find_unused_parameters": True}, apply={"refresh_every": 2}),
    "bucket views, max_abs": Run(
        ddp={"gradient_as_bucket_view": True}, apply={"metric": "max_abs", "scope": "head"}
    ),
    "static graph, model": Run(ddp={"static_graph": True}, apply={"scope": "model"}),
    "zero_grad": Run(adam={"inactive": "zero_grad"}, apply={"metric": "rms"}),
    "hook": Run(hook=True),
    "hook, no_sync, bucket views": Run(
        hook=True, micro_batches=2, clip=0.5, ddp={"gradient_as_bucket_view": True}
    ),
    "hook, small buckets": Run(hook=True, ddp={"bucket_cap_mb": 0.02}, apply={"scope": "model"}),
    "hook, zero_grad": Run(hook=True, adam={"inactive": "zero_grad"}),
}


ON_FOUR = ("no_sync, clip", "unused", "hook, no_sync, bucket views")


@pytest.mark.parametrize(
    ("name", "world"),
    [
        *(pytest.param(n, 2, marks=[] if n == "plain" else pytest.mark.slow) for n in RUNS),
        *(pytest.param(n, 4, marks=pytest.mark.slow) for n in ON_FOUR),
    ],
)
def test_ddp_ranks_are_one_process(name: str, world: int, tmp_path: Path) -> None:
    """Parameters, moments and ages within 1e-7, the same rows; ranks are equal to the last bit."""
    run, steps = RUNS[name], STEPS if name in ("plain", "no_sync, clip", "hook") else FEWER
    found = run_ranks(world, train_in, tmp_path, run, world, steps)
    for history, _ in found[1:]:
        compare(history, found[0][0], rtol=0)
    compare(found[0][0], single(name, world, steps), rtol=1e-7)
    if not run.adam:
        check_untouched(found[0][0])


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["mean_abs", "max_abs"])
def test_ddp_ranks_with_rows_of_each_forward_stay_replicas(metric: str, tmp_path: Path) -> None:
    """The union over all ranks is what the step updates."""
    run = Run(apply={"refresh_every": "forward", "metric": metric}, hook=True)
    (first, state), (second, _) = run_ranks(2, train_in, tmp_path, run, 2, 5)
    compare(first, second, rtol=0)
    check_untouched(first)
    assert state.bytes == state.dense_bytes  # each rank has rows of its own


@pytest.mark.parametrize("option", [{}, {"gradient_as_bucket_view": True}])
def test_the_hook_sends_the_selected_rows_and_changes_nothing(
    option: dict[str, Any], tmp_path: Path
) -> None:
    for name in ("plain", "hook"):
        (tmp_path / name).mkdir()
    plain, hooked = (
        run_ranks(2, train_in, tmp_path / name, Run(hook=name == "hook", ddp=option), 2, 4)
        for name in ("plain", "hook")
    )
    for (without, _), (history, state) in zip(plain, hooked, strict=True):
        compare(history, without, rtol=0)
        model, handle, _ = make(Run())
        numel = sum(p.numel() for p in model.parameters())
        saved = 0
        for layer in handle.projections.values():
            left = layer.out_features - handle.config.count(layer.out_features)
            saved += left * (layer.in_features + 1)  # and the bias
        assert state.dense_bytes == 8 * 4 * numel
        assert state.bytes == 8 * (4 * numel - 3 * saved)  # the first step selects


def refused(tmp: Path, plans: list[dict[str, Any]]) -> str:
    model = models.tiny_model()
    longact.apply(model, **plans[dist.get_rank()])
    ddp = DistributedDataParallel(model)
    optimizer = models.adam(model)
    before = models.params_of(model)
    ids = models.token_ids(seed=dist.get_rank())
    ddp(input_ids=ids, labels=ids).loss.backward()
    with pytest.raises(RuntimeError) as caught:
        optimizer.step()
    models.assert_same_params(model, before)
    assert not optimizer.state
    return str(caught.value)


@pytest.mark.parametrize(
    ("plans", "message"),
    [
        ([{}, {"keep_ratio": 0.5}], "keep_ratio is 0.3 on rank 0 and 0.5 on rank 1"),
        ([{}, {"refresh_every": 0}], "refresh_every is 1 on rank 0 and 0 on rank 1"),
        ([{}, {"targets": ["q_proj"]}], "4 projections on rank 0 and 2 on rank 1"),
        (
            [{"targets": ["q_proj"]}, {"targets": ["o_proj"]}],
            "2 projections on rank 0 and 2 on rank 1, or of other names or sizes",
        ),
        (
            [{"refresh_every": "forward"}, {"refresh_every": "forward", "metric": "rms"}],
            "metric is 'mean_abs' on rank 0 and 'rms' on rank 1",
        ),
    ],
)
def test_ranks_that_would_select_otherwise_are_refused(
    plans: list[dict[str, Any]], message: str, tmp_path: Path
) -> None:
    """At the first collective, on every rank, before anything is changed."""
    for said in run_ranks(2, refused, tmp_path, plans):
        assert f"longact was applied otherwise on rank 1 than on rank 0: {message}" in said


def poisoned(tmp: Path) -> tuple[list[Any], list[str]]:
    """Rank 1's activations of one layer are NaN at the third step."""
    model, handle, optimizer = make(Run())
    ddp = DistributedDataParallel(model)
    layer = model.get_submodule(models.Q0)
    rows = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(4):
            bias = layer.bias.detach().clone()
            if step == 2 and dist.get_rank() == 1:
                with torch.no_grad():
                    layer.bias[3] = torch.nan
            models.forward_backward(ddp, models.token_ids(seed=2 * step + dist.get_rank()))
            with torch.no_grad():
                layer.bias.copy_(bias)
            for param in model.parameters():  # as a run that skips such gradients
                assert param.grad is not None
                param.grad.nan_to_num_(0.0)
            optimizer.step()
            optimizer.zero_grad()
            rows.append({name: r.clone() for name, r in handle.rows.items()})
    return rows, [str(w.message) for w in caught if w.category is longact.LongActWarning]


def test_a_rank_with_nan_activations_keeps_all_ranks_selections(tmp_path: Path) -> None:
    first, second = run_ranks(2, poisoned, tmp_path)
    for rows, others in zip(first[0], second[0], strict=True):
        for name in rows:
            assert torch.equal(rows[name], others[name]), name
    assert torch.equal(first[0][2][models.Q0], first[0][1][models.Q0])
    for _, said in (first, second):
        assert sum(models.Q0 in text and "non-finite" in text for text in said) == 1


# ---- weights for an inference engine -------------------------------------------------------------


@pytest.mark.parametrize(
    ("apply", "adam"),
    [
        ({}, {}),
        ({"refresh_every": 2, "others": "freeze"}, {}),
        ({"refresh_every": "forward"}, {}),
        ({"refresh_every": 0}, {"inactive": "zero_grad"}),
    ],
)
def test_changed_rows_bring_an_engine_up_to_date(
    apply: dict[str, Any], adam: dict[str, Any]
) -> None:
    model = models.tiny_model("qwen2")
    engine = {name: value.clone() for name, value in model.state_dict().items()}
    other = {name: value.clone() for name, value in engine.items()}
    handle = longact.apply(model, 0.3, **apply)
    optimizer = models.adam(model, **adam)
    changes, whole = ChangedRows(model, optimizer), ChangedRows(model, optimizer)
    assert list(changes.pop()) == []
    names = {f"{name}.{key}" for name in models.QK for key in ("weight", "bias")}
    for steps in (1, 3, 2):
        before = {name: value.clone() for name, value in engine.items()}
        for step in range(steps):
            models.train_step(model, optimizer, models.token_ids(seed=10 * steps + step))
        found = list(changes.pop())
        write_rows(engine, found)
        for name, value in model.state_dict().items():
            assert torch.equal(engine[name], value), name
        for change in found:
            if change.name in names and not adam:
                assert change.rows is not None
                rows = models.changed_rows(before[change.name], engine[change.name])
                assert change.rows.tolist() == rows
            else:
                assert change.rows is None
        expected = names if apply.get("others") == "freeze" else set(engine)
        assert {change.name for change in found} == expected
        for name, value in whole.weights():
            other[name].copy_(value)
        assert all(torch.equal(other[name], engine[name]) for name in engine)
    assert list(changes.pop()) == list(whole.weights()) == []
    changes.remove()
    models.train_step(model, optimizer, models.token_ids())
    assert list(changes.pop()) == []
    assert handle.is_applied


def test_the_documented_lines_send_changes() -> None:
    model = models.tiny_model("qwen2")
    engine = {name: value.clone() for name, value in model.state_dict().items()}
    longact.apply(model, others="freeze")
    optimizer = models.adam(model)
    names = {
        "ChangedRows": ChangedRows,
        "model": model,
        "optimizer": optimizer,
        "train": lambda steps: [models.train_step(model, optimizer, ids) for ids in steps],
        "steps": [models.token_ids(seed=n) for n in range(2)],
        "send": lambda *change: write_rows(engine, [change]),
    }
    exec(code_after("<!-- snippet: changes -->\n", "docs/scaling.md"), names)
    assert all(torch.equal(engine[name], value) for name, value in model.state_dict().items())


def shipped(tmp: Path) -> bool:
    model = models.tiny_model("qwen2")
    engine = {name: value.clone() for name, value in model.state_dict().items()}
    longact.apply(model, 0.3)
    fully_shard(model)
    optimizer = models.adam(model)
    changes = ChangedRows(model, optimizer)
    for step in range(3):
        models.train_step(model, optimizer, models.token_ids(seed=step))
    found = list(changes.pop())
    assert sum(change.rows is not None for change in found) == 8
    write_rows(engine, found)
    return all(torch.equal(engine[n], v.full_tensor()) for n, v in model.state_dict().items())  # type: ignore[operator]


def test_changed_rows_of_shards(tmp_path: Path) -> None:
    assert run_ranks(2, shipped, tmp_path) == [True, True]


def test_a_weight_that_the_engine_lacks_is_an_error() -> None:
    with pytest.raises(KeyError, match="b"):
        write_rows({"a": torch.zeros(2)}, [("b", None, torch.ones(2))])


# ---- DTensors on one rank ------------------------------------------------------------------------


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_sharded_parameters_train_as_plain_ones() -> None:
    """On one rank; tests/test_fsdp2.py has several."""
    layer, plain = torch.nn.Linear(6, 4), torch.nn.Linear(6, 4)
    plain.load_state_dict(layer.state_dict())
    fully_shard(layer)
    longact.set_rows(layer.bias, [1, 2])
    longact.set_rows(plain.bias, [1, 2])
    ours = longact.FusedMaskedAdam(layer.parameters(), lr=1e-2)
    others = longact.FusedMaskedAdam(plain.parameters(), lr=1e-2)
    x = torch.randn(3, 6)
    for _ in range(3):
        for model, optimizer in ((layer, ours), (plain, others)):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    for sharded, expected in zip(layer.parameters(), plain.parameters(), strict=True):
        assert torch.equal(sharded.full_tensor(), expected)
