"""LongAct on the actor of verl's PPO and GRPO trainers, turned on in their configuration.

    actor_rollout_ref.actor._target_: longact.integrations.verl.LongActActorConfig

docs/frameworks.md has the whole YAML. verl imports this module where it reads that line, in the
driver and in the actor's workers; the reference model, the critic and the rollout keep their own.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import inspect
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from verl.workers.config import FSDPActorConfig, FSDPEngineConfig
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

import longact
from longact.apply import LongAct, decoder_of
from longact.monitor import Monitor
from longact.optim import FusedMaskedAdam
from longact.selection import LongActWarning, SelectionConfig

__all__ = ["LongActActorConfig", "LongActEngine"]

#: The key of `LongActEngine` among verl's engines, beside "fsdp" and "fsdp2".
BACKEND = "longact"
_OPTIONS = [name for name in inspect.signature(longact.apply).parameters if name != "model"]


@dataclass
class LongActActorConfig(FSDPActorConfig):  # type: ignore[misc]
    """verl's `FSDPActorConfig`, and `longact`: the arguments of `longact.apply`.

    It has verl build the actor with `LongActEngine`. verl reads it in the driver too, so that a
    mistake is found before any worker starts.

    Raises:
        ValueError: an unknown or wrong option, a strategy other than fsdp2, or quantization-aware
            training.
    """

    longact: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.strategy != "fsdp2":
            why = (
                "FSDP1 flattens the parameters of a layer into one, which leaves no rows to select"
                if self.strategy == "fsdp"
                else "this engine is built on verl's FSDP2 one"
            )
            raise ValueError(f"actor.strategy={self.strategy!r}: {why}. Use strategy: fsdp2")
        _check_options(self.longact)
        if self.fsdp_config.qat.enable:
            raise ValueError(
                "actor.fsdp_config.qat.enable=true: quantization-aware training replaces the "
                "projections that LongAct trains. Turn one of the two off"
            )
        super().__post_init__()
        _check_optimizer(self.optim)
        # As verl's own __post_init__ does: the engine is chosen by its configuration's strategy.
        self.engine = copy.copy(self.fsdp_config)
        object.__setattr__(self.engine, "strategy", BACKEND)
        self.engine.longact = dict(self.longact)


@EngineRegistry.register(model_type="language_model", backend=BACKEND, device="cuda")  # type: ignore[untyped-decorator]
class LongActEngine(FSDPEngineWithLMHead):  # type: ignore[misc]
    """verl's FSDP2 engine; the model that it trains has LongAct applied.

    Only forwards of training count: verl runs log-probabilities and validation in evaluation mode
    and without gradients. Padding that verl appends to packed sequences does not count. Metrics of
    `longact.monitor.Monitor` join verl's as `actor/longact/...`; checkpoints hold rows, ages and
    counts, and a resumed run goes on exactly.
    """

    #: The handle of `longact.apply`; None for a model that is not trained.
    handle: LongAct | None = None

    def __init__(
        self,
        model_config: Any,
        engine_config: FSDPEngineConfig,
        optimizer_config: Any,
        checkpoint_config: Any,
    ) -> None:
        self._options: dict[str, Any] = getattr(engine_config, "longact", {})
        self._token_mask: Tensor | None = None  # of the forward that comes next
        if model_config.lora_rank > 0:
            raise ValueError(
                f"model.lora_rank={model_config.lora_rank}: LoRA trains its own weights and not "
                "the projections'. Set lora_rank: 0, or train without LongAct"
            )
        engine_config = copy.copy(engine_config)
        object.__setattr__(engine_config, "strategy", "fsdp2")  # what verl's own code asks for
        super().__init__(model_config, engine_config, optimizer_config, checkpoint_config)

    def _build_module(self) -> nn.Module:
        module: nn.Module = super()._build_module()
        if not self.engine_config.forward_only:
            self.handle = longact.apply(module, **self._options)
            # After the hook of longact.apply, which takes the mask that the model is given.
            decoder = decoder_of(module, self.handle.projections.values())
            decoder.register_forward_pre_hook(self._mask_padding)
        return module

    def _build_optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = super()._build_optimizer(module)
        assert self.handle is not None
        self._monitor = Monitor(self.handle, optimizer)
        return optimizer

    def prepare_model_inputs(self, micro_batch: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        model_inputs, output_args = super().prepare_model_inputs(micro_batch)
        self._token_mask = None
        padding = output_args.get("pad_size", 0)
        if padding:
            # It ends the packed sequence, of which each sequence-parallel rank has a slice.
            length = model_inputs["input_ids"].shape[-1]
            size, rank = self.ulysses_sequence_parallel_size, 0
            if self.use_ulysses_sp:
                rank = self.ulysses_device_mesh["sp"].get_local_rank()
            position = torch.arange(length, device=model_inputs["input_ids"].device) + rank * length
            self._token_mask = (position < size * length - padding)[None]
        return model_inputs, output_args

    def _mask_padding(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        # Not as the model's attention_mask: that would undo the packing.
        assert self.handle is not None
        counted = next(iter(self.handle.projections.values())).counted
        assert counted is not None
        if counted.active and self._token_mask is not None:
            counted.mask = self._token_mask

    def train_batch(self, data: Any, loss_function: Callable[..., Any]) -> Any:
        outputs = super().train_batch(data, loss_function)
        metrics = self._monitor.pop()
        if self.is_mp_src_rank_with_outputs():
            # A list for each, as those of the micro-batches.
            outputs["metrics"].update({name: [value] for name, value in metrics.items()})
        return outputs

    def save_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        super().save_checkpoint(local_path, *args, **kwargs)
        if self.handle is not None and self.checkpoint_manager.should_save_optimizer:
            state = {"config": self.handle.arguments, **self.handle.state_dict()}
            torch.save(state, self._path_in(local_path))

    def load_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        loads = self.handle is not None and self.checkpoint_manager.should_load_optimizer
        state = self._load_state(local_path) if loads and local_path is not None else None
        super().load_checkpoint(local_path, *args, **kwargs)
        if self.handle is not None and state is not None:
            self.handle.load_state_dict(state)

    def _load_state(self, local_path: str) -> dict[str, Any] | None:
        path = self._path_in(local_path)
        if not os.path.exists(path):
            warnings.warn(
                f"{local_path} was saved without LongAct: its selection starts afresh at the first "
                "step",
                LongActWarning,
                stacklevel=3,
            )
            return None
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        assert self.handle is not None
        self.handle.check_arguments(state["config"], local_path)
        return state

    def _path_in(self, local_path: str) -> str:
        """As verl names its own files: each rank has what it counted."""
        world = torch.distributed.get_world_size()
        return os.path.join(local_path, f"longact_world_size_{world}_rank_{self.rank}.pt")


def _check_options(options: Mapping[str, Any]) -> None:
    for name in options:
        if name not in _OPTIONS:
            near = difflib.get_close_matches(name, _OPTIONS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"use {', '.join(_OPTIONS)}"
            raise ValueError(f"actor.longact has no option {name!r}: {hint}")
    config = SelectionConfig(**{n: value for n, value in options.items() if n != "targets"})
    if config.is_compact:
        raise ValueError(
            "actor.longact.others='freeze': verl's FSDP2 shards the parameters, and rows of a "
            "sharded one cannot be parameters of their own. Use others: train"
        )


def _check_optimizer(config: Any) -> None:
    try:
        cls = getattr(importlib.import_module(config.optimizer_impl), config.optimizer)
    except (ImportError, AttributeError):
        return  # verl says what is wrong
    if not (isinstance(cls, type) and issubclass(cls, FusedMaskedAdam)):
        raise ValueError(
            f"actor.optim is {config.optimizer_impl}.{config.optimizer}: LongAct selects its rows "
            "at the steps of its own optimizer. Use optimizer_impl: longact, optimizer: "
            "FusedMaskedAdam"
        )
