"""FSDP2: sharded training gives what one process gives on the same global batch, step by step.

Two or four gloo processes. Where all ranks have the same data their mean gradient and their counts
are those of one process to the last bit, and so must everything be; where they have different
numbers of tokens, gradients are added up in another order, and the model computes in fp64.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from ranks import backward, check_untouched, compare, run_new_ranks, run_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

import longact
from longact.rows import Shard as RowShard
from longact.rows import local_row_buffer, local_rows

STEPS = 20
FEWER = 9  # each example has had each of its lengths
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master", "ages")


@dataclass(frozen=True)
class Run:
    """One way to train."""

    apply: dict[str, Any] = field(default_factory=dict)
    adam: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    apply_first: bool = True
    same_data: bool = True
    micro_batches: int = 1
    clip: float | None = None
    checkpointing: bool = False
    reshard: bool | int = True
    by_block: bool = True
    dtype: torch.dtype = torch.float32
    compute: torch.dtype | None = None


def _model(run: Run) -> Any:
    model = models.tiny_model("qwen2", **run.config).to(run.dtype)
    if run.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _shard(model: Any, run: Run) -> None:
    policy = MixedPrecisionPolicy()
    if run.compute is not None:
        policy = MixedPrecisionPolicy(param_dtype=run.compute, reduce_dtype=torch.float32)
    options: Any = {"reshard_after_forward": run.reshard, "mp_policy": policy}
    if run.by_block:
        for layer in model.model.layers:
            fully_shard(layer, **options)
    fully_shard(model, **options)


def _batch(run: Run, step: int, micro: int, world: int) -> dict[str, Tensor]:
    """Of all ranks, each with its own number of tokens; rank 1 has none that counts at times."""
    rows = 2 if run.same_data else 2 * world
    ids = models.token_ids(rows, 10, seed=100 * step + micro)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, 10 - (3 * row + step) % 9 :] = 0
    # (A forward with rows of its own keeps those of the same rank's forward before.)
    if not run.same_data and step % 3 == 2 and run.apply.get("refresh_every") != "forward":
        mask[2:4] = 0
    ids = ids.masked_fill(mask == 0, models.PAD)
    return {"input_ids": ids, "attention_mask": mask}


def _train(
    model: Any, handle: Any, optimizer: Any, run: Run, world: int, steps: range
) -> list[Any]:
    """What each step left behind."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    # Forwards with rows of their own are those of each rank; else one process sees all at once.
    alone = size == 1 and not run.same_data and run.apply.get("refresh_every") == "forward"
    history = []
    for step in steps:
        for micro in range(run.micro_batches):
            batch = _batch(run, step, micro, world)
            tokens = batch["attention_mask"][:, 1:].sum()
            share = 1
            parts = [slice(None)]
            if size > 1:
                model.set_requires_gradient_sync(micro == run.micro_batches - 1)
            if alone:
                parts = [slice(2 * r, 2 * r + 2) for r in range(world)]
            elif not run.same_data and size > 1:
                parts, share = [slice(2 * rank, 2 * rank + 2)], size  # FSDP2 averages over ranks
            for part in parts:
                backward(model, {k: v[part] for k, v in batch.items()}, share / tokens)
        if run.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), run.clip)
        rows_before = handle.rows
        with CommDebugMode() as communication:
            optimizer.step()
        # The ranks' counts, and nothing else; before the first, what they are about to select from.
        sent = {op.__name__ for op in communication.get_comm_counts()}
        assert sent <= {"allreduce_", *(["allgather_"] if step == steps.start else [])}, sent
        optimizer.zero_grad()
        history.append(_snapshot(model, handle, optimizer, rows_before))
    return history


