"""Prompts in parallel: the logits after the last token of each row, and no others."""

import jax
import numpy as np
import pytest
from checks import random_variables

from jaxnets.generation.generate import prefill
from jaxnets.models.recurrent import RecurrentLM, RecurrentTranslator
from jaxnets.models.transformer import (
    BlockConfig,
    SpeechTransformer,
    TransformerLM,
    TransformerTranslator,
)

VOCABULARY, CAPACITY = 13, 9
PROMPTS = np.random.default_rng(0).integers(0, VOCABULARY, (3, 5), np.int32)
LENGTHS = np.array([5, 2, 1], np.int32)
FRAMES = np.random.default_rng(1).normal(size=(3, 8, 4)).astype(np.float32)
BLOCKS = BlockConfig(features=8, num_heads=2, mlp_dim=12)
MODELS = {
    "transformer": (TransformerLM(VOCABULARY, 1, BLOCKS), (PROMPTS,)),
    "recurrent": (RecurrentLM(VOCABULARY, 4, 5, tie_embeddings=True), (PROMPTS,)),
    "transformer translator": (
        TransformerTranslator(VOCABULARY, num_layers=1, config=BLOCKS),
        (PROMPTS, PROMPTS),
    ),
    "recurrent translator": (RecurrentTranslator(VOCABULARY, None, 4, 6), (PROMPTS, PROMPTS)),
    "speech": (SpeechTransformer(VOCABULARY, 1, config=BLOCKS), (FRAMES, PROMPTS)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_prefill_returns_the_last_logits_and_computes_no_others(name):
    module, inputs = MODELS[name]
    variables, carry = random_variables(module, *inputs), None
    if len(inputs) == 2:
        carry = module.apply(variables, inputs[0], None, CAPACITY, method="start")

    def run(variables, carry):
        return prefill(module, CAPACITY, variables, PROMPTS, LENGTHS, carry)

    program = str(jax.make_jaxpr(run)(variables, carry))
    assert f"f32[3,{VOCABULARY}]" in program and f"f32[3,5,{VOCABULARY}]" not in program
    if carry is None:
        carry = module.apply(variables, 3, CAPACITY, method="start")
    extend = jax.jit(lambda *arguments: module.apply(*arguments, method="extend"))
    logits, expected = extend(variables, PROMPTS, carry, LENGTHS)
    found, after = run(variables, carry)
    np.testing.assert_allclose(found, logits[np.arange(3), LENGTHS - 1], atol=1e-5)
    for one, other in zip(jax.tree.leaves(after), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
