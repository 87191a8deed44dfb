"""What stands in front of the blocks: vectors of tokens, of positions and of segments."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnets.checks import check_rank
from jaxnets.core import Precision
from jaxnets.functional.attention.positions import sinusoidal_positions
from jaxnets.functional.lengths import clear_padding, clear_tokens
from jaxnets.layers import Dropout, Embedding
from jaxnets.models.transformer.block import make_norm
from jaxnets.models.transformer.config import BlockConfig


class PositionEmbedding(nn.Module):
    """Add the vector of each position; the kinds that live inside the attention add nothing.

    Attributes:
        config: with the kind of positions.
        max_length: number of learned vectors.
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
            positions: integer [batch or 1, time]; by default 0, 1, 2, ... Where there is no
                learned vector the result is NaN.

        Raises:
            ValueError: more steps than learned vectors.
        """
        time, policy = x.shape[1], self.precision
        if self.config.positions == "sinusoidal":
            where = jnp.arange(time)[None] if positions is None else positions
            wide = jnp.promote_types(policy.compute, jnp.float32)
            vectors = sinusoidal_positions(where, self.config.features, dtype=wide)
        elif self.config.positions == "learned":
            shape = (self.max_length, self.config.features)
            init = nn.initializers.normal(self.config.init_std or 0.02)
            table = self.param("embedding", init, shape, policy.parameter)
            if time > self.max_length:
                raise ValueError(
                    f"a sequence of {time} steps is longer than the {self.max_length} learned "
                    "positions; cut it, or build the network with a larger max_length"
                )
            if positions is None:
                vectors = table[None, :time]
            else:
                vectors = table.at[positions].get(mode="fill", fill_value=jnp.nan)
        else:
            return x
        return x + vectors.astype(x.dtype)


class InputEmbedding(nn.Module):
    """Turn tokens into the sum of the vectors of token, position and segment.

    With sinusoidal positions the vectors of the tokens start with variance 1 / features and are
    multiplied by sqrt(features), or the positions would drown them (Vaswani et al. 2017,
    arXiv:1706.03762, section 3.4).

    Attributes:
        vocabulary_size: number of tokens.
        config: the blocks' options.
        max_length: number of learned positions.
        num_segments: number of kinds of text that are told apart; 0 tells none.
        norm: normalize the sum, as BERT does.
        precision: dtypes.
    """

    vocabulary_size: int
    config: BlockConfig
    max_length: int
    num_segments: int = 0
    norm: bool = False
    precision: Precision = Precision()

    def setup(self) -> None:
        config, policy = self.config, self.precision
        init = nn.initializers.normal(config.init_std or 0.02)
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
        check_rank(tokens, self, layouts=["[batch, time]"])
        if not tokens.shape[1]:
            raise ValueError(f"tokens of shape {tokens.shape} hold none; give at least 1")
        if segments is not None and not self.num_segments:
            raise ValueError("segments for a network that has none; build it with num_segments")
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
        """Refuse a history of more tokens than there are learned positions.

        Raises:
            ValueError: the capacity and the number of positions.
        """
        if self.config.positions == "learned" and capacity > self.max_length:
            raise ValueError(
                f"a capacity of {capacity} tokens exceeds the {self.max_length} learned positions; "
                "generate less, or build the network with a larger max_length"
            )

    def attend(self, x: jax.Array) -> jax.Array:
        """Map [..., features] to logits [..., vocabulary_size], with the vectors of the tokens."""
        return self.token.attend(x)

    def _scale(self) -> float:
        return self.config.features**0.5 if self.config.positions == "sinusoidal" else 1.0
