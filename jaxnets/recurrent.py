"""Recurrent networks: stacks, a classifier, models of language, translation and speech.

`Recurrent` is defined in `recurrent_layers`, the cells in `recurrent_cells` and
`parallel_recurrence`, the language model, the translator and the recognizer of speech in modules
of their names; they are given here too, so that this one module names the whole family.
"""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnets.core import Precision, at_least_float32
from jaxnets.layers import Dense, Dropout, check_rate, check_sizes, record
from jaxnets.parallel_recurrence import MinGRUCell, MinLSTMCell
from jaxnets.recurrent_cells import ElmanCell, GRUCell, LSTMCell, MinimalGatedCell
from jaxnets.recurrent_language_model import RecurrentLM
from jaxnets.recurrent_layers import Recurrent, RecurrentLayer, find_cell
from jaxnets.recurrent_recognizer import SpeechRecognizer
from jaxnets.recurrent_translator import RecurrentTranslator
from jaxnets.sequence import Cell

__all__ = [
    "ElmanCell",
    "GRUCell",
    "LSTMCell",
    "MinGRUCell",
    "MinLSTMCell",
    "MinimalGatedCell",
    "Recurrent",
    "RecurrentLM",
    "RecurrentLayer",
    "RecurrentTranslator",
    "SequenceClassifier",
    "SpeechRecognizer",
]


class SequenceClassifier(nn.Module):
    """A recurrent network that maps a sequence to one output, such as the logits of its class.

    Attributes:
        num_outputs: size of the output.
        hidden_size: size of the state of each layer and direction.
        cell: as in `Recurrent`.
        num_layers: number of layers.
        bidirectional: read in both directions.
        pool: what the output sees: the "last" output of each direction (of the backward one that
            is the first step), or the "mean" over the steps.
        dropout_rate: dropout between layers and in front of the output, in [0, 1).
        residual: add each layer's input to its output wherever the width stays the same.
        precision: dtypes.

    Raises:
        ValueError: a field is out of range.

    Example:
        >>> module = SequenceClassifier(num_outputs=3, hidden_size=8, bidirectional=True)
        >>> frames, lengths = jnp.ones((2, 10, 4)), jnp.array([10, 6])
        >>> module.apply(module.init(jax.random.key(0), frames), frames, lengths).shape
        (2, 3)
    """

    num_outputs: int = 10
    hidden_size: int = 128
    cell: str | Cell = "lstm"
    num_layers: int = 1
    bidirectional: bool = False
    pool: Literal["last", "mean"] = "last"
    dropout_rate: float = 0.0
    residual: bool = False
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        check_sizes(
            num_outputs=self.num_outputs, hidden_size=self.hidden_size, num_layers=self.num_layers
        )
        check_rate(self.dropout_rate)
        find_cell(self.cell)
        if self.pool not in ("last", "mean"):
            raise ValueError(f"pool is {self.pool!r}; choose 'last' or 'mean'")
        super().__post_init__()

    @nn.compact
    def __call__(
        self, inputs: jax.Array, lengths: jax.Array | None = None, *, train: bool = False
    ) -> jax.Array:
        """Map [batch, time, channels] to [batch, num_outputs]; records "features".

        Args:
            inputs: the sequences; what lies beyond their lengths has no influence.
            lengths: integer [batch] in [0, time]; by default all steps count.
            train: training mode.

        Raises:
            ValueError: inputs or lengths that do not fit.
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
        x = self._last(outputs, lengths) if self.pool == "last" else _mean(outputs, lengths)
        record(self, "features", x)
        x = Dropout(self.dropout_rate, name="dropout_head")(x, train=train)
        head = Dense(self.num_outputs, precision=self.precision, name="head")
        return head(x).astype(self.precision.output)

    def _last(self, outputs: jax.Array, lengths: jax.Array | None) -> jax.Array:
        last = outputs[:, -1]
        if lengths is not None:
            index = jnp.maximum(jnp.asarray(lengths) - 1, 0)[:, None, None]
            last = jnp.take_along_axis(outputs, index, axis=1)[:, 0]
        first = outputs[:, 0]
        return jnp.concatenate([last[:, : self.hidden_size], first[:, self.hidden_size :]], axis=1)


def _mean(outputs: jax.Array, lengths: jax.Array | None) -> jax.Array:
    total = jnp.sum(at_least_float32(outputs), axis=1)  # outputs are 0 beyond the lengths
    if lengths is None:
        return total / outputs.shape[1]
    return total / jnp.maximum(jnp.asarray(lengths), 1)[:, None]
