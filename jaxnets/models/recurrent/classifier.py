"""Recurrent classifiers of sequences of frames and of texts.

Each is the stack of `layers.py` with a reduction over time: Schuster and Paliwal 1997, Conneau et
al. 2017. The equations of the cells are in `jaxnets/functional/recurrence/cells.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnets.checks import check_rank, check_rate, check_sizes
from jaxnets.core import Precision, record
from jaxnets.functional.lengths import clear_tokens, last_step, max_over_time, mean_over_time
from jaxnets.functional.recurrence.scan import Cell
from jaxnets.layers import Dense, Dropout, Embedding
from jaxnets.layers.embedding import check_token_type
from jaxnets.models.recurrent.layers import Recurrent, find_cell

_POOLS = ("last", "mean", "max")


class SequenceClassifier(nn.Module):
    """A recurrent network that maps a sequence to one output, such as the logits of its class.

    With `pool="last"` and `bidirectional=True`, corresponds to
    `keras.layers.Bidirectional(keras.layers.LSTM(...))` before a dense layer.

    Attributes:
        num_outputs: size of the output.
        hidden_size: size of the state of each layer and direction.
        cell: as in `Recurrent`.
        num_layers: number of layers.
        bidirectional: run in both directions.
        pool: reduction of the outputs over time: the "last" output of each direction (for the
            backward direction that of the first step), or the "mean" or "max" over the valid steps.
        dropout_rate: dropout between layers and before the output layer, in [0, 1).
        residual: add each layer's input to its output where the widths are equal.
        precision: dtypes.

    Raises:
        ValueError: a field is out of range.

    Example:
        >>> module = SequenceClassifier(num_outputs=3, hidden_size=8, bidirectional=True)
        >>> frames, lengths = jnp.ones((2, 10, 4)), jnp.array([10, 6])
        >>> init = jax.jit(module.init_with_output)
        >>> logits, variables = init(jax.random.key(0), frames, lengths)
        >>> logits.shape
        (2, 3)

    References:
        Schuster and Paliwal 1997, "Bidirectional Recurrent Neural Networks"; Conneau et al. 2017,
        arXiv:1705.02364, section 3.2.2 (mean and max pooling over time).
    """

    num_outputs: int = 10
    hidden_size: int = 128
    cell: str | Cell = "lstm"
    num_layers: int = 1
    bidirectional: bool = False
    pool: Literal["last", "mean", "max"] = "last"
    dropout_rate: float = 0.0
    residual: bool = False
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        _check_fields(self)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, inputs: jax.Array, lengths: jax.Array | None = None, *, train: bool = False
    ) -> jax.Array:
        """Map [batch, time, channels] to [batch, num_outputs]; records "features".

        Args:
            inputs: the sequences; padding beyond the lengths has no influence.
            lengths: integer [batch] in [0, time]; by default all steps are valid.
            train: training mode.

        Raises:
            ValueError: shapes, dtypes or values of the arguments are invalid.
        """
        recurrent = Recurrent(
            self.hidden_size,
            cell=self.cell,
            num_layers=self.num_layers,
            bidirectional=self.bidirectional,
            dropout_rate=self.dropout_rate,
            residual=self.residual,
            precision=self.precision,
            name="recurrent",
        )
        outputs, _ = recurrent(inputs, lengths, train=train)
        pools: dict[str, Callable[..., jax.Array]]
        pools = {"last": self._last_outputs, "mean": mean_over_time, "max": max_over_time}
        x = pools[self.pool](outputs, lengths)
        record(self, "features", x)
        x = Dropout(self.dropout_rate, name="dropout_head")(x, train=train)
        head = Dense(self.num_outputs, precision=self.precision, name="head")
        return head(x).astype(self.precision.output)

    def _last_outputs(self, outputs: jax.Array, lengths: jax.Array | None) -> jax.Array:
        last, first = last_step(outputs, lengths), outputs[:, 0]
        return jnp.concatenate([last[:, : self.hidden_size], first[:, self.hidden_size :]], axis=1)


class TextClassifier(nn.Module):
    """Token embeddings, then a `SequenceClassifier`.

    Attributes:
        vocabulary_size: number of tokens.
        num_outputs: size of the output.
        embedding_size: size of the token embeddings.
        hidden_size: as in `SequenceClassifier`, and so are the fields up to `pool`.
        cell: kind of recurrence.
        num_layers: number of layers.
        bidirectional: run in both directions.
        pool: reduction of the outputs over time.
        dropout_rate: dropout after the embedding, between layers and before the output layer, in
            [0, 1).
        precision: dtypes.

    Raises:
        ValueError: a field is out of range.

    Example:
        >>> module = TextClassifier(vocabulary_size=100, hidden_size=8, pool="mean")
        >>> tokens, lengths = jnp.ones((2, 10), jnp.int32), jnp.array([10, 6])
        >>> arguments = (jax.random.key(0), tokens, lengths)
        >>> logits, variables = jax.eval_shape(module.init_with_output, *arguments)
        >>> logits.shape
        (2, 2)
    """

    vocabulary_size: int
    num_outputs: int = 2
    embedding_size: int = 128
    hidden_size: int = 128
    cell: str | Cell = "lstm"
    num_layers: int = 1
    bidirectional: bool = False
    pool: Literal["last", "mean", "max"] = "last"
    dropout_rate: float = 0.0
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        check_sizes(vocabulary_size=self.vocabulary_size, embedding_size=self.embedding_size)
        _check_fields(self)
        super().__post_init__()

    def setup(self) -> None:
        # A small scale, so that the few updates of a rare token outweigh its random initial value.
        self.embedding = Embedding(
            self.vocabulary_size,
            self.embedding_size,
            embedding_init=nn.initializers.normal(0.1),
            precision=self.precision,
        )
        self.dropout_embedding = Dropout(self.dropout_rate)
        self.classifier = SequenceClassifier(
            self.num_outputs,
            self.hidden_size,
            cell=self.cell,
            num_layers=self.num_layers,
            bidirectional=self.bidirectional,
            pool=self.pool,
            dropout_rate=self.dropout_rate,
            precision=self.precision,
        )

    def __call__(
        self, tokens: jax.Array, lengths: jax.Array | None = None, *, train: bool = False
    ) -> jax.Array:
        """Map integer [batch, time] to [batch, num_outputs].

        Args:
            tokens: token ids; padding beyond the lengths has no influence.
            lengths: integer [batch] in [0, time]; by default all tokens are valid.
            train: training mode.

        Raises:
            ValueError: shapes, dtypes or values of the arguments are invalid.
        """
        check_token_type(tokens)
        check_rank(tokens, self, layouts=["[batch, time]"])
        vectors = self.embedding(clear_tokens(tokens, lengths))
        x = self.dropout_embedding(vectors, train=train)
        return self.classifier(x, lengths, train=train)


def _check_fields(module: SequenceClassifier | TextClassifier) -> None:
    check_sizes(
        num_outputs=module.num_outputs,
        hidden_size=module.hidden_size,
        num_layers=module.num_layers,
    )
    check_rate(module.dropout_rate)
    find_cell(module.cell)
    if module.pool not in _POOLS:
        raise ValueError(f"pool is {module.pool!r}; choose one of {_POOLS}")
