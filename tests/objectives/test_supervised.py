"""Supervised losses, objectives and metrics against SciPy, scikit-learn and values by hand."""

import functools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from scipy.special import log_softmax

from jaxnets.core import Mean, Update, rng_streams
from jaxnets.data.arrays import pad_batch
from jaxnets.metrics import supervised
from jaxnets.models.feedforward import MLP
from jaxnets.objectives.losses import absolute_error, cross_entropy, huber_loss, squared_error
from jaxnets.objectives.supervised import classification, regression, with_batch_transform
from jaxnets.training.executors import (
    jit_step,
    pmap_step,
    population_step,
    scan_steps,
    sharded_step,
)
from jaxnets.training.loop import evaluate, evaluate_sums
from jaxnets.training.sharding import data_mesh
from jaxnets.training.step import create_train_state, make_train_step


class Identity(nn.Module):
    @nn.compact
    def __call__(self, inputs, *, train=False):
        return inputs * self.param("scale", nn.initializers.ones, ())


@pytest.fixture
def logits():
    return np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)


LABELS = np.array([0, 3, 2, 2, 1, 0])


def test_cross_entropy_equals_scipy(logits):
    expected = -log_softmax(logits, axis=1)[np.arange(6), LABELS]
    np.testing.assert_allclose(cross_entropy(logits, LABELS), expected, rtol=1e-5)


def test_label_smoothing_mixes_with_the_uniform_distribution(logits):
    log_p = log_softmax(logits, axis=1)
    expected = -0.9 * log_p[np.arange(6), LABELS] - 0.1 * log_p.mean(1)
    found = cross_entropy(logits, LABELS, label_smoothing=0.1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_probabilities_as_labels_equal_integers(logits):
    one_hot = jax.nn.one_hot(LABELS, 4)
    np.testing.assert_allclose(cross_entropy(logits, one_hot), cross_entropy(logits, LABELS))


def test_a_label_out_of_range_is_nan_not_another_class(logits):
    losses = cross_entropy(logits, jnp.array([0, 4, 2, -1, 1, 0]))
    np.testing.assert_array_equal(np.isnan(losses), [False, True, False, True, False, False])


def test_labels_of_a_wrong_shape_are_refused(logits):
    with pytest.raises(ValueError, match=r"labels of shape \(6, 1\)"):
        cross_entropy(logits, LABELS[:, None])
    with pytest.raises(ValueError, match="give integers"):
        cross_entropy(logits, LABELS.astype(np.float32))
    with pytest.raises(ValueError, match=r"label_smoothing is 1\.5"):
        cross_entropy(logits, LABELS, label_smoothing=1.5)


def test_losses_of_bfloat16_logits_are_float32():
    logits = jnp.array([[8.0, -8.0]], jnp.bfloat16)
    assert cross_entropy(logits, jnp.array([0])).dtype == jnp.float32
    assert squared_error(logits, logits).dtype == jnp.float32


def test_regression_losses_by_hand():
    predictions, labels = jnp.array([0.0, 3.0]), jnp.array([0.5, 0.0])
    np.testing.assert_allclose(squared_error(predictions, labels), [0.25, 9.0])
    np.testing.assert_allclose(absolute_error(predictions, labels), [0.5, 3.0])
    np.testing.assert_allclose(huber_loss(predictions, labels), [0.125, 2.5])


def test_labels_without_the_last_axis_of_the_predictions_are_refused_with_the_remedy():
    batch = {"inputs": np.ones((6, 1), np.float32), "labels": np.ones(6, np.float32)}
    params = {"scale": jnp.ones(())}
    with pytest.raises(ValueError, match=r"labels \(6,\) differ .* such as labels\[\.\.\., None\]"):
        regression(Identity())(params, {}, batch, jax.random.key(0), train=False)


def test_losses_refuse_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match=r"predictions \(4, 1\), labels \(4,\) differ in shape"):
        squared_error(jnp.ones((4, 1)), jnp.ones(4))


def run(objective, batch, train=False):
    return objective({"scale": jnp.ones(())}, {}, batch, jax.random.key(0), train=train)


