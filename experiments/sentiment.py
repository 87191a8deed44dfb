"""Binary sentiment of sentences from film reviews: SST-2, 6,920 sentences.

python -m experiments.sentiment --model lstm --seeds 3
python -m experiments.sentiment --model transformer --seeds 3
python -m experiments.sentiment --pretrained FOLDER --seeds 3
python -m experiments.sentiment --pretrained FOLDER --preset lora --seeds 3
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import jaxnets as jn
from experiments.harness import training
from experiments.harness.options import Options
from experiments.harness.problem import Measured, member
from experiments.harness.run_folder import RunError, RunFolder
from experiments.sentences import SentenceProblem
from jaxnets.tools.pictures import figures


@dataclasses.dataclass(frozen=True)
class Config(Options):
    """Options of the sentiment experiment."""

    model: Literal["lstm", "gru", "transformer"] = "lstm"
    """Bidirectional recurrent network or transformer encoder, from scratch."""
    pretrained: Path | None = None
    """Folder of a pretrained encoder to fine-tune, such as a sentence encoder, in place of them;
    its options other than --dropout are those of the folder. --preset lora trains an adapter."""
    lora_rank: int = 0
    """Rank of the updates of LoRA, which are trained in place of the --pretrained encoder itself; 0
    trains all of it."""
    lora_alpha: float = 16.0
    """Factor of the updates, divided by their rank."""
    lora_target: str = r"^stack/.*kernel$"
    """Regular expression of the paths of the kernels with updates, such as
    stack/layer_0/attention/query/kernel."""
    tokens: Literal["words", "subwords"] = "words"
    """Tokens of the network."""
    min_count: int = 2
    """Minimum count of a word of the vocabulary in the training sentences."""
    vocabulary: int = 4000
    """Size of the vocabulary of subwords."""
    width: int = 64
    """Size of the hidden states of each direction, or of the residual stream."""
    embedding: int = 64
    """Size of the token embeddings (recurrent networks)."""
    layers: int = 1
    """Number of layers."""
    heads: int = 4
    """Attention heads (transformer)."""
    pool: Literal["last", "mean", "max"] = "max"
    """Pooling before the logits (recurrent networks; the transformer uses the mean)."""
    dropout: float = 0.5
    """Dropout rate."""
    word_dropout: float = 0.1
    """Probability that a token of a training sentence is replaced by the unknown token."""
    label_smoothing: float = 0.0
    """Weight of the uniform distribution in the training labels."""
    buckets: int = 5
    """Groups of sentences of similar length; each compiles one program."""


class Sentiment(SentenceProblem):
    """Labeled sentences, a classifier and its training; batch_size counts sentences."""

    eval_name = "validation"
    tokens_per_pass = 4096

    def __init__(self, config: Config) -> None:
        self.options = self.config = config
        if not 0 <= config.word_dropout < 1:
            raise RunError(f"--word-dropout is {config.word_dropout}; give a number in [0, 1)")
        if config.lora_rank and not config.pretrained:
            raise RunError(
                f"--lora-rank is {config.lora_rank}, but nothing is pretrained; give the folder of "
                "an encoder with --pretrained"
            )
        self.sentences = dataset = jn.data.sst2(config.data)
        self.dataset_name = dataset.name
        self.network = self._load()
        # A resumed adapter needs the encoder with which it began.
        self.dataset = (dataset, jax.device_get(self._pretrained())) if self.network else dataset
        self.tokenizer = self._make_tokenizer()
        self.train = self._encode(dataset.train)
        mean_length = np.mean([len(ids) for ids, _ in self.train])
        self.tokens_per_batch = round(config.batch_size * float(mean_length))
        self.module = self._make_module()
        self.eval_batches = self.one_pass(self._encode(dataset.validation))
        self.frozen = self._frozen() if config.lora_rank else None
        self.objective = self._adapted(
            jn.with_batch_transform(
                jn.classification(self.module, label_smoothing=config.label_smoothing),
                self.drop_words,
            )
        )
        self.steps_per_epoch = self.member_source(0).steps_per_epoch

    def _load(self) -> jn.pretrained.PretrainedNetwork | None:
        """Load the encoder to fine-tune."""
        if self.config.pretrained is None:
            return None
        network = jn.pretrained.load(self.config.pretrained)
        if not isinstance(network.module, jn.TransformerEncoder) or network.processor is None:
            raise RunError(
                f"{self.config.pretrained} is a {type(network.module).__name__}, not an encoder of "
                "texts with its tokenizer; give the folder of one"
            )
        return network

    def _make_tokenizer(self) -> Any:
        config, texts = self.config, self.sentences.train.texts
        if self.network is not None:
            return self.network.processor
        if config.tokens == "words":
            return jn.data.WordTokenizer.train(texts, min_count=config.min_count)
        return jn.data.SubwordTokenizer.train(texts, vocabulary_size=config.vocabulary)

    def _make_module(self) -> Any:
        config, size = self.config, self.tokenizer.vocabulary_size
        precision = jn.Precision(compute=jnp.dtype(config.precision))
        if self.network is not None:
            encoder = self.network.module
            fields = {
                field.name: getattr(encoder, field.name)
                for field in dataclasses.fields(jn.TransformerEncoder)
                if field.init and field.name not in ("parent", "name")
            }
            rates = {"dropout_rate": config.dropout, "attention_dropout_rate": 0.0}
            fields["config"] = dataclasses.replace(encoder.config, **rates)
            fields["precision"] = precision
            return jn.TransformerClassifier(
                **fields, num_outputs=self.sentences.num_classes, pool="mean"
            )
        if config.model == "transformer":
            block = jn.BlockConfig(
                features=config.width,
                num_heads=config.heads,
                positions="relative",
                dropout_rate=config.dropout,
            )
            return jn.TransformerClassifier(
                size,
                num_layers=config.layers,
                config=block,
                num_outputs=self.sentences.num_classes,
                pool="mean",
                precision=precision,
            )
        return jn.TextClassifier(
            size,
            num_outputs=self.sentences.num_classes,
            embedding_size=config.embedding,
            hidden_size=config.width,
            cell=config.model,
            num_layers=config.layers,
            bidirectional=True,
            pool=config.pool,
            dropout_rate=config.dropout,
            precision=precision,
        )

    def _encode(self, sentences: Any) -> list[tuple[np.ndarray, int]]:
        ids = map(self.tokenizer.encode, sentences.texts)
        return list(zip(ids, sentences.labels.tolist(), strict=True))

    def _pretrained(self) -> jn.Params:
        """Return the parameters of the encoder, without those that only its folder uses."""
        params = self.network.variables["params"]
        return {name: params[name] for name in ("embedding", "stack")}

    def _frozen(self) -> jn.Params:
        """Return the parameters below an adapter; that of each network has a head of its own."""
        head = jax.eval_shape(self.initial_variables, jax.random.key(0))["params"]["head"]
        return {
            **self._pretrained(),
            "head": jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), head),
        }

    def _adapted(self, objective: jn.Objective) -> jn.Objective:
        """Return the objective of the adapter, if one is trained, in place of the network's."""
        return objective if self.frozen is None else jn.lora_objective(objective, self.frozen)

    def create_states(self) -> jn.TrainState:
        """Initialize the population: of a pretrained encoder only heads and adapters differ."""
        if self.network is None:
            return super().create_states()
        config = self.config

        def create(seed: jax.Array, encoder: jn.Params) -> jn.TrainState:
            keys = jn.rng_streams(jax.random.key(seed), "params", "adapter", "run")
            head = self.initial_variables(keys["params"])["params"]["head"]
            variables = {"params": {**encoder, "head": head}}
            if config.lora_rank:
                variables = jn.lora_init(
                    keys["adapter"],
                    variables["params"],
                    rank=config.lora_rank,
                    alpha=config.lora_alpha,
                    target=config.lora_target,
                    full="^head/",
                )
            return jn.create_train_state(variables, self.update, rng=keys["run"])

        # The encoder is an argument, so that it is no constant of the program.
        return jax.jit(jax.vmap(create, in_axes=(0, None)))(self.seeds, self._pretrained())

    def prepare(self, folder: RunFolder, stage: int, states: jn.TrainState) -> str | None:
        """Say how much is trained, if it is an adapter."""
        return None if self.frozen is None else str(self._summary(states))

    def _summary(self, states: jn.TrainState) -> jn.LoRASummary:
        return jn.lora_summary(self.frozen, member(states, 0).variables)

    def eval_step(
        self, objective: jn.Objective | None = None
    ) -> Callable[[jn.TrainState, jn.Batch], jn.Metrics]:
        """Compile the evaluation by an objective of the network; an adapter is added to it."""
        return super().eval_step(None if objective is None else self._adapted(objective))

    def drop_words(self, batch: jn.Batch, rng: jax.Array, train: bool) -> jn.Batch:
        """Replace random tokens by the unknown token in training."""
        if not train or not self.config.word_dropout:
            return batch
        dropped = jax.random.bernoulli(rng, self.config.word_dropout, batch["inputs"].shape)
        unknown = jn.data.UNKNOWN if self.network is None else self.tokenizer.special_ids["unk"]
        return {**batch, "inputs": jnp.where(dropped, unknown, batch["inputs"])}

    def example(self) -> tuple[Any, ...]:
        return (self.eval_batches[0]["inputs"][:1],)

    def measure(self, states: jn.TrainState) -> Measured:
        """Evaluate on the test sentences; the confusion is the mean over the networks."""
        metrics = {
            "accuracy": jn.metrics.accuracy,
            "confusion": jn.metrics.confusion_matrix,
            "calibration": jn.metrics.calibration,
        }
        eval_step = self.eval_step(jn.classification(self.module, metrics=metrics))
        test_batches = self.one_pass(self._encode(self.sentences.test))
        states = self.evaluated(states)
        test = jn.evaluate(eval_step, states, test_batches)
        validation = jn.evaluate(eval_step, states, self.eval_batches)
        # Shares of all sentences, [seeds, true class, predicted class], to counts.
        self.confusion = (test["confusion"].mean(axis=0) * len(self.sentences.test)).round(3)
        calibration_error = jn.metrics.expected_calibration_error(test["calibration"])
        details: dict[str, Any] = {} if self.network is None else {"model": "pretrained"}
        if self.frozen is not None:
            summary = self._summary(states)
            details |= {"network_parameters": summary.total, "trained_share": summary.share}
        return Measured(
            "test accuracy",
            np.array(test["accuracy"]),
            details={
                **details,
                "validation_accuracy": round(float(np.mean(validation["accuracy"])), 6),
                "test_loss": round(float(np.mean(test["loss"])), 6),
                "calibration_error": round(float(np.mean(calibration_error)), 6),
                "vocabulary": self.tokenizer.vocabulary_size,
            },
        )

    def draw(
        self, folder: RunFolder, states: jn.TrainState, history: jn.History, measured: Measured
    ) -> dict[str, str]:
        names, test = self.sentences.class_names, self.sentences.test
        panels = {
            "loss": ("loss", "validation/loss"),
            "accuracy": ("accuracy", "validation/accuracy"),
        }
        figures.curves(history, panels, folder.path / "curves.png")
        place = folder.path / "confusion.png"
        figures.confusion(self.confusion, names, place, num_networks=self.config.seeds)
        self.tokenizer.save(folder.path / "tokenizer.json" if self.network is None else folder.path)
        probabilities = self.probabilities(states, test)
        lines = mistakes(test.texts, test.labels, probabilities, names)
        (folder.path / "mistakes.txt").write_text("".join(lines), encoding="utf-8")
        return {}

    def probabilities(self, states: jn.TrainState, sentences: Any) -> np.ndarray:
        """Return class probabilities [sentences, classes], averaged over the networks."""

        @jax.jit
        def predict(states: jn.TrainState, frozen: Any, batch: jn.Batch) -> jax.Array:
            def one(state: jn.TrainState) -> jax.Array:
                variables: Any = state.variables
                if frozen is not None:
                    variables = {"params": jn.merge_lora(frozen, variables)}
                logits = self.module.apply(variables, batch["inputs"], batch["lengths"])
                return jax.nn.softmax(logits)

            return jnp.mean(jax.lax.map(one, states), axis=0)

        states = self.evaluated(states)
        probabilities = np.zeros((len(sentences), self.sentences.num_classes), np.float32)
        for batch in self.one_pass(self._encode(sentences)):
            probabilities[batch["indices"]] = predict(states, self.frozen, batch)
        return probabilities


