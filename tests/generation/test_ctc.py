"""CTC decoding against the sum over every path."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import mostly_slow
from decoding_models import log_softmax

from jaxnets.generation.ctc import ctc_beam_search, ctc_greedy

BATCH, TIME, CLASSES = 4, 4, 3
LENGTHS = np.array([4, 3, 1, 0])
greedy = jax.jit(ctc_greedy, static_argnames="blank")


def log_probabilities(seed=0, batch=BATCH, time=TIME, classes=CLASSES):
    logits = 2 * np.random.default_rng(seed).normal(size=(batch, time, classes))
    return log_softmax(logits).astype(np.float32)


def labeling(path, blank):
    return tuple(label for label, _ in itertools.groupby(path) if label != blank)


def enumerated(frames, blank=0):
    """The probability of every labeling, summed over its paths."""
    totals = {}
    for path in itertools.product(range(frames.shape[1]), repeat=len(frames)):
        value = np.exp(sum(float(frame[c]) for frame, c in zip(frames, path, strict=True)))
        totals[labeling(path, blank)] = totals.get(labeling(path, blank), 0.0) + value
    return totals


def rows(labels, lengths):
    pairs = zip(np.asarray(labels), np.asarray(lengths), strict=True)
    return [tuple(row[:length].tolist()) for row, length in pairs]


@pytest.mark.parametrize("blank", [0, 2])
def test_the_best_path_is_merged_and_its_blanks_are_removed(blank):
    frames = log_probabilities(1, batch=30, time=8)
    lengths = np.random.default_rng(0).integers(0, 9, 30)
    labels, counts = greedy(frames, lengths, blank=blank)
    expected = [labeling(frames[i, :n].argmax(1), blank) for i, n in enumerate(lengths)]
    assert rows(labels, counts) == expected
    assert np.all(np.asarray(labels)[np.arange(8)[None] >= np.asarray(counts)[:, None]] == blank)


@pytest.mark.parametrize("blank", [0, 1])
def test_a_search_as_wide_as_all_labelings_finds_the_most_likely_one_exactly(blank):
    frames, lengths = log_probabilities(batch=4 * BATCH), np.tile(LENGTHS, 4)
    labels, counts, found = ctc_beam_search(frames, lengths, num_beams=31, blank=blank)
    for index, labeled in enumerate(rows(labels, counts)):
        totals = enumerated(frames[index, : lengths[index]], blank)
        best = max(totals, key=totals.get)
        assert labeled == best
        np.testing.assert_allclose(found[index], np.log(totals[best]), atol=1e-5)


def by_hand(frames, num_beams):
    """The same search with a dict of prefixes."""
    beams = {(): (1.0, 0.0)}
    for frame in np.exp(frames.astype(np.float64)):
        grown = {}

        def add(prefix, blank, label, grown=grown):
            old = grown.get(prefix, (0.0, 0.0))
            grown[prefix] = (old[0] + blank, old[1] + label)

        for prefix, (blank, label) in beams.items():
            add(prefix, (blank + label) * frame[0], 0.0)
            for c in range(1, len(frame)):
                if prefix and prefix[-1] == c:
                    add(prefix, 0.0, label * frame[c])
                    add((*prefix, c), 0.0, blank * frame[c])
                else:
                    add((*prefix, c), 0.0, (blank + label) * frame[c])
        best = sorted(grown, key=lambda prefix: -sum(grown[prefix]))[:num_beams]
        beams = {prefix: grown[prefix] for prefix in best}
    best = max(beams, key=lambda prefix: sum(beams[prefix]))
    return best, np.log(sum(beams[best]))


@pytest.mark.parametrize("num_beams", mostly_slow([1, 3, 8], [3]))
def test_a_narrow_search_equals_a_loop_over_a_dict_of_prefixes(num_beams):
    frames = log_probabilities(5, batch=20, time=12, classes=4)
    labels, counts, totals = ctc_beam_search(frames, num_beams=num_beams)
    for index, found in enumerate(rows(labels, counts)):
        expected, value = by_hand(frames[index], num_beams)
        assert found == expected
        np.testing.assert_allclose(totals[index], value, atol=1e-4)


def test_the_search_finds_a_labeling_that_the_best_path_misses():
    frames = jnp.log(jnp.array([[[0.6, 0.4], [0.6, 0.4]]]))
    assert rows(*greedy(frames)) == [()]
    labels, counts, totals = ctc_beam_search(frames, num_beams=2)
    assert rows(labels, counts) == [(1,)]
    np.testing.assert_allclose(np.exp(totals), [0.64], rtol=1e-6)


def test_impossible_classes_and_long_certain_utterances_stay_finite():
    path = np.random.default_rng(0).integers(0, 5, 300)
    frames = np.where(np.arange(5)[None] == path[:, None], 0.0, -np.inf)[None].astype(np.float32)
    labels, counts, totals = ctc_beam_search(frames, num_beams=4)
    assert rows(labels, counts) == [labeling(path, 0)] == rows(*greedy(frames))
    assert float(totals[0]) == 0.0


def test_frames_beyond_a_length_change_nothing():
    frames = log_probabilities()
    changed = np.where((np.arange(TIME)[None] < LENGTHS[:, None])[..., None], frames, np.nan)
    for decode in (greedy, ctc_beam_search):
        for a, b in zip(decode(frames, LENGTHS), decode(changed, LENGTHS), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_wrong_length_is_refused_or_nan():
    frames = log_probabilities()
    for decode in (ctc_greedy, ctc_beam_search):
        with pytest.raises(ValueError, match=r"length 5 is not in \[0, 4\]"):
            decode(frames, np.array([4, 5, 1, 0]))
        with pytest.raises(ValueError, match=r"length -1 is not in \[0, 4\]"):
            decode(frames, np.array([4, -1, 1, 0]))
        with pytest.raises(ValueError, match=r"shape \(2,\).*fit 4 rows"):
            decode(frames, np.array([4, 2]))
        with pytest.raises(ValueError, match="blank is 3; give one of the 3 classes"):
            decode(frames, blank=3)
        with pytest.raises(ValueError, match=r"\(4, 3\) do not fit.*frames\[None\]"):
            decode(frames[0])
    totals = jax.jit(ctc_beam_search)(frames, np.array([4, 5, -1, 0]))[2]
    np.testing.assert_array_equal(np.isnan(totals), [False, True, True, False])
    with pytest.raises(ValueError, match="num_beams is 0"):
        ctc_beam_search(frames, num_beams=0)
