"""`longact.apply`: turns a model's query and key projections into `SalientLinear`, and back.

What is matched by which target is in targets.py.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from types import TracebackType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longact.capture import Capture
from longact.nn import (
    COMPACT_NAMES,
    CompactSalientLinear,
    CountedForward,
    SalientEmbedding,
    SalientLinear,
    SharedInput,
)
from longact.optim import FusedMaskedAdam
from longact.rows import check_rows, is_sharded, local_of, shard_of
from longact.selection import (
    Selection,
    SelectionConfig,
    after_step,
    attach,
    before_step,
    gather_counts,
    refresh,
    selection_of,
)
from longact.targets import Matched, Target, match_embeddings, match_projections

__all__ = ["LongAct", "apply"]

_Layer = SalientLinear | SalientEmbedding


class LongAct:
    """What `longact.apply` changed: the handle to look at it, save it and undo it.

    Use as a context manager to have `remove()` called at the end.
    """

    def __init__(
        self, model: nn.Module, config: SelectionConfig, projections: dict[str, _Layer]
    ) -> None:
        self.config = config
        #: Qualified name -> the SalientLinear (or SalientEmbedding) that stands there now.
        self.projections = projections
        self._model = model
        self._targets: list[str] = []
        self._originals: dict[str, tuple[nn.Module, dict[str, Selection | None]]] = {}
        self._frozen: list[str] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    @property
    def rows(self) -> dict[str, Tensor | None]:
        """Qualified name -> selected rows (int32, ascending), None before the first selection."""
        return {name: layer.rows for name, layer in self.projections.items()}

    @property
    def is_applied(self) -> bool:
        """False after `remove()`."""
        return bool(self._originals)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `longact.apply` as plain values, targets by their qualified names."""
        return {**asdict(self.config), "targets": self._targets}

    def check_arguments(self, saved: Mapping[str, Any], where: str) -> None:
        """Raises ValueError, naming each, where a checkpoint's `arguments` differ from this run's.

        `where`: what was saved with them, for the message.
        """
        # A checkpoint of an older longact has not all of them.
        defaults = {f.name: f.default for f in fields(self.config) if f.default is not MISSING}
        saved = {**defaults, **saved}
        differing = [
            f"{key}: {saved.get(key)!r} in the checkpoint, {value!r} in this run"
            for key, value in self.arguments.items()
            if saved.get(key) != value
        ]
        if differing:
            raise ValueError(
                f"{where} was saved with other LongAct arguments ({'; '.join(differing)}): resume "
                "with the checkpoint's, or start a new run from its weights"
            )

    def refresh(self) -> None:
        """Selects now, from what the forwards counted since the last refresh.

        With `refresh_every=0`: run calibration forwards in training mode, then call this once.
        A projection that counted nothing keeps its rows.
        """
        refresh(layer.selection for layer in self.projections.values())

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Selects at the steps of an optimizer that is not `longact.FusedMaskedAdam`, until
        `remove()`.

        The masks then act through the gradient alone, as in the paper: unselected rows get a zero
        gradient, but weight decay and what is left of their moments still move them, and neither
        time nor memory of the update is saved.
        """
        if isinstance(optimizer, FusedMaskedAdam):
            raise ValueError("optimizer is a FusedMaskedAdam: it selects at its own steps")
        if self.config.is_compact and self.config.refresh_every != 0:
            raise ValueError(
                f"others='freeze' with refresh_every={self.config.refresh_every} needs "
                "longact.FusedMaskedAdam, whose moments follow the rows of its parameters as they "
                "change: use that, or refresh_every=0"
            )
        layers = list(self.projections.values())

        def before(*_: Any) -> None:
            # Gradients that were computed without regard to the rows, of full size.
            whole = [
                layer
                for layer in layers
                if isinstance(layer, SalientEmbedding)
                or (layer.rows is None and not self.config.is_compact)
            ]
            before_step(layer.selection for layer in layers)
            for layer in whole:
                _zero_unselected(layer)

        def after(*_: Any) -> None:
            after_step(layer.selection for layer in layers)

        self._hooks += [
            optimizer.register_step_pre_hook(before),
            optimizer.register_step_post_hook(after),
        ]

    def gather_counts(self) -> None:
        """Moves what all ranks counted since the last refresh to rank 0, for a checkpoint that rank
        0 saves. Every rank must call it; what is selected stays the same."""
        if not self.config.by_forward and self.config.refresh_every != 1:
            # The others have counted nothing where a step ends.
            gather_counts(layer.selection for layer in self.projections.values())

    def state_dict(self) -> dict[str, Any]:
        """Rows and running totals of every projection; tensors and plain values only."""
        projections = {}
        for name, layer in self.projections.items():
            selection = layer.selection
            projections[name] = {
                "rows": selection.rows,
                "magnitude": selection.magnitude,
                "tokens": selection.tokens,
                "steps": selection.steps,
            }
            if selection.changed is not None:
                projections[name]["changed"] = selection.changed
        return {"projections": projections}

    def save_delta(self, path: str | os.PathLike[str]) -> None:
        """Saves the rows that training changed, and nothing else: a safetensors file for
        `longact.load_delta` and `longact.merge_delta`. (docs/deltas.md)

        Raises:
            ValueError: `others` is not `"freeze"`, so that all parameters changed; or `remove()`
                was called.
            ImportError: without safetensors.
        """
        if self.config.rows == "touched":
            raise ValueError(
                "rows='touched' keeps no account of the rows that a run changed: "
                "longact.delta.changed_rows(base, model) finds them, longact.delta.save saves them"
            )
        if not self.config.is_compact:
            raise ValueError(
                f"others={self.config.others!r}: every parameter was trained, so save the whole "
                "model; a delta is for longact.apply(..., others='freeze')"
            )
        if not self.is_applied:
            raise ValueError("remove() was called on this handle: save the delta before")
        from longact.delta import save

        model = getattr(self._model, "_orig_mod", self._model)  # of a compiled one
        rows: dict[str, Tensor] = {}
        held: set[str] = set()
        for name, layer in model.named_modules():
            if isinstance(layer, CompactSalientLinear):  # of other handles, too
                assert layer.selection.changed is not None
                changed = layer.selection.changed.nonzero().squeeze(1).to(torch.int32)
                held |= {f"{name}.{key}" for key in COMPACT_NAMES}
                for key in ("weight", "bias"):
                    if getattr(layer, key) is not None:
                        rows[f"{name}.{key}"] = changed
        others = [n for n, p in model.named_parameters() if p.requires_grad and n not in held]
        if others:
            raise ValueError(
                f"{others[0]}{f' and {len(others) - 1} others' if others[1:] else ''} can be "
                "trained, too, and a delta holds the salient rows alone: freeze it, or compare "
                "with the base: longact.delta.changed_rows, longact.delta.save"
            )
        save(model, rows, path, keep_ratio=self.config.keep_ratio)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what `state_dict` saved, bit for bit.

        Raises:
            ValueError: projections, shapes or rows that do not fit this model; nothing is changed
                then.
        """
        saved = state_dict.get("projections")
        if not isinstance(saved, Mapping):
            raise ValueError(
                "state_dict has no 'projections': it was not saved by LongAct.state_dict()"
            )
        if set(saved) != set(self.projections):
            missing = sorted(set(self.projections) - set(saved))
            unexpected = sorted(set(saved) - set(self.projections))
            raise ValueError(
                f"state_dict does not fit this model: missing {missing}, unexpected {unexpected}"
            )
        for name, layer in self.projections.items():
            try:
                _check_entry(saved[name], layer)
            except ValueError as error:
                raise ValueError(f"state_dict of {name}: {error}") from None
        for name, layer in self.projections.items():
            selection, device = layer.selection, layer.weight.device
            rows = saved[name]["rows"]
            selection.choose(None if rows is None else rows.to(device, torch.int32, copy=True))
            selection.restore(saved[name]["magnitude"], saved[name]["tokens"])
            selection.steps = saved[name]["steps"]
            if selection.changed is not None:
                selection.changed.copy_(saved[name]["changed"])

    def remove(self) -> None:
        """Puts the original modules back; the parameters stay as training left them. What
        `others="freeze"` froze can be trained again."""
        _reshard(self._model)
        for name, (original, before) in self._originals.items():
            layer = self.projections[name]
            layer.is_removed = True
            if isinstance(layer, CompactSalientLinear):
                layer.release_rows()
            original.train(layer.training)
            for key, param in layer.named_parameters(recurse=False):
                attach(param, before[key])
                if hasattr(param, _FROZEN):
                    param.requires_grad_(False)
            _replace(self._model, name, original)
        # By name: load_state_dict(assign=True) puts other parameters there.
        params = dict(self._model.named_parameters())
        for name in self._frozen:
            if name in params:
                _unfreeze(params[name])
        for hook in self._hooks:
            hook.remove()
        self._originals.clear()
        self._frozen.clear()
        self._hooks.clear()

    def __enter__(self) -> LongAct:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"LongAct({len(self.projections)} projections, {self.config})"


