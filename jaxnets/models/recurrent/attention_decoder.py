"""Recurrent decoders that attend to what an encoder has read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxnets.core import Precision, at_least_float32
from jaxnets.functional.matmul import linear
from jaxnets.functional.recurrence import scan
from jaxnets.functional.recurrence.scan import Carry, Cell
from jaxnets.layers import Dense, Dropout
from jaxnets.models.recurrent.layers import Recurrent, cell_weights

#: What a decoder knows: of the source "memory" [batch, source, channels], "keys" [batch, source,
#: hidden_size] and "valid" bool [batch, source]; the "states" of its layers, a tuple of cell
#: states; and with input feeding "fed" [batch, hidden_size], its last output.
DecoderCarry: TypeAlias = Mapping[str, Any]
#: (states of the layers, projected input, what is fed in) -> states after the step.
Advance: TypeAlias = Callable[[tuple[Carry, ...], jax.Array, jax.Array], tuple[Carry, ...]]


def attend(
    query: jax.Array,
    keys: jax.Array,
    memory: jax.Array,
    valid: jax.Array,
    *,
    energy: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Take the mean of a memory, weighted by how well its keys fit the queries.

    The weights are the softmax over the source of v . tanh(query + key) with a vector v
    (Bahdanau), or without one of query . key (Luong).

    Args:
        query: [batch, target, features].
        keys: [batch, source, features].
        memory: [batch, source, channels].
        valid: bool [batch, source]; where it is False the weight is 0.
        energy: the vector v, [features].

    Returns:
        Contexts [batch, target, channels] of the dtype of `memory`, and the weights
        [batch, target, source], float32 or wider; both 0 where nothing is valid.

    Example:
        >>> keys, valid = jnp.eye(2)[None], jnp.array([[True, False]])
        >>> context, weights = attend(jnp.zeros((1, 1, 2)), keys, keys, valid)
        >>> context.tolist(), weights.tolist()
        ([[[1.0, 0.0]]], [[[1.0, 0.0]]])

    References:
        Bahdanau, Cho and Bengio 2014, arXiv:1409.0473, appendix A.1.2; Luong, Pham and Manning
        2015, arXiv:1508.04025, equations 7 and 8.
    """
    if energy is None:
        scores = jnp.einsum("btf,bsf->bts", query, keys)
    else:
        scores = linear(jnp.tanh(query[:, :, None] + keys[:, None]), energy[:, None])[..., 0]
    scores, seen = at_least_float32(scores), valid[:, None]
    scores = jnp.where(seen, scores, jnp.finfo(scores.dtype).min)
    weights = jnp.where(seen, jax.nn.softmax(scores), jnp.zeros((), scores.dtype))
    return jnp.einsum("bts,bsc->btc", weights.astype(memory.dtype), memory), weights


class FedLayers(nn.Module):
    """A stack of recurrent layers into which each step feeds what it made of the one before.

    Attributes:
        hidden_size: size of the state of each layer.
        cell: the step.
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
        self, words: jax.Array, fed_size: int, *, train: bool = False
    ) -> tuple[jax.Array, Advance]:
        """Project the words of all steps at once and bind the weights.

        Args:
            words: [time, batch, channels].
            fed_size: number of features fed in at each step.
            train: training mode.

        Returns:
            The projected words [time, batch, packed], and the function of one step.
        """
        size, policy, cell = self.hidden_size, self.precision, self.cell
        layers, masks = [], []
        for index in range(self.num_layers):
            channels = size if index else words.shape[-1]
            weights = CellWeights(cell, channels, size, precision=policy, name=f"layer_{index}")
            layers.append(weights())
            if index:
                ones = jnp.ones((words.shape[1], size), policy.compute)
                dropout = Dropout(self.dropout_rate, name=f"dropout_{index}")
                masks.append(dropout(ones, train=train))
        feed = _kernel(self, "feed_kernel", (fed_size, cell.num_gates * size))

        def advance(
            states: tuple[Carry, ...], projected: jax.Array, fed: jax.Array
        ) -> tuple[Carry, ...]:
            x, after = projected + fed.astype(policy.compute) @ feed, list[Carry]()
            for index, (weights, state) in enumerate(zip(layers, states, strict=True)):
                if index:
                    below = after[-1][0].astype(policy.compute) * masks[index - 1]
                    x = cell.project(weights, below)
                after.append(cell.step(weights, state, at_least_float32(x)))
            return tuple(after)

        return cell.project(layers[0], words), advance


class CellWeights(nn.Module):
    """The weights of one cell under a name of their own.

    Attributes:
        cell: lists its weights.
        num_channels: number of input channels.
        hidden_size: size of the state.
        precision: dtypes.
    """

    cell: Cell
    num_channels: int
    hidden_size: int
    precision: Precision = Precision()

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        """Return {name: array of the compute dtype}."""
        return cell_weights(
            self, self.cell, self.num_channels, self.hidden_size, precision=self.precision
        )


class BahdanauDecoder(nn.Module):
    """Recurrent layers, each step of which looks for its context with the state before it.

    e_s = v . tanh(W h_(t-1) + key_s); context c_t = softmax(e) memory; h_t = layers(word_t, c_t,
    h_(t-1)); output tanh(R [h_t, c_t, word_t] + b).

    Attributes:
        hidden_size: size of the state of each layer, and of the output.
        cell: the step.
        num_layers: number of layers; the last one looks, the first one gets the context.
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
        words: jax.Array,
        carry: DecoderCarry,
        lengths: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> tuple[jax.Array, jax.Array, DecoderCarry]:
        """Map words [batch, target, channels] to outputs, attention weights and the carry.

        Args:
            words: vectors of the words before each prediction.
            carry: the source, and the states to start from.
            lengths: integer [batch] in [0, target]; words beyond it leave the carry as it is.
            train: training mode.

        Returns:
            Outputs [batch, target, hidden_size], weights [batch, target, source], the carry.
        """
        size, policy, memory = self.hidden_size, self.precision, carry["memory"]
        words, valid = _time_first(words, lengths)
        query = _kernel(self, "query_kernel", (size, size))
        energy = _kernel(self, "energy_kernel", (size, 1))[:, 0]
        layers = FedLayers(
            size, self.cell, self.num_layers, self.dropout_rate, policy, name="layers"
        )
        projected, advance = layers(words, memory.shape[-1], train=train)

        def step(
            states: tuple[Carry, ...], projected: jax.Array
        ) -> tuple[tuple[Carry, ...], tuple[jax.Array, ...]]:
            sought = states[-1][0].astype(policy.compute) @ query
            context, weights = attend(
                sought[:, None], carry["keys"], memory, carry["valid"], energy=energy
            )
            states = advance(states, projected, context[:, 0])
            return states, (states[-1][0].astype(policy.compute), context[:, 0], weights[:, 0])

        states, (hidden, contexts, weights) = _loop(step, carry["states"], projected, valid)
        seen = jnp.concatenate([hidden, contexts, words], axis=-1)
        outputs = jnp.tanh(Dense(size, precision=policy, name="readout")(seen))
        return _batch_first(outputs), _batch_first(weights), {**carry, "states": states}


