"""Attention: the formula, masks, positions, and how it is computed on each platform."""

from jaxnets.functional.attention.dot_product import attention
from jaxnets.functional.attention.masks import Reach, causal_mask, distances, window_mask
from jaxnets.functional.attention.positions import (
    alibi_bias,
    alibi_slopes,
    relative_buckets,
    rotary,
    sinusoidal_positions,
)
from jaxnets.functional.attention.scores import attention_weights

__all__ = [
    "Reach",
    "alibi_bias",
    "alibi_slopes",
    "attention",
    "attention_weights",
    "causal_mask",
    "distances",
    "relative_buckets",
    "rotary",
    "sinusoidal_positions",
    "window_mask",
]
