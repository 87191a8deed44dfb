"""Writers, and the images and histograms that hooks return to them."""

import json
import math
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from event_files import events
from loop_problem import make_state, source, train_step

import jaxnets as jn
from jaxnets.training.loop import fit
from jaxnets.training.media import Histogram, Image
from jaxnets.training.writers import jsonl_writer, tensorboard_writer, wandb_writer


def draw(step, state, metrics):
    """Return all that a hook may return: a number, one per member, an image, a histogram."""
    return {
        "x/one": step,
        "x/list": [step, 2 * step],
        "x/image": Image(np.full((4, 6), 0.5, np.float32)),
        "x/histogram": Histogram.of([0.0, 1.0, 1.0], num_bins=2),
    }


class FakeWandb(types.ModuleType):
    """The part of wandb that the writer uses."""

    def __init__(self):
        super().__init__("wandb")
        self.logged, self.options, self.finished = [], None, 0

    def init(self, **options):
        self.options = options
        return types.SimpleNamespace(log=self._log, finish=self._finish)

    def Image(self, pixels):
        return "image", pixels.shape, pixels.dtype

    def Histogram(self, *, np_histogram):
        counts, edges = np_histogram
        return "histogram", counts.tolist(), edges.tolist()

    def _log(self, values, *, step):
        self.logged.append((step, values))

    def _finish(self):
        self.finished += 1


def test_the_jsonl_log_is_strict_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    hook = lambda step, state, metrics: {"x/nan": math.nan, "x/list": [1.0, math.inf]}  # noqa: E731
    writers = [jsonl_writer(path)]
    with pytest.warns(RuntimeWarning, match="is NaN or infinite"):
        fit(train_step, make_state(), source, num_steps=1, hooks=[hook], writers=writers)

    def refuse(constant):
        raise AssertionError(constant)

    row = json.loads(path.read_text(), parse_constant=refuse)
    assert row["x/nan"] is None and row["x/list"] == [1.0, None]


def test_images_and_histograms_are_in_no_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    _, history = fit(
        train_step, make_state(), source, num_steps=2, hooks=[draw], writers=[jsonl_writer(path)]
    )
    assert [set(row) >= {"x/one", "x/list"} for row in history.rows] == [True, True]
    assert not any("image" in name or "histogram" in name for row in history.rows for name in row)
    assert [json.loads(line) for line in path.read_text().splitlines()] == history.rows
    json.dumps(history.to_json())


def test_a_hook_that_returns_only_images_adds_no_row():
    only = lambda step, state, metrics: {"image": Image(np.zeros((2, 2)))}  # noqa: E731
    _, history = fit(train_step, make_state(), source, num_steps=4, log_every=4, hooks=[only])
    assert [row["step"] for row in history.rows] == [4]


def test_tensorboard_gets_every_number_image_and_histogram(tmp_path):
    pytest.importorskip("tensorboardX")
    fit(
        train_step,
        make_state(),
        source,
        num_steps=4,
        log_every=2,
        hooks=[draw],
        writers=[tensorboard_writer(tmp_path)],
    )
    found = events(tmp_path)
    assert [(step, value) for step, _, value in found["x/list/1"]] == [
        (1, 2),
        (2, 4),
        (3, 6),
        (4, 8),
    ]
    assert [step for step, _, _ in found["loss"]] == [2, 4]
    assert "residual" in found
    step, kind, image = found["x/image"][-1]
    assert (step, kind, image.height, image.width) == (4, "image", 4, 6)
    _, kind, histogram = found["x/histogram"][0]
    assert kind == "histo"
    assert (histogram.min, histogram.max, histogram.num) == (0, 1, 3)
    assert [count for count in histogram.bucket if count] == [1, 2]


def test_tensorboard_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"jaxnets\[tensorboard\]"):
        tensorboard_writer(tmp_path)


def test_wandb_gets_the_same(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    writer = wandb_writer(project="digits", config={"width": 8})
    assert fake.options is None  # `fit` starts the run
    fit(
        train_step,
        make_state(),
        source,
        num_steps=2,
        log_every=2,
        hooks=[draw],
        writers=[writer],
    )
    assert fake.options == {"project": "digits", "config": {"width": 8}}
    assert fake.finished == 1
    steps = [step for step, _ in fake.logged]
    assert steps == sorted(steps)  # Weights & Biases does not accept an earlier step
    merged = {}
    for step, values in fake.logged:
        merged.setdefault(step, {}).update(values)
    assert set(merged[2]) > set(merged[1]) and "loss" in merged[2]
    assert (merged[1]["x/one"], merged[1]["x/list/0"], merged[1]["x/list/1"]) == (1, 1, 2)
    assert merged[1]["x/image"] == ("image", (4, 6), np.uint8)
    assert merged[1]["x/histogram"] == ("histogram", [1, 2], [0.0, 0.5, 1.0])


def test_wandb_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"jaxnets\[wandb\]"):
        wandb_writer()


