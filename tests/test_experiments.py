"""The experiment's machinery: store, plan, tasks, models, arms, measures, runs, and the driver."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import random
import re
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs the rl extra")
# experiments is not installed; last, so that the longact that is tested is the installed one.
sys.path.append(str(Path(__file__).parents[1]))

import torch
from datasets import Dataset
from helpers import threads
from models import changed_rows, params_of, tiny_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from trainers import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from experiments import arms, driver, measures, models, tasks, training
from experiments.__main__ import main
from experiments.plan import CONFIGS, Run, plan, read_config
from experiments.store import Store, key_of
from longact.inspection import Channels, Inspection
from longact.selection import SelectionConfig

WIDTH, HEAD_DIM, LAYERS = 64, 16, 2
BASE = {
    "seed": 0, "layers": LAYERS, "width": WIDTH, "heads": 4, "kv_heads": 2, "steps": 5,
    "first_loss": 9.0, "tokens": 500, "lengths": [16, 32],  # no lookup is learnt
}  # fmt: skip
TASK = {"length": 32, "options": {"hops": 0}}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with threads(1):  # as a worker has
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a model pretrained for a moment, whose channels of q, k and v differ clearly."""
    with threads(1):
        path = models.checkpoint(BASE, tmp_path_factory.mktemp("models"))
    model = AutoModelForCausalLM.from_pretrained(path)
    generator = torch.Generator().manual_seed(1)
    for name, param in model.named_parameters():
        if re.search(r"[qkv]_proj", name):
            param.data *= (torch.randn(len(param), 1, generator=generator) / 2).exp()
            param.data *= 0.2 / param.data.std()
    model.save_pretrained(path)
    return path


# ---- store ---------------------------------------------------------------------------------------


