import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnets.core import (
    DATA_AXIS,
    Mean,
    Precision,
    Update,
    at_least_float32,
    at_least_int32,
    bound_data_axis,
    drawn_in_float32,
    rng_streams,
    steps_per_batch,
)
from jaxnets.data import chunked
from jaxnets.models.feedforward import MLP


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


def test_sums_in_float64_are_divided_in_float64():
    sums = Mean(np.array([[1.0, 2.0], [0.0, 0.0]]), np.array([3.0, 0.0]))
    mean = sums.compute()
    assert mean.dtype == np.float64
    np.testing.assert_array_equal(mean, [[1 / 3, 2 / 3], [np.nan, np.nan]])


def test_low_precision_values_are_summed_in_float32():
    mean = Mean.of(jnp.ones(1000, jnp.bfloat16))
    assert mean.total.dtype == jnp.float32
    assert float(mean.total) == 1000


def test_weights_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"weights of shape \(3,\) do not fit"):
        Mean.of(jnp.ones(2), jnp.ones(3))


def test_adding_a_stream_does_not_change_the_others():
    key = jax.random.key(0)
    one = rng_streams(key, "dropout")["dropout"]
    of_two = rng_streams(key, "latent", "dropout")["dropout"]
    assert jnp.array_equal(jax.random.key_data(one), jax.random.key_data(of_two))


def test_streams_differ_from_each_other():
    streams = rng_streams(jax.random.key(0), "dropout", "latent")
    first, second = (jax.random.key_data(key) for key in streams.values())
    assert not jnp.array_equal(first, second)


def test_the_data_axis_is_returned_only_where_it_is_bound():
    axes = []

    def probe(x):
        axes.append(bound_data_axis())
        return x

    jax.jit(probe)(jnp.ones(()))
    jax.vmap(probe, axis_name=DATA_AXIS)(jnp.ones(2))
    assert axes == [None, DATA_AXIS]


def test_a_plain_function_is_a_source_of_single_steps():
    def source(first):
        yield from ()

    assert steps_per_batch(source) == 1
    assert steps_per_batch(chunked(source, 3)) == 3


@pytest.mark.parametrize(
    ("objective", "optimizer", "message"),
    [
        (MLP(features=(2,), num_outputs=1), optax.sgd(0.1), "is the module MLP; give a loss"),
        (None, optax.sgd(0.1), "objective is None; give a loss"),
        (optax.sgd(0.1), lambda *args: None, "GradientTransformation.* give a loss"),
        (lambda *args: None, 1e-3, r"optimizer is 0.001; give an Optax optimizer"),
        (lambda *args: None, optax.adam, r"function adam .*give an Optax optimizer"),
        (lambda *args: None, optax.constant_schedule(0.1), "give an Optax optimizer"),
    ],
)
def test_an_update_takes_a_loss_and_an_optimizer(objective, optimizer, message):
    with pytest.raises(TypeError, match=message):
        Update(objective, optimizer)


def test_widening_keeps_float64(enable_x64):
    assert at_least_float32(jnp.ones((), jnp.float64)).dtype == jnp.float64
    assert at_least_float32(jnp.ones((), jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32"])
def test_integers_are_compared_with_bounds_that_their_own_type_cannot_hold(dtype):
    values = np.array([0, 100], dtype)
    wide = jax.jit(at_least_int32)(values)
    assert wide.dtype == jnp.int32
    for compared in (wide, at_least_int32(values)):
        np.testing.assert_array_equal(compared >= 256, [False, False])
        np.testing.assert_array_equal(compared - 101, [-101, -1])


@pytest.mark.parametrize("value", [np.uint64(2**64 - 1), np.uint32(2**32 - 1), np.int64(2**32 + 3)])
def test_integers_that_jax_cannot_hold_stay_out_of_range(value):
    values = np.array([value])
    assert jnp.asarray(at_least_int32(values)).item() > 2**30
    if value.dtype == np.uint32:
        assert jax.jit(at_least_int32)(values).item() > 2**30


def test_a_weight_below_zero_is_refused_or_nan():
    weights = np.array([1.0, -1.0], np.float32)
    with pytest.raises(ValueError, match=r"weights hold -1\.0; give 0 or more"):
        Mean.of(jnp.ones(2), weights)
    assert np.isnan(jax.jit(lambda w: Mean.of(jnp.ones(2), w).compute())(weights))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_random_numbers_of_16_bits_have_the_tails_and_the_mean_of_the_distribution(dtype):
    normal = drawn_in_float32(jax.random.normal)
    numbers = normal(jax.random.key(0), (100_000,), dtype)
    assert numbers.dtype == dtype
    exact = np.asarray(numbers, np.float64)
    assert np.sum(np.abs(exact) > 3.5) == pytest.approx(46.5, abs=25)  # 2 (1 - cdf(3.5)) of them
    assert abs(exact.mean()) < 0.01 and exact.std() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("sampler", [jax.random.uniform, jax.nn.initializers.he_normal()])
def test_random_numbers_of_32_bits_are_those_of_the_sampler(sampler):
    key, shape = jax.random.key(0), (3, 4)
    expected = sampler(key, shape, jnp.float32)
    np.testing.assert_array_equal(drawn_in_float32(sampler)(key, shape, jnp.float32), expected)


@pytest.mark.parametrize("dtype", ["bf16", None, jnp.int8, 16])
@pytest.mark.parametrize("name", ["parameter", "compute", "output"])
def test_a_precision_is_made_of_floating_dtypes(name, dtype):
    with pytest.raises(ValueError, match=rf"Precision\({name}=.*\) is no floating dtype; give"):
        Precision(**{name: dtype})
    for good in ("bfloat16", jnp.float16, np.dtype(np.float64), float):
        assert getattr(Precision(**{name: good}), name) == good
