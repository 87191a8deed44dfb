"""Files and folders that get their name once they are complete."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from jaxnets.storage.lock import try_lock

_TEMPORARY = re.compile(r"\..*\.[0-9a-f]{16}\.part")


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that gets its final name only once it is complete and on the disk.

    What a killed process left in the folder is removed when the next process writes there.

    Args:
        path: final name; missing folders are created. An existing file is replaced. The file gets
            the permissions that the umask leaves. If the block raises, the temporary file is
            removed.

    Yields:
        A temporary file in the same folder, open for writing bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path.parent.absolute())
    stream = _create(path)
    temporary = Path(stream.name)
    try:
        with stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            os.replace(temporary, path)  # while its lock is held
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Make a folder that gets its final name only once it is complete.

    What a killed process left beside it is removed when the next process writes there.

    Args:
        path: final name, which does not exist; missing folders above it are created. If the block
            raises, the temporary folder is removed.

    Yields:
        A temporary folder beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path.parent.absolute())
    with contextlib.ExitStack() as stack:
        temporary = _create_folder(path, stack)
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)
        yield temporary
        os.rename(temporary, path)


def _create_folder(path: Path, stack: contextlib.ExitStack) -> Path:
    """Create a temporary folder and lock it until the stack is closed."""
    while True:
        temporary = path.parent / _temporary_name(path)
        temporary.mkdir()
        try:
            descriptor = os.open(temporary, os.O_RDONLY)
        except PermissionError:  # Windows opens no folder
            return temporary
        except FileNotFoundError:  # another process took it for a leftover
            continue
        stack.callback(os.close, descriptor)
        if try_lock(descriptor) is not False and temporary.exists():
            return temporary


def _temporary_name(path: Path) -> str:
    return f".{path.name[:40]}.{secrets.token_hex(8)}.part"


def _create(path: Path) -> IO[bytes]:
    """Create a temporary file and lock it, so that no other process takes it for a leftover."""
    while True:
        stream = (path.parent / _temporary_name(path)).open("xb")
        # Between these two calls another process may have taken it for a leftover.
        if try_lock(stream.fileno()) is not False and os.fstat(stream.fileno()).st_nlink:
            return stream
        stream.close()


@functools.cache
def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders whose process is gone; once per process and folder."""
    for leftover in folder.glob(".*.part"):
        if not _TEMPORARY.fullmatch(leftover.name):
            continue
        with contextlib.suppress(OSError):  # another process was faster, or it is another user's
            is_folder = leftover.is_dir()
            descriptor = os.open(leftover, os.O_RDONLY if is_folder else os.O_RDWR)
            try:
                if try_lock(descriptor):
                    shutil.rmtree(leftover) if is_folder else leftover.unlink()
            finally:
                os.close(descriptor)
