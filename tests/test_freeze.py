"""`longact.apply(model, others="freeze")`: the selected rows are the parameters, nothing else is.

The definition is `others="train"` with everything but the query and key projections frozen: from
the same rows both give the same bits at each step.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import assert_same_bits, assert_same_tree, one_thread
from models import (
    K0,
    PAD,
    Q0,
    QK,
    adam,
    changed_rows,
    forward_backward,
    hooks_of,
    params_of,
    rows_of,
    tiny_model,
    token_ids,
    train_step,
)
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import optimizer as torch_optimizer
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

import longact
from longact.monitor import Monitor
from longact.nn import CompactSalientLinear, SalientLinear

pytestmark = [
    pytest.mark.usefixtures(one_thread.__name__),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning"),
]


def batch(seed: int) -> dict[str, Tensor]:
    """Two sequences, the second one shorter."""
    ids = token_ids(seed=seed)
    mask = torch.ones_like(ids)
    mask[1, 12 - 1 - seed % 6 :] = 0
    return {"ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


def held(model: nn.Module, name: str = Q0) -> nn.Parameter:
    """The parameter that holds the selected rows of a weight."""
    return model.get_submodule(name).salient_weight


def is_held(name: str) -> bool:
    return name.rpartition(".")[2].startswith("salient_")


def whole_params(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter that the model has without longact."""
    return {name: value for name, value in params_of(model).items() if not is_held(name)}


def freeze(
    arch: str = "llama", *, seed: int = 0, config: dict[str, Any] | None = None, **options: Any
) -> tuple[Any, longact.LongAct]:
    """A model whose rows alone are trained; they are selected already."""
    model = tiny_model(arch, seed=seed, **(config or {}))
    handle = longact.apply(model, others="freeze", **options)
    model(input_ids=token_ids(seed=50))
    handle.refresh()
    return model, handle


# ---- it is others="train" with everything else frozen --------------------------------------------


