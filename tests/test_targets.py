"""`targets`: what they match, which rows of it are ranked, and that these alone are trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_same_bits
from models import (
    K0,
    K1,
    Q0,
    Q1,
    QK,
    adam,
    changed_rows,
    forward_backward,
    params_of,
    rows_of,
    tiny_model,
    token_ids,
    train_step,
)
from test_apply import refused
from test_selection import Watch, magnitude, padded, top
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

import longact

KEEP = 0.3
QKV0, QKV1 = (f"model.layers.{i}.self_attn.qkv_proj" for i in range(2))


def counted_rows(model: nn.Module, **options: Any) -> tuple[dict[str, Any], list[str]]:
    """Rows after one forward, and the targets that the handle names."""
    with longact.apply(model, **options) as handle:
        model(input_ids=token_ids())
        handle.refresh()
        return rows_of(handle), handle.arguments["targets"]


def within(values: Tensor, *ranges: range, keep: float = KEEP) -> list[int]:
    """The best rows of each of the ranges by itself, and all that is in none of them."""
    rows = [r.start + row for r in ranges for row in top(values[r.start : r.stop], keep)]
    ranked = {row for r in ranges for row in r}
    return sorted([*rows, *(row for row in range(len(values)) if row not in ranked)])


# ---- ways to name rows ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        f"{Q0}[0:40]",
        f"{Q0}[:40]",
        "layers.0.self_attn.q_proj[:40]",
        "*.0.*.q_proj[0:40]",
        (Q0, slice(0, 40)),
        (Q0, slice(40)),
        (Q0, slice(0, 40, 1)),
        ("layers.0.self_attn.q_proj", range(40)),
        [(Q0, range(0, 40))],
        [Q0, slice(0, 40)],
        (f"{Q0}[:40]",),
        lambda model: (model.get_submodule(Q0), slice(0, 40)),
        lambda model: [(model.get_submodule(Q0), range(40))],
    ],
    # A function's own name has its address, another one in each run.
    ids=lambda target: "modules" if callable(target) else str(target),
)
def test_one_range_in_every_form(target: Any) -> None:
    model = tiny_model()
    targets = target(model) if callable(target) else target
    with longact.apply(model, KEEP, targets=targets) as handle:
        watch = Watch(handle)
        model(input_ids=token_ids())
        handle.refresh()
        assert rows_of(handle) == {Q0: within(magnitude(watch.take()[Q0]), range(40))}
        assert handle.arguments["targets"] == [f"{Q0}[0:40]"]


def test_a_range_with_an_open_end_reaches_the_last_row() -> None:
    model = tiny_model()
    for target in (f"{K1}[20:]", (K1, slice(20, None))):
        rows, targets = counted_rows(model, targets=target)
        assert targets == [f"{K1}[20:32]"]
        assert rows[K1][:20] == list(range(20))
        assert len(rows[K1]) == 20 + 4  # 0.3 * 12 = 3.6


def test_a_range_of_all_rows_is_the_projection() -> None:
    model = tiny_model()
    whole, _ = counted_rows(model, targets=Q0)
    for target in (f"{Q0}[:]", f"{Q0}[0:64]", (Q0, slice(None)), (Q0, range(64))):
        assert counted_rows(model, targets=target) == (whole, [f"{Q0}[0:64]"])


def test_a_pattern_gives_each_match_the_range() -> None:
    rows, targets = counted_rows(tiny_model(), targets=["q_proj[:16]", (K1, slice(8, 16))])
    assert targets == [f"{Q0}[0:16]", f"{Q1}[0:16]", f"{K1}[8:16]"]  # in the model's order
    assert {name: len(of_name) for name, of_name in rows.items()} == {
        Q0: 48 + 5,
        Q1: 48 + 5,
        K1: 24 + 2,
    }


@pytest.mark.parametrize(
    "targets",
    [
        ["q_proj", "k_proj"],
        ["q_proj[:16]", "q_proj[16:64]", "v_proj"],
        [(Q0, range(8, 24)), "*.mlp.*_proj"],
        "lm_head[10:]",
        None,
    ],
    ids=str,
)
@pytest.mark.parametrize("scope", ["layer", "model"])
def test_the_arguments_match_the_same_rows_again(targets: Any, scope: str) -> None:
    model = tiny_model("qwen2")
    with longact.apply(model, targets=targets, scope=scope) as handle:
        arguments = handle.arguments
        model(input_ids=token_ids())
        handle.refresh()
        rows = rows_of(handle)
    with longact.apply(model, **arguments) as again:
        assert again.arguments == arguments
        again.check_arguments(arguments, "a checkpoint")
        model(input_ids=token_ids())
        again.refresh()
        assert rows_of(again) == rows


# ---- which rows are ranked -----------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "qwen2"])  # Qwen 2 has biases
@pytest.mark.parametrize("scope", ["layer", "head", "model"])
def test_ranges_are_ranked_each_by_itself_and_other_rows_always_train(
    arch: str, scope: Any
) -> None:
    model = tiny_model(arch)
    first, second = range(0, 16), range(32, 64)
    ranges = (second, first)  # in whatever order
    targets = [("q_proj", r) for r in ranges]
    handle = longact.apply(model, KEEP, targets=targets, scope=scope)
    watch, optimizer = Watch(handle), adam(model)
    outside = list(range(16, 32))
    for step in range(3):
        held, before = rows_of(handle), params_of(model)
        ids, mask = padded("left", 12, 7, seed=step)
        forward_backward(model, ids, attention_mask=mask)
        values = {name: magnitude(y) for name, y in watch.take(mask).items()}
        optimizer.step()
        optimizer.zero_grad()
        if scope == "layer":
            chosen = {name: within(v, *ranges) for name, v in values.items()}
        elif scope == "head":
            heads = (range(0, 16), range(32, 48), range(48, 64))
            chosen = {name: within(v, *heads) for name, v in values.items()}
        else:
            chosen = {name: list(outside) for name in values}
            for r in ranges:
                together = torch.cat([v[r.start : r.stop] for v in values.values()])
                for i in top(together, KEEP):
                    chosen[(Q0, Q1)[i // len(r)]].append(r.start + i % len(r))
            chosen = {name: sorted(rows) for name, rows in chosen.items()}
        assert rows_of(handle) == chosen
        trained = chosen if step == 0 else held
        after = params_of(model)
        for name in (Q0, Q1):
            for key in ("weight", "bias") if arch == "qwen2" else ("weight",):
                changed = changed_rows(before[f"{name}.{key}"], after[f"{name}.{key}"])
                assert changed == trained[name]
                assert set(outside) <= set(changed)


@pytest.mark.parametrize("scope", ["layer", "head"])
def test_with_others_frozen_rows_in_no_range_are_frozen(scope: Any) -> None:
    model = tiny_model("qwen2")
    targets = ["q_proj[0:16]", "q_proj[32:64]"]
    handle = longact.apply(model, KEEP, targets=targets, scope=scope, others="freeze")
    watch, optimizer = Watch(handle), adam(model)
    start, trained = params_of(model), dict.fromkeys((Q0, Q1), frozenset())
    heads = [range(0, 16), range(32, 48), range(48, 64)]
    ranges = heads if scope == "head" else [range(0, 16), range(32, 64)]
    for step in range(3):
        held = rows_of(handle)
        train_step(model, optimizer, token_ids(seed=step))
        chosen = {
            name: sorted(r.start + i for r in ranges for i in top(magnitude(y)[r.start : r.stop]))
            for name, y in watch.take().items()
        }
        assert rows_of(handle) == chosen
        for name in trained:
            trained[name] |= set((chosen if step == 0 else held)[name])
    after = params_of(model)
    for name in trained:
        assert trained[name].isdisjoint(range(16, 32))
        for key in ("weight", "bias"):
            changed = changed_rows(start[f"{name}.{key}"], after[f"{name}.{key}"])
            assert changed == sorted(trained[name])
    mine = {f"{name}.{key}" for name in trained for key in ("weight", "bias")}
    for name, value in start.items():
        if name not in mine and "salient_" not in name:
            assert_same_bits(after[name], value, name)


# ---- fused weights of known and unknown architectures --------------------------------------------


def test_a_known_fused_projection_named_is_as_the_table_has_it() -> None:
    model = tiny_model("phi3")
    expected, names = counted_rows(model)
    assert names == [QKV0, QKV1]
    for rows in expected.values():
        assert rows[19 + 10 :] == list(range(96, 128))  # 0.3 of 64 and of 32, then all of v
    for targets in ("qkv_proj", ["self_attn.qkv_proj"], "*qkv*", names):
        assert counted_rows(model, targets=targets) == (expected, names)
    module = model.get_submodule(QKV1)
    assert counted_rows(model, targets=module) == ({QKV1: expected[QKV1]}, [QKV1])
    # By hand the same; but as ranges, not as heads.
    by_hand, _ = counted_rows(model, targets=["qkv_proj[:64]", "qkv_proj[64:96]"])
    assert by_hand == expected
    paired, _ = counted_rows(model, pair_rope=True)
    assert counted_rows(model, targets="qkv_proj", pair_rope=True)[0] == paired != expected


class Fused(nn.Module):
    """No transformers model: q and k in one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.Wqkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.Wqkv(x).chunk(3, -1)
        return self.out(torch.tanh(q) * k + v)