def _snapshot(model: Any, handle: Any, optimizer: Any, rows_before: Any) -> dict[str, Any]:
    by_forward = handle.config.refresh_every == "forward"  # chosen as the step begins
    rows = {name: None if r is None else r.clone() for name, r in handle.rows.items()}
    left: dict[str, Any] = {"trained": rows if by_forward else rows_before, "rows": rows}
    for name, param in model.named_parameters():
        state = optimizer.state[param]
        assert isinstance(state["step"], Tensor)
        assert not isinstance(state["step"], DTensor)
        left[name] = _local(param)
        for key in MOMENTS:
            if key in state:
                # The moments of selected rows are plain tensors, which are not saved as they are.
                is_full = "moment_rows" not in state
                assert isinstance(state[key], DTensor) == (isinstance(param, DTensor) and is_full)
                left[f"{name}.{key}"] = _local(state[key], param)
    return left


def _local(value: Tensor, param: Tensor | None = None) -> Tensor:
    if isinstance(value, DTensor):
        assert param is None or value.placements == param.placements
        value = value.to_local()
    return value.detach().clone()


def _whole(histories: list[Any]) -> list[Any]:
    """What the ranks have, put together; what all have is the same."""
    whole = []
    for steps in zip(*histories, strict=True):
        entry: dict[str, Any] = {}
        for key, value in steps[0].items():
            if isinstance(value, Tensor):
                entry[key] = torch.cat([step[key] for step in steps])
                continue
            entry[key] = value
            for other in steps[1:]:
                for name in value:
                    a, b = value[name], other[key][name]
                    assert torch.equal(a, b) if a is not None else b is None, f"{key} of {name}"
        whole.append(entry)
    return whole


def _sharded(tmp: Path, run: Run, steps: int) -> list[Any]:
    model = _model(run)
    if not run.apply_first:
        _shard(model, run)
    handle = longact.apply(model, 0.4, **run.apply)
    if run.apply_first:
        _shard(model, run)
    optimizer = models.adam(model, **run.adam)
    world = dist.get_world_size()
    return _train(model, handle, optimizer, run, world, range(steps))


def _single(run: Run, world: int, steps: int) -> list[Any]:
    """Of one process, made as the ranks are: libraries that other tests load into this one change
    the last bits of bf16 matmuls."""
    with tempfile.TemporaryDirectory() as tmp:
        history: list[Any] = run_ranks(1, _alone, Path(tmp), run, world, steps)[0]
    return history


def _alone(tmp: Path, run: Run, world: int, steps: int) -> list[Any]:
    model = _model(run)
    handle = longact.apply(model, 0.4, **run.apply)
    optimizer = models.adam(model, **run.adam)
    return _train(model, handle, optimizer, run, world, range(steps))


EXACT = {
    "apply first": Run(),
    "shard first": Run(apply_first=False),
    "no reshard, shard first": Run(reshard=False, apply_first=False),
    "one group, accumulation": Run(by_block=False, micro_batches=2),
    "checkpointing": Run(checkpointing=True),
    "forward, checkpointing": Run(
        apply={"refresh_every": "forward"}, checkpointing=True, micro_batches=2
    ),
    "every 3": Run(apply={"refresh_every": 3, "metric": "rms"}),
    "once, head": Run(apply={"refresh_every": 0, "scope": "head", "metric": "max_abs"}),
    "model": Run(apply={"scope": "model"}),
    "zero_grad, amsgrad, maximize": Run(
        adam={"inactive": "zero_grad", "amsgrad": True, "maximize": True}
    ),
    "reference": Run(adam={"backend": "reference"}),
    "bf16 masters": Run(dtype=torch.bfloat16, adam={"master_weights": True}),
    "compact": Run(adam={"state": "compact", "weight_decay": 0.5}),
    "compact, bf16 masters": Run(
        dtype=torch.bfloat16, adam={"state": "compact", "master_weights": True}
    ),
    "bf16 moments": Run(adam={"moment_dtype": torch.bfloat16}, apply={"refresh_every": 4}),
    "capturable": Run(adam={"capturable": True}),
}


def _slow_but(first: str, names: Iterable[str]) -> list[Any]:
    return [pytest.param(n, marks=[] if n == first else pytest.mark.slow) for n in names]


