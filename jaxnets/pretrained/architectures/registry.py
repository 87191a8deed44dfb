"""The architectures that `load` knows."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from jaxnets.pretrained.architectures.architecture import Architecture
from jaxnets.pretrained.architectures.bert import BERT
from jaxnets.pretrained.architectures.convnext import CONVNEXT
from jaxnets.pretrained.architectures.distilbert import DISTILBERT
from jaxnets.pretrained.architectures.gemma import GEMMA2, GEMMA3
from jaxnets.pretrained.architectures.gpt2 import GPT2
from jaxnets.pretrained.architectures.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from jaxnets.pretrained.architectures.resnet import RESNET, TORCHVISION
from jaxnets.pretrained.architectures.roberta import ROBERTA, XLM_ROBERTA
from jaxnets.pretrained.architectures.t5 import MT5, T5
from jaxnets.pretrained.architectures.vit import DEIT, VIT
from jaxnets.pretrained.architectures.whisper import WHISPER

_ALL = (
    BERT,
    ROBERTA,
    XLM_ROBERTA,
    DISTILBERT,
    GPT2,
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    GEMMA2,
    GEMMA3,
    T5,
    MT5,
    WHISPER,
    VIT,
    DEIT,
    CONVNEXT,
    RESNET,
    TORCHVISION,
)

#: {model_type of config.json: architecture}.
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {architecture.model_type: architecture for architecture in _ALL}
)
