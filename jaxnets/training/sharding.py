"""Device meshes, and which part of a state each device holds, by rules for parameter paths.

A mesh has up to four axes. "data" splits the batch. "fsdp" splits the batch and the parameters,
which are gathered for use. "tensor" splits parameters and the features that they compute.
"sequence" splits the time of a batch. The compiler inserts the collectives.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxnets.core import DATA_AXIS, FSDP_AXIS, SEQUENCE_AXIS, TENSOR_AXIS, TrainState, tree_path

#: (regular expression, searched in the path of a parameter; partition of its last axes), in order.
ShardingRules: TypeAlias = Sequence[tuple[str, PartitionSpec]]


def device_mesh(
    *,
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    sequence: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Make a mesh of devices with the axes "data", "fsdp", "sequence" and "tensor".

    Devices that are near each other, such as those of one host, are neighbors on the last axes,
    whose collectives move the most bytes.

    Args:
        data: parts of the batch, whose parameters are copies. At most one size may be -1: all
            devices that are left.
        fsdp: parts of the batch and of the parameters.
        tensor: parts of features, heads and vocabulary.
        sequence: parts of the time axis.
        devices: by default all devices of all processes.

    Returns:
        A mesh of four axes of the type Auto, some of size 1: the compiler propagates shardings.

    Raises:
        ValueError: a size that is neither -1 nor 1 or more, or sizes whose product is not the
            number of devices.

    Example:
        >>> dict(device_mesh(devices=jax.devices()[:1]).shape)
        {'data': 1, 'fsdp': 1, 'sequence': 1, 'tensor': 1}
    """
    devices = list(devices) if devices is not None else jax.devices()
    sizes = {DATA_AXIS: data, FSDP_AXIS: fsdp, SEQUENCE_AXIS: sequence, TENSOR_AXIS: tensor}
    for name, size in sizes.items():
        if not isinstance(size, int) or (size != -1 and size < 1):
            raise ValueError(f"{name}={size!r} is no number of devices; give 1 or more, or -1 once")
    open_axes = [name for name, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise ValueError(f"{' and '.join(open_axes)} are -1; leave one of them to be computed")
    known = math.prod(size for size in sizes.values() if size != -1)
    if open_axes:
        sizes[open_axes[0]] = len(devices) // known
    if math.prod(sizes.values()) != len(devices) or 0 in sizes.values():
        given = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "1"
        raise ValueError(
            f"a mesh of {given if not open_axes else known} does not use {len(devices)} devices; "
            "give sizes whose product is their number, or fewer devices"
        )
    return _make_mesh(sizes, devices)


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make a mesh of devices with one axis, `DATA_AXIS`.

    Args:
        devices: by default all devices of all processes.

    Returns:
        A mesh whose axis has the type Auto: the compiler propagates shardings.
    """
    devices = list(devices) if devices is not None else jax.devices()
    return _make_mesh({DATA_AXIS: len(devices)}, devices)


def _make_mesh(sizes: dict[str, int], devices: list[jax.Device]) -> Mesh:
    types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types, devices=devices)


def batch_partition(mesh: Mesh) -> PartitionSpec:
    """Return the default partition of a batch: its leading axis over "fsdp" and "data".

    The order matters. With "data" first, XLA exchanges rows of products with kernels that are split
    over "fsdp" and "tensor" (JAX 0.10.1 and 0.12.0), so that gradients are wrong.

    Args:
        mesh: any mesh.

    Returns:
        The partition, over those of the two axes that the mesh has.

    Raises:
        ValueError: it has neither.

    Example:
        >>> tuple(batch_partition(device_mesh(devices=jax.devices()[:1])))
        (('fsdp', 'data'),)
    """
    names = tuple(name for name in (FSDP_AXIS, DATA_AXIS) if name in mesh.shape)
    if not names:
        raise ValueError(
            f"the mesh has the axes {', '.join(mesh.axis_names)} and none is {DATA_AXIS!r}; name "
            "the axis of the rows by batch_spec"
        )
    return PartitionSpec(names if len(names) > 1 else names[0])


def check_batch_partition(spec: PartitionSpec, mesh: Mesh) -> None:
    """Check the order of the mesh axes that split a batch; see `batch_partition`.

    Args:
        spec: partition of the arrays of a batch.
        mesh: the mesh.

    Raises:
        ValueError: an axis that the mesh lacks, or "data" stands before "fsdp" on a mesh whose
            "tensor" axis has several devices.
    """
    for name in itertools.chain.from_iterable(map(mesh_axes, spec)):
        if name not in mesh.shape:
            raise ValueError(
                f"batch_spec names the axis {name!r}; the mesh has {', '.join(mesh.axis_names)}"
            )
    if mesh.shape.get(TENSOR_AXIS, 1) == 1:
        return
    for names in map(mesh_axes, spec):
        order = [name for name in names if name in (DATA_AXIS, FSDP_AXIS)]
        if order == [DATA_AXIS, FSDP_AXIS]:
            raise ValueError(
                f"batch_spec splits rows over {names}; name {FSDP_AXIS!r} before {DATA_AXIS!r}: in "
                "this order XLA exchanges rows of products with kernels that are split over "
                f"{FSDP_AXIS!r} and {TENSOR_AXIS!r}, and gradients are wrong"
            )


def leading_part(spec: PartitionSpec, num_axes: int) -> PartitionSpec:
    """Return the partition of the first axes, for an array that has fewer than others.

    Args:
        spec: partition of the arrays of a batch.
        num_axes: of one of them.

    Returns:
        At most `num_axes` entries.
    """
    return PartitionSpec(*spec[:num_axes])


def mesh_axes(names: Any) -> tuple[str, ...]:
    """Return the mesh axes of one entry of a partition: a name, several or None.

    Args:
        names: the entry.

    Returns:
        A tuple of names.
    """
    return (names,) if isinstance(names, str) else tuple(names or ())


def place(tree: Any, shardings: Any) -> Any:
    """Place what each process holds as a whole on the devices of all; other arrays stay.

    Args:
        tree: pytree of arrays, the same in every process.
        shardings: one for each array; it may stand for a whole part of the tree.

    Returns:
        The tree, of arrays over all processes.
    """

    def one(sharding: NamedSharding, array: Any) -> Any:
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            return array
        if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
            # JAX places random keys across processes in programs only.
            return jax.jit(lambda key: key, out_shardings=sharding)(array)
        whole = np.asarray(array)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    def part(sharding: NamedSharding, tree: Any) -> Any:
        return jax.tree.map(functools.partial(one, sharding), tree)

    return jax.tree.map(part, shardings, tree)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Replicate every array of a tree over the devices of a mesh.

    Args:
        tree: pytree of arrays.
        mesh: any mesh.

    Returns:
        The tree, replicated.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    return place(tree, everywhere) if mesh.is_multi_process else jax.device_put(tree, everywhere)


def fsdp_sharding(tree: Any, mesh: Mesh, *, min_bytes: int = 4 * 2**20) -> Any:
    """Choose shardings that partition large arrays over the data axis (FSDP, ZeRO stage 3).

    It needs no rules and looks at sizes only. `state_sharding` follows rules for parameter paths.

    Args:
        tree: a TrainState or any pytree of arrays or `jax.ShapeDtypeStruct`.
        mesh: a mesh with the axis `DATA_AXIS`.
        min_bytes: smaller arrays are replicated, because gathering them costs more than it saves.

    Returns:
        A tree of shardings: each large array is partitioned on its largest axis whose size is
        divisible by the number of devices.

    References:
        Zhao et al., 2023, arXiv:2304.11277; the choice of the axis follows common practice.
    """
    num_devices = mesh.shape[DATA_AXIS]

    def choose(leaf: Any) -> NamedSharding:
        spec: list[str | None] = [None] * len(leaf.shape)
        divisible = [axis for axis, size in enumerate(leaf.shape) if size % num_devices == 0]
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) and divisible:
            num_bytes = math.prod(leaf.shape) * leaf.dtype.itemsize
            if num_bytes >= min_bytes:
                spec[max(divisible, key=lambda axis: leaf.shape[axis])] = DATA_AXIS
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(choose, tree)


def state_sharding(state: TrainState, mesh: Mesh, rules: ShardingRules) -> TrainState:
    """Choose the sharding of every array of a state by rules for the paths of its parameters.

    The first rule whose pattern occurs in the path of a parameter decides. Its partition is that of
    the last axes, so that it holds for layers in a loop too, which have one axis more. The axes of
    the mesh that it does not name, or that do not divide a size, keep copies. Arrays of the
    optimizer's state, such as moments, averages and float32 masters, are partitioned as the
    parameter of their path and shape; everything else is replicated.

    Args:
        state: arrays, or their shapes, as from `jax.eval_shape`.
        mesh: from `device_mesh`. Of the four axes of `device_mesh` it may lack some.
        rules: from `sharding_rules`, or your own.

    Returns:
        A state of shardings, for `jax.device_put`, `sharded_step` and `checkpoint.restore`.

    Raises:
        ValueError: no rule matches a parameter, which is named, a partition has more entries than
            the parameter has axes, or a rule is no pair of a regular expression and a partition
            over known axes.
        TypeError: `state` is no `TrainState`.

    Example:
        >>> import optax
        >>> from jaxnets.core import Update
        >>> from jaxnets.training.step import create_train_state
        >>> params = {"dense": {"kernel": np.ones((4, 8)), "bias": np.ones(8)}}
        >>> update = Update(lambda *_: None, optax.sgd(0.1))
        >>> state = create_train_state({"params": params}, update, rng=jax.random.key(0))
        >>> rules = [("kernel$", PartitionSpec("fsdp", "tensor")), ("bias$", PartitionSpec())]
        >>> mesh = device_mesh(devices=jax.devices()[:1])
        >>> tuple(state_sharding(state, mesh, rules).params["dense"]["kernel"].spec)
        ('fsdp', 'tensor')

    References:
        Shoeybi et al. 2019, arXiv:1909.08053, section 3 (tensor parallelism); Zhao et al. 2023,
        arXiv:2304.11277 (fully sharded data parallelism).
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    if not isinstance(state, TrainState):
        raise TypeError(
            f"state is a {type(state).__name__}; give a TrainState, as from create_train_state"
        )
    compiled = _checked_rules(rules, mesh)
    chosen: dict[tuple[str, tuple[int, ...]], NamedSharding] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        name = tree_path(path)
        chosen[name, leaf.shape] = NamedSharding(mesh, _partition(name, leaf.shape, compiled, mesh))

    def follow(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        # The path of a moment ends with that of its parameter.
        for start in range(len(path)):
            found = chosen.get((tree_path(path[start:]), leaf.shape))
            if found is not None:
                return found
        return replicated

    return dataclasses.replace(
        jax.tree.map(lambda _: replicated, state),
        params=jax.tree_util.tree_map_with_path(follow, state.params),
        opt_state=jax.tree_util.tree_map_with_path(follow, state.opt_state),
    )


def _checked_rules(rules: ShardingRules, mesh: Mesh) -> list[tuple[re.Pattern[str], Any]]:
    """Compile the patterns of rules that are well-formed."""
    known = {DATA_AXIS, FSDP_AXIS, SEQUENCE_AXIS, TENSOR_AXIS, *mesh.axis_names}
    checked = []
    for rule in [rules] if isinstance(rules, (str, dict)) else rules:
        if not isinstance(rule, tuple) or len(rule) != 2 or not isinstance(rule[1], PartitionSpec):
            raise ValueError(
                f"{rule!r} is no sharding rule; give a list of (pattern, PartitionSpec), as from "
                "sharding_rules('transformer')"
            )
        for name in itertools.chain.from_iterable(map(mesh_axes, rule[1])):
            if name not in known:
                raise ValueError(
                    f"the sharding rule {rule!r} names the axis {name!r}; the mesh has "
                    f"{', '.join(mesh.axis_names)}"
                )
        try:
            checked.append((re.compile(rule[0]), rule[1]))
        except re.error as error:
            raise ValueError(f"the sharding rule {rule!r} has no valid pattern: {error}") from error
    return checked


def _partition(
    name: str, shape: tuple[int, ...], rules: Sequence[tuple[re.Pattern[str], Any]], mesh: Mesh
) -> PartitionSpec:
    """Return the partition of one parameter by the first rule that matches."""
    spec = next((spec for pattern, spec in rules if pattern.search(name)), None)
    if spec is None:
        raise ValueError(
            f"no sharding rule matches {name} {list(shape)}; add one, such as "
            f"({name.rsplit('/', 1)[-1] + '$'!r}, PartitionSpec()) to keep copies"
        )
    if len(spec) > len(shape):
        raise ValueError(
            f"the sharding rule for {name} {list(shape)} is {spec}, of {len(spec)} axes; give at "
            f"most {len(shape)}"
        )
    entries: list[Any] = [None] * (len(shape) - len(spec))
    for size, names in zip(shape[len(entries) :], spec, strict=True):
        held: list[str] = []
        for axis in mesh_axes(names):
            parts = math.prod(mesh.shape[other] for other in held)
            if size % (parts * mesh.shape.get(axis, 1)) == 0 and axis in mesh.shape:
                held.append(axis)
        entries.append(None if not held else held[0] if len(held) == 1 else tuple(held))
    return PartitionSpec(*entries)


@dataclasses.dataclass(frozen=True)
class ShardingSummary:
    """Who holds what of a tree; printing it gives a table.

    Attributes:
        rows: (path, shape, partition, bytes on each device) of every array, the largest first.
        mesh: {axis: number of devices}.
        total_bytes: of one copy of all arrays.
        device_bytes: on the device that holds most.
        blocks: {partition: lines of a drawing of its blocks and their devices}.
    """

    rows: list[tuple[str, tuple[int, ...], str, int]]
    mesh: dict[str, int]
    total_bytes: int
    device_bytes: int
    blocks: dict[str, list[str]]

    def __str__(self) -> str:
        cells = [("array", "shape", "split over", "bytes a device")]
        cells += [
            (name, "x".join(map(str, shape)) or "scalar", spec, f"{size:,}")
            for name, shape, spec, size in self.rows
        ]
        widths = [max(len(row[column]) for row in cells) for column in range(4)]
        lines = [
            "  ".join(
                cell.rjust(width) if column == 3 else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in cells
        ]
        axes = " x ".join(f"{name} {size}" for name, size in self.mesh.items() if size > 1)
        lines.append(
            f"{self.device_bytes:,} of {self.total_bytes:,} bytes on each device; mesh: "
            f"{axes or 'one device'}"
        )
        for spec, drawing in self.blocks.items():
            lines += ["", f"devices of the blocks of {spec}:", *drawing]
        return "\n".join(lines)


def describe_sharding(tree: Any, shardings: Any = None) -> ShardingSummary:
    """Say which part of each array a device holds, and how many bytes that is.

    Args:
        tree: pytree of arrays or of `jax.ShapeDtypeStruct`, such as a `TrainState`.
        shardings: a sharding for each array, as from `state_sharding`; by default those by which
            the arrays are placed.

    Returns:
        A summary; print it. It draws one block of each partition, up to 64 devices.

    Raises:
        ValueError: an array without a sharding on a mesh.

    Example:
        >>> mesh = device_mesh(devices=jax.devices()[:1])
        >>> everywhere = NamedSharding(mesh, PartitionSpec())
        >>> print(describe_sharding({"x": np.ones(3, np.float32)}, everywhere))
        array  shape  split over  bytes a device
        x      3      nothing                 12
        12 of 12 bytes on each device; mesh: one device
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if shardings is None:
        places = [getattr(leaf, "sharding", None) for _, leaf in leaves]
    else:
        whole = jax.tree.map(lambda s, part: jax.tree.map(lambda _: s, part), shardings, tree)
        places = jax.tree.leaves(whole)
    rows, total, blocks, mesh = [], 0, {}, None
    for (path, leaf), sharding in zip(leaves, places, strict=True):
        if not isinstance(sharding, NamedSharding):
            raise ValueError(
                f"{tree_path(path)} is not placed on a mesh; place the tree with jax.device_put, "
                "or give the shardings"
            )
        mesh = sharding.mesh
        key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        item = jax.random.key_data(jax.random.key(0)).nbytes if key else leaf.dtype.itemsize
        total += math.prod(leaf.shape) * item
        entries = [
            tuple(axis for axis in mesh_axes(names) if mesh.shape[axis] > 1)
            for names in sharding.spec
        ]
        split = " x ".join("+".join(names) or "-" for names in entries)
        split = split if any(entries) else "nothing"
        local = math.prod(sharding.shard_shape(leaf.shape)) * item
        rows.append((tree_path(path), tuple(leaf.shape), split, local))
        if any(entries) and split not in blocks and mesh.size <= 64:
            blocks[split] = _drawing(sharding, leaf.shape)
    sizes = {} if mesh is None else dict(mesh.shape)
    device_bytes = sum(row[3] for row in rows)
    rows.sort(key=lambda row: -row[3])
    return ShardingSummary(rows, sizes, total, device_bytes, blocks)


def _drawing(sharding: NamedSharding, shape: tuple[int, ...]) -> list[str]:
    """Draw the blocks of an array as a table of device numbers: rows and columns are its last two
    partitioned axes, blocks of others follow each other."""
    holders: dict[tuple[int, ...], list[int]] = {}
    places: dict[Any, Any] = dict(sharding.devices_indices_map(shape))
    for device, index in places.items():
        starts = tuple(part.indices(size)[0] for part, size in zip(index, shape, strict=True))
        holders.setdefault(starts, []).append(device.id)
    axes = [axis for axis in range(len(shape)) if len({key[axis] for key in holders}) > 1]
    width = max(len(" ".join(map(str, ids))) for ids in holders.values())

    def line(keys: list[tuple[int, ...]]) -> str:
        cells = (" ".join(map(str, sorted(holders[key]))).ljust(width) for key in keys)
        return "| " + " | ".join(cells) + " |"

    keys = sorted(holders)
    # All axes but the last partitioned one choose the line.
    rows = itertools.groupby(keys, key=lambda key: tuple(key[axis] for axis in axes[:-1]))
    return [line(list(row)) for _, row in rows]
