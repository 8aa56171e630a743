"""`python -m longact train`: GRPO and DAPO with LongAct, from a YAML file onto TRL's arguments."""

from __future__ import annotations

import difflib
import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from datasets import Dataset, load_dataset
from transformers import AutoTokenizer, TrainerCallback
from transformers.trainer_callback import TrainerState
from trl import ModelConfig, TrlParser
from trl.rewards import (
    accuracy_reward,
    get_soft_overlong_punishment,
    reasoning_accuracy_reward,
    think_format_reward,
)
from trl.scripts.grpo import GRPOScriptArguments

from longact.integrations.transformers import apply_to_trainer
from longact.integrations.trl import GRPOConfig, GRPOTrainer, NothingToLearnError
from longact.selection import SelectionConfig
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
    capture: str = field(default="projection", metadata={"help": "projection, norm or rope."})
    pair_rope: bool = field(default=False, metadata={"help": "Select rotary pairs together."})
    others: str = field(
        default="train",
        metadata={"help": "train; or freeze: train the salient rows alone, and save a delta."},
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
#: Of TRL's script and model arguments those that `train` reads.
_READ = {
    "dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split",
    "reward_model_name_or_path", "reward_funcs",
    "model_name_or_path", "model_revision", "dtype", "attn_implementation",
}  # fmt: skip


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML that takes 1e-6 for a number, as everybody else does."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


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
    values = _parsed(path.read_text(), str(path))
    if not isinstance(values, dict):
        raise ValueError(f"{path} does not hold a YAML mapping of keys to values")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"{override!r}: write key=value")
        parsed = _parsed(value, override)
        # Plain values are their field's to read: YAML takes the no of `save_strategy=no` for false.
        is_plain = not isinstance(parsed, (str, list, dict, type(None)))
        values[key.removeprefix("--")] = value if is_plain else parsed
    _check_keys(values)
    parser = TrlParser(_CLASSES, prog=f"python -m longact train {config}")
    for action in parser._actions:
        given = values.get(action.dest)
        if action.nargs in ("+", "*") and given is not None and not isinstance(given, list):
            values[action.dest] = [given]
    parser.set_defaults_with_config(**values)
    return Config(*parser.parse_args_into_dataclasses(args=[]))