@pytest.mark.parametrize("name", _slow_but("apply first", EXACT))
def test_ranks_with_the_same_data_are_one_process(name: str, tmp_path: Path) -> None:
    run, steps = EXACT[name], STEPS if name == "apply first" else FEWER
    history = _whole(run_ranks(2, _sharded, tmp_path, run, steps))
    compare(history, _single(run, 2, steps), rtol=0)
    if run.adam.get("inactive") != "zero_grad" and run.adam.get("state") != "compact":
        check_untouched(history)


NARROW = {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 2}
DIFFERENT = {
    "apply first": Run(),
    "shard first, accumulation": Run(apply_first=False, micro_batches=2),
    "reshard to fewer": Run(reshard=2),
    "clip, every 2": Run(clip=0.5, apply={"refresh_every": 2}),
    "forward, head": Run(apply={"refresh_every": "forward", "scope": "head"}),
    "compact, max_abs": Run(adam={"state": "compact"}, apply={"metric": "max_abs"}),
    "compact, model": Run(adam={"state": "compact", "amsgrad": True}, apply={"scope": "model"}),
}


@pytest.mark.parametrize(
    ("name", "world"),
    [("apply first", 2), *(pytest.param(n, 4, marks=pytest.mark.slow) for n in DIFFERENT)],
)
def test_ranks_with_different_tokens_are_one_process(name: str, world: int, tmp_path: Path) -> None:
    """Uneven shards (6 rows), empty ones (2 rows, on 4 ranks), and ranks that count nothing."""
    run = replace(DIFFERENT[name], same_data=False, dtype=torch.float64, config=NARROW)
    steps = STEPS if name == "apply first" else FEWER
    history = _whole(run_ranks(world, _sharded, tmp_path, run, steps))
    compare(history, _single(run, world, steps), rtol=1e-7)
    if run.adam.get("state") != "compact":
        check_untouched(history)


@pytest.mark.slow
@pytest.mark.parametrize("option", [{}, {"reshard": False, "checkpointing": True}])
def test_mixed_precision(option: dict[str, Any], tmp_path: Path) -> None:
    """bf16 computes, fp32 is trained."""
    run = Run(compute=torch.bfloat16, **option)
    (tmp_path / "one").mkdir()
    history = _whole(run_ranks(2, _sharded, tmp_path, run, FEWER))
    assert history[-1][f"{models.Q0}.weight"].dtype == torch.float32
    compare(history, _whole(run_ranks(1, _sharded, tmp_path / "one", run, FEWER)), rtol=0)
    check_untouched(history)


def _rounded(tmp: Path, replicas: int) -> dict[str, Tensor]:
    run = Run(dtype=torch.bfloat16, adam={"stochastic_rounding": True, "seed": 3})
    model = _model(run)
    handle = longact.apply(model, 0.4)
    shape, names = (2, dist.get_world_size() // 2), ("replicas", "shards")
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names) if replicas else None
    fully_shard(model, mesh=mesh)
    optimizer = models.adam(model, **run.adam)
    return _train(model, handle, optimizer, run, 2, range(3 if replicas else 1))


def test_stochastic_rounding_differs_among_shards_only(tmp_path: Path) -> None:
    """The first shard is rounded as one process rounds it; others, by other bits."""
    run = Run(dtype=torch.bfloat16, adam={"stochastic_rounding": True, "seed": 3})
    (expected,) = _single(run, 2, 1)
    first, second = (history[0] for history in run_ranks(2, _rounded, tmp_path, False))
    different = 0
    for name, value in expected.items():
        if isinstance(value, Tensor):
            here, there = first[name], second[name]
            assert torch.equal(here, value[: len(here)]), name
            torch.testing.assert_close(there, value[len(here) :], rtol=2**-7, atol=0)
            different += int((there != value[len(here) :]).sum())
    assert different > 1000


