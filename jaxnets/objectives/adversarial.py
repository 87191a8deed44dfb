"""The two objectives of a generative adversarial network."""

from __future__ import annotations

from typing import Any, NamedTuple

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
    drawn_in_float32,
    rng_streams,
)
from jaxnets.objectives.adversarial_losses import (
    check_loss,
    discriminator_accuracy,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    logits_and_gradients,
    mix,
    zero_centered_penalty,
)
from jaxnets.objectives.batches import check_batch
from jaxnets.objectives.image_range import check_images


class AdversarialObjectives(NamedTuple):
    """An objective for each of the two networks, see `adversarial`.

    Attributes:
        discriminator: of the parameters in `params["discriminator"]`.
        generator: of the parameters in `params["generator"]`.
    """

    discriminator: Objective
    generator: Objective


def adversarial(
    module: Any,
    loss: str = "non_saturating",
    *,
    gradient_penalty: float = 0.0,
    r1: float = 0.0,
    r2: float = 0.0,
) -> AdversarialObjectives:
    """Build the objectives of a `GAN`, each for an `Update` of its own on one train state.

        objectives = adversarial(module, "hinge")
        discriminator_update = Update(objectives.discriminator, adam, wrt="discriminator")
        generator_update = Update(objectives.generator, other_adam, wrt="generator")
        step = make_train_step([discriminator_update] * 5 + [generator_update])

    Batches hold "inputs", images in [-1, 1] [batch, height, width, channels]. A conditional network
    also needs "labels" int [batch], which condition the real and the generated images. Optional are
    "weights" [batch], and "latents" [batch, latent_size], which are otherwise drawn standard normal
    from the stream "latent". With `train`, the generator gets a "dropout" stream, and each pass of
    the discriminator its own: "dropout_real", "dropout_fake", "dropout_penalty".

    As in the DCGAN paper's code, the discriminator gets real and generated images as two batches:
    its batch norms normalize each batch with its own statistics, and update their running averages
    with the real images first. Images of weight 0 and the images generated beside them do not count
    in these statistics. The generator's objective passes only the generated images through
    the discriminator; "relativistic" needs the real ones too.

    The train step keeps the changes of model_state that belong to the updated network. So an update
    of one network leaves the other unchanged, running averages included.

    The metrics of the discriminator are "real_logits", "fake_logits", "accuracy" (as defined by
    `discriminator_accuracy`) and, with `train`, "penalty" if there is one. Penalties are not part
    of the loss in evaluation.

    Args:
        module: a `GAN`, or anything with its methods and fields.
        loss: one of `ADVERSARIAL_LOSSES`.
        gradient_penalty: weight of `gradient_penalty`, at random interpolates of real and
            generated images drawn from the stream "mixture"; 10 in WGAN-GP.
        r1: weight of `zero_centered_penalty` at the real images.
        r2: weight of `zero_centered_penalty` at the generated images; R3GAN sets it equal to r1.

    Returns:
        AdversarialObjectives. They raise ValueError for batches that lack an array, and for images
        of another shape or type than the generated ones. Concrete images outside of [-1, 1] raise
        ValueError too; inside a compiled program the loss of such an image is NaN, which stops
        training.

    Raises:
        ValueError: an unknown loss, or a negative weight of a penalty.

    References:
        Goodfellow et al. 2014, arXiv:1406.2661, algorithm 1; Radford et al. 2016,
        arXiv:1511.06434; Gulrajani et al. 2017, arXiv:1704.00028; Mescheder et al. 2018,
        arXiv:1801.04406 (R1, R2); Huang et al. 2024, arXiv:2501.05441 (R3GAN: "relativistic"
        with r1 and r2). Differs from the papers: `[discriminator_update] * 5` uses the same real
        images five times, each time with new latents (unless the batch holds them); algorithm 1
        of Arjovsky et al. 2017, arXiv:1701.07875, and of WGAN-GP draws new real images.
    """
    relativistic = check_loss(loss).relativistic
    penalties = {"gradient_penalty": gradient_penalty, "r1": r1, "r2": r2}
    for name, weight in penalties.items():
        if not weight >= 0:
            raise ValueError(f"{name} is {weight}; give 0 or more")

    def discriminator(
        params: Params, model_state: ModelState, batch: Batch, rng: jax.Array, *, train: bool
    ) -> ObjectiveOutput:
        real, labels, inside = _read(module, batch)
        if train and any(penalties.values()):
            _check_no_batch_norm(model_state)
        weights = batch.get("weights")
        discriminate = _DiscriminatorPass(module, params, labels, rng, train, weights)
        fake, _ = _generate(module, params, model_state, batch, labels, rng, train=train)
        _check_image_shape(real, fake)
        real_logits, model_state, real_penalty = discriminate(
            "real", real, model_state, zero_centered=r1
        )
        fake_logits, model_state, fake_penalty = discriminate(
            "fake", fake, model_state, zero_centered=r2
        )
        losses = discriminator_loss(real_logits, fake_logits, loss=loss)
        metrics = {}
        if train and any(penalties.values()):
            penalty = real_penalty + fake_penalty
            if gradient_penalty:
                mixture = mix(real, fake, rng_streams(rng, "mixture")["mixture"])
                _, _, mixture_penalty = discriminate(
                    "penalty", mixture, model_state, one_centered=gradient_penalty
                )
                penalty = penalty + mixture_penalty
            losses = losses + penalty
            metrics["penalty"] = Mean.of(penalty, weights)
        accuracy = discriminator_accuracy(real_logits, fake_logits, loss=loss)
        metrics |= {
            "real_logits": Mean.of(real_logits, weights),
            "fake_logits": Mean.of(fake_logits, weights),
            "accuracy": Mean.of(accuracy, weights),
        }
        total = Mean.of(jnp.where(inside, losses, jnp.nan), weights)
        return ObjectiveOutput(total, model_state, metrics)

    def generator(
        params: Params, model_state: ModelState, batch: Batch, rng: jax.Array, *, train: bool
    ) -> ObjectiveOutput:
        real, labels, inside = _read(module, batch)
        weights = batch.get("weights")
        discriminate = _DiscriminatorPass(module, params, labels, rng, train, weights)
        fake, model_state = _generate(module, params, model_state, batch, labels, rng, train=train)
        _check_image_shape(real, fake)
        # This update discards the changes of the discriminator's collections.
        real_logits = discriminate("real", real, model_state)[0] if relativistic else None
        fake_logits = discriminate("fake", fake, model_state)[0]
        losses = generator_loss(fake_logits, loss=loss, real_logits=real_logits)
        total = Mean.of(jnp.where(inside, losses, jnp.nan), weights)
        return ObjectiveOutput(total, model_state, {})

    return AdversarialObjectives(discriminator, generator)


