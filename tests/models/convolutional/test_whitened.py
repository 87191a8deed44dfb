"""The network on whitened patches: its fixed kernel, its initialization, its fields."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import (
    check_gradients,
    check_module,
    check_precision,
    count_parameters,
    perturbed,
    shapes_of,
)

from jaxnets import WhitenedConvNet
from jaxnets.models.convolutional import set_whitening_kernel, whitening_kernel

SMALL = WhitenedConvNet(features=(4, 6), num_outputs=3)


def images(*shape, seed=0):
    """Images whose neighboring pixels and channels are correlated, as in photographs."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) + 2 * rng.normal(size=(*shape[:1], 1, 1, 1)) + 0.5).astype("f4")


@pytest.mark.slow
def test_it_passes_every_check():
    parameters = 8 + (288 + 8 + 144 + 8) + (216 + 12 + 324 + 12) + 18
    check_module(SMALL, images(4, 8, 8, 1), num_parameters=parameters)


@pytest.mark.parametrize("side", [1, 2, 3])
def test_the_whitening_kernel_holds_the_scaled_eigenvectors_of_numpy(side):
    x = images(50, 6, 7, 3)
    kernel = np.asarray(whitening_kernel(x, side=side, epsilon=0.0))
    patches = np.stack(
        [
            x[:, i : i + side, j : j + side].reshape(50, -1)
            for i in range(7 - side)
            for j in range(8 - side)
        ]
    ).astype("f8")
    size = 3 * side**2
    patches = patches.reshape(-1, size)
    values, vectors = np.linalg.eigh(np.cov(patches.T))
    first = kernel.reshape(size, 2 * size)[:, :size]
    expected = vectors / np.sqrt(values)
    signs = np.sign((first * expected).sum(axis=0))  # eigenvectors are unique up to their sign
    np.testing.assert_allclose(first * signs, expected, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(np.cov((patches @ first).T), np.eye(size), atol=2e-3)
    np.testing.assert_array_equal(kernel[..., size:], -kernel[..., :size])


DEEP = WhitenedConvNet(features=(4, 6), num_outputs=3, depth=3, patch=3)


def test_every_parameter_has_a_gradient_and_the_dtype_of_the_precision():
    module, inputs = DEEP.clone(features=(4,)), (images(4, 8, 8, 1),)
    variables = perturbed(jax.jit(module.init)(jax.random.key(0), *inputs))
    assert count_parameters(variables) == 18 + (648 + 8 + 2 * (144 + 8)) + 12
    check_gradients(module, variables, inputs, ())
    check_precision(module, inputs, ())


@pytest.mark.slow
def test_deep_blocks_pass_every_check():
    parameters = 18 + (648 + 8 + 2 * (144 + 8)) + (216 + 12 + 2 * (324 + 12)) + 18
    check_module(DEEP, images(4, 8, 8, 1), num_parameters=parameters)


def test_deep_blocks_add_the_output_of_their_first_convolution():
    x = images(4, 8, 8, 1)
    deep = DEEP.clone(features=(4,), activation="relu")  # the identity on what a relu has returned
    variables = set_whitening_kernel(jax.jit(deep.init)(jax.random.key(0), x), x)
    assert variables["whitening"]["kernel"].shape == (3, 3, 1, 18)
    params = dict(variables["params"])
    params["block_0_3_norm"] = jax.tree.map(jnp.zeros_like, params["block_0_3_norm"])
    shallow = {
        collection: {k: v for k, v in tree.items() if "_2_" not in k and "_3_" not in k}
        for collection, tree in {**variables, "params": params}.items()
    }
    run = jax.jit(deep.apply)
    y = run({**variables, "params": params}, x)
    np.testing.assert_allclose(jax.jit(deep.clone(depth=1).apply)(shallow, x), y, rtol=1e-5)
    assert np.abs(run(variables, x) - y).max() > 1e-3


@pytest.fixture(scope="module")
def initialized():
    return jax.jit(SMALL.init)(jax.random.key(0), images(1, 8, 8, 1))


def test_the_fixed_kernel_is_not_a_parameter_and_is_set_separately(initialized):
    x, variables = images(20, 8, 8, 1), initialized
    assert set(variables["params"]) >= {"bias", "head"}
    whitened = set_whitening_kernel(variables, x)
    np.testing.assert_array_equal(whitened["whitening"]["kernel"], whitening_kernel(x))
    assert whitened["params"] is variables["params"]

    @jax.jit
    def run(variables):
        return SMALL.apply(variables, x, train=True, mutable=["batch_stats", "whitening"])

    (before, _), (after, changed) = run(variables), run(whitened)
    assert np.abs(before - after).max() > 1e-3
    np.testing.assert_array_equal(changed["whitening"]["kernel"], whitened["whitening"]["kernel"])


def test_initial_kernels_copy_their_inputs(initialized):
    params = initialized["params"]
    wide = params["block_1_1_conv"]["kernel"]  # 4 channels -> 6
    narrow = params["block_0_1_conv"]["kernel"]  # 8 channels -> 4
    for kernel, channels in ((wide, 4), (narrow, 4)):
        np.testing.assert_array_equal(kernel[:, :, :channels, :channels][1, 1], np.eye(4))
        assert (kernel[0, 0] != 0).all()
        others = np.delete(np.asarray(kernel).reshape(9, -1), 4, axis=0)
        assert np.abs(others).max() <= 1 / np.sqrt(kernel[..., 0].size)  # torch's default bound
    np.testing.assert_array_equal(wide[0, 0, :, 4:] != 0, True)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: WhitenedConvNet(features=(8, 0)), r"features=\(8, 0\)"),
        (lambda: WhitenedConvNet(activation="no"), "'no'"),
        (lambda: WhitenedConvNet(depth=0), "depth=0"),
        (lambda: WhitenedConvNet(patch=0), "patch=0"),
        (lambda: whitening_kernel(images(1, 8, 8, 1), side=9), "9 x 9.*a side from 1 to theirs"),
        (
            lambda: shapes_of(WhitenedConvNet(), images(1, 8, 8, 1)),
            r"\(8, 8\).*3 blocks, which need 9 a side",
        ),
        (lambda: whitening_kernel(images(1, 8, 8, 1)[0]), r"\(8, 8, 1\).*\[batch, height"),
        (
            lambda: set_whitening_kernel({"params": {}}, images(4, 8, 8, 1)),
            "params.*WhitenedConvNet",
        ),
        (
            lambda: set_whitening_kernel(
                shapes_of(SMALL, images(1, 8, 8, 1))[0], images(4, 8, 8, 3)
            ),
            r"3 channels.*\(2, 2, 3, 24\).*\(2, 2, 1, 8\)",
        ),
    ],
)
def test_bad_input_is_refused_with_its_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()
