"""Weights of other libraries: tensors of their files by name, read when asked."""

from jaxnets.pretrained.formats import Tensors, TensorSpec, read_tensors
from jaxnets.pretrained.inspection import Inspection, inspect

__all__ = ["Inspection", "TensorSpec", "Tensors", "inspect", "read_tensors"]
