"""Whole networks, written and read, in both layouts; folders that are not what they say."""

import dataclasses
import errno
import json
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import shapes_of
from jax.sharding import NamedSharding, PartitionSpec

import jaxnets as jn
from jaxnets.pretrained import PretrainedNetwork, SoundProcessor, load, save, saving
from jaxnets.pretrained.processors import ImageProcessor, TextProcessor

TOKENS = jax.ShapeDtypeStruct((1, 2), jnp.int32)
GPT2 = jn.transformer.gpt2_small(
    num_layers=2, features=8, num_heads=2, vocabulary_size=11, max_length=8
)


def network(module, *inputs):
    """Return a network with random variables, whose initializers are not compiled."""
    shapes, _ = shapes_of(module, *inputs)
    random = np.random.default_rng(0)
    drawn = jax.tree.map(lambda x: jnp.asarray(0.3 * random.normal(size=x.shape), x.dtype), shapes)
    return PretrainedNetwork(module, drawn)


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def images(*shape):
    return jax.ShapeDtypeStruct((1, *shape), jnp.float32)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2") / "torch"
    trained = network(GPT2, TOKENS)
    save(folder, trained, layout="torch")
    return folder, trained


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (jn.MLP(features=(4,), num_outputs=2, activation="tanh"), images(3)),
        (jn.ConvNet(features=(2, 3), hidden_features=(4,), norm="batch"), images(8, 8, 1)),
        (jn.convolutional.resnet18(width=2), images(16, 16, 3)),
        (jn.recurrent.TextClassifier(9, hidden_size=4, bidirectional=True), TOKENS),
        (jn.VAE(jn.autoencoder.EncoderDecoderConfig((4, 4, 1), features=(4,))), images(4, 4, 1)),
        (jn.DCGANGenerator(image_shape=(8, 8, 1), latent_size=3, width=2), images(3)),
        (GPT2, TOKENS),
    ],
    ids=lambda x: type(x).__name__,
)
def test_every_family_comes_back_bit_for_bit(tmp_path, module, inputs):
    trained = network(module, inputs)
    save(tmp_path / "network", trained)
    found = load(tmp_path / "network")
    assert found.module == module
    assert_equal(found.variables, trained.variables)


def test_shards_and_16_bits_come_back_bit_for_bit(tmp_path):
    module = GPT2.clone(precision=jn.Precision(parameter=jnp.bfloat16))
    trained = network(module, TOKENS)
    for layout in ("jaxnets", "torch"):
        save(tmp_path / layout, trained, layout=layout, max_shard_bytes=500)
        assert (tmp_path / layout / "model.safetensors.index.json").exists()
        found = load(tmp_path / layout, precision=module.precision)
        assert_equal(found.variables, trained.variables)


def test_torch_has_the_names_of_hugging_face(gpt2):
    folder, _ = gpt2
    specs = jn.pretrained.read_tensors(folder).specs
    assert specs["transformer.h.1.attn.c_attn.weight"].shape == (8, 24)
    content = json.loads((folder / "config.json").read_text())
    assert content["architectures"] == ["GPT2LMHeadModel"] and content["n_layer"] == 2
    assert content["dtype"] == "float32"


def test_the_type_of_the_arrays_is_written_not_that_of_the_file_they_were_read_from(tmp_path, gpt2):
    folder = change(tmp_path / "half", gpt2[0], dtype="bfloat16", torch_dtype="bfloat16")
    save(tmp_path / "again", load(folder), layout="torch")
    content = json.loads((tmp_path / "again" / "config.json").read_text())
    assert content["dtype"] == "float32" and "torch_dtype" not in content


def test_a_field_that_is_a_number_of_numpy_comes_back(tmp_path):
    module = jn.MLP(features=(4,), num_outputs=np.array([0, 2]).max() + 1)
    save(tmp_path / "network", network(module, images(3)))
    assert load(tmp_path / "network").module.num_outputs == 3


