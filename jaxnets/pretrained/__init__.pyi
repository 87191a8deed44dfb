from . import keras_layers, torch_layers
from .adapters import load_adapter, save_adapter
from .formats import Tensors, TensorSpec, read_tensors
from .inspection import Inspection, inspect
from .network import PretrainedNetwork, load
from .processors import ImageProcessor, SoundProcessor, TextProcessor
from .rules import Rule
from .saving import save
from .state_dicts import from_keras, from_torch

__all__ = [
    "ImageProcessor",
    "Inspection",
    "PretrainedNetwork",
    "Rule",
    "SoundProcessor",
    "TensorSpec",
    "Tensors",
    "TextProcessor",
    "from_keras",
    "from_torch",
    "inspect",
    "keras_layers",
    "load",
    "load_adapter",
    "read_tensors",
    "save",
    "save_adapter",
    "torch_layers",
]
