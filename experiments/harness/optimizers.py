"""The optimizers of the experiments and their schedules, as the options say."""

from __future__ import annotations

import jax
import optax
import optax.contrib

import jaxnets as jn
from experiments.harness.options import Options


def make_optimizer(
    options: Options, num_steps: int, *, beta1: float = 0.9
) -> optax.GradientTransformation:
    """Build the optimizer and its schedule.

    Args:
        options: of the run.
        num_steps: of the whole run.
        beta1: decay of the average of gradients (adamw).

    Returns:
        An Optax transformation.
    """
    warmup = max(1, round(options.warmup * num_steps))
    peak, decay, mask = options.learning_rate, options.weight_decay, jn.decay_mask
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
    penalty = optax.add_decayed_weights(decay, mask=mask)
    optimizer = {
        "adamw": lambda: optax.adamw(
            rate, b1=beta1, b2=options.beta2, weight_decay=decay, mask=mask
        ),
        "lion": lambda: optax.lion(rate, weight_decay=decay, mask=mask),
        "muon": lambda: optax.contrib.muon(
            rate,
            weight_decay=decay,
            weight_decay_mask=mask,
            adam_b2=options.beta2,
            muon_weight_dimension_numbers=jn.muon_dimensions,
            consistent_rms=0.2,  # the size of AdamW's updates, so that one rate serves both
        ),
        "relative_muon": lambda: _relative_muon(
            rate, share=options.adam_share, beta2=options.beta2
        ),
        "sgd": lambda: optax.chain(penalty, optax.sgd(rate, momentum=0.9, nesterov=True)),
        "rmsprop": lambda: optax.chain(penalty, optax.rmsprop(rate)),
    }[options.optimizer]()
    if options.clip:
        optimizer = optax.chain(optax.clip_by_global_norm(options.clip), optimizer)
    if options.average_decay:
        return jn.with_parameter_average(optimizer, options.average_decay)
    return optimizer


def _relative_muon(
    rate: optax.Schedule, *, share: float, beta2: float
) -> optax.GradientTransformation:
    """Take steps of a share of each convolution's norm, and train the rest by Adam.

    A batch norm hides the size of the kernel in front of it, so that only the size of a step
    relative to it counts (You, Gitman and Ginsburg 2017, arXiv:1708.03888). Short momentum and
    three iterations are those of Jordan 2024, https://github.com/KellerJordan/cifar10-airbench,
    which scales the kernels themselves back to one norm instead.
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
