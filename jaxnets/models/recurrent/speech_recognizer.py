"""The bidirectional recurrent acoustic model of Graves et al. 2013 and Deep Speech 2, for CTC.

Convolutional subsampling, the stack of `layers.py`, logits per frame. The equations of the cells
are in `jaxnets/functional/recurrence/cells.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnets.checks import check_rate, check_sizes
from jaxnets.core import Precision, record
from jaxnets.functional.recurrence.scan import Cell
from jaxnets.layers import Dense, Dropout
from jaxnets.layers.subsampling import subsample, subsampled_lengths
from jaxnets.models.recurrent.layers import Recurrent, find_cell


class SpeechRecognizer(nn.Module):
    """Convolutional subsampling, bidirectional recurrent layers, class logits per frame.

    Train it with `objectives.sequence.ctc` and decode it with `generation.ctc`.

    Attributes:
        num_outputs: number of classes, the blank included.
        features: channels of each convolution.
        strides: stride of each convolution, of kernel size 3, over time. CTC needs a remaining
            frame per label, so their product must not exceed the frames of the shortest label.
        hidden_size: size of the state of each layer and direction.
        cell: as in `Recurrent`.
        num_layers: number of recurrent layers.
        dropout_rate: dropout before each recurrent layer and before the output layer, in [0, 1).
        precision: dtypes.

    Raises:
        ValueError: a field is out of range.

    Example:
        >>> module = SpeechRecognizer(num_outputs=11, features=8, hidden_size=8, num_layers=1)
        >>> frames, lengths = jnp.ones((2, 30, 40)), jnp.array([30, 17])
        >>> arguments = (jax.random.key(0), frames, lengths)
        >>> (logits, _), variables = jax.eval_shape(module.init_with_output, *arguments)
        >>> logits.shape, module.num_frames(lengths).tolist()
        ((2, 8, 11), [8, 5])

    References:
        Graves, Mohamed and Hinton 2013, arXiv:1303.5778, section 3 (bidirectional layers and CTC);
        Amodei et al. 2015, arXiv:1512.02595, section 3.5 (strided convolutions first).
    """

    num_outputs: int
    features: int = 128
    strides: Sequence[int] = (2, 2)
    hidden_size: int = 128
    cell: str | Cell = "gru"
    num_layers: int = 2
    dropout_rate: float = 0.0
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        check_sizes(
            num_outputs=self.num_outputs,
            features=self.features,
            strides=self.strides,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
        )
        check_rate(self.dropout_rate)
        find_cell(self.cell)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, inputs: jax.Array, lengths: jax.Array | None = None, *, train: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Map [batch, frames, channels] to [batch, fewer frames, num_outputs]; records "features".

        Args:
            inputs: the frames; padding beyond the lengths has no influence.
            lengths: integer [batch] in [0, frames]; by default all frames are valid.
            train: training mode.

        Returns:
            Logits, and the number of valid frames of each row, int32 [batch], see `num_frames`.

        Raises:
            ValueError: shapes, dtypes or values of the arguments are invalid.
        """
        policy = self.precision
        x, lengths = subsample(
            inputs,
            lengths,
            caller=self,
            features=self.features,
            strides=self.strides,
            activation_name="relu",
            kernel_init=nn.initializers.he_normal(),
            precision=policy,
        )
        if lengths is None:
            lengths = jnp.full(x.shape[0], x.shape[1])
        x = Dropout(self.dropout_rate, name="dropout_input")(x, train=train)
        x, _ = Recurrent(
            self.hidden_size,
            cell=self.cell,
            num_layers=self.num_layers,
            bidirectional=True,
            dropout_rate=self.dropout_rate,
            precision=policy,
            name="recurrent",
        )(x, lengths, train=train)
        record(self, "features", x)
        x = Dropout(self.dropout_rate, name="dropout_head")(x, train=train)
        head = Dense(self.num_outputs, precision=policy, name="head")
        return head(x).astype(policy.output), lengths.astype(jnp.int32)

    def num_frames(self, lengths: Any) -> Any:
        """Return the number of frames of the logits.

        Args:
            lengths: frames of the inputs, an integer or an integer array [...].

        Returns:
            `lengths` divided by each of the strides and rounded up: the argument of
            `objectives.sequence.check_ctc_batch`.

        Example:
            >>> SpeechRecognizer(num_outputs=11, strides=(2, 3)).num_frames(31)
            6
        """
        return subsampled_lengths(lengths, self.strides)
