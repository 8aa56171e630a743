"""`Monitor`: what the steps of a run trained, as numbers for its logs."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from longact.apply import LongAct
from longact.kernels.topk_rows import magnitude_of
from longact.nn import SalientLinear
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
    `longact/rows/<name>`. On several ranks, shares are of this rank's tokens.

    Nothing waits for a GPU before `pop()`.
    """

    def __init__(
        self, handle: LongAct, optimizer: torch.optim.Optimizer, *, layers: bool = False
    ) -> None:
        self._layers = layers
        self._projections = handle.projections
        self._trained: dict[str, Tensor] = {}  # rows of the last step
        self._counted: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {}  # as the step begins
        self._values: dict[str, list[Tensor | float]] = defaultdict(list)
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def pop(self) -> dict[str, float]:
        """The means since the last call; what no step had a value for is left out."""
        keys = list(self._values)
        columns = [[float(v) for v in _to_host(self._values[key])] for key in keys]
        self._values.clear()
        finite = [[v for v in column if math.isfinite(v)] for column in columns]
        return {key: sum(v) / len(v) for key, v in zip(keys, finite, strict=True) if v}

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
            config, kind = layer.selection.config, layer.selection.kind
            assert config is not None
            # Later steps train the rows chosen before them; the first, and one of forwards with
            # rows of their own, those chosen as it began.
            is_known = rows_before is not None and config.refresh_every != "forward"
            rows = rows_before if is_known else layer.rows
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
                same = previous is rows
                values["overlap"] = 1.0 if same else torch.isin(rows, previous).float().mean()
            for key, value in values.items():
                self._values[f"longact/{kind}/{key}"].append(value)
            if self._layers:
                self._values[f"longact/rows/{name}"].append(float(rows.numel()))
            grads += _gradients(layer, None if rows_before is not None else rows)
        self._counted = {}
        if grads:
            norm = get_total_norm(grads)
            if is_sharded(norm):
                norm = norm.full_tensor()  # type: ignore[attr-defined]
            scale = getattr(optimizer, "grad_scale", None)  # GradScaler's, undone by the kernel
            self._values["longact/grad_norm"].append(norm if scale is None else norm / scale)


def _gradients(layer: SalientLinear, rows: Tensor | None) -> list[Tensor]:
    """Of weight and bias; `rows` of them where others are not zero (which sharded ones have no
    norm for)."""
    grads = [p.grad for p in layer.parameters(recurse=False) if p.grad is not None]
    if rows is None:
        return grads
    return [g.index_select(0, rows.to(g.device)) for g in grads if not is_sharded(g)]


def _to_host(values: list[Tensor | float]) -> list[float]:
    """One copy for all."""
    tensors = [v for v in values if isinstance(v, Tensor)]
    read = iter(torch.stack([v.to(tensors[0].device) for v in tensors]).tolist() if tensors else [])
    return [next(read) if isinstance(v, Tensor) else v for v in values]
