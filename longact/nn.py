"""Layers that train some of their rows: `SalientLinear`, of which only the gradient of the selected
rows is computed; `CompactSalientLinear`, where nothing else has a gradient at all;
`SalientEmbedding`."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from longact.architectures import LINEAR_LIKE
from longact.kernels.channel_magnitude import channel_magnitude_unchecked
from longact.kernels.projection import fuses, projections
from longact.kernels.row_grad import is_for_triton, linear_grads, row_grad, row_sums
from longact.optim import FusedMaskedAdam
from longact.rows import Shard, is_sharded, local_of, shard_of
from longact.selection import Selection, attach, select_provisionally, selection_of

if TYPE_CHECKING:
    from typing_extensions import Self

    from longact.capture import Capture

__all__ = ["SalientLinear"]


class CountedForward:
    """Says which forwards count, and which of their tokens.

    Its hooks stand on the module whose forward sees the attention mask. What counts is decided
    there, once for a whole forward: in training mode with gradients enabled. A layer that
    activation checkpointing runs again in the backward runs outside of that forward, and so is not
    counted twice; the reentrant kind's first run, without gradients inside a forward with them, is
    counted.
    """

    def __init__(self, mask_position: int | None) -> None:
        self.mask_position = mask_position  # of attention_mask among the forward's arguments
        self.active = False
        self.mask: Tensor | None = None
        self._flat_masks: dict[tuple[torch.Size, torch.device], Tensor] = {}  # of an output's kind
        self.shared: list[SharedInput] = []
        self.compact: list[Selection] = []  # which need rows before the first backward
        self.is_first = True

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.active = module.training and torch.is_grad_enabled()
        if self.active and self.is_first and self.compact:
            _check_ddp(self.compact)
        mask = kwargs.get("attention_mask")
        if mask is None and self.mask_position is not None and self.mask_position < len(args):
            mask = args[self.mask_position]
        self._flat_masks.clear()
        # 4-D masks say who attends to whom, not which tokens are padding: every token counts then.
        is_token_mask = self.active and isinstance(mask, Tensor) and mask.dim() == 2
        self.mask = mask if is_token_mask else None

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        is_first = self.is_first and not torch.compiler.is_compiling()
        if self.active and is_first and output is not None:
            first = [selection for selection in self.compact if selection.rows is None]
            if first:
                select_provisionally(first)
            self.is_first = False
        self.active = False
        self.mask = None
        self._flat_masks.clear()
        for shared in self.shared:
            shared.clear()

    def token_mask(self, y: Tensor) -> Tensor | None:
        """The mask `[tokens]` for an output `[batch, sequence, channels]` of this forward."""
        if self.mask is None:
            return None
        if torch.compiler.is_compiling():
            return self._flat_mask(self.mask, y)
        key = (y.shape[:-1], y.device)
        if key not in self._flat_masks:
            self._flat_masks[key] = self._flat_mask(self.mask, y)
        return self._flat_masks[key]

    def _flat_mask(self, mask: Tensor, y: Tensor) -> Tensor:
        if y.dim() == 3 and mask.shape[0] == y.shape[0] and mask.shape[1] > y.shape[1]:
            mask = mask[:, -y.shape[1] :]  # with a key/value cache it covers earlier tokens too
        if mask.numel() != y.numel() // y.shape[-1]:
            raise ValueError(
                f"attention_mask has shape {[*mask.shape]}, which does not fit a projection's "
                f"output of shape {[*y.shape]}: longact cannot tell which tokens are padding"
            )
        return (mask != 0).flatten().to(y.device)


def _check_ddp(selections: Sequence[Selection]) -> None:
    """A DistributedDataParallel knows the parameters that there were when it was made."""
    ddp = getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
    if ddp is None:
        return
    known = {id(param) for param in ddp._module_parameters}
    for selection in selections:
        layer = selection.held_by()
        if layer is not None and id(layer.salient_weight) not in known:
            raise RuntimeError(
                f"{selection.name}: the model was wrapped in DistributedDataParallel before "
                "longact.apply(..., others='freeze'), and the ranks would drift apart: apply "
                "first, then wrap"
            )


class _Output(NamedTuple):
    y: Tensor  # [tokens, out]
    totals: Tensor  # of its channels' magnitudes, fp32 [out]
    tokens: Tensor  # that these are over, int64


class SharedInput:
    """Projections of one attention block (q and k): where they read the same input, the fused
    kernel computes both when the first is called, and the other takes what lies ready."""

    def __init__(self, layers: Sequence[SalientLinear] = ()) -> None:
        self._layers = [weakref.ref(layer) for layer in layers]  # they hold this
        self._is_shared = True  # until a layer is found to read another input
        self._input: tuple[Tensor | None, int] = (None, 0)  # what `_ready` is of, and its version
        self._ready: dict[SalientLinear, _Output] = {}

    def __reduce__(self) -> tuple[type[SharedInput], tuple[()]]:
        return SharedInput, ()  # a copy of one layer does not bring the other

    def clear(self) -> None:
        """What nobody took is not kept alive."""
        self._input = (None, 0)
        self._ready.clear()

    def output(
        self, layer: SalientLinear, input: Tensor, weight: Tensor, bias: Tensor | None
    ) -> _Output:
        """One layer's output for an input that `fuses`; no gradient flows."""
        last, version = self._input
        if last is input and version == input._version and layer in self._ready:
            ready = self._ready.pop(layer)
            if not self._ready:
                self.clear()
            return ready
        if self._ready:
            self._is_shared = False
            self.clear()
        x = input.reshape(-1, input.shape[-1])
        others = [other for ref in self._layers if (other := ref()) not in (None, layer)]
        others = [
            other
            for other in others
            if self._is_shared and fuses(x, [weight, other.weight], [bias, other.bias])
        ]
        counters = [layer.selection.counters(x.device)]
        counters += [other.selection.counters(x.device, apart=True) for other in others]
        assert layer.counted is not None
        assert layer.selection.config is not None
        ys = projections(
            x,
            [weight, *(other.weight for other in others)],
            [bias, *(other.bias for other in others)],
            layer.counted.token_mask(input),
            layer.selection.config.metric,
            [totals for totals, _ in counters],
            [tokens for _, tokens in counters],
        )
        outputs = [_Output(y, *counts) for y, counts in zip(ys, counters, strict=True)]
        if others:
            self._ready = dict(zip(others, outputs[1:], strict=True))
            self._input = (input, input._version)
        return outputs[0]


