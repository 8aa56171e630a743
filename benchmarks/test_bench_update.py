"""The update's timings as pytest-benchmark cases, on small shapes: `pytest benchmarks`.

`bench_update.py` is the benchmark to quote from; these cases show at a glance whether a change made
something slower, and that the benchmark itself does what it says.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_update
import pytest
import torch
from bench_update import Buffers, CheckFailed, Spec, all_specs, check, make_variant
from shapes import MODELS, ParamShape
from timing import Clock, CudaClock, Limits, Timing, measure
from torch import nn

import longact
from longact.kernels.channel_magnitude import channel_magnitude
from longact.kernels.masked_adamw import AdamWGroup, reference

CPU = torch.device("cpu")
PROJECTIONS = [
    ParamShape("q_proj", (576, 576), masked=True),
    ParamShape("k_proj", (192, 576), masked=True),
    ParamShape("norm", (576,)),
]
Benchmark = Callable[..., Any]


def run(benchmark: Benchmark, call: Callable[[], object]) -> None:
    benchmark.pedantic(call, rounds=20, warmup_rounds=2)  # type: ignore[attr-defined]


# ---- timings -------------------------------------------------------------------------------------


@pytest.mark.benchmark(group="update of one layer's q_proj and k_proj")
@pytest.mark.parametrize("spec", all_specs([1.0, 0.3]), ids=lambda spec: spec.label)
def test_update(benchmark: Benchmark, spec: Spec) -> None:
    variant = make_variant(spec, Buffers(PROJECTIONS, torch.float32, CPU))
    check(variant, PROJECTIONS)
    run(benchmark, variant.step)


@pytest.mark.benchmark(group="host overhead: 300 parameters of 64 elements")
@pytest.mark.parametrize(
    "spec", [Spec("fused"), Spec("full"), Spec("full", 0.3)], ids=lambda spec: spec.label
)
def test_host_overhead(benchmark: Benchmark, spec: Spec) -> None:
    shapes = [ParamShape(f"small.{i}", (64,), masked=True) for i in range(300)]
    variant = make_variant(spec, Buffers(shapes, torch.float32, CPU))
    check(variant, shapes)
    run(benchmark, variant.step)


@pytest.mark.benchmark(group="q_proj, 512 tokens")
@pytest.mark.parametrize("what", ["forward", "magnitude", "dense gradient", "row gradient"])
def test_layer(benchmark: Benchmark, what: str) -> None:
    x, dy = torch.randn(512, 576), torch.randn(512, 576)
    layer = nn.Linear(576, 576, bias=False)
    if what == "row gradient":
        layer = longact.nn.SalientLinear(576, 576, bias=False)
        longact.set_rows(layer.weight, bench_update.random_rows(0, 576, 0.3))
    y = layer(x)

    def weight_grad() -> object:
        return torch.autograd.grad(y, layer.weight, dy, retain_graph=True)

    calls: dict[str, Callable[[], object]] = {
        "forward": lambda: layer(x),
        "magnitude": lambda: channel_magnitude(y.detach()),
        "dense gradient": weight_grad,
        "row gradient": weight_grad,
    }
    run(benchmark, calls[what])


# ---- the benchmark itself ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "published"),
    [
        ("smollm2-135m", 134_515_008),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-4b", 4_022_468_096),
        ("qwen3-8b", 8_190_735_360),
        ("llama-3.1-8b", 8_030_261_248),
    ],
)
def test_shapes_add_up_to_the_published_size(model: str, published: int) -> None:
    assert MODELS[model].numel == published


@pytest.mark.parametrize("model", MODELS)
def test_cut_model_fits_and_keeps_the_share_of_each_kind(model: str) -> None:
    whole = MODELS[model]
    cut = whole.cut(256_000_000)
    assert cut.numel <= 256_000_000

    def share(shapes: list[ParamShape]) -> float:
        return sum(s.numel for s in shapes if s.masked) / sum(s.numel for s in shapes)

    assert share(cut.parameters()) == pytest.approx(share(whole.parameters()), rel=1e-3)


@pytest.mark.parametrize("dtype", bench_update.DTYPES)
def test_every_variant_passes_the_check_in_every_dtype(dtype: str) -> None:
    buffers = Buffers(PROJECTIONS, bench_update.DTYPES[dtype], CPU)
    for spec in all_specs([1.0, 0.3]):
        check(make_variant(spec, buffers), PROJECTIONS)


def wrong_rows(optimizer: torch.optim.Optimizer) -> None:
    param = optimizer.param_groups[0]["params"][0]
    rows = longact.get_rows(param)
    assert rows is not None
    outside = torch.ones(param.shape[0], dtype=torch.bool)
    outside[rows.long()] = False
    param.data[outside] += 1e-6


def wrong_value(optimizer: torch.optim.Optimizer) -> None:
    param = optimizer.param_groups[0]["params"][0]
    rows = longact.get_rows(param)
    assert rows is not None
    param.data[rows.long()] *= 1.0 + 1e-5


def wrong_moment(optimizer: torch.optim.Optimizer) -> None:
    param = optimizer.param_groups[0]["params"][0]
    optimizer.state[param]["exp_avg"].mul_(1.0 + 1e-5)


@pytest.mark.parametrize("damage", [wrong_rows, wrong_value, wrong_moment])
@pytest.mark.parametrize("kind", ["full", "compact"])
def test_check_finds_a_wrong_update(
    kind: Any, damage: Callable[[torch.optim.Optimizer], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = make_variant(Spec(kind, 0.3), Buffers(PROJECTIONS, torch.float32, CPU))
    step = variant.optimizer.step

    def wrong() -> None:
        step()
        damage(variant.optimizer)

    monkeypatch.setattr(variant.optimizer, "step", wrong)
    with pytest.raises(CheckFailed, match="q_proj"):
        check(variant, PROJECTIONS)


def test_check_finds_an_update_that_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    variant = make_variant(Spec("full", 0.3), Buffers(PROJECTIONS, torch.float32, CPU))
    monkeypatch.setattr(variant.optimizer, "step", lambda: None)
    with pytest.raises(CheckFailed):
        check(variant, PROJECTIONS)


SMALL = ["--max-elements", "1000000", "--rounds", "2", "--keep", "1", "0.3", "--tokens", "64"]


def test_run_prints_every_table_and_writes_json_and_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    result, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    monkeypatch.setattr(bench_update, "LARGE", 1)
    assert bench_update.main([*SMALL, "--json", str(result), "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    for title in (
        "A. q_proj and k_proj",
        "B. smollm2-135m whole",
        "C. 1 projections",
        "D. Host",
        "E. The",
    ):
        assert title in out
    assert "cut to 1 of 30 layers" in out
    report = json.loads(result.read_text())
    table = {row["variant"]: row for row in report["tables"][0]["rows"]}
    fused, compact = table["torch AdamW fused"], table["longact keep 0.3 compact"]
    assert compact["moment_bytes"] / fused["moment_bytes"] == pytest.approx(0.3, rel=0.02)
    assert compact["gb_per_s"] == pytest.approx(
        28e-6 * compact["elements"] / compact["ms"]["median"]
    )
    assert picture.stat().st_size > 10_000


def test_failed_check_ends_with_1_and_no_timing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(longact.FusedMaskedAdam, "step", lambda self: None)
    assert bench_update.main(SMALL) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "FAILED, no timings: longact keep 1 full" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep", "0"], "must lie in (0, 1]"),
        (["--rounds", "0"], "must be at least 1"),
        (["--json", "/nowhere/bench.json"], "there is no directory /nowhere"),
    ],
)
def test_bad_argument_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench_update.main(arguments)
    assert message in capsys.readouterr().err


def test_missing_device_and_missing_matplotlib_say_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for arguments, message in (
        (["--device", "cuda"], "finds no CUDA device"),
        (["--plot", "bench.png"], "pip install 'longact[plot]'"),
    ):
        with pytest.raises(SystemExit):
            bench_update.main(arguments)
        assert message in capsys.readouterr().err


def test_timing_is_the_median_and_the_quartiles() -> None:
    timing = Timing.of([0.001, 0.002, 0.003, 0.004, 0.100])
    assert (timing.q1, timing.median, timing.q3) == pytest.approx((2.0, 3.0, 4.0))
    assert timing.spread == pytest.approx(2 / 3)
    assert Timing.of([0.005]).median == pytest.approx(5.0)


def test_clock_measures_seconds() -> None:
    clock = Clock(CPU)
    assert 0.0 < clock.seconds(clock.copy) < 60.0
    assert clock.calls == 1


# ---- on a GPU, as far as a machine without one can tell ------------------------------------------


class Stub(torch.optim.AdamW):
    """What apex, bitsandbytes and DeepSpeed have in common here, by torch's own arithmetic."""

    moments = ("exp_avg", "exp_avg_sq")
    counts_in_group = False

    def __init__(self, params: Any, adam_w_mode: bool = True, **options: Any) -> None:
        assert adam_w_mode
        super().__init__(params, **options, foreach=False)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        group = self.param_groups[0]
        beta1, beta2 = group["betas"]
        for param in group["params"]:
            state = self.state[param]
            counter = group if self.counts_in_group else state
            if not self.counts_in_group or param is group["params"][0]:
                counter["step"] = counter.get("step", 0) + 1
            update = (
                param, param.grad, state[self.moments[0]], state[self.moments[1]], None,
                torch.tensor(counter["step"] - 1.0), None, None, None, 0, 0,
            )  # fmt: skip
            reference(
                update,
                AdamWGroup(
                    group["lr"], beta1, beta2, group["eps"], group["weight_decay"],
                    maximize=False, zero_grad=False,
                ),
            )  # fmt: skip


