"""Keeping freed memory, in processes of their own: it changes them for good."""

import json
import platform
import subprocess
import sys

import jax
import jax.monitoring
import pytest

from jaxnets import host

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="keep_freed_memory is for glibc, which is not here"
)

#: Counts the page faults of each of nine calls that need 128 MiB for a while. Nearly all tell, and
#: not their sum: now and then a small block that another thread takes stands where the large one
#: stood, and the memory grows once more.
COUNT = """
import json, resource, statistics, sys
import jax, jax.numpy as jnp
import jaxnets as jn

if sys.argv[1] == "kept":
    assert jn.keep_freed_memory()

@jax.jit
def f(x):
    # Two products need the array itself.
    y = jnp.sin(x[:, None] * x)
    return (y @ y[:, 0]) @ (y.T @ y[0])

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

x = jnp.linspace(1, 2, 1 << 12)
counts = []
for call in range(24):
    before = faults()
    value = float(f(x))
    counts.append(faults() - before)
if sys.argv[1] == "kept":
    assert jn.keep_freed_memory()  # again, which changes nothing
print(json.dumps({"faults": statistics.median(counts[15:]), "value": value}))
"""

#: Frees 256 MiB, and says that a compilation is over which took so many seconds.
COMPILED = """
import sys
import jax, numpy as np
import jaxnets as jn

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20

assert jn.keep_freed_memory()
before = resident()
filled = np.ones(2**25)
del filled
event = "/jax/core/compile/backend_compile_duration"
jax.monitoring.record_event_duration_secs(event, float(sys.argv[1]))
print(resident() - before)
"""


def run(program, argument):
    done = subprocess.run(
        [sys.executable, "-c", program, argument], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_kept_memory_is_not_fetched_again_and_numbers_stay():
    plain, kept = run(COUNT, "plain"), run(COUNT, "kept")
    assert kept["value"] == plain["value"]
    # 128 MiB are 32,000 faults with pages of 4 KiB, 64 with those of 2 MiB.
    assert kept["faults"] < plain["faults"] / 10, (kept, plain)


def test_what_a_long_compilation_frees_goes_back():
    assert run(COMPILED, "0.1") > 200
    assert run(COMPILED, "9.0") < 50


def test_jax_reports_compilations_under_the_name_that_is_waited_for():
    seen = []

    def listen(event, duration_secs, **_):
        seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: 2 * x)(1.0)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert host._COMPILATION in seen
