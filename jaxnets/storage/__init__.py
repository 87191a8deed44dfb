"""Files that survive kills: written atomically, held by one process, read with checks."""

from jaxnets.storage.atomic import atomic_file, atomic_folder
from jaxnets.storage.digests import file_sha256
from jaxnets.storage.documents import (
    Document,
    parse_json,
    read_json,
    read_json_lines,
    read_optional_json,
    write_json,
)
from jaxnets.storage.lock import FolderInUseError, lock_folder
from jaxnets.storage.safetensors import read_safetensors, write_safetensors

__all__ = [
    "Document",
    "FolderInUseError",
    "atomic_file",
    "atomic_folder",
    "file_sha256",
    "lock_folder",
    "parse_json",
    "read_json",
    "read_json_lines",
    "read_optional_json",
    "read_safetensors",
    "write_json",
    "write_safetensors",
]
