"""What selected rows save on the wire: gradients between ranks, weights to an inference engine.

ddp.register_comm_hook(state := RowHookState(), allreduce_rows)

changes = ChangedRows(model, optimizer)
...                                     # steps
for name, rows, values in changes.pop():
    send(name, rows, values)            # where the engine runs: write_rows(its_weights, ...)
"""

# No `from __future__ import annotations`: DistributedDataParallel reads those of a hook.
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longact.nn import COMPACT_NAMES, CompactSalientLinear
from longact.rows import is_sharded
from longact.selection import Selection, selection_of

__all__ = ["Change", "ChangedRows", "RowHookState", "allreduce_rows", "write_rows"]


@dataclass
class RowHookState:
    """Of `allreduce_rows`; one for each DistributedDataParallel."""

    process_group: dist.ProcessGroup | None = None  # None: the default group
    bytes: int = 0  # all-reduced so far, of one rank's gradients
    dense_bytes: int = 0  # that DDP would have all-reduced without the hook


def allreduce_rows(
    state: RowHookState,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    """A communication hook of DistributedDataParallel that averages, of weights and biases with a
    selection, the selected rows alone.

    The others' gradients are zero on every rank, and stay so. Before the first selection, and with
    `refresh_every="forward"`, where each rank has rows of its own, whole gradients are averaged.

        ddp.register_comm_hook(RowHookState(), allreduce_rows)
    """
    group = state.process_group or dist.group.WORLD
    assert group is not None
    grads, rows_of = bucket.gradients(), [_shared_rows(p) for p in bucket.parameters()]
    flat = torch.cat(
        [
            (g if rows is None else g.index_select(0, rows.to(g.device))).flatten()
            for g, rows in zip(grads, rows_of, strict=True)
        ]
    ).div_(group.size())
    state.bytes += flat.numel() * flat.element_size()
    state.dense_bytes += bucket.buffer().numel() * flat.element_size()

    def unpack(_: Any) -> Any:
        start = 0
        for g, rows in zip(grads, rows_of, strict=True):
            shape = g.shape if rows is None else (rows.numel(), *g.shape[1:])
            end = start + torch.Size(shape).numel()
            part = flat[start:end].view(shape)
            start = end
            if rows is None:
                g.copy_(part)
            else:
                # Zero, unless rows were set by hand between backward passes.
                g.zero_().index_copy_(0, rows.long().to(g.device), part)
        return bucket.buffer()

    work = dist.all_reduce(flat, group=group, async_op=True)
    return work.get_future().then(unpack)


def _shared_rows(param: Tensor) -> Tensor | None:
    """Rows outside of which the gradient is zero on every rank."""
    selection = selection_of(param)
    if selection is None or selection.config is None or selection.is_compact:
        return None
    if selection.config.by_forward or selection.config.rows == "touched":
        return None
    return selection.rows


class Change(NamedTuple):
    name: str  # of a parameter, as in the model's state_dict
    rows: Tensor | None  # int32, ascending; None: all of it
    values: Tensor  # [rows, ...], or the whole parameter, which is not copied


class _Watched(NamedTuple):
    trained: nn.Parameter  # what the optimizer has
    whole: Tensor  # the parameter under its own name
    selection: Selection | None


class ChangedRows:
    """Which rows the steps of an optimizer changed since `pop()`, to bring an inference engine's
    weights up to date with less than all of them.

    Of weights and biases with a selection these are the rows that were trained, of others all, if
    they had a gradient. The policy `inactive="zero_grad"` moves all rows, and so does another
    optimizer than `longact.FusedMaskedAdam`.

    Args:
        model: not compiled or wrapped; sharded parameters (FSDP2) are gathered one at a time, by
            all ranks, as `pop()` comes to them.
        optimizer: of its parameters.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._watched = dict(_watched(model))
        self._changed: dict[str, Tensor | None] = {}  # rows; None: all
        # As a step begins; without a selection, all rows are trained.
        self._before: list[tuple[str, Selection | None, Tensor | None]] = []
        self._hooks = [
            optimizer.register_step_pre_hook(self._enter),
            optimizer.register_step_post_hook(self._leave),
        ]

    def pop(self) -> Iterator[Change]:
        """The changes since the last call, in the model's order; one is read as it is asked for."""
        changed, self._changed = self._changed, {}
        for name, watched in self._watched.items():
            if name not in changed:
                continue
            whole: Any = watched.whole.detach()
            if is_sharded(whole):
                whole = whole.full_tensor()
            rows = changed[name]
            if rows is not None:
                rows = rows.to(whole.device)
            yield Change(name, rows, whole if rows is None else whole.index_select(0, rows))

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The same with whole parameters, `(name, tensor)`: what vLLM's `load_weights` and verl's
        `update_weights` take. What no step trained is left out."""
        self._changed = dict.fromkeys(self._changed)
        for name, _, values in self.pop():
            yield name, values

    def remove(self) -> None:
        """Stops watching."""
        for hook in self._hooks:
            hook.remove()

    def _enter(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        groups = optimizer.param_groups
        policies = {id(p): group.get("inactive") for group in groups for p in group["params"]}
        self._before = []
        for name, watched in self._watched.items():
            key = id(watched.trained)
            if key in policies and watched.trained.grad is not None:
                selection = watched.selection if policies[key] == "freeze" else None
                self._before.append((name, selection, selection.rows if selection else None))

    def _leave(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for name, selection, before in self._before:
            rows = None if selection is None else selection.rows_of_step(before)
            known = self._changed.get(name, rows)
            if rows is None or known is None:
                self._changed[name] = None
            else:
                self._changed[name] = (
                    rows if known is rows else torch.unique(torch.cat([known, rows]))
                )


def _watched(model: nn.Module) -> Iterator[tuple[str, _Watched]]:
    for prefix, module in model.named_modules():
        for name, param in module.named_parameters(prefix, recurse=False):
            leaf = name.rpartition(".")[2]
            if not isinstance(module, CompactSalientLinear):
                yield name, _Watched(param, param, selection_of(param))
            elif leaf in COMPACT_NAMES:
                whole = leaf.removeprefix("salient_")
                yield (
                    name.removesuffix(leaf) + whole,
                    _Watched(param, getattr(module, whole), module.selection),
                )


def write_rows(weights: Mapping[str, Tensor], changes: Iterable[tuple[str, Any, Tensor]]) -> None:
    """Writes changes into weights of the same names, on their devices and in their dtypes.

    Raises:
        KeyError: there is no such weight.
    """
    for name, rows, values in changes:
        weight = weights[name].detach()
        if rows is None:
            weight.copy_(values)
        else:
            weight.index_copy_(0, rows.long().to(weight.device), values.to(weight))
