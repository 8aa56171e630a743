"""`longact.plan`: what it says of a step is what real ranks hold, send and change."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import longact
from longact.distributed import ChangedRows, RowHookState, allreduce_rows
from longact.plan import MODELS, Estimate, Setup, add_command, build, estimate
from longact.rows import local_of

COMMUNICATION = ("all_gather", "reduce_scatter", "all_reduce", "selection")
SENT = {"_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter"}


class Wire(TorchDispatchMode):
    """Bytes of the collectives: the larger side of each."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = dict.fromkeys(COMMUNICATION, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            tensors = [t for arg in args[:2] for t in (arg if isinstance(arg, list) else [arg])]
            size = max(t.nbytes for t in tensors if isinstance(t, torch.Tensor))
            kind = SENT.get(name, name)
            if name == "allreduce_":
                kind = "selection" if tensors[0].dtype == torch.float64 else "all_reduce"
            self.bytes[kind] = self.bytes.get(kind, 0) + size
        return func(*args, **(kwargs or {}))


RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fsdp": ({}, {}),
    "fsdp, all rows": ({}, {"keep_ratio": None}),
    "fsdp, no reshard": ({"reshard_after_forward": False, "reduce_dtype": torch.float32}, {}),
    "fsdp, compact": ({"state": "compact", "master_weights": True}, {}),
    "hsdp": ({"shards": 2, "reduce_dtype": torch.float32}, {}),
    "ddp": ({"engine": "ddp"}, {}),
    "ddp, hook": ({"engine": "ddp", "row_hook": True, "state": "compact"}, {}),
    "ddp, freeze": ({"engine": "ddp", "moment_dtype": torch.bfloat16}, {"others": "freeze"}),
}


def measured(tmp: Path, name: str) -> tuple[Estimate, Estimate]:
    """What was estimated, and what this rank's third step shows."""
    options, apply = RUNS[name]
    setup = Setup(gpus=dist.get_world_size(), **options)
    model = models.tiny_model("qwen2", num_hidden_layers=3).bfloat16()
    keep = apply.get("keep_ratio", 0.3)
    handle = None
    if keep is not None:
        handle = longact.apply(model, keep, others=apply.get("others", "train"))
    said = estimate(model, setup, handle)
    trained: Any = model
    hook = RowHookState()
    if setup.engine == "fsdp":
        policy = MixedPrecisionPolicy(setup.compute_dtype, setup.reduce_dtype)
        reshard = setup.reshard_after_forward
        mesh = None
        if setup.shards is not None:
            sizes = setup.gpus // setup.shards, setup.shards
            mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("replicas", "shards"))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
    else:
        trained = DistributedDataParallel(model, broadcast_buffers=False)
        if setup.row_hook:
            trained.register_comm_hook(hook, allreduce_rows)
    optimizer = models.adam(
        model,
        state=setup.state,
        master_weights=setup.master_weights,
        moment_dtype=setup.moment_dtype,
    )
    changes = ChangedRows(model, optimizer)
    for step in range(3):  # the second has the ranks agree on DDP's buckets
        list(changes.pop())
        hook.bytes = 0
        with Wire() as wire:
            models.forward_backward(trained, models.token_ids(seed=step + dist.get_rank()))
            optimizer.step()
        grads = [local_of(p.grad).nbytes for p in model.parameters() if p.grad is not None]
        optimizer.zero_grad()
    assert tuple(wire.bytes) == COMMUNICATION, wire.bytes  # and no other collective
    if setup.row_hook:
        assert hook.bytes == wire.bytes["all_reduce"]
    state: dict[str, int] = {}
    for entry in optimizer.state.values():
        for key, value in entry.items():
            state[key] = state.get(key, 0) + local_of(value).nbytes
    return said, said._replace(
        parameters=sum(local_of(p).nbytes for p in model.parameters()),
        gradients=sum(grads),
        moments=state["exp_avg"] + state["exp_avg_sq"],
        masters=state.get("master", 0),
        ages=state.get("ages", 0),
        weight_sync=sum(change.values.nbytes for change in changes.pop()),
        **wire.bytes,
    )


CASES = [(world, name) for world in (2, 4) for name in RUNS if world == 4 or name != "hsdp"]
QUICK = 2, "fsdp"


def all_measured(tmp: Path, names: list[str]) -> dict[str, tuple[Estimate, Estimate]]:
    return {name: measured(tmp, name) for name in names}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """What each rank found; those of a world start once for all of its slow cases."""
    found: dict[tuple[int, bool], list[Any]] = {}

    def of(world: int, name: str) -> list[Any]:
        is_quick = (world, name) == QUICK
        if (world, is_quick) not in found:
            names = [n for w, n in CASES if w == world and ((w, n) == QUICK) == is_quick]
            tmp = tmp_path_factory.mktemp("ranks")
            found[world, is_quick] = run_ranks(world, all_measured, tmp, names)
        return [rank[name] for rank in found[world, is_quick]]

    return of


@pytest.mark.parametrize(
    ("world", "name"),
    [pytest.param(*c, marks=[] if c == QUICK else pytest.mark.slow) for c in CASES],
)
def test_an_estimate_is_what_ranks_measure(
    world: int, name: str, ranks: Callable[..., list[Any]]
) -> None:
    found = ranks(world, name)
    said = found[0][0]
    assert all(other == said for other, _ in found)
    for field in Estimate._fields:
        values = [getattr(ranks, field) for _, ranks in found]
        assert sum(values) / world == pytest.approx(getattr(said, field), rel=1e-12), field
    assert said.communication > 0
    assert said.memory == said.parameters + sum(said[1:5])


