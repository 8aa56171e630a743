"""Verifiable long-context tasks in the style of RULER (arXiv 2404.06654), and their reward.

    train = make_dataset("niah_multiquery", tokenizer, tokens=1024, examples=512)
    trainer = GRPOTrainer(model, recall_reward, train_dataset=train, ...)

Numbers, assignments or frequent words ("needles") are hidden in filler; the prompt asks for some of
them. Other than RULER's, every prompt (but those of `niah_single_1`) also holds needles or words
that are not asked for, so that a completion cannot be right by stating all that it saw.
"""

from __future__ import annotations

import bisect
import difflib
import heapq
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

__all__ = ["TASKS", "Puzzle", "cwe", "fwe", "make_dataset", "niah", "recall_reward", "vt"]

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

# Words of lists are coined, of 3 syllables: enough of them for any length.
SYLLABLES = [onset + vowel for onset in "bcdfghjklmnprstvwyz" for vowel in "aeiou"]


class Puzzle(NamedTuple):
    """One example, before filler is measured out to the length asked for."""

    instruction: str
    needles: Sequence[str]  # stay in this order
    filler: Iterable[str]  # as many as fit
    question: str
    prefix: str  # begins the answer, in prompts that are text
    answers: Sequence[str]
    join: Callable[[Sequence[str]], str] = " ".join  # of needles and filler
    words: bool = False  # needles and filler are words: who states one means it as an answer


