"""A convolutional network that learns tiny images in few passes, on whitened patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnets.checks import IMAGES, check_rank, check_sizes
from jaxnets.core import Precision, record
from jaxnets.functional.activations import Activation, activation
from jaxnets.functional.channels import along_channels
from jaxnets.functional.conv.convolution import convolution
from jaxnets.functional.pooling import max_pool
from jaxnets.layers import BatchNorm, Convolution, Dense


def whitening_kernel(images: jax.Array, *, side: int = 2, epsilon: float = 5e-4) -> jax.Array:
    """Compute the kernel that maps the patches of images to uncorrelated numbers of variance 1.

    The eigenvectors of the patches' covariance, each divided by the root of its eigenvalue; the
    second half of the features are the first half negated, so that nothing is lost behind a
    rectifier.

    Args:
        images: [batch, height, width, channels], scaled as the network will see them. A few
            thousand are enough.
        side: height and width of the patches.
        epsilon: added to the eigenvalues, which bounds how much faint patterns are amplified.

    Returns:
        Kernel [side, side, channels, 2 * side * side * channels], float32.

    Raises:
        ValueError: a side below 1; the images are no [batch, height, width, channels] of that
            side or more.

    References:
        Page 2018, "How to train your ResNet", part 8; Jordan 2024, arXiv:2404.00498, section 3.2.

    Example:
        >>> images = jax.random.normal(jax.random.key(0), (64, 8, 8, 1))
        >>> y = convolution(images, whitening_kernel(images), padding="VALID")
        >>> covariance = jnp.cov(y[..., :4].reshape(-1, 4).T)
        >>> bool(jnp.all(jnp.abs(covariance - jnp.eye(4)) < 0.01))
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
    patches = jnp.concatenate(shifted, axis=-1).reshape(-1, side**2 * channels)
    eigenvalues, vectors = jnp.linalg.eigh(jnp.cov(patches.astype(jnp.float32).T))
    kernel = (vectors / jnp.sqrt(eigenvalues + epsilon)[None]).reshape(side, side, channels, -1)
    return jnp.concatenate([kernel, -kernel], axis=-1)


class WhitenedConvNet(nn.Module):
    """Whitened patches, then blocks of convolutions with a pool behind the first of each.

    A convolution with a fixed kernel, `whitening_kernel` of the training images, then for each
    width a block: convolution, 2x2 max pool, batch norm, activation, and further convolutions,
    each with batch norm and activation; then the maximum over all positions and a linear layer,
    scaled down. Convolutions start by passing their inputs on. In blocks of three or more
    convolutions what the first has given is added in front of the last activation.

    The fixed kernel is no parameter. It lies in the collection "whitening", is random after
    `init`, and is set by `set_whitening_kernel`.

    Attributes:
        features: channels of each block.
        num_outputs: size of the output.
        depth: convolutions of each block.
        patch: height and width of the patches that are whitened.
        logit_scale: factor on the output.
        momentum: weight of the past in the running averages of the norms; training is short.
        activation: name or element-wise function.
        precision: dtypes.

    References:
        Jordan 2024, "94% on CIFAR-10 in 3.29 seconds on a single GPU", arXiv:2404.00498; blocks of
        three convolutions are those of its 96%.
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
    def __call__(self, inputs: jax.Array, *, train: bool = False) -> jax.Array:
        """Map [batch, height, width, channels] to [batch, num_outputs]; records "features"."""
        check_rank(inputs, self, layouts=IMAGES)
        smallest = 2 ** len(self.features) + self.patch - 1
        if min(inputs.shape[1:3]) < smallest:
            raise ValueError(
                f"images of {inputs.shape[1:3]} are too small for {len(self.features)} blocks, "
                f"which need {smallest} a side; use fewer features"
            )
        policy, act = self.precision, activation(self.activation)

        def normed_convolution(x: jax.Array, width: int, name: str, *, pool: bool) -> jax.Array:
            x = Convolution(
                width,
                use_bias=False,
                kernel_init=_passing_on,
                precision=policy,
                name=f"{name}_conv",
            )(x)
            x = max_pool(x, 2) if pool else x
            norm = BatchNorm(momentum=self.momentum, precision=policy, name=f"{name}_norm")
            return norm(x, train=train)

        x = act(self._whiten(inputs.astype(policy.compute)))
        for block, width in enumerate(self.features):
            x = first = act(normed_convolution(x, width, f"block_{block}_1", pool=True))
            for number in range(2, self.depth + 1):
                x = normed_convolution(x, width, f"block_{block}_{number}", pool=False)
                x = act(x + first if number == self.depth > 2 else x)
        x = max_pool(x, x.shape[1:-1]).reshape(x.shape[0], -1)
        record(self, "features", x)
        head = Dense(self.num_outputs, use_bias=False, precision=policy, name="head")
        return (self.logit_scale * head(x)).astype(policy.output)

    def _whiten(self, x: jax.Array) -> jax.Array:
        policy, side, channels = self.precision, self.patch, x.shape[-1]
        shape = (side, side, channels, 2 * side**2 * channels)

        def unset() -> jax.Array:
            return nn.initializers.lecun_normal()(self.make_rng("params"), shape, policy.parameter)

        kernel = self.variable("whitening", "kernel", unset).value
        bias = self.param("bias", nn.initializers.zeros, shape[-1:], policy.parameter)
        y = convolution(x, kernel.astype(policy.compute), padding="VALID")
        return y + along_channels(bias.astype(policy.compute), y)


def set_whitening_kernel(variables: Mapping[str, Any], images: jax.Array) -> dict[str, Any]:
    """Set the fixed kernel of a `WhitenedConvNet`.

    Args:
        variables: as given by its `init`.
        images: see `whitening_kernel`.

    Returns:
        The variables with the kernel that whitens these images.

    Raises:
        ValueError: the variables are of another network, or the images have other channels.
    """
    if "whitening" not in variables:
        raise ValueError(
            f"the variables hold {', '.join(variables)}, and no 'whitening'; give those of a "
            "WhitenedConvNet"
        )
    old = variables["whitening"]["kernel"]
    new = whitening_kernel(images, side=len(old))
    if old.shape != new.shape:
        raise ValueError(
            f"images of {images.shape[-1]} channels whiten by a kernel {new.shape}, but the "
            f"network was initialized with one of {old.shape}; give images of the same channels"
        )
    return {**variables, "whitening": {"kernel": new.astype(old.dtype)}}


def _passing_on(key: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
    """Draw a kernel whose first outputs are its inputs (Jordan 2024, section 3.3)."""
    kernel = nn.initializers.he_uniform()(key, shape, dtype) / jnp.sqrt(6).astype(dtype)
    middle = tuple(size // 2 for size in shape[:-2])
    copied = min(shape[-2:])
    return kernel.at[(*middle, slice(None), slice(copied))].set(
        jnp.eye(shape[-2], copied, dtype=dtype)
    )
