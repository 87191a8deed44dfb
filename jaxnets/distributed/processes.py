"""Start a run of several processes, and let them agree: JAX's own distributed runtime, watched."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import socket
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax._src import xla_bridge
from jax._src.clusters import ClusterEnv

from jaxnets import __version__
from jaxnets.distributed.hub import Hub, is_local
from jaxnets.distributed.peer import Peer, Refused

_ENVIRONMENT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_LONGEST_VALUE = 200  # characters of a value in a message

_peer: Peer | None = None
_hub: Hub | None = None  # of process 0
_silence_seconds = 0.0


class DistributedError(RuntimeError):
    """The processes of a run do not fit together, or not all of them came."""


def init_distributed(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout_seconds: float = 300.0,
    silence_seconds: float = 60.0,
    verbose: bool = True,
) -> None:
    """Make this process one of several that train one network. Call it before JAX is used.

    Afterwards `jax.devices()` are those of all processes, and `jax.distributed` is initialized.
    Besides that, the processes hold connections to process 0, by which they compare what they are
    before they start, and notice within a moment when one of them dies: the others print which
    one it was and exit with code 3, also where their main threads wait for it. JAX alone ends them
    by SIGABRT after its heartbeat's 100 s. JAX's preemption service is off, because with it SIGTERM
    ends no process.

    What is not given is taken from the environment: `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES`
    and `JAX_PROCESS_ID`, then from what JAX recognizes (SLURM, Open MPI, Kubernetes, Cloud TPU).
    Where there is nothing at all, the process runs alone, and says so.

    Args:
        coordinator_address: "host:port" of process 0, which listens there and, for JAX, at the
            next port. For localhost the ports are open to this machine only. The connections are
            neither encrypted nor authenticated, like those of JAX: use a network that you trust.
        num_processes: of the run.
        process_id: number of this one, from 0.
        timeout_seconds: within which all processes have to come.
        silence_seconds: after which a process that sends no beats, such as one on a machine
            without power, counts as lost.
        verbose: print on standard error what this process is and sees.

    Raises:
        DistributedError: process 0 does not answer, some process does not come, two have the same
            number, or one was given another number of processes or has another version of JAX or
            of this library; the message names it, in every process.
        ValueError: only some of the three are known, or one cannot be.
        RuntimeError: JAX was used already, or this was called before.
    """
    global _peer, _hub, _silence_seconds
    if _peer is not None:
        raise RuntimeError("init_distributed was called already; call it once, at the start")
    address, count, process, local_devices = _settings(
        coordinator_address, num_processes, process_id, timeout_seconds
    )
    if address is None:
        if verbose:
            print("process 0 of 1: nothing says that there are more", file=sys.stderr)
        return
    if xla_bridge.backends_are_initialized():
        raise RuntimeError(
            "JAX was used already, so it knows the devices of this process only; call "
            "init_distributed before the first array, jax.devices() or random key"
        )
    host, port = _split_address(address)
    if not 0 <= process < count:
        raise ValueError(f"process_id is {process} of {count}; give a number from 0 to {count - 1}")
    hello = {
        "process": process,
        "num_processes": count,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "versions": {"jax": jax.__version__, "jaxnets": __version__},
    }
    hub = None
    if process == 0:
        try:
            hub = Hub(
                host,
                port,
                num_processes=count,
                timeout_seconds=timeout_seconds,
                silence_seconds=silence_seconds,
            )
        except OSError as error:
            raise DistributedError(
                f"cannot listen at {host}:{port} ({error.strerror}); choose another port, and the "
                "same one for all processes"
            ) from error
        hub.start()
    try:
        peer = Peer(host, port, hello, timeout_seconds=timeout_seconds)
    except Refused as refused:
        raise DistributedError(str(refused)) from None
    with _without_preemption_service():
        jax.distributed.initialize(
            f"{host}:{port + 1}",
            count,
            process,
            local_device_ids=local_devices,
            cluster_detection_method="deactivate",
            initialization_timeout=int(timeout_seconds) + 1,
            coordinator_bind_address=f"{host}:{port + 1}" if is_local(host) else None,
        )
    _peer, _hub, _silence_seconds = peer, hub, silence_seconds
    # After JAX's own, so that it runs first: the others hear of the end before JAX waits for it.
    atexit.register(_leave_at_exit)
    if verbose:
        local, devices = jax.local_device_count(), jax.device_count()
        print(
            f"process {process} of {count} (pid {hello['pid']} on {hello['host']}): {local} of "
            f"{devices} {jax.devices()[0].device_kind} devices",
            file=sys.stderr,
        )


def check_agreement(what: str, value: Any) -> None:
    """Check that all processes have the same value, such as a configuration or a data set.

    All processes call this, in the same order. Without `init_distributed` it does nothing.

    Args:
        what: what the value is, for the message; of each value another one.
        value: what JSON can hold; arrays in it are compared by a digest of dtype, shape and bytes,
            and those that no process holds as a whole by dtype and shape.

    Raises:
        DistributedError: another process has another value; the message names it and both values.

    Example:
        >>> check_agreement("the configuration", {"learning_rate": 1e-3, "seed": 0})
    """
    if _peer is None:
        return
    own = json.loads(json.dumps(value, default=_digest, sort_keys=True))
    first, others = _peer.compare(what, own)
    if others:
        process, other = next(iter(sorted(others.items())))
        other, first = _difference(other, first)
        more = f" (of {len(others)} that differ from process 0)" if len(others) > 1 else ""
        raise DistributedError(
            f"{what} differs: process {process}{more} has {_shown(other)}, process 0 has "
            f"{_shown(first)}; start all processes with the same"
        )


def agree_to_stop(reason: str | None) -> str | None:
    """Let all processes stop after the same call of their step, if one of them has to.

    All processes call this once after every call of their step. It neither waits for other
    processes nor talks to them before one has a reason.

    Args:
        reason: why this process is to stop, such as "SIGTERM"; None: it need not.

    Returns:
        The reason to stop now, and the process that gave it; None: go on. Without
        `init_distributed` it is `reason`.
    """
    return reason if _peer is None else _peer.agree_to_stop(reason)


def leave(error: str | None = None) -> None:
    """Leave the run before `os._exit`, which skips what Python does at its exit.

    The others go on to their own ends, and process 0 waits for them; after an error they stop, with
    its text. Does nothing without `init_distributed`, and at a second call.

    Args:
        error: why this process fails.
    """
    global _peer, _hub
    peer, hub = _peer, _hub
    _peer = _hub = None
    if peer is not None:
        peer.leave(error)
    if hub is not None:
        hub.join(timeout=_silence_seconds)


@contextlib.contextmanager
def _without_preemption_service() -> Iterator[None]:
    """Keep JAX from its own handler of SIGTERM, after which `kill` would not end the process."""
    name = "jax_enable_preemption_service"
    before = getattr(jax.config, name)
    jax.config.update(name, False)
    try:
        yield
    finally:
        jax.config.update(name, before)


def _settings(
    address: str | None, count: int | None, process: int | None, timeout_seconds: float
) -> tuple[str | None, int, int, Any]:
    """Return the address (None: there is one process), number, process, and its devices."""
    address = address or os.environ.get(_ENVIRONMENT[0])
    count = _integer(_ENVIRONMENT[1]) if count is None else count
    process = _integer(_ENVIRONMENT[2]) if process is None else process
    devices = None
    if None in (address, count, process):
        address, count, process, devices = ClusterEnv.auto_detect_unset_distributed_params(
            address, count, process, None, None, int(timeout_seconds)
        )
    known = dict(zip(_ENVIRONMENT, (address, count, process), strict=True))
    missing = [name for name, value in known.items() if value is None]
    if missing and len(missing) < len(known):
        given = ", ".join(f"{name}={known[name]}" for name in known if name not in missing)
        raise ValueError(
            f"{given} says that there are several processes, but {' and '.join(missing)} is not "
            "known; set it in the environment, or give it to init_distributed"
        )
    return address, count or 1, process or 0, devices


def _integer(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"{name} is {text!r} in the environment; give a number")
    return int(text)


def _split_address(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65535:
        raise ValueError(
            f"coordinator_address is {address!r}; give host:port of process 0, such as "
            "localhost:1234, with a port below 65535"
        )
    return host.removeprefix("[").removesuffix("]"), int(port)


def _digest(value: Any) -> Any:
    if not (hasattr(value, "dtype") and hasattr(value, "shape")):
        raise TypeError(f"{value!r} is neither a JSON value nor an array; give its text")
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return f"{value.dtype}{list(value.shape)}"  # each process has a part of it
    if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    array = np.asarray(value)
    content = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    return f"{array.dtype}{list(array.shape)} of sha256 {content[:16]}"


def _difference(one: Any, other: Any) -> tuple[Any, Any]:
    """Return the entries of two dicts that differ; other values as they are."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return one, other
    equal = {name for name in one if name in other and one[name] == other[name]}
    first, second = (
        {name: value for name, value in entries.items() if name not in equal}
        for entries in (one, other)
    )
    return first, second


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def _leave_at_exit() -> None:
    """Leave the run at the exit of the interpreter."""
    error = getattr(sys, "last_value", None)
    leave(None if error is None else f"{type(error).__name__}: {str(error)[:_LONGEST_VALUE]}")
    if error is not None:
        # The others end now, and JAX would wait for them and then abort.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(1)
