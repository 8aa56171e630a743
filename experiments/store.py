"""The results: JSON lines, one a run, only ever appended to."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["Record", "Store", "key_of"]

Record = dict[str, Any]


def key_of(kind: str, spec: Mapping[str, Any]) -> str:
    """What tells runs apart: all that they depend on."""
    text = json.dumps([kind, spec], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Store:
    """Records in a file, by their keys, in the order in which they came.

    A line that a killed process left unfinished is cut off when the next is written.

    Raises:
        ValueError: a line that is no record, other than the last.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[str, Record] = {}
        self._size = 0  # of what is whole
        data = path.read_bytes() if path.exists() else b""
        for number, line in enumerate(data.splitlines(keepends=True), 1):
            try:
                record = json.loads(line)
                self.records[record["key"]] = record
            except (ValueError, TypeError, KeyError) as error:
                if not line.endswith(b"\n"):
                    break
                raise ValueError(
                    f"{path}, line {number}: not a record of a run ({error}): restore the file, "
                    "or cut the line out, and its run comes again"
                ) from error
            if not line.endswith(b"\n"):  # whole by chance: it comes again
                del self.records[record["key"]]
                break
            self._size += len(line)

    def __contains__(self, key: str) -> bool:
        return key in self.records

    def add(self, record: Record) -> None:
        """Appends it, and returns once it is on the disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.truncate(self._size)
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            self._size = file.tell()
        self.records[record["key"]] = record