class Pair:
    """The same model twice, from the same rows: `others="freeze"`, and `others="train"` with
    everything but the matched projections frozen and compact moments."""

    def __init__(
        self,
        arch: str = "llama",
        *,
        dtype: torch.dtype = torch.float32,
        options: dict[str, Any] | None = None,
        hyper: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.twin = (tiny_model(arch).to(dtype) for _ in range(2))
        options = options or {}
        self.handle = longact.apply(self.model, others="freeze", **options)
        self.twin_handle = longact.apply(self.twin, **options)
        trained = {id(p) for x in self.twin_handle.projections.values() for p in x.parameters()}
        for param in self.twin.parameters():
            param.requires_grad_(id(param) in trained)
        for layer in self.twin_handle.projections.values():
            layer.selection.always = None  # the values of a fused projection, frozen here
        for model, handle in ((self.model, self.handle), (self.twin, self.twin_handle)):
            model(input_ids=token_ids(seed=50))
            handle.refresh()
        self.optimizer = adam(self.model, **(hyper or {}))
        self.twin_optimizer = adam(self.twin, **{**(hyper or {}), "state": "compact"})

    def backward(self, seed: int) -> None:
        losses = [forward_backward(m, **batch(seed)) for m in (self.model, self.twin)]
        assert losses[0] == losses[1], f"batch {seed}"

    def step(self) -> None:
        for optimizer in (self.optimizer, self.twin_optimizer):
            optimizer.step()
            optimizer.zero_grad()

    def names(self) -> Iterator[tuple[Any, Any, str]]:
        """(layer, its twin, "weight" or "bias")"""
        twins = self.twin_handle.projections
        for name, layer in self.handle.projections.items():
            for key in ("weight", "bias"):
                if getattr(layer, key) is not None:
                    yield layer, twins[name], key

    def compare(self, what: str) -> None:
        """Parameters, rows, moments, masters and ages, bit for bit."""
        assert rows_of(self.handle) == rows_of(self.twin_handle), what
        assert_same_tree(whole_params(self.model), params_of(self.twin), what)
        for layer, twin, key in self.names():
            param, other = getattr(layer, f"salient_{key}"), getattr(twin, key)
            assert_same_bits(param.detach(), other.detach()[twin.rows.long()], f"{what}: {key}")
            state = self.optimizer.state[param]
            assert_same_tree(dict(state), dict(self.twin_optimizer.state[other]), what)
            assert state["exp_avg"].shape == param.shape


CASES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "bias": {"arch": "qwen2"},
    "norms": {"arch": "qwen3", "hyper": {"weight_decay": 0.0}},
    "compact-state": {"hyper": {"state": "compact", "maximize": True}},
    "fused-qkv": {"arch": "phi3"},
    "bf16-masters": {
        "arch": "qwen2", "dtype": torch.bfloat16, "hyper": {"master_weights": True}
    },
    "bf16-moments": {"hyper": {"moment_dtype": torch.bfloat16}},
    "fp64-amsgrad": {"dtype": torch.float64, "hyper": {"amsgrad": True, "weight_decay": 0.3}},
    "head-max": {"options": {"scope": "head", "metric": "max_abs", "keep_ratio": 0.2}},
    "every-2-pairs": {"options": {"refresh_every": 2, "pair_rope": True}},
    "once": {"options": {"refresh_every": 0, "metric": "rms"}},
    "captures-rope": {"options": {"capture": "rope"}},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_it_trains_as_rows_of_the_whole_weights_do(case: str) -> None:
    pair = Pair(**CASES[case])
    start = whole_params(pair.model)
    seen = {str(rows_of(pair.handle))}
    for step in range(20):
        pair.backward(step)
        pair.step()
        pair.compare(f"step {step}")
        seen.add(str(rows_of(pair.handle)))
    assert len(seen) == 1 if case == "once" else len(seen) > 5
    changed = {n for n, p in whole_params(pair.model).items() if not torch.equal(p, start[n])}
    assert changed <= {f"{n}.{key}" for n in pair.handle.projections for key in ("weight", "bias")}
    assert {f"{n}.weight" for n in pair.handle.projections} <= changed


def test_micro_batches_and_autocast_change_nothing_of_that() -> None:
    pair = Pair("qwen2")
    for step in range(20):
        for micro in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                pair.backward(2 * step + micro)
        for layer, twin, key in pair.names():
            grad, whole = getattr(layer, f"salient_{key}").grad, getattr(twin, key).grad
            assert grad.dtype == torch.float32
            assert_same_bits(grad, whole[twin.rows.long()], f"step {step}: gradient of {key}")
        pair.step()
        pair.compare(f"step {step}")


def test_values_of_a_fused_projection_are_frozen() -> None:
    model, handle = freeze("phi3")
    name = "model.layers.0.self_attn.qkv_proj"
    start = model.get_submodule(name).weight.detach().clone()
    optimizer = adam(model)
    for seed in range(4):
        train_step(model, optimizer, token_ids(seed=seed))
    changed = changed_rows(start, model.get_submodule(name).weight.detach())
    assert min(changed) < 64 <= max(changed) < 96  # 64 rows of q, 32 of k, 32 of v
    assert len(handle.rows[name]) == 19 + 10


class Plain(nn.Module):
    """One projection of 6 rows, with channels as large as its rows are told to be."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(3, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x)


def test_what_becomes_of_rows_that_leave_stay_and_enter() -> None:
    model = Plain()
    handle = longact.apply(model, 0.5, targets="q_proj", others="freeze", refresh_every=0)
    layer: Any = handle.projections["q_proj"]
    longact.set_rows(layer.weight, [0, 1, 2])
    optimizer = adam(model)
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        model(torch.randn(4, 3, generator=generator)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    start = layer.weight.detach().clone()
    step()
    step()
    trained = layer.weight.detach().clone()
    old = {key: value.clone() for key, value in optimizer.state[layer.salient_weight].items()}
    assert changed_rows(start, trained) == [0, 1, 2]
    assert old["ages"].tolist() == [2, 2, 2]
    longact.set_rows(layer.salient_weight, [1, 2, 5])
    assert torch.equal(layer.salient_weight, trained[[1, 2, 5]])
    step()
    state = optimizer.state[layer.salient_weight]
    assert state["moment_rows"].tolist() == [1, 2, 5]
    assert state["ages"].tolist() == [3, 3, 1]
    assert changed_rows(trained, layer.weight.detach()) == [1, 2, 5]  # row 0 keeps what it learned
    # The first step of a row is lr wide whatever its gradient; moments that came along would show.
    expected = trained[5] * (1 - 1e-2 * 0.1)
    torch.testing.assert_close((layer.weight[5] - expected).abs(), torch.full((3,), 1e-2))
    assert layer.selection.changed.tolist() == [True, True, True, False, False, True]


# ---- what exists ---------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_only_rows_are_parameters_to_train(arch: str) -> None:
    model, plain = tiny_model(arch), tiny_model(arch)
    handle = longact.apply(model, others="freeze")
    trained = {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    keys = ("weight", "bias") if arch == "qwen2" else ("weight",)
    shapes = {"weight": (64,), "bias": ()}
    assert trained == {
        f"{name}.salient_{key}": (count, *shapes[key])
        for name, count in zip(QK, [19, 10, 19, 10], strict=True)
        for key in keys
    }
    assert all(type(layer) is CompactSalientLinear for layer in handle.projections.values())
    assert_same_tree(dict(model.state_dict()), dict(plain.state_dict()))
    ids = token_ids()
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    forward_backward(model, ids)
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(trained)


# ---- the first selection -------------------------------------------------------------------------


def test_the_first_forward_selects_what_the_first_step_would() -> None:
    model, twin = tiny_model("qwen2"), tiny_model("qwen2")
    handle, twin_handle = longact.apply(model, others="freeze"), longact.apply(twin)
    optimizer, twin_optimizer = adam(model), adam(twin)
    start = whole_params(model)
    forward_backward(model, **batch(0))
    forward_backward(twin, **batch(0))
    first = rows_of(handle)
    assert None not in first.values()
    assert rows_of(twin_handle) == dict.fromkeys(QK)
    optimizer.step()
    twin_optimizer.step()
    assert first == rows_of(twin_handle) == rows_of(handle)
    for name in QK:
        for key in ("weight", "bias"):
            before, after = start[f"{name}.{key}"], model.get_parameter(f"{name}.{key}").detach()
            other = twin.get_parameter(f"{name}.{key}").detach()
            assert changed_rows(before, after) == first[name]
            # The other's first gradient is one dense product.
            torch.testing.assert_close(after, other, rtol=1e-4, atol=1e-5)


def test_the_first_micro_batch_selects_and_its_counts_stay() -> None:
    model, twin, alone = (tiny_model() for _ in range(3))
    handle, twin_handle = longact.apply(model, others="freeze"), longact.apply(twin)
    first = longact.apply(alone, others="freeze")
    optimizer, twin_optimizer = adam(model), adam(twin)
    alone(input_ids=token_ids())
    start = whole_params(model)
    for seed in range(3):
        for m in (model, twin):
            forward_backward(m, token_ids(seed=seed))
        assert rows_of(handle) == rows_of(first)  # of the first micro-batch alone, for all of them
    assert held(model).grad is not None
    optimizer.step()
    twin_optimizer.step()
    changed = changed_rows(start[f"{Q0}.weight"], model.get_submodule(Q0).weight.detach())
    assert changed == rows_of(first)[Q0]
    # The next rows are those of all three.
    assert rows_of(handle) == rows_of(twin_handle) != rows_of(first)


def test_gradients_add_up_over_micro_batches() -> None:
    model, _ = freeze("qwen2")
    grads: dict[str, list[Tensor]] = {}
    params = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    for seed in (0, 1):
        forward_backward(model, **batch(seed))
        for name, param in params:
            grads.setdefault(name, []).append(param.grad.clone())
            param.grad = None
    for seed in (0, 1):
        forward_backward(model, **batch(seed))
    for name, param in params:
        assert_same_bits(param.grad, grads[name][0] + grads[name][1], name)
        assert bool(param.grad.any())


def test_eval_and_no_grad_forwards_do_not_count() -> None:
    model = tiny_model()
    handle = longact.apply(model, others="freeze")
    ids = token_ids(seed=3)
    model.eval()(input_ids=ids)
    with torch.no_grad():
        model.train()(input_ids=ids)
    assert rows_of(handle) == dict.fromkeys(QK)
    assert all(int(layer.selection.tokens) == 0 for layer in handle.projections.values())
    model(input_ids=token_ids())
    first = rows_of(handle)
    model.eval()(input_ids=ids)
    with torch.no_grad():
        model.train()(input_ids=ids)
    assert rows_of(handle) == first
    assert all(int(layer.selection.tokens) == 24 for layer in handle.projections.values())
    # Rows that are there have gradients in eval mode, too.
    forward_backward(model.eval(), ids)
    assert bool(held(model).grad.any())


# ---- what stands between backward and step -------------------------------------------------------


def test_clipping_sees_the_gradient_of_the_rows() -> None:
    pair = Pair("qwen2")
    for step in range(3):
        pair.backward(step)
        grads = [p.grad for p in pair.model.parameters() if p.grad is not None]
        assert len(grads) == 8
        norm = torch.cat([g.flatten() for g in grads]).norm()
        before = held(pair.model).grad.clone()
        clipped = torch.nn.utils.clip_grad_norm_(pair.model.parameters(), 0.5 * float(norm))
        torch.testing.assert_close(clipped, norm)
        twin_norm = torch.nn.utils.clip_grad_norm_(pair.twin.parameters(), 0.5 * float(norm))
        torch.testing.assert_close(clipped, twin_norm)
        torch.testing.assert_close(held(pair.model).grad, before * 0.5, rtol=1e-4, atol=1e-7)
        pair.step()


def test_grad_scaler_skips_a_step_and_nothing_changes() -> None:
    model, handle = freeze()
    plain, plain_handle = freeze()
    optimizer, plain_optimizer = adam(model), adam(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)

    def everything() -> Any:
        entries = handle.state_dict()["projections"].items()
        rows = {n: (e["rows"].clone(), e["changed"].clone()) for n, e in entries}
        state = [
            {k: v.clone() for k, v in optimizer.state[p].items()}
            for p in model.parameters()
            if p.requires_grad
        ]
        return params_of(model), rows, state

    for step in range(8):
        spoiled = step in (0, 3)
        ids = token_ids(seed=step)
        loss = model(input_ids=ids, labels=ids).loss
        before = everything()
        scaler.scale(loss * (float("inf") if spoiled else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        forward_backward(plain, ids)
        if spoiled:
            assert_same_tree(everything(), before, f"skipped step {step}")
        else:
            plain_optimizer.step()
        plain_optimizer.zero_grad()
        # The scale is a power of two: dividing by it is exact.
        assert_same_tree(params_of(model), params_of(plain), f"step {step}")
        assert rows_of(handle) == rows_of(plain_handle)
    assert scaler.get_scale() == 256.0


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_activation_checkpointing_changes_no_bit(reentrant: bool) -> None:
    checkpointed, plain = tiny_model("qwen2"), tiny_model("qwen2")
    handles = [longact.apply(m, others="freeze") for m in (checkpointed, plain)]
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        checkpointed.enable_input_require_grads()
    optimizers = [adam(m) for m in (checkpointed, plain)]
    for step in range(5):
        for micro in range(2):
            losses = [forward_backward(m, **batch(2 * step + micro)) for m in (checkpointed, plain)]
            assert losses[0] == losses[1]
        for name in QK:
            assert_same_bits(held(checkpointed, name).grad, held(plain, name).grad, name)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert rows_of(handles[0]) == rows_of(handles[1])
        assert_same_tree(params_of(checkpointed), params_of(plain))


class Block(nn.Module):
    """Two projections of one input, which activation checkpointing may run again."""

    def __init__(self, checkpointing: bool = False) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 6)
        self.k_proj = nn.Linear(8, 6)
        self.out = nn.Linear(6, 3)
        self.checkpointing = checkpointing

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if self.checkpointing:
            return checkpoint(self.block, x, use_reentrant=False)
        return self.block(x)

    def block(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.q_proj(x)) * self.k_proj(x))


def block(*, checkpointing: bool = False) -> tuple[Block, longact.LongAct]:
    torch.manual_seed(0)
    model = Block(checkpointing)
    return model, longact.apply(model, 0.5, targets=["q_proj", "k_proj"], others="freeze")


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_a_compiled_model_trains_as_the_eager_one(checkpointing: bool) -> None:
    torch._dynamo.reset()
    (model, handle), (eager, eager_handle) = (block(checkpointing=checkpointing) for _ in range(2))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizers = [adam(m) for m in (model, eager)]
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for step in range(6):
        x, mask = torch.randn(2, 5, 8, generator=generator), torch.ones(2, 5)
        mask[0, 2 + step % 3 :] = 0
        # The first forward, which selects, is eager.
        for run in (model if step == 0 else compiled, eager):
            run(x, attention_mask=mask).square().mean().backward()
        for name in ("q_proj", "k_proj"):
            torch.testing.assert_close(held(model, name).grad, held(eager, name).grad)
            tokens = [int(h.projections[name].selection.tokens) for h in (handle, eager_handle)]
            assert tokens[0] == tokens[1] > 0
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert rows_of(handle) == rows_of(eager_handle)
        seen.add(str(rows_of(handle)))
    assert len(seen) > 1
    for name, param in model.named_parameters():
        torch.testing.assert_close(param, eager.get_parameter(name))


def test_a_compiled_first_forward_is_a_clear_error() -> None:
    torch._dynamo.reset()
    model, _ = block()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="run a training forward of the model uncompiled first"):
        compiled(torch.randn(2, 5, 8))
    model(torch.randn(2, 5, 8))
    compiled(torch.randn(2, 5, 8)).sum().backward()
    assert held(model, "q_proj").grad is not None


def test_a_compiled_first_forward_with_graph_breaks_is_a_clear_error() -> None:
    torch._dynamo.reset()
    model, _ = block()
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.raises(Exception, match="compile"):
        compiled(torch.randn(2, 5, 8)).sum().backward()


# ---- optimizers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1),
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    ],
    ids=["AdamW", "SGD"],
)
@pytest.mark.parametrize("follow", [False, True], ids=["alone", "follow"])
def test_another_optimizer_trains_the_rows_that_are_there(
    make: Callable[[Any], torch.optim.Optimizer], follow: bool
) -> None:
    model = tiny_model("qwen2")
    handle = longact.apply(model, others="freeze", refresh_every=0 if follow else 1)
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    if follow:
        handle.follow(optimizer)
    clones: list[Any] = []
    for step in range(4):
        start = whole_params(model)
        forward_backward(model, **batch(step))
        rows = rows_of(handle)
        params = [p for p in model.parameters() if p.requires_grad]
        if not clones:
            clones = [nn.Parameter(p.detach().clone()) for p in params]
            by_hand = make(clones)
            first = rows
        for clone, param in zip(clones, params, strict=True):
            clone.grad = param.grad.clone()
        optimizer.step()
        optimizer.zero_grad()
        by_hand.step()
        assert rows_of(handle) == rows == first
        for clone, param in zip(clones, params, strict=True):
            assert_same_bits(param.detach(), clone.detach(), f"step {step}")
        for name, layer in handle.projections.items():
            for key in ("weight", "bias"):
                after = getattr(layer, key).detach()
                assert changed_rows(start[f"{name}.{key}"], after) == rows[name]
                assert torch.equal(after[layer.rows.long()], getattr(layer, f"salient_{key}"))


def test_two_models_and_their_optimizers_do_not_meet() -> None:
    (one, _), (other, _) = freeze(), freeze(seed=1)
    optimizers = [torch.optim.SGD([held(m)], lr=0.1) for m in (one, other)]
    before = params_of(other)
    for model in (one, other):
        forward_backward(model, token_ids())
    optimizers[0].step()
    assert_same_tree(params_of(other), before)
    optimizers[1].step()
    layer: Any = other.get_submodule(Q0)
    assert changed_rows(before[f"{Q0}.weight"], layer.weight.detach()) == layer.rows.tolist()


def test_follow_needs_rows_that_stay() -> None:
    model, handle = freeze(refresh_every=1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match=r"refresh_every=1 needs longact.FusedMaskedAdam"):
        handle.follow(optimizer)
    with pytest.raises(ValueError, match="it selects at its own steps"):
        handle.follow(adam(model))


def test_an_optimizer_from_before_apply_is_refused() -> None:
    model = tiny_model()
    optimizer = adam(model)
    longact.apply(model, others="freeze")
    forward_backward(model, token_ids())
    with pytest.raises(RuntimeError, match=f"{Q0}.*construct the optimizer afterwards"):
        optimizer.step()


def test_zero_grad_is_refused_and_changes_nothing() -> None:
    model, _ = freeze()
    optimizer = adam(model, inactive="zero_grad")
    forward_backward(model, token_ids())
    before = params_of(model)
    with pytest.raises(ValueError, match=r"inactive='zero_grad'.*use inactive='freeze'"):
        optimizer.step()
    assert_same_tree(params_of(model), before)
    assert not optimizer.state


def test_the_monitor_reads_the_rows_gradient() -> None:
    model, handle = freeze()
    optimizer = adam(model)
    monitor = Monitor(handle, optimizer)
    forward_backward(model, token_ids())
    grads = [held(model, name).grad for name in QK]
    optimizer.step()
    metrics = monitor.pop()
    norm = torch.cat([g.flatten() for g in grads]).norm()
    assert metrics["longact/grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert metrics["longact/q_proj/rows"] == 19
    assert 0.3 < metrics["longact/q_proj/activation_share"] < 1


# ---- rows by hand, and mistakes ------------------------------------------------------------------


@pytest.mark.parametrize("through", ["weight", "salient_weight", "salient_bias"])
def test_rows_set_by_hand(through: str) -> None:
    model, handle = freeze("qwen2", refresh_every=0)
    layer: Any = handle.projections[K0]
    rows = list(range(3, 23, 2))
    longact.set_rows(getattr(layer, through), rows)
    assert layer.rows.tolist() == rows
    assert torch.equal(layer.salient_weight, layer.weight[rows])
    assert torch.equal(layer.salient_bias, layer.bias[rows])
    before = whole_params(model)
    train_step(model, adam(model), token_ids())
    assert changed_rows(before[f"{K0}.weight"], layer.weight.detach()) == rows
    assert changed_rows(before[f"{K0}.bias"], layer.bias.detach()) == rows


@pytest.mark.parametrize("rows", [[0, 1], [], None, list(range(11)), [*range(9), 32]], ids=str)
def test_another_number_of_rows_is_refused(rows: list[int] | None) -> None:
    model, handle = freeze()
    before, params = rows_of(handle), params_of(model)
    layer: Any = handle.projections[K0]
    for param in (layer.weight, layer.salient_weight):
        with pytest.raises(ValueError, match=r"trains 10 rows, always|index 32"):
            longact.set_rows(param, rows)
    assert rows_of(handle) == before
    assert_same_tree(params_of(model), params)


def test_a_backward_without_rows_is_a_clear_error() -> None:
    model = tiny_model()
    longact.apply(model, others="freeze")
    with pytest.raises(RuntimeError, match=r"self_attn.*no rows are selected yet.*model\.train"):
        forward_backward(model.eval(), token_ids())
    forward_backward(model.train(), token_ids())
    assert held(model).grad is not None


def test_where_nothing_can_be_chosen_the_first_rows_of_each_head_train() -> None:
    model = tiny_model()
    handle = longact.apply(model, 0.25, others="freeze", scope="head")
    model.model.layers[1].input_layernorm.weight.data.fill_(float("inf"))
    with pytest.warns(longact.LongActWarning, match="non-finite"):
        model(input_ids=token_ids())
    of_each = [c for c in range(64) if c % 16 < 4]
    rows = rows_of(handle)
    assert rows["model.layers.1.self_attn.q_proj"] == of_each != rows[Q0]


def test_a_layer_that_the_first_forward_leaves_out_selects_later() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 6), nn.Linear(3, 6)

        def forward(self, x: Tensor, which: str) -> Tensor:
            y: Tensor = getattr(self, which)(x)
            return y

    torch.manual_seed(0)
    model = Experts()
    handle = longact.apply(model, 0.5, targets=["a", "b"], others="freeze")
    optimizer = adam(model)
    x = torch.randn(4, 3)
    model(x, "a").sum().backward()
    assert rows_of(handle)["b"] == [0, 1, 2]  # no more collectives for its sake
    for _ in range(2):
        optimizer.step()
        optimizer.zero_grad()
        y = model(x, "b")
        y.sum().backward()
    optimizer.step()
    assert rows_of(handle)["b"] == sorted(y.abs().mean(0).topk(3).indices.tolist()) != [0, 1, 2]


def test_a_gradient_is_not_added_to_one_of_other_rows() -> None:
    model, _ = freeze()
    forward_backward(model, token_ids())
    longact.set_rows(held(model), list(range(19)))
    with pytest.raises(RuntimeError, match="belongs to rows that are not selected any more"):
        forward_backward(model, token_ids(seed=1))


def test_steps_inside_of_the_backward_are_refused_where_rows_change_in_between() -> None:
    """Weight and bias by optimizers of their own: the first one's step selects."""
    model, _ = freeze("qwen2")
    optimizers = {
        p: longact.FusedMaskedAdam([p], lr=1e-2) for p in model.parameters() if p.requires_grad
    }
    for param in optimizers:
        param.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
    with pytest.raises(RuntimeError, match="weight and bias of a layer to one optimizer"):
        forward_backward(model, **batch(0))


def test_gradients_may_be_set_to_zero_in_place() -> None:
    states = []
    for to_none in (True, False):
        model, handle = freeze("qwen2")
        optimizer = adam(model)
        seen = set()
        for seed in range(4):
            forward_backward(model, **batch(seed))
            optimizer.step()
            optimizer.zero_grad(set_to_none=to_none)
            seen.add(str(rows_of(handle)))
        assert len(seen) > 1
        states.append(params_of(model))
    assert_same_tree(states[0], states[1])


def test_an_optimizer_that_evaluates_inside_of_its_step() -> None:
    losses: list[list[float]] = [[], []]
    for way, found in zip(("freeze", "by hand"), losses, strict=True):
        model, handle = freeze(refresh_every=0)
        if way == "by hand":
            rows = {name: rows.clone() for name, rows in handle.rows.items() if rows is not None}
            handle.remove()
            handle = longact.apply(model, refresh_every=0)
            for name, param in model.named_parameters():
                param.requires_grad_(name.removesuffix(".weight") in QK)
            for name in QK:
                longact.set_rows(model.get_parameter(f"{name}.weight"), rows[name])
        optimizer = torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad], lr=0.1)

        def closure(model: Any = model, optimizer: Any = optimizer) -> float:
            optimizer.zero_grad()
            return forward_backward(model, token_ids())

        found += [float(optimizer.step(closure)) for _ in range(2)]
        found.append(forward_backward(model, token_ids()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][2] < losses[0][0] - 0.5


def test_parameters_that_are_written_to_reach_the_weights() -> None:
    """As averaging does, after training."""
    model, handle = freeze()
    start = whole_params(model)
    with torch.no_grad():
        held(model).add_(1.0)
    expected = start[f"{Q0}.weight"].clone()
    expected[handle.rows[Q0].long()] += 1.0  # type: ignore[union-attr]
    assert torch.equal(model.state_dict()[f"{Q0}.weight"], expected)
    with torch.no_grad():
        held(model).add_(1.0)
    model(input_ids=token_ids())
    assert changed_rows(model.get_submodule(Q0).weight.detach(), expected) == rows_of(handle)[Q0]


@pytest.mark.parametrize("how", ["refresh", "set_rows"])
def test_other_rows_between_forward_and_backward_are_a_clear_error(how: str) -> None:
    model, handle = freeze()
    ids = token_ids()
    loss = model(input_ids=ids, labels=ids).loss
    before = rows_of(handle)
    if how == "refresh":
        handle.refresh()
        assert rows_of(handle) != before
    else:
        longact.set_rows(held(model), list(range(19)))
    with pytest.raises(RuntimeError, match=r"rows changed between this forward and its backward"):
        loss.backward()


@pytest.mark.parametrize("how", ["refresh", "set_rows"])
def test_other_rows_between_backward_and_step_get_no_gradient_of_others(how: str) -> None:
    """Whether it is refused or dropped: rows that had no gradient must not move by one."""
    model, handle = freeze()
    optimizer = adam(model, weight_decay=0.0)
    forward_backward(model, token_ids())
    before, start = set(rows_of(handle)[Q0] or ()), whole_params(model)
    if how == "refresh":
        handle.refresh()
    else:
        longact.set_rows(held(model), list(range(19)))
    entered = set(rows_of(handle)[Q0] or ()) - before
    assert entered
    try:
        optimizer.step()
    except RuntimeError:
        return
    changed = changed_rows(start[f"{Q0}.weight"], model.get_submodule(Q0).weight.detach())
    assert not entered & set(changed)


def test_second_derivatives_are_right_or_refused() -> None:
    found = []
    for others in ("train", "freeze"):
        torch.manual_seed(0)
        model = Plain().double()
        handle = longact.apply(model, 0.5, targets="q_proj", others=others)  # type: ignore[arg-type]
        x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
        model(x)
        handle.refresh()
        layer: Any = handle.projections["q_proj"]
        (dx,) = torch.autograd.grad(model(x).tanh().sum(), x, create_graph=True)
        param = layer.weight if others == "train" else layer.salient_weight
        try:
            (grad,) = torch.autograd.grad(dx.square().sum(), param)
        except RuntimeError:
            assert others == "freeze"
            return
        found.append(grad[layer.rows.long()] if others == "train" else grad)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"scope": "model"}, "others='freeze' with scope='model'"),
        ({"refresh_every": "forward"}, "others='freeze' with refresh_every='forward'"),
        ({"others": "frozen"}, "others='frozen': use 'train' or 'freeze'"),
    ],
    ids=["scope", "refresh_every", "others"],
)
def test_what_cannot_work_is_refused_at_apply(options: dict[str, Any], match: str) -> None:
    model = tiny_model()
    modules, flags = dict(model.named_modules()), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=match):
        longact.apply(model, **{"others": "freeze", **options})
    assert dict(model.named_modules()) == modules
    assert [p.requires_grad for p in model.parameters()] == flags
    assert hooks_of(model) == 0


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_wrapped_and_sharded_models_are_refused() -> None:
    model = tiny_model(num_hidden_layers=1)
    wrapped = DistributedDataParallel(model)
    with pytest.raises(ValueError, match=r"the model is a DistributedDataParallel.*then wrap it"):
        longact.apply(wrapped, targets=["q_proj", "k_proj"], others="freeze")
    with pytest.raises(ValueError, match=r"policy is a DistributedDataParallel"):
        longact.apply(nn.ModuleDict({"policy": wrapped}), targets="*q_proj", others="freeze")
    assert type(model.get_submodule(Q0)) is nn.Linear
    assert all(p.requires_grad for p in model.parameters())

    sharded = tiny_model(num_hidden_layers=1)
    fully_shard(sharded)
    with pytest.raises(NotImplementedError, match=f"{Q0}.weight is sharded.*others='train'"):
        longact.apply(sharded, others="freeze")
    assert all(p.requires_grad for p in sharded.parameters())

    later = tiny_model(num_hidden_layers=1)
    longact.apply(later, others="freeze")
    fully_shard(later.model.layers[0])
    fully_shard(later)
    with pytest.raises(NotImplementedError, match=f"{Q0}.*does not work with sharded parameters"):
        forward_backward(later, token_ids())


