"""Objectives of sequences against loops, and CTC against the sum over every alignment."""

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
from jaxnets.training.executors import data_mesh, jit_step, pmap_step, scan_steps, sharded_step
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


def run(objective, batch, *, state=None, train=False, params=VARIABLES["params"]):
    compiled = jax.jit(
        lambda params, state, batch: objective(params, state, batch, KEY, train=train)
    )
    return compiled(params, state or {}, batch)


def summed_by_hand(logits, labels, lengths, weights):
    """Loss, hits and count, token by token."""
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
    output = run(language_modeling(MODULE), batch)
    logits = forward(MODULE, VARIABLES, batch["inputs"])
    loss, hits, count = summed_by_hand(logits, batch["labels"], lengths, weights)
    np.testing.assert_allclose(output.loss.total, loss, rtol=1e-5)
    np.testing.assert_allclose(output.metrics["accuracy"].total, hits, rtol=1e-6)
    assert float(output.loss.count) == float(output.metrics["accuracy"].count) == count
    np.testing.assert_allclose(perplexity(output.loss), np.exp(loss / count), rtol=1e-5)


def test_what_lies_beyond_the_lengths_changes_neither_loss_nor_gradient():
    batch = {**window(0), "lengths": LENGTHS}
    beyond = np.arange(TIME)[None] >= LENGTHS[:, None]
    changed = {**batch, "labels": np.where(beyond, 99, batch["labels"])}
    changed["inputs"] = np.where(beyond, -5, batch["inputs"])

    def loss(params, batch):
        return language_modeling(MODULE)(params, {}, batch, KEY, train=True).loss.total

    both = jax.jit(jax.value_and_grad(loss))
    (first, gradient), (second, other) = (both(VARIABLES["params"], b) for b in (batch, changed))
    assert np.isfinite(first) and float(first) == float(second)
    jax.tree.map(np.testing.assert_array_equal, gradient, other)


def test_a_sequence_to_sequence_loss_is_summed_over_the_valid_targets():
    module = EncodedSource(VOCABULARY)
    source, decoder = TOKENS[:, :3], TOKENS[:, 3:8]
    batch = {
        "inputs": source,
        "lengths": np.array([3, 1, 2, 0], np.int32),
        "decoder_inputs": decoder,
        "labels": TOKENS[:, 4:9],
        "label_lengths": LENGTHS,
        "weights": WEIGHTS,
    }
    variables = made(module, source, decoder, batch["lengths"])
    output = run(sequence_to_sequence(module), batch, params=variables["params"])
    logits = forward(module, variables, source, decoder, batch["lengths"])
    loss, hits, count = summed_by_hand(logits, batch["labels"], LENGTHS, WEIGHTS)
    np.testing.assert_allclose(output.loss.total, loss, rtol=1e-5)
    np.testing.assert_allclose(output.metrics["accuracy"].total, hits, rtol=1e-6)
    assert float(output.loss.count) == count
    with pytest.raises(ValueError, match=r"lacks \['decoder_inputs'\]"):
        run(sequence_to_sequence(module), window(0), params=variables["params"])


def test_labels_are_smoothed_in_training_only():
    for make in (language_modeling, sequence_to_sequence):
        module = MODULE if make is language_modeling else EncodedSource(VOCABULARY)
        batch = {**window(0), "decoder_inputs": TOKENS[:, :TIME], "lengths": LENGTHS}
        inputs = [batch["inputs"]]
        if make is sequence_to_sequence:
            inputs += [batch["decoder_inputs"], LENGTHS]
        params = made(module, *inputs)["params"]
        plain, smooth = make(module), make(module, label_smoothing=0.3)
        for train in (False, True):
            losses = [
                float(run(o, batch, train=train, params=params).loss.total) for o in (plain, smooth)
            ]
            assert (losses[0] == losses[1]) is not train


@pytest.mark.parametrize("name", ["lengths", "label_lengths"])
def test_a_length_beyond_the_array_is_refused_or_nan(name):
    module = MODULE if name == "lengths" else EncodedSource(VOCABULARY)
    make = language_modeling if name == "lengths" else sequence_to_sequence
    batch = {**window(0), "lengths": LENGTHS, "label_lengths": LENGTHS}
    batch["decoder_inputs"] = batch["inputs"]
    inputs = [batch["inputs"]] + [batch["inputs"], LENGTHS] * (name == "label_lengths")
    params = made(module, *inputs)["params"]
    for wrong in (6, -1):
        bad = {**batch, name: np.array([5, wrong, 0, 3])}
        assert np.isnan(run(make(module), bad, params=params).loss.total)
        with pytest.raises(ValueError, match=rf"length {wrong} is not in \[0, 5\]"):
            make(module)(params, {}, bad, KEY, train=False)


@pytest.mark.parametrize("shape", [(BATCH, 1), (BATCH, TIME, 1)])
def test_weights_of_a_shape_that_would_be_stretched_are_refused(shape):
    batch = {**window(0), "weights": np.ones(shape, np.float32)}
    with pytest.raises(ValueError, match=r"do not fit labels of shape \(4, 5\); give one for each"):
        run(language_modeling(MODULE), batch)


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
    expected = run(language_modeling(MODULE), whole)
    np.testing.assert_allclose(total, expected.loss.total, rtol=1e-5)


