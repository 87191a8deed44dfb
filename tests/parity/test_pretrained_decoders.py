"""Decoder-only networks of transformers, loaded here. Optional: run with `-m parity`."""

import copy
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnets as jn
from jaxnets.models.transformer import Block

torch = pytest.importorskip("torch", reason="torch is not installed (extra: parity)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.parity

TOKENS = np.random.default_rng(0).integers(3, 40, (3, 9))
NEW = 12


def gpt2(**options):
    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32}
    return transformers.GPT2Config(**(sizes | options))


def llama_like(name, **options):
    sizes = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 64,
    }
    return getattr(transformers, f"{name}Config")(**(sizes | options))


def linear(factor=3.0):
    return {"rope_type": "linear", "factor": factor, "rope_theta": 500.0}


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 100.0,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 100.0,
}
LLAMA = functools.partial(llama_like, "Llama")
MISTRAL = functools.partial(llama_like, "Mistral")
QWEN2 = functools.partial(llama_like, "Qwen2")
QWEN3 = functools.partial(llama_like, "Qwen3", head_dim=6)
GEMMA2 = functools.partial(llama_like, "Gemma2", head_dim=6, query_pre_attn_scalar=5)
GEMMA3 = functools.partial(llama_like, "Gemma3Text", head_dim=6, query_pre_attn_scalar=5)
SLIDING, FULL = "sliding_attention", "full_attention"

CONFIGS = {
    "gpt2": gpt2(),
    "gpt2_inner_untied": gpt2(n_inner=24, activation_function="relu", tie_word_embeddings=False),
    "llama": LLAMA(),
    "llama_tied_heads": LLAMA(tie_word_embeddings=True, num_key_value_heads=4, head_dim=6),
    "llama_biases": LLAMA(attention_bias=True, mlp_bias=True, rms_norm_eps=1e-3),
    "llama_linear": LLAMA(rope_parameters=linear()),
    "llama_llama3": LLAMA(rope_parameters=LLAMA3, hidden_act="gelu"),
    "llama_yarn": LLAMA(rope_parameters=YARN),
    "llama_yarn_options": LLAMA(
        rope_parameters=YARN | {"attention_factor": 1.3, "beta_fast": 8.0, "beta_slow": 2.0}
    ),
    "llama_yarn_mscale": LLAMA(
        rope_parameters=YARN | {"mscale": 2.0, "mscale_all_dim": 0.5, "truncate": False}
    ),
    "mistral_window": MISTRAL(sliding_window=4),
    "mistral": MISTRAL(sliding_window=None, head_dim=6),
    "qwen2": QWEN2(),
    "qwen2_tied_window": QWEN2(
        tie_word_embeddings=True, use_sliding_window=True, sliding_window=4, max_window_layers=0
    ),
    "qwen3": QWEN3(),
    "qwen3_yarn": QWEN3(rope_parameters=YARN, tie_word_embeddings=True),
    "qwen3_layer_types": QWEN3(
        use_sliding_window=True, sliding_window=4, layer_types=[SLIDING, FULL, SLIDING]
    ),
    "gemma2": GEMMA2(sliding_window=4, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma2_plain": GEMMA2(
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        query_pre_attn_scalar=6,
        layer_types=[FULL] * 3,
        rope_parameters=linear(),
    ),
    "gemma3": GEMMA3(
        sliding_window=4,
        layer_types=[SLIDING, SLIDING, FULL],
        rope_parameters={
            FULL: linear(8.0),
            SLIDING: {"rope_type": "default", "rope_theta": 50.0},
        },
    ),
    "gemma3_default_layers": GEMMA3(
        sliding_window=4, num_hidden_layers=7, num_key_value_heads=1, final_logit_softcapping=3.0
    ),
    "gemma3_local": GEMMA3(sliding_window=4),
}


def saved(folder, config):
    """Save a random network, with norms and biases that are not those of the beginning."""
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    theirs = theirs.float().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    theirs.save_pretrained(folder)
    return theirs


@pytest.fixture(params=CONFIGS)
def network(request, tmp_path):
    theirs = saved(tmp_path / "theirs", copy.deepcopy(CONFIGS[request.param]))
    return theirs, jn.pretrained.load(tmp_path / "theirs")


def close(found, expected, tolerance=1e-4):
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=0, atol=tolerance)


