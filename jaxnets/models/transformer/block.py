"""One block of a transformer: attention and a feed-forward network, each on a residual branch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnets.core import Precision, record
from jaxnets.functional.activations import activation
from jaxnets.functional.attention.dot_product import dot_product_attention
from jaxnets.functional.attention.positions import rotary
from jaxnets.functional.attention.scores import apply_attention_weights, attention_weights
from jaxnets.layers import Dense, Dropout, LayerNorm, RMSNorm
from jaxnets.models.transformer.config import BlockConfig

#: Keys and values of one layer, {"key": [batch, time, kv_heads, head_dim], ...}, or {} for none.
LayerCache: TypeAlias = Mapping[str, jax.Array]


def make_norm(config: BlockConfig, precision: Precision, name: str | None = None) -> nn.Module:
    """Build the norm that a config asks for."""
    kind = LayerNorm if config.norm == "layer" else RMSNorm
    return kind(epsilon=config.norm_epsilon, precision=precision, name=name)


class Attention(nn.Module):
    """Attention with its four projections; keys and values are made apart, so they can be kept.

    Attributes:
        config: the block's options.
        residual_scale: factor of the standard deviation of the output's initial matrix.
        precision: dtypes; the softmax is float32 or wider.
    """

    config: BlockConfig
    residual_scale: float = 1.0
    precision: Precision = Precision()

    def setup(self) -> None:
        config, heads = self.config, self.config.kv_heads
        dense = functools.partial(Dense, precision=self.precision)
        inner = functools.partial(dense, kernel_init=config.kernel_init())
        self.query = inner(config.num_heads * config.dim_per_head, use_bias=config.use_bias)
        self.key = inner(heads * config.dim_per_head, use_bias=config.key_bias)
        self.value = inner(heads * config.dim_per_head, use_bias=config.use_bias)
        self.output = dense(
            config.features,
            use_bias=config.use_bias,
            kernel_init=config.kernel_init(self.residual_scale),
        )
        if config.qk_norm:
            self.query_norm = RMSNorm(config.norm_epsilon, self.precision)
            self.key_norm = RMSNorm(config.norm_epsilon, self.precision)
        self.dropout = Dropout(config.attention_dropout_rate)

    def keys_values(self, x: jax.Array, *, positions: jax.Array | None = None) -> LayerCache:
        """Make {"key": ..., "value": ...}, each [batch, time, heads, head_dim].

        Args:
            x: [batch, time, features].
            positions: integer [batch or 1, time]; None leaves rotary positions out.
        """
        shape = (*x.shape[:2], self.config.kv_heads, self.config.dim_per_head)
        key = self.key(x).reshape(shape)
        if self.config.qk_norm:
            key = self.key_norm(key)
        return {"key": self._turn(key, positions), "value": self.value(x).reshape(shape)}

    def __call__(
        self,
        x: jax.Array,
        seen: LayerCache,
        *,
        positions: jax.Array | None = None,
        causal: bool = False,
        window: int | None = None,
        mask: jax.Array | None = None,
        bias: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Map [batch, time, features] to the same shape; records "weights".

        Args:
            x: what asks.
            seen: what is asked, as made by `keys_values`.
            positions: of `x`, integer [batch or 1, time]; None leaves rotary positions out.
            causal: as in `dot_product_attention`.
            window: as in `dot_product_attention`.
            mask: as in `dot_product_attention`.
            bias: as in `dot_product_attention`.
            train: training mode.
        """
        query = self.query(x).reshape(*x.shape[:2], self.config.num_heads, self.config.dim_per_head)
        if self.config.qk_norm:
            query = self.query_norm(query)
        query = self._turn(query, positions)
        key, value = seen["key"], seen["value"]
        seeing: dict[str, Any] = {"causal": causal, "window": window, "mask": mask, "bias": bias}
        dropping = train and self.config.attention_dropout_rate > 0
        if dropping or self.is_mutable_collection("intermediates"):
            weights = attention_weights(query, key, **seeing)
            record(self, "weights", weights)
            y = apply_attention_weights(self.dropout(weights, train=train), value)
        else:
            y = dot_product_attention(query, key, value, **seeing)
        return self.output(y.reshape(*x.shape[:2], -1))

    def _turn(self, x: jax.Array, positions: jax.Array | None) -> jax.Array:
        if positions is None or self.config.positions != "rotary":
            return x
        return rotary(x, positions, theta=self.config.rope_theta)


