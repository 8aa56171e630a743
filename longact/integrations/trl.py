"""What TRL's GRPO lacks: DAPO's dynamic sampling, exact resume, rewards that must be finite.

from longact.integrations.trl import GRPOConfig, GRPOTrainer  # were trl.GRPOConfig, trl.GRPOTrainer

Both are drop-in: without `dynamic_sampling` a run equals TRL's bit for bit.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import trl
from accelerate.utils import gather_object, send_to_device
from datasets import IterableDataset
from torch import Tensor, nn
from trl.trainer.utils import is_async_callable

from longact.selection import LongActWarning

__all__ = ["GRPOConfig", "GRPOTrainer", "NothingToLearnError"]

#: One process's share of what a checkpoint must keep beside TRL's own files.
_STATE_NAME = "sampling_state_{}.pth"


class NothingToLearnError(RuntimeError):
    """No group of a batch has different rewards, in as many rounds as were allowed."""


@dataclass
class GRPOConfig(trl.GRPOConfig):  # type: ignore[misc]
    """`trl.GRPOConfig`, and:

    dynamic_sampling: replace groups whose rewards are all equal by groups of new prompts (DAPO,
        arXiv 2503.14476, section 3.2 and eq. 11), so that every group of a batch has a gradient.
    dynamic_sampling_max_rounds: rounds of generation for one batch, the first included; at the
        bound the batch is filled up with copies of the groups that have different rewards.
    dynamic_sampling_reward: name of the reward function to judge by; None: the weighted total.
        DAPO judges by accuracy alone: a length penalty makes equal answers look different.
    """

    dynamic_sampling: bool = field(
        default=False,
        metadata={
            "help": "Whether to replace groups whose rewards are all equal by groups of new "
            "prompts (dynamic sampling, DAPO, arXiv 2503.14476), in training only."
        },
    )
    dynamic_sampling_max_rounds: int = field(
        default=10,
        metadata={
            "help": "Rounds of generation for one batch, the first included. At the bound the "
            "batch is filled up with copies of its groups that have different rewards."
        },
    )
    dynamic_sampling_reward: str | None = field(
        default=None,
        metadata={
            "help": "Name of the reward function by which dynamic sampling judges a group; by "
            "default the weighted total of all of them."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        rounds = self.dynamic_sampling_max_rounds
        if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
            raise ValueError(
                f"dynamic_sampling_max_rounds={rounds!r}: must be an integer of at least 1 "
                "(the first round of generation counts); DAPO's recipe has 10"
            )
        if self.dynamic_sampling_reward is not None and not self.dynamic_sampling:
            raise ValueError(
                f"dynamic_sampling_reward={self.dynamic_sampling_reward!r} does nothing while "
                "dynamic_sampling=False: set dynamic_sampling=True, or leave it out"
            )


class _Sample(NamedTuple):
    """One completion, as `trl.GRPOTrainer._generate` returns it; ids and masks are not padded."""

    example: dict[str, Any]  # the dataset's row
    prompt_ids: list[int]
    completion_ids: list[int]
    tool_mask: list[int] | None
    completion: Any  # text, or messages
    logprobs: list[float] | None
    columns: dict[str, Any]  # what reward functions passed to log_extra


class _Group(NamedTuple):
    """The completions of one prompt. Every process knows every group, but only its own samples."""

    rewards: Tensor  # [num_generations, reward functions], on the CPU
    samples: list[_Sample | None]
    owners: list[int]  # the process that holds each sample


class _Batch(NamedTuple):
    """A full batch, to take the place of one that TRL would generate and score."""

    generated: tuple[Any, ...]  # what `_generate` returns
    rewards: Tensor  # [samples of all processes, reward functions]


class _ShuffledIndices:
    """0 to size - 1 in random order, then in another order, and so on; the position is its state.

    Not the data loader's order for the same seed: a replacement should be another prompt.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed, self.position = size, seed, 0
        self._order: tuple[int, list[int]] = (-1, [])

    def __next__(self) -> int:
        passed, offset = divmod(self.position, self.size)
        if self._order[0] != passed:
            generator = torch.Generator().manual_seed(self.seed + 1 + passed)
            self._order = (passed, torch.randperm(self.size, generator=generator).tolist())
        self.position += 1
        return self._order[1][offset]


