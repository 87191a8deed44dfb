"""Files: one search order, pinned digests and sizes, atomic downloads, verified caches.

These places are searched in order; in each, first the subfolder named after the dataset and then
the place itself:

1. the `directory` argument of the loader,
2. the folder in the environment variable `JAXNETS_DATA`,
3. the user's cache: `$XDG_CACHE_HOME/jaxnets`, by default `~/.cache/jaxnets`,
4. system folders: `/usr/share/datasets` (Debian's dataset packages),
5. a download into the user's cache, unless the loader is told `download=False`.

The first match is used. Its content must have the pinned digest, wherever it comes from: a wrong
file is an error and is never skipped silently. Reading, decompressing and downloading stop at the
size that is pinned with the digest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import http.client
import os
import urllib.error
import urllib.request
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from jaxnets.storage import atomic_file

SYSTEM_FOLDERS = (Path("/usr/share/datasets"),)

_TIMEOUT_SECONDS = 30.0  # longest wait for the next byte of the server
_GZIP_MAGIC = b"\x1f\x8b"
_CHUNK_BYTES = 1 << 16


@dataclasses.dataclass(frozen=True)
class DataFile:
    """A file of a dataset, identified by its digest.

    Attributes:
        name: as published, for example "train-images-idx3-ubyte.gz". A gzipped single file may
            also be present decompressed, without ".gz".
        sha256: hexadecimal; of the decompressed content if `name` ends in ".gz" (but not
            ".tar.gz"), so a recompressed copy passes.
        max_bytes: size of the content that the digest is of; nothing is read, decompressed or
            downloaded beyond it.
        folders: subfolders to search; a download goes into the first.
        url: where to download it, by https; None if it cannot be downloaded.
        hint: another way to get it, as a clause for error messages.
    """

    name: str
    sha256: str
    max_bytes: int
    folders: tuple[str, ...]
    url: str | None = None
    hint: str | None = None

    @property
    def gzipped(self) -> bool:
        """Whether the digest is of the decompressed content."""
        return self.name.endswith(".gz") and not self.name.endswith(".tar.gz")

    @property
    def max_download_bytes(self) -> int:
        """Size of the largest download; gzip makes an incompressible file a little larger."""
        return self.max_bytes + (self.max_bytes // 1000 + 4096 if self.gzipped else 0)

    @property
    def download_path(self) -> Path:
        """Where a download is stored."""
        return cache_folder() / self.folders[0] / self.name

    @property
    def remedy(self) -> str:
        """How to get the file, as a clause for error messages."""
        ways = [f"download {self.url} to {self.download_path}"] if self.url else []
        return " or ".join([*ways, *([self.hint] if self.hint else [])])


def cache_folder() -> Path:
    """Return this library's folder in the user's cache; it need not exist."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore relative paths.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "jaxnets"


def search_folders(
    folders: tuple[str, ...], directory: str | os.PathLike[str] | None = None
) -> list[Path]:
    """List the folders of the search order, see the module docstring.

    Args:
        folders: names of the dataset's subfolder.
        directory: the explicit argument of a loader, if any.

    Returns:
        Paths, highest priority first; they need not exist.

    Raises:
        NotADirectoryError: `directory` is given and is not a folder.
    """
    roots = []
    if directory is not None:
        if not Path(directory).is_dir():
            raise NotADirectoryError(
                f"data directory {os.fspath(directory)!r} is not a folder; create it or leave "
                "the argument out"
            )
        roots.append(Path(directory))
    if os.environ.get("JAXNETS_DATA"):
        roots.append(Path(os.environ["JAXNETS_DATA"]).expanduser())
    roots += [cache_folder(), *SYSTEM_FOLDERS]
    return [root / folder for root in roots for folder in (*folders, "")]


def find(
    files: Sequence[DataFile], directory: str | os.PathLike[str] | None = None
) -> tuple[DataFile, Path] | None:
    """Return the preferred one of alternative files in the first folder that has any.

    Args:
        files: alternatives for one dataset, the preferred one first.
        directory: the explicit argument of a loader, if any.

    Returns:
        The file and its path, or None; the content is not checked.
    """
    for folder in search_folders(files[0].folders, directory):
        for file in files:
            names = [file.name, file.name.removesuffix(".gz")] if file.gzipped else [file.name]
            for path in (folder / name for name in names):
                if path.is_file():
                    return file, path
    return None


def fetch(
    file: DataFile, directory: str | os.PathLike[str] | None = None, *, download: bool = True
) -> Path:
    """Find a file, or download it into the user's cache.

    Args:
        file: the file to find.
        directory: the explicit argument of a loader, if any.
        download: whether the network may be used.

    Returns:
        Its path. Only a fresh download is checked; read every file with `read_verified`.

    Raises:
        FileNotFoundError: not found and not downloaded; names the places and the remedy.
        OSError: the download failed.
        ValueError: the download does not have the pinned digest.
    """
    found = find([file], directory)
    if found is not None:
        return found[1]
    if not download or file.url is None:
        places = ", ".join(str(folder) for folder in search_folders(file.folders, directory))
        raise FileNotFoundError(
            f"{file.name} (sha256 {file.sha256}) is in none of {places}; {file.remedy}"
        )
    return download_file(file, lambda path: read_verified(path, file, origin=file.url))


