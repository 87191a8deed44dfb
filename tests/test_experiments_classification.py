"""Image classification: every network and data set, views, shrunken images."""

import dataclasses
import functools
import types
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import TINY, tiny

import jaxnets as jn
from experiments.classification import ImageClassification, Viewed
from experiments.models import ModelName, make_model
from jaxnets.convolutional import patch_whitening
from jaxnets.data import digits, normalize


@pytest.mark.parametrize("name", typing.get_args(ModelName))
@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (32, 32, 3)])
def test_every_model_fits_the_images_of_every_data_set(name, shape):
    dataset = types.SimpleNamespace(num_classes=10, image_shape=shape)
    module = make_model(name, dataset, "float32")
    images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    build = functools.partial(jax.eval_shape, module.init_with_output, jax.random.key(0), images)
    if name == "lenet5" and shape == (8, 8, 1):
        with pytest.raises(ValueError, match="28x28 or 32x32, or use ConvNet"):
            build()
    else:
        assert build()[0].shape == (2, 10)


def test_all_views_count_in_evaluation_and_the_image_alone_in_training():
    module = make_model("mlp", digits(), "float32")
    images = np.random.default_rng(0).normal(size=(3, 8, 8, 1)).astype("f4")
    variables = module.init(jax.random.key(0), images)

    def logits(rows, columns):
        """Of images whose pixels are those at the given places of the original."""
        return module.apply(variables, images[:, rows][:, :, columns])

    here, mirrored = range(8), range(7, -1, -1)
    before, behind = [1, *range(7)], [*range(1, 8), 6]  # with the border reflected
    mean = (logits(here, here) + logits(here, mirrored)) / 2
    judged = Viewed(module, mirrored=True, shifted=False)
    np.testing.assert_allclose(judged.apply(variables, images), mean, rtol=1e-5, atol=1e-6)
    shifted = (logits(before, before) + logits(behind, behind)) / 2
    mean = (logits(here, here) + shifted) / 2
    judged = Viewed(module, mirrored=False, shifted=True)
    np.testing.assert_allclose(judged.apply(variables, images), mean, rtol=1e-5, atol=1e-6)
    training = {"train": True, "rngs": {"dropout": jax.random.key(1)}, "mutable": ["batch_stats"]}
    for one, other in zip(
        jax.tree.leaves(judged.apply(variables, images, **training)),
        jax.tree.leaves(module.apply(variables, images, **training)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_the_result_says_that_mirror_images_were_judged_and_patches_are_whitened(tmp_path):
    result = tiny(tmp_path, model="whitened", flip_test=True, shift_test=True, steps=5)
    assert result["metric"] == "test accuracy over both mirror images and three shifts"
    problem = ImageClassification(dataclasses.replace(TINY, model="whitened", seeds=2), digits())
    kernels = problem.create_states().model_state["whitening"]["kernel"]
    train = digits().train["inputs"][:5000]
    expected = patch_whitening(normalize(train, digits().mean, digits().std))
    for kernel in kernels:
        np.testing.assert_allclose(kernel, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_images_are_shrunk_for_a_share_of_the_steps():
    """Steps before the change equal those on shrunken images, steps after it whole ones."""
    config = dataclasses.replace(TINY, model="whitened", steps=4, small_side=6, small_share=0.5)
    problem = ImageClassification(config, digits())
    state = jax.tree.map(lambda leaf: leaf[0], problem.create_states())
    images, labels = digits().train["inputs"][:8], digits().train["labels"][:8]
    step = jax.jit(problem.train_step())
    plain = jax.jit(jn.make_train_step(problem.update))
    batch = {"inputs": images, "labels": labels}
    small = jax.image.resize(images.astype("f4") / 255, (8, 6, 6, 1), "linear")
    for number in range(4):
        seen = {**batch, "inputs": small} if number < 2 else batch
        expected, _ = plain(state, seen)
        state, _ = step(state, batch)
        assert int(state.step) == number + 1
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
            expected.params,
            state.params,
        )


@pytest.mark.parametrize(("side", "share"), [(8, 0.5), (-1, 0.5), (4, 1.5)])
def test_a_side_or_share_out_of_range_is_refused(side, share):
    config = dataclasses.replace(TINY, small_side=side, small_share=share)
    with pytest.raises(ValueError, match=f"small_side is {side} and small_share {share}"):
        ImageClassification(config, digits())
