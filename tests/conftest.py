"""Four virtual CPU devices, strict rank promotion, and fast compilation.

With `JAX_PLATFORMS=cuda,cpu` the tests run on a GPU; tests that need several devices are skipped.
"""

import gc
import os
import pathlib
import signal

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

# The background job of a shell ignores SIGINT, and so would the processes that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Tracing makes many objects that live long; collecting them again and again takes 5% of the tests.
gc.set_threshold(200_000, 20, 100)

ON_CPU = os.environ["JAX_PLATFORMS"] == "cpu"
# XLA compiling small programs takes most of the tests' time; see `optimized_processes`.
COMPILE_FAST = " --xla_backend_optimization_level=0" if ON_CPU else ""
if ON_CPU and jax.__version_info__ < (0, 11):  # later versions reject the flag
    COMPILE_FAST += " --xla_cpu_use_fusion_emitters=false"
    COMPILE_FAST += " --xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + COMPILE_FAST

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
if not ON_CPU:  # the tolerances are those of float32, not of TF32
    jax.config.update("jax_default_matmul_precision", "highest")


# Of each process that runs the tests.
MOST_BYTES = 5 * 2**30


def resident_bytes():
    """Return the resident memory of this process, 0 if the system does not report it."""
    try:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def pytest_runtest_setup(item):
    if item.get_closest_marker("four_devices") and jax.device_count() < 4:
        pytest.skip(f"needs 4 devices, has {jax.device_count()}")


@pytest.fixture
def on_cpu():
    """Compile for the CPU, wherever the tests run."""
    with jax.default_device(jax.devices("cpu")[0]):
        yield


@pytest.fixture
def enable_x64():
    """Enable double precision for one test."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture
def optimized_processes(monkeypatch):
    """Let the processes that a test starts compile with full optimization, as for a user."""
    flags = os.environ["XLA_FLAGS"].replace(COMPILE_FAST, "")
    monkeypatch.setenv("XLA_FLAGS", flags.strip())  # XLA takes a leading blank for a file name


@pytest.fixture
def forget_traces():
    """A function to call after a patch of a value that is read while tracing.

    It drops the earlier traces; those with the patch are dropped after the test.
    """
    yield jax.clear_caches
    jax.clear_caches()


@pytest.fixture(autouse=True, scope="module")
def free_programs():
    """Drop the compiled programs when the process gets large: all of them take gigabytes.

    Not after every module, because the next one would compile the same small programs again.
    """
    yield
    if resident_bytes() > MOST_BYTES:
        jax.clear_caches()
