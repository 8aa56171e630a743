"""`python -m longact train`: GRPO and DAPO with LongAct, from a YAML file onto TRL's arguments."""

from __future__ import annotations

import difflib
import importlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from datasets import Dataset, load_dataset
from transformers import AutoTokenizer
from trl import ModelConfig, TrlParser
from trl.rewards import (
    accuracy_reward,
    get_soft_overlong_punishment,
    reasoning_accuracy_reward,
    think_format_reward,
)
from trl.scripts.grpo import GRPOScriptArguments

from longact.integrations.transformers import apply_to_trainer
from longact.integrations.trl import GRPOConfig, GRPOTrainer
from longact.tasks import TASKS, make_dataset, recall_reward

__all__ = ["LongActArguments", "TaskArguments", "read_config", "train"]

RECIPES = Path(__file__).with_name("recipes")


@dataclass
class LongActArguments:
    """The arguments of `longact.integrations.transformers.apply_to_trainer`."""

    keep_ratio: float = field(default=0.3, metadata={"help": "Share of the channels to train."})
    targets: list[str] | None = field(
        default=None,
        metadata={"help": "Projections by name; default: q and k of the architecture."},
    )
    metric: str = field(default="mean_abs", metadata={"help": "mean_abs, rms or max_abs."})
    scope: str = field(default="layer", metadata={"help": "layer, head or model."})
    refresh_every: str = field(
        default="1", metadata={"help": "Optimizer steps between selections, 0, or forward."}
    )
    optimizer_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of FusedMaskedAdam, e.g. {state: compact}."}
    )


@dataclass
class TaskArguments:
    """Tasks of `longact.tasks`, in place of a dataset, and what rewards are made of."""

    task: str | None = field(default=None, metadata={"help": f"One of {', '.join(TASKS)}."})
    task_tokens: int = field(default=512, metadata={"help": "Longest prompt, in tokens."})
    task_examples: int = field(default=1000, metadata={"help": "Prompts in the training set."})
    task_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "The difficulty of `task`, e.g. {keys: 24}."}
    )
    task_conversational: bool = field(
        default=True,
        metadata={
            "help": "Whether prompts are messages; else text, which ends in the first words of the "
            "answer, as RULER's do."
        },
    )
    eval_tasks: list[str] | None = field(
        default=None, metadata={"help": "Tasks of the final evaluation; default: `task`."}
    )
    eval_examples: int = field(default=32, metadata={"help": "Prompts of each evaluation task."})
    soft_punish_cache: int | None = field(
        default=None,
        metadata={
            "help": "Tokens before max_completion_length over which get_soft_overlong_punishment "
            "grows to -1; default: a fifth of it, as in DAPO."
        },
    )


@dataclass
class Config:
    """A whole run."""

    script: GRPOScriptArguments
    training: GRPOConfig
    model: ModelConfig
    longact: LongActArguments
    task: TaskArguments


_CLASSES = (GRPOScriptArguments, GRPOConfig, ModelConfig, LongActArguments, TaskArguments)


def read_config(config: str, overrides: Sequence[str] = ()) -> Config:
    """A YAML file, or the name of a recipe, with `key=value` in place of what it says.

    Keys are the fields of TRL's GRPOScriptArguments, GRPOConfig and ModelConfig, and of the two
    classes above; values are YAML.

    Raises:
        ValueError: an unknown key (with the nearest one), or a value that its class refuses.
        SystemExit: a value that its field's type cannot read, as argparse does it.
    """
    path = Path(config)
    if not path.suffix and (RECIPES / f"{config}.yaml").exists():
        path = RECIPES / f"{config}.yaml"
    if not path.exists():
        recipes = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
        raise ValueError(f"{config}: no such file, and not one of the recipes ({recipes})")
    values = yaml.safe_load(path.read_text())
    if not isinstance(values, dict):
        raise ValueError(f"{path} does not hold a YAML mapping of keys to values")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"{override!r}: write key=value")
        parsed = yaml.safe_load(value)
        # Plain values are their field's to read: YAML takes the no of `save_strategy=no` for false.
        is_plain = isinstance(parsed, (bool, int, float))
        values[key.removeprefix("--")] = value if is_plain else parsed
    _check_keys(values)
    parser = TrlParser(_CLASSES, prog=f"python -m longact train {config}")
    for action in parser._actions:
        given = values.get(action.dest)
        if action.nargs in ("+", "*") and given is not None and not isinstance(given, list):
            values[action.dest] = [given]
    parser.set_defaults_with_config(**values)
    return Config(*parser.parse_args_into_dataclasses(args=[]))


def _check_keys(values: Mapping[str, Any]) -> None:
    known = {f.name for cls in _CLASSES for f in fields(cls) if f.init}
    for key in values:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
            raise ValueError(f"{key}: no such key; the nearest is {nearest}")