class Bitsandbytes(Stub):
    moments = ("state1", "state2")


class Apex(Stub):
    counts_in_group = True


def install(monkeypatch: pytest.MonkeyPatch, **optimizers: type[Stub]) -> None:
    """Puts them where bench_update looks for the packages."""
    for kind, optimizer in optimizers.items():
        _, name, attribute = bench_update.OTHERS[kind]  # type: ignore[index]
        package, module = types.ModuleType(kind), types.ModuleType(name)
        package.__spec__ = importlib.machinery.ModuleSpec(kind, None)
        setattr(module, attribute, optimizer)
        monkeypatch.setitem(sys.modules, kind, package)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_packages_are_checked_in_their_own_state(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    install(monkeypatch, apex=Apex, bitsandbytes=Bitsandbytes, deepspeed=Stub)
    specs, missing = bench_update.gpu_specs()
    assert [s.kind for s in specs] == ["compiled", "apex", "bitsandbytes", "deepspeed"]
    assert missing == []
    notes: list[str] = []
    buffers = Buffers(PROJECTIONS, dtype, CPU)
    variants = bench_update.make_checked(specs[1:], buffers, notes)
    assert notes == []
    for spec in specs[1:]:
        stored = buffers.moments(spec.moment_dtype(dtype))[0][0]
        state = variants[spec.label].optimizer.state[variants[spec.label].params[0]]
        assert state[bench_update.moment_names(spec)[0]] is stored
        assert bench_update.state_bytes(variants[spec.label], moments_only=True) > 0


def test_a_package_that_is_wrong_or_broken_is_left_out_with_a_note(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Wrong(Stub):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step()
            self.param_groups[0]["params"][0].data.mul_(1.001)

    class Broken(Stub):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError("requires cuda extensions\nand more")

    install(monkeypatch, apex=Broken, deepspeed=Wrong)
    notes: list[str] = []
    specs = [Spec("fused"), Spec("apex"), Spec("deepspeed")]
    variants = bench_update.make_checked(specs, Buffers(PROJECTIONS, torch.float32, CPU), notes)
    assert list(variants) == ["torch AdamW fused"]
    assert notes[0] == "not timed: apex FusedAdam: requires cuda extensions"
    assert notes[1].startswith("not timed: DeepSpeed FusedAdam: param of q_proj: differs from the")


class FakeGpu:
    L2_cache_size = 50 << 20
    total_memory = 80 << 30


def test_gpu_run_adds_floors_other_packages_and_its_own_goals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole path of --device cuda, with a CPU in the GPU's place."""
    install(monkeypatch, apex=Apex)
    answers = iter([True, True])  # for the command line; later on torch asks
    monkeypatch.setattr(torch.cuda, "is_available", lambda: next(answers, False))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: FakeGpu)
    monkeypatch.setattr(bench_update, "make_clock", lambda device: Clock(CPU))
    defaults = bench_update.parse(["--device", "cuda"])
    assert (defaults.model, defaults.max_elements) == ("qwen3-8b", 1_000_000_000)
    result = tmp_path / "bench.json"
    arguments = [*SMALL, "--device", "cuda", "--no-compile", "--model", "smollm2-135m"]
    assert bench_update.main([*arguments, "--large", "1", "--json", str(result)]) == 0
    out = capsys.readouterr().out
    assert "a kernel of one element" in out
    assert "Not installed, so not compared: bitsandbytes, DeepSpeed" in out
    report = json.loads(result.read_text())
    assert report["device_limits"]["l2_mib"] == 50.0
    assert report["device_limits"]["launch_us"] > 0.0
    for table in report["tables"]:
        assert "apex FusedAdam" in [row["variant"] for row in table["rows"]]
    goals = [goal["text"] for goal in report["goals"]]
    assert goals[0] == "C: update at keep 1, full state, of the copy bandwidth"
    assert goals[3] == "C: update at keep 0.3, full state, against apex FusedAdam"
    assert [goal["limit"] for goal in report["goals"]] == [0.92, 0.85, 3.0, 3.0, 0.5]


def test_gpu_clock_times_the_device_while_the_host_is_ahead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, other: object) -> float:
            return 2.5

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: FakeGpu)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda n: log.append("sleep" if n else "no sleep"))
    monkeypatch.setattr("timing.GPU_COPY_BYTES", 1 << 20)
    monkeypatch.setattr(FakeGpu, "L2_cache_size", 1 << 20)
    clock = CudaClock(CPU)
    assert clock.copy_bytes == 4 << 20
    clock.add()
    clock.empty_caches()
    assert not bool(clock._target.any())

    def call() -> None:
        log.append("call")

    assert clock.seconds(call) == pytest.approx(2.5e-3)
    assert log == ["wait", "no sleep", "event", "call", "event", "wait"]
    log.clear()
    clock.seconds(call)
    assert log == ["wait", "sleep", "event", "call", "event", "wait"]
    log.clear()
    assert clock.host_seconds(call) < 1.0
    assert log == ["wait", "call"]
    samples = measure({"call": call}, clock, Limits(rounds=2), 1.0, cold=True)
    assert len(samples["call"]) == 2
    assert clock._lead == {}