def niah(
    rng: random.Random,
    split: Split,
    *,
    keys: int,
    queries: int = 1,
    values: int = 1,
    hops: int = 0,
    needle_haystack: bool = False,
    distractors: bool = True,
) -> Puzzle:
    """Needle in a haystack: `keys` keys with `values` 7-digit numbers each; `queries` are asked.

    `hops`: a key has its numbers from another key, that one from the next, and so on: a chain with
    so many links, which lie in any order.
    `needle_haystack`: the filler is needles as well, whose keys nobody asks for.
    `distractors`: False, as in RULER, allows to ask for every key there is.
    """
    adjectives, nouns = (words.split()[split == "test" :: 2] for words in (ADJECTIVES, NOUNS))
    names = [f"{adjective} {noun}" for adjective in adjectives for noun in nouns]
    if hops < 0:
        raise ValueError(f"hops={hops}: give 0 hops or more")
    most, chained = len(names) // (hops + 1), keys * (hops + 1)
    fewest = queries + (distractors and not needle_haystack)
    if values < 1 or queries < 1 or keys < fewest or chained + needle_haystack > len(names):
        more, why = ("more", ", or all could be stated") if distractors else ("no fewer", "")
        raise ValueError(
            f"keys={keys}, queries={queries}, values={values}: give 1 value or more, 1 query or "
            f"more, and {more} keys than queries (at most {most}){why}"
        )
    rng.shuffle(names)
    numbers = _codes(rng, split, string.digits, 7)

    def needle(name: str) -> tuple[str, str]:
        number = next(numbers)
        return f"One of the special magic numbers for {name} is: {number}.", number

    asked = names[:queries]
    *others, last = asked
    query = f"{', '.join(others)}, and {last}" if others else last
    if queries * values == 1:
        hidden, what, verb, same = "A special magic number is", "number", "is", "that"
    else:
        hidden, what, verb, same = "Some special magic numbers are", "numbers", "are", "those"
    chains = [names[head:chained:keys] for head in range(keys)]
    of = {chain[0]: [needle(chain[-1]) for _ in range(values)] for chain in chains}
    needles = [sentence for pairs in of.values() for sentence, _ in pairs]
    needles += [
        f"The special magic {what} for {key} {verb} {same} for {source}."
        for chain in chains
        for key, source in itertools.pairwise(chain)
    ]
    rng.shuffle(needles)
    return Puzzle(
        f"{hidden} hidden within the following text. Make sure to memorize it. I will quiz you "
        f"about the {what} afterwards.",
        needles,
        (needle(name)[0] for name in names[chained:])
        if needle_haystack
        else itertools.cycle(NOISE),
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


def cwe(
    rng: random.Random,
    split: Split,
    *,
    common: int = 10,
    common_repeats: int = 6,
    uncommon_repeats: int = 1,
) -> Puzzle:
    """Common words: which `common` words a numbered list holds more often than all others.

    The longer the list, the more others it has. RULER's repeats are these below 4,096 tokens, and
    30 and 3 from there on.
    """
    if common < 1 or not 1 <= uncommon_repeats < common_repeats:
        raise ValueError(
            f"common={common}, common_repeats={common_repeats}, uncommon_repeats="
            f"{uncommon_repeats}: give 1 common word or more, and more repeats of common words "
            "than of uncommon ones, 1 or more"
        )
    # There are 428 thousand: a list that needs nearly all is to be refused, not searched for.
    words = itertools.islice(_codes(rng, split, SYLLABLES, 3), 250_000)
    answers = [word for _, word in zip(range(common), words, strict=False)]
    others = (word for word in words for _ in range(uncommon_repeats))
    few = list(itertools.islice(others, common * uncommon_repeats))
    return Puzzle(
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often.",
        [*answers * common_repeats, *few],
        others,
        f"Question: What are the {common} most common words in the above list?",
        f"Answer: The top {common} words that appear most often in the list are:",
        answers,
        _shuffled(rng, "{}. {}".format),
        words=True,
    )


def fwe(rng: random.Random, split: Split, *, alpha: float = 2.0) -> Puzzle:
    """Frequent words: which three coded words come most often, after dots, in a text of them.

    Frequencies are Zipf's, `1 / rank ** alpha`, with dots at rank 1: the smaller `alpha`, the less
    they differ.
    """
    if not 1 <= alpha <= 4:
        raise ValueError(f"alpha={alpha}: give 1 to 4")
    words = _codes(rng, split, string.ascii_lowercase, 6)
    answers = list(itertools.islice(words, 3))
    copies = _zipf(itertools.chain(["..."], answers, words), alpha)
    needles = []
    for size, word in copies:
        needles.append(word)
        # From here on rank 4, the last answer, leads rank 5, and there are as many others: to 7.
        if size > max(1 / (4**-alpha - 5**-alpha), 7**alpha):
            break
    return Puzzle(
        "Read the following coded text and track the frequency of each coded word. Find the three "
        "most frequently appeared coded words.",
        needles,
        (word for _, word in copies),
        "Question: Do not provide any explanation. Please ignore the dots '....'. What are the "
        "three most frequently appeared words in the above coded text?",
        "Answer: According to the coded text above, the three most frequently appeared words are:",
        answers,
        _shuffled(rng, "{1}".format),
        words=True,
    )


#: Name -> what draws its puzzles. Names and wording are RULER's, but of `niah_multihop`.
TASKS: Mapping[str, Callable[..., Puzzle]] = {
    "niah_single_1": partial(niah, keys=1, distractors=False),
    "niah_multikey_1": partial(niah, keys=12),
    "niah_multikey_2": partial(niah, keys=1, needle_haystack=True),
    "niah_multivalue": partial(niah, keys=3, values=4),
    "niah_multiquery": partial(niah, keys=8, queries=4),
    "niah_multihop": partial(niah, keys=4, hops=2),
    "vt": vt,
    "cwe": cwe,
    "fwe": fwe,
}


def _codes(rng: random.Random, split: Split, alphabet: Sequence[str], length: int) -> Iterator[str]:
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


def _zipf(words: Iterator[str], alpha: float) -> Iterator[tuple[float, str]]:
    """A text without end, and a size: at size n, rank k has come floor(n / k ** alpha) times."""
    ranked = [next(words)]
    coming = [(1.0, 1, 1)]  # size, rank, copy
    while True:
        size, rank, copy = heapq.heappop(coming)
        heapq.heappush(coming, ((copy + 1) * rank**alpha, rank, copy + 1))
        if copy == 1:
            ranked.append(next(words))
            heapq.heappush(coming, ((rank + 1) ** alpha, rank + 1, 1))
        yield size, ranked[rank - 1]


def _shuffled(
    rng: random.Random, item: Callable[[int, str], str]
) -> Callable[[Sequence[str]], str]:
    """Joins words in an order that depends on their count alone; `item` gets place and word."""
    seed = rng.getrandbits(64)

    def join(words: Sequence[str]) -> str:
        order = random.Random(seed).sample(words, len(words))
        return " ".join(itertools.starmap(item, enumerate(order, 1)))

    return join


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

    The splits share no word of a key or a list, no number and no variable. An example depends on
    the arguments and its index alone, so a larger `examples` only appends.

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
        Columns `prompt`, `answers` (list of strings) and `task`; of `cwe` and `fwe` also
        `candidates`, for `recall_reward` (all the words of the list).

    Raises:
        ValueError: an unknown task or split; options out of range, or that the task does not have;
            `tokens` that what must be said does not fit into, or that a haystack of needles or a
            list of words cannot fill.
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

    def prompt(puzzle: Puzzle, sentences: Sequence[str]) -> Any:
        text = "\n".join([puzzle.instruction, puzzle.join(sentences), puzzle.question])
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
        most = target if puzzle.words else target // 3  # a sentence is 3 tokens or more
        filler = list(itertools.islice(puzzle.filler, most))

        def hidden(count: int) -> list[str]:
            """The needles in so many sentences of filler."""
            sentences = filler[:count]
            for depth, needle in zip(reversed(depths), reversed(puzzle.needles), strict=True):
                sentences.insert(int(depth * (count + 1)), needle)
            return sentences

        def size(count: int) -> int:
            return length(prompt(puzzle, hidden(count)))

        count = bisect.bisect(range(len(filler) + 1), target, key=size) - 1
        if count == len(filler) < most:
            raise ValueError(
                f"tokens={tokens} is too many for {task}: its {'words' if puzzle.words else 'keys'}"
                f" last for {size(count)}"
            )
        sentences = hidden(count)
        row = {"prompt": prompt(puzzle, sentences), "answers": list(puzzle.answers), "task": task}
        if puzzle.words:
            row["candidates"] = sorted({word for word in sentences if word.isalpha()})
        return row

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
    completions: Sequence[Any],
    answers: Sequence[Sequence[str]],
    candidates: Sequence[Sequence[str] | None] | None = None,
    **kwargs: Any,
) -> list[float]:
    """The lower of recall and precision of each completion, in [0, 1]: a reward for TRL.

    Recall is the share of the answers that occur as whole words (RULER's `string_match_all`, which
    looks for substrings); precision is the share of answers among the different words that could
    be one: of the same length and kind (digits, capitals, small letters) as some answer, or what
    `candidates` lists. So stating everything that the prompt holds earns no more than the share of
    right ones; repetition, and words of another kind or length, cost nothing.

    Args:
        completions: texts, or lists of messages, of which the assistant's count; None scores 0.
        answers: for each completion the strings expected, single words, in any order.
        candidates: for each completion the words that are answers, right or wrong, in capitals or
            not. None, or a None in it: known by their length and kind.
        kwargs: what else TRL passes; not used.

    Raises:
        ValueError: not one list of answers for each completion, or an empty one, or not one entry
            of candidates for each.
    """
    if len(completions) != len(answers):
        raise ValueError(f"{len(answers)} lists of answers for {len(completions)} completions")
    if candidates is None:
        candidates = [None] * len(completions)
    elif len(completions) != len(candidates):
        raise ValueError(
            f"{len(candidates)} lists of candidates for {len(completions)} completions"
        )
    rewards = []
    for completion, expected, listed in zip(completions, answers, candidates, strict=True):
        if isinstance(expected, str) or not expected:
            raise ValueError(f"answers has {expected!r}: give a list of one or more strings")
        right, said = set(expected), re.findall(r"\w+", _text(completion))
        if listed is None:
            kinds = {_kind(word) for word in expected}
            stated = {word for word in said if _kind(word) in kinds}
        else:
            right = {word.lower() for word in expected}
            stated = {word.lower() for word in said}
            stated &= right | {word.lower() for word in listed}
        rewards.append(len(stated & right) / max(len(right), len(stated)))
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
