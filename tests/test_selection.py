"""Which rows `longact.apply` selects, and when: on tiny models, against a direct computation."""

from __future__ import annotations

import copy
import gc
import inspect
import math
import sys
import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from models import (
    K0,
    K1,
    PAD,
    Q0,
    Q1,
    QK,
    adam,
    assert_same_params,
    changed_rows,
    forward_backward,
    params_of,
    rows_of,
    tiny_model,
    token_ids,
    train_step,
)
from torch import Tensor, nn

import longact

METRICS = ["mean_abs", "rms", "max_abs"]

# transformers 5.24 renamed the argument, and deprecates the name that earlier versions know.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")


class Watch:
    """The projections' outputs as plain forward hooks see them: the ground truth of these tests."""

    def __init__(self, handle: longact.LongAct) -> None:
        self.outputs: dict[str, list[Tensor]] = {name: [] for name in handle.projections}
        for name, layer in handle.projections.items():
            layer.register_forward_hook(self._keep(name))

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, y: Tensor) -> None:
            self.outputs[name].append(y.detach().double().flatten(0, -2))

        return hook

    def take(self, *masks: Tensor) -> dict[str, Tensor]:
        """Counted outputs `[tokens, channels]` since the last call; masks: one for each forward."""
        taken = {}
        for name, ys in self.outputs.items():
            if masks:
                assert len(ys) == len(masks)
                ys = [y[m.bool().flatten()] for y, m in zip(ys, masks, strict=True)]  # noqa: PLW2901
            taken[name] = torch.cat(ys)
            self.outputs[name] = []
        return taken


def magnitude(y: Tensor, metric: str = "mean_abs") -> Tensor:
    if metric == "mean_abs":
        return y.abs().mean(0)
    return y.square().mean(0).sqrt() if metric == "rms" else y.abs().amax(0)


def top(values: Tensor, keep: float = 0.3) -> list[int]:
    """The definition, in plain Python: k largest, ties to the lower index, ascending."""
    k = max(1, math.floor(keep * len(values) + 0.5))
    return sorted(sorted(range(len(values)), key=lambda c: (-float(values[c]), c))[:k])


def tops(ys: dict[str, Tensor], metric: str = "mean_abs") -> dict[str, list[int]]:
    return {name: top(magnitude(y, metric)) for name, y in ys.items()}


def counted(handle: longact.LongAct) -> list[int]:
    """Tokens that each projection counted since its last refresh."""
    return [int(layer.selection.tokens) for layer in handle.projections.values()]  # type: ignore[arg-type]


def totals(handle: longact.LongAct) -> dict[str, Tensor]:
    saved = handle.state_dict()["projections"]
    return {name: entry["magnitude"].clone() for name, entry in saved.items()}