@pytest.mark.usefixtures("process_group")
def test_a_model_sharded_as_a_whole_after_apply_is_refused_before_anything_changes() -> None:
    model: Any = tiny_model(num_hidden_layers=1)
    longact.apply(model, others="freeze")
    fully_shard(model)
    optimizer = adam(model)
    before = held(model).full_tensor().detach().clone()

    def train() -> None:
        nonlocal before
        forward_backward(model, token_ids())
        before = held(model).full_tensor().detach().clone()
        optimizer.step()

    with pytest.raises(NotImplementedError, match=r"does not work with sharded parameters"):
        train()
    assert torch.equal(held(model).full_tensor(), before)


# ---- checkpoints ---------------------------------------------------------------------------------


def through_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_state_dicts_are_those_of_the_plain_model(assign: bool) -> None:
    model, _ = freeze("qwen2")
    train_step(model, adam(model), token_ids())
    plain = tiny_model("qwen2", seed=1)
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(through_file(model.state_dict()), assign=assign)
    assert_same_tree(params_of(plain), whole_params(model))

    other = tiny_model("qwen2", seed=2)
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    assert_same_tree(whole_params(model), params_of(other))
    for name in QK:  # not what was trained before
        layer: Any = model.get_submodule(name)
        assert torch.equal(layer.salient_weight, layer.weight[layer.rows.long()])
        assert torch.equal(layer.salient_bias, layer.bias[layer.rows.long()])
    train_step(model, adam(model), token_ids())
    layer = model.get_submodule(Q0)
    start = other.get_submodule(Q0).weight.detach()
    assert len(changed_rows(start, layer.weight.detach())) == 19


