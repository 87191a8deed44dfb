"""Convolutional networks: LeNet-5, a configurable one, ResNets, ConvNeXt, PilotNet, airbench."""

from jaxnets.models.convolutional.convnet import ConvNet, LeNet5
from jaxnets.models.convolutional.convnext import (
    ConvNeXt,
    convnext_base,
    convnext_large,
    convnext_small,
    convnext_tiny,
)
from jaxnets.models.convolutional.pilotnet import PilotNet, pilotnet
from jaxnets.models.convolutional.resnet import (
    ResNet,
    ResNet9,
    WideResNet,
    resnet9,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    wide_resnet16_4,
    wide_resnet28_10,
    wide_resnet40_4,
)
from jaxnets.models.convolutional.whitened import (
    WhitenedConvNet,
    set_whitening_kernel,
    whitening_kernel,
)

__all__ = [
    "ConvNeXt",
    "ConvNet",
    "LeNet5",
    "PilotNet",
    "ResNet",
    "ResNet9",
    "WhitenedConvNet",
    "WideResNet",
    "convnext_base",
    "convnext_large",
    "convnext_small",
    "convnext_tiny",
    "pilotnet",
    "resnet9",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "set_whitening_kernel",
    "whitening_kernel",
    "wide_resnet16_4",
    "wide_resnet28_10",
    "wide_resnet40_4",
]
