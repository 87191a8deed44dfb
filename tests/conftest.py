"""Four fake CPU devices, strict rank promotion, a shared compilation cache."""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Compiled programs are shared between tests and runs; the cache holds no results, only programs.
jax.config.update(
    "jax_compilation_cache_dir", os.path.join(tempfile.gettempdir(), "jaxnets-test-cache")
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture
def enable_x64():
    """Double precision for one test."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)
