"""Mutations of harmless, valid files, and what every reader of data promises about them.

A reader of a mutated file returns the right value, or raises a ValueError or an OSError that names
the file. It raises nothing else, ends in time, unpickles and starts nothing, and writes only where
it should. No mutated file is stored anywhere: each is a pure function of a seed, the name of the
reader and a number. The readers are in `mutated_readers` and `mutated_runs`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

MAX_SECONDS = 10  # of one read
MAX_BYTES = 1 << 28  # that the memory of the process may grow in a campaign
OUTPUT = "output"  # folder that a reader may create beside the files

# Mutations

_BYTES = (0, 1, 9, 10, 32, 34, 45, 48, 57, 91, 123, 127, 128, 255)
_INTEGERS = (0, 1, 2, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFF_FFFF, 0xFFFF_FFFF, 1 << 40, (1 << 64) - 1)
_TEXTS = (b"null", b"1e999", b"-1", b"9" * 400, b"[" * 2000, b'{"a":', b"..", b"\\ud800", b"NaN")


def _position(draw: random.Random, size: int) -> int:
    """Return a position in a file, often near one of its ends, where headers are."""
    near = min(size, 600)
    place = draw.random()
    if place < 0.3:
        return draw.randrange(near)
    return size - 1 - draw.randrange(near) if place < 0.5 else draw.randrange(size)


def _mutate_once(content: bytearray, draw: random.Random, other: bytes) -> None:
    start = _position(draw, len(content))
    stop = min(len(content), start + draw.choice((1, 2, 4, 16, 64, 512, 4096)))
    kind = draw.randrange(12)
    if kind <= 1:
        content[start] ^= 1 << draw.randrange(8)
    elif kind == 2:
        content[start] = draw.choice(_BYTES)
    elif kind == 3:
        number, order = draw.choice(_INTEGERS), draw.choice(("little", "big"))
        size = draw.choice((1, 2, 4, 8))
        content[start : start + size] = (number % (1 << 8 * size)).to_bytes(size, order)
    elif kind == 4:
        del content[start:stop]
    elif kind == 5:
        content[start:start] = content[start:stop]
    elif kind == 6:
        content[start:start] = draw.randbytes(stop - start)
    elif kind == 7:
        content[start:stop] = bytes(stop - start)
    elif kind == 8:
        del content[start:]
    elif kind == 9:
        target = _position(draw, len(content))
        piece = content[start:stop]
        del content[start:stop]
        content[target:target] = piece
    elif kind == 10:
        content[start:start] = draw.choice(_TEXTS)
    else:
        content[start:stop] = other[start:stop] if draw.random() < 0.5 else other


def mutate(content: bytes, draw: random.Random, other: bytes) -> bytes:
    """Return another content.

    Args:
        content: of a valid file.
        draw: source of the random numbers.
        other: content of another file, of which pieces may be inserted.
    """
    mutated = bytearray(content)
    while mutated == content:
        for _ in range(draw.choice((1, 1, 1, 2, 4))):
            if mutated:
                _mutate_once(mutated, draw, other)
    return bytes(mutated)


@dataclasses.dataclass(frozen=True)
class Reader:
    """A reader of data and small valid files for it.

    Attributes:
        contents: {name: content} of the valid files.
        read: reads them from their folder; it may create `OUTPUT` in it.
        check: assert that a value is right for the files as they are, {name: content}; by default
            it must be that of the valid files.
        repair: make the checksums of one of the files fit its content, so that damage gets behind
            them; applied to half of the mutated files.
        never_fails: whether every mutated file must give the value.
    """

    contents: dict[str, bytes]
    read: Callable[[Path], Any]
    check: Callable[[Any, dict[str, bytes]], None] | None = None
    repair: Callable[[dict[str, bytes]], dict[str, bytes]] | None = None
    never_fails: bool = False


#: {name: context in which the reader works}
READERS: dict[str, Callable[[], contextlib.AbstractContextManager[Reader]]] = {}


def reader(make: Callable[[], Iterator[Reader]]) -> None:
    """Enter a reader in the list."""
    READERS[make.__name__] = contextlib.contextmanager(make)


def written(write: Callable[[Path], Any]) -> dict[str, bytes]:
    """Return the files that a function writes into a folder."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        paths = [path for path in Path(folder).rglob("*") if path.is_file()]
        return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(paths)}


