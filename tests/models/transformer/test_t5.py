"""T5: its options of the blocks, against its formulas written in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import check_module, shapes_of
from transformer_problem import LENGTHS, close, config, forward, made, tokens

from jaxnets.core import Precision
from jaxnets.models.transformer import (
    Attention,
    BlockConfig,
    FeedForward,
    Stack,
    TransformerTranslator,
    flan_t5_small,
    t5_small,
)

SMALL = {
    "features": 6,
    "num_heads": 2,
    "head_dim": 4,
    "mlp_dim": 12,
    "num_layers": 2,
    "num_decoder_layers": 1,
    "num_relative_buckets": 8,
    "max_relative_distance": 5,
    "output_scale": 6**-0.5,
}
TIED = t5_small(11, **SMALL)
GATED = flan_t5_small(11, **SMALL | {"output_scale": 1.0})
SOURCE, TARGET = tokens(), tokens(time=5, seed=1)


def bucket(distance, bidirectional, num_buckets=8, max_distance=5):
    """Return the bucket of key - query, by the definition of T5's published code."""
    offset = 0
    if bidirectional:
        num_buckets //= 2
        offset = num_buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    exact = num_buckets // 2
    if distance < exact:
        return offset + distance
    wide = np.log(distance / exact) / np.log(max_distance / exact) * (num_buckets - exact)
    return offset + min(exact + int(wide + 1e-9), num_buckets - 1)


def rms_norm(params, x):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * params["scale"]


def attention(params, x, context, bias, visible):
    query, key, value = (
        (inputs @ params[name]["kernel"]).reshape(len(inputs), 2, 4)
        for name, inputs in (("query", x), ("key", context), ("value", context))
    )
    scores = np.einsum("qhd,khd->hqk", query, key) + bias  # no factor of 1 / sqrt(head_dim)
    weights = np.exp(scores) * visible
    weights /= weights.sum(-1, keepdims=True)
    mixed = np.einsum("hqk,khd->qhd", weights, value).reshape(len(x), 8)
    return mixed @ params["output"]["kernel"]


def feed_forward(params, x):
    hidden = x @ params["hidden"]["kernel"]
    if "gate" not in params:
        return np.maximum(hidden, 0) @ params["output"]["kernel"]
    gate = x @ params["gate"]["kernel"]
    gelu = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    return (gelu * hidden) @ params["output"]["kernel"]


def stack(params, x, num_layers, context=None):
    time, causal = len(x), context is not None
    buckets = [[bucket(k - q, not causal) for k in range(time)] for q in range(time)]
    bias = np.moveaxis(params["relative_bias"][buckets], -1, 0)  # [heads, queries, keys]
    visible = np.tri(time) if causal else np.ones((time, time))
    for index in range(num_layers):
        layer = params[f"layer_{index}"]
        y = rms_norm(layer["attention_norm"], x)
        x = x + attention(layer["attention"], y, y, bias, visible)
        if causal:
            y = rms_norm(layer["cross_attention_norm"], x)
            x = x + attention(layer["cross_attention"], y, context, 0, 1)
        x = x + feed_forward(layer["feed_forward"], rms_norm(layer["feed_forward_norm"], x))
    return rms_norm(params["norm"], x)


def t5(params, source, target):
    """Return the logits of one example, [target, vocabulary]."""
    table = params["embedding"]["token"]["embedding"]
    context = stack(params["encoder"], table[source], 2)
    x = stack(params["decoder"], table[target], 1, context)
    return x @ params["head"]["kernel"] if "head" in params else x * 6**-0.5 @ table.T


@pytest.mark.parametrize("module", [TIED, GATED], ids=["t5", "flan_t5"])
def test_logits_are_those_of_the_formulas(module):
    variables = made(module, SOURCE, TARGET)
    params = jax.tree.map(np.float64, variables["params"])
    found = forward(module, variables, SOURCE, TARGET, np.array([7, 3, 1]))
    for row, length in enumerate([7, 3, 1]):
        close(found[row], t5(params, SOURCE[row, :length], TARGET[row]))
    assert np.abs(params["encoder"]["relative_bias"]).max() > 0.1


ATTENTION, FEED_FORWARD = 4 * 6 * 8, 2 * 6 * 12
ENCODER_BLOCK = ATTENTION + FEED_FORWARD + 2 * 6
DECODER_BLOCK = ENCODER_BLOCK + ATTENTION + 6
STACKS = 2 * ENCODER_BLOCK + DECODER_BLOCK + 2 * (8 * 2 + 6)


@pytest.mark.parametrize(
    ("module", "num_parameters"),
    [
        pytest.param(TIED, 11 * 6 + STACKS, marks=pytest.mark.slow),
        (GATED, 2 * 11 * 6 + STACKS + 3 * 6 * 12),
    ],
    ids=["t5", "flan_t5"],
)
def test_t5_passes_every_check(module, num_parameters):
    check_module(module, SOURCE, TARGET, LENGTHS, num_parameters=num_parameters)


