"""Rules of torch's layers: their names and layouts, for architectures and a user's own network."""

from __future__ import annotations

from jaxnets.pretrained.layouts import (
    ChannelsFirstRows,
    ConvolutionKernel,
    GRUBiases,
    Layout,
    Sum,
    Transpose,
)
from jaxnets.pretrained.rules import Rule


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


def recurrent(source: str, target: str) -> list[Rule]:
    """Return the rules of `torch.nn.RNN`, `LSTM` and `GRU`, all layers and both directions.

    Both have the gates in the same order. Torch's two biases are added, but for the candidate of a
    GRU, whose reset gate comes after the matmul (`GRUCell(reset="after")`). A projection
    (`proj_size`) and a GRU with the reset before the matmul have no rule.

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
