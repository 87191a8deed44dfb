"""Convolution: one function, several algorithms."""

from jaxnets.functional.conv.convolution import convolution

__all__ = [
    "convolution",
]
