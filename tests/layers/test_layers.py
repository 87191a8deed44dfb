"""The layers that families share, against NumPy, SciPy and each other."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from jaxnets import core
from jaxnets.core import DATA_AXIS, Precision
from jaxnets.functional import activations
from jaxnets.functional.activations import ACTIVATIONS
from jaxnets.layers import dropout, linear, normalization

DOUBLE = Precision(jnp.float64, jnp.float64, jnp.float64)


def normal(shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def softplus(x):
    return np.logaddexp(x, 0)


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("elu", lambda x: np.where(x > 0, x, np.expm1(x))),
        ("gelu", lambda x: x * scipy.special.ndtr(x)),
        ("gelu_tanh", lambda x: x * scipy.special.expit(1.5957691216 * (x + 0.044715 * x**3))),
        ("identity", lambda x: x),
        ("leaky_relu", lambda x: np.where(x > 0, x, 0.01 * x)),
        ("mish", lambda x: x * np.tanh(softplus(x))),
        ("relu", lambda x: np.maximum(x, 0)),
        ("relu6", lambda x: np.clip(x, 0, 6)),
        ("selu", lambda x: 1.05070098 * np.where(x > 0, x, 1.67326324 * np.expm1(x))),
        ("sigmoid", scipy.special.expit),
        ("silu", lambda x: x * scipy.special.expit(x)),
        ("softplus", softplus),
        ("softsign", lambda x: x / (1 + np.abs(x))),
        ("squared_relu", lambda x: np.maximum(x, 0) ** 2),
        ("tanh", np.tanh),
    ],
)
def test_an_activation_equals_its_formula(name, formula):
    x = np.linspace(-4, 8, 50, dtype=np.float32)
    np.testing.assert_allclose(activations.activation(name)(jnp.asarray(x)), formula(x), atol=2e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_narrow_activation_and_its_gradient_are_rounded_once(name):
    x = jnp.linspace(-4, 8, 50, dtype=jnp.bfloat16)
    function = activations.activation(name)
    wide = x.astype(jnp.float32)
    both = jax.jit(lambda x: (function(x), jax.grad(lambda x: function(x).sum())(x)))
    for found, expected in zip(both(x), both(wide), strict=True):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_array_equal(found, expected.astype(jnp.bfloat16))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_gradient_of_an_activation_keeps_its_input_alone(name):
    x = jnp.linspace(-4, 8, 50)
    kept = jax.tree.leaves(jax.vjp(activations.activation(name), x)[1])
    assert sum(each.size for each in kept if each.dtype != bool) <= x.size


def test_an_unknown_activation_is_refused_with_the_known_names():
    with pytest.raises(ValueError, match=r"'rleu'.*gelu.*relu.*tanh"):
        activations.activation("rleu")


def test_a_callable_activation_is_used_as_it_is():
    assert activations.activation(jnp.sin) is jnp.sin


def test_dense_is_a_matrix_product_and_a_bias():
    x = normal((2, 3, 4))
    module = linear.Dense(5, bias_init=nn.initializers.normal())
    y, variables = module.init_with_output(jax.random.key(0), x)
    params = jax.tree.map(np.asarray, variables["params"])
    np.testing.assert_allclose(y, x @ params["kernel"] + params["bias"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 9, 4), (2, 9, 8, 4)])
@pytest.mark.parametrize(
    "options",
    [{}, {"strides": 2, "padding": 1}, {"dilation": 2, "groups": 2}, {"kernel_size": 1}],
    ids=str,
)
def test_convolution_has_the_values_of_the_linen_layer(shape, options):
    x, options = normal(shape), {"kernel_size": 3, **options}
    ours = linear.Convolution(6, **options)
    spatial = (options.pop("kernel_size"),) * (x.ndim - 2)
    names = {"strides": "strides", "padding": "padding", "dilation": "kernel_dilation"}
    linen = nn.Conv(
        6,
        spatial,
        feature_group_count=options.pop("groups", 1),
        **{names[name]: value for name, value in options.items()},
    )
    variables = ours.init(jax.random.key(0), x)
    np.testing.assert_allclose(
        ours.apply(variables, x), linen.apply(variables, x), rtol=1e-5, atol=1e-5
    )


def test_groups_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(ValueError, match="4 channels do not split into 3 groups"):
        linear.Convolution(6, groups=3).init(jax.random.key(0), normal((1, 8, 4)))


def test_batch_norm_in_training_gives_mean_zero_and_variance_one_far_from_zero_too():
    x = 1e3 + normal((64, 5, 3))
    module = normalization.BatchNorm()
    variables = module.init(jax.random.key(0), x)
    y, changed = module.apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(np.mean(y, (0, 1)), 0, atol=1e-3)
    np.testing.assert_allclose(np.std(y, (0, 1)), 1, atol=1e-3)
    stats = changed["batch_stats"]
    np.testing.assert_allclose(stats["mean"], 0.1 * np.mean(x, (0, 1)), rtol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * np.var(x, (0, 1)), rtol=1e-4)


def test_batch_norm_in_evaluation_uses_the_running_averages():
    x = normal((4, 3))
    stats = {"mean": jnp.array([1.0, 2.0, 3.0]), "var": jnp.array([4.0, 9.0, 16.0])}
    params = {"scale": jnp.array([1.0, 2.0, 3.0]), "bias": jnp.array([0.0, 1.0, 2.0])}
    y = normalization.BatchNorm(epsilon=0.0).apply({"params": params, "batch_stats": stats}, x)
    expected = (x - [1, 2, 3]) / [2, 3, 4] * [1, 2, 3] + [0, 1, 2]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_initializing_in_training_mode_leaves_the_running_averages_at_their_start():
    variables = normalization.BatchNorm().init(jax.random.key(0), normal((4, 3)) + 7, train=True)
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], 0)
    np.testing.assert_array_equal(variables["batch_stats"]["var"], 1)


@pytest.mark.four_devices
def test_batch_norm_over_four_devices_equals_the_whole_batch_in_value_state_and_gradient():
    with jax.enable_x64(True):
        x = normal((16, 3, 2), dtype=np.float64) + np.arange(16.0).reshape(16, 1, 1)
        module = normalization.BatchNorm(precision=DOUBLE)
        variables = module.init(jax.random.key(0), x)

        def loss(params, x):
            state = {"params": params, "batch_stats": variables["batch_stats"]}
            y, changed = module.apply(state, x, train=True, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(y + x)), changed

        gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
        (whole, whole_x), whole_state = jax.jit(gradient)(variables["params"], x)

        def shard(params, x):
            (per_device, per_device_x), changed = gradient(params, x)
            return jax.lax.psum(per_device, DATA_AXIS), per_device_x, changed

        over_devices = jax.pmap(shard, axis_name=DATA_AXIS, in_axes=(None, 0))
        summed, split_x, split_state = over_devices(variables["params"], x.reshape(4, 4, 3, 2))
        np.testing.assert_allclose(split_x.reshape(x.shape), whole_x, rtol=1e-10, atol=1e-10)
        for split, one in ((summed, whole), (split_state, whole_state)):
            for a, b in zip(jax.tree.leaves(split), jax.tree.leaves(one), strict=True):
                np.testing.assert_allclose(a[0], b, rtol=1e-10, atol=1e-10)


def test_layer_norm_normalizes_each_position_by_itself():
    x = 1e3 + normal((4, 5, 16))
    y, _ = normalization.LayerNorm().init_with_output(jax.random.key(0), x)
    expected = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    np.testing.assert_allclose(y, expected, atol=1e-3)


@pytest.mark.parametrize("norm", [normalization.BatchNorm, normalization.LayerNorm])
def test_a_norm_of_half_precision_computes_its_statistics_in_float32(norm):
    x = jnp.asarray(normal((512, 64)) * 300, jnp.float16)  # squares overflow float16
    module = norm(precision=Precision(compute=jnp.float16))
    options = {"train": True, "mutable": ["batch_stats"]} if norm is normalization.BatchNorm else {}
    y = module.apply(module.init(jax.random.key(0), x), x, **options)
    y = y[0] if options else y
    assert y.dtype == jnp.float16
    np.testing.assert_allclose(np.std(y.astype(np.float32)), 1, atol=2e-3)


def test_everything_is_float64_when_asked_for():
    with jax.enable_x64(True):
        x = normal((4, 6, 3), dtype=np.float64)
        for module in (
            linear.Dense(2, precision=DOUBLE),
            linear.Convolution(2, precision=DOUBLE),
            normalization.BatchNorm(precision=DOUBLE),
            normalization.LayerNorm(precision=DOUBLE),
        ):
            results = module.init_with_output(jax.random.key(0), x)
            assert {leaf.dtype for leaf in jax.tree.leaves(results)} == {jnp.dtype("float64")}


def test_dropout_keeps_the_mean_and_drops_at_its_rate():
    x = jnp.ones((100, 200))
    y = dropout.Dropout(0.3).apply({}, x, train=True, rngs={"dropout": jax.random.key(0)})
    kept = np.asarray(y) != 0
    np.testing.assert_allclose(kept.mean(), 0.7, atol=0.01)
    np.testing.assert_allclose(y[kept], 1 / 0.7, rtol=1e-6)


def test_dropout_per_example_keeps_or_drops_whole_examples():
    x = jnp.ones((64, 3, 5))
    module = dropout.Dropout(0.5, per_example=True)
    y = np.asarray(module.apply({}, x, train=True, rngs={"dropout": jax.random.key(0)}))
    assert set(np.unique(y)) == {0.0, 2.0}
    assert all(len(np.unique(example)) == 1 for example in y)


def test_dropout_in_evaluation_is_the_identity_and_needs_no_key():
    x = normal((3, 4))
    np.testing.assert_array_equal(dropout.Dropout(0.9).apply({}, x), x)


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_a_dropout_rate_that_is_no_probability_below_one_is_refused(rate):
    with pytest.raises(ValueError, match=f"rate {rate}"):
        dropout.Dropout(rate)


def test_an_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="'group'"):
        normalization.check_norm("group")


def test_recorded_values_do_not_become_variables_and_the_last_one_stays():
    class Recorder(nn.Module):
        @nn.compact
        def __call__(self, x):
            core.record(self, "value", x)
            core.record(self, "value", x + 1)
            return x

    assert Recorder().init(jax.random.key(0), 1.0) == {}
    assert core.capture(Recorder(), {}, 1.0) == (1.0, {"value": 2.0})


def test_a_batch_norm_network_trains_under_a_scan():
    x, module = normal((8, 4, 4, 1)), normalization.BatchNorm()
    variables = module.init(jax.random.key(0), x)
    optimizer = optax.sgd(0.1)

    def step(carry, _):
        params, stats, opt_state = carry

        def loss(params):
            all_variables = {"params": params, "batch_stats": stats}
            y, changed = module.apply(all_variables, x, train=True, mutable=["batch_stats"])
            return jnp.mean((y - 1) ** 2), changed["batch_stats"]

        (value, stats_after), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return (optax.apply_updates(params, updates), stats_after, opt_state), value

    start = (variables["params"], variables["batch_stats"], optimizer.init(variables["params"]))
    _, losses = jax.jit(lambda carry: jax.lax.scan(step, carry, length=10))(start)
    assert losses[-1] < 0.2 * losses[0]
