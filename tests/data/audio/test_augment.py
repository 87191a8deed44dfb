"""Audio augmentation: documented distributions, independent examples, padding ignored."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets.data import add_noise, change_speed, random_gain, spec_augment, time_shift

TIME = 40
LENGTHS = np.array([40, 23, 0, 1] * 4, np.int32)
SAMPLES = np.random.default_rng(0).normal(size=(16, TIME)).astype(np.float32)

AUGMENTATIONS = {
    "noise": lambda key, x, lengths: add_noise(key, x, lengths, min_snr=0, max_snr=20),
    "gain": lambda key, x, lengths: random_gain(key, x),
    "shift": lambda key, x, lengths: time_shift(key, x, lengths, max_shift=5),
    "speed": lambda key, x, lengths: change_speed(key, x, lengths, output_time=TIME)[0],
    "spec_augment": lambda key, x, lengths: spec_augment(
        key, x.reshape(len(x), TIME, -1), lengths, max_time_mask=9, max_frequency_mask=0
    ).reshape(x.shape),
}
every_augmentation = pytest.mark.parametrize("name", AUGMENTATIONS)
with_lengths = pytest.mark.parametrize("name", [name for name in AUGMENTATIONS if name != "gain"])


@functools.cache
def compiled(name):
    """Compile an augmentation once for all tests."""
    return jax.jit(AUGMENTATIONS[name])


def apply(augment, inputs, lengths=None, **options):
    """Return one compiled augmentation with key 0; compiling beats one program per operation."""
    return jax.jit(functools.partial(augment, **options))(jax.random.key(0), inputs, lengths)


@every_augmentation
def test_the_same_key_gives_the_same_signals_and_another_key_others(name):
    full = np.full(16, TIME, np.int32)
    first, again, other = (compiled(name)(jax.random.key(k), SAMPLES, full) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (first.shape, first.dtype) == (SAMPLES.shape, SAMPLES.dtype)


@every_augmentation
def test_examples_are_changed_independently(name):
    same, full = SAMPLES[:1].repeat(16, axis=0), np.full(16, TIME, np.int32)
    changed = np.asarray(compiled(name)(jax.random.key(0), same, full))
    assert len(np.unique(changed, axis=0)) > 4


@every_augmentation
def test_mapped_equals_one_by_one(name):
    keys = jax.random.split(jax.random.key(3), 2)
    samples, lengths = np.stack([SAMPLES, -SAMPLES]), np.stack([LENGTHS, LENGTHS[::-1]])
    mapped = jax.jit(jax.vmap(AUGMENTATIONS[name]))(keys, samples, lengths)
    for row in range(2):
        single = compiled(name)(keys[row], samples[row], lengths[row])
        np.testing.assert_allclose(mapped[row], single, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        *("gain", "shift"),
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("noise", "speed", "spec_augment")),
    ],
)
def test_compiled_equals_eager(name):
    eager = AUGMENTATIONS[name](jax.random.key(3), jnp.array(SAMPLES), jnp.array(LENGTHS))
    np.testing.assert_allclose(
        compiled(name)(jax.random.key(3), SAMPLES, LENGTHS), eager, rtol=1e-5, atol=1e-6
    )


@with_lengths
def test_padding_is_ignored_and_becomes_zero(name):
    noisy = SAMPLES.copy()
    for row, length in zip(noisy, LENGTHS, strict=True):
        row[length:] = np.nan
    found = np.asarray(compiled(name)(jax.random.key(0), noisy, LENGTHS))
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found, compiled(name)(jax.random.key(0), SAMPLES, LENGTHS))
    if name != "speed":
        for row, length in zip(found, LENGTHS, strict=True):
            assert not row[length:].any()


@with_lengths
def test_a_length_out_of_range_is_refused_or_gives_nan(name):
    lengths = np.array([TIME + 1, *LENGTHS[1:]], np.int32)
    with pytest.raises(ValueError, match=f"length {TIME + 1} is not in"):
        AUGMENTATIONS[name](jax.random.key(0), jnp.array(SAMPLES), lengths)
    found = compiled(name)(jax.random.key(0), SAMPLES, lengths)
    assert np.isnan(found[0]).any() and np.isfinite(found[1:]).all()


# SpecAugment


def bands(mask):
    """Starts and widths of the runs of True in a row."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return list(zip(edges[::2], edges[1::2] - edges[::2], strict=True))