def test_a_state_dict_with_a_key_missing_is_still_refused() -> None:
    model, _ = freeze()
    state = model.state_dict()
    del state[f"{Q0}.weight"]
    with pytest.raises(RuntimeError, match=rf"Missing key\(s\) in state_dict: \"{Q0}.weight\"\. $"):
        model.load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "hyper", "dtype"),
    [
        ({}, {"amsgrad": True}, torch.float32),
        ({"refresh_every": 2, "metric": "max_abs"}, {"master_weights": True}, torch.bfloat16),
        ({"refresh_every": 0}, {}, torch.float32),
    ],
    ids=["amsgrad", "every-2-bf16-masters", "once"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    options: dict[str, Any], hyper: dict[str, Any], dtype: torch.dtype
) -> None:
    model = tiny_model("qwen2").to(dtype)
    handle = longact.apply(model, others="freeze", **options)
    optimizer = adam(model, **hyper)
    for seed in range(3):
        train_step(model, optimizer, token_ids(seed=seed))
    model(input_ids=token_ids(seed=7))  # counted for the next selection
    saved = [through_file(x.state_dict()) for x in (model, optimizer, handle)]

    twin = tiny_model("qwen2", seed=1).to(dtype)
    twin_handle = longact.apply(twin, others="freeze", **options)
    twin_optimizer = adam(twin, **hyper)
    for part, state in zip((twin, twin_optimizer, twin_handle), saved, strict=True):
        part.load_state_dict(state)
    for step in range(5):
        assert_same_tree(params_of(twin), params_of(model), f"step {step}")
        assert_same_tree(twin_handle.state_dict(), handle.state_dict(), f"step {step}")
        assert_same_tree(twin_optimizer.state_dict(), optimizer.state_dict(), f"step {step}")
        losses = [
            train_step(m, o, token_ids(seed=10 + step))
            for m, o in ((model, optimizer), (twin, twin_optimizer))
        ]
        assert losses[0] == losses[1]