class _RowGradLinear(torch.autograd.Function):
    """Gives `y = input weight^T + bias`, computed already, a backward for `rows` only."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, y: Tensor
    ) -> Tensor:
        return y.detach()  # not y.view_as(y): autograd forbids in-place changes of a view made here

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, _, rows, _ = inputs
        # rows stays off save_for_backward: activation checkpointing compares what both runs save.
        ctx.save_for_backward(input, weight if ctx.needs_input_grad[0] else None)
        ctx.rows = rows
        # Hooks on saved tensors (activation checkpointing, save_on_cpu) give a copy of the weight,
        # which has no .grad.
        ctx.leaf = weight if weight.is_leaf else None

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        input, weight = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_input = grad_weight = grad_bias = None
        if needs_input:
            grad_input = grad_output @ weight
        flat = grad_output.reshape(-1, grad_output.shape[-1])
        flat_input = input.reshape(-1, input.shape[-1])
        if needs_weight:
            so_far = _grad_so_far(ctx.leaf, flat, flat_input)
            grad_weight, grad_bias = linear_grads(flat, flat_input, ctx.rows, needs_bias, so_far)
            if so_far is not None:
                grad_weight = _nothing_to_add(so_far)
        elif needs_bias:
            grad_bias = row_sums(flat, ctx.rows)
        return grad_input, grad_weight, grad_bias if needs_bias else None, None, None


class _CompactRowGradLinear(torch.autograd.Function):
    """Gives `y = input weight^T + bias`, computed already, a backward whose weight gradient is that
    of the selected rows, for the parameters that hold these alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor,
        weight: Tensor,
        salient_weight: Tensor,
        salient_bias: Tensor | None,
        rows: Tensor | None,
        layer: CompactSalientLinear | None,
        y: Tensor,
    ) -> Tensor:
        return y.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, salient_weight, _, rows, layer, _ = inputs
        ctx.save_for_backward(input, weight if ctx.needs_input_grad[0] else None)
        ctx.rows, ctx.layer, ctx.dtype = rows, layer, salient_weight.dtype

    @staticmethod
    @once_differentiable  # the weight that dx depends on is no parameter
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        input, weight = ctx.saved_tensors
        needs_input, _, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        grad_input = grad_weight = grad_bias = None
        if needs_input:
            grad_input = grad_output @ weight
        rows = ctx.rows if ctx.layer is None else ctx.layer.rows_of_backward(ctx.rows)
        flat = grad_output.reshape(-1, grad_output.shape[-1])
        if needs_weight:
            grad_weight = row_grad(flat, input.reshape(-1, input.shape[-1]), rows).to(ctx.dtype)
        if needs_bias:
            grad_bias = flat.index_select(1, rows).sum(0).to(ctx.dtype)
        return grad_input, None, grad_weight, grad_bias, None, None, None


