"""Parameter shapes of public models, from their published configurations.

`test_bench_update.py` compares each model's total with the one it is published with.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod


@dataclass(frozen=True)
class ParamShape:
    """One parameter; `masked`: longact trains its salient rows only (q_proj and k_proj)."""

    name: str
    shape: tuple[int, ...]
    masked: bool = False

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class ModelShape:
    """A decoder of the Llama family: what `config.json` says about the shapes of its parameters."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool  # lm_head shares the embedding's weight
    qk_norm: bool  # Qwen3's RMSNorm over each head of q and k

    def parameters(self) -> list[ParamShape]:
        """Every parameter, in the order of `model.parameters()`."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes = [ParamShape("embed_tokens", (self.vocab, self.hidden))]
        for layer in range(self.layers):
            prefix = f"layers.{layer}."
            shapes += [
                ParamShape(prefix + "q_proj", (q, self.hidden), masked=True),
                ParamShape(prefix + "k_proj", (kv, self.hidden), masked=True),
                ParamShape(prefix + "v_proj", (kv, self.hidden)),
                ParamShape(prefix + "o_proj", (self.hidden, q)),
            ]
            if self.qk_norm:
                shapes += [
                    ParamShape(prefix + "q_norm", (self.head_dim,)),
                    ParamShape(prefix + "k_norm", (self.head_dim,)),
                ]
            shapes += [
                ParamShape(prefix + "gate_proj", (self.intermediate, self.hidden)),
                ParamShape(prefix + "up_proj", (self.intermediate, self.hidden)),
                ParamShape(prefix + "down_proj", (self.hidden, self.intermediate)),
                ParamShape(prefix + "input_layernorm", (self.hidden,)),
                ParamShape(prefix + "post_attention_layernorm", (self.hidden,)),
            ]
        shapes.append(ParamShape("norm", (self.hidden,)))
        if not self.tied:
            shapes.append(ParamShape("lm_head", (self.vocab, self.hidden)))
        return shapes

    @property
    def numel(self) -> int:
        return sum(shape.numel for shape in self.parameters())

    def cut(self, max_elements: int) -> ModelShape:
        """Layers that fit into `max_elements`, at least one, and the same share of the vocabulary.

        So every kind of parameter keeps its share of the model.
        """
        if self.numel <= max_elements:
            return self
        layers = max(1, self.layers * max_elements // self.numel)
        return replace(self, layers=layers, vocab=self.vocab * layers // self.layers)


MODELS = {
    model.name: model
    for model in (
        # name, layers, hidden, intermediate, heads, kv_heads, head_dim, vocab
        ModelShape("smollm2-135m", 30, 576, 1536, 9, 3, 64, 49152, tied=True, qk_norm=False),
        ModelShape("qwen3-0.6b", 28, 1024, 3072, 16, 8, 128, 151936, tied=True, qk_norm=True),
        ModelShape("qwen3-4b", 36, 2560, 9728, 32, 8, 128, 151936, tied=True, qk_norm=True),
        ModelShape("qwen3-8b", 36, 4096, 12288, 32, 8, 128, 151936, tied=False, qk_norm=True),
        ModelShape("llama-3.1-8b", 32, 4096, 14336, 32, 8, 128, 128256, tied=False, qk_norm=False),
    )
}
