"""Several processes: ranks that see different data select the same rows and stay replicas."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import models
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import longact


def _rank(rank: int, tmp: str, refresh_every: int | str, metric: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = models.tiny_model("llama")
    handle = longact.apply(model, 0.3, refresh_every=refresh_every, metric=metric)
    ddp = DistributedDataParallel(model)
    optimizer = longact.FusedMaskedAdam(ddp.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(rank)
    history = []
    for _ in range(3):
        ids = torch.randint(0, 32, (1, 6 + 5 * rank), generator=generator)
        ddp(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append({name: rows.clone() for name, rows in handle.rows.items()})
    torch.save((history, model.state_dict()), f"{tmp}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(("refresh_every", "metric"), [(1, "mean_abs"), ("forward", "max_abs")])
def test_ddp_ranks_select_the_same_rows(
    tmp_path: Path, refresh_every: int | str, metric: str
) -> None:
    mp.spawn(_rank, (str(tmp_path), refresh_every, metric), nprocs=2)
    (history0, state0), (history1, state1) = (
        torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)
    )
    for rows0, rows1 in zip(history0, history1, strict=True):
        for name in rows0:
            assert torch.equal(rows0[name], rows1[name]), name
    for name, value in state0.items():
        assert torch.equal(value, state1[name]), name


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
