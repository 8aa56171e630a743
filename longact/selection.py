"""Which rows are trained, and how they are chosen from what the forwards counted.

A `Selection` belongs to one projection (or to one parameter, set by hand) and hangs on its
parameters; `longact.FusedMaskedAdam` reads it there. Data flows one way: forwards add to its
counters, `before_step` and `after_step` turn them into rows at the step boundary.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from longact.backends import is_capturing
from longact.collectives import check_same, is_alone, over_ranks
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
    capture: Literal["projection", "norm", "rope"] = "projection"
    pair_rope: bool = False
    others: Literal["train", "freeze"] = "train"
    rows: Literal["salient", "touched"] = "salient"

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
        if self.capture not in ("projection", "norm", "rope"):
            raise ValueError(f"capture={self.capture!r}: use 'projection', 'norm' or 'rope'")
        if every == "forward" and self.capture != "projection":
            raise ValueError(
                f"refresh_every='forward' selects inside the projection, before what "
                f"capture={self.capture!r} counts is known: use capture='projection', or "
                "refresh_every=1"
            )
        if not isinstance(self.pair_rope, bool):
            raise ValueError(f"pair_rope={self.pair_rope!r}: use True or False")
        if self.others not in ("train", "freeze"):
            raise ValueError(f"others={self.others!r}: use 'train' or 'freeze'")
        if self.rows not in ("salient", "touched"):
            raise ValueError(f"rows={self.rows!r}: use 'salient' or 'touched'")
        if self.rows == "touched":
            self._check_touched()
        elif self.others == "freeze":
            for name, value in (("scope", "model"), ("refresh_every", "forward")):
                if getattr(self, name) == value:
                    raise ValueError(
                        f"others='freeze' with {name}={value!r}, which trains another number of "
                        "rows at each step: the parameters that hold them cannot grow; use "
                        "scope='layer' or 'head', and a number for refresh_every"
                    )

    def _check_touched(self) -> None:
        """What says how salient rows are chosen says nothing of touched ones."""
        for argument in fields(self):
            value = getattr(self, argument.name)
            if argument.name not in ("others", "rows") and value != argument.default:
                raise ValueError(
                    f"{argument.name}={value!r} with rows='touched', which trains the rows that "
                    f"the step's tokens read: leave {argument.name} out"
                )

    @property
    def is_compact(self) -> bool:
        """Whether the parameters that are trained hold the selected rows alone."""
        return self.others == "freeze" and self.rows == "salient"

    @property
    def by_forward(self) -> bool:
        """Whether a step trains the union of the rows that its forwards chose."""
        return self.refresh_every == "forward" or self.rows == "touched"

    def count(self, channels: int) -> int:
        """k of n channels: `max(1, floor(keep_ratio * n + 0.5))`."""
        return max(1, int(self.keep_ratio * channels + 0.5))


@dataclass(frozen=True)
class Candidates:
    """Channels of a projection that are ranked among each other: all, or those that make q or k."""

    kind: str  # scope="model" ranks those of one kind, of all projections, together
    head: int  # how many units scope="head" ranks together
    #: int64 [units, channels]: what is chosen as one, a channel or a rotary pair; None: each
    #: channel of the projection, in order.
    units: Tensor | None = None

    def totals(self, totals: Tensor, metric: str) -> Tensor:
        """`[units]` from the channels' `[channels]`."""
        if self.units is None:
            return totals
        of_units = totals[self.units]
        return of_units.amax(1) if metric == "max_abs" else of_units.sum(1)

    def rows(self, chosen: Tensor) -> Tensor:
        """The rows of chosen units, int32."""
        return chosen if self.units is None else self.units[chosen.long()].flatten().int()


