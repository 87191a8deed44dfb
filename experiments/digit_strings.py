"""Strings of 3 to 7 spoken digits, recognized with connectionist temporal classification (CTC).

    python -m experiments.digit_strings --model gru --seeds 3

A string concatenates recordings of single digits by one speaker, with silence of random length
between them. Training strings are drawn at every step from the 2,700 training recordings; the 500
fixed test strings use the 300 test recordings only. The boundaries of the digits are not given. The
options of the recipes were chosen with --held-out, as in `experiments.speech`.

The result is the word error rate of the prefix beam search, without a language model, as jiwer
counts it: substitutions, insertions and deletions per spoken digit.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import jaxnets as jn
from experiments.harness import training
from experiments.harness.problem import Measured, Problem
from experiments.harness.run_folder import RunError, RunFolder
from experiments.sound import SoundOptions, SoundTransform, choose_parts
from jaxnets.generation.ctc import ctc_beam_search, ctc_greedy
from jaxnets.objectives.sequence import check_ctc_batch
from jaxnets.tools.pictures import figures

#: Seed of the test strings, and batch size of the evaluation.
TEST_SEED, EVAL_BATCH = 2018, 50


@dataclasses.dataclass(frozen=True)
class Config(SoundOptions):
    """Options of the digit string experiment."""

    model: Literal["gru", "lstm"] = "gru"
    """Recurrent cell; its recipe sets the other defaults."""
    words: Literal["spoken_digits", "tone_words"] = "spoken_digits"
    """Recordings; tone_words are synthetic and need no download."""
    min_digits: int = 3
    """Minimum number of digits in a string."""
    max_digits: int = 7
    """Maximum number of digits in a string."""
    max_seconds: float = 6.0
    """Maximum length of a training string; longer ones are redrawn. Test strings have none."""
    test_strings: int = 500
    """Number of test strings."""
    layers: int = 2
    """Recurrent layers."""
    width: int = 128
    """Channels, and size of the hidden states of each direction."""
    dropout: float = 0.2
    """Dropout rate."""
    beams: int = 8
    """Width of the prefix beam search."""


class DigitStrings(Problem):
    """Strings of digits, a speech recognizer, and its training."""

    steps_per_epoch = 100  # the stream is infinite: this sets evaluations and checkpoints

    def __init__(self, config: Config) -> None:
        self.options = self.config = config
        word_error_rate([], [])  # fail before the training if the package is missing
        if config.words == "tone_words":
            dataset = jn.data.tone_words()
        else:
            dataset = jn.data.spoken_digits(config.data)
        self.dataset, self.dataset_name = dataset, f"strings of {dataset.name}"
        self.names, self.rate = dataset.class_names, dataset.sample_rate
        self.train, test, self.part = choose_parts(dataset, config)
        self.sound = SoundTransform(config, dataset.sample_rate, keep_time=False)
        self.module = jn.SpeechRecognizer(
            num_outputs=1 + dataset.num_classes,
            features=config.width,
            hidden_size=config.width,
            cell=config.model,
            num_layers=config.layers,
            dropout_rate=config.dropout,
            precision=jn.Precision(compute=jnp.dtype(config.precision)),
        )
        self.objective = jn.with_batch_transform(jn.ctc(self.module), self.sound)
        self.test = jn.data.digit_strings(
            test, num_strings=config.test_strings, seed=TEST_SEED, **self._lengths()
        )
        frames = self.module.num_frames(self.sound.log_mel.frames(self.test["lengths"]))
        check_ctc_batch(self.test, frames, num_classes=self.module.num_outputs)
        batches = jn.data.sequential_batches(self.test, min(EVAL_BATCH, config.test_strings))
        self.eval_batches = list(batches(0))

    def _lengths(self) -> dict[str, int]:
        config = self.config
        return {
            "min_digits": config.min_digits,
            "max_digits": config.max_digits,
            "sample_rate": self.rate,
        }

    def example(self) -> tuple[Any, ...]:
        return (jnp.zeros((1, 100, self.config.mels)),)

    def member_source(self, seed: int) -> jn.BatchSource:
        config = self.config
        return jn.data.digit_string_batches(
            self.train,
            batch_size=config.batch_size,
            seed=seed,
            max_seconds=config.max_seconds,
            **self._lengths(),
        )

    def measure(self, states: jn.TrainState) -> Measured:
        """Recognize the test strings by prefix beam search and by the best path."""
        said = self.words(self.test["labels"], self.test["label_lengths"])
        heard = self.recognize(states)
        rates = {
            name: np.array([word_error_rate(said, texts) for texts in members])
            for name, members in heard.items()
        }
        self.recognized = list(zip(said, heard["beam"][0], strict=True))
        wrong = [[a != b for a, b in zip(said, texts, strict=True)] for texts in heard["beam"]]
        losses = jn.evaluate(self.eval_step(), self.evaluated(states), self.eval_batches)["loss"]
        return Measured(
            f"{self.part} word error rate",
            rates["beam"],
            details={
                "greedy_word_error_rate": round(float(rates["greedy"].mean()), 6),
                "string_error_rate": round(float(np.mean(wrong)), 6),
                "test_loss": round(float(np.mean(losses)), 6),
                "tested_strings": len(said),
                "tested_words": int(self.test["label_lengths"].sum()),
            },
        )

    def recognize(self, states: jn.TrainState) -> dict[str, list[list[str]]]:
        """Return the transcripts of the test strings by each network, "beam" and "greedy"."""

        @jax.jit
        def decode(states: jn.TrainState, batch: jn.Batch) -> dict[str, Any]:
            batch = self.sound(batch, jax.random.key(0), False)

            def one(state: jn.TrainState) -> dict[str, Any]:
                inputs = batch["inputs"], batch["lengths"]
                logits, frames = self.module.apply(state.variables, *inputs)
                scores = jax.nn.log_softmax(logits)
                beam = ctc_beam_search(scores, frames, num_beams=self.config.beams)
                return {"beam": beam[:2], "greedy": ctc_greedy(logits, frames)}

            return jax.lax.map(one, states)

        states = self.evaluated(states)
        heard = {name: [[] for _ in self.seeds] for name in ("beam", "greedy")}
        for batch in self.eval_batches:
            real = np.asarray(batch["weights"]) > 0
            for name, decoded in jax.device_get(decode(states, batch)).items():
                for texts, labels, lengths in zip(heard[name], *decoded, strict=True):
                    texts += self.words(labels[real], lengths[real])
        return heard

    def words(self, labels: np.ndarray, lengths: np.ndarray) -> list[str]:
        """Map labels, [strings, digits], to texts: the names of the digits."""
        return [
            " ".join(self.names[label - 1].replace(" ", "-") for label in row[:length])
            for row, length in zip(labels, lengths, strict=True)
        ]

    def draw(
        self, folder: RunFolder, states: jn.TrainState, history: jn.History, measured: Measured
    ) -> dict[str, str]:
        panels = {"nats per string": ("loss", "test/loss")}
        figures.curves(history, panels, folder.path / "curves.png")
        lines = [
            f"{'  ' if said == heard else 'X '}said {said}\n  heard {heard}\n"
            for said, heard in self.recognized
        ]
        (folder.path / "recognized.txt").write_text("\n".join(lines), encoding="utf-8")
        return {}
        print("\n".join(lines[:5]), file=sys.stderr)


def word_error_rate(said: list[str], heard: list[str]) -> float:
    """Return the word error rate of transcripts; 0 for no texts.

    Args:
        said: references of at least one word, separated by spaces.
        heard: transcripts, one per reference; may be empty.

    Raises:
        RunError: the package jiwer is not installed.
    """
    try:
        import jiwer
    except ImportError as error:
        raise RunError(
            "the word error rate needs the package jiwer; pip install 'jaxnets[experiments]'"
        ) from error
    return float(jiwer.wer(said, heard)) if said else 0.0


BASE = Config(
    steps=1000,
    batch_size=32,
    learning_rate=2e-3,
    weight_decay=0.01,
    clip=1.0,
    average_decay=0.99,
    executor="jit",
    speed=0.1,
    noise=10.0,
    gain=6.0,
    time_mask=10,
    frequency_mask=6,
)
RECIPES = {"gru": BASE, "lstm": dataclasses.replace(BASE, model="lstm")}

if __name__ == "__main__":
    training.main("digit_strings", DigitStrings, RECIPES)