def test_the_gradient_stops_at_the_border_of_a_window():
    batches = [window(0), window(1)]

    def through_both(params):
        first = CARRYING(params, carried_state(), batches[0], KEY, train=True)
        return CARRYING(params, first.model_state, batches[1], KEY, train=True).loss.total

    def constant_carry(params, carry):
        logits, _ = MODULE.apply({"params": params}, batches[1]["inputs"], carry=carry)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batches[1]["labels"])
        return jnp.sum(losses)

    params = VARIABLES["params"]
    _, carry = MODULE.apply(VARIABLES, batches[0]["inputs"], carry=carried_state()["carry"])
    found = jax.jit(jax.grad(through_both))(params)
    expected = jax.jit(jax.grad(constant_carry))(params, carry)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


def test_evaluation_starts_from_an_empty_history_and_leaves_the_carry():
    state = run(CARRYING, window(0), state=carried_state(), train=True).model_state
    assert any(np.any(leaf) for leaf in jax.tree.leaves(state))
    output = run(CARRYING, window(1), state=state)
    expected = run(language_modeling(MODULE), window(1))
    assert float(output.loss.total) == float(expected.loss.total)
    jax.tree.map(np.testing.assert_array_equal, output.model_state, state)
    smaller = {name: array[:2] for name, array in window(1).items()}
    assert np.isfinite(run(CARRYING, smaller, state=state).loss.total)


def test_a_carry_is_the_same_under_every_executor():
    """Each device computes some rows of the carry, and the state holds all of them."""
    update = Update(CARRYING, optax.sgd(0.1, momentum=0.9))
    state = create_train_state(with_carry(VARIABLES, MODULE, BATCH), update, rng=KEY)
    step = make_train_step(update)
    batches = [{**window(index), "lengths": np.array([5, 2, 0, 3])} for index in range(3)]

    def final(execute):
        current = state
        for batch in batches:
            current, metrics = execute(current, batch)
        # Means, not totals: the rounding of a sum grows with the batch.
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
    assert "loss" in make_eval_step(CARRYING)(scanned, window(0))
    with pytest.raises(ValueError, match=r"4 rows does not fit a batch of 2; .*no microbatches"):
        make_train_step(update, num_microbatches=2)(state, batches[0])


def test_a_missing_or_misfit_carry_is_refused_with_the_remedy():
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
    losses = []
    for row in range(len(logits)):
        log_p = jax.nn.log_softmax(logits[row])
        target, count = labels[row, : label_lengths[row]], int(frames[row])
        paths = [
            sum((log_p[t, c] for t, c in enumerate(path)), start=jnp.zeros(()))
            for path in alignments(target, count, logits.shape[-1], blank)
        ]
        losses.append(-jax.nn.logsumexp(jnp.stack(paths)))
    return jnp.stack(losses)


@pytest.mark.parametrize("blank", [0, 2])
def test_the_ctc_loss_and_its_gradient_equal_the_sum_over_all_alignments(blank):
    labels = LABELS if blank == 0 else np.where(LABELS == 2, 0, LABELS)

    def found(logits):
        losses = ctc_loss(logits, FRAMES, labels, LABEL_LENGTHS, blank=blank)
        return losses @ jnp.arange(1.0, 6.0), losses

    def expected(logits):
        losses = ctc_by_enumeration(logits, FRAMES, labels, LABEL_LENGTHS, blank)
        return losses @ jnp.arange(1.0, 6.0), losses

    gradient, losses = jax.jit(jax.grad(found, has_aux=True))(LOGITS)
    expected_gradient, expected_losses = jax.grad(expected, has_aux=True)(jnp.asarray(LOGITS))
    np.testing.assert_allclose(losses, expected_losses, atol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5)


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


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_aligned_is_nan_and_found_in_the_data(case):
    changes, row, message = WRONG[case]
    given = {"frames": FRAMES, "labels": LABELS, "label_lengths": LABEL_LENGTHS, **changes}
    losses = jax.jit(ctc_loss)(LOGITS, **given)
    assert np.isnan(losses[row]) and not np.isinf(losses).any()
    frames = given.pop("frames")
    with pytest.raises(ValueError, match=message):
        check_ctc_batch(given, frames, num_classes=3)
    weights = np.where(np.isnan(losses), 0, 1)
    check_ctc_batch({**given, "weights": weights}, frames, num_classes=3)


def test_frames_out_of_range_and_misfit_shapes():
    losses = ctc_loss(LOGITS, np.array([5, 3, -1, 2, 0]), LABELS, LABEL_LENGTHS)
    np.testing.assert_array_equal(np.isnan(losses), [True, False, True, False, False])
    with pytest.raises(ValueError, match=r"labels of shape \(3,\)"):
        ctc_loss(LOGITS, FRAMES, LABELS[0], LABEL_LENGTHS)
    check_ctc_batch({"labels": LABELS, "label_lengths": LABEL_LENGTHS}, FRAMES, num_classes=3)


class Halved(nn.Module):
    """Logits for every second frame."""

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
        "labels": np.where(np.arange(5)[:, None] == 2, 0, LABELS),  # cannot be aligned
        "label_lengths": LABEL_LENGTHS,
        "weights": np.array([1.0, 2.0, 0.0, 1.0, 0.5]),
    }

    def loss(params):
        output = ctc(Halved())(params, {}, batch, KEY, train=True)
        return output.loss.total, output

    gradient, output = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    logits, frames = Halved().apply(variables, inputs, batch["lengths"])
    np.testing.assert_array_equal(frames, FRAMES)
    losses = np.array(ctc_by_enumeration(logits, FRAMES, LABELS, LABEL_LENGTHS))
    np.testing.assert_allclose(output.loss.total, losses @ batch["weights"], rtol=1e-5)
    assert float(output.loss.count) == 4.5 and output.metrics == {}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    del batch["label_lengths"]
    with pytest.raises(ValueError, match=r"lacks \['label_lengths'\]"):
        loss(variables["params"])
