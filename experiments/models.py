"""Small transformers, pretrained here on recall: where the experiments start from."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen3Config

from experiments.store import key_of
from experiments.tasks import BOS, EOS, PAD, WORDS, draw, make_tokenizer

__all__ = ["Pretraining", "checkpoint", "pretrain"]

ID = {word: i for i, word in enumerate(WORDS)}


@dataclass(frozen=True)
class Pretraining:
    """A model and how it is pretrained.

    First a model of `first_layers` learns on short contexts, without filler, to look a key up. That
    comes all at once, after some 1,000 steps, where there are few layers and the rotations are fast
    (docs/results.md); so the other layers, and the slow rotations that long contexts need, come
    after it. Then that model learns the tasks.
    """

    seed: int = 0
    architecture: Literal["llama", "qwen3"] = "qwen3"
    layers: int = 4
    first_layers: int = 2
    width: int = 64
    heads: int = 2
    kv_heads: int = 2
    rope_theta: float = 10_000.0
    first_rope_theta: float = 100.0
    learning_rate: float = 1e-3
    first_loss: float = 0.3  # ends the first part; guessing among the values seen has 1.7
    first_steps: int = 5000  # at most
    steps: int = 2000
    tokens: int = 3000  # of a step
    lengths: tuple[int, ...] = (32, 64, 128)
    one_hop: float = 0.6  # share of the examples; the others have two
    questions: int = 16  # asked about an example, at most
    examples: int = 128  # of each evaluation of what was learned


FIRST_LENGTH = 26  # words: 12 facts and a question


def build(spec: Pretraining, layers: int, rope_theta: float) -> PreTrainedModel:
    """The model with random weights, fp32, on the CPU."""
    cls = {"llama": LlamaConfig, "qwen3": Qwen3Config}[spec.architecture]
    config = cls(
        vocab_size=len(WORDS),
        hidden_size=spec.width,
        intermediate_size=2 * spec.width,
        num_hidden_layers=layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        head_dim=spec.width // spec.heads,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        initializer_range=0.64 * spec.width**-0.5,  # with the usual 0.02 attention starts flat
        pad_token_id=ID[PAD],
        bos_token_id=ID[BOS],
        eos_token_id=ID[EOS],
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def batch(
    rng: random.Random, examples: int, length: int, hops: int, filler: float, questions: int
) -> tuple[Tensor, Tensor]:
    """Ids and labels, int64 `[examples, words]`, padded at the end; answers alone have labels."""
    ids, labels = [], []
    for _ in range(examples):
        context, asked = draw(rng, length, hops, filler=filler, questions=questions)
        words = [*context, *itertools.chain.from_iterable(asked)]
        is_answer = torch.zeros(len(words), dtype=torch.bool)
        is_answer[len(context) + 1 :: 2] = True
        ids.append(torch.tensor([ID[word] for word in words]))
        labels.append(ids[-1].where(is_answer, -100))
    pad = nn.utils.rnn.pad_sequence
    return pad(ids, batch_first=True), pad(labels, batch_first=True, padding_value=-100)


def pretrain(spec: Pretraining, device: str = "cpu") -> PreTrainedModel:
    """The trained model.

    Raises:
        RuntimeError: to look a key up was not learned within `first_steps`.
    """
    torch.manual_seed(spec.seed)
    rng = random.Random(spec.seed)
    small = build(spec, spec.first_layers, spec.first_rope_theta).to(device)
    mean = 9.0
    first = _train(small, spec, lambda: batch(rng, 32, FIRST_LENGTH, 0, 0.0, 12))
    for loss in itertools.islice(first, spec.first_steps):
        mean = 0.9 * mean + 0.1 * loss
        if mean < spec.first_loss:
            break
    else:
        raise RuntimeError(
            f"seed {spec.seed}: a loss of {mean:.2f} after {spec.first_steps} steps: to look "
            "a key up was not learned; take another seed, or more first_steps"
        )
    model = build(spec, spec.layers, spec.rope_theta).to(device)
    model.load_state_dict(small.state_dict(), strict=False)
    for layer in model.base_model.layers[spec.first_layers :]:  # they begin as the identity
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)

    def mixed() -> tuple[Tensor, Tensor]:
        length = rng.choice(spec.lengths)
        hops = 0 if rng.random() < spec.one_hop else 1
        examples = max(1, spec.tokens // (length + 2 * min(spec.questions, length // 4)))
        return batch(rng, examples, length, hops, 0.5, spec.questions)

    for _ in _train(model, spec, mixed, spec.steps):
        pass
    return model


def _train(
    model: PreTrainedModel,
    spec: Pretraining,
    draw_batch: Callable[[], tuple[Tensor, Tensor]],
    steps: int | None = None,
) -> Iterator[float]:
    """Yields the loss of each step; the learning rate falls to zero in the latter half of `steps`,
    or stays."""
    optimizer = torch.optim.AdamW(
        model.parameters(), spec.learning_rate, (0.9, 0.98), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, step / 50, 2 - 2 * step / steps if steps else 1)
    )
    model.train()
    for _ in range(steps) if steps else itertools.count():
        ids, labels = draw_batch()
        loss = model(ids.to(model.device), labels=labels.to(model.device)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield loss.item()


def checkpoint(base: Mapping[str, Any], folder: Path, device: str = "cpu") -> str:
    """The path of the model to start from, which is pretrained where `folder` lacks it.

    `base`: the fields of a `Pretraining`; or {"model": a path, a name on the hub, or "smollm2",
    which comes from a package (examples/export_smollm2.py)}.
    """
    name = base.get("model")
    if name not in (None, "smollm2"):
        return str(name)
    path = folder / (name or key_of("pretrain", base))
    if not path.exists():
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")
        if name is None:
            model = pretrain(Pretraining(**base), device)
            model.save_pretrained(unfinished)
            make_tokenizer().save_pretrained(unfinished)
        else:
            script = Path(__file__).parents[1] / "examples" / "export_smollm2.py"
            subprocess.run([sys.executable, script, unfinished], check=True)
        try:
            unfinished.rename(path)
        except OSError:
            if not path.exists():
                raise
            shutil.rmtree(unfinished)  # another worker was faster
    return str(path)
