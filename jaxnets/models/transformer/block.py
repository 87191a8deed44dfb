"""One transformer block: attention and a feed-forward network, each on a residual branch."""

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

#: Keys and values of one layer: {"key": [batch, time, kv_heads, head_dim], "value": the same
#: shape}, with a context also "context_key" and "context_value"; {} without a cache.
LayerCache: TypeAlias = Mapping[str, jax.Array]


class BlockInputs(NamedTuple):
    """Inputs that all blocks of a stack share.

    Attributes:
        positions: integer [batch or 1, time].
        causal: whether each step attends to itself and earlier steps only.
        window: each step attends to steps at a smaller distance only; None means all.
        mask: of the self-attention.
        bias: of the self-attention.
        slots: integer [batch, time], index into the cache at which each step is written; an index
            beyond the cache writes nothing.
        context: [batch, source, features], for cross-attention; None uses the cached keys and
            values.
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
    """Self-attention, optional cross-attention and a feed-forward network, each with a residual.

    Corresponds to `torch.nn.TransformerEncoderLayer`, or with `cross` to
    `torch.nn.TransformerDecoderLayer`, whose `dropout` is `dropout_rate`,
    `attention_dropout_rate` and `mlp_dropout_rate` here.

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
        if config.branch_norm:
            self.attention_output_norm = make_norm(config, policy)
            if self.cross:
                self.cross_attention_output_norm = make_norm(config, policy)
            self.feed_forward_output_norm = make_norm(config, policy)
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
            cache: as returned by `start`, or {}.
            skip_rate: probability of skipping a branch in training (stochastic depth).
            inputs: shared by all blocks.
            train: training mode.

        Raises:
            ValueError: shapes that do not fit.
        """
        next_cache = dict(cache)

        def self_attention(x: jax.Array) -> jax.Array:
            kv = self.attention.keys_values(x, positions=inputs.positions)
            if cache:
                rows = jnp.arange(x.shape[0])[:, None]  # [batch, 1]
                for name, new in kv.items():
                    updated = cache[name].at[rows, inputs.slots].set(new, mode="drop")
                    next_cache[name] = updated  # [batch, capacity, kv_heads, head_dim]
                kv = next_cache
            return self.attention(
                *(x, kv),
                positions=inputs.positions,
                causal=inputs.causal,
                window=inputs.window,
                mask=inputs.mask,
                bias=inputs.bias,
                train=train,
            )

        def cross_attention(x: jax.Array) -> jax.Array:
            kv: LayerCache
            if inputs.context is None:
                kv = {"key": cache["context_key"], "value": cache["context_value"]}
            else:
                kv = self.cross_attention.keys_values(inputs.context)
            return self.cross_attention(x, kv, mask=inputs.context_mask, train=train)

        branches: dict[str, Callable[[jax.Array], jax.Array]]
        branches = {"attention": self_attention}
        if self.cross:
            branches["cross_attention"] = cross_attention
        branches["feed_forward"] = functools.partial(self.feed_forward, train=train)
        for name, branch in branches.items():
            norm = getattr(self, f"{name}_norm")
            y = branch(norm(x) if self.config.norm_first else x)
            y = getattr(self, f"{name}_output_norm")(y) if self.config.branch_norm else y
            y = self._stochastic_depth(self.dropout(y, train=train), skip_rate, train=train)
            x = x + y if self.config.norm_first else norm(x + y)
        return x, next_cache

    def start(self, batch_size: int, capacity: int, context: jax.Array | None) -> LayerCache:
        """Return an empty cache, together with the keys and values of the context if given.

        Args:
            batch_size: number of rows.
            capacity: number of steps that the cache has room for.
            context: [batch_size, source, features], for cross-attention.

        Returns:
            "key" and "value", [batch_size, capacity, kv_heads, head_dim], with a context also
            "context_key" and "context_value", [batch_size, source, kv_heads, head_dim].
        """
        shape = (batch_size, capacity, self.config.kv_heads, self.config.dim_per_head)
        empty = jnp.zeros(shape, self.precision.compute)
        cache = {"key": empty, "value": empty}
        if context is not None:
            kv = self.cross_attention.keys_values(context)
            cache |= {f"context_{name}": array for name, array in kv.items()}
        return cache

    def _stochastic_depth(self, y: jax.Array, rate: float | jax.Array, *, train: bool) -> jax.Array:
        if not train or not self.config.stochastic_depth_rate:
            return y
        # The rate is an array inside a scan over layers, which a Dropout cannot take.
        shape = (y.shape[0], 1, 1)
        keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - rate, shape)
        return jnp.where(keep, y / jnp.asarray(1 - rate, y.dtype), jnp.zeros((), y.dtype))


class Attention(nn.Module):
    """Multi-head or grouped-query attention with its four projections.

    Keys and values are computed by a method of their own, so that a caller can cache them.
    Corresponds to `flax.linen.MultiHeadDotProductAttention` and `torch.nn.MultiheadAttention`.
    Differs from both: kernels are [features, heads * head_dim], and the keys have a bias only with
    `key_bias`.

    Dropout of attention weights (`attention_dropout_rate` above 0, in training) has to materialize
    the weights [batch, heads, queries, keys] and save them for the backward pass: neither tiling
    nor cuDNN's kernel is used then. `capture` materializes them too, to record them, but the output
    is computed as without it.

    Attributes:
        config: the block's options.
        residual_scale: factor of the standard deviation of the output's initial kernel.
        precision: dtypes; the softmax is float32 or wider.
    """

    config: BlockConfig
    residual_scale: float = 1.0
    precision: Precision = Precision()

    def setup(self) -> None:
        config, heads = self.config, self.config.kv_heads
        dense = functools.partial(Dense, precision=self.precision)
        inner = functools.partial(dense, kernel_init=config.kernel_init())
        self.query = dense(
            config.num_heads * config.dim_per_head,
            use_bias=config.query_value_bias,
            kernel_init=config.query_init(),
        )
        self.key = inner(heads * config.dim_per_head, use_bias=config.has_key_bias)
        self.value = inner(heads * config.dim_per_head, use_bias=config.query_value_bias)
        self.output = dense(
            config.features,
            use_bias=config.use_bias,
            kernel_init=config.kernel_init(self.residual_scale),
        )
        if config.qk_norm:
            zero_centered = config.norm == "zero_centered_rms"
            self.query_norm = RMSNorm(config.norm_epsilon, self.precision, zero_centered)
            self.key_norm = RMSNorm(config.norm_epsilon, self.precision, zero_centered)
        self.dropout = Dropout(config.attention_dropout_rate)

    def keys_values(self, x: jax.Array, *, positions: jax.Array | None = None) -> LayerCache:
        """Project to {"key": ..., "value": ...}, each [batch, time, kv_heads, head_dim].

        Args:
            x: [batch, time, features].
            positions: integer [batch or 1, time]; None leaves rotary positions out.

        Raises:
            ValueError: positions that do not fit.
        """
        shape = (*x.shape[:2], self.config.kv_heads, self.config.dim_per_head)
        key = self.key(x).reshape(shape)
        if self.config.qk_norm:
            key = self.key_norm(key)
        return {"key": self._rotate(key, positions), "value": self.value(x).reshape(shape)}

    def __call__(
        self,
        x: jax.Array,
        kv: LayerCache,
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
            x: query inputs.
            kv: keys and values, as returned by `keys_values`.
            positions: of `x`, integer [batch or 1, time]; None leaves rotary positions out.
            causal: as in `dot_product_attention`.
            window: as in `dot_product_attention`.
            mask: as in `dot_product_attention`.
            bias: as in `dot_product_attention`.
            train: training mode.

        Raises:
            ValueError: as in `dot_product_attention`, or positions that do not fit.
        """
        config, (batch, time, _) = self.config, x.shape
        query = self.query(x).reshape(batch, time, config.num_heads, config.dim_per_head)
        if config.qk_norm:
            query = self.query_norm(query)
        query = self._rotate(query, positions)  # [batch, time, heads, head_dim]
        key, value = kv["key"], kv["value"]  # [batch, keys, kv_heads, head_dim]
        options: dict[str, Any] = {"causal": causal, "window": window, "mask": mask, "bias": bias}
        options |= {"scale": config.attention_scale, "softcap": config.attention_softcap}
        drops_weights = train and config.attention_dropout_rate > 0
        if drops_weights or self.is_mutable_collection("intermediates"):
            weights = attention_weights(query, key, **options)  # [batch, heads, time, keys]
            record(self, "weights", weights)
        if drops_weights:
            y = apply_attention_weights(self.dropout(weights, train=train), value)
        else:
            y = dot_product_attention(query, key, value, **options)
        return self.output(y.reshape(batch, time, -1))  # from [batch, time, heads, head_dim]

    def _rotate(self, x: jax.Array, positions: jax.Array | None) -> jax.Array:
        if positions is None or self.config.positions != "rotary":
            return x
        config = self.config
        return rotary(x, positions, theta=config.rope_theta, scaling=config.rope_scaling)