def test_a_handles_state_of_another_number_of_rows_is_refused() -> None:
    _, handle = freeze(keep_ratio=0.5)
    model, other = freeze()
    before = params_of(model)
    with pytest.raises(ValueError, match=f"state_dict of {Q0}.*trains 19 rows, always"):
        other.load_state_dict(handle.state_dict())
    _, trained = freeze()
    state = trained.state_dict()
    del state["projections"][K0]["changed"]
    with pytest.raises(ValueError, match=f"state_dict of {K0}: has no 'changed'"):
        other.load_state_dict(state)
    assert_same_tree(params_of(model), before)


def test_an_optimizers_state_of_another_number_of_rows_is_refused() -> None:
    model, handle = freeze()
    optimizer = adam(model)
    train_step(model, optimizer, token_ids())
    before, rows = params_of(model), rows_of(handle)
    state = optimizer.state_dict()
    entry = next(iter(state["state"].values()))
    entry["rows"] = entry["rows"][:5]
    with pytest.raises(ValueError, match=r"state of parameter .*trains 19 rows, always"):
        optimizer.load_state_dict(state)
    assert_same_tree(params_of(model), before)
    assert rows_of(handle) == rows


def test_a_model_may_get_its_memory_after_apply() -> None:
    with torch.device("meta"):
        model = Plain()
    handle = longact.apply(model, 0.5, targets="q_proj", others="freeze")
    model.to_empty(device="cpu")
    plain = Plain()
    model.load_state_dict(plain.state_dict())
    model(torch.randn(5, 3)).square().sum().backward()
    before = plain.q_proj.weight.detach()
    adam(model).step()
    layer: Any = handle.projections["q_proj"]
    assert (
        changed_rows(before, layer.weight.detach())
        == layer.selection.changed.nonzero()[:, 0].tolist()
    )
    assert len(layer.rows) == 3


