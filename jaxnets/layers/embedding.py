"""Token embeddings: a table of vectors that reads token ids, and may write logits."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxnets import functional
from jaxnets.checks import check_sizes
from jaxnets.core import Precision
from jaxnets.layers.linear import Initializer


def check_tokens(tokens: jax.Array, vocabulary_size: int) -> None:
    """Refuse token ids that are no integers or, where they are known, outside the vocabulary.

    Args:
        tokens: integer [...].
        vocabulary_size: number of tokens.

    Raises:
        ValueError: naming the first id that does not fit.
    """
    dtype = jnp.result_type(tokens)
    if not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"tokens have type {dtype}; give integers, such as a tokenizer's ids")
    if isinstance(tokens, jax.core.Tracer):
        return
    ids = np.asarray(tokens)
    wrong = ids[(ids < 0) | (ids >= vocabulary_size)]
    if wrong.size:
        raise ValueError(
            f"token id {wrong[0]} is outside the vocabulary of {vocabulary_size}; "
            "encode the text with the tokenizer that the network was built for"
        )


class Embedding(nn.Module):
    """A vector per token.

    Attributes:
        vocabulary_size: number of tokens.
        features: size of the vectors.
        embedding_init: initializer of the table.
        precision: dtypes of parameters and result.

    References:
        Press and Wolf 2017, arXiv:1608.05859 (the same table for input and output).
    """

    vocabulary_size: int
    features: int
    embedding_init: Initializer = nn.initializers.normal(0.02)
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        check_sizes(vocabulary_size=self.vocabulary_size, features=self.features)
        super().__post_init__()

    def setup(self) -> None:
        shape = (self.vocabulary_size, self.features)
        self.embedding = self.param(
            "embedding", self.embedding_init, shape, self.precision.parameter
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Map integer [...] to [..., features] in the compute dtype.

        An id outside the vocabulary that is known only when the program runs gives NaN, so that
        it stops training instead of counting as another token.

        Raises:
            ValueError: ids that are no integers, or known to be outside the vocabulary.
        """
        check_tokens(tokens, self.vocabulary_size)
        table, tokens = self.embedding.astype(self.precision.compute), jnp.asarray(tokens)
        outside = (tokens < 0) | (tokens >= self.vocabulary_size)
        vectors = table[jnp.where(outside, 0, tokens)]
        return jnp.where(outside[..., None], jnp.asarray(jnp.nan, vectors.dtype), vectors)

    def attend(self, x: jax.Array) -> jax.Array:
        """Map [..., features] to logits [..., vocabulary_size], with the same table."""
        return functional.linear(
            x.astype(self.precision.compute), self.embedding.astype(self.precision.compute).T
        )
