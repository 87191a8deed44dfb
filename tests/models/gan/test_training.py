"""Two updates on one state: separate networks, all executors, populations, resume."""

import dataclasses
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoint_problem import assert_bitwise_equal
from checks import slow_or_exhaustive
from gan_problem import BATCH, DOUBLE, LARGER, RANDOM, TINY, as_double, plain, problem, without

import jaxnets
from jaxnets.core import Precision, Update
from jaxnets.models.gan import dcgan
from jaxnets.objectives.adversarial import adversarial
from jaxnets.training.equivalence import check_equivalence
from jaxnets.training.executors import jit_step, population_step, scan_steps
from jaxnets.training.hooks import Checkpointing, resume
from jaxnets.training.loop import fit
from jaxnets.training.optimizers import averaged_parameters, with_parameter_average
from jaxnets.training.step import create_train_state, make_train_step


@pytest.mark.parametrize(
    ("fields", "loss", "penalties", "num_discriminator_updates"),
    [
        pytest.param({"norm": "batch"}, "non_saturating", {}, 1, marks=pytest.mark.slow),
        pytest.param({"norm": "batch"}, "non_saturating", {}, 2, marks=pytest.mark.slow),
        pytest.param(
            {"norm": "batch", "num_classes": 3}, "non_saturating", {}, 1, marks=pytest.mark.slow
        ),
        ({"norm": "spectral", "num_classes": 3}, "non_saturating", {"r1": 0.1}, 1),
    ],
    ids=["batch", "two_discriminator_updates", "conditional", "spectral_penalty"],
)
def test_an_update_of_one_network_leaves_the_other_bit_identical(
    fields, loss, penalties, num_discriminator_updates
):
    batch = LARGER if fields["norm"] == "batch" else BATCH
    module = dcgan(batch["inputs"].shape[1:], **fields, **TINY)
    objectives = adversarial(module, loss, **penalties)
    updates, state = problem(
        objectives, module, num_discriminator_updates=num_discriminator_updates
    )
    collections = sorted(state.model_state)
    for index, name in ((0, "discriminator"), (-1, "generator")):
        other = {"discriminator": "generator", "generator": "discriminator"}[name]
        step = make_train_step([updates[index]] * num_discriminator_updates)
        after, _ = jit_step(step)(state, batch)
        own_before, own_after = (
            [s.params[name], *(s.model_state[collection].get(name) for collection in collections)]
            for s in (state, after)
        )
        unchanged = [
            jax.tree_util.keystr(path)
            for (path, a), b in zip(
                jax.tree_util.tree_leaves_with_path(own_before),
                jax.tree.leaves(own_after),
                strict=True,
            )
            if not np.any(np.asarray(a) != np.asarray(b))
        ]
        # The singular vector of the head's only output is always 1 or -1.
        assert all(path.endswith("['head']['logit']['right']") for path in unchanged), unchanged
        for tree in ("params", "opt_state"):
            assert_bitwise_equal(getattr(after, tree)[other], getattr(state, tree)[other])
        for collection in state.model_state:
            before = state.model_state[collection].get(other)
            assert_bitwise_equal(after.model_state[collection].get(other), before)


def test_power_iteration_runs_in_the_update_of_the_discriminator_only():
    module = dcgan((8, 8, 1), norm="spectral", **TINY)
    updates, state = problem(adversarial(module, "hinge"), module)
    batch = without(BATCH, "latents")

    @jax.jit
    def steps(state):
        states = [state]
        for update in updates:
            states.append(make_train_step(update)(states[-1], batch)[0])
        return [
            state.model_state["spectral_norm"]["discriminator"]["conv_1"]["right"]
            for state in states
        ]

    initial, after_discriminator, after_generator = steps(state)
    np.testing.assert_array_equal(after_discriminator, after_generator)
    assert not np.allclose(initial, after_discriminator)


@pytest.fixture
def one_fraction(monkeypatch):
    """Interpolate all images at one fraction: executors that split a batch draw other fractions."""
    # The package exports a function of the module's name.
    module = sys.modules["jaxnets.objectives.adversarial"]
    monkeypatch.setattr(module, "mix", lambda real, fake, rng: 0.3 * real + 0.7 * fake)


