"""The benchmark: turns, ratios and reports by hand, and every side on small shapes."""

import dataclasses
import importlib
import json
import pathlib
import sys

import jax
import numpy as np
import pytest
from checks import mostly_slow

from experiments.benchmark import __main__ as command
from experiments.benchmark import chart, driver, flax_networks, jaxnets_side, report
from experiments.benchmark.architectures import BidirectionalGRU, RecurrentLanguage
from experiments.benchmark.competitors import COMPETITORS, REFERENCE, Competitor
from experiments.benchmark.sides import Settings, read_idx
from experiments.benchmark.workloads import NUM_BATCHES, WORKLOADS, shrink
from experiments.run_folder import RunError
from jaxnets.data import ImageDataset

ROOT = pathlib.Path(__file__).parent.parent
MLP = shrink(WORKLOADS["mlp"])


class Scripted:
    """A process that answers from a list of times and notes when it is asked."""

    def __init__(self, name, turns, asked):
        self.name, self.turns, self.asked = name, iter(turns), asked

    def ask(self, command, **arguments):
        self.asked.append((self.name, command))
        if command == "turn":
            times = next(self.turns)
            if isinstance(times, str):
                raise driver.LeftOut(times)
            return {"times": times, "loss": 1.0}
        return {
            "prepare": {"import_seconds": 1.0, "prepare_seconds": 0.5, "num_parameters": 7},
            "first": {"seconds": 3.0, "loss": 2.0},
            "finish": {"peak_bytes": 300 * 2**20, "details": {}, "versions": {}},
        }[command]

    def close(self):
        self.asked.append((self.name, "close"))


def competitor(name, packages=()):
    return Competitor(name, "none", frozenset({"train"}), packages=packages)


def scripted(turns, rounds, **extra):
    asked = []
    measured = driver.measure(
        MLP,
        [competitor(name) for name in turns] + list(extra.pop("more", [])),
        lambda one: Scripted(one.name, turns[one.name], asked),
        **{"rounds": rounds, "seconds": 1.0, "pause": 0.0, **extra},
    )
    return measured, asked


TURNS = {
    "jaxnets": [[0.010, 0.012, 0.011], [0.010, 0.010, 0.013]],
    "flax": [[0.020], [0.025]],
    "torch": [[0.022, 0.022], [0.022, 0.044]],
    "torch-fused": [[0.016], [0.016]],
}


def test_competitors_take_turns():
    _, asked = scripted(TURNS, 2)
    names = list(TURNS)
    prepared = [(name, step) for name in names for step in ("prepare", "first")]
    turns = [(name, "turn") for name in names]
    ends = [(name, step) for step in ("finish", "close") for name in names]
    assert asked == prepared + 2 * turns + ends


def test_ratios_are_of_the_medians_and_spread_over_the_rounds():
    measured, _ = scripted(TURNS, 2)
    found = measured["competitors"]
    # The six times in order: 10, 10, 10, 11, 12, 13 ms.
    assert found["jaxnets"]["median"] == pytest.approx(0.0105)
    assert found["jaxnets"]["rounds"] == pytest.approx([0.011, 0.010])
    assert found["flax"]["median"] == pytest.approx(0.0225)
    ratios = report.compare(measured)
    assert set(ratios) == {"flax", "torch", "torch-fused", report.BEST_TORCH}
    flax = ratios["flax"]
    low, high = 0.010 / 0.025, 0.011 / 0.020
    assert (flax["low"], flax["high"]) == pytest.approx((low, high))
    assert flax["ratio"] == pytest.approx((low + high) / 2)
    best = ratios[report.BEST_TORCH]
    assert best["which"] == "torch-fused" and best["ratio"] == pytest.approx(0.0105 / 0.016)


def test_a_competitor_that_fails_or_is_missing_is_left_out_and_the_others_go_on():
    turns = {"jaxnets": TURNS["jaxnets"], "flax": [[0.02], "ended with code -9"]}
    told = []
    more = [competitor("keras", packages=("json", "no_such_package"))]
    measured, asked = scripted(turns, 2, more=more, tell=told.append)
    assert list(measured["competitors"]) == ["jaxnets"]
    assert measured["left_out"] == {
        "keras": "no_such_package is not installed",
        "flax": "ended with code -9",
    }
    assert ("flax", "close") in asked and ("flax", "finish") not in asked
    assert "mlp: keras is left out: no_such_package is not installed" in told
    assert report.compare(measured) == {}