@pytest.mark.parametrize(
    "arch",
    [
        "llama",
        "qwen2",
    ],
)
def test_a_delta_makes_the_trained_model_of_the_base(arch: str, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    model = tiny_model(arch)
    handle = longact.apply(model, others="freeze")
    optimizer = adam(model)
    for seed in range(4):
        train_step(model, optimizer, token_ids(seed=seed))
    handle.save_delta(tmp_path / "delta")
    base = tiny_model(arch)
    info = longact.load_delta(base, tmp_path / "delta")
    assert_same_tree(dict(base.state_dict()), dict(model.state_dict()))
    changed = sum(int(layer.selection.changed.sum()) for layer in handle.projections.values())
    assert (info.parameters, info.rows) == ((4, changed) if arch == "llama" else (8, 2 * changed))
    # Also into a model in training, which then trains these rows' values and saves them, too.
    other, again = tiny_model(arch), tiny_model(arch)
    other_handle = longact.apply(other, others="freeze")
    other(input_ids=token_ids(seed=9))
    longact.load_delta(other, tmp_path / "delta")
    layer = other.get_submodule(Q0)
    assert torch.equal(layer.salient_weight, layer.weight[layer.rows.long()])
    train_step(other, adam(other), token_ids(seed=9))
    other_handle.save_delta(tmp_path / "second")
    longact.load_delta(again, tmp_path / "second")
    assert_same_tree(dict(again.state_dict()), dict(other.state_dict()))


def test_a_delta_is_of_trained_rows_alone(tmp_path: Path) -> None:
    handle = longact.apply(tiny_model())
    with pytest.raises(ValueError, match=r"others='train': every parameter was trained"):
        handle.save_delta(tmp_path / "delta")
    _, removed = freeze()
    removed.remove()
    with pytest.raises(ValueError, match=r"remove\(\) was called"):
        removed.save_delta(tmp_path / "delta")
    assert not list(tmp_path.iterdir())


# ---- copies, other handles, remove ---------------------------------------------------------------


def copied(model: Any, how: str) -> Any:
    if how == "deepcopy":
        return copy.deepcopy(model)
    if how == "pickle":
        return pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("trained", [False, True], ids=["before the first selection", "trained"])
def test_a_copy_trains_on_its_own_and_identically(how: str, trained: bool) -> None:
    model = tiny_model("qwen2")
    handle = longact.apply(model, others="freeze", refresh_every=2)
    if trained:
        train_step(model, adam(model), token_ids())
        model(input_ids=token_ids(seed=9))  # running totals travel, too
    twin = copied(model, how)
    rows, start = rows_of(handle), params_of(model)
    assert_same_tree(params_of(twin), start)
    addresses = [{p.data_ptr() for p in m.parameters()} for m in (model, twin)]
    assert not addresses[0] & addresses[1]
    layers: list[Any] = [twin.get_submodule(name) for name in QK]
    assert [None if x.rows is None else x.rows.tolist() for x in layers] == list(rows.values())

    batches = [token_ids(seed=i) for i in range(4)]
    twin_optimizer = adam(twin)
    losses = [train_step(twin, twin_optimizer, ids) for ids in batches]
    assert_same_tree(params_of(model), start)  # the original did not notice
    assert rows_of(handle) == rows
    optimizer = adam(model)
    assert [train_step(model, optimizer, ids) for ids in batches] == losses
    assert_same_tree(params_of(model), params_of(twin))
    assert [x.rows.tolist() for x in layers] == list(rows_of(handle).values())
    assert list(rows_of(handle).values()) != list(rows.values())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_trains_with_another_optimizer(how: str) -> None:
    model, _ = freeze()
    twin = copied(model, how)
    start = params_of(model)
    optimizer = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=1e-2)
    train_step(twin, optimizer, token_ids())
    layer: Any = twin.get_submodule(Q0)
    assert torch.equal(layer.weight[layer.rows.long()], layer.salient_weight)
    assert len(changed_rows(start[f"{Q0}.weight"], layer.weight.detach())) == 19
    assert_same_tree(params_of(model), start)


