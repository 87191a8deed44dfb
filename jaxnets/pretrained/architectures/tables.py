"""Rules of the layers that most architectures have, under torch's names."""

from __future__ import annotations

from jaxnets.pretrained.layouts import ConvolutionKernel, Layout, Transpose
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
