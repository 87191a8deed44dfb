"""Image classification: options and problem shared by the image experiments."""

from __future__ import annotations

import dataclasses
import functools
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
from jaxnets.tools.pictures import figures


@dataclasses.dataclass(frozen=True)
class Config(Options):
    """Options of an image classification experiment."""

    model: ModelName = "convnet"
    """Network; its recipe sets the other defaults."""
    label_smoothing: float = 0.0
    """Weight of the uniform distribution in the training labels."""
    crop: int = 0
    """Random crop after padding by this many pixels."""
    crop_border: Literal["zero", "reflect"] = "zero"
    """Padding mode of the crop: zeros (black) or reflection."""
    flip: Literal["none", "random", "alternating"] = "none"
    """Horizontal flips: random per image, or every image in every other epoch."""
    cutout: int = 0
    """Side of a random square set to the mean color."""
    mixup: float = 0.0
    """Alpha of mixup; 0 is off."""
    flip_test: bool = False
    """Test-time augmentation: average the logits of each test image and its mirror image."""
    shift_test: bool = False
    """Test-time augmentation: also average over two shifts by one pixel, at half the weight."""
    small_side: int = 0
    """Height and width to which training images are downsampled at first; 0 disables this."""
    small_share: float = 0.6
    """Fraction of the steps with downsampled images, if --small-side is set."""


def main(
    name: str, load: Callable[[Config], jn.data.ImageDataset], recipes: Mapping[str, Config]
) -> None:
    """Run an experiment from the command line.

    Args:
        name: of the experiment, also the default run folder.
        load: options -> data set.
        recipes: {name: options}; a recipe named like a model sets that model's defaults.
    """
    training.main(name, lambda config: ImageClassification(config, load(config)), recipes)


