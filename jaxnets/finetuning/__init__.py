"""Fine-tuning of pretrained networks: adapters of low rank, frozen layers, new heads."""

from jaxnets.finetuning.heads import replace_head
from jaxnets.finetuning.learning_rates import freeze, layerwise_decay
from jaxnets.finetuning.lora import (
    LoRASummary,
    lora_init,
    lora_objective,
    lora_summary,
    merge_lora,
    unmerge_lora,
)
from jaxnets.finetuning.quantization import quantize_int8

__all__ = [
    "LoRASummary",
    "freeze",
    "layerwise_decay",
    "lora_init",
    "lora_objective",
    "lora_summary",
    "merge_lora",
    "quantize_int8",
    "replace_head",
    "unmerge_lora",
]
