"""Beam search in one compiled loop, for any module with the decoding protocol."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxnets.core import at_least_float32, known_values
from jaxnets.generation.generate import check_prompts, prefill
from jaxnets.generation.sampling import add_logit_bias


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Beams:
    """Continuations of prompts, sorted by descending score.

    Attributes:
        tokens: int32 [batch, beams, num_tokens]; a stop token ends its row and is followed by
            `pad_token`.
        lengths: int32 [batch, beams], number of tokens including the stop token.
        scores: [batch, beams], length-normalized log-probability in nats. With fewer
            continuations than beams, the last ones have length 0 and score -infinity.
    """

    tokens: jax.Array
    lengths: jax.Array
    scores: jax.Array


def beam_search(
    module: Any,
    variables: Any,
    prompts: jax.Array,
    *,
    num_tokens: int,
    num_beams: int,
    stop_token: int | None,
    length_penalty: float = 0.6,
    logit_bias: jax.Array | None = None,
    lengths: jax.Array | None = None,
    carry: Any = None,
    capacity: int | None = None,
    pad_token: int = 0,
) -> Beams:
    """Search for the most likely continuations of prompts.

    A continuation Y ends with the stop token or has `num_tokens` tokens. Its score is
    log P(Y | prompt) / ((5 + |Y|) / 6)^length_penalty, where |Y| includes the stop token. Each
    step extends all live beams by one token and selects the `num_beams` most likely candidates.
    Finished candidates go to a separate list, ranked by score, and the next most likely ones take
    their places. The search ends when no live beam can reach a better score. With one beam and no
    length penalty this is greedy decoding. Calls with arrays of the same shapes share one
    compiled program.

    Args:
        module: with the decoding protocol, see `generation.generate`.
        variables: its parameters and other collections.
        prompts: integer [batch, time], padded on the right.
        num_tokens: maximum number of tokens of a continuation.
        num_beams: number of live beams.
        stop_token: ends a continuation; with None all have `num_tokens` tokens.
        length_penalty: at least 0. 0 ranks by probability, which favors short continuations;
            greater values favor longer ones.
        logit_bias: floating [vocabulary], or [steps, vocabulary] for the first steps, whose last
            row is for all later ones; at most 0. It is added to the log-probabilities; -infinity
            excludes a token.
        lengths: integer [batch] in [1, time], the number of tokens of each prompt; by default
            all count.
        carry: cache to continue, with leaves [batch, ...], such as an encoded source; by default
            empty.
        capacity: as in `generate`.
        pad_token: follows a stop token.

    Returns:
        `Beams`.

    Raises:
        ValueError: as in `generate`, and `num_beams`, `length_penalty` or `logit_bias` out of
            range.

    Example:
        >>> import flax.linen as nn
        >>> class Words(nn.Module):  # 0 is the stop token; greedy decoding would begin with 1
        ...     def start(self, batch_size, capacity):
        ...         return ()
        ...     def extend(self, tokens, carry, lengths=None):
        ...         table = [[1, 0, 0, 0], [0.3, 0.6, 0.1, 0], [1, 0, 0, 0], [0, 0.6, 0.4, 0]]
        ...         return jnp.log(jnp.array(table))[tokens], carry
        >>> beams = beam_search(Words(), {}, jnp.array([[3]]), num_tokens=4, num_beams=2,
        ...                     stop_token=0, length_penalty=0.0)
        >>> beams.tokens[0, 0].tolist(), round(float(jnp.exp(beams.scores[0, 0])), 3)
        ([2, 0, 0, 0], 0.4)

    References:
        Wu et al. 2016, arXiv:1609.08144, equation 14 (score; here without its coverage penalty).
    """
    if not isinstance(num_beams, int) or num_beams < 1:
        raise ValueError(f"num_beams is {num_beams}; give a positive integer")
    if not isinstance(length_penalty, jax.core.Tracer) and not 0 <= length_penalty < np.inf:
        raise ValueError(f"length_penalty is {length_penalty}; give a number in [0, inf)")
    known = None if logit_bias is None else known_values(jnp.asarray(logit_bias))
    if known is not None and not np.all(known <= 0):
        raise ValueError(
            f"logit_bias has {np.max(known)}; give at most 0, as the search stops when no "
            "log-probability can grow"
        )
    prompts, lengths, capacity = check_prompts(
        module,
        variables,
        prompts,
        lengths,
        carry,
        num_tokens=num_tokens,
        capacity=capacity,
        stop_tokens=() if stop_token is None else (stop_token,),
    )
    stop = np.int32(-1 if stop_token is None else stop_token)  # no token has id -1
    return _beam_search(
        *(module, num_tokens, num_beams, capacity),
        *(
            variables,
            prompts,
            lengths,
            carry,
            stop,
            jnp.asarray(length_penalty),
            logit_bias,
            np.int32(pad_token),
        ),
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _beam_search(
    module: Any,
    num_tokens: int,
    num_beams: int,
    capacity: int,
    variables: Any,
    prompts: jax.Array,
    lengths: jax.Array | None,
    carry: Any,
    stop_token: jax.Array,
    length_penalty: jax.Array,
    logit_bias: jax.Array | None,
    pad_token: jax.Array,
) -> Beams:
    batch = prompts.shape[0]
    logits, carry = prefill(module, capacity, variables, prompts, lengths, carry)
    carry = jax.tree.map(lambda leaf: jnp.repeat(leaf, num_beams, axis=0), carry)
    log_probabilities = jax.nn.log_softmax(logits, axis=-1)

    def normalize(log_probability: jax.Array, length: jax.Array | int) -> jax.Array:
        length = jnp.asarray(length, logits.dtype)
        return log_probability / ((5 + length) / 6) ** length_penalty.astype(logits.dtype)

    def unfinished(state: tuple[Any, ...]) -> jax.Array:
        step, live, finished, _ = state
        # A log-probability only decreases, and the longest continuation has the largest divisor.
        # If this is NaN, the comparison is false and the search runs to the end.
        attainable = normalize(live.scores[:, 0], num_tokens)
        return (step < num_tokens) & ~jnp.all(finished.scores[:, -1] >= attainable)

    def advance(state: tuple[Any, ...]) -> tuple[Any, ...]:
        step, live, finished, carry = state
        tokens = live.tokens.reshape(batch * num_beams, num_tokens)
        last = lax.dynamic_slice_in_dim(tokens, step - 1, 1, axis=1)
        logits, next_carry = module.apply(variables, last, carry, method="extend")
        logits = jax.nn.log_softmax(at_least_float32(logits[:, 0]), axis=-1)
        *chosen, source = select(step, live, finished, logits.reshape(batch, num_beams, -1))

        def follow(old: jax.Array, new: jax.Array) -> jax.Array:
            # A leaf that `extend` returns unchanged, such as an encoded source, is the same for all
            # beams of a prompt and needs no gather.
            return new if new is old else new[source]

        return *chosen, jax.tree.map(follow, carry, next_carry)

    def select(
        step: jax.Array, live: Beams, finished: Beams, log_probabilities: jax.Array
    ) -> tuple[Any, ...]:
        vocabulary_size = log_probabilities.shape[-1]
        log_probabilities = add_logit_bias(log_probabilities, logit_bias, step)
        totals = (live.scores[:, :, None] + log_probabilities).reshape(batch, -1)
        # Each beam has one candidate with the stop token, so 2 num_beams candidates always contain
        # num_beams live ones.
        totals, index = lax.top_k(totals, min(2 * num_beams, totals.shape[1]))
        parent, token = index // vocabulary_size, (index % vocabulary_size).astype(jnp.int32)
        tokens = jnp.take_along_axis(live.tokens, parent[:, :, None], axis=1)
        tokens = tokens.at[:, :, step].set(token)
        length = jnp.full(token.shape, step + 1)
        ends = (token == stop_token) | (step + 1 == num_tokens)
        # Candidates beyond num_beams only replace stopped ones; they may not finish themselves, as
        # greedy decoding would not select them.
        ends = ends & (jnp.arange(token.shape[1]) < num_beams)[None]
        ended = Beams(tokens, length, jnp.where(ends, normalize(totals, step + 1), -jnp.inf))
        finished = _best(jax.tree.map(_concatenate, finished, ended), num_beams)[0]
        live_scores = jnp.where(token == stop_token, -jnp.inf, totals)
        live, selected = _best(Beams(tokens, length, live_scores), num_beams)
        source = jnp.take_along_axis(parent, selected, axis=1)  # [batch, beams]
        source = source + num_beams * jnp.arange(batch)[:, None]
        return step + 1, live, finished, source.reshape(-1)

    empty = Beams(
        tokens=jnp.full((batch, num_beams, num_tokens), pad_token),
        lengths=jnp.zeros((batch, num_beams), jnp.int32),
        scores=jnp.full((batch, num_beams), -jnp.inf, logits.dtype),
    )
    # Initially each prompt has one live beam, the empty continuation.
    root = dataclasses.replace(empty, scores=empty.scores.at[:, 0].set(0))
    log_probabilities = jnp.repeat(log_probabilities[:, None], num_beams, axis=1)
    *chosen, _ = select(jnp.zeros((), jnp.int32), root, empty, log_probabilities)
    finished = lax.while_loop(unfinished, advance, (*chosen, carry))[2]
    missing = finished.scores == -jnp.inf
    return Beams(
        tokens=jnp.where(missing[:, :, None], pad_token, finished.tokens),
        lengths=jnp.where(missing, 0, finished.lengths),
        scores=finished.scores,
    )


def _best(beams: Beams, num_beams: int) -> tuple[Beams, jax.Array]:
    """Return the beams with the best scores and their indices [batch, num_beams]."""
    index = lax.top_k(beams.scores, num_beams)[1]
    best = jax.tree.map(
        lambda leaf: jnp.take_along_axis(
            leaf, index.reshape(index.shape + (1,) * (leaf.ndim - 2)), axis=1
        ),
        beams,
    )
    return best, index


def _concatenate(first: jax.Array, second: jax.Array) -> jax.Array:
    return jnp.concatenate([first, second], axis=1)
