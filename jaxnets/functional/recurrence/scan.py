"""Pure recurrent arithmetic: cells as step functions, and the one scan that runs any of them.

A cell says which weights it has, how it projects its inputs and how it makes one step. The scan
projects the inputs of all time steps as one matrix product in front of the loop, so that only the
product with the hidden state is left inside. Time comes first: [time, batch, features].
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

from jaxnets.core import at_least_float32
from jaxnets.functional.channels import along_channels
from jaxnets.functional.lengths import check_lengths, padding_mask
from jaxnets.functional.matmul import linear
from jaxnets.functional.recurrence.loop_matmul import (
    LoopKernel,
    kernel_gradient,
    loop_matmuls,
    matmul_with_tap,
    multiply,
)

Initializer: TypeAlias = Callable[..., jax.Array]
Tree = TypeVar("Tree")
#: The states of a cell, each [batch, hidden_size]; the first one is its output.
Carry: TypeAlias = tuple[jax.Array, ...]
#: Name -> array, as listed by `Cell.parameters`.
Weights: TypeAlias = Mapping[str, jax.Array]
#: One array for each gate, in the order that the cell names, each [batch, hidden_size].
Gates: TypeAlias = Sequence[jax.Array]
#: Functions that multiply [batch, hidden_size] by the recurrent kernels of some gates.
Products: TypeAlias = Sequence[Callable[[jax.Array], Gates]]


class Cell(abc.ABC):
    """One step of a recurrent layer, as a pure function of weights, carry and projected input.

    The kernels and the bias of all gates are packed side by side, in the order that the cell
    names. A subclass defines `advance`; one with further weights extends `parameters`.

    Attributes:
        num_gates: number of gates, candidates included.
        states: names of the arrays of the carry.
    """

    num_gates: ClassVar[int]
    states: ClassVar[tuple[str, ...]] = ("hidden",)

    @property
    def products(self) -> tuple[int, ...]:
        """Number of gates in each product with the recurrent kernel, from left to right."""
        return (self.num_gates,)

    def parameters(
        self, num_channels: int, hidden_size: int
    ) -> dict[str, tuple[Initializer, tuple[int, ...]]]:
        """List the weights: {name: (initializer, shape)}.

        Recurrent kernels start orthogonal, gate by gate (Saxe et al. 2013, arXiv:1312.6120).
        """
        packed, initializers = self.num_gates * hidden_size, jax.nn.initializers
        orthogonal = _each_gate(initializers.orthogonal(), self.num_gates)
        return {
            "input_kernel": (initializers.lecun_normal(), (num_channels, packed)),
            "recurrent_kernel": (orthogonal, (hidden_size, packed)),
            "bias": (initializers.zeros, (packed,)),
        }

    def project(self, weights: Weights, x: jax.Array) -> jax.Array:
        """Map inputs [..., channels] of any number of steps to [..., num_gates * hidden_size]."""
        projected = linear(x, weights["input_kernel"])
        return projected + along_channels(weights["bias"], projected)

    @abc.abstractmethod
    def advance(self, weights: Weights, carry: Carry, x: Gates, products: Products) -> Carry:
        """Advance one step.

        Args:
            weights: as listed by `parameters`; the recurrent kernel is reached by `products`.
            carry: states before the step, each [batch, hidden_size].
            x: the projected input of each gate, from `project`.
            products: one for each entry of the property `products`.

        Returns:
            The states after the step.
        """

    def step(self, weights: Weights, carry: Carry, projected: jax.Array) -> Carry:
        """Advance one step, with all weights: `advance` with plain matrix products.

        Args:
            weights: as listed by `parameters`.
            carry: states before the step, each [batch, hidden_size].
            projected: [batch, num_gates * hidden_size], from `project`.

        Returns:
            The states after the step.
        """
        products = [functools.partial(multiply, kernel) for kernel in self.kernels(weights)]
        return _advance(self, weights, carry, split_gates(self, projected), products)

    def kernels(self, weights: Weights) -> list[jax.Array]:
        """Cut the recurrent kernel into one for each entry of `products`."""
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
        """Run over projected inputs [time, batch, ...]; the rest as in `recurrent_scan`.

        Returns:
            Outputs [time, batch, hidden_size], arbitrary where not valid, and the last carry.
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

    Reverse-mode differentiable any number of times; forward mode is not supported.

    Args:
        cell: the step.
        weights: of the dtype of the matrix products.
        x: [time, batch, channels]; finite at the steps that are not valid, see `mask_padding`.
        carry: states before the first step, each [batch, hidden_size], float32 or wider: the
            rounding of a narrower state would add up over time.
        valid: bool [time, batch]; the other steps leave the carry as it is and give 0. All are
            valid by default.
        reverse: go from the last step to the first, so that with padding at the end each
            sequence starts at its own last step.

    Returns:
        Outputs [time, batch, hidden_size], in the order of `x` and the dtype of the weights, and
        the carry after the last step taken.

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
    projected = cell.project(weights, x)
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
    products = loop_matmuls(kernels, steps=len(projected))

    def advance(carry: Carry, inputs: tuple[Gates, jax.Array | None]) -> tuple[Carry, jax.Array]:
        now, valid = inputs
        after = keep(valid, _advance(cell, rest, carry, now, products), carry)
        return after, after[0].astype(projected.dtype)

    inputs = split_gates(cell, projected), valid
    carry, outputs = lax.scan(advance, carry, inputs, reverse=reverse, unroll=_steps_at_once())
    return outputs, carry


