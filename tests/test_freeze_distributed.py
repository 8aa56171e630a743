"""`longact.apply(model, others="freeze")` in other processes: two ranks (gloo, DDP), a copy."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from helpers import assert_same_tree, one_thread
from ranks import join, start_ranks
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import longact

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures(one_thread.__name__)]

STEPS = 5
KINDS = ["plain", "checkpointed"]


def make(kind: str) -> tuple[Any, longact.LongAct, longact.FusedMaskedAdam]:
    """In fp64: gradients of two ranks are added up in another order than those of one batch."""
    model = models.tiny_model("qwen2").double()
    handle = longact.apply(model, others="freeze", refresh_every=1 if kind == "plain" else 2)
    if kind == "checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, handle, models.adam(model)


def batch(step: int, micro: int) -> Tensor:
    """Of both ranks: the first half is rank 0's."""
    return models.token_ids(4, 10, seed=10 * step + micro)


def snapshot(model: Any, handle: longact.LongAct, optimizer: Any) -> Any:
    state = {k: v.clone() for k, v in model.state_dict().items()}
    moments = [{k: v.clone() for k, v in entry.items()} for entry in optimizer.state.values()]
    return {"model": state, "rows": models.rows_of(handle), "moments": moments}


def rank_main(rank: int, tmp: str) -> None:
    join(rank, 2, tmp)
    results = {}
    for kind in KINDS:
        model, handle, optimizer = make(kind)
        ddp = DistributedDataParallel(model)
        buckets: list[int] = []

        def reduce(state, bucket):  # type: ignore[no-untyped-def]  # torch refuses a string there
            state.append(bucket.buffer().numel())
            return allreduce_hook(None, bucket)

        ddp.register_comm_hook(buckets, reduce)
        history = []
        for step in range(STEPS):
            selected = []
            for micro in range(2):
                ids = batch(step, micro)[2 * rank : 2 * rank + 2]
                with ddp.no_sync() if micro == 0 else nullcontext():
                    loss = ddp(input_ids=ids, labels=ids).loss / 2
                    selected.append(models.rows_of(handle))
                    loss.backward()
            torch.nn.utils.clip_grad_norm_(ddp.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            history.append({**snapshot(model, handle, optimizer), "selected": selected})
        results[kind] = {"history": history, "buckets": buckets}
    torch.save(results, f"{tmp}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    tmp: Path = tmp_path_factory.mktemp("ranks")
    start_ranks(2, rank_main, str(tmp))
    return [torch.load(tmp / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_are_replicas_and_train_as_one_process(kind: str, ranks: list[Any]) -> None:
    assert_same_tree(ranks[0][kind], ranks[1][kind])  # to the last bit
    model, handle, optimizer = make(kind)
    seen = set()
    for step, expected in enumerate(ranks[0][kind]["history"]):
        for micro in range(2):
            ids = batch(step, micro)
            loss = model(input_ids=ids, labels=ids).loss / 2
            assert models.rows_of(handle) == expected["selected"][micro], f"step {step}"
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        state = snapshot(model, handle, optimizer)
        assert state["rows"] == expected["rows"], f"step {step}"
        seen.add(str(state["rows"]))
        for key, value in state["model"].items():
            torch.testing.assert_close(value, expected["model"][key], rtol=1e-9, atol=1e-10)
        for mine, theirs in zip(state["moments"], expected["moments"], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-12)
    assert len(seen) > 1


def test_gradient_buckets_hold_the_rows_alone(ranks: list[Any]) -> None:
    model, _, _ = make("plain")
    rows = sum(2 * (count * 64 + count) for count in (19, 10))  # of q and k in two layers
    assert rows == sum(p.numel() for p in model.parameters() if p.requires_grad)
    for kind in KINDS:
        assert sum(ranks[0][kind]["buckets"]) == STEPS * rows


def apply_too_late(rank: int, tmp: str) -> None:
    join(rank, 2, tmp)
    ddp = DistributedDataParallel(models.tiny_model())
    longact.apply(ddp.module, others="freeze")
    with pytest.raises(RuntimeError, match="apply first, then wrap"):
        ddp(input_ids=models.token_ids(seed=rank))
    dist.destroy_process_group()


def test_a_model_that_is_wrapped_already_is_refused(tmp_path: Path) -> None:
    start_ranks(2, apply_too_late, str(tmp_path))


def train_a_copy(rank: int, tmp: str) -> None:
    model: Any = torch.load(f"{tmp}/copy.pt", weights_only=False)
    optimizer = torch.optim.SGD([model[0].salient_weight], lr=0.1)
    model(torch.ones(4, 3)).square().sum().backward()
    optimizer.step()
    torch.save(model.state_dict(), f"{tmp}/trained.pt")


def test_a_copy_trains_with_another_optimizer_where_nothing_was_applied(tmp_path: Path) -> None:
    model: Any = torch.nn.Sequential(torch.nn.Linear(3, 6))
    longact.apply(model, 0.5, targets="0", others="freeze")
    longact.set_rows(model[0].weight, [1, 2, 5])
    torch.save(model, tmp_path / "copy.pt")
    start_ranks(1, train_a_copy, str(tmp_path))
    trained = torch.load(tmp_path / "trained.pt")["0.weight"]
    assert models.changed_rows(model[0].weight.detach(), trained) == [1, 2, 5]
