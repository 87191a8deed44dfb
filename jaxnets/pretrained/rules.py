"""Tables from the tensors of a file to the arrays of a network, read in both directions.

An architecture is a tuple of `Rule`s. Each tensor of the file and each array of the network is
accounted for before any data are read: what is left over or missing is an error that lists it.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.pretrained.formats import Tensors
from jaxnets.pretrained.layouts import AxisOrder, Layout

_PLACEHOLDER = re.compile(r"\{(\w+)([+-]\d+)?\}")
_SHOWN = 8

#: {path: shape and dtype}, one entry for each layer of a scanned stack.
Leaves = Mapping[str, jax.ShapeDtypeStruct]
Bindings = tuple[tuple[str, int], ...]


@dataclasses.dataclass(frozen=True)
class Rule:
    """Tensors of a file and the arrays of a network that they are.

    `{layer}` in a name stands for a number, `{layer+1}` for that number and one.

    Attributes:
        source: name or names of the tensors in the file.
        target: path or paths of the arrays in the variables, such as
            "params/stack/layer_{layer}/attention/query/kernel".
        layout: arrangements from the file to the network, in the order in which they apply; by
            default both are the same.

    Example:
        >>> from jaxnets.pretrained.layouts import Transpose
        >>> rule = Rule("h.{i}.fc.weight", "params/layer_{i}/kernel", (Transpose(),))
        >>> rule.expand((("i", 3),))
        (('h.3.fc.weight',), ('params/layer_3/kernel',))
    """

    source: str | tuple[str, ...]
    target: str | tuple[str, ...]
    layout: tuple[Layout, ...] = ()

    @property
    def sources(self) -> tuple[str, ...]:
        """The patterns of the tensors."""
        return (self.source,) if isinstance(self.source, str) else self.source

    @property
    def targets(self) -> tuple[str, ...]:
        """The patterns of the arrays."""
        return (self.target,) if isinstance(self.target, str) else self.target

    def expand(self, bindings: Bindings) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the names and the paths for some numbers.

        Args:
            bindings: (name of a placeholder, number) of each.

        Returns:
            The names of the tensors and the paths of the arrays.
        """
        numbers = dict(bindings)
        return (
            tuple(_fill(pattern, numbers) for pattern in self.sources),
            tuple(_fill(pattern, numbers) for pattern in self.targets),
        )


@dataclasses.dataclass(frozen=True)
class Assignment:
    """The tensors that some arrays are read from, or written to.

    Attributes:
        names: of the tensors in the file.
        paths: of the arrays.
        layout: as in `Rule`.
    """

    names: tuple[str, ...]
    paths: tuple[str, ...]
    layout: tuple[Layout, ...]

    def from_file(self, tensors: Sequence[Any]) -> list[Any]:
        """Arrange tensors as the network has them.

        Args:
            tensors: one for each of `names`.

        Returns:
            An array for each of `paths`.

        Raises:
            ValueError: shapes that do not fit the layout.
        """
        arrays = list(tensors)
        for layout in self.layout:
            arrays = layout.from_file(arrays)
        return arrays

    def to_file(self, arrays: Sequence[Any]) -> list[Any]:
        """Arrange arrays as the file has them.

        Args:
            arrays: one for each of `paths`.

        Returns:
            A tensor for each of `names`.

        Raises:
            ValueError: shapes that do not fit the layout.
        """
        tensors = list(arrays)
        for layout in reversed(self.layout):
            tensors = layout.to_file(tensors)
        return tensors


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is read from where.

    Attributes:
        assignments: which tensors are which arrays.
        missing: {path of an array that no tensor is for: the names that it could have}.
        unused: names of tensors that are no array.
    """

    assignments: tuple[Assignment, ...]
    missing: Mapping[str, tuple[str, ...]]
    unused: tuple[str, ...]


def make_plan(rules: Iterable[Rule], names: Iterable[str], paths: Iterable[str]) -> Plan:
    """Match the tensors of a file with the arrays of a network.

    Args:
        rules: the table. If several rules fit an array, the first one counts.
        names: of the tensors.
        paths: of the arrays.

    Returns:
        The plan; nothing is read.
    """
    names, paths = dict.fromkeys(names), dict.fromkeys(paths)
    assignments = []
    assigned: set[str] = set()
    used: set[str] = set()
    candidates: dict[str, list[str]] = {}
    for rule in rules:
        for bindings in _bindings(rule, names, paths):
            sources, targets = rule.expand(bindings)
            for target in targets:
                candidates.setdefault(target, []).extend(sources)
            complete = all(source in names for source in sources)
            if complete and all(target in paths for target in targets):
                if assigned.isdisjoint(targets):
                    assignments.append(Assignment(sources, targets, rule.layout))
                    assigned.update(targets)
                used.update(sources)
    missing = {path: tuple(candidates.get(path, ())) for path in paths if path not in assigned}
    return Plan(tuple(assignments), missing, tuple(name for name in names if name not in used))


def variable_leaves(variables: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shape and dtype of each array by its path, the layers of a scanned stack one by one.

    Args:
        variables: arrays, or shapes of them, in nested dicts.

    Returns:
        {"params/stack/layer_0/attention/query/kernel": ...}; an array "layers/..." [layers, ...]
        has an entry "layer_0/...", "layer_1/...", ... for each layer.

    Example:
        >>> tree = {"params": {"layers": {"bias": jnp.zeros((2, 5))}, "head": jnp.zeros(3)}}
        >>> {path: leaf.shape for path, leaf in variable_leaves(tree).items()}
        {'params/head': (3,), 'params/layer_0/bias': (5,), 'params/layer_1/bias': (5,)}
    """
    leaves = {}
    for path, leaf in flatten_paths(variables).items():
        for place in layer_paths(path, leaf.shape):
            leaves[place] = jax.ShapeDtypeStruct(
                leaf.shape if place == path else leaf.shape[1:], leaf.dtype
            )
    return leaves


