"""`apply_to_trainer` on two real processes (gloo, DDP)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_tree
from ranks import start_trainer_ranks

pytest.importorskip("trl", reason="needs the rl extra")

KINDS = ("trainer", "grpo")


@pytest.mark.slow
def test_two_ranks_resume_between_refreshes(tmp_path: Path) -> None:
    """Rows are chosen at steps 2, 4, 6 and the checkpoint is of step 3: what both ranks counted
    since step 2 is in it."""
    start_trainer_ranks(2, _rank, str(tmp_path))
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for kind in KINDS:
        whole = [rank[f"{kind}, whole"] for rank in ranks]
        assert_same_tree(whole[0], whole[1], kind)  # replicas
        for before, rank in zip(whole, ranks, strict=True):
            assert_same_tree(before, rank[f"{kind}, resumed"], kind)


def _rank(rank: int, folder: str) -> None:
    states = {}
    for kind in KINDS:
        whole = Path(folder) / kind
        states[f"{kind}, whole"] = trained(kind, whole)
        checkpoint = whole / "checkpoint-3"
        states[f"{kind}, resumed"] = trained(kind, whole / "resumed", checkpoint)
    torch.save(states, f"{folder}/rank{rank}.pt")


def trained(kind: str, folder: Path, checkpoint: Path | None = None) -> dict[str, Any]:
    from models import tiny_model
    from trainers import make_trainer, state_of

    from longact.integrations.transformers import apply_to_trainer

    trainer = make_trainer(
        kind,
        folder,
        model=tiny_model(seed=0 if checkpoint is None else 1),
        per_device_train_batch_size=2,  # groups of 4 completions straddle the ranks
        ddp_backend="gloo",
        ddp_timeout=120,
        save_strategy="steps",
        save_steps=3,
    )
    handle = apply_to_trainer(trainer, refresh_every=2)
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    state = state_of(trainer, handle)
    counts = state["longact"]["projections"]
    assert all(entry["tokens"] == 0 for entry in counts.values())  # step 6 refreshed
    return state
