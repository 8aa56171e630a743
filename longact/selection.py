"""Which rows are trained, and how they are chosen from what the forwards counted.

A `Selection` belongs to one projection (or to one parameter, set by hand) and hangs on its
parameters; `longact.FusedMaskedAdam` reads it there. Data flows one way: `Selection.observe` counts
activations, `before_step` and `after_step` turn them into rows at the step boundary.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from longact.backends import is_capturing
from longact.kernels.channel_magnitude import channel_magnitude
from longact.kernels.topk_rows import topk_rows
from longact.rows import check_rows

__all__ = ["LongActWarning", "get_rows", "set_rows"]

_ATTRIBUTE = "_longact_selection"


class LongActWarning(UserWarning):
    """Something that training survives and its owner should know."""


@dataclass(frozen=True)
class SelectionConfig:
    """How rows are chosen; the arguments of `longact.apply`."""

    keep_ratio: float = 0.3
    metric: Literal["mean_abs", "rms", "max_abs"] = "mean_abs"
    scope: Literal["layer", "head", "model"] = "layer"
    refresh_every: int | Literal["forward"] = 1

    def __post_init__(self) -> None:
        ratio = self.keep_ratio
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0.0 < ratio <= 1.0:
            raise ValueError(
                f"keep_ratio={ratio!r}: must lie in (0, 1]; 0.3 trains 30 % of the rows"
            )
        if self.metric not in ("mean_abs", "rms", "max_abs"):
            raise ValueError(f"metric={self.metric!r}: use 'mean_abs', 'rms' or 'max_abs'")
        if self.scope not in ("layer", "head", "model"):
            raise ValueError(f"scope={self.scope!r}: use 'layer', 'head' or 'model'")
        every = self.refresh_every
        if every != "forward" and (
            isinstance(every, bool) or not isinstance(every, int) or every < 0
        ):
            raise ValueError(
                f"refresh_every={every!r}: use a number of optimizer steps, 0 to select once, or "
                "'forward'"
            )
        if every == "forward" and self.scope == "model":
            raise ValueError(
                "refresh_every='forward' selects inside each projection's own forward, where the "
                "other projections are not known yet: use scope='layer' or 'head'"
            )

    def count(self, channels: int) -> int:
        """k of n channels: `max(1, floor(keep_ratio * n + 0.5))`."""
        return max(1, int(self.keep_ratio * channels + 0.5))


@dataclass
class Selection:
    """The selected rows of one projection, and what the next choice is made from."""

    rows: Tensor | None = None  # int32, ascending; None: all. Written by `choose` only
    # For captured steps: how many rows, then the rows, then room for all; int32 [channels + 1].
    buffer: Tensor | None = None
    config: SelectionConfig | None = None  # None: rows are set by hand only
    name: str = ""
    kind: str = ""  # projections of one kind (q, k) are ranked together by scope="model"
    head_dim: int = 0
    magnitude: Tensor | None = None  # fp32 [channels]: totals since the last refresh
    tokens: Tensor | None = None  # int64: counted tokens since the last refresh
    steps: int = 0  # optimizer steps since the last refresh
    warned: bool = False
    report: tuple[_Report, int] | None = None  # of the last refresh on a GPU, and our place in it
    # refresh_every="forward": channels selected by any forward since the last step; bool [channels]
    union: Tensor | None = None
    union_is_new: bool = field(default=True)

    def __getstate__(self) -> dict[str, Any]:
        # A copy gets a buffer and a report of its own.
        return {**self.__dict__, "buffer": None, "report": None}

    def choose(self, rows: Tensor | None) -> None:
        self.rows = rows
        if self.buffer is not None:
            self._fill_buffer()

    def has_buffer(self, param: Tensor) -> bool:
        buffer = self.buffer
        return (
            buffer is not None
            and buffer.device == param.device
            and buffer.numel() == param.shape[0] + 1
        )

    def buffer_for(self, param: Tensor) -> Tensor:
        """The rows in a place that stays, for captured steps."""
        if not self.has_buffer(param):
            size = param.shape[0] + 1
            self.buffer = torch.zeros(size, dtype=torch.int32, device=param.device)
            self._fill_buffer()
        assert self.buffer is not None
        return self.buffer

    def _fill_buffer(self) -> None:
        assert self.buffer is not None
        rows = self.rows
        if rows is None:  # all of them: a captured step with rows stays one
            rows = torch.arange(self.buffer.numel() - 1, device=self.buffer.device)
        self.buffer[:1].fill_(rows.numel())
        self.buffer[1 : 1 + rows.numel()].copy_(rows)

    def observe(self, y: Tensor, token_mask: Tensor | None) -> Tensor:
        """Counts one forward's output `[tokens, channels]`; returns its own totals, fp32."""
        assert self.config is not None
        totals = channel_magnitude(y, token_mask, self.config.metric)
        tokens = y.shape[0] if token_mask is None else (token_mask != 0).sum()
        if self.magnitude is None or self.tokens is None or self.magnitude.device != y.device:
            self._move(y.shape[1], y.device)
            assert self.magnitude is not None
            assert self.tokens is not None
        if self.config.metric == "max_abs":
            torch.maximum(self.magnitude, totals, out=self.magnitude)
        else:
            self.magnitude.add_(totals)
        self.tokens.add_(tokens)
        return totals

    def _move(self, channels: int, device: torch.device) -> None:
        """Puts the totals on the device that the activations are on."""
        if self.magnitude is None or self.tokens is None:
            self.magnitude = torch.zeros(channels, dtype=torch.float32, device=device)
            self.tokens = torch.zeros((), dtype=torch.int64, device=device)
        else:
            self.magnitude, self.tokens = self.magnitude.to(device), self.tokens.to(device)

    def select_for_forward(self, totals: Tensor) -> Tensor:
        """Rows of one forward by its own totals; they join the union that the step updates."""
        # Compiled code cannot look at values; NaN counts as large there. Totals of nothing but
        # zeros: no token counted.
        usable = torch.compiler.is_compiling() or (bool(totals.any()) and _is_finite(self, totals))
        rows = _top_rows(self, totals) if usable or self.rows is None else self.rows
        if self.union is None or self.union_is_new or self.union.device != totals.device:
            self.union = torch.zeros(totals.shape[0], dtype=torch.bool, device=totals.device)
            self.union_is_new = False
        self.union.index_fill_(0, rows.long(), True)
        return rows

    def take_union(self) -> Tensor:
        """The channels that forwards selected since the last step, bool; then starts anew."""
        assert self.magnitude is not None
        union = self.union if self.union is not None and not self.union_is_new else None
        self.union_is_new = True
        self.forget()
        return torch.zeros_like(self.magnitude, dtype=torch.bool) if union is None else union

    def forget(self) -> None:
        """Starts counting afresh."""
        if self.magnitude is not None and self.tokens is not None:
            self.magnitude.zero_()
            self.tokens.zero_()


