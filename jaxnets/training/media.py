"""Images and histograms, which a hook may return besides numbers.

They go to the writers that have a `show`, not into the rows of the history, so checkpoints stay
small. A resumed run computes again those after its last checkpoint.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Image:
    """One image that a hook returns under a name.

    Attributes:
        pixels: [height, width], or [height, width, channels] with 1 (gray), 3 (RGB) or 4 channels
            (RGB and opacity); uint8, or floating in [0, 1].

    Raises:
        ValueError: any other shape or dtype.

    Example:
        >>> Image(np.zeros((28, 28))).as_uint8().shape
        (28, 28, 1)
    """

    pixels: np.ndarray | jax.Array

    def __post_init__(self) -> None:
        shape, dtype = np.shape(self.pixels), self.pixels.dtype
        if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] not in (1, 3, 4)):
            raise ValueError(
                f"an image has the shape {shape}; give [height, width] or [height, width, "
                "channels] with 1, 3 or 4 channels; join several images into one grid first"
            )
        if dtype != np.uint8 and not np.issubdtype(dtype, np.floating):
            raise ValueError(f"an image has the dtype {dtype}; give uint8, or floats in [0, 1]")

    def as_uint8(self) -> np.ndarray:
        """Return [height, width, channels] on the host; floats are clipped to [0, 1]."""
        pixels = np.asarray(self.pixels)
        if pixels.dtype != np.uint8:
            pixels = np.rint(255 * np.clip(np.nan_to_num(pixels), 0, 1)).astype(np.uint8)
        return pixels if pixels.ndim == 3 else pixels[:, :, None]  # [height, width, channels]


@dataclasses.dataclass(frozen=True, eq=False)
class Histogram:
    """The number of values in each bin; a hook returns it under a name. See `numpy.histogram`.

    Attributes:
        counts: [bins].
        edges: [bins + 1], increasing.

    Example:
        >>> Histogram.of([1.0, 1.0, 2.0], num_bins=2).counts.tolist()
        [2, 1]
    """

    counts: np.ndarray | jax.Array
    edges: np.ndarray | jax.Array

    @classmethod
    def of(cls, values: object, *, num_bins: int = 64) -> Histogram:
        """Count values on the host, without those that are NaN or infinite.

        Args:
            values: array-like of any shape.
            num_bins: number of bins of equal width, from the smallest value to the largest.

        Returns:
            The histogram.
        """
        flat = np.asarray(values, np.float64).ravel()
        return cls(*np.histogram(flat[np.isfinite(flat)], bins=num_bins))


Medium = Image | Histogram
