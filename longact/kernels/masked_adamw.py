"""`masked_adamw_`: one AdamW step over many parameters, each updated in its selected rows only.

The arithmetic is that of docs/algorithm.md; `longact.FusedMaskedAdam` is the usual way to reach it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longact.backends import DTYPE_CODES, adamw_backend, is_capturing, native
from longact.kernels.rounding import stochastic_round
from longact.rows import check_rows

#: param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq (None without amsgrad), step (fp32, 0-dim),
#: ages (int32, one for each row of the moments, or None), rows (int32, or None for all), master
#: (the parameter in fp32, in the moments' shape, or None), key (the parameter's index in its
#: optimizer), group index. A plain tuple: this is built for every parameter at every step.
#: Moments with fewer rows than the parameter are compact: their row i belongs to the parameter's
#: row rows[i]. Rows with one element more than the parameter has rows are a buffer for CUDA graphs:
#: how many are selected, then these, then whatever.
ParamUpdate = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None,
    Tensor | None, int, int,
]  # fmt: skip


_CPU = torch.device("cpu")

STEP_BEFORE_CAPTURE = (
    "step() is captured into a CUDA graph and makes something that it has not made before: call "
    "step() with the same parameters and selections before each capture, as in PyTorch's recipe "
    "(warm-up on a side stream)"
)


class AdamWGroup(NamedTuple):
    """Hyperparameters of one param_group.

    `zero_grad` is `inactive="zero_grad"`; `seed`, unless None, rounds bf16 parameters without a
    master stochastically.
    """

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool
    zero_grad: bool
    seed: int | None = None


def reference(update: ParamUpdate, group: AdamWGroup, grad_scale: float | Tensor = 1.0) -> None:
    """The definition, on any device: one parameter, in place. fp64 parameters compute in fp64."""
    if update[0].is_complex():
        update = _as_real(update)
    param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, step, ages, rows, master, key, _ = update
    compute = torch.float64 if param.dtype == torch.float64 else torch.float32
    step.add_(1)
    lr = group.lr.reshape(()) if isinstance(group.lr, Tensor) else group.lr
    grad_scale = grad_scale.reshape(()) if isinstance(grad_scale, Tensor) else grad_scale
    if rows is not None and is_row_buffer(rows, param):
        rows = rows[1 : 1 + int(rows[0])]
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
    p = take(param).to(compute) if master is None else take_state(master)
    p = p * (1.0 - lr * group.weight_decay) - step_size * m / (
        v.sqrt() * inv_sqrt_bias2 + group.eps
    )
    if master is not None:
        put_state(master, p)
    elif group.seed is not None and param.dtype == torch.bfloat16:
        elements = torch.arange(param.numel(), device=param.device).view(param.shape)
        p = stochastic_round(p, take(elements), group.seed, key, step)
    put(param, p)


def _as_real(update: ParamUpdate) -> ParamUpdate:
    """A complex parameter is a real one with a last dimension of 2, as AdamW has it."""
    param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq = update[:5]
    view = torch.view_as_real
    maximum = None if max_exp_avg_sq is None else view(max_exp_avg_sq)
    grad = view(grad.resolve_conj())
    return view(param), grad, view(exp_avg), view(exp_avg_sq), maximum, *update[5:]


def is_row_buffer(rows: Tensor, param: Tensor) -> bool:
    """Whether `rows` is a buffer that holds its own count (see ParamUpdate)."""
    return param.dim() > 0 and rows.numel() == param.shape[0] + 1


def native_supports(update: ParamUpdate, device_type: str, on_gpu: bool) -> bool:
    """The native core wants contiguous tensors of a type it knows, with memory of their own."""
    param, grad, exp_avg, *others = update[:9]
    rows = update[7]
    dtypes = (param.dtype, grad.dtype, exp_avg.dtype)
    return (
        # DTensor and other wrappers have no memory to point at.
        type(param).__torch_dispatch__ is Tensor.__torch_dispatch__
        and param.device.type == device_type
        and param.is_contiguous()
        and exp_avg.is_contiguous()
        and all(t is None or t.is_contiguous() for t in others)
        and all(dtype in DTYPE_CODES for dtype in dtypes)
        # fp64 is for the CPU, a buffer of rows for the GPU, which counts in 32 bits inside a row.
        and not (
            on_gpu and (torch.float64 in dtypes or math.prod(param.shape[1:]) >= 2**31 - 2**10)
        )
        and (on_gpu or rows is None or not is_row_buffer(rows, param))
    )


class NativeTable:
    """The native core's table of an optimizer's tensors on the CPU, kept between steps.

    An entry is checked and written again only when one of its tensors moved or changed: at most
    steps only the addresses of the gradients travel. Entries that the native core does not support
    stay empty.
    """

    on_gpu = False
    device_type = "cpu"

    def __init__(self, *, isa: str = "", module: ModuleType | None = native) -> None:
        assert module is not None
        self._isa = isa
        self._table = module.AdamWTable()
        self._entries: list[tuple[Any, ...] | None] = []
        self._unsupported: set[int] = set()
        self._grads: list[int] = []
        self._copies: list[Tensor] = []

    def update(
        self,
        updates: Sequence[ParamUpdate],
        groups: Sequence[AdamWGroup],
        grad_scale: float | Tensor = 1.0,
        found_inf: Tensor | None = None,
    ) -> list[ParamUpdate]:
        """Updates what the native core supports; returns the rest."""
        rest = self.prepare(updates, groups)
        self.run(groups, grad_scale, found_inf)
        return rest

    def prepare(
        self, updates: Sequence[ParamUpdate], groups: Sequence[AdamWGroup]
    ) -> list[ParamUpdate]:
        """Checks what changed and enters it; returns what the native core does not support."""
        entries = self._entries
        if len(updates) != len(entries):
            self._table.resize(len(updates))
            entries = self._entries = [None] * len(updates)
            self._unsupported.clear()
        zero_grads = [g.zero_grad for g in groups]
        self._grads, self._copies = addresses, copies = [], []
        for i, update in enumerate(updates):
            (
                param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, step, ages, rows, master, key,
                group,
            ) = update  # fmt: skip
            known = entries[i]
            if known is not None:
                (
                    k_param, k_exp_avg, k_exp_avg_sq, k_max_exp_avg_sq, k_step, k_ages, k_rows,
                    k_master, k_key, k_group, k_zero_grad, k_grad_dtype,
                    param_at, exp_avg_at, exp_avg_sq_at, shape,
                ) = known  # fmt: skip
            # The same objects, which the entry keeps alive; `.data = ...` changes one inside.
            if (
                known is None
                or param is not k_param
                or exp_avg is not k_exp_avg
                or exp_avg_sq is not k_exp_avg_sq
                or max_exp_avg_sq is not k_max_exp_avg_sq
                or step is not k_step
                or ages is not k_ages
                or rows is not k_rows
                or master is not k_master
                or key != k_key
                or group != k_group
                or zero_grads[group] is not k_zero_grad
                or grad.dtype is not k_grad_dtype
                or param.data_ptr() != param_at
                or exp_avg.data_ptr() != exp_avg_at
                or exp_avg_sq.data_ptr() != exp_avg_sq_at
                or param.shape != shape
                or not param.is_contiguous()
            ):
                entries[i] = None
                self._set(i, update, zero_grads[group])
                entries[i] = (
                    param, exp_avg, exp_avg_sq, max_exp_avg_sq, step, ages, rows, master,
                    key, group, zero_grads[group], grad.dtype,
                    param.data_ptr(), exp_avg.data_ptr(), exp_avg_sq.data_ptr(), param.shape,
                )  # fmt: skip
            if not grad.is_contiguous() or grad.is_neg():
                grad = grad.resolve_neg().contiguous()
                copies.append(grad)  # alive until the native call returns
            addresses.append(grad.data_ptr())
        return [updates[i] for i in sorted(self._unsupported)]

    def run(
        self,
        groups: Sequence[AdamWGroup],
        grad_scale: float | Tensor,
        found_inf: Tensor | None,
    ) -> None:
        """The update itself; with `found_inf` not 0 nothing is changed."""
        if found_inf is None or float(found_inf) == 0.0:
            self._table.update(
                self._grads,
                [_native_group(group, float(group.lr), None) for group in groups],
                float(grad_scale),
                torch.get_num_threads(),
                self._isa,
            )
        self._copies = []

    def _set(self, index: int, update: ParamUpdate, zero_grad: bool) -> None:
        check_update(update, zero_grad)
        if not native_supports(update, self.device_type, self.on_gpu):
            self._unsupported.add(index)
            self._table.clear(index)
            return
        self._unsupported.discard(index)
        (
            param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, step, ages, rows, master, key, group,
        ) = update  # fmt: skip
        num_rows = param.shape[0] if param.dim() else 1
        num_selected, counter = (-1 if rows is None else rows.numel()), None
        compact = rows is not None and exp_avg.shape[0] != num_rows
        if rows is not None and is_row_buffer(rows, param):
            num_selected, counter, rows = num_rows, rows, rows[1:]
            compact = False
        self._table.set(
            index,
            _address(param),
            _address(master),
            _address(exp_avg),
            _address(exp_avg_sq),
            _address(max_exp_avg_sq),
            _address(step),
            _address(ages),
            _address(rows),
            _address(counter),
            num_selected,
            num_rows,
            param.numel() // num_rows if num_rows else 0,
            DTYPE_CODES[param.dtype],
            DTYPE_CODES[grad.dtype],
            DTYPE_CODES[exp_avg.dtype],
            group,
            key,
            compact,
        )

    def plan(self) -> tuple[int, int]:
        """Chunks of the one launch, and bytes that a step reads and writes (after `prepare`)."""
        chunks, size = self._table.plan()
        return chunks, size


class CudaTable(NativeTable):
    """The same for the parameters of one GPU: one launch updates them all.

    The table lies in the GPU's memory and is uploaded again only where it changed. A captured step
    has memory of its own, which a replay fills as the capture did.
    """

    on_gpu = True

    def __init__(self, device: torch.device, *, module: ModuleType | None = native) -> None:
        super().__init__(module=module)
        if device.type == "cuda" and is_capturing():  # its zeros would be written by replays alone
            raise RuntimeError(STEP_BEFORE_CAPTURE)
        self._device = device
        self.device_type = device.type  # the tests run this class on the CPU
        self._is_cuda = device.type == "cuda"
        self._blocks_done = torch.zeros(1, dtype=torch.int32, device=device)
        self._memory: Tensor | None = None
        self._spare: Tensor | None = None  # pinned, for the next capture
        self._captured: list[Tensor] = []  # what graphs read when they are replayed

    def run(
        self,
        groups: Sequence[AdamWGroup],
        grad_scale: float | Tensor,
        found_inf: Tensor | None,
    ) -> None:
        capturing = self._capturing()
        if capturing and any(isinstance(g.lr, Tensor) and g.lr.is_cpu for g in groups):
            raise RuntimeError(
                "lr is a tensor on the CPU, whose value a captured step would keep forever: use a "
                "tensor on the GPU, or a float"
            )
        lrs = [self._scalar(group.lr) for group in groups]
        native_groups = [
            _native_group(group, 0.0 if isinstance(lr, Tensor) else lr, lr)
            for group, lr in zip(groups, lrs, strict=True)
        ]
        unscaled = not isinstance(grad_scale, Tensor) and grad_scale == 1.0
        scale = None if unscaled else self._tensor(grad_scale)
        skip = None if found_inf is None else self._tensor(found_inf)
        # An interrupted upload must not be taken for done: no memory, no table.
        memory, self._memory = self._memory, None
        changed = self._table.pack(self._grads, native_groups)
        if capturing:
            self._launch(self._captured_memory(), scale, skip)
            self._captured += [t for t in (*lrs, scale, skip) if isinstance(t, Tensor)]
        else:
            memory = self._uploaded(memory, changed)
            self._launch(memory, scale, skip)
            self._memory = memory
        # Freed memory is reused in the order of the stream: nothing needs to be kept.
        self._copies = []

    def _launch(self, memory: Tensor, scale: Tensor | None, skip: Tensor | None) -> None:
        addresses = (
            memory.data_ptr(), self._blocks_done.data_ptr(), _address(scale), _address(skip)
        )  # fmt: skip
        if not self._is_cuda:
            self._table.launch(*addresses, 0, 0)
            return
        index = self._device.index or 0
        # The native core has a CUDA runtime of its own: both must mean the same device.
        with torch.cuda.device(index):
            stream = torch.cuda.current_stream(index).cuda_stream
            self._table.launch(*addresses, index, stream)

    def _capturing(self) -> bool:
        if not self._is_cuda:
            return False
        with torch.cuda.device(self._device):
            return is_capturing()

    def _scalar(self, lr: float | Tensor) -> float | Tensor:
        """A tensor on the GPU is read there, in fp32; one on the CPU here."""
        if not isinstance(lr, Tensor) or (lr.is_cpu and self._is_cuda):
            return float(lr)
        return self._tensor(lr)

    def _tensor(self, value: float | Tensor) -> Tensor:
        """fp32 on the device; nothing waits for it."""
        if isinstance(value, Tensor):
            return value.to(self._device, torch.float32, non_blocking=True)
        return torch.full((), value, dtype=torch.float32, device=self._device)

    def _uploaded(self, memory: Tensor | None, changed: int) -> Tensor:
        size = self._table.packed_size
        if memory is None or memory.numel() < size:
            memory = torch.empty(size, dtype=torch.uint8, device=self._device)
            changed = size
        if changed:
            # torch keeps pinned memory until the copy has read it.
            staging = self._staging(changed)
            self._table.write(staging.data_ptr(), changed)
            memory[:changed].copy_(staging, non_blocking=True)
        if self._spare is None or self._spare.numel() < size:
            self._spare = self._staging(size)
        return memory

    def _captured_memory(self) -> Tensor:
        """Nothing is uploaded by a capture: the next step outside of it starts anew."""
        size = self._table.packed_size
        spare, self._spare = self._spare, None
        if spare is None or spare.numel() < size:
            raise RuntimeError(STEP_BEFORE_CAPTURE)
        memory = torch.empty(size, dtype=torch.uint8, device=self._device)
        self._table.write(spare.data_ptr(), size)
        memory.copy_(spare[:size], non_blocking=True)
        self._captured += [memory, spare]
        return memory

    def _staging(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=self._is_cuda)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _native_group(
    group: AdamWGroup, lr: float, lr_tensor: float | Tensor | None
) -> tuple[Any, ...]:
    address = lr_tensor.data_ptr() if isinstance(lr_tensor, Tensor) else 0
    return (lr, address, *group[1:7], group.seed is not None, group.seed or 0)


def check_update(update: ParamUpdate, zero_grad: bool) -> None:
    """Everything the native core relies on about shapes, types and places."""
    param, grad, exp_avg, exp_avg_sq, max_sq, step, ages, rows, master, _, _ = update
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
    if master is not None:
        expect("master", master, state_shape, torch.float32)
        if param.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"master of a parameter of {param.dtype}: it is one itself")


def dispatch(
    updates: Sequence[ParamUpdate],
    groups: Sequence[AdamWGroup],
    grad_scale: float | Tensor = 1.0,
    found_inf: Tensor | None = None,
    *,
    tables: dict[torch.device, NativeTable] | None = None,
    backend: str | None = None,
) -> None:
    """Each device's parameters to its fastest backend; what that does not support, to the next.

    `tables`: the native tables that the caller keeps between steps. All checks come before the
    first change.
    """
    tables = {} if tables is None else tables
    by_device: dict[torch.device, Sequence[ParamUpdate]] = {}
    if all(update[0].is_cpu for update in updates):  # far cheaper to ask
        by_device[_CPU] = updates
    else:
        for update in updates:
            by_device.setdefault(update[0].device, []).append(update)  # type: ignore[attr-defined]
    native_tables: list[NativeTable] = []
    triton_updates: list[list[ParamUpdate]] = []
    rest: list[ParamUpdate] = []
    for device, here in by_device.items():
        chosen = backend or adamw_backend(device)[0]
        if chosen == "native":
            if device not in tables:
                tables[device] = NativeTable() if device.type == "cpu" else CudaTable(device)
            native_tables.append(tables[device])
            rest += tables[device].prepare(here, groups)
            continue
        for update in here:
            check_update(update, groups[update[-1]].zero_grad)
        if chosen == "triton":
            from longact.kernels import masked_adamw_triton

            fit = [masked_adamw_triton.supports(update) for update in here]
            triton_updates.append([u for u, fits in zip(here, fit, strict=True) if fits])
            rest += [u for u, fits in zip(here, fit, strict=True) if not fits]
        else:
            rest += here
    # The CPU's checks its rows once more, and may refuse them: before any other has changed.
    for table in sorted(native_tables, key=lambda table: table.on_gpu):
        table.run(groups, grad_scale, found_inf)
    for here in triton_updates:
        masked_adamw_triton.update(here, groups, grad_scale, found_inf)
    if rest and (found_inf is None or float(found_inf) == 0.0):
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
            None,
            i,
            0,
        )
        check_update(update, zero_grad)
        updates.append(update)
    return updates


@torch.library.custom_op(
    "longact::masked_adamw_",
    mutates_args=("params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps", "ages"),
    # Its table is made anew at each call.
    tags=tuple(tag for tag in (getattr(torch.Tag, "cudagraph_unsafe", None),) if tag is not None),
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
            An empty tensor: every row is as old as the parameter.
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
