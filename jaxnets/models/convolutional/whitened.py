"""The network of airbench (Jordan 2024): CIFAR-10 in a few epochs, on whitened patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnets.checks import IMAGES, check_rank, check_sizes
from jaxnets.core import Precision, drawn_in_float32, record
from jaxnets.functional.activations import Activation, activation
from jaxnets.functional.channels import along_channels
from jaxnets.functional.conv.convolution import convolution
from jaxnets.functional.pooling import max_pool
from jaxnets.layers import BatchNorm, Convolution, Dense


def whitening_kernel(images: jax.Array, *, side: int = 2, epsilon: float = 5e-4) -> jax.Array:
    """Compute the convolution kernel that whitens image patches (PCA whitening).

    The output channels are uncorrelated and of variance 1: the kernel holds the eigenvectors of the
    patches' covariance, each divided by the square root of its eigenvalue. The second half of the
    output channels is the first half negated, so that an activation such as relu loses nothing.

    Args:
        images: [batch, height, width, channels], scaled as for the network. A few thousand are
            enough.
        side: height and width of the patches.
        epsilon: added to the eigenvalues, which bounds the amplification of faint patterns.

    Returns:
        Kernel [side, side, channels, 2 * side * side * channels], float32.

    Raises:
        ValueError: `side` is below 1, or `images` is not [batch, height, width, channels] of at
            least `side` a side.

    References:
        Page 2018, "How to train your ResNet", part 8; Jordan 2024, arXiv:2404.00498, section 3.2.

    Example:
        >>> import numpy as np
        >>> images = jax.random.normal(jax.random.key(0), (64, 8, 8, 1))
        >>> y = convolution(images, whitening_kernel(images), padding="VALID")
        >>> covariance = np.cov(np.reshape(y[..., :4], (-1, 4)).T)
        >>> bool(np.all(np.abs(covariance - np.eye(4)) < 0.01))
        True
    """
    if side < 1 or images.ndim != 4 or min(images.shape[1:3]) < side:
        raise ValueError(
            f"images of shape {images.shape} have no patches of {side} x {side}; give "
            "[batch, height, width, channels] and a side from 1 to theirs"
        )
    channels = images.shape[-1]
    rows, columns = images.shape[1] - side + 1, images.shape[2] - side + 1
    shifted = [
        images[:, row : row + rows, column : column + columns]
        for row in range(side)
        for column in range(side)
    ]
    # [batch * rows * columns, side * side * channels]
    patches = jnp.concatenate(shifted, axis=-1).reshape(-1, side**2 * channels)
    eigenvalues, vectors = jnp.linalg.eigh(jnp.cov(patches.astype(jnp.float32).T))
    # [side, side, channels, side * side * channels]
    kernel = (vectors / jnp.sqrt(eigenvalues + epsilon)[None]).reshape(side, side, channels, -1)
    return jnp.concatenate([kernel, -kernel], axis=-1)


class WhitenedConvNet(nn.Module):
    """A whitening convolution, then blocks of convolutions, as in airbench94 and airbench96.

    A convolution with a fixed kernel, the `whitening_kernel` of the training images, then for each
    width a block: convolution, 2x2 max pool, batch norm, activation, and further convolutions,
    each with batch norm and activation; then global max pooling and a linear layer without bias,
    whose output is scaled down. The 3x3 convolutions start with an identity (Dirac) part. In blocks
    of three or more convolutions the output of the first is added before the last activation.

    The fixed kernel is not a parameter. It is in the collection "whitening", random after `init`,
    and set by `set_whitening_kernel`.

    Differs from the author's code: the covariance of the patches is centered, the scales of the
    batch norms are trained, and GELU is the tanh approximation.

    Attributes:
        features: channels of each block.
        num_outputs: size of the output.
        depth: convolutions of each block.
        patch: height and width of the whitened patches.
        logit_scale: factor on the logits.
        momentum: weight of the past in the running averages of the norms; low, since training is
            short.
        activation: name or element-wise function.
        precision: dtypes.

    Raises:
        ValueError: a field is out of range.

    References:
        Jordan 2024, "94% on CIFAR-10 in 3.29 seconds on a single GPU", arXiv:2404.00498; its
        network for 96% has blocks of three convolutions.
    """

    features: Sequence[int] = (64, 256, 256)
    num_outputs: int = 10
    depth: int = 2
    patch: int = 2
    logit_scale: float = 1 / 9
    momentum: float = 0.6
    activation: Activation = "gelu_tanh"
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        check_sizes(
            features=self.features,
            num_outputs=self.num_outputs,
            depth=self.depth,
            patch=self.patch,
        )
        activation(self.activation)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, inputs: jax.Array, *, train: bool = False, weights: jax.Array | None = None
    ) -> jax.Array:
        """Map images to [batch, num_outputs]; records "features".

        Args:
            inputs: [batch, height, width, channels].
            train: training mode.
            weights: [batch], 0 = padding, for the batch norms in training.

        Raises:
            ValueError: inputs of another rank, or too small for the blocks.
        """
        check_rank(inputs, self, layouts=IMAGES)
        smallest = 2 ** len(self.features) + self.patch - 1
        if min(inputs.shape[1:3]) < smallest:
            raise ValueError(
                f"images of {inputs.shape[1:3]} are too small for {len(self.features)} blocks, "
                f"which need {smallest} a side; use fewer features, and give channels last"
            )
        policy, act = self.precision, activation(self.activation)

        def convolution_and_norm(x: jax.Array, width: int, name: str, *, pool: bool) -> jax.Array:
            x = Convolution(
                width,
                use_bias=False,
                kernel_init=_dirac_uniform,
                precision=policy,
                name=f"{name}_conv",
            )(x)
            x = max_pool(x, 2) if pool else x
            norm = BatchNorm(momentum=self.momentum, precision=policy, name=f"{name}_norm")
            return norm(x, train=train, weights=weights)

        x = act(self._whiten(inputs.astype(policy.compute)))
        for block, width in enumerate(self.features):
            x = first = act(convolution_and_norm(x, width, f"block_{block}_1", pool=True))
            for number in range(2, self.depth + 1):
                x = convolution_and_norm(x, width, f"block_{block}_{number}", pool=False)
                x = act(x + first if number == self.depth > 2 else x)
        x = max_pool(x, x.shape[1:-1]).reshape(x.shape[0], -1)  # [batch, channels]
        record(self, "features", x)
        head = Dense(self.num_outputs, use_bias=False, precision=policy, name="head")
        return (self.logit_scale * head(x)).astype(policy.output)

    def _whiten(self, x: jax.Array) -> jax.Array:
        policy, side, channels = self.precision, self.patch, x.shape[-1]
        shape = (side, side, channels, 2 * side**2 * channels)
        initializer = nn.initializers.lecun_normal()

        def random_kernel() -> jax.Array:
            return drawn_in_float32(initializer)(self.make_rng("params"), shape, policy.parameter)

        kernel = self.variable("whitening", "kernel", random_kernel).value
        bias = self.param("bias", nn.initializers.zeros, shape[-1:], policy.parameter)
        y = convolution(x, kernel.astype(policy.compute), padding="VALID")
        return y + along_channels(bias.astype(policy.compute), y)


def set_whitening_kernel(variables: Mapping[str, Any], images: jax.Array) -> dict[str, Any]:
    """Set the fixed first kernel of a `WhitenedConvNet`.

    Args:
        variables: as returned by its `init`.
        images: [images, height, width, channels], as for `whitening_kernel`.

    Returns:
        The variables with the whitening kernel of these images.

    Raises:
        ValueError: the variables are of another network, or the number of channels differs.
    """
    if "whitening" not in variables:
        raise ValueError(
            f"the variables have the collections {', '.join(variables)} and no 'whitening'; give "
            "those of a WhitenedConvNet"
        )
    old = variables["whitening"]["kernel"]
    new = whitening_kernel(images, side=len(old))
    if old.shape != new.shape:
        raise ValueError(
            f"images of {images.shape[-1]} channels have a whitening kernel {new.shape}, but the "
            f"network was initialized with {old.shape}; give images with the same channels"
        )
    return {**variables, "whitening": {"kernel": new.astype(old.dtype)}}


def _dirac_uniform(key: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
    """Draw a kernel whose first output channels copy the input channels (Jordan 2024, section 3.3).

    As torch's default initialization followed by `torch.nn.init.dirac_`.
    """
    kernel = nn.initializers.he_uniform()(key, shape, dtype) / jnp.sqrt(6).astype(dtype)
    middle = tuple(size // 2 for size in shape[:-2])
    copied = min(shape[-2:])
    return kernel.at[(*middle, slice(None), slice(copied))].set(
        jnp.eye(shape[-2], copied, dtype=dtype)
    )