VOCABULARY = {"<pad>": 0, "</s>": 1, "a": 2, "b": 3, "c": 4}
TEXT = TextProcessor(
    json.dumps({"model": {"type": "WordLevel", "vocab": VOCABULARY, "unk_token": "<pad>"}}),
    {"pad": "<pad>", "eos": "</s>"},
    max_length=7,
    truncation_side="left",
)


@pytest.mark.parametrize(
    "processor",
    [
        TEXT,
        ImageProcessor(12, "lanczos", (10, 9), 0.5, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0)),
        SoundProcessor(jn.data.WhisperFeatures(num_mels=12, seconds=1)),
        SoundProcessor(jn.data.WhisperFeatures(), TEXT),
        None,
    ],
    ids=lambda x: type(x).__name__,
)
def test_a_processor_is_kept_in_the_own_layout(tmp_path, processor):
    module = jn.MLP(features=(4,))
    trained = dataclasses.replace(network(module, images(3)), processor=processor)
    save(tmp_path / "a", trained)
    found = load(tmp_path / "a")
    save(tmp_path / "b", found)
    for one in (found.processor, load(tmp_path / "b").processor):
        assert type(one) is type(processor)
        if isinstance(one, SoundProcessor):
            assert one.features == processor.features
            one, expected = one.tokenizer, processor.tokenizer
        else:
            expected = processor
        if isinstance(one, TextProcessor):
            assert one(["a", "c", "b", "b"])["tokens"].tolist() == [[2], [4], [3], [3]]
            assert dataclasses.replace(one, model=expected.model) == expected
        else:
            assert one == expected


@pytest.mark.parametrize("layout", ["jaxnets", "torch"])
def test_another_processor_is_refused(tmp_path, layout, gpt2):
    with pytest.raises(ValueError, match="the processor is a dict; give a TextProcessor"):
        save(tmp_path / "x", dataclasses.replace(gpt2[1], processor={}), layout=layout)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ["jaxnets", "torch"])
def test_a_stack_is_scanned_as_asked(tmp_path, layout, gpt2):
    _, trained = gpt2
    save(tmp_path / "network", trained, layout=layout)
    found = load(tmp_path / "network", scan_layers=True)
    assert_equal(
        found.variables["params"], jn.transformer.stack_layers(trained.variables["params"])
    )
    tokens = jnp.arange(6).reshape(2, 3)
    np.testing.assert_allclose(
        jax.jit(found.module.apply)(found.variables, tokens),
        jax.jit(GPT2.apply)(trained.variables, tokens),
        atol=1e-5,
    )
    save(tmp_path / "again", found, layout=layout)
    assert_equal(load(tmp_path / "again", scan_layers=False).variables, trained.variables)


