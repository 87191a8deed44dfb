"""Default sharding rules of the network families, for `state_sharding`.

Kernels are [..., channels, features]. "fsdp" splits the axis that "tensor" does not.
"""

from __future__ import annotations

from jax.sharding import PartitionSpec

from jaxnets.core import FSDP_AXIS, TENSOR_AXIS
from jaxnets.training.sharding import ShardingRules

#: Features split: each device computes some of them, from all channels.
_COLUMNS = PartitionSpec(FSDP_AXIS, TENSOR_AXIS)
#: Channels split: each device sums over some of them, and the sums are reduced.
_ROWS = PartitionSpec(TENSOR_AXIS, FSDP_AXIS)
_COPIES = PartitionSpec()

# Vectors and scalars: gathering them costs more than it saves.
_VECTORS = [(r"(^|/)(bias|candidate_bias|scale|mask|token)$", _COPIES)]
_DENSE = [(r"(^|/)kernel$", _COLUMNS)]
# Gates lie side by side in the features, and every step of the scan needs all of them.
_RECURRENT = [
    (r"(^|/)(recurrent_kernel|input_kernel|feed_kernel)$", PartitionSpec(None, FSDP_AXIS)),
    (r"(^|/)(query_kernel|energy_kernel)$", PartitionSpec(FSDP_AXIS, None)),
]
_EMBEDDINGS = [
    (r"(^|/)(position|segment)/embedding$", PartitionSpec(None, FSDP_AXIS)),
    (r"(^|/)embedding$", _ROWS),  # [vocabulary, features]
]

_RULES: dict[str, ShardingRules] = {
    # Every second layer by channels, so that features are exchanged once for two layers.
    "feedforward": [
        (r"(^|/)(hidden_\d*[13579]|channel_out|token_out)/kernel$", _ROWS),
        *_DENSE,
        *_VECTORS,
    ],
    "convolutional": [
        (r"(^|/)reduce/kernel$", _ROWS),  # the second dense layer of a ConvNeXt block
        *_DENSE,
        *_VECTORS,
    ],
    "recurrent": [*_RECURRENT, *_EMBEDDINGS, *_DENSE, *_VECTORS],
    "autoencoder": [
        (r"(^|/)codebook$", PartitionSpec(None, FSDP_AXIS)),
        *_DENSE,
        *_VECTORS,
    ],
    "gan": [*_EMBEDDINGS, *_DENSE, *_VECTORS],
    # Heads and hidden features split, one reduction after each block.
    "transformer": [
        (r"/output/kernel$", _ROWS),
        (r"relative_bias$", PartitionSpec(None, TENSOR_AXIS)),  # [buckets, heads]
        *_EMBEDDINGS,
        *_DENSE,
        *_VECTORS,
    ],
}


def sharding_rules(family: str) -> ShardingRules:
    """Return the default sharding rules of a network family.

    Dense kernels, heads, vocabularies and features of convolutions are split over "tensor", and
    with "fsdp" every array of two or more axes is split. A list, to which yours can be added in
    front: the first rule that matches decides.

    Args:
        family: "feedforward", "convolutional", "recurrent", "autoencoder", "gan" or "transformer".

    Returns:
        [(pattern, partition), ...] for `state_sharding`.

    Raises:
        ValueError: an unknown family.

    Example:
        >>> pattern, partition = sharding_rules("transformer")[0]
        >>> pattern, tuple(partition)
        ('/output/kernel$', ('tensor', 'fsdp'))

    References:
        Shoeybi et al. 2019, arXiv:1909.08053, section 3.
    """
    if family not in _RULES:
        raise ValueError(f"no sharding rules for {family!r}; give one of {', '.join(_RULES)}")
    return list(_RULES[family])
