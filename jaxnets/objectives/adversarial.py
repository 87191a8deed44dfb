"""The two objectives of a generative adversarial network."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.core import (
    Batch,
    Mean,
    ModelState,
    Objective,
    ObjectiveOutput,
    Params,
    apply_module,
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
from jaxnets.objectives.image_range import check_images


class AdversarialObjectives(NamedTuple):
    """An objective for each of the two networks, see `adversarial`."""

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

    Batches hold "inputs", images in [-1, 1] [batch, height, width, channels]; "labels" int
    [batch] for a conditional network, which the images to be generated get too; optionally
    "weights" [batch], and "latents" [batch, latent_size], which are otherwise drawn standard
    normal from the stream "latent". With `train`, the networks get a "dropout" stream.

    As in the DCGAN paper's code, the discriminator sees real and generated images as two batches:
    a batch norm in it normalizes each with its own statistics, and its running averages move with
    the real ones first. In the generator's update it sees the generated ones only.

    The train step keeps of model_state what the network of the update owns. An update of one
    network so leaves the other as it is, running averages and all.

    The metrics of the discriminator are "real_logits", "fake_logits", "accuracy", the share of
    images it gets right as `discriminator_accuracy` counts them, and, with `train`, "penalty" if
    there is one. Penalties are not part of the loss in evaluation.

    Args:
        module: a `GAN`, or what has its methods and fields.
        loss: one of `ADVERSARIAL_LOSSES`.
        gradient_penalty: factor of `gradient_penalty` between real and generated images;
            10 in WGAN-GP, from the stream "mixture".
        r1: factor of `zero_centered_penalty` at the real images.
        r2: factor of `zero_centered_penalty` at the generated images; R3GAN takes it equal to r1.

    Returns:
        AdversarialObjectives. They raise ValueError for batches that lack an array or hold images
        of another shape or type than the generated ones, or outside of [-1, 1] where that is
        known; where it is known only when the program runs, the loss of such an image is NaN, so
        that it stops training.

    Raises:
        ValueError: an unknown loss, or a negative factor.

    References:
        Goodfellow et al. 2014, arXiv:1406.2661, algorithm 1; Radford et al. 2016,
        arXiv:1511.06434; Gulrajani et al. 2017, arXiv:1704.00028; Mescheder et al. 2018,
        arXiv:1801.04406 (R1, R2); Huang et al. 2024, arXiv:2501.05441 (R3GAN: "relativistic"
        with r1 and r2). Differs from the papers: `[discriminator_update] * 5` uses the same real
        images five times, each time with latents of its own (unless the batch holds them);
        algorithm 1 of Arjovsky et al. 2017, arXiv:1701.07875, and of WGAN-GP draws new ones.
    """
    relativistic = check_loss(loss).relativistic
    factors = {"gradient_penalty": gradient_penalty, "r1": r1, "r2": r2}
    for name, factor in factors.items():
        if not factor >= 0:
            raise ValueError(f"{name} is {factor}; give 0 or more")

    def discriminator(
        params: Params, model_state: ModelState, batch: Batch, rng: jax.Array, *, train: bool
    ) -> ObjectiveOutput:
        real, labels, inside = _read(module, batch)
        if train and any(factors.values()):
            _check_no_batch_norm(model_state)
        judged = _DiscriminatorPass(module, params, labels, rng, train)
        fake, _ = _generate(module, params, model_state, batch, labels, rng, train=train)
        _check_same_shape(real, fake)
        real_logits, model_state, real_penalty = judged(real, model_state, zero_centered=r1)
        fake_logits, model_state, fake_penalty = judged(fake, model_state, zero_centered=r2)
        losses = discriminator_loss(real_logits, fake_logits, loss=loss)
        weights, metrics = batch.get("weights"), {}
        if train and any(factors.values()):
            penalty = real_penalty + fake_penalty
            if gradient_penalty:
                mixture = mix(real, fake, rng_streams(rng, "mixture")["mixture"])
                penalty = penalty + judged(mixture, model_state, one_centered=gradient_penalty)[2]
            losses = losses + penalty
            metrics["penalty"] = Mean.of(penalty, weights)
        right = discriminator_accuracy(real_logits, fake_logits, loss=loss)
        metrics |= {
            "real_logits": Mean.of(real_logits, weights),
            "fake_logits": Mean.of(fake_logits, weights),
            "accuracy": Mean.of(right, weights),
        }
        total = Mean.of(jnp.where(inside, losses, jnp.nan), weights)
        return ObjectiveOutput(total, model_state, metrics)

    def generator(
        params: Params, model_state: ModelState, batch: Batch, rng: jax.Array, *, train: bool
    ) -> ObjectiveOutput:
        real, labels, inside = _read(module, batch)
        judged = _DiscriminatorPass(module, params, labels, rng, train)
        fake, model_state = _generate(module, params, model_state, batch, labels, rng, train=train)
        _check_same_shape(real, fake)
        # What the discriminator's collections become is not for this update to keep.
        real_logits = judged(real, model_state)[0] if relativistic else None
        fake_logits = judged(fake, model_state)[0]
        losses = generator_loss(fake_logits, loss=loss, real_logits=real_logits)
        total = Mean.of(jnp.where(inside, losses, jnp.nan), batch.get("weights"))
        return ObjectiveOutput(total, model_state, {})

    return AdversarialObjectives(discriminator, generator)


