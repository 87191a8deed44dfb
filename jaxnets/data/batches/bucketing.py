"""Bucketing by length: batches of similar length, padded to one of a few shapes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from jaxnets.checks import check_first_step, check_sizes
from jaxnets.core import Batch
from jaxnets.data.arrays import Arrays, as_int32, check_seed, random_order
from jaxnets.data.batches.rows import WHOLE, Rows
from jaxnets.data.text.padding import check_sequence, pad_sequences, round_up
from jaxnets.data.text.vocabulary import BEGIN, END, PAD

#: Token ids and their target: the token ids of a translation, or an integer class.
Example: TypeAlias = tuple[npt.ArrayLike, npt.ArrayLike]


@dataclasses.dataclass(frozen=True, eq=False)
class Bucket:
    """Examples that are padded to the same shape.

    Attributes:
        data: {name: array [examples, ...]} with "indices", the position of each example in the
            dataset.
        batch_size: examples per batch.
    """

    data: Arrays
    batch_size: int

    def __len__(self) -> int:
        return len(self.data["indices"])


@dataclasses.dataclass(frozen=True, eq=False)
class BucketedBatches:
    """Endless shuffled batches, each of one bucket; see `bucketed_batches`.

    Attributes:
        buckets: from the shortest to the longest.
        seed: of the order of the examples.
        steps_per_shape: consecutive batches of the same shape.
    """

    endless: ClassVar[bool] = True

    buckets: tuple[Bucket, ...]
    seed: int
    steps_per_shape: int = 1
    rows: Rows = WHOLE

    @property
    def num_examples(self) -> int:
        """Examples in the dataset."""
        return sum(len(bucket) for bucket in self.buckets)

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one epoch; the remainder of each bucket is dropped."""
        return len(self._schedule()) * self.steps_per_shape

    @property
    def padding_share(self) -> float:
        """Fraction of the positions of inputs and labels that is padding, averaged over epochs."""
        return _padding_share(self.buckets)

    def _schedule(self) -> np.ndarray:
        """Return the bucket index of each group of `steps_per_shape` batches, shortest first."""
        groups = [
            len(bucket) // (bucket.batch_size * self.steps_per_shape) for bucket in self.buckets
        ]
        return np.repeat(np.arange(len(self.buckets)), groups)

    def __call__(self, first_step: int) -> Iterator[Batch]:
        """Iterate endlessly from `first_step`: {name: array [batch, ...]}."""
        check_first_step(first_step)
        schedule, num_buckets = self._schedule(), len(self.buckets)
        first_epoch, first_position = divmod(first_step, self.steps_per_epoch)
        for epoch in itertools.count(first_epoch):
            # Independent of the seed: a population needs the same shapes in the same order.
            shapes = schedule[random_order(len(schedule), 0, epoch)]
            orders = [
                random_order(len(bucket), self.seed, epoch * num_buckets + index)
                for index, bucket in enumerate(self.buckets)
            ]
            used = [0] * num_buckets
            for position, index in enumerate(np.repeat(shapes, self.steps_per_shape).tolist()):
                bucket = self.buckets[index]
                rows = orders[index][used[index] : used[index] + bucket.batch_size]
                used[index] += bucket.batch_size
                if epoch > first_epoch or position >= first_position:
                    batch = _rows(bucket.data, rows[self.rows.of(bucket.batch_size)])
                    yield {name: batch[name] for name in batch if name != "indices"}

    def part(self, index: int, count: int) -> BucketedBatches:
        """Return the source of one of `count` equal parts of every batch, as `sharded_batches`.

        A `batch_multiple` of `count` makes every batch size divisible.
        """
        return dataclasses.replace(self, rows=_part(self.rows, self.buckets, index, count))


