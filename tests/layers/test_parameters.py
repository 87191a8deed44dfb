"""Parameters of networks that were initialized for inputs of another size."""

import jax
import jax.numpy as jnp
import pytest

from jaxnets.layers import BatchNorm, Convolution, Dense, LayerNorm, RMSNorm, Upsampling
from jaxnets.models.convolutional import ConvNet
from jaxnets.models.feedforward import MLP, MLPMixer
from jaxnets.models.gan import DCGANDiscriminator
from jaxnets.models.recurrent import SequenceClassifier
from jaxnets.models.transformer import BlockConfig, Stack, VisionTransformer

SMALL = BlockConfig(features=8, num_heads=2)
NETWORKS = {
    "mlp": (MLP((4,), 2), (8, 8, 1), (9, 9, 1), r"hidden_0/kernel has shape \(64, 4\)"),
    "mixer": (MLPMixer(4, 8, 1), (8, 8, 1), (12, 8, 1), "block_0/token_in/kernel"),
    "convnet": (ConvNet((4,), hidden_features=(3,)), (8, 8, 1), (12, 12, 1), "hidden_0/kernel"),
    "channels": (
        ConvNet((4,), hidden_features=(3,)),
        (8, 8, 1),
        (8, 8, 3),
        r"conv_0/kernel .* \(3, 3, 1, 4\)",
    ),
    "vit": (VisionTransformer(2, 4, 1, SMALL), (8, 8, 1), (12, 8, 1), "position/embedding"),
    "gan": (DCGANDiscriminator(2), (8, 8, 1), (16, 16, 1), "conv_2/kernel does not exist"),
    "recurrent": (SequenceClassifier(2), (5, 3), (5, 4), "recurrent/forward_0/input_kernel"),
    "stack": (Stack(SMALL, 1), (3, 8), (3, 12), "layer_0/attention_norm/scale"),
    "dense": (Dense(3), (4,), (5,), r"kernel has shape \(4, 3\), but inputs of shape \(2, 5\)"),
    "upsampling": (Upsampling(3), (4, 4, 1), (4, 4, 2), "kernel"),
    "batch norm": (BatchNorm(), (4,), (5,), "scale"),
    "layer norm": (LayerNorm(), (4,), (5,), "scale"),
    "rms norm": (RMSNorm(), (4,), (5,), "scale"),
    "convolution": (Convolution(3), (4, 1), (4, 2), "kernel"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_inputs_of_another_size_than_at_initialization_are_refused(name):
    module, shape, other, message = NETWORKS[name]

    def run(key, x, y):
        return module.apply(module.init(key, x), y)

    arrays = jnp.zeros((2, *shape)), jnp.zeros((2, *other))
    with pytest.raises(ValueError, match=f"{message}.*give inputs of the size"):
        jax.eval_shape(run, jax.random.key(0), *arrays)