def record(key: str) -> dict[str, Any]:
    return {"key": key, "spec": {"name": "é"}, "metrics": {"loss": [0.1, 2e-9]}}


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_a_store_gives_back_what_was_added_but_a_torn_last_line(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "not yet" / "there.jsonl"
    for key in "bca":
        Store(path).add(record(key))
    assert [*Store(path).records.items()] == [(key, record(key)) for key in "bca"]
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    store = Store(path)
    assert [*store.records] == ["b", "c"]
    store.add(record("a"))
    assert path.read_bytes() == whole


@pytest.mark.parametrize("bad", ['{"key": "b", "spe', "{}", "[1]", ""])
def test_a_bad_line_in_the_middle_is_an_error_with_its_place(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "store.jsonl"
    path.write_text("\n".join([json.dumps(record("a")), bad, json.dumps(record("c")), ""]))
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}, line 2: not a record"):
        Store(path)


def test_a_key_says_all_that_a_run_depends_on() -> None:
    spec = {"seed": 0, "task": {"length": 32, "options": {"hops": 0}}, "rates": [1, 2]}
    changes = {
        "seed": 1,
        "task": {"length": 32, "options": {"hops": 1}},
        "rates": [2, 1],
        "a": None,
    }
    keys = {key_of("train", {**spec, name: value}) for name, value in changes.items()}
    keys |= {key_of("select", spec), key_of("train", spec)}
    assert len(keys) == len(changes) + 2
    assert key_of("train", dict(reversed(spec.items()))) == key_of("train", spec)


# ---- plan ----------------------------------------------------------------------------------------

RATES = {
    "sft": {"others": [3e-3, 1e-3, 2e-3], "sparse": [1e-2]},
    "grpo": {"others": [3e-3, 1e-3], "sparse": [2e-2]},
}
GROUP: dict[str, Any] = {
    "methods": {"sft": {"prompts": 2}, "grpo": {}}, "seeds": [0, 1, 2], "steps": 5, "task": TASK,
    "arms": ["full", "longact", "sparse", "sparse random"],
    "tuning": {"seed": 101, "learning_rates": RATES},
    "evaluations": {"1x": TASK, "2x": {"length": 64, "options": {"hops": 0}}},
}  # fmt: skip
CONFIG: dict[str, Any] = {
    "name": "test",
    "bases": {"seeds": [7, 8], "layers": 2},
    "selection": {"examples": 2, "lengths": [32, 64], "tasks": {"recall": TASK, "other": TASK}},
    "groups": [GROUP],
}


def done(run: Run, score: Callable[[Mapping[str, Any]], float] = lambda spec: 0.5) -> Any:
    """A record as if the run had been. The evaluations but the first favour the highest rate."""
    if run.kind != "train":
        return {}
    accuracy = {"1x": score(run.spec), "2x": 1000 * run.spec["learning_rate"]}
    return {"key": run.key, "spec": dict(run.spec), "metrics": {"after": {"accuracy": accuracy}}}


def stages(config: Mapping[str, Any], **options: Any) -> list[list[Run]]:
    """The runs of each stage, with all that come before it done."""
    records: dict[str, Any] = {}
    found = []
    while runs := plan(config, records):
        found.append(runs)
        records |= {run.key: done(run, **options) for run in runs}
    return found


def test_stages_come_in_order_each_run_once() -> None:
    base, tune, final = stages(CONFIG)
    assert [(run.kind, run.stage, dict(run.spec)) for run in base] == [
        ("pretrain", "base", {"seed": seed, "layers": 2}) for seed in (7, 8)
    ]
    named = stages({**CONFIG, "bases": {"model": "a/name"}})
    assert {run.kind for runs in named for run in runs} == {"selection", "train"}
    selection, tuning = tune[:2], tune[2:]
    assert [run.spec["base"]["seed"] for run in selection] == [7, 8]
    assert [(r.spec["method"], r.spec["arm"], r.spec["learning_rate"]) for r in tuning] == [
        *itertools.product(["sft"], ["full", "longact"], [3e-3, 1e-3, 2e-3]),
        *itertools.product(["sft"], ["sparse", "sparse random"], [1e-2]),
        *itertools.product(["grpo"], ["full", "longact"], [3e-3, 1e-3]),
        *itertools.product(["grpo"], ["sparse", "sparse random"], [2e-2]),
    ]
    # By seeds first, over all groups: a store cut short has all arms alike.
    cells = [(run.spec["seed"], run.spec["method"], run.spec["arm"]) for run in final]
    assert cells == [*itertools.product(range(3), ("sft", "grpo"), GROUP["arms"])]
    assert {(run.kind, run.stage, run.spec.get("split")) for run in [*tune, *final]} == {
        ("selection", "selection", None),
        ("train", "tune", "validation"),
        ("train", "final", "test"),
    }
    assert {run.spec["seed"] for run in tuning} == {101}
    for run in [*tuning, *final]:
        assert run.spec.get("prompts") == (2 if run.spec["method"] == "sft" else None)
        assert run.spec["base"]["seed"] == 7 + run.spec["seed"] % 2
    assert {tuple(run.spec["evaluations"]) for run in tuning} == {("1x",)}  # that which chooses
    assert {tuple(run.spec["evaluations"]) for run in final} == {("1x", "2x")}
    # What the store has is not planned again; of two groups that ask for the same, one run.
    records = {run.key: done(run) for run in [*base, *tune[:3], *tune[4:]]}
    assert plan(CONFIG, records) == [tune[3]]
    records |= {run.key: done(run) for run in [*tune, *final[:-2]]}
    assert plan(CONFIG, records) == final[-2:]
    assert stages({**CONFIG, "groups": [GROUP, GROUP]}) == [base, tune, final]


def test_the_learning_rate_is_what_tuning_found_best_for_the_arm() -> None:
    best = {("sft", "full"): 3e-3, ("sft", "longact"): 2e-3}

    def score(spec: Mapping[str, Any]) -> float:
        return float(spec["learning_rate"] == best.get((spec["method"], spec["arm"])))

    *_, final = stages(CONFIG, score=score)
    for run in final:
        cell = method, arm = run.spec["method"], run.spec["arm"]
        equal = 1e-3 if arm in ("full", "longact") else {"sft": 1e-2, "grpo": 2e-2}[method]
        assert run.spec["learning_rate"] == best.get(cell, equal), cell  # of equals the lowest


def test_bases_and_learning_rates_can_be_given() -> None:
    bases = [{"seeds": [0, 1], "layers": 2}, {"seeds": [0], "layers": 8}, {"model": "a/path"}]
    group = {name: value for name, value in GROUP.items() if name != "tuning"}
    group |= {"methods": {"sft": {"learning_rate": 4e-3}, "grpo": {}}, "learning_rate": 5e-3}
    base, final = stages({"name": "test", "bases": bases, "groups": [group]})
    expected = [{"seed": 0, "layers": 2}, {"seed": 1, "layers": 2}, {"seed": 0, "layers": 8}]
    assert [dict(run.spec) for run in base] == expected  # a model by name is pretrained already
    assert {(run.spec["method"], run.spec["learning_rate"]) for run in final} == {
        ("sft", 4e-3), ("grpo", 5e-3),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bases: {seeds: [0]}\ngroup: []", r"\['group'\] mean nothing"),
        ("bases: {seeds: [0]}\ngroups: [{arms: [full, lngact]}]", "arm 'lngact' does not exist"),
    ],
)
def test_an_unknown_key_or_arm_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config(str(path))


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_the_shipped_configs_can_be_run(name: str) -> None:
    config = read_config(name)
    for group in config.get("groups", ()):
        # Tuned on a seed of its own.
        assert group.get("tuning", {"seed": None})["seed"] not in group["seeds"]
        assert set(group["methods"]) <= set(training.OPTIONS)
    for run in itertools.chain(*stages(config)):
        spec = dict(run.spec)
        base = spec.pop("base", spec)
        assert base == {"model": "smollm2"} or models.Pretraining(**base).steps > 0
        if run.kind == "train":
            assert training.read(spec).learning_rate > 0
        elif run.kind == "selection":
            assert len([training.Task(**task) for task in spec["tasks"].values()]) > 1


# ---- tasks ---------------------------------------------------------------------------------------


def answer(words: list[str]) -> tuple[str, int]:
    """Reads a prompt as its language is meant: the value of the key asked for, and the hops."""
    start, *said, key = words
    assert start == "<bos>"
    said = [word for word in said if word[0] != "f"]
    facts = dict(zip(said[::2], said[1::2], strict=True))
    assert len(facts) == len(set(facts.values())) == len(said) / 2
    assert all(key[0] == "k" and value[0] in "kv" for key, value in facts.items())
    hops = 0
    while facts[key][0] == "k":
        key, hops = facts[key], hops + 1
    return facts[key], hops


