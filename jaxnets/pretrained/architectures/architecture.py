"""What an architecture of another library is: data about its configuration and its tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from jaxnets.pretrained.config import Config
from jaxnets.pretrained.formats import Tensors
from jaxnets.pretrained.rules import Leaves, Rule


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A `model_type` of Hugging Face as a network of this library.

    Attributes:
        model_type: as config.json names it.
        classes: {class of transformers, as `architectures` of config.json names it: (config,
            fields) -> network}; fields override those of the network and of its blocks. The first
            one counts where config.json names none.
        rules: network -> its table.
        inputs: (network, config) -> shapes of inputs that initialize it.
        prefix: of the tensors below the base model, such as "transformer."; a file may lack it.
        aliases: {another name that transformers accepts in config.json: the own name}.
        ignored: patterns of tensors that are no parameters.
        copies: {name of a tensor: name of another one that it equals}; of tied parameters a file
            may hold both.
        adapt: (network, tensors) -> network, where the tensors decide what config.json leaves open,
            such as tied embeddings; None where they do not.
        to_config: network -> entries of config.json, for a network that was not read from one.
        sizes: (entries of config.json, shapes of the arrays) -> further entries, which only the
            arrays tell, such as the size of the images; None without such.
        renamed: pairs of parts of names, replaced in this order: in a file, and in the memory of
            transformers 5, whose names adapters of PEFT have. Those of transformers 4 have the
            names of the file.
        processor: (folder, config) -> what turns data into the network's inputs; None without one.
    """

    model_type: str
    classes: Mapping[str, Callable[[Config, Mapping[str, Any]], nn.Module]]
    rules: Callable[[nn.Module], Sequence[Rule]]
    inputs: Callable[[nn.Module, Config], Sequence[jax.ShapeDtypeStruct]]
    prefix: str = ""
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored: Sequence[str] = ()
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    adapt: Callable[[nn.Module, Tensors], nn.Module] | None = None
    to_config: Callable[[nn.Module], dict[str, Any]] | None = None
    sizes: Callable[[Mapping[str, Any], Leaves], dict[str, Any]] | None = None
    renamed: Sequence[tuple[str, str]] = ()
    processor: Callable[[Path, Config], Any] | None = None
