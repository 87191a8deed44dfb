"""Images of any size as a pretrained network takes them: resized, cropped, normalized."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from jaxnets.checks import check_sizes
from jaxnets.storage import atomic_file, read_json

_FILE = "preprocessor_config.json"
#: Pillow's numbers of its filters, as preprocessor_config.json has them.
_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}

_HALF = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
# What a processor of this type does where its file does not say.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "ViT": {"size": {"height": 224, "width": 224}, "resample": 2, **_HALF},
    "DeiT": {
        "size": {"height": 256, "width": 256},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        **_HALF,
    },
    "ConvNext": {"size": {"shortest_edge": 384}, "resample": 3, "crop_pct": 224 / 256, **_HALF},
}
_MOST_NUMBER = float(np.finfo(np.float32).max)
_STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """Resize, crop, rescale and normalize images, in this order.

    Corresponds to the image processors of `transformers` that resize with Pillow: the result is
    that of `ViTImageProcessorPil`, `DeiTImageProcessorPil` and `ConvNextImageProcessorPil`, but
    with the channels last.

    Attributes:
        size: (height, width) of all images; or the length of their shorter side, the other one
            rounded down to keep the aspect ratio; None does not resize.
        resample: filter of Pillow: "nearest", "box", "bilinear", "hamming", "bicubic", "lanczos".
        crop_size: (height, width) to cut from the center, black where the image is smaller; None
            does not crop.
        rescale: factor of the pixels, which are in [0, 255]; None does not rescale.
        mean: subtracted from each channel after rescaling; None does not normalize.
        std: what each channel is divided by then.

    Raises:
        ValueError: a field is out of range.

    Example:
        >>> process = ImageProcessor(size=None, crop_size=(2, 2))
        >>> images = [np.full((2, 3, 3), 255, np.uint8), np.zeros((4, 2, 3), np.uint8)]
        >>> process(images)[:, 0, 0].tolist()
        [[1.0, 1.0, 1.0], [-1.0, -1.0, -1.0]]
    """

    size: tuple[int, int] | int | None = (224, 224)
    resample: str = "bilinear"
    crop_size: tuple[int, int] | None = None
    rescale: float | None = 1 / 255
    mean: tuple[float, float, float] | None = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] | None = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        for name in ("size", "crop_size"):
            value = getattr(self, name)
            if value is not None:
                check_sizes(**{name: value})
            pair = isinstance(value, tuple) and len(value) == 2
            if not (value is None or pair or (name == "size" and isinstance(value, int))):
                raise ValueError(f"{name} is {value!r}; give (height, width)")
        if self.resample not in _FILTERS.values():
            raise ValueError(
                f"resample is {self.resample!r}; choose one of {', '.join(_FILTERS.values())}"
            )
        if self.rescale is not None and not _is_finite(self.rescale):
            raise ValueError(f"rescale is {self.rescale!r}; give a number, or None")
        if (self.mean is None) != (self.std is None):
            raise ValueError(
                f"mean is {self.mean} and std is {self.std}; give both, or None for both"
            )
        for name in ("mean", "std"):
            value = getattr(self, name)
            fits = isinstance(value, tuple) and len(value) == 3 and all(map(_is_finite, value))
            if value is not None and not (fits and (name == "mean" or min(value) > 0)):
                numbers = "three numbers" if name == "mean" else "three numbers above 0"
                raise ValueError(f"{name} is {value!r}; give {numbers}, one for each channel")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ImageProcessor:
        """Build the processor that a preprocessor_config.json describes.

        Args:
            config: its content. What it does not say is that of its `image_processor_type` (or
                `feature_extractor_type`): ViT, DeiT or ConvNext.

        Raises:
            ValueError: another type, an option that is not supported, or a value out of range;
                the message names it.
        """
        kind = _type_of(config)
        given = {name: value for name, value in config.items() if value is not None}
        options = {**_DEFAULTS[kind], **given}
        for name, value in config.items():
            if name.startswith("do_") and name not in _STEPS and value:
                raise ValueError(
                    f"{name} is {value!r}, which is not supported; the steps are "
                    f"{', '.join(_STEPS)}"
                )
        square = options.get("default_to_square", kind != "ConvNext")
        size: tuple[int, int] | int | None = None
        crop_size: tuple[int, int] | None = None
        if options.get("do_resize", True):
            size = _read_size("size", options["size"], square)
        if options.get("do_center_crop", False):
            read = _read_size("crop_size", options.get("crop_size"), True)
            if isinstance(read, int):
                raise ValueError(f"crop_size is {options['crop_size']!r}; give height and width")
            crop_size = read
        if kind == "ConvNext" and size is not None:
            if not isinstance(size, int):
                raise ValueError(f"size is {options['size']!r}; ConvNext needs a shortest_edge")
            size, crop_size = _convnext_sizes(size, options["crop_pct"], crop_size)
        resample = options["resample"]
        if isinstance(resample, bool) or not isinstance(resample, int) or resample not in _FILTERS:
            raise ValueError(f"resample is {resample!r}; the filters of Pillow are {_FILTERS}")
        normalizes = options.get("do_normalize", True)
        rescales = options.get("do_rescale", True)
        return cls(
            size=size,
            resample=_FILTERS[resample],
            crop_size=crop_size,
            rescale=options.get("rescale_factor", 1 / 255) if rescales else None,
            mean=_per_channel(options["image_mean"]) if normalizes else None,
            std=_per_channel(options["image_std"]) if normalizes else None,
        )

    @classmethod
    def from_folder(
        cls, path: str | os.PathLike[str], *, kind: str | None = None
    ) -> ImageProcessor:
        """Read the preprocessor_config.json of a Hugging Face folder.

        Args:
            path: the folder.
            kind: "ViT", "DeiT" or "ConvNext", where the file does not say its type.

        Raises:
            FileNotFoundError: it has none.
            ValueError: damaged, or not supported; the message has the name of the file.
        """
        file = Path(path) / _FILE
        what = "the options of an image processor that is supported"
        content = dict(read_json(file, what=what, remedy="load another folder").content)
        if not ("image_processor_type" in content or "feature_extractor_type" in content):
            content["image_processor_type"] = kind and f"{kind}ImageProcessor"
        try:
            return cls.from_config(content)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write preprocessor_config.json, as transformers and `from_config` read it.

        Args:
            folder: it is created if it is missing, an existing file is replaced.
        """
        content: dict[str, Any] = {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": self.size is not None,
            "resample": {name: number for number, name in _FILTERS.items()}[self.resample],
            "do_center_crop": self.crop_size is not None,
            "do_rescale": self.rescale is not None,
            "do_normalize": self.mean is not None,
        }
        if isinstance(self.size, int):
            content["size"] = {"shortest_edge": self.size}
        elif self.size is not None:
            content["size"] = {"height": self.size[0], "width": self.size[1]}
        if self.crop_size is not None:
            content["crop_size"] = {"height": self.crop_size[0], "width": self.crop_size[1]}
        if self.rescale is not None:
            content["rescale_factor"] = self.rescale
        if self.mean is not None and self.std is not None:
            content |= {"image_mean": list(self.mean), "image_std": list(self.std)}
        with atomic_file(Path(folder) / _FILE) as stream:
            stream.write(json.dumps(content, indent=2).encode() + b"\n")

    def __call__(self, images: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """Map images to one batch.

        Args:
            images: each uint8 [height, width, 3] in RGB order, of any size.

        Returns:
            float32 [batch, height, width, 3].

        Raises:
            ValueError: something else than such images, none, or images that still differ in size.
            ImportError: resizing without Pillow.
        """
        processed = [self._process(np.asarray(image)) for image in images]
        if not processed:
            raise ValueError("no images; give at least one")
        shapes = sorted({image.shape[:2] for image in processed})
        if len(shapes) > 1:
            raise ValueError(
                f"the images differ in size after resizing: {shapes[0]} and {shapes[-1]}; give "
                "size=(height, width) or a crop_size, or one image at a time"
            )
        return np.stack(processed)

    def _process(self, image: np.ndarray) -> np.ndarray:
        if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8 or not image.size:
            raise ValueError(
                f"an image has shape {image.shape} and type {image.dtype}; give a sequence of "
                "images, each uint8 [height, width, 3]"
            )
        if self.size is not None:
            image = _resize(image, self._resized(*image.shape[:2]), self.resample)
        if self.crop_size is not None:
            image = _center_crop(image, self.crop_size)
        # What each channel makes of the 256 values of a pixel: [256, channels].
        values = np.arange(256.0) * (1 if self.rescale is None else self.rescale)
        table = np.repeat(values.astype(np.float32)[:, None], 3, axis=1)
        mean = np.asarray(self.mean or (0, 0, 0), np.float32)
        std = np.asarray(self.std or (1, 1, 1), np.float32)
        return ((table - mean) / std)[image, np.arange(3)]

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if not isinstance(self.size, int):
            return self.size or (height, width)
        if width <= height:
            return int(self.size * height / width), self.size
        return self.size, int(self.size * width / height)


def _is_finite(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) <= _MOST_NUMBER


def _type_of(config: Mapping[str, Any]) -> str:
    """Return the type of a processor: ViT for ViTImageProcessorFast or ViTFeatureExtractor."""
    name = config.get("image_processor_type") or config.get("feature_extractor_type")
    kind = re.sub("(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", str(name))
    if kind not in _DEFAULTS:
        known = ", ".join(f"{kind}ImageProcessor" for kind in _DEFAULTS)
        raise ValueError(f"image_processor_type is {name!r}; those that can be read are {known}")
    return kind


def _read_size(name: str, value: Any, square: bool) -> tuple[int, int] | int:
    """Return (height, width), or the shortest edge, of any of the ways in which files say it."""
    read: Any = value
    if isinstance(value, Mapping):
        given = {key: entry for key, entry in value.items() if entry is not None}
        if given.keys() == {"height", "width"}:
            read = (given["height"], given["width"])
        elif given.keys() == {"shortest_edge"}:
            read = given["shortest_edge"]
    elif isinstance(value, list):
        read = tuple(value)
    elif isinstance(value, int) and square:
        read = (value, value)
    sides = read if isinstance(read, tuple) else (read,)
    if len(sides) > 2 or any(type(side) is not int or side < 1 for side in sides):
        raise ValueError(
            f"{name} is {value!r}; what can be read is a number, [height, width], or an object "
            "with height and width or with shortest_edge"
        )
    return read


def _convnext_sizes(
    edge: int, crop_fraction: Any, crop_size: tuple[int, int] | None
) -> tuple[tuple[int, int] | int, tuple[int, int] | None]:
    """Return size and crop: below 384 pixels ConvNext resizes to more, and crops the center."""
    if edge >= 384:
        return (edge, edge), crop_size
    if not _is_finite(crop_fraction) or crop_fraction <= 0:
        raise ValueError(f"crop_pct is {crop_fraction!r}; give a fraction, such as 0.875")
    if crop_size not in (None, (edge, edge)):
        raise ValueError(
            f"crop_size is {crop_size} beside a shortest_edge of {edge} with crop_pct "
            f"{crop_fraction}, which crops already; two crops are not supported"
        )
    return int(edge / crop_fraction), (edge, edge)


def _per_channel(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,) * 3


def _resize(image: np.ndarray, size: tuple[int, int], resample: str) -> np.ndarray:
    pillow = _import_pillow()
    filters = pillow.Resampling
    height, width = size
    resized = pillow.fromarray(image).resize((width, height), filters[resample.upper()])
    return np.asarray(resized)


def _import_pillow() -> ModuleType:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("resizing needs Pillow: pip install 'jaxnets[pictures]'") from error
    return Image


def _center_crop(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Cut the center out; where the image is smaller, its center lies in a black one."""
    padding = [(0, 0)] * 3
    for axis in (0, 1):
        missing = max(size[axis] - image.shape[axis], 0)
        before = (missing + 1) // 2
        padding[axis] = (before, missing - before)
    image = np.pad(image, padding)
    top, left = ((image.shape[axis] - size[axis]) // 2 for axis in (0, 1))
    return image[top : top + size[0], left : left + size[1]]
