"""Autoencoders of every kind on digits, MNIST, Fashion-MNIST or CIFAR-10.

    python -m experiments.autoencoder --kind dense --dataset fashion_mnist
    python -m experiments.autoencoder --kind vae --dataset mnist --preset pytorch-example
    python -m experiments.autoencoder --kind vae --dataset mnist --coder conv --binarize
    python -m experiments.autoencoder --kind vq-vae --dataset fashion_mnist

Reference: the VAE of PyTorch's and Flax's examples (the preset pytorch-example; Flax has 500
hidden units): PyTorch's reaches 105.3 nats per image on MNIST, with gray levels as probabilities.
The preset differs from it: it evaluates the moving average of the parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxnets as jn
from experiments import code_measures
from experiments.harness import training
from experiments.harness.options import Options
from experiments.harness.problem import Measured, Problem, member, thousands
from experiments.harness.run_folder import RunError, RunFolder
from experiments.pictures import code_pictures
from jaxnets.tools.pictures import figures

LIKELIHOODS = {
    "squared": jn.SquaredError,
    "bernoulli": jn.Bernoulli,
    "gaussian": jn.Gaussian,
    "logistic": jn.DiscretizedLogistic,
}
INITIALIZERS = {
    "he": None,
    "pytorch": jn.autoencoder.PYTORCH_INIT,
}
VARIATIONAL = ("vae", "beta-vae")


@dataclasses.dataclass(frozen=True)
class Config(Options):
    """Options of the autoencoder experiment."""

    kind: Literal["dense", "conv", "denoising", "sparse", "vae", "beta-vae", "vq-vae"] = "dense"
    """Kind of autoencoder; its recipe sets the other defaults."""
    dataset: Literal["digits", "mnist", "fashion_mnist", "cifar10"] = "digits"
    """Data set."""
    coder: Literal["dense", "conv"] = "dense"
    """Layers of encoder and decoder: dense or convolutional."""
    widths: tuple[int, ...] | None = None
    """Widths of the encoder's layers; by default 512 256 (dense) or 32 64 (conv)."""
    latent: int = 32
    """Size of the code."""
    likelihood: Literal["squared", "bernoulli", "gaussian", "logistic"] = "squared"
    """Likelihood of the decoder's outputs; the logistic one is discretized."""
    upsampling: Literal["resize", "subpixel", "transposed"] = "resize"
    """Upsampling in the decoder (conv)."""
    blocks: int = 0
    """Residual blocks at the smallest resolution (conv)."""
    norm: Literal["none", "batch", "layer"] = "none"
    """Norm before each activation."""
    init: Literal["he", "pytorch"] = "he"
    """Kernel initializers; he uses LeCun's where no activation follows."""
    tied: bool = False
    """Tie the decoder's kernels to the transposed ones of the encoder (dense)."""
    conditional: bool = False
    """Condition encoder and decoder on the class (vae, beta-vae)."""
    binarize: bool = False
    """Sample binary pixels from the gray levels: at each training step, and once for evaluation."""
    noise: float = 0.3
    """Standard deviation of the noise, with pixels in [0, 1] (denoising)."""
    active: int = 0
    """Largest elements of a code; the others are set to 0. 0 disables this (sparse)."""
    sparsity: float = 0.0
    """Weight of the L1 norm of the code (sparse)."""
    contraction: float = 0.0
    """Weight of the squared Frobenius norm of the encoder's Jacobian (dense, conv)."""
    beta: float = 1.0
    """Weight of the KL divergence (vae, beta-vae)."""
    free_bits: float = 0.0
    """Nats per latent dimension that are not penalized (vae, beta-vae)."""
    kl_warmup: float = 0.0
    """Fraction of the steps in which beta rises from 0 (vae, beta-vae)."""
    codebook: int = 256
    """Number of codes (vq-vae)."""
    embedding: int = 32
    """Size of the code vectors (vq-vae)."""
    commitment: float = 0.25
    """Weight of the commitment loss (vq-vae)."""
    bound_samples: int = 500
    """Samples per image of the importance-weighted bound (vae, beta-vae)."""
    bound_images: int = 1000
    """Test images for that bound."""
    probe_labels: int = 1000
    """Labeled training images of the linear probes."""
    pictures_every: int | None = None
    """Steps between progress images; by default one epoch."""


