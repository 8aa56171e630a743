"""`python -m longact inspect`: what it counts, what it says of it, and the files that it writes."""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from models import hooks_of, params_of, tiny_model, token_ids
from torch import Tensor, nn
from trainers import tiny_tokenizer

import longact
from longact.architectures import heads_of, recognise
from longact.inspection import (
    BEGINNINGS,
    Channels,
    Inspection,
    add_command,
    inspect_model,
)
from longact.inspection_report import as_dict, read_logs, write_report
from longact.selection import SelectionConfig

ATTENTION = "model.layers.1.self_attn"
MLA = {
    "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8,
    "v_head_dim": 10, "num_key_value_heads": 4, "head_dim": 8, "first_k_dense_replace": 2,
    "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
}  # fmt: skip


def text(length: int = 48, seed: int = 0) -> Tensor:
    return token_ids(1, length, seed=seed)[0]


def outputs(model: Any, ids: Tensor, *names: str) -> list[Tensor]:
    """`[tokens, out]` of the named modules."""
    seen: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda _, __, y, name=name: seen.__setitem__(name, y.detach().flatten(0, -2))
        )
        for name in names
    ]
    with torch.no_grad():
        model.eval()(input_ids=ids[None])
    for hook in hooks:
        hook.remove()
    return [seen[name] for name in names]


def largest(magnitude: Tensor, count: int) -> list[int]:
    return sorted(magnitude.argsort(descending=True)[:count].tolist())


# ---- what is counted -----------------------------------------------------------------------------


def test_magnitudes_shares_and_rows_are_those_of_the_projections_outputs() -> None:
    model, ids = tiny_model(), text()
    found = inspect_model(model, {"a": ids}, SelectionConfig(0.3))
    assert list(found.layers) == ["model.layers.0.self_attn", ATTENTION]
    names = [f"{ATTENTION}.{kind}_proj" for kind in "qkv"]
    for kind, y in zip("qkv", outputs(model, ids, *names), strict=True):
        own = found.layers[ATTENTION][kind]  # type: ignore[index]
        expected = y.abs().mean(0)
        torch.testing.assert_close(own.magnitude, expected)
        assert (own.heads, own.head_dim) == (4 if kind == "q" else 2, 16)
        count = round(0.3 * len(expected))
        assert own.rows.tolist() == largest(expected, count)
        share = expected.sort(descending=True).values[:count].sum() / expected.sum()
        assert own.selected_share == pytest.approx(float(share))
        assert own.top_share(0.3) == pytest.approx(float(share))
        tenth = expected.sort(descending=True).values[: round(0.1 * len(expected))].sum()
        assert own.top_share(0.1) == pytest.approx(float(tenth / expected.sum()))
        assert own.largest_over_median == pytest.approx(float(expected.max() / expected.median()))


def test_the_curve_rises_from_nothing_to_everything_through_the_top_shares() -> None:
    own = Channels(1, torch.tensor([4.0, 1.0, 3.0, 2.0]), torch.tensor([0], dtype=torch.int32))
    curve = own.curve(points=9)
    torch.testing.assert_close(
        curve, torch.tensor([0, 2, 4, 5.5, 7, 8, 9, 9.5, 10], dtype=torch.float64) / 10
    )


def test_beginnings_are_compared_as_texts_that_end_there() -> None:
    model, ids = tiny_model(), text(64)
    config = SelectionConfig(0.3)
    found = inspect_model(model, {"a": ids}, config).layers[ATTENTION]
    half = inspect_model(model, {"a": ids[:32]}, config).layers[ATTENTION]
    index = BEGINNINGS.index(0.5)
    for kind, own in found.items():
        common = set(own.rows.tolist()) & set(half[kind].rows.tolist())
        assert own.beginning_overlap(index) == pytest.approx(len(common) / len(own.rows))
        assert own.context_overlap[-1] == 1.0
    # Else this says nothing.
    assert any(c.beginning_overlap(0) < 1.0 for c in found.values())


