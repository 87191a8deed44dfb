"""Choosing the next token from logits: pure functions, in the field's order of transforms."""

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
    """How the next token is drawn.

    The transforms come in this order, each on the result of the one before: repetition penalty,
    temperature, top-k, top-p, min-p. None of them ever removes the most likely token. All but
    `top_k` are arrays to a compiled program: another value is not compiled again.

    Attributes:
        temperature: divides the logits; 0 is greedy decoding, the most likely token.
        top_p: keep the fewest most likely tokens whose probabilities sum to this or more; in
            (0, 1], 1 keeps all.
        min_p: keep the tokens at least this times as likely as the most likely one; in [0, 1],
            0 keeps all.
        repetition_penalty: divide the positive logits of the tokens that the prompt or the text
            so far has by this, and multiply the negative ones; 1 does nothing.
        top_k: keep this many most likely tokens, and any as likely as the last of them; None
            keeps all.

    Raises:
        ValueError: a value outside its range.

    Example:
        >>> Sampling(temperature=0.8, top_p=0.95).top_k is None
        True

    References:
        Keskar et al. 2019, arXiv:1909.05858, section 4.1 (repetition penalty, here for positive
        and negative logits alike a penalty); Fan, Lewis and Dauphin 2018, arXiv:1805.04833,
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
    logits: jax.Array, sampling: Sampling, seen: jax.Array | None = None
) -> jax.Array:
    """Apply the transforms of `sampling`; what they remove gets the logit -infinity.

    Args:
        logits: [batch, vocabulary].
        sampling: temperature 0 leaves the logits undivided.
        seen: bool [batch, vocabulary], the tokens that the repetition penalty is for.

    Returns:
        [batch, vocabulary], float32 or wider; their softmax is what is drawn from.

    Example:
        >>> logits = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))
        >>> (transform_logits(logits, Sampling(top_p=0.6)) > -jnp.inf).tolist()
        [[True, True, False]]
    """
    logits = at_least_float32(logits)
    if seen is not None:
        penalty = jnp.asarray(sampling.repetition_penalty, logits.dtype)
        penalized = jnp.where(logits > 0, logits / penalty, logits * penalty)
        logits = jnp.where(seen, penalized, logits)
    temperature = jnp.asarray(sampling.temperature, logits.dtype)
    logits = logits / jnp.where(temperature == 0, 1, temperature)
    if sampling.top_k is not None:
        largest = lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0]
        # The least of them, not the last: that slice makes XLA sort the whole vocabulary on CPU,
        # a hundred times slower.
        logits = _at_least(logits, jnp.min(largest, axis=-1, keepdims=True))
    top_p = jnp.asarray(sampling.top_p, logits.dtype)
    logits = lax.cond(top_p < 1, _nucleus, lambda logits, _: logits, logits, top_p)
    floor = jnp.log(jnp.asarray(sampling.min_p, logits.dtype))
    return _at_least(logits, jnp.max(logits, axis=-1, keepdims=True) + floor)


def sample_tokens(
    keys: jax.Array, logits: jax.Array, sampling: Sampling, seen: jax.Array | None = None
) -> jax.Array:
    """Draw one token for each row.

    Args:
        keys: one key per row, [batch]: a row's token depends on its own key and logits only.
        logits: [batch, vocabulary].
        sampling: temperature 0 takes the most likely token.
        seen: as in `transform_logits`.

    Returns:
        int32 [batch].
    """
    logits = transform_logits(logits, sampling, seen)

    def draw() -> jax.Array:
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)

    def most_likely() -> jax.Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    return lax.cond(jnp.asarray(sampling.temperature) == 0, most_likely, draw)


def _nucleus(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """Keep the fewest most likely tokens of each row whose probabilities sum to `top_p` or more.

    The threshold is found by bisection, which on CPU is ten times as fast as sorting a large
    vocabulary. It goes over the bits of the probabilities, which are in the order of their values.
    """
    probabilities = jax.nn.softmax(logits, axis=-1)
    num_bits = jnp.finfo(logits.dtype).bits
    order = lax.bitcast_convert_type(probabilities, f"int{num_bits}")

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        kept = jnp.where(order >= middle, probabilities, 0)
        enough = jnp.sum(kept, axis=-1, keepdims=True) >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    high = jnp.max(order, axis=-1, keepdims=True) + 1
    threshold, _ = lax.fori_loop(0, num_bits, halve, (jnp.zeros_like(high), high))
    return jnp.where(order < threshold, -jnp.inf, logits)


def _at_least(logits: jax.Array, threshold: jax.Array) -> jax.Array:
    # Written so that NaN stays: it must not look like a token that was removed.
    return jnp.where(logits < threshold, -jnp.inf, logits)


def _check(name: str, value: float | jax.Array, interval: str, inside: Callable[..., Any]) -> None:
    known = (int, float, np.generic, np.ndarray, jax.Array)
    if isinstance(value, jax.core.Tracer) or not isinstance(value, known):
        return  # known only when the program runs, or a placeholder in a tree of something else
    if not np.all(inside(np.asarray(value))):
        raise ValueError(f"{name} is {value}; give a number in {interval}")
