"""Exported programs: functions of a network as StableHLO, and its weights beside them.

A program is a folder: `program.json`, `program.bin` as written by `jax.export.Exported.serialize`
(with several functions one file NAME.bin for each), and `weights.safetensors`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
from jax import export

import jaxnets
from jaxnets.export.arguments import (
    ArrayInfo,
    function_of_weights,
    input_names,
    named_arrays,
    plain,
    traced,
    weights_of,
)
from jaxnets.storage import (
    atomic_folder,
    file_sha256,
    read_json,
    read_safetensors,
    write_json,
    write_safetensors,
)

_FORMAT = 1
_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_ONLY = "program"  # name of the only function
_WEIGHTS = "weights.safetensors"


class _Function(TypedDict):
    inputs: list[ArrayInfo]
    outputs: list[ArrayInfo]
    sha256: str


class _Description(TypedDict):
    format: int
    jax: str
    jaxnets: str
    platforms: list[str]
    functions: dict[str, _Function]
    weights: list[str]
    weights_sha256: str


def export_program(
    path: str | os.PathLike[str],
    network: Any,
    variables: Any,
    *inputs: Any,
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
        network: a module, a function of the variables and the inputs, or a dict of several of them
            by name, which share the variables.
        variables: of the network.
        inputs: examples, each an array, a `jax.ShapeDtypeStruct`, or nested dicts, lists and
            tuples of them. With several functions it is one dict with a tuple of inputs by name.
        shapes: sizes of the inputs, as in `jax.export.symbolic_args_specs`: a text for all of
            them, a tuple with one for each, or a dict of such by name; None leaves all sizes fixed.
        constraints: on the symbolic sizes, such as "time <= 512" for learned positions.
        platforms: that the program runs on; the machine that exports needs none of them.

    Raises:
        ImportError: flatbuffers is not installed.
        TypeError: a weight of a type that safetensors does not have, such as a random key.
        ValueError: a network that does not trace with symbolic sizes, with the reason and the
            remedy; names that do not fit.
        FileExistsError: `path` exists.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "mlp"
        >>> module, x = jaxnets.MLP(features=(4,), num_outputs=2), jnp.ones((1, 3))
        >>> variables = module.init(jax.random.key(0), x)
        >>> export_program(folder, module, variables, x)
        >>> load_program(folder)(jnp.ones((5, 3))).shape
        (5, 2)
    """
    _check_flatbuffers()
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists; give another folder, or remove it first")
    unknown = sorted(set(platforms) - set(_PLATFORMS))
    if isinstance(platforms, str) or unknown or not platforms:
        raise ValueError(f"platforms is {platforms!r}; give some of {_PLATFORMS}")
    networks, examples, texts = _by_name(network, inputs, shapes)
    weights = weights_of(variables)
    structure = jax.tree.structure(variables)
    functions: dict[str, _Function] = {}
    serialized: dict[str, bytes] = {}
    for name, one in networks.items():
        call = function_of_weights(one, structure, tuple(weights), examples[name])
        arguments = plain(jax.eval_shape(lambda *values: values, *examples[name]))
        trace = export.export(jax.jit(call), platforms=tuple(platforms))
        exported = traced(name, trace, call, weights, arguments, texts[name], constraints)
        serialized[name] = bytes(exported.serialize(vjp_order=0))
        (_, *given), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
        named = zip(input_names(one, len(given)), given, strict=True)
        functions[name] = {
            "inputs": [each for pair in named for each in named_arrays(*pair)],
            "outputs": list(
                named_arrays("output", jax.tree.unflatten(exported.out_tree, exported.out_avals))
            ),
            "sha256": hashlib.sha256(serialized[name]).hexdigest(),
        }
    with atomic_folder(path) as folder:
        for name, content in serialized.items():
            (folder / f"{name}.bin").write_bytes(content)
        write_safetensors(folder / _WEIGHTS, weights, {"format": "jaxnets"})
        description: _Description = {
            "format": _FORMAT,
            "jax": jax.__version__,
            "jaxnets": jaxnets.__version__,
            "platforms": list(platforms),
            "functions": functions,
            "weights": sorted(weights),  # the order of a dict's leaves
            "weights_sha256": file_sha256(folder / _WEIGHTS),
        }
        write_json(folder / "program.json", {**description})