def _grad_so_far(weight: Tensor | None, grad_output: Tensor, input: Tensor) -> Tensor | None:
    """The gradient that earlier micro-batches left in `weight.grad`, if this one may be added to
    its rows in place: autograd would first fill a gradient of full size with zeros, then add all of
    it."""
    if weight is None or torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    grad = weight.grad
    if grad is None or weight._backward_hooks or not is_for_triton(grad_output, input, grad):
        return None
    node = torch.autograd.graph.get_gradient_edge(weight).node
    try:
        return grad if torch._C._will_engine_execute_node(node) else None
    except RuntimeError:  # torch.autograd.grad asks for this gradient
        return None


def _nothing_to_add(grad: Tensor) -> Tensor:
    """A sparse gradient without entries: autograd's accumulation and its hooks run, at no cost."""
    indices = torch.empty(1, 0, dtype=torch.int64, device=grad.device)
    values = grad.new_empty(0, *grad.shape[1:])
    return torch.sparse_coo_tensor(indices, values, grad.shape, check_invariants=False)


_AUTOCAST_DEVICES = [d for d in ("cpu", "cuda", "xpu") if torch.amp.is_autocast_available(d)]


def _knows_autocast(device: str) -> bool:
    # torch 2.9's compiler cannot look into the question.
    is_compiling = torch.compiler.is_compiling()
    return device in _AUTOCAST_DEVICES if is_compiling else torch.amp.is_autocast_available(device)


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


class _Selecting(nn.Module):
    """A layer with a `Selection`, which hangs on its parameters, too."""

    selection: Selection
    counted: CountedForward | None
    is_removed = False  # by LongAct.remove(); FSDP2 puts its parameters in all the same

    @property
    def rows(self) -> Tensor | None:
        """The selected rows, int32 ascending; None: all."""
        return self.selection.rows

    @classmethod
    def _from(cls, layer: nn.Module, selection: Selection) -> Self:
        salient = cls.__new__(cls)
        salient.__dict__.update(layer.__dict__)
        salient.counted = None
        salient._attach(selection)
        if (wrap_forward := tensor_parallel_of(layer)) is not None:
            del salient.forward  # that of `layer`
            wrap_forward(salient)
        return salient

    def _attach(self, selection: Selection) -> None:
        self.selection = selection
        for param in self._parameters.values():
            if param is not None:
                attach(param, selection)

    # A parameter that is replaced (by assignment, sharding, .to("meta"), swap on conversion) or
    # copied with the module (copy.deepcopy, pickle) must carry the selection on.
    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        if param is not None and "selection" in self.__dict__ and not self.is_removed:
            attach(param, self.selection)

    def __setattr__(self, name: str, value: Any) -> None:
        # FSDP2 goes through register_parameter only where a module has its own __setattr__.
        super().__setattr__(name, value)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._attach(self.selection)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._attach(self.selection)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._attach(self.selection)