@pytest.mark.parametrize(
    "first",
    [
        "embeddings",
        "rows",
    ],
)
def test_two_handles_on_one_model(first: str) -> None:
    """Salient rows of q and k beside the rows of the tokens that were read."""
    model = tiny_model()
    if first == "rows":
        handle = longact.apply(model, others="freeze")
        embeddings = longact.apply(model, rows="touched", others="freeze")
    else:
        embeddings = longact.apply(model, rows="touched", others="freeze")
        handle = longact.apply(model, others="freeze")
    optimizer = adam(model)
    start = whole_params(model)
    ids = token_ids()
    train_step(model, optimizer, ids)
    after = whole_params(model)
    name = "model.embed_tokens.weight"
    assert changed_rows(start[name], after[name]) == ids.unique().tolist()
    for q_or_k in QK:
        weight = f"{q_or_k}.weight"
        assert len(changed_rows(start[weight], after[weight])) in (10, 19)
    rest = set(start) - {name} - {f"{n}.weight" for n in QK}
    assert all(torch.equal(start[n], after[n]) for n in rest)
    handle.remove()
    embeddings.remove()
    assert all(p.requires_grad for p in model.parameters())


def test_an_apply_that_fails_midway_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen2")
    before, modules = params_of(model), dict(model.named_modules())
    hold_rows, calls = CompactSalientLinear.hold_rows, []

    def short_of_memory(layer: CompactSalientLinear, num_rows: int) -> None:
        calls.append(num_rows)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no memory")
        hold_rows(layer, num_rows)

    monkeypatch.setattr(CompactSalientLinear, "hold_rows", short_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        longact.apply(model, others="freeze")
    assert dict(model.named_modules()) == modules
    assert all(p.requires_grad for p in model.parameters())
    assert_same_tree(params_of(model), before)
    assert hooks_of(model) == 0


def test_remove_frees_parameters_that_were_loaded_by_assignment() -> None:
    model, handle = freeze()
    model.load_state_dict(tiny_model(seed=1).state_dict(), assign=True)
    handle.remove()
    assert all(p.requires_grad for p in model.parameters())
    forward_backward(model, token_ids())


def test_a_delta_holds_what_all_handles_train_or_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    longact.apply(model, 0.3, targets="q_proj", others="freeze")
    handle = longact.apply(model, 0.1, targets="k_proj", others="freeze")
    train_step(model, adam(model), token_ids())
    base = tiny_model()
    torch.compile(model)
    handle.save_delta(tmp_path / "delta")
    longact.load_delta(base, tmp_path / "delta")
    assert_same_tree(params_of(base), whole_params(model))
    model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"model\.norm\.weight can be trained, too"):
        handle.save_delta(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_delta_of_a_compiled_model_has_the_models_names(tmp_path: Path) -> None:
    model = tiny_model()
    compiled = torch.compile(model)
    handle = longact.apply(compiled, others="freeze")
    train_step(model, adam(model), token_ids())
    handle.save_delta(tmp_path / "delta")
    base = tiny_model()
    longact.load_delta(base, tmp_path / "delta")
    assert_same_tree(params_of(base), whole_params(model))


def test_removing_one_of_two_handles_leaves_the_other_frozen() -> None:
    model = tiny_model()
    embeddings = longact.apply(model, rows="touched", others="freeze")
    longact.apply(model, others="freeze")
    embeddings.remove()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{name}.salient_weight" for name in QK
    }


def hooks_of_optimizers() -> int:
    return len(torch_optimizer._global_optimizer_post_hooks)  # type: ignore[attr-defined]


