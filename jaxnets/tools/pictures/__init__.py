"""Pictures of a run as PNG and GIF files; they need Matplotlib and Pillow."""

from jaxnets.tools.pictures.figures import attention, code_map, confusion, curves, mistakes
from jaxnets.tools.pictures.grids import arrange, film, grid, to_pixels

__all__ = [
    "arrange",
    "attention",
    "code_map",
    "confusion",
    "curves",
    "film",
    "grid",
    "mistakes",
    "to_pixels",
]
