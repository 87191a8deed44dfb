"""Strings of spoken digits, concatenated from recordings of single digits."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping

import numpy as np

from jaxnets.checks import check_first_step, check_sizes
from jaxnets.core import Batch
from jaxnets.data.arrays import Arrays, check_arrays, check_seed

_MAX_ATTEMPTS = 1000


@dataclasses.dataclass(frozen=True, eq=False)
class DigitStringBatches:
    """Endless batches of new digit strings; see `digit_string_batches`.

    Attributes:
        strings: draws the strings.
        batch_size: strings per batch.
        seed: non-negative.
    """

    strings: _StringMaker
    batch_size: int
    seed: int

    def __call__(self, first_step: int) -> Iterator[Batch]:
        """Iterate endlessly from `first_step`."""
        check_first_step(first_step)
        for step in itertools.count(first_step):
            yield self.strings.draw(self.batch_size, self.seed, step)


def digit_strings(
    part: Mapping[str, np.ndarray],
    *,
    num_strings: int,
    seed: int,
    min_digits: int = 3,
    max_digits: int = 7,
    max_gap_seconds: float = 0.2,
    max_seconds: float | None = None,
    sample_rate: int = 8000,
) -> Arrays:
    """Concatenate whole recordings to strings of digits, for speech recognition with CTC.

    The number of digits, the speaker (one per string), the recordings and the silences between
    them (exact zeros, none at the ends) are uniform and independent. Make test strings from the
    test part, so that none of their recordings is in the training data.

    Args:
        part: "inputs" [examples, time], "lengths", "labels" and "speakers" [examples], such as
            `spoken_digits().train`.
        num_strings: strings to make.
        seed: non-negative; the result is a pure function of the arguments.
        min_digits: minimum number of digits.
        max_digits: maximum number of digits.
        max_gap_seconds: longest silence between two digits.
        max_seconds: time axis of the result; longer strings are redrawn. Of strings of the spoken
            digits with the default options, half are at most 2.5 s long, 99% 5.0 s and 99.9%
            5.7 s. By default the longest string drawn sets the axis.
        sample_rate: of the recordings, in hertz.

    Returns:
        {"inputs": dtype of the recordings [strings, time], "lengths": int32 [strings] in samples,
        "labels": int32 [strings, max_digits], the digit + 1 because 0 is the blank of CTC, padded
        with 0, "label_lengths": int32 [strings]}.

    Raises:
        ValueError: options out of range, missing arrays, or a `max_seconds` that is too short for
            almost every string.

    Example:
        >>> from jaxnets.data.datasets.speech import tone_words
        >>> strings = digit_strings(tone_words().train, num_strings=4, seed=0)
        >>> strings["labels"].shape, strings["label_lengths"].tolist()
        ((4, 7), [5, 3, 7, 3])
    """
    maker = _maker(part, min_digits, max_digits, max_gap_seconds, max_seconds, sample_rate)
    check_seed(seed)
    if num_strings < 1:
        raise ValueError(f"cannot make {num_strings} strings; give at least 1")
    strings = maker.draw(num_strings, seed)
    if max_seconds is None:
        strings["inputs"] = strings["inputs"][:, : strings["lengths"].max()].copy()
    return strings


def digit_string_batches(
    part: Mapping[str, np.ndarray],
    *,
    batch_size: int,
    seed: int,
    min_digits: int = 3,
    max_digits: int = 7,
    max_gap_seconds: float = 0.2,
    max_seconds: float | None = None,
    sample_rate: int = 8000,
) -> DigitStringBatches:
    """Yield endless batches of new digit strings, for training.

    Args:
        part: as in `digit_strings`.
        batch_size: strings per batch.
        seed: non-negative; the batch of a step is a pure function of the arguments and the step.
        min_digits: minimum number of digits.
        max_digits: maximum number of digits.
        max_gap_seconds: longest silence between two digits.
        max_seconds: time axis of every batch; longer strings are redrawn. By default the longest
            possible string sets it, which is far longer than a typical one.
        sample_rate: of the recordings, in hertz.

    Returns:
        A source of the arrays of `digit_strings`, with the same shapes in every batch.

    Raises:
        ValueError: as `digit_strings`, or a batch size below 1.

    Example:
        >>> from jaxnets.data.datasets.speech import tone_words
        >>> source = digit_string_batches(
        ...     tone_words().train, batch_size=8, seed=0, max_seconds=2.0
        ... )
        >>> next(source(0))["inputs"].shape
        (8, 16000)
    """
    maker = _maker(part, min_digits, max_digits, max_gap_seconds, max_seconds, sample_rate)
    check_seed(seed)
    check_sizes(batch_size=batch_size)
    return DigitStringBatches(maker, batch_size, seed)


@dataclasses.dataclass(frozen=True, eq=False)
class _StringMaker:
    """Draws strings; all times are in samples.

    Attributes:
        part: the recordings.
        by_speaker: indices of the recordings of each speaker.
        num_digits: minimum and maximum number of digits.
        max_gap: longest silence.
        max_time: longest string.
    """

    part: Arrays
    by_speaker: tuple[np.ndarray, ...]
    num_digits: tuple[int, int]
    max_gap: int
    max_time: int

    def draw(self, num_strings: int, *seed: int) -> Arrays:
        """Draw strings as a pure function of (seed,) or (seed, step)."""
        # NumPy guarantees that raw bits never change, unlike the methods of a Generator.
        bits = np.random.Philox(np.random.SeedSequence(seed[0], spawn_key=seed[1:]))
        inputs = np.zeros((num_strings, self.max_time), self.part["inputs"].dtype)
        labels = np.zeros((num_strings, self.num_digits[1]), np.int32)
        lengths, label_lengths = (np.zeros(num_strings, np.int32) for _ in range(2))
        for row in range(num_strings):
            chosen, gaps = self._choose(bits)
            end = 0
            for recording, gap in zip(chosen, gaps, strict=True):
                start, end = end + gap, end + gap + self.part["lengths"][recording]
                inputs[row, start:end] = self.part["inputs"][recording, : end - start]
            lengths[row], label_lengths[row] = end, len(chosen)
            labels[row, : len(chosen)] = self.part["labels"][chosen] + 1
        return {
            "inputs": inputs,
            "lengths": lengths,
            "labels": labels,
            "label_lengths": label_lengths,
        }

    def _choose(self, bits: np.random.Philox) -> tuple[np.ndarray, np.ndarray]:
        """Draw the recordings of a string that fits `max_time`, and the silence before each."""
        least, greatest = self.num_digits
        for _ in range(_MAX_ATTEMPTS):
            count, speaker, *rest = bits.random_raw(2 + 2 * greatest).tolist()
            count = least + count % (greatest - least + 1)
            recordings = self.by_speaker[speaker % len(self.by_speaker)]
            chosen = recordings[[word % len(recordings) for word in rest[:count]]]
            gaps = [word % (self.max_gap + 1) for word in rest[greatest : greatest + count]]
            gaps[0] = 0
            if self.part["lengths"][chosen].sum() + sum(gaps) <= self.max_time:
                return chosen, np.array(gaps)
        raise ValueError(
            f"none of {_MAX_ATTEMPTS} strings of {least} to {greatest} digits fits into "
            f"{self.max_time} samples; raise max_seconds or lower max_digits"
        )


def _maker(
    part: Mapping[str, np.ndarray],
    min_digits: int,
    max_digits: int,
    max_gap_seconds: float,
    max_seconds: float | None,
    sample_rate: int,
) -> _StringMaker:
    missing = {"inputs", "lengths", "labels", "speakers"} - set(part)
    if missing:
        raise ValueError(f"the part has {sorted(part)} and lacks {sorted(missing)}")
    part = check_arrays(part)
    if not 1 <= min_digits <= max_digits:
        raise ValueError(
            f"strings of {min_digits} to {max_digits} digits are out of range; give "
            "1 <= min_digits <= max_digits"
        )
    if max_gap_seconds < 0 or sample_rate < 1:
        raise ValueError(
            f"gaps of up to {max_gap_seconds} s at {sample_rate} Hz are out of range; give 0 or "
            "more, at a positive rate"
        )
    time = part["inputs"].shape[1]
    if part["lengths"].min() < 1 or part["lengths"].max() > time:
        raise ValueError(
            f"lengths from {part['lengths'].min()} to {part['lengths'].max()} are not in "
            f"[1, {time}]; count the samples of each recording"
        )
    speakers = part["speakers"]
    by_speaker = tuple(np.flatnonzero(speakers == speaker) for speaker in np.unique(speakers))
    max_gap = int(max_gap_seconds * sample_rate)
    longest = max_digits * int(part["lengths"].max()) + (max_digits - 1) * max_gap
    max_time = longest if max_seconds is None else int(max_seconds * sample_rate)
    return _StringMaker(part, by_speaker, (min_digits, max_digits), max_gap, max_time)