def padded(side: str, *lengths: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids and their mask; padding on one side."""
    ids = token_ids(len(lengths), max(lengths), seed=seed)
    mask = torch.zeros_like(ids)
    for i, length in enumerate(lengths):
        keep = slice(0, length) if side == "right" else slice(ids.shape[1] - length, None)
        mask[i, keep] = 1
    return ids.masked_fill(mask == 0, PAD), mask


def grad_rows(grad: Tensor) -> list[int]:
    return grad.reshape(grad.shape[0], -1).abs().sum(1).nonzero().flatten().tolist()


def projection_changes(before: dict[str, Tensor], model: nn.Module) -> dict[str, list[int]]:
    return {n: changed_rows(before[f"{n}.weight"], params_of(model)[f"{n}.weight"]) for n in QK}


class Masked(nn.Module):
    """A bare projection under a forward that knows an attention mask."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, channels)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.q_proj(x)


def masked(channels: int = 8, **options: Any) -> tuple[Masked, longact.LongAct]:
    torch.manual_seed(0)
    model = Masked(channels)
    return model, longact.apply(model, targets="q_proj", **options)


# ---- what counts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_magnitudes_are_those_of_the_outputs_over_counted_tokens(arch: str, metric: Any) -> None:
    model = tiny_model(arch)
    handle = longact.apply(model, metric=metric)
    watch = Watch(handle)
    batches = [padded("right", 12, 5, seed=1), padded("left", 3, 9, seed=2)]
    for ids, mask in batches:
        model(input_ids=ids, attention_mask=mask)
    ys = watch.take(*(mask for _, mask in batches))

    assert counted(handle) == [29] * 4
    for name, total in totals(handle).items():
        assert total.dtype == torch.float32
        value = {"mean_abs": total / 29, "rms": (total / 29).sqrt(), "max_abs": total}[metric]
        torch.testing.assert_close(value.double(), magnitude(ys[name], metric), rtol=1e-5, atol=0)
    handle.refresh()
    assert rows_of(handle) == tops(ys, metric)
    assert counted(handle) == [0] * 4
    assert not any(total.any() for total in totals(handle).values())


def test_the_metrics_differ_on_this_data() -> None:
    # Else the test above could not tell them apart.
    ys = torch.randn(29, 64, generator=torch.Generator().manual_seed(0)).double()
    assert len({tuple(top(magnitude(ys, metric))) for metric in METRICS}) == 3


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_never_counts(side: str, metric: Any) -> None:
    ids, mask = padded(side, 12, 7)
    results = []
    for filler in (PAD, 5, 41):
        model = tiny_model()
        handle = longact.apply(model, metric=metric)
        model(input_ids=ids.masked_fill(mask == 0, filler), attention_mask=mask)
        results.append(totals(handle))
        assert counted(handle) == [19] * 4
        # It would show: with the padding counted, the totals depend on what it holds.
        model(input_ids=ids.masked_fill(mask == 0, filler))
        assert counted(handle) == [19 + 24] * 4
    for name in QK:
        assert torch.equal(results[0][name], results[1][name])
        assert torch.equal(results[0][name], results[2][name])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_sequence_counts_as_the_unpadded_one(side: str) -> None:
    model = tiny_model()
    handle = longact.apply(model)
    ids, mask = padded(side, 12, 7)
    model(input_ids=ids[1:], attention_mask=mask[1:])
    with_padding = totals(handle)
    handle.refresh()
    rows = rows_of(handle)
    model(input_ids=ids[1:][mask[1:] == 1][None])
    assert counted(handle) == [7] * 4
    # Close, not equal: matrices of another shape and other positions round differently.
    for name, total in totals(handle).items():
        torch.testing.assert_close(with_padding[name], total, rtol=1e-4, atol=1e-4)
    handle.refresh()
    assert rows_of(handle) == rows


def test_the_mask_is_found_wherever_it_is_passed() -> None:
    ids, mask = padded("left", 12, 4)
    model = tiny_model(causal_lm=False)
    handle = longact.apply(model)
    seen = []
    for call in (
        lambda: model(input_ids=ids, attention_mask=mask),
        lambda: model(ids, mask),
        lambda: model(ids, attention_mask=mask.bool()),
        lambda: model(ids, attention_mask=mask.float()),
        lambda: model(inputs_embeds=model.embed_tokens(ids), attention_mask=mask),
    ):
        call()
        assert counted(handle) == [16] * 4
        seen.append(totals(handle))
        handle.refresh()
    for other in seen[1:]:
        assert all(torch.equal(other[name], seen[0][name]) for name in other)
    lm = tiny_model()
    lm_handle = longact.apply(lm)
    lm(ids, mask)
    assert counted(lm_handle) == [16] * 4


class Wrapper(nn.Module):
    """A reward or value model around a transformers model, which makes the mask itself."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor) -> Any:
        return self.inner(input_ids=ids, attention_mask=(ids != PAD).long())


@pytest.mark.parametrize("causal_lm", [True, False], ids=["ForCausalLM", "Model"])
def test_the_mask_is_found_inside_of_a_wrapper(causal_lm: bool) -> None:
    ids, _ = padded("left", 12, 4)
    model = Wrapper(tiny_model(causal_lm=causal_lm))
    handle = longact.apply(model, targets=["q_proj", "k_proj"])
    model(ids)
    assert counted(handle) == [16] * 4


def test_without_a_token_mask_every_token_counts() -> None:
    model = tiny_model()
    handle = longact.apply(model)
    ids = token_ids()
    causal = torch.ones(12, 12).tril().bool()[None, None].expand(2, 1, 12, 12)
    for inputs in (
        {},
        {"attention_mask": None},
        {"attention_mask": torch.ones_like(ids)},
        {"attention_mask": causal},
    ):
        model(input_ids=ids, **inputs)
        assert counted(handle) == [24] * 4
        handle.refresh()


def test_a_mask_of_one_forward_does_not_reach_the_next() -> None:
    model = tiny_model()
    handle = longact.apply(model)
    ids, mask = padded("right", 12, 7)
    model(input_ids=ids, attention_mask=mask)
    model(input_ids=ids)
    assert counted(handle) == [19 + 24] * 4


def test_a_packed_batch_counts_all_its_tokens() -> None:
    model = tiny_model()
    handle = longact.apply(model)
    watch = Watch(handle)
    positions = torch.cat([torch.arange(7), torch.arange(5)])[None]
    model(input_ids=token_ids(1, 12), position_ids=positions)
    assert counted(handle) == [12] * 4
    handle.refresh()
    assert rows_of(handle) == tops(watch.take())


def test_with_a_cache_the_mask_covers_more_than_the_output() -> None:
    model = tiny_model()
    cache = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    handle = longact.apply(model)
    watch = Watch(handle)
    ids, mask = padded("left", 12, 4)  # the second sequence starts after the split
    first = model(input_ids=ids[:, :7], attention_mask=mask[:, :7], use_cache=True)
    past = {cache: first[cache], "use_cache": True}
    model(input_ids=ids[:, 7:], attention_mask=mask, **past)
    assert counted(handle) == [7 + 5 + 4] * 4
    handle.refresh()
    assert rows_of(handle) == tops(watch.take(mask[:, :7], mask[:, 7:]))


def test_a_mask_that_fits_no_output_is_an_error() -> None:
    model, _ = masked()
    with pytest.raises(ValueError, match=r"\[2, 3\].*\[2, 5, 8\].*padding"):
        model(torch.randn(2, 5, 4), attention_mask=torch.ones(2, 3))


def test_padding_may_hold_nan() -> None:
    model, handle = masked()
    x, mask = torch.randn(2, 5, 4), torch.ones(2, 5, dtype=torch.int64)
    mask[1, 3:] = 0
    x[1, 3:] = math.nan
    y = model(x, attention_mask=mask).detach()
    handle.refresh()  # LongActWarning would be an error
    assert rows_of(handle)["q_proj"] == top(magnitude(y[mask == 1].double()))


def test_evaluation_generation_and_no_grad_forwards_do_not_count() -> None:
    model = tiny_model()
    handle = longact.apply(model)
    ids, mask = padded("left", 12, 7)
    model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert model.training  # as trl generates
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    with torch.inference_mode():
        model(input_ids=ids)
    model.eval()
    model(input_ids=ids)
    model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert counted(handle) == [0] * 4
    model.train()
    model(input_ids=ids, attention_mask=mask)
    assert counted(handle) == [19] * 4


def test_training_is_the_same_with_rollouts_and_a_reference_in_between() -> None:
    plain, busy = tiny_model(), tiny_model()
    handles = [longact.apply(m) for m in (plain, busy)]
    optimizers = [adam(m) for m in (plain, busy)]
    train_step(plain, optimizers[0], token_ids(seed=20))
    train_step(busy, optimizers[1], token_ids(seed=20))
    reference = copy.deepcopy(busy).requires_grad_(False)  # stays in training mode
    for i in range(3):
        ids, other = token_ids(seed=i), token_ids(3, 9, seed=i + 10)
        train_step(plain, optimizers[0], ids)

        busy.generate(other, max_new_tokens=2, do_sample=False)
        with torch.no_grad():
            busy(input_ids=other)
            reference(input_ids=other)
        reference(input_ids=other)
        forward_backward(busy, ids)
        busy.eval()
        busy(input_ids=other)
        busy.train()
        reference(input_ids=other)
        optimizers[1].step()
        optimizers[1].zero_grad()
    assert_same_params(busy, plain)
    assert rows_of(handles[0]) == rows_of(handles[1])


def test_a_failed_forward_ends_the_counting() -> None:
    model = tiny_model()
    handle = longact.apply(model)

    def fail(*_: Any) -> None:
        raise MemoryError

    hook = model.model.layers[1].register_forward_pre_hook(fail)
    ids, mask = padded("right", 12, 7)
    with pytest.raises(MemoryError):
        model(input_ids=ids, attention_mask=mask)
    hook.remove()
    before = counted(handle)
    handle.projections[Q0](torch.randn(2, 12, 64))  # not a forward of the model
    assert counted(handle) == before
    handle.refresh()
    model(input_ids=ids)
    assert counted(handle)[2:] == [24, 24]


def test_a_model_is_freed_without_the_garbage_collector() -> None:
    model = tiny_model()
    handle = longact.apply(model)
    forward_backward(model, token_ids())
    weight = weakref.ref(handle.projections[Q0].weight)
    gc.collect()
    gc.disable()
    try:
        del model, handle
        assert weight() is None
    finally:
        gc.enable()


def test_a_model_may_get_its_memory_after_apply() -> None:
    with torch.device("meta"):
        model = Masked()
        longact.apply(model, targets="q_proj", refresh_every="forward")
    model.to_empty(device="cpu")
    model.q_proj.reset_parameters()
    model(torch.randn(5, 4)).sum().backward()
    assert int(model.q_proj.selection.tokens) == 5


def test_data_parallel_copies_of_a_layer_are_refused() -> None:
    model, _ = masked()
    model.q_proj._is_replica = True  # as torch.nn.DataParallel marks its copies
    with pytest.raises(NotImplementedError, match=r"q_proj: .*DistributedDataParallel"):
        model(torch.randn(5, 4))


def test_masks_are_not_kept_alive() -> None:
    model = tiny_model()
    longact.apply(model)
    ids, mask = padded("right", 12, 7)
    model(input_ids=ids, attention_mask=mask)
    alive = weakref.ref(mask)
    del mask
    assert alive() is None


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_under_autocast_totals_are_sums_in_fp32(arch: str) -> None:
    model = tiny_model(arch)
    handle = longact.apply(model)
    watch, optimizer = Watch(handle), adam(model)
    held = None
    for step in range(2):
        before, ids = params_of(model), token_ids(8, 100, seed=step)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        ys = watch.take()
        for name, total in totals(handle).items():
            assert total.dtype == torch.float32
            # A sum of 800 values in bf16 (8 bits) would be off by percents.
            torch.testing.assert_close(total.double(), ys[name].abs().sum(0), rtol=1e-5, atol=0)
            # The outputs were bf16 indeed.
            assert torch.equal(ys[name].bfloat16().double(), ys[name])
        optimizer.step()
        optimizer.zero_grad()
        assert rows_of(handle) == tops(ys)
        held = rows_of(handle) if held is None else held
        assert projection_changes(before, model) == held


# ---- when ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 2, 3, 0])
def test_rows_are_selected_when_the_design_says(every: int) -> None:
    # The first step selects from its own forwards and updates only these rows; later ones update
    # first and select after, every N steps; with 0 never again.
    model = tiny_model("qwen2")
    handle = longact.apply(model, refresh_every=every)
    watch, optimizer = Watch(handle), adam(model)
    held: dict[str, list[int]] | None = None
    since_refresh: list[dict[str, Tensor]] = []
    selections = []
    for step in range(1, 8):
        before = params_of(model)
        ids, mask = padded("right", 12, 5, seed=step)
        forward_backward(model, ids, attention_mask=mask)
        ys = watch.take(mask)
        since_refresh.append(ys)
        for name, layer in handle.projections.items():
            expected = list(range(layer.out_features)) if held is None else held[name]
            assert layer.weight.grad is not None
            assert grad_rows(layer.weight.grad) == expected
        optimizer.step()
        optimizer.zero_grad()
        if held is None:
            held = tops(ys)
            since_refresh = []
        assert projection_changes(before, model) == held
        if every and step % every == 0 and since_refresh:
            held = tops({n: torch.cat([y[n] for y in since_refresh]) for n in QK})
            since_refresh = []
        assert rows_of(handle) == held
        selections.append(held)
    distinct = 1 + sum(a != b for a, b in pairwise(selections))
    # Step 1 selects before and has nothing left to select from after it.
    assert distinct == {0: 1, 1: 7, 2: 4, 3: 3}[every]


def test_calibration_forwards_and_one_refresh() -> None:
    model = tiny_model()
    handle = longact.apply(model, refresh_every=0)
    watch, optimizer = Watch(handle), adam(model)
    for seed in (30, 31):
        model(input_ids=token_ids(seed=seed))
    calibrated = tops(watch.take())
    handle.refresh()
    assert rows_of(handle) == calibrated
    start = params_of(model)
    for seed in range(4):
        train_step(model, optimizer, token_ids(seed=seed))
        assert rows_of(handle) == calibrated
    assert tops(watch.take()) != calibrated  # training data alone would have chosen otherwise
    assert projection_changes(start, model) == calibrated
    model(input_ids=token_ids(seed=77))
    handle.refresh()
    assert rows_of(handle) != calibrated  # asked for again, it selects again


def test_an_explicit_refresh_counts_afresh_and_keeps_rows_without_data() -> None:
    model = tiny_model()
    handle = longact.apply(model, refresh_every=0)
    handle.refresh()
    assert handle.rows == dict.fromkeys(QK)
    model(input_ids=token_ids())
    handle.refresh()
    rows = handle.rows
    handle.refresh()
    assert all(handle.rows[name] is rows[name] for name in QK)


@pytest.mark.parametrize("every", [1, 3])
def test_micro_batches_count_as_one_batch_and_share_their_rows(every: int) -> None:
    whole, parts = tiny_model(), tiny_model()
    handles = [longact.apply(m, refresh_every=every) for m in (whole, parts)]
    optimizers = [adam(m, lr=1e-3) for m in (whole, parts)]
    for step in range(5):
        ids = token_ids(4, 12, seed=step)
        forward_backward(whole, ids)
        held = handles[1].rows
        for part in ids.chunk(2):
            forward_backward(parts, part, scale=0.5)
            assert all(handles[1].rows[name] is held[name] for name in QK)
        for layer, other in zip(*(h.projections.values() for h in handles), strict=True):
            assert layer.weight.grad is not None
            torch.testing.assert_close(layer.weight.grad, other.weight.grad, rtol=1e-3, atol=1e-5)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert rows_of(handles[0]) == rows_of(handles[1])
        parts.load_state_dict(whole.state_dict())  # so that rounding does not build up
    assert counted(handles[0]) == counted(handles[1])


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_activation_checkpointing_changes_no_bit(
    arch: str, reentrant: bool, micro_batches: int
) -> None:
    checkpointed, plain = tiny_model(arch), tiny_model(arch)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    handles = [longact.apply(m, refresh_every=2) for m in (checkpointed, plain)]
    optimizers = [adam(m) for m in (checkpointed, plain)]
    calls: list[str] = []
    for handle in handles:
        handle.projections[K1].register_forward_hook(lambda *_: calls.append(""))
    for step in range(4):
        for i in range(micro_batches):
            ids, mask = padded("left", 12, 7, seed=10 * step + i)
            losses = [forward_backward(m, ids, attention_mask=mask) for m in (checkpointed, plain)]
            assert losses[0] == losses[1]
        assert counted(handles[0]) == counted(handles[1])
        assert all(map(torch.equal, *(totals(h).values() for h in handles)))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert rows_of(handles[0]) == rows_of(handles[1])
    assert len(calls) == 4 * micro_batches * 3  # the forward did run twice
    assert_same_params(checkpointed, plain)


def test_a_step_without_counted_tokens_keeps_the_rows() -> None:
    model = tiny_model()
    handle = longact.apply(model)
    optimizer = adam(model)
    ids = token_ids()
    before = params_of(model)
    model.eval()  # and before the first selection all rows train, which is told once
    with pytest.warns(longact.LongActWarning, match=f"{Q0}: nothing was counted") as warned:
        train_step(model, optimizer, ids)
    assert len(warned) == 1
    train_step(model, optimizer, ids)
    assert handle.rows == dict.fromkeys(QK)
    assert projection_changes(before, model)[K1] == list(range(32))
    model.train()
    train_step(model, optimizer, ids)
    rows, before = handle.rows, params_of(model)
    model.eval()
    train_step(model, optimizer, token_ids(seed=1))
    assert all(handle.rows[name] is rows[name] for name in QK)
    assert projection_changes(before, model) == rows_of(handle)
    model.train()
    loss = model(input_ids=ids, attention_mask=torch.zeros_like(ids)).logits.square().mean()
    loss.backward()
    optimizer.step()
    assert all(handle.rows[name] is rows[name] for name in QK)


def test_nothing_counted_by_any_forward_is_told() -> None:
    """Of layers that are called past the model's own forward."""
    model = tiny_model()
    handle = longact.apply(model, refresh_every="forward")
    hidden = torch.randn(2, 5, model.config.hidden_size)
    model.get_submodule(Q0)(hidden).square().mean().backward()
    with pytest.warns(longact.LongActWarning, match=f"{Q0}: nothing was counted"):
        adam(model).step()
    assert handle.rows[Q0] is None


def test_an_unchanged_selection_keeps_its_tensor() -> None:
    # For a new tensor the optimizer would rebuild its table of pointers and its compact moments.
    model = tiny_model()
    handle = longact.apply(model)
    optimizer = adam(model, lr=0.0)
    for _ in range(2):
        train_step(model, optimizer, token_ids())
    rows = handle.rows
    train_step(model, optimizer, token_ids())
    assert all(handle.rows[name] is rows[name] for name in QK)


@pytest.mark.parametrize("every", [1, 2])
def test_projections_may_be_split_over_two_optimizers(every: int) -> None:
    one, two = tiny_model("qwen2"), tiny_model("qwen2")
    handles = [longact.apply(m, refresh_every=every) for m in (one, two)]
    single = adam(one)
    named = list(two.named_parameters())
    queries = [p for name, p in named if "q_proj" in name]
    rest = [p for name, p in named if "q_proj" not in name]
    split = [longact.FusedMaskedAdam(ps, lr=1e-2, weight_decay=0.1) for ps in (queries, rest)]
    for step in range(4):
        ids = token_ids(seed=step)
        train_step(one, single, ids)
        forward_backward(two, ids)
        for optimizer in split:
            optimizer.step()
        two.zero_grad()
        assert rows_of(handles[0]) == rows_of(handles[1])
    assert_same_params(two, one)


def test_weight_and_bias_share_rows_and_ages() -> None:
    model = tiny_model("qwen2")
    handle = longact.apply(model)
    optimizer = adam(model)
    for step in range(3):
        before = params_of(model)
        train_step(model, optimizer, token_ids(seed=step))
        after = params_of(model)
        for name, layer in handle.projections.items():
            assert longact.get_rows(layer.weight) is layer.rows
            assert longact.get_rows(layer.bias) is layer.rows
            changed = [
                changed_rows(before[f"{name}.{k}"], after[f"{name}.{k}"])
                for k in ("weight", "bias")
            ]
            assert changed[0] == changed[1] != []
            ages = [optimizer.state[p]["ages"].tolist() for p in (layer.weight, layer.bias)]
            assert ages[0] == ages[1]
            assert sum(ages[0]) == (step + 1) * len(changed[0])


@pytest.mark.parametrize("every", [1, 2, "forward"])
def test_a_step_that_the_grad_scaler_skips_changes_nothing(every: Any) -> None:
    model = tiny_model("qwen2")
    handle = longact.apply(model, refresh_every=every)
    optimizer = adam(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)

    def step(seed: int, spoil: bool) -> None:
        ids = token_ids(seed=seed)
        scaler.scale(model(input_ids=ids, labels=ids).loss).backward()
        if spoil:
            model.lm_head.weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    before = params_of(model)
    step(0, spoil=True)
    assert handle.rows == dict.fromkeys(QK)
    assert_same_params(model, before)
    assert not optimizer.state
    assert scaler.get_scale() == 32.0

    step(1, spoil=False)
    before, rows = params_of(model), handle.rows
    steps = [layer.selection.steps for layer in handle.projections.values()]
    state = copy.deepcopy(optimizer.state_dict()["state"])
    step(2, spoil=True)
    assert all(handle.rows[name] is rows[name] for name in QK)
    assert [layer.selection.steps for layer in handle.projections.values()] == steps
    assert_same_params(model, before)
    for key, entry in optimizer.state_dict()["state"].items():
        assert all(torch.equal(entry[k], state[key][k]) for k in entry)

    step(3, spoil=False)
    if every == 1:
        assert projection_changes(before, model) == {n: r.tolist() for n, r in rows.items()}


# ---- refresh_every="forward" ---------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["layer", "head"])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_each_forward_selects_for_its_own_backward(arch: str, metric: Any, scope: Any) -> None:
    model = tiny_model(arch)
    handle = longact.apply(model, refresh_every="forward", metric=metric, scope=scope)
    watch, optimizer = Watch(handle), adam(model)

    def select(ys: dict[str, Tensor]) -> dict[str, list[int]]:
        if scope == "layer":
            return tops(ys, metric)
        return {n: top_by_head(magnitude(y, metric)) for n, y in ys.items()}

    for step in range(3):
        union: dict[str, set[int]] = {name: set() for name in QK}
        selected, losses = [], []
        for i in range(2):
            ids, mask = padded("right", 12, 6, seed=10 * step + i)
            losses.append(model(input_ids=ids, attention_mask=mask, labels=ids).loss)
            selected.append(select(watch.take(mask)))
            for name in QK:
                union[name] |= set(selected[-1][name])
        assert selected[0] != selected[1]
        for i in (1, 0):  # backwards in another order than the forwards: each knows its own rows
            before = {n: p.weight.grad for n, p in handle.projections.items()}
            before = {n: None if g is None else g.clone() for n, g in before.items()}
            losses[i].backward()
            for name, layer in handle.projections.items():
                grad = layer.weight.grad
                assert grad is not None
                own = grad if before[name] is None else grad - before[name]
                assert grad_rows(own) == selected[i][name]
                if layer.bias is not None:
                    assert layer.bias.grad is not None
                    assert set(grad_rows(layer.bias.grad)) <= union[name]
        params = params_of(model)
        optimizer.step()
        optimizer.zero_grad()
        assert projection_changes(params, model) == {n: sorted(union[n]) for n in QK}
        assert rows_of(handle) == {n: sorted(union[n]) for n in QK}


def test_a_forwards_gradient_is_the_dense_one_on_its_rows() -> None:
    model, plain = tiny_model("qwen2"), tiny_model("qwen2")
    handle = longact.apply(model, refresh_every="forward")
    ids, mask = padded("left", 12, 6)
    forward_backward(model, ids, attention_mask=mask)
    forward_backward(plain, ids, attention_mask=mask)
    for name, param in plain.named_parameters():
        grad = dict(model.named_parameters())[name].grad
        expected = param.grad
        if any(name.startswith(projection) for projection in QK):
            union = handle.projections[name.rpartition(".")[0]].selection.union
            assert union is not None
            expected = torch.where(
                union.view(-1, *[1] * (param.dim() - 1)), expected, torch.zeros(())
            )
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_forward_selection_with_non_reentrant_checkpointing(arch: str) -> None:
    checkpointed, plain = tiny_model(arch), tiny_model(arch)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    handles = [longact.apply(m, refresh_every="forward") for m in (checkpointed, plain)]
    optimizers = [adam(m) for m in (checkpointed, plain)]
    for step in range(3):
        for i in range(2):
            ids, mask = padded("left", 12, 7, seed=10 * step + i)
            for model in (checkpointed, plain):
                forward_backward(model, ids, attention_mask=mask)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert rows_of(handles[0]) == rows_of(handles[1])
    assert_same_params(checkpointed, plain)


def test_forward_selection_refuses_reentrant_checkpointing() -> None:
    model = tiny_model()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    longact.apply(model, refresh_every="forward")
    with pytest.raises(NotImplementedError, match=rf"{Q0}.*use_reentrant': False"):
        forward_backward(model, token_ids())


def test_a_skipped_steps_forwards_do_not_join_the_next_union() -> None:
    model = tiny_model()
    handle = longact.apply(model, refresh_every="forward")
    watch, optimizer = Watch(handle), adam(model)
    forward_backward(model, token_ids(seed=1))
    skipped = tops(watch.take())
    optimizer.found_inf = torch.tensor(1.0)  # as GradScaler sets it
    optimizer.step()
    optimizer.zero_grad()
    del optimizer.found_inf
    before = params_of(model)
    train_step(model, optimizer, token_ids(seed=2))
    own = tops(watch.take())
    assert skipped != own
    assert projection_changes(before, model) == own


def test_a_forward_without_counted_tokens_keeps_the_rows() -> None:
    model = tiny_model()
    handle = longact.apply(model, refresh_every="forward")
    optimizer = adam(model)
    ids = token_ids()
    train_step(model, optimizer, ids)
    rows = rows_of(handle)
    output = model(input_ids=ids, attention_mask=torch.zeros_like(ids)).logits
    output.square().mean().backward()
    optimizer.step()
    assert rows_of(handle) == rows


# ---- scopes and ties -----------------------------------------------------------------------------


def top_by_head(values: Tensor, keep: float = 0.3) -> list[int]:
    heads = values.view(-1, 16)
    return [16 * h + row for h in range(heads.shape[0]) for row in top(heads[h], keep)]


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma"])
@pytest.mark.parametrize("metric", METRICS)
def test_scope_head_ranks_inside_each_head(arch: str, metric: Any) -> None:
    model = tiny_model(arch)
    handle = longact.apply(model, scope="head", metric=metric)
    watch = Watch(handle)
    train_step(model, adam(model), token_ids())
    ys = watch.take()
    rows = rows_of(handle)
    assert rows == {name: top_by_head(magnitude(ys[name], metric)) for name in QK}
    assert [len(r or ()) for r in rows.values()] == [4 * 5, 2 * 5, 4 * 5, 2 * 5]
    assert rows != tops(ys, metric)


@pytest.mark.parametrize("metric", METRICS)
def test_scope_model_ranks_over_all_projections_of_a_kind(metric: Any) -> None:
    model = tiny_model()
    with torch.no_grad():  # the second layer's queries count double: it gets most of the rows
        model.get_submodule(Q1).weight.mul_(2)
        model.get_submodule(K0).weight.mul_(1.2)
    handle = longact.apply(model, scope="model", metric=metric)
    watch, optimizer = Watch(handle), adam(model)
    before = params_of(model)
    train_step(model, optimizer, token_ids())
    ys = watch.take()
    expected = {}
    for first, second, n in ((Q0, Q1, 64), (K0, K1, 32)):
        together = top(torch.cat([magnitude(ys[name], metric) for name in (first, second)]))
        expected[first] = [row for row in together if row < n]
        expected[second] = [row - n for row in together if row >= n]
    assert rows_of(handle) == expected
    assert len(expected[Q0]) + len(expected[Q1]) == 38
    assert len(expected[Q0]) < len(expected[Q1])
    assert projection_changes(before, model) == expected  # also where a projection has no row
    train_step(model, optimizer, token_ids(seed=1))


def test_scope_model_may_leave_a_projection_without_rows() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.get_submodule(Q0).weight.mul_(100)
    handle = longact.apply(model, 0.1, scope="model")
    optimizer = adam(model)
    before = params_of(model)
    for i in range(2):
        train_step(model, optimizer, token_ids(seed=i))
    assert rows_of(handle)[Q1] == []
    assert projection_changes(before, model)[Q1] == []


@pytest.mark.parametrize(
    ("scope", "every"),
    [("layer", 1), ("head", 1), ("model", 1), ("layer", "forward"), ("head", "forward")],
)
def test_ties_go_to_the_lower_index(scope: Any, every: Any) -> None:
    model = tiny_model()
    for name in QK:
        weight = model.get_submodule(name).weight
        with torch.no_grad():  # one factor each, so that equal channels are equal to the last bit
            weight.zero_()
            weight[:, 0] = 0.5
            weight[[9, 30], 0] = 1.0
    handle = longact.apply(model, scope=scope, refresh_every=every)
    optimizer = adam(model, lr=0.0)
    for i in range(2):
        train_step(model, optimizer, token_ids(seed=i))
    rows = rows_of(handle)
    if scope == "layer":  # 19 of 64, 10 of 32
        q0 = q1 = [*range(18), 30]
        k0 = k1 = [*range(8), 9, 30]
    elif scope == "head":
        q0 = q1 = [0, 1, 2, 3, 9, 16, 17, 18, 19, 30, *range(32, 37), *range(48, 53)]
        k0 = k1 = q0[:10]
    else:  # 38 of 128, 19 of 64: the rest is the beginning of the first layer
        q0, q1 = [*range(36)], [9, 30]
        k0, k1 = [*range(16), 30], [9, 30]
    assert rows == {Q0: q0, K0: k0, Q1: q1, K1: k1}


# ---- non-finite activations ----------------------------------------------------------------------


@pytest.fixture
def spoiled_k1() -> Iterator[Callable[[nn.Module, float], None]]:
    """A forward whose last key projection has one non-finite channel."""

    def forward(model: nn.Module, value: float) -> None:
        weight = model.get_submodule(K1).weight
        kept = weight.detach().clone()
        with torch.no_grad():
            weight[3, 0] = value
            with torch.enable_grad():
                model(input_ids=token_ids(seed=40))
            weight.copy_(kept)

    return forward


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("scope", ["layer", "head", "model"])
def test_non_finite_activations_keep_the_previous_rows(
    spoiled_k1: Callable[[nn.Module, float], None], value: float, metric: Any, scope: Any
) -> None:
    model = tiny_model()
    handle = longact.apply(model, metric=metric, scope=scope)
    watch = Watch(handle)
    train_step(model, adam(model), token_ids())
    previous = handle.rows
    spoiled_k1(model, value)
    with pytest.warns(longact.LongActWarning, match=K1) as warned:
        handle.refresh()
    assert len(warned) == 1
    kept = {K0, K1} if scope == "model" else {K1}
    for name in QK:
        assert (handle.rows[name] is previous[name]) == (name in kept)
    assert counted(handle) == [0] * 4
    assert not any(total.any() for total in totals(handle).values())

    # Counting starts afresh: nothing of the bad forward is left, and rows are chosen again.
    watch.take()
    model(input_ids=token_ids(seed=41))
    handle.refresh()
    ys = watch.take()
    if scope == "layer":
        assert rows_of(handle) == tops(ys, metric)
    assert handle.rows[K1] is not previous[K1]
    spoiled_k1(model, value)
    handle.refresh()  # warns once only: a second LongActWarning would be an error here


def test_non_finite_at_the_first_selection_trains_all_rows(
    spoiled_k1: Callable[[nn.Module, float], None],
) -> None:
    model = tiny_model()
    handle = longact.apply(model)
    spoiled_k1(model, math.nan)
    forward_backward(model, token_ids())
    before = params_of(model)
    with pytest.warns(longact.LongActWarning, match=K1):
        adam(model).step()
    assert handle.rows[K1] is None
    assert projection_changes(before, model)[K1] == list(range(32))
    assert len(projection_changes(before, model)[K0]) == 10


@pytest.mark.parametrize("metric", METRICS)
def test_non_finite_in_forward_selection_keeps_the_previous_rows(metric: Any) -> None:
    model, handle = masked(refresh_every="forward", metric=metric)
    optimizer = longact.FusedMaskedAdam(model.parameters(), lr=0.0)
    model(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    rows = rows_of(handle)
    x = torch.randn(5, 4)
    x[2, 1] = math.inf
    with pytest.warns(longact.LongActWarning, match="q_proj") as warned:
        model(x)
    assert len(warned) == 1
    model(x)  # warns once
    optimizer.step()
    assert rows_of(handle) == rows


# ---- nothing waits for a GPU: the same choice, made there ----------------------------------------


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU taken for a device that must not be waited for."""
    monkeypatch.setattr(longact.selection, "_is_remote", lambda tensor: True)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scope", ["layer", "head", "model"])
def test_a_remote_refresh_chooses_what_a_local_one_does(
    monkeypatch: pytest.MonkeyPatch, metric: Any, scope: Any
) -> None:
    results = []
    for is_remote in (False, True):
        monkeypatch.setattr(longact.selection, "_is_remote", lambda tensor, r=is_remote: r)
        model = tiny_model()
        handle = longact.apply(model, metric=metric, scope=scope)
        optimizer = adam(model)
        rows = []
        for seed in range(4):
            train_step(model, optimizer, token_ids(seed=seed))
            rows.append(rows_of(handle))
            assert counted(handle) == [0] * 4
        assert all(layer.rows.dtype == torch.int32 for layer in handle.projections.values())
        results.append((rows, params_of(model)))
    assert results[0][0] == results[1][0]
    assert any(first != last for first, last in zip(results[0][0], results[0][0][1:], strict=False))
    for name, param in results[0][1].items():
        assert torch.equal(param, results[1][1][name])


@pytest.mark.usefixtures("remote")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_remote_refresh_keeps_rows_and_warns_later(
    spoiled_k1: Callable[[nn.Module, float], None], value: float
) -> None:
    model = tiny_model()
    handle = longact.apply(model)
    optimizer = adam(model, lr=0.0)
    train_step(model, optimizer, token_ids())
    previous = rows_of(handle)
    spoiled_k1(model, value)
    with torch.no_grad():
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
    optimizer.step()  # does not know of it yet
    assert rows_of(handle)[K1] == previous[K1]
    assert counted(handle) == [0] * 4
    with pytest.warns(longact.LongActWarning, match=K1) as warned:
        train_step(model, optimizer, token_ids(seed=5))
    assert len(warned) == 1
    train_step(model, optimizer, token_ids(seed=6))  # warns once
    assert rows_of(handle)[K1] != previous[K1]


def test_a_report_that_arrives_late_is_not_lost() -> None:
    """The host may be several refreshes ahead of the GPU."""

    class Arrival:
        here = False

        def query(self) -> bool:
            return self.here

    selections = [longact.selection.Selection(name=name) for name in "ab"]
    report = longact.selection._Report(selections, torch.zeros(2, dtype=torch.int32))
    report.add(torch.tensor([0, 0], dtype=torch.int32))
    report._arrival = arrival = Arrival()  # type: ignore[assignment]
    report.add(torch.tensor([0, 2], dtype=torch.int32))
    report.add(torch.tensor([0, 0], dtype=torch.int32))
    arrival.here = True
    report.add(torch.tensor([1, 0], dtype=torch.int32))  # what it hears of is all right; sends more
    with pytest.warns(longact.LongActWarning, match=r"^b: non-finite") as warned:
        report.add(torch.tensor([0, 0], dtype=torch.int32))
    assert len(warned) == 1


@pytest.mark.usefixtures("remote")
def test_a_remote_forward_selection_warns_at_the_step() -> None:
    model, handle = masked(refresh_every="forward")
    optimizer = longact.FusedMaskedAdam(model.parameters(), lr=0.0)
    x = torch.randn(5, 4)
    model(x).sum().backward()
    optimizer.step()
    rows = rows_of(handle)
    x[2, 1] = math.inf
    model(x)
    with pytest.warns(longact.LongActWarning, match="q_proj") as warned:
        optimizer.step()
    assert len(warned) == 1
    assert rows_of(handle) == rows
    assert counted(handle) == [0]
    model(torch.randn(5, 4))
    optimizer.step()  # forgotten by then


@pytest.mark.usefixtures("remote")
def test_a_remote_refresh_without_tokens_keeps_rows_in_silence() -> None:
    model = tiny_model()
    handle = longact.apply(model)
    optimizer = adam(model, lr=0.0)
    train_step(model, optimizer, token_ids())
    previous = rows_of(handle)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)  # without gradients it is no step
    for _ in range(3):  # a warning would be an error here
        optimizer.step()
    assert rows_of(handle) == previous
    longact.set_rows(model.get_submodule(K1).weight, [0, 7])  # another number of rows
    optimizer.step()
    assert rows_of(handle)[K1] == [0, 7]
    train_step(model, optimizer, token_ids(seed=5))
    assert len(rows_of(handle)[K1]) == len(previous[K1])


# ---- captured into a graph: what replays find must stay where it is ------------------------------


class OnGpu:
    """As much of a parameter on a GPU as a selection asks for."""

    is_cuda, device, shape = True, torch.device("cpu"), (8, 4)


def test_a_captured_backward_reads_its_rows_from_the_buffer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, _ = masked()
    selection, param = model.q_proj.selection, OnGpu()
    monkeypatch.setattr(longact.selection, "is_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"q_proj: .* capturable=True and train two steps"):
        selection.rows_now(param)  # a dense gradient would be replayed for ever
    longact.set_rows(model.q_proj.weight, [1, 4])
    with pytest.raises(RuntimeError, match="capturable=True"):
        selection.rows_now(param)
    selection.buffer_for(param)
    rows = selection.rows_now(param)
    assert rows.tolist() == [1, 4]
    longact.set_rows(model.q_proj.weight, [0, 7])
    assert rows.tolist() == [0, 7]
    with pytest.warns(longact.LongActWarning, match="gradient of 2 rows, and now there are 3"):
        longact.set_rows(model.q_proj.weight, [0, 1, 2])
    longact.set_rows(model.q_proj.weight, [0])  # says so once for each capture


def test_a_captured_step_wants_as_many_rows_as_it_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    for every in (0, 1):
        model, _ = masked(refresh_every=every)
        monkeypatch.setattr(longact.selection, "is_capturing", lambda: True)
        longact.set_rows(model.q_proj.weight, [1])  # and 2 of 8 are chosen
        if every == 0:
            longact.selection.before_step([model.q_proj.selection])
        else:
            with pytest.raises(RuntimeError, match=r"1 rows were set by hand, .* chooses 2"):
                longact.selection.before_step([model.q_proj.selection])


@pytest.mark.parametrize("every", [1, "forward"])
def test_what_is_counted_stays_in_its_place(every: Any) -> None:
    model, handle = masked(refresh_every=every)
    optimizer = longact.FusedMaskedAdam(model.parameters())
    selection = model.q_proj.selection

    def places() -> list[int]:
        names = ("magnitude", "tokens", "union", "spoiled", "forward_rows")
        return [getattr(selection, name).data_ptr() for name in names]

    before = places()
    for _ in range(3):
        model(torch.randn(5, 4)).sum().backward()
        optimizer.step()
    model(torch.randn(5, 4))
    handle.load_state_dict(copy.deepcopy(handle.state_dict()))
    assert places() == before
    assert not selection.union.any()  # forwards before it do not join the next step


# ---- corners that mutants found open -------------------------------------------------------------


def test_a_copy_is_in_no_captured_graph() -> None:
    model, _ = masked()
    longact.set_rows(model.q_proj.weight, [1, 4])
    selection = model.q_proj.selection
    selection.buffer_for(OnGpu())
    selection.captured = 2
    selection.report = longact.selection._Report([selection], torch.zeros(1, dtype=torch.int32))
    twin = copy.deepcopy(model)
    assert twin.q_proj.selection.buffer is None
    assert twin.q_proj.selection.report is None
    longact.set_rows(twin.q_proj.weight, [0])  # and no warning
    assert selection.captured == 2


def test_the_buffer_holds_the_number_of_rows_and_the_rows() -> None:
    param = nn.Parameter(torch.zeros(8, 4))
    longact.set_rows(param, [1, 4])
    selection = longact.selection.selection_of(param)
    buffer = selection.buffer_for(param)
    assert buffer[:3].tolist() == [2, 1, 4]
    longact.set_rows(param, [7])
    assert selection.buffer_for(param) is buffer
    assert buffer[:2].tolist() == [1, 7]
    longact.set_rows(param, None)
    assert buffer.tolist() == [8, *range(8)]
    wider = selection.buffer_for(torch.zeros(9, 4))  # another parameter took its place
    assert wider.tolist() == [9, *range(9)]


def test_a_captured_backward_warns_where_all_rows_are_set() -> None:
    model, _ = masked()
    longact.set_rows(model.q_proj.weight, [1, 4])
    model.q_proj.selection.captured = 2
    with pytest.warns(longact.LongActWarning, match="gradient of 2 rows, and now there are all"):
        longact.set_rows(model.q_proj.weight, None)


def test_a_captured_forward_selection_needs_no_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = masked(refresh_every="forward")
    monkeypatch.setattr(longact.selection, "is_capturing", lambda: True)
    assert model.q_proj.selection.rows_now(OnGpu()) is None


@pytest.mark.usefixtures("remote")
def test_a_spoiled_forward_before_a_good_one_warns_too() -> None:
    model, _ = masked(refresh_every="forward")
    optimizer = longact.FusedMaskedAdam(model.parameters(), lr=0.0)
    model(torch.full((5, 4), math.inf))
    model(torch.randn(5, 4)).sum().backward()
    with pytest.warns(longact.LongActWarning, match="q_proj"):
        optimizer.step()


def test_a_forward_that_cannot_choose_takes_nothing_from_the_union() -> None:
    model, handle = masked(20, refresh_every="forward")
    optimizer = longact.FusedMaskedAdam(model.parameters(), lr=0.0)
    x, ones = torch.randn(1, 5, 4), torch.ones(1, 5)
    model(x, attention_mask=ones).sum().backward()
    optimizer.step()
    before = rows_of(handle)
    model(-7 * x.flip(2), attention_mask=ones)
    own = model.q_proj.selection.forward_rows.tolist()
    model(x, attention_mask=0 * ones)
    optimizer.step()
    assert rows_of(handle)["q_proj"] == own != before["q_proj"]


def test_a_first_forward_that_cannot_choose_takes_the_first_channels_of_each_head() -> None:
    model = tiny_model(num_hidden_layers=1)
    handle = longact.apply(model, 0.25, scope="head", refresh_every="forward")
    for layer in handle.projections.values():
        dim, size = model.config.head_dim, layer.out_features
        k = layer.selection.config.count(dim)
        expected = [c for c in range(size) if c % dim < k]
        assert layer.selection.forward_rows.tolist() == expected


def test_all_that_is_counted_moves_together() -> None:
    model, _ = masked(refresh_every="forward")
    selection = model.q_proj.selection
    selection.counters(torch.device("meta"))
    names = ("magnitude", "tokens", "union", "spoiled", "forward_rows")
    assert all(getattr(selection, name).is_meta for name in names)


def test_a_loaded_state_brings_the_rows_that_forwards_fall_back_on() -> None:
    x, ones = torch.randn(1, 5, 4), torch.ones(1, 5)
    for forwards in (1, 2):
        model, handle = masked(20, refresh_every="forward")
        optimizer = longact.FusedMaskedAdam(model.parameters(), lr=0.0)
        for shift in (1, 2)[:forwards]:
            model(x.roll(shift, 2), attention_mask=ones).sum().backward()
        optimizer.step()
        twin, twin_handle = masked(20, refresh_every="forward")
        start = twin.q_proj.selection.forward_rows.tolist()
        twin_handle.load_state_dict(handle.state_dict())
        twin(x, attention_mask=0 * ones)
        last, rows = twin.q_proj.selection.forward_rows.tolist(), rows_of(handle)["q_proj"]
        if forwards == 1:
            assert last == rows != start
        else:  # the union of two is of another size
            assert len(rows) > len(last)
            assert last == start


def test_a_capture_makes_no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """And decides nothing for later."""
    backends = sys.modules["longact.backends"]  # longact.backends is the function
    device = torch.device("cuda", 7)
    monkeypatch.setattr(backends, "is_capturing", lambda: True)
    monkeypatch.setattr(backends, "_has_triton", False)
    monkeypatch.setattr(backends, "_triton_errors", {})
    assert backends.triton_error(device) is None
    monkeypatch.setattr(backends, "is_capturing", lambda: False)
    assert backends.triton_error(device) == "Triton is not installed"


class TwoLengths(nn.Module):
    """k sees the last tokens only."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(4, 8), nn.Linear(4, 8)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.q_proj(x).sum() + self.k_proj(x[:, -2:]).sum()


def test_outputs_of_several_lengths_have_masks_of_their_own() -> None:
    model = TwoLengths()
    handle = longact.apply(model, targets=["q_proj", "k_proj"])
    mask = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 1]])
    model(torch.randn(2, 4, 4), attention_mask=mask)
    assert [int(p.selection.tokens) for p in handle.projections.values()] == [4, 3]


