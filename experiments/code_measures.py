"""Metrics of an autoencoder beside its loss: bounds, denoising, linear probes of its codes."""

from __future__ import annotations

from typing import Any

import numpy as np

import jaxnets as jn
from experiments import probes
from experiments.harness.problem import member


def bound(problem: Any, states: jn.TrainState) -> dict[str, Any]:
    """Estimate two bounds of a variational autoencoder on the same test images.

    Args:
        problem: the autoencoder's.
        states: of the population, those to evaluate.

    Returns:
        Details for the result, in nats per image, means over the population: the evidence lower
        bound and the importance-weighted bound.
    """
    config, count = problem.config, min(problem.config.bound_images, len(problem.test["labels"]))
    objective = jn.importance_weighted(problem.module, num_samples=config.bound_samples)
    objective = jn.with_batch_transform(objective, problem.scaled)
    part = {name: array[:count] for name, array in problem.test.items()}
    batches = list(jn.data.sequential_batches(part, min(count, 500))(0))

    def mean_bound(objective: jn.Objective) -> float:
        losses = jn.evaluate(problem.eval_step(objective), states, batches)["loss"]
        return round(-float(np.mean(losses)), 4)

    return {
        "evidence_lower_bound": mean_bound(problem.objective),
        "importance_weighted_bound": mean_bound(objective),
        "bound_samples": config.bound_samples,
        "bound_images": count,
    }


def noise(problem: Any, states: jn.TrainState) -> dict[str, Any]:
    """Measure how much noise a denoising autoencoder removes from test images.

    Args:
        problem: the autoencoder's.
        states: of the population, those to evaluate.

    Returns:
        Details for the result: mean peak signal-to-noise ratios in decibels.
    """
    clean = problem.images(problem.test)
    noisy = problem.corrupted(clean)
    before = probes.signal_to_noise(problem.shown(noisy), problem.shown(clean)).mean()
    after = []
    for index in range(problem.config.seeds):
        state = member(states, index)
        restored = problem.reconstructed(state, noisy, problem.test["labels"])
        after.append(probes.signal_to_noise(restored, problem.shown(clean)).mean())
    return {
        "psnr_noisy": round(float(before), 4),
        "psnr_restored": round(float(np.mean(after)), 4),
        "psnr_gain": round(float(np.mean(after) - before), 4),
    }


def codes(problem: Any, states: jn.TrainState, error: float) -> dict[str, Any]:
    """Compare codes with pixels and with as many principal components by linear probes.

    Args:
        problem: the autoencoder's.
        states: of the population, those to evaluate.
        error: mean squared error of the reconstructions of the test images.

    Returns:
        Details for the result: accuracies of the linear probes, the squared error of the principal
        components, and the relative reduction of it by the network.
    """
    config, train, test = problem.config, problem.train, problem.test
    order = np.random.default_rng(0).permutation(len(train["labels"]))[: config.probe_labels]
    labeled = {name: array[order] for name, array in train.items()}

    def probe(few: np.ndarray, all_of_test: np.ndarray) -> float:
        return probes.linear_probe(few, labeled["labels"], all_of_test, test["labels"])

    accuracies, size = [], 0
    for index in range(config.seeds):
        state = member(states, index)
        few, all_of_test = problem.codes(state, labeled), problem.codes(state, test)
        size = few.shape[1]
        accuracies.append(probe(few, all_of_test))
    pixels, few, all_of_test = (
        problem.images(part).reshape(len(part["labels"]), -1) for part in (train, labeled, test)
    )
    size = min(size, pixels.shape[1])
    mean, components = probes.principal_components(pixels, size)
    projected = [(vectors - mean) @ components.T for vectors in (few, all_of_test)]
    lost = all_of_test - mean - projected[1] @ components
    details: dict[str, Any] = {
        "labels": len(order),
        "components": size,
        "probe_code": round(float(np.mean(accuracies)), 4),
        "probe_pixels": round(probe(few, all_of_test), 4),
        "probe_pca": round(probe(*projected), 4),
    }
    # The code of a VQ-VAE is discrete; a denoising autoencoder reads a corrupted image.
    if config.kind not in ("vq-vae", "denoising"):
        pca_error = float(np.mean(np.square(lost)))
        details["pca_squared_error"] = round(pca_error, 6)
        details["below_pca"] = round(1 - error / pca_error, 4) if pca_error > 1e-9 else None
    return details
