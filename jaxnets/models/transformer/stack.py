"""A stack of blocks, over a whole sequence or incrementally with a key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnets.checks import check_sizes
from jaxnets.core import Precision, drawn_in_float32
from jaxnets.functional.attention.masks import causal_mask
from jaxnets.functional.attention.positions import alibi_bias, relative_buckets
from jaxnets.functional.lengths import clear_padding, padding_mask
from jaxnets.layers import Dropout
from jaxnets.models.transformer.block import Block, BlockInputs, LayerCache, make_norm
from jaxnets.models.transformer.config import BlockConfig

#: The key-value cache: "position" [batch], number of cached steps of each row; "layer_0", ... (or
#: "layers") -> LayerCache; with a context, "context_lengths" [batch].
StackCarry: TypeAlias = Mapping[str, Any]


class Stack(nn.Module):
    """Blocks one after the other; masks, biases and positions are computed once for all of them.

    Corresponds to `torch.nn.TransformerEncoder`, or with `causal` and `cross` to
    `torch.nn.TransformerDecoder`.

    Attributes:
        config: the blocks' options.
        num_layers: number of blocks.
        causal: each step attends to itself and earlier steps only.
        cross: whether the blocks also attend to a context.
        precision: dtypes.

    Raises:
        ValueError: a field is out of range.

    Example:
        >>> stack = Stack(BlockConfig(features=8, num_heads=2), num_layers=2)
        >>> x = jnp.ones((3, 5, 8))
        >>> stack.apply(stack.init(jax.random.key(0), x), x, jnp.array([5, 2, 0])).shape
        (3, 5, 8)
    """

    config: BlockConfig
    num_layers: int
    causal: bool = False
    cross: bool = False
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        check_sizes(num_layers=self.num_layers)
        super().__post_init__()

    def setup(self) -> None:
        config = self.config
        scale = (self.num_layers * (3 if self.cross else 2)) ** -0.5
        if config.scan_layers:
            self.layers = Block(config, self.cross, scale, self.precision)
        else:  # their names are layer_0, layer_1, ...
            self.layer = [
                Block(config.of_layer(index), self.cross, scale, self.precision)
                for index in range(self.num_layers)
            ]
        if config.positions == "relative":
            shape = (config.num_relative_buckets, config.num_heads)
            init = nn.initializers.normal(0.02)
            self.relative_bias = self.param(
                "relative_bias", drawn_in_float32(init), shape, self.precision.parameter
            )
        if config.norm_first:
            self.norm = make_norm(config, self.precision)
        self.output_dropout = Dropout(config.output_dropout_rate)

    def __call__(
        self,
        x: jax.Array,
        lengths: jax.Array | None = None,
        *,
        context: jax.Array | None = None,
        context_lengths: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Map [batch, time, features] to the same shape, 0 beyond the lengths.

        Args:
            x: the steps; those beyond the lengths have no influence.
            lengths: integer [batch] in [0, time]; by default all steps count.
            context: [batch, source, features], for cross-attention.
            context_lengths: integer [batch] in [0, source]; by default all of it counts.
            train: training mode.

        Raises:
            ValueError: lengths that do not fit.
        """
        positions, mask = jnp.arange(x.shape[1])[None], None
        if lengths is not None:
            x, _ = clear_padding(x, lengths)
            # With causal attention no valid step attends to padding, which comes last.
            if not self.causal:
                mask = padding_mask(lengths, x.shape[:2])[:, None, None]  # [batch, 1, 1, time]
        context_mask = None
        if context is not None and context_lengths is not None:
            context_mask = padding_mask(context_lengths, context.shape[:2])[:, None, None]
        inputs = BlockInputs(
            positions=positions,
            causal=self.causal,
            mask=mask,
            bias=self._bias(positions, positions),
            context=context,
            context_mask=context_mask,
        )

        def forward(block: Any, x: jax.Array, cache: LayerCache, rate: Any) -> Any:
            own = inputs._replace(window=block.config.window)
            return block(x, cache, rate, inputs=own, train=train)

        x, _ = self._apply_blocks(forward, x, {})
        x = self.output_dropout(x, train=train)
        return clear_padding(x, lengths)[0]

    def start(
        self,
        batch_size: int,
        capacity: int,
        *,
        context: jax.Array | None = None,
        context_lengths: jax.Array | None = None,
    ) -> StackCarry:
        """Return an empty key-value cache.

        Args:
            batch_size: number of rows.
            capacity: maximum number of steps.
            context: [batch_size, source, features], for cross-attention.
            context_lengths: integer [batch_size]; by default all of the context counts.

        Raises:
            ValueError: sizes below 1.
        """
        check_sizes(batch_size=batch_size, capacity=capacity)

        def start_block(block: Any, x: Any, cache: LayerCache, rate: Any) -> tuple[Any, LayerCache]:
            return x, block.start(batch_size, capacity, context)

        _, caches = self._apply_blocks(start_block, jnp.zeros(()), {}, with_norm=False)
        carry = {"position": jnp.zeros(batch_size, jnp.int32), **caches}
        if context is not None:
            if context_lengths is None:
                context_lengths = jnp.full(batch_size, context.shape[1])
            carry["context_lengths"] = jnp.asarray(context_lengths, jnp.int32)
        return carry

    def extend(
        self, x: jax.Array, carry: StackCarry, lengths: jax.Array | None = None
    ) -> tuple[jax.Array, StackCarry]:
        """Append steps to each row of the cache and attend to all cached steps.

        Args:
            x: [batch, time, features]; the first lengths[b] steps are appended to row b.
            carry: as returned by `start` or an earlier call.
            lengths: integer [batch] in [0, time]; by default all steps.

        Returns:
            [batch, time, features], NaN for steps beyond the capacity, and the next carry.

        Raises:
            ValueError: lengths that do not fit.
        """
        time = x.shape[1]
        caches = {name: cache for name, cache in carry.items() if name.startswith("layer")}
        capacity = cache_capacity(carry)
        positions = carry["position"][:, None] + jnp.arange(time)[None]  # [batch, time]
        keys, slots = jnp.arange(capacity)[None], positions
        if lengths is not None:
            x, _ = clear_padding(x, lengths)
            slots = jnp.where(padding_mask(lengths, x.shape[:2]), positions, capacity)
        context_mask = None
        if "context_lengths" in carry:
            source = next(iter(caches.values()))["context_key"].shape[-3]
            shape = (x.shape[0], source)
            context_mask = padding_mask(carry["context_lengths"], shape)[:, None, None]
        windows = dict.fromkeys(
            self.config.of_layer(index).window for index in range(self.num_layers)
        )
        masks = {window: causal_mask(positions, keys, window=window) for window in windows}
        inputs = BlockInputs(
            positions=positions,
            bias=self._bias(positions, keys),
            slots=slots,
            context_mask=context_mask,
        )

        def forward(block: Any, x: jax.Array, cache: LayerCache, rate: Any) -> Any:
            return block(x, cache, rate, inputs=inputs._replace(mask=masks[block.config.window]))

        x, caches = self._apply_blocks(forward, x, caches)
        x = jnp.where((positions < capacity)[..., None], x, jnp.asarray(jnp.nan, x.dtype))
        appended = time if lengths is None else jnp.asarray(lengths)
        position = (carry["position"] + appended).astype(jnp.int32)
        return x, {**carry, **caches, "position": position}

    def _apply_blocks(
        self,
        body: Callable[..., Any],
        x: jax.Array,
        caches: Mapping[str, Any],
        with_norm: bool = True,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Apply `body(block, x, cache, skip_rate) -> (x, cache)` to each block, then the norm."""
        config, count = self.config, self.num_layers
        rates = [config.stochastic_depth_rate * (index + 1) / count for index in range(count)]
        if config.remat:
            body = nn.remat(body, prevent_cse=not config.scan_layers)
        if config.scan_layers:
            scanned = nn.scan(
                body,
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True, "dropout": True},
                # Caches are [batch, layers, ...]: every leaf of a carry is batch-major.
                in_axes=(1, 0),
                out_axes=1,
                length=count,
                # Only carry and caches leave the loop; the check would trace a layer twice.
                check_constancy_invariants=False,
            )
            x, cache = scanned(self.layers, x, caches.get("layers", {}), jnp.asarray(rates))
            next_caches = {"layers": cache}
        else:
            next_caches = {}
            for index, (block, rate) in enumerate(zip(self.layer, rates, strict=True)):
                name = f"layer_{index}"
                x, next_caches[name] = body(block, x, caches.get(name, {}), rate)
        return self.norm(x) if with_norm and config.norm_first else x, next_caches

    def _bias(self, queries: jax.Array, keys: jax.Array) -> jax.Array | None:
        kind, wide = self.config.positions, jnp.promote_types(self.precision.compute, jnp.float32)
        if kind == "alibi":
            return alibi_bias(self.config.num_heads, queries, keys, dtype=wide)
        if kind == "relative":
            buckets = relative_buckets(
                *(queries, keys),
                bidirectional=not self.causal,
                num_buckets=self.config.num_relative_buckets,
                max_distance=self.config.max_relative_distance,
            )
            # From [batch or 1, queries, keys, heads] to [batch or 1, heads, queries, keys].
            return jnp.moveaxis(self.relative_bias[buckets], -1, 1).astype(wide)
        return None


def cache_capacity(carry: StackCarry) -> int:
    """Return the number of steps that a carry has room for, including those it already holds."""
    cache = next(cache for name, cache in carry.items() if name.startswith("layer"))
    return cache["key"].shape[-3]


def stack_layers(params: Any) -> Any:
    """Stack the parameters of the layers, as a network with `scan_layers` has them.

    Args:
        params: nested dict with "layer_0", "layer_1", ... anywhere in it.

    Returns:
        Nested dict with "layers" instead, whose arrays have a leading axis of layers.

    Example:
        >>> params = {"layer_0": {"bias": jnp.zeros(2)}, "layer_1": {"bias": jnp.ones(2)}}
        >>> stack_layers(params)["layers"]["bias"].shape
        (2, 2)
    """
    if not isinstance(params, Mapping):
        return params
    names = [name for name in map("layer_{}".format, range(len(params))) if name in params]
    stacked = {name: stack_layers(value) for name, value in params.items() if name not in names}
    if names:
        layers = [params[name] for name in names]
        stacked["layers"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    return stacked


def unstack_layers(params: Any) -> Any:
    """Unstack the parameters of the layers, as a network without `scan_layers` has them.

    Generation is faster without `scan_layers`: a scan over layers copies the cache at every step.

    Args:
        params: nested dict with "layers" anywhere in it.

    Returns:
        Nested dict with "layer_0", "layer_1", ... instead.

    Example:
        >>> sorted(unstack_layers({"stack": {"layers": {"bias": jnp.zeros((2, 5))}}})["stack"])
        ['layer_0', 'layer_1']
    """
    if not isinstance(params, Mapping):
        return params
    unstacked = {name: unstack_layers(value) for name, value in params.items() if name != "layers"}
    if "layers" in params:
        count = len(jax.tree.leaves(params["layers"])[0])
        for index in range(count):
            unstacked[f"layer_{index}"] = jax.tree.map(lambda x, i=index: x[i], params["layers"])
    return unstacked
