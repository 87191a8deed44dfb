"""JSON files: written with a digest, read with checks that name the file and the line."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NotRequired, TypeVar, Union

from jaxnets.storage.atomic import atomic_file

T = TypeVar("T")

_DIGEST = "sha256"
_MAX_DEPTH = 100  # deeper values end in a RecursionError, here or where they are used
_TEXT = re.compile(r'"(?:[^"\\]|\\.)*"')


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write an object as a JSON file, atomically, with a digest of its content.

    Args:
        path: missing folders are created, an existing file is replaced.
        content: any JSON values. The file has one more entry, "sha256".

    Raises:
        TypeError: a value is not serializable as JSON.
        ValueError: the content has an entry "sha256".
    """
    plain = json.loads(json.dumps(content))
    if _DIGEST in plain:
        raise ValueError(f"the content of {os.fspath(path)} has an entry {_DIGEST!r}; rename it")
    with atomic_file(Path(path)) as stream:
        stream.write(json.dumps({**plain, _DIGEST: _digest(plain)}, indent=2).encode() + b"\n")


def read_json(
    path: str | os.PathLike[str],
    *,
    what: str,
    remedy: str,
    if_missing: str | None = None,
    half_pairs: bool = False,
) -> Document:
    """Read a JSON file that holds one object.

    If it has a digest, as `write_json` adds one, the content must have it. The digest is of the
    values, so white space and the order of the entries may change.

    Args:
        path: the file.
        what: what it should be, such as "the result of a run".
        remedy: what the user can do otherwise, as a clause for the errors.
        if_missing: what the user can do where there is no such file; then the error is one
            sentence with the folder.
        half_pairs: allow half surrogate pairs, which no file name and no printed text can hold.

    Returns:
        The content without the digest; its `check` tests the entries.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, not an object, an entry that occurs twice, half a pair, or changed
            since it was written; the message has the file, the line and the remedy.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        if if_missing is None:
            raise
        raise FileNotFoundError(
            f"{path.parent} has no {path.name} ({error.strerror}); {if_missing}"
        ) from error
    document = parse_json(raw, path=path, what=what, remedy=remedy, half_pairs=half_pairs)
    content = document.content
    if _DIGEST in content and content.pop(_DIGEST) != _digest(content):
        raise document.error(
            "its sha256 is not that of its content, which was changed after it was written",
            key=_DIGEST,
        )
    return document


def read_optional_json(path: Path, *, what: str, remedy: str) -> Document:
    """Read a JSON file as `read_json` does; without the file its content is empty."""
    if not path.is_file():
        return Document(path, what, remedy, {}, "")
    return read_json(path, what=what, remedy=remedy)


def read_json_lines(path: str | os.PathLike[str], *, what: str, remedy: str) -> list[Document]:
    """Read a file with one JSON object a line.

    Args:
        path: the file.
        what: what the file should be, such as "the metrics of a run".
        remedy: what the user can do otherwise, as a clause for the errors.

    Returns:
        The objects; their `check` tests the entries.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line is not an object; the message has the file and the line.
    """
    lines = Path(path).read_bytes().split(b"\n")
    return [
        parse_json(line, path=path, what=what, remedy=remedy, first_line=number)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]


def parse_json(
    content: bytes,
    *,
    path: str | os.PathLike[str],
    what: str,
    remedy: str,
    first_line: int = 1,
    half_pairs: bool = False,
) -> Document:
    """Parse a part of a file that holds one JSON object.

    Args:
        content: the part, in UTF-8.
        path: the file, for the errors.
        what: what the part should be, such as "the metrics of a run".
        remedy: what the user can do otherwise, as a clause for the errors.
        first_line: number of its first line.
        half_pairs: as in `read_json`.

    Returns:
        The object; its `check` tests the entries.

    Raises:
        ValueError: not JSON, not an object, an entry that occurs twice, or half a surrogate pair;
            the message has the file, the line and the remedy.
    """
    document = Document(Path(path), what, remedy, {}, "", first_line=first_line)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise document.error("it is not text in UTF-8", line=line) from error
    document = dataclasses.replace(document, text=text)
    return dataclasses.replace(document, content=_parse(document, text, half_pairs))


@dataclasses.dataclass(frozen=True)
class Document:
    """The content of a JSON file, and what errors in it say.

    Attributes:
        path: the file.
        what: what it should be.
        remedy: what the user can do otherwise.
        content: its entries.
        text: of the file, or of the line.
        first_line: number of the first line of the text.
    """

    path: Path
    what: str
    remedy: str
    content: dict[str, Any]
    text: str = dataclasses.field(repr=False)
    first_line: int = 1

    def check(self, kind: type[T], *, closed: bool = False) -> T:
        """Return the content if it has the entries of a type.

        Args:
            kind: `dict[str, ...]` for all entries, or a class with annotations, such as a
                `TypedDict`. They may be made of `str`, `int`,
                `float` (finite; integers too), `bool`, `None`, `Any`, `Literal[...]`, `list[...]`,
                `tuple[..., ...]` (a list), `dict[str, ...]`, other such classes, unions, and
                `NotRequired[...]`.
            closed: refuse entries that the type does not have.

        Raises:
            ValueError: an entry is missing or has another type; the message has file and line.
        """
        for key, reason in _mismatches(self.content, kind):
            raise self.error(reason, key=key)
        if closed:
            for key in sorted(self.content.keys() - typing.get_type_hints(kind).keys()):
                raise self.error(f"{key!r} is not an entry of it", key=key)
        return typing.cast(T, self.content)

    def error(self, reason: str, *, key: str | None = None, line: int | None = None) -> ValueError:
        """Return the error for a fault in this file.

        Args:
            reason: what is wrong, as a clause.
            key: the entry that is wrong, whose line the message names.
            line: the line, counted from 1; by default that of the entry, or the first one.
        """
        if line is None:
            line = 1 if key is None else _line(self.text, key)
        return ValueError(
            f"{self.path}, line {self.first_line + line - 1}: not {self.what}: {reason}; "
            f"{self.remedy}"
        )


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(
        json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def _parse(document: Document, text: str, half_pairs: bool) -> dict[str, Any]:
    try:
        content = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise document.error(f"it is cut or no JSON ({error.msg})", line=error.lineno) from error
    except (ValueError, RecursionError) as error:  # twice the same entry, a number too long
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise document.error(reason, line=_line(text, None)) from error
    if not isinstance(content, dict):
        raise document.error("it is no JSON object")
    depth = 0
    for bracket in re.finditer(r"[\[{\]}]", _TEXT.sub("", text)):
        depth += 1 if bracket[0] in "[{" else -1
        if depth > _MAX_DEPTH:
            raise document.error("it is nested too deeply", line=_line(text, None))
    if "\\ud" in text.lower() and not half_pairs:
        try:
            json.dumps(content, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            line = text.count("\n", 0, text.lower().index("\\ud")) + 1
            raise document.error("it has half a surrogate pair", line=line) from error
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in content if names.count(name) > 1)
        raise ValueError(f"{twice!r} occurs twice")
    return content


def _line(text: str, wanted: str | None) -> int:
    """Return the line of an entry of the object; for None that of the first faulty one."""
    last = 1
    seen: set[str] = set()
    try:
        for key, line in _entries(text):
            last = line
            if key == wanted or (wanted is None and key in seen):
                return line
            seen.add(key)
    except (ValueError, RecursionError, IndexError):
        return last  # the fault is in the value of this entry
    return 1  # an entry that is missing


def _entries(text: str) -> Iterator[tuple[str, int]]:
    """Yield key and line of each entry of the object that a JSON text holds."""
    decoder = json.JSONDecoder(object_pairs_hook=_unique)
    position = text.index("{") + 1
    while True:
        position = _skip(text, position, " \t\r\n,")
        if text[position] == "}":
            return
        key, end = decoder.raw_decode(text, position)
        yield str(key), text.count("\n", 0, position) + 1
        position = _skip(text, end, " \t\r\n:")
        _, position = decoder.raw_decode(text, position)


def _skip(text: str, position: int, characters: str) -> int:
    while text[position] in characters:
        position += 1
    return position


def _mismatches(content: Mapping[str, Any], kind: type[Any]) -> Iterator[tuple[str, str]]:
    """Yield (entry, reason) of every entry that does not have the type of its annotation."""
    if typing.get_origin(kind) is dict:
        for name, value in content.items():
            reason = _mismatch(value, typing.get_args(kind)[1], name)
            if reason:
                yield name, reason
        return
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        if typing.get_origin(hint) is ClassVar:
            continue
        optional = typing.get_origin(hint) is NotRequired
        if name not in content:
            if not optional:
                yield name, f"it has no {name!r}"
            continue
        reason = _mismatch(content[name], typing.get_args(hint)[0] if optional else hint, name)
        if reason:
            yield name, reason


def _mismatch(value: Any, hint: Any, name: str) -> str | None:
    """Return why a value does not have the type of an annotation; None if it has."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return None
    if origin in (Union, types.UnionType):
        reasons = [_mismatch(value, each, name) for each in arguments]
        if None in reasons:
            return None
        inner = [
            reason
            for reason, each in zip(reasons, arguments, strict=True)
            if isinstance(value, list) and typing.get_origin(each) is list
        ]
        return inner[0] if inner else f"{name} is {_short(value)}, not {_name(hint)}"
    if origin is Literal:
        return None if value in arguments else f"{name} is {_short(value)}, not {_name(hint)}"
    if origin in (list, tuple) and isinstance(value, list):
        found = (_mismatch(v, arguments[0], f"{name}[{i}]") for i, v in enumerate(value))
        return next((reason for reason in found if reason), None)
    if origin is dict and isinstance(value, dict):
        found = (_mismatch(v, arguments[1], f"{name}[{k!r}]") for k, v in value.items())
        return next((reason for reason in found if reason), None)
    if origin is None and _is(value, hint):
        return None
    if isinstance(value, dict) and hasattr(hint, "__annotations__"):
        return next((f"{name}: {reason}" for _, reason in _mismatches(value, hint)), None)
    return f"{name} is {_short(value)}, not {_name(hint)}"


def _is(value: Any, hint: Any) -> bool:
    if hint is float:
        try:
            return type(value) in (int, float) and math.isfinite(value)
        except OverflowError:  # an integer beyond the range of floating point
            return False
    return value is None if hint is type(None) else type(value) is hint


_NAMES: Mapping[Any, str] = {
    str: "text",
    int: "an integer",
    float: "a finite number",
    bool: "true or false",
    type(None): "null",
    list: "a list",
    tuple: "a list",
    dict: "an object",
}


def _name(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_name(each) for each in typing.get_args(hint))
    if origin is Literal:
        return " or ".join(map(json.dumps, typing.get_args(hint)))
    return _NAMES.get(origin or hint, "an object")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]} ..."
