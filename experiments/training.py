"""One run: a model trained further by one method as one arm says, and measured before and after."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

import longact.tasks
from experiments import arms, models, tasks
from experiments.measures import (
    Work,
    accuracy,
    concentration,
    look,
    moved,
    overlap,
    trained_weights,
)
from longact.inspection import KINDS, Inspection
from longact.integrations.trl import GRPOConfig, GRPOTrainer, NothingToLearnError
from longact.tasks import recall_reward

__all__ = ["Task", "Training", "look_at", "select", "train"]


@dataclass(frozen=True)
class Task:
    """`"recall"` (experiments.tasks, in words) or a name of longact.tasks (in tokens)."""

    length: int
    name: str = "recall"
    options: Mapping[str, Any] = field(default_factory=dict)

    def dataset(self, tokenizer: Any, examples: int, split: tasks.Split, seed: int) -> Dataset:
        if self.name == "recall":
            return tasks.make_dataset(
                self.length, **self.options, examples=examples, split=split, seed=seed
            )
        # It has two splits: validation has the words of training, in other examples.
        return longact.tasks.make_dataset(
            self.name,
            tokenizer,
            self.length,
            examples,
            split="test" if split == "test" else "train",
            seed=seed + 1_000_000 if split == "validation" else seed,
            conversational=False,
            **self.options,
        )


@dataclass(frozen=True)
class Training:
    """All that a run depends on, but the model that it starts from."""

    method: Literal["sft", "grpo", "dapo"]
    arm: str
    learning_rate: float
    seed: int
    steps: int
    task: Task
    evaluations: Mapping[str, Task]
    split: Literal["validation", "test"] = "test"  # of the evaluations
    examples: int = 128  # of an evaluation; 16 of them, or all, are looked at for its channels
    prompts: int = 4  # a step
    generations: int = 8  # of a prompt; SFT has prompts * generations examples a step
    micro_batch: int = 32  # sequences in a backward pass
    completion: int = 1  # words or tokens, at most
    bf16: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)  # of TRL's configuration


#: TRL's options of each method, those of longact's recipes; SFT has TRL's own.
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "sft": {},
    "grpo": {"loss_type": "grpo", "beta": 0.04, "epsilon": 0.2},
    "dapo": {
        "loss_type": "dapo",
        "beta": 0.0,
        "epsilon": 0.2,
        "epsilon_high": 0.28,
        "dynamic_sampling": True,
    },
}


def read(spec: Mapping[str, Any]) -> Training:
    """From plain values."""
    evaluations = {name: Task(**task) for name, task in spec["evaluations"].items()}
    return Training(**{**spec, "task": Task(**spec["task"]), "evaluations": evaluations})


def load(path: str, device: str) -> tuple[PreTrainedModel, Any]:
    """Model, fp32, and tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device)
    return model, AutoTokenizer.from_pretrained(path, padding_side="left")


def train(options: Mapping[str, Any], path: str, device: str) -> dict[str, Any]:
    """Trains and measures; returns the metrics of a record of the store.

    Raises:
        RuntimeError: the arm's machinery is broken: it did not train what it says.
    """
    spec = read(options)
    set_seed(spec.seed)
    model, tokenizer = load(path, device)
    looks = min(16, spec.examples)
    prompts = spec.task.dataset(tokenizer, looks, "validation", seed=1)["prompt"]
    before = look(model, tokenizer, prompts)
    known = (
        path,
        device,
        repr((spec.evaluations, spec.split, spec.examples, spec.completion, spec.bf16)),
    )
    if known not in _scores_before:
        _scores_before[known] = _scores(spec, model, tokenizer)
    result: dict[str, Any] = {
        "before": {"accuracy": _scores_before[known], "concentration": concentration(before)}
    }
    weights = {name: param.detach().clone() for name, param in model.named_parameters()}
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(spec, model, tokenizer, folder, device)
        inputs = tokenizer(prompts[:4], return_tensors="pt", padding=True).to(device)
        handle = arms.start(trainer, spec.arm, inputs, spec.seed)
        trainer.remove_callback(PrinterCallback)
        # Dynamic sampling ends a run that has nothing left to learn.
        with Work(model) as work, contextlib.suppress(NothingToLearnError):
            trainer.train()
    rows = {} if handle is None else handle.rows
    result["flops"] = work.flops(trained_weights(model, rows))
    result["tokens"] = work.tokens
    result["trained_rows"] = _share(model, rows)
    if handle is not None:
        handle.remove()
    after = look(model, tokenizer, prompts)
    result["after"] = {
        "accuracy": _scores(spec, model, tokenizer),
        "concentration": concentration(after),
    }
    result["steps"] = trainer.state.global_step
    result["curves"] = _curves(trainer.state.log_history)
    if result["steps"]:  # none where dynamic sampling found nothing to learn
        arms.check(spec.arm, weights, model, rows, result["curves"].get("activation_share"))
    result["first_last_overlap"] = (overlap(before, after, "q") + overlap(before, after, "k")) / 2
    result["moved"] = moved(weights, model, before)
    return result


#: What this process has found already of the models that runs start from.
_scores_before: dict[tuple[str, ...], dict[str, float]] = {}