def apply(
    model: nn.Module,
    keep_ratio: float = 0.3,
    *,
    targets: Target | Sequence[Target] | None = None,
    metric: Literal["mean_abs", "rms", "max_abs"] = "mean_abs",
    scope: Literal["layer", "head", "model"] = "layer",
    refresh_every: int | Literal["forward"] = 1,
    capture: Literal["projection", "norm", "rope"] = "projection",
    pair_rope: bool = False,
    others: Literal["train", "freeze"] = "train",
    rows: Literal["salient", "touched"] = "salient",
) -> LongAct:
    """Makes a model train only the salient rows of its query and key projections.

    Each matched `nn.Linear` becomes a `longact.nn.SalientLinear`, in place, on this model alone.
    Training forwards then count activation magnitudes, padding left out, and
    `longact.FusedMaskedAdam` selects rows at its steps and updates only those. Everything else is
    trained as before; outputs and `state_dict` do not change. (LongAct, arXiv 2604.14922.)

    With FSDP2 call it before or after `torch.distributed.fsdp.fully_shard`; the optimizer gets the
    sharded parameters, as always.

    Args:
        model: a transformers model of a supported architecture (docs/architectures.md; of a
            vision-language model the text tower is taken), or any module with `targets`.
        keep_ratio: share of the channels to train, in (0, 1].
        targets: None: the q and k projections of the recognised architecture. Else modules, or
            names: a qualified name, its end (`"q_proj"`, `"self_attn.k_proj"`), or a pattern with
            `*`. Only some rows of one are ranked, and the others always trained, with a range:
            `"Wqkv[0:4096]"`, or `(module, slice(0, 4096))`; several ranges of one weight are
            ranked each by itself.
        metric: `"mean_abs"`, `"rms"` or `"max_abs"` of a channel's output over the counted tokens.
        scope: rank the channels of one projection (`"layer"`), of each head (`"head"`), or of all
            projections of the same kind (`"model"`).
        refresh_every: optimizer steps between selections; 0: select once and keep; `"forward"`:
            each training forward selects for its own backward, and the step updates their union.
        capture: which vector counts: the projection's output, or q and k after the attention's norm
            (`"norm"`) or as its scores have them, after norm and rotation (`"rope"`).
        pair_rope: the two channels that the rotary embedding turns together are selected together;
            channels that it does not turn are ranked by themselves.
        others: `"train"`: everything else is trained as before. `"freeze"`: nothing else is, and
            gradients, moments and masters exist of the selected rows alone, which are parameters
            of their own (`longact.nn.CompactSalientLinear`). Construct the optimizer afterwards.
            The first training forward then selects, as it ends.
        rows: `"salient"`, or `"touched"`: `targets` are embeddings (None: the model's input
            embedding), of which a step trains the rows of the tokens that it read.

    Returns:
        The handle: `.projections`, `.rows`, `.refresh()`, `.state_dict()`, `.save_delta()`,
        `.remove()`.

    Raises:
        ValueError: an argument out of range, an unknown architecture, nothing matched, or a shared
            weight.
        TypeError: a matched module that is not a plain `nn.Linear` (LoRA-wrapped, quantized).
        NotImplementedError: a model under FSDP1, which flattens parameters, or sharded parameters
            with `others="freeze"`.
    """
    config = SelectionConfig(
        keep_ratio, metric, scope, refresh_every, capture, pair_rope, others, rows
    )
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    _refuse_fsdp1(model)
    match = match_embeddings if rows == "touched" else match_projections
    with torch.device("cpu"):  # what says where rows are, whatever the default
        matched = match(model, targets, config)
    if config.is_compact:
        _check_compact(model, matched)
    if rows == "touched":
        _check_trainable(matched)
    _reshard(model)

    decoder = decoder_of(model, (one.module for one in matched.values()))
    parameters = list(inspect.signature(decoder.forward).parameters)
    position = parameters.index("attention_mask") if "attention_mask" in parameters else None
    counted = CountedForward(position)

    handle = LongAct(model, config, {})
    try:
        _change(handle, matched, counted)
        handle._hooks += [
            decoder.register_forward_pre_hook(counted.enter, with_kwargs=True),
            decoder.register_forward_hook(counted.leave, always_call=True),
        ]
    except BaseException:  # no memory, say
        handle.remove()
        raise
    return handle


