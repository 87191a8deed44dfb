"""Recordings on disk: shards of whole drives, and an index that is written last."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from jaxnets.data.driving.fleet import Drive
from jaxnets.storage import atomic_file, read_json, write_json

_INDEX = "recordings.json"
_DRIVES_PER_SHARD = 8


class _Shard(TypedDict):
    name: str
    sha256: str


class _Index(TypedDict):
    settings: dict[str, Any]
    points: list[float]
    shards: list[_Shard]


def write_recordings(
    folder: Path, drives: Iterable[Drive], settings: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Write drives into a folder, shard by shard.

    If writing is interrupted, the folder has no index and counts as empty.

    Args:
        folder: created if missing; an existing index is replaced.
        drives: in the order of reading.
        settings: everything that determines the drives, serializable as JSON.

    Returns:
        The arrays of `read_recordings`.

    Raises:
        ValueError: no drive.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _INDEX).unlink(missing_ok=True)
    shards: list[dict[str, str]] = []
    scores: list[float] = []
    buffer: list[Drive] = []

    def write() -> None:
        name = f"drives_{len(shards):03d}.npz"
        content = io.BytesIO()
        arrays: Any = _join([drive.arrays for drive in buffer])
        np.savez_compressed(content, **arrays)
        with atomic_file(folder / name) as file:
            file.write(content.getbuffer())
        digest = hashlib.sha256(content.getbuffer()).hexdigest()
        shards.append({"name": name, "sha256": digest})
        buffer.clear()

    for drive in drives:
        buffer.append(drive)
        scores.append(round(drive.score.points, 3))
        if len(buffer) == _DRIVES_PER_SHARD:
            write()
    if buffer:
        write()
    if not shards:
        raise ValueError("there is no drive to write; give at least one seed")
    index = {"settings": dict(settings), "points": scores, "shards": shards}
    write_json(folder / _INDEX, index)
    return read_recordings(folder, settings)


def has_recordings(folder: Path) -> bool:
    """Return whether a folder has complete recordings.

    Args:
        folder: as given to `write_recordings`; it need not exist.
    """
    return (folder / _INDEX).is_file()


def read_points(folder: Path) -> list[float]:
    """Return the points of each recorded drive, as in `Score`: about 900 for a full lap.

    Args:
        folder: as given to `write_recordings`.

    Raises:
        FileNotFoundError: the folder has no complete recordings, see `has_recordings`.
        ValueError: the index is damaged; names the file and the line.
    """
    return _read_index(folder)["points"]


def read_recordings(
    folder: Path, settings: Mapping[str, Any] | None = None
) -> dict[str, np.ndarray]:
    """Read all drives of a folder.

    Args:
        folder: as written by `write_recordings`.
        settings: required settings of the recordings; by default not checked.

    Returns:
        The arrays of `Drive`, concatenated over the drives: {name: [decisions, ...]}.

    Raises:
        FileNotFoundError: no recordings, or a shard is missing.
        ValueError: the index or a shard is damaged, or the settings differ.
    """
    remedy = _remedy(folder)
    index = _read_index(folder)
    found, shards = index["settings"], index["shards"]
    wanted = None if settings is None else json.loads(json.dumps(dict(settings)))
    if wanted is not None and wanted != found:
        changed = {n for n in found.keys() | wanted.keys() if found.get(n) != wanted.get(n)}
        name = min(changed)
        raise ValueError(
            f"{folder} was recorded with {name} = {found.get(name)!r}, not "
            f"{wanted.get(name)!r}; use another folder, or {remedy}"
        )
    parts: list[dict[str, np.ndarray]] = []
    for shard in shards:
        path = folder / shard["name"]
        parts.append(_read_shard(path, shard["sha256"], remedy))
        if _layout(parts[-1]) != _layout(parts[0]):
            raise ValueError(
                f"shard {path} holds {_layout(parts[-1])}, the first one {_layout(parts[0])}; "
                f"{remedy}"
            )
    return _join(parts)


def _remedy(folder: Path) -> str:
    return f"remove {folder} and record again"


def _read_index(folder: Path) -> _Index:
    document = read_json(
        folder / _INDEX,
        what="the list of recorded drives",
        remedy=_remedy(folder),
        if_missing="the recordings are not complete, so record first",
    )
    index = document.check(_Index)
    if not index["shards"]:
        raise document.error("it has no shard", key="shards")
    for shard in index["shards"]:
        if Path(shard["name"]).name != shard["name"]:
            raise document.error(f"shard {shard['name']!r} is outside the folder", key="shards")
    return index


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
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = dict(file)
            if strangers := [n for n, array in arrays.items() if not isinstance(array, np.ndarray)]:
                raise TypeError(f"{strangers[0]} holds no array")
    except Exception as error:  # the readers of zip and npy raise almost anything
        raise ValueError(
            f"shard {path} is not an archive of arrays ({type(error).__name__}: {error}); {remedy}"
        ) from error
    lengths = {array.shape[:1] for array in arrays.values()}
    if len(lengths) != 1 or () in lengths:
        shapes = {name: array.shape for name, array in arrays.items()}
        raise ValueError(f"shard {path} has arrays of no common length: {shapes}; {remedy}")
    return arrays


def _layout(arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the dtype of each array, and its shape without the axis of decisions."""
    return {name: (str(array.dtype), array.shape[1:]) for name, array in sorted(arrays.items())}


def _join(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def windows(decisions: np.ndarray, length: int) -> np.ndarray:
    """Return all windows of consecutive decisions that do not cross drives.

    Args:
        decisions: index of each decision within its drive, integer [decisions].
        length: decisions per window.

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
        drives = np.concatenate([[0], np.cumsum(decisions[1:] == 0)])  # index of the drive
        starts = starts[drives[starts + length - 1] == drives[starts]]
    if not len(starts):
        raise ValueError(f"no drive has {length} decisions; use shorter windows")
    return (starts[:, None] + np.arange(length)[None]).astype(np.int32)
