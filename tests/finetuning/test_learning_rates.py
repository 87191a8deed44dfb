"""Frozen leaves, and learning rates per depth."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import assert_trees_near

import jaxnets as jn
from jaxnets.finetuning.paths import leaves_by_path

MODULE = jn.MLP(features=(64, 64), num_outputs=3, norm="batch")
BATCH = {
    "inputs": np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32),
    "labels": np.arange(8, dtype=np.int32) % 3,
}
KEY = jax.random.key(0)


def problem(optimizer, module=MODULE):
    update = jn.Update(jn.classification(module), optimizer)
    state = jn.create_train_state(jn.initialize(MODULE, KEY, BATCH["inputs"]), update, rng=KEY)
    return update, state


def test_frozen_leaves_stay_bitwise_and_the_others_move():
    # Decay and clipping see the trained leaves only.
    optimizer = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2, weight_decay=0.5))
    update, state = problem(jn.freeze(optimizer, "^(hidden_0|norm_0)/"))
    step = jn.jit_step(jn.make_train_step(update))
    after, _ = step(state, BATCH)
    for path, leaf in leaves_by_path(after.params).items():
        before = leaves_by_path(state.params)[path]
        assert np.array_equal(leaf, before) == path.startswith(("hidden_0", "norm_0")), path


def test_frozen_leaves_cost_no_state_and_no_gradient():
    _, state = problem(jn.freeze(optax.adam(1e-2), "hidden|norm"))
    head = sum(leaf.size for leaf in jax.tree.leaves(state.params["head"]))
    assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state)) == 2 * head + 1

    def flops(optimizer):
        update, state = problem(optimizer)
        executor = jn.jit_step(jn.make_train_step(update))
        compiled = executor.func.lower(*executor.args, state, BATCH).compile()
        return compiled.cost_analysis()["flops"]

    forward = 2 * 8 * (6 * 64 + 64 * 64)  # multiplications and additions of the frozen kernels
    # Without the two matmuls of the backward pass.
    assert flops(jn.freeze(optax.sgd(0.1), "hidden|norm")) < 2 * forward
    assert flops(optax.sgd(0.1)) > 2.5 * forward


def test_the_members_of_a_population_equal_their_solo_runs_with_frozen_leaves():
    frozen = jn.freeze(
        optax.inject_hyperparams(optax.sgd)(learning_rate=0.1), "^(hidden_0|norm_0)/"
    )
    update, state = problem(frozen)

    def create(rate):
        return dataclasses.replace(
            state, opt_state=optax.tree.set(state.opt_state, learning_rate=rate)
        )

    step = jn.make_train_step(update)
    rates = jnp.array([0.1, 0.3])
    states, _ = jn.jit_step(jn.population_step(step))(jax.vmap(create)(rates), BATCH)
    solo, _ = jn.jit_step(step)(create(rates[1]), BATCH)
    assert_trees_near(jax.tree.map(lambda leaf: leaf[1], states.params), solo.params, 1e-6)


def test_patterns_that_match_nothing_or_all_are_refused():
    with pytest.raises(ValueError, match=r"pattern='hiden_0/kernel' matches no path.* hidden_0/k"):
        problem(jn.freeze(optax.sgd(0.1), "hiden_0/kernel"))
    with pytest.raises(ValueError, match="matches every path, so nothing would be trained"):
        problem(jn.freeze(optax.sgd(0.1), "."))


def test_the_rate_of_each_layer_is_decay_to_the_number_of_layers_above_it():
    ones = {"kernel": jnp.ones((2, 2))}
    params = {
        "token_embedding": ones,
        "stack": {"layer_0": ones, "layer_1": ones, "layer_10": ones, "norm": jnp.ones(2)},
        "head": ones,
    }
    optimizer = jn.layerwise_decay(optax.sgd(1.0), 0.5)
    changes, _ = optimizer.update(params, optimizer.init(params), params)
    found = {path: -float(leaf.ravel()[0]) for path, leaf in leaves_by_path(changes).items()}
    assert found == {
        "token_embedding/kernel": 1 / 16,
        "stack/layer_0/kernel": 1 / 8,
        "stack/layer_1/kernel": 1 / 4,
        "stack/layer_10/kernel": 1 / 2,
        "stack/norm": 1,
        "head/kernel": 1,
    }


def test_patches_and_tokens_are_the_first_layer():
    config = jn.transformer.BlockConfig(features=4, num_heads=1)
    module = jn.VisionTransformer(patch_size=4, num_layers=2, config=config, distillation="head")
    params = jn.initialize(module, KEY, jnp.zeros((1, 8, 8, 1)))["params"]
    optimizer = jn.layerwise_decay(optax.sgd(1.0), 0.5)
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(ones, optimizer.init(params), params)
    first = {p for p, x in leaves_by_path(updates).items() if np.allclose(x, -(0.5**3))}
    assert {path.split("/")[0] for path in first} == {
        "patch",
        "token",
        "distillation_token",
        "position",
    }


def test_layers_in_a_loop_get_the_rates_of_layers_one_by_one():
    layer = {"kernel": jnp.ones((2, 2)), "scale": jnp.ones(2)}
    single = {"embedding": jnp.ones(2), **{f"layer_{i}": layer for i in range(3)}, "head": layer}
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), layer)
    looped = {"embedding": jnp.ones(2), "layers": stack, "head": layer}
    optimizer = jn.layerwise_decay(optax.adamw(0.1, weight_decay=0.1), 0.7)
    results = []
    for params in (single, looped):
        changes, _ = optimizer.update(params, optimizer.init(params), params)
        results.append(optax.apply_updates(params, changes))
    for index in range(3):
        own = jax.tree.map(lambda leaf, i=index: leaf[i], results[1]["layers"])
        assert_trees_near(own, results[0][f"layer_{index}"], 1e-7)
    assert_trees_near(results[1]["embedding"], results[0]["embedding"], 1e-7)


def test_layers_of_a_residual_network_are_ordered_by_their_numbers():
    params = {
        "stem": {"kernel": jnp.ones(1)},
        "stage_0": {"block_0": jnp.ones(1), "block_1": jnp.ones(1)},
        "stage_1": {"block_0": jnp.ones(1)},
        "head": jnp.ones(1),
    }
    order = ("stem", r"stage_(\d+)/block_(\d+)", "head")
    optimizer = jn.layerwise_decay(optax.sgd(1.0), 0.1, order=order)
    changes, _ = optimizer.update(params, optimizer.init(params), params)
    found = [round(-float(leaf[0]), 5) for _, leaf in sorted(leaves_by_path(changes).items())]
    assert found == [1, 1e-3, 1e-2, 1e-1, 1e-4]
    with pytest.raises(ValueError, match="head matches none of the patterns of order"):
        jn.layerwise_decay(optax.sgd(1.0), 0.1, order=order[:2]).init(params)
    with pytest.raises(ValueError, match=r"decay is 1\.5"):
        jn.layerwise_decay(optax.sgd(1.0), 1.5)
    with pytest.raises(ValueError, match=r"order='stages_.* matches no path; .* stage_0/block_0"):
        wrong = ("stem", r"stages_(\d+)/block_(\d+)", "")
        jn.layerwise_decay(optax.sgd(1.0), 0.1, order=wrong).init(params)
    # Leaves that are frozen are there, though the optimizer does not get them.
    jn.freeze(optimizer, "stem").init(params)


def test_frozen_batch_norms_keep_their_statistics_and_normalize_by_them():
    frozen = jn.layers.frozen_batch_norm(MODULE, "norm_0")
    update, state = problem(optax.sgd(0.1), frozen)
    random = np.random.default_rng(1)
    statistics = jax.tree.map(
        lambda leaf: leaf + jnp.asarray(random.uniform(size=leaf.shape), leaf.dtype),
        state.model_state,
    )
    state = dataclasses.replace(state, model_state=statistics)
    batch = {**BATCH, "weights": np.array([1, 1, 1, 1, 1, 1, 0, 0], np.float32)}
    after, _ = jn.jit_step(jn.make_train_step(update))(state, batch)
    moved = after.model_state["batch_stats"]
    assert_trees_near(moved["norm_0"], statistics["batch_stats"]["norm_0"], 0)
    assert np.abs(moved["norm_1"]["mean"] - statistics["batch_stats"]["norm_1"]["mean"]).max() > 0
    with pytest.raises(ValueError, match=r"'nrm' of .* none of 2 batch norms \(norm_0, norm_1\)"):
        jn.layers.frozen_batch_norm(MODULE, "nrm").apply(state.variables, BATCH["inputs"])
    with pytest.raises(ValueError, match=r"none of 0 batch norms .the variables have no batch_st"):
        jn.layers.frozen_batch_norm(MODULE).apply({"params": state.params}, BATCH["inputs"])
    everything = copy.copy(jn.layers.frozen_batch_norm(MODULE))
    outputs, _ = jn.apply_module(
        everything, state.params, state.model_state, BATCH["inputs"], train=True
    )
    expected = jax.jit(MODULE.apply)(state.variables, BATCH["inputs"])
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)