def _change(handle: LongAct, matched: Mapping[str, Matched], counted: CountedForward) -> None:
    for name, one in matched.items():
        _put_in_place(handle, name, one, counted)
    if handle.config.others == "freeze":
        _freeze_others(handle)
    blocks: dict[str, dict[str, Matched]] = {}
    for name, one in matched.items():
        block, _, leaf = name.rpartition(".")
        blocks.setdefault(block, {})[leaf] = one
        handle._targets += one.targets(name)
    if handle.config.rows == "salient":
        for block, of_block in blocks.items():
            _connect(handle, block, of_block, counted)


def _put_in_place(handle: LongAct, name: str, matched: Matched, counted: CountedForward) -> None:
    """One layer, which counts and selects."""
    module, config = matched.module, handle.config
    selection = Selection(
        config=config, name=name, candidates=matched.candidates, always=matched.always
    )
    before = {key: selection_of(p) for key, p in module.named_parameters(recurse=False)}
    layer: _Layer
    if isinstance(module, nn.Embedding):
        module.weight.requires_grad_(True)  # where the handle of others="freeze" froze it
        selection.move(module.num_embeddings, module.weight.device)
        layer = SalientEmbedding.from_embedding(module, selection)
    else:
        selection.move(module.out_features, module.weight.device)
        cls = CompactSalientLinear if config.is_compact else SalientLinear
        layer = cls.from_linear(module, selection)
    layer.counted = counted
    handle.projections[name] = layer
    handle._originals[name] = (module, before)
    _replace(handle._model, name, layer)


