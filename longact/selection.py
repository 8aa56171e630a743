"""Which rows are trained, and how they are chosen from what the forwards counted.

A `Selection` belongs to one projection (or to one parameter, set by hand) and hangs on its
parameters; `longact.FusedMaskedAdam` reads it there. Data flows one way: forwards add to its
counters, `before_step` and `after_step` turn them into rows at the step boundary.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from longact.backends import is_capturing
from longact.kernels.topk_rows import (
    CHOSEN,
    NOT_FINITE,
    magnitude_of,
    select_rows,
    status_of,
    topk_rows_over,
)
from longact.rows import Shard, check_rows, local_row_buffer, local_rows

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
    report: _Report | None = None  # of the refreshes on a GPU that this selection is the first of
    captured: int | None = None  # rows that a captured backward reads at each replay
    # Of these rows those in a shard, as a buffer or not; kept, as `rows` are, while they hold.
    on_shard: dict[tuple[Shard, bool], Tensor] = field(default_factory=dict)
    # refresh_every="forward": rows of the last forward, int32; those of any since the last step,
    # bool [channels]; and whether one of these met a non-finite magnitude, bool.
    forward_rows: Tensor | None = None
    union: Tensor | None = None
    spoiled: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy gets a buffer and a report of its own, and is in no captured graph.
        none: dict[str, Any] = {"buffer": None, "report": None, "captured": None, "on_shard": {}}
        return {**self.__dict__, **none}

    def choose(self, rows: Tensor | None) -> None:
        if self.captured is not None and (rows is None or rows.numel() != self.captured):
            warnings.warn(
                f"{self.name or 'a parameter'}: a captured backward computes the gradient of "
                f"{self.captured} rows, and now there are "
                f"{'all' if rows is None else rows.numel()}: capture it again",
                LongActWarning,
                stacklevel=3,
            )
            self.captured = None
        self.rows = rows
        self.on_shard = {}
        if self.buffer is not None:
            self._fill_buffer()

    def fits(self, param: Tensor) -> bool:
        """Whether the parameter has a row for each channel; one of rows set by hand does."""
        channels = self.magnitude
        return channels is None or (param.dim() > 0 and param.shape[0] == channels.shape[0])

    def rows_on(self, shard: Shard, *, as_buffer: bool) -> Tensor:
        """The rows that lie in a shard of the parameter, counted from its start."""
        assert self.rows is not None
        key = (shard, as_buffer)
        if key not in self.on_shard:
            make = local_row_buffer if as_buffer else local_rows
            self.on_shard[key] = make(self.rows, shard)
        return self.on_shard[key]

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

    def rows_now(self, param: Tensor) -> Tensor | None:
        """The rows; while a CUDA graph is captured in the place that its replays find them in."""
        by_forward = self.config is not None and self.config.refresh_every == "forward"
        if by_forward or torch.compiler.is_compiling():
            return self.rows
        if not param.is_cuda or not is_capturing() or (self.rows is None and self.config is None):
            return self.rows
        if self.rows is None or not self.has_buffer(param):
            raise RuntimeError(
                f"{self.name or 'a parameter'}: a graph that is captured needs its rows in a place "
                "that stays: construct FusedMaskedAdam with capturable=True and train two steps "
                "before the capture"
            )
        assert self.buffer is not None
        self.captured = self.rows.numel()
        return self.buffer[1 : 1 + self.captured]

    def counters(self, device: torch.device, *, apart: bool = False) -> tuple[Tensor, Tensor]:
        """Where a forward adds its totals, fp32 `[channels]`, and its tokens, int64: the running
        ones, or new ones where it has rows of its own, or is to stand `apart` until `take`."""
        assert self.config is not None
        assert self.magnitude is not None
        if self.magnitude.device != device:
            self.move(self.magnitude.shape[0], device)
        assert self.tokens is not None
        if apart or self.config.refresh_every == "forward":
            return torch.zeros_like(self.magnitude), torch.zeros_like(self.tokens)
        return self.magnitude, self.tokens

    def take(self, totals: Tensor, tokens: Tensor) -> Tensor | None:
        """Takes in what a forward added to its counters; returns its rows, int32, where it has rows
        of its own."""
        assert self.config is not None
        assert self.magnitude is not None
        assert self.tokens is not None
        if totals is not self.magnitude:
            if self.config.metric == "max_abs":
                torch.maximum(self.magnitude, totals, out=self.magnitude)
            else:
                self.magnitude.add_(totals)
            self.tokens.add_(tokens)
        if self.config.refresh_every == "forward":
            return self._select_for_forward(totals, tokens)
        return None

    def _select_for_forward(self, totals: Tensor, tokens: Tensor) -> Tensor:
        """The rows of one forward, which join the union that the step updates. Where nothing can be
        chosen they are those of the forward before."""
        assert self.config is not None
        assert self.forward_rows is not None
        assert self.union is not None
        assert self.spoiled is not None
        (rows,), status = select_rows(
            [totals], [tokens], [self.forward_rows], *_ranking([self]), self.config.metric
        )
        # In places that stay, for replays of a captured forward.
        self.forward_rows.copy_(rows)
        self.union.index_fill_(0, rows.long(), True)
        self.spoiled.logical_or_(status[0] == NOT_FINITE)
        if not torch.compiler.is_compiling() and not _is_remote(status):
            _warn_if(self, int(status))
        return rows

    def move(self, channels: int, device: torch.device) -> None:
        """Makes what is counted, or puts it on the device that the activations are on."""
        if self.magnitude is None or self.magnitude.is_meta:
            self.magnitude = torch.zeros(channels, dtype=torch.float32, device=device)
            self.tokens = torch.zeros((), dtype=torch.int64, device=device)
            self.union = torch.zeros(channels, dtype=torch.bool, device=device)
            self.spoiled = torch.zeros((), dtype=torch.bool, device=device)
            (k,), (head_dim,) = _ranking([self])
            first = torch.arange(0, channels, head_dim, dtype=torch.int32, device=device)
            offset = torch.arange(k, dtype=torch.int32, device=device)
            self.forward_rows = (first[:, None] + offset).flatten()
        else:
            for name in ("magnitude", "tokens", "union", "spoiled", "forward_rows"):
                setattr(self, name, getattr(self, name).to(device))

    def restore(self, magnitude: Tensor | None, tokens: Tensor | None) -> None:
        """A checkpoint's counts, into the places that captured graphs know; its rows are set."""
        assert self.magnitude is not None
        assert self.tokens is not None
        if magnitude is not None and tokens is not None:
            self.magnitude.copy_(magnitude)
            self.tokens.copy_(tokens)
        self.drop_union()
        rows, last = self.rows, self.forward_rows
        if rows is not None and last is not None and rows.shape == last.shape:
            last.copy_(rows)

    def drop_union(self) -> None:
        if self.union is not None and self.spoiled is not None:
            self.union.zero_()
            self.spoiled.zero_()


