"""Autoregressive generation in one compiled loop, for any module with the decoding protocol.

The protocol is described in `generate`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxnets.checks import check_key
from jaxnets.core import at_least_float32, at_least_int32, known_values
from jaxnets.functional.lengths import check_lengths, clear_tokens, last_step
from jaxnets.generation.sampling import Sampling, add_logit_bias, sample_tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generated:
    """What `generate` returns.

    Attributes:
        tokens: int32 [batch, num_tokens]; a stop token ends its row and is followed by `pad_token`.
        lengths: int32 [batch], number of tokens including the stop token.
        log_probabilities: [batch, num_tokens], of each token under the model, in nats, before
            `logit_bias` and the transforms of `Sampling`; 0 after a stop token. NaN where the
            logits are NaN.
        carry: cache of the model after these tokens, from which another call continues.
    """

    tokens: jax.Array
    lengths: jax.Array
    log_probabilities: jax.Array
    carry: Any


def generate(
    module: Any,
    variables: Any,
    prompts: jax.Array,
    *,
    num_tokens: int,
    rng: jax.Array,
    lengths: jax.Array | None = None,
    sampling: Sampling = Sampling(),
    stop_tokens: Sequence[int] = (),
    logit_bias: jax.Array | None = None,
    carry: Any = None,
    capacity: int | None = None,
    pad_token: int = 0,
) -> Generated:
    """Continue prompts by sampling or greedy decoding.

    The prompts are processed in parallel (prefill). Then a compiled loop generates one token per
    iteration and ends early when every row has produced a stop token. Calls with arrays of the
    same shapes share one compiled program, whatever the prompts, keys, stop tokens and `Sampling`
    values: pad prompts to a few lengths. Corresponds to `generate` of Hugging Face transformers.

    Args:
        module: a Linen module with the decoding protocol:
            `apply(variables, batch_size, capacity, method="start")` returns an empty carry
            (cache), whose leaves are [batch, ...], and
            `apply(variables, tokens, carry, lengths=None, method="extend")` appends the first
            lengths[b] of the tokens [batch, time] to each row and returns
            (logits [batch, time, vocabulary], carry). Two methods are optional: `prefill`, as
            `extend`, returns the logits after the last token of each row only,
            [batch, vocabulary], so that a large vocabulary costs nothing at the other tokens of a
            prompt; and `module.room(carry)` returns the maximum number of tokens of a carry that
            has one, including those that it already holds.
        variables: its parameters and other collections.
        prompts: integer [batch, time], padded on the right.
        num_tokens: maximum number of tokens to generate.
        rng: key. The samples of row i depend on this key and i only, not on other rows; greedy
            decoding ignores it.
        lengths: integer [batch] in [1, time], the number of tokens of each prompt; by default
            all count.
        sampling: how tokens are sampled; `Sampling(temperature=0)` is greedy. The repetition
            penalty applies to the tokens of this call, prompts included.
        stop_tokens: tokens that end their row.
        logit_bias: floating [vocabulary], or [steps, vocabulary] for the first steps, whose last
            row is for all later ones. It is added to the logits before `sampling`; -infinity
            excludes a token, as Whisper does with those that are not speech.
        carry: cache to continue: `Generated.carry` of an earlier call, or for a
            sequence-to-sequence model the result of
            `apply(variables, source, lengths, capacity, method="start")`. By default empty.
        capacity: maximum number of tokens in the cache; by default time + num_tokens. With a
            `carry` it only serves as a check. If the tokens that a carry already holds leave
            too little room, the log-probabilities are NaN.
        pad_token: follows a stop token.

    Returns:
        `Generated`.

    Raises:
        ValueError: an empty prompt, a length or token id out of range, a prompt that does not fit
            into the cache, `num_tokens` below 1. Values that are traced cannot raise: wrong ones
            give NaN as log-probabilities.
        TypeError: `rng` is not a key.

    Example:
        >>> import flax.linen as nn
        >>> class Counting(nn.Module):  # next token = token + 1, modulo 5
        ...     def start(self, batch_size, capacity):
        ...         return ()
        ...     def extend(self, tokens, carry, lengths=None):
        ...         return 100 * jax.nn.one_hot((tokens + 1) % 5, 5), carry
        >>> prompts = jnp.array([[1, 2], [4, 0]])
        >>> result = generate(Counting(), {}, prompts, num_tokens=4, lengths=jnp.array([2, 1]),
        ...                   rng=jax.random.key(0), stop_tokens=(1,))
        >>> result.tokens.tolist(), result.lengths.tolist()
        ([[3, 4, 0, 1], [0, 1, 0, 0]], [4, 2])
    """
    check_key(rng)
    prompts, lengths, capacity = check_prompts(
        module,
        variables,
        prompts,
        lengths,
        carry,
        num_tokens=num_tokens,
        capacity=capacity,
        stop_tokens=stop_tokens,
    )
    stops, pad = np.asarray(stop_tokens, np.int32), np.int32(pad_token)
    return _generate(
        *(module, num_tokens, capacity),
        *(variables, prompts, lengths, carry, rng, sampling, stops, logit_bias, pad),
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(
    module: Any,
    num_tokens: int,
    capacity: int,
    variables: Any,
    prompts: jax.Array,
    lengths: jax.Array | None,
    carry: Any,
    rng: jax.Array,
    sampling: Sampling,
    stop_tokens: jax.Array,
    logit_bias: jax.Array | None,
    pad_token: jax.Array,
) -> Generated:
    batch, time = prompts.shape
    logits, carry = prefill(module, capacity, variables, prompts, lengths, carry)
    keys = jax.vmap(lambda row: jax.random.fold_in(rng, row))(jnp.arange(batch))
    rows = jnp.arange(batch)
    in_prompt = jnp.ones((batch, time), bool)
    if lengths is not None:
        in_prompt = jnp.arange(time)[None] < lengths[:, None]
    repeated = jnp.zeros(logits.shape, bool)  # [batch, vocabulary], tokens of prompt and text
    repeated = repeated.at[rows[:, None], prompts].max(in_prompt)

    def unfinished(state: tuple[Any, ...]) -> jax.Array:
        step, _, active, *_ = state
        return (step < num_tokens) & jnp.any(active)

    def advance(state: tuple[Any, ...]) -> tuple[Any, ...]:
        step, result, active, logits, repeated = state
        step_keys = jax.vmap(lambda key: jax.random.fold_in(key, step))(keys)
        biased = add_logit_bias(logits, logit_bias, step)
        token = sample_tokens(step_keys, biased, sampling, repeated)
        log_probability = jnp.take_along_axis(
            jax.nn.log_softmax(logits, axis=-1), token[:, None], axis=-1
        )[:, 0]
        # A row that has stopped appends nothing, so its carry stays at its last token.
        counts = active.astype(jnp.int32)  # [batch], 0 or 1
        extended, carry = module.apply(
            variables,
            token[:, None],
            result.carry,
            lengths=counts if stop_tokens.size else None,
            method="extend",
        )
        result = Generated(
            tokens=result.tokens.at[:, step].set(jnp.where(active, token, pad_token)),
            lengths=result.lengths + counts,
            log_probabilities=result.log_probabilities.at[:, step].set(
                jnp.where(active, log_probability, 0)
            ),
            carry=carry,
        )
        repeated = repeated.at[rows, token].max(active)
        active = active & ~jnp.any(token[:, None] == stop_tokens[None], axis=1)
        return step + 1, result, active, at_least_float32(extended[:, 0]), repeated

    empty = Generated(
        tokens=jnp.full((batch, num_tokens), pad_token),
        lengths=jnp.zeros(batch, jnp.int32),
        log_probabilities=jnp.zeros((batch, num_tokens), logits.dtype),
        carry=carry,
    )
    start = (jnp.zeros((), jnp.int32), empty, jnp.ones(batch, bool), logits, repeated)
    return lax.while_loop(unfinished, advance, start)[1]


@functools.partial(jax.jit, static_argnums=(0, 1))
def prefill(
    module: Any,
    capacity: int,
    variables: Any,
    prompts: jax.Array,
    lengths: jax.Array | None,
    carry: Any,
) -> tuple[jax.Array, Any]:
    """Process whole prompts in parallel (prefill).

    Args:
        module: with the decoding protocol.
        capacity: of the carry to start if none is given.
        variables: of the module.
        prompts: integer [batch, time].
        lengths: integer [batch]; all of `time` by default.
        carry: cache to continue; by default empty.

    Returns:
        Next-token logits after each prompt [batch, vocabulary], float32 or wider, NaN for a length
        that is out of range; and the carry after the prompts.
    """
    batch, time = prompts.shape
    if carry is None:
        carry = module.apply(variables, batch, capacity, method="start")
    method = "prefill" if hasattr(type(module), "prefill") else "extend"
    logits, carry = module.apply(variables, prompts, carry, lengths=lengths, method=method)
    last = at_least_float32(logits if method == "prefill" else last_step(logits, lengths))
    if lengths is None:
        return last, carry
    inside = check_lengths(lengths, rows=batch, most=time, least=1)
    return jnp.where(inside[:, None], last, jnp.nan), carry


def check_prompts(
    module: Any,
    variables: Any,
    prompts: jax.Array,
    lengths: jax.Array | None,
    carry: Any,
    *,
    num_tokens: int,
    capacity: int | None,
    stop_tokens: Sequence[int],
) -> tuple[jax.Array, jax.Array | None, int]:
    """Check the arguments of generation, as far as their values are known while tracing.

    Args:
        module: with the decoding protocol.
        variables: of the module.
        prompts: integer [batch, time].
        lengths: integer [batch], or None.
        carry: cache with leaves [batch, ...], or None.
        num_tokens: tokens to generate.
        capacity: of the cache, or None.
        stop_tokens: must be in the vocabulary.

    Returns:
        The prompts, int32, with 0 beyond their lengths; the lengths; and the capacity of a new
        cache.

    Raises:
        ValueError: as in `generate`.
    """
    missing = [name for name in ("start", "extend") if not hasattr(type(module), name)]
    if missing:
        raise ValueError(
            f"{type(module).__name__} has no method {' and '.join(missing)}; give a module that "
            "has the decoding protocol, such as RecurrentLM or TransformerLM"
        )
    if not isinstance(num_tokens, int) or num_tokens < 1:
        raise ValueError(f"num_tokens is {num_tokens}; give a positive integer")
    prompts = prompts if isinstance(prompts, jax.Array) else np.asarray(prompts)
    shape, dtype = prompts.shape, prompts.dtype
    if len(shape) != 2 or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(
            f"prompts of shape {shape} and type {dtype} do not fit; give integers [batch, time], "
            "a single prompt as prompt[None]"
        )
    if 0 in shape:
        raise ValueError(
            f"prompts of shape {shape} are empty; give at least one token, such as a "
            "beginning-of-text token"
        )
    needed = shape[1] + num_tokens
    if capacity is not None and needed > capacity:
        raise ValueError(
            f"prompts of {shape[1]} tokens and {num_tokens} new ones do not fit a cache of "
            f"capacity {capacity}; give capacity={needed}, shorter prompts or fewer new tokens"
        )
    capacity = needed if capacity is None else capacity
    if lengths is not None:
        lengths = lengths if isinstance(lengths, jax.Array) else np.asarray(lengths)
        check_lengths(lengths, rows=shape[0], most=shape[1], least=1)
        prompts = clear_tokens(prompts, lengths)
    if carry is not None and hasattr(type(module), "room"):
        _check_room(module.room(carry), shape[1], lengths, num_tokens)
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(carry)}
    if sizes - {shape[:1]}:
        raise ValueError(
            f"a carry of {sorted(sizes)} rows does not fit {shape[0]} prompts; give one prompt "
            "for each row of the carry"
        )
    arrays = (variables, jax.ShapeDtypeStruct(shape, jnp.int32), lengths, carry)
    vocabulary_size = prefill.eval_shape(module, capacity, *arrays)[0].shape[-1]
    ids = np.asarray(stop_tokens, np.int64).ravel()
    known = known_values(prompts)
    if known is not None:
        ids = np.concatenate([at_least_int32(known).ravel(), ids])
    wrong = ids[(ids < 0) | (ids >= vocabulary_size)]
    if wrong.size:
        raise ValueError(
            f"token id {wrong[0]} is outside the vocabulary of {vocabulary_size}; encode the "
            "text with the tokenizer that the network was built for"
        )
    return jnp.asarray(prompts, jnp.int32), lengths, capacity


def _check_room(capacity: int, time: int, lengths: Any, num_tokens: int) -> None:
    longest = time
    if lengths is not None:
        known = known_values(lengths)
        longest = 1 if known is None else int(np.max(known))  # 1 is the least that it can be
    if longest + num_tokens > capacity:
        raise ValueError(
            f"prompts of {longest} tokens and {num_tokens} new ones do not fit the carry, which "
            f"has room for {capacity}; start it with a capacity of {longest + num_tokens} or more, "
            "or give shorter prompts or fewer new tokens"
        )
