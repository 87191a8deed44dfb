"""Inputs of pretrained networks, prepared as in their training."""

from jaxnets.pretrained.processors.folders import Processor, read_processor
from jaxnets.pretrained.processors.gguf_tokenizers import read_gguf_tokenizer
from jaxnets.pretrained.processors.images import ImageProcessor
from jaxnets.pretrained.processors.sound import SoundProcessor
from jaxnets.pretrained.processors.text import TextProcessor, read_text_processor

__all__ = [
    "ImageProcessor",
    "Processor",
    "SoundProcessor",
    "TextProcessor",
    "read_gguf_tokenizer",
    "read_processor",
    "read_text_processor",
]
