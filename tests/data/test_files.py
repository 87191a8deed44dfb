"""Files: search order, digests, downloads from a local server, safe extraction."""

import dataclasses
import errno
import gzip
import hashlib
import http.server
import io
import os
import stat
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest

from jaxnets.data import locate, safe_extract
from jaxnets.data.files import (
    DataFile,
    atomic_file,
    cache_folder,
    fetch,
    find,
    read_verified,
    search_folders,
)

CONTENT = b"the published content" * 50
SHA256 = hashlib.sha256(CONTENT).hexdigest()
FILE = DataFile("letters.gz", SHA256, folders=("words", "old-words"))


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
    file = DataFile("a.tar.gz", hashlib.sha256(packed).hexdigest(), folders=("a",))
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
        (lambda packed: gzip.compress(CONTENT + b"!"), "is not the published file"),
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


def test_no_connection_is_reported_with_the_place_to_put_the_file(tmp_path):
    file = dataclasses.replace(FILE, url="http://127.0.0.1:9/letters.gz")
    with pytest.raises(OSError, match="check the connection") as caught:
        fetch(file)
    assert str(file.download_path) in str(caught.value)


def test_a_full_disk_is_reported_and_leaves_nothing_behind(server, tmp_path, monkeypatch):
    def full(source, target):
        target.write(source.read(100))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("shutil.copyfileobj", full)
    with pytest.raises(OSError, match="No space left"):
        fetch(served(server, gzip.compress(CONTENT)))
    assert not files_below(tmp_path)


def test_a_cache_that_cannot_be_written_is_reported(server, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(write(tmp_path / "a file") / "cache"))
    with pytest.raises(OSError, match="check the connection and the disk"):
        fetch(served(server, gzip.compress(CONTENT)))


def test_an_interrupted_write_leaves_the_existing_file(tmp_path):
    path = write(tmp_path / "kept")
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as stream:
        stream.write(b"half")
        raise KeyboardInterrupt
    assert files_below(tmp_path) == [path]
    assert path.read_bytes() == CONTENT


# Archives


def tar_member(name, **attributes):
    member = tarfile.TarInfo(name)
    for attribute, value in attributes.items():
        setattr(member, attribute, value)
    return member


def make_tar(path, *members):
    with tarfile.open(path, "w:gz") as archive:
        for member in members:
            content = CONTENT if member.isreg() else b""
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def make_zip(path, *names, mode=0o644):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            archive.writestr(info, b"" if name.endswith("/") else CONTENT)
    return path


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_plain_archive_is_extracted_with_its_folders(tmp_path, kind):
    if kind == "tar":
        folder = tar_member("a", type=tarfile.DIRTYPE)
        members = (folder, tar_member("./a/one"), tar_member("b/c/two"))
        archive = make_tar(tmp_path / "x.tar.gz", *members)
    else:
        archive = make_zip(tmp_path / "x.zip", "a/", "a/one", "b/c/two")
    target = safe_extract(archive, tmp_path / "new" / "folder")
    assert {str(path.relative_to(target)) for path in files_below(target)} == {"a/one", "b/c/two"}
    assert (target / "a/one").read_bytes() == CONTENT


EVIL_NAMES = ["/abs", "../up", "a/../../up", "C:\\abs", "C:abs", "\\abs", "a\\..\\..\\up"]
EVIL_MEMBERS = [
    *(tar_member(name) for name in EVIL_NAMES),
    tar_member("link", type=tarfile.SYMTYPE, linkname="/etc"),
    tar_member("link", type=tarfile.SYMTYPE, linkname=".."),
    tar_member("link", type=tarfile.LNKTYPE, linkname="../../secret"),
    tar_member("device", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
    tar_member("disk", type=tarfile.BLKTYPE),
    tar_member("pipe", type=tarfile.FIFOTYPE),
]


@pytest.mark.parametrize("member", EVIL_MEMBERS, ids=lambda m: f"{m.name} {m.linkname}")
def test_a_tar_archive_with_paths_outside_is_refused_before_anything_is_written(tmp_path, member):
    archive = make_tar(tmp_path / "evil.tar.gz", tar_member("harmless"), member)
    with pytest.raises(ValueError, match="not safe to extract: member"):
        safe_extract(archive, tmp_path / "inside" / "folder")
    assert files_below(tmp_path) == [archive]
    assert list((tmp_path / "inside").iterdir()) == []


@pytest.mark.parametrize("name", EVIL_NAMES)
def test_a_zip_archive_with_paths_outside_is_refused(tmp_path, name):
    archive = make_zip(tmp_path / "evil.zip", "harmless", name)
    with pytest.raises(ValueError, match="not safe to extract: member"):
        safe_extract(archive, tmp_path / "folder")
    assert files_below(tmp_path) == [archive]


def test_a_link_in_a_zip_archive_is_refused(tmp_path):
    archive = make_zip(tmp_path / "evil.zip", "link", mode=stat.S_IFLNK | 0o777)
    with pytest.raises(ValueError, match="a link or device"):
        safe_extract(archive, tmp_path / "folder")


def test_an_invalid_archive_is_refused_and_leaves_nothing(tmp_path):
    whole = make_tar(tmp_path / "x.tar.gz", tar_member("a"), tar_member("b")).read_bytes()
    zipped = make_zip(tmp_path / "x.zip", "a").read_bytes()
    flipped = zipped.replace(CONTENT[:20], CONTENT[:19] + b"!")
    for number, content in enumerate((whole[:-30], whole[:20], b"", CONTENT, flipped)):
        archive = tmp_path / f"bad{number}"
        archive.write_bytes(content)
        with pytest.raises(ValueError, match=f"bad{number} is damaged or not"):
            safe_extract(archive, tmp_path / "inside" / "folder")
    assert list((tmp_path / "inside").iterdir()) == []


def test_an_existing_folder_is_not_extracted_over(tmp_path):
    archive = make_tar(tmp_path / "x.tar.gz", tar_member("a"))
    safe_extract(archive, tmp_path / "folder")
    with pytest.raises(FileExistsError, match="folder exists already"):
        safe_extract(archive, tmp_path / "folder")
