"""Runs what a plan asks for, several side by side, and keeps the results."""

from __future__ import annotations

import datetime
import gc
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments.plan import Run, plan
from experiments.store import Record, Store

__all__ = ["run_all"]

PACKAGES = ("longact", "torch", "transformers", "trl")


def run_all(
    config: Mapping[str, Any],
    store: Store,
    folder: Path,
    *,
    device: str = "cpu",
    workers: int = 2,
    minutes: float | None = None,
) -> int:
    """Stage by stage, until nothing is missing; returns how many runs failed.

    What is in the store is not run again. A run depends on its specification alone (one thread, its
    own seeds), not on what runs beside it. After `minutes` none begins any more.
    """
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    origin = {"config": config["name"], **_commit()}
    failed: set[str] = set()
    with ProcessPoolExecutor(workers, get_context("spawn"), _prepare, (device,)) as pool:
        while missing := [run for run in plan(config, store.records) if run.key not in failed]:
            futures = {pool.submit(work, run, folder, device, deadline): run for run in missing}
            for future in tqdm(as_completed(futures), missing[0].stage, len(futures)):
                run = futures[future]
                record = _result(future, run)
                if record is None:
                    failed.add(run.key)
                elif record:
                    store.add({**origin, **record})
            late = deadline is not None and time.monotonic() > deadline
            if late or failed:
                break
    return len(failed)


def _result(future: Future[Record], run: Run) -> Record | None:
    try:
        return future.result()
    except Exception:
        spec = dict(run.spec)
        print(f"failed: {run.stage} {spec}", file=sys.stderr)
        traceback.print_exc()
        return None


def work(run: Run, folder: Path, device: str, deadline: float | None) -> Record:
    """In a worker: the run's record; an empty one if it came too late to begin."""
    if deadline is not None and time.monotonic() > deadline:
        return {}
    start, cpu = time.perf_counter(), time.process_time()
    metrics = _metrics(run, folder, device)
    return {
        "key": run.key,
        "kind": run.kind,
        "stage": run.stage,
        "spec": run.spec,
        "versions": {package: version(package) for package in PACKAGES},
        "device": device,
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "metrics": metrics,
    }


def _metrics(run: Run, folder: Path, device: str) -> dict[str, Any]:
    # Here, as the imports take seconds, and the process that plans needs none of them.
    from experiments import models, training

    spec = dict(run.spec)
    base = spec.pop("base", None)
    path = models.checkpoint(spec if base is None else base, folder, device)
    measure = {"pretrain": training.look_at, "selection": training.select, "train": training.train}
    return measure[run.kind](spec, path, device)


def _prepare(device: str) -> None:
    """Of a worker: quiet, and one thread, with which a run gives the same bits everywhere."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    import datasets
    import torch
    import transformers

    from experiments import training  # noqa: F401

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if device == "cpu":
        torch.set_num_threads(1)
    # Every trainer collects garbage as it starts, for half a second: not what was imported, then.
    gc.freeze()


def _commit() -> dict[str, Any]:
    """Of the code that runs; empty outside of a repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    return {"commit": git("rev-parse", "--short", "HEAD"), "dirty": bool(git("status", "-s", "."))}
