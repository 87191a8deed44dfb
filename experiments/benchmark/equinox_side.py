"""Equinox: `filter_jit`, `filter_value_and_grad` and Optax, as in its examples."""

from __future__ import annotations

import itertools
from typing import Any

import equinox as eqx
import jax
import numpy as np
import optax

from experiments.benchmark.equinox_networks import BATCH, build
from experiments.benchmark.sides import Prepared, Settings, ready
from experiments.benchmark.workloads import LEARNING_RATE, Workload

LIBRARIES = ("equinox", "jax", "optax")


def prepare(settings: Settings) -> Prepared:
    """Build a workload."""
    workload = settings.workload
    return infer(workload) if workload.task == "infer" else train(workload)


def _inputs(workload: Workload) -> jax.Array:
    inputs = workload.inputs()
    # Its convolutions take channels first.
    return jax.device_put(np.moveaxis(inputs, -1, 1).copy() if inputs.ndim == 4 else inputs)


def _apply(model: Any, state: Any, inputs: jax.Array) -> tuple[jax.Array, Any]:
    return jax.vmap(model, axis_name=BATCH, in_axes=(0, None), out_axes=(0, None))(inputs, state)


def _size(model: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)))


def train(workload: Workload) -> Prepared:
    """Single steps."""
    model, state = build(workload.network, 0)
    optimizer = optax.adam(LEARNING_RATE)
    opt_state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))

    def loss_fn(model: Any, state: Any, inputs: jax.Array, labels: jax.Array) -> Any:
        logits, state = _apply(model, state, inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), state

    @eqx.filter_jit(donate="all-except-first")
    def step(batch: Any, model: Any, state: Any, opt_state: Any) -> Any:
        differentiate = eqx.filter_value_and_grad(loss_fn, has_aux=True)
        (loss, state), gradients = differentiate(model, state, *batch)
        trained = eqx.filter(model, eqx.is_inexact_array)
        updates, opt_state = optimizer.update(gradients, opt_state, trained)
        return eqx.apply_updates(model, updates), state, opt_state, loss

    inputs = _inputs(workload)
    endless = itertools.cycle(jax.device_put(list(workload.labels())))
    number = _size(model)

    def run(num_steps: int) -> float:
        nonlocal model, state, opt_state
        for _ in range(num_steps):
            model, state, opt_state, loss = step((inputs, next(endless)), model, state, opt_state)
        jax.block_until_ready(eqx.filter(model, eqx.is_array))
        return float(loss)

    return ready(workload, run, number)


def infer(workload: Workload) -> Prepared:
    """Logits of a batch."""
    model, state = build(workload.network, 0)
    model = eqx.nn.inference_mode(model)
    inputs = _inputs(workload)
    predict = eqx.filter_jit(lambda model, state, inputs: _apply(model, state, inputs)[0])

    def run(num_steps: int) -> None:
        for _ in range(num_steps):
            logits = predict(model, state, inputs)
        jax.block_until_ready(logits)

    return ready(workload, run, _size(model))