def test_arrays_lie_where_a_sharding_says(gpt2):
    folder, trained = gpt2
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    sharding = jax.tree.map(
        lambda x: NamedSharding(mesh, PartitionSpec("data" if x.shape[0] % 2 == 0 else None)),
        trained.variables,
    )
    found = load(folder, sharding=sharding)
    assert_equal(found.variables, trained.variables)
    kernel = found.variables["params"]["stack"]["layer_0"]["attention"]["query"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (4, 8)
    with pytest.raises(ValueError, match="only one of both has params/"):
        load(folder, sharding={"params": {}})


def test_a_file_without_the_prefix_and_with_a_copy_is_read(tmp_path, gpt2):
    folder, trained = gpt2
    tensors = dict(jn.pretrained.read_tensors(folder))
    plain = {name.removeprefix("transformer."): array for name, array in tensors.items()}
    plain |= {"lm_head.weight": plain["wte.weight"], "h.0.attn.bias": np.ones((1, 1, 4, 4))}
    copy = change(tmp_path / "copy", folder, plain)
    assert_equal(load(copy).variables, trained.variables)
    other = change(tmp_path / "other", folder, plain | {"lm_head.weight": -plain["wte.weight"]})
    with pytest.raises(ValueError, match=r"1 tensors of the file have no array: lm_head\.weight"):
        load(other)


def change(folder, source, tensors=None, **entries):
    shutil.copytree(source, folder)
    if tensors is not None:
        np.savez(folder / "model.npz", **tensors)
        (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}, indent=1))
    return folder


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"n_layer": 3}, r"12 arrays.*layer_2.*in the file transformer\.h\.2|16 arrays"),
        ({"n_layer": 1}, r"12 tensors of the file have no array: transformer\.h\.1"),
        ({"n_embd": 16}, r"does not fit params/embedding/token/embedding of shape \(11, 16\)"),
        ({"n_embd": "8"}, r'config.json, line \d+: .*n_embd, "8", is no integer'),
        ({"n_embd": 7}, "7 features do not split into 2 heads"),
        ({"n_layer": 0}, "n_layer, 0, is not 1 or more"),
        ({"layer_norm_epsilon": None}, "layer_norm_epsilon, null, is no finite number"),
        ({"layer_norm_epsilon": 1e300}, "layer_norm_epsilon, 1e\\+300, is no finite number"),
        ({"n_embd": 2**63}, "n_embd, 9223372036854775808, is more than 2147483647"),
        ({"resid_pdrop": "0.1"}, 'resid_pdrop, "0.1", is no finite number'),
        ({"n_inner": None, "n_embd": None}, "n_embd, null, is no integer"),
        ({"scale_attn_weights": False}, "scale_attn_weights, false, is not supported"),
        ({"activation_function": "mish"}, 'activation_function, "mish", is not supported'),
        (
            {"model_type": "bloom"},
            'model_type, "bloom", is no known architecture; known are .*gpt2',
        ),
        ({"quantization_config": {"quant_method": "gptq"}}, 'config, {"quant_method": "gptq"}, is'),
        ({"model_type": ["gpt2"]}, "is no known architecture"),
        ({"architectures": ["GPT2ForQA"]}, "'GPT2ForQA' of gpt2 is not supported; give architec"),
        ({"tie_word_embeddings": False}, r"params/head/kernel \(in the file lm_head\.weight\)"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_a_configuration_that_does_not_fit_is_refused_by_name(tmp_path, gpt2, entries, message):
    folder = change(tmp_path / "changed", gpt2[0], **entries)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_other_names_of_entries_are_read_and_not_written(tmp_path, gpt2):
    """The names that transformers accepts for them."""
    folder = change(tmp_path / "renamed", gpt2[0])
    content = json.loads((folder / "config.json").read_text())
    names = {
        "n_layer": "num_hidden_layers",
        "n_embd": "hidden_size",
        "n_head": "num_attention_heads",
    }
    names["n_positions"] = "max_position_embeddings"
    renamed = {names.get(name, name): value for name, value in content.items()}
    (folder / "config.json").write_text(json.dumps(renamed))
    found = load(folder)
    assert found.module == load(gpt2[0]).module
    assert found.config["n_layer"] == 2 and "num_hidden_layers" not in found.config
    stale = dataclasses.replace(found, config={**found.config, "num_hidden_layers": 9})
    save(tmp_path / "again", stale, layout="torch")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert written["n_layer"] == 2 and written.keys().isdisjoint(names.values())
    assert load(tmp_path / "again").module == found.module


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"num_hidden_layers": 2}, None),
        ({"num_hidden_layers": 3}, "num_hidden_layers, 3, is another name of n_layer, which is 2"),
        ({"n_layer": 3, "num_hidden_layers": None}, "num_hidden_layers, null, is another name"),
    ],
)
def test_two_names_of_an_entry_must_agree(tmp_path, gpt2, entries, message):
    folder = change(tmp_path / "changed", gpt2[0], **entries)
    if message is None:
        assert load(folder).module.num_layers == 2
        return
    with pytest.raises(ValueError, match=rf"config\.json, line \d+: .*{message}"):
        load(folder)


