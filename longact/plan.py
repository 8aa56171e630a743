"""`python -m longact plan`: bytes of memory, communication and update of a step, before there is a
cluster.

Exact for what it counts (tests compare it with real ranks); not counted are activations, what FSDP2
gathers for the layers at work, buffers of the communication, and other parallelisms.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from longact.apply import LongAct, apply
from longact.delta_command import print_table
from longact.selection import selection_of

__all__ = ["MODELS", "Estimate", "Setup", "build", "estimate"]

#: Configurations by name, as their config.json on the hub has them.
MODELS: Mapping[str, Mapping[str, Any]] = {
    "smollm2-135m": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "qwen3-0.6b": {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024,
        "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
    },
    "qwen3-8b": {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096,
        "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
    },
    "qwen3-32b": {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 5120,
        "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
    },
    "qwen3-235b-a22b": {
        "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 4096,
        "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 94,
        "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
        "num_experts_per_tok": 8, "tie_word_embeddings": False,
    },
}  # fmt: skip
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Setup:
    """How a model is trained."""

    gpus: int = 8
    engine: Literal["fsdp", "ddp"] = "fsdp"  # FSDP2 of each layer and the root, or DDP
    shards: int | None = None  # FSDP2 over so many, and replicas of these (HSDP); None: over all
    compute_dtype: torch.dtype | None = None  # of FSDP2's MixedPrecisionPolicy; None: the weights'
    reduce_dtype: torch.dtype | None = None
    reshard_after_forward: bool = True
    row_hook: bool = False  # longact.distributed.allreduce_rows
    state: Literal["full", "compact"] = "full"  # of FusedMaskedAdam
    master_weights: bool = False
    moment_dtype: torch.dtype | None = None  # None: the weights', fp32 of 16-bit ones with masters

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise ValueError(f"gpus={self.gpus}: at least 1")
        if self.engine not in ("fsdp", "ddp"):
            raise ValueError(f"engine={self.engine!r}: 'fsdp' or 'ddp'")
        if self.shards is not None and (self.engine != "fsdp" or self.gpus % self.shards):
            raise ValueError(
                f"shards={self.shards}: of engine='fsdp', and a divisor of gpus={self.gpus}"
            )
        if self.row_hook and self.engine != "ddp":
            raise ValueError("row_hook=True: FSDP2 reduces whole gradients; engine='ddp' has hooks")


class Estimate(NamedTuple):
    """Bytes of one GPU (means over all of them) and one optimizer step."""

    parameters: float
    gradients: float
    moments: float
    masters: float
    ages: float  # of rows
    all_gather: float  # weights, of FSDP2: what the gathered buffers hold
    reduce_scatter: float  # gradients, of FSDP2: what goes into it
    all_reduce: float  # gradients, of DDP; of HSDP, among replicas
    selection: float  # the totals that rows are chosen from
    update: float  # memory that the optimizer's step reads and writes
    weight_sync: float  # to one inference engine: what the step changed

    @property
    def memory(self) -> float:
        return self.parameters + self.gradients + self.moments + self.masters + self.ages

    @property
    def communication(self) -> float:
        return self.all_gather + self.reduce_scatter + self.all_reduce + self.selection


class _Parameter(NamedTuple):
    shape: torch.Size
    dtype: torch.dtype
    is_trained: bool
    selected: int | None  # rows that a step trains; None: all
    is_compact: bool  # it holds these rows alone
    is_of_root: bool  # of none of the layers that fully_shard is called on

    def numel(self, rows: int) -> int:
        return self.shape.numel() // max(1, self.num_rows) * rows

    @property
    def num_rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def rows(self) -> int:
        return self.num_rows if self.selected is None else self.selected


def estimate(model: nn.Module, setup: Setup, handle: LongAct | None = None) -> Estimate:
    """Of a model, on any device, "meta" too.

    Args:
        model: a transformers model, in the dtype of its weights.
        setup: how it is trained.
        handle: of `longact.apply`; None: all rows of all parameters are trained, as by AdamW.

    Raises:
        ValueError: others="freeze" with FSDP2, which does not work.
    """
    if handle is not None and handle.config.is_compact and setup.engine == "fsdp":
        raise ValueError("others='freeze' works with DDP, not with FSDP2: engine='ddp'")
    shards = (setup.shards or setup.gpus) if setup.engine == "fsdp" else 1
    total = dict.fromkeys(Estimate._fields, 0.0)
    for p in _parameters(model, handle):
        itemsize = p.dtype.itemsize
        total["parameters"] += p.numel(p.num_rows) * itemsize / shards
        padded = p.numel(-(-p.num_rows // shards) * shards)
        computes = setup.compute_dtype or p.dtype
        if shards > 1:
            # Before the forward, and before the backward of what it threw away.
            times = 2 if setup.reshard_after_forward and not p.is_of_root else 1
            total["all_gather"] += times * padded * computes.itemsize
        if not p.is_trained:
            continue
        numel, updated = p.numel(p.num_rows), p.numel(p.rows)
        total["gradients"] += numel * itemsize / shards
        reduced = (setup.reduce_dtype or computes).itemsize
        if shards > 1:
            total["reduce_scatter"] += padded * reduced
        if setup.engine == "fsdp" and setup.gpus > shards:
            total["all_reduce"] += padded * reduced / shards
        elif setup.engine == "ddp" and setup.gpus > 1:
            total["all_reduce"] += (updated if setup.row_hook else numel) * itemsize
        is_half = p.dtype.itemsize == 2
        moment = (setup.moment_dtype or (torch.float32 if is_half else p.dtype)).itemsize
        master = 4 if setup.master_weights and is_half else 0
        kept_rows = p.rows if setup.state == "compact" or p.is_compact else p.num_rows
        total["moments"] += 2 * p.numel(kept_rows) * moment / shards
        total["masters"] += p.numel(kept_rows) * master / shards
        ages = 4 if p.selected is not None else 0
        total["ages"] += kept_rows * ages / shards
        # It reads gradient, moments and weight (or master), and writes all but the gradient.
        per_element = itemsize + 4 * moment + (2 * master + itemsize if master else 2 * itemsize)
        total["update"] += (updated * per_element + 2 * p.rows * ages) / shards
        total["weight_sync"] += updated * itemsize
    if handle is not None and setup.gpus > 1:
        # fp64: each channel's total, and the number of tokens.
        channels = [layer.weight.shape[0] + 1 for layer in handle.projections.values()]
        total["selection"] = 8.0 * sum(channels)
    return Estimate(**total)


def _parameters(model: nn.Module, handle: LongAct | None) -> Iterator[_Parameter]:
    layers = {id(p) for block in _blocks(model) for p in block.parameters()}
    for param in model.parameters():
        selection = selection_of(param) if handle is not None else None
        yield _Parameter(
            param.shape,
            param.dtype,
            param.requires_grad,
            None if selection is None else selection.num_chosen,
            selection is not None
            and selection.is_compact
            and param.shape[0] == selection.num_chosen,
            id(param) not in layers,
        )


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The decoder's layers: the longest list of modules that is in no other, as experts are."""
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{n}.") for n in lists):
            lists[name] = module
    yield from max(lists.values(), key=len, default=())


