"""`python -m longact inspect`: which channels of q and k are large, and which longact selects.

A text runs through the model once, without gradients. What each channel of q, k and v comes to is
counted as training counts it and ranked by the same code, also for the beginnings of the text, so
that one forward says how the selection depends on the context length. docs/inspect.md shows it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from longact.architectures import Attention, Heads, recognise
from longact.capture import Capture
from longact.kernels.channel_magnitude import channel_magnitude
from longact.kernels.topk_rows import topk_rows
from longact.selection import Candidates, Selection, SelectionConfig, refresh
from longact.targets import Matched, match_projections

__all__ = ["Channels", "Inspection", "add_command", "inspect_model"]

Kind = Literal["q", "k", "v"]
KINDS: tuple[Kind, ...] = get_args(Kind)

#: Shares of the channels, the largest ones, whose part of the summed |activation| is told.
TOP = (0.1, 0.3, 0.5)

#: Beginnings of a text, as shares of its tokens, whose selections are compared with the whole's.
BEGINNINGS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)

MIN_TOKENS = 32  # of a text: fewer have no beginnings to speak of


# ---- what is measured ----------------------------------------------------------------------------


@dataclass
class Channels:
    """q, k or v of one attention module."""

    heads: int
    magnitude: Tensor  # fp32 [channels], mean |activation|; heads side by side
    rows: Tensor  # int32: what is selected of `magnitude`'s channels; of v, what would be
    #: Between selections, in [0, 1]; None: there is nothing to compare with.
    neighbour_overlap: float | None = None  # with the same channels of the layer before
    head_overlap: float | None = None  # with the same channels of other heads, mean over pairs
    text_overlap: float | None = None  # of texts, mean over pairs
    context_overlap: tuple[float, ...] = ()  # of each of BEGINNINGS with the whole

    @property
    def head_dim(self) -> int:
        return len(self.magnitude) // self.heads

    def top_share(self, share: float) -> float:
        """Part of the summed |activation| in this share of the channels, the largest ones."""
        return self._part(topk_rows(self.magnitude, SelectionConfig(share).count(len(self))))

    def beginning_overlap(self, number: int) -> float:
        """`context_overlap` of one of BEGINNINGS."""
        return self.context_overlap[number]

    @property
    def selected_share(self) -> float:
        """Part of the summed |activation| in the selected channels."""
        return self._part(self.rows)

    @property
    def largest_over_median(self) -> float:
        return float(self.magnitude.max() / self.magnitude.median())

    def curve(self, points: int = 101) -> Tensor:
        """`top_share` of equally spaced shares from 0 to 1, fp64 `[points]`, interpolated."""
        ordered = self.magnitude.double().sort(descending=True).values
        sums = torch.cat((ordered.new_zeros(1), ordered.cumsum(0))) / ordered.sum()
        at = torch.linspace(0, len(ordered), points, dtype=torch.float64)
        low = at.long().clamp(max=len(ordered) - 1)
        return sums[low].lerp(sums[low + 1], at - low)

    def _part(self, rows: Tensor) -> float:
        return float(self.magnitude[rows.long()].double().sum() / self.magnitude.double().sum())

    def __len__(self) -> int:
        return len(self.magnitude)


#: A number of some Channels; None where they have none.
Measure = Callable[[Channels], float | None]


@dataclass
class Inspection:
    """What `inspect_model` found."""

    config: SelectionConfig
    tokens: dict[str, int]  # of each text
    layers: dict[str, dict[Kind, Channels]]  # qualified name of the attention module -> its own
    notes: list[str] = field(default_factory=list)

    def of(self, kind: Kind) -> list[Channels]:
        """In the order of the layers that have it."""
        return [channels[kind] for channels in self.layers.values() if kind in channels]

    @property
    def kinds(self) -> list[Kind]:
        return [kind for kind in KINDS if self.of(kind)]

    def mean(self, kind: Kind, value: Measure) -> float | None:
        """Over the layers that have a value."""
        return _mean(value(channels) for channels in self.of(kind))


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def inspect_model(
    model: nn.Module, texts: Mapping[str, Tensor], config: SelectionConfig | None = None
) -> Inspection:
    """Runs the texts through the model, and says which channels are large and selected.

    Args:
        model: a transformers model of a supported architecture (docs/architectures.md). Nothing of
            it is changed.
        texts: name -> token ids, integers `[tokens]`, at least 32. Selections are made from all of
            them together.
        config: `keep_ratio`, `metric`, `scope` and `capture` as in `longact.apply`.

    Raises:
        ValueError: what `longact.apply` refuses in the model; no texts, a short one, or one longer
        than the model's positions; activations that are not finite.
    """
    config = config or SelectionConfig()
    if not texts:
        raise ValueError("texts is empty: pass at least one")
    tower, entry = recognise(model)
    limit = getattr(getattr(tower, "config", None), "max_position_embeddings", None)
    for name, ids in texts.items():
        if ids.dim() != 1 or len(ids) < MIN_TOKENS:
            raise ValueError(
                f"text {name!r} has token ids {[*ids.shape]}: pass one sequence of at least "
                f"{MIN_TOKENS} tokens"
            )
        if isinstance(limit, int) and len(ids) > limit:
            raise ValueError(
                f"text {name!r} has {len(ids):,} tokens, and the model positions for {limit:,}: "
                f"pass at most as many (--max-tokens {limit})"
            )
    blocks = _blocks(match_projections(model, None, config), entry)
    counts = {name: _count(tower, blocks, ids, config) for name, ids in texts.items()}
    return _compare(counts, blocks, {name: len(ids) for name, ids in texts.items()}, config)


@dataclass
class _Block:
    """An attention module: the rows of which projection are its q, k and v."""

    attention: nn.Module
    projections: dict[str, nn.Module]
    heads: dict[str, list[Heads]]  # projection -> its q and k
    rows: dict[Kind, tuple[str, Tensor]]  # projection, and its rows, int64 [heads, head_dim]
    entry: Attention


def _blocks(matched: Mapping[str, Matched], entry: Attention) -> dict[str, _Block]:
    blocks: dict[str, _Block] = {}
    for name, one in matched.items():
        parent, _, leaf = name.rpartition(".")
        assert one.attention is not None
        block = blocks.setdefault(parent, _Block(one.attention, {}, {}, {}, entry))
        block.projections[leaf], block.heads[leaf] = one.module, one.heads
        for heads in one.heads:
            block.rows[heads.kind] = leaf, heads.rows
    for block in blocks.values():
        if (found := _value_rows(block)) is not None:
            block.rows["v"] = found
            block.projections[found[0]] = getattr(block.attention, found[0])
    return blocks


def _num_rows(linear: Any) -> int:
    return int(linear.out_features)


def _value_rows(block: _Block) -> tuple[str, Tensor] | None:
    """Of v_proj; or what is left of the projection that makes k, beside q and k."""
    if "k" not in block.rows:
        return None
    leaf, key = block.rows["k"]
    num_rows = getattr(getattr(block.attention, "v_proj", None), "out_features", None)
    if isinstance(num_rows, int):
        leaf, rows = "v_proj", torch.arange(num_rows)
    else:
        left = torch.ones(_num_rows(block.projections[leaf]), dtype=torch.bool)
        for heads in block.heads[leaf]:
            left[heads.rows.flatten()] = False
        rows = left.nonzero().squeeze(1)
    if len(rows) == 0 or len(rows) % len(key):
        return None
    return leaf, rows.view(len(key), -1)  # as many heads as k


# ---- counting ------------------------------------------------------------------------------------


def _ends(tokens: int) -> list[int]:
    """How many tokens each of BEGINNINGS has."""
    return [max(1, round(tokens * share)) for share in BEGINNINGS]


class _Counter:
    """Totals of one projection's channels over the beginnings of a text."""

    # What `Capture` asks a SalientLinear for.
    counted = SimpleNamespace(active=True)
    shard = None

    def __init__(self, num_rows: int, metrics: Iterable[str]) -> None:
        #: Of each metric, fp32 [beginnings, rows].
        self.totals = {metric: torch.zeros(len(BEGINNINGS), num_rows) for metric in metrics}
        self.is_used = False

    def count_channels(self, y: Tensor, rows: Tensor, *, counts_tokens: bool = True) -> None:
        """`y [..., tokens, channels]`, of these rows."""
        self.is_used = True
        y, rows = y.detach().reshape(-1, y.shape[-1]), rows.cpu()
        for metric, totals in self.totals.items():
            start = 0
            for i, stop in enumerate(_ends(len(y))):
                part = channel_magnitude(y[start:stop], None, metric).cpu()
                # It belongs to every longer beginning too.
                totals[i:, rows] = _join(
                    metric, [totals[i:, rows], part.expand(len(totals) - i, -1)]
                )
                start = stop


