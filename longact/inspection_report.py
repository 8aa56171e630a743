"""What `python -m longact inspect` writes: tables, JSON, pictures, and one HTML file of all."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from operator import attrgetter, methodcaller
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

import longact
from longact.inspection import BEGINNINGS, KINDS, TOP, Channels, Inspection, Kind, Measure

__all__ = ["as_dict", "read_logs", "series_of", "tables_of", "write_report"]


# ---- logs of a run -------------------------------------------------------------------------------

_LOGGED = re.compile(r"longact/(.+)/(activation_share|overlap)")


def read_logs(run: Path) -> list[dict[str, Any]]:
    """What a trainer logged at its steps: entries with `step` and `longact/...` keys.

    `run`: the trainer's output directory, whose last checkpoint is read, or a checkpoint; a
    trainer_state.json; or JSON lines.

    Raises:
        ValueError: not there, not such a file, or without the metrics of longact.
    """
    path = run
    if run.is_dir():
        states = [*run.glob("checkpoint-*/trainer_state.json"), *run.glob("trainer_state.json")]
        if not states:
            raise ValueError(f"--logs {run}: it has no checkpoint with a trainer_state.json")
        path = max(states, key=lambda state: int("0" + state.parent.name.rpartition("-")[2]))
    if not path.is_file():
        raise ValueError(f"--logs {run} does not exist: pass an output directory, or JSON lines")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            logs = json.loads(text)["log_history"]
        else:
            logs = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--logs {path}: neither a trainer_state.json nor JSON lines ({error})"
        ) from None
    ours = [log for log in logs if "step" in log and any(map(_LOGGED.fullmatch, log))]
    if not ours:
        raise ValueError(
            f"--logs {path}: no step has longact/.../activation_share, which longact's trainers "
            "and callbacks log (docs/frameworks.md)"
        )
    return ours


def series_of(logs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """ "activation_share" and "overlap" -> projection -> (step, value)."""
    series: dict[str, dict[str, list[tuple[int, float]]]] = {"activation_share": {}, "overlap": {}}
    for log in logs:
        for key, value in log.items():
            if found := _LOGGED.fullmatch(key):
                point = (int(log["step"]), float(value))
                series[found[2]].setdefault(found[1], []).append(point)
    return series


# ---- pictures ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Theme:
    """Colours that can be told apart in any colour vision, on the page's background."""

    name: Literal["light", "dark"]
    page: str
    ink: str
    grid: str
    greys: tuple[str, str]  # channels that are not selected, from small to large
    lines: Mapping[str, str]  # q, k, v

    @property
    def rc(self) -> dict[str, Any]:
        background = ("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor")
        ink = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
        return {
            **dict.fromkeys(background, self.page),
            **dict.fromkeys(ink, self.ink),
            "grid.color": self.grid,
            "legend.edgecolor": self.grid,
            "font.size": 12,
            "axes.titlesize": 12,
        }


_LIGHT = _Theme(
    "light", "#ffffff", "#1f2328", "#d8dee4", ("#f7f7f7", "#a8a8a8"),
    {"q": "#0072b2", "k": "#d55e00", "v": "#009e73"},
)  # fmt: skip
_DARK = _Theme(
    "dark", "#0d1117", "#e6edf3", "#30363d", ("#161b22", "#636c76"),
    {"q": "#56b4e9", "k": "#f0a04b", "v": "#3ccf9f"},
)  # fmt: skip
_STYLES = {"q": "-", "k": "--", "v": "-."}


class _Picture(NamedTuple):
    name: str  # of the PNG
    title: str
    alt: str  # what it shows, for who cannot see it
    draw: Callable[[_Theme], Any]  # -> matplotlib Figure


def _png(picture: _Picture, theme: _Theme) -> bytes:
    import matplotlib as mpl

    with mpl.rc_context(theme.rc):
        file = io.BytesIO()
        picture.draw(theme).savefig(file, dpi=110, metadata={"Software": None})
    return file.getvalue()


def _figure(width: float, height: float, panels: int = 1) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, [*figure.subplots(1, panels, squeeze=False)[0]]