def selection_of(param: Tensor) -> Selection | None:
    selection: Selection | None = getattr(param, _ATTRIBUTE, None)
    return selection


def attach(param: Tensor, selection: Selection | None) -> None:
    if selection is not None:
        setattr(param, _ATTRIBUTE, selection)
    elif hasattr(param, _ATTRIBUTE):
        delattr(param, _ATTRIBUTE)


def set_rows(param: Tensor, rows: Tensor | Sequence[int] | None) -> None:
    """Selects by hand the rows of `param` that `longact.FusedMaskedAdam` updates.

    The selection holds until it is set again; of a projection under `longact.apply`, until the next
    refresh, and for its bias too. It hangs on this very tensor: `copy.deepcopy(param)` has none.

    Args:
        param: a parameter with at least one dimension; row r is `param[r]`.
        rows: ascending distinct integers `[k]` on param's device, or a list of int; empty: no row
            is updated; None: all rows are.

    Raises:
        ValueError: no rows to select from, or indices of another type, device, order or range.
    """
    if not isinstance(param, Tensor):
        raise TypeError(f"param must be a tensor, got {type(param).__name__}")
    if rows is not None:
        if not isinstance(rows, Tensor):
            rows = _as_tensor(rows, param.device)
        check_rows(rows, param)
        rows = rows.to(torch.int32, copy=True).contiguous()
    selection = selection_of(param)
    if selection is None:
        if rows is None:
            return
        selection = Selection()
        attach(param, selection)
    selection.choose(rows)


def _as_tensor(rows: Sequence[int], device: torch.device) -> Tensor:
    if isinstance(rows, (str, bytes)) or not isinstance(rows, Iterable):
        raise ValueError(f"rows={rows!r}: pass a tensor or a list of row indices")
    values = list(rows)
    bad = [r for r in values if isinstance(r, bool) or not hasattr(r, "__index__")]
    if bad:
        raise ValueError(f"rows holds {bad[0]!r}: pass integer row indices")
    beyond = [r for r in values if not 0 <= int(r) < 2**31]
    if beyond:
        raise ValueError(f"rows has index {beyond[0]}: param has no such row")
    return torch.tensor([int(r) for r in values], dtype=torch.int64, device=device)


def get_rows(param: Tensor) -> Tensor | None:
    """The selected rows of `param`, int32 ascending, or None where all rows are trained.

    This is the selection itself, not a copy: change it with `set_rows` only.
    """
    selection = selection_of(param)
    return None if selection is None else selection.rows