def _by_name(
    network: Any, inputs: tuple[Any, ...], shapes: Any
) -> tuple[dict[str, Any], Mapping[str, Any], Mapping[str, Any]]:
    """Return functions, inputs and shapes by name, checked."""
    if not isinstance(network, Mapping):
        return {_ONLY: network}, {_ONLY: inputs}, {_ONLY: shapes}
    names = list(network)
    if not names or not all(isinstance(name, str) and name.isidentifier() for name in names):
        raise ValueError(f"the functions are named {names}; give identifiers, such as 'start'")
    examples: Any = inputs[0] if len(inputs) == 1 else inputs
    texts = shapes if isinstance(shapes, Mapping) else dict.fromkeys(names, shapes)
    for what, given in (("inputs", examples), ("shapes", texts)):
        if not isinstance(given, Mapping) or given.keys() != network.keys():
            kind = list(given) if isinstance(given, Mapping) else f"a {type(given).__name__}"
            raise ValueError(f"{what} of several functions are {kind}; give a dict with {names}")
    for name, values in examples.items():
        if not isinstance(values, tuple):
            raise ValueError(
                f"the inputs of {name!r} are a {type(values).__name__}; give a tuple with one for "
                "each input, such as (tokens,)"
            )
    return dict(network), examples, texts


class Program:
    """An exported program; call it, or one of its functions by name.

    Attributes:
        functions: {name: function of the inputs}.
        weights: {name: array}, the first argument of the exported functions.
        exported: {name: `jax.export.Exported`}.
        description: versions, platforms, inputs, outputs and names, as in program.json.
    """

    def __init__(
        self,
        weights: Mapping[str, jax.Array],
        exported: Mapping[str, export.Exported],
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

        Returns:
            What the network returns.

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
        run = jax.jit(self.exported[name].call)

        def call(*inputs: Any) -> Any:
            inputs = plain(inputs)
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
        ImportError: flatbuffers is not installed.
        OSError: no such folder, or a file of it cannot be read.
        ValueError: no exported program, a damaged one, or one that this version of JAX does not
            read; the message names its version and this one.
    """
    _check_flatbuffers()
    path = Path(path)
    remedy = "export it again"
    document = read_json(
        path / "program.json", what="the description of an exported program", remedy=remedy
    )
    if document.content.get("format", _FORMAT) != _FORMAT:
        raise document.error(
            f"it has the format {document.content['format']!r}, this version reads {_FORMAT}",
            key="format",
        )
    description = document.check(_Description)
    file = path / _WEIGHTS
    if file_sha256(file) != description["weights_sha256"]:
        raise _damaged(file)
    weights = {name: jnp.asarray(array) for name, array in read_safetensors(file).items()}
    exported = {}
    if not description["functions"]:
        raise document.error("it has no functions", key="functions")
    for name, function in description["functions"].items():
        if not name.isidentifier():
            raise document.error(f"a function is named {name!r}", key="functions")
        one = _deserialize(path / f"{name}.bin", function["sha256"], description["jax"])
        (stored, *_), _ = jax.tree.unflatten(one.in_tree, one.in_avals)
        wanted, given = map(_types, (stored, weights))
        if wanted != given:
            wrong = sorted({key for key, _ in wanted.items() ^ given.items()})
            raise ValueError(
                f"{file} does not fit {name}.bin: {', '.join(map(repr, wrong[:4]))} differ in "
                f"shape or type, or are in one of them only; {remedy}"
            )
        exported[name] = one
    return Program(MappingProxyType(weights), MappingProxyType(exported), {**description})


def _deserialize(path: Path, digest: str, version: str) -> export.Exported:
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != digest:
        raise _damaged(path)
    try:
        exported = export.deserialize(bytearray(content))
        exported.mlir_module()  # operations that are too new are refused here
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} was exported by JAX {version}, and JAX {jax.__version__} does not read it "
            f"({reason}); install JAX {version}, or export it again by this one"
        ) from error
    return exported


def _damaged(path: Path) -> ValueError:
    return ValueError(f"{path} is damaged: its sha256 is not that of program.json; export it again")


def _types(arrays: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (tuple(array.shape), str(array.dtype)) for name, array in arrays.items()}


def _check_flatbuffers() -> None:
    if importlib.util.find_spec("flatbuffers") is None:
        raise ImportError(
            "exported programs need flatbuffers; install it with pip install 'jaxnets[export]'"
        )
