"""The optimizers of the experiments with their learning rate schedules."""

from __future__ import annotations

import jax
import optax
import optax.contrib

import jaxnets as jn
from experiments.harness.options import Options
from jaxnets.training.optimizers import OPTIMIZERS


def make_optimizer(
    options: Options, num_steps: int, *, beta1: float = 0.9
) -> optax.GradientTransformation:
    """Build the optimizer and its schedule.

    Args:
        options: of the run.
        num_steps: of the whole run.
        beta1: decay of the first moment (adamw).

    Returns:
        An Optax transformation.
    """
    warmup = max(1, round(options.warmup * num_steps))
    peak = options.learning_rate
    rising = optax.linear_schedule(0.0, peak, warmup)
    if options.schedule == "constant":
        rate = rising
    elif options.schedule == "linear":
        falling = optax.linear_schedule(peak, options.final_rate * peak, max(num_steps - warmup, 1))
        rate = optax.join_schedules([rising, falling], [warmup])
    else:
        rate = optax.warmup_cosine_decay_schedule(
            0.0, peak, warmup, max(num_steps, warmup + 1), end_value=options.final_rate * peak
        )
    optimizer = _optimizer(options, rate, beta1)
    if options.clip:
        optimizer = optax.chain(optax.clip_by_global_norm(options.clip), optimizer)
    if options.average_decay:
        return jn.with_parameter_average(optimizer, options.average_decay)
    return optimizer


def _optimizer(
    options: Options, rate: optax.Schedule, beta1: float
) -> optax.GradientTransformation:
    """Build the optimizer of a schedule, from the library's registry where that has it."""
    name, decay = options.optimizer, options.weight_decay
    match name:
        case "adamw":
            return OPTIMIZERS[name](rate, b1=beta1, b2=options.beta2, weight_decay=decay)
        case "lion":
            return OPTIMIZERS[name](rate, weight_decay=decay)
        case "muon":
            return OPTIMIZERS[name](
                rate,
                weight_decay=decay,
                adam_b2=options.beta2,
                consistent_rms=0.2,  # AdamW's update size, so that both use one learning rate
            )
        case "relative_muon":
            return _relative_muon(rate, share=options.adam_share, beta2=options.beta2)
    l2_penalty = optax.add_decayed_weights(decay, mask=jn.decay_mask)
    if name == "nesterov":
        return optax.chain(l2_penalty, OPTIMIZERS["momentum"](rate, nesterov=True))
    return optax.chain(l2_penalty, OPTIMIZERS[name](rate))


def _relative_muon(
    rate: optax.Schedule, *, share: float, beta2: float
) -> optax.GradientTransformation:
    """Scale Muon's update of each convolution to its kernel's norm; train the rest by Adam.

    A batch norm makes the output independent of the scale of the kernel before it, so only the
    relative size of an update matters (You, Gitman and Ginsburg 2017, arXiv:1708.03888). Momentum
    0.6 and three Newton-Schulz iterations are those of Jordan 2024,
    https://github.com/KellerJordan/cifar10-airbench, which normalizes the kernels instead.
    """
    relative = optax.chain(
        optax.contrib.scale_by_muon(
            beta=0.6, ns_steps=3, weight_dimension_numbers=jn.muon_dimensions
        ),
        optax.scale_by_trust_ratio(),
        optax.scale_by_learning_rate(rate),
    )
    return optax.partition(
        {True: relative, False: optax.adam(lambda step: share * rate(step), b2=beta2)},
        lambda params: jax.tree.map(lambda array: array.ndim == 4, params),
    )