def test_an_error_names_the_entry_as_the_file_does(tmp_path, gpt2):
    folder = change(tmp_path / "changed", gpt2[0])
    content = json.loads((folder / "config.json").read_text())
    content["num_hidden_layers"] = str(content.pop("n_layer"))
    (folder / "config.json").write_text(json.dumps(content, indent=1))
    with pytest.raises(ValueError, match=r'line \d+: .*num_hidden_layers, "2", is no integer'):
        load(folder)


def test_not_strict_reports_what_is_missing_and_initializes_it(tmp_path, gpt2):
    folder = change(tmp_path / "untied", gpt2[0], tie_word_embeddings=False)
    with pytest.raises(ValueError, match="give rng"):
        load(folder, strict=False)
    found = load(folder, strict=False, rng=jax.random.key(1))
    assert found.missing == ("params/head/kernel",) and found.unused == ()
    head = found.variables["params"].pop("head")["kernel"]
    assert head.shape == (8, 11) and 0.01 < float(head.std()) < 0.03
    assert_equal(found.variables, gpt2[1].variables)


def test_not_strict_initializes_what_has_another_shape(gpt2):
    """Such as a head of another number of classes."""
    folder, trained = gpt2
    found = load(folder, strict=False, rng=jax.random.key(1), vocabulary_size=13)
    assert found.missing == ("params/embedding/token/embedding",)
    assert found.unused == ("transformer.wte.weight",)
    table = found.variables["params"]["embedding"].pop("token")["embedding"]
    assert table.shape == (13, 8) and float(table.std()) > 0
    rest = jax.tree.map(lambda x: x, trained.variables)
    del rest["params"]["embedding"]["token"]
    assert_equal(found.variables, rest)


def test_folders_that_are_none(tmp_path, gpt2):
    with pytest.raises(FileNotFoundError, match="nothing does not exist"):
        load(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty.*config\.json|empty.*no file"):
        load(tmp_path / "empty")
    bare = change(tmp_path / "bare", gpt2[0])
    (bare / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"bare has no config\.json"):
        load(bare)
    for name in (None, "GPT2LMHeadModel", []):
        with pytest.raises(ValueError, match=r"does not say what network .* its config\.json"):
            load(gpt2[0] / "model.safetensors", architecture=name)


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path, gpt2):
    _, trained = gpt2
    with pytest.raises(FileExistsError, match="exists"):
        save(tmp_path, trained)
    local = GPT2.clone(config=dataclasses.replace(GPT2.config, window=3))
    with pytest.raises(ValueError, match=r"is no .*gpt2.*GPT2LMHeadModel has config\.window None"):
        save(tmp_path / "x", PretrainedNetwork(local, trained.variables), layout="torch")
    with pytest.raises(ValueError, match="Dense is no network of this library"):
        save(tmp_path / "x", network(nn.Dense(2), images(3)))
    function = jn.MLP(features=(4,), activation=jnp.sin)
    with pytest.raises(ValueError, match=r"MLP\.activation is .*sin"):
        save(tmp_path / "x", network(function, images(3)))
    with pytest.raises(ValueError, match="layout is 'keras'"):
        save(tmp_path / "x", trained, layout="keras")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("module", {"class": "Popen"}, "is no network of this version: class 'Popen'"),
        ("module", {"class": "MLP", "depth": 3}, "is no network of this version"),
        ("module", [], "is no network of this version"),
        (
            "module",
            {"class": "MLP", "precision": {"class": "Precision", "compute": "a"}},
            "is no network of this version: dtype 'a' is not known",
        ),
        ("arrays", {"params/a": {"shape": [2]}}, "are no shapes and dtypes"),
        ("arrays", {"params/a": {"shape": [2], "dtype": "a"}}, "dtypes: dtype 'a' is not known"),
        ("arrays", {}, "tensors of the file have no array"),
    ],
)
def test_a_changed_configuration_of_this_library_is_refused(tmp_path, entry, value, message):
    save(tmp_path / "mlp", network(jn.MLP(features=(4,)), images(3)))
    file = tmp_path / "mlp" / "config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, entry: value}))
    with pytest.raises(ValueError, match="sha256"):
        load(tmp_path / "mlp")
    content.pop("sha256")
    file.write_text(json.dumps({**content, entry: value}))
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "mlp")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layerz": 3}, r"config\.json with num_layerz describes no network"),
        ({"features": None}, "with features describes no network"),
        ({"dropout_rate": "x"}, "with dropout_rate describes no network"),
        ({"config": 3}, "with config describes no network"),
        ({"precision": jnp.bfloat16}, "give a Precision"),
        ({"precision": "bfloat16"}, "precision is 'bfloat16'; give a Precision"),
        ({"rng": 0, "strict": False}, "rng is 0; give a key"),
        ({"sharding": "data"}, "sharding is 'data'; give a Sharding"),
        ({"sharding": PartitionSpec("data")}, "give a Sharding"),
        ({"architecture": []}, "is not supported; give architecture="),
    ],
)
def test_options_that_are_none_are_refused_by_name(gpt2, options, message):
    with pytest.raises(ValueError, match=message):
        load(gpt2[0], **options)