def test_outputs_on_several_devices_have_masks_of_their_own() -> None:
    counted = longact.nn.CountedForward(None)
    counted.mask = torch.ones(2, 3)
    for device in ("cpu", "meta"):
        mask = counted.token_mask(torch.empty(2, 3, 4, device=device))
        assert mask is not None
        assert mask.device.type == device


def test_a_loaded_state_forgets_what_forwards_spoiled() -> None:
    model, handle = masked(refresh_every="forward")
    selection = model.q_proj.selection
    selection.union.fill_(True)
    selection.spoiled.fill_(True)
    handle.load_state_dict(handle.state_dict())
    assert not selection.union.any()
    assert not selection.spoiled


@pytest.mark.parametrize("needs_input", [False, True])
def test_the_weight_is_saved_only_for_the_inputs_gradient(needs_input: bool) -> None:
    layer = longact.nn.SalientLinear(4, 8)
    longact.set_rows(layer.weight, [1, 3])
    saved: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.shape) or t, lambda t: t
    ):
        layer(torch.randn(5, 4, requires_grad=needs_input))
    assert ((8, 4) in saved) == needs_input


def test_a_state_of_another_dtype_is_refused() -> None:
    handle = longact.apply(tiny_model())
    for change in (
        {"magnitude": torch.zeros(32).double()},
        {"tokens": torch.tensor(1, dtype=torch.int32)},
    ):
        state = copy.deepcopy(handle.state_dict())
        state["projections"][K1].update(change)
        with pytest.raises(ValueError, match=K1):
            handle.load_state_dict(state)


