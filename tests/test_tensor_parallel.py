"""Tensor parallelism, alone and under FSDP2: what one process gives on the same global batch.

Two or four gloo processes and fp64, as partial sums are added up in another order.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from helpers import threads
from ranks import backward, check_untouched, compare, run_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import longact
from longact.rows import shard_of

# Asked here: a rank that skipped would be one that failed.
by_transformers = pytest.mark.skipif(
    find_spec("transformers.distributed.tensor_parallel") is None, reason="needs transformers 5.17"
)
STEPS = 20
FEWER = 9  # each example has had each of its lengths
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master", "ages")
PLAN = {
    "self_attn.q_proj": ColwiseParallel(),
    "self_attn.k_proj": ColwiseParallel(),
    "self_attn.v_proj": ColwiseParallel(),
    "self_attn.o_proj": RowwiseParallel(),
    "mlp.gate_proj": ColwiseParallel(),
    "mlp.up_proj": ColwiseParallel(),
    "mlp.down_proj": RowwiseParallel(),
    # Qwen3's: each rank norms its own heads, and their gradients are summed.
    "self_attn.[qk]_norm": SequenceParallel(sequence_dim=2, use_local_output=True),
}


@dataclass(frozen=True)
class Run:
    """One way to train, on `world` ranks of which `tp` have the same data."""

    world: int = 2
    tp: int = 2
    arch: str = "qwen2"
    apply: dict[str, Any] = field(default_factory=dict)
    adam: dict[str, Any] = field(default_factory=dict)
    apply_first: bool = True
    micro_batches: int = 1
    checkpointing: bool = False
    examples: int = 4  # of a global batch
    by_transformers: bool = False  # from_pretrained shards

    @property
    def dp(self) -> int:
        return self.world // self.tp


def make(run: Run, *, parallel: bool, seed: int = 0) -> tuple[Any, Any, Any]:
    model = models.tiny_model(run.arch, seed=seed).double()
    if parallel and run.by_transformers:
        model = sharded_by_transformers(model, run)
    if run.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if run.apply_first:
        handle = longact.apply(model, 0.4, **run.apply)
    if parallel and not run.by_transformers:
        mesh = init_device_mesh("cpu", (run.dp, run.tp), mesh_dim_names=("dp", "tp"))
        for layer in model.model.layers:
            parallelize_module(layer, mesh["tp"], PLAN)
        if run.dp > 1:
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh["dp"])
            fully_shard(model, mesh=mesh["dp"])
    if not run.apply_first:
        handle = longact.apply(model, 0.4, **run.apply)
    return model, handle, models.adam(model, **run.adam)


def sharded_by_transformers(model: Any, run: Run) -> Any:
    from transformers.distributed import DistributedConfig

    sharded = type(model).from_pretrained(
        None,
        config=model.config,
        state_dict=model.state_dict(),
        dtype=torch.float64,
        distributed_config=DistributedConfig(tp_size=run.tp, fsdp_size=run.dp),
    )
    assert isinstance(sharded.get_submodule(models.Q0).weight, DTensor)
    return sharded.train()


def batch(run: Run, step: int, micro: int) -> dict[str, Tensor]:
    """Of all ranks; each example has its own number of tokens."""
    ids = models.token_ids(run.examples, 10, seed=100 * step + micro)
    mask = torch.ones_like(ids)
    for row in range(len(ids)):
        mask[row, 10 - (3 * row + step) % 9 :] = 0
    return {"input_ids": ids.masked_fill(mask == 0, models.PAD), "attention_mask": mask}


def train(model: Any, handle: Any, optimizer: Any, run: Run, steps: range) -> list[Any]:
    history = []
    is_parallel = dist.is_initialized() and dist.get_world_size() > 1
    for step in steps:
        for micro in range(run.micro_batches):
            inputs = batch(run, step, micro)
            tokens = inputs["attention_mask"][:, 1:].sum()
            share = 1
            if is_parallel and run.dp > 1:
                model.set_requires_gradient_sync(micro == run.micro_batches - 1)
                own, share = dist.get_rank() // run.tp, run.dp  # FSDP2 averages over ranks
                inputs = {k: v.chunk(run.dp)[own] for k, v in inputs.items()}
            backward(model, inputs, share / tokens)
        before = handle.rows
        for name, layer in handle.projections.items():
            assert_only_selected(whole(layer.weight.grad), before[name])
        tokens = counted(handle)
        optimizer.step()
        optimizer.zero_grad()
        history.append({**snapshot(model, handle, optimizer, before), "tokens": tokens})
    return history


def counted(handle: Any) -> Tensor:
    """Tokens of each projection, of all ranks."""
    found = torch.stack([layer.selection.tokens for layer in handle.projections.values()])
    if dist.is_initialized():
        dist.all_reduce(found)
    return found.double()


def assert_only_selected(grad: Tensor, rows: Tensor | None) -> None:
    if rows is not None:
        other = torch.ones(len(grad), dtype=torch.bool)
        other[rows.long()] = False
        assert not grad[other].any()
        assert grad[rows.long()].any(1).any()


def snapshot(model: Any, handle: Any, optimizer: Any, before: Any) -> dict[str, Any]:
    rows = {name: r.clone() for name, r in handle.rows.items()}
    left: dict[str, Any] = {"trained": before, "rows": rows}
    for name, param in model.named_parameters():
        state = optimizer.state[param]
        left[name] = whole(param)
        for key in MOMENTS:
            if key in state:
                left[f"{name}.{key}"] = whole(state[key], param)
    return left


def whole(value: Tensor, param: Any = None) -> Tensor:
    """Of all ranks. The moments of selected rows are plain tensors, each rank's its own."""
    if isinstance(value, DTensor):
        return value.full_tensor().detach().clone()
    if isinstance(param, DTensor) and any(not p.is_replicate() for p in param.placements):
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, (shard_of(param).first, value.numel() > 0, value))
        of_shard = {first: part for first, has_some, part in parts if has_some}
        return torch.cat([of_shard[first] for first in sorted(of_shard)])
    return value.detach().clone()


