"""`apply_to_trainer` on two real processes (torchrun, gloo, DDP)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_tree

pytest.importorskip("trl", reason="needs the rl extra")

HERE = Path(__file__).parent


KINDS = ("trainer", "grpo")


def run(folder: Path, *, resume: Path | None = None) -> list[dict[str, Any]]:
    """The final states of both ranks, by kind."""
    arguments = [str(folder), *([] if resume is None else [str(resume)])]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", __file__, *arguments),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        cwd=HERE,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.slow
def test_two_ranks_resume_between_refreshes(tmp_path: Path) -> None:
    """Rows are chosen at steps 2, 4, 6 and the checkpoint is of step 3: what both ranks counted
    since step 2 is in it."""
    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "resumed", resume=tmp_path / "whole")
    for kind in KINDS:
        assert_same_tree(whole[0][kind], whole[1][kind], kind)  # replicas
        for before, after in zip(whole, resumed, strict=True):
            assert_same_tree(before[kind], after[kind], kind)


def main(folder: str, resume: str | None = None) -> None:
    states = {kind: trained(kind, Path(folder), resume) for kind in KINDS}
    torch.save(states, f"{folder}/rank{os.environ['RANK']}.pt")


def trained(kind: str, folder: Path, resume: str | None) -> dict[str, Any]:
    from models import tiny_model
    from trainers import make_trainer, state_of

    from longact.integrations.transformers import apply_to_trainer

    trainer = make_trainer(
        kind,
        folder / kind,
        model=tiny_model(seed=1 if resume else 0),
        per_device_train_batch_size=2,  # groups of 4 completions straddle the ranks
        ddp_backend="gloo",
        ddp_timeout=120,
        save_strategy="steps",
        save_steps=3,
    )
    handle = apply_to_trainer(trainer, refresh_every=2)
    trainer.train(resume_from_checkpoint=resume and f"{resume}/{kind}/checkpoint-3")
    state = state_of(trainer, handle)
    counts = state["longact"]["projections"]
    assert all(entry["tokens"] == 0 for entry in counts.values())  # step 6 refreshed
    return state


if __name__ == "__main__":
    main(*sys.argv[1:])
    # As a process of torch.multiprocessing ends. While an interpreter ends in its own way, a thread
    # of gloo that frees a tensor aborts it, now and then (pytorch's pull request 179291).
    os._exit(0)
