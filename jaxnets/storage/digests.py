"""Digests of files."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def file_sha256(path: Path, *, sync: bool = False) -> str:
    """Return the sha256 of a file in hexadecimal digits.

    Args:
        path: the file.
        sync: wait until it has reached the disk.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
