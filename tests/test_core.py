import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets.core import DATA_AXIS, Mean, at_least_float32, bound_data_axis, rng_streams


def test_mean_over_any_split_equals_the_mean_of_the_whole():
    rng = np.random.default_rng(0)
    values, weights = rng.normal(size=10), rng.uniform(size=10)
    parts = [Mean.of(jnp.array(values[a:b]), jnp.array(weights[a:b])) for a, b in [(0, 3), (3, 10)]]
    np.testing.assert_allclose(
        (parts[0] + parts[1]).compute(), np.average(values, weights=weights), rtol=1e-6
    )


def test_weight_zero_ignores_even_a_nan():
    mean = Mean.of(jnp.array([1.0, jnp.nan]), jnp.array([1.0, 0.0]))
    assert float(mean.compute()) == 1.0


def test_weights_sum_over_leading_axes_and_keep_the_others():
    values = jnp.arange(6.0).reshape(2, 3)
    mean = Mean.of(values, jnp.array([1.0, 3.0]))
    np.testing.assert_allclose(mean.compute(), [(0 + 9) / 4, (1 + 12) / 4, (2 + 15) / 4])


def test_population_of_means_divides_member_by_member():
    means = jax.vmap(Mean.of)(jnp.array([[1.0, 3.0], [5.0, 7.0]]))
    np.testing.assert_allclose(means.compute(), [2.0, 6.0])


def test_low_precision_values_are_summed_in_float32():
    mean = Mean.of(jnp.ones(1000, jnp.bfloat16))
    assert mean.total.dtype == jnp.float32
    assert float(mean.total) == 1000


def test_weights_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"weights of shape \(3,\) do not fit"):
        Mean.of(jnp.ones(2), jnp.ones(3))


def test_adding_a_stream_shifts_no_other():
    key = jax.random.key(0)
    alone = rng_streams(key, "dropout")["dropout"]
    beside = rng_streams(key, "latent", "dropout")["dropout"]
    assert jnp.array_equal(jax.random.key_data(alone), jax.random.key_data(beside))


def test_streams_differ_from_each_other():
    streams = rng_streams(jax.random.key(0), "dropout", "latent")
    first, second = (jax.random.key_data(key) for key in streams.values())
    assert not jnp.array_equal(first, second)


def test_data_axis_is_seen_only_where_an_executor_binds_it():
    seen = []

    def probe(x):
        seen.append(bound_data_axis())
        return x

    jax.jit(probe)(jnp.ones(()))
    jax.vmap(probe, axis_name=DATA_AXIS)(jnp.ones(2))
    assert seen == [None, DATA_AXIS]


def test_widening_keeps_float64(enable_x64):
    assert at_least_float32(jnp.ones((), jnp.float64)).dtype == jnp.float64
    assert at_least_float32(jnp.ones((), jnp.bfloat16)).dtype == jnp.float32