@pytest.mark.slow
def test_replicas_of_shards(tmp_path: Path) -> None:
    """HSDP: a mesh of two replicas of two shards each."""
    histories = run_ranks(4, _rounded, tmp_path, True)
    whole = _whole(histories[:2])
    compare(whole, _whole(histories[2:]), rtol=0)
    check_untouched(whole)


def _resumed(tmp: Path, run: Run) -> list[Any]:
    """Three steps, a checkpoint, three more in new objects."""
    options = StateDictOptions(full_state_dict=True)
    history = []
    for steps in (range(3), range(3, 6)):
        torch.manual_seed(steps.start)
        model = models.tiny_model("qwen2", seed=steps.start)
        handle = longact.apply(model, 0.4, **run.apply)
        _shard(model, run)
        optimizer = models.adam(model, **run.adam)
        if steps.start:
            saved: dict[str, Any] = {
                "model": get_model_state_dict(model),
                "optimizer": get_optimizer_state_dict(model, optimizer),
            }
            load(saved, checkpoint_id=tmp / "checkpoint")
            set_model_state_dict(model, saved["model"])
            set_optimizer_state_dict(model, optimizer, saved["optimizer"])
            handle.load_state_dict(torch.load(tmp / "longact.pt"))
        history += _train(model, handle, optimizer, run, dist.get_world_size(), steps)
        if not steps.start:
            saved = {
                "model": get_model_state_dict(model),
                "optimizer": get_optimizer_state_dict(model, optimizer),
            }
            save(saved, checkpoint_id=tmp / "checkpoint")
            whole = {
                "model": get_model_state_dict(model, options=options),
                "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
            }
            if dist.get_rank() == 0:
                torch.save(handle.state_dict(), tmp / "longact.pt")
                torch.save(whole, tmp / "whole.pt")
            dist.barrier()
    return history


@pytest.mark.slow
@pytest.mark.parametrize("state", ["full", "compact"])
@pytest.mark.parametrize("refresh_every", [1, "forward"])
def test_a_distributed_checkpoint_resumes_bit_for_bit(
    state: str, refresh_every: Any, tmp_path: Path
) -> None:
    """Also in one process, which loads the full state dict that rank 0 saved."""
    run = Run(apply={"refresh_every": refresh_every}, adam={"state": state})
    history = _whole(run_ranks(2, _resumed, tmp_path, run))
    expected = _single(run, 2, 6)
    compare(history, expected, rtol=0)

    (tmp_path / "one").mkdir()
    (resumed,) = run_ranks(1, _resumed_by_one, tmp_path / "one", run)
    compare(resumed, expected[3:], rtol=0)


def _resumed_by_one(tmp: Path, run: Run) -> list[Any]:
    model = models.tiny_model("qwen2", seed=5)
    handle = longact.apply(model, 0.4, **run.apply)
    optimizer = models.adam(model, **run.adam)
    saved = torch.load(tmp.parent / "whole.pt")
    set_model_state_dict(model, saved["model"])
    set_optimizer_state_dict(model, optimizer, saved["optimizer"])
    handle.load_state_dict(torch.load(tmp.parent / "longact.pt"))
    return _train(model, handle, optimizer, run, 2, range(3, 6))


def _saved_by_one(tmp: Path) -> None:
    run = Run()
    model = _model(run)
    handle = longact.apply(model, 0.4)
    optimizer = models.adam(model)
    _train(model, handle, optimizer, run, 2, range(2))
    saved = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "longact": handle.state_dict(),
    }
    torch.save(saved, tmp.parent / "single.pt")


def _from_whole(tmp: Path, run: Run) -> list[Any]:
    """A checkpoint of one process, in every rank's own hands."""
    model = _model(run)
    handle = longact.apply(model, 0.4)
    saved = torch.load(tmp / "single.pt")
    model.load_state_dict(saved["model"])
    _shard(model, run)
    optimizer = models.adam(model, **run.adam)
    optimizer.load_state_dict(saved["optimizer"])
    handle.load_state_dict(saved["longact"])
    return _train(model, handle, optimizer, run, 2, range(2, 4))


