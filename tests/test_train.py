"""`python -m longact train`: the GRPO and DAPO recipes, end to end on a tiny model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="needs the rl extra")
from helpers import assert_same_tree, one_thread
from models import QK, assert_same_params, params_of, tiny_model
from trainers import prompts, tiny_tokenizer
from transformers import AutoModelForCausalLM

import longact
from longact.integrations.trl import NothingToLearnError
from longact.train import RECIPES, _is_complete, read_config, train

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, a tokenizer and a dataset in files, as a user has them."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "data").mkdir()
    prompts(64).to_json(folder / "data" / "train.jsonl")
    prompts(8, seed=1).to_json(folder / "data" / "test.jsonl")
    return folder


def arguments(base: Path, folder: Path, **overrides: Any) -> list[str]:
    values = {
        "model_name_or_path": base / "model",
        "dataset_name": base / "data",
        "task": "null",
        "eval_tasks": "[]",
        "reward_funcs": "[trainers.parity]",
        "bf16": "false",
        "use_cpu": "true",
        "max_completion_length": 6,
        "learning_rate": "1e-2",
        "num_generations": 4,
        "gradient_accumulation_steps": 2,
        "num_iterations": 2,
        "max_steps": 12,
        "save_steps": 3,
        "save_total_limit": 10,
        "steps_per_generation": 2,
        "output_dir": folder,
        **overrides,
    }
    return [f"{key}={value}" for key, value in values.items()]


def command(recipe: str, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "longact", "train", recipe, *overrides]


ENV = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run(recipe: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(recipe, *overrides),
        env=os.environ | ENV,
        cwd=HERE,
        capture_output=True,
        text=True,
        check=False,
    )


def final_state(folder: Path, step: int = 12) -> dict[str, Any]:
    """Of the last checkpoint: weights, and moments, ages and rows."""
    from safetensors.torch import load_file

    checkpoint = folder / f"checkpoint-{step}"
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return {
        "weights": load_file(checkpoint / "model.safetensors"),
        "optimizer": torch.load(checkpoint / "optimizer.pt"),
        "losses": [
            (log["step"], log["loss"], log.get("reward")) for log in history if "loss" in log
        ],
    }


@pytest.mark.slow
@pytest.mark.usefixtures(one_thread.__name__)  # as the processes have
@pytest.mark.parametrize("recipe", ["grpo", "dapo"])
def test_a_killed_run_resumed_equals_an_uninterrupted_one(
    recipe: str, base: Path, tmp_path: Path
) -> None:
    dapo = {"dynamic_sampling_reward": "parity"} if recipe == "dapo" else {"beta": 0.04}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(read_config(recipe, arguments(base, whole, **dapo)))

    # Checkpoints are in the middle of what was generated: each batch trains four steps.
    process = subprocess.Popen(
        command(recipe, *arguments(base, killed, **dapo)),
        env=os.environ | ENV,
        cwd=HERE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not _is_complete(killed / "checkpoint-3"):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "checkpoint-12").exists()
    first = (killed / "checkpoint-3" / "trainer_state.json").stat().st_mtime_ns

    with pytest.raises(ValueError, match=r"holds checkpoints.*resume_from_checkpoint=true"):
        train(read_config(recipe, arguments(base, killed, **dapo)))
    done = run(recipe, *arguments(base, killed, resume_from_checkpoint="true", **dapo))
    assert done.returncode == 0, done.stderr[-4000:]
    assert (killed / "checkpoint-3" / "trainer_state.json").stat().st_mtime_ns == first  # resumed
    state = final_state(whole)
    assert_same_tree(state, final_state(killed))
    assert _evaluated(whole) == _evaluated(killed)

    # It is what it says: rows and ages of q and k, different losses, a final evaluation.
    rows = [s["rows"].numel() for s in state["optimizer"]["state"].values() if "rows" in s]
    assert rows == [19, 10, 19, 10]
    assert [step for step, _, _ in state["losses"]] == list(range(1, 13))
    assert len({loss for _, loss, _ in state["losses"]}) > 4
    assert 0 < _evaluated(whole)["test"] < 1
    assert 0 < _evaluated(whole, "eval_results_before.json")["test"] < 1
    assert (whole / "model.safetensors").exists()
    assert "eval test metrics" in done.stdout


def _evaluated(folder: Path, file: str = "eval_results.json") -> dict[str, float]:
    results = json.loads((folder / file).read_text())
    return {name: metrics["eval_reward"] for name, metrics in results.items()}


def test_freezing_others_saves_a_delta_that_gives_the_model(base: Path, tmp_path: Path) -> None:
    train(read_config("grpo", arguments(base, tmp_path, others="freeze", max_steps=2)))
    trained = AutoModelForCausalLM.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(base / "model")
    start = params_of(model)
    longact.load_delta(model, tmp_path / "delta.safetensors")
    assert_same_params(model, trained)
    changed = [n for n, param in model.named_parameters() if not torch.equal(param, start[n])]
    assert changed == [f"{name}.weight" for name in QK]


def test_resuming_a_run_that_is_finished_trains_no_further(base: Path, tmp_path: Path) -> None:
    """It was killed during the final evaluation, or is simply started once more."""
    settings = {"max_steps": 3, "eval_on_start": "false"}
    train(read_config("grpo", arguments(base, tmp_path, **settings)))
    weights, reward = final_state(tmp_path, 3), _evaluated(tmp_path)
    (tmp_path / "eval_results.json").unlink()
    (tmp_path / "model.safetensors").unlink()
    again = arguments(base, tmp_path, resume_from_checkpoint="true", **settings)
    train(read_config("grpo", again))
    assert not (tmp_path / "checkpoint-4").exists()
    assert_same_tree(final_state(tmp_path, 3), weights)
    assert _evaluated(tmp_path) == reward
    from safetensors.torch import load_file

    assert_same_tree(load_file(tmp_path / "model.safetensors"), weights["weights"])


@pytest.mark.slow
def test_two_processes_stay_replicas_and_resume(base: Path, tmp_path: Path) -> None:
    """Also though the model is evaluated before it is trained, which must not keep it from being
    wrapped in DDP."""
    settings: dict[str, Any] = {
        "dynamic_sampling_reward": "parity",
        "max_steps": 5,
        "ddp_backend": "gloo",
        "ddp_timeout": 120,
        "per_device_train_batch_size": 2,
    }
    ranks = [*(sys.executable, "-m", "torch.distributed.run", "--standalone")]
    ranks += ["--nproc-per-node", "2", "-m", "longact", "train", "dapo"]
    for name in ("whole", "resumed"):
        folder = tmp_path / name
        if name == "resumed":
            shutil.copytree(tmp_path / "whole" / "checkpoint-3", folder / "checkpoint-3")
            settings["resume_from_checkpoint"] = "true"
        done = subprocess.run(
            [*ranks, *arguments(base, folder, **settings)],
            env=os.environ | ENV,
            cwd=HERE,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
    whole, resumed = (final_state(tmp_path / n, 5) for n in ("whole", "resumed"))
    assert_same_tree(whole, resumed)


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_recipes_are_whole_algorithms() -> None:
    grpo, dapo = read_config("grpo", ["use_cpu=true"]), read_config("dapo", ["use_cpu=true"])
    assert {p.stem for p in RECIPES.glob("*.yaml")} == {"grpo", "dapo"}
    assert (grpo.training.loss_type, dapo.training.loss_type) == ("grpo", "dapo")
    assert grpo.training.beta > 0
    assert not grpo.training.dynamic_sampling
    # DAPO's four parts: clip-higher, token-level loss (above), overlong shaping, dynamic sampling.
    assert (dapo.training.epsilon, dapo.training.epsilon_high) == (0.2, 0.28)
    assert "get_soft_overlong_punishment" in dapo.script.reward_funcs
    assert dapo.training.dynamic_sampling
    assert dapo.training.dynamic_sampling_reward == "recall_reward"
    assert dapo.training.beta == 0
    # Clipping acts only where what was generated trains more than one step.
    for_a_step = dapo.training.gradient_accumulation_steps
    assert dapo.training.steps_per_generation * dapo.training.num_iterations > for_a_step
    for config in (grpo, dapo):
        assert config.longact.keep_ratio == 0.3
        assert config.training.learning_rate > 0


def test_overrides_are_yaml_and_take_the_types_of_their_classes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "output_dir: x\nlearning_rate: 1e-6\nkeep_ratio: 0.2\n")
    config = read_config(
        path,
        [
            "keep_ratio=0.5",
            "--num_generations=4",
            "adam_epsilon=1e-5",
            "targets=q_proj",
            "save_strategy=no",
            "optimizer_options={state: compact}",
            "refresh_every=forward",
            "model_init_kwargs={a: 1}",
            "use_cpu=true",
            "run_name=2026-01-01",
            "reward_weights=[1, 1e-1]",
        ],
    )
    assert config.training.run_name == "2026-01-01"
    assert config.training.reward_weights == [1, 0.1]
    assert config.longact.keep_ratio == 0.5
    assert config.longact.targets == ["q_proj"]
    assert config.longact.optimizer_options == {"state": "compact"}
    assert config.longact.refresh_every == "forward"
    assert config.training.learning_rate == 1e-6  # YAML reads 1e-6 as a string
    assert config.training.adam_epsilon == 1e-5
    assert config.training.save_strategy == "no"
    assert config.training.num_generations == 4
    assert config.training.model_init_kwargs == {"a": 1}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning_rte=1", "learning_rte: no such key; the nearest is learning_rate"),
        ("keep_ration=1", "keep_ration: no such key; the nearest is keep_ratio"),
        ("tasks=vt", "tasks: no such key; the nearest is task"),
        ("dynamic_sample=1", "the nearest is dynamic_sampling"),
        ("keep_ratio", "'keep_ratio': write key=value"),
        ("use_peft=true", "use_peft: longact train does not read it .*no adapters"),
        ("load_in_4bit=true", "load_in_4bit: longact train does not read it"),
        ("dataset_streaming=true", "dataset_streaming: longact train does not read it"),
        ("targets=[a", "targets=.a is not YAML"),
        ("dynamic_sampling_max_rounds=0", "dynamic_sampling_max_rounds=0: must be"),
    ],
)
def test_a_wrong_key_names_the_nearest(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_config("dapo", ["use_cpu=true", override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning_rte=1", "error: learning_rte: no such key; the nearest is learning_rate"),
        ("keep_ratio=0", "error: keep_ratio=0.0: must lie in (0, 1]"),
    ],
)
def test_the_command_line_reports_mistakes_without_a_traceback(
    override: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from longact.__main__ import main

    monkeypatch.setattr(sys, "argv", ["longact", "train", "grpo", "use_cpu=true", override])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_value_of_the_wrong_type_names_the_argument(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_config("grpo", ["num_generations=eight"])
    assert "argument --num_generations/--num-generations: invalid int" in capsys.readouterr().err


def test_a_config_that_is_not_there_names_the_recipes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dap: no such file, and not one of .*\(dapo, grpo\)"):
        read_config("dap")
    with pytest.raises(ValueError, match="does not hold a YAML mapping"):
        read_config(write(tmp_path / "list.yaml", "- a\n"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"task": "vt"}, "dataset_name=.*, task=vt: give one of them"),
        ({"dataset_name": "null"}, "dataset_name=None, task=None: give one of them"),
        ({"reward_funcs": "[recal_reward]"}, "'recal_reward' is not known.*'recall_reward'"),
        ({"reward_funcs": "[trainers.nothing]"}, "'trainers.nothing' cannot be imported"),
        ({"model_name_or_path": "null"}, "model_name_or_path is missing"),
        ({"resume_from_checkpoint": "nowhere"}, "nowhere: not a complete checkpoint"),
        ({"refresh_every": "often"}, "refresh_every='often'"),
        ({"keep_ratio": "1.5"}, "keep_ratio=1.5: must lie in"),
        ({"dataset_train_split": "trian"}, "dataset_train_split='trian': .* has t"),
        ({"targets": "[query]"}, "nothing in LlamaForCausalLM matches 'query'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_input_is_refused(
    overrides: dict[str, str], message: str, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        train(read_config("grpo", arguments(base, tmp_path / "run", **overrides)))
    assert not list(tmp_path.glob("run/checkpoint-*"))


def test_a_nan_reward_stops_the_run_before_anything_is_trained(base: Path, tmp_path: Path) -> None:
    overrides = {"reward_funcs": "[test_train.nan_reward]", "save_steps": 1}
    with pytest.raises(ValueError, match=r"'nan_reward' returned nan for completion 1"):
        train(read_config("grpo", arguments(base, tmp_path / "run", **overrides)))
    assert not list(tmp_path.glob("run/checkpoint-*"))


def nan_reward(completions: list[str], **kwargs: Any) -> list[float]:
    return [1.0, float("nan"), *[0.0] * (len(completions) - 2)]


def test_resuming_passes_over_a_checkpoint_that_was_cut_off(base: Path, tmp_path: Path) -> None:
    settings = {"max_steps": 2, "save_steps": 1, "num_iterations": 1}
    train(read_config("grpo", arguments(base, tmp_path, **settings)))
    state = tmp_path / "checkpoint-2" / "trainer_state.json"
    state.write_text(state.read_text()[:-20])
    settings["max_steps"] = 3
    overrides = arguments(base, tmp_path, resume_from_checkpoint="true", **settings)
    train(read_config("grpo", overrides))
    assert final_state(tmp_path, 3)["losses"][0][0] == 1
    # On, from nothing: a scheduler may always say so.
    fresh = arguments(base, tmp_path / "new", resume_from_checkpoint="true", **settings)
    train(read_config("grpo", fresh))


def test_options_of_another_task_are_refused(base: Path, tmp_path: Path) -> None:
    """The recipe's, for instance."""
    overrides = {"dataset_name": "null", "task": "vt", "eval_tasks": "[]"}
    with pytest.raises(ValueError, match=r"options=\{'keys': 12\}: vt does not take them"):
        train(read_config("grpo", arguments(base, tmp_path, **overrides)))


