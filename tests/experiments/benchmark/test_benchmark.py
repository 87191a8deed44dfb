"""The benchmark: turns, ratios and reports by hand, processes, command line."""

import dataclasses
import json
import pathlib
import sys

import jax
import numpy as np
import pytest

from experiments.benchmark import __main__ as command
from experiments.benchmark import chart, driver, report, worker
from experiments.benchmark.competitors import COMPETITORS, ON_REQUEST, REFERENCE, Competitor
from experiments.benchmark.sides import Settings
from experiments.benchmark.workloads import NUM_BATCHES, WORKLOADS, shrink
from experiments.harness.run_folder import RunError

ROOT = pathlib.Path(__file__).parents[3]
MLP = shrink(WORKLOADS["mlp"])


class Scripted:
    """A process that answers with given times and records its commands."""

    def __init__(self, name, turns, commands):
        self.name, self.turns, self.commands = name, iter(turns), commands

    def ask(self, command, **arguments):
        self.commands.append((self.name, command))
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
        self.commands.append((self.name, "close"))


def competitor(name, packages=()):
    return Competitor(name, "none", frozenset({"train"}), packages=packages)


def scripted(turns, rounds, **extra):
    commands = []
    measured = driver.measure(
        MLP,
        [competitor(name) for name in turns] + list(extra.pop("more", [])),
        lambda one: Scripted(one.name, turns[one.name], commands),
        **{"rounds": rounds, "seconds": 1.0, "pause": 0.0, **extra},
    )
    return measured, commands


TURNS = {
    "jaxnets": [[0.010, 0.012, 0.011], [0.010, 0.010, 0.013]],
    "flax": [[0.020], [0.025]],
    "torch": [[0.022, 0.022], [0.022, 0.044]],
    "torch-fused": [[0.016], [0.016]],
}


def test_competitors_take_turns():
    _, commands = scripted(TURNS, 2)
    names = list(TURNS)
    prepared = [(name, step) for name in names for step in ("prepare", "first")]
    turns = [(name, "turn") for name in names]
    ends = [(name, step) for step in ("finish", "close") for name in names]
    assert commands == prepared + 2 * turns + ends


def test_ratios_are_of_the_medians_and_spread_over_the_rounds():
    measured, _ = scripted(TURNS, 2)
    competitors = measured["competitors"]
    # The six times in order: 10, 10, 10, 11, 12, 13 ms.
    assert competitors["jaxnets"]["median"] == pytest.approx(0.0105)
    assert competitors["jaxnets"]["rounds"] == pytest.approx([0.011, 0.010])
    assert competitors["flax"]["median"] == pytest.approx(0.0225)
    ratios = report.compare(measured)
    assert set(ratios) == {"flax", "torch", "torch-fused", report.BEST_TORCH}
    flax = ratios["flax"]
    low, high = 0.010 / 0.025, 0.011 / 0.020
    assert (flax["low"], flax["high"]) == pytest.approx((low, high))
    assert flax["ratio"] == pytest.approx((low + high) / 2)
    best = ratios[report.BEST_TORCH]
    assert best["which"] == "torch-fused" and best["ratio"] == pytest.approx(0.0105 / 0.016)


def test_a_competitor_that_fails_or_is_missing_is_left_out_and_the_others_continue():
    turns = {"jaxnets": TURNS["jaxnets"], "flax": [[0.02], "ended with code -9"]}
    told = []
    more = [competitor("keras", packages=("json", "no_such_package"))]
    measured, commands = scripted(turns, 2, more=more, tell=told.append)
    assert list(measured["competitors"]) == ["jaxnets"]
    assert measured["left_out"] == {
        "keras": "no_such_package is not installed",
        "flax": "ended with code -9",
    }
    assert ("flax", "close") in commands and ("flax", "finish") not in commands
    assert "mlp: keras is left out: no_such_package is not installed" in told
    assert report.compare(measured) == {}


def test_the_table_has_every_measurement():
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


def test_processes_compute_one_at_a_time(tmp_path, monkeypatch):
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
    assert json.loads((out / "result.json").read_text()).items() >= result.items()
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
    with pytest.raises(RunError, match="contains a run with rounds = 2, not 3"):
        command.run(dataclasses.replace(config, rounds=3))


