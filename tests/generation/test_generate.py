"""Generation against plain loops over the full forward pass; transforms against NumPy."""

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

from jaxnets.generation.generate import generate
from jaxnets.generation.sampling import Sampling, sample_tokens, transform_logits

VOCABULARY, NUM_TOKENS, STOPS = 6, 12, (2, 4)
PROMPTS = np.array([[1, 4, 2, 5], [3, 0, 0, 0], [5, 2, 1, 0]])
LENGTHS, FULL = np.array([4, 1, 3]), np.array([4, 4, 4])
TABLE, RECURRENT = TableModel(VOCABULARY), TinyRecurrentModel(VOCABULARY)
TABLE_VARIABLES = made(TABLE, PROMPTS)
GREEDY = Sampling(temperature=0.0)
KEY = jax.random.key(7)


def continued(prompts=PROMPTS, **options):
    """Generate from the table; calls without options of other shapes share one program."""
    options = {"num_tokens": NUM_TOKENS, "rng": KEY, "lengths": LENGTHS, **options}
    return generate(TABLE, TABLE_VARIABLES, prompts, **options)


def greedy_by_hand(module, variables, prompt, num_tokens, logit_bias=((0,),)):
    """Run the whole text through the network again for every token."""
    text, log_probabilities = list(prompt), []
    for step in range(num_tokens):
        logits = next_log_probabilities(module, variables, text)[-1]
        text.append(int(np.argmax(logits + logit_bias[min(step, len(logit_bias) - 1)])))
        log_probabilities.append(logits[text[-1]])
    return text[len(prompt) :], log_probabilities


@pytest.mark.parametrize("module", [TABLE, RECURRENT], ids=["table", "recurrent"])
def test_greedy_decoding_equals_the_full_forward_pass_for_every_token(module):
    variables = made(module, PROMPTS)
    result = generate(
        module, variables, PROMPTS, num_tokens=NUM_TOKENS, lengths=LENGTHS, rng=KEY, sampling=GREEDY
    )
    assert result.tokens.dtype == jnp.int32 and result.tokens.shape == (3, NUM_TOKENS)
    np.testing.assert_array_equal(result.lengths, [NUM_TOKENS] * 3)
    for row, length in enumerate(LENGTHS):
        tokens, log_probabilities = greedy_by_hand(
            module, variables, PROMPTS[row, :length], NUM_TOKENS
        )
        assert result.tokens[row].tolist() == tokens
        np.testing.assert_allclose(result.log_probabilities[row], log_probabilities, atol=1e-5)


def test_a_bias_of_the_logits_excludes_tokens_at_the_first_step_and_later():
    plain = continued(sampling=GREEDY).tokens
    bias = np.zeros((2, 6), np.float32)
    bias[0, plain[0, 0]] = -np.inf
    bias[1, plain[1, 1]] = -np.inf
    bias[1, plain[2, 1]] += 0.5
    result = continued(sampling=GREEDY, logit_bias=bias)
    for row, length in enumerate(LENGTHS):
        prompt = PROMPTS[row, :length]
        expected = greedy_by_hand(TABLE, TABLE_VARIABLES, prompt, NUM_TOKENS, bias)
        np.testing.assert_array_equal(result.tokens[row], expected[0])
        np.testing.assert_allclose(result.log_probabilities[row], expected[1], atol=1e-5)
    assert np.any(result.tokens != plain)
    alike = [continued(logit_bias=one).tokens for one in (bias[1], bias[1:])]
    np.testing.assert_array_equal(*alike)
    assert not np.any(alike[0] == plain[1, 1])


def test_log_probabilities_are_those_of_the_model_whatever_the_sampling():
    sampling = Sampling(temperature=2.0, top_k=3, repetition_penalty=1.5)
    result = continued(sampling=sampling)
    for row, length in enumerate(LENGTHS):
        text = [*PROMPTS[row, :length], *np.asarray(result.tokens[row])]
        logits = next_log_probabilities(TABLE, TABLE_VARIABLES, text)[length - 1 : -1]
        expected = np.take_along_axis(logits, np.asarray(result.tokens[row])[:, None], axis=1)
        np.testing.assert_allclose(result.log_probabilities[row], expected[:, 0], atol=1e-5)