def test_texts_count_together_and_are_compared() -> None:
    model, config = tiny_model(), SelectionConfig(0.3)
    a, b = text(32, seed=1), text(64, seed=2)
    both = inspect_model(model, {"a": a, "b": b}, config)
    alone = [inspect_model(model, {"t": t}, config).layers[ATTENTION]["q"] for t in (a, b)]
    own = both.layers[ATTENTION]["q"]
    expected = (32 * alone[0].magnitude + 64 * alone[1].magnitude) / 96
    torch.testing.assert_close(own.magnitude, expected)
    assert own.rows.tolist() == largest(expected, len(own.rows))
    common = set(alone[0].rows.tolist()) & set(alone[1].rows.tolist())
    assert own.text_overlap == pytest.approx(len(common) / len(own.rows))
    assert alone[0].text_overlap is None
    same = inspect_model(model, {"a": a, "again": a}, config)
    assert same.mean("k", lambda c: c.text_overlap) == 1.0


def test_overlaps_of_layers_and_heads() -> None:
    found = inspect_model(tiny_model(), {"a": text()}, SelectionConfig(0.3))
    first, second = (channels["q"] for channels in found.layers.values())
    rows = [set(c.rows.tolist()) for c in (first, second)]
    assert first.neighbour_overlap is None
    assert second.neighbour_overlap == pytest.approx(len(rows[0] & rows[1]) / len(rows[0]))
    by_head = [{r % 16 for r in rows[1] if r // 16 == head} for head in range(4)]
    pairs = [
        len(one & other) / ((len(one) + len(other)) / 2)
        for i, one in enumerate(by_head)
        for other in by_head[:i]
        if one or other
    ]
    assert second.head_overlap == pytest.approx(sum(pairs) / len(pairs))
    one_head = inspect_model(tiny_model(num_key_value_heads=1), {"a": text()})
    assert one_head.of("k")[0].head_overlap is None


def without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


@pytest.mark.parametrize(
    ("arch", "options", "config"),
    [
        ("llama", {}, SelectionConfig(0.4, "rms", "head")),
        ("llama", {}, SelectionConfig(0.3, "max_abs", "model")),
        ("llama", {}, SelectionConfig(capture="rope")),
        ("qwen3", {}, SelectionConfig(capture="norm")),
        ("qwen3", {}, SelectionConfig(0.25, "rms", capture="rope")),
        ("gpt_neox", {}, SelectionConfig(scope="head")),
        ("gpt_neox", {}, SelectionConfig(capture="rope")),
        ("deepseek_v3", MLA, SelectionConfig(0.3)),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_rows_are_those_that_training_selects(
    arch: str, options: dict[str, Any], config: SelectionConfig
) -> None:
    model, ids = tiny_model(arch, **options), text()
    without_dropout(model)
    found = inspect_model(model, {"a": ids}, config)
    handle = longact.apply(
        model, config.keep_ratio, metric=config.metric, scope=config.scope,
        capture=config.capture, refresh_every=0,
    )  # fmt: skip
    model(input_ids=ids[None])
    handle.refresh()
    _, entry = recognise(model)
    compared = 0
    for name, layer in handle.projections.items():
        parent, _, leaf = name.rpartition(".")
        for heads in heads_of(model.get_submodule(parent), leaf, layer, entry):
            own = found.layers[parent][heads.kind]
            candidates = heads.rows.flatten()
            assert layer.rows is not None
            trained = [r for r in layer.rows.tolist() if r in set(candidates.tolist())]
            assert sorted(candidates[own.rows.long()].tolist()) == trained, (name, heads.kind)
            compared += len(trained)
    assert compared > 0


def test_v_of_a_fused_projection_and_of_latent_attention_is_what_is_neither_q_nor_k() -> None:
    model, ids = tiny_model("gpt_neox"), text()
    without_dropout(model)
    found = inspect_model(model, {"a": ids})
    name = "gpt_neox.layers.0.attention"
    (fused,) = outputs(model, ids, f"{name}.query_key_value")
    expected = fused.abs().mean(0).view(4, 3, 16)
    for i, kind in enumerate("qkv"):
        own = found.layers[name][kind]  # type: ignore[index]
        torch.testing.assert_close(own.magnitude, expected[:, i].flatten())

    model = tiny_model("deepseek_v3", **MLA)
    found = inspect_model(model, {"a": ids})
    (latent,) = outputs(model, ids, f"{ATTENTION}.kv_b_proj")
    heads = latent.abs().mean(0).view(4, 22)
    torch.testing.assert_close(found.layers[ATTENTION]["k"].magnitude, heads[:, :12].flatten())
    torch.testing.assert_close(found.layers[ATTENTION]["v"].magnitude, heads[:, 12:].flatten())
    assert found.notes == ["k is the part that does not rotate: the other is one for all heads"]


def test_the_model_stays_as_it_was() -> None:
    model = tiny_model().train()
    model.model.layers[0].eval()
    before, hooks = params_of(model), hooks_of(model)
    training = [module.training for module in model.modules()]
    for config in (SelectionConfig(), SelectionConfig(capture="rope")):
        inspect_model(model, {"a": text()}, config)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[3, 2] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.v_proj: activations of v are not"):
        inspect_model(model, {"a": text()})
    model.model.layers[1].self_attn.v_proj.weight.data = before[f"{ATTENTION}.v_proj.weight"]
    assert [module.training for module in model.modules()] == training
    assert hooks_of(model) == hooks
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())


def test_what_cannot_be_inspected_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="texts is empty"):
        inspect_model(model, {})
    with pytest.raises(ValueError, match=r"'short' has token ids \[8\].*at least 32"):
        inspect_model(model, {"long": text(), "short": text(8)})
    with pytest.raises(ValueError, match=r"129 tokens.*positions for 128.*--max-tokens 128"):
        inspect_model(model, {"a": text(129)})
    with pytest.raises(ValueError, match=r"capture='norm'.*no norm"):
        inspect_model(model, {"a": text()}, SelectionConfig(capture="norm"))


# ---- logs ----------------------------------------------------------------------------------------


def log(step: int, share: float = 0.6) -> dict[str, Any]:
    return {"step": step, "loss": 1.0, "longact/q_proj/activation_share": share,
            "longact/q_proj/overlap": 0.9}  # fmt: skip


def test_logs_are_the_last_checkpoints_or_json_lines(tmp_path: Path) -> None:
    for step in (9, 10):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        history = [log(1), log(step), {"step": step, "eval_loss": 2.0}]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    lines = tmp_path / "run.jsonl"
    lines.write_text("\n".join(map(json.dumps, [log(1), {"step": 2}, log(10)])) + "\n\n")
    for run in (tmp_path / "run", tmp_path / "run" / "checkpoint-10", lines):
        assert read_logs(run) == [log(1), log(10)]
    assert read_logs(Path(__file__).parents[1] / "docs" / "runs" / "grpo.jsonl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("{'step': 1}\n", "neither a trainer_state.json nor JSON lines"),
        ("[1, 2]\n", "no step has longact"),
        ('{"step": 1, "loss": 2.0}\n', "no step has longact"),
    ],
)
def test_logs_that_are_none_are_refused(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "logs.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_logs(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no checkpoint"):
        read_logs(tmp_path / "empty")


# ---- the command and its files -------------------------------------------------------------------


def run_command(*arguments: object) -> None:
    parser = argparse.ArgumentParser(prog="python -m longact")
    add_command(parser.add_subparsers())
    parsed = parser.parse_args(["inspect", *map(str, arguments)])
    parsed.run(parsed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, two texts and logs, as a user has them; `report` is what the command makes."""
    folder = tmp_path_factory.mktemp("inspect")
    tokenizer = tiny_tokenizer()
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    words = sorted(word for word in tokenizer.get_vocab() if not word.startswith("<"))
    (folder / "a<b>.txt").write_text(" ".join((words * 60)[:60]))
    (folder / "b.txt").write_text(" ".join((words[::-1] * 60)[:50]))
    (folder / "logs.jsonl").write_text("\n".join(json.dumps(log(i, 0.5 + i / 10)) for i in (1, 2)))
    return folder


class Outcome:
    def __init__(self, printed: str, directory: Path) -> None:
        self.printed, self.directory = printed, directory
        self.html = (directory / "report.html").read_text(encoding="utf-8")
        self.json = json.loads((directory / "inspect.json").read_text())


@pytest.fixture(scope="module")
def outcome(folder: Path) -> Outcome:
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", printed)
        run_command(
            folder / "model", "--text", folder / "a<b>.txt", folder / "b.txt", "--max-tokens", 56,
            "--logs", folder / "logs.jsonl", "--output", folder / "report", "--keep-ratio", 0.25,
        )  # fmt: skip
    return Outcome(printed.getvalue(), folder / "report")


def test_the_command_prints_the_table_and_writes_the_numbers(
    folder: Path, outcome: Outcome
) -> None:
    assert outcome.json["tokens"] == {str(folder / "a<b>.txt"): 56, str(folder / "b.txt"): 50}
    assert outcome.json["keep_ratio"] == 0.25
    q = outcome.json["layers"][ATTENTION]["q"]
    magnitude = torch.tensor(q["magnitude"])
    chosen = torch.zeros(len(magnitude), dtype=torch.bool)
    chosen[q["rows"]] = True
    assert chosen.sum() == len(q["rows"]) == 16
    assert magnitude[chosen].min() >= magnitude[~chosen].max()  # equal, as printed, is possible
    assert q["selected_share"] == pytest.approx(
        float(magnitude[q["rows"]].sum() / magnitude.sum()), abs=1e-3
    )
    assert outcome.json["training"] == [
        {key: value for key, value in log(i, 0.5 + i / 10).items() if key != "loss"} for i in (1, 2)
    ]
    mean = outcome.json["mean"]["v"]
    lines = outcome.printed.splitlines()
    assert lines[1].split()[0] == "layer"
    assert [line.split()[0] for line in lines[2:5]] == ["0", "1", "mean"]
    assert f"{mean['largest_over_median']:.1f}" == lines[4].split()[-1]
    (texts,) = [line for line in lines if line.startswith("texts")]
    assert f"{100 * mean['overlap']['texts']:.1f} %" == " ".join(texts.split()[-2:])


def decode(png: bytes) -> Any:
    from matplotlib.image import imread

    pixels = imread(io.BytesIO(png), format="png")
    assert pixels.std() > 0.02, "blank"
    return pixels


class Page(HTMLParser):
    """Its images, resources and text; every element is closed in order."""

    void = ("meta", "img", "source", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag not in self.void:
            self.open.append(tag)
        if tag == "img":
            self.images.append(values)
        self.sources += [v for k, v in attrs if v and k in ("src", "srcset", "href", "data")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_holds_everything_that_it_shows(outcome: Outcome) -> None:
    page = Page(outcome.html)
    names = ["channels_q", "channels_k", "channels_v", "concentration", "context", "training"]
    assert len(page.images) == len(names)
    prefix = "data:image/png;base64,"
    for name, image in zip(names, page.images, strict=True):
        assert len(image["alt"] or "") > 60
        own = base64.b64decode((image["src"] or "").removeprefix(prefix))
        assert own == (outcome.directory / f"{name}.png").read_bytes()
    assert len(page.sources) == 2 * len(names)  # light and dark
    assert all(source.startswith(prefix) for source in page.sources)
    for source in page.sources:
        decode(base64.b64decode(source.removeprefix(prefix)))
    assert not re.search(r"https?://|<script|@import|url\(", outcome.html)
    assert 'name="viewport"' in outcome.html
    assert "prefers-color-scheme: dark" in outcome.html
    assert "a<b>.txt" in page.text  # escaped
    share = outcome.json["mean"]["q"]["top_share"]["0.3"]
    assert f"{100 * share:.0f} %" in page.text


def browser() -> str:
    names = ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is installed")
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_opens_in_a_browser(outcome: Outcome, tmp_path: Path, scheme: str) -> None:
    """As wide as a phone: every image is shown, and only tables and maps scroll sideways."""
    probe = """<script>addEventListener("load", () => { document.body.innerHTML = JSON.stringify({
      images: [...document.images].map(i => [i.naturalWidth, i.clientWidth > 100, i.currentSrc]),
      sideways: document.documentElement.scrollWidth - innerWidth, width: innerWidth,
      background: getComputedStyle(document.body).backgroundColor }); });</script></body>"""
    page = tmp_path / "report.html"
    page.write_text(outcome.html.replace("</body>", probe), encoding="utf-8")
    result = subprocess.run(
        [
            browser(), "--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,900",
            f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000",
            f"--blink-settings=preferredColorScheme={int(scheme == 'light')}",
            "--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    body = re.search(r"<body>(\{.*\})</body>", result.stdout, re.DOTALL)
    assert body, result.stdout[-2000:]
    seen = json.loads(html.unescape(body[1]))
    assert len(seen["images"]) == 6
    assert all(natural > 600 and is_wide for natural, is_wide, _ in seen["images"])
    assert seen["sideways"] <= 0
    assert seen["width"] <= 500
    assert seen["background"] == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(13, 17, 23)")
    # The pictures have the page's colours.
    corner = decode(base64.b64decode(seen["images"][0][2].partition(",")[2]))[0, 0, :3]
    assert (corner.mean() > 0.9) == (scheme == "light")


def test_layers_of_other_widths_and_more_channels_than_pixels_are_drawn(tmp_path: Path) -> None:
    def channels(count: int) -> Channels:
        rows = torch.arange(count // 2, dtype=torch.int32)
        magnitude = torch.arange(count, 0, -1).float()
        return Channels(2, magnitude, rows, context_overlap=(0.5, 0.6, 0.7, 0.8, 1.0))

    layers: dict[str, Any] = {"a.0": {"q": channels(2500)}, "a.1": {"q": channels(800)}}
    found = Inspection(SelectionConfig(0.5), {"text": 100}, layers, ["k is left out"])
    files = write_report(found, tmp_path / "deep" / "out", "m")
    assert [file.name for file in files] == [
        "inspect.json", "channels_q.png", "concentration.png", "context.png", "report.html",
    ]  # fmt: skip
    pixels = decode((tmp_path / "deep" / "out" / "channels_q.png").read_bytes())[..., :3]
    colourful = pixels.max(-1) - pixels.min(-1) > 0.15
    top, bottom = colourful[: len(pixels) // 2], colourful[len(pixels) // 2 :]
    width = pixels.shape[1]
    half = top[:, : int(0.75 * width)].any(0).nonzero()[0]
    third = bottom[:, : int(0.75 * width)].any(0).nonzero()[0]
    # Selected are 1,250 of 2,500, and 400 of 800 on the same axis.
    assert (half[-1] - half[0]) / (third[-1] - third[0]) == pytest.approx(1250 / 400, rel=0.05)
    assert "k is left out" in Page(files[-1].read_text(encoding="utf-8")).text
    assert as_dict(found, "m")["mean"]["q"]["overlap"]["texts"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model", "--text", "none.txt"], r"none\.txt: there is no such file"),
        (["model", "--text", "latin.txt"], r"latin\.txt is not UTF-8"),
        (["model", "--text", "b.txt", "--keep-ratio", "30"], r"keep_ratio=30\.0"),
        (["model", "--text", "b.txt", "--metric", "mean"], "metric='mean'"),
        (["model", "--text", "b.txt", "--max-tokens", "3"], "--max-tokens 3: use at least 32"),
        (["model", "--text", "b.txt", "--logs", "none"], "--logs none does not exist"),
        (["model", "--text", "b.txt", "--output", "b.txt"], r"--output b\.txt is a file"),
        (["empty", "--text", "b.txt"], "empty"),
        (["model", "--text", "short.txt"], r"'short\.txt' has token ids \[2\]"),
        (["model", "--text", "b.txt", "--capture", "norm"], "has no norm of q and k"),
    ],
)
def test_a_users_mistake_is_one_line(
    folder: Path, tmp_path: Path, arguments: list[str], message: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(folder / "model")
    (tmp_path / "b.txt").write_text((folder / "b.txt").read_text())
    (tmp_path / "short.txt").write_text(" ".join((folder / "b.txt").read_text().split()[:2]))
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin.txt").write_bytes("für".encode("latin-1"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        run_command(*arguments)
    assert left.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("longact inspect: ")
    assert re.search(message, line)
    assert not (tmp_path / "inspect").exists()
