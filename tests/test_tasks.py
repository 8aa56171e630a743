"""Long-context tasks and their reward, checked by solvers that read nothing but the prompt."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import itertools
import json
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import smollm2
from harness import prepare_niah
from smollm2 import needs_smollm2

from longact import tasks
from longact.tasks import TASKS, make_dataset, recall_reward

EXAMPLES = Path(__file__).parent.parent / "examples"
CHATML = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} [end]"
    "{% endfor %}{% if add_generation_prompt %} [assistant] {% endif %}"
)
TINY, PLAIN, SMOLLM2 = "tiny", "tiny without a chat template", "SmolLM2"
#: The shortest prompts of the longest examples fit with some room for filler.
TOKENS = 640


@functools.cache
def tokenizer_of(kind: str) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    if kind == SMOLLM2:
        return smollm2.tokenizer()
    # Words are unknown, but counted; <s> is put in front of every text, as Llama's tokenizers do.
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "<unk>": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    template = {} if kind == PLAIN else {"chat_template": CHATML}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>", **template
    )


KINDS = [TINY, PLAIN, pytest.param(SMOLLM2, marks=needs_smollm2)]
all_tasks = pytest.mark.parametrize("task", sorted(TASKS))
all_kinds = pytest.mark.parametrize("kind", KINDS)


#: "cwe" needs much of it for its common words.
LONG = {"cwe": 760}


@functools.cache
def long_prompts(task: str, kind: str, conversational: bool = True) -> Any:
    """24 examples of `LONG.get(task, 700)` tokens, for training."""
    tokens = LONG.get(task, 700)
    return make_dataset(task, tokenizer_of(kind), tokens, 24, conversational=conversational)


def text_of(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else prompt[0]["content"]


def length_of(tokenizer: Any, prompt: Any) -> int:
    """As GRPOTrainer tokenizes it."""
    if isinstance(prompt, str):
        return len(tokenizer(text=[prompt])["input_ids"][0])
    encoded = tokenizer.apply_chat_template(
        [prompt], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    return len(encoded["input_ids"][0])


def needles_of(prompt: Any) -> list[tuple[str, str]]:
    """Key and number of every needle, in the order in which they stand."""
    return re.findall(r"numbers for ([a-z]+ [a-z]+) is: (\d{7})\.", text_of(prompt))


def assignments_of(prompt: Any) -> list[tuple[str, str]]:
    return re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?([A-Z]{5}|\d{5})\.", text_of(prompt))


def links_of(prompt: Any) -> list[tuple[str, str]]:
    link = r"special magic numbers? for ([a-z]+ [a-z]+) (?:is that|are those) for ([a-z]+ [a-z]+)\."
    return re.findall(link, text_of(prompt))


def words_of(prompt: Any) -> list[str]:
    """The words of the list, as often as they stand there."""
    _, text, _ = text_of(prompt).split("\n")
    return [word for word in text.split(" ") if word.isalpha()]


def solve(prompt: Any) -> str:
    """An oracle that knows how to read, and nothing of the generator."""
    text = text_of(prompt)
    if query := re.search(r"What are the (\w+) most (?:common|frequently appeared) words", text):
        asked = 3 if query[1] == "three" else int(query[1])
        return ", ".join(word for word, _ in Counter(words_of(prompt)).most_common(asked))
    if query := re.search(r"assigned the value (\d+) in the text", text):
        values: dict[str, str] = {}
        for name, source in assignments_of(prompt):
            values[name] = source if source.isdigit() else values[source]  # never used before set
        return " ".join(name for name, value in values.items() if value == query[1])
    query = re.search(r"What (?:is|are all) the special magic numbers? for (.*?) mentioned", text)
    assert query is not None
    keys, sources = query[1].replace(", and ", ", ").split(", "), dict(links_of(prompt))
    while set(keys) & set(sources):
        keys = [sources.get(key, key) for key in keys]
    return ", ".join(number for key, number in needles_of(prompt) if key in keys)


def state_everything(prompt: Any) -> str:
    return text_of(prompt)


def rewards(solver: Callable[[Any], str], dataset: Any) -> list[float]:
    """As TRL calls it: with the columns as keyword arguments."""
    columns = {name: list(dataset[name]) for name in dataset.column_names}
    prompts = columns.pop("prompt")
    return recall_reward(completions=[solver(p) for p in prompts], prompts=prompts, **columns)


@all_kinds
@all_tasks
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_solver_that_reads_gets_all_and_one_that_states_everything_does_not(
    task: str, kind: str, split: Any
) -> None:
    dataset = (
        long_prompts(task, kind).select(range(8))
        if split == "train"
        else make_dataset(task, tokenizer_of(kind), TOKENS, 8, split)
    )
    listed = ["candidates"] if task in ("cwe", "fwe") else []
    assert dataset.column_names == ["prompt", "answers", "task", *listed]
    assert set(dataset["task"]) == {task}
    assert rewards(solve, dataset) == [1.0] * 8
    # Of a single needle, everything is the answer.
    assert max(rewards(state_everything, dataset)) <= (1 if task == "niah_single_1" else 0.5)
    assert rewards(lambda prompt: "", dataset) == [0.0] * 8


@pytest.mark.parametrize(
    ("kind", "conversational"),
    # Without a template no prompt is a conversation.
    [(TINY, True), (TINY, False), (PLAIN, True)]
    + [pytest.param(SMOLLM2, is_chat, marks=needs_smollm2) for is_chat in (True, False)],
)
@all_tasks
def test_lengths_vary_up_to_tokens(task: str, kind: str, conversational: bool) -> None:
    tokenizer = tokenizer_of(kind)
    tokens, dataset = LONG.get(task, 700), long_prompts(task, kind, conversational)
    lengths = [length_of(tokenizer, prompt) for prompt in dataset["prompt"]]
    assert max(lengths) <= tokens
    assert max(lengths) > 0.93 * tokens
    # A target of 3/4 is missed by less than one sentence or word of filler.
    assert min(lengths) > 0.75 * tokens - {"niah_multikey_2": 24, "cwe": 10}.get(task, 7)
    assert len(set(lengths)) > 8
    assert min(lengths) < 0.85 * tokens


def test_a_prompt_is_as_long_as_fits() -> None:
    """One token of room is enough for the needles alone, and filler comes as soon as it fits."""
    tokenizer = tokenizer_of(TINY)
    with pytest.raises(ValueError, match=r"tokens=100 .* need up to (\d+)") as refused:
        make_dataset("vt", tokenizer, 100, 4)
    least = int(str(refused.value).split()[-1])
    with pytest.raises(ValueError, match=rf"tokens={least - 1} is too few for vt.* {least}$"):
        make_dataset("vt", tokenizer, least - 1, 4)
    lengths = [length_of(tokenizer, p) for p in make_dataset("vt", tokenizer, least, 4)["prompt"]]
    assert lengths == [least] * 4  # words are tokens here, and "vt" always has as many
    prompts = make_dataset("vt", tokenizer, least + 5, 48)["prompt"]
    # The first sentence of filler has 5 tokens; one example in six has room for all of them.
    assert {length_of(tokenizer, prompt) for prompt in prompts} == {least, least + 5}


@needs_smollm2
def test_the_tokens_needed_are_those_of_the_longest_example() -> None:
    tokenizer = tokenizer_of(SMOLLM2)
    with pytest.raises(ValueError, match="too few") as refused:
        make_dataset("niah_multiquery", tokenizer, 100, 16)
    least = int(str(refused.value).split()[-1])
    with pytest.raises(ValueError, match=f"tokens={least - 1} is too few .* {least}$"):
        make_dataset("niah_multiquery", tokenizer, least - 1, 16)
    prompts = make_dataset("niah_multiquery", tokenizer, least, 16)["prompt"]
    lengths = [length_of(tokenizer, prompt) for prompt in prompts]
    assert max(lengths) == least > min(lengths)


@pytest.mark.parametrize(
    ("task", "keys", "needles", "answers"),
    [
        ("niah_single_1", 1, 1, 1),
        ("niah_multikey_1", 12, 12, 1),
        ("niah_multiquery", 8, 8, 4),
        ("niah_multivalue", 3, 12, 4),
        ("niah_multihop", 4, 4, 1),
        ("vt", 10, 10, 5),
    ],
)
def test_what_a_prompt_holds(task: str, keys: int, needles: int, answers: int) -> None:
    dataset = make_dataset(task, tokenizer_of(TINY), TOKENS, 8)
    for prompt, expected in zip(dataset["prompt"], dataset["answers"], strict=True):
        found = assignments_of(prompt) if task == "vt" else needles_of(prompt)
        assert (len({key for key, _ in found}), len(found)) == (keys, needles)
        assert len(set(found)) == needles
        if task != "vt":
            assert len({number for _, number in found}) == needles
        assert len(expected) == answers
        assert all(sentence in text_of(prompt) for sentence in tasks.NOISE)


def test_a_needle_haystack_is_made_of_needles_alone() -> None:
    dataset = make_dataset("niah_multikey_2", tokenizer_of(TINY), TOKENS, 8)
    for prompt in dataset["prompt"]:
        found = needles_of(prompt)
        assert len({key for key, _ in found}) == len({n for _, n in found}) == len(found) > 20
        assert text_of(prompt).count(".") == len(found) + 3  # of the instruction
    long = make_dataset("niah_multikey_2", tokenizer_of(TINY), 20_000, 1)["prompt"][0]
    assert length_of(tokenizer_of(TINY), long) > 14_990
    assert len({key for key, _ in needles_of(long)}) == len(needles_of(long))
    with pytest.raises(
        ValueError, match=r"tokens=90000 is too many for niah_multikey_2: .* 4\d{4}$"
    ):
        make_dataset("niah_multikey_2", tokenizer_of(TINY), 90_000, 1)


def test_hops_lead_from_key_to_key_and_to_numbers_at_the_end_alone() -> None:
    dataset = make_dataset("niah_multihop", tokenizer_of(TINY), TOKENS, 16)
    orders = []
    for prompt, (answer,) in zip(dataset["prompt"], dataset["answers"], strict=True):
        sources, numbers = dict(links_of(prompt)), dict(needles_of(prompt))
        assert len(sources) == len(set(sources.values())) == 8
        assert not set(sources) & set(numbers)
        heads = set(sources) - set(sources.values())
        assert len(heads) == 4
        (asked,) = re.findall(r"number for ([a-z]+ [a-z]+) mentioned", text_of(prompt))
        assert asked in heads
        assert numbers[sources[sources[asked]]] == answer
        text = text_of(prompt)
        orders.append(text.index(f"for {asked} is that") < text.index(answer))
    assert len(set(orders)) == 2  # a number can come before what leads to it
    many = make_dataset(
        "niah_multiquery", tokenizer_of(TINY), TOKENS, 4, keys=3, queries=2, values=2, hops=3
    )
    assert {len(links_of(prompt)) for prompt in many["prompt"]} == {9}
    assert {len(answers) for answers in many["answers"]} == {4}
    assert rewards(solve, many) == [1.0] * 4


def test_without_distractors_all_keys_can_be_asked_for_as_rulers_do() -> None:
    dataset = make_dataset(
        "niah_multiquery", tokenizer_of(TINY), TOKENS, 4, keys=4, distractors=False
    )
    for prompt, answers in zip(dataset["prompt"], dataset["answers"], strict=True):
        assert {number for _, number in needles_of(prompt)} == set(answers)


@pytest.mark.parametrize(
    ("options", "common", "repeats", "others"),
    [({}, 10, 6, 1), ({"common": 4, "common_repeats": 30, "uncommon_repeats": 3}, 4, 30, 3)],
)
def test_common_words_stand_in_the_list_more_often_than_all_others(
    options: dict[str, int], common: int, repeats: int, others: int
) -> None:
    for tokens in (TOKENS, 4000):
        dataset = make_dataset("cwe", tokenizer_of(TINY), tokens, 8, **options)
        for row in dataset:
            words = words_of(row["prompt"])
            counts = Counter(words)
            assert {counts.pop(word) for word in row["answers"]} == {repeats}
            # The last of the others need not have all of its repeats.
            assert sorted(counts.values())[1:] == [others] * (len(counts) - 1)
            assert len(row["answers"]) == common <= len(counts)
            assert sorted({*row["answers"], *counts}) == row["candidates"]
            assert [int(n) for n in re.findall(r"(\d+)\. [a-z]", text_of(row["prompt"]))] == list(
                range(1, len(words) + 1)
            )
            # Spread over all of the list, what is common and what is not.
            half = words[: len(words) // 2]
            share = sum(half.count(word) for word in row["answers"]) / (common * repeats)
            assert 0.3 < share < 0.7
    assert len(counts) > 200
    # In the shortest list as well.
    shortest = Counter(TASKS["cwe"](random.Random(0), "train", **options).needles)
    assert sorted(shortest.values()) == [others] * common + [repeats] * common


@pytest.mark.parametrize("alpha", [1, 1.5, 2.0, 3.3, 4])
def test_frequent_words_lead_at_every_length(alpha: float) -> None:
    puzzle = TASKS["fwe"](random.Random(0), "train", alpha=alpha)
    counts = Counter(puzzle.needles)
    filler = iter(puzzle.filler)
    for _ in range(2000):
        dots, *ranked = counts.most_common()
        assert len(ranked) >= 6  # or all could be stated
        assert dots[0] == "..."
        assert {word for word, _ in ranked[:3]} == set(puzzle.answers)
        assert ranked[2][1] > ranked[3][1]
        counts[next(filler)] += 1


def test_frequencies_are_zipfs() -> None:
    """As RULER's: floor(n / rank ** alpha), with dots at rank 1."""
    (row,) = make_dataset("fwe", tokenizer_of(TINY), 4000, 1)
    text = text_of(row["prompt"]).split("\n")[1].split(" ")
    counts = [n for _, n in Counter(text).most_common()]
    n = counts[0]
    # Ranks are cut off within one size, so the last of them may be short of a copy.
    for rank, count in enumerate(counts, 1):
        assert count in (n // rank**2, n // rank**2 - 1)
    assert len(counts) in (int(n**0.5), int(n**0.5) - 1)
    assert len(row["candidates"]) == len(counts) - 1
    assert text.index("...") < 8  # shuffled, not in the order of arrival
    assert max(map(len, re.findall(r"(?:\.\.\. ?)+", " ".join(text)))) < 100


def test_needles_lie_anywhere_and_the_asked_ones_too() -> None:
    dataset = make_dataset("niah_multikey_1", tokenizer_of(TINY), 1024, 64, keys=3)
    text = [text_of(p) for p in dataset["prompt"]]
    depths = [t.index(a) / len(t) for t, (a,) in zip(text, dataset["answers"], strict=True)]
    assert min(depths) < 0.15
    assert max(depths) > 0.85
    assert 0.4 < sum(depths) / len(depths) < 0.6

    def places(dataset: Any) -> list[int]:
        return [
            [n for _, n in needles_of(p)].index(a)
            for p, (a,) in zip(dataset["prompt"], dataset["answers"], strict=True)
        ]

    order = places(dataset)
    test = make_dataset("niah_multikey_1", tokenizer_of(TINY), 1024, 16, "test", keys=3)
    assert places(test) != order[:16]
    assert all(order.count(place) >= 10 for place in range(3))  # 21 is even


def test_chains_are_interleaved() -> None:
    dataset = make_dataset("vt", tokenizer_of(TINY), TOKENS, 8)
    chains = []
    for prompt, answers in zip(dataset["prompt"], dataset["answers"], strict=True):
        # A chain, not a star: no variable is the source of two others.
        assert len({source for _, source in assignments_of(prompt)}) == 10
        chains.append("".join("AB"[name in answers] for name, _ in assignments_of(prompt)))
    assert len(set(chains)) >= 6
    assert sum("AB" in chain and "BA" in chain for chain in chains) >= 6


@all_tasks
def test_splits_share_no_word_number_or_variable(task: str) -> None:
    def vocabulary(dataset: Any) -> set[str]:
        if "candidates" in dataset.column_names:
            return {word for prompt in dataset["prompt"] for word in words_of(prompt)}
        readers = (needles_of, links_of, assignments_of)
        pairs = [pair for p in dataset["prompt"] for read in readers for pair in read(p)]
        return {word for pair in pairs for text in pair for word in text.split()}

    train = vocabulary(long_prompts(task, TINY))
    test = vocabulary(make_dataset(task, tokenizer_of(TINY), TOKENS, 32, "test", seed=1))
    assert len(train) > (60 if task == "niah_single_1" else 100)
    assert not train & test


def test_no_word_is_twice_in_the_lists_and_every_code_has_one_split() -> None:
    """So no other seed or length can make the splits meet."""
    words = [*tasks.ADJECTIVES.split(), *tasks.NOUNS.split()]
    assert len(words) == len(set(words)) == 240
    puzzles = {
        s: TASKS["niah_multikey_1"](random.Random(0), s, keys=3200) for s in ("train", "test")
    }
    keys = {
        split: {w for n in puzzle.needles for w in re.findall(r"for (\w+) (\w+) is", n)[0]}
        for split, puzzle in puzzles.items()
    }
    assert len(keys["train"]) == len(keys["test"]) == 120
    assert keys["train"] | keys["test"] == set(words)
    for alphabet in ("0123456789", "ABC"):
        codes = {}
        for split in ("train", "test"):
            stream = tasks._codes(random.Random(0), split, alphabet, 3)  # type: ignore[arg-type]
            drawn = [next(stream) for _ in range(10)]
            assert len(set(drawn)) == 10
            codes[split] = set(drawn)
            assert not any(code.startswith("0") for code in codes[split])
        assert not codes["train"] & codes["test"]
    # Neither split can be told from the last digit, or the first.
    stream = tasks._codes(random.Random(0), "train", "0123456789", 7)
    some = [next(stream) for _ in range(1000)]
    assert {c[-1] for c in some} == set("0123456789")
    assert {c[0] for c in some} == set("123456789")


@all_tasks
def test_an_example_depends_on_task_split_seed_and_index_alone(task: str) -> None:
    def rows(examples: int = 6, split: Any = "train", seed: int = 0) -> list[Any]:
        return list(make_dataset(task, tokenizer_of(TINY), TOKENS, examples, split, seed))

    first = rows()
    assert rows() == first
    assert rows(9)[:6] == first
    prompts = [text_of(row["prompt"]) for row in (*first, *rows(split="test"), *rows(seed=1))]
    assert len(set(prompts)) == 18


def test_prompts_stay_what_they_were() -> None:
    """In every process and version: a change here makes recorded results incomparable."""
    puzzle = TASKS["niah_multikey_2"](random.Random("a b"), "train")
    assert puzzle.answers == ["4546287"]
    assert (
        next(iter(puzzle.filler))
        == "One of the special magic numbers for honest raven is: 7864543."
    )


@pytest.mark.parametrize(
    ("task", "digest"),
    [
        ("niah_single_1", "90939823270334f8"),
        ("niah_multikey_1", "019cfd8fa9a6d4fb"),
        ("niah_multikey_2", "48aa270c23eefd22"),
        ("niah_multivalue", "45a0a5625c026a86"),
        ("niah_multiquery", "62758a69ab54c98e"),
        ("niah_multihop", "e31615408dfa7b94"),
        ("vt", "f04d3c4245241d1f"),
        ("cwe", "be6fe458b6ce6241"),
        ("fwe", "4eaf84ca0a230e93"),
    ],
)
def test_examples_stay_what_they_were(task: str, digest: str) -> None:
    rows = [
        row
        for split in ("train", "test")
        for seed in (0, 7)
        for row in make_dataset(task, tokenizer_of(PLAIN), TOKENS, 3, split, seed)  # type: ignore[arg-type]
    ]
    assert hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16] == digest


