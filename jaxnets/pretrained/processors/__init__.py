"""Inputs of pretrained networks, prepared as in their training."""

from jaxnets.pretrained.processors.images import ImageProcessor

__all__ = ["ImageProcessor"]
