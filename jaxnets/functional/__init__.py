"""Pure functions of arrays: convolution, matmuls, attention, recurrence, normalization, pooling."""

from jaxnets.functional.activations import Activation, activation
from jaxnets.functional.attention import (
    alibi_bias,
    alibi_slopes,
    attention_weights,
    causal_mask,
    distances,
    dot_product_attention,
    relative_buckets,
    rotary,
    sinusoidal_positions,
    window_mask,
)
from jaxnets.functional.conv import convolution
from jaxnets.functional.int8 import Int8Array, quantize_int8_array
from jaxnets.functional.lengths import (
    check_lengths,
    clear_padding,
    clear_tokens,
    last_step,
    max_over_time,
    mean_over_time,
    padding_mask,
)
from jaxnets.functional.low_rank import LowRankKernel
from jaxnets.functional.matmul import linear, transposed_linear
from jaxnets.functional.normalization import batch_norm, layer_norm, rms_norm
from jaxnets.functional.patches import interpolate_positions, patchify, unpatchify
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
    linear_recurrence,
    mask_padding,
    recurrent_scan,
    split_gates,
)
from jaxnets.functional.windows import Padding, Size

__all__ = [
    "Activation",
    "Cell",
    "ElmanCell",
    "GRUCell",
    "Int8Array",
    "LSTMCell",
    "LowRankKernel",
    "MinGRUCell",
    "MinLSTMCell",
    "MinimalGatedCell",
    "Padding",
    "ParallelCell",
    "Size",
    "activation",
    "alibi_bias",
    "alibi_slopes",
    "attention_weights",
    "average_pool",
    "batch_norm",
    "causal_mask",
    "check_lengths",
    "clear_padding",
    "clear_tokens",
    "convolution",
    "distances",
    "dot_product_attention",
    "global_average_pool",
    "interpolate_positions",
    "last_step",
    "layer_norm",
    "linear",
    "linear_recurrence",
    "mask_padding",
    "max_over_time",
    "max_pool",
    "mean_over_time",
    "padding_mask",
    "patchify",
    "quantize_int8_array",
    "recurrent_scan",
    "relative_buckets",
    "rms_norm",
    "rotary",
    "sinusoidal_positions",
    "split_gates",
    "transposed_linear",
    "unpatchify",
    "window_mask",
]
