"""Position encodings: sinusoidal, rotary (RoPE), ALiBi and relative position buckets.

Positions are integers [batch or 1, time]; biases broadcast against [batch, heads, queries, keys].
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.checks import check_sizes
from jaxnets.core import at_least_float32
from jaxnets.functional.attention.masks import check_positions, distances


def sinusoidal_positions(
    positions: jax.Array, features: int, *, dtype: jax.typing.DTypeLike = jnp.float32
) -> jax.Array:
    """Encode each position as sines and cosines of decreasing frequency.

    sin(position / 10000^(2i / features)) at 2i, the cosine at 2i + 1.

    Args:
        positions: integer [...].
        features: size of an encoding, even.
        dtype: of the result, float32 or wider.

    Returns:
        [..., features].

    Raises:
        ValueError: a number of features that is odd or not above 0.

    Example:
        >>> sinusoidal_positions(jnp.arange(1), 4).tolist()
        [[0.0, 1.0, 0.0, 1.0]]

    References:
        Vaswani et al. 2017, arXiv:1706.03762, section 3.5.
    """
    angles = _angles(positions, features, 10_000.0, dtype)
    pairs = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1)  # [..., features / 2, 2]
    return pairs.reshape(*angles.shape[:-1], -1)  # [..., features]


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Divide all frequencies of rotary positions by a factor, as if positions were closer.

    Attributes:
        factor: of the context length, at least 1.

    Raises:
        ValueError: a field is out of range.

    References:
        Chen et al. 2023, arXiv:2306.15595, equation 4.
    """

    factor: float

    def __post_init__(self) -> None:
        _check_factor(self.factor)

    @property
    def attention_factor(self) -> float:
        """Factor of the rotated queries and keys."""
        return 1.0

    def frequencies(self, features: int, theta: float) -> np.ndarray:
        """Return the scaled frequencies.

        Args:
            features: number of rotated features, even.
            theta: base of the frequencies before they are scaled, theta^(-2 i / features).

        Returns:
            [features / 2], in radians a position.
        """
        return _frequencies(features, theta) / self.factor


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Divide only the low frequencies of rotary positions by a factor (Llama 3).

    A frequency counts as high if it has `high_frequency_factor` or more periods in the original
    context, as low with at most `low_frequency_factor`; between them the two are mixed linearly in
    the number of periods.

    Attributes:
        factor: of the low frequencies, at least 1.
        original_length: context length of the training before.
        low_frequency_factor: periods in the original context.
        high_frequency_factor: periods in the original context, more than `low_frequency_factor`.

    Raises:
        ValueError: a field is out of range.

    References:
        Grattafiori et al. 2024, arXiv:2407.21783, section 3.4.2, and the code of Llama 3.1.
    """

    factor: float
    original_length: int = 8192
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        check_sizes(original_length=self.original_length)
        low, high = self.low_frequency_factor, self.high_frequency_factor
        if not 0 < low < high < math.inf:
            raise ValueError(
                f"low_frequency_factor is {low} and high_frequency_factor {high}; give positive "
                "numbers, the second one greater"
            )

    @property
    def attention_factor(self) -> float:
        """Factor of the rotated queries and keys."""
        return 1.0

    def frequencies(self, features: int, theta: float) -> np.ndarray:
        """Return the scaled frequencies.

        Args:
            features: number of rotated features, even.
            theta: base of the frequencies before they are scaled, theta^(-2 i / features).

        Returns:
            [features / 2], in radians a position.
        """
        original = _frequencies(features, theta)
        periods = self.original_length * original / (2 * math.pi)
        low, high = self.low_frequency_factor, self.high_frequency_factor
        unscaled = np.clip((periods - low) / (high - low), 0, 1)
        return original * (unscaled + (1 - unscaled) / self.factor)


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """Divide the low frequencies of rotary positions by a factor and sharpen the softmax (YaRN).

    Frequencies with `beta_fast` or more periods in the original context are left, those with at
    most `beta_slow` are divided; between them the two are mixed linearly in the index of the
    frequency. Queries and keys are multiplied by `attention_factor`.

    Attributes:
        factor: of the context length, at least 1.
        original_length: context length of the training before.
        beta_fast: periods in the original context, more than `beta_slow`.
        beta_slow: periods in the original context.
        attention_scaling: factor of queries and keys; by default 0.1 log(factor) + 1.
        truncate: round the ends of the mixed range outwards to whole indices.

    Raises:
        ValueError: a field is out of range.

    Example:
        >>> round(YarnScaling(factor=4.0, original_length=32_768).attention_factor, 4)
        1.1386

    References:
        Peng et al. 2023, arXiv:2309.00071, section 3.2 and equation 22, and their published code.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_scaling: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        check_sizes(original_length=self.original_length)
        if not 0 < self.beta_slow < self.beta_fast < math.inf:
            raise ValueError(
                f"beta_slow is {self.beta_slow} and beta_fast {self.beta_fast}; give positive "
                "numbers, the second one greater"
            )
        if self.attention_scaling is not None and not 0 < self.attention_scaling < math.inf:
            raise ValueError(
                f"attention_scaling is {self.attention_scaling}; give a positive number"
            )

    @property
    def attention_factor(self) -> float:
        """Factor of the rotated queries and keys."""
        if self.attention_scaling is not None:
            return self.attention_scaling
        return 0.1 * math.log(self.factor) + 1

    def frequencies(self, features: int, theta: float) -> np.ndarray:
        """Return the scaled frequencies.

        Args:
            features: number of rotated features, even.
            theta: base of the frequencies before they are scaled, theta^(-2 i / features).

        Returns:
            [features / 2], in radians a position.
        """
        original = _frequencies(features, theta)
        # The index at which a frequency has so many periods in the original context.
        first, last = (
            features * math.log(self.original_length / (2 * math.pi * beta)) / (2 * math.log(theta))
            for beta in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, features - 1)
        width = last - first if last != first else 0.001  # as their code has it
        scaled = np.clip((np.arange(features // 2) - first) / width, 0, 1)
        return original * (1 - scaled + scaled / self.factor)


#: How rotary positions are stretched to contexts longer than those of the first training.
RopeScaling: TypeAlias = LinearScaling | Llama3Scaling | YarnScaling


def rotary(
    x: jax.Array,
    positions: jax.Array,
    *,
    theta: float = 10_000.0,
    scaling: RopeScaling | None = None,
) -> jax.Array:
    """Rotate pairs of features by angles proportional to the position (RoPE).

    The dot product of two rotated vectors depends only on the distance of their positions. Feature
    i is paired with feature i + head_dim / 2, as in GPT-NeoX and the published LLaMA checkpoints.

    Args:
        x: queries or keys, [batch, time, heads, head_dim], head_dim even.
        positions: integer [batch or 1, time].
        theta: base of the frequencies; the slowest pair rotates by about 1 / theta a position.
        scaling: changes the frequencies, for contexts longer than those of the first training.

    Returns:
        Shape and dtype of `x`.

    Raises:
        ValueError: an odd head_dim, or shapes or types that do not fit.

    References:
        Su et al. 2021, arXiv:2104.09864, section 3.2 (which pairs neighbors).
    """
    if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"queries or keys of shape {x.shape} and type {x.dtype} do not fit; give floats "
            "[batch, time, heads, head_dim]"
        )
    positions = check_positions(positions)
    if positions.shape not in ((1, x.shape[1]), x.shape[:2]):
        raise ValueError(
            f"positions of shape {positions.shape} do not fit queries or keys of shape {x.shape}; "
            "give [batch or 1, time]"
        )
    wide = at_least_float32(x)
    angles = _angles(positions, x.shape[-1], theta, wide.dtype, scaling)
    angles = angles[:, :, None]  # [batch or 1, time, 1, head_dim / 2]
    sine, cosine = jnp.sin(angles), jnp.cos(angles)
    if scaling is not None and scaling.attention_factor != 1:
        sine, cosine = scaling.attention_factor * sine, scaling.attention_factor * cosine
    first, second = jnp.split(wide, 2, axis=-1)
    rotated = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def alibi_slopes(num_heads: int) -> list[float]:
    """Return the factor of the distance in `alibi_bias`, head by head.

    For a power of two the slopes are 2^(-8/n), 2^(-16/n), ..., 2^-8. Otherwise they are those
    of the next lower power of two, then every second slope of the next higher one.

    Args:
        num_heads: number of heads.

    Returns:
        One slope for each head.

    Raises:
        ValueError: a number of heads that is not above 0.

    Example:
        >>> alibi_slopes(2), alibi_slopes(3)
        ([0.0625, 0.00390625], [0.0625, 0.00390625, 0.25])

    References:
        Press, Smith and Lewis 2022, arXiv:2108.12409, section 3 and their published code.
    """
    check_sizes(num_heads=num_heads)
    below = 2 ** int(math.log2(num_heads))
    slopes = [2.0 ** (-8 * (index + 1) / below) for index in range(below)]
    between = [2.0 ** (-4 * (2 * index + 1) / below) for index in range(num_heads - below)]
    return slopes + between


def alibi_bias(
    num_heads: int,
    queries: int | jax.Array,
    keys: jax.Array | None = None,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """Penalize each key by its distance from the query, times the slope of the head.

    Args:
        num_heads: number of heads.
        queries: positions, integer [batch or 1, queries]; or the length of a sequence.
        keys: positions, integer [batch or 1, keys]; by default those of the queries.
        dtype: of the result, float32 or wider.

    Returns:
        [batch or 1, heads, queries, keys]: -slope |query - key|.

    Raises:
        ValueError: positions of another shape or type, or a number of heads that is not above 0.

    Example:
        >>> alibi_bias(2, 3)[0, 0].tolist()[2][:2]
        [-0.125, -0.0625]
    """
    slopes = jnp.asarray(alibi_slopes(num_heads), dtype)[None, :, None, None]
    return -slopes * jnp.abs(distances(queries, keys)).astype(dtype)


def relative_buckets(
    queries: int | jax.Array,
    keys: jax.Array | None = None,
    *,
    bidirectional: bool,
    num_buckets: int = 32,
    max_distance: int = 128,
) -> jax.Array:
    """Assign the distances from queries to keys to buckets, as T5 does.

    Half the buckets hold one distance each; the others widen logarithmically up to
    `max_distance`, and the last one holds all beyond. If bidirectional, earlier and later keys
    have half of the buckets each; otherwise a later key counts as distance 0.

    Args:
        queries: positions, integer [batch or 1, queries]; or the length of a sequence.
        keys: positions, integer [batch or 1, keys]; by default those of the queries.
        bidirectional: use other buckets for later keys than for earlier ones.
        num_buckets: number of buckets.
        max_distance: from this distance on all keys are in the last bucket.

    Returns:
        int32 [batch or 1, queries, keys] in [0, num_buckets).

    Raises:
        ValueError: positions of another shape or type, fewer than 2 buckets in a direction, or
            more of them than twice `max_distance`.

    Example:
        >>> relative_buckets(3, bidirectional=True, num_buckets=8)[0].tolist()
        [[0, 5, 6], [1, 0, 5], [2, 1, 0]]

    References:
        Raffel et al. 2020, arXiv:1910.10683, section 2.1 and their published code.
    """
    distance = distances(queries, keys)[:, 0]  # [batch or 1, queries, keys]
    per_side = num_buckets // 2 if bidirectional else num_buckets
    magnitude = jnp.abs(distance) if bidirectional else jnp.maximum(distance, 0)
    later = _bucket_starts(per_side, max_distance)[None, None, None, 1:]
    begun = magnitude[..., None] >= later  # [batch or 1, queries, keys, buckets - 1]
    buckets = jnp.sum(begun, axis=-1, dtype=jnp.int32)  # [batch or 1, queries, keys]
    return buckets + jnp.where(distance < 0, per_side, 0).astype(jnp.int32) * bidirectional


@functools.cache
def _bucket_starts(num_buckets: int, max_distance: int) -> np.ndarray:
    """Return the smallest distance in each bucket, [num_buckets]."""
    exact = num_buckets // 2
    if not 0 < exact < max_distance:
        raise ValueError(
            f"{num_buckets} buckets do not fit distances up to {max_distance}; give at least 2 "
            "buckets in each direction, and fewer than twice the greatest distance"
        )
    wide = np.arange(num_buckets - exact) / (num_buckets - exact)
    starts = exact * (max_distance / exact) ** wide
    # Without the epsilon a start that is an integer depends on rounding.
    starts = np.ceil(starts * (1 - 1e-10))
    return np.minimum([*range(exact), *starts], np.iinfo(np.int32).max).astype(np.int32)


def _check_factor(factor: float) -> None:
    if not 1 <= factor < math.inf:  # NaN too
        raise ValueError(f"factor is {factor}; give a number of 1 or more")


def _frequencies(features: int, theta: float) -> np.ndarray:
    """Return theta^(-2i / features), [features / 2]."""
    return theta ** (-np.arange(0, features, 2) / features)


def _angles(
    positions: jax.Array,
    features: int,
    theta: float,
    dtype: jax.typing.DTypeLike,
    scaling: RopeScaling | None = None,
) -> jax.Array:
    """Return position / theta^(2i / features), or with scaled frequencies, [..., features / 2]."""
    check_sizes(features=features)
    if features % 2:
        raise ValueError(
            f"{features} features do not form pairs; sines and cosines need an even number"
        )
    scaled = (
        _frequencies(features, theta) if scaling is None else scaling.frequencies(features, theta)
    )
    frequencies = jnp.asarray(scaled, dtype)
    positions = jnp.asarray(positions).astype(dtype)[..., None]
    return positions * frequencies.reshape((1,) * (positions.ndim - 1) + frequencies.shape)
