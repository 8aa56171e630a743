"""Every entry of `longact.architectures.ARCHITECTURES` against the real transformers class."""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from helpers import assert_same_bits, assert_same_tree
from models import token_ids
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import longact
from longact.architectures import ARCHITECTURES, INTERLEAVED, Attention, Heads, heads_of, recognise

# ---- tiny models ---------------------------------------------------------------------------------

TEXT = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
    "initializer_range": 0.15,
}
MOE = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
MLA = {
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "num_key_value_heads": 4,
    "head_dim": None,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_state": 8, "mamba_chunk_size": 8, "mamba_d_ssm": 64}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
SECTIONS = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
}
HYBRID = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}


class Case(NamedTuple):
    """A config to test an entry with; None leaves an option of `TEXT` out."""

    model_type: str
    options: dict[str, Any]


#: What a text model needs besides `TEXT`.
SPECIAL: dict[str, dict[str, Any]] = {
    "afmoe": MOE | HYBRID,
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "cohere2": HYBRID,
    "cohere2_moe": MOE | HYBRID,
    "dbrx": {
        **dict.fromkeys(TEXT),
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 128,
        "vocab_size": 64,
        "use_cache": False,
        "initializer_range": 0.15,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 100.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 2},
    },
    "deepseek_v2": MLA | MOE,
    "deepseek_v3": MLA | MOE,
    "deepseek_v32": MLA | MOE | {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 4},
    "dots1": MOE,
    "ernie4_5_moe": MOE,
    "exaone4": HYBRID,
    "exaone_moe": MOE | HYBRID,
    "falcon": {"head_dim": None},
    "falcon_h1": MAMBA,
    "flex_olmo": MOE,
    "gemma2": HYBRID,
    "gemma3_text": HYBRID,
    "gemma3n_text": {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "num_kv_shared_layers": 1,
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 8,
    },
    "gemma4_text": HYBRID
    | {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "global_head_dim": 32},
    "glm4_moe": MOE | {"use_qk_norm": True},
    "glm4_moe_lite": MLA | MOE,
    "glm4v_moe_text": MOE
    | {"rope_parameters": SECTIONS["rope_parameters"] | {"mrope_section": [1, 1, 2]}},
    "glm4v_text": SECTIONS,
    "glm_moe_dsa": MLA | MOE | {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 4},
    "glm_ocr_text": SECTIONS,
    "gpt_oss": MOE,
    "gptj": {"rotary_dim": 8, "head_dim": None},
    "granitemoehybrid": MAMBA
    | {
        "layer_types": ["mamba", "attention"],
        "position_embedding_type": "rope",
        "shared_intermediate_size": 16,
    },
    "hunyuan_v1_moe": {"num_experts": 2, "moe_topk": [1, 1]},
    "hy_v3": MOE,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2},
    "kimi_linear": MLA | MOE | LINEAR | {"linear_num_heads": 2, "linear_head_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": MOE | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4_text": {
        "num_local_experts": 2,
        "intermediate_size_mlp": 32,
        "no_rope_layers": [1, 0],
        "use_qk_norm": False,
    },
    "mellum": MOE | HYBRID,
    "mimo_v2_flash": MOE | HYBRID | {"v_head_dim": 8},
    "minicpm3": MLA,
    "minimax": MOE | {"layer_types": ["linear_attention", "full_attention"]},
    "minimax_m2": MOE,
    "mistral4": MLA | MOE,
    "mixtral": MOE,
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "full_attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
    },
    "olmo3": HYBRID,
    "olmoe": MOE,
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 64},
    "phimoe": MOE,
    "qwen2_5_vl_text": SECTIONS,
    "qwen2_moe": MOE,
    "qwen2_vl_text": SECTIONS,
    "qwen3_5_moe_text": MOE | LINEAR,
    "qwen3_5_text": LINEAR,
    "qwen3_moe": MOE,
    "qwen3_next": MOE | LINEAR,
    "qwen3_vl_moe_text": MOE | SECTIONS,
    "qwen3_vl_text": SECTIONS,
    "smollm3": {"no_rope_layers": [1, 0]},
    "solar_open": MOE,
    "youtu": MLA,
}
MHA = {"num_key_value_heads": 4}
CASES: dict[str, Case] = {name: Case(name, SPECIAL.get(name, {})) for name in ARCHITECTURES} | {
    f"{name}-{variant}": Case(name, SPECIAL.get(name, {}) | options)
    for name, variant, options in [
        ("llama", "mha", MHA),
        ("llama", "bias", {"attention_bias": True}),
        ("qwen3", "wide_heads", {"head_dim": 24}),
        ("cohere", "qk_norm", {"use_qk_norm": True}),
        ("phi", "qk_norm", {"qk_layernorm": True}),
        ("stablelm", "qk_norm", {"qk_layernorm": True}),
        ("persimmon", "no_qk_norm", {"qk_layernorm": False}),
        ("glm4_moe", "no_qk_norm", {"use_qk_norm": False}),
        ("phi3", "mha", MHA),
        ("phi3", "partial", {"partial_rotary_factor": 0.5}),
        ("falcon", "multi_query", {"multi_query": True}),
        ("falcon", "multi_head", {"multi_query": False, "bias": True}),
        ("falcon", "grouped", {"new_decoder_architecture": True, "num_kv_heads": 2}),
        (
            "falcon",
            "grouped_no_multi_query",
            {"new_decoder_architecture": True, "num_kv_heads": 2, "multi_query": False},
        ),
        ("falcon", "alibi", {"alibi": True}),
        ("gpt_neox", "whole", {"rotary_pct": 1.0}),
        ("gpt_bigcode", "multi_head", {"multi_query": False}),
        ("gpt_bigcode", "cross_attention", {"multi_query": False, "add_cross_attention": True}),
        ("deepseek_v2", "no_q_lora", {"q_lora_rank": None}),
        ("deepseek_v3", "no_q_lora", {"q_lora_rank": None}),
        ("kimi_linear", "no_q_lora", {"q_lora_rank": None}),
        ("exaone4", "all_global", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
        ("gemma4_text", "k_is_v", {"attention_k_eq_v": True}),
        ("granitemoehybrid", "no_rope", {"position_embedding_type": "nope"}),
        ("minimax_m2", "partial", {"rotary_dim": 8}),
    ]
}


def tiny(case: str, **options: Any) -> Any:
    """A base model of two layers or three."""
    model_type, special = CASES[case]
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    settings = {k: v for k, v in (TEXT | special).items() if v is not None or k not in TEXT}
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(model_type, **settings), **options)
    with torch.no_grad():  # biases that start at zero and norms that start at one show nothing
        for name, param in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(param, std=0.1)
            elif param.dim() == 1:
                param.add_(torch.randn_like(param) * 0.1)
    return model.eval()


