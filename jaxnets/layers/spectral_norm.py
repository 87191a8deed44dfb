"""Spectral normalization: linear layers whose largest singular value is 1."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxnets.checks import check_sizes
from jaxnets.core import Precision, at_least_float32, drawn_in_float32
from jaxnets.functional.channels import along_channels
from jaxnets.layers.linear import Convolution, Dense, Initializer

# Keeps the division finite for a vector of zeros, as of a kernel of zeros.
_TINY = 1e-12


def largest_singular_value(
    matrix: jax.Array, right: jax.Array, *, num_iterations: int = 1
) -> tuple[jax.Array, jax.Array]:
    """Estimate the largest singular value of a matrix by power iteration.

    Each iteration takes v = W u / |W u|, then u = W^T v / |W^T v|; the estimate is |W u|, which
    is never above the true value.

    Args:
        matrix: W, [rows, columns].
        right: u, an estimate of the first right singular vector, [columns].
        num_iterations: 0 leaves `right` unchanged.

    Returns:
        The estimate, a scalar that is differentiable in `matrix`, and the next `right`, a constant
        for gradients.

    Example:
        >>> matrix = jnp.diag(jnp.array([3.0, 1.0]))
        >>> value, right = largest_singular_value(matrix, jnp.ones(2), num_iterations=8)
        >>> round(float(value), 4)
        3.0

    References:
        Miyato, Kataoka, Koyama and Yoshida 2018, arXiv:1802.05957, algorithm 1. Differs from the
        paper: the left vector is computed from the right one instead of being stored.
    """
    constant = lax.stop_gradient(matrix)
    right = lax.stop_gradient(right)
    for _ in range(num_iterations):
        right = _unit(constant.T @ _unit(constant @ right))
    return _length(matrix @ right), right


class SpectralNorm(nn.Module):
    """Divide the kernel of a linear layer by its largest singular value.

    The estimate of the first right singular vector lives in model_state, in the collection
    "spectral_norm"; each call in training updates it by power iteration, evaluation does not. The
    kernel of a convolution is flattened to [height x width x channels, features].

    Corresponds to `flax.linen.SpectralNorm` and `torch.nn.utils.parametrizations.spectral_norm`.
    Differs from Flax, which iterates in evaluation too, stores vector and singular value in
    "batch_stats", and has `update_stats` in place of `train`.

    Attributes:
        layer: a layer that is linear in its only parameter, built with `parent=None`:
            `Dense` or `Convolution` without a bias, or `Embedding`.
        use_bias: add a bias after the division.
        bias_init: initializer of the bias.
        num_iterations: power iterations of each call in training.
        precision: dtypes of the bias and the result.

    Raises:
        ValueError: the layer has other parameters besides its kernel.

    Example:
        >>> module = SpectralNorm(Dense(3, use_bias=False, parent=None))
        >>> variables = module.init(jax.random.key(0), jnp.ones((2, 4)))
        >>> variables["spectral_norm"]["right"].shape
        (3,)

    References:
        Miyato, Kataoka, Koyama and Yoshida 2018, arXiv:1802.05957, section 2.1.
    """

    layer: nn.Module
    use_bias: bool = False
    bias_init: Initializer = nn.initializers.zeros
    num_iterations: int = 1
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        check_sizes(num_iterations=self.num_iterations)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Apply the layer with its normalized kernel.

        Args:
            x: input of the layer, [batch, ...].
            train: advance the power iteration.

        Returns:
            [batch, ..., features], in the compute dtype.

        Raises:
            ValueError: the layer has other parameters than one kernel.
        """
        y, policy = self.layer(x), self.precision
        kernels = jax.tree.leaves(self.layer.variables["params"])
        if len(kernels) != 1:
            raise ValueError(
                f"SpectralNorm got a {type(self.layer).__name__} of {len(kernels)} parameters; "
                "give a layer with a kernel only: use_bias=False in the layer, use_bias=True here"
            )
        kernel = at_least_float32(kernels[0])
        matrix = kernel.reshape(-1, kernel.shape[-1])  # [height * width * channels, features]
        right = self.variable("spectral_norm", "right", self._initial_vector, matrix)
        updates = train and not self.is_initializing()
        iterations = self.num_iterations if updates else 0
        value, vector = largest_singular_value(matrix, right.value, num_iterations=iterations)
        if updates:
            right.value = vector
        # The layer is linear in its kernel, so dividing its output is equivalent.
        y = y / value.astype(y.dtype)
        if self.use_bias:
            bias = self.param(
                "bias", drawn_in_float32(self.bias_init), y.shape[-1:], policy.parameter
            )
            y = y + along_channels(bias.astype(y.dtype), y)
        return y.astype(policy.compute)

    def _initial_vector(self, matrix: jax.Array) -> jax.Array:
        vector = drawn_in_float32(jax.random.normal)(
            self.make_rng("params"), matrix.shape[-1:], matrix.dtype
        )
        return _unit(vector)


def linear_layer(
    x: jax.Array,
    kind: type[Dense] | type[Convolution],
    features: int,
    *,
    spectral: bool,
    train: bool,
    name: str,
    use_bias: bool = True,
    precision: Precision = Precision(),
    **fields: Any,
) -> jax.Array:
    """Apply a dense layer or a convolution, with or without spectral norm, in a compact module.

    Args:
        x: [batch, ..., channels].
        kind: `Dense` or `Convolution`.
        features: number of output channels.
        spectral: divide the kernel by its largest singular value.
        train: training mode.
        name: name of the layer's parameters.
        use_bias: add a bias.
        precision: dtypes.
        fields: further fields of the layer.

    Returns:
        [batch, ..., features] in the compute dtype.
    """
    build: dict[str, Any] = {**fields, "precision": precision}
    if not spectral:
        layer: nn.Module = kind(features, use_bias=use_bias, name=name, **build)
        return layer(x)
    layer = kind(features, use_bias=False, parent=None, **build)
    return SpectralNorm(layer, use_bias=use_bias, precision=precision, name=name)(x, train=train)


def _length(vector: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(vector)) + _TINY**2)


def _unit(vector: jax.Array) -> jax.Array:
    return vector / _length(vector)
