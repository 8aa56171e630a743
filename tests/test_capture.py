"""`capture` and `pair_rope`: which rows they select, against the model's own q and k."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from helpers import assert_same_bits, assert_same_tree
from models import (
    Q0,
    adam,
    assert_same_params,
    changed_rows,
    forward_backward,
    hooks_of,
    params_of,
    rows_of,
    tiny_model,
    token_ids,
    train_step,
)
from test_apply import refused
from test_selection import padded
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import longact

# transformers 5.24 renamed the argument, and deprecates the name that earlier versions know.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")

KEEP = 0.3

# ---- the models, and by hand what their rows are -------------------------------------------------


class Made(NamedTuple):
    """The q or k heads that a projection makes."""

    kind: str
    rows: Tensor  # [heads, head_dim]
    pairs: list[tuple[int, ...]]  # channels of a head that rotate together
    seen: list[int]  # where the scores have each channel


class Case(NamedTuple):
    arch: str
    options: dict[str, Any]
    projections: dict[str, list[Made]]  # by their name in the attention module
    norms: Mapping[str, str] = MappingProxyType({})  # kind -> name
    norm_shape: str = ""  # "tokens heads", "heads tokens" or "flat"
    norm_after_rope: bool = False
    plain_layers: tuple[int, ...] = ()  # which do not rotate


def half(width: int = 16) -> list[tuple[int, ...]]:
    return [(i, i + width // 2) for i in range(width // 2)]


def neighbours(width: int = 16, start: int = 0) -> list[tuple[int, ...]]:
    return [(start + i, start + i + 1) for i in range(0, width, 2)]


def made(kind: str, rows: Tensor, pairs: Sequence[tuple[int, ...]]) -> Made:
    return Made(kind, rows, list(pairs), list(range(rows.shape[1])))


def separate(pairs: Sequence[tuple[int, ...]], k_heads: int = 2) -> dict[str, list[Made]]:
    return {
        "q_proj": [made("q", torch.arange(64).view(4, 16), pairs)],
        "k_proj": [made("k", torch.arange(16 * k_heads).view(k_heads, 16), pairs)],
    }


def by_head(pairs: Sequence[tuple[int, ...]]) -> dict[str, list[Made]]:
    """q, k and v of the first head, then of the next."""
    rows = torch.arange(192).view(4, 3, 16)
    return {"query_key_value": [made("q", rows[:, 0], pairs), made("k", rows[:, 1], pairs)]}


NORMS = {"q": "q_norm", "k": "k_norm"}
LAYERNORMS = {"q": "q_layernorm", "k": "k_layernorm"}
HYBRID = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
#: The scores have the first channels of all pairs before the second ones.
MLA_SEEN = [*range(12), *(12 + i // 2 + 4 * (i % 2) for i in range(8))]
CASES = {
    "llama": Case("llama", {}, separate(half())),
    "qwen3": Case("qwen3", {}, separate(half()), NORMS, "tokens heads"),
    "gemma3": Case("gemma3_text", HYBRID, separate(half()), NORMS, "heads tokens"),
    "gemma3-square": Case(
        "gemma3_text",
        HYBRID | {"num_key_value_heads": 4},
        separate(half(), 4),
        NORMS,
        "heads tokens",
    ),
    "olmo2": Case("olmo2", {}, separate(half()), NORMS, "flat"),
    "cohere": Case("cohere", {"use_qk_norm": True}, separate(neighbours()), NORMS, "tokens heads"),
    "glm4": Case("glm4", {}, separate(neighbours(8))),
    "phi": Case("phi", {"qk_layernorm": True}, separate(half(8)), LAYERNORMS, "heads tokens"),
    "gpt_neox": Case("gpt_neox", {}, by_head(half(4))),
    "persimmon": Case("persimmon", {}, by_head(half(8)), LAYERNORMS, "tokens heads"),
    "phi3": Case(
        "phi3",
        {},
        {
            "qkv_proj": [
                made("q", torch.arange(64).view(4, 16), half()),
                made("k", torch.arange(64, 96).view(2, 16), half()),
            ]
        },
    ),
    "qwen3_5": Case(  # each head has its q, then its gate
        "qwen3_5_text",
        {"layer_types": ["full_attention"] * 2},
        {
            "q_proj": [made("q", torch.arange(128).view(4, 2, 16)[:, 0], half(4))],
            "k_proj": [made("k", torch.arange(32).view(2, 16), half(4))],
        },
        NORMS,
        "tokens heads",
    ),
    "deepseek_v3": Case(
        "deepseek_v3",
        {
            "q_lora_rank": 24,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 12,
            "qk_rope_head_dim": 8,
            "v_head_dim": 10,
            "head_dim": 8,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 2,  # no experts
        },
        {
            "q_b_proj": [Made("q", torch.arange(80).view(4, 20), neighbours(8, 12), MLA_SEEN)],
            "kv_b_proj": [made("k", torch.arange(88).view(4, 22)[:, :12], [])],
        },
    ),
    "smollm3": Case("smollm3", {"no_rope_layers": [1, 0]}, separate(half()), plain_layers=(1,)),
    "hunyuan": Case(
        "hunyuan_v1_dense",
        {},
        separate(half()),
        {"q": "query_layernorm", "k": "key_layernorm"},
        "heads tokens",
        norm_after_rope=True,
    ),
}


def model_of(case: str, **options: Any) -> Any:
    model = tiny_model(CASES[case].arch, **{**CASES[case].options, **options})
    with torch.no_grad():  # norms that start at one show nothing
        for name, param in model.named_parameters():
            if "norm" in name:
                param.add_(torch.randn_like(param) * 0.3)
    return model


def attentions_of(model: nn.Module, case: str) -> list[tuple[str, nn.Module]]:
    """Qualified name and module of the attention of each layer."""
    leaf = next(iter(CASES[case].projections))
    names = [name.rpartition(".")[0] for name, _ in model.named_modules() if name.endswith(leaf)]
    return [(name, model.get_submodule(name)) for name in names]


# ---- the definition, in a few lines --------------------------------------------------------------


class Truth:
    """The model's own q and k, `[batch, tokens, heads, head_dim]` in float64, of every forward."""

    def __init__(self, model: Any, case: str) -> None:
        self.case = CASES[case]
        self.layers = attentions_of(model, case)
        places = ("projection", *(["norm"] if self.case.norms else []), "rope")
        self.seen: dict[str, dict[tuple[int, str], list[Tensor]]] = {
            place: {(i, kind): [] for i in range(len(self.layers)) for kind in "qk"}
            for place in places
        }
        self.hooks = []
        for i, (_, attention) in enumerate(self.layers):
            for leaf, all_made in self.case.projections.items():
                for one in all_made:
                    hook = partial(self._projected, i, one)
                    self.hooks.append(getattr(attention, leaf).register_forward_hook(hook))
            for kind, norm in self.case.norms.items():
                hook = partial(self._normed, i, kind)
                self.hooks.append(getattr(attention, norm).register_forward_hook(hook))

    def _keep(self, place: str, layer: int, kind: str, y: Tensor) -> None:
        self.seen[place][layer, kind].append(y.detach().double())

    def _projected(self, layer: int, one: Made, module: nn.Module, args: Any, y: Tensor) -> None:
        y = y.flatten(1, -2)  # DeepSeek's is [batch, 1, tokens, channels]
        self._keep("projection", layer, one.kind, y[..., one.rows])

    def _normed(self, layer: int, kind: str, module: nn.Module, args: Any, y: Tensor) -> None:
        if self.case.norm_shape == "heads tokens":
            y = y.transpose(1, 2)
        elif self.case.norm_shape == "flat":
            y = y.unflatten(-1, (-1, 16))
        self._keep("norm", layer, kind, y)

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kw: Any) -> Any:
        layer = next(i for i, (_, attention) in enumerate(self.layers) if attention is module)
        for all_made in self.case.projections.values():
            for one in all_made:
                y = query if one.kind == "q" else key
                self._keep("rope", layer, one.kind, y.transpose(1, 2)[..., one.seen])
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, *args, **kw)

    def check(self) -> None:
        """A rotation keeps the length of a pair: else what is above misread the model."""
        before = "norm" if self.case.norms and not self.case.norm_after_rope else "projection"
        if self.case.norm_after_rope:
            before = "rope"
        for all_made in self.case.projections.values():
            for one in all_made:
                for layer in range(len(self.layers)):
                    last = (self.seen[p][layer, one.kind] for p in (before, "rope"))
                    for y, rotated in zip(*last, strict=True):
                        for pair in one.pairs or [(c,) for c in range(y.shape[-1])]:
                            torch.testing.assert_close(
                                y[..., pair].norm(dim=-1),
                                rotated[..., pair].norm(dim=-1),
                                rtol=1e-4,
                                atol=1e-5,
                                equal_nan=True,
                            )

    def totals(
        self, place: str, masks: Sequence[Tensor], metric: str
    ) -> dict[tuple[int, str], Tensor]:
        """`[heads, head_dim]` over the unmasked tokens of all forwards."""
        totals = {}
        for key, ys in self.seen[place].items():
            assert len(ys) == len(masks)
            y = torch.cat([y[m.bool()] for y, m in zip(ys, masks, strict=True)])
            sums = {
                "mean_abs": y.abs().sum(0),
                "rms": y.square().sum(0),
                "max_abs": y.abs().amax(0),
            }
            totals[key] = sums[metric]
        return totals

    def clear(self) -> None:
        for of_place in self.seen.values():
            for ys in of_place.values():
                ys.clear()


