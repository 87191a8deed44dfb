"""Translation of image captions from English to German: Multi30k, 29,000 sentence pairs.

    python -m experiments.translation --model transformer
    python -m experiments.translation --model gru

The result is BLEU on test2016 as sacrebleu computes it by default (mixed case, tokenization 13a),
on the sentences of the files without lower-casing or tokenization. Papers on Multi30k mostly report
BLEU of lower-cased, tokenized text, where the same translations score higher:
38.3 for a recurrent network with attention (Caglayan et al. 2017, arXiv:1707.04481), 41.0 for a
transformer of 2.6 M parameters (Wu et al. 2021, arXiv:2105.14462).
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
from experiments.harness.options import Options
from experiments.harness.problem import Measured, member
from experiments.harness.run_folder import RunError, RunFolder
from experiments.sentences import SentenceProblem
from jaxnets.tools.pictures import figures

BEGIN, END = jn.data.BEGIN, jn.data.END


@dataclasses.dataclass(frozen=True)
class Config(Options):
    """Options of the translation experiment."""

    model: Literal["transformer", "gru", "lstm"] = "transformer"
    """Encoder-decoder network; the recurrent ones with attention."""
    attention: Literal["bahdanau", "luong"] = "bahdanau"
    """Attention of the recurrent networks."""
    vocabulary: int = 6000
    """Subword tokens, shared by both languages."""
    width: int = 256
    """Size of the residual stream, or of the hidden states."""
    embedding: int = 256
    """Size of the token embeddings (recurrent networks)."""
    hidden: int = 512
    """Width of the feed-forward networks (transformer)."""
    encoder_layers: int = 3
    """Encoder layers (transformer)."""
    decoder_layers: int = 2
    """Decoder layers (transformer)."""
    heads: int = 4
    """Attention heads (transformer)."""
    dropout: float = 0.3
    """Dropout rate."""
    label_smoothing: float = 0.1
    """Weight of the uniform distribution in the training labels."""
    buckets: int = 8
    """Groups of sentences of similar length; each compiles one program."""
    beams: int = 5
    """Number of beams."""
    length_penalty: float = 1.0
    """Exponent of the length normalization in the beam search."""


class Translation(SentenceProblem):
    """Sentence pairs, an encoder-decoder and its training; batch_size counts sentences."""

    eval_name = "validation"
    tokens_per_pass = 2048

    def __init__(self, config: Config) -> None:
        self.options = self.config = config
        bleu_metric()  # fail before the training if the package is missing
        self.dataset = dataset = jn.data.multi30k(config.data)
        self.dataset_name = dataset.name
        self.tokenizer = jn.data.SubwordTokenizer.train(
            [text for pair in dataset.train for text in pair], vocabulary_size=config.vocabulary
        )
        self.train = self._encode(dataset.train)
        longest = [max(len(source), len(target)) for source, target in self.train]
        self.tokens_per_batch = config.batch_size * round(float(np.mean(longest)))
        self.num_tokens = max(longest) + 1
        self.module = self._make_module()
        self.start = jax.jit(self._start)  # one jit, so that all calls share its cache
        self.objective = jn.sequence_to_sequence(
            self.module, label_smoothing=config.label_smoothing
        )
        self.steps_per_epoch = self.member_source(0).steps_per_epoch
        validation = self.one_pass(self._encode(dataset.validation))
        self.eval_batches = [
            {name: array for name, array in batch.items() if name != "indices"}
            for batch in validation
        ]

    def _encode(self, pairs: Any) -> list[tuple[np.ndarray, np.ndarray]]:
        encode = self.tokenizer.encode
        return [(encode(source), encode(target)) for source, target in pairs]

    def _make_module(self) -> Any:
        config, size = self.config, self.tokenizer.vocabulary_size
        precision = jn.Precision(compute=jnp.dtype(config.precision))
        if config.model == "transformer":
            block = jn.BlockConfig(
                features=config.width,
                num_heads=config.heads,
                mlp_dim=config.hidden,
                activation="relu",
                positions="sinusoidal",
                dropout_rate=config.dropout,
            )
            return jn.TransformerTranslator(
                size,
                num_layers=config.encoder_layers,
                num_decoder_layers=config.decoder_layers,
                config=block,
                precision=precision,
            )
        return jn.RecurrentTranslator(
            size,
            embedding_size=config.embedding,
            hidden_size=config.width,
            cell=config.model,
            attention=config.attention,
            share_embeddings=True,
            tie_embeddings=True,
            dropout_rate=config.dropout,
            precision=precision,
        )

    def example(self) -> tuple[Any, ...]:
        batch = self.eval_batches[0]
        return tuple(batch[name][:1] for name in ("inputs", "decoder_inputs", "lengths"))

    def translate(self, state: jn.TrainState, sentences: list[str], *, num_beams: int) -> list[str]:
        """Translate sentences by beam search.

        Args:
            state: of one network.
            sentences: in the source language.
            num_beams: 1 is greedy decoding.

        Returns:
            The translations, in the same order.
        """
        variables = {"params": state.params}
        # `one_pass` needs targets; they are not used.
        pairs = [(ids, ids) for ids in map(self.tokenizer.encode, sentences)]
        translations = [""] * len(sentences)
        for batch in self.one_pass(pairs):
            beams = jn.beam_search(
                self.module,
                variables,
                np.full((len(batch["inputs"]), 1), BEGIN),
                num_tokens=self.num_tokens,
                num_beams=num_beams,
                stop_token=END,
                length_penalty=self.config.length_penalty,
                carry=self.start(variables, batch["inputs"], batch["lengths"]),
                capacity=self.num_tokens + 1,
            )
            best, lengths = np.asarray(beams.tokens[:, 0]), np.asarray(beams.lengths[:, 0])
            for index, row, length in zip(batch["indices"], best, lengths, strict=True):
                translations[index] = self.tokenizer.decode(row[:length])
        return translations

    def _start(self, variables: Any, inputs: jax.Array, lengths: jax.Array) -> Any:
        return self.module.apply(variables, inputs, lengths, self.num_tokens + 1, method="start")

    def measure(self, states: jn.TrainState) -> Measured:
        """Translate the test set by beam search and greedily."""
        sources = [source for source, _ in self.dataset.test]
        references = [target for _, target in self.dataset.test]
        metric = bleu_metric()
        beam, greedy = [], []
        evaluated = self.evaluated(states)
        for index in range(self.config.seeds):
            state = member(evaluated, index)
            translations = self.translate(state, sources, num_beams=self.config.beams)
            beam.append(metric.corpus_score(translations, [references]).score)
            if index == 0:
                self.samples = list(zip(sources, references, translations, strict=True))
            plain = self.translate(state, sources, num_beams=1)
            greedy.append(metric.corpus_score(plain, [references]).score)
        validation = jn.evaluate(self.eval_step(), evaluated, self.eval_batches)
        return Measured(
            "test2016 score",
            np.array(beam),
            unit="BLEU",
            details={
                "greedy": round(float(np.mean(greedy)), 4),
                "bleu_signature": str(metric.get_signature()),
                "validation_loss": round(float(np.mean(validation["loss"])), 6),
                "vocabulary": self.tokenizer.vocabulary_size,
            },
        )

    def draw(
        self, folder: RunFolder, states: jn.TrainState, history: jn.History, measured: Measured
    ) -> dict[str, str]:
        panels = {
            "nats per token": ("loss", "validation/loss"),
            "accuracy": ("accuracy", "validation/accuracy"),
        }
        figures.curves(history, panels, folder.path / "curves.png")
        self.tokenizer.save(folder.path / "tokenizer.json")
        lines = [
            f"source      {source}\nreference   {reference}\ntranslation {translation}\n"
            for source, reference, translation in self.samples
        ]
        (folder.path / "translations.txt").write_text("\n".join(lines), encoding="utf-8")
        print("\n".join(lines[:3]), file=sys.stderr)
        source, _, translation = self.samples[0]
        weights, labels = self.attention(member(self.evaluated(states), 0), source, translation)
        figures.attention(weights, *labels, folder.path / "attention.png")
        words = "For each word of the translation (rows), the words of the source it looks at."
        return {"attention": words}

    def attention(
        self, state: jn.TrainState, source: str, translation: str
    ) -> tuple[np.ndarray, tuple[list[str], list[str]]]:
        """Return cross-attention probabilities [target, source] and the texts of both axes."""
        source_ids = self.tokenizer.encode(source)
        target_ids = self.tokenizer.encode(translation)
        inputs, decoder_inputs = source_ids[None], np.concatenate([[BEGIN], target_ids])[None]
        lengths = np.array([len(source_ids)])

        @jax.jit
        def capture(params: Any) -> Any:
            return jn.capture(self.module, {"params": params}, inputs, decoder_inputs, lengths)[1]

        recorded = capture(state.params)
        if self.config.model == "transformer":  # the mean over the heads of the last layer
            layers = recorded["decoder"]
            weights = layers[max(layers)]["cross_attention"]["weights"].mean(axis=1)
        else:
            weights = recorded["attention"]
        texts = [self.tokenizer.decode([index]).strip() for index in (*source_ids, *target_ids)]
        labels = texts[: len(source_ids)], [*texts[len(source_ids) :], "(end)"]
        return np.asarray(weights[0]), labels


def bleu_metric() -> Any:
    """Return BLEU as sacrebleu computes it by default.

    Raises:
        RunError: the package is not installed.
    """
    try:
        import sacrebleu
    except ImportError as error:
        raise RunError(
            "BLEU needs the package sacrebleu; pip install 'jaxnets[experiments]'"
        ) from error
    return sacrebleu.metrics.BLEU()


RECIPES = {
    "transformer": Config(
        epochs=18,
        optimizer="muon",
        learning_rate=2e-3,
        warmup=0.1,
        clip=1.0,
        beta2=0.98,
        weight_decay=0.01,
        average_decay=0.999,
        executor="jit",
        log_every=100,
    ),
    "gru": Config(
        model="gru",
        width=320,
        epochs=10,
        learning_rate=2e-3,
        warmup=0.1,
        weight_decay=0.01,
        clip=1.0,
        average_decay=0.999,
        executor="jit",
        log_every=100,
    ),
}
RECIPES["lstm"] = dataclasses.replace(RECIPES["gru"], model="lstm", width=288)

if __name__ == "__main__":
    training.main("translation", Translation, RECIPES)
