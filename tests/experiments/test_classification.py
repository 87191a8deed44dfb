"""Image classification: every network and data set, test-time augmentation, image sizes."""

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
from experiments.classification import AveragedViews, ImageClassification
from experiments.harness.models import ModelName, make_model
from experiments.harness.problem import member
from experiments.harness.run_folder import RunFolder
from jaxnets.data import digits, normalize
from jaxnets.models.convolutional import whitening_kernel


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


def test_logits_are_averaged_over_the_views_in_evaluation_only():
    module = make_model("mlp", digits(), "float32")
    images = np.random.default_rng(0).normal(size=(3, 8, 8, 1)).astype("f4")
    variables = jax.jit(module.init)(jax.random.key(0), images)
    apply = jax.jit(module.apply)

    def logits(rows, columns):
        """Return the logits of images indexed by these rows and columns."""
        return apply(variables, images[:, rows][:, :, columns])

    here, mirrored = range(8), range(7, -1, -1)
    before, after = [1, *range(7)], [*range(1, 8), 6]  # with a reflected border
    mean = (logits(here, here) + logits(here, mirrored)) / 2
    viewed = AveragedViews(module, mirrored=True, shifted=False)
    np.testing.assert_allclose(jax.jit(viewed.apply)(variables, images), mean, rtol=1e-5, atol=1e-6)
    shifted = (logits(before, before) + logits(after, after)) / 2
    mean = (logits(here, here) + shifted) / 2
    viewed = AveragedViews(module, mirrored=False, shifted=True)
    np.testing.assert_allclose(jax.jit(viewed.apply)(variables, images), mean, rtol=1e-5, atol=1e-6)
    training = {"train": True, "rngs": {"dropout": jax.random.key(1)}, "mutable": ["batch_stats"]}
    trained = [
        jax.jit(functools.partial(each.apply, **training))(variables, images)
        for each in (viewed, module)
    ]
    for one, other in zip(
        *map(jax.tree.leaves, trained),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_padding_does_not_count_in_the_batch_norms_of_a_network_of_several_views():
    images = np.random.default_rng(0).normal(size=(3, 4, 4, 1)).astype("f4")
    module = jn.MLP((4,), num_outputs=2, norm="batch")
    objective = jn.classification(AveragedViews(module, mirrored=True, shifted=False))
    variables = jax.jit(module.init)(jax.random.key(0), images)
    batch = {"inputs": images, "labels": np.array([0, 1, 1])}

    @jax.jit
    def trained(batch):
        model_state = {"batch_stats": variables["batch_stats"]}
        key = jax.random.key(0)
        output = objective(variables["params"], model_state, batch, key, train=True)
        return output.loss.compute(), output.model_state

    pairs = zip(
        jax.tree.leaves(trained(batch)),
        jax.tree.leaves(trained(jn.data.pad_batch(batch, 4))),
        strict=True,
    )
    for one, other in pairs:
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_metric_names_the_views_and_patches_are_whitened(tmp_path):
    result = tiny(tmp_path, model="whitened_convnet", flip_test=True, shift_test=True, steps=5)
    assert result["metric"] == "test accuracy over both mirror images and three shifts"
    problem = ImageClassification(
        dataclasses.replace(TINY, model="whitened_convnet", seeds=2), digits()
    )
    kernels = problem.create_states().model_state["whitening"]["kernel"]
    train = digits().train["inputs"][:5000]
    expected = whitening_kernel(normalize(train, digits().mean, digits().std))
    for kernel in kernels:
        np.testing.assert_allclose(kernel, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_first_steps_downsample_the_images(tmp_path):
    """A run equals plain steps, on downsampled images first and then on full-size ones."""
    config = dataclasses.replace(
        TINY, model="whitened_convnet", steps=5, steps_per_dispatch=2, small_side=6, small_share=0.6
    )
    problem = ImageClassification(config, digits())
    assert problem.stages == [2, 5]
    folder, states = RunFolder(tmp_path), problem.create_states()
    plain = jax.jit(jn.make_train_step(problem.update))
    state = jax.tree.map(lambda leaf: leaf[0], states)
    for step, batch in zip(range(5), problem.member_source(0)(0), strict=False):
        images = digits().train["inputs"][batch["indices"]]
        if step < 2:
            images = jax.image.resize(images.astype("f4") / 255, (len(images), 6, 6, 1), "linear")
        batch = {"inputs": images, "labels": digits().train["labels"][batch["indices"]]}
        state, _ = plain(state, batch)
    for stage, side in enumerate((6, 8)):
        told = problem.prepare(folder, stage, states)
        assert told == f"up to step {problem.stages[stage]} images are {side} pixels high"
        states, _ = jn.fit(
            problem.executor(), states, problem.batches(), num_steps=problem.stages[stage]
        )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b[0], rtol=1e-3, atol=1e-4),
        state.params,
        states.params,
    )