def _draw_channels(inspection: Inspection, kind: Kind, theme: _Theme) -> Any:
    """Layer x channel; the selected ones in colour, the others in grey, on one scale."""
    import matplotlib as mpl
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    shown = inspection.of(kind)
    width = max(map(len, shown))
    relative = torch.full((len(shown), width), torch.nan)
    selected = torch.zeros((len(shown), width), dtype=torch.bool)
    for line, channels in enumerate(shown):
        relative[line, : len(channels)] = channels.magnitude / channels.magnitude.median()
        selected[line, channels.rows.long()] = True
    scale = LogNorm(0.5, 16, clip=True)
    bright = mpl.colormaps["plasma"]
    grey = LinearSegmentedColormap.from_list("grey", theme.greys)
    values = scale(relative.numpy())
    pixels = torch.where(
        selected[..., None], torch.as_tensor(bright(values)), torch.as_tensor(grey(values))
    )
    pixels[relative.isnan()] = 0
    # A wide model has more channels than the picture has pixels: neighbours are mixed.
    mixed = -(-width // 1200)
    pixels = torch.nn.functional.pad(pixels, (0, 0, 0, -width % mixed))
    pixels = pixels.view(len(shown), -1, mixed, 4).mean(2)
    figure, (axes,) = _figure(10, 2.4 + 0.11 * min(len(shown), 80))
    extent = (0, pixels.shape[1] * mixed, len(shown) - 0.5, -0.5)
    axes.imshow(pixels.numpy(), aspect="auto", extent=extent, interpolation="nearest")
    first = shown[0]
    if 1 < first.heads <= 64 and all(c.head_dim == first.head_dim for c in shown):
        for head in range(1, first.heads):
            axes.axvline(head * first.head_dim, color=theme.ink, linewidth=0.8)
    heads = f"{first.heads} heads of {first.head_dim}" if first.heads > 1 else "one head"
    axes.set(xlabel=f"channel of {kind} ({heads})", ylabel="layer", xlim=(0, width))
    for colors, label in ((grey, "not selected"), (bright, "selected")):
        mappable = mpl.cm.ScalarMappable(scale, colors)
        bar = figure.colorbar(mappable, ax=axes, pad=0.01, fraction=0.03, aspect=30)
        ticks = [0.5, 1, 2, 4, 8, 16]
        bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        bar.ax.minorticks_off()
        bar.set_label(label)
    axes.set_title("mean |activation|, as a multiple of the layer's median", loc="left")
    return figure


def _draw_concentration(inspection: Inspection, theme: _Theme) -> Any:
    figure, (axes,) = _figure(7, 4.6)
    for kind in inspection.kinds:
        curves = torch.stack([channels.curve() for channels in inspection.of(kind)])
        x = torch.linspace(0, 1, curves.shape[1]).tolist()
        color = theme.lines[kind]
        axes.plot(x, curves.mean(0).tolist(), _STYLES[kind], color=color, label=kind, linewidth=2)
        axes.fill_between(
            x, curves.amin(0).tolist(), curves.amax(0).tolist(), color=color, alpha=0.15, lw=0
        )
    axes.plot([0, 1], [0, 1], ":", color=theme.ink, alpha=0.6, label="all channels equal")
    axes.axvline(inspection.config.keep_ratio, color=theme.ink, linewidth=0.8, alpha=0.6)
    axes.set(
        xlabel="share of the channels, the largest first", ylabel="share of |activation|",
        xlim=(0, 1), ylim=(0, 1),
    )  # fmt: skip
    axes.grid(True)
    axes.legend(title="mean, and range of the layers", loc="lower right")
    return figure


def _draw_context(inspection: Inspection, theme: _Theme) -> Any:
    figure, (axes,) = _figure(7, 4.2)
    shares = [f"{share * 100:g} %" for share in BEGINNINGS]
    x = list(range(len(BEGINNINGS)))
    for kind in inspection.kinds:
        overlaps = torch.tensor([c.context_overlap for c in inspection.of(kind)])
        color = theme.lines[kind]
        axes.plot(x, overlaps.mean(0).tolist(), _STYLES[kind], marker="o", color=color, label=kind)
        axes.fill_between(
            x, overlaps.amin(0).tolist(), overlaps.amax(0).tolist(), color=color, alpha=0.15, lw=0
        )
    axes.axhline(
        inspection.config.keep_ratio, linestyle=":", color=theme.ink, alpha=0.6, label="by chance"
    )
    axes.set_xticks(x, shares)
    axes.set(
        xlabel="share of the tokens counted, from the beginning",
        ylabel="overlap with the whole's selection", ylim=(0, 1.03),
    )  # fmt: skip
    axes.grid(True)
    axes.legend(title="mean, and range of the layers", loc="lower right")
    return figure


def _draw_training(logs: Sequence[Mapping[str, Any]], theme: _Theme) -> Any:
    figure, panels = _figure(10, 3.8, 2)
    titles = {
        "activation_share": "share of |activation| in the selected rows",
        "overlap": "overlap with the step before",
    }
    series = series_of(logs)
    for axes, (metric, title) in zip(panels, titles.items(), strict=True):
        for number, (projection, points) in enumerate(sorted(series[metric].items(), reverse=True)):
            kind = next((kind for kind in KINDS if projection.startswith(kind)), None)
            color = theme.lines[kind] if kind else f"C{number}"
            style = _STYLES[kind] if kind else "-"
            axes.plot(*zip(*points, strict=True), style, color=color, label=projection, marker=".")
        axes.set(xlabel="optimizer step", title=title, ylim=(0, 1.03))
        axes.grid(True)
        if axes.lines:
            axes.legend(loc="lower right")
    return figure


def _pictures(inspection: Inspection, logs: Sequence[Mapping[str, Any]]) -> list[_Picture]:
    pictures = []
    keep = inspection.config.keep_ratio
    for kind in inspection.kinds:
        share = inspection.mean(kind, attrgetter("selected_share"))
        largest = inspection.mean(kind, attrgetter("largest_over_median"))
        title = f"{kind}: layers and channels"
        if kind == "v":
            title += " (LongAct trains all of v; in colour what the same rule would select)"
        pictures.append(_Picture(
            f"channels_{kind}", title,
            f"Heat map of the mean activation magnitude of {len(inspection.of(kind))} layers by "
            f"channels of {kind}. The selected {_about(keep)} are in colour and carry "
            f"{_about(share)} of the activation; the largest channel is {largest:.1f} times "
            "the median, both on average over the layers.",
            partial(_draw_channels, inspection, kind),
        ))  # fmt: skip
    thirds = ", ".join(
        f"{_about(inspection.mean(kind, methodcaller('top_share', 0.3)))} in {kind}"
        for kind in inspection.kinds
    )
    pictures.append(_Picture(
        "concentration", "How few channels carry the activation",
        "Curves of the share of activation that the largest channels carry, of q, k and v. The "
        f"largest 30 % carry {thirds}.",
        partial(_draw_concentration, inspection),
    ))  # fmt: skip
    quarters = ", ".join(
        f"{_about(inspection.mean(kind, methodcaller('beginning_overlap', 2)))} of {kind}"
        for kind in inspection.kinds
    )
    pictures.append(_Picture(
        "context", "Does the selection change with the context length?",
        "Curves of the overlap between the selection after a beginning of the text and after the "
        f"whole. A quarter of the tokens already selects {quarters}.",
        partial(_draw_context, inspection),
    ))  # fmt: skip
    if logs:
        last = ", ".join(
            f"{_about(points[-1][1])} in {projection}"
            for projection, points in series_of(logs)["activation_share"].items()
        )
        pictures.append(_Picture(
            "training", "Does the selection change with training?",
            "Two panels over optimizer steps: the share of activation in the rows that a step "
            f"trained, at the last step {last or 'not logged'}; and the overlap of these rows with "
            "those of the step before.",
            partial(_draw_training, logs),
        ))  # fmt: skip
    return pictures


# ---- tables --------------------------------------------------------------------------------------


class _Table(NamedTuple):
    title: str
    header: list[str]
    lines: list[list[str]]  # the last one is the mean

    def text(self) -> str:
        """Names to the left, numbers to the right."""
        columns = zip(self.header, *self.lines, strict=True)
        widths = [max(map(len, column)) for column in columns]
        lines = [
            "  ".join(
                [
                    f"{name:{widths[0]}}",
                    *(f"{c:>{w}}" for c, w in zip(cells, widths[1:], strict=True)),
                ]
            )
            for name, *cells in (self.header, *self.lines)
        ]
        return "\n".join([self.title, *lines])


def _about(share: float | None) -> str:
    return "-" if share is None else f"{share * 100:.0f} %"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value * 100:.1f} %"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def tables_of(inspection: Inspection) -> list[_Table]:
    kinds = inspection.kinds
    shares: list[tuple[str, Measure, Callable[[float | None], str]]] = [
        *((_about(share), methodcaller("top_share", share), _percent) for share in TOP),
        ("max", attrgetter("largest_over_median"), _times),
    ]
    header = ["layer", *(f"{kind} {name}" for kind in kinds for name, *_ in shares)]
    lines = []
    for name, channels in inspection.layers.items():
        cells = [
            show(value(channels[kind]) if kind in channels else None)
            for kind in kinds
            for _, value, show in shares
        ]
        lines.append([_short(name), *cells])
    means = [show(inspection.mean(k, value)) for k in kinds for _, value, show in shares]
    concentration = _Table(
        "Share of |activation| in the top 10, 30, 50 % of the channels; max: largest / median",
        header, [*lines, ["mean", *means]],
    )  # fmt: skip

    overlaps: dict[str, Measure] = {
        "neighbouring layers": attrgetter("neighbour_overlap"),
        "heads": attrgetter("head_overlap"),
        "texts": attrgetter("text_overlap"),
    }
    for i, share in enumerate(BEGINNINGS[:-1]):
        overlaps[f"first {share * 100:g} % and whole"] = methodcaller("beginning_overlap", i)
    return [
        concentration,
        _Table(
            f"Overlap of selections between (by chance {_about(inspection.config.keep_ratio)})",
            ["", *kinds],
            [
                [name, *(_percent(inspection.mean(kind, value)) for kind in kinds)]
                for name, value in overlaps.items()
            ],
        ),
    ]


