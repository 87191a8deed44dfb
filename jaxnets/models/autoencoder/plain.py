"""Autoencoders: the plain one, and with it every model and function of the family.

The variational one is defined in `variational_autoencoder`, the one of discrete codes in
`vector_quantization`, what can be done with a trained one in `latent_space`; they are given here
too, so that this one module names the whole family.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnets.checks import check_sizes
from jaxnets.core import Precision, record
from jaxnets.functional.activations import Activation, activation
from jaxnets.layers import Dense
from jaxnets.models.autoencoder.encoder_decoder import Decoder, Encoder, EncoderDecoderConfig
from jaxnets.objectives.likelihoods import (
    Likelihood,
    SquaredError,
)


class AutoencoderOutput(NamedTuple):
    """What an autoencoder returns.

    Attributes:
        outputs: [batch, height, width, channels * numbers], for the likelihood to read.
        code: [batch, latent_size].
    """

    outputs: jax.Array
    code: jax.Array


class Autoencoder(nn.Module):
    """An autoencoder: an image squeezed into a few numbers, and back.

    With fewer numbers than pixels it is undercomplete; with a penalty on the code
    (`sparse_reconstruction`, `contractive`) or `num_active` it may have more.

    Attributes:
        config: what encoder and decoder look like.
        latent_size: size of the code.
        likelihood: what the outputs mean.
        tied: the decoder's matrices are the transposes of the encoder's (dense, without a norm).
        code_activation: name or element-wise function, on the code.
        num_active: of each code only the so many largest numbers are kept, the others become 0:
            the k-sparse autoencoder; None keeps all.
        precision: dtypes.

    Raises:
        ValueError: a field is out of range.

    Example:
        >>> module = Autoencoder(EncoderDecoderConfig((8, 8, 1), features=(32,)), latent_size=4)
        >>> images = jnp.ones((2, 8, 8, 1))
        >>> variables = module.init(jax.random.key(0), images)
        >>> outputs, code = module.apply(variables, images)
        >>> outputs.shape, code.shape
        ((2, 8, 8, 1), (2, 4))

    References:
        Hinton and Salakhutdinov 2006, Science 313; Makhzani and Frey 2013, arXiv:1312.5663
        (k-sparse). Differs from it: as many numbers are kept in evaluation as in training.
    """

    config: EncoderDecoderConfig
    latent_size: int = 32
    likelihood: Likelihood = SquaredError()
    tied: bool = False
    code_activation: Activation = "identity"
    num_active: int | None = None
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        check_sizes(latent_size=self.latent_size)
        activation(self.code_activation)
        if self.num_active is not None and not 1 <= self.num_active <= self.latent_size:
            raise ValueError(
                f"num_active is {self.num_active}; give 1 to latent_size, {self.latent_size}"
            )
        if self.tied and (self.config.kind != "dense" or self.config.norm is not None):
            raise ValueError(
                f"tied weights with kind={self.config.kind!r} and norm={self.config.norm!r}; they "
                "need dense layers and no norm"
            )
        if self.tied and self.likelihood.num_parameters != 1:
            raise ValueError(
                f"tied weights give one number for each pixel and {self.likelihood} needs "
                f"{self.likelihood.num_parameters}; choose another likelihood or tied=False"
            )
        super().__post_init__()

    def setup(self) -> None:
        config, policy = self.config, self.precision
        self.encoder = Encoder(config, policy)
        self.code = Dense(self.latent_size, kernel_init=config.linear_init, precision=policy)
        self.decoder = Decoder(config, self.likelihood.num_parameters, policy)

    def __call__(self, inputs: jax.Array, *, train: bool = False) -> AutoencoderOutput:
        """Encode and decode images [batch, height, width, channels]; records "features".

        Args:
            inputs: images of the size that the config names.
            train: training mode.

        Returns:
            AutoencoderOutput.

        Raises:
            ValueError: images of another size.
        """
        code = self.encode(inputs, train=train)
        record(self, "features", code)
        return AutoencoderOutput(self.decode(code, train=train), code)

    def encode(
        self, images: jax.Array, labels: jax.Array | None = None, *, train: bool = False
    ) -> jax.Array:
        """Map [batch, height, width, channels] to codes [batch, latent_size].

        Raises:
            ValueError: images of another size, or labels, which this network does not take.
        """
        _refuse_labels(self, labels)
        x = self.encoder(images, train=train)
        code = activation(self.code_activation)(self.code(x.reshape(x.shape[0], -1)))
        code = code if self.num_active is None else keep_largest(code, self.num_active)
        return code.astype(self.precision.output)

    def decode(
        self, code: jax.Array, labels: jax.Array | None = None, *, train: bool = False
    ) -> jax.Array:
        """Map codes [batch, latent_size] to the outputs [batch, height, width, ...].

        Raises:
            ValueError: codes of another size, or labels, which this network does not take.
        """
        _refuse_labels(self, labels)
        if code.ndim != 2 or code.shape[1] != self.latent_size:
            raise ValueError(
                f"codes of shape {code.shape} do not fit latent_size {self.latent_size}; give "
                f"[batch, {self.latent_size}]"
            )
        kernels = None
        if self.tied:
            depths = reversed(range(len(self.config.features)))
            layers = [self.encoder.variables["params"][f"hidden_{index}"] for index in depths]
            kernels = [layer["kernel"] for layer in (self.code.variables["params"], *layers)]
        return self.decoder(code, kernels, train=train)

    def score(self, images: jax.Array, labels: jax.Array | None = None) -> jax.Array:
        """Return the reconstruction loss of each image, [batch]."""
        return self.likelihood.losses(self.decode(self.encode(images, labels)), images)


def keep_largest(code: jax.Array, num_kept: int) -> jax.Array:
    """Set all but the largest numbers of each code to 0.

    Args:
        code: [batch, numbers].
        num_kept: how many stay; of equals at the border all do.

    Returns:
        [batch, numbers].

    Example:
        >>> keep_largest(jnp.array([[3.0, -4.0, 1.0, 2.0]]), 2).tolist()
        [[3.0, 0.0, 0.0, 2.0]]
    """
    least = jax.lax.top_k(code, num_kept)[0][:, -1:]
    return jnp.where(code >= least, code, jnp.zeros_like(code))


def _refuse_labels(module: nn.Module, labels: jax.Array | None) -> None:
    if labels is not None:
        raise ValueError(
            f"{type(module).__name__} takes no labels; leave them out, or use VAE(num_classes=...)"
        )