def test_a_fused_weight_of_any_module_by_ranges() -> None:
    model = Fused()
    handle = longact.apply(model, 0.5, targets=["Wqkv[0:8]", (model.Wqkv, range(8, 16))])
    assert handle.arguments["targets"] == ["Wqkv[0:8]", "Wqkv[8:16]"]
    watch, optimizer, before = Watch(handle), adam(model), params_of(model)
    model(torch.randn(5, 8)).square().mean().backward()
    y = magnitude(watch.take()["Wqkv"])
    optimizer.step()
    expected = within(y, range(0, 8), range(8, 16), keep=0.5)
    assert len(expected) == 4 + 4 + 8
    for key in ("weight", "bias"):
        now = getattr(model.Wqkv, key).detach()
        assert changed_rows(before[f"Wqkv.{key}"], now) == expected


# ---- other projections ---------------------------------------------------------------------------


@pytest.mark.parametrize("others", ["train", "freeze"])
@pytest.mark.parametrize(
    "leaves", [("v_proj",), ("o_proj",), ("gate_proj", "up_proj", "down_proj")], ids=str
)
def test_any_linear_layer_trains_its_salient_rows(leaves: tuple[str, ...], others: Any) -> None:
    model, dense = tiny_model(), tiny_model()
    handle = longact.apply(model, KEEP, targets=leaves, others=others)
    names = list(handle.projections)
    assert len(names) == 2 * len(leaves)
    watch, optimizer = Watch(handle), adam(model)
    for step in range(3):
        dense.load_state_dict(model.state_dict())
        held, before = rows_of(handle), params_of(model)
        ids, mask = padded("right", 12, 7, seed=step)
        for one in (model, dense):
            one.zero_grad()
            forward_backward(one, ids, attention_mask=mask)
        chosen = {name: top(magnitude(y)) for name, y in watch.take(mask).items()}
        for name, layer in handle.projections.items():
            expected = dense.get_submodule(name).weight.grad
            if others == "freeze":
                rows = layer.rows.long()
                assert layer.weight.grad is None
                torch.testing.assert_close(layer.salient_weight.grad, expected[rows])
                continue
            if step > 0:
                selected = torch.zeros_like(expected)
                selected[held[name]] = 1
                expected = expected * selected
                unselected = layer.weight.grad[selected[:, 0] == 0]
                assert not unselected.any()
            torch.testing.assert_close(layer.weight.grad, expected)
        optimizer.step()
        assert rows_of(handle) == chosen
        after = params_of(model)
        for name in names:
            changed = changed_rows(before[f"{name}.weight"], after[f"{name}.weight"])
            assert changed == (chosen if step == 0 else held)[name]
    others_trained = not torch.equal(after["lm_head.weight"], before["lm_head.weight"])
    assert others_trained == (others == "train")


