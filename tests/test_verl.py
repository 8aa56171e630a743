"""verl's real optimizer builder, configuration and FSDP2 engine, on the CPU.

verl knows no CPU; its own extension point for platforms takes one here. Nothing else is replaced,
except the question whether TRL is installed: verl 0.9.1 does not start beside TRL 1.x.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from helpers import snippet
from ranks import join, start_ranks
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy

import longact

# ruff: noqa: E402  (what is skipped without verl, and what asks for the device)
for _name in ("verl", "ray", "tensordict", "hydra"):
    pytest.importorskip(_name, reason=f"needs verl 0.9.1 (no module {_name})")

from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from verl.plugin.platform import platform_manager
from verl.plugin.platform.platform_base import PlatformBase

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class _CPU:
    """Of torch.cuda what torch.cpu lacks and verl asks for."""

    get_rng_state = staticmethod(torch.get_rng_state)
    set_rng_state = staticmethod(torch.set_rng_state)
    memory_allocated = memory_reserved = staticmethod(lambda: 0)
    mem_get_info = staticmethod(lambda: (0, 0))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)


def _cpu_platform() -> PlatformBase:
    members: dict[str, Any] = {
        name: lambda *_, **__: None for name in PlatformBase.__abstractmethods__
    }
    members |= {
        "device_name": "cpu",
        "vendor_name": "nvidia",
        "device_module": _CPU(),
        "current_device": lambda self: torch.device("cpu"),
        "is_available": lambda self: True,
        "communication_backend_name": lambda self: "gloo",
    }
    platform: PlatformBase = type("CPU", (PlatformBase,), members)()
    return platform


# Before verl's modules are imported that ask for the device.
platform_manager.set_platform(_cpu_platform())

import verl.models.transformers.monkey_patch
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import (
    FSDPActorConfig,
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    HFModelConfig,
)
from verl.workers.config.optimizer import build_optimizer
from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead

from longact.integrations.verl import LongActActorConfig, LongActEngine

verl.models.transformers.monkey_patch.is_trl_available = lambda: False
os.environ["VERL_ENGINE_DEVICE"] = "cuda"  # the device that engines are registered for

LENGTHS = (7, 12, 5, 9)


# --- configuration -----------------------------------------------------------------------------


def _compose(*overrides: str, yaml: str | None = None) -> Any:
    """verl's own configuration with the overrides, and a YAML merged into it."""
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", list(overrides))
    if yaml is not None:
        OmegaConf.set_struct(config, False)
        config = OmegaConf.merge(config, OmegaConf.create(yaml))
    # What verl's own example scripts set.
    actor = config.actor_rollout_ref.actor
    actor.ppo_micro_batch_size_per_gpu, actor.rollout_n = 1, 1
    return config


def _from_docs(kind: str) -> Any:
    if kind == "yaml":
        return _compose(yaml=snippet("verl"))
    return _compose(*re.findall(r"\S+=\S+", snippet("verl-cli")))


def _as_verl_reads_the_reference(config: Any) -> Any:
    """The names of its batch sizes, as ActorRolloutRefWorker.init_model turns them."""
    OmegaConf.set_struct(config, False)
    for name in [name for name in config if name.startswith("log_prob_")]:
        del config[name]
    config.ppo_micro_batch_size_per_gpu = config.rollout_n = 1
    return config


@pytest.mark.parametrize("kind", ["yaml", "command line"])
def test_the_docs_make_verl_build_the_actor_with_our_engine_and_optimizer(kind: str) -> None:
    config = _from_docs(kind).actor_rollout_ref
    actor = omega_conf_to_dataclass(config.actor)
    assert type(actor) is LongActActorConfig
    assert actor.engine.longact == {"keep_ratio": 0.3}
    assert type(actor.engine.longact) is dict
    assert EngineRegistry.get_engine_cls("language_model", actor.engine.strategy) is LongActEngine
    # What verl itself asks about the strategy is as configured.
    assert actor.strategy == actor.fsdp_config.strategy == "fsdp2"
    # The reference model's stays verl's.
    ref = omega_conf_to_dataclass(_as_verl_reads_the_reference(config.ref))
    assert type(ref) is FSDPActorConfig
    assert ref.engine.strategy == "fsdp2"
    assert EngineRegistry.get_engine_cls("language_model", "fsdp2") is FSDPEngineWithLMHead
    optimizer = build_optimizer([torch.nn.Parameter(torch.ones(2, 2))], actor.optim)
    assert type(optimizer) is longact.FusedMaskedAdam


