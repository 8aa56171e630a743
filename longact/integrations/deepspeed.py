"""LongAct under DeepSpeed: where `longact.FusedMaskedAdam` can work, and where it cannot.

engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
connect(engine)

It updates rows, and so needs whole parameters: ZeRO stage 0. Later stages hand the optimizer flat
pieces of many parameters; there DeepSpeed's own Adam trains the masked gradient (docs/frameworks.md
has the lines).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from longact.nn import CompactSalientLinear, SalientLinear
from longact.optim import FusedMaskedAdam
from longact.selection import attach, selection_of

__all__ = ["check_deepspeed", "connect"]

_REMEDY = (
    "Use ZeRO stage 0, or FSDP2, which keeps rows; or leave the optimizer to DeepSpeed and call "
    "handle.refresh() after each step: unselected rows then get a zero gradient, but weight decay "
    "and moments still move them, and no time or memory is saved"
)


def check_deepspeed(config: Mapping[str, Any]) -> None:
    """Checks a DeepSpeed configuration before `longact.FusedMaskedAdam` is used with it.

    Args:
        config: as given to `deepspeed.initialize`, or `deepspeed_plugin.deepspeed_config`.

    Raises:
        ValueError: the configuration flattens parameters, or replaces the optimizer.
    """
    zero = config.get("zero_optimization") or {}
    if config.get("optimizer"):
        kind = config["optimizer"].get("type")
        raise ValueError(
            f"optimizer.type={kind!r} in the DeepSpeed config: DeepSpeed would build that in place "
            "of FusedMaskedAdam. Leave the section `optimizer` out"
        )
    device = (zero.get("offload_optimizer") or {}).get("device", "none")
    if device != "none" or zero.get("cpu_offload"):
        raise ValueError(
            "zero_optimization.offload_optimizer in the DeepSpeed config: ZeRO-Offload updates "
            "flat partitions on the host with DeepSpeed's own CPU Adam, which knows no rows. "
            f"{_REMEDY}"
        )
    stage = zero.get("stage", 0)
    if stage != 0:
        raise ValueError(
            f"zero_optimization.stage={stage} in the DeepSpeed config: ZeRO hands the optimizer "
            f"flat partitions of many parameters, in which there are no rows. {_REMEDY}"
        )


def connect(engine: Any) -> None:
    """Makes the optimizer of a DeepSpeed engine see the selections of the engine's model.

    Call it once, after `deepspeed.initialize` and before the first step. In fp32 it only checks.
    With `bf16` or `fp16` DeepSpeed's optimizer updates fp32 copies of the parameters: these get the
    parameters' selections.

    Raises:
        TypeError: `engine` is no DeepSpeed engine.
        ValueError: a selection that the optimizer cannot see, or another optimizer than
            FusedMaskedAdam.
    """
    if not hasattr(engine, "basic_optimizer") or not hasattr(engine, "module"):
        raise TypeError(
            f"engine is a {type(engine).__name__}: pass what deepspeed.initialize returned first"
        )
    optimizer = engine.basic_optimizer
    if not isinstance(optimizer, FusedMaskedAdam):
        raise ValueError(
            f"the engine's optimizer is {type(optimizer).__name__}: pass "
            "optimizer=longact.FusedMaskedAdam(...) to deepspeed.initialize and leave `optimizer` "
            "out of its config"
        )
    selected = {
        id(param): f"{name}.{key}"
        for name, layer in engine.module.named_modules()
        if isinstance(layer, SalientLinear)
        for key, param in layer.named_parameters(recurse=False)
        if param.requires_grad
    }
    if any(isinstance(m, CompactSalientLinear) for m in engine.module.modules()):
        raise ValueError(
            "the engine's model has others='freeze', whose parameters change their rows outside of "
            "DeepSpeed's copies: use others='train', or DistributedDataParallel"
        )
    if not selected:
        raise ValueError("the engine's model has no LongAct applied: call longact.apply first")
    updated = {id(param) for group in optimizer.param_groups for param in group["params"]}
    masters = _masters_of(engine.optimizer)
    missing = [
        name
        for key, name in selected.items()
        if key not in updated and id(masters.get(key)) not in updated
    ]
    if missing:
        raise ValueError(
            f"DeepSpeed's {type(engine.optimizer).__name__} does not hand {missing[0]} to the "
            f"optimizer as it is (ZeRO flattens parameters), so that its rows would be unknown. "
            f"{_REMEDY}"
        )
    if masters:
        # DeepSpeed took a step without gradients to make the states: it would count as an age.
        optimizer.state.clear()
    for group in getattr(engine.optimizer, "fp16_groups", ()) if masters else ():
        for param in group:
            attach(masters[id(param)], selection_of(param))


def _masters_of(optimizer: Any) -> dict[int, Tensor]:
    """id of a 16-bit parameter -> its fp32 copy, of DeepSpeed's FP16_UnfusedOptimizer."""
    halves, masters = (getattr(optimizer, f"fp{bits}_groups", None) or [] for bits in (16, 32))
    return {
        id(param): master
        for group, copies in zip(halves, masters, strict=False)
        for param, master in zip(group, copies, strict=False)
    }