def test_an_interrupted_run_resumes_with_the_remaining_workloads(tmp_path, monkeypatch):
    measured, _ = scripted(TURNS, 2)
    measured["ratios"] = report.compare(measured)
    commands = []

    def measure(name, config, folder):
        commands.append(name)
        if name == "gpt" and not config.resume:
            raise KeyboardInterrupt
        return measured

    monkeypatch.setattr(command, "_measure", measure)
    config = command.Config(workloads=("mlp", "gpt"), out=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        command.run(config)
    with pytest.raises(RunError, match="continue it with --resume"):
        command.run(config)
    result = command.run(dataclasses.replace(config, resume=True))
    assert commands == ["mlp", "gpt", "gpt"] and list(result["workloads"]) == ["mlp", "gpt"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workloads": ("mpl",)}, "unknown workload 'mpl'; choose from mlp, cnn"),
        ({"against": ("tensorflow",)}, "unknown competitor 'tensorflow'"),
        ({"workloads": ("embed",)}, "embed needs a folder .* name it with --pretrained"),
        ({"rounds": 0}, "--rounds 0"),
        ({"seconds": 0.0}, "--seconds 0"),
        ({"threads": 10_000}, "--threads is 10000"),
        ({"against": ("jaxnets-before",)}, "name its folder with --before"),
        ({"before": pathlib.Path("nowhere")}, "--before nowhere is no checkout"),
    ],
)
def test_impossible_options_are_named(changes, message, tmp_path):
    with pytest.raises(RunError, match=message):
        command.run(dataclasses.replace(command.Config(out=tmp_path), **changes))


def test_another_checkout_runs_its_own_code(tmp_path):
    folder = tmp_path / "experiments" / "benchmark"
    folder.mkdir(parents=True)
    for package in (folder, folder.parent):
        (package / "__init__.py").touch()
    answer = "print(json.dumps([line.strip(), json.loads(sys.argv[1])]), flush=True)"
    (folder / "worker.py").write_text(f"import json, sys\nfor line in sys.stdin: {answer}")
    settings = Settings("side", "", "mlp", threads=1, platform="cpu", tiny=True)
    worker = driver.Worker(settings, tmp_path / "log", folder=tmp_path)
    received, known = worker.ask("prepare")
    assert received == '{"command": "prepare"}'
    # Without those that are the defaults: the other code may not know them.
    assert known == {"module": "side", "variant": "", "name": "mlp", "threads": 1, "tiny": True}
    worker.close()


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU here")
def test_without_a_gpu_the_gpu_workloads_are_refused():
    with pytest.raises(RuntimeError, match="JAX finds no gpu, only cpu"):
        worker.check_platform("gpu", jax)
    worker.check_platform("gpu", None)  # not imported, as in the process of torch
    worker.check_platform("cpu", jax)


def test_a_gpu_has_workloads_of_its_own(tmp_path, monkeypatch):
    commands = []

    def measure(name, config, folder):
        commands.append(name)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_measure", measure)
    for platform in ("cpu", "gpu"):
        with pytest.raises(KeyboardInterrupt):
            command.run(command.Config(platform=platform, out=tmp_path / platform))
    assert commands == ["mlp", "mlp-4096"]


def test_a_process_without_an_answer_is_dropped(tmp_path):
    settings = Settings("time", "", "mlp", threads=1)
    process = driver.Worker(settings, tmp_path / "log", patience=0.0)
    with pytest.raises(driver.LeftOut, match="no answer to 'prepare' within 0 s"):
        process.ask("prepare")
    process.close()


def test_the_chart_has_room_for_one_workload_and_for_many(tmp_path):
    measured, _ = scripted(TURNS, 2)
    for count in (1, 7):
        chart.draw({str(index): measured for index in range(count)}, tmp_path / f"{count}.png")
        assert (tmp_path / f"{count}.png").read_bytes().startswith(b"\x89PNG")


def test_times_are_shown_with_three_digits():
    assert report.duration(0.00271828) == "2.72 ms"
    assert report.duration(3.3e-5) == "0.0330 ms"
    assert report.duration(123.4) == "123 s"


def test_labels_differ_from_batch_to_batch_and_inputs_do_not():
    labels = WORKLOADS["mlp"].labels()
    assert labels.shape == (NUM_BATCHES, 128) and len(np.unique(labels, axis=0)) == NUM_BATCHES
    np.testing.assert_array_equal(WORKLOADS["gpt"].inputs(), WORKLOADS["gpt"].inputs())


def test_matmuls_are_split_in_float32_training_only_and_on_request():
    taking = [name for name, each in WORKLOADS.items() if COMPETITORS[ON_REQUEST].takes_part(each)]
    assert {"mlp", "gpt", "lstm"} <= set(taking)
    assert not {"gpt-bf16", "cnn-infer-1", "vae", "generate"} & set(taking)
    assert ON_REQUEST not in command.Config().against


def test_every_workload_has_competitors_that_take_part():
    for name, workload in WORKLOADS.items():
        taking = [one.name for one in COMPETITORS.values() if one.takes_part(workload)]
        assert REFERENCE in taking and (len(taking) > 2 or name == "positions"), name
        assert workload.steps_per_call % workload.steps_per_dispatch == 0
        assert workload.steps_per_fit % workload.steps_per_dispatch == 0
