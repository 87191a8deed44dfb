"""Windows over one long text of token ids: random ones, parallel streams, one exact pass.

In every window "labels" are "inputs" one step later: token t + 1 is predicted from tokens up to t.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from jaxnets.checks import check_first_step
from jaxnets.core import Batch
from jaxnets.data.arrays import check_seed


@dataclasses.dataclass(frozen=True, eq=False)
class TokenWindows:
    """Endless batches of windows at random places; see `token_windows`."""

    tokens: np.ndarray
    batch_size: int
    length: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Batches that together hold about as many tokens as the text, at least 1."""
        return max(1, len(self.tokens) // (self.batch_size * self.length))

    def __call__(self, first_step: int) -> Iterator[Batch]:
        """Iterate from `first_step` on, without end: int32 arrays [batch, length]."""
        check_first_step(first_step)
        num_starts = len(self.tokens) - self.length
        for step in itertools.count(first_step):
            words = np.random.Philox(np.random.SeedSequence(self.seed, spawn_key=(step,)))
            # The remainder of 64 random bits is uniform to within num_starts / 2^64.
            starts = words.random_raw(self.batch_size) % np.uint64(num_starts)
            yield _windows(self.tokens, starts.astype(np.int64), self.length)


@dataclasses.dataclass(frozen=True, eq=False)
class TokenStreams:
    """Endless batches whose rows go on reading where they stopped; see `token_streams`."""

    tokens: np.ndarray
    batch_size: int
    length: int

    @property
    def steps_per_epoch(self) -> int:
        """Batches after which every part of the text has been read once."""
        return (len(self.tokens) - 1) // (self.batch_size * self.length)

    def __call__(self, first_step: int) -> Iterator[Batch]:
        """Iterate from `first_step` on, without end: int32 arrays [batch, length]."""
        check_first_step(first_step)
        part = self.steps_per_epoch * self.length
        rows = np.arange(self.batch_size) * part
        for step in itertools.count(first_step):
            starts = (rows + step * self.length) % (part * self.batch_size)
            yield _windows(self.tokens, starts, self.length)


@dataclasses.dataclass(frozen=True, eq=False)
class SequentialWindows:
    """One pass in which every token is predicted once; see `sequential_windows`."""

    tokens: np.ndarray
    batch_size: int
    length: int
    stride: int

    @property
    def num_predictions(self) -> int:
        """Tokens that are predicted in the pass: all but the first."""
        return len(self.tokens) - 1

    @property
    def num_windows(self) -> int:
        """Windows in the pass."""
        return 1 + -(-(self.num_predictions - self.length) // self.stride)

    def __len__(self) -> int:
        return -(-self.num_windows // self.batch_size)

    def __call__(self, first_step: int) -> Iterator[Batch]:
        """Iterate from batch `first_step` to the last: arrays and "weights" [batch, length]."""
        check_first_step(first_step)
        position = np.arange(self.length)[None]
        for step in range(first_step, len(self)):
            window = np.arange(step * self.batch_size, (step + 1) * self.batch_size)[:, None]
            start = window * self.stride
            inside = (window < self.num_windows) & (start + position < self.num_predictions)
            new = (window == 0) | (position >= self.length - self.stride)
            index = np.where(inside, start + position, 0)
            yield {
                "inputs": np.where(inside, self.tokens[index], 0).astype(np.int32),
                "labels": np.where(inside, self.tokens[index + 1], 0).astype(np.int32),
                "weights": (inside & new).astype(np.float32),
            }


def token_windows(
    tokens: npt.ArrayLike, *, batch_size: int, length: int, seed: int
) -> TokenWindows:
    """Yield windows that start anywhere in the text, each place as likely as any other.

    The starts of step s are a pure function of the seed and s. There are no epochs: windows
    overlap, and a token may be seen again before another is seen at all.

    Args:
        tokens: integer [tokens]; may be a memory-mapped file.
        batch_size: windows per batch.
        length: tokens per window.
        seed: non-negative.

    Returns:
        A source of {"inputs": int32 [batch, length], "labels": the same one token later}, with
        the property `steps_per_epoch`.

    Raises:
        ValueError: tokens that are no integers or negative, a text shorter than length + 1
            tokens, a size below 1, a negative seed.

    Example:
        >>> batch = next(token_windows(np.arange(100), batch_size=2, length=3, seed=0)(0))
        >>> bool((batch["labels"] == batch["inputs"] + 1).all())
        True
    """
    check_seed(seed)
    return TokenWindows(_checked(tokens, length, batch_size=batch_size), batch_size, length, seed)


def token_streams(tokens: npt.ArrayLike, *, batch_size: int, length: int) -> TokenStreams:
    """Yield consecutive windows in every row, for networks that carry state between batches.

    The text is cut into `batch_size` equal parts. Row b starts with part b, and each batch goes
    on where the one before stopped; after its own part a row reads the next one, and after the
    last part the first. So a carried state fits everywhere but where a row comes to the end of
    the text. Less than batch_size x length tokens at the very end are left out.

    Args:
        tokens: integer [tokens].
        batch_size: rows that read in parallel.
        length: tokens per window.

    Returns:
        A source of {"inputs": int32 [batch, length], "labels": the same one token later}, with
        the property `steps_per_epoch`.

    Raises:
        ValueError: tokens that are no integers or negative, a text shorter than
            batch_size * length + 1 tokens, a size below 1.

    Example:
        >>> batches = token_streams(np.arange(13), batch_size=2, length=3)(0)
        >>> next(batches)["inputs"].tolist(), next(batches)["inputs"].tolist()
        ([[0, 1, 2], [6, 7, 8]], [[3, 4, 5], [9, 10, 11]])
    """
    text = _checked(tokens, length, batch_size=batch_size, rows=batch_size)
    return TokenStreams(text, batch_size, length)


def sequential_windows(
    tokens: npt.ArrayLike, *, batch_size: int, length: int, stride: int | None = None
) -> SequentialWindows:
    """Yield one pass over the whole text for evaluation: each token but the first counts once.

    Window w starts at token w * stride. The first window predicts all of its tokens; every later
    one has weight 1 for its last `stride` tokens only, which are new, and 0 for the rest, which
    are context: each of its predictions sees at least length - stride tokens before its own
    input. A smaller stride costs length / stride as much and gives the loss of a longer context.

    Args:
        tokens: integer [tokens].
        batch_size: windows per batch; the last batch is padded with weight 0.
        length: tokens per window.
        stride: tokens from one window to the next, at most `length`, which is the default.

    Returns:
        A source of {"inputs", "labels": int32 [batch, length], "weights": float32
        [batch, length]}. It ends, and `source(0)` is the whole pass; `num_predictions` is the sum
        of all weights.

    Raises:
        ValueError: tokens that are no integers or negative, a text shorter than length + 1
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
    text = _checked(tokens, length, batch_size=batch_size, stride=stride)
    if stride > length:
        raise ValueError(
            f"stride={stride} skips tokens between windows of length={length}; "
            f"give a stride of at most {length}"
        )
    return SequentialWindows(text, batch_size, length, stride)


def check_sizes(**sizes: int) -> None:
    """Refuse sizes that are not positive integers.

    Args:
        sizes: {name: size}.

    Raises:
        ValueError: the name and value of the first bad one.
    """
    for name, size in sizes.items():
        if not isinstance(size, (int, np.integer)) or size < 1:
            raise ValueError(f"{name}={size} must be a positive integer")


def _checked(tokens: npt.ArrayLike, length: int, *, rows: int = 1, **sizes: int) -> np.ndarray:
    """Return the text as an array, if `rows` windows of `length` tokens and a label fit into it."""
    check_sizes(length=length, **sizes)
    text = np.asarray(tokens)
    if text.ndim != 1 or text.dtype.kind not in "iu":
        raise ValueError(
            f"tokens of shape {text.shape} and type {text.dtype} are no text; "
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
    rows = text[starts[:, None] + np.arange(length + 1)[None]].astype(np.int32)
    return {"inputs": rows[:, :-1], "labels": rows[:, 1:]}
