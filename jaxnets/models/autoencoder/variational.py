"""The variational autoencoder, optionally conditional on a class."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.checks import check_sizes
from jaxnets.core import Precision, at_least_int32, drawn_in_float32, known_values, record
from jaxnets.functional.gaussian import draw_code, normal_divergence
from jaxnets.layers import Dense
from jaxnets.models.autoencoder.encoder_decoder import (
    Decoder,
    Encoder,
    EncoderDecoderConfig,
    check_code,
)
from jaxnets.objectives.likelihoods import Bernoulli, Likelihood


class Variational(NamedTuple):
    """The output of `VAE`.

    Attributes:
        outputs: parameters of the likelihood, [batch, height, width, channels * num_parameters].
        mean: of the posterior, [batch, latent_size].
        log_variance: of the posterior, [batch, latent_size].
    """

    outputs: jax.Array
    mean: jax.Array
    log_variance: jax.Array


class VAE(nn.Module):
    """A variational autoencoder with diagonal Gaussian posteriors.

    q(z | x) = N(mean(x), diag exp(log_variance(x))), p(z) = N(0, I), and the decoder outputs the
    parameters of p(x | z). With `num_classes` encoder and decoder are conditional: the one-hot
    class is concatenated to the channels of every pixel (to the flattened image if dense), and to
    the code.

    Attributes:
        config: layers of encoder and decoder.
        latent_size: dimension of the code.
        likelihood: interpretation of the outputs, p(x | z).
        num_classes: number of classes of a conditional VAE; None for an unconditional one.
        precision: dtypes.

    Raises:
        ValueError: a field is out of range.

    Example:
        >>> module = VAE(EncoderDecoderConfig((8, 8, 1), "convolutional", (8, 16)), latent_size=2)
        >>> images = jnp.ones((3, 8, 8, 1))
        >>> outputs, mean, log_variance = module.apply(
        ...     module.init(jax.random.key(0), images), images
        ... )
        >>> outputs.shape, mean.shape, log_variance.shape
        ((3, 8, 8, 1), (3, 2), (3, 2))

    References:
        Kingma and Welling 2014, arXiv:1312.6114, appendix C; Sohn et al. 2015, "Learning
        Structured Output Representation using Deep Conditional Generative Models", NeurIPS
        (conditional). Differs from the latter: the prior does not depend on the class.
    """

    config: EncoderDecoderConfig
    latent_size: int = 20
    likelihood: Likelihood = Bernoulli()
    num_classes: int | None = None
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        check_sizes(latent_size=self.latent_size)
        if self.num_classes is not None:
            check_sizes(num_classes=self.num_classes)
        super().__post_init__()

    def setup(self) -> None:
        config, policy = self.config, self.precision
        self.encoder = Encoder(config, policy)
        shared: dict[str, Any] = {"kernel_init": config.linear_init, "precision": policy}
        self.mean = Dense(self.latent_size, **shared)
        self.log_variance = Dense(self.latent_size, **shared)
        self.decoder = Decoder(config, self.likelihood.num_parameters, policy)

    def __call__(
        self,
        inputs: jax.Array,
        labels: jax.Array | None = None,
        *,
        noise: jax.Array | None = None,
        train: bool = False,
        weights: jax.Array | None = None,
    ) -> Variational:
        """Encode images, sample a code of each, and decode it; records "features", the means.

        Args:
            inputs: images [batch, height, width, channels] of the config's `image_shape`.
            labels: integer [batch], for a conditional network.
            noise: [batch, latent_size] of the reparameterized code mean + exp(log_variance / 2)
                noise; by default drawn from the stream "latent" in training, and 0 in evaluation.
            train: training mode.
            weights: [batch], 0 = padding, for the batch norms in training.

        Returns:
            Variational.

        Raises:
            ValueError: images of another size, labels that are missing or do not fit.
        """
        mean, log_variance = self.posterior(inputs, labels, train=train, weights=weights)
        record(self, "features", mean)
        if noise is None and train:
            noise = drawn_in_float32(jax.random.normal)(
                self.make_rng("latent"), mean.shape, mean.dtype
            )
        code = mean
        if noise is not None:
            code = draw_code(mean, log_variance, noise)
        outputs = self.decode(code, labels, train=train, weights=weights)
        return Variational(outputs, mean, log_variance)

    def posterior(
        self,
        images: jax.Array,
        labels: jax.Array | None = None,
        *,
        train: bool = False,
        weights: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Map images to the mean and the log variance of their codes, each [batch, latent_size].

        The arguments are those of a call.

        Raises:
            ValueError: images of another size, labels that are missing or do not fit.
        """
        condition = self._condition(labels, images.shape[0])
        x = self.encoder(images, condition, train=train, weights=weights)
        x, dtype = x.reshape(x.shape[0], -1), self.precision.output  # [batch, features]
        return self.mean(x).astype(dtype), self.log_variance(x).astype(dtype)

    def encode(self, images: jax.Array, labels: jax.Array | None = None) -> jax.Array:
        """Map images to the means of their codes, [batch, latent_size]; raises as `posterior`."""
        return self.posterior(images, labels)[0]

    def decode(
        self,
        code: jax.Array,
        labels: jax.Array | None = None,
        *,
        train: bool = False,
        weights: jax.Array | None = None,
    ) -> jax.Array:
        """Map codes [batch, latent_size] to outputs [batch, height, width, channels * parameters].

        The other arguments are those of a call; `likelihood.mean` makes images of the outputs.

        Raises:
            ValueError: codes of another size, labels that are missing or do not fit.
        """
        check_code(code, self.latent_size)
        condition = self._condition(labels, code.shape[0])
        if condition is not None:
            code = jnp.concatenate([code, condition.astype(code.dtype)], axis=-1)
        return self.decoder(code, train=train, weights=weights)

    def score(self, images: jax.Array, labels: jax.Array | None = None) -> jax.Array:
        """Return the reconstruction loss at the mean code plus the divergence, nats [batch].

        Raises:
            ValueError: images of another size, labels that are missing or do not fit.
        """
        mean, log_variance = self.posterior(images, labels)
        losses = self.likelihood.losses(self.decode(mean, labels), images)
        return losses + jnp.sum(normal_divergence(mean, log_variance), axis=-1)

    def _condition(self, labels: jax.Array | None, num_examples: int) -> jax.Array | None:
        if self.num_classes is None:
            if labels is not None:
                raise ValueError(
                    "this VAE is not conditional and takes no labels; leave them out, or build it "
                    "with num_classes"
                )
            return None
        if labels is None:
            raise ValueError(
                f"this VAE is conditional on {self.num_classes} classes and got no labels; give "
                "one integer for each example"
            )
        return one_hot_classes(labels, self.num_classes, num_examples)