@pytest.mark.parametrize("hops", [0, 1, 2])
@pytest.mark.parametrize("length", [8, 32, 256])
def test_a_prompt_holds_its_answer_after_so_many_hops(length: int, hops: int) -> None:
    data = tasks.make_dataset(length, hops, examples=20, split="test", seed=0)
    for row in data:
        words = row["prompt"].split(" ")
        assert len(words) == length
        assert answer(words) == (row["answers"][0], hops)
    with pytest.raises(ValueError, match=f"too short for {hops} hops: give {4 + 2 * hops}"):
        tasks.draw(random.Random(0), 3 + 2 * hops, hops)
    assert len(tasks.draw(random.Random(0), 4 + 2 * hops, hops).context) == 3 + 2 * hops


def test_examples_depend_on_their_arguments_and_index_alone() -> None:
    def prompts(examples: int = 6, **changed: Any) -> list[str]:
        arguments = {"length": 32, "hops": 0, "split": "train", "seed": 0, **changed}
        return tasks.make_dataset(**arguments, examples=examples)["prompt"][:]

    first = prompts()
    random.seed(5)
    assert prompts() == first
    assert prompts(3) == first[:3]
    others = prompts(split="validation") + prompts(split="test") + prompts(seed=1)
    assert len({*first, *others}) == 24


def test_a_word_is_a_token(tmp_path: Path) -> None:
    tasks.make_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, padding_side="left")
    assert len(tokenizer) == len(set(tasks.WORDS))
    text = " ".join(tasks.WORDS)
    assert tokenizer(text)["input_ids"] == [*range(len(tasks.WORDS))]
    assert tokenizer.decode([*range(len(tasks.WORDS))]) == text
    # As SFT joins them: the end is a word of its own.
    ids = tokenizer("v001<eos>")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["v001", "<eos>"]
    padded = tokenizer(["<bos> f01 k01", "k01"], padding=True)["input_ids"]
    assert padded[1] == [0, 0, padded[0][-1]]


# ---- models --------------------------------------------------------------------------------------


def test_labels_are_the_answers_alone() -> None:
    ids, labels = models.batch(random.Random(0), 8, length=40, hops=1, filler=0.5, questions=7)
    assert ids.dtype == labels.dtype == torch.int64
    lengths = set()
    for row, row_labels in zip(ids.tolist(), labels.tolist(), strict=True):
        words = [tasks.WORDS[i] for i in row if i]
        expected = [-100] * len(row)
        for i in range(39, len(words), 2):
            assert answer([*words[:39], words[i]]) == (words[i + 1], 1)
            expected[i + 1] = row[i + 1]
        assert row_labels == expected
        lengths.add(len(words))
    assert max(lengths) == 39 + 2 * 7 == ids.shape[1]
    assert len(lengths) > 1  # some are padded


def test_pretraining_learns_and_gives_the_same_bits_again() -> None:
    def loss(model: Any) -> float:
        ids, labels = models.batch(random.Random(9), 32, 26, 0, 0.0, 12)
        return float(model(ids, labels=labels).loss.detach())

    # A guess among all words has 5.4, one among the values 4.9.
    spec = models.Pretraining(
        **{**BASE, "learning_rate": 5e-3, "first_layers": 1, "first_loss": 4.9}
    )
    model = models.pretrain(spec)
    start = loss(models.build(spec, spec.layers, spec.rope_theta))
    assert abs(start - math.log(len(tasks.WORDS))) < 0.5
    assert len(model.base_model.layers) == 2
    assert loss(model) < 5.05
    few = dataclasses.replace(spec, first_loss=6.0)  # steps, some of both parts
    one, again = (params_of(models.pretrain(few)) for _ in range(2))
    for name, param in one.items():
        assert torch.equal(param, again[name]), name
    with pytest.raises(RuntimeError, match=r"seed 0: a loss of \d.* after 2 steps"):
        models.pretrain(dataclasses.replace(spec, first_loss=0.3, first_steps=2))


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_a_checkpoint_is_what_was_pretrained_and_pretrained_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    base = {**BASE, "architecture": architecture, "steps": 1}
    expected = params_of(models.pretrain(models.Pretraining(**base)))
    path = models.checkpoint(base, tmp_path)
    assert models.checkpoint({**base, "seed": 1}, tmp_path) != path
    monkeypatch.setattr(models, "pretrain", None)
    assert models.checkpoint(dict(reversed(base.items())), tmp_path) == path
    assert models.checkpoint({"model": "a/name"}, tmp_path) == "a/name"
    model, tokenizer = training.load(path, "cpu")
    assert (model.config.model_type, model.dtype) == (architecture, torch.float32)
    assert all(torch.equal(param, expected[name]) for name, param in params_of(model).items())
    assert tokenizer.padding_side == "left"


def test_a_half_written_checkpoint_is_never_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, real = {**BASE, "steps": 1}, models.pretrain
    with monkeypatch.context() as patch:
        patch.setattr(models, "make_tokenizer", SimpleNamespace)  # cannot be saved
        with pytest.raises(AttributeError, match="save_pretrained"):
            models.checkpoint(base, tmp_path)
    # And another worker may be faster: where the models are gone, all begin at once.
    faster: list[str] = []

    def pretrain(spec: models.Pretraining, device: str) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(models, "pretrain", real)
            patch.setattr(models.os, "getpid", lambda: 1)
            faster.append(models.checkpoint(base, tmp_path))
        return real(spec, device)

    monkeypatch.setattr(models, "pretrain", pretrain)
    path = models.checkpoint(base, tmp_path)
    assert [path] == faster
    assert [*tmp_path.iterdir()] == [Path(path)]  # of one process's id, so written over
    training.load(path, "cpu")