def _short(name: str) -> str:
    """The layer's number, if the name has one."""
    numbers = [part for part in name.split(".") if part.isdigit()]
    return numbers[0] if len(numbers) == 1 else name


# ---- report --------------------------------------------------------------------------------------


def _round(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def as_dict(
    inspection: Inspection, model: str, logs: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Plain values, for JSON."""
    config = inspection.config

    def values(show: Callable[[Measure], float | None]) -> dict[str, Any]:
        return {
            "top_share": {f"{x:g}": _round(show(methodcaller("top_share", x))) for x in TOP},
            "selected_share": _round(show(attrgetter("selected_share"))),
            "largest_over_median": _round(show(attrgetter("largest_over_median"))),
            "overlap": {
                "neighbours": _round(show(attrgetter("neighbour_overlap"))),
                "heads": _round(show(attrgetter("head_overlap"))),
                "texts": _round(show(attrgetter("text_overlap"))),
                "beginnings": {
                    f"{x:g}": _round(show(methodcaller("beginning_overlap", i)))
                    for i, x in enumerate(BEGINNINGS)
                },
            },
        }

    def measured(own: Channels) -> dict[str, Any]:
        return values(lambda measure: measure(own))

    return {
        "longact": longact.__version__,
        "model": model,
        "tokens": inspection.tokens,
        "keep_ratio": config.keep_ratio,
        "metric": config.metric,
        "scope": config.scope,
        "capture": config.capture,
        "notes": inspection.notes,
        "mean": {k: values(partial(inspection.mean, k)) for k in inspection.kinds},
        "layers": {
            name: {
                kind: {
                    "heads": own.heads,
                    "head_dim": own.head_dim,
                    **measured(own),
                    "rows": own.rows.tolist(),
                    "magnitude": [_round(x) for x in own.magnitude.tolist()],
                }
                for kind, own in channels.items()
            }
            for name, channels in inspection.layers.items()
        },
        "training": [
            {key: log[key] for key in log if key == "step" or _LOGGED.fullmatch(key)}
            for log in logs
        ],
    }


_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1f2328; --soft: #59636e; --line: #d8dee4;
  --card: #f6f8fa; }
@media (prefers-color-scheme: dark) { :root { --page: #0d1117; --ink: #e6edf3; --soft: #9198a1;
  --line: #30363d; --card: #161b22; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p.facts, figcaption { color: var(--soft); font-size: .9rem; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: .75rem 1rem; }
.card b { display: block; font-size: 1.6rem; line-height: 1.2; }
.wide { overflow-x: auto; }
figure { margin: 1rem 0; }
figure img { display: block; max-width: 100%; height: auto; }
figure img.map { width: 100%; min-width: 34rem; max-width: none; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums;
  width: 100%; }
th, td { padding: .2rem .5rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
thead th { white-space: normal; vertical-align: bottom; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--page); }
tr.mean > * { font-weight: 700; border-top: 2px solid var(--line); }
"""


def _html(
    inspection: Inspection, model: str, images: Sequence[tuple[_Picture, bytes, bytes]]
) -> str:
    config = inspection.config
    texts = ", ".join(f"{name} ({count:,} tokens)" for name, count in inspection.tokens.items())
    facts = (
        f"{len(inspection.layers)} attention layers. Text: {texts}. "
        f"keep_ratio {config.keep_ratio:g}, metric {config.metric}, scope {config.scope}, "
        f"capture {config.capture}. "
        f"longact {longact.__version__}."
    )
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>What LongAct selects in {escape(model)}</title>",
        f"<style>{_STYLE}</style></head><body><main>",
        f"<h1>What LongAct selects in {escape(model)}</h1>",
        f'<p class="facts">{escape(facts)}</p>',
        *(f'<p class="facts">{escape(note)}</p>' for note in inspection.notes),
        '<div class="cards">',
    ]
    for kind in inspection.kinds:
        share = inspection.mean(kind, methodcaller("top_share", 0.3))
        largest = inspection.mean(kind, attrgetter("largest_over_median"))
        parts.append(
            f'<div class="card">{kind}<b>{_about(share)}</b>of |activation| in the top 30 % of the '
            f"channels; the largest is {largest:.1f} times the median</div>"
        )
    parts.append("</div>")
    for picture, light, dark in images:
        wide = ' class="map"' if picture.name.startswith("channels") else ""
        parts.append(
            f"<h2>{escape(picture.title)}</h2><figure><div class='wide' tabindex='0'><picture>"
            f'<source media="(prefers-color-scheme: dark)" srcset="{_uri(dark)}">'
            f'<img{wide} src="{_uri(light)}" alt="{escape(picture.alt)}"></picture></div>'
            f"<figcaption>{escape(picture.alt)}</figcaption></figure>"
        )
    for table in tables_of(inspection):
        parts.append(f"<h2>{escape(table.title)}</h2><div class='wide' tabindex='0'><table><thead>")
        head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.header)
        parts.append(f"<tr>{head}</tr></thead><tbody>")
        for name, *cells in table.lines:
            mean = ' class="mean"' if name == "mean" else ""
            row = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
            parts.append(f'<tr{mean}><th scope="row">{escape(name)}</th>{row}</tr>')
        parts.append("</tbody></table></div>")
    parts.append("</main></body></html>")
    return "\n".join(parts) + "\n"


def _uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def write_report(
    inspection: Inspection, output: Path, model: str, logs: Sequence[Mapping[str, Any]] = ()
) -> list[Path]:
    """Writes inspect.json, the pictures as PNG, and report.html, which holds everything it shows.

    Args:
        output: a directory, made if it is not there.
        model: how the report calls the model.
        logs: what `read_logs` gives, to show the selection over the steps of a run.

    Returns:
        The files.

    Raises:
        ImportError: without matplotlib.
    """
    need_matplotlib()
    output.mkdir(parents=True, exist_ok=True)
    files = {"inspect.json": json.dumps(as_dict(inspection, model, logs), allow_nan=False).encode()}
    images = []
    for picture in _pictures(inspection, logs):
        light, dark = _png(picture, _LIGHT), _png(picture, _DARK)
        files[f"{picture.name}.png"] = light
        images.append((picture, light, dark))
    files["report.html"] = _html(inspection, model, images).encode()
    for name, content in files.items():
        (output / name).write_bytes(content)
    return [output / name for name in files]


def need_matplotlib() -> None:
    try:
        import matplotlib as mpl  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"the pictures need matplotlib: pip install 'longact[plot]' ({error})"
        ) from None