@contextmanager
def truth_of(model: Any, case: str) -> Iterator[Truth]:
    truth = Truth(model, case)
    name, before = "longact_truth", model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register(name, truth.attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.config._attn_implementation = name
    try:
        yield truth
    finally:
        model.config._attn_implementation = before
        del ALL_ATTENTION_FUNCTIONS._global_mapping[name]
        del ALL_MASK_ATTENTION_FUNCTIONS._global_mapping[name]
        for hook in truth.hooks:
            hook.remove()


def best(ranked: list[tuple[float, list[int]]], keep: float) -> list[int]:
    """The rows of the units of largest magnitude."""
    count = max(1, math.floor(keep * len(ranked) + 0.5))
    in_order = sorted(ranked, key=lambda unit: (-unit[0], unit[1]))
    return [row for _, rows in in_order[:count] for row in rows]


def expected_rows(
    model: nn.Module,
    case: str,
    totals: dict[tuple[int, str], Tensor],
    *,
    metric: str,
    scope: str = "layer",
    pair_rope: bool = False,
    keep: float = KEEP,
) -> dict[str, list[int]]:
    what = CASES[case]
    rows: dict[str, list[int]] = {}
    together: dict[Any, list[tuple[str, float, list[int]]]] = {}
    for i, (block, attention) in enumerate(attentions_of(model, case)):
        for leaf, all_made in what.projections.items():
            name = f"{block}.{leaf}"
            ranked = {row for one in all_made for row in one.rows.flatten().tolist()}
            rows[name] = [
                r for r in range(getattr(attention, leaf).out_features) if r not in ranked
            ]
            for one in all_made:
                pairs = one.pairs if pair_rope and i not in what.plain_layers else []
                paired = {channel for pair in pairs for channel in pair}
                alone = [(c,) for c in range(one.rows.shape[1]) if c not in paired]
                for head, of_head in enumerate(one.rows.tolist()):
                    for unit in (*pairs, *alone):
                        values = [float(totals[i, one.kind][head, c]) for c in unit]
                        value = max(values) if metric == "max_abs" else sum(values)
                        group: tuple[Any, ...] = (one.kind, len(unit))
                        if scope != "model":
                            group = (*group, i, head if scope == "head" else None)
                        members = together.setdefault(group, [])
                        members.append((name, value, [of_head[c] for c in unit]))
    for members in together.values():
        # The name with the row, as rows of several projections have the same numbers.
        numbered = [(value, [j]) for j, (_, value, _) in enumerate(members)]
        for j in best(numbered, keep):
            name, _, unit_rows = members[j]
            rows[name] += unit_rows
    return {name: sorted(of_name) for name, of_name in rows.items()}


def counted(handle: longact.LongAct, case: str) -> dict[tuple[int, str], Tensor]:
    """`selection.magnitude` in the shape of `Truth.totals`."""
    totals = {}
    for name, layer in handle.projections.items():
        block, _, leaf = name.rpartition(".")
        index = next(int(part) for part in block.split(".") if part.isdigit())
        for one in CASES[case].projections[leaf]:
            assert layer.selection.magnitude is not None
            totals[index, one.kind] = layer.selection.magnitude[one.rows]
    return totals


def tokens_of(handle: longact.LongAct) -> set[int]:
    return {int(layer.selection.tokens) for layer in handle.projections.values()}  # type: ignore[arg-type]


#: Four rows of four tokens, as there are heads: no transposed layout goes unnoticed.
SQUARE = [padded("left", 4, 2, 4, 3), padded("right", 1, 4, 2, 4, seed=1)]
BATCHES = [padded("left", 9, 5), padded("right", 4, 11, seed=1)]

#: Both of pair_rope with each scope and with each metric.
OPTIONS = [
    {"scope": "layer", "pair_rope": False, "metric": "mean_abs"},
    {"scope": "layer", "pair_rope": True, "metric": "max_abs"},
    {"scope": "head", "pair_rope": False, "metric": "rms"},
    {"scope": "head", "pair_rope": True, "metric": "mean_abs"},
    {"scope": "model", "pair_rope": False, "metric": "max_abs"},
    {"scope": "model", "pair_rope": True, "metric": "rms"},
]
EVERY = [
    (case, capture)
    for case, what in CASES.items()
    for capture in ("projection", "norm", "rope")
    if capture != "norm" or what.norms
]


# ---- which rows ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "capture"), EVERY)
def test_rows_are_the_largest_of_the_models_own_q_and_k(case: str, capture: Any) -> None:
    model = model_of(case)
    batches = SQUARE if case == "gemma3-square" else BATCHES
    masks = [mask for _, mask in batches]
    outputs = [model(input_ids=ids, attention_mask=mask).logits for ids, mask in batches]
    for options in OPTIONS:
        with longact.apply(model, KEEP, capture=capture, **options) as handle:
            with truth_of(model, case) as truth:
                # Two forwards before the selection.
                for (ids, mask), output in zip(batches, outputs, strict=True):
                    logits = model(input_ids=ids, attention_mask=mask).logits
                    assert_same_bits(logits[mask.bool()], output[mask.bool()], case)
            if options is OPTIONS[0]:
                truth.check()
            totals = truth.totals(capture, masks, options["metric"])
            assert tokens_of(handle) == {int(sum(mask.sum() for mask in masks))}
            for key, total in counted(handle, case).items():
                torch.testing.assert_close(total.double(), totals[key], rtol=1e-5, atol=1e-6)
            handle.refresh()
            assert rows_of(handle) == expected_rows(model, case, totals, **options), options


def test_the_places_select_different_rows() -> None:
    model, rows = model_of("qwen3"), []
    for capture in ("projection", "norm", "rope"):
        with longact.apply(model, KEEP, capture=capture) as handle:
            model(input_ids=token_ids())
            handle.refresh()
            rows.append(rows_of(handle))
    assert rows[0] != rows[1] != rows[2] != rows[0]


# ---- when: steps, micro-batches, checkpointing ---------------------------------------------------

#: A norm with heads first, a fused projection with norms, pairs of fused q and k.
SOME = [("gemma3", "norm", False), ("persimmon", "rope", True), ("phi3", "projection", True)]


def changes(model: nn.Module, handle: longact.LongAct, before: dict[str, Tensor]) -> Any:
    after = params_of(model)
    return {n: changed_rows(before[f"{n}.weight"], after[f"{n}.weight"]) for n in handle.rows}


@pytest.mark.parametrize(("case", "capture", "pair_rope"), SOME)
def test_a_step_trains_what_its_micro_batches_counted(
    case: str, capture: Any, pair_rope: bool
) -> None:
    model = model_of(case)
    handle = longact.apply(model, KEEP, capture=capture, pair_rope=pair_rope)
    optimizer, masks = adam(model), [mask for _, mask in BATCHES]
    options = {"metric": "mean_abs", "pair_rope": pair_rope}
    with truth_of(model, case) as truth:
        for step in range(3):
            held = rows_of(handle)
            before = params_of(model)
            for ids, mask in BATCHES:
                forward_backward(model, ids.roll(step, 0), attention_mask=mask.roll(step, 0))
            rolled = [mask.roll(step, 0) for mask in masks]
            chosen = expected_rows(
                model, case, truth.totals(capture, rolled, "mean_abs"), **options
            )
            truth.clear()
            optimizer.step()
            optimizer.zero_grad()
            # The first step selects from its own forwards, later ones for the next.
            assert changes(model, handle, before) == (chosen if step == 0 else held)
            assert rows_of(handle) == chosen
            assert tokens_of(handle) == {0}


@pytest.mark.parametrize(("case", "capture", "pair_rope"), SOME)
def test_only_training_forwards_count(case: str, capture: Any, pair_rope: bool) -> None:
    model = model_of(case)
    handle = longact.apply(model, capture=capture, pair_rope=pair_rope)
    with torch.no_grad():
        model(input_ids=token_ids())
    model.eval()
    model(input_ids=token_ids()).logits.sum().backward()
    model.generate(token_ids(1, 4), max_new_tokens=2, do_sample=False)
    assert tokens_of(handle) == {0}
    assert not any(layer.selection.magnitude.any() for layer in handle.projections.values())
    model.train()(input_ids=token_ids())
    assert tokens_of(handle) == {24}


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize(("case", "capture", "pair_rope"), SOME)
def test_activation_checkpointing_changes_no_bit(
    case: str, capture: Any, pair_rope: bool, reentrant: bool
) -> None:
    models = [model_of(case) for _ in range(2)]
    models[0].gradient_checkpointing_enable({"use_reentrant": reentrant})
    handles = [longact.apply(m, capture=capture, pair_rope=pair_rope) for m in models]
    optimizers = [adam(m) for m in models]
    calls: list[nn.Module] = []
    next(iter(handles[0].projections.values())).register_forward_hook(lambda m, *_: calls.append(m))
    for _ in range(2):
        for ids, mask in BATCHES:
            for model in models:
                forward_backward(model, ids, attention_mask=mask)
        assert_same_tree(handles[0].state_dict(), handles[1].state_dict())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert len(calls) == 8  # the forward did run twice
    assert_same_tree(handles[0].state_dict(), handles[1].state_dict())
    assert_same_params(*models)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("persimmon", {"capture": "rope", "pair_rope": True, "scope": "head"}),
        ("phi3", {"pair_rope": True, "refresh_every": "forward"}),
    ],
)
def test_a_compiled_model_selects_as_the_eager_one(case: str, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    models = [model_of(case, num_hidden_layers=1) for _ in range(2)]
    handles = [longact.apply(m, **options) for m in models]
    optimizers = [adam(m, lr=1e-3) for m in models]
    compiled = torch.compile(models[0], fullgraph=True, backend="aot_eager")
    for step in range(3):
        ids, mask = padded("left", 12, 7, seed=step)
        for model, optimizer in zip((compiled, models[1]), optimizers, strict=True):
            forward_backward(model, ids, attention_mask=mask)
            optimizer.step()
            optimizer.zero_grad()
        assert None not in handles[0].rows.values()
        assert rows_of(handles[0]) == rows_of(handles[1])
        assert tokens_of(handles[0]) == {0}
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", ["llama", "persimmon"])
def test_under_autocast_what_the_scores_have_is_counted(case: str) -> None:
    model = model_of(case)
    handle = longact.apply(model, capture="rope")
    ids, mask = BATCHES[0]
    with truth_of(model, case) as truth, torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids, attention_mask=mask)
    for key, total in counted(handle, case).items():
        expected = truth.totals("rope", [mask], "mean_abs")[key]
        torch.testing.assert_close(total.double(), expected, rtol=1e-2, atol=1e-2)


