"""The recurrent language model of Mikolov et al. 2010 and Zaremba et al. 2014.

Token embeddings, the stack of `layers.py`, logits. The equations of the cells are in
`jaxnets/functional/recurrence/cells.py`.
"""

from __future__ import annotations

import flax.linen as nn
import jax
from jax import lax

from jaxnets.checks import check_rank, check_rate, check_sizes
from jaxnets.core import Precision
from jaxnets.functional.lengths import clear_tokens, last_step
from jaxnets.functional.recurrence.scan import Cell
from jaxnets.layers import Dense, Dropout, Embedding
from jaxnets.layers.embedding import check_token_type
from jaxnets.models.recurrent.layers import Recurrent, StackCarry, find_cell


class RecurrentLM(nn.Module):
    """Predict each token of a sequence from the preceding ones.

    Attributes:
        vocabulary_size: number of tokens.
        embedding_size: size of the token embeddings.
        hidden_size: size of the state of each layer.
        cell: as in `Recurrent`.
        num_layers: number of layers.
        dropout_rate: dropout after the embedding, between layers and before the output layer, in
            [0, 1).
        locked_dropout: variational dropout: one mask for all steps of a sequence.
        residual: add each layer's input to its output where the widths are equal.
        tie_embeddings: compute the logits with the transposed embedding table, after a projection
            to the embedding size where the hidden size differs from it.
        precision: dtypes; the carry is float32 or wider.

    Raises:
        ValueError: a field is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> module = RecurrentLM(vocabulary_size=65, hidden_size=8, cell="gru")
        >>> tokens = jnp.zeros((2, 10), jnp.int32)
        >>> logits, variables = jax.jit(module.init_with_output)(jax.random.key(0), tokens)
        >>> logits.shape
        (2, 10, 65)

        Truncated backpropagation through time over the windows of a long text:

        >>> carry, apply = module.apply(variables, 2, method="start"), jax.jit(module.apply)
        >>> logits, carry = apply(variables, tokens[:, :5], carry=carry)
        >>> logits, carry = apply(variables, tokens[:, 5:], carry=carry)

    References:
        Mikolov et al. 2010, Interspeech ("Recurrent neural network based language model");
        Zaremba, Sutskever and Vinyals 2014, arXiv:1409.2329 (dropout); Gal and Ghahramani 2016,
        arXiv:1512.05287 (variational dropout); Press and Wolf 2017, arXiv:1608.05859, and Inan
        et al. 2017, arXiv:1611.01462 (tied embeddings).
    """

    vocabulary_size: int
    embedding_size: int = 128
    hidden_size: int = 512
    cell: str | Cell = "lstm"
    num_layers: int = 1
    dropout_rate: float = 0.0
    locked_dropout: bool = False
    residual: bool = False
    tie_embeddings: bool = False
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        check_sizes(
            vocabulary_size=self.vocabulary_size,
            embedding_size=self.embedding_size,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
        )
        check_rate(self.dropout_rate)
        find_cell(self.cell)
        super().__post_init__()

    def setup(self) -> None:
        policy = self.precision
        # Input embeddings have elements of unit variance, as the initializers of the kernels
        # assume. Tied embeddings have unit norm, so that the initial logits are small.
        scale = self.embedding_size**-0.5 if self.tie_embeddings else 1.0
        self.embedding = Embedding(
            self.vocabulary_size,
            self.embedding_size,
            embedding_init=nn.initializers.normal(scale),
            precision=policy,
        )
        shared_axes = (1,) if self.locked_dropout else ()
        self.dropout_embedding = Dropout(self.dropout_rate, shared_axes=shared_axes)
        self.recurrent = Recurrent(
            self.hidden_size,
            cell=self.cell,
            num_layers=self.num_layers,
            dropout_rate=self.dropout_rate,
            locked_dropout=self.locked_dropout,
            residual=self.residual,
            precision=policy,
        )
        self.dropout_head = Dropout(self.dropout_rate, shared_axes=shared_axes)
        if not self.tie_embeddings:
            self.head = Dense(self.vocabulary_size, precision=policy)
        elif self.hidden_size != self.embedding_size:
            self.projection = Dense(self.embedding_size, precision=policy)

    def __call__(
        self,
        tokens: jax.Array,
        lengths: jax.Array | None = None,
        *,
        carry: StackCarry | None = None,
        train: bool = False,
    ) -> jax.Array | tuple[jax.Array, StackCarry]:
        """Map tokens [batch, time] to next-token logits [batch, time, vocabulary_size].

        Args:
            tokens: integer ids; padding beyond the lengths has no influence.
            lengths: integer [batch] in [0, time]; by default all tokens are valid.
            carry: initial states, as returned by `start` or by the call on the previous window.
                Its gradient is stopped: backpropagation through time is truncated at the window
                boundary.
            train: training mode, which enables dropout.

        Returns:
            The logits; if a carry was given, also the states after the last token.

        Raises:
            ValueError: shapes, dtypes or values of the arguments are invalid.
        """
        start = None if carry is None else lax.stop_gradient(carry)
        x, after = self._features(tokens, lengths, start, train=train)
        return self._logits(x) if carry is None else (self._logits(x), after)

    def start(self, batch_size: int, capacity: int = 0) -> StackCarry:
        """Return the initial states for decoding, all zero.

        Args:
            batch_size: number of sequences.
            capacity: ignored; a recurrent state has the same size for any number of tokens.
        """
        return self.recurrent.zero_carry(batch_size)

    def extend(
        self, tokens: jax.Array, carry: StackCarry, lengths: jax.Array | None = None
    ) -> tuple[jax.Array, StackCarry]:
        """Append tokens to the sequences, for incremental decoding.

        Args:
            tokens: integer [batch, time].
            carry: states, as returned by `start` or `extend`.
            lengths: integer [batch] in [0, time], the number of tokens to append to each
                sequence; by default all.

        Returns:
            Next-token logits [batch, time, vocabulary_size], and the states.

        Raises:
            ValueError: shapes, dtypes or values of the arguments are invalid.
        """
        x, carry = self._features(tokens, lengths, carry, train=False)
        return self._logits(x), carry

    def prefill(
        self, tokens: jax.Array, carry: StackCarry, lengths: jax.Array | None = None
    ) -> tuple[jax.Array, StackCarry]:
        """Append as `extend`; the logits [batch, vocabulary] are those after the last token."""
        x, carry = self._features(tokens, lengths, carry, train=False)
        return self._logits(last_step(x, lengths)), carry

    def _features(
        self,
        tokens: jax.Array,
        lengths: jax.Array | None,
        carry: StackCarry | None,
        *,
        train: bool,
    ) -> tuple[jax.Array, StackCarry]:
        check_token_type(tokens)
        check_rank(tokens, self, layouts=["[batch, time]"])
        x = self.embedding(clear_tokens(tokens, lengths))  # [batch, time, embedding_size]
        x = self.dropout_embedding(x, train=train)
        x, carry = self.recurrent(x, lengths, carry=carry, train=train)
        return self.dropout_head(x, train=train), carry

    def _logits(self, x: jax.Array) -> jax.Array:
        if not self.tie_embeddings:
            logits = self.head(x)
        else:
            same = self.hidden_size == self.embedding_size
            logits = self.embedding.attend(x if same else self.projection(x))
        return logits.astype(self.precision.output)