# ---- arms ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trains:
    """What an arm says that it trains, in words of its own; nothing here reads `arms.ARMS`."""

    kinds: str = ""  # of which only some rows are trained
    keep: float = 0.3
    #: Whose rows: those that the projection's own outputs rank ("top" or "low", of the step before;
    #: "once", of the first; "now", of the same), drawn, or of another measure or scope.
    rows: str = "top"
    others: bool = True
    frozen: str = ""


SELECTIONS = ("head", "model", "norm", "rope", "pairs")
OPTIONS = {
    "": Trains("qk"), "v": Trains("v"), "q only": Trains("q"), "k only": Trains("k"),
    "all": Trains("qk", 1.0), "keep 0.1": Trains("qk", 0.1), "keep 0.5": Trains("qk", 0.5),
    "random": Trains("qk", rows="fixed"), "redrawn": Trains("qk", rows="drawn"),
    "lowest": Trains("qk", rows="low"), "zero_grad": Trains("qk", rows="decayed"),
    "once": Trains("qk", rows="once"), "forward": Trains("qk", rows="now"),
    **{name: Trains("qk", rows=name) for name in SELECTIONS},
}  # fmt: skip


def trains_of(arm: str) -> Trains:
    if arm in ("full", "no q k"):
        return Trains(frozen="" if arm == "full" else "qk")
    name = "" if arm == "longact" else arm.removeprefix("sparse").strip()
    return dataclasses.replace(OPTIONS[name], others=not arm.startswith("sparse"))


STEPS = 2
SPEC: dict[str, Any] = {
    "method": "sft", "learning_rate": 1e-2, "seed": 0, "steps": STEPS, "prompts": 4,
    "generations": 2, "task": TASK, "evaluations": {"1x": TASK}, "examples": 4,
    # No step of a learning rate of zero, which would change nothing.
    "options": {"warmup_steps": 0, "lr_scheduler_type": "constant"},
}  # fmt: skip


class Watch(TrainerCallback):  # type: ignore[misc]
    """What each forward of a training counts, and what each step changes, seen from outside."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.magnitudes: list[dict[str, Tensor]] = []  # summed |activation|, of each forward
        self.weights: list[dict[str, Tensor]] = []  # before each step, and after it
        self.hooks = [model.base_model.register_forward_pre_hook(self._begin)]
        for name, layer in model.named_modules():
            if name.endswith(("q_proj", "k_proj", "v_proj")):
                self.hooks.append(layer.register_forward_hook(self._counter(name)))

    def _begin(self, *args: Any) -> None:
        self.magnitudes.append({})

    def _counter(self, name: str) -> Callable[..., None]:
        def count(module: nn.Module, args: Any, y: Tensor) -> None:
            self.magnitudes[-1][name] = y.detach().double().abs().sum((0, 1))

        return count

    def _keep(self, *args: Any, **kwargs: Any) -> None:
        weights = params_of(self.model)  # without what an optimizer sees of them
        self.weights.append({n: w for n, w in weights.items() if "salient_" not in n})

    on_pre_optimizer_step = on_optimizer_step = _keep

    def changed(self, step: int) -> dict[str, list[int]]:
        """Of each parameter the rows of which any bit changed."""
        before, after = self.weights[2 * step : 2 * step + 2]
        return {name: changed_rows(before[name], after[name]) for name in before}


@dataclass
class Found:
    watch: Watch
    rows: dict[str, Tensor | None]
    start: dict[str, Tensor]
    activation_share: list[float] | None
    trained_weights: int
    model: Any

    def check(self, arm: str, start: Mapping[str, Tensor] | None = None) -> None:
        arms.check(arm, start or self.start, self.model, self.rows, self.activation_share)


def run_arm(arm: str, path: str, folder: Path, **changed: Any) -> Found:
    spec = training.read({**SPEC, "arm": arm, **changed})
    model, tokenizer = training.load(path, "cpu")
    start = params_of(model)
    trainer = training.make_trainer(spec, model, tokenizer, str(folder), "cpu")
    prompts = spec.task.dataset(tokenizer, 4, "validation", seed=1)["prompt"][:]
    inputs = tokenizer(prompts, return_tensors="pt")
    watch = Watch(model)
    model(**inputs)  # what a control is calibrated with
    handle = arms.start(trainer, arm, inputs, spec.seed)
    del watch.magnitudes[1:]
    trainer.add_callback(watch)
    trainer.train()
    rows = {} if handle is None else dict(handle.rows)
    trained = measures.trained_weights(model, rows)
    if handle is not None:
        handle.remove()
    share = training._curves(trainer.state.log_history).get("activation_share")
    return Found(watch, rows, start, share, trained, model)


@pytest.fixture(scope="session")
def runs(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Found]:
    """Each arm's run, once for all tests."""
    found: dict[str, Found] = {}

    def run(arm: str) -> Found:
        if arm not in found:
            with threads(1):
                found[arm] = run_arm(arm, tiny, tmp_path_factory.mktemp("run"))
        return found[arm]

    return run


def kind_of(name: str) -> str:
    """`q`, `k` or `v` of a projection or its weight; else nothing."""
    found = re.search(r"\b([qkv])_proj\b", name)
    return found[1] if found else ""


def keep_of(size: int, keep: float = 0.3) -> int:
    return max(1, math.floor(keep * size + 0.5))


