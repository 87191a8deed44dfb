"""What the image classification experiments share: options, training of a population, result."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxnets as jn
from experiments import command_line, figures
from experiments.models import ModelName, make_model, prefers_map
from experiments.run_folder import RunFolder, environment


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of an image classification experiment."""

    model: ModelName = "cnn"
    """Network; its recipe sets the defaults shown here."""
    preset: str | None = None
    """Named recipe instead of the model's own; --help lists them."""
    epochs: float = 10.0
    """Passes over the training set."""
    steps: int | None = None
    """Training steps; overrides --epochs."""
    seeds: int = 1
    """Number of networks, trained at once as a population in one program."""
    seed: int = 0
    """Seed of the first network; the others count up from it."""
    executor: Literal["scan", "jit", "pmap", "sharded"] = "scan"
    """scan: data on the device, many steps a dispatch; pmap, sharded: several devices."""
    steps_per_dispatch: int = 50
    """Steps in one dispatch of the scan executor."""
    batch_size: int = 128
    """Examples per step and network."""
    optimizer: Literal["adamw", "sgd", "rmsprop", "lion", "muon"] = "adamw"
    """sgd has Nesterov momentum 0.9."""
    learning_rate: float = 2e-3
    """Peak rate: linear warm-up over the first 15% of the steps, then cosine decay to 0."""
    weight_decay: float = 0.05
    """Decoupled weight decay of kernels (adamw, lion, muon), or L2 penalty (sgd, rmsprop)."""
    label_smoothing: float = 0.0
    """Weight of the uniform distribution in the training labels."""
    average_decay: float = 0.0
    """Decay of the averaged parameters that are evaluated; 0 evaluates the last ones."""
    crop: int = 0
    """Random crop after padding by this many pixels."""
    flip: bool = False
    """Random horizontal flip."""
    cutout: int = 0
    """Side of a random square set to the mean colour."""
    mixup: float = 0.0
    """Alpha of mixup; 0 is off."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Dtype of matrix products and activations."""
    log_every: int = 50
    """Steps between rows of the log."""
    eval_every: int | None = None
    """Steps between evaluations on the test set, for the curves only; by default once an epoch."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; by default once an epoch."""
    tensorboard: bool = False
    """Write TensorBoard event files into the run folder too."""
    data: Path | None = None
    """Folder of the data set; by default it is searched for (see `python -m jaxnets doctor`)."""
    out: Path = Path("runs")
    """Folder of this run."""
    resume: bool = False
    """Continue an unfinished run."""


def main(
    name: str, load: Callable[[Config], jn.data.ImageDataset], recipes: Mapping[str, Config]
) -> None:
    """Run an experiment from the command line; the last line printed is its result as JSON.

    Args:
        name: of the experiment, also the default run folder.
        load: makes the data set.
        recipes: named options; those called like a model are that model's defaults.
    """
    recipes = {
        key: dataclasses.replace(recipe, out=Path("runs") / f"{name}_{key}")
        for key, recipe in recipes.items()
    }
    config = command_line.parse(name, recipes)
    with command_line.errors_without_traceback():
        result = run(name, config, load)
    print(json.dumps(result))


def run(
    name: str, config: Config, load: Callable[[Config], jn.data.ImageDataset]
) -> dict[str, Any]:
    """Train, evaluate and write the run folder.

    Args:
        name: of the experiment.
        config: its options.
        load: makes the data set.

    Returns:
        The content of `result.json`.
    """
    command_line.check(config)
    folder = RunFolder(config.out)
    finished = folder.open(config, resume=config.resume)
    if finished is not None:
        print(f"{folder.path} is finished; nothing to do", file=sys.stderr)
        return finished
    dataset = load(config)
    problem = Problem(config, dataset)
    states, history = jn.resume(folder.checkpoints, problem.create_states())
    writers = [jn.jsonl_writer(folder.metrics)]
    if config.tensorboard:
        writers.append(jn.tensorboard_writer(folder.path / "tensorboard"))
    began = time.perf_counter()
    states, history = jn.fit(
        problem.executor(),
        states,
        problem.batches(),
        num_steps=problem.num_steps,
        hooks=[
            jn.every(
                config.eval_every or problem.steps_per_epoch,
                jn.evaluation(problem.eval_step(), problem.test_batches, prefix="test"),
            ),
            jn.Checkpointing(
                folder.checkpoints, every=config.checkpoint_every or problem.steps_per_epoch, keep=2
            ),
        ],
        writers=writers,
        log_every=config.log_every,
        history=history,
    )
    if history.interrupted:
        raise command_line.Stopped(f"stopped by {history.stopped}; go on with --resume")
    print(
        f"trained {config.seeds} network(s) for {problem.num_steps} steps: first call "
        f"{history.first_call_seconds:.1f} s (compilation), the others {history.seconds:.1f} s",
        file=sys.stderr,
    )
    measured = problem.measure(states)
    result = summarize(name, config, dataset, problem, states, history, measured)
    result["wall_seconds"] = round(time.perf_counter() - began, 2)
    draw(folder, dataset, problem, states, history, measured)
    folder.write("result.json", result)
    interval = "" if result["ci95"] is None else f" +- {result['ci95']:.2%} over the seeds (95%)"
    print(
        f"test accuracy {result['value']:.2%}{interval}; figures in {folder.path}", file=sys.stderr
    )
    return result