def test_one_mask_of_each_kind_has_a_uniform_width_and_start():
    batch, length, channels = 4000, 12, 6
    masked = apply(
        spec_augment,
        np.ones((batch, length, channels), np.float32),
        np.full((batch,), 10),
        max_time_mask=4,
        max_frequency_mask=3,
        num_time_masks=1,
        num_frequency_masks=1,
    )
    removed = np.asarray(masked)[:, :10] == 0
    frames, features = removed.all(axis=2), removed.all(axis=1)
    np.testing.assert_array_equal(removed, frames[:, :, None] | features[:, None, :])
    for masks, size, widest in ((frames, 10, 4), (features, 6, 3)):
        widths = masks.sum(axis=1)
        counts = np.bincount(widths, minlength=widest + 1)
        expected = batch / (widest + 1)
        assert len(counts) == widest + 1
        assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)
        runs = [bands(row) for row in masks]
        assert max(map(len, runs)) == 1
        starts = np.bincount([run[0][0] for run in runs if run and run[0][1] == widest])
        assert len(starts) == size - widest + 1
        assert starts.min() > 0.7 * starts.mean()


def test_several_masks_may_overlap_and_never_cover_more_than_their_sum():
    masked = apply(
        spec_augment,
        np.ones((500, 30, 4), np.float32),
        max_time_mask=5,
        max_frequency_mask=0,
        num_time_masks=3,
    )
    frames = np.asarray(masked)[:, :, 0] == 0
    assert {len(bands(row)) for row in frames} == {0, 1, 2, 3}
    assert frames.sum(axis=1).max() <= 15


def test_a_mask_covers_at_most_the_given_fraction_of_each_length():
    lengths = np.array([20, 10, 4, 0] * 100)
    masked = apply(
        spec_augment,
        np.ones((400, 20, 2), np.float32),
        lengths,
        max_time_mask=8,
        max_frequency_mask=0,
        num_time_masks=1,
        max_time_fraction=0.25,
    )
    widths = lengths - np.asarray(masked)[:, :, 0].sum(axis=1)
    for length, widest in ((20, 5), (10, 2), (4, 1), (0, 0)):
        assert widths[lengths == length].max() == widest


def test_masks_have_the_fill_value_and_padding_stays_zero():
    masked = np.asarray(
        apply(
            spec_augment,
            np.ones((50, 10, 4), np.float32),
            np.full((50,), 6),
            max_time_mask=6,
            max_frequency_mask=4,
            fill=-7.0,
        )
    )
    assert set(np.unique(masked[:, :6])) == {-7.0, 1.0}
    assert not masked[:, 6:].any()


# Noise and gain


def test_noise_has_exactly_the_requested_ratio_in_the_valid_part():
    ratios = (0, 10, 30)

    @jax.jit
    def all_ratios(key, x):
        return [add_noise(key, x, LENGTHS, min_snr=ratio, max_snr=ratio) for ratio in ratios]

    for decibels, noisy in zip(ratios, all_ratios(jax.random.key(0), SAMPLES), strict=True):
        for row, length in enumerate(LENGTHS):
            signal = SAMPLES[row, :length]
            noise = np.asarray(noisy)[row, :length] - signal
            if length:
                ratio = (signal**2).sum() / (noise**2).sum()
                np.testing.assert_allclose(10 * np.log10(ratio), decibels, atol=0.01)


@functools.cache
def noise_on_ones():
    """The noise on 2,000 constant signals of 16 samples, ratios of -10 to 20 decibels."""
    samples = np.ones((2000, 16), np.float32)
    return np.asarray(apply(add_noise, samples, min_snr=-10, max_snr=20)) - samples


def test_ratios_are_uniform_in_decibels():
    decibels = -10 * np.log10((noise_on_ones() ** 2).mean(axis=1))
    assert -10 <= decibels.min() < -9.8 and 19.8 < decibels.max() <= 20.001
    assert abs(decibels.mean() - 5) < 5 * 30 / np.sqrt(12 * 2000)


def test_noise_is_white():
    noise = noise_on_ones() / np.sqrt((noise_on_ones() ** 2).mean(axis=1, keepdims=True))
    correlations = [np.mean(noise[:, lag:] * noise[:, : 16 - lag]) for lag in range(1, 5)]
    assert np.abs(correlations).max() < 5 / np.sqrt(2000 * 12)


def test_silence_stays_silent():
    assert not compiled("noise")(jax.random.key(0), np.zeros_like(SAMPLES), LENGTHS).any()


def test_gains_are_uniform_in_decibels():
    samples = np.ones((2000, 2), np.float32)
    gain = jax.jit(functools.partial(random_gain, min_decibels=-6, max_decibels=12))
    decibels = 20 * np.log10(np.asarray(gain(jax.random.key(0), samples)))
    np.testing.assert_array_equal(decibels[:, 0], decibels[:, 1])
    assert -6.001 <= decibels.min() < -5.9 and 11.9 < decibels.max() <= 12.001
    assert abs(decibels.mean() - 3) < 5 * 18 / np.sqrt(12 * 4000)


# Time


