"""int8 against a NumPy reference, and networks that apply it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import normal

import jaxnets as jn
from jaxnets.functional import quantize_int8_array

KEY = jax.random.key(0)


def reference(array, axis, group_size):
    """Round group by group, in a loop."""
    moved = np.moveaxis(np.asarray(array, np.float32), axis, -1)
    values, back = np.empty(moved.shape, np.int8), np.empty(moved.shape, np.float32)
    for index in np.ndindex(moved.shape[:-1]):
        for start in range(0, moved.shape[-1], group_size):
            part = moved[index][start : start + group_size]
            scale = np.float32(np.abs(part).max() / np.float32(127)) or np.float32(1)
            rounded = np.rint(part / scale).astype(np.int8)
            values[index][start : start + group_size] = rounded
            back[index][start : start + group_size] = rounded.astype(np.float32) * scale
    return np.moveaxis(values, -1, axis), np.moveaxis(back, -1, axis)


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("group_size", [None, 4])
@pytest.mark.parametrize("shape", [(8, 12), (3, 8, 4)])
def test_values_are_those_of_the_reference_bit_for_bit(shape, axis, group_size):
    array = normal(shape, 0, np.float32)
    small = quantize_int8_array(array, axis=axis, group_size=group_size)
    values, back = reference(array, axis, group_size or shape[axis])
    np.testing.assert_array_equal(small.values, values)
    np.testing.assert_array_equal(small.astype(jnp.float32), back)
    np.testing.assert_array_equal(jnp.asarray(small), back)


def test_ties_are_rounded_to_even_and_zeros_stay_zero():
    array = jnp.array([[127.0, 0.0], [0.5, 0.0], [1.5, 0.0], [-2.5, 0.0], [-127.0, 0.0]])
    small = quantize_int8_array(array)
    assert small.values[:, 0].tolist() == [127, 0, 2, -2, -127]
    assert not small.astype(jnp.float32)[:, 1].any()


def test_the_error_is_half_a_step():
    array = normal((64, 32), 0, np.float32)
    for group_size in (None, 16):
        small = quantize_int8_array(array, group_size=group_size)
        error = np.abs(small.astype(jnp.float32) - array)
        steps = np.repeat(small.scale, 64 // small.scale.shape[0], axis=0)
        assert (error <= steps * 0.50001).all() and error.max() > 0.45 * steps.max()


NETWORKS = {
    "mlp": (lambda: jn.MLP(features=(16,), num_outputs=3, norm="layer"), (4, 6), float),
    "convnet": (lambda: jn.ConvNet((4, 4), num_outputs=3), (2, 8, 8, 2), float),
    "resnet": (
        lambda: jn.ResNet((1,), num_outputs=3, stem="cifar", width=4),
        (2, 6, 6, 2),
        float,
    ),
    "lstm": (lambda: jn.SequenceClassifier(3, 4), (2, 5, 2), float),
    "transformer": (
        lambda: jn.TransformerLM(
            11, num_layers=2, max_length=5, config=jn.BlockConfig(features=8, num_heads=2)
        ),
        (2, 5),
        int,
    ),
    "scanned transformer": (
        lambda: jn.TransformerLM(
            11,
            num_layers=2,
            max_length=5,
            config=jn.BlockConfig(features=8, num_heads=2, scan_layers=True),
        ),
        (2, 5),
        int,
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("target", [r"(^|/)(kernel|embedding)$", "kernel$"])
def test_networks_compute_what_they_do_with_the_rounded_parameters(name, target):
    make, shape, kind = NETWORKS[name]
    module, random = make(), np.random.default_rng(0)
    x = random.integers(0, 11, shape) if kind is int else random.normal(size=shape)
    x = jnp.asarray(x, jnp.int32 if kind is int else jnp.float32)
    variables = jn.initialize(module, KEY, x)
    small = jn.quantize_int8(variables["params"], target=target)
    rounded = jax.tree.map(
        lambda leaf: leaf.astype(leaf.dtype),
        small,
        is_leaf=lambda node: isinstance(node, jn.functional.Int8Array),
    )
    assert jax.tree.structure(rounded) == jax.tree.structure(variables["params"])
    apply = jax.jit(module.apply)
    outputs = apply({**variables, "params": small}, x)
    expected = apply({**variables, "params": rounded}, x)
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)
    exact = apply(variables, x)
    assert 0 < np.abs(outputs - exact).max() < 0.1 * np.abs(exact).max()


def test_parameters_take_a_quarter_of_the_memory():
    params = {"kernel": normal((256, 128), 0, np.float32), "bias": jnp.zeros(128)}
    small = jn.quantize_int8(params)
    assert small["bias"] is params["bias"]
    assert small["kernel"].nbytes == 256 * 128 + 4 * 128
    grouped = jn.quantize_int8(params, group_size=32)
    assert grouped["kernel"].nbytes == 256 * 128 + 4 * 8 * 128


def test_one_kernel_at_a_time_is_converted(on_cpu):
    module, x = jn.MLP(features=(256,) * 6, num_outputs=2), jnp.ones((2, 256))
    params = jn.initialize(module, KEY, x)["params"]
    small = jn.quantize_int8(params)
    program = jax.jit(module.apply).lower({"params": small}, x).compile()
    memory = program.memory_analysis()
    kernel = 4 * 256 * 256
    assert memory.argument_size_in_bytes < 6.5 * kernel / 4
    assert memory.temp_size_in_bytes < 2 * kernel  # as floats, six of them


def test_bad_input_is_refused():
    params = {"kernel": jnp.ones((6, 2)), "bias": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"target='kernl' matches no path; the nearest.* kernel"):
        jn.quantize_int8(params, target="kernl")
    with pytest.raises(ValueError, match="target='bias' matches only bias, and what is quantized"):
        jn.quantize_int8(params, target="bias")
    with pytest.raises(ValueError, match=r"kernel: group_size 4 does not divide axis -2 of an arr"):
        jn.quantize_int8(params, group_size=4)
