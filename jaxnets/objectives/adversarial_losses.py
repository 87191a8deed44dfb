"""Adversarial losses per example from discriminator logits, and gradient penalties.

A large logit means "real". All losses are computed in float32 or wider.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jaxnets.checks import check_same_shape
from jaxnets.core import at_least_float32, drawn_in_float32

Loss = Callable[[jax.Array, jax.Array], jax.Array]
Aux = TypeVar("Aux")


class _Pair(NamedTuple):
    discriminator: Loss  # (real_logits, fake_logits) -> losses
    generator: Loss
    relativistic: bool = False  # the generator's loss needs the real logits
    threshold: float | None = 0.0  # logit between fake and real; None if only differences matter


def _cross_entropies(real: jax.Array, fake: jax.Array) -> jax.Array:
    return jax.nn.softplus(-real) + jax.nn.softplus(fake)


_LOSSES = {
    "non_saturating": _Pair(_cross_entropies, lambda real, fake: jax.nn.softplus(-fake)),
    "minimax": _Pair(_cross_entropies, lambda real, fake: -jax.nn.softplus(fake)),
    "hinge": _Pair(
        lambda real, fake: jax.nn.relu(1 - real) + jax.nn.relu(1 + fake),
        lambda real, fake: -fake,
    ),
    "least_squares": _Pair(
        lambda real, fake: (jnp.square(real - 1) + jnp.square(fake)) / 2,
        lambda real, fake: jnp.square(fake - 1) / 2,
        threshold=0.5,
    ),
    "wasserstein": _Pair(lambda real, fake: fake - real, lambda real, fake: -fake, threshold=None),
    "relativistic": _Pair(
        lambda real, fake: jax.nn.softplus(fake - real),
        lambda real, fake: jax.nn.softplus(real - fake),
        relativistic=True,
        threshold=None,
    ),
}

#: Names that `loss` may have.
ADVERSARIAL_LOSSES = tuple(_LOSSES)


def discriminator_loss(
    real_logits: jax.Array, fake_logits: jax.Array, *, loss: str = "non_saturating"
) -> jax.Array:
    """Loss of a discriminator that classifies images as real or generated.

    With r and f the logits of real and generated images:

    =============== =========================================
    non_saturating  softplus(-r) + softplus(f)
    minimax         the same
    hinge           max(0, 1 - r) + max(0, 1 + f)
    least_squares   ((r - 1)^2 + f^2) / 2
    wasserstein     f - r
    relativistic    softplus(f - r)
    =============== =========================================

    "non_saturating" is `optax.sigmoid_binary_cross_entropy` with labels 1 for real and 0 for
    generated images, added up; `torch.nn.functional.binary_cross_entropy_with_logits` likewise.

    Args:
        real_logits: [...].
        fake_logits: [...], same shape; entry i is paired with entry i of the real ones, which
            matters for "relativistic" only.
        loss: one of `ADVERSARIAL_LOSSES`.

    Returns:
        Losses, [...]; in nats for the first two and "relativistic".

    Raises:
        ValueError: an unknown loss, or shapes that differ.

    Example:
        >>> loss = discriminator_loss(jnp.array([0.0]), jnp.array([0.0]))
        >>> round(float(loss[0]), 4)  # 2 log(2)
        1.3863

    References:
        Goodfellow et al. 2014, arXiv:1406.2661, equation 1 (minimax) and section 3
        (non-saturating); Lim and Ye 2017, arXiv:1705.02894 (hinge); Mao et al. 2017,
        arXiv:1611.04076, equation 9 (least squares); Arjovsky et al. 2017, arXiv:1701.07875
        (Wasserstein); Jolicoeur-Martineau 2019, arXiv:1807.00734, and Huang et al. 2024,
        arXiv:2501.05441, equation 2 (relativistic pairs).
    """
    pair = check_loss(loss)
    check_same_shape(real_logits=real_logits, fake_logits=fake_logits)
    return pair.discriminator(at_least_float32(real_logits), at_least_float32(fake_logits))


def generator_loss(
    fake_logits: jax.Array,
    *,
    loss: str = "non_saturating",
    real_logits: jax.Array | None = None,
) -> jax.Array:
    """Loss of a generator from the discriminator's logits of its images.

    With r and f the logits of real and generated images:

    =============== =========================================
    non_saturating  softplus(-f)
    minimax         -softplus(f), which is log(1 - sigmoid(f))
    hinge           -f
    least_squares   (f - 1)^2 / 2
    wasserstein     -f
    relativistic    softplus(r - f)
    =============== =========================================

    Args:
        fake_logits: [...].
        loss: one of `ADVERSARIAL_LOSSES`.
        real_logits: [...], same shape; "relativistic" needs them, the others ignore them.

    Returns:
        Losses, [...]; in nats for the first two and "relativistic".

    Raises:
        ValueError: an unknown loss, real logits missing where they are needed, or shapes that
            differ.

    References:
        As for `discriminator_loss`.
    """
    pair = check_loss(loss)
    if real_logits is None:
        if pair.relativistic:
            raise ValueError(
                f"the loss {loss!r} compares generated with real images; give real_logits too"
            )
        real_logits = fake_logits
    check_same_shape(real_logits=real_logits, fake_logits=fake_logits)
    return pair.generator(at_least_float32(real_logits), at_least_float32(fake_logits))


def discriminator_accuracy(
    real_logits: jax.Array, fake_logits: jax.Array, *, loss: str = "non_saturating"
) -> jax.Array:
    """Accuracy of a discriminator on each pair of a real and a generated image.

    A logit above 0 means "real", under "least_squares" above 0.5, halfway between its targets.
    Under "wasserstein" and "relativistic" only differences of logits matter: a pair counts 1 if
    the real image has the larger logit, else 0.

    Args:
        real_logits: [...].
        fake_logits: [...], same shape; entry i is paired with entry i of the real ones.
        loss: one of `ADVERSARIAL_LOSSES`.

    Returns:
        0, 0.5 or 1, [...].

    Raises:
        ValueError: an unknown loss, or shapes that differ.

    Example:
        >>> real, fake = jnp.array([0.7, 0.4]), jnp.array([0.2, 0.3])
        >>> discriminator_accuracy(real, fake, loss="least_squares").tolist()
        [1.0, 0.5]
        >>> discriminator_accuracy(real, fake, loss="wasserstein").tolist()
        [1.0, 1.0]
    """
    threshold = check_loss(loss).threshold
    check_same_shape(real_logits=real_logits, fake_logits=fake_logits)
    real, fake = at_least_float32(real_logits), at_least_float32(fake_logits)
    if threshold is None:
        return (real > fake).astype(real.dtype)
    return ((real > threshold).astype(real.dtype) + (fake <= threshold)) / 2


def check_loss(loss: str) -> _Pair:
    """Look up an adversarial loss by name.

    Args:
        loss: one of `ADVERSARIAL_LOSSES`.

    Returns:
        The losses of the discriminator and of the generator, whether the latter needs the logits
        of real images, and the logit above which an image counts as real, if there is one.

    Raises:
        ValueError: an unknown loss.
    """
    if loss not in _LOSSES:
        raise ValueError(f"unknown loss {loss!r}; choose one of {', '.join(_LOSSES)}")
    return _LOSSES[loss]


def logits_and_gradients(
    discriminate: Callable[[jax.Array], tuple[jax.Array, Aux]], images: jax.Array
) -> tuple[jax.Array, Aux, jax.Array]:
    """Compute logits and the gradient of each logit with respect to its own image.

    Args:
        discriminate: images [batch, ...] -> (logits [batch], anything). The logit of an image must
            not depend on other images, so the discriminator must have no batch norm.
        images: [batch, ...].

    Returns:
        Logits [batch], the other output of `discriminate`, and the gradients, shape of `images`;
        all of them differentiable again.

    Example:
        >>> discriminate = lambda images: (jnp.sum(images**2, axis=-1), None)
        >>> _, _, gradients = logits_and_gradients(discriminate, jnp.array([[1.0, 3.0]]))
        >>> gradients.tolist()
        [[2.0, 6.0]]
    """
    logits, pullback, aux = jax.vjp(discriminate, images, has_aux=True)
    (gradients,) = pullback(jnp.ones_like(logits))
    return logits, aux, gradients


def zero_centered_penalty(gradients: jax.Array) -> jax.Array:
    """Zero-centered gradient penalty, |gradient|^2 / 2 per example.

    It is called R1 at real images and R2 at generated ones.

    Args:
        gradients: of the logits with respect to the images, [batch, ...].

    Returns:
        [batch].

    Example:
        >>> zero_centered_penalty(jnp.array([[3.0, 4.0]])).tolist()
        [12.5]

    References:
        Mescheder, Geiger and Nowozin 2018, arXiv:1801.04406, equation 9.
    """
    return _squared_norm(gradients) / 2


def gradient_penalty(gradients: jax.Array) -> jax.Array:
    """One-centered gradient penalty of WGAN-GP, (|gradient| - 1)^2 per example.

    Args:
        gradients: of the logits with respect to interpolates of real and generated images, see
            `mix`, [batch, ...].

    Returns:
        [batch].

    Example:
        >>> gradient_penalty(jnp.array([[3.0, 4.0]])).tolist()
        [16.0]

    References:
        Gulrajani et al. 2017, arXiv:1704.00028, equation 3.
    """
    squared = _squared_norm(gradients)
    # The square root has no derivative at zero, where the gradient of a new discriminator may be.
    zero = squared == 0
    norm = jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, squared)))
    return jnp.square(norm - 1)


def mix(real: jax.Array, fake: jax.Array, rng: jax.Array) -> jax.Array:
    """Interpolate between each real image and its generated one at a uniform random point.

    Args:
        real: [batch, ...].
        fake: same shape.
        rng: key; one uniform draw for each pair.

    Returns:
        Shape of `real`.

    Raises:
        ValueError: shapes that differ.

    References:
        Gulrajani et al. 2017, arXiv:1704.00028, algorithm 1.
    """
    check_same_shape(real=real, fake=fake)
    shape = (real.shape[0],) + (1,) * (real.ndim - 1)  # [batch, 1, ...]
    fraction = drawn_in_float32(jax.random.uniform)(rng, shape, real.dtype)
    return fraction * real + (1 - fraction) * fake


def _squared_norm(gradients: jax.Array) -> jax.Array:
    axes = tuple(range(1, gradients.ndim))
    return jnp.sum(jnp.square(at_least_float32(gradients)), axis=axes)
