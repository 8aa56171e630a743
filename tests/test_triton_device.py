"""SalientLinear and the selection with their Triton kernels, against torch's own ops: on a GPU, or
with the CPU taken for one and the kernels in Triton's interpreter.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import adam, forward_backward, rows_of, tiny_model, train_step
from test_selection import Masked, padded
from torch import Tensor, nn
from triton_tools import (
    DEVICE,
    INTERPRETED,
    no_reads_by_the_host,
    runs_kernels,
)

import longact
from longact import selection
from longact.kernels import projection, topk_rows, triton_common
from longact.kernels.channel_magnitude import channel_magnitude
from longact.nn import SalientLinear

backends = sys.modules["longact.backends"]  # longact.backends is the function
pytestmark = [
    # transformers 5.24 renamed the argument, and deprecates the name that earlier versions know.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning"),
    # The interpreter says so where a kernel divides by no tokens.
    pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning"),
]
METRICS = ["mean_abs", "rms", "max_abs"]
ROWS = [1, 2, 5, 11]


@pytest.fixture(autouse=True)
def triton_device(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        monkeypatch.setattr(backends, "_TRITON_DEVICES", ("cpu",))
        monkeypatch.setattr(selection, "_is_remote", lambda tensor: True)


class without_triton:
    """The same code on torch's own ops."""

    def __enter__(self) -> None:
        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(backends, "_TRITON_DEVICES", ())

    def __exit__(self, *_: object) -> None:
        self._patch.undo()


