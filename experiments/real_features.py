"""A small classifier of real images; its features are compared with those of generated images."""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxnets as jn
from jaxnets.metrics.generative import ClassifierOutput

_BATCH_SIZE = 128
_STEPS_PER_DISPATCH = 50


@dataclasses.dataclass(frozen=True)
class RealFeatures:
    """A trained classifier and its outputs for real images.

    Attributes:
        module: the classifier.
        variables: its parameters and running statistics.
        dataset: the images, with the mean and standard deviation that normalize them.
        train: features and logits of training images.
        test: features and logits of as many test images.
        test_labels: classes of the test images.
    """

    module: Any
    variables: Mapping[str, Any]
    dataset: jn.data.ImageDataset
    train: ClassifierOutput
    test: ClassifierOutput
    test_labels: np.ndarray

    @classmethod
    def load(
        cls, dataset: jn.data.ImageDataset, folder: Path, *, num_images: int, epochs: int
    ) -> RealFeatures:
        """Train the classifier, or restore it from its checkpoint.

        Seed and recipe are fixed, so runs on the same images use the same features.

        Args:
            dataset: real images.
            folder: of its checkpoint.
            num_images: training and test images whose features are computed, at most.
            epochs: passes over the training set.

        Returns:
            RealFeatures.
        """
        module = _make_classifier(dataset)
        variables = _train(module, dataset, folder, epochs)
        count = min(num_images, len(dataset.test["labels"]), len(dataset.train["labels"]))
        train, test = (
            jn.classifier_features(module, variables, _normalized(dataset, images[:count]))
            for images in (dataset.train["inputs"], dataset.test["inputs"])
        )
        labels = dataset.test["labels"][:count]
        return cls(module, variables, dataset, train, test, labels)

    def of(self, images: np.ndarray) -> ClassifierOutput:
        """Return features and logits of uint8 images [images, height, width, channels]."""
        inputs = _normalized(self.dataset, images)
        return jn.classifier_features(self.module, self.variables, inputs)

    def floor(self) -> dict[str, float]:
        """Return the metrics of training images against test images, and the accuracy."""
        train, test = self.train.features, self.test.features
        similar = jn.precision_recall(test, train)
        agreement = jn.metrics.class_agreement(self.test.logits, self.test_labels)
        metrics = {
            "floor": jn.frechet_distance(test, train),
            "floor_precision": similar.precision,
            "floor_recall": similar.recall,
            "classifier_accuracy": agreement,
        }
        return {name: round(value, 6) for name, value in metrics.items()}


def _make_classifier(dataset: jn.data.ImageDataset) -> jn.ConvNet:
    features = (32, 64) if min(dataset.image_shape[:2]) < 16 else (32, 64, 128)
    return jn.ConvNet(
        features,
        hidden_features=(64,),
        num_outputs=dataset.num_classes,
        norm="batch",
        dropout_rate=0.2,
    )


def _train(
    module: jn.ConvNet, dataset: jn.data.ImageDataset, folder: Path, epochs: int
) -> Mapping[str, Any]:
    num_examples = len(dataset.train["labels"])
    batch_size = min(_BATCH_SIZE, num_examples)
    num_steps = max(epochs * num_examples // batch_size, 1)

    def transform(batch: jn.Batch, rng: jax.Array, train: bool) -> jn.Batch:
        inputs = jn.data.normalize(batch["inputs"], dataset.mean, dataset.std)
        return {**batch, "inputs": inputs}

    objective = jn.with_batch_transform(jn.classification(module), transform)
    rate = optax.warmup_cosine_decay_schedule(0.0, 3e-3, max(num_steps // 10, 1), num_steps + 1)
    update = jn.Update(objective, optax.adamw(rate, weight_decay=0.01, mask=jn.decay_mask))
    example = jnp.zeros((1, *dataset.image_shape))
    variables = jn.initialize(module, jax.random.key(0), example)
    state = jn.create_train_state(variables, update, rng=jax.random.key(1))
    try:
        state, history = jn.resume(folder, state)
    except jn.CheckpointError as error:
        warnings.warn(f"{error}; the classifier is trained again", stacklevel=3)
        shutil.rmtree(folder)
        history = jn.History()
    indices = jn.data.index_batches(num_examples, batch_size, seed=0)
    state, _ = jn.fit(
        jn.resident_steps(jn.make_train_step(update), dataset.train),
        state,
        jn.data.chunked(indices, _STEPS_PER_DISPATCH),
        num_steps=num_steps,
        hooks=[jn.Checkpointing(folder, every=num_steps, keep=1, on_signal=False)],
        history=history,
        progress=False,
    )
    return state.variables


def _normalized(dataset: jn.data.ImageDataset, images: np.ndarray) -> np.ndarray:
    return np.asarray(jn.data.normalize(jnp.asarray(images), dataset.mean, dataset.std))
