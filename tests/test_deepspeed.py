"""DeepSpeed's and OpenRLHF's real classes, and accelerate's loop: the lines that docs/frameworks.md
shows, run."""

from __future__ import annotations

import importlib
import importlib.machinery
import logging
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from helpers import snippet
from ranks import join, start_ranks
from torch import Tensor

import longact
import longact.integrations.deepspeed
from longact.integrations.deepspeed import check_deepspeed, connect


def run_snippet(name: str, **names: Any) -> dict[str, Any]:
    """Runs a block of the docs; returns its names."""
    names |= {"longact": longact, "torch": torch}
    exec(compile(snippet(name), name, "exec"), names)
    return names


# --- configurations ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"zero_optimization": {"stage": 1}}, r"stage=1 .* flat partitions .* Use ZeRO stage 0"),
        ({"zero_optimization": {"stage": 2}}, r"stage=2 "),
        ({"zero_optimization": {"stage": 3}}, r"stage=3 "),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            r"ZeRO-Offload .* own CPU Adam",
        ),
        (
            {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "nvme"}}},
            r"ZeRO-Offload",
        ),
        ({"zero_optimization": {"stage": 0, "cpu_offload": True}}, r"ZeRO-Offload"),
        ({"optimizer": {"type": "AdamW"}}, r"optimizer\.type='AdamW' .* Leave the section"),
    ],
)
def test_configurations_that_cannot_work_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_deepspeed(config)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "none"}}},
        {"zero_optimization": None, "optimizer": None},
        {"bf16": {"enabled": True}, "zero_optimization": {"stage": 0, "offload_optimizer": None}},
    ],
)
def test_configurations_that_work_are_accepted(config: dict[str, Any]) -> None:
    check_deepspeed(config)


def test_connect_wants_an_engine() -> None:
    with pytest.raises(TypeError, match=r"engine is a Linear: pass what deepspeed\.initialize"):
        connect(torch.nn.Linear(2, 2))


# --- DeepSpeed's engine --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deepspeed() -> Iterator[Any]:
    variables = {
        "DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
    }  # fmt: skip
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    module = pytest.importorskip("deepspeed", reason="needs deepspeed")
    # DeepSpeed would compile a kernel for this: a minute, and a compiler. (As an attribute of the
    # package this name is torch itself.)
    backend: Any = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # An engine's own process group, as it stays for the whole process.
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    module.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    yield module
    dist.destroy_process_group()
    module.comm.comm.cdb = None
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


def _config(**options: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        **options,
    }


BF16 = {"bf16": {"enabled": True}}
AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}


def _ours(deepspeed: Any, config: dict[str, Any]) -> tuple[Any, Any, longact.LongAct]:
    model = models.tiny_model("llama")
    names = run_snippet("deepspeed", deepspeed=deepspeed, model=model, config=_config(**config))
    return names["engine"], model, names["handle"]


def _step(engine: Any, seed: int, micro_batches: int = 1) -> None:
    for i in range(micro_batches):
        ids = models.token_ids(seed=seed + i)
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()


@pytest.mark.parametrize("config", [{}, AUTOCAST, BF16])
def test_zero_0_trains_selected_rows_only(deepspeed: Any, config: dict[str, Any]) -> None:
    engine, model, handle = _ours(deepspeed, config)
    for seed in range(3):
        before, chosen = models.params_of(model), models.rows_of(handle)
        _step(engine, seed)
        trained = chosen if seed else models.rows_of(handle)
        after = models.params_of(model)
        for name in models.QK:
            key = f"{name}.weight"
            changed = models.changed_rows(before[key].float(), after[key].float())
            rows = trained[name]
            assert rows is not None
            assert len(rows) == int(0.3 * before[key].shape[0] + 0.5)
            assert changed == rows, (seed, key)
        dense = "model.layers.0.mlp.up_proj.weight"
        assert len(models.changed_rows(before[dense].float(), after[dense].float())) == 96


def test_zero_0_is_the_plain_loop(deepspeed: Any) -> None:
    """Gradient accumulation and clipping too."""
    engine, model, handle = _ours(
        deepspeed, {"gradient_accumulation_steps": 2, "gradient_clipping": 0.1}
    )
    plain = models.tiny_model("llama")
    plain_handle = longact.apply(plain, 0.3)
    optimizer = longact.FusedMaskedAdam(plain.parameters(), lr=1e-2)
    for seed in (0, 10, 20):
        _step(engine, seed, micro_batches=2)
        for i in range(2):
            models.forward_backward(plain, models.token_ids(seed=seed + i), scale=0.5)
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        assert models.rows_of(handle) == models.rows_of(plain_handle)
    for name, value in models.params_of(model).items():
        torch.testing.assert_close(value, plain.get_parameter(name), rtol=1e-4, atol=1e-5)


