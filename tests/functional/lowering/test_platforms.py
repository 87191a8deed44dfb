"""A choice by platform: its values, its derivatives, and what programs contain of it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import mostly_exhaustive, normal
from jax.sharding import NamedSharding, PartitionSpec

from jaxnets import functional
from jaxnets.functional.channels import along_channels
from jaxnets.functional.lowering.platforms import platform_dependent
from jaxnets.training.executors import data_mesh


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def on_cpu_only(x, y):
    return jnp.sin(x) * y**2


def elsewhere(x, y):
    return jnp.tan(x) - y


def chosen(x, y):
    return platform_dependent(x, y, cpu=on_cpu_only, default=elsewhere)


# Functions that contain a choice, and what they compute on CPU.
FUNCTIONS = {
    "plain": (chosen, on_cpu_only),
    "in a jit": (jax.jit(chosen), on_cpu_only),
    "in a checkpoint": (jax.checkpoint(chosen), on_cpu_only),
    "in a choice": (
        lambda x, y: platform_dependent(x, y, cpu=lambda x, y: chosen(x, 2 * y), default=elsewhere),
        lambda x, y: on_cpu_only(x, 2 * y),
    ),
}
TRANSFORMS = {
    "value": lambda f: f,
    "gradients": lambda f: jax.grad(lambda x, y: f(x, y).sum(), (0, 1)),
    "gradient of one": lambda f: jax.grad(lambda x, y: f(x, y).sum(), 1),
    "forward": lambda f: lambda x, y: jax.jvp(lambda x: f(x, y), (x,), (y,))[1],
    "hessian": lambda f: jax.hessian(lambda x, y: f(x, y).sum(), (0, 1)),
    "backwards twice": lambda f: jax.jacrev(jax.jacrev(lambda x, y: f(x, y).sum(), 1), 0),
    "mapped": lambda f: jax.vmap(f),
    "mapped gradient": lambda f: jax.vmap(jax.grad(lambda x, y: f(x, y)[0], (0, 1)), (0, None)),
}
SHAPES = {"mapped gradient": ((4, 3), (3,))}


@pytest.mark.parametrize(
    ("name", "compiled"),
    mostly_exhaustive(
        itertools.product(TRANSFORMS, [False, True]),
        [*((name, True) for name in TRANSFORMS), ("value", False), ("mapped gradient", False)],
    ),
)
def test_every_transform_is_that_of_the_function_for_this_platform(name, compiled, on_cpu):
    transform = TRANSFORMS[name]
    operands = [normal(shape, i) for i, shape in enumerate(SHAPES.get(name, [(4, 3), (4, 3)]))]

    def choices(*operands):
        return [transform(function)(*operands) for function, _ in FUNCTIONS.values()]

    @jax.jit
    def plain(*operands):
        return [transform(function)(*operands) for _, function in FUNCTIONS.values()]

    found = (jax.jit(choices) if compiled else choices)(*operands)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(plain(*operands)), strict=True)
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, rtol=1e-13, atol=1e-13)


def test_a_linear_choice_is_transposed(on_cpu):
    kernel, x = normal((3, 5), 0), normal((3,), 1)

    def apply(kernel, x):
        return platform_dependent(
            kernel, x, cpu=lambda k, x: x @ k, default=lambda k, x: 2 * (x @ k)
        )

    (found,) = jax.linear_transpose(lambda x: apply(kernel, x), x)(normal((5,), 2))
    np.testing.assert_allclose(found, kernel @ normal((5,), 2), rtol=1e-13)


@pytest.mark.lowering
@pytest.mark.parametrize("transform", [lambda f: f, lambda f: jax.grad(lambda x, y: f(x, y).sum())])
def test_a_program_contains_the_function_of_its_platform_and_no_conditional(transform):
    x = normal((4, 3), 0)
    trace = jax.jit(transform(chosen)).trace(x, x)
    texts = {p: trace.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "tpu", "cuda")}
    there = {platform: "tan " in text for platform, text in texts.items()}
    assert there == {"cpu": False, "tpu": True, "cuda": True}
    assert not any("stablehlo.case" in text for text in texts.values())
    # A program for several platforms needs a conditional.
    both = trace.lower(lowering_platforms=("cpu", "tpu")).as_text()
    assert "stablehlo.case" in both
    assert "tan " in both


@pytest.mark.lowering
@pytest.mark.four_devices
def test_no_conditional_contains_an_all_reduce(on_cpu):
    mesh = data_mesh(jax.devices("cpu")[:4])
    everywhere, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))

    def loss(parameters, x):
        kernel, bias, wide = parameters
        y = functional.convolution(x, kernel)
        y = functional.max_pool(jnp.tanh(y + along_channels(bias, y)), 2)
        return jnp.sum(functional.convolution(y, wide) ** 2)

    parameters = normal((3, 3, 2, 8), 0), normal((8,), 1), normal((3, 3, 8, 32), 2)
    gradient = jax.jit(jax.grad(loss), in_shardings=(everywhere, split), out_shardings=everywhere)
    text = gradient.lower(parameters, normal((8, 8, 8, 2), 3)).compile().as_text()
    assert "all-reduce(" in text
    assert "conditional(" not in text


@pytest.mark.four_devices
def test_partitioned_programs_have_a_function_of_their_own(on_cpu):
    def several(x):
        return platform_dependent(
            x, cpu=jnp.sin, default=jnp.cos, partitioned=lambda x: 2 * jnp.tan(x)
        )

    x, mesh = normal((4, 3), 0), data_mesh(jax.devices("cpu")[:4])
    split = NamedSharding(mesh, PartitionSpec("data"))
    jitted = jax.jit(jax.grad(lambda x: several(x).sum()))
    np.testing.assert_allclose(jitted(x), jnp.cos(x), rtol=1e-13)
    expected = 2 / jnp.cos(x) ** 2
    np.testing.assert_allclose(jitted(jax.device_put(x, split)), expected, rtol=1e-13)
    # Not partitioned: each device runs the same program on its own arrays.
    np.testing.assert_allclose(jax.pmap(several)(x), jnp.sin(x), rtol=1e-13)
    mapped = jax.shard_map(several, mesh=mesh, in_specs=split.spec, out_specs=split.spec)
    np.testing.assert_allclose(jax.jit(mapped)(x), jnp.sin(x), rtol=1e-13)
    with pytest.raises(TypeError, match="'partitioned' returns"):
        platform_dependent(x, cpu=jnp.sin, default=jnp.cos, partitioned=jnp.sum)


@pytest.mark.four_devices
def test_it_works_in_a_shard_map_that_checks_replication(on_cpu):
    mesh = data_mesh(jax.devices("cpu")[:4])
    x, y = normal((4, 3), 0), normal((1, 3), 1)

    def gradient(x, y):  # with respect to a replicated array: summed over the devices
        return jax.grad(lambda y: chosen(x, y).sum())(y)

    axes = (PartitionSpec("data"), PartitionSpec())
    per_device = jax.shard_map(gradient, mesh=mesh, in_specs=axes, out_specs=PartitionSpec())
    expected = jax.grad(lambda y: sum(on_cpu_only(row[None], y).sum() for row in x))(y)
    np.testing.assert_allclose(jax.jit(per_device)(x, y), expected, rtol=1e-13)


def test_pytrees_of_arrays(on_cpu):
    x = normal((4, 3), 0)

    def sums(tree, absent):
        assert absent is None
        return {"sum": tree["x"].sum(), "rest": [2 * tree["x"]]}

    def differences(tree, absent):
        return {"sum": -tree["x"].sum(), "rest": [tree["x"]]}

    def both(x):
        return platform_dependent({"x": x**2}, None, cpu=sums, default=differences)

    expected = {"sum": (x**2).sum(), "rest": [2 * x**2]}
    found = both(x)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-13), found, expected)
    gradient = jax.jit(jax.grad(lambda x: both(x)["sum"] + jnp.sum(both(x)["rest"][0] ** 2)))(x)
    np.testing.assert_allclose(gradient, 2 * x + 16 * x**3, rtol=1e-12)
    mapped = jax.vmap(both)(x)
    np.testing.assert_allclose(mapped["sum"], (x**2).sum(1), rtol=1e-13)
    with pytest.raises(TypeError, match="make them alike"):
        platform_dependent(x, cpu=lambda x: [x], default=lambda x: (x,))


def test_functions_with_different_results_are_an_error():
    with pytest.raises(TypeError, match=r"'cpu' returns .*4,3.* the default .*\[3\]"):
        platform_dependent(normal((4, 3), 0), cpu=lambda x: x, default=lambda x: x[0])