def _steps_at_once() -> int:
    """Return how many steps one turn of the loop takes.

    On GPUs a turn waits for its kernels to be started: an LSTM of 1024 units, 128 rows and 128
    steps takes 9.7 ms forward and back, and 7.7 with 8 steps at once (H200; cuDNN's takes 8.0). On
    CPU 4 steps at once gain nothing, and 16 are slower.
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
    """Run forward, with what `_scan_backward` needs.

    The plain gradient adds to an array of the size of the kernel at every step. Here the cotangent
    of each product goes to its tap instead, an input that has no influence, and once those of all
    steps are known one matrix product gives the kernel's.
    """
    shape, dtype = projected.shape[:2], carry[0].dtype
    taps = [jnp.zeros((*shape, kernel.shape[1]), dtype) for kernel in kernels]
    loop_kernels = [LoopKernel.of(kernel) for kernel in kernels]

    def run(
        rest: Weights, gates: Gates, carry: Carry, taps: Sequence[jax.Array]
    ) -> tuple[tuple[jax.Array, Carry], list[jax.Array]]:
        # Kept for the gradient: the carry and the products. What the cell makes of them is cheaper
        # to compute again than to write to one stack for each of its operations.
        @functools.partial(
            jax.checkpoint,
            policy=jax.checkpoint_policies.save_only_these_names("product"),
            prevent_cse=False,
        )
        def advance(carry: Carry, inputs: Any) -> tuple[Carry, Any]:
            now, valid, taps = inputs
            multiplied: list[jax.Array] = []

            def product(kernel: LoopKernel, tap: jax.Array, hidden: jax.Array) -> jax.Array:
                multiplied.append(hidden)
                return matmul_with_tap(kernel, tap, hidden)

            products = [
                functools.partial(product, kernel, tap)
                for kernel, tap in zip(loop_kernels, taps, strict=True)
            ]
            after = keep(valid, _advance(cell, rest, carry, now, products), carry)
            narrow = [hidden.astype(projected.dtype) for hidden in multiplied]
            return after, (after[0].astype(projected.dtype), narrow)

        carry, (outputs, multiplied) = lax.scan(
            *(advance, carry, (gates, valid, taps)), reverse=reverse, unroll=_steps_at_once()
        )
        return (outputs, carry), multiplied

    gates = split_gates(cell, projected)
    result, pullback, multiplied = jax.vjp(run, rest, gates, carry, taps, has_aux=True)
    return result, (pullback, multiplied)


def _scan_backward(
    cell: Cell, reverse: bool, residuals: Any, cotangents: tuple[jax.Array, Carry]
) -> tuple[Any, ...]:
    pullback, multiplied = residuals
    rest, gates, carry, products = pullback(cotangents)
    kernels = [
        kernel_gradient(hidden, product.astype(hidden.dtype))
        for hidden, product in zip(multiplied, products, strict=True)
    ]
    return kernels, rest, jnp.concatenate(gates, axis=-1), carry, None


_scan.defvjp(_scan_forward, _scan_backward)


def _advance(
    cell: Cell,
    weights: Weights,
    carry: Carry,
    gates: Gates,
    products: Sequence[Callable[[jax.Array], jax.Array]],
) -> Carry:
    """Advance the cell, with each product split into its gates, named for `_scan_forward`."""

    def of_gates(product: Callable[[jax.Array], jax.Array], count: int, hidden: jax.Array) -> Gates:
        parts = jnp.split(product(hidden), count, axis=-1)
        return [checkpoint_name(part, "product") for part in parts]

    split = [
        functools.partial(of_gates, product, count)
        for product, count in zip(products, cell.products, strict=True)
    ]
    return cell.advance(weights, carry, [at_least_float32(gate) for gate in gates], split)


def split_gates(cell: Cell, projected: jax.Array) -> list[jax.Array]:
    """Take projected inputs apart, before the loop.

    A step that reads several parts of one array at the loop's index is not vectorized by XLA's CPU
    program, and takes up to three times as long.

    Args:
        cell: whose gates they are.
        projected: [..., num_gates * hidden_size].

    Returns:
        One array [..., hidden_size] for each gate.
    """
    return jnp.split(projected, cell.num_gates, axis=-1)


def keep(valid: jax.Array | None, after: Tree, before: Tree) -> Tree:
    """Take the states after a step where it is valid, and those before it elsewhere.

    Args:
        valid: bool [batch]; None is all valid.
        after: pytree of arrays [batch, features].
        before: likewise.

    Returns:
        Pytree of the same structure.
    """
    if valid is None:
        return after
    taken = valid[:, None]
    return jax.tree.map(lambda a, b: jnp.where(taken, a, b), after, before)


def mask_padding(x: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Clear what lies beyond the end of each sequence: `clear_padding` with time in front.

    Args:
        x: [time, batch, channels], floating.
        lengths: integer [batch] in [0, time].

    Returns:
        `x` with 0 beyond each length, whatever stood there, and the mask of the valid steps, bool
        [time, batch]. Where a length that is known only when the program runs is out of range,
        the whole sequence is NaN, so that it stops training instead of being cut in silence.

    Raises:
        ValueError: lengths of another shape or dtype, or known to be out of range.
    """
    time, batch = x.shape[:2]
    inside = check_lengths(lengths, rows=batch, most=time)
    valid = padding_mask(lengths, (batch, time)).T
    kept = jnp.where(inside[None, :, None], x, jnp.asarray(jnp.nan, x.dtype))
    return jnp.where(valid[..., None], kept, jnp.zeros((), x.dtype)), valid


def _each_gate(initializer: Initializer, num_gates: int) -> Initializer:
    def initialize(
        key: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike
    ) -> jax.Array:
        gate = (shape[0], shape[1] // num_gates)
        # One after the other under vmap: on CPU, batches of the QR decompositions behind orthogonal
        # matrices wait for each other for ever if as many run at once as there are threads (found
        # with JAX 0.10.1).
        one = jax.custom_batching.sequential_vmap(lambda key: initializer(key, gate, dtype))
        keys = jax.random.split(key, num_gates)
        return jnp.concatenate([one(key) for key in keys], axis=1)

    return initialize