def build(name: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A transformers model on the "meta" device: no memory, no weights.

    `name`: one of `MODELS`, or a folder with a config.json.

    Raises:
        ValueError: neither.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if name in MODELS:
        config = AutoConfig.for_model(**MODELS[name])
    elif (Path(name) / "config.json").is_file():
        config = AutoConfig.from_pretrained(name)
    else:
        raise ValueError(
            f"model={name!r}: give one of {', '.join(MODELS)}, or a folder with a config.json"
        )
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


# ---- the command ---------------------------------------------------------------------------------


def add_command(commands: Any) -> None:
    """Adds `plan` to argparse's subparsers."""
    parser = commands.add_parser(
        "plan",
        help="bytes of memory and communication of a step, on so many GPUs",
        description="Bytes of one GPU and one optimizer step, of FusedMaskedAdam with all rows and "
        "with LongAct. Not counted: activations, what FSDP2 gathers at once, and buffers of the "
        "communication.",
    )
    parser.add_argument("model", help=f"{', '.join(MODELS)}, or a folder with a config.json")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--engine", choices=["fsdp", "ddp"], default="fsdp", help="FSDP2 or DDP")
    parser.add_argument("--shards", type=int, help="of FSDP2; the other GPUs have replicas (HSDP)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights")
    parser.add_argument("--reduce-dtype", choices=DTYPES, help="of FSDP2's gradient sums")
    parser.add_argument("--keep-ratio", type=float, default=0.3)
    parser.add_argument("--others", choices=["train", "freeze"], default="train")
    parser.add_argument("--state", choices=["full", "compact"], default="full")
    parser.add_argument("--master-weights", action="store_true")
    parser.add_argument("--row-hook", action="store_true", help="DDP reduces selected rows alone")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Errors of its user are one line, and exit code 2."""
    try:
        _print(arguments)
    except ValueError as error:
        print(f"longact plan: {error}", file=sys.stderr)
        sys.exit(2)
    except ImportError as error:
        print(f"longact plan needs transformers: {error}", file=sys.stderr)
        sys.exit(2)


def _print(arguments: argparse.Namespace) -> None:
    setup = Setup(
        gpus=arguments.gpus,
        engine=arguments.engine,
        shards=arguments.shards,
        reduce_dtype=DTYPES.get(arguments.reduce_dtype),
        row_hook=arguments.row_hook,
        state=arguments.state,
        master_weights=arguments.master_weights,
    )
    model = build(arguments.model, DTYPES[arguments.dtype])
    count = sum(p.numel() for p in model.parameters())
    plain = estimate(model, replace(setup, state="full", row_hook=False))
    handle = apply(model, arguments.keep_ratio, others=arguments.others)
    ours = estimate(model, setup, handle)
    print(
        f"{arguments.model}: {count / 1e9:.2f} B parameters in {arguments.dtype}, {setup.gpus} "
        f"GPUs, {setup.engine.upper()}; GB of each GPU and step"
    )
    print_table(
        ["", "all rows", "LongAct", "ratio"],
        [
            [text, f"{a / 1e9:.3f}", f"{b / 1e9:.3f}", f"{b / a:.3f}" if a else "-"]
            for text, a, b in _lines(plain, ours)
        ],
    )


def _lines(plain: Estimate, ours: Estimate) -> Iterator[tuple[str, float, float]]:
    for name in ("memory", *Estimate._fields[:5], "communication", *Estimate._fields[5:]):
        a, b = getattr(plain, name), getattr(ours, name)
        if a or b:
            yield name.replace("_", " "), a, b
