"""Verifiable long-context tasks in the style of RULER (arXiv 2404.06654), and their reward.

    train = make_dataset("niah_multiquery", tokenizer, tokens=1024, examples=512)
    trainer = GRPOTrainer(model, recall_reward, train_dataset=train, ...)

Numbers or assignments ("needles") are hidden in filler; the prompt asks for some of them. Other
than RULER's, every prompt also holds needles that are not asked for, so that a completion cannot
be right by stating all that it saw.
"""

from __future__ import annotations

import bisect
import difflib
import itertools
import random
import re
import string
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["TASKS", "Puzzle", "make_dataset", "niah", "recall_reward", "vt"]

Split = Literal["train", "test"]

NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
# Keys are an adjective and a noun. Words at even places are for training, at odd ones for tests.
ADJECTIVES = """amber ancient bitter brave bright broken calm careful cheerful clever crimson
curious dusty eager early elegant empty faded famous fancy fierce frozen gentle giant golden
graceful grumpy hollow honest humble hungry icy jolly lazy little lonely loud lucky massive mellow
modern muddy narrow nervous noble odd patient plain polite proud purple quick quiet rapid rare
rough round rusty scarlet secret shiny shy silent silver simple sleepy slim smooth soft solid
spicy steady sturdy tender tiny vivid warm wild wooden young"""
NOUNS = """acorn anchor apple apron arrow atlas badge bakery banner barrel basket bell bench
bicycle blanket bottle branch bridge bucket butter button cabin cactus camera candle canoe canyon
carpet castle cellar cherry cliff clock cloud coffee compass cottage cotton cradle curtain dagger
desert diamond dolphin donkey dragon drum eagle engine falcon farm feather fence ferry fiddle
flame flute forest fountain fox garden garlic giraffe glacier glove goose guitar hammer harbor
hedge helmet hill hotel island ivy jacket jungle kettle kite kitten ladder lake lantern lemon
library lion lizard lobster magnet mango map marble market meadow melon mirror monkey mountain
museum napkin nest notebook oak oasis ocean olive onion orchard otter oven owl paddle painting
palace panda parrot peach pebble pencil pepper piano pillow pirate planet pocket pumpkin puzzle
rabbit raven ribbon river rocket saddle sailor scarf shadow shell shovel spider spoon statue sugar
table temple ticket tiger tower tractor trumpet tulip tunnel turtle umbrella valley violin wagon
walnut whale willow window"""


class Puzzle(NamedTuple):
    """One example, before filler is measured out to the length asked for."""

    instruction: str
    needles: Sequence[str]  # stay in this order
    filler: Iterable[str]  # as many as fit
    question: str
    prefix: str  # begins the answer, in prompts that are text
    answers: Sequence[str]


def niah(
    rng: random.Random,
    split: Split,
    *,
    keys: int,
    queries: int = 1,
    values: int = 1,
    needle_haystack: bool = False,
) -> Puzzle:
    """Needle in a haystack: `keys` keys with `values` 7-digit numbers each; `queries` are asked.

    `needle_haystack`: the filler is needles as well, whose keys nobody asks for.
    """
    adjectives, nouns = (words.split()[split == "test" :: 2] for words in (ADJECTIVES, NOUNS))
    names = [f"{adjective} {noun}" for adjective in adjectives for noun in nouns]
    if values < 1 or not 1 <= queries < keys + needle_haystack <= len(names):
        raise ValueError(
            f"keys={keys}, queries={queries}, values={values}: give 1 value or more, 1 query or "
            f"more, and more keys than queries (at most {len(names)}), or all could be stated"
        )
    rng.shuffle(names)
    numbers = _codes(rng, split, string.digits, 7)

    def needle(name: str) -> tuple[str, str]:
        number = next(numbers)
        return f"One of the special magic numbers for {name} is: {number}.", number

    of = {name: [needle(name) for _ in range(values)] for name in names[:keys]}
    needles = [sentence for pairs in of.values() for sentence, _ in pairs]
    rng.shuffle(needles)
    asked = names[:queries]
    *others, last = asked
    query = f"{', '.join(others)}, and {last}" if others else last
    if queries * values == 1:
        hidden, what, verb = "A special magic number is", "number", "is"
    else:
        hidden, what, verb = "Some special magic numbers are", "numbers", "are"
    return Puzzle(
        f"{hidden} hidden within the following text. Make sure to memorize it. I will quiz you "
        f"about the {what} afterwards.",
        needles,
        (needle(name)[0] for name in names[keys:]) if needle_haystack else itertools.cycle(NOISE),
        f"What {verb}{' all' * (verb == 'are')} the special magic {what} for {query} mentioned in "
        "the provided text?",
        f"The special magic {what} for {query} mentioned in the provided text {verb}",
        [number for name in asked for _, number in of[name]],
    )


