"""Loss hyperparameters that live in the model state, and schedules for them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxnets.core import Batch, Metrics, StepFn, TrainState


def with_hyperparameters(variables: Mapping[str, Any], **values: float) -> dict[str, Any]:
    """Add hyperparameters that an objective reads from the model state, such as beta of `vae`.

    Args:
        variables: what `module.init` returned.
        values: {name: number}.

    Returns:
        The variables with a collection "hyperparameters" of scalars.
    """
    scalars = {name: jnp.asarray(value, jnp.result_type(float)) for name, value in values.items()}
    return {**variables, "hyperparameters": scalars}


def scheduled(step: StepFn, **schedules: Callable[[jax.Array], Any]) -> StepFn:
    """Schedule hyperparameters in the model state by the number of completed steps.

    The counterpart for optimizers is `optax.inject_hyperparams`.

    Args:
        step: such as from `make_train_step`.
        schedules: {name in model_state["hyperparameters"]: function of the step}, such as any
            `optax.Schedule`.

    Returns:
        A step that sets the scheduled values, then runs `step`.

    Raises:
        ValueError: at the call, a state without these hyperparameters.
    """
    return _Scheduled(step, schedules)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["step"], meta_fields=["schedules"]
)
@dataclasses.dataclass(frozen=True, eq=False)  # hashable, as jax.jit needs it
class _Scheduled:
    step: StepFn
    schedules: Mapping[str, Callable[[jax.Array], Any]]

    def __call__(
        self, state: TrainState, batch: Batch, /, *, axis_name: str | None = None
    ) -> tuple[TrainState, Metrics]:
        scalars = dict(state.model_state.get("hyperparameters", {}))
        for name, schedule in self.schedules.items():
            if name not in scalars:
                raise ValueError(
                    f"the model state has the hyperparameters {sorted(scalars)} and no {name!r}; "
                    f"give create_train_state with_hyperparameters(variables, {name}=...)"
                )
            scalars[name] = jnp.asarray(schedule(state.step), scalars[name].dtype)
        model_state = {**state.model_state, "hyperparameters": scalars}
        state = dataclasses.replace(state, model_state=model_state)
        return self.step(state, batch, axis_name=axis_name)
