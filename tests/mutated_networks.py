"""Folders of pretrained networks, adapters and programs, which `mutations` damages."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import gguf_networks
import jax
import jax.numpy as jnp
import numpy as np
import sentence_networks
import tokenizers
from mutations import Reader, written

import jaxnets as jn
from jaxnets.pretrained import PretrainedNetwork
from jaxnets.pretrained.processors import ImageProcessor, SoundProcessor, TextProcessor

TOKENS = jax.ShapeDtypeStruct((1, 3), jnp.int32)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "film", "##s"]
LLAMA = jn.transformer.llama3_8b(
    num_layers=1, features=8, num_heads=2, num_kv_heads=1, mlp_dim=12, vocabulary_size=11
)
GPT2 = jn.transformer.gpt2_small(
    num_layers=1, features=8, num_heads=2, vocabulary_size=11, max_length=6
)
VIT = jn.VisionTransformer(
    3, 2, 1, jn.BlockConfig(features=8, num_heads=2, mlp_dim=12, key_bias=True)
)
WHISPER = jn.transformer.whisper_tiny(
    11, num_layers=1, features=8, num_heads=2, mlp_dim=12, max_source_length=5
)

# Damage of an entry, which is JSON still, gets behind the parser.
_VALUES = (
    *(None, True, False, 0, 1, -1, 2, 3, 2**31, 2**63, 10**30, 0.5, 1e300, -1e300, float("nan")),
    *("", "a", "..", "/", "a/b", "\0", "null", [], {}, [1], [None], {"a": 1}, [[1, 2], [3]]),
)


def zeros(module: Any, *inputs: Any) -> Any:
    """Return variables of a network, all zeros."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def network(module: Any, *inputs: Any, **others: Any) -> PretrainedNetwork:
    """Return a network of zeros."""
    return PretrainedNetwork(module, zeros(module, *inputs), **others)


def below(contents: dict[str, bytes], folder: str) -> dict[str, bytes]:
    """Return the files of a folder by their names in it."""
    return {
        name.removeprefix(folder): content
        for name, content in contents.items()
        if name.startswith(folder)
    }


def saved(network: PretrainedNetwork, **options: Any) -> dict[str, bytes]:
    """Return the files of a network; the folder is not there yet when `save` writes it."""
    contents = written(lambda folder: jn.pretrained.save(folder / "network", network, **options))
    return below(contents, "network/")


def as_json(content: Any) -> bytes:
    return json.dumps(content, indent=2).encode()


