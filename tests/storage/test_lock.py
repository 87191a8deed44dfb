"""Locks of folders: one holder at a time, none after its end."""

import json
import os
import re
import signal
import socket
import subprocess
import sys

import pytest

from jaxnets.storage import FolderInUseError, lock_folder

HOLDER = """
import os, sys, time
from jaxnets.storage import lock_folder
with lock_folder(sys.argv[1]):
    child = os.fork() if sys.argv[2:] else os.getpid()
    if not (child and sys.argv[2:]):
        print(os.getpid(), flush=True)
    time.sleep(60)
"""


def start(folder, *options):
    command = [sys.executable, "-c", HOLDER, folder, *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    return process, int(process.stdout.readline())


def end(process, how=signal.SIGKILL):
    process.send_signal(how)
    process.wait()
    process.stdout.close()


def test_a_second_process_is_told_who_holds_the_folder(tmp_path):
    process, _ = start(tmp_path)
    try:
        who = rf"process {process.pid} on {re.escape(socket.gethostname())} since \d{{4}}-\d\d-\d\d"
        with pytest.raises(FolderInUseError, match=f"is in use by {who}"), lock_folder(tmp_path):
            pass
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == process.pid
    finally:
        end(process)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_lock_dies_with_its_holder(how, tmp_path):
    process, _ = start(tmp_path)
    end(process, how)
    with lock_folder(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_forked_child_does_not_hold_on(tmp_path):
    process, child = start(tmp_path, "fork")
    try:
        end(process)
        with lock_folder(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_one_process_cannot_hold_a_folder_twice_but_again(tmp_path):
    with (
        lock_folder(tmp_path / "run"),
        pytest.raises(FolderInUseError, match=rf"process {os.getpid()} \(this one\)"),
        lock_folder(tmp_path / "run"),
    ):
        pass
    with lock_folder(tmp_path / "run"):
        pass


def test_a_holder_that_ends_while_another_starts_does_not_confuse_it(tmp_path, monkeypatch):
    from jaxnets.storage import lock

    taken = []

    def removed_meanwhile(descriptor):
        if not taken:
            taken.append(descriptor)
            (tmp_path / ".lock").unlink()
        return True

    monkeypatch.setattr(lock, "try_lock", removed_meanwhile)
    with lock_folder(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize(
    ("host", "pid", "held"),
    [
        (socket.gethostname(), None, True),  # this process
        (socket.gethostname(), 2**31 - 1, False),
        ("another", 2**31 - 1, True),
    ],
)
def test_without_locks_of_the_file_system_the_file_decides(host, pid, held, tmp_path, monkeypatch):
    pid = os.getpid() if pid is None else pid
    monkeypatch.setattr("jaxnets.storage.lock.try_lock", lambda descriptor: None)
    content = {"host": host, "pid": pid, "since": "today"}
    (tmp_path / ".lock").write_text(json.dumps(content))
    if held:
        with pytest.raises(FolderInUseError, match=r"is gone, remove .*\.lock"):
            lock_folder(tmp_path).__enter__()
        assert json.loads((tmp_path / ".lock").read_text()) == content
    else:
        with lock_folder(tmp_path):
            pass


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"pid": "x"}', "[" * 4000])
def test_a_damaged_lock_file_of_nobody_is_taken_over(content, tmp_path):
    (tmp_path / ".lock").write_text(content)
    with lock_folder(tmp_path):
        pass


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(OSError), lock_folder(tmp_path / "file"):
        pass