# ---- each forward its own rows -------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["layer", "head"])
@pytest.mark.parametrize("case", ["llama", "phi3", "gpt_neox", "deepseek_v3"])
def test_each_forward_selects_pairs_for_its_own_backward(case: str, scope: str) -> None:
    model = model_of(case)
    handle = longact.apply(model, KEEP, pair_rope=True, scope=scope, refresh_every="forward")
    optimizer = adam(model)
    for _ in range(2):
        union: dict[str, set[int]] = {name: set() for name in handle.rows}
        before = params_of(model)
        for ids, mask in BATCHES:
            with truth_of(model, case) as truth:
                loss = model(input_ids=ids, attention_mask=mask, labels=ids).loss
            totals = truth.totals("projection", [mask], "mean_abs")
            chosen = expected_rows(
                model, case, totals, metric="mean_abs", scope=scope, pair_rope=True
            )
            weights = [layer.weight for layer in handle.projections.values()]
            grads = torch.autograd.grad(loss, weights, retain_graph=True)
            for (name, rows), grad in zip(chosen.items(), grads, strict=True):
                assert grad.any(1).nonzero().flatten().tolist() == rows, name
                union[name] |= set(rows)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert rows_of(handle) == {name: sorted(rows) for name, rows in union.items()}
        assert changes(model, handle, before) == rows_of(handle)


