"""`masked_adamw_`: one AdamW step over many parameters, each updated in its selected rows only.

The arithmetic is that of docs/algorithm.md; `longact.FusedMaskedAdam` is the usual way to reach it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longact.backends import DTYPE_CODES, native
from longact.rows import check_rows

#: param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq (None without amsgrad), step (fp32, 0-dim),
#: ages (int32, one for each row of the moments, or None), rows (int32, or None for all), group
#: index. A plain tuple: this is built for every parameter at every step. Moments with fewer rows
#: than the parameter are compact: their row i belongs to the parameter's row rows[i].
ParamUpdate = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None, int
]


class AdamWGroup(NamedTuple):
    """Hyperparameters of one param_group; `zero_grad` is `inactive="zero_grad"`."""

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool
    zero_grad: bool


def reference(update: ParamUpdate, group: AdamWGroup, grad_scale: float | Tensor = 1.0) -> None:
    """The definition, on any device: one parameter, in place. fp64 parameters compute in fp64."""
    param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, step, ages, rows, _ = update
    compute = torch.float64 if param.dtype == torch.float64 else torch.float32
    step.add_(1)
    lr = group.lr.reshape(()) if isinstance(group.lr, Tensor) else group.lr
    rows = None if rows is None else rows.long()  # index_copy_ wants int64
    compact = rows is not None and exp_avg.shape[0] != param.shape[0]

    def take(tensor: Tensor) -> Tensor:
        return tensor if rows is None or group.zero_grad else tensor.index_select(0, rows)

    def take_state(tensor: Tensor) -> Tensor:
        return tensor if compact else take(tensor)

    def put(tensor: Tensor, value: Tensor) -> None:
        if rows is None or group.zero_grad:
            tensor.copy_(value)
        else:
            tensor.index_copy_(0, rows, value.to(tensor.dtype))

    def put_state(tensor: Tensor, value: Tensor) -> None:
        if compact:
            tensor.copy_(value)
        else:
            put(tensor, value)

    if rows is not None and group.zero_grad:
        g = torch.zeros_like(grad).index_copy_(0, rows, grad.index_select(0, rows))
    else:
        g = take(grad)
    g = g.to(compute) * ((-1.0 if group.maximize else 1.0) / grad_scale)

    if ages is None:
        age = step.double()
    else:
        row_ages = take_state(ages) + 1
        put_state(ages, row_ages)
        age = row_ages.double().view(-1, *[1] * (param.dim() - 1))
    step_size = (lr / (1.0 - group.beta1**age)).to(compute)
    inv_sqrt_bias2 = (1.0 - group.beta2**age).rsqrt().to(compute)

    m = take_state(exp_avg).to(compute) * group.beta1 + g * (1.0 - group.beta1)
    v = take_state(exp_avg_sq).to(compute) * group.beta2 + g * g * (1.0 - group.beta2)
    put_state(exp_avg, m)
    put_state(exp_avg_sq, v)
    if max_exp_avg_sq is not None:
        v = torch.maximum(take_state(max_exp_avg_sq).to(compute), v)
        put_state(max_exp_avg_sq, v)
    p = take(param).to(compute)
    put(
        param,
        p * (1.0 - lr * group.weight_decay)
        - step_size * m / (v.sqrt() * inv_sqrt_bias2 + group.eps),
    )


def native_supports(update: ParamUpdate) -> bool:
    """The native core wants contiguous CPU tensors of a type it knows, with memory of their own."""
    param, grad, exp_avg, *others = update[:8]
    return (
        native is not None
        # DTensor and other wrappers have no memory to point at.
        and type(param).__torch_dispatch__ is Tensor.__torch_dispatch__
        and param.is_cpu
        and param.is_contiguous()
        and exp_avg.is_contiguous()
        and all(t is None or t.is_contiguous() for t in others)
        and param.dtype in DTYPE_CODES
        and grad.dtype in DTYPE_CODES
        and exp_avg.dtype in DTYPE_CODES
    )


class NativeTable:
    """The native core's table of an optimizer's tensors, kept between steps.

    An entry is checked and written again only when one of its tensors moved or changed: at most
    steps only the addresses of the gradients travel. Entries that the native core does not support
    stay empty.
    """

    def __init__(self) -> None:
        assert native is not None
        self._table = native.AdamWTable()
        self._entries: list[tuple[Any, ...] | None] = []
        self._unsupported: set[int] = set()

    def update(
        self,
        updates: Sequence[ParamUpdate],
        groups: Sequence[AdamWGroup],
        grad_scale: float = 1.0,
        isa: str = "",
    ) -> list[ParamUpdate]:
        """Updates what the native core supports; returns the rest."""
        entries = self._entries
        if len(updates) != len(entries):
            self._table.resize(len(updates))
            entries = self._entries = [None] * len(updates)
            self._unsupported.clear()
        zero_grads = [g.zero_grad for g in groups]
        addresses = []
        copies = []  # alive until the native call returns
        for i, update in enumerate(updates):
            param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, step, ages, rows, group = update
            known = entries[i]
            # The same objects, which the entry keeps alive; `.data = ...` changes one inside.
            if (
                known is None
                or param is not known[0]
                or exp_avg is not known[1]
                or exp_avg_sq is not known[2]
                or max_exp_avg_sq is not known[3]
                or step is not known[4]
                or ages is not known[5]
                or rows is not known[6]
                or (group, zero_grads[group]) != known[7]
                or grad.dtype is not known[8]
                or param.data_ptr() != known[9]
                or exp_avg.data_ptr() != known[10]
                or exp_avg_sq.data_ptr() != known[11]
                or param.shape != known[12]
                or not param.is_contiguous()
            ):
                entries[i] = None
                self._set(i, update, zero_grads[group])
                entries[i] = (
                    param, exp_avg, exp_avg_sq, max_exp_avg_sq, step, ages, rows,
                    (group, zero_grads[group]),
                    grad.dtype, param.data_ptr(), exp_avg.data_ptr(), exp_avg_sq.data_ptr(),
                    param.shape,
                )  # fmt: skip
            if not grad.is_contiguous() or grad.is_neg():
                grad = grad.resolve_neg().contiguous()
                copies.append(grad)
            addresses.append(grad.data_ptr())
        self._table.update(
            addresses,
            [group._replace(lr=float(group.lr)) for group in groups],
            grad_scale,
            torch.get_num_threads(),
            isa,
        )
        return [updates[i] for i in sorted(self._unsupported)]

    def _set(self, index: int, update: ParamUpdate, zero_grad: bool) -> None:
        check_update(update, zero_grad)
        if not native_supports(update):
            self._unsupported.add(index)
            self._table.clear(index)
            return
        self._unsupported.discard(index)
        param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, step, ages, rows, group = update
        num_rows = param.shape[0] if param.dim() else 1

        def address(tensor: Tensor | None) -> int:
            return 0 if tensor is None else tensor.data_ptr()

        self._table.set(
            index,
            address(param),
            address(exp_avg),
            address(exp_avg_sq),
            address(max_exp_avg_sq),
            address(step),
            address(ages),
            address(rows),
            -1 if rows is None else rows.numel(),
            num_rows,
            param.numel() // num_rows if num_rows else 0,
            DTYPE_CODES[param.dtype],
            DTYPE_CODES[grad.dtype],
            DTYPE_CODES[exp_avg.dtype],
            group,
            rows is not None and exp_avg.shape[0] != num_rows,
        )


def check_update(update: ParamUpdate, zero_grad: bool) -> None:
    """Everything the native core relies on about shapes, types and places."""
    param, grad, exp_avg, exp_avg_sq, max_sq, step, ages, rows, _ = update
    num_rows = param.shape[0] if param.dim() else 1
    state_rows = num_rows
    if rows is not None and exp_avg.dim() and exp_avg.shape[0] != num_rows:
        state_rows = rows.numel()
        if zero_grad:
            raise ValueError(
                "moments are compact, which zero_grad cannot update: it needs moments of every row"
            )
    state_shape = (state_rows, *param.shape[1:]) if param.dim() else ()

    def expect(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != param.device:
            raise ValueError(
                f"{name} must be {dtype} {[*shape]} on {param.device} for a parameter of shape "
                f"{[*param.shape]}, got {tensor.dtype} {[*tensor.shape]} on {tensor.device}"
            )

    expect("grad", grad, tuple(param.shape), grad.dtype)
    expect("exp_avg", exp_avg, state_shape, exp_avg.dtype)
    expect("exp_avg_sq", exp_avg_sq, state_shape, exp_avg.dtype)
    if (exp_avg.dtype == torch.float64) != (param.dtype == torch.float64):
        raise ValueError(f"exp_avg is {exp_avg.dtype} for a parameter of {param.dtype}")
    if param.dtype == torch.float64 and grad.dtype != torch.float64:
        raise ValueError(f"grad is {grad.dtype} for a parameter of {param.dtype}")
    if max_sq is not None:
        expect("max_exp_avg_sq", max_sq, state_shape, exp_avg.dtype)
    expect("step", step, (), torch.float32)
    if ages is not None:
        expect("ages", ages, (state_rows,), torch.int32)
    if rows is not None:
        expect("rows", rows, (rows.numel(),), torch.int32)


def dispatch(
    updates: Sequence[ParamUpdate],
    groups: Sequence[AdamWGroup],
    grad_scale: float | Tensor = 1.0,
    table: NativeTable | None = None,
) -> None:
    """Every parameter to the native core in one call where it can, else to the reference."""
    rest = updates
    if native is not None:
        rest = (table or NativeTable()).update(updates, groups, float(grad_scale))
    else:
        for update in updates:
            # All checks come before the first change.
            check_update(update, groups[update[-1]].zero_grad)
    for update in rest:
        reference(update, groups[update[-1]], grad_scale)


def _updates(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    ages: Sequence[Tensor],
    rows: Sequence[Tensor | None],
    zero_grad: bool = False,
) -> list[ParamUpdate]:
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "steps": steps}
    lists |= {"ages": ages, "rows": rows}  # type: ignore[dict-item]
    if max_exp_avg_sqs:
        lists["max_exp_avg_sqs"] = max_exp_avg_sqs
    for name, values in lists.items():
        if len(values) != len(params):
            raise ValueError(f"{name} has {len(values)} entries for {len(params)} params")
    updates: list[ParamUpdate] = []
    for i, param in enumerate(params):
        update = (
            param,
            grads[i],
            exp_avgs[i],
            exp_avg_sqs[i],
            max_exp_avg_sqs[i] if max_exp_avg_sqs else None,
            steps[i],
            ages[i] if ages[i].numel() else None,
            rows[i],
            0,
        )
        check_update(update, zero_grad)
        updates.append(update)
    return updates


@torch.library.custom_op(
    "longact::masked_adamw_",
    mutates_args=("params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps", "ages"),
)
def _op(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    ages: Sequence[Tensor],
    rows: Sequence[Tensor | None],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool = False,
    zero_grad: bool = False,
    grad_scale: float = 1.0,
) -> None:
    updates = _updates(
        params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, ages, rows, zero_grad
    )
    for param, selected in zip(params, rows, strict=True):
        if selected is not None:
            check_rows(selected, param)
    group = AdamWGroup(lr, beta1, beta2, eps, weight_decay, maximize, zero_grad)
    dispatch(updates, [group], grad_scale)


@_op.register_fake
def _fake(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    ages: Sequence[Tensor],
    rows: Sequence[Tensor | None],
    *_: object,
) -> None:
    _updates(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, ages, rows)


def masked_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    ages: Sequence[Tensor],
    rows: Sequence[Tensor | None],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool = False,
    zero_grad: bool = False,
    grad_scale: float = 1.0,
) -> None:
    """One AdamW step, in place, of each parameter in its selected rows.

    Args:
        params: any shape and floating dtype; row r is `param[r]`.
        grads: the parameters' shapes; divided by `grad_scale`. Unselected rows are not read.
        exp_avgs, exp_avg_sqs: moments in the parameter's shape, or compact: `[len(rows), ...]`.
        max_exp_avg_sqs: like the moments with amsgrad, else an empty list.
        steps: fp32 0-dim, how many updates each parameter has had; incremented.
        ages: int32, how many updates each row of the moments has had; incremented for updated rows.
        An
            empty tensor: every row is as old as the parameter.
        rows: int32 ascending, the selected rows, or None for all.
        lr, beta1, beta2, eps, weight_decay, maximize: as in torch.optim.AdamW.
        zero_grad: update unselected rows too, with a gradient of zero.
        grad_scale: what the loss was multiplied with.

    Raises:
        ValueError: lists, shapes, dtypes, devices or rows that do not fit; nothing is changed then.
    """
    _op(
        params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, ages, rows,
        lr, beta1, beta2, eps, weight_decay, maximize, zero_grad, grad_scale,
    )  # fmt: skip
