"""Recorded drives on disk: shards of whole drives, and a list of them that is written last."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxnets.data.driving.fleet import Drive
from jaxnets.data.files import atomic_file

_LIST = "recordings.json"
_DRIVES_PER_SHARD = 8


def write_recordings(
    folder: Path, drives: Iterable[Drive], settings: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Write drives into a folder, shard by shard.

    A folder whose writing was stopped has no list and counts as none.

    Args:
        folder: made if missing; a list in it is replaced.
        drives: in the order in which they are to be read.
        settings: what they are a function of, as JSON can hold it.

    Returns:
        What `read_recordings` returns.

    Raises:
        ValueError: no drive.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _LIST).unlink(missing_ok=True)
    shards: list[dict[str, str]] = []
    scores: list[float] = []
    waiting: list[Drive] = []

    def write() -> None:
        name = f"drives_{len(shards):03d}.npz"
        content = io.BytesIO()
        arrays: Any = _join([drive.arrays for drive in waiting])
        np.savez_compressed(content, **arrays)
        with atomic_file(folder / name) as file:
            file.write(content.getbuffer())
        digest = hashlib.sha256(content.getbuffer()).hexdigest()
        shards.append({"name": name, "sha256": digest})
        waiting.clear()

    for drive in drives:
        waiting.append(drive)
        scores.append(round(drive.score.points, 3))
        if len(waiting) == _DRIVES_PER_SHARD:
            write()
    if waiting:
        write()
    if not shards:
        raise ValueError("there is no drive to write; give at least one seed")
    listed = {"settings": dict(settings), "points": scores, "shards": shards}
    with atomic_file(folder / _LIST) as file:
        file.write(json.dumps(listed, indent=2).encode())
    return read_recordings(folder, settings)


def has_recordings(folder: Path) -> bool:
    """Whether a folder holds recordings that were written to the end.

    Args:
        folder: as given to `write_recordings`; it need not exist.
    """
    return (folder / _LIST).is_file()


def read_points(folder: Path) -> list[float]:
    """Return the points of each recorded drive, by CarRacing's count: about 900 for a whole lap.

    Args:
        folder: as given to `write_recordings`.

    Raises:
        FileNotFoundError: the folder holds no finished recordings, see `has_recordings`.
    """
    return json.loads((folder / _LIST).read_text())["points"]


def read_recordings(
    folder: Path, settings: Mapping[str, Any] | None = None
) -> dict[str, np.ndarray]:
    """Read all drives of a folder.

    Args:
        folder: as written by `write_recordings`.
        settings: what the recordings must have been made with; by default anything.

    Returns:
        The arrays of `Drive`, all drives one behind the other: {name: [decisions, ...]}.

    Raises:
        FileNotFoundError: no recordings, or a shard is missing.
        ValueError: a shard is damaged, or the settings differ.
    """
    remedy = f"remove {folder} and record again"
    try:
        listed = json.loads((folder / _LIST).read_text())
        found, shards = listed["settings"], listed["shards"]
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{folder} holds no complete recordings ({_LIST} is missing); record first"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / _LIST} is damaged ({error!r}); {remedy}") from error
    wanted = None if settings is None else json.loads(json.dumps(dict(settings)))
    if wanted is not None and wanted != found:
        changed = {n for n in found.keys() | wanted.keys() if found.get(n) != wanted.get(n)}
        name = min(changed)
        raise ValueError(
            f"{folder} was recorded with {name} = {found.get(name)!r}, not "
            f"{wanted.get(name)!r}; use another folder, or {remedy}"
        )
    return _join([_read_shard(folder / shard["name"], shard["sha256"], remedy) for shard in shards])


def _read_shard(path: Path, digest: str, remedy: str) -> dict[str, np.ndarray]:
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"shard {path} is missing; {remedy}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != digest:
        raise ValueError(
            f"shard {path} is damaged: sha256 {found} ({len(content)} bytes), expected {digest}; "
            f"{remedy}"
        )
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return dict(arrays)
    except (ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"shard {path} is no archive of arrays ({error}); {remedy}") from error


def _join(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def windows(decisions: np.ndarray, length: int) -> np.ndarray:
    """List the windows of consecutive decisions that lie within one drive.

    Args:
        decisions: number of each decision in its drive, integer [decisions].
        length: decisions in a window.

    Returns:
        The indices of each window's decisions, int32 [windows, length].

    Raises:
        ValueError: a length below 1, or longer than every drive.

    Example:
        >>> windows(np.array([0, 1, 2, 0, 1]), 2).tolist()
        [[0, 1], [1, 2], [3, 4]]
    """
    if length < 1:
        raise ValueError(f"a window of {length} decisions; give a length of 1 or more")
    starts = np.arange(len(decisions) - length + 1)
    if len(starts):
        drives = np.concatenate([[0], np.cumsum(decisions[1:] == 0)])  # number of the drive
        starts = starts[drives[starts + length - 1] == drives[starts]]
    if not len(starts):
        raise ValueError(f"no drive has {length} decisions; use shorter windows")
    return (starts[:, None] + np.arange(length)[None]).astype(np.int32)