# ---- copies, checkpoints, removal ----------------------------------------------------------------


@pytest.mark.parametrize("capture", ["norm", "rope"])
def test_a_pickled_model_counts_for_itself(capture: Any) -> None:
    model = tiny_model("qwen3")
    longact.apply(model, capture=capture)
    twin = pickle.loads(pickle.dumps(model))
    twin(input_ids=token_ids())
    own, other = (m.get_submodule(Q0).selection for m in (model, twin))
    assert int(own.tokens) == 0
    assert int(other.tokens) == token_ids().numel()
    model(input_ids=token_ids())
    assert torch.equal(own.magnitude, other.magnitude)


@pytest.mark.parametrize(("case", "capture", "pair_rope"), SOME)
def test_a_copy_counts_for_itself(case: str, capture: Any, pair_rope: bool) -> None:
    model = model_of(case)
    handle = longact.apply(model, capture=capture, pair_rope=pair_rope)
    model(input_ids=token_ids())
    before = copy.deepcopy(handle.state_dict())
    twin = copy.deepcopy(model)
    twin(input_ids=token_ids(seed=1))
    assert_same_tree(handle.state_dict(), before)
    model(input_ids=token_ids(seed=1))
    for name, layer in handle.projections.items():
        selection = twin.get_submodule(name).selection
        assert int(selection.tokens) == 48
        assert_same_bits(selection.magnitude, layer.selection.magnitude, name)
    handle.remove()  # of the original only
    twin(input_ids=token_ids())
    assert {int(twin.get_submodule(name).selection.tokens) for name in before["projections"]} == {
        72
    }
    optimizer = adam(twin)
    train_step(twin, optimizer, token_ids())
    assert all(twin.get_submodule(name).rows is not None for name in before["projections"])