def read_verified(path: Path, file: DataFile, *, origin: str | None = None) -> bytes:
    """Read a whole file and check its digest.

    Args:
        path: the file, gzipped or not.
        file: its expected name and digest.
        origin: its name in errors; by default its path.

    Returns:
        The content, decompressed if `file.gzipped`.

    Raises:
        ValueError: truncated or wrong content; names the file, both digests and the remedy.
    """
    state, content = "is not the published file", b""
    with path.open("rb") as stream:
        packed = file.gzipped and stream.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
        stream.seek(0)
        try:
            with contextlib.ExitStack() as stack:
                reader: Any = stack.enter_context(gzip.open(stream)) if packed else stream
                content = reader.read(file.max_bytes + 1)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            state = f"is truncated or damaged ({error})"
    digest = hashlib.sha256(content).hexdigest()
    if digest == file.sha256:
        return content
    found = f"sha256 {digest} ({len(content)} bytes)"
    if len(content) > file.max_bytes:
        found = f"more than its {file.max_bytes} bytes"
    raise ValueError(
        f"{origin or path} {state}: found {found}, expected {file.sha256}; replace it: "
        f"{file.remedy}"
    )


class _HttpsOnly(urllib.request.HTTPRedirectHandler):
    """Refuses to be redirected from https to an address without encryption."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """Return the request that follows a redirection."""
        if req.type == "https" and not newurl.startswith("https:"):
            reason = f"refused a redirection to {newurl}, which is not encrypted"
            raise urllib.error.HTTPError(req.full_url, code, reason, headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download_file(file: DataFile, verify: Callable[[Path], Any]) -> Path:
    """Download a file into the user's cache; it gets its final name once it is verified.

    Args:
        file: what to download; its `url` is not None.
        verify: reads the file and raises ValueError if it is not the published one.

    Returns:
        `file.download_path`.

    Raises:
        OSError: no connection, a server error, a full or read-only disk.
        ValueError: more bytes than `file.max_download_bytes`, or refused by `verify`.
    """
    assert file.url is not None
    path = file.download_path
    request = urllib.request.Request(file.url, headers={"User-Agent": "jaxnets"})
    try:
        with atomic_file(path) as stream:
            opener = urllib.request.build_opener(_HttpsOnly)
            with opener.open(request, timeout=_TIMEOUT_SECONDS) as response:
                left = file.max_download_bytes
                while chunk := response.read(_CHUNK_BYTES):
                    left -= len(chunk)
                    if left < 0:
                        raise ValueError(
                            f"{file.url} is not the published file: it sends more than "
                            f"{file.max_download_bytes} bytes; by hand {file.remedy} (sha256 "
                            f"{file.sha256})"
                        )
                    stream.write(chunk)
            stream.flush()
            verify(Path(stream.name))
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # releases the connection
        raise OSError(
            f"cannot download {file.url} to {path} ({error}); check the connection and the disk, "
            f"or by hand {file.remedy} (sha256 {file.sha256})"
        ) from error
    return path


def cached_array(path: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """Read an array from a cache, or make it and store it there.

    Beside the array stands a file with its sha256, in the format of `sha256sum`. A cache without
    it, or with another content, is made anew; one that cannot be written costs a warning only.

    Args:
        path: of the .npy file; its name determines the content.
        make: computes the array.

    Returns:
        The array.
    """
    digest_path = path.with_name(f"{path.name}.sha256")
    try:
        expected = digest_path.read_bytes()
        with path.open("rb") as file:
            if _digest_line(file, path.name) == expected:
                file.seek(0)
                return np.load(file, allow_pickle=False)
        warnings.warn(f"{path} is damaged and is made anew", stacklevel=2)
    except (FileNotFoundError, NotADirectoryError):
        pass  # none yet, or one without a digest
    except (OSError, ValueError) as error:
        warnings.warn(f"{path} cannot be read ({error}) and is made anew", stacklevel=2)
    array = make()
    try:
        with atomic_file(path) as stream:
            np.save(stream, array, allow_pickle=False)
            stream.flush()
            with open(stream.name, "rb") as file:
                line = _digest_line(file, path.name)
        with atomic_file(digest_path) as stream:
            stream.write(line)
    except OSError as error:
        warnings.warn(f"{path} is not cached ({error})", stacklevel=2)
    return array


def _digest_line(file: IO[bytes], name: str) -> bytes:
    return f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n".encode()  # type: ignore[arg-type]
