"""The plain autoencoder: undercomplete, tied, sparse or k-sparse."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnets.checks import check_sizes
from jaxnets.core import Precision, record
from jaxnets.functional.activations import Activation, activation
from jaxnets.layers import Dense
from jaxnets.models.autoencoder.encoder_decoder import (
    Decoder,
    Encoder,
    EncoderDecoderConfig,
    check_code,
    refuse_labels,
)
from jaxnets.objectives.likelihoods import Likelihood, SquaredError


class AutoencoderOutput(NamedTuple):
    """The output of `Autoencoder`.

    Attributes:
        outputs: parameters of the likelihood, [batch, height, width, channels * num_parameters].
        code: [batch, latent_size].
    """

    outputs: jax.Array
    code: jax.Array


class Autoencoder(nn.Module):
    """An autoencoder: encode an image to a code, and decode the code to the image.

    With a code smaller than the image it is undercomplete. A penalty on the code
    (`sparse_reconstruction`, `contractive`) or `num_active` allows overcomplete codes.

    Attributes:
        config: layers of encoder and decoder.
        latent_size: dimension of the code.
        likelihood: interpretation of the outputs.
        tied: the decoder's kernels are the transposes of the encoder's (dense, without a norm).
        code_activation: name or elementwise function, applied to the code.
        num_active: k of the k-sparse autoencoder: all but the k largest entries of each code become
            0; None keeps all.
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
        (k-sparse). Differs from the latter: k is the same in evaluation as in training.
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
                f"tied weights give one output for each pixel and {self.likelihood} needs "
                f"{self.likelihood.num_parameters}; choose another likelihood or tied=False"
            )
        super().__post_init__()

    def setup(self) -> None:
        config, policy = self.config, self.precision
        self.encoder = Encoder(config, policy)
        self.code = Dense(self.latent_size, kernel_init=config.linear_init, precision=policy)
        self.decoder = Decoder(config, self.likelihood.num_parameters, policy)

    def __call__(
        self, inputs: jax.Array, *, train: bool = False, weights: jax.Array | None = None
    ) -> AutoencoderOutput:
        """Encode and decode images [batch, height, width, channels]; records "features".

        Args:
            inputs: images of the config's `image_shape`.
            train: training mode.
            weights: [batch], 0 = padding, for the batch norms in training.

        Returns:
            AutoencoderOutput.

        Raises:
            ValueError: images of another size.
        """
        code = self.encode(inputs, train=train, weights=weights)
        record(self, "features", code)
        return AutoencoderOutput(self.decode(code, train=train, weights=weights), code)

    def encode(
        self,
        images: jax.Array,
        labels: jax.Array | None = None,
        *,
        train: bool = False,
        weights: jax.Array | None = None,
    ) -> jax.Array:
        """Map [batch, height, width, channels] to codes [batch, latent_size].

        `train` and `weights` are those of a call.

        Raises:
            ValueError: images of another size, or labels, which are not supported.
        """
        refuse_labels(self, labels)
        x = self.encoder(images, train=train, weights=weights)
        x = x.reshape(x.shape[0], -1)  # [batch, prod(config.code_shape)]
        code = activation(self.code_activation)(self.code(x))
        code = code if self.num_active is None else keep_largest(code, self.num_active)
        return code.astype(self.precision.output)

    def decode(
        self,
        code: jax.Array,
        labels: jax.Array | None = None,
        *,
        train: bool = False,
        weights: jax.Array | None = None,
    ) -> jax.Array:
        """Map codes [batch, latent_size] to outputs [batch, height, width, channels * parameters].

        `train` and `weights` are those of a call; `likelihood.mean` makes images of the outputs.

        Raises:
            ValueError: codes of another size, or labels, which are not supported.
        """
        refuse_labels(self, labels)
        check_code(code, self.latent_size)
        kernels = None
        if self.tied:
            depths = reversed(range(len(self.config.features)))
            layers = [self.encoder.variables["params"][f"hidden_{index}"] for index in depths]
            kernels = [layer["kernel"] for layer in (self.code.variables["params"], *layers)]
        return self.decoder(code, kernels, train=train, weights=weights)

    def score(self, images: jax.Array, labels: jax.Array | None = None) -> jax.Array:
        """Return the reconstruction loss of each image, [batch], as of `likelihood.losses`."""
        return self.likelihood.losses(self.decode(self.encode(images, labels)), images)


def keep_largest(code: jax.Array, num_kept: int) -> jax.Array:
    """Set all but the `num_kept` largest entries of each code to 0.

    Args:
        code: [batch, latent_size].
        num_kept: entries to keep; more in case of ties.

    Returns:
        [batch, latent_size].

    Example:
        >>> keep_largest(jnp.array([[3.0, -4.0, 1.0, 2.0]]), 2).tolist()
        [[3.0, 0.0, 0.0, 2.0]]
    """
    least = jax.lax.top_k(code, num_kept)[0][:, -1:]
    return jnp.where(code >= least, code, jnp.zeros_like(code))