class LuongDecoder(nn.Module):
    """Recurrent layers, each step of which looks for its context with the state after it.

    h_t = layers(word_t, h_(t-1)); e_s = h_t . key_s; context c_t = softmax(e) memory; output
    o_t = tanh(R [h_t, c_t]). With input feeding h_t depends on o_(t-1) too; without it nothing
    but the layers runs step by step.

    Attributes:
        hidden_size: size of the state of each layer, and of the output.
        cell: the step.
        num_layers: number of layers; the last one looks.
        input_feeding: feed the output of each step to the first layer at the next one.
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
        words: jax.Array,
        carry: DecoderCarry,
        lengths: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> tuple[jax.Array, jax.Array, DecoderCarry]:
        """Map words [batch, target, channels] to outputs, attention weights and the carry.

        Args:
            words: vectors of the words before each prediction.
            carry: the source, and the states to start from.
            lengths: integer [batch] in [0, target]; words beyond it leave the carry as it is.
            train: training mode.

        Returns:
            Outputs [batch, target, hidden_size], weights [batch, target, source], the carry.
        """
        size, policy, memory = self.hidden_size, self.precision, carry["memory"]
        readout = _kernel(self, "readout_kernel", (size + memory.shape[-1], size))

        def read(hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
            hidden = hidden.astype(policy.compute)
            context, weights = attend(hidden, carry["keys"], memory, carry["valid"])
            return jnp.tanh(linear(jnp.concatenate([hidden, context], -1), readout)), weights

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
            hidden, last = stack(words, lengths, carry=start, train=train)
            outputs, weights = read(hidden)
            return outputs, weights, {**carry, "states": tuple(last[name] for name in names)}

        words, valid = _time_first(words, lengths)
        layers = FedLayers(
            size, self.cell, self.num_layers, self.dropout_rate, policy, name="layers"
        )
        projected, advance = layers(words, size, train=train)

        def step(
            state: tuple[tuple[Carry, ...], jax.Array], projected: jax.Array
        ) -> tuple[tuple[tuple[Carry, ...], jax.Array], tuple[jax.Array, jax.Array]]:
            states, fed = state
            states = advance(states, projected, fed)
            output, weights = read(states[-1][0][:, None])
            return (states, output[:, 0]), (output[:, 0], weights[:, 0])

        before = (carry["states"], carry["fed"])
        (states, fed), (outputs, weights) = _loop(step, before, projected, valid)
        after = {**carry, "states": states, "fed": fed}
        return _batch_first(outputs), _batch_first(weights), after


def _loop(
    step: Callable[..., Any], carry: Any, projected: jax.Array, valid: jax.Array | None
) -> Any:
    """Scan a step that leaves the carry as it is where not valid."""

    def advance(carry: Any, inputs: tuple[jax.Array, jax.Array | None]) -> tuple[Any, Any]:
        after, outputs = step(carry, inputs[0])
        return scan.keep(inputs[1], after, carry), outputs

    return lax.scan(advance, carry, (projected, valid))


def _time_first(words: jax.Array, lengths: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    words = jnp.swapaxes(words, 0, 1)
    return (words, None) if lengths is None else scan.mask_padding(words, lengths)


def _batch_first(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, 0, 1)


def _kernel(module: Any, name: str, shape: tuple[int, int]) -> jax.Array:
    policy, initializer = module.precision, nn.initializers.lecun_normal()
    return module.param(name, initializer, shape, policy.parameter).astype(policy.compute)
