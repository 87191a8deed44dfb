"""Objectives of sequences against loops, and CTC against the sum over all alignments."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from decoding_models import EncodedSource, TinyRecurrentModel, forward, log_softmax, made

from jaxnets.core import Update
from jaxnets.metrics.supervised import perplexity
from jaxnets.objectives.sequence import (
    check_ctc_batch,
    ctc,
    ctc_loss,
    language_modeling,
    sequence_to_sequence,
    with_carry,
)
from jaxnets.training.executors import jit_step, pmap_step, scan_steps, sharded_step
from jaxnets.training.sharding import data_mesh
from jaxnets.training.step import create_train_state, make_eval_step, make_train_step

VOCABULARY, BATCH, TIME = 6, 4, 5
MODULE = TinyRecurrentModel(VOCABULARY)
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (BATCH, 3 * TIME + 1)).astype(np.int32)
VARIABLES = made(MODULE, TOKENS)
KEY = jax.random.key(1)
LENGTHS = np.array([5, 2, 0, 3], np.int32)
WEIGHTS = np.array([1.0, 0.5, 1.0, 2.0], np.float32)


def window(index):
    start = index * TIME
    return {
        "inputs": TOKENS[:, start : start + TIME],
        "labels": TOKENS[:, start + 1 : start + TIME + 1],
    }


@functools.partial(jax.jit, static_argnames=("objective", "train"))
def compiled(objective, params, state, batch, *, train):
    return objective(params, state, batch, KEY, train=train)


def run(objective, batch, *, state=None, train=False, params=VARIABLES["params"]):
    return compiled(objective, params, state or {}, batch, train=train)


LANGUAGE = language_modeling(MODULE)
TRANSLATOR = EncodedSource(VOCABULARY)
TRANSLATION = sequence_to_sequence(TRANSLATOR)


@functools.cache
def translator_variables():
    return made(TRANSLATOR, TOKENS[:, :TIME], TOKENS[:, :TIME], LENGTHS)


def refused(objective, batch, message, **keywords):
    """Check that tracing the objective with a concrete batch raises the message."""
    params = keywords.pop("params", VARIABLES["params"])
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: objective(params, {}, batch, KEY, train=False))


def summed_by_hand(logits, labels, lengths, weights):
    """Return loss, hits and count, token by token."""
    loss = hits = count = 0.0
    for row, (length, weight) in enumerate(zip(lengths, weights, strict=True)):
        for step in range(length):
            label = labels[row, step]
            loss -= weight * log_softmax(logits[row, step])[label]
            hits += weight * (np.argmax(logits[row, step]) == label)
            count += weight
    return loss, hits, count


@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("with_weights", [False, True])
def test_the_loss_of_a_language_model_is_summed_over_the_valid_tokens(with_lengths, with_weights):
    batch, lengths, weights = window(0), [TIME] * BATCH, np.ones(BATCH)
    if with_lengths:
        batch["lengths"] = lengths = LENGTHS
    if with_weights:
        batch["weights"] = weights = WEIGHTS
    output = run(LANGUAGE, batch)
    logits = forward(MODULE, VARIABLES, batch["inputs"])
    loss, hits, count = summed_by_hand(logits, batch["labels"], lengths, weights)
    np.testing.assert_allclose(output.loss.total, loss, rtol=1e-5)
    np.testing.assert_allclose(output.metrics["accuracy"].total, hits, rtol=1e-6)
    assert float(output.loss.count) == float(output.metrics["accuracy"].count) == count
    np.testing.assert_allclose(perplexity(output.loss), np.exp(loss / count), rtol=1e-5)


def test_tokens_beyond_the_lengths_change_neither_loss_nor_gradient():
    batch = {**window(0), "lengths": LENGTHS}
    beyond = np.arange(TIME)[None] >= LENGTHS[:, None]
    changed = {**batch, "labels": np.where(beyond, 99, batch["labels"])}
    changed["inputs"] = np.where(beyond, -5, batch["inputs"])

    def loss(params, batch):
        return LANGUAGE(params, {}, batch, KEY, train=True).loss.total

    both = jax.jit(jax.value_and_grad(loss))
    (first, gradient), (second, other) = (both(VARIABLES["params"], b) for b in (batch, changed))
    assert np.isfinite(first) and float(first) == float(second)
    jax.tree.map(np.testing.assert_array_equal, gradient, other)


def test_a_sequence_to_sequence_loss_is_summed_over_the_valid_targets():
    variables = translator_variables()
    source, decoder = TOKENS[:, :3], TOKENS[:, 3:8]
    batch = {
        "inputs": source,
        "lengths": np.array([3, 1, 2, 0], np.int32),
        "decoder_inputs": decoder,
        "labels": TOKENS[:, 4:9],
        "label_lengths": LENGTHS,
        "weights": WEIGHTS,
    }
    output = run(TRANSLATION, batch, params=variables["params"])
    logits = forward(TRANSLATOR, variables, source, decoder, batch["lengths"])
    loss, hits, count = summed_by_hand(logits, batch["labels"], LENGTHS, WEIGHTS)
    np.testing.assert_allclose(output.loss.total, loss, rtol=1e-5)
    np.testing.assert_allclose(output.metrics["accuracy"].total, hits, rtol=1e-6)
    assert float(output.loss.count) == count
    refused(TRANSLATION, window(0), r"lacks \['decoder_inputs'\]", params=variables["params"])


@pytest.mark.parametrize("make", [language_modeling, sequence_to_sequence])
def test_labels_are_smoothed_in_training_only(make):
    language = make is language_modeling
    module = MODULE if language else TRANSLATOR
    variables = VARIABLES if language else translator_variables()
    batch = {**window(0), "decoder_inputs": TOKENS[:, :TIME], "lengths": np.full(BATCH, TIME)}
    inputs = (
        [batch["inputs"]] if language else [batch["inputs"], TOKENS[:, :TIME], batch["lengths"]]
    )

    @jax.jit
    def losses(params):
        return [
            make(module, label_smoothing=0.3)(params, {}, batch, KEY, train=train).loss.total
            for train in (False, True)
        ]

    log_p = log_softmax(forward(module, variables, *inputs))
    plain = -np.take_along_axis(log_p, batch["labels"][..., None], axis=-1).sum()
    smoothed = 0.7 * plain - 0.3 * log_p.mean(axis=-1).sum()
    np.testing.assert_allclose(losses(variables["params"]), [plain, smoothed], rtol=1e-5)


@pytest.mark.parametrize("name", ["lengths", "label_lengths"])
def test_a_length_out_of_range_is_refused_or_nan(name):
    objective = LANGUAGE if name == "lengths" else TRANSLATION
    params = (VARIABLES if name == "lengths" else translator_variables())["params"]
    batch = {**window(0), "lengths": LENGTHS, "label_lengths": LENGTHS}
    batch["decoder_inputs"] = batch["inputs"]
    for wrong in (6, -1):
        bad = {**batch, name: np.array([5, wrong, 0, 3])}
        assert np.isnan(run(objective, bad, params=params).loss.total)
        refused(objective, bad, rf"length {wrong} is not in \[0, 5\]", params=params)


@pytest.mark.parametrize("shape", [(BATCH, 1), (BATCH, TIME, 1)])
def test_weights_of_a_shape_that_would_broadcast_are_refused(shape):
    batch = {**window(0), "weights": np.ones(shape, np.float32)}
    refused(LANGUAGE, batch, r"do not fit labels of shape \(4, 5\); give one for each")


CARRYING = language_modeling(MODULE, carry_across_batches=True)


def carried_state():
    state = with_carry(VARIABLES, MODULE, BATCH)
    return {"carry": state["carry"]}


def test_windows_with_a_carry_have_the_losses_of_the_whole_sequence():
    state, total = carried_state(), 0.0
    for index in range(3):
        output = run(CARRYING, window(index), state=state, train=True)
        state, total = output.model_state, total + output.loss.total
    whole = {"inputs": TOKENS[:, :-1], "labels": TOKENS[:, 1:]}
    expected = run(LANGUAGE, whole)
    np.testing.assert_allclose(total, expected.loss.total, rtol=1e-5)


def test_gradients_stop_between_windows():
    batches, start = [window(0), window(1)], carried_state()

    def through_both(params):
        first = CARRYING(params, start, batches[0], KEY, train=True)
        return CARRYING(params, first.model_state, batches[1], KEY, train=True).loss.total

    def constant_carry(params, carry):
        logits, _ = MODULE.apply({"params": params}, batches[1]["inputs"], carry=carry)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batches[1]["labels"])
        return jnp.sum(losses)

    @jax.jit
    def gradients(params):
        first = {"params": params}
        _, carry = MODULE.apply(first, batches[0]["inputs"], carry=start["carry"])
        return jax.grad(through_both)(params), jax.grad(constant_carry)(params, carry)

    found, expected = gradients(VARIABLES["params"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


def test_evaluation_starts_from_an_empty_history_and_does_not_change_the_carry():
    state = run(CARRYING, window(0), state=carried_state(), train=True).model_state
    assert any(np.any(leaf) for leaf in jax.tree.leaves(state))
    output = run(CARRYING, window(1), state=state)
    expected = run(LANGUAGE, window(1))
    assert float(output.loss.total) == float(expected.loss.total)
    jax.tree.map(np.testing.assert_array_equal, output.model_state, state)
    smaller = {name: array[:2] for name, array in window(1).items()}
    logits = forward(MODULE, VARIABLES, window(1)["inputs"])[:2]
    expected, _, _ = summed_by_hand(logits, smaller["labels"], [TIME] * 2, np.ones(2))
    np.testing.assert_allclose(run(CARRYING, smaller, state=state).loss.total, expected, rtol=1e-5)


def test_a_carry_is_the_same_under_every_executor():
    """Each device computes its rows of the carry; the state holds all rows."""
    update = Update(CARRYING, optax.sgd(0.1, momentum=0.9))
    state = create_train_state(with_carry(VARIABLES, MODULE, BATCH), update, rng=KEY)
    step = make_train_step(update)
    batches = [{**window(index), "lengths": np.array([5, 2, 0, 3])} for index in range(3)]

    def final(execute):
        current = state
        for batch in batches:
            current, metrics = execute(current, batch)
        # Means, not totals: the rounding error of a sum grows with the batch.
        means = {name: mean.compute() for name, mean in metrics.items()}
        return current.params, current.model_state, means

    def close(found, wanted):
        np.testing.assert_allclose(found, wanted, atol=1e-6)

    expected = final(jit_step(step))
    for execute in (pmap_step(step), sharded_step(step, data_mesh())):
        jax.tree.map(close, final(execute), expected)
    stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *batches)
    scanned, _ = pmap_step(scan_steps(step), batch_axis=1)(state, stacked)
    jax.tree.map(close, (scanned.params, scanned.model_state), expected[:2])
    assert "loss" in jax.eval_shape(make_eval_step(CARRYING), scanned, window(0))
    with pytest.raises(ValueError, match=r"4 rows does not fit a batch of 2; .*no microbatches"):
        jax.eval_shape(make_train_step(update, num_microbatches=2), state, batches[0])


def test_a_missing_carry_or_one_of_another_batch_size_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"no 'carry'.*with_carry\(variables, module, batch_size"):
        run(CARRYING, window(0), train=True)
    smaller = {name: array[:2] for name, array in window(0).items()}
    with pytest.raises(ValueError, match="4 rows does not fit a batch of 2; give batches of one"):
        run(CARRYING, smaller, state=carried_state(), train=True)


# CTC

FRAMES = np.array([4, 3, 4, 2, 0])
LABELS = np.array([[1, 2, 77], [1, 1, -3], [2, 1, 2], [0, 99, 99], [7, 7, 7]])
LABEL_LENGTHS = np.array([2, 2, 3, 0, 0])
LOGITS = np.random.default_rng(2).normal(size=(5, 4, 3)).astype(np.float32) * 2


def alignments(labels, num_frames, num_classes, blank):
    for path in itertools.product(range(num_classes), repeat=num_frames):
        merged = [label for label, _ in itertools.groupby(path) if label != blank]
        if merged == list(labels):
            yield path


def ctc_by_enumeration(logits, frames, labels, label_lengths, blank=0):
    """Return the losses [batch] and their gradients [batch, time, classes], summed over alignments.

    The gradient of -log sum_paths P(path) is softmax(logits) minus the expected number of visits of
    each (frame, class) under the paths' posterior; it is 0 beyond the frames.
    """
    logits = np.asarray(logits, np.float64)
    losses, gradients = np.zeros(len(logits)), np.zeros(logits.shape)
    for row in range(len(logits)):
        log_p = log_softmax(logits[row])
        target, count = labels[row, : label_lengths[row]], int(frames[row])
        paths = [list(path) for path in alignments(target, count, logits.shape[-1], blank)]
        scores = np.exp([log_p[np.arange(count), path].sum() for path in paths])
        losses[row] = -np.log(scores.sum())
        gradients[row, :count] = np.exp(log_p[:count])
        for path, score in zip(paths, scores, strict=True):
            gradients[row, np.arange(count), path] -= score / scores.sum()
    return losses, gradients


@pytest.mark.parametrize("blank", [0, 2])
def test_the_ctc_loss_and_its_gradient_equal_the_sum_over_all_alignments(blank):
    labels = LABELS if blank == 0 else np.where(LABELS == 2, 0, LABELS)

    def found(logits):
        losses = ctc_loss(logits, FRAMES, labels, LABEL_LENGTHS, blank=blank)
        return losses @ jnp.arange(1.0, 6.0), losses

    gradient, losses = jax.jit(jax.grad(found, has_aux=True))(LOGITS)
    expected, gradients = ctc_by_enumeration(LOGITS, FRAMES, labels, LABEL_LENGTHS, blank)
    np.testing.assert_allclose(losses, expected, atol=1e-5)
    weighted = np.arange(1.0, 6.0)[:, None, None] * gradients
    np.testing.assert_allclose(gradient, weighted, atol=1e-5)


WRONG = {
    "too many labels": (
        {"frames": np.array([4, 2, 4, 2, 0])},
        1,
        "utterance 1 has 2 frames and its 2 labels need 3; drop it",
    ),
    "the blank as label": (
        {"labels": np.where(LABELS == 2, 0, LABELS)},
        0,
        "label 0 of utterance 0 is not one of the 3 classes other than the blank, 0",
    ),
    "a label that is no class": (
        {"labels": np.where(np.arange(5)[:, None] == 2, 3, LABELS)},
        2,
        "label 3 of utterance 2 is not one of the 3 classes",
    ),
    "a negative label": (
        {"labels": np.where(np.arange(5)[:, None] == 2, -1, LABELS)},
        2,
        "label -1 of utterance 2",
    ),
    "more labels than the row has": (
        {"label_lengths": np.array([2, 2, 3, 4, 0])},
        3,
        r"label length 4 of utterance 3 is not in \[0, 3\]",
    ),
    "a negative length": (
        {"label_lengths": np.array([2, 2, 3, 0, -1])},
        4,
        r"label length -1 of utterance 4 is not in \[0, 3\]",
    ),
}


compiled_ctc_loss = jax.jit(ctc_loss)


@pytest.mark.parametrize("case", WRONG)
def test_labels_without_an_alignment_are_nan_and_refused_by_the_check(case):
    changes, row, message = WRONG[case]
    given = {"frames": FRAMES, "labels": LABELS, "label_lengths": LABEL_LENGTHS, **changes}
    losses = compiled_ctc_loss(LOGITS, **given)
    assert np.isnan(losses[row]) and not np.isinf(losses).any()
    frames = given.pop("frames")
    with pytest.raises(ValueError, match=message):
        check_ctc_batch(given, frames, num_classes=3)
    weights = np.where(np.isnan(losses), 0, 1)
    check_ctc_batch({**given, "weights": weights}, frames, num_classes=3)


def test_frames_out_of_range_are_nan_and_shapes_that_do_not_fit_are_refused():
    frames = np.array([5, 3, -1, 2, 0])
    losses = compiled_ctc_loss(LOGITS, frames=frames, labels=LABELS, label_lengths=LABEL_LENGTHS)
    np.testing.assert_array_equal(np.isnan(losses), [True, False, True, False, False])
    with pytest.raises(ValueError, match=r"labels of shape \(3,\)"):
        ctc_loss(LOGITS, FRAMES, LABELS[0], LABEL_LENGTHS)
    check_ctc_batch({"labels": LABELS, "label_lengths": LABEL_LENGTHS}, FRAMES, num_classes=3)


class Halved(nn.Module):
    """Return logits for every second frame."""

    @nn.compact
    def __call__(self, inputs, lengths=None, *, train=False):
        logits = nn.Dense(3, name="head")(inputs)[:, ::2]
        frames = jnp.full(len(inputs), inputs.shape[1]) if lengths is None else lengths
        return logits, (frames + 1) // 2


def test_the_ctc_objective_sums_over_utterances_and_ignores_padding_examples():
    inputs = np.random.default_rng(3).normal(size=(5, 8, 2)).astype(np.float32)
    variables = made(Halved(), inputs)
    batch = {
        "inputs": inputs,
        "lengths": np.array([8, 5, 7, 3, 0]),
        "labels": np.where(np.arange(5)[:, None] == 2, 0, LABELS),  # row 2 has no alignment
        "label_lengths": LABEL_LENGTHS,
        "weights": np.array([1.0, 2.0, 0.0, 1.0, 0.5]),
    }

    def loss(params):
        output = ctc(Halved())(params, {}, batch, KEY, train=True)
        return output.loss.total, output

    gradient, output = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    logits, frames = forward(Halved(), variables, inputs, batch["lengths"])
    np.testing.assert_array_equal(frames, FRAMES)
    losses, _ = ctc_by_enumeration(logits, FRAMES, LABELS, LABEL_LENGTHS)
    np.testing.assert_allclose(output.loss.total, losses @ batch["weights"], rtol=1e-5)
    assert float(output.loss.count) == 4.5 and output.metrics == {}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    del batch["label_lengths"]
    with pytest.raises(ValueError, match=r"lacks \['label_lengths'\]"):
        jax.eval_shape(loss, variables["params"])


def test_log_probabilities_of_minus_infinity_exclude_alignments():
    frames, labels, lengths = jnp.array([2]), jnp.array([[2]]), jnp.array([1])
    logits = jnp.array([[[0, -jnp.inf, 0], [0, 0, -jnp.inf]]])
    for compiled in (lambda f: f, jax.jit):
        loss, gradient = compiled(
            jax.value_and_grad(lambda x: ctc_loss(x, frames, labels, lengths)[0])
        )(logits)
        np.testing.assert_allclose(loss, np.log(4), rtol=1e-6)  # label 2, then the blank
        np.testing.assert_allclose(gradient, [[[0.5, 0, -0.5], [-0.5, 0.5, 0]]], atol=1e-6)
    # No alignment has a probability above 0: label 1 cannot come first.
    loss, gradient = jax.value_and_grad(
        lambda x: ctc_loss(x, frames, jnp.array([[1, 2]]), jnp.array([2]))[0]
    )(logits)
    assert loss == np.inf
    np.testing.assert_array_equal(gradient, 0)


def test_ctc_takes_integers_of_every_type_and_ignores_frames_beyond_the_lengths():
    logits = np.random.default_rng(0).normal(size=(2, 4, 300)).astype(np.float32)
    labels, lengths, frames = np.array([[3, 100], [7, 0]]), np.array([2, 1]), np.array([4, 3])
    expected = ctc_loss(logits, frames, labels, lengths)
    logits[1, 3] = np.nan
    for dtype in (np.uint8, np.int8, np.uint16):
        integers = [array.astype(dtype) for array in (frames, labels, lengths)]
        for loss in (ctc_loss, jax.jit(ctc_loss)):
            np.testing.assert_allclose(loss(logits, *integers), expected, rtol=1e-6)


@pytest.mark.parametrize("blank", [9, -1])
def test_a_blank_that_is_no_class_is_refused(blank):
    one = np.array([1])
    with pytest.raises(ValueError, match=f"blank is {blank}; give one of the 3 classes"):
        ctc_loss(jnp.zeros((1, 2, 3)), one, one[None], one, blank=blank)
    with pytest.raises(ValueError, match=f"blank is {blank}"):
        check_ctc_batch(
            {"labels": one[None], "label_lengths": one}, one, num_classes=3, blank=blank
        )


def test_labels_of_ctc_that_are_no_integers_are_refused():
    one = np.array([1])
    with pytest.raises(ValueError, match="labels have type float64; give integers"):
        ctc_loss(jnp.zeros((1, 2, 3)), one, np.ones((1, 1)), one)
    with pytest.raises(ValueError, match=r"are not \[batch, time, classes\]"):
        ctc_loss(jnp.zeros((2, 3)), one, one[None], one)