class Calls:
    """Counts what a function of a Triton module is called with, and calls it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: str, name: str) -> None:
        target = pytest.importorskip(f"longact.kernels.{module}")
        self._function, self.calls = getattr(target, name), []
        monkeypatch.setattr(target, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        return self._function(*args, **kwargs)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    ids, mask = padded("left", 9, 6, seed=seed)
    return ids.to(DEVICE), mask.to(DEVICE)


# ---- training ------------------------------------------------------------------------------------


def train(steps: int, arch: str = "llama", **options: Any) -> tuple[list[Any], list[Tensor]]:
    """Rows after each step, and the parameters at the end."""
    model = tiny_model(arch).to(DEVICE)
    handle = longact.apply(model, **options)
    optimizer = adam(model, lr=1e-3)
    rows = []
    for step in range(steps):
        for i in range(2):  # micro-batches
            ids, mask = batch(2 * step + i)
            forward_backward(model, ids, attention_mask=mask)
        optimizer.step()
        optimizer.zero_grad()
        rows.append(rows_of(handle))
    return rows, [p.detach().cpu() for p in model.parameters()]


@runs_kernels
@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("qwen2", {"scope": "layer", "metric": "mean_abs"}),
        ("llama", {"scope": "head", "metric": "rms"}),
        ("llama", {"scope": "model", "metric": "max_abs"}),
        ("llama", {"scope": "layer", "metric": "max_abs", "refresh_every": 2}),
        ("qwen2", {"scope": "layer", "metric": "rms", "refresh_every": "forward"}),
        ("llama", {"scope": "head", "metric": "mean_abs", "refresh_every": "forward"}),
        ("qwen2", {"others": "freeze"}),
        ("qwen3", {"capture": "norm", "others": "freeze", "scope": "head"}),
        ("qwen3", {"capture": "rope", "pair_rope": True}),
        ("llama", {"targets": ["q_proj[:32]", "q_proj[32:]", "k_proj"], "metric": "max_abs"}),
    ],
    ids=str,
)
def test_a_model_trains_as_with_torchs_ops(arch: str, options: dict[str, Any]) -> None:
    rows, params = train(3, arch, **options)
    with without_triton():
        expected_rows, expected = train(3, arch, **options)
    assert rows == expected_rows
    assert rows[0] != rows[1] or options.get("refresh_every") == 2
    for ours, theirs in zip(params, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@runs_kernels
def test_each_kernel_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    magnitude = Calls(monkeypatch, "channel_magnitude_triton", "channel_magnitude")
    topk = Calls(monkeypatch, "topk_rows_triton", "select_rows")
    grad = Calls(monkeypatch, "row_grad_triton", "row_grad_")
    train(2)
    assert len(magnitude.calls) == 4 * 4  # projections, forwards
    assert [len(args[0]) for args, _ in topk.calls] == [4, 4, 4]  # of the model at once
    # The first forwards have no selection; then the first micro-batch makes the gradient and the
    # second adds to it.
    assert [kwargs["accumulate"] for _, kwargs in grad.calls] == [False] * 4 + [True] * 4


@runs_kernels
@pytest.mark.parametrize("every", [1, "forward"])
def test_nothing_waits_for_the_device(every: Any) -> None:
    """Between activations, rows and gradient; and not in a refresh."""
    torch.manual_seed(0)
    model = Masked(24).to(DEVICE)
    handle = longact.apply(model, targets="q_proj", refresh_every=every)
    longact.set_rows(model.q_proj.weight, list(range(7)))
    x, mask = torch.randn(2, 5, 4, device=DEVICE), torch.ones(2, 5, device=DEVICE)
    mask[0, 0] = 0
    selections = [layer.selection for layer in handle.projections.values()]
    with no_reads_by_the_host():
        for _ in range(2):
            model(x, attention_mask=mask).square().sum().backward()
            for chosen in selections:
                chosen.report = None  # what has arrived lies on the host, and is read there
            selection.refresh(selections, wait=False)
    assert handle.rows["q_proj"].tolist() != list(range(7))


@runs_kernels
def test_a_forward_that_cannot_choose_keeps_the_rows_of_the_one_before() -> None:
    model = Masked(20).to(DEVICE)
    handle = longact.apply(model, targets="q_proj", refresh_every="forward")
    layer = handle.projections["q_proj"]
    x = torch.randn(1, 5, 4, device=DEVICE)

    def rows_of_grad(x: Tensor, mask: Tensor) -> list[int]:
        layer.weight.grad = None
        model(x, attention_mask=mask).nan_to_num(0.0, 0.0, 0.0).sum().backward()
        return layer.selection.forward_rows.tolist()

    ones = torch.ones(1, 5, device=DEVICE)
    first = rows_of_grad(x, ones)
    assert rows_of_grad(x * 1e38 * 1e38, ones) == first
    assert rows_of_grad(-7 * x.flip(2), ones * 0) == first
    assert rows_of_grad(-7 * x.flip(2), ones) != first


# ---- the gradient is added to in place -----------------------------------------------------------


def salient(
    bias: bool = True, dtype: torch.dtype = torch.float32, rows: list[int] | None = ROWS
) -> SalientLinear:
    torch.manual_seed(1)
    layer = SalientLinear(6, 13, bias=bias, dtype=dtype).to(DEVICE)
    longact.set_rows(layer.weight, rows)
    return layer


def inputs(count: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, 7, 6, generator=generator).to(DEVICE, dtype) for _ in range(count)]


def gradients(layer: SalientLinear) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in layer.parameters()]


@pytest.fixture
def expected() -> list[Tensor | None]:
    """Of two micro-batches, by torch's own ops."""
    layer = salient()
    with without_triton():
        for x in inputs():
            layer(x).square().sum().backward()
    return gradients(layer)


def assert_gradients(layer: SalientLinear, expected: list[Tensor | None]) -> None:
    for ours, theirs in zip(gradients(layer), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert ours is not None
        others = [r for r in range(13) if r not in ROWS]
        assert not ours[others].any()


@runs_kernels
def test_micro_batches_add_to_the_rows_in_place(expected: list[Tensor | None]) -> None:
    layer = salient()
    seen: list[Tensor] = []
    layer.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    first, second = inputs()
    layer(first).square().sum().backward()
    grad = layer.weight.grad
    assert grad is not None
    assert grad.is_contiguous()
    layer(second).square().sum().backward()
    assert layer.weight.grad is grad
    assert_gradients(layer, expected)
    # Hooks that wait for the gradient, as data parallelism's do, see it each time.
    assert len(seen) == 2
    assert torch.equal(seen[1], grad)
    assert not torch.equal(seen[0], grad)


@runs_kernels
@pytest.mark.parametrize("how", ["checkpoint", "reentrant", "save_on_cpu"])
def test_in_place_where_saved_tensors_are_copies(
    monkeypatch: pytest.MonkeyPatch, how: str, expected: list[Tensor | None]
) -> None:
    calls = Calls(monkeypatch, "row_grad_triton", "row_grad_")
    layer = salient()
    for x in inputs():
        x.requires_grad_()  # or the weight is not saved at all
        if how == "save_on_cpu":
            with torch.autograd.graph.save_on_cpu():
                y = layer(x)
        else:
            y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=how == "reentrant")
        y.square().sum().backward()
    assert_gradients(layer, expected)
    assert [kwargs["accumulate"] for _, kwargs in calls.calls] == [False, True]


