"""Masks, parameter averages, and optimizers of parameters of 16 bits."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxnets as jn
from jaxnets.core import Mean, ObjectiveOutput, Precision, TrainState, Update
from jaxnets.training.diagnostics import find_learning_rate
from jaxnets.training.equivalence import check_equivalence
from jaxnets.training.executors import jit_step, scan_steps
from jaxnets.training.optimizers import averaged_parameters, decay_mask, with_parameter_average
from jaxnets.training.step import create_train_state, make_eval_step, make_train_step

HALF = (jnp.bfloat16, jnp.float16)


def test_parameter_average_follows_its_formula():
    optimizer = with_parameter_average(optax.sgd(1.0), decay=0.5)
    params = {"w": jnp.array(0.0)}
    opt_state, average = optimizer.init(params), 0.0
    for t in range(5):
        changes, opt_state = optimizer.update({"w": jnp.array(-1.0)}, opt_state, params)
        params = optax.apply_updates(params, changes)
        decay = min(0.5, (1 + t) / (10 + t))
        average = decay * average + (1 - decay) * (t + 1)
    state = TrainState(jnp.zeros(()), jax.random.key(0), params, {}, opt_state)
    np.testing.assert_allclose(averaged_parameters(state)["w"], average, rtol=1e-6)
    with pytest.raises(ValueError, match="0 parameter averages"):
        averaged_parameters(dataclasses.replace(state, opt_state=()))
    with pytest.raises(ValueError, match="decay is 1"):
        with_parameter_average(optax.sgd(1.0), decay=1.0)


def test_weight_decay_spares_biases_and_norms():
    optimizer = optax.adamw(1.0, weight_decay=0.1, mask=decay_mask)
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "scale": jnp.ones(2)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    changes, _ = optimizer.update(zeros, optimizer.init(params), params)
    np.testing.assert_allclose(changes["kernel"], -0.1, rtol=1e-6)
    assert not changes["bias"].any() and not changes["scale"].any()


def test_layers_in_a_loop_are_decayed_like_the_same_layers_outside():
    tokens = jnp.zeros((1, 4), jnp.int32)

    def params(**fields):
        config = jn.BlockConfig(features=8, num_heads=2, key_bias=True, **fields)
        module = jn.TransformerLM(5, num_layers=2, config=config, max_length=4)
        return jax.eval_shape(lambda: module.init(jax.random.key(0), tokens)["params"])

    ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), params(scan_layers=True))
    mask = decay_mask(ones)
    expected = jn.transformer.stack_layers(jax.tree.map(np.asarray, decay_mask(params())))
    jax.tree.map(
        lambda one, of_layers: np.testing.assert_array_equal(of_layers, one), mask, expected
    )
    assert any(jax.tree.leaves(mask["stack"])) and not all(jax.tree.leaves(mask["stack"]))

    @jax.jit
    def train(ones):
        optimizer = optax.adamw(1e-2, weight_decay=0.5, mask=decay_mask)
        zeros = jax.tree.map(jnp.zeros_like, ones)

        def body(carry, _):
            changes, state = optimizer.update(zeros, carry[1], carry[0])
            return (optax.apply_updates(carry[0], changes), state), None

        return jax.lax.scan(body, (ones, optimizer.init(ones)), None, length=50)[0][0]

    def check(decays, array):
        np.testing.assert_allclose(array, 0.995**50 if decays else 1.0, rtol=1e-5)

    jax.tree.map(check, mask, train(ones))


def test_biases_of_heads_boxes_and_attributes_are_known_by_their_names():
    class Attention(nn.Module):
        @nn.compact
        def __call__(self, x):
            boxed = nn.with_partitioning(nn.initializers.zeros, ("rows",))
            x = nn.Dense(4, bias_init=boxed, name="boxed")(x)
            several = nn.vmap(
                nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=3
            )
            x = several(4, name="several")(jnp.stack([x] * 3))
            return nn.MultiHeadDotProductAttention(2, name="attention")(x[0])

    shapes = jax.eval_shape(Attention().init, jax.random.key(0), jnp.ones((1, 5, 4)))["params"]
    paths = {
        jax.tree_util.keystr(path): decays
        for path, decays in jax.tree_util.tree_flatten_with_path(decay_mask(shapes))[0]
    }
    assert len(paths) == 12
    for path, decays in paths.items():
        assert decays == ("kernel" in path), path
    muon = jax.tree_util.tree_flatten_with_path(jn.muon_dimensions(shapes["several"]))[0]
    assert muon == []  # a kernel for each of three layers is left to AdamW


@pytest.mark.parametrize("dtype", HALF)
def test_the_average_of_narrow_parameters_follows_a_jump(dtype):
    optimizer = with_parameter_average(optax.sgd(0.0), decay=0.999)
    before, after = {"w": jnp.ones((), dtype)}, {"w": jnp.full((), 2, dtype)}
    start = optimizer.init(before)._replace(num_updates=jnp.int32(10_000))

    @jax.jit
    def train(state):
        def body(state, _):
            return optimizer.update(jax.tree.map(jnp.zeros_like, after), state, after)[1], None

        return jax.lax.scan(body, state, None, length=5_000)[0]

    state = TrainState(jnp.zeros(()), jax.random.key(0), after, {}, train(start))
    average = averaged_parameters(state)["w"]
    assert average.dtype == jnp.float32
    np.testing.assert_allclose(average, 2 - 0.999**5000, rtol=1e-4)  # 1.9933


def linear_loss(params, model_state, batch, rng, *, train):
    """Sums of w x, narrow if the parameter is."""
    values = params["w"] * batch["inputs"].astype(params["w"].dtype)
    loss = Mean(jnp.sum(values), jnp.asarray(values.size, values.dtype))
    return ObjectiveOutput(loss, model_state, {"again": loss})


@pytest.mark.parametrize("dtype", HALF)
def test_narrow_sums_of_many_microbatches_and_steps_are_exact(dtype):
    update = Update(linear_loss, optax.sgd(0.5))
    state = create_train_state(
        {"params": {"w": jnp.ones((), dtype)}}, update, rng=jax.random.key(0)
    )
    batch = {"inputs": jnp.ones(1024)}
    for parts in (1, 1024):
        step = jit_step(make_train_step(update, num_microbatches=parts))
        after, metrics = step(state, batch)
        assert after.params["w"] == 0.5 and after.params["w"].dtype == dtype
        assert metrics["again"].count == 1024 and metrics["loss"].compute() == 1
        assert make_train_step(update).gradients(state, batch)["w"] == 1
    still = Update(linear_loss, optax.sgd(0.0))
    steps = jit_step(scan_steps(make_train_step(still)))
    _, metrics = steps(state, {"inputs": jnp.ones((1024, 1))})
    assert metrics["loss"].total == metrics["again"].count == 1024
    assert make_eval_step(linear_loss)(state, batch)["loss"].total.dtype == jnp.float32


def test_a_float16_gradient_is_divided_by_counts_that_float16_does_not_have():
    def objective(params, model_state, batch, rng, *, train):
        loss = Mean(params["w"].astype(jnp.float32) * 6e4, jnp.float32(1e8))
        return ObjectiveOutput(loss, model_state, {})

    update = Update(objective, optax.sgd(100.0))
    variables = {"params": {"w": jnp.ones((), jnp.float16)}}
    state = create_train_state(variables, update, rng=jax.random.key(0))
    state, _ = make_train_step(update)(state, {})
    np.testing.assert_allclose(state.params["w"], 1 - 100 * 6e4 / 1e8, rtol=1e-3)


def test_an_optimizer_state_of_16_bits_is_warned_of_by_name():
    variables = {"params": {"w": jnp.ones(3, jnp.bfloat16)}}
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    with pytest.warns(UserWarning, match="ScaleByAdamState.mu, ScaleByAdamState.nu in 16 bits"):
        create_train_state(variables, Update(linear_loss, adam), rng=jax.random.key(0))
    momentum = optax.partition({"m": optax.sgd(0.1, momentum=0.9)}, {"w": "m"})
    with pytest.warns(UserWarning, match="TraceState.trace in 16 bits.*float32_masters=True"):
        create_train_state(
            {"params": {"net": variables["params"]}},
            Update(linear_loss, momentum, wrt="net"),
            rng=jax.random.key(0),
        )
    # Asked for, or not there: no warning.
    wide = {"params": {"w": jnp.ones(3)}}
    create_train_state(
        wide, Update(linear_loss, optax.adam(1e-3, mu_dtype=jnp.bfloat16)), rng=jax.random.key(0)
    )
    create_train_state(variables, Update(linear_loss, optax.sgd(0.1)), rng=jax.random.key(0))
    create_train_state(
        variables, Update(linear_loss, adam, float32_masters=True), rng=jax.random.key(0)
    )


def sum_loss(params, model_state, batch, rng, *, train):
    loss = Mean.of(jnp.broadcast_to(jnp.sum(params["w"].astype(jnp.float32)), len(batch["inputs"])))
    return ObjectiveOutput(loss, model_state, {})


@pytest.mark.parametrize("dtype", HALF)
def test_float32_masters_add_up_updates_below_the_spacing_of_the_parameters(dtype):
    variables = {"params": {"w": jnp.ones((), dtype)}}
    batches = {"inputs": jnp.ones((1000, 1))}
    for masters, expected in ((False, 1.0), (True, 0.9)):
        update = Update(sum_loss, optax.sgd(1e-4), float32_masters=masters)
        state = create_train_state(variables, update, rng=jax.random.key(0))
        state, _ = jit_step(scan_steps(make_train_step(update)), donate=True)(state, batches)
        assert state.params["w"].dtype == dtype
        np.testing.assert_allclose(state.params["w"], expected, rtol=2e-3)
        variables = {"params": {"w": jnp.ones((), dtype)}}
    np.testing.assert_allclose(state.opt_state.masters["w"], 0.9, rtol=1e-4)


def test_float32_masters_clip_a_norm_that_float16_does_not_have():
    def objective(params, model_state, batch, rng, *, train):
        loss = Mean.of(100 * jnp.sum(params["w"].astype(jnp.float32))[None])
        return ObjectiveOutput(loss, model_state, {})

    variables = {"params": {"w": jnp.ones(10_000, jnp.float16)}}
    update = Update(
        objective,
        optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)),
        float32_masters=True,
    )
    state = create_train_state(variables, update, rng=jax.random.key(0))
    state, _ = jit_step(make_train_step(update))(state, {})
    np.testing.assert_allclose(state.params["w"], 0.99, rtol=1e-3)


def test_float32_masters_follow_parameters_that_are_set_from_outside():
    update = Update(sum_loss, optax.sgd(0.25), float32_masters=True)
    variables = {"params": {"w": jnp.ones(2, jnp.bfloat16)}}
    state = create_train_state(variables, update, rng=jax.random.key(0))
    state = dataclasses.replace(state, params={"w": jnp.array([5.0, 1.0], jnp.bfloat16)})
    state, _ = make_train_step(update)(state, {"inputs": jnp.ones(1)})
    assert state.params["w"].tolist() == [4.75, 0.75]


def test_float32_masters_are_equal_under_every_executor():
    class Linear(nn.Module):
        @nn.compact
        def __call__(self, inputs, *, train=False):
            return inputs @ self.param("kernel", nn.initializers.ones, (2, 1), jnp.bfloat16)

    # Small whole numbers and halves, whose products and sums bfloat16 has.
    inputs = np.array([[1, 0], [0, 1], [1, 1], [2, 0]] * 2, np.float32)
    batch = {"inputs": inputs, "labels": inputs[:, :1] - 1}
    update = Update(
        jn.regression(Linear()),
        with_parameter_average(optax.sgd(2**-10), 0.9),
        float32_masters=True,
    )
    variables = Linear().init(jax.random.key(0), inputs)
    state = create_train_state(variables, update, rng=jax.random.key(0))
    report = check_equivalence(make_train_step(update), state, batch, num_steps=1)
    assert set(report.differences) == {"jit", "scan", "pmap", "replicated", "fsdp", "microbatched"}
    assert report.largest < 1e-6, report
    assert averaged_parameters(state)["kernel"].dtype == jnp.float32


@pytest.mark.parametrize("dtype", HALF)
def test_the_learning_rate_of_narrow_parameters_is_found_with_adam(dtype):
    batch = {"inputs": jnp.ones((4, 2)), "labels": jnp.zeros((4, 1))}

    class Linear(nn.Module):
        @nn.compact
        def __call__(self, inputs, *, train=False):
            return inputs.astype(dtype) @ self.param("w", nn.initializers.ones, (2, 1), dtype)

    with pytest.warns(UserWarning, match="ScaleByAdamState.nu"):
        search = find_learning_rate(
            jn.regression(Linear()),
            optax.adam,
            Linear().init(jax.random.key(0), batch["inputs"]),
            lambda first: iter([batch] * 30),
            rng=jax.random.key(0),
            learning_rates=[1e-3, 1e-1],
            num_steps=30,
        )
    assert np.isfinite(search.losses).all() and search.best == 0.1


def test_statistics_and_codebooks_of_narrow_parameters_stay_in_float32():
    narrow = Precision(parameter=jnp.bfloat16, compute=jnp.bfloat16, output=jnp.bfloat16)
    images = jnp.zeros((2, 8, 8, 1))
    norm = jn.ConvNet(features=(4,), norm="batch", precision=narrow)
    coder = jn.VQVAE(
        jn.EncoderDecoderConfig((8, 8, 1), "convolutional", features=(4,)),
        codebook_size=4,
        embedding_size=2,
        precision=narrow,
    )
    for module in (norm, coder):
        variables = jax.eval_shape(module.init, jax.random.key(0), images)
        assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(variables.pop("params")))
        assert jax.tree.leaves(variables)
        for leaf in jax.tree.leaves(variables):
            assert leaf.dtype == jnp.float32
