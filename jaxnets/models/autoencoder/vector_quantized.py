"""The vector-quantized autoencoder, whose codebook is updated by moving averages."""

from __future__ import annotations

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxnets.checks import check_sizes
from jaxnets.core import Precision, at_least_float32, bound_data_axis, record
from jaxnets.layers import Convolution
from jaxnets.models.autoencoder.encoder_decoder import (
    Decoder,
    Encoder,
    EncoderDecoderConfig,
    refuse_labels,
)
from jaxnets.objectives.likelihoods import Likelihood, SquaredError

# Relative to the mean share: the first batch outweighs it, and leaves unused codes dead.
_FIRST_SHARE = 1e-3


class Quantized(NamedTuple):
    """The output of `VQVAE`.

    Attributes:
        outputs: parameters of the likelihood, [batch, height, width, channels * num_parameters].
        vectors: the encoder's output, [batch, rows, columns, embedding_size].
        nearest: the nearest code vectors, same shape, without gradient.
        codes: the indices of the code vectors, int32 [batch, rows, columns].
    """

    outputs: jax.Array
    vectors: jax.Array
    nearest: jax.Array
    codes: jax.Array


class VectorQuantizer(nn.Module):
    """Replace each vector by the nearest one of a codebook.

    The codebook is the collection "codebook" of the model state, not a parameter. It holds two
    exponential moving averages for each code: "shares", the fraction of vectors assigned to it, and
    "sums", the sum of the assigned vectors divided by the number of all vectors. A code vector is
    sums / shares. In training the averages are updated after the assignment.

    A code whose share falls below `restart_below` times the mean share is dead: it restarts as a
    random vector of the batch, stream "codebook". Codes are initialized as standard normal vectors
    with tiny shares, so the first training batch restarts every code that it does not use.

    As in batch normalization, the statistics are those of one microbatch; over devices they are
    reduced to those of the whole batch.

    Attributes:
        codebook_size: number of codes.
        decay: decay of the moving averages, in [0, 1).
        restart_below: fraction of the mean share below which a code is dead; 0 restarts none.
        precision: dtypes; distances and averages are float32 or wider.

    Raises:
        ValueError: a field is out of range.

    References:
        van den Oord et al. 2017, arXiv:1711.00937, appendix A.1; Dhariwal et al. 2020,
        arXiv:2005.00341, section 3.1 (restarts). Differs from the former: shares instead of
        counts, so that the averages do not depend on the batch size.
    """

    codebook_size: int
    decay: float = 0.99
    restart_below: float = 0.1
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        check_sizes(codebook_size=self.codebook_size)
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay is {self.decay}; give a number in [0, 1)")
        if not 0 <= self.restart_below < 1:
            raise ValueError(f"restart_below is {self.restart_below}; give a number in [0, 1)")
        super().__post_init__()

    @nn.compact
    def __call__(
        self, vectors: jax.Array, weights: jax.Array | None = None, *, train: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Map vectors [batch, ..., features] to the nearest code vectors and their indices.

        Args:
            vectors: to be quantized.
            weights: [batch], 0 = padding, which does not update the codebook.
            train: training mode: the codebook is updated.

        Returns:
            Code vectors [batch, ..., features] without gradient, and indices int32 [batch, ...].

        Raises:
            ValueError: in training, fewer vectors in the batch than codes.
        """
        num_codes, features = self.codebook_size, vectors.shape[-1]
        dtype = jnp.promote_types(self.precision.parameter, jnp.float32)
        first_share = _FIRST_SHARE / num_codes

        def initial_sums() -> jax.Array:
            shape = (num_codes, features)
            return first_share * jax.random.normal(self.make_rng("params"), shape, dtype)

        shares = self.variable("codebook", "shares", jnp.full, (num_codes,), first_share, dtype)
        sums = self.variable("codebook", "sums", initial_sums)
        table = sums.value / shares.value[:, None]  # [codes, features]
        rows = at_least_float32(lax.stop_gradient(vectors)).reshape(-1, features)
        # The default matmul precision of GPUs and TPUs would confuse close codes.
        distances = (
            jnp.sum(jnp.square(rows), axis=1, keepdims=True)
            - 2 * jnp.matmul(rows, table.T, precision=lax.Precision.HIGHEST)
            + jnp.sum(jnp.square(table), axis=1)[None]
        )
        codes = jnp.argmin(distances, axis=1).astype(jnp.int32)
        nearest = table[codes].reshape(vectors.shape).astype(vectors.dtype)
        if train and not self.is_initializing():
            if weights is None:
                weights = jnp.ones(len(vectors), dtype)
            row_weights = jnp.repeat(weights.astype(dtype), len(rows) // len(vectors))
            shares.value, sums.value = self._updated(
                shares.value, sums.value, rows, codes, row_weights
            )
        return nearest, codes.reshape(vectors.shape[:-1])

    def _updated(
        self,
        shares: jax.Array,
        sums: jax.Array,
        rows: jax.Array,
        codes: jax.Array,
        weights: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Return shares and sums updated by `rows` [vectors, features], weighted [vectors]."""
        axis, num_codes = bound_data_axis(), self.codebook_size
        num_devices = 1 if axis is None else lax.axis_size(axis)
        if len(rows) * num_devices < num_codes:
            raise ValueError(
                f"a codebook of {num_codes} codes is bigger than the {len(rows) * num_devices} "
                "vectors of a batch; give a smaller codebook_size or bigger batches"
            )
        # [vectors, codes]
        assigned = jax.nn.one_hot(codes, num_codes, dtype=rows.dtype) * weights[:, None]
        rows = jnp.where(weights[:, None] > 0, rows, 0)  # padding may be NaN
        totals = jnp.matmul(assigned.T, rows, precision=lax.Precision.HIGHEST)  # [codes, features]
        counts, total_weight = jnp.sum(assigned, axis=0), jnp.sum(weights)
        # The codes are partitioned over devices; each draws candidates from its own vectors.
        index = 0 if axis is None else lax.axis_index(axis)
        own = (jnp.arange(num_codes) % num_devices == index) & (total_weight > 0)
        picks = jax.random.choice(
            self.make_rng("codebook"), len(rows), (num_codes,), p=weights, replace=True
        )
        candidates = jnp.where(own[:, None], rows[picks], jnp.zeros_like(rows[picks]))
        offered = own.astype(rows.dtype)
        if axis is not None:
            counts, totals, total_weight, candidates, offered = lax.psum(
                (counts, totals, total_weight, candidates, offered), axis
            )
        # A batch of padding only updates nothing.
        step = jnp.where(total_weight > 0, 1 - self.decay, 0.0).astype(shares.dtype)
        denominator = jnp.where(total_weight > 0, total_weight, jnp.ones_like(total_weight))
        new_shares = shares + step * (counts / denominator - shares)
        new_sums = sums + step * (totals / denominator - sums)
        dead = (new_shares < self.restart_below / num_codes) & (offered > 0)
        # A restarted code gets the mean share, so that it is not dead again before it is used.
        new_shares = jnp.where(dead, 1 / num_codes, new_shares)
        new_sums = jnp.where(dead[:, None], candidates / num_codes, new_sums)
        return new_shares.astype(shares.dtype), new_sums.astype(sums.dtype)


class VQVAE(nn.Module):
    """A vector-quantized autoencoder: its code is a feature map of codebook entries.

    The straight-through estimator copies gradients from the decoder's input to the encoder's
    output.

    Attributes:
        config: layers of encoder and decoder; convolutional.
        codebook_size: number of codes; `check_codebook` compares it with a data set.
        embedding_size: dimension of the code vectors.
        likelihood: interpretation of the outputs.
        decay: as in `VectorQuantizer`.
        restart_below: as in `VectorQuantizer`.
        precision: dtypes.

    Raises:
        ValueError: a field is out of range.

    Example:
        >>> config = EncoderDecoderConfig((8, 8, 1), "convolutional", (8, 16))
        >>> module = VQVAE(config, codebook_size=8, embedding_size=4)
        >>> images = jnp.ones((3, 8, 8, 1))
        >>> variables = module.init(jax.random.key(0), images)
        >>> module.apply(variables, images).codes.shape
        (3, 2, 2)

    References:
        van den Oord et al. 2017, arXiv:1711.00937.
    """

    config: EncoderDecoderConfig
    codebook_size: int = 512
    embedding_size: int = 64
    likelihood: Likelihood = SquaredError()
    decay: float = 0.99
    restart_below: float = 0.1
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        check_sizes(codebook_size=self.codebook_size, embedding_size=self.embedding_size)
        if self.config.kind != "convolutional":
            raise ValueError(
                f"VQVAE with kind={self.config.kind!r}; its code is a feature map, give "
                "EncoderDecoderConfig(kind='convolutional')"
            )
        super().__post_init__()

    def setup(self) -> None:
        config, policy = self.config, self.precision
        self.encoder = Encoder(config, policy)
        self.embed = Convolution(
            self.embedding_size, 1, kernel_init=config.linear_init, precision=policy
        )
        self.quantizer = VectorQuantizer(
            self.codebook_size, self.decay, self.restart_below, precision=policy
        )
        self.decoder = Decoder(config, self.likelihood.num_parameters, policy)

    def __call__(
        self, inputs: jax.Array, weights: jax.Array | None = None, *, train: bool = False
    ) -> Quantized:
        """Encode, quantize and decode images [batch, height, width, channels].

        Records "features", the encoder's output.

        Args:
            inputs: images of the config's `image_shape`.
            weights: [batch], 0 = padding, which does not update the codebook nor count in batch
                norms.
            train: training mode: the codebook is updated.

        Returns:
            Quantized.

        Raises:
            ValueError: images of another size; in training, a codebook larger than the number of
                vectors of the batch.
        """
        vectors = self.encode(inputs, train=train, weights=weights)
        record(self, "features", vectors)
        nearest, codes = self.quantizer(vectors, weights, train=train)
        straight_through = vectors + lax.stop_gradient(nearest - vectors)
        outputs = self.decoder(straight_through, train=train, weights=weights)
        return Quantized(outputs, vectors, nearest, codes)

    def encode(
        self,
        images: jax.Array,
        labels: jax.Array | None = None,
        *,
        train: bool = False,
        weights: jax.Array | None = None,
    ) -> jax.Array:
        """Map images to vectors before quantization, [batch, rows, columns, embedding_size].

        `train` and `weights` are those of a call.

        Raises:
            ValueError: images of another size, or labels, which are not supported.
        """
        refuse_labels(self, labels)
        return self.embed(self.encoder(images, train=train, weights=weights)).astype(
            self.precision.output
        )

    def quantize(self, vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the nearest code vectors and their indices.

        Args:
            vectors: [batch, rows, columns, embedding_size].

        Returns:
            The code vectors, shape of `vectors`, and integer indices [batch, rows, columns].

        Raises:
            ValueError: vectors of another shape.
        """
        self._check_vectors(vectors)
        return self.quantizer(vectors)

    def decode(self, code: jax.Array, labels: jax.Array | None = None) -> jax.Array:
        """Quantize vectors [batch, rows, columns, embedding_size] and decode them to outputs.

        Raises:
            ValueError: vectors of another shape, or labels, which are not supported.
        """
        refuse_labels(self, labels)
        return self.decoder(self.quantize(code)[0])

    def score(self, images: jax.Array, labels: jax.Array | None = None) -> jax.Array:
        """Return the reconstruction loss of each image, [batch], as of `likelihood.losses`."""
        return self.likelihood.losses(self.decode(self.encode(images, labels)), images)

    def _check_vectors(self, vectors: jax.Array) -> None:
        expected = (*self.config.code_shape[:2], self.embedding_size)
        if vectors.ndim != 4 or vectors.shape[1:] != expected:
            raise ValueError(
                f"codes of shape {vectors.shape} do not fit this VQVAE; give "
                f"[batch, {', '.join(map(str, expected))}]"
            )


def check_codebook(codebook_size: int, config: EncoderDecoderConfig, num_images: int) -> None:
    """Refuse a codebook with more codes than a data set has vectors.

    Args:
        codebook_size: number of codes.
        config: of the autoencoder.
        num_images: of the data set.

    Raises:
        ValueError: the numbers of codes and vectors.
    """
    vectors = num_images * math.prod(config.code_shape[:-1])
    if codebook_size > vectors:
        raise ValueError(
            f"a codebook of {codebook_size} codes is bigger than the data: {num_images} images "
            f"have {vectors} vectors; give a smaller codebook_size"
        )
