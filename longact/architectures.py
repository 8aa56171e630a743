"""Where the query and key channels of each architecture are, by transformers' `config.model_type`.

docs/architectures.md has the same as a page; tests/test_architectures.py proves each entry on the
real class.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn


class Heads(NamedTuple):
    """The query or key heads that a projection makes."""

    kind: Literal["q", "k"]
    rows: Tensor  # int64 [heads, head_dim]: the row of the weight that makes each channel
    rotated: range = range(0)  # channels of a head that the rotary embedding turns


#: The attention module and a projection's number of rows -> the q and k among these rows; the
#: others (v's, a gate's) are no candidates and stay trained. Empty: not a projection of softmax
#: attention that is in use (linear attention under the same name, say).
Layout = Callable[[Any, int], list[Heads]]


@dataclass(frozen=True)
class Rope:
    """How an architecture rotates q and k."""

    #: Of the rotated channels the pairs are (i, i + half of them), or (2 i, 2 i + 1).
    pairs: Literal["half", "interleaved"]
    #: The attention's `position_embeddings` -> cos and sin `[batch, tokens, pairs]`.
    frequencies: Callable[[Any], tuple[Tensor, Tensor]]

    def slices(self, rotated: range) -> tuple[slice, slice]:
        """The first and the second channel of each pair."""
        if self.pairs == "half":
            middle = rotated.start + len(rotated) // 2
            return slice(rotated.start, middle), slice(middle, rotated.stop)
        return slice(rotated.start, rotated.stop, 2), slice(rotated.start + 1, rotated.stop, 2)

    def split(self, rotated: range) -> tuple[Tensor, Tensor]:
        """The first and the second channel of each pair, int64 `[pairs]` both."""
        channels = torch.arange(rotated.stop)
        first, second = self.slices(rotated)
        return channels[first], channels[second]

    def rotate(self, y: Tensor, rotated: range, position_embeddings: Any) -> Tensor:
        """`y [batch, tokens, heads, head_dim]` after rotation, each channel in its place.

        Models that move the channels while they rotate (DeepSeek V3) have the same numbers
        elsewhere in the head.
        """
        if not rotated:
            return y
        cos, sin = (f.unsqueeze(-2) for f in self.frequencies(position_embeddings))
        first, second = self.slices(rotated)
        a, b = y[..., first], y[..., second]
        y = y.clone()
        y[..., first] = a * cos - b * sin
        y[..., second] = b * cos + a * sin
        return y


@dataclass(frozen=True)
class Attention:
    """How the attention modules of an architecture make q and k."""

    #: Last name of each linear layer that makes some of them -> what its rows are.
    projections: Mapping[str, Layout]
    #: Kind -> the attention's module that normalizes it between projection and rotation. A config
    #: may leave it out: the attention then lacks it.
    norms: Mapping[str, str] = field(default_factory=dict)
    #: Whether the norms see `[batch, heads, tokens, head_dim]`; else tokens come before heads,
    #: these side by side (`[batch, tokens, heads * head_dim]`) or not.
    heads_first: bool = False
    norm_after_rope: bool = False  # the norms take what is rotated
    rope: Rope | None = None  # None: no rotary embedding


#: Subclasses of nn.Linear in transformers with the forward of nn.Linear, written out. With a bias
#: theirs rounds once more than F.linear.
LINEAR_LIKE = ("FalconLinear",)


# ---- rotary embeddings ---------------------------------------------------------------------------


def _cos_sin(position_embeddings: Any) -> tuple[Tensor, Tensor]:
    if position_embeddings is None:
        raise NotImplementedError(
            "the attention gets no position_embeddings and rotates with an embedding of its own, "
            "as older transformers do it: update transformers"
        )
    cos, sin = position_embeddings
    if cos.dim() != 3:
        raise NotImplementedError(
            f"position_embeddings of shape {[*cos.shape]} have sections for time, height and width "
            "that the attention mixes itself, as older transformers do it: update transformers"
        )
    return cos, sin


def _first_half(position_embeddings: Any) -> tuple[Tensor, Tensor]:
    cos, sin = _cos_sin(position_embeddings)
    pairs = cos.shape[-1] // 2
    return cos[..., :pairs], sin[..., :pairs]


def _every_other(position_embeddings: Any) -> tuple[Tensor, Tensor]:
    cos, sin = _cos_sin(position_embeddings)
    return cos[..., ::2], sin[..., ::2]


def _backwards(position_embeddings: Any) -> tuple[Tensor, Tensor]:
    cos, sin = _first_half(position_embeddings)
    return cos, -sin


def _sin_first(position_embeddings: Any) -> tuple[Tensor, Tensor]:
    sin, cos = _cos_sin(position_embeddings)
    return cos, sin


def _complex(position_embeddings: Any) -> tuple[Tensor, Tensor]:
    return position_embeddings.real, position_embeddings.imag


HALF = Rope("half", _first_half)
HALF_ONCE = Rope("half", _cos_sin)  # the frequencies are not repeated
HALF_BACKWARDS = Rope("half", _backwards)
INTERLEAVED = Rope("interleaved", _first_half)
INTERLEAVED_TWICE = Rope("interleaved", _every_other)  # each frequency stands twice in a row
INTERLEAVED_SIN_FIRST = Rope("interleaved", _sin_first)
INTERLEAVED_COMPLEX = Rope("interleaved", _complex)


def _rotated(attention: Any, head_dim: int) -> range:
    """All channels of a head, or the leading ones where the rotary embedding is partial."""
    for name in ("rotary_ndims", "rotary_dim"):
        if (width := getattr(attention, name, None)) is not None:
            return range(width)
    config = getattr(attention, "config", None)
    parameters = getattr(config, "rope_parameters", None) or {}
    parameters = parameters.get(getattr(attention, "layer_type", None), parameters)
    factor = parameters.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
    if factor is None or parameters.get("rope_type") == "proportional":  # has frequencies for all
        return range(head_dim)
    width = int(head_dim * factor)
    return range(width + width % 2)  # an odd width gets one more frequency


# ---- layouts: which rows are q and k -------------------------------------------------------------


def _head_dim(attention: Any) -> int:
    head_dim = getattr(attention, "head_dim", None)
    return int(attention.head_size if head_dim is None else head_dim)


def _num_heads(attention: Any) -> int:
    for name in ("num_heads", "n_heads", "num_attention_heads"):
        if (heads := getattr(attention, name, None)) is not None:
            return int(heads)
    return int(attention.config.num_attention_heads)


def _view(num_rows: int, *shape: int) -> Tensor:
    """The rows' indices in `shape`, which has one -1."""
    size = 1
    for length in shape:
        size *= abs(length)
    if size == 0 or num_rows % size:
        raise ValueError(
            f"{num_rows} rows are no whole number of groups of {size}, which its attention reads "
            "them in"
        )
    return torch.arange(num_rows).view(shape)


