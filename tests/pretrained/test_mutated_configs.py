"""A damaged config.json is an error that names the file, whatever is wrong in it."""

import copy
import functools
import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import shapes_of

import jaxnets as jn
from jaxnets import transformer
from jaxnets.pretrained import PretrainedNetwork, load, save
from jaxnets.pretrained import network as loading
from jaxnets.pretrained.architectures import ARCHITECTURES
from jaxnets.pretrained.config import Config

TOKENS = jax.ShapeDtypeStruct((1, 3), jnp.int32)
SIZES = {"num_layers": 2, "features": 8, "num_heads": 2, "mlp_dim": 12}
DECODER = {**SIZES, "vocabulary_size": 11, "num_kv_heads": 1}
BLOCK = transformer.BlockConfig(features=8, num_heads=2, mlp_dim=12, key_bias=True)
HUGE = 10**9
VALUES = (None, "a text", -1, 0, 1e300, float("nan"), [], {}, True, 10**30, HUGE)


def images(*shape):
    return jax.ShapeDtypeStruct((1, *shape), jnp.float32)


def encoder(kind, architecture, **entries):
    """Return an encoder as a configuration of Hugging Face describes it."""
    content = {"model_type": kind, "architectures": [architecture], "vocab_size": 11, **entries}
    config = Config.of("config.json", content | {"max_position_embeddings": 8})
    return ARCHITECTURES[kind].classes[architecture](config, {}), [TOKENS], content


BERT_SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 12,
}
DISTILBERT_SIZES = {"n_layers": 2, "dim": 8, "n_heads": 2, "hidden_dim": 12}
NETWORKS = {
    "gpt2": (
        transformer.gpt2_small(**SIZES, vocabulary_size=11, max_length=8),
        [TOKENS],
        {},
    ),
    "llama": (
        transformer.llama3_8b(**DECODER, rope_scaling=transformer.Llama3Scaling(8.0)),
        [TOKENS],
        {},
    ),
    "qwen3": (transformer.qwen3_0_6b(**DECODER, window=3, global_every=2), [TOKENS], {}),
    "gemma2": (transformer.gemma2_2b(**DECODER), [TOKENS], {}),
    "gemma3": (
        transformer.gemma3_1b(**DECODER, rope_scaling=transformer.LinearScaling(8.0)),
        [TOKENS],
        {},
    ),
    "bert": encoder("bert", "BertForSequenceClassification", **BERT_SIZES),
    "roberta": encoder("roberta", "RobertaForMaskedLM", **BERT_SIZES),
    "distilbert": encoder("distilbert", "DistilBertForMaskedLM", **DISTILBERT_SIZES),
    "t5": (
        transformer.t5_small(11, **SIZES, head_dim=4, output_scale=8**-0.5),
        [TOKENS, TOKENS],
        {},
    ),
    "whisper": (
        transformer.whisper_tiny(11, **SIZES, num_decoder_layers=1, max_source_length=5),
        [images(8, 80), TOKENS],
        {},
    ),
    "vit": (jn.VisionTransformer(3, 2, 1, BLOCK), [images(4, 6, 1)], {"image_size": [4, 6]}),
    "deit": (jn.VisionTransformer(3, 2, 1, BLOCK, distillation="head"), [images(4, 4, 3)], {}),
    "convnext": (jn.ConvNeXt((1, 1), (4, 6), 3, patch_size=2), [images(8, 8, 1)], {}),
    "resnet": (
        jn.ResNet((1, 1), bottleneck=True, num_outputs=3, width=4),
        [images(32, 32, 1)],
        {},
    ),
}


class ReadingError(Exception):
    """Everything fits, and the data would be read now."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return the folder of a network by its name, written once."""

    @functools.cache
    def folder_of(name):
        module, inputs, config = NETWORKS[name]
        shapes, _ = shapes_of(module, *inputs)
        variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
        folder = tmp_path_factory.mktemp(name) / "network"
        save(folder, PretrainedNetwork(module, variables, config=config), layout="torch")
        return folder

    return folder_of