def test_text_prompts_end_in_the_first_words_of_the_answer() -> None:
    tokenizer = tokenizer_of(PLAIN)
    (one,) = make_dataset("niah_multikey_1", tokenizer, TOKENS, 1)["prompt"]
    key = re.search(r"magic number for (\w+ \w+) mentioned in the provided text\? ", one)
    assert key is not None
    said = f"The special magic number for {key[1]} mentioned in the provided text is"
    assert one.endswith(f"? {said}")
    (chat,) = make_dataset("niah_multikey_1", tokenizer_of(TINY), TOKENS, 1, conversational=False)[
        "prompt"
    ]
    # The tokenizer puts <s> in front by itself, so the text must not hold it as well.
    assert chat.startswith("[user] A special magic number is hidden")
    assert chat.endswith(f"? [end] [assistant] {said}")
    assert tokenizer_of(TINY)(chat)["input_ids"].count(0) == 1
    (many,) = make_dataset("niah_multiquery", tokenizer, TOKENS, 1)["prompt"]
    assert re.search(
        r"What are all the special magic numbers for (\w+ \w+, ){3}and \w+ \w+ mentioned", many
    )
    assert many.endswith("mentioned in the provided text are")
    (several,) = make_dataset("niah_multivalue", tokenizer, TOKENS, 1)["prompt"]
    assert re.search(r"What are all the special magic numbers for \w+ \w+ mentioned", several)
    (chains,) = make_dataset("vt", tokenizer, TOKENS, 1)["prompt"]
    assert re.search(r"5 variables are assigned the value (\d{5}), they are:$", chains)
    (common,) = make_dataset("cwe", tokenizer, TOKENS, 1, common=4)["prompt"]
    assert common.endswith(
        "above list? Answer: The top 4 words that appear most often in the list are:"
    )
    (frequent,) = make_dataset("fwe", tokenizer, TOKENS, 1)["prompt"]
    assert frequent.endswith("the three most frequently appeared words are:")