@pytest.mark.parametrize(
    ("pixels", "complaint"),
    [
        (np.zeros((2, 28, 28, 1)), "join several images"),
        (np.zeros((28, 28, 2)), "1, 3 or 4 channels"),
        (np.zeros((28, 28), int), "uint8, or floats"),
    ],
)
def test_images_of_other_shapes_and_dtypes_are_refused(pixels, complaint):
    with pytest.raises(ValueError, match=complaint):
        Image(pixels)


def test_pixels_outside_the_range_are_clipped():
    pixels = Image(jnp.array([[-1.0, 0.0, 0.5, 2.0, jnp.nan]])).as_uint8()
    assert pixels[0, :, 0].tolist() == [0, 0, 128, 255, 0]


class TestHistogramHooks:
    module = jn.MLP(features=(4,), num_outputs=3)
    update = jn.Update(jn.classification(module), optax.sgd(0.5))
    step = staticmethod(jn.make_train_step(update))
    init = staticmethod(jax.jit(module.init))
    batch = {  # noqa: RUF012
        "inputs": np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32),
        "labels": np.arange(6) % 3,
    }

    def state(self, seed=0):
        key = jax.random.key(seed)
        variables = self.init(key, np.zeros((1, 5), np.float32))
        return jn.create_train_state(variables, self.update, rng=key)

    def test_every_parameter_is_counted_as_numpy_counts_it(self):
        state = self.state()
        found = jn.parameter_histograms(num_bins=8)(1, state, {})
        assert set(found) == {
            f"params/{layer}/{name}"
            for layer in ("hidden_0", "head")
            for name in ("bias", "kernel")
        }
        kernel = np.asarray(state.params["hidden_0"]["kernel"])
        expected, edges = np.histogram(kernel, 8)
        assert found["params/hidden_0/kernel"].counts.tolist() == expected.tolist()
        np.testing.assert_allclose(found["params/hidden_0/kernel"].edges, edges, rtol=1e-6)

    def test_a_constant_and_values_that_are_not_finite_are_counted_too(self):
        params = {"same": jnp.zeros(3), "odd": jnp.array([0.0, 1.0, jnp.nan, jnp.inf])}
        state = types.SimpleNamespace(params={**params, "none": jnp.array([jnp.nan])})
        found = jn.parameter_histograms(num_bins=2)(1, state, {})
        assert found["params/same"].counts.sum() == 3
        assert found["params/odd"].counts.tolist() == [1, 1]
        assert found["params/none"].counts.sum() == 0
        for histogram in found.values():
            assert np.all(np.diff(histogram.edges) > 0)

    def test_gradients_are_those_of_the_train_step(self):
        state = self.state()
        after, _ = jax.jit(self.step)(state, self.batch)
        taken = jax.tree.map(lambda old, new: (old - new) / 0.5, state.params, after.params)
        gradients = jax.jit(self.step.gradients)(state, self.batch)
        for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(taken), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)
        found = jn.gradient_histograms(self.step, self.batch)(1, state, {})
        edges = found["gradients/head/kernel"].edges
        assert edges[0] == pytest.approx(float(gradients["head"]["kernel"].min()), rel=1e-5)
        assert found["gradients/head/kernel"].counts.sum() == 12

    def test_members_of_a_population_are_counted_together(self):
        members = [self.state(seed) for seed in range(3)]
        states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
        found = jn.gradient_histograms(self.step, self.batch)(1, states, {})
        assert found["gradients/head/kernel"].counts.sum() == 3 * 12
        assert jn.parameter_histograms()(1, states, {})["params/head/bias"].counts.sum() == 3 * 3

    def test_every_network_of_a_step_with_several_updates_has_its_gradients(self):
        pair = jn.dcgan((8, 8, 1), width=4, latent_size=3)
        objectives = jn.adversarial(pair)
        updates = [
            jn.Update(objectives.discriminator, optax.sgd(0.1), wrt="discriminator"),
            jn.Update(objectives.generator, optax.sgd(0.1), wrt="generator"),
        ]
        batch = {"inputs": jnp.zeros((2, 8, 8, 1))}

        def create(key):
            variables = pair.init(key, jnp.zeros((2, 3)))
            return jn.create_train_state(variables, updates, rng=key)

        step = jn.make_train_step(updates)
        state = jax.eval_shape(create, jax.random.key(0))
        shapes = jax.eval_shape(step.gradients, state, batch)
        assert jax.tree.structure(shapes) == jax.tree.structure(dict(state.params))
