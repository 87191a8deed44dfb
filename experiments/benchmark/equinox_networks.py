"""The networks in Equinox, as in its examples: modules of one example, mapped over the batch.

All take and return a state, which only batch norms use.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from experiments.benchmark.architectures import (
    BidirectionalGRU,
    Blocks,
    Convolutional,
    LanguageTransformer,
    Network,
    Perceptron,
    RecurrentLanguage,
    Residual,
    Vision,
)

#: Name of the mapped axis over which batch norms average.
BATCH = "batch"


class MLP(eqx.Module):
    """Dense layers and ReLU."""

    layers: list[eqx.nn.Linear]

    def __init__(self, network: Perceptron, keys: Any) -> None:
        widths = (network.num_inputs, *network.features, network.num_outputs)
        self.layers = _dense(widths, keys)

    def __call__(self, x: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """Map [features]."""
        return _through(self.layers, x), state


def _dense(widths: Sequence[int], keys: Any) -> list[eqx.nn.Linear]:
    pairs = itertools.pairwise(widths)
    return [eqx.nn.Linear(before, after, key=next(keys)) for before, after in pairs]


def _through(layers: list[eqx.nn.Linear], x: jax.Array) -> jax.Array:
    for layer in layers[:-1]:
        x = jax.nn.relu(layer(x))
    return layers[-1](x)


class CNN(eqx.Module):
    """Convolutions, ReLU and max pooling."""

    convolutions: list[eqx.nn.Conv2d]
    layers: list[eqx.nn.Linear]

    def __init__(self, network: Convolutional, keys: Any) -> None:
        self.convolutions = [
            eqx.nn.Conv2d(before, after, 3, padding=1, key=next(keys))
            for before, after in itertools.pairwise((network.image[2], *network.channels))
        ]
        self.layers = _dense((network.num_flat, *network.features, network.num_outputs), keys)

    def __call__(self, x: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """Map [channels, height, width]."""
        for convolution in self.convolutions:
            x = eqx.nn.MaxPool2d(2, 2)(jax.nn.relu(convolution(x)))
        return _through(self.layers, x.ravel()), state


class Normalized(eqx.Module):
    """A convolution and a batch norm."""

    convolution: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm

    def __init__(self, before: int, after: int, size: int, stride: int, keys: Any) -> None:
        self.convolution = eqx.nn.Conv2d(
            before, after, size, stride, size // 2, use_bias=False, key=next(keys)
        )
        self.norm = eqx.nn.BatchNorm(after, BATCH, momentum=0.9, mode="batch")

    def __call__(self, x: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """Map [channels, height, width]."""
        return self.norm(self.convolution(x), state)


class ResidualBlock(eqx.Module):
    """Two convolutions with a shortcut."""

    first: Normalized
    second: Normalized
    shortcut: Normalized | None

    def __init__(self, before: int, after: int, stride: int, keys: Any) -> None:
        self.first = Normalized(before, after, 3, stride, keys)
        self.second = Normalized(after, after, 3, 1, keys)
        same = stride == 1 and before == after
        self.shortcut = None if same else Normalized(before, after, 1, stride, keys)

    def __call__(self, x: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """Map [channels, height, width]."""
        y, state = self.first(x, state)
        y, state = self.second(jax.nn.relu(y), state)
        if self.shortcut is not None:
            x, state = self.shortcut(x, state)
        return jax.nn.relu(x + y), state


class ResNet(eqx.Module):
    """ResNet-18 for small images."""

    stem: Normalized
    blocks: list[ResidualBlock]
    head: eqx.nn.Linear

    def __init__(self, network: Residual, keys: Any) -> None:
        width = network.width
        self.stem = Normalized(network.image[2], width, 3, 1, keys)
        self.blocks = []
        for features, stride in network.stages:
            self.blocks.append(ResidualBlock(width, features, stride, keys))
            self.blocks.append(ResidualBlock(features, features, 1, keys))
            width = features
        self.head = eqx.nn.Linear(width, network.num_outputs, key=next(keys))

    def __call__(self, x: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """Map [channels, height, width]."""
        x, state = self.stem(x, state)
        x = jax.nn.relu(x)
        for block in self.blocks:
            x, state = block(x, state)
        return self.head(jnp.mean(x, axis=(1, 2))), state


class Block(eqx.Module):
    """A pre-norm block of attention and an MLP."""

    norms: list[eqx.nn.LayerNorm]
    joined: eqx.nn.Linear
    projection: eqx.nn.Linear
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    heads: int = eqx.field(static=True)
    causal: bool = eqx.field(static=True)

    def __init__(self, network: Blocks, causal: bool, keys: Any) -> None:
        width = network.width
        self.heads, self.causal = network.num_heads, causal
        self.norms = [eqx.nn.LayerNorm(width, eps=1e-6) for _ in range(2)]
        self.joined = eqx.nn.Linear(width, 3 * width, key=next(keys))
        self.projection = eqx.nn.Linear(width, width, key=next(keys))
        self.up = eqx.nn.Linear(width, 4 * width, key=next(keys))
        self.down = eqx.nn.Linear(4 * width, width, key=next(keys))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [time, features]."""
        time, width = x.shape
        h = jax.vmap(self.norms[0])(x)
        joined = jax.vmap(self.joined)(h).reshape(time, 3, self.heads, width // self.heads)
        h = jax.nn.dot_product_attention(
            joined[:, 0], joined[:, 1], joined[:, 2], is_causal=self.causal
        )
        x = x + jax.vmap(self.projection)(h.reshape(time, width))
        h = jax.nn.gelu(jax.vmap(self.up)(jax.vmap(self.norms[1])(x)))
        return x + jax.vmap(self.down)(h)


class GPT(eqx.Module):
    """A causal transformer."""

    tokens: eqx.nn.Embedding
    positions: eqx.nn.Embedding
    blocks: list[Block]
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, network: LanguageTransformer, keys: Any) -> None:
        width = network.width
        self.tokens = eqx.nn.Embedding(network.num_outputs, width, key=next(keys))
        self.positions = eqx.nn.Embedding(network.context, width, key=next(keys))
        self.blocks = [Block(network, True, keys) for _ in range(network.num_layers)]
        self.norm = eqx.nn.LayerNorm(width, eps=1e-6)
        self.head = eqx.nn.Linear(width, network.num_outputs, use_bias=False, key=next(keys))

    def __call__(self, tokens: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """Map [time]."""
        x = jax.vmap(self.tokens)(tokens) + jax.vmap(self.positions)(jnp.arange(len(tokens)))
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.head)(jax.vmap(self.norm)(x)), state


