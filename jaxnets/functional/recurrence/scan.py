"""Recurrent cells as pure step functions, and the one scan that runs any of them.

A cell defines its weights, the projection of its inputs and one step. The scan projects the inputs
of all time steps in one matmul before the loop, so that only the matmul with the hidden state is
left inside. Arrays are time-major: [time, batch, features].
"""

from __future__ import annotations

import abc
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxnets.core import at_least_float32, widened
from jaxnets.functional.channels import along_channels
from jaxnets.functional.lengths import check_lengths, padding_mask
from jaxnets.functional.matmul import linear
from jaxnets.functional.recurrence.loop_matmul import (
    LoopKernel,
    kernel_gradient_over_time,
    loop_matmuls,
    multiply,
    perturbed_matmul,
)

Initializer: TypeAlias = Callable[..., jax.Array]
Tree = TypeVar("Tree")
#: The states of a cell, each [batch, hidden_size]; the first one is the output.
Carry: TypeAlias = tuple[jax.Array, ...]
#: Name -> array, as listed by `Cell.parameters`.
Weights: TypeAlias = Mapping[str, jax.Array]
#: One array a gate, each [batch, hidden_size], in the order in which the cell packs its gates.
Gates: TypeAlias = Sequence[jax.Array]
#: Functions that multiply [batch, hidden_size] by the recurrent kernels of some gates.
Products: TypeAlias = Sequence[Callable[[jax.Array], Gates]]


class Cell(abc.ABC):
    """One step of a recurrent layer, as a pure function of weights, carry and projected input.

    The kernels and the biases of all gates are concatenated along the last axis, in the order that
    the docstring of the cell gives. A subclass defines `advance`; one with further weights extends
    `parameters`. Corresponds to `flax.linen.RNNCellBase`, whose cells are modules and multiply
    gate by gate.

    Attributes:
        num_gates: number of gates, the candidate included.
        states: names of the arrays of the carry.
    """

    num_gates: ClassVar[int]
    states: ClassVar[tuple[str, ...]] = ("hidden",)

    @property
    def products(self) -> tuple[int, ...]:
        """Number of gates in each matmul with the recurrent kernel, from left to right."""
        return (self.num_gates,)

    def parameters(
        self, num_channels: int, hidden_size: int
    ) -> dict[str, tuple[Initializer, tuple[int, ...]]]:
        """Return the weights as {name: (initializer, shape)}.

        The initial recurrent kernel of each gate is orthogonal (Saxe et al. 2013, arXiv:1312.6120).
        """
        packed, initializers = self.num_gates * hidden_size, jax.nn.initializers
        orthogonal = _each_gate(initializers.orthogonal(), self.num_gates)
        return {
            "input_kernel": (initializers.lecun_normal(), (num_channels, packed)),
            "recurrent_kernel": (orthogonal, (hidden_size, packed)),
            "bias": (initializers.zeros, (packed,)),
        }

    def project(self, weights: Weights, x: jax.Array) -> jax.Array:
        """Project inputs [..., channels] of all steps to [..., num_gates * hidden_size]."""
        projected = linear(x, weights["input_kernel"])
        return projected + along_channels(weights["bias"], projected)

    @abc.abstractmethod
    def advance(self, weights: Weights, carry: Carry, x: Gates, products: Products) -> Carry:
        """Advance one step.

        Args:
            weights: as in `parameters`; the recurrent kernel is applied by `products`.
            carry: states before the step, each [batch, hidden_size].
            x: the projected input of each gate, from `project`.
            products: one function for each entry of the property `products`.

        Returns:
            The states after the step.
        """

    def step(self, weights: Weights, carry: Carry, projected: jax.Array) -> Carry:
        """Advance one step outside of a scan: `advance` with plain matmuls.

        Args:
            weights: as in `parameters`.
            carry: states before the step, each [batch, hidden_size].
            projected: [batch, num_gates * hidden_size], from `project`.

        Returns:
            The states after the step.
        """
        products = [functools.partial(multiply, kernel) for kernel in self.kernels(weights)]
        return _advance(self, weights, carry, split_gates(self, projected), products)

    def kernels(self, weights: Weights) -> list[jax.Array]:
        """Split the recurrent kernel, [hidden_size, columns], into one for each of `products`."""
        kernel = weights["recurrent_kernel"]
        ends = np.cumsum((0, *self.products)) * kernel.shape[0]
        return [kernel[:, first:end] for first, end in itertools.pairwise(ends)]

    def scan(
        self,
        weights: Weights,
        projected: jax.Array,
        carry: Carry,
        valid: jax.Array | None,
        *,
        reverse: bool,
    ) -> tuple[jax.Array, Carry]:
        """Run over projected inputs [time, batch, ...]; the other arguments as in `recurrent_scan`.

        Returns:
            Outputs [time, batch, hidden_size], arbitrary where not valid, and the final carry.
        """
        rest = {name: array for name, array in weights.items() if name != "recurrent_kernel"}
        return _scan(self, reverse, self.kernels(weights), rest, projected, carry, valid)