def mistakes(
    texts: Sequence[str],
    labels: np.ndarray,
    probabilities: np.ndarray,
    class_names: Sequence[str],
    *,
    num_shown: int = 50,
) -> list[str]:
    """List the misclassified sentences, the most confident predictions first.

    Args:
        texts: the sentences.
        labels: integer [sentences].
        probabilities: [sentences, classes].
        class_names: names in the order of the classes.
        num_shown: maximum number of lines.

    Returns:
        A line per sentence.
    """
    predicted = probabilities.argmax(1)
    wrong = np.flatnonzero(predicted != labels)
    order = np.argsort(-probabilities[wrong, predicted[wrong]], kind="stable")
    return [
        f"{class_names[predicted[index]]} {probabilities[index].max():.1%}, "
        f"not {class_names[labels[index]]}: {texts[index]}\n"
        for index in wrong[order][:num_shown]
    ]


RECURRENT = Config(
    executor="jit",
    batch_size=64,
    epochs=4,
    learning_rate=4e-3,
    average_decay=0.99,
    eval_every=100,
)
FINE_TUNED = Config(
    executor="jit",
    batch_size=32,
    epochs=4,
    learning_rate=1e-4,
    schedule="linear",
    warmup=0.1,
    weight_decay=0.01,
    clip=1.0,
    average_decay=0.99,
    dropout=0.1,
    word_dropout=0.0,
    label_smoothing=0.1,
    buckets=6,
)
RECIPES = {
    "lstm": RECURRENT,
    "gru": dataclasses.replace(RECURRENT, model="gru"),
    "transformer": dataclasses.replace(
        RECURRENT,
        model="transformer",
        width=32,
        batch_size=32,
        epochs=5,
        learning_rate=1e-3,
        weight_decay=1.0,
        average_decay=0.998,
        dropout=0.2,
        word_dropout=0.2,
    ),
    "pretrained": FINE_TUNED,
    "lora": dataclasses.replace(FINE_TUNED, learning_rate=1e-3, lora_rank=4),
}

if __name__ == "__main__":
    training.main("sentiment", Sentiment, RECIPES)
