"""The folders of checkpoints: their names and manifests, what is complete, and their removal."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_FORMAT = 2  # 1: the rows of the history are in the manifest
_MANIFEST = "manifest.json"
_UNFINISHED = "manifest.json.new"
_FOLDER = re.compile(r"step_(\d+)")


class CheckpointError(OSError):
    """A checkpoint cannot be written, or its files are damaged."""


def folder_of(directory: str | os.PathLike[str], step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
    return Path(directory).absolute() / f"step_{step:08d}"


def complete_steps(directory: Path) -> list[int]:
    """See `checkpoint.all_steps`."""
    steps = []
    for folder in directory.glob("step_*") if directory.is_dir() else ():
        match = _FOLDER.fullmatch(folder.name)
        if match is None:
            continue
        # In this order, because another process may finish or remove the checkpoint meanwhile.
        unfinished = (folder / _UNFINISHED).exists()
        if _is_complete(folder):
            if folder.name != folder_of(directory, int(match[1])).name:
                raise CheckpointError(f"{folder} was renamed; give it its name back, or move it")
            steps.append(int(match[1]))
        elif not unfinished and any(re.fullmatch(r"state_\d+", p.name) for p in folder.glob("*")):
            raise CheckpointError(
                f"{folder} has arrays but no {_MANIFEST}; put it back, or move the folder away"
            )
    return sorted(steps)


def begin(folder: Path) -> None:
    """Make the folder of a save; unless it has a checkpoint already, mark it as unfinished."""
    folder.mkdir(exist_ok=True)
    if not _is_complete(folder):
        (folder / _UNFINISHED).touch()


def remove_leftovers(directory: Path) -> None:
    """Remove what killed saves and removals left; `complete_steps` has refused anything else."""
    folders = [path for path in directory.glob("step_*") if _FOLDER.fullmatch(path.name)]
    for folder in folders:
        if _is_complete(folder):
            (folder / _UNFINISHED).unlink(missing_ok=True)
        else:
            remove(folder)
    if not any(map(_is_complete, folders)):
        for rows in directory.glob("history_*.jsonl"):
            rows.unlink()


def remove_unused_rows(directory: Path) -> None:
    """Remove the files of rows that no checkpoint names, as after one was replaced."""
    try:
        manifests = [load_manifest(folder_of(directory, s)) for s in complete_steps(directory)]
    except CheckpointError:
        return  # a damaged manifest may name them
    used = {part["file"] for manifest in manifests for part in manifest.get("rows", ())}
    for path in directory.glob("history_*.jsonl"):
        if path.name not in used:
            path.unlink()


def remove(folder: Path) -> None:
    """Remove a checkpoint, so that a kill leaves the other ones and what the next save removes."""
    if _is_complete(folder):
        os.replace(folder / _MANIFEST, folder / _UNFINISHED)
    for payload in folder.glob("state_*"):
        shutil.rmtree(payload)
    shutil.rmtree(folder)


def digest(path: Path, *, sync: bool = False) -> str:
    """Return the sha256 of a file; with `sync` after it has reached the disk."""
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the manifest atomically: from then on the folder is a checkpoint."""
    body = json.dumps({"format": _FORMAT, **content})
    temporary = folder / _UNFINISHED
    with temporary.open("w") as file:
        # The first line is the digest of every byte after it.
        file.write(f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / _MANIFEST)
    for path in (folder, folder.parent):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def load_manifest(folder: Path) -> dict[str, Any]:
    """Read a manifest, without a look at the files that it names.

    Raises:
        CheckpointError: it is missing or damaged.
        ValueError: a later version of this library wrote it.
    """
    path = folder / _MANIFEST
    try:
        digest, _, body = path.read_bytes().partition(b"\n")
    except OSError as error:
        raise CheckpointError(f"damaged checkpoint: cannot read {path}: {error}") from error
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise CheckpointError(f"damaged checkpoint: {path} is truncated or altered")
    manifest: dict[str, Any] = json.loads(body)
    if manifest["format"] > _FORMAT:
        raise ValueError(
            f"{folder} has format {manifest['format']}, and this version of jaxnets reads formats "
            f"up to {_FORMAT}; install the version that wrote it, or a later one"
        )
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a manifest, and check every file of its folder; raises as `load_manifest` does."""
    manifest = load_manifest(folder)
    for name, expected in manifest["files"].items():
        path = folder / name
        try:
            intact = digest(path) == expected
        except OSError as error:
            raise CheckpointError(f"damaged checkpoint: cannot read {path}: {error}") from error
        if not intact:
            raise CheckpointError(f"damaged checkpoint: {path} is truncated or altered")
    return manifest


def _is_complete(folder: Path) -> bool:
    return (folder / _MANIFEST).is_file()
