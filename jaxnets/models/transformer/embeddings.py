"""Input embeddings: token, position and segment."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnets.checks import check_rank
from jaxnets.core import Precision, at_least_int32
from jaxnets.functional.attention.positions import sinusoidal_positions
from jaxnets.functional.lengths import clear_padding, clear_tokens
from jaxnets.layers import Dropout, Embedding
from jaxnets.layers.embedding import check_token_type
from jaxnets.layers.parameters import parameter
from jaxnets.models.transformer.block import make_norm
from jaxnets.models.transformer.config import BlockConfig


class InputEmbedding(nn.Module):
    """Map tokens to the sum of their token, position and segment embeddings.

    With sinusoidal positions the token embeddings start with variance 1 / features and are
    multiplied by sqrt(features), which brings both terms to the same scale (Vaswani et al. 2017,
    arXiv:1706.03762, section 3.4).

    Attributes:
        vocabulary_size: number of tokens.
        config: the blocks' options.
        max_length: number of learned positions.
        num_segments: number of segment (token type) embeddings, as in BERT; 0 has none.
        norm: normalize the sum, as in BERT.
        scaled: multiply the token embeddings by sqrt(features), rounded to the compute dtype, and
            let them start smaller, also without sinusoidal positions.
        precision: dtypes.
    """

    vocabulary_size: int
    config: BlockConfig
    max_length: int
    num_segments: int = 0
    norm: bool = False
    scaled: bool = False
    precision: Precision = Precision()

    def setup(self) -> None:
        config, policy = self.config, self.precision
        init = config.embedding_init()
        scaled = nn.initializers.normal(config.features**-0.5) if self._scale() != 1 else init
        self.token = Embedding(self.vocabulary_size, config.features, scaled, policy)
        self.position = PositionEmbedding(config, self.max_length, policy)
        if self.num_segments:
            self.segment = Embedding(self.num_segments, config.features, init, policy)
        if self.norm:
            self.embedding_norm = make_norm(config, policy)
        self.dropout = Dropout(config.dropout_rate)

    def __call__(
        self,
        tokens: jax.Array,
        lengths: jax.Array | None = None,
        *,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Map integer [batch, time] to [batch, time, features], 0 beyond the lengths.

        Args:
            tokens: ids; beyond the lengths they may be anything.
            lengths: integer [batch]; by default all tokens count.
            segments: integer [batch, time]; by default all 0.
            positions: integer [batch or 1, time]; by default 0, 1, 2, ...
            train: training mode.

        Raises:
            ValueError: tokens, segments or lengths that do not fit.
        """
        check_token_type(tokens)
        check_rank(tokens, self, layouts=["[batch, time]"])
        if not tokens.shape[1]:
            raise ValueError(f"tokens of shape {tokens.shape} have no token; give at least 1")
        if segments is not None and not self.num_segments:
            raise ValueError(
                "segments for a network without segment embeddings; build it with num_segments"
            )
        if segments is not None and segments.shape != tokens.shape:
            raise ValueError(
                f"segments of shape {segments.shape} do not fit tokens of shape {tokens.shape}; "
                "give one for each token"
            )
        if self.num_segments and segments is None:
            segments = jnp.zeros(tokens.shape, jnp.int32)
        x = self.token(clear_tokens(tokens, lengths))
        if self._scale() != 1:
            x = x * self._scale()
        x = self.position(x, positions)
        if segments is not None:
            x = x + self.segment(clear_tokens(segments, lengths))
        if self.norm:
            x = self.embedding_norm(x)
        x = self.dropout(x, train=train)
        return clear_padding(x, lengths)[0]

    def check_capacity(self, capacity: int) -> None:
        """Check that a cache is no longer than the learned positions.

        Raises:
            ValueError: a capacity beyond the learned positions.
        """
        if self.config.positions == "learned" and capacity > self.max_length:
            raise ValueError(
                f"a capacity of {capacity} tokens exceeds the {self.max_length} learned positions; "
                "generate less, or build the network with a larger max_length"
            )

    def attend(self, x: jax.Array) -> jax.Array:
        """Map [..., features] to logits [..., vocabulary_size], by the (tied) token embeddings."""
        return self.token.attend(x)

    def _scale(self) -> float:
        scaled = self.scaled or self.config.positions == "sinusoidal"
        return self.config.features**0.5 if scaled else 1.0


class PositionEmbedding(nn.Module):
    """Add the learned or sinusoidal embedding of each position; other kinds add nothing.

    Attributes:
        config: the blocks' options, whose `positions` name the kind.
        max_length: number of learned positions.
        precision: dtypes.
    """

    config: BlockConfig
    max_length: int
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        """Map [batch, time, features] to the same shape.

        Args:
            x: the steps.
            positions: integer [batch or 1, time]; by default 0, 1, 2, ... Outside of the learned
                positions the result is NaN.

        Raises:
            ValueError: more steps than learned positions.
        """
        time, policy = x.shape[1], self.precision
        if self.config.positions == "sinusoidal":
            positions = jnp.arange(time)[None] if positions is None else positions
            wide = jnp.promote_types(policy.compute, jnp.float32)
            embedded = sinusoidal_positions(positions, self.config.features, dtype=wide)
        elif self.config.positions == "learned":
            shape = (self.max_length, self.config.features)
            init = self.config.embedding_init()
            table = parameter(self, "embedding", init, shape, policy.parameter, inputs=x.shape)
            if time > self.max_length:
                raise ValueError(
                    f"a sequence of {time} steps is longer than the {self.max_length} learned "
                    "positions; cut it, or build the network with a larger max_length"
                )
            if positions is None:
                embedded = table[None, :time]
            else:
                positions = at_least_int32(positions)
                inside = (positions >= 0) & (positions < self.max_length)
                embedded = table[jnp.where(inside, positions, 0)]
                embedded = jnp.where(inside[..., None], embedded, jnp.nan)
        else:
            return x
        return x + embedded.astype(x.dtype)  # + [batch or 1, time, features]