def test_the_second_token_is_distributed_given_the_first_one():
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
    logits,
    repeated=(),
    *,
    repetition_penalty=1.0,
    temperature=1.0,
    top_k=None,
    top_p=1.0,
    min_p=0.0,
):
    """The probabilities of one row, transform by transform, with loops."""
    logits = np.asarray(logits, np.float64).copy()
    for token in repeated:
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


transformed = jax.jit(transform_logits)


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
        {"temperature": 1.7, "top_k": 3, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.3},
        {"temperature": 3.0, "top_p": 0.6, "repetition_penalty": 0.7},
    ],
    ids=str,
)
def test_each_transform_and_their_order_equal_a_loop(fields):
    random = np.random.default_rng(3)
    logits = random.normal(size=(20, 9)).astype(np.float32) * 2
    repeated = random.uniform(size=logits.shape) < 0.4
    kept = np.asarray(transformed(logits, Sampling(**fields), repeated))
    actual = np.exp(log_softmax(kept))
    for row in range(len(logits)):
        expected = filtered_by_hand(logits[row], np.flatnonzero(repeated[row]), **fields)
        np.testing.assert_allclose(actual[row], expected, atol=2e-6)


def test_the_transforms_keep_ties_and_return_float32():
    logits = jnp.array([[1.0, 2.0, 2.0, 0.0]], jnp.bfloat16)
    kept = transformed(logits, Sampling(top_k=1))
    assert kept.dtype == jnp.float32
    np.testing.assert_array_equal(np.isfinite(kept), [[False, True, True, False]])


def test_the_nucleus_of_a_large_vocabulary_equals_a_sort_in_both_precisions(enable_x64):
    logits = 3 * np.random.default_rng(1).normal(size=(4, 2000))
    for dtype in (np.float32, np.float64):
        kept = np.asarray(transformed(logits.astype(dtype), Sampling(top_p=0.9))) > -np.inf
        for row in range(4):
            expected = filtered_by_hand(logits[row].astype(dtype), top_p=0.9) > 0
            np.testing.assert_array_equal(kept[row], expected)


def test_temperature_zero_is_the_limit_of_small_temperatures_without_recompiling():
    draw = jax.jit(sample_tokens)
    logits = np.random.default_rng(0).normal(size=(50, 9)).astype(np.float32)
    keys = jax.random.split(KEY, 50)
    greedy, cold = (draw(keys, logits, Sampling(temperature=t)) for t in (0.0, 1e-5))
    np.testing.assert_array_equal(greedy, logits.argmax(1))
    np.testing.assert_array_equal(cold, greedy)
    assert np.any(np.asarray(draw(keys, logits, Sampling())) != np.asarray(greedy))
    assert draw._cache_size() == 1


def test_the_repetition_penalty_applies_to_prompt_and_generated_tokens():
    result = continued(
        PROMPTS, lengths=FULL, sampling=Sampling(temperature=0.0, repetition_penalty=1e9)
    )
    table = np.asarray(TABLE_VARIABLES["params"]["table"])
    compared = 0
    for row, prompt in enumerate(PROMPTS):
        text = [*prompt, *np.asarray(result.tokens[row])]
        for position in range(len(prompt), len(text)):
            logits, before = table[text[position - 2], text[position - 1]], set(text[:position])
            fresh = [token for token in range(VOCABULARY) if token not in before]
            # The penalty divides positive logits of repeated tokens to about 0.
            if fresh and logits[fresh].max() > 0:
                assert text[position] == max(fresh, key=lambda token: logits[token])
                compared += 1
    assert compared >= 3


