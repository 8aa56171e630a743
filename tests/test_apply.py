"""`longact.apply` on real transformers architectures: what it changes, and how it is undone."""

from __future__ import annotations

import copy
import functools
import io
import math
import pickle
from typing import Any

import pytest
import torch
from models import (
    ARCHS,
    K0,
    K1,
    Q0,
    Q1,
    QK,
    adam,
    assert_same_params,
    changed_rows,
    hooks_of,
    params_of,
    rows_of,
    tiny_model,
    token_ids,
    train_step,
)
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import longact
from longact.architectures import ARCHITECTURES, Attention
from longact.nn import SalientLinear


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    """Everything that a refused call must leave as it was."""
    modules = [(name, id(module), type(module)) for name, module in model.named_modules()]
    params = [(name, id(p), p.__dict__.copy()) for name, p in model.named_parameters()]
    return modules, params, hooks_of(model)


def refused(model: nn.Module, error: type[Exception], match: str, **options: Any) -> None:
    before = snapshot(model)
    with pytest.raises(error, match=match):
        longact.apply(model, **options)
    assert snapshot(model) == before


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        output = model(input_ids=ids)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


class Plain(nn.Module):
    """Not a transformers model: no config, no attention_mask."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.out = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.q_proj(x)) * self.k_proj(x))


# ---- what is matched, and that nothing else changes ----------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("causal_lm", [True, False], ids=["ForCausalLM", "Model"])
def test_every_architecture_keeps_its_outputs_and_state_dict(arch: str, causal_lm: bool) -> None:
    model = tiny_model(arch, causal_lm=causal_lm)
    ids = token_ids()
    output, state = logits(model, ids), copy.deepcopy(model.state_dict())
    parameters = dict(model.named_parameters())
    others = {n: m for n, m in model.named_modules() if not n.endswith(("q_proj", "k_proj"))}

    handle = longact.apply(model)

    prefix = "model." if causal_lm else ""
    assert list(handle.projections) == [
        f"{prefix}layers.{i}.self_attn.{p}" for i in range(2) for p in ("q_proj", "k_proj")
    ]
    for name, layer in handle.projections.items():
        assert type(layer) is SalientLinear
        assert model.get_submodule(name) is layer
        assert (layer.bias is not None) == (arch == "qwen2")
    for name, module in others.items():
        assert model.get_submodule(name) is module
    assert {n: id(p) for n, p in model.named_parameters()} == {
        n: id(p) for n, p in parameters.items()
    }
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[key], state[key]) for key in state)
    assert torch.equal(logits(model, ids), output)
    assert handle.rows == dict.fromkeys(handle.projections)


@pytest.mark.parametrize("arch", ARCHS)
def test_only_selected_rows_of_q_and_k_train_and_everything_else_does(arch: str) -> None:
    model = tiny_model(arch)
    start = params_of(model)
    handle = longact.apply(model, keep_ratio=0.3)
    optimizer = adam(model)
    used: dict[str, set[int]] = {name: set() for name in handle.projections}
    for i in range(3):
        before = params_of(model)
        # Before the first step rows come from its own forwards, so they are known afterwards.
        held = rows_of(handle)
        train_step(model, optimizer, token_ids(seed=i))
        after = params_of(model)
        if i == 0:
            first = {
                n: set(changed_rows(before[f"{n}.weight"], after[f"{n}.weight"])) for n in used
            }
            held = {name: sorted(rows) for name, rows in first.items()}
            assert held == rows_of(handle)
        for name in used:
            expected = held[name]
            assert expected is not None
            used[name] |= set(expected)
            assert changed_rows(before[f"{name}.weight"], after[f"{name}.weight"]) == expected
            if arch == "qwen2":
                assert changed_rows(before[f"{name}.bias"], after[f"{name}.bias"]) == expected

    for name, layer in handle.projections.items():
        n = layer.out_features
        rows = handle.rows[name]
        assert rows is not None
        assert rows.dtype == torch.int32
        assert rows.numel() == max(1, math.floor(0.3 * n + 0.5))
        assert rows.tolist() == sorted(set(rows.tolist()))
        assert 0 < len(used[name]) < n
    projection_params = {f"{n}.{key}" for n in used for key in ("weight", "bias")}
    for name, param in model.named_parameters():
        if name not in projection_params:
            changed = (param != start[name]).float().mean()
            # Embedding rows of tokens that never appeared have a zero gradient but still decay.
            assert changed > 0.9, name


@pytest.mark.parametrize(
    ("keep_ratio", "q_rows", "k_rows"),
    [(1.0, 64, 32), (1, 64, 32), (0.5, 32, 16), (0.3, 19, 10), (0.0703125, 5, 2), (1e-6, 1, 1)],
    # 0.0703125 * 64 = 4.5 exactly: halves go up (round() would give 4); 0.0703125 * 32 = 2.25
)
def test_row_counts(keep_ratio: float, q_rows: int, k_rows: int) -> None:
    model = tiny_model()
    handle = longact.apply(model, keep_ratio)
    model(input_ids=token_ids())
    handle.refresh()
    counts = [len(rows) for rows in rows_of(handle).values() if rows is not None]
    assert counts == [q_rows, k_rows, q_rows, k_rows]


def test_a_layer_that_keeps_all_rows_trains_as_adamw() -> None:
    ours, theirs = tiny_model("qwen2"), tiny_model("qwen2")
    longact.apply(ours, keep_ratio=1.0)
    optimizer, adamw = adam(ours), torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.1)
    for i in range(3):
        loss = train_step(ours, optimizer, token_ids(seed=i))
        assert loss == pytest.approx(train_step(theirs, adamw, token_ids(seed=i)), rel=1e-5)


# ---- undoing it ----------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_remove_restores_the_very_same_modules_with_trained_parameters(arch: str) -> None:
    model = tiny_model(arch)
    before = snapshot(model)
    linears = {name: model.get_submodule(name) for name in QK}
    handle = longact.apply(model)
    train_step(model, adam(model), token_ids())
    trained, output = params_of(model), logits(model, token_ids())
    model.eval()

    handle.remove()

    assert {name: model.get_submodule(name) for name in QK} == linears
    assert snapshot(model) == before  # the selections are off the parameters, too
    assert not any(module.training for module in model.modules())
    assert_same_params(model, trained)
    assert torch.equal(logits(model, token_ids()), output)
    handle.remove()  # nothing left to do
    assert snapshot(model) == before


def test_remove_follows_parameters_that_were_replaced_meanwhile() -> None:
    model = tiny_model()
    handle = longact.apply(model)
    model.load_state_dict(copy.deepcopy(tiny_model(seed=1).state_dict()), assign=True)
    model.to(torch.float64)
    handle.remove()
    assert_same_params(model, tiny_model(seed=1).to(torch.float64))


def test_context_manager_removes_also_after_an_error() -> None:
    model = tiny_model()
    before = snapshot(model)
    with longact.apply(model) as handle:
        assert isinstance(model.get_submodule(Q0), SalientLinear)
        assert isinstance(handle, longact.LongAct)
    assert snapshot(model) == before
    with pytest.raises(ZeroDivisionError), longact.apply(model):
        raise ZeroDivisionError
    assert snapshot(model) == before


def test_rows_set_by_hand_before_come_back_with_remove() -> None:
    model = tiny_model("qwen2")
    weight = model.get_submodule(Q0).weight
    longact.set_rows(weight, [1, 2])
    with longact.apply(model) as handle:
        assert longact.get_rows(weight) is None
        train_step(model, adam(model), token_ids())
        assert longact.get_rows(weight) is handle.rows[Q0]
    assert longact.get_rows(weight).tolist() == [1, 2]
    assert longact.get_rows(model.get_submodule(Q0).bias) is None


def test_apply_again_after_remove() -> None:
    model = tiny_model()
    longact.apply(model, keep_ratio=0.5).remove()
    handle = longact.apply(model, keep_ratio=0.25)
    train_step(model, adam(model), token_ids())
    assert [len(rows or ()) for rows in rows_of(handle).values()] == [16, 8, 16, 8]
    tokens = [layer.selection.tokens for layer in handle.projections.values()]
    assert [int(t) for t in tokens if t is not None] == [0] * 4
    model(input_ids=token_ids())
    # Hooks of the removed handle would count these twice, or stop the counting.
    assert [int(t) for t in tokens if t is not None] == [24] * 4


@pytest.mark.parametrize("arch", ARCHS)
def test_a_trained_model_saves_and_loads_as_a_plain_one(arch: str, tmp_path: Any) -> None:
    model = tiny_model(arch)
    with longact.apply(model):
        train_step(model, adam(model), token_ids())
        model.save_pretrained(tmp_path / "applied")
    model.save_pretrained(tmp_path / "removed")
    for which in ("applied", "removed"):  # keys and tensors are the same either way
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / which)
        assert type(loaded.get_submodule(Q0)) is nn.Linear
        assert_same_params(loaded, model)
        assert torch.equal(logits(loaded, token_ids()), logits(model, token_ids()))


# ---- targets -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "matched"),
    [
        ("q_proj", [Q0, Q1]),
        ("self_attn.k_proj", [K0, K1]),
        (Q1, [Q1]),
        ("model.layers.1.*_proj", None),
        ("*.0.self_attn.[qk]_proj", [Q0, K0]),
        (["k_proj", "q_proj"], QK),
        (("q_proj", Q0), [Q0, Q1]),  # matched twice, changed once
        ("mlp.down_proj", ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]),
        ("lm_head", ["lm_head"]),
    ],
)
def test_targets_by_name(targets: Any, matched: list[str] | None) -> None:
    model = tiny_model()
    if matched is None:
        matched = [n for n, _ in model.named_modules() if n.startswith("model.layers.1")]
        matched = [n for n in matched if n.endswith("_proj")]
        assert len(matched) == 7
    handle = longact.apply(model, targets=targets)
    assert list(handle.projections) == matched
    salient = [n for n, m in model.named_modules() if isinstance(m, SalientLinear)]
    assert salient == matched


def test_targets_by_module() -> None:
    model = tiny_model()
    module = model.model.layers[1].self_attn.q_proj
    assert list(longact.apply(model, targets=module).projections) == [Q1]
    model = tiny_model()
    modules = [model.model.layers[1].self_attn.q_proj, "layers.0.self_attn.k_proj"]
    assert list(longact.apply(model, targets=modules).projections) == [K0, Q1]


def test_a_suffix_is_a_whole_name() -> None:
    # "proj" must not match "q_proj", nor "attn.q_proj" "self_attn.q_proj".
    for target in ("proj", "attn.q_proj", "Q_PROJ"):
        refused(tiny_model(), ValueError, "nothing in LlamaForCausalLM matches", targets=target)


def test_any_module_with_targets_trains_its_salient_rows() -> None:
    torch.manual_seed(0)
    model = Plain()
    handle = longact.apply(model, 0.25, targets=["q_proj", "k_proj"])
    optimizer = adam(model)
    before = params_of(model)
    model(torch.randn(5, 8)).square().mean().backward()
    optimizer.step()
    for name, rows in rows_of(handle).items():
        assert rows is not None
        assert len(rows) == 2
        for key in ("weight", "bias"):
            now = dict(model.named_parameters())[f"{name}.{key}"]
            assert changed_rows(before[f"{name}.{key}"], now.detach()) == rows


def test_unknown_architecture_names_the_supported_ones_and_targets() -> None:
    gpt2 = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", n_layer=1, n_embd=16, n_head=2, vocab_size=32)
    )
    bert = AutoModel.from_config(
        AutoConfig.for_model(
            "bert",
            num_hidden_layers=1,
            hidden_size=16,
            num_attention_heads=2,
            intermediate_size=16,
            vocab_size=32,
        )
    )
    for model, what in ((gpt2, "'gpt2'.*gptj"), (bert, "'bert'"), (Plain(), "Plain")):
        refused(model, ValueError, f"{what}.*targets=\\['q_proj', 'k_proj'\\]")
    # What the message recommends works.
    assert len(longact.apply(bert, targets=["query", "key"]).projections) == 2


@pytest.mark.parametrize(
    ("targets", "match"),
    [
        ("nope_proj", "'nope_proj'.*down_proj.*q_proj"),
        (["q_proj", "nope_proj"], "'nope_proj'"),
        ([], "empty"),
        ((), "empty"),
        ("", "model itself"),
        ("*", "model itself"),
        (nn.Linear(2, 2), "Linear"),
    ],
)
def test_targets_that_match_nothing_useful_are_refused(targets: Any, match: str) -> None:
    refused(tiny_model(), ValueError, match, targets=targets)


@pytest.mark.parametrize("targets", [3, [3], [None], [["q_proj"]]])
def test_targets_of_a_wrong_type_are_refused(targets: Any) -> None:
    refused(tiny_model(), TypeError, "targets", targets=targets)


def test_a_target_that_is_no_linear_layer_is_refused() -> None:
    refused(tiny_model(), TypeError, "self_attn.*LlamaAttention", targets=["q_proj", "self_attn"])
    refused(tiny_model(), TypeError, "embed_tokens.*Embedding", targets="embed_tokens")


# ---- bad arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option",
    [
        *(
            {"keep_ratio": bad}
            for bad in (0, 0.0, -0.1, 1.0001, 2, math.nan, math.inf, "0.3", None)
        ),
        {"keep_ratio": True},
        *({"metric": bad} for bad in ("mean", "MEAN_ABS", None, 2)),
        *({"scope": bad} for bad in ("global", "", None)),
        *({"refresh_every": bad} for bad in (-1, 1.0, "backward", None, True, False)),
    ],
    ids=str,
)
def test_bad_values_are_refused_by_name(option: dict[str, Any]) -> None:
    (name, value), *_ = option.items()
    refused(tiny_model(), ValueError, f"{name}={value!r}", **option)


def test_forward_refresh_cannot_rank_over_the_model() -> None:
    refused(tiny_model(), ValueError, "forward.*layer", refresh_every="forward", scope="model")


def test_model_must_be_a_module() -> None:
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        longact.apply({"q_proj": nn.Linear(2, 2)})  # type: ignore[arg-type]


def test_scope_head_needs_a_head_dimension_that_divides() -> None:
    refused(Plain(), ValueError, "head_dim", targets="q_proj", scope="head")
    model = tiny_model()
    model.config.head_dim = 24
    refused(model, ValueError, r"v_proj.*32.*24", targets="v_proj", scope="head")
    model.model.layers[1].self_attn.head_dim = 24
    refused(model, ValueError, r"q_proj.*64.*24", scope="head")


def test_a_model_whose_attention_is_not_softmax_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    none: Any = Attention({"q_proj": lambda *_: [], "k_proj": lambda *_: []})
    monkeypatch.setitem(ARCHITECTURES, "llama", none)
    refused(tiny_model(), ValueError, "no softmax attention in use.*pass targets")


def test_apply_twice_is_refused_and_the_first_one_goes_on() -> None:
    model = tiny_model()
    handle = longact.apply(model)
    refused(model, ValueError, "remove")
    refused(model, ValueError, "remove", targets=["v_proj", "k_proj"])
    train_step(model, adam(model), token_ids())
    assert all(rows is not None for rows in handle.rows.values())


def test_a_second_handle_on_other_projections_is_independent() -> None:
    model = tiny_model()
    q = longact.apply(model, 0.5, targets="q_proj")
    k = longact.apply(model, 0.25, targets="k_proj")
    optimizer = adam(model)
    train_step(model, optimizer, token_ids())
    assert [len(r or ()) for r in (*rows_of(q).values(), *rows_of(k).values())] == [32, 32, 8, 8]
    k.remove()
    train_step(model, optimizer, token_ids(seed=1))
    model(input_ids=token_ids())
    assert [int(p.selection.tokens) for p in q.projections.values()] == [24, 24]  # type: ignore[arg-type]
    q.remove()
    assert hooks_of(model) == 0


@pytest.mark.parametrize("which", ["module", "parameter"])
def test_tied_projections_are_refused(which: str) -> None:
    model = tiny_model()
    first, second = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    if which == "module":
        second.q_proj = first.q_proj
    else:
        second.q_proj.weight = first.q_proj.weight
    refused(model, ValueError, r"layers\.1\.self_attn\.q_proj\.weight.*tied")
    refused(model, ValueError, "tied", targets=Q0)  # also when one of the two only is a target
    longact.apply(model, targets="k_proj")  # the tied ones left out


def test_tied_embeddings_do_not_matter() -> None:
    model = tiny_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(longact.apply(model).projections) == 4
    refused(tiny_model(tie_word_embeddings=True), ValueError, "tied", targets="lm_head")


class FakeLora(nn.Module):
    """What peft puts in a projection's place, as far as longact looks."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, 4, bias=False)
        self.lora_B = nn.Linear(4, base_layer.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class FakeLoraLinear(nn.Linear):
    """peft's wrappers of quantized layers may look like linear layers."""


class FakeLinear4bit(nn.Linear):
    """As bitsandbytes has it: a subclass of nn.Linear."""


def test_lora_wrapped_projections_are_refused() -> None:
    model = tiny_model()
    attention = model.model.layers[1].self_attn
    attention.k_proj = FakeLora(attention.k_proj)
    refused(model, TypeError, rf"{K1}.*merge")
    attention.k_proj = FakeLoraLinear(64, 32)
    attention.k_proj.base_layer = nn.Linear(64, 32)
    refused(model, TypeError, rf"{K1}.*merge")


def test_quantized_projections_are_refused() -> None:
    model = tiny_model()
    attention = model.model.layers[1].self_attn
    attention.k_proj = FakeLinear4bit(64, 32, bias=False)
    refused(model, TypeError, rf"{K1}.*FakeLinear4bit.*quantized")
    attention.k_proj = nn.Linear(64, 32, bias=False)
    int8 = torch.zeros(32, 64, dtype=torch.int8)
    attention.k_proj.weight = nn.Parameter(int8, requires_grad=False)
    refused(model, TypeError, rf"{K1}.*int8.*unquantized")


def test_a_replaced_forward_is_refused() -> None:
    model = tiny_model()
    k_proj = model.model.layers[1].self_attn.k_proj
    k_proj.forward = functools.partial(lambda old, x: old(x), k_proj.forward)
    refused(model, TypeError, rf"{K1}\.forward.*accelerate")


def test_a_part_that_does_not_say_so_is_refused() -> None:
    """As transformers before 5.17 leaves it, on a rank of tensor parallelism."""
    model = tiny_model()
    k_proj = model.model.layers[1].self_attn.k_proj
    k_proj._hf_tp_plan = "colwise"
    refused(model, TypeError, rf"{K1} is a part.*update transformers")


# ---- copies and pickles --------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_trains_on_its_own_and_identically(arch: str, how: str) -> None:
    model = tiny_model(arch)
    handle = longact.apply(model, refresh_every=2)
    train_step(model, adam(model), token_ids())
    model(input_ids=token_ids(seed=9))  # running totals travel, too
    rows = rows_of(handle)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    start = params_of(model)
    layers = [twin.get_submodule(name) for name in QK]
    assert [longact.get_rows(layer.weight).tolist() for layer in layers] == list(rows.values())
    if arch == "qwen2":
        assert all(longact.get_rows(x.bias) is longact.get_rows(x.weight) for x in layers)

    twin_optimizer, batches = adam(twin), [token_ids(seed=i) for i in range(4)]
    losses = [train_step(twin, twin_optimizer, ids) for ids in batches]
    assert_same_params(model, start)  # the original did not notice
    assert rows_of(handle) == rows
    twin_rows = [layer.rows.tolist() for layer in layers]
    assert twin_rows != list(rows.values())
    optimizer = adam(model)
    assert [train_step(model, optimizer, ids) for ids in batches] == losses
    assert_same_params(model, twin)
    assert list(rows_of(handle).values()) == twin_rows


def test_a_copied_layer_leaves_the_model_behind() -> None:
    model = tiny_model(vocab_size=4096)
    handle = longact.apply(model)
    model(input_ids=token_ids(), attention_mask=torch.ones_like(token_ids()))
    handle.refresh()
    layer = handle.projections[Q0]
    # 64 x 64 fp32 weights are 16 KiB; the embedding alone would be 1 MiB.
    assert len(pickle.dumps(layer)) < 32 * 1024
    twin = copy.deepcopy(layer)
    seen: set[int] = set()

    def tensors(value: Any) -> int:
        if id(value) in seen:
            return 0
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            return value.numel() + sum(map(tensors, value.__dict__.values()))
        if isinstance(value, dict):
            return sum(map(tensors, value.values()))
        return sum(map(tensors, vars(value).values())) if hasattr(value, "__dict__") else 0

    assert tensors(vars(twin)) < 2 * layer.weight.numel()
    longact.set_rows(twin.weight, [0])
    assert layer.rows is not None
    assert layer.rows.numel() == 19


def test_two_models_do_not_affect_each_other() -> None:
    alone, one, two = tiny_model(), tiny_model(), tiny_model(seed=1)
    plain = tiny_model()
    handles = [longact.apply(m) for m in (alone, one)]
    longact.apply(two, 0.9, metric="rms", refresh_every="forward")
    optimizers = [adam(m) for m in (alone, one, two)]
    for i in range(3):
        expected = train_step(alone, optimizers[0], token_ids(seed=i))
        assert train_step(one, optimizers[1], token_ids(seed=i)) == expected
        train_step(two, optimizers[2], token_ids(seed=i + 50))
        train_step(plain, torch.optim.SGD(plain.parameters(), 0.1), token_ids(seed=i))
    assert_same_params(one, alone)
    assert rows_of(handles[0]) == rows_of(handles[1])
    assert type(plain.get_submodule(Q0)) is nn.Linear
    assert type(nn.Linear(2, 2)) is nn.Linear


# ---- the handle ----------------------------------------------------------------------------------


def saved(handle: longact.LongAct) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(handle.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def flat(state: dict[str, Any]) -> dict[str, Any]:
    """`state_dict` with tensors as (dtype, bytes), comparable with ==."""
    return {
        f"{name}.{key}": (str(v.dtype), v.tolist()) if isinstance(v, torch.Tensor) else v
        for name, entry in state["projections"].items()
        for key, v in entry.items()
    }


@pytest.mark.parametrize("metric", ["mean_abs", "max_abs"])
def test_state_dict_resumes_in_mid_run_bit_for_bit(metric: Any) -> None:
    # Saved one step after a refresh, with a micro-batch of the next step counted already.
    model = tiny_model("qwen2")
    handle = longact.apply(model, metric=metric, refresh_every=3)
    optimizer = adam(model)
    train_step(model, optimizer, token_ids())
    model(input_ids=token_ids(seed=1))
    state = saved(handle)
    weights, moments = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())

    twin = tiny_model("qwen2", seed=7)
    twin.load_state_dict(weights)
    twin_handle = longact.apply(twin, metric=metric, refresh_every=3)
    twin_optimizer = adam(twin)
    twin_optimizer.load_state_dict(moments)
    twin_handle.load_state_dict(state)
    assert flat(saved(twin_handle)) == flat(state)
    for name in QK:  # loaded into the parameters' selection, not beside it
        assert longact.get_rows(twin.get_submodule(name).bias) is twin_handle.rows[name]
    for i in range(4):
        expected = train_step(model, optimizer, token_ids(seed=i))
        assert train_step(twin, twin_optimizer, token_ids(seed=i)) == expected
        assert rows_of(twin_handle) == rows_of(handle)
    assert_same_params(twin, model)
    assert flat(saved(twin_handle)) == flat(saved(handle))


def test_state_dict_before_the_first_selection_round_trips() -> None:
    handle, other = longact.apply(tiny_model()), longact.apply(tiny_model())
    other._model(input_ids=token_ids())
    other.refresh()
    other.load_state_dict(saved(handle))
    assert other.rows == dict.fromkeys(QK)
    assert flat(saved(other)) == flat(saved(handle))


def test_a_loaded_state_is_not_shared() -> None:
    source, model = tiny_model(), tiny_model()
    first, second = longact.apply(source), longact.apply(model)
    source(input_ids=token_ids())
    first.refresh()
    source(input_ids=token_ids())
    second.load_state_dict(first.state_dict())
    before = flat(saved(first))
    model(input_ids=token_ids(seed=3))
    second.refresh()
    assert flat(saved(first)) == before


def bad(change: Any) -> Any:
    """A change to the last projection's entry, so that a half-done load would show in the first."""

    def apply_to(state: dict[str, Any]) -> None:
        change(state["projections"][K1])

    return apply_to


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda s: s.clear(), "projections"),
        (lambda s: s.update(projections=None), "projections"),
        (lambda s: s["projections"].pop(K0), f"missing.*{K0}"),
        (lambda s: s["projections"].update(extra={}), "unexpected.*extra"),
        (bad(lambda e: e.update(rows=torch.tensor([3, 2]))), K1),
        (bad(lambda e: e.update(rows=torch.tensor([31, 32]))), f"{K1}.*32"),
        (bad(lambda e: e.update(rows=torch.tensor([-1]))), K1),
        (bad(lambda e: e.update(rows=torch.tensor([0.0]))), K1),
        (bad(lambda e: e.update(rows=[0, 1])), K1),
        (bad(lambda e: e.update(magnitude=torch.zeros(33))), f"{K1}.*33"),
        (bad(lambda e: e.update(tokens=torch.zeros(2, dtype=torch.int64))), K1),
        (bad(lambda e: e.update(steps="two")), K1),
        (bad(lambda e: e.pop("rows")), f"{K1}.*rows"),
        (bad(lambda e: e.pop("magnitude")), f"{K1}.*magnitude"),
        (bad(lambda e: e.pop("tokens")), f"{K1}.*tokens"),
        (bad(lambda e: e.pop("steps")), f"{K1}.*steps"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(spoil: Any, match: str) -> None:
    handle = longact.apply(tiny_model())
    handle._model(input_ids=token_ids())
    handle.refresh()
    state = saved(handle)
    spoil(state)
    handle._model(input_ids=token_ids(seed=4))
    handle.refresh()
    before = flat(saved(handle))
    with pytest.raises(ValueError, match=match):
        handle.load_state_dict(state)
    assert flat(saved(handle)) == before


def test_a_state_of_another_model_is_refused() -> None:
    handle = longact.apply(tiny_model())
    for other in (tiny_model(num_hidden_layers=3), tiny_model(num_key_value_heads=4)):
        wider = longact.apply(other)
        with pytest.raises(ValueError, match=r"does not fit|channels"):
            handle.load_state_dict(wider.state_dict())


def test_repr_says_what_was_applied() -> None:
    text = repr(longact.apply(tiny_model(), 0.25, metric="rms"))
    assert "4 projections" in text
    assert "0.25" in text
    assert "rms" in text
