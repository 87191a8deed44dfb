"""Files: search order, digests, downloads from a local server, caches."""

import dataclasses
import errno
import gzip
import hashlib
import http.server
import io
import os
import stat
import threading
import tracemalloc
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from jaxnets.data import files, locate
from jaxnets.data.datasets import cifar, images, speech, text
from jaxnets.data.files import (
    DataFile,
    cache_folder,
    cached_array,
    fetch,
    find,
    read_verified,
    search_folders,
)

CONTENT = b"the published content" * 50
SHA256 = hashlib.sha256(CONTENT).hexdigest()
FILE = DataFile("letters.gz", SHA256, len(CONTENT), folders=("words", "old-words"))


@pytest.fixture(autouse=True)
def own_places(monkeypatch, tmp_path):
    """Use an empty cache and system folder, no environment variable, no proxy."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("JAXNETS_DATA", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("jaxnets.data.files.SYSTEM_FOLDERS", (tmp_path / "system",))


def write(path, content=CONTENT):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.fixture
def server():
    """Run a local web server; return its {path: answer} and its address."""
    answers = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, body, length = answers.get(self.path, (404, b"", 0))
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))  # poll interval
        thread.start()
        yield answers, f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def served(server, content, *, status=200, length=None):
    answers, address = server
    answers["/letters.gz"] = (status, content, len(content) if length is None else length)
    return dataclasses.replace(FILE, url=f"{address}/letters.gz")


def files_below(folder):
    return [path for path in Path(folder).rglob("*") if path.is_file()]


# Search order


def test_places_are_searched_in_the_documented_order(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXNETS_DATA", str(tmp_path / "environment"))
    (tmp_path / "argument").mkdir()
    roots = [tmp_path / name for name in ("argument", "environment", "cache/jaxnets", "system")]
    places = [root / folder for root in roots for folder in ("words", "old-words", "")]
    assert search_folders(FILE.folders, tmp_path / "argument") == places
    for place in reversed(places):
        write(place / "letters")
        assert find([FILE], tmp_path / "argument") == (FILE, place / "letters")
        write(place / "letters.gz")
        assert find([FILE], tmp_path / "argument") == (FILE, place / "letters.gz")


def test_an_earlier_place_wins_over_a_preferred_file(tmp_path):
    other = dataclasses.replace(FILE, name="letters.zip")
    path = write(tmp_path / "cache/jaxnets/words/letters.zip")
    write(tmp_path / "system/words/letters.gz")
    assert find([FILE, other]) == (other, path)


def test_a_directory_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(NotADirectoryError, match="nowhere' is not a folder"):
        find([FILE], tmp_path / "nowhere")


@pytest.mark.parametrize("value", ["", "relative/path"])
def test_an_unusable_cache_variable_means_the_home_folder(monkeypatch, tmp_path, value):
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "jaxnets"


def test_a_missing_file_is_named_with_its_digest_and_the_remedy(tmp_path):
    file = dataclasses.replace(FILE, url="http://example.org/letters.gz", hint="ask a friend")
    with pytest.raises(FileNotFoundError) as caught:
        fetch(file, download=False)
    for part in (file.name, SHA256, str(tmp_path / "system"), file.url, "or ask a friend"):
        assert part in str(caught.value)


def test_each_dataset_is_located_by_the_name_of_its_loader(tmp_path):
    assert set(locate().values()) == {None}
    write(tmp_path / "system/fashion-mnist/train-images-idx3-ubyte.gz")
    write(tmp_path / "cache/jaxnets/cifar10/cifar-10-binary.tar.gz")
    write(tmp_path / "mnist/train-images-idx3-ubyte")
    write(tmp_path / "fsdd/recordings/0_george_0.wav")
    assert {name: folder for name, folder in locate(tmp_path).items() if folder} == {
        "mnist": tmp_path / "mnist",
        "fashion_mnist": tmp_path / "system/fashion-mnist",
        "cifar10": tmp_path / "cache/jaxnets/cifar10",
        "spoken_digits": tmp_path / "fsdd/recordings",
    }


# Digests


@pytest.mark.parametrize("name", ["letters", "letters.gz"])
def test_the_digest_is_of_the_decompressed_content(tmp_path, name):
    assert read_verified(write(tmp_path / name), FILE) == CONTENT
    recompressed = tmp_path / "letters.gz"
    recompressed.write_bytes(gzip.compress(CONTENT, 1))
    assert read_verified(recompressed, FILE) == CONTENT


def test_the_digest_of_a_compressed_archive_is_of_the_file_itself(tmp_path):
    packed = gzip.compress(CONTENT)
    digest = hashlib.sha256(packed).hexdigest()
    file = DataFile("a.tar.gz", digest, len(packed), folders=("a",))
    path = tmp_path / "a.tar.gz"
    path.write_bytes(packed)
    assert read_verified(path, file) == packed


@pytest.mark.parametrize(
    ("damage", "state"),
    [
        (lambda packed: packed[:-20], "is truncated or damaged"),
        (lambda packed: packed[:30] + b"\0\xff\0\xff" + packed[34:], "is truncated or damaged"),
        (lambda packed: packed[:5], "is truncated or damaged"),
        (lambda packed: b"", "is not the published file"),
        (lambda packed: gzip.compress(CONTENT[:-1] + b"!"), "is not the published file"),
        (lambda packed: CONTENT[:-1], "is not the published file"),
    ],
)
def test_a_truncated_or_wrong_file_is_named_with_both_digests(tmp_path, damage, state):
    path = tmp_path / "letters.gz"
    path.write_bytes(damage(gzip.compress(CONTENT)))
    with pytest.raises(ValueError, match=state) as caught:
        read_verified(path, dataclasses.replace(FILE, hint="ask a friend"))
    for part in (str(path), "found sha256", f"expected {SHA256}", "ask a friend"):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", ["letters", "letters.gz"])
def test_reading_stops_at_the_pinned_size(tmp_path, name):
    content = bytes(50 << 20)
    packed = gzip.compress(content)
    path = tmp_path / name
    path.write_bytes(content if name == "letters" else packed)
    tracemalloc.start()
    with pytest.raises(ValueError, match=rf"{name} is not .* found more than its 1050 bytes"):
        read_verified(path, FILE)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_every_pinned_file_has_a_size_and_an_encrypted_address():
    pinned = [
        *images.MNIST_FILES,
        *images.FASHION_MNIST_FILES,
        *text.MULTI30K_FILES,
        *text.SST2_FILES,
        text.TINY_SHAKESPEARE_FILE,
        *cifar.BINARIES,
        *cifar.LAYOUTS,
        *speech.LAYOUTS,
    ]
    for file in pinned:
        assert 0 < file.max_bytes < 1 << 28
        assert file.url is None or file.url.startswith("https://")
        assert "http://" not in file.remedy


# Downloads


def test_a_missing_file_is_downloaded_into_the_cache_once(server):
    file = served(server, gzip.compress(CONTENT))
    path = fetch(file)
    assert path == file.download_path
    assert read_verified(path, file) == CONTENT
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    server[0].clear()
    assert fetch(file) == path


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"content": gzip.compress(b"other")}, ValueError, "is not the published file"),
        ({"content": gzip.compress(CONTENT)[:-9]}, ValueError, "is truncated or damaged"),
        ({"content": gzip.compress(CONTENT)[:-9], "length": 9999}, (ValueError, OSError), "url"),
        ({"content": b"gone", "status": 404}, OSError, "404"),
        ({"content": b"", "status": 500}, OSError, "500"),
    ],
)
def test_a_failed_download_leaves_nothing_behind(server, tmp_path, arguments, error, message):
    file = served(server, **arguments)
    with pytest.raises(error, match=file.url if message == "url" else message) as caught:
        fetch(file)
    assert file.url in str(caught.value) and SHA256 in str(caught.value)
    assert not files_below(tmp_path)


@pytest.mark.parametrize("name", ["letters", "letters.gz"])
def test_a_download_stops_at_the_pinned_size(server, tmp_path, name):
    sent = os.urandom(FILE.max_download_bytes + (1 << 20))
    file = dataclasses.replace(served(server, sent), name=name)
    with pytest.raises(ValueError, match=rf"sends more than {file.max_download_bytes} bytes"):
        fetch(file)
    assert not files_below(tmp_path)


def test_the_largest_gzip_file_of_a_content_is_downloaded(server):
    content = os.urandom(1 << 20)
    file = served(server, gzip.compress(content, 0))
    digest = hashlib.sha256(content).hexdigest()
    file = dataclasses.replace(file, sha256=digest, max_bytes=len(content))
    assert read_verified(fetch(file), file) == content


def test_a_redirection_to_an_address_without_encryption_is_refused():
    request = urllib.request.Request("https://127.0.0.1/letters.gz")
    handler = files._HttpsOnly()
    follow = (io.BytesIO(), 302, "Found", {})
    assert handler.redirect_request(request, *follow, "https://example.org/a")
    with pytest.raises(urllib.error.HTTPError, match=r"redirection to http://example\.org/a"):
        handler.redirect_request(request, *follow, "http://example.org/a")


def test_no_connection_is_reported_with_the_place_to_put_the_file():
    file = dataclasses.replace(FILE, url="http://127.0.0.1:9/letters.gz")
    with pytest.raises(OSError, match="check the connection") as caught:
        fetch(file)
    assert str(file.download_path) in str(caught.value)


def test_a_full_disk_is_reported_and_leaves_nothing_behind(server, tmp_path, monkeypatch):
    class Full(io.FileIO):
        def write(self, _):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(
        "jaxnets.storage.atomic._create", lambda path: Full(path.with_suffix(".part"), "x")
    )
    with pytest.raises(OSError, match="No space left"):
        fetch(served(server, gzip.compress(CONTENT)))
    assert not files_below(tmp_path)


def test_a_cache_that_cannot_be_written_is_reported(server, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(write(tmp_path / "a file") / "cache"))
    with pytest.raises(OSError, match="check the connection and the disk"):
        fetch(served(server, gzip.compress(CONTENT)))


# Caches


class Counted:
    """Makes an array, and counts how often."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return np.arange(6, dtype=np.int16).reshape(2, 3)


