"""Random changes of signals and spectrograms as pure functions of a key.

To be called inside the compiled step with the stream "augmentation". Every example of a batch is
changed in its own way, shapes are static, and what lies beyond an example's length is never used
and never changed into anything but what it was or zero.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

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
    """Mask bands of frames and of features of each example.

    A mask of frames is t wide, t uniform in 0 ... min(max_time_mask, max_time_fraction * length),
    and starts uniformly where it fits into the example; masks of features likewise. Masks may
    overlap.

    Args:
        key: random key.
        features: floating [batch, frames, channels], such as log-mel features.
        lengths: valid frames of each example, integer [batch]; all by default.
        max_time_mask: greatest width of a mask of frames, T in the paper.
        max_frequency_mask: greatest width of a mask of features, F in the paper.
        num_time_masks: masks of frames.
        num_frequency_masks: masks of features.
        max_time_fraction: greatest part of an example that one mask of frames covers, p.
        fill: what masks are filled with; 0 is the mean of standardized features.

    Returns:
        The shape and dtype of `features`; frames beyond each length are 0.

    Raises:
        ValueError: a number out of range, a mask wider than there are features, or lengths that
            do not fit.

    Example:
        >>> masked = spec_augment(
        ...     jax.random.key(0), jnp.ones((2, 50, 40)), max_time_mask=10, max_frequency_mask=8
        ... )
        >>> bool((masked == 0).any())
        True

    References:
        Park et al. 2019, arXiv:1904.08779, section 2 and table 1 (LibriSpeech: T 100, F 27, p 1,
        two masks each). Differs from the paper: no time warping, which it finds to matter least
        (section 5).
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
            f"{num_time_masks} and {num_frequency_masks} masks of a part of up to "
            f"{max_time_fraction} are out of range; give 0 masks or more and a part in [0, 1]"
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
    return jnp.where(masked, jnp.asarray(fill, features.dtype), features)


def _bands(
    key: jax.Array, num_bands: int, widest: jax.Array, sizes: jax.Array, length: int
) -> jax.Array:
    """Draw bands within the first `sizes` positions; bool [batch, length], True inside of any."""
    width_key, start_key = jax.random.split(key)
    shape = (num_bands, len(sizes))
    widths = jax.random.randint(width_key, shape, 0, widest[None] + 1)
    starts = jax.random.randint(start_key, shape, 0, sizes[None] - widths + 1)
    positions = jnp.arange(length)[None, None]
    inside = (positions >= starts[..., None]) & (positions < (starts + widths)[..., None])
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

    Args:
        key: random key.
        samples: floating [batch, time].
        lengths: valid samples of each example, integer [batch]; all by default.
        min_snr: least ratio of the power of the signal to that of the noise, in decibels.
        max_snr: greatest ratio; the one of each example is uniform between the two, and exact.

    Returns:
        The shape and dtype of `samples`, 0 beyond each length. Silence stays silent.

    Raises:
        ValueError: a range that is empty, samples of another rank or dtype, or lengths that do
            not fit.

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
    noise = jax.random.normal(noise_key, samples.shape, samples.dtype)
    noise = jnp.where(valid, noise, jnp.zeros((), samples.dtype))
    decibels = _uniform(ratio_key, samples, min_snr, max_snr)

    def energy(signal: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(signal), axis=1, keepdims=True)

    tiny = jnp.finfo(samples.dtype).tiny  # an example of length 0 has no noise
    scale = jnp.sqrt(energy(samples) / jnp.maximum(energy(noise), tiny) * 10 ** (-decibels / 10))
    return samples + scale * noise


def random_gain(
    key: jax.Array, samples: jax.Array, *, min_decibels: float = -6.0, max_decibels: float = 6.0
) -> jax.Array:
    """Make each example louder or softer by a random factor.

    Args:
        key: random key.
        samples: floating [batch, time].
        min_decibels: least change of the level; the factor is 10 ** (decibels / 20).
        max_decibels: greatest change; uniform between the two. Loud samples may leave [-1, 1].

    Returns:
        The shape and dtype of `samples`.

    Raises:
        ValueError: a range that is empty, or samples of another rank or dtype.

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
    """Move each example by a random offset within its own length, zeros where nothing was.

    What is moved over either end is lost, so keep `max_shift` short.

    Args:
        key: random key.
        samples: floating [batch, time].
        lengths: valid samples of each example, integer [batch]; all by default. They stay valid.
        max_shift: the offset is uniform in -max_shift ... max_shift samples.

    Returns:
        The shape and dtype of `samples`, 0 beyond each length.

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
    moved = jnp.take_along_axis(samples, jnp.clip(sources, 0, time - 1), axis=1)
    return jnp.where(inside, moved, jnp.zeros((), samples.dtype))


def change_speed(
    key: jax.Array,
    samples: jax.Array,
    lengths: jax.Array | None = None,
    *,
    min_speed: float = 0.9,
    max_speed: float = 1.1,
    output_time: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Play each example faster or slower, which changes its pitch too.

    Output n is the input at n * speed, interpolated linearly: `y[n] = (1 - f) x[i] + f x[i + 1]`
    with i the whole part of n * speed and f the rest.

    Args:
        key: random key.
        samples: floating [batch, time].
        lengths: valid samples of each example, integer [batch]; all by default.
        min_speed: least speed, positive.
        max_speed: greatest speed; uniform between the two, rounded to a multiple of 1/1024.
        output_time: time axis of the result; by default what the slowest speed needs. Examples
            that get longer than that are cut.

    Returns:
        Samples [batch, output_time], 0 beyond the new lengths, and the new lengths, int32 [batch]:
        `floor((length - 1) / speed) + 1`, at most `output_time`.

    Raises:
        ValueError: speeds that are not positive or an empty range, an `output_time` below 1,
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
    first, rest = positions // _SPEED_STEPS, positions % _SPEED_STEPS
    weights = rest.astype(samples.dtype) / _SPEED_STEPS

    def at(indices: jax.Array) -> jax.Array:
        return jnp.take_along_axis(samples, jnp.clip(indices, 0, time - 1), axis=1)

    played = (1 - weights) * at(first) + weights * at(first + 1)
    last = (lengths[:, None] - 1) * _SPEED_STEPS  # the position of the last sample
    inside = positions <= last
    played = jnp.where(inside, played, jnp.zeros((), samples.dtype))
    return played, jnp.sum(inside, axis=1, dtype=jnp.int32)


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
            f"{name} from {least} to {greatest} is no range; give finite least <= greatest"
        )


def _uniform(key: jax.Array, samples: jax.Array, least: float, greatest: float) -> jax.Array:
    """Draw a value for each example, [batch, 1]."""
    return jax.random.uniform(key, (len(samples), 1), samples.dtype, least, greatest)