def test_the_builder_passes_verls_fields_and_its_overrides_on() -> None:
    yaml = (
        snippet("verl")
        + """\
        eps: 1.0e-6
        state: compact
      lr: 0.25
      betas: [0.5, 0.75]
      weight_decay: 0.125
"""
    )
    actor = omega_conf_to_dataclass(_compose(yaml=yaml).actor_rollout_ref.actor)
    weight = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = build_optimizer([weight], actor.optim)
    group = optimizer.param_groups[0]
    wanted = {"lr": 0.25, "betas": (0.5, 0.75), "weight_decay": 0.125, "eps": 1e-6}
    assert {key: group[key] for key in wanted} == wanted
    assert group["inactive"] == "freeze"
    longact.set_rows(weight, [1, 3])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert models.changed_rows(torch.ones(4, 3), weight.detach()) == [1, 3]
    assert optimizer.state[weight]["exp_avg"].shape == (2, 3)  # state: compact


def _actor(**changes: Any) -> LongActActorConfig:
    settings: dict[str, Any] = {
        "strategy": "fsdp2",
        "rollout_n": 1,
        "ppo_micro_batch_size_per_gpu": 1,
        "longact": {"keep_ratio": 0.5},
        "optim": FSDPOptimizerConfig(
            optimizer_impl="longact",
            optimizer="FusedMaskedAdam",
            lr=1e-2,
            weight_decay=0.1,
            total_training_steps=10,
        ),
        "fsdp_config": _engine_config(),
    }
    return LongActActorConfig(**{**settings, **changes})


