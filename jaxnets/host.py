"""The host: its processor cores, and the settings of its memory allocator."""

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
# Compilations of this many seconds free much memory; after shorter ones malloc_trim is not worth
# its search for free pages.
_LONG = 0.5


@functools.cache
def keep_freed_memory() -> bool:
    """Keep freed memory in the allocator, so that large steps on CPU cause no page faults.

    Sets three parameters of glibc's malloc with `mallopt`: `M_MMAP_MAX` = 0 (large blocks come
    from the heap, not from `mmap`), `M_TRIM_THRESHOLD` = never (the top of the heap is not
    returned to the system), `M_TOP_PAD` = 64 MiB (the heap grows in steps of this size).

    Why: XLA allocates temporary memory anew in every call. By default glibc takes each large block
    with `mmap` and returns it with `munmap`, so each page faults when it is touched again: a
    seventh to a third of the time of a large step.

    It also turns off JAX's asynchronous dispatch on CPU, because only the heap of the main thread
    can grow to such blocks: calls run in the calling thread and return with their results. Threads
    that prepare batches still run concurrently. After a long compilation `malloc_trim` returns the
    memory that the compiler has freed: for a ResNet-18 as much as its steps need. Results do not
    change, nor do programs on accelerators.

    Call this once in a process, before the first computation of JAX, and train in the main thread.
    Costs: the process keeps the memory of its largest step. Steps of a few milliseconds take up to
    a tenth longer, because they no longer overlap with the Python code between them.

    Returns:
        Whether freed memory is kept; False, with nothing changed, if the C library is not glibc.

    Raises:
        RuntimeError: JAX has computed something in this process, which fixes its dispatch.

    Example:
        >>> _ = jax.numpy.zeros(1)
        >>> keep_freed_memory()  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        RuntimeError: keep_freed_memory comes too late: JAX has computed already; call it first...
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
            "keep_freed_memory comes too late: JAX has computed already; call it first, in a "
            "notebook after a restart of the kernel"
        )
    jax.config.update("jax_cpu_enable_async_dispatch", False)

    def trim_after_compilation(event: str, duration_secs: float, **_: Any) -> None:
        if event == _COMPILATION and duration_secs > _LONG:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(trim_after_compilation)
    wanted = {_MMAP_MAX: 0, _TRIM_THRESHOLD: _NEVER, _TOP_PAD: 1 << 26}
    accepted = [mallopt(name, value) == 1 for name, value in wanted.items()]
    return all(accepted)


def usable_cores() -> int:
    """Return the number of processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
