"""Checks that every network has to pass, whatever its family, and what they are made with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets.core import Precision, tree_path

DOUBLE = Precision(jnp.float64, jnp.float64, jnp.float64)


def mostly_slow(cases, kept, mark=pytest.mark.slow):
    """Return the cases of a test, of which all but those kept belong to the slow group."""
    cases, kept = list(cases), list(kept)
    assert all(case in cases for case in kept)
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else [case]), marks=[mark] * (case not in kept)
        )
        for case in cases
    ]


def mostly_exhaustive(cases, kept):
    """Return the cases of a test, of which all but those kept belong to the exhaustive group."""
    return mostly_slow(cases, kept, pytest.mark.exhaustive)


def slow_or_exhaustive(cases, slow):
    """Return the cases of a test: those given are slow, all others exhaustive."""
    assert all(case in cases for case in slow)
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else [case]),
            marks=pytest.mark.slow if case in slow else pytest.mark.exhaustive,
        )
        for case in cases
    ]


def normal(shape, seed, dtype=np.float64):
    """Draw an array from the normal distribution."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def loss_and_gradients(function, *operands):
    """Return the value of `function` and the gradients of a sum that is not linear in it."""

    @jax.jit
    def both(*operands):
        value, pull = jax.vjp(function, *operands)
        return value, pull(jnp.cos(value) + 0.5)

    return both(*operands)


def shapes_of(module, *inputs):
    """Return the variables and the output of a network as shapes, allocating nothing."""

    def initialize(key, *inputs):
        return module.init_with_output(key, *inputs)

    output, variables = jax.eval_shape(initialize, jax.random.key(0), *inputs)
    return variables, output


def count_parameters(variables):
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def check_preset(module, input_shape, *, num_parameters, output_shape, dtype=jnp.float32):
    """Check the number of parameters and the output shape of a network of full size."""
    variables, output = shapes_of(module, jax.ShapeDtypeStruct(input_shape, dtype))
    assert output.shape == output_shape
    assert count_parameters(variables) == num_parameters


def check_module(module, *inputs, num_parameters, streams=("dropout",), tolerance=1e-5):
    """Check what must hold for every network.

    The number of parameters is the golden one; jit = eager, and a batch = its examples one by one;
    in training every parameter has a finite and non-zero gradient; evaluation is deterministic;
    with bfloat16 arithmetic parameters stay float32; in double precision nothing falls back to
    single; and two calls are traced once.

    Args:
        module: the network, with a field `precision` and a keyword `train`. Take a tiny one.
        inputs: its inputs, each with a leading batch axis of at least 2.
        num_parameters: the golden number of parameters.
        streams: random streams that training needs.
        tolerance: greatest difference of two programs, relative to the largest output.
    """
    variables = random_variables(module, *inputs)
    assert count_parameters(variables) == num_parameters
    batched = check_evaluation(module, variables, inputs)
    check_eager_examples(module, variables, inputs, batched, tolerance)
    check_gradients(module, variables, inputs, streams)
    check_precision(module, inputs, streams)


def random_variables(module, *inputs):
    """Return the initial state and random parameters, whose initializers are not compiled.

    No parameter is 0 or 1: a scale that starts at zero would hide what comes before it.
    """
    shapes, _ = shapes_of(module, *inputs)
    random = np.random.default_rng(0)

    def parameter(path, leaf):
        noise = random.normal(size=leaf.shape)
        if len(leaf.shape) > 1:  # of variance 1 / fan-in, so that activations keep their scale
            return jnp.asarray(noise / np.sqrt(leaf.size / leaf.shape[-1]), leaf.dtype)
        return jnp.asarray((path[-1].key == "scale") + 0.1 * noise, leaf.dtype)

    params = jax.tree_util.tree_map_with_path(parameter, shapes["params"])
    if len(shapes) == 1:
        return {"params": params}

    @jax.jit
    def initial_state(key):
        variables = module.init(key, *inputs)
        return {name: value for name, value in variables.items() if name != "params"}

    return {**initial_state(jax.random.key(0)), "params": params}


