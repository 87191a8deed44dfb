"""The config.json of a network, entry by entry; what is not supported is refused by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from jaxnets.storage import Document, read_json

V = TypeVar("V")

_WHAT = "a configuration that is supported"
_MISSING = object()
# Beyond these JAX wraps integers around, and floats become infinite.
_MOST_INTEGER, _MOST_NUMBER = 2**31 - 1, float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class Config:
    """The configuration of a network as its file says it.

    Attributes:
        document: the file and its entries.
        within: names of the entries around it, for a configuration inside another one.
        renamed: {name of an entry: its name in the file, where that is another one}.
    """

    document: Document
    within: tuple[str, ...] = ()
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Config:
        """Read a config.json.

        Raises:
            FileNotFoundError: no such file.
            ValueError: damaged; the message has file and line.
        """
        return cls(read_json(path, what=_WHAT, remedy="load another folder"))

    @classmethod
    def of(cls, path: Path, content: Mapping[str, Any]) -> Config:
        """Return the configuration that another file than a config.json says."""
        text = json.dumps(content, default=str)
        return cls(Document(path, _WHAT, "load another file", dict(content), text))

    @property
    def content(self) -> dict[str, Any]:
        """The entries."""
        content = self.document.content
        for name in self.within:
            content = content[name]
        return content

    def rename(self, aliases: Mapping[str, str]) -> Config:
        """Return the same entries under the names of an architecture.

        Args:
            aliases: {another name that the file may use: the name}.

        Raises:
            ValueError: two names of one entry have different values. transformers 5 takes the
                alias, whose value may be an old one.
        """
        content, renamed = dict(self.content), dict(self.renamed)
        for alias in [alias for alias in content if alias in aliases]:
            name, value = aliases[alias], content.pop(alias)
            if name not in content:
                content[name], renamed[name] = value, alias
            elif content[name] != value:
                other = renamed.get(name, name)
                raise self.error(
                    alias,
                    f"is another name of {other}, which is {content[name]!r:.60}; leave one out",
                )
        return Config(dataclasses.replace(self.document, content=content), renamed=renamed)

    def inside(self, name: str) -> Config | None:
        """Return the configuration that an entry holds; None if it is null or missing.

        Raises:
            ValueError: the entry is no object.
        """
        value = self.content.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(name, "is no object")
        return Config(self.document, (*self.within, name))

    def integer(
        self, name: str, default: Any = _MISSING, *, least: int = 1, null: bool = False
    ) -> Any:
        """Return an integer entry of at least `least`; None for null, if `null` or by default.

        Raises:
            ValueError: missing without a default, no integer, too small, or of more than 32 bits.
        """
        value = self._get(name, default)
        if name in self.content and not (value is None and (null or default is None)):
            if type(value) is not int:
                raise self.error(name, "is no integer")
            if value < least:
                raise self.error(name, f"is not {least} or more")
            if value > _MOST_INTEGER:
                raise self.error(name, f"is more than {_MOST_INTEGER}")
        return value

    def integers(self, name: str, default: Any = _MISSING) -> tuple[int, ...]:
        """Return an entry that is a list of one or more integers above 0.

        Raises:
            ValueError: missing without a default, or something else.
        """
        value = self._get(name, default)
        if not isinstance(value, list | tuple) or not value:
            raise self.error(name, "is no list of integers")
        if any(type(one) is not int or not 1 <= one <= _MOST_INTEGER for one in value):
            raise self.error(name, "holds something else than integers above 0 of 32 bits")
        return tuple(value)

    def number(self, name: str, default: Any = _MISSING, *, null: bool = False) -> Any:
        """Return an entry that is a number of float32; None for null, if `null` or by default.

        Raises:
            ValueError: missing without a default, or no finite number of float32.
        """
        value = self._get(name, default)
        if name in self.content and not (value is None and (null or default is None)):
            if type(value) not in (int, float) or not abs(value) <= _MOST_NUMBER:
                raise self.error(name, "is no finite number of float32")
            value = float(value)
        return value

    def flag(self, name: str, default: Any = _MISSING) -> Any:
        """Return an entry that is true or false; null only where the default is None.

        Raises:
            ValueError: missing without a default, or neither.
        """
        value = self._get(name, default)
        if name in self.content and not (value is None is default) and type(value) is not bool:
            raise self.error(name, "is neither true nor false")
        return value

    def choice(self, name: str, table: Mapping[Any, V], default: Any = _MISSING) -> V:
        """Return what a table says for an entry.

        Raises:
            ValueError: missing without a default, or no key of the table.
        """
        value = self._get(name, default)
        if isinstance(value, dict | list) or value not in table:
            raise self.error(name, f"is not supported; supported are {_names(table)}")
        return table[value]

    def require(self, **values: Any) -> None:
        """Check that entries have the only value that is supported, which is also their default.

        Raises:
            ValueError: another value; the message has its name.
        """
        for name, value in values.items():
            if self.content.get(name, value) != value:
                raise self.error(name, f"is not supported; supported is {json.dumps(value)}")

    def error(self, name: str, reason: str) -> ValueError:
        """Return the error for an entry.

        Args:
            name: of the entry.
            reason: what is wrong, as a predicate.
        """
        text = json.dumps(self.content.get(name), default=str)
        text = text if len(text) <= 60 else f"{text[:60]} ..."
        path = (*self.within, self.renamed.get(name, name))
        return self.document.error(f"{'.'.join(path)}, {text}, {reason}", key=path[0])

    def _get(self, name: str, default: Any) -> Any:
        value = self.content.get(name, default)
        if value is _MISSING:
            raise self.document.error(f"it has no {'.'.join([*self.within, name])!r}")
        return value


def _names(table: Mapping[Any, Any] | Sequence[Any]) -> str:
    return ", ".join(json.dumps(key) for key in table)