def test_the_fp32_copies_of_bf16_start_at_age_zero(deepspeed: Any) -> None:
    engine, model, _ = _ours(deepspeed, BF16)
    optimizer = engine.basic_optimizer
    for seed in range(2):
        _step(engine, seed)
    steps = {float(state["step"]) for state in optimizer.state.values()}
    assert steps == {2.0}
    assert all(p.dtype == torch.float32 for p in optimizer.param_groups[0]["params"])
    assert model.get_parameter(f"{models.Q0}.weight").dtype == torch.bfloat16


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_connect_refuses_flat_partitions(deepspeed: Any, stage: int) -> None:
    with pytest.raises(
        ValueError, match=r"DeepSpeedZeroOptimizer\w* does not hand model\.layers\.0.*flattens"
    ):
        _ours(deepspeed, {"zero_optimization": {"stage": stage}})


def test_connect_refuses_another_optimizer_and_a_model_without_longact(deepspeed: Any) -> None:
    model = models.tiny_model("llama")
    longact.apply(model, 0.3)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters()), config=_config()
    )
    with pytest.raises(ValueError, match=r"optimizer is AdamW: pass optimizer=longact\.Fused"):
        connect(engine)
    model = models.tiny_model("llama")
    engine, *_ = deepspeed.initialize(model=model, optimizer=models.adam(model), config=_config())
    with pytest.raises(ValueError, match=r"has no LongAct applied: call longact\.apply first"):
        connect(engine)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_another_optimizer_trains_the_masked_gradient(deepspeed: Any, stage: int) -> None:
    """DeepSpeed's Adam of its own, here torch's: its kernels would have to be compiled."""
    from deepspeed.utils import safe_get_full_grad

    model = models.tiny_model("llama")
    weight = model.get_parameter(f"{models.Q0}.weight")
    adam = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True, "weight_decay": 0.0}}
    batches = [{"input_ids": ids, "labels": ids} for ids in map(_ids, range(3))]
    names: dict[str, Any] = {}
    seen: list[Tensor] = []

    def loader() -> Iterator[dict[str, Tensor]]:
        yield from batches

    refreshed = longact.LongAct.refresh
    rows_used: list[list[int] | None] = []

    def spy(engine: Any) -> None:
        step = engine.step

        def stepped() -> None:
            grad = weight.grad if stage == 0 else safe_get_full_grad(weight)
            seen.append(grad.detach().float().clone())
            step()

        engine.step = stepped

    class Spied:
        def __getattr__(self, name: str) -> Any:
            return getattr(deepspeed, name)

        def initialize(self, **kwargs: Any) -> Any:
            result = deepspeed.initialize(**kwargs)
            spy(result[0])
            return result

    config = _config(optimizer=adam, zero_optimization={"stage": stage})
    with pytest.MonkeyPatch.context() as patch:

        def refresh(handle: longact.LongAct) -> None:
            rows_used.append(models.rows_of(handle)[models.Q0])
            refreshed(handle)

        patch.setattr(longact.LongAct, "refresh", refresh)
        names = run_snippet(
            "deepspeed-zero", deepspeed=Spied(), model=model, config=config, loader=loader()
        )
    assert len(seen) == len(rows_used) == 3
    assert len(models.changed_rows(torch.zeros_like(seen[0]), seen[0])) == 64  # the first: all
    for grad, rows in zip(seen[1:], rows_used[1:], strict=True):
        assert rows is not None
        assert len(rows) == 19
        assert models.changed_rows(torch.zeros_like(grad), grad) == rows
    assert models.rows_of(names["handle"])[models.Q0] is not None


def _ids(seed: int) -> Tensor:
    return models.token_ids(seed=seed)


# --- OpenRLHF ------------------------------------------------------------------------------------