def test_the_table_says_everything_there_is():
    measured, _ = scripted(TURNS, 2)
    measured["ratios"] = report.compare(measured)
    measured["left_out"] = {"keras": "keras is not installed"}
    measured["competitors"]["jaxnets"]["details"] = {"programs": 0}
    lines = report.table("mlp", measured).splitlines()
    assert lines[0].split() == (
        ["mlp", "step", "first", "call", "peak", "memory", "jaxnets", "/", "it", "(rounds)"]
    )
    assert lines[1].split() == ["jaxnets", "10.5", "ms", "3.00", "s", "300", "MiB"]
    assert lines[2].split()[:3] == ["flax", "22.5", "ms"]
    assert lines[2].endswith("300 MiB          0.47  (0.40 to 0.55)")
    assert lines[5].split() == ["best", "torch", "(torch-fused)", "0.66", "(0.62", "to", "0.69)"]
    assert lines[6:] == ["left out: keras (keras is not installed)", "jaxnets: programs 0"]
    tokens = report.table("generate", {**measured, "unit": "token"})
    assert "torch-fused: 62.5 tokens a second" in tokens


FAKE = """
import time
from experiments.benchmark.sides import ready
LIBRARIES = ("numpy",)
def prepare(settings):
    print("a library talks")
    if settings.variant == "unbuilt":
        raise RuntimeError("no compiler")
    def run(num_steps):
        if settings.variant == "killed":
            import os
            print("dying now", flush=True)
            os._exit(7)
        with open("turns", "a") as file:
            file.write(f"{settings.variant} {time.perf_counter()} ")
            time.sleep(0.002 * num_steps)
            file.write(f"{time.perf_counter()}\\n")
        return 0.5
    return ready(settings.workload, run, 11)
"""


