"""Architectures by name, each with the usual shape of its inputs and its usual objective."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

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
    """An objective and the shapes of its batches.

    Attributes:
        objective: module -> objective.
        inputs: the entries of a batch that the module takes.
        batch: (batch size, shape of one example) -> shapes and dtypes of a batch.
    """

    objective: Callable[[nn.Module], Objective]
    inputs: tuple[str, ...]
    batch: Callable[[int, tuple[int, ...]], dict[str, jax.ShapeDtypeStruct]]


@dataclasses.dataclass(frozen=True)
class Model:
    """A named architecture: a class or a preset, and its defaults.

    Attributes:
        build: class of a network or preset; keyword fields -> network.
        input_shape: usual shape of one example, without the batch.
        num_outputs: usual number of outputs, which are classes or tokens; None where the inputs
            determine it.
        task: what it is usually trained for.
        output_field: the argument of `build` that takes the number of outputs.
    """

    build: Callable[..., nn.Module]
    input_shape: tuple[int, ...]
    num_outputs: int | None
    task: Task
    output_field: str = "num_outputs"

    def network(self, num_outputs: int | None = None, **fields: Any) -> nn.Module:
        """Build the network.

        Args:
            num_outputs: number of classes or tokens; by default the usual one.
            fields: further arguments of `build`, such as `precision`.

        Raises:
            ValueError: a number below 1, or one for a network whose inputs determine it.

        Example:
            >>> MODELS["mlp"].network(3, features=(16,)).features
            (16,)
        """
        if self.num_outputs is None:
            if num_outputs is not None:
                raise ValueError(
                    f"num_outputs is {num_outputs}, and this network returns the pixels of its "
                    "inputs; leave it out"
                )
            return self.build(**fields)
        num_outputs = self.num_outputs if num_outputs is None else num_outputs
        check_sizes(num_outputs=num_outputs)
        return self.build(**{self.output_field: num_outputs}, **fields)


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
_TRANSCRIPTION = Task(
    sequence_to_sequence,
    ("inputs", "decoder_inputs"),
    # One token for every sixteen frames, as in `_RECOGNITION`.
    lambda size, shape: {
        "inputs": _values(size, *shape),
        **dict.fromkeys(("decoder_inputs", "labels"), _ids(size, max(shape[0] // 16, 1))),
    },
)
_INPAINTING = Task(
    masked_reconstruction, ("inputs",), lambda size, shape: {"inputs": _values(size, *shape)}
)
_RECOGNITION = Task(
    ctc,
    ("inputs",),
    # One label for every sixteen frames, such as one letter in 160 milliseconds.
    lambda size, shape: {
        "inputs": _values(size, *shape),
        "labels": _ids(size, max(shape[0] // 16, 1)),
        "label_lengths": _ids(size),
    },
)

_IMAGENET, _CIFAR, _GRAY = (224, 224, 3), (32, 32, 3), (28, 28, 1)
_CLASSIFIERS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "mlp": (feedforward.MLP, _GRAY),
    "mixer": (feedforward.MLPMixer, _CIFAR),
    "lenet5": (convolutional.LeNet5, _GRAY),
    "convnet": (convolutional.ConvNet, _GRAY),
    "whitened_convnet": (convolutional.WhitenedConvNet, _CIFAR),
}
_RESNETS = (
    convolutional.resnet18,
    convolutional.resnet34,
    convolutional.resnet50,
    convolutional.resnet101,
    convolutional.resnet152,
)
_IMAGENET_PRESETS = (
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
    transformer.vit_tiny16,
    transformer.vit_small16,
    transformer.vit_base16,
    transformer.vit_large16,
)
_CIFAR_PRESETS = {
    **{
        build.__name__: build
        for build in (
            convolutional.resnet9,
            convolutional.wide_resnet16_4,
            convolutional.wide_resnet28_10,
            convolutional.wide_resnet40_4,
        )
    },
    **{f"{build.__name__}_cifar": functools.partial(build, stem="cifar") for build in _RESNETS},
}
_LM_PRESETS = (  # preset, context length of its training, vocabulary
    (transformer.gpt2_small, 1024, 50_257),
    (transformer.gpt2_medium, 1024, 50_257),
    (transformer.gpt2_large, 1024, 50_257),
    (transformer.gpt2_xl, 1024, 50_257),
    (transformer.tinyllama, 2048, 32_000),
    (transformer.llama2_7b, 4096, 32_000),
    (transformer.llama3_8b, 8192, 128_256),
    (transformer.mistral_7b, 8192, 32_000),
    (transformer.smollm2_135m, 8192, 49_152),
    (transformer.qwen2_0_5b, 32_768, 151_936),
    (transformer.qwen3_0_6b, 32_768, 151_936),
    (transformer.gemma2_2b, 8192, 256_000),
    (transformer.gemma3_1b, 32_768, 262_144),
)
_TRANSLATOR_PRESETS = (  # preset, vocabulary
    (transformer.transformer_base, 37_000),
    (transformer.transformer_big, 37_000),
    (transformer.t5_small, 32_128),
    (transformer.t5_base, 32_128),
    (transformer.t5_large, 32_128),
    (transformer.flan_t5_small, 32_128),
    (transformer.flan_t5_base, 32_128),
    (transformer.flan_t5_large, 32_128),
)
_WHISPER_PRESETS = (  # preset, mel features, vocabulary
    (transformer.whisper_tiny, 80, 51_865),
    (transformer.whisper_base, 80, 51_865),
    (transformer.whisper_small, 80, 51_865),
    (transformer.whisper_medium, 80, 51_865),
    (transformer.whisper_large, 80, 51_865),
    (transformer.whisper_large_v3, 128, 51_866),
    (transformer.whisper_turbo, 128, 51_866),
)

#: Name -> architecture. A preset has the name of the function that builds it.
MODELS: dict[str, Model] = {
    **{
        name: Model(build, shape, 10, _CLASSIFICATION)
        for name, (build, shape) in _CLASSIFIERS.items()
    },
    **{
        build.__name__: Model(build, _IMAGENET, 1000, _CLASSIFICATION, "num_classes")
        for build in _IMAGENET_PRESETS
    },
    **{
        name: Model(build, _CIFAR, 10, _CLASSIFICATION, "num_classes")
        for name, build in _CIFAR_PRESETS.items()
    },
    # Log-mel frames of one second, as in the experiments on spoken digits.
    "sequence_classifier": Model(recurrent.SequenceClassifier, (100, 40), 10, _CLASSIFICATION),
    "audio_transformer": Model(transformer.AudioTransformer, (100, 40), 10, _CLASSIFICATION),
    "recurrent_lm": Model(recurrent.RecurrentLM, (256,), 256, _LANGUAGE, "vocabulary_size"),
    "transformer_lm": Model(transformer.TransformerLM, (256,), 256, _LANGUAGE, "vocabulary_size"),
    **{
        build.__name__: Model(build, (context,), vocabulary, _LANGUAGE, "vocabulary_size")
        for build, context, vocabulary in _LM_PRESETS
    },
    "recurrent_translator": Model(
        recurrent.RecurrentTranslator, (64,), 8_000, _TRANSLATION, "source_vocabulary_size"
    ),
    **{
        build.__name__: Model(build, (64,), vocabulary, _TRANSLATION, "vocabulary_size")
        for build, vocabulary in _TRANSLATOR_PRESETS
    },
    **{
        build.__name__: Model(
            build, (3000, num_mels), vocabulary, _TRANSCRIPTION, "vocabulary_size"
        )
        for build, num_mels, vocabulary in _WHISPER_PRESETS
    },
    "text_classifier": Model(
        functools.partial(recurrent.TextClassifier, 8_000), (64,), 2, _TEXT_CLASSIFICATION
    ),
    **{
        build.__name__: Model(build, (512,), 2, _TEXT_CLASSIFICATION)
        for build in (transformer.bert_base, transformer.bert_large)
    },
    **{
        build.__name__: Model(build, _IMAGENET, None, _INPAINTING)
        for build in (transformer.mae_vit_base16, transformer.mae_vit_large16)
    },
    "pilotnet": Model(convolutional.pilotnet, (66, 200, 3), 1, _STEERING),
    "speech_recognizer": Model(
        recurrent.SpeechRecognizer,
        (400, 40),
        29,  # letters, blank, space and apostrophe
        _RECOGNITION,
    ),
}
