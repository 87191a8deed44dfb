"""Exported programs against their networks, at sizes of which the export knew nothing."""

import importlib.util
import json
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from export_networks import NETWORKS

import jaxnets as jn
from jaxnets.functional.attention import cudnn
from jaxnets.functional.lowering import platform_dependent
from jaxnets.storage import file_sha256, write_json, write_safetensors

DAILY = (
    *("mlp_batch_norm", "convnet", "bidirectional_lstm", "sequence_classifier"),
    *("recurrent_translator_luong", "vae", "vqvae", "dcgan_generator", "transformer_lm"),
    *("transformer_classifier", "llama_start", "llama_extend", "vision_transformer"),
)
NAMES = [
    name if name in DAILY else pytest.param(name, marks=pytest.mark.exhaustive) for name in NETWORKS
]


def resized(network, batch):
    """Repeat or cut the examples of the inputs."""
    rows = np.arange(batch) % 3
    return jax.tree.map(lambda x: jnp.asarray(x)[rows], network.inputs)


def assert_equal(actual, expected):
    expected = expected._asdict() if hasattr(expected, "_asdict") else expected
    leaves = jax.tree.leaves(actual), jax.tree.leaves(expected)
    for one, other in zip(*leaves, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def outputs(network, *inputs):
    """Compute the outputs of a network; one program compiles faster than its operations."""
    return jax.jit(network.function)(network.variables, *inputs)


def export(path, network, **options):
    options = {"shapes": network.shapes, "constraints": network.constraints, **options}
    jn.export_program(
        *(path, network.function, network.variables, *network.inputs),
        **{"platforms": ("cpu",), **options},
    )
    return jn.load_program(path)


@pytest.mark.parametrize("name", NAMES)
def test_a_program_computes_the_outputs_of_its_network_for_every_batch(name, tmp_path):
    network = NETWORKS[name]()
    program = export(tmp_path / "p", network)
    for batch in (1, 5):
        inputs = resized(network, batch)
        assert_equal(program(*inputs), outputs(network, *inputs))


def test_time_is_free_too(tmp_path):
    network = NETWORKS["sequence_classifier"]()
    sound, lengths = network.inputs
    inputs = jnp.concatenate([sound, sound[:, ::-1]], axis=1), jnp.asarray(lengths) + 5
    expected = outputs(network, *inputs)
    assert_equal(export(tmp_path / "p", network)(*inputs), expected)


def test_one_file_has_all_platforms_and_fixed_sizes(tmp_path):
    network = NETWORKS["mlp"]()
    jn.export_program(
        tmp_path / "p", network.module, network.variables, *network.inputs, shapes=None
    )
    program = jn.load_program(tmp_path / "p")
    assert program.exported["program"].platforms == ("cpu", "cuda", "rocm", "tpu")
    assert_equal(program(*network.inputs), outputs(network, *network.inputs))
    with pytest.raises(ValueError, match=r"\(3, 4\)"):
        program(jnp.ones((2, 4)))


def on_platforms(variables, x):
    return platform_dependent(x, cpu=jnp.sin, default=jnp.cos) * variables["scale"]


@pytest.mark.parametrize(
    ("platforms", "shapes", "operations"),
    [
        (("cpu",), None, ["sine"]),
        (("cuda",), None, ["cosine"]),
        (("tpu",), None, ["cosine"]),
        (("cpu", "cuda", "tpu"), None, ["cosine", "sine"]),
        (("cpu", "cuda"), "batch", ["cosine"]),
    ],
)
def test_a_program_has_the_branches_of_its_platforms(platforms, shapes, operations, tmp_path):
    arguments = (tmp_path / "p", on_platforms, {"scale": jnp.float32(2)}, jnp.ones(3))
    jn.export_program(*arguments, shapes=shapes, platforms=platforms)
    program = jn.load_program(tmp_path / "p")
    text = program.exported["program"].mlir_module()
    assert [name for name in ("cosine", "sine") if f"stablehlo.{name} " in text] == operations
    if "cpu" in platforms:
        expected = 2 * (np.cos(1) if shapes else np.sin(1))
        np.testing.assert_allclose(program(jnp.ones(3)), np.full(3, expected), rtol=1e-6)


def test_open_sizes_never_take_the_kernel_of_one_device(tmp_path, monkeypatch):
    monkeypatch.setattr(cudnn, "_capability", lambda: (9, 0))

    def attend(variables, x):
        return jn.functional.dot_product_attention(x, x, x)

    x = jax.ShapeDtypeStruct((1, 16, 2, 8), jnp.bfloat16)
    jn.export_program(tmp_path / "p", attend, {}, x, shapes="batch, time, ...", platforms=("cuda",))
    assert "cudnn" not in jn.load_program(tmp_path / "p").exported["program"].mlir_module()


def test_several_functions_share_the_weights(tmp_path):
    networks = {"start": NETWORKS["llama_start"](), "extend": NETWORKS["llama_extend"]()}
    jn.export_program(
        tmp_path / "p",
        {name: one.function for name, one in networks.items()},
        networks["start"].variables,
        {name: one.inputs for name, one in networks.items()},
        shapes={name: one.shapes for name, one in networks.items()},
        platforms=("cpu",),
    )
    program = jn.load_program(tmp_path / "p")
    for name, one in networks.items():
        expected = outputs(one, *one.inputs)
        assert_equal(program.functions[name](*one.inputs), expected)
    with pytest.raises(ValueError, match=r"functions \['start', 'extend'\]; call one of them"):
        program(*networks["start"].inputs)


class Pair(NamedTuple):
    """Its names are not in the order of the alphabet."""

    second: jax.Array
    first: jax.Array


def test_named_tuples_are_dicts_in_a_program(tmp_path):
    def swap(variables, pair, rest):
        return Pair(second=pair.first * 2, first=pair.second + rest[0])

    pair, rest = Pair(jnp.zeros((1, 2)), jnp.ones((1, 3))), [jnp.ones((1, 2))]
    jn.export_program(tmp_path / "p", swap, {}, pair, rest, platforms=("cpu",))
    program = jn.load_program(tmp_path / "p")
    for given in (pair, pair._asdict()):
        result = program(given, rest)
        assert {name: x.tolist() for name, x in result.items()} == {
            "second": [[2.0, 2.0, 2.0]],
            "first": [[1.0, 1.0]],
        }
    names = [each["name"] for each in program.description["functions"]["program"]["inputs"]]
    assert names == ["pair/first", "pair/second", "rest/0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    network, path = NETWORKS["mlp"](), tmp_path_factory.mktemp("program") / "p"
    jn.export_program(path, network.module, network.variables, *network.inputs, platforms=("cpu",))
    return path


#: Runs a program by this library, and by JAX with the reader of its weights only.
READERS = {
    "jaxnets": "import jaxnets; run = jaxnets.load_program(folder)",
    "jax": """
import jax, safetensors.numpy
weights = safetensors.numpy.load_file(folder / "weights.safetensors")
exported = jax.export.deserialize(bytearray((folder / "program.bin").read_bytes()))
run = lambda *inputs: exported.call(weights, *inputs)
""",
}
RUN = """
import json, numpy as np
print(np.asarray(run(np.ones((2, 4), np.float32))).tolist())
print(json.dumps([name for name in sys.modules if name.startswith(("jaxnets", "flax"))]))
"""


@pytest.mark.parametrize("reader", READERS)
def test_a_program_runs_without_the_code_of_its_network(reader, folder):
    code = f"import pathlib, sys; folder = pathlib.Path(sys.argv[1])\n{READERS[reader]}\n{RUN}"
    command = [sys.executable, "-c", code, folder]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    values, modules = map(json.loads, printed.splitlines())
    network = NETWORKS["mlp"]()
    expected = network.module.apply(network.variables, np.ones((2, 4), np.float32))
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)
    heavy = ("flax", "jaxnets.models", "jaxnets.layers", "jaxnets.functional")
    assert [name for name in modules if name.startswith(heavy)] == []
    assert bool(modules) == (reader == "jaxnets")


def test_the_description_names_versions_weights_inputs_and_outputs(folder):
    description = json.loads((folder / "program.json").read_text())
    assert description["jax"] == jax.__version__
    assert description["jaxnets"] == jn.__version__
    assert description["platforms"] == ["cpu"]
    function = description["functions"]["program"]
    assert function["inputs"] == [{"name": "inputs", "shape": ["batch", 4], "dtype": "float32"}]
    assert function["outputs"] == [{"name": "output", "shape": ["batch", 3], "dtype": "float32"}]
    leaves = jax.tree_util.tree_leaves_with_path(NETWORKS["mlp"]().variables)
    named = {"/".join(key.key for key in keys): leaf for keys, leaf in leaves}
    assert description["weights"] == sorted(named)
    stored = safetensors.numpy.load_file(folder / "weights.safetensors")
    assert stored.keys() == named.keys()
    for name, leaf in named.items():
        np.testing.assert_array_equal(stored[name], leaf)


def test_empty_batches_are_refused(folder):
    with pytest.raises(ValueError, match=r"of 'program' has shape \(0, 4\); symbolic sizes"):
        jn.load_program(folder)(np.ones((0, 4), np.float32))


def first(variables, x):
    return x


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((first, {}), {"platforms": "cpu"}, "platforms is 'cpu'; give some of"),
        ((first, {}), {"platforms": ("gpu",)}, r"platforms is \('gpu',\); give some of"),
        (({"a b": first}, {}, {}), {}, r"functions are named \['a b'\]; give identifiers"),
        (({"a": first}, {}, jnp.ones(2)), {}, r"inputs of several functions are a .*\['a'\]"),
        (({"a": first}, {}, {"a": jnp.ones(2)}), {}, "inputs of 'a' are a .*; give a tuple"),
        (({"a": first}, {}, {"a": ()}), {"shapes": {"b": ""}}, r"shapes of .* are \['b'\]"),
        ((first, {"a": {"b": 1}, "a/b": 1}, 1), {}, "two variables are named 'a/b'"),
        ((first, {}, jnp.ones(2)), {"shapes": "batch, 3, ..."}, "fix a size by its number"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        jn.export_program(tmp_path / "p", *arguments, **options)
    assert list(tmp_path.iterdir()) == []


def test_keys_are_no_weights_and_an_existing_folder_stays(folder, tmp_path):
    with pytest.raises(TypeError, match=r"'key' has the type key<fry>; .*jax\.random\.key_data"):
        jn.export_program(
            tmp_path / "p", first, {"key": jax.random.key(0)}, jnp.ones(2), platforms=("cpu",)
        )
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileExistsError, match="exists; give another folder"):
        jn.export_program(folder, first, {}, jnp.ones(2))


def test_flatbuffers_are_asked_for_by_name(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'jaxnets\[export\]'"):
        jn.load_program(folder)
    with pytest.raises(ImportError, match=r"pip install 'jaxnets\[export\]'"):
        jn.export_program(tmp_path / "p", first, {}, jnp.ones(2))


@pytest.fixture
def copy(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def describe(folder, **changes):
    content = json.loads((folder / "program.json").read_text())
    content.pop("sha256")
    write_json(folder / "program.json", {**content, **changes})


def test_a_program_that_this_jax_does_not_read_is_refused_with_both_versions(copy, monkeypatch):
    def of_the_future(content):
        raise ValueError("unknown calling convention 99\nmore")

    monkeypatch.setattr(jax.export, "deserialize", of_the_future)
    describe(copy, jax="0.99.0")
    both = rf"was exported by JAX 0\.99\.0, and JAX {jax.__version__} does not read it \(unknown"
    with pytest.raises(ValueError, match=both + r" calling convention 99\); install JAX 0\.99\.0"):
        jn.load_program(copy)


def test_damaged_files_are_refused_by_name(copy):
    good = {file.name: file.read_bytes() for file in copy.iterdir()}
    with pytest.raises(FileNotFoundError, match=r"program\.json"):
        jn.load_program(copy / "elsewhere")

    describe(copy, format=2)
    with pytest.raises(ValueError, match=r"program\.json, line .* format 2, this version reads 1"):
        jn.load_program(copy)
    (copy / "program.json").write_text("[]")
    with pytest.raises(ValueError, match=r"program\.json, line 1: .*no JSON object; export it"):
        jn.load_program(copy)
    description = json.loads(good["program.json"])
    describe_bad = {**description, "functions": {"../x": description["functions"]["program"]}}
    describe_bad.pop("sha256")
    write_json(copy / "program.json", describe_bad)
    with pytest.raises(ValueError, match=r"a function is named '\.\./x'"):
        jn.load_program(copy)
    (copy / "program.json").write_bytes(good["program.json"])
    describe(copy, functions={})
    with pytest.raises(ValueError, match=r"program\.json, line .* it has no functions; export it"):
        jn.load_program(copy)
    (copy / "program.json").write_bytes(good["program.json"])

    content = bytearray(good["program.bin"])
    content[len(content) // 2] ^= 1
    for damaged in (bytes(content), good["program.bin"][:-1], b""):
        (copy / "program.bin").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"program\.bin is damaged: its sha256"):
            jn.load_program(copy)
    (copy / "program.bin").write_bytes(good["program.bin"])

    weights = bytearray(good["weights.safetensors"])
    weights[-3] ^= 1  # in the data of an array
    for damaged in (bytes(weights), good["weights.safetensors"][:-1]):
        (copy / "weights.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"weights\.safetensors is damaged: its sha256"):
            jn.load_program(copy)
    (copy / "weights.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"weights\.safetensors"):
        jn.load_program(copy)


def test_weights_of_another_program_are_refused(copy):
    weights = safetensors.numpy.load_file(copy / "weights.safetensors")
    name = sorted(weights)[0]
    for changed in (
        {key: value for key, value in weights.items() if key != name},
        {**weights, name: weights[name][..., None]},
        {**weights, name: weights[name].astype(np.float16)},
    ):
        write_safetensors(copy / "weights.safetensors", changed)
        describe(copy, weights_sha256=file_sha256(copy / "weights.safetensors"))
        with pytest.raises(ValueError, match=rf"does not fit program\.bin: '{name}' differ"):
            jn.load_program(copy)


def test_sizes_that_a_network_cannot_leave_open_are_refused_with_the_remedy(tmp_path):
    network = NETWORKS["masked_lm"]()
    with pytest.raises(ValueError, match=r"'time' > '512' is inconclusive.*give constraints such"):
        export(tmp_path / "p", network, constraints=())
    assert list(tmp_path.iterdir()) == []
    assert_equal(
        export(tmp_path / "p", network)(*network.inputs),
        outputs(network, *network.inputs),
    )