def test_processes_of_their_own_compute_one_at_a_time(tmp_path, monkeypatch):
    (tmp_path / "fake_side.py").write_text(FAKE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{tmp_path}")
    monkeypatch.setitem(sys.modules, "__main__", command)
    fakes = {
        name: Competitor(name, "fake_side", frozenset({"train"}), name)
        for name in (REFERENCE, "other", "unbuilt", "killed")
    }
    monkeypatch.setattr(command, "COMPETITORS", fakes)
    monkeypatch.setattr(driver, "PAUSE", 0.0)
    out = tmp_path / "run"
    config = command.Config(
        workloads=("cnn",),
        against=("other", "unbuilt", "killed"),
        **{"rounds": 2, "seconds": 0.01, "tiny": True, "out": out, "threads": 1},
    )
    result = command.run(config)
    assert json.loads((out / "result.json").read_text()) == result
    assert (out / "chart.png").read_bytes().startswith(b"\x89PNG")
    measured = result["workloads"]["cnn"]
    assert measured["left_out"] == {
        "unbuilt": "RuntimeError: no compiler",
        "killed": "ended with code 7: dying now",
    }
    assert list(measured["competitors"]) == [REFERENCE, "other"]
    numbers = measured["competitors"]["other"]
    assert numbers["num_parameters"] == 11 and numbers["loss"] == 0.5
    assert numbers["versions"] == {"numpy": np.__version__}
    # 2 ms a step; more where the machine is busy.
    assert 0.002 <= numbers["median"] < 0.1 and len(numbers["rounds"]) == 2
    assert 5 * 2**20 < numbers["peak_bytes"] < 2**30
    assert set(measured["ratios"]) == {"other"}
    rows = [row.split() for row in (tmp_path / "turns").read_text().splitlines()]
    ends = [float(row[2]) for row in rows]
    assert all(end <= float(row[1]) for end, row in zip(ends, rows[1:], strict=False))
    # The same folder again is finished; another run in it is refused.
    assert command.run(config) == result
    with pytest.raises(RunError, match="holds a run with rounds = 2, not 3"):
        command.run(dataclasses.replace(config, rounds=3))


def test_an_interrupted_run_goes_on_with_the_other_workloads(tmp_path, monkeypatch):
    measured, _ = scripted(TURNS, 2)
    measured["ratios"] = report.compare(measured)
    asked = []

    def measure(name, config, folder):
        asked.append(name)
        if name == "gpt" and not config.resume:
            raise KeyboardInterrupt
        return measured

    monkeypatch.setattr(command, "_measure", measure)
    config = command.Config(workloads=("mlp", "gpt"), out=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        command.run(config)
    with pytest.raises(RunError, match="go on with --resume"):
        command.run(config)
    result = command.run(dataclasses.replace(config, resume=True))
    assert asked == ["mlp", "gpt", "gpt"] and list(result["workloads"]) == ["mlp", "gpt"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workloads": ("mpl",)}, "unknown workload 'mpl'; choose from mlp, cnn"),
        ({"against": ("tensorflow",)}, "unknown competitor 'tensorflow'"),
        ({"rounds": 0}, "--rounds 0"),
        ({"seconds": 0.0}, "--seconds 0"),
        ({"threads": 10_000}, "--threads is 10000"),
    ],
)
def test_impossible_options_are_named(changes, message, tmp_path):
    with pytest.raises(RunError, match=message):
        command.run(dataclasses.replace(command.Config(out=tmp_path), **changes))


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU here")
def test_without_a_gpu_nothing_is_measured_in_its_stead(tmp_path):
    settings = Settings(
        "experiments.benchmark.jaxnets_side", "", "mlp", threads=1, platform="gpu", tiny=True
    )
    worker = driver.Worker(settings, tmp_path / "log")
    with pytest.raises(driver.LeftOut, match="JAX finds no gpu, only cpu"):
        worker.ask("prepare")
    worker.close()


def test_a_gpu_has_workloads_of_its_own(tmp_path, monkeypatch):
    asked = []

    def measure(name, config, folder):
        asked.append(name)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_measure", measure)
    for platform in ("cpu", "gpu"):
        with pytest.raises(KeyboardInterrupt):
            command.run(command.Config(platform=platform, out=tmp_path / platform))
    assert asked == ["mlp", "mlp-4096"]


def test_a_process_that_gives_no_answer_is_given_up(tmp_path):
    settings = Settings("time", "", "mlp", threads=1)
    worker = driver.Worker(settings, tmp_path / "log", patience=0.0)
    with pytest.raises(driver.LeftOut, match="no answer to 'prepare' within 0 s"):
        worker.ask("prepare")
    worker.close()


def test_the_chart_has_room_for_one_workload_and_for_many(tmp_path):
    measured, _ = scripted(TURNS, 2)
    for count in (1, 7):
        chart.draw({str(index): measured for index in range(count)}, tmp_path / f"{count}.png")
        assert (tmp_path / f"{count}.png").read_bytes().startswith(b"\x89PNG")


def test_times_are_written_with_three_digits():
    assert report.duration(0.00271828) == "2.72 ms"
    assert report.duration(3.3e-5) == "0.0330 ms"
    assert report.duration(123.4) == "123 s"


def test_labels_differ_from_batch_to_batch_and_inputs_do_not():
    labels = WORKLOADS["mlp"].labels()
    assert labels.shape == (NUM_BATCHES, 128) and len(np.unique(labels, axis=0)) == NUM_BATCHES
    np.testing.assert_array_equal(WORKLOADS["gpt"].inputs(), WORKLOADS["gpt"].inputs())


def test_every_workload_has_competitors_that_take_part():
    for name, workload in WORKLOADS.items():
        taking = [one.name for one in COMPETITORS.values() if one.takes_part(workload)]
        assert REFERENCE in taking and (len(taking) > 2 or name == "positions"), name
        assert workload.steps_per_call % workload.steps_per_dispatch == 0
        assert workload.steps_per_fit % workload.steps_per_dispatch == 0


SIDES = ("jaxnets", "flax")
PEERS = [pytest.param(name, marks=pytest.mark.parity) for name in ("torch", "keras", "equinox")]
#: See test_benchmark_generative.
GENERATIVE = ("vae", "dcgan")
TRAINED = ("cnn", "gpt-bf16", "lstm", "resnet18", "vit", "bigru", "small-mlp")


def prepare(side, name, variant="", **files):
    settings = Settings("", variant, name, threads=1, tiny=True, **files)
    return importlib.import_module(f"experiments.benchmark.{side}_side").prepare(settings)


def size(module, workload):
    inputs = jax.ShapeDtypeStruct((1, *workload.network.input_shape), workload.inputs().dtype)
    shapes = jax.eval_shape(module.init, jax.random.key(0), inputs)["params"]
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def size_in_jaxnets(workload, side="jaxnets"):
    """The parameters of our network, and the second biases that others have in theirs."""
    network = workload.network
    count = size(jaxnets_side.build(network, jaxnets_side.jn.Precision()), workload)
    if isinstance(network, RecurrentLanguage) and side == "torch":
        count += network.num_layers * 4 * network.hidden
    if isinstance(network, BidirectionalGRU) and side in ("torch", "keras"):
        count += 2 * 2 * network.hidden
    return count


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("side", [*SIDES, *PEERS])
@pytest.mark.parametrize("name", mostly_slow(TRAINED, ["cnn", "small-mlp"]))
def test_every_side_has_the_same_parameters_and_its_loss_falls(name, side):
    if COMPETITORS[side].missing():
        pytest.skip(f"{side} is not installed")
    if not COMPETITORS[side].takes_part(WORKLOADS[name]):
        pytest.skip(f"{side} takes no part")
    # The strict promotion of the tests is not that of the peers' code.
    with jax.numpy_rank_promotion("raise" if side in SIDES else "allow"):
        prepared = prepare(side, name)
        assert prepared.num_parameters == size_in_jaxnets(shrink(WORKLOADS[name]), side)
        # Whole rounds of the batches, so that every loss is that of the same one.
        first, *_, last = (prepared.run(NUM_BATCHES) for _ in range(20))
    assert last < first


@pytest.mark.parametrize("name", TRAINED)
def test_the_networks_of_full_size_have_the_same_parameters(name):
    workload = WORKLOADS[name]
    expected = size_in_jaxnets(workload)
    assert size(flax_networks.build(workload.network, "float32"), workload) == expected


@pytest.mark.parity
@pytest.mark.parametrize("name", [name for name in WORKLOADS if name not in GENERATIVE])
def test_the_networks_of_full_size_have_the_same_parameters_in_torch(name):
    torch = pytest.importorskip("torch")
    from experiments.benchmark.torch_networks import build

    workload = WORKLOADS[name]
    with torch.device("meta"):
        model = build(workload.network)
    found = sum(parameter.numel() for parameter in model.parameters())
    assert found == size_in_jaxnets(workload, "torch")


@pytest.mark.parity
def test_transformers_writes_as_many_tokens():
    pytest.importorskip("transformers")
    prepared = prepare("transformers", "generate")
    assert prepared.run(1) is None
    assert prepared.num_parameters == size_in_jaxnets(shrink(WORKLOADS["generate"]))


def test_many_steps_by_hand_are_those_one_after_the_other():
    one, several = prepare("flax", "small-mlp"), prepare("flax", "small-mlp", "scan")
    assert several.run(2) == pytest.approx(one.run(2), rel=1e-5)
    one, several = (prepare("flax", "population-64-64-10", variant) for variant in ("", "scan"))
    assert several.run(2) == pytest.approx((one.run(1) + one.run(1)) / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("side", "name"),
    [(side, name) for side in SIDES for name in ("population-64-64-10", "population-cnn")],
)
def test_populations_learn(side, name):
    prepared = prepare(side, name)
    first = prepared.run(prepared.steps_first)
    assert prepared.run(4 * NUM_BATCHES) < first


@pytest.mark.parametrize("side", SIDES)
def test_inference_runs(side):
    assert prepare(side, "resnet18-infer-256").run(2) is None


def test_generation_runs_and_counts_its_programs():
    assert prepare("jaxnets", "generate").run(1) is None
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
    # Each call is a training of its own from the start.
    assert prepared.run(4) == prepared.run(4)
