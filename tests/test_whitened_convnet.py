"""The network on whitened patches: its fixed kernel, its start, its fields."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import check_module

from jaxnets import WhitenedConvNet
from jaxnets.convolutional import patch_whitening, with_whitening

SMALL = WhitenedConvNet(features=(4, 6), num_outputs=3)


def images(*shape, seed=0):
    """Images whose neighbouring pixels and channels go together, as in photographs."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) + 2 * rng.normal(size=(*shape[:1], 1, 1, 1)) + 0.5).astype("f4")


def test_it_passes_every_check():
    parameters = 8 + (288 + 8 + 144 + 8) + (216 + 12 + 324 + 12) + 18
    check_module(SMALL, images(4, 8, 8, 1), num_parameters=parameters)


def test_the_kernel_whitens_by_the_eigenvectors_of_numpy():
    x = images(50, 6, 7, 3)
    kernel = np.asarray(patch_whitening(x, epsilon=0.0))
    patches = np.stack(
        [x[n, i : i + 2, j : j + 2].ravel() for n in range(50) for i in range(5) for j in range(6)]
    ).astype("f8")
    values, vectors = np.linalg.eigh(np.cov(patches.T))
    first = kernel.reshape(12, 24)[:, :12]
    expected = vectors / np.sqrt(values)
    signs = np.sign((first * expected).sum(axis=0))  # an eigenvector may point either way
    np.testing.assert_allclose(first * signs, expected, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(np.cov((patches @ first).T), np.eye(12), atol=2e-3)
    np.testing.assert_array_equal(kernel[..., 12:], -kernel[..., :12])


def test_the_fixed_kernel_is_no_parameter_and_is_set_apart():
    x = images(20, 8, 8, 1)
    variables = SMALL.init(jax.random.key(0), x[:1])
    assert set(variables["params"]) >= {"bias", "head"}
    whitened = with_whitening(variables, x)
    np.testing.assert_array_equal(whitened["whitening"]["kernel"], patch_whitening(x))
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
        (
            lambda: WhitenedConvNet().init(jax.random.key(0), images(1, 8, 8, 1)),
            r"\(8, 8\).*3 blocks, which need 9 a side",
        ),
        (lambda: patch_whitening(images(1, 8, 8, 1)[0]), r"\(8, 8, 1\).*\[batch, height"),
        (lambda: with_whitening({"params": {}}, images(4, 8, 8, 1)), "params.*WhitenedConvNet"),
        (
            lambda: with_whitening(
                SMALL.init(jax.random.key(0), images(1, 8, 8, 1)), images(4, 8, 8, 3)
            ),
            r"3 channels.*\(2, 2, 3, 24\).*\(2, 2, 1, 8\)",
        ),
    ],
)
def test_bad_input_is_refused_with_its_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()
