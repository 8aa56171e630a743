"""`Monitor`, and selection at the steps of other optimizers, against direct computation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import QK, adam, forward_backward, rows_of, tiny_model, token_ids, train_step
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from triton_tools import no_reads_by_the_host

import longact
from longact.monitor import Monitor

MASK = torch.ones(2, 12, dtype=torch.long)
MASK[1, :5] = 0


class Direct:
    """The metrics of one step, from the projections' own outputs and gradients."""

    def __init__(self, handle: longact.LongAct, metric: str) -> None:
        self.handle, self.metric = handle, metric
        self.outputs: dict[str, list[Tensor]] = {name: [] for name in QK}
        self.previous: dict[str, set[int]] = {}
        for name, layer in handle.projections.items():
            layer.register_forward_hook(self._keep(name))

    def _keep(self, name: str) -> Any:
        def hook(module: Any, args: Any, y: Tensor) -> None:
            self.outputs[name].append(y.detach()[MASK.bool()].double())

        return hook

    def forget(self) -> None:
        for kept in self.outputs.values():
            kept.clear()

    def metrics(self, rows: dict[str, list[int]], grads: dict[str, Tensor]) -> dict[str, float]:
        shares: dict[str, list[float]] = {"q_proj": [], "k_proj": []}
        overlaps: dict[str, list[float]] = {"q_proj": [], "k_proj": []}
        squares = 0.0
        for name in QK:
            kind, y = name.rpartition(".")[2], torch.cat(self.outputs[name])
            magnitude = {
                "mean_abs": y.abs().mean(0),
                "rms": y.square().mean(0).sqrt(),
                "max_abs": y.abs().amax(0),
            }[self.metric]
            shares[kind].append(float(magnitude[rows[name]].sum() / magnitude.sum()))
            if name in self.previous:
                same = self.previous[name] & set(rows[name])
                overlaps[kind].append(len(same) / len(rows[name]))
            self.previous[name] = set(rows[name])
            squares += float(grads[name][rows[name]].double().square().sum())
        result = {"longact/grad_norm": squares**0.5}
        for kind, share in shares.items():
            result[f"longact/{kind}/activation_share"] = sum(share) / len(share)
            result[f"longact/{kind}/rows"] = {"q_proj": 19.0, "k_proj": 10.0}[kind]
            if overlaps[kind]:
                result[f"longact/{kind}/overlap"] = sum(overlaps[kind]) / len(overlaps[kind])
        return result


@pytest.mark.parametrize(
    ("metric", "refresh_every"),
    [("mean_abs", 1), ("rms", 1), ("max_abs", 1), ("mean_abs", 2), ("mean_abs", 0)],
)
@pytest.mark.parametrize("other", [False, True], ids=["ours", "AdamW"])
def test_metrics_of_each_step(metric: Any, refresh_every: int, other: bool) -> None:
    model = tiny_model(attention_bias=False)
    handle = longact.apply(model, metric=metric, refresh_every=refresh_every)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2) if other else adam(model)
    monitor = Monitor(handle, optimizer)
    if other:
        handle.follow(optimizer)
    direct = Direct(handle, metric)
    overlaps = []
    for step in range(5):
        rows = rows_of(handle)
        for micro in range(2):
            ids = token_ids(seed=2 * step + micro)
            forward_backward(model, ids, attention_mask=MASK)
        grads = {n: p.weight.grad.clone() for n, p in handle.projections.items()}
        optimizer.step()
        optimizer.zero_grad()
        trained = rows_of(handle) if step == 0 else rows
        expected = direct.metrics(trained, grads)  # type: ignore[arg-type]
        assert monitor.pop() == pytest.approx(expected, rel=1e-5)
        overlaps.append(expected.get("longact/q_proj/overlap"))
        # The first step's selection was made from its own forwards.
        if step == 0 or (refresh_every and (step + 1) % refresh_every == 0):
            direct.forget()
    assert overlaps[0] is None
    if refresh_every:
        assert overlaps[-1] < 1
    else:
        assert overlaps[1:] == [1.0] * 4


def test_rows_of_each_forward_are_those_that_the_step_trained() -> None:
    model = tiny_model()
    handle = longact.apply(model, refresh_every="forward")
    optimizer = adam(model)
    monitor = Monitor(handle, optimizer, layers=True)
    for step in range(3):
        before = handle.projections[QK[0]].weight.detach().clone()
        for micro in range(2):
            forward_backward(model, token_ids(seed=2 * step + micro))
        optimizer.step()
        optimizer.zero_grad()
        changed = (handle.projections[QK[0]].weight != before).any(1).sum()
        metrics = monitor.pop()
        assert metrics[f"longact/rows/{QK[0]}"] == changed
        mean = sum(len(rows_of(handle)[n] or []) for n in QK[::2]) / 2
        assert metrics["longact/q_proj/rows"] == mean


