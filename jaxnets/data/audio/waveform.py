"""Waveforms: integer samples as floats."""

from __future__ import annotations

import jax
import jax.numpy as jnp

_PCM16_SCALE = 32768


def to_waveform(samples: jax.Array) -> jax.Array:
    """Map 16-bit samples to floats in [-1, 1); floats are returned unchanged.

    Store recordings as int16 on the host and call this inside the compiled step, which halves
    memory and transfer. The scale is that of `torchaudio.load(normalize=True)`.

    Args:
        samples: int16 or floating [...].

    Returns:
        [...]; float32 for int16.

    Raises:
        ValueError: another dtype, whose full scale is unknown.

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
