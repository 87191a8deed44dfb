"""Process 0's part of the agreement between processes: it hears all and tells all.

Every process, 0 as well, holds a connection to the hub. While a run starts, the hub counts who has
come and compares what they are. Afterwards it notices who has gone: the system closes the
connection of a process that dies, and one that hangs sends no more beats.
"""

from __future__ import annotations

import dataclasses
import select
import socket
import threading
import time
from typing import Any

from jaxnets.distributed.messages import Connection, Message

_TICK_SECONDS = 0.25


@dataclasses.dataclass
class _Member:
    """A process that has said which one it is."""

    connection: Connection
    hello: Message
    heard: float
    calls: int | None = None  # of `agree_to_stop`, while a stop is being agreed on


class Hub:
    """The thread of process 0 that the processes of a run are connected to.

    Args:
        host: name or address to listen at; one of this machine alone, such as localhost, is not
            open to others.
        port: to listen at.
        num_processes: of the run.
        timeout_seconds: within which all of them have to come.
        silence_seconds: after which a process without a sign of life counts as hung.

    Raises:
        OSError: the port is in use.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        num_processes: int,
        timeout_seconds: float,
        silence_seconds: float,
    ) -> None:
        self._thread = threading.Thread(target=self._run, name="jaxnets-hub", daemon=True)
        self._where = f"{host}:{port}"
        self._num_processes = num_processes
        self._timeout, self._silence = timeout_seconds, silence_seconds
        self._server = socket.create_server((host if is_local(host) else "", port), backlog=128)
        self._members: dict[int, _Member] = {}
        self._gone: set[int] = set()
        self._strangers: list[Connection] = []
        self._stopping: str | None = None  # why a run is to stop, until all know where
        self._values: dict[str, dict[int, Any]] = {}  # of each agreement that is not complete
        self._refused = False

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def join(self, timeout: float) -> bool:
        """Wait until the last process has gone, for some seconds; return whether it has."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        """Gather the processes, then serve them until the last one has gone."""
        try:
            self._gather()
            while not self._refused and len(self._gone) < self._num_processes:
                self._serve()
                self._look_for_silence()
        finally:
            for connection in [*self._strangers, *(m.connection for m in self._members.values())]:
                connection.close()
            self._server.close()

    def _gather(self) -> None:
        deadline = time.monotonic() + self._timeout
        while len(self._members) < self._num_processes and not self._refused:
            self._serve()
            if time.monotonic() > deadline:
                missing = sorted(set(range(self._num_processes)) - self._members.keys())
                self._refuse(
                    f"{_names(missing)} of {self._num_processes} did not come to {self._where} "
                    f"within {self._timeout:g} s; start all of them, with the same coordinator"
                )
        if not self._refused:
            self._tell(start=[self._members[i].hello for i in range(self._num_processes)])

    def _serve(self) -> None:
        """Handle what arrives within a moment."""
        connections = [*self._strangers]
        connections += [m.connection for i, m in self._members.items() if i not in self._gone]
        waiting: list[Any] = [self._server, *connections]
        ready = select.select(waiting, [], [], _TICK_SECONDS)[0]
        for connection in connections:
            if connection in ready:
                self._hear(connection)
        if self._server in ready:
            self._strangers.append(Connection(self._server.accept()[0]))

    def _hear(self, connection: Connection) -> None:
        messages = connection.receive()
        process = next((i for i, m in self._members.items() if m.connection is connection), None)
        for message in messages or ():
            if process is not None:
                self._handle(process, message)
            elif (process := self._greet(connection, message)) is None:
                messages = None
                break
        if messages is not None:
            return
        if process is None:
            self._strangers.remove(connection)
            connection.close()
        elif process not in self._gone:
            self._lose(process, "its connection closed")

    def _greet(self, connection: Connection, hello: Message) -> int | None:
        """Return the number of a new process; None for what is none."""
        process, count = hello.get("process"), hello.get("num_processes")
        if not isinstance(process, int) or not isinstance(count, int) or self._refused:
            return None
        known = self._members.get(process)
        if known is not None:
            self._refuse(_twice(process, known.hello, hello))
            connection.send(refuse=_twice(process, known.hello, hello))
            return None
        self._strangers.remove(connection)
        self._members[process] = _Member(connection, hello, time.monotonic())
        if count != self._num_processes:
            self._refuse(
                f"process {process} ({_place(hello)}) was started as one of {count} processes, "
                f"process 0 as one of {self._num_processes}; give all the same number"
            )
        if 0 not in self._members:
            return process
        for other in self._members.values():
            for name, value in other.hello.get("versions", {}).items():
                wanted = self._members[0].hello["versions"].get(name)
                if value != wanted:
                    self._refuse(
                        f"process {other.hello['process']} ({_place(other.hello)}) has {name} "
                        f"{value}, process 0 has {wanted}; install the same everywhere"
                    )
        return process

    def _handle(self, process: int, message: Message) -> None:
        member = self._members[process]
        member.heard = time.monotonic()
        if "bye" in message:
            if message["bye"] is not None:
                self._lose(process, f"it ended with {message['bye']}")
            self._gone.add(process)
            self._settle_stop()
        elif "stop" in message and self._stopping is None:
            self._stopping = f"{message['stop']} (process {process})"
            self._tell(report=True)
        elif "calls" in message:
            member.calls = message["calls"]
            self._settle_stop()
        elif "agree" in message:
            self._compare(process, message["agree"], message["value"])

    def _settle_stop(self) -> None:
        """Tell after how many calls all stop, once all have said how many they have made."""
        present = [m.calls for i, m in self._members.items() if i not in self._gone]
        calls = [count for count in present if count is not None]
        if self._stopping is None or not calls or len(calls) < len(present):
            return
        self._tell(stop_after=1 + max(calls), reason=self._stopping)
        self._stopping = None
        for member in self._members.values():
            member.calls = None

    def _compare(self, process: int, what: str, value: Any) -> None:
        values = self._values.setdefault(what, {})
        values[process] = value
        if len(values) == self._num_processes:
            del self._values[what]
            others = {i: v for i, v in values.items() if v != values[0]}
            self._tell(agreed=what, first=values[0], others=others)

    def _look_for_silence(self) -> None:
        now = time.monotonic()
        for process, member in self._members.items():
            if process not in self._gone and now - member.heard > self._silence:
                self._lose(process, f"it has not answered for {self._silence:g} s")

    def _lose(self, process: int, why: str) -> None:
        self._gone.add(process)
        who = f"process {process} of {self._num_processes}"
        self._tell(lost=f"{who} ({_place(self._members[process].hello)}) is lost: {why}")

    def _refuse(self, reason: str) -> None:
        if not self._refused:
            self._refused = True
            self._tell(refuse=reason)

    def _tell(self, **message: Any) -> None:
        for process, member in self._members.items():
            if process not in self._gone:
                member.connection.send(**message)


def is_local(host: str) -> bool:
    """Return whether a host name means this machine alone."""
    return host == "localhost" or host.startswith("127.")


def _place(hello: Message) -> str:
    return f"pid {hello.get('pid')} on {hello.get('host')}"


def _twice(process: int, first: Message, second: Message) -> str:
    return (
        f"two processes say that they are process {process}: {_place(first)}, and "
        f"{_place(second)}; give each its own number"
    )


def _names(processes: list[int]) -> str:
    numbers = ", ".join(map(str, processes))
    return f"process {numbers}" if len(processes) == 1 else f"processes {numbers}"
