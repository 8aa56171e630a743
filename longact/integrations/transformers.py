"""LongAct in Hugging Face trainers: `Trainer`, and TRL's `SFTTrainer`, `GRPOTrainer` and others.

trainer = GRPOTrainer(...)
apply_to_trainer(trainer, keep_ratio=0.3)
trainer.train()
"""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

import longact
from longact.apply import LongAct
from longact.monitor import Monitor
from longact.nn import COMPACT_NAMES
from longact.optim import FusedMaskedAdam
from longact.selection import LongActWarning

__all__ = ["LongActCallback", "apply_to_trainer"]


def apply_to_trainer(
    trainer: Trainer,
    keep_ratio: float = 0.3,
    *,
    optimizer: Mapping[str, Any] | None = None,
    log_layers: bool = False,
    **arguments: Any,
) -> LongAct:
    """Makes a trainer train only the salient rows of its policy's query and key projections.

    Call it once, before `trainer.train()`. It applies LongAct to `trainer.model` (never to a
    reference model), has the trainer build `longact.FusedMaskedAdam` in place of AdamW with the
    trainer's own arguments (learning rate, betas, epsilon, weight decay, schedule), adds the
    metrics of `longact.monitor.Monitor` to each training log, and saves LongAct's state in the
    trainer's checkpoints, so that `trainer.train(resume_from_checkpoint=...)` goes on exactly.

    Works for `transformers.Trainer` and what derives from it: TRL's `SFTTrainer`, `GRPOTrainer`.

    Args:
        trainer: a constructed trainer.
        keep_ratio: as in `longact.apply`.
        optimizer: options of `longact.FusedMaskedAdam` beyond AdamW's, e.g.
            `{"state": "compact"}` or `{"master_weights": True}`.
        log_layers: log the number of selected rows of each projection, too.
        arguments: the other arguments of `longact.apply`: targets, metric, scope, refresh_every,
            capture, pair_rope, others, rows.

    Returns:
        The handle of `longact.apply`.

    Raises:
        ValueError: an argument out of range, a model with nothing to match, LongAct applied twice,
            or a trainer whose parallelism cannot work; nothing is changed then.

    A trainer that was given an optimizer of another kind keeps it, with a `LongActWarning`: see
    `LongAct.follow` for what that means.
    """
    _check_trainer(trainer)
    cls_and_kwargs = _optimizer_of(trainer, optimizer or {})
    if arguments.get("others") == "freeze":
        _check_freeze(trainer, cls_and_kwargs is not None or arguments.get("refresh_every") == 0)
    handle = longact.apply(trainer.model, keep_ratio, **arguments)
    if handle.config.is_compact:
        _hide_rows_from_vllm(trainer)
    trainer.optimizer_cls_and_kwargs = cls_and_kwargs or trainer.optimizer_cls_and_kwargs
    trainer.pop_callback(LongActCallback)  # of a handle that was removed
    trainer.add_callback(LongActCallback(handle, log_layers=log_layers))
    # First, so that the callbacks that report logs find the metrics in them.
    callbacks = trainer.callback_handler.callbacks
    callbacks.insert(0, callbacks.pop())
    return handle


class LongActCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """What `apply_to_trainer` adds to a trainer: logs, checkpoints, resumes."""

    def __init__(self, handle: LongAct, *, log_layers: bool = False) -> None:
        self.handle = handle
        self._log_layers = log_layers
        self._watched: tuple[torch.optim.Optimizer, Monitor] | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        optimizer: torch.optim.Optimizer,
        **kwargs: Any,
    ) -> None:
        name = type(self).__name__
        if not self.handle.is_applied:
            state.stateful_callbacks[name] = self.state()
            return
        if isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        self._watch(optimizer)
        if state.global_step > 0:
            saved = state.stateful_callbacks.get(name)
            if saved is None:
                warnings.warn(
                    f"the checkpoint of step {state.global_step} was saved without LongAct: its "
                    "selection starts afresh at the first step",
                    LongActWarning,
                    stacklevel=2,
                )
            else:
                self._restore(saved["attributes"], has_counts=args.process_index == 0)
        state.stateful_callbacks[name] = self.state()  # the trainer's next checkpoint updates it

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.world_size > 1:
            self.handle.gather_counts()  # a checkpoint keeps those of one rank

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._watched is None or logs is None or "loss" not in logs:  # not of training
            return
        metrics = self._watched[1].pop()
        logs.update(metrics)
        if state.log_history:  # has a copy
            state.log_history[-1].update(metrics)

    def state(self) -> dict[str, Any]:
        """Goes into the checkpoint's `trainer_state.json`."""
        buffer = io.BytesIO()
        torch.save(self.handle.state_dict(), buffer)
        return {
            "args": {},
            "attributes": {
                "config": self.handle.arguments,
                "selection": base64.b64encode(buffer.getvalue()).decode(),
            },
        }

    def _restore(self, saved: Mapping[str, Any], *, has_counts: bool) -> None:
        self.handle.check_arguments(saved["config"], "the checkpoint")
        buffer = io.BytesIO(base64.b64decode(saved["selection"]))
        selection = torch.load(buffer, map_location="cpu", weights_only=True)
        if not has_counts:  # those of all ranks are rank 0's in a checkpoint
            for entry in selection["projections"].values():
                entry["magnitude"].zero_()
                entry["tokens"].zero_()
        self.handle.load_state_dict(selection)

    def _watch(self, optimizer: torch.optim.Optimizer) -> None:
        if self._watched is not None:
            watched, monitor = self._watched
            if watched is optimizer:  # train() was called again
                return
            monitor.remove()
        monitor = Monitor(self.handle, optimizer, layers=self._log_layers)
        self._watched = optimizer, monitor
        if not isinstance(optimizer, FusedMaskedAdam):
            warnings.warn(
                f"the trainer's optimizer is {type(optimizer).__name__}, not FusedMaskedAdam: the "
                "masks act through the gradient alone, so weight decay and moments still move "
                "unselected rows, and the update saves neither time nor memory. Use "
                "optim='adamw_torch' and leave `optimizers` out to get FusedMaskedAdam",
                LongActWarning,
                stacklevel=2,
            )
            self.handle.follow(optimizer)