def _always(attention: Any) -> bool:
    return True


def _never(attention: Any) -> bool:
    return False


def separate(kind: Literal["q", "k"], turns: Callable[[Any], bool] = _always) -> Layout:
    """All rows are q, or k. `turns`: whether an attention module rotates."""

    def layout(attention: Any, num_rows: int) -> list[Heads]:
        head_dim = _head_dim(attention)
        rotated = _rotated(attention, head_dim) if turns(attention) else range(0)
        return [Heads(kind, _view(num_rows, -1, head_dim), rotated)]

    return layout


def gated(attention: Any, num_rows: int) -> list[Heads]:
    """Each head has its q, then its gate."""
    head_dim = _head_dim(attention)
    rows = _view(num_rows, -1, 2, head_dim)
    return [Heads("q", rows[:, 0], _rotated(attention, head_dim))]


def key_unless_value(attention: Any, num_rows: int) -> list[Heads]:
    """All rows are k; none of them where k is v as well."""
    return [] if attention.v_proj is None else separate("k")(attention, num_rows)


def _groups(
    attention: Any, num_rows: int, groups: int, turns: Callable[[Any], bool]
) -> list[Heads]:
    """Each group has its q heads, then its k heads, then as many v heads."""
    head_dim, q_heads = _head_dim(attention), _num_heads(attention) // groups
    rows = _view(num_rows, groups, -1, head_dim)
    k_heads, rest = divmod(rows.shape[1] - q_heads, 2)
    if k_heads < 1 or rest:
        raise ValueError(
            f"{num_rows} rows do not hold {q_heads} query heads of {head_dim} and as many key as "
            f"value heads in each of {groups} groups"
        )
    rotated = _rotated(attention, head_dim) if turns(attention) else range(0)
    q, k = rows[:, :q_heads], rows[:, q_heads : q_heads + k_heads]
    return [Heads("q", q.flatten(0, 1), rotated), Heads("k", k.flatten(0, 1), rotated)]


