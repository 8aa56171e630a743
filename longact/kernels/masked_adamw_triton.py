# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
"""The masked AdamW step in Triton, for GPUs without a native build: the same semantics, and the
same bits wherever division and square root are IEEE's (Triton 3.4 flushes subnormal numbers there).

A step is one small launch, and one for each combination of dtypes and options among its parameters:

    _prepare_kernel   each visited row's place and coefficients, its age; each parameter's scalars
    _update_kernel    the elements, 8,192 to a program

Both read one table of addresses, sizes and hyperparameters, which travels in one copy. Nothing is
read back, nothing but dtypes and layout is a compile-time constant, and nothing is autotuned: a
trial run of an in-place update would be one update more.

bf16 is converted on its bits: TRITON_INTERPRET=1 then computes what a GPU computes (its own casts
do not round to nearest even).

Imports Triton: import this module only where it is used.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from longact.backends import DTYPE_CODES
from longact.kernels.masked_adamw import AdamWGroup, ParamUpdate, is_row_buffer
from longact.kernels.triton_common import on_device_of

_CHUNK = 8192  # elements of a program of _update_kernel
_BLOCK = 1024  # of these, how many at a time
_NUM_WARPS = 8 if torch.version.hip is None else 4  # 4 elements a thread: one access of 16 bytes
_ROWS = 128  # rows of a program of _prepare_kernel
_VECTOR = 8  # elements that share their row, and the random bits of one counter
# A flat tensor is seen as rows of this length, which chunks do not cross; longer rows do not fit.
_FLAT_ROW = 2**30

# ---- the table: one row of int64 words for each parameter, one row of fp64 for each group --------

_WORDS = tl.constexpr(24)
(
    # addresses
    _PARAM, _GRAD, _EXP_AVG, _EXP_AVG_SQ, _MAX_EXP_AVG_SQ, _STEP, _AGES, _LIST, _MASTER,
    _COUNT,  # address of how many rows of the list count, or 0: all
    _LR, _GRAD_SCALE, _FOUND_INF,  # addresses of fp32 scalars, or 0
    _LISTED,  # length of the list
    _NUM_ROWS, _ROW_LEN,
    _VISITED,  # rows to visit (a flat tensor: 1)
    _ELEMENTS,  # in the visited rows
    _FIRST_ENTRY,  # of its visited rows in the scratch memory
    _FLAGS, _GROUP, _KEY, _SEED,
) = (tl.constexpr(i) for i in range(23))  # fmt: skip
# An empty list has no address.
_FLAT, _COMPACT, _ZERO_GRAD, _HAS_LIST = (tl.constexpr(2**i) for i in range(4))

_GROUP_WORDS = tl.constexpr(8)
(
    _GROUP_LR, _BETA1, _BETA2, _EPS, _WEIGHT_DECAY, _SIGN, _GROUP_GRAD_SCALE,
) = (tl.constexpr(i) for i in range(7))  # fmt: skip

# What _prepare_kernel leaves for _update_kernel: fp32 scalars of each parameter ...
_SCALARS = tl.constexpr(8)
(
    _GRAD_FACTOR, _F_BETA1, _ONE_MINUS_BETA1, _F_BETA2, _ONE_MINUS_BETA2, _F_EPS, _DECAY,
    _NEW_STEP,  # negative: nothing is written
) = (tl.constexpr(i) for i in range(8))  # fmt: skip
# ... and of each visited row its entry, 2 * index + (1 if its gradient is read) or -1 if it is left
# alone, and two fp32 coefficients in one word: lr / (1 - beta1^age), 1 / sqrt(1 - beta2^age).

_BF16, _FP16 = (tl.constexpr(DTYPE_CODES[d]) for d in (torch.bfloat16, torch.float16))


# ---- kernels -------------------------------------------------------------------------------------


@triton.jit
def _find(firsts, count, item):
    """Whose work `item` is: the last tensor whose first item is not after it."""
    found = 0
    for begin in range(0, count, 256):
        lane = begin + tl.arange(0, 256)
        first = tl.load(firsts + lane, mask=lane < count, other=2147483647)
        found += tl.sum((first <= item).to(tl.int32), 0)
    return found - 1


@triton.jit
def _scalar(address, default):
    """The fp32 at the address as fp64, or the default where there is none."""
    value = tl.load(address.to(tl.pointer_type(tl.float32)), mask=address != 0, other=0.0)
    return tl.where(address != 0, value.to(tl.float64), default)


@triton.jit
def _integer_powers(base1, base2, exponent, bits):
    """By repeated squaring, as csrc/adamw_math.h has it: the same bits."""
    one = exponent.to(tl.float64) * 0.0 + 1.0
    power1, power2 = one, one
    for i in range(0, bits):
        bit = ((exponent >> i) & 1) != 0
        power1 = tl.where(bit, power1 * base1, power1)
        power2 = tl.where(bit, power2 * base2, power2)
        base1 = base1 * base1
        base2 = base2 * base2
    return power1, power2


@triton.jit(do_not_specialize=["num_tensors"])
def _prepare_kernel(
    tensors, groups, firsts, num_tensors, scalars, entries, coefficients, ROWS: tl.constexpr
):
    item = tl.program_id(0)
    tensor = _find(firsts, num_tensors, item)
    begin = (item - tl.load(firsts + tensor)) * ROWS
    t = tensors + tensor * _WORDS
    flags = tl.load(t + _FLAGS)
    flat = (flags & _FLAT) != 0
    by_list = (flags & (_HAS_LIST | _ZERO_GRAD)) == _HAS_LIST
    search = (flags & (_HAS_LIST | _ZERO_GRAD)) == (_HAS_LIST | _ZERO_GRAD)
    group = groups + tl.load(t + _GROUP) * _GROUP_WORDS
    lr = _scalar(tl.load(t + _LR), tl.load(group + _GROUP_LR))
    found_inf = _scalar(tl.load(t + _FOUND_INF), lr * 0.0)
    visited = tl.load(t + _VISITED)
    updated = tl.where(found_inf == 0.0, visited, 0)  # all of them or none
    step = tl.load(tl.load(t + _STEP).to(tl.pointer_type(tl.float32))) + 1.0
    beta1, beta2 = tl.load(group + _BETA1), tl.load(group + _BETA2)

    if begin == 0:
        grad_scale = _scalar(tl.load(t + _GRAD_SCALE), tl.load(group + _GROUP_GRAD_SCALE))
        s = scalars + tensor * _SCALARS
        tl.store(s + _GRAD_FACTOR, (tl.load(group + _SIGN) / grad_scale).to(tl.float32))
        tl.store(s + _F_BETA1, beta1.to(tl.float32))
        tl.store(s + _ONE_MINUS_BETA1, (1.0 - beta1).to(tl.float32))
        tl.store(s + _F_BETA2, beta2.to(tl.float32))
        tl.store(s + _ONE_MINUS_BETA2, (1.0 - beta2).to(tl.float32))
        tl.store(s + _F_EPS, tl.load(group + _EPS).to(tl.float32))
        tl.store(s + _DECAY, (1.0 - lr * tl.load(group + _WEIGHT_DECAY)).to(tl.float32))
        tl.store(s + _NEW_STEP, tl.where(found_inf == 0.0, step, -1.0))

    position = begin + tl.arange(0, ROWS)
    inside = position < visited
    selected = tl.load(t + _LIST).to(tl.pointer_type(tl.int32))
    count = tl.load(t + _LISTED)
    count_address = tl.load(t + _COUNT)
    counted = tl.load(count_address.to(tl.pointer_type(tl.int32)), mask=count_address != 0, other=0)
    count = tl.where(count_address != 0, tl.minimum(counted.to(tl.int64), count), count)

    # freeze: down the list. It is the user's to write to: rows that do not ascend or do not exist
    # are left alone.
    listed = inside & by_list & (position < count)
    row = tl.load(selected + position, mask=listed, other=-1)
    previous = tl.load(selected + position - 1, mask=listed & (position > 0), other=-1)
    in_order = (row >= 0) & (row > previous) & (row < tl.load(t + _NUM_ROWS))
    valid = (position < updated) & ((by_list == 0) | in_order)
    index = tl.where(by_list, row, position)
    index = tl.where(flat, 0, index)

    # zero_grad: every row, and the list says whose gradient is read.
    low = position * 0
    if search:
        high = low + count.to(tl.int32)
        remaining = count
        while remaining > 0:  # binary search, as many halvings for every row
            middle = low + (high - low) // 2
            open_ = low < high
            value = tl.load(selected + middle, mask=open_, other=0)
            low = tl.where(open_ & (value < position), middle + 1, low)
            high = tl.where(open_ & (value >= position), middle, high)
            remaining = remaining >> 1
    found = tl.load(selected + low, mask=inside & search & (low < count), other=-1)
    has_grad = (search == 0) | (found == position)

    state_index = tl.where((flags & _COMPACT) != 0, position, index)
    ages_address = tl.load(t + _AGES)
    ages = ages_address.to(tl.pointer_type(tl.int32)) + state_index
    aged = valid & (ages_address != 0)
    age = tl.load(ages, mask=aged, other=0) + 1
    tl.store(ages, age, mask=aged)
    age = tl.where(ages_address != 0, age, step.to(tl.int32))

    bits = 0
    oldest = tl.max(age, 0)
    while oldest > 0:
        bits += 1
        oldest = oldest >> 1
    power1, power2 = _integer_powers(beta1, beta2, age, bits)
    entry = tl.load(t + _FIRST_ENTRY) + position
    tl.store(
        entries + entry,
        tl.where(valid, index.to(tl.int64) * 2 + has_grad.to(tl.int64), -1),
        mask=inside,
    )
    step_size = (lr / (1.0 - power1)).to(tl.float32).to(tl.uint32, bitcast=True)
    inv_sqrt_bias2 = (1.0 / tl.sqrt(1.0 - power2)).to(tl.float32).to(tl.int32, bitcast=True)
    both = (inv_sqrt_bias2.to(tl.int64) << 32) | step_size.to(tl.int64)
    tl.store(coefficients + entry, both, mask=inside)


@triton.jit
def _load(address, at, mask, DTYPE: tl.constexpr, ALIGN: tl.constexpr):
    """Elements as fp32; those masked out are 0. The address is a multiple of ALIGN."""
    if DTYPE == _BF16:
        pointer = tl.multiple_of(address.to(tl.pointer_type(tl.int16)), ALIGN)
        bits = tl.load(pointer + at, mask=mask, other=0)
        return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif DTYPE == _FP16:
        pointer = tl.multiple_of(address.to(tl.pointer_type(tl.float16)), ALIGN)
        return tl.load(pointer + at, mask=mask, other=0.0).to(tl.float32)
    else:
        pointer = tl.multiple_of(address.to(tl.pointer_type(tl.float32)), ALIGN)
        return tl.load(pointer + at, mask=mask, other=0.0)


@triton.jit
def _store_bf16(address, at, value, mask, random, ALIGN: tl.constexpr):
    """Adds `random` (16 bits) to the part that is cut off; every NaN becomes torch's."""
    bits = value.to(tl.uint32, bitcast=True)
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    rounded = tl.add(bits, random, sanitize_overflow=False) >> 16
    rounded = tl.where(is_nan, 0x7FC0, rounded).to(tl.int16)
    pointer = tl.multiple_of(address.to(tl.pointer_type(tl.int16)), ALIGN)
    tl.store(pointer + at, rounded, mask=mask)


