"""The autoencoder experiment with tiny networks on handwritten digits."""

import dataclasses

import jax
import numpy as np
import pytest
import scipy.linalg
import scipy.special
from event_files import events
from PIL import Image
from stopping import stopped_at

import jaxnets as jn
from experiments import code_measures, probes
from experiments.autoencoder import RECIPES, Config, ImageAutoencoder
from experiments.harness.problem import member
from experiments.harness.run_folder import RunError
from experiments.harness.training import run
from jaxnets.data.datasets.images import ImageDataset
from jaxnets.tools import read_result
from jaxnets.tools.pictures import grids

SHORT = {
    "steps": 6,
    "steps_per_dispatch": 3,
    "log_every": 3,
    "eval_every": 6,
    "checkpoint_every": 3,
    "pictures_every": 3,
    "batch_size": 16,
    "latent": 3,
    "active": 0,
    "codebook": 8,
    "embedding": 4,
    "bound_samples": 3,
    "bound_images": 20,
    "probe_labels": 40,
}
KINDS = ("dense", "conv", "denoising", "sparse", "vae", "beta-vae", "vq-vae")


@pytest.fixture(autouse=True)
def few_digits(monkeypatch):
    whole = jn.data.digits()
    train, test = (
        {name: array[:count] for name, array in part.items()}
        for part, count in ((whole.train, 200), (whole.test, 50))
    )
    dataset = ImageDataset("few digits", train, test, whole.class_names, whole.mean, whole.std)
    monkeypatch.setattr("jaxnets.data.digits", lambda: dataset)
    return dataset


def options(kind="dense", **changes):
    recipe = RECIPES[kind]
    widths = (4, 6) if recipe.coder == "conv" else (8,)
    return dataclasses.replace(recipe, **{**SHORT, "widths": widths, **changes})


