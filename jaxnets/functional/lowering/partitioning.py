"""Where the compiler would split activations otherwise than the method means."""

from __future__ import annotations

import math

import jax
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from jaxnets.core import DATA_AXIS, FSDP_AXIS
from jaxnets.functional.lowering.platforms import sizes_are_known


def split_rows(x: jax.Array) -> jax.Array:
    """Keep activations split by rows on a mesh whose axis "fsdp" splits parameters too.

    A kernel whose channels are split over the axis of the rows leaves XLA the choice: gather the
    kernel, or let every device multiply its channels for all rows and reduce the products. It
    chooses the second in silence, and activations of all rows stay on every device: a step of
    GPT-2 small on four devices needs 26 GiB on each, and 8 with this constraint.

    Args:
        x: activations [rows, ...].

    Returns:
        The same. Without a mesh of `jax.set_mesh` with axes of type Auto and "fsdp" of two or more
        devices, or with rows that it does not divide, nothing is done.

    References:
        Zhao et al. 2023, arXiv:2304.11277 (parameters are gathered for use); Xu et al. 2021,
        arXiv:2105.04663, section 3.2 (annotations of activations).
    """
    names = _parameter_mesh()
    parts = math.prod(jax.sharding.get_abstract_mesh().shape[name] for name in names)
    if not names or x.ndim < 2 or not sizes_are_known(x.shape) or x.shape[0] % parts:
        return x
    rest = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    return lax.with_sharding_constraint(x, PartitionSpec(names, *rest))


def whole_vectors(table: jax.Array) -> jax.Array:
    """Gather the features of a table before rows of it are read, on such a mesh.

    Otherwise XLA reads parts of vectors for the rows of all devices, and moves them after that.

    Args:
        table: [vocabulary, features].

    Returns:
        The same.
    """
    if not _parameter_mesh():
        return table
    return lax.with_sharding_constraint(table, PartitionSpec(PartitionSpec.UNCONSTRAINED, None))


def _parameter_mesh() -> tuple[str, ...]:
    """Return the axes that split rows, () without a mesh whose axis "fsdp" splits parameters."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape.get(FSDP_AXIS, 1) == 1:
        return ()
    if any(each != AxisType.Auto for each in mesh.axis_types):
        return ()
    return tuple(name for name in (FSDP_AXIS, DATA_AXIS) if name in mesh.shape)
