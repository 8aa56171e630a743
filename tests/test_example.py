"""The example on a tiny random model, with the real model's tokenizer."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import smollm2

EXAMPLE = Path(__file__).parent.parent / "examples" / "finetune_recall.py"

pytestmark = [pytest.mark.slow, smollm2.needs_smollm2]


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
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = smollm2.tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def reload_here(example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a new process would run, here: another test has one. Were longact imported, it would be
    back in sys.modules."""

    def run(command: list[Any], **options: Any) -> SimpleNamespace:
        interpreter, option, code, *arguments = command
        assert (interpreter, option) == (sys.executable, "-c")
        out = io.StringIO()
        with monkeypatch.context() as patch, contextlib.redirect_stdout(out):
            patch.delitem(sys.modules, "longact")
            patch.setattr(sys, "argv", ["-c", *arguments])
            exec(code, {"__name__": "__main__"})
        return SimpleNamespace(returncode=0, stdout=out.getvalue())

    monkeypatch.setattr(example, "subprocess", SimpleNamespace(run=run, PIPE=None))


SMALL = ["--steps", "2", "--eval-prompts", "4", "--context-tokens", "300", "--keys", "4"]


@pytest.mark.parametrize("state", ["full", "compact"])
def test_only_selected_rows_change_and_the_checkpoint_reloads(
    example: Any, tiny: Path, tmp_path: Path, state: str, request: pytest.FixtureRequest
) -> None:
    if state != "full":
        request.getfixturevalue("reload_here")
    arguments = ["--model", str(tiny), "--output", str(tmp_path / "out"), "--state", state]
    result = example.main([*SMALL, *arguments])
    assert len(result["losses"]) == 2
    assert len(result["rows"]) == 4
    for name, rows in result["rows"].items():
        assert 0 < rows["changed"] <= rows["used"] < rows["rows"], name
    assert result["reload_difference"] <= 1e-3
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.usefixtures("reload_here")
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
