"""What each process of a run does for the agreement between them: it holds a line to the hub."""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import sys
import threading
import time
from typing import Any

from jaxnets.distributed.messages import Connection, Message

_BEAT_SECONDS = 1.0
_LAST_SECONDS = 1.0  # until the process with the hub ends, so that the others hear why
_RETRY_SECONDS = 0.25
#: Of a process that stops because another one was lost: the run can be continued.
EXIT_CODE = 3


class Refused(Exception):
    """The processes do not fit together, or not all of them came."""


class Peer:
    """The line of one process to the hub.

    Args:
        host: of process 0.
        port: of its hub.
        hello: "process", "num_processes", "versions" and whatever else says who this is.
        timeout_seconds: to reach the hub, and until all processes have come.

    Raises:
        Refused: nobody answers, or the hub refuses the processes.
    """

    def __init__(self, host: str, port: int, hello: Message, *, timeout_seconds: float) -> None:
        self._hello = hello
        self._connection = _connect(host, port, timeout_seconds)
        self._connection.send(**hello)
        #: The hellos of all processes.
        self.members: list[Message] = []
        try:
            self.members = self._wait_for_start(timeout_seconds + 10, f"{host}:{port}")
        except Refused:
            self._connection.close()
            raise
        self._lock = threading.Lock()  # held from the report of the calls until the answer
        self._calls = 0
        self._stop_after: int | None = None
        self._reason = ""
        self._asked = False
        self._answers: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="jaxnets-peer", daemon=True)
        self._thread.start()

    def agree_to_stop(self, reason: str | None) -> str | None:
        """See `processes.agree_to_stop`."""
        with self._lock:
            if reason is not None and not self._asked and self._stop_after is None:
                # Within the lock it arrives before the report of the calls. Later, the hub would
                # take it for a second stop, after the one that it has just settled.
                self._asked = True
                self._connection.send(stop=reason)
            self._calls += 1
            if self._stop_after is None or self._calls < self._stop_after:
                return None
            self._stop_after, self._asked = None, False
            return self._reason

    def compare(self, what: str, value: Any) -> tuple[Any, dict[int, Any]]:
        """Return the value of process 0, and those of the processes that have another one."""
        self._connection.send(agree=what, value=value)
        answer = self._answers.get()
        return answer["first"], {int(process): v for process, v in answer["others"].items()}

    def leave(self, error: str | None) -> None:
        """Say that this process ends, and with what error; another one's loss is told first."""
        if error is not None:
            # A collective fails at once where another process died; the hub says which one.
            self._thread.join(timeout=2 * _BEAT_SECONDS)
        self._leaving.set()
        self._connection.send(bye=error)
        self._thread.join(timeout=2 * _BEAT_SECONDS)
        self._connection.close()

    def _wait_for_start(self, seconds: float, where: str) -> list[Message]:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            messages = self._connection.wait(1.0)
            if messages is None:
                raise Refused(f"process 0 at {where} has closed the connection; see its output")
            for message in messages:
                if "refuse" in message:
                    raise Refused(message["refuse"])
                if "start" in message:
                    return message["start"]
        raise Refused(f"process 0 at {where} has not started the run within {seconds:g} s")

    def _listen(self) -> None:
        """Send beats and take messages until the end."""
        beat = time.monotonic()
        while not self._leaving.is_set():
            if time.monotonic() >= beat:
                self._connection.send(beat=True)
                beat = time.monotonic() + _BEAT_SECONDS
            messages = self._connection.wait(beat - time.monotonic())
            if messages is None:
                if not self._leaving.is_set():
                    _exit("process 0, which coordinates the run, is lost: its connection closed")
                return
            for message in messages:
                self._handle(message)

    def _handle(self, message: Message) -> None:
        if "lost" in message:
            _exit(message["lost"], _LAST_SECONDS if self._hello["process"] == 0 else 0.0)
        elif "agreed" in message:
            self._answers.put(message)
        elif "report" in message:
            # Until the answer is here the main thread makes no further call. It cannot deadlock:
            # every process answers from this thread, also one whose main thread waits for others.
            self._lock.acquire()
            self._connection.send(calls=self._calls)
        elif "stop_after" in message:
            self._stop_after, self._reason = message["stop_after"], message["reason"]
            self._lock.release()


def _connect(host: str, port: int, seconds: float) -> Connection:
    deadline = time.monotonic() + seconds
    while True:
        try:
            return Connection(socket.create_connection((host, port), timeout=seconds))
        except OSError as error:
            if time.monotonic() > deadline:
                raise Refused(
                    f"no coordinator answers at {host}:{port} after {seconds:g} s ({error}); start "
                    "process 0 there, and check the address"
                ) from None
        time.sleep(_RETRY_SECONDS)


def _exit(reason: str, delay: float = 0.0) -> None:
    """End this process, whose main thread may wait for the lost one for ever."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    line = f"{reason}; this process stops too, and the last checkpoint continues the run\n"
    with contextlib.suppress(OSError):
        os.write(2, line.encode())
    time.sleep(delay)
    os._exit(EXIT_CODE)
