"""Rules of torch's layers: their names and layouts, for architectures and a user's own network."""

from __future__ import annotations

from jaxnets.pretrained.convolution_layouts import ConvolutionKernel, TransposedConvolutionKernel
from jaxnets.pretrained.layouts import (
    ChannelsFirstRows,
    GRUBiases,
    Layout,
    Split,
    SplitHeads,
    Sum,
    Transpose,
)
from jaxnets.pretrained.rules import Rule

_PROJECTIONS = ("query", "key", "value")


def dense(source: str, target: str, *layout: Layout) -> list[Rule]:
    """Return the rules of `torch.nn.Linear`, whose kernel is [out, in], with or without a bias.

    Args:
        source: name of the layer in the file.
        target: path of the layer.
        layout: arrangements of outputs, of kernel and bias alike, before the kernel is transposed.
    """
    return [
        Rule(f"{source}.weight", f"{target}/kernel", (*layout, Transpose())),
        Rule(f"{source}.bias", f"{target}/bias", layout),
    ]


def convolution(source: str, target: str) -> list[Rule]:
    """Return the rules of `torch.nn.Conv1d` and `Conv2d`, with or without a bias."""
    return [
        Rule(f"{source}.weight", f"{target}/kernel", (ConvolutionKernel(),)),
        Rule(f"{source}.bias", f"{target}/bias"),
    ]


def transposed_convolution(
    source: str, target: str, *, groups: int = 1, flip: bool = True
) -> list[Rule]:
    """Return the rules of `torch.nn.ConvTranspose1d` and `ConvTranspose2d`.

    The kernel is that of `flax.linen.ConvTranspose`, and with groups, which that does not have, of
    `jax.lax.conv_general_dilated(lhs_dilation=strides, feature_group_count=groups)`. Their padding
    is that of the dilated input: torch's `padding` p and `output_padding` q of a kernel of k with
    dilation d are (d (k - 1) - p, d (k - 1) - p + q) at each axis. Without dilation "VALID" is
    p = 0, q = max(stride - k, 0), and "SAME" is p = (k - stride) / 2, q = 0 where that is a whole
    number; where it is not, torch has no such padding.

    With `flip=False` the kernel is that of `layers.TransposedConvolution`. For
    `ConvTranspose(transpose_kernel=True)` the rules are those of `convolution`.

    Args:
        source: name of the layer in the file.
        target: path of the layer.
        groups: of channels.
        flip: flip the window.
    """
    layout = TransposedConvolutionKernel(groups, flip)
    return [
        Rule(f"{source}.weight", f"{target}/kernel", (layout,)),
        Rule(f"{source}.bias", f"{target}/bias"),
    ]


def norm(source: str, target: str) -> list[Rule]:
    """Return the rules of `torch.nn.LayerNorm`, `GroupNorm` and `RMSNorm`."""
    return [
        Rule(f"{source}.weight", f"{target}/scale"),
        Rule(f"{source}.bias", f"{target}/bias"),
    ]


def batch_norm(source: str, target: str) -> list[Rule]:
    """Return the rules of `torch.nn.BatchNorm`.

    Args:
        source: name of the layer in the file.
        target: path of the layer, without the collection.
    """
    return [
        *norm(source, f"params/{target}"),
        Rule(f"{source}.running_mean", f"batch_stats/{target}/mean"),
        Rule(f"{source}.running_var", f"batch_stats/{target}/var"),
    ]


def flattened_dense(source: str, target: str, size: tuple[int, ...]) -> list[Rule]:
    """Return the rules of the `torch.nn.Linear` after a flatten of an image.

    Args:
        source: name of the layer in the file.
        target: path of the layer.
        size: of the flattened image here, (height, width, channels).
    """
    return [
        Rule(f"{source}.weight", f"{target}/kernel", (Transpose(), ChannelsFirstRows(size))),
        Rule(f"{source}.bias", f"{target}/bias"),
    ]


