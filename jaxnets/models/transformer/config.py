"""The options of a transformer block, in one hashable dataclass."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import flax.linen as nn

from jaxnets.checks import check_rate, check_sizes
from jaxnets.functional.activations import activation
from jaxnets.functional.attention.positions import RopeScaling
from jaxnets.layers import Initializer

#: Encoding of positions; None has none.
Positions: TypeAlias = Literal["learned", "sinusoidal", "rotary", "alibi", "relative"] | None
_POSITIONS = ("learned", "sinusoidal", "rotary", "alibi", "relative", None)
_NORMS = ("layer", "rms", "zero_centered_rms")
_GATES = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """Options of the blocks of a transformer; hashable.

    Attributes:
        features: width of the model (`d_model`).
        num_heads: number of attention heads.
        num_kv_heads: number of key-value heads, each shared by several query heads (grouped-query
            attention); by default `num_heads`.
        head_dim: size of a head, by default features / num_heads.
        mlp_dim: hidden width of the feed-forward network, by default 4 features.
        activation: of the feed-forward network: a name of `layers.activation`, or "swiglu",
            "geglu" or "geglu_tanh" for a gated one (Shazeer 2020, arXiv:2002.05202).
        norm: "layer", "rms", or "zero_centered_rms" for one with a factor of 1 + scale (Gemma).
        norm_epsilon: added to the variance.
        norm_first: pre-norm: normalize the input of each branch and the output of the stack.
            False is post-norm, as in the paper of 2017: normalize each sum x + branch(x).
        branch_norm: normalize the output of each branch too, before it is added (Gemma 2,
            arXiv:2408.00118, section 2).
        positions: "learned" or "sinusoidal" vectors added to the input; "rotary", "alibi" or
            "relative" (the bias of T5, shared by all layers) inside the attention; or None.
        rope_theta: as in `positions.rotary`.
        rope_scaling: of rotary positions, for contexts longer than those of the first training.
        num_relative_buckets: of relative positions, as in `positions.relative_buckets`.
        max_relative_distance: of relative positions, where the last bucket begins.
        window: attend to positions at a smaller distance only; by default to all.
        global_every: every so many blocks, one attends to all positions in spite of `window`
            (Beltagy et al. 2020, arXiv:2004.05150; 2 in Gemma 2, 6 in Gemma 3).
        window_rope_theta: `rope_theta` of the blocks with a window, then without `rope_scaling`
            (Gemma 3, arXiv:2503.19786, section 2); by default all blocks have the same.
        qk_norm: normalize queries and keys (Dehghani et al. 2023, arXiv:2302.05442).
        attention_scale: factor of the query-key products, by default 1 / sqrt(head_dim).
        attention_softcap: bound the attention scores, as in `dot_product_attention`; it rules out
            cuDNN's kernel.
        use_bias: whether the dense layers have biases, except that of the keys.
        key_bias: whether the projection of the keys has a bias. Without rotary positions such a
            bias cancels in the softmax, so only weights trained elsewhere need it.
        qkv_bias: whether queries, keys and values have a bias, whatever `use_bias` and `key_bias`
            say (Qwen 2, arXiv:2407.10671, section 2.2.1); by default those decide.
        dropout_rate: on the input of the stack and at the end of each branch.
        attention_dropout_rate: on the attention weights. Above 0, training materializes the
            weights [batch, heads, queries, keys] of every layer, without tiling or cuDNN's kernel.
        mlp_dropout_rate: on the hidden units of the feed-forward network.
        output_dropout_rate: on the output of the stack.
        stochastic_depth_rate: probability of skipping a branch of the last block for an example;
            it rises linearly from the first block on (Huang et al. 2016, arXiv:1603.09382,
            equation 4).
        init_std: standard deviation of the initial kernels, divided by sqrt(number of branches)
            at the ends of the branches if `norm_first` (GPT-2); "fan_in" is 1 / sqrt(inputs of the
            layer), as in T5, and 1 for embeddings; None is Glorot uniform.
        scan_layers: compile one block and scan it over the layers, on stacked parameters.
        remat: recompute activations in the backward pass instead of saving them.

    Raises:
        ValueError: a field is out of range, or fields do not fit together.

    Example:
        >>> BlockConfig(features=8, num_heads=3)
        Traceback (most recent call last):
        ...
        ValueError: 8 features do not split into 3 heads; give a multiple, or a head_dim
    """

    features: int = 128
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mlp_dim: int | None = None
    activation: str = "gelu"
    norm: Literal["layer", "rms", "zero_centered_rms"] = "layer"
    norm_epsilon: float = 1e-6
    norm_first: bool = True
    branch_norm: bool = False
    positions: Positions = "learned"
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    num_relative_buckets: int = 32
    max_relative_distance: int = 128
    window: int | None = None
    global_every: int | None = None
    window_rope_theta: float | None = None
    qk_norm: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    use_bias: bool = True
    key_bias: bool = False
    qkv_bias: bool | None = None
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    mlp_dropout_rate: float = 0.0
    output_dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0
    init_std: float | Literal["fan_in"] | None = 0.02
    scan_layers: bool = False
    remat: bool = False

    def __post_init__(self) -> None:
        for name in ("features", "num_heads", "num_kv_heads", "head_dim", "mlp_dim"):
            if getattr(self, name) is not None:
                check_sizes(**{name: getattr(self, name)})
        for rate in ("dropout", "attention_dropout", "mlp_dropout", "output_dropout"):
            check_rate(getattr(self, f"{rate}_rate"))
        check_rate(self.stochastic_depth_rate)
        check_sizes(num_relative_buckets=self.num_relative_buckets)
        check_sizes(max_relative_distance=self.max_relative_distance)
        if isinstance(self.init_std, str) and self.init_std != "fan_in":
            raise ValueError(f"init_std is {self.init_std!r}; give a number, 'fan_in' or None")
        if self.head_dim is None and self.features % self.num_heads:
            raise ValueError(
                f"{self.features} features do not split into {self.num_heads} heads; give a "
                "multiple, or a head_dim"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"{self.num_heads} heads do not share {self.kv_heads} key-value heads; "
                "give a divisor"
            )
        if self.positions not in _POSITIONS:
            raise ValueError(f"positions is {self.positions!r}; choose one of {_POSITIONS}")
        if self.positions == "rotary" and self.dim_per_head % 2:
            raise ValueError(
                f"rotary positions pair features; the head size {self.dim_per_head} is odd"
            )
        if self.norm not in _NORMS:
            raise ValueError(f"norm is {self.norm!r}; choose one of {_NORMS}")
        for name in ("window", "global_every"):
            if getattr(self, name) is not None:
                check_sizes(**{name: getattr(self, name)})
        numbers = ("norm_epsilon", "rope_theta", "window_rope_theta")
        for name in (*numbers, "attention_scale", "attention_softcap"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:  # NaN too
                raise ValueError(f"{name} is {value}; give a positive number")
        self._check_windows()
        if self.rope_scaling is not None and self.positions != "rotary":
            raise ValueError(
                f"rope_scaling for positions={self.positions!r}; it is for 'rotary' ones"
            )
        activation(self.activation_name)

    def _check_windows(self) -> None:
        if self.global_every is not None and self.window is None:
            raise ValueError(
                f"global_every={self.global_every} without a window; give the window of the other "
                "blocks"
            )
        if self.global_every is not None and self.scan_layers:
            raise ValueError(
                f"scan_layers compiles one block for all layers, but with global_every="
                f"{self.global_every} they differ; leave one of the two out"
            )
        if self.window_rope_theta is not None and self.global_every is None:
            raise ValueError(
                f"window_rope_theta={self.window_rope_theta} without global_every: all blocks are "
                "alike; give rope_theta"
            )

    def of_layer(self, index: int) -> BlockConfig:
        """Return the options of one block, with `global_every` resolved.

        Args:
            index: of the block, from 0.

        Example:
            >>> config = BlockConfig(window=8, global_every=2)
            >>> [config.of_layer(index).window for index in range(4)]
            [8, None, 8, None]
        """
        if self.global_every is None:
            return self
        same = dataclasses.replace(self, global_every=None, window_rope_theta=None)
        if (index + 1) % self.global_every == 0:
            return dataclasses.replace(same, window=None)
        if self.window_rope_theta is None:
            return same
        return dataclasses.replace(same, rope_theta=self.window_rope_theta, rope_scaling=None)

    @property
    def dim_per_head(self) -> int:
        """Size of a head: `head_dim`, by default features / num_heads."""
        return self.head_dim or self.features // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Number of key-value heads: `num_kv_heads`, by default `num_heads`."""
        return self.num_kv_heads or self.num_heads

    @property
    def query_value_bias(self) -> bool:
        """Whether the projections of queries and values have biases."""
        return self.use_bias if self.qkv_bias is None else self.qkv_bias

    @property
    def has_key_bias(self) -> bool:
        """Whether the projection of the keys has a bias."""
        return self.key_bias if self.qkv_bias is None else self.qkv_bias

    @property
    def gated(self) -> bool:
        """Whether the feed-forward network has a gate."""
        return self.activation in _GATES

    @property
    def activation_name(self) -> str:
        """Name of the element-wise function in the feed-forward network."""
        return _GATES.get(self.activation, self.activation)

    def kernel_init(self, scale: float = 1.0) -> Initializer:
        """Return the initializer of a kernel, its standard deviation multiplied by `scale`.

        Args:
            scale: below 1 at the end of a branch; without effect on Glorot, "fan_in" or post-norm.
        """
        if self.init_std is None:
            return nn.initializers.glorot_uniform()
        if self.init_std == "fan_in":
            return nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        return nn.initializers.normal(self.init_std * (scale if self.norm_first else 1.0))

    def query_init(self) -> Initializer:
        """Return the initializer of the kernel of the queries.

        It makes up for `attention_scale`, so that the initial scores do not depend on it (T5).
        """
        init = self.kernel_init()
        if self.attention_scale is None:
            return init
        scale = self.dim_per_head**-0.5 / self.attention_scale
        return lambda key, shape, dtype: scale * init(key, shape, dtype)

    def embedding_init(self) -> Initializer:
        """Return the initializer of an embedding."""
        return nn.initializers.normal(1.0 if self.init_std == "fan_in" else self.init_std or 0.02)


def build_preset(kind: Callable[..., Any], preset: dict[str, Any], fields: dict[str, Any]) -> Any:
    """Build a network from one flat dict of its own fields and those of its `BlockConfig`.

    Args:
        kind: class of a network with a field `config`.
        preset: {name of a field of the network or of `BlockConfig`: value}.
        fields: override or extend the preset.

    Returns:
        The network.
    """
    options = preset | fields
    known = {field.name for field in dataclasses.fields(BlockConfig)} & set(options)
    config = BlockConfig(**{name: options.pop(name) for name in known})
    return kind(**({"config": config} | options))