def test_the_padding_of_a_prompt_changes_nothing():
    changed = PROMPTS.copy()
    changed[1, 1:], changed[2, 3:] = 99, -1
    for first, second in zip(
        jax.tree.leaves(continued()), jax.tree.leaves(continued(changed)), strict=True
    ):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint64"])
def test_prompts_and_lengths_may_be_integers_of_every_type(dtype):
    found = continued(PROMPTS.astype(dtype), lengths=LENGTHS.astype(dtype))
    np.testing.assert_array_equal(found.tokens, continued().tokens)


def test_a_length_of_zero_in_bytes_is_nan_not_the_last_token():
    found = jax.jit(lambda lengths: continued(lengths=lengths).log_probabilities[:, 0])(
        np.array([4, 0, 3], np.uint8)
    )
    np.testing.assert_array_equal(np.isnan(found), [False, True, False])


def test_a_row_does_not_depend_on_the_other_rows():
    whole = continued(stop_tokens=STOPS)
    other = PROMPTS.copy()
    other[[0, 2]] = [[0, 0, 1, 1], [2, 2, 2, 2]]
    changed = continued(other, stop_tokens=STOPS)
    np.testing.assert_array_equal(whole.tokens[1], changed.tokens[1])
    first = continued(PROMPTS[:1], lengths=LENGTHS[:1], stop_tokens=STOPS)
    np.testing.assert_array_equal(whole.tokens[:1], first.tokens)
    same = continued(np.tile(PROMPTS[:1], (3, 1)), lengths=FULL, stop_tokens=STOPS)
    assert len({tuple(row) for row in np.asarray(same.tokens)}) == 3


def test_another_key_samples_other_tokens_and_the_same_key_the_same():
    first = np.asarray(continued().tokens)
    np.testing.assert_array_equal(first, continued().tokens)
    assert np.any(first != np.asarray(continued(rng=jax.random.key(8)).tokens))


def test_a_stop_token_ends_its_row_and_counts():
    free = continued()
    stopped = continued(stop_tokens=STOPS, pad_token=-1)
    steps = np.arange(NUM_TOKENS)
    for row in range(3):
        tokens = np.asarray(free.tokens[row])
        hits = np.flatnonzero(np.isin(tokens, STOPS))
        length = hits[0] + 1 if hits.size else NUM_TOKENS
        assert int(stopped.lengths[row]) == length
        np.testing.assert_array_equal(stopped.tokens[row, :length], tokens[:length])
        assert np.all(np.asarray(stopped.tokens[row, length:]) == -1)
        np.testing.assert_array_equal(
            stopped.log_probabilities[row],
            np.where(steps < length, np.asarray(free.log_probabilities[row]), 0),
        )
    assert len(set(np.asarray(stopped.lengths))) > 1, "the rows should stop at different steps"


def test_the_loop_ends_when_every_row_has_stopped():
    result = continued(stop_tokens=STOPS)
    assert int(result.carry["calls"][0]) == 1 + int(result.lengths.max()) < NUM_TOKENS
    np.testing.assert_array_equal(result.carry["position"], LENGTHS + np.asarray(result.lengths))


def test_a_conversation_continues_from_the_carry():
    turn = np.array([[3, 1], [2, 5], [4, 0]])
    first = continued(stop_tokens=STOPS, sampling=GREEDY)
    carry = {**first.carry, "room": np.full(3, 99, np.int32)}
    second = continued(turn, lengths=None, carry=carry, num_tokens=4, sampling=GREEDY)
    for row, length in enumerate(LENGTHS):
        reply = np.asarray(first.tokens[row, : first.lengths[row]])
        text = [*PROMPTS[row, :length], *reply, *turn[row]]
        assert second.tokens[row].tolist() == greedy_by_hand(TABLE, TABLE_VARIABLES, text, 4)[0]
    assert len(set(np.asarray(first.lengths))) > 1, "the first turns should differ in length"


