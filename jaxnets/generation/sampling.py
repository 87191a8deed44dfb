"""Sampling of the next token from logits: temperature, top-k, top-p, min-p, repetition penalty."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxnets.core import at_least_float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is sampled.

    The transforms are applied in this order: repetition penalty, temperature, top-k, top-p, min-p.
    None of them removes the most likely token. All but `top_k` are arrays of the compiled program:
    changing a value does not recompile.

    Attributes:
        temperature: divides the logits; 0 is greedy decoding, the most likely token.
        top_p: keep the smallest set of most likely tokens whose probabilities sum to at least this
            (nucleus sampling); in (0, 1], 1 keeps all.
        min_p: keep tokens whose probability is at least this fraction of the largest one; in
            [0, 1], 0 keeps all.
        repetition_penalty: for tokens of the prompt and the text so far, divide positive logits
            by this and multiply negative ones; 1 has no effect.
        top_k: keep this many most likely tokens, and ties with the last of them; None keeps all.

    Raises:
        ValueError: a value outside its range.

    Example:
        >>> Sampling(temperature=0.8, top_p=0.95).top_k is None
        True

    References:
        Keskar et al. 2019, arXiv:1909.05858, section 4.1 (repetition penalty, here a penalty
        for positive and negative logits alike); Fan, Lewis and Dauphin 2018, arXiv:1805.04833,
        section 5 (top-k); Holtzman et al. 2019, arXiv:1904.09751, section 3.1 (top-p); Nguyen et
        al. 2024, arXiv:2407.01082, section 3 (min-p).
    """

    temperature: float | jax.Array = 1.0
    top_p: float | jax.Array = 1.0
    min_p: float | jax.Array = 0.0
    repetition_penalty: float | jax.Array = 1.0
    top_k: int | None = dataclasses.field(default=None, metadata={"static": True})

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, "[0, inf)", lambda x: (x >= 0) & (x < np.inf))
        _check("top_p", self.top_p, "(0, 1]", lambda x: (x > 0) & (x <= 1))
        _check("min_p", self.min_p, "[0, 1]", lambda x: (x >= 0) & (x <= 1))
        penalty = self.repetition_penalty
        _check("repetition_penalty", penalty, "(0, inf)", lambda x: (x > 0) & (x < np.inf))
        if self.top_k is not None and not (isinstance(self.top_k, int) and self.top_k >= 1):
            raise ValueError(f"top_k is {self.top_k}; give a positive integer, or None for all")


def transform_logits(
    logits: jax.Array, sampling: Sampling, repeated: jax.Array | None = None
) -> jax.Array:
    """Apply the transforms of `sampling`; removed tokens get the logit -infinity.

    Args:
        logits: [batch, vocabulary].
        sampling: temperature 0 does not divide the logits.
        repeated: bool [batch, vocabulary], tokens to which the repetition penalty applies.

    Returns:
        [batch, vocabulary], float32 or wider: logits of the distribution to sample from.

    Example:
        >>> logits = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))
        >>> (transform_logits(logits, Sampling(top_p=0.6)) > -jnp.inf).tolist()
        [[True, True, False]]
    """
    logits = at_least_float32(logits)
    if repeated is not None:
        penalty = jnp.asarray(sampling.repetition_penalty, logits.dtype)
        penalized = jnp.where(logits > 0, logits / penalty, logits * penalty)
        logits = jnp.where(repeated, penalized, logits)
    temperature = jnp.asarray(sampling.temperature, logits.dtype)
    logits = logits / jnp.where(temperature == 0, 1, temperature)
    if sampling.top_k is not None:
        largest = lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0]
        # The minimum, not the last element: slicing it makes XLA sort the whole vocabulary on CPU,
        # a hundred times slower.
        logits = _at_least(logits, jnp.min(largest, axis=-1, keepdims=True))
    top_p = jnp.asarray(sampling.top_p, logits.dtype)
    logits = lax.cond(top_p < 1, _nucleus, lambda logits, _: logits, logits, top_p)
    floor = jnp.log(jnp.asarray(sampling.min_p, logits.dtype))
    return _at_least(logits, jnp.max(logits, axis=-1, keepdims=True) + floor)