def train(out, kind="dense", **changes):
    return run("autoencoder", options(kind, out=out, **changes), ImageAutoencoder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_writes_its_result_and_images(kind, tmp_path):
    result = train(tmp_path, kind, seeds=2)
    assert read_result(tmp_path) == result
    assert result["kind"] == kind and len(result["values"]) == 2
    assert {"probe_code", "probe_pixels", "probe_pca"} <= set(result)
    names = ["codes", "curves", "reconstructions", "interpolations", "anomalies"]
    if kind in ("vae", "beta-vae"):
        names += ["samples", "latent_walk"]
        assert (result["metric"], result["unit"]) == ("test loss", "nats per image")
        parts = result["reconstruction"] + result["divergence"]
        assert result["value"] == pytest.approx(parts, rel=1e-5)
        assert (result["bound_samples"], result["bound_images"]) == (3, 20)
        assert -2 * result["value"] < result["evidence_lower_bound"] < 0
        assert -2 * result["value"] < result["importance_weighted_bound"] < 0
    else:
        assert (result["metric"], result["unit"]) == ("test error", "squared error per pixel")
    if kind == "vq-vae":
        assert 1 <= result["perplexity"] <= result["codebook"] == 8
    elif kind == "denoising":  # its input is corrupted
        gain = result["psnr_restored"] - result["psnr_noisy"]
        assert result["psnr_gain"] == pytest.approx(gain, abs=1e-3)
        assert "below_pca" not in result
    else:
        below = 1 - result["squared_error"] / result["pca_squared_error"]
        assert result["below_pca"] == pytest.approx(below, abs=1e-3)
    for name in names:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name
    frames = sorted(path.name for path in (tmp_path / "progress").iterdir())
    assert frames == ["00000003.png", "00000006.png"]
    with Image.open(tmp_path / "progress.gif") as film:
        assert film.n_frames == 2


@pytest.mark.slow
def test_a_conditional_binarized_vae_is_warmed_up(tmp_path):
    changes = {"conditional": True, "binarize": True, "kl_warmup": 0.5, "coder": "conv"}
    result = train(tmp_path, "vae", **changes, widths=(4, 6), executor="jit")
    assert result["dataset"] == "few digits (binarized)"
    assert "probe_code" not in result, "codes made from the labels"
    problem = ImageAutoencoder(options("vae", **changes, widths=(4, 6)))
    state = member(problem.create_states(), 0)
    for expected in (0.0, 1 / 3, 2 / 3, 1.0, 1.0):
        state, _ = jax.jit(problem.train_step())(state, problem.eval_batches[0])
        assert state.model_state["hyperparameters"]["beta"] == pytest.approx(expected)
    for part in (problem.train, problem.test):
        assert set(np.unique(part["inputs"])) == {0, 255}
    drawn = problem.scaled(problem.dataset.train, jax.random.key(0), True)["inputs"]
    assert set(np.unique(drawn)) == {0.0, 1.0}
    gray = problem.dataset.train["inputs"] / 255
    assert np.mean(drawn) == pytest.approx(np.mean(gray), abs=0.01)


def test_the_value_is_the_error_of_the_reconstructions(monkeypatch):
    monkeypatch.setattr(code_measures, "codes", lambda *_: {})
    problem = ImageAutoencoder(options("dense", seeds=2))
    states = problem.create_states()
    images = problem.images(problem.test)
    reconstruct = jax.jit(lambda state: problem.module.apply(state.variables, images).outputs)
    for index, value in enumerate(problem.measure(states).values):
        outputs = np.asarray(reconstruct(member(states, index)))
        assert value == pytest.approx(np.mean((outputs - images) ** 2), rel=1e-4)


def logistic_loss_at_zero(images):
    """Return the loss of pixels in [-1, 1] whose bins are 2 / 255 wide, with scale 1."""
    upper = np.where(images > 1 - 1e-6, np.inf, images + 1 / 255)
    lower = np.where(images < -1 + 1e-6, -np.inf, images - 1 / 255)
    return -np.log(scipy.special.expit(upper) - scipy.special.expit(lower))


#: Loss per pixel where all outputs are 0.
LOSSES_AT_ZERO = {
    "gaussian": lambda images: images**2 / 2 + np.log(2 * np.pi) / 2,
    "logistic": logistic_loss_at_zero,
    "bernoulli": lambda images: np.full(images.shape, np.log(2)),
}


@pytest.mark.parametrize("likelihood", LOSSES_AT_ZERO)
def test_every_likelihood_reads_images_in_its_range(likelihood, monkeypatch):
    problem = ImageAutoencoder(options("vae", likelihood=likelihood))
    images = problem.images(problem.test)
    np.testing.assert_allclose(problem.shown(images), problem.test["inputs"] / 255, atol=1e-6)
    assert images.min() == (-1 if likelihood == "logistic" else 0)
    monkeypatch.setattr(code_measures, "codes", lambda *_: {})
    monkeypatch.setattr(code_measures, "bound", lambda *_: {})
    shapes = jax.eval_shape(problem.create_states)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes.params)
    keys, steps = jax.random.split(jax.random.key(0), 1), np.zeros(1, np.int32)
    states = dataclasses.replace(shapes, params=zeros, opt_state=(), rng=keys, step=steps)
    # With parameters of 0 the posterior is the prior and all outputs are 0.
    measured = problem.measure(states)
    assert measured.details["divergence"] == 0
    expected = np.mean(LOSSES_AT_ZERO[likelihood](images.astype(float)).sum(axis=(1, 2, 3)))
    assert measured.values == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["jit", "pmap", "sharded"])
