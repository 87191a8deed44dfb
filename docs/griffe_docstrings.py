"""Shows the docstrings of the library as they are meant; mkdocs.yml names this file.

"Example:" is a section of doctests, `[batch] [features]` is no link, what is returned is a
description with or without a colon, the arguments of a type of functions belong to its `__call__`,
and the fields of a Linen module are its parameters.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import (
    Attribute,
    Class,
    Extension,
    Function,
    Object,
    Parameter,
    ParameterKind,
    Parameters,
)

_LINK = re.compile(r"\](\s?)\[")
# The first line of what is returned, if it has a colon: the parser takes what is before for a type.
_RETURNED = re.compile(r"^(\s*(?:Returns|Yields):\n\s*)(?=\S.*:)", re.MULTILINE)


class Docstrings(Extension):
    """Read the docstrings and fields of a package once it is loaded."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Bring a docstring into the form that the parser knows."""
        if obj.docstring is not None:
            obj.docstring.value = _readable(obj.docstring.value)

    def on_class_members(self, *, cls: Class, **_: Any) -> None:
        """Give Linen modules their constructor, and types of functions their arguments."""
        bases = [str(base) for base in cls.bases]
        if "nn.Module" in bases and "__init__" not in cls.members:
            cls.set_member("__init__", _constructor(cls))
        call = cls.members.get("__call__")
        if "Protocol" in bases and isinstance(call, Function) and cls.docstring is not None:
            start, args, rest = cls.docstring.value.partition("\nArgs:\n")
            if args and call.docstring is None:
                listed = re.sub(r"^    (\w+):", r"    - `\1`:", rest, flags=re.MULTILINE)
                listed = listed.replace("\nReturns:\n", "\nGives back:\n")
                cls.docstring.value = f"{start}\nCalled with:\n{listed}"


def _readable(text: str) -> str:
    lines = []
    for line in text.splitlines():
        if not line.lstrip().startswith((">>>", "...")):
            line = _LINK.sub(r"]\1\\[", line)
        lines.append("Examples:" if line == "Example:" else line)
    return _RETURNED.sub(r"\1:", "\n".join(lines))  # the type is that of the signature


def _constructor(cls: Class) -> Function:
    fields = [
        member
        for member in cls.members.values()
        if isinstance(member, Attribute) and member.annotation is not None
    ]
    parameters = [
        Parameter(
            field.name,
            annotation=field.annotation,
            kind=ParameterKind.positional_or_keyword,
            default=field.value,
        )
        for field in fields
        if "property" not in field.labels and "ClassVar" not in str(field.annotation)
    ]
    first = Parameter("self", annotation=None, kind=ParameterKind.positional_or_keyword)
    return Function("__init__", parameters=Parameters(first, *parameters), parent=cls)
