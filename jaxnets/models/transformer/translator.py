"""The encoder-decoder transformer, for sequence-to-sequence tasks such as translation."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnets.checks import check_sizes
from jaxnets.core import Precision
from jaxnets.models.transformer.config import BlockConfig, build_preset
from jaxnets.models.transformer.embeddings import InputEmbedding
from jaxnets.models.transformer.stack import Stack, StackCarry, cache_capacity


class TransformerTranslator(nn.Module):
    """An encoder of the source and a causal decoder of the target with cross-attention.

    The output layer is the transposed token embedding of the target. Corresponds to
    `torch.nn.Transformer` with embeddings and output layer.

    Attributes:
        vocabulary_size: number of tokens of the source.
        target_vocabulary_size: number of tokens of the target; None shares one vocabulary and one
            embedding between both.
        num_layers: number of blocks of the encoder.
        num_decoder_layers: number of blocks of the decoder, by default `num_layers`.
        config: options of the blocks.
        max_length: number of learned positions, the longest sequence; no limit with other kinds.
        precision: dtypes.

    Raises:
        ValueError: a field is out of range.

    Example:
        >>> config = BlockConfig(features=16, positions="sinusoidal")
        >>> module = TransformerTranslator(50, num_layers=1, config=config)
        >>> source, target = jnp.zeros((3, 8), jnp.int32), jnp.zeros((3, 5), jnp.int32)
        >>> variables = module.init(jax.random.key(0), source, target)
        >>> module.apply(variables, source, target, jnp.array([8, 2, 5])).shape
        (3, 5, 50)

    References:
        Vaswani et al. 2017, arXiv:1706.03762; Xiong et al. 2020, arXiv:2002.04745 (norms first).
    """

    vocabulary_size: int
    target_vocabulary_size: int | None = None
    num_layers: int = 3
    num_decoder_layers: int | None = None
    config: BlockConfig = BlockConfig(positions="sinusoidal")
    max_length: int = 512
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        check_sizes(vocabulary_size=self.vocabulary_size, max_length=self.max_length)
        check_sizes(num_layers=self.num_layers)
        for name in ("target_vocabulary_size", "num_decoder_layers"):
            if getattr(self, name) is not None:
                check_sizes(**{name: getattr(self, name)})
        super().__post_init__()

    def setup(self) -> None:
        config, policy = self.config, self.precision
        self.embedding = InputEmbedding(
            self.vocabulary_size, config, self.max_length, precision=policy
        )
        if self.target_vocabulary_size is not None:
            self.target_embedding = InputEmbedding(
                self.target_vocabulary_size, config, self.max_length, precision=policy
            )
        self.encoder = Stack(config, self.num_layers, precision=policy)
        count = self.num_layers if self.num_decoder_layers is None else self.num_decoder_layers
        self.decoder = Stack(config, count, causal=True, cross=True, precision=policy)

    def __call__(
        self,
        inputs: jax.Array,
        decoder_inputs: jax.Array,
        lengths: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Map source and shifted target (teacher forcing) to next-token logits of the target.

        `capture` records the weights of the cross-attention as
        ["decoder"]["layer_0"]["cross_attention"]["weights"], [batch, heads, target, source].

        Args:
            inputs: the source, integer [batch, source]; ids beyond the lengths may have any value.
            decoder_inputs: the target shifted right by one step, integer [batch, target].
            lengths: of the source, integer [batch] in [0, source]; by default all of it counts.
            train: training mode.

        Returns:
            [batch, target, vocabulary]; [:, t] predicts the token after decoder_inputs[:, t].

        Raises:
            ValueError: tokens or lengths that do not fit.
        """
        context = self._encode(inputs, lengths, train=train)
        x = self._target_embedding(decoder_inputs, train=train)
        x = self.decoder(x, context=context, context_lengths=lengths, train=train)
        return self._logits(x)

    def start(self, source: jax.Array, lengths: jax.Array | None, capacity: int) -> StackCarry:
        """Encode the source and return a cache with an empty target.

        Args:
            source: integer [batch, source].
            lengths: integer [batch] in [0, source]; None counts all of it.
            capacity: maximum number of tokens of the target.

        Returns:
            Arrays with a leading batch axis: keys and values of the source and of the target for
            each layer, "context_lengths" [batch] and "position" [batch].

        Raises:
            ValueError: tokens or lengths that do not fit, a capacity beyond the learned positions.
        """
        self._target_embedding.check_capacity(capacity)
        context = self._encode(source, lengths, train=False)
        return self.decoder.start(
            source.shape[0], capacity, context=context, context_lengths=lengths
        )

    def room(self, carry: StackCarry) -> int:
        """Return the number of tokens that a carry has room for, including those it holds."""
        return cache_capacity(carry)

    def extend(
        self, tokens: jax.Array, carry: StackCarry, lengths: jax.Array | None = None
    ) -> tuple[jax.Array, StackCarry]:
        """Append tokens to each target in the cache.

        Args:
            tokens: integer [batch, time]; the first lengths[b] tokens are appended to row b.
            carry: as returned by `start` or an earlier call.
            lengths: integer [batch] in [0, time]; by default all tokens are appended.

        Returns:
            Next-token logits [batch, time, vocabulary], NaN beyond the capacity, and the next
            carry.

        Raises:
            ValueError: tokens or lengths that do not fit.
        """
        positions = carry["position"][:, None] + jnp.arange(tokens.shape[1])[None]
        x = self._target_embedding(tokens, lengths, positions=positions)
        x, carry = self.decoder.extend(x, carry, lengths)
        return self._logits(x), carry

    def _encode(self, source: jax.Array, lengths: jax.Array | None, *, train: bool) -> jax.Array:
        x = self.embedding(source, lengths, train=train)
        return self.encoder(x, lengths, train=train)

    @property
    def _target_embedding(self) -> InputEmbedding:
        shared = self.target_vocabulary_size is None
        return self.embedding if shared else self.target_embedding

    def _logits(self, x: jax.Array) -> jax.Array:
        return self._target_embedding.attend(x).astype(self.precision.output)


def transformer_base(vocabulary_size: int = 37_000, **fields: Any) -> TransformerTranslator:
    """Build the base model of 2017: 63,073,280 parameters for 37,000 tokens.

    The paper states 65 million. Differs from the paper: the keys have no bias, which would cancel
    in the softmax; `key_bias=True` gives 63,082,496.

    Args:
        vocabulary_size: number of tokens that source and target share.
        fields: override those of the network and of its config.

    References:
        Vaswani et al. 2017, arXiv:1706.03762, table 3.
    """
    return _translator(512, 8, 0.1, vocabulary_size, fields)


def transformer_big(vocabulary_size: int = 37_000, **fields: Any) -> TransformerTranslator:
    """Build the big model of 2017: 214,226,944 parameters, as `transformer_base`.

    The paper states 213 million.
    """
    return _translator(1024, 16, 0.3, vocabulary_size, fields)


def _translator(
    features: int,
    num_heads: int,
    dropout_rate: float,
    vocabulary_size: int,
    fields: dict[str, Any],
) -> TransformerTranslator:
    preset = {
        "vocabulary_size": vocabulary_size,
        "num_layers": 6,
        "features": features,
        "num_heads": num_heads,
        "activation": "relu",
        "norm_first": False,
        "positions": "sinusoidal",
        "dropout_rate": dropout_rate,
        "init_std": None,
    }
    return build_preset(TransformerTranslator, preset, fields)
