"""The hub and its peers, in threads of one process: who is refused or lost, where all stop."""

import random
import re
import socket
import threading
import time

import pytest

from jaxnets.distributed import peer as peers
from jaxnets.distributed.hub import Hub
from jaxnets.distributed.peer import Peer, Refused

#: The end of a process is the end of a thread here.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.fixture(autouse=True)
def exits(monkeypatch):
    """What processes would say at their end, which would be that of the tests."""
    said, opened, connect = [], [], peers._connect

    def remembered(*arguments):
        opened.append(connect(*arguments))
        return opened[-1]

    monkeypatch.setattr(peers, "_connect", remembered)

    def leave(reason, delay=0.0):
        said.append(reason)
        raise SystemExit  # ends the thread

    monkeypatch.setattr(peers, "_exit", leave)
    yield said
    for connection in opened:
        connection.close()


def hello(process, num_processes=2, **versions):
    return {
        "process": process,
        "num_processes": num_processes,
        "pid": 100 + process,
        "host": "here",
        "versions": {"jax": "1", **versions},
    }


def start(port, *hellos, timeout=5.0, silence=30.0):
    """Return what each of the peers became: a Peer, or the text of a refusal."""
    count = hellos[0]["num_processes"]
    hub = Hub(
        "localhost", port, num_processes=count, timeout_seconds=timeout, silence_seconds=silence
    )
    hub.start()
    became = [None] * len(hellos)

    def connect(index):
        try:
            became[index] = Peer("localhost", port, hellos[index], timeout_seconds=timeout)
        except Refused as refused:
            became[index] = str(refused)

    threads = [threading.Thread(target=connect, args=(i,)) for i in range(len(hellos))]
    for thread in threads:
        thread.start()
        time.sleep(0.05)  # in this order
    for thread in threads:
        thread.join()
    return became, hub


def leave(started, hub):
    for one in started:
        one.leave(None)
    assert hub.join(timeout=20)


def test_all_know_all_and_leave(port, exits):
    started, hub = start(port, hello(0), hello(1))
    assert [[m["process"] for m in one.members] for one in started] == [[0, 1]] * 2
    leave(started, hub)
    assert exits == []


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (hello(1, 3), r"process 1 \(pid 101 on here\) was started as one of 3 .* 0 as one of 2"),
        (hello(1, jax="2"), r"process 1 \(pid 101 on here\) has jax 2, process 0 has 1; install"),
        (hello(0), "two processes say that they are process 0: pid 100 on here, and pid 100"),
    ],
)
def test_processes_that_do_not_fit_are_refused(port, second, reason):
    became, hub = start(port, hello(0), second)
    assert all(re.search(reason, text) for text in became), became
    assert hub.join(timeout=20)


def test_who_is_missing_is_named(port):
    became, _ = start(port, hello(0, 4), hello(2, 4), timeout=0.6)
    reason = f"processes 1, 3 of 4 did not come to localhost:{port} within 0.6 s; start all of them"
    assert [reason in text for text in became] == [True, True]


def test_a_missing_coordinator_is_named(port):
    with pytest.raises(Refused, match=f"no coordinator answers at localhost:{port} after 0.5 s"):
        Peer("localhost", port, hello(1), timeout_seconds=0.5)


@pytest.mark.parametrize(
    "noise",
    [b"GET / HTTP/1.1\r\n\r\n", b"\xff\n", b"[" * 5000 + b"\n", b"[1]\n", b'{"a": 1}\n', b""],
)
def test_strangers_are_ignored(port, noise, exits):
    hub = Hub("localhost", port, num_processes=1, timeout_seconds=5, silence_seconds=30)
    hub.start()
    with socket.create_connection(("localhost", port)) as stranger:
        stranger.sendall(noise)
    one = Peer("localhost", port, hello(0, 1), timeout_seconds=5)
    leave([one], hub)
    assert exits == []


def test_an_unequal_value_is_known_to_all(port):
    started, hub = start(port, hello(0), hello(1))
    answers = [None, None]

    def compare(index):
        answers[index] = [
            started[index].compare("a", {"seed": index}),
            started[index].compare("b", [1.5, None]),
        ]

    threads = [threading.Thread(target=compare, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert answers == [[({"seed": 0}, {1: {"seed": 1}}), ([1.5, None], {})]] * 2
    leave(started, hub)


@pytest.mark.parametrize("lead", [0, 1])
def test_all_stop_after_the_same_call(port, lead, exits):
    """A call needs all processes, as one with a collective does; one may be a call ahead."""
    started, hub = start(port, hello(0), hello(1))
    together = threading.Barrier(2)
    stopped = [None, None]

    def train(index):
        for call in range(1, 20_000):
            together.wait(timeout=30)  # the collective of this call
            reason = "SIGTERM" if index == 1 and call >= 20 else None
            reason = started[index].agree_to_stop(reason)
            if reason is not None:
                stopped[index] = (call, reason)
                return
            time.sleep(0.002 * (index == lead))

    threads = [threading.Thread(target=train, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert stopped[0] == stopped[1]
    assert stopped[0][0] >= 20 and stopped[0][1] == "SIGTERM (process 1)"
    leave(started, hub)
    assert exits == []


def test_all_may_be_asked_to_stop_at_once(port, exits):
    """A signal to a group of processes; a stop that is agreed on does not begin a second one."""
    started, hub = start(port, hello(0), hello(1))
    together = threading.Barrier(2)
    stopped = [[], []]

    def train(index):
        waits = random.Random(index)
        for _ in range(100):  # runs of one process
            for call in range(1, 20_000):
                together.wait(timeout=30)  # the collective of this call
                time.sleep(waits.choice([0, 0, 0.0002, 0.001]))
                if started[index].agree_to_stop("SIGTERM" if call >= 3 else None) is not None:
                    stopped[index].append(call)
                    break

    threads = [threading.Thread(target=train, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert len(stopped[0]) == 100 and stopped[0] == stopped[1] and min(stopped[0]) >= 3
    leave(started, hub)
    assert exits == []


def test_a_closed_connection_is_a_lost_process(port, exits):
    started, _ = start(port, hello(0, 3), hello(1, 3), hello(2, 3))
    started[2]._leaving.set()  # its thread says nothing more, as if killed
    started[2]._thread.join(timeout=20)
    started[2]._connection.close()
    for one in started[:2]:
        one._thread.join(timeout=20)
    lost = "process 2 of 3 (pid 102 on here) is lost: its connection closed"
    assert exits == [lost, lost]


def test_silence_is_a_lost_process(port, exits):
    started, _ = start(port, hello(0), hello(1), silence=2.5)
    started[1]._leaving.set()
    started[0]._thread.join(timeout=20)
    assert exits == ["process 1 of 2 (pid 101 on here) is lost: it has not answered for 2.5 s"]


def test_an_error_of_one_is_told_to_the_others(port, exits):
    started, _ = start(port, hello(0), hello(1))
    started[1].leave("ValueError: bad")
    started[0]._thread.join(timeout=20)
    assert "process 1 of 2 (pid 101 on here) is lost: it ended with ValueError: bad" in exits


def test_the_hub_is_missed(port, exits):
    [only], hub = start(port, hello(0, 1))
    hub._members[0].connection._socket.shutdown(socket.SHUT_RDWR)
    only._thread.join(timeout=20)
    assert exits == ["process 0, which coordinates the run, is lost: its connection closed"]
