"""Every side of the benchmark on small shapes: equal networks, decreasing losses."""

import importlib
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from checks import mostly_slow
from sentence_networks import save_encoder, write_modules

from experiments.benchmark import flax_networks, inputs, jaxnets_side, reading
from experiments.benchmark.architectures import (
    BidirectionalGRU,
    Llama,
    RecurrentLanguage,
    SentenceFolder,
)
from experiments.benchmark.competitors import COMPETITORS
from experiments.benchmark.sides import Settings, read_idx
from experiments.benchmark.workloads import NUM_BATCHES, NUM_SENTENCES, WORKLOADS, shrink
from jaxnets.data import ImageDataset

SIDES = ("jaxnets", "flax")
PEERS = ("torch", "keras", "equinox")
#: See test_generative.
GENERATIVE = ("vae", "dcgan")
#: And those whose network or weights are files.
NOT_IN_TORCH = (
    *GENERATIVE,
    *(name for name, each in WORKLOADS.items() if isinstance(each.network, Llama | SentenceFolder)),
)
TRAINED = ("cnn", "gpt-bf16", "lstm", "resnet18", "vit", "bigru", "small-mlp")
TAKING_PART = [
    pytest.param(
        *(name, side),
        marks=[pytest.mark.slow] * (name != "small-mlp") + [pytest.mark.parity] * (side in PEERS),
    )
    for name in TRAINED
    for side in (*SIDES, *PEERS)
    if COMPETITORS[side].takes_part(WORKLOADS[name])
]


def prepare(side, name, variant="", **files):
    settings = Settings("", variant, name, threads=1, tiny=True, **files)
    return importlib.import_module(f"experiments.benchmark.{side}_side").prepare(settings)


def size(module, workload):
    inputs = jax.ShapeDtypeStruct((1, *workload.network.input_shape), workload.inputs().dtype)
    shapes = jax.eval_shape(module.init, jax.random.key(0), inputs)["params"]
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def size_in_jaxnets(workload, side="jaxnets"):
    """Return the parameters of our network and a side's second biases of recurrent layers."""
    network = workload.network
    count = size(jaxnets_side.build(network, jaxnets_side.jn.Precision()), workload)
    if isinstance(network, RecurrentLanguage) and side == "torch":
        count += network.num_layers * 4 * network.hidden
    if isinstance(network, BidirectionalGRU) and side in ("torch", "keras"):
        count += 2 * 2 * network.hidden
    return count


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "side"), TAKING_PART)
def test_every_side_has_the_same_parameters_and_its_loss_decreases(name, side):
    if COMPETITORS[side].missing():
        pytest.skip(f"{side} is not installed")
    # The other libraries need the promotion that the tests forbid.
    with jax.numpy_rank_promotion("raise" if side in SIDES else "allow"):
        prepared = prepare(side, name)
        assert prepared.num_parameters == size_in_jaxnets(shrink(WORKLOADS[name]), side)
        # Whole rounds of the batches, so that every loss is of the same batch.
        first, *_, last = (prepared.run(NUM_BATCHES) for _ in range(20))
    assert last < first


@pytest.mark.parametrize("name", TRAINED)
def test_the_networks_of_full_size_have_the_same_parameters(name):
    workload = WORKLOADS[name]
    expected = size_in_jaxnets(workload)
    assert size(flax_networks.build(workload.network, "float32"), workload) == expected


@pytest.mark.parity
@pytest.mark.parametrize("name", [name for name in WORKLOADS if name not in NOT_IN_TORCH])
def test_the_networks_of_full_size_have_the_same_parameters_in_torch(name):
    torch = pytest.importorskip("torch")
    from experiments.benchmark.torch_networks import build

    workload = WORKLOADS[name]
    with torch.device("meta"):
        model = build(workload.network)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert num_parameters == size_in_jaxnets(workload, "torch")


