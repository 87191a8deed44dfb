"""Reconstruction objectives of autoencoders: plain, sparse, contractive, denoising, masked."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

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
from jaxnets.functional.patches import normalize_patches, patchify
from jaxnets.objectives.batches import check_batch
from jaxnets.objectives.image_range import ImageRange, check_images
from jaxnets.objectives.likelihoods import Likelihood, sum_per_image
from jaxnets.objectives.losses import squared_error
from jaxnets.objectives.supervised import with_batch_transform

# (params, model_state, inputs, code, rng) -> penalty of each example
_Penalty: TypeAlias = Callable[[Params, ModelState, jax.Array, jax.Array, jax.Array], jax.Array]


def reconstruction(module: Any) -> Objective:
    """Build the objective of an autoencoder that reconstructs its input.

    Batches hold "inputs" [batch, height, width, channels] and optionally "weights" [batch].
    Optional "targets" replace the inputs as the images to reconstruct. The loss is the negative log
    likelihood under the module's likelihood, summed over the pixels of an image. The metric
    "squared_error" is the mean over the pixels, in the square of their unit.

    Args:
        module: `Autoencoder`.

    Returns:
        An `Objective`. Images outside of the likelihood's range raise ValueError if concrete; in a
        compiled program they give NaN.
    """
    return _autoencoding(module, None)


def sparse_reconstruction(module: Any, *, weight: float) -> Objective:
    """Build the objective of a sparse autoencoder: reconstruction plus an L1 penalty on the code.

    In training the loss of an example is its reconstruction loss plus weight sum_j |code_j|; in
    evaluation it is the reconstruction loss. The penalty sum_j |code_j| is the metric "penalty" in
    both.

    Args:
        module: `Autoencoder`, usually with `code_activation="relu"`.
        weight: 0 or more.

    Returns:
        An `Objective`, with batches and errors as in `reconstruction`.

    Raises:
        ValueError: `weight` below 0.
    """

    def penalty(
        params: Params, state: ModelState, inputs: jax.Array, code: jax.Array, rng: jax.Array
    ) -> jax.Array:
        return jnp.sum(jnp.abs(at_least_float32(code)), axis=-1)

    return _autoencoding(module, penalty, weight)


def contractive(module: Any, *, weight: float, num_probes: int | None = None) -> Objective:
    """Build the objective of a contractive autoencoder: a penalty on the Jacobian of the encoder.

    In training the loss of an example is its reconstruction loss plus weight ||J||^2, the squared
    Frobenius norm of the Jacobian of the code with respect to the image; in evaluation it is the
    reconstruction loss. The penalty ||J||^2 is the metric "penalty" in both, so both compute it at
    its full cost.

    The exact penalty needs a backward pass through the encoder for each dimension of the code.
    Probes give Hutchinson's unbiased estimate: the mean of ||v J||^2 over random vectors v of
    signs, from the stream "probe".

    Args:
        module: `Autoencoder`; its encoder must not mix examples, so no batch norm.
        weight: 0 or more.
        num_probes: random vectors for each example; None computes the exact penalty.

    Returns:
        An `Objective`, with batches and errors as in `reconstruction`.

    Raises:
        ValueError: `weight` below 0, `num_probes` below 1, or a batch norm.

    References:
        Rifai et al. 2011, "Contractive Auto-Encoders", ICML, equation 3; Hutchinson 1990,
        Communications in Statistics 19(2) (estimator).
    """
    if num_probes is not None and num_probes < 1:
        raise ValueError(
            f"num_probes is {num_probes}; give 1 or more, or None for the exact penalty"
        )
    if module.config.norm == "batch":
        raise ValueError(
            "a batch norm mixes the examples, so no example has a Jacobian of its own; use "
            "norm='layer' or None"
        )

    def penalty(
        params: Params, state: ModelState, inputs: jax.Array, code: jax.Array, rng: jax.Array
    ) -> jax.Array:
        def encode(inputs: jax.Array) -> jax.Array:
            return module.apply({"params": params, **state}, inputs, method="encode")

        _, pullback = jax.vjp(encode, inputs)

        def squared_row(vectors: jax.Array) -> jax.Array:
            (gradient,) = pullback(vectors)
            axes = tuple(range(1, gradient.ndim))
            return jnp.sum(jnp.square(at_least_float32(gradient)), axis=axes)

        if num_probes is None:
            rows = jnp.eye(code.shape[1], dtype=code.dtype)
            # [latent_size, batch, latent_size]
            rows = jnp.broadcast_to(rows[:, None], (len(rows), *code.shape))
            return jnp.sum(jax.lax.map(squared_row, rows), axis=0)
        key = rng_streams(rng, "probe")["probe"]
        probes = jax.random.rademacher(key, (num_probes, *code.shape), code.dtype)
        return jnp.mean(jax.lax.map(squared_row, probes), axis=0)

    return _autoencoding(module, penalty, weight)


def denoising(
    objective: Objective,
    *,
    noise: Literal["gaussian", "masking"] = "gaussian",
    amount: float = 0.3,
    image_range: tuple[float, float] = (0.0, 1.0),
) -> Objective:
    """Train an objective on corrupted inputs with the clean images as targets.

    The clean images become the batch's "targets", which all autoencoder objectives of this library
    reconstruct in place of the inputs.

    Training draws new noise at every step from the stream "augmentation". Evaluation measures how
    well noise is removed, with the same noise at every call.

    Args:
        objective: such as `reconstruction(module)`, `vae(module)` or `vq_vae(module)`.
        noise: "gaussian" adds normal noise and clips to the range; "masking" sets all channels of
            random pixels to the minimum of the range.
        amount: standard deviation, or probability that a pixel is masked.
        image_range: minimum and maximum of a pixel.

    Returns:
        An `Objective` with the same batches. Images outside of the range, which clipping would
        destroy, raise ValueError if concrete; in a compiled program they give NaN.

    Raises:
        ValueError: unknown noise, or an amount out of range.

    References:
        Vincent et al. 2010, "Stacked Denoising Autoencoders", JMLR 11, section 3; Im et al. 2017,
        arXiv:1511.06406 (denoising VAE).
    """
    if noise not in ("gaussian", "masking"):
        raise ValueError(f"noise is {noise!r}; choose 'gaussian' or 'masking'")
    if not amount >= 0 or (noise == "masking" and amount > 1):
        raise ValueError(
            f"amount is {amount}; give a standard deviation of 0 or more, or a probability"
        )

    def corrupt(batch: Batch, rng: jax.Array, train: bool) -> Batch:
        check_batch(batch, {"inputs"})
        images, inside = check_images(batch["inputs"], image_range)
        clean = batch.get("targets", images)
        inside = inside.reshape(-1, *(1,) * (clean.ndim - 1))  # [batch, 1, 1, 1]
        return {
            **batch,
            "inputs": corrupted(images, rng, noise, amount, image_range),
            "targets": jnp.where(inside, clean, jnp.asarray(jnp.nan, clean.dtype)),
        }

    return with_batch_transform(objective, corrupt)


def masked_reconstruction(
    module: Any, *, normalize: bool = True, image_range: ImageRange = (0.0, 1.0)
) -> Objective:
    """Build the objective of a masked autoencoder, which reconstructs masked patches.

    The loss of an example is the mean squared error over the pixels of its masked patches; the
    visible ones do not count. Training draws a new mask at every step from the stream "mask";
    evaluation uses the same mask at every call.

    Batches hold "inputs" [batch, height, width, channels] and optionally "weights" [batch].
    Optional "targets" replace the inputs as the images to reconstruct.

    Args:
        module: `MaskedAutoencoder`.
        normalize: predict the pixels of each patch standardized to mean 0 and variance 1; `inpaint`
            inverts it.
        image_range: minimum and maximum of a pixel; None allows any finite value, such as those of
            standardized images.

    Returns:
        An `Objective`; images outside of the range as in `reconstruction`.

    References:
        He et al. 2022, arXiv:2111.06377, section 3. Differs from the authors' code: the variance
        of a patch is the biased one, the mean over its pixels.
    """

    def objective(
        params: Params, model_state: ModelState, batch: Batch, rng: jax.Array, *, train: bool
    ) -> ObjectiveOutput:
        images, clean, inside = images_of(batch, image_range)
        # [batch, patches, patch_size**2 * channels]
        targets = patchify(at_least_float32(clean), module.patch_size)
        if normalize:
            targets = normalize_patches(targets).patches
        streams = rng_streams(rng, "mask", "dropout")
        noise = patch_noise(streams.pop("mask"), *targets.shape[:2])
        (outputs, masked), model_state = apply_module(
            module,
            params,
            model_state,
            images,
            noise=noise,
            rngs=streams,
            train=train,
            weights=batch.get("weights"),
        )
        # [batch, patches]
        errors = jnp.mean(jnp.square(at_least_float32(outputs) - targets), axis=-1)
        losses = jnp.where(inside, jnp.mean(errors, axis=-1, where=masked), jnp.nan)
        return ObjectiveOutput(Mean.of(losses, batch.get("weights")), model_state, {})

    return objective


def patch_noise(key: jax.Array, num_images: int, num_patches: int) -> jax.Array:
    """Draw the noise that decides which patches are masked, uniform [num_images, num_patches]."""
    return jax.random.uniform(key, (num_images, num_patches))


def corrupted(
    images: jax.Array,
    rng: jax.Array,
    noise: str,
    amount: float,
    image_range: tuple[float, float] = (0.0, 1.0),
) -> jax.Array:
    """Corrupt images as described in `denoising`.

    Args:
        images: [batch, height, width, channels].
        rng: random key.
        noise: "gaussian" or "masking".
        amount: standard deviation, or probability that a pixel is masked.
        image_range: minimum and maximum of a pixel.

    Returns:
        Images of the same shape, in the range.
    """
    low, high = image_range
    if noise == "masking":
        masked = jax.random.bernoulli(rng, amount, (*images.shape[:-1], 1))
        return jnp.where(masked, jnp.asarray(low, images.dtype), images)
    noisy = images + amount * drawn_in_float32(jax.random.normal)(rng, images.shape, images.dtype)
    return jnp.clip(noisy, low, high)


def _autoencoding(module: Any, penalty: _Penalty | None, weight: float = 0.0) -> Objective:
    if not weight >= 0:
        raise ValueError(f"weight is {weight}; give 0 or more")

    def objective(
        params: Params, model_state: ModelState, batch: Batch, rng: jax.Array, *, train: bool
    ) -> ObjectiveOutput:
        inputs, targets, inside = images_of(batch, module.likelihood.image_range)
        initial_state, weights = model_state, batch.get("weights")
        (outputs, code), model_state = apply_module(
            module, params, model_state, inputs, train=train, weights=weights
        )
        losses = jnp.where(inside, module.likelihood.losses(outputs, targets), jnp.nan)
        errors = pixel_error(module.likelihood, outputs, targets, inside, weights)
        metrics = {"squared_error": errors}
        if penalty is None:
            return ObjectiveOutput(Mean.of(losses, weights), model_state, metrics)
        penalties = penalty(params, initial_state, inputs, code, rng)
        metrics["reconstruction"] = Mean.of(losses, weights)
        metrics["penalty"] = Mean.of(penalties, weights)
        total = losses + weight * penalties if train else losses
        return ObjectiveOutput(Mean.of(total, weights), model_state, metrics)

    return objective


def images_of(
    batch: Batch, image_range: ImageRange, *needs: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the input images of a batch, the images to reconstruct, and which are in range.

    Args:
        batch: with "inputs" [batch, height, width, channels], optionally "targets" likewise.
        image_range: minimum and maximum of a pixel of both.
        needs: names of further arrays that the batch must have.

    Returns:
        The inputs, the targets (the inputs if the batch has no "targets"), and bool [batch], True
        where both are in the range; all as from `check_images`.

    Raises:
        ValueError: missing arrays, arrays that differ in length, concrete images out of range.
    """
    check_batch(batch, {"inputs", *needs})
    inputs, inside = check_images(batch["inputs"], image_range)
    if "targets" not in batch:
        return inputs, inputs, inside
    targets, valid = check_images(batch["targets"], image_range)
    return inputs, targets, inside & valid


def pixel_error(
    likelihood: Likelihood,
    outputs: jax.Array,
    images: jax.Array,
    inside: jax.Array,
    weights: jax.Array | None,
) -> Mean:
    """Compute the metric "squared_error" between expected and true images.

    Args:
        likelihood: turns the outputs into expected images.
        outputs: of the decoder, [batch, height, width, channels * num_parameters].
        images: [batch, height, width, channels].
        inside: bool [batch]; the error of an image where it is False is NaN.
        weights: [batch], 0 = ignore.

    Returns:
        Mean; `compute()` is the mean over images and pixels, in the square of their unit.
    """
    errors = squared_error(likelihood.mean(outputs), images)
    errors = sum_per_image(errors) / math.prod(errors.shape[1:])
    return Mean.of(jnp.where(inside, errors, jnp.nan), weights)