@needs_smollm2
def test_a_first_token_that_the_tokenizer_does_not_add_is_kept() -> None:
    """SmolLM2's first token is also what its template begins every message with."""
    tokenizer = tokenizer_of(SMOLLM2)
    (prompt,) = make_dataset("vt", tokenizer, TOKENS, 1, conversational=False)["prompt"]
    assert prompt.startswith("<|im_start|>system")
    assert prompt.count("<|im_start|>") == 3
    assert "<|im_start|>assistant\nAnswer: According to the chain(s)" in prompt


def test_options_set_the_difficulty() -> None:
    tokenizer = tokenizer_of(TINY)
    (prompt,) = make_dataset("niah_multikey_1", tokenizer, TOKENS, 1, keys=2)["prompt"]
    assert len(needles_of(prompt)) == 2
    row = make_dataset("niah_multiquery", tokenizer, TOKENS, 1, keys=3, queries=2, values=2)[0]
    assert (len(needles_of(row["prompt"])), len(row["answers"])) == (6, 4)
    assert rewards(solve, make_dataset("vt", tokenizer, TOKENS, 4, chains=3, hops=2)) == [1.0] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "niah_multiqeury"}, r"'niah_multiqeury' is unknown: did you mean 'niah_multiqu"),
        ({"task": "VT"}, r"task='VT' is unknown: did you mean '\w+'\? All: \['niah_single_1'"),
        ({"split": "training"}, "split='training': give 'train' or 'test'"),
        ({"examples": 0}, "examples=0: give 1 or more"),
        ({"tokens": 20}, r"tokens=20 is too few for niah_multiquery: .* need up to \d{3}"),
        ({"keys": 4}, r"keys=4, queries=4, values=1: .* more keys than queries \(at most 3200\)"),
        ({"keys": 3201}, "at most 3200"),
        ({"queries": 0}, "1 query or more"),
        ({"values": 0}, "give 1 value or more"),
        ({"task": "vt", "chains": 1}, "chains=1, hops=4: .* 2 chains or more"),
        ({"task": "vt", "hops": -1}, "hops=-1: give 0 hops or more"),
        ({"task": "niah_single_1", "queries": 2}, "no fewer keys than queries .at most 3200.$"),
        ({"task": "niah_multivalue", "keys": 1}, "more keys than queries"),
        ({"task": "niah_multihop", "hops": -1}, "hops=-1: give 0 hops or more"),
        ({"task": "niah_multihop", "keys": 1067}, r"keys=1067, .* \(at most 1066\)"),
        ({"task": "cwe", "common": 0}, "common=0, .* give 1 common word or more"),
        ({"task": "cwe", "common": 1.5}, r"options=\{'common': 1.5\}: cwe does not take them"),
        (
            {"task": "cwe", "uncommon_repeats": 6},
            "common_repeats=6, uncommon_repeats=6: .* more rep",
        ),
        ({"task": "cwe", "uncommon_repeats": 0}, "uncommon_repeats=0: .*, 1 or more"),
        ({"task": "cwe", "tokens": 200}, r"tokens=200 is too few for cwe: .* need up to \d{3}"),
        ({"task": "fwe", "alpha": 0.9}, "alpha=0.9: give 1 to 4"),
        ({"task": "fwe", "alpha": 4.1}, "alpha=4.1: give 1 to 4"),
    ],
)
def test_what_cannot_be_made_is_refused(arguments: dict[str, Any], message: str) -> None:
    usual = {"task": "niah_multiquery", "tokens": TOKENS, "examples": 2}
    with pytest.raises(ValueError, match=message):
        make_dataset(tokenizer=tokenizer_of(TINY), **{**usual, **arguments})


