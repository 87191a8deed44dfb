"""The networks in plain Flax Linen, as in its examples and documentation."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
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


class PlainMLP(nn.Module):
    """Dense layers and ReLU."""

    network: Perceptron
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        for width in self.network.features:
            x = nn.relu(nn.Dense(width, dtype=self.dtype)(x))
        return nn.Dense(self.network.num_outputs, dtype=self.dtype)(x)


class PlainCNN(nn.Module):
    """Convolutions, ReLU and max pooling."""

    network: Convolutional
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        for width in self.network.channels:
            x = nn.relu(nn.Conv(width, (3, 3), dtype=self.dtype)(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        for width in self.network.features:
            x = nn.relu(nn.Dense(width, dtype=self.dtype)(x))
        return nn.Dense(self.network.num_outputs, dtype=self.dtype)(x)


class PlainResidualBlock(nn.Module):
    """Two convolutions with a shortcut."""

    features: int
    strides: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype
        )
        y = conv(self.features, (3, 3), self.strides, padding=1)(x)
        y = nn.relu(norm()(y))
        y = conv(self.features, (3, 3), padding=1)(y)
        y = norm(scale_init=nn.initializers.zeros_init())(y)
        if x.shape != y.shape:
            x = norm()(conv(self.features, (1, 1), self.strides)(x))
        return nn.relu(x + y)


class PlainResNet(nn.Module):
    """ResNet-18 for small images."""

    network: Residual
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        x = nn.Conv(self.network.width, (3, 3), padding=1, use_bias=False, dtype=self.dtype)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=self.dtype)(x)
        x = nn.relu(x)
        for features, strides in self.network.stages:
            x = PlainResidualBlock(features, strides, self.dtype)(x, train=train)
            x = PlainResidualBlock(features, 1, self.dtype)(x, train=train)
        return nn.Dense(self.network.num_outputs, dtype=self.dtype)(jnp.mean(x, axis=(1, 2)))


class PlainBlock(nn.Module):
    """A pre-norm block of attention and an MLP."""

    network: Blocks
    causal: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, time, width = x.shape
        heads = self.network.num_heads
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        h = nn.LayerNorm(dtype=self.dtype)(x)
        # [batch, time, 3, heads, head_dim]
        qkv = dense(3 * width)(h).reshape(batch, time, 3, heads, width // heads)
        h = jax.nn.dot_product_attention(
            qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], is_causal=self.causal
        )
        x = x + dense(width)(h.reshape(batch, time, width))
        h = nn.LayerNorm(dtype=self.dtype)(x)
        return x + dense(width)(nn.gelu(dense(4 * width)(h)))


class PlainGPT(nn.Module):
    """A causal transformer."""

    network: LanguageTransformer
    dtype: Any

    @nn.compact
    def __call__(self, tokens: jax.Array, *, train: bool = False) -> jax.Array:
        network, normal = self.network, nn.initializers.normal(0.02)
        embed = functools.partial(
            nn.Embed, features=network.width, embedding_init=normal, dtype=self.dtype
        )
        table = embed(network.num_outputs)
        x = table(tokens) + embed(network.context)(jnp.arange(tokens.shape[1])[None])
        for _ in range(network.num_layers):
            x = PlainBlock(network, True, self.dtype)(x)
        x = nn.LayerNorm(dtype=self.dtype)(x)
        if network.tied:
            return table.attend(x)
        return nn.Dense(network.num_outputs, use_bias=False, dtype=self.dtype)(x)


class PlainViT(nn.Module):
    """A transformer over patches."""

    network: Vision
    dtype: Any

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        network, normal = self.network, nn.initializers.normal(0.02)
        size = (network.patch, network.patch)
        x = nn.Conv(network.width, size, strides=size, padding="VALID", dtype=self.dtype)(images)
        x = x.reshape(x.shape[0], -1, network.width)  # [batch, patches, width]
        token = self.param("token", nn.initializers.zeros_init(), (1, 1, network.width))
        token = jnp.tile(token.astype(x.dtype), (x.shape[0], 1, 1))
        x = jnp.concatenate([token, x], axis=1)
        positions = self.param("positions", normal, (1, x.shape[1], network.width))
        x = x + positions.astype(x.dtype)
        for _ in range(network.num_layers):
            x = PlainBlock(network, False, self.dtype)(x)
        x = nn.LayerNorm(dtype=self.dtype)(x)
        return nn.Dense(network.num_outputs, dtype=self.dtype)(x[:, 0])


class PlainLSTM(nn.Module):
    """A recurrent language model."""

    network: RecurrentLanguage
    dtype: Any

    @nn.compact
    def __call__(self, tokens: jax.Array, *, train: bool = False) -> jax.Array:
        network = self.network
        x = nn.Embed(network.num_outputs, network.embedding, dtype=self.dtype)(tokens)
        for _ in range(network.num_layers):
            x = nn.RNN(nn.OptimizedLSTMCell(network.hidden, dtype=self.dtype))(x)
        return nn.Dense(network.num_outputs, dtype=self.dtype)(x)


class PlainGRU(nn.Module):
    """A GRU in both directions."""

    network: BidirectionalGRU
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        size = self.network.hidden
        forward = nn.RNN(nn.GRUCell(size, dtype=self.dtype))
        backward = nn.RNN(nn.GRUCell(size, dtype=self.dtype))
        x = jnp.asarray(nn.Bidirectional(forward, backward)(x))
        last = jnp.concatenate([x[:, -1, :size], x[:, 0, size:]], axis=-1)
        return nn.Dense(self.network.num_outputs, dtype=self.dtype)(last)


_MODULES: dict[type[Network], Any] = {
    Perceptron: PlainMLP,
    Convolutional: PlainCNN,
    Residual: PlainResNet,
    LanguageTransformer: PlainGPT,
    Vision: PlainViT,
    RecurrentLanguage: PlainLSTM,
    BidirectionalGRU: PlainGRU,
}


def build(network: Network, precision: str) -> nn.Module:
    """Return the module of an architecture."""
    return _MODULES[type(network)](network, jnp.dtype(precision))
