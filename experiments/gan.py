"""Generative adversarial networks of images, evaluated in the features of a classifier.

    python -m experiments.gan --preset digits --seeds 3
    python -m experiments.gan --dataset fashion_mnist --seeds 5
    python -m experiments.gan --dataset fashion_mnist --conditional
    python -m experiments.gan --dataset mnist --preset r3gan
    python -m experiments.gan --dataset cifar10 --model resnet --conditional

The value is a classifier-feature distance: the Frechet distance between generated and test images
in the features of a small classifier that the run first trains on the real training images. It is
not an FID: only values of the same classifier are comparable. "floor" is the distance between as
many training images and the same test images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jaxnets as jn
from experiments.harness import training
from experiments.harness.optimizers import make_optimizer
from experiments.harness.options import Options
from experiments.harness.problem import Measured, Problem, member
from experiments.harness.run_folder import RunError, RunFolder
from experiments.real_features import RealFeatures
from jaxnets.tools.pictures import figures, grids

LossName = Literal[
    "non_saturating", "minimax", "hinge", "least_squares", "wasserstein", "relativistic"
]
DatasetName = Literal["digits", "mnist", "fashion_mnist", "cifar10"]

# Batches of generated images, [batches, batch], that recalibrate the batch norms of averaged
# parameters.
_RECALIBRATION = (50, 64)
_COLUMNS = 10


@dataclasses.dataclass(frozen=True)
class Config(Options):
    """Options of the GAN experiment."""

    model: Literal["dcgan", "resnet"] = "dcgan"
    """Generator and discriminator."""
    dataset: DatasetName = "fashion_mnist"
    """Data set; digits needs no download."""
    loss: LossName = "non_saturating"
    """Loss of the two networks."""
    conditional: bool = False
    """Condition on the class: class-conditional generator, projection discriminator."""
    norm: Literal["none", "batch", "layer", "spectral"] = "spectral"
    """Norm of the discriminator; batch does not combine with gradient penalties."""
    gradient_penalty: float = 0.0
    """Weight of the gradient penalty of WGAN-GP; 10 in the paper."""
    r1: float = 0.0
    """Weight of the R1 penalty: the squared gradient norm at real images."""
    r2: float = 0.0
    """Weight of the R2 penalty: the squared gradient norm at generated images."""
    critics: int = 1
    """Discriminator updates per generator update, all on the batch of the step."""
    width: int = 32
    """Channels at half the image size (dcgan), or of every block (resnet)."""
    latent_size: int = 100
    """Size of a latent."""
    upsampling: Literal["resize", "subpixel", "transposed"] = "resize"
    """Upsampling in the generator."""
    beta1: float = 0.5
    """Decay of Adam's first moment."""
    generator_rate: float | None = None
    """Peak learning rate of the generator; by default --learning-rate, the discriminator's."""
    samples: int = 10_000
    """Generated, training and test images that are compared, at most."""
    classifier_epochs: int = 3
    """Epochs of the classifier that provides the features."""
    epochs: float = 5.0
    batch_size: int = 64
    learning_rate: float = 5e-4
    warmup: float = 0.0
    schedule: Literal["cosine", "constant"] = "constant"
    weight_decay: float = 0.0
    average_decay: float = 0.999
    """Decay of the moving average of the generator, which is evaluated; 0 disables averaging."""


