"""The driving experiment with tiny networks and short drives."""

import dataclasses
import itertools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import jaxnets as jn
from experiments import driving as experiment
from experiments.driving_networks import (
    DrivingNetwork,
    NetworkDriver,
    make_head,
    make_network,
    to_inputs,
)
from experiments.harness.run_folder import RunError, RunFolder
from experiments.harness.training import run
from jaxnets.data import driving
from jaxnets.tools import read_result

pytest.importorskip("Box2D")
pytest.importorskip("gymnasium")
pytest.importorskip("pygame")

SHORT = {"steps": 4, "batch_size": 4, "log_every": 2, "eval_every": 4, "steps_per_dispatch": 2}
SHORT |= {"tracks": 2, "rounds": 1, "round_tracks": 2, "max_frames": 40, "test_tracks": 2}
SHORT |= {"workers": 0, "checkpoint_every": 2}


def config(model="pilotnet", **changes):
    return dataclasses.replace(experiment.RECIPES[model], **{**SHORT, **changes})


def run_driving(out, data, **changes):
    return run("driving", config(out=out, data=data, **changes), experiment.Driving)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with the drives of the expert."""
    folder = tmp_path_factory.mktemp("data")
    experiment.Driving(config(data=folder))
    return folder


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "run"
    return out, run_driving(out, data)


def test_the_parts_of_a_batch_of_windows_are_together_the_batch():
    arrays = {"speeds": np.arange(20.0), "frames": np.arange(40).reshape(20, 2)}
    pool = driving.windows(np.arange(20), 3)
    for held in (None, arrays):
        source = experiment.WindowBatches(jn.data.index_batches(len(pool), 4, seed=0), pool, held)
        parts = [source.part(index, 2)(3) for index in range(2)]
        for batch, *halves in itertools.islice(zip(source(3), *parts, strict=False), 6):
            assert batch.keys() == ({"indices"} if held is None else arrays.keys())
            for name, array in batch.items():
                np.testing.assert_array_equal(np.concatenate([h[name] for h in halves]), array)


def test_frames_of_weight_zero_do_not_count_in_the_batch_norms_of_the_encoder():
    encoder = jn.MLP((3,), num_outputs=2, norm="batch")
    network = DrivingNetwork(encoder, num_outputs=3, hidden_size=2)
    random = np.random.default_rng(0)
    frames, speeds = random.normal(size=(3, 2, 4, 4, 1)), random.normal(size=(3, 2))
    variables = jax.jit(network.init)(jax.random.key(0), frames, speeds)

    @jax.jit
    def trained(frames, speeds, weights):
        call = {"train": True, "weights": weights, "mutable": ["batch_stats"]}
        (outputs, _), changed = network.apply(variables, frames, speeds, **call)
        return outputs, changed["batch_stats"]

    outputs, statistics = trained(frames, speeds, np.array([1, 0, 1]))
    expected, expected_statistics = trained(frames[::2], speeds[::2], None)
    np.testing.assert_allclose(outputs[::2], expected, atol=1e-6)
    each_frame = trained(frames, speeds, np.array([[1, 1], [0, 0], [1, 1]]))[1]
    for found in (statistics, each_frame):
        jax.tree.map(
            lambda one, other: np.testing.assert_allclose(one, other, atol=1e-6),
            found,
            expected_statistics,
        )


@pytest.mark.slow
def test_a_run_writes_its_result_and_images(finished):
    out, result = finished
    assert read_result(out) == result
    assert result["metric"] == "test score, mean over 2 tracks" and result["unit"] == "points"
    assert result["share_of_expert"] == pytest.approx(
        result["value"] / result["expert_score"], abs=1e-3
    )
    assert 0 < result["latency_ms_median"] <= result["latency_ms_p99"]
    assert 0 <= result["frames_off_road"] <= 1 and result["score_ci95_over_tracks"] > 0
    # Two drives of the expert and two of the network, of 10 decisions each.
    assert result["decisions_recorded"] == 40
    for name in ("curves.png", "scores.png", "saliency.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    with Image.open(out / "lap.gif") as film:
        assert film.n_frames == 5
    assert "lap" in (out / "report.html").read_text()


def test_recordings_are_made_once(data):
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*.npz")}
    assert len(before) == 2  # of the expert, for training and validation
    problem = experiment.Driving(config(data=data))
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*.npz")} == before
    assert len(problem.resident["speeds"]) == 20


@pytest.mark.parametrize("damaged", ["drives_000.npz", "recordings.json"])
def test_damaged_recordings_are_made_again(data, capsys, damaged):
    (path,) = data.glob(f"driving/expert_*/{damaged}")
    before = path.read_bytes()
    path.write_bytes(before[:50] + b"!" + before[51:])
    problem = experiment.Driving(config(data=data))
    assert path.read_bytes() == before
    assert len(problem.resident["speeds"]) == 20
    assert f"{damaged}" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["nothing", "rounds"])
def test_a_run_that_was_killed_in_its_second_stage_ends_bitwise_the_same(
    data, finished, tmp_path, lost
):
    out, result = finished
    shutil.copytree(out, tmp_path / "run")
    for name in ("result.json", "report.html"):
        (tmp_path / "run" / name).unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000004")
    if lost == "rounds":  # killed while the network drove
        shutil.rmtree(tmp_path / "run" / "rounds")
    again = run_driving(tmp_path / "run", data, resume=True)
    for name in ("parameters_sha256", "value", "decisions_recorded"):
        assert again[name] == result[name], name
    (first,) = (out / "rounds").rglob("*.npz")
    (second,) = (tmp_path / "run" / "rounds").rglob("*.npz")
    assert first.read_bytes() == second.read_bytes()


def arrays(batch, window):
    random = np.random.default_rng(0)
    return {
        "frames": random.integers(0, 256, (batch, window, 84, 96, 3), np.uint8),
        "speeds": random.uniform(0, 70, (batch, window)).astype(np.float32),
        "labels": random.uniform([-0.3, 0, 0], [0.3, 0.5, 0.5], (batch, window, 3)),
        "decisions": np.tile(np.arange(window, dtype=np.int32) + 20, (batch, 1)),
    }


@pytest.mark.parametrize("head", ["gaussian", "discretized"])
@pytest.mark.parametrize("model", experiment.RECIPES)
def test_every_network_gives_the_outputs_of_its_head(model, head):
    num_outputs = make_head(head).num_outputs
    network = make_network(
        model, num_outputs, encoder="resnet", hidden_size=8, precision="bfloat16"
    )
    shapes = jax.ShapeDtypeStruct((2, 3, 84, 96, 3), jnp.float32), jnp.zeros((2, 3))
    (outputs, carry), _ = jax.eval_shape(network.init_with_output, jax.random.key(0), *shapes)
    assert outputs.shape == (2, 3, num_outputs) and outputs.dtype == jnp.float32
    expected = jax.eval_shape(lambda: network.zero_carry(2))
    assert jax.tree.map(jnp.shape, carry) == jax.tree.map(jnp.shape, expected)
    assert (carry is None) == (model in ("pilotnet", "resnet"))


def test_driving_step_by_step_equals_the_training_pass_and_a_new_drive_resets_the_carry():
    head = make_head("gaussian")
    network = make_network("gru", 6, encoder="resnet", hidden_size=8, precision="float32")
    data = arrays(2, 3)
    frames = np.zeros((2, 3, 96, 96, 3), np.uint8)
    frames[:, :, :84] = data["frames"]
    variables = jax.jit(network.init)(jax.random.key(0), to_inputs(frames), data["speeds"])
    outputs, _ = jax.jit(network.apply)(variables, to_inputs(frames), data["speeds"])
    expected = np.asarray(head.mean(outputs))
    driver = NetworkDriver(network, head, variables)
    carry = driver.start(2)
    for begins in (0, 7):  # the second time with the carry of the first drive
        for step in range(3):
            observation = driving.Observation(
                frames[:, step],
                data["speeds"][:, step],
                np.zeros((2, 3), np.float32),
                np.zeros(2, np.int32),
                np.full(2, step, np.int32),
            )
            carry, controls = driver.decide(carry, observation)
            np.testing.assert_allclose(controls, expected[:, step], atol=1e-5, err_msg=begins)


def test_frames_and_labels_are_augmented_in_training_only(data):
    problem = experiment.Driving(config(data=data, shift=1.0, turn=0.1))
    batch = arrays(3, 2)
    transform = jax.jit(problem._transform, static_argnums=2)
    plain = problem._transform(batch, jax.random.key(0), False)
    np.testing.assert_array_equal(plain["frames"], to_inputs(batch["frames"]))
    np.testing.assert_array_equal(plain["labels"], batch["labels"])
    first, second = (transform(batch, jax.random.key(seed), True) for seed in (0, 1))
    for changed in (first, second):
        assert changed["frames"].shape == plain["frames"].shape
        assert np.abs(changed["labels"][..., 0] - batch["labels"][..., 0]).max() > 0.02
    assert np.abs(first["frames"] - second["frames"]).max() > 0.1
    # While the camera zooms in, frames are mirrored but not moved.
    early = {**batch, "decisions": batch["decisions"] - 20}
    labels = np.asarray(transform(early, jax.random.key(0), True)["labels"])
    np.testing.assert_allclose(np.abs(labels), np.abs(batch["labels"]), atol=1e-5)


def test_each_seed_learns_from_its_own_rounds(data, tmp_path):
    problem = experiment.Driving(config(data=data, seeds=2))
    states = problem.create_states()
    problem.prepare(RunFolder(tmp_path), 1, states)
    own = [set(problem.pools[seed].ravel().tolist()) for seed in (0, 1)]
    assert own[0] & own[1] == set(range(20))
    assert len(own[0] | own[1]) == len(problem.resident["speeds"]) == 60


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 8}, "--batch-size 4 decisions contain no --window of 8"),
        ({"model": "gru", "window": 1}, "--window is 1; give 2 or more for --model gru"),
        ({"shadow": 1.5}, "--shadow is 1.5"),
        ({"tracks": 0}, "--tracks is 0"),
    ],
)
def test_impossible_options_are_named(changes, message, tmp_path):
    with pytest.raises(RunError, match=message):
        run_driving(tmp_path / "run", tmp_path, **changes)


def test_a_missing_simulator_is_reported_before_the_training(monkeypatch):
    def missing(**keywords):
        raise ImportError("driving needs gymnasium")

    monkeypatch.setattr(driving, "RacingCar", missing)
    with pytest.raises(RunError, match="driving needs gymnasium"):
        experiment.check_options(config())
