"""Generation against plain loops over the full forward pass; transforms against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding_models import (
    EncodedSource,
    TableModel,
    TinyRecurrentModel,
    extended,
    forward,
    log_softmax,
    made,
    next_log_probabilities,
)

from jaxnets.generation.generate import generate
from jaxnets.generation.sampling import Sampling, sample_tokens, transform_logits

VOCABULARY = 6
PROMPTS = np.array([[1, 4, 2, 5], [3, 0, 0, 0], [5, 2, 1, 0]])
LENGTHS = np.array([4, 1, 3])
TABLE, RECURRENT = TableModel(VOCABULARY), TinyRecurrentModel(VOCABULARY)
TABLE_VARIABLES = made(TABLE, PROMPTS)
GREEDY = Sampling(temperature=0.0)
KEY = jax.random.key(7)


def continued(prompts=PROMPTS, **options):
    options = {"num_tokens": 5, "rng": KEY, "lengths": LENGTHS, **options}
    return generate(TABLE, TABLE_VARIABLES, prompts, **options)


def greedy_by_hand(module, variables, prompt, num_tokens):
    """Run the whole text through the network again for every token."""
    text, log_probabilities = list(prompt), []
    for _ in range(num_tokens):
        logits = next_log_probabilities(module, variables, text)[-1]
        text.append(int(np.argmax(logits)))
        log_probabilities.append(logits.max())
    return text[len(prompt) :], log_probabilities


@pytest.mark.parametrize("module", [TABLE, RECURRENT], ids=["table", "recurrent"])
def test_greedy_decoding_equals_the_full_forward_pass_for_every_token(module):
    variables = made(module, PROMPTS)
    result = generate(
        module, variables, PROMPTS, num_tokens=5, lengths=LENGTHS, rng=KEY, sampling=GREEDY
    )
    assert result.tokens.dtype == jnp.int32 and result.tokens.shape == (3, 5)
    np.testing.assert_array_equal(result.lengths, [5, 5, 5])
    for row, length in enumerate(LENGTHS):
        tokens, log_probabilities = greedy_by_hand(module, variables, PROMPTS[row, :length], 5)
        assert result.tokens[row].tolist() == tokens
        np.testing.assert_allclose(result.log_probabilities[row], log_probabilities, atol=1e-5)


def test_log_probabilities_are_those_of_the_model_whatever_the_sampling():
    sampling = Sampling(temperature=2.0, top_k=3, repetition_penalty=1.5)
    result = continued(sampling=sampling)
    for row, length in enumerate(LENGTHS):
        text = [*PROMPTS[row, :length], *np.asarray(result.tokens[row])]
        logits = next_log_probabilities(TABLE, TABLE_VARIABLES, text)[length - 1 : -1]
        expected = np.take_along_axis(logits, np.asarray(result.tokens[row])[:, None], axis=1)
        np.testing.assert_allclose(result.log_probabilities[row], expected[:, 0], atol=1e-5)


def test_the_second_token_has_the_probability_that_the_first_one_gives_it():
    prompts = np.tile([[1, 4]], (20_000, 1))
    tokens = np.asarray(
        continued(prompts, num_tokens=2, lengths=None, sampling=Sampling(top_k=4)).tokens
    )
    table = np.asarray(TABLE_VARIABLES["params"]["table"])
    first = filtered_by_hand(table[1, 4], top_k=4)
    for token in range(VOCABULARY):
        second = filtered_by_hand(table[4, token], top_k=4)
        pairs = np.bincount(tokens[tokens[:, 0] == token, 1], minlength=VOCABULARY)
        expected = len(tokens) * first[token] * second
        assert np.all(pairs[expected == 0] == 0)
        assert np.all(np.abs(pairs - expected) <= 4.5 * np.sqrt(expected + 1))


def filtered_by_hand(
    logits, seen=(), *, repetition_penalty=1.0, temperature=1.0, top_k=None, top_p=1.0, min_p=0.0
):
    """The probabilities of one row, transform by transform, with loops."""
    logits = np.asarray(logits, np.float64).copy()
    for token in seen:
        value = logits[token]
        logits[token] = value / repetition_penalty if value > 0 else value * repetition_penalty
    logits = logits / temperature
    order = np.argsort(-logits)
    for token in order[top_k:] if top_k else ():
        logits[token] = -np.inf
    probabilities = np.exp(log_softmax(logits))
    total = 0.0
    for token in order:
        if total >= top_p:
            logits[token] = -np.inf
        total += probabilities[token]
    probabilities = np.exp(log_softmax(logits))
    probabilities[probabilities < min_p * probabilities.max()] = 0
    return probabilities / probabilities.sum()


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_k": 100},
        {"top_p": 0.7},
        {"top_p": 1e-6},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"repetition_penalty": 1.8},
        {"temperature": 1.7, "top_k": 5, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.3},
        {"temperature": 3.0, "top_p": 0.6, "repetition_penalty": 0.7},
    ],
    ids=str,
)
def test_each_transform_and_their_order_equal_a_loop(fields):
    random = np.random.default_rng(3)
    logits = random.normal(size=(20, 9)).astype(np.float32) * 2
    seen = random.uniform(size=logits.shape) < 0.4
    found = jax.nn.softmax(transform_logits(logits, Sampling(**fields), seen), axis=-1)
    for row in range(len(logits)):
        expected = filtered_by_hand(logits[row], np.flatnonzero(seen[row]), **fields)
        np.testing.assert_allclose(found[row], expected, atol=2e-6)


def test_the_transforms_keep_ties_and_the_dtype_wide():
    logits = jnp.array([[1.0, 2.0, 2.0, 0.0]], jnp.bfloat16)
    kept = transform_logits(logits, Sampling(top_k=1))
    assert kept.dtype == jnp.float32
    np.testing.assert_array_equal(np.isfinite(kept), [[False, True, True, False]])


def test_the_nucleus_of_a_large_vocabulary_equals_a_sort_in_both_precisions(enable_x64):
    logits = 3 * np.random.default_rng(1).normal(size=(4, 2000))
    for dtype in (np.float32, np.float64):
        kept = transform_logits(jnp.asarray(logits, dtype), Sampling(top_p=0.9)) > -np.inf
        for row in range(4):
            expected = filtered_by_hand(logits[row].astype(dtype), top_p=0.9) > 0
            np.testing.assert_array_equal(kept[row], expected)


def test_temperature_zero_is_the_limit_of_small_temperatures_and_compiled_with_them():
    draw = jax.jit(sample_tokens)
    logits = np.random.default_rng(0).normal(size=(50, 9)).astype(np.float32)
    keys = jax.random.split(KEY, 50)
    greedy, cold = (draw(keys, logits, Sampling(temperature=t)) for t in (0.0, 1e-5))
    np.testing.assert_array_equal(greedy, logits.argmax(1))
    np.testing.assert_array_equal(cold, greedy)
    assert np.any(draw(keys, logits, Sampling()) != greedy)
    assert draw._cache_size() == 1


def test_the_repetition_penalty_knows_the_prompt_and_what_was_generated():
    result = continued(
        num_tokens=4, sampling=Sampling(temperature=0.0, repetition_penalty=1e9), lengths=None
    )
    for row, prompt in enumerate(PROMPTS):
        text = [*prompt, *np.asarray(result.tokens[row])]
        logits = forward(TABLE, TABLE_VARIABLES, np.array([text]))[0]
        for position in range(len(prompt), len(text)):
            before = set(text[:position])
            if len(before) < VOCABULARY:  # a positive logit that was seen is pushed to zero
                row_logits = np.array(logits[position - 1])
                fresh = [t for t in range(VOCABULARY) if t not in before]
                if row_logits[fresh].max() > 0:
                    assert text[position] == max(fresh, key=lambda t: row_logits[t])


def test_what_stands_behind_a_prompt_in_its_padding_changes_nothing():
    changed = PROMPTS.copy()
    changed[1, 1:], changed[2, 3:] = 99, -1
    for first, second in zip(
        jax.tree.leaves(continued()), jax.tree.leaves(continued(changed)), strict=True
    ):
        np.testing.assert_array_equal(first, second)


def test_a_row_does_not_depend_on_the_other_rows():
    whole = continued(stop_tokens=(2,))
    other = PROMPTS.copy()
    other[[0, 2]] = [[0, 0, 1, 1], [2, 2, 2, 2]]
    changed = continued(other, stop_tokens=(2,))
    np.testing.assert_array_equal(whole.tokens[1], changed.tokens[1])
    first = continued(PROMPTS[:1], lengths=LENGTHS[:1], stop_tokens=(2,))
    np.testing.assert_array_equal(whole.tokens[:1], first.tokens)
    same = continued(np.tile(PROMPTS[:1], (3, 1)), lengths=np.array([4, 4, 4]), stop_tokens=(2,))
    assert len({tuple(row) for row in np.asarray(same.tokens)}) == 3


def test_another_key_draws_other_tokens_and_the_same_key_the_same():
    np.testing.assert_array_equal(continued().tokens, continued().tokens)
    assert np.any(continued().tokens != continued(rng=jax.random.key(8)).tokens)


def test_a_stop_token_ends_its_row_and_is_counted():
    free = continued(num_tokens=50)
    stopped = continued(num_tokens=50, stop_tokens=(2, 4), pad_token=-1)
    for row in range(3):
        tokens = np.asarray(free.tokens[row])
        hits = np.flatnonzero(np.isin(tokens, (2, 4)))
        length = hits[0] + 1 if hits.size else 50
        assert int(stopped.lengths[row]) == length
        np.testing.assert_array_equal(stopped.tokens[row, :length], tokens[:length])
        assert np.all(stopped.tokens[row, length:] == -1)
        np.testing.assert_array_equal(
            stopped.log_probabilities[row],
            np.where(np.arange(50) < length, free.log_probabilities[row], 0),
        )
    assert len(set(np.asarray(stopped.lengths))) > 1, "the rows should stop at different steps"


def test_the_loop_ends_when_every_row_has_stopped():
    result = continued(num_tokens=50, stop_tokens=(2, 4))
    assert int(result.carry["calls"][0]) == 1 + int(result.lengths.max()) < 50
    np.testing.assert_array_equal(result.carry["position"], LENGTHS + result.lengths)


def test_a_conversation_goes_on_from_the_carry():
    module = RECURRENT
    variables = made(module, PROMPTS)
    options = {"num_tokens": 4, "rng": KEY, "sampling": GREEDY}
    turn = np.array([[3, 1], [2, 5], [4, 0]])
    first = generate(
        module, variables, PROMPTS, lengths=LENGTHS, stop_tokens=(2, 4), capacity=32, **options
    )
    second = generate(module, variables, turn, carry=first.carry, **options)
    texts = np.zeros((3, 10), np.int32)
    for row, length in enumerate(LENGTHS):
        said = np.asarray(first.tokens[row, : first.lengths[row]])
        text = [*PROMPTS[row, :length], *said, *turn[row]]
        texts[row, : len(text)] = text
    lengths = LENGTHS + np.asarray(first.lengths) + 2
    whole = generate(module, variables, texts, lengths=lengths, **options)
    np.testing.assert_array_equal(second.tokens, whole.tokens)


def test_a_sequence_to_sequence_model_starts_from_its_encoded_source():
    module, lengths = EncodedSource(VOCABULARY), np.array([4, 2, 3])
    begin = np.ones((3, 1), np.int32)
    variables = made(module, PROMPTS, begin, lengths)
    carry = module.apply(variables, PROMPTS, lengths, 8, method="start")
    result = generate(
        module, variables, begin, num_tokens=6, carry=carry, capacity=8, rng=KEY, sampling=GREEDY
    )
    inputs = np.concatenate([begin, result.tokens[:, :-1]], axis=1)
    logits = module.apply(variables, PROMPTS, inputs, lengths)
    np.testing.assert_array_equal(result.tokens, np.argmax(logits, axis=-1))


def test_a_second_call_of_the_same_shapes_is_not_traced_again():
    continued(stop_tokens=(2,))
    count = len(extended)
    again = generate(
        TableModel(VOCABULARY),
        made(TABLE, PROMPTS, seed=1),
        PROMPTS[::-1],
        num_tokens=5,
        lengths=np.array([1, 2, 4]),
        rng=jax.random.key(11),
        sampling=Sampling(temperature=0.3, top_p=0.5, min_p=0.1, repetition_penalty=1.2),
        stop_tokens=(5,),
        pad_token=3,
    )
    assert again.tokens.shape == (3, 5)
    assert len(extended) == count


def test_generation_compiles_inside_another_program_and_over_a_population():
    def run(variables, prompts, lengths):
        return generate(
            TABLE, variables, prompts, lengths=lengths, num_tokens=5, rng=KEY
        ).log_probabilities

    alone = run(TABLE_VARIABLES, PROMPTS, LENGTHS)
    np.testing.assert_allclose(jax.jit(run)(TABLE_VARIABLES, PROMPTS, LENGTHS), alone, atol=1e-6)
    members = [TABLE_VARIABLES, made(TABLE, PROMPTS, seed=1)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    found = jax.vmap(run, in_axes=(0, None, None))(stacked, PROMPTS, LENGTHS)
    np.testing.assert_allclose(found[0], alone, atol=1e-6)
    np.testing.assert_allclose(found[1], run(members[1], PROMPTS, LENGTHS), atol=1e-6)


def test_what_is_wrong_only_when_the_program_runs_gives_nan():
    traced = jax.jit(lambda lengths: continued(lengths=lengths).log_probabilities)
    found = traced(np.array([0, 5, 3]))
    np.testing.assert_array_equal(np.isnan(found[:, 0]), [True, True, False])
    carry = continued(num_tokens=2, capacity=6).carry
    found = continued(PROMPTS[:, :1], lengths=None, carry=carry, num_tokens=3).log_probabilities
    np.testing.assert_array_equal(np.isnan(found[:, -1]), [True, False, True])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": 0}, "num_tokens is 0; give a positive integer"),
        ({"prompts": PROMPTS[:, :0]}, r"\(3, 0\) are empty; give at least one token"),
        ({"prompts": PROMPTS[0]}, r"\(4,\).*prompt\[None\]"),
        ({"prompts": PROMPTS * 1.0}, "float64 do not fit; give integers"),
        ({"lengths": np.array([4, 0, 3])}, r"length 0 is not in \[1, 4\]"),
        ({"lengths": np.array([4, 5, 3])}, r"length 5 is not in \[1, 4\]"),
        ({"lengths": np.array([4, 5])}, r"shape \(2,\).*fit 3 rows"),
        ({"capacity": 8}, "4 tokens and 5 new ones.*capacity 8; give capacity=9"),
        ({"prompts": PROMPTS + 1}, "token id 6 is outside the vocabulary of 6"),
        ({"prompts": PROMPTS - 2}, "token id -1 is outside"),
        ({"stop_tokens": (6,)}, "token id 6 is outside"),
        ({"carry": {"last": jnp.zeros((2, 2), jnp.int32)}}, r"\(2,\).*does not fit 3 prompts"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "_".join(value),
)
def test_a_wrong_argument_is_refused_with_its_value(options, message):
    with pytest.raises(ValueError, match=message):
        continued(**options)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -0.1}, r"temperature is -0.1; give a number in \[0, inf\)"),
        ({"temperature": jnp.nan}, "temperature is nan"),
        ({"top_p": 0.0}, r"top_p is 0.0; give a number in \(0, 1\]"),
        ({"top_p": jnp.array(1.5)}, "top_p is 1.5"),
        ({"min_p": -1}, r"min_p is -1; give a number in \[0, 1\]"),
        ({"repetition_penalty": 0}, r"repetition_penalty is 0; give a number in \(0, inf\)"),
        ({"top_k": 0}, "top_k is 0; give a positive integer"),
        ({"top_k": 2.5}, "top_k is 2.5"),
    ],
)
def test_a_wrong_way_of_sampling_is_refused_with_its_value(fields, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**fields)


def test_a_module_without_the_protocol_is_refused():
    from jaxnets.models.feedforward import MLP

    with pytest.raises(ValueError, match="MLP has no method start and extend; give a module"):
        generate(MLP(), {}, PROMPTS, num_tokens=1, rng=KEY)