def stacked(turns: Callable[[Any], bool] = _always) -> Layout:
    """All q, then all k, then all v."""

    def layout(attention: Any, num_rows: int) -> list[Heads]:
        return _groups(attention, num_rows, 1, turns)

    return layout


def interleaved(turns: Callable[[Any], bool] = _always) -> Layout:
    """Each head has its q, k and v."""

    def layout(attention: Any, num_rows: int) -> list[Heads]:
        return _groups(attention, num_rows, _num_heads(attention), turns)

    return layout


def falcon(attention: Any, num_rows: int) -> list[Heads]:
    """Each group has its q heads, a k and a v: one group with `multi_query`, a group for each k
    head in the new decoder, else for each q head."""
    groups = _num_heads(attention)
    if attention.new_decoder_architecture or attention.multi_query:
        groups = attention.num_kv_heads
    return _groups(attention, num_rows, groups, lambda attention: not attention.config.alibi)


def gpt_bigcode(attention: Any, num_rows: int) -> list[Heads]:
    """All q, then one k and one v; without `multi_query` each head has its q, k and v."""
    if attention.is_cross_attention:
        return []
    groups = 1 if attention.multi_query else _num_heads(attention)
    return _groups(attention, num_rows, groups, _never)


def mla_query(turns: Callable[[Any], bool] = _always) -> Layout:
    """All rows are q; the last `qk_rope_head_dim` channels of a head rotate."""

    def layout(attention: Any, num_rows: int) -> list[Heads]:
        if not hasattr(attention, "qk_head_dim"):
            return []  # the linear attention of a hybrid
        if not getattr(attention.config, "rope_interleave", True):
            raise NotImplementedError(
                "rope_interleave=False: longact knows this architecture's rotary embedding with "
                "rope_interleave=True only; name the rows to rank: "
                f"targets=['q_b_proj[0:{num_rows}]']"
            )
        head_dim = attention.qk_head_dim
        rotated = range(attention.qk_nope_head_dim, head_dim) if turns(attention) else range(0)
        return [Heads("q", _view(num_rows, -1, head_dim), rotated)]

    return layout


def mla_key_value(attention: Any, num_rows: int) -> list[Heads]:
    """Each head has the `qk_nope_head_dim` channels of k that do not rotate, then its v."""
    nope = attention.qk_nope_head_dim
    return [Heads("k", _view(num_rows, -1, nope + attention.v_head_dim)[:, :nope])]


def heads_of(attention: Any, projection: str, linear: nn.Module, entry: Attention) -> list[Heads]:
    """The q and k heads among the rows of a projection.

    Args:
        attention: the module that holds the projection.
        projection: its name there, one of `entry.projections`.
        linear: the projection, for its `out_features`.
        entry: the architecture's.

    Returns:
        Heads of q, of k or of both. Empty where this one makes neither (linear attention whose
        projections have the same names): leave it as it is.

    Raises:
        ValueError: its rows do not divide into the heads of the attention module.
    """
    num_rows = int(linear.out_features)  # type: ignore[arg-type]
    try:
        return entry.projections[projection](attention, num_rows)
    except ValueError as error:
        raise ValueError(f"{projection} of {type(attention).__name__}: {error}") from None


# ---- the table -----------------------------------------------------------------------------------


def _qk(
    rope: Rope | None = HALF, turns: Callable[[Any], bool] = _always, **options: Any
) -> Attention:
    """q_proj and k_proj."""
    turns = _never if rope is None else turns
    layouts = {"q_proj": separate("q", turns), "k_proj": separate("k", turns)}
    return Attention(layouts, rope=rope, **options)


def _mla(rope: Rope | None = INTERLEAVED) -> Attention:
    """Multi-head latent attention; q_proj where `q_lora_rank` is None. The rotated part of k is one
    for all heads and comes from kv_a_proj_with_mqa, which is no q or k projection."""
    query = mla_query(_never if rope is None else _always)
    layouts = {"q_proj": query, "q_b_proj": query, "kv_b_proj": mla_key_value}
    return Attention(layouts, rope=rope)


def _uses_rope(attention: Any) -> bool:
    return bool(attention.use_rope)


def _is_local(attention: Any) -> bool:
    return attention.sliding_window is not None or getattr(attention, "force_rope", False)


def _is_local_or_all_global(attention: Any) -> bool:
    return attention.sliding_window is None or attention.is_sliding


