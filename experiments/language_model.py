"""Language models of characters, by default on tiny Shakespeare.

    python -m experiments.language_model --model transformer
    python -m experiments.language_model --model transformer --preset nanogpt-cpu --seeds 3
    python -m experiments.language_model --model lstm
    python -m experiments.language_model --model gru

Reference: nanoGPT's recipe for a CPU (the preset nanogpt-cpu) reaches a validation loss of 1.88
nats per character on random windows, its recipe for a GPU (10.7 M parameters) 1.47.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
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

RECURRENT = ("rnn", "lstm", "gru", "mgu", "mingru", "minlstm")


@dataclasses.dataclass(frozen=True)
class Config(Options):
    """Options of the language modeling experiment."""

    model: Literal["transformer", "rnn", "lstm", "gru", "mgu", "mingru", "minlstm"] = "transformer"
    """Network; its recipe sets the other defaults."""
    corpus: Literal["tiny_shakespeare", "python_topics"] = "tiny_shakespeare"
    """Text; python_topics is the text of Python's help() topics and needs no download."""
    tokens: Literal["characters", "bytes"] = "characters"
    """Tokens of the network."""
    context: int = 256
    """Tokens per training window."""
    layers: int = 6
    """Number of layers."""
    heads: int = 4
    """Attention heads (transformer)."""
    width: int = 256
    """Size of the residual stream (transformer) or of the hidden states."""
    embedding: int = 64
    """Size of the token embeddings (recurrent networks)."""
    style: Literal["gpt2", "llama"] = "llama"
    """gpt2: learned positions, layer norm, GELU; llama: rotary positions, RMS norm, SwiGLU."""
    dropout: float = 0.1
    """Dropout rate."""
    carry: bool = True
    """Truncated backpropagation through time: carry states across batches (recurrent networks)."""
    stride: int | None = None
    """Stride of the evaluation windows; by default the context, without overlap."""
    prompt: str = "\n"
    """Prompt of the printed samples."""
    sample_tokens: int = 500
    """Length of the printed samples."""
    temperature: float = 0.8
    """Sampling temperature."""