@pytest.mark.parametrize("state", ["full", "compact"])
def test_a_checkpoint_of_one_process_is_sharded_as_it_is_loaded(state: str, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    run_ranks(1, _saved_by_one, tmp_path / "one")
    run = Run(adam={"state": state})
    history = _whole(run_ranks(2, _from_whole, tmp_path, run))
    compare(history, _single(run, 2, 4)[2:] if state == "full" else history, rtol=0)


def _refused(call: Callable[[], Any]) -> str:
    try:
        call()
    except (NotImplementedError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def _train_once(model: Any, optimizer: Any) -> None:
    models.train_step(model, optimizer, models.token_ids())


def _fsdp1(flat: bool) -> dict[str, str]:
    options: Any = {"use_orig_params": not flat, "device_id": torch.device("cpu")}
    wrapped = FullyShardedDataParallel(models.tiny_model(), **options)
    said = {"apply": _refused(lambda: longact.apply(wrapped, targets=["q_proj"]))}
    model = models.tiny_model()
    longact.apply(model)
    model = FullyShardedDataParallel(model, **options)
    optimizer = models.adam(model)
    if not flat:
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        said["step"] = _refused(optimizer.step)
    said["forward"] = _refused(lambda: _train_once(model, optimizer))
    return {f"{key} with FSDP1, {flat=}": value for key, value in said.items()}


def _refusals(tmp: Path) -> dict[str, str]:
    said = _fsdp1(flat=True) | _fsdp1(flat=False)

    # Columns.
    model = models.tiny_model()
    longact.apply(model)
    columns = {id(p) for p in model.parameters() if p.dim() == 2}
    fully_shard(model, shard_placement_fn=lambda p: Shard(1) if id(p) in columns else None)
    optimizer = models.adam(model)
    before = [p.full_tensor().clone() for p in model.parameters()]
    said["columns"] = _refused(lambda: _train_once(model, optimizer))
    for param, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(param.full_tensor(), old)
    assert not optimizer.state

    # Columns over the ranks of tensor parallelism, rows over those of FSDP2.
    layer = nn.Linear(6, 8)
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(layer, mesh["tp"], RowwiseParallel())
    fully_shard(layer, mesh=mesh["dp"])
    optimizer = longact.FusedMaskedAdam(layer.parameters())
    longact.set_rows(layer.weight, [0])
    for param in layer.parameters():
        param.grad = torch.ones_like(param)
    said["tensor parallel"] = _refused(optimizer.step)
    longact.set_rows(layer.weight, [])

    # Sums that are still to be made.
    param = nn.Parameter(DTensor.from_local(torch.ones(3, 2), mesh["tp"], [Partial()]))
    optimizer = longact.FusedMaskedAdam([param])
    longact.set_rows(param, [0])
    param.grad = torch.ones_like(param)
    said["partial"] = _refused(optimizer.step)

    # The projection itself.
    model = models.tiny_model()
    fully_shard(model.model.layers[0].self_attn.q_proj)
    said["projection"] = _refused(lambda: longact.apply(model))

    # Compact moments of one process.
    model = models.tiny_model()
    longact.apply(model)
    optimizer = models.adam(model, state="compact")
    _train_once(model, optimizer)
    fully_shard(model)
    sharded = models.adam(model, state="compact")
    said["compact"] = _refused(lambda: sharded.load_state_dict(optimizer.state_dict()))
    return said


def test_what_cannot_work_is_refused_with_the_remedy(tmp_path: Path) -> None:
    said = run_ranks(2, _refusals, tmp_path)
    for key, expected in {
        "apply with FSDP1, flat=True": "NotImplementedError: model has 'itself' under FSDP1",
        "apply with FSDP1, flat=False": "NotImplementedError: model has 'itself' under FSDP1",
        "forward with FSDP1, flat=True": "q_proj.weight is not a parameter of its own",
        "forward with FSDP1, flat=False": "q_proj.weight is not a parameter of its own",
        "step with FSDP1, flat=False": "use FSDP2 (torch.distributed.fsdp.fully_shard)",
        "columns": "is sharded as [Shard(dim=1)] over a mesh of [2]",
        "tensor parallel": "over a mesh of [1, 2]",
        "partial": "is sharded as [Partial(sum)]",
        "projection": "FSDPLinear, which fully_shard was called on itself",
        "compact": "has compact moments, and the parameter is sharded",
    }.items():
        for rank in range(2):
            assert expected in said[rank][key], (key, said[rank][key])


def test_a_parametrized_projection_is_refused() -> None:
    model = models.tiny_model()
    handle = longact.apply(model)
    nn.utils.parametrizations.weight_norm(handle.projections[models.Q1])
    with pytest.raises(NotImplementedError, match="is not a parameter of its own any more"):
        model(input_ids=models.token_ids())


def _dense(tmp: Path) -> None:
    """Parameters without a selection of any placement, and of none."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    values = [torch.randn(5, 4) for _ in range(4)]
    placements = [Replicate(), Shard(0), Shard(1), None]
    params = [
        [
            nn.Parameter(v.clone() if p is None else distribute_tensor(v.clone(), mesh, [p]))
            for v, p in zip(values, placements, strict=True)
        ]
        for _ in range(2)
    ]
    ours = longact.FusedMaskedAdam(params[0], lr=1e-2, amsgrad=True)
    torchs = torch.optim.AdamW(params[1], lr=1e-2, amsgrad=True)
    longact.set_rows(params[0][0], range(5))  # replicated, with all rows
    for step in range(5):
        for mine, other in zip(*params, strict=True):
            grad = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
            for param in (mine, other):
                param.grad = grad.clone()
                if isinstance(param, DTensor):
                    param.grad = distribute_tensor(grad.clone(), mesh, param.placements)
        ours.step()
        torchs.step()
        # A parameter that was entered anew would call it.
        ours._tables[torch.device("cpu")]._set = None  # type: ignore[assignment]
    for mine, other in zip(*params, strict=True):
        torch.testing.assert_close(mine, other)
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            a, b = ours.state[mine][key], torchs.state[other][key]
            assert type(a) is type(b)
            torch.testing.assert_close(a, b)
    partial = distribute_tensor(torch.ones(5, 4), mesh, [Replicate()])
    params[0][0].grad = DTensor.from_local(partial.to_local() / 2, mesh, [Partial()])
    params[1][0].grad = partial
    ours.step()
    torchs.step()
    torch.testing.assert_close(params[0][0], params[1][0])

    # A sharded state in an optimizer of plain parameters.
    plain = [nn.Parameter(v.clone()) for v in values]
    loaded = longact.FusedMaskedAdam(plain)
    loaded.load_state_dict(ours.state_dict())
    for param, sharded in zip(plain, params[0], strict=True):
        for key, value in ours.state[sharded].items():
            assert type(loaded.state[param][key]) is Tensor
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            assert torch.equal(loaded.state[param][key], whole), key
    assert longact.get_rows(plain[0]) is not None


def test_dense_parameters_of_any_placement(tmp_path: Path) -> None:
    """As AdamW trains them; and the native table is written once."""
    run_ranks(2, _dense, tmp_path)


def _equal_shards(tmp: Path) -> Tensor:
    mesh = init_device_mesh("cpu", (2,))
    value = torch.ones(8, 64, dtype=torch.bfloat16)
    param = nn.Parameter(distribute_tensor(value, mesh, [Shard(0)]))
    optimizer = longact.FusedMaskedAdam([param], lr=1e-3, stochastic_rounding=True)
    param.grad = distribute_tensor(value, mesh, [Shard(0)])
    optimizer.step()
    return _local(param)


def test_equal_shards_are_rounded_independently(tmp_path: Path) -> None:
    first, second = run_ranks(2, _equal_shards, tmp_path)
    assert 0.2 < (first != second).float().mean() < 0.6


def _removed(tmp: Path, apply_first: bool) -> list[bool]:
    model = models.tiny_model()
    if not apply_first:
        fully_shard(model, reshard_after_forward=False)
        model(input_ids=models.token_ids())  # leaves the gathered parameters in place
    handle = longact.apply(model)
    if apply_first:
        fully_shard(model, reshard_after_forward=False)
    optimizer = models.adam(model)
    _train_once(model, optimizer)
    trained = [longact.get_rows(p) is not None for p in model.parameters()]
    with torch.no_grad():
        model(input_ids=models.token_ids())
    handle.remove()
    before = [p.full_tensor().clone() for p in model.parameters()]
    _train_once(model, optimizer)
    weights = list(model.parameters())
    assert all(longact.get_rows(p) is None for p in weights)
    changed = [
        bool((p.full_tensor() != old).flatten(1).any(1).all()) if p.dim() == 2 else True
        for p, old in zip(weights, before, strict=True)
    ]
    assert all(changed[1:])  # of the embeddings, those of the tokens
    return trained


@pytest.mark.parametrize("apply_first", [True, False])
def test_the_selection_comes_and_goes(apply_first: bool, tmp_path: Path) -> None:
    (trained, _) = run_ranks(2, _removed, tmp_path, apply_first)
    assert sum(trained) == 4


# fp64, as norms of shards are added up in another order, and Adam makes much of small differences.
CLIPPED = Run(clip=0.5, dtype=torch.float64)


def _accelerated(tmp: Path, ram: bool, checkpointing: bool) -> list[Any]:
    """accelerate shards after the optimizer was made, and swaps its parameters."""
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin

    run = CLIPPED
    model = _model(run)
    handle = longact.apply(model, 0.4)
    optimizer = models.adam(model)
    accelerator = Accelerator(cpu=True)
    # accelerate turns to FSDP where there are GPUs only.
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Qwen2DecoderLayer"],
        cpu_ram_efficient_loading=ram,
        activation_checkpointing=checkpointing,
    )
    model, prepared = accelerator.prepare(model, optimizer)
    assert prepared.optimizer is optimizer
    assert all(isinstance(p, DTensor) for p in model.parameters())
    history = []
    for step in range(4):
        batch = _batch(run, step, 0, 2)
        backward(model, batch, 1 / batch["attention_mask"][:, 1:].sum())
        accelerator.clip_grad_norm_(model.parameters(), run.clip)
        rows_before = handle.rows
        prepared.step()
        prepared.zero_grad()
        left = _snapshot(model, handle, optimizer, rows_before)
        history.append({k.replace("_checkpoint_wrapped_module.", ""): v for k, v in left.items()})
    return history


@pytest.mark.slow
@pytest.mark.parametrize(("ram", "checkpointing"), [(True, True), (False, False)])
def test_accelerate_prepares_model_and_optimizer(
    ram: bool, checkpointing: bool, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    history = _whole(run_new_ranks(2, _accelerated, tmp_path, ram, checkpointing))
    compare(history, _single(CLIPPED, 2, 4), rtol=1e-7)
    check_untouched(history)


@pytest.mark.parametrize("shard", [(0, 3), (3, 3), (6, 1), (7, 0), (0, 7)])
@pytest.mark.parametrize("rows", [[], [0], [2, 3], [0, 1, 5, 6], [6], list(range(7))])
def test_rows_of_a_shard(rows: list[int], shard: tuple[int, int]) -> None:
    """As a list, and as the buffer that a GPU's kernels read, whose number of rows is in it."""
    first, count = shard
    expected = [row - first for row in rows if first <= row < first + count]
    chosen = torch.tensor(rows, dtype=torch.int32)
    here = local_rows(chosen, RowShard(first, count))
    assert here.tolist() == expected
    assert here.dtype == torch.int32
    buffer = local_row_buffer(chosen, RowShard(first, count))
    assert buffer.dtype == torch.int32
    assert buffer.shape == (count + 1,)
    assert buffer[0] == len(expected)
    assert buffer[1 : 1 + len(expected)].tolist() == expected
