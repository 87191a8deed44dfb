"""The variants of torch: eager, eager with the fused Adam, and compiled with the fused Adam."""

from __future__ import annotations

from typing import Any

import torch

from experiments.benchmark.sides import Settings


def begin(settings: Settings) -> torch.device:
    """Set up torch for a workload; return the device of its networks and data."""
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    # TF32 on a GPU, which is the default of JAX and of torch's convolutions.
    torch.set_float32_matmul_precision("high")
    return torch.device("cuda" if settings.platform == "gpu" else "cpu")


def callable_of(model: torch.nn.Module, variant: str) -> Any:
    """Return the network, compiled in the variant "compile"."""
    return torch.compile(model) if variant == "compile" else model


def adam(
    model: torch.nn.Module, variant: str, learning_rate: float, beta1: float = 0.9
) -> torch.optim.Adam:
    """Return Adam for a network, fused in the variants "fused" and "compile"."""
    fused = variant in ("fused", "compile")
    return torch.optim.Adam(model.parameters(), learning_rate, (beta1, 0.999), fused=fused or None)


def num_parameters(*models: torch.nn.Module) -> int:
    """Return the number of parameters of networks."""
    return sum(parameter.numel() for model in models for parameter in model.parameters())