def projections_of(
    tower: nn.Module, entry: Attention
) -> Iterator[tuple[str, nn.Module, nn.Linear, list[Heads]]]:
    """Name, attention module, projection and its heads."""
    for name, module in tower.named_modules():
        parent, _, leaf = name.rpartition(".")
        if leaf in entry.projections:
            attention = tower.get_submodule(parent)
            assert isinstance(module, nn.Linear)
            if heads := heads_of(attention, leaf, module, entry):
                yield name, attention, module, heads


# ---- the model's own q and k ---------------------------------------------------------------------


class Seen(NamedTuple):
    q: Tensor  # [batch, tokens, heads, head_dim], what attends
    k: Tensor


Recorded = dict[nn.Module, Seen]


class _Calls(TorchFunctionMode):
    """Classes that do not look their attention up: the operation that takes q and k, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor]] = []  # [batch, heads, tokens, head_dim]

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention:  # Falcon
            self.calls.append((args[0], args[1]))
        elif func is torch.matmul and args[0].shape[-2:] != (args[0].shape[-2],) * 2:  # MPT
            self.calls.append((args[0], args[1].transpose(-1, -2)))
        elif func is Tensor.baddbmm:  # BLOOM
            q, k = kwargs["batch1"], kwargs["batch2"].transpose(-1, -2)
            self.calls.append((q.unflatten(0, (BATCH, -1)), k.unflatten(0, (BATCH, -1))))
        return func(*args, **kwargs)


BATCH, LENGTH = 2, 7


def _tokens_first(y: Tensor) -> Tensor:
    return y.detach().transpose(1, 2).clone()


@contextmanager
def recording(model: Any, attentions: list[nn.Module]) -> Iterator[Recorded]:
    seen: Recorded = {}

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, None]:
        seen[module] = Seen(_tokens_first(query), _tokens_first(key))
        batch, heads, tokens, _ = query.shape
        return value.new_zeros(batch, tokens, heads, value.shape[-1]), None

    if model.config.model_type in ("falcon", "mpt", "bloom"):
        with _Calls() as mode:
            yield seen
        calls = [c for c in mode.calls if c[0].dim() == 4]
        for module, (q, k) in zip(attentions, calls, strict=True):
            seen[module] = Seen(_tokens_first(q), _tokens_first(k))
        return
    name = "longact_recording"
    ALL_ATTENTION_FUNCTIONS.register(name, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    before = model.config._attn_implementation
    model.config._attn_implementation = name
    try:
        yield seen
    finally:
        model.config._attn_implementation = before
        del ALL_ATTENTION_FUNCTIONS._global_mapping[name]
        del ALL_MASK_ATTENTION_FUNCTIONS._global_mapping[name]


IDS = token_ids(BATCH, LENGTH)


def run(model: Any) -> Recorded:
    entry = ARCHITECTURES[model.config.model_type]
    attentions = list(dict.fromkeys(a for _, a, _, _ in projections_of(model, entry)))
    with torch.no_grad(), recording(model, attentions) as seen:
        model(input_ids=IDS, use_cache=False)
    if not seen:
        pytest.skip("this transformers attends inside of the class")
    return seen


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def own(seen: Seen, heads: Heads) -> Tensor:
    """The model's own q or k in the shape of `heads`, without what it repeats or appends."""
    y = seen.q if heads.kind == "q" else seen.k
    count, head_dim = heads.rows.shape
    if y.shape[2] > count:  # Falcon repeats each k head for its group
        groups = y.unflatten(2, (count, -1))
        assert torch.equal(groups, groups[:, :, :, :1].expand_as(groups))
        y = groups[:, :, :, 0]
    return y[..., :head_dim]  # MLA appends the rotated part, one for all heads