def test_every_offset_occurs_and_only_the_valid_part_moves():
    samples = np.tile(np.arange(1.0, 9), (300, 1)).astype(np.float32)
    found = apply(time_shift, samples, np.full((300,), 6), max_shift=2)
    valid = np.pad(np.arange(1.0, 7), 2)
    expected = {(*valid[start : start + 6], 0.0, 0.0) for start in range(5)}
    assert {tuple(row) for row in np.asarray(found).tolist()} == expected


def by_hand(samples, length, steps):
    """Interpolate one signal linearly, output by output, with exact positions."""
    output, n = [], 0
    while length and n * steps <= (length - 1) * 1024:
        whole, rest = divmod(n * steps, 1024)
        following = samples[whole + 1] if whole + 1 < length else 0.0
        output.append((1 - rest / 1024) * samples[whole] + rest / 1024 * following)
        n += 1
    return np.array(output)


@pytest.mark.parametrize(
    "steps", [1000, 3000, *(pytest.param(n, marks=pytest.mark.slow) for n in (512, 1024, 1100))]
)
def test_a_changed_speed_equals_interpolation_by_hand(steps):
    speed = steps / 1024
    output, lengths = apply(change_speed, SAMPLES, LENGTHS, min_speed=speed, max_speed=speed)
    assert lengths.dtype == jnp.int32
    output = np.asarray(output)
    for row, length in enumerate(LENGTHS):
        expected = by_hand(SAMPLES[row].astype(np.float64), length, steps)
        assert lengths[row] == len(expected)
        np.testing.assert_allclose(output[row, : len(expected)], expected, atol=1e-6)
        assert not output[row, len(expected) :].any()


def test_the_default_time_axis_is_the_length_at_the_lowest_speed():
    output, lengths = apply(change_speed, SAMPLES, min_speed=0.75, max_speed=0.75)
    assert output.shape == (16, 53) and set(lengths.tolist()) == {53}  # floor(39 / 0.75) + 1


def test_a_given_time_axis_cuts_longer_examples():
    cut, lengths = apply(change_speed, SAMPLES, min_speed=0.5, max_speed=2.0, output_time=30)
    assert cut.shape == (16, 30)
    assert lengths.max() == 30 and lengths.min() < 30
    full, _ = apply(change_speed, SAMPLES, min_speed=0.5, max_speed=2.0)
    np.testing.assert_allclose(cut, full[:, :30], atol=1e-6)


def test_speeds_are_uniform_in_their_range():
    @jax.jit  # drops the signals, which nothing reads
    def changed_lengths(key):
        return change_speed(key, jnp.zeros((2000, 1001)), min_speed=0.8, max_speed=1.25)[1]

    lengths = changed_lengths(jax.random.key(0))
    speeds = 1000 / (np.asarray(lengths) - 1)
    assert 0.799 < speeds.min() < 0.805 and 1.24 < speeds.max() < 1.253
    assert abs(speeds.mean() - 1.025) < 5 * 0.45 / np.sqrt(12 * 2000)


def test_speed_one_changes_nothing():
    output, lengths = apply(change_speed, SAMPLES, LENGTHS, min_speed=1, max_speed=1)
    np.testing.assert_array_equal(lengths, LENGTHS)
    np.testing.assert_array_equal(output[0], SAMPLES[0])


def masks(**options):
    def call(key, x):
        features = jnp.zeros((2, 5, 4))
        return spec_augment(
            key, features, **{"max_time_mask": 2, "max_frequency_mask": 2} | options
        )

    return call


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (masks(max_frequency_mask=5), "at most 4 features"),
        (masks(max_time_mask=-1), "masks of up to -1 frames"),
        (masks(num_time_masks=-1), "-1 and 2 masks"),
        (masks(max_time_fraction=1.5), "up to 1.5"),
        (
            lambda key, x: spec_augment(key, x, max_time_mask=1, max_frequency_mask=1),
            "frames, chan",
        ),
        (lambda key, x: add_noise(key, x, min_snr=3, max_snr=1), "noise ratio from 3 to 1"),
        (lambda key, x: add_noise(key, x[0], min_snr=1, max_snr=1), r"shape \(40,\)"),
        (lambda key, x: random_gain(key, x.astype(jnp.int16)), "dtype int16.*to_waveform"),
        (lambda key, x: random_gain(key, x, min_decibels=np.nan), "from nan to 6.0 is not a range"),
        (lambda key, x: time_shift(key, x, max_shift=-1), "shift by -1"),
        (lambda key, x: change_speed(key, x, min_speed=0.0, max_speed=1), "speed 0.0"),
        (lambda key, x: change_speed(key, x, min_speed=2, max_speed=1), "speed from 2 to 1"),
        (lambda key, x: change_speed(key, x, output_time=0), "output time 0"),
        (lambda key, x: change_speed(key, x, output_time=1 << 30), "too long"),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(jax.random.key(0), jnp.array(SAMPLES))