def in_parallel(tmp: Path, run: Run, steps: int) -> list[Any]:
    return train(*make(run, parallel=True), run, range(steps))


def single(run: Run, steps: int) -> list[Any]:
    with threads(1):
        return train(*make(run, parallel=False), run, range(steps))


TRANSFORMERS = Run(arch="qwen3", by_transformers=True)
# The first update of a row that enters is the sign of its gradient, but for eps: with the usual
# one, what is rounding alone of a small gradient becomes large.
COMPACT = {"state": "compact", "eps": 1e-5}
RUNS = {
    "two ranks": Run(),
    "apply last": Run(apply_first=False, micro_batches=2),
    "2-D, apply last": Run(world=4, apply_first=False, micro_batches=2),
    "head, max_abs": Run(apply={"scope": "head", "metric": "max_abs"}),
    "model, every 2": Run(apply={"scope": "model", "refresh_every": 2}),
    "norm, rms": Run(arch="qwen3", apply={"capture": "norm", "metric": "rms"}),
    "rope, pairs": Run(apply={"capture": "rope", "pair_rope": True}),
    "compact, checkpointing": Run(adam=COMPACT, checkpointing=True),
    "zero_grad, once": Run(adam={"inactive": "zero_grad"}, apply={"refresh_every": 0}),
    "transformers": replace(TRANSFORMERS, checkpointing=True),
    "2-D, compact, transformers": Run(
        world=4, by_transformers=True, adam={**COMPACT, "amsgrad": True}
    ),
}


def marks(name: str) -> list[pytest.MarkDecorator]:
    slow = [] if name == "two ranks" else [pytest.mark.slow]
    return [*slow, by_transformers] if RUNS[name].by_transformers else slow


@pytest.mark.parametrize("name", [pytest.param(n, marks=marks(n)) for n in RUNS])
def test_ranks_are_one_process(name: str, tmp_path: Path) -> None:
    run, steps = RUNS[name], STEPS if name in ("two ranks", "2-D, apply last") else FEWER
    first, *others = run_ranks(run.world, in_parallel, tmp_path, run, steps)
    for other in others:
        compare(other, first, rtol=0)
    compare(first, single(run, steps), rtol=1e-7)
    if not run.adam:
        check_untouched(first)


def resumed(tmp: Path, run: Run, steps: range, checkpoint: str) -> list[Any]:
    """From the checkpoint, and to it."""
    model, handle, optimizer = make(run, parallel=dist.get_world_size() > 1, seed=steps.start)
    path = tmp.parent / checkpoint

    def state() -> dict[str, Any]:
        return {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer),
        }

    if steps.start:
        saved = state()
        load(saved, checkpoint_id=path)
        set_model_state_dict(model, saved["model"])
        set_optimizer_state_dict(model, optimizer, saved["optimizer"])
        handle.load_state_dict(torch.load(path / "longact.pt"))
    history = train(model, handle, optimizer, run, steps)
    if not steps.start:
        save(state(), checkpoint_id=path)
        if dist.get_rank() == 0:
            torch.save(handle.state_dict(), path / "longact.pt")
        dist.barrier()
    return history


@pytest.mark.slow
def test_a_checkpoint_resumes_on_other_ranks(tmp_path: Path) -> None:
    """Saved by two dimensions of ranks; read by tensor parallelism alone, and by one process."""
    for name in ("saved", "two", "one"):
        (tmp_path / name).mkdir()
    expected = single(Run(), 8)
    run_ranks(4, resumed, tmp_path / "saved", Run(world=4), range(4), "checkpoint")
    for name, world in {"two": 2, "one": 1}.items():
        found = run_ranks(world, resumed, tmp_path / name, Run(), range(4, 8), "checkpoint")
        compare(found[0], expected[4:], rtol=1e-7)