@runs_kernels
def test_rows_that_change_between_micro_batches_all_get_gradients() -> None:
    layer = salient()
    for rows, x in zip(([0, 3], [3, 12]), inputs(), strict=True):
        longact.set_rows(layer.weight, rows)
        layer(x).square().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.any(1).nonzero().flatten().tolist() == [0, 3, 12]


@runs_kernels
def test_a_hook_on_the_weight_sees_the_gradient(expected: list[Tensor | None]) -> None:
    layer = salient()
    layer.weight.register_hook(lambda grad: 2 * grad)
    for x in inputs():
        layer(x).square().sum().backward()
    expected[0] = None if expected[0] is None else 2 * expected[0]
    assert_gradients(layer, expected)


@runs_kernels
def test_autograd_grad_returns_the_gradient_and_adds_nothing() -> None:
    layer = salient()
    first, second = inputs()
    layer(first).square().sum().backward()
    before = gradients(layer)
    found = torch.autograd.grad(layer(second).square().sum(), list(layer.parameters()))
    for ours, theirs in zip(gradients(layer), before, strict=True):
        assert torch.equal(ours, theirs)  # type: ignore[arg-type]
    layer.zero_grad()
    layer(second).square().sum().backward()
    for ours, theirs in zip(gradients(layer), found, strict=True):
        assert torch.equal(ours, theirs)  # type: ignore[arg-type]


@runs_kernels
def test_backward_of_chosen_inputs_adds_nothing_elsewhere() -> None:
    layer = salient()
    first, second = (x.requires_grad_() for x in inputs())
    layer(first).square().sum().backward()
    before = gradients(layer)
    layer(second).square().sum().backward(inputs=[second])
    assert second.grad is not None
    for ours, theirs in zip(gradients(layer), before, strict=True):
        assert torch.equal(ours, theirs)  # type: ignore[arg-type]


@runs_kernels
def test_a_layer_used_twice_and_a_graph_run_twice(expected: list[Tensor | None]) -> None:
    layer = salient()
    loss = sum(layer(x).square().sum() for x in inputs())
    loss.backward(retain_graph=True)
    assert_gradients(layer, expected)
    loss.backward()
    assert_gradients(layer, [None if e is None else 2 * e for e in expected])


