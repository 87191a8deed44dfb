"""Tar and zip archives: every member is checked before it is read, and sizes have bounds."""

from __future__ import annotations

import bz2
import contextlib
import dataclasses
import errno
import functools
import gzip
import io
import lzma
import os
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any

from jaxnets.storage import atomic_folder

_COMPRESSED = ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ", lzma.open))
_USTAR = slice(257, 262)  # place of b"ustar" in the first header of a tar archive
_BLOCK_BYTES = 512  # unit of a tar archive
_CHUNK_BYTES = 1 << 16
_MAX_HEADER_BYTES = 1 << 20
_MAX_NAME_BYTES = 4096  # PATH_MAX of Linux
_FILE_BYTES = 4096  # that an empty file takes on a disk
_ENCRYPTED, _PATCHED, _STRONGLY_ENCRYPTED = 0x1, 0x20, 0x40  # flags of a zip member
_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


@dataclasses.dataclass(frozen=True)
class Member:
    """A member of an archive.

    Attributes:
        name: as in the archive; it may point anywhere.
        size: bytes of its content.
        refusal: what it is instead of a plain file or folder, as a clause for errors; else "".
        is_folder: whether it is a folder.
        chunks: iterate over its content; only while the archive is open.
    """

    name: str
    size: int
    refusal: str
    is_folder: bool
    chunks: Callable[[], Iterator[bytes]]

    def read(self) -> bytes:
        """Return the whole content."""
        return b"".join(self.chunks())


@contextlib.contextmanager
def open_archive(
    file: IO[bytes], name: str | os.PathLike[str], *, max_bytes: int
) -> Iterator[Iterator[Member]]:
    """Open a tar or zip archive.

    Args:
        file: the archive, seekable: zip, or tar as it is or compressed with gzip, bzip2 or xz.
        name: of the archive, for errors.
        max_bytes: bound on the unpacked size, each member counted with 4 KiB more.

    Yields:
        The members in their order; read a member before the next one is taken, or list all of them
        and decompress twice. Only a complete iteration proves that the archive is complete.

    Raises:
        ValueError: not an archive, damaged, cut short or larger than `max_bytes`; also from the
            iteration and from `Member.chunks`.
        OSError: the file cannot be read.
    """
    name = os.fspath(name)
    with contextlib.ExitStack() as stack:
        with _errors_named(name):
            start = file.read(_BLOCK_BYTES)
            file.seek(0)
            # The name of the first member may start as a compressed file does, and the last member
            # may be a zip archive itself.
            is_tar = start[_USTAR] == b"ustar"
            openers = [opener for magic, opener in _COMPRESSED if start.startswith(magic)]
            opener = openers[0] if openers and not is_tar else None
            if opener is None and not is_tar and zipfile.is_zipfile(file):
                members = _zip_members(stack.enter_context(zipfile.ZipFile(file)), name)
            else:
                file.seek(0)
                opened: Any = file if opener is None else stack.enter_context(opener(file))
                stream: Any = _BoundedStream(opened, max_bytes)
                archive = stack.enter_context(tarfile.open(fileobj=stream, mode="r:"))
                members = _tar_members(archive, stream, name)
        yield _bounded(members, max_bytes, name)


def safe_extract(
    archive: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    max_bytes: int = 10 << 30,
) -> Path:
    """Extract a tar or zip archive into a new folder and never outside it.

    Every member is checked before the first is written; the folder gets its final name only once
    it is complete.

    Args:
        archive: .zip, or .tar as it is or compressed with gzip, bzip2 or xz.
        directory: the folder to create.
        max_bytes: bound on the unpacked size, each member counted with 4 KiB more; by default
            10 GiB.

    Returns:
        `directory`.

    Raises:
        ValueError: not an archive, a damaged one, one that is cut short or larger than
            `max_bytes`, or a member that has an absolute path or "..", is there twice, lies below
            a file, is encrypted or compressed in another way, or is a link or a device; data
            archives need none of these. The message names the archive.
        FileExistsError: `directory` exists.
        OSError: the archive cannot be read or the folder cannot be written.
    """
    archive, directory = Path(archive), Path(directory)
    if directory.exists():
        raise FileExistsError(f"{directory} exists already; remove it to extract {archive} again")
    with (
        open(archive, "rb") as file,
        open_archive(file, archive, max_bytes=max_bytes) as iterator,
    ):
        members = list(iterator)
        _check_members(members, archive)
        try:
            with atomic_folder(directory) as temporary:
                _write_members(members, temporary)
        except OSError as error:
            raise OSError(
                f"cannot extract {archive} to {directory} ({error}); check the disk"
            ) from error
    return directory


def _check_members(members: list[Member], archive: Path) -> None:
    """Raise ValueError for a member that cannot be a file or folder of its own."""
    is_folder: dict[PurePosixPath, bool] = {}
    for member in members:
        path = PurePosixPath(member.name)
        reason = member.refusal or _refuse_name(member.name, path, member.is_folder)
        if not reason and path in is_folder and not (member.is_folder and is_folder[path]):
            reason = "there twice"
        if not reason:
            is_folder[path] = member.is_folder
            for parent in path.parents:
                if is_folder.get(parent) is False:
                    reason = f"below {str(parent)!r}, which is a file"
                if parent in is_folder:
                    break
                is_folder[parent] = True
        if reason:
            raise ValueError(
                f"{archive} is not safe to extract: member {member.name[:200]!r} is {reason}; "
                "get the archive from its publisher"
            )
    if not any(not member.is_folder for member in members):
        raise ValueError(f"{archive} holds no file; get the archive from its publisher")