def vt(rng: random.Random, split: Split, *, chains: int = 2, hops: int = 4) -> Puzzle:
    """Variable tracking: which `hops + 1` variables of the first of `chains` chains get a value."""
    if chains < 2 or hops < 0:
        raise ValueError(
            f"chains={chains}, hops={hops}: give 0 hops or more, and 2 chains or more, or all "
            "could be stated"
        )
    names = _codes(rng, split, string.ascii_uppercase, 5)
    numbers = _codes(rng, split, string.digits, 5)
    variables = [list(itertools.islice(names, hops + 1)) for _ in range(chains)]
    values = list(itertools.islice(numbers, chains))
    assignments = []
    for chain, number in zip(variables, values, strict=True):
        sources = [number, *(f"VAR {name}" for name in chain[:-1])]
        pairs = zip(chain, sources, strict=True)
        assignments.append(iter([f"VAR {name} = {source}." for name, source in pairs]))
    # Chains are interleaved; inside of each a variable is assigned before it is used.
    order = [chain for chain in assignments for _ in range(hops + 1)]
    rng.shuffle(order)
    return Puzzle(
        "Memorize and track the chain(s) of variable assignment hidden in the following text.",
        [next(chain) for chain in order],
        itertools.cycle(NOISE),
        f"Question: Find all variables that are assigned the value {values[0]} in the text above.",
        "Answer: According to the chain(s) of variable assignment in the text above, "
        f"{hops + 1} variables are assigned the value {values[0]}, they are:",
        variables[0],
    )


#: Name -> what draws its puzzles. Names and wording are RULER's.
TASKS: Mapping[str, Callable[..., Puzzle]] = {
    "niah_multikey_1": partial(niah, keys=12),
    "niah_multikey_2": partial(niah, keys=1, needle_haystack=True),
    "niah_multivalue": partial(niah, keys=3, values=4),
    "niah_multiquery": partial(niah, keys=8, queries=4),
    "vt": vt,
}


def _codes(rng: random.Random, split: Split, alphabet: str, length: int) -> Iterator[str]:
    """Random strings without end, none twice; a checksum says to which split a string belongs."""
    seen = set()
    while True:
        code = "".join(rng.choices(alphabet, k=length))
        if (
            code not in seen
            and code[0] != "0"
            and zlib.crc32(code.encode()) % 2 == (split == "test")
        ):
            seen.add(code)
            yield code