def test_pop_gives_means_and_starts_anew() -> None:
    model = tiny_model()
    optimizer = adam(model)
    handle = longact.apply(model)
    monitor, twin = Monitor(handle, optimizer), Monitor(handle, optimizer)
    single = []
    for step in range(3):
        train_step(model, optimizer, token_ids(seed=step))
        single.append(twin.pop())
    metrics = monitor.pop()
    for key in ("longact/grad_norm", "longact/q_proj/activation_share"):
        assert metrics[key] == pytest.approx(sum(s[key] for s in single) / 3)
    assert metrics["longact/q_proj/overlap"] == pytest.approx(
        sum(s["longact/q_proj/overlap"] for s in single[1:]) / 2
    )
    assert monitor.pop() == {}
    monitor.remove()
    train_step(model, optimizer, token_ids())
    assert monitor.pop() == {}
    assert twin.pop() != {}


def test_a_gradient_that_the_scaler_scaled_is_unscaled() -> None:
    norms = []
    for scale in (None, 1024.0):
        model = tiny_model()
        optimizer = adam(model)
        monitor = Monitor(longact.apply(model), optimizer)
        loss = model(input_ids=token_ids(), labels=token_ids()).loss
        if scale is None:
            loss.backward()
            optimizer.step()
        else:
            scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
        norms.append(monitor.pop()["longact/grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_a_step_without_counted_tokens_has_no_share() -> None:
    model = tiny_model()
    handle = longact.apply(model)
    optimizer = adam(model)
    monitor = Monitor(handle, optimizer)
    train_step(model, optimizer, token_ids())
    monitor.pop()
    model.eval()
    train_step(model, optimizer, token_ids())
    metrics = monitor.pop()
    assert "longact/q_proj/activation_share" not in metrics
    assert metrics["longact/q_proj/overlap"] == 1


def test_nothing_is_read_before_pop() -> None:
    model = tiny_model()
    handle = longact.apply(model)
    optimizer = adam(model)
    monitor = Monitor(handle, optimizer)
    for step in range(2):
        forward_backward(model, token_ids(seed=step))
        with no_reads_by_the_host():
            monitor._before(optimizer, (), {})
        handle.refresh()
        with no_reads_by_the_host():
            monitor._after(optimizer, (), {})
    assert monitor.pop()


# Optimizers of another kind


def test_follow_selects_what_ours_would() -> None:
    """Without weight decay and moments (SGD), masked gradients are the whole of it."""
    selections = []
    for other in (False, True):
        model = tiny_model()
        handle = longact.apply(model, refresh_every=2)
        if other:
            optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            handle.follow(optimizer)
        else:
            optimizer = adam(model, lr=0.0)
        rows = []
        for step in range(6):
            train_step(model, optimizer, token_ids(seed=step))
            rows.append(rows_of(handle))
        selections.append(rows)
    assert selections[0] == selections[1]
    assert len({str(r) for r in selections[0]}) == 4  # 1st step, and after each 2nd


def test_the_first_step_of_another_optimizer_is_masked_too() -> None:
    model = tiny_model("qwen2")  # has biases
    handle = longact.apply(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    handle.follow(optimizer)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train_step(model, optimizer, token_ids())
    for name, layer in handle.projections.items():
        assert layer.rows is not None
        for key, param in layer.named_parameters(recurse=False):
            changed = (param != before[f"{name}.{key}"]).reshape(layer.out_features, -1).any(1)
            assert changed.nonzero().flatten().tolist() == layer.rows.tolist()


def test_remove_stops_following() -> None:
    model = tiny_model()
    handle = longact.apply(model)
    assert handle.is_applied
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    handle.follow(optimizer)
    handle.remove()
    assert not handle.is_applied
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_our_optimizer_needs_no_following() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="selects at its own steps"):
        longact.apply(model).follow(adam(model))


# Sharded parameters (FSDP2)


@pytest.mark.parametrize("other", [False, True], ids=["ours", "SGD"])
def test_sharded_parameters_are_watched_and_followed_as_plain_ones(
    other: bool, tmp_path: Path
) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        logs, weights = [], []
        for sharded in (False, True):
            model = tiny_model()
            handle = longact.apply(model)
            if sharded:
                fully_shard(model)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.5) if other else adam(model)
            monitor = Monitor(handle, optimizer)
            if other:
                handle.follow(optimizer)
            steps = []
            for step in range(3):
                train_step(model, optimizer, token_ids(seed=step))
                steps.append(monitor.pop())
            logs.append(steps)
            params = [layer.weight for layer in handle.projections.values()]
            weights.append([p.full_tensor() if sharded else p for p in params])
        assert "longact/grad_norm" not in logs[1][0]  # there were no rows when it was computed
        del logs[0][0]["longact/grad_norm"]
        for plain, shard in zip(*logs, strict=True):
            assert shard == pytest.approx(plain, rel=1e-5)
        for plain_weight, shard_weight in zip(*weights, strict=True):
            assert torch.equal(plain_weight, shard_weight)
    finally:
        dist.destroy_process_group()
