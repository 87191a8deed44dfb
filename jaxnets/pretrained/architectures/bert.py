"""BERT of Hugging Face (Devlin et al. 2019), and what RoBERTa shares with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnets.models.transformer import MaskedLM, SentenceEncoder, TransformerClassifier
from jaxnets.models.transformer.config import build_preset
from jaxnets.pretrained.architectures.architecture import Architecture
from jaxnets.pretrained.architectures.labels import num_labels
from jaxnets.pretrained.config import Config
from jaxnets.pretrained.layouts import Layout
from jaxnets.pretrained.processors import TextProcessor, read_text_processor
from jaxnets.pretrained.rules import Rule
from jaxnets.pretrained.torch_layers import dense, norm

#: {activation of transformers: of this library}; the first name of each is written.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
    "mish": "mish",
}
#: {activation of this library: of transformers}.
ACTIVATION_NAMES = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
LAYER = "params/stack/layer_{layer}"
#: {field of an encoder: its entry in config.json}.
_NAMES = {
    "num_layers": "num_hidden_layers",
    "features": "hidden_size",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "activation": "hidden_act",
    "dropout_rate": "hidden_dropout_prob",
    "attention_dropout_rate": "attention_probs_dropout_prob",
}

Build = Callable[[Config, Mapping[str, Any]], nn.Module]


def builder(kind: Callable[..., Any], entries: Callable[[Config], dict[str, Any]]) -> Build:
    """Return what builds a network of a class from the entries of its configuration.

    Args:
        kind: class of the network, or a part of it with some fields.
        entries: configuration -> fields of an encoder and of its blocks.
    """

    def build(config: Config, fields: Mapping[str, Any]) -> nn.Module:
        return build_preset(kind, entries(config), dict(fields))

    return build


def classifier(entries: Callable[[Config], dict[str, Any]], **options: Any) -> Build:
    """Return what builds a classifier, whose number of classes the configuration says."""

    def build(config: Config, fields: Mapping[str, Any]) -> nn.Module:
        preset = {**entries(config), **options, "num_outputs": num_labels(config)}
        return build_preset(TransformerClassifier, preset, dict(fields))

    return build


def encoder_fields(config: Config) -> dict[str, Any]:
    """Return the fields of BERT and RoBERTa."""
    config.require(is_decoder=False, add_cross_attention=False, position_embedding_type="absolute")
    return {
        **block_fields(config, _NAMES, num_layers=12),
        "num_segments": config.integer("type_vocab_size", 2),
        "norm_epsilon": config.number("layer_norm_eps", 1e-12),
    }


def encoder_entries(module: nn.Module) -> dict[str, Any]:
    """Return the entries of config.json of BERT and RoBERTa."""
    return {
        **block_entries(module, _NAMES),
        "type_vocab_size": module.num_segments,
        "layer_norm_eps": module.config.norm_epsilon,
    }


def block_fields(config: Config, names: Mapping[str, str], *, num_layers: int) -> dict[str, Any]:
    """Return the fields that the encoders of BERT, RoBERTa and DistilBERT share.

    Args:
        config: of the network.
        names: {field: its entry in config.json}, of the entries with a name of their own.
        num_layers: number of blocks, where the configuration does not have it.

    Raises:
        ValueError: an entry of the wrong type, or one that is not supported.
    """
    config.require(tie_word_embeddings=True)
    return {
        "vocabulary_size": config.integer("vocab_size", 30_522),
        "max_length": config.integer("max_position_embeddings", 512),
        "num_layers": config.integer(names["num_layers"], num_layers),
        "features": config.integer(names["features"], 768),
        "num_heads": config.integer(names["num_heads"], 12),
        "mlp_dim": config.integer(names["mlp_dim"], 3072),
        "activation": config.choice(names["activation"], ACTIVATIONS, "gelu"),
        "dropout_rate": config.number(names["dropout_rate"], 0.1),
        "attention_dropout_rate": config.number(names["attention_dropout_rate"], 0.1),
        "embedding_norm": True,
        "norm_first": False,
        "key_bias": True,
    }


def block_entries(module: nn.Module, names: Mapping[str, str]) -> dict[str, Any]:
    """Return the entries of config.json for `block_fields`, and the number of classes.

    Args:
        module: the network.
        names: {field: its entry in config.json}.
    """
    config = module.config
    return {
        "vocab_size": module.vocabulary_size,
        "max_position_embeddings": module.max_length,
        names["num_layers"]: module.num_layers,
        names["features"]: config.features,
        names["num_heads"]: config.num_heads,
        names["mlp_dim"]: config.mlp_dim or 4 * config.features,
        names["activation"]: ACTIVATION_NAMES[config.activation],
        names["dropout_rate"]: config.dropout_rate,
        names["attention_dropout_rate"]: config.attention_dropout_rate,
        "tie_word_embeddings": True,
        **labels(module),
    }


def labels(module: nn.Module) -> dict[str, Any]:
    """Return the entry for the number of classes of a classifier."""
    outputs = getattr(module, "num_outputs", None)
    return {} if outputs is None else {"num_labels": outputs}


def old_norm(source: str, target: str) -> list[Rule]:
    """Return the rules of a layer norm, also under the names of the first files."""
    return [
        *norm(source, target),
        Rule(f"{source}.gamma", f"{target}/scale"),
        Rule(f"{source}.beta", f"{target}/bias"),
    ]


def encoder_rules(prefix: str, *positions: Layout) -> list[Rule]:
    """Return the table of the encoder of BERT and RoBERTa.

    Args:
        prefix: of the names, such as "bert".
        positions: arrangements of the table of positions.
    """
    layer = f"{prefix}.encoder.layer.{{layer}}"
    names = {"word": "token", "token_type": "segment"}
    return [
        *[
            Rule(
                f"{prefix}.embeddings.{theirs}_embeddings.weight",
                f"params/embedding/{ours}/embedding",
            )
            for theirs, ours in names.items()
        ],
        Rule(
            f"{prefix}.embeddings.position_embeddings.weight",
            "params/embedding/position/embedding",
            positions,
        ),
        *old_norm(f"{prefix}.embeddings.LayerNorm", "params/embedding/embedding_norm"),
        *dense(f"{layer}.attention.self.query", f"{LAYER}/attention/query"),
        *dense(f"{layer}.attention.self.key", f"{LAYER}/attention/key"),
        *dense(f"{layer}.attention.self.value", f"{LAYER}/attention/value"),
        *dense(f"{layer}.attention.output.dense", f"{LAYER}/attention/output"),
        *old_norm(f"{layer}.attention.output.LayerNorm", f"{LAYER}/attention_norm"),
        *dense(f"{layer}.intermediate.dense", f"{LAYER}/feed_forward/hidden"),
        *dense(f"{layer}.output.dense", f"{LAYER}/feed_forward/output"),
        *old_norm(f"{layer}.output.LayerNorm", f"{LAYER}/feed_forward_norm"),
    ]


def encoder_inputs(module: nn.Module, config: Config) -> list[jax.ShapeDtypeStruct]:
    """Return the shape of tokens that initialize an encoder."""
    return [jax.ShapeDtypeStruct((1, 2), jnp.int32)]


def _processor(folder: Path, config: Config) -> TextProcessor | None:
    return read_text_processor(
        folder,
        max_length=config.integer("max_position_embeddings", 512),
        segments=config.integer("type_vocab_size", 2) > 1,
    )


def _rules(module: nn.Module) -> list[Rule]:
    return [
        *encoder_rules("bert"),
        *dense("bert.pooler.dense", "params/pooler"),
        *dense("classifier", "params/head"),
        *dense("cls.predictions.transform.dense", "params/transform"),
        *old_norm("cls.predictions.transform.LayerNorm", "params/transform_norm"),
        Rule("cls.predictions.bias", "params/bias"),
    ]


BERT = Architecture(
    model_type="bert",
    classes={
        "BertModel": builder(
            lambda **fields: TransformerClassifier(**{"num_outputs": None, **fields}),
            encoder_fields,
        ),
        "BertForSequenceClassification": classifier(encoder_fields),
        "BertForMaskedLM": builder(MaskedLM, encoder_fields),
        "SentenceTransformer": builder(SentenceEncoder, encoder_fields),
    },
    rules=_rules,
    inputs=encoder_inputs,
    prefix="bert.",
    ignored=(
        "bert.embeddings.position_ids",
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "cls.seq_relationship.weight",
        "cls.seq_relationship.bias",
    ),
    copies={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    to_config=encoder_entries,
    processor=_processor,
)