@pytest.fixture
def _flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenRLHF imports it for ring attention, which is off here."""
    for name, members in {
        "flash_attn": (),
        "flash_attn.bert_padding": ("index_first_axis", "pad_input", "rearrange", "unpad_input"),
        "flash_attn.utils": (),
        "flash_attn.utils.distributed": ("all_gather",),
    }.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        for member in members:
            setattr(module, member, None)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("_flash_attn")
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_openrlhfs_strategy_trains_the_masked_gradient(deepspeed: Any, stage: int) -> None:
    pytest.importorskip("openrlhf", reason="needs openrlhf 0.11")
    pytest.importorskip("torchdata", reason="OpenRLHF needs torchdata")
    from deepspeed.utils import safe_get_full_grad

    names = run_snippet("openrlhf")
    args = types.SimpleNamespace(
        ds=types.SimpleNamespace(param_dtype="bf16", zero_stage=stage),
        train=types.SimpleNamespace(dynamic_batch_enable=False),
        local_rank=-1,
    )

    class Strategy(names["LongActStrategy"]):  # type: ignore[misc]
        def get_ds_train_config(self, *args: Any, **kwargs: Any) -> Any:
            config = super().get_ds_train_config(*args, **kwargs)
            # torch's in place of DeepSpeed's, whose kernel would have to be compiled
            config["optimizer"]["params"]["torch_adam"] = True
            return config

    strategy = Strategy(zero_stage=stage, args=args, micro_train_batch_size=2, train_batch_size=4)
    strategy.world_size = 1
    model = models.tiny_model("llama").bfloat16()
    weight = model.get_parameter(f"{models.Q0}.weight")
    adam = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
    cfg = {"optim": "adam", "adam": adam, "lr_scheduler": "constant", "scheduler_steps": 9}
    critic = models.tiny_model("llama", seed=1).bfloat16()
    (actor, optimizer, scheduler), _ = strategy.prepare((names["Actor"](model), cfg), (critic, cfg))
    assert not any(isinstance(m, longact.nn.SalientLinear) for m in critic.modules())
    assert list(strategy.handle.projections) == models.QK
    for micro_batch in range(4):  # two to a step
        rows = models.rows_of(strategy.handle)[models.Q0]
        assert (rows is None) == (micro_batch < 2)
        ids = models.token_ids(seed=micro_batch)
        strategy.backward(actor.model(input_ids=ids, labels=ids).loss, actor, optimizer)
        if micro_batch == 3:
            grad = weight.grad if weight.grad is not None else safe_get_full_grad(weight)
            changed = models.changed_rows(torch.zeros(64, 64), grad.float())
            assert changed == rows
        strategy.optimizer_step(optimizer, actor, scheduler)


# --- accelerate ----------------------------------------------------------------------------------


def _accelerated(tmp: Path, seeds: range, resume: bool) -> tuple[Any, Any, longact.LongAct, Any]:
    """Trains on those seeds, saves, and trains on; or resumes from what was saved."""
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = models.tiny_model("llama")
    batches = [{"input_ids": ids, "labels": ids} for ids in map(_ids, seeds)]
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    empty = torch.utils.data.DataLoader([], batch_size=None)
    names = run_snippet("accelerate", accelerator=accelerator, model=model, loader=empty)
    if resume:
        accelerator.load_state(str(tmp))
    names = {**names, "loader": accelerator.prepare(loader)}
    _loop(names)
    return model, names["optimizer"].optimizer, names["handle"], accelerator


def _loop(names: dict[str, Any]) -> None:
    """The snippet's loop alone."""
    _, loop, rest = snippet("accelerate").partition("for batch")
    assert loop
    exec(compile(loop + rest, "loop", "exec"), names)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_accelerates_loop_is_the_plain_one_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    *_, accelerator = _accelerated(tmp_path, range(4), resume=False)
    accelerator.save_state(str(tmp_path))
    model, optimizer, handle, _ = _accelerated(tmp_path, range(8), resume=False)
    resumed, other, other_handle, _ = _accelerated(tmp_path, range(4, 8), resume=True)
    models.assert_same_params(resumed, model)
    assert models.rows_of(other_handle) == models.rows_of(handle)
    for mine, wanted in zip(
        other.state_dict()["state"].values(), optimizer.state_dict()["state"].values(), strict=True
    ):
        assert mine.keys() == wanted.keys()
        for key in wanted:
            assert torch.equal(mine[key], wanted[key]), key

    plain = models.tiny_model("llama")
    plain_handle = longact.apply(plain, 0.3)
    adam = longact.FusedMaskedAdam(plain.parameters(), lr=1e-2)
    for seed in range(8):
        models.forward_backward(plain, models.token_ids(seed=seed), scale=0.5)
        if seed % 2:
            adam.step()
            adam.zero_grad()
    assert models.rows_of(plain_handle) == models.rows_of(handle)
    for name, value in models.params_of(model).items():
        torch.testing.assert_close(value, plain.get_parameter(name), rtol=1e-4, atol=1e-5)


def _ddp_rank(rank: int, tmp: str) -> None:
    import accelerate

    join(rank, 2, tmp)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # asked for, and not used
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = models.tiny_model("llama")
    lengths = (9, 12, 5, 7) if rank else (4, 8, 12, 6)
    sequences = [models.token_ids(1, n, seed=10 * rank + n) for n in lengths]
    batches = [{"input_ids": ids, "labels": ids} for ids in sequences]
    names = run_snippet("accelerate", accelerator=accelerator, model=model, loader=batches)
    assert isinstance(names["model"], torch.nn.parallel.DistributedDataParallel)
    torch.save((models.rows_of(names["handle"]), models.params_of(model)), f"{tmp}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_accelerates_ddp_ranks_select_the_same_rows(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="needs accelerate")
    start_ranks(2, _ddp_rank, str(tmp_path))
    (rows, params), (other_rows, other_params) = (
        torch.load(tmp_path / f"{rank}.pt") for rank in range(2)
    )
    assert rows == other_rows
    start = models.params_of(models.tiny_model("llama"))
    for name, value in params.items():
        assert torch.equal(value, other_params[name]), name
        if name.removesuffix(".weight") in models.QK:
            count = len(models.changed_rows(start[name], value))
            assert 0 < count < value.shape[0], name
