"""Training of one experiment by several executors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import jaxnets as jn


def assert_executors_train_alike(make_problem, config, executors):
    """Check that all executors log the losses of the first one, from the same initial networks.

    Without dropout, whose masks differ between devices.

    Args:
        make_problem: config -> problem.
        config: of one run.
        executors: their names.
    """
    expected, start = None, None
    for executor in executors:
        problem = make_problem(dataclasses.replace(config, executor=executor))
        start = problem.create_states() if start is None else start
        states = jax.tree.map(jnp.copy, start)  # the step donates its argument
        _, history = jn.fit(
            problem.executor(),
            states,
            problem.batches(),
            num_steps=config.steps,
            log_every=config.log_every,
        )
        losses = np.array([row["loss"] for row in history.rows])  # [rows, seeds]
        assert losses.shape == (config.steps // config.log_every, config.seeds)
        assert np.all(np.isfinite(losses)) and np.all(losses[0] != losses[-1])
        expected = losses if expected is None else expected
        np.testing.assert_allclose(losses, expected, rtol=1e-4, err_msg=executor)
