"""`Monitor`: what the steps of a run trained, as numbers for its logs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from longact.apply import LongAct
from longact.kernels.topk_rows import magnitude_of
from longact.nn import SalientEmbedding, SalientLinear
from longact.rows import is_sharded

__all__ = ["Monitor"]


class Monitor:
    """Watches the steps of an optimizer; `pop()` gives the means since it was last called.

    For each kind of projection (`q_proj`, `k_proj`), over the projections of that kind:

    - `longact/q_proj/activation_share`: of the summed channel magnitude (|activation| with
      `metric="mean_abs"`) counted since the last refresh, the part in the rows that it trained;
    - `longact/q_proj/overlap`: of the rows that it trained, the part that the step before trained;
    - `longact/q_proj/rows`: how many rows of a projection it trained;

    and `longact/grad_norm`, the 2-norm of the gradient of these rows over all projections, as the
    optimizer found it (after clipping). `layers=True` adds the rows of each projection, as
    `longact/rows/<name>`. On several ranks, shares are of this rank's tokens (under tensor
    parallelism, of the first rank's channels).

    Nothing waits for a GPU before `pop()`.
    """

    def __init__(
        self, handle: LongAct, optimizer: torch.optim.Optimizer, *, layers: bool = False
    ) -> None:
        self._layers = layers
        self._projections = handle.projections
        self._trained: dict[str, Tensor] = {}  # rows of the last step
        self._counted: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {}  # as the step begins
        self._sums: dict[str, Tensor] = {}  # of a metric's finite values, and how many
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]
        handle._hooks += self._hooks  # handle.remove() ends it

    def pop(self) -> dict[str, float]:
        """The means since the last call; what no step had a value for is left out."""
        sums, self._sums = self._sums, {}
        if not sums:
            return {}
        device = next(iter(sums.values())).device
        read = torch.stack([s.to(device) for s in sums.values()]).tolist()  # one copy for all
        return {key: s / n for key, (s, n) in zip(sums, read, strict=True) if n > 0}

    def remove(self) -> None:
        """Stops watching."""
        for hook in self._hooks:
            hook.remove()

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """The step will start counting afresh, and may choose its rows first."""
        self._counted = {
            name: (layer.selection.magnitude.clone(), layer.selection.tokens.clone(), layer.rows)
            for name, layer in self._projections.items()
            if layer.selection.magnitude is not None and layer.selection.tokens is not None
        }

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        grads: list[Tensor] = []
        for name, (total, tokens, rows_before) in self._counted.items():
            layer = self._projections[name]
            config, kind = layer.selection.config, name.rpartition(".")[2]
            assert config is not None
            rows = layer.selection.rows_of_step(rows_before)
            if rows is None:
                continue
            magnitude = magnitude_of(total, tokens, config.metric)
            chosen = magnitude.index_select(0, rows.to(magnitude.device))
            previous = self._trained.get(name)
            self._trained[name] = rows
            values: dict[str, Tensor | float] = {
                "activation_share": chosen.sum() / magnitude.sum(),
                "rows": float(rows.numel()),
            }
            if previous is not None:
                values["overlap"] = torch.isin(rows, previous.to(rows.device)).float().mean()
            for key, value in values.items():
                self._add(f"longact/{kind}/{key}", value)
            if self._layers:
                self._add(f"longact/rows/{name}", rows.numel())
            is_whole = rows_before is None and not config.is_compact
            grads += _gradients(layer, rows if is_whole else None)
        self._counted = {}
        if grads:
            norm = get_total_norm(grads)
            if is_sharded(norm):
                norm = norm.full_tensor()  # type: ignore[attr-defined]
            scale = getattr(optimizer, "grad_scale", None)  # GradScaler's, undone by the kernel
            self._add("longact/grad_norm", norm if scale is None else norm / scale)

    def _add(self, key: str, value: Tensor | float) -> None:
        value = torch.as_tensor(value, dtype=torch.float32)
        one = torch.stack([value, torch.ones_like(value)])
        one = one.where(value.isfinite(), 0)
        before = self._sums.get(key)
        self._sums[key] = one if before is None else before + one.to(before.device)


def _gradients(layer: SalientLinear | SalientEmbedding, rows: Tensor | None) -> list[Tensor]:
    """Of weight and bias; `rows` of them where others are not zero (which sharded ones have no
    norm for)."""
    grads = [p.grad for p in layer.parameters(recurse=False) if p.grad is not None]
    if rows is None:
        return grads
    return [g.index_select(0, rows.to(g.device)) for g in grads if not is_sharded(g)]
