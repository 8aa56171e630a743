"""That bench_memory.py checks what it measures and counts right: `pytest benchmarks`."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import bench_memory
import pytest
import torch
from bench_memory import (
    SHAPES,
    CpuMeter,
    CudaMeter,
    DoesNotFit,
    Job,
    Line,
    Memory,
    Spec,
    Times,
    Training,
    all_specs,
    check_losses,
    compare,
    find_goals,
    measure_memory,
    measure_time,
    parse,
    process_bytes,
    run_all,
)
from bench_update import CheckFailed

import longact

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # between peft and transformers

TINY = Job(Spec("adamw"), SHAPES["tiny"], tokens=24, steps=1)
SPARSE = replace(TINY, spec=Spec("sparse", 0.3))
FULL = replace(TINY, spec=Spec("full", 0.3))
MIB = 1 << 20


# ---- what is measured ----------------------------------------------------------------------------


def test_cpu_meter_sees_every_byte_and_when() -> None:
    before = torch.empty(3 * MIB, dtype=torch.uint8)
    meter = CpuMeter()
    meter.start()
    kept = torch.empty(5 * MIB, dtype=torch.uint8)
    passing = torch.empty(7 * MIB, dtype=torch.uint8)
    del passing
    meter.mark("one")
    small = [torch.empty(1000, dtype=torch.uint8) for _ in range(3)]
    del kept, before
    meter.mark("two")
    meter.mark("nothing")
    phases = meter.stop()
    assert (phases["one"].peak, phases["one"].live) == (12 * MIB, 5 * MIB)
    assert phases["one"].sizes == {5 * MIB: 1, 7 * MIB: 1}
    assert (phases["two"].peak, phases["two"].live) == (5 * MIB + 3000, 3000)
    assert phases["two"].sizes == {1000: 3}
    assert (phases["nothing"].peak, phases["nothing"].live) == (3000, 3000)
    assert len(small) == 3


def test_cpu_meter_finds_a_peak_inside_an_operation() -> None:
    x = torch.randn(1000, 256)
    meter = CpuMeter()
    meter.start()
    y = x.softmax(1).t().contiguous().sum()  # two results of x's size at once
    meter.mark("done")
    assert meter.stop()["done"].peak >= 2 * x.nbytes
    assert y.isfinite()


def test_cuda_meter_reads_and_resets_the_peak_of_each_phase(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[str] = []
    numbers = iter([70, 50, 90, 60])
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: log.append(name))
    for name in ("max_memory_allocated", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: next(numbers))
    meter = CudaMeter()
    meter.start()
    meter.mark("one")
    meter.mark("two")
    phases = meter.stop()
    assert [(p.peak, p.live) for p in phases.values()] == [(70, 50), (90, 60)]
    assert log == ["reset_peak_memory_stats", "synchronize"] * 2 + ["reset_peak_memory_stats"]


def test_process_bytes_grow_and_their_peak_can_be_forgotten() -> None:
    bench_memory.forget_peak()
    start = process_bytes("VmHWM")
    block = torch.ones(64 * MIB, dtype=torch.uint8)
    assert process_bytes("VmHWM") - start > 60 * MIB
    assert process_bytes("VmHWM") >= process_bytes("VmRSS") > block.nbytes
    del block
    bench_memory.forget_peak()
    assert process_bytes("VmHWM") - start < 4 * MIB


def salient(keep: float) -> int:
    """Of tiny's two layers, q_proj 64 x 64 and k_proj 32 x 64."""
    rows = {0.3: (19, 10), 0.1: (6, 3)}[keep]
    return 2 * sum(rows) * 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", all_specs(), ids=lambda spec: spec.label)
def test_counted_bytes_are_those_of_the_shapes(spec: Spec, dtype: torch.dtype) -> None:
    job = replace(TINY, spec=spec, dtype=dtype)
    found = measure_memory(job)
    size, elements = dtype.itemsize, SHAPES["tiny"].numel
    masked = 2 * (64 + 32) * 64
    masters = 4 if dtype == torch.bfloat16 else 0
    if spec.kind == "adamw":
        trained = moments = elements
        wanted = (size * elements, size * elements, 2 * size * elements, 0)
    elif spec.kind == "lora":
        assert spec.rank is not None
        trained = moments = 2 * spec.rank * ((64 + 64) + (64 + 32))  # in float32
        wanted = (size * elements + 4 * trained, 4 * trained, 8 * trained, 0)
    elif spec.kind == "sparse":
        trained = moments = salient(spec.keep or 0)
        wanted = (size * (elements + trained), size * trained, 8 * trained, masters * trained)
    else:
        trained = elements - masked + salient(0.3)
        moments = elements if spec.kind == "full" else trained
        wanted = (size * elements, size * elements, 8 * moments, masters * moments)
    assert (found.weights, found.gradients, found.moments, found.masters) == wanted
    assert found.trained == job.trained == trained
    assert found.rest >= 0
    assert 0 < found.activations <= found.peak - found.weights - found.optimizer
    known = found.weights + found.gradients + found.optimizer
    assert known * 0.8 < job.least_bytes <= known


