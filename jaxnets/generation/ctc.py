"""Decoding of connectionist temporal classification (CTC): best path and prefix beam search.

A path has one class per frame. Merging repeated classes and then removing blanks gives its
labeling. The loss is `objectives.sequence.ctc`.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxnets.core import at_least_float32
from jaxnets.functional.lengths import check_lengths


def ctc_greedy(
    logits: jax.Array, lengths: jax.Array | None = None, *, blank: int = 0
) -> tuple[jax.Array, jax.Array]:
    """Return the labeling of the most likely path (greedy or best-path decoding).

    Args:
        logits: [batch, time, classes], or log-probabilities.
        lengths: integer [batch] in [0, time], the number of frames of each utterance; by default
            all count.
        blank: class that stands for no label.

    Returns:
        Labels, int32 [batch, time], padded with `blank`; and their number, int32 [batch].

    Raises:
        ValueError: `blank` is not a class, or lengths that do not fit or are known to be out of
            range. A traced length is clipped to [0, time].

    Example:
        >>> path = jnp.array([[0, 2, 2, 0, 2, 1]])
        >>> labels, lengths = ctc_greedy(jax.nn.one_hot(path, 3))
        >>> labels.tolist(), lengths.tolist()
        ([[2, 2, 1, 0, 0, 0]], [3])

    References:
        Graves et al. 2006, ICML, "Connectionist Temporal Classification", section 3.2 (best path).
    """
    valid = _valid_frames(logits, lengths, blank)
    path = jnp.where(valid, jnp.argmax(logits, axis=-1).astype(jnp.int32), blank)
    previous = jnp.concatenate([jnp.full_like(path[:, :1], blank), path[:, :-1]], axis=1)
    is_label = (path != blank) & (path != previous)
    batch, time = path.shape
    index = jnp.where(is_label, jnp.cumsum(is_label, axis=1) - 1, time)  # time: dropped
    labels = jnp.full((batch, time), blank, jnp.int32)
    labels = labels.at[jnp.arange(batch)[:, None], index].set(path, mode="drop")
    return labels, jnp.sum(is_label, axis=1, dtype=jnp.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Prefixes:
    """The beams of one utterance: prefixes of labelings, without duplicates among the live ones.

    Attributes:
        labels: int32 [beams, time], padded with -1.
        lengths: int32 [beams].
        blank: log-probability of the paths that end in a blank, [beams].
        label: log-probability of the paths that end in the last label, [beams].
    """

    labels: jax.Array
    lengths: jax.Array
    blank: jax.Array
    label: jax.Array

    @property
    def total(self) -> jax.Array:
        return jnp.logaddexp(self.blank, self.label)


def ctc_beam_search(
    log_probabilities: jax.Array,
    lengths: jax.Array | None = None,
    *,
    num_beams: int = 16,
    blank: int = 0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Search for the most likely labeling, summed over its paths (prefix beam search).

    For each frame the search keeps the `num_beams` most likely prefixes of labelings, with separate
    probabilities of the paths that end in a blank and of those that end in a label.

    Args:
        log_probabilities: [batch, time, classes], in nats, each frame a distribution: the
            `log_softmax` of the logits.
        lengths: integer [batch] in [0, time], the number of frames of each utterance; by default
            all count.
        num_beams: number of prefixes. A frame costs O(num_beams^2 time).
        blank: class that stands for no label.

    Returns:
        Labels, int32 [batch, time], padded with `blank`; their number, int32 [batch]; and their
        log-probability [batch], in nats. It sums the paths whose prefixes all stayed in the beam:
        exact with enough beams, otherwise a lower bound.

    Raises:
        ValueError: `num_beams` below 1, `blank` is not a class, or lengths that do not fit or are
            known to be out of range. A traced length out of range gives NaN as log-probability.

    Differs from the paper: there is no language model.

    Example:
        The best path has no label and probability 0.36; the three paths of label 1 sum to 0.64:

        >>> frames = jnp.log(jnp.array([[[0.6, 0.4], [0.6, 0.4]]]))
        >>> labels, lengths, log_probability = ctc_beam_search(frames)
        >>> labels.tolist(), lengths.tolist(), round(float(jnp.exp(log_probability[0])), 2)
        ([[1, 0]], [1], 0.64)

    References:
        Hannun et al. 2014, arXiv:1408.2873, algorithm 1.
    """
    if not isinstance(num_beams, int) or num_beams < 1:
        raise ValueError(f"num_beams is {num_beams}; give a positive integer")
    frames = at_least_float32(jnp.asarray(log_probabilities))
    valid = _valid_frames(frames, lengths, blank)
    labels, counts, totals = _search(frames, valid, num_beams, blank)
    if lengths is not None:
        inside = check_lengths(lengths, rows=frames.shape[0], most=frames.shape[1])
        totals = jnp.where(inside, totals, jnp.nan)
    return labels, counts, totals