def _entries(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for name, inner in items:
        yield (*above, name)
        if isinstance(inner, dict | list):
            yield from _entries(inner, (*above, name))


def _changed(content: Any, draw: random.Random) -> Any:
    """Return JSON values with one entry removed, renamed, or of another value."""
    content = copy.deepcopy(content)
    paths = list(_entries(content))
    path, other = draw.choice(paths), draw.choice(paths)
    value, inner = content, content
    for name in other:
        value = value[name]
    for name in path[:-1]:
        inner = inner[name]
    kind = draw.randrange(8)
    if kind == 0:
        del inner[path[-1]]
    elif kind == 1 and isinstance(inner, dict):
        inner[draw.choice((f"{path[-1]}_", "", "(", "a.b"))] = inner.pop(path[-1])
    elif kind == 2:
        inner[path[-1]] = copy.deepcopy(value)
    elif kind == 3 and isinstance(inner[path[-1]], int):
        inner[path[-1]] += draw.choice((-1, 1, 1000, 10**9))
    else:
        inner[path[-1]] = copy.deepcopy(draw.choice(_VALUES))
    return content


def repair_json(originals: dict[str, bytes], contents: dict[str, bytes]) -> dict[str, bytes]:
    """Replace the damage of JSON files by a change of an entry, with the digest that fits."""
    fixed = dict(contents)
    for name, content in contents.items():
        if content != originals[name] and name.endswith(".json"):
            draw = random.Random(hashlib.sha256(content).hexdigest())
            changed = json.loads(originals[name])
            for _ in range(draw.choice((1, 1, 2))):
                if not changed:
                    break
                digest = changed.pop("sha256", None) if isinstance(changed, dict) else None
                changed = _changed(changed, draw)
                if digest is not None:
                    plain = json.dumps(changed, sort_keys=True, separators=(",", ":"))
                    changed["sha256"] = hashlib.sha256(plain.encode()).hexdigest()
            fixed[name] = as_json(changed)
    return fixed


def check_network(value: Any, contents: dict[str, bytes]) -> None:
    """Check that arrays are those of the network, and that inputs can be made."""
    loaded, described = value
    assert described
    for leaf in jax.tree.leaves(loaded.variables):
        assert isinstance(leaf, jax.Array)
    if loaded.processor is None:
        return
    with contextlib.suppress(ValueError):  # of inputs that a damaged option does not allow
        if isinstance(loaded.processor, TextProcessor):
            batch = loaded.processor(["good films", "a b"], truncate=True)
            assert batch["tokens"].dtype == np.int32
        elif isinstance(loaded.processor, ImageProcessor):
            sizes = f"{loaded.processor.size} {loaded.processor.crop_size}"
            if max(map(int, re.findall(r"\d+", sizes)), default=0) < 1000:
                loaded.processor([np.zeros((3, 4, 3), np.uint8)])


def of_network(
    contents: dict[str, bytes],
    read: Callable[[Path], Any],
    check: Callable[[Any, dict[str, bytes]], None] = check_network,
) -> Reader:
    return Reader(contents, read, check, functools.partial(repair_json, contents))


def load(path: Path) -> Any:
    """Load and describe a network."""
    return jn.pretrained.load(path), str(jn.pretrained.inspect(path))


@contextlib.contextmanager
def traced_once() -> Iterator[None]:
    """Trace each network only once; most mutated files have the same one."""
    trace, known = jax.eval_shape, {}

    def eval_shape(function: Any, *arguments: Any) -> Any:
        if getattr(function, "__name__", "") != "init":
            return trace(function, *arguments)
        inputs = tuple((one.shape, one.dtype) for one in arguments[1:])
        key = (repr(function.__self__), inputs)
        if key not in known and len(known) < 50:
            known[key] = trace(function, *arguments)
        return known[key] if key in known else trace(function, *arguments)

    with mock.patch.object(jax, "eval_shape", eval_shape):
        yield


#: {name: context in which the reader works}
NETWORKS: dict[str, Callable[[], contextlib.AbstractContextManager[Reader]]] = {}


def reader(make: Callable[[], Reader]) -> None:
    """Enter a reader in the list."""

    @contextlib.contextmanager
    def context() -> Iterator[Reader]:
        with traced_once():
            yield make()

    NETWORKS[make.__name__] = context


def tokenizer_options(folder: Path) -> None:
    """Write the files beside the vocabulary of a BERT without tokenizer.json."""
    tokens = {"pad_token": "[PAD]", "cls_token": {"content": "[CLS]", "lstrip": False}}
    (folder / "special_tokens_map.json").write_bytes(as_json(tokens))
    (folder / "added_tokens.json").write_bytes(as_json({"<new>": 9}))
    options = {"do_lower_case": True, "model_max_length": 6, "tokenizer_class": "BertTokenizer"}
    (folder / "tokenizer_config.json").write_bytes(as_json(options))


def byte_pairs() -> TextProcessor:
    """Return the tokenizer of a GPT-2."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=30, special_tokens=["<unk>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(["a good film", "films of a good man"], trainer)
    special = {"unk": "<unk>", "eos": "</s>"}
    return TextProcessor(tokenizer.to_str(), special, max_length=6)


@reader
def sentence_encoder() -> Reader:
    def write(folder: Path) -> None:
        sentence_networks.save_encoder(folder / "network", WORDS, max_length=16)
        sentence_networks.write_modules(
            folder / "network",
            {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"},
            pooling={"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False},
            sentence_bert_config={"max_seq_length": 5, "do_lower_case": False},
            config_sentence_transformers={"default_prompt_name": None},
        )

    return of_network(below(written(write), "network/") | written(tokenizer_options), load)


@reader
def shards_and_tokenizer() -> Reader:
    generation = {"eos_token_id": 1, "temperature": 0.5, "bad_words_ids": [[1, 2]]}
    llama = network(LLAMA, TOKENS, processor=byte_pairs(), generation=generation)
    return of_network(saved(llama, layout="torch", max_shard_bytes=1200), load)


@reader
def own_layout() -> Reader:
    return of_network(saved(network(LLAMA, TOKENS)), load)


@reader
def images() -> Reader:
    processor = ImageProcessor(size=(4, 4), crop_size=(4, 4))
    vit = network(VIT, jax.ShapeDtypeStruct((1, 4, 4, 3), jnp.float32), processor=processor)
    return of_network(saved(vit, layout="torch"), load)


def _sounds() -> dict[str, bytes]:
    processor = SoundProcessor(jn.data.WhisperFeatures(seconds=1), byte_pairs())
    inputs = (jax.ShapeDtypeStruct((1, 8, 80), jnp.float32), TOKENS)
    generation = {"decoder_start_token_id": 5, "suppress_tokens": [7, 8]}
    whisper = network(WHISPER, *inputs, processor=processor, generation=generation)
    return saved(whisper, layout="torch")


@reader
def sounds() -> Reader:
    return of_network(_sounds(), load)


@reader
def sounds_of_transformers_5() -> Reader:
    contents = _sounds()
    options = json.loads(contents.pop("preprocessor_config.json"))
    unified = {"feature_extractor": options, "processor_class": "WhisperProcessor"}
    return of_network(contents | {"processor_config.json": as_json(unified)}, load)


@reader
def gguf() -> Reader:
    def write(folder: Path) -> None:
        jn.pretrained.save(folder / "network", network(LLAMA, TOKENS), layout="torch")
        gguf_networks.convert(folder / "network", folder / "a.gguf", tokens="abcdefghijk")

    content = written(write)["a.gguf"]
    return of_network({"a.gguf": content}, lambda folder: load(folder / "a.gguf"))


@reader
def adapter() -> Reader:
    base = network(GPT2, TOKENS)
    params = base.variables["params"]
    own = jn.lora_init(
        jax.random.key(0), params, rank=2, target="(query|output)/kernel$", full="norm"
    )

    def write(folder: Path) -> None:
        jn.pretrained.save_adapter(folder / "adapter", base, own, base_model="gpt2")

    def check(value: Any, contents: dict[str, bytes]) -> None:
        merged = jn.merge_lora(params, value)
        assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, params)

    contents = below(written(write), "adapter/")
    options = json.loads(contents["adapter_config.json"])
    options["alpha_pattern"] = {r"h\.0\.attn\.c_attn": 3, "c_proj": 5}
    contents["adapter_config.json"] = as_json(options)
    return of_network(contents, lambda folder: jn.pretrained.load_adapter(folder, base), check)


@reader
def program() -> Reader:
    module, x = jn.MLP(features=(3,), num_outputs=2), jnp.ones((1, 4))
    variables = module.init(jax.random.key(0), x)

    def write(folder: Path) -> None:
        jn.export_program(folder / "program", module, variables, x, platforms=("cpu",))

    def read(folder: Path) -> Any:
        return jn.load_program(folder)(x)

    def check(value: Any, contents: dict[str, bytes]) -> None:
        assert value.shape == (1, 2)

    return of_network(below(written(write), "program/"), read, check)
