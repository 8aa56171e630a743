"""That bench_projection.py checks what it measures and reckons right: `pytest benchmarks`."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_projection
import pytest
import torch
from bench_projection import (
    BOTH,
    COUNTED,
    COUNTED_MASKED,
    FUSED,
    LINEAR,
    ROWS,
    ROWS_IN_PLACE,
    SELECT,
    Bench,
    Group,
    Line,
    Ratio,
    Table,
    advice_on_fusing,
    advice_on_row_grad,
    bench_forward,
    bench_grad,
    bench_topk,
    cut_tokens,
    find_goals,
    most_tokens,
    most_tokens_in_time,
)
from bench_update import CheckFailed
from shapes import MODELS, ModelShape, ParamShape
from timing import Clock, Timing
from torch import Tensor
from torch.nn import functional as F

import longact.kernels
from longact.kernels.channel_magnitude import channel_magnitude
from longact.kernels.row_grad import linear_grads
from longact.kernels.topk_rows import select_rows, topk_rows_over

CPU = torch.device("cpu")
TINY = ModelShape("tiny", 3, 48, 64, 4, 2, 16, 100, tied=True, qk_norm=False)
Q, K = ParamShape("layers.0.q_proj", (64, 48)), ParamShape("layers.0.k_proj", (32, 48))
SMALL = ["--tokens", "64", "--rounds", "1"]


def bench(dtype: torch.dtype = torch.float32, on_gpu: bool = False) -> Bench:
    return Bench(Clock(CPU, 1 << 16), dtype, 0.3, 2, on_gpu)


# ---- what is wrong is found ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_right_results_pass_in_every_dtype(dtype: torch.dtype) -> None:
    groups = bench_forward(bench(dtype), TINY, 130)
    groups += [bench_grad(bench(dtype), param, 130) for param in (Q, K)]
    groups += bench_topk(bench(dtype), TINY)[0]
    assert [group.rounds for group in groups] == [2] * 8
    assert all(line.ms.median > 0 for group in groups for line in group.lines)


def all_tokens(y: Tensor, mask: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
    return channel_magnitude(y, None, *args, **kwargs)


def one_token_less(y: Tensor, mask: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
    return channel_magnitude(y[:-1], None if mask is None else mask[:-1], *args, **kwargs)


def overwrites(y: Tensor, mask: Tensor | None, *args: Any, out: Tensor, **kwargs: Any) -> Tensor:
    return out.copy_(channel_magnitude(y, mask, *args, **kwargs) * 1.0001)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (all_tokens, "token mask: magnitudes differ"),
        (one_token_less, "magnitudes differ"),
        (overwrites, "magnitudes differ"),
    ],
)
def test_wrong_magnitudes_are_found(
    wrong: Callable[..., Tensor], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_projection, "channel_magnitude", wrong)
    with pytest.raises(CheckFailed, match=message):
        bench_forward(bench(), TINY, 64)


def test_a_wrong_count_of_tokens_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def uncounted(y: Tensor, *args: Any, counted: Tensor | None = None, **kwargs: Any) -> Tensor:
        return channel_magnitude(y, *args, **kwargs)

    monkeypatch.setattr(bench_projection, "channel_magnitude", uncounted)
    with pytest.raises(CheckFailed, match="counted 0 tokens, not 64"):
        bench_forward(bench(), TINY, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_output_is_found(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
        ys = [F.linear(x, weight) for weight in weights]
        ys[-1][-1, 3] += 0.1
        return ys

    monkeypatch.setattr(bench_projection, "linear", wrong)
    with pytest.raises(CheckFailed, match=r"F\.linear: differs"):
        bench_forward(bench(dtype), TINY, 64)


@pytest.mark.parametrize("what", ["magnitude", "rows"])
def test_a_wrong_module_is_found(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from longact import nn, selection

    if what == "magnitude":
        monkeypatch.setattr(nn, "channel_magnitude", all_tokens)
    else:

        def shifted(*args: Any) -> tuple[list[Tensor], Tensor]:
            rows, status = select_rows(*args)
            return [r.roll(1) for r in rows], status

        monkeypatch.setattr(selection, "select_rows", shifted)
    message = "magnitudes differ" if what == "magnitude" else "wrong rows"
    with pytest.raises(CheckFailed, match=f"SalientLinear q_proj: {message}"):
        bench_forward(bench(), TINY, 64)


def one_element(grad: Tensor, rows: Tensor) -> None:
    grad[rows[-1], -1] *= 1.01


def other_row(grad: Tensor, rows: Tensor) -> None:
    others = [row for row in range(grad.shape[0]) if row not in rows.tolist()]
    grad[others[-1], 0] += 1e-6


def rows_swapped(grad: Tensor, rows: Tensor) -> None:
    grad[rows[:2].long()] = grad[rows[:2].long().flip(0)]


@pytest.mark.parametrize("damage", [one_element, other_row, rows_swapped])
def test_wrong_gradients_are_found(
    damage: Callable[[Tensor, Tensor], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(dy: Tensor, x: Tensor, rows: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
        grad, sums = linear_grads(dy, x, rows, bias)
        damage(grad, rows)
        return grad, sums

    monkeypatch.setattr(bench_projection, "linear_grads", wrong)
    message = "outside of the selection changed" if damage is other_row else "differs"
    with pytest.raises(CheckFailed, match=message):
        bench_grad(bench(), Q, 64)


def test_wrong_rows_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def later_ties(totals: list[Tensor], *args: Any) -> tuple[list[Tensor], Tensor]:
        rows, status = select_rows([total.flip(0) for total in totals], *args)
        pairs = zip(rows, totals, strict=True)
        return [(total.numel() - 1 - r).flip(0).to(torch.int32) for r, total in pairs], status

    monkeypatch.setattr(bench_projection, "select_rows", later_ties)
    with pytest.raises(CheckFailed, match="longact, one call: wrong rows"):
        bench_topk(bench(), MODELS["smollm2-135m"])
    monkeypatch.undo()

    def one_less(magnitudes: list[Tensor], k: int) -> list[Tensor]:
        return topk_rows_over(magnitudes, k - 1)

    monkeypatch.setattr(bench_projection, "topk_rows_over", one_less)
    with pytest.raises(CheckFailed, match="longact, all together: wrong rows"):
        bench_topk(bench(), TINY)


def test_torchs_topk_may_take_any_of_those_that_are_equal() -> None:
    values = [torch.tensor([1.0, 3.0, 3.0, 3.0, 2.0])]
    bench_projection.check_topk("torch", [torch.tensor([3, 1])], values, [2])
    for wrong in ([3, 4], [1], [1, 2, 3]):
        with pytest.raises(CheckFailed, match="torch: not the largest of projection 0"):
            bench_projection.check_topk("torch", [torch.tensor(wrong)], values, [2])


def test_a_failed_check_ends_with_1_and_no_timing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_projection, "channel_magnitude", all_tokens)
    assert bench_projection.main(SMALL) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "FAILED, no timings: + channel_magnitude, token mask: magnitudes" in captured.err


# ---- arithmetic ----------------------------------------------------------------------------------


def test_a_ratio_is_that_of_each_round() -> None:
    ratio = Ratio.of([2.0, 3.0, 8.0, 40.0, 50.0], [1.0, 2.0, 2.0, 20.0, 5.0])
    assert (ratio.q1, ratio.median, ratio.q3) == (2.0, 2.0, 4.0)
    assert Ratio.of([3.0], [2.0]) == Ratio(1.5, 1.5, 1.5)


def line(variant: str, ms: float, baseline_ms: float, baseline: str = LINEAR) -> Line:
    ratio = ms / baseline_ms
    return Line(variant, baseline, Timing(ms, ms, ms), Ratio(ratio, ratio, ratio))


def forward_group(what: str, tokens: int, linear: float, separate: float, fused: float) -> Group:
    lines = [line(LINEAR, linear, linear), line(COUNTED_MASKED, separate, linear)]
    lines.append(line(FUSED, fused, linear))
    return Group(what, [5120, 4096], tokens, 5, lines, [COUNTED_MASKED])


def grad_group(tokens: int, gather: float, fused: float) -> Group:
    times = {ROWS: gather, f"{ROWS}, gather": gather, f"{ROWS}, fused": fused}
    lines = [line(name, ms, 10.0) for name, ms in times.items()]
    return Group("q_proj, 1229 of 4096 rows", [4096, 4096], tokens, 5, lines, [ROWS])


def topk_group(ms: float, host_ms: float) -> Group:
    found = line(SELECT, ms, 2.0)
    found.host_ratio = Ratio(host_ms / 2.0, host_ms / 2.0, host_ms / 2.0)
    return Group("all", [], None, 5, [found], [SELECT])


def test_goals_are_of_the_worst_shape() -> None:
    tables = {
        "A": Table("A", "", [forward_group("q_proj", 4096, 10.0, 10.2, 10.0),
                             forward_group(BOTH, 4096, 10.0, 10.4, 10.0)]),
        "B": Table("B", "", [grad_group(4096, 3.8, 2.0), grad_group(8192, 4.1, 2.0)]),
        "C": Table("C", "", [topk_group(0.16, 0.25)]),
    }  # fmt: skip
    goals = find_goals(bench(), tables, [])
    assert [goal.measured for goal in goals] == pytest.approx([0.04, 0.41])
    assert [(goal.limit, goal.reached) for goal in goals] == [(0.05, True), (0.45, True)]

    goals = find_goals(bench(on_gpu=True), tables, ["cat", "_select_kernel"])
    assert [goal.measured for goal in goals] == pytest.approx([0.04, 0.41, 12.5, 8.0, 1.0])
    assert [goal.limit for goal in goals] == [0.03, 0.40, 10.0, 10.0, 1.0]
    assert [goal.reached for goal in goals] == [False, False, True, False, True]
    assert "4.000 % (goal <= 3 %)" in goals[0].line()

    half = bench()
    half.keep = 0.5
    assert len(find_goals(half, tables, [])) == 1


def test_a_rule_holds_from_where_the_fused_kernel_stays_ahead() -> None:
    dtype, card = torch.bfloat16, (9, 0)
    groups = [
        forward_group(BOTH, 1024, 1.0, 1.2, 1.1),
        forward_group(BOTH, 4096, 1.0, 1.2, 1.3),
        forward_group(BOTH, 32768, 10.0, 12.0, 11.0),
        forward_group(BOTH, 131072, 40.0, 48.0, 44.0),
        forward_group("q_proj", 131072, 30.0, 36.0, 37.0),
    ]
    lines = advice_on_fusing(groups, dtype, card)
    assert lines[1] == f"{BOTH}, 4096 tokens: fused 1.30 ms, separate 1.20 ms: separate"
    assert lines[-1].strip().startswith("Rule((9, 0), torch.bfloat16, 4096, 32768, ")
    groups[3] = forward_group(BOTH, 131072, 40.0, 44.0, 48.0)
    assert "no row" in advice_on_fusing(groups, dtype, card)[-1]
    assert advice_on_fusing([topk_group(1.0, 1.0)], dtype, card) == []


def test_the_row_of_the_rule_is_one() -> None:
    from longact.kernels.projection import Rule

    text = advice_on_fusing([forward_group(BOTH, 4096, 1.0, 1.2, 1.1)], torch.bfloat16, (9, 0))[-1]
    (rule,) = eval(f"({text})", {"Rule": Rule, "torch": torch})
    assert rule[:4] == ((9, 0), torch.bfloat16, 4096, 4096)


def test_advice_on_the_row_gradient() -> None:
    slow, fast = grad_group(4096, 3.0, 4.0), grad_group(32768, 30.0, 20.0)
    assert advice_on_row_grad([slow])[-1] == 'choose_method: return "gather" for all of these'
    assert advice_on_row_grad([fast])[-1] == 'choose_method: return "fused" for all of these'
    lines = advice_on_row_grad([slow, fast])
    assert lines[0].endswith("4096 tokens: fused 4.00 ms, gather 3.00 ms: gather")
    assert lines[-1] == (
        'choose_method: return "fused" for q_proj, 1229 of 4096 rows, 32768 tokens; else "gather"'
    )
    assert advice_on_row_grad([topk_group(1.0, 1.0)]) == []


def test_tokens_are_cut_and_it_is_said() -> None:
    assert cut_tokens([512, 4096, 32768], 32768, "why") == ([512, 4096, 32768], "")
    kept, note = cut_tokens([512, 4096, 32768], 3000, "too much")
    assert kept == [512, 2048]
    assert note == "Tokens: 2048 in place of 4096, 32768, too much"
    smollm = MODELS["smollm2-135m"]
    # 4 times x, q and k, of 576, 576 and 192 floats, in a quarter of the memory.
    assert most_tokens(smollm, torch.float32, 1 << 30) == (1 << 28) // (4 * 1344 * 4)
    assert most_tokens_in_time(smollm) == int(16e9 / (2 * 576 * 768))


# ---- the command ---------------------------------------------------------------------------------


def test_a_run_prints_every_table_and_writes_json_and_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    result, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    assert bench_projection.main([*SMALL, "--json", str(result), "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    for text in (
        "smollm2-135m: q_proj and k_proj 576 x 576 and 192 x 576 in 30 layers; keep 0.3",
        "A. Forward",
        "q_proj and k_proj, 64 tokens (1 rounds)",
        "B. Weight gradient",
        "k_proj, 58 of 192 rows, 64 tokens (1 rounds)",
        "C. Top-k of the model's 60 projections",
        "reached  A: what statistics add to their projection",
        "reached  B: row gradient at keep 0.3, of the dense one's time",
    ):
        assert text in out
    assert "RULES" not in out  # without a GPU
    report = json.loads(result.read_text())
    assert report["tokens"] == [64]
    forward, grad, topk = report["tables"]
    assert [group["what"] for group in forward["groups"][:3]] == ["q_proj", "k_proj", BOTH]
    shown = {found["variant"]: found for found in forward["groups"][0]["lines"]}
    counted, plain = shown[COUNTED], shown[LINEAR]
    assert counted["ratio"]["median"] == pytest.approx(
        counted["ms"]["median"] / plain["ms"]["median"]
    )
    assert plain["tflop_per_s"] == pytest.approx(2e-9 * 64 * 576**2 / plain["ms"]["median"])
    shares = [
        found["ratio"]["median"] - 1
        for group in forward["groups"]
        for found in group["lines"]
        if found["variant"] in (COUNTED, COUNTED_MASKED)
    ]
    assert report["goals"][0]["measured"] == pytest.approx(max(shares))
    rows = next(found for found in grad["groups"][0]["lines"] if found["variant"] == ROWS)
    assert rows["tflop_per_s"] == pytest.approx(2e-9 * 64 * 576 * 173 / rows["ms"]["median"])
    assert all(found["host_ms"] for group in topk["groups"] for found in group["lines"])
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep", "0"], "must lie in (0, 1]"),
        (["--tokens", "0"], "must be at least 1"),
        (["--json", "/nowhere/bench.json"], "there is no directory /nowhere"),
    ],
)
def test_bad_argument_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench_projection.main(arguments)
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
            bench_projection.main(arguments)
        assert message in capsys.readouterr().err


# ---- on a GPU, as far as a machine without one can tell ------------------------------------------


class FakeGpu:
    L2_cache_size = 50 << 20
    total_memory = 80 << 30


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """torch's own ops in the place of the Triton kernels; what these were called with."""
    calls: dict[str, list[Any]] = {"project": [], "row_grad_": [], "in place": []}

    def project(x: Tensor, weights: list[Tensor], biases: Any, mask: Tensor, metric: int,
                outs: list[Tensor], counted: list[Tensor]) -> list[Tensor]:  # fmt: skip
        calls["project"].append((len(weights), metric, biases))
        ys = [F.linear(x, weight) for weight in weights]
        for y, out, tokens in zip(ys, outs, counted, strict=True):
            channel_magnitude(y, mask, out=out, counted=tokens)
        return ys

    def row_grad_(grad: Tensor, dy: Tensor, x: Tensor, rows: Tensor, *, method: str) -> None:
        calls["row_grad_"].append(method)
        grad[rows.long()] = dy[:, rows.long()].t() @ x

    def grads(
        dy: Tensor, x: Tensor, rows: Tensor, bias: bool, into: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        grad, sums = linear_grads(dy, x, rows, bias)
        if into is None:
            return grad, sums
        calls["in place"].append(into)
        return into.add_(grad), sums

    for name, functions in (
        ("projection_triton", {"project": project, "supports": lambda *args: True}),
        ("row_grad_triton", {"row_grad_": row_grad_}),
    ):
        module = types.ModuleType(name)
        module.__dict__.update(functions)
        monkeypatch.setitem(sys.modules, f"longact.kernels.{name}", module)
        monkeypatch.setattr(longact.kernels, name, module, raising=False)
    monkeypatch.setattr(bench_projection, "linear_grads", grads)
    answers = iter([True])  # for the command line; later on torch asks
    monkeypatch.setattr(torch.cuda, "is_available", lambda: next(answers, False))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: FakeGpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(bench_projection, "make_clock", lambda device: Clock(CPU))
    names = ["cat", "_select_kernel"]
    monkeypatch.setattr(bench_projection, "kernels_of", lambda call, device: names)
    return calls


def test_gpu_run_adds_the_kernels_the_rules_and_its_own_goals(
    kernels: dict[str, list[Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole path of --device cuda, with a CPU in the GPU's place."""
    result = tmp_path / "bench.json"
    arguments = [*SMALL, "--device", "cuda", "--model", "smollm2-135m", "--json", str(result)]
    assert bench_projection.main(arguments) == 0
    assert {weights for weights, _, _ in kernels["project"]} == {1, 2}
    assert {metric for _, metric, _ in kernels["project"]} == {0}
    assert set(kernels["row_grad_"]) == {"gather", "fused"}
    assert kernels["in place"]
    out = capsys.readouterr().out
    assert "q_proj and k_proj, 64 tokens: fused " in out
    assert "RULES" in out
    assert "choose_method: return " in out
    assert "launches 2 kernels, 1 of them its own" in out
    report = json.loads(result.read_text())
    assert report["arguments"]["dtype"] == "bfloat16"
    labels = {found["variant"] for table in report["tables"] for group in table["groups"]
              for found in group["lines"]}  # fmt: skip
    assert {FUSED, ROWS_IN_PLACE, f"{ROWS}, gather", f"{ROWS}, fused"} <= labels
    assert [goal["limit"] for goal in report["goals"]] == [0.03, 0.40, 10.0, 10.0, 1.0]
    assert report["advice"][-1].startswith("choose_method: ")


IN_THE_INTERPRETER = """
import sys
import torch
import longact
sys.modules["longact.backends"]._TRITON_DEVICES = ("cpu",)
import bench_projection
from test_bench_projection import TINY, bench
bench_projection.kernels_of = lambda call, device: ["_select_kernel"]
tables, kernels = bench_projection.run_tables(bench(torch.bfloat16, on_gpu=True), TINY, [65])
for table in tables.values():
    bench_projection.print_table(table)
"""


def test_gpu_run_with_the_real_kernels_in_tritons_interpreter() -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", IN_THE_INTERPRETER],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(FUSED) == 3
    assert done.stdout.count(ROWS_IN_PLACE) == 2


def test_gpu_defaults(kernels: dict[str, list[Any]]) -> None:
    args = bench_projection.parse(["--device", "cuda"])
    assert (args.model, args.dtype) == ("qwen3-8b", "bfloat16")
    tokens, cuts = bench_projection.plan_tokens(args, MODELS[args.model])
    assert (tokens, cuts) == ([4096, 32768, 131072], [])


def test_float32_has_no_fused_kernel_to_time(kernels: dict[str, list[Any]]) -> None:
    groups = bench_forward(bench(torch.float32, on_gpu=True), TINY, 64)
    assert all(group.line(FUSED) is None for group in groups)
    assert kernels["project"] == []


def test_what_the_rules_choose_is_judged(
    kernels: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = bench_forward(bench(torch.bfloat16, on_gpu=True), TINY, 64)
    assert groups[0].judged == [COUNTED, COUNTED_MASKED]
    monkeypatch.setattr(bench_projection, "fuses", lambda *args: True)
    groups = bench_forward(bench(torch.bfloat16, on_gpu=True), TINY, 64)
    assert groups[0].judged == [FUSED]
    assert [found.variant for found in groups[2].judged_lines()] == [FUSED]


def test_a_wrong_kernel_is_found(
    kernels: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["longact.kernels.row_grad_triton"]

    def wrong(grad: Tensor, dy: Tensor, x: Tensor, rows: Tensor, *, method: str) -> None:
        grad[rows.long()] = dy[1:, rows.long()].t() @ x[1:]

    monkeypatch.setattr(module, "row_grad_", wrong)
    with pytest.raises(CheckFailed, match="q_proj, selected rows, gather: differs"):
        bench_grad(bench(torch.bfloat16, on_gpu=True), Q, 64)
    right = sys.modules["longact.kernels.projection_triton"].project  # type: ignore[attr-defined]

    def no_mask(x: Tensor, weights: Any, biases: Any, mask: Tensor, *args: Any) -> Any:
        return right(x, weights, biases, torch.ones_like(mask), *args)

    module = sys.modules["longact.kernels.projection_triton"]
    monkeypatch.setattr(module, "project", no_mask)
    with pytest.raises(CheckFailed, match="fused kernel, token mask: magnitudes differ"):
        bench_forward(bench(torch.bfloat16, on_gpu=True), TINY, 64)


def test_kernels_are_those_that_the_profiler_saw_on_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device_type = torch._C._autograd.DeviceType

    class Profile:
        def __init__(self, activities: list[Any]) -> None:
            assert activities == [torch.profiler.ProfilerActivity.CUDA]

        def __enter__(self) -> Profile:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def events(self) -> list[Any]:
            return [
                types.SimpleNamespace(name="cudaLaunchKernel", device_type=device_type.CPU),
                types.SimpleNamespace(name="_select_kernel", device_type=device_type.CUDA),
            ]

    log: list[str] = []
    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    found = bench_projection.kernels_of(lambda: log.append("call"), CPU)
    assert found == ["_select_kernel"]
    assert log == ["call", "wait"]
