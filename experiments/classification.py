"""Image classification: the options and the problem that the image experiments share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import jaxnets as jn
from experiments.harness import training
from experiments.harness.models import ModelName, make_model, prefers_map
from experiments.harness.options import Options
from experiments.harness.problem import Measured, Problem
from experiments.harness.run_folder import RunFolder
from experiments.pictures import figures


@dataclasses.dataclass(frozen=True)
class Config(Options):
    """Options of an image classification experiment."""

    model: ModelName = "convnet"
    """Network; its recipe sets the defaults shown here."""
    label_smoothing: float = 0.0
    """Weight of the uniform distribution in the training labels."""
    crop: int = 0
    """Random crop after padding by this many pixels."""
    crop_border: Literal["zero", "reflect"] = "zero"
    """What the padding shows: black, or the image reflected at its edge."""
    flip: Literal["none", "random", "alternating"] = "none"
    """Horizontal flips: drawn for each image, or each image mirrored in every other epoch."""
    cutout: int = 0
    """Side of a random square set to the mean color."""
    mixup: float = 0.0
    """Alpha of mixup; 0 is off."""
    flip_test: bool = False
    """Average the logits of each test image and its mirror image."""
    shift_test: bool = False
    """Average over two shifts of each test image by a pixel too, with half its weight each."""
    small_side: int = 0
    """Side to which images are shrunk in the first part of training; 0 shrinks none."""
    small_share: float = 0.6
    """Share of the steps that see shrunken images, where there is a side."""


def main(
    name: str, load: Callable[[Config], jn.data.ImageDataset], recipes: Mapping[str, Config]
) -> None:
    """Run an experiment from the command line.

    Args:
        name: of the experiment, also the default run folder.
        load: makes the data set.
        recipes: named options; those called like a model are that model's defaults.
    """
    training.main(name, lambda config: ImageClassification(config, load(config)), recipes)


@dataclasses.dataclass(frozen=True)
class Viewed:
    """A network that in evaluation gives the mean of its logits for several views of an image.

    Attributes:
        module: inputs [batch, height, width, channels] -> logits [batch, num_classes].
        mirrored: also view each image's mirror image.
        shifted: also view each image a pixel up and left, and a pixel down and right, with the
            border reflected; the two weigh as much as the image where it is.
    """

    module: Any
    mirrored: bool
    shifted: bool

    def apply(
        self, variables: Any, inputs: jax.Array, *, train: bool = False, **keywords: Any
    ) -> Any:
        """Apply the network as Linen does."""
        if train:
            return self.module.apply(variables, inputs, train=True, **keywords)
        views, weights = [inputs], [1.0]
        if self.shifted:
            height, width = inputs.shape[1:3]
            padded = jnp.pad(inputs, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
            views += [padded[:, d : d + height, d : d + width] for d in (0, 2)]
            weights += [0.5, 0.5]
        if self.mirrored:
            views += [view[:, :, ::-1] for view in views]
            weights *= 2
        logits = self.module.apply(variables, jnp.concatenate(views), **keywords)
        each = logits.reshape(len(views), len(inputs), -1)
        return jnp.average(each, axis=0, weights=jnp.asarray(weights, logits.dtype))


class ImageClassification(Problem):
    """A data set of images, a network and an optimizer put together as the options say."""

    def __init__(self, config: Config, dataset: jn.data.ImageDataset) -> None:
        self.options = self.config = config
        self.dataset, self.dataset_name = dataset, dataset.name
        self.module = make_model(config.model, dataset, config.precision)
        several = config.flip_test or config.shift_test
        viewed = Viewed(self.module, mirrored=config.flip_test, shifted=config.shift_test)
        self.judged = viewed if several else self.module
        self.population_strategy = "map" if prefers_map(config.model) else "vmap"
        self.resident = dict(dataset.train)
        if config.flip == "alternating":
            self.resident["numbers"] = np.arange(len(dataset.train["labels"]), dtype=np.int32)
        self.steps_per_epoch = max(len(dataset.train["labels"]) // config.batch_size, 1)
        batches = jn.data.sequential_batches(dataset.test, min(1000, len(dataset.test["labels"])))
        self.eval_batches = [jax.device_put(batch) for batch in batches(0)]
        self.objective = self._classification(label_smoothing=config.label_smoothing)
        side, share = config.small_side, config.small_share
        if not 0 <= side < min(dataset.image_shape[:2]) or not 0 <= share <= 1:
            raise ValueError(
                f"small_side is {side} and small_share {share}, for images of "
                f"{dataset.image_shape}; give a smaller side, and a share of the steps in [0, 1]"
            )
        self.shrinks = False

    def example(self) -> tuple[Any, ...]:
        return (jnp.zeros((1, *self.dataset.image_shape)),)

    def initial_variables(self, key: jax.Array) -> Mapping[str, Any]:
        variables = super().initial_variables(key)
        if self.config.model != "whitened_convnet":
            return variables
        examples = {"inputs": self.dataset.train["inputs"][:5000], "labels": None}
        # The kernel is the same for every seed: computed now, not in the program that draws them.
        with jax.ensure_compile_time_eval():
            images = self._transform(examples, jax.random.key(0), False)["inputs"]
            return jn.convolutional.set_whitening_kernel(variables, images)

    def member_source(self, seed: int) -> jn.BatchSource:
        config, train = self.config, self.resident
        if config.executor == "scan":  # the images are on the device: only indices travel
            source = jn.data.index_batches(len(train["labels"]), config.batch_size, seed=seed)
        else:
            source = jn.data.shuffled_batches(train, config.batch_size, seed=seed)
        return jn.data.with_epochs(source) if config.flip == "alternating" else source

    @property
    def small_steps(self) -> int:
        """Steps on shrunken images: whole dispatches, where others follow."""
        config = self.config
        steps = round(config.small_share * self.num_steps) if config.small_side else 0
        if steps == self.num_steps:
            return steps
        return steps - steps % config.steps_per_dispatch or steps

    @property
    def stages(self) -> Sequence[int]:
        return sorted({self.small_steps, self.num_steps} - {0})

    def prepare(self, folder: RunFolder, stage: int, states: jn.TrainState) -> str | None:
        """Shrink the images, or no longer."""
        if not self.small_steps:
            return None
        last_step = self.stages[stage]
        self.shrinks = last_step <= self.small_steps
        side = self.config.small_side if self.shrinks else self.dataset.image_shape[0]
        return f"up to step {last_step} images are {side} pixels high"

    def measure(self, states: jn.TrainState) -> Measured:
        """Evaluate the final networks on the test set: per seed, and the confusion of all."""
        metrics = {
            "accuracy": jn.metrics.accuracy,
            "confusion": jn.metrics.confusion_matrix,
            "calibration": jn.metrics.calibration,
        }
        members = self.evaluate(states, self.eval_batches, self._classification(metrics=metrics))
        self.confusion = np.mean([m["confusion"].total for m in members], axis=0)

        def mean(value: Callable[[jn.Metrics], Any]) -> float:
            return round(float(np.mean([float(value(m)) for m in members])), 6)

        metrics = jn.metrics
        return Measured(
            "test accuracy" + self._views(),
            np.array([float(m["accuracy"].compute()) for m in members]),
            details={
                "test_loss": mean(lambda m: m["loss"].compute()),
                "macro_f1": mean(lambda m: metrics.precision_recall_f1(m["confusion"])["macro_f1"]),
                "calibration_error": mean(
                    lambda m: metrics.expected_calibration_error(m["calibration"])
                ),
            },
        )

    def draw(
        self, folder: RunFolder, states: jn.TrainState, history: jn.History, measured: Measured
    ) -> None:
        names, test = self.dataset.class_names, self.dataset.test
        panels = {"loss": ("loss", "test/loss"), "accuracy": ("accuracy", "test/accuracy")}
        figures.curves(history, panels, folder.path / "curves.png")
        figures.confusion(self.confusion, names, folder.path / "confusion.png")
        mistakes = folder.path / "mistakes.png"
        probabilities = self.probabilities(states)
        figures.mistakes(test["inputs"], test["labels"], probabilities, names, mistakes)

    def probabilities(self, states: jn.TrainState) -> np.ndarray:
        """Class probabilities [test examples, num_classes], averaged over the networks."""

        @jax.jit
        def predict(states: jn.TrainState, batch: jn.Batch) -> jax.Array:
            inputs = self._transform(batch, jax.random.key(0), False)["inputs"]

            def one(state: jn.TrainState) -> jax.Array:
                return jax.nn.softmax(self.judged.apply(state.variables, inputs))

            return jnp.mean(jax.lax.map(one, self.evaluated(states)), axis=0)

        batches = [np.asarray(predict(states, batch)) for batch in self.eval_batches]
        return np.concatenate(batches)[: len(self.dataset.test["labels"])]

    def _classification(self, **options: Any) -> jn.Objective:
        return jn.with_batch_transform(jn.classification(self.judged, **options), self._transform)

    def _views(self) -> str:
        views = {
            "both mirror images": self.config.flip_test,
            "three shifts": self.config.shift_test,
        }
        taken = " and ".join(name for name, wanted in views.items() if wanted)
        return f" over {taken}" if taken else ""

    def _transform(self, batch: jn.Batch, rng: jax.Array, train: bool) -> jn.Batch:
        """Normalize, and augment while training."""
        config, data = self.config, jn.data
        images, labels = batch["inputs"], batch["labels"]
        keys = jax.random.split(rng, 4)
        if train and config.crop:  # on the raw pixels: zeros are black
            images = data.random_crop(keys[0], images, config.crop, mode=config.crop_border)
        if train and config.flip == "random":
            images = data.random_flip(keys[1], images)
        if train and config.flip == "alternating":
            images = data.alternating_flip(images, batch["numbers"], batch["epochs"])
        images = data.normalize(images, self.dataset.mean, self.dataset.std)
        if train and config.cutout:  # after normalization: zero is the mean color
            images = data.cutout(keys[2], images, config.cutout)
        if train and config.mixup:
            one_hot = jax.nn.one_hot(labels, self.dataset.num_classes)
            images, labels = data.mixup(keys[3], images, one_hot, config.mixup)
        if train and self.shrinks:  # read when a stage's step is traced
            shape = (len(images), config.small_side, config.small_side, images.shape[-1])
            images = jax.image.resize(images, shape, "linear")
        return {**batch, "inputs": images, "labels": labels}
