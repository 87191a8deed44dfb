"""Rules of Keras' layers: their groups in a file, for a user's own network.

Keras 3 names the group of a layer by its class and its place among the layers of that class, not by
the layer's name: "layers/dense", "layers/dense_1", ... `python -m jaxnets inspect FILE` lists them.
Kernels of dense layers and convolutions, and an image flattened for a dense layer, have the order
of axes that they have here; those of transposed convolutions have not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jaxnets.pretrained.convolution_layouts import DepthwiseKernel, KerasTransposedKernel
from jaxnets.pretrained.layouts import (
    Blocks,
    GRUBiases,
    JoinHeads,
    Layout,
    Split,
    Squeeze,
)
from jaxnets.pretrained.rules import Rule

#: Update, reset, candidate in the file; reset, update, candidate here.
_GRU_GATES = (1, 0, 2)


def dense(source: str, target: str) -> list[Rule]:
    """Return the rules of `keras.layers.Dense`, with or without a bias.

    Args:
        source: group of the layer in the file, such as "layers/dense_1".
        target: path of the layer.
    """
    return _variables(source, target, ("kernel", "bias"))


def convolution(source: str, target: str) -> list[Rule]:
    """Return the rules of `Conv1D` and `Conv2D`, with or without a bias, groups and dilation.

    Args:
        source: group of the layer in the file.
        target: path of the layer. With strides, Keras' padding "same" is "SAME" here.
    """
    return _variables(source, target, ("kernel", "bias"))


def transposed_convolution(source: str, target: str, *, flip: bool = True) -> list[Rule]:
    """Return the rules of `Conv1DTranspose`, `Conv2DTranspose` and `Conv3DTranspose`.

    The kernel is that of `flax.linen.ConvTranspose`, with the same strides and dilation. Keras'
    padding "valid" and "same" is "VALID" and "SAME" there. With an `output_padding` q it is that of
    the dilated input: of a kernel of k with dilation d and e = d (k - 1) + 1, "valid" is
    (e - 1, e - 1 + q) at each axis, and "same" (l, p - l) with p = e + e % 2 - 2 + q and
    l = min(ceil(p / 2), e - 1).

    With `flip=False` the kernel is that of `layers.TransposedConvolution`, whose strides are 2 and
    whose padding is "same". For `ConvTranspose(transpose_kernel=True)` the rules are those of
    `convolution`.

    Args:
        source: group of the layer in the file, such as "layers/conv2d_transpose".
        target: path of the layer.
        flip: flip the window.
    """
    return [
        Rule(f"{source}/vars/0", f"{target}/kernel", (KerasTransposedKernel(flip),)),
        Rule(f"{source}/vars/1", f"{target}/bias"),
    ]


def depthwise_convolution(source: str, target: str) -> list[Rule]:
    """Return the rules of `DepthwiseConv1D` and `DepthwiseConv2D`, with or without a bias.

    Args:
        source: group of the layer in the file.
        target: path of a convolution with a group for every input channel.
    """
    return [
        Rule(f"{source}/vars/0", f"{target}/kernel", (DepthwiseKernel(),)),
        Rule(f"{source}/vars/1", f"{target}/bias"),
    ]


def separable_convolution(source: str, depthwise: str, pointwise: str) -> list[Rule]:
    """Return the rules of `SeparableConv1D` and `SeparableConv2D`, which are two layers here.

    Args:
        source: group of the layer in the file.
        depthwise: path of a convolution with a group for every input channel, without a bias.
        pointwise: path of a convolution with a kernel of 1, with or without a bias.
    """
    return [
        Rule(f"{source}/vars/0", f"{depthwise}/kernel", (DepthwiseKernel(),)),
        Rule(f"{source}/vars/1", f"{pointwise}/kernel"),
        Rule(f"{source}/vars/2", f"{pointwise}/bias"),
    ]


def norm(source: str, target: str, *, scale: bool = True, center: bool = True) -> list[Rule]:
    """Return the rules of `LayerNormalization`, `GroupNormalization` and `RMSNormalization`.

    Keras' epsilon is 1e-3, for `RMSNormalization` 1e-6; give that of the layer to yours.

    Args:
        source: group of the layer in the file.
        target: path of the layer.
        scale: as in Keras; whether there is a scale.
        center: as in Keras; whether there is a bias. An `RMSNormalization` has none.
    """
    return _variables(source, target, _norm_names(scale, center))


def batch_norm(source: str, target: str, *, scale: bool = True, center: bool = True) -> list[Rule]:
    """Return the rules of `BatchNormalization`, whose epsilon is 1e-3.

    Args:
        source: group of the layer in the file.
        target: path of the layer, without the collection.
        scale: as in Keras; whether there is a scale.
        center: as in Keras; whether there is a bias.
    """
    names = _norm_names(scale, center)
    return [
        *_variables(source, f"params/{target}", names),
        Rule(f"{source}/vars/{len(names)}", f"batch_stats/{target}/mean"),
        Rule(f"{source}/vars/{len(names) + 1}", f"batch_stats/{target}/var"),
    ]


def embedding(source: str, target: str) -> list[Rule]:
    """Return the rule of `Embedding`."""
    return _variables(source, target, ("embedding",))


def recurrent(source: str, target: str) -> list[Rule]:
    """Return the rules of one layer of `LSTM` or `SimpleRNN`; the gates have the same order.

    Args:
        source: group of the layer in the file, such as "layers/lstm".
        target: path of one layer of a `Recurrent` module, such as "params/forward_0".
    """
    names = ("input_kernel", "recurrent_kernel", "bias")
    return _variables(f"{source}/cell", target, names)


def gru(source: str, target: str) -> list[Rule]:
    """Return the rules of one layer of `GRU`.

    With `reset_after` (the default) the bias has two rows, and the cell here is
    `GRUCell(reset="after")`; without it one, and the cell is `GRUCell(reset="before")`.

    Args:
        source: group of the layer in the file, such as "layers/gru".
        target: path of one layer of a `Recurrent` module, such as "params/forward_0".
    """
    cell, kernels = f"{source}/cell/vars", Blocks(_GRU_GATES, axis=1)
    two = (Split(2), Squeeze((0,)), Blocks(_GRU_GATES), GRUBiases())
    return [
        Rule(f"{cell}/0", f"{target}/input_kernel", (kernels,)),
        Rule(f"{cell}/1", f"{target}/recurrent_kernel", (kernels,)),
        Rule(f"{cell}/2", (f"{target}/bias", f"{target}/candidate_bias"), two),
        Rule(f"{cell}/2", f"{target}/bias", (Blocks(_GRU_GATES),)),
    ]


def bidirectional(
    source: str,
    target: str,
    rules: Callable[[str, str], list[Rule]] = recurrent,
    *,
    layer: int = 0,
) -> list[Rule]:
    """Return the rules of `Bidirectional(..., merge_mode="concat")` around a recurrent layer.

    Args:
        source: group of the layer in the file, such as "layers/bidirectional".
        target: path of the `Recurrent` module.
        rules: of the layer inside, `recurrent` or `gru`.
        layer: of the `Recurrent` module.
    """
    return [
        *rules(f"{source}/forward_layer", f"{target}/forward_{layer}"),
        *rules(f"{source}/backward_layer", f"{target}/backward_{layer}"),
    ]


def attention(
    source: str, target: str, num_heads: int, *, num_kv_heads: int | None = None
) -> list[Rule]:
    """Return the rules of `MultiHeadAttention` and `GroupQueryAttention`, for a `Block` here.

    The keys have a bias if the layer has biases, `BlockConfig(key_bias=True)`. Keys and values of
    one size only (`value_dim`); a gate (`use_gate`) has no rule.

    Args:
        source: group of the layer in the file, such as "layers/multi_head_attention".
        target: path of the attention, such as "params/stack/layer_0/attention".
        num_heads: number of query heads.
        num_kv_heads: number of key and value heads; by default `num_heads`.
    """
    kv = num_kv_heads or num_heads
    heads = {"query": num_heads, "key": kv, "value": kv}
    rules = []
    for group in ("", "_"):  # MultiHeadAttention, GroupQueryAttention
        for name, own in heads.items():
            layouts: Sequence[Layout] = (JoinHeads(own, axis=1), JoinHeads(own))
            place = f"{source}/{group}{name}_dense"
            rules += _variables(place, f"{target}/{name}", ("kernel", "bias"), layouts)
        output = f"{source}/{group}output_dense/vars"
        rules += [
            Rule(f"{output}/0", f"{target}/output/kernel", (JoinHeads(num_heads),)),
            Rule(f"{output}/1", f"{target}/output/bias"),
        ]
    return rules


def flax_attention(source: str, target: str) -> list[Rule]:
    """Return the rules of `MultiHeadAttention` for `flax.linen.MultiHeadAttention`.

    Args:
        source: group of the layer in the file.
        target: path of the attention.
    """
    names = {"query": "query", "key": "key", "value": "value", "output": "out"}
    return [
        rule
        for name, own in names.items()
        for rule in dense(f"{source}/{name}_dense", f"{target}/{own}")
    ]


def _norm_names(scale: bool, center: bool) -> tuple[str, ...]:
    return ("scale",) * scale + ("bias",) * center


def _variables(
    source: str, target: str, names: Sequence[str], layouts: Sequence[Layout] | None = None
) -> list[Rule]:
    """Return a rule for each variable of a layer, which Keras numbers."""
    own = [()] * len(names) if layouts is None else [(layout,) for layout in layouts]
    return [
        Rule(f"{source}/vars/{index}", f"{target}/{name}", layout)
        for index, (name, layout) in enumerate(zip(names, own, strict=True))
    ]
