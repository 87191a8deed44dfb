"""Autoencoders of every kind, on digits, MNIST, Fashion-MNIST or CIFAR-10.

    python -m experiments.autoencoder --kind dense --dataset fashion_mnist
    python -m experiments.autoencoder --kind vae --dataset mnist --preset pytorch-example
    python -m experiments.autoencoder --kind vae --dataset mnist --coder conv --binarize
    python -m experiments.autoencoder --kind vq-vae --dataset fashion_mnist

Reference: the VAE of PyTorch's and Flax's examples (the preset pytorch-example; Flax has 500
hidden units): PyTorch's ends at 105.3 nats per image on MNIST, with gray levels as probabilities.
The preset differs in that it evaluates the moving average of the parameters.
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
from experiments.pictures import code_pictures, figures

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
    """Autoencoder; its recipe sets the defaults shown here."""
    dataset: Literal["digits", "mnist", "fashion_mnist", "cifar10"] = "digits"
    """Images."""
    coder: Literal["dense", "conv"] = "dense"
    """Encoder and decoder: dense layers or convolutions."""
    widths: tuple[int, ...] | None = None
    """Of the encoder's layers; by default 512 256 (dense) or 32 64 (conv)."""
    latent: int = 32
    """Size of the code."""
    likelihood: Literal["squared", "bernoulli", "gaussian", "logistic"] = "squared"
    """What the decoder's outputs mean; the logistic one is discretised."""
    upsampling: Literal["resize", "subpixel", "transposed"] = "resize"
    """How the decoder doubles the size of its maps (conv)."""
    blocks: int = 0
    """Residual blocks at the smallest size (conv)."""
    norm: Literal["none", "batch", "layer"] = "none"
    """In front of the activations."""
    init: Literal["he", "pytorch"] = "he"
    """Initial kernels; he: LeCun's where no activation follows."""
    tied: bool = False
    """The decoder's matrices are those of the encoder, transposed (dense)."""
    conditional: bool = False
    """The class is given to encoder and decoder (vae, beta-vae)."""
    binarize: bool = False
    """Pixels are drawn black or white, with the gray level as probability; anew at each step in
    training, once and for all for what is measured."""
    noise: float = 0.3
    """Standard deviation of the noise, with pixels in [0, 1] (denoising)."""
    active: int = 0
    """Numbers of a code that are kept, the others become 0; 0 keeps all (sparse)."""
    sparsity: float = 0.0
    """Weight of the sum of the absolute code (sparse)."""
    contraction: float = 0.0
    """Weight of the squared norm of the code's Jacobian (dense, conv)."""
    beta: float = 1.0
    """Weight of the divergence (vae, beta-vae)."""
    free_bits: float = 0.0
    """Nats that each number of the code may carry for nothing (vae, beta-vae)."""
    kl_warmup: float = 0.0
    """Share of the steps in which beta rises from 0 (vae, beta-vae)."""
    codebook: int = 256
    """Number of codes (vq-vae)."""
    embedding: int = 32
    """Size of the code vectors (vq-vae)."""
    commitment: float = 0.25
    """Weight of the distance to the code vectors (vq-vae)."""
    bound_samples: int = 500
    """Codes for each image in the importance-weighted bound (vae, beta-vae)."""
    bound_images: int = 1000
    """Test images of that bound."""
    probe_labels: int = 1000
    """Labeled training images of the linear classifiers."""
    pictures_every: int | None = None
    """Steps between pictures of the progress; by default once an epoch."""


