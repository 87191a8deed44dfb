"""Safetensors files: a header in JSON, then the data.

The format: https://huggingface.co/docs/safetensors. Its package returns no float8 as NumPy arrays,
so this is a reader of its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxnets.pretrained.formats.byte_ranges import Cursor, FileRange, damaged
from jaxnets.pretrained.formats.tensors import Tensors, TensorSpec, contiguous
from jaxnets.storage.safetensors import DTYPES

# The bound of the safetensors package.
_MOST_HEADER_BYTES = 100_000_000


def read_safetensors(path: Path) -> Tensors:
    """Open a safetensors file.

    Raises:
        ValueError: damaged, or a type that is not read; the message names the file.
        OSError: it cannot be read.
    """
    file = FileRange.of(path)
    cursor = Cursor(file, path)
    size = cursor.unpack("<Q")
    if size > _MOST_HEADER_BYTES:
        raise damaged(path, f"it is no safetensors file: its header has {size} bytes")
    header = _parse(path, cursor.text(size))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise damaged(path, "its __metadata__ is no object of texts")
    data = file.part(8 + size, file.size - 8 - size)
    specs: dict[str, TensorSpec] = {}
    ranges: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        stored, shape, (start, end) = _entry(path, name, entry)
        tensor = contiguous(data.part(start, end - start), 0, shape, DTYPES[stored])
        specs[name] = tensor.spec(name, stored)
        if specs[name].nbytes != end - start:
            raise damaged(path, f"{name!r} has {end - start} bytes instead of {specs[name].nbytes}")
        ranges.append((start, end, name))
    _check_order(path, ranges, data.size)
    return Tensors(path, specs, metadata)


def _parse(path: Path, text: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for name, value in pairs:
            if name in content:
                raise damaged(path, f"{name!r} occurs twice in its header")
            content[name] = value
        return content

    try:
        header = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        if str(path) in str(error):
            raise
        raise damaged(path, f"its header is no JSON ({error})") from error
    if not isinstance(header, dict):
        raise damaged(path, "its header is no JSON object")
    return header


def _entry(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """Return type, shape and range of a tensor from its entry in the header."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise damaged(path, f"the entry of {name!r} has not dtype, shape and data_offsets")
    stored, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(stored, str) or stored not in DTYPES:
        raise damaged(
            path,
            f"{name!r} has the type {str(stored)[:40]!r}, which is not read",
            f"convert it to one of {', '.join(DTYPES)}",
        )
    for values in (shape, offsets):
        if not isinstance(values, list) or not all(type(v) is int and v >= 0 for v in values):
            raise damaged(path, f"{name!r} has shape {shape!s:.80}, data_offsets {offsets!s:.80}")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise damaged(path, f"{name!r} has data_offsets {offsets!s:.80}")
    return stored, tuple(shape), (offsets[0], offsets[1])


def _check_order(path: Path, ranges: list[tuple[int, int, str]], size: int) -> None:
    """Check that the data of the tensors follow each other and fill the file."""
    position, before = 0, ""
    for start, end, name in sorted(ranges):
        if start < position:
            raise damaged(path, f"the data of {name!r} and {before!r} overlap")
        if start > position:
            raise damaged(path, f"bytes {position} to {start} of its data belong to no tensor")
        position, before = end, name
    if position != size:
        raise damaged(path, f"bytes {position} to {size} of its data belong to no tensor")