class FeedForward(nn.Module):
    """A feed-forward network of two dense layers, with or without a gate.

    output(activation(hidden(x))), or with a gate output(activation(gate(x)) hidden(x)), with
    dropout before the output layer.

    Attributes:
        config: the block's options.
        residual_scale: factor of the standard deviation of the output's initial kernel.
        precision: dtypes.
    """

    config: BlockConfig
    residual_scale: float = 1.0
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Map [..., features] to the same shape."""
        config = self.config
        dense = functools.partial(Dense, use_bias=config.use_bias, precision=self.precision)
        inner = functools.partial(
            dense, config.mlp_dim or 4 * config.features, kernel_init=config.kernel_init()
        )
        act, hidden = activation(config.activation_name), inner(name="hidden")(x)
        hidden = act(inner(name="gate")(x)) * hidden if config.gated else act(hidden)
        hidden = Dropout(config.mlp_dropout_rate, name="dropout")(hidden, train=train)
        kernel_init = config.kernel_init(self.residual_scale)
        return dense(config.features, kernel_init=kernel_init, name="output")(hidden)


def make_norm(config: BlockConfig, precision: Precision, name: str | None = None) -> nn.Module:
    """Build the normalization layer that `config.norm` names."""
    if config.norm == "layer":
        return LayerNorm(config.norm_epsilon, precision, name=name)
    zero_centered = config.norm == "zero_centered_rms"
    return RMSNorm(config.norm_epsilon, precision, zero_centered, name=name)