class ImageAutoencoder(Problem):
    """A data set of images, an autoencoder, and how it is trained."""

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
        # What is measured, in training and test; training itself may draw pixels anew.
        self.train, self.test = (
            drawn(part) if config.binarize else part
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
        needs = {
            "binarize": config.likelihood == "bernoulli",
            "conditional": config.kind in VARIATIONAL,
            "kl_warmup": config.kind in VARIATIONAL,
            "free_bits": config.kind in VARIATIONAL,
            "active": config.kind == "sparse",
            "sparsity": config.kind == "sparse",
            "contraction": config.kind in ("dense", "conv"),
        }
        for name, possible in needs.items():
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
            raise RunError(f"--kl-warmup is {config.kl_warmup}; give a share of at most 1")

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
        """Bring gray levels into the range of the likelihood."""
        images = batch["inputs"] / jnp.float32(255)
        if train and rng is not None and self.config.binarize:
            images = jax.random.bernoulli(rng, images).astype(images.dtype)
        return {**batch, "inputs": self.low + (1 - self.low) * images}

    def shown(self, images: jax.Array | np.ndarray) -> np.ndarray:
        """Bring images of the network back into [0, 1]."""
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

    def member_source(self, seed: int) -> jn.BatchSource:
        config, train = self.config, self.dataset.train
        if config.executor == "scan":  # the images are on the device: only indices travel
            return jn.data.index_batches(len(train["labels"]), config.batch_size, seed=seed)
        return jn.data.shuffled_batches(train, config.batch_size, seed=seed)

    def hooks(self, folder: RunFolder) -> Sequence[jn.Hook]:
        every = self.config.pictures_every or self.steps_per_epoch
        return [jn.every(every, code_pictures.Progress(self, folder.path / "progress"))]

    def images(self, part: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the images of a part of the data as the network wants them."""
        return np.asarray(self.scaled({"inputs": part["inputs"]}, None, False)["inputs"])

    def labels(self, labels: np.ndarray) -> list[np.ndarray]:
        """Return the labels as a further argument of a conditional network, else none."""
        return [labels] if self.config.conditional else []

    def codes(self, state: jn.TrainState, part: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the code of every image, [examples, numbers]."""

        @jax.jit
        def encode(images: jax.Array, *labels: jax.Array) -> jax.Array:
            return jn.autoencoder.encode(self.module, state.variables, images, *labels)

        images, labels = self.images(part), part["labels"]
        codes = [encode(images[rows], *self.labels(labels[rows])) for rows in thousands(images)]
        return np.concatenate([np.asarray(c, np.float32).reshape(len(c), -1) for c in codes])

    def measure(self, states: jn.TrainState) -> Measured:
        """Evaluate the final networks on the test set, and what their codes are worth."""
        members = self.evaluate(states, self.eval_batches, self.objective)
        found = {
            name: np.array([m[name].compute() for m in members], np.float64)
            for name in members[0]
            if np.ndim(members[0][name].total) == 0
        }
        details: dict[str, Any] = {
            "kind": self.config.kind,
            **{name: round(float(values.mean()), 6) for name, values in found.items()},
        }
        if self.config.kind == "vq-vae":
            spread = [float(jn.metrics.codebook_perplexity(m["code_usage"])) for m in members]
            details |= {"perplexity": round(np.mean(spread), 4), "codebook": self.config.codebook}
        if self.config.kind in VARIATIONAL:
            details |= code_measures.bound(self, states)
        if self.config.kind == "denoising":
            details |= code_measures.noise(self, states)
        if not self.config.conditional:  # such codes were made from the labels
            details |= code_measures.codes(self, states, float(found["squared_error"].mean()))
        if self.config.likelihood == "squared":
            errors = found["squared_error"]
            return Measured("test error", errors, "squared error per pixel", details)
        return Measured("test loss", found["loss"], "nats per image", details)

    def corrupted(self, images: np.ndarray) -> np.ndarray:
        """Add the noise of the denoising kind, the same at every call."""
        amount = self.config.noise * (1 - self.low)
        noise = np.random.default_rng(0).normal(scale=amount, size=images.shape)
        return np.clip(images + noise, self.low, 1).astype(np.float32)

    def reconstructed(
        self, state: jn.TrainState, images: np.ndarray, labels: np.ndarray
    ) -> np.ndarray:
        """Return reconstructions, in [0, 1], of images as the network wants them."""

        @jax.jit
        def reconstruct(images: jax.Array, *labels: jax.Array) -> jax.Array:
            return jn.autoencoder.reconstruct(self.module, state.variables, images, *labels)

        found = [
            reconstruct(images[rows], *self.labels(labels[rows])) for rows in thousands(images)
        ]
        return self.shown(np.concatenate(found))

    def draw(
        self, folder: RunFolder, states: jn.TrainState, history: jn.History, measured: Measured
    ) -> None:
        panels: dict[str, Sequence[str]] = {"loss": ("loss", "test/loss")}
        panels["squared error"] = ("squared_error", "test/squared_error")
        if self.config.kind in VARIATIONAL:
            names = ("reconstruction", "divergence")
            panels["nats per image"] = (*names, *(f"test/{name}" for name in names))
        if self.config.kind == "vq-vae":
            panels["perplexity of the codebook"] = ("perplexity",)
        figures.curves(history, panels, folder.path / "curves.png")
        code_pictures.draw(self, member(self.evaluated(states), 0), folder.path)


def drawn(part: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Make the pixels of a part of the data black or white, with gray levels as probabilities."""
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
        average_decay=0.995,  # of a rate that never falls, the last parameters are noisy
    ),
}

if __name__ == "__main__":
    training.main("autoencoder", ImageAutoencoder, RECIPES)