def flip_a_bit(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


def assert_remade(path, make):
    """Check that the array is made anew, once, and right."""
    before = make.calls
    with pytest.warns(UserWarning, match=rf"{path.name} .*is made anew"):
        assert cached_array(path, make).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert cached_array(path, make).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert make.calls == before + 1


def test_a_cached_array_is_made_once_and_its_digest_is_that_of_sha256sum(tmp_path):
    path, make = tmp_path / "new" / "a.npy", Counted()
    for _ in range(3):
        array = cached_array(path, make)
        assert array.dtype == np.int16 and array.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert make.calls == 1
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert (tmp_path / "new" / "a.npy.sha256").read_text() == f"{digest}  a.npy\n"
    np.testing.assert_array_equal(np.load(path), array)


@pytest.mark.parametrize("position", [0, 9, 40, -1])
def test_a_cache_with_one_flipped_bit_is_made_anew(tmp_path, position):
    path, make = tmp_path / "a.npy", Counted()
    cached_array(path, make)
    flip_a_bit(path, position)
    assert_remade(path, make)


def test_a_cache_without_its_digest_or_with_another_is_made_anew(tmp_path):
    path, make = tmp_path / "a.npy", Counted()
    cached_array(path, make)
    flip_a_bit(tmp_path / "a.npy.sha256", 3)
    assert_remade(path, make)
    (tmp_path / "a.npy.sha256").unlink()
    np.save(path, np.zeros(7))  # as an earlier version wrote it
    assert cached_array(path, make).shape == (2, 3)
    path.unlink()
    assert cached_array(path, make).shape == (2, 3)


def test_a_cache_whose_digest_fits_something_else_than_an_array_is_made_anew(tmp_path):
    path, make = tmp_path / "a.npy", Counted()
    cached_array(path, make)
    path.write_bytes(b"no array")
    digest = hashlib.sha256(b"no array").hexdigest()
    (tmp_path / "a.npy.sha256").write_text(f"{digest}  a.npy\n")
    assert_remade(path, make)


def test_a_cache_that_cannot_be_written_costs_a_warning_only(tmp_path):
    with pytest.warns(UserWarning, match="is not cached"):
        assert cached_array(write(tmp_path / "file") / "a.npy", Counted()).shape == (2, 3)