class Problem:
    """A data set, a network and an optimizer put together as the options say.

    Attributes:
        num_steps: of the whole run.
        steps_per_epoch: full batches in the training set.
        test_batches: the padded batches of the test set, on the device.
    """

    def __init__(self, config: Config, dataset: jn.data.ImageDataset) -> None:
        self.config, self.dataset = config, dataset
        self.module = make_model(config.model, dataset, config.precision)
        num_examples = len(dataset.train["labels"])
        self.steps_per_epoch = max(num_examples // config.batch_size, 1)
        self.num_steps = config.steps or max(round(config.epochs * self.steps_per_epoch), 1)
        self.loop = "map" if prefers_map(config.model) else "vmap"
        batches = jn.data.sequential_batches(dataset.test, min(1000, len(dataset.test["labels"])))
        self.test_batches = [jax.device_put(batch) for batch in batches(0)]
        self.objective = jn.with_batch_transform(
            jn.classification(self.module, label_smoothing=config.label_smoothing), self._transform
        )
        self.update = jn.Update(self.objective, self._optimizer())

    def _transform(self, batch: jn.Batch, rng: jax.Array, train: bool) -> jn.Batch:
        """Normalise, and augment while training."""
        config, data = self.config, jn.data
        images, labels = batch["inputs"], batch["labels"]
        keys = jax.random.split(rng, 4)
        if train and config.crop:  # on the raw pixels: what comes in at the border is black
            images = data.random_crop(keys[0], images, config.crop)
        if train and config.flip:
            images = data.random_flip(keys[1], images)
        images = data.normalize(images, self.dataset.mean, self.dataset.std)
        if train and config.cutout:  # after normalisation: zero is the mean colour
            images = data.cutout(keys[2], images, config.cutout)
        if train and config.mixup:
            one_hot = jax.nn.one_hot(labels, self.dataset.num_classes)
            images, labels = data.mixup(keys[3], images, one_hot, config.mixup)
        return {**batch, "inputs": images, "labels": labels}

    def _optimizer(self) -> optax.GradientTransformation:
        config = self.config
        warmup = max(1, round(0.15 * self.num_steps))
        rate = optax.warmup_cosine_decay_schedule(
            0.0, config.learning_rate, warmup, max(self.num_steps, warmup + 1)
        )
        mask, decay = jn.decay_mask, config.weight_decay
        penalty = optax.add_decayed_weights(decay, mask=mask)
        optimizer = {
            "adamw": lambda: optax.adamw(rate, weight_decay=decay, mask=mask),
            "lion": lambda: optax.lion(rate, weight_decay=decay, mask=mask),
            "muon": lambda: optax.contrib.muon(
                rate, weight_decay=decay, weight_decay_mask=mask, adam_weight_decay=decay
            ),
            "sgd": lambda: optax.chain(penalty, optax.sgd(rate, momentum=0.9, nesterov=True)),
            "rmsprop": lambda: optax.chain(penalty, optax.rmsprop(rate)),
        }[config.optimizer]()
        if config.average_decay:
            return jn.with_parameter_average(optimizer, config.average_decay)
        return optimizer

    def create_states(self) -> jn.TrainState:
        """Initialise the population: every leaf has a leading axis of seeds."""
        example = jnp.zeros((1, *self.dataset.image_shape))

        def create(seed: jax.Array) -> jn.TrainState:
            keys = jn.rng_streams(jax.random.key(seed), "params", "run")
            variables = self.module.init(keys["params"], example)
            return jn.create_train_state(variables, self.update, rng=keys["run"])

        return jax.jit(jax.vmap(create))(self._seeds())

    def _seeds(self) -> np.ndarray:
        return np.arange(self.config.seed, self.config.seed + self.config.seeds)

    def batches(self) -> jn.BatchSource:
        """Every network's own order of examples, so that each equals its run alone."""
        config, train = self.config, self.dataset.train
        if config.executor == "scan":
            count = len(train["labels"])
            order = jn.data.member_batches(
                [jn.data.index_batches(count, config.batch_size, seed=s) for s in self._seeds()]
            )
            return jn.data.chunked(order, config.steps_per_dispatch)
        source = jn.data.member_batches(
            [jn.data.shuffled_batches(train, config.batch_size, seed=s) for s in self._seeds()]
        )
        # pmap and sharded split each batch over the devices themselves, from the host.
        return jn.data.prefetch(source) if config.executor == "jit" else source

    def executor(self) -> jn.Executor:
        """Compile the one step as the options say."""
        step = jn.population_step(
            jn.make_train_step(self.update), shared_batch=False, loop=self.loop
        )
        if self.config.executor == "scan":
            return jn.resident_steps(step, self.dataset.train, donate=True)
        if self.config.executor == "pmap":
            return jn.pmap_step(step, batch_axis=1, donate=True)
        if self.config.executor == "sharded":
            spec = jax.sharding.PartitionSpec(None, jn.DATA_AXIS)
            return jn.sharded_step(step, jn.data_mesh(), batch_spec=spec, donate=True)
        return jn.jit_step(step, donate=True)

    def eval_step(
        self, measures: Mapping[str, Any] | None = None
    ) -> Callable[[jn.TrainState, jn.Batch], jn.Metrics]:
        """Compile the evaluation of the whole population."""
        objective = jn.with_batch_transform(
            jn.classification(self.module, measures=measures), self._transform
        )
        step = jn.population_step(jn.make_eval_step(objective), loop=self.loop)
        return jax.jit(lambda states, batch: step(self._evaluated(states), batch))

    def _evaluated(self, states: jn.TrainState) -> jn.TrainState:
        if not self.config.average_decay:
            return states
        return dataclasses.replace(states, params=jn.averaged_parameters(states))

    def measure(self, states: jn.TrainState) -> dict[str, Any]:
        """Evaluate the final networks on the test set: per seed, and the confusion of all."""
        measures = {
            "accuracy": jn.metrics.accuracy,
            "confusion": jn.metrics.confusion_matrix,
            "calibration": jn.metrics.calibration,
        }
        step = self.eval_step(measures)
        batches = [jax.device_get(step(states, batch)) for batch in self.test_batches]
        total = jax.tree.map(lambda *parts: np.sum(parts, axis=0), *batches)
        members = [
            jax.tree.map(lambda x, m=member: x[m], total) for member in range(self.config.seeds)
        ]
        return {
            "accuracy": np.array([float(m["accuracy"].compute()) for m in members]),
            "loss": np.array([float(m["loss"].compute()) for m in members]),
            "macro_f1": np.array(
                [float(jn.metrics.precision_recall_f1(m["confusion"])["macro_f1"]) for m in members]
            ),
            "calibration_error": np.array(
                [float(jn.metrics.expected_calibration_error(m["calibration"])) for m in members]
            ),
            "confusion": np.mean([m["confusion"].total for m in members], axis=0),
        }

    def probabilities(self, states: jn.TrainState) -> np.ndarray:
        """Class probabilities [test examples, num_classes], averaged over the networks."""

        @jax.jit
        def predict(states: jn.TrainState, batch: jn.Batch) -> jax.Array:
            inputs = self._transform(batch, jax.random.key(0), False)["inputs"]

            def one(state: jn.TrainState) -> jax.Array:
                return jax.nn.softmax(self.module.apply(state.variables, inputs))

            return jnp.mean(jax.lax.map(one, self._evaluated(states)), axis=0)

        batches = [np.asarray(predict(states, batch)) for batch in self.test_batches]
        return np.concatenate(batches)[: len(self.dataset.test["labels"])]


def summarize(
    name: str,
    config: Config,
    dataset: jn.data.ImageDataset,
    problem: Problem,
    states: jn.TrainState,
    history: jn.History,
    measured: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """Return the content of `result.json`."""
    value, interval = jn.metrics.confidence_interval(measured["accuracy"])
    size = sum(leaf.size for leaf in jax.tree.leaves(states.params)) // config.seeds
    return {
        "experiment": name,
        "dataset": dataset.name,
        "model": config.model,
        "metric": "test accuracy",
        "value": round(value, 6),
        "ci95": None if interval is None else round(interval, 6),
        "values": [round(float(v), 6) for v in measured["accuracy"]],
        "seeds": config.seeds,
        "steps": problem.num_steps,
        "parameters": size,
        "test_loss": round(float(measured["loss"].mean()), 6),
        "macro_f1": round(float(measured["macro_f1"].mean()), 6),
        "calibration_error": round(float(measured["calibration_error"].mean()), 6),
        "train_seconds": round(history.seconds + history.first_call_seconds, 2),
        "compile_seconds": round(history.first_call_seconds, 2),
        "parameters_sha256": jn.parameters_sha256(states.params),
        **environment(),
    }


def draw(
    folder: RunFolder,
    dataset: jn.data.ImageDataset,
    problem: Problem,
    states: jn.TrainState,
    history: jn.History,
    measured: Mapping[str, np.ndarray],
) -> None:
    """Write the figures of the run."""
    panels = {"loss": ("loss", "test/loss"), "accuracy": ("accuracy", "test/accuracy")}
    figures.curves(history, panels, folder.path / "curves.png")
    figures.confusion(measured["confusion"], dataset.class_names, folder.path / "confusion.png")
    figures.mistakes(
        dataset.test["inputs"],
        dataset.test["labels"],
        problem.probabilities(states),
        dataset.class_names,
        folder.path / "mistakes.png",
    )
