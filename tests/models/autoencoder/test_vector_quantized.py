"""The codebook of a vector quantizer: moving averages, restarts, straight-through gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import random_variables

from jaxnets.models.autoencoder import VQVAE, EncoderDecoderConfig, VectorQuantizer, check_codebook

CONVOLUTIONAL = EncoderDecoderConfig((5, 8, 1), "convolutional", (3, 4))


def images(*shape):
    return np.random.default_rng(0).uniform(size=shape).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("module", "train"))
def apply(module, variables, vectors, weights, *, train):
    if variables is None:
        variables = module.init(jax.random.key(0), vectors)
    output, changed = module.apply(
        variables,
        vectors,
        weights,
        train=train,
        mutable=["codebook"],
        rngs={"codebook": jax.random.key(1)},
    )
    return variables["codebook"], output, changed["codebook"]


def quantize(vectors, variables=None, *, weights=None, train=True, **fields):
    """Return the codebook before, the output, and the codebook after."""
    module = VectorQuantizer(4, **{"restart_below": 0.0, **fields})
    return apply(module, variables, vectors, weights, train=train)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_codebook_is_updated_as_by_a_loop(weighted):
    vectors = np.random.default_rng(0).normal(size=(5, 3, 2)).astype(np.float32)
    weights = np.array([1, 0, 2, 0.5, 1], np.float32) if weighted else None
    before, (nearest, codes), after = jax.tree.map(
        np.asarray, quantize(vectors, weights=weights, decay=0.9)
    )
    table = before["sums"] / before["shares"][:, None]
    count, total = np.zeros(4), np.zeros((4, 2))
    for example, row in np.ndindex(5, 3):
        vector = vectors[example, row]
        code = int(np.argmin([np.sum((vector - entry) ** 2) for entry in table]))
        assert codes[example, row] == code
        np.testing.assert_allclose(nearest[example, row], table[code], rtol=1e-5)
        weight = 1.0 if weights is None else weights[example]
        count[code] += weight
        total[code] += weight * vector
    for name, batch_sum in (("shares", count), ("sums", total)):
        expected = 0.9 * before[name] + 0.1 * batch_sum / count.sum()
        np.testing.assert_allclose(after[name], expected, rtol=1e-5, atol=1e-7)


def test_evaluation_and_padding_do_not_update_the_codebook():
    vectors = images(5, 3, 2)
    before, _, after = quantize(vectors, train=False)
    jax.tree.map(np.testing.assert_array_equal, before, after)
    before, _, after = quantize(vectors, weights=np.zeros(5, np.float32))
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_a_dead_code_restarts_as_a_vector_of_the_batch():
    vectors = np.random.default_rng(0).normal(size=(5, 3, 2)).astype(np.float32)
    far = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [50.0, 50.0]], np.float32)
    # Only one example has a weight, so restarts must come from its vectors.
    weights = np.array([0, 0, 1, 0, 0], np.float32)

    def after(last_share):
        shares = np.array([0.4, 0.3, 0.3, last_share], np.float32)
        start = {"codebook": {"shares": shares, "sums": far * shares[:, None]}}
        codebook = quantize(vectors, start, weights=weights, restart_below=0.1)[2]
        return jax.tree.map(np.asarray, codebook)

    alive, restarted = after(0.026), after(0.024)
    np.testing.assert_allclose(alive["sums"][3] / alive["shares"][3], far[3], rtol=1e-4)
    vector = restarted["sums"][3] / restarted["shares"][3]
    assert np.min(np.abs(vectors[2] - vector[None]).max(axis=1)) < 1e-5
    assert restarted["shares"][3] == pytest.approx(1 / 4)
    np.testing.assert_array_equal(restarted["sums"][:3], alive["sums"][:3])


def test_the_first_batch_initializes_the_codebook_with_its_vectors():
    vectors = 100 + np.random.default_rng(0).normal(size=(5, 3, 2)).astype(np.float32)
    _, _, after = quantize(vectors, restart_below=0.1)
    table = np.asarray(after["sums"]) / np.asarray(after["shares"])[:, None]
    flat, mean = vectors.reshape(15, 2), vectors.mean(axis=(0, 1))
    # Far from all codes, one of them is nearest to all vectors and becomes their mean; the others
    # restart.
    to_mean = np.abs(table - mean).max(axis=1)
    assert to_mean.min() < 1
    for row in np.delete(table, to_mean.argmin(), axis=0):
        assert np.abs(flat - row).max(axis=1).min() < 1e-3


def test_gradients_pass_straight_through_the_codes():
    module = VQVAE(CONVOLUTIONAL, codebook_size=5, embedding_size=2)
    x = images(2, 5, 8, 1)
    variables = random_variables(module, x)
    state = {"codebook": variables["codebook"]}
    weights = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)

    def loss(params):
        return jnp.vdot(weights, module.apply({"params": params, **state}, x).outputs)

    @jax.jit
    def gradients(params):
        """Return the gradient, and the one of encoder and decoder differentiated separately."""
        variables = {"params": params, **state}
        decoder = module.bind(variables).decoder
        nearest = module.apply(variables, x).nearest
        at_codes = jax.grad(lambda vectors: jnp.vdot(weights, decoder(vectors)))(nearest)
        _, pullback = jax.vjp(
            lambda params: module.apply({"params": params, **state}, x, method="encode"), params
        )
        return jax.grad(loss)(params), pullback(at_codes)[0]

    found, expected = gradients(variables["params"])
    for name in ("encoder", "embed"):
        for one, other in zip(
            jax.tree.leaves(found[name]), jax.tree.leaves(expected[name]), strict=True
        ):
            assert np.any(one)
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_padding_may_be_nan():
    vectors = np.random.default_rng(0).normal(size=(5, 3, 2)).astype(np.float32)
    weights = np.array([1, 0, 2, 1, 1], np.float32)
    before, _, expected = quantize(vectors, weights=weights)
    vectors[1] = np.nan
    _, _, after = quantize(vectors, {"codebook": before}, weights=weights)
    jax.tree.map(np.testing.assert_array_equal, after, expected)


@pytest.mark.lowering
def test_matmuls_of_the_quantizer_have_the_highest_precision():
    """Distances and sums do not depend on the default matmul precision of the backend."""
    module = VectorQuantizer(4)
    variables = jax.jit(module.init)(jax.random.key(0), images(5, 3, 2))

    def update(vectors):
        return apply(module, variables, vectors, None, train=True)

    program = str(jax.make_jaxpr(update)(images(5, 3, 2)))
    assert program.count("dot_general") == program.count("precision=(Precision.HIGHEST") == 2


def test_a_codebook_may_have_as_many_codes_as_the_data_has_vectors():
    check_codebook(36, CONVOLUTIONAL, 9)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: VectorQuantizer(4, decay=1.0), r"decay is 1\.0"),
        (lambda: VectorQuantizer(4, restart_below=1.0), r"restart_below is 1\.0"),
        (
            lambda: quantize(images(1, 3, 2)),
            "a codebook of 4 codes is bigger than the 3 vectors of a batch",
        ),
        (
            lambda: check_codebook(40, CONVOLUTIONAL, 9),
            "40 codes is bigger than the data: 9 images have 36 vectors",
        ),
    ],
)
def test_a_wrong_field_or_input_is_refused_with_its_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()