def test_classification_sums_and_does_not_smooth_in_evaluation(logits):
    objective = classification(Identity(), label_smoothing=0.2)
    output = run(objective, {"inputs": logits, "labels": LABELS})
    np.testing.assert_allclose(output.loss.total, cross_entropy(logits, LABELS).sum(), rtol=1e-6)
    assert float(output.loss.count) == 6
    smoothed = run(objective, {"inputs": logits, "labels": LABELS}, train=True)
    assert smoothed.loss.total != output.loss.total


def test_regression_averages_over_the_values_of_an_example():
    batch = {"inputs": jnp.ones((2, 4)), "labels": jnp.zeros((2, 4))}
    output = run(regression(Identity()), batch)
    assert (float(output.loss.total), float(output.loss.count)) == (2.0, 2.0)
    assert float(output.metrics["absolute_error"].compute()) == 1.0
    with pytest.raises(ValueError, match="choose one of"):
        regression(Identity(), loss="cubic")


def test_a_batch_with_wrong_names_or_lengths_is_refused(logits):
    with pytest.raises(ValueError, match=r"lacks \['labels'\]"):
        run(classification(Identity()), {"inputs": logits, "targets": LABELS})
    with pytest.raises(ValueError, match="differ in their number of examples"):
        run(classification(Identity()), {"inputs": logits, "labels": LABELS[:5]})
    with pytest.raises(ValueError, match=r"\['labels'\] of the batch have no axis of examples"):
        run(classification(Identity()), {"inputs": logits, "labels": LABELS[0]})


def test_a_transform_draws_from_the_augmentation_stream(logits):
    calls = []

    def transform(batch, rng, train):
        calls.append((rng, train))
        return {**batch, "inputs": batch["inputs"] * 0}

    output = run(
        with_batch_transform(classification(Identity()), transform),
        {"inputs": logits, "labels": LABELS},
        train=True,
    )
    np.testing.assert_allclose(output.loss.compute(), np.log(4), rtol=1e-6)
    expected = rng_streams(jax.random.key(0), "augmentation")["augmentation"]
    rng, train = calls[0]
    assert jnp.array_equal(jax.random.key_data(rng), jax.random.key_data(expected))
    assert train is True


def test_nested_transforms_draw_from_separate_streams(logits):
    keys = []

    def transform(batch, rng, train):
        keys.append(jax.random.key_data(rng).tolist())
        return batch

    objective = classification(Identity())
    for _ in range(3):
        objective = with_batch_transform(objective, transform)
    run(objective, {"inputs": logits, "labels": LABELS}, train=True)
    names = ("augmentation_2", "augmentation_1", "augmentation")  # from the outermost inwards
    streams = rng_streams(jax.random.key(0), *names)
    assert keys == [jax.random.key_data(streams[name]).tolist() for name in names]
    assert len(set(map(tuple, keys))) == 3


def test_metrics_equal_scikit_learn():
    from sklearn.metrics import confusion_matrix, f1_score, precision_recall_fscore_support

    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(50, 5)), rng.integers(0, 4, 50)
    logits[:, 3] = -10  # class 3 is never predicted, class 4 never occurs
    weights = rng.uniform(size=50)
    predicted = logits.argmax(1)

    @jax.jit
    def run(logits, weights):
        matrix = supervised.confusion_matrix(logits, labels, weights)
        unweighted = supervised.confusion_matrix(logits, labels)
        return matrix, supervised.precision_recall_f1(matrix), unweighted

    matrix, found, unweighted = run(logits.astype(np.float32), weights.astype(np.float32))
    expected = confusion_matrix(labels, predicted, sample_weight=weights, labels=range(5))
    np.testing.assert_allclose(matrix.total, expected, rtol=1e-5)
    counts = confusion_matrix(labels, predicted, labels=range(5))
    np.testing.assert_array_equal(unweighted.total, counts)
    precision, recall, f1, _ = precision_recall_fscore_support(
        labels, predicted, sample_weight=weights, labels=range(5), zero_division=0
    )
    np.testing.assert_allclose(found["precision"], precision, rtol=1e-5)
    np.testing.assert_allclose(found["recall"], recall, rtol=1e-5)
    np.testing.assert_allclose(found["f1"], f1, rtol=1e-5)
    macro = f1_score(labels, predicted, sample_weight=weights, labels=range(5), average="macro")
    np.testing.assert_allclose(found["macro_f1"], macro, rtol=1e-5)


