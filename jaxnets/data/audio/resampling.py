"""Resampling by a rational factor."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

_MAX_TERM = 2048  # the filter bank has about the square of the larger term of the ratio


def resample(
    samples: jax.Array,
    from_rate: int,
    to_rate: int,
    *,
    num_zeros: int = 32,
    attenuation: float = 80.0,
) -> jax.Array:
    """Change the sample rate with a windowed-sinc filter in polyphase form.

    `y[m] = sum_k h[m down - k up] x[k]` with `up / down = to_rate / from_rate` in lowest terms
    and the zero-phase low-pass filter h of `resampling_filter`. With the default options
    frequencies up to 0.84 of the lower Nyquist frequency pass within 0.01 dB, and all above the
    lower Nyquist frequency are attenuated by at least 79 dB. The signal is zero-padded at both
    ends, so resample signals before they are padded to a batch.

    Equals `scipy.signal.resample_poly(samples, up, down, axis=-1, window=h)`. Corresponds to
    `torchaudio.functional.resample(resampling_method="sinc_interp_kaiser")` with `num_zeros` for
    its `lowpass_filter_width` (default 6); the window and the cutoff differ.

    Args:
        samples: floating [..., time].
        from_rate: sample rate of `samples` in hertz.
        to_rate: sample rate of the result in hertz.
        num_zeros: zero crossings of the sinc on each side; more widen the passband.
        attenuation: of the stopband in decibels, at least 50.

    Returns:
        [..., ceil(time * to_rate / from_rate)], dtype of `samples`.

    Raises:
        ValueError: samples that are not floating, a rate or option out of range, or a ratio of
            rates with a term above 2,048.

    Example:
        >>> resample(jnp.ones((2, 8000)), 16_000, 8_000).shape
        (2, 4000)

    References:
        Crochiere and Rabiner 1983, Multirate Digital Signal Processing, section 3.3 (polyphase);
        Kaiser 1974 (window and its design formula).
    """
    samples = jnp.asarray(samples)
    if samples.ndim == 0 or not jnp.issubdtype(samples.dtype, jnp.floating):
        raise ValueError(
            f"samples have shape {samples.shape} and dtype {samples.dtype}; give floats "
            "[..., time], for example by to_waveform"
        )
    if any(not isinstance(rate, int | np.integer) or rate < 1 for rate in (from_rate, to_rate)):
        raise ValueError(
            f"sample rates {from_rate} and {to_rate} must be positive integers, in hertz"
        )
    divisor = math.gcd(from_rate, to_rate)
    up, down = to_rate // divisor, from_rate // divisor
    if max(up, down) > _MAX_TERM:
        raise ValueError(
            f"the ratio {up}/{down} of the rates {to_rate} and {from_rate} has a term above "
            f"{_MAX_TERM}; round the rates, for example to multiples of 100 Hz"
        )
    if up == down or samples.size == 0:
        return samples
    impulse = up * resampling_filter(up, down, num_zeros=num_zeros, attenuation=attenuation)
    bank, num_before = _polyphase(impulse, up, down)  # [window, up]
    time = samples.shape[-1]
    length = -(-time * up // down)
    num_blocks = -(-length // up)
    num_after = (num_blocks - 1) * down + len(bank) - num_before - time
    blocks = jax.lax.conv_general_dilated(
        samples.reshape(-1, time, 1),
        jnp.asarray(bank[:, None], samples.dtype),
        window_strides=(down,),
        padding=[(num_before, max(0, num_after))],
        dimension_numbers=("NWC", "WIO", "NWC"),
        precision="highest",
    )  # [signals, blocks, up]: block q has the outputs q up ... q up + up - 1
    outputs = blocks.reshape(len(blocks), -1)[:, :length]  # [signals, length]
    return outputs.reshape(*samples.shape[:-1], length)


def resampling_filter(
    up: int, down: int, *, num_zeros: int = 32, attenuation: float = 80.0
) -> np.ndarray:
    """Design the low-pass filter of `resample`: a sinc in a Kaiser window.

    The filter works at `up` times the input rate. Its stopband starts at the lower of the two
    Nyquist frequencies, that is 1 / max(up, down) of its own.

    Args:
        up: numerator of the ratio of the rates.
        down: its denominator.
        num_zeros: zero crossings on each side.
        attenuation: of the stopband in decibels, at least 50.

    Returns:
        float64 [2 * num_zeros * max(up, down) + 1], symmetric, with sum 1.

    Raises:
        ValueError: an option out of range.

    Example:
        >>> len(resampling_filter(1, 2, num_zeros=8))
        33
    """
    # Kaiser's formula: with this many zeros the transition is as wide as the whole band.
    least_zeros = (attenuation - 7.95) / (2.285 * 2 * math.pi)
    if attenuation < 50 or num_zeros <= least_zeros:
        raise ValueError(
            f"num_zeros {num_zeros} and attenuation {attenuation} leave no passband; give at "
            f"least 50 dB and num_zeros above {least_zeros:.1f}"
        )
    width = least_zeros / num_zeros
    slower = max(up, down)
    half = num_zeros * slower
    cutoff = (1 - width / 2) / slower
    window = np.kaiser(2 * half + 1, 0.1102 * (attenuation - 8.7))
    impulse = np.sinc(cutoff * np.arange(-half, half + 1)) * window
    return impulse / impulse.sum()


def _polyphase(impulse: np.ndarray, up: int, down: int) -> tuple[np.ndarray, int]:
    """Return the filters of `up` successive outputs, [window, up], and the inputs before a block.

    The coefficient of input j, relative to the first of the block, in output r of the block is
    `impulse[r down - j up + half]`.
    """
    half = len(impulse) // 2
    num_before = half // up
    inputs = np.arange(-num_before, ((up - 1) * down + half) // up + 1)
    index = np.arange(up)[None] * down - inputs[:, None] * up + half  # [window, up]
    inside = (index >= 0) & (index < len(impulse))
    return np.where(inside, impulse[np.where(inside, index, 0)], 0.0), num_before
