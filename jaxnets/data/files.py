"""Files: one search order, pinned digests, atomic downloads, safe extraction.

These places are searched in order; in each, first the subfolder named after the dataset and then
the place itself:

1. the `directory` argument of the loader,
2. the folder in the environment variable `JAXNETS_DATA`,
3. the user's cache: `$XDG_CACHE_HOME/jaxnets`, by default `~/.cache/jaxnets`,
4. system folders: `/usr/share/datasets` (Debian's dataset packages),
5. a download into the user's cache, unless the loader is told `download=False`.

The first match is used. Its content must have the pinned digest, wherever it comes from: a wrong
file is an error and is never skipped silently.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import http.client
import os
import shutil
import stat
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any

SYSTEM_FOLDERS = (Path("/usr/share/datasets"),)

_TIMEOUT_SECONDS = 30.0  # longest wait for the next byte of the server
_GZIP_MAGIC = b"\x1f\x8b"


@dataclasses.dataclass(frozen=True)
class DataFile:
    """A file of a dataset, identified by its digest.

    Attributes:
        name: as published, for example "train-images-idx3-ubyte.gz". A gzipped single file may
            also be present decompressed, without ".gz".
        sha256: hexadecimal; of the decompressed content if `name` ends in ".gz" (but not
            ".tar.gz"), so a recompressed copy passes.
        folders: subfolders to search; a download goes into the first.
        url: where to download it; None if it cannot be downloaded.
        hint: another way to get it, as a clause for error messages.
    """

    name: str
    sha256: str
    folders: tuple[str, ...]
    url: str | None = None
    hint: str | None = None

    @property
    def gzipped(self) -> bool:
        """Whether the digest is of the decompressed content."""
        return self.name.endswith(".gz") and not self.name.endswith(".tar.gz")

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
    return download_file(file.url, file)


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
    content = path.read_bytes()
    state = "is not the published file"
    if file.gzipped and content.startswith(_GZIP_MAGIC):
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            state = f"is truncated or damaged ({error})"
    found = hashlib.sha256(content).hexdigest()
    if found != file.sha256:
        raise ValueError(
            f"{origin or path} {state}: found sha256 {found} ({len(content)} bytes), expected "
            f"{file.sha256}; replace it: {file.remedy}"
        )
    return content


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that gets its final name only once it is complete.

    Args:
        path: final name; missing folders are created. If the block raises, the temporary file is
            removed.

    Yields:
        A temporary file in the same folder, open for writing bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    try:
        with open(temporary, "wb") as stream:
            yield stream
        os.chmod(temporary, 0o644)  # mkstemp makes it private to the user
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def download_file(url: str, file: DataFile) -> Path:
    """Download a file into the user's cache; it gets its final name once it is checked.

    Args:
        url: the address.
        file: its expected name and digest.

    Returns:
        `file.download_path`.

    Raises:
        OSError: no connection, a server error, a full or read-only disk.
        ValueError: the content does not have the pinned digest.
    """
    path = file.download_path
    request = urllib.request.Request(url, headers={"User-Agent": "jaxnets"})
    try:
        with atomic_file(path) as stream:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:
                shutil.copyfileobj(response, stream)
            stream.flush()
            read_verified(Path(stream.name), file, origin=url)
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # releases the connection
        raise OSError(
            f"cannot download {url} to {path} ({error}); check the connection and the disk, or "
            f"by hand {file.remedy} (sha256 {file.sha256})"
        ) from error
    return path


def safe_extract(archive: str | os.PathLike[str], directory: str | os.PathLike[str]) -> Path:
    """Extract a tar or zip archive into a new folder and never outside it.

    Every member is checked before the first is written; the folder gets its final name only once
    it is complete.

    Args:
        archive: .zip, or .tar with any compression Python reads.
        directory: the folder to create.

    Returns:
        `directory`.

    Raises:
        ValueError: not an archive, a damaged one, or a member that has an absolute path or "..",
            or is a link or a device; data archives need none of these.
        FileExistsError: `directory` exists.
    """
    archive, directory = Path(archive), Path(directory)
    if directory.exists():
        raise FileExistsError(f"{directory} exists already; remove it to extract {archive} again")
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    try:
        with _open_archive(archive) as members:
            for name, refusal, _ in members:
                parts = {*PurePosixPath(name).parts, *PureWindowsPath(name).parts}
                if name.startswith(("/", "\\")) or PureWindowsPath(name).drive or ".." in parts:
                    refusal = "a path outside the folder"
                if refusal:
                    raise ValueError(
                        f"{archive} is not safe to extract: member {name!r} is {refusal}; "
                        "get the archive from its publisher"
                    )
            for name, _, open_member in members:
                target = temporary / name
                if open_member is None:
                    target.mkdir(parents=True, exist_ok=True)
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                with open_member() as source, open(target, "xb") as stream:
                    shutil.copyfileobj(source, stream)
        os.chmod(temporary, 0o755)  # mkdtemp makes it private to the user
        os.rename(temporary, directory)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{archive} is damaged or not a tar or zip archive ({error}); remove it and get it anew"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory


#: Name, reason to refuse it ("" for none), function that opens it (None for a folder).
_Member = tuple[str, str, Callable[[], Any] | None]


@contextlib.contextmanager
def _open_archive(archive: Path) -> Iterator[list[_Member]]:
    members: list[_Member] = []
    opener: Callable[[], Any] | None
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            for info in zipped.infolist():
                kind = stat.S_IFMT(info.external_attr >> 16)  # 0 if the archiver did not set it
                allowed = kind in (0, stat.S_IFREG, stat.S_IFDIR)
                opener = None if info.is_dir() else lambda info=info: zipped.open(info)
                members.append((info.filename, "" if allowed else "a link or device", opener))
            yield members
        return
    with tarfile.open(archive) as tar:
        for member in tar:
            allowed = member.isreg() or member.isdir()
            opener = None if member.isdir() else lambda member=member: tar.extractfile(member)
            members.append((member.name, "" if allowed else "a link or device", opener))
        yield members
