"""Small models with the decoding protocol, for the tests of generation and beam search."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from checks import shapes_of

from jaxnets.layers import Dense, Embedding
from jaxnets.models.recurrent import Recurrent

extend_calls = []  # shape of the tokens, for each time that `TableModel.extend` was traced


class TableModel(nn.Module):
    """A second-order Markov model: the logits are a table's row for the last two tokens.

    The table is [vocabulary + 1, vocabulary + 1, vocabulary]; the last index means no token. The
    carry counts the calls, and the tokens of each row against its capacity.
    """

    vocabulary_size: int

    def setup(self):
        rows = self.vocabulary_size + 1
        shape = (rows, rows, self.vocabulary_size)
        self.table = self.param("table", nn.initializers.normal(2.0), shape)

    def __call__(self, tokens, lengths=None, *, train=False):
        nothing = jnp.full((tokens.shape[0], 1), self.vocabulary_size)
        before = jnp.concatenate([nothing, tokens[:, :-1]], axis=1)
        return self.table[before, tokens]

    def start(self, batch_size, capacity):
        return {
            "last": jnp.full((batch_size, 2), self.vocabulary_size, jnp.int32),
            "position": jnp.zeros(batch_size, jnp.int32),
            "room": jnp.full(batch_size, capacity, jnp.int32),
            "calls": jnp.zeros(batch_size, jnp.int32),
        }

    def extend(self, tokens, carry, lengths=None):
        extend_calls.append(tokens.shape)
        batch, time = tokens.shape
        history = jnp.concatenate([carry["last"], tokens], axis=1)
        logits = self.table[history[:, 1:-1], history[:, 2:]]
        if lengths is None:
            lengths = jnp.full(batch, time)
        position = carry["position"] + lengths
        full = position > carry["room"]
        last = jnp.take_along_axis(history, lengths[:, None] + jnp.arange(2)[None], axis=1)
        next_carry = {
            "last": last,
            "position": position,
            "room": carry["room"],
            "calls": carry["calls"] + 1,
        }
        return jnp.where(full[:, None, None], jnp.nan, logits), next_carry


class TinyRecurrentModel(nn.Module):
    """A GRU language model."""

    vocabulary_size: int

    def setup(self):
        self.embedding = Embedding(self.vocabulary_size, 4, nn.initializers.normal(1.0))
        self.recurrent = Recurrent(5, cell="gru")
        self.head = Dense(self.vocabulary_size, kernel_init=nn.initializers.normal(1.5))

    def __call__(self, tokens, lengths=None, *, carry=None, train=False):
        outputs, next_carry = self.recurrent(
            self.embedding(tokens), lengths, carry=carry, train=train
        )
        logits = self.head(outputs)
        return logits if carry is None else (logits, next_carry)

    def start(self, batch_size, capacity):
        return self.recurrent.zero_carry(batch_size)

    def extend(self, tokens, carry, lengths=None):
        return self(tokens, lengths, carry=carry)


class EncodedSource(nn.Module):
    """A sequence-to-sequence model: the sum over the source's tokens shifts a table's logits."""

    vocabulary_size: int

    def setup(self):
        shape = (self.vocabulary_size, self.vocabulary_size)
        self.table = self.param("table", nn.initializers.normal(2.0), shape)
        self.source = self.param("source", nn.initializers.normal(2.0), shape)

    def __call__(self, inputs, decoder_inputs, lengths=None, *, train=False):
        shift = self.start(inputs, lengths, 0)["shift"]
        return self.table[decoder_inputs] + shift[:, None]

    def start(self, source, lengths, capacity):
        valid = jnp.arange(source.shape[1])[None] < lengths[:, None]
        return {"shift": jnp.sum(jnp.where(valid[..., None], self.source[source], 0), axis=1)}

    def extend(self, tokens, carry, lengths=None):
        return self.table[tokens] + carry["shift"][:, None], carry


@functools.partial(jax.jit, static_argnums=0)
def forward(module, variables, *inputs):
    """The full forward pass, compiled once for each shape."""
    return module.apply(variables, *inputs)


def next_log_probabilities(module, variables, text, size=16):
    """Next-token log-probabilities after each token of a text, [time, vocabulary]."""
    if isinstance(module, TableModel):
        table = np.asarray(variables["params"]["table"])
        return log_softmax(table[[module.vocabulary_size, *text[:-1]], list(text)])
    padded = np.zeros((1, size), np.int32)
    padded[0, : len(text)] = text
    return log_softmax(forward(module, variables, padded))[0, : len(text)]


def made(module, *inputs, seed=0):
    """Return random variables without compiling the initializers."""
    shapes, _ = shapes_of(module, *inputs)
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(1.5 * random.normal(size=x.shape), x.dtype), shapes)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
