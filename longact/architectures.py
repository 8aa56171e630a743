"""Where the query and key projections are, by transformers' `config.model_type`."""

from __future__ import annotations

#: model_type -> last names of the q and k projections.
ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "gemma": ("q_proj", "k_proj"),
    "llama": ("q_proj", "k_proj"),  # SmolLM2, Llama 2 and 3, Yi, ... too
    "mistral": ("q_proj", "k_proj"),
    "olmo2": ("q_proj", "k_proj"),
    "qwen2": ("q_proj", "k_proj"),
    "qwen3": ("q_proj", "k_proj"),
}
