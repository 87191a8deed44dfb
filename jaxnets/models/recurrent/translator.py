"""The recurrent encoder-decoder with attention of Bahdanau et al. 2014 and Luong et al. 2015.

The encoder is the bidirectional stack of `layers.py`; the decoders are in `attention_decoder.py`,
the equations of the cells in `jaxnets/functional/recurrence/cells.py`.
"""

from __future__ import annotations

import functools
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnets.checks import check_rank, check_rate, check_sizes
from jaxnets.core import Precision, at_least_float32, record
from jaxnets.functional.lengths import clear_tokens, last_step, padding_mask
from jaxnets.functional.recurrence.scan import Cell
from jaxnets.layers import Dense, Dropout, Embedding
from jaxnets.layers.embedding import check_token_type
from jaxnets.models.recurrent.attention_decoder import BahdanauDecoder, DecoderCarry, LuongDecoder
from jaxnets.models.recurrent.layers import Recurrent, find_cell


class RecurrentTranslator(nn.Module):
    """Sequence-to-sequence model: a bidirectional recurrent encoder, a decoder with attention.

    Attributes:
        source_vocabulary_size: number of tokens of the source.
        target_vocabulary_size: number of tokens of the target; by default that of the source.
        embedding_size: size of the token embeddings.
        hidden_size: size of the state of each layer (and direction of the encoder).
        cell: as in `Recurrent`, for encoder and decoder.
        num_encoder_layers: number of layers of the bidirectional encoder.
        num_decoder_layers: number of layers of the decoder.
        attention: "bahdanau" (additive) or "luong" (multiplicative).
        input_feeding: with "luong", feed the output of each step to the next one; "bahdanau"
            always feeds the context.
        dropout_rate: dropout after the embeddings, between layers (one mask for all steps in the
            decoder) and before the output layer, in [0, 1).
        share_embeddings: one embedding table for source and target.
        tie_embeddings: compute the logits with the transposed target embedding table, after a
            projection to the embedding size where the hidden size differs from it.
        precision: dtypes; the states are float32 or wider.

    Raises:
        ValueError: a field is out of range, or one table is shared by vocabularies of two sizes.

    Differs from the papers: with "bahdanau" the readout is a tanh layer of the new state, the
    context and the embedding instead of a maxout layer of the old state.

    Example:
        >>> module = RecurrentTranslator(source_vocabulary_size=20, hidden_size=8)
        >>> source, target = jnp.ones((2, 5), jnp.int32), jnp.ones((2, 7), jnp.int32)
        >>> arguments = (jax.random.key(0), source, target, jnp.array([5, 3]))
        >>> logits, variables = jax.eval_shape(module.init_with_output, *arguments)
        >>> logits.shape
        (2, 7, 20)

    References:
        Bahdanau, Cho and Bengio 2014, arXiv:1409.0473, appendix A; Luong, Pham and Manning 2015,
        arXiv:1508.04025, sections 3.1 ("general") and 3.3 (input feeding).
    """

    source_vocabulary_size: int
    target_vocabulary_size: int | None = None
    embedding_size: int = 256
    hidden_size: int = 256
    cell: str | Cell = "gru"
    num_encoder_layers: int = 1
    num_decoder_layers: int = 1
    attention: Literal["bahdanau", "luong"] = "bahdanau"
    input_feeding: bool = True
    dropout_rate: float = 0.0
    share_embeddings: bool = False
    tie_embeddings: bool = False
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        check_sizes(
            source_vocabulary_size=self.source_vocabulary_size,
            target_vocabulary_size=self.target_size,
            embedding_size=self.embedding_size,
            hidden_size=self.hidden_size,
            num_encoder_layers=self.num_encoder_layers,
            num_decoder_layers=self.num_decoder_layers,
        )
        check_rate(self.dropout_rate)
        find_cell(self.cell)
        if self.attention not in ("bahdanau", "luong"):
            raise ValueError(f"attention is {self.attention!r}; choose 'bahdanau' or 'luong'")
        if self.share_embeddings and self.target_size != self.source_vocabulary_size:
            raise ValueError(
                f"one table cannot embed {self.source_vocabulary_size} source and "
                f"{self.target_size} target tokens; encode both with one tokenizer, or set "
                "share_embeddings=False"
            )
        super().__post_init__()

    @property
    def target_size(self) -> int:
        """Number of tokens of the target."""
        size = self.target_vocabulary_size
        return self.source_vocabulary_size if size is None else size

    def setup(self) -> None:
        policy, size, rate = self.precision, self.hidden_size, self.dropout_rate
        bahdanau, cell = self.attention == "bahdanau", find_cell(self.cell)
        scale = self.embedding_size**-0.5 if self.tie_embeddings else 1.0
        table = functools.partial(
            Embedding,
            features=self.embedding_size,
            embedding_init=nn.initializers.normal(scale),
            precision=policy,
        )
        self.target_embedding = table(self.target_size)
        if not self.share_embeddings:
            self.source_embedding = table(self.source_vocabulary_size)
        self.dropout_source, self.dropout_target = Dropout(rate), Dropout(rate)
        self.encoder = Recurrent(
            size,
            cell=cell,
            num_layers=self.num_encoder_layers,
            bidirectional=True,
            dropout_rate=rate,
            precision=policy,
        )
        # With "luong" a bias would shift all scores of a query equally: the softmax ignores it.
        self.key = Dense(size, use_bias=bahdanau, precision=policy)
        self.initial = {
            state: Dense(self.num_decoder_layers * size, precision=policy) for state in cell.states
        }
        self.decoder = (
            BahdanauDecoder(size, cell, self.num_decoder_layers, rate, policy)
            if bahdanau
            else LuongDecoder(size, cell, self.num_decoder_layers, self.input_feeding, rate, policy)
        )
        self.dropout_head = Dropout(rate)
        if not self.tie_embeddings:
            self.head = Dense(self.target_size, precision=policy)
        elif size != self.embedding_size:
            self.projection = Dense(self.embedding_size, precision=policy)

    def __call__(
        self,
        inputs: jax.Array,
        decoder_inputs: jax.Array,
        lengths: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Map tokens to logits [batch, target, target_vocabulary_size]; records "attention".

        Args:
            inputs: source tokens [batch, source]; padding beyond the lengths has no influence.
            decoder_inputs: target tokens shifted right by one (teacher forcing), [batch, target].
            lengths: integer [batch] in [0, source]; by default all source tokens are valid.
            train: training mode, which enables dropout.

        Raises:
            ValueError: shapes, dtypes or values of the arguments are invalid.
        """
        carry = self._encode(inputs, lengths, train=train)
        x, _ = self._decode(decoder_inputs, carry, None, train=train)
        return self._logits(x)

    def start(
        self, source: jax.Array, lengths: jax.Array | None = None, capacity: int = 0
    ) -> DecoderCarry:
        """Encode the source and return the decoder's initial carry.

        Args:
            source: tokens [batch, source].
            lengths: integer [batch] in [0, source]; by default all source tokens are valid.
            capacity: ignored; a recurrent state has the same size for any number of tokens.

        Raises:
            ValueError: shapes, dtypes or values of the arguments are invalid.
        """
        return self._encode(source, lengths, train=False)

    def extend(
        self, tokens: jax.Array, carry: DecoderCarry, lengths: jax.Array | None = None
    ) -> tuple[jax.Array, DecoderCarry]:
        """Append tokens to the target, for incremental decoding.

        Args:
            tokens: integer [batch, time].
            carry: as returned by `start` or `extend`.
            lengths: integer [batch] in [0, time], the number of tokens to append to each
                sequence; by default all.

        Returns:
            Next-token logits [batch, time, target_vocabulary_size], the carry.

        Raises:
            ValueError: shapes, dtypes or values of the arguments are invalid.
        """
        x, carry = self._decode(tokens, carry, lengths, train=False)
        return self._logits(x), carry

    def prefill(
        self, tokens: jax.Array, carry: DecoderCarry, lengths: jax.Array | None = None
    ) -> tuple[jax.Array, DecoderCarry]:
        """Append as `extend`; the logits [batch, vocabulary] are those after the last token."""
        x, carry = self._decode(tokens, carry, lengths, train=False)
        return self._logits(last_step(x, lengths)), carry

    def _encode(self, source: jax.Array, lengths: jax.Array | None, *, train: bool) -> DecoderCarry:
        check_rank(source, self, layouts=["[batch, source]"])
        embedding = self.target_embedding if self.share_embeddings else self.source_embedding
        x = self.dropout_source(embedding(clear_tokens(source, lengths)), train=train)
        memory, last = self.encoder(x, lengths, train=train)  # [batch, source, 2 * hidden_size]
        memory = memory.astype(self.precision.compute)
        valid = jnp.ones(source.shape, bool)
        if lengths is not None:
            valid = padding_mask(lengths, source.shape)
        top = self.num_encoder_layers - 1
        both = zip(last[f"forward_{top}"], last[f"backward_{top}"], strict=True)
        starts = []
        for layer, (forward, backward) in zip(self.initial.values(), both, strict=True):
            # [batch, num_decoder_layers * hidden_size]
            start = jnp.tanh(layer(jnp.concatenate([forward, backward], axis=-1)))
            starts.append(jnp.split(at_least_float32(start), self.num_decoder_layers, axis=-1))
        carry = {
            "memory": memory,
            "keys": self.key(memory),
            "valid": valid,
            "states": tuple(zip(*starts, strict=True)),
        }
        if self.attention == "luong" and self.input_feeding:
            carry["input_feed"] = jnp.zeros(
                (source.shape[0], self.hidden_size), self.precision.compute
            )
        return carry

    def _decode(
        self,
        tokens: jax.Array,
        carry: DecoderCarry,
        lengths: jax.Array | None,
        *,
        train: bool,
    ) -> tuple[jax.Array, DecoderCarry]:
        check_token_type(tokens)
        check_rank(tokens, self, layouts=["[batch, target]"])
        if tokens.shape[0] != carry["memory"].shape[0]:
            raise ValueError(
                f"{tokens.shape[0]} targets do not fit {carry['memory'].shape[0]} sources; give "
                "one target for each source"
            )
        embeddings = self.target_embedding(clear_tokens(tokens, lengths))
        x = self.dropout_target(embeddings, train=train)
        x, attention, carry = self.decoder(x, carry, lengths, train=train)
        record(self, "attention", attention)
        return self.dropout_head(x, train=train), carry

    def _logits(self, x: jax.Array) -> jax.Array:
        if not self.tie_embeddings:
            logits = self.head(x)
        else:
            same = self.hidden_size == self.embedding_size
            logits = self.target_embedding.attend(x if same else self.projection(x))
        return logits.astype(self.precision.output)