def test_a_list_that_words_do_not_last_for_is_refused(monkeypatch: Any) -> None:
    codes = tasks._codes
    monkeypatch.setattr(tasks, "_codes", lambda *args: itertools.islice(codes(*args), 300))
    with pytest.raises(ValueError, match=r"tokens=5000 is too many for cwe: its words last for 1"):
        make_dataset("cwe", tokenizer_of(TINY), 5000, 1)


def test_an_option_that_a_task_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"niah_multiquery does not take them .*'chains'"):
        make_dataset("niah_multiquery", tokenizer_of(TINY), TOKENS, 2, chains=3)


@pytest.mark.parametrize(
    ("completion", "answers", "reward"),
    [
        ("It is 1234567.", ["1234567"], 1.0),
        ("**1234567**", ["1234567"], 1.0),
        ("1234567,7654321;1111111", ["7654321", "1111111", "1234567"], 1.0),
        ("1234567", ["1234567", "7654321"], 0.5),
        ("1234567 1234567 1234567", ["1234567", "7654321"], 0.5),  # once is enough
        ("1234567 1234567 1234567", ["1234567"], 1.0),  # and repeating costs nothing
        ("1234567", ["1234567", "1234567"], 1.0),
        # Part of a longer number or word is no answer...
        ("91234567 12345678 x1234567 1234567_", ["1234567"], 0.0),
        # ...nor a wrong one: keys, list numbers and the query's value cost nothing.
        ("1. 1234567\n2. 99999 for amber acorn", ["1234567"], 1.0),
        # Wrong ones of the right kind do: one right of four stated.
        ("1234567 1111111 2222222 3333333", ["1234567"], 0.25),
        ("1234567 1111111 2222222 3333333", ["1234567", "7654321"], 0.25),
        ("1234567 1111111", ["1234567", "7654321"], 0.5),
        ("1234567 1111111 2222222", ["1234567", "2222222", "7654321", "7777777"], 0.5),
        ("VAR ABCDE = VAR QWERT = 12345", ["ABCDE", "QWERT"], 1.0),
        ("VAR ABCDE, VAR ZZZZZ", ["ABCDE"], 0.5),
        ("abcde", ["ABCDE"], 0.0),
        ("there is ABCDE, green", ["ABCDE"], 1.0),  # small letters are another kind
        ("ABCDE and 1234567 and ZZZZZ", ["ABCDE", "1234567"], 2 / 3),
        ("", ["1234567"], 0.0),
        (None, ["1234567"], 0.0),
        ([], ["1234567"], 0.0),
        ([{"role": "assistant", "content": "1234567"}], ["1234567"], 1.0),
        ([{"role": "assistant", "content": None}], ["1234567"], 0.0),
        ([{"role": "assistant"}], ["1234567"], 0.0),
        (
            [
                {"role": "assistant", "content": "123"},
                {"role": "tool", "content": "7654321"},  # said by another
                {"role": "assistant", "content": "4567 1111111"},  # not joined to 1234567
            ],
            ["1234567", "7654321", "1111111"],
            1 / 3,
        ),
        (
            [{"role": "assistant", "content": [{"type": "text", "text": "1234567"},
                                               {"type": "image"}, {"type": "text", "text": None}]}],
            ["1234567"],
            1.0,
        ),
    ],
)  # fmt: skip
def test_reward(completion: Any, answers: list[str], reward: float) -> None:
    assert recall_reward([completion], [answers]) == [pytest.approx(reward)]


