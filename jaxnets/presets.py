"""Networks, with their usual inputs, and optimizers by name."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import optax
import optax.contrib

from jaxnets import convolutional, feedforward
from jaxnets.optimizers import decay_mask


@dataclasses.dataclass(frozen=True)
class Model:
    """A network that has a name.

    Attributes:
        build: number of classes -> network.
        input_shape: of the usual example, without the batch.
        num_classes: the usual number of classes.
    """

    build: Callable[[int], nn.Module]
    input_shape: tuple[int, ...]
    num_classes: int


_RESNETS = (
    convolutional.resnet18,
    convolutional.resnet34,
    convolutional.resnet50,
    convolutional.resnet101,
    convolutional.resnet152,
)
_FOR_IMAGENET: tuple[Callable[[int], nn.Module], ...] = (
    *_RESNETS,
    convolutional.convnext_tiny,
    convolutional.convnext_small,
    convolutional.convnext_base,
    convolutional.convnext_large,
    feedforward.mixer_s32,
    feedforward.mixer_s16,
    feedforward.mixer_b32,
    feedforward.mixer_b16,
    feedforward.mixer_l32,
    feedforward.mixer_l16,
    feedforward.mixer_h14,
)
_FOR_CIFAR: tuple[Callable[[int], nn.Module], ...] = (
    convolutional.resnet9,
    convolutional.wide_resnet16_4,
    convolutional.wide_resnet28_10,
    convolutional.wide_resnet40_4,
)

#: Name -> network; a preset is called like the function that builds it.
MODELS: dict[str, Model] = {
    "mlp": Model(lambda classes: feedforward.MLP(num_outputs=classes), (28, 28, 1), 10),
    "mixer": Model(lambda classes: feedforward.MLPMixer(num_outputs=classes), (32, 32, 3), 10),
    "lenet5": Model(lambda classes: convolutional.LeNet5(num_outputs=classes), (28, 28, 1), 10),
    "convnet": Model(lambda classes: convolutional.ConvNet(num_outputs=classes), (28, 28, 1), 10),
    **{build.__name__: Model(build, (224, 224, 3), 1000) for build in _FOR_IMAGENET},
    **{build.__name__: Model(build, (32, 32, 3), 10) for build in _FOR_CIFAR},
    **{
        f"{build.__name__}_cifar": Model(functools.partial(build, stem="cifar"), (32, 32, 3), 10)
        for build in _RESNETS
    },
}

# The rate is a number in the program: no cost depends on it.
_RATE = 1e-3
#: Name -> optimizer with its usual settings.
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd": lambda: optax.sgd(_RATE),
    "momentum": lambda: optax.sgd(_RATE, momentum=0.9),
    "rmsprop": lambda: optax.rmsprop(_RATE),
    "adam": lambda: optax.adam(_RATE),
    "adamw": lambda: optax.adamw(_RATE, mask=decay_mask),
    "lion": lambda: optax.lion(_RATE, mask=decay_mask),
    "muon": lambda: optax.contrib.muon(_RATE),
}
