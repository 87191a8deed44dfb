"""The rows of a history on disk: files of JSON lines that grow, shared by the checkpoints of a run.

A checkpoint names, for each file, how much of it belongs to its history. So a save appends the rows
since the last one, and costs the same however long the run is. What was written is never changed:
where a file does not end as the last checkpoint says, after a kill for one, the rows go on in a new
file, and earlier checkpoints stay readable.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from jaxnets.storage import parse_json

NAME = re.compile(r"history_\d+\.jsonl")


class Part(TypedDict):
    """The beginning of one file of rows.

    Attributes:
        file: its name.
        rows: number of the rows.
        bytes: their size.
        sha256: chained over the lines.
        last: sha256 of the last line.
    """

    file: str
    rows: int
    bytes: int
    sha256: str
    last: str


class Row(TypedDict):
    """What every row has; the other values are numbers, in a population lists of them."""

    step: int


def extend(directory: Path, rows: Sequence[Any], parts: Sequence[Part]) -> list[Part]:
    """Append the rows that are not in `parts` yet.

    Args:
        directory: folder of the files.
        rows: all rows of the history, JSON values.
        parts: of an earlier checkpoint; if their files have become shorter, or if they are of
            another history, all rows are written anew.

    Returns:
        The parts of all rows.
    """
    parts = list(parts)
    known = sum(part["rows"] for part in parts)
    if not _continues(directory, rows, parts, known):
        parts, known = [], 0
    if known == len(rows):
        return parts
    if not parts or (directory / parts[-1]["file"]).stat().st_size != parts[-1]["bytes"]:
        names = (f"history_{number}.jsonl" for number in itertools.count())
        name = next(name for name in names if not (directory / name).exists())
        parts.append({"file": name, "rows": 0, "bytes": 0, "sha256": "", "last": ""})
    lines = [_line(row) for row in rows[known:]]
    part = parts[-1]
    with (directory / part["file"]).open("ab") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    digest = part["sha256"]
    for line in lines:
        digest = _chain(digest, line)
    parts[-1] = {
        "file": part["file"],
        "rows": part["rows"] + len(lines),
        "bytes": part["bytes"] + sum(map(len, lines)),
        "sha256": digest,
        "last": hashlib.sha256(lines[-1]).hexdigest(),
    }
    return parts


def read(directory: Path, parts: Sequence[Part]) -> tuple[list[Any], Path | None]:
    """Read the rows of a checkpoint.

    Args:
        directory: folder of the files.
        parts: from `extend`.

    Returns:
        The rows, and None; or the rows in front of the first damaged file, and its path.
    """
    rows: list[Any] = []
    for part in parts:
        path = directory / part["file"]
        try:
            with path.open("rb") as file:
                lines = file.read(part["bytes"]).splitlines(keepends=True)
        except OSError:
            return rows, path
        digest = ""
        for line in lines:
            digest = _chain(digest, line)
        if digest != part["sha256"] or len(lines) != part["rows"]:
            return rows, path
        for line in lines:
            try:
                row = parse_json(line, path=path, what="a row of a history", remedy="")
                row.check(Row)
            except ValueError:
                return rows, path
            rows.append(row.content)
    return rows, None


def _continues(directory: Path, rows: Sequence[Any], parts: list[Part], known: int) -> bool:
    try:
        sizes = [(directory / part["file"]).stat().st_size for part in parts]
    except OSError:
        return False
    whole = all(size >= part["bytes"] for size, part in zip(sizes, parts, strict=True))
    if not whole or known > len(rows):
        return False
    return not parts or hashlib.sha256(_line(rows[known - 1])).hexdigest() == parts[-1]["last"]


def _line(row: Any) -> bytes:
    return json.dumps(row).encode() + b"\n"


def _chain(digest: str, line: bytes) -> str:
    return hashlib.sha256(digest.encode() + line).hexdigest()
