"""What the `targets` of `longact.apply` match in a model, and which of their rows are ranked."""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from longact.architectures import Attention, Heads, heads_of, recognise
from longact.capture import check_capture
from longact.nn import SalientEmbedding, SalientLinear, is_plain_linear, tensor_parallel_of
from longact.rows import is_sharded
from longact.selection import Candidates, SelectionConfig

__all__ = ["Matched", "Target", "match_embeddings", "match_projections"]

#: A name, a pattern or a module; or one of these with a range of its rows.
Target = str | nn.Module | tuple[str | nn.Module, slice | range]

_WITH_ROWS = re.compile(r"(.+)\[(\d*):(\d*)\]")


@dataclass
class Matched:
    """A layer to train by rows."""

    module: Any  # nn.Linear or nn.Embedding
    ranges: list[range] = field(default_factory=list)  # of rows that were named; none: all
    is_whole: bool = False  # named without a range
    # Where a recognised architecture's attention has it:
    heads: list[Heads] = field(default_factory=list)
    attention: nn.Module | None = None
    entry: Attention | None = None
    candidates: tuple[Candidates, ...] = ()
    always: Tensor | None = None  # int32: rows that are trained whatever their activations

    def targets(self, name: str) -> list[str]:
        """What would match this again."""
        return [f"{name}[{r.start}:{r.stop}]" for r in self.ranges] or [name]


def match_projections(
    model: nn.Module, targets: Target | Sequence[Target] | None, config: SelectionConfig
) -> dict[str, Matched]:
    """Qualified name -> linear layer, in the model's own order; everything is checked.

    Raises:
        ValueError, TypeError: as `longact.apply` says.
    """
    if targets is None:
        tower, entry = recognise(model)
        matched = _of_architecture(model, tower, entry)
    else:
        matched = _match(model, targets, nn.Linear)
    _check_owners(model, matched)
    for name, one in matched.items():
        _check_linear(name, one.module)
    if targets is not None and _is_recognised(model):
        known = _of_architecture(model, *recognise(model))
        for name, one in matched.items():
            if name in known and not one.ranges:
                matched[name] = known[name]
    for name, one in list(matched.items()):
        if one.entry is None:
            continue
        assert one.attention is not None
        leaf = name.rpartition(".")[2]
        one.heads = heads_of(one.attention, leaf, one.module, one.entry)
        if not one.heads:  # linear attention under the names of softmax attention
            one.entry = one.attention = None
            if targets is None:
                del matched[name]
    if not matched:
        raise ValueError(
            f"{type(model).__name__} has no softmax attention in use, whose q and k could be "
            "trained by rows: pass targets, the names of the layers to train so"
        )
    for name, one in matched.items():
        _check_heads(name, one, config)
        head_dim = None if one.heads or config.scope != "head" else _head_dim(model)
        one.candidates = tuple(_candidates(name, one, config, head_dim))
        one.always = _never_ranked(one) if config.others == "train" else None
    return matched


def match_embeddings(
    model: nn.Module, targets: Target | Sequence[Target] | None, config: SelectionConfig
) -> dict[str, Matched]:
    """The same for `rows="touched"`."""
    if targets is None:
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
        if not isinstance(embedding, nn.Module):
            raise ValueError(
                f"rows='touched': {type(model).__name__} does not say which its input embedding "
                "is: pass targets=['embed_tokens'], its name"
            )
        targets = embedding
    matched = _match(model, targets, nn.Embedding)
    _check_owners(model, matched)
    for name, one in matched.items():
        kind = f"{type(one.module).__module__}.{type(one.module).__name__}"
        if one.ranges:
            raise ValueError(
                f"targets gives a range of {name}'s rows, with rows='touched': the tokens say which"
            )
        if isinstance(one.module, SalientEmbedding):
            raise ValueError(
                f"{name} is a SalientEmbedding already: call remove() on its handle first"
            )
        if type(one.module) is not nn.Embedding:
            raise TypeError(
                f"{name} is a {kind}, not a plain torch.nn.Embedding, which rows='touched' is for"
            )
        if one.module.sparse:
            raise ValueError(
                f"{name} has sparse=True, and FusedMaskedAdam takes dense gradients: set "
                f"{name}.sparse = False"
            )
    return matched


def _of_architecture(model: nn.Module, tower: nn.Module, entry: Attention) -> dict[str, Matched]:
    inside = {id(module) for module in tower.modules()}
    modules = dict(model.named_modules())
    matched = {}
    for name, module in modules.items():
        parent, _, leaf = name.rpartition(".")
        if leaf in entry.projections and id(module) in inside:
            matched[name] = Matched(module, attention=modules[parent], entry=entry)
    if not matched:
        raise ValueError(
            f"{type(model).__name__} has none of {', '.join(entry.projections)}, which its "
            "architecture should have: pass targets, the names of its query and key projections"
        )
    return matched


def _is_recognised(model: nn.Module) -> bool:
    try:
        recognise(model)
    except ValueError:
        return False
    return True


