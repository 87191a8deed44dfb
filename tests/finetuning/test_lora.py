"""Adapters of low rank against their formulas, under every executor and in populations."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import assert_trees_near, normal, random_variables

import jaxnets as jn
from jaxnets.finetuning.paths import leaves_by_path
from jaxnets.functional import LowRankKernel

MODULE = jn.MLP(features=(16, 12), num_outputs=3, norm="layer")
BATCH = {
    "inputs": np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32),
    "labels": np.arange(8, dtype=np.int32) % 3,
    "weights": np.array([1, 1, 0.5, 1, 0, 1, 2, 1], np.float32),
}
KEY = jax.random.key(0)
TARGET = r"hidden_\d/kernel$"


@functools.cache
def pretrained():
    return jn.initialize(MODULE, KEY, BATCH["inputs"])["params"]


def update_of(params, optimizer=None, module=MODULE):
    objective = jn.lora_objective(jn.classification(module), params)
    return jn.Update(objective, optimizer or optax.sgd(0.1, momentum=0.9))


def moved(variables, seed=1):
    """Give every factor of an adapter random values, where B starts at zero."""
    random = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda leaf: leaf + jnp.asarray(0.3 * random.normal(size=leaf.shape), leaf.dtype),
        variables["params"],
    )
    return {**variables, "params": params}


def plain(module, params, inputs):
    """Return the outputs of a network without an adapter."""
    return jax.jit(module.apply)({"params": params}, inputs)


def logits(params, variables, module=MODULE, inputs=BATCH["inputs"]):
    """Return the outputs of a network as the objective of an adapter computes them."""

    def outputs(params, model_state, batch, rng, *, train):
        y = module.apply({"params": params}, batch["inputs"])
        return jn.ObjectiveOutput(jn.Mean(y, jnp.ones(())), model_state, {})

    own, state = variables["params"], {"lora": variables["lora"]}
    objective = jn.lora_objective(outputs, params)
    call = jax.jit(functools.partial(objective, rng=KEY, train=False))
    return call(own, state, {"inputs": inputs}).loss.total


@pytest.mark.parametrize("stabilized", [False, True])
def test_merged_kernels_are_those_of_the_formula(stabilized):
    params = pretrained()
    adapter = moved(
        jn.lora_init(KEY, params, rank=4, target=TARGET, alpha=6, rank_stabilized=stabilized)
    )
    merged = jn.merge_lora(params, adapter)
    for name in ("hidden_0", "hidden_1"):
        factors = adapter["params"][name]["kernel"]
        a, b = (np.asarray(factors[key], np.float64) for key in ("lora_a", "lora_b"))
        expected = np.asarray(params[name]["kernel"]) + 6 / (2 if stabilized else 4) * a @ b
        np.testing.assert_allclose(merged[name]["kernel"], expected, rtol=1e-5, atol=1e-6)
    assert all(merged[name] is params[name] for name in ("norm_0", "norm_1", "head"))


def dora_formula(kernel, a, b, magnitude, scale):
    updated = np.asarray(kernel, np.float64) + scale * np.asarray(a) @ np.asarray(b)
    return updated / np.linalg.norm(updated, axis=0) * np.asarray(magnitude)


def test_dora_normalizes_the_columns_and_takes_the_norm_for_a_constant():
    params = pretrained()
    adapter = moved(jn.lora_init(KEY, params, rank=4, target="hidden_0/kernel", alpha=6, dora=True))
    factors = adapter["params"]["hidden_0"]["kernel"]
    kernel = params["hidden_0"]["kernel"]
    merged = jn.merge_lora(params, adapter)["hidden_0"]["kernel"]
    a, b, magnitude = (factors[key] for key in ("lora_a", "lora_b", "magnitude_scale"))
    np.testing.assert_allclose(
        merged, dora_formula(kernel, a, b, magnitude, 1.5), rtol=1e-5, atol=1e-6
    )
    # d/dB of sum(c * W') with the norm held: A^T (c * m / norm).
    c = normal(kernel.shape, 3, np.float32)

    def loss(own):
        variables = {**adapter, "params": {"hidden_0": {"kernel": own}}}
        return jnp.sum(c * jn.merge_lora(params, variables)["hidden_0"]["kernel"])

    gradient = jax.grad(loss)(factors)["lora_b"]
    a = np.asarray(a, np.float64)
    norms = np.linalg.norm(np.asarray(kernel) + 1.5 * a @ np.asarray(b), axis=0)
    expected = 1.5 * a.T @ (np.asarray(c) * np.asarray(magnitude) / norms)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)


def test_a_new_adapter_is_the_identity_bit_for_bit():
    params = pretrained()
    adapter = jn.lora_init(KEY, params, rank=4, target=TARGET, full="head")
    for one, other in zip(
        *map(jax.tree.leaves, (jn.merge_lora(params, adapter), params)), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    before = plain(MODULE, params, BATCH["inputs"])
    np.testing.assert_array_equal(logits(params, adapter), before)
    dora = jn.lora_init(KEY, params, rank=4, target=TARGET, dora=True)
    np.testing.assert_allclose(logits(params, dora), before, rtol=1e-5, atol=1e-6)


def test_a_is_uniform_and_every_target_and_rank_has_its_own():
    params = {name: {"kernel": jnp.zeros((400, 5))} for name in ("one", "two")}
    adapter = jn.lora_init(KEY, params, rank=50, target="kernel")["params"]
    one, two = (np.asarray(adapter[name]["kernel"]["lora_a"]) for name in ("one", "two"))
    assert np.abs(one).max() <= 0.05 and abs(one.std() - 0.05 / 3**0.5) < 1e-3
    assert abs(np.corrcoef(one.ravel(), two.ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(one[:, 0], one[:, 1])[0, 1]) < 0.2
    assert not adapter["one"]["kernel"]["lora_b"].any()


@pytest.mark.parametrize("dora", [False, True])
def test_factors_and_merged_arrays_give_the_same_outputs(dora):
    params = pretrained()
    adapter = moved(jn.lora_init(KEY, params, rank=3, target=TARGET, full="bias|norm", dora=dora))
    expected = plain(MODULE, jn.merge_lora(params, adapter), BATCH["inputs"])
    np.testing.assert_allclose(logits(params, adapter), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_layers_of_a_transformer_in_a_loop_or_not(scan_layers):
    config = jn.BlockConfig(features=8, num_heads=2, scan_layers=scan_layers)
    module = jn.TransformerLM(11, num_layers=2, max_length=6, config=config)
    tokens = np.arange(12).reshape(2, 6) % 11
    params = random_variables(module, tokens)["params"]
    adapter = moved(jax.jit(functools.partial(jn.lora_init, rank=2, dora=True))(KEY, params))
    shapes = {leaf.shape for leaf in jax.tree.leaves(adapter["params"])}
    layers = (2,) if scan_layers else ()
    assert shapes == {(*layers, 8, 2), (*layers, 2, 8), (*layers, 8)}
    merged = plain(module, jax.jit(jn.merge_lora)(params, adapter), tokens)
    np.testing.assert_allclose(logits(params, adapter, module, tokens), merged, atol=1e-4)
    assert np.abs(merged - plain(module, params, tokens)).max() > 1e-3


def test_convolutions_and_layers_of_flax_get_the_merged_kernel():
    module = nn.Sequential([nn.Conv(4, (3, 3)), nn.relu, jn.layers.Convolution(3, 1), nn.Dense(2)])
    images = normal((2, 5, 5, 2), 0, np.float32)
    params = random_variables(module, images)["params"]
    create = functools.partial(jn.lora_init, rank=2, target="kernel", dora=True)
    adapter = moved(jax.jit(create)(KEY, params))
    factors = adapter["params"]["layers_0"]["kernel"]
    assert factors["lora_a"].shape == (3, 3, 2, 2) and factors["lora_b"].shape == (2, 4)
    merged = jax.jit(jn.merge_lora)(params, adapter)
    expected = dora_formula(
        np.reshape(params["layers_0"]["kernel"], (18, 4)),
        np.reshape(factors["lora_a"], (18, 2)),
        factors["lora_b"],
        factors["magnitude_scale"],
        8,
    )
    np.testing.assert_allclose(np.reshape(merged["layers_0"]["kernel"], (18, 4)), expected, 1e-4)
    outputs = plain(module, merged, images)
    np.testing.assert_allclose(logits(params, adapter, module, images), outputs, 1e-4, 1e-5)


def test_unmerging_gives_the_frozen_parameters_back():
    params = pretrained()
    adapter = moved(jn.lora_init(KEY, params, rank=3, target=TARGET))
    assert_trees_near(jn.unmerge_lora(jn.merge_lora(params, adapter), adapter), params, 1e-5)
    for options in ({"full": "head"}, {"dora": True}):
        other = jn.lora_init(KEY, params, rank=3, target=TARGET, **options)
        with pytest.raises(ValueError, match="does not say what was there before"):
            jn.unmerge_lora(params, other)


def test_training_moves_the_adapter_and_leaves_the_frozen_parameters_alone():
    params = jax.tree.map(jnp.copy, pretrained())
    before = jax.tree.map(np.asarray, params)
    adapter = jn.lora_init(KEY, params, rank=2, target=TARGET, full="head|norm")
    start = jax.tree.map(np.array, leaves_by_path(adapter["params"]))
    update = update_of(params, optax.adam(1e-2))
    state = jn.create_train_state(adapter, update, rng=KEY)
    size = sum(leaf.size for leaf in start.values())
    assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state)) == 2 * size + 1
    step = jn.jit_step(jn.make_train_step(update), donate=True)
    for _ in range(4):
        state, _ = step(state, BATCH)
    for path, leaf in leaves_by_path(state.params).items():
        assert np.abs(leaf - start[path]).max() > 1e-4, path
    scale = state.model_state["lora"]["hidden_0"]["kernel"]["scale"]
    np.testing.assert_array_equal(scale, [8, 8])
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_gradients_are_those_of_the_merged_network():
    params = pretrained()
    adapter = moved(jn.lora_init(KEY, params, rank=2, target=TARGET, full="head"))
    update = update_of(params)
    state = jn.create_train_state(adapter, update, rng=KEY)
    gradients = jn.make_train_step(update).gradients(state, BATCH)

    def loss(own):
        merged = jn.merge_lora(params, {**adapter, "params": own})
        output = jn.classification(MODULE)(merged, {}, BATCH, KEY, train=True)
        return output.loss.compute()

    assert_trees_near(gradients, jax.grad(loss)(adapter["params"]), 1e-5)


def test_every_executor_computes_the_same():
    params = pretrained()
    adapter = moved(
        jn.lora_init(KEY, params, rank=2, target=TARGET, full="head", alpha=0.3, dora=True)
    )
    update = update_of(params)
    state = jn.create_train_state(adapter, update, rng=KEY)
    report = jn.check_equivalence(jn.make_train_step(update), state, BATCH, reference="jit")
    assert not report.skipped
    for differences in report.differences.values():
        differences["metrics/loss"] /= BATCH["weights"].sum()
    assert report.largest < 2e-6, report.table()


#: Of each member of a population: key, rank, alpha, learning rate.
MEMBERS = [(0, 4, 16.0, 0.1), (1, 1, 3.0, 0.05), (2, 3, 16.0, 0.2)]


def create(update, params, seed, rank, alpha, rate, *, max_rank):
    adapter = jn.lora_init(
        jax.random.key(seed),
        params,
        rank=rank,
        max_rank=max_rank,
        alpha=alpha,
        target=TARGET,
        full="head",
    )
    state = jn.create_train_state(adapter, update, rng=jax.random.key(seed))
    opt_state = optax.tree.set(state.opt_state, learning_rate=rate)
    return dataclasses.replace(state, opt_state=opt_state)


@pytest.mark.parametrize("strategy", ["vmap", "map"])
def test_members_of_different_ranks_equal_their_solo_runs(strategy):
    params = pretrained()
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1, momentum=0.9)
    update = update_of(params, optimizer)
    make = functools.partial(create, update, params)
    columns = [jnp.asarray(column) for column in zip(*MEMBERS, strict=True)]
    states = jax.vmap(functools.partial(make, max_rank=4))(*columns)
    step = jn.make_train_step(update)
    run = jn.jit_step(jn.population_step(step, strategy=strategy))
    for _ in range(3):
        states, metrics = run(states, BATCH)
    alone = jn.jit_step(step)
    for index, (seed, rank, alpha, rate) in enumerate(MEMBERS):
        # Arrays of its own rank, without padding.
        solo = make(seed, rank, alpha, jnp.asarray(rate), max_rank=rank)
        for _ in range(3):
            solo, own = alone(solo, BATCH)
        member = jax.tree.map(lambda leaf, i=index: leaf[i], states.params)
        kernel, expected = (tree["hidden_0"]["kernel"] for tree in (member, solo.params))
        np.testing.assert_allclose(kernel["lora_a"][:, :rank], expected["lora_a"], atol=1e-6)
        np.testing.assert_allclose(kernel["lora_b"][:rank], expected["lora_b"], atol=1e-6)
        assert not kernel["lora_a"][:, rank:].any() and not kernel["lora_b"][rank:].any()
        assert_trees_near(member["head"], solo.params["head"], 1e-6)
        loss = metrics["loss"].compute()[index]
        np.testing.assert_allclose(loss, own["loss"].compute(), rtol=1e-5)


def test_members_share_one_copy_of_the_frozen_parameters():
    # Wide layers and small adapters: a copy of the kernels for each member would show.
    module = jn.MLP(features=(512, 512), num_outputs=2)
    inputs, members = np.ones((2, 512), np.float32), 16
    params = jn.initialize(module, KEY, inputs)["params"]
    frozen_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    update = update_of(params, optax.adam(1e-3), module)

    def member(key):
        adapter = jn.lora_init(key, params, rank=1, target=TARGET)
        return jn.create_train_state(adapter, update, rng=key)

    states = jax.vmap(member)(jax.random.split(KEY, members))
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(states.params)) < 0.1 * frozen_bytes
    executor = jn.jit_step(jn.population_step(jn.make_train_step(update)))
    batch = {"inputs": inputs, "labels": np.zeros(2, np.int32)}
    memory = executor.func.lower(*executor.args, states, batch).compile().memory_analysis()
    # Once among the arguments of the program, and never among its intermediate arrays.
    assert frozen_bytes < memory.argument_size_in_bytes < 1.5 * frozen_bytes
    assert memory.temp_size_in_bytes < 0.5 * frozen_bytes
    before = sum(leaf.nbytes for leaf in jax.live_arrays())
    states, metrics = executor(states, batch)
    assert metrics["loss"].count.shape == (members,)
    assert sum(leaf.nbytes for leaf in jax.live_arrays()) < before + 0.5 * frozen_bytes


def test_a_resumed_run_is_bitwise_that_without_interruption(tmp_path):
    params = pretrained()
    update = update_of(params, optax.adam(1e-2))
    adapter = jn.lora_init(KEY, params, rank=2, target=TARGET, full="head")
    state = jn.create_train_state(adapter, update, rng=KEY)
    step = jn.jit_step(jn.make_train_step(update))
    batches = jn.data.shuffled_batches(BATCH, 4, seed=0)
    straight, _ = jn.fit(step, state, batches, num_steps=6)
    hooks = [jn.Checkpointing(tmp_path, every=3)]
    jn.fit(step, state, batches, num_steps=3, hooks=hooks)
    resumed, history = jn.resume(tmp_path, state)
    assert int(resumed.step) == 3
    resumed, _ = jn.fit(step, resumed, batches, num_steps=6, history=history)
    for one, other in zip(
        *map(jax.tree.leaves, (resumed.variables, straight.variables)), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_the_summary_counts_what_is_trained():
    params = pretrained()
    adapter = jn.lora_init(KEY, params, rank=2, max_rank=8, target=TARGET, full="head")
    summary = jn.lora_summary(params, adapter)
    low_rank = {"hidden_0/kernel": 2 * (6 + 16), "hidden_1/kernel": 2 * (16 + 12)}
    assert summary.low_rank == low_rank
    assert summary.full == {"head/bias": 3, "head/kernel": 36}
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert summary.total == total and summary.share == (44 + 56 + 39) / total
    dora = jn.lora_init(KEY, params, rank=2, target="hidden_0/kernel", dora=True)
    assert jn.lora_summary(params, dora).trained == 44 + 16


def test_int8_parameters_below_an_adapter():
    params = pretrained()
    adapter = moved(jn.lora_init(KEY, params, rank=2, target=TARGET, full="head"))
    small = jn.quantize_int8(params, target=TARGET)
    floats = jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32),
        small,
        is_leaf=lambda node: isinstance(node, jn.functional.Int8Array),
    )
    expected = logits(floats, adapter)
    np.testing.assert_allclose(logits(small, adapter), expected, rtol=1e-5, atol=1e-6)
    steps = [jn.make_train_step(update_of(each)) for each in (small, floats)]
    state = jn.create_train_state(adapter, steps[0].updates[0], rng=KEY)
    assert_trees_near(*(jax.jit(step.gradients)(state, BATCH) for step in steps), 1e-5)
    report = jn.check_equivalence(steps[0], state, BATCH, reference="jit")
    assert not report.skipped and report.largest < 1e-4, report.table()
    again = jn.lora_init(KEY, small, rank=2, target=TARGET)
    assert jn.lora_summary(small, again).total == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_bfloat16_parameters_get_an_adapter_of_float32():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), pretrained())
    adapter = moved(jn.lora_init(KEY, params, rank=2, target=TARGET))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(adapter)} == {"float32"}
    assert jn.merge_lora(params, adapter)["hidden_0"]["kernel"].dtype == jnp.bfloat16


def test_small_updates_of_bfloat16_convolutions_are_not_rounded_away():
    module, images = jn.layers.Convolution(3), normal((2, 5, 5, 2), 0, np.float32)
    wide = module.init(KEY, images)["params"]
    params = {**wide, "kernel": jnp.round(64 * wide["kernel"]).astype(jnp.bfloat16) / 64}
    adapter = jn.lora_init(KEY, params, rank=2, target="kernel")
    step = 2.0**-14  # of updates, far below that of the kernel's bfloat16
    adapter["params"]["kernel"]["lora_b"] += step
    update = 8 * step * jnp.sum(adapter["params"]["kernel"]["lora_a"], axis=-1, keepdims=True)
    exact = {**wide, "kernel": params["kernel"].astype(jnp.float32) + update}
    expected = plain(module, exact, images)
    np.testing.assert_allclose(logits(params, adapter, module, images), expected, atol=1e-5)
    assert np.abs(expected - plain(module, params, images)).max() > 5e-4


def test_a_low_rank_kernel_is_an_array_for_other_layers():
    base, a, b = (normal(s, 0, np.float32) for s in ((4, 6), (4, 2), (2, 6)))
    kernel = LowRankKernel(base, a, b, jnp.array([2.0, 0.0], a.dtype))
    expected = base + 2 * a[:, :1] @ b[:1]
    np.testing.assert_allclose(jnp.asarray(kernel), expected, rtol=1e-5)
    np.testing.assert_allclose(kernel.T, expected.T, rtol=1e-5)
    assert (kernel.shape, kernel.ndim) == ((4, 6), 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "hiden_0/kernel"}, r"matches no path; the nearest of 8 are hidden_0/kernel"),
        ({"target": "("}, "no regular expression"),
        ({"target": "bias"}, "is no matrix; train it as a whole, by full='head/bias'"),
        ({"target": TARGET, "full": "hidden_0"}, "both match hidden_0/kernel"),
        ({"target": TARGET, "rank": 0}, "max_rank=0"),
        ({"target": TARGET, "rank": 5, "max_rank": 4}, "rank is 5; give 1 to max_rank, 4"),
        ({"target": None}, "nothing would be trained"),
    ],
)
def test_bad_adapters_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        jn.lora_init(KEY, pretrained(), **options)


def test_variables_that_do_not_fit_are_refused():
    params = pretrained()
    adapter = jn.lora_init(KEY, params, rank=2, target=TARGET)
    with pytest.raises(ValueError, match="no 'lora'; give those of lora_init"):
        jn.merge_lora(params, {"params": adapter["params"]})
    with pytest.raises(ValueError, match="the adapter has hidden_1, which the frozen"):
        jn.merge_lora({"hidden_0": params["hidden_0"]}, adapter)
    other = jn.initialize(MODULE, KEY, np.ones((1, 7), np.float32))["params"]
    with pytest.raises(ValueError, match=r"hidden_0/kernel .* fit a kernel of shape \(7, "):
        jn.merge_lora(other, adapter)
    with pytest.raises(ValueError, match="give max_rank"):
        jax.jit(lambda rank: jn.lora_init(KEY, params, rank=rank, target=TARGET))(2)
    with pytest.raises(TypeError, match="rng is 0"):
        jn.lora_init(0, params, target=TARGET)
