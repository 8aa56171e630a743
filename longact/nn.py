"""`SalientLinear`: a linear layer whose weight gradient is computed for its selected rows only."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longact.kernels.channel_magnitude import channel_magnitude
from longact.kernels.projection import fuses, projections
from longact.kernels.row_grad import is_for_triton, linear_grads, row_sums
from longact.selection import Selection, attach, selection_of

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

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.active = module.training and torch.is_grad_enabled()
        mask = kwargs.get("attention_mask")
        if mask is None and self.mask_position is not None and self.mask_position < len(args):
            mask = args[self.mask_position]
        self._flat_masks.clear()
        # 4-D masks say who attends to whom, not which tokens are padding: every token counts then.
        is_token_mask = self.active and isinstance(mask, Tensor) and mask.dim() == 2
        self.mask = mask if is_token_mask else None

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
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


class SalientLinear(nn.Linear):
    """`nn.Linear` that trains only its selected output channels.

    Same constructor, parameters, `state_dict` and outputs as `nn.Linear`. With a selection the
    backward computes `weight.grad` and `bias.grad` for the selected rows alone; the other rows are
    exactly zero. The gradient of the input is the full one. `longact.apply` puts these in place and
    chooses the rows from the activations; `longact.set_rows(layer.weight, rows)` chooses them by
    hand. (LongAct, arXiv 2604.14922.)
    """

    selection: Selection
    counted: CountedForward | None
    shared: SharedInput | None
    is_removed = False  # by LongAct.remove(); FSDP2 puts its parameters in all the same

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.counted = self.shared = None
        self._attach(Selection())

    @classmethod
    def from_linear(cls, linear: nn.Linear, selection: Selection | None = None) -> SalientLinear:
        """A SalientLinear that shares everything of `linear`: parameters, hooks, training mode.

        Without a `selection` given, one that `longact.set_rows` hung on the weight stays.

        Raises:
            TypeError: `linear` is not a plain `nn.Linear` (LoRA-wrapped, quantized, ...).
        """
        if type(linear) is not nn.Linear:
            raise TypeError(
                f"linear is a {type(linear).__module__}.{type(linear).__name__}: only a plain "
                "torch.nn.Linear can become a SalientLinear"
            )
        salient = cls.__new__(cls)
        salient.__dict__.update(linear.__dict__)
        salient.counted = salient.shared = None
        salient._attach(selection or selection_of(linear.weight) or Selection())
        return salient

    @property
    def rows(self) -> Tensor | None:
        """The selected rows, int32 ascending; None: all."""
        return self.selection.rows

    def _attach(self, selection: Selection) -> None:
        self.selection = selection
        for param in (self.weight, self.bias):
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

    def _apply(self, fn: Any, recurse: bool = True) -> SalientLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._attach(self.selection)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._attach(self.selection)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._attach(self.selection)

    def forward(self, input: Tensor) -> Tensor:
        selection, counted = self.selection, self.counted
        counts = counted is not None and counted.active
        if counts and "_is_replica" in self.__dict__:
            raise NotImplementedError(
                f"{selection.name}: torch.nn.DataParallel's copies of a model cannot count for it: "
                "use DistributedDataParallel (torchrun), or one GPU (CUDA_VISIBLE_DEVICES=0)"
            )
        by_forward = selection.config is not None and selection.config.refresh_every == "forward"
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
        rows = selection.rows_now(self.weight)
        if rows is not None and rows.shape[0] == self.out_features:
            rows = None  # they are distinct: all of them
        trains = self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        if not (torch.is_grad_enabled() and trains and (rows is not None or by_forward)):
            y = F.linear(input, self.weight, self.bias)
            if counts:
                self._observe(y)
            return y

        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
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
        if rows is None:
            # Run again by activation checkpointing, which wants the same tensors saved.
            rows = torch.arange(self.out_features, dtype=torch.int32, device=y.device)
        rows = rows.to(y.device)
        return _RowGradLinear.apply(input, weight, bias, rows, y)  # type: ignore[no-any-return]

    def _observe(self, y: Tensor) -> Tensor | None:
        """Counts an output; returns its rows where each forward has its own."""
        assert self.counted is not None
        assert self.selection.config is not None
        totals, tokens = self.selection.counters(y.device)
        channel_magnitude(
            y.detach().reshape(-1, y.shape[-1]),
            self.counted.token_mask(y),
            self.selection.config.metric,
            out=totals,
            counted=tokens,
        )
        return self.selection.take(totals, tokens)

    def _project(
        self, input: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """A counted output, without a gradient, and its rows where each forward has its own."""
        x = input.reshape(-1, input.shape[-1])
        if self.shared is None or not fuses(x, [weight], [bias]):
            y = F.linear(input, weight, bias)
            return y, self._observe(y)
        flat, totals, tokens = self.shared.output(self, input, weight, bias)
        rows = self.selection.take(totals, tokens)
        return flat.view(*input.shape[:-1], flat.shape[-1]), rows