class GRPOTrainer(trl.GRPOTrainer):  # type: ignore[misc]
    """`trl.GRPOTrainer` with three additions. Takes `trl.GRPOConfig` too (no dynamic sampling).

    1. `GRPOConfig.dynamic_sampling`. After a training batch is scored, groups whose rewards are all
       equal, or that have fewer than two completions with a reward, are replaced by groups of new
       prompts from a shuffled stream over `train_dataset`, generated and scored likewise, until
       every group has different rewards or `dynamic_sampling_max_rounds` is reached. Then TRL
       builds the batch from these completions (padding, masks, advantages, log-probabilities), so
       whatever its options are, they apply to the final batch. Evaluation is left alone.
       TRL's `reward`, `rewards/*`, `reward_std` and its table of completions describe the batch
       that is trained on; `completions/*` the first round; besides:
         dynamic_sampling/rounds         rounds of generation
         dynamic_sampling/groups_kept    of the groups sampled, the share with different rewards
         dynamic_sampling/groups_copied  of the batch's groups, the share that are copies
         dynamic_sampling/reward         mean total reward of everything sampled
    2. A run resumed from any checkpoint equals the uninterrupted one: each process keeps the
       completions that later steps still train on, and the stream's position, in the checkpoint;
       the data order of later epochs is restored. (With `sync_ref_model` it does not: TRL's
       checkpoints lack the reference.)
    3. A reward that is NaN or infinite is a ValueError, before anything is trained on it.

    Raises ValueError for what dynamic sampling cannot do: an iterable dataset, a processor of
    images, `environment_factory`, `tools`, a `dynamic_sampling_reward` that names no function.
    """

    reward_funcs: list[Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # A list of our own: TRL's is the caller's.
        self.reward_funcs = [
            func if isinstance(func, nn.Module) else _checked(func, name)
            for func, name in zip(self.reward_funcs, self.reward_func_names, strict=True)
        ]
        # trl.GRPOConfig has no such field.
        self.dynamic_sampling = getattr(self.args, "dynamic_sampling", False)
        self._batch: _Batch | None = None
        self._train_sampler: Any = None
        self._warned_of_copies = False
        if self.dynamic_sampling:
            self._check_dynamic_sampling()
            self._prompts = self._remove_unused_columns(self.train_dataset, "training")
            self._indices = _ShuffledIndices(len(self._prompts), self.args.seed)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        self._train_sampler = super()._get_train_sampler(*args, **kwargs)
        return self._train_sampler

    # Dynamic sampling

    def _check_dynamic_sampling(self) -> None:
        cannot = "dynamic_sampling=True does not work with "
        if isinstance(self.train_dataset, IterableDataset):
            raise ValueError(
                f"{cannot}an iterable train_dataset: replacements are drawn by index. "
                "Pass a datasets.Dataset"
            )
        if self._is_vlm:
            raise ValueError(
                f"{cannot}processing_class={type(self.processing_class).__name__}: completions "
                "are put together from several rounds without their images. Pass a tokenizer"
            )
        if self.environment_factories is not None:
            raise ValueError(
                f"{cannot}environment_factory: whether a reset gives another prompt is the "
                "environment's to decide. Pass the prompts in train_dataset"
            )
        if self.tools:
            raise ValueError(f"{cannot}tools yet: use rollout_func, whose env_mask is kept")
        name = self.args.dynamic_sampling_reward
        if name is not None and self.reward_func_names.count(name) != 1:
            raise ValueError(
                f"dynamic_sampling_reward={name!r} must name one of the reward functions: "
                f"{', '.join(self.reward_func_names)}"
            )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not (self.dynamic_sampling and self.model.training):
            return super()._generate_and_score_completions(inputs)  # type: ignore[no-any-return]
        samples, rewards = self._sample_different(inputs)
        self._batch = _Batch(_generated(samples), rewards)
        self._pending_extra_logs.clear()
        for column in {column for sample in samples for column in sample.columns}:
            self._pending_extra_logs[column] = [sample.columns.get(column) for sample in samples]
        try:
            return super()._generate_and_score_completions(  # type: ignore[no-any-return]
                [sample.example for sample in samples]
            )
        finally:
            self._batch = None

    def _generate(self, prompts: list[Any]) -> Any:
        return super()._generate(prompts) if self._batch is None else self._batch.generated

    def _sample_different(self, inputs: list[dict[str, Any]]) -> tuple[list[_Sample], Tensor]:
        """Samples until every group has different rewards, or the bound is reached.

        Returns this process's `len(inputs)` samples, and the rewards of all processes' samples.
        """
        bound = self.args.dynamic_sampling_max_rounds
        sampled = self._sample_groups(inputs)
        # A group that is kept stays in its place; the other places are filled as groups come.
        places = [group if self._differs(group) else None for group in sampled]
        rounds = 1
        if None in places:
            seen = gather_object([example["prompt"] for example in inputs])
            while None in places and rounds < bound:
                more = self._sample_more(places.count(None), seen)
                empty = [i for i, group in enumerate(places) if group is None]
                for i, group in zip(empty, filter(self._differs, more), strict=False):
                    places[i] = group  # surplus groups are dropped
                sampled += more
                rounds += 1
        kept = [group for group in places if group is not None]
        if not kept:
            raise NothingToLearnError(self._nothing_differs(sampled))
        copies = itertools.cycle(kept)
        batch = [next(copies) if group is None else group for group in places]
        if len(kept) < len(places):
            self._warn_of_copies(len(kept), len(places))

        metrics = self._metrics["train"]
        metrics["dynamic_sampling/rounds"].append(rounds)
        share = sum(map(self._differs, sampled)) / len(sampled)
        metrics["dynamic_sampling/groups_kept"].append(share)
        metrics["dynamic_sampling/groups_copied"].append(1 - len(kept) / len(places))
        totals = torch.stack([self._total(group.rewards) for group in sampled])
        metrics["dynamic_sampling/reward"].append(totals.nanmean().item())
        rewards = torch.cat([group.rewards for group in batch])
        return self._exchange(batch, len(inputs)), rewards.to(self.accelerator.device)

    def _sample_more(self, count: int, seen: list[Any]) -> list[_Group]:
        """`count` groups of prompts that are not in `seen` (or the next number that divides)."""
        # Every process generates equally many completions; a group may lie on several.
        processes = self.accelerator.num_processes
        unit = processes // math.gcd(processes, self.num_generations)
        indices = self._new_prompts(math.ceil(count / unit) * unit, seen)
        local = len(indices) * self.num_generations // processes
        first = local * self.accelerator.process_index
        mine = range(first, first + local)
        inputs = [dict(self._prompts[indices[i // self.num_generations]]) for i in mine]
        # TRL's metrics are averages over batches: a round of a few groups would count as much.
        metrics = self._metrics["train"]
        self._metrics["train"] = defaultdict(list)
        try:
            return self._sample_groups(inputs)
        finally:
            self._metrics["train"] = metrics
            metrics["num_tokens"] = [self.state.num_input_tokens_seen]

    def _new_prompts(self, count: int, seen: list[Any]) -> list[int]:
        """Indices of the stream's next prompts, those in `seen` left out; adds them to `seen`."""
        indices: list[int] = []
        skipped = 0
        while len(indices) < count:
            index = next(self._indices)
            prompt = self._prompts[index]["prompt"]
            # Where the whole set is in this batch, a prompt comes again.
            if prompt in seen and skipped < self._indices.size:
                skipped += 1
                continue
            seen.append(prompt)
            indices.append(index)
        return indices

    def _sample_groups(self, inputs: list[dict[str, Any]]) -> list[_Group]:
        """One round: a completion for each of this process's `inputs`, scored.

        Returns the groups of all processes.
        """
        prompts = [example["prompt"] for example in inputs]
        generated = self._generate(prompts)
        prompt_ids, completion_ids, tool_masks, completions, logprobs, extra_fields, *_ = generated
        # As TRL does: what a rollout_func returns besides goes to the reward functions.
        for key, values in extra_fields.items():
            for i, example in enumerate(inputs):
                if not isinstance(values, list):
                    example[key] = values
                elif i < len(values):
                    example[key] = values[i]
        rewards = self._calculate_rewards(inputs, prompts, completions, completion_ids).cpu()
        columns = {
            name: values if len(values) == len(inputs) else [None] * len(inputs)
            for name, values in self._pending_extra_logs.items()
        }
        self._pending_extra_logs.clear()
        samples = [
            _Sample(
                example,
                prompt_ids[i],
                completion_ids[i],
                None if tool_masks is None else tool_masks[i],
                completions[i],
                None if logprobs is None else logprobs[i],
                {name: values[i] for name, values in columns.items()},
            )
            for i, example in enumerate(inputs)
        ]
        rank, groups = self.accelerator.process_index, []
        for start in range(0, len(rewards), self.num_generations):
            places = [divmod(i, len(inputs)) for i in range(start, start + self.num_generations)]
            groups.append(
                _Group(
                    rewards[start : start + self.num_generations],
                    [samples[i] if owner == rank else None for owner, i in places],
                    [owner for owner, _ in places],
                )
            )
        return groups

    def _total(self, rewards: Tensor) -> Tensor:
        """Weighted total of each completion, float64; NaN where no function applies.

        Added up in float64: the same rewards give the same total in whatever order they come.
        """
        total = torch.zeros(len(rewards), dtype=torch.float64)
        for weight, column in zip(self.reward_weights.tolist(), rewards.unbind(1), strict=True):
            total += weight * column.nan_to_num()
        return total.masked_fill(rewards.isnan().all(1), math.nan)

    def _judged(self, rewards: Tensor) -> Tensor:
        name = self.args.dynamic_sampling_reward
        if name is None:
            return self._total(rewards)
        return rewards[:, self.reward_func_names.index(name)]

    def _differs(self, group: _Group) -> bool:
        """Whether its completions have different rewards: by the judge, and in total.

        Rewards, not advantages: the mean of equal rewards is rounded.
        """
        return all(
            len(set(values[~values.isnan()].tolist())) > 1
            for values in (self._judged(group.rewards), self._total(group.rewards))
        )

    def _exchange(self, batch: list[_Group], local: int) -> list[_Sample]:
        """This process's samples, the `local` ones of its place, from whoever holds them."""
        rank = self.accelerator.process_index
        mine: dict[int, _Sample] = {}
        others: dict[int, _Sample] = {}
        complete = True
        pairs = (pair for group in batch for pair in zip(group.samples, group.owners, strict=True))
        for place, (sample, owner) in enumerate(pairs):
            target = place // local
            complete &= target == owner
            if sample is not None:
                (mine if target == rank else others)[place] = sample
        if not complete:  # on every process: all of them see the same owners
            for received in gather_object([others]):
                mine |= {place: s for place, s in received.items() if place // local == rank}
        return [mine[place] for place in sorted(mine)]

    def _warn_of_copies(self, kept: int, wanted: int) -> None:
        if self._warned_of_copies or not self.accelerator.is_main_process:
            return
        self._warned_of_copies = True
        warnings.warn(
            f"dynamic_sampling_max_rounds={self.args.dynamic_sampling_max_rounds} rounds of "
            f"generation gave {kept} groups with different rewards where a batch has {wanted}: it "
            "is filled up with copies of them. The metric dynamic_sampling/groups_copied counts "
            "them from now on; many mean that the prompts are too easy or too hard",
            LongActWarning,
            stacklevel=2,
        )

    def _nothing_differs(self, sampled: list[_Group]) -> str:
        judge = self.args.dynamic_sampling_reward or " + ".join(self.reward_func_names)
        values = torch.cat([self._judged(group.rewards) for group in sampled]).tolist()
        counts = Counter("None" if math.isnan(value) else f"{value:g}" for value in values)
        common = ", ".join(f"{value} ({n} times)" for value, n in counts.most_common(5))
        return (
            f"dynamic_sampling found no group with different rewards in {len(sampled)} groups of "
            f"{self.num_generations} completions (dynamic_sampling_max_rounds="
            f"{self.args.dynamic_sampling_max_rounds}). Rewards by {judge}: {common}. Nothing can "
            "be learned from them: take prompts that the model solves sometimes, a reward with "
            "partial credit, a larger num_generations or temperature; a larger "
            "dynamic_sampling_max_rounds if few prompts are of use; or dynamic_sampling=False"
        )

    # Rewards

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> Tensor:
        if self._batch is not None:
            return self._batch.rewards
        rewards: Tensor = super()._calculate_rewards(
            inputs, prompts, completions, completion_ids_list
        )
        # What a reward model returns is its reward: None is not among it.
        for i, func in enumerate(self.reward_funcs):
            if isinstance(func, nn.Module):
                _check_finite(rewards[:, i].tolist(), self.reward_func_names[i])
        return rewards

    # Resume

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        cycle = self.args.steps_per_generation * self.num_iterations
        state = {
            "layout": self._layout(),
            # Between two generations nothing is left to train on.
            "inputs": self._buffered_inputs if self._step % cycle else None,
            "position": self._indices.position if self.dynamic_sampling else 0,
        }
        os.makedirs(output_dir, exist_ok=True)
        path = os.path.join(output_dir, _STATE_NAME.format(self.accelerator.process_index))
        torch.save(state, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # trainer_state.json comes next, and says that all of the checkpoint is there.
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        # TRL starts its counter, and the order of the data, as in the first epoch.
        self._step, epoch = self._progress()
        sampler = self._train_sampler
        if sampler is not None and sampler.shuffle:
            for _ in range(epoch):
                torch.randperm(sampler.num_samples, generator=sampler.generator)

        path = os.path.join(checkpoint, _STATE_NAME.format(self.accelerator.process_index))
        state: dict[str, Any] = {}
        if os.path.isfile(path):
            state = torch.load(path, map_location="cpu", weights_only=True)
        # Every process must do the same: generation is collective.
        fits = state.get("layout") == self._layout()
        status = torch.tensor([fits, state.get("position", 0)], device=self.accelerator.device)
        fit, positions = self.accelerator.gather(status).view(-1, 2).unbind(1)
        if self.dynamic_sampling:
            self._indices.position = int(positions.max())
        inputs = state["inputs"] if fit.all() else None
        self._buffered_inputs = send_to_device(inputs, self.accelerator.device)
        cycle = self.args.steps_per_generation * self.num_iterations
        if not fit.all() and (self._step % cycle or self.dynamic_sampling):
            warnings.warn(
                f"{checkpoint} has no completions that fit {self._layout()}"
                f"{f': they are of {layout}' if (layout := state.get('layout')) else ''}. New ones "
                "are generated: the run goes on, but differs from one that was not interrupted",
                LongActWarning,
                stacklevel=2,
            )

    def _progress(self) -> tuple[int, int]:
        """Micro-batches trained so far, and finished epochs, by `Trainer`'s own reckoning."""
        accumulation = self.args.gradient_accumulation_steps
        if self._train_sampler is None:  # an iterable dataset: all is one epoch
            return self.state.global_step * accumulation, 0
        per_epoch = len(self._train_sampler) // self.args.generation_batch_size
        epoch, updates = divmod(self.state.global_step, max(1, math.ceil(per_epoch / accumulation)))
        return epoch * per_epoch + updates * accumulation, epoch

    def _layout(self) -> dict[str, int]:
        """What completions in a checkpoint depend on."""
        names = ("per_device_train_batch_size", "steps_per_generation", "num_iterations")
        return {
            "step": self._step,
            "processes": self.accelerator.num_processes,
            "num_generations": self.num_generations,
            **{name: getattr(self.args, name) for name in names},
        }


def _generated(samples: Sequence[_Sample]) -> tuple[Any, ...]:
    """In the form in which `trl.GRPOTrainer._generate` returns it."""
    prompt_ids, completion_ids, tool_masks, completions, logprobs = (
        [getattr(sample, name) for sample in samples]
        for name in ("prompt_ids", "completion_ids", "tool_mask", "completion", "logprobs")
    )
    return (
        prompt_ids,
        completion_ids,
        None if tool_masks[0] is None else tool_masks,
        completions,
        None if logprobs[0] is None else logprobs,
        {},  # extra fields: in the examples already
        None,  # images
        [],  # images of tools
    )


def _checked(func: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The reward function, with an error where it returns NaN or an infinity."""

    @functools.wraps(func)
    def checked(*args: Any, **kwargs: Any) -> list[Any]:
        return _check_finite(func(*args, **kwargs), name)

    @functools.wraps(func)
    async def checked_async(*args: Any, **kwargs: Any) -> list[Any]:
        return _check_finite(await func(*args, **kwargs), name)

    return checked_async if is_async_callable(func) else checked


def _check_finite(rewards: Iterable[Any], name: str) -> list[Any]:
    """`rewards` as a list, each None or finite in float32, the type in which TRL keeps them."""
    checked = list(rewards)
    values = torch.tensor(
        [0.0 if reward is None else float(reward) for reward in checked], dtype=torch.float32
    )
    bad = (~values.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"the reward function {name!r} returned {float(checked[bad[0]])} for completion "
            f"{bad[0]} of {len(checked)}: a reward must be finite (in float32), or None where "
            "the function does not apply. Mend the function: nothing was trained on this"
        )
    return checked
