"""Keeping freed memory, in processes of their own: it changes them for good."""

import json
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="keep_memory is for glibc, which is not here"
)

#: Counts the page faults of five calls that need 128 MiB for a while.
COUNT = """
import json, resource, sys
import jax, jax.numpy as jnp
import jaxnets as jn

if sys.argv[1] == "kept":
    assert jn.keep_memory()

@jax.jit
def f(x):
    # Both orders of a sum in front of a product need the array itself.
    y = jnp.sin(x[:, None] * x)
    return (y @ y[:, 0]) @ (y.T @ y[0])

x = jnp.linspace(1, 2, 1 << 12)
for call in range(20):
    if call == 15:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    value = float(f(x))
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
if sys.argv[1] == "kept":
    assert jn.keep_memory()  # again, which changes nothing
print(json.dumps({"faults": faults, "value": value}))
"""


def run(mode):
    done = subprocess.run(
        [sys.executable, "-c", COUNT, mode], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_kept_memory_is_not_fetched_again_and_numbers_stay():
    plain, kept = run("plain"), run("kept")
    assert kept["value"] == plain["value"]
    # 5 calls x 64 MiB are 80,000 faults with pages of 4 KiB, 160 with those of 2 MiB.
    assert kept["faults"] < plain["faults"] / 10, (kept, plain)
