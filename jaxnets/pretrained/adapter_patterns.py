"""Regular expressions of PEFT's adapter_config.json, matched in bounded time.

PEFT matches a key of `alpha_pattern` with the end of a layer's name, after a dot or at its start,
by `re.match(rf"(.*\\.)?({key})$", name)`. For some expressions `re` takes time that is exponential
in the length of the name. Here all ends of a part are computed at once, as bits of an integer.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

#: (name, positions where a part may start) -> positions where it may end; bit i is position i.
_Part = Callable[[str, int], int]

_CHARACTER = re.compile(
    # A class, an escape, a set without what a later `re` may read otherwise, or a literal.
    r"\\[dDsSwW]|\\[^a-zA-Z0-9]|\[\^?(?:\\.|[^]\\[&|~-]|-(?!-))+\]|[^[\\()*+?|^$]",
    re.DOTALL,
)
_REPETITION = re.compile(r"(?:([*+?])|\{(\d+)\}|\{(\d*),(\d*)\})\??", re.ASCII)
_BOUNDS: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
_MOST_DEPTH = 20


def compile_pattern(key: str) -> Callable[[str], bool]:
    """Return what tells whether PEFT would match a key with the name of a layer.

    Characters, escapes, sets, groups, alternatives, repetitions, "^" and "$" are those of `re`.

    Args:
        key: regular expression.

    Raises:
        ValueError: it is damaged, has something else such as a lookahead or a flag, or repeats
            what has repetitions in itself; the message is the reason, as a clause.

    Example:
        >>> matches = compile_pattern(r"layers\\.(0|1)\\..*_proj")
        >>> matches("model.layers.1.attn.q_proj"), matches("model.layers.2.attn.q_proj")
        (True, False)
    """
    parser = _Parser(key)
    part = parser.alternatives()
    if parser.position < len(key):
        raise ValueError("a parenthesis is closed that is not open")

    def matches(name: str) -> bool:
        starts = 1 | _positions(r"\.", name) << 1
        return bool(part(name, starts) >> len(name) & 1)

    return matches


class _Parser:
    """A parser of one expression, which knows whether the part before has repetitions."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self.depth = 0
        self.repeats = False

    def alternatives(self) -> _Part:
        """Parse up to the end or a closing parenthesis."""
        parts, repeats = [], False
        while True:
            parts.append(self._sequence())
            repeats |= self.repeats
            if not self._take("|"):
                break
        self.repeats = repeats

        def ends(name: str, starts: int) -> int:
            return functools.reduce(lambda found, part: found | part(name, starts), parts, 0)

        return ends

    def _sequence(self) -> _Part:
        parts, repeats = [], False
        while self.position < len(self.text) and self.text[self.position] not in "|)":
            if self._take("^"):
                parts.append(lambda name, starts: starts & 1)
            elif self._take("$"):
                parts.append(lambda name, starts: starts & 1 << len(name))
            else:
                parts.append(self._repeated(self._single()))
                repeats |= self.repeats
        self.repeats = repeats

        def ends(name: str, starts: int) -> int:
            for part in parts:
                if not starts:  # most names fail at one of the first characters
                    break
                starts = part(name, starts)
            return starts

        return ends

    def _single(self) -> _Part:
        """Parse a group or one character."""
        if self._take("(?:") or self._take("("):
            self.depth += 1
            if self.depth > _MOST_DEPTH:
                raise ValueError(f"it has more than {_MOST_DEPTH} groups in each other")
            part = self.alternatives()
            if not self._take(")"):
                raise ValueError("a parenthesis is not closed")
            self.depth -= 1
            return part
        found = _CHARACTER.match(self.text, self.position)
        if not found or _REPETITION.match(self.text, self.position):
            raise ValueError(f"{self.text[self.position :]!r:.40} in it is not supported")
        try:
            re.compile(found[0])
        except re.error as error:
            raise ValueError(str(error)) from None
        self.position, self.repeats = found.end(), False
        return lambda name, starts: (starts & _positions(found[0], name)) << 1

    def _repeated(self, part: _Part) -> _Part:
        found = _REPETITION.match(self.text, self.position)
        if not found:
            return part
        self.position = found.end()
        kind, exactly, least, most = found.groups()
        low, high = _BOUNDS[kind] if kind else (int(exactly or least or 0), None)
        if not kind and (exactly or most):
            high = int(exactly or most)
        if high != 1 and self.repeats:
            raise ValueError("it repeats what has repetitions in itself")
        if high is not None and high < low:
            raise ValueError(f"{found[0]} has no number of repetitions")
        self.repeats |= high != 1

        def ends(name: str, starts: int) -> int:
            most = len(name) + 1  # with more repetitions a part can reach no other positions
            for _ in range(min(low, most)):
                starts = part(name, starts)
            reached = new = starts
            for _ in range(most if high is None else min(high - low, most)):
                new = part(name, new) & ~reached
                if not new:
                    break
                reached |= new
            return reached

        return ends

    def _take(self, text: str) -> bool:
        found = self.text.startswith(text, self.position)
        self.position += len(text) * found
        return found


@functools.lru_cache(maxsize=4096)
def _positions(character: str, name: str) -> int:
    """Return the positions of the characters of a name that fit an expression for one."""
    fits = re.compile(character).fullmatch
    return sum(1 << index for index, one in enumerate(name) if fits(one))
