"""The folders of checkpoints: their names and manifests, what is complete, and their removal."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict, TypeGuard

from jaxnets.storage import Document, file_sha256, parse_json
from jaxnets.training import row_files

_FORMAT = 2  # 1: the rows of the history are in the manifest
_MANIFEST = "manifest.json"
_UNFINISHED = "manifest.json.new"
_FOLDER = re.compile(r"step_(\d+)")


_PAYLOAD = re.compile(r"state_\d+")


class CheckpointError(OSError):
    """A checkpoint cannot be written, or its files are damaged."""


class Leaf(TypedDict):
    """An array of a state.

    Attributes:
        path: in the state.
        shape: its shape.
        dtype: name of its type.
        key: of an array of random keys their kind, such as "threefry2x32".
    """

    path: str
    shape: list[int]
    dtype: str
    key: NotRequired[str]


class Summary(TypedDict):
    """What `History.summary` returns.

    Attributes:
        sums: {metric: [total, count]}, of a population one of each for every member.
        step: the last one, None before the first.
        seconds: of the training, without the first call.
        first_call_seconds: of the first call, which compiles.
        spent: {what: seconds of it}, such as of evaluation.
    """

    sums: dict[str, list[float | list[float]]]
    step: int | None
    seconds: NotRequired[float]
    first_call_seconds: NotRequired[float]
    spent: NotRequired[dict[str, float]]


class WholeHistory(Summary):
    """What `History.to_json` returns: a summary and its rows.

    Attributes:
        rows: one for each logged step.
    """

    rows: list[row_files.Row]


class Manifest(TypedDict):
    """The content of a manifest.

    Attributes:
        format: 2, or 1.
        step: of the state.
        payload: folder of the arrays.
        files: {path in the folder of the checkpoint: sha256}.
        leaves: every array.
        metadata: any JSON values; in format 1 the history is one of them.
        history: without its rows.
        rows: where they are.
    """

    format: int
    step: int
    payload: str
    files: dict[str, str]
    leaves: list[Leaf]
    metadata: dict[str, Any]
    history: NotRequired[Summary]
    rows: NotRequired[list[row_files.Part]]


def folder_of(directory: str | os.PathLike[str], step: int) -> Path:
    """Return the folder of the checkpoint of a step, an absolute path.

    Args:
        directory: of the run's checkpoints.
        step: of the checkpoint.
    """
    return Path(directory).absolute() / f"step_{step:08d}"


def complete_steps(directory: Path) -> list[int]:
    """Return the steps that have a checkpoint, in order; see `checkpoint.all_steps`.

    Args:
        directory: of the run's checkpoints.

    Raises:
        CheckpointError: a folder was renamed, or lost its manifest.
    """
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
    """Make the folder of a save; unless it has a checkpoint already, mark it as unfinished.

    Args:
        folder: of the checkpoint.

    Raises:
        OSError: the folder is not writable.
    """
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


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the manifest atomically: from then on the folder is a checkpoint.

    Args:
        folder: of the checkpoint, with all of its files.
        content: the entries of `Manifest`, without the format.

    Raises:
        OSError: the disk is full or not writable.
    """
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


def load_manifest(folder: Path) -> Manifest:
    """Read a manifest, without a look at the files that it names.

    Args:
        folder: of the checkpoint.

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
    remedy = "restore another checkpoint, and move this one away"
    try:
        document = parse_json(
            body, path=path, what="the manifest of a checkpoint", remedy=remedy, first_line=2
        )
        document.check(_Format)
    except ValueError as error:
        raise CheckpointError(f"damaged checkpoint: {error}") from error
    if document.content["format"] > _FORMAT:
        raise ValueError(
            f"{folder} has format {document.content['format']}, and this version of jaxnets reads "
            f"formats up to {_FORMAT}; install the version that wrote it, or a later one"
        )
    try:
        manifest = document.check(Manifest)
        for key, reason in _faults(manifest):
            raise document.error(reason, key=key)
    except ValueError as error:
        raise CheckpointError(f"damaged checkpoint: {error}") from error
    return manifest


class _Format(TypedDict):
    format: int


def _faults(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Yield (entry, reason) of what has the right type and still cannot be."""
    if not _PAYLOAD.fullmatch(manifest["payload"]):
        yield "payload", f"payload is {manifest['payload']!r}, not such as 'state_0'"
    for name in manifest["files"]:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            yield "files", f"{name!r} is outside of the folder"
    if ("history" in manifest) != ("rows" in manifest):
        yield "history", "it has only one of history and rows"
    for part in manifest.get("rows", ()):
        if not row_files.NAME.fullmatch(part["file"]) or part["rows"] < 1 or part["bytes"] < 1:
            yield "rows", f"{part['file']!r} is no file of rows"
    for name, sums in manifest.get("history", {"sums": {}})["sums"].items():
        if len(sums) != 2:
            yield "history", f"{name} has {len(sums)} sums, not a total and a count"
    for leaf in manifest["leaves"]:
        if leaf["dtype"].startswith("key<") != ("key" in leaf):
            yield "leaves", f"{leaf['path']} is {leaf['dtype']}, and its kind of key does not fit"


def read_manifest(folder: Path) -> Manifest:
    """Read a manifest, and check every file of its folder.

    Args:
        folder: of the checkpoint.

    Raises:
        CheckpointError: the manifest or a file is missing or damaged.
        ValueError: a later version of this library wrote it.
    """
    manifest = load_manifest(folder)
    for name, expected in manifest["files"].items():
        path = folder / name
        try:
            intact = file_sha256(path) == expected
        except (OSError, ValueError) as error:  # a name with a null
            raise CheckpointError(f"damaged checkpoint: cannot read {path}: {error}") from error
        if not intact:
            raise CheckpointError(f"damaged checkpoint: {path} is truncated or altered")
    return manifest


def is_history(content: Any) -> TypeGuard[WholeHistory]:
    """Return whether metadata are a history, as of format 1, and not something of the user's.

    Args:
        content: any JSON value.
    """
    if not isinstance(content, dict):
        return False
    try:
        Document(Path(), "a history", "", content, "").check(WholeHistory)
    except ValueError:
        return False
    return all(len(sums) == 2 for sums in content["sums"].values())


def _is_complete(folder: Path) -> bool:
    return (folder / _MANIFEST).is_file()
