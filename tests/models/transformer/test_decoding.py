"""Incremental decoding = one forward pass, for every kind of attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import mostly_slow
from transformer_problem import (
    PIECES,
    append_pieces,
    compiled_extend,
    config,
    forward,
    made,
    tokens,
)

from jaxnets.core import Precision
from jaxnets.functional.attention.positions import Llama3Scaling, YarnScaling
from jaxnets.generation.beam_search import beam_search
from jaxnets.generation.generate import check_prompts, generate
from jaxnets.models.transformer import TransformerLM, TransformerTranslator

CONFIGS = {
    "learned": {"positions": "learned", "activation": "swiglu"},
    "learned_post_norm": {"positions": "learned", "norm_first": False},
    "sinusoidal_multi_query": {"positions": "sinusoidal", "num_kv_heads": 1},
    "rotary_grouped": {
        "positions": "rotary",
        "num_heads": 4,
        "num_kv_heads": 2,
        "norm": "rms",
    },
    "rotary_window_qk_norm": {"positions": "rotary", "window": 3, "qk_norm": True},
    "alibi_window": {"positions": "alibi", "window": 4},
    "alibi_three_heads": {"positions": "alibi", "num_heads": 3, "head_dim": 5},
    "relative": {"positions": "relative", "key_bias": True},
    "t5": {
        "positions": "relative",
        "num_relative_buckets": 8,
        "max_relative_distance": 6,
        "attention_scale": 1.0,
        "norm": "rms",
        "use_bias": False,
        "activation": "geglu_tanh",
    },
    "no_positions": {"positions": None},
    "scanned": {"positions": "rotary", "scan_layers": True, "num_kv_heads": 1},
    "gemma": {
        "positions": "rotary",
        "norm": "zero_centered_rms",
        "branch_norm": True,
        "window": 3,
        "global_every": 2,
        "window_rope_theta": 100.0,
        "rope_scaling": YarnScaling(4.0, 126),
        "qk_norm": True,
        "attention_scale": 0.9,
        "attention_softcap": 1.5,
        "qkv_bias": True,
        "remat": True,
    },
    "scanned_gemma": {
        "positions": "rotary",
        "norm": "zero_centered_rms",
        "branch_norm": True,
        "window": 3,
        "rope_scaling": Llama3Scaling(8.0, 126),
        "attention_softcap": 1.5,
        "scan_layers": True,
    },
    "scanned_relative": {"positions": "relative", "scan_layers": True, "remat": True},
}
# One of each kind of positions, of norm and of heads; the others are products of these.
DEFAULT = ["learned_post_norm", "rotary_grouped", "rotary_window_qk_norm", "alibi_window"]
DEFAULT += ["scanned_relative", "gemma"]


@pytest.mark.parametrize("name", mostly_slow(CONFIGS, DEFAULT))
def test_ragged_pieces_of_a_text_give_the_logits_of_the_whole(name):
    num_layers = 2 if CONFIGS[name].get("scan_layers") or "qk_norm" in CONFIGS[name] else 1
    fields = {"scale_embedding": True, "logit_softcap": 2.0} if "gemma" in name else {}
    module = TransformerLM(11, num_layers, config(**CONFIGS[name]), max_length=9, **fields)
    sequence = tokens()
    variables = made(module, sequence)
    whole = forward(module, variables, sequence)
    carry = module.apply(variables, 3, 8, method="start")
    assert {leaf.shape[0] for leaf in jax.tree.leaves(carry)} == {3}
    assert module.room(carry) == 8
    found, position, _ = append_pieces(compiled_extend(module), variables, carry, sequence, PIECES)
    for row, end in enumerate(position):
        np.testing.assert_allclose(found[row, :end], whole[row, :end], atol=2e-5)
    assert np.ptp(whole) > 0.1


@pytest.mark.parametrize(
    "name",
    mostly_slow(
        ["sinusoidal_multi_query", "scanned_relative", "t5"], ["sinusoidal_multi_query", "t5"]
    ),
)
def test_ragged_pieces_of_a_translation_give_the_logits_of_the_whole(name):
    fields = CONFIGS[name] | {"norm_first": name != "sinusoidal_multi_query"}
    options = {"tied": False, "output_scale": 0.5} if name == "t5" else {}
    module = TransformerTranslator(11, num_layers=1, config=config(**fields), **options)
    source, sequence, lengths = tokens(time=5, seed=1), tokens(), np.array([5, 2, 0])
    variables = made(module, source, sequence)
    whole = forward(module, variables, source, sequence, lengths)
    carry = module.apply(variables, source, lengths, 8, method="start")
    assert {leaf.shape[0] for leaf in jax.tree.leaves(carry)} == {3}
    assert module.room(carry) == 8
    found, position, _ = append_pieces(compiled_extend(module), variables, carry, sequence, PIECES)
    for row, end in enumerate(position):
        np.testing.assert_allclose(found[row, :end], whole[row, :end], atol=2e-5)
    assert np.abs(whole[0] - whole[1]).max() > 0.02


LM = TransformerLM(11, 1, config(), max_length=9)
VARIABLES = made(LM, tokens())
extend = compiled_extend(LM)


def test_single_tokens_in_a_compiled_loop_give_the_logits_of_the_whole():
    sequence = tokens()

    @jax.jit
    def one_by_one(variables, sequence):
        def step(carry, now):
            logits, carry = LM.apply(variables, now[:, None], carry, method="extend")
            return carry, logits[:, 0]

        carry = LM.apply(variables, 3, 9, method="start")
        return jax.lax.scan(step, carry, sequence.T)

    carry, logits = one_by_one(VARIABLES, sequence)
    np.testing.assert_array_equal(carry["position"], 7)
    whole = forward(LM, VARIABLES, sequence)
    np.testing.assert_allclose(np.swapaxes(logits, 0, 1), whole, atol=2e-5)


def test_rows_of_a_carry_can_be_gathered():
    """As in beam search: every leaf has a leading axis of rows."""
    sequence, rows = tokens(), np.array([2, 0, 2])
    carry = LM.apply(VARIABLES, 3, 9, method="start")
    ends = np.array([3, 2, 1])
    _, carry = extend(VARIABLES, sequence[:, :3], carry, ends)
    carry = jax.tree.map(lambda leaf: np.asarray(leaf)[rows], carry)
    found, _ = extend(VARIABLES, sequence[:, 3:6], carry, np.full(3, 3))
    texts = np.zeros_like(sequence)  # padded behind, which causal attention ignores
    for row, old in enumerate(rows):
        texts[row, : ends[old] + 3] = [*sequence[old, : ends[old]], *sequence[row, 3:6]]
    whole = forward(LM, VARIABLES, texts)
    for row, old in enumerate(rows):
        np.testing.assert_allclose(found[row], whole[row, ends[old] : ends[old] + 3], atol=2e-5)


def test_tokens_beyond_the_capacity_give_nan_and_leave_the_cache_unchanged():
    sequence = tokens()
    carry = LM.apply(VARIABLES, 3, 4, method="start")
    _, carry = extend(VARIABLES, sequence[:, :3], carry, np.array([3, 2, 1]))
    logits, after = extend(VARIABLES, sequence[:, 3:6], carry, np.array([3, 2, 3]))
    finite = np.isfinite(logits).all(-1)
    np.testing.assert_array_equal(finite, [[1, 0, 0], [1, 1, 0], [1, 1, 1]])
    for name, before in carry["layer_0"].items():
        extended = np.asarray(after["layer_0"][name])
        for row, end in enumerate([3, 2, 1]):
            np.testing.assert_array_equal(extended[row, :end], np.asarray(before)[row, :end])


def test_wrong_lengths_and_tokens_in_a_compiled_program_give_nan_in_their_row_only():
    sequence, carry = tokens(time=3), LM.apply(VARIABLES, 3, 9, method="start")
    logits, carry = extend(VARIABLES, sequence, carry, np.array([3, 4, -1]))
    assert np.isfinite(logits[0]).all() and np.isnan(logits[1:]).all()
    logits, _ = extend(VARIABLES, sequence, carry, np.array([3, 1, 1]))
    assert np.isfinite(logits[0]).all() and np.isnan(logits[1:, 0]).all()
    sequence[1, 1] = 11
    logits = forward(LM, VARIABLES, sequence)
    assert np.isfinite(logits[::2]).all() and np.isnan(logits[1]).any()


def test_the_cache_has_the_compute_dtype():
    module = LM.clone(precision=Precision(compute=jnp.bfloat16))
    carry = jax.eval_shape(lambda: module.apply(VARIABLES, 3, 4, method="start"))
    assert carry["layer_0"]["key"].dtype == jnp.bfloat16
    logits, after = jax.eval_shape(
        compiled_extend(module), VARIABLES, tokens(), carry, np.ones(3, int)
    )
    assert logits.dtype == jnp.float32 and after["layer_0"]["key"].dtype == jnp.bfloat16


def test_a_carry_without_room_for_prompt_and_new_tokens_is_refused_with_the_numbers():
    carry, key = LM.apply(VARIABLES, 3, 4, method="start"), jax.random.key(0)

    def generated(carry, num_tokens, lengths=None):
        options = {"num_tokens": num_tokens, "rng": key, "lengths": lengths, "carry": carry}
        return generate(LM, VARIABLES, tokens(time=3), **options).log_probabilities

    message = "3 tokens and 2 new ones .* room for 4; start it with a capacity of 5 or more"
    for run in (generated, jax.jit(generated, static_argnums=1)):
        with pytest.raises(ValueError, match=message):
            run(carry, 2)
    with pytest.raises(ValueError, match=message):
        beam_search(
            *(LM, VARIABLES, tokens(time=3)),
            **{"num_tokens": 2, "num_beams": 2, "stop_token": None, "carry": carry},
        )
    fitting = {"num_tokens": 1, "capacity": None, "stop_tokens": ()}
    check_prompts(LM, VARIABLES, tokens(time=3), None, carry, **fitting)
    # Padding takes no room.
    assert np.isfinite(generated(carry, 2, np.array([1, 2, 2]))).all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LM.apply(VARIABLES, 3, 10, method="start"), "capacity of 10 .* 9 learned"),
        (lambda: LM.apply(VARIABLES, 3, 0, method="start"), "capacity=0"),
        (
            lambda: LM.apply(
                VARIABLES,
                tokens(),
                LM.apply(VARIABLES, 3, 9, method="start"),
                np.array([8, 1, 1]),
                method="extend",
            ),
            r"length 8 is not in \[0, 7\]",
        ),
    ],
)
def test_a_capacity_or_length_that_does_not_fit_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