def _join(metric: str, totals: Sequence[Tensor]) -> Tensor:
    stacked = torch.stack([*totals])
    return stacked.amax(0) if metric == "max_abs" else stacked.sum(0)


class _Tap(Capture):
    """Counts for `_Counter`s what training counts for the layers of the attention module."""

    def __init__(
        self, capture: Literal["norm", "rope"], block: _Block, counters: Mapping[str, _Counter]
    ) -> None:
        super().__init__(capture, block.attention, block.entry, block.heads)
        self._counters: Any = SimpleNamespace(**counters)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super()._enter(module, args, kwargs)
        self._attention = self._counters


def _watch(block: _Block, counters: Mapping[str, _Counter], config: SelectionConfig) -> list[Any]:
    """Hooks that count as its forward runs."""
    hooks: list[Any] = []
    tap: Any = None
    if config.capture != "projection":
        tap = _Tap(config.capture, block, counters)
        hooks += tap.hooks

    def count(leaf: str, y: Tensor) -> None:
        for kind, (own, rows) in block.rows.items():
            if own == leaf and (kind == "v" or tap is None):
                flat = rows.flatten().to(y.device)
                counters[leaf].count_channels(y[..., flat], flat)
        if tap is not None and leaf in block.heads:
            tap.project(counters[leaf], y.detach())

    for leaf, linear in block.projections.items():
        hooks.append(linear.register_forward_hook(lambda _, __, y, leaf=leaf: count(leaf, y)))
    return hooks