@pytest.mark.parametrize(
    ("completion", "answers", "candidates", "reward"),
    [
        ("1. tewome 2. huluve", ["huluve", "tewome"], ["huluve", "sozoko", "tewome"], 1.0),
        ("Tewome, HULUVE", ["huluve", "tewome"], ["huluve", "tewome"], 1.0),  # as lists have them
        # Words that are not in the list cost nothing, also of the same length...
        ("The answer is: tewome; I wonder.", ["tewome"], ["sozoko", "tewome"], 1.0),
        # ...and others of it do, also of another.
        ("tewome sozo", ["tewome"], ["sozo", "tewome"], 0.5),
        ("tewome sozoko sozoko", ["huluve", "tewome"], ["sozoko"], 0.5),  # answers always count
        ("tewome huluve sozoko rujaga", ["huluve", "tewome"], ["rujaga", "sozoko"], 0.5),
        ("tewomesozoko", ["tewome"], ["tewome"], 0.0),
        ("", ["tewome"], [], 0.0),
        ("abcdef answer", ["abcdef"], None, 0.5),
    ],
)  # fmt: skip
def test_reward_of_words(
    completion: str, answers: list[str], candidates: list[str] | None, reward: float
) -> None:
    assert recall_reward([completion], [answers], [candidates]) == [pytest.approx(reward)]