def _match(
    model: nn.Module, targets: Target | Sequence[Target], kind: type[nn.Module]
) -> dict[str, Matched]:
    """By name, pattern or identity."""
    wanted: list[Any]
    if isinstance(targets, (str, nn.Module)) or _is_pair(targets):
        wanted = [targets]
    elif isinstance(targets, Iterable):
        wanted = list(targets)
    else:
        raise TypeError(f"targets={targets!r}: pass module names, patterns or modules")
    modules = dict(model.named_modules())
    matched: dict[str, Matched] = {}
    for target in wanted:
        what, rows = _split(target)
        if isinstance(what, nn.Module):
            names = [name for name, module in modules.items() if module is what]
        elif isinstance(what, str):
            names = [
                name
                for name in modules
                if name == what or name.endswith("." + what) or fnmatch.fnmatchcase(name, what)
            ]
        else:
            raise TypeError(
                f"targets holds {target!r}: pass module names, patterns or modules, or a pair of "
                "one of these and a slice of its rows"
            )
        if not names:
            leaves = {n.rpartition(".")[2] for n, m in modules.items() if isinstance(m, kind)}
            layers = "linear layers" if kind is nn.Linear else "embeddings"
            raise ValueError(
                f"targets: nothing in {type(model).__name__} matches {what!r}; its {layers} "
                f"are named {', '.join(sorted(leaves)) or '(none)'}"
            )
        for name in names:
            one = matched.setdefault(name, Matched(modules[name]))
            if rows is None:
                one.is_whole = True
            else:
                one.ranges.append(_range(name, modules[name], rows))
            if one.is_whole and one.ranges:
                raise ValueError(
                    f"targets holds {name} and a range of its rows, which overlap: a row is ranked "
                    "once"
                )
    if not matched:
        raise ValueError("targets is empty: name the projections to train by salient rows")
    if "" in matched:
        raise ValueError(
            "targets matches the model itself: pass the module that holds the projections"
        )
    return {name: matched[name] for name in modules if name in matched}


def _is_pair(target: Any) -> bool:
    return (
        isinstance(target, (tuple, list))
        and len(target) == 2
        and isinstance(target[1], (slice, range))
    )


def _split(target: Any) -> tuple[Any, slice | None]:
    """(name, pattern or module; its rows, if some were given)."""
    if _is_pair(target):
        what, rows = target
        return what, slice(rows.start, rows.stop, rows.step)
    if isinstance(target, str) and (found := _WITH_ROWS.fullmatch(target)):
        what, start, stop = found.groups()
        return what, slice(int(start) if start else None, int(stop) if stop else None)
    return target, None


def _range(name: str, module: nn.Module, rows: slice) -> range:
    if not isinstance(module, (nn.Linear, nn.Embedding)):
        raise TypeError(
            f"targets: a range of rows of {name}, which is a {type(module).__name__}: name a "
            "linear layer"
        )
    if not all(end is None or isinstance(end, int) for end in (rows.start, rows.stop, rows.step)):
        raise TypeError(f"targets: {rows} of {name}: pass a range of integers")
    num_rows = len(module.weight)
    start, stop, step = rows.start or 0, num_rows if rows.stop is None else rows.stop, rows.step
    if step not in (None, 1) or not 0 <= start < stop <= num_rows:
        raise ValueError(
            f"targets: rows {start} to {stop} of {name}{f' in steps of {step}' if step else ''}, "
            f"which has {num_rows}: pass a range within them, in steps of one"
        )
    return range(start, stop)


def _check_owners(model: nn.Module, matched: Mapping[str, Matched]) -> None:
    """Each matched layer has a weight of its own."""
    owners: dict[int, str] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        for key, param in module.named_parameters(recurse=False):
            owner = f"{module_name}.{key}"
            other = owners.setdefault(id(param), owner)
            if other != owner and (module_name in matched or other.rpartition(".")[0] in matched):
                raise ValueError(
                    f"{owner} and {other} are the same parameter (tied weights): rows salient for "
                    "one would be trained for the other too. Untie them, or leave them out of "
                    "targets"
                )


def _check_linear(name: str, module: nn.Module) -> None:
    kind = f"{type(module).__module__}.{type(module).__name__}"
    if isinstance(module, SalientLinear):
        raise ValueError(f"{name} is a SalientLinear already: call remove() on its handle first")
    if hasattr(module, "base_layer"):
        raise TypeError(
            f"{name} is wrapped by an adapter ({kind}), which trains its own weights and not "
            "the projection's: merge it first (peft: model.merge_and_unload()), or train "
            "without it"
        )
    if not is_plain_linear(module):
        if hasattr(module, "unshard"):
            raise TypeError(
                f"{name} is a {kind}, which fully_shard was called on itself: call "
                "longact.apply before it, or shard the block around it"
            )
        raise TypeError(
            f"{name} is a {kind}, not a plain torch.nn.Linear: rows of a quantized or "
            "otherwise special projection cannot be trained; load the model unquantized, in "
            "bfloat16 say"
        )
    weight: Any = module.weight
    if not weight.is_floating_point():
        raise TypeError(f"{name}.weight is {weight.dtype}: load the model unquantized")
    if hasattr(module, "_hf_tp_plan") and not is_sharded(weight):
        raise TypeError(
            f"{name} is a part, as transformers before 5.17 makes tensor parallelism: its rows "
            "would be ranked without those of other ranks; update transformers, or use "
            "torch.distributed.tensor.parallel.parallelize_module"
        )
    if "forward" in module.__dict__ and tensor_parallel_of(module) is None:
        raise TypeError(
            f"{name}.forward was replaced (accelerate's device_map offloading does that): load "
            "the model on one device, or call "
            "accelerate.hooks.remove_hook_from_submodules(model)"
        )