def _parsed(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not YAML: {error}") from error


def _check_keys(values: Mapping[str, Any]) -> None:
    known = {f.name for cls in _CLASSES for f in fields(cls) if f.init}
    unread = {f.name for cls in (GRPOScriptArguments, ModelConfig) for f in fields(cls)} - _READ
    unread -= {f.name for cls in (GRPOConfig, LongActArguments, TaskArguments) for f in fields(cls)}
    for key in values:
        if key in unread:
            raise ValueError(
                f"{key}: longact train does not read it (LongAct trains the projections "
                "themselves, no adapters and no quantized weights; data sets are not streamed)"
            )
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
            raise ValueError(f"{key}: no such key; the nearest is {nearest}")


def train(config: Config) -> dict[str, dict[str, float]]:
    """Trains, saves the model to `output_dir` and evaluates it there.

    With `eval_on_start` the model is evaluated before, too (`eval_results_before.json`).

    Returns:
        For each evaluation task its metrics, as in `output_dir/eval_results.json`.
    """
    check(config)
    args, script, task = config.training, config.script, config.task
    checkpoint = _checkpoint_of(args)
    path = config.model.model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(
        path,
        revision=config.model.model_revision,
        trust_remote_code=args.trust_remote_code,
        padding_side="left",
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
    handle = apply_to_trainer(
        trainer,
        targets=config.longact.targets,
        optimizer=cast("dict[str, Any] | None", config.longact.optimizer_options),
        **_selection(config.longact),
    )
    before, args.eval_on_start = args.eval_on_start, False  # TRL would evaluate one set only
    if before and checkpoint is None:
        trainer.add_callback(_EvaluateFirst(trainer, eval_sets))
    nothing_to_learn = None
    if checkpoint is not None and _is_finished(args, checkpoint):
        # Trainer would train one step more.
        trainer._load_from_checkpoint(checkpoint)
        trainer._load_rng_state(checkpoint)
        trainer.state = TrainerState.load_from_json(f"{checkpoint}/trainer_state.json")
    else:
        try:
            result = trainer.train(resume_from_checkpoint=checkpoint)
        except NothingToLearnError as error:  # what was learned until then is kept
            nothing_to_learn = error
        else:
            trainer.log_metrics("train", result.metrics)
            trainer.save_metrics("train", result.metrics)
        if handle.config.is_compact and trainer.is_world_process_zero():
            handle.save_delta(Path(args.output_dir) / "delta.safetensors")
    trainer.save_model(args.output_dir)
    trainer.save_state()
    results = _evaluate(trainer, eval_sets, "eval_results.json")
    if nothing_to_learn is not None:
        raise nothing_to_learn
    return results


def check(config: Config) -> None:
    """What can be known to be wrong before a model is loaded.

    Raises:
        ValueError: naming the key, its value and the remedy.
    """
    script, task = config.script, config.task
    if config.model.model_name_or_path is None:
        raise ValueError("model_name_or_path is missing: name the model to train")
    if (script.dataset_name is None) == (task.task is None):
        raise ValueError(
            f"dataset_name={script.dataset_name}, task={task.task}: give one of them, a dataset "
            "(a name on the hub, or a folder with train and test files) or a task of longact.tasks"
        )
    SelectionConfig(**_selection(config.longact))
    _rewards(script, task, config.training)
    _checkpoint_of(config.training)


def _selection(longact: LongActArguments) -> dict[str, Any]:
    every = str(longact.refresh_every)  # of a YAML file it is an int
    return {
        "keep_ratio": longact.keep_ratio,
        "metric": longact.metric,
        "scope": longact.scope,
        "refresh_every": int(every) if every.lstrip("-").isdigit() else every,
        "capture": longact.capture,
        "pair_rope": longact.pair_rope,
        "others": longact.others,
    }


class _EvaluateFirst(TrainerCallback):  # type: ignore[misc]
    """Once training begins: an evaluation before would keep the model from being wrapped (DDP)."""

    def __init__(self, trainer: GRPOTrainer, eval_sets: Mapping[str, Dataset]) -> None:
        self._trainer, self._eval_sets = trainer, eval_sets

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        _evaluate(self._trainer, self._eval_sets, "eval_results_before.json")


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

    Raises:
        ValueError: `resume_from_checkpoint` is not a complete checkpoint, or is not given and there
            are checkpoints.
    """
    folder, asked = Path(args.output_dir), args.resume_from_checkpoint
    resumes = str(asked).lower() == "true"
    if asked and not resumes and str(asked).lower() != "false":
        if not _is_complete(Path(asked)):
            raise ValueError(
                f"resume_from_checkpoint={asked}: not a complete checkpoint with an optimizer's "
                "state (save_only_model leaves that out)"
            )
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
    return any(checkpoint.glob("optimizer*")) or any(checkpoint.glob("global_step*"))


def _is_finished(args: GRPOConfig, checkpoint: str) -> bool:
    state = TrainerState.load_from_json(f"{checkpoint}/trainer_state.json")
    return bool(state.global_step >= (args.max_steps if args.max_steps > 0 else state.max_steps))


def _datasets(
    script: GRPOScriptArguments, task: TaskArguments, tokenizer: Any, seed: int
) -> tuple[Dataset, dict[str, Dataset]]:
    """The training set, and evaluation sets by name."""

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
    if script.dataset_train_split not in splits:
        raise ValueError(
            f"dataset_train_split={script.dataset_train_split!r}: {script.dataset_name} has "
            f"{', '.join(splits)}"
        )
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
