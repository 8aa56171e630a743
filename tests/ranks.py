"""Real processes (gloo) for tests: they start, and what they found is compared."""

from __future__ import annotations

import datetime
import itertools
import multiprocessing
import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

#: Ranks are forked from a process that has imported these; not longact, which may come without its
#: native module from the working directory.
PRELOAD = [
    "torch.testing",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.tensor.debug",
    "torch.distributed.tensor.parallel",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
]
TIMEOUT = datetime.timedelta(seconds=120)  # of a collective: nothing hangs


def start_ranks(world: int, target: Callable[..., None], *args: Any) -> None:
    """`target(rank, *args)` in new processes of their own, until all have ended."""
    multiprocessing.set_forkserver_preload(PRELOAD)
    mp.start_processes(target, args, nprocs=world, start_method="forkserver")


def start_trainer_ranks(world: int, target: Callable[..., None], *args: Any) -> None:
    """`start_ranks` in the environment that torchrun gives: trainers join by themselves."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_ranks(world, _trainer_rank, world, port, target, args)


def _trainer_rank(
    rank: int, world: int, port: int, target: Callable[..., None], args: tuple[Any, ...]
) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), HF_HUB_OFFLINE="1",
    )  # fmt: skip
    torch.set_num_threads(1)
    target(rank, *args)
    dist.destroy_process_group()


class _Ranks:
    """Ranks that do one thing after another: a start, with what PyTorch makes at its first DTensor,
    costs more than most of what they do."""

    def __init__(self, world: int) -> None:
        multiprocessing.set_forkserver_preload(PRELOAD)
        context = multiprocessing.get_context("forkserver")
        self.folder = tempfile.TemporaryDirectory()
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(world):
            here, there = context.Pipe()
            # A daemon: killed where this process ends.
            arguments = (rank, world, self.folder.name, there)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, worker: Callable[..., Any], tmp: Path, args: tuple[Any, ...]) -> None:
        for pipe in self.pipes:
            pipe.send((worker, tmp, args))
        waiting = list(self.pipes)
        while waiting:
            for pipe in wait(waiting):
                assert isinstance(pipe, Connection)
                waiting.remove(pipe)
                rank = self.pipes.index(pipe)
                try:
                    error = pipe.recv()
                except EOFError:
                    self.processes[rank].join()
                    error = f"ended, with exit code {self.processes[rank].exitcode}"
                if error is not None:
                    raise RuntimeError(f"{worker.__name__}{args} on rank {rank}: {error}")

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


_RANKS: dict[int, _Ranks] = {}


def run_ranks(world: int, worker: Callable[..., Any], tmp: Path, *args: Any) -> list[Any]:
    """`worker(tmp, *args)` on gloo ranks, which may have run others; what each returned."""
    ranks = _RANKS.pop(world, None) or _Ranks(world)
    try:
        ranks.run(worker, tmp, args)
    except BaseException:
        ranks.end()  # others may wait for one that failed
        raise
    _RANKS[world] = ranks
    return _found(world, tmp)


def run_new_ranks(world: int, worker: Callable[..., Any], tmp: Path, *args: Any) -> list[Any]:
    """`run_ranks` for what leaves something behind in its process."""
    start_ranks(world, _rank, world, worker, str(tmp), args)
    return _found(world, tmp)


def _found(world: int, tmp: Path) -> list[Any]:
    return [torch.load(tmp / f"rank{rank}.pt", weights_only=False) for rank in range(world)]


def _serve(rank: int, world: int, folder: str, pipe: Connection) -> None:
    join(rank, world, folder)
    while True:
        worker, tmp, args = pipe.recv()
        torch.manual_seed(0)
        error = None
        try:
            torch.save(worker(tmp, *args), tmp / f"rank{rank}.pt")
        except BaseException:  # pytest.fail's is not an Exception
            error = traceback.format_exc()
        pipe.send(error)


def _rank(rank: int, world: int, worker: Callable[..., Any], tmp: str, args: Any) -> None:
    join(rank, world, tmp)
    torch.save(worker(Path(tmp), *args), f"{tmp}/rank{rank}.pt")
    dist.destroy_process_group()


def join(rank: int, world: int, tmp: str) -> None:
    """This process becomes a rank; all meet in a file of the folder."""
    torch.set_num_threads(1)
    store = f"file://{tmp}/store"
    dist.init_process_group("gloo", store, TIMEOUT, rank=rank, world_size=world)


def backward(model: Any, batch: dict[str, Tensor], scale: Any) -> None:
    logits = model(**batch).logits
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    (loss * scale).backward()


def compare(got: list[Any], expected: list[Any], rtol: float) -> None:
    assert len(got) == len(expected)
    for step, (mine, other) in enumerate(zip(got, expected, strict=True)):
        assert mine.keys() == other.keys()
        for key in mine:
            what = f"step {step}: {key}"
            if key in ("rows", "trained"):
                for name in other[key]:
                    a, b = mine[key][name], other[key][name]
                    assert (a is None) == (b is None), what
                    assert a is None or torch.equal(a, b), f"{what} of {name}: {a} {b}"
            elif rtol == 0 or key.endswith("ages"):
                assert torch.equal(torch.as_tensor(mine[key]), torch.as_tensor(other[key])), what
            else:
                torch.testing.assert_close(
                    mine[key], other[key], rtol=rtol, atol=rtol * 1e-3, msg=what
                )


def check_untouched(history: list[Any]) -> None:
    """Rows that a step does not train keep every bit of weight, bias, moments and age."""
    checked = 0
    for before, after in itertools.pairwise(history):
        for name, rows in after["trained"].items():
            untouched = torch.ones(after[f"{name}.weight"].shape[0], dtype=torch.bool)
            untouched[rows.long()] = False
            for key in after:
                if key.startswith(name + ".") and after[key].shape[0] != 0:
                    assert torch.equal(before[key][untouched], after[key][untouched]), key
                    touched = not torch.equal(before[key][~untouched], after[key][~untouched])
                    checked += touched
    assert checked > len(history)
