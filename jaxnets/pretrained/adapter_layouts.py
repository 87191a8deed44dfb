"""How the files of PEFT store updates of low rank, for each kind of layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from jaxnets.pretrained.convolution_layouts import ConvolutionKernel, PatchKernel
from jaxnets.pretrained.layouts import (
    Blocks,
    RotaryPairs,
    Split,
    Transpose,
)
from jaxnets.pretrained.rules import Assignment

#: What to do about an adapter that does not fit.
OTHER_NETWORK = "give the network that the adapter was made for"


@dataclasses.dataclass(frozen=True)
class Target:
    """A kernel, or several that one tensor of the file joins, and how its factors are stored.

    Attributes:
        module: name of the layer in the file of the network.
        assignment: its tensor, and the kernels.
        kind: of the layer in torch.
    """

    module: str
    assignment: Assignment
    kind: Literal["linear", "transposed", "convolution", "embedding"]

    @property
    def paths(self) -> list[str]:
        """The kernels, below "params"."""
        return [path.removeprefix("params/") for path in self.assignment.paths]

    def from_file(
        self, factors: Mapping[str, np.ndarray], where: str
    ) -> list[dict[str, np.ndarray]]:
        """Return the factors of each kernel: [..., channels, rank] and [rank, features].

        Args:
            factors: "a", "b" and, for DoRA, "magnitude".
            where: file and layer, for errors.

        Raises:
            ValueError: they are no update of low rank, or one of another layer.
        """
        a, b = factors["a"], factors["b"]
        if min(a.ndim, b.ndim) < 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
            raise ValueError(
                f"{where} has factors of shapes {a.shape} and {b.shape}, which are no update of "
                "low rank; get the adapter anew"
            )
        try:
            return self._from_file(factors)
        except ValueError as error:
            raise ValueError(f"{where}: {error}; {OTHER_NETWORK}") from error

    def _from_file(self, factors: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
        a, b = factors["a"], factors["b"]
        count = len(self.assignment.paths)
        if self.kind == "embedding":
            found = [{"lora_a": a.T, "lora_b": b.T}]
        elif self.kind == "convolution":
            found = [
                {"lora_a": self.assignment.from_file([a])[0], "lora_b": b.reshape(b.shape[:2]).T}
            ]
        else:
            found = [{"lora_a": a.T, "lora_b": part} for part in self._outputs_from_file(b)]
        if "magnitude" in factors:
            magnitude = factors["magnitude"].reshape(-1)
            parts = [magnitude]
            if count > 1 or self.kind in ("linear", "transposed"):
                parts = [part[0] for part in self._outputs_from_file(magnitude[:, None])]
            for one, part in zip(found, parts, strict=True):
                one["magnitude_scale"] = part
        return found

    def to_file(self, factors: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Return the tensors of the file by the ends of their names."""
        if self.kind == "embedding":
            (one,) = factors
            tensors = {
                "lora_embedding_A": one["lora_a"].T,
                "lora_embedding_B": one["lora_b"].T,
            }
        elif self.kind == "convolution":
            (one,) = factors
            a, b = self.assignment.to_file([one["lora_a"]])[0], one["lora_b"].T
            ones = (1,) * (a.ndim - 2)  # of patches the kernel here has no window
            tensors = {"lora_A.weight": a, "lora_B.weight": b.reshape(*b.shape, *ones)}
        else:
            a, parts = joined(
                [one["lora_a"] for one in factors], [one["lora_b"] for one in factors]
            )
            tensors = {"lora_A.weight": a.T, "lora_B.weight": self._outputs_to_file(parts)}
        if "magnitude_scale" in factors[0]:
            parts = [one["magnitude_scale"][None] for one in factors]
            magnitude = parts[0][0]
            if self.kind in ("linear", "transposed"):
                magnitude = self._outputs_to_file(parts)[:, 0]
            elif self.kind == "convolution":
                magnitude = magnitude.reshape(1, -1, *ones)
            tensors["lora_magnitude_vector"] = magnitude
        return tensors

    def _outputs_from_file(self, matrix: np.ndarray) -> list[np.ndarray]:
        """Arrange [features, rank] as the kernels: [rank, features of each]."""
        return self.assignment.from_file([matrix if self.kind == "linear" else matrix.T])

    def _outputs_to_file(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        matrix: np.ndarray = self.assignment.to_file(parts)[0]
        return matrix if self.kind == "linear" else matrix.T


def find_target(module: str, assignments: Mapping[str, Assignment], where: str) -> Target:
    """Return how the factors of a layer are stored.

    Args:
        module: name of the layer in the file of the network.
        assignments: {name of a tensor of that file: which kernels it is}.
        where: file and layer, for errors.

    Raises:
        ValueError: PEFT's layout has no update of low rank for it.
    """
    one = assignments.get(f"{module}.weight")
    if one is None:  # a parameter of its own, such as positions of ViT
        raise ValueError(
            f"{where}: {module} is no layer with a weight, so it has no update of low rank in "
            "PEFT's layout; train it as a whole"
        )
    layout, axis = one.layout, 1
    if not all(path.startswith("params/") for path in one.paths) or len(one.names) > 1:
        raise ValueError(f"{where}: {one.names} have no update of low rank in PEFT's layout")
    if one.paths[0].endswith("/embedding") and not layout:
        return Target(module, one, "embedding")
    if len(layout) == 1 and isinstance(layout[0], ConvolutionKernel | PatchKernel):
        return Target(module, one, "convolution")
    kind: Literal["linear", "transposed"] = "transposed"
    if any(isinstance(own, Transpose) for own in layout):
        kind, axis = "linear", 0
    for own in layout:
        of_outputs = isinstance(own, Split | RotaryPairs | Blocks) and own.axis == axis
        if not of_outputs and not isinstance(own, Transpose):
            raise ValueError(
                f"{where}: a kernel that is stored by {type(own).__name__} has no update of low "
                "rank in PEFT's layout; merge the adapter and save the network"
            )
    return Target(module, one, kind)


def check_fits(part: Mapping[str, np.ndarray], shape: tuple[int, ...], where: str) -> None:
    """Check that the factors of a kernel have its shape.

    Raises:
        ValueError: they do not; the message begins with `where`.
    """
    a, b = part["lora_a"], part["lora_b"]
    magnitude = part.get("magnitude_scale", b[0])
    if a.shape[:-1] != shape[:-1] or b.shape[1:] != shape[-1:] or magnitude.shape != shape[-1:]:
        raise ValueError(
            f"{where} has factors of shapes {a.shape} and {b.shape} and magnitudes of shape "
            f"{magnitude.shape}, which do not fit a kernel of shape {shape}; {OTHER_NETWORK}"
        )


def joined(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Join updates of kernels with the same inputs: one A, and a B for each of them."""
    if all(one.shape == a[0].shape and np.array_equal(one, a[0]) for one in a):
        return a[0], list(b)
    rank = sum(one.shape[-1] for one in a)
    parts, start = [], 0
    for one in b:
        part = np.zeros((rank, one.shape[-1]), np.float32)
        part[start : start + one.shape[0]] = one
        parts.append(part)
        start += one.shape[0]
    return np.concatenate(a, axis=-1), parts
