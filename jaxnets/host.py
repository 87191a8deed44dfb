"""The host: its cores, and what its allocator does with the memory that XLA frees."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from typing import Any

import jax
import jax.monitoring
from jax._src import xla_bridge

# The parameters of glibc's mallopt, from <malloc.h>.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_NEVER = -1
_COMPILATION = "/jax/core/compile/backend_compile_duration"
# A compilation of so many seconds leaves much behind; after shorter ones a search does not pay.
_LONG = 0.5


@functools.cache
def keep_freed_memory() -> bool:
    """Keep freed memory in this process, which makes large steps on CPU faster.

    XLA allocates its temporary memory anew for every call. By default the C library takes large
    blocks from the system and returns them at once, and each page of them costs a fault when it is
    touched again: a seventh to a third of the time of a large step. This tells it to keep them.
    And because it keeps large blocks for the main thread only, a call on CPU then runs in the
    thread that makes it, and returns when its results are there; threads that prepare batches go
    on beside it. What a long compilation has freed does go back to the system, in front of the
    first step: for a ResNet-18 as much as all that its steps need. Numbers do not change, nor do
    programs on accelerators.

    Call this once in a process, before JAX's first computation, and train in the main thread. The
    price: the process keeps the memory of its largest step, and steps of a few milliseconds, which
    no longer run beside what Python does between them, take up to a tenth longer.

    Returns:
        Whether memory is kept; False, with nothing changed, where the C library is not glibc.

    Raises:
        RuntimeError: JAX has computed something in this process, which fixes how it makes calls.

    Example:
        >>> _ = jax.numpy.zeros(1)
        >>> keep_freed_memory()  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        RuntimeError: keep_freed_memory comes too late: JAX has begun to compute; call it first...
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        library = ctypes.CDLL("libc.so.6")
        mallopt, trim = library.mallopt, library.malloc_trim
    except (OSError, AttributeError):
        return False
    if xla_bridge.backends_are_initialized():
        raise RuntimeError(
            "keep_freed_memory comes too late: JAX has begun to compute; call it first, in a "
            "notebook after a restart of its kernel"
        )
    jax.config.update("jax_cpu_enable_async_dispatch", False)

    def give_back(event: str, duration_secs: float, **_: Any) -> None:
        if event == _COMPILATION and duration_secs > _LONG:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(give_back)
    wanted = {_MMAP_MAX: 0, _TRIM_THRESHOLD: _NEVER, _TOP_PAD: 1 << 26}
    accepted = [mallopt(name, value) == 1 for name, value in wanted.items()]
    return all(accepted)


def usable_cores() -> int:
    """Return how many processor cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
