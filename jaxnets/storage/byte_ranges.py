"""Ranges of bytes of files: read when asked, checked against the size of the file."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Protocol

import numpy as np

#: XLA takes a host buffer with this alignment as it is, without a copy.
_ALIGNMENT = 64
_CHUNK_BYTES = 1 << 20
_REMEDY = "get the file anew"


def damaged(path: Path, reason: str, remedy: str = _REMEDY) -> ValueError:
    """Return the error for a file that cannot be read.

    Args:
        path: the file.
        reason: what is wrong, as a clause.
        remedy: what the user can do, as a clause.
    """
    return ValueError(f"{path}: {reason}; {remedy}")


@contextlib.contextmanager
def errors_named(path: Path, what: str) -> Iterator[None]:
    """Turn whatever a reader of Python or of a package raises for a damaged file into a ValueError.

    Args:
        path: the file.
        what: what it should be, such as "a zip archive".

    Raises:
        ValueError: in place of the error of the reader, which is its cause. A ValueError or OSError
            that names the file already stays as it is.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if str(path) in str(error):
            raise
        raise damaged(path, f"it is damaged or not {what} ({error})") from error
    except Exception as error:  # readers raise almost anything
        reason = f"it is damaged or not {what} ({type(error).__name__}: {error})"
        raise damaged(path, reason) from error


class ByteRange(Protocol):
    """Some bytes of a file, from 0 to `size`."""

    @property
    def path(self) -> Path:
        """The file."""

    @property
    def size(self) -> int:
        """Number of bytes."""

    def read(self, offset: int, size: int) -> np.ndarray:
        """Return a part of the bytes.

        Args:
            offset: of the first byte, from the start of the range.
            size: number of bytes.

        Returns:
            A new array of uint8, [size].

        Raises:
            ValueError: the bytes do not lie within the range, or the file is damaged.
            OSError: the file cannot be read, or was changed since it was opened.
        """


def aligned_bytes(size: int) -> np.ndarray:
    """Return an array of bytes whose address XLA takes without a copy; its values are arbitrary.

    Args:
        size: number of bytes.

    Returns:
        uint8, [size].
    """
    buffer = np.empty(size + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + size]


@dataclasses.dataclass(frozen=True)
class FileRange:
    """A range of bytes of a file that stays as it was when it was opened.

    Attributes:
        path: the file.
        start: of the range.
        size: of the range.
        state: size, time of change and number of the file.
    """

    path: Path
    start: int
    size: int
    state: tuple[int, int, int]

    @classmethod
    def of(cls, path: Path) -> FileRange:
        """Return the range of a whole file.

        Args:
            path: the file.

        Raises:
            ValueError: not a regular file.
            OSError: it cannot be read.
        """
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise damaged(path, "it is no regular file", "give a file or a folder of files")
        return cls(path, 0, status.st_size, (status.st_size, status.st_mtime_ns, status.st_ino))

    def part(self, start: int, size: int) -> FileRange:
        """Return a range within this one.

        Args:
            start: its first byte, from the start of this range.
            size: number of bytes.

        Raises:
            ValueError: it does not lie within this one.
        """
        if not 0 <= start <= start + size <= self.size:
            end = start + size
            raise damaged(self.path, f"bytes {start} to {end} lie outside its {self.size} bytes")
        return dataclasses.replace(self, start=self.start + start, size=size)

    def open(self) -> IO[bytes]:
        """Open the file at the start of the range.

        Returns:
            An unbuffered stream, which the caller closes.

        Raises:
            OSError: it cannot be read, or was changed since it was first opened.
        """
        stream = open(self.path, "rb", buffering=0)  # noqa: SIM115 (the caller closes it)
        status = os.fstat(stream.fileno())
        if (status.st_size, status.st_mtime_ns, status.st_ino) != self.state:
            stream.close()
            raise OSError(f"{self.path} was changed while it was read; read it anew")
        stream.seek(self.start)
        return stream

    def read(self, offset: int, size: int) -> np.ndarray:
        """Return `size` bytes from `offset` as a new array of uint8.

        Raises:
            ValueError: they do not lie within the range.
            OSError: the file cannot be read, ends early, or was changed since it was first opened.
        """
        part = self.part(offset, size)
        data = aligned_bytes(size)
        view, position = data.data, 0
        with part.open() as stream:
            while position < size:
                count = stream.readinto(view[position:])  # type: ignore[attr-defined]
                if not count:
                    raise OSError(f"{self.path} ends early; read it anew")
                position += count
        return data

    def chunks(self) -> Iterator[bytes]:
        """Iterate over the bytes, at most 1 MiB at a time.

        Raises:
            OSError: as `read` does.
        """
        for offset in range(0, self.size, _CHUNK_BYTES):
            yield self.read(offset, min(_CHUNK_BYTES, self.size - offset)).tobytes()


class Cursor:
    """Reads values one after another and never past the end of a range.

    Args:
        data: the bytes, or a range of a file, which is read in pieces of 1 MiB or more.
        path: the file, for errors.

    Attributes:
        size: number of bytes in all.
        position: bytes read so far.
    """

    def __init__(self, data: FileRange | bytes, path: Path) -> None:
        self._path, self._data = path, data
        self.size = len(data) if isinstance(data, bytes) else data.size
        self.position = 0
        self._buffer, self._start = (data, 0) if isinstance(data, bytes) else (b"", 0)

    def take(self, size: int) -> bytes:
        """Return the next bytes.

        Args:
            size: number of bytes.

        Raises:
            ValueError: there are fewer.
        """
        if not 0 <= size <= self.size - self.position:
            left = self.size - self.position
            raise damaged(self._path, f"{size} bytes are wanted where {left} are left")
        begin = self.position - self._start
        if not 0 <= begin <= begin + size <= len(self._buffer):
            assert isinstance(self._data, FileRange)
            wanted = min(max(size, _CHUNK_BYTES), self.size - self.position)
            self._buffer = self._data.read(self.position, wanted).tobytes()
            self._start, begin = self.position, 0
        self.position += size
        return self._buffer[begin : begin + size]

    def unpack(self, layout: str) -> int:
        """Return the next integer.

        Args:
            layout: type and byte order, as in the module `struct`, such as "<Q".

        Raises:
            ValueError: too few bytes are left.
        """
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def text(self, size: int) -> str:
        """Return the next bytes as text.

        Args:
            size: number of bytes.

        Raises:
            ValueError: there are fewer, or they are not UTF-8.
        """
        try:
            return self.take(size).decode()
        except UnicodeDecodeError as error:
            raise damaged(self._path, "a name is not UTF-8") from error

    def line(self, most: int) -> bytes:
        """Return the bytes up to the next newline, without it.

        Args:
            most: bound on the number of bytes, the newline included.

        Raises:
            ValueError: there is no newline among them.
        """
        start = self.position
        line = self.take(min(most, self.size - start))
        end = line.find(b"\n")
        if end < 0:
            raise damaged(self._path, "a line has no end")
        self.position = start + end + 1
        return line[:end]
