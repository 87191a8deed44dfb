"""A new head on pretrained variables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnets as jn
from jaxnets.finetuning.paths import leaves_by_path

X = np.ones((2, 5), np.float32)


def variables(num_outputs, seed, width=8, **options):
    module = jn.MLP(features=(width,), num_outputs=num_outputs, norm="batch", **options)
    return jn.initialize(module, jax.random.key(seed), X)


def test_all_but_the_head_is_pretrained():
    pretrained, fresh = variables(10, 0), variables(2, 1)
    mixed = jn.replace_head(pretrained, fresh)
    assert jax.tree.map(jnp.shape, mixed) == jax.tree.map(jnp.shape, fresh)
    old, new = leaves_by_path(pretrained), leaves_by_path(fresh)
    for path, leaf in leaves_by_path(mixed).items():
        assert leaf is (new if "/head/" in path else old)[path], path
    assert mixed["batch_stats"]["norm_0"]["mean"] is pretrained["batch_stats"]["norm_0"]["mean"]


def test_a_head_of_another_name_or_a_body_without_one():
    fresh = variables(2, 1)
    body = {
        "params": {k: v for k, v in variables(10, 0)["params"].items() if k != "head"},
        "batch_stats": variables(10, 0)["batch_stats"],
    }
    head = jn.replace_head(body, fresh)["params"]["head"]
    assert head["kernel"] is fresh["params"]["head"]["kernel"]
    renamed = {**fresh, "params": {**body["params"], "classifier": fresh["params"]["head"]}}
    mixed = jn.replace_head(variables(10, 0), renamed, head="head|classifier")
    assert mixed["params"]["classifier"]["kernel"] is fresh["params"]["head"]["kernel"]


def test_networks_that_differ_elsewhere_are_refused():
    with pytest.raises(ValueError, match=r"differ: .* params/hidden_0/kernel has shapes \(5, 16\)"):
        jn.replace_head(variables(10, 0, width=16), variables(2, 1))
    with pytest.raises(ValueError, match=r"head='hed/kernel' matches no path.*params/head/kernel"):
        jn.replace_head(variables(10, 0), variables(2, 1), head="hed/kernel")
    with pytest.raises(ValueError, match="matches every path of the new network, so nothing"):
        jn.replace_head(variables(10, 0), variables(2, 1), head="params|batch_stats")
    fewer = variables(10, 0)
    del fewer["params"]["hidden_0"]
    with pytest.raises(ValueError, match="params/hidden_0/kernel is new only"):
        jn.replace_head(fewer, variables(2, 1))