# name -> (precision -> module, batch, loss, penalties, number of discriminator updates, executors
# that differ)
PROBLEMS = {
    "r3gan": (plain, BATCH, "relativistic", {"r1": 0.1, "r2": 0.1}, 1, set()),
    "wgan_gp": (plain, BATCH, "wasserstein", {"gradient_penalty": 0.1}, 2, set()),
    "dcgan": (
        # Each microbatch has its own batch statistics.
        lambda precision: dcgan((16, 16, 1), norm="batch", precision=precision, **TINY),
        LARGER,
        "non_saturating",
        {},
        1,
        {"microbatched"},
    ),
    "spectral": (
        # Each microbatch updates the singular vectors.
        lambda precision: dcgan((8, 8, 1), norm="spectral", precision=precision, **TINY),
        BATCH,
        "hinge",
        {},
        1,
        {"microbatched"},
    ),
}


def built(name, precision, optimizers=None, seed=0):
    """Return the updates, the state, the batch and the executors that differ."""
    make, batch, loss, penalties, num_discriminator_updates, others = PROBLEMS[name]
    module = make(precision)
    objectives = adversarial(module, loss, **penalties)
    return *problem(objectives, module, optimizers, num_discriminator_updates, seed), batch, others


# After the norms of the tiny dcgan gradients exceed 1, and their rounding exceeds the tolerance.
@pytest.mark.parametrize("name", slow_or_exhaustive(["r3gan", "wgan_gp"], ["r3gan"]))
def test_executors_agree_in_float32_under_momentum(name, one_fraction):
    check_executors(*built(name, Precision()), tolerance=1e-6)


@pytest.mark.slow
def test_executors_that_split_a_batch_draw_different_interpolates():
    updates, state, batch, _ = built("wgan_gp", Precision())
    check_executors(updates, state, batch, {"microbatched", "pmap"}, tolerance=1e-6)


@pytest.mark.parametrize("name", slow_or_exhaustive(PROBLEMS, ["wgan_gp", "dcgan"]))
def test_executors_agree_in_float64_under_adam(name, one_fraction, enable_x64):
    optimizers = (optax.adam(1e-2, b1=0.5), optax.adam(2e-2, b1=0.5))
    updates, state, batch, others = built(name, DOUBLE, optimizers)
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype for x in floats} == {jnp.dtype("float64")}
    check_executors(updates, state, as_double(batch), others, tolerance=1e-10)


def check_executors(updates, state, batch, others, *, tolerance):
    step = make_train_step(updates)
    report = check_equivalence(step, state, batch, num_steps=2, reference="jit")
    expected = {"scan", "pmap", "replicated", "fsdp", "microbatched"}
    assert set(report.differences) == expected, report.skipped
    assert report.num_devices == jax.device_count()
    for name in expected - others:
        assert max(report.differences[name].values()) < tolerance, report.table()
    for name in others:  # An exception that does not differ would be none.
        assert max(report.differences[name].values()) > tolerance


RUNS = [
    pytest.param(name, strategy, marks=[pytest.mark.slow] * slow)
    for name, strategy, slow in [
        *[("spectral", "map", False), ("wgan_gp", "vmap", True), ("spectral", "vmap", True)],
        *[("wgan_gp", "map", True), ("r3gan", "map", True), ("r3gan", "vmap", True)],
    ]
]


@pytest.mark.parametrize(("name", "strategy"), RUNS)
def test_each_member_of_a_population_equals_its_solo_run(name, strategy):
    updates, _, batch, _ = built(name, Precision())
    states = [built(name, Precision(), seed=seed)[1] for seed in (0, 1)]
    check_members(updates, states, batch, strategy, tolerance=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["map", "vmap"])
def test_each_member_with_a_batch_norm_equals_its_solo_run(strategy, enable_x64):
    # In float64, since float32 rounding exceeds the tolerance, see above.
    updates, _, batch, _ = built("dcgan", DOUBLE)
    states = [built("dcgan", DOUBLE, seed=seed)[1] for seed in (0, 1)]
    check_members(updates, states, as_double(batch), strategy, tolerance=1e-10)


