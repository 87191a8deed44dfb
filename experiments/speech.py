"""Spoken digits: ten words by six speakers, 2,700 recordings for training and 300 for testing.

    python -m experiments.speech --model convnet --seeds 3
    python -m experiments.speech --model lstm --seeds 3
    python -m experiments.speech --model gru --seeds 3
    python -m experiments.speech --model transformer --seeds 3

The split is the official one of the Free Spoken Digit Dataset: of the 50 recordings of each digit
by each speaker, numbers 0 to 4 are the test set. The options of the recipes were chosen with
--held-out, which evaluates on recordings 5 to 9 and trains on the others.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import jaxnets as jn
from experiments.harness import training
from experiments.harness.problem import Measured, Problem
from experiments.harness.run_folder import RunFolder
from experiments.sound import SoundOptions, SoundTransform, choose_parts
from jaxnets.tools.pictures import figures


@dataclasses.dataclass(frozen=True)
class Config(SoundOptions):
    """Options of the spoken word experiment."""

    model: Literal["convnet", "lstm", "gru", "transformer"] = "convnet"
    """Network; its recipe sets the other defaults."""
    words: Literal["spoken_digits", "tone_words"] = "spoken_digits"
    """Recordings; tone_words are synthetic and need no download."""
    max_seconds: float = 1.0
    """Longer recordings are truncated to this length."""
    layers: int = 3
    """Number of layers."""
    width: int = 128
    """Channels, size of the hidden states of each direction, or of the residual stream."""
    dropout: float = 0.3
    """Dropout rate."""
    label_smoothing: float = 0.0
    """Weight of the uniform distribution in the training labels."""


class SpokenWords(Problem):
    """Recordings of single words, a classifier, and its training."""

    def __init__(self, config: Config) -> None:
        self.options = self.config = config
        self.dataset = dataset = load(config)
        self.dataset_name = dataset.name
        self.train, self.test, self.part = choose_parts(dataset, config)
        self.module = self._make_module()
        # The faster one on CPU.
        self.population_strategy = "map" if config.model == "convnet" else "vmap"
        self.resident = self.train
        self.steps_per_epoch = max(len(self.train["labels"]) // config.batch_size, 1)
        batches = jn.data.sequential_batches(self.test, min(100, len(self.test["labels"])))
        self.eval_batches = [jax.device_put(batch) for batch in batches(0)]
        self.sound = SoundTransform(config, dataset.sample_rate, keep_time=True)
        objective = jn.classification(self.module, label_smoothing=config.label_smoothing)
        self.objective = jn.with_batch_transform(objective, self._transform)

    def _make_module(self) -> Any:
        config = self.config
        shared = {
            "num_outputs": self.dataset.num_classes,
            "precision": jn.Precision(compute=jnp.dtype(config.precision)),
        }
        if config.model == "convnet":
            return jn.ConvNet(
                (config.width,) * config.layers,
                kernel_size=5,
                hidden_features=(),
                norm="batch",
                dropout_rate=config.dropout,
                global_pool=True,
                **shared,
            )
        if config.model == "transformer":
            block = jn.BlockConfig(
                features=config.width, positions="sinusoidal", dropout_rate=config.dropout
            )
            return jn.AudioTransformer(num_layers=config.layers, config=block, **shared)
        return jn.SequenceClassifier(
            hidden_size=config.width,
            cell=config.model,
            num_layers=config.layers,
            bidirectional=True,
            pool="mean",
            dropout_rate=config.dropout,
            **shared,
        )

    def _transform(self, batch: jn.Batch, rng: jax.Array, train: bool) -> jn.Batch:
        batch = self.sound(batch, rng, train)
        if self.config.model == "convnet":  # convolves the padding like silence
            del batch["lengths"]
        return batch

    def example(self) -> tuple[Any, ...]:
        frames = self.sound.log_mel.frames(self.train["inputs"].shape[1])
        return (jnp.zeros((1, frames, self.config.mels)),)

    def measure(self, states: jn.TrainState) -> Measured:
        """Evaluate the final networks, per seed and speaker; the confusion is their mean."""
        labels, speakers = self.test["labels"], self.test["speakers"]
        self.probabilities = self.predict(states)
        predicted = self.probabilities.argmax(-1)
        right = predicted == labels[None]
        self.confusion = np.zeros((self.dataset.num_classes,) * 2)
        for row in predicted:
            np.add.at(self.confusion, (labels, row), 1 / len(predicted))
        losses = jn.evaluate(self.eval_step(), self.evaluated(states), self.eval_batches)["loss"]
        return Measured(
            f"{self.part} accuracy",
            right.mean(axis=1),
            details={
                "test_loss": round(float(np.mean(losses)), 6),
                "accuracy_by_speaker": {
                    name: round(float(right[:, speakers == index].mean()), 6)
                    for index, name in enumerate(self.dataset.speaker_names)
                },
            },
        )

    def predict(self, states: jn.TrainState) -> np.ndarray:
        """Return the class probabilities of each network, [seeds, examples, classes]."""

        @jax.jit
        def probabilities(states: jn.TrainState, batch: jn.Batch) -> jax.Array:
            batch = self._transform(batch, jax.random.key(0), False)
            lengths = {name: batch[name] for name in ("lengths",) if name in batch}

            def one(state: jn.TrainState) -> jax.Array:
                return jax.nn.softmax(
                    self.module.apply(state.variables, batch["inputs"], **lengths)
                )

            return jax.lax.map(one, states)

        states = self.evaluated(states)
        parts = [np.asarray(probabilities(states, batch)) for batch in self.eval_batches]
        return np.concatenate(parts, axis=1)[:, : len(self.test["labels"])]

    def draw(
        self, folder: RunFolder, states: jn.TrainState, history: jn.History, measured: Measured
    ) -> dict[str, str]:
        names, labels = self.dataset.class_names, self.test["labels"]
        panels = {"loss": ("loss", "test/loss"), "accuracy": ("accuracy", "test/accuracy")}
        figures.curves(history, panels, folder.path / "curves.png")
        seeds = self.config.seeds
        place = folder.path / "confusion.png"
        figures.confusion(self.confusion, names, place, num_networks=seeds)
        # Without the lengths, so that the padding is as dark as silence within a word.
        log_mels = np.asarray(jax.jit(self.sound.log_mel)(self.test["inputs"]))
        # [examples, mels, frames, 1], low frequencies at the bottom
        images = np.swapaxes(log_mels, 1, 2)[:, ::-1, :, None]
        probabilities = self.probabilities.mean(axis=0)
        place = folder.path / "mistakes.png"
        figures.mistakes(images, labels, probabilities, names, place, num_networks=seeds)
        return {"mistakes": "Spectrograms: time to the right, frequency up."}


def load(config: Config) -> jn.data.SpeechDataset:
    """Load the recordings of the options."""
    if config.words == "tone_words":
        return jn.data.tone_words()
    return jn.data.spoken_digits(config.data, max_seconds=config.max_seconds)


AUGMENTED = Config(
    epochs=40,
    batch_size=64,
    learning_rate=2e-3,
    shift=0.02,
    speed=0.1,
    noise=10.0,
    gain=6.0,
    time_mask=10,
    frequency_mask=6,
    average_decay=0.99,
    label_smoothing=0.1,
)
RECIPES = {
    "convnet": AUGMENTED,
    "lstm": dataclasses.replace(AUGMENTED, model="lstm", epochs=30, layers=1, clip=1.0),
    "gru": dataclasses.replace(AUGMENTED, model="gru", epochs=30, layers=1, clip=1.0),
    "transformer": dataclasses.replace(
        AUGMENTED, model="transformer", epochs=30, dropout=0.1, learning_rate=1e-3, clip=1.0
    ),
}

if __name__ == "__main__":
    training.main("speech", SpokenWords, RECIPES)
