"""Architectures of other libraries as networks of this one, one table each."""

from jaxnets.pretrained.architectures.architecture import Architecture
from jaxnets.pretrained.architectures.registry import ARCHITECTURES

__all__ = ["ARCHITECTURES", "Architecture"]
