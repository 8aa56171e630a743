"""examples/fsdp_grpo.py under torchrun: it runs, and a run of which a rank is killed ends as one
that nobody touched."""

from __future__ import annotations

import os
import re
import runpy
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import assert_same_tree

pytest.importorskip("datasets", reason="needs the rl extra")

pytestmark = pytest.mark.slow
ENV = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    # Else ranks that start again may read addresses of dead ones (pytorch's issue 135712).
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}
EXAMPLE = Path(__file__).parent.parent / "examples" / "fsdp_grpo.py"


def start(model: Path, output: Path, *arguments: str) -> subprocess.Popen[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    options = ["--max-restarts=2", "--monitor-interval=0.1", __file__]
    run = [
        "--model",
        str(model),
        "--output",
        str(output),
        "--steps=6",
        "--save-every=2",
        "--lr=1e-2",
    ]
    small = ["--tokens=200", "--task=niah_multikey_2", "--completion=4", "--generations=4"]
    return subprocess.Popen(
        [*torchrun, *options, *run, *small, *arguments],
        env=os.environ | ENV,
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def result(run: subprocess.Popen[str], output: Path) -> tuple[str, Any, Any]:
    """What it printed, its last checkpoint's rows, and its weights."""
    try:
        said, _ = run.communicate(timeout=300)
    finally:
        run.terminate()  # one that hangs, with its ranks
    assert run.returncode == 0, said[-4000:]
    from safetensors.torch import load_file

    rows = torch.load(output / "step-6" / "longact.pt")
    return said, rows, load_file(output / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from models import tiny_model
    from trainers import tiny_tokenizer

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    tiny_model(vocab_size=len(tokenizer), max_position_embeddings=256).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Any]:
    output = tmp_path_factory.mktemp("undisturbed")
    return result(start(tiny, output), output)


def test_it_trains_and_keeps_two_checkpoints(undisturbed: Any, tiny: Path) -> None:
    from safetensors.torch import load_file

    said, rows, weights = undisturbed
    rewards = re.findall(r"step \d+: reward ([\d.]+)", said)
    assert len(rewards) == 6
    assert len(set(rewards)) > 1
    before = load_file(tiny / "model.safetensors")
    assert weights.keys() == before.keys()
    for name, entry in rows["projections"].items():
        changed = (weights[f"{name}.weight"] != before[f"{name}.weight"]).any(1)
        assert 0 < len(entry["rows"]) <= changed.sum() < len(changed)


def test_killed_ranks_come_back_to_the_same_weights(
    tiny: Path, undisturbed: Any, tmp_path: Path
) -> None:
    """After a checkpoint, and while one is written; also where half of one lies about."""
    (tmp_path / "step-6.part").mkdir()
    (tmp_path / "step-6.part" / "__0_0.distcp").write_bytes(b"half")
    run = start(tiny, tmp_path)
    pids = [tmp_path / f"pid{rank}" for rank in range(2)]
    old = ""
    for rank, when in ((0, "step-2"), (1, "step-4.part")):
        deadline = time.monotonic() + 200
        while not (tmp_path / when).exists() or pids[rank].read_text() in ("", old):
            assert run.poll() is None, run.communicate()[0][-4000:]
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process, old = int(pids[rank].read_text()), pids[1].read_text()
        os.kill(process, signal.SIGKILL)
    said, rows, weights = result(run, tmp_path)
    assert said.count("started") == 6, said  # both ranks, three times
    assert_same_tree(rows, undisturbed[1])
    assert_same_tree(weights, undisturbed[2])
    assert {path.name for path in tmp_path.glob("step-*")} == {"step-4", "step-6"}


def by_chance(completions: list[str], answers: Any) -> list[float]:
    """A reward that a random model gets now and then."""
    return [float(zlib.crc32(text.encode()) % 2) for text in completions]


def main() -> None:
    import longact.tasks

    longact.tasks.recall_reward = by_chance  # type: ignore[assignment]
    output = Path(sys.argv[sys.argv.index("--output") + 1])
    (output / f"pid{os.environ['RANK']}").write_text(str(os.getpid()))
    print("started", flush=True)
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert not dist.is_initialized()
    os._exit(0)  # see test_trainer_distributed.py


if __name__ == "__main__":
    main()