def add_logit_bias(logits: jax.Array, logit_bias: jax.Array | None, step: jax.Array) -> jax.Array:
    """Add the bias of one step.

    Args:
        logits: [..., vocabulary].
        logit_bias: [vocabulary], the same for every step, or [steps, vocabulary], whose last row
            is for all later steps; None adds nothing.
        step: integer from 0.

    Returns:
        The shape and dtype of the logits.

    Raises:
        ValueError: a bias of another shape, or integers.

    Example:
        >>> bias = jnp.array([[0.0, -jnp.inf], [0.0, 0.0]])  # not as the first token
        >>> [add_logit_bias(jnp.ones(2), bias, jnp.array(step)).tolist() for step in (0, 5)]
        [[1.0, -inf], [1.0, 1.0]]
    """
    if logit_bias is None:
        return logits
    bias, vocabulary_size = jnp.asarray(logit_bias), logits.shape[-1]
    fits = bias.ndim in (1, 2) and bias.size and bias.shape[-1] == vocabulary_size
    if not fits or not jnp.issubdtype(bias.dtype, jnp.floating):
        raise ValueError(
            f"logit_bias of shape {bias.shape} and type {bias.dtype} does not fit; give floats "
            f"[vocabulary] or [steps, vocabulary], for a vocabulary of {vocabulary_size}"
        )
    rows = jnp.atleast_2d(bias).astype(logits.dtype)
    row = rows[jnp.minimum(step, len(rows) - 1)]
    return logits + row.reshape((1,) * (logits.ndim - 1) + row.shape)


def sample_tokens(
    keys: jax.Array, logits: jax.Array, sampling: Sampling, repeated: jax.Array | None = None
) -> jax.Array:
    """Sample one token for each row.

    Args:
        keys: one key per row, [batch]: a row's token depends on its own key and logits only.
        logits: [batch, vocabulary].
        sampling: temperature 0 selects the most likely token.
        repeated: as in `transform_logits`.

    Returns:
        int32 [batch].
    """
    logits = transform_logits(logits, sampling, repeated)

    def draw() -> jax.Array:
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)

    def most_likely() -> jax.Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    return lax.cond(jnp.asarray(sampling.temperature) == 0, most_likely, draw)


def _nucleus(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """Keep the smallest set of most likely tokens whose probabilities sum to at least `top_p`.

    Bisection of the probability threshold is ten times as fast as sorting a large vocabulary on
    CPU. It bisects the bits, as non-negative floats have the order of their bits as integers.
    """
    probabilities = jax.nn.softmax(logits, axis=-1)
    num_bits = jnp.finfo(logits.dtype).bits
    bits = lax.bitcast_convert_type(probabilities, f"int{num_bits}")

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        nucleus = jnp.where(bits >= middle, probabilities, 0)
        enough = jnp.sum(nucleus, axis=-1, keepdims=True) >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    high = jnp.max(bits, axis=-1, keepdims=True) + 1
    threshold, _ = lax.fori_loop(0, num_bits, halve, (jnp.zeros_like(high), high))
    return jnp.where(bits < threshold, -jnp.inf, logits)


def _at_least(logits: jax.Array, threshold: jax.Array) -> jax.Array:
    # This form preserves NaN, which must not turn into a removed token.
    return jnp.where(logits < threshold, -jnp.inf, logits)


def _check(name: str, value: float | jax.Array, interval: str, inside: Callable[..., Any]) -> None:
    known = (int, float, np.generic, np.ndarray, jax.Array)
    if isinstance(value, jax.core.Tracer) or not isinstance(value, known):
        return  # traced, or a placeholder leaf of a transformed tree
    if not np.all(inside(np.asarray(value))):
        raise ValueError(f"{name} is {value}; give a number in {interval}")