def counting(**options: Any) -> longact.selection.Selection:
    """A selection that has counted five tokens."""
    model, _ = masked(20, **options)
    model(torch.randn(5, 4, generator=torch.Generator().manual_seed(1)))
    return model.q_proj.selection


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_selections_of_several_kinds_are_chosen_as_if_alone(scope: Any) -> None:
    def rows(together: bool) -> list[list[int]]:
        selections = [
            counting(keep_ratio=ratio, metric=metric, scope=scope)
            for ratio in (0.1, 0.5)
            for metric in ("max_abs", "mean_abs", "rms")
        ]
        for some in [selections] if together else [[s] for s in selections]:
            longact.selection.refresh(some)
        return [s.rows.tolist() for s in selections]

    alone = rows(together=False)
    assert rows(together=True) == alone
    assert len({tuple(r) for r in alone[3:]}) == 3


def test_scope_model_counts_the_channels_that_it_ranks() -> None:
    counted, not_counted = counting(scope="model"), masked(20, scope="model")[0].q_proj.selection
    longact.selection.refresh([counted, not_counted])
    assert len(counted.rows) == 6
    assert not_counted.rows is None


@pytest.mark.usefixtures("remote")
def test_a_remote_refresh_that_waits_warns_at_once() -> None:
    model, handle = masked()
    longact.set_rows(model.q_proj.weight, [0, 1])
    model(torch.full((5, 4), math.nan))
    with pytest.warns(longact.LongActWarning, match="q_proj"):
        handle.refresh()