class _DiscriminatorPass:
    """The discriminator of one objective's call; every batch gets its own dropout."""

    def __init__(
        self, module: Any, params: Params, labels: jax.Array | None, rng: jax.Array, train: bool
    ) -> None:
        self._module, self._params, self._labels = module, params, labels
        self._rng, self._train = rng, train
        self._calls = 0

    def __call__(
        self,
        images: jax.Array,
        model_state: ModelState,
        *,
        zero_centered: float = 0.0,
        one_centered: float = 0.0,
    ) -> tuple[jax.Array, ModelState, jax.Array]:
        """Return logits [batch], the collections afterwards, and the penalties [batch]."""
        self._calls += 1
        streams = rng_streams(jax.random.fold_in(self._rng, self._calls), "dropout")

        def judge(images: jax.Array) -> tuple[jax.Array, ModelState]:
            return apply_module(
                self._module,
                self._params,
                model_state,
                images,
                self._labels,
                rngs=streams,
                train=self._train,
                method="discriminate",
            )

        if not self._train or not (zero_centered or one_centered):
            logits, model_state = judge(images)
            return logits, model_state, jnp.zeros_like(logits)
        logits, model_state, gradients = logits_and_gradients(judge, images)
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
        latents = jax.random.normal(streams.pop("latent"), shape, images.dtype)
    return apply_module(
        module,
        params,
        model_state,
        latents,
        labels,
        rngs={"dropout": streams["dropout"]},
        train=train,
        method="generate",
    )


def _read(module: Any, batch: Batch) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Return the images of a batch, its labels if the network has classes, and which are valid."""
    if "inputs" not in batch:
        raise ValueError(f"the batch has {sorted(batch)}; name its images 'inputs'")
    if module.num_classes is not None and "labels" not in batch:
        raise ValueError(
            f"the batch has {sorted(batch)} and no 'labels'; a conditional network of "
            f"{module.num_classes} classes needs the class of each image"
        )
    sizes = {name: np.shape(array)[0] for name, array in batch.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"the arrays of the batch differ in their number of examples: {sizes}")
    images, inside = check_images(batch["inputs"], (-1.0, 1.0))  # where a generator's are
    return images, None if module.num_classes is None else batch["labels"], inside


def _check_same_shape(real: jax.Array, fake: jax.Array) -> None:
    if real.shape != fake.shape:
        raise ValueError(
            f"images of shape {real.shape[1:]} do not fit a generator of {fake.shape[1:]}; build "
            f"it with image_shape={real.shape[1:]}, or resize the images"
        )


def _check_no_batch_norm(model_state: ModelState) -> None:
    if "discriminator" in model_state.get("batch_stats", {}):
        raise ValueError(
            "gradient_penalty, r1 and r2 need a discriminator whose logit of an image depends on "
            "no other image, and this one has a batch norm; build it with norm=None, 'layer' or "
            "'spectral'"
        )