def _check_trainer(trainer: Trainer) -> None:
    if not isinstance(trainer, Trainer):
        raise TypeError(
            f"trainer is a {type(trainer).__name__}, not a transformers.Trainer: in a loop of your "
            "own use longact.apply(model)"
        )
    if trainer.model_init is not None:
        raise ValueError(
            "the trainer has a model_init, with which train() builds another model than the one "
            "that LongAct is applied to: pass model= instead"
        )
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, LongActCallback) and callback.handle.is_applied:
            raise ValueError(
                "trainer has LongAct applied already: call remove() on that handle first"
            )
    if trainer.args.restore_callback_states_from_checkpoint:
        raise ValueError(
            "restore_callback_states_from_checkpoint=True makes callbacks anew, which loses "
            "LongAct's: leave it False; LongAct's state is restored without it"
        )
    if trainer.is_deepspeed_enabled:
        raise ValueError(
            "the trainer runs under DeepSpeed, whose ZeRO hands the optimizer flat pieces of many "
            "parameters, in which there are no rows: use FSDP2 (fsdp_config) or DDP; "
            "docs/frameworks.md says what works with DeepSpeed"
        )
    if trainer.is_fsdp_enabled:
        plugin = trainer.accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise ValueError(
                f"fsdp_config has version {plugin.fsdp_version}: FSDP1 flattens parameters, which "
                "leaves no rows to select; set fsdp_config={'version': 2}"
            )


def _check_freeze(trainer: Trainer, rows_can_change: bool) -> None:
    """others="freeze" adds parameters to the model, whose rows change."""
    if trainer.optimizer is not None:
        raise ValueError(
            f"others='freeze': the trainer was given a {type(trainer.optimizer).__name__}, which "
            "cannot know the parameters that hold the selected rows: leave `optimizers` out"
        )
    if not rows_can_change:
        raise ValueError(
            f"others='freeze' with optim={str(trainer.args.optim)!r}, whose moments do not follow "
            "the rows as they change: use optim='adamw_torch', or refresh_every=0"
        )
    if trainer.args.torch_compile:
        raise ValueError(
            "others='freeze' with torch_compile=True: the first forward selects the rows, which a "
            "compiled one cannot do; use torch_compile=False, or others='train'"
        )
    if getattr(trainer.args, "sync_ref_model", False):
        raise ValueError(
            "others='freeze' with sync_ref_model=True, which pairs the parameters of model and "
            "reference model one by one: use others='train', or sync_ref_model=False"
        )


def _hide_rows_from_vllm(trainer: Trainer) -> None:
    """vLLM gets the weights, which have the rows' values, under the names that it knows."""
    generation = getattr(trainer, "vllm_generation", None)
    if generation is None:
        return
    all_params = generation._iter_named_params

    def known_params() -> Iterator[tuple[str, torch.Tensor]]:
        for name, param in all_params():  # gathers them, on every rank
            if not name.endswith(COMPACT_NAMES):
                yield name, param

    generation._iter_named_params = known_params


def _optimizer_of(
    trainer: Trainer, options: Mapping[str, Any]
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
    """Class and arguments that the trainer is to build its optimizer with; None: as it would."""
    if trainer.optimizer is not None:
        if options:
            raise ValueError(
                f"optimizer={dict(options)!r}: the trainer was given a "
                f"{type(trainer.optimizer).__name__} already; pass the options to that, or leave "
                "the trainer's `optimizers` out"
            )
        return None
    cls, kwargs = trainer.optimizer_cls_and_kwargs or trainer.get_optimizer_cls_and_kwargs(
        trainer.args, trainer.model
    )
    if cls is torch.optim.AdamW:
        cls = FusedMaskedAdam
    if not (isinstance(cls, type) and issubclass(cls, FusedMaskedAdam)):
        if options:
            raise ValueError(
                f"optimizer={dict(options)!r}: the trainer's arguments ask for "
                f"{getattr(cls, '__name__', cls)} (optim={str(trainer.args.optim)!r}); use "
                "optim='adamw_torch' to get FusedMaskedAdam"
            )
        return None
    kwargs = {**kwargs, **options}
    cls([nn.Parameter(torch.empty(0))], **kwargs)  # complains now, not when training starts
    return cls, kwargs
