"""Attention: definition, masks, position encodings, and an implementation for each platform."""

from jaxnets.functional.attention.dot_product import dot_product_attention, reference_attention
from jaxnets.functional.attention.masks import LocalMask, causal_mask, distances, window_mask
from jaxnets.functional.attention.positions import (
    LinearScaling,
    Llama3Scaling,
    RopeScaling,
    YarnScaling,
    alibi_bias,
    alibi_slopes,
    relative_buckets,
    rotary,
    sinusoidal_positions,
)
from jaxnets.functional.attention.scores import attention_weights

__all__ = [
    "LinearScaling",
    "Llama3Scaling",
    "LocalMask",
    "RopeScaling",
    "YarnScaling",
    "alibi_bias",
    "alibi_slopes",
    "attention_weights",
    "causal_mask",
    "distances",
    "dot_product_attention",
    "reference_attention",
    "relative_buckets",
    "rotary",
    "sinusoidal_positions",
    "window_mask",
]