@pytest.mark.parametrize("architectures", [[[]], [{}], [3]])
def test_a_name_of_an_architecture_that_is_no_text_is_refused(tmp_path, gpt2, architectures):
    folder = change(tmp_path / "changed", gpt2[0], architectures=architectures)
    with pytest.raises(ValueError, match=r"config\.json: architecture .* is not supported"):
        load(folder)


@pytest.mark.parametrize("fields", [{"num_layers": 3}, {"num_layers": 1}, {"num_outputs": 5}])
def test_own_arrays_are_not_given_to_another_network(tmp_path, gpt2, fields):
    save(tmp_path / "own", gpt2[1])
    with pytest.raises(ValueError, match=f"{next(iter(fields))} cannot be given for a network"):
        load(tmp_path / "own", **fields)


def test_variables_of_another_network_are_not_written(tmp_path):
    trained = network(GPT2, TOKENS)
    for variables, message in (
        (jax.tree.map(lambda x: 1.0, trained.variables), "is a float; give variables that are"),
        (jax.eval_shape(lambda: trained.variables), "is a ShapeDtypeStruct; give variables"),
    ):
        with pytest.raises(ValueError, match=message):
            save(tmp_path / "x", PretrainedNetwork(GPT2, variables))
    deep = GPT2.clone(num_layers=3)
    other = jax.tree.map(lambda x: x[None], trained.variables)
    for module, variables, message in (
        (deep, trained.variables, r"layer_2/.* None in the variables and \(8,\) in TransformerLM"),
        (GPT2, {}, "None in the variables"),
        (GPT2, other, r"\(1, 8, 8\) in the variables"),
    ):
        with pytest.raises(ValueError, match=message):
            save(tmp_path / "x", PretrainedNetwork(module, variables), layout="torch")
    extra = {**trained.variables, "cache": {"index": jnp.zeros(3)}}
    with pytest.raises(ValueError, match="cache/index"):
        save(tmp_path / "x", PretrainedNetwork(GPT2, extra), layout="torch")
    assert not any(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(tmp_path, gpt2, monkeypatch):
    files = []
    write = saving.write_safetensors

    def full(file, *args):
        files.append(file)
        if len(files) == 3:
            file.write_bytes(b"cut")
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        write(file, *args)

    monkeypatch.setattr(saving, "write_safetensors", full)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path / "network", gpt2[1], max_shard_bytes=500)
    assert len(files) == 3 and not any(tmp_path.iterdir())
