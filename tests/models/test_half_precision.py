"""Parameters and noise in 16 bits are those of float32, rounded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnets as jn
from jaxnets.core import Precision

IMAGES, SERIES, TOKENS = jnp.ones((1, 8, 8, 3)), jnp.ones((1, 3, 4)), jnp.ones((1, 4), jnp.int32)
NETWORKS = {
    "mlp": (lambda p: jn.MLP((16,), precision=p), IMAGES),
    "conv_net": (lambda p: jn.ConvNet((4,), norm="batch", precision=p), IMAGES),
    "whitened": (lambda p: jn.WhitenedConvNet((4, 6), precision=p), IMAGES),
    "lstm": (lambda p: jn.recurrent.SequenceClassifier(3, 8, precision=p), SERIES),
    "attention_decoder": (lambda p: jn.recurrent.RecurrentTranslator(9, 7, 8, precision=p), TOKENS),
    "transformer": (
        lambda p: jn.TransformerLM(
            20,
            num_layers=1,
            max_length=4,
            config=jn.BlockConfig(features=8, num_heads=2, positions="learned"),
            precision=p,
        ),
        TOKENS,
    ),
    "vae": (
        lambda p: jn.VAE(
            jn.EncoderDecoderConfig((8, 8, 3), features=(6,)), latent_size=2, precision=p
        ),
        IMAGES,
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_initial_parameters_of_16_bits_are_those_of_float32_rounded(name):
    make, inputs = NETWORKS[name]
    streams = {"params": jax.random.key(0), "latent": jax.random.key(1)}

    def initial(dtype):
        module = make(Precision(dtype))
        inputs_of_both = [inputs, inputs] if name == "attention_decoder" else [inputs]
        return jax.jit(module.init)(streams, *inputs_of_both)["params"]

    half, full = initial(jnp.bfloat16), initial(jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), full)
    jax.tree.map(np.testing.assert_array_equal, half, rounded)
