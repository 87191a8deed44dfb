"""A recurrent language model: token embeddings, a stack of recurrent layers, logits."""

from __future__ import annotations

import flax.linen as nn
import jax
from jax import lax

from jaxnets.checks import check_rank, check_rate, check_sizes
from jaxnets.core import Precision
from jaxnets.functional.lengths import clear_tokens
from jaxnets.functional.recurrence.scan import Cell
from jaxnets.layers import Dense, Dropout, Embedding
from jaxnets.models.recurrent.layers import Recurrent, StackCarry, find_cell


class RecurrentLM(nn.Module):
    """Predict each token of a sequence from the ones before it.

    Attributes:
        vocabulary_size: number of tokens.
        embedding_size: size of the token vectors.
        hidden_size: size of the state of each layer.
        cell: as in `Recurrent`.
        num_layers: number of layers.
        dropout_rate: dropout behind the embedding, between layers and in front of the logits, in
            [0, 1).
        locked_dropout: draw one mask for all steps of a sequence.
        residual: add each layer's input to its output wherever the width stays the same.
        tie_embeddings: write the logits with the table that reads the tokens; where the hidden
            size is not the embedding size, behind a projection to it.
        precision: dtypes; the carry is float32 or wider.

    Raises:
        ValueError: a field is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> module = RecurrentLM(vocabulary_size=65, hidden_size=8, cell="gru")
        >>> tokens = jnp.zeros((2, 10), jnp.int32)
        >>> variables = module.init(jax.random.key(0), tokens)
        >>> module.apply(variables, tokens).shape
        (2, 10, 65)

        A long text in windows, each from the carry of the one before:

        >>> carry = module.apply(variables, 2, method="start")
        >>> logits, carry = module.apply(variables, tokens[:, :5], carry=carry)
        >>> logits, carry = module.apply(variables, tokens[:, 5:], carry=carry)

    References:
        Mikolov et al. 2010, Interspeech ("Recurrent neural network based language model");
        Zaremba, Sutskever and Vinyals 2014, arXiv:1409.2329 (dropout); Gal and Ghahramani 2016,
        arXiv:1512.05287 (one mask for all steps); Press and Wolf 2017, arXiv:1608.05859, and Inan
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
        # Vectors that are read only have elements of unit variance, as the kernels expect; those
        # that write logits too have unit length, which keeps the first logits small.
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
        """Map tokens [batch, time] to logits [batch, time, vocabulary_size] of the token after.

        Args:
            tokens: integer ids; what lies beyond their lengths has no influence.
            lengths: integer [batch] in [0, time]; by default all tokens count.
            carry: states to start from, as returned by `start` or by the call on the window
                before. No gradient flows back into it: backpropagation through time is truncated
                at the border of the windows.
            train: training mode, which drops out.

        Returns:
            The logits, and where a carry was given the states after the last token too.

        Raises:
            ValueError: tokens, lengths or carry that do not fit.
        """
        start = None if carry is None else lax.stop_gradient(carry)
        logits, after = self._read(tokens, lengths, start, train=train)
        return logits if carry is None else (logits, after)

    def start(self, batch_size: int, capacity: int = 0) -> StackCarry:
        """Return the states of an empty history, all zero.

        Args:
            batch_size: number of sequences.
            capacity: ignored: a recurrent state has room for any number of tokens.
        """
        return self.recurrent.zero_carry(batch_size)

    def extend(
        self, tokens: jax.Array, carry: StackCarry, lengths: jax.Array | None = None
    ) -> tuple[jax.Array, StackCarry]:
        """Append tokens to the history.

        Args:
            tokens: integer [batch, time].
            carry: states, as returned by `start` or `extend`.
            lengths: integer [batch] in [0, time], the number of tokens to append to each
                sequence; by default all.

        Returns:
            Logits [batch, time, vocabulary_size] of the token after each one, and the states.

        Raises:
            ValueError: tokens, lengths or carry that do not fit.
        """
        return self._read(tokens, lengths, carry, train=False)

    def _read(
        self,
        tokens: jax.Array,
        lengths: jax.Array | None,
        carry: StackCarry | None,
        *,
        train: bool,
    ) -> tuple[jax.Array, StackCarry]:
        check_rank(tokens, self, layouts=["[batch, time]"])
        vectors = self.embedding(clear_tokens(tokens, lengths))
        x = self.dropout_embedding(vectors, train=train)
        x, carry = self.recurrent(x, lengths, carry=carry, train=train)
        x = self.dropout_head(x, train=train)
        if not self.tie_embeddings:
            logits = self.head(x)
        else:
            same = self.hidden_size == self.embedding_size
            logits = self.embedding.attend(x if same else self.projection(x))
        return logits.astype(self.precision.output), carry