def train(config: Config) -> dict[str, dict[str, float]]:
    """Trains, saves the model to `output_dir` and evaluates it there.

    With `eval_on_start` the model is evaluated before, too (`eval_results_before.json`).

    Returns:
        For each evaluation task its metrics, as in `output_dir/eval_results.json`.
    """
    args, script, task = config.training, config.script, config.task
    checkpoint = _checkpoint_of(args)
    path = config.model.model_name_or_path
    if path is None:
        raise ValueError("model_name_or_path is missing: name the model to train")
    tokenizer = AutoTokenizer.from_pretrained(
        path, revision=config.model.model_revision, padding_side="left"
    )
    train_set, eval_sets = _datasets(script, task, tokenizer, args.seed)
    args.model_init_kwargs = {
        "revision": config.model.model_revision,
        "attn_implementation": config.model.attn_implementation,
        "dtype": config.model.dtype,
        **(args.model_init_kwargs or {}),
    }
    trainer = GRPOTrainer(
        model=path,
        reward_funcs=_rewards(script, task, args),
        args=args,
        train_dataset=train_set,
        eval_dataset=next(iter(eval_sets.values()), None),
        processing_class=tokenizer,
    )
    longact = config.longact
    every = str(longact.refresh_every)  # of a YAML file it is an int
    apply_to_trainer(
        trainer,
        longact.keep_ratio,
        targets=longact.targets,
        metric=longact.metric,  # type: ignore[arg-type]
        scope=longact.scope,  # type: ignore[arg-type]
        refresh_every=int(every) if every.lstrip("-").isdigit() else every,  # type: ignore[arg-type]
        optimizer=cast("dict[str, Any] | None", longact.optimizer_options),
    )
    before, args.eval_on_start = args.eval_on_start, False  # TRL would evaluate one set only
    if before and checkpoint is None:
        _evaluate(trainer, eval_sets, "eval_results_before.json")
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(args.output_dir)
    trainer.save_state()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    return _evaluate(trainer, eval_sets, "eval_results.json")


def _evaluate(
    trainer: GRPOTrainer, eval_sets: Mapping[str, Dataset], file: str
) -> dict[str, dict[str, float]]:
    results = {}
    for name, dataset in eval_sets.items():
        results[name] = trainer.evaluate(dataset)
        trainer.log_metrics(f"eval {name}", results[name])
    if trainer.is_world_process_zero():
        folder = Path(trainer.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(json.dumps(results, indent=2))
    return results


def _checkpoint_of(args: GRPOConfig) -> str | None:
    """Where to go on from; a run that was killed while it saved goes on from the checkpoint before.

    `trainer_state.json` is the last file that a checkpoint gets.
    """
    folder, asked = Path(args.output_dir), args.resume_from_checkpoint
    resumes = str(asked).lower() == "true"
    if asked and not resumes and str(asked).lower() != "false":
        if not _is_complete(Path(asked)):
            raise ValueError(f"resume_from_checkpoint={asked}: not a complete checkpoint")
        return str(asked)
    found = sorted(
        (p for p in folder.glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()),
        key=lambda p: int(p.name.rpartition("-")[2]),
    )
    if found and not resumes:
        raise ValueError(
            f"output_dir={args.output_dir} holds checkpoints of an earlier run: go on from the "
            "last with resume_from_checkpoint=true, or choose another output_dir"
        )
    complete = [p for p in found if _is_complete(p)]
    return str(complete[-1]) if complete else None


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True


def _datasets(
    script: GRPOScriptArguments, task: TaskArguments, tokenizer: Any, seed: int
) -> tuple[Dataset, dict[str, Dataset]]:
    """The training set, and evaluation sets by name."""
    if (script.dataset_name is None) == (task.task is None):
        raise ValueError(
            f"dataset_name={script.dataset_name}, task={task.task}: give one of them, a dataset "
            "(a name on the hub, or a folder with train and test files) or a task of longact.tasks"
        )

    def made(name: str, examples: int, split: Literal["train", "test"]) -> Dataset:
        return make_dataset(
            name,
            tokenizer,
            task.task_tokens,
            examples,
            split=split,
            seed=seed,
            conversational=task.task_conversational,
            **(cast("dict[str, Any]", task.task_options or {}) if name == task.task else {}),
        )

    names = task.eval_tasks if task.eval_tasks is not None else [task.task] if task.task else []
    eval_sets = {name: made(name, task.eval_examples, "test") for name in names}
    if task.task is not None:
        return made(task.task, task.task_examples, "train"), eval_sets
    splits = load_dataset(script.dataset_name, name=script.dataset_config)
    if script.dataset_test_split in splits:
        eval_sets = {script.dataset_test_split: splits[script.dataset_test_split], **eval_sets}
    return splits[script.dataset_train_split], eval_sets


def _rewards(
    script: GRPOScriptArguments, task: TaskArguments, args: GRPOConfig
) -> list[str | Callable[..., list[float]]]:
    """TRL's names, recall_reward, import paths, and a reward model."""
    cache = task.soft_punish_cache
    known = {
        "accuracy_reward": accuracy_reward,
        "reasoning_accuracy_reward": reasoning_accuracy_reward,
        "think_format_reward": think_format_reward,
        "recall_reward": recall_reward,
        "get_soft_overlong_punishment": get_soft_overlong_punishment(
            max_completion_len=args.max_completion_length,
            soft_punish_cache=args.max_completion_length // 5 if cache is None else cache,
        ),
    }
    rewards: list[str | Callable[..., list[float]]] = []
    if script.reward_model_name_or_path:
        rewards.append(script.reward_model_name_or_path)
    for name in script.reward_funcs or (["recall_reward"] if task.task else []):
        rewards.append(known[name] if name in known else _imported(name, known))
    return rewards


def _imported(name: str, known: Mapping[str, Any]) -> Callable[..., list[float]]:
    module, _, attribute = name.rpartition(".")
    if not module:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"reward_funcs: {name!r} is not known; the nearest is {nearest!r}, and an import path "
            "has a dot (my_module.my_reward)"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        reward: Callable[..., list[float]] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward_funcs: {name!r} cannot be imported: {error}") from error
    return reward