def flatten_paths(tree: Any) -> dict[str, Any]:
    """Return the leaves of nested dicts by paths with slashes.

    Args:
        tree: nested dicts.

    Returns:
        {"params/head/kernel": leaf}.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def check_shapes(plan: Plan, tensors: Tensors, leaves: Leaves) -> None:
    """Check that every tensor fits its array, without reading data.

    Args:
        plan: of these tensors and arrays.
        tensors: of the file.
        leaves: shape and dtype of each array by its path.

    Raises:
        ValueError: another shape, or integers for a floating-point array; the message names the
            file, the tensor and the array.
    """
    for one in plan.assignments:
        reason = _misfit(one, tensors, leaves)
        if reason:
            raise ValueError(reason)


def without_misfits(plan: Plan, tensors: Tensors, leaves: Leaves) -> Plan:
    """Return the plan with arrays whose tensors do not fit among the missing ones.

    The arguments are those of `check_shapes`; the tensors that do not fit are unused.
    """
    fits, missing, unused = [], dict(plan.missing), list(plan.unused)
    for one in plan.assignments:
        if _misfit(one, tensors, leaves):
            missing |= dict.fromkeys(one.paths, one.names)
            unused += one.names
        else:
            fits.append(one)
    return Plan(tuple(fits), missing, tuple(unused))


def _misfit(one: Assignment, tensors: Tensors, leaves: Leaves) -> str | None:
    """Return why tensors do not fit their arrays; None if they do."""
    specs = [tensors.specs[name] for name in one.names]
    where = f"{specs[0].path}: {_list(one.names)} of shape {_list(s.shape for s in specs)}"
    other = "the configuration is of another network than the tensors"
    try:
        shapes = _shapes(one.layout, tuple(spec.shape for spec in specs))
    except (ValueError, TypeError) as error:
        return f"{where} cannot be {_list(one.paths)}: {error}; {other}"
    expected = tuple(leaves[path].shape for path in one.paths)
    if shapes != expected:
        return f"{where} does not fit {_list(one.paths)} of shape {_list(expected)}; {other}"
    for path in one.paths:
        wanted = leaves[path].dtype
        for spec in specs:
            if jnp.issubdtype(wanted, jnp.floating) != jnp.issubdtype(spec.dtype, jnp.floating):
                return (
                    f"{where} has type {spec.stored}, and {path} has {wanted}; get a file with "
                    "tensors of the right type"
                )
    return None


def read_variables(
    plan: Plan,
    tensors: Tensors,
    shapes: Any,
    place: Callable[[str, tuple[int, ...], Any, Callable[[Any], np.ndarray]], Any],
) -> dict[str, Any]:
    """Read the arrays of a plan, one rule after the other.

    Args:
        plan: of these tensors; its `missing` arrays are left out.
        tensors: of the file.
        shapes: shapes and dtypes of the variables, in nested dicts.
        place: (path, shape, dtype, read) -> array on the device; `read` takes an index, a tuple of
            slices, and returns that part.

    Returns:
        {path: array}, of a scanned stack the whole array.

    Raises:
        ValueError: damaged data; the message names the file.
        OSError: the file cannot be read, or was changed since it was opened.
    """
    sources = {
        path: (one, index) for one in plan.assignments for index, path in enumerate(one.paths)
    }
    cache: dict[Assignment, list[Any]] = {}

    def read_place(path: str, index: tuple[slice, ...]) -> np.ndarray:
        one, position = sources[path]
        if not one.layout:
            return tensors.read(one.names[position], index)
        if len(one.layout) == 1 and len(one.names) == 1 and isinstance(one.layout[0], AxisOrder):
            axes = one.layout[0].axes(len(tensors.specs[one.names[0]].shape))
            index = (*index, *[slice(None)] * (len(axes) - len(index)))
            back = [slice(None)] * len(axes)
            for axis, part in zip(axes, index, strict=True):
                back[axis] = part
            return tensors.read(one.names[0], back).transpose(axes)
        if one not in cache:
            cache.clear()
            cache[one] = one.from_file([tensors.read(name) for name in one.names])
        return np.asarray(cache[one][position])[index]

    arrays = {}
    for path, leaf in _in_file_order(flatten_paths(shapes), sources):
        places = layer_paths(path, leaf.shape)
        if any(one in plan.missing for one in places):
            continue

        def read(
            index: tuple[slice, ...] = (),
            places: list[str] = places,
            stacked: bool = places != [path],
            dtype: Any = leaf.dtype,
        ) -> np.ndarray:
            if not stacked:
                return _cast(read_place(places[0], index), dtype)
            layers, index = (index[0], index[1:]) if index else (slice(None), ())
            return np.stack([_cast(read_place(one, index), dtype) for one in places[layers]])

        arrays[path] = place(path, leaf.shape, leaf.dtype, read)
    return arrays


def write_tensors(assignments: Iterable[Assignment], variables: Any) -> dict[str, np.ndarray]:
    """Arrange the arrays of a network as a file has them.

    Args:
        assignments: of a plan.
        variables: nested dicts of arrays.

    Returns:
        {name: tensor}.
    """
    flat = flatten_paths(variables)
    arrays = {}
    for path, leaf in flat.items():
        places = layer_paths(path, leaf.shape)
        if places == [path]:
            arrays[path] = leaf
        else:
            arrays |= {one: leaf[index] for index, one in enumerate(places)}
    tensors: dict[str, np.ndarray] = {}
    for one in assignments:
        values = one.to_file([np.asarray(arrays[path]) for path in one.paths])
        tensors |= {
            name: np.ascontiguousarray(value).reshape(value.shape)
            for name, value in zip(one.names, values, strict=True)
        }
    return tensors


def file_assignments(rules: Iterable[Rule], paths: Iterable[str]) -> Plan:
    """Return which tensors a file of a network has.

    Args:
        rules: the table; the first rule that fits an array counts.
        paths: of the arrays.

    Returns:
        A plan whose `missing` are the arrays that no rule fits, and without unused tensors.
    """
    paths = dict.fromkeys(paths)
    names: dict[str, None] = {}
    taken: set[str] = set()
    chosen = []
    for rule in rules:
        for bindings in _bindings(rule, {}, paths):
            sources, targets = rule.expand(bindings)
            fits = all(target in paths and target not in taken for target in targets)
            if fits and not any(source in names for source in sources):
                chosen.append(Assignment(sources, targets, rule.layout))
                taken.update(targets)
                names |= dict.fromkeys(sources)
    missing = {path: () for path in paths if path not in taken}
    return Plan(tuple(chosen), missing, ())


def describe_plan(plan: Plan) -> str:
    """Return what is missing and left over, as text; empty if nothing is.

    Args:
        plan: as of `make_plan`. Of many names the first eight are shown.
    """
    parts = []
    if plan.missing:
        wanted = [
            f"{path} (in the file {' or '.join(names)})" if names else path
            for path, names in plan.missing.items()
        ]
        parts.append(f"{len(wanted)} arrays of the network have no tensor: {_some(wanted)}")
    if plan.unused:
        count = len(plan.unused)
        parts.append(f"{count} tensors of the file have no array: {_some(plan.unused)}")
    return "; ".join(parts)


def matches(pattern: str, name: str) -> bool:
    """Return whether a name fits a pattern.

    Args:
        pattern: a source or target of a `Rule`, such as "h.{layer}.weight".
        name: of a tensor, or the path of an array.

    Example:
        >>> matches("h.{layer}.weight", "h.11.weight"), matches("h.{layer}.weight", "h.x.weight")
        (True, False)
    """
    return _regex(pattern).fullmatch(name) is not None


def _bindings(rule: Rule, names: Iterable[str], paths: Iterable[str]) -> list[Bindings]:
    """Return the numbers for which a tensor or an array of a rule exists."""
    bindings: dict[Bindings, None] = {}
    for patterns, texts in ((rule.sources, names), (rule.targets, paths)):
        for pattern in patterns:
            if not _PLACEHOLDER.search(pattern):
                if pattern in texts:
                    bindings[()] = None
                continue
            regex, offsets = _regex(pattern), dict(_PLACEHOLDER.findall(pattern))
            for text in texts:
                match = regex.fullmatch(text)
                if match:
                    numbers = match.groupdict().items()
                    found = tuple(sorted((k, int(v) - int(offsets[k] or 0)) for k, v in numbers))
                    bindings[found] = None
    return list(bindings)


@functools.cache
def _regex(pattern: str) -> re.Pattern[str]:
    parts, last, names = [], 0, set()
    for placeholder in _PLACEHOLDER.finditer(pattern):
        parts.append(re.escape(pattern[last : placeholder.start()]))
        name = placeholder[1]
        parts.append(f"(?P={name})" if name in names else rf"(?P<{name}>0|[1-9]\d*)")
        names.add(name)
        last = placeholder.end()
    return re.compile("".join([*parts, re.escape(pattern[last:])]), re.ASCII)


def _fill(pattern: str, numbers: Mapping[str, int]) -> str:
    return _PLACEHOLDER.sub(lambda found: str(numbers[found[1]] + int(found[2] or 0)), pattern)


def layer_paths(path: str, shape: tuple[int, ...]) -> list[str]:
    """Return the paths of the layers of a stacked array, or the path itself.

    Args:
        path: of an array; "layers" in it stands for the layers of a scanned stack.
        shape: of the array, [layers, ...] if it is stacked.

    Example:
        >>> layer_paths("params/layers/bias", (2, 5))
        ['params/layer_0/bias', 'params/layer_1/bias']
    """
    parts = path.split("/")
    if "layers" not in parts:
        return [path]
    position = parts.index("layers")
    before, after = parts[:position], parts[position + 1 :]
    return ["/".join([*before, f"layer_{index}", *after]) for index in range(shape[0])]


def _in_file_order(leaves: Mapping[str, Any], sources: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Order arrays so that those of one tensor follow each other, and it is read once."""
    order = {path: index for index, path in enumerate(sources)}

    def position(item: tuple[str, Any]) -> int:
        first = layer_paths(item[0], item[1].shape)[0]
        return order.get(first, len(order))

    return sorted(leaves.items(), key=position)


@functools.lru_cache(maxsize=4096)
def _shapes(
    layout: tuple[Layout, ...], shapes: tuple[tuple[int, ...], ...]
) -> tuple[tuple[int, ...], ...]:
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    result = jax.eval_shape(Assignment((), (), layout).from_file, arrays)
    return tuple(array.shape for array in result)


def _cast(array: np.ndarray, dtype: Any) -> np.ndarray:
    return np.ascontiguousarray(array.astype(dtype, copy=False)).reshape(array.shape)


def _list(items: Iterable[Any]) -> str:
    return ", ".join(map(str, items))


def _some(items: Sequence[str]) -> str:
    shown = ", ".join(items[:_SHOWN])
    return shown if len(items) <= _SHOWN else f"{shown} and {len(items) - _SHOWN} more"
