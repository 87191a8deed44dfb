"""Four fake CPU devices, strict rank promotion, and programs that compile fast."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Nearly all of the tests' time is LLVM optimising tiny programs. The slow group runs with the
# default, as do the notebooks and everything outside of the tests.
if os.environ.get("JAXNETS_OPTIMIZED_TESTS") != "1":
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=0".strip()

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def enable_x64():
    """Double precision for one test."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture(autouse=True, scope="module")
def free_programs():
    """Forget compiled programs at the end of a module: together they take gigabytes."""
    yield
    jax.clear_caches()