class LanguageModel(Problem):
    """A text, a network that predicts the next token, and its training."""

    eval_name = "validation"

    def __init__(self, config: Config) -> None:
        self.options = self.config = config
        load = {
            "tiny_shakespeare": lambda: jn.data.tiny_shakespeare(config.data),
            "python_topics": jn.data.python_topics,
        }
        text = load[config.corpus]()
        self.dataset, self.dataset_name = text, text.name
        if config.tokens == "bytes":
            self.tokenizer: Any = jn.data.ByteTokenizer()
        else:
            self.tokenizer = jn.data.CharacterTokenizer.from_text(text.train + text.validation)
        self.prompt = self.tokenizer.encode(config.prompt)
        if not len(self.prompt):
            raise RunError("--prompt is empty; give at least one character")
        self.train = self.tokenizer.encode(text.train)
        self.validation = self.tokenizer.encode(text.validation)
        self.module = self._make_module()
        self.carries = config.carry and config.model in RECURRENT
        self.objective = jn.language_modeling(self.module, carry_across_batches=self.carries)
        self.steps_per_epoch = max(len(self.train) // (config.batch_size * config.context), 1)
        windows = self._evaluation_windows()
        every = max(len(windows) // 8, 1)  # a subset, for the curves
        self.eval_batches = [jax.device_put(batch) for batch in windows[::every]]

    def _make_module(self) -> Any:
        config, size = self.config, self.tokenizer.vocabulary_size
        precision = jn.Precision(compute=jnp.dtype(config.precision))
        if config.model in RECURRENT:
            return jn.RecurrentLM(
                size,
                embedding_size=config.embedding,
                hidden_size=config.width,
                cell=config.model,
                num_layers=config.layers,
                dropout_rate=config.dropout,
                precision=precision,
            )
        block = {"features": config.width, "num_heads": config.heads}
        if config.style == "llama":
            block |= {"positions": "rotary", "norm": "rms", "activation": "swiglu"}
            # 2/3 of 4 x width: three matrices as large together as the two of an ungated MLP.
            block |= {"mlp_dim": 8 * config.width // 3 // 8 * 8, "use_bias": False}
        return jn.TransformerLM(
            size,
            num_layers=config.layers,
            config=jn.BlockConfig(dropout_rate=config.dropout, **block),
            max_length=config.context,
            precision=precision,
        )

    def _evaluation_windows(self) -> list[jn.Batch]:
        config = self.config
        source = jn.data.sequential_windows(
            self.validation, batch_size=64, length=config.context, stride=config.stride
        )
        return list(source(0))

    def example(self) -> tuple[Any, ...]:
        return (jnp.zeros((1, self.config.context), jnp.int32),)

    def initial_variables(self, key: jax.Array) -> Any:
        variables = super().initial_variables(key)
        if self.carries:
            return jn.with_carry(variables, self.module, self.config.batch_size)
        return variables

    def member_source(self, seed: int) -> jn.BatchSource:
        config = self.config
        sizes = {"batch_size": config.batch_size, "length": config.context}
        if self.carries:  # in the order of the text, the same for all seeds
            return jn.data.token_streams(self.train, **sizes)
        return jn.data.token_windows(self.train, seed=seed, **sizes)

    def measure(self, states: jn.TrainState) -> Measured:
        """Evaluate on the whole validation text, and on random windows like nanoGPT."""
        config = self.config
        eval_step, states = self.eval_step(), self.evaluated(states)
        values = np.array(jn.evaluate(eval_step, states, self._evaluation_windows())["loss"])
        source = jn.data.token_windows(
            self.validation, batch_size=64, length=config.context, seed=1_000_003
        )
        random_windows = jn.evaluate(eval_step, states, itertools.islice(source(0), 40))["loss"]
        return Measured(
            "validation loss",
            values,
            unit=f"nats per {config.tokens.removesuffix('s')}",
            details={
                "perplexity": round(float(np.exp(values).mean()), 4),
                "bits": round(float(values.mean() / np.log(2)), 4),
                "random_windows": round(float(np.mean(random_windows)), 6),
                "evaluated_tokens": len(self.validation) - 1,
            },
        )

    def draw(
        self, folder: RunFolder, states: jn.TrainState, history: jn.History, measured: Measured
    ) -> dict[str, str]:
        panels = {"nats per token": ("loss", "validation/loss")}
        figures.curves(history, panels, folder.path / "curves.png")
        self.tokenizer.save(folder.path / "tokenizer.json")
        samples = self.sample(member(self.evaluated(states), 0))
        text = "\n\n---\n\n".join(samples) + "\n"
        (folder.path / "samples.txt").write_text(text, encoding="utf-8")
        return {}
        print(samples[0], file=sys.stderr)

    def sample(self, state: jn.TrainState, num_samples: int = 3) -> list[str]:
        """Continue the prompt.

        A transformer generates half a context at a time, given the previous half, so that no
        position exceeds those of training.
        """
        config = self.config
        prompts = np.tile(self.prompt, (num_samples, 1))
        half = max(config.context // 2, 1)
        piece = config.sample_tokens if config.model in RECURRENT else half
        written = prompts
        for index in range(-(-config.sample_tokens // piece)):
            generated = jn.generate(
                self.module,
                {"params": state.params},
                written[:, -half:],
                num_tokens=piece,
                rng=jax.random.fold_in(jax.random.key(config.seed), index),
                sampling=jn.Sampling(temperature=config.temperature),
            )
            written = np.concatenate([written, np.asarray(generated.tokens)], axis=1)
        length = len(self.prompt) + config.sample_tokens
        return [self.tokenizer.decode(row[:length]) for row in written]


RECURRENT_RECIPE = Config(
    epochs=20,
    context=128,
    layers=1,
    embedding=64,
    dropout=0.2,
    batch_size=32,
    learning_rate=3e-3,
    warmup=0.05,
    clip=1.0,
)
RECIPES = {
    "transformer": Config(
        steps=1400,
        batch_size=16,
        optimizer="muon",
        learning_rate=3e-3,
        warmup=0.1,
        clip=1.0,
        precision="bfloat16",
        eval_every=150,
    ),
    "nanogpt-cpu": Config(
        steps=2000,
        context=64,
        layers=4,
        heads=4,
        width=128,
        batch_size=12,
        style="gpt2",
        dropout=0.0,
        learning_rate=1e-3,
        warmup=0.05,
        final_rate=0.1,
        weight_decay=0.1,
        beta2=0.99,
        clip=1.0,
    ),
    "lstm": dataclasses.replace(RECURRENT_RECIPE, model="lstm", width=448),
    "gru": dataclasses.replace(RECURRENT_RECIPE, model="gru", width=512),
    "rnn": dataclasses.replace(RECURRENT_RECIPE, model="rnn", width=512),
    "mgu": dataclasses.replace(RECURRENT_RECIPE, model="mgu", width=512),
    "mingru": dataclasses.replace(
        RECURRENT_RECIPE, model="mingru", layers=3, width=448, context=256
    ),
    "minlstm": dataclasses.replace(
        RECURRENT_RECIPE, model="minlstm", layers=3, width=384, context=256
    ),
}

if __name__ == "__main__":
    training.main("language_model", LanguageModel, RECIPES)
