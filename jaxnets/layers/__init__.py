"""Layers that model families share: dense, convolution, normalization, dropout, embedding."""

from jaxnets.layers.dropout import Dropout
from jaxnets.layers.embedding import Embedding
from jaxnets.layers.frozen_batch_norm import frozen_batch_norm
from jaxnets.layers.linear import Convolution, Dense, Initializer
from jaxnets.layers.normalization import BatchNorm, LayerNorm, RMSNorm, check_norm, normalize
from jaxnets.layers.spectral_norm import SpectralNorm, largest_singular_value, linear_layer
from jaxnets.layers.subsampling import subsample, subsampled_lengths
from jaxnets.layers.upsampling import (
    EnlargedConvolution,
    TransposedConvolution,
    Upsampling,
    UpsamplingMethod,
    check_upsampling,
    depth_to_space,
    enlarge,
    enlarged_convolution,
)

__all__ = [
    "BatchNorm",
    "Convolution",
    "Dense",
    "Dropout",
    "Embedding",
    "EnlargedConvolution",
    "Initializer",
    "LayerNorm",
    "RMSNorm",
    "SpectralNorm",
    "TransposedConvolution",
    "Upsampling",
    "UpsamplingMethod",
    "check_norm",
    "check_upsampling",
    "depth_to_space",
    "enlarge",
    "enlarged_convolution",
    "frozen_batch_norm",
    "largest_singular_value",
    "linear_layer",
    "normalize",
    "subsample",
    "subsampled_lengths",
]
