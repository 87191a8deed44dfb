"""Token embeddings: a table of vectors, which may be tied to the output projection."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnets import functional
from jaxnets.checks import check_sizes
from jaxnets.core import (
    Precision,
    at_least_float32,
    at_least_int32,
    drawn_in_float32,
    known_values,
)
from jaxnets.functional.lowering.partitioning import split_rows, whole_vectors
from jaxnets.layers.linear import Initializer


def check_tokens(tokens: jax.Array, vocabulary_size: int) -> None:
    """Refuse token ids that are no integers or, where they are concrete, outside the vocabulary.

    Args:
        tokens: integer [...].
        vocabulary_size: number of tokens.

    Raises:
        ValueError: another dtype, or the first id outside the vocabulary.
    """
    check_token_type(tokens)
    ids = known_values(tokens)
    if ids is None:
        return
    wrong = ids[(ids < 0) | (ids >= vocabulary_size)]
    if wrong.size:
        raise ValueError(
            f"token id {wrong[0]} is outside the vocabulary of {vocabulary_size}; "
            "encode the text with the tokenizer that the network was built for"
        )


def check_token_type(tokens: jax.Array) -> None:
    """Refuse tokens that are no integers.

    Raises:
        ValueError: naming shape and type, and what takes floats.
    """
    shape, dtype = jnp.shape(tokens), jnp.result_type(tokens)
    if not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(
            f"tokens of shape {shape} have type {dtype}; give integers, such as a tokenizer's ids. "
            "Networks of floats [batch, time, channels] are AudioTransformer, SequenceClassifier "
            "and SpeechRecognizer, and the layers transformer.Stack and recurrent.Recurrent"
        )


class Embedding(nn.Module):
    """Look up a vector per token.

    Corresponds to `flax.linen.Embed` and `torch.nn.Embedding`. Differs in the initializer, a normal
    distribution of standard deviation 0.02 in place of 1 / sqrt(features) (Flax) or 1 (torch), and
    in that Flax takes negative ids from the end of the table.

    Attributes:
        vocabulary_size: number of tokens.
        features: size of the vectors.
        embedding_init: initializer of the table.
        precision: dtypes of parameters and result.

    Raises:
        ValueError: a size below 1.

    References:
        Press and Wolf 2017, arXiv:1608.05859 (one table for input and output).
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
            "embedding", drawn_in_float32(self.embedding_init), shape, self.precision.parameter
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Map integer [...] to [..., features] in the compute dtype.

        An id outside the vocabulary that is known only at run time gives NaN, so that training
        stops instead of taking it for another token.

        Raises:
            ValueError: ids that are no integers, or concrete ids outside the vocabulary.
        """
        check_tokens(tokens, self.vocabulary_size)
        # Gathered in float32, because the gradient of a gather adds up in its dtype: in bfloat16 a
        # token that occurs 10,000 times would get a gradient of 256.
        table = whole_vectors(at_least_float32(self.embedding))
        tokens = at_least_int32(jnp.asarray(tokens))
        outside = (tokens < 0) | (tokens >= self.vocabulary_size)
        vectors = table[jnp.where(outside, 0, tokens)].astype(self.precision.compute)
        vectors = jnp.where(outside[..., None], jnp.asarray(jnp.nan, vectors.dtype), vectors)
        return split_rows(vectors)

    def attend(self, x: jax.Array) -> jax.Array:
        """Map [..., features] to logits [..., vocabulary_size], tied to the same table."""
        compute = self.precision.compute
        table = self.embedding.astype(compute)
        return split_rows(functional.transposed_linear(x.astype(compute), table))
