"""How a process learns which one it is, and what it does alone."""

import types

import jax.numpy as jnp
import pytest

from jaxnets.distributed import (
    DistributedError,
    agree_to_stop,
    check_agreement,
    init_distributed,
    leave,
    processes,
)

NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@pytest.fixture(autouse=True)
def unused(monkeypatch):
    """JAX has not been used, and nothing says that there are several processes."""
    monkeypatch.setattr(processes.xla_bridge, "backends_are_initialized", lambda: False)
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_a_process_alone_says_so(capsys):
    init_distributed()
    assert capsys.readouterr().err == "process 0 of 1: nothing says that there are more\n"
    check_agreement("anything", {"a": jnp.ones(2)})
    assert agree_to_stop("SIGTERM") == "SIGTERM" and agree_to_stop(None) is None


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (("localhost:1", None, None), "JAX_COORDINATOR_ADDRESS=localhost:1 says .* JAX_NUM_PROC"),
        ((None, "2", "1"), "JAX_NUM_PROCESSES=2, JAX_PROCESS_ID=1 says .* JAX_COORDINATOR_ADDR"),
        (("localhost:1", "two", "1"), "JAX_NUM_PROCESSES is 'two' in the environment; give a num"),
        (("localhost:1", "2", "2"), "process_id is 2 of 2; give a number from 0 to 1"),
        (("localhost", "2", "1"), "coordinator_address is 'localhost'; give host:port"),
        (("localhost:65535", "2", "1"), "coordinator_address is 'localhost:65535'"),
        (("localhost:x", "2", "1"), "coordinator_address is 'localhost:x'"),
    ],
)
def test_settings_that_cannot_be_are_refused(monkeypatch, environment, message):
    for name, value in zip(NAMES, environment, strict=True):
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        init_distributed()


def test_a_used_jax_is_refused(monkeypatch):
    monkeypatch.setattr(processes.xla_bridge, "backends_are_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="JAX was used already"):
        init_distributed("localhost:1234", 2, 0)


def test_a_port_in_use_is_named(monkeypatch):
    import socket

    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(DistributedError, match=f"cannot listen at localhost:{port} .*another"):
            init_distributed(f"localhost:{port}", 2, 0)


def test_values_are_compared_by_what_differs(monkeypatch):
    class Other:
        def compare(self, what, value):
            return value, {2: {**value, "array": "another", "more": [1]}}

    monkeypatch.setattr(processes, "_peer", Other())
    with pytest.raises(DistributedError) as raised:
        check_agreement("the batch", {"array": jnp.ones(2), "unchanged": 1})
    message = str(raised.value)
    assert 'differs: process 2 has {"array": "another", "more": [1]}, process 0 has' in message
    assert "float32[2] of sha256 " in message and "unchanged" not in message


def test_a_run_is_left_once(monkeypatch):
    left = []
    leave()  # of no run
    monkeypatch.setattr(processes, "_peer", types.SimpleNamespace(leave=left.append))
    leave("no data")
    leave()
    assert left == ["no data"]


def test_a_value_that_is_no_json_is_refused(monkeypatch):
    monkeypatch.setattr(processes, "_peer", object())
    with pytest.raises(TypeError, match="neither a JSON value nor an array; give its text"):
        check_agreement("the batch", {"key": object()})