def plain(value: Any) -> Any:
    """Return a value that can be compared: arrays as dtype, shape and bytes."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "dtype") and not isinstance(value, type):
        return str(value.dtype), value.shape, np.asarray(value).tobytes()
    return value


# Campaigns


@dataclasses.dataclass
class Tally:
    """What became of the mutated files of a reader.

    Attributes:
        files: number of mutated files.
        read: of which a value was returned.
        slowest: time of the longest read, in seconds.
        seconds: time of all of them.
    """

    files: int = 0
    read: int = 0
    slowest: float = 0.0
    seconds: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.files} mutated files, {self.read} read, {self.files - self.read} refused, "
            f"slowest {1000 * self.slowest:.0f} ms, {self.seconds:.0f} s"
        )


def campaign(name: str, reader: Reader, *, count: int, seed: int, folder: Path) -> Tally:
    """Mutate the files of a reader and check what it does.

    Args:
        name: of the reader.
        reader: the reader.
        count: mutated files.
        seed: of the mutations.
        folder: an empty folder to work in.

    Raises:
        AssertionError: the reader broke its promise; the message has the number of the file.
    """
    where = folder / "files"
    write(where, reader.contents)
    expected = plain(reader.read(where))
    shutil.rmtree(where / OUTPUT, ignore_errors=True)
    tally, before = Tally(), _peak_bytes()
    for number in range(count):
        write(where, (contents := mutated_contents(name, reader, number, seed=seed)))
        started = time.perf_counter()
        try:
            value = _read(reader, where)
            if reader.check is None or reader.never_fails:
                assert plain(value) == expected, "another value than that of the valid files"
            else:
                reader.check(value, contents)
            tally.read += 1
        except _Refused as refusal:
            error = refusal.__cause__
            assert not reader.never_fails, f"mutated file {number} of {name}: {error!r}"
            named = str(where) in str(error)
            assert named, f"mutated file {number} of {name} is not named by {error!r}"
            assert not (where / OUTPUT).exists(), f"mutated file {number} of {name} left something"
        except BaseException as error:
            raise AssertionError(f"mutated file {number} of {name}: {error!r}") from error
        seconds = time.perf_counter() - started
        tally.slowest, tally.seconds = max(tally.slowest, seconds), tally.seconds + seconds
        tally.files += 1
        shutil.rmtree(where)
    assert list(folder.iterdir()) == [], f"{name} left {list(folder.iterdir())}"
    grown = _peak_bytes() - before
    assert grown < MAX_BYTES, f"{name} needed {grown} bytes"
    return tally


def mutated_contents(name: str, reader: Reader, number: int, *, seed: int) -> dict[str, bytes]:
    """Return the files of a reader, one of them mutated."""
    draw = random.Random(f"{seed} {name} {number}")
    target, other = (draw.choice(sorted(reader.contents)) for _ in range(2))
    mutated = mutate(reader.contents[target], draw, reader.contents[other])
    contents = {**reader.contents, target: mutated}
    if reader.repair is not None and draw.random() < 0.5:
        contents = reader.repair(contents)
    return contents


def write(folder: Path, contents: dict[str, bytes]) -> None:
    """Write {name: content} into a folder."""
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class _Refused(Exception):
    """The reader raised a ValueError or an OSError, which is the cause."""


class _Overtime(BaseException):
    """A read takes too long; not an Exception, so that no reader catches it."""


class _Forbidden(BaseException):
    """A read does what it must not do; not an Exception either."""


def _read(reader: Reader, folder: Path) -> Any:
    with _guarded(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore" if reader.never_fails else "error")
        try:
            return reader.read(folder)
        except (ValueError, OSError) as error:
            raise _Refused from error


# The folder in which the running read may write; None while none is running. An audit hook cannot
# be removed, so that there is one for all.
_allowed: list[str | None] = []
_WRITES = {
    "os.mkdir": 1,
    "os.remove": 1,
    "os.rmdir": 1,
    "os.rename": 2,
    "os.link": 2,
    "os.symlink": 2,
    "os.truncate": 1,
    "os.chmod": 1,
}
_NEVER = ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "socket.connect")


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    folder = _allowed[-1]
    if folder is None:
        return
    if event in _NEVER:
        raise _Forbidden(f"{event} {arguments}")
    paths: tuple[Any, ...] = arguments[: _WRITES.get(event, 0)]
    if event == "open" and isinstance(arguments[2], int):
        changes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
        paths = arguments[:1] if arguments[2] & changes else ()
    for path in paths:
        # `shutil.rmtree` names the entries of a folder relative to its descriptor.
        if not isinstance(path, (str, bytes, os.PathLike)) or not os.path.isabs(path):
            continue
        if not f"{os.path.realpath(os.fsdecode(path))}{os.sep}".startswith(folder + os.sep):
            raise _Forbidden(f"{event} of {path!r}")


@contextlib.contextmanager
def _guarded(folder: Path) -> Iterator[None]:
    """Stop what runs if it takes too long or writes outside a folder."""

    def stop(*_: Any) -> None:
        raise _Overtime(f"no result after {MAX_SECONDS} s")

    if not _allowed:
        _allowed.append(None)
        sys.addaudithook(_audit)
    handler = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
    _allowed.append(os.path.realpath(folder))
    try:
        yield
    finally:
        _allowed.pop()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
