"""The train state of plain Flax, extended as in its guide on batch norm."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import optax
from flax.training import train_state


class State(train_state.TrainState):
    """Parameters, optimizer state and the running averages of batch norms."""

    batch_stats: Any


def create_states(
    module: nn.Module,
    optimizer: optax.GradientTransformation,
    *inputs: Any,
    num_states: int = 1,
) -> list[State]:
    """Return states with different parameters and the same functions, for one compiled program.

    Args:
        module: the network.
        optimizer: of its parameters.
        inputs: example inputs of the module.
        num_states: number of networks.
    """
    init = jax.jit(module.init)
    drawn = [init(jax.random.key(seed), *inputs) for seed in range(num_states)]
    return [
        State.create(
            apply_fn=module.apply,
            params=variables["params"],
            tx=optimizer,
            batch_stats=variables.get("batch_stats", {}),
        )
        for variables in drawn
    ]


def num_parameters(states: Any) -> int:
    """Return the number of parameters of a state, or of all states in a tuple."""
    leaves = jax.tree.leaves(states, is_leaf=lambda node: isinstance(node, State))
    return sum(leaf.size for state in leaves for leaf in jax.tree.leaves(state.params))