#: Names of the parameters of a CompactSalientLinear that hold rows.
COMPACT_NAMES = ("salient_weight", "salient_bias")


def is_plain_linear(module: nn.Module) -> bool:
    """Whether it computes what `nn.Linear` does; classes of its own name what they do."""
    return type(module) is nn.Linear or (
        isinstance(module, nn.Linear) and type(module).__name__ in LINEAR_LIKE
    )


def tensor_parallel_of(module: nn.Module) -> Callable[[nn.Module], object] | None:
    """What wraps the forward of a module as transformers' tensor parallelism has wrapped this one's
    (`from_pretrained(distributed_config=...)`); None where it has not."""
    forward: Any = module.__dict__.get("forward")
    if getattr(forward, "__module__", None) != "transformers.distributed.tensor_parallel":
        return None
    wrapped_by = inspect.getclosurevars(forward).nonlocals
    style, mesh = wrapped_by["self"], wrapped_by["mesh"]
    return lambda other: style.install_forward(other, mesh)


class SalientLinear(_Selecting, nn.Linear):
    """`nn.Linear` that trains only its selected output channels.

    Same constructor, parameters, `state_dict` and outputs as `nn.Linear`. With a selection the
    backward computes `weight.grad` and `bias.grad` for the selected rows alone; the other rows are
    exactly zero. The gradient of the input is the full one. `longact.apply` puts these in place and
    chooses the rows from the activations; `longact.set_rows(layer.weight, rows)` chooses them by
    hand. (LongAct, arXiv 2604.14922.)
    """

    shared: SharedInput | None = None
    capture: Capture | None = None  # what counts in place of the output
    # Of the last forward, under tensor parallelism: the channels that this rank has of the output.
    shard: Shard | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.counted = None
        self._attach(Selection())

    @classmethod
    def from_linear(cls, linear: nn.Linear, selection: Selection | None = None) -> Self:
        """A SalientLinear that shares everything of `linear`: parameters, hooks, training mode.

        Without a `selection` given, one that `longact.set_rows` hung on the weight stays.

        Raises:
            TypeError: `linear` is not a plain `nn.Linear` (LoRA-wrapped, quantized, ...).
        """
        if not is_plain_linear(linear):
            raise TypeError(
                f"linear is a {type(linear).__module__}.{type(linear).__name__}: only a plain "
                "torch.nn.Linear can become a SalientLinear"
            )
        return cls._from(linear, selection or selection_of(linear.weight) or Selection())

    def forward(self, input: Tensor) -> Tensor:
        selection, counted = self.selection, self.counted
        counts = counted is not None and counted.active
        if counts and "_is_replica" in self.__dict__:
            raise NotImplementedError(
                f"{selection.name}: torch.nn.DataParallel's copies of a model cannot count for it: "
                "use DistributedDataParallel (torchrun), or one GPU (CUDA_VISIBLE_DEVICES=0)"
            )
        by_forward = selection.config is not None and selection.config.by_forward
        if counts and by_forward and not torch.is_grad_enabled():
            raise NotImplementedError(
                f"{selection.name}: refresh_every='forward' does not work with reentrant "
                "activation checkpointing, which forgets which rows a forward selected: use "
                "gradient_checkpointing_kwargs={'use_reentrant': False}, or refresh_every=1"
            )
        if counts and ("weight" in self.__dict__ or "weight" not in self._parameters):
            raise NotImplementedError(
                f"{selection.name}.weight is not a parameter of its own any more: FSDP1 "
                "(FullyShardedDataParallel) flattens parameters and torch.nn.utils.parametrize "
                "hides them, which leaves no rows to select; use FSDP2 "
                "(torch.distributed.fsdp.fully_shard), without parametrizations"
            )
        if is_sharded(self.weight):
            return self._forward_in_part(input, counts=counts)
        if counts and self.weight.shape[0] != self.out_features:
            raise NotImplementedError(
                f"{selection.name}: transformers' tensor parallelism hides from a forward without "
                "gradients which channels it has, and reentrant activation checkpointing counts in "
                "that one: use gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        if self.shard is not None:
            self.shard = None
        return self._forward(
            input, self.weight, self.bias, selection.rows_now(self.weight), counts=counts
        )

    def _forward_in_part(self, input: Tensor, *, counts: bool) -> Tensor:
        """Tensor parallelism: this rank's channels of the output, from its rows of the weight."""
        from torch.distributed.tensor import DTensor, Partial, Replicate
        from torch.distributed.tensor import Shard as Sharded

        weight: Any = self.weight
        bias: Any = self.bias
        x: Any = input
        selection, name = self.selection, self.selection.name or "a SalientLinear"
        try:
            shard = shard_of(weight)
        except NotImplementedError as error:
            raise NotImplementedError(f"{name}.weight {error}") from None
        if selection.config is not None and selection.config.by_forward:
            raise NotImplementedError(
                f"{name}: refresh_every='forward' ranks the channels of each forward, of which "
                "tensor parallelism leaves a rank some only: use refresh_every=1"
            )
        self.shard = shard
        mesh, splits = weight.device_mesh, [not p.is_replicate() for p in weight.placements]
        if is_sharded(x):  # else F.linear says what is wrong
            if not all(p.is_replicate() for p in x.placements):
                x = x.redistribute(placements=[Replicate()] * mesh.ndim)
            # Of the input each rank has the gradient through its channels alone.
            x = x.to_local(grad_placements=[Partial() if s else Replicate() for s in splits])
            weight, bias = weight.to_local(), None if bias is None else bias.to_local()
        rows = selection.rows
        if rows is not None and rows.shape[0] != self.out_features:
            rows = selection.rows_on(shard, as_buffer=False)
        else:
            rows = None
        y = self._forward(x, weight, bias, rows, counts=counts)
        shape = torch.Size((*y.shape[:-1], self.out_features))
        return DTensor.from_local(
            y,
            mesh,
            [Sharded(-1) if s else Replicate() for s in splits],
            run_check=False,
            shape=shape,
            stride=torch.empty(shape, device="meta").stride(),
        )

    def _forward(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        *,
        counts: bool,
    ) -> Tensor:
        if not (torch.is_grad_enabled() and self._has_row_grad(rows)):
            y = F.linear(input, weight, bias)
            if counts:
                self._observe(y)
            return y

        device = input.device.type
        if _knows_autocast(device) and torch.is_autocast_enabled(device):
            # Autocast reaches F.linear but not a custom backward: cast as it would, double
            # excepted.
            dtype = torch.get_autocast_dtype(device)
            input, weight = _autocast(input, dtype), _autocast(weight, dtype)
            bias = None if bias is None else _autocast(bias, dtype)
        with torch.no_grad():
            if counts:
                y, own_rows = self._project(input, weight, bias)
                rows = rows if own_rows is None else own_rows
            else:
                y = F.linear(input, weight, bias)
        return self._with_row_grad(input, weight, bias, rows, y)

    def _has_row_grad(self, rows: Tensor | None) -> bool:
        """Whether the backward is one of some rows; else it is autograd's own."""
        config = self.selection.config
        by_forward = config is not None and config.by_forward
        # As many rows as there are, distinct: all of them.
        some = rows is not None and rows.shape[0] != self.out_features
        trains = self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        return trains and (some or by_forward)

    def _with_row_grad(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None, y: Tensor
    ) -> Tensor:
        if rows is None:
            # Run again by activation checkpointing, which wants the same tensors saved.
            rows = torch.arange(y.shape[-1], dtype=torch.int32, device=y.device)
        rows = rows.to(y.device)
        return _RowGradLinear.apply(input, weight, bias, rows, y)  # type: ignore[no-any-return]

    def _observe(self, y: Tensor) -> Tensor | None:
        """Counts an output; returns its rows where each forward has its own."""
        assert self.counted is not None
        assert self.selection.config is not None
        if self.capture is not None:
            self.capture.project(self, y.detach())
            return None
        if self.shard is not None:
            first, channels = self.shard
            rows = torch.arange(first, first + channels, device=y.device)
            self.count_channels(y.detach(), rows, counts_tokens=True)
            return None
        totals, tokens = self.selection.counters(y.device)
        channel_magnitude_unchecked(
            y.detach().reshape(-1, y.shape[-1]),
            self.counted.token_mask(y),
            self.selection.config.metric,
            out=totals,
            counted=tokens,
        )
        return self.selection.take(totals, tokens)

    def count_channels(self, y: Tensor, rows: Tensor, *, counts_tokens: bool) -> None:
        """Counts `y [batch, tokens, channels]` as the magnitudes of some of the rows.

        Ranks of tensor parallelism see the same tokens, which those with the first channels count.
        """
        assert self.counted is not None
        assert self.selection.config is not None
        metric = self.selection.config.metric
        totals, tokens = self.selection.counters(y.device)
        is_first = self.shard is None or self.shard.first == 0
        counted = tokens if counts_tokens and is_first else None
        mask = self.counted.token_mask(y)
        rows = rows.to(y.device)
        own = channel_magnitude_unchecked(y.reshape(-1, y.shape[-1]), mask, metric, counted=counted)
        if metric == "max_abs":
            own = torch.maximum(own, totals[rows])
            totals.index_copy_(0, rows, own)
        else:
            totals.index_add_(0, rows, own)

    def _project(
        self, input: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """A counted output, without a gradient, and its rows where each forward has its own."""
        x = input.reshape(-1, input.shape[-1])
        is_whole = self.capture is None and self.shard is None
        if self.shared is None or not is_whole or not fuses(x, [weight], [bias]):
            y = F.linear(input, weight, bias)
            return y, self._observe(y)
        flat, totals, tokens = self.shared.output(self, input, weight, bias)
        rows = self.selection.take(totals, tokens)
        return flat.view(*input.shape[:-1], flat.shape[-1]), rows


class CompactSalientLinear(SalientLinear):
    """A SalientLinear that trains its selected rows alone, as parameters of their own.

    `weight` and `bias` are frozen, and are what the forward uses. `salient_weight [rows, in]` and
    `salient_bias [rows]` are what is trained: the values of the selected rows, which go back into
    weight and bias after each optimizer step. So gradients, moments and masters have `[rows, in]`
    elements, whatever is done with them (accumulation, clipping, DDP, GradScaler). They are not in
    the `state_dict`, which is `nn.Linear`'s. `longact.apply(..., others="freeze")` puts these in
    place.
    """

    salient_weight: nn.Parameter
    salient_bias: nn.Parameter | None

    def hold_rows(self, num_rows: int) -> None:
        """Makes the parameters; `weight` and `bias` are to be frozen."""
        for name in COMPACT_NAMES:
            param = getattr(self, name.removeprefix("salient_"))
            rows = None if param is None else param.new_zeros((num_rows, *param.shape[1:]))
            self.register_parameter(name, None if rows is None else nn.Parameter(rows))
        self._start()

    def release_rows(self) -> None:
        """Takes the parameters out again, which the layer that this was made from shares."""
        self.selection.holder = None
        for name in COMPACT_NAMES:
            self._parameters.pop(name, None)

    def _start(self) -> None:
        self._attach(self.selection)
        self._gradients: dict[str, _Gradient] = {}  # of each parameter, the last
        # Of each parameter, when it was last equal to the rows.
        self._versions = {name: param._version for name, param, _ in self._held()}

    def _attach(self, selection: Selection) -> None:
        super()._attach(selection)
        selection.holder = weakref.ref(self)
        _watch_optimizers()

    def _held(self) -> list[tuple[str, nn.Parameter, Tensor]]:
        """(name, the selected rows, all rows)"""
        return [
            (name, held, getattr(self, name.removeprefix("salient_")))
            for name in COMPACT_NAMES
            if (held := self._parameters.get(name)) is not None
        ]

    def holds(self, param: Tensor) -> bool:
        return any(held is param for _, held, _ in self._held())

    def check_not_sharded(self) -> None:
        if is_sharded(self.weight) or is_sharded(self.salient_weight):
            raise NotImplementedError(
                f"{self.selection.name}: others='freeze' does not work with sharded parameters "
                "(FSDP2, tensor parallelism): use DistributedDataParallel, or others='train'"
            )

    @torch.no_grad()
    def read_rows(self) -> None:
        """The parameters become those of the rows that are selected now."""
        assert self.rows is not None
        self.check_not_sharded()
        for name, held, whole in self._held():
            held.copy_(whole.index_select(0, self.rows))
            self._versions[name] = held._version

    @torch.no_grad()
    def write_rows(self, param: Tensor) -> None:
        """What a step made of one of the parameters becomes the selected rows' values."""
        if self.rows is None:
            return
        self.check_not_sharded()
        rows = self.rows.long()
        for name, held, whole in self._held():
            if held is param:
                whole.index_copy_(0, rows, held)
                self._versions[name] = held._version
                if name in self._gradients:
                    self._gradients[name] = self._gradients[name]._replace(is_spent=True)
        assert self.selection.changed is not None
        self.selection.changed.index_fill_(0, rows, True)

    def _write_changes(self) -> None:
        """Of parameters that were changed otherwise than by an optimizer's step: in its closure, by
        averaging, ..."""
        if not torch.compiler.is_compiling():
            for name, held, _ in self._held():
                if held._version != self._versions[name]:
                    self.write_rows(held)

    def replaced(self, rows: Tensor) -> None:
        """These rows of weight and bias are not any more what training started from."""
        changed = self.selection.changed
        assert changed is not None
        changed.index_fill_(0, rows.long().to(changed.device), True)
        if self.rows is not None:
            self.read_rows()

    def rows_of_backward(self, rows: Tensor | None) -> Tensor:
        """Those of the forward; of one before the first selection those chosen as it ended."""
        now = self.rows
        if now is None:
            raise RuntimeError(
                f"{self.selection.name}: no rows are selected yet, and with others='freeze' there "
                "is no gradient without: run a forward in training mode (model.train()), not "
                "compiled, before or as this one"
            )
        if rows is not None and rows is not now:
            raise RuntimeError(
                f"{self.selection.name}: its rows changed between this forward and its backward, "
                "whose gradient would belong to others: run backward before step() or refresh()"
            )
        for name, held, _ in self._held():
            last = self._gradients.get(name)
            # What a step has had may have been set to zero in place.
            is_other = held.grad is not None and last is not None and last.rows is not now
            if is_other and not (last.is_spent and not bool(held.grad.any())):  # type: ignore[union-attr]
                self._refuse_gradient()
            self._gradients[name] = _Gradient(now, is_spent=False)
        return now

    def check_gradient(self, param: Tensor) -> None:
        """Raises RuntimeError where a gradient is one of rows that were selected before."""
        for name, held, _ in self._held():
            last = self._gradients.get(name)
            is_due = last is not None and not last.is_spent
            if held is param and is_due and last.rows is not self.rows:  # type: ignore[union-attr]
                self._refuse_gradient()

    def _refuse_gradient(self) -> NoReturn:
        raise RuntimeError(
            f"{self.selection.name}: with others='freeze' its gradient belongs to rows that are "
            "not selected any more: call zero_grad() after each step(), select others before "
            "backward() or after step(), and give weight and bias of a layer to one optimizer"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        rows, device = self.rows, self.weight.device
        if rows is not None and rows.device != device:
            self.selection.rows = rows.to(device)
        self.selection.move(self.out_features, device)
        self._start()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._write_changes()
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[no-untyped-call]
        for name in COMPACT_NAMES:
            destination.pop(prefix + name, None)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], *args: Any, **kwargs: Any,
    ) -> None:  # fmt: skip
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, *args, **kwargs
        )
        own = [prefix + name for name in COMPACT_NAMES]
        missing_keys[:] = [key for key in missing_keys if key not in own]
        if self.rows is not None:
            self.read_rows()

    def forward(self, input: Tensor) -> Tensor:
        self._write_changes()
        return super().forward(input)

    def _has_row_grad(self, rows: Tensor | None) -> bool:
        bias = self.salient_bias
        return self.salient_weight.requires_grad or (bias is not None and bias.requires_grad)

    def _with_row_grad(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None, y: Tensor
    ) -> Tensor:
        layer: CompactSalientLinear | None = self
        if torch.compiler.is_compiling():
            if rows is None:
                raise RuntimeError(
                    f"{self.selection.name}: no rows are selected yet, which a compiled forward "
                    "cannot do: run a training forward of the model uncompiled first"
                )
            layer = None
        return _CompactRowGradLinear.apply(  # type: ignore[no-any-return]
            input, weight, self.salient_weight, self.salient_bias, rows, layer, y
        )