@pytest.mark.usefixtures("remote")
def test_a_remote_refresh_of_others_has_a_report_of_its_own() -> None:
    a, b, c = selections = [counting() for _ in range(3)]
    longact.selection.refresh(selections)
    for selection, name in zip(selections, "abc", strict=True):
        selection.name = name
    longact.selection.refresh([a, b], wait=False)
    longact.selection.refresh([a], wait=False)
    longact.selection.refresh([a, b], wait=False)
    c.tokens.fill_(1)
    c.magnitude.fill_(math.nan)
    longact.selection.refresh([a, c], wait=False)
    with pytest.warns(longact.LongActWarning, match=r"^c: "):
        longact.selection.refresh([a, c], wait=False)


@pytest.mark.usefixtures("remote")
def test_a_captured_refresh_reports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    selection = counting()
    longact.selection.refresh([selection])
    monkeypatch.setattr(longact.selection, "is_capturing", lambda: True)
    longact.selection.refresh([selection], wait=False)
    assert selection.report is None


def test_a_step_without_a_forward_keeps_the_rows() -> None:
    model, handle = masked(refresh_every="forward")
    optimizer = longact.FusedMaskedAdam(model.parameters(), lr=0.0)
    model(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    rows = rows_of(handle)
    optimizer.step()
    assert rows_of(handle) == rows
    assert len(rows["q_proj"]) > 0


def test_a_captured_step_counts_the_rows_of_all_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = longact.apply(tiny_model(num_hidden_layers=1), 0.25, scope="head")
    selections = [layer.selection for layer in handle.projections.values()]
    handle._model(input_ids=token_ids())
    handle.refresh()
    monkeypatch.setattr(longact.selection, "is_capturing", lambda: True)
    longact.selection.before_step(selections)


def test_ranks_add_up_sums_and_take_the_largest_maximum(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, list[int]]] = []

    def over_ranks(tensors: list[Tensor], op: Any) -> list[Tensor]:
        seen.append((op, [t.data_ptr() for t in tensors]))
        return tensors

    monkeypatch.setattr(longact.selection, "over_ranks", over_ranks)
    by_metric = {metric: counting(metric=metric) for metric in METRICS}
    longact.selection.refresh(by_metric.values())
    places = {m: [s.magnitude.data_ptr(), s.tokens.data_ptr()] for m, s in by_metric.items()}
    ops = torch.distributed.ReduceOp
    assert seen == [
        (ops.SUM, places["mean_abs"] + places["rms"]), (ops.MAX, places["max_abs"])
    ]  # fmt: skip


