"""Networks by name, with their usual inputs and what they are trained for; optimizers by name."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnets.checks import check_sizes
from jaxnets.core import Objective
from jaxnets.models import convolutional, feedforward, recurrent, transformer
from jaxnets.objectives.reconstruction import masked_reconstruction
from jaxnets.objectives.sequence import ctc, language_modeling, sequence_to_sequence
from jaxnets.objectives.supervised import classification, regression


@dataclasses.dataclass(frozen=True)
class Task:
    """What a network is trained for, as far as shapes know.

    Attributes:
        objective: module -> objective.
        inputs: the entries of a batch that the module takes.
        batch: (number of examples, shape of one) -> shapes and dtypes of a batch.
    """

    objective: Callable[[nn.Module], Objective]
    inputs: tuple[str, ...]
    batch: Callable[[int, tuple[int, ...]], dict[str, jax.ShapeDtypeStruct]]


@dataclasses.dataclass(frozen=True)
class Model:
    """A network that has a name.

    Attributes:
        build: number of outputs, which are classes or tokens, if there is one -> network.
        input_shape: of the usual example, without the batch.
        num_outputs: the usual number of outputs; None where the inputs decide on it.
        task: what it is trained for.
    """

    build: Callable[..., nn.Module]
    input_shape: tuple[int, ...]
    num_outputs: int | None
    task: Task

    def network(self, num_outputs: int | None = None) -> nn.Module:
        """Build the network.

        Args:
            num_outputs: number of classes or tokens; by default the usual one.

        Raises:
            ValueError: a number below 1, or one for a network whose inputs decide on it.
        """
        if self.num_outputs is None:
            if num_outputs is not None:
                raise ValueError(
                    f"num_outputs is {num_outputs}, and this network returns the pixels of its "
                    "inputs; leave it out"
                )
            return self.build()
        num_outputs = self.num_outputs if num_outputs is None else num_outputs
        check_sizes(num_outputs=num_outputs)
        return self.build(num_outputs)


def _ids(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _values(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


_CLASSIFICATION = Task(
    classification,
    ("inputs",),
    lambda size, shape: {"inputs": _values(size, *shape), "labels": _ids(size)},
)
_STEERING = Task(
    regression,
    ("inputs",),
    lambda size, shape: {"inputs": _values(size, *shape), "labels": _values(size, 1)},
)
_TEXT_CLASSIFICATION = Task(
    classification,
    ("inputs",),
    lambda size, shape: {"inputs": _ids(size, *shape), "labels": _ids(size)},
)
_LANGUAGE = Task(
    language_modeling,
    ("inputs",),
    lambda size, shape: {"inputs": _ids(size, *shape), "labels": _ids(size, *shape)},
)
_TRANSLATION = Task(
    sequence_to_sequence,
    ("inputs", "decoder_inputs"),
    lambda size, shape: dict.fromkeys(("inputs", "decoder_inputs", "labels"), _ids(size, *shape)),
)
_PAINTING = Task(
    masked_reconstruction, ("inputs",), lambda size, shape: {"inputs": _values(size, *shape)}
)
_RECOGNITION = Task(
    ctc,
    ("inputs",),
    # A label for every sixteen frames, such as a letter in 160 milliseconds.
    lambda size, shape: {
        "inputs": _values(size, *shape),
        "labels": _ids(size, max(shape[0] // 16, 1)),
        "label_lengths": _ids(size),
    },
)


def _with_vocabulary(build: Callable[..., nn.Module]) -> Callable[[int], nn.Module]:
    return lambda vocabulary: build(vocabulary_size=vocabulary)


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
_VITS = (
    transformer.vit_tiny16,
    transformer.vit_small16,
    transformer.vit_base16,
    transformer.vit_large16,
)
_FOR_CIFAR: tuple[Callable[[int], nn.Module], ...] = (
    convolutional.resnet9,
    convolutional.wide_resnet16_4,
    convolutional.wide_resnet28_10,
    convolutional.wide_resnet40_4,
)
_IMAGENET, _CIFAR, _GRAY = (224, 224, 3), (32, 32, 3), (28, 28, 1)
_CLASSIFIERS: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...], int]] = {
    "mlp": (lambda classes: feedforward.MLP(num_outputs=classes), _GRAY, 10),
    "mixer": (lambda classes: feedforward.MLPMixer(num_outputs=classes), _CIFAR, 10),
    "lenet5": (lambda classes: convolutional.LeNet5(num_outputs=classes), _GRAY, 10),
    "convnet": (lambda classes: convolutional.ConvNet(num_outputs=classes), _GRAY, 10),
    "whitened_convnet": (
        lambda classes: convolutional.WhitenedConvNet(num_outputs=classes),
        _CIFAR,
        10,
    ),
    **{build.__name__: (build, _IMAGENET, 1000) for build in (*_FOR_IMAGENET, *_VITS)},
    **{build.__name__: (build, _CIFAR, 10) for build in _FOR_CIFAR},
    **{
        f"{build.__name__}_cifar": (functools.partial(build, stem="cifar"), _CIFAR, 10)
        for build in _RESNETS
    },
    # Log-mel frames of a second, as in the experiments on spoken digits.
    "sequence_classifier": (
        lambda classes: recurrent.SequenceClassifier(num_outputs=classes),
        (100, 40),
        10,
    ),
    "audio_transformer": (
        lambda classes: transformer.AudioTransformer(num_outputs=classes),
        (100, 40),
        10,
    ),
}
_LANGUAGE_MODELS: dict[str, tuple[Callable[[int], nn.Module], int, int]] = {
    "recurrent_lm": (recurrent.RecurrentLM, 256, 256),
    "transformer_lm": (transformer.TransformerLM, 256, 256),
    **{
        build.__name__: (_with_vocabulary(build), context, vocabulary)
        for build, context, vocabulary in (
            (transformer.gpt2_small, 1024, 50_257),
            (transformer.gpt2_medium, 1024, 50_257),
            (transformer.gpt2_large, 1024, 50_257),
            (transformer.gpt2_xl, 1024, 50_257),
            (transformer.tinyllama, 2048, 32_000),
            (transformer.llama2_7b, 4096, 32_000),
            (transformer.llama3_8b, 8192, 128_256),
        )
    },
}
_TRANSLATORS: dict[str, tuple[Callable[[int], nn.Module], int]] = {
    "recurrent_translator": (recurrent.RecurrentTranslator, 8_000),
    "transformer_base": (transformer.transformer_base, 37_000),
    "transformer_big": (transformer.transformer_big, 37_000),
}
_TEXT_CLASSIFIERS: dict[str, tuple[Callable[[int], nn.Module], int]] = {
    "text_classifier": (lambda classes: recurrent.TextClassifier(8_000, classes), 64),
    "bert_base": (transformer.bert_base, 512),
    "bert_large": (transformer.bert_large, 512),
}

#: Name -> network; a preset is called like the function that builds it.
MODELS: dict[str, Model] = {
    **{name: Model(*values, _CLASSIFICATION) for name, values in _CLASSIFIERS.items()},
    **{
        name: Model(build, (context,), vocabulary, _LANGUAGE)
        for name, (build, context, vocabulary) in _LANGUAGE_MODELS.items()
    },
    **{
        name: Model(build, (64,), vocabulary, _TRANSLATION)
        for name, (build, vocabulary) in _TRANSLATORS.items()
    },
    **{
        name: Model(build, (time,), 2, _TEXT_CLASSIFICATION)
        for name, (build, time) in _TEXT_CLASSIFIERS.items()
    },
    **{
        build.__name__: Model(build, _IMAGENET, None, _PAINTING)
        for build in (transformer.mae_vit_base16, transformer.mae_vit_large16)
    },
    "pilotnet": Model(convolutional.pilotnet, (66, 200, 3), 1, _STEERING),
    "speech_recognizer": Model(
        lambda classes: recurrent.SpeechRecognizer(num_outputs=classes),
        (400, 40),
        29,  # letters, blank, space and apostrophe
        _RECOGNITION,
    ),
}
