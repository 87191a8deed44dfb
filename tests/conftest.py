"""Four fake CPU devices, strict rank promotion, and programs that compile fast.

With `JAX_PLATFORMS=cuda,cpu` the tests run on a GPU; what needs several devices then skips.
"""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

ON_CPU = os.environ["JAX_PLATFORMS"] == "cpu"
# Most of the tests' time is XLA compiling tiny programs; see `optimized_processes`.
COMPILE_FAST = " --xla_backend_optimization_level=0" if ON_CPU else ""
if ON_CPU and jax.__version_info__ < (0, 11):  # later ones have no other, and refuse the flag
    COMPILE_FAST += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + COMPILE_FAST

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
if not ON_CPU:  # the tests compare digits that TF32 does not have
    jax.config.update("jax_default_matmul_precision", "highest")


# Of each of the processes that run the tests.
MOST_BYTES = 5 * 2**30


def resident_bytes():
    """Return the memory of this process, 0 where the system does not tell."""
    try:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def pytest_runtest_setup(item):
    if item.get_closest_marker("four_devices") and jax.device_count() < 4:
        pytest.skip(f"needs 4 devices, and there are {jax.device_count()} here")


@pytest.fixture
def on_cpu():
    """Compile for the CPU, wherever the tests run."""
    with jax.default_device(jax.devices("cpu")[0]):
        yield


@pytest.fixture
def enable_x64():
    """Double precision for one test."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture
def optimized_processes(monkeypatch):
    """Let the processes that a test starts compile as they would for a user."""
    flags = os.environ["XLA_FLAGS"].replace(COMPILE_FAST, "")
    monkeypatch.setenv("XLA_FLAGS", flags.strip())  # a blank would be taken for a file's name


@pytest.fixture
def forget_traces():
    """Call this behind a patch of what is read while tracing; what it traced is forgotten again."""
    yield jax.clear_caches
    jax.clear_caches()


@pytest.fixture(autouse=True, scope="module")
def free_programs():
    """Drop the compiled programs when the process gets large: all together take gigabytes.

    Not after every module: the next one would compile the same small programs again.
    """
    yield
    if resident_bytes() > MOST_BYTES:
        jax.clear_caches()