class FeedForward(nn.Module):
    """Two matrices with an activation between them, or with a gate beside the first one.

    output(activation(hidden(x))), or output(activation(gate(x)) hidden(x)).

    Attributes:
        config: the block's options.
        residual_scale: factor of the standard deviation of the output's initial matrix.
        precision: dtypes.
    """

    config: BlockConfig
    residual_scale: float = 1.0
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [..., features] to the same shape."""
        config = self.config
        dense = functools.partial(Dense, use_bias=config.use_bias, precision=self.precision)
        inner = functools.partial(
            dense, config.mlp_dim or 4 * config.features, kernel_init=config.kernel_init()
        )
        act, hidden = activation(config.activation_name), inner(name="hidden")(x)
        hidden = act(inner(name="gate")(x)) * hidden if config.gated else act(hidden)
        kernel_init = config.kernel_init(self.residual_scale)
        return dense(config.features, kernel_init=kernel_init, name="output")(hidden)


class BlockInputs(NamedTuple):
    """What all blocks of a stack see alike.

    Attributes:
        positions: integer [batch or 1, time].
        causal: whether each step sees those up to itself only.
        window: each step sees those less than so far away only; None means all.
        mask: of the self-attention.
        bias: of the self-attention.
        slots: integer [batch, time], where in the cache the steps go; beyond it, nowhere.
        context: [batch, source, features], for cross-attention; None takes it from the cache.
        context_mask: bool [batch, 1, 1, source].
    """

    positions: jax.Array
    causal: bool = False
    window: int | None = None
    mask: jax.Array | None = None
    bias: jax.Array | None = None
    slots: jax.Array | None = None
    context: jax.Array | None = None
    context_mask: jax.Array | None = None


class Block(nn.Module):
    """Self-attention, cross-attention if asked for, and a feed-forward network, each added.

    Attributes:
        config: the block's options.
        cross: whether the block also attends to a context.
        residual_scale: factor of the initial standard deviation at the ends of the branches.
        precision: dtypes.
    """

    config: BlockConfig
    cross: bool = False
    residual_scale: float = 1.0
    precision: Precision = Precision()

    def setup(self) -> None:
        config, policy = self.config, self.precision
        self.attention_norm = make_norm(config, policy)
        self.attention = Attention(config, self.residual_scale, policy)
        if self.cross:
            self.cross_attention_norm = make_norm(config, policy)
            self.cross_attention = Attention(config, self.residual_scale, policy)
        self.feed_forward_norm = make_norm(config, policy)
        self.feed_forward = FeedForward(config, self.residual_scale, policy)
        self.dropout = Dropout(config.dropout_rate)

    def __call__(
        self,
        x: jax.Array,
        cache: LayerCache,
        skip_rate: float | jax.Array = 0.0,
        *,
        inputs: BlockInputs,
        train: bool = False,
    ) -> tuple[jax.Array, LayerCache]:
        """Map [batch, time, features] to the same shape, and the cache to the next one.

        Args:
            x: the steps.
            cache: as made by `start`, or {}.
            skip_rate: probability that a branch is skipped in training.
            inputs: what all blocks see alike.
            train: training mode.
        """
        kept = dict(cache)

        def attend_self(x: jax.Array) -> jax.Array:
            seen = self.attention.keys_values(x, positions=inputs.positions)
            if cache:
                rows = jnp.arange(x.shape[0])[:, None]
                for name, new in seen.items():
                    kept[name] = cache[name].at[rows, inputs.slots].set(new, mode="drop")
                seen = kept
            return self.attention(
                *(x, seen),
                positions=inputs.positions,
                causal=inputs.causal,
                window=inputs.window,
                mask=inputs.mask,
                bias=inputs.bias,
                train=train,
            )

        def attend_context(x: jax.Array) -> jax.Array:
            seen: LayerCache
            if inputs.context is None:
                seen = {"key": cache["context_key"], "value": cache["context_value"]}
            else:
                seen = self.cross_attention.keys_values(inputs.context)
            return self.cross_attention(x, seen, mask=inputs.context_mask, train=train)

        branches: list[tuple[Any, Callable[[jax.Array], jax.Array]]]
        branches = [(self.attention_norm, attend_self)]
        if self.cross:
            branches.append((self.cross_attention_norm, attend_context))
        branches.append((self.feed_forward_norm, self.feed_forward))
        for norm, branch in branches:
            y = branch(norm(x) if self.config.norm_first else x)
            y = self._skip(self.dropout(y, train=train), skip_rate, train=train)
            x = x + y if self.config.norm_first else norm(x + y)
        return x, kept

    def start(self, batch_size: int, capacity: int, context: jax.Array | None) -> LayerCache:
        """Return an empty cache, which holds the keys and values of the context if there is one."""
        shape = (batch_size, capacity, self.config.kv_heads, self.config.dim_per_head)
        empty = jnp.zeros(shape, self.precision.compute)
        cache = {"key": empty, "value": empty}
        if context is not None:
            made = self.cross_attention.keys_values(context)
            cache |= {f"context_{name}": array for name, array in made.items()}
        return cache

    def _skip(self, y: jax.Array, rate: float | jax.Array, *, train: bool) -> jax.Array:
        if not train or not self.config.stochastic_depth_rate:
            return y
        # The rate is an array inside a scan over layers, which a Dropout cannot take.
        shape = (y.shape[0], 1, 1)
        kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - rate, shape)
        return jnp.where(kept, y / jnp.asarray(1 - rate, y.dtype), jnp.zeros((), y.dtype))
