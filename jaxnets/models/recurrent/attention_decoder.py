"""Recurrent decoders with attention to an encoder's outputs: Bahdanau 2014 and Luong 2015.

`translator.py` is the model around them. The equations of the cells are in
`jaxnets/functional/recurrence/cells.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxnets.core import (
    Precision,
    at_least_float32,
    drawn_in_float32,
    is_narrow,
    widened,
)
from jaxnets.functional.matmul import linear
from jaxnets.functional.recurrence import scan
from jaxnets.functional.recurrence.scan import Carry, Cell
from jaxnets.layers import Dense, Dropout
from jaxnets.models.recurrent.layers import Recurrent, cell_weights

#: Encoder outputs "memory" [batch, source, channels], their projection "keys" [batch, source,
#: hidden_size] and the padding mask "valid" bool [batch, source]; the decoder's "states", a tuple
#: with the carry of each layer; with input feeding the last output, "input_feed" [batch,
#: hidden_size].
DecoderCarry: TypeAlias = Mapping[str, Any]
#: (carry of each layer, projected input, feed) -> carry of each layer after the step.
DecoderStep: TypeAlias = Callable[[tuple[Carry, ...], jax.Array, jax.Array], tuple[Carry, ...]]


def cross_attention(
    query: jax.Array,
    keys: jax.Array,
    memory: jax.Array,
    valid: jax.Array,
    *,
    energy: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Average the encoder outputs by attention probabilities: additive or multiplicative.

    The probabilities are the softmax over the source of v . tanh(query + key) (additive, Bahdanau)
    or, without the vector v, of query . key (multiplicative, Luong). Corresponds to
    `keras.layers.AdditiveAttention` and `keras.layers.Attention`.

    Args:
        query: [batch, target, features].
        keys: [batch, source, features].
        memory: the values, [batch, source, channels].
        valid: padding mask, bool [batch, source]; the probability is 0 where it is False.
        energy: the vector v, [features].

    Returns:
        Contexts [batch, target, channels] of the dtype of `memory`, and the probabilities
        [batch, target, source], float32 or wider; both are 0 where no key is valid.

    Example:
        >>> keys, valid = jnp.eye(2)[None], jnp.array([[True, False]])
        >>> context, probabilities = cross_attention(jnp.zeros((1, 1, 2)), keys, keys, valid)
        >>> context.tolist(), probabilities.tolist()
        ([[[1.0, 0.0]]], [[[1.0, 0.0]]])

    References:
        Bahdanau, Cho and Bengio 2014, arXiv:1409.0473, appendix A.1.2; Luong, Pham and Manning
        2015, arXiv:1508.04025, equations 7 and 8.
    """
    if energy is None:
        scores = jnp.einsum("btf,bsf->bts", query, keys)  # [batch, target, source]
    else:
        hidden = jnp.tanh(query[:, :, None] + keys[:, None])  # [batch, target, source, features]
        scores = linear(hidden, energy[:, None])[..., 0]  # [batch, target, source]
    scores, mask = at_least_float32(scores), valid[:, None]  # mask: [batch, 1, source]
    scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    probabilities = jnp.where(mask, jax.nn.softmax(scores), jnp.zeros((), scores.dtype))
    # [batch, target, channels]
    context = jnp.einsum("bts,bsc->btc", probabilities.astype(memory.dtype), memory)
    return context, probabilities


class DecoderStack(nn.Module):
    """A stack of recurrent layers whose first one gets a further input, the feed, at each step.

    The feed is what attention computed: the context (Bahdanau) or the previous output (Luong's
    input feeding). Since it is only known inside the loop, the caller scans the step function.

    Attributes:
        hidden_size: size of the state of each layer.
        cell: the recurrent cell.
        num_layers: number of layers.
        dropout_rate: dropout between layers, one mask for all steps, in [0, 1).
        precision: dtypes.
    """

    hidden_size: int
    cell: Cell
    num_layers: int
    dropout_rate: float
    precision: Precision = Precision()

    @nn.compact
    def __call__(
        self, inputs: jax.Array, feed_size: int, *, train: bool = False
    ) -> tuple[jax.Array, DecoderStep]:
        """Project the inputs of all steps at once and bind the weights.

        Args:
            inputs: [time, batch, channels].
            feed_size: size of the feed.
            train: training mode.

        Returns:
            The projected inputs [time, batch, num_gates * hidden_size], and the step function.
        """
        size, policy, cell = self.hidden_size, self.precision, self.cell
        layers, masks = [], []
        for index in range(self.num_layers):
            channels = size if index else inputs.shape[-1]
            weights = CellWeights(cell, channels, size, precision=policy, name=f"layer_{index}")
            layers.append(weights(inputs.shape))
            if index:
                ones = jnp.ones((inputs.shape[1], size), policy.compute)
                dropout = Dropout(self.dropout_rate, name=f"dropout_{index}")
                masks.append(dropout(ones, train=train))
        feed_kernel = _kernel(self, "feed_kernel", (feed_size, cell.num_gates * size))

        def step(
            states: tuple[Carry, ...], projected: jax.Array, feed: jax.Array
        ) -> tuple[Carry, ...]:
            x, after = projected + feed.astype(policy.compute) @ feed_kernel, list[Carry]()
            for index, (weights, state) in enumerate(zip(layers, states, strict=True)):
                if index:
                    below = after[-1][0].astype(policy.compute) * masks[index - 1]
                    x = cell.project(weights, below)
                after.append(cell.step(weights, state, at_least_float32(x)))
            return tuple(after)

        return cell.project(layers[0], inputs), step


