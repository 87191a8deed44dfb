"""Exported programs against their networks, at sizes of which the export knew nothing."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from export_networks import NETWORKS

import jaxnets as jn

NAMES = (
    "mlp_batch_norm",
    "convnet",
    "resnet",
    "bidirectional_lstm",
    "gru",
    "vae",
    "dcgan_generator",
    "transformer_encoder",
    "llama_start",
    "llama_extend",
    "vision_transformer",
)


def resized(network, batch):
    """Repeat or cut the examples of the inputs."""
    rows = np.arange(batch) % 3
    return jax.tree.map(lambda x: jnp.asarray(x)[rows], network.inputs)


def assert_equal(actual, expected):
    expected = expected._asdict() if hasattr(expected, "_asdict") else expected
    leaves = jax.tree.leaves(actual), jax.tree.leaves(expected)
    for one, other in zip(*leaves, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_program_computes_the_outputs_of_its_network_for_every_batch(name, tmp_path):
    network = NETWORKS[name]()
    jn.export_program(
        *(tmp_path / "p", network.function, network.variables, network.inputs),
        shapes=network.shapes,
        platforms=("cpu",),
    )
    program = jn.load_program(tmp_path / "p")
    for batch in (1, 5):
        inputs = resized(network, batch)
        assert_equal(program(*inputs), network.function(network.variables, *inputs))


def test_one_file_has_all_platforms_and_fixed_sizes_keep_the_fast_program(tmp_path):
    network = NETWORKS["mlp"]()
    jn.export_program(
        tmp_path / "p", network.module, network.variables, network.inputs, shapes=None
    )
    program = jn.load_program(tmp_path / "p")
    assert program.exported["call"].platforms == ("cpu", "cuda", "rocm", "tpu")
    assert_equal(program(*network.inputs), network.function(network.variables, *network.inputs))


def test_several_functions_share_the_weights(tmp_path):
    start, extend = NETWORKS["llama_start"](), NETWORKS["llama_extend"]()
    networks = {"start": start, "extend": extend}
    jn.export_program(
        tmp_path / "p",
        {name: one.function for name, one in networks.items()},
        start.variables,
        {name: one.inputs for name, one in networks.items()},
        shapes={name: one.shapes for name, one in networks.items()},
        platforms=("cpu",),
    )
    program = jn.load_program(tmp_path / "p")
    for name, one in networks.items():
        expected = one.function(one.variables, *one.inputs)
        assert_equal(program.functions[name](*one.inputs), expected)
    with pytest.raises(ValueError, match=r"functions \['start', 'extend'\]; call one of them"):
        program(*start.inputs)


#: Runs a program with JAX and the reader of its weights only.
WITHOUT_LIBRARY = """
import json, pathlib, sys, jax, jax.export, numpy as np, safetensors.numpy
folder = pathlib.Path(sys.argv[1])
weights = safetensors.numpy.load_file(folder / "weights.safetensors")
exported = jax.export.deserialize(bytearray((folder / "call.jax").read_bytes()))
print(np.asarray(exported.call(weights, np.ones((2, 4), np.float32))).tolist())
print([name for name in sys.modules if name.startswith(("jaxnets", "flax"))])
"""


def test_jax_runs_a_program_without_this_library(tmp_path):
    network = NETWORKS["mlp"]()
    jn.export_program(
        *(tmp_path / "p", network.module, network.variables, network.inputs), platforms=("cpu",)
    )
    command = [sys.executable, "-c", WITHOUT_LIBRARY, tmp_path / "p"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    values, modules = map(json.loads, printed.splitlines())
    expected = network.module.apply(network.variables, np.ones((2, 4), np.float32))
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)
    assert modules == []


def test_weights_have_the_names_of_the_network(tmp_path):
    network = NETWORKS["mlp"]()
    jn.export_program(
        *(tmp_path / "p", network.module, network.variables, network.inputs), platforms=("cpu",)
    )
    stored = safetensors.numpy.load_file(tmp_path / "p" / "weights.safetensors")
    leaves = jax.tree_util.tree_leaves_with_path(network.variables)
    assert len(stored) == len(leaves)
    for keys, leaf in leaves:
        name = "/".join(key.key for key in keys)
        np.testing.assert_array_equal(stored[name], leaf)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    network, path = NETWORKS["mlp"](), tmp_path_factory.mktemp("program") / "p"
    jn.export_program(path, network.module, network.variables, network.inputs, platforms=("cpu",))
    return path


def test_empty_batches_are_refused(folder):
    with pytest.raises(ValueError, match=r"an input of 'call' has shape \(0, 4\); symbolic sizes"):
        jn.load_program(folder)(np.ones((0, 4), np.float32))


def test_an_existing_folder_is_refused(folder):
    with pytest.raises(FileExistsError, match="exists; remove it"):
        jn.export_program(folder, lambda variables: variables, {}, ())


def test_a_program_that_this_jax_does_not_read_is_refused_with_its_version(folder, tmp_path):
    description = json.loads((folder / "program.json").read_text())
    (tmp_path / "weights.safetensors").write_bytes((folder / "weights.safetensors").read_bytes())
    (tmp_path / "program.json").write_text(json.dumps({**description, "jax": "0.99.0"}))
    (tmp_path / "call.jax").write_bytes(b"of the future")
    with pytest.raises(ValueError, match=r"was exported by JAX 0\.99\.0, and JAX .* does not read"):
        jn.load_program(tmp_path)
    (tmp_path / "program.json").write_text(json.dumps({**description, "format": 2}))
    with pytest.raises(ValueError, match="has the format 2, and this version reads 1"):
        jn.load_program(tmp_path)
    (tmp_path / "program.json").write_text("[]")
    with pytest.raises(ValueError, match="is no description of a program"):
        jn.load_program(tmp_path)


def test_sizes_that_a_network_cannot_leave_open_are_refused_with_the_remedy(tmp_path):
    network = NETWORKS["masked_lm"]()
    arguments = (tmp_path / "p", network.function, network.variables, network.inputs)
    with pytest.raises(ValueError, match=r"'time' > '512' is inconclusive.*give constraints such"):
        jn.export_program(*arguments, shapes="batch, time", platforms=("cpu",))
    jn.export_program(
        *arguments, shapes="batch, time", constraints=["time <= 512"], platforms=("cpu",)
    )
    assert_equal(
        jn.load_program(tmp_path / "p")(*network.inputs),
        network.function(network.variables, *network.inputs),
    )
