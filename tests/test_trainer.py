"""`apply_to_trainer` in real trainers: transformers.Trainer, TRL's SFTTrainer and GRPOTrainer."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from helpers import assert_same_tree, code_after, snippet
from models import QK, changed_rows, params_of, rows_of, tiny_model
from torch import Tensor, nn

pytest.importorskip("trl", reason="needs the rl extra")
import trl
from trainers import (
    SETTINGS,
    make_trainer,
    padded,
    parity,
    prompts,
    state_of,
    texts,
    tiny_tokenizer,
)
from transformers import TrainerCallback

import longact
from longact.integrations.transformers import LongActCallback, apply_to_trainer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

KINDS = ["trainer", "sft", "grpo"]


class Recorder(TrainerCallback):
    """What a reporter (wandb, tensorboard) would be given, and the rows of each step."""

    def __init__(self, model: nn.Module | None = None) -> None:
        self.logs: list[dict[str, float]] = []
        self.before: list[dict[str, Tensor]] = []
        self.model = model

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.model is not None:
            self.before.append(params_of(self.model))


def counted_tokens(handle: longact.LongAct) -> int:
    (tokens,) = {int(p.selection.tokens) for p in handle.projections.values()}
    return tokens


class Forwards:
    """Tokens and rows of the policy's forwards, as a step goes on; reads, changes nothing."""

    def __init__(self, trainer: Any, handle: longact.LongAct) -> None:
        self.training: list[list[int]] = [[]]  # by step: tokens that each should count
        self.counted: list[int] = []  # by step: what was counted as the optimizer began
        self.rows: list[list[Any]] = [[]]  # by step: the selection in each micro-batch
        self.others = 0  # forwards that must not count
        self.tokens_before_step: list[int] = []
        base = trainer.model.base_model
        base.register_forward_pre_hook(self._forward, with_kwargs=True)
        self.handle = handle
        trainer.add_callback(_StepHooks(self))

    def _forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not (torch.is_grad_enabled() and module.training):
            self.others += 1
            return
        mask = kwargs.get("attention_mask")
        ids = args[0] if args else kwargs["input_ids"]
        self.training[-1].append(ids.numel() if mask is None else int((mask != 0).sum()))
        self.rows[-1].append(rows_of(self.handle))


class _StepHooks(TrainerCallback):
    def __init__(self, forwards: Forwards) -> None:
        self.forwards = forwards

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.forwards.counted.append(counted_tokens(self.forwards.handle))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.forwards.training.append([])
        self.forwards.rows.append([])


# What it trains with


@pytest.mark.parametrize("kind", KINDS)
def test_the_trainer_builds_our_optimizer_with_its_own_arguments(kind: str, tmp_path: Path) -> None:
    trainer = make_trainer(
        kind, tmp_path, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-5, max_steps=1
    )
    apply_to_trainer(trainer, optimizer={"state": "compact"})
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is longact.FusedMaskedAdam
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]  # norms in the second
    for group in optimizer.param_groups:
        assert group["initial_lr"] == 1e-2
        assert group["betas"] == (0.8, 0.9)
        assert group["eps"] == 1e-5
    q = trainer.model.model.layers[0].self_attn.q_proj
    assert optimizer.state[q.weight]["exp_avg"].shape == (19, 64)  # compact


@pytest.mark.parametrize("kind", KINDS)
def test_only_selected_rows_change(kind: str, tmp_path: Path) -> None:
    model = tiny_model()
    recorder = Recorder(model)
    trainer = make_trainer(kind, tmp_path, model=model, callbacks=[recorder])
    handle = apply_to_trainer(trainer, keep_ratio=0.25)
    trainer.train()
    snapshots = [*recorder.before, params_of(model)]
    for before, after in itertools.pairwise(snapshots):
        for name, count in zip(QK, [16, 8, 16, 8], strict=True):
            changed = changed_rows(before[f"{name}.weight"], after[f"{name}.weight"])
            assert len(changed) == count, name
        dense = "model.layers.0.self_attn.v_proj.weight"
        assert len(changed_rows(before[dense], after[dense])) == 32
    # The selection moved on, so other rows changed later.
    q = f"{QK[0]}.weight"
    assert len(changed_rows(snapshots[0][q], snapshots[-1][q])) > 16
    assert set(handle.projections) == set(QK)


