"""The GAN experiment with tiny networks on the digits of scikit-learn."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image
from stopping import stopped_at

import jaxnets as jn
from experiments import gan
from experiments.harness.problem import member
from experiments.harness.run_folder import RunError
from experiments.harness.training import run
from experiments.real_features import RealFeatures
from jaxnets.data import digits
from jaxnets.tools import read_result
from jaxnets.tools.pictures import grids

SHORT = {
    "steps": 4,
    "steps_per_dispatch": 2,
    "log_every": 2,
    "eval_every": 2,
    "checkpoint_every": 2,
    "batch_size": 8,
    "width": 4,
    "latent_size": 3,
    "samples": 60,
    "classifier_epochs": 1,
}


def config(out, preset="dcgan", **changes):
    options = {"dataset": "digits", **SHORT, "out": out, **changes}
    return dataclasses.replace(gan.RECIPES[preset], **options)


def train(out, preset="dcgan", **changes):
    return run("gan", config(out, preset, **changes), gan.make_problem)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    return out, train(out, seeds=2, conditional=True)


@pytest.mark.slow
def test_a_run_writes_metrics_for_every_seed_and_the_floor(finished):
    out, result = finished
    assert read_result(out) == result
    assert result["metric"] == "classifier-feature distance"
    for name in ("precision", "recall", "class_coverage", "class_agreement", "least_class_share"):
        assert len(result[name]) == 2 and all(0 <= value <= 1 for value in result[name])
    # Untrained generators are farther from test images than training images are.
    assert 0 < result["floor"] < min(result["values"])
    assert result["measured_images"] == 60 and 0.3 < result["classifier_accuracy"] <= 1
    assert result["floor_precision"] > max(result["precision"])


@pytest.mark.slow
def test_a_run_writes_grids_an_animation_interpolations_and_curves(finished):
    out, _ = finished
    grids = ["samples/step_00000002.png", "samples/step_00000004.png"]
    names = ["samples_seed_0.png", "samples_seed_1.png", "real.png", "walk.png", "curves.png"]
    for name in [*grids, *names]:
        assert (out / name).read_bytes().startswith(b"\x89PNG"), name
    assert sorted(p.name for p in (out / "samples").iterdir()) == [n.split("/")[1] for n in grids]
    seeds = [np.asarray(Image.open(out / name)) for name in names[:2]]
    assert seeds[0].shape == seeds[1].shape and np.any(seeds[0] != seeds[1])
    last = np.asarray(Image.open(out / grids[1]))
    np.testing.assert_array_equal(last, seeds[0])
    with Image.open(out / "training.gif") as animation:
        assert animation.n_frames == 2


@pytest.mark.slow
def test_the_log_has_both_networks_and_the_held_out_loss(finished):
    rows = [json.loads(line) for line in (finished[0] / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]
    for row in rows:
        for name in ("discriminator/loss", "generator/loss", "test/loss", "test/accuracy"):
            assert len(row[name]) == 2 and np.isfinite(row[name]).all()


@pytest.mark.slow
def test_each_seed_of_a_population_equals_its_solo_run(finished, tmp_path):
    solo = train(tmp_path, seed=1, conditional=True)
    assert solo["values"][0] == pytest.approx(finished[1]["values"][1], rel=1e-3)


@pytest.mark.slow
def test_an_unfinished_run_resumes_to_bitwise_the_same(finished, tmp_path, monkeypatch):
    with stopped_at(2, monkeypatch):
        train(tmp_path, seeds=2, conditional=True)
    result = train(tmp_path, seeds=2, conditional=True, resume=True)
    assert result["parameters_sha256"] == finished[1]["parameters_sha256"]
    assert result["values"] == finished[1]["values"]
    for name in ("step_00000002.png", "step_00000004.png"):
        again, before = ((out / "samples" / name).read_bytes() for out in (tmp_path, finished[0]))
        assert again == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("resnet", {"conditional": True}),
        ("wgan-gp", {"critics": 2}),
        ("r3gan", {"conditional": True}),
        ("dcgan", {"norm": "batch", "loss": "least_squares", "upsampling": "transposed"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_recipe_runs_to_its_end(preset, changes, tmp_path):
    result = train(tmp_path, preset, average_decay=0.0, steps=2, **changes)
    assert np.isfinite(result["value"]) and result["steps"] == 2
    assert ("class_agreement" in result) == bool(changes.get("conditional"))


def test_the_averaged_generator_has_batch_statistics_of_its_own_images(tmp_path):
    problem = gan.make_problem(config(tmp_path, seeds=2))
    states = problem.create_states()
    average = jax.tree.map(lambda x: 2 * x, states.opt_state["generator"].average)
    own = states.opt_state["generator"]._replace(average=average)
    states = dataclasses.replace(states, opt_state={**states.opt_state, "generator": own})
    for seed, variables in enumerate(problem.generators(states)):
        jax.tree.map(
            np.testing.assert_array_equal, variables["params"]["generator"], member(average, seed)
        )
        before = np.asarray(problem.recalibration_latents) @ np.asarray(
            variables["params"]["generator"]["start"]["kernel"]
        )
        variance = before.reshape(-1, variables["params"]["generator"]["start_norm"]["scale"].size)
        running = variables["batch_stats"]["generator"]["start_norm"]["var"]
        left = 0.9**50  # the weight of the initial value, 1
        np.testing.assert_allclose(running, variance.var(axis=0) + left, rtol=0.15)


def test_the_discriminator_has_its_own_learning_rate_and_number_of_updates(tmp_path):
    problem = gan.make_problem(
        config(tmp_path, critics=2, learning_rate=1e-3, generator_rate=0.0, average_decay=0.0)
    )
    updates = problem.update
    assert [update.wrt for update in updates] == ["discriminator"] * 2 + ["generator"]
    states = problem.create_states()
    batch = next(iter(jn.data.shuffled_batches(problem.dataset.train, 8, seed=0)(0)))
    step = jn.jit_step(jn.make_train_step(updates))
    before = member(states, 0)
    after, metrics = step(step(before, batch)[0], batch)
    for one, two in zip(
        jax.tree.leaves(before.params["generator"]),
        jax.tree.leaves(after.params["generator"]),
        strict=True,
    ):
        np.testing.assert_array_equal(one, two)
    moved = jax.tree.map(
        lambda one, two: np.any(one != two),
        before.params["discriminator"]["conv_1"],
        after.params["discriminator"]["conv_1"],
    )
    assert all(jax.tree.leaves(moved)) and float(metrics["discriminator/loss"].count) == 16


def test_a_classifier_with_a_checkpoint_is_restored_and_not_trained_again(tmp_path, monkeypatch):
    first = RealFeatures.load(digits(), tmp_path, num_images=30, epochs=1)

    def trained(*arguments, **keywords):
        raise AssertionError("the classifier is trained again")

    monkeypatch.setattr("experiments.real_features.jn.resident_steps", lambda *a, **k: trained)
    again = RealFeatures.load(digits(), tmp_path, num_images=30, epochs=1)
    np.testing.assert_array_equal(first.test.features, again.test.features)
    assert first.floor() == again.floor()
    images = digits().test["inputs"][:30]
    np.testing.assert_array_equal(first.of(images).features, first.test.features)


@pytest.mark.slow
def test_a_classifier_with_a_damaged_checkpoint_is_trained_again(tmp_path):
    first = RealFeatures.load(digits(), tmp_path, num_images=30, epochs=1)
    (manifest,) = tmp_path.glob("step_*/manifest.json")
    manifest.write_bytes(manifest.read_bytes()[:-9])
    with pytest.warns(UserWarning, match=r"manifest\.json .*; the classifier is trained again"):
        again = RealFeatures.load(digits(), tmp_path, num_images=30, epochs=1)
    np.testing.assert_array_equal(first.test.features, again.test.features)
    assert RealFeatures.load(digits(), tmp_path, num_images=30, epochs=1).floor() == first.floor()


def test_generated_images_are_mapped_back_to_the_pixels_of_training():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    np.testing.assert_array_equal(grids.to_pixels(np.asarray(gan.centered(levels)), -1, 1), levels)
    assert grids.to_pixels(np.array([-1.5, 1.5]), -1, 1).tolist() == [0, 255]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "batch", "r1": 1.0}, "--norm batch has no gradient per image"),
        ({"r1": -1.0}, "--r1 is -1.0; give 0 or more"),
        ({"critics": 0}, "--critics is 0"),
        ({"loss": "gan"}, "unknown loss 'gan'"),
        ({"latent_size": 0}, "--latent-size is 0"),
        ({"average_decay": 1.0}, "decay is 1.0"),
        ({"samples": 0}, "--samples is 0"),
    ],
)
def test_impossible_options_are_named(changes, message, tmp_path):
    with pytest.raises((RunError, ValueError), match=message):
        train(tmp_path, **changes)