def _connect(
    handle: LongAct, block: str, matched: Mapping[str, Matched], counted: CountedForward
) -> None:
    """The projections of one attention module: what they share, and what counts of them."""
    attention = handle._model.get_submodule(block)
    layers: list[Any] = [getattr(attention, leaf) for leaf in matched]
    shared = SharedInput(layers if len(layers) == 2 else ())
    counted.shared.append(shared)
    for layer in layers:
        layer.shared = shared
    capture = handle.config.capture
    if capture == "projection":
        return
    entry = next(iter(matched.values())).entry
    assert entry is not None
    captured = Capture(capture, attention, entry, {leaf: m.heads for leaf, m in matched.items()})
    handle._hooks += captured.hooks
    for layer in layers:
        layer.capture = captured


def _check_compact(model: nn.Module, matched: Mapping[str, Matched]) -> None:
    """What others="freeze" cannot do, before anything is changed."""
    for name, one in matched.items():
        if is_sharded(one.module.weight):
            raise NotImplementedError(
                f"others='freeze': {name}.weight is sharded (FSDP2, tensor parallelism), and rows "
                "of it cannot be parameters of their own: use DistributedDataParallel, or "
                "others='train'"
            )
    for name, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError(
                f"others='freeze': {name or 'the model'} is a DistributedDataParallel, which does "
                "not see parameters that come later: call longact.apply on the model first, then "
                "wrap it"
            )


def _check_trainable(matched: Mapping[str, Matched]) -> None:
    for name, one in matched.items():
        weight = one.module.weight
        if not (weight.requires_grad or hasattr(weight, _FROZEN)):
            raise ValueError(
                f"{name}.weight is frozen (requires_grad=False), so that rows='touched' would "
                f"train nothing: call {name}.weight.requires_grad_(True)"
            )


