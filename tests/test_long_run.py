"""A training of hours needs no more memory, descriptors, threads and time at its end."""

import os
import pathlib
import subprocess
import sys

import pytest
from long_run import BOUNDS, faults, growth

SECONDS = "JAXNETS_LONG_RUN_SECONDS"


def samples_of(count=100, **growing):
    """Return samples of one minute each; the values grow by a share of 100 in an hour."""
    return [
        {"seconds": 60.0 * n, **{name: 100 + growing.get(name, 0.0) * n / 60 for name in BOUNDS}}
        for n in range(count)
    ]


def test_what_grows_is_named_and_the_warm_up_does_not_count():
    steady = samples_of()
    for sample in steady[:10]:
        sample["memory_mb"] = 1.0
    assert faults(steady) == []
    growing = samples_of(memory_mb=3.0, live_arrays=0.4, descriptors=-50.0)  # to a mean of 102.7
    assert faults(growing) == ["memory_mb grows by 2.92% an hour, more than 2.0%"]
    assert growth(growing, "memory_mb")[1] == pytest.approx(3.0)
    assert len(faults(samples_of(**dict.fromkeys(BOUNDS, 30.0)))) == len(BOUNDS)


@pytest.mark.exhaustive
@pytest.mark.skipif(not pathlib.Path("/proc/self").exists(), reason="no /proc on this system")
def test_a_training_of_hours_stays_as_it_is_after_the_warm_up(tmp_path, optimized_processes):
    script = pathlib.Path(__file__).parent / "long_run.py"
    environment = {
        **os.environ,
        "PYTHONPATH": str(script.parents[1]),
        "NPROC": "1",  # one thread of XLA
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_cpu_multi_thread_eigen=false".strip(),
    }
    seconds = os.environ.get(SECONDS, "7200")
    run = subprocess.run(
        [sys.executable, "-W", "error", str(script), str(tmp_path), seconds, "0.5"],
        env=environment,
        capture_output=True,
        text=True,
    )
    print(run.stdout)
    assert run.returncode == 0, run.stderr