def _engine_config(**changes: Any) -> FSDPEngineConfig:
    settings = {"use_torch_compile": False, "mixed_precision": {"param_dtype": "fp32"}}
    return FSDPEngineConfig(**{**settings, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "fsdp"}, r"strategy='fsdp': FSDP1 flattens .* Use strategy: fsdp2"),
        ({"strategy": "megatron"}, r"strategy='megatron': this engine is built on .* fsdp2"),
        ({"longact": {"keep_ration": 0.3}}, r"no option 'keep_ration': did you mean 'keep_ratio'"),
        ({"longact": {"model": "x"}}, r"no option 'model': "),
        ({"longact": {"keep_ratio": 30}}, r"keep_ratio=30: must lie in \(0, 1\]"),
        ({"longact": {"metric": "mean"}}, r"metric='mean': use 'mean_abs'"),
        ({"optim": FSDPOptimizerConfig()}, r"torch\.optim\.AdamW: LongAct selects its rows"),
    ],
)
def test_a_mistake_is_found_where_the_driver_reads_the_configuration(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _actor(**changes)


def test_quantization_aware_training_is_refused() -> None:
    config = _engine_config()
    config.qat.__dict__["enable"] = True
    with pytest.raises(ValueError, match=r"qat.enable=true: .* replaces the projections"):
        _actor(fsdp_config=config)


# --- the engine --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def _group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def _unpinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinned memory needs a GPU."""
    module = "verl.workers.engine.fsdp.transformer_impl.CPUOffloadPolicy"
    monkeypatch.setattr(module, lambda pin_memory: CPUOffloadPolicy(pin_memory=False))


def _save_model(path: Path) -> str:
    model = models.tiny_model("qwen2")
    model.config.architectures = ["Qwen2ForCausalLM"]
    model.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return _save_model(tmp_path_factory.mktemp("model"))


def _engine(model_path: str, *, lora_rank: int = 0, **changes: Any) -> Any:
    model = HFModelConfig(
        path=model_path,
        load_tokenizer=False,
        override_config={"attn_implementation": "sdpa"},
        enable_gradient_checkpointing=False,
        lora_rank=lora_rank,
    )
    actor = _actor(**changes)
    engine = EngineRegistry.new(
        "language_model",
        actor.engine.strategy,
        model_config=model,
        engine_config=actor.engine,
        optimizer_config=actor.optim,
        checkpoint_config=CheckpointConfig(),
    )
    engine.initialize()
    return engine


def _sequences(seed: int, lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    return [models.token_ids(1, n, seed=seed + i)[0] for i, n in enumerate(lengths)]


def _batch(sequences: list[Tensor], *, packed: bool = True, micro_batch: int = 2) -> Any:
    def nested(tensors: list[Tensor]) -> Tensor:
        return torch.nested.as_nested_tensor(tensors, layout=torch.jagged)

    return tu.get_tensordict(
        {
            "input_ids": nested(sequences),
            "position_ids": nested([torch.arange(len(s)) for s in sequences]),
            "loss_mask": nested([torch.ones(len(s)) for s in sequences]),
        },
        {
            "use_dynamic_bsz": False,
            "micro_batch_size_per_gpu": micro_batch,
            "temperature": 1.0,
            "use_remove_padding": packed,
        },
    )


def _loss(model_output: Any, data: Any, dp_group: Any = None) -> tuple[Tensor, dict[str, Any]]:
    loss = -model_output["log_probs"].values().mean()
    return loss, {"nll": [loss.item()]}


def _train(engine: Any, *seeds: int, **options: Any) -> dict[str, Any]:
    outputs: dict[str, Any] = {}
    for seed in seeds:
        with engine.train_mode():
            outputs = engine.train_batch(_batch(_sequences(seed), **options), _loss)
    return outputs


def _full(engine: Any) -> dict[str, Tensor]:
    return {n: p.full_tensor().detach().clone() for n, p in engine.module.named_parameters()}


def _counted(engine: Any) -> dict[str, tuple[int, Tensor]]:
    layers = engine.handle.projections.items()
    return {n: (int(p.selection.tokens), p.selection.magnitude.clone()) for n, p in layers}


@pytest.mark.usefixtures("_group")
def test_a_step_trains_selected_rows_only_and_reports_them(model_path: str) -> None:
    engine = _engine(model_path)
    assert list(engine.handle.projections) == models.QK
    assert engine.engine_config.strategy == "fsdp2"
    before = _full(engine)
    for seed in (0, 10):
        chosen = models.rows_of(engine.handle)
        outputs = _train(engine, seed)
        trained = chosen if seed else models.rows_of(engine.handle)
        after = _full(engine)
        for name in models.QK:
            assert len(trained[name] or ()) == before[f"{name}.weight"].shape[0] // 2
            for key in (f"{name}.weight", f"{name}.bias"):
                assert models.changed_rows(before[key], after[key]) == trained[name], key
        dense = "model.layers.0.mlp.up_proj.weight"
        assert len(models.changed_rows(before[dense], after[dense])) == after[dense].shape[0]
        before = after
    metrics = outputs["metrics"]
    assert metrics["longact/q_proj/rows"] == [32.0]
    assert metrics["longact/k_proj/rows"] == [16.0]
    assert 0.5 < metrics["longact/q_proj/activation_share"][0] < 1.0
    assert len(metrics["nll"]) == 2  # verl's own stay
    assert isinstance(metrics["grad_norm"], float)


@pytest.mark.usefixtures("_group")
def test_it_is_the_plain_loop_on_the_same_tokens(model_path: str) -> None:
    # The key's bias hardly matters to attention: Adam would blow up what rounding leaves of its
    # gradient, which another number of threads rounds otherwise.
    eps = 1e-4
    optim = dataclasses.replace(_actor().optim, override_optimizer_config={"eps": eps})
    engine = _engine(model_path, optim=optim)
    model = models.tiny_model("qwen2")
    handle = longact.apply(model, 0.5)
    optimizer = models.adam(model, eps=eps)
    for seed in (0, 10, 20):
        _train(engine, seed, micro_batch=1)
        for ids in _sequences(seed):
            logits = model(input_ids=ids[None]).logits[0].log_softmax(-1)
            (-logits.gather(1, ids.roll(-1)[:, None]).mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert models.rows_of(engine.handle) == models.rows_of(handle)
    for name, value in _full(engine).items():
        torch.testing.assert_close(value, model.get_parameter(name), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("_group")
def test_only_training_forwards_count_and_padding_never_does(model_path: str) -> None:
    total = sum(LENGTHS)
    engine = _engine(model_path, longact={"keep_ratio": 0.5, "refresh_every": 0})
    _train(engine, 0)  # selects, and counts afresh from then on
    expected: dict[str, tuple[int, Tensor]] | None = None
    for packed, pad in ((True, 0), (False, 0), (True, 32), (True, 0)):
        engine.pad_to_length, engine.pad_to_length_bucket = pad > 0, pad
        for layer in engine.handle.projections.values():
            layer.selection.magnitude.zero_()
            layer.selection.tokens.zero_()
        batch = _batch(_sequences(0), packed=packed)
        with engine.eval_mode():
            engine.infer_batch(batch, _loss)
        with engine.train_mode():  # as verl does where it keeps the mode
            engine.infer_batch(batch, _loss)
        assert {tokens for tokens, _ in _counted(engine).values()} == {0}
        with engine.train_mode():
            engine.forward_backward_batch(batch, _loss)
        counted = _counted(engine)
        assert {tokens for tokens, _ in counted.values()} == {total}, (packed, pad)
        expected = expected or counted
        for name, (_, magnitude) in counted.items():
            torch.testing.assert_close(magnitude, expected[name][1], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("_group", "_unpinned")
def test_a_model_that_is_only_run_is_left_alone(model_path: str) -> None:
    engine = _engine(model_path, fsdp_config=_engine_config(forward_only=True))
    assert engine.handle is None
    assert engine.optimizer is None
    assert not any(isinstance(m, longact.nn.SalientLinear) for m in engine.module.modules())
    with engine.eval_mode():
        engine.infer_batch(_batch(_sequences(0)), _loss)


@pytest.mark.usefixtures("_group")
def test_lora_is_refused(model_path: str) -> None:
    with pytest.raises(ValueError, match=r"lora_rank=4: LoRA trains its own weights"):
        _engine(model_path, lora_rank=4)


@pytest.mark.usefixtures("_group")
@pytest.mark.parametrize("refresh_every", [1, 3])
def test_a_resumed_run_is_the_uninterrupted_one(
    model_path: str, tmp_path: Path, refresh_every: int
) -> None:
    options = {"longact": {"keep_ratio": 0.3, "refresh_every": refresh_every}}
    engine = _engine(model_path, **options)
    _train(engine, 0, 10)
    engine.save_checkpoint(str(tmp_path), global_step=2)
    _train(engine, 20, 30)
    resumed = _engine(model_path, **options)
    resumed.load_checkpoint(str(tmp_path))
    _train(resumed, 20, 30)
    assert models.rows_of(resumed.handle) == models.rows_of(engine.handle)
    for name, value in _full(engine).items():
        assert torch.equal(_full(resumed)[name], value), name
    ours, theirs = (e.optimizer.state_dict()["state"] for e in (resumed, engine))
    for key, entry in theirs.items():
        for field, value in entry.items():
            mine, wanted = (t.full_tensor() if hasattr(t, "full_tensor") else t
                            for t in (ours[key][field], value))  # fmt: skip
            assert torch.equal(mine, wanted), (key, field)
    for name, (tokens, magnitude) in _counted(engine).items():
        assert _counted(resumed)[name][0] == tokens
        assert torch.equal(_counted(resumed)[name][1], magnitude)


@pytest.mark.usefixtures("_group")
def test_a_checkpoint_of_other_options_is_refused_and_one_without_them_said(
    model_path: str, tmp_path: Path
) -> None:
    engine = _engine(model_path)
    _train(engine, 0)
    engine.save_checkpoint(str(tmp_path))
    other = _engine(model_path, longact={"keep_ratio": 0.3, "targets": ["q_proj"]})
    before = _full(other)
    with pytest.raises(
        ValueError, match=r"keep_ratio: 0.5 in the checkpoint, 0.3 in this run; targets: "
    ):
        other.load_checkpoint(str(tmp_path))
    for name, value in _full(other).items():
        assert torch.equal(value, before[name])  # nothing was loaded
    (tmp_path / "longact_world_size_1_rank_0.pt").unlink()
    with pytest.warns(longact.LongActWarning, match="saved without LongAct"):
        other.load_checkpoint(str(tmp_path))


@pytest.mark.usefixtures("_group", "_unpinned")
@pytest.mark.parametrize(
    "options", [{"param_offload": True, "optimizer_offload": True}, {"offload_policy": True}]
)
def test_offloading_changes_nothing(model_path: str, options: dict[str, bool]) -> None:
    """verl moves parameters and states at each update, here from the CPU to the CPU."""
    plain = _engine(model_path)
    offloaded = _engine(model_path, fsdp_config=_engine_config(**options))
    for engine in (plain, offloaded):
        _train(engine, 0, 10, 20)
    assert models.rows_of(offloaded.handle) == models.rows_of(plain.handle)
    for name, value in _full(plain).items():
        assert torch.equal(_full(offloaded)[name], value), name


# --- two ranks ---------------------------------------------------------------------------------


def _rank(rank: int, tmp: str, world: int, worker: Callable[[Path, int], Any]) -> None:
    join(rank, world, tmp)
    torch.save(worker(Path(tmp), rank), f"{tmp}/rank{rank}.pt")
    dist.destroy_process_group()


def _train_on_a_rank(tmp: Path, rank: int) -> Any:
    options = {"longact": {"keep_ratio": 0.3, "refresh_every": 2}}
    engine = _engine(str(tmp / "model"), **options)
    _train(engine, 100 * rank)
    engine.save_checkpoint(str(tmp / "checkpoint"))
    tokens = {count for count, _ in _counted(engine).values()}
    outputs = _train(engine, 100 * rank + 10)
    rows, weights = models.rows_of(engine.handle), _full(engine)
    resumed = _engine(str(tmp / "model"), **options)
    resumed.load_checkpoint(str(tmp / "checkpoint"))
    _train(resumed, 100 * rank + 10)
    assert models.rows_of(resumed.handle) == rows
    assert all(torch.equal(_full(resumed)[name], weights[name]) for name in weights)
    # 33 tokens over two sequence-parallel ranks. (Their forward needs flash attention.)
    config = _engine_config(ulysses_sequence_parallel_size=2)
    parallel = _engine(str(tmp / "model"), fsdp_config=config)
    with parallel.train_mode():
        inputs, _ = parallel.prepare_model_inputs(_batch(_sequences(0)))
    assert inputs["attention_mask"] is None
    return rows, weights, tokens, outputs["metrics"], inputs["input_ids"], parallel._token_mask


@pytest.mark.slow
def test_two_ranks_select_the_same_rows_train_and_resume(tmp_path: Path) -> None:
    _save_model(tmp_path / "model")
    start_ranks(2, _rank, str(tmp_path), 2, _train_on_a_rank)
    saved = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    rows, weights, tokens, metrics, ids, mask = saved[0]
    other_rows, other_weights, _, other_metrics, other_ids, other_mask = saved[1]
    assert rows == other_rows
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    start = models.params_of(models.tiny_model("qwen2"))
    for name in models.QK:
        key = f"{name}.weight"
        assert 0 < len(models.changed_rows(start[key], weights[key])) < start[key].shape[0]
    assert tokens == {0}  # the first step chose its rows from them, of all ranks
    assert metrics["grad_norm"] == other_metrics["grad_norm"]
    assert len(list((tmp_path / "checkpoint").glob("longact_world_size_2_rank_*.pt"))) == 2
    assert torch.equal(torch.cat([ids, other_ids], 1)[0, :-1], torch.cat(_sequences(0)))
    assert torch.cat([mask, other_mask], 1).tolist() == [[True] * sum(LENGTHS) + [False]]
