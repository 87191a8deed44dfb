"""Exported programs: functions of a network as StableHLO, and its weights beside them.

A program is a folder: `program.json`, one file `NAME.jax` for each function, as written by
`jax.export.Exported.serialize`, and `weights.safetensors`.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

import jaxnets
from jaxnets.pretrained import read_tensors
from jaxnets.storage import atomic_folder, write_safetensors

_FORMAT = 1
_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def export_program(
    path: str | os.PathLike[str],
    network: Any,
    variables: Any,
    inputs: Any,
    *,
    shapes: Any = "batch, ...",
    constraints: Sequence[str] = (),
    platforms: Sequence[str] = _PLATFORMS,
) -> None:
    """Export a network as a program that runs without this library.

    The program has symbolic sizes, by default that of the batch. They stand for 1 or more: a batch
    of 0 is refused when the program is called. What this library chooses by size is the plain XLA
    operation then; on CPU a program of fixed sizes (`shapes=None`) is faster. An exported program
    has no `vmap` and no gradients.

    Args:
        path: folder to write, which does not exist.
        network: a module, a function of the variables and the inputs, or several of them by name.
        variables: of the network.
        inputs: tuple of example inputs, each an array, a `jax.ShapeDtypeStruct`, or nested dicts,
            lists and tuples of them; with several functions one such tuple by name.
        shapes: sizes of the inputs, as in `jax.export.symbolic_args_specs`: a text for all of
            them, a tuple with one for each, or such by name; None leaves all sizes fixed.
        constraints: on the symbolic sizes, such as "time <= 512" for learned positions.
        platforms: that the program runs on.

    Raises:
        ImportError: flatbuffers is not installed.
        ValueError: a network that does not trace with symbolic sizes, named with the reason.
        FileExistsError: `path` exists.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "mlp"
        >>> module, x = jaxnets.MLP(features=(4,), num_outputs=2), jnp.ones((1, 3))
        >>> variables = module.init(jax.random.key(0), x)
        >>> export_program(folder, module, variables, (x,))
        >>> load_program(folder)(jnp.ones((5, 3))).shape
        (5, 2)
    """
    if importlib.util.find_spec("flatbuffers") is None:
        raise ImportError("exporting needs flatbuffers; pip install 'jaxnets[export]'")
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists; remove it, or choose another folder")
    several = isinstance(network, Mapping)
    networks = dict(network) if several else {"call": network}
    examples, texts = (inputs, shapes) if several else ({"call": inputs}, {"call": shapes})
    if not isinstance(texts, Mapping):
        texts = dict.fromkeys(networks, texts)
    for name, given in (("inputs", examples), ("shapes", texts)):
        if given.keys() != networks.keys():
            raise ValueError(f"{name} are of {list(given)}; give them for {list(networks)}")
    weights = {
        _name(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(variables)[0]
    }
    structure = jax.tree.structure(variables)
    serialized = {
        name: _serialize(
            name, one, structure, weights, examples[name], texts[name], constraints, platforms
        )
        for name, one in networks.items()
    }
    description = {
        "format": _FORMAT,
        "jax": jax.__version__,
        "jaxnets": jaxnets.__version__,
        "platforms": list(platforms),
        "functions": list(serialized),
    }
    with atomic_folder(path) as folder:
        for name, content in serialized.items():
            (folder / f"{name}.jax").write_bytes(content)
        write_safetensors(folder / "weights.safetensors", weights, {"format": "jaxnets"})
        (folder / "program.json").write_text(json.dumps(description, indent=2) + "\n")


def _serialize(
    name: str,
    network: Any,
    structure: Any,
    weights: Mapping[str, Any],
    inputs: Any,
    shapes: Any,
    constraints: Sequence[str],
    platforms: Sequence[str],
) -> bytes:
    from jax import export

    function = network.apply if hasattr(network, "apply") else network
    names = list(weights)

    def call(weights: dict[str, jax.Array], *inputs: Any) -> Any:
        variables = jax.tree.unflatten(structure, [weights[name] for name in names])
        return plain(function(variables, *inputs))

    arguments = tuple(inputs)
    specs: Any = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype), arguments)
    if shapes is not None:
        specs = export.symbolic_args_specs(specs, shapes, constraints=constraints)
    try:
        exported = export.export(jax.jit(call), platforms=tuple(platforms))(dict(weights), *specs)
    except Exception as error:
        if shapes is None:
            raise
        raise ValueError(
            f"the function {name!r} does not trace with the symbolic sizes {shapes!r} "
            f"({str(error).splitlines()[0]}); fix a size by its number or by '_', or give "
            "constraints such as 'time <= 512'"
        ) from error
    return bytes(exported.serialize(vjp_order=0))


def plain(tree: Any) -> Any:
    """Return nested dicts and tuples: named tuples become dicts, which need no class to read."""
    if isinstance(tree, Mapping):
        return {key: plain(value) for key, value in tree.items()}
    if hasattr(tree, "_asdict"):
        return {key: plain(value) for key, value in tree._asdict().items()}
    if isinstance(tree, tuple | list):
        return tuple(plain(value) for value in tree)
    return tree


def _name(keys: Sequence[Any]) -> str:
    """Return the name of a weight, such as "params/Dense_0/kernel"."""
    return jax.tree_util.keystr(tuple(keys), simple=True, separator="/")


class Program:
    """An exported program; call it, or one of its functions by name.

    Attributes:
        functions: {name: function of the inputs}.
        weights: {name: array}, the first argument of the exported functions.
        exported: {name: `jax.export.Exported`}.
        description: versions, platforms and names, as in program.json.
    """

    def __init__(
        self,
        weights: Mapping[str, jax.Array],
        exported: Mapping[str, Any],
        description: Mapping[str, Any],
    ) -> None:
        self.weights = weights
        self.exported = exported
        self.description = description
        self.functions: Mapping[str, Callable[..., Any]] = MappingProxyType(
            {name: self._function(name) for name in exported}
        )

    def __call__(self, *inputs: Any) -> Any:
        """Call the only function.

        Args:
            inputs: as in the export, of any size where it was symbolic.

        Raises:
            ValueError: an input of another shape or size, or several functions.
        """
        if len(self.functions) > 1:
            raise ValueError(
                f"the program has the functions {list(self.functions)}; call one of them, such as "
                f"program.functions[{next(iter(self.functions))!r}](...)"
            )
        return next(iter(self.functions.values()))(*inputs)

    def _function(self, name: str) -> Callable[..., Any]:
        exported = self.exported[name]
        run = jax.jit(exported.call)

        def call(*inputs: Any) -> Any:
            for leaf in jax.tree.leaves(inputs):
                if 0 in jnp.shape(leaf):
                    raise ValueError(
                        f"an input of {name!r} has shape {jnp.shape(leaf)}; symbolic sizes are 1 "
                        "or more, so leave empty batches out"
                    )
            return run(dict(self.weights), *inputs)

        return call


def load_program(path: str | os.PathLike[str]) -> Program:
    """Load what `export_program` wrote; no code of the network is needed.

    Args:
        path: the folder.

    Returns:
        The program, its weights on the default device.

    Raises:
        OSError: no such folder, or a file of it cannot be read.
        ValueError: no exported program, or one that this version of JAX does not read.
    """
    path = Path(path)
    file = path / "program.json"
    try:
        description = json.loads(file.read_text())
        names, version = list(description["functions"]), str(description["jax"])
        known = description["format"] == _FORMAT
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is no description of a program ({error}); export it again"
        ) from error
    if not known:
        raise ValueError(
            f"{file} has the format {description['format']!r}, and this version reads {_FORMAT}; "
            "install the version of jaxnets that wrote it, or export it again"
        )
    weights = {
        name: jnp.asarray(array)
        for name, array in read_tensors(path / "weights.safetensors").items()
    }
    exported = {}
    for name in names:
        content = bytearray((path / f"{Path(name).name}.jax").read_bytes())
        try:
            exported[name] = jax.export.deserialize(content)
        except Exception as error:
            raise ValueError(
                f"{path} was exported by JAX {version}, and JAX {jax.__version__} does not read it "
                f"({str(error).splitlines()[0] if str(error) else type(error).__name__}); install "
                f"JAX {version}, or export it again by this one"
            ) from error
    return Program(MappingProxyType(weights), MappingProxyType(exported), description)
