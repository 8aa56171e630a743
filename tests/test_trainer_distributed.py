"""`apply_to_trainer` on two real processes (torchrun, gloo, DDP)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_same_tree

pytest.importorskip("trl", reason="needs the rl extra")

HERE = Path(__file__).parent


def run(folder: Path, kind: str, *, resume: str = "") -> list[dict[str, torch.Tensor]]:
    """The final state of both ranks."""
    folder.mkdir(exist_ok=True)
    arguments = [str(folder), kind, resume]
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
@pytest.mark.parametrize("kind", ["trainer", "grpo"])
def test_two_ranks_resume_between_refreshes(kind: str, tmp_path: Path) -> None:
    """Rows are chosen at steps 2, 4, 6 and the checkpoint is of step 3: what both ranks counted
    since step 2 is in it."""
    whole = run(tmp_path / "whole", kind)
    assert_same_tree(whole[0], whole[1])  # replicas
    resumed = run(tmp_path / "resumed", kind, resume=str(tmp_path / "whole" / "checkpoint-3"))
    assert_same_tree(whole, resumed)


def main(folder: str, kind: str, resume: str = "") -> None:
    from models import tiny_model
    from trainers import make_trainer, state_of

    from longact.integrations.transformers import apply_to_trainer

    trainer = make_trainer(
        kind,
        Path(folder),
        model=tiny_model(seed=1 if resume else 0),
        per_device_train_batch_size=2,  # groups of 4 completions straddle the ranks
        ddp_backend="gloo",
        ddp_timeout=120,
        save_strategy="steps",
        save_steps=3,
    )
    handle = apply_to_trainer(trainer, refresh_every=2)
    trainer.train(resume_from_checkpoint=resume or None)
    state = state_of(trainer, handle)
    counts = state["longact"]["projections"]
    assert all(entry["tokens"] == 0 for entry in counts.values())  # step 6 refreshed
    torch.save(state, f"{folder}/rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
    # As a process of torch.multiprocessing ends. While an interpreter ends in its own way, a thread
    # of gloo that frees a tensor aborts it, now and then (pytorch's pull request 179291).
    os._exit(0)