def recurrent_scan(
    cell: Cell,
    weights: Weights,
    x: jax.Array,
    carry: Carry,
    *,
    valid: jax.Array | None = None,
    reverse: bool = False,
) -> tuple[jax.Array, Carry]:
    """Run a cell over a sequence.

    Corresponds to `flax.linen.RNN`, with a backward pass of its own: the recurrent kernel gets its
    gradient from one matmul after the loop, and a cell is recomputed from its carry and matmuls.
    Reverse-mode differentiable any number of times; forward mode is not supported.

    Args:
        cell: the step.
        weights: of the dtype in which the matmuls are computed.
        x: [time, batch, channels]; finite at invalid steps too, see `mask_padding`.
        carry: states before the first step, each [batch, hidden_size], float32 or wider: the
            rounding of a narrower state would add up over time.
        valid: bool [time, batch]; an invalid step passes the carry through and outputs 0. By
            default all steps are valid.
        reverse: run from the last step to the first; with padding at the end each sequence
            starts at its own last step.

    Returns:
        Outputs [time, batch, hidden_size], in the order of `x` and the dtype of the weights, and
        the final carry.

    Raises:
        ValueError: shapes or types that do not fit.

    Example:
        >>> from jaxnets.functional.recurrence.cells import ElmanCell
        >>> cell, x = ElmanCell(), jnp.ones((4, 2, 3))
        >>> weights = {
        ...     name: initializer(jax.random.key(0), shape, jnp.float32)
        ...     for name, (initializer, shape) in cell.parameters(3, 5).items()
        ... }
        >>> outputs, (hidden,) = recurrent_scan(cell, weights, x, (jnp.zeros((2, 5)),))
        >>> outputs.shape, bool(jnp.all(outputs[-1] == hidden))
        ((4, 2, 5), True)
    """
    if x.ndim != 3 or x.shape[0] == 0:
        raise ValueError(f"inputs of shape {x.shape} are not [time, batch, channels]")
    if valid is not None and (valid.shape != x.shape[:2] or valid.dtype != bool):
        raise ValueError(
            f"valid steps of shape {valid.shape} and type {valid.dtype} do not fit inputs of "
            f"shape {x.shape}; give bool [time, batch]"
        )
    projected = cell.project(weights, x)
    shape = (x.shape[1], projected.shape[-1] // cell.num_gates)
    shapes = jax.tree.map(jnp.shape, carry)
    if shapes != (shape,) * len(cell.states):
        raise ValueError(
            f"a carry of shapes {shapes} does not fit inputs of shape {x.shape}; give a tuple of "
            f"{', '.join(cell.states)}, each [batch, hidden_size], which is {shape} here"
        )
    outputs, carry = cell.scan(weights, projected, carry, valid, reverse=reverse)
    if valid is not None:
        outputs = jnp.where(valid[..., None], outputs, jnp.zeros((), outputs.dtype))
    return outputs, carry


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(
    cell: Cell,
    reverse: bool,
    kernels: Sequence[jax.Array],
    rest: Weights,
    projected: jax.Array,
    carry: Carry,
    valid: jax.Array | None,
) -> tuple[jax.Array, Carry]:
    products = loop_matmuls(kernels, steps=projected.shape[0])

    def advance(carry: Carry, inputs: tuple[Gates, jax.Array | None]) -> tuple[Carry, jax.Array]:
        gates, valid = inputs
        after = select_valid(valid, _advance(cell, rest, carry, gates, products), carry)
        return after, after[0].astype(projected.dtype)

    inputs = split_gates(cell, projected), valid
    carry, outputs = lax.scan(advance, carry, inputs, reverse=reverse, unroll=_unroll())
    return outputs, carry


def _unroll() -> int:
    """Return the number of steps in one iteration of the loop.

    On GPUs an iteration waits for its kernels to be launched: an LSTM of 1024 units, batch 128 and
    128 steps takes 9.7 ms forward and backward, and 7.7 with 8 steps an iteration (H200; cuDNN's
    LSTM takes 8.0). On CPU 4 steps gain nothing, and 16 are slower.
    """
    return 8 if jax.default_backend() == "gpu" else 1


def _scan_forward(
    cell: Cell,
    reverse: bool,
    kernels: Sequence[jax.Array],
    rest: Weights,
    projected: jax.Array,
    carry: Carry,
    valid: jax.Array | None,
) -> tuple[tuple[jax.Array, Carry], Any]:
    """Run forward, and return the residuals of `_scan_backward`.

    The default gradient accumulates into an array of the size of the kernel at every step. Here
    each matmul has a perturbation, an input of zeros that receives the cotangent of its result.
    After the loop one matmul with those of all steps gives the gradient of the kernel.
    """
    shape, dtype = projected.shape[:2], carry[0].dtype
    # [time, batch, columns]
    perturbations = [jnp.zeros((*shape, kernel.shape[1]), dtype) for kernel in kernels]
    loop_kernels = [LoopKernel.of(kernel) for kernel in kernels]

    def run(
        rest: Weights, gates: Gates, carry: Carry, perturbations: Sequence[jax.Array]
    ) -> tuple[tuple[jax.Array, Carry], list[jax.Array]]:
        rest = widened(rest)  # their gradients add up over time, in their dtype

        # Residuals are the carry and the products. The cell's elementwise operations are cheaper to
        # recompute than to save, each in a stack over time.
        @functools.partial(
            jax.checkpoint,
            policy=jax.checkpoint_policies.save_only_these_names("product"),
            prevent_cse=False,
        )
        def advance(carry: Carry, inputs: Any) -> tuple[Carry, Any]:
            gates, valid, perturbations = inputs
            operands: list[jax.Array] = []

            def product(
                kernel: LoopKernel, perturbation: jax.Array, hidden: jax.Array
            ) -> jax.Array:
                operands.append(hidden)
                return perturbed_matmul(kernel, perturbation, hidden)

            products = [
                functools.partial(product, *pair)
                for pair in zip(loop_kernels, perturbations, strict=True)
            ]
            after = select_valid(valid, _advance(cell, rest, carry, gates, products), carry)
            narrow = [hidden.astype(projected.dtype) for hidden in operands]
            return after, (after[0].astype(projected.dtype), narrow)

        carry, (outputs, operands) = lax.scan(
            *(advance, carry, (gates, valid, perturbations)), reverse=reverse, unroll=_unroll()
        )
        return (outputs, carry), operands

    gates = split_gates(cell, projected)
    result, pullback, operands = jax.vjp(run, rest, gates, carry, perturbations, has_aux=True)
    return result, (pullback, operands)


def _scan_backward(
    cell: Cell, reverse: bool, residuals: Any, cotangents: tuple[jax.Array, Carry]
) -> tuple[Any, ...]:
    pullback, operands = residuals
    drest, dgates, dcarry, dproducts = pullback(cotangents)
    dkernels = [
        kernel_gradient_over_time(hidden, dproduct.astype(hidden.dtype))
        for hidden, dproduct in zip(operands, dproducts, strict=True)
    ]
    return dkernels, drest, jnp.concatenate(dgates, axis=-1), dcarry, None


_scan.defvjp(_scan_forward, _scan_backward)


def _advance(
    cell: Cell,
    weights: Weights,
    carry: Carry,
    gates: Gates,
    products: Sequence[Callable[[jax.Array], jax.Array]],
) -> Carry:
    """Advance the cell, each product split into its gates and named for the checkpoint policy."""

    def of_gates(product: Callable[[jax.Array], jax.Array], count: int, hidden: jax.Array) -> Gates:
        parts = jnp.split(product(hidden), count, axis=-1)
        return [checkpoint_name(part, "product") for part in parts]

    split = [
        functools.partial(of_gates, product, count)
        for product, count in zip(products, cell.products, strict=True)
    ]
    return cell.advance(weights, carry, [at_least_float32(gate) for gate in gates], split)


def split_gates(cell: Cell, projected: jax.Array) -> list[jax.Array]:
    """Split projected inputs into gates, before the loop.

    XLA's CPU compiler does not vectorize a step that slices several parts from one array at the
    loop's index; such a step takes up to three times as long.

    Args:
        cell: defines the gates.
        projected: [..., num_gates * hidden_size].

    Returns:
        One array [..., hidden_size] for each gate.
    """
    return jnp.split(projected, cell.num_gates, axis=-1)


def select_valid(valid: jax.Array | None, after: Tree, before: Tree) -> Tree:
    """Select the states after a step where the step is valid, and those before it elsewhere.

    Args:
        valid: bool [batch]; None means all valid.
        after: pytree of arrays [batch, features].
        before: likewise.

    Returns:
        Pytree of the same structure.
    """
    if valid is None:
        return after
    valid = valid[:, None]  # [batch, 1]
    return jax.tree.map(lambda a, b: jnp.where(valid, a, b), after, before)


def mask_padding(x: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Set everything past the end of each sequence to 0: `clear_padding`, time-major.

    Args:
        x: [time, batch, channels], floating.
        lengths: integer [batch] in [0, time].

    Returns:
        `x` with 0 past each length, even where it was NaN, and the mask of the valid steps, bool
        [time, batch]. If a traced length is out of range, the whole sequence is NaN: training
        stops instead of silently truncating it.

    Raises:
        ValueError: lengths of another shape or dtype, or concrete ones that are out of range.
    """
    time, batch = x.shape[:2]
    inside = check_lengths(lengths, rows=batch, most=time)
    valid = padding_mask(lengths, (batch, time)).T
    x = jnp.where(inside[None, :, None], x, jnp.asarray(jnp.nan, x.dtype))
    return jnp.where(valid[..., None], x, jnp.zeros((), x.dtype)), valid


def _each_gate(initializer: Initializer, num_gates: int) -> Initializer:
    def initialize(
        key: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike
    ) -> jax.Array:
        gate = (shape[0], shape[1] // num_gates)
        # Sequential under vmap. The QR decompositions of orthogonal matrices deadlock on CPU if as
        # many batches of them run at once as there are threads (JAX 0.10.1).
        one = jax.custom_batching.sequential_vmap(lambda key: initializer(key, gate, dtype))
        keys = jax.random.split(key, num_gates)
        return jnp.concatenate([one(key) for key in keys], axis=1)

    return initialize