class _Count(NamedTuple):
    """What one kind of one layer came to over a text."""

    of_selection: Tensor  # fp32 [beginnings, channels], totals of the metric
    absolute: Tensor  # fp32 [channels], sum |activation| over the whole text


_Key = tuple[str, Kind]  # the attention module's name, and what of it


@torch.no_grad()
def _count(
    tower: nn.Module, blocks: Mapping[str, _Block], ids: Tensor, config: SelectionConfig
) -> dict[_Key, _Count]:
    base: Any = getattr(tower, "base_model", tower)  # without the logits
    metrics = {config.metric, "mean_abs"}
    counters = {
        name: {
            leaf: _Counter(_num_rows(linear), metrics) for leaf, linear in block.projections.items()
        }
        for name, block in blocks.items()
    }
    hooks = [h for name, block in blocks.items() for h in _watch(block, counters[name], config)]
    with _in_eval_mode(base):
        try:
            device = next(base.parameters()).device
            base(input_ids=ids[None].to(device), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
    counts: dict[_Key, _Count] = {}
    for name, block in blocks.items():
        for kind, (leaf, rows) in block.rows.items():
            counter, flat = counters[name][leaf], rows.flatten()
            if not counter.is_used:
                continue  # a layer that takes another's k and v
            of_metric = {metric: t[:, flat] for metric, t in counter.totals.items()}
            absolute = of_metric["mean_abs"][-1]
            if not (torch.isfinite(of_metric[config.metric]).all() and absolute.sum() > 0):
                raise ValueError(
                    f"{name}.{leaf}: activations of {kind} are not finite, or all zero: the "
                    "checkpoint is damaged, or its dtype too small for it"
                )
            counts[name, kind] = _Count(of_metric[config.metric], absolute)
    return counts


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Without dropout; afterwards each module is as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


# ---- comparing selections ------------------------------------------------------------------------


def _compare(
    counts: Mapping[str, Mapping[_Key, _Count]],
    blocks: Mapping[str, _Block],
    tokens: dict[str, int],
    config: SelectionConfig,
) -> Inspection:
    keys = list(next(iter(counts.values())))
    num_heads = {(name, kind): len(blocks[name].rows[kind][1]) for name, kind in keys}

    def select(texts: Iterable[str], beginning: int) -> dict[_Key, Tensor]:
        chosen = list(texts)
        num_tokens = sum(_ends(tokens[text])[beginning] for text in chosen)
        totals = {
            key: _join(config.metric, [counts[t][key].of_selection[beginning] for t in chosen])
            for key in keys
        }
        return _select(totals, num_heads, num_tokens, config)

    by_beginning = [select(counts, i) for i in range(len(BEGINNINGS))]
    by_text = [select([text], -1) for text in counts] if len(counts) > 1 else []
    whole = by_beginning[-1]
    layers: dict[str, dict[Kind, Channels]] = {}
    before: dict[Kind, Channels] = {}
    for name, kind in keys:
        key = (name, kind)
        absolute = _join("mean_abs", [count[key].absolute for count in counts.values()])
        own = Channels(num_heads[key], absolute / sum(tokens.values()), whole[key])
        own.head_overlap = _head_overlap(own)
        if kind in before and len(before[kind]) == len(own):
            own.neighbour_overlap = _overlap(before[kind].rows, own.rows)
        own.text_overlap = _mean(_overlap(a[key], b[key]) for a, b in combinations(by_text, 2))
        own.context_overlap = tuple(_overlap(s[key], own.rows) for s in by_beginning)
        layers.setdefault(name, {})[kind] = before[kind] = own
    return Inspection(config, tokens, layers, _notes(layers, blocks, config))


def _notes(
    layers: Mapping[str, Mapping[Kind, Channels]],
    blocks: Mapping[str, _Block],
    config: SelectionConfig,
) -> list[str]:
    notes = []
    for kind in KINDS:
        lacking = [name for name, channels in layers.items() if kind not in channels]
        if lacking:
            notes.append(
                f"{kind} is left out in {len(lacking)} of {len(layers)} layers, which have no "
                "projection of their own for it"
            )
    if any("kv_b_proj" in block.heads for block in blocks.values()):
        notes.append("k is the part that does not rotate: the other is one for all heads")
    if config.capture != "projection":
        notes.append(
            f"q and k as capture={config.capture!r} has them; v as its projection makes it"
        )
    return notes


def _select(
    totals: Mapping[_Key, Tensor], num_heads: Mapping[_Key, int], tokens: int,
    config: SelectionConfig,
) -> dict[_Key, Tensor]:  # fmt: skip
    """What a refresh chooses after this count."""
    selections = {}
    for (name, kind), total in totals.items():
        candidates = Candidates(kind, len(total) // num_heads[name, kind])
        selection = Selection(config=config, name=f"{name} {kind}", candidates=(candidates,))
        selection.move(len(total), total.device)
        selection.restore(total, torch.tensor(tokens))
        selections[name, kind] = selection
    refresh(selections.values())
    none = torch.zeros(0, dtype=torch.int32)  # scope="model" may choose none of a layer
    return {key: none if s.rows is None else s.rows for key, s in selections.items()}


def _overlap(one: Tensor, other: Tensor) -> float:
    """What two selections have in common, of their mean size; by chance it is the keep ratio."""
    size = (len(one) + len(other)) / 2
    return float(torch.isin(one, other).sum()) / size if size else 1.0


def _head_overlap(channels: Channels) -> float | None:
    selected = torch.zeros(len(channels))
    selected[channels.rows.long()] = 1.0
    by_head = selected.view(channels.heads, -1)
    one, other = torch.triu_indices(channels.heads, channels.heads, 1)
    common, sizes = by_head @ by_head.T, by_head.sum(1)
    overlaps = common[one, other] / ((sizes[one] + sizes[other]) / 2)  # NaN where neither has any
    return _mean(overlaps[overlaps.isfinite()].tolist())


# ---- command -------------------------------------------------------------------------------------


def add_command(commands: Any) -> None:
    """Adds `inspect` to argparse's subparsers."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "inspect",
        help="which channels of q, k and v are large in a model, and what is selected of them",
        description="Runs texts through a model and tells how few channels of q and k carry the "
        "activation, which ones longact.apply would select, and how much that depends on layers, "
        "heads, texts and context length: a table, inspect.json, PNGs and a report in one HTML "
        "file.",
    )
    parser.add_argument("model", help="directory of a checkpoint, or its name on the hub")
    parser.add_argument("--text", type=Path, nargs="+", required=True, metavar="FILE",
                        help="UTF-8 texts; each is one sequence")  # fmt: skip
    parser.add_argument("--max-tokens", type=int, default=2048, metavar="N",
                        help="of each text (default: %(default)s)")  # fmt: skip
    parser.add_argument("--keep-ratio", type=float, default=0.3, metavar="R")
    parser.add_argument("--metric", default="mean_abs", help="mean_abs, rms or max_abs")
    parser.add_argument("--scope", default="layer", help="layer, head or model")
    parser.add_argument("--capture", default="projection", help="projection, norm or rope")
    parser.add_argument("--logs", type=Path, metavar="RUN",
                        help="output directory of a run, or JSON lines of its logs")  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("inspect"), metavar="DIR",
                        help="default: %(default)s")  # fmt: skip

    def run(arguments: argparse.Namespace) -> None:
        try:
            _run(arguments)
        except (ValueError, TypeError, OSError, ImportError, NotImplementedError) as error:
            message = " ".join(str(error).split())  # those of transformers have many lines
            parser.exit(2, f"longact inspect: {message}\n")

    parser.set_defaults(run=run)


def _run(arguments: argparse.Namespace) -> None:
    from longact.inspection_report import need_matplotlib, read_logs, tables_of, write_report

    config = SelectionConfig(
        arguments.keep_ratio, arguments.metric, arguments.scope, capture=arguments.capture
    )
    if arguments.max_tokens < MIN_TOKENS:
        raise ValueError(f"--max-tokens {arguments.max_tokens}: use at least {MIN_TOKENS}")
    texts = {path: _read(path) for path in arguments.text}
    logs = [] if arguments.logs is None else read_logs(arguments.logs)
    if arguments.output.exists() and not arguments.output.is_dir():
        raise ValueError(f"--output {arguments.output} is a file: name a directory")
    need_matplotlib()  # before the model runs
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError(
            f"a model needs transformers: pip install 'longact[transformers]' ({error})"
        ) from None
    from longact.delta import load_checkpoint

    model = load_checkpoint(arguments.model).to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    ids = {
        str(path): torch.tensor(_tokens(tokenizer, text)[: arguments.max_tokens])
        for path, text in texts.items()
    }
    inspection = inspect_model(model, ids, config)
    name = arguments.model.rstrip("/").rpartition("/")[2] or arguments.model
    for table in tables_of(inspection):
        print(table.text(), end="\n\n")
    for note in inspection.notes:
        print(f"note: {note}")
    files = write_report(inspection, arguments.output, name, logs)
    print(f"wrote {len(files)} files to {arguments.output}; open {files[-1]}")


def _tokens(tokenizer: Any, text: str) -> list[int]:
    # verbose: else it warns of a text longer than the model, of which a part is taken
    return list(tokenizer(text, verbose=False)["input_ids"])


def _read(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"--text {path}: there is no such file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {path} is not UTF-8 text ({error})") from None