@pytest.mark.parity
@pytest.mark.parametrize("name", [name for name in TRAINED if name != "gpt-bf16"] + ["gpt2-bf16"])
def test_torch_creates_nothing_off_the_device_of_the_inputs(name):
    """A tensor on another device is an error on a GPU; here the device "meta" represents one."""
    torch = pytest.importorskip("torch")
    from torch.utils import _python_dispatch, _pytree

    from experiments.benchmark.torch_networks import build
    from experiments.benchmark.torch_side import _inputs

    class OnlyMeta(_python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            result = operation(*args, **(kwargs or {}))
            for leaf in _pytree.tree_leaves((args, result)):
                if isinstance(leaf, torch.Tensor):
                    assert leaf.device.type == "meta", operation
            return result

    workload = WORKLOADS[name]
    with torch.device("meta"):
        model = build(workload.network)
    inputs = _inputs(workload, torch.device("meta"))
    with OnlyMeta():
        assert model(inputs).shape[-1] == workload.network.num_outputs


@pytest.mark.parity
def test_transformers_generates_as_many_tokens():
    pytest.importorskip("transformers")
    prepared = prepare("transformers", "generate")
    assert prepared.run(1) is None
    assert prepared.num_parameters == size_in_jaxnets(shrink(WORKLOADS["generate"]))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The files of the small LLaMA, and its number of parameters."""
    network, folder = shrink(WORKLOADS["smollm2-8"]).network, tmp_path_factory.mktemp("llama")
    inputs.write_llama(network, folder)
    return str(folder), sum(int(np.prod(shape)) for shape in network.tensors.values())


@pytest.mark.parametrize(
    "side", ["jaxnets", pytest.param("transformers", marks=pytest.mark.parity)]
)
def test_every_side_generates_with_the_weights_of_the_folder(side, llama):
    folder, num_parameters = llama
    prepared = prepare(side, "smollm2-8", pretrained=folder)
    assert prepared.run(1) is None
    assert prepared.num_parameters == num_parameters


@pytest.mark.parametrize(
    ("side", "variant"), [("jaxnets", ""), ("files", "raw"), ("files", "package")]
)
@pytest.mark.parametrize("name", ["weights", "weights-cold"])
def test_every_side_reads_the_file_of_the_folder(name, side, variant, llama):
    folder, num_parameters = llama
    prepared = prepare(side, name, variant, pretrained=folder)
    prepared.before()
    assert prepared.run(2) is None and prepared.num_parameters == num_parameters
    assert list(prepared.details()) == ["MiB above what stays"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """The files of a small sentence encoder, and its number of parameters."""
    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "film"]
    _, variables = save_encoder(folder / "network", words, max_length=16)
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    pooling = {"pooling_mode": "mean", "embedding_dimension": 8}
    write_modules(folder / "network", kinds, pooling=pooling)
    (folder / "sentences.txt").write_text("a good film\n" * 40 + "film")
    files = {"pretrained": str(folder / "network"), "sentences": str(folder / "sentences.txt")}
    return files, sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


@pytest.mark.parametrize(
    ("side", "unused"),
    # BERT's pooler is in the network of torch.
    [("jaxnets", 0), pytest.param("sentence_transformers", 8 * 8 + 8, marks=pytest.mark.parity)],
)
@pytest.mark.filterwarnings("ignore")
def test_every_side_embeds_the_sentences_of_the_file(side, unused, encoder):
    if side != "jaxnets":
        pytest.importorskip(side)
    files, num_parameters = encoder
    prepared = prepare(side, "embed", **files)
    assert prepared.run(2) is None
    assert prepared.num_parameters == num_parameters + unused


def test_the_sentences_are_the_first_ones_of_sst(tmp_path, monkeypatch):
    texts = [f"film {number}" for number in range(NUM_SENTENCES + 5)]
    sst = types.SimpleNamespace(train=types.SimpleNamespace(texts=texts))
    monkeypatch.setattr(inputs.text, "sst2", lambda folder: sst)
    found = inputs.files(WORKLOADS["embed"], None, Path("encoder"), tmp_path)
    lines = Path(found["sentences"]).read_text(encoding="utf-8").split("\n")
    assert lines == texts[:NUM_SENTENCES] and found["pretrained"] == "encoder"


def test_the_peak_of_memory_counts_what_does_not_stay():
    def make():
        passing = np.ones(8 << 20)  # 64 MiB
        time.sleep(0.1)
        return np.ones(len(passing) // 4)

    assert 30 << 20 < reading.peak_above(make) < 100 << 20


def test_handwritten_scans_equal_single_steps():
    one, several = prepare("flax", "small-mlp"), prepare("flax", "small-mlp", "scan")
    assert several.run(2) == pytest.approx(one.run(2), rel=1e-5)
    one, several = (prepare("flax", "population-64-64-10", variant) for variant in ("", "scan"))
    assert several.run(2) == pytest.approx((one.run(1) + one.run(1)) / 2, rel=1e-5)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    "name", mostly_slow(["population-64-64-10", "population-cnn"], ["population-64-64-10"])
)
def test_the_loss_of_populations_decreases(side, name):
    prepared = prepare(side, name)
    first = prepared.run(prepared.steps_first)
    assert prepared.run(4 * NUM_BATCHES) < first


@pytest.mark.parametrize("side", SIDES)
def test_inference_runs(side):
    assert prepare(side, "cnn-infer-256").run(2) is None


@pytest.mark.slow
def test_generation_runs():
    assert prepare("jaxnets", "generate").run(1) is None


def test_generation_by_position_compiles_nothing_after_the_first_calls():
    prepared = prepare("jaxnets", "positions")
    for _ in range(3):
        prepared.run(1)
    details = prepared.details()
    assert details["programs compiled after the first calls"] == 0
    assert list(details["ms a token by position"]) == ["0 to 3", "3 to 5"]


@pytest.mark.parametrize("side", SIDES)
def test_an_epoch_starts_from_the_files(side, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 64, np.uint8)
    images = np.repeat(labels * 20, 784).reshape(64, 28, 28)
    paths = {"images": str(tmp_path / "images"), "labels": str(tmp_path / "labels")}
    for name, array in (("images", images), ("labels", labels)):
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
        (tmp_path / name).write_bytes(header + array.tobytes())
    np.testing.assert_array_equal(read_idx(paths["images"]), images)

    def load(folder, download):
        assert folder == tmp_path and not download
        arrays = {"inputs": images[..., None], "labels": labels.astype(np.int32)}
        return ImageDataset("brightness", arrays, arrays, tuple("0123456789"), (0.5,), (0.5,))

    monkeypatch.setattr("jaxnets.data.fashion_mnist", load)
    prepared = prepare(side, "epoch", **paths)
    # Each call trains from the initial parameters.
    assert prepared.run(4) == prepared.run(4)