def test_bookkeeping_is_small_and_has_rows_ages_and_counters() -> None:
    found = measure_memory(SPARSE)
    rows, channels = 19 + 10, 64 + 32
    # ages and rows, int32; totals, fp32; changed, bool; the tokens and the steps are scalars.
    least = 2 * (rows * (4 + 4) + channels * (4 + 1))
    assert least <= found.bookkeeping <= 2 * least


def test_checkpointing_and_fewer_tokens_keep_fewer_activations() -> None:
    plain = measure_memory(SPARSE)
    short = measure_memory(replace(SPARSE, tokens=12))
    large = measure_memory(replace(SPARSE, tokens=240))
    checkpointed = measure_memory(replace(SPARSE, checkpointing=True))
    dense = measure_memory(TINY)
    assert 0.4 * plain.activations < short.activations < 0.6 * plain.activations
    assert checkpointed.activations < 0.7 * plain.activations
    assert large.peak_in == "backward"  # of the loss, beside all activations
    assert short.weights == checkpointed.weights == plain.weights
    # A frozen projection does not keep its input.
    assert plain.activations < 0.9 * dense.activations


def test_first_losses_are_equal_and_compared() -> None:
    memory = {s: measure_memory(replace(TINY, spec=s)) for s in all_specs()}
    check_losses(memory, torch.float32)
    memory[Spec("lora", rank=64)].loss *= 1.001
    with pytest.raises(CheckFailed, match=r"LoRA r 64: the first loss"):
        check_losses(memory, torch.float32)


@pytest.mark.parametrize("spec", [Spec("adamw"), Spec("sparse", 0.3)], ids=lambda spec: spec.label)
def test_times_have_every_part_of_every_step(spec: Spec) -> None:
    times = measure_time(replace(TINY, spec=spec, steps=3))
    for part in (times.forward, times.backward, times.update):
        assert len(part) == 3
        assert min(part) > 0.0


# ---- what is checked -----------------------------------------------------------------------------


def damage_steps(monkeypatch: pytest.MonkeyPatch, damage: Callable[[Training], None]) -> None:
    """Each of the checked steps ends with `damage`."""
    step = Training.step

    def damaged(self: Training, ids: torch.Tensor) -> float:
        loss = step(self, ids)
        with torch.no_grad():
            damage(self)
        return loss

    monkeypatch.setattr(Training, "step", damaged)


def weight(training: Training, name: str) -> torch.Tensor:
    found: list[torch.Tensor]
    found = [param for key, param in training.model.named_parameters() if key.endswith(name)]
    return found[0]


def touch_every_row(training: Training) -> None:
    weight(training, "layers.1.self_attn.k_proj.weight").mul_(1.001)


def touch_frozen(training: Training) -> None:
    weight(training, "layers.0.mlp.up_proj.weight")[3, 3] += 1e-6


@pytest.mark.parametrize(
    ("job", "damage", "message"),
    [
        (FULL, touch_every_row, r"k_proj.weight: a step changed 32 rows, not the 10"),
        (SPARSE, touch_every_row, r"k_proj.weight: a step changed 32 rows, not the 10"),
        (SPARSE, touch_frozen, r"up_proj.weight: changed, and is not trained"),
        (replace(TINY, spec=Spec("lora", rank=16)), touch_frozen, r"up_proj.*is not trained"),
    ],
)
def test_a_step_that_changes_too_much_is_found(
    monkeypatch: pytest.MonkeyPatch, job: Job, damage: Any, message: str
) -> None:
    damage_steps(monkeypatch, damage)
    with pytest.raises(CheckFailed, match=message):
        measure_memory(job)


@pytest.mark.parametrize(
    ("job", "optimizer", "message"),
    [
        (TINY, torch.optim.AdamW, r"embed_tokens.weight: is trained, and did not change"),
        (replace(TINY, spec=Spec("lora", rank=16)), torch.optim.AdamW, r"lora_A.*did not change"),
        (SPARSE, longact.FusedMaskedAdam, r"q_proj.weight: a step changed 0 rows, not the 19"),
    ],
)
def test_a_step_that_does_nothing_is_found(
    monkeypatch: pytest.MonkeyPatch, job: Job, optimizer: Any, message: str
) -> None:
    monkeypatch.setattr(optimizer, "step", lambda self: None)
    with pytest.raises(CheckFailed, match=message):
        measure_memory(job)


