"""`longact.apply`: turns a model's query and key projections into `SalientLinear`, and back."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longact.architectures import ARCHITECTURES
from longact.nn import CountedForward, SalientLinear, SharedInput
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

__all__ = ["LongAct", "apply"]


class LongAct:
    """What `longact.apply` changed: the handle to look at it, save it and undo it.

    Use as a context manager to have `remove()` called at the end.
    """

    def __init__(
        self, model: nn.Module, config: SelectionConfig, projections: dict[str, SalientLinear]
    ) -> None:
        self.config = config
        #: Qualified name -> the SalientLinear that stands there now.
        self.projections = projections
        self._model = model
        self._originals: dict[str, tuple[nn.Linear, dict[str, Selection | None]]] = {}
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
        return {**asdict(self.config), "targets": list(self.projections)}

    def check_arguments(self, saved: Mapping[str, Any], where: str) -> None:
        """Raises ValueError, naming each, where a checkpoint's `arguments` differ from this run's.

        `where`: what was saved with them, for the message.
        """
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
        layers = list(self.projections.values())

        def before(*_: Any) -> None:
            first = [layer for layer in layers if layer.rows is None]
            before_step(layer.selection for layer in layers)
            for layer in first:
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
        if self.config.refresh_every not in (1, "forward"):  # these count nothing between steps
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
        return {"projections": projections}

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

    def remove(self) -> None:
        """Puts the original `nn.Linear` modules back; the parameters stay as training left them."""
        _reshard(self._model)
        for name, (linear, before) in self._originals.items():
            layer = self.projections[name]
            layer.is_removed = True
            linear.train(layer.training)
            for key, param in layer.named_parameters(recurse=False):
                attach(param, before[key])
            _replace(self._model, name, linear)
        for hook in self._hooks:
            hook.remove()
        self._originals.clear()
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
    targets: str | nn.Module | Sequence[str | nn.Module] | None = None,
    metric: Literal["mean_abs", "rms", "max_abs"] = "mean_abs",
    scope: Literal["layer", "head", "model"] = "layer",
    refresh_every: int | Literal["forward"] = 1,
) -> LongAct:
    """Makes a model train only the salient rows of its query and key projections.

    Each matched `nn.Linear` becomes a `longact.nn.SalientLinear`, in place, on this model alone.
    Training forwards then count activation magnitudes, padding left out, and
    `longact.FusedMaskedAdam` selects rows at its steps and updates only those. Everything else is
    trained as before; outputs and `state_dict` do not change. (LongAct, arXiv 2604.14922.)

    With FSDP2 call it before or after `torch.distributed.fsdp.fully_shard`; the optimizer gets the
    sharded parameters, as always.

    Args:
        model: a transformers model of a supported architecture, or any module with `targets`.
        keep_ratio: share of the channels to train, in (0, 1].
        targets: None: the q and k projections of the recognised architecture. Else modules, or
            names: a qualified name, its end (`"q_proj"`, `"self_attn.k_proj"`), or a pattern with
            `*`.
        metric: `"mean_abs"`, `"rms"` or `"max_abs"` of a channel's output over the counted tokens.
        scope: rank the channels of one projection (`"layer"`), of each head (`"head"`), or of all
            projections of the same kind (`"model"`).
        refresh_every: optimizer steps between selections; 0: select once and keep; `"forward"`:
            each training forward selects for its own backward, and the step updates their union.

    Returns:
        The handle: `.projections`, `.rows`, `.refresh()`, `.state_dict()`, `.remove()`.

    Raises:
        ValueError: an argument out of range, an unknown architecture, nothing matched, or a shared
        weight.
        TypeError: a matched module that is not a plain `nn.Linear` (LoRA-wrapped, quantized).
        NotImplementedError: a model under FSDP1, which flattens parameters.
    """
    config = SelectionConfig(keep_ratio, metric, scope, refresh_every)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    _refuse_fsdp1(model)
    matched = _check_projections(
        model, _match(model, _targets_of(model) if targets is None else targets)
    )
    head_dim = _head_dim(model, matched) if scope == "head" else 0
    _reshard(model)

    decoder = _decoder(model, matched)
    parameters = list(inspect.signature(decoder.forward).parameters)
    position = parameters.index("attention_mask") if "attention_mask" in parameters else None
    counted = CountedForward(position)

    handle = LongAct(model, config, {})
    for name, linear in matched.items():
        before = {key: selection_of(p) for key, p in linear.named_parameters(recurse=False)}
        layer = SalientLinear.from_linear(linear, Selection())
        layer.counted = counted
        selection = layer.selection
        selection.config, selection.name, selection.head_dim = config, name, head_dim
        selection.kind = name.rpartition(".")[2]
        selection.move(linear.out_features, linear.weight.device)
        handle.projections[name] = layer
        handle._originals[name] = (linear, before)
        _replace(model, name, layer)
    blocks: dict[str, list[SalientLinear]] = {}
    for name, layer in handle.projections.items():
        blocks.setdefault(name.rpartition(".")[0], []).append(layer)
    for layers in blocks.values():
        shared = SharedInput(layers if len(layers) == 2 else ())
        counted.shared.append(shared)
        for layer in layers:
            layer.shared = shared
    handle._hooks = [
        decoder.register_forward_pre_hook(counted.enter, with_kwargs=True),
        decoder.register_forward_hook(counted.leave, always_call=True),
    ]
    return handle


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


def _zero_unselected(layer: SalientLinear) -> None:
    """Of a gradient that was computed before there were rows."""
    if layer.rows is None:
        return
    selected = torch.zeros(layer.out_features, dtype=torch.bool, device=layer.rows.device)
    selected[layer.rows.long()] = True
    for param in layer.parameters(recurse=False):
        if param.grad is not None:
            here = selected.to(param.device)
            if is_sharded(param):
                shard = shard_of(param)
                here = here[shard.first : shard.first + shard.num_rows]
            local_of(param.grad)[~here] = 0


def _check_entry(entry: Any, layer: SalientLinear) -> None:
    """One projection's part of `LongAct.state_dict()`."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"is a {type(entry).__name__}, not a dict")
    for key in ("rows", "magnitude", "tokens", "steps"):
        if key not in entry:
            raise ValueError(f"has no {key!r}")
    for key, shape in (("rows", None), ("magnitude", (layer.out_features,)), ("tokens", ())):
        value = entry[key]
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"{key} is a {type(value).__name__}, not a tensor")
        dtype = {"magnitude": torch.float32, "tokens": torch.int64}.get(key, value.dtype)
        if value.dtype != dtype:
            raise ValueError(f"{key} is {value.dtype}, not {dtype}")
        if shape is not None and tuple(value.shape) != shape:
            raise ValueError(
                f"{key} has shape {[*value.shape]}, the projection has {layer.out_features} "
                f"channels"
            )
    if entry["rows"] is not None:
        check_rows(entry["rows"].to(layer.weight.device), layer.weight)
    if isinstance(entry["steps"], bool) or not isinstance(entry["steps"], int):
        raise ValueError(f"steps is {entry['steps']!r}, not an int")


