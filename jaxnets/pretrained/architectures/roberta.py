"""RoBERTa (Liu et al. 2019, arXiv:1907.11692) and XLM-RoBERTa of Hugging Face."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn

from jaxnets.models.transformer import MaskedLM, SentenceEncoder, TransformerClassifier
from jaxnets.models.transformer.config import build_preset
from jaxnets.pretrained.architectures.architecture import Architecture
from jaxnets.pretrained.architectures.bert import (
    Build,
    builder,
    classifier,
    encoder_entries,
    encoder_fields,
    encoder_inputs,
    encoder_rules,
)
from jaxnets.pretrained.config import Config
from jaxnets.pretrained.layouts import UnusedRows
from jaxnets.pretrained.processors import TextProcessor, read_text_processor
from jaxnets.pretrained.rules import Rule
from jaxnets.pretrained.torch_layers import dense, norm

# Positions are counted from the id of the padding, 1, plus 1.
_FIRST_POSITION = 2


def _fields(config: Config) -> dict[str, Any]:
    config.require(pad_token_id=1)
    fields = encoder_fields(config)
    return {
        **fields,
        "vocabulary_size": config.integer("vocab_size", 50_265),
        "max_length": _max_length(config),
    }


def _max_length(config: Config) -> int:
    return (
        config.integer("max_position_embeddings", 512, least=1 + _FIRST_POSITION) - _FIRST_POSITION
    )


def _build_masked(config: Config, fields: Mapping[str, Any]) -> nn.Module:
    config.require(hidden_act="gelu")  # the head has it in any case
    return build_preset(MaskedLM, _fields(config), dict(fields))


def _to_config(module: nn.Module) -> dict[str, Any]:
    return {
        **encoder_entries(module),
        "max_position_embeddings": module.max_length + _FIRST_POSITION,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }


def _processor(folder: Path, config: Config) -> TextProcessor | None:
    return read_text_processor(
        folder,
        max_length=_max_length(config),
        segments=config.integer("type_vocab_size", 2) > 1,
    )


def _rules(module: nn.Module) -> list[Rule]:
    # The hidden layer of the classifier's head is what BERT's pooler is.
    is_classifier = getattr(module, "num_outputs", None) is not None
    return [
        *encoder_rules("roberta", UnusedRows(_FIRST_POSITION)),
        *dense("classifier.dense" if is_classifier else "roberta.pooler.dense", "params/pooler"),
        *dense("classifier.out_proj", "params/head"),
        *dense("lm_head.dense", "params/transform"),
        *norm("lm_head.layer_norm", "params/transform_norm"),
        Rule("lm_head.bias", "params/bias"),
    ]


def _classes(name: str) -> dict[str, Build]:
    return {
        f"{name}Model": builder(
            lambda **fields: TransformerClassifier(**{"num_outputs": None, **fields}), _fields
        ),
        f"{name}ForSequenceClassification": classifier(_fields),
        f"{name}ForMaskedLM": _build_masked,
        "SentenceTransformer": builder(SentenceEncoder, _fields),
    }


ROBERTA = Architecture(
    model_type="roberta",
    classes=_classes("Roberta"),
    rules=_rules,
    inputs=encoder_inputs,
    prefix="roberta.",
    ignored=(
        "roberta.embeddings.position_ids",
        "roberta.pooler.dense.weight",
        "roberta.pooler.dense.bias",
    ),
    copies={
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    },
    to_config=_to_config,
    processor=_processor,
)
XLM_ROBERTA = dataclasses.replace(ROBERTA, model_type="xlm-roberta", classes=_classes("XLMRoberta"))
