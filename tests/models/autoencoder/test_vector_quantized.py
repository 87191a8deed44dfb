"""The codebook of a vector quantizer: a moving average, restarts, and gradients past it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets.models.autoencoder import VQVAE, EncoderDecoderConfig, VectorQuantizer, check_codebook

CONVOLUTIONAL = EncoderDecoderConfig((5, 8, 1), "convolutional", (3, 4))


def images(*shape):
    return np.random.default_rng(0).uniform(size=shape).astype(np.float32)


def quantize(vectors, variables=None, *, weights=None, train=True, **fields):
    module = VectorQuantizer(4, **{"restart_below": 0.0, **fields})
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


@pytest.mark.parametrize("weighted", [False, True])
def test_the_codebook_moves_as_a_loop_says(weighted):
    vectors = np.random.default_rng(0).normal(size=(5, 3, 2)).astype(np.float32)
    weights = np.array([1, 0, 2, 0.5, 1], np.float32) if weighted else None
    before, (nearest, codes), after = quantize(vectors, weights=weights, decay=0.9)
    table = np.asarray(before["sums"]) / np.asarray(before["shares"])[:, None]
    count, total = np.zeros(4), np.zeros((4, 2))
    for example, row in np.ndindex(5, 3):
        vector = vectors[example, row]
        code = int(np.argmin([np.sum((vector - entry) ** 2) for entry in table]))
        assert codes[example, row] == code
        np.testing.assert_allclose(nearest[example, row], table[code], rtol=1e-5)
        weight = 1.0 if weights is None else weights[example]
        count[code] += weight
        total[code] += weight * vector
    for name, moved in (("shares", count), ("sums", total)):
        expected = 0.9 * np.asarray(before[name]) + 0.1 * moved / count.sum()
        np.testing.assert_allclose(after[name], expected, rtol=1e-5, atol=1e-7)


def test_a_codebook_rests_in_evaluation_and_on_padding():
    vectors = images(5, 3, 2)
    before, _, after = quantize(vectors, train=False)
    jax.tree.map(np.testing.assert_array_equal, before, after)
    before, _, after = quantize(vectors, weights=jnp.zeros(5))
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_a_dead_code_starts_again_as_a_vector_of_the_batch():
    vectors = np.random.default_rng(0).normal(size=(5, 3, 2)).astype(np.float32)
    far = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [50.0, 50.0]], np.float32)
    # A batch in which one example counts: restarts may come from its vectors alone.
    weights = jnp.array([0.0, 0, 1, 0, 0])
    shares = jnp.array([0.4, 0.3, 0.3, 0.026])
    start = {"codebook": {"shares": shares, "sums": far * shares[:, None]}}
    _, _, kept = quantize(vectors, start, weights=weights, restart_below=0.1)
    np.testing.assert_allclose(kept["sums"][3] / kept["shares"][3], far[3], rtol=1e-4)
    shares = shares.at[3].set(0.024)
    start = {"codebook": {"shares": shares, "sums": far * shares[:, None]}}
    _, _, after = quantize(vectors, start, weights=weights, restart_below=0.1)
    reborn = np.asarray(after["sums"][3] / after["shares"][3])
    assert np.min(np.abs(vectors[2] - reborn[None]).max(axis=1)) < 1e-5
    assert after["shares"][3] == pytest.approx(1 / 4)
    np.testing.assert_array_equal(after["sums"][:3], kept["sums"][:3])


def test_the_first_batch_gives_the_codebook_its_vectors():
    vectors = 100 + np.random.default_rng(0).normal(size=(5, 3, 2)).astype(np.float32)
    _, _, after = quantize(vectors, restart_below=0.1)
    table = np.asarray(after["sums"] / after["shares"][:, None])
    flat, mean = vectors.reshape(15, 2), vectors.mean(axis=(0, 1))
    # Far off, one code is nearest to all vectors and becomes their mean; the others restart.
    to_mean = np.abs(table - mean).max(axis=1)
    assert to_mean.min() < 1
    for row in np.delete(table, to_mean.argmin(), axis=0):
        assert np.abs(flat - row).max(axis=1).min() < 1e-3


def test_gradients_pass_straight_through_the_codes():
    module = VQVAE(CONVOLUTIONAL, codebook_size=5, embedding_size=2)
    x = images(2, 5, 8, 1)
    variables = module.init(jax.random.key(0), x)
    state = {"codebook": variables["codebook"]}
    weights = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    quantized = module.apply(variables, x)

    def decoded(vectors):
        bound = module.bind(variables)
        return jnp.vdot(weights, bound.decoder(vectors))

    at_codes = jax.grad(decoded)(quantized.nearest)

    def encoded(params):
        return module.apply({"params": params, **state}, x, method="encode")

    (expected,) = jax.vjp(encoded, variables["params"])[1](at_codes)
    found = jax.grad(lambda p: jnp.vdot(weights, module.apply({"params": p, **state}, x).outputs))(
        variables["params"]
    )
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


def test_near_codes_are_told_apart_at_every_precision():
    """The products of distances and sums are exact whatever the default of the backend is."""
    module = VectorQuantizer(4)
    variables = module.init(jax.random.key(0), images(5, 3, 2))

    def move(vectors):
        rngs = {"codebook": jax.random.key(1)}
        return module.apply(variables, vectors, train=True, mutable=["codebook"], rngs=rngs)

    program = str(jax.make_jaxpr(move)(images(5, 3, 2)))
    assert program.count("dot_general") == program.count("precision=(Precision.HIGHEST") == 2


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: VectorQuantizer(4, decay=1.0), r"decay is 1\.0"),
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
