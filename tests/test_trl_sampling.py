"""Dynamic sampling, exact resume and finite rewards, in TRL's own GRPO trainer."""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_tree, one_thread
from models import PAD, assert_same_params, tiny_model
from ranks import start_trainer_ranks
from torch import Tensor

pytest.importorskip("trl", reason="needs the rl extra")
import trl
from datasets import Dataset, IterableDataset
from trainers import tiny_tokenizer
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerBase

import longact
from longact.integrations.trl import GRPOConfig, GRPOTrainer, _ShuffledIndices

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.usefixtures(one_thread.__name__),
]

FIRST = 10  # prompt i begins with the word of token FIRST + i
#: Prompts whose completions all get the same reward.
HOPELESS = frozenset({0, 2, 3, 5, 8, 9, 13, 14, 17, 20, 21})


def dataset(count: int = 24) -> Dataset:
    """Prompts of different lengths; the column `id` says which."""
    texts = [
        " ".join(f"w{t}" for t in range(FIRST + i, FIRST + 3 + i + i % 4)) for i in range(count)
    ]
    return Dataset.from_dict({"prompt": texts, "id": list(range(count))})


def score(ids: list[int]) -> float:
    """Differs between almost all completions."""
    return sum((7 * position + token) % 64 for position, token in enumerate(ids)) / 64