def _top_rows(selection: Selection, magnitude: Tensor) -> Tensor:
    """Rows of one projection by its own channels: scope "layer" or "head"."""
    config = selection.config
    assert config is not None
    if config.scope == "head":
        heads = magnitude.view(-1, selection.head_dim)
        rows = topk_rows(heads, config.count(selection.head_dim))
        offsets = torch.arange(heads.shape[0], dtype=torch.int32, device=rows.device)
        return (rows + offsets[:, None] * selection.head_dim).flatten()
    return topk_rows(magnitude, config.count(magnitude.shape[0]))


def refresh(selections: Iterable[Selection], *, wait: bool = True) -> None:
    """Chooses rows anew from what was counted since the last refresh, and starts counting afresh.

    Data-parallel ranks (of the default process group) add up their totals first, so that all select
    the same rows: every rank must call this for the same selections. A selection that counted
    nothing keeps its rows; so does one with a non-finite magnitude, with one warning that names it
    (scope="model": so do all of its kind).

    `wait=False`: nothing is read of selections on a GPU that have rows already, so that nothing
    waits for the device; the warning then comes with a later refresh. With scope="model", where
    the number of rows changes, they are read all the same.
    """
    members: dict[object, list[tuple[Selection, Tensor]]] = {}
    spoiled: set[object] = set()
    remote: list[tuple[Selection, Tensor, Tensor]] = []
    counting = [s for s in selections if s.config is not None and s.magnitude is not None]
    for selection, (total, tokens) in zip(counting, _totals_over_ranks(counting), strict=True):
        config = selection.config
        assert config is not None
        if not wait and config.scope != "model" and _is_remote(total):
            remote.append((selection, total, tokens))
            continue
        if int(tokens) > 0:
            magnitude = _magnitude(config, total, tokens)
            group: object = selection.kind if config.scope == "model" else id(selection)
            members.setdefault(group, []).append((selection, magnitude))
            if not _is_finite(selection, magnitude):
                spoiled.add(group)
    for group, ranked in members.items():
        if group in spoiled:
            continue
        config = ranked[0][0].config
        assert config is not None
        if config.scope == "model":
            _select_over_model(ranked, config)
        else:
            for selection, magnitude in ranked:
                _choose(selection, _top_rows(selection, magnitude))
    _choose_remotely(remote)
    for selection in counting:
        selection.forget()


def _magnitude(config: SelectionConfig, total: Tensor, tokens: Tensor) -> Tensor:
    if config.metric == "max_abs":
        return total
    mean = total / tokens
    return mean.sqrt() if config.metric == "rms" else mean


def _is_remote(tensor: Tensor) -> bool:
    """Whether reading it waits for a device."""
    return not tensor.is_cpu


class _Report:
    """Whether each of some selections met only finite magnitudes, on its way from their device."""

    def __init__(self, finite: Tensor) -> None:
        self.finite = torch.empty(finite.shape, dtype=torch.bool, pin_memory=finite.is_cuda)
        self.finite.copy_(finite, non_blocking=True)
        self._event = None
        if not finite.is_cpu:
            self._event = torch.Event(finite.device)
            self._event.record(torch.accelerator.current_stream(finite.device))

    def arrived(self) -> bool:
        return self._event is None or bool(self._event.query())


def _choose_remotely(counted: list[tuple[Selection, Tensor, Tensor]]) -> None:
    """The same choice on the selections' device, where it decides by itself what is usable."""
    by_device: dict[torch.device, list[tuple[Selection, Tensor]]] = {}
    capturing = is_capturing()
    for selection, total, tokens in counted:
        assert selection.config is not None
        # A captured step has no events and no pinned memory.
        if not capturing and selection.report is not None and selection.report[0].arrived():
            report, index = selection.report
            _warn_unless(selection, bool(report.finite[index]))
        magnitude = _magnitude(selection.config, total, tokens)
        rows, finite = _top_rows(selection, magnitude), torch.isfinite(magnitude).all()
        old = selection.rows
        if old is not None and selection.buffer is not None:
            # It stays where it is: a replay must not read rows that are freed by then.
            old = selection.buffer[1 : 1 + old.numel()]
        if old is None or old.shape != rows.shape:  # chosen by hand: read once
            if bool((finite & (tokens > 0)).all()):
                selection.choose(rows)
        else:
            selection.choose(torch.where(finite & (tokens > 0), rows, old.to(rows.device)))
        # Without a token the mean is 0 / 0, which is no fault of the activations.
        by_device.setdefault(total.device, []).append((selection, finite | (tokens == 0)))
    for here in [] if capturing else by_device.values():
        report = _Report(torch.stack([finite for _, finite in here]))
        for index, (selection, _) in enumerate(here):
            selection.report = (report, index)