def test_a_sequence_to_sequence_model_starts_from_its_encoded_source():
    module, lengths = EncodedSource(VOCABULARY), np.array([4, 2, 3])
    begin = np.ones((3, 1), np.int32)
    variables = made(module, PROMPTS, begin, lengths)
    carry = module.apply(variables, PROMPTS, lengths, 8, method="start")
    result = generate(
        module, variables, begin, num_tokens=6, carry=carry, capacity=8, rng=KEY, sampling=GREEDY
    )
    inputs = np.concatenate([begin, result.tokens[:, :-1]], axis=1)
    logits = forward(module, variables, PROMPTS, inputs, lengths)
    np.testing.assert_array_equal(result.tokens, np.argmax(logits, axis=-1))


def test_a_second_call_of_the_same_shapes_is_not_traced_again():
    continued(stop_tokens=STOPS)
    count = len(extend_calls)
    again = generate(
        TableModel(VOCABULARY),
        made(TABLE, PROMPTS, seed=1),
        PROMPTS[::-1],
        num_tokens=NUM_TOKENS,
        lengths=np.array([1, 2, 4]),
        rng=jax.random.key(11),
        sampling=Sampling(temperature=0.3, top_p=0.5, min_p=0.1, repetition_penalty=1.2),
        stop_tokens=(5, 3),
        pad_token=3,
    )
    assert again.tokens.shape == (3, NUM_TOKENS)
    assert len(extend_calls) == count


def sampled_log_probabilities(variables, prompts, lengths):
    return generate(
        TABLE, variables, prompts, lengths=lengths, num_tokens=NUM_TOKENS, rng=KEY
    ).log_probabilities


compiled_inside = jax.jit(sampled_log_probabilities)


def test_generation_compiles_inside_another_program_and_over_a_population():
    solo = sampled_log_probabilities(TABLE_VARIABLES, PROMPTS, LENGTHS)
    inside = compiled_inside(TABLE_VARIABLES, PROMPTS, LENGTHS)
    np.testing.assert_allclose(inside, solo, atol=1e-6)
    members = [TABLE_VARIABLES, made(TABLE, PROMPTS, seed=1)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *members)
    population = jax.vmap(sampled_log_probabilities, in_axes=(0, None, None))
    found = population(stacked, PROMPTS, LENGTHS)
    np.testing.assert_allclose(found[0], solo, atol=1e-6)
    solo = sampled_log_probabilities(members[1], PROMPTS, LENGTHS)
    np.testing.assert_allclose(found[1], solo, atol=1e-6)


def test_wrong_lengths_and_a_full_cache_give_nan_in_a_compiled_program():
    found = compiled_inside(TABLE_VARIABLES, PROMPTS, np.array([0, 5, 3]))
    np.testing.assert_array_equal(np.isnan(found[:, 0]), [True, True, False])
    carry = continued().carry  # 16, 13 and 15 of 16 tokens
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
        ({"capacity": 8}, "4 tokens and 12 new ones.*capacity 8; give capacity=16"),
        ({"prompts": PROMPTS + 1}, "token id 6 is outside the vocabulary of 6"),
        ({"prompts": PROMPTS - 2}, "token id -1 is outside"),
        ({"stop_tokens": (6,)}, "token id 6 is outside"),
        ({"logit_bias": np.zeros(5, "f")}, r"shape \(5,\) .* vocabulary of 6"),
        ({"logit_bias": np.zeros((0, 6), "f")}, r"shape \(0, 6\)"),
        ({"logit_bias": np.zeros(6, np.int32)}, "type int32"),
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
def test_a_wrong_sampling_option_is_refused_with_its_value(fields, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**fields)


def test_a_module_without_the_protocol_is_refused():
    from jaxnets.models.feedforward import MLP

    with pytest.raises(ValueError, match="MLP has no method start and extend; give a module"):
        generate(MLP(), {}, PROMPTS, num_tokens=1, rng=KEY)