@runs_kernels
def test_a_second_derivative_adds_the_ordinary_way() -> None:
    ours, theirs = salient(), salient()
    for layer in (ours, theirs):
        context = without_triton() if layer is theirs else torch.enable_grad()
        with context:
            for x in inputs():
                x.requires_grad_()
                (slope,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
                slope.square().sum().backward()
    for grad, expected in zip(gradients(ours), gradients(theirs), strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5)


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_adds_in_the_parameters_dtype(dtype: torch.dtype) -> None:
    results = []
    for reference in (False, True):
        layer = salient()
        context = without_triton() if reference else torch.enable_grad()
        with context, torch.autocast(DEVICE, dtype):
            for x in inputs():
                y = layer(x)
                assert y.dtype == dtype
                y.float().square().sum().backward()
        results.append(gradients(layer))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == torch.float32
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(ours, theirs, rtol=4 * eps, atol=4 * eps)


@runs_kernels
def test_frozen_parameters_get_no_gradient() -> None:
    for frozen in ("weight", "bias"):
        layer = salient()
        getattr(layer, frozen).requires_grad_(False)
        for x in inputs():
            layer(x).square().sum().backward()
        other = layer.bias if frozen == "weight" else layer.weight
        assert getattr(layer, frozen).grad is None
        assert other.grad.reshape(13, -1).any(1).nonzero().flatten().tolist() == ROWS


@runs_kernels
def test_data_parallel_training_adds_up(expected: list[Tensor | None], tmp_path: Any) -> None:
    """Its reducer waits for a gradient of every parameter, in place or not."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    backend = "gloo" if DEVICE == "cpu" else "nccl"
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        for view in (False, True):
            layer = salient()
            parallel = nn.parallel.DistributedDataParallel(layer, gradient_as_bucket_view=view)
            first, second = inputs()
            with parallel.no_sync():
                parallel(first).square().sum().backward()
            parallel(second).square().sum().backward()
            assert_gradients(layer, expected)
    finally:
        torch.distributed.destroy_process_group()


# ---- the fused projection ------------------------------------------------------------------------


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """Every projection is fused that can be."""
    rule = projection.Rule((0, 0), torch.float16, 10**6, 0, "a test")
    monkeypatch.setattr(projection, "RULES", (rule,))
    monkeypatch.setattr(projection, "cuda_capability", lambda device: (0, 0))
    return Calls(monkeypatch, "projection_triton", "project")


class Attention(nn.Module):
    """q and k of one input, or k of another."""

    def __init__(self, own_input: bool = False) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(16, 24), nn.Linear(16, 8, bias=False)
        self.own_input = own_input

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        q = self.q_proj(x)
        return torch.cat([q, self.k_proj(x + 1 if self.own_input else x)], -1)


def attention(own_input: bool = False, **options: Any) -> tuple[Attention, longact.LongAct]:
    torch.manual_seed(0)
    model = Attention(own_input).to(DEVICE, torch.float16)
    handle = longact.apply(model, targets=["q_proj", "k_proj"], **options)
    for layer in handle.projections.values():
        longact.set_rows(layer.weight, [0, 1, 2])
    return model, handle


@runs_kernels
@pytest.mark.parametrize("every", [1, "forward"])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("own_input", [False, True])
def test_fused_projections_count_as_separate_ones(
    fused: Calls, own_input: bool, metric: Any, every: Any
) -> None:
    results = []
    for reference in (False, True):
        model, handle = attention(own_input, metric=metric, refresh_every=every)
        context = without_triton() if reference else torch.enable_grad()
        outputs = []
        with context:
            for seed in range(3):
                x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(seed))
                mask = torch.ones(2, 5, device=DEVICE)
                mask[1, : 1 + seed] = 0
                y = model(x.to(DEVICE, torch.float16), attention_mask=mask)
                y.float().square().sum().backward()
                outputs.append(y.detach())
        results.append((outputs, handle, [p.grad for p in model.parameters()]))
    launches = [len(args[1]) for args, _ in fused.calls]
    assert launches == ([2, *[1] * 5] if own_input else [2] * 3)
    (ys, handle, grads), (expected_ys, expected_handle, expected_grads) = results
    for y, expected in zip(ys + grads, expected_ys + expected_grads, strict=True):
        torch.testing.assert_close(y, expected, rtol=2e-3, atol=2e-3)
    for name, layer in handle.projections.items():
        ours, theirs = layer.selection, expected_handle.projections[name].selection
        assert int(ours.tokens) == int(theirs.tokens) == 24
        torch.testing.assert_close(ours.magnitude, theirs.magnitude, rtol=2e-3, atol=1e-3)


@runs_kernels
def test_an_output_that_nobody_takes_does_not_count(fused: Calls) -> None:
    """k of the fused launch, where only q is called."""
    model, handle = attention()
    model.train()
    counted = handle.projections["q_proj"].counted
    counted.active = True
    x = torch.randn(4, 16, device=DEVICE, dtype=torch.float16)
    model.q_proj(x)
    assert int(handle.projections["k_proj"].selection.tokens) == 0
    model.q_proj(x)  # looked up by input, but k's is what lies ready
    assert int(handle.projections["q_proj"].selection.tokens) == 8


@runs_kernels
def test_a_copied_layer_does_not_bring_its_neighbour(fused: Calls) -> None:
    model, _ = attention()
    alone = copy.deepcopy(model.q_proj)
    assert alone.shared is not model.q_proj.shared
    assert not alone.shared._layers
    twin = copy.deepcopy(model)
    twin(torch.randn(4, 16, device=DEVICE, dtype=torch.float16)).float().sum().backward()


# ---- compiled, checkpointed ----------------------------------------------------------------------


@runs_kernels
@pytest.mark.parametrize("every", [1, "forward"])
def test_a_compiled_model_trains_as_the_eager_one(every: Any) -> None:
    """Without breaks in the graph; the kernels are ops that the compiler does not look into."""
    torch._dynamo.reset()
    models = [tiny_model("qwen2", num_hidden_layers=1).to(DEVICE) for _ in range(2)]
    handles = [longact.apply(m, refresh_every=every) for m in models]
    optimizers = [adam(m, lr=1e-3) for m in models]
    runs = [torch.compile(models[0], fullgraph=True, backend="aot_eager"), models[1]]
    for step in range(3):
        ids, mask = batch(step)
        losses = [
            train_step(run, optimizer, ids, attention_mask=mask)
            for run, optimizer in zip(runs, optimizers, strict=True)
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        assert rows_of(handles[0]) == rows_of(handles[1])
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=2e-3)


@runs_kernels
@pytest.mark.parametrize("every", [1, "forward"])
def test_checkpointing_changes_no_bit(every: Any) -> None:
    results = []
    for checkpointed in (False, True):
        model = tiny_model(num_hidden_layers=1).to(DEVICE)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        handle = longact.apply(model, refresh_every=every)
        optimizer = adam(model)
        for step in range(2):
            ids, mask = batch(step)
            train_step(model, optimizer, ids, attention_mask=mask)
        results.append((rows_of(handle), list(model.parameters())))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(p, q) for p, q in zip(results[0][1], results[1][1], strict=True))


@runs_kernels
def test_ops_give_the_results_of_torchs_own() -> None:
    """And pass the library's check of schema, fake and autograd."""
    ops = torch.ops.longact
    y, x = torch.randn(9, 6, device=DEVICE), torch.randn(9, 4, device=DEVICE)
    rows = torch.tensor([1, 4, 5], dtype=torch.int32, device=DEVICE)
    tokens = torch.tensor(9, device=DEVICE)
    calls = [
        (ops.channel_magnitude, (y, torch.ones(9, device=DEVICE), "rms")),
        (ops.topk_rows, (y, 2)),
        (ops.select_rows, (y[0].abs(), tokens, rows, 3, 6, "mean_abs")),
        (ops.row_grad, (y.clone().requires_grad_(), x.clone().requires_grad_(), rows)),
        (ops.linear_grads, (y, x, rows, True)),
    ]
    for op, arguments in calls:
        torch.library.opcheck(op.default, arguments)
        with without_triton():
            expected = op(*arguments)
        torch.testing.assert_close(op(*arguments), expected, rtol=1e-5, atol=1e-5)


@runs_kernels
def test_batched_gradients() -> None:
    """Their tensors have no memory of their own."""
    layer = salient()
    (x, other) = inputs()
    x.requires_grad_()
    y = layer(x)
    directions = torch.stack([torch.ones_like(y), other.sum() * torch.ones_like(y)])
    found = torch.autograd.grad(
        y, [layer.weight, x], directions, retain_graph=True, is_grads_batched=True
    )
    for i, direction in enumerate(directions):
        expected = torch.autograd.grad(y, [layer.weight, x], direction, retain_graph=True)
        for batched, one in zip(found, expected, strict=True):
            torch.testing.assert_close(batched[i], one, rtol=1e-5, atol=1e-5)


@runs_kernels
def test_where_triton_does_not_run_torchs_ops_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container without a compiler, an old GPU: a warning, and no crash."""

    def fail(device: torch.device) -> None:
        raise RuntimeError("Failed to find C compiler.\nMore.")

    monkeypatch.setattr(backends, "_triton_errors", {})
    monkeypatch.setattr(triton_common, "try_launch", fail)
    calls = Calls(monkeypatch, "channel_magnitude_triton", "channel_magnitude")
    y = torch.randn(5, 4, device=DEVICE)
    with pytest.warns(UserWarning, match=r"Failed to find C compiler\.; longact uses torch's own"):
        totals = channel_magnitude(y)
    torch.testing.assert_close(totals, y.abs().sum(0))
    channel_magnitude(y)  # warns once
    assert not calls.calls


@runs_kernels
def test_ops_of_wrapped_tensors_run_on_torch() -> None:
    """Under function transforms and on fake tensors there is no memory to point at."""
    y = torch.randn(3, 5, 4, device=DEVICE)
    totals = torch.func.vmap(channel_magnitude)(y)
    torch.testing.assert_close(totals, y.abs().sum(1))
    with torch._subclasses.FakeTensorMode():
        assert channel_magnitude(torch.empty(5, 4, device=DEVICE)).shape == (4,)


# ---- corners that mutants found open -------------------------------------------------------------


@runs_kernels
def test_what_nobody_takes_is_not_kept_alive(fused: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = attention()
    whole = Attention.forward
    monkeypatch.setattr(Attention, "forward", lambda self, x, attention_mask=None: self.q_proj(x))
    x = torch.randn(4, 16, device=DEVICE, dtype=torch.float16)
    alive = weakref.ref(x)
    model(x)
    assert len(fused.calls[0][0][1]) == 2
    del x
    fused.calls.clear()
    assert alive() is None
    monkeypatch.setattr(Attention, "forward", whole)
    model(torch.randn(4, 16, device=DEVICE, dtype=torch.float16))
    assert [len(args[1]) for args, _ in fused.calls] == [2]


@runs_kernels
def test_a_trial_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[torch.device] = []
    monkeypatch.setattr(backends, "_triton_errors", {})
    monkeypatch.setattr(triton_common, "try_launch", tries.append)
    y = torch.randn(5, 4, device=DEVICE)
    for _ in range(2):
        channel_magnitude(y)
    assert tries == [y.device]


@runs_kernels
def test_every_tensor_must_be_plain() -> None:
    y = torch.randn(5, 4, device=DEVICE)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = mode.from_tensor(y)
    assert backends.runs_triton(y, y)
    assert not backends.runs_triton(y, fake)


@runs_kernels
def test_the_input_is_let_go_when_both_are_taken(fused: Calls) -> None:
    model, handle = attention()
    handle.projections["q_proj"].counted.active = True
    x = torch.randn(4, 16, device=DEVICE, dtype=torch.float16)
    model.q_proj(x)
    model.k_proj(x)
    assert len(fused.calls) == 1
    assert model.q_proj.shared._input[0] is None


@runs_kernels
def test_under_autocast_the_neighbours_weight_is_not_cast(fused: Calls) -> None:
    results = []
    for reference in (False, True):
        model, _ = attention()
        model.float()
        context = without_triton() if reference else torch.enable_grad()
        x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        with context:
            with torch.autocast(DEVICE, torch.float16):
                y = model(x)
            y.float().square().sum().backward()
        results.append((y.detach(), [p.grad for p in model.parameters()]))
    assert [len(args[1]) for args, _ in fused.calls] == [1, 1]
    torch.testing.assert_close(results[0], results[1], rtol=4e-3, atol=4e-3)


class Blocks(nn.Module):
    def __init__(self, names: list[str], count: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(16, 16) for name in names}) for _ in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.stack([layer(x) for layer in block.values()]).sum(0)
        return x


@runs_kernels
@pytest.mark.parametrize(("names", "launches"), [("q", [1, 1]), ("qk", [2, 2]), ("qkv", [1] * 6)])
def test_pairs_in_a_block_are_fused(fused: Calls, names: str, launches: list[int]) -> None:
    model = Blocks(list(names), 2).to(DEVICE, torch.float16)
    handle = longact.apply(model, targets=list(names))
    for layer in handle.projections.values():
        longact.set_rows(layer.weight, [0, 1, 2])
    model(torch.randn(4, 16, device=DEVICE, dtype=torch.float16))
    assert [len(args[1]) for args, _ in fused.calls] == launches
    assert all(int(layer.selection.tokens) == 4 for layer in handle.projections.values())


@runs_kernels
def test_an_input_that_changed_in_place_is_projected_anew(fused: Calls) -> None:
    model, handle = attention()
    handle.projections["q_proj"].counted.active = True
    x = torch.randn(4, 16, device=DEVICE, dtype=torch.float16)
    model.q_proj(x)
    x += 1
    y = model.k_proj(x)
    assert len(fused.calls) == 2
    expected = nn.functional.linear(x, model.k_proj.weight)
    torch.testing.assert_close(y, expected, rtol=2e-3, atol=2e-3)


@runs_kernels
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_gradients_with_a_graph_add_up(expected: list[Tensor | None]) -> None:
    layer = salient()
    for x in inputs():
        layer(x).square().sum().backward(create_graph=True)
    for ours, theirs in zip(gradients(layer), expected, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-5, atol=1e-5)
    layer.zero_grad()


@runs_kernels
def test_a_gradient_that_the_kernel_does_not_take(expected: list[Tensor | None]) -> None:
    layer = salient()
    layer.weight.grad = torch.zeros(6, 26, device=DEVICE).t()[::2]
    for x in inputs():
        layer(x).square().sum().backward()
    assert_gradients(layer, expected)


@runs_kernels
@pytest.mark.filterwarnings("error:The .grad attribute of a Tensor that is not a leaf")
def test_no_warning_of_a_weight_that_is_no_leaf() -> None:
    layer = salient()
    with torch.autocast(DEVICE, torch.bfloat16):
        for x in inputs():
            layer(x).float().square().sum().backward()


@runs_kernels
def test_what_a_rule_covers(fused: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = projection.Rule((9, 0), torch.float16, 16, 4, "a test")
    monkeypatch.setattr(projection, "RULES", (rule,))

    def fuses(tokens: int = 4, size: int = 16, capability: Any = (9, 0), **other: Any) -> bool:
        monkeypatch.setattr(projection, "cuda_capability", lambda device: capability)
        make = {"device": DEVICE, "dtype": torch.float16} | other
        x, weight = torch.zeros(tokens, size, **make), torch.zeros(8, size, **make)
        return projection.fuses(x, [weight], [None])

    assert fuses()
    assert not fuses(tokens=3)
    assert not fuses(size=32)
    assert not fuses(capability=(8, 0))
    assert not fuses(dtype=torch.bfloat16)
    x, weight = torch.zeros(4, 16, device=DEVICE).half(), torch.zeros(8, 16, device=DEVICE)
    monkeypatch.setattr(projection, "cuda_capability", lambda device: (9, 0))
    assert not projection.fuses(x, [weight], [None])
    with torch._subclasses.FakeTensorMode() as mode:
        bias = mode.from_tensor(torch.zeros(8, device=DEVICE))
    assert not projection.fuses(x, [weight.half()], [bias])


@runs_kernels
def test_what_is_too_wide_or_no_fp32_is_ranked_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk_rows, "MAX_CHANNELS", 8)
    one = Calls(monkeypatch, "topk_rows_triton", "topk_rows")
    many = Calls(monkeypatch, "topk_rows_triton", "select_rows")
    tokens = torch.tensor(1, device=DEVICE)
    topk_rows.topk_rows(torch.rand(9, device=DEVICE), 2)
    topk_rows.topk_rows(torch.rand(8, device=DEVICE).double(), 2)
    totals = [torch.rand(n, device=DEVICE) for n in (4, 9)]
    topk_rows.select_rows(totals, [tokens] * 2, [None] * 2, [1, 1], [4, 9], "rms")
    assert not one.calls + many.calls
    topk_rows.topk_rows(torch.rand(8, device=DEVICE), 2)
    topk_rows.select_rows(totals, [tokens] * 2, [None] * 2, [1, 1], [4, 3], "rms")
    assert (len(one.calls), len(many.calls)) == (1, 1)


@runs_kernels
def test_the_weights_gradient_is_differentiable_again() -> None:
    results = []
    for reference in (False, True):
        layer, (x, _) = salient(), inputs()
        x.requires_grad_()
        with without_triton() if reference else torch.enable_grad():
            loss = layer(x).square().sum()
            (slope,) = torch.autograd.grad(loss, layer.weight, create_graph=True)
            slope.square().sum().backward()
        results.append((x.grad, gradients(layer)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)