def test_a_whole_gradient_in_sparse_mode_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    damage_steps(monkeypatch, lambda training: print(torch.zeros(32, 64).shape))
    with pytest.raises(CheckFailed, match="allocated 1 tensors of the size of a whole q or k"):
        measure_memory(SPARSE)


def test_memory_that_is_not_counted_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[torch.Tensor] = []
    damage_steps(monkeypatch, lambda training: kept.append(torch.zeros(MIB)))
    with pytest.raises(CheckFailed, match="the tensors that are counted have"):
        measure_memory(TINY)


def test_a_loss_that_is_not_finite_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Training, "forward", lambda self, ids: self.model(ids).logits.sum() / 0)
    monkeypatch.setattr(bench_memory, "check_update", lambda *args: None)
    with pytest.raises(CheckFailed, match="losses"):
        measure_memory(TINY)


# ---- runs ----------------------------------------------------------------------------------------


def in_process(job: Job, measure: str) -> Any:
    return measure_memory(job) if measure == "memory" else measure_time(job)


TINY_RUN = ["--model", "tiny", "--tokens", "24", "--rounds", "2", "--steps", "2"]


def test_run_prints_every_table_and_writes_json_and_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(bench_memory, "run", in_process)
    result, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    assert bench_memory.main([*TINY_RUN, "--json", str(result), "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    for text in (
        "tiny's shape, random weights: 0.1 M elements; 1 x 24 tokens",
        "medians of 4 steps in 2 rounds",
        "longact 0.3 sparse / LoRA r 16",
        "Goals are set for smollm2 in float32",
    ):
        assert text in out
    report = json.loads(result.read_text())
    lines = {line["variant"]: line for line in report["lines"]}
    assert list(lines) == [spec.label for spec in all_specs()]
    memory = lines["longact 0.3 sparse"]["memory"]
    parts = [memory[p] for p in ("weights", "gradients", "moments", "masters", "bookkeeping")]
    assert sum(parts) + lines["longact 0.3 sparse"]["rest"] == memory["peak"]
    assert len(report["comparisons"]) == 8
    assert picture.stat().st_size > 10_000


def test_failed_check_ends_with_1_and_no_figure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_memory, "run", in_process)
    monkeypatch.setattr(longact.FusedMaskedAdam, "step", lambda self: None)
    assert bench_memory.main(TINY_RUN) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "FAILED, no figures: longact 0.3 full" in captured.err


def test_without_peft_lora_is_left_out_and_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(bench_memory, "run", in_process)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "peft" else find(name, *a)
    )
    assert bench_memory.main(TINY_RUN) == 0
    out = capsys.readouterr().out
    assert "LoRA r 16            not measured: needs peft: pip install peft" in out
    assert "longact 0.3 sparse / LoRA" not in out


def test_what_does_not_fit_is_left_out_and_the_rest_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(job: Job, measure: str) -> Any:
        if job.spec.kind == "full" and measure == "time":
            raise DoesNotFit("ran out of memory")
        return (
            bench_memory_run(job, measure) if job.spec.kind == "adamw" else in_process(job, measure)
        )

    bench_memory_run: Any = bench_memory.run
    monkeypatch.setattr(bench_memory, "run", run)
    # Enough for all but AdamW, which needs 16 bytes of each element.
    jobs = [replace(job, memory=15 * SHAPES["tiny"].numel) for job in (TINY, FULL, SPARSE)]
    lines, skipped = run_all(jobs, 1, {"LoRA r 16": "needs peft"})
    assert [line.spec.kind for line in lines] == ["sparse"]
    assert list(skipped) == ["LoRA r 16", "AdamW", "longact 0.3 full"]
    assert skipped["AdamW"].startswith("needs 0.0 GB for weights, gradients and optimizer")


def killed(job: Job, measure: str, answer: Connection) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def broken(job: Job, measure: str, answer: Connection) -> None:
    os._exit(3)


@pytest.mark.slow
def test_processes_measure_and_say_what_went_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench_memory.run(SPARSE, "memory") == measure_memory(SPARSE)
    times = bench_memory.run(SPARSE, "time")
    assert isinstance(times, Times)
    assert times.resident > 0
    # 67 MB an activation: the allocation itself fails, and that is told from other errors.
    large = replace(SPARSE, batch=4096, tokens=64, memory=150 * MIB)
    with pytest.raises(DoesNotFit, match=r"ran out of memory \(0.2 GB were there\)"):
        bench_memory.run(large, "memory")
    with pytest.raises(RuntimeError, match="Traceback"):
        bench_memory.run(replace(SPARSE, tokens=0), "time")
    for ending, error, message in (
        (killed, DoesNotFit, "was killed"),
        (broken, RuntimeError, "ended with 3"),
    ):
        monkeypatch.setattr(bench_memory, "work", ending)
        with pytest.raises(error, match=message):
            bench_memory.run(SPARSE, "memory")