@pytest.fixture
def written(saved, tmp_path):
    """Return the folder of a copy and its configuration by the name of a network."""

    def copy_of(name):
        folder = shutil.copytree(saved(name), tmp_path / "network")
        return folder, json.loads((folder / "config.json").read_text())

    return copy_of


@pytest.fixture
def abstract(monkeypatch):
    """Stop before data is read, and trace each network only once."""
    trace, known = jax.eval_shape, {}

    def eval_shape(function, *args):
        if getattr(function, "__name__", "") != "init":
            return trace(function, *args)
        inputs = tuple((one.shape, one.dtype) for one in args[1:])
        key = (repr(function.__self__), inputs)
        if key not in known:
            known[key] = trace(function, *args)
        return known[key]

    def stop(*args):
        raise ReadingError

    monkeypatch.setattr(loading.rules, "read_variables", stop)
    monkeypatch.setattr(jax, "eval_shape", eval_shape)


def entries(content, above=()):
    """Return the paths of all entries, also of those inside others."""
    for name, value in content.items():
        yield (*above, name)
        if isinstance(value, dict):
            yield from entries(value, (*above, name))


def change(content, path, value):
    content = copy.deepcopy(content)
    inner = content
    for name in path[:-1]:
        inner = inner[name]
    if value == "removed":
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return content


@pytest.mark.parametrize("name", NETWORKS)
def test_a_damaged_entry_is_an_error_with_the_name_of_the_file(written, abstract, name):
    """Two values for each entry, in turn; every value meets every kind of entry that way."""
    folder, content = written(name)
    values = itertools.cycle([*VALUES, "removed"])
    for _ in range(list(NETWORKS).index(name)):
        next(values)
    refused = 0
    for path in entries(content):
        for value in itertools.islice(values, 2):
            (folder / "config.json").write_text(json.dumps(change(content, path, value)))
            try:
                load(folder)
            except ReadingError:  # it makes no difference to the arrays
                continue
            except (ValueError, OSError) as error:
                assert str(folder) in str(error), (path, value)
                assert len(str(error)) < 1500, (path, value)
                refused += 1
    assert refused > 5


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gpt2", {"n_embd": HUGE, "n_inner": HUGE, "n_positions": HUGE, "vocab_size": HUGE}),
        ("llama", {"hidden_size": HUGE, "intermediate_size": HUGE}),
        ("t5", {"d_model": HUGE, "d_ff": HUGE}),
        ("vit", {"hidden_size": HUGE}),
        ("resnet", {"hidden_sizes": [HUGE, 2 * HUGE], "embedding_size": HUGE}),
    ],
)
def test_a_huge_network_is_refused_by_the_tensors(written, name, changes):
    folder, content = written(name)
    (folder / "config.json").write_text(json.dumps({**content, **changes}))
    refusal = r"network.*(does not fit|cannot be|no tensor|describes|is more than)"
    with pytest.raises(ValueError, match=refusal):
        load(folder)


@pytest.mark.parametrize(
    ("name", "entry", "value"),
    [
        ("gpt2", "n_layer", HUGE),
        ("llama", "num_hidden_layers", HUGE),
        ("qwen3", "num_hidden_layers", HUGE),
        ("distilbert", "n_layers", HUGE),
        ("t5", "num_layers", HUGE),
        ("t5", "num_decoder_layers", HUGE),
        ("t5", "relative_attention_num_buckets", HUGE),
        ("whisper", "encoder_layers", HUGE),
        ("whisper", "decoder_layers", HUGE),
        ("whisper", "max_source_positions", HUGE),
        ("whisper", "d_model", HUGE),
        ("resnet", "depths", [1, HUGE]),
        ("gemma3", "num_attention_heads", HUGE),
        ("qwen3", "head_dim", HUGE),
        ("vit", "image_size", HUGE),
    ],
)
def test_sizes_beyond_those_of_the_tensors_are_refused_at_once(written, name, entry, value):
    folder, content = written(name)
    (folder / "config.json").write_text(json.dumps({**content, entry: value}))
    with pytest.raises(ValueError, match=rf"{entry}, .*is more than .*tensors of the file"):
        load(folder)