def _check_heads(name: str, matched: Matched, config: SelectionConfig) -> None:
    """What capture and pair_rope need to know of a projection."""
    asks = "pair_rope=True" if config.pair_rope else f"capture={config.capture!r}"
    if config.capture == "projection" and not config.pair_rope:
        return
    if matched.ranges:
        raise ValueError(
            f"{asks}: targets gives a range of {name}'s rows, whose heads are not known: name "
            f"{name} without a range, or leave {asks.partition('=')[0]} out"
        )
    if matched.entry is None or matched.attention is None:
        raise ValueError(
            f"{asks}: {name} is no q or k projection of a recognised architecture, whose heads are "
            "known (docs/architectures.md): leave it out of targets, or leave "
            f"{asks.partition('=')[0]} out"
        )
    if config.capture != "projection":
        kinds = {heads.kind for heads in matched.heads}
        check_capture(config.capture, matched.attention, matched.entry, kinds)
    if config.pair_rope and matched.entry.rope is None:
        raise ValueError(
            f"pair_rope=True: {type(matched.attention).__name__} has no rotary embedding, and so "
            "no pairs: leave it False"
        )


def _candidates(
    name: str, matched: Matched, config: SelectionConfig, head_dim: int | None
) -> Iterable[Candidates]:
    leaf, num_rows = name.rpartition(".")[2], matched.module.out_features
    if matched.heads:
        for heads in matched.heads:
            yield from _of_heads(f"{leaf} {heads.kind}", heads, matched, config.pair_rope)
        return
    _check_overlap(name, matched.ranges)
    for rows in matched.ranges or [range(num_rows)]:
        if head_dim is not None and len(rows) % head_dim:
            raise ValueError(
                f"scope='head': {name} has {len(rows)} channels, not a multiple of the head "
                f"dimension {head_dim}"
            )
        is_whole = len(rows) == num_rows
        units = None if is_whole else torch.arange(rows.start, rows.stop)[:, None]
        kind = leaf if is_whole else f"{leaf}[{rows.start}:{rows.stop}]"
        yield Candidates(kind, head_dim or len(rows), units)


def _of_heads(kind: str, heads: Heads, matched: Matched, pair_rope: bool) -> Iterable[Candidates]:
    rows, rotated = heads.rows, heads.rotated
    if not (pair_rope and rotated):
        is_whole = torch.equal(rows.flatten(), torch.arange(matched.module.out_features))
        yield Candidates(kind, rows.shape[1], None if is_whole else rows.flatten()[:, None])
        return
    assert matched.entry is not None
    assert matched.entry.rope is not None
    first, second = matched.entry.rope.split(rotated)
    pairs = torch.stack((rows[:, first], rows[:, second]), dim=-1)  # [heads, pairs, 2]
    yield Candidates(f"{kind} pairs", pairs.shape[1], pairs.flatten(0, 1))
    others = [channel for channel in range(rows.shape[1]) if channel not in rotated]
    if others:
        yield Candidates(kind, len(others), rows[:, others].reshape(-1, 1))


def _check_overlap(name: str, ranges: Sequence[range]) -> None:
    ordered = sorted(ranges, key=lambda r: r.start)
    for one, other in itertools.pairwise(ordered):
        if other.start < one.stop:
            raise ValueError(
                f"targets: rows {one.start} to {one.stop} and {other.start} to {other.stop} of "
                f"{name} overlap: a row is ranked once"
            )


def _never_ranked(matched: Matched) -> Tensor | None:
    """Rows that are no candidates: v's in a fused projection, a gate's."""
    if any(c.units is None for c in matched.candidates):
        return None
    left = torch.ones(matched.module.out_features, dtype=torch.bool)
    for c in matched.candidates:
        assert c.units is not None
        left[c.units.flatten()] = False
    rows = left.nonzero().squeeze(1).to(torch.int32)
    return rows if rows.numel() > 0 else None


def _head_dim(model: nn.Module) -> int:
    """Of layers that no entry knows."""
    config: Any = getattr(model, "config", None)
    head_dim = getattr(config, "head_dim", None)
    if head_dim is None and hasattr(config, "num_attention_heads"):
        head_dim = config.hidden_size // config.num_attention_heads
    if head_dim is None:
        raise ValueError(
            "scope='head' needs the model's head dimension: give the model a `config` with "
            "`head_dim`, or use scope='layer'"
        )
    return int(head_dim)
