"""The network on whitened patches: its fixed kernel, its start, its fields."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import check_module

from jaxnets import WhitenedConvNet
from jaxnets.models.convolutional import set_whitening_kernel, whitening_kernel

SMALL = WhitenedConvNet(features=(4, 6), num_outputs=3)


def images(*shape, seed=0):
    """Images whose neighboring pixels and channels go together, as in photographs."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) + 2 * rng.normal(size=(*shape[:1], 1, 1, 1)) + 0.5).astype("f4")


def test_it_passes_every_check():
    parameters = 8 + (288 + 8 + 144 + 8) + (216 + 12 + 324 + 12) + 18
    check_module(SMALL, images(4, 8, 8, 1), num_parameters=parameters)


@pytest.mark.parametrize("side", [1, 2, 3])
def test_the_kernel_whitens_by_the_eigenvectors_of_numpy(side):
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
    signs = np.sign((first * expected).sum(axis=0))  # an eigenvector may point either way
    np.testing.assert_allclose(first * signs, expected, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(np.cov((patches @ first).T), np.eye(size), atol=2e-3)
    np.testing.assert_array_equal(kernel[..., size:], -kernel[..., :size])


def test_deep_blocks_add_what_their_first_convolution_gave():
    deep = WhitenedConvNet(features=(4, 6), num_outputs=3, depth=3, patch=3)
    parameters = 18 + (648 + 8 + 2 * (144 + 8)) + (216 + 12 + 2 * (324 + 12)) + 18
    check_module(deep, images(4, 8, 8, 1), num_parameters=parameters)
    x = images(4, 8, 8, 1)
    deep = deep.clone(activation="relu")  # which leaves what it has given as it is
    variables = set_whitening_kernel(deep.init(jax.random.key(0), x), x)
    assert variables["whitening"]["kernel"].shape == (3, 3, 1, 18)
    params = dict(variables["params"])
    for block in range(2):
        name = f"block_{block}_3_norm"
        params[name] = jax.tree.map(jnp.zeros_like, params[name])
    shallow = {
        collection: {k: v for k, v in tree.items() if "_2_" not in k and "_3_" not in k}
        for collection, tree in {**variables, "params": params}.items()
    }
    y = deep.apply({**variables, "params": params}, x)
    np.testing.assert_allclose(deep.clone(depth=1).apply(shallow, x), y, rtol=1e-5)
    assert float(jnp.abs(deep.apply(variables, x) - y).max()) > 1e-3


def test_the_fixed_kernel_is_no_parameter_and_is_set_apart():
    x = images(20, 8, 8, 1)
    variables = SMALL.init(jax.random.key(0), x[:1])
    assert set(variables["params"]) >= {"bias", "head"}
    whitened = set_whitening_kernel(variables, x)
    np.testing.assert_array_equal(whitened["whitening"]["kernel"], whitening_kernel(x))
    assert whitened["params"] is variables["params"]
    before, after = (SMALL.apply(v, x) for v in (variables, whitened))
    assert float(jnp.abs(before - after).max()) > 1e-3
    _, changed = SMALL.apply(whitened, x, train=True, mutable=["batch_stats", "whitening"])
    np.testing.assert_array_equal(changed["whitening"]["kernel"], whitened["whitening"]["kernel"])


def test_convolutions_start_by_passing_their_inputs_on():
    params = SMALL.init(jax.random.key(0), images(1, 8, 8, 1))["params"]
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
            lambda: WhitenedConvNet().init(jax.random.key(0), images(1, 8, 8, 1)),
            r"\(8, 8\).*3 blocks, which need 9 a side",
        ),
        (lambda: whitening_kernel(images(1, 8, 8, 1)[0]), r"\(8, 8, 1\).*\[batch, height"),
        (
            lambda: set_whitening_kernel({"params": {}}, images(4, 8, 8, 1)),
            "params.*WhitenedConvNet",
        ),
        (
            lambda: set_whitening_kernel(
                SMALL.init(jax.random.key(0), images(1, 8, 8, 1)), images(4, 8, 8, 3)
            ),
            r"3 channels.*\(2, 2, 3, 24\).*\(2, 2, 1, 8\)",
        ),
    ],
)
def test_bad_input_is_refused_with_its_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()
