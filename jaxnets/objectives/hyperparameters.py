"""Numbers in the model state that objectives read, and schedules for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxnets.core import Batch, Metrics, StepFn, TrainState


def with_hyperparameters(variables: Mapping[str, Any], **values: float) -> dict[str, Any]:
    """Add numbers that an objective reads from the model state, such as the beta of `vae`.

    Args:
        variables: what `module.init` returned.
        values: {name: number}.

    Returns:
        The variables with a collection "hyperparameters" of scalars.
    """
    numbers = {name: jnp.asarray(value, jnp.result_type(float)) for name, value in values.items()}
    return {**variables, "hyperparameters": numbers}


def scheduled(step: StepFn, **schedules: Callable[[jax.Array], Any]) -> StepFn:
    """Let hyper-parameters in the model state depend on the number of completed steps.

    Args:
        step: such as from `make_train_step`.
        schedules: {name in model_state["hyperparameters"]: function of the step}, any schedule of
            Optax.

    Returns:
        A step that sets them and goes on as `step`.

    Raises:
        ValueError: at the call, a state without these hyper-parameters.
    """

    def run(
        state: TrainState, batch: Batch, *, axis_name: str | None = None
    ) -> tuple[TrainState, Metrics]:
        numbers = dict(state.model_state.get("hyperparameters", {}))
        for name, schedule in schedules.items():
            if name not in numbers:
                raise ValueError(
                    f"the model state has the hyper-parameters {sorted(numbers)} and no {name!r}; "
                    f"give create_train_state with_hyperparameters(variables, {name}=...)"
                )
            numbers[name] = jnp.asarray(schedule(state.step), numbers[name].dtype)
        model_state = {**state.model_state, "hyperparameters": numbers}
        return step(dataclasses.replace(state, model_state=model_state), batch, axis_name=axis_name)

    return run
