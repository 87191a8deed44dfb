"""Pretrained networks of other libraries, read and written; the tensors of their files by name."""

from jaxnets.pretrained.adapters import load_adapter, save_adapter
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
    "load_adapter",
    "read_tensors",
    "save",
    "save_adapter",
]
