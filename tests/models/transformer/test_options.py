"""The options of language models after LLaMA 2, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import check_module
from transformer_problem import config, forward, made, shapes_of, tokens

from jaxnets.core import Precision
from jaxnets.functional.attention.positions import LinearScaling
from jaxnets.layers import RMSNorm
from jaxnets.models.transformer import TransformerLM

GEMMA = TransformerLM(
    11,
    3,
    config(
        head_dim=6,
        num_kv_heads=1,
        positions="rotary",
        activation="geglu_tanh",
        norm="zero_centered_rms",
        branch_norm=True,
        rope_scaling=LinearScaling(2.0),
        window=3,
        global_every=3,
        window_rope_theta=10.0,
        qk_norm=True,
        attention_scale=0.3,
        attention_softcap=0.7,
        use_bias=False,
    ),
    scale_embedding=True,
    logit_softcap=1.5,
)


def rms(x, params, epsilon=1e-6):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + epsilon) * (1 + params["scale"])


def rotate(x, theta, factor):
    """Rotate [time, heads, head_dim] by the position."""
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None] * theta ** (-np.arange(half) / half) / factor
    sine, cosine = np.sin(angles)[:, None], np.cos(angles)[:, None]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cosine - b * sine, b * cosine + a * sine], axis=-1)


def gelu_tanh(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gemma_in_numpy(params, text):
    """Compute the logits [time, vocabulary] of one text by the formulas of Gemma 2 and 3."""
    table = params["embedding"]["token"]["embedding"]
    x = table[text] * np.sqrt(8)
    distance = np.subtract.outer(np.arange(len(text)), np.arange(len(text)))
    for index in range(3):
        is_global, layer = index == 2, params["stack"][f"layer_{index}"]
        attention, kernels = layer["attention"], {}
        for name in ("query", "key", "value"):
            kernels[name] = (rms(x, layer["attention_norm"]) @ attention[name]["kernel"]).reshape(
                len(text), -1, 6
            )
        theta, factor = (10_000.0, 2.0) if is_global else (10.0, 1.0)
        query = rotate(rms(kernels["query"], attention["query_norm"]), theta, factor)
        key = rotate(rms(kernels["key"], attention["key_norm"]), theta, factor)[:, 0]
        heads = []
        for head in range(2):
            scores = 0.7 * np.tanh(0.3 * query[:, head] @ key.T / 0.7)
            visible = (distance >= 0) & (is_global | (distance < 3))
            weights = np.exp(scores) * visible
            heads.append(weights / weights.sum(-1, keepdims=True) @ kernels["value"][:, 0])
        y = np.concatenate(heads, axis=-1) @ attention["output"]["kernel"]
        x = x + rms(y, layer["attention_output_norm"])
        y, dense = rms(x, layer["feed_forward_norm"]), layer["feed_forward"]
        y = gelu_tanh(y @ dense["gate"]["kernel"]) * (y @ dense["hidden"]["kernel"])
        x = x + rms(y @ dense["output"]["kernel"], layer["feed_forward_output_norm"])
    return 1.5 * np.tanh(rms(x, params["stack"]["norm"]) @ table.T / 1.5)


def test_all_options_of_gemma_follow_the_formulas():
    text = tokens()
    variables = made(GEMMA, text)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])
    expected = np.stack([gemma_in_numpy(params, row) for row in text])
    np.testing.assert_allclose(forward(GEMMA, variables, text), expected, rtol=2e-5, atol=2e-5)
    assert np.ptp(expected) > 0.5


def test_a_language_model_with_all_options_passes_every_check():
    attention = 8 * 12 + 2 * 8 * 6 + 12 * 8 + 2 * 6
    num_parameters = 11 * 8 + 3 * (attention + 3 * 96 + 4 * 8) + 8
    check_module(GEMMA, tokens(), np.array([7, 3, 0], np.int32), num_parameters=num_parameters)


def test_a_zero_centered_norm_keeps_small_scales_in_16_bits():
    """1 + 0.003 rounds to 1 in bfloat16, where the sum is not computed."""
    x = jnp.array([[256.0, 256.0]])
    module = RMSNorm(precision=Precision(parameter=jnp.bfloat16), zero_centered=True)
    variables = module.init(jax.random.key(0), x)
    np.testing.assert_array_equal(variables["params"]["scale"], 0)
    scale = jnp.full(2, 0.003, jnp.bfloat16)
    found = module.apply({"params": {"scale": scale}}, x)
    np.testing.assert_allclose(found, 1 + float(scale[0]), rtol=1e-6)


def test_the_factor_of_the_embedding_is_rounded_to_the_compute_dtype():
    """As Gemma does: sqrt(1152) = 33.94 becomes 34 in bfloat16."""
    policy = Precision(compute=jnp.bfloat16)
    block = config(features=1152, num_heads=4, positions=None)
    module = TransformerLM(3, 1, block, scale_embedding=True, precision=policy)
    variables = {"params": {"token": {"embedding": jnp.ones((3, 1152))}}}

    def embed(variables):
        return module.bind({"params": {"embedding": variables["params"]}}).embedding(
            jnp.zeros((1, 2), jnp.int32)
        )

    np.testing.assert_array_equal(np.asarray(embed(variables), np.float32), 34.0)


@pytest.mark.parametrize(
    ("fields", "with_bias"),
    [
        ({"use_bias": False, "qkv_bias": True}, {"query", "key", "value"}),
        ({"qkv_bias": False, "key_bias": True}, {"output"}),
        ({"use_bias": True}, {"query", "value", "output"}),
        ({"use_bias": False, "key_bias": True}, {"key"}),
    ],
)
def test_biases_of_queries_keys_and_values_can_differ_from_the_others(fields, with_bias):
    shapes, _ = shapes_of(TransformerLM(11, 1, config(**fields)), tokens())
    attention = shapes["params"]["stack"]["layer_0"]["attention"]
    assert {name for name, dense in attention.items() if "bias" in dense} == with_bias
    feed_forward = shapes["params"]["stack"]["layer_0"]["feed_forward"]
    assert ("bias" in feed_forward["hidden"]) == fields.get("use_bias", True)


def test_a_global_block_reaches_beyond_the_window():
    module, text = TransformerLM(11, 2, config(window=2, global_every=2, positions=None)), tokens()
    variables = made(module, text)
    other = text.copy()
    other[:, 1] = (other[:, 1] + 1) % 11
    before, after = (forward(module, variables, x) for x in (text, other))
    changed = np.abs(before - after).max((0, 2)) > 0
    np.testing.assert_array_equal(changed, [0, 1, 1, 1, 1, 1, 1])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: config(norm="rmsnorm"), "norm is 'rmsnorm'; choose one of .*'zero_centered_rms'"),
        (lambda: config(global_every=2), "global_every=2 without a window"),
        (lambda: config(global_every=0, window=2), "global_every=0"),
        (lambda: config(window=2, global_every=2, scan_layers=True), "global_every=2 they differ"),
        (lambda: config(window=2, window_rope_theta=10.0), "window_rope_theta=10.0 without global"),
        (lambda: config(attention_softcap=0.0), "attention_softcap is 0.0; give a positive"),
        (lambda: config(attention_scale=float("inf")), "attention_scale is inf"),
        (lambda: config(rope_scaling=LinearScaling(2.0)), "rope_scaling for positions='learned'"),
        (lambda: TransformerLM(11, logit_softcap=-1.0), "logit_softcap is -1.0; give a positive"),
    ],
)
def test_options_that_do_not_fit_are_refused_with_their_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()
