"""Beam search against the enumeration of every continuation."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding_models import (
    EncodedSource,
    TableModel,
    TinyRecurrentModel,
    extend_calls,
    forward,
    log_softmax,
    made,
    next_log_probabilities,
)

from jaxnets.generation.beam_search import beam_search
from jaxnets.generation.generate import generate
from jaxnets.generation.sampling import Sampling

VOCABULARY, STOP = 4, 2
PROMPTS = np.array([[1, 3, 0], [3, 0, 0], [0, 1, 1]])
LENGTHS = np.array([3, 1, 2])
TABLE = TableModel(VOCABULARY)
TABLE_VARIABLES = made(TABLE, PROMPTS)
COUNT = 64  # continuations of 3 tokens; fewer with a stop token


def searched(**options):
    """Search the table; calls without options of other shapes share one program."""
    options = {"num_tokens": 4, "num_beams": 3, "stop_token": STOP, "lengths": LENGTHS, **options}
    return beam_search(TABLE, TABLE_VARIABLES, PROMPTS, **options)


def log_probability(module, variables, prompt, tokens):
    logits = next_log_probabilities(module, variables, [*prompt, *tokens])
    return logits[len(prompt) - 1 : -1][np.arange(len(tokens)), tokens].sum()


def continuations(num_tokens, stop_token):
    """Every sequence that ends with the stop token or has the full length."""
    for length in range(1, num_tokens + 1):
        for tokens in itertools.product(range(VOCABULARY), repeat=length):
            if stop_token not in tokens[:-1] and (length == num_tokens or tokens[-1] == stop_token):
                yield tokens


def enumerated(row, num_tokens, length_penalty, stop_token=STOP):
    prompt = PROMPTS[row, : LENGTHS[row]]
    ranked = [
        (
            log_probability(TABLE, TABLE_VARIABLES, prompt, tokens)
            / ((5 + len(tokens)) / 6) ** length_penalty,
            tokens,
        )
        for tokens in continuations(num_tokens, stop_token)
    ]
    return sorted(ranked, reverse=True)


def sequences(beams, row):
    pairs = zip(np.asarray(beams.tokens[row]), np.asarray(beams.lengths[row]), strict=True)
    return [tuple(tokens[:length].tolist()) for tokens, length in pairs]


@pytest.mark.parametrize(("length_penalty", "stop_token"), [(0.0, STOP), (0.6, STOP), (2.0, None)])
def test_a_search_as_wide_as_all_continuations_ranks_them_as_their_enumeration(
    length_penalty, stop_token
):
    beams = searched(
        num_tokens=3, num_beams=COUNT, length_penalty=length_penalty, stop_token=stop_token
    )
    for row in range(3):
        expected = enumerated(row, 3, length_penalty, stop_token)
        scores = np.full(COUNT, -np.inf)
        scores[: len(expected)] = [score for score, _ in expected]
        np.testing.assert_allclose(beams.scores[row], scores, rtol=1e-5, atol=1e-5)
        assert sequences(beams, row)[: len(expected)] == [tokens for _, tokens in expected]


def test_a_bias_of_the_logits_excludes_continuations():
    bias = np.zeros((2, VOCABULARY), np.float32)
    bias[0, STOP] = bias[1, 1] = -np.inf
    bias[1, 0] = -0.5
    options = {"num_tokens": 3, "num_beams": COUNT, "length_penalty": 0.0}
    beams = searched(logit_bias=bias, **options)
    for row in range(3):
        expected = [
            (score - 0.5 * tokens[1:].count(0), tokens)
            for score, tokens in enumerated(row, 3, 0.0)
            if tokens[0] != STOP and 1 not in tokens[1:]
        ]
        expected.sort(reverse=True)
        count = len(expected)
        np.testing.assert_allclose(
            beams.scores[row, :count], [s for s, _ in expected], rtol=1e-5, atol=1e-5
        )
        assert sequences(beams, row)[:count] == [tokens for _, tokens in expected]
        assert np.all(beams.lengths[row, count:] == 0)


def by_hand(row, num_tokens, num_beams, length_penalty):
    """The same search with lists, over the full forward pass, without early exit."""
    prompt = PROMPTS[row, : LENGTHS[row]]
    live, finished = [(0.0, ())], []
    for length in range(1, num_tokens + 1):
        grown = [(*tokens, token) for _, tokens in live for token in range(VOCABULARY)]
        scored = sorted(
            [(log_probability(TABLE, TABLE_VARIABLES, prompt, tokens), tokens) for tokens in grown],
            reverse=True,
        )[: 2 * num_beams]
        done = [(s, t) for s, t in scored[:num_beams] if t[-1] == STOP or length == num_tokens]
        finished += [(s / ((5 + length) / 6) ** length_penalty, t) for s, t in done]
        finished = sorted(finished, reverse=True)[:num_beams]
        live = [(s, t) for s, t in scored if t[-1] != STOP][:num_beams]
    return finished


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_narrow_search_equals_a_loop_with_lists(num_beams):
    beams = searched(num_beams=num_beams)
    for row in range(3):
        expected = by_hand(row, 4, num_beams, 0.6)
        np.testing.assert_allclose(beams.scores[row], [s for s, _ in expected], rtol=1e-5)
        assert sequences(beams, row) == [tokens for _, tokens in expected]


@pytest.mark.parametrize(
    "module",
    [TABLE, pytest.param(TinyRecurrentModel(VOCABULARY), marks=pytest.mark.slow)],
    ids=["table", "gru"],
)
def test_one_beam_without_length_penalty_is_greedy_decoding(module):
    variables = made(module, PROMPTS, seed=3)
    options = {"num_tokens": 4, "lengths": LENGTHS}
    beams = beam_search(
        module, variables, PROMPTS, num_beams=1, stop_token=STOP, length_penalty=0.0, **options
    )
    greedy = generate(
        module,
        variables,
        PROMPTS,
        rng=jax.random.key(0),
        stop_tokens=(STOP,),
        sampling=Sampling(temperature=0.0),
        **options,
    )
    np.testing.assert_array_equal(beams.tokens[:, 0], greedy.tokens)
    np.testing.assert_array_equal(beams.lengths[:, 0], greedy.lengths)
    np.testing.assert_allclose(beams.scores[:, 0], greedy.log_probabilities.sum(1), rtol=1e-5)


@pytest.mark.slow  # of the default group is the test of `Shifted`, with the same model inside
def test_scores_of_a_recurrent_model_are_those_of_its_full_forward_pass():
    """A carry that did not follow its beam would give other probabilities."""
    module = TinyRecurrentModel(VOCABULARY)
    variables = made(module, PROMPTS)
    beams = beam_search(
        module, variables, PROMPTS, num_tokens=4, num_beams=4, stop_token=STOP, lengths=LENGTHS
    )
    for row in range(3):
        assert len(set(sequences(beams, row))) == 4
        assert np.all(np.diff(beams.scores[row]) <= 0)
        for tokens, score in zip(sequences(beams, row), beams.scores[row], strict=True):
            prompt = PROMPTS[row, : LENGTHS[row]]
            expected = log_probability(module, variables, prompt, tokens)
            np.testing.assert_allclose(score, expected / ((5 + len(tokens)) / 6) ** 0.6, rtol=1e-5)


def test_a_sequence_to_sequence_model_starts_from_its_encoded_source():
    module, begin = EncodedSource(VOCABULARY), np.ones((3, 1), np.int32)
    variables = made(module, PROMPTS, begin, LENGTHS)
    carry = module.apply(variables, PROMPTS, LENGTHS, 8, method="start")
    options = {"num_tokens": 3, "num_beams": 2, "stop_token": STOP}
    beams = beam_search(module, variables, begin, carry=carry, **options)
    order = np.array([2, 0, 1])
    reordered = jax.tree.map(lambda leaf: leaf[order], carry)
    reordered = beam_search(module, variables, begin, carry=reordered, **options)
    inputs = np.concatenate([begin, beams.tokens[:, 0, :-1]], axis=1)
    logits = log_softmax(forward(module, variables, PROMPTS, inputs, LENGTHS))
    for row in range(3):
        assert sequences(reordered, row) == sequences(beams, order[row])
        tokens = np.array(sequences(beams, row)[0])
        total = logits[row, np.arange(tokens.size), tokens].sum()
        expected = total / ((5 + tokens.size) / 6) ** 0.6
        np.testing.assert_allclose(beams.scores[row, 0], expected, rtol=1e-5)


class Shifted(nn.Module):
    """A GRU language model with a shift of the logits, which the carry returns unchanged."""

    def setup(self):
        self.inner = TinyRecurrentModel(VOCABULARY)

    def __call__(self, tokens, shift):
        return self.inner(tokens) + shift[:, None]

    def start(self, shift, batch_size):
        return {"states": self.inner.start(batch_size, 0), "shift": shift}

    def extend(self, tokens, carry, lengths=None):
        logits, states = self.inner.extend(tokens, carry["states"], lengths)
        return logits + carry["shift"][:, None], {**carry, "states": states}


@pytest.mark.lowering
def test_an_unchanged_leaf_of_a_carry_stays_with_its_prompt_and_is_not_gathered():
    module, prompts = Shifted(), PROMPTS[:, :1]
    shift = np.random.default_rng(1).normal(size=(3, VOCABULARY)).astype(np.float32)
    variables = made(module, prompts, shift)
    carry = module.apply(variables, shift, 3, method="start")

    def search(carry):
        options = {"num_tokens": 4, "num_beams": 3, "stop_token": STOP, "length_penalty": 0.0}
        return beam_search(module, variables, prompts, carry=carry, **options)

    beams = search(carry)
    for row in range(3):
        for tokens, score in zip(sequences(beams, row), beams.scores[row], strict=True):
            text = np.zeros((1, 5), int)
            text[0, : len(tokens) + 1] = [*prompts[row], *tokens]
            logits = forward(module, variables, text, shift[row : row + 1])
            expected = log_softmax(logits)[0, np.arange(len(tokens)), tokens].sum()
            np.testing.assert_allclose(score, expected, rtol=1e-5)
    program = str(jax.make_jaxpr(search)(carry))
    assert "f32[9,5] = gather" in program, "the recurrent states follow their beams"
    assert "f32[9,4] = gather" not in program


def test_more_beams_than_continuations_are_empty():
    beams = searched(num_tokens=1, num_beams=6, pad_token=-1)
    np.testing.assert_array_equal(beams.lengths, [[1, 1, 1, 1, 0, 0]] * 3)
    assert np.all(np.isneginf(beams.scores[:, 4:])) and np.all(beams.tokens[:, 4:] == -1)


class Stopping(nn.Module):
    """Stops with a probability given as a variable; counts its calls on the host."""

    def setup(self):
        self.probability = self.param("probability", nn.initializers.ones, ())

    def start(self, batch_size, capacity):
        return ()

    def extend(self, tokens, carry, lengths=None):
        jax.debug.callback(lambda: CALLS.append(None))
        rest = (1 - self.probability) / (VOCABULARY - 1)
        row = jnp.log(jnp.where(jnp.arange(VOCABULARY) == STOP, self.probability, rest))
        return jnp.broadcast_to(row[None, None], (*tokens.shape, VOCABULARY)), carry


CALLS = []


@pytest.mark.parametrize(("probability", "early"), [(0.9, True), (0.01, False)])
def test_the_search_ends_when_no_unfinished_beam_can_win(probability, early):
    CALLS.clear()
    variables = {"params": {"probability": np.float32(probability)}}
    beams = beam_search(Stopping(), variables, PROMPTS, num_tokens=12, num_beams=2, stop_token=STOP)
    jax.block_until_ready(beams)
    jax.effects_barrier()
    assert len(CALLS) < 6 if early else len(CALLS) == 12
    assert int(beams.lengths[0, 0]) == (1 if early else 12)


def test_a_second_search_of_the_same_shapes_is_not_traced_again():
    searched()
    count = len(extend_calls)
    searched(stop_token=1, length_penalty=1.1, lengths=np.array([1, 1, 1]), pad_token=3)
    assert len(extend_calls) == count


def test_nan_logits_are_nan_scores():
    variables = jax.tree.map(
        lambda table: np.full(table.shape, np.nan, np.float32), TABLE_VARIABLES
    )
    options = {"num_tokens": 4, "num_beams": 3, "stop_token": STOP, "lengths": LENGTHS}
    beams = beam_search(TABLE, variables, PROMPTS, **options)
    assert np.all(np.isnan(beams.scores))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, "num_beams is 0; give a positive integer"),
        ({"length_penalty": -0.5}, r"length_penalty is -0.5; give a number in \[0, inf\)"),
        ({"stop_token": 4}, "token id 4 is outside the vocabulary of 4"),
        ({"num_tokens": 0}, "num_tokens is 0"),
        ({"logit_bias": np.full(4, 0.5, "f")}, "logit_bias has 0.5; give at most 0"),
        ({"logit_bias": np.zeros((2, 3), "f")}, r"shape \(2, 3\) .* vocabulary of 4"),
        ({"capacity": 6}, "capacity 6; give capacity=7"),
        ({"lengths": np.array([3, 0, 2])}, r"length 0 is not in \[1, 3\]"),
    ],
)
def test_a_wrong_argument_is_refused_with_its_value(options, message):
    with pytest.raises(ValueError, match=message):
        searched(**options)