@pytest.mark.slow
def test_the_command_itself(tmp_path: Path) -> None:
    script = Path(bench_memory.__file__)
    arguments = ["--model", "tiny", "--tokens", "24", "--rounds", "1", "--steps", "1"]
    done = subprocess.run(
        [sys.executable, str(script), *arguments, "--dtype", "bfloat16"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "LoRA r 64 " in done.stdout
    assert "not measured" not in done.stdout
    assert "Warning" not in done.stderr


# ---- reckoning -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "published"),
    [("smollm2", 134.5), ("125m", 124.6), ("350m", 345.3), ("1b", 1235.8)],
)
def test_shapes_add_up_to_the_published_millions(model: str, published: float) -> None:
    assert SHAPES[model].numel / 1e6 == pytest.approx(published, abs=0.1)


@pytest.mark.parametrize("model", SHAPES)
def test_no_activation_of_a_checked_step_has_a_weights_size(model: str) -> None:
    for param in SHAPES[model].parameters():
        assert param.numel % bench_memory.CHECK_TOKENS != 0


def line(spec: Spec, gradients: int, moments: int, seconds: float) -> Line:
    memory = Memory(1, 1000, gradients, moments, 0, 0, 100, 5000, "update", 1.0)
    return Line.of(spec, memory, [Times([seconds] * 3, [seconds] * 3, [seconds] * 3, 10)])


def test_goal_is_a_ratio_to_adamw() -> None:
    args = types.SimpleNamespace(model="smollm2", dtype="float32")
    adamw, sparse = line(Spec("adamw"), 1000, 2000, 1.0), line(Spec("sparse", 0.3), 30, 60, 0.5)
    (goal,) = find_goals(args, [adamw, sparse])  # type: ignore[arg-type]
    assert goal.measured == pytest.approx(0.03)
    assert goal.reached
    assert "3.000 % (goal <= 3.2 %)" in goal.line()
    (goal,) = find_goals(args, [adamw, line(Spec("sparse", 0.3), 37, 60, 0.5)])  # type: ignore[arg-type]
    assert not goal.reached
    assert find_goals(args, [adamw, line(Spec("sparse", 0.1), 30, 60, 0.5)]) == []  # type: ignore[arg-type]
    args.dtype = "bfloat16"
    assert find_goals(args, [adamw, sparse]) == []  # type: ignore[arg-type]


def test_comparison_is_longacts_share_and_marks_what_it_loses(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lora, sparse = line(Spec("lora", rank=16), 10, 20, 1.0), line(Spec("sparse", 0.3), 30, 60, 0.5)
    ratios = compare(sparse, lora)
    assert ratios["gradients + optimizer"] == pytest.approx(3.0)
    assert ratios["step"] == pytest.approx(0.5)
    bench_memory.print_comparisons([lora, sparse])
    text = capsys.readouterr().out.splitlines()[-1]
    wanted = "longact 0.3 sparse / LoRA r 16 3.000* 1.000 1.000 1.000 0.500 0.500"
    assert " ".join(text.split()) == wanted


def test_step_is_the_sum_of_its_parts() -> None:
    times = [Times([0.1, 0.3], [0.2, 0.1], [0.3, 0.1], 5), Times([0.2], [0.2], [0.3], 9)]
    found = Line.of(Spec("adamw"), Memory(1, 1, 1, 1, 0, 0, 1, 9, "update", 1.0), times)
    assert found.step.median == pytest.approx(600)
    assert found.fastest == pytest.approx(500)
    assert found.forward.median == pytest.approx(200)
    assert found.resident == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "must be at least 1"),
        (["--memory", "0"], "--memory 0: must be more than 0"),
        (["--json", "/nowhere/bench.json"], "there is no directory /nowhere"),
        (["--model", "2b"], "invalid choice: '2b'"),
    ],
)
def test_bad_argument_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(arguments)
    assert message in capsys.readouterr().err


def test_what_is_missing_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    find = importlib.util.find_spec
    for missing, arguments, message in (
        ("", ["--device", "cuda"], "finds no CUDA device"),
        ("transformers", [], "pip install 'longact[transformers]'"),
        ("matplotlib", ["--plot", "bench.png"], "pip install 'longact[plot]'"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(
                importlib.util,
                "find_spec",
                lambda name, missing=missing: None if name == missing else find(name),
            )
            with pytest.raises(SystemExit):
                parse(arguments)
        assert message in capsys.readouterr().err
