"""`FusedMaskedAdam`: torch.optim.AdamW that updates only selected rows, in one fused call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from longact.backends import is_capturing, native, native_error
from longact.kernels.masked_adamw import (
    STEP_BEFORE_CAPTURE,
    AdamWGroup,
    NativeTable,
    ParamUpdate,
    dispatch,
)
from longact.rows import check_rows, is_sharded, local_of, local_rows, shard_index, shard_of
from longact.selection import Selection, after_step, before_step, selection_of, set_rows

__all__ = ["FusedMaskedAdam"]

_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
_HALF = (torch.bfloat16, torch.float16)


def _check_capture(optimizer: Optimizer) -> None:
    """torch's own: a captured step() needs capturable=True. Renamed in torch 2.14."""
    check = getattr(optimizer, "_accelerator_graph_capture_health_check", None)
    (check or optimizer._cuda_graph_capture_health_check)()


class _Verbatim:
    """A parameter's loaded state, opaque to Optimizer.load_state_dict.

    That would cast fp32 moments and ages to the parameter's dtype.
    """

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state


class FusedMaskedAdam(Optimizer):
    r"""Drop-in replacement of :class:`torch.optim.AdamW` with row-masked updates.

    A parameter without a selection is updated as AdamW does. Of one with a selection (from
    :func:`longact.apply` or :func:`longact.set_rows`) only the selected rows change, each with its
    own age for the bias correction; the gradient of the other rows is not read. All parameters of a
    device go in one native call (on a GPU: one kernel launch), where the native core supports them
    (contiguous, fp32, bf16 or fp16; on the CPU also fp64). The formulas are in docs/algorithm.md.

    Parameters that FSDP2 (`torch.distributed.fsdp.fully_shard`) has sharded are updated in place,
    each rank its own rows, without communication; their state is sharded as they are. Sharded
    otherwise than by rows, they cannot have a selection.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize: as in AdamW; `lr` may be a tensor.
        foreach, fused: accepted and without effect: there is one implementation, which is fused.
        capturable: `step()` can be captured into a CUDA graph. An lr tensor on the GPU is read at
            each replay, and so are the selected rows: :func:`longact.set_rows` between two replays
            takes effect without a new capture (of a parameter that had a selection when it was
            captured). Run `step()` before each capture, and capture again after load_state_dict.
            Not with `state="compact"`, whose moments move when the selection changes.
        differentiable: not supported, True is refused.
        inactive: `"freeze"` (default): unselected rows keep every bit of weight, moments and age.
            `"zero_grad"`: they are updated with a gradient of zero (weight decay and momentum go
            on), the paper's masked gradient followed by plain AdamW. An option of each param_group.
        state: `"full"` (default): moments in the parameter's shape, checkpoints interchangeable
            with AdamW both ways. `"compact"`: moments of the selected rows only, keep_ratio of the
            memory; rows that leave the selection lose their moments, rows that enter start at age
            0. The moments of sharded parameters are saved in the full form, so that any number of
            ranks can load them; on a GPU a new selection of theirs is waited for.
        master_weights: bf16 and fp16 parameters are trained in fp32 copies of them, kept with the
            moments (of the selected rows only in compact state) and rounded into the parameter.
        stochastic_rounding: bf16 parameters are rounded up or down at random, so that small updates
            are right on average; no copies. The random bits depend on `seed`, the parameter's
            position in the optimizer, its step and the element alone: equal on every
            device and data-parallel rank. (Of a sharded parameter on the shard, too.)
        seed: of stochastic rounding.
        moment_dtype: of the moments of bf16 and fp16 parameters; None: `torch.float32`. With
            `torch.bfloat16` the moments of fp32 parameters are bf16 too.
        backend: None chooses; `"native"`, `"triton"` or `"reference"` forces.

    Raises:
        ValueError: an argument out of range, or two that exclude each other.
        RuntimeError: `backend="native"` without a native build.
    """

    # GradScaler then hands `grad_scale` and `found_inf` over instead of unscaling first.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        inactive: Literal["freeze", "zero_grad"] = "freeze",
        state: Literal["full", "compact"] = "full",
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
        moment_dtype: torch.dtype | None = None,
        backend: Literal["native", "triton", "reference"] | None = None,
    ) -> None:
        if state not in ("full", "compact"):
            raise ValueError(f"state={state!r}: use 'full' or 'compact'")
        if backend not in (None, "native", "triton", "reference"):
            raise ValueError(f"backend={backend!r}: use None, 'native', 'triton' or 'reference'")
        if backend == "native" and native is None:
            raise RuntimeError(f"backend='native' cannot run here: {native_error}")
        if master_weights and stochastic_rounding:
            raise ValueError(
                "master_weights=True and stochastic_rounding=True: use one; a master keeps exactly "
                "what stochastic rounding keeps on average"
            )
        if moment_dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(
                f"moment_dtype={moment_dtype}: use None, torch.float32 or torch.bfloat16"
            )
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
            raise ValueError(f"seed={seed!r}: use an integer from 0 to 2**64 - 1")
        self._compact = state == "compact"
        self._master_weights = master_weights
        self._seed = seed if stochastic_rounding else None
        self._moment_dtype = moment_dtype
        self._backend = backend
        self._tables: dict[torch.device, NativeTable] = {}
        defaults = {
            "lr": lr,
            "betas": tuple(float(b) for b in betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": True,  # as AdamW's groups have it, for its checkpoints
            "inactive": inactive,
        }
        self._check_group(defaults)
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        lr, betas = group["lr"], group["betas"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"lr is a tensor of shape {[*lr.shape]}: it must have one element")
        # A tensor on a GPU is not looked at: that would wait for the device.
        if not (isinstance(lr, Tensor) and not lr.is_cpu) and not float(lr) >= 0.0:
            raise ValueError(f"lr={lr}: must be at least 0")
        if not group["eps"] >= 0.0:
            raise ValueError(f"eps={group['eps']}: must be at least 0")
        if not group["weight_decay"] >= 0.0:
            raise ValueError(f"weight_decay={group['weight_decay']}: must be at least 0")
        if len(betas) != 2 or not all(0.0 <= b < 1.0 for b in betas):
            raise ValueError(f"betas={betas}: both must lie in [0, 1)")
        if group["differentiable"]:
            raise ValueError(
                "differentiable=True: the fused update works in place and outside of autograd; use "
                "torch.optim.AdamW to differentiate through an optimizer step"
            )
        if group["inactive"] not in ("freeze", "zero_grad"):
            raise ValueError(f"inactive={group['inactive']!r}: use 'freeze' or 'zero_grad'")
        if self._compact and group["inactive"] == "zero_grad":
            raise ValueError(
                "state='compact' keeps no moments of unselected rows, which inactive='zero_grad' "
                "updates: use state='full', or inactive='freeze'"
            )
        if self._compact and group["capturable"]:
            raise ValueError(
                "capturable=True with state='compact': a change of the selection moves compact "
                "moments, which no replay can do; use state='full'"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if "betas" in param_group:
            param_group["betas"] = tuple(float(b) for b in param_group["betas"])
        self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """One update. Returns the closure's loss, if there is one.

        A step that fails for bad input, or that GradScaler's `found_inf` skips, changes nothing.
        Nothing waits for a GPU: there `found_inf`, `grad_scale` and lr tensors are read by the
        kernel, and a skipped step is not known here, so that the selection moves on after it.

        Raises:
            RuntimeError: a sparse gradient.
            ValueError: a gradient or state that does not fit its parameter.
            NotImplementedError: a parameter with a selection that is flattened (FSDP1), or sharded
                otherwise than by rows.
        """
        _check_capture(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        found_inf = getattr(self, "found_inf", None)
        grad_scale = getattr(self, "grad_scale", None)
        # By type: to ask each parameter would cost more.
        kinds = set[type]().union(*(map(type, group["params"]) for group in self.param_groups))
        any_sharded = any(is_sharded(kind) for kind in kinds)
        pairs = self._parameters_with_grad()
        if any_sharded:
            self._check_shards(pairs)
        if not pairs:
            return loss

        # Weight and bias of a projection share one selection.
        selections = list({id(s): s for _, _, s, _, _ in pairs if s is not None}.values())
        if found_inf is not None and found_inf.is_cpu and float(found_inf) != 0.0:
            for selection in selections:
                selection.drop_union()  # this step's forwards are dropped with it
            return loss
        before_step(selections)
        undo: list[tuple[dict[str, Any], dict[str, Any]]] = []
        groups = [
            AdamWGroup(
                group["lr"],
                group["betas"][0],
                group["betas"][1],
                group["eps"],
                group["weight_decay"],
                group["maximize"],
                group["inactive"] == "zero_grad",
                self._seed,
            )
            for group in self.param_groups
        ]
        try:
            updates = self._prepare(pairs, undo)
            if any_sharded:
                updates = [
                    self._on_this_rank(update, selection)
                    for update, (_, _, selection, _, _) in zip(updates, pairs, strict=True)
                ]
            dispatch(
                updates,
                groups,
                1.0 if grad_scale is None else grad_scale,
                found_inf,
                tables=self._tables,
                backend=self._backend,
            )
        except (ValueError, RuntimeError):  # from what comes before the first change
            for state, old in undo:
                state.clear()
                state.update(old)
            raise
        if any(selection.is_compact for selection in selections):
            for param, _, owner, _, _ in pairs:
                if owner is not None and (layer := owner.held_by()) is not None:
                    layer.write_rows(param)
        after_step(selections)
        return loss

    def _parameters_with_grad(self) -> list[tuple[Tensor, Tensor, Selection | None, int, int]]:
        """(parameter, gradient, selection, position, group index), checked before anything
        changes."""
        pairs = []
        start = 0
        for index, group in enumerate(self.param_groups):
            params = group["params"]
            pairs += [
                (param, grad, selection_of(param), position, index)
                for position, param in enumerate(params, start)
                if (grad := param.grad) is not None
            ]
            start += len(params)
        for param, grad, selection, _, index in pairs:
            if selection is not None and selection.is_compact:
                self._check_held(param, selection, self.param_groups[index])
            if grad.layout is not torch.strided:
                raise RuntimeError(
                    f"{self._name_of(param)} has a gradient of layout {grad.layout}: "
                    "FusedMaskedAdam does not support sparse gradients; use "
                    "torch.optim.SparseAdam for it, or nn.Embedding(sparse=False)"
                )
        return pairs

    def _check_held(self, param: Tensor, selection: Selection, group: dict[str, Any]) -> None:
        if group["inactive"] != "freeze":
            raise ValueError(
                f"{self._name_of(param)}: inactive={group['inactive']!r} updates unselected rows, "
                "which others='freeze' freezes: use inactive='freeze'"
            )
        if selection.rows is None or not selection.fits(param):
            raise RuntimeError(
                f"{self._name_of(param)} has a gradient and no selected rows: with others='freeze' "
                "a training forward selects them first"
            )
        if (layer := selection.held_by()) is not None:
            layer.check_not_sharded()

    def _check_shards(self, pairs: list[tuple[Tensor, Tensor, Selection | None, int, int]]) -> None:
        for param, _, selection, _, _ in pairs:
            if selection is None or not is_sharded(param):
                continue
            try:
                shard_of(param)
            except NotImplementedError as error:
                raise NotImplementedError(f"{self._name_of(param)} {error}") from None
            if is_capturing():
                raise NotImplementedError(
                    f"{self._name_of(param)} is sharded and has a selection, whose rows on this "
                    "rank a captured step would keep forever: call step() outside of CUDA graphs"
                )

    def _on_this_rank(self, update: ParamUpdate, selection: Selection | None) -> ParamUpdate:
        """An update of what a rank has of a sharded parameter."""
        param, grad, *state, key, index = update
        if not is_sharded(param):
            return update
        like: Any = param
        sharded_grad: Any = grad
        if sharded_grad.placements != like.placements:  # tensor parallelism's may be partial sums
            sharded_grad = sharded_grad.redistribute(placements=like.placements)
        grad = sharded_grad.to_local()
        grad = grad.wait() if hasattr(grad, "wait") else grad
        here: list[Any] = [None if t is None else local_of(t) for t in state]
        if self._seed is not None:  # else elements of different shards would be rounded alike
            key += shard_index(param) * sum(len(g["params"]) for g in self.param_groups)
        if selection is not None and selection.rows is not None:
            on_gpu = not param.is_cpu
            here[5] = selection.rows_on(shard_of(param), as_buffer=on_gpu and not self._compact)
        return (local_of(param), grad, *here, key, index)  # type: ignore[return-value]

    def _name_of(self, param: Tensor) -> str:
        for index, group in enumerate(self.param_groups):
            for position, p in enumerate(group["params"]):
                if p is param:
                    names = group.get("param_names")
                    return names[position] if names else f"parameter {position} of group {index}"
        return "a parameter"

    def _prepare(
        self,
        pairs: list[tuple[Tensor, Tensor, Selection | None, int, int]],
        undo: list[tuple[dict[str, Any], dict[str, Any]]],
    ) -> list[ParamUpdate]:
        """State made to fit this step's selection (`undo` gets what it was), and all tensors.

        One loop without calls: it runs over every parameter at every step.
        """
        updates = []
        states, compact, masters = self.state, self._compact, self._master_weights
        options = [
            (group, group["amsgrad"], group["inactive"] == "freeze", group["capturable"])
            for group in self.param_groups
        ]
        capturing = is_capturing()
        for param, grad, selection, position, index in pairs:
            group, amsgrad, freeze, capturable = options[index]
            state = states[param]
            rows = None if selection is None else selection.rows
            if rows is not None and rows.device != param.device:
                assert selection is not None
                rows = rows.to(param.device)
                selection.choose(rows)
            holds_rows = selection is not None and selection.is_compact
            in_place = capturable and not (holds_rows or param.is_cpu or is_sharded(param))
            if in_place and selection is not None:
                if capturing and not selection.has_buffer(param):
                    raise RuntimeError(STEP_BEFORE_CAPTURE)
                rows = selection.buffer_for(param)
            if (
                not state
                or ((compact or holds_rows) and state.get("moment_rows") is not rows)
                or (
                    selection is not None
                    and freeze
                    and "ages" not in state
                    and _has_ages(selection, rows)
                )
                or (amsgrad and "max_exp_avg_sq" not in state)
                or (masters and "master" not in state and param.dtype in _HALF)
            ):
                if capturing and not param.is_cpu:  # replays would make it anew
                    raise RuntimeError(STEP_BEFORE_CAPTURE)
                undo.append((state, dict(state)))
                self._fit_state(param, state, selection, rows, group)
            if holds_rows:
                rows = None  # the parameter has no others
            update = (
                param, grad, state["exp_avg"], state["exp_avg_sq"],
                state["max_exp_avg_sq"] if amsgrad else None,
                state["step"], state.get("ages"), rows, state.get("master"), position, index,
            )  # fmt: skip
            updates.append(update)
        return updates

    def _fit_state(
        self,
        param: Tensor,
        state: dict[str, Any],
        selection: Selection | None,
        rows: Tensor | None,
        group: dict[str, Any],
    ) -> None:
        """Makes the state that the first step, a changed selection or a changed option asks for."""
        if not state:
            if selection is not None and not selection.fits(param):
                raise NotImplementedError(
                    f"{self._name_of(param)} has shape {[*param.shape]} and the selection of a "
                    "projection with other rows: FSDP1 (FullyShardedDataParallel) and DeepSpeed's "
                    "ZeRO flatten parameters, which leaves no rows to select; use FSDP2 "
                    "(torch.distributed.fsdp.fully_shard)"
                )
            like = param
            if self._has_compact_moments(selection) and rows is not None:
                num_rows = _rows_here(param, rows).numel()
                like = local_of(param).new_empty((num_rows, *param.shape[1:]))
                state["moment_rows"] = rows
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["exp_avg"] = torch.zeros_like(like, dtype=self._dtype_of_moments(param))
            state["exp_avg_sq"] = torch.zeros_like(state["exp_avg"])
        if self._has_compact_moments(selection) and state.get("moment_rows") is not rows:
            _remap_compact(param, state, rows, selection)
        freeze = group["inactive"] == "freeze"
        if freeze and "ages" not in state and _has_ages(selection, rows):
            state["ages"] = _row_ages(param, state)
        if group["amsgrad"] and "max_exp_avg_sq" not in state:
            state["max_exp_avg_sq"] = torch.zeros_like(state["exp_avg_sq"])
        if self._has_master(param) and "master" not in state:
            moment_rows = state.get("moment_rows")
            holds_rows = selection is not None and selection.is_compact
            state["master"] = (
                _master_of(param, None)
                if moment_rows is None or holds_rows
                else _master_of(local_of(param), _rows_here(param, moment_rows))
            )

    def _has_compact_moments(self, selection: Selection | None) -> bool:
        return self._compact or (selection is not None and selection.is_compact)

    def _has_master(self, param: Tensor) -> bool:
        return self._master_weights and param.dtype in _HALF

    def _dtype_of_moments(self, param: Tensor) -> torch.dtype:
        """fp32 moments for 16-bit parameters, else the parameter's own type; or moment_dtype."""
        if param.dtype in _HALF:
            return self._moment_dtype or torch.float32
        return self._moment_dtype or param.dtype if param.dtype == torch.float32 else param.dtype

    def state_dict(self) -> dict[str, Any]:
        """AdamW's state dict; parameters with a selection also have `rows` and `ages` (and
        `moment_rows` in compact state: the rows that their moments belong to).

        The state of sharded parameters is DTensors, the compact one's moments in the full form.
        """
        # Registered now, before the user's own hooks, which then see the rows.
        hook = self.register_state_dict_post_hook(
            FusedMaskedAdam._add_rows,  # type: ignore[arg-type]
            prepend=True,
        )
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def _add_rows(self, state_dict: dict[str, Any]) -> None:
        position = 0
        for group in self.param_groups:
            for param in group["params"]:
                selection = selection_of(param)
                rows = None if selection is None else selection.rows
                entry = state_dict["state"].get(position, {})
                if "moment_rows" in entry and is_sharded(param):
                    # Moments of some rows of some ranks would pass for those of all.
                    entry = state_dict["state"][position] = dict(entry)
                    _remap_compact(param, entry, None, selection)
                if rows is not None and entry:
                    state_dict["state"][position] = {**entry, "rows": rows}
                position += 1

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of this class, of AdamW or of Adam; selections and ages come back exactly.

        Moments keep their precision: fp32 moments of a bf16 parameter are not rounded. Full and
        compact states convert into each other; hyperparameters come from the checkpoint, `state`
        stays.

        Raises:
            ValueError: parameter groups, shapes or rows that do not fit; nothing is changed then.
        """
        # Registered now to run after the user's own hooks, on what they made of the dict.
        hook = self.register_load_state_dict_pre_hook(
            FusedMaskedAdam._convert  # type: ignore[arg-type]
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()

    def _convert(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        saved_groups = state_dict["param_groups"]
        if [len(g["params"]) for g in saved_groups] != [
            len(g["params"]) for g in self.param_groups
        ]:
            return state_dict  # super() says what is wrong
        for group in saved_groups:
            self._check_group({**self.defaults, **group})
        ids = [i for g in saved_groups for i in g["params"]]
        params = dict(zip(ids, (p for g in self.param_groups for p in g["params"]), strict=True))
        converted = {}
        rows: list[tuple[Tensor, Tensor]] = []
        for key, entry in state_dict["state"].items():
            if key not in params:
                converted[key] = entry
                continue
            param = params[key]
            selected = entry.get("rows")
            try:
                converted[key] = _Verbatim(self._loaded_state(param, entry))
                if selected is not None:
                    selected = _loaded_integers("rows", selected, param)
                    selection = selection_of(param)
                    check_rows(selected, param, _num_rows(param, selection))
                    if selection is not None:
                        selection.check_count(selected)
                    rows.append((param, selected))
            except ValueError as error:
                raise ValueError(f"state of {self._name_of(param)}: {error}") from None
        for param, selected in rows:
            set_rows(param, selected)
        return {**state_dict, "state": converted}

    def _loaded_state(self, param: Tensor, entry: dict[str, Any]) -> dict[str, Any]:
        """A loaded state on the parameter's device, checked, in this optimizer's own form."""
        device = param.device
        state: dict[str, Any] = {}
        entry = {key: value for key, value in entry.items() if key != "rows"}
        step = entry.pop("step", None)
        if step is None:
            raise ValueError("has no 'step': it is not a state of Adam or AdamW")
        step = torch.as_tensor(step, dtype=torch.float32)
        if step.numel() != 1:
            raise ValueError(f"step has shape {[*step.shape]}: it must be one number")
        state["step"] = step.to(device, copy=True).reshape(())
        moment_rows = entry.pop("moment_rows", None)
        like = torch.empty_like(param, dtype=self._dtype_of_moments(param))
        if moment_rows is not None:
            if is_sharded(param):
                raise ValueError(
                    "has compact moments, and the parameter is sharded: load them into an "
                    "unsharded FusedMaskedAdam with state='full', and save that"
                )
            moment_rows = _loaded_integers("moment_rows", moment_rows, param)
            selection = selection_of(param)
            check_rows(moment_rows, param, _num_rows(param, selection))
            like = like.new_empty((moment_rows.numel(), *param.shape[1:]))
        for key in _MOMENTS:
            value = entry.pop(key, None)
            if value is None:
                if key != "max_exp_avg_sq":
                    raise ValueError(f"has no {key!r}: it is not a state of Adam or AdamW")
                continue
            if not isinstance(value, Tensor):
                raise ValueError(f"{key} is {value!r}: it must be a tensor")
            kind = (value.shape, value.is_floating_point(), value.is_complex())
            if kind != (like.shape, like.is_floating_point(), like.is_complex()):
                raise ValueError(
                    f"{key} is {value.dtype} {[*value.shape]}, the parameter needs {like.dtype} "
                    f"{[*like.shape]}: the checkpoint belongs to another model"
                )
            state[key] = _loaded(value, like)
        master = entry.pop("master", None)
        if master is not None and self._has_master(param):
            if not isinstance(master, Tensor) or master.shape != like.shape:
                shape = [*master.shape] if isinstance(master, Tensor) else master
                raise ValueError(f"master has shape {shape}, the moments {[*like.shape]}")
            state["master"] = _loaded(master, torch.empty_like(like, dtype=torch.float32))
        ages = entry.pop("ages", None)
        if ages is not None:
            ages = _loaded_integers("ages", ages, param)
            if ages.shape != like.shape[:1]:
                raise ValueError(f"ages has shape {[*ages.shape]}, the moments {[*like.shape]}")
            own = torch.empty(local_of(like).shape[0], dtype=torch.int32, device=device)
            state["ages"] = _loaded(ages, _sharded_as(param, own) if is_sharded(param) else own)
        if moment_rows is not None:
            state["moment_rows"] = moment_rows
            if not self._has_compact_moments(selection):
                _remap_compact(param, state, None, selection)
        return {**state, **entry}

    def __getstate__(self) -> dict[str, Any]:
        options = ("_compact", "_master_weights", "_seed", "_moment_dtype", "_backend")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in options}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A loaded state keeps the tables: graphs that were captured read what they hold.
        self.__dict__.setdefault("_tables", {})
        for param, entry in self.state.items():
            if isinstance(entry, _Verbatim):
                self.state[param] = entry.state
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            group["betas"] = tuple(float(b) for b in group["betas"])


def _has_ages(selection: Selection | None, rows: Tensor | None) -> bool:
    """Also of a projection before its first selection: checkpoints of sharded parameters are read
    into a state that has all of the keys."""
    return rows is not None or (selection is not None and selection.config is not None)


def _row_ages(param: Tensor, state: dict[str, Any]) -> Tensor:
    """Ages of a parameter that was dense so far: every row is as old as it."""
    ages: Tensor = state["step"].to(param.device, torch.int32)
    moments = state["exp_avg"]
    ages = ages.expand(local_of(moments).shape[0]).clone()
    return _sharded_as(param, ages) if is_sharded(moments) else ages


def _rows_here(param: Tensor, rows: Tensor) -> Tensor:
    return local_rows(rows, shard_of(param)) if is_sharded(param) else rows


def _sharded_as(param: Any, local: Tensor) -> Tensor:
    """What belongs to this rank's rows of a parameter, with these first, as a DTensor like it."""
    from torch.distributed.tensor import DTensor

    shape = (param.shape[0], *local.shape[1:])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local,
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=torch.Size(shape),
        stride=stride,
    )


def _loaded(value: Any, like: Any) -> Tensor:
    """A copy of a loaded tensor, of the dtype, on the device and sharded as `like`."""
    if is_sharded(like) and not is_sharded(value):
        from torch.distributed.tensor import distribute_tensor

        # Every rank has all of it.
        value = value.to(like.device)
        value = distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    elif is_sharded(value) and not is_sharded(like):
        value = value.full_tensor()
    return torch.empty_like(like).copy_(value)


def _master_of(param: Tensor, rows: Tensor | None) -> Tensor:
    picked = param if rows is None else param.index_select(0, rows.long())
    return picked.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _num_rows(param: Tensor, selection: Selection | None) -> int:
    """How many rows there are to select from; a parameter may hold some of them only."""
    return param.shape[0] if selection is None else selection.num_rows_of(param)


def _remap_compact(
    param: Tensor, state: dict[str, Any], rows: Tensor | None, selection: Selection | None = None
) -> None:
    """Makes compact moments follow the selection.

    Rows that stay keep moments, age and master, rows that leave are dropped, rows that enter start
    at zero, their master at the parameter.
    """
    old: Tensor | None = state.pop("moment_rows", None)
    if rows is not None:
        state["moment_rows"] = rows
    state.setdefault("ages", _row_ages(param, state))
    whole = param
    # Each rank has the moments of its own rows.
    old, rows = (None if r is None else _rows_here(param, r) for r in (old, rows))
    param = local_of(param)
    holds_rows = selection is not None and selection.is_compact
    # Of each row among the old moments, or -1. Nothing here waits for a GPU.
    position = torch.arange(_num_rows(param, selection), device=param.device)
    if old is not None:
        position = torch.full_like(position, -1).index_copy_(0, old.long(), position[: old.numel()])
    if rows is not None:
        position = position[rows.long()]
    stays, position = position >= 0, position.clamp(min=0)
    for key in (*_MOMENTS, "ages", "master"):
        if key not in state:
            continue
        before = local_of(state[key])
        entering = (
            _master_of(param, None if holds_rows else rows)
            if key == "master"
            else before.new_zeros((position.numel(), *before.shape[1:]))
        )
        if before.shape[0] > 0:
            mask = stays.view(-1, *[1] * (before.dim() - 1))
            entering = torch.where(mask, before.index_select(0, position), entering)
        state[key] = (
            _sharded_as(whole, entering) if rows is None and is_sharded(whole) else entering
        )


def _loaded_integers(name: str, values: Any, param: Tensor) -> Tensor:
    """Loaded rows or ages: int32 on the parameter's device.

    Torch's optimizers cast what they load to the parameter's type: whole numbers that such a cast
    leaves exact are taken back, others refused.
    """
    if not isinstance(values, Tensor) or values.dtype == torch.bool or values.is_complex():
        raise ValueError(f"{name} must be an integer tensor, got {values!r}")
    exact = local_of(values).double()
    limit = 1 / torch.finfo(values.dtype).eps if values.is_floating_point() else 2**31 - 1
    if bool(((exact != exact.trunc()) | (exact.abs() > limit)).any()):
        raise ValueError(f"{name} is {values.dtype} and not exact: pass int32")
    return values.to(param.device, torch.int32, copy=True)
