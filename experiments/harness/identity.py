"""What a run folder must know, so that no other run is taken for its own: code and data."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import jaxnets as jn

#: The folders with the code of an experiment, and the libraries that compute.
_SOURCES = (Path(jn.__file__).parent, Path(__file__).parents[1])
_LIBRARIES = ("jax", "jaxlib", "flax", "optax")


@functools.cache
def code_version() -> Mapping[str, str]:
    """Return the versions of jaxnets and of the libraries, and a digest of all sources."""
    digest = hashlib.sha256()
    for folder in _SOURCES:
        for path in sorted(folder.rglob("*.py")):
            _update(digest, [str(path.relative_to(folder.parent)), path.read_bytes()])
    return {
        "jaxnets": jn.__version__,
        "sources": digest.hexdigest()[:16],
        **{name: metadata.version(name) for name in _LIBRARIES},
    }


def content_sha256(content: Any) -> str:
    """Return a digest of data: every name, dtype, shape and value.

    Args:
        content: arrays, text, numbers and None, in dataclasses, mappings and sequences.

    Raises:
        TypeError: anything else.

    Example:
        >>> content_sha256({"labels": np.arange(3)}) == content_sha256({"labels": np.arange(3.0)})
        False
    """
    digest = hashlib.sha256()
    _update(digest, content)
    return digest.hexdigest()


def _update(digest: Any, content: Any) -> None:
    """Add a tree to a digest; every node is preceded by its kind and size."""
    if dataclasses.is_dataclass(content) and not isinstance(content, type):
        names = [field.name for field in dataclasses.fields(content)]
        content = {name: getattr(content, name) for name in names}
    if isinstance(content, Mapping):
        digest.update(f"mapping {len(content)}\n".encode())
        for name in sorted(content):
            _update(digest, name)
            _update(digest, content[name])
    elif isinstance(content, tuple | list):
        digest.update(f"sequence {len(content)}\n".encode())
        for each in content:
            _update(digest, each)
    elif isinstance(content, np.ndarray) and content.dtype != object:
        digest.update(f"array {content.dtype.str} {content.shape}\n".encode())
        digest.update(np.ascontiguousarray(content).data)
    elif isinstance(content, bytes | str):
        raw = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
        digest.update(f"{type(content).__name__} {len(raw)}\n".encode() + raw)
    elif content is None or isinstance(content, bool | int | float | np.generic):
        digest.update(f"{type(content).__name__} {content!r}\n".encode())
    else:
        raise TypeError(f"{type(content).__name__} has no digest; give arrays, text and numbers")