def _zero(tensors: Iterable[Tensor | None]) -> None:
    """Of one dtype: in a few launches on a GPU."""
    present = [tensor for tensor in tensors if tensor is not None]
    if present:
        torch._foreach_zero_(present)


def _forget(selections: Sequence[Selection]) -> None:
    """They start counting afresh."""
    _zero(s.magnitude for s in selections)
    _zero(s.tokens for s in selections)


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


def _ranking(selections: Sequence[Selection]) -> tuple[list[int], list[int]]:
    """How many channels of each head each selects, and the channels of a head; with scope "layer"
    a projection is one head."""
    counts, head_dims = [], []
    for selection in selections:
        assert selection.config is not None
        assert selection.magnitude is not None
        by_head = selection.config.scope == "head"
        head_dims.append(selection.head_dim if by_head else selection.magnitude.shape[0])
        counts.append(selection.config.count(head_dims[-1]))
    return counts, head_dims


class _Totals(NamedTuple):
    """What a selection is chosen from, over all ranks."""

    selection: Selection
    total: Tensor
    tokens: Tensor


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
    ranked: dict[object, list[_Totals]] = {}  # those that go together
    over_model: dict[object, list[_Totals]] = {}
    counting = [s for s in selections if s.config is not None and s.magnitude is not None]
    for totals in _over_all_ranks(counting):
        config = totals.selection.config
        assert config is not None
        if config.scope == "model":
            over_model.setdefault((config, totals.selection.kind), []).append(totals)
        else:
            ranked.setdefault((config.metric, totals.total.device), []).append(totals)
    for members in ranked.values():
        _select(members, wait=wait)
    for members in over_model.values():
        _select_over_model(members)
    _forget(counting)


