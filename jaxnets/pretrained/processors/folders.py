"""The processor of a folder that this library wrote, by the files that it has."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

from jaxnets.pretrained.config import Config
from jaxnets.pretrained.processors.images import ImageProcessor
from jaxnets.pretrained.processors.sound import WHISPER, SoundProcessor
from jaxnets.pretrained.processors.text import TextProcessor, read_text_processor

Processor: TypeAlias = TextProcessor | ImageProcessor | SoundProcessor


def read_processor(folder: Path) -> Processor | None:
    """Return the processor that `save` wrote beside a network; None if there is none.

    Raises:
        ValueError: a damaged file, or options that are not supported; the message names the file.
        ImportError: a tokenizer, and `tokenizers` is not installed.
    """
    file = folder / "preprocessor_config.json"
    if not file.exists():
        return read_text_processor(folder)
    if Config.read(file).content.get("feature_extractor_type") == WHISPER:
        return SoundProcessor.from_folder(folder)
    return ImageProcessor.from_folder(folder)
