"""`keep_freed_memory`, in processes of its own because it changes a process for good."""

import json
import platform
import subprocess
import sys

import jax
import jax.monitoring
import pytest

from jaxnets import host

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="keep_freed_memory needs glibc"
)

#: With "kept" it frees 256 MiB and reports one short and one long compilation, after each of which
#: it prints the growth of the process. Then it counts the page faults of calls that need 64 MiB of
#: temporary memory; malloc keeps smaller blocks of its own accord. The median counts: now and then
#: a small block of another thread splits the free memory, and the heap grows once more.
PROGRAM = """
import json, resource, statistics, sys
import jax, jax.numpy as jnp, numpy as np
import jaxnets as jn

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20

result = {}
if sys.argv[1] == "kept":
    assert jn.keep_freed_memory()
    before = resident()
    filled = np.ones(2**25)
    del filled
    for name, seconds in ("short", 0.1), ("long", 9.0):
        event = "/jax/core/compile/backend_compile_duration"
        jax.monitoring.record_event_duration_secs(event, seconds)
        result[name] = resident() - before

@jax.jit
def f(x):
    # Two products, so that the matrix is materialized.
    y = x[:, None] * x
    return (y @ y[:, 0]) @ (y.T @ y[0])

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

x = jnp.linspace(1, 2, 1 << 12)
counts = []
for call in range(12):
    before = faults()
    result["value"] = float(f(x))
    counts.append(faults() - before)
result["faults"] = statistics.median(counts[5:])
if sys.argv[1] == "kept":
    assert jn.keep_freed_memory()  # again, which changes nothing
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def results():
    """Return what the program printed, with freed memory kept and without."""
    done = {
        name: subprocess.run(
            [sys.executable, "-c", PROGRAM, name], capture_output=True, text=True, check=True
        )
        for name in ("plain", "kept")
    }
    return {name: json.loads(process.stdout) for name, process in done.items()}


def test_kept_memory_causes_no_page_faults_and_results_stay(results):
    plain, kept = results["plain"], results["kept"]
    assert kept["value"] == plain["value"]
    # 64 MiB are 16,000 faults with pages of 4 KiB, 32 with those of 2 MiB.
    assert kept["faults"] < plain["faults"] / 10, results


def test_memory_is_returned_after_a_long_compilation_only(results):
    assert results["kept"]["short"] > 200
    assert results["kept"]["long"] < 50


def test_jax_reports_compilations_under_the_event_that_is_listened_to():
    events = []

    def listen(event, duration_secs, **_):
        events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: 2 * x)(1.0)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert host._COMPILATION in events