def placed(y: Tensor, heads: Heads, entry: Attention) -> Tensor:
    """`y [..., head_dim]` with its channels where the model has them after the rotation."""
    if heads.rotated and entry.rope is INTERLEAVED and "kv_b_proj" in entry.projections:
        # These put the first channels of all pairs before the second ones.
        first, second = entry.rope.split(heads.rotated)
        return torch.cat((y[..., : heads.rotated.start], y[..., first], y[..., second]), -1)
    return y


# ---- the entries ---------------------------------------------------------------------------------


def test_every_entry_has_a_case() -> None:
    assert {case.model_type for case in CASES.values()} == set(ARCHITECTURES)
    assert set(SPECIAL) <= set(ARCHITECTURES)
    assert list(ARCHITECTURES) == sorted(ARCHITECTURES)


#: The attention scales q by itself.
SCALES = {"opt": 16**-0.5}


@pytest.mark.parametrize("case", CASES)
def test_the_rows_normalized_and_rotated_are_the_models_own_q_and_k(case: str) -> None:
    model = tiny(case)
    entry = ARCHITECTURES[model.config.model_type]
    found = list(projections_of(model, entry))
    outputs: dict[nn.Module, Tensor] = {}
    norms: dict[tuple[nn.Module, str], tuple[Tensor, Tensor]] = {}
    embeddings: dict[nn.Module, Any] = {}

    def keep_output(module: nn.Module, args: Any, output: Tensor) -> None:
        outputs[module] = output.detach().reshape(BATCH, LENGTH, -1).clone()

    def keep_norm(key: Any, module: nn.Module, args: Any, output: Tensor) -> None:
        norms[key] = (args[0].detach().clone(), output.detach().clone())

    def keep_embeddings(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(module.forward).bind_partial(*args, **kwargs)
        embeddings[module] = bound.arguments.get("position_embeddings")

    for _, attention, linear, all_heads in found:
        linear.register_forward_hook(keep_output)
        attention.register_forward_pre_hook(keep_embeddings, with_kwargs=True)
        for heads in all_heads:
            norm = getattr(attention, entry.norms.get(heads.kind, ""), None)
            if norm is not None:
                norm.register_forward_hook(functools.partial(keep_norm, (attention, heads.kind)))
    seen = run(model)

    def by_head(y: Tensor, heads: Heads) -> Tensor:
        y = y.transpose(1, 2) if entry.heads_first else y
        return y.reshape(BATCH, LENGTH, *heads.rows.shape)

    def rotated(y: Tensor, heads: Heads, attention: nn.Module) -> Tensor:
        if not heads.rotated:
            return y
        assert entry.rope is not None
        if embeddings[attention] is None:
            with pytest.raises(NotImplementedError, match="older transformers"):
                entry.rope.rotate(y, heads.rotated, None)
            pytest.skip("this transformers rotates inside of the attention")
        return placed(entry.rope.rotate(y, heads.rotated, embeddings[attention]), heads, entry)

    kinds = []
    for name, attention, linear, all_heads in found:
        for heads in all_heads:
            y = outputs[linear][..., heads.rows]
            if (attention, heads.kind) not in norms:
                y = rotated(y, heads, attention)
            elif entry.norm_after_rope:
                before, after = norms[attention, heads.kind]
                assert _same(rotated(y, heads, attention), by_head(before, heads)), name
                y = by_head(after, heads)
            else:
                before, after = norms[attention, heads.kind]
                assert torch.equal(y, by_head(before, heads)), name
                y = rotated(by_head(after, heads), heads, attention)
            if heads.kind == "q":
                y = y * SCALES.get(case, 1)
            assert _same(y, own(seen[attention], heads)), name
            kinds.append(heads.kind)
    assert kinds.count("q") >= kinds.count("k")
    assert kinds.count("k") > 0


def sample(rows: Tensor) -> list[int]:
    """The first, the last and one in the middle."""
    flat = rows.flatten().tolist()
    return [flat[0], flat[len(flat) // 2], flat[-1]]


@pytest.mark.parametrize("case", CASES)
def test_a_row_moves_the_channel_that_it_claims_and_no_other(case: str) -> None:
    model = tiny(case)
    entry = ARCHITECTURES[model.config.model_type]
    found = list(projections_of(model, entry))
    # A norm would spread what one row does over its head.
    for _, attention, _, _ in found:
        for norm in (*entry.norms.values(), "qk_norm"):
            if hasattr(attention, norm):
                setattr(attention, norm, nn.Identity())
    inputs: dict[nn.Module, tuple[Any, Any]] = {}

    def keep_inputs(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        inputs[module] = copy.deepcopy((args, kwargs))  # layers may share what they write to

    for _, attention, _, _ in found:
        attention.register_forward_pre_hook(keep_inputs, with_kwargs=True)
    start = run(model)
    for name, attention, linear, all_heads in found:
        claimed = torch.cat([heads.rows.flatten() for heads in all_heads])
        assert claimed.unique().numel() == claimed.numel(), f"{name}: a row is claimed twice"
        assert claimed.min() >= 0
        others = torch.ones(linear.out_features, dtype=torch.bool)
        others[claimed] = False
        rows = [row for heads in all_heads for row in sample(heads.rows)]
        # The first rotated channel of the last head, whose pair turns fast enough to be seen.
        rows += [int(heads.rows[-1, heads.rotated[0]]) for heads in all_heads if heads.rotated]
        rows += sample(others.nonzero()) if others.any() else []
        for row in dict.fromkeys(rows):
            with torch.no_grad():
                kept = linear.weight[row].clone()
                linear.weight[row].add_(1.0)
                args, kwargs = copy.deepcopy(inputs[attention])
                with recording(model, [attention]) as seen:
                    attention(*args, **kwargs)
                linear.weight[row].copy_(kept)
            now = seen[attention]
            kinds = [heads.kind for heads in all_heads]
            for kind in ("q", "k"):
                if kind not in kinds:
                    was, is_now = (getattr(s, kind) for s in (start[attention], now))
                    assert torch.equal(was, is_now), f"{name}[{row}] moves {kind}"
            for heads in all_heads:
                moved = (own(start[attention], heads) != own(now, heads)).any(0).any(0)
                itself = heads.rows == row
                allowed, must = itself.clone(), itself
                if heads.rotated:
                    assert entry.rope is not None
                    first, second = entry.rope.split(heads.rotated)
                    pair = itself[:, first] | itself[:, second]
                    allowed[:, first] |= pair
                    allowed[:, second] |= pair
                    if itself[:, heads.rotated[0]].any():
                        must = allowed
                what = f"{name}[{row}], {heads.kind}"
                assert not (moved & ~placed(allowed, heads, entry)).any(), f"{what}: others move"
                assert not (placed(must, heads, entry) & ~moved).any(), f"{what}: does not move"


def test_linear_attention_and_shared_keys_are_left_alone() -> None:
    def linears(case: str) -> tuple[set[str], set[str]]:
        model = tiny(case)
        entry = ARCHITECTURES[model.config.model_type]
        names = {n for n, _ in model.named_modules() if n.rpartition(".")[2] in entry.projections}
        return names, {name for name, _, _, _ in projections_of(model, entry)}

    names, found = linears("kimi_linear-no_q_lora")
    assert names - found == {"layers.0.self_attn.q_proj"}  # its k_proj is none of MLA's names
    names, found = linears("gemma4_text-k_is_v")
    assert names - found == {"layers.1.self_attn.k_proj"}


# ---- checks --------------------------------------------------------------------------------------


def test_rows_that_do_not_fit_the_heads_are_refused() -> None:
    model = tiny("llama")
    attention = model.layers[0].self_attn
    entry = ARCHITECTURES["llama"]
    with pytest.raises(ValueError, match=r"q_proj of LlamaAttention: 72 rows .* groups of 16"):
        heads_of(attention, "q_proj", nn.Linear(64, 72), entry)
    model = tiny("phi3")
    attention = model.layers[0].self_attn
    entry = ARCHITECTURES["phi3"]
    with pytest.raises(ValueError, match="qkv_proj of Phi3Attention: 112 rows do not hold 4 query"):
        heads_of(attention, "qkv_proj", nn.Linear(64, 112), entry)
    with pytest.raises(ValueError, match="64 rows do not hold 4 query heads of 16"):
        heads_of(attention, "qkv_proj", nn.Linear(64, 64), entry)
    model = tiny("deepseek_v3")
    attention = model.layers[0].self_attn
    attention.config.rope_interleave = False
    with pytest.raises(NotImplementedError, match="rope_interleave=False"):
        heads_of(attention, "q_b_proj", attention.q_b_proj, ARCHITECTURES["deepseek_v3"])


def test_sections_that_the_attention_mixes_itself_are_refused() -> None:
    rope = ARCHITECTURES["qwen2_vl_text"].rope
    assert rope is not None
    cos = torch.zeros(3, 1, 4, 16)
    with pytest.raises(NotImplementedError, match=r"\[3, 1, 4, 16\].*update transformers"):
        rope.rotate(torch.zeros(1, 4, 2, 16), range(16), (cos, cos))


# ---- longact.apply on all of them ----------------------------------------------------------------


def forwards(model: Any) -> list[Tensor]:
    """What it computes in evaluation, and in training with dropout."""
    with torch.no_grad():
        outputs = [model.eval()(input_ids=IDS).last_hidden_state]
    torch.manual_seed(0)
    outputs.append(model.train()(input_ids=IDS).last_hidden_state.detach())
    return outputs


def assert_same_outputs(case: str, actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        if case == "falcon-multi_head":  # FalconLinear adds a bias in a rounding of its own
            torch.testing.assert_close(a, e)
        else:
            assert_same_bits(a, e, case)


@pytest.mark.parametrize("case", CASES)
def test_apply_changes_no_output_and_remove_restores(case: str) -> None:
    model = tiny(case)
    found = list(projections_of(model, ARCHITECTURES[model.config.model_type]))
    modules = {name: id(module) for name, module in model.named_modules()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    expected = forwards(model)

    handle = longact.apply(model, keep_ratio=0.3)
    assert list(handle.projections) == [name for name, _, _, _ in found]
    assert_same_outputs(case, forwards(model), expected)
    assert_same_tree(dict(model.state_dict()), state)
    handle.refresh()
    for name, _, linear, all_heads in found:
        rows = handle.rows[name]
        assert rows is not None
        selected = torch.zeros(linear.out_features, dtype=torch.bool)
        selected[rows.long()] = True
        for heads in all_heads:
            ranked = heads.rows.flatten()
            kept = int(0.3 * ranked.numel() + 0.5)
            assert selected[ranked].sum() == kept, f"{name}: {heads.kind}"
            selected[ranked] = True
        assert selected.all(), f"{name}: rows that are neither q nor k stay trained"

    handle.remove()
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert_same_tree(dict(model.state_dict()), state)
    for actual, wanted in zip(forwards(model), expected, strict=True):
        assert_same_bits(actual, wanted, case)


@pytest.mark.parametrize("case", CASES)
def test_a_step_changes_the_selected_rows_and_no_other(case: str) -> None:
    model = tiny(case).train()
    handle = longact.apply(model, keep_ratio=0.3)
    optimizer = longact.FusedMaskedAdam(model.parameters(), lr=1e-2, weight_decay=0.1)
    before = {name: layer.weight.detach().clone() for name, layer in handle.projections.items()}
    hidden = model(input_ids=IDS).last_hidden_state
    (hidden * torch.randn_like(hidden)).sum().backward()
    optimizer.step()
    for name, weight in before.items():
        changed = (handle.projections[name].weight != weight).any(1).nonzero().flatten()
        assert torch.equal(changed.to(torch.int32), handle.rows[name]), name


ROTATING = [name for name, case in CASES.items() if ARCHITECTURES[case.model_type].rope]


@pytest.mark.parametrize("case", ROTATING)
def test_capture_rope_counts_the_models_own_q_and_k(case: str) -> None:
    model = tiny(case).train()
    entry = ARCHITECTURES[model.config.model_type]
    found = list(projections_of(model, entry))
    handle = longact.apply(model, capture="rope", refresh_every=0)
    attentions = list(dict.fromkeys(attention for _, attention, _, _ in found))
    if "position_embeddings" not in inspect.signature(attentions[0].forward).parameters:
        pytest.skip("this transformers rotates inside of the attention")
    with recording(model, attentions) as seen:
        model(input_ids=IDS)
    for name, attention, _, all_heads in found:
        selection = handle.projections[name].selection
        assert selection.magnitude is not None
        assert selection.tokens == IDS.numel()
        for heads in all_heads:
            expected = own(seen[attention], heads).abs().sum((0, 1))
            counted = placed(selection.magnitude[heads.rows], heads, entry)
            torch.testing.assert_close(counted, expected, msg=f"{name}: {heads.kind}")


# ---- which entry a model has ---------------------------------------------------------------------

VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "out_hidden_size": 64,
    "num_heads": 2,
    "intermediate_size": 32,
}


def text(model_type: str) -> dict[str, Any]:
    return TEXT | SPECIAL.get(model_type, {}) | {"model_type": model_type}


def vision(model_type: str, **options: Any) -> dict[str, Any]:
    return VISION | options | {"model_type": model_type}


#: Class -> its config, and the model_type of its text tower.
MULTIMODAL: dict[str, tuple[dict[str, Any], str]] = {
    "Qwen2VLForConditionalGeneration": (
        {
            "text_config": text("qwen2_vl_text"),
            "vision_config": QWEN_VISION | {"embed_dim": 32, "hidden_size": 64},
        },
        "qwen2_vl_text",
    ),
    "Qwen2_5_VLForConditionalGeneration": (
        {"text_config": text("qwen2_5_vl_text"), "vision_config": QWEN_VISION},
        "qwen2_5_vl_text",
    ),
    "Qwen3VLForConditionalGeneration": (
        {
            "text_config": text("qwen3_vl_text"),
            "vision_config": QWEN_VISION | {"deepstack_visual_indexes": [0]},
        },
        "qwen3_vl_text",
    ),
    "Qwen3_5ForConditionalGeneration": (
        {"text_config": text("qwen3_5_text"), "vision_config": QWEN_VISION},
        "qwen3_5_text",
    ),
    "Gemma3ForConditionalGeneration": (
        {"text_config": text("gemma3_text"), "vision_config": VISION, "mm_tokens_per_image": 4},
        "gemma3_text",
    ),
    "LlavaForConditionalGeneration": (
        {"text_config": text("llama"), "vision_config": vision("clip_vision_model")},
        "llama",
    ),
    "Mistral3ForConditionalGeneration": (
        {"text_config": text("mistral"), "vision_config": vision("pixtral")},
        "mistral",
    ),
    "Idefics3ForConditionalGeneration": (
        {"text_config": text("llama"), "vision_config": VISION},
        "llama",
    ),
    "PaliGemmaForConditionalGeneration": (
        {
            "text_config": text("gemma"),
            "vision_config": vision("siglip_vision_model", projection_dim=64),
        },
        "gemma",
    ),
    "InternVLForConditionalGeneration": (
        {
            "text_config": text("qwen2"),
            "vision_config": VISION | {"image_size": [28, 28], "patch_size": [14, 14]},
        },
        "qwen2",
    ),
    "Llama4ForConditionalGeneration": (
        {
            "text_config": text("llama4_text"),
            "vision_config": VISION
            | dict.fromkeys(
                ("vision_output_dim", "projector_input_dim", "projector_output_dim"), 32
            ),
        },
        "llama4_text",
    ),
    "Qwen2AudioForConditionalGeneration": (
        {
            "text_config": text("qwen2"),
            "audio_config": {
                "model_type": "qwen2_audio_encoder",
                "d_model": 32,
                "encoder_layers": 1,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 32,
                "num_mel_bins": 8,
            },
        },
        "qwen2",
    ),
}


def multimodal(name: str) -> Any:
    cls = getattr(transformers, name)
    return cls(cls.config_class(**MULTIMODAL[name][0]))


@pytest.mark.parametrize("name", MULTIMODAL)
def test_of_a_multimodal_model_the_text_tower_is_recognised(name: str) -> None:
    model = multimodal(name)
    tower, entry = recognise(model)
    model_type = MULTIMODAL[name][1]
    assert tower.config.model_type == model_type
    assert entry is ARCHITECTURES[model_type]
    kinds = text(model_type).get("layer_types", ["full_attention"] * 2)
    layers = sum(kind != "linear_attention" for kind in kinds)
    assert len(list(projections_of(tower, entry))) == 2 * layers
    outside = [m for n, m in model.named_modules() if n.endswith(("k_proj", "attn.qkv"))]
    assert len(set(outside) - set(tower.modules())) == 1, "its other tower has attention too"


class Wrapper(nn.Module):
    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


def test_a_text_model_is_recognised_alone_and_inside_of_a_wrapper() -> None:
    model = tiny("qwen3")
    assert recognise(model) == (model, ARCHITECTURES["qwen3"])
    assert recognise(Wrapper(module=model)) == (model, ARCHITECTURES["qwen3"])
    with pytest.raises(ValueError, match=r"holds 2 text models \(policy, reward\)"):
        recognise(Wrapper(policy=model, reward=tiny("llama")))
    projector = nn.Linear(4, 4)
    projector.config = model.config
    assert recognise(Wrapper(projector=projector, tower=model))[0] is model


def test_a_model_with_adapters_is_recognised() -> None:
    peft = pytest.importorskip("peft")
    model = tiny("llama")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    tower, entry = recognise(wrapped)
    assert tower.config is model.config
    assert entry is ARCHITECTURES["llama"]


@pytest.mark.parametrize(
    ("model_type", "nearest"),
    [
        ("qwen3_6", "'qwen3'"),
        ("lama", "'llama'"),
        ("mistral5", "'mistral'"),
        ("gemma3", "gemma3_text"),
    ],
)
def test_an_unknown_architecture_is_refused_with_the_nearest_names(
    model_type: str, nearest: str
) -> None:
    model = tiny("llama")
    model.config.model_type = model_type
    with pytest.raises(ValueError, match=f"architecture {model_type!r} is not recogn") as error:
        recognise(model)
    assert nearest in str(error.value)
    assert "longact.apply(model, targets=['q_proj', 'k_proj'])" in str(error.value)


def test_an_unknown_architecture_names_the_text_config_of_a_multimodal_one() -> None:
    model = multimodal("LlavaForConditionalGeneration")
    model.config.text_config.model_type = "zzzzzzzz"
    with pytest.raises(ValueError, match=r"'zzzzzzzz' \(in 'llava'\) is not .*none is near"):
        recognise(model)


def test_a_model_without_a_config_is_refused() -> None:
    for model in (nn.Linear(4, 4), Wrapper()):
        with pytest.raises(ValueError, match=r"no transformers config.*targets=\['q_proj'"):
            recognise(model)


# ---- the page ------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[1] / "docs/architectures.md").read_text()


def layout_name(layout: Any) -> str:
    return layout.__qualname__.partition(".")[0].replace("_", " ")


def table() -> str:
    """A line for the architectures that have all in common."""
    groups: dict[str, list[str]] = {}
    for model_type, entry in ARCHITECTURES.items():
        by_layout: dict[str, list[str]] = {}
        for name, layout in entry.projections.items():
            by_layout.setdefault(layout_name(layout), []).append(f"`{name}`")
        projections = "; ".join(f"{', '.join(n)}: {layout}" for layout, n in by_layout.items())
        norms = ", ".join(f"`{norm}`" for norm in entry.norms.values())
        place = "after" if entry.norm_after_rope else "before"
        norms = f"{norms}, {place} the rotation" if norms else "none"
        rope = "none" if entry.rope is None else entry.rope.pairs
        groups.setdefault(f"{projections} | {norms} | {rope}", []).append(model_type)
    lines = [
        "| `model_type` | projections: their rows | norms | rotated pairs |",
        "|---|---|---|---|",
        *(f"| {', '.join(names)} | {what} |" for what, names in groups.items()),
    ]
    return "\n".join(lines)


def test_the_page_has_the_table() -> None:
    shown = PAGE.partition("<!-- table -->\n")[2].partition("\n<!-- end -->")[0]
    assert shown == table(), f"docs/architectures.md should have:\n{table()}"


def test_the_readme_lists_them() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    shown = readme.partition("<!-- architectures -->\n")[2].partition("\n<!-- end -->")[0]
    assert re.split(r",\s", shown.rstrip(".")) == sorted(ARCHITECTURES)


def test_the_page_explains_every_layout() -> None:
    layouts = {
        layout_name(p) for entry in ARCHITECTURES.values() for p in entry.projections.values()
    }
    assert set(re.findall(r"^\| \*\*(.+?)\*\* \|", PAGE, re.MULTILINE)) == layouts