class _Gradient(NamedTuple):
    rows: Tensor  # that it belongs to
    is_spent: bool  # whether a step has had it


@functools.cache
def _watch_optimizers() -> None:
    """Once: any optimizer may be given the parameters that hold rows."""
    register_optimizer_step_pre_hook(_check_optimizer)
    register_optimizer_step_post_hook(_write_rows)


def _compact_layers(optimizer: torch.optim.Optimizer) -> Iterator[tuple[CompactSalientLinear, Any]]:
    """Each of its parameters that is one of such a layer, or the frozen weight or bias of one."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            selection = selection_of(param)
            if selection is not None and (layer := selection.held_by()) is not None:
                yield layer, param


def _check_optimizer(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    pairs = list(_compact_layers(optimizer))
    own = {id(param) for _, param in pairs}
    for layer, param in pairs:
        if layer.holds(param):
            if param.grad is not None:
                layer.check_gradient(param)
        elif id(layer.salient_weight) not in own:
            raise RuntimeError(
                f"{layer.selection.name}: the optimizer has its frozen weight, and not the "
                "parameters that longact.apply(..., others='freeze') trains in its place: "
                "construct the optimizer afterwards, from model.parameters()"
            )


def _write_rows(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """The parameters that hold rows become these rows' values."""
    if not isinstance(optimizer, FusedMaskedAdam):  # which did it, before it chose other rows
        for layer, param in _compact_layers(optimizer):
            layer.write_rows(param)


