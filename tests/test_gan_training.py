"""Two updates on one state: each network apart, every executor, populations, resume."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoint_problem import assert_bitwise_equal
from gan_problem import BATCH, DOUBLE, LARGER, RANDOM, TINY, as_double, plain, problem, without

from jaxnets.adversarial import adversarial
from jaxnets.core import Precision
from jaxnets.equivalence import check_equivalence
from jaxnets.gan import dcgan
from jaxnets.hooks import Checkpointing, resume
from jaxnets.loop import fit
from jaxnets.optimizers import averaged_parameters, with_parameter_average
from jaxnets.parallel import jit_step, population_step, scan_steps
from jaxnets.training import create_train_state, make_train_step


@pytest.mark.parametrize("num_critics", [1, 2])
def test_an_update_of_one_network_leaves_the_other_bit_identical(num_critics):
    module = dcgan((16, 16, 1), norm="batch", **TINY)
    objectives = adversarial(module, "non_saturating")
    updates, state = problem(objectives, module, num_critics=num_critics)
    for index, name in ((0, "discriminator"), (-1, "generator")):
        other = {"discriminator": "generator", "generator": "discriminator"}[name]
        after, _ = jit_step(make_train_step([updates[index]] * num_critics))(state, LARGER)
        own = state.params[name], state.model_state["batch_stats"].get(name)
        now = after.params[name], after.model_state["batch_stats"].get(name)
        moved = [
            np.any(a != b) for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(now), strict=True)
        ]
        assert all(moved), f"something of the {name} has not moved"
        for tree in ("params", "opt_state"):
            assert_bitwise_equal(getattr(after, tree)[other], getattr(state, tree)[other])
        for collection in state.model_state:
            before = state.model_state[collection].get(other)
            assert_bitwise_equal(after.model_state[collection].get(other), before)


def test_power_iteration_moves_in_the_discriminators_update_only():
    module = dcgan((8, 8, 1), norm="spectral", **TINY)
    updates, state = problem(adversarial(module, "hinge"), module)
    vectors = []
    for update in updates:
        state, _ = jit_step(make_train_step(update))(state, without(BATCH, "latents"))
        vectors.append(state.model_state["spectral_norm"]["discriminator"]["conv_1"]["right"])
    np.testing.assert_array_equal(vectors[0], vectors[1])
    assert not np.allclose(
        vectors[0],
        problem(adversarial(module), module)[1].model_state["spectral_norm"]["discriminator"][
            "conv_1"
        ]["right"],
    )


# name -> (precision -> module, batch, loss, penalties, executors that draw or normalise otherwise)
PROBLEMS = {
    "r3gan": (plain, BATCH, "relativistic", {"r1": 0.1, "r2": 0.1}, set()),
    "wgan_gp": (
        # Each device and each microbatch mixes images at shares of its own.
        plain,
        BATCH,
        "wasserstein",
        {"gradient_penalty": 0.1},
        {"microbatched", "pmap"},
    ),
    "dcgan": (
        # Microbatches have batch statistics of their own.
        lambda precision: dcgan((16, 16, 1), norm="batch", precision=precision, **TINY),
        LARGER,
        "non_saturating",
        {},
        {"microbatched"},
    ),
    "spectral": (
        # Each microbatch moves the singular vectors on.
        lambda precision: dcgan((8, 8, 1), norm="spectral", precision=precision, **TINY),
        BATCH,
        "hinge",
        {},
        {"microbatched"},
    ),
}


@pytest.mark.parametrize("name", ["r3gan", "wgan_gp"])
def test_executors_agree_in_float32_under_momentum(name):
    make, batch, loss, penalties, others = PROBLEMS[name]
    module = make(Precision())
    updates, state = problem(adversarial(module, loss, **penalties), module)
    check_executors(updates, state, batch, others, tolerance=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["r3gan", "dcgan", "spectral"])
def test_executors_agree_in_float64_under_adam(name, enable_x64):
    make, batch, loss, penalties, others = PROBLEMS[name]
    module = make(DOUBLE)
    optimizers = (optax.adam(1e-2, b1=0.5), optax.adam(2e-2, b1=0.5))
    updates, state = problem(adversarial(module, loss, **penalties), module, optimizers)
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype for x in floats} == {jnp.dtype("float64")}
    check_executors(updates, state, as_double(batch), others, tolerance=1e-10)


def check_executors(updates, state, batch, others, *, tolerance):
    step = make_train_step(updates)
    report = check_equivalence(step, state, batch, num_steps=2, reference="jit")
    expected = {"scan", "pmap", "replicated", "fsdp", "microbatched"}
    assert set(report.differences) == expected, report.skipped
    assert report.num_devices == 4
    for name in expected - others:
        assert max(report.differences[name].values()) < tolerance, report.table()
    for name in others:  # What is left out differs, or it should not be left out.
        assert max(report.differences[name].values()) > tolerance


def test_each_member_of_a_population_equals_its_solo_run():
    module = dcgan((8, 8, 1), norm="spectral", **TINY)
    objectives = adversarial(module, "hinge")
    updates, _ = problem(objectives, module)

    def create(seed):
        variables = module.init(jax.random.key(seed), jnp.zeros((1, 5)))
        return create_train_state(variables, updates, rng=jax.random.key(seed))

    batch = without(BATCH, "latents")
    step = make_train_step(updates)
    states = jax.jit(jax.vmap(create))(jnp.arange(2))
    population = jit_step(scan_steps(population_step(step, loop="map")))
    states, metrics = population(states, jax.tree.map(lambda x: np.stack([x] * 2), batch))
    assert metrics["generator/loss"].count.shape == (2,)
    solo = jit_step(step)
    for seed in (0, 1):
        alone = jax.jit(create)(seed)
        for _ in range(2):
            alone, _ = solo(alone, batch)
        for tree in ("params", "model_state", "opt_state"):
            for one, all_of_them in zip(
                jax.tree.leaves(getattr(alone, tree)),
                jax.tree.leaves(getattr(states, tree)),
                strict=True,
            ):
                np.testing.assert_allclose(all_of_them[seed], one, rtol=0, atol=1e-6)


def test_a_run_of_two_optimizers_and_an_average_resumes_bitwise(tmp_path):
    module = dcgan((8, 8, 1), norm="spectral", **TINY)
    optimizers = (optax.adam(1e-3, b1=0.5), with_parameter_average(optax.adam(1e-3), 0.9))
    updates, state = problem(adversarial(module, "hinge"), module, optimizers, num_critics=2)
    step = jit_step(make_train_step(updates))

    def source(first):
        for index in range(first, 100):
            yield {"inputs": np.roll(BATCH["inputs"], index, axis=0)}

    whole, _ = fit(step, state, source, num_steps=7)
    fit(step, state, source, num_steps=4, hooks=[Checkpointing(tmp_path, every=4)])
    other = problem(adversarial(module), module, optimizers, seed=3)[1]
    resumed, history = resume(tmp_path, other)
    assert history.step == int(resumed.step) == 4
    resumed, _ = fit(step, resumed, source, num_steps=7, history=history)
    assert_bitwise_equal(resumed, whole)
    average = averaged_parameters(resumed)
    assert jax.tree.structure(average) == jax.tree.structure(resumed.params["generator"])


def test_a_generator_learns_a_point():
    # Every real image is the same: the generator has to forget its latents.
    module = plain()
    objectives = adversarial(module, "relativistic", r1=1.0, r2=1.0)
    updates, state = problem(
        objectives, module, (optax.adam(1e-2, b1=0.0), optax.adam(1e-2, b1=0.0))
    )
    point = np.full((8, 8, 8, 1), 0.6, np.float32)
    batch = {"inputs": point, "labels": BATCH["labels"]}
    run = jit_step(scan_steps(make_train_step(updates)))
    latents = jnp.asarray(RANDOM.normal(size=(8, 5)), jnp.float32)

    def distance(state):
        made = module.apply(state.variables, latents, BATCH["labels"], method="generate")
        return float(jnp.mean(jnp.abs(made - 0.6)))

    before = distance(state)
    state, _ = run(state, jax.tree.map(lambda x: np.stack([x] * 300), batch))
    assert distance(state) < 0.3 * before