class ViT(eqx.Module):
    """A transformer over patches."""

    patches: eqx.nn.Conv2d
    token: jax.Array
    positions: jax.Array
    blocks: list[Block]
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, network: Vision, keys: Any) -> None:
        width, patch = network.width, network.patch
        self.patches = eqx.nn.Conv2d(network.image[2], width, patch, patch, key=next(keys))
        self.token = jnp.zeros((1, width))
        self.positions = 0.02 * jax.random.normal(next(keys), (network.num_patches + 1, width))
        self.blocks = [Block(network, False, keys) for _ in range(network.num_layers)]
        self.norm = eqx.nn.LayerNorm(width, eps=1e-6)
        self.head = eqx.nn.Linear(width, network.num_outputs, key=next(keys))

    def __call__(self, image: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """Map [channels, height, width]."""
        x = self.patches(image).reshape(self.token.shape[1], -1).T
        x = jnp.concatenate([self.token, x]) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[0])), state


class LSTM(eqx.Module):
    """A recurrent language model."""

    tokens: eqx.nn.Embedding
    cells: list[eqx.nn.LSTMCell]
    head: eqx.nn.Linear

    def __init__(self, network: RecurrentLanguage, keys: Any) -> None:
        self.tokens = eqx.nn.Embedding(network.num_outputs, network.embedding, key=next(keys))
        widths = (network.embedding, *[network.hidden] * network.num_layers)
        self.cells = [
            eqx.nn.LSTMCell(before, after, key=next(keys))
            for before, after in itertools.pairwise(widths)
        ]
        self.head = eqx.nn.Linear(network.hidden, network.num_outputs, key=next(keys))

    def __call__(self, tokens: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """Map [time]."""
        x = jax.vmap(self.tokens)(tokens)
        for cell in self.cells:

            def advance(carry: Any, x: jax.Array, cell: Any = cell) -> Any:
                carry = cell(x, carry)
                return carry, carry[0]

            zeros = jnp.zeros(cell.hidden_size)
            x = jax.lax.scan(advance, (zeros, zeros), x)[1]
        return jax.vmap(self.head)(x), state


class GRU(eqx.Module):
    """A GRU in both directions."""

    cells: list[eqx.nn.GRUCell]
    head: eqx.nn.Linear

    def __init__(self, network: BidirectionalGRU, keys: Any) -> None:
        size = network.hidden
        self.cells = [eqx.nn.GRUCell(network.channels, size, key=next(keys)) for _ in range(2)]
        self.head = eqx.nn.Linear(2 * size, network.num_outputs, key=next(keys))

    def __call__(self, frames: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """Map [time, channels]."""
        last = []
        for cell, reverse in zip(self.cells, (False, True), strict=True):

            def advance(carry: Any, x: jax.Array, cell: Any = cell) -> Any:
                return cell(x, carry), None

            zeros = jnp.zeros(cell.hidden_size)
            last.append(jax.lax.scan(advance, zeros, frames, reverse=reverse)[0])
        return self.head(jnp.concatenate(last)), state


_MODULES: dict[type[Network], Callable[..., Any]] = {
    Perceptron: MLP,
    Convolutional: CNN,
    Residual: ResNet,
    LanguageTransformer: GPT,
    Vision: ViT,
    RecurrentLanguage: LSTM,
    BidirectionalGRU: GRU,
}


def build(network: Network, seed: int) -> tuple[Any, Any]:
    """Return the module of an architecture, and its state."""
    keys = (jax.random.fold_in(jax.random.key(seed), index) for index in itertools.count())
    return eqx.nn.make_with_state(_MODULES[type(network)])(network, keys)
