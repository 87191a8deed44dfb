"""torch's ways to train: eager, with the fused Adam, and compiled (with the fused Adam too)."""

from __future__ import annotations

from typing import Any

import torch


def callable_of(model: torch.nn.Module, variant: str) -> Any:
    """Return what to call a network by: its compiled form in the variant "compile"."""
    return torch.compile(model) if variant == "compile" else model


def adam(
    model: torch.nn.Module, variant: str, learning_rate: float, beta1: float = 0.9
) -> torch.optim.Adam:
    """Return Adam for a network, the fused one in the variants "fused" and "compile"."""
    fused = variant in ("fused", "compile")
    return torch.optim.Adam(model.parameters(), learning_rate, (beta1, 0.999), fused=fused or None)


def num_parameters(*models: torch.nn.Module) -> int:
    """Return the number of trainable numbers of some networks."""
    return sum(parameter.numel() for model in models for parameter in model.parameters())