class Adversaries(Problem):
    """A data set of images, a generator and a discriminator, and their training."""

    def __init__(self, config: Config, dataset: jn.data.ImageDataset) -> None:
        self.options = self.config = config
        self.dataset, self.dataset_name = dataset, dataset.name
        self.resident = dataset.train
        self.steps_per_epoch = max(len(dataset.train["labels"]) // config.batch_size, 1)
        self.module = self._make_module()
        objectives = jn.adversarial(
            self.module,
            config.loss,
            gradient_penalty=config.gradient_penalty,
            r1=config.r1,
            r2=config.r2,
        )
        self.objectives = [
            jn.with_batch_transform(objective, self._transform) for objective in objectives
        ]
        self.objective = self.objectives[0]
        batches = jn.data.sequential_batches(dataset.test, min(500, len(dataset.test["labels"])))
        self.eval_batches = [
            jax.device_put(batch) for _, batch in zip(range(2), batches(0), strict=False)
        ]
        # The same in every image and every run.
        key = jax.random.key(0)
        self.fixed_labels = np.arange(dataset.num_classes).repeat(_COLUMNS).astype(np.int32)
        self.fixed_latents = self._latents(jax.random.fold_in(key, 0), len(self.fixed_labels))
        self.recalibration_latents = self._latents(jax.random.fold_in(key, 1), *_RECALIBRATION)
        self.evaluation_key = jax.random.fold_in(key, 2)
        self._averaged = jax.jit(lambda states: jax.lax.map(self._recalibrated, states))

    def _make_module(self) -> jn.GAN:
        config = self.config
        norm = None if config.norm == "none" else config.norm
        fields: dict[str, Any] = {
            "num_classes": self.dataset.num_classes if config.conditional else None,
            "norm": norm,
            "latent_size": config.latent_size,
            "upsampling": config.upsampling,
            "precision": jn.Precision(compute=jnp.dtype(config.precision)),
        }
        shape = self.dataset.image_shape
        if config.model == "resnet":
            return jn.resnet_gan(
                shape,
                generator_width=config.width,
                discriminator_width=config.width,
                num_halvings=1 if min(shape[:2]) < 16 else 2,
                **fields,
            )
        if norm in (None, "layer"):
            fields["kernel_init"] = nn.initializers.he_normal()
        return jn.dcgan(shape, width=config.width, **fields)

    def _latents(self, key: jax.Array, *shape: int) -> jax.Array:
        return jax.random.normal(key, (*shape, self.config.latent_size))

    def _transform(self, batch: jn.Batch, rng: jax.Array, train: bool) -> jn.Batch:
        return {**batch, "inputs": centered(batch["inputs"])}

    @property
    def update(self) -> Sequence[jn.Update]:
        """The updates of the discriminator, then that of the generator."""
        config = self.config
        last = dataclasses.replace(config, average_decay=0.0)
        rate = config.learning_rate if config.generator_rate is None else config.generator_rate
        own = dataclasses.replace(config, learning_rate=rate)
        num_updates = config.critics * self.num_steps
        critic, generator = (
            make_optimizer(last, num_updates, beta1=config.beta1),
            make_optimizer(own, self.num_steps, beta1=config.beta1),
        )
        return [
            *[jn.Update(self.objectives[0], critic, wrt="discriminator")] * config.critics,
            jn.Update(self.objectives[1], generator, wrt="generator"),
        ]

    def example(self) -> tuple[Any, ...]:
        latents = jnp.zeros((1, self.config.latent_size))
        return (latents, jnp.zeros(1, jnp.int32)) if self.config.conditional else (latents,)

    def evaluated(self, states: jn.TrainState) -> jn.TrainState:
        """Return the states unchanged: the curves show the last parameters, not the average."""
        return states

    def hooks(self, folder: RunFolder) -> Sequence[jn.Hook]:
        """Draw images of fixed latents during training."""

        def draw(step: int, state: Any, metrics: Mapping[str, Any]) -> None:
            path = folder.path / "samples" / f"step_{step:08d}.png"
            _sheet(self.fixed_images(self.generators(state)[0]), path)

        return [jn.every(self.options.eval_every or self.steps_per_epoch, draw)]

    def generators(self, states: jn.TrainState) -> list[Mapping[str, Any]]:
        """Return the variables of every seed, with the averaged generator, if any."""
        variables = self._averaged(states)
        return [member(variables, index) for index in range(self.options.seeds)]

    def _recalibrated(self, state: jn.TrainState) -> Mapping[str, Any]:
        if not self.options.average_decay:
            return state.variables
        params = {**state.params, "generator": jn.averaged_parameters(state)}
        labels = None
        if self.config.conditional:
            size = _RECALIBRATION[0] * _RECALIBRATION[1]
            labels = (jnp.arange(size) % self.dataset.num_classes).reshape(_RECALIBRATION)
        variables = {**state.variables, "params": params}
        return jn.gan.recalibrate_batch_norm(
            self.module, variables, self.recalibration_latents, labels
        )

    def fixed_images(self, variables: Mapping[str, Any]) -> np.ndarray:
        """Return the uint8 images of the fixed latents; if conditional, one row per class."""
        labels = self.fixed_labels if self.config.conditional else None
        return self.generate(variables, self.fixed_latents, labels)

    def generate(
        self, variables: Mapping[str, Any], latents: jax.Array, labels: np.ndarray | None
    ) -> np.ndarray:
        """Generate uint8 images, [images, height, width, channels], from latents."""
        images = jn.generate_images(self.module, variables, latents, labels)
        return grids.to_pixels(images, -1, 1)

    def measure(self, states: jn.TrainState) -> Measured:
        """Compare the images of every seed with test images in the features of the classifier."""
        config, num_classes = self.config, self.dataset.num_classes
        real = RealFeatures.load(
            self.dataset,
            RunFolder(config.out).path / "classifier",
            num_images=config.samples,
            epochs=config.classifier_epochs,
        )
        latents = self._latents(self.evaluation_key, len(real.test.features))
        labels = real.test_labels if config.conditional else None
        rows = []
        for variables in self.generators(states):
            outputs = real.of(self.generate(variables, latents, labels))
            predicted = outputs.logits.argmax(axis=-1)
            quality = jn.precision_recall(real.test.features, outputs.features)
            row = {
                "distance": jn.frechet_distance(real.test.features, outputs.features),
                "precision": quality.precision,
                "recall": quality.recall,
                "class_coverage": jn.class_coverage(predicted, num_classes),
                "least_class_share": float(jn.metrics.class_shares(predicted, num_classes).min()),
            }
            if labels is not None:
                row["class_agreement"] = jn.metrics.class_agreement(outputs.logits, labels)
            rows.append(row)
        details = {
            name: [round(row[name], 6) for row in rows] for name in rows[0] if name != "distance"
        }
        return Measured(
            "classifier-feature distance",
            np.array([row["distance"] for row in rows]),
            unit="squared units of the features",
            details={**details, **real.floor(), "measured_images": len(latents)},
        )

    def draw(
        self, folder: RunFolder, states: jn.TrainState, history: jn.History, measured: Measured
    ) -> dict[str, str]:
        panels: dict[str, Sequence[str]] = {
            "discriminator": ("discriminator/loss", "test/loss"),
            "generator": ("generator/loss",),
            "logits": ("discriminator/real_logits", "discriminator/fake_logits"),
        }
        figures.curves(history, panels, folder.path / "curves.png")
        generators = self.generators(states)
        for seed, variables in zip(self.seeds, generators, strict=True):
            path = folder.path / f"samples_seed_{seed}.png"
            _sheet(self.fixed_images(variables), path)
        shown = self.dataset.test["inputs"][: len(self.fixed_labels)]
        _sheet(shown, folder.path / "real.png")
        _sheet(self.walk(generators[0]), folder.path / "walk.png")
        frames = sorted((folder.path / "samples").glob("step_*.png"))
        grids.film(frames, folder.path / "training.gif")
        samples = {
            f"samples_seed_{seed}": f"Generated by the network with seed {seed}."
            for seed in self.seeds
        }
        return samples | {
            "real": "Images of the test set, to compare with.",
            "walk": "Generated between two random latents, from left to right.",
            "training": "The same latents during the training of the first network.",
        }

    def walk(self, variables: Mapping[str, Any], num_walks: int = 5) -> np.ndarray:
        """Return images along interpolations between latents, one row per interpolation."""
        ends = self.fixed_latents[: 2 * num_walks].reshape(num_walks, 2, -1)
        latents = [jn.gan.interpolate_latents(first, last, _COLUMNS) for first, last in ends]
        labels = None
        if self.config.conditional:  # the class is constant along a row
            labels = (np.arange(num_walks) % self.dataset.num_classes).repeat(_COLUMNS)
        return self.generate(variables, jnp.concatenate(latents), labels)


def _sheet(images: np.ndarray, path: Path) -> None:
    grids.grid(grids.arrange(images, _COLUMNS), path)


def centered(images: jax.Array) -> jax.Array:
    """Map uint8 images to [-1, 1]."""
    halves = (0.5,) * images.shape[-1]
    return jn.data.normalize(images, halves, halves)


def make_problem(config: Config) -> Adversaries:
    """Load the data and build the problem.

    Raises:
        RunError: incompatible options.
    """
    if config.norm == "batch" and (config.gradient_penalty or config.r1 or config.r2):
        raise RunError(
            "--norm batch has no gradient per image, which --gradient-penalty, --r1 and "
            "--r2 need; choose --norm none, layer or spectral"
        )
    load: dict[str, Callable[[], jn.data.ImageDataset]] = {
        "digits": jn.data.digits,
        "mnist": lambda: jn.data.mnist(config.data),
        "fashion_mnist": lambda: jn.data.fashion_mnist(config.data),
        "cifar10": lambda: jn.data.cifar10(config.data),
    }
    return Adversaries(config, load[config.dataset]())


# Shared by the recipes of papers.
_LARGE = Config(width=64, epochs=20, learning_rate=2e-4, beta1=0.0)

RECIPES = {
    "dcgan": Config(),
    # Images of 8 pixels are halved once, so the discriminator of dcgan would be one convolution.
    "digits": Config(
        dataset="digits",
        model="resnet",
        loss="hinge",
        epochs=60,
        learning_rate=1e-3,
        beta1=0.0,
        latent_size=32,
        average_decay=0.99,
        classifier_epochs=20,
        eval_every=220,
    ),
    "resnet": dataclasses.replace(_LARGE, model="resnet", loss="hinge", latent_size=128),
    "wgan-gp": dataclasses.replace(
        _LARGE,
        loss="wasserstein",
        norm="layer",
        gradient_penalty=10.0,
        critics=5,
        learning_rate=1e-4,
        beta2=0.9,
    ),
    "r3gan": dataclasses.replace(
        _LARGE, loss="relativistic", norm="none", r1=1.0, r2=1.0, beta2=0.99
    ),
}

if __name__ == "__main__":
    training.main("gan", make_problem, RECIPES)
