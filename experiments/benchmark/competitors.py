"""Who competes in what."""

from __future__ import annotations

import dataclasses
import importlib.util

from experiments.benchmark.workloads import Workload

_STEPS = frozenset({"train", "infer"})


@dataclasses.dataclass(frozen=True)
class Competitor:
    """A library and a way to use it.

    Attributes:
        name: on the command line.
        module: the side.
        tasks: what it takes part in.
        variant: the side's name for this way.
        packages: what has to be installed.
    """

    name: str
    module: str
    tasks: frozenset[str]
    variant: str = ""
    packages: tuple[str, ...] = ()

    def takes_part(self, workload: Workload) -> bool:
        """Whether it has a way to compute a workload."""
        if self.variant == "scan" and workload.steps_per_dispatch == 1:
            return False  # nothing to bundle
        if self.variant == "split" and workload.precision != "float32":
            return False  # nothing to split
        if self.name == "equinox" and workload.precision != "float32":
            return False  # its documentation has no policy for mixed precision
        return workload.task in self.tasks

    def missing(self) -> list[str]:
        """Return the packages that are not installed."""
        return [name for name in self.packages if importlib.util.find_spec(name) is None]


def _side(
    name: str, module: str, tasks: frozenset[str], variant: str, *packages: str
) -> Competitor:
    return Competitor(name, f"experiments.benchmark.{module}", tasks, variant, packages)


# Plain Flax and torch only: elsewhere the same updates would be written by hand once more.
_GENERATIVE = frozenset({"autoencode", "adversarial"})
_CLASSIC = _STEPS | _GENERATIVE | {"population", "epoch"}
_ALL = _CLASSIC | {"generate", "positions"}

#: The one that the others are compared with.
REFERENCE = "jaxnets"
#: Takes part where it is asked for: it gains on processors with matrix units only.
ON_REQUEST = "jaxnets-split"
#: Name -> competitor, in the order of the report.
COMPETITORS: dict[str, Competitor] = {
    competitor.name: competitor
    for competitor in (
        _side(REFERENCE, "jaxnets_side", _ALL, "", "jaxnets"),
        # With jaxnets.keep_freed_memory, which is the user's choice.
        _side("jaxnets-kept", "jaxnets_side", _ALL - {"positions"}, "kept", "jaxnets"),
        # The same with the float32 products of dense layers as three of bfloat16.
        _side(ON_REQUEST, "jaxnets_side", frozenset({"train"}), "split", "jaxnets"),
        _side("flax", "flax_side", _CLASSIC, "", "flax"),
        _side("flax-scan", "flax_side", _STEPS | {"population"}, "scan", "flax"),
        _side("keras", "keras_side", _STEPS | {"epoch"}, "", "keras", "jax"),
        _side("equinox", "equinox_side", _STEPS, "", "equinox"),
        _side("torch", "torch_side", _CLASSIC, "", "torch"),
        _side("torch-fused", "torch_side", _CLASSIC - {"infer"}, "fused", "torch"),
        # Of a population it would compile each member by itself.
        _side("torch-compile", "torch_side", _CLASSIC - {"population"}, "compile", "torch"),
        _side("transformers", "transformers_side", frozenset({"generate"}), "", "transformers"),
    )
}
