"""Augmentation of waveforms and spectrograms as pure functions of a key.

Call them inside the compiled step with a key of the stream "augmentation". Every example of a
batch gets its own random change, shapes are static, and with `lengths` the padding is ignored and
zero in the result.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from jaxnets.core import drawn_in_float32
from jaxnets.functional.lengths import clear_padding

_SPEED_STEPS = 1024  # speeds are multiples of 1 / 1024, so positions are exact integers


def spec_augment(
    key: jax.Array,
    features: jax.Array,
    lengths: jax.Array | None = None,
    *,
    max_time_mask: int,
    max_frequency_mask: int,
    num_time_masks: int = 2,
    num_frequency_masks: int = 2,
    max_time_fraction: float = 1.0,
    fill: float = 0.0,
) -> jax.Array:
    """Mask random bands of frames and of features of each example (SpecAugment).

    The width of a time mask is uniform in 0 ... min(max_time_mask, max_time_fraction * length),
    and its start is uniform where it fits into the example; likewise for frequency masks. Masks
    may overlap. Corresponds to `torchaudio.transforms.TimeMasking` and `FrequencyMasking` with
    `iid_masks=True`, applied several times.

    Args:
        key: random key.
        features: floating [batch, frames, channels], such as log-mel features.
        lengths: valid frames of each example, integer [batch]; default all.
        max_time_mask: maximum width of a time mask in frames, T in the paper.
        max_frequency_mask: maximum width of a frequency mask in features, F in the paper.
        num_time_masks: number of time masks.
        num_frequency_masks: number of frequency masks.
        max_time_fraction: maximum fraction of an example that one time mask covers, p.
        fill: value in the masks; 0 is the mean of standardized features.

    Returns:
        The shape and dtype of `features`; frames from each length on are 0.

    Raises:
        ValueError: an option out of range, a mask wider than the features, or lengths that do not
            fit.

    Example:
        >>> masked = spec_augment(
        ...     jax.random.key(0), jnp.ones((2, 50, 40)), max_time_mask=10, max_frequency_mask=8
        ... )
        >>> bool((masked == 0).any())
        True

    References:
        Park et al. 2019, arXiv:1904.08779, section 2 and table 1 (LibriSpeech: T 100, F 27, p 1,
        two masks each). Differs from the paper: no time warping, which has the smallest effect
        there (section 5).
    """
    _check_floating(features, rank=3)
    batch, num_frames, num_channels = features.shape
    if not 0 <= max_frequency_mask <= num_channels or max_time_mask < 0:
        raise ValueError(
            f"masks of up to {max_time_mask} frames and {max_frequency_mask} features do not fit "
            f"features of shape {features.shape}; give 0 or more, and at most {num_channels} "
            "features"
        )
    if min(num_time_masks, num_frequency_masks) < 0 or not 0 <= max_time_fraction <= 1:
        raise ValueError(
            f"{num_time_masks} and {num_frequency_masks} masks of a fraction of up to "
            f"{max_time_fraction} are out of range; give 0 masks or more and a fraction in [0, 1]"
        )
    features, valid = clear_padding(features, lengths)
    sizes = jnp.sum(valid, axis=1)
    widest = jnp.minimum(max_time_mask, (max_time_fraction * sizes).astype(int))
    time_key, frequency_key = jax.random.split(key)
    frames = _bands(time_key, num_time_masks, widest, sizes, num_frames)
    all_channels = jnp.full((batch,), num_channels)
    widest = jnp.full((batch,), max_frequency_mask)
    channels = _bands(frequency_key, num_frequency_masks, widest, all_channels, num_channels)
    masked = (frames[:, :, None] | channels[:, None, :]) & valid[:, :, None]
    # [batch, frames, channels]
    return jnp.where(masked, jnp.asarray(fill, features.dtype), features)


def _bands(
    key: jax.Array, num_bands: int, widest: jax.Array, sizes: jax.Array, length: int
) -> jax.Array:
    """Draw bands within the first `sizes` positions; bool [batch, length], True in any band."""
    width_key, start_key = jax.random.split(key)
    shape = (num_bands, len(sizes))
    widths = jax.random.randint(width_key, shape, 0, widest[None] + 1)
    starts = jax.random.randint(start_key, shape, 0, sizes[None] - widths + 1)
    positions = jnp.arange(length)[None, None]
    inside = (positions >= starts[..., None]) & (positions < (starts + widths)[..., None])
    # [bands, batch, length]
    return jnp.any(inside, axis=0)


def add_noise(
    key: jax.Array,
    samples: jax.Array,
    lengths: jax.Array | None = None,
    *,
    min_snr: float,
    max_snr: float,
) -> jax.Array:
    """Add white Gaussian noise at a random signal-to-noise ratio.

    Corresponds to `torchaudio.functional.add_noise` with noise and `snr` drawn for each example.

    Args:
        key: random key.
        samples: floating [batch, time].
        lengths: valid samples of each example, integer [batch]; default all.
        min_snr: minimum ratio of signal power to noise power, in decibels.
        max_snr: maximum ratio; that of each example is uniform between the two, and exact.

    Returns:
        The shape and dtype of `samples`, 0 from each length on. Silence stays silent.

    Raises:
        ValueError: an empty range, samples of another rank or dtype, or lengths that do not fit.

    Example:
        >>> tone = jnp.ones((1, 1000))
        >>> noise = add_noise(jax.random.key(0), tone, min_snr=20, max_snr=20) - tone
        >>> round(float(jnp.mean(noise**2)), 6)
        0.01
    """
    _check_floating(samples, rank=2)
    _check_range("signal-to-noise ratio", min_snr, max_snr)
    samples, valid = clear_padding(samples, lengths)
    noise_key, ratio_key = jax.random.split(key)
    noise = drawn_in_float32(jax.random.normal)(noise_key, samples.shape, samples.dtype)
    noise = jnp.where(valid, noise, jnp.zeros((), samples.dtype))
    decibels = _uniform(ratio_key, samples, min_snr, max_snr)

    def energy(signal: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(signal), axis=1, keepdims=True)

    tiny = jnp.finfo(samples.dtype).tiny  # avoids 0 / 0 for an example of length 0
    scale = jnp.sqrt(energy(samples) / jnp.maximum(energy(noise), tiny) * 10 ** (-decibels / 10))
    return samples + scale * noise


def random_gain(
    key: jax.Array, samples: jax.Array, *, min_decibels: float = -6.0, max_decibels: float = 6.0
) -> jax.Array:
    """Scale each example by a random gain.

    Args:
        key: random key.
        samples: floating [batch, time].
        min_decibels: minimum gain; the factor is 10 ** (decibels / 20).
        max_decibels: maximum gain, uniform between the two. Loud samples may exceed [-1, 1].

    Returns:
        The shape and dtype of `samples`.

    Raises:
        ValueError: an empty range, or samples of another rank or dtype.

    Example:
        >>> louder = random_gain(
        ...     jax.random.key(0), jnp.ones((1, 3)), min_decibels=20, max_decibels=20
        ... )
        >>> louder.tolist()
        [[10.0, 10.0, 10.0]]
    """
    _check_floating(samples, rank=2)
    _check_range("change of the level", min_decibels, max_decibels)
    return samples * 10 ** (_uniform(key, samples, min_decibels, max_decibels) / 20)


def time_shift(
    key: jax.Array, samples: jax.Array, lengths: jax.Array | None = None, *, max_shift: int
) -> jax.Array:
    """Shift each example by a random offset within its own length, filled with zeros.

    Samples shifted past either end are lost, so choose a small `max_shift`.

    Args:
        key: random key.
        samples: floating [batch, time].
        lengths: valid samples of each example, integer [batch]; default all. They stay valid.
        max_shift: the offset is uniform in -max_shift ... max_shift samples.

    Returns:
        The shape and dtype of `samples`, 0 from each length on.

    Raises:
        ValueError: negative `max_shift`, samples of another rank or dtype, or lengths that do not
            fit.

    Example:
        >>> time_shift(jax.random.key(3), jnp.array([[1.0, 2.0, 3.0]]), max_shift=1).tolist()
        [[2.0, 3.0, 0.0]]
    """
    _check_floating(samples, rank=2)
    if max_shift < 0:
        raise ValueError(f"cannot shift by {max_shift} samples; give 0 or more")
    samples, valid = clear_padding(samples, lengths)
    batch, time = samples.shape
    offsets = jax.random.randint(key, (batch, 1), -max_shift, max_shift + 1)
    sources = jnp.arange(time)[None] - offsets
    inside = (sources >= 0) & (sources < time) & valid
    shifted = jnp.take_along_axis(samples, jnp.clip(sources, 0, time - 1), axis=1)
    return jnp.where(inside, shifted, jnp.zeros((), samples.dtype))


def change_speed(
    key: jax.Array,
    samples: jax.Array,
    lengths: jax.Array | None = None,
    *,
    min_speed: float = 0.9,
    max_speed: float = 1.1,
    output_time: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Change the speed and the pitch of each example by a random factor (speed perturbation).

    Output n is the input at n * speed, interpolated linearly: `y[n] = (1 - f) x[i] + f x[i + 1]`
    with i the integer part of n * speed and f the fractional part. Corresponds to
    `torchaudio.transforms.SpeedPerturbation`, which resamples with a low-pass filter.

    Args:
        key: random key.
        samples: floating [batch, time].
        lengths: valid samples of each example, integer [batch]; default all.
        min_speed: minimum speed, positive.
        max_speed: maximum speed; uniform between the two, rounded to a multiple of 1/1024.
        output_time: time axis of the result; by default the length at `min_speed`. Longer
            examples are cut.

    Returns:
        Samples [batch, output_time], 0 from the new lengths on, and the new lengths, int32 [batch]:
        `floor((length - 1) / speed) + 1`, at most `output_time`.

    Raises:
        ValueError: non-positive speeds or an empty range, an `output_time` below 1,
            signals too long for exact positions, samples of another rank or dtype, or lengths
            that do not fit.

    Example:
        >>> change_speed(jax.random.key(0), jnp.arange(5.0)[None], min_speed=2, max_speed=2)
        (Array([[0., 2., 4.]], dtype=float32), Array([3], dtype=int32))

    References:
        Ko, Peddinti, Povey and Khudanpur 2015, Audio Augmentation for Speech Recognition,
        Interspeech, section 3 (speeds 0.9, 1.0 and 1.1).
    """
    _check_floating(samples, rank=2)
    _check_range("speed", min_speed, max_speed)
    slowest, fastest = round(min_speed * _SPEED_STEPS), round(max_speed * _SPEED_STEPS)
    batch, time = samples.shape
    if output_time is None:
        output_time = max(0, time - 1) * _SPEED_STEPS // max(1, slowest) + 1
    if slowest < 1 or output_time < 1:
        raise ValueError(
            f"speed {min_speed} and output time {output_time} must be positive; give a speed of "
            f"at least {1 / _SPEED_STEPS} and a time of at least 1"
        )
    if max(time * _SPEED_STEPS, output_time * fastest) >= 1 << 31:
        raise ValueError(
            f"signals of {time} samples at a speed of up to {max_speed} are too long for 32-bit "
            f"positions; cut them to {((1 << 31) - 1) // max(_SPEED_STEPS, fastest)} samples"
        )
    samples, valid = clear_padding(samples, lengths)
    lengths = jnp.sum(valid, axis=1, dtype=jnp.int32)
    steps = jax.random.randint(key, (batch, 1), slowest, fastest + 1)
    positions = jnp.arange(output_time)[None] * steps
    first, remainder = positions // _SPEED_STEPS, positions % _SPEED_STEPS
    fraction = remainder.astype(samples.dtype) / _SPEED_STEPS  # [batch, output_time]

    def at(indices: jax.Array) -> jax.Array:
        return jnp.take_along_axis(samples, jnp.clip(indices, 0, time - 1), axis=1)

    output = (1 - fraction) * at(first) + fraction * at(first + 1)
    last = (lengths[:, None] - 1) * _SPEED_STEPS  # the position of the last sample
    inside = positions <= last
    output = jnp.where(inside, output, jnp.zeros((), samples.dtype))
    return output, jnp.sum(inside, axis=1, dtype=jnp.int32)


def _check_floating(array: jax.Array, *, rank: int) -> None:
    if array.ndim != rank or not jnp.issubdtype(array.dtype, jnp.floating):
        axes = "[batch, time]" if rank == 2 else "[batch, frames, channels]"
        raise ValueError(
            f"the array has shape {array.shape} and dtype {array.dtype}; give floats {axes}, "
            "for example by to_waveform"
        )


def _check_range(name: str, least: float, greatest: float) -> None:
    if not (math.isfinite(least) and math.isfinite(greatest) and least <= greatest):
        raise ValueError(
            f"{name} from {least} to {greatest} is not a range; give finite minimum <= maximum"
        )


def _uniform(key: jax.Array, samples: jax.Array, least: float, greatest: float) -> jax.Array:
    """Draw one value per example, [batch, 1]."""
    uniform = functools.partial(jax.random.uniform, minval=least, maxval=greatest)
    return drawn_in_float32(uniform)(key, (len(samples), 1), samples.dtype)
