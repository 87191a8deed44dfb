"""The layers that families share, against NumPy, SciPy, Flax and each other."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from checks import DOUBLE, mostly_slow

from jaxnets import core
from jaxnets.core import DATA_AXIS, Precision
from jaxnets.functional import activations
from jaxnets.functional.activations import ACTIVATIONS
from jaxnets.layers import dropout, embedding, linear, normalization


def normal(shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def softplus(x):
    return np.logaddexp(x, 0)


POINTS = np.linspace(-4, 8, 50, dtype=np.float32)


@functools.cache
def values_and_gradients(points_dtype, dtype):
    """Every activation and its gradient at rounded `POINTS`, in one program."""

    def pair(function, x):
        return function(x), jax.grad(lambda x: function(x).sum())(x)

    everything = jax.jit(lambda x: {name: pair(each, x) for name, each in ACTIVATIONS.items()})
    return everything(jnp.asarray(POINTS, points_dtype).astype(dtype))


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("celu", lambda x: np.where(x > 0, x, np.expm1(x))),
        ("elu", lambda x: np.where(x > 0, x, np.expm1(x))),
        ("gelu", lambda x: x * scipy.special.ndtr(x)),
        ("gelu_tanh", lambda x: x * scipy.special.expit(1.5957691216 * (x + 0.044715 * x**3))),
        ("hard_sigmoid", lambda x: np.clip(x + 3, 0, 6) / 6),
        ("hard_swish", lambda x: x * np.clip(x + 3, 0, 6) / 6),
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
    value, _ = values_and_gradients(jnp.float32, jnp.float32)[name]
    np.testing.assert_allclose(value, formula(POINTS), atol=2e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_bfloat16_activation_and_its_gradient_are_rounded_once(name):
    both = (values_and_gradients(jnp.bfloat16, d)[name] for d in (jnp.bfloat16, jnp.float32))
    for found, exact in zip(*both, strict=True):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_only_residual_of_an_activation_is_its_input(name):
    x = jax.ShapeDtypeStruct(POINTS.shape, jnp.float32)
    pull = jax.eval_shape(lambda x: jax.vjp(activations.activation(name), x)[1], x)
    residuals = jax.tree.leaves(pull)
    assert sum(each.size for each in residuals if each.dtype != bool) <= x.size


def test_an_unknown_activation_is_refused_with_the_known_names():
    with pytest.raises(ValueError, match=r"'rleu'.*gelu.*relu.*tanh"):
        activations.activation("rleu")


def test_an_activation_is_looked_up_and_a_callable_is_used_unchanged():
    assert activations.activation("gelu") is ACTIVATIONS["gelu"]
    assert activations.activation(jnp.sin) is jnp.sin


def test_an_activation_of_integers_is_that_of_jax():
    np.testing.assert_allclose(
        activations.activation("tanh")(jnp.arange(-2, 3)), np.tanh(np.arange(-2, 3)), rtol=1e-6
    )


def test_dense_is_a_matmul_and_a_bias():
    x = normal((2, 3, 4))
    module = linear.Dense(5, bias_init=nn.initializers.normal())
    y, variables = jax.jit(module.init_with_output)(jax.random.key(0), x)
    params = jax.tree.map(np.asarray, variables["params"])
    assert params["bias"].any()
    np.testing.assert_allclose(y, x @ params["kernel"] + params["bias"], rtol=1e-5, atol=1e-6)


TIME, IMAGE = (2, 9, 4), (2, 9, 8, 4)
OPTIONS = {
    "plain": {},
    "strides": {"strides": 2, "padding": 1},
    "groups": {"dilation": 2, "groups": 2},
    "pointwise": {"kernel_size": 1},
}


@pytest.mark.parametrize(
    ("shape", "name"),
    mostly_slow(
        itertools.product((TIME, IMAGE), OPTIONS),
        [(TIME, "plain"), (IMAGE, "strides"), (TIME, "groups"), (IMAGE, "pointwise")],
    ),
)
def test_convolution_has_the_variables_and_values_of_the_linen_layer(shape, name):
    x, options = normal(shape), {"kernel_size": 3, **OPTIONS[name]}
    ours = linear.Convolution(6, **options)
    names = {"strides": "strides", "padding": "padding", "dilation": "kernel_dilation"}
    names["groups"] = "feature_group_count"
    spatial = (options.pop("kernel_size"),) * (x.ndim - 2)
    linen = nn.Conv(6, spatial, **{names[key]: value for key, value in options.items()})

    @jax.jit
    def both(x):
        return [module.init_with_output(jax.random.key(0), x) for module in (ours, linen)]

    (y, variables), (expected, linen_variables) = both(x)
    jax.tree.map(np.testing.assert_array_equal, variables, linen_variables)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_groups_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(ValueError, match="4 channels do not split into 3 groups"):
        jax.eval_shape(linear.Convolution(6, groups=3).init, jax.random.key(0), normal((1, 8, 4)))


def train(module, x):
    """Initialize a module, and apply it once in training mode."""
    variables = module.init(jax.random.key(0), x)
    return module.apply(variables, x, train=True, mutable=["batch_stats"])


def test_batch_norm_in_training_gives_mean_zero_and_variance_one_far_from_zero_too():
    x = 1e3 + normal((64, 5, 3))
    y, changed = jax.jit(functools.partial(train, normalization.BatchNorm()))(x)
    np.testing.assert_allclose(np.mean(y, (0, 1)), 0, atol=1e-3)
    np.testing.assert_allclose(np.std(y, (0, 1)), 1, atol=1e-3)
    stats = changed["batch_stats"]
    np.testing.assert_allclose(stats["mean"], 0.1 * np.mean(x, (0, 1)), rtol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * np.var(x, (0, 1)), rtol=1e-4)


def test_norms_have_the_variables_and_values_of_the_linen_layers():
    x = normal((8, 5, 3))

    @jax.jit
    def both(x):
        pairs = [
            (normalization.BatchNorm(), nn.BatchNorm(use_running_average=False, momentum=0.9)),
            (normalization.LayerNorm(), nn.LayerNorm()),
            (normalization.RMSNorm(), nn.RMSNorm()),
        ]
        options = [{"train": True, "mutable": ["batch_stats"]}, {"mutable": ["batch_stats"]}]
        results = []
        for norms in pairs:
            for norm, option in zip(norms, options, strict=True):
                option = option if isinstance(norm, normalization.BatchNorm) else options[1]
                variables = norm.init(jax.random.key(0), x)
                results.append((variables, norm.apply(variables, x, **option)))
        return results

    results = both(x)
    for ours, linen in zip(results[::2], results[1::2], strict=True):
        assert jax.tree.structure(ours) == jax.tree.structure(linen)
        for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(linen), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_batch_norm_in_evaluation_uses_the_running_averages():
    x = normal((4, 3))
    stats = {"mean": np.float32([1, 2, 3]), "var": np.float32([4, 9, 16])}
    params = {"scale": np.float32([1, 2, 3]), "bias": np.float32([0, 1, 2])}
    module = normalization.BatchNorm(epsilon=0.0)
    y = jax.jit(module.apply)({"params": params, "batch_stats": stats}, x)
    expected = (x - [1, 2, 3]) / [2, 3, 4] * [1, 2, 3] + [0, 1, 2]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_initializing_in_training_mode_leaves_the_running_averages_at_their_start():
    init = functools.partial(normalization.BatchNorm().init, train=True)
    stats = jax.jit(init)(jax.random.key(0), normal((4, 3)) + 7)["batch_stats"]
    np.testing.assert_array_equal(stats["mean"], 0)
    np.testing.assert_array_equal(stats["var"], 1)


@pytest.mark.four_devices
def test_batch_norm_over_four_devices_equals_the_whole_batch_in_value_state_and_gradient():
    with jax.enable_x64(True):
        x = normal((16, 3, 2), dtype=np.float64) + np.arange(16.0).reshape(16, 1, 1)
        module = normalization.BatchNorm(precision=DOUBLE)
        variables = jax.jit(module.init)(jax.random.key(0), x)

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


def test_layer_norm_normalizes_each_position_separately():
    x = 1e3 + normal((4, 5, 16))
    y, _ = jax.jit(normalization.LayerNorm().init_with_output)(jax.random.key(0), x)
    expected = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    np.testing.assert_allclose(y, expected, atol=1e-3)


@pytest.mark.parametrize("norm", [normalization.BatchNorm, normalization.LayerNorm])
def test_a_norm_of_half_precision_computes_its_statistics_in_float32(norm):
    x = np.asarray(normal((512, 64)) * 300, np.float16)  # squares overflow float16
    module = norm(precision=Precision(compute=jnp.float16))
    if norm is normalization.BatchNorm:
        y, _ = jax.jit(functools.partial(train, module))(x)
    else:
        y, _ = jax.jit(module.init_with_output)(jax.random.key(0), x)
    assert y.dtype == jnp.float16
    np.testing.assert_allclose(np.std(np.asarray(y, np.float32)), 1, atol=2e-3)


@pytest.mark.parametrize(
    "module",
    [
        linear.Dense(2, precision=DOUBLE),
        linear.Convolution(2, precision=DOUBLE),
        normalization.BatchNorm(precision=DOUBLE),
        normalization.LayerNorm(precision=DOUBLE),
        normalization.RMSNorm(precision=DOUBLE),
    ],
    ids=lambda module: type(module).__name__,
)
def test_everything_is_float64_when_asked_for(module):
    with jax.enable_x64(True):
        x = jax.ShapeDtypeStruct((4, 6, 3), jnp.float64)
        results = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(results)} == {jnp.dtype("float64")}


def dropped(module, shape):
    apply = jax.jit(
        lambda key: module.apply({}, jnp.ones(shape), train=True, rngs={"dropout": key})
    )
    return np.asarray(apply(jax.random.key(0)))


def test_dropout_preserves_the_mean_and_drops_at_its_rate():
    y = dropped(dropout.Dropout(0.3), (100, 200))
    np.testing.assert_allclose((y != 0).mean(), 0.7, atol=0.01)
    np.testing.assert_allclose(y[y != 0], 1 / 0.7, rtol=1e-6)


def test_dropout_per_example_drops_whole_examples():
    y = dropped(dropout.Dropout(0.5, per_example=True), (64, 3, 5))
    assert set(np.unique(y)) == {0.0, 2.0}
    assert all(len(np.unique(example)) == 1 for example in y)


def test_dropout_of_shared_axes_drops_the_same_channels_at_every_step():
    y = dropped(dropout.Dropout(0.5, shared_axes=(1,)), (8, 3, 5))
    assert set(np.unique(y)) == {0.0, 2.0}
    np.testing.assert_array_equal(y, np.broadcast_to(y[:, :1], y.shape))
    assert len(np.unique(y[:, 0], axis=0)) > 1


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

    @jax.jit
    def losses():
        variables = module.init(jax.random.key(0), x)
        start = (variables["params"], variables["batch_stats"], optimizer.init(variables["params"]))
        return jax.lax.scan(step, start, length=10)[1]

    first, *_, last = losses()
    # The loss is 1 at the start, where y has mean 0 and variance 1, plus that variance.
    np.testing.assert_allclose(first, 2, rtol=1e-3)
    assert last < 0.2 * first


@pytest.mark.parametrize("stored", [jnp.float32, jnp.bfloat16])
def test_the_gradient_of_a_token_that_occurs_often_is_summed_in_float32(stored):
    table = embedding.Embedding(3, 2, precision=Precision(parameter=stored, compute=jnp.bfloat16))
    params = {"embedding": jnp.ones((3, 2), stored)}
    tokens = jnp.concatenate([jnp.zeros(4096, jnp.int32), jnp.array([2])])

    @jax.jit
    @jax.grad
    def gradient(params):
        return jnp.sum(table.apply({"params": params}, tokens).astype(jnp.float32))

    found = gradient(params)["embedding"]
    np.testing.assert_array_equal(found.astype(jnp.float32), [[4096] * 2, [0] * 2, [1] * 2])
