"""Transformers for text, images and audio: models, presets and their building blocks."""

from jaxnets.models.transformer.audio import AudioTransformer
from jaxnets.models.transformer.block import Attention, Block, FeedForward
from jaxnets.models.transformer.config import BlockConfig, Positions
from jaxnets.models.transformer.embeddings import InputEmbedding, PositionEmbedding
from jaxnets.models.transformer.encoder import (
    MaskedLM,
    TransformerClassifier,
    TransformerEncoder,
    bert_base,
    bert_large,
)
from jaxnets.models.transformer.language_model import (
    TransformerLM,
    gpt2_large,
    gpt2_medium,
    gpt2_small,
    gpt2_xl,
    llama2_7b,
    llama3_8b,
    tinyllama,
)
from jaxnets.models.transformer.masked_autoencoder import (
    MAEOutput,
    Masked,
    MaskedAutoencoder,
    inpaint,
    mae_vit_base16,
    mae_vit_large16,
)
from jaxnets.models.transformer.stack import (
    Stack,
    StackCarry,
    stack_layers,
    unstack_layers,
)
from jaxnets.models.transformer.translator import (
    TransformerTranslator,
    flan_t5_base,
    flan_t5_large,
    flan_t5_small,
    t5_base,
    t5_large,
    t5_small,
    transformer_base,
    transformer_big,
)
from jaxnets.models.transformer.vision import (
    PatchEncoder,
    VisionTransformer,
    vit_base16,
    vit_large16,
    vit_small16,
    vit_tiny16,
)

__all__ = [
    "Attention",
    "AudioTransformer",
    "Block",
    "BlockConfig",
    "FeedForward",
    "InputEmbedding",
    "MAEOutput",
    "Masked",
    "MaskedAutoencoder",
    "MaskedLM",
    "PatchEncoder",
    "PositionEmbedding",
    "Positions",
    "Stack",
    "StackCarry",
    "TransformerClassifier",
    "TransformerEncoder",
    "TransformerLM",
    "TransformerTranslator",
    "VisionTransformer",
    "bert_base",
    "bert_large",
    "flan_t5_base",
    "flan_t5_large",
    "flan_t5_small",
    "gpt2_large",
    "gpt2_medium",
    "gpt2_small",
    "gpt2_xl",
    "inpaint",
    "llama2_7b",
    "llama3_8b",
    "mae_vit_base16",
    "mae_vit_large16",
    "stack_layers",
    "t5_base",
    "t5_large",
    "t5_small",
    "tinyllama",
    "transformer_base",
    "transformer_big",
    "unstack_layers",
    "vit_base16",
    "vit_large16",
    "vit_small16",
    "vit_tiny16",
]