@pytest.mark.parametrize("keep", [0.3, 0.5])
def test_heads_of_v_are_ranked_each_by_itself(keep: float) -> None:
    model = tiny_model()
    handle = longact.apply(model, keep, targets="v_proj", scope="head")
    watch = Watch(handle)
    model(input_ids=token_ids())
    handle.refresh()
    for name, y in watch.take().items():
        assert rows_of(handle)[name] == within(magnitude(y), range(16), range(16, 32), keep=keep)


def test_named_q_and_k_of_a_known_architecture_have_its_heads() -> None:
    # Rows of a range do not say which heads they are; those of the whole projection do.
    model = tiny_model("qwen3")
    everything, _ = counted_rows(model, capture="rope", pair_rope=True)
    some, _ = counted_rows(model, targets=[Q1, K0], capture="rope", pair_rope=True)
    assert some == {name: everything[name] for name in (K0, Q1)}
    whole, _ = counted_rows(model, targets=QK, scope="head")
    assert whole == counted_rows(model, scope="head")[0]


# ---- vision-language models ----------------------------------------------------------------------


@pytest.fixture
def llava() -> Any:
    text = tiny_model("llama").config
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    torch.manual_seed(0)
    config = LlavaConfig(
        text_config=text.to_dict(), vision_config=vision, vision_feature_layer=-1, image_token_id=3
    )
    return LlavaForConditionalGeneration(config).train()


