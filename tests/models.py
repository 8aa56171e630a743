"""Tiny random models of the supported architectures, and one training step on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import longact

# Those that take the same tiny configuration; test_architectures.py has all of them.
ARCHS = ["gemma", "llama", "mistral", "olmo2", "qwen2", "qwen3"]
# The projections of a tiny causal language model, in its own order.
Q0, K0 = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
Q1, K1 = "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"
QK = [Q0, K0, Q1, K1]
VOCAB = 64
PAD = 0


def tiny_model(arch: str = "llama", *, seed: int = 0, causal_lm: bool = True, **config: Any) -> Any:
    """Two layers, hidden 64, 4 heads and 2 key/value heads of 16; in training mode."""
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "use_cache": False,
        # Larger than the usual 0.02: attention then matters, and channels differ clearly.
        "initializer_range": 0.15,
        **config,
    }
    torch.manual_seed(seed)
    auto = AutoModelForCausalLM if causal_lm else AutoModel
    model = auto.from_config(AutoConfig.for_model(arch, **settings))
    for name, param in model.named_parameters():
        if name.endswith("bias"):
            # transformers starts them at zero, which would hide them.
            nn.init.normal_(param, std=0.1)
    return model.train()


def token_ids(batch: int = 2, length: int = 12, *, seed: int = 0) -> Tensor:
    """Random tokens without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)


def forward_backward(model: nn.Module, ids: Tensor, scale: float = 1.0, **inputs: Any) -> float:
    """Language-model loss on `ids`, and its gradients."""
    labels = ids
    if inputs.get("attention_mask") is not None and inputs["attention_mask"].dim() == 2:
        labels = ids.masked_fill(inputs["attention_mask"] == 0, -100)
    loss = model(input_ids=ids, labels=labels, **inputs).loss
    (loss * scale).backward()
    return float(loss.detach())


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, **inputs: Any
) -> float:
    loss = forward_backward(model, ids, **inputs)
    optimizer.step()
    optimizer.zero_grad()
    return loss


def adam(model: nn.Module, **options: Any) -> longact.FusedMaskedAdam:
    return longact.FusedMaskedAdam(
        model.parameters(), **{"lr": 1e-2, "weight_decay": 0.1, **options}
    )


def params_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same_params(model: nn.Module, expected: nn.Module | dict[str, Tensor]) -> None:
    """Bit for bit."""
    wanted = params_of(expected) if isinstance(expected, nn.Module) else expected
    got = params_of(model)
    assert got.keys() == wanted.keys()
    different = [name for name in got if not torch.equal(got[name], wanted[name])]
    assert different == []


def rows_of(handle: longact.LongAct) -> dict[str, list[int] | None]:
    return {name: None if r is None else r.tolist() for name, r in handle.rows.items()}


def changed_rows(before: Tensor, after: Tensor) -> list[int]:
    """Indices of the rows that differ in any bit."""
    differs = before.view(torch.int32) != after.view(torch.int32)
    return differs.reshape(before.shape[0], -1).any(1).nonzero().flatten().tolist()


def hooks_of(model: nn.Module) -> int:
    """How many forward hooks hang on the model."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