class _DiscriminatorPass:
    """The discriminator inside one call of an objective, with a dropout stream for each pass."""

    def __init__(
        self,
        module: Any,
        params: Params,
        labels: jax.Array | None,
        rng: jax.Array,
        train: bool,
        weights: jax.Array | None,
    ) -> None:
        self._module, self._params, self._labels = module, params, labels
        self._rng, self._train, self._weights = rng, train, weights

    def __call__(
        self,
        name: str,
        images: jax.Array,
        model_state: ModelState,
        *,
        zero_centered: float = 0.0,
        one_centered: float = 0.0,
    ) -> tuple[jax.Array, ModelState, jax.Array]:
        """Return logits [batch], the updated collections, and the weighted penalties [batch].

        The dropout key depends on `name` only, so a further pass shifts no other.
        """
        (dropout_key,) = rng_streams(self._rng, f"dropout_{name}").values()

        def discriminate(images: jax.Array) -> tuple[jax.Array, ModelState]:
            return apply_module(
                self._module,
                self._params,
                model_state,
                images,
                self._labels,
                rngs={"dropout": dropout_key},
                train=self._train,
                weights=self._weights,
                method="discriminate",
            )

        if not self._train or not (zero_centered or one_centered):
            logits, model_state = discriminate(images)
            return logits, model_state, jnp.zeros_like(logits)
        logits, model_state, gradients = logits_and_gradients(discriminate, images)
        if zero_centered:
            return logits, model_state, zero_centered * zero_centered_penalty(gradients)
        return logits, model_state, one_centered * gradient_penalty(gradients)


def _generate(
    module: Any,
    params: Params,
    model_state: ModelState,
    batch: Batch,
    labels: jax.Array | None,
    rng: jax.Array,
    *,
    train: bool,
) -> tuple[jax.Array, ModelState]:
    streams = rng_streams(rng, "latent", "dropout")
    if "latents" in batch:
        latents = batch["latents"]
    else:
        images = batch["inputs"]
        shape = (images.shape[0], module.latent_size)
        latents = drawn_in_float32(jax.random.normal)(streams.pop("latent"), shape, images.dtype)
    return apply_module(
        module,
        params,
        model_state,
        latents,
        labels,
        rngs={"dropout": streams["dropout"]},
        train=train,
        weights=batch.get("weights"),
        method="generate",
    )


def _read(module: Any, batch: Batch) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Return the images, the labels of a conditional network, and which images are in range."""
    conditional = module.num_classes is not None
    check_batch(batch, {"inputs", *["labels"] * conditional})
    images, inside = check_images(batch["inputs"], (-1.0, 1.0))  # the range of a generator's tanh
    return images, batch["labels"] if conditional else None, inside


def _check_image_shape(real: jax.Array, fake: jax.Array) -> None:
    if real.shape != fake.shape:
        raise ValueError(
            f"images of shape {real.shape[1:]} do not fit a generator of {fake.shape[1:]}; build "
            f"it with image_shape={real.shape[1:]}, or resize the images"
        )


def _check_no_batch_norm(model_state: ModelState) -> None:
    if "discriminator" in model_state.get("batch_stats", {}):
        raise ValueError(
            "gradient_penalty, r1 and r2 need a discriminator whose logit of an image depends on "
            "no other image, but this one has a batch norm; build it with norm=None, 'layer' or "
            "'spectral'"
        )