def _freeze_others(handle: LongAct) -> None:
    """Nothing but rows is trained; what another handle trains stays as it is."""
    own = {id(layer.selection) for layer in handle.projections.values()}
    for name, param in handle._model.named_parameters():
        selection, trains = selection_of(param), param.requires_grad
        is_own = id(selection) in own
        if is_own and not handle.config.is_compact:  # touched rows of an embedding
            continue
        if _freeze(param):
            handle._frozen.append(name)
            # What another handle trains goes on, as long as that is there.
            param.requires_grad_(trains and selection is not None and not is_own)
    for layer in handle.projections.values():
        if isinstance(layer, CompactSalientLinear):
            layer.hold_rows(layer.selection.num_chosen)
            assert layer.counted is not None
            layer.counted.compact.append(layer.selection)


_FROZEN = "_longact_frozen"  # by how many handles


def _freeze(param: nn.Parameter) -> bool:
    """False: it was frozen by others, and stays so."""
    count = getattr(param, _FROZEN, 0)
    if not (count or param.requires_grad):
        return False
    setattr(param, _FROZEN, count + 1)
    param.requires_grad_(False)
    return True


def _unfreeze(param: nn.Parameter) -> None:
    count = getattr(param, _FROZEN, 1) - 1
    setattr(param, _FROZEN, count)
    if count == 0:
        delattr(param, _FROZEN)
        param.requires_grad_(True)


def _refuse_fsdp1(model: nn.Module) -> None:
    if not dist.is_available() or not dist.is_initialized():
        return
    from torch.distributed.fsdp import FullyShardedDataParallel

    for name, module in model.named_modules():
        if isinstance(module, FullyShardedDataParallel):
            raise NotImplementedError(
                f"model has {name or 'itself'!r} under FSDP1 (FullyShardedDataParallel), which "
                "flattens parameters and leaves no rows to select: use FSDP2 "
                "(torch.distributed.fsdp.fully_shard; accelerate's fsdp_version: 2, verl's "
                "strategy: fsdp2)"
            )


def _reshard(model: nn.Module) -> None:
    """FSDP2 leaves gathered parameters in place after some forwards: what hangs on the sharded
    ones is what the optimizer finds."""
    if not dist.is_available() or not dist.is_initialized():
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _zero_unselected(layer: _Layer) -> None:
    """Of a gradient of full size."""
    if layer.rows is None:
        return
    num_rows = layer.weight.shape[0]
    selected = torch.zeros(num_rows, dtype=torch.bool, device=layer.rows.device)
    selected[layer.rows.long()] = True
    for param in layer.parameters(recurse=False):
        if param.grad is not None:
            here = selected.to(param.device)
            if is_sharded(param):
                shard = shard_of(param)
                here = here[shard.first : shard.first + shard.num_rows]
            local_of(param.grad)[~here] = 0


def _check_entry(entry: Any, layer: _Layer) -> None:
    """One projection's part of `LongAct.state_dict()`."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"is a {type(entry).__name__}, not a dict")
    channels = layer.weight.shape[0]
    shapes = {"rows": None, "magnitude": (channels,), "tokens": ()}
    dtypes = {"magnitude": torch.float32, "tokens": torch.int64, "changed": torch.bool}
    if layer.selection.changed is not None:
        shapes["changed"] = (channels,)
    for key in (*shapes, "steps"):
        if key not in entry:
            raise ValueError(f"has no {key!r}")
    for key, shape in shapes.items():
        value = entry[key]
        if value is None and key != "changed":
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"{key} is a {type(value).__name__}, not a tensor")
        if value.dtype != dtypes.get(key, value.dtype):
            raise ValueError(f"{key} is {value.dtype}, not {dtypes[key]}")
        if shape is not None and tuple(value.shape) != shape:
            raise ValueError(
                f"{key} has shape {[*value.shape]}, the projection has {channels} channels"
            )
    if entry["rows"] is not None:
        check_rows(entry["rows"].to(layer.weight.device), layer.weight)
        layer.selection.check_count(entry["rows"])
    if isinstance(entry["steps"], bool) or not isinstance(entry["steps"], int):
        raise ValueError(f"steps is {entry['steps']!r}, not an int")


def decoder_of(model: nn.Module, layers: Iterable[nn.Module]) -> nn.Module:
    """The module whose forward sees the attention mask.

    That is transformers' base model, inside of a wrapper too; else the model itself.
    """
    wanted = set(layers)
    for module in model.modules():
        base = getattr(module, "base_model", None)
        if isinstance(base, nn.Module) and wanted <= set(base.modules()):
            return base
    return model


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
