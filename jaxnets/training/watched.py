"""Check that what a hook reads is what an earlier hook returns."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Collection, Sequence
from typing import Any

from jaxnets.training.history import History


class WatchedValues:
    """The values that hooks read, see `Hook.watches`, and that no earlier hook has returned yet.

    A hook may return its values at some steps only, so the check waits until every hook that does
    not read values itself has returned some. A hook that returns None may return values later:
    beside one, a missing value is a warning, and no error.

    Args:
        hooks: in the order in which they are called.
    """

    def __init__(self, hooks: Sequence[Any]) -> None:
        self._hooks = hooks
        self._missing = [
            (position, name)
            for position, hook in enumerate(hooks)
            for name in getattr(hook, "watches", ())
        ]
        self._returned: list[set[str]] = [set() for _ in hooks]
        self._warned = False

    def observe(self, returned: Sequence[Collection[str]]) -> None:
        """Check the names that each hook returned at a step.

        Raises:
            ValueError: no hook, or only a later one, returns a value that a hook reads.
        """
        if not self._missing:
            return
        for names, new in zip(self._returned, returned, strict=True):
            names.update(new)
        self._missing = [
            (position, name)
            for position, name in self._missing
            if not any(name in names for names in self._returned[:position])
        ]
        waiting = [
            hook
            for hook, names in zip(self._hooks, self._returned, strict=True)
            if not names and not hasattr(hook, "watches")
        ]
        for position, name in self._missing:
            if any(name in names for names in self._returned[position:]):
                raise ValueError(
                    f"{self._reader(position)} reads {name}, which a later hook returns; put it "
                    "after that hook"
                )
            if not waiting:
                raise ValueError(self._describe(position, name))
            if any(returned) and all(getattr(hook, "called", True) for hook in waiting):
                self._warn(position, name)

    def finish(self, history: History) -> None:
        """Warn of values that were missing in the whole run; its last step is done."""
        for position, name in self._missing:
            if not history.column(name)[0]:
                self._warn(position, name)

    def _warn(self, position: int, name: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"so far {self._describe(position, name)}", stacklevel=4)

    def _reader(self, position: int) -> str:
        hook = self._hooks[position]
        return type(getattr(hook, "hook", hook)).__name__

    def _describe(self, position: int, name: str) -> str:
        names = sorted(set().union(*self._returned))
        nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
        advice = "put a hook that returns it in front, such as validation"
        if nearest:
            advice = f"did you mean {nearest[0]}? There are {', '.join(names)}"
        return f"no hook returns {name}, which {self._reader(position)} reads; {advice}"
