"""Recurrent layers and stacks of them: the LSTM, GRU and simple RNN of the other frameworks.

The equations of the cells are in `jaxnets/functional/recurrence/cells.py` (Elman, LSTM, GRU,
minimal gated unit) and `associative.py` beside it (minGRU, minLSTM); `scan.py` runs them over time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnets.checks import check_rank, check_rate, check_sizes
from jaxnets.core import Precision
from jaxnets.functional.recurrence import scan
from jaxnets.functional.recurrence.associative import MinGRUCell, MinLSTMCell
from jaxnets.functional.recurrence.cells import ElmanCell, GRUCell, LSTMCell, MinimalGatedCell
from jaxnets.functional.recurrence.scan import Carry, Cell
from jaxnets.layers import Dropout
from jaxnets.layers.parameters import parameter

_CELLS: dict[str, Cell] = {
    "rnn": ElmanCell(),
    "lstm": LSTMCell(),
    "gru": GRUCell(),
    "mgu": MinimalGatedCell(),
    "mingru": MinGRUCell(),
    "minlstm": MinLSTMCell(),
}


def find_cell(cell: str | Cell) -> Cell:
    """Look up a cell by name.

    Args:
        cell: "rnn", "lstm", "gru", "mgu", "mingru" or "minlstm", each with its default options,
            or a `Cell`.

    Returns:
        The cell; a `Cell` is returned unchanged.

    Raises:
        ValueError: the name is unknown; the message lists the known ones.

    Example:
        >>> find_cell("gru")
        GRUCell(reset='after')
    """
    if isinstance(cell, Cell):
        return cell
    if cell not in _CELLS:
        raise ValueError(
            f"unknown cell {cell!r}; choose from {', '.join(_CELLS)}, or give a Cell such as "
            "LSTMCell(peephole=True)"
        )
    return _CELLS[cell]


#: Name of the layer ("forward_0", "backward_0", ...) -> its states, each [batch, hidden_size].
StackCarry: TypeAlias = Mapping[str, Carry]


def cell_weights(
    module: nn.Module,
    cell: Cell,
    num_channels: int,
    hidden_size: int,
    *,
    precision: Precision,
    inputs: tuple[int, ...],
) -> dict[str, jax.Array]:
    """Declare the weights of a cell as parameters of a module, inside its compact method.

    Args:
        module: owner of the parameters, which have the names of the weights.
        cell: the cell, whose `parameters` gives names, initializers and shapes.
        num_channels: number of input channels.
        hidden_size: size of the state.
        precision: dtypes of the parameters and of the result.
        inputs: shape of the inputs, for the error.

    Returns:
        {name: array of the compute dtype}, the argument `weights` of `recurrent_scan`.

    Raises:
        ValueError: the network was initialized for other inputs.
    """
    listed, dtype = cell.parameters(num_channels, hidden_size), precision.parameter
    return {
        name: parameter(module, name, *declared, dtype, inputs=inputs).astype(precision.compute)
        for name, declared in listed.items()
    }


class RecurrentLayer(nn.Module):
    """One recurrent layer in one direction, time-major.

    Corresponds to `flax.linen.RNN` with `time_major=True`, whose cells have one kernel per gate.

    Attributes:
        hidden_size: size of the state.
        cell: the recurrent cell.
        reverse: run from the last step to the first.
        learned_carry: train the initial state instead of starting from zeros.
        precision: dtypes; the states are float32 or wider.
    """

    hidden_size: int
    cell: Cell
    reverse: bool = False
    learned_carry: bool = False
    precision: Precision = Precision()

    @nn.compact
    def __call__(
        self, x: jax.Array, *, carry: Carry | None = None, valid: jax.Array | None = None
    ) -> tuple[jax.Array, Carry]:
        """Map [time, batch, channels] to [time, batch, hidden_size] and the final carry.

        Args:
            x: inputs, zero where not `valid`.
            carry: initial states, each [batch, hidden_size], instead of zeros or the trained ones.
            valid: bool [time, batch], as in `recurrent_scan`.

        Raises:
            ValueError: shapes or types that do not fit.
        """
        policy, size = self.precision, self.hidden_size
        weights = cell_weights(self, self.cell, x.shape[-1], size, precision=policy, inputs=x.shape)
        zeros, dtype = nn.initializers.zeros, jnp.promote_types(policy.compute, jnp.float32)
        initial = [jnp.zeros(size, dtype) for _ in self.cell.states]
        if self.learned_carry:
            initial = [
                self.param(f"initial_{state}", zeros, (size,), policy.parameter)
                for state in self.cell.states
            ]
        if carry is None:
            # Each state [hidden_size] -> [batch, hidden_size].
            carry = tuple(jnp.broadcast_to(row[None], (x.shape[1], size)) for row in initial)
        return scan.recurrent_scan(
            self.cell,
            weights,
            x.astype(policy.compute),
            tuple(state.astype(dtype) for state in carry),
            valid=valid,
            reverse=self.reverse,
        )


class Recurrent(nn.Module):
    """A stack of recurrent layers.

    Corresponds to `torch.nn.RNN`, `LSTM` and `GRU` with `batch_first=True`: the same equations,
    order of gates, dropout between layers and, with `lengths`, results of a `PackedSequence`; the
    kernels are transposed. `tests/parity/test_recurrent.py` maps the parameters.
    Also to `keras.layers.LSTM` and, but for the order of gates, `keras.layers.GRU`.

    Differs from torch: one bias, the sum of torch's two, except in the candidate of
    `GRUCell(reset="after")`; the forget gate's bias starts at 1, as in Keras; recurrent kernels
    start orthogonal, as in Keras and Flax; the carry is a dict by layer and direction.
    `reset="after"`, the default, is torch's GRU and Keras' `reset_after=True`; `reset="before"` is
    the paper's.

    Attributes:
        hidden_size: size of the state of each layer and direction.
        cell: "rnn", "lstm", "gru", "mgu", "mingru", "minlstm", or a cell with options, such as
            `LSTMCell(layer_norm=True)` or `GRUCell(reset="before")`.
        num_layers: number of layers.
        bidirectional: run each layer in both directions and concatenate the two outputs.
        dropout_rate: dropout between layers, in [0, 1).
        locked_dropout: variational dropout: one mask for all steps of a sequence.
        residual: add each layer's input to its output where the widths are equal.
        learned_carry: train the initial states instead of starting from zeros.
        precision: dtypes; the carry is float32 or wider.

    Raises:
        ValueError: a field is out of range.

    Example:
        The final carry of one window is the initial carry of the next:

        >>> module = Recurrent(hidden_size=8, cell="gru", num_layers=2)
        >>> x = jnp.ones((3, 10, 4))
        >>> init, apply = jax.jit(module.init_with_output), jax.jit(module.apply)
        >>> (first, carry), variables = init(jax.random.key(0), x[:, :6])
        >>> second, carry = apply(variables, x[:, 6:], carry=carry)
        >>> second.shape, sorted(carry)
        ((3, 4, 8), ['forward_0', 'forward_1'])

    References:
        Schuster and Paliwal 1997, IEEE Transactions on Signal Processing 45(11) (bidirectional);
        Zaremba, Sutskever and Vinyals 2014, arXiv:1409.2329 (dropout between layers); Gal and
        Ghahramani 2016, arXiv:1512.05287 (variational dropout).
    """

    hidden_size: int
    cell: str | Cell = "lstm"
    num_layers: int = 1
    bidirectional: bool = False
    dropout_rate: float = 0.0
    locked_dropout: bool = False
    residual: bool = False
    learned_carry: bool = False
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        check_sizes(hidden_size=self.hidden_size, num_layers=self.num_layers)
        check_rate(self.dropout_rate)
        find_cell(self.cell)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        inputs: jax.Array,
        lengths: jax.Array | None = None,
        *,
        carry: StackCarry | None = None,
        train: bool = False,
    ) -> tuple[jax.Array, StackCarry]:
        """Map [batch, time, channels] to [batch, time, num_directions * hidden_size].

        Args:
            inputs: the sequences; padding beyond the lengths has no influence.
            lengths: integer [batch] in [0, time], the number of steps of each sequence; the
                backward direction starts at its last step. By default all steps are valid.
            carry: initial states, as returned by an earlier call or by `zero_carry`.
            train: training mode, which enables dropout.

        Returns:
            Outputs, 0 beyond the lengths, and the states after the last step of each sequence:
            {"forward_0": (hidden,), ...}, or (hidden, memory) for an LSTM. In evaluation and in
            one direction, running window by window with the carry passed on gives the same
            outputs as one call.

        Raises:
            ValueError: shapes, dtypes or values of the arguments are invalid.
        """
        check_rank(inputs, self, layouts=["[batch, time, channels]"])
        if not inputs.shape[1]:
            raise ValueError(f"inputs of shape {inputs.shape} have no time step; give at least 1")
        self._check_carry(carry, inputs.shape[0])
        # [time, batch, channels]
        x, valid = jnp.swapaxes(inputs, 0, 1).astype(self.precision.compute), None
        shared_axes = (0,) if self.locked_dropout else ()
        if lengths is not None:
            x, valid = scan.mask_padding(x, lengths)
        after: dict[str, Carry] = {}
        for index in range(self.num_layers):
            if index:
                dropout = Dropout(
                    self.dropout_rate, shared_axes=shared_axes, name=f"dropout_{index}"
                )
                x = dropout(x, train=train)
            outputs = []
            for direction in self._directions():
                name = f"{direction}_{index}"
                layer = RecurrentLayer(
                    self.hidden_size,
                    find_cell(self.cell),
                    reverse=direction == "backward",
                    learned_carry=self.learned_carry,
                    precision=self.precision,
                    name=name,
                )
                start = None if carry is None else carry[name]
                output, after[name] = layer(x, carry=start, valid=valid)
                outputs.append(output)
            y = jnp.concatenate(outputs, axis=-1)  # [time, batch, num_directions * hidden_size]
            x = x + y if self.residual and x.shape == y.shape else y
        # [batch, time, num_directions * hidden_size]
        return jnp.swapaxes(x, 0, 1).astype(self.precision.output), after

    def zero_carry(self, batch_size: int) -> StackCarry:
        """Return an initial carry of zeros.

        Args:
            batch_size: number of sequences.

        Returns:
            {"forward_0": states, ...}, the states a tuple of arrays [batch_size, hidden_size].
        """
        dtype = jnp.promote_types(self.precision.compute, jnp.float32)
        zeros = jnp.zeros((batch_size, self.hidden_size), dtype)
        states = (zeros,) * len(find_cell(self.cell).states)
        return {
            f"{direction}_{index}": states
            for index in range(self.num_layers)
            for direction in self._directions()
        }

    def _directions(self) -> tuple[str, ...]:
        return ("forward", "backward") if self.bidirectional else ("forward",)

    def _check_carry(self, carry: StackCarry | None, batch_size: int) -> None:
        if carry is None:
            return
        actual = jax.tree.map(jnp.shape, carry)
        expected = jax.tree.map(jnp.shape, jax.eval_shape(lambda: self.zero_carry(batch_size)))
        if actual != expected:
            raise ValueError(
                f"the carry has shapes {actual}; for {batch_size} sequences give "
                f"{expected}, as returned by an earlier call or by zero_carry({batch_size})"
            )
