"""Recall in a language of its own, for models small enough to be pretrained here.

    <bos> f07 k12 v031 f22 f01 k40 k12 k07 v004 ... k40

A fact is a key and its value (`k12 v031`) or, with `hops`, a key and another one, whose value it
has (`k40 k12`). Facts lie in any order in filler (`f07`). The last word is a key: its value is to
be said (v031).
"""

from __future__ import annotations

import itertools
import random
from typing import Any, Literal, NamedTuple

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

__all__ = ["Example", "draw", "make_dataset", "make_tokenizer"]

KEYS = [f"k{i:02}" for i in range(64)]
VALUES = [f"v{i:03}" for i in range(128)]
FILLER = [f"f{i:02}" for i in range(32)]
PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
WORDS = [PAD, BOS, EOS, *KEYS, *VALUES, *FILLER]

Split = Literal["train", "validation", "test"]


class Example(NamedTuple):
    """What is said before the questions, and the questions with their answers."""

    context: list[str]
    questions: list[tuple[str, str]]  # a key and its value


def draw(
    rng: random.Random, length: int, hops: int, *, filler: float = 0.5, questions: int = 1
) -> Example:
    """An example that with its first question has `length` words, and as many `questions` as it has
    keys to ask for, at most. Of the context a share is filler, between 0 and `filler`.

    Raises:
        ValueError: no fact with so many hops fits into `length` words.
    """
    room = length - 2  # <bos>, and the first question
    most = min(len(KEYS), room // 2) // (hops + 1)
    if most < 1:
        raise ValueError(f"length={length} is too short for {hops} hops: give {4 + 2 * hops}")
    count = rng.randint(max(1, round(most * (1 - filler))), most)
    names, values = rng.sample(KEYS, count * (hops + 1)), rng.sample(VALUES, count)
    chains = [names[i::count] for i in range(count)]
    facts = [
        pair
        for chain, value in zip(chains, values, strict=True)
        for pair in itertools.pairwise([*chain, value])
    ]
    rng.shuffle(facts)
    gaps = [0] * (len(facts) + 1)
    for _ in range(room - 2 * len(facts)):
        gaps[rng.randrange(len(gaps))] += 1
    context = [BOS]
    for gap, fact in zip(gaps, [*facts, ()], strict=True):
        context += [*rng.choices(FILLER, k=gap), *fact]
    asked = rng.sample(range(count), min(questions, count))
    return Example(context, [(chains[i][0], values[i]) for i in asked])


def make_dataset(length: int, hops: int, examples: int, split: Split, seed: int) -> Dataset:
    """Columns `prompt`, a text of `length` words, and `answers`, the one word to say.

    An example depends on the arguments and its index alone. Splits are drawn apart: that one
    example is in two of them does not happen (there are more than 10^50).
    """

    def row(index: int) -> dict[str, Any]:
        context, [(key, value)] = draw(
            random.Random(f"{split} {seed} {length} {hops} {index}"), length, hops
        )
        return {"prompt": " ".join([*context, key]), "answers": [value]}

    return Dataset.from_list([row(i) for i in range(examples)])


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token, `WORDS.index(word)` its id."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
    )