def test_images_are_mirrored_in_every_other_epoch_under_every_executor():
    config = dataclasses.replace(
        TINY,
        model="perceptron",
        flip="alternating",
        batch_size=600,
        steps_per_dispatch=4,
        optimizer="nesterov",
    )
    trained = []
    for executor in ("scan", "jit"):
        problem = ImageClassification(dataclasses.replace(config, executor=executor), digits())
        assert problem.steps_per_epoch == 2
        states, _ = jn.fit(
            problem.executor(), problem.create_states(), problem.batches(), num_steps=4
        )
        trained.append(states.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *trained)

    def transformed(epoch):
        batch = {
            "inputs": digits().train["inputs"][:8],
            "labels": None,
            "numbers": jnp.arange(8),
            "epochs": jnp.full(8, epoch),
        }
        return problem._transform(batch, jax.random.key(epoch), True)["inputs"]

    np.testing.assert_array_equal(transformed(0), transformed(1)[:, :, ::-1])


@pytest.mark.parametrize(
    ("share", "stages"), [(0.0, [7]), (0.2, [1, 7]), (0.9, [6, 7]), (1.0, [7])]
)
def test_the_steps_on_downsampled_images_are_whole_dispatches(share, stages):
    config = dataclasses.replace(TINY, steps=7, steps_per_dispatch=3, small_side=4)
    problem = ImageClassification(dataclasses.replace(config, small_share=share), digits())
    assert problem.stages == stages
    assert ImageClassification(dataclasses.replace(config, small_side=0), digits()).stages == [7]


@pytest.mark.parametrize(("side", "share"), [(8, 0.5), (-1, 0.5), (4, 1.5)])
def test_a_side_or_share_out_of_range_is_refused(side, share):
    config = dataclasses.replace(TINY, small_side=side, small_share=share)
    with pytest.raises(ValueError, match=f"small_side is {side} and small_share {share}"):
        ImageClassification(config, digits())


@pytest.mark.parametrize("executor", ["scan", "jit"])
def test_the_average_is_evaluated_with_the_running_statistics_of_its_own_activations(executor):
    config = dataclasses.replace(
        TINY, model="convnet", seeds=2, average_decay=0.9, executor=executor, batch_size=64
    )
    problem = ImageClassification(config, digits())
    states = problem.create_states()
    average = jax.tree.map(lambda array: 2 * array, states.opt_state.average)
    states = dataclasses.replace(states, opt_state=states.opt_state._replace(average=average))
    evaluated = problem.evaluated(states)
    jax.tree.map(np.testing.assert_array_equal, evaluated.params, average)
    np.testing.assert_array_equal(evaluated.step, states.step)
    images = problem._transform(problem.dataset.train, jax.random.key(0), False)["inputs"]

    @jax.jit
    def normalized(state):
        _, recorded = problem.module.apply(
            state.variables, images, capture_intermediates=True, mutable=["intermediates"]
        )
        return recorded["intermediates"]["conv_norm_0"]["__call__"][0]

    scale = 2.0  # of the doubled average
    for seed in range(2):
        outputs = normalized(member(evaluated, seed)).reshape(-1, 32)
        np.testing.assert_allclose(outputs.mean(axis=0), 0, atol=0.1)
        np.testing.assert_allclose(outputs.std(axis=0), scale, rtol=0.05)


def test_arrays_that_an_objective_holds_are_arguments_of_the_evaluation():
    problem = ImageClassification(TINY, digits())
    own = problem.objective

    def with_table(table, *inputs, train):
        output = own(*inputs, train=train)
        return dataclasses.replace(output, metrics={"sum": jn.Mean.of(table)})

    table = jnp.ones(100_000)
    evaluation = problem.eval_step(jax.tree_util.Partial(with_table, table))
    states, batch = problem.create_states(), problem.eval_batches[0]
    assert evaluation(states, batch)["sum"].compute().tolist() == [1.0]
    program = evaluation.func.lower(*evaluation.args, states, batch).as_text()
    assert len(program) < 50_000  # the table as a constant has 800,000 digits
