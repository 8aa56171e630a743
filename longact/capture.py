"""`Capture`: counts q and k where they stand after the attention's norm, or after its rotation."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from longact.architectures import Attention, Heads
from longact.nn import SalientLinear
from longact.rows import local_of

__all__ = ["Capture", "check_capture"]


def check_capture(
    capture: Literal["norm", "rope"], attention: nn.Module, entry: Attention, kinds: Collection[str]
) -> None:
    """Raises ValueError where the attention has no such place."""
    what = f"capture={capture!r}: {type(attention).__name__}"
    if capture == "norm" and not all(_norm(attention, entry, kind) for kind in kinds):
        raise ValueError(
            f"{what} has no norm of q and k heads here: use capture='projection', or 'rope'"
        )
    if capture == "rope" and entry.rope is None:
        raise ValueError(f"{what} has no rotary embedding: use capture='projection'")


def _norm(attention: nn.Module, entry: Attention, kind: str) -> nn.Module | None:
    norm = getattr(attention, entry.norms.get(kind, ""), None)
    return norm if isinstance(norm, nn.Module) else None


class Capture:
    """Counts q and k of one attention module.

    With "norm" a head counts as it leaves its norm; with "rope" as the attention's scores have it,
    after the norm, if there is one, and the rotation.
    """

    def __init__(
        self,
        capture: Literal["norm", "rope"],
        attention: nn.Module,
        entry: Attention,
        heads: Mapping[str, Sequence[Heads]],
    ) -> None:
        # Not the entry, whose layouts cannot be pickled with a model.
        self._rope, self._heads_first = entry.rope, entry.heads_first
        self._norm_after_rope = entry.norm_after_rope
        self._heads = heads  # of each projection, by its name in the attention module
        self._rotates = capture == "rope"
        # Of the forward that runs; the layers hold this, which holds no layer otherwise.
        self._attention: nn.Module | None = None
        self._embeddings: Any = None
        kinds = {h.kind for own in heads.values() for h in own}
        norms = {kind: norm for kind in kinds if (norm := _norm(attention, entry, kind))}
        self._normed = set(norms)
        parameters = list(inspect.signature(attention.forward).parameters)
        name = "position_embeddings"
        self._position = parameters.index(name) if name in parameters else None
        self.hooks = [
            attention.register_forward_pre_hook(self._enter, with_kwargs=True),
            attention.register_forward_hook(self._leave, always_call=True),
            *(n.register_forward_hook(partial(self._leave_norm, k)) for k, n in norms.items()),
        ]

    def project(self, layer: SalientLinear, y: Tensor) -> None:
        """A counted output `[batch, tokens, out]` of one of the projections."""
        for name, own in self._heads.items():
            for heads in own:
                if heads.kind not in self._normed and getattr(self._attention, name) is layer:
                    rows = _rows_here(layer, heads).to(y.device)
                    columns = rows.flatten() - (0 if layer.shard is None else layer.shard.first)
                    y_heads = y[..., columns].view(*y.shape[:-1], *rows.shape)
                    self._count(layer, heads, rows, y_heads, is_first=heads is own[0])

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        embeddings = kwargs.get("position_embeddings")
        if embeddings is None and self._position is not None and self._position < len(args):
            embeddings = args[self._position]
        self._attention, self._embeddings = module, embeddings

    def _leave(self, *_: Any) -> None:
        self._attention = self._embeddings = None

    def _leave_norm(self, kind: str, module: nn.Module, args: Any, output: Tensor) -> None:
        for name, own in self._heads.items():
            layer = getattr(self._attention, name)
            for heads in own:
                if heads.kind == kind and layer.counted is not None and layer.counted.active:
                    y = local_of(output.detach())  # tensor parallelism's heads of this rank
                    if y.dim() == 4 and self._heads_first:
                        y = y.transpose(1, 2)
                    rows = _rows_here(layer, heads)
                    y = y.reshape(*y.shape[:2], *rows.shape)
                    self._count(layer, heads, rows, y, is_first=heads is own[0])

    def _count(
        self, layer: SalientLinear, heads: Heads, rows: Tensor, y: Tensor, *, is_first: bool
    ) -> None:
        """`y [batch, tokens, heads, head_dim]`, after its norm, of `rows [heads, head_dim]`. The
        tokens count once for all heads of a projection."""
        is_rotated = heads.kind in self._normed and self._norm_after_rope
        if self._rotates and heads.rotated and not is_rotated:
            assert self._rope is not None
            y = self._rope.rotate(y, heads.rotated, self._embeddings)
        layer.count_channels(y.flatten(-2), rows.flatten(), counts_tokens=is_first)


def _rows_here(layer: SalientLinear, heads: Heads) -> Tensor:
    """`heads.rows` of the heads that tensor parallelism leaves on this rank."""
    if layer.shard is None:
        return heads.rows
    first, channels = layer.shard
    is_here = (heads.rows >= first) & (heads.rows < first + channels)
    if bool((is_here.any(1) != is_here.all(1)).any()):
        raise NotImplementedError(
            f"{layer.selection.name}: tensor parallelism cuts a head in two, which "
            "capture='norm' and 'rope' count as a whole: use capture='projection', or fewer ranks"
        )
    return heads.rows[is_here.all(1)]
