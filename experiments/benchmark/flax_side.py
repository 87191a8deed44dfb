"""Plain Flax: modules, `flax.training.train_state`, `jax.jit` and Optax, as in Flax's examples."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmark import flax_generative
from experiments.benchmark.flax_networks import build
from experiments.benchmark.flax_state import State, create_states, num_parameters
from experiments.benchmark.sides import Prepared, Settings, read_idx, ready
from experiments.benchmark.workloads import LEARNING_RATE, PIXEL_DEVIATION, PIXEL_MEAN, Workload

LIBRARIES = ("flax", "jax", "optax")


def prepare(settings: Settings) -> Prepared:
    """Build a workload; the variant "scan" is a handwritten scan over many steps."""
    workload = settings.workload
    if workload.task == "infer":
        return infer(workload)
    if workload.task == "population":
        return train_one_after_the_other(workload, together=settings.variant == "scan")
    if workload.task == "epoch":
        return train_epoch(workload, settings)
    if workload.task in ("autoencode", "adversarial"):
        return train_generative(workload)
    return scan(workload) if settings.variant == "scan" else train(workload)


def _create(workload: Workload, num_states: int = 1) -> list[State]:
    module, optimizer = build(workload.network, workload.precision), optax.adam(LEARNING_RATE)
    return create_states(module, optimizer, workload.inputs()[:1], num_states=num_states)


def _step(state: State, batch: dict[str, jax.Array]) -> tuple[State, jax.Array]:
    def loss_fn(params: Any) -> tuple[jax.Array, Any]:
        logits, changes = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            batch["inputs"],
            train=True,
            mutable=["batch_stats"],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits.astype(jnp.float32), batch["labels"]
        )
        return losses.mean(), changes.get("batch_stats", {})

    (loss, stats), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=gradients, batch_stats=stats), loss


def _batches(workload: Workload) -> list[dict[str, jax.Array]]:
    inputs = workload.inputs()
    return [jax.device_put({"inputs": inputs, "labels": each}) for each in workload.labels()]


def train(workload: Workload) -> Prepared:
    """Single steps."""
    (state,) = _create(workload)
    return _one_by_one(workload, _step, state, _batches(workload))


def train_generative(workload: Workload) -> Prepared:
    """Single steps of one network or of two."""
    state, step = flax_generative.create(workload)
    return _one_by_one(workload, step, state, [jax.device_put(workload.inputs())])


def _one_by_one(
    workload: Workload, step: Callable[..., Any], state: Any, batches: list[Any]
) -> Prepared:
    number, compiled = num_parameters(state), jax.jit(step, donate_argnums=0)
    endless = itertools.cycle(batches)

    def run(num_steps: int) -> float:
        nonlocal state
        for _ in range(num_steps):
            state, loss = compiled(state, next(endless))
        return float(jax.block_until_ready((state, loss))[1])

    return ready(workload, run, number)


def scan(workload: Workload) -> Prepared:
    """A handwritten scan over the steps of a dispatch."""
    (state,), bundled = _create(workload), workload.steps_per_dispatch
    step, batches = _bundled(workload)

    def run(num_steps: int) -> float:
        nonlocal state
        for _ in range(num_steps // bundled):
            state, losses = step(state, batches)
        return float(jax.block_until_ready((state, losses))[1][-1])

    return ready(workload, run, num_parameters(state), steps_first=bundled)


def _bundled(workload: Workload) -> tuple[Callable[..., Any], dict[str, jax.Array]]:
    step = jax.jit(lambda state, batches: jax.lax.scan(_step, state, batches), donate_argnums=0)
    return step, jax.device_put(workload.bundle())


def train_one_after_the_other(workload: Workload, *, together: bool) -> Prepared:
    """A step of each network in turn, or a dispatch of each, with one compiled program."""
    states = _create(workload, workload.members)
    size, bundled = num_parameters(states[0]), workload.steps_per_dispatch if together else 1
    if together:
        step, batches = _bundled(workload)
        endless = itertools.repeat(batches)
    else:
        step = jax.jit(_step, donate_argnums=0)
        endless = itertools.cycle(_batches(workload))

    def run(num_steps: int) -> float:
        for _ in range(num_steps // bundled):
            batch, losses = next(endless), []
            for index, state in enumerate(states):
                states[index], loss = step(state, batch)
                losses.append(loss)
        jax.block_until_ready(states)
        return float(np.mean(jax.device_get(losses)))

    return ready(workload, run, size, steps_first=bundled)


def infer(workload: Workload) -> Prepared:
    """Logits of a batch."""
    module: nn.Module = build(workload.network, workload.precision)
    inputs = jax.device_put(workload.inputs())
    variables = jax.jit(module.init)(jax.random.key(0), inputs[:1])
    predict = jax.jit(lambda variables, inputs: module.apply(variables, inputs, train=False))

    def run(num_steps: int) -> None:
        for _ in range(num_steps):
            logits = predict(variables, inputs)
        jax.block_until_ready(logits)

    return ready(workload, run, sum(x.size for x in jax.tree.leaves(variables["params"])))


def train_epoch(workload: Workload, settings: Settings) -> Prepared:
    """From the files to trained parameters, as in Flax's example of MNIST."""
    step = jax.jit(_step, donate_argnums=0)
    (start,) = _create(workload)

    def run(num_steps: int) -> float:
        images = read_idx(settings.images)[..., None].astype(np.float32) / 255
        images = (images - PIXEL_MEAN) / PIXEL_DEVIATION
        labels = read_idx(settings.labels).astype(np.int32)
        state = start.replace(
            params=jax.tree.map(jnp.copy, start.params),
            opt_state=jax.tree.map(jnp.copy, start.opt_state),
            step=0,
        )
        order = np.random.default_rng(0).permutation(len(labels))
        losses = []
        for index in range(num_steps):
            chosen = order[index * workload.batch_size : (index + 1) * workload.batch_size]
            state, loss = step(state, {"inputs": images[chosen], "labels": labels[chosen]})
            losses.append(loss)
        jax.block_until_ready(state)
        return float(np.mean(jax.device_get(losses[-50:])))

    return ready(workload, run, num_parameters(start))