def test_what_a_step_moves_is_counted_by_hand() -> None:
    """Ten of 30 weights of 4 bf16 elements train, with fp32 moments and masters."""
    linear = torch.nn.Linear(4, 30, bias=False, dtype=torch.bfloat16)
    handle = longact.apply(linear_model := torch.nn.Sequential(linear), 1 / 3, targets="0")
    got = estimate(linear_model, Setup(gpus=1, master_weights=True), handle)
    # Gradient and weight 2 bytes each; moments and master 4 each, read and written; an age, too.
    assert got.update == 10 * 4 * (2 + 2 + 2 * 12) + 10 * 8
    assert got.communication == 0
    assert got.weight_sync == 10 * 4 * 2
    plain = estimate(linear_model, Setup(gpus=1))
    assert plain.update == 30 * 4 * (2 + 2 * 2 + 2 * 8)


def test_experts_are_no_layers() -> None:
    """A list in a list may be the longer one; what is of no layer is gathered once."""
    linear = torch.nn.Linear
    experts = torch.nn.ModuleList(linear(4, 4) for _ in range(3))
    layer = torch.nn.ModuleDict({"q_proj": linear(4, 4), "experts": experts})
    parts = {"head": linear(4, 4), "layers": torch.nn.ModuleList([layer])}
    size = 4 * (4 * 4 + 4)
    got = estimate(torch.nn.ModuleDict(parts), Setup(gpus=2))
    assert got.all_gather == 2 * 4 * size + size


@pytest.mark.parametrize(
    ("name", "billions", "layers"),
    [
        ("smollm2-135m", 0.1345, 30),
        ("qwen3-0.6b", 0.5960, 28),
        ("qwen3-8b", 8.191, 36),
        ("qwen3-32b", 32.76, 64),
        ("qwen3-235b-a22b", 235.1, 94),
    ],
)
def test_models_have_the_parameters_that_they_are_named_for(
    name: str, billions: float, layers: int
) -> None:
    model = build(name)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=1e-3)
    assert len(longact.apply(model).projections) == 2 * layers
    assert all(p.is_meta for p in model.parameters())
    assert name in MODELS


def test_the_documented_tables_are_what_it_says() -> None:
    page = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text()

    def pair(plain: Estimate, ours: Estimate, name: str, digits: int) -> str:
        return f"{getattr(plain, name) / 1e9:.{digits}f}, {getattr(ours, name) / 1e9:.{digits}f}"

    for title, name, gpus, shards in (
        ("Qwen3-8B, 8 GPUs", "qwen3-8b", 8, None),
        ("Qwen3-8B, 64", "qwen3-8b", 64, None),
        ("Qwen3-32B, 64", "qwen3-32b", 64, None),
        ("Qwen3-235B-A22B, 1,024 as 8 x 128", "qwen3-235b-a22b", 1024, 128),
    ):
        model, setup = build(name), Setup(gpus=gpus, shards=shards)
        plain = estimate(model, setup)
        handle = longact.apply(model)
        ours = estimate(model, setup, handle)
        memory = pair(plain, ours, "memory", 2)
        if gpus == 8:
            compact = estimate(model, replace(setup, state="compact"), handle)
            memory += f" (compact {compact.memory / 1e9:.2f})"
        cells = [
            memory,
            *(pair(plain, ours, n, 1) for n in ("communication", "update", "weight_sync")),
        ]
        assert f"| {title} | {' | '.join(cells)} |" in page, (title, cells)

    model, setup = build("qwen3-8b"), Setup(engine="ddp")
    plain = estimate(model, setup)
    ours = estimate(model, setup, longact.apply(model, others="freeze"))
    for title, name, digits in (
        ("memory: weights, gradients, state", "memory", 1),
        ("all-reduce", "all_reduce", 2),
        ("update", "update", 1),
        ("weights to sync", "weight_sync", 2),
    ):
        a, b = getattr(plain, name), getattr(ours, name)
        row = f"| {title} | {a / 1e9:.1f} GB | {b / 1e9:.{digits}f} GB | {b / a:.2f} |"
        assert row in page, row


def command(*arguments: str) -> None:
    parser = argparse.ArgumentParser()
    add_command(parser.add_subparsers())
    parsed = parser.parse_args(["plan", *arguments])
    parsed.run(parsed)


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command("smollm2-135m", "--gpus", "4", "--engine", "ddp", "--row-hook", "--state", "compact")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "smollm2-135m: 0.13 B parameters in bfloat16, 4 GPUs, DDP; GB of each GPU and step"
    )
    table = {line[:14].strip(): line[14:].split() for line in lines[1:]}
    assert table[""] == ["all", "rows", "LongAct", "ratio"]
    assert table["parameters"] == ["0.269", "0.269", "1.000"]
    assert float(table["all reduce"][2]) < 0.94
    models.tiny_model().config.save_pretrained(tmp_path)
    command(str(tmp_path), "--others", "freeze", "--engine", "ddp")
    assert "0.00 B parameters" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpt"], "model='gpt': give one of smollm2-135m, "),
        (["smollm2-135m", "--gpus", "0"], "gpus=0: at least 1"),
        (["smollm2-135m", "--shards", "3"], "shards=3: of engine='fsdp', and a divisor of gpus=8"),
        (["smollm2-135m", "--row-hook"], "engine='ddp' has hooks"),
        (["smollm2-135m", "--others", "freeze"], "others='freeze' works with DDP"),
        (["smollm2-135m", "--keep-ratio", "2"], "keep_ratio=2.0: must lie in"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        command(*arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("longact plan: ")
    assert message in error