def make_dataset(
    task: str,
    tokenizer: Any,
    tokens: int,
    examples: int,
    split: Split = "train",
    seed: int = 0,
    conversational: bool = True,
    **options: Any,
) -> Dataset:
    """A dataset for TRL's trainers.

    The splits share no word of a key, no number and no variable. An example depends on the
    arguments and its index alone, so a larger `examples` only appends.

    Args:
        task: a name in `TASKS`.
        tokenizer: of the model to train; its chat template counts.
        tokens: the longest prompt, in tokens; lengths are spread over 3/4 of it and more.
        examples: how many.
        split: `"train"` or `"test"`.
        seed: another seed gives other examples.
        conversational: prompts are lists of messages. False, or a tokenizer without a chat
            template: text (in the chat template where there is one) that ends in the first words
            of the answer, as RULER's prompts do: a small model then states numbers at once.
        options: keyword arguments of the task, for another difficulty: `keys=24`.

    Returns:
        Columns `prompt`, `answers` (list of strings) and `task`.

    Raises:
        ValueError: an unknown task or split; options out of range; `tokens` that what must be said
        does not fit into, or that a haystack of needles cannot fill.
        TypeError: an option that the task does not have.
    """
    from datasets import Dataset

    if task not in TASKS:
        nearest = difflib.get_close_matches(str(task), TASKS, n=1, cutoff=0.0)[0]
        raise ValueError(f"task={task!r} is unknown: did you mean {nearest!r}? All: {[*TASKS]}")
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r}: give 'train' or 'test'")
    if examples < 1:
        raise ValueError(f"examples={examples}: give 1 or more")
    has_template = bool(getattr(tokenizer, "chat_template", None))
    conversational = conversational and has_template

    def prompt(puzzle: Puzzle, sentences: Iterable[str]) -> Any:
        text = "\n".join([puzzle.instruction, " ".join(sentences), puzzle.question])
        if not has_template:
            return f"{text} {puzzle.prefix}"
        messages = [{"role": "user", "content": text}]
        return messages if conversational else _rendered(tokenizer, messages) + puzzle.prefix

    def length(prompt: Any) -> int:
        """Tokens, counted as TRL will tokenize it."""
        text = _rendered(tokenizer, prompt) if conversational else prompt
        return len(tokenizer(text)["input_ids"])

    def example(rng: random.Random, puzzle: Puzzle, least: int) -> dict[str, Any]:
        depths = sorted(rng.random() for _ in puzzle.needles)
        least = max(least, tokens * 3 // 4)
        target = least + int(rng.random() * (tokens - least + 1))
        most = target // 3  # a sentence is 3 tokens or more
        filler = list(itertools.islice(puzzle.filler, most))

        def hidden(count: int) -> Any:
            """The prompt with so many sentences of filler."""
            sentences = filler[:count]
            for depth, needle in zip(reversed(depths), reversed(puzzle.needles), strict=True):
                sentences.insert(int(depth * (count + 1)), needle)
            return prompt(puzzle, sentences)

        count = bisect.bisect(range(len(filler) + 1), target, key=lambda n: length(hidden(n))) - 1
        if count == len(filler) < most:
            raise ValueError(
                f"tokens={tokens} is too many for {task}: its keys last for {length(hidden(count))}"
            )
        return {"prompt": hidden(count), "answers": list(puzzle.answers), "task": task}

    rngs = [random.Random(f"{task} {split} {seed} {index}") for index in range(examples)]
    try:
        puzzles = [TASKS[task](rng, split, **options) for rng in rngs]
    except TypeError as error:
        raise ValueError(f"options={options}: {task} does not take them ({error})") from error
    shortest = [length(prompt(puzzle, puzzle.needles)) for puzzle in puzzles]
    if tokens < max(shortest):
        raise ValueError(
            f"tokens={tokens} is too few for {task}: without filler these prompts need up to "
            f"{max(shortest)}"
        )
    return Dataset.from_list([*map(example, rngs, puzzles, shortest)])


def _rendered(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> str:
    """The messages as text, without the first token where the tokenizer adds that by itself."""
    text: str = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        text = text.removeprefix(tokenizer.bos_token)
    return text


def recall_reward(
    completions: Sequence[Any], answers: Sequence[Sequence[str]], **kwargs: Any
) -> list[float]:
    """The lower of recall and precision of each completion, in [0, 1]: a reward for TRL.

    Recall is the share of the answers that occur as whole words (RULER's `string_match_all`, which
    looks for substrings); precision is the share of answers among the different words that could
    be one: of the same length and kind (digits, capitals, small letters) as some answer. So
    stating every number of the prompt earns no more than the share of right ones; repetition, and
    words of another kind or length, cost nothing.

    Args:
        completions: texts, or lists of messages, of which the assistant's count; None scores 0.
        answers: for each completion the strings expected, single words, in any order.
        kwargs: what else TRL passes; not used.

    Raises:
        ValueError: not one list of answers for each completion, or an empty one.
    """
    if len(completions) != len(answers):
        raise ValueError(f"{len(answers)} lists of answers for {len(completions)} completions")
    rewards = []
    for completion, expected in zip(completions, answers, strict=True):
        if isinstance(expected, str) or not expected:
            raise ValueError(f"answers has {expected!r}: give a list of one or more strings")
        kinds = {_kind(word) for word in expected}
        stated = {word for word in re.findall(r"\w+", _text(completion)) if _kind(word) in kinds}
        right = len(stated & set(expected))
        rewards.append(right / max(len(set(expected)), len(stated)))
    return rewards


def _kind(word: str) -> str:
    """`Ab12` -> `Aa00`."""
    return "".join("0" if c.isdigit() else "A" if c.isupper() else "a" for c in word)


def _text(completion: Any) -> str:
    """What the model itself said."""
    if completion is None or isinstance(completion, str):
        return completion or ""
    contents = [m.get("content") or "" for m in completion if m.get("role") == "assistant"]
    parts = [[{"text": c}] if isinstance(c, str) else c for c in contents]
    return "\n".join(part.get("text") or "" for part in itertools.chain.from_iterable(parts))
