"""The processes of one run: those of `--processes`, or those that a cluster has started.

Process 0 is the one that the user has started. It holds the folder, draws, prints and writes; the
others train with it.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

import jaxnets as jn
from experiments.harness import process
from experiments.harness.options import Options
from experiments.harness.run_folder import RunError
from jaxnets import distributed

#: Names the descriptor of a pipe, which closes with process 0, in the environment of the others.
_PARENT = "EXPERIMENTS_PROCESS_0"
#: For process 0, which may fail in the same way, to say so.
_FIRST_SECONDS = 1.0
#: For the loss of a process to end process 0 by their connection, if they had one.
_LOST_SECONDS = 5.0

_is_first = True


def join(options: Options) -> bool:
    """Make this process one of those of its run, before JAX is used.

    Args:
        options: of the run.

    Returns:
        Whether it is the first one. With `--processes` it is alone until `start_others`.

    Raises:
        RunError: the processes cannot train together.
        DistributedError: they do not fit together, or not all of them came.
    """
    if options.processes > 1 and options.executor != "sharded":
        raise RunError(
            f"--processes {options.processes} needs --executor sharded, which splits every batch; "
            f"{options.executor} is for one process"
        )
    global _is_first
    parent = os.environ.pop(_PARENT, None)
    if parent is None and options.processes > 1:
        return True
    if parent is not None:
        threading.Thread(target=_end_with, args=(int(parent),), daemon=True).start()
    if options.executor != "sharded":
        return True
    jn.init_distributed()
    _join_stdout()
    _is_first = jax.process_index() == 0
    return _is_first


def start_others(options: Options, folder: Path) -> None:
    """Start the other processes of `--processes`, and become process 0 of them.

    They get the command line of this one, and their devices by the environment. A signal to the
    group of this process, such as Ctrl-C, does not reach them: it is for this one, and all agree
    on where they stop.

    Args:
        options: of the run.
        folder: for `process_N.log`, what they print.

    Raises:
        RunError: this is no `python -m experiments.NAME`.
        DistributedError: as for `join`.
    """
    count = options.processes
    if count == 1:
        return
    if not process.is_command():
        raise RunError(f"--processes {count} needs a command, python -m experiments.NAME")
    address, connected = f"localhost:{free_port()}", threading.Event()
    read, _ = os.pipe()  # the other end stays open as long as this process lives
    for index in range(1, count):
        log = folder / f"process_{index}.log"
        with log.open("wb") as output:
            child = subprocess.Popen(
                [sys.executable, *sys.orig_argv[1:]],
                env={**os.environ, **_environment(address, count, index), _PARENT: str(read)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(read,),
                start_new_session=True,
            )
        watch = (index, child, log, connected)
        threading.Thread(target=_watch, args=watch, daemon=True).start()
    os.close(read)
    os.environ["JAX_LOCAL_DEVICE_IDS"] = "0"
    jn.init_distributed(address, count, 0)
    connected.set()
    _join_stdout()


def agree(what: str, value: Any = None) -> None:
    """Wait until all processes come here, with the same value.

    Args:
        what: what the value is, or what they wait for.
        value: what JSON can hold.

    Raises:
        RunError: the value of another process differs.
    """
    try:
        jn.check_agreement(what, value)
    except jn.DistributedError as error:
        raise RunError(str(error)) from error


def leave(error: str | None = None) -> None:
    """Leave the run before an exit without Python's own, see `jaxnets.distributed.leave`.

    Args:
        error: of this process; None: all stop.
    """
    if error is not None and not _is_first:
        time.sleep(_FIRST_SECONDS)
    distributed.leave(error)


def on_all(tree: Any) -> Any:
    """Replicate a tree over the devices of all processes, if there are several."""
    return jn.replicate(tree, jn.data_mesh()) if jax.process_count() > 1 else tree


def own(tree: Any) -> Any:
    """Return the copy of a replicated tree that this process has, on its first device."""
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(lambda array: array.addressable_data(0), tree)


class OnOwnCopy:
    """A hook that reads the copy of the state that its process has, without the other processes.

    Args:
        hook: any hook without `commit`.
    """

    def __init__(self, hook: jn.Hook) -> None:
        self._hook = hook

    def __call__(
        self, step: int, state: Any, metrics: Mapping[str, Any]
    ) -> Mapping[str, Any] | None:
        """Call the hook."""
        return self._hook(step, own(state), metrics)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hook, name)


def _environment(address: str, count: int, index: int) -> dict[str, str]:
    return {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(index),
        "JAX_LOCAL_DEVICE_IDS": str(index),  # of GPUs; on CPU each process has its own anyway
    }


def free_port() -> int:
    """Return a port that is free, like the next one, which JAX uses."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("localhost", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("localhost", port + 1))
            except (OSError, OverflowError):
                continue
            return port


def _join_stdout() -> None:
    """Send what libraries print on standard output to standard error: Gloo prints its groups."""
    if jax.process_count() > 1 and process.is_command():
        process.reserve_stdout()


def _watch(
    index: int, child: subprocess.Popen[bytes], log: Path, connected: threading.Event
) -> None:
    """End this process if another one ends with an error before all are connected.

    Later it is a lost process, as on any host.
    """
    code = child.wait()
    if code and not connected.wait(_LOST_SECONDS):
        lines = log.read_text(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "nothing printed")
        process.leave(f"error: process {index} ended with code {code}: {last}; see {log}", 2)


def _end_with(parent: int) -> None:
    """End this process with process 0, however that ends."""
    os.read(parent, 1)
    os._exit(process.STOPPED)