@dataclasses.dataclass(frozen=True, eq=False)
class BucketedPass:
    """One pass sorted by length; see `bucketed_pass`.

    Attributes:
        buckets: from the shortest to the longest.
    """

    buckets: tuple[Bucket, ...]
    rows: Rows = WHOLE

    @property
    def num_examples(self) -> int:
        """Examples in the pass, without padding."""
        return sum(len(bucket) for bucket in self.buckets)

    @property
    def padding_share(self) -> float:
        """Fraction of the positions of inputs and labels that is padding, within examples."""
        return _padding_share(self.buckets)

    def __len__(self) -> int:
        return sum(-(-len(bucket) // bucket.batch_size) for bucket in self.buckets)

    def __call__(self, first_step: int) -> Iterator[Batch]:
        """Iterate from batch `first_step` to the last, with "indices" and "weights" [batch]."""
        check_first_step(first_step)
        slices = [
            (bucket, start)
            for bucket in self.buckets
            for start in range(0, len(bucket), bucket.batch_size)
        ]
        for bucket, start in slices[first_step:]:
            rows = np.arange(start, start + bucket.batch_size)[self.rows.of(bucket.batch_size)]
            batch = _rows(bucket.data, np.minimum(rows, len(bucket) - 1))
            yield {**batch, "weights": (rows < len(bucket)).astype(np.float32)}

    def part(self, index: int, count: int) -> BucketedPass:
        """Return the source of one of `count` equal parts of every batch, as `sharded_batches`."""
        return dataclasses.replace(self, rows=_part(self.rows, self.buckets, index, count))


def bucketed_batches(
    pairs: Sequence[Example],
    *,
    tokens_per_batch: int,
    seed: int,
    num_buckets: int = 8,
    multiple: int = 4,
    batch_multiple: int = 1,
    steps_per_shape: int = 1,
) -> BucketedBatches:
    """Yield endless shuffled batches of examples of similar length, for training.

    Examples are sorted by length, that of the longer side, and split into buckets with about
    equal numbers of tokens. Every batch comes from one bucket and has its shape: rows as long as
    the longest of the bucket, rounded up to `multiple`, and as many rows as `tokens_per_batch`
    allows on the longer side. Each epoch shuffles every bucket and the order of the batches; the
    remainder of a bucket is dropped, other examples in each epoch.

    If the second of each pair is a sentence, batches are for teacher forcing: the decoder input
    is `BEGIN` + target and the labels are target + `END`.

    Args:
        pairs: (token ids, token ids of the target) or (token ids, integer class); each sequence
            has at least one token, and targets no special ids.
        tokens_per_batch: tokens per batch on the longer side, padding included.
        seed: non-negative; the batches are a pure function of the seed and the step.
        num_buckets: maximum number of shapes; fewer where rounded lengths coincide.
        multiple: row lengths are multiples of this.
        batch_multiple: batch sizes are multiples of this, for example the number of devices.
        steps_per_shape: consecutive batches of the same shape, counted from step 0, so that
            `chunked` can stack them.

    Returns:
        A source of {"inputs": int32 [batch, source], "lengths": int32 [batch]} with, for targets,
        {"decoder_inputs", "labels": int32 [batch, target], "label_lengths": int32 [batch]}, or,
        for classes, {"labels": int32 [batch]}; and the properties `steps_per_epoch` and
        `padding_share`. The order of the shapes is the same for every seed, so `member_batches`
        can stack several seeds.

    Raises:
        ValueError: no pairs, an empty sequence, ids that are not integers, targets of mixed kinds
            or with special ids, label vectors, an example longer than `tokens_per_batch`, fewer
            examples than one batch.

    Example:
        >>> pairs = [([5, 6, 7], [8, 9]), ([5], [9, 9]), ([6, 7], [8]), ([5, 5], [8])]
        >>> source = bucketed_batches(pairs, tokens_per_batch=8, seed=0, num_buckets=1)
        >>> batch = next(source(0))
        >>> {name: array.shape for name, array in batch.items()}
        {'inputs': (2, 4), 'lengths': (2,), 'decoder_inputs': (2, 4), 'labels': (2, 4), \
'label_lengths': (2,)}

    References:
        Vaswani et al. 2017, arXiv:1706.03762, section 5.1 (batches by length and tokens).
    """
    check_seed(seed)
    check_sizes(batch_multiple=batch_multiple, steps_per_shape=steps_per_shape)
    examples = _parse(pairs)
    smallest = batch_multiple * steps_per_shape  # examples that a bucket needs for one batch
    if len(pairs) < smallest:
        raise ValueError(
            f"{len(pairs)} examples are fewer than batch_multiple={batch_multiple} times "
            f"steps_per_shape={steps_per_shape}; give more examples or lower these"
        )
    groups = _group_by_length(examples.longest_side(), num_buckets, multiple)
    groups = _merge_small(groups, smallest)
    buckets = []
    for group in groups:
        bucket = examples.bucket(group, tokens_per_batch, multiple)
        size = min(bucket.batch_size, len(bucket) // steps_per_shape)
        size = size // batch_multiple * batch_multiple
        if size == 0:
            raise ValueError(
                f"tokens_per_batch={tokens_per_batch} holds {bucket.batch_size} of the longest "
                f"examples, fewer than batch_multiple={batch_multiple}; raise tokens_per_batch"
            )
        buckets.append(dataclasses.replace(bucket, batch_size=size))
    return BucketedBatches(tuple(buckets), seed, steps_per_shape)


def bucketed_pass(
    pairs: Sequence[Example],
    *,
    tokens_per_batch: int,
    num_buckets: int = 8,
    multiple: int = 4,
) -> BucketedPass:
    """Yield every example once, the shortest first, for evaluation and decoding.

    The last batch of a bucket is padded with copies of its last example, with weight 0 and the
    same index, so `results[batch["indices"]] = outputs` restores the original order.

    Args:
        pairs: as in `bucketed_batches`.
        tokens_per_batch: as there.
        num_buckets: as there.
        multiple: as there.

    Returns:
        A source of the arrays of `bucketed_batches` with "indices" int32 [batch], the position of
        each example in `pairs`, and "weights" float32 [batch]. It is finite: `source(0)` is the
        whole pass.

    Raises:
        ValueError: as in `bucketed_batches`.

    Example:
        >>> source = bucketed_pass([([5, 6], 0), ([7], 1)], tokens_per_batch=2, multiple=1)
        >>> [batch["indices"].tolist() for batch in source(0)]
        [[1, 1], [0]]
    """
    examples = _parse(pairs)
    groups = _group_by_length(examples.longest_side(), num_buckets, multiple)
    return BucketedPass(
        tuple(examples.bucket(group, tokens_per_batch, multiple) for group in groups)
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Examples:
    """Checked examples, with targets or classes."""

    sources: list[np.ndarray]
    targets: list[np.ndarray] | None
    classes: np.ndarray | None

    def longest_side(self) -> np.ndarray:
        """Return the length of the longer side with special ids, int [examples]."""
        lengths = np.array([len(source) for source in self.sources])
        if self.targets is None:
            return lengths
        return np.maximum(lengths, [len(target) + 1 for target in self.targets])

    def bucket(self, group: np.ndarray, tokens_per_batch: int, multiple: int) -> Bucket:
        """Pad the examples with the indices `group` to one shape."""
        check_sizes(tokens_per_batch=tokens_per_batch)
        inputs, lengths = pad_sequences([self.sources[i] for i in group], multiple=multiple)
        data = {"indices": group.astype(np.int32), "inputs": inputs, "lengths": lengths}
        if self.classes is not None:
            data["labels"] = self.classes[group]
        if self.targets is not None:
            targets = [self.targets[i] for i in group]
            longest = 1 + max(len(target) for target in targets)
            labels, target_lengths = pad_sequences(targets, length=round_up(longest, multiple))
            data["decoder_inputs"] = np.insert(labels[:, :-1], 0, BEGIN, axis=1)
            labels[np.arange(len(labels)), target_lengths] = END
            data |= {"labels": labels, "label_lengths": target_lengths + 1}
        longest = max(data[name].shape[1] for name in ("inputs", "labels") if data[name].ndim == 2)
        if longest > tokens_per_batch:
            raise ValueError(
                f"example {group[-1]} is padded to {longest} tokens, more than "
                f"tokens_per_batch={tokens_per_batch}; raise it or shorten the example"
            )
        return Bucket(data, tokens_per_batch // longest)


def _parse(pairs: Sequence[Example]) -> _Examples:
    if len(pairs) == 0:
        raise ValueError("pairs is empty; give at least one (token ids, target)")
    for index, pair in enumerate(pairs):
        if isinstance(pair, str) or not isinstance(pair, Sequence | np.ndarray) or len(pair) != 2:
            raise ValueError(f"pair {index} is {pair!r}; give (token ids, target)")
    firsts, seconds = zip(*pairs, strict=True)
    sources = [check_sequence(ids, index) for index, ids in enumerate(firsts)]
    ranks = {np.ndim(second) for second in seconds}
    if ranks == {1}:
        return _Examples(sources, [_check_target(ids, i) for i, ids in enumerate(seconds)], None)
    classes = np.asarray(seconds) if ranks == {0} else np.empty(0)
    if classes.dtype.kind not in "iu":
        raise ValueError(
            f"targets start with {seconds[0]!r} and have {sorted(ranks)} axes; give token ids "
            "[tokens] with every example, or an integer class with every example"
        )
    return _Examples(sources, None, as_int32(classes))


def _check_target(ids: npt.ArrayLike, index: int) -> np.ndarray:
    """Check the token ids of one target and return them as an array."""
    array = np.asarray(ids)
    whole = array.dtype.kind in "iu"
    if array.size and (not whole or np.isin(array, (PAD, BEGIN, END)).any()):
        raise ValueError(
            f"target {index} starts with {array[:3].tolist()}; give token ids above {END}, which "
            "are not special, or an integer class. For label vectors give the position of each "
            "pair as its class, and look the vectors up: vectors[batch['labels']]"
        )
    return check_sequence(array, index)


def _group_by_length(lengths: np.ndarray, num_buckets: int, multiple: int) -> list[np.ndarray]:
    """Return the example indices of each bucket, shortest bucket first."""
    check_sizes(num_buckets=num_buckets, multiple=multiple)
    order = np.argsort(lengths, kind="stable")
    # Quantiles of tokens, not of examples: long examples, where padding costs most, get as many
    # buckets as short ones, and all buckets have about the same number of batches.
    tokens = np.cumsum(lengths[order])
    last = np.searchsorted(tokens * num_buckets, tokens[-1] * np.arange(1, num_buckets + 1))
    bounds = np.unique(round_up(lengths[order[last]], multiple))
    ends = np.searchsorted(lengths[order], bounds, side="right")
    return np.split(order, ends[:-1])


def _merge_small(groups: list[np.ndarray], smallest: int) -> list[np.ndarray]:
    """Merge neighboring groups until each has `smallest` examples."""
    merged: list[np.ndarray] = []
    for group in groups:
        if merged and len(merged[-1]) < smallest:
            group = np.concatenate([merged.pop(), group])
        merged.append(group)
    if len(merged) > 1 and len(merged[-1]) < smallest:
        merged[-2:] = [np.concatenate(merged[-2:])]
    return merged


def _part(rows: Rows, buckets: Sequence[Bucket], index: int, count: int) -> Rows:
    for bucket in buckets:
        part = rows.part(index, count, bucket.batch_size)
    return part


def _padding_share(buckets: Sequence[Bucket]) -> float:
    tokens = positions = 0
    for bucket in buckets:
        for name, lengths in (("inputs", "lengths"), ("labels", "label_lengths")):
            if lengths in bucket.data:
                tokens += int(bucket.data[lengths].sum())
                positions += bucket.data[name].size
    return 1 - tokens / positions


def _rows(data: Arrays, rows: np.ndarray) -> Arrays:
    return {name: array[rows] for name, array in data.items()}