def _decoder(model: nn.Module, matched: Mapping[str, nn.Module]) -> nn.Module:
    """The module whose forward sees the attention mask.

    That is transformers' base model, inside of a wrapper too; else the model itself.
    """
    for module in model.modules():
        base = getattr(module, "base_model", None)
        if isinstance(base, nn.Module) and all(_inside(base, m) for m in matched.values()):
            return base
    return model


def _targets_of(model: nn.Module) -> tuple[str, ...]:
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    what = f"architecture {model_type!r}" if model_type else f"model {type(model).__name__}"
    raise ValueError(
        f"{what} is not recognised: supported are {', '.join(sorted(ARCHITECTURES))}. For another "
        "one name its query and key projections: longact.apply(model, targets=['q_proj', 'k_proj'])"
    )


def _match(
    model: nn.Module, targets: str | nn.Module | Sequence[str | nn.Module]
) -> dict[str, nn.Module]:
    """Qualified name -> module, in the model's own order."""
    wanted: list[str | nn.Module]
    if isinstance(targets, (str, nn.Module)):
        targets = [targets]
    if not isinstance(targets, Iterable):
        raise TypeError(f"targets={targets!r}: pass module names, patterns or modules")
    wanted = list(targets)
    modules = dict(model.named_modules())
    matched: dict[str, nn.Module] = {}
    for target in wanted:
        if isinstance(target, nn.Module):
            names = [name for name, module in modules.items() if module is target]
        elif isinstance(target, str):
            names = [
                name
                for name in modules
                if name == target
                or name.endswith("." + target)
                or fnmatch.fnmatchcase(name, target)
            ]
        else:
            raise TypeError(f"targets holds {target!r}: pass module names, patterns or modules")
        if not names:
            linears = sorted(
                {name.rpartition(".")[2] for name, m in modules.items() if isinstance(m, nn.Linear)}
            )
            raise ValueError(
                f"targets: nothing in {type(model).__name__} matches {target!r}; its linear layers "
                f"are named {', '.join(linears) or '(none)'}"
            )
        matched.update((name, modules[name]) for name in names)
    if not matched:
        raise ValueError("targets is empty: name the projections to train by salient rows")
    if "" in matched:
        raise ValueError(
            "targets matches the model itself: pass the module that holds the projections"
        )
    return {name: matched[name] for name in modules if name in matched}


def _check_projections(model: nn.Module, matched: Mapping[str, nn.Module]) -> dict[str, nn.Linear]:
    """The matched modules, each a plain linear layer with a weight of its own."""
    projections: dict[str, nn.Linear] = {}
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
    for name, module in matched.items():
        kind = f"{type(module).__module__}.{type(module).__name__}"
        if isinstance(module, SalientLinear):
            raise ValueError(
                f"{name} is a SalientLinear already: call remove() on its handle first"
            )
        if hasattr(module, "base_layer"):
            raise TypeError(
                f"{name} is wrapped by an adapter ({kind}), which trains its own weights and not "
                "the projection's: merge it first (peft: model.merge_and_unload()), or train "
                "without it"
            )
        if type(module) is not nn.Linear:
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
        if not module.weight.is_floating_point():
            raise TypeError(f"{name}.weight is {module.weight.dtype}: load the model unquantized")
        if "forward" in module.__dict__:
            raise TypeError(
                f"{name}.forward was replaced (accelerate's device_map offloading does that): load "
                "the model on one device, or call "
                "accelerate.hooks.remove_hook_from_submodules(model)"
            )
        projections[name] = module
    return projections


def _head_dim(model: nn.Module, matched: Mapping[str, nn.Linear]) -> int:
    config: Any = getattr(model, "config", None)
    head_dim = getattr(config, "head_dim", None)
    if head_dim is None and hasattr(config, "num_attention_heads"):
        head_dim = config.hidden_size // config.num_attention_heads
    if head_dim is None:
        raise ValueError(
            "scope='head' needs the model's head dimension: give the model a `config` with "
            "`head_dim`, or use scope='layer'"
        )
    for name, module in matched.items():
        if module.out_features % head_dim:
            raise ValueError(
                f"scope='head': {name} has {module.out_features} channels, not a multiple of the "
                f"head dimension {head_dim}"
            )
    return int(head_dim)


def _inside(parent: nn.Module, module: nn.Module) -> bool:
    return any(module is m for m in parent.modules())


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