@triton.jit
def _store(address, at, value, mask, DTYPE: tl.constexpr, ALIGN: tl.constexpr):
    """Rounded to nearest even."""
    if DTYPE == _BF16:
        bits = value.to(tl.uint32, bitcast=True)
        _store_bf16(address, at, value, mask, ((bits >> 16) & 1) + 0x7FFF, ALIGN)
    elif DTYPE == _FP16:
        pointer = tl.multiple_of(address.to(tl.pointer_type(tl.float16)), ALIGN)
        tl.store(pointer + at, value.to(tl.float16), mask=mask)
    else:
        pointer = tl.multiple_of(address.to(tl.pointer_type(tl.float32)), ALIGN)
        tl.store(pointer + at, value, mask=mask)


@triton.jit
def _random_bits(at, lane, key, step, seed, VECTOR: tl.constexpr):
    """16 bits for each element `at + lane`: longact/kernels/rounding.py."""
    group = at >> 3
    low = group.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox_impl(
        low,
        (group >> 32).to(tl.uint32),
        low * 0 + key.to(tl.uint32),
        low * 0 + step.to(tl.int32).to(tl.uint32),
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )
    # A vector is a group.
    if VECTOR == 1:
        lane = (at & 7).to(tl.int32)
    word = tl.where(lane < 4, tl.where(lane < 2, w0, w1), tl.where(lane < 6, w2, w3))
    return (word >> ((lane & 1) * 16).to(tl.uint32)) & 0xFFFF


