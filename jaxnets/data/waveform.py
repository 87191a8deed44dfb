"""Batches of signals: samples as floats, and what lies beyond the end of each signal."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

_PCM16_SCALE = 32768


def to_waveform(samples: jax.Array) -> jax.Array:
    """Map 16-bit samples to floats in [-1, 1); floats stay as they are.

    Keep recordings int16 on the host and call this inside the compiled step: that halves the
    memory and the transfer.

    Args:
        samples: int16 or floating [...].

    Returns:
        [...]; float32 for int16.

    Raises:
        ValueError: another dtype, whose full scale is not known.

    Example:
        >>> to_waveform(jnp.array([-32768, 0, 16384], jnp.int16)).tolist()
        [-1.0, 0.0, 0.5]
    """
    samples = jnp.asarray(samples)
    if samples.dtype == jnp.int16:
        return samples.astype(jnp.float32) / _PCM16_SCALE
    if not jnp.issubdtype(samples.dtype, jnp.floating):
        raise ValueError(
            f"samples have dtype {samples.dtype}; give int16, or floats in [-1, 1] as read_wav does"
        )
    return samples


def clear_padding(x: jax.Array, lengths: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Set what lies beyond the end of each sequence to zero.

    Args:
        x: [batch, time, ...], floating.
        lengths: integer [batch] in [0, time]; None means that all steps are valid.

    Returns:
        `x` with 0 beyond each length, whatever stood there, and the valid steps, bool
        [batch, time]. Where a length that is known only when the program runs is out of range,
        the whole sequence is NaN, so that it stops training instead of being cut in silence.

    Raises:
        ValueError: lengths of another shape or dtype, or known to be out of range.

    Example:
        >>> cleared, valid = clear_padding(jnp.ones((2, 3)), jnp.array([1, 3]))
        >>> cleared.tolist()
        [[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
    """
    batch, time = x.shape[:2]
    if lengths is None:
        return x, jnp.ones((batch, time), bool)
    if jnp.shape(lengths) != (batch,) or not jnp.issubdtype(jnp.result_type(lengths), jnp.integer):
        raise ValueError(
            f"lengths of shape {jnp.shape(lengths)} and type {jnp.result_type(lengths)} do not "
            f"fit {batch} sequences; give one integer for each, shape ({batch},)"
        )
    if not isinstance(lengths, jax.core.Tracer):
        wrong = [int(n) for n in np.asarray(lengths) if not 0 <= n <= time]
        if wrong:
            raise ValueError(
                f"length {wrong[0]} is not in [0, {time}]; lengths count the steps of each "
                f"sequence, and the arrays have {time}"
            )
    lengths = jnp.asarray(lengths)
    outside = (lengths < 0) | (lengths > time)
    valid = (jnp.arange(time)[None] < lengths[:, None]) | outside[:, None]
    ones = (1,) * (x.ndim - 2)
    kept = jnp.where(outside.reshape(batch, 1, *ones), jnp.asarray(jnp.nan, x.dtype), x)
    return jnp.where(valid.reshape(batch, time, *ones), kept, jnp.zeros((), x.dtype)), valid
