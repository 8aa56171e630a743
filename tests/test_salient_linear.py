"""`SalientLinear` next to `nn.Linear`: the same, but for the gradient of unselected rows."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import longact
from longact.nn import SalientLinear

IN, OUT = 12, 10
ROWS = [1, 4, 5, 9]
# (rtol, atol) of sums over tens of products, which the row gradient adds up in another order.
TOLERANCE = {torch.float64: (1e-12, 1e-13), torch.float32: (1e-5, 1e-5)}


def pair(
    rows: list[int] | None, *, bias: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[SalientLinear, nn.Linear]:
    """A SalientLinear with `rows`, and the nn.Linear with the same values."""
    torch.manual_seed(0)
    plain = nn.Linear(IN, OUT, bias=bias, dtype=dtype)
    salient = SalientLinear(IN, OUT, bias=bias, dtype=dtype)
    salient.load_state_dict(plain.state_dict())
    longact.set_rows(salient.weight, rows)
    return salient, plain


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def is_positive_zero(value: Tensor) -> bool:
    return not bool(value.any()) and not bool(torch.signbit(value).any())


def assert_row_gradient(
    grad: Tensor | None, dense: Tensor | None, rows: list[int] | None, **tolerance: float
) -> None:
    """`dense` on the rows, +0 to the bit elsewhere."""
    if dense is None:
        assert grad is None
        return
    assert grad is not None
    assert grad.dtype == dense.dtype
    assert grad.shape == dense.shape
    if rows is None:
        assert torch.equal(grad, dense)  # no selection: nn.Linear's own backward
        return
    torch.testing.assert_close(grad[rows], dense[rows], **tolerance)
    others = [r for r in range(grad.shape[0]) if r not in rows]
    assert is_positive_zero(grad[others])


def check_like_linear(
    salient: nn.Module,
    plain: nn.Module,
    x: Tensor,
    rows: list[int] | None,
    run: Callable[[nn.Module, Tensor], Tensor] = lambda module, x: module(x),
) -> None:
    """Output, dx and parameter gradients of both modules for one input."""
    inputs = [x.detach().clone(memory_format=torch.preserve_format) for _ in range(2)]
    ys = [
        run(module, i.requires_grad_()) for module, i in zip((salient, plain), inputs, strict=True)
    ]
    assert torch.equal(ys[0], ys[1])
    assert ys[0].dtype == ys[1].dtype
    weights = random(*ys[0].shape, seed=1).to(ys[0].dtype)
    for y in ys:
        (y * weights).sum().backward()
    rtol, atol = TOLERANCE.get(ys[0].dtype, (2e-2, 2e-2))
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=rtol, atol=atol)
    for name, param in plain.named_parameters():
        grad = dict(salient.named_parameters())[name].grad
        assert_row_gradient(grad, param.grad, rows, rtol=rtol, atol=atol)


# ---- nn.Linear to the outside --------------------------------------------------------------------


def test_same_constructor_as_linear() -> None:
    ours = inspect.signature(SalientLinear).parameters
    theirs = inspect.signature(nn.Linear).parameters
    assert [(p.name, p.default) for p in ours.values()] == [
        (p.name, p.default) for p in theirs.values()
    ]
    assert issubclass(SalientLinear, nn.Linear)
    for arguments in ((IN, OUT), (IN, OUT, False), (IN, OUT, True, "meta", torch.bfloat16)):
        torch.manual_seed(0)
        salient = SalientLinear(*arguments)  # type: ignore[arg-type]
        torch.manual_seed(0)
        plain = nn.Linear(*arguments)  # type: ignore[arg-type]
        assert list(salient.state_dict()) == list(plain.state_dict())
        for ours_, theirs_ in zip(salient.parameters(), plain.parameters(), strict=True):
            assert (ours_.shape, ours_.dtype, ours_.device) == (
                theirs_.shape,
                theirs_.dtype,
                theirs_.device,
            )
            if not ours_.is_meta:
                assert torch.equal(ours_, theirs_)  # initialised alike
        assert salient.rows is None


@pytest.mark.parametrize("bias", [True, False])
def test_state_dicts_are_interchangeable(bias: bool) -> None:
    salient, plain = pair(ROWS, bias=bias)
    other = nn.Linear(IN, OUT, bias=bias)
    other.load_state_dict(salient.state_dict())
    assert all(map(torch.equal, other.parameters(), plain.parameters()))
    assert list(salient._modules) == list(salient._buffers) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [None, ROWS, []], ids=str)
@pytest.mark.parametrize("mode", ["train", "eval", "no_grad", "inference"])
def test_outputs_are_equal_to_the_bit(
    mode: str, rows: list[int] | None, dtype: torch.dtype
) -> None:
    salient, plain = pair(rows, dtype=dtype)
    salient.train(mode == "train")
    contexts = {"no_grad": torch.no_grad, "inference": torch.inference_mode}
    with contexts.get(mode, torch.enable_grad)():
        for shape in ((IN,), (7, IN), (2, 5, IN), (0, IN)):
            x = random(*shape).to(dtype)
            y = salient(x)
            assert torch.equal(y, plain(x))
            assert y.requires_grad == plain(x).requires_grad


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("rows", [None, [3], ROWS, list(range(OUT)), []], ids=str)
@pytest.mark.parametrize("shape", [(IN,), (7, IN), (2, 5, IN), (2, 3, 4, IN), (0, IN), (2, 0, IN)])
def test_row_gradients(
    shape: tuple[int, ...], rows: list[int] | None, bias: bool, dtype: torch.dtype
) -> None:
    salient, plain = pair(rows, bias=bias, dtype=dtype)
    check_like_linear(salient, plain, random(*shape, dtype=dtype), rows)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_inputs_and_gradients_of_any_layout(bias: bool) -> None:
    views: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.transpose(0, 1),
        lambda x: x[:, ::2],
        lambda x: x.flip(0)[1:],
        lambda x: x[:1].expand(3, -1, -1),
        lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    ]
    for view in views:
        salient, plain = pair(ROWS, bias=bias)
        check_like_linear(salient, plain, random(3, 6, IN), ROWS, lambda m, x, v=view: m(v(x)))
        # The other side: gradients that arrive transposed, sliced or expanded.
        salient, plain = pair(ROWS, bias=bias)
        check_like_linear(
            salient, plain, random(3, 6, IN), ROWS, lambda m, x: m(x)[:, 1:4].transpose(1, 2)
        )
    salient, plain = pair(ROWS, bias=bias)
    for module in (salient, plain):
        module(random(3, 6, IN)).sum().backward()  # an expanded scalar
    assert_row_gradient(salient.weight.grad, plain.weight.grad, ROWS, rtol=1e-5, atol=1e-5)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_row_gradients_of_any_size(data: st.DataObject) -> None:
    tokens, n_in, n_out = (data.draw(st.integers(low, 17)) for low in (0, 1, 1))
    rows = sorted(data.draw(st.sets(st.integers(0, n_out - 1))))
    plain = nn.Linear(n_in, n_out, dtype=torch.float64)
    salient = SalientLinear.from_linear(copy.deepcopy(plain))
    longact.set_rows(salient.weight, rows)
    check_like_linear(salient, plain, random(tokens, n_in, dtype=torch.float64), rows)


def test_unselected_rows_never_meet_a_bad_gradient() -> None:
    # The dense product would give 0 * inf = NaN there.
    salient, _ = pair(ROWS)
    x, gradient = random(5, IN), random(5, OUT)
    gradient[:, 0] = torch.nan
    gradient[2, 3] = torch.inf
    salient(x).backward(gradient)
    assert salient.weight.grad is not None
    assert salient.weight.grad[ROWS].isfinite().all()
    assert is_positive_zero(salient.weight.grad[[0, 2, 3, 6, 7, 8]])


def test_gradients_add_up_over_micro_batches() -> None:
    salient, plain = pair(ROWS, dtype=torch.float64)
    for seed, tokens in enumerate((5, 1, 0, 8)):
        for module in (salient, plain):
            module(random(tokens, IN, dtype=torch.float64, seed=seed)).square().sum().backward()
    for ours, theirs in zip(salient.parameters(), plain.parameters(), strict=True):
        assert_row_gradient(ours.grad, theirs.grad, ROWS, rtol=1e-12, atol=1e-12)


def test_rows_of_a_forward_hold_for_its_backward() -> None:
    salient, plain = pair(ROWS)
    y = salient(random(5, IN))
    longact.set_rows(salient.weight, [0])
    y.square().sum().backward()
    plain(random(5, IN)).square().sum().backward()
    assert_row_gradient(salient.weight.grad, plain.weight.grad, ROWS, rtol=1e-5, atol=1e-5)


def test_a_layer_used_twice_in_one_forward() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(IN, IN, dtype=torch.float64)
    salient = SalientLinear.from_linear(copy.deepcopy(plain))
    longact.set_rows(salient.weight, ROWS)
    x = random(5, IN, dtype=torch.float64)
    check_like_linear(salient, plain, x, ROWS, lambda m, x: m(torch.tanh(m(x))))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_gradient_penalty(bias: bool) -> None:
    # Double backward. dx = dy W has every row of W in it, so a loss on dx trains every row.
    salient, plain = pair(ROWS, bias=bias, dtype=torch.float64)
    xs = []
    for module in (salient, plain):
        x = random(5, IN, dtype=torch.float64).requires_grad_()
        (dx,) = torch.autograd.grad(module(x).pow(3).sum(), x, create_graph=True)
        dx.square().sum().backward()
        xs.append(x)
    torch.testing.assert_close(xs[0].grad, xs[1].grad, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(salient.parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad[ROWS], theirs.grad[ROWS], rtol=1e-12, atol=1e-12)


def test_gradcheck_of_first_and_second_order() -> None:
    salient, _ = pair(list(range(OUT)), dtype=torch.float64)
    x = random(3, IN, dtype=torch.float64).requires_grad_()

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(salient, {"weight": weight, "bias": bias}, (x,))

    inputs = (x, salient.weight, salient.bias)
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("frozen", ["weight", "bias", "both", "input"])
def test_frozen_parameters_and_inputs_get_no_gradient(frozen: str) -> None:
    salient, plain = pair(ROWS)
    xs = [random(5, IN).requires_grad_(frozen != "input") for _ in range(2)]
    for module, x in zip((salient, plain), xs, strict=True):
        module.weight.requires_grad_(frozen not in ("weight", "both"))
        module.bias.requires_grad_(frozen not in ("bias", "both"))
        module(x).square().sum().backward()
    assert (xs[0].grad is None) == (frozen == "input")
    if frozen != "input":
        torch.testing.assert_close(xs[0].grad, xs[1].grad)
    for ours, theirs in zip(salient.parameters(), plain.parameters(), strict=True):
        assert_row_gradient(ours.grad, theirs.grad, ROWS, rtol=1e-5, atol=1e-5)


def test_the_output_may_be_changed_in_place() -> None:
    # nn.Linear allows it, and models do it: y += residual, q.mul_(scale), relu_().
    changes: list[Callable[[Tensor], Tensor]] = [
        lambda y: y.add_(1.0).square(),
        lambda y: y.relu_() * 2,
        lambda y: y.view(2, 3, 2, 5).transpose(1, 2).mul_(3.0).square(),
    ]
    for change in changes:
        for bias in (True, False):
            salient, plain = pair(ROWS, bias=bias)
            x = random(2, 3, IN)
            check_like_linear(salient, plain, x, ROWS, lambda m, x, f=change: f(m(x)))


def test_saved_tensors_see_in_place_changes() -> None:
    # As with nn.Linear: changing the input between forward and backward is an error, not a wrong
    # gradient.
    salient, _ = pair(ROWS)
    x = random(5, IN)
    y = salient(x)
    x.add_(1.0)
    with pytest.raises(RuntimeError, match="inplace operation"):
        y.sum().backward()


# ---- autocast ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("rows", [None, ROWS], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16])
def test_autocast_is_linears(
    input_dtype: torch.dtype, dtype: torch.dtype, rows: list[int] | None, bias: bool
) -> None:
    salient, plain = pair(rows, bias=bias)

    def run(module: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return module(x)

    x = random(2, 5, IN).to(input_dtype)
    assert run(salient, x).dtype == dtype
    check_like_linear(salient, plain, x, rows, run)
    assert salient.weight.grad is not None
    assert salient.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("rows", [None, ROWS], ids=str)
def test_autocast_leaves_float64_alone(rows: list[int] | None) -> None:
    salient, plain = pair(rows, dtype=torch.float64)

    def run(module: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return module(x)

    x = random(5, IN, dtype=torch.float64)
    assert run(salient, x).dtype == torch.float64
    check_like_linear(salient, plain, x, rows, run)


@pytest.mark.parametrize("autocast", [True, False])
def test_mixed_dtypes_are_an_error_as_with_linear(autocast: bool) -> None:
    salient, plain = pair(ROWS, dtype=torch.float64)
    for module in (plain, salient):
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            pytest.raises(RuntimeError, match="dtype"),
        ):
            module(random(5, IN))


# ---- from_linear, copies, conversions ------------------------------------------------------------


def test_from_linear_shares_parameters_hooks_and_mode() -> None:
    plain = nn.Linear(IN, OUT).eval()
    calls: list[str] = []
    plain.register_forward_hook(lambda *_: calls.append("forward"))
    plain.weight.register_hook(lambda grad: calls.append("grad"))
    plain.weight.requires_grad_(True)
    plain.note = "kept"  # type: ignore[assignment]
    salient = SalientLinear.from_linear(plain)
    assert type(salient) is SalientLinear
    assert salient.weight is plain.weight
    assert salient.bias is plain.bias
    assert salient.note == "kept"
    assert not salient.training
    assert (salient.in_features, salient.out_features) == (IN, OUT)
    salient(random(5, IN)).sum().backward()
    assert calls == ["forward", "grad"]
    # An nn.Linear still, and not changed by it.
    assert type(plain) is nn.Linear
    assert torch.equal(plain(random(5, IN)), salient(random(5, IN)))
    assert SalientLinear.from_linear(nn.Linear(IN, OUT, bias=False)).bias is None


def test_from_linear_takes_over_rows_set_by_hand() -> None:
    plain = nn.Linear(IN, OUT)
    longact.set_rows(plain.weight, ROWS)
    salient = SalientLinear.from_linear(plain)
    assert salient.rows is not None
    assert salient.rows.tolist() == ROWS
    assert longact.get_rows(salient.bias) is salient.rows


def test_from_linear_refuses_what_is_no_plain_linear() -> None:
    class Subclass(nn.Linear):
        pass

    for module in (
        Subclass(2, 2),
        nn.Bilinear(2, 2, 2),
        nn.Conv1d(2, 2, 1),
        nn.modules.linear.NonDynamicallyQuantizableLinear(2, 2),
        SalientLinear(2, 2),
    ):
        with pytest.raises(TypeError, match=type(module).__name__):
            SalientLinear.from_linear(module)  # type: ignore[arg-type]


def test_rows_reach_weight_bias_and_layer() -> None:
    salient = SalientLinear(IN, OUT)
    assert longact.get_rows(salient.weight) is None
    longact.set_rows(salient.weight, ROWS)
    assert salient.rows is not None
    assert salient.rows.tolist() == ROWS
    assert salient.rows is longact.get_rows(salient.weight)
    assert salient.rows is longact.get_rows(salient.bias)
    longact.set_rows(salient.bias, [0])
    assert salient.rows.tolist() == [0]
    longact.set_rows(salient.weight, None)
    assert salient.rows is None
    assert longact.get_rows(salient.bias) is None


def reload(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(
    "make",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), reload],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_keep_their_rows_and_are_independent(
    make: Callable[[nn.Module], Any], bias: bool
) -> None:
    salient, plain = pair(ROWS, bias=bias)
    twin = make(salient)
    assert type(twin) is SalientLinear
    for param in twin.parameters():
        assert longact.get_rows(param).tolist() == ROWS
        assert longact.get_rows(param) is twin.rows is not salient.rows
    check_like_linear(twin, plain, random(5, IN), ROWS)
    assert salient.weight.grad is None
    longact.set_rows(twin.weight, [0])
    assert salient.rows is not None
    assert salient.rows.tolist() == ROWS
    assert [longact.get_rows(p).tolist() for p in twin.parameters()] == [[0]] * (1 + bias)


def moved_by_set_data(salient: SalientLinear) -> SalientLinear:
    return salient.to(torch.float64)


def moved_by_assign(salient: SalientLinear) -> SalientLinear:
    salient.load_state_dict(copy.deepcopy(salient.state_dict()), assign=True)
    return salient


def moved_by_setattr(salient: SalientLinear) -> SalientLinear:
    salient.weight = nn.Parameter(salient.weight.detach().clone())
    salient.bias = nn.Parameter(salient.bias.detach().clone())
    return salient


def moved_by_meta(salient: SalientLinear) -> SalientLinear:
    return salient.to("meta")


def moved_by_meta_and_back(salient: SalientLinear) -> SalientLinear:
    return salient.to("meta").to_empty(device="cpu")


def with_future(name: str, action: Callable[[SalientLinear], Any]) -> Callable[..., SalientLinear]:
    def move(salient: SalientLinear) -> SalientLinear:
        switch = getattr(torch.__future__, f"set_{name}_module_params_on_conversion")
        switch(True)
        try:
            action(salient)
        finally:
            switch(False)
        return salient

    return move


@pytest.mark.parametrize(
    "move",
    [
        moved_by_set_data,
        SalientLinear.half,
        SalientLinear.bfloat16,
        moved_by_assign,
        moved_by_setattr,
        moved_by_meta,
        moved_by_meta_and_back,
        with_future("overwrite", lambda m: m.double()),
        with_future("swap", lambda m: m.double()),
        with_future("swap", lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()))),
    ],
    ids=[
        "to",
        "half",
        "bfloat16",
        "assign",
        "setattr",
        "meta",
        "to_empty",
        "overwrite",
        "swap",
        "swap-load",
    ],
)
def test_conversions_keep_the_selection(move: Callable[[SalientLinear], SalientLinear]) -> None:
    salient, _ = pair(ROWS)
    moved = move(salient)
    for param in moved.parameters():
        rows = longact.get_rows(param)
        assert rows is not None
        assert rows is moved.rows
        assert rows.tolist() == ROWS
    if moved.weight.is_meta:  # has no values to check new rows against
        return
    longact.set_rows(moved.weight, [2])
    assert moved.rows is not None
    assert moved.rows.tolist() == [2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_converted_layer_trains(dtype: torch.dtype) -> None:
    salient, plain = pair(ROWS)
    check_like_linear(salient.to(dtype), plain.to(dtype), random(5, IN).to(dtype), ROWS)


def test_rows_follow_the_activations_device() -> None:
    # Rows of the CPU, all else on another device: meta stands in for a GPU here.
    salient, _ = pair(ROWS)
    salient = salient.to("meta")
    y = salient(torch.empty(5, IN, device="meta"))
    y.sum().backward()
    assert salient.weight.grad is not None
    assert salient.weight.grad.is_meta


# ---- with the rest of torch ----------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_functional_call(bias: bool) -> None:
    salient, plain = pair(ROWS, bias=bias, dtype=torch.float64)
    x = random(5, IN, dtype=torch.float64)
    results = []
    for module in (salient, plain):
        values = {
            n: random(*p.shape, dtype=torch.float64, seed=3).requires_grad_()
            for n, p in module.named_parameters()
        }
        y = torch.func.functional_call(module, values, (x,))
        y.square().sum().backward()
        results.append((y, values))
    assert torch.equal(results[0][0], results[1][0])
    for name, value in results[0][1].items():
        dense = results[1][1][name].grad
        assert_row_gradient(value.grad, dense, ROWS, rtol=1e-12, atol=1e-12)
    assert salient.weight.grad is None


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_function_transforms() -> None:
    # torch.func.grad, and vmap over it for gradients of single examples, work on nn.Linear.
    salient, plain = pair(ROWS, dtype=torch.float64)
    x = random(3, 5, IN, dtype=torch.float64)
    results = []
    for module in (salient, plain):
        values = {n: p.detach() for n, p in module.named_parameters()}

        def loss(values: dict[str, Tensor], x: Tensor, module: nn.Module = module) -> Tensor:
            return torch.func.functional_call(module, values, (x,)).square().sum()

        one = torch.func.grad(loss)(values, x[0])
        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(values, x)
        results.append((one, each))
    for name in ("weight", "bias"):
        one, each = ([r[i][name] for r in results] for i in range(2))
        assert_row_gradient(one[0], one[1], ROWS, rtol=1e-12, atol=1e-12)
        for ours, theirs in zip(each[0], each[1], strict=True):
            assert_row_gradient(ours, theirs, ROWS, rtol=1e-12, atol=1e-12)


def test_clip_grad_norm_sees_selected_rows_only() -> None:
    salient, plain = pair(ROWS, dtype=torch.float64)
    for module in (salient, plain):
        module(random(5, IN, dtype=torch.float64)).square().sum().backward()
    assert plain.weight.grad is not None
    assert plain.bias.grad is not None
    selected = torch.cat([plain.weight.grad[ROWS].flatten(), plain.bias.grad[ROWS]])
    norm = nn.utils.clip_grad_norm_(salient.parameters(), 1.0)
    torch.testing.assert_close(norm, selected.norm(), rtol=1e-12, atol=0)
    assert norm < nn.utils.get_total_norm([plain.weight.grad, plain.bias.grad])
    assert salient.weight.grad is not None
    torch.testing.assert_close(
        salient.weight.grad[ROWS], plain.weight.grad[ROWS] / (norm + 1e-6), rtol=1e-12, atol=0
    )


def test_plain_adamw_trains_on_the_row_gradients() -> None:
    # Any optimizer may be used; without weight decay the zero gradients leave their rows alone.
    salient, plain = pair(ROWS)
    for module in (salient, plain):
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.0)
        module(random(5, IN)).square().sum().backward()
        optimizer.step()
    start = pair(ROWS)[1]
    for ours, theirs, first in zip(
        salient.parameters(), plain.parameters(), start.parameters(), strict=True
    ):
        torch.testing.assert_close(ours[ROWS], theirs[ROWS])
        others = [r for r in range(OUT) if r not in ROWS]
        assert torch.equal(ours[others], first[others])


class Block(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x)) * 2


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_forward_and_backward_equal_eager(backend: str) -> None:
    for rows in (None, ROWS, []):
        for bias in (True, False):
            if backend == "inductor" and (rows, bias) not in ((None, True), (ROWS, True)):
                continue
            torch._dynamo.reset()
            salient, _ = pair(rows, bias=bias)
            block = Block(salient)
            twin = copy.deepcopy(block)
            compiled = torch.compile(block, fullgraph=True, backend=backend)
            inputs = [random(2, 5, IN).requires_grad_() for _ in range(2)]
            ys = [m(x) for m, x in zip((compiled, twin), inputs, strict=True)]
            torch.testing.assert_close(ys[0], ys[1], rtol=1e-6, atol=1e-6)
            for y in ys:
                y.square().sum().backward()
            torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-5, atol=1e-5)
            for ours, theirs in zip(block.parameters(), twin.parameters(), strict=True):
                expected = list(range(OUT)) if rows is None else rows
                assert_row_gradient(ours.grad, theirs.grad, expected, rtol=1e-5, atol=1e-5)


def test_a_compiled_layer_follows_its_rows() -> None:
    # Also to another number of rows, and under autocast.
    torch._dynamo.reset()
    salient, plain = pair(ROWS)
    compiled = torch.compile(salient, fullgraph=True, backend="aot_eager")
    for rows in (ROWS, [0, 2, 3, 7], [5], None, [], list(range(OUT))):
        longact.set_rows(salient.weight, rows)
        for module in (compiled, plain):
            module.zero_grad()
            module(random(5, IN)).square().sum().backward()
        expected = list(range(OUT)) if rows is None else rows
        assert_row_gradient(salient.weight.grad, plain.weight.grad, expected, rtol=1e-5, atol=1e-5)
    longact.set_rows(salient.weight, ROWS)
    for module in (compiled, plain):
        module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = module(random(5, IN))
        assert y.dtype == torch.bfloat16
        y.square().sum().backward()
    assert_row_gradient(salient.weight.grad, plain.weight.grad, ROWS, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layer(reentrant: bool) -> None:
    salient, plain = pair(ROWS, dtype=torch.float64)

    def run(module: nn.Module, x: Tensor) -> Tensor:
        if module is plain:
            return module(x)
        y = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=reentrant)
        assert isinstance(y, Tensor)
        return y

    check_like_linear(salient, plain, random(2, 5, IN, dtype=torch.float64), ROWS, run)