def _config_says_rope(attention: Any) -> bool:
    return bool(attention.config.position_embedding_type == "rope")


_NORMS = {"q": "q_norm", "k": "k_norm"}
_LAYERNORMS = {"q": "q_layernorm", "k": "k_layernorm"}
_HUNYUAN_NORMS = {"q": "query_layernorm", "k": "key_layernorm"}

_PLAIN = _qk()
_NORMED = _qk(norms=_NORMS)  # a head at a time, or flattened over heads
_NORMED_HEADS_FIRST = _qk(norms=_NORMS, heads_first=True)
_GATED = Attention({"q_proj": gated, "k_proj": separate("k")}, norms=_NORMS, rope=HALF)
_MLA = _mla()

#: model_type of a text config -> how its attention makes q and k.
ARCHITECTURES: dict[str, Attention] = {
    "afmoe": _qk(turns=lambda attention: attention.is_local_attention, norms=_NORMS),
    "apertus": _NORMED_HEADS_FIRST,
    "arcee": _PLAIN,
    "bamba": _PLAIN,
    "bitnet": _PLAIN,
    "bloom": Attention({"query_key_value": interleaved(_never)}),
    "cohere": _qk(INTERLEAVED_TWICE, norms=_NORMS),
    "cohere2": _qk(INTERLEAVED_TWICE, _is_local),
    "cohere2_moe": _qk(INTERLEAVED_TWICE, _is_local),
    "cwm": _PLAIN,
    "dbrx": Attention({"Wqkv": stacked()}, rope=HALF),
    "deepseek_v2": _mla(INTERLEAVED_COMPLEX),
    "deepseek_v3": _MLA,  # R1, Kimi K2, Moonlight, ... too
    "deepseek_v32": _MLA,
    "dots1": _NORMED,
    "ernie4_5": _qk(INTERLEAVED),
    "ernie4_5_moe": _qk(INTERLEAVED),
    "exaone4": _qk(turns=_is_local_or_all_global, norms=_NORMS, heads_first=True),
    "exaone_moe": _qk(turns=_is_local_or_all_global, norms=_NORMS, heads_first=True),
    "falcon": Attention({"query_key_value": falcon}, rope=HALF),
    "falcon_h1": _PLAIN,
    "flex_olmo": _NORMED,
    "gemma": _PLAIN,
    "gemma2": _PLAIN,
    "gemma3_text": _NORMED_HEADS_FIRST,
    "gemma3n_text": _NORMED,
    "gemma4_text": Attention(
        {"q_proj": separate("q"), "k_proj": key_unless_value}, norms=_NORMS, rope=HALF
    ),
    "glm": _qk(INTERLEAVED),
    "glm4": _qk(INTERLEAVED),
    "glm4_moe": _NORMED,
    "glm4_moe_lite": _MLA,
    "glm4v_moe_text": _PLAIN,
    "glm4v_text": _qk(INTERLEAVED_TWICE),
    "glm_moe_dsa": _MLA,
    "glm_ocr_text": _qk(INTERLEAVED_TWICE),
    "gpt_bigcode": Attention({"c_attn": gpt_bigcode}),
    "gpt_neox": Attention({"query_key_value": interleaved()}, rope=HALF),  # Pythia
    "gpt_oss": _qk(HALF_ONCE),
    "gptj": _qk(INTERLEAVED_SIN_FIRST),
    "granite": _PLAIN,
    "granitemoe": _PLAIN,
    "granitemoehybrid": _qk(turns=_config_says_rope),
    "granitemoeshared": _PLAIN,
    "helium": _qk(INTERLEAVED),
    "hunyuan_v1_dense": _qk(norms=_HUNYUAN_NORMS, heads_first=True, norm_after_rope=True),
    "hunyuan_v1_moe": _qk(norms=_HUNYUAN_NORMS, heads_first=True, norm_after_rope=True),
    "hy_v3": _NORMED_HEADS_FIRST,
    "hyperclovax": _PLAIN,
    "jais2": _PLAIN,
    "jamba": _qk(None),
    "kimi_linear": _mla(None),
    "lfm2": _qk(norms=_LAYERNORMS),
    "lfm2_moe": _qk(norms=_LAYERNORMS),
    "llama": _PLAIN,  # SmolLM2, Llama 2 and 3, Yi, ... too
    # Its qk_norm, after the rotation, scales whole heads and is one module for q and k.
    "llama4_text": _qk(INTERLEAVED_COMPLEX, _uses_rope),
    "mellum": _NORMED,
    "mimo_v2_flash": _PLAIN,
    "minicpm3": _mla(HALF),
    "minimax": _PLAIN,
    "minimax_m2": _NORMED,
    "ministral": _PLAIN,
    "ministral3": _PLAIN,
    "mistral": _PLAIN,
    "mistral4": _MLA,
    "mixtral": _PLAIN,
    "mpt": Attention({"Wqkv": stacked(_never)}),
    "nanochat": _qk(HALF_BACKWARDS, norms=_NORMS, heads_first=True, norm_after_rope=True),
    "nemotron": _PLAIN,
    "nemotron_h": _qk(None),
    "olmo": _PLAIN,
    "olmo2": _NORMED,
    "olmo3": _NORMED,
    "olmoe": _NORMED,
    "opt": _qk(None),
    "persimmon": Attention({"query_key_value": interleaved()}, norms=_LAYERNORMS, rope=HALF),
    "phi": _qk(norms=_LAYERNORMS, heads_first=True),
    "phi3": Attention({"qkv_proj": stacked()}, rope=HALF),  # Phi-4 too
    "phimoe": _PLAIN,
    "qwen2": _PLAIN,
    "qwen2_5_vl_text": _PLAIN,
    "qwen2_moe": _PLAIN,
    "qwen2_vl_text": _PLAIN,
    "qwen3": _NORMED,
    "qwen3_5_moe_text": _GATED,
    "qwen3_5_text": _GATED,
    "qwen3_moe": _NORMED,
    "qwen3_next": _GATED,
    "qwen3_vl_moe_text": _NORMED,
    "qwen3_vl_text": _NORMED,
    "seed_oss": _PLAIN,
    "smollm3": _qk(turns=_uses_rope),
    "solar_open": _PLAIN,
    "stablelm": _qk(norms=_LAYERNORMS, heads_first=True),
    "starcoder2": _PLAIN,
    "vaultgemma": _PLAIN,
    "youtu": _MLA,
}