# ---- torch.compile -------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, "forward"])
def test_a_compiled_projection_selects_as_eager(every: Any) -> None:
    compiled_model, eager_model = masked(16, refresh_every=every), masked(16, refresh_every=every)
    torch._dynamo.reset()
    run = torch.compile(compiled_model[0], fullgraph=True, backend="aot_eager")
    optimizers = [adam(model) for model, _ in (compiled_model, eager_model)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        x = torch.randn(2, 6, 4, generator=generator)
        mask = torch.ones(2, 6)
        mask[0, :2] = 0
        for model, optimizer in zip((run, eager_model[0]), optimizers, strict=True):
            model(x, attention_mask=mask).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert rows_of(compiled_model[1]) == rows_of(eager_model[1])
    for p, q in zip(compiled_model[0].parameters(), eager_model[0].parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_compiled_and_checkpointed_forward_selection() -> None:
    compiled_model, eager = (tiny_model(num_hidden_layers=1) for _ in range(2))
    torch._dynamo.reset()
    handles = [longact.apply(m, refresh_every="forward") for m in (compiled_model, eager)]
    compiled_model.gradient_checkpointing_enable({"use_reentrant": False})
    compiled = torch.compile(compiled_model, fullgraph=True, backend="aot_eager")
    optimizers = [adam(m, lr=1e-3) for m in (compiled_model, eager)]
    for step in range(2):
        ids, mask = padded("left", 12, 7, seed=step)
        for m, optimizer in zip((compiled, eager), optimizers, strict=True):
            train_step(m, optimizer, ids, attention_mask=mask)
        assert rows_of(handles[0]) == rows_of(handles[1])


@pytest.mark.parametrize(
    ("backend", "layers"),
    [("aot_eager", 2), pytest.param("inductor", 1, marks=pytest.mark.slow)],
)
def test_a_compiled_model_trains_as_the_eager_one(backend: str, layers: int) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled_model = tiny_model(num_hidden_layers=layers)
    eager = tiny_model(num_hidden_layers=layers)
    handles = [longact.apply(m) for m in (compiled_model, eager)]
    optimizers = [adam(m, lr=1e-3) for m in (compiled_model, eager)]
    compiled = torch.compile(compiled_model, fullgraph=True, backend=backend)
    for step in range(5):
        ids, mask = padded("left", 12, 7, seed=step)
        losses = [
            train_step(m, optimizer, ids, attention_mask=mask)
            for m, optimizer in zip((compiled, eager), optimizers, strict=True)
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        assert rows_of(handles[0]) == rows_of(handles[1])
        assert counted(handles[0]) == counted(handles[1])
    for name, param in eager.named_parameters():
        other = dict(compiled_model.named_parameters())[name]
        torch.testing.assert_close(other, param, rtol=1e-2, atol=2e-3)
    # One graph without rows and one with: a change of rows must not compile again.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


# ---- Hugging Face Trainer ------------------------------------------------------------------------


def test_trainer_trains_and_resumes_identically(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    ids, mask = padded("right", *([12, 9, 7] * 16))
    labels = ids.masked_fill(mask == 0, -100)
    data = [
        {"input_ids": ids[i], "attention_mask": mask[i], "labels": labels[i]}
        for i in range(len(ids))
    ]

    def train(directory: str, seed: int, resume: str | None = None) -> tuple[Any, Any, Any]:
        model = tiny_model("qwen2", seed=seed)
        handle = longact.apply(model)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / directory),
            max_steps=6,
            save_steps=3,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            seed=1,
        )
        kwargs = {"lr": 1e-2, "weight_decay": 0.1}
        trainer = transformers.Trainer(
            model,
            arguments,
            train_dataset=data,
            data_collator=transformers.default_data_collator,
            optimizer_cls_and_kwargs=(longact.FusedMaskedAdam, kwargs),
        )
        seen: list[Any] = []

        class Recorder(transformers.TrainerCallback):  # type: ignore[name-defined,misc]
            def on_step_end(self, *_: Any, **__: Any) -> None:
                seen.append((params_of(model), rows_of(handle)))

        trainer.add_callback(Recorder())
        trainer.train(resume_from_checkpoint=resume)
        optimizer = trainer.optimizer
        return model, seen, getattr(optimizer, "optimizer", optimizer)

    model, seen, optimizer = train("whole", seed=0)
    assert isinstance(optimizer, longact.FusedMaskedAdam)
    assert len(seen) == 6
    for (before, rows), (after, _) in pairwise(seen):
        for name in QK:
            for key in ("weight", "bias"):
                changed = changed_rows(before[f"{name}.{key}"], after[f"{name}.{key}"])
                assert changed == rows[name]
    assert len({str(rows) for _, rows in seen}) > 3

    checkpoint = str(tmp_path / "whole" / "checkpoint-3")
    # Another seed: everything has to come from the checkpoint.
    resumed, seen_after, resumed_optimizer = train("resumed", seed=5, resume=checkpoint)
    assert len(seen_after) == 3
    for (params, rows), (expected, expected_rows) in zip(seen_after, seen[3:], strict=True):
        assert rows == expected_rows
        assert all(torch.equal(params[name], expected[name]) for name in expected)
    assert_same_params(resumed, model)
    state, wanted = resumed_optimizer.state_dict()["state"], optimizer.state_dict()["state"]
    assert state.keys() == wanted.keys()
    assert sum("ages" in entry and "rows" in entry for entry in wanted.values()) == 8
    for key, entry in wanted.items():
        assert entry.keys() == state[key].keys()
        assert all(torch.equal(entry[k], state[key][k]) for k in entry)
