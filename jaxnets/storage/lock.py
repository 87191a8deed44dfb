"""Locks that die with their holder."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LOCK_FILE = ".lock"

_held: set[int] = set()


class FolderInUseError(OSError):
    """Another process holds the folder; the message says which one."""


def try_lock(descriptor: int) -> bool | None:
    """Take the lock of an open file, without waiting.

    Args:
        descriptor: of a file that is open for writing.

    Returns:
        Whether this descriptor holds the lock; None if the file system has no locks. The lock ends
        when the descriptor is closed, at the latest with the process.
    """
    try:
        import fcntl  # Windows has none

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True


@contextlib.contextmanager
def lock_folder(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a folder, so that no other process writes in it.

    The lock is that of the file `.lock`, which says who holds it: host, process and since when. The
    system releases it when the process ends, however it ends. On a network file system it holds
    between hosts if the system shares `flock` between them, as NFS does by default. Where a file
    system has no locks, the file alone decides: a holder on this host counts if its process lives,
    one on another host always.

    Args:
        folder: created if missing.

    Raises:
        FolderInUseError: another process, or this one, holds the folder.
        OSError: the folder cannot be created or is not writable.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, lock_folder(folder):
        ...     os.listdir(folder)
        ['.lock']
    """
    path = Path(folder) / LOCK_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _acquire(path)
    _held.add(descriptor)
    try:
        yield
    finally:
        if descriptor in _held:  # not in a forked child
            path.unlink(missing_ok=True)  # before the lock is released
            _held.discard(descriptor)
            os.close(descriptor)


def _acquire(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            locked = try_lock(descriptor)
            holder = _read(descriptor)
            if locked is False or (locked is None and holder and _may_live(holder)):
                raise FolderInUseError(_describe(path, holder, by_file=locked is None))
            # A holder that ended meanwhile has removed the file that this descriptor has open.
            if _is_same(descriptor, path):
                _write(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _write(descriptor: int) -> None:
    since = datetime.datetime.now(datetime.UTC).isoformat(sep=" ", timespec="seconds")
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(holder).encode() + b"\n", 0)
    os.fsync(descriptor)


def _read(descriptor: int) -> dict[str, Any]:
    """Return what the holder wrote; {} if it is writing at this moment, or wrote nothing."""
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return holder if isinstance(holder["pid"], int) and holder["host"] else {}
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}


def _may_live(holder: dict[str, Any]) -> bool:
    if holder["host"] != socket.gethostname():
        return True
    try:
        os.kill(holder["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # a process of another user
        return True
    return True


def _describe(path: Path, holder: dict[str, Any], *, by_file: bool) -> str:
    who = "another process"
    if holder:
        own = holder["host"] == socket.gethostname() and holder["pid"] == os.getpid()
        who = f"process {holder['pid']}{' (this one)' if own else ''} on {holder['host']}"
        who += f" since {holder.get('since')}"
    remedy = f"; if that process is gone, remove {path}" if by_file else ""
    return f"{path.parent} is in use by {who}; wait until it ends, or use another folder{remedy}"


def _is_same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _release_in_child() -> None:
    """Close the locks that a forked process inherits, which would outlive its parent."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)