def ranked(trains: Trains, magnitudes: list[dict[str, Tensor]], name: str, step: int) -> list[int]:
    """The rows of a step by the projection's own outputs. The first magnitudes are those of the
    calibration; a step's rows are chosen at the end of the one before, the first's by itself."""
    of_step = {"low": step, "once": 1, "now": step + 1}.get(trains.rows, max(1, step))
    score = magnitudes[of_step][name]
    count = keep_of(len(score), trains.keep)
    return sorted(score.topk(count, largest=trains.rows != "low").indices.tolist())


@pytest.mark.parametrize("arm", arms.ARMS)
def test_an_arm_trains_exactly_what_it_says(arm: str, runs: Callable[[str], Found]) -> None:
    run, trains = runs(arm), trains_of(arm)
    assert len(run.watch.magnitudes) == 1 + STEPS
    for step in range(STEPS):
        for name, rows in run.watch.changed(step).items():
            kind, size = kind_of(name), len(run.start[name])
            at = step, name
            if kind and kind in trains.kinds:
                if trains.rows in ("top", "low", "once", "now"):
                    module = name.removesuffix(".weight")
                    assert rows == ranked(trains, run.watch.magnitudes, module, step), at
                elif trains.rows == "decayed":
                    assert rows == [*range(size)], at
                elif trains.rows != "model":
                    parts = {"head": size // HEAD_DIM, "pairs": 2}.get(trains.rows, 1)
                    assert len(rows) == parts * keep_of(size // parts), at
            elif not trains.others or (kind and kind in trains.frozen):
                assert rows == [], at
            elif run.start[name].dim() == 2:  # that of <pad> is zero, and stays so
                assert rows == run.start[name].any(1).nonzero().flatten().tolist(), at
            else:
                assert rows, at
    run.check(arm)


def test_options_that_change_the_selection_do(runs: Callable[[str], Found]) -> None:
    """In the same first step of the same model."""
    changed = {arm: runs(arm).watch.changed(0) for arm in ("longact", "random", *SELECTIONS)}
    rows = {arm: [of[f"{n}.weight"] for n in runs("longact").rows] for arm, of in changed.items()}
    for one, other in itertools.combinations(rows.values(), 2):
        assert one != other
    # Of all layers together as many as of each alone.
    counts = {arm: [sum(map(len, of[i::2])) for i in (0, 1)] for arm, of in rows.items()}
    assert counts["model"] == [keep_of(LAYERS * WIDTH), keep_of(LAYERS * WIDTH // 2)]


def test_random_keeps_its_rows_and_redrawn_draws_others(
    runs: Callable[[str], Found], tiny: str, tmp_path: Path
) -> None:
    names = [f"{name}.weight" for name in runs("random").rows]
    for arm in ("random", "sparse random"):
        first, second = (runs(arm).watch.changed(step) for step in range(2))
        assert all(first[name] == second[name] for name in names)
        assert len({tuple(first[name]) for name in names}) == len(names)
    first, second = (runs("redrawn").watch.changed(step) for step in range(2))
    assert all(first[name] != second[name] for name in names)
    other = run_arm("random", tiny, tmp_path, steps=1, seed=1).watch.changed(0)
    assert all(other[name] != runs("random").watch.changed(0)[name] for name in names)


@pytest.mark.parametrize("arm", ["random", "redrawn", "lowest", "sparse random", "sparse lowest"])
def test_the_check_finds_rows_of_another_rule(
    arm: str, runs: Callable[[str], Found], tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs("lowest")

    def salient(control: arms.Control, magnitude: Tensor) -> Tensor:
        return magnitude.topk(keep_of(len(magnitude))).indices.sort().values.int()

    monkeypatch.setattr(arms.Control, "_rows", salient)
    with pytest.raises(RuntimeError, match=rf"{arm!r} is broken: 30% of the rows.* of the activ"):
        training.train({**SPEC, "arm": arm}, tiny, "cpu")
    with pytest.raises(RuntimeError, match="'longact' is broken: 30% of the rows, salient, had"):
        runs("lowest").check("longact")


@pytest.mark.parametrize(
    ("arm", "name", "message"),
    [
        ("sparse", "mlp.up_proj", "{} was trained"),
        ("sparse", "self_attn.q_norm", "{} was trained"),
        ("sparse v", "self_attn.q_proj", "{} was trained"),
        ("no q k", "self_attn.k_proj", "{} was trained"),
        ("random", "self_attn.k_proj", "other rows of {} changed"),
        ("once", "self_attn.q_proj", "other rows of {} changed"),
        ("sparse random", "self_attn.q_proj", "other rows of {} changed"),
    ],
)
def test_the_check_finds_a_change_that_should_not_be(
    runs: Callable[[str], Found], arm: str, name: str, message: str
) -> None:
    run, name = runs(arm), f"model.layers.1.{name}.weight"
    before, after = copy.deepcopy(run.start), params_of(run.model)
    rows = changed_rows(before[name], after[name])
    before[name][next(row for row in range(len(after[name])) if row not in rows)] += 1
    with pytest.raises(RuntimeError, match=f"{arm!r} is broken: {message.format(name)}"):
        run.check(arm, before)
    if rows:
        with pytest.raises(RuntimeError, match=f"{name} was not trained"):
            run.check(arm, {**before, name: after[name]})


# ---- measures ------------------------------------------------------------------------------------


def test_work_counts_the_products_of_forward_and_backward(tiny: str) -> None:
    """All linear layers', as torch counts them; of attention half, as half of it is masked."""
    model = AutoModelForCausalLM.from_pretrained(tiny, attn_implementation="eager").train()
    ids = torch.randint(5, 200, (3, 24))
    every = measures.trained_weights(model, {})
    for is_trained in (True, False):
        with torch.set_grad_enabled(is_trained), FlopCounterMode(display=False) as counter:
            with measures.Work(model) as work:
                states = model.base_model(ids).last_hidden_state
            if is_trained:
                states.sum().backward()
        counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
        attention = counts.pop("aten.bmm")
        assert work.tokens == {"forward": 72, "backward": 72 * is_trained}
        assert work.flops(every) == sum(counts.values()) + attention / 2
        # Without a single weight gradient a third of the linear layers' is gone.
        assert work.flops(every) - work.flops(0) == sum(counts.values()) / 3 * is_trained


def test_work_counts_what_generation_reads_of_the_cache(tiny: str) -> None:
    model, _ = training.load(tiny, "cpu")
    ids = torch.randint(5, 200, (2, 10))
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with measures.Work(model) as work:
        model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    model(ids)  # outside of it nothing counts
    assert work.tokens == {"forward": 2 * (10 + 3), "backward": 0}
    pairs = 2 * (10 * 10 / 2 + 10.5 + 11.5 + 12.5)
    weights = measures.trained_weights(model, {})
    assert work.flops(0) == 2 * weights * 26 + 4 * LAYERS * WIDTH * pairs


def test_trained_weights_are_those_that_a_step_trains(runs: Callable[[str], Found]) -> None:
    linear = {name: p.numel() for name, p in runs("full").start.items() if "_proj" in name}
    every = sum(linear.values())
    qk = sum(n for name, n in linear.items() if kind_of(name) in ("q", "k"))
    selected = LAYERS * WIDTH * (keep_of(WIDTH) + keep_of(WIDTH // 2))
    expected = {"full": every, "no q k": every - qk, "sparse": selected, "sparse all": qk}
    expected["longact"] = every - qk + selected
    assert {arm: runs(arm).trained_weights for arm in expected} == expected


def test_accuracy_is_of_prompts_answered_in_full(tiny: str) -> None:
    """Of a model that learns one of three by heart; the prompts are of several lengths."""
    model, tokenizer = training.load(tiny, "cpu")
    rows = [tasks.make_dataset(n, 0, examples=1, split="train", seed=0)[0] for n in (16, 32, 24)]
    (value,) = rows[2]["answers"]
    other = next(v for v in tasks.VALUES if v != value)
    assert measures.accuracy(model, tokenizer, Dataset.from_list(rows), 4) == 0
    ids = torch.tensor([tokenizer(f"{rows[2]['prompt']} {value} <eos>")["input_ids"]])
    labels = ids.where(torch.arange(ids.shape[1]) >= 24, -100)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(30):
        model(ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    # A value besides would make two answers, of which one is said.
    for answers, right in ([value], 1), ([value, other], 0), ([other], 0):
        data = Dataset.from_list([*rows[:2], {**rows[2], "answers": answers}])
        for batch in (1, 3):
            assert measures.accuracy(model, tokenizer, data, 4, batch) == right / 3


def test_moved_says_which_rows_changed_most(tiny: str) -> None:
    model, tokenizer = training.load(tiny, "cpu")
    prompts = tasks.make_dataset(48, 0, examples=4, split="validation", seed=1)["prompt"]
    found = measures.look(model, tokenizer, prompts)
    before, params = params_of(model), dict(model.named_parameters())
    q0, q1 = (params[f"model.layers.{i}.self_attn.q_proj.weight"].data for i in (0, 1))
    first, second = (channels.magnitude for channels in found.of("q"))
    q0[first.topk(keep_of(WIDTH)).indices] += 1
    # Here those of the lowest magnitude in each head; the others by so little that bf16 has it not.
    q1 *= 1 + 2**-20
    lowest = (-second).view(-1, HEAD_DIM).topk(HEAD_DIM // 2).indices
    q1.view(-1, HEAD_DIM, WIDTH)[torch.arange(4)[:, None], lowest] += 1
    moved = measures.moved(before, model, found)
    assert moved["q"]["overlap"][0] == 1
    assert moved["q"]["head_overlap"][1] == [0] * 4
    assert [len(layer) for layer in moved["k"]["head_overlap"]] == [2, 2]
    changed = (keep_of(WIDTH) + WIDTH // 2) / (2 * WIDTH)
    assert moved["q"]["bf16_changed"] == pytest.approx(changed, abs=0.01)
    assert moved["k"]["bf16_changed"] == 0


def inspection(*layers: list[float]) -> Inspection:
    found = {}
    for i, magnitude in enumerate(map(torch.tensor, layers)):
        found[str(i)] = dict.fromkeys("qkv", Channels(1, magnitude, magnitude.topk(3).indices))
    return Inspection(SelectionConfig(), {}, found)


def test_concentration_and_overlap_are_means_over_layers() -> None:
    one = inspection([1.0] * 10, [1.0, 1, 1, 1, 1, 1, 1, 5, 5, 23])
    other = inspection([1.0] * 10, [0.0, 0, 9, 0, 0, 0, 0, 0, 8, 7])
    for kind in measures.concentration(one).values():
        assert kind["top_share"] == pytest.approx((0.3 + 33 / 40) / 2)
        assert kind["largest_over_median"] == pytest.approx((1 + 23) / 2)
    assert measures.overlap(one, other, "k") == pytest.approx((1 + 2 / 3) / 2)


# ---- training ------------------------------------------------------------------------------------


def plain(value: Any) -> bool:
    """Of Python's own types, and finite."""
    if isinstance(value, dict):
        return all(type(key) is str for key in value) and all(map(plain, value.values()))
    if isinstance(value, list):
        return all(map(plain, value))
    return value is None or (type(value) in (int, float) and math.isfinite(value))


def by_chance(completions: list[str], **columns: Any) -> list[float]:
    """A reward that a model which only guesses gets now and then."""
    return [float(zlib.crc32(text.encode()) % 2) for text in completions]


@pytest.mark.parametrize("method", ["sft", "grpo", "dapo"])
def test_a_run_gives_its_metrics_and_the_same_again(
    method: str, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "recall_reward", by_chance)
    spec = {**SPEC, "method": method, "generations": 4, "options": {}}
    full, sparse = (
        training.train({**spec, "arm": arm}, tiny, "cpu") for arm in ("full", "sparse random")
    )
    torch.manual_seed(123)
    random.seed(4)
    assert training.train({**spec, "arm": "sparse random"}, tiny, "cpu") == sparse
    for result in (full, sparse):
        assert set(result) == {
            "before", "flops", "tokens", "trained_rows", "after", "steps", "curves",
            "first_last_overlap", "moved",
        }  # fmt: skip
        assert plain(result)
        assert result["steps"] == len(result["curves"]["loss"]) == STEPS
        # DAPO makes two steps of what is generated.
        rewards = {"sft": 0, "grpo": STEPS, "dapo": STEPS // 2}[method]
        assert len(result["curves"].get("reward", ())) == rewards
    assert full["trained_rows"] is None
    rows = keep_of(WIDTH) + keep_of(WIDTH // 2)
    assert sparse["trained_rows"] == pytest.approx(rows / (WIDTH * 3 / 2), rel=1e-12)
    assert len(sparse["curves"]["activation_share"]) == STEPS
    assert sparse["flops"] < full["flops"]
    # Paired: arms of a seed have the same data, and generate the same from it; another's have not.
    assert full["before"] == sparse["before"]
    for name in {"loss", "reward"} & set(full["curves"]):
        assert full["curves"][name][0] == sparse["curves"][name][0]
    other = training.train({**spec, "arm": "full", "seed": 1}, tiny, "cpu")
    assert other["before"] == full["before"]
    assert other["curves"] != full["curves"]


def test_what_a_model_can_before_is_measured_once(
    tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a process, and again where anything is another that it depends on."""
    measured: list[bool] = []

    def accuracy(*_: Any) -> float:
        measured.append(torch.is_autocast_enabled("cpu"))
        return len(measured) / 10

    monkeypatch.setattr(training, "accuracy", accuracy)
    monkeypatch.setattr(training, "_scores_before", {})
    task = {"name": "niah_multikey_2", "length": 200}
    spec = {**SPEC, "evaluations": {"1x": task}, "arm": "full", "steps": 1}
    found = [training.train({**spec, **more}, tiny, "cpu") for more in ({}, {"seed": 1})]
    assert [r["before"]["accuracy"]["1x"] for r in found] == [0.1, 0.1]
    assert [r["after"]["accuracy"]["1x"] for r in found] == [0.2, 0.3]
    assert not any(measured)
    for more in ({"bf16": True}, {"split": "validation"}, {"examples": 5}):
        count = len(measured)
        training.train({**spec, **more}, tiny, "cpu")
        assert measured[count:] == [more == {"bf16": True}] * 2


def test_the_tasks_of_the_package_are_trained_and_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "recall_reward", by_chance)
    path, tokenizer = str(tmp_path), tiny_tokenizer()
    tokenizer.save_pretrained(path)
    tiny_model(vocab_size=len(tokenizer), max_position_embeddings=256).save_pretrained(path)
    task = {"name": "niah_multikey_2", "length": 200}
    spec = {**SPEC, "method": "grpo", "generations": 4, "arm": "longact", "bf16": True}
    found = training.train({**spec, "task": task, "evaluations": {"1x": task}}, path, "cpu")
    assert found["steps"] == STEPS
    assert found["tokens"]["backward"] > STEPS * spec["prompts"] * 4 * 100
    given = {
        (split, seed): training.Task(**task).dataset(tokenizer, 4, split, seed)["prompt"][:]
        for split in ("train", "validation", "test")
        for seed in (0, 1)
    }
    assert len({text for texts in given.values() for text in texts}) == 4 * len(given)


def test_dapo_that_has_nothing_to_learn_ends_early(tiny: str) -> None:
    """No completion is right: as the arm says, if no step was made."""
    found = training.train({**SPEC, "method": "dapo", "arm": "full"}, tiny, "cpu")
    assert found["steps"] == 0
    assert found["after"] == found["before"]


def test_the_methods_train_on_what_they_should(tiny: str, tmp_path: Path) -> None:
    model, tokenizer = training.load(tiny, "cpu")

    def trainer(method: str) -> Any:
        spec = {**SPEC, "method": method, "arm": "full", "generations": 4, "micro_batch": 8}
        return training.make_trainer(training.read(spec), model, tokenizer, str(tmp_path), "cpu")

    for batch in itertools.islice(trainer("sft").get_train_dataloader(), 2):
        assert len(batch["labels"]) == 8
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            words = tokenizer.convert_ids_to_tokens(ids)
            assert words[32:] == [answer(words[:32])[0], "<eos>"]
            assert labels.tolist() == [-100] * 32 + ids[32:].tolist()
    for method, generated in ("grpo", 16), ("dapo", 32):  # DAPO makes two steps of it
        args = trainer(method).args
        assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (8, 2)
        assert (args.num_generations, args.generation_batch_size) == (4, generated)
        assert args.max_completion_length == 1


def test_selections_are_compared(tiny: str) -> None:
    both = {"recall": TASK, "two hops": {"length": 32, "options": {"hops": 1}}}
    found = training.select({"examples": 2, "lengths": [32, 48], "tasks": both}, tiny, "cpu")
    assert plain(found)
    for kind in ("q", "k", "v"):
        assert found["lengths"][kind].keys() == {"32", "48"}
        assert found["lengths"][kind]["48"] == 1  # the longest, with itself
        assert 0.3 < found["texts"][kind] <= 1
        assert 0.3 < found["tasks"][kind] <= 1


# ---- driver --------------------------------------------------------------------------------------


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are threads here: a process would need seconds to import what it needs. (The smoke
    test has processes.)"""
    monkeypatch.setattr(
        driver, "ProcessPoolExecutor", lambda workers, *_: ThreadPoolExecutor(workers)
    )
    monkeypatch.setattr(training, "look_at", lambda *_: {})  # takes long


def command(folder: Path, *more: str, **changed: Any) -> list[str]:
    group = {**SPEC, "methods": {"sft": {}}, "arms": ["full", "sparse"], "seeds": [0], **changed}
    group = {name: value for name, value in group.items() if name not in ("method", "seed")}
    path = folder / "mine.yaml"  # JSON is YAML
    path.write_text(json.dumps({"bases": {**BASE, "seeds": [0]}, "groups": [group]}))
    folders = ["--store", str(folder / "store"), "--models", str(folder / "models")]
    return ["run", "--config", str(path), *folders, "--workers", "1", *more]


@pytest.mark.usefixtures("in_process")
def test_a_run_cut_short_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "store" / "mine.jsonl"
    assert main(command(tmp_path, "--minutes", "0")) == 0  # none begins
    assert not path.exists()
    assert not (tmp_path / "models").exists()
    assert main(command(tmp_path, "--minutes", "60")) == 0
    whole = Store(path).records
    assert [r["stage"] for r in whole.values()] == ["base", "final", "final"]
    for key, found in whole.items():
        assert found["key"] == key == key_of(found["kind"], found["spec"])
        assert set(found) == {
            "config", "commit", "dirty", "key", "kind", "stage", "spec", "versions", "device",
            "seconds", "cpu_seconds", "finished", "metrics",
        }  # fmt: skip
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:100])  # killed as it wrote
    assert main(command(tmp_path)) == 0
    text = path.read_bytes()
    assert text.splitlines(keepends=True)[:-1] == lines[:-1]
    again, last = Store(path).records, [*whole][-1]
    assert again[last]["metrics"] == whole[last]["metrics"]
    assert main(command(tmp_path)) == 0  # nothing is left to do
    assert path.read_bytes() == text


@pytest.mark.usefixtures("in_process")
def test_a_run_that_fails_is_reported_and_stops_no_other(
    tmp_path: Path, tiny: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = {"sft": {"others": [1e-3, 2e-3], "sparse": [1e-3]}}
    arguments = command(
        tmp_path, "--model", tiny, tuning={"seed": 9, "learning_rates": rates}, arms=["full", "v"]
    )
    real = arms.start

    def start(trainer: Any, *rest: Any) -> Any:
        if trainer.args.learning_rate == 1e-3:
            raise OSError("no")
        return real(trainer, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(arms, "start", start)
        assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.count("failed: tune {") == error.count("OSError: no") == 2
    found = [*Store(tmp_path / "store" / "mine.jsonl").records.values()]
    # The stage is finished, and no final run was begun, whose learning rate is not known.
    assert [(r["stage"], r["spec"]["learning_rate"]) for r in found] == [("tune", 2e-3)] * 2
    assert [r["spec"]["base"] for r in found] == [{"model": tiny}] * 2
    assert main(arguments) == 0  # it is tried again
    assert not (tmp_path / "models").exists()


@pytest.mark.slow
def test_the_smoke_configuration_runs_and_is_reported(tmp_path: Path) -> None:
    """As a user runs it, in a worker process."""
    store = "--store", str(tmp_path / "store")
    folders = *store, "--models", str(tmp_path / "models")
    subprocess.run(
        # One worker: another would import all again, which takes as long as half of the runs.
        [sys.executable, "-m", "experiments", "run", "--config", "smoke", *folders, "--workers=1"],
        cwd=Path(__file__).parents[1],
        timeout=1200,
        check=True,
    )
    found = Store(tmp_path / "store" / "smoke.jsonl").records
    assert {r["stage"] for r in found.values()} == {"base", "selection", "tune", "final"}
    assert plan(read_config("smoke"), found) == []
    assert main(["report", *store, "--docs", str(tmp_path)]) == 0
    assert (tmp_path / "results.md").stat().st_size > 0
