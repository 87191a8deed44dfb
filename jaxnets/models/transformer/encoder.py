"""Encoders with bidirectional attention: features, a classifier, masked language model (BERT)."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnets.checks import check_sizes
from jaxnets.core import Precision, at_least_float32, record
from jaxnets.functional.activations import activation
from jaxnets.functional.lengths import max_over_time, mean_over_time
from jaxnets.layers import Dense, Dropout
from jaxnets.models.transformer.block import make_norm
from jaxnets.models.transformer.config import BlockConfig, build_preset
from jaxnets.models.transformer.embeddings import InputEmbedding
from jaxnets.models.transformer.stack import Stack

#: Reduction of the features of a sentence over its tokens.
SentencePool: TypeAlias = Literal["mean", "first", "max", "mean_sqrt_length"]


class TransformerEncoder(nn.Module):
    """A bidirectional encoder: tokens to features, each attending to the whole text.

    The parameters of its subclasses (`TransformerClassifier`, `MaskedLM`) include those of the
    encoder under the same names.

    Attributes:
        vocabulary_size: number of tokens.
        num_layers: number of blocks.
        config: options of the blocks.
        max_length: number of learned positions, the longest text; no limit with other kinds.
        num_segments: number of segment (token type) embeddings, as in BERT; 0 has none.
        embedding_norm: normalize the input of the first block, as in BERT.
        precision: dtypes.

    Raises:
        ValueError: a field is out of range.

    Example:
        >>> module = TransformerEncoder(100, num_layers=2, config=BlockConfig(features=16))
        >>> tokens, lengths = jnp.zeros((3, 8), jnp.int32), jnp.array([8, 5, 1])
        >>> module.apply(module.init(jax.random.key(0), tokens), tokens, lengths).shape
        (3, 8, 16)

    References:
        Devlin et al. 2019, arXiv:1810.04805, section 3.
    """

    vocabulary_size: int
    num_layers: int = 4
    config: BlockConfig = BlockConfig()
    max_length: int = 512
    num_segments: int = 0
    embedding_norm: bool = False
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        check_sizes(vocabulary_size=self.vocabulary_size, max_length=self.max_length)
        super().__post_init__()

    def setup(self) -> None:
        self.embedding = InputEmbedding(
            self.vocabulary_size,
            self.config,
            self.max_length,
            num_segments=self.num_segments,
            norm=self.embedding_norm,
            precision=self.precision,
        )
        self.stack = Stack(self.config, self.num_layers, precision=self.precision)

    def __call__(
        self,
        tokens: jax.Array,
        lengths: jax.Array | None = None,
        *,
        segments: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Map integer [batch, time] to [batch, time, features], 0 beyond the lengths.

        Args:
            tokens: ids; those beyond the lengths may have any value.
            lengths: integer [batch] in [0, time]; by default all tokens count.
            segments: integer [batch, time] in [0, num_segments); by default all 0.
            train: training mode.

        Raises:
            ValueError: tokens, segments or lengths that do not fit.
        """
        x = self.encode(tokens, lengths, segments=segments, train=train)
        return x.astype(self.precision.output)

    def encode(
        self,
        tokens: jax.Array,
        lengths: jax.Array | None = None,
        *,
        segments: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Return [batch, time, features] in the compute dtype; otherwise like `__call__`."""
        x = self.embedding(tokens, lengths, segments=segments, train=train)
        x = self.stack(x, lengths, train=train)
        record(self, "features", x)
        return x


class TransformerClassifier(TransformerEncoder):
    """An encoder with a pooled output, such as class logits.

    Attributes:
        num_outputs: size of the output; None returns the pooled features.
        pool: "first" applies a dense layer and an activation to the first token's features (BERT's
            pooler); "mean" averages over the tokens.
        pooler_activation: of that layer: a name of `layers.activation`.

    Raises:
        ValueError: a field is out of range.

    Example:
        >>> config = BlockConfig(features=16)
        >>> module = TransformerClassifier(100, 2, config, num_outputs=2, pool="mean")
        >>> tokens, lengths = jnp.zeros((3, 8), jnp.int32), jnp.array([8, 5, 1])
        >>> module.apply(module.init(jax.random.key(0), tokens), tokens, lengths).shape
        (3, 2)
    """

    num_outputs: int | None = 2
    pool: Literal["first", "mean"] = "first"
    pooler_activation: str = "tanh"

    def __post_init__(self) -> None:
        if self.num_outputs is not None:
            check_sizes(num_outputs=self.num_outputs)
        if self.pool not in ("first", "mean"):
            raise ValueError(f"pool is {self.pool!r}; choose 'first' or 'mean'")
        activation(self.pooler_activation)
        super().__post_init__()

    def setup(self) -> None:
        super().setup()
        config, policy = self.config, self.precision
        if self.pool == "first":
            init = config.kernel_init()
            self.pooler = Dense(config.features, kernel_init=init, precision=policy)
        if self.num_outputs is not None:
            self.dropout = Dropout(config.dropout_rate)
            init = config.kernel_init()
            self.head = Dense(self.num_outputs, kernel_init=init, precision=policy)

    def __call__(
        self,
        tokens: jax.Array,
        lengths: jax.Array | None = None,
        *,
        segments: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Map integer [batch, time] to [batch, num_outputs], or [batch, features] without a head.

        Arguments and errors are those of `TransformerEncoder`; records "features" and "pooled".
        """
        x = self.encode(tokens, lengths, segments=segments, train=train)
        if self.pool == "first":
            x = activation(self.pooler_activation)(self.pooler(x[:, 0]))
        else:
            x = mean_over_time(x, lengths)
        record(self, "pooled", x)
        if self.num_outputs is not None:
            x = self.head(self.dropout(x, train=train))
        return x.astype(self.precision.output)