def test_of_a_vision_language_model_the_text_tower_is_taken(llava: Any) -> None:
    handle = longact.apply(llava, KEEP)
    text = [f"model.language_model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qk"]
    assert list(handle.projections) == text
    assert handle.arguments["targets"] == text
    vision = [n for n, m in llava.named_modules() if "vision" in n and n.endswith(".q_proj")]
    assert len(vision) == 2
    assert all(type(llava.get_submodule(name)) is nn.Linear for name in vision)
    watch, optimizer, before = Watch(handle), adam(llava), params_of(llava)
    ids = token_ids().clamp(min=4)
    ids[:, 2:6] = 3  # an image of four patches
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    images = torch.randn(2, 3, 28, 28)
    forward_backward(llava, ids, attention_mask=mask, pixel_values=images)
    chosen = {name: top(magnitude(y)) for name, y in watch.take(mask).items()}
    optimizer.step()
    assert rows_of(handle) == chosen
    after = params_of(llava)
    for name in text:
        assert changed_rows(before[f"{name}.weight"], after[f"{name}.weight"]) == chosen[name]
    for name in vision:  # trained as usual
        assert len(changed_rows(before[f"{name}.weight"], after[f"{name}.weight"])) == 32


def test_names_reach_every_tower_and_its_heads_are_known_in_the_text_tower_only(llava: Any) -> None:
    refused(llava, ValueError, r"capture='rope': .*vision.*q_proj is no", targets="q_proj",
            capture="rope")  # fmt: skip
    with longact.apply(llava, targets="q_proj") as handle:
        assert len([name for name in handle.projections if "vision" in name]) == 2
        assert len(handle.projections) == 4
    with longact.apply(llava, targets="*language_model*.q_proj", capture="rope") as handle:
        assert len(handle.projections) == 2


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "match"),
    [
        ([f"{Q0}[0:40]", f"{Q0}[39:64]"], f"rows 0 to 40 and 39 to 64 of {Q0} overlap"),
        (["q_proj[0:40]", (Q1, slice(0, 40))], f"rows 0 to 40 and 0 to 40 of {Q1} overlap"),
        (["q_proj[40:64]", "q_proj[:]"], f"rows 0 to 64 and 40 to 64 of {Q0} overlap"),
        (f"{Q0}[0:65]", f"rows 0 to 65 of {Q0}, which has 64: pass a range within"),
        ("q_proj[64:]", f"rows 64 to 64 of {Q0}"),
        (["q_proj", "k_proj[:33]"], f"rows 0 to 33 of {K0}, which has 32"),
        (f"{Q0}[8:8]", f"rows 8 to 8 of {Q0}"),
        (f"{Q0}[:0]", f"rows 0 to 0 of {Q0}"),
        (f"{Q0}[9:8]", f"rows 9 to 8 of {Q0}"),
        ((Q0, slice(0, 40, 2)), f"rows 0 to 40 of {Q0} in steps of 2"),
        ((Q0, range(40, 0, -1)), f"rows 40 to 0 of {Q0} in steps of -1"),
        ((Q0, slice(-8, None)), f"rows -8 to 64 of {Q0}"),
        ((Q0, slice(0, -8)), f"rows 0 to -8 of {Q0}"),
        ((Q0, range(0)), f"rows 0 to 0 of {Q0}"),
        ("nope[0:8]", "nothing in LlamaForCausalLM matches 'nope'"),
        (f"{Q0}[0-8]", "nothing in LlamaForCausalLM matches"),
        (f"{Q0}[-8:]", "nothing in LlamaForCausalLM matches"),
        (f"{Q0}[0:8:1]", "nothing in LlamaForCausalLM matches"),
        ((nn.Linear(2, 2), slice(0, 1)), "nothing in LlamaForCausalLM matches Linear"),
    ],
)
@pytest.mark.parametrize("others", ["train", "freeze"])
def test_ranges_that_do_not_fit_are_refused_and_change_nothing(
    targets: Any, match: str, others: str
) -> None:
    match = match.replace(".", r"\.")
    refused(tiny_model(), ValueError, match, targets=targets, others=others)


