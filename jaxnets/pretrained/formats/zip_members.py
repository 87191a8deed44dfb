"""Members of zip archives as ranges of bytes: stored ones are read in place."""

from __future__ import annotations

import dataclasses
import stat
import struct
import threading
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jaxnets.storage.byte_ranges import FileRange, aligned_bytes, damaged, errors_named

_LOCAL_HEADER = struct.Struct("<4s22xHH")
_ENCRYPTED, _PATCHED, _STRONGLY_ENCRYPTED = 0x1, 0x20, 0x40
# The best that the method can do, so that a declared size is in proportion to the file.
_MOST_DEFLATION = 1032


@dataclasses.dataclass
class ZipMember:
    """The content of a member, whose checksum is verified before the first value is returned.

    Attributes:
        path: the archive.
        name: of the member.
        size: of its content.
        stored: its bytes in the file.
        deflated: whether these are compressed.
        checksum: CRC-32 of the content; None if it is not to be verified.
    """

    path: Path
    name: str
    size: int
    stored: FileRange
    deflated: bool
    checksum: int | None
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock, repr=False)

    def read(self, offset: int, size: int) -> np.ndarray:
        """Return `size` bytes from `offset` as a new array of uint8.

        Raises:
            ValueError: the content does not have its checksum, or fewer bytes.
            OSError: the file cannot be read, or was changed since it was opened.
        """
        if not 0 <= offset <= offset + size <= self.size:
            raise damaged(self.path, f"member {self.name!r} has {self.size} bytes")
        with self._lock:
            self._verify()
        if not self.deflated:
            return self.stored.read(offset, size)
        data, position = aligned_bytes(size), 0
        with errors_named(self.path, "a zip archive"):
            for chunk in self._inflated():
                low, high = max(offset, position), min(offset + size, position + len(chunk))
                if low < high:
                    part = chunk[low - position : high - position]
                    data[low - offset : high - offset] = np.frombuffer(part, np.uint8)
                position += len(chunk)
                if position >= offset + size:
                    break
        return data

    def _verify(self) -> None:
        if self.checksum is None:
            return
        checksum, size = 0, 0
        with errors_named(self.path, "a zip archive"):
            for chunk in self._inflated() if self.deflated else self.stored.chunks():
                checksum = zlib.crc32(chunk, checksum)
                size += len(chunk)
        if (checksum, size) != (self.checksum, self.size):
            raise damaged(self.path, f"member {self.name!r} is damaged: its checksum differs")
        self.checksum = None

    def _inflated(self) -> Iterator[bytes]:
        """Iterate over the decompressed content, never more than its size."""
        inflate, left = zlib.decompressobj(-zlib.MAX_WBITS), self.size
        for packed in self.stored.chunks():
            while packed and left > 0:
                chunk = inflate.decompress(packed, min(left, 1 << 20))
                packed = inflate.unconsumed_tail
                left -= len(chunk)
                yield chunk
                if not chunk:
                    break
        while left > 0 and (chunk := inflate.flush(min(left, 1 << 20))[:left]):
            left -= len(chunk)
            yield chunk
        if left:
            raise damaged(self.path, f"member {self.name!r} ends early")


def zip_members(file: FileRange) -> dict[str, ZipMember]:
    """Return the files in a zip archive by name.

    Args:
        file: the archive.

    Returns:
        {name: its bytes, decompressed when they are read}.

    Raises:
        ValueError: not a zip archive, damaged, a name that occurs twice, or a member that is
            encrypted, a link, or compressed otherwise than by "deflate".
        OSError: it cannot be read.
    """
    path, members = file.path, {}
    with errors_named(path, "a zip archive"), zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
    for info in infos:
        if info.filename.endswith("/"):
            continue
        kind = stat.S_IFMT(info.external_attr >> 16)
        flags = info.flag_bits & (_ENCRYPTED | _STRONGLY_ENCRYPTED | _PATCHED)
        known = info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        if kind not in (0, stat.S_IFREG) or flags or not known or info.filename in members:
            raise damaged(
                path,
                f"member {info.filename[:200]!r} is a link, encrypted, compressed by method "
                f"{info.compress_type}, or there twice",
                "zip it again by the method 'stored' or 'deflated'",
            )
        deflated = info.compress_type == zipfile.ZIP_DEFLATED
        most = info.compress_size * _MOST_DEFLATION + 64 if deflated else info.compress_size
        if info.file_size > most or (not deflated and info.file_size != info.compress_size):
            raise damaged(path, f"member {info.filename[:200]!r} has a size that cannot be")
        magic, name_size, extra_size = _LOCAL_HEADER.unpack(
            file.read(info.header_offset, _LOCAL_HEADER.size).tobytes()
        )
        if magic != b"PK\x03\x04":
            raise damaged(path, f"member {info.filename[:200]!r} has no header")
        start = info.header_offset + _LOCAL_HEADER.size + name_size + extra_size
        stored = file.part(start, info.compress_size)
        members[info.filename] = ZipMember(
            path, info.filename, info.file_size, stored, deflated, info.CRC or None
        )
    return members
