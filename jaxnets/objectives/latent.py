"""Objectives of autoencoders with a distribution of codes, or with discrete codes."""

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
    rng_streams,
)
from jaxnets.functional.gaussian import draw_code, log_prior_ratio, normal_divergence
from jaxnets.metrics.supervised import codebook_perplexity
from jaxnets.objectives.image_range import check_images
from jaxnets.objectives.reconstruction import images_of, pixel_error
from jaxnets.objectives.supervised import check_batch


def vae(module: Any, *, beta: float = 1.0, free_bits: float = 0.0) -> Objective:
    """Build the objective of a variational autoencoder: the negative evidence lower bound.

    -E_q log p(x | z) + beta sum_j max(free_bits, KL_j), in nats per image, with one code for each
    image drawn from the stream "latent". Evaluation is with beta = 1 and without free bits: its
    loss is the bound itself, and the code that it draws is the same at every call. Metrics:
    "reconstruction" and "divergence", which sum to the loss of evaluation, and "squared_error",
    the mean over the pixels.

    Where the model state holds {"hyperparameters": {"beta": ...}}, from `with_hyperparameters`,
    that number takes the place of `beta`: members of a population can have their own, and
    `scheduled` lets it depend on the step (KL warm-up).

    Batches hold "inputs" [batch, height, width, channels], "labels" int [batch] if the module is
    conditional, optionally "weights" [batch], and "targets" where the reconstruction shall be
    something else than the input, as in `denoising`: then x in log p(x | z) is the target, and the
    loss is no bound on the likelihood of either.

    Args:
        module: `VAE`.
        beta: weight of the divergence, 0 or more.
        free_bits: nats of each number of the code that cost nothing, 0 or more.

    Returns:
        An `Objective`. Images outside of the likelihood's range are refused with ValueError where
        they are known, and give NaN where they are known only when the program runs.

    Raises:
        ValueError: `beta` or `free_bits` below 0.

    References:
        Kingma and Welling 2014, arXiv:1312.6114, equation 10; Higgins et al. 2017, "beta-VAE",
        ICLR; Kingma et al. 2016, arXiv:1606.04934, appendix C.8 (free bits). Differs from the
        last: the floor holds for every example instead of the mean over a batch, so that the loss
        stays a sum over examples; Bowman et al. 2016, arXiv:1511.06349, section 3.1 (warm-up).
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
        streams = rng_streams(rng, "latent")
        (outputs, mean, log_variance), model_state = apply_module(
            module,
            params,
            model_state,
            inputs,
            batch["labels"] if conditional else None,
            noise=latent_noise(streams["latent"], len(inputs), module),
            rngs=streams,
            train=train,
        )
        losses = jnp.where(inside, module.likelihood.losses(outputs, targets), jnp.nan)
        numbers = normal_divergence(mean, log_variance)
        divergence = jnp.sum(numbers, axis=-1)
        weights = batch.get("weights")
        metrics = {
            "reconstruction": Mean.of(losses, weights),
            "divergence": Mean.of(divergence, weights),
            "squared_error": pixel_error(module.likelihood, outputs, targets, inside, weights),
        }
        if not train:
            return ObjectiveOutput(Mean.of(losses + divergence, weights), model_state, metrics)
        factor = model_state.get("hyperparameters", {}).get("beta", beta)
        floored = jnp.sum(jnp.maximum(numbers, free_bits), axis=-1)
        return ObjectiveOutput(Mean.of(losses + factor * floored, weights), model_state, metrics)

    return objective


def vq_vae(module: Any, *, commitment: float = 0.25) -> Objective:
    """Build the objective of an autoencoder of discrete codes.

    -log p(x | code) + commitment ||vectors - nearest codes||^2, summed over pixels and over the
    vectors of an image; gradients reach the encoder straight through the codes, and the codebook
    moves as `VectorQuantizer` says; stream "codebook". Metrics: "reconstruction", the first term,
    "squared_error", the mean over the pixels, "code_usage" [codebook_size], from which
    `codebook_perplexity` finds the perplexity of all batches, and "perplexity", that of the moving
    average in the model state.

    Batches hold "inputs" [batch, height, width, channels] and optionally "weights" [batch], and
    "targets" where the reconstruction shall be something else than the input.

    Args:
        module: `VQVAE`.
        commitment: 0 or more; any from 0.1 to 2 does in the paper.

    Returns:
        An `Objective`; images outside of the likelihood's range as in `vae`.

    Raises:
        ValueError: `commitment` below 0.

    References:
        van den Oord et al. 2017, arXiv:1711.00937, equation 3, of which the second term is the
        moving average.
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
            weights,
            rngs=rng_streams(rng, "codebook"),
            train=train,
        )
        losses = module.likelihood.losses(quantized.outputs, targets)
        losses = jnp.where(inside, losses, jnp.nan)
        distances = quantized.vectors - jax.lax.stop_gradient(quantized.nearest)
        distances = jnp.sum(jnp.square(at_least_float32(distances)), axis=(1, 2, 3))
        shares = jax.nn.one_hot(quantized.codes, module.codebook_size, dtype=losses.dtype)
        if weights is None:
            weights = jnp.ones_like(losses)  # so that the sums are over examples, not over codes
        usage = Mean.of(jnp.mean(shares, axis=(1, 2)), weights)
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
    """Build the evaluation of a variational autoencoder by `importance_weighted_bound`.

    Args:
        module: `VAE`.
        num_samples: codes for each image.
        chunk_size: codes of each image that are decoded at once.

    Returns:
        An `Objective` of the batches of `vae`, whose loss is the negative bound in nats per image;
        codes are drawn from the stream "latent".

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
                "the batch has 'targets', and the bound is that of the inputs; leave them out, or "
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
    """Estimate a lower bound of log p(x) from many codes of each image.

    log (1 / K) sum_k p(x | z_k) p(z_k) / q(z_k | x) with z_k drawn from q(z | x). Its expectation
    is the evidence lower bound at K = 1, grows with K, and tends to log p(x).

    Args:
        module: `VAE`.
        variables: its parameters and other collections.
        images: [batch, height, width, channels].
        labels: integer [batch], of a conditional module.
        rng: random key; sample k depends on it and on k only, not on the chunks.
        num_samples: K.
        chunk_size: codes of each image that are decoded at once, which bounds the memory.

    Returns:
        Nats per image, [batch]; NaN for images that are out of range when the program runs.

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
    repeated = repeated.reshape(-1, *images.shape[1:])
    classes = None if labels is None else jnp.tile(jnp.asarray(labels), chunk_size)

    def add_chunk(total: jax.Array, first: jax.Array) -> tuple[jax.Array, None]:
        index = first + jnp.arange(chunk_size)
        keys = jax.vmap(lambda k: jax.random.fold_in(rng, k))(index)
        noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape, mean.dtype))(keys)
        code = draw_code(mean[None], log_variance[None], noise)  # [chunk, batch, latent_size]
        flat = code.reshape(-1, code.shape[-1])
        outputs = module.apply(variables, flat, classes, method="decode")
        losses = module.likelihood.losses(outputs, repeated).reshape(chunk_size, -1)
        log_weights = log_prior_ratio(code, log_variance[None], noise) - losses
        # The last chunk may reach beyond the number of samples.
        log_weights = jnp.where((index < num_samples)[:, None], log_weights, -jnp.inf)
        return jnp.logaddexp(total, jax.nn.logsumexp(log_weights, axis=0)), None

    start = jnp.full(images.shape[:1], -jnp.inf, at_least_float32(mean).dtype)
    total, _ = jax.lax.scan(add_chunk, start, jnp.arange(0, num_samples, chunk_size))
    return jnp.where(inside, total - math.log(num_samples), jnp.nan)


def latent_noise(key: jax.Array, num_images: int, module: Any) -> jax.Array:
    """Draw the noise of a code for each image, standard normal [num_images, latent_size]."""
    return jax.random.normal(key, (num_images, module.latent_size), module.precision.output)


def _check_counts(num_samples: int, chunk_size: int) -> None:
    if num_samples < 1 or chunk_size < 1:
        raise ValueError(
            f"num_samples is {num_samples} and chunk_size {chunk_size}; give 1 or more of each"
        )