@dataclasses.dataclass(frozen=True)
class AveragedViews:
    """A network with test-time augmentation: it averages the logits of several views of an image.

    Attributes:
        module: inputs [batch, height, width, channels] -> logits [batch, num_classes].
        mirrored: add the mirror image of every view.
        shifted: add the image shifted by a pixel up and left, and by a pixel down and right, with
            a reflected border; each has half the weight of the unshifted image.
    """

    module: Any
    mirrored: bool
    shifted: bool

    def apply(
        self,
        variables: Any,
        inputs: jax.Array,
        *,
        train: bool = False,
        weights: jax.Array | None = None,
        **keywords: Any,
    ) -> Any:
        """Apply the network, with the signature of a Linen module; in training without views."""
        if train:
            keywords |= jn.weights_keyword(self.module, weights, variables)
            return self.module.apply(variables, inputs, train=True, **keywords)
        views, shares = [inputs], [1.0]
        if self.shifted:
            height, width = inputs.shape[1:3]
            padded = jnp.pad(inputs, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
            views += [padded[:, d : d + height, d : d + width] for d in (0, 2)]
            shares += [0.5, 0.5]
        if self.mirrored:
            views += [view[:, :, ::-1] for view in views]
            shares *= 2
        logits = self.module.apply(variables, jnp.concatenate(views), **keywords)
        each = logits.reshape(len(views), len(inputs), -1)  # [views, batch, classes]
        return jnp.average(each, axis=0, weights=jnp.asarray(shares, logits.dtype))


class ImageClassification(Problem):
    """A data set of images and a network, trained with the options."""

    def __init__(self, config: Config, dataset: jn.data.ImageDataset) -> None:
        self.options = self.config = config
        self.dataset, self.dataset_name = dataset, dataset.name
        self.module = make_model(config.model, dataset, config.precision)
        several = config.flip_test or config.shift_test
        viewed = AveragedViews(self.module, mirrored=config.flip_test, shifted=config.shift_test)
        self.viewed = viewed if several else self.module
        self.population_strategy = "map" if prefers_map(config.model) else "vmap"
        self.resident = dict(dataset.train)
        if config.flip == "alternating":
            self.resident["numbers"] = np.arange(len(dataset.train["labels"]), dtype=np.int32)
        self.steps_per_epoch = max(len(dataset.train["labels"]) // config.batch_size, 1)
        batches = jn.data.sequential_batches(dataset.test, min(1000, len(dataset.test["labels"])))
        self.eval_batches = [jax.device_put(batch) for batch in batches(0)]
        self.objective = self._training_objective(small_side=0)
        side, share = config.small_side, config.small_share
        if not 0 <= side < min(dataset.image_shape[:2]) or not 0 <= share <= 1:
            raise ValueError(
                f"small_side is {side} and small_share {share}, for images of "
                f"{dataset.image_shape}; give a smaller side, and a share of the steps in [0, 1]"
            )

    def example(self) -> tuple[Any, ...]:
        return (jnp.zeros((1, *self.dataset.image_shape)),)

    def initial_variables(self, key: jax.Array) -> Mapping[str, Any]:
        variables = super().initial_variables(key)
        if self.config.model != "whitened_convnet":
            return variables
        examples = {"inputs": self.dataset.train["inputs"][:5000], "labels": None}
        # The kernel does not depend on the seed: compute it now, outside of the traced program.
        with jax.ensure_compile_time_eval():
            images = self._transform(examples, jax.random.key(0), False)["inputs"]
            return jn.convolutional.set_whitening_kernel(variables, images)

    def member_source(self, seed: int) -> jn.BatchSource:
        source = super().member_source(seed)
        return jn.data.with_epochs(source) if self.config.flip == "alternating" else source

    @property
    def small_steps(self) -> int:
        """Steps on downsampled images, rounded down to whole dispatches if other steps follow."""
        config = self.config
        steps = round(config.small_share * self.num_steps) if config.small_side else 0
        if steps == self.num_steps:
            return steps
        return steps - steps % config.steps_per_dispatch or steps

    @property
    def stages(self) -> Sequence[int]:
        return sorted({self.small_steps, self.num_steps} - {0})

    def prepare(self, folder: RunFolder, stage: int, states: jn.TrainState) -> str | None:
        """Set the image size of a stage."""
        if not self.small_steps:
            return None
        last_step = self.stages[stage]
        small_side = self.config.small_side if last_step <= self.small_steps else 0
        self.objective = self._training_objective(small_side=small_side)
        side = small_side or self.dataset.image_shape[0]
        return f"up to step {last_step} images are {side} pixels high"

    def _training_objective(self, *, small_side: int) -> jn.Objective:
        smoothing = self.config.label_smoothing
        return self._classification(small_side=small_side, label_smoothing=smoothing)

    def measure(self, states: jn.TrainState) -> Measured:
        """Evaluate the final networks on the test set; the confusion is their mean."""
        metrics = {
            "accuracy": jn.metrics.accuracy,
            "confusion": jn.metrics.confusion_matrix,
            "calibration": jn.metrics.calibration,
        }
        eval_step = self.eval_step(self._classification(metrics=metrics))
        measured = jn.evaluate(eval_step, self.evaluated(states), self.eval_batches)
        # Shares of all examples, [seeds, true class, predicted class], to counts.
        shares = measured["confusion"].mean(axis=0)
        self.confusion = (shares * len(self.dataset.test["labels"])).round(3)
        macro_f1 = jn.metrics.precision_recall_f1(measured["confusion"])["macro_f1"]
        calibration_error = jn.metrics.expected_calibration_error(measured["calibration"])
        return Measured(
            "test accuracy" + self._views(),
            np.array(measured["accuracy"]),
            details={
                "test_loss": round(float(np.mean(measured["loss"])), 6),
                "macro_f1": round(float(np.mean(macro_f1)), 6),
                "calibration_error": round(float(np.mean(calibration_error)), 6),
            },
        )

    def draw(
        self, folder: RunFolder, states: jn.TrainState, history: jn.History, measured: Measured
    ) -> dict[str, str]:
        names, test = self.dataset.class_names, self.dataset.test
        panels = {"loss": ("loss", "test/loss"), "accuracy": ("accuracy", "test/accuracy")}
        figures.curves(history, panels, folder.path / "curves.png")
        seeds = self.config.seeds
        place = folder.path / "confusion.png"
        figures.confusion(self.confusion, names, place, num_networks=seeds)
        images, labels, probabilities = test["inputs"], test["labels"], self.probabilities(states)
        place = folder.path / "mistakes.png"
        figures.mistakes(images, labels, probabilities, names, place, num_networks=seeds)
        return {}

    def probabilities(self, states: jn.TrainState) -> np.ndarray:
        """Return class probabilities [test examples, num_classes], averaged over the networks."""

        @jax.jit
        def predict(states: jn.TrainState, batch: jn.Batch) -> jax.Array:
            inputs = self._transform(batch, jax.random.key(0), False)["inputs"]

            def one(state: jn.TrainState) -> jax.Array:
                return jax.nn.softmax(self.viewed.apply(state.variables, inputs))

            return jnp.mean(jax.lax.map(one, states), axis=0)

        states = self.evaluated(states)
        batches = [np.asarray(predict(states, batch)) for batch in self.eval_batches]
        return np.concatenate(batches)[: len(self.dataset.test["labels"])]

    def _classification(self, *, small_side: int = 0, **options: Any) -> jn.Objective:
        transform = functools.partial(self._transform, small_side=small_side)
        return jn.with_batch_transform(jn.classification(self.viewed, **options), transform)

    def _views(self) -> str:
        views = {
            "both mirror images": self.config.flip_test,
            "three shifts": self.config.shift_test,
        }
        chosen = " and ".join(name for name, wanted in views.items() if wanted)
        return f" over {chosen}" if chosen else ""

    def _transform(
        self, batch: jn.Batch, rng: jax.Array, train: bool, *, small_side: int = 0
    ) -> jn.Batch:
        """Normalize the images; in training also augment and, with `small_side`, downsample."""
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
        if train and small_side:
            shape = (len(images), small_side, small_side, images.shape[-1])
            images = jax.image.resize(images, shape, "linear")
        return {**batch, "inputs": images, "labels": labels}