class ImageAutoencoder(Problem):
    """A data set of images, an autoencoder, and its training."""

    def __init__(self, config: Config) -> None:
        self.options = self.config = config
        load = {
            "digits": lambda: jn.data.digits(),
            "mnist": lambda: jn.data.mnist(config.data),
            "fashion_mnist": lambda: jn.data.fashion_mnist(config.data),
            "cifar10": lambda: jn.data.cifar10(config.data),
        }
        self._check()
        self.dataset = load[config.dataset]()
        self.dataset_name = self.dataset.name + (" (binarized)" if config.binarize else "")
        # The data of the evaluation; training samples binary pixels at each step.
        self.train, self.test = (
            binarized(part) if config.binarize else part
            for part in (self.dataset.train, self.dataset.test)
        )
        self.module = self._make_module()
        self.low = (self.module.likelihood.image_range or (0.0, 1.0))[0]
        self.population_strategy = "vmap" if config.coder == "dense" else "map"
        self.resident = self.dataset.train
        self.steps_per_epoch = max(len(self.resident["labels"]) // config.batch_size, 1)
        batches = jn.data.sequential_batches(self.test, min(1000, len(self.test["labels"])))
        self.eval_batches = [jax.device_put(batch) for batch in batches(0)]
        self.objective = jn.with_batch_transform(self._make_objective(), self.scaled)

    def _check(self) -> None:
        config = self.config
        allowed = {
            "binarize": config.likelihood == "bernoulli",
            "conditional": config.kind in VARIATIONAL,
            "kl_warmup": config.kind in VARIATIONAL,
            "free_bits": config.kind in VARIATIONAL,
            "active": config.kind == "sparse",
            "sparsity": config.kind == "sparse",
            "contraction": config.kind in ("dense", "conv"),
        }
        for name, possible in allowed.items():
            if getattr(config, name) and not possible:
                flag = name.replace("_", "-")
                raise RunError(
                    f"--{flag} does not fit --kind {config.kind} --likelihood "
                    f"{config.likelihood}; leave it out, or see --help"
                )
        fixed = {"dense": "dense", "conv": "conv", "vq-vae": "conv"}.get(config.kind, config.coder)
        if config.coder != fixed:
            raise RunError(f"--kind {config.kind} has --coder {fixed}, not {config.coder}")
        if config.kl_warmup > 1:
            raise RunError(f"--kl-warmup is {config.kl_warmup}; give a fraction of at most 1")

    def _make_module(self) -> Any:
        config, dataset = self.config, self.dataset
        convolutional = config.coder == "conv"
        coder = jn.EncoderDecoderConfig(
            dataset.image_shape,
            "convolutional" if convolutional else "dense",
            config.widths or ((32, 64) if convolutional else (512, 256)),
            norm=None if config.norm == "none" else config.norm,
            upsampling=config.upsampling,
            num_blocks=config.blocks,
            kernel_init=INITIALIZERS[config.init],
        )
        shared: dict[str, Any] = {
            "config": coder,
            "likelihood": LIKELIHOODS[config.likelihood](),
            "precision": jn.Precision(compute=jnp.dtype(config.precision)),
        }
        if config.kind in VARIATIONAL:
            classes = dataset.num_classes if config.conditional else None
            return jn.VAE(latent_size=config.latent, num_classes=classes, **shared)
        if config.kind == "vq-vae":
            num_images = len(dataset.train["labels"])
            jn.autoencoder.check_codebook(config.codebook, coder, num_images)
            return jn.VQVAE(
                codebook_size=config.codebook, embedding_size=config.embedding, **shared
            )
        return jn.Autoencoder(
            latent_size=config.latent,
            tied=config.tied,
            code_activation="relu" if config.sparsity else "identity",
            num_active=config.active or None,
            **shared,
        )

    def _make_objective(self) -> jn.Objective:
        config, module = self.config, self.module
        if config.kind in VARIATIONAL:
            return jn.vae(module, beta=config.beta, free_bits=config.free_bits)
        if config.kind == "vq-vae":
            return jn.vq_vae(module, commitment=config.commitment)
        if config.kind == "denoising":
            amount = self.config.noise * (1 - self.low)  # in the units of the network's images
            return jn.denoising(
                jn.reconstruction(module), amount=amount, image_range=(self.low, 1.0)
            )
        if config.sparsity:
            return jn.sparse_reconstruction(module, weight=config.sparsity)
        if config.contraction:
            return jn.contractive(module, weight=config.contraction)
        return jn.reconstruction(module)

    def scaled(self, batch: jn.Batch, rng: jax.Array | None, train: bool) -> jn.Batch:
        """Map uint8 pixels to the range of the likelihood; binarize in training if asked to."""
        images = batch["inputs"] / jnp.float32(255)
        if train and rng is not None and self.config.binarize:
            images = jax.random.bernoulli(rng, images).astype(images.dtype)
        return {**batch, "inputs": self.low + (1 - self.low) * images}

    def shown(self, images: jax.Array | np.ndarray) -> np.ndarray:
        """Map images from the range of the likelihood to [0, 1]."""
        return (np.asarray(images, np.float32) - self.low) / (1 - self.low)

    def example(self) -> tuple[Any, ...]:
        labels = [jnp.zeros(1, jnp.int32)] * self.config.conditional
        return (jnp.zeros((1, *self.dataset.image_shape)), *labels)

    def initial_variables(self, key: jax.Array) -> Mapping[str, Any]:
        variables = super().initial_variables(key)
        return jn.with_hyperparameters(variables, beta=0.0) if self.config.kl_warmup else variables

    def train_step(self) -> jn.StepFn:
        config = self.config
        if not config.kl_warmup:
            return super().train_step()
        steps = max(1, round(config.kl_warmup * self.num_steps))
        warmup = optax.linear_schedule(0.0, config.beta, steps)
        return jn.scheduled(super().train_step(), beta=warmup)

    def hooks(self, folder: RunFolder) -> Sequence[jn.Hook]:
        every = self.config.pictures_every or self.steps_per_epoch
        return [jn.every(every, code_pictures.Progress(self, folder.path / "progress"))]

    def images(self, part: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return images of the data as inputs of the network."""
        return np.asarray(self.scaled({"inputs": part["inputs"]}, None, False)["inputs"])

    def labels(self, labels: np.ndarray) -> list[np.ndarray]:
        """Return the labels in a list if the network is conditional, else an empty list."""
        return [labels] if self.config.conditional else []

    def codes(self, state: jn.TrainState, part: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the code of every image, flattened, [examples, features]."""

        @jax.jit
        def encode(images: jax.Array, *labels: jax.Array) -> jax.Array:
            return jn.autoencoder.encode(self.module, state.variables, images, *labels)

        images, labels = self.images(part), part["labels"]
        codes = [encode(images[rows], *self.labels(labels[rows])) for rows in thousands(images)]
        return np.concatenate([np.asarray(c, np.float32).reshape(len(c), -1) for c in codes])

    def measure(self, states: jn.TrainState) -> Measured:
        """Evaluate the final networks and their codes on the test set."""
        states = self.evaluated(states)
        measured = jn.evaluate(self.eval_step(), states, self.eval_batches)
        means = {name: np.array(v) for name, v in measured.items() if isinstance(v, list)}
        details: dict[str, Any] = {
            "kind": self.config.kind,
            **{name: round(float(values.mean()), 6) for name, values in means.items()},
        }
        if self.config.kind == "vq-vae":
            perplexities = jn.metrics.codebook_perplexity(measured["code_usage"])
            perplexity = round(float(np.mean(perplexities)), 4)
            details |= {"perplexity": perplexity, "codebook": self.config.codebook}
        if self.config.kind in VARIATIONAL:
            details |= code_measures.bound(self, states)
        if self.config.kind == "denoising":
            details |= code_measures.noise(self, states)
        if not self.config.conditional:  # a conditional encoder reads the labels
            details |= code_measures.codes(self, states, float(means["squared_error"].mean()))
        if self.config.likelihood == "squared":
            errors = means["squared_error"]
            return Measured("test error", errors, "squared error per pixel", details)
        return Measured("test loss", means["loss"], "nats per image", details)

    def corrupted(self, images: np.ndarray) -> np.ndarray:
        """Add the noise of the denoising kind, the same in every call."""
        amount = self.config.noise * (1 - self.low)
        noise = np.random.default_rng(0).normal(scale=amount, size=images.shape)
        return np.clip(images + noise, self.low, 1).astype(np.float32)

    def reconstructed(
        self, state: jn.TrainState, images: np.ndarray, labels: np.ndarray
    ) -> np.ndarray:
        """Return reconstructions in [0, 1].

        Args:
            state: of one network.
            images: in the range of the likelihood.
            labels: their classes.
        """

        @jax.jit
        def reconstruct(images: jax.Array, *labels: jax.Array) -> jax.Array:
            return jn.autoencoder.reconstruct(self.module, state.variables, images, *labels)

        parts = [
            reconstruct(images[rows], *self.labels(labels[rows])) for rows in thousands(images)
        ]
        return self.shown(np.concatenate(parts))

    def draw(
        self, folder: RunFolder, states: jn.TrainState, history: jn.History, measured: Measured
    ) -> dict[str, str]:
        panels: dict[str, Sequence[str]] = {"loss": ("loss", "test/loss")}
        panels["squared error"] = ("squared_error", "test/squared_error")
        if self.config.kind in VARIATIONAL:
            names = ("reconstruction", "divergence")
            panels["nats per image"] = (*names, *(f"test/{name}" for name in names))
        if self.config.kind == "vq-vae":
            panels["perplexity of the codebook"] = ("perplexity",)
        figures.curves(history, panels, folder.path / "curves.png")
        code_pictures.draw(self, member(self.evaluated(states), 0), folder.path)
        noisy = ", with noise" if self.config.kind == "denoising" else ""
        return {
            "reconstructions": f"Test images{noisy}, and below them what the first network makes "
            "of their codes.",
            "codes": "The code of each test image, a point whose color is the class.",
            "interpolations": "Decoded from codes between those of two test images.",
            "samples": "Decoded from random codes.",
            "latent_walk": "The code of one test image, with one number of it changed in each row.",
            "anomalies": "Test images that the first network finds most unusual, and least.",
            "progress": "The same codes or images during the training of the first network.",
        }


def binarized(part: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Sample binary pixels once, with the gray levels as probabilities."""
    rng = np.random.default_rng(0)
    images = part["inputs"]
    white = rng.uniform(size=images.shape).astype(np.float32) < images / np.float32(255)
    return {**part, "inputs": np.where(white, 255, 0).astype(np.uint8)}


RECIPES = {
    "dense": Config(epochs=20, weight_decay=0.0),
    "conv": Config(kind="conv", coder="conv", epochs=20, weight_decay=0.0),
    "denoising": Config(kind="denoising", latent=128, epochs=20, weight_decay=0.0),
    "sparse": Config(
        kind="sparse", widths=(512,), latent=256, active=24, epochs=20, weight_decay=0.0
    ),
    "vae": Config(kind="vae", latent=20, likelihood="bernoulli", epochs=20, weight_decay=0.0),
    "beta-vae": Config(
        kind="beta-vae",
        latent=10,
        likelihood="bernoulli",
        beta=4.0,
        kl_warmup=0.2,
        epochs=20,
        weight_decay=0.0,
    ),
    "vq-vae": Config(
        kind="vq-vae", coder="conv", blocks=1, epochs=10, learning_rate=1e-3, weight_decay=0.0
    ),
    "pytorch-example": Config(
        kind="vae",
        widths=(400,),
        init="pytorch",
        latent=20,
        likelihood="bernoulli",
        epochs=10,
        batch_size=128,
        learning_rate=1e-3,
        warmup=0.0,
        schedule="constant",
        weight_decay=0.0,
        average_decay=0.995,  # without learning rate decay the last parameters are noisy
    ),
}

if __name__ == "__main__":
    training.main("autoencoder", ImageAutoencoder, RECIPES)
