"""Keras 3 on JAX: `compile` and `fit`, as in its guides.

A `fit` runs over a data set in memory of so many batches that its fixed cost is negligible. "same"
padding at a stride of 2 pads one side only; the other libraries pad both. The arithmetic is the
same.
"""

from __future__ import annotations

import os

os.environ["KERAS_BACKEND"] = "jax"

from typing import Any

import keras
import numpy as np
from keras import layers, ops

from experiments.benchmark.architectures import (
    BidirectionalGRU,
    Blocks,
    Convolutional,
    LanguageTransformer,
    Network,
    Perceptron,
    RecurrentLanguage,
    Residual,
    Vision,
)
from experiments.benchmark.sides import Prepared, Settings, read_idx, ready
from experiments.benchmark.workloads import LEARNING_RATE, PIXEL_DEVIATION, PIXEL_MEAN, Workload

LIBRARIES = ("keras", "jax")


class Positions(layers.Layer):
    """Adds learned positions to [batch, time, features]."""

    def build(self, input_shape: Any) -> None:
        """Declare the vectors."""
        self.vectors = self.add_weight(shape=input_shape[1:], initializer="random_normal")

    def call(self, x: Any) -> Any:
        """Add them."""
        return x + self.vectors[None]


class ClassToken(layers.Layer):
    """Prepends a learned vector to [batch, time, features]."""

    def build(self, input_shape: Any) -> None:
        """Declare the vector."""
        self.token = self.add_weight(shape=(1, 1, input_shape[-1]), initializer="zeros")

    def call(self, x: Any) -> Any:
        """Prepend it."""
        return ops.concatenate([ops.repeat(self.token, ops.shape(x)[0], axis=0), x], axis=1)


def _mlp(x: Any, network: Perceptron) -> Any:
    for width in network.features:
        x = layers.Dense(width, activation="relu")(x)
    return layers.Dense(network.num_outputs)(x)


def _cnn(x: Any, network: Convolutional) -> Any:
    for width in network.channels:
        x = layers.Conv2D(width, 3, padding="same", activation="relu")(x)
        x = layers.MaxPooling2D()(x)
    x = layers.Flatten()(x)
    for width in network.features:
        x = layers.Dense(width, activation="relu")(x)
    return layers.Dense(network.num_outputs)(x)


def _resnet(x: Any, network: Residual) -> Any:
    def convolve(x: Any, features: int, size: int, strides: int) -> Any:
        x = layers.Conv2D(features, size, strides, padding="same", use_bias=False)(x)
        return layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(x)

    x = layers.ReLU()(convolve(x, network.width, 3, 1))
    for features, stride in network.stages:
        for strides in (stride, 1):
            y = layers.ReLU()(convolve(x, features, 3, strides))
            y = convolve(y, features, 3, 1)
            x = x if x.shape == y.shape else convolve(x, features, 1, strides)
            x = layers.ReLU()(layers.add([x, y]))
    return layers.Dense(network.num_outputs)(layers.GlobalAveragePooling2D()(x))