def embedding(source: str, target: str) -> list[Rule]:
    """Return the rule of `torch.nn.Embedding`."""
    return [Rule(f"{source}.weight", f"{target}/embedding")]


def attention(source: str, target: str) -> list[Rule]:
    """Return the rules of `torch.nn.MultiheadAttention`, for the attention of a `Block` here.

    Joined and separate projections (`kdim`, `vdim`), with and without biases; with biases the keys
    have one too, `BlockConfig(key_bias=True)`. Keys and values that are learned (`add_bias_kv`)
    are refused.

    Args:
        source: name of the layer in the file.
        target: path of the attention, such as "params/stack/layer_{layer}/attention".
    """
    projections = [f"{target}/{name}" for name in _PROJECTIONS]
    return [
        *_projections(source, projections, (), ()),
        *dense(f"{source}.out_proj", f"{target}/output"),
    ]


def flax_attention(source: str, target: str, num_heads: int) -> list[Rule]:
    """Return the rules of `torch.nn.MultiheadAttention` for `flax.linen.MultiHeadAttention`.

    Also for `MultiHeadDotProductAttention`. As `attention` but for the kernels of Flax, which have
    an axis of heads.

    Args:
        source: name of the layer in the file.
        target: path of the attention.
        num_heads: number of heads.
    """
    projections = [f"{target}/{name}" for name in _PROJECTIONS]
    kernels, biases = SplitHeads(num_heads, axis=1), SplitHeads(num_heads)
    out, weight = f"{source}.out_proj", (Transpose(), SplitHeads(num_heads))
    return [
        *_projections(source, projections, (kernels,), (biases,)),
        Rule(f"{out}.weight", f"{target}/out/kernel", weight),
        Rule(f"{out}.bias", f"{target}/out/bias"),
    ]


def _projections(
    source: str,
    targets: list[str],
    kernel: tuple[Layout, ...],
    bias: tuple[Layout, ...],
) -> list[Rule]:
    """Return the rules of queries, keys and values, joined in the file or not."""
    kernels = tuple(f"{target}/kernel" for target in targets)
    biases = tuple(f"{target}/bias" for target in targets)
    return [
        Rule(f"{source}.in_proj_weight", kernels, (Split(3), Transpose(), *kernel)),
        *[
            Rule(f"{source}.{letter}_proj_weight", target, (Transpose(), *kernel))
            for letter, target in zip("qkv", kernels, strict=True)
        ],
        Rule(f"{source}.in_proj_bias", biases, (Split(3), *bias)),
    ]


def recurrent(source: str, target: str) -> list[Rule]:
    """Return the rules of `torch.nn.RNN`, `LSTM` and `GRU`, all layers and both directions.

    Both have the gates in the same order. Torch's two biases are added, but for the candidate of a
    GRU, whose reset gate comes after the matmul (`GRUCell(reset="after")`). A projection
    (`proj_size`) and a GRU with the reset before the matmul have no rule. For `bias=False` add
    zeros to the state dict, because cells here have biases.

    Args:
        source: name of the layer in the file.
        target: path of the `Recurrent` module.
    """
    rules = []
    for direction, suffix in (("forward", ""), ("backward", "_reverse")):
        layer = f"{target}/{direction}_{{layer}}"
        biases = tuple(f"{source}.bias_{one}_l{{layer}}{suffix}" for one in ("ih", "hh"))
        kernels = {"ih": "input_kernel", "hh": "recurrent_kernel"}
        rules += [
            Rule(f"{source}.weight_{one}_l{{layer}}{suffix}", f"{layer}/{name}", (Transpose(),))
            for one, name in kernels.items()
        ]
        rules += [
            Rule(biases, (f"{layer}/bias", f"{layer}/candidate_bias"), (GRUBiases(),)),
            Rule(biases, f"{layer}/bias", (Sum(),)),
        ]
    return rules