class SalientEmbedding(_Selecting, nn.Embedding):
    """`nn.Embedding` of which a step trains the rows that its tokens read.

    Same parameters, `state_dict` and outputs as `nn.Embedding`; the gradient is its own, of full
    size. `longact.apply(model, targets=..., rows="touched")` puts these in place: the step then
    updates the rows of the tokens that counted since the last one, over all micro-batches and
    data-parallel ranks, and every other row keeps each bit, its moments and its age.
    """

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, selection: Selection) -> Self:
        """One that shares everything of `embedding`: parameters, hooks, training mode."""
        return cls._from(embedding, selection)

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        if self.counted is not None and self.training and torch.is_grad_enabled():
            self._touch(local_of(input), local_of(y), self.counted)
        return y

    def _touch(self, input: Tensor, y: Tensor, counted: CountedForward) -> None:
        union = self.selection.union
        assert union is not None
        if union.device != y.device:
            self.selection.move(self.num_embeddings, y.device)
            union = self.selection.union
            assert union is not None
        # Outside of the model's forward (for inputs_embeds), and of positions, there is no mask.
        has_mask = counted.mask is not None and input.shape[:1] == counted.mask.shape[:1]
        mask = counted.token_mask(y) if has_mask else None
        ids = input.flatten()
        counts = torch.ones_like(ids) if mask is None else mask.to(ids.dtype)
        # Not union[ids[mask]] = True, for whose size the host would wait.
        touched = torch.zeros_like(union, dtype=ids.dtype).index_add_(0, ids, counts)
        union.logical_or_(touched > 0)