@pytest.mark.parametrize(("case", "capture", "pair_rope"), SOME)
def test_remove_takes_every_hook_away(case: str, capture: Any, pair_rope: bool) -> None:
    model = model_of(case)
    hooks = hooks_of(model)
    handle = longact.apply(model, capture=capture, pair_rope=pair_rope)
    layers = list(handle.projections.values())
    with pytest.raises(ValueError, match="already"):
        longact.apply(model)
    model(input_ids=token_ids())
    handle.remove()
    assert hooks_of(model) == hooks
    model(input_ids=token_ids())
    assert {int(layer.selection.tokens) for layer in layers} == {24}  # type: ignore[arg-type]


def test_two_handles_capture_in_different_places() -> None:
    both, q_only, k_only = (model_of("qwen3") for _ in range(3))
    handles = [
        longact.apply(both, targets="q_proj", capture="norm"),
        longact.apply(both, targets="k_proj", capture="rope", pair_rope=True),
    ]
    alone = [
        longact.apply(q_only, targets="q_proj", capture="norm"),
        longact.apply(k_only, targets="k_proj", capture="rope", pair_rope=True),
    ]
    for model in (both, q_only, k_only):
        model(input_ids=token_ids())
    for handle, one in zip(handles, alone, strict=True):
        assert tokens_of(handle) == {24}
        assert_same_tree(handle.state_dict(), one.state_dict())
    handles[0].remove()
    both(input_ids=token_ids())
    assert tokens_of(handles[1]) == {48}