def _refuse_name(name: str, path: PurePosixPath, is_folder: bool) -> str:
    try:
        encoded = os.fsencode(name)
    except UnicodeEncodeError:
        return "a name that no file can have"
    if b"\0" in encoded or len(encoded) > _MAX_NAME_BYTES or (not path.parts and not is_folder):
        return "a name that no file can have"
    windows = PureWindowsPath(name)
    outside = ".." in path.parts or ".." in windows.parts or windows.drive
    return "a path outside the folder" if outside or name.startswith(("/", "\\")) else ""


def _write_members(members: list[Member], folder: Path) -> None:
    for member in members:
        target = folder / member.name
        if member.is_folder:
            target.mkdir(parents=True, exist_ok=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "xb") as stream:
            for chunk in member.chunks():
                stream.write(chunk)


class _TooLargeError(Exception):
    """The unpacked size is above its bound, which is the argument."""


@contextlib.contextmanager
def _errors_named(name: str) -> Iterator[None]:
    """Turn whatever a reader of archives raises for a damaged one into a ValueError."""
    try:
        yield
    except _TooLargeError as error:
        raise ValueError(
            f"{name} unpacks to more than {error} bytes; if that is right, give a larger max_bytes"
        ) from None
    except Exception as error:  # the readers of Python raise almost anything
        # A damaged position is an invalid argument of `seek`.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise OSError(f"cannot read {name} ({error}); check the disk") from error
        raise ValueError(
            f"{name} is damaged or not a tar or zip archive ({type(error).__name__}: {error}); "
            "remove it and get it anew"
        ) from error


def _bounded(members: Iterator[Member], max_bytes: int, name: str) -> Iterator[Member]:
    """Iterate over members as long as their sizes have at most `max_bytes` in total."""
    total = 0
    while True:
        with _errors_named(name):
            member = next(members, None)
            total += 0 if member is None else _FILE_BYTES + member.size
            if total > max_bytes:
                raise _TooLargeError(max_bytes)
        if member is None:
            return
        yield member


def _content(
    opener: Callable[[], IO[bytes] | None], size: int, name: str
) -> Callable[[], Iterator[bytes]]:
    """Return a function that iterates over the `size` bytes of a member."""

    def chunks() -> Iterator[bytes]:
        left = size
        with _errors_named(name), opener() or io.BytesIO() as stream:  # None for a folder
            while chunk := stream.read(_CHUNK_BYTES):
                left -= len(chunk)
                yield chunk
            if left:
                raise EOFError(f"a member has {size - left} bytes instead of {size}")

    return chunks


def _zip_members(archive: zipfile.ZipFile, name: str) -> Iterator[Member]:
    for info in archive.infolist():
        kind = stat.S_IFMT(info.external_attr >> 16)  # 0 if the archiver did not set it
        refusal = ""
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            refusal = "a link or device"
        elif info.flag_bits & (_ENCRYPTED | _STRONGLY_ENCRYPTED):
            refusal = "encrypted"
        elif info.compress_type not in _ZIP_METHODS or info.flag_bits & _PATCHED:
            refusal = f"compressed by method {info.compress_type}, which is not read"
        elif info.is_dir() and info.file_size:
            refusal = "a folder with content"
        chunks = _content(functools.partial(archive.open, info), info.file_size, name)
        yield Member(info.filename, info.file_size, refusal, info.is_dir(), chunks)


def _tar_members(archive: tarfile.TarFile, stream: _BoundedStream, name: str) -> Iterator[Member]:
    end = 0
    while (info := archive.next()) is not None:
        if info.size < 0 or info.offset < end:  # `next` would go back
            raise tarfile.ReadError(f"member {info.name!r} has {info.size} bytes")
        end = info.offset_data
        plain = (info.isreg() and not info.issparse()) or info.isdir()
        refusal = "" if plain else "a link, a device or a sparse file"
        size = 0 if info.isdir() else info.size
        chunks = _content(functools.partial(archive.extractfile, info), size, name)
        yield Member(info.name, size, refusal, info.isdir(), chunks)
    # `tarfile` takes a damaged header, and the end of the file, for the end of the archive.
    if stream.last_read != bytes(_BLOCK_BYTES):
        raise EOFError("it has no end mark: it is cut short, or a header is damaged")
    while stream.read(_CHUNK_BYTES):  # a compressed stream has its checksum at its end
        pass


class _BoundedStream:
    """A seekable stream of at most `max_bytes`, for `tarfile`, which trusts every size it reads.

    Attributes:
        last_read: result of the last read.
    """

    def __init__(self, stream: IO[bytes], max_bytes: int) -> None:
        self._stream, self._max_bytes = stream, max_bytes
        self.last_read = b""

    def _check(self, position: int) -> None:
        if position > self._max_bytes:
            raise _TooLargeError(self._max_bytes)

    def read(self, size: int) -> bytes:
        """Read `size` bytes, fewer at the end."""
        if not 0 <= size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header has {size} bytes")
        self.last_read = self._stream.read(size)
        self._check(self._stream.tell())
        return self.last_read

    def seek(self, position: int) -> int:
        """Move to a position from the start."""
        self._check(position)
        return self._stream.seek(position)

    def tell(self) -> int:
        """Return the position."""
        return self._stream.tell()
