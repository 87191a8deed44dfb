"""Pretrained networks of other libraries, read and written; the tensors of their files by name."""

from jaxnets.pretrained.formats import Tensors, TensorSpec, read_tensors
from jaxnets.pretrained.inspection import Inspection, inspect
from jaxnets.pretrained.network import PretrainedNetwork, load
from jaxnets.pretrained.processors import SoundProcessor
from jaxnets.pretrained.rules import Rule
from jaxnets.pretrained.saving import save

__all__ = [
    "Inspection",
    "PretrainedNetwork",
    "Rule",
    "SoundProcessor",
    "TensorSpec",
    "Tensors",
    "inspect",
    "load",
    "read_tensors",
    "save",
]
