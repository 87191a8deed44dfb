"""DistilBERT of Hugging Face (Sanh et al. 2019, arXiv:1910.01108)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.linen as nn

from jaxnets.models.transformer import MaskedLM, SentenceEncoder, TransformerEncoder
from jaxnets.pretrained.architectures.architecture import Architecture
from jaxnets.pretrained.architectures.bert import (
    LAYER,
    block_entries,
    block_fields,
    builder,
    classifier,
    encoder_inputs,
)
from jaxnets.pretrained.config import Config
from jaxnets.pretrained.processors import TextProcessor, read_text_processor
from jaxnets.pretrained.rules import Rule
from jaxnets.pretrained.torch_layers import dense, norm

_NAMES = {
    "num_layers": "n_layers",
    "features": "dim",
    "num_heads": "n_heads",
    "mlp_dim": "hidden_dim",
    "activation": "activation",
    "dropout_rate": "dropout",
    "attention_dropout_rate": "attention_dropout",
}


def _fields(config: Config) -> dict[str, Any]:
    return {**block_fields(config, _NAMES, num_layers=6), "norm_epsilon": 1e-12}


def _to_config(module: nn.Module) -> dict[str, Any]:
    return block_entries(module, _NAMES)


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
