"""The Linen pieces of which transformers are put together."""

from jaxnets.transformer_layers.block import Attention, Block, FeedForward
from jaxnets.transformer_layers.config import BlockConfig, Positions, build_preset
from jaxnets.transformer_layers.inputs import InputEmbedding, PositionEmbedding
from jaxnets.transformer_layers.stack import (
    Stack,
    StackCarry,
    cache_capacity,
    stack_layers,
    unstack_layers,
)

__all__ = [
    "Attention",
    "Block",
    "BlockConfig",
    "FeedForward",
    "InputEmbedding",
    "PositionEmbedding",
    "Positions",
    "Stack",
    "StackCarry",
    "build_preset",
    "cache_capacity",
    "stack_layers",
    "unstack_layers",
]