def test_padding_of_the_source_does_not_change_the_logits():
    variables = made(TIED, SOURCE, TARGET)
    padded = np.concatenate([SOURCE, SOURCE], axis=1)
    padded[np.arange(14)[None] >= LENGTHS[:, None]] = 99
    expected = forward(TIED, variables, SOURCE, TARGET, LENGTHS)
    close(forward(TIED, variables, padded, TARGET, LENGTHS), expected)


def test_dropout_of_the_feed_forward_network_is_between_its_layers():
    module = FeedForward(config(activation="relu", mlp_dropout_rate=0.25, use_bias=False))
    x = np.ones((50, 40, 8), np.float32)
    kernels = {"hidden": np.ones((8, 12)), "output": np.eye(12, 8)}
    params = {name: {"kernel": np.float32(kernel)} for name, kernel in kernels.items()}
    key = {"dropout": jax.random.key(0)}
    y = module.apply({"params": params}, x, train=True, rngs=key)
    dropped = y == 0
    np.testing.assert_allclose(y[~dropped], 8 / 0.75, rtol=1e-6)
    assert abs(dropped.mean() - 0.25) < 0.02
    np.testing.assert_allclose(module.apply({"params": params}, x), 8, rtol=1e-6)


def test_dropout_of_the_output_comes_after_the_norm_of_the_stack():
    module, x = (
        Stack(config(output_dropout_rate=0.25, positions=None), 1),
        np.ones((50, 40, 8), np.float32),
    )
    variables = made(module, x)
    y = module.apply(variables, x, np.full(50, 30), train=True, rngs={"dropout": jax.random.key(0)})
    clean = module.apply(variables, x)
    dropped = np.asarray(y == 0)
    close(np.where(dropped, 0, y)[:, :30], np.where(dropped, 0, clean / 0.75)[:, :30])
    assert abs(dropped[:, :30].mean() - 0.25) < 0.02 and dropped[:, 30:].all()


def test_initial_scores_do_not_depend_on_the_scale_of_attention():
    options = {"features": 64, "num_heads": 4, "init_std": "fan_in"}
    for scale, std in ((None, 64**-0.5), (1.0, (64 * 16) ** -0.5)):
        module = Attention(BlockConfig(attention_scale=scale, **options))
        x = jnp.ones((1, 2, 64))
        init = module.init(jax.random.key(0), x, method=lambda m, x: m(x, m.keys_values(x)))
        kernels = {name: np.std(layer["kernel"]) for name, layer in init["params"].items()}
        expected = {"query": std} | dict.fromkeys(("key", "value", "output"), 64**-0.5)
        assert kernels == pytest.approx(expected, rel=0.05)


def test_initial_logits_of_tied_embeddings_have_variance_one():
    module = t5_small(500, num_layers=1, features=64, num_heads=4, output_scale=64**-0.5)
    table = module.init(jax.random.key(0), SOURCE, TARGET)["params"]["embedding"]["token"]
    assert np.std(table["embedding"]) == pytest.approx(1, rel=0.05)
    logits = module.init_with_output(jax.random.key(0), SOURCE, TARGET)[0]
    assert np.std(logits) == pytest.approx(1, rel=0.1)


def test_one_rate_of_dropout_is_that_of_all_places():
    options = t5_small(dropout_rate=0.3, mlp_dropout_rate=0.0).config
    assert options.attention_dropout_rate == options.output_dropout_rate == 0.3
    assert options.dropout_rate == 0.3 and options.mlp_dropout_rate == 0


def test_logits_of_a_head_of_its_own_have_the_dtype_of_the_output():
    module = GATED.clone(precision=Precision(compute=jnp.bfloat16))
    _, logits = shapes_of(module, SOURCE, TARGET)
    assert logits.shape == (3, 5, 11) and logits.dtype == jnp.float32


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TransformerTranslator(11, output_scale=0.0), "output_scale is 0.0"),
        (lambda: TransformerTranslator(11, output_scale=float("nan")), "output_scale is nan"),
        (lambda: config(attention_scale=-1.0), "attention_scale is -1.0"),
        (lambda: config(init_std="fan_out"), "init_std is 'fan_out'"),
        (lambda: config(num_relative_buckets=0), "num_relative_buckets=0"),
        (lambda: config(max_relative_distance=0), "max_relative_distance=0"),
        (lambda: config(mlp_dropout_rate=1.0), "1.0"),
        (lambda: config(output_dropout_rate=-0.1), "-0.1"),
        (
            lambda: shapes_of(t5_small(11, **SMALL | {"num_relative_buckets": 2}), SOURCE, TARGET),
            "1 buckets do not fit distances up to 5",
        ),
    ],
)
def test_a_wrong_option_is_refused_with_its_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()