def _blocks(x: Any, network: Blocks, causal: bool) -> Any:
    width, heads = network.width, network.num_heads
    for _ in range(network.num_layers):
        h = layers.LayerNormalization(epsilon=1e-6)(x)
        attend = layers.MultiHeadAttention(heads, width // heads)
        x = layers.add([x, attend(h, h, use_causal_mask=causal)])
        h = layers.LayerNormalization(epsilon=1e-6)(x)
        h = layers.Dense(4 * width)(h)
        h = keras.activations.gelu(h, approximate=True)
        x = layers.add([x, layers.Dense(width)(h)])
    return layers.LayerNormalization(epsilon=1e-6)(x)


def _gpt(x: Any, network: LanguageTransformer) -> Any:
    x = Positions()(layers.Embedding(network.num_outputs, network.width)(x))
    return layers.Dense(network.num_outputs, use_bias=False)(_blocks(x, network, True))


def _vit(x: Any, network: Vision) -> Any:
    x = layers.Conv2D(network.width, network.patch, network.patch)(x)
    x = layers.Reshape((network.num_patches, network.width))(x)
    x = _blocks(Positions()(ClassToken()(x)), network, False)
    return layers.Dense(network.num_outputs)(x[:, 0])


def _lstm(x: Any, network: RecurrentLanguage) -> Any:
    x = layers.Embedding(network.num_outputs, network.embedding)(x)
    for _ in range(network.num_layers):
        x = layers.LSTM(network.hidden, return_sequences=True)(x)
    return layers.Dense(network.num_outputs)(x)


def _gru(x: Any, network: BidirectionalGRU) -> Any:
    return layers.Dense(network.num_outputs)(layers.Bidirectional(layers.GRU(network.hidden))(x))


_OUTPUTS: dict[type[Network], Any] = {
    Perceptron: _mlp,
    Convolutional: _cnn,
    Residual: _resnet,
    LanguageTransformer: _gpt,
    Vision: _vit,
    RecurrentLanguage: _lstm,
    BidirectionalGRU: _gru,
}


def build(workload: Workload) -> Any:
    """Return the model of a workload."""
    network = workload.network
    if workload.precision != "float32":
        keras.config.set_dtype_policy(f"mixed_{workload.precision}")
    dtype = "int32" if network.reads_tokens else "float32"
    inputs = keras.Input(network.input_shape, dtype=dtype)
    # The guide on mixed precision computes the last activation in float32.
    logits = layers.Activation("linear", dtype="float32")(_OUTPUTS[type(network)](inputs, network))
    return keras.Model(inputs, logits)


def prepare(settings: Settings) -> Prepared:
    """Build a workload."""
    keras.utils.set_random_seed(0)
    workload = settings.workload
    model = build(workload)
    if workload.task == "infer":
        return infer(workload, model)
    model.compile(
        optimizer=keras.optimizers.Adam(LEARNING_RATE),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        steps_per_execution=workload.steps_per_dispatch,
    )
    if workload.task == "epoch":
        return train_epoch(workload, model, settings)
    return train(workload, model)


def train(workload: Workload, model: Any) -> Prepared:
    """Batches of a data set."""
    labels, num_steps = workload.labels(), workload.steps_per_fit
    labels = np.resize(labels, (num_steps, *labels.shape[1:])).reshape(-1, *labels.shape[2:])
    inputs = np.concatenate([workload.inputs()] * num_steps)
    size = workload.batch_size

    def run(num_steps: int) -> float:
        part = slice(num_steps * size)
        fitted = model.fit(inputs[part], labels[part], size, verbose=0, shuffle=False)
        return float(fitted.history["loss"][-1])

    return ready(
        *(workload, run, _size(model)),
        steps_per_call=num_steps,
        parts=num_steps,
        steps_first=workload.steps_per_dispatch,
    )


def infer(workload: Workload, model: Any) -> Prepared:
    """Logits of a batch."""
    inputs = workload.inputs()

    def run(num_steps: int) -> None:
        for _ in range(num_steps):
            model.predict_on_batch(inputs)

    return ready(workload, run, _size(model))


def train_epoch(workload: Workload, model: Any, settings: Settings) -> Prepared:
    """From the files to trained parameters."""
    model.optimizer.build(model.trainable_variables)
    variables = [*model.variables, *model.optimizer.variables]
    start = [np.array(variable) for variable in variables]

    def run(num_steps: int) -> float:
        for variable, value in zip(variables, start, strict=True):
            variable.assign(value)
        images = read_idx(settings.images)[..., None].astype(np.float32) / 255
        images = (images - PIXEL_MEAN) / PIXEL_DEVIATION
        labels = read_idx(settings.labels).astype(np.int32)
        part = slice(num_steps * workload.batch_size)
        fitted = model.fit(images[part], labels[part], workload.batch_size, verbose=0)
        return float(fitted.history["loss"][-1])

    return ready(workload, run, _size(model))


def _size(model: Any) -> int:
    return sum(int(np.prod(weight.shape)) for weight in model.trainable_weights)