def reward(id: list[int], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [0.5 if i in HOPELESS else score(c) for i, c in zip(id, completion_ids, strict=True)]


def length(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """Varies where `reward` does not: like an overlong penalty."""
    return [score(c) / 10 for c in completion_ids]


def constant(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [0.25] * len(completion_ids)


class _Recording:
    """What was sampled, built into a batch, and trained on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.sampled: list[list[int]] = []  # by round, the first words of this process's prompts
        self.batches: list[dict[str, Any]] = []  # groups in order
        self.trained: list[dict[str, Any]] = []  # by micro-batch
        self.logs: list[dict[str, Any]] = []
        super().__init__(*args, **kwargs)

    def _generate(self, prompts: list[str]) -> Any:
        if getattr(self, "_batch", None) is None:
            self.sampled.append([int(prompt.split()[0][1:]) - FIRST for prompt in prompts])
        return super()._generate(prompts)  # type: ignore[misc]

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        if self.model.training:  # type: ignore[attr-defined]
            self.batches.append({key: value.clone() for key, value in output.items()})
        return output

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        if model.training:
            self.trained.append({key: value.clone() for key, value in inputs.items()})
        return super()._compute_loss(model, inputs)  # type: ignore[misc]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)  # type: ignore[misc]
        self.logs.append(dict(logs))


class Ours(_Recording, GRPOTrainer):
    pass


class TRLs(_Recording, trl.GRPOTrainer):
    pass


SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 16,
    "num_generations": 4,
    "max_completion_length": 6,
    "max_steps": 3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "seed": 7,
}


def make(
    folder: Path,
    rewards: Any = reward,
    cls: Any = Ours,
    data: Any = None,
    evaluation: Any = None,
    rollout: Any = None,
    **settings: Any,
) -> Any:
    model = tiny_model()
    # Many tokens end a completion: lengths differ.
    model.generation_config.eos_token_id = [2, *range(3, 12)]
    if settings.get("beta"):
        model.save_pretrained(folder / "policy")
        model.config._name_or_path = str(folder / "policy")
    config = GRPOConfig if cls is Ours else trl.GRPOConfig
    return cls(
        model=model,
        reward_funcs=rewards,
        args=config(**{**SETTINGS, "output_dir": str(folder / "run"), **settings}),
        train_dataset=dataset() if data is None else data,
        eval_dataset=evaluation,
        processing_class=tiny_tokenizer(),
        rollout_func=rollout,
    )


def trained(folder: Path, *args: Any, resume: Any = None, **settings: Any) -> Any:
    trainer = make(folder, *args, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


Row = tuple[tuple[int, ...], tuple[int, ...]]


def rows(batch: dict[str, Any]) -> list[Row]:
    """Prompt and completion of each sample, by the masks."""
    return [
        tuple(
            tuple(ids[mask.bool()].tolist())
            for ids, mask in (
                (batch["prompt_ids"][i], batch["prompt_mask"][i]),
                (batch["completion_ids"][i], batch["completion_mask"][i]),
            )
        )  # type: ignore[misc]
        for i in range(len(batch["prompt_ids"]))
    ]


def rewards_of(batch: dict[str, Any]) -> Tensor:
    """Computed again from the tokens; float32 as TRL has them."""
    return torch.tensor(
        [reward([prompt[0] - FIRST], [list(completion)])[0] for prompt, completion in rows(batch)]
    )


def check_batch(batch: dict[str, Any], size: int, group: int) -> None:
    """Full, made of whole groups of one prompt with different rewards, padded as TRL pads."""
    samples = rows(batch)
    assert len(samples) == size
    assert all(len(value) == size for value in batch.values() if value.dim())
    rewards = rewards_of(batch)
    for start in range(0, size, group):
        assert len({prompt for prompt, _ in samples[start : start + group]}) == 1
        assert samples[start][0][0] - FIRST not in HOPELESS
        assert rewards[start : start + group].unique().numel() > 1
    for name, left in (("prompt", True), ("completion", False)):
        ids, mask = batch[f"{name}_ids"], batch[f"{name}_mask"]
        lengths = mask.sum(1)
        assert ids.shape[1] == int(lengths.max())
        place = torch.arange(ids.shape[1])
        place = place.flip(0) if left else place
        assert torch.equal(mask, (place < lengths[:, None]).long())
        assert bool((ids[mask == 0] == PAD).all())
    assert int(batch["num_items_in_batch"]) == int(batch["completion_mask"].sum())


def check_trained(trainer: Any) -> None:
    """Exactly the samples of the batches reached the loss, once in each iteration."""
    args = trainer.args
    count = args.steps_per_generation
    cycle = count * args.num_iterations
    assert len(trainer.trained) == cycle * len(trainer.batches)
    for i, batch in enumerate(trainer.batches):
        wanted = Counter(zip(rows(batch), batch["advantages"].tolist(), strict=True))
        for start in range(i * cycle, (i + 1) * cycle, count):
            steps = trainer.trained[start : start + count]
            assert {len(step["prompt_ids"]) for step in steps} == {args.per_device_train_batch_size}
            got = [
                pair
                for step in steps
                for pair in zip(rows(step), step["advantages"].tolist(), strict=True)
            ]
            assert Counter(got) == wanted


# The batch


@pytest.mark.parametrize(
    "settings",
    [
        {"scale_rewards": "group"},
        {"scale_rewards": "none", "loss_type": "grpo"},
        {"scale_rewards": "batch", "pad_to_multiple_of": 1},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8},
        {"num_iterations": 2, "max_steps": 4},
        {"steps_per_generation": 4, "per_device_train_batch_size": 4, "max_steps": 8},
    ],
    ids=lambda settings: next(f"{key}={value}" for key, value in settings.items()),
)
def test_every_group_that_is_trained_on_has_different_rewards(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    trainer = trained(tmp_path, dynamic_sampling=True, **settings)
    assert len(trainer.batches) >= 2
    assert len(trainer.sampled) > len(trainer.batches)  # something was replaced
    for batch in trainer.batches:
        check_batch(batch, 16, 4)
        # The formulas of TRL's documentation, over the final batch.
        grouped = rewards_of(batch).view(-1, 4)
        advantages = grouped - grouped.mean(1, keepdim=True)
        scale = trainer.args.scale_rewards
        if scale != "none":
            std = grouped.std(1, keepdim=True) if scale == "group" else grouped.std()
            advantages = advantages / (std + 1e-4)
        torch.testing.assert_close(batch["advantages"], advantages.flatten(), rtol=1e-5, atol=1e-5)
    check_trained(trainer)


def test_rewards_are_normalized_over_the_final_batch(tmp_path: Path) -> None:
    trainer = trained(
        tmp_path,
        [reward, length],
        dynamic_sampling=True,
        dynamic_sampling_reward="reward",
        multi_objective_aggregation="normalize_then_sum",
        reward_weights=[1.0, 0.5],
    )
    assert len(trainer.sampled) > len(trainer.batches)
    for batch in trainer.batches:
        check_batch(batch, 16, 4)
        total = torch.zeros(4, 4)
        lengths = torch.tensor(length([list(completion) for _, completion in rows(batch)]))
        for weight, values in ((1.0, rewards_of(batch)), (0.5, lengths)):
            grouped = values.view(4, 4)
            std = grouped.std(1, keepdim=True) + 1e-4
            total += weight * (grouped - grouped.mean(1, keepdim=True)) / std
        advantages = ((total - total.mean()) / (total.std() + 1e-4)).flatten()
        torch.testing.assert_close(batch["advantages"], advantages, rtol=1e-4, atol=1e-4)


def logprobs(model: Any, row: Row, temperature: float) -> Tensor:
    prompt, completion = row
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
    chosen = (logits / temperature).log_softmax(-1)[len(prompt) - 1 : -1]
    return chosen.gather(1, torch.tensor(completion)[:, None])[:, 0]


def test_log_probabilities_belong_to_their_samples(tmp_path: Path) -> None:
    trainer = make(
        tmp_path, dynamic_sampling=True, beta=0.1, num_iterations=2, max_steps=2, temperature=0.9
    )
    model = tiny_model()  # both the reference and, at the first generation, the policy
    trainer.train()
    (batch,) = trainer.batches
    check_batch(batch, 16, 4)
    assert len(trainer.sampled) > 1
    for i, row in enumerate(rows(batch)):
        expected = logprobs(model, row, 0.9)
        for key in ("old_per_token_logps", "ref_per_token_logps"):
            got = batch[key][i]
            torch.testing.assert_close(got[: len(row[1])], expected, rtol=1e-4, atol=1e-4)
            assert not got[len(row[1]) :].any()


def test_masked_truncated_completions_keep_their_tokens(tmp_path: Path) -> None:
    trainer = trained(tmp_path, dynamic_sampling=True, mask_truncated_completions=True, max_steps=2)
    masked = 0
    for batch in trainer.batches:
        assert int(batch["num_items_in_batch"]) == int(batch["completion_mask"].sum())
        for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True):
            if not mask.any():
                masked += 1
                assert len(ids) == 6
                assert ids[-1] != PAD
    assert masked > 0


def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Completions, log-probabilities and masks by formula, and a field for the reward."""
    tokenizer = tiny_tokenizer()
    completions = []
    for i, _ in enumerate(prompts):
        trainer.calls += 1
        n = 2 + trainer.calls % 4
        completions.append([12 + (5 * i + 3 * j + trainer.calls) % 50 for j in range(n)] + [2])
    return {
        "prompt_ids": tokenizer(prompts)["input_ids"],
        "completion_ids": completions,
        "logprobs": [[-t / 100 for t in ids] for ids in completions],
        "env_mask": [[t % 2 for t in ids] for ids in completions],
        "first": [ids[0] for ids in completions],
        "source": "rollout",
    }


def by_first(
    id: list[int],
    first: list[int],
    source: list[str],
    log_extra: Any,
    log_metric: Any,
    **kwargs: Any,
) -> list[float]:
    assert set(source) == {"rollout"}
    log_extra("first", first)
    log_metric("calls", 1.0)
    return [0.5 if i in HOPELESS else float(value) for i, value in zip(id, first, strict=True)]


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
def test_masks_probabilities_and_columns_of_a_rollout_belong_to_their_samples(
    tmp_path: Path,
) -> None:
    trainer = make(
        tmp_path,
        by_first,
        rollout=rollout,
        dynamic_sampling=True,
        log_completions=True,
        max_steps=2,
    )
    trainer.calls = 0
    tables = []

    def log(logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            tables.append(
                {key: list(value) for key, value in trainer._logs.items() if key != "extra"}
            )
            tables[-1]["first"] = list(trainer._logs["extra"]["first"])
            tables[-1]["by_first"] = list(trainer._logs["rewards"]["by_first"])
        type(trainer).log(trainer, logs, start_time)

    trainer.log = log
    trainer.train()
    assert len(trainer.sampled) > len(trainer.batches)
    for batch, table in zip(trainer.batches, tables, strict=True):
        for i, (_, completion) in enumerate(rows(batch)):
            n = len(completion)
            expected = torch.tensor([-t / 100 for t in completion])
            assert torch.equal(batch["sampling_per_token_logps"][i, :n], expected)
            assert batch["tool_mask"][i, :n].tolist() == [t % 2 for t in completion]
        masks = batch["completion_mask"] * batch["tool_mask"]
        assert int(batch["num_items_in_batch"]) == int(masks.sum())
        # TRL's table shows the batch that is trained on, row by row.
        assert table["first"] == [completion[0] for _, completion in rows(batch)]
        assert table["by_first"] == [float(value) for value in table["first"]]
        assert [t.split()[0] for t in table["prompt"]] == [f"w{p[0]}" for p, _ in rows(batch)]
        assert table["advantages"] == batch["advantages"].tolist()
    assert all(log["calls"] == 1.0 for log in trainer.logs if "calls" in log)
    assert len(list((tmp_path / "run" / "completions").iterdir())) >= 2


# The rounds


def test_only_missing_groups_are_sampled_and_good_ones_keep_their_place(tmp_path: Path) -> None:
    trainer = trained(tmp_path, dynamic_sampling=True, max_steps=1)
    (batch,) = trainer.batches
    first, *later = trainer.sampled
    assert later
    places = [prompt if prompt not in HOPELESS else None for prompt in first[::4]]
    for prompts in later:
        assert len(prompts) == 4 * places.count(None)
        assert all(len(set(prompts[i : i + 4])) == 1 for i in range(0, len(prompts), 4))
        for prompt in prompts[::4]:
            if prompt not in HOPELESS:
                places[places.index(None)] = prompt
    assert [prompt[0] - FIRST for prompt, _ in rows(batch)[::4]] == places
    sampled = [prompt for prompts in trainer.sampled for prompt in prompts[::4]]
    assert len(set(sampled)) == len(sampled)  # new prompts, never one of this batch
    log = trainer.logs[0]
    good = sum(prompt not in HOPELESS for prompt in sampled)
    assert log["dynamic_sampling/rounds"] == len(trainer.sampled)
    assert log["dynamic_sampling/groups_kept"] == pytest.approx(good / len(sampled))
    assert log["dynamic_sampling/groups_copied"] == 0
    assert log["num_tokens"] == trainer.state.num_input_tokens_seen


def test_rewards_of_the_batch_and_of_everything_sampled_are_both_logged(tmp_path: Path) -> None:
    seen: list[float] = []

    def remember(**kwargs: Any) -> list[float]:
        values = reward(**kwargs)
        seen.extend(values)
        return values

    trainer = trained(tmp_path, remember, dynamic_sampling=True, max_steps=1)
    (batch,), log = trainer.batches, trainer.logs[0]
    assert len(seen) > 16
    assert log["reward"] == pytest.approx(rewards_of(batch).mean().item(), rel=1e-5)
    assert log["rewards/remember/mean"] == pytest.approx(log["reward"])
    assert log["dynamic_sampling/reward"] == pytest.approx(sum(seen) / len(seen), rel=1e-5)
    assert abs(log["reward"] - log["dynamic_sampling/reward"]) > 0.05
    assert log["frac_reward_zero_std"] == 0
    # Lengths: of the first round, as without dynamic sampling.
    plain = trained(tmp_path, max_steps=1)
    for key in ("completions/mean_length", "completions/max_length", "completions/clipped_ratio"):
        assert log[key] == plain.logs[0][key]
    assert plain.logs[0]["frac_reward_zero_std"] > 0


def test_without_anything_to_replace_a_run_equals_trls(tmp_path: Path) -> None:
    """Bit for bit, with dynamic sampling on or off."""
    settings = {"num_iterations": 2, "steps_per_generation": 2, "max_steps": 8, "beta": 0.05}
    good = dataset().filter(lambda row: row["id"] not in HOPELESS)
    data = {False: dataset(), True: good}
    for on, prompts in data.items():
        plain = trained(tmp_path / f"trl{on}", cls=TRLs, data=prompts, **settings)
        ours = trained(tmp_path / f"ours{on}", data=prompts, dynamic_sampling=on, **settings)
        assert_same_params(ours.model, plain.model)
        assert_same_tree(ours.optimizer.state_dict(), plain.optimizer.state_dict())
        assert_same_tree(ours.trained, plain.trained)
        assert ours.sampled == plain.sampled
        for a, b in zip(ours.logs, plain.logs, strict=True):
            same = {key for key in b if "time" not in key and "per_second" not in key}
            assert {key: a[key] for key in same} == {key: b[key] for key in same}
            assert {key for key in set(a) - set(b) if not key.startswith("dynamic_")} == set()


def test_trls_own_config_trains_as_trl(tmp_path: Path) -> None:
    args = trl.GRPOConfig(**{**SETTINGS, "output_dir": str(tmp_path), "max_steps": 1})
    trainer = GRPOTrainer(tiny_model(), reward, args, dataset(), processing_class=tiny_tokenizer())
    trainer.train()
    assert trainer.state.global_step == 1


def test_evaluation_replaces_nothing(tmp_path: Path) -> None:
    trainer = make(
        tmp_path, evaluation=dataset(8), dynamic_sampling=True, per_device_eval_batch_size=16
    )
    metrics = trainer.evaluate()
    assert [len(prompts) for prompts in trainer.sampled] == [16, 16]
    assert metrics["eval_frac_reward_zero_std"] > 0
    assert not any("dynamic" in key for key in metrics)


def test_at_the_bound_the_batch_is_filled_with_copies_spread_evenly(tmp_path: Path) -> None:
    only = {1, 4}

    def two(id: list[int], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [score(c) if i in only else 1.0 for i, c in zip(id, completion_ids, strict=True)]

    data = dataset(8)
    with pytest.warns(
        longact.LongActWarning, match=r"max_rounds=2 rounds.* \d groups.* has 8"
    ) as log:
        trainer = trained(
            tmp_path,
            two,
            data=data,
            dynamic_sampling=True,
            dynamic_sampling_max_rounds=2,
            per_device_train_batch_size=32,
            max_steps=3,
        )
    assert len([w for w in log if issubclass(w.category, longact.LongActWarning)]) == 1
    assert len(trainer.sampled) == 2 * 3
    for batch, entry in zip(trainer.batches, trainer.logs, strict=False):
        groups = [rows(batch)[i : i + 4] for i in range(0, 32, 4)]
        counts = Counter(prompt[0] - FIRST for group in groups for prompt, _ in group)
        # The second round drew the two prompts once more: all samples of this batch are theirs.
        assert set(counts) == only
        kept = len({tuple(group) for group in groups})
        copies = Counter(tuple(group) for group in groups).values()
        assert max(copies) - min(copies) <= 1
        assert entry["dynamic_sampling/groups_copied"] == pytest.approx(1 - kept / 8)
        assert entry["dynamic_sampling/rounds"] == 2
        assert int(batch["num_items_in_batch"]) == int(batch["completion_mask"].sum())
    check_trained(trainer)


def test_one_round_generates_once(tmp_path: Path) -> None:
    with pytest.warns(longact.LongActWarning, match="max_rounds=1 rounds"):
        trainer = trained(
            tmp_path, dynamic_sampling=True, dynamic_sampling_max_rounds=1, max_steps=1
        )
    assert len(trainer.sampled) == 1
    check_batch(trainer.batches[0], 16, 4)


def test_a_run_without_any_useful_group_stops_with_the_remedies(tmp_path: Path) -> None:
    def some(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
        return [None if i % 4 else 0.25 for i in range(len(completion_ids))]

    trainer = make(tmp_path, some, dynamic_sampling=True, dynamic_sampling_max_rounds=3)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(RuntimeError) as error:
        trainer.train()
    message = str(error.value)
    for part in (
        "12 groups of 4 completions",
        "dynamic_sampling_max_rounds=3",
        "by some: None (36 times), 0.25 (12 times)",
        "num_generations",
        "dynamic_sampling=False",
    ):
        assert part in message
    assert len(trainer.sampled) == 3
    assert_same_params(trainer.model, before)


def test_a_group_is_judged_by_the_named_reward_and_by_the_total(tmp_path: Path) -> None:
    named = trained(
        tmp_path,
        [reward, length],
        dynamic_sampling=True,
        dynamic_sampling_reward="reward",
        max_steps=1,
    )
    assert len(named.sampled) > 1
    check_batch(named.batches[0], 16, 4)
    # By the total the penalty hides equal answers.
    total = trained(tmp_path, [reward, length], dynamic_sampling=True, max_steps=1)
    assert len(total.sampled) == 1
    # Rewards that cancel out leave no advantage, whatever the judge says.
    cancelled = make(
        tmp_path,
        [length, length],
        dynamic_sampling=True,
        dynamic_sampling_max_rounds=2,
        reward_weights=[1.0, -1.0],
    )
    with pytest.raises(RuntimeError, match=r"by length \+ length: 0 \(32 times\)"):
        cancelled.train()

    def opposite(**kwargs: Any) -> list[float]:
        return [-value for value in length(**kwargs)]

    both = make(
        tmp_path,
        [length, opposite],
        dynamic_sampling=True,
        dynamic_sampling_max_rounds=2,
        dynamic_sampling_reward="length",
    )
    with pytest.raises(RuntimeError, match="by length: "):
        both.train()


def test_equal_totals_are_equal_wherever_they_stand(tmp_path: Path) -> None:
    """0.1 + 0.2 + 0.4 in any order; in float32 the totals differ."""
    values = [(0.1, 0.2, 0.4), (0.4, 0.2, 0.1), (0.2, 0.4, 0.1), (0.4, 0.1, 0.2)]
    assert len({sum(torch.tensor(v)).item() for v in values}) > 1

    def part(which: int, completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [values[i % 4][which] for i in range(len(completion_ids))]

    funcs = [functools.partial(part, which) for which in range(3)]
    trainer = make(tmp_path, funcs, dynamic_sampling=True, dynamic_sampling_max_rounds=1)
    with pytest.raises(RuntimeError, match=r"0\.7 \(16 times\)"):
        trainer.train()


def test_completions_without_a_reward_do_not_count(tmp_path: Path) -> None:
    """Two that have one decide; the others keep an advantage of zero."""

    def partial(
        id: list[int], completion_ids: list[list[int]], **kwargs: Any
    ) -> list[float | None]:
        values: list[float | None] = list(reward(id, completion_ids))
        return [value if i % 4 < 2 else None for i, value in enumerate(values)]

    trainer = trained(tmp_path, partial, dynamic_sampling=True, max_steps=1)
    (batch,) = trainer.batches
    values, advantages = rewards_of(batch).view(-1, 4), batch["advantages"].view(-1, 4)
    assert bool((values[:, 0] != values[:, 1]).all())
    assert bool((advantages[:, :2] != 0).all())
    assert not advantages[:, 2:].any()


# The stream of replacements


def test_the_stream_repeats_no_prompt_until_all_were_drawn() -> None:
    stream = _ShuffledIndices(10, seed=3)
    passes = [[next(stream) for _ in range(10)] for _ in range(3)]
    assert all(sorted(indices) == list(range(10)) for indices in passes)
    assert passes[0] != passes[1] != passes[2] != list(range(10))
    again = _ShuffledIndices(10, seed=3)
    again.position = 13
    assert [next(again) for _ in range(10)] == passes[1][3:] + passes[2][:3]
    assert [next(_ShuffledIndices(10, 4)) for _ in range(10)] != passes[0]
    loader = torch.randperm(10, generator=torch.Generator().manual_seed(3)).tolist()
    assert passes[0] != loader


def test_a_batch_gets_a_prompt_again_only_when_there_is_no_other(tmp_path: Path) -> None:
    trainer = make(tmp_path, dynamic_sampling=True)
    trainer._indices.position = 20  # the next pass begins within this batch
    drawn = trainer._new_prompts(20, [])
    assert len(set(drawn)) == 20
    seen = dataset()["prompt"][:4]
    many = trainer._new_prompts(30, seen)
    assert sorted(many[:20]) == list(range(4, 24))
    assert len(many) == 30


def test_replacements_go_on_through_the_set(tmp_path: Path) -> None:
    trainer = trained(tmp_path, dynamic_sampling=True, max_steps=3)
    stream = _ShuffledIndices(24, seed=7)
    batches: list[list[list[int]]] = []
    for prompts in trainer.sampled:
        if len(prompts) == 16:
            batches.append([])
        batches[-1].append(prompts[::4])
    for batch in batches:
        seen = set(batch[0])
        for prompts in batch[1:]:
            for prompt in prompts:
                expected = next(stream)
                while expected in seen:
                    expected = next(stream)
                assert prompt == expected
                seen.add(prompt)
    assert stream.position == trainer._indices.position > 0


# Bad input


@pytest.mark.parametrize("rounds", [0, -1, 2.0, True, None])
def test_a_bad_bound_is_refused(tmp_path: Path, rounds: Any) -> None:
    with pytest.raises(ValueError, match=f"dynamic_sampling_max_rounds={rounds!r}.*at least 1"):
        GRPOConfig(**SETTINGS, output_dir=str(tmp_path), dynamic_sampling_max_rounds=rounds)


def test_a_judge_without_dynamic_sampling_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dynamic_sampling_reward='x' does nothing"):
        GRPOConfig(**SETTINGS, output_dir=str(tmp_path), dynamic_sampling_reward="x")


def test_the_defaults_are_trls_and_dapos(tmp_path: Path) -> None:
    config = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    assert config.dynamic_sampling is False
    assert config.dynamic_sampling_max_rounds == 10
    assert config.dynamic_sampling_reward is None


@pytest.mark.parametrize(
    ("name", "rewards"), [("rewrad", [reward, length]), ("length", [length] * 2)]
)
def test_an_unknown_or_ambiguous_judge_is_refused(
    tmp_path: Path, name: str, rewards: list[Any]
) -> None:
    with pytest.raises(ValueError, match=f"dynamic_sampling_reward='{name}'.*length"):
        make(tmp_path, rewards, dynamic_sampling=True, dynamic_sampling_reward=name)


def test_an_iterable_dataset_is_refused_with_the_reason(tmp_path: Path) -> None:
    data = dataset().to_iterable_dataset()
    assert isinstance(data, IterableDataset)
    with pytest.raises(ValueError, match=r"iterable train_dataset.*by index"):
        make(tmp_path, data=data, dynamic_sampling=True)
    trained(tmp_path, data=data, max_steps=1)  # without it TRL's support stays


def test_images_environments_and_tools_are_refused_with_the_reason(tmp_path: Path) -> None:
    trainer = make(tmp_path, dynamic_sampling=True)
    for name, value, text in (
        ("_is_vlm", True, "PreTrainedTokenizerFast|TokenizersBackend.*images"),
        ("environment_factories", {None: object}, "environment_factory"),
        ("tools", [print], "tools"),
    ):
        before = getattr(trainer, name)
        setattr(trainer, name, value)
        with pytest.raises(ValueError, match=text):
            trainer._check_dynamic_sampling()
        setattr(trainer, name, before)


# Rewards


class _Callable:
    def __call__(self, completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [1.0, math.nan, *[0.0] * (len(completion_ids) - 2)]


def _returning(value: Any) -> Any:
    def func(completion_ids: list[list[int]], **kwargs: Any) -> list[Any]:
        return [0.0, 1.0, 0.5, value, *[0.0] * (len(completion_ids) - 4)]

    return func


async def _async(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [0.0, math.inf, *[0.0] * (len(completion_ids) - 2)]


@pytest.mark.parametrize(
    ("func", "text"),
    [
        (_returning(math.nan), "'func' returned nan for completion 3 of 16"),
        (_returning(math.inf), "'func' returned inf for completion 3 of 16"),
        (_returning(-math.inf), "'func' returned -inf for completion 3"),
        (_returning(1e39), r"'func' returned 1e\+39 for completion 3.*float32"),
        (_returning(torch.tensor(math.nan)), "'func' returned nan for completion 3"),
        (
            lambda completion_ids, **kwargs: torch.full((16,), math.nan),
            "'<lambda>' .*nan.* 0 of 16",
        ),
        (_Callable(), "'_Callable' returned nan for completion 1"),
        (functools.partial(_returning(math.nan)), "'func' returned nan for completion 3"),
        (_async, "'_async' returned inf for completion 1 of 16"),
    ],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_reward_that_is_not_finite_stops_before_anything_is_trained(
    tmp_path: Path, func: Any, text: str, dynamic: bool
) -> None:
    trainer = make(tmp_path, [length, func], dynamic_sampling=dynamic)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(ValueError, match=f"{text}.*None where the function does not apply"):
        trainer.train()
    assert trainer.trained == []
    assert_same_params(trainer.model, before)


def test_none_still_means_does_not_apply(tmp_path: Path) -> None:
    trainer = trained(tmp_path, [length, _returning(None)], max_steps=1)
    assert trainer.logs[0]["rewards/func/mean"] == pytest.approx(1.5 / 15)


def test_the_callers_list_of_reward_functions_is_left_alone(tmp_path: Path) -> None:
    funcs = [reward, length]
    trainer = make(tmp_path, funcs)
    assert funcs == [reward, length]
    assert trainer.reward_func_names == ["reward", "length"]


def test_a_reward_model_that_is_not_finite_stops_too(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "llama", vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_labels=1, pad_token_id=PAD,
    )  # fmt: skip
    judge = AutoModelForSequenceClassification.from_config(config)
    judge.config._name_or_path = "some/judge"
    tokenizer: PreTrainedTokenizerBase = tiny_tokenizer()
    args = GRPOConfig(**{**SETTINGS, "output_dir": str(tmp_path), "max_steps": 1})

    def run() -> Any:
        trainer = GRPOTrainer(
            tiny_model(), [length, judge], args, dataset(), processing_class=tokenizer,
            reward_processing_classes=[None, tokenizer],
        )  # fmt: skip
        trainer.train()
        return trainer

    assert run().state.global_step == 1
    with torch.no_grad():
        judge.score.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="'judge' returned nan for completion 0 of 16"):
        run()


# Resume

CYCLES: dict[str, dict[str, Any]] = {
    # Two epochs of three generations, each trained on in 8 micro-batches, 4 optimizer steps.
    "cycles": {
        "num_iterations": 2, "steps_per_generation": 4, "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 8, "num_train_epochs": 2, "max_steps": -1,
    },
    # An epoch of 9 micro-batches: its last step accumulates one, not two.
    "remainder": {
        "num_iterations": 3, "gradient_accumulation_steps": 2, "steps_per_generation": 1,
        "per_device_train_batch_size": 32, "num_train_epochs": 2, "max_steps": -1,
    },
}  # fmt: skip


def final_state(folder: Path) -> dict[str, Any]:
    """Weights come from the trainer; this is the rest, from the last checkpoint."""
    last = max((folder / "run").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    return {
        "optimizer": torch.load(last / "optimizer.pt", weights_only=True),
        "sampling": torch.load(last / "sampling_state_0.pth", weights_only=True),
        "rng": torch.load(last / "rng_state.pth", weights_only=False)["cpu"],
    }


@pytest.mark.parametrize(
    ("kind", "dynamic"),
    [
        ("cycles", True),
        pytest.param("cycles", False, marks=pytest.mark.slow),
        pytest.param("remainder", True, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_one(
    tmp_path: Path, kind: str, dynamic: bool
) -> None:
    settings: dict[str, Any] = {
        **CYCLES[kind],
        "save_strategy": "steps",
        "save_steps": 1,
        "dynamic_sampling": dynamic,
        "beta": 0.05,
    }
    whole = trained(tmp_path / "whole", **settings)
    steps = whole.state.global_step
    assert whole.state.epoch == 2
    expected = final_state(tmp_path / "whole")
    accumulation = settings["gradient_accumulation_steps"]
    # Within a generation of either epoch, where one begins, and at the end.
    within = (steps // 2 - 3, steps // 2 + 1)
    settings["save_steps"] = steps
    for step in (*within, steps // 2, steps - 1) if dynamic else within:
        folder = tmp_path / f"from{step}"
        checkpoint = f"checkpoint-{step}"
        shutil.copytree(tmp_path / "whole" / "run" / checkpoint, folder / "run" / checkpoint)
        torch.manual_seed(step)  # whatever it is
        resumed = trained(folder, resume=str(folder / "run" / checkpoint), **settings)
        assert_same_params(resumed.model, whole.model)
        assert_same_tree(final_state(folder), expected)
        assert_same_tree(resumed.trained, whole.trained[-len(resumed.trained) :])
        assert len(whole.trained) - len(resumed.trained) <= step * accumulation
        losses = [log for log in whole.logs if "loss" in log][step:]
        for log, wanted in zip([log for log in resumed.logs if "loss" in log], losses, strict=True):
            assert {k: v for k, v in log.items() if "time" not in k} == {
                k: v for k, v in wanted.items() if "time" not in k
            }


def test_trl_itself_does_not_resume_like_this(tmp_path: Path) -> None:
    """What this is for; when it fails, TRL has mended it."""
    settings = {**CYCLES["cycles"], "save_strategy": "steps", "save_steps": 1, "max_steps": 6}
    whole = trained(tmp_path, cls=TRLs, **settings)
    resumed = trained(tmp_path, cls=TRLs, resume=str(tmp_path / "run" / "checkpoint-5"), **settings)
    assert rows(resumed.trained[-1]) != rows(whole.trained[-1])


def test_a_checkpoint_keeps_completions_only_while_they_are_needed(tmp_path: Path) -> None:
    settings = {**CYCLES["cycles"], "save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    trained(tmp_path, dynamic_sampling=True, **settings)
    for step in range(1, 5):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        assert not list(folder.glob("*.tmp"))
        state = torch.load(folder / "sampling_state_0.pth", weights_only=True)
        assert (state["inputs"] is None) == (step == 4)
        assert state["position"] > 0
        assert state["layout"]["step"] == 2 * step


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trained(tmp_path, max_steps=1)
    (tmp_path / "saved").mkdir()
    trainer._save_optimizer_and_scheduler(str(tmp_path / "saved"))
    path = tmp_path / "saved" / "sampling_state_0.pth"
    before = path.read_bytes()

    def broken(state: Any, target: Any, **kwargs: Any) -> None:
        Path(target).write_bytes(b"half")
        if "sampling" in str(target):
            raise OSError("disk full")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        trainer._save_optimizer_and_scheduler(str(tmp_path / "saved"))
    assert path.read_bytes() == before


def test_a_checkpoint_that_does_not_fit_is_said_and_trains_on(tmp_path: Path) -> None:
    settings = {**CYCLES["cycles"], "save_strategy": "steps", "save_steps": 1, "max_steps": 5}
    trained(tmp_path, **settings)
    checkpoint = tmp_path / "run" / "checkpoint-1"
    with pytest.warns(longact.LongActWarning, match="no completions that fit.*they are of"):
        other = trained(
            tmp_path / "other", resume=str(checkpoint), **{**settings, "num_iterations": 3}
        )
    assert other.state.global_step == 5
    (checkpoint / "sampling_state_0.pth").unlink()
    with pytest.warns(longact.LongActWarning, match="no completions that fit"):
        missing = trained(tmp_path / "missing", resume=str(checkpoint), **settings)
    assert missing.state.global_step == 5
    # Nothing is missed where a new generation begins.
    boundary = tmp_path / "run" / "checkpoint-4"
    (boundary / "sampling_state_0.pth").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error", longact.LongActWarning)
        trained(tmp_path / "boundary", resume=str(boundary), **settings)


# Several processes


def _rank(rank: int, folder: str) -> None:
    warnings.simplefilter("ignore", FutureWarning)
    common: dict[str, Any] = {
        "dynamic_sampling": True, "ddp_find_unused_parameters": False, "ddp_timeout": 120,
    }  # fmt: skip
    result: dict[str, Any] = {}

    def keep(name: str, trainer: Any) -> None:
        result[name] = {
            "sampled": trainer.sampled,
            "batches": trainer.batches,
            "trained": trainer.trained,
            "params": {n: p.detach().clone() for n, p in trainer.model.named_parameters()},
            "logs": [{k: v for k, v in log.items() if "time" not in k} for log in trainer.logs],
            "position": trainer._indices.position,
        }

    # Groups of 2 on ranks of 3: the middle group lies on both.
    pairs: dict[str, Any] = {
        "per_device_train_batch_size": 3, "num_generations": 2, "num_iterations": 3,
        "max_steps": 9, "save_strategy": "steps", "save_steps": 1,
    }  # fmt: skip
    whole = trained(Path(folder), **common, **pairs)
    keep("pairs", whole)
    for step in (3, 4):
        path = f"{folder}/run/checkpoint-{step}"
        resumed = trained(Path(folder) / f"from{step}", resume=path, **common, **pairs)
        keep(f"from{step}", resumed)
    threes = {"per_device_train_batch_size": 6, "num_generations": 3, "max_steps": 4}
    keep("threes", trained(Path(folder) / "threes", **common, **threes))
    # One process's file is lost: both begin anew, in the same place.
    lost = f"{folder}/run/checkpoint-4"
    torch.distributed.barrier()
    if rank == 1:
        os.unlink(f"{lost}/sampling_state_1.pth")
    torch.distributed.barrier()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        keep("lost", trained(Path(folder) / "lost", resume=lost, **common, **pairs))
    result["warned"] = [str(w.message) for w in caught if w.category is longact.LongActWarning]
    torch.save(result, f"{folder}/rank{rank}.pt")


def _together(ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Batches of all ranks as one: padded to the longest."""
    joined = []
    for parts in zip(*(rank["batches"] for rank in ranks), strict=True):
        batch: dict[str, Any] = {"num_items_in_batch": parts[0]["num_items_in_batch"]}
        for key in ("prompt", "completion"):
            for name in ("ids", "mask"):
                values = [part[f"{key}_{name}"] for part in parts]
                width = max(v.shape[1] for v in values)
                gaps = [
                    (width - v.shape[1], 0) if key == "prompt" else (0, width - v.shape[1])
                    for v in values
                ]
                batch[f"{key}_{name}"] = torch.cat(
                    [
                        torch.nn.functional.pad(v, gap, value=0)
                        for v, gap in zip(values, gaps, strict=True)
                    ]
                )
        batch["advantages"] = torch.cat([part["advantages"] for part in parts])
        joined.append(batch)
    return joined


@pytest.mark.slow
def test_two_processes_share_groups_and_resume(tmp_path: Path) -> None:
    start_trainer_ranks(2, _rank, str(tmp_path))
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in range(2)]
    for name, local, group, batches in (("pairs", 3, 2, 3), ("threes", 6, 3, 4), ("lost", 3, 2, 2)):
        both = [rank[name] for rank in ranks]
        # The same number of rounds, of the same size, on both.
        sizes = [[len(prompts) for prompts in rank["sampled"]] for rank in both]
        assert sizes[0] == sizes[1]
        assert len(sizes[0]) > batches
        assert both[0]["position"] == both[1]["position"] > 0
        joined = _together(both)
        assert len(joined) == batches
        for batch in joined:
            check_batch(batch, 2 * local, group)
            grouped = rewards_of(batch).view(-1, group)
            advantages = grouped - grouped.mean(1, keepdim=True)
            advantages = (advantages / (grouped.std(1, keepdim=True) + 1e-4)).flatten()
            torch.testing.assert_close(batch["advantages"], advantages, rtol=1e-4, atol=1e-4)
        for a, b in zip(both[0]["params"].values(), both[1]["params"].values(), strict=True):
            assert torch.equal(a, b)
    # One group of three cannot be shared by two ranks: two are sampled, and one is dropped.
    threes = [rank["threes"] for rank in ranks]
    assert {len(prompts) for prompts in threes[0]["sampled"]} == {6, 3}
    sampled = [a + b for a, b in zip(*(three["sampled"] for three in threes), strict=True)]
    for log in [log for log in threes[0]["logs"] if "loss" in log]:
        of_batch = [sampled.pop(0)[::3] for _ in range(int(log["dynamic_sampling/rounds"]))]
        distinct = {prompt for prompts in of_batch for prompt in prompts}
        assert len(distinct) == sum(map(len, of_batch))  # each rank has its own share
        good = [prompt not in HOPELESS for prompts in of_batch for prompt in prompts]
        assert log["dynamic_sampling/groups_kept"] == pytest.approx(sum(good) / len(good))
    assert not sampled
    for rank in ranks:
        whole = rank["pairs"]
        for step in (3, 4):
            resumed = rank[f"from{step}"]
            assert_same_tree(resumed["params"], whole["params"])
            assert_same_tree(resumed["trained"], whole["trained"][-len(resumed["trained"]) :])
            assert resumed["position"] == whole["position"]
            kept = [log for log in whole["logs"] if "loss" in log][step:]
            assert json.dumps([log for log in resumed["logs"] if "loss" in log]) == json.dumps(kept)
        assert any("no completions that fit" in text for text in rank["warned"])
