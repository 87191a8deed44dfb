"""DistilBERT of Hugging Face (Sanh et al. 2019, arXiv:1910.01108)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.linen as nn

from jaxnets.models.transformer import MaskedLM, SentenceEncoder, TransformerEncoder
from jaxnets.pretrained.architectures.architecture import Architecture
from jaxnets.pretrained.architectures.bert import (
    ACTIVATION_NAMES,
    ACTIVATIONS,
    LAYER,
    builder,
    classifier,
    encoder_inputs,
    labels,
)
from jaxnets.pretrained.config import Config
from jaxnets.pretrained.processors import TextProcessor, read_text_processor
from jaxnets.pretrained.rules import Rule
from jaxnets.pretrained.torch_layers import dense, norm


def _fields(config: Config) -> dict[str, Any]:
    config.require(tie_word_embeddings=True)
    return {
        "vocabulary_size": config.integer("vocab_size", 30_522),
        "num_layers": config.integer("n_layers", 6),
        "features": config.integer("dim", 768),
        "num_heads": config.integer("n_heads", 12),
        "mlp_dim": config.integer("hidden_dim", 3072),
        "max_length": config.integer("max_position_embeddings", 512),
        "activation": config.choice("activation", ACTIVATIONS, "gelu"),
        "norm_epsilon": 1e-12,
        "dropout_rate": config.number("dropout", 0.1),
        "attention_dropout_rate": config.number("attention_dropout", 0.1),
        "embedding_norm": True,
        "norm_first": False,
        "key_bias": True,
    }


def _to_config(module: nn.Module) -> dict[str, Any]:
    config = module.config
    return {
        "vocab_size": module.vocabulary_size,
        "n_layers": module.num_layers,
        "dim": config.features,
        "n_heads": config.num_heads,
        "hidden_dim": config.mlp_dim or 4 * config.features,
        "max_position_embeddings": module.max_length,
        "activation": ACTIVATION_NAMES[config.activation],
        "dropout": config.dropout_rate,
        "attention_dropout": config.attention_dropout_rate,
        "tie_word_embeddings": True,
        **labels(module),
    }


def _processor(folder: Path, config: Config) -> TextProcessor | None:
    most = config.integer("max_position_embeddings", 512)
    return read_text_processor(folder, max_length=most, segments=False)


def _rules(module: nn.Module) -> list[Rule]:
    layer = "distilbert.transformer.layer.{layer}"
    names = {"word": "token", "position": "position"}
    return [
        *[
            Rule(
                f"distilbert.embeddings.{theirs}_embeddings.weight",
                f"params/embedding/{ours}/embedding",
            )
            for theirs, ours in names.items()
        ],
        *norm("distilbert.embeddings.LayerNorm", "params/embedding/embedding_norm"),
        *dense(f"{layer}.attention.q_lin", f"{LAYER}/attention/query"),
        *dense(f"{layer}.attention.k_lin", f"{LAYER}/attention/key"),
        *dense(f"{layer}.attention.v_lin", f"{LAYER}/attention/value"),
        *dense(f"{layer}.attention.out_lin", f"{LAYER}/attention/output"),
        *norm(f"{layer}.sa_layer_norm", f"{LAYER}/attention_norm"),
        *dense(f"{layer}.ffn.lin1", f"{LAYER}/feed_forward/hidden"),
        *dense(f"{layer}.ffn.lin2", f"{LAYER}/feed_forward/output"),
        *norm(f"{layer}.output_layer_norm", f"{LAYER}/feed_forward_norm"),
        *dense("pre_classifier", "params/pooler"),
        *dense("classifier", "params/head"),
        *dense("vocab_transform", "params/transform"),
        *norm("vocab_layer_norm", "params/transform_norm"),
        Rule("vocab_projector.bias", "params/bias"),
    ]


DISTILBERT = Architecture(
    model_type="distilbert",
    classes={
        "DistilBertModel": builder(TransformerEncoder, _fields),
        "DistilBertForSequenceClassification": classifier(_fields, pooler_activation="relu"),
        "DistilBertForMaskedLM": builder(MaskedLM, _fields),
        "SentenceTransformer": builder(SentenceEncoder, _fields),
    },
    rules=_rules,
    inputs=encoder_inputs,
    prefix="distilbert.",
    aliases={
        "hidden_size": "dim",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
    },
    ignored=("distilbert.embeddings.position_ids",),
    copies={"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
    to_config=_to_config,
    processor=_processor,
)