def one_hot_classes(labels: Any, num_classes: int, num_examples: int) -> jax.Array:
    """Return labels as one-hot rows, `jax.nn.one_hot` with checks.

    Args:
        labels: integer [num_examples] in [0, num_classes).
        num_classes: number of classes.
        num_examples: number of images or codes that the labels are for.

    Returns:
        [num_examples, num_classes]. In a compiled program, NaN for a label out of range, which
        stops training instead of being no class.

    Raises:
        ValueError: labels of another shape or type, or concrete labels out of range.
    """
    labels = labels if isinstance(labels, jax.Array) else np.asarray(labels)
    if labels.shape != (num_examples,) or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels of shape {labels.shape} and type {labels.dtype} do not fit {num_examples} "
            f"examples; give one integer for each, shape ({num_examples},)"
        )
    known = known_values(labels)
    if known is not None:
        wrong = known[(known < 0) | (known >= num_classes)]
        if wrong.size:
            raise ValueError(
                f"label {wrong[0]} is not in [0, {num_classes}); number the classes from 0"
            )
    labels = at_least_int32(jnp.asarray(labels))
    outside = (labels < 0) | (labels >= num_classes)
    return jnp.where(outside[:, None], jnp.nan, jax.nn.one_hot(labels, num_classes))


#: The default kernel initializer of PyTorch's linear layers and convolutions.
PYTORCH_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def vae_pytorch_example(**fields: Any) -> VAE:
    """Build the VAE of PyTorch's and Flax's examples: 652,824 parameters for 28 x 28 images.

    One hidden layer of 400 features and a code of 20; `fields` override its own. Kernels are
    initialized as in PyTorch, uniform in +-1 / sqrt(inputs), and biases with 0.

    References:
        github.com/pytorch/examples, vae/main.py; github.com/google/flax, examples/vae. Differs
        from Flax's: its hidden layer has 500 units, as in Kingma and Welling's figure 2.
    """
    preset: dict[str, Any] = {
        "config": EncoderDecoderConfig((28, 28, 1), features=(400,), kernel_init=PYTORCH_INIT),
        "latent_size": 20,
    }
    return VAE(**(preset | fields))