def _select(members: list[_Totals], *, wait: bool) -> None:
    """Scopes "layer" and "head": all projections on a device at once."""
    selections = [member.selection for member in members]
    config = selections[0].config
    assert config is not None
    device = members[0].total.device
    counts, head_dims = _ranking(selections)
    previous = [_previous(selection, device) for selection in selections]
    chosen, status = select_rows(
        [member.total for member in members],
        [member.tokens for member in members],
        previous,
        counts,
        head_dims,
        config.metric,
    )
    # Rows that were chosen by hand may be of another number: they are read once.
    fits = (
        old is not None and old.shape == new.shape
        for old, new in zip(previous, chosen, strict=True)
    )
    if wait or not _is_remote(status) or not all(fits):
        for selection, rows, code in zip(selections, chosen, status.tolist(), strict=True):
            _warn_if(selection, code)
            if code == CHOSEN:
                _choose(selection, rows)
        return
    for selection, rows in zip(selections, chosen, strict=True):
        selection.choose(rows)
    _report(selections, status)


def _previous(selection: Selection, device: torch.device) -> Tensor | None:
    rows = selection.rows
    if rows is not None and selection.buffer is not None:
        # It stays where it is: a replay must not read rows that are freed by then.
        rows = selection.buffer[1 : 1 + rows.numel()]
    return None if rows is None else rows.to(device)


def _select_over_model(members: list[_Totals]) -> None:
    """Scope "model": the channels of all projections of a kind are ranked together."""
    config = members[0].selection.config
    assert config is not None
    device = members[0].total.device
    magnitudes = [magnitude_of(m.total, m.tokens, config.metric) for m in members]
    states = [status_of(y, m.tokens) for y, m in zip(magnitudes, members, strict=True)]
    codes = torch.stack([state.to(device) for state in states]).tolist()
    for member, code in zip(members, codes, strict=True):
        _warn_if(member.selection, code)
    usable = [i for i, code in enumerate(codes) if code == CHOSEN]
    if NOT_FINITE in codes or not usable:
        return
    ranked = [magnitudes[i].to(device) for i in usable]
    chosen = topk_rows_over(ranked, config.count(sum(y.shape[0] for y in ranked)))
    for i, rows in zip(usable, chosen, strict=True):
        _choose(members[i].selection, rows.to(magnitudes[i].device))


def _is_remote(tensor: Tensor) -> bool:
    """Whether reading it waits for a device."""
    return not tensor.is_cpu


class _Report:
    """How the refreshes of some selections on a GPU went, on its way to the host."""

    def __init__(self, selections: Sequence[Selection], status: Tensor) -> None:
        self.selections = list(selections)
        self._worst = torch.zeros_like(status)  # since the last one was sent
        self._sent = torch.zeros(status.shape, dtype=status.dtype, pin_memory=status.is_cuda)
        self._is_sent = False
        self._arrival: torch.Event | None = None

    def add(self, status: Tensor) -> None:
        """Warns of what has arrived, and sends the next; nothing is dropped on the way."""
        torch.maximum(self._worst, status, out=self._worst)
        if self._is_sent:
            if self._arrival is not None and not self._arrival.query():
                return
            for selection, code in zip(self.selections, self._sent.tolist(), strict=True):
                _warn_if(selection, code)
        self._sent.copy_(self._worst, non_blocking=True)
        self._is_sent = True
        if not status.is_cpu:
            self._arrival = torch.Event(status.device)
            self._arrival.record(torch.accelerator.current_stream(status.device))
        self._worst.zero_()


def _report(selections: Sequence[Selection], status: Tensor) -> None:
    if is_capturing():  # a captured step has no events and no pinned memory
        return
    report = selections[0].report
    is_theirs = report is not None and len(report.selections) == len(selections)
    if (
        report is None
        or not is_theirs
        or any(mine is not its for mine, its in zip(selections, report.selections, strict=True))
    ):
        report = selections[0].report = _Report(selections, status)
    report.add(status)