def test_a_trainer_equals_the_loop_written_by_hand(tmp_path: Path) -> None:
    data = padded(16)
    settings = {"train_sampling_strategy": "sequential", "max_grad_norm": 0.0, "max_steps": 4}
    model = tiny_model()
    trainer = make_trainer(
        "trainer", tmp_path, model=model, data=data, lr_scheduler_type="constant", **settings
    )
    handle = apply_to_trainer(trainer)
    trainer.train()

    by_hand = tiny_model()
    expected = longact.apply(by_hand)
    decays = trainer.get_decay_parameter_names(by_hand)
    named = list(by_hand.named_parameters())
    optimizer = longact.FusedMaskedAdam(
        [
            {"params": [p for n, p in named if n in decays], "weight_decay": 0.1},
            {"params": [p for n, p in named if n not in decays], "weight_decay": 0.0},
        ],
        lr=1e-2,
    )
    for first in range(0, 16, 4):
        batch = {k: torch.tensor(data[k][first : first + 4]) for k in data.column_names}
        by_hand(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same_tree(params_of(model), params_of(by_hand))
    assert rows_of(handle) == rows_of(expected)


# What counts


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_grpo_counts_the_training_forwards_only(tmp_path: Path, checkpointing: bool) -> None:
    """Not generation, old or reference log-probabilities, evaluation; one selection a step, though
    generated batches are used twice (num_iterations) and a step has two micro-batches."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "base")
    model.name_or_path = model.config._name_or_path = str(tmp_path / "base")
    trainer = make_trainer(
        "grpo",
        tmp_path,
        model=model,
        beta=0.1,
        num_iterations=2,
        steps_per_generation=4,
        gradient_accumulation_steps=2,
        max_steps=8,
        eval_dataset=prompts(4, seed=5),
        eval_strategy="steps",
        eval_steps=3,
        per_device_eval_batch_size=4,
        gradient_checkpointing=checkpointing,
    )
    handle = apply_to_trainer(trainer)
    forwards = Forwards(trainer, handle)
    reference_before = params_of(trainer.ref_model)
    trainer.train()

    assert forwards.others > 100  # generation, old log-probabilities, evaluation
    steps = forwards.training[:-1]
    assert [len(step) for step in steps] == [2] * 8
    assert forwards.counted == [sum(step) for step in steps]
    for step in forwards.rows[:-1]:
        assert step[0] == step[1]
    assert forwards.rows[0][0][QK[0]] is None
    assert len({str(step[0]) for step in forwards.rows[1:-1]}) == 7  # it moves on at each step
    # The reference model is a plain one, and stays as it was.
    assert not any(isinstance(m, longact.nn.SalientLinear) for m in trainer.ref_model.modules())
    assert_same_tree(params_of(trainer.ref_model), reference_before)


def test_a_truncated_completion_that_is_masked_does_not_count(tmp_path: Path) -> None:
    trainer = make_trainer("grpo", tmp_path, mask_truncated_completions=True, max_steps=3)
    forwards = Forwards(trainer, apply_to_trainer(trainer))
    trainer.train()
    plain = make_trainer("grpo", tmp_path, max_steps=3)
    unmasked = Forwards(plain, apply_to_trainer(plain))
    plain.train()
    assert forwards.counted == [sum(step) for step in forwards.training[:-1]]
    assert forwards.counted[0] < unmasked.counted[0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_does_not_count(side: str, tmp_path: Path) -> None:
    data = padded(16, side=side)
    settings = {"train_sampling_strategy": "sequential", "max_steps": 4}
    trainer = make_trainer("trainer", tmp_path, data=data, **settings)
    forwards = Forwards(trainer, apply_to_trainer(trainer))
    trainer.train()
    masks = data["attention_mask"]
    assert forwards.counted == [
        sum(sum(m) for m in masks[first : first + 4]) for first in range(0, 16, 4)
    ]


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
@pytest.mark.filterwarnings("ignore:.*flash.*", "ignore:.*Flash.*")
def test_packed_sequences_count_every_token(strategy: str, tmp_path: Path) -> None:
    trainer = make_trainer(
        "sft", tmp_path, packing=True, packing_strategy=strategy, max_length=24, max_steps=3
    )
    forwards = Forwards(trainer, apply_to_trainer(trainer))
    trainer.train()
    assert forwards.counted == [sum(step) for step in forwards.training[:-1]]
    assert min(forwards.counted) > 4 * 12


@pytest.mark.parametrize("loss_type", ["nll", "chunked_nll", "dft"])
def test_every_sft_loss_counts_alike(loss_type: str, tmp_path: Path) -> None:
    data = texts(16)
    trainer = make_trainer("sft", tmp_path, data=data, loss_type=loss_type, max_steps=2)
    forwards = Forwards(trainer, apply_to_trainer(trainer))
    trainer.train()
    assert forwards.counted == [sum(step) for step in forwards.training[:-1]]
    assert all(forwards.counted)


# Resuming


def train_twice(
    kind: str,
    folder: Path,
    *,
    stop: int = 3,
    options: dict[str, Any] | None = None,
    foreign: bool = False,
    **settings: Any,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """State after an uninterrupted run, and after one resumed at step `stop` in new objects."""
    states = []
    for name, checkpoint in (("whole", None), ("resumed", f"{folder}/whole/checkpoint-{stop}")):
        model = tiny_model(seed=0 if checkpoint is None else 1)
        optimizers: Any = (None, None)
        if foreign:
            optimizers = (torch.optim.AdamW(model.parameters(), lr=1e-2), None)
        trainer = make_trainer(
            kind,
            folder / name,
            model=model,
            optimizers=optimizers,
            save_strategy="steps",
            save_steps=stop,
            **settings,
        )
        handle = apply_to_trainer(trainer, **(options or {}))
        trainer.train(resume_from_checkpoint=checkpoint)
        states.append(state_of(trainer, handle))
    return states[0], states[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_equals_an_uninterrupted_one(kind: str, tmp_path: Path) -> None:
    whole, resumed = train_twice(kind, tmp_path)
    assert whole["optimizer"]["state"]
    assert_same_tree(whole, resumed)


@pytest.mark.parametrize(
    "options",
    [
        {"refresh_every": 2},
        {"refresh_every": 4, "metric": "max_abs"},
        {"refresh_every": 0},
        {"refresh_every": "forward", "metric": "rms"},
        {"scope": "model", "refresh_every": 2},
        {"optimizer": {"state": "compact"}},
        {"optimizer": {"inactive": "zero_grad"}},
    ],
    ids=str,
)
def test_resuming_with_other_options(options: dict[str, Any], tmp_path: Path) -> None:
    whole, resumed = train_twice("trainer", tmp_path, options=options)
    assert_same_tree(whole, resumed)


def test_resuming_between_refreshes_needs_the_counts(tmp_path: Path) -> None:
    """They are what the next selection is made from: shown by leaving them out."""
    whole, _ = train_twice("trainer", tmp_path, options={"refresh_every": 2})
    path = tmp_path / "whole" / "checkpoint-3" / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"]["LongActCallback"]
    path.write_text(json.dumps(state))
    trainer = make_trainer("trainer", tmp_path / "other", model=tiny_model(seed=1))
    handle = apply_to_trainer(trainer, refresh_every=2)
    with pytest.warns(longact.LongActWarning, match="saved without LongAct"):
        trainer.train(resume_from_checkpoint=str(path.parent))
    with pytest.raises(AssertionError):
        assert_same_tree(whole, state_of(trainer, handle))


@pytest.mark.filterwarnings("ignore::longact.LongActWarning")
@pytest.mark.parametrize("refresh_every", [1, 2, "forward"])
def test_resuming_with_an_optimizer_of_another_kind(refresh_every: Any, tmp_path: Path) -> None:
    whole, resumed = train_twice(
        "grpo", tmp_path, foreign=True, options={"refresh_every": refresh_every}
    )
    assert_same_tree(whole, resumed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_ratio": 0.5}, "keep_ratio: 0.3 in the checkpoint, 0.5 in this run"),
        ({"refresh_every": 2}, "refresh_every: 1 in the checkpoint, 2 in this run"),
        ({"targets": "q_proj"}, "targets: .*k_proj.* in the checkpoint, .*q_proj"),
    ],
    ids=["keep_ratio", "refresh_every", "targets"],
)
def test_resuming_with_different_arguments_is_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    trainer = make_trainer("trainer", tmp_path, save_strategy="steps", save_steps=3)
    apply_to_trainer(trainer)
    trainer.train()
    other = make_trainer("trainer", tmp_path)
    apply_to_trainer(other, **options)
    with pytest.raises(ValueError, match=message):
        other.train(resume_from_checkpoint=True)


# Logs


@pytest.mark.parametrize("kind", KINDS)
def test_reporters_and_the_history_get_the_metrics(kind: str, tmp_path: Path) -> None:
    recorder = Recorder()  # added before LongAct, as report_to's callbacks are
    trainer = make_trainer(kind, tmp_path, callbacks=[recorder], max_steps=4, logging_steps=2)
    apply_to_trainer(trainer, log_layers=True)
    trainer.train()
    for logs in (recorder.logs, trainer.state.log_history):
        training = [log for log in logs if "loss" in log]
        assert len(training) == 2
        for log in training:
            assert log["longact/q_proj/rows"] == 19
            assert log["longact/k_proj/rows"] == 10
            assert log[f"longact/rows/{QK[0]}"] == 19
            assert 0.3 < log["longact/q_proj/activation_share"] < 1
            assert 0 <= log["longact/k_proj/overlap"] <= 1
            assert 0 < log["longact/grad_norm"] < float(log["grad_norm"])
        assert not any(k.startswith("longact") for log in logs if "loss" not in log for k in log)


# Optimizers of another kind


def test_masks_act_through_the_gradient_of_another_optimizer(tmp_path: Path) -> None:
    model = tiny_model()
    recorder = Recorder(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    trainer = make_trainer(
        "trainer", tmp_path, model=model, optimizers=(optimizer, None), callbacks=[recorder]
    )
    handle = apply_to_trainer(trainer)
    with pytest.warns(longact.LongActWarning, match=r"is AdamW, not FusedMaskedAdam.*optim="):
        trainer.train()
    assert trainer.optimizer.optimizer is optimizer
    q = f"{QK[0]}.weight"
    first, second = recorder.before[:2]
    assert len(changed_rows(first[q], second[q])) == 19  # also the first step is masked
    assert all(rows is not None for rows in handle.rows.values())
    assert optimizer.state[model.get_parameter(q)]["exp_avg"].ne(0).any(1).sum() > 19


def test_arguments_that_ask_for_another_optimizer_are_followed(tmp_path: Path) -> None:
    trainer = make_trainer("trainer", tmp_path, optim="adafactor", max_steps=2)
    apply_to_trainer(trainer)
    with pytest.warns(longact.LongActWarning, match="is Adafactor"):
        trainer.train()


def test_our_optimizer_given_to_the_trainer_is_kept(tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = longact.FusedMaskedAdam(model.parameters(), lr=1e-3)
    trainer = make_trainer("grpo", tmp_path, model=model, optimizers=(optimizer, None), max_steps=2)
    apply_to_trainer(trainer)
    with warnings.catch_warnings():
        warnings.simplefilter("error", longact.LongActWarning)
        trainer.train()
    assert trainer.optimizer.optimizer is optimizer


# Bad input: refused before anything is changed


def test_applying_twice_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer("trainer", tmp_path, max_steps=1)
    handle = apply_to_trainer(trainer)
    with pytest.raises(ValueError, match="has LongAct applied already: call remove"):
        apply_to_trainer(trainer)
    handle.remove()
    apply_to_trainer(trainer, keep_ratio=0.5)
    trainer.train()
    callbacks = trainer.callback_handler.callbacks
    assert sum(isinstance(c, LongActCallback) for c in callbacks) == 1


def test_a_model_that_has_it_already_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    longact.apply(model)
    trainer = make_trainer("trainer", tmp_path, model=model)
    with pytest.raises(ValueError, match="SalientLinear already"):
        apply_to_trainer(trainer)
    assert trainer.optimizer_cls_and_kwargs is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_ratio": 0.0}, "keep_ratio=0.0"),
        ({"targets": "query"}, "nothing in LlamaForCausalLM matches 'query'"),
        ({"optimizer": {"state": "sparse"}}, "state='sparse'"),
    ],
    ids=["keep_ratio", "targets", "optimizer"],
)
def test_wrong_arguments_change_nothing(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    trainer = make_trainer("trainer", tmp_path)
    modules = dict(trainer.model.named_modules())
    with pytest.raises(ValueError, match=message):
        apply_to_trainer(trainer, **options)
    assert dict(trainer.model.named_modules()) == modules
    assert trainer.optimizer_cls_and_kwargs is None
    callbacks = trainer.callback_handler.callbacks
    assert not any(isinstance(c, LongActCallback) for c in callbacks)


def test_options_for_an_optimizer_that_is_not_ours_are_refused(tmp_path: Path) -> None:
    options = {"state": "compact"}
    trainer = make_trainer("trainer", tmp_path, optim="adafactor")
    with pytest.raises(ValueError, match=r"ask for Adafactor .*optim='adamw_torch'"):
        apply_to_trainer(trainer, optimizer=options)
    model = tiny_model()
    given = torch.optim.AdamW(model.parameters())
    trainer = make_trainer("trainer", tmp_path, model=model, optimizers=(given, None))
    with pytest.raises(ValueError, match="was given a AdamW already"):
        apply_to_trainer(trainer, optimizer=options)


def test_callbacks_made_anew_are_refused(tmp_path: Path) -> None:
    trainer = make_trainer("trainer", tmp_path, restore_callback_states_from_checkpoint=True)
    with pytest.raises(ValueError, match="restore_callback_states_from_checkpoint=True"):
        apply_to_trainer(trainer)


def test_freezing_others_is_refused_where_parameters_go_in_pairs(tmp_path: Path) -> None:
    trainer = make_trainer("grpo", tmp_path)
    trainer.args.sync_ref_model = True
    with pytest.raises(ValueError, match="sync_ref_model=False"):
        apply_to_trainer(trainer, others="freeze")
    apply_to_trainer(trainer)


def test_freezing_others_is_refused_with_an_optimizer_from_before(tmp_path: Path) -> None:
    model = tiny_model()
    own = torch.optim.AdamW(model.parameters())
    trainer = make_trainer("trainer", tmp_path, model=model, optimizers=(own, None))
    with pytest.raises(ValueError, match=r"others='freeze'.*AdamW.*leave `optimizers` out"):
        apply_to_trainer(trainer, others="freeze")
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"torch_compile": True}, "torch_compile=False"), ({"optim": "sgd"}, "optim='adamw_torch'")],
)
def test_freezing_others_is_refused_where_rows_cannot_change(
    arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    trainer = make_trainer("trainer", tmp_path, **arguments)
    with pytest.raises(ValueError, match=f"others='freeze' with.*{message}"):
        apply_to_trainer(trainer, others="freeze")
    assert all(p.requires_grad for p in trainer.model.parameters())


def test_vllm_gets_the_weights_and_nothing_else(tmp_path: Path) -> None:
    """The names and values that TRL's own code for vLLM, which is not here, sends to it."""
    from trl.generation.vllm_generation import VLLMGeneration

    trainer = make_trainer("grpo", tmp_path, max_steps=1)
    names = [name for name, _ in trainer.model.named_parameters()]
    generation = trainer.vllm_generation = VLLMGeneration.__new__(VLLMGeneration)
    generation.model = trainer.model
    generation._dist = SimpleNamespace(
        is_fsdp=False, gather_params=lambda _: contextlib.nullcontext()
    )
    apply_to_trainer(trainer, others="freeze")
    trainer.train()
    sent = dict(generation._iter_named_params())
    assert list(sent) == names
    assert_same_tree(sent, {name: trainer.model.state_dict()[name] for name in names})


def test_what_is_not_a_trainer_is_refused() -> None:
    with pytest.raises(TypeError, match=r"is a LlamaForCausalLM.*longact\.apply"):
        apply_to_trainer(tiny_model())


def test_a_model_init_is_refused(tmp_path: Path) -> None:
    """With it train() makes a model that nothing was applied to."""
    trainer = make_trainer("trainer", tmp_path)
    trainer.model_init = tiny_model
    with pytest.raises(ValueError, match=r"model_init.*pass model="):
        apply_to_trainer(trainer)


def test_removing_ends_the_logs_and_lets_a_run_go_on(tmp_path: Path) -> None:
    trainer = make_trainer("trainer", tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    other = make_trainer("trainer", tmp_path, max_steps=8, save_strategy="steps", save_steps=2)
    apply_to_trainer(other).remove()
    other.train(resume_from_checkpoint=True)
    assert (tmp_path / "checkpoint-8").exists()
    third = make_trainer("trainer", tmp_path, max_steps=4)
    handle = apply_to_trainer(third)

    class Remove(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                handle.remove()

    third.add_callback(Remove())
    third.train()
    has = ["longact/q_proj/rows" in log for log in third.state.log_history if "loss" in log]
    assert has == [True, True, False, False]


def test_deepspeed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer("trainer", tmp_path)
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    with pytest.raises(ValueError, match=r"under DeepSpeed.*no rows: use FSDP2"):
        apply_to_trainer(trainer)


@pytest.mark.parametrize("version", [1, 2])
def test_fsdp1_is_refused(version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer("trainer", tmp_path)
    monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
    plugin = SimpleNamespace(fsdp_version=version)
    state = SimpleNamespace(fsdp_plugin=plugin)
    monkeypatch.setattr(trainer, "accelerator", SimpleNamespace(state=state))
    if version == 2:
        assert apply_to_trainer(trainer).is_applied
        return
    with pytest.raises(ValueError, match=r"version 1: FSDP1 flattens.*\{'version': 2\}"):
        apply_to_trainer(trainer)


def test_a_lora_policy_is_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    trainer = make_trainer("trainer", tmp_path)
    trainer.model = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match="adapter"):
        apply_to_trainer(trainer, targets="q_proj")


def test_it_works_for_other_trl_trainers(tmp_path: Path) -> None:
    model = tiny_model()
    from datasets import Dataset

    data = Dataset.from_dict(
        {"prompt": ["w3 w4"] * 8, "chosen": ["w5 w6"] * 8, "rejected": ["w7 w8 w9"] * 8}
    )
    args = trl.DPOConfig(**{**SETTINGS, "output_dir": str(tmp_path), "max_steps": 2})
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=tiny_model(),
        args=args,
        train_dataset=data,
        processing_class=tiny_tokenizer(),
    )
    forwards = Forwards(trainer, apply_to_trainer(trainer))
    trainer.train()
    assert forwards.counted == [sum(step) for step in forwards.training[:-1]]
    assert all(forwards.counted)


LIGER = """
import sys
from pathlib import Path
from test_trainer import Forwards
from trainers import make_trainer
from longact.integrations.transformers import apply_to_trainer

off = dict.fromkeys(["rope", "rms_norm", "swiglu", "cross_entropy"], False)
config = {**off, "fused_linear_cross_entropy": True}
trainer = make_trainer(
    "trainer", Path(sys.argv[1]), use_liger_kernel=True, liger_kernel_config=config, max_steps=2
)
forwards = Forwards(trainer, apply_to_trainer(trainer))
trainer.train()
assert trainer.model.forward.__module__.startswith("liger_kernel"), trainer.model.forward
assert forwards.counted == [sum(step) for step in forwards.training[:-1]]
print(forwards.counted)
"""


@pytest.mark.slow
def test_liger_loss_counts_alike(tmp_path: Path) -> None:
    """Liger replaces the forward of the model with one that computes no logits; its kernels run in
    Triton's interpreter here."""
    pytest.importorskip("liger_kernel")
    done = subprocess.run(
        [sys.executable, "-c", LIGER, str(tmp_path)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    trainer = make_trainer("trainer", tmp_path, max_steps=2)
    forwards = Forwards(trainer, apply_to_trainer(trainer))
    trainer.train()
    assert done.stdout.splitlines()[-1] == str(forwards.counted)


# Documentation


def test_the_documented_lines_run(tmp_path: Path) -> None:
    code = snippet("trl")
    data = prompts(16)
    names: dict[str, Any] = {
        "GRPOTrainer": lambda **kwargs: trl.GRPOTrainer(
            **kwargs, processing_class=tiny_tokenizer()
        ),
        "apply_to_trainer": apply_to_trainer,
        "model": tiny_model(),
        "reward": parity,
        "data": data,
        "args": trl.GRPOConfig(
            **{**SETTINGS, "output_dir": str(tmp_path), "num_generations": 4, "max_steps": 1},
            max_completion_length=4,
        ),
    }
    exec(code, names)
    assert names["trainer"].state.log_history[0]["longact/q_proj/rows"] == 19
    readme = code_after("## Reinforcement learning", "README.md")
    added = [line[2:] for line in readme.splitlines() if line.startswith("+")]
    assert added[0] == "from longact.integrations.transformers import apply_to_trainer"
    assert added[1:] == ["apply_to_trainer(trainer, keep_ratio=0.3)"]
    assert added[1] in code


def test_the_readme_has_the_yaml_that_is_tested_with_verl() -> None:
    short = yaml.safe_load(code_after("in its YAML", "README.md"))
    tested = yaml.safe_load(snippet("verl"))
    del tested["actor_rollout_ref"]["actor"]["optim"]["override_optimizer_config"]
    assert short == tested
