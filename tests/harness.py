"""RULER's modules in lm-evaluation-harness, without what their import costs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from unittest import mock

#: `python -m longact` with arguments, in a process of its own.
COMMAND = f"""
import runpy, sys
sys.path.append({str(Path(__file__).parent)!r})
from harness import few_words
with few_words():
    runpy.run_module("longact", run_name="__main__", alter_sys=True)
"""


@contextmanager
def few_words() -> Iterator[None]:
    """The harness sorts six million pairs of an adjective and a noun at its import, for many
    seconds: here 90,000."""
    import wonderwords

    class FewWords(wonderwords.RandomWord):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._categories = {kind: words[:300] for kind, words in self._categories.items()}

    with mock.patch.object(wonderwords, "RandomWord", FewWords):
        yield


def prepare_niah() -> ModuleType:
    """The module that sorts them; the others keep all their words."""
    import nltk

    name = "lm_eval.tasks.ruler.prepare_niah"
    if name in sys.modules:
        return sys.modules[name]
    with few_words(), mock.patch.object(nltk, "download"):  # of what splits essays
        return importlib.import_module(name)
