"""Weights of other libraries: tensors of their files by name, read when asked."""

from jaxnets.pretrained.files import read_tensors
from jaxnets.pretrained.inspection import Inspection, inspect
from jaxnets.pretrained.tensors import Tensors, TensorSpec

__all__ = ["Inspection", "TensorSpec", "Tensors", "inspect", "read_tensors"]