# ---- which entry a model has ---------------------------------------------------------------------


def _model_type(module: Any) -> str | None:
    config = getattr(module, "config", None)
    model_type = getattr(config, "model_type", None)
    return model_type if isinstance(model_type, str) else None


def _has_projections(module: nn.Module) -> bool:
    """Else it only shares the config, as a projector between two towers may."""
    projections = ARCHITECTURES[_model_type(module) or ""].projections
    return any(name.rpartition(".")[2] in projections for name, _ in module.named_modules())


def recognise(model: nn.Module) -> tuple[nn.Module, Attention]:
    """The text model in `model`, and how its attention makes q and k.

    That is the outermost module whose own `config` has a model_type of `ARCHITECTURES`: a text
    model itself, the text tower of a vision-language model (the layers of its other towers have the
    same names), what a wrapper holds.

    Raises:
        ValueError: there is none, or more than one.
    """
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        inside = any(outer == "" or name.startswith(outer + ".") for outer, _ in found)
        if not inside and _model_type(module) in ARCHITECTURES and _has_projections(module):
            found.append((name, module))
    remedy = "longact.apply(model, targets=['q_proj', 'k_proj'])"
    if len(found) > 1:
        raise ValueError(
            f"model {type(model).__name__} holds {len(found)} text models "
            f"({', '.join(name for name, _ in found)}): pass one of them, or name the query and "
            f"key projections: {remedy}"
        )
    if found:
        ((_, tower),) = found
        return tower, ARCHITECTURES[_model_type(tower) or ""]

    config = getattr(model, "config", None)
    text_config = getattr(config, "text_config", None)
    own = getattr(config, "model_type", None)
    model_type = getattr(text_config, "model_type", None) or own
    if not isinstance(model_type, str):
        raise ValueError(
            f"model {type(model).__name__} is not recognised: it has no transformers config. Name "
            f"its query and key projections: {remedy}"
        )
    nearest = difflib.get_close_matches(model_type, ARCHITECTURES, n=3, cutoff=0.5)
    raise ValueError(
        f"architecture {model_type!r}{f' (in {own!r})' if own != model_type else ''} is not "
        f"recognised; {f'the nearest supported are {nearest}' if nearest else 'none is near'}, and "
        "all are in longact.architectures.ARCHITECTURES. For another one name its query and key "
        f"projections: {remedy}"
    )
