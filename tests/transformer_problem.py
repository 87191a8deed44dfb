"""Shared by the tests of the transformers: tiny options, inputs and parameters."""

import functools

import jax
import numpy as np
from checks import perturbed, shapes_of

from jaxnets.models.transformer import BlockConfig

LENGTHS = np.array([7, 3, 0], np.int32)
DROPPING = {"dropout_rate": 0.1, "attention_dropout_rate": 0.1}
# Numbers of parameters in the parts of a block of `config()`.
NORM, ATTENTION, FEED_FORWARD = 16, 4 * 64 + 3 * 8, 2 * 96 + 12 + 8
BLOCK = 2 * NORM + ATTENTION + FEED_FORWARD

# Tokens appended to each row at each call; 0 pauses a row.
PIECES = np.array([[3, 1, 2], [1, 3, 0], [1, 1, 1], [1, 1, 1], [0, 1, 3]])
GARBAGE = 99  # outside the vocabulary


def config(**fields):
    return BlockConfig(**({"features": 8, "num_heads": 2, "mlp_dim": 12} | fields))


def tokens(batch=3, time=7, vocabulary=11, seed=0):
    return np.random.default_rng(seed).integers(0, vocabulary, (batch, time), np.int32)


def floats(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def made(module, *inputs):
    """Return random variables without compiling the initializers."""
    variables, _ = shapes_of(module, *inputs)
    return perturbed(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), variables), scale=0.3)


@functools.partial(jax.jit, static_argnums=0)
def forward(module, variables, *inputs):
    """Apply a network in evaluation, compiled once for all tests."""
    return module.apply(variables, *inputs)


def close(found, expected, tolerance=2e-5):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def check_padding(module, x, lengths, *, more, stepwise=False):
    """Check that padding changes neither output nor gradients.

    Args:
        module: the network.
        x: tokens [batch, time] or frames [batch, time, channels].
        lengths: of the rows of `x`.
        more: number of steps of garbage appended to `x`.
        stepwise: whether there is an output for each step; those beyond the lengths are ignored.
    """
    variables = made(module, x)
    garbage = np.nan if np.issubdtype(x.dtype, np.floating) else 99
    padded = np.concatenate([x, x[:, :more]], axis=1)
    padded[np.arange(padded.shape[1])[None] >= lengths[:, None]] = garbage
    valid = (np.arange(x.shape[1])[None] < lengths[:, None])[..., None]

    @jax.jit
    def run(variables, x):
        def loss(variables):
            y = module.apply(variables, x, lengths)
            y = jax.numpy.where(valid, y[:, : valid.shape[1]], 0) if stepwise else y
            return jax.numpy.sum(jax.numpy.square(y)), y

        return jax.value_and_grad(loss, has_aux=True)(variables)

    close(run(variables, padded), run(variables, x))


def check_wrong_lengths(module, x):
    """Check that a length out of range in a compiled program gives NaN in its row only."""
    variables = made(module, x)
    for wrong in (-1, x.shape[1] + 1):
        y = forward(module, variables, x, np.array([4, wrong, 2], np.int32))
        assert np.isnan(y[1]).all() and np.isfinite(y[0]).all() and np.isfinite(y[2, :2]).all()


def append_pieces(extend, variables, carry, sequence, pieces):
    """Append pieces to each row; return the logits of each token, positions and carry."""
    position, found = np.zeros(len(sequence), int), np.full((*sequence.shape, 11), np.nan)
    for lengths in pieces:
        piece = np.full((len(sequence), 3), GARBAGE, np.int32)
        for row, (start, length) in enumerate(zip(position, lengths, strict=True)):
            piece[row, :length] = sequence[row, start : start + length]
        logits, carry = extend(variables, piece, carry, lengths)
        for row, (start, length) in enumerate(zip(position, lengths, strict=True)):
            found[row, start : start + length] = np.asarray(logits)[row, :length]
        position += lengths
        np.testing.assert_array_equal(carry["position"], position)
    return found, position, carry


def compiled_extend(module):
    return jax.jit(lambda v, x, carry, lengths: module.apply(v, x, carry, lengths, method="extend"))
