"""Messages between processes: lines of JSON on a TCP connection."""

from __future__ import annotations

import json
import select
import socket
import threading
from typing import Any, TypeAlias

#: Named values that JSON can hold.
Message: TypeAlias = dict[str, Any]

_LONGEST = 1 << 20  # bytes of a message
_SEND_SECONDS = 10.0


class Connection:
    """One end of a connection. Any thread may send, and one thread receives."""

    def __init__(self, connected: socket.socket) -> None:
        connected.settimeout(_SEND_SECONDS)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connected
        self._received = b""
        self._sending = threading.Lock()

    def fileno(self) -> int:
        """Return the descriptor, for `select`."""
        return self._socket.fileno()

    def send(self, **message: Any) -> bool:
        """Send a message; return whether the connection still stands."""
        try:
            with self._sending:
                self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return False
        return True

    def wait(self, seconds: float) -> list[Message] | None:
        """Return what `receive` does, after at most some seconds."""
        try:
            ready = select.select([self._socket], [], [], max(seconds, 0.0))[0]
        except (OSError, ValueError):  # this end was closed
            return None
        return self.receive() if ready else []

    def receive(self) -> list[Message] | None:
        """Return the messages that have arrived, [] while there is none; None at the end.

        Whatever is no message of ours, such as a stranger's request, is an end too.
        """
        try:
            data = self._socket.recv(1 << 16)
        except (TimeoutError, BlockingIOError):
            return []
        except OSError:
            return None
        *lines, self._received = (self._received + data).split(b"\n")
        if not data or len(self._received) > _LONGEST:
            return None
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            return None
        return messages if all(isinstance(message, dict) for message in messages) else None

    def close(self) -> None:
        """Close this end."""
        self._socket.close()