def _totals_over_ranks(selections: list[Selection]) -> list[tuple[Tensor, Tensor]]:
    """(magnitude, tokens) of each selection, over all ranks."""
    totals: dict[int, tuple[Tensor, Tensor]] = {}
    for is_max in (False, True):
        mine = [s for s in selections if (s.config and s.config.metric == "max_abs") == is_max]
        tensors = [t for s in mine for t in (s.magnitude, s.tokens) if t is not None]
        flat = iter(_over_ranks(tensors, dist.ReduceOp.MAX if is_max else dist.ReduceOp.SUM))
        totals |= {id(s): (next(flat), next(flat)) for s in mine}
    return [totals[id(s)] for s in selections]


def _over_ranks(tensors: list[Tensor], op: Any) -> list[Tensor]:
    """Each tensor's sum or maximum over the data-parallel ranks, all in one collective."""
    if not tensors or not dist.is_initialized() or dist.get_world_size() == 1:
        return tensors
    device = tensors[0].device
    # fp64 holds fp32 totals, token counts and flags exactly.
    flat = torch.cat([t.to(device, torch.float64).flatten() for t in tensors])
    # A maximum over ranks may lose a NaN on the way, but not an inf.
    flat = torch.where(flat.isnan(), torch.inf, flat)
    dist.all_reduce(flat, op)
    pieces = torch.split(flat, [t.numel() for t in tensors])
    return [p.view(t.shape).to(t.device, t.dtype) for p, t in zip(pieces, tensors, strict=True)]


def _is_finite(selection: Selection, magnitude: Tensor) -> bool:
    """Whether rows can be chosen by it; warns once for each selection where not."""
    return _warn_unless(selection, bool(torch.isfinite(magnitude).all()))


def _warn_unless(selection: Selection, finite: bool) -> bool:
    if not finite and not selection.warned:
        selection.warned = True
        warnings.warn(
            f"{selection.name}: non-finite activations; its previous selection stays. Look for "
            "inf or NaN in the forward, or for too large a loss scale",
            LongActWarning,
            stacklevel=4,
        )
    return finite


def _select_over_model(members: list[tuple[Selection, Tensor]], config: SelectionConfig) -> None:
    channels = [magnitude.shape[0] for _, magnitude in members]
    device = members[0][1].device
    together = torch.cat([magnitude.to(device) for _, magnitude in members])
    chosen = topk_rows(together, config.count(together.shape[0]))
    start = 0
    for (selection, magnitude), count in zip(members, channels, strict=True):
        mine = chosen[(chosen >= start) & (chosen < start + count)] - start
        _choose(selection, mine.to(magnitude.device))
        start += count


def _choose(selection: Selection, rows: Tensor) -> None:
    # An unchanged selection keeps its tensor, and with it the native table and the compact moments.
    old = selection.rows
    if (
        old is None
        or old.shape != rows.shape
        or old.device != rows.device
        or not torch.equal(old, rows)
    ):
        selection.choose(rows)


def _check_capturable(selection: Selection) -> None:
    config = selection.config
    assert config is not None
    if config.refresh_every not in (0, 1) or config.scope == "model" or selection.rows is None:
        raise RuntimeError(
            f"{selection.name}: a captured step selects at every replay or never: use "
            "refresh_every=1 or 0 with scope='layer' or 'head', and call step() before the "
            f"capture (refresh_every={config.refresh_every!r}, scope={config.scope!r}, "
            f"{'no' if selection.rows is None else 'with'} rows)"
        )


def before_step(selections: Iterable[Selection]) -> None:
    """The step boundary, before the update: the first selection, or the union of the forwards'."""
    first, by_forward = [], []
    capturing = is_capturing()
    for selection in selections:
        if selection.config is None:
            continue
        if capturing:
            _check_capturable(selection)
        if selection.config.refresh_every == "forward":
            by_forward.append(selection)
        elif selection.rows is None:
            first.append(selection)
    refresh(first)
    unions = _over_ranks([s.take_union() for s in by_forward], dist.ReduceOp.MAX)
    for selection, union in zip(by_forward, unions, strict=True):
        if bool(union.any()):
            _choose(selection, union.nonzero().squeeze(1).to(torch.int32))


def after_step(selections: Iterable[Selection]) -> None:
    """The step boundary, after the update: every `refresh_every` steps, rows for the next ones."""
    due = []
    for selection in selections:
        every = None if selection.config is None else selection.config.refresh_every
        if every is None or every == "forward" or every == 0:
            continue
        selection.steps += 1
        if selection.steps >= int(every):
            selection.steps = 0
            due.append(selection)
    refresh(due, wait=False)
