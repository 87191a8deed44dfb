"""What the networks for images have in common: the size of their images and their processor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxnets.pretrained.config import Config
from jaxnets.pretrained.processors.images import ImageProcessor

_PROCESSORS = {"vit": "ViT", "deit": "DeiT", "convnext": "ConvNext", "resnet": "ConvNext"}


def square(config: Config, name: str, default: int) -> int:
    """Return the side of a square that config.json says as a number or as two equal ones.

    Raises:
        ValueError: something else.
    """
    height, width = height_width(config, name, default)
    if height != width:
        raise config.error(name, "is not supported; supported are squares")
    return height


def height_width(config: Config, name: str, default: int) -> tuple[int, int]:
    """Return a size that config.json says as a number or as height and width.

    Raises:
        ValueError: something else.
    """
    value = config.content.get(name, default)
    if not isinstance(value, list):
        side = config.integer(name, default)
        return side, side
    if len(value) != 2 or any(type(side) is not int or side < 1 for side in value):
        raise config.error(name, "is neither an integer above 0 nor two of them")
    return value[0], value[1]


def image_input(size: tuple[int, int], config: Config) -> list[jax.ShapeDtypeStruct]:
    """Return the shape of one image, with the channels that config.json says."""
    return [jax.ShapeDtypeStruct((1, *size, config.integer("num_channels", 3)), jnp.float32)]


def grid_size(content: Mapping[str, Any], num_patches: int) -> int | list[int]:
    """Return the `image_size` of a number of patches.

    Args:
        content: entries of config.json. If its `image_size` has so many patches, it counts.
        num_patches: in an image; of another size than in `content` it is a square.

    Raises:
        ValueError: no square number.
    """
    size, patch = content.get("image_size"), content["patch_size"]
    height, width = size if isinstance(size, list) else (size, size)
    if size is not None and (height // patch) * (width // patch) == num_patches:
        return size
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise ValueError(
            f"{num_patches} patches are no square, so that the image_size is unknown; give a "
            "PretrainedNetwork with config={'image_size': [height, width]}"
        )
    return side * patch


def read_image_processor(folder: Path, config: Config) -> ImageProcessor | None:
    """Return the processor of a folder, None if it has no preprocessor_config.json.

    Raises:
        ValueError: damaged, or not supported; the message has the name of the file.
    """
    try:
        return ImageProcessor.from_folder(folder, kind=_PROCESSORS[config.content["model_type"]])
    except FileNotFoundError:
        return None
