"""A table of the tensors of a file or folder."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from pathlib import Path
from typing import Any

from jaxnets.pretrained.formats.files import read_tensors
from jaxnets.storage import read_json
from jaxnets.storage.tensors import Tensors


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What a file or folder holds.

    Attributes:
        tensors: its tensors.
        architecture: as its config.json or its GGUF metadata say; None if they do not.
    """

    tensors: Tensors
    architecture: str | None

    def to_json(self) -> dict[str, Any]:
        """Return the same as JSON values."""
        return {
            "path": str(self.tensors.path),
            "architecture": self.architecture,
            "num_parameters": self._num_elements,
            "bytes": self.tensors.nbytes,
            "tensors": {
                name: {
                    "shape": list(spec.shape),
                    "dtype": spec.dtype.name,
                    "stored": spec.stored,
                    "bytes": spec.nbytes,
                }
                for name, spec in self.tensors.specs.items()
            },
        }

    @property
    def _num_elements(self) -> int:
        return sum(spec.size for spec in self.tensors.specs.values())

    def __str__(self) -> str:
        rows = [
            (repr(name)[1:-1], str(list(spec.shape)), spec.stored, f"{spec.nbytes:,}")
            for name, spec in self.tensors.specs.items()
        ]
        kinds = Counter(spec.stored for spec in self.tensors.specs.values())
        types = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        rows = [("name", "shape", "type", "bytes"), *rows]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            f"{name:<{widths[0]}}  {shape:<{widths[1]}}  {kind:<{widths[2]}}  {size:>{widths[3]}}"
            for name, shape, kind, size in rows
        ]
        total = f"{len(self.tensors)} tensors ({types or 'none'}), {self._num_elements:,} elements"
        lines += ["", f"{total}, {self.tensors.nbytes:,} bytes"]
        if self.architecture:
            lines.append(f"architecture: {self.architecture}")
        return "\n".join(lines)


def inspect(path: str | os.PathLike[str]) -> Inspection:
    """Return what a file or folder of tensors holds, without reading data.

    Args:
        path: as for `read_tensors`.

    Returns:
        Its `str` is a table of names, shapes, types and sizes.

    Raises:
        ValueError: damaged, or it holds something that is not read; the message names the file.
        OSError: it cannot be read.
    """
    tensors = read_tensors(path)
    architecture = tensors.metadata.get("general.architecture")
    config = Path(path) / "config.json"
    if config.is_file():
        content = read_json(
            config, what="the configuration of a network", remedy="get the folder anew"
        ).content
        names = content.get("architectures")
        name = names[0] if isinstance(names, list) and names else None
        architecture = name or content.get("model_type")
    return Inspection(tensors, architecture if isinstance(architecture, str) else None)
