"""The autoencoder of discrete codes, whose codebook is a moving average of what it stands for."""

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
from jaxnets.models.autoencoder.encoder_decoder import Decoder, Encoder, EncoderDecoderConfig
from jaxnets.objectives.likelihoods import Likelihood, SquaredError

# Of the mean share; the first batch outweighs it, and a code that it does not use is dead.
_FIRST_SHARE = 1e-3


class Quantized(NamedTuple):
    """What an autoencoder of discrete codes returns.

    Attributes:
        outputs: [batch, height, width, channels * numbers], for the likelihood to read.
        vectors: of the encoder, [batch, rows, columns, embedding_size].
        nearest: the code vectors that stand for them, likewise; no gradient passes.
        codes: the numbers of the code vectors, int32 [batch, rows, columns].
    """

    outputs: jax.Array
    vectors: jax.Array
    nearest: jax.Array
    codes: jax.Array


class VectorQuantizer(nn.Module):
    """Replace each vector by the nearest one of a codebook.

    The codebook is no parameter but the collection "codebook" of the model state: the share of
    the vectors that each code stands for, and the sum of these vectors over all vectors, as
    exponential moving averages; a code vector is their quotient. In training they move after the
    codes are chosen. A code whose share falls below `restart_below` of the mean share is dead and
    starts again as a random vector of the batch; stream "codebook". So do, at the first batch of
    training, all codes that it does not use: at the start they are standard normal, wherever the
    vectors are, and their shares next to nothing.

    As batch normalization, it sees one microbatch at a time; over devices the sums are those of
    the whole batch.

    Attributes:
        codebook_size: number of codes.
        decay: weight of the past in the moving averages, in [0, 1).
        restart_below: share of the mean share under which a code is dead; 0 restarts none.
        precision: dtypes; distances and averages are float32 or wider.

    Raises:
        ValueError: a field is out of range.

    References:
        van den Oord et al. 2017, arXiv:1711.00937, appendix A.1; Dhariwal et al. 2020,
        arXiv:2005.00341, section 3.1 (restarts). Differs from the former: shares instead of
        counts, so that the averages do not depend on the size of the batch.
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
        """Map vectors [batch, ..., size] to the nearest code vectors and their numbers.

        Args:
            vectors: what to quantize.
            weights: [batch], 0 = padding, which does not move the codebook.
            train: the codebook moves.

        Returns:
            Code vectors [batch, ..., size], through which no gradient passes, and int32
            [batch, ...].

        Raises:
            ValueError: in training, fewer vectors in the batch than codes.
        """
        num_codes, size = self.codebook_size, vectors.shape[-1]
        kept = jnp.promote_types(self.precision.parameter, jnp.float32)

        def start() -> jax.Array:
            return first * jax.random.normal(self.make_rng("params"), (num_codes, size), kept)

        first = _FIRST_SHARE / num_codes
        shares = self.variable("codebook", "shares", jnp.full, (num_codes,), first, kept)
        sums = self.variable("codebook", "sums", start)
        table = sums.value / shares.value[:, None]
        rows = at_least_float32(lax.stop_gradient(vectors)).reshape(-1, size)
        # A GPU's or TPU's default precision would take near codes for one another.
        distances = (
            jnp.sum(jnp.square(rows), axis=1, keepdims=True)
            - 2 * jnp.matmul(rows, table.T, precision=lax.Precision.HIGHEST)
            + jnp.sum(jnp.square(table), axis=1)[None]
        )
        codes = jnp.argmin(distances, axis=1).astype(jnp.int32)
        nearest = table[codes].reshape(vectors.shape).astype(vectors.dtype)
        if train and not self.is_initializing():
            repeats = len(rows) // len(vectors)
            row_weights = jnp.ones(len(vectors), kept) if weights is None else weights.astype(kept)
            row_weights = jnp.repeat(row_weights, repeats)
            shares.value, sums.value = self._moved(
                shares.value, sums.value, rows, codes, row_weights
            )
        return nearest, codes.reshape(vectors.shape[:-1])

    def _moved(
        self,
        shares: jax.Array,
        sums: jax.Array,
        rows: jax.Array,
        codes: jax.Array,
        weights: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Return the averages after the vectors `rows` [vectors, size] of this batch."""
        axis, num_codes = bound_data_axis(), self.codebook_size
        num_devices = 1 if axis is None else lax.axis_size(axis)
        if len(rows) * num_devices < num_codes:
            raise ValueError(
                f"a codebook of {num_codes} codes is bigger than the {len(rows) * num_devices} "
                "vectors of a batch; give a smaller codebook_size or bigger batches"
            )
        chosen = jax.nn.one_hot(codes, num_codes, dtype=rows.dtype) * weights[:, None]
        rows = jnp.where(weights[:, None] > 0, rows, 0)  # padding may be NaN
        totals = jnp.matmul(chosen.T, rows, precision=lax.Precision.HIGHEST)
        counts, everything = jnp.sum(chosen, axis=0), jnp.sum(weights)
        # Each device offers the candidates of its own codes, drawn among its vectors.
        index = 0 if axis is None else lax.axis_index(axis)
        own = (jnp.arange(num_codes) % num_devices == index) & (everything > 0)
        picks = jax.random.choice(
            self.make_rng("codebook"), len(rows), (num_codes,), p=weights, replace=True
        )
        candidates = jnp.where(own[:, None], rows[picks], jnp.zeros_like(rows[picks]))
        offered = own.astype(rows.dtype)
        if axis is not None:
            counts, totals, everything, candidates, offered = lax.psum(
                (counts, totals, everything, candidates, offered), axis
            )
        # A batch that is padding only moves nothing.
        step = jnp.where(everything > 0, 1 - self.decay, 0.0).astype(shares.dtype)
        divisor = jnp.where(everything > 0, everything, jnp.ones_like(everything))
        new_shares = shares + step * (counts / divisor - shares)
        new_sums = sums + step * (totals / divisor - sums)
        dead = (new_shares < self.restart_below / num_codes) & (offered > 0)
        # A young code is given the mean share, so that it lives until it is used.
        new_shares = jnp.where(dead, 1 / num_codes, new_shares)
        new_sums = jnp.where(dead[:, None], candidates / num_codes, new_sums)
        return new_shares.astype(shares.dtype), new_sums.astype(sums.dtype)