@functools.partial(jax.jit, static_argnums=(2, 3))
def _search(
    frames: jax.Array, valid: jax.Array, num_beams: int, blank: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    impossible = jnp.full(num_beams, -jnp.inf, frames.dtype)
    start = _Prefixes(
        labels=jnp.full((num_beams, frames.shape[1]), -1, jnp.int32),
        lengths=jnp.zeros(num_beams, jnp.int32),
        blank=impossible.at[0].set(0),
        label=impossible,
    )

    def read(prefixes: _Prefixes, frame: tuple[jax.Array, jax.Array]) -> tuple[_Prefixes, None]:
        values, counts = frame
        after = _read_frame(prefixes, values, blank)
        return jax.tree.map(lambda a, b: jnp.where(counts, a, b), after, prefixes), None

    def search_one(frames: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        prefixes, _ = lax.scan(read, start, (frames, valid))
        best = jnp.argmax(prefixes.total)
        labels = prefixes.labels[best]
        return jnp.where(labels < 0, blank, labels), prefixes.lengths[best], prefixes.total[best]

    return jax.vmap(search_one)(frames, valid)


def _read_frame(prefixes: _Prefixes, frame: jax.Array, blank: int) -> _Prefixes:
    """Extend every prefix by every class of one frame and select the best."""
    num_beams, time = prefixes.labels.shape
    num_classes = frame.shape[0]
    beams, total = jnp.arange(num_beams), prefixes.total
    end = jnp.maximum(prefixes.lengths - 1, 0)
    last = jnp.where(prefixes.lengths > 0, prefixes.labels[beams, end], -1)
    classes = jnp.arange(num_classes)

    # A repeated label extends the prefix only after a blank; otherwise the path merges.
    repeats = last[:, None] == classes[None]
    longer = jnp.where(repeats, prefixes.blank[:, None], total[:, None]) + frame[None]
    longer = jnp.where((classes == blank)[None], -jnp.inf, longer)
    same_blank = total + frame[blank]
    same_label = jnp.where(last >= 0, prefixes.label + frame[last], -jnp.inf)

    # If the beam already holds a prefix that extends another one (its parent) by one label, the
    # parent's extension is added to it instead of becoming a duplicate.
    parent_labels = jnp.where(jnp.arange(time)[None] == end[:, None], -1, prefixes.labels)
    alive = total > -jnp.inf
    is_parent = (prefixes.lengths[:, None] + 1 == prefixes.lengths[None]) & alive[:, None]
    is_parent &= alive[None] & jnp.all(prefixes.labels[:, None] == parent_labels[None], axis=-1)
    parent, has_parent = jnp.argmax(is_parent, axis=0), jnp.any(is_parent, axis=0)
    from_parent = jnp.where(has_parent, longer[parent, last], -jnp.inf)
    same_label = jnp.logaddexp(same_label, from_parent)
    longer = longer.at[jnp.where(has_parent, parent, num_beams), last].set(-jnp.inf, mode="drop")

    scores = jnp.concatenate([jnp.logaddexp(same_blank, same_label), longer.reshape(-1)])
    _, selected = lax.top_k(scores, num_beams)  # below num_beams: the prefix stays the same
    extended = selected >= num_beams
    source = jnp.where(extended, (selected - num_beams) // num_classes, selected)
    added = jnp.where(extended, (selected - num_beams) % num_classes, -1).astype(jnp.int32)
    at_end = jnp.arange(time)[None] == prefixes.lengths[source][:, None]
    return _Prefixes(
        labels=jnp.where(at_end & extended[:, None], added[:, None], prefixes.labels[source]),
        lengths=prefixes.lengths[source] + extended,
        blank=jnp.where(extended, -jnp.inf, same_blank[source]),
        label=jnp.where(extended, scores[selected], same_label[source]),
    )


def _valid_frames(frames: jax.Array, lengths: jax.Array | None, blank: int) -> jax.Array:
    """Check the arguments and return the valid frames, bool [batch, time]."""
    if frames.ndim != 3:
        raise ValueError(
            f"frames of shape {frames.shape} do not fit; give [batch, time, classes], a single "
            "utterance as frames[None]"
        )
    batch, time, num_classes = frames.shape
    if not 0 <= blank < num_classes:
        raise ValueError(f"blank is {blank}; give one of the {num_classes} classes")
    if lengths is None:
        return jnp.ones((batch, time), bool)
    check_lengths(lengths, rows=batch, most=time)
    return jnp.arange(time)[None] < jnp.asarray(lengths)[:, None]