def check_members(updates, states, batch, strategy, *, tolerance):
    states = [
        dataclasses.replace(state, rng=jax.random.key(seed)) for seed, state in enumerate(states)
    ]
    batch = without(batch, "latents")
    step = make_train_step(updates)
    population = jit_step(scan_steps(population_step(step, strategy=strategy)))
    members, metrics = population(
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *states),
        jax.tree.map(lambda x: np.stack([x] * 2), batch),
    )
    assert metrics["generator/loss"].count.shape == (2,)
    solo = jit_step(step)
    members = jax.tree.map(np.asarray, dataclasses.replace(members, rng=None))
    for member, state in enumerate(states):
        for _ in range(2):
            state, _ = solo(state, batch)
        for tree in ("params", "model_state", "opt_state"):
            one, stacked = (jax.tree.leaves(getattr(s, tree)) for s in (state, members))
            for single, several in zip(one, stacked, strict=True):
                np.testing.assert_allclose(several[member], single, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "name",
    [
        "spectral",
        *(pytest.param(name, marks=pytest.mark.slow) for name in PROBLEMS if name != "spectral"),
    ],
)
def test_a_run_of_two_optimizers_and_an_average_resumes_bitwise(name, tmp_path):
    optimizers = (optax.adam(1e-3, b1=0.5), with_parameter_average(optax.adam(1e-3), 0.9))
    updates, state, batch, _ = built(name, Precision(), optimizers)
    step = jit_step(make_train_step(updates))

    def source(first):
        for index in range(first, 100):
            rolled = np.roll(batch["inputs"], index, axis=0)
            yield {**without(batch, "latents"), "inputs": rolled}

    whole, _ = fit(step, state, source, num_steps=7)
    fit(step, state, source, num_steps=4, hooks=[Checkpointing(tmp_path, every=4)])
    other = built(name, Precision(), optimizers, seed=3)[1]
    resumed, history = resume(tmp_path, other)
    assert history.step == int(resumed.step) == 4
    resumed, _ = fit(step, resumed, source, num_steps=7, history=history)
    assert_bitwise_equal(resumed, whole)
    average = averaged_parameters(resumed)
    assert jax.tree.structure(average) == jax.tree.structure(resumed.params["generator"])


def test_a_generator_learns_a_point():
    # All real images are equal: the generator has to ignore its latents.
    module = plain()
    objectives = adversarial(module, "relativistic", r1=1.0, r2=1.0)
    updates, state = problem(
        objectives, module, (optax.adam(1e-2, b1=0.0), optax.adam(1e-2, b1=0.0))
    )
    point = np.full((8, 8, 8, 1), 0.6, np.float32)
    batch = {"inputs": point, "labels": BATCH["labels"]}
    run = jit_step(scan_steps(make_train_step(updates)))
    latents = jnp.asarray(RANDOM.normal(size=(8, 5)), jnp.float32)

    @jax.jit
    def distance(variables):
        made = module.apply(variables, latents, BATCH["labels"], method="generate")
        return jnp.mean(jnp.abs(made - 0.6))

    before = distance(state.variables)
    state, _ = run(state, jax.tree.map(lambda x: np.stack([x] * 300), batch))
    assert distance(state.variables) < 0.3 * before


@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (32, 32, 3), (64, 64, 3)])
def test_the_recipe_of_the_page_with_r1_fits_images_of_the_usual_sizes(shape):
    page = pathlib.Path(__file__).parents[3] / "docs/families/gan.md"
    lines = [
        line
        for line in page.read_text().splitlines()
        if line.startswith(("module = jn.dcgan(", "objectives = jn.adversarial("))
    ]
    assert len(lines) == 2 and "(8, 8, 1)" in lines[0] and "r1=" in lines[1]
    names = {"jn": jaxnets}
    exec("\n".join(lines).replace("(8, 8, 1)", str(shape)), names)
    updates = [
        Update(objective, optax.sgd(0.1), wrt=name)
        for name, objective in names["objectives"]._asdict().items()
    ]

    def train(key, images):
        variables = names["module"].init(key, jnp.zeros((1, 16)))
        state = create_train_state(variables, updates, rng=key)
        return make_train_step(updates)(state, {"inputs": images})[1]

    metrics = jax.eval_shape(train, jax.random.key(0), jnp.zeros((2, *shape)))
    assert "discriminator/penalty" in metrics