def test_scores_take_what_evaluate_returns_and_the_counts_are_its_sums():
    state = types.SimpleNamespace(step=np.zeros((), np.int32))
    batches = [
        {"inputs": jnp.array([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]]), "labels": jnp.array([0, 1, 1])},
        {"inputs": jnp.array([[0.0, 9.0]]), "labels": jnp.array([0])},
    ]

    def measure(state, batch):
        metrics = {"confusion": supervised.confusion_matrix, "bins": supervised.calibration}
        found = {k: m(batch["inputs"], batch["labels"]) for k, m in metrics.items()}
        loss = Mean.of(cross_entropy(batch["inputs"], batch["labels"]))
        return {**found, "loss": loss, "usage": Mean(jnp.array([2.0, 2.0, 0.0]), jnp.array(4.0))}

    means, sums = evaluate(measure, state, batches), evaluate_sums(measure, state, batches)
    np.testing.assert_array_equal(sums["confusion"].total, [[1, 1], [1, 1]])
    np.testing.assert_array_equal(means["confusion"], np.full((2, 2), 0.25))
    for confusion in (means["confusion"], sums["confusion"], np.ones((2, 2), int)):
        found = supervised.precision_recall_f1(confusion)
        np.testing.assert_allclose(found["precision"], [0.5, 0.5])
        assert found["macro_f1"] == 0.5
    for name, score in [
        ("bins", supervised.expected_calibration_error),
        ("loss", supervised.perplexity),
        ("usage", supervised.codebook_perplexity),
    ]:
        np.testing.assert_allclose(score(means[name]), score(sums[name]), rtol=1e-6)
    np.testing.assert_allclose(supervised.codebook_perplexity(means["usage"]), 2.0, rtol=1e-6)


def test_scores_of_a_population_have_a_member_axis():
    state = types.SimpleNamespace(step=np.zeros(2, np.int32))
    members = jnp.array([[[1, 0], [0, 1]], [[1, 1], [0, 0]]], jnp.float32)  # [members, 2, 2]

    def measure(state, batch):
        count = jnp.full(2, 2.0)
        loss = jnp.log(jnp.array([4.0, 16.0]))
        return {"confusion": Mean(members, count), "loss": Mean(loss, count)}

    means = evaluate(measure, state, [{}, {}])
    scores = supervised.precision_recall_f1(means["confusion"])
    np.testing.assert_allclose(scores["precision"], [[1, 1], [1, 0]])
    np.testing.assert_allclose(scores["macro_f1"], [1, 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(supervised.perplexity(means["loss"]), [2, 4], rtol=1e-6)
    bins = np.stack([[[2.0, 1.5, 2.0]], [[2.0, 2.0, 1.0]]])  # [members, bins, 3]
    np.testing.assert_allclose(supervised.expected_calibration_error(bins), [0.25, 0.5])


def test_top_k_accuracy_equals_scikit_learn(logits):
    from sklearn.metrics import top_k_accuracy_score

    sizes = (1, 2, 3)
    accuracies = jax.jit(
        lambda logits: [supervised.top_k_accuracy(logits, LABELS, k=k).compute() for k in sizes]
    )(logits)
    for k, found in zip(sizes, accuracies, strict=True):
        np.testing.assert_allclose(found, top_k_accuracy_score(LABELS, logits, k=k), rtol=1e-6)
    with pytest.raises(ValueError, match="k is 5"):
        supervised.top_k_accuracy(jnp.array(logits), LABELS, k=5)


def test_calibration_error_by_hand_and_over_splits():
    # Confidence 0.9 twice, once right: gap 0.4; confidence 0.6 once, right: gap 0.4.
    p = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]])
    logits, labels = np.log(p).astype(np.float32), np.array([0, 1, 1])

    @jax.jit
    def run(logits):
        whole, first, rest = (
            supervised.calibration(logits[rows], labels[rows], num_bins=10)
            for rows in (slice(None), slice(1), slice(1, None))
        )
        doubled = supervised.calibration(logits, labels, jnp.full(3, 2), num_bins=10)
        return whole, first + rest, supervised.expected_calibration_error(whole), doubled

    whole, split, error, doubled = run(logits)
    np.testing.assert_allclose(error, (2 * abs(0.5 - 0.9) + abs(1 - 0.6)) / 3, rtol=1e-5)
    np.testing.assert_allclose(split.total, whole.total, rtol=1e-6)
    np.testing.assert_allclose(doubled.total, 2 * whole.total, rtol=1e-6)


