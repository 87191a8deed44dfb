"""Regression heads against hand-computed values and SciPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

import jaxnets as jn
from jaxnets.objectives.heads import DiscretizedHead, GaussianHead, head_regression

OUTPUTS = jnp.array([[0.5, -1.0, math.log(4.0), 0.0]])
LABELS = jnp.array([[2.5, -1.0]])


def test_the_loss_of_a_gaussian_head_is_the_density_of_scipy():
    found = GaussianHead(2).losses(OUTPUTS, LABELS, train=False)
    expected = -scipy.stats.norm.logpdf([2.5, -1.0], loc=[0.5, -1.0], scale=[2.0, 1.0])
    np.testing.assert_allclose(found[0], expected, rtol=1e-6)


def test_beta_weights_the_training_loss_by_the_variance_without_a_gradient():
    plain = GaussianHead(2, beta=0.0).losses(OUTPUTS, LABELS, train=True)
    weighed = GaussianHead(2, beta=0.5).losses(OUTPUTS, LABELS, train=True)
    np.testing.assert_allclose(weighed[0], plain[0] * np.array([2.0, 1.0]), rtol=1e-6)
    gradient = jax.grad(lambda x: GaussianHead(2, beta=1.0).losses(x, LABELS, train=True).sum())
    # For means that of half the squared error, for log variances (variance - error^2) / 2.
    np.testing.assert_allclose(gradient(OUTPUTS)[0], [-2.0, 0.0, 0.0, 0.5], atol=1e-6)


def test_the_predicted_variance_is_bounded_below():
    outputs = jnp.array([[0.0, -1e9]])
    assert GaussianHead(1).losses(outputs, jnp.zeros((1, 1)), train=False) > -5


HEAD = DiscretizedHead(ranges=((-1.0, 1.0), (0.0, 1.0)), num_bins=3)


def test_labels_are_two_hot_and_clipped_to_the_range():
    found = HEAD.probabilities(jnp.array([[-0.25, 1.0], [5.0, 0.5]]))
    np.testing.assert_allclose(
        found, [[[0.25, 0.75, 0], [0, 0, 1]], [[0, 0, 1], [0, 1, 0]]], atol=1e-6
    )


def test_a_discretized_head_gives_the_cross_entropy_computed_by_hand():
    # Softmax is invariant to the constant 3.
    outputs = jnp.log(jnp.array([[0.5, 0.25, 0.25, 0.2, 0.2, 0.6]])) + 3
    found = HEAD.losses(outputs, jnp.array([[-0.5, 0.5]]), train=True)
    expected = [-(0.5 * math.log(0.5) + 0.5 * math.log(0.25)), -math.log(0.2)]
    np.testing.assert_allclose(found[0], expected, rtol=1e-6)
    np.testing.assert_allclose(HEAD.mean(outputs)[0], [-0.25, 0.7], rtol=1e-6)


def test_a_bin_of_logit_minus_infinity_counts_nothing_where_its_label_is_zero():
    head = DiscretizedHead(ranges=((0.0, 1.0),), num_bins=3)
    outputs, labels = jnp.array([[0.0, 0.0, -jnp.inf]]), jnp.array([[0.25]])

    def loss(outputs):
        return head.losses(outputs, labels, train=True).sum()

    for compiled in (lambda f: f, jax.jit):
        value, gradient = compiled(jax.value_and_grad(loss))(outputs)
        np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
        np.testing.assert_allclose(gradient, np.zeros((1, 3)), atol=1e-7)


def test_the_mean_of_a_two_hot_label_is_the_label():
    labels = jnp.array([[-0.31, 0.77]])
    outputs = jnp.log(HEAD.probabilities(labels) + 1e-12).reshape(1, -1)
    np.testing.assert_allclose(HEAD.mean(outputs), labels, atol=1e-5)


@pytest.mark.parametrize("head", [GaussianHead(2), HEAD], ids=["gaussian", "discretized"])
def test_a_network_learns_with_either_head(head):
    inputs = np.random.default_rng(0).uniform(-1, 1, (64, 3)).astype(np.float32)
    labels = np.stack([inputs[:, 0] * inputs[:, 1], np.abs(inputs[:, 2])], axis=1)
    module = jn.MLP(features=(32,), num_outputs=head.num_outputs)
    objective = head_regression(module, head, value_names=("product", "size"))
    update = jn.Update(objective, optax.adam(1e-2))
    variables = jax.jit(module.init)(jax.random.key(0), inputs)
    state = jn.create_train_state(variables, update, rng=jax.random.key(1))
    batch = {"inputs": inputs, "labels": labels}
    step = jn.jit_step(jn.make_train_step(update))
    for _ in range(300):
        state, metrics = step(state, batch)
    errors = {name: float(value.compute()) for name, value in metrics.items()}
    assert errors["product_error"] < 0.05 and errors["size_error"] < 0.05
    both = (errors["product_error"] + errors["size_error"]) / 2
    assert errors["absolute_error"] == pytest.approx(both, rel=1e-5)


def test_padding_does_not_change_the_loss():
    module = jn.MLP(features=(), num_outputs=4)
    objective = head_regression(module, GaussianHead(2))
    batch = {"inputs": np.ones((3, 3), np.float32), "labels": np.ones((3, 2), np.float32)}
    padding = {"inputs": np.full((1, 3), 9.0), "labels": np.full((1, 2), -9.0)}
    padded = {
        name: np.concatenate([batch[name], padding[name]]).astype(np.float32) for name in batch
    }
    padded["weights"] = np.array([1, 1, 1, 0], np.float32)

    @jax.jit
    def losses(key):
        params = module.init(key, batch["inputs"])["params"]
        return [objective(params, {}, b, key, train=False).loss for b in (batch, padded)]

    expected, found = losses(jax.random.key(0))
    assert found.count == expected.count == 3
    assert found.total == pytest.approx(float(expected.total), rel=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianHead(0), "0 values"),
        (lambda: GaussianHead(1, beta=2.0), r"beta is 2.0; give a number in \[0, 1\]"),
        (lambda: DiscretizedHead(ranges=()), "0 values"),
        (lambda: DiscretizedHead(ranges=((1.0, 1.0),)), "is empty"),
        (lambda: DiscretizedHead(ranges=((0.0, 1.0),), num_bins=1), "num_bins is 1"),
        (lambda: GaussianHead(2).mean(jnp.ones((1, 3))), r"\(1, 3\).*needs 4 for 2 values"),
        (lambda: head_regression(None, GaussianHead(2), value_names=("a",)), "1 names for 2"),
        (
            lambda: GaussianHead(2).losses(OUTPUTS, jnp.ones((1, 1)), train=True),
            r"means \(1, 2\), labels \(1, 1\) differ in shape",
        ),
        (
            lambda: HEAD.losses(jnp.ones((1, 6)), jnp.ones((1, 1)), train=True),
            r"labels of shape \(1, 1\) do not fit outputs of shape \(1, 6\); give \(1, 2\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_its_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()