def test_what_was_learned_is_kept_where_nothing_is_left_to_learn(
    base: Path, tmp_path: Path
) -> None:
    """DAPO on a task that the model has come to solve always."""
    overrides = {
        "reward_funcs": "[test_train.soon_equal]",
        "dynamic_sampling_reward": "soon_equal",
        "dynamic_sampling_max_rounds": 2,
        "num_iterations": 1,
        "eval_on_start": "false",
        "save_strategy": "no",
    }
    with pytest.raises(NothingToLearnError, match="no group with different rewards"):
        train(read_config("dapo", arguments(base, tmp_path, **overrides)))
    assert (tmp_path / "model.safetensors").exists()
    assert _evaluated(tmp_path) == {"test": 1.0}
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["global_step"] == 2


def soon_equal(completion_ids: list[list[int]], trainer_state: Any, **kwargs: Any) -> list[float]:
    if trainer_state.global_step >= 2:
        return [1.0] * len(completion_ids)
    return [float(i) for i in range(len(completion_ids))]


def test_a_task_is_made_for_the_models_tokenizer(base: Path, tmp_path: Path) -> None:
    overrides = {
        "dataset_name": "null",
        "task": "vt",
        "task_options": "null",
        "task_tokens": 700,
        "task_examples": 8,
        "eval_tasks": "[vt]",
        "eval_examples": 4,
        "max_steps": 1,
        "save_strategy": "no",
        "reward_funcs": "[trainers.parity, recall_reward, get_soft_overlong_punishment]",
        "num_iterations": 1,
        "dynamic_sampling_reward": "parity",
    }
    model = tmp_path / "model"
    tiny_model(max_position_embeddings=1024).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    overrides["model_name_or_path"] = str(model)
    results = train(read_config("dapo", arguments(base, tmp_path / "run", **overrides)))
    assert list(results) == ["vt"]
    assert results["vt"]["eval_rewards/recall_reward/mean"] == 0
    assert results["vt"]["eval_rewards/parity/mean"] > 0
