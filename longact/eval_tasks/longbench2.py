"""LongBench v2 (arXiv 2412.15204): its file, its prompt, its way to read an answer."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["documents", "extract_answer", "make_prompt", "process_results", "read", "truncate"]

HUB = "THUDM/LongBench-v2"
#: Room for the answer, the authors' own; `max_gen_toks` in longbench2.yaml.
NEW_TOKENS = 128
DIFFICULTIES = ("easy", "hard")
LENGTHS = ("short", "medium", "long")
#: Every field is a string; these have few values.
VALUES = {"difficulty": DIFFICULTIES, "length": LENGTHS, "answer": ("A", "B", "C", "D")}
FIELDS = (
    "_id", "domain", "sub_domain", "difficulty", "length", "question",
    "choice_A", "choice_B", "choice_C", "choice_D", "answer", "context",
)  # fmt: skip
# prompts/0shot.txt of the authors.
PROMPT = """Please read the following text and answer the question below.

<text>
{context}
</text>

What is the correct answer to this question: {question}
Choices:
(A) {choice_A}
(B) {choice_B}
(C) {choice_C}
(D) {choice_D}

Format your response as follows: "The correct answer is (insert answer here)"."""
# The first that is found anywhere counts.
ANSWERS = (r"The correct answer is \(([A-D])\)", r"The correct answer is ([A-D])")


@functools.cache
def read(path: str | None) -> tuple[dict[str, str], ...]:
    """The records of a data.json (a JSON list, or one record a line); of None: those of the hub.

    Raises:
        ValueError: a record is malformed (names the line or the record, and the field), or the hub
            cannot be reached.
        OSError: the file cannot be read.
    """
    seen: dict[str, str] = {}
    records = []
    for where, record in _records(path):
        records.append(_check(where, record))
        key = record["_id"]
        if key in seen:
            raise ValueError(f"{where}: field _id: {key!r} is that of {seen[key]} too")
        seen[key] = where
    if not records:
        raise ValueError(f"{path or HUB} holds no records")
    return tuple(records)


def _records(path: str | None) -> Iterator[tuple[str, Any]]:
    """Each record, and where it is."""
    if path is None:
        import datasets

        try:
            data = datasets.load_dataset(HUB, split="train")
        except Exception as error:  # the hub's and the network's have no class in common
            raise ValueError(
                f"LongBench v2 cannot be had from the hub ({type(error).__name__}): download "
                f"data.json of the data set {HUB} elsewhere and pass --data data.json"
            ) from error
        for number, record in enumerate(data, 1):
            yield f"{HUB}: record {number}", record
        return
    text = Path(path).read_text(encoding="utf-8")
    if text.lstrip()[:1] == "[":
        try:
            records = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path}: not JSON: {error}") from None
        for number, record in enumerate(records, 1):
            yield f"{path}: record {number}", record
        return
    # Not splitlines(): texts may hold other characters that it takes for the end of a line.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}: line {number}: not JSON: {error}") from None
            yield f"{path}: line {number}", record


def _check(where: str, record: Any) -> dict[str, str]:
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: {type(record).__name__} where an object is to be")
    for field in FIELDS:
        if field not in record:
            raise ValueError(f"{where}: field {field} is missing")
        value = record[field]
        if not isinstance(value, str):
            raise ValueError(
                f"{where}: field {field} is {type(value).__name__} where a string is to be"
            )
        if field in VALUES and value not in VALUES[field]:
            raise ValueError(
                f"{where}: field {field} is {value!r}: one of {', '.join(VALUES[field])}"
            )
    return {field: record[field] for field in FIELDS}


def make_prompt(record: Mapping[str, str]) -> str:
    return PROMPT.format(**{field: record[field].strip() for field in FIELDS})


def truncate(
    prompt: str, tokenizer: Any, max_tokens: int, render: Callable[[str], str] = lambda text: text
) -> str:
    """Leaves out the middle of a prompt, so that `render(prompt)` has at most `max_tokens` tokens.

    Raises:
        ValueError: not even what `render` adds fits.
    """
    excess = len(tokenizer(render(prompt)).input_ids) - max_tokens
    if excess <= 0:
        return prompt
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    keep = len(ids)
    text = prompt
    # Tokens join differently at the cut: measured again until it fits.
    while excess > 0:
        keep -= excess
        if keep < 2:
            raise ValueError(f"{max_tokens} tokens leave no room for a prompt")
        text = tokenizer.decode(ids[: keep - keep // 2]) + tokenizer.decode(ids[-(keep // 2) :])
        excess = len(tokenizer(render(text)).input_ids) - max_tokens
    return text


def documents(
    data: str | None = None,
    tokenizer: str | None = None,
    pretrained: str | None = None,
    max_length: int | None = None,
    chat: bool = False,
    limit: int | None = None,
    **_: Any,
) -> dict[str, Any]:
    """What the harness asks for: records with their prompt, cut to the model's length.

    Args:
        data: a data.json; None: the hub.
        tokenizer, pretrained: whose tokens are counted (a name or a directory).
        max_length: tokens of prompt and answer together; None: nothing is cut.
        chat: whether the chat template comes on top.
        limit: how many of the records, from the first on.
    """
    import datasets
    from transformers import AutoTokenizer

    records = read(data)[:limit]
    prompts = [make_prompt(record) for record in records]
    if max_length is not None:
        name = tokenizer or pretrained
        if name is None:
            raise ValueError("max_length is set and tokenizer is not: its tokens are to be counted")
        tokens = AutoTokenizer.from_pretrained(name)

        def render(text: str) -> str:
            if not chat:
                return text
            messages = [{"role": "user", "content": text}]
            return str(
                tokens.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            )

        prompts = [truncate(text, tokens, max_length - NEW_TOKENS, render) for text in prompts]
    rows = [
        # Without the context: the prompt has what is read of it.
        {**{field: record[field] for field in FIELDS if field != "context"}, "prompt": prompt}
        for record, prompt in zip(records, prompts, strict=True)
    ]
    return {"test": datasets.Dataset.from_list(rows)}


def extract_answer(response: str) -> str | None:
    """A, B, C or D; None where the response does not state it in the words asked for."""
    response = response.replace("*", "")
    for pattern in ANSWERS:
        if found := re.search(pattern, response):
            return found.group(1)
    return None


def process_results(doc: Mapping[str, str], results: list[str]) -> dict[str, float]:
    answer = extract_answer(results[0])
    right = float(answer == doc["answer"])
    return {
        "acc": right,
        "answered": float(answer is not None),
        doc["difficulty"]: right,
        doc["length"]: right,
    }
