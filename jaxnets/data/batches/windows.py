"""Windows over one long sequence of token ids: random, parallel streams, or one exact pass.

In every window "labels" are "inputs" shifted by one: token t + 1 is predicted from tokens up to t.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from jaxnets.checks import check_first_step, check_sizes
from jaxnets.core import Batch
from jaxnets.data.arrays import as_int32, check_seed
from jaxnets.data.batches.rows import WHOLE, Rows


@dataclasses.dataclass(frozen=True, eq=False)
class TokenWindows:
    """Endless batches of windows at random positions; see `token_windows`."""

    endless: ClassVar[bool] = True

    tokens: np.ndarray
    batch_size: int
    length: int
    seed: int
    rows: Rows = WHOLE

    @property
    def steps_per_epoch(self) -> int:
        """Batches with about as many tokens as the text, at least 1."""
        return max(1, len(self.tokens) // (self.batch_size * self.length))

    def __call__(self, first_step: int) -> Iterator[Batch]:
        """Iterate endlessly from `first_step`: int32 arrays [batch, length]."""
        check_first_step(first_step)
        num_starts = len(self.tokens) - self.length
        for step in itertools.count(first_step):
            bits = np.random.Philox(np.random.SeedSequence(self.seed, spawn_key=(step,)))
            # The remainder of 64 random bits is uniform to within num_starts / 2^64.
            starts = bits.random_raw(self.batch_size) % np.uint64(num_starts)
            starts = starts[self.rows.of(self.batch_size)]
            yield _windows(self.tokens, starts.astype(np.int64), self.length)

    def part(self, index: int, count: int) -> TokenWindows:
        """Return the source of one of `count` equal parts of every batch, as `sharded_batches`."""
        return dataclasses.replace(self, rows=self.rows.part(index, count, self.batch_size))


@dataclasses.dataclass(frozen=True, eq=False)
class TokenStreams:
    """Endless batches whose rows continue those of the previous batch; see `token_streams`."""

    endless: ClassVar[bool] = True

    tokens: np.ndarray
    batch_size: int
    length: int
    rows: Rows = WHOLE

    @property
    def steps_per_epoch(self) -> int:
        """Batches after which the whole text was read once."""
        return (len(self.tokens) - 1) // (self.batch_size * self.length)

    def __call__(self, first_step: int) -> Iterator[Batch]:
        """Iterate endlessly from `first_step`: int32 arrays [batch, length]."""
        check_first_step(first_step)
        part = self.steps_per_epoch * self.length
        rows = np.arange(self.batch_size)[self.rows.of(self.batch_size)] * part
        for step in itertools.count(first_step):
            starts = (rows + step * self.length) % (part * self.batch_size)
            yield _windows(self.tokens, starts, self.length)

    def part(self, index: int, count: int) -> TokenStreams:
        """Return the source of one of `count` equal parts of every batch, as `sharded_batches`."""
        return dataclasses.replace(self, rows=self.rows.part(index, count, self.batch_size))


@dataclasses.dataclass(frozen=True, eq=False)
class SequentialWindows:
    """One pass that predicts every token once; see `sequential_windows`."""

    tokens: np.ndarray
    batch_size: int
    length: int
    stride: int
    rows: Rows = WHOLE

    @property
    def num_predictions(self) -> int:
        """Predicted tokens in the pass: all but the first."""
        return len(self.tokens) - 1

    @property
    def num_windows(self) -> int:
        """Windows in the pass."""
        return 1 + -(-(self.num_predictions - self.length) // self.stride)

    def __len__(self) -> int:
        return -(-self.num_windows // self.batch_size)

    def __call__(self, first_step: int) -> Iterator[Batch]:
        """Iterate from batch `first_step` to the last: arrays with "weights" [batch, length]."""
        check_first_step(first_step)
        position = np.arange(self.length)[None]
        for step in range(first_step, len(self)):
            window = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
            window = window[self.rows.of(self.batch_size), None]
            # All masks are [batch, length].
            start = window * self.stride
            inside = (window < self.num_windows) & (start + position < self.num_predictions)
            new = (window == 0) | (position >= self.length - self.stride)
            index = np.where(inside, start + position, 0)
            yield {
                "inputs": as_int32(np.where(inside, self.tokens[index], 0)),
                "labels": as_int32(np.where(inside, self.tokens[index + 1], 0)),
                "weights": (inside & new).astype(np.float32),
            }

    def part(self, index: int, count: int) -> SequentialWindows:
        """Return the source of one of `count` equal parts of every batch, as `sharded_batches`."""
        return dataclasses.replace(self, rows=self.rows.part(index, count, self.batch_size))


def token_windows(
    tokens: npt.ArrayLike, *, batch_size: int, length: int, seed: int
) -> TokenWindows:
    """Yield windows that start at uniformly random positions of the text.

    The starts of step s are a pure function of the seed and s. There are no epochs: positions are
    drawn with replacement and windows overlap.

    Args:
        tokens: integer [tokens]; may be a memory-mapped file.
        batch_size: windows per batch.
        length: tokens per window.
        seed: non-negative.

    Returns:
        A source of {"inputs": int32 [batch, length], "labels": the same shifted by one token},
        with the property `steps_per_epoch`.

    Raises:
        ValueError: tokens that are not integers or negative, a text shorter than length + 1
            tokens, a size below 1, a negative seed.

    Example:
        >>> batch = next(token_windows(np.arange(100), batch_size=2, length=3, seed=0)(0))
        >>> bool((batch["labels"] == batch["inputs"] + 1).all())
        True
    """
    check_seed(seed)
    text = _check_tokens(tokens, length, batch_size=batch_size)
    return TokenWindows(text, batch_size, length, seed)


def token_streams(tokens: npt.ArrayLike, *, batch_size: int, length: int) -> TokenStreams:
    """Yield consecutive windows in every row, for truncated backpropagation through time.

    The text is split into `batch_size` equal parts. Row b starts with part b, and each batch
    continues the previous one, so a network may carry its state from batch to batch. After its
    own part a row continues with the next one, and after the last part with the first: only there
    the carried state does not match. Fewer than batch_size x length tokens at the end are dropped.

    Args:
        tokens: integer [tokens].
        batch_size: parallel streams.
        length: tokens per window.

    Returns:
        A source of {"inputs": int32 [batch, length], "labels": the same shifted by one token},
        with the property `steps_per_epoch`.

    Raises:
        ValueError: tokens that are not integers or negative, a text shorter than
            batch_size * length + 1 tokens, a size below 1.

    Example:
        >>> batches = token_streams(np.arange(13), batch_size=2, length=3)(0)
        >>> next(batches)["inputs"].tolist(), next(batches)["inputs"].tolist()
        ([[0, 1, 2], [6, 7, 8]], [[3, 4, 5], [9, 10, 11]])
    """
    text = _check_tokens(tokens, length, batch_size=batch_size, rows=batch_size)
    return TokenStreams(text, batch_size, length)


def sequential_windows(
    tokens: npt.ArrayLike, *, batch_size: int, length: int, stride: int | None = None
) -> SequentialWindows:
    """Yield one sliding-window pass for evaluation: each token but the first counts once.

    Window w starts at token w * stride. The first window predicts all of its tokens. Every later
    one has weight 1 for its last `stride` tokens, which are new, and 0 for the others, which are
    context: each of its predictions has at least length - stride tokens before its own input. A
    smaller stride costs length / stride times as much and gives the loss of a longer context.

    Args:
        tokens: integer [tokens].
        batch_size: windows per batch; the last batch is padded with weight 0.
        length: tokens per window.
        stride: tokens from one window to the next, at most and by default `length`.

    Returns:
        A source of {"inputs", "labels": int32 [batch, length], "weights": float32
        [batch, length]}. It is finite: `source(0)` is the whole pass. `num_predictions` is the
        sum of all weights.

    Raises:
        ValueError: tokens that are not integers or negative, a text shorter than length + 1
            tokens, a size below 1, a stride above the length.

    Example:
        >>> source = sequential_windows(np.arange(8), batch_size=3, length=4, stride=2)
        >>> batch = next(source(0))
        >>> batch["inputs"].tolist()
        [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 0]]
        >>> batch["weights"].tolist()
        [[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0]]
    """
    stride = length if stride is None else stride
    text = _check_tokens(tokens, length, batch_size=batch_size, stride=stride)
    if stride > length:
        raise ValueError(
            f"stride={stride} skips tokens between windows of length={length}; "
            f"give a stride of at most {length}"
        )
    return SequentialWindows(text, batch_size, length, stride)


def _check_tokens(tokens: npt.ArrayLike, length: int, *, rows: int = 1, **sizes: int) -> np.ndarray:
    """Return the tokens as an array; they must hold `rows` windows of `length` and one label."""
    check_sizes(length=length, **sizes)
    text = np.asarray(tokens)
    if text.ndim != 1 or text.dtype.kind not in "iu":
        raise ValueError(
            f"tokens of shape {text.shape} and type {text.dtype} are not a text; "
            "give integers [tokens], such as tokenizer.encode(text)"
        )
    if len(text) <= rows * length:
        raise ValueError(
            f"{len(text)} tokens are too few for {rows} windows of length={length} and one more "
            f"label; give at least {rows * length + 1}, or lower the sizes"
        )
    if text.dtype.kind == "i" and text.min() < 0:
        raise ValueError(f"token id {text.min()} is negative; give ids of 0 or more")
    return text


def _windows(text: np.ndarray, starts: np.ndarray, length: int) -> Batch:
    rows = as_int32(text[starts[:, None] + np.arange(length + 1)[None]])  # [batch, length + 1]
    return {"inputs": rows[:, :-1], "labels": rows[:, 1:]}