class VQVAE(nn.Module):
    """An autoencoder whose code is a map of entries of a codebook.

    Gradients pass from the decoder's input straight to the encoder's output, as if nothing had
    been replaced.

    Attributes:
        config: what encoder and decoder look like; convolutional.
        codebook_size: number of codes; `check_codebook` compares it with a data set.
        embedding_size: size of the code vectors.
        likelihood: what the outputs mean.
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
                f"VQVAE with kind={self.config.kind!r}; its code is a map, give "
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

        Records "features", the vectors of the encoder.

        Args:
            inputs: images of the size that the config names.
            weights: [batch], 0 = padding, which does not move the codebook.
            train: training mode: the codebook moves.

        Returns:
            Quantized.

        Raises:
            ValueError: images of another size; in training, a codebook that is bigger than the
                number of vectors of the batch.
        """
        vectors = self.encode(inputs, train=train)
        record(self, "features", vectors)
        nearest, codes = self.quantizer(vectors, weights, train=train)
        straight = vectors + lax.stop_gradient(nearest - vectors)
        return Quantized(self.decoder(straight, train=train), vectors, nearest, codes)

    def encode(
        self, images: jax.Array, labels: jax.Array | None = None, *, train: bool = False
    ) -> jax.Array:
        """Map images to vectors [batch, rows, columns, embedding_size], not yet quantized.

        Raises:
            ValueError: images of another size, or labels, which this network does not take.
        """
        _refuse_labels(labels)
        return self.embed(self.encoder(images, train=train)).astype(self.precision.output)

    def quantize(self, vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the nearest code vectors, of the shape of `vectors`, and their numbers."""
        self._check_map(vectors)
        return self.quantizer(vectors)

    def decode(self, code: jax.Array, labels: jax.Array | None = None) -> jax.Array:
        """Quantize vectors [batch, rows, columns, embedding_size] and decode them to outputs.

        Raises:
            ValueError: vectors of another shape, or labels, which this network does not take.
        """
        _refuse_labels(labels)
        return self.decoder(self.quantize(code)[0])

    def score(self, images: jax.Array, labels: jax.Array | None = None) -> jax.Array:
        """Return the reconstruction loss of each image, [batch]."""
        return self.likelihood.losses(self.decode(self.encode(images, labels)), images)

    def _check_map(self, vectors: jax.Array) -> None:
        expected = (*self.config.code_shape[:2], self.embedding_size)
        if vectors.ndim != 4 or vectors.shape[1:] != expected:
            raise ValueError(
                f"codes of shape {vectors.shape} do not fit this VQVAE; give "
                f"[batch, {', '.join(map(str, expected))}]"
            )


def check_codebook(codebook_size: int, config: EncoderDecoderConfig, num_images: int) -> None:
    """Refuse a codebook that has more codes than a data set has vectors.

    Args:
        codebook_size: number of codes.
        config: of the autoencoder.
        num_images: of the data set.

    Raises:
        ValueError: both numbers.
    """
    vectors = num_images * math.prod(config.code_shape[:-1])
    if codebook_size > vectors:
        raise ValueError(
            f"a codebook of {codebook_size} codes is bigger than the data: {num_images} images "
            f"have {vectors} vectors; give a smaller codebook_size"
        )


def _refuse_labels(labels: jax.Array | None) -> None:
    if labels is not None:
        raise ValueError("VQVAE takes no labels; leave them out, or use VAE(num_classes=...)")