@dataclass
class Selection:
    """The selected rows of one projection, and what the next choice is made from."""

    rows: Tensor | None = None  # int32, ascending; None: all. Written by `choose` only
    # For captured steps: how many rows, then the rows, then room for all; int32 [channels + 1].
    buffer: Tensor | None = None
    config: SelectionConfig | None = None  # None: rows are set by hand only
    name: str = ""
    candidates: tuple[Candidates, ...] = ()
    always: Tensor | None = None  # int32: rows that are no candidates and stay selected
    magnitude: Tensor | None = None  # fp32 [channels]: totals since the last refresh
    tokens: Tensor | None = None  # int64: counted tokens since the last refresh
    steps: int = 0  # optimizer steps since the last refresh
    warned: bool = False
    report: _Report | None = None  # of the refreshes on a GPU that this selection is the first of
    # others="freeze": the layer whose parameters hold the selected rows alone.
    holder: weakref.ReferenceType[Any] | None = None
    changed: Tensor | None = None  # bool [channels]: rows that a step of these may have changed
    is_provisional: bool = False  # chosen by the first forward alone
    is_agreed: bool = False  # the other ranks are known to select from the same
    captured: int | None = None  # rows that a captured backward reads at each replay
    # Of these rows those in a shard, as a buffer or not; kept, as `rows` are, while they hold.
    on_shard: dict[tuple[Shard, bool], Tensor] = field(default_factory=dict)
    # refresh_every="forward": rows of the last forward, int32; those of any since the last step,
    # bool [channels]; and whether one of these met a non-finite magnitude, bool.
    forward_rows: Tensor | None = None
    union: Tensor | None = None
    spoiled: Tensor | None = None

    # Set once, as every step of every selection asks for them: whether the parameters that are
    # trained hold the selected rows alone; whether each of the channels is a candidate by itself;
    # and of each of the candidates, how many units of a head are chosen, and how many it has.
    is_compact: bool = field(init=False, default=False)
    is_plain: bool = field(init=False, default=False)
    ranking: list[tuple[Candidates, int, int]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.is_compact = self.config is not None and self.config.is_compact
        self.is_plain = len(self.candidates) == 1 and self.candidates[0].units is None

    def __getstate__(self) -> dict[str, Any]:
        # A copy gets a buffer and a report of its own, and is in no captured graph.
        none: dict[str, Any] = {"buffer": None, "report": None, "captured": None, "on_shard": {}}
        return {**self.__dict__, **none, "holder": None}

    @property
    def num_chosen(self) -> int:
        """How many rows a refresh selects."""
        always = 0 if self.always is None else self.always.numel()
        return always + sum(
            (self.num_units(c) // head) * k * (1 if c.units is None else c.units.shape[1])
            for c, k, head in self.ranking
        )

    def num_units(self, candidates: Candidates) -> int:
        if candidates.units is not None:
            return candidates.units.shape[0]
        assert self.union is not None
        return self.union.shape[0]

    def join(self, chosen: Sequence[Tensor]) -> Tensor:
        """The rows to train, of the chosen units of each of the candidates."""
        rows = [c.rows(units) for c, units in zip(self.candidates, chosen, strict=True)]
        if self.always is not None:
            rows.append(self.always)
        return rows[0] if self.is_plain else torch.cat(rows).sort().values

    def choose(self, rows: Tensor | None) -> None:
        now = "all" if rows is None else rows.numel()
        if self.captured is not None and (self.is_compact or now != self.captured):
            # Parameters that hold rows go back into those that they were captured with.
            then, now = ("certain", "others") if self.is_compact else (self.captured, now)
            warnings.warn(
                f"{self.name or 'a parameter'}: a captured graph computes the gradient of {then} "
                f"rows, and now there are {now}: capture it again",
                LongActWarning,
                stacklevel=3,
            )
            self.captured = None
        self.rows = rows
        self.on_shard = {}
        if self.buffer is not None:
            self._fill_buffer()
        if (layer := self.held_by()) is not None and rows is not None:
            layer.read_rows()

    def rows_of_step(self, before: Tensor | None) -> Tensor | None:
        """What a step trained, given the rows `before` it: those, but for the first selection and
        for forwards with rows of their own, which are chosen as it begins."""
        by_forward = self.config is not None and self.config.by_forward
        return self.rows if before is None or by_forward else before

    def held_by(self) -> Any:
        return None if self.holder is None else self.holder()

    def check_count(self, rows: Tensor | None) -> None:
        """Raises ValueError where the parameters that hold the rows have room for others."""
        layer = self.held_by()
        if layer is not None and (rows is None or rows.numel() != layer.salient_weight.shape[0]):
            raise ValueError(
                f"rows={'None' if rows is None else f'{rows.numel()} rows'}: with others='freeze' "
                f"{self.name} trains {layer.salient_weight.shape[0]} rows, always"
            )

    def num_rows_of(self, param: Tensor) -> int:
        """How many rows there are to select from."""
        if self.is_compact and self.union is not None:
            return self.union.shape[0]
        return param.shape[0] if param.dim() > 0 else 0

    def fits(self, param: Tensor) -> bool:
        """Whether the parameter has a row for each channel; one of rows set by hand does."""
        if self.is_compact:
            return self.rows is not None and param.shape[:1] == self.rows.shape
        return self.union is None or param.shape[:1] == self.union.shape

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
        by_forward = self.config is not None and self.config.by_forward
        if by_forward or self.is_compact or torch.compiler.is_compiling():
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
        (rows,), status = _choose_from([_Totals(self, totals, tokens)], [self.forward_rows])
        # In places that stay, for replays of a captured forward.
        self.forward_rows.copy_(rows)
        self.union.index_fill_(0, rows.long(), True)
        self.spoiled.logical_or_(status[0] == NOT_FINITE)
        if not torch.compiler.is_compiling() and not _is_remote(status):
            _warn_if(self, int(status))
        return rows

    def move(self, channels: int, device: torch.device) -> None:
        """Makes what is counted, or puts it on the device that the activations are on."""
        if self.union is None or self.union.is_meta:
            self.union = torch.zeros(channels, dtype=torch.bool, device=device)
            self.spoiled = torch.zeros((), dtype=torch.bool, device=device)
            if self.is_compact:
                self.changed = torch.zeros_like(self.union)
            self._move_candidates(device)
            if self.candidates:
                self.magnitude = torch.zeros(channels, dtype=torch.float32, device=device)
                self.tokens = torch.zeros((), dtype=torch.int64, device=device)
                self.forward_rows = self._first_rows(device)
        else:
            self._move_candidates(device)
            names = ("magnitude", "tokens", "union", "spoiled", "forward_rows", "changed")
            for name in names:
                if getattr(self, name) is not None:
                    setattr(self, name, getattr(self, name).to(device))

    def _move_candidates(self, device: torch.device) -> None:
        self.candidates = tuple(
            c if c.units is None else replace(c, units=c.units.to(device)) for c in self.candidates
        )
        self.always = None if self.always is None else self.always.to(device)
        assert self.config is not None
        # With a scope other than "head" all units are one head.
        by_head = self.config.scope == "head"
        heads = [c.head if by_head else self.num_units(c) for c in self.candidates]
        self.ranking = [
            (c, self.config.count(n), n) for c, n in zip(self.candidates, heads, strict=True)
        ]

    def _first_rows(self, device: torch.device) -> Tensor:
        """Of each head the first, as many as are selected."""
        chosen = []
        for c, k, head in self.ranking:
            first = torch.arange(0, self.num_units(c), head, dtype=torch.int32, device=device)
            offset = torch.arange(k, dtype=torch.int32, device=device)
            chosen.append((first[:, None] + offset).flatten())
        return self.join(chosen)

    def restore(self, magnitude: Tensor | None, tokens: Tensor | None) -> None:
        """A checkpoint's counts, into the places that captured graphs know; its rows are set."""
        if magnitude is not None and tokens is not None:
            assert self.magnitude is not None
            assert self.tokens is not None
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
    selection = selection_of(param)
    if rows is not None:
        if not isinstance(rows, Tensor):
            rows = _as_tensor(rows, param.device)
        check_rows(rows, param, None if selection is None else selection.num_rows_of(param))
        rows = rows.to(torch.int32, copy=True).contiguous()
    if selection is None:
        if rows is None:
            return
        selection = Selection()
        attach(param, selection)
    selection.check_count(rows)
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


class _Totals(NamedTuple):
    """What a selection is chosen from, over all ranks."""

    selection: Selection
    total: Tensor
    tokens: Tensor


def _choose_from(
    members: Sequence[_Totals], previous: Sequence[Tensor | None]
) -> tuple[list[Tensor], Tensor]:
    """Rows and states (`select_rows`) of projections on one device; where nothing can be chosen
    the previous rows, if there are as many. Nothing is read by the host."""
    config = members[0].selection.config
    assert config is not None
    totals, tokens, olds, counts, heads = [], [], [], [], []
    pieces = []  # of each member: as many as it has candidates
    for (selection, total, over), old in zip(members, previous, strict=True):
        pieces.append(len(selection.ranking))
        for c, k, head in selection.ranking:
            totals.append(c.totals(total, config.metric))
            tokens.append(over)
            olds.append(old if selection.is_plain else None)
            counts.append(k)
            heads.append(head)
    chosen, status = select_rows(totals, tokens, olds, counts, heads, config.metric)
    if all(selection.is_plain for selection, _, _ in members):
        return chosen, status
    rows, states = [], []
    units, codes = iter(chosen), torch.split(status, pieces)
    for (selection, _, _), number, of_pieces, old in zip(
        members, pieces, codes, previous, strict=True
    ):
        new, state = selection.join([next(units) for _ in range(number)]), of_pieces.amax()
        if old is not None and old.shape == new.shape:
            new = torch.where(state == CHOSEN, new, old)
        rows.append(new)
        states.append(state)
    return rows, torch.stack(states)


def refresh(
    selections: Iterable[Selection], *, wait: bool = True, keep_counts: bool = False
) -> None:
    """Chooses rows anew from what was counted since the last refresh, and starts counting afresh.

    Data-parallel ranks (of the default process group) add up their totals first, so that all select
    the same rows: every rank must call this for the same selections. A selection that counted
    nothing keeps its rows; so does one with a non-finite magnitude, with one warning that names it
    (scope="model": so do all of its kind).

    `wait=False`: nothing is read of selections on a GPU that have rows already, so that nothing
    waits for the device; the warning then comes with a later refresh. With scope="model", where
    the number of rows changes, they are read all the same. `keep_counts=True`: what was counted
    counts for the next choice, too.
    """
    ranked: dict[object, list[_Totals]] = {}  # those that go together
    over_model: dict[object, list[_Totals]] = {}
    counting = [s for s in selections if s.config is not None and s.magnitude is not None]
    for totals in _over_all_ranks(counting):
        config = totals.selection.config
        assert config is not None
        if config.scope == "model":
            over_model.setdefault(config, []).append(totals)
        else:
            ranked.setdefault((config.metric, totals.total.device), []).append(totals)
    for members in ranked.values():
        _select(members, wait=wait)
    for members in over_model.values():
        _select_over_model(members)
    if not keep_counts:
        _forget(counting)
        for selection in counting:
            selection.is_provisional = False


def select_provisionally(selections: Sequence[Selection]) -> None:
    """others="freeze": rows for the first backward, from the first forward alone; where nothing can
    be chosen the first of each head. The first step's boundary selects from all of the step's
    forwards, as ever."""
    refresh(selections, keep_counts=True)
    for selection in selections:
        if selection.rows is None and selection.forward_rows is not None:
            selection.choose(selection.forward_rows.clone())
        selection.is_provisional = True


def _select(members: list[_Totals], *, wait: bool) -> None:
    """Scopes "layer" and "head": all projections on a device at once."""
    selections = [member.selection for member in members]
    device = members[0].total.device
    previous = [_previous(selection, device) for selection in selections]
    chosen, status = _choose_from(members, previous)
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
    """Scope "model": the candidates of one kind, of all projections, are ranked together."""
    config = members[0].selection.config
    assert config is not None
    kinds: dict[str, list[tuple[int, int]]] = {}  # whose candidates, and which of them
    for i, member in enumerate(members):
        for j, c in enumerate(member.selection.candidates):
            kinds.setdefault(c.kind, []).append((i, j))
    chosen: list[dict[int, Tensor]] = [{} for _ in members]
    for pieces in kinds.values():
        ranked, states = [], []
        for i, j in pieces:
            selection, total, tokens = members[i]
            totals = selection.candidates[j].totals(total, config.metric)
            ranked.append(magnitude_of(totals, tokens, config.metric).to(members[0].total.device))
            states.append(status_of(ranked[-1], tokens.to(ranked[-1].device)))
        codes = torch.stack(states).tolist()
        for (i, _), code in zip(pieces, codes, strict=True):
            _warn_if(members[i].selection, code)
        usable = [n for n, code in enumerate(codes) if code == CHOSEN]
        if NOT_FINITE in codes or not usable:
            continue
        magnitudes = [ranked[n] for n in usable]
        count = config.count(sum(y.shape[0] for y in magnitudes))
        for n, units in zip(usable, topk_rows_over(magnitudes, count), strict=True):
            i, j = pieces[n]
            chosen[i][j] = units.to(members[i].total.device)
    for (selection, _, _), units_of in zip(members, chosen, strict=True):
        if len(units_of) == len(selection.candidates):
            _choose(selection, selection.join([units for _, units in sorted(units_of.items())]))


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
    _check_ranks(selections)
    totals: dict[int, tuple[Tensor, Tensor]] = {}
    for is_max in (False, True):
        mine = [s for s in selections if (s.config and s.config.metric == "max_abs") == is_max]
        tensors = [t for s in mine for t in (s.magnitude, s.tokens) if t is not None]
        flat = iter(over_ranks(tensors, dist.ReduceOp.MAX if is_max else dist.ReduceOp.SUM))
        totals |= {id(s): (next(flat), next(flat)) for s in mine}
    return [_Totals(s, *totals[id(s)]) for s in selections]


def gather_counts(selections: Iterable[Selection]) -> None:
    """Moves the totals and tokens of all ranks to rank 0."""
    counting = [s for s in selections if s.magnitude is not None and s.tokens is not None]
    gathered = _over_all_ranks(counting)
    if is_alone():
        return
    if dist.get_rank() != 0:
        _forget(counting)
        return
    for selection, total, tokens in gathered:
        assert selection.magnitude is not None
        assert selection.tokens is not None
        selection.magnitude.copy_(total)
        selection.tokens.copy_(tokens)


def _check_ranks(selections: Sequence[Selection]) -> None:
    """Once for each selection, with the first collective that it is in."""
    if is_alone() or all(selection.is_agreed for selection in selections):
        return
    check_same(
        {s.name: 0 if s.union is None else s.union.numel() for s in selections},
        [asdict(s.config) for s in selections if s.config is not None],
    )
    for selection in selections:
        selection.is_agreed = True


def _warn_if(selection: Selection, code: int) -> None:
    if code == NOT_FINITE:
        _warn(
            selection,
            "non-finite activations; its previous selection stays. Look for inf or NaN in the "
            "forward, or for too large a loss scale",
        )


def _warn_if_nothing_counted(selections: Sequence[Selection]) -> None:
    """At a step by which they should have been chosen, all of them."""
    if selections and all(s.rows is None and not s.warned for s in selections):
        _warn(
            selections[0],
            "nothing was counted before this step, which trains all rows, of this projection and "
            "of all others. Only forwards of the model that longact.apply was given count, in "
            "training mode and with gradients: call that model, not its layers",
        )


def _warn(selection: Selection, what: str) -> None:
    """Once for each selection."""
    if not selection.warned:
        selection.warned = True
        warnings.warn(f"{selection.name}: {what}", LongActWarning, stacklevel=5)


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
    every = "forward" if config.by_forward else config.refresh_every
    if every not in (0, 1) or config.scope == "model" or rows is None:
        raise RuntimeError(
            f"{selection.name}: a captured step selects at every replay or never: use "
            "refresh_every=1 or 0 with scope='layer' or 'head', and call step() before the "
            f"capture (refresh_every={every!r}, scope={config.scope!r}, "
            f"{'no' if rows is None else 'with'} rows)"
        )
    if every == 1 and config.is_compact:
        raise RuntimeError(
            f"{selection.name}: a captured step cannot move rows in and out of the parameters that "
            "hold the selected ones: use refresh_every=0 with others='freeze'"
        )
    if config.is_compact:
        selection.captured = rows.numel()
    if every == 1 and rows.numel() != selection.num_chosen:
        raise RuntimeError(
            f"{selection.name}: {rows.numel()} rows were set by hand, and a step chooses "
            f"{selection.num_chosen}: call step() before the capture, or use refresh_every=0"
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
        if selection.config.by_forward:
            by_forward.append(selection)
        elif selection.rows is None:
            first.append(selection)
    refresh(first)
    _choose_unions(by_forward)
    _warn_if_nothing_counted([*first, *by_forward])


def _choose_unions(selections: list[Selection]) -> None:
    """What the forwards selected, or touched, is what the step updates."""
    if not selections:
        return
    _check_ranks(selections)
    mine = [s.union for s in selections if s.union is not None]
    spoiled = [s.spoiled.view(1) for s in selections if s.spoiled is not None]
    unions = over_ranks(mine, dist.ReduceOp.MAX)
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
        assert selection.config is not None
        if chosen.numel() > 0 or selection.config.rows == "touched":
            _choose(selection, chosen.to(union.device))


def after_step(selections: Iterable[Selection]) -> None:
    """The step boundary, after the update: every `refresh_every` steps, rows for the next ones."""
    due = []
    for selection in selections:
        config = selection.config
        if config is None or config.by_forward or config.refresh_every == 0:
            continue
        selection.steps += 1
        is_due = selection.steps >= int(config.refresh_every)
        if is_due:
            selection.steps = 0
        if is_due or selection.is_provisional:
            due.append(selection)
    refresh(due, wait=False)