def states_and_logits(ours):
    """Return the output of each block, that of the last one normalized, and the logits."""

    def is_state(module, name):
        return isinstance(module, Block) and name == "__call__"

    logits, state = ours.module.apply(
        ours.variables, TOKENS, capture_intermediates=is_state, mutable=["intermediates"]
    )
    layers = state["intermediates"]["stack"]
    outputs = [layers[f"layer_{index}"]["__call__"][0][0] for index in range(len(layers))]
    return outputs, state["intermediates"]["features"], logits


def test_hidden_states_and_logits(network):
    theirs, ours = network
    expected = theirs(torch.tensor(TOKENS), output_hidden_states=True)
    outputs, features, logits = states_and_logits(ours)
    assert len(outputs) == len(expected.hidden_states) - 1
    for found, state in zip(outputs[:-1], expected.hidden_states[1:-1], strict=True):
        close(found, state)
    close(np.asarray(features), expected.hidden_states[-1])
    close(logits, expected.logits)
    assert np.ptp(logits) > 1


def test_greedy_and_beam_generation(network):
    theirs, ours = network
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompts, time = torch.tensor(TOKENS), TOKENS.shape[1]
    expected = theirs.generate(prompts, **options)[:, time:]
    greedy = jn.generate(
        *(ours.module, ours.variables, jnp.asarray(TOKENS)),
        num_tokens=NEW,
        rng=jax.random.key(0),
        sampling=jn.Sampling(temperature=0.0),
    )
    np.testing.assert_array_equal(greedy.tokens, expected)
    beams = jn.beam_search(
        *(ours.module, ours.variables, jnp.asarray(TOKENS)),
        num_tokens=NEW,
        num_beams=3,
        stop_token=None,
    )
    expected = theirs.generate(prompts, num_beams=3, **options)[:, time:]
    np.testing.assert_array_equal(beams.tokens[:, 0], expected)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_gradients(name, tmp_path):
    """The gradients of their parameters, saved as parameters, are those of ours."""
    theirs = saved(tmp_path / "theirs", copy.deepcopy(CONFIGS[name]))
    ours = jn.pretrained.load(tmp_path / "theirs")
    labels = np.roll(TOKENS, 1, axis=1)
    logits = theirs(torch.tensor(TOKENS)).logits
    torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.tensor(labels).flatten()
    ).backward()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.grad)
    theirs.save_pretrained(tmp_path / "gradients")
    expected = jn.pretrained.load(tmp_path / "gradients").variables

    def loss(variables):
        log_probabilities = jax.nn.log_softmax(ours.module.apply(variables, TOKENS))
        return -jnp.mean(jnp.take_along_axis(log_probabilities, labels[..., None], axis=-1))

    found = jax.grad(loss)(ours.variables)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for own, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(own, other, rtol=0, atol=1e-5 * max(1, np.abs(other).max()))


def test_saved_networks_are_read_by_transformers(network, tmp_path):
    theirs, ours = network
    jn.pretrained.save(tmp_path / "ours", ours, layout="torch")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager"
    ).eval()
    assert type(again) is type(theirs)
    with torch.no_grad():
        found, expected = (net(torch.tensor(TOKENS)).logits for net in (again, theirs))
    np.testing.assert_array_equal(found, expected)


def test_options_of_transformers_4(tmp_path):
    """rope_theta, rope_scaling and rope_local_base_freq, as folders of older versions have them."""
    theirs = saved(tmp_path / "theirs", copy.deepcopy(CONFIGS["gemma3"]))
    path = tmp_path / "theirs" / "config.json"
    content = json.loads(path.read_text())
    assert content.pop("rope_parameters")["full_attention"]["rope_type"] == "linear"
    content |= {"rope_theta": 500.0, "rope_local_base_freq": 50.0}
    content["rope_scaling"] = {"type": "linear", "factor": 8.0}
    del content["layer_types"]
    content["sliding_window_pattern"] = 3
    path.write_text(json.dumps(content))
    ours = jn.pretrained.load(tmp_path / "theirs")
    logits = ours.module.apply(ours.variables, TOKENS)
    close(logits, theirs(torch.tensor(TOKENS)).logits)


def test_base_networks_without_a_head(tmp_path):
    torch.manual_seed(0)
    theirs = transformers.AutoModel.from_config(copy.deepcopy(CONFIGS["gemma2"])).float().eval()
    theirs.save_pretrained(tmp_path)
    ours = jn.pretrained.load(tmp_path)
    _, features, _ = states_and_logits(ours)
    close(np.asarray(features), theirs(torch.tensor(TOKENS)).last_hidden_state)
