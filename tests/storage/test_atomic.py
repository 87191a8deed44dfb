"""Atomic files and folders: permissions, interruptions, and what killed processes leave."""

import os
import signal
import subprocess
import sys

import pytest

from jaxnets.storage import atomic_file, atomic_folder
from jaxnets.storage.atomic import _remove_leftovers


@pytest.fixture(autouse=True)
def a_new_process():
    _remove_leftovers.cache_clear()  # which are removed once per process


def below(folder):
    return sorted(path.name for path in folder.iterdir())


def write(path, content=b"new"):
    with atomic_file(path) as stream:
        stream.write(content)


@pytest.mark.parametrize("umask", [0o077, 0o027, 0o022, 0o002])
def test_a_file_has_the_permissions_that_the_umask_leaves(umask, tmp_path):
    before = os.umask(umask)
    try:
        write(tmp_path / "file")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask


def test_an_interrupted_write_leaves_the_existing_file(tmp_path):
    write(tmp_path / "kept", b"whole")
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "kept") as stream:
        stream.write(b"half")
        raise KeyboardInterrupt
    assert below(tmp_path) == ["kept"]
    assert (tmp_path / "kept").read_bytes() == b"whole"


#: Starts a file and says so; then waits for its end.
WRITER = """
import pathlib, sys, time
from jaxnets.storage import atomic_file
with atomic_file(pathlib.Path(sys.argv[1])) as stream:
    stream.write(b"half")
    print(flush=True)
    time.sleep(60)
"""


def start_writing(path, writer=WRITER):
    process = subprocess.Popen([sys.executable, "-c", writer, path], stdout=subprocess.PIPE)
    process.stdout.readline()
    return process


def end(process, how=signal.SIGKILL):
    process.send_signal(how)
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize("name", ["file", "another_file", "n" * 250])
def test_the_next_start_removes_what_a_killed_process_left(name, tmp_path):
    end(start_writing(tmp_path / "file"))
    (leftover,) = below(tmp_path)
    assert leftover.startswith(".file.") and leftover.endswith(".part")
    (tmp_path / ".notes.part").write_text("of the user")
    write(tmp_path / name)
    assert below(tmp_path) == sorted([".notes.part", name])


def test_a_file_that_another_process_is_writing_is_no_leftover(tmp_path):
    process = start_writing(tmp_path / "file")
    try:
        (half,) = below(tmp_path)
        write(tmp_path / "file")
        assert below(tmp_path) == [half, "file"]
    finally:
        end(process)


def test_a_file_that_was_taken_for_a_leftover_is_created_anew(tmp_path, monkeypatch):
    taken = []

    def taken_once(descriptor):
        if not taken:
            taken.append(descriptor)
            next(tmp_path.glob(".file.*.part")).unlink()
        return True

    monkeypatch.setattr("jaxnets.storage.atomic.try_lock", taken_once)
    write(tmp_path / "file")
    assert taken and below(tmp_path) == ["file"]


# Folders


@pytest.mark.parametrize("umask", [0o077, 0o002])
def test_a_folder_appears_whole_with_the_permissions_that_the_umask_leaves(umask, tmp_path):
    before = os.umask(umask)
    try:
        with atomic_folder(tmp_path / "new" / "folder") as temporary:
            (temporary / "file").write_text("whole")
            assert not (tmp_path / "new" / "folder").exists()
    finally:
        os.umask(before)
    assert below(tmp_path / "new") == ["folder"] and below(tmp_path / "new/folder") == ["file"]
    assert (tmp_path / "new" / "folder").stat().st_mode & 0o777 == 0o777 & ~umask


def test_an_interrupted_folder_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "file").write_text("half")
        raise KeyboardInterrupt
    assert below(tmp_path) == []


FOLDER_WRITER = """
import pathlib, sys, time
from jaxnets.storage import atomic_folder
with atomic_folder(pathlib.Path(sys.argv[1])) as folder:
    (folder / "file").write_text("half")
    print(flush=True)
    time.sleep(60)
"""


def test_the_next_start_removes_the_folder_of_a_killed_process_but_of_no_other(tmp_path):
    process = start_writing(tmp_path / "folder", FOLDER_WRITER)
    try:
        (half,) = below(tmp_path)
        write(tmp_path / "file")
        assert below(tmp_path) == [half, "file"]
    finally:
        end(process)
    _remove_leftovers.cache_clear()
    write(tmp_path / "file")
    assert below(tmp_path) == ["file"]