@pytest.mark.parametrize("trained", [False, True], ids=["at once", "trained"])
def test_remove_leaves_nothing(trained: bool) -> None:
    model = tiny_model("qwen2")
    model.model.norm.weight.requires_grad_(False)  # by its owner, who wants it back so
    model.get_submodule(K0).bias.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    modules, params = dict(model.named_modules()), dict(model.named_parameters())
    handle = longact.apply(tiny_model(), others="freeze")  # hooks that all share, once
    hooks = hooks_of_optimizers()
    handle = longact.apply(model, others="freeze")
    assert hooks_of_optimizers() == hooks
    if trained:
        train_step(model, adam(model), token_ids())
    values = whole_params(model)
    model.eval()
    handle.remove()
    assert dict(model.named_modules()) == modules
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in params.items()}
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert all(longact.get_rows(p) is None for p in model.parameters())
    assert not model.get_submodule(Q0).training
    assert hooks_of(model) == 0
    assert hooks_of_optimizers() == hooks
    assert_same_tree(params_of(model), values)
    # And it trains as any model does.
    model.train()
    plain = tiny_model("qwen2")
    plain.load_state_dict(model.state_dict())
    for name, param in plain.named_parameters():
        param.requires_grad_(flags[name])
    for m in (model, plain):
        train_step(m, adam(m), token_ids(seed=3))
    assert_same_tree(params_of(model), params_of(plain))


def test_apply_again_after_remove() -> None:
    model, handle = freeze()
    handle.remove()
    again = longact.apply(model, 0.5)
    assert all(type(layer) is SalientLinear for layer in again.projections.values())
    assert all(p.requires_grad for p in model.parameters())
    again.remove()
    with longact.apply(model, 0.5, others="freeze"):
        assert held(model).shape == (32, 64)
    assert type(model.get_submodule(Q0)) is nn.Linear


def test_a_model_is_freed_without_remove() -> None:
    model, handle = freeze()
    optimizer = adam(model)
    train_step(model, optimizer, token_ids())
    gone = [weakref.ref(x) for x in (model, held(model), model.get_submodule(Q0))]
    del model, handle, optimizer
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3
    # What is left of it does not disturb others.
    param = nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    torch.optim.SGD([param], lr=0.5).step()
    assert param.tolist() == [0.5, 0.5]


# ---- never a gradient of full size ---------------------------------------------------------------


def allocations(others: str, optimizer: str) -> tuple[list[int], int]:
    """Bytes of each allocation of a step of two micro-batches with clipping, and the peak of
    them."""
    sizes = {"hidden_size": 256, "head_dim": 64, "num_hidden_layers": 1, "intermediate_size": 64}
    model = tiny_model(**sizes)
    handle = longact.apply(model, others=others)  # type: ignore[arg-type]
    if others == "train":
        trained = {id(p) for x in handle.projections.values() for p in x.parameters()}
        for param in model.parameters():
            param.requires_grad_(id(param) in trained)
    if optimizer == "AdamW":
        opt: Any = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    else:
        opt = adam(model, state="compact")

    def step(seed: int) -> None:
        for micro in range(2):
            forward_backward(model, token_ids(1, 6, seed=seed + micro))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        opt.step()
        opt.zero_grad()

    for seed in range(3):  # the last of which changes the rows
        step(seed)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(9)
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    in_use = peak = 0
    for change in changes:
        in_use += change
        peak = max(peak, in_use)
    return [change for change in changes if change > 0], peak


@pytest.mark.parametrize("optimizer", ["FusedMaskedAdam", "AdamW"])
def test_no_gradient_of_full_size_is_ever_allocated(optimizer: str) -> None:
    q, k = 256 * 256 * 4, 128 * 256 * 4
    q_rows, k_rows = 77 * 256 * 4, 38 * 256 * 4
    compact, compact_peak = allocations("freeze", optimizer)
    whole, whole_peak = allocations("train", optimizer)
    # The control: both gradients, of each micro-batch.
    assert whole.count(q) >= 2
    assert whole.count(k) >= 2
    assert compact.count(q_rows) >= 2
    assert compact.count(k_rows) >= 2
    assert max(compact) == q_rows < k
    assert whole_peak - compact_peak > (q + k) / 2


# ---- transformers --------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("options", [{}, {"refresh_every": 2}], ids=str)
def test_a_trainer_trains_rows_and_resumes_exactly(options: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="needs the rl extra")
    from trainers import make_trainer, state_of

    from longact.integrations.transformers import apply_to_trainer

    states = []
    for name, resume in (("whole", None), ("resumed", str(tmp_path / "whole" / "checkpoint-3"))):
        model = tiny_model("qwen2", seed=0 if resume is None else 1)
        start = params_of(model)
        trainer = make_trainer(
            "trainer",
            tmp_path / name,
            model=model,
            save_strategy="steps",
            save_steps=3,
            gradient_accumulation_steps=2,
        )
        handle = apply_to_trainer(trainer, others="freeze", **options)
        trainer.train(resume_from_checkpoint=resume)
        states.append(state_of(trainer, handle))
        if resume is None:
            groups = trainer.optimizer.param_groups
            assert [g["weight_decay"] for g in groups] == [0.1, 0.0]  # biases in the second
            assert [[p.dim() for p in g["params"]] for g in groups] == [[2] * 4, [1] * 4]
            changed = {n for n, p in whole_params(model).items() if not torch.equal(p, start[n])}
            assert changed == {f"{n}.{key}" for n in QK for key in ("weight", "bias")}
            logs = [log for log in trainer.state.log_history if "loss" in log]
            assert len(logs) == 6
            for log in logs:
                assert log["longact/q_proj/rows"] == 19
                # All gradients are those of rows; the trainer's norm is the one before clipping.
                norm = min(float(log["grad_norm"]), 1.0)
                assert log["longact/grad_norm"] == pytest.approx(norm, rel=1e-3)
            trainer.save_model(str(tmp_path / "saved"))
            plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
            assert_same_tree(params_of(plain), whole_params(model))
    assert len(states[0]["optimizer"]["state"]) == 8
    assert_same_tree(states[0], states[1])


def test_a_trainer_with_an_optimizer_of_its_own_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="needs the rl extra")
    from trainers import make_trainer

    from longact.integrations.transformers import apply_to_trainer

    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters())
    trainer = make_trainer("trainer", tmp_path, model=model, optimizers=(optimizer, None))
    with pytest.raises(ValueError, match=r"others='freeze': the trainer was given a AdamW"):
        apply_to_trainer(trainer, others="freeze")
    assert all(p.requires_grad for p in model.parameters())
    assert type(model.get_submodule(Q0)) is nn.Linear