@pytest.mark.parametrize(
    "targets",
    [(Q0, 3), (3, slice(0, 8)), [(Q0, "0:8")], [(Q0, slice(0, 8), 1)], [{Q0: 1}]],
    ids=str,
)
def test_targets_of_a_wrong_type_are_refused(targets: Any) -> None:
    refused(tiny_model(), TypeError, "targets holds", targets=targets)


@pytest.mark.parametrize(
    "make", [lambda: slice("0", 8), lambda: slice(0, 8.0)], ids=["str", "float"]
)
def test_a_range_must_hold_integers(make: Callable[[], slice]) -> None:
    refused(tiny_model(), (TypeError, ValueError), "targets", targets=(Q0, make()))


def test_heads_must_divide_a_range() -> None:
    match = r"scope='head': .*q_proj has 24 channels, not a multiple of the head dimension 16"
    refused(tiny_model(), ValueError, match, targets="q_proj[0:24]", scope="head")


def test_a_whole_projection_and_a_range_of_it_are_refused() -> None:
    for targets in (["q_proj", f"{Q0}[0:32]"], [f"{Q0}[0:32]", "q_proj"]):
        refused(tiny_model(), ValueError, f"{Q0}.*overlap", targets=targets)


def test_a_range_of_no_linear_layer_is_refused() -> None:
    refused(tiny_model(), TypeError, "embed_tokens is a .*Embedding", targets="embed_tokens[0:8]")
    for target in ("input_layernorm[0:8]", "self_attn[0:8]"):
        refused(tiny_model(), (TypeError, ValueError), target.partition("[")[0], targets=target)
