"""The competitors and their tasks."""

from __future__ import annotations

import dataclasses
import importlib.util

from experiments.benchmark.workloads import Workload

_STEPS = frozenset({"train", "infer"})


@dataclasses.dataclass(frozen=True)
class Competitor:
    """A library and a variant of its use.

    Attributes:
        name: on the command line.
        module: the side.
        tasks: that it supports.
        variant: the side's name of the variant.
        packages: required packages.
    """

    name: str
    module: str
    tasks: frozenset[str]
    variant: str = ""
    packages: tuple[str, ...] = ()

    def takes_part(self, workload: Workload) -> bool:
        """Whether it supports a workload."""
        if self.variant == "scan" and workload.steps_per_dispatch == 1:
            return False  # a dispatch has one step
        if self.variant == "split" and workload.precision != "float32":
            return False  # only float32 matmuls are split
        if self.name == "equinox" and workload.precision != "float32":
            return False  # no mixed precision in its documentation
        return workload.task in self.tasks

    def missing(self) -> list[str]:
        """Return the packages that are not installed."""
        return [name for name in self.packages if importlib.util.find_spec(name) is None]


def _side(
    name: str, module: str, tasks: frozenset[str], variant: str, *packages: str
) -> Competitor:
    return Competitor(name, f"experiments.benchmark.{module}", tasks, variant, packages)


# Plain Flax and torch only: the other sides would repeat the same handwritten updates.
_GENERATIVE = frozenset({"autoencode", "adversarial"})
_CLASSIC = _STEPS | _GENERATIVE | {"population", "epoch"}
_FILES = frozenset({"read", "read-cold"})
_ALL = _CLASSIC | _FILES | {"generate", "positions", "embed"}

#: The competitor that the others are compared with.
REFERENCE = "jaxnets"
#: Only with --against: it gains only on processors with matrix units.
ON_REQUEST = "jaxnets-split"
#: Another checkout of this repository, which the option `--before` names.
BEFORE = "jaxnets-before"
#: Name -> competitor, in the order of the report.
COMPETITORS: dict[str, Competitor] = {
    competitor.name: competitor
    for competitor in (
        _side(REFERENCE, "jaxnets_side", _ALL, "", "jaxnets"),
        _side(BEFORE, "jaxnets_side", _ALL, "", "jaxnets"),
        # With jaxnets.keep_freed_memory, which the user has to call.
        _side("jaxnets-kept", "jaxnets_side", _ALL - _FILES - {"positions"}, "kept", "jaxnets"),
        # The same, with float32 matmuls of dense layers as three bfloat16 matmuls.
        _side(ON_REQUEST, "jaxnets_side", frozenset({"train"}), "split", "jaxnets"),
        _side("flax", "flax_side", _CLASSIC, "", "flax"),
        _side("flax-scan", "flax_side", _STEPS | {"population"}, "scan", "flax"),
        _side("keras", "keras_side", _STEPS | {"epoch"}, "", "keras", "jax"),
        _side("equinox", "equinox_side", _STEPS, "", "equinox"),
        _side("torch", "torch_side", _CLASSIC, "", "torch"),
        _side("torch-fused", "torch_side", _CLASSIC - {"infer"}, "fused", "torch"),
        # It would compile each member of a population separately.
        _side("torch-compile", "torch_side", _CLASSIC - {"population"}, "compile", "torch"),
        _side("transformers", "transformers_side", frozenset({"generate"}), "", "transformers"),
        _side(
            "sentence-transformers",
            "sentence_transformers_side",
            frozenset({"embed"}),
            "",
            "sentence_transformers",
        ),
        _side("raw", "files_side", _FILES, "raw"),
        _side("safetensors", "files_side", _FILES, "package", "safetensors"),
    )
}
