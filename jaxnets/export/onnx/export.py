"""Networks as ONNX files, which run without JAX."""

from __future__ import annotations

import collections
import functools
import importlib.util
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxnets
from jaxnets.export.arguments import (
    function_of_weights,
    input_names,
    named_arrays,
    plain,
    traced,
    weights_of,
)
from jaxnets.export.onnx.check import compare, edge_cases
from jaxnets.export.onnx.serialize import data_path, model, save
from jaxnets.export.onnx.walk import write_graph


def export_onnx(
    path: str | os.PathLike[str],
    network: Any,
    variables: Any,
    *inputs: Any,
    shapes: Any = "batch, ...",
    constraints: Sequence[str] = (),
    tolerance: float = 1e-4,
) -> float:
    """Export a network as an ONNX file, and compare what onnxruntime computes with the network.

    The graph has the operations that the network applies with symbolic sizes, without what this
    library chooses by size or for one platform. It computes in float32 what the network computes in
    bfloat16 or float16. The comparison is at the example, at the smallest sizes, at larger ones, at
    zeros and at large values.

    Args:
        path: file to write, such as "classifier.onnx"; one that exists is replaced. Weights of more
            than 2 GiB are beside it, in a file that is named `path` + ".data".
        network: a module, or a function of the variables and the inputs.
        variables: of the network, which become initializers, such as "params/head/kernel".
        inputs: examples, each an array, a `jax.ShapeDtypeStruct`, or nested dicts, lists and
            tuples of them.
        shapes: sizes of the inputs, as in `jax.export.symbolic_args_specs`: a text for all of
            them, or a tuple with one for each; None leaves all sizes fixed.
        constraints: on the symbolic sizes, such as "time <= 512" for learned positions.
        tolerance: of the errors, relative to the largest element of each output; about 0.03 for
            networks that compute in bfloat16.

    Returns:
        The largest error of the comparison, in that measure.

    Raises:
        ImportError: onnx or onnxruntime is not installed.
        ValueError: a network that does not trace with symbolic sizes; an operation that has no ONNX
            form; names that occur twice; a file whose results differ, with the operation that is
            the reason.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> file = Path(tempfile.mkdtemp()) / "mlp.onnx"
        >>> module, x = jaxnets.MLP(features=(4,), num_outputs=2), jnp.ones((1, 3))
        >>> error = export_onnx(file, module, module.init(jax.random.key(0), x), x)
        >>> import onnxruntime
        >>> session = onnxruntime.InferenceSession(file)
        >>> session.run(None, {"inputs": np.ones((5, 3), np.float32)})[0].shape
        (5, 2)

    References:
        ONNX operators, version 18 (https://onnx.ai/onnx/operators/).
    """
    for package in ("onnx", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(
                f"ONNX files need {package}; install it with pip install 'jaxnets[export]'"
            )
    path = Path(path)
    weights = weights_of(variables)
    call = function_of_weights(network, jax.tree.structure(variables), tuple(weights), inputs)
    examples = plain(tuple(inputs))
    arguments = jax.eval_shape(lambda *values: values, *examples)
    closed = traced(
        *("the network", lambda *specs: jax.jit(call).trace(*specs).jaxpr, call, weights),
        *(arguments, shapes, constraints),
    )
    outputs = jax.eval_shape(call, weights, *arguments)
    names = (
        sorted(weights),  # the order of a dict's leaves
        [
            info["name"]
            for pair in zip(input_names(network, len(inputs)), arguments, strict=True)
            for info in named_arrays(*pair)
        ],
        [info["name"] for info in named_arrays("output", outputs)],
    )
    for name, count in collections.Counter(itertools.chain(*names)).items():
        if count > 1:
            raise ValueError(f"{name!r} names {count} of weights, inputs and outputs; rename one")
    written = write_graph(closed, *names)
    arrays = {name: np.asarray(array) for name, array in weights.items()}
    structure = jax.tree.structure(arguments)

    @jax.jit
    def network_outputs(weights: dict[str, jax.Array], *leaves: jax.Array) -> list[jax.Array]:
        return jax.tree.leaves(call(weights, *jax.tree.unflatten(structure, leaves)))

    cases = edge_cases(
        jax.tree.leaves(examples), [one.shape for one in written.graph.inputs], constraints
    )
    with jax.default_matmul_precision("highest"):  # on a GPU float32 may mean fewer bits
        error = compare(
            written, arrays, functools.partial(network_outputs, weights), cases, tolerance
        )
    metadata = {"jaxnets": jaxnets.__version__, "jax": jax.__version__, "error": f"{error:.3g}"}
    proto = model(
        *(written.graph, arrays, written.outputs, metadata), data_file=data_path(path).name
    )
    save(path, proto, {**written.graph.shared.constants, **arrays})
    return error