def assert_trees_near(actual, expected, tolerance=1e-5):
    """Check that two trees of one structure hold equal arrays, up to rounding."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
        actual,
        expected,
    )


def perturbed(variables, scale=0.1):
    """Add noise to the parameters: a scale that starts at zero would hide what comes before it."""
    random = np.random.default_rng(0)

    def moved(leaf):
        noise = scale * random.normal(size=leaf.shape)
        return jnp.asarray(np.asarray(leaf) + noise, leaf.dtype)

    return {**variables, "params": jax.tree.map(moved, variables["params"])}


def check_evaluation(module, variables, inputs):
    traces = []

    @jax.jit
    def evaluate(variables, *inputs):
        traces.append(None)
        return module.apply(variables, *inputs, train=False)

    first, second = evaluate(variables, *inputs), evaluate(variables, *inputs)
    assert len(traces) == 1, "the second call was traced again"
    for once, again in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(once, again)
        assert np.isfinite(once).all()
    return first


def check_eager_examples(module, variables, inputs, batched, tolerance):
    """Check that each example alone, computed operation by operation, has its compiled output."""
    for index in range(len(jax.tree.leaves(inputs)[0])):
        example = jax.tree.map(lambda x, i=index: np.asarray(x)[i : i + 1], inputs)
        single = module.apply(variables, *example)
        expected = jax.tree.map(lambda y, i=index: np.asarray(y)[i : i + 1], batched)
        assert_close(single, expected, tolerance)


def training_loss(module, inputs, streams):
    """Return a function of variables and key that sums the output with random weights."""

    def loss(params, state, key):
        rngs = {name: jax.random.fold_in(key, i) for i, name in enumerate(streams)}
        variables = {"params": params, **state}
        output, changed = module.apply(
            variables, *inputs, train=True, rngs=rngs, mutable=list(state)
        )
        random = np.random.default_rng(0)
        floating = [y for y in jax.tree.leaves(output) if jnp.issubdtype(y.dtype, jnp.floating)]
        total = sum(
            jnp.vdot(jnp.asarray(random.normal(size=y.shape), y.dtype), y) for y in floating
        )
        return total, changed

    return loss


def check_gradients(module, variables, inputs, streams):
    params = variables["params"]
    state = {name: value for name, value in variables.items() if name != "params"}
    loss = training_loss(module, inputs, streams)
    key = jax.random.key(1, impl="unsafe_rbg")  # compiles faster than the default
    gradient, changed = jax.jit(jax.grad(loss, has_aux=True))(params, state, key)
    assert jax.tree.map(jnp.shape, changed) == jax.tree.map(jnp.shape, state)
    for path, leaf in jax.tree_util.tree_flatten_with_path(gradient)[0]:
        assert np.isfinite(leaf).all(), f"the gradient of {tree_path(path)} is not finite"
        assert np.any(leaf), f"the gradient of {tree_path(path)} is zero"


def check_precision(module, inputs, streams):
    half = module.clone(precision=Precision(compute=jnp.bfloat16))
    program, (output, variables) = jax.make_jaxpr(half.init_with_output, return_shape=True)(
        jax.random.key(0), *inputs
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    floating = [
        leaf for leaf in jax.tree.leaves(output) if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    assert {leaf.dtype for leaf in floating} == {jnp.dtype(jnp.float32)}
    assert "bf16[" in str(program), "nothing is computed in bfloat16"
    with jax.enable_x64(True):
        double = module.clone(precision=DOUBLE)
        wide = jax.tree.map(as_double, inputs)
        variables, _ = shapes_of(double, *wide)
        params = variables.pop("params")
        loss = training_loss(double, wide, streams)
        program = str(
            jax.make_jaxpr(jax.grad(loss, has_aux=True))(params, variables, jax.random.key(0))
        )
        assert "f32[" not in program, "float32 inside a network of double precision"


def as_double(array):
    array = np.asarray(array)
    return array.astype(np.float64) if np.issubdtype(array.dtype, np.floating) else array


def assert_close(actual, expected, tolerance):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        scale = max(1.0, float(np.max(np.abs(b))))
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)