class CellWeights(nn.Module):
    """The weights of one cell, declared in a scope of their own.

    Attributes:
        cell: the recurrent cell.
        num_channels: number of input channels.
        hidden_size: size of the state.
        precision: dtypes.
    """

    cell: Cell
    num_channels: int
    hidden_size: int
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, inputs: tuple[int, ...]) -> dict[str, jax.Array]:
        """Return {name: array of the compute dtype}; the shape of the inputs is for an error."""
        sizes, policy = (self.num_channels, self.hidden_size), self.precision
        return cell_weights(self, self.cell, *sizes, precision=policy, inputs=inputs)


class BahdanauDecoder(nn.Module):
    """Recurrent decoder with additive attention; the query is the state before the step.

    e_s = v . tanh(W h_(t-1) + key_s); context c_t = softmax(e) memory; h_t = layers(x_t, c_t,
    h_(t-1)); output tanh(R [h_t, c_t, x_t] + b), for the embedding x_t of the previous token.

    Attributes:
        hidden_size: size of the state of each layer, and of the output.
        cell: the recurrent cell.
        num_layers: number of layers; the last one gives the query, the first one gets the context.
        dropout_rate: dropout between layers.
        precision: dtypes; the states are float32 or wider.
    """

    hidden_size: int
    cell: Cell
    num_layers: int
    dropout_rate: float = 0.0
    precision: Precision = Precision()

    @nn.compact
    def __call__(
        self,
        inputs: jax.Array,
        carry: DecoderCarry,
        lengths: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> tuple[jax.Array, jax.Array, DecoderCarry]:
        """Map embeddings [batch, target, channels] to outputs, attention and the carry.

        Args:
            inputs: embeddings of the previous tokens; in training the true ones (teacher forcing).
            carry: the encoder outputs and the initial states.
            lengths: integer [batch] in [0, target]; steps beyond them leave the carry unchanged.
            train: training mode.

        Returns:
            Outputs [batch, target, hidden_size], attention probabilities [batch, target, source],
            the carry.
        """
        size, policy, memory = self.hidden_size, self.precision, carry["memory"]
        inputs, valid = _time_major(inputs, lengths)
        query_kernel = _kernel(self, "query_kernel", (size, size))
        energy = _kernel(self, "energy_kernel", (size, 1))[:, 0]
        layers = DecoderStack(
            size, self.cell, self.num_layers, self.dropout_rate, policy, name="layers"
        )
        projected, layers_step = layers(inputs, memory.shape[-1], train=train)

        def step(
            states: tuple[Carry, ...], projected: jax.Array
        ) -> tuple[tuple[Carry, ...], tuple[jax.Array, ...]]:
            query = states[-1][0].astype(policy.compute) @ query_kernel
            context, attention = cross_attention(
                query[:, None], carry["keys"], memory, carry["valid"], energy=energy
            )
            states = layers_step(states, projected, context[:, 0])
            return states, (states[-1][0].astype(policy.compute), context[:, 0], attention[:, 0])

        results = _masked_scan(step, carry["states"], projected, valid)
        states, (hidden, contexts, attention) = results
        # [target, batch, hidden_size + memory channels + channels]
        features = jnp.concatenate([hidden, contexts, inputs], axis=-1)
        outputs = jnp.tanh(Dense(size, precision=policy, name="readout")(features))
        return _batch_major(outputs), _batch_major(attention), {**carry, "states": states}


class LuongDecoder(nn.Module):
    """Recurrent decoder with multiplicative attention; the query is the state after the step.

    h_t = layers(x_t, h_(t-1)); e_s = h_t . key_s; context c_t = softmax(e) memory; output
    o_t = tanh(R [h_t, c_t]), for the embedding x_t of the previous token. With input feeding h_t
    also depends on o_(t-1). Without it only the layers run step by step, and attention takes all
    steps at once.

    Attributes:
        hidden_size: size of the state of each layer, and of the output.
        cell: the recurrent cell.
        num_layers: number of layers; the last one gives the query.
        input_feeding: feed the output of each step to the first layer at the next step.
        dropout_rate: dropout between layers.
        precision: dtypes; the states are float32 or wider.
    """

    hidden_size: int
    cell: Cell
    num_layers: int
    input_feeding: bool = True
    dropout_rate: float = 0.0
    precision: Precision = Precision()

    @nn.compact
    def __call__(
        self,
        inputs: jax.Array,
        carry: DecoderCarry,
        lengths: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> tuple[jax.Array, jax.Array, DecoderCarry]:
        """Map embeddings [batch, target, channels] to outputs, attention and the carry.

        Args:
            inputs: embeddings of the previous tokens; in training the true ones (teacher forcing).
            carry: the encoder outputs and the initial states.
            lengths: integer [batch] in [0, target]; steps beyond them leave the carry unchanged.
            train: training mode.

        Returns:
            Outputs [batch, target, hidden_size], attention probabilities [batch, target, source],
            the carry.
        """
        size, policy, memory = self.hidden_size, self.precision, carry["memory"]
        readout_kernel = _kernel(self, "readout_kernel", (size + memory.shape[-1], size))

        def readout(hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
            hidden = hidden.astype(policy.compute)  # [batch, target, hidden_size]
            context, attention = cross_attention(hidden, carry["keys"], memory, carry["valid"])
            features = jnp.concatenate([hidden, context], -1)
            return jnp.tanh(linear(features, readout_kernel)), attention

        if not self.input_feeding:
            stack = Recurrent(
                size,
                cell=self.cell,
                num_layers=self.num_layers,
                dropout_rate=self.dropout_rate,
                locked_dropout=True,
                precision=policy,
                name="layers",
            )
            names = [f"forward_{index}" for index in range(self.num_layers)]
            start = dict(zip(names, carry["states"], strict=True))
            hidden, last = stack(inputs, lengths, carry=start, train=train)
            outputs, attention = readout(hidden)
            return outputs, attention, {**carry, "states": tuple(last[name] for name in names)}

        inputs, valid = _time_major(inputs, lengths)
        layers = DecoderStack(
            size, self.cell, self.num_layers, self.dropout_rate, policy, name="layers"
        )
        projected, layers_step = layers(inputs, size, train=train)

        def step(
            state: tuple[tuple[Carry, ...], jax.Array], projected: jax.Array
        ) -> tuple[tuple[tuple[Carry, ...], jax.Array], tuple[jax.Array, jax.Array]]:
            states, feed = state
            states = layers_step(states, projected, feed)
            output, attention = readout(states[-1][0][:, None])
            return (states, output[:, 0]), (output[:, 0], attention[:, 0])

        initial = (carry["states"], carry["input_feed"])
        (states, feed), (outputs, attention) = _masked_scan(step, initial, projected, valid)
        after = {**carry, "states": states, "input_feed": feed}
        return _batch_major(outputs), _batch_major(attention), after


def _masked_scan(
    step: Callable[..., Any], carry: Any, projected: jax.Array, valid: jax.Array | None
) -> Any:
    """Scan a step over time, leaving the carry unchanged where a step is not valid.

    The gradients of what a step closes over, its weights and the memory, add up over time in their
    dtype, so narrow arrays enter the loop in float32.
    """
    constants: list[jax.Array] = []
    if is_narrow(projected):
        step, constants = jax.closure_convert(step, carry, projected[0])
    wide = widened(constants)

    def masked_step(carry: Any, inputs: tuple[jax.Array, jax.Array | None]) -> tuple[Any, Any]:
        narrow = [array.astype(one.dtype) for array, one in zip(wide, constants, strict=True)]
        after, outputs = step(carry, inputs[0], *narrow)
        return scan.select_valid(inputs[1], after, carry), outputs

    return lax.scan(masked_step, carry, (projected, valid))


def _time_major(inputs: jax.Array, lengths: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    inputs = jnp.swapaxes(inputs, 0, 1)  # [time, batch, channels]
    return (inputs, None) if lengths is None else scan.mask_padding(inputs, lengths)


def _batch_major(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, 0, 1)  # [batch, time, ...]


def _kernel(module: Any, name: str, shape: tuple[int, int]) -> jax.Array:
    policy, initializer = module.precision, nn.initializers.lecun_normal()
    return module.param(name, drawn_in_float32(initializer), shape, policy.parameter).astype(
        policy.compute
    )