def test_the_confidence_interval_is_that_of_students_distribution():
    values = np.array([0.90, 0.92, 0.97])
    mean, half = supervised.confidence_interval(values)
    expected = scipy.stats.t.interval(0.95, 2, values.mean(), scipy.stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx(expected)
    with_diverged = [np.nan, *values, np.inf]
    message = r"2 of 5 values are NaN or infinite and do not count in the mean: those at \[0, 4\]"
    with pytest.warns(RuntimeWarning, match=message):
        assert supervised.confidence_interval(with_diverged) == (mean, half)


@pytest.mark.filterwarnings("ignore:1 of 1 values are NaN:RuntimeWarning")
@pytest.mark.parametrize(("values", "shown"), [([0.5], "0.50 +- nan"), ([np.nan], "nan +- nan")])
def test_an_interval_that_does_not_exist_is_nan_and_can_be_formatted(values, shown):
    mean, half = supervised.confidence_interval(values)
    assert f"{mean:.2f} +- {half:.2f}" == shown


@pytest.mark.parametrize("metric", [supervised.confusion_matrix, supervised.calibration])
def test_metrics_of_several_numbers_refuse_weights_below_zero_and_ignore_padding(metric):
    logits, labels = np.array([[1, 0], [0, 2], [np.nan, 1]], np.float32), np.array([0, 1, 1])
    expected = metric(logits[:2], labels[:2])
    for compiled in (metric, jax.jit(metric)):
        found = compiled(logits, labels, np.array([True, True, False]))
        np.testing.assert_allclose(found.total, expected.total, rtol=1e-6)
        assert found.count == 2
    below = np.array([1, 1, -1], np.float32)
    with pytest.raises(ValueError, match=r"weights hold -1\.0; give 0 or more"):
        metric(logits, labels, below)
    assert np.isnan(jax.jit(metric)(logits, labels, below).count)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int64", "uint64"])
@pytest.mark.parametrize("num_classes", [256, 300])
def test_labels_of_every_integer_type_are_compared_with_all_classes(dtype, num_classes):
    labels = np.array([0, 5, 100, 127]).astype(dtype)
    logits = np.random.default_rng(0).normal(size=(4, num_classes)).astype(np.float32)
    expected = -log_softmax(logits, axis=1)[np.arange(4), labels]
    for losses in (cross_entropy, jax.jit(cross_entropy)):
        np.testing.assert_allclose(losses(logits, labels), expected, rtol=1e-5)
    hits = supervised.accuracy(jnp.eye(num_classes)[labels.astype(int)], labels)
    assert float(hits.compute()) == 1
    matrix = supervised.confusion_matrix(jnp.eye(num_classes)[labels.astype(int)], labels).total
    np.testing.assert_array_equal(np.diagonal(matrix).nonzero()[0], labels)
    assert float(matrix.sum()) == 4


@pytest.mark.parametrize("labels", [[0], [[1.0, 0, 0]], [[0.9, 0, 0.1]]])
def test_an_excluded_class_counts_nothing_where_its_label_is_zero(labels):
    labels, logits = jnp.asarray(labels), jnp.array([[0, -jnp.inf, 1]])
    p = np.array([0.9, 0.1]) if labels.shape == (1, 3) and labels[0, 2] else np.array([1.0, 0])
    softmax = np.exp([0, 1]) / np.exp([0, 1]).sum()
    for compiled in (lambda f: f, jax.jit):
        loss, gradient = compiled(jax.value_and_grad(lambda x: cross_entropy(x, labels).sum()))(
            logits
        )
        np.testing.assert_allclose(loss, -np.sum(p * np.log(softmax)), rtol=1e-6)
        np.testing.assert_allclose(gradient, [[*(softmax - p)[:1], 0, (softmax - p)[1]]], rtol=1e-6)
    assert cross_entropy(logits, jnp.array([1])).item() == np.inf
    # The gradient of the labels, too: that of a class which is not excluded is -log p.
    to_labels = jax.grad(lambda p: cross_entropy(logits, p).sum())(jnp.array([[1.0, 0, 0]]))
    np.testing.assert_allclose(to_labels[0, [0, 2]], -np.log(softmax), rtol=1e-6)
    assert np.isfinite(to_labels).all()


@pytest.mark.parametrize("row", [[1, 1, 1, 0], [1.5, -0.5, 0, 0], [0, 0, 0, 0], [np.nan, 1, 0, 0]])
def test_class_probabilities_that_are_no_distribution_are_nan(row, logits):
    labels = np.full((6, 4), 0.25, np.float32)
    labels[1] = row
    for losses in (cross_entropy, jax.jit(cross_entropy)):
        found = losses(logits, labels)
        np.testing.assert_array_equal(np.isnan(found), np.arange(6) == 1)
    half = jnp.asarray(np.full((6, 4), 0.25), jnp.bfloat16) * 0.9 + 0.025
    assert np.isfinite(cross_entropy(logits, half)).all()


def test_padding_of_a_batch_with_class_probabilities_is_ignored(logits):
    batch = pad_batch({"inputs": logits[:3], "labels": np.eye(4, dtype=np.float32)[:3]}, 6)
    params = Identity().init(jax.random.key(0), logits)["params"]

    def loss(params):
        return classification(Identity())(params, {}, batch, jax.random.key(0), train=True).loss

    value, gradient = jax.jit(jax.value_and_grad(lambda params: loss(params).compute()))(params)
    np.testing.assert_allclose(value, np.mean(cross_entropy(logits[:3], np.arange(3))), rtol=1e-6)
    assert np.isfinite(gradient["scale"])


def test_weights_below_zero_stop_a_classifier(logits):
    params = Identity().init(jax.random.key(0), logits)["params"]
    batch = {"inputs": logits, "labels": LABELS, "weights": np.array([1, 1, -1, 1, 1, 1.0])}
    objective = functools.partial(
        classification(Identity()), params, {}, rng=jax.random.key(0), train=True
    )
    with pytest.raises(ValueError, match=r"weights hold -1\.0"):
        objective(batch)
    assert np.isnan(jax.jit(lambda batch: objective(batch).loss.compute())(batch))


def test_bytes_as_labels_train_alike_under_every_executor():
    random = np.random.default_rng(0)
    module = MLP(features=(), num_outputs=256)
    update = Update(classification(module), optax.sgd(0.1))
    step = make_train_step(update)
    batch = {
        "inputs": random.normal(size=(4, 3)).astype(np.float32),
        "labels": np.array([0, 100, 200, 255], np.uint8),
    }
    wide = {**batch, "labels": batch["labels"].astype(np.int32)}
    variables = module.init(jax.random.key(0), batch["inputs"])
    state = create_train_state(variables, update, rng=jax.random.key(0))
    expected = jit_step(step)(state, wide)[1]["loss"].compute()
    assert np.isfinite(expected)
    add_axis = functools.partial(jax.tree.map, lambda leaf: leaf[None])
    losses = [
        jit_step(step)(state, batch),
        pmap_step(step)(state, batch),
        sharded_step(step, data_mesh())(state, batch),
        jit_step(scan_steps(step))(state, add_axis(batch)),
        jit_step(population_step(step))(add_axis(state), batch),
    ]
    for _, metrics in losses:
        np.testing.assert_allclose(metrics["loss"].compute(), expected, rtol=1e-5)
