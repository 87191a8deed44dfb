"""Tables of rules: which tensor is which array, and what is left over or missing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets.pretrained import Rule, read_tensors
from jaxnets.pretrained import rules as tables
from jaxnets.pretrained.layouts import Split, Transpose
from jaxnets.storage.safetensors import write_safetensors

TABLE = [
    Rule(
        "h.{i}.qkv",
        tuple(f"params/layer_{{i}}/{name}/kernel" for name in "qkv"),
        (Split(3), Transpose()),
    ),
    Rule("h.{i}.out", "params/layer_{i}/out/kernel", (Transpose(),)),
    Rule("s.{stage}.{block}", "params/stage_{stage+1}_block_{block+1}/kernel"),
    Rule("bias", "params/bias"),
]


def plan(names, paths):
    return tables.make_plan(TABLE, names, paths)


def test_placeholders_stand_for_numbers_with_offsets():
    paths = ["params/stage_1_block_1/kernel", "params/stage_12_block_3/kernel"]
    found = plan(["s.0.0", "s.11.2"], paths)
    assert {one.names[0]: one.paths[0] for one in found.assignments} == {
        "s.0.0": paths[0],
        "s.11.2": paths[1],
    }
    assert not found.missing and not found.unused
    assert plan(["s.00.0", "s.x.0"], []).unused == ("s.00.0", "s.x.0")  # no numbers


def test_what_is_missing_names_its_tensors_and_what_is_left_over_is_listed():
    paths = [f"params/layer_{i}/{name}/kernel" for i in range(2) for name in ("q", "k", "v", "out")]
    found = plan(["h.0.qkv", "h.0.out", "h.1.out", "h.2.out", "more"], paths)
    assert list(found.missing) == [f"params/layer_1/{name}/kernel" for name in "qkv"]
    assert found.missing["params/layer_1/k/kernel"] == ("h.1.qkv",)
    assert found.unused == ("h.2.out", "more")
    text = tables.describe_plan(found)
    assert "3 arrays" in text and "h.1.qkv" in text and "2 tensors" in text and "more" in text


def test_the_first_of_two_rules_for_an_array_counts():
    table = [Rule("new", "params/bias"), Rule("bias", "params/bias")]
    found = tables.make_plan(table, ["bias", "new"], ["params/bias"])
    assert [one.names for one in found.assignments] == [("new",)]
    assert tables.make_plan(table, ["bias"], ["params/bias"]).assignments[0].names == ("bias",)


def variables(layers=2):
    rng = np.random.default_rng(0)
    block = lambda: {  # noqa: E731
        **{name: {"kernel": rng.normal(size=(4, 2)).astype(np.float32)} for name in "qkv"},
        "out": {"kernel": rng.normal(size=(2, 4)).astype(np.float32)},
    }
    tree = {f"layer_{i}": block() for i in range(layers)}
    return {"params": {**tree, "bias": rng.normal(size=3).astype(np.float32)}}


def place(path, shape, dtype, read):
    array = read()
    assert array.shape == shape and array.dtype == dtype, path
    return array


@pytest.fixture
def stored(tmp_path):
    tree = variables()
    found = tables.file_assignments(TABLE, tables.variable_leaves(tree))
    assert not found.missing
    file = tmp_path / "model.safetensors"
    write_safetensors(file, tables.write_tensors(found.assignments, tree))
    return tree, read_tensors(file)


def test_arrays_come_back_bit_for_bit(stored):
    tree, tensors = stored
    assert tensors.specs["h.1.qkv"].shape == (6, 4)
    found = plan(tensors.specs, tables.variable_leaves(tree))
    flat = tables.read_variables(found, tensors, tree, place)
    for path, array in tables.flatten_paths(tree).items():
        np.testing.assert_array_equal(flat[path], array)


def test_a_scanned_stack_is_read_layer_by_layer(stored):
    tree, tensors = stored
    layers = [tree["params"][f"layer_{i}"] for i in range(2)]
    stacked = {
        "params": {
            "layers": jax.tree.map(lambda *x: np.stack(x), *layers),
            "bias": tree["params"]["bias"],
        }
    }
    leaves = tables.variable_leaves(stacked)
    assert leaves.keys() == tables.variable_leaves(tree).keys()
    flat = tables.read_variables(plan(tensors.specs, leaves), tensors, stacked, place)
    for path, array in tables.flatten_paths(stacked).items():
        np.testing.assert_array_equal(flat[path], array)


@pytest.mark.parametrize("path", ["params/layer_0/q/kernel", "params/layer_1/out/kernel"])
def test_parts_of_arrays_are_read_alone(stored, path):
    """As a mesh asks for them."""
    tree, tensors = stored
    found = plan(tensors.specs, tables.variable_leaves(tree))
    parts = {}

    def place(path, shape, dtype, read):
        parts[path] = read(np.s_[1:2, 0:2])

    tables.read_variables(
        found,
        tensors,
        {"params": {name: value for name, value in tree["params"].items() if name != "bias"}},
        place,
    )
    whole = tables.flatten_paths(tree)[path]
    np.testing.assert_array_equal(parts[path], whole[1:2, 0:2])


@pytest.mark.parametrize(
    ("leaf", "reason"),
    [
        (jax.ShapeDtypeStruct((3, 4), jnp.float32), "does not fit"),
        (jax.ShapeDtypeStruct((2, 4), jnp.int32), "has type F32"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_before_data_are_read(stored, leaf, reason):
    tree, tensors = stored
    leaves = {**tables.variable_leaves(tree), "params/layer_0/out/kernel": leaf}
    with pytest.raises(ValueError, match=f"h.0.out.*{reason}"):
        tables.check_shapes(plan(tensors.specs, leaves), tensors, leaves)
