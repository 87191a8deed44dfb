"""Addition as translation: "123+456" to "579"; the pairs of the test set are held out.

    python -m experiments.addition --model gru --seeds 3
    python -m experiments.addition --model lstm --seeds 3
    python -m experiments.addition --model transformer --seeds 3

The classic test of a sequence-to-sequence network (Sutskever, Vinyals and Le 2014,
arXiv:1409.3215; Zaremba and Sutskever 2014, arXiv:1410.4615). The digits of the sum are generated
in reverse, the direction of the carries.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import jaxnets as jn
from experiments.harness import training
from experiments.harness.options import Options
from experiments.harness.problem import Measured, Problem, member
from experiments.harness.run_folder import RunError, RunFolder
from jaxnets.tools.pictures import figures

BEGIN, END = jn.data.BEGIN, jn.data.END
SYMBOLS = "0123456789+"
#: Id of the first symbol; the special ids of every vocabulary precede it.
FIRST = jn.data.UNKNOWN + 1
VOCABULARY_SIZE = FIRST + len(SYMBOLS)
#: Fraction of all pairs of numbers that is held out, and the number of pairs of the test set.
HELD_OUT, NUM_TESTED = 0.05, 2000


@dataclasses.dataclass(frozen=True)
class Config(Options):
    """Options of the addition experiment."""

    model: Literal["transformer", "rnn", "lstm", "gru"] = "gru"
    """Encoder-decoder network; the recurrent ones with attention."""
    digits: int = 3
    """Digits of each number."""
    width: int = 128
    """Size of the hidden states, or of the residual stream."""


@dataclasses.dataclass(frozen=True)
class Sums:
    """Infinite stream of batches of training sums, a pure function of (seed, step)."""

    digits: int
    batch_size: int
    seed: int

    def __call__(self, first_step: int) -> Iterator[jn.Batch]:
        """Iterate from `first_step` on."""
        step = first_step
        while True:
            random = np.random.default_rng((self.seed, step))
            pairs = draw_pairs(random, self.batch_size, self.digits, held_out=False)
            yield encode(pairs, self.digits)
            step += 1


class Addition(Problem):
    """Generated sums, an encoder-decoder over digits, and its training."""

    dataset_name = "sums"

    def __init__(self, config: Config) -> None:
        self.options = self.config = config
        if not 1 <= config.digits <= 9:
            raise RunError(f"--digits is {config.digits}; give 1 to 9")
        self.module = self._make_module()
        self.objective = jn.sequence_to_sequence(self.module)
        self.steps_per_epoch = 500
        self.capacity = config.digits + 3  # the digits of a sum and the two special ids
        self.start = jax.jit(self._start)
        random = np.random.default_rng(0)
        self.pairs = draw_pairs(random, NUM_TESTED, config.digits, held_out=True)
        self.eval_batches = [encode(part, config.digits) for part in np.split(self.pairs, 4)]

    def _make_module(self) -> Any:
        config = self.config
        precision = jn.Precision(compute=jnp.dtype(config.precision))
        if config.model == "transformer":
            block = jn.BlockConfig(
                features=config.width,
                mlp_dim=2 * config.width,
                positions="sinusoidal",
                # With a standard deviation of 0.02 the network stays for thousands of steps at a
                # plateau: it predicts the length and the last digit of a sum, but no carry.
                init_std=None,
            )
            return jn.TransformerTranslator(
                VOCABULARY_SIZE, num_layers=2, config=block, precision=precision
            )
        return jn.RecurrentTranslator(
            VOCABULARY_SIZE,
            embedding_size=config.width // 2,
            hidden_size=config.width,
            cell=config.model,
            precision=precision,
        )

    def example(self) -> tuple[Any, ...]:
        batch = self.eval_batches[0]
        return tuple(batch[name][:1] for name in ("inputs", "decoder_inputs", "lengths"))

    def member_source(self, seed: int) -> jn.BatchSource:
        return Sums(self.config.digits, self.config.batch_size, seed)

    def measure(self, states: jn.TrainState) -> Measured:
        """Decode the sums of the test set greedily; an answer counts if it is exact."""
        evaluated = self.evaluated(states)
        answers = [self.answers(member(evaluated, index)) for index in range(self.config.seeds)]
        right = [str(a + b) for a, b in self.pairs.tolist()]
        self.mistakes = [
            f"{a}+{b} = {true}, not {answer}"
            for (a, b), true, answer in zip(self.pairs.tolist(), right, answers[0], strict=True)
            if true != answer
        ]
        exact = [np.mean(np.array(each) == np.array(right)) for each in answers]
        return Measured("exact sums", np.array(exact), details={"tested_sums": len(right)})

    def answers(self, state: jn.TrainState) -> list[str]:
        """Return the greedy answers of a network to the sums of the test set."""
        variables, answers = {"params": state.params}, []
        for batch in self.eval_batches:
            generated = jn.generate(
                self.module,
                variables,
                np.full((len(batch["inputs"]), 1), BEGIN),
                num_tokens=self.capacity - 1,
                rng=jax.random.key(0),
                sampling=jn.Sampling(temperature=0.0),
                stop_tokens=(END,),
                carry=self.start(variables, batch["inputs"], batch["lengths"]),
            )
            answers += [decode(row)[::-1] for row in np.asarray(generated.tokens)]
        return answers

    def _start(self, variables: Any, inputs: jax.Array, lengths: jax.Array) -> Any:
        return self.module.apply(variables, inputs, lengths, self.capacity, method="start")

    def draw(
        self, folder: RunFolder, states: jn.TrainState, history: jn.History, measured: Measured
    ) -> dict[str, str]:
        panels = {
            "nats per digit": ("loss", "test/loss"),
            "accuracy": ("accuracy", "test/accuracy"),
        }
        figures.curves(history, panels, folder.path / "curves.png")
        (folder.path / "mistakes.txt").write_text("".join(f"{m}\n" for m in self.mistakes))
        return {}


def draw_pairs(
    random: np.random.Generator, count: int, digits: int, *, held_out: bool
) -> np.ndarray:
    """Draw pairs of numbers [count, 2]: only held-out pairs, or only training pairs."""
    accepted = np.empty((0, 2), np.int64)
    while len(accepted) < count:
        drawn = random.integers(0, 10**digits, (count, 2))
        accepted = np.concatenate([accepted, drawn[is_held_out(drawn, digits) == held_out]])
    return accepted[:count]


def is_held_out(pairs: np.ndarray, digits: int) -> np.ndarray:
    """Return for each pair of numbers [n, 2] whether it is held out, by a hash of the pair."""
    code = (pairs[:, 0] * 10**digits + pairs[:, 1]).astype(np.uint64)
    mixed = code * np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing; wraps around
    return (mixed >> np.uint64(40)).astype(np.float64) < HELD_OUT * 2**24


def encode(pairs: np.ndarray, digits: int) -> dict[str, np.ndarray]:
    """Encode sums as a batch of token ids.

    Args:
        pairs: integers [batch, 2] of at most `digits` digits.
        digits: determines the shapes.

    Returns:
        A sequence-to-sequence batch: "inputs" [batch, 2 digits + 1], "lengths" [batch],
        "decoder_inputs" and "labels" [batch, digits + 2], "label_lengths" [batch].
    """
    sums = [str(a + b)[::-1] for a, b in pairs.tolist()]
    questions = [f"{a}+{b}" for a, b in pairs.tolist()]
    ids = {symbol: FIRST + index for index, symbol in enumerate(SYMBOLS)}
    inputs = np.zeros((len(pairs), 2 * digits + 1), np.int32)
    labels = np.zeros((len(pairs), digits + 2), np.int32)
    decoder_inputs = np.zeros_like(labels)
    for row, (question, answer) in enumerate(zip(questions, sums, strict=True)):
        inputs[row, : len(question)] = [ids[symbol] for symbol in question]
        answer_ids = [ids[symbol] for symbol in answer]
        labels[row, : len(answer) + 1] = [*answer_ids, END]
        decoder_inputs[row, : len(answer) + 1] = [BEGIN, *answer_ids]
    return {
        "inputs": inputs,
        "lengths": np.array([len(question) for question in questions], np.int32),
        "decoder_inputs": decoder_inputs,
        "labels": labels,
        "label_lengths": np.array([len(answer) + 1 for answer in sums], np.int32),
    }


def decode(ids: np.ndarray) -> str:
    """Decode token ids up to the first special id."""
    text = ""
    for index in ids.tolist():
        if index < FIRST:
            break
        text += SYMBOLS[index - FIRST]
    return text


RECURRENT = Config(steps=2000, learning_rate=3e-3, weight_decay=0.0)
RECIPES = {
    "gru": RECURRENT,
    "lstm": dataclasses.replace(RECURRENT, model="lstm", steps=4000),
    "rnn": dataclasses.replace(RECURRENT, model="rnn", steps=6000, learning_rate=1e-3, clip=1.0),
    "transformer": dataclasses.replace(RECURRENT, model="transformer", learning_rate=1e-3),
}

if __name__ == "__main__":
    training.main("addition", Addition, RECIPES)
