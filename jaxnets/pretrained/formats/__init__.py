"""Readers of files of tensors, one for each format; nothing in a file is executed."""

from jaxnets.pretrained.formats.files import read_tensors
from jaxnets.storage.tensors import Tensors, TensorSpec

__all__ = ["TensorSpec", "Tensors", "read_tensors"]