def test_reward_of_tasks_with_and_without_candidates_in_one_batch() -> None:
    got = recall_reward(
        ["the answer: tewome", "1234567 answer"],
        answers=[["tewome"], ["1234567"]],
        candidates=[["tewome", "sozoko"], None],
    )
    assert got == [1.0, 1.0]


def test_reward_of_a_batch_as_trl_calls_it() -> None:
    got = recall_reward(
        prompts=["a", "b"], completions=["1 2", "3"], completion_ids=[[1], [2]],
        answers=[["1", "2"], ["4"]], task=["x", "y"], trainer_state=None,
    )  # fmt: skip
    assert got == [1.0, 0.0]
    assert all(type(reward) is float for reward in got)
    assert recall_reward([], []) == []


@pytest.mark.parametrize(
    ("completions", "answers", "message"),
    [
        (["1"], [], "0 lists of answers for 1 completions"),
        (["1"], [[]], r"answers has \[\]: give a list"),
        (["1"], ["1"], "answers has '1': give a list"),
    ],
)
def test_answers_that_cannot_be_scored_are_refused(
    completions: Any, answers: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        recall_reward(completions, answers)


def test_candidates_that_cannot_be_scored_are_refused() -> None:
    with pytest.raises(ValueError, match="1 lists of candidates for 2 completions"):
        recall_reward(["a", "b"], [["a"], ["b"]], candidates=[["a"]])


@functools.cache
def harness() -> Any:
    """RULER's modules in lm-evaluation-harness."""
    needs = ("lm_eval", "nltk", "wonderwords", "scipy")
    missing = [name for name in needs if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs lm-evaluation-harness with ruler's packages: no {', '.join(missing)}")
    prepared = prepare_niah()
    from lm_eval.tasks.ruler import common_utils, cwe_utils, fwe_utils, niah_utils, vt_utils

    modules = (common_utils, cwe_utils, fwe_utils, niah_utils, prepared, vt_utils)
    return SimpleNamespace(**{m.__name__.rpartition(".")[2]: m for m in modules})


@all_tasks
def test_the_reward_is_the_harness_score_but_for_what_is_stated_beside(task: str) -> None:
    ruler = harness().common_utils
    dataset = make_dataset(task, tokenizer_of(PLAIN), TOKENS, 4)
    others = make_dataset(task, tokenizer_of(PLAIN), TOKENS, 4, "test")

    def scores(said: list[str]) -> list[float]:
        docs = [{"max_length": 4096, "outputs": answers} for answers in dataset["answers"]]
        pairs = zip(docs, said, strict=True)
        return [ruler.process_results(doc, [text])["4096"] for doc, text in pairs]

    def reward(said: list[str]) -> list[float]:
        columns = {name: list(dataset[name]) for name in dataset.column_names[1:]}
        return recall_reward(said, **columns)

    right = [f" {', '.join(answers)}.\n" for answers in dataset["answers"]]
    assert reward(right) == scores(right) == [1.0] * 4
    listed = [
        "\n".join(f"{place}. **{answer}**" for place, answer in enumerate(answers, 1))
        for answers in dataset["answers"]
    ]
    assert reward(listed) == scores(listed) == [1.0] * 4
    some = [" ".join(answers[: len(answers) // 2]) for answers in dataset["answers"]]
    assert reward(some) == scores(some)
    assert set(scores(some)) == {len(a[: len(a) // 2]) / len(a) for a in dataset["answers"]}
    wrong = [" ".join(answers) for answers in others["answers"]]
    assert reward(wrong) == scores(wrong) == [0.0] * 4
    everything = list(dataset["prompt"])
    assert scores(everything) == [1.0] * 4
    assert max(reward(everything)) <= (1 if task == "niah_single_1" else 0.5)


def skeleton(text: str) -> str:
    """The prompt without what is drawn, and with what is repeated said once."""
    text = re.sub(r"\s+", " ", text).replace("assgined", "assigned")
    for sentence in tasks.NOISE:
        text = text.replace(f" {sentence}", "")
    for pattern, name in [
        (r"(?<= for )[^.:?]+?(?= (?:is:|mentioned))", "KEY"),
        (r"\b\d{7}\b", "NUMBER"),
        (r"\bvalue \d{5}\b", "value NUMBER"),
        (r"( One of the special magic numbers for KEY is: NUMBER\.)+", " NEEDLES"),
        (r"( VAR [A-Z]{5} = (VAR [A-Z]{5}|\d{5})\.?)+", " VARS"),
        (r"( \d+\. [^.:]+?(?= \d+\. | Question:))+", " LIST"),
        (r"(?<=words\.)( (?:[a-z]{6}|\.\.\.))+(?= Question)", " CODES"),
    ]:
        text = re.sub(pattern, name, text)
    return text.strip()


@pytest.mark.parametrize("task", ["niah_single_1", "niah_multikey_2", "vt", "cwe", "fwe"])
def test_prompts_are_built_as_the_harness_builds_them(task: str) -> None:
    """All that it generates without downloads, but for uuids; words and numbers are our own."""
    ruler, tokenizer = harness(), tokenizer_of(PLAIN)
    random.seed(0)
    if task == "vt":
        # Without its example of another chain; ours has more than one chain, so more variables.
        text, answers = ruler.vt_utils.generate_input_output(10, num_chains=1, num_hops=4)
    else:
        if task == "cwe":
            (doc,) = ruler.cwe_utils.sys_word_pair_random(1, 900, tokenizer)
        elif task == "fwe":
            (doc,) = ruler.fwe_utils.sys_kwext(tokenizer, 900, num_samples=1)
        else:
            kind = {"niah_single_1": "repeat", "niah_multikey_2": "needle"}[task]
            (doc,) = ruler.prepare_niah.generate_samples(
                ruler.prepare_niah.get_haystack(kind), tokenizer, max_seq_length=900,
                template=ruler.niah_utils.TEMPLATE, type_haystack=kind, type_needle_k="words",
                type_needle_v="numbers", num_samples=1,
            )  # fmt: skip
        text, answers = f"{doc['input']} {doc['gen_prefix']}", doc["outputs"]
    row = make_dataset(task, tokenizer, 900, 1)[0]
    assert skeleton(row["prompt"]) == skeleton(text)
    assert len(row["answers"]) == len(answers)
    if task == "cwe":
        counts = [
            [
                n
                for _, n in Counter(re.findall(r"\d+\. (.+?)(?= \d+\. |\n)", prompt)).most_common(
                    11
                )
            ]
            for prompt in (row["prompt"], text)
        ]
        assert counts[0] == counts[1] == [6] * 10 + [1]
    if task == "fwe":
        shares = [prompt.count(" ...") / len(prompt.split()) for prompt in (row["prompt"], text)]
        assert shares[0] == pytest.approx(shares[1], abs=0.06)


def test_importing_it_imports_none_of_the_optional_packages() -> None:
    code = (
        "import sys, longact.tasks\n"
        "print([m for m in ('datasets', 'transformers', 'trl') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


@needs_smollm2
@pytest.mark.slow
def test_smollm2_is_exported_as_an_ordinary_checkpoint(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    script = EXAMPLES / "export_smollm2.py"
    subprocess.run([sys.executable, script, tmp_path / "model"], check=True)
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= names
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert not hasattr(model.config, "quantization_config")
    assert not getattr(model, "is_quantized", False)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    dataset = make_dataset(
        "niah_multikey_1", tokenizer, 256, 3, "test", conversational=False, keys=2
    )
    text = dataset["prompt"][0]
    assert tokenizer(text)["input_ids"] == tokenizer_of(SMOLLM2)(text)["input_ids"]
    completions = []
    for prompt in dataset["prompt"]:
        ids = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**ids, do_sample=False, max_new_tokens=12)
        completions.append(tokenizer.decode(out[0, ids["input_ids"].shape[1] :]))
    # Random weights score 0; this model states such a number in most of the prompts.
    assert sum(recall_reward(completions, list(dataset["answers"]))) >= 1.5