def _scores(spec: Training, model: PreTrainedModel, tokenizer: Any) -> dict[str, float]:
    """The accuracy of each evaluation, in the precision of the run."""
    with torch.autocast(model.device.type, torch.bfloat16, enabled=spec.bf16):
        return {
            name: accuracy(
                model,
                tokenizer,
                task.dataset(tokenizer, spec.examples, spec.split, seed=0),
                spec.completion,
            )
            for name, task in spec.evaluations.items()
        }


def look_at(options: Mapping[str, Any], path: str, device: str) -> dict[str, Any]:
    """Of a pretrained model: what it recalls, and where its q and k are large."""
    model, tokenizer = load(path, device)
    examples = models.Pretraining(**options).examples
    scores = {}
    for hops in (0, 1):
        for length in (32, 64, 128, 320, 640, 1280):
            data = tasks.make_dataset(length, hops, examples=examples, split="test", seed=0)
            scores[f"{length} words, {hops} hops"] = accuracy(model, tokenizer, data, 1)
    data = tasks.make_dataset(128, 0, min(16, examples), split="validation", seed=1)
    return {
        "parameters": model.num_parameters(),
        "accuracy": scores,
        "concentration": concentration(look(model, tokenizer, data["prompt"])),
    }


def select(options: Mapping[str, Any], path: str, device: str) -> dict[str, Any]:
    """How much the rows that a model selects depend on text, length and task.

    `options`: `tasks`, by name, each with the others' lengths or not; and `lengths`, in which the
    first task comes, the longest last.
    """
    model, tokenizer = load(path, device)
    given = {name: Task(**task) for name, task in options["tasks"].items()}
    first = next(iter(given.values()))

    def seen(task: Task, seed: int = 1) -> Inspection:
        data = task.dataset(tokenizer, options["examples"], "validation", seed)
        return look(model, tokenizer, data["prompt"])

    here, there = seen(first), seen(first, seed=2)
    by_length = {n: seen(dataclasses.replace(first, length=n)) for n in options["lengths"]}
    longest = by_length[max(by_length)]
    others = [seen(task) for task in given.values() if task != first]
    return {
        "texts": {kind: overlap(here, there, kind) for kind in KINDS},
        "lengths": {
            kind: {str(n): overlap(at, longest, kind) for n, at in by_length.items()}
            for kind in KINDS
        },
        "tasks": {
            kind: statistics.fmean(overlap(here, other, kind) for other in others) for kind in KINDS
        },
        "heads": {kind: here.mean(kind, lambda channels: channels.head_overlap) for kind in KINDS},
    }


def make_trainer(
    spec: Training, model: PreTrainedModel, tokenizer: Any, folder: str, device: str
) -> Trainer:
    """TRL's, for the method; of a learning rate that falls to zero, after a short warm-up."""
    batch = spec.prompts * spec.generations
    accumulation = max(1, batch // spec.micro_batch)
    options = {
        "output_dir": folder,
        "learning_rate": spec.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": max(1, spec.steps // 20),
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "max_steps": spec.steps,
        "per_device_train_batch_size": batch // accumulation,
        "gradient_accumulation_steps": accumulation,
        "seed": spec.seed,
        "use_cpu": device == "cpu",
        "bf16": spec.bf16,
        "activation_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **OPTIONS[spec.method],
        **spec.options,
    }
    if spec.method == "sft":
        dataset = spec.task.dataset(tokenizer, batch * spec.steps, "train", spec.seed)
        completions = [" " + " ".join(answers) for answers in dataset["answers"]]
        return SFTTrainer(
            model,
            SFTConfig(**options, max_length=None),
            train_dataset=dataset.add_column("completion", completions).remove_columns("answers"),
            processing_class=tokenizer,
        )
    # Dynamic sampling draws others than those that come next.
    spare = 2 if spec.method == "dapo" else 1
    dataset = spec.task.dataset(tokenizer, spare * spec.prompts * spec.steps, "train", spec.seed)
    return GRPOTrainer(
        model,
        [recall_reward],
        GRPOConfig(
            **options,
            num_generations=spec.generations,
            # DAPO makes two steps of what is generated: else nothing is ever clipped.
            steps_per_generation=accumulation * (2 if spec.method == "dapo" else 1),
            max_completion_length=spec.completion,
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
    )


def _share(model: PreTrainedModel, rows: Mapping[str, Tensor | None]) -> float | None:
    """Of the rows of the projections that have a selection, those that a step trains."""
    counts = [
        (len(selected), model.get_submodule(name).out_features)
        for name, selected in rows.items()
        if selected is not None
    ]
    return sum(k for k, _ in counts) / sum(n for _, n in counts) if counts else None


def _curves(history: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Each step's reward, loss and selection (means of q and k)."""
    curves: dict[str, list[float]] = {}
    for entry in history:
        if "loss" not in entry:
            continue
        values = {"loss": [entry["loss"]], "reward": [entry["reward"]] if "reward" in entry else []}
        for name in ("overlap", "activation_share"):
            keys = [key for key in entry if re.fullmatch(rf"longact/._proj/{name}", key)]
            values[name] = [entry[key] for key in keys]
        for name, of_step in values.items():
            if of_step:
                curves.setdefault(name, []).append(statistics.fmean(of_step))
    return curves
