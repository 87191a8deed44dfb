"""Images of an autoencoder: progress, reconstructions, samples, interpolations, codes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxnets as jn
from experiments.harness.problem import member, thousands
from jaxnets.tools.pictures import figures, grids

_NUM_COLUMNS = 10


class Progress:
    """A hook that draws images of the network in training.

    A variational autoencoder decodes 64 fixed codes. The others, which have no distribution of
    codes, reconstruct 32 test images, drawn next to the originals.

    Args:
        problem: the autoencoder's.
        folder: of the images, one PNG file per call.
    """

    def __init__(self, problem: Any, folder: Path) -> None:
        self._problem = problem
        self._folder = folder
        chosen = {name: array[:32] for name, array in problem.test.items()}
        self._originals = jnp.asarray(problem.images(chosen))
        self._compiled = jax.jit(lambda variables: self._images(variables))

    def __call__(self, step: int, state: Any, metrics: Mapping[str, Any]) -> None:
        self._folder.mkdir(exist_ok=True)
        first = member(self._problem.evaluated(state), 0)
        images = self._problem.shown(self._compiled(first.variables))
        grids.grid(grids.arrange(images), self._folder / f"{step:08d}.png")

    def _images(self, variables: Mapping[str, Any]) -> jax.Array:
        problem, module = self._problem, self._problem.module
        if hasattr(module, "posterior"):
            labels = problem.labels(np.arange(64) % problem.dataset.num_classes)
            return _samples(problem, variables, 64, labels)
        reconstructed = jn.autoencoder.reconstruct(module, variables, self._originals)
        # Alternate originals and reconstructions: [images, 2, height, width, channels].
        pairs = jnp.stack([self._originals, reconstructed], axis=1)
        return pairs.reshape(-1, *reconstructed.shape[1:])  # [2 * images, ...]


def draw(problem: Any, state: jn.TrainState, folder: Path) -> None:
    """Draw all images of a trained network.

    Args:
        problem: the autoencoder's.
        state: of one network.
        folder: of the run.
    """
    test, module = problem.test, problem.module
    images, labels = problem.images(test), test["labels"]
    _reconstructions(problem, state, images[:_NUM_COLUMNS], labels[:_NUM_COLUMNS], folder)
    codes = problem.codes(state, test)
    names = problem.dataset.class_names
    figures.code_map(codes, labels, names, folder / "codes.png")
    rows = _interpolations(problem, state, images, labels)
    grids.grid(problem.shown(rows), folder / "interpolations.png")
    if hasattr(module, "posterior"):
        count = problem.dataset.num_classes * _NUM_COLUMNS
        classes = np.repeat(np.arange(problem.dataset.num_classes), _NUM_COLUMNS)
        samples = _samples(problem, state.variables, count, problem.labels(classes))
        # [classes, columns, height, width, channels]
        samples = samples.reshape(-1, _NUM_COLUMNS, *images.shape[1:])
        grids.grid(problem.shown(samples), folder / "samples.png")
        walk = _latent_walk(problem, state, codes, labels)
        grids.grid(problem.shown(walk), folder / "latent_walk.png")
    _anomalies(problem, state, images, labels, folder)
    grids.film(sorted((folder / "progress").glob("*.png")), folder / "progress.gif")


def _samples(
    problem: Any, variables: Mapping[str, Any], count: int, labels: list[np.ndarray]
) -> jax.Array:
    return jn.autoencoder.sample(
        problem.module,
        variables,
        count,
        rng=jax.random.key(0),
        labels=jnp.asarray(labels[0]) if labels else None,
    )


def _reconstructions(
    problem: Any, state: jn.TrainState, images: np.ndarray, labels: np.ndarray, folder: Path
) -> None:
    """Draw originals, corrupted inputs of a denoising autoencoder, and reconstructions."""
    rows = [problem.shown(images)]
    if problem.config.kind == "denoising":
        images = problem.corrupted(images)
        rows.append(problem.shown(images))
    rows.append(problem.reconstructed(state, images, labels))
    grids.grid(np.stack(rows), folder / "reconstructions.png")


def _interpolations(
    problem: Any, state: jn.TrainState, images: np.ndarray, labels: np.ndarray
) -> jax.Array:
    """Interpolate between pairs of test images, [pairs, steps, height, width, channels]."""
    pairs = min(8, len(images) // 2)
    given = problem.labels(labels[:pairs])
    return jn.autoencoder.interpolate(
        problem.module,
        state.variables,
        jnp.asarray(images[:pairs]),
        jnp.asarray(images[pairs : 2 * pairs]),
        num_steps=_NUM_COLUMNS,
        labels=jnp.asarray(given[0]) if given else None,
    )


def _latent_walk(
    problem: Any, state: jn.TrainState, codes: np.ndarray, labels: np.ndarray
) -> jax.Array:
    """Vary one dimension of a test image's code per row, in the order of their variance.

    The posterior means of an unused dimension are all near 0.
    """
    chosen = np.argsort(-codes.var(axis=0), kind="stable")[:8]
    values = np.linspace(-3, 3, _NUM_COLUMNS, dtype=np.float32)
    walk = np.tile(codes[0], (len(chosen), _NUM_COLUMNS, 1))  # [rows, columns, latent]
    for row, dimension in enumerate(chosen):
        walk[row, :, dimension] = values
    flat = jnp.asarray(walk.reshape(-1, codes.shape[1]))  # [rows * columns, latent]
    given = problem.labels(np.repeat(labels[:1], len(flat)))
    images = jn.autoencoder.decode(problem.module, state.variables, flat, *given)
    return images.reshape(len(chosen), _NUM_COLUMNS, *images.shape[1:])


def _anomalies(
    problem: Any, state: jn.TrainState, images: np.ndarray, labels: np.ndarray, folder: Path
) -> None:
    """Draw the test images with the highest anomaly scores, then those with the lowest."""

    @jax.jit
    def score(images: jax.Array, *labels: jax.Array) -> jax.Array:
        return jn.autoencoder.anomaly_score(problem.module, state.variables, images, *labels)

    scores = [score(images[rows], *problem.labels(labels[rows])) for rows in thousands(images)]
    order = np.argsort(-np.concatenate(scores), kind="stable")
    shown = np.stack([images[order[:_NUM_COLUMNS]], images[order[::-1][:_NUM_COLUMNS]]])
    grids.grid(problem.shown(shown), folder / "anomalies.png")