def refusals(tmp: Path) -> dict[str, str]:
    mesh = init_device_mesh("cpu", (2,))

    def said(plan: Any, targets: Any = None, **options: Any) -> str:
        model = models.tiny_model("qwen3")
        longact.apply(model, targets=targets, **options)
        for layer in model.model.layers:
            parallelize_module(layer, mesh, plan)
        before = models.params_of(model)
        with pytest.raises(NotImplementedError) as caught:
            model(input_ids=models.token_ids())
        assert all(torch.equal(whole(a), whole(b)) for a, b in zip(
            before.values(), models.params_of(model).values(), strict=True
        ))  # fmt: skip
        return str(caught.value)

    return {
        "rows": said({"self_attn.o_proj": RowwiseParallel()}, ["o_proj"]),
        "forward": said(PLAN, refresh_every="forward"),
        "freeze": said(PLAN, others="freeze"),
    }


def refuses_reentrant(tmp: Path) -> str:
    model = make(TRANSFORMERS, parallel=True)[0]
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(NotImplementedError) as caught:
        model(input_ids=models.token_ids())
    return str(caught.value)


@by_transformers
def test_reentrant_checkpointing_under_transformers_is_refused(tmp_path: Path) -> None:
    for said in run_ranks(2, refuses_reentrant, tmp_path):
        assert f"{models.Q0}: transformers' tensor parallelism hides" in said


def generate(model: Any) -> Tensor:
    model.eval()
    found: Tensor = model.generate(models.token_ids(2, 5), max_new_tokens=6, do_sample=False)
    model.train()
    return found


def generates(tmp: Path) -> list[Tensor]:
    """Before, while and after longact is applied, and what the logits are then."""
    model = sharded_by_transformers(models.tiny_model("qwen3").double(), TRANSFORMERS)
    found = [generate(model)]
    handle = longact.apply(model, 0.4)
    found.append(generate(model))
    handle.remove()
    assert type(model.get_submodule(models.Q0)) is nn.Linear
    return [*found, generate(model), model(input_ids=models.token_ids()).logits.detach()]


@by_transformers
def test_transformers_generates_and_gets_its_layers_back(tmp_path: Path) -> None:
    model = models.tiny_model("qwen3").double()
    expected = generate(model)
    logits = model(input_ids=models.token_ids()).logits
    for *found, last in run_ranks(2, generates, tmp_path):
        assert all(torch.equal(tokens, expected) for tokens in found)
        torch.testing.assert_close(last, logits.detach(), rtol=1e-7, atol=1e-10)


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    for said in run_ranks(2, refusals, tmp_path):
        assert "model.layers.0.self_attn.o_proj.weight is sharded as [Shard(dim=1)]" in said["rows"]
        assert (
            "q_proj: refresh_every='forward' ranks the channels of each forward" in said["forward"]
        )
        assert "others='freeze'" in said["freeze"]


def touched(tmp: Path | None = None) -> list[tuple[Tensor, Tensor]]:
    """Rows and weight of the embedding, of a rank or of one process, after each step."""
    model: Any = models.tiny_model("qwen2").double()
    if tmp is not None:
        model = sharded_by_transformers(model, TRANSFORMERS)
    handle = longact.apply(model, rows="touched")
    optimizer = models.adam(model)
    found = []
    for step in range(5):
        models.train_step(model, optimizer, models.token_ids(seed=step))
        rows = handle.rows["model.embed_tokens"]
        found.append((rows, whole(model.model.embed_tokens.weight)))
    return found


@by_transformers
def test_touched_rows_of_a_sharded_vocabulary(tmp_path: Path) -> None:
    first, second = run_ranks(2, touched, tmp_path)
    for (rows, weight), (others, same), (expected, of_one) in zip(
        first, second, touched(), strict=True
    ):
        assert torch.equal(rows, expected)
        assert torch.equal(others, expected)
        assert torch.equal(weight, same)
        torch.testing.assert_close(weight, of_one, rtol=1e-7, atol=1e-10)


def plain_linear(tmp: Path) -> None:
    """A layer of one's own, rows by hand: gradients are those of nn.Linear in the rows."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    linear = nn.Linear(6, 10).double()
    layer = longact.nn.SalientLinear.from_linear(linear)
    x = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    layer(x).square().sum().backward()
    assert x.grad is not None
    expected = {n: p.grad.clone() for n, p in layer.named_parameters()}  # type: ignore[union-attr]
    of_input, x.grad = x.grad, None
    layer.zero_grad()
    parallelize_module(layer, mesh, ColwiseParallel(use_local_output=False))
    for rows in ([0, 4, 7], [6], [], range(10)):
        longact.set_rows(layer.weight, rows)
        longact.set_rows(layer.bias, rows)
        y = layer(x)
        assert y.shape == (3, 4, 10)
        y.full_tensor().square().sum().backward()
        mask = torch.zeros(10, dtype=torch.bool)
        mask[list(rows)] = True
        for name, param in layer.named_parameters():
            assert param.grad is not None
            got = whole(param.grad)
            torch.testing.assert_close(got[mask], expected[name][mask])
            assert not got[~mask].any()
        torch.testing.assert_close(x.grad, of_input)
        layer.zero_grad()
        x.grad = None


def test_a_layer_of_ones_own(tmp_path: Path) -> None:
    run_ranks(2, plain_linear, tmp_path)