class SentenceEncoder(TransformerEncoder):
    """An encoder of sentences as single vectors, whose cosines tell how similar they are.

    Corresponds to `sentence_transformers.SentenceTransformer` with the modules Transformer, Pooling
    and Normalize.

    Attributes:
        pool: over the tokens: "mean"; "first" takes the first one; "max" takes the largest value
            of each feature; "mean_sqrt_length" divides the sum by the square root of the length.
        normalize: scale the vectors to length 1, so that their products are cosines.

    Raises:
        ValueError: a field is out of range.

    Example:
        >>> module = SentenceEncoder(100, num_layers=2, config=BlockConfig(features=16))
        >>> tokens, lengths = jnp.zeros((3, 8), jnp.int32), jnp.array([8, 5, 1])
        >>> vectors = module.apply(module.init(jax.random.key(0), tokens), tokens, lengths)
        >>> jnp.linalg.norm(vectors, axis=1).round(3).tolist()
        [1.0, 1.0, 1.0]

    References:
        Reimers and Gurevych 2019, arXiv:1908.10084, section 3.
    """

    pool: SentencePool = "mean"
    normalize: bool = True

    def __post_init__(self) -> None:
        if self.pool not in get_args(SentencePool):
            raise ValueError(f"pool is {self.pool!r}; choose one of {get_args(SentencePool)}")
        super().__post_init__()

    def __call__(
        self,
        tokens: jax.Array,
        lengths: jax.Array | None = None,
        *,
        segments: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Map integer [batch, time] to [batch, features], 0 for an empty sentence.

        Arguments and errors are those of `TransformerEncoder`; records "features" and "pooled".
        """
        x = self.encode(tokens, lengths, segments=segments, train=train)
        if self.pool == "first":
            x = x[:, 0]
        elif self.pool == "max":
            x = max_over_time(x, lengths)
        else:
            x = mean_over_time(x, lengths)
        if self.pool == "mean_sqrt_length":
            count = jnp.full(x.shape[0], tokens.shape[1]) if lengths is None else lengths
            x = x * jnp.sqrt(count.astype(x.dtype))[:, None]
        record(self, "pooled", x)
        if self.normalize:
            x = at_least_float32(x)
            square = jnp.sum(x * x, axis=-1, keepdims=True)
            # As in torch, at most 1e12; the maximum also keeps the gradient at 0 finite.
            x = x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))
        return x.astype(self.precision.output)


class MaskedLM(TransformerEncoder):
    """An encoder that predicts masked tokens, by the tied token embeddings.

    Example:
        >>> module = MaskedLM(100, num_layers=2, config=BlockConfig(features=16))
        >>> tokens = jnp.zeros((3, 8), jnp.int32)
        >>> module.apply(module.init(jax.random.key(0), tokens), tokens).shape
        (3, 8, 100)

    References:
        Devlin et al. 2019, arXiv:1810.04805, section 3.1 (task 1).
    """

    def setup(self) -> None:
        super().setup()
        config, policy = self.config, self.precision
        init = config.kernel_init()
        self.transform = Dense(config.features, kernel_init=init, precision=policy)
        self.transform_norm = make_norm(config, policy)
        shape = (self.vocabulary_size,)
        self.bias = self.param("bias", nn.initializers.zeros, shape, policy.parameter)

    def __call__(
        self,
        tokens: jax.Array,
        lengths: jax.Array | None = None,
        *,
        segments: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Map integer [batch, time] to logits [batch, time, vocabulary_size].

        Arguments and errors are those of `TransformerEncoder`.
        """
        x = self.transform(self.encode(tokens, lengths, segments=segments, train=train))
        x = self.transform_norm(activation(self.config.activation_name)(x))
        logits = self.embedding.attend(x)
        return (logits + self.bias.astype(logits.dtype)[None, None]).astype(self.precision.output)


def bert_base(num_outputs: int | None = None, **fields: Any) -> TransformerClassifier:
    """Build BERT base with its pooler: 109,482,240 parameters without a head.

    Args:
        num_outputs: size of the output; None returns the pooled features.
        fields: override those of the network and of its config.

    References:
        Devlin et al. 2019, arXiv:1810.04805, section 3.
    """
    return _bert(12, 12, 768, num_outputs, fields)


def bert_large(num_outputs: int | None = None, **fields: Any) -> TransformerClassifier:
    """Build BERT large with its pooler: 335,141,888 parameters, as `bert_base`."""
    return _bert(24, 16, 1024, num_outputs, fields)


def _bert(
    num_layers: int, num_heads: int, features: int, num_outputs: int | None, fields: dict[str, Any]
) -> TransformerClassifier:
    preset = {
        "vocabulary_size": 30_522,
        "num_layers": num_layers,
        "features": features,
        "num_heads": num_heads,
        "num_segments": 2,
        "embedding_norm": True,
        "norm_first": False,
        "norm_epsilon": 1e-12,
        "key_bias": True,
        "dropout_rate": 0.1,
        "attention_dropout_rate": 0.1,
        "num_outputs": num_outputs,
    }
    return build_preset(TransformerClassifier, preset, fields)