@pytest.mark.parametrize(("case", "capture", "pair_rope"), SOME)
def test_state_dict_resumes_in_mid_run_bit_for_bit(
    case: str, capture: Any, pair_rope: bool
) -> None:
    options: dict[str, Any] = {"capture": capture, "pair_rope": pair_rope, "refresh_every": 2}
    model = model_of(case)
    handle, optimizer = longact.apply(model, **options), adam(model)
    train_step(model, optimizer, token_ids())
    model(input_ids=token_ids(seed=1))  # of the next step, counted already
    file = io.BytesIO()
    torch.save((model.state_dict(), handle.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state, moments = torch.load(file, weights_only=True)

    twin = model_of(case, seed=7)
    twin.load_state_dict(weights)
    twin_handle, twin_optimizer = longact.apply(twin, **options), adam(twin)
    twin_optimizer.load_state_dict(moments)
    twin_handle.load_state_dict(state)
    for step in range(3):
        train_step(model, optimizer, token_ids(seed=step))
        train_step(twin, twin_optimizer, token_ids(seed=step))
        assert_same_tree(twin_handle.state_dict(), handle.state_dict())
    assert_same_params(twin, model)


def test_the_arguments_say_where_it_counts() -> None:
    model = model_of("qwen3")
    with longact.apply(model, capture="rope", pair_rope=True) as handle:
        arguments = handle.arguments
        assert (arguments["capture"], arguments["pair_rope"]) == ("rope", True)
        model(input_ids=token_ids())
        handle.refresh()
        rows = rows_of(handle)
    with longact.apply(model, **arguments) as again:
        again.check_arguments(arguments, "a checkpoint")
        model(input_ids=token_ids())
        again.refresh()
        assert rows_of(again) == rows
        without = {k: v for k, v in arguments.items() if k not in ("capture", "pair_rope")}
        match = r"capture: 'projection' in .*; pair_rope: False"
        with pytest.raises(ValueError, match=match):  # of an older longact
            again.check_arguments(without, "a checkpoint")


# ---- non-finite magnitudes -----------------------------------------------------------------------


@pytest.mark.parametrize("capture", ["projection", "rope"])
@pytest.mark.parametrize("scope", ["layer", "head", "model"])
@pytest.mark.parametrize("kind", ["q", "k"])
def test_one_spoiled_kind_keeps_the_whole_projections_rows(
    kind: str, scope: Any, capture: Any
) -> None:
    model = model_of("phi3")
    handle = longact.apply(model, scope=scope, capture=capture, pair_rope=True)
    names = list(handle.projections)
    model(input_ids=token_ids())
    handle.refresh()
    previous = handle.rows
    weight = handle.projections[names[1]].weight  # of the last layer: nothing comes after it
    one = CASES["phi3"].projections["qkv_proj"]["qk".index(kind)]
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[one.rows[0, 3], 0] = math.nan
    model(input_ids=token_ids(seed=1))
    with pytest.warns(longact.LongActWarning, match=names[1]) as warned:
        handle.refresh()
    assert len(warned) == 1
    assert handle.rows[names[1]] is previous[names[1]]
    assert (handle.rows[names[0]] is previous[names[0]]) == (scope == "model")
    assert tokens_of(handle) == {0}
    with torch.no_grad():
        weight.copy_(kept)
    model(input_ids=token_ids(seed=1))
    handle.refresh()
    assert handle.rows[names[1]] is not previous[names[1]]


def test_a_spoiled_forward_keeps_the_rows_of_the_one_before() -> None:
    model = model_of("phi3", num_hidden_layers=1)
    handle = longact.apply(model, pair_rope=True, refresh_every="forward")
    ((name, layer),) = handle.projections.items()
    forward_backward(model, token_ids())
    assert layer.weight.grad is not None
    rows = layer.weight.grad.any(1).nonzero().flatten().tolist()
    with torch.no_grad():
        kept = layer.weight[70, 0].clone()
        layer.weight[70, 0] = math.inf  # a channel of k
    with pytest.warns(longact.LongActWarning, match=name):
        model(input_ids=token_ids(seed=1))
    with torch.no_grad():
        layer.weight[70, 0] = kept
    longact.FusedMaskedAdam(model.parameters()).step()
    assert rows_of(handle) == {name: rows}


# ---- several at once -----------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["layer", "head", "model"])
def test_plain_and_fused_models_under_one_optimizer_select_as_if_alone(scope: Any) -> None:
    kinds = [
        ("llama", {"keep_ratio": 0.4}),
        ("phi3", {"pair_rope": True}),
        ("llama", {"pair_rope": True, "capture": "rope"}),
        ("gpt_neox", {"metric": "max_abs"}),
        ("persimmon", {"capture": "norm", "metric": "max_abs", "pair_rope": True}),
    ]

    def prepared() -> tuple[list[Any], list[longact.LongAct]]:
        models = [model_of(case, seed=i) for i, (case, _) in enumerate(kinds)]
        applied = zip(models, kinds, strict=True)
        return models, [longact.apply(m, scope=scope, **options) for m, (_, options) in applied]

    together, handles = prepared()
    alone, expected = prepared()
    optimizer = longact.FusedMaskedAdam([p for m in together for p in m.parameters()], lr=1e-2)
    optimizers = [longact.FusedMaskedAdam(m.parameters(), lr=1e-2) for m in alone]
    for step in range(2):
        for i in range(len(kinds)):
            ids = token_ids(seed=10 * step + i)
            forward_backward(together[i], ids)
            train_step(alone[i], optimizers[i], ids)
        optimizer.step()
        optimizer.zero_grad()
        for handle, other in zip(handles, expected, strict=True):
            assert_same_tree(handle.state_dict(), other.state_dict())
    for model, other in zip(together, alone, strict=True):
        assert_same_params(model, other)


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "options", "match"),
    [
        ("llama", {"capture": "norm"}, "capture='norm': LlamaAttention has no norm.*'rope'"),
        ("phi", {"capture": "norm"}, "capture='norm': PhiAttention has no norm"),
        ("mpt", {"capture": "rope"}, "capture='rope': MptAttention has no rotary.*'projection'"),
        ("bloom", {"capture": "rope"}, "capture='rope': BloomAttention has no rotary"),
        ("mpt", {"pair_rope": True}, "pair_rope=True: MptAttention has no rotary.*leave it False"),
        ("llama", {"capture": "rope", "targets": "v_proj"}, "capture='rope': .*v_proj is no"),
        ("llama", {"pair_rope": True, "targets": ["q_proj", "v_proj"]}, "pair_rope=True: .*v_proj"),
        ("qwen3", {"capture": "norm", "targets": "q_proj[0:32]"}, "capture=.norm.: .*range of"),
        ("llama", {"capture": "rope", "refresh_every": "forward"}, "'forward'.*'rope'.*=1"),
        ("qwen3", {"capture": "norm", "refresh_every": "forward"}, "'forward'.*'norm'.*=1"),
        ("llama", {"capture": "Rope"}, "capture='Rope': use 'projection', 'norm' or 'rope'"),
        ("llama", {"capture": None}, "capture=None"),
        ("llama", {"pair_rope": 1}, "pair_rope=1: use True or False"),
        ("llama", {"pair_rope": None}, "pair_rope=None"),
    ],
)  # fmt: skip
def test_what_a_model_lacks_is_refused_and_changes_nothing(
    arch: str, options: dict[str, Any], match: str
) -> None:
    extra = {"head_dim": None} if arch in ("mpt", "bloom") else {}
    refused(tiny_model(arch, **extra), ValueError, match, **options)