def _over_all_ranks(selections: list[Selection]) -> list[_Totals]:
    totals: dict[int, tuple[Tensor, Tensor]] = {}
    for is_max in (False, True):
        mine = [s for s in selections if (s.config and s.config.metric == "max_abs") == is_max]
        tensors = [t for s in mine for t in (s.magnitude, s.tokens) if t is not None]
        flat = iter(_over_ranks(tensors, dist.ReduceOp.MAX if is_max else dist.ReduceOp.SUM))
        totals |= {id(s): (next(flat), next(flat)) for s in mine}
    return [_Totals(s, *totals[id(s)]) for s in selections]


def gather_counts(selections: Iterable[Selection]) -> None:
    """Moves the totals and tokens of all ranks to rank 0."""
    counting = [s for s in selections if s.magnitude is not None and s.tokens is not None]
    gathered = _over_all_ranks(counting)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    if dist.get_rank() != 0:
        _forget(counting)
        return
    for selection, total, tokens in gathered:
        assert selection.magnitude is not None
        assert selection.tokens is not None
        selection.magnitude.copy_(total)
        selection.tokens.copy_(tokens)


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


def _warn_if(selection: Selection, code: int) -> None:
    """Once for each selection."""
    if code == NOT_FINITE and not selection.warned:
        selection.warned = True
        warnings.warn(
            f"{selection.name}: non-finite activations; its previous selection stays. Look for "
            "inf or NaN in the forward, or for too large a loss scale",
            LongActWarning,
            stacklevel=4,
        )


def _choose(selection: Selection, rows: Tensor) -> None:
    # An unchanged selection keeps its tensor, and with it the native table and the compact moments;
    # to compare them on a GPU would be to wait for it.
    old = selection.rows
    unchanged = (
        not _is_remote(rows)
        and old is not None
        and old.shape == rows.shape
        and old.device == rows.device
        and torch.equal(old, rows)
    )
    if not unchanged:
        selection.choose(rows)


def _check_capturable(selection: Selection) -> None:
    config = selection.config
    assert config is not None
    rows = selection.rows
    if config.refresh_every not in (0, 1) or config.scope == "model" or rows is None:
        raise RuntimeError(
            f"{selection.name}: a captured step selects at every replay or never: use "
            "refresh_every=1 or 0 with scope='layer' or 'head', and call step() before the "
            f"capture (refresh_every={config.refresh_every!r}, scope={config.scope!r}, "
            f"{'no' if rows is None else 'with'} rows)"
        )
    assert selection.magnitude is not None
    (k,), (head_dim,) = _ranking([selection])
    chosen = selection.magnitude.shape[0] // head_dim * k
    if config.refresh_every == 1 and rows.numel() != chosen:
        raise RuntimeError(
            f"{selection.name}: {rows.numel()} rows were set by hand, and a step chooses {chosen}: "
            "call step() before the capture, or use refresh_every=0"
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
    _choose_unions(by_forward)


def _choose_unions(selections: list[Selection]) -> None:
    """refresh_every="forward": what the forwards selected is what the step updates."""
    if not selections:
        return
    mine = [s.union for s in selections if s.union is not None]
    spoiled = [s.spoiled.view(1) for s in selections if s.spoiled is not None]
    unions = _over_ranks(mine, dist.ReduceOp.MAX)
    sizes = [union.numel() for union in unions]
    # There and back once, for all of them.
    device = unions[0].device
    here = torch.cat([flags.to(device) for flags in (*unions, *spoiled)]).cpu()
    _zero(mine)
    _zero(spoiled)
    _forget(selections)
    *here_unions, are_spoiled = torch.split(here, [*sizes, len(spoiled)])
    for selection, is_spoiled in zip(selections, are_spoiled.tolist(), strict=True):
        _warn_if(selection, NOT_FINITE if is_spoiled else CHOSEN)
    rows = [chosen.nonzero().squeeze(1).to(torch.int32) for chosen in here_unions]
    there = torch.split(torch.cat(rows).to(device), [r.numel() for r in rows])
    for selection, union, chosen in zip(selections, unions, there, strict=True):
        if chosen.numel() > 0:
            _choose(selection, chosen.to(union.device))


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