def test_every_executor_trains_the_same_networks(executor, tmp_path):
    # The plain kind, which draws no noise.
    scanned = train(tmp_path / "scan", seeds=2)
    other = train(tmp_path / executor, seeds=2, executor=executor)
    assert other["values"] == pytest.approx(scanned["values"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vae", "vq-vae"])
def test_a_stopped_run_ends_bitwise_as_one_that_was_not(kind, tmp_path, monkeypatch):
    whole = train(tmp_path / "whole", kind, executor="jit", pictures_every=2)
    with stopped_at(3, monkeypatch):
        train(tmp_path / "stopped", kind, executor="jit", pictures_every=2)
    result = train(tmp_path / "stopped", kind, executor="jit", pictures_every=2, resume=True)
    assert result["parameters_sha256"] == whole["parameters_sha256"]
    for frame in (tmp_path / "whole" / "progress").iterdir():
        assert frame.read_bytes() == (tmp_path / "stopped" / "progress" / frame.name).read_bytes()


def test_the_preset_is_the_example_of_pytorch():
    problem = ImageAutoencoder(RECIPES["pytorch-example"])
    config = problem.config
    assert problem.module.config.features == (400,) and problem.module.latent_size == 20
    assert isinstance(problem.module.likelihood, jn.Bernoulli)
    assert (config.batch_size, config.learning_rate, config.epochs) == (128, 1e-3, 10)
    assert (config.weight_decay, config.schedule, config.kl_warmup) == (0.0, "constant", 0.0)


def test_principal_components_are_those_of_the_singular_values():
    vectors = np.random.default_rng(0).normal(size=(30, 6)) @ np.diag([3, 2, 1, 0.5, 0.1, 0.1])
    mean, components = probes.principal_components(vectors, 2)
    np.testing.assert_allclose(components @ components.T, np.eye(2), atol=1e-8)
    _, values, _ = scipy.linalg.svd(vectors - vectors.mean(axis=0))
    left = vectors - mean - (vectors - mean) @ components.T @ components
    assert np.sum(left**2) == pytest.approx(np.sum(values[2:] ** 2))


def test_a_linear_probe_finds_what_is_linear_and_nothing_else():
    random = np.random.default_rng(0)
    codes, test = random.normal(size=(300, 4)), random.normal(size=(500, 4))
    linear = [(x[:, 0] * 100 > x[:, 1] * 100).astype(int) for x in (codes, test)]
    assert probes.linear_probe(codes, linear[0], test, linear[1]) > 0.97
    crossed = [(x[:, 0] * x[:, 1] > 0).astype(int) for x in (codes, test)]
    assert probes.linear_probe(codes, crossed[0], test, crossed[1]) < 0.65


def test_a_grid_shows_each_image_at_its_place(tmp_path):
    images = np.linspace(0, 1, 6).reshape(2, 3, 1, 1, 1) * np.ones((2, 3, 28, 28, 3))
    grids.grid(images, tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == (2 * 58, 3 * 58, 3)
    for row, column in np.ndindex(2, 3):
        inside = pixels[58 * row + 1 : 58 * row + 57, 58 * column + 1 : 58 * column + 57]
        assert (inside == round(255 * (3 * row + column) / 5)).all()
    assert grids.arrange(np.zeros((10, 4, 4, 1))).shape == (3, 3, 4, 4, 1)
    assert grids.arrange(np.zeros((10, 4, 4, 1)), 5).shape == (2, 5, 4, 4, 1)


def test_decibels_by_hand():
    clean = np.zeros((2, 2, 2, 1))
    decibels = probes.signal_to_noise(clean + np.array([0.1, 1.0]).reshape(2, 1, 1, 1), clean)
    np.testing.assert_allclose(decibels, [20, 0], atol=1e-8)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("dense", {"binarize": True}, "--binarize does not fit --kind dense --likelihood squared"),
        ("vq-vae", {"conditional": True}, "--conditional does not fit --kind vq-vae"),
        ("vae", {"active": 2}, "--active does not fit --kind vae"),
        ("dense", {"coder": "conv"}, "--kind dense has --coder dense, not conv"),
        ("vae", {"kl_warmup": 1.5}, r"--kl-warmup is 1\.5"),
        ("vae", {"latent": 0}, "--latent is 0; give a number above 0"),
        ("conv", {"widths": (4,) * 4}, "give 1 to 3 widths"),
        ("conv", {"tied": True}, "tied weights with kind='convolutional'"),
        ("vq-vae", {"codebook": 2000}, "2000 codes is bigger than the data: 200 images have 800"),
        ("vq-vae", {"codebook": 100}, "bigger than the 64 vectors of a batch"),
        ("sparse", {"active": 4}, "num_active is 4; give 1 to latent_size, 3"),
    ],
)
def test_impossible_options_are_named(kind, changes, message, tmp_path):
    with pytest.raises((RunError, ValueError), match=message):
        train(tmp_path, kind, **changes)


def test_the_options_have_a_recipe_for_every_kind():
    assert list(RECIPES) == [*KINDS, "pytorch-example"]
    assert all(isinstance(recipe, Config) for recipe in RECIPES.values())
    assert [RECIPES[kind].kind for kind in KINDS] == list(KINDS)


@pytest.mark.slow
def test_tensorboard_shows_the_pictures_and_the_parameters(tmp_path):
    train(tmp_path, "vae", tensorboard=True)
    logged = events(tmp_path / "tensorboard")
    steps = {name: [step for step, *_ in shown] for name, shown in logged.items()}
    assert steps["pictures/progress"] == [3, 6]
    for name in ("samples", "reconstructions", "curves"):
        assert steps[f"pictures/{name}"] == [6]
    assert any(name.startswith("params/") for name in steps)
