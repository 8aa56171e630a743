"""Tiny models, tokenizers and data for real Hugging Face and TRL trainers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from models import PAD, VOCAB, tiny_model, token_ids
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

import longact


def tiny_tokenizer() -> Any:
    """Words w3 to w63, and the special tokens of `tiny_model`."""
    words = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(3, VOCAB))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<bos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def words(ids: torch.Tensor) -> str:
    return " ".join(f"w{i}" for i in ids.tolist())


def prompts(count: int, *, longest: int = 12, seed: int = 0) -> Dataset:
    """Texts of different lengths."""
    ids = token_ids(count, longest, seed=seed)
    return Dataset.from_dict({"prompt": [words(row[: 4 + i % 7]) for i, row in enumerate(ids)]})


def texts(count: int, *, longest: int = 14, seed: int = 0) -> Dataset:
    ids = token_ids(count, longest, seed=seed)
    return Dataset.from_dict({"text": [words(row[: 5 + i % 9]) for i, row in enumerate(ids)]})


def padded(count: int, *, side: str = "right", longest: int = 12, seed: int = 0) -> Dataset:
    """input_ids, attention_mask and labels for a plain Trainer."""
    rows = []
    for i, row in enumerate(token_ids(count, longest, seed=seed)):
        real, pad = row[: 5 + i % 7].tolist(), [PAD] * (longest - 5 - i % 7)
        mask, gap, ignored = [1] * len(real), [0] * len(pad), [-100] * len(pad)
        rows.append(
            {
                "input_ids": real + pad if side == "right" else pad + real,
                "attention_mask": mask + gap if side == "right" else gap + mask,
                "labels": real + ignored if side == "right" else ignored + real,
            }
        )
    return Dataset.from_list(rows)


def parity(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """A reward that differs within almost every group."""
    return [sum(i % 2 for i in ids) / max(1, len(ids)) for ids in completion_ids]


SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "per_device_train_batch_size": 4,
    "max_steps": 6,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "seed": 7,
}


def make_trainer(
    kind: str,
    folder: Path,
    *,
    model: Any = None,
    data: Dataset | None = None,
    eval_dataset: Dataset | None = None,
    callbacks: list[TrainerCallback] | None = None,
    optimizers: Any = (None, None),
    reward: Callable[..., list[float]] = parity,
    **settings: Any,
) -> Trainer:
    """A transformers.Trainer ("trainer"), trl.SFTTrainer ("sft") or trl.GRPOTrainer ("grpo")."""
    model = tiny_model() if model is None else model
    options = {**SETTINGS, "output_dir": str(folder), **settings}
    common = {
        "model": model,
        "eval_dataset": eval_dataset,
        "callbacks": callbacks,
        "optimizers": optimizers,
    }
    if kind == "trainer":
        return Trainer(
            args=TrainingArguments(**options), train_dataset=data or padded(64), **common
        )
    import trl

    common["processing_class"] = tiny_tokenizer()
    if kind == "sft":
        args = trl.SFTConfig(**{"max_length": 32, **options})
        return trl.SFTTrainer(args=args, train_dataset=data or texts(64), **common)
    assert kind == "grpo"
    args = trl.GRPOConfig(**{"num_generations": 4, "max_completion_length": 6, **options})
    return trl.GRPOTrainer(
        args=args, train_dataset=data or prompts(64), reward_funcs=reward, **common
    )


def state_of(trainer: Trainer, handle: longact.LongAct) -> dict[str, Any]:
    """Everything that a resumed run must have like an uninterrupted one, on the host."""
    optimizer = trainer.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    return {
        "model": {k: v.clone() for k, v in trainer.model.state_dict().items()},
        "optimizer": inner.state_dict(),
        "longact": handle.state_dict(),
    }
