"""Recurrent layers and stacks of them, with any cell."""

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

_CELLS: dict[str, Cell] = {
    "rnn": ElmanCell(),
    "lstm": LSTMCell(),
    "gru": GRUCell(),
    "mgu": MinimalGatedCell(),
    "mingru": MinGRUCell(),
    "minlstm": MinLSTMCell(),
}


def find_cell(cell: str | Cell) -> Cell:
    """Look a cell up by name.

    Args:
        cell: "rnn", "lstm", "gru", "mgu", "mingru" or "minlstm", each with its default options,
            or a `Cell`.

    Returns:
        The cell; a `Cell` comes back as it is.

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
    module: nn.Module, cell: Cell, num_channels: int, hidden_size: int, *, precision: Precision
) -> dict[str, jax.Array]:
    """Declare the weights of a cell as parameters of a module, inside its compact method.

    Args:
        module: gets a parameter for each weight, under the weight's name.
        cell: lists its weights.
        num_channels: number of input channels.
        hidden_size: size of the state.
        precision: dtypes of the parameters and of what is returned.

    Returns:
        {name: array of the compute dtype}, as `sequence.recurrent_scan` takes them.
    """
    listed = cell.parameters(num_channels, hidden_size)
    return {
        name: module.param(name, initializer, shape, precision.parameter).astype(precision.compute)
        for name, (initializer, shape) in listed.items()
    }


class RecurrentLayer(nn.Module):
    """One recurrent layer in one direction, time first.

    Attributes:
        hidden_size: size of the state.
        cell: the step.
        reverse: go from the last step to the first.
        learned_carry: start from parameters instead of zeros.
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
            x: zero where not `valid`.
            carry: states to start from, instead of zeros or the learned ones.
            valid: bool [time, batch], as in `sequence.recurrent_scan`.
        """
        policy, size = self.precision, self.hidden_size
        weights = cell_weights(self, self.cell, x.shape[-1], size, precision=policy)
        zeros, dtype = nn.initializers.zeros, jnp.promote_types(policy.compute, jnp.float32)
        initial = [jnp.zeros(size, dtype) for _ in self.cell.states]
        if self.learned_carry:
            initial = [
                self.param(f"initial_{state}", zeros, (size,), policy.parameter)
                for state in self.cell.states
            ]
        if carry is None:
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

    Attributes:
        hidden_size: size of the state of each layer and direction.
        cell: "rnn", "lstm", "gru", "mgu", "mingru", "minlstm", or a cell with options, such as
            `LSTMCell(layer_norm=True)` or `GRUCell(reset="before")`.
        num_layers: number of layers.
        bidirectional: read in both directions in each layer and join the two outputs.
        dropout_rate: dropout between layers, in [0, 1).
        locked_dropout: draw one mask for all steps of a sequence.
        residual: add each layer's input to its output wherever the width stays the same.
        learned_carry: start from parameters instead of zeros.
        precision: dtypes; the carry is float32 or wider.

    Raises:
        ValueError: a field is out of range.

    Example:
        The carry of one window is the start of the next one:

        >>> module = Recurrent(hidden_size=8, cell="gru", num_layers=2)
        >>> x = jnp.ones((3, 10, 4))
        >>> variables = module.init(jax.random.key(0), x)
        >>> first, carry = module.apply(variables, x[:, :6])
        >>> second, carry = module.apply(variables, x[:, 6:], carry=carry)
        >>> second.shape, sorted(carry)
        ((3, 4, 8), ['forward_0', 'forward_1'])

    References:
        Schuster and Paliwal 1997, IEEE Transactions on Signal Processing 45(11) (bidirectional);
        Zaremba, Sutskever and Vinyals 2014, arXiv:1409.2329 (dropout between layers); Gal and
        Ghahramani 2016, arXiv:1512.05287 (one mask for all steps).
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
        """Map [batch, time, channels] to [batch, time, hidden_size], twice that in two directions.

        Args:
            inputs: the sequences; what lies beyond their lengths has no influence.
            lengths: integer [batch] in [0, time], the number of steps of each sequence; the
                backward direction starts at the last of them. By default all steps count.
            carry: states to start from, as returned by an earlier call or by `zero_carry`.
            train: training mode, which drops out.

        Returns:
            Outputs, 0 beyond the lengths, and the states after the last step of each sequence:
            {"forward_0": (hidden,), ...}, or (hidden, memory) for an LSTM. In evaluation a
            sequence read window by window in one direction, each from the carry of the one
            before, gives the outputs of the whole.

        Raises:
            ValueError: inputs, lengths or carry that do not fit.
        """
        check_rank(inputs, self, layouts=["[batch, time, channels]"])
        if not inputs.shape[1]:
            raise ValueError(f"inputs of shape {inputs.shape} have no time step; give at least 1")
        self._check_carry(carry, inputs.shape[0])
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
            y = jnp.concatenate(outputs, axis=-1)
            x = x + y if self.residual and x.shape == y.shape else y
        return jnp.swapaxes(x, 0, 1).astype(self.precision.output), after

    def zero_carry(self, batch_size: int) -> StackCarry:
        """Return the carry of zeros, with which an empty history starts.

        Args:
            batch_size: number of sequences.

        Returns:
            {"forward_0": states, ...}.
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
        found = jax.tree.map(jnp.shape, carry)
        expected = jax.tree.map(jnp.shape, jax.eval_shape(lambda: self.zero_carry(batch_size)))
        if found != expected:
            raise ValueError(
                f"a carry of shapes {found} does not fit; for {batch_size} sequences give "
                f"{expected}, as returned by an earlier call or by zero_carry({batch_size})"
            )