@triton.jit(do_not_specialize=["num_tensors"])
def _update_kernel(
    tensors,
    firsts,
    num_tensors,
    scalars,
    entries,
    coefficients,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENT: tl.constexpr,
    MASTER: tl.constexpr,
    AMSGRAD: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """VECTOR > 1: addresses are multiples of 16 bytes, and rows of VECTOR elements."""
    ALIGN: tl.constexpr = 16 if VECTOR > 1 else 1
    item = tl.program_id(0)
    tensor = _find(firsts, num_tensors, item)
    start = (item - tl.load(firsts + tensor)).to(tl.int64) * CHUNK
    t = tensors + tensor * _WORDS
    s = scalars + tensor * _SCALARS
    new_step = tl.load(s + _NEW_STEP)
    # _prepare_kernel has read it; of this launch one program writes it.
    step_address = tl.load(t + _STEP).to(tl.pointer_type(tl.float32))
    tl.store(step_address, new_step, mask=(start == 0) & (new_step >= 0.0))

    flags = tl.load(t + _FLAGS)
    flat = (flags & _FLAT) != 0
    compact = (flags & _COMPACT) != 0
    row_len = tl.load(t + _ROW_LEN)
    first_entry = tl.load(t + _FIRST_ENTRY)
    length = tl.minimum(tl.load(t + _ELEMENTS) - start, CHUNK).to(tl.int32)
    first_position = start // row_len
    first_column = (start - first_position * row_len).to(tl.int32)

    param, grad = tl.load(t + _PARAM), tl.load(t + _GRAD)
    exp_avg, exp_avg_sq = tl.load(t + _EXP_AVG), tl.load(t + _EXP_AVG_SQ)
    max_exp_avg_sq, master = tl.load(t + _MAX_EXP_AVG_SQ), tl.load(t + _MASTER)
    grad_factor = tl.load(s + _GRAD_FACTOR)
    beta1, one_minus_beta1 = tl.load(s + _F_BETA1), tl.load(s + _ONE_MINUS_BETA1)
    beta2, one_minus_beta2 = tl.load(s + _F_BETA2), tl.load(s + _ONE_MINUS_BETA2)
    eps, decay = tl.load(s + _F_EPS), tl.load(s + _DECAY)

    # A block is vectors x lanes: what elements of one row share is worked out once for a vector.
    # Its place is computed in both shapes, which is cheaper than an exchange between threads.
    vectors = tl.arange(0, BLOCK // VECTOR) * VECTOR
    lane = tl.arange(0, VECTOR)[None, :]
    for begin in range(0, length, BLOCK):
        row_offset = (first_column + begin + vectors) // row_len.to(tl.int32)
        entry = first_entry + tl.where(flat, 0, first_position + row_offset)
        inside = begin + vectors < length
        code = tl.load(entries + entry, mask=inside, other=-1)[:, None]
        both = tl.load(coefficients + entry, mask=inside, other=0)[:, None]
        step_size = both.to(tl.int32).to(tl.float32, bitcast=True)
        inv_sqrt_bias2 = (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)

        offset = first_column + begin + vectors[:, None]
        row_offset = offset // row_len.to(tl.int32)
        column = offset - row_offset * row_len.to(tl.int32)
        position = first_position + row_offset
        mask = code >= 0
        has_grad = mask & ((code & 1) != 0)
        row = (code >> 1) + tl.where(flat, position, 0)
        state_row = tl.where(compact, position, row)
        first_at = tl.multiple_of(row * row_len + column, (VECTOR, VECTOR))
        state_at = tl.multiple_of(state_row * row_len + column, (VECTOR, VECTOR)) + lane
        at = first_at + lane

        if MASTER:
            p = _load(master, state_at, mask, 0, ALIGN)
        else:
            p = _load(param, at, mask, PARAM, ALIGN)
        g = _load(grad, at, has_grad, GRAD, ALIGN)
        m = _load(exp_avg, state_at, mask, MOMENT, ALIGN)
        v = _load(exp_avg_sq, state_at, mask, MOMENT, ALIGN)

        # As csrc/adamw_math.h, in its order.
        g = tl.where(has_grad, g * grad_factor, 0.0)
        m = beta1 * m + one_minus_beta1 * g
        v = beta2 * v + one_minus_beta2 * (g * g)
        _store(exp_avg, state_at, m, mask, MOMENT, ALIGN)
        _store(exp_avg_sq, state_at, v, mask, MOMENT, ALIGN)
        if AMSGRAD:
            largest = _load(max_exp_avg_sq, state_at, mask, MOMENT, ALIGN)
            v = tl.where((v > largest) | (v != v), v, largest)  # noqa: PLR0124
            _store(max_exp_avg_sq, state_at, v, mask, MOMENT, ALIGN)
        denominator = tl.sqrt_rn(v) * inv_sqrt_bias2 + eps
        p = decay * p - tl.div_rn(step_size * m, denominator)
        if MASTER:
            _store(master, state_at, p, mask, 0, ALIGN)
        if STOCHASTIC:
            key, seed = tl.load(t + _KEY), tl.load(t + _SEED)
            random = _random_bits(first_at, lane, key, new_step, seed, VECTOR)
            _store_bf16(param, at, p, mask, random, ALIGN)
        else:
            _store(param, at, p, mask, PARAM, ALIGN)


# ---- launch --------------------------------------------------------------------------------------


def supports(update: ParamUpdate) -> bool:
    """The kernels want contiguous tensors of a type they know, with memory of their own."""
    param, grad, exp_avg = update[:3]
    dtypes = (param.dtype, grad.dtype, exp_avg.dtype)
    return (
        # DTensor and other wrappers have no memory to point at.
        type(param).__torch_dispatch__ is Tensor.__torch_dispatch__
        and all(
            t is None or t.is_contiguous()
            for i, t in enumerate(update[:9])
            if i != 1  # a gradient is copied
        )
        and all(dtype in DTYPE_CODES and dtype != torch.float64 for dtype in dtypes)
        # Positions inside a row are counted in 32 bits.
        and math.prod(param.shape[1:]) < _FLAT_ROW
    )


def update(
    updates: Sequence[ParamUpdate],
    groups: Sequence[AdamWGroup],
    grad_scale: float | Tensor = 1.0,
    found_inf: Tensor | None = None,
) -> None:
    """One step, in place, of parameters on one device, each of which `supports` and `check_update`
    (masked_adamw.py) have passed. Does not wait for the device.

    Args:
        updates: parameters on one device.
        groups: hyperparameters; an lr tensor on the device is read there, in fp32.
        grad_scale: what gradients are divided by; a tensor is read on the device, in fp32.
        found_inf: 1 element; where it is not 0, nothing is changed.

    Raises:
        RuntimeError: the step is being captured into a CUDA graph.
    """
    if not updates:
        return
    device = updates[0][0].device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # Its table would be gone when the graph is replayed.
        raise RuntimeError(
            "longact's Triton kernels cannot be captured: capture needs a native build"
        )

    def on_device(value: Tensor) -> Tensor:
        return value.to(device, torch.float32, non_blocking=True)

    def is_here(value: float | Tensor | None) -> bool:
        return isinstance(value, Tensor) and (device.type == "cpu" or not value.is_cpu)

    # What the device reads must live until the launches are queued.
    scale_tensor = on_device(grad_scale) if isinstance(grad_scale, Tensor) else None
    found_tensor = None if found_inf is None else on_device(found_inf)
    lr_tensors = [on_device(g.lr) if is_here(g.lr) else None for g in groups]  # type: ignore[arg-type]
    grads = [
        u[1] if u[1].is_contiguous() and not u[1].is_neg() else u[1].resolve_neg().contiguous()
        for u in updates
    ]
    group_table = array("d")
    for group, lr_tensor in zip(groups, lr_tensors, strict=True):
        group_table.extend((
            0.0 if lr_tensor is not None else float(group.lr), group.beta1, group.beta2, group.eps,
            group.weight_decay, -1.0 if group.maximize else 1.0,
            1.0 if isinstance(grad_scale, Tensor) else grad_scale, 0.0,
        ))  # fmt: skip

    rows_of: dict[tuple[int, int, int, bool, bool, bool, int], list[list[int]]] = {}
    num_entries = 0
    for u, grad in zip(updates, grads, strict=True):
        group = groups[u[-1]]
        words = _words(u, grad, group, num_entries)
        words[_LR.value] = _data_ptr(lr_tensors[u[-1]])
        words[_GRAD_SCALE.value] = _data_ptr(scale_tensor)
        words[_FOUND_INF.value] = _data_ptr(found_tensor)
        num_entries += words[_VISITED.value]
        param, master = u[0], u[8]
        stochastic = group.seed is not None and master is None and param.dtype == torch.bfloat16
        key = (
            DTYPE_CODES[param.dtype],
            DTYPE_CODES[grad.dtype],
            DTYPE_CODES[u[2].dtype],
            master is not None,
            u[4] is not None,
            stochastic,
            _VECTOR if _is_aligned(words) else 1,
        )
        rows_of.setdefault(key, []).append(words)

    num_entries += num_entries % 2  # what follows stays on a multiple of 16 bytes
    # Launches in turn: tensors, groups, then the first items of the preparation and of each launch.
    table = array("q", [word for rows in rows_of.values() for row in rows for word in row])
    all_rows = [row for rows in rows_of.values() for row in rows]
    prepare_firsts, prepare_items = _first_items(all_rows, _VISITED.value, _ROWS)
    firsts = [_first_items(rows, _ELEMENTS.value, _CHUNK) for rows in rows_of.values()]
    sections: list[array[int] | array[float]] = [table, group_table, prepare_firsts]
    sections += [first for first, _ in firsts]
    tensors, group_rows, prepare_first, *update_firsts = _upload(sections, device)
    scratch = torch.empty(
        2 * num_entries + len(all_rows) * _SCALARS.value // 2, dtype=torch.int64, device=device
    )
    scalars = scratch[: len(all_rows) * _SCALARS.value // 2].view(torch.float32)
    coefficients = scratch[scratch.numel() - num_entries :]
    entries = scratch[scalars.numel() // 2 : scratch.numel() - num_entries]

    with on_device_of(tensors):
        _prepare_kernel[(prepare_items,)](
            tensors,
            group_rows,
            prepare_first,
            len(all_rows),
            scalars,
            entries,
            coefficients,
            ROWS=_ROWS,
            enable_fp_fusion=False,
        )
        done = 0
        for (key, rows), first, (_, items) in zip(
            rows_of.items(), update_firsts, firsts, strict=True
        ):
            _update_kernel[(items,)](
                tensors[done * _WORDS.value :],
                first,
                len(rows),
                scalars[done * _SCALARS.value :],
                entries,
                coefficients,
                *key,
                BLOCK=_BLOCK,
                CHUNK=_CHUNK,
                num_warps=_NUM_WARPS,
                enable_fp_fusion=False,
            )
            done += len(rows)


def _data_ptr(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _words(u: ParamUpdate, grad: Tensor, group: AdamWGroup, first_entry: int) -> list[int]:
    """A parameter's row of the table."""
    param, _, exp_avg, exp_avg_sq, max_exp_avg_sq, step, ages, rows, master, key, group_index = u
    num_rows = param.shape[0] if param.dim() else 1
    row_len = math.prod(param.shape[1:])
    flat = rows is None and ages is None
    counter, capacity = None, 0 if rows is None else rows.numel()
    compact = rows is not None and param.dim() > 0 and exp_avg.shape[0] != num_rows
    if rows is not None and is_row_buffer(rows, param):
        counter, rows, capacity, compact = rows, rows[1:], num_rows, False
    visited = 1 if flat else num_rows if rows is None or group.zero_grad else capacity
    seed = group.seed or 0
    flags = flat * _FLAT.value + compact * _COMPACT.value
    flags += group.zero_grad * _ZERO_GRAD.value + (rows is not None) * _HAS_LIST.value
    return [
        param.data_ptr(), grad.data_ptr(), exp_avg.data_ptr(), exp_avg_sq.data_ptr(),
        _data_ptr(max_exp_avg_sq), step.data_ptr(), _data_ptr(ages), _data_ptr(rows),
        _data_ptr(master), _data_ptr(counter), 0, 0, 0, capacity, num_rows,
        _FLAT_ROW if flat else max(row_len, 1), visited,
        param.numel() if flat else visited * row_len, first_entry, flags, group_index, key,
        (seed + 2**63) % 2**64 - 2**63, 0,
    ]  # fmt: skip


def _is_aligned(words: list[int]) -> bool:
    """Every vector whole and on a multiple of 16 bytes."""
    addresses = (_PARAM, _GRAD, _EXP_AVG, _EXP_AVG_SQ, _MAX_EXP_AVG_SQ, _MASTER)
    sizes = (_ROW_LEN, _ELEMENTS)
    return all(words[i.value] % 16 == 0 for i in addresses) and all(
        words[i.value] % _VECTOR == 0 for i in sizes
    )


def _first_items(rows: list[list[int]], word: int, size: int) -> tuple[array[int], int]:
    """Each tensor's first item, and how many there are; an empty tensor has one too."""
    firsts, items = array("i"), 0
    for row in rows:
        firsts.append(items)
        items += max(1, -(-row[word] // size))
    return firsts, items


def _upload(sections: Sequence[array[int] | array[float]], device: torch.device) -> list[Tensor]:
    """Through one copy; each section begins on a multiple of 16 bytes."""
    memory, places = bytearray(), []
    for section in sections:
        begin = len(memory)
        memory += section.tobytes()
        places.append((begin, len(memory), section.typecode))
        memory += bytes(-len(memory) % 16)
    host = torch.frombuffer(memory, dtype=torch.uint8)
    if device.type != "cpu":
        host = host.pin_memory()  # torch keeps it until the copy has read it
    table = host.to(device, non_blocking=True)
    dtypes = {"q": torch.int64, "d": torch.float64, "i": torch.int32}
    return [table[begin:end].view(dtypes[code]) for begin, end, code in places]
