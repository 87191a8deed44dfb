"""Objectives of variational and vector-quantized autoencoders."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxnets.core import (
    Batch,
    Mean,
    ModelState,
    Objective,
    ObjectiveOutput,
    Params,
    apply_module,
    at_least_float32,
    drawn_in_float32,
    rng_streams,
)
from jaxnets.functional.gaussian import draw_code, log_prior_ratio, normal_divergence
from jaxnets.metrics.supervised import codebook_perplexity
from jaxnets.objectives.batches import check_batch
from jaxnets.objectives.image_range import check_images
from jaxnets.objectives.reconstruction import images_of, pixel_error


def vae(module: Any, *, beta: float = 1.0, free_bits: float = 0.0) -> Objective:
    """Build the objective of a variational autoencoder: the negative evidence lower bound.

    -E_q log p(x | z) + beta sum_j max(free_bits, KL_j), in nats per image, with one latent sample
    per image from the stream "latent". Evaluation uses beta = 1 and no free bits: its loss is the
    bound itself, with the same latent noise at every call. Metrics: "reconstruction" and
    "divergence", which sum to the evaluation loss, and "squared_error", the mean over the pixels.

    {"hyperparameters": {"beta": ...}} in the model state, from `with_hyperparameters`, overrides
    `beta`: each member of a population can have its own, and `scheduled` makes it depend on the
    step (KL warm-up).

    Batches hold "inputs" [batch, height, width, channels], "labels" int [batch] if the module is
    conditional, and optionally "weights" [batch]. Optional "targets" replace the inputs as the
    images to reconstruct, as in `denoising`: then x in log p(x | z) is the target, and the loss is
    no bound on the likelihood of either.

    Args:
        module: `VAE`.
        beta: weight of the divergence, 0 or more.
        free_bits: minimum of the divergence of each latent dimension, in nats, 0 or more.

    Returns:
        An `Objective`. Images outside of the likelihood's range raise ValueError if concrete; in a
        compiled program they give NaN.

    Raises:
        ValueError: `beta` or `free_bits` below 0.

    References:
        Kingma and Welling 2014, arXiv:1312.6114, equation 10; Higgins et al. 2017, "beta-VAE",
        ICLR; Bowman et al. 2016, arXiv:1511.06349, section 3.1 (warm-up); Kingma et al. 2016,
        arXiv:1606.04934, appendix C.8 (free bits). Differs from the last: the minimum applies to
        every example instead of the mean over a batch, so that the loss stays a sum over examples.
    """
    if not beta >= 0 or not free_bits >= 0:
        raise ValueError(f"beta is {beta} and free_bits {free_bits}; give numbers of 0 or more")

    def objective(
        params: Params, model_state: ModelState, batch: Batch, rng: jax.Array, *, train: bool
    ) -> ObjectiveOutput:
        conditional = module.num_classes is not None
        inputs, targets, inside = images_of(
            batch, module.likelihood.image_range, *["labels"] * conditional
        )
        streams, weights = rng_streams(rng, "latent"), batch.get("weights")
        (outputs, mean, log_variance), model_state = apply_module(
            module,
            params,
            model_state,
            inputs,
            batch["labels"] if conditional else None,
            noise=latent_noise(streams["latent"], len(inputs), module),
            rngs=streams,
            train=train,
            weights=weights,
        )
        losses = jnp.where(inside, module.likelihood.losses(outputs, targets), jnp.nan)
        divergences = normal_divergence(mean, log_variance)  # [batch, latent_size]
        divergence = jnp.sum(divergences, axis=-1)
        metrics = {
            "reconstruction": Mean.of(losses, weights),
            "divergence": Mean.of(divergence, weights),
            "squared_error": pixel_error(module.likelihood, outputs, targets, inside, weights),
        }
        if not train:
            return ObjectiveOutput(Mean.of(losses + divergence, weights), model_state, metrics)
        weight = model_state.get("hyperparameters", {}).get("beta", beta)
        floored = jnp.sum(jnp.maximum(divergences, free_bits), axis=-1)
        return ObjectiveOutput(Mean.of(losses + weight * floored, weights), model_state, metrics)

    return objective


def vq_vae(module: Any, *, commitment: float = 0.25) -> Objective:
    """Build the objective of a vector-quantized autoencoder.

    -log p(x | codes) + commitment ||vectors - nearest codes||^2, summed over the pixels and over
    the vectors of an image. Gradients reach the encoder by the straight-through estimator; the
    codebook is updated by the moving averages of `VectorQuantizer`, stream "codebook". Metrics:
    "reconstruction", the first term; "squared_error", the mean over the pixels; "code_usage"
    [codebook_size], which `codebook_perplexity` turns into the perplexity over all batches; and
    "perplexity", that of the moving average in the model state.

    Batches hold "inputs" [batch, height, width, channels] and optionally "weights" [batch].
    Optional "targets" replace the inputs as the images to reconstruct.

    Args:
        module: `VQVAE`.
        commitment: weight of the second term, 0 or more; the paper reports robust results from 0.1
            to 2.

    Returns:
        An `Objective`; images outside of the likelihood's range as in `vae`.

    Raises:
        ValueError: `commitment` below 0.

    References:
        van den Oord et al. 2017, arXiv:1711.00937, equation 3, whose second term the moving
        average replaces.
    """
    if not commitment >= 0:
        raise ValueError(f"commitment is {commitment}; give 0 or more")

    def objective(
        params: Params, model_state: ModelState, batch: Batch, rng: jax.Array, *, train: bool
    ) -> ObjectiveOutput:
        inputs, targets, inside = images_of(batch, module.likelihood.image_range)
        weights = batch.get("weights")
        quantized, model_state = apply_module(
            module,
            params,
            model_state,
            inputs,
            rngs=rng_streams(rng, "codebook"),
            train=train,
            weights=weights,
        )
        losses = module.likelihood.losses(quantized.outputs, targets)
        losses = jnp.where(inside, losses, jnp.nan)
        distances = quantized.vectors - jax.lax.stop_gradient(quantized.nearest)
        distances = jnp.sum(jnp.square(at_least_float32(distances)), axis=(1, 2, 3))
        one_hot = jax.nn.one_hot(quantized.codes, module.codebook_size, dtype=losses.dtype)
        if weights is None:
            weights = jnp.ones_like(losses)  # so that Mean.of sums over examples, not over codes
        usage = Mean.of(jnp.mean(one_hot, axis=(1, 2)), weights)  # [codebook_size]
        average = model_state["codebook"]["quantizer"]["shares"]
        perplexity = codebook_perplexity(Mean(average, jnp.sum(average)))
        metrics = {
            "reconstruction": Mean.of(losses, weights),
            "perplexity": Mean(perplexity * usage.count, usage.count),
            "code_usage": usage,
            "squared_error": pixel_error(
                module.likelihood, quantized.outputs, targets, inside, weights
            ),
        }
        loss = Mean.of(losses + commitment * distances, weights)
        return ObjectiveOutput(loss, model_state, metrics)

    return objective


def importance_weighted(module: Any, *, num_samples: int, chunk_size: int = 10) -> Objective:
    """Build an objective that evaluates a VAE by `importance_weighted_bound`.

    Args:
        module: `VAE`.
        num_samples: latent samples of each image.
        chunk_size: latent samples of each image that are decoded at once.

    Returns:
        An `Objective` for batches as of `vae`, whose loss is the negative bound in nats per image;
        latents are drawn from the stream "latent".

    Raises:
        ValueError: numbers below 1.
    """
    _check_counts(num_samples, chunk_size)

    def objective(
        params: Params, model_state: ModelState, batch: Batch, rng: jax.Array, *, train: bool
    ) -> ObjectiveOutput:
        conditional = module.num_classes is not None
        check_batch(batch, {"inputs", *["labels"] * conditional})
        if "targets" in batch:
            raise ValueError(
                "the batch has 'targets', but the bound is that of the inputs; leave them out, or "
                "evaluate a denoising autoencoder with vae(module)"
            )
        bound = importance_weighted_bound(
            module,
            {"params": params, **model_state},
            batch["inputs"],
            batch["labels"] if conditional else None,
            rng=rng_streams(rng, "latent")["latent"],
            num_samples=num_samples,
            chunk_size=chunk_size,
        )
        return ObjectiveOutput(Mean.of(-bound, batch.get("weights")), model_state, {})

    return objective


def importance_weighted_bound(
    module: Any,
    variables: Mapping[str, Any],
    images: jax.Array,
    labels: jax.Array | None = None,
    *,
    rng: jax.Array,
    num_samples: int,
    chunk_size: int = 10,
) -> jax.Array:
    """Estimate the importance-weighted lower bound of log p(x).

    log (1 / K) sum_k p(x | z_k) p(z_k) / q(z_k | x) with z_k drawn from q(z | x). Its expectation
    is the evidence lower bound at K = 1, grows with K, and converges to log p(x).

    Args:
        module: `VAE`.
        variables: its parameters and other collections.
        images: [batch, height, width, channels].
        labels: integer [batch], for a conditional module.
        rng: random key; sample k depends on it and on k only, not on the chunks.
        num_samples: K.
        chunk_size: latent samples of each image that are decoded at once, which bounds the memory.

    Returns:
        Nats per image, [batch]; NaN in a compiled program for images out of range.

    Raises:
        ValueError: numbers below 1; images or labels that do not fit.

    References:
        Burda et al. 2016, arXiv:1509.00519, equation 8.
    """
    _check_counts(num_samples, chunk_size)
    images, inside = check_images(images, module.likelihood.image_range)
    mean, log_variance = module.apply(variables, images, labels, method="posterior")
    chunk_size = min(chunk_size, num_samples)
    repeated = jnp.broadcast_to(images[None], (chunk_size, *images.shape))
    repeated = repeated.reshape(-1, *images.shape[1:])  # [chunk * batch, height, width, channels]
    classes = None if labels is None else jnp.tile(jnp.asarray(labels), chunk_size)

    def add_chunk(total: jax.Array, first: jax.Array) -> tuple[jax.Array, None]:
        index = first + jnp.arange(chunk_size)
        keys = jax.vmap(lambda k: jax.random.fold_in(rng, k))(index)
        noise = jax.vmap(
            lambda key: drawn_in_float32(jax.random.normal)(key, mean.shape, mean.dtype)
        )(keys)
        code = draw_code(mean[None], log_variance[None], noise)  # [chunk, batch, latent_size]
        flat = code.reshape(-1, code.shape[-1])  # [chunk * batch, latent_size]
        outputs = module.apply(variables, flat, classes, method="decode")
        losses = module.likelihood.losses(outputs, repeated).reshape(chunk_size, -1)
        log_weights = log_prior_ratio(code, log_variance[None], noise) - losses
        # Mask the surplus of the last chunk, [chunk, batch].
        log_weights = jnp.where((index < num_samples)[:, None], log_weights, -jnp.inf)
        return jnp.logaddexp(total, jax.nn.logsumexp(log_weights, axis=0)), None

    start = jnp.full(images.shape[:1], -jnp.inf, at_least_float32(mean).dtype)
    total, _ = jax.lax.scan(add_chunk, start, jnp.arange(0, num_samples, chunk_size))
    return jnp.where(inside, total - math.log(num_samples), jnp.nan)


def latent_noise(key: jax.Array, num_images: int, module: Any) -> jax.Array:
    """Draw the standard normal latent noise of each image, [num_images, latent_size]."""
    return drawn_in_float32(jax.random.normal)(
        key, (num_images, module.latent_size), module.precision.output
    )


def _check_counts(num_samples: int, chunk_size: int) -> None:
    if num_samples < 1 or chunk_size < 1:
        raise ValueError(
            f"num_samples is {num_samples} and chunk_size {chunk_size}; give 1 or more of each"
        )
