"""Pure functions of arrays: convolution, matrix products, attention, recurrence, norms, pooling."""

from jaxnets.functional.activations import Activation, activation
from jaxnets.functional.attention import (
    alibi_bias,
    alibi_slopes,
    attention,
    attention_weights,
    causal_mask,
    distances,
    relative_buckets,
    rotary,
    sinusoidal_positions,
    window_mask,
)
from jaxnets.functional.conv import convolution
from jaxnets.functional.lengths import (
    check_lengths,
    clear_padding,
    clear_tokens,
    mean_over_time,
    padding_mask,
)
from jaxnets.functional.matmul import linear
from jaxnets.functional.normalization import batch_norm, layer_norm, rms_norm
from jaxnets.functional.patches import join_patches, split_patches
from jaxnets.functional.pooling import average_pool, global_average_pool, max_pool
from jaxnets.functional.recurrence import (
    Cell,
    ElmanCell,
    GRUCell,
    LSTMCell,
    MinGRUCell,
    MinimalGatedCell,
    MinLSTMCell,
    ParallelCell,
    keep,
    linear_recurrence,
    mask_padding,
    recurrent_scan,
    split_gates,
)
from jaxnets.functional.windows import Extent, Padding

__all__ = [
    "Activation",
    "Cell",
    "ElmanCell",
    "Extent",
    "GRUCell",
    "LSTMCell",
    "MinGRUCell",
    "MinLSTMCell",
    "MinimalGatedCell",
    "Padding",
    "ParallelCell",
    "activation",
    "alibi_bias",
    "alibi_slopes",
    "attention",
    "attention_weights",
    "average_pool",
    "batch_norm",
    "causal_mask",
    "check_lengths",
    "clear_padding",
    "clear_tokens",
    "convolution",
    "distances",
    "global_average_pool",
    "join_patches",
    "keep",
    "layer_norm",
    "linear",
    "linear_recurrence",
    "mask_padding",
    "max_pool",
    "mean_over_time",
    "padding_mask",
    "recurrent_scan",
    "relative_buckets",
    "rms_norm",
    "rotary",
    "sinusoidal_positions",
    "split_gates",
    "split_patches",
    "window_mask",
]
