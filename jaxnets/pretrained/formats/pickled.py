"""Pickles as data: a machine with the few operations that torch's files use, which calls nothing.

Python's own unpickler imports and calls what a pickle names. This one knows a closed list of
names, each with a function of ours, and refuses every other by its name.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxnets.storage.byte_ranges import Cursor, damaged

_MOST_LINE = 1000
_MARK = object()
_REMEDY = "save only tensors in it, such as torch.save(model.state_dict(), path)"


@dataclasses.dataclass(frozen=True)
class Name:
    """A name in a pickle that the caller knows, such as torch.FloatStorage."""

    name: str


class Attributed(dict[Any, Any]):
    """An OrderedDict; what Python stores in its attributes is dropped."""


def read_pickle(
    cursor: Cursor,
    path: Path,
    *,
    functions: Mapping[str, Callable[..., Any]],
    names: Mapping[str, Any],
    persistent: Callable[[Any], Any],
) -> Any:
    """Read one pickle from a cursor.

    Args:
        cursor: where it starts; afterwards where it ends.
        path: the file, for errors.
        functions: {name: what to do instead of calling it}.
        names: names that may occur without being called.
        persistent: returns what an identifier of the pickle stands for.

    Returns:
        None, numbers, text, bytes, dicts, lists, tuples, and what the caller's functions return.

    Raises:
        ValueError: damaged, or it names something else; the message has the file and the name.
    """
    return _Machine(cursor, path, functions, names, persistent).run()


class _Machine:
    def __init__(
        self,
        cursor: Cursor,
        path: Path,
        functions: Mapping[str, Callable[..., Any]],
        names: Mapping[str, Any],
        persistent: Callable[[Any], Any],
    ) -> None:
        self._cursor, self._path = cursor, path
        self._functions, self._names, self._persistent = functions, names, persistent
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        while True:
            code = self._cursor.take(1)
            if code == b".":
                return self._pop()
            if code in _NUMBERS:
                self._stack.append(struct.unpack(*self._number(_NUMBERS[code]))[0])
            elif code in _TEXTS:
                size = self._cursor.unpack(_TEXTS[code])
                self._stack.append(self._cursor.text(size))
            elif code in _BYTES:
                size = self._cursor.unpack(_BYTES[code])
                self._stack.append(self._cursor.take(size))
            elif code in _CONSTANTS:
                self._stack.append(_CONSTANTS[code]())
            elif code in _OPERATIONS:
                _OPERATIONS[code](self)
            else:
                raise self._damaged(f"its pickle has the operation {code!r}")

    def _damaged(self, reason: str) -> ValueError:
        return damaged(self._path, reason, "get the file anew, or save it with a newer torch")

    def _number(self, layout: str) -> tuple[str, bytes]:
        return layout, self._cursor.take(struct.calcsize(layout))

    def _pop(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise self._damaged("its pickle takes a value where there is none")
        return self._stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        for position in range(len(self._stack) - 1, -1, -1):
            if self._stack[position] is _MARK:
                values = self._stack[position + 1 :]
                del self._stack[position:]
                return values
        raise self._damaged("its pickle has no mark")

    def _top(self, kind: type) -> Any:
        if not self._stack or not isinstance(self._stack[-1], kind):
            raise self._damaged(f"its pickle has no {kind.__name__} where it fills one")
        return self._stack[-1]

    def _global(self) -> None:
        module = self._cursor.line(_MOST_LINE).decode("latin-1")
        self._push_name(f"{module}.{self._cursor.line(_MOST_LINE).decode('latin-1')}")

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        self._push_name(f"{module!s:.200}.{name!s:.200}")

    def _push_name(self, name: str) -> None:
        if name in self._names:
            self._stack.append(self._names[name])
        elif name in self._functions:
            self._stack.append(Name(name))
        else:
            raise damaged(self._path, f"it holds {name!r}, which is no tensor", _REMEDY)

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            raise self._damaged("its pickle calls what is no function")
        try:
            self._stack.append(self._functions[function.name](*arguments))
        except (TypeError, AttributeError, KeyError, OverflowError) as error:
            raise self._damaged(f"its pickle calls {function.name} wrongly ({error})") from error

    def _skip(self, size: int) -> None:
        self._cursor.take(size)

    def _build(self) -> None:
        self._pop()
        self._top(Attributed)

    def _items(self, values: list[Any]) -> None:
        target = self._top(dict)
        if len(values) % 2:
            raise self._damaged("its pickle has a key without a value")
        for key, value in zip(values[::2], values[1::2], strict=True):
            # Of other keys the hash may take forever, or the stack of the interpreter.
            if key is not None and not isinstance(key, str | int | float | bytes):
                raise self._damaged(f"a key is a {type(key).__name__}")
            target[key] = value

    def _append(self) -> None:
        value = self._pop()
        self._top(list).append(value)

    def _appends(self) -> None:
        values = self._pop_to_mark()
        self._top(list).extend(values)

    def _setitem(self) -> None:
        value, key = self._pop(), self._pop()
        self._items([key, value])

    def _tuple(self, size: int) -> None:
        values = [self._pop() for _ in range(size)]
        self._stack.append(tuple(reversed(values)))

    def _put(self, index: int) -> None:
        if not self._stack or self._stack[-1] is _MARK:
            raise self._damaged("its pickle remembers a value where there is none")
        self._memo[index] = self._stack[-1]

    def _get(self, index: int) -> None:
        if index not in self._memo:
            raise self._damaged("its pickle recalls a value that it has not remembered")
        self._stack.append(self._memo[index])

    def _long(self, size: int) -> None:
        self._stack.append(int.from_bytes(self._cursor.take(size), "little", signed=True))

    def _decimal(self) -> None:
        text = self._cursor.line(_MOST_LINE)
        if text in (b"00", b"01"):
            self._stack.append(text == b"01")
        elif text.rstrip(b"L").lstrip(b"-").isdigit():
            self._stack.append(int(text.rstrip(b"L")))
        else:
            raise self._damaged("a number in its pickle has other characters than digits")


_NUMBERS = {b"K": "<B", b"M": "<H", b"J": "<i", b"G": ">d"}
_TEXTS = {b"X": "<I", b"\x8c": "<B", b"\x8d": "<Q", b"U": "<B", b"T": "<I"}
_BYTES = {b"C": "<B", b"B": "<I", b"\x8e": "<Q"}
_CONSTANTS: Mapping[bytes, Callable[[], Any]] = {
    b"N": lambda: None,
    b"\x88": lambda: True,
    b"\x89": lambda: False,
    b"}": dict,
    b"]": list,
    b")": tuple,
    b"(": lambda: _MARK,
}
_OPERATIONS: Mapping[bytes, Callable[[_Machine], None]] = {
    b"\x80": lambda m: m._skip(1),  # protocol
    b"\x95": lambda m: m._skip(8),  # frame
    b"c": _Machine._global,
    b"\x93": _Machine._stack_global,
    b"R": _Machine._reduce,
    b"b": _Machine._build,
    b"Q": lambda m: m._stack.append(m._persistent(m._pop())),
    b"a": _Machine._append,
    b"e": _Machine._appends,
    b"s": _Machine._setitem,
    b"u": lambda m: m._items(m._pop_to_mark()),
    b"t": lambda m: m._stack.append(tuple(m._pop_to_mark())),
    b"l": lambda m: m._stack.append(m._pop_to_mark()),
    b"\x85": lambda m: m._tuple(1),
    b"\x86": lambda m: m._tuple(2),
    b"\x87": lambda m: m._tuple(3),
    b"q": lambda m: m._put(m._cursor.unpack("<B")),
    b"r": lambda m: m._put(m._cursor.unpack("<I")),
    b"\x94": lambda m: m._put(len(m._memo)),
    b"h": lambda m: m._get(m._cursor.unpack("<B")),
    b"j": lambda m: m._get(m._cursor.unpack("<I")),
    b"\x8a": lambda m: m._long(m._cursor.unpack("<B")),
    b"\x8b": lambda m: m._long(m._cursor.unpack("<i")),
    b"L": _Machine._decimal,
    b"I": _Machine._decimal,
}
