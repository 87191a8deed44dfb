"""Graphs as models of the `onnx` package, on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import jaxnets
from jaxnets.export.onnx.graph import Graph, Node, Tensor, boundary, stored
from jaxnets.storage import atomic_file

#: Version of the operations: the first in which reductions, Pad, ScatterND and bits are as used.
OPSET = 18
_IR_VERSION = 8  # that of the version of ONNX which brought the operations
_MAX_INSIDE = 2**31 - 2**26  # bytes of weights; a model ends at 2 GiB
_MIN_OUTSIDE = 1024
_ALIGNMENT = 64


def model(
    g: Graph,
    weights: Mapping[str, np.ndarray],
    outputs: Sequence[Tensor],
    metadata: Mapping[str, str],
    *,
    data_file: str = "",
    more: Sequence[Tensor] = (),
) -> Any:
    """Return the model of a finished graph as an `onnx.ModelProto`.

    Args:
        g: the outermost graph.
        weights: by name; those that the graph does not use are left out.
        outputs: with the types of the network.
        metadata: properties of the model.
        data_file: name of the file that holds weights too large for the model.
        more: values inside the graph to return as well.
    """
    from onnx import helper

    whole = Graph(g)
    whole.nodes = [*g.shared.prelude, *g.nodes]
    whole.inputs = g.inputs
    whole.outputs = [one.name for one in (*outputs, *more)]
    needed = whole.used()
    arrays = {
        name: array for name, array in {**g.shared.constants, **weights}.items() if name in needed
    }
    graph = helper.make_graph(
        [_node(node) for node in whole.nodes],
        "jaxnets",
        [_info(one, boundary(one.dtype)) for one in g.inputs],
        [
            *(_info(one, boundary(one.dtype)) for one in outputs),
            *(helper.make_tensor_value_info(x.name, _code(stored(x.dtype)), None) for x in more),
        ],
        _initializers(arrays, data_file),
    )
    result = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=_IR_VERSION,
        producer_name="jaxnets",
        producer_version=jaxnets.__version__,
    )
    helper.set_model_props(result, dict(metadata))
    return result


def _initializers(arrays: Mapping[str, np.ndarray], data_file: str) -> list[Any]:
    """Return the arrays as tensors, the large ones of a large model by their place in a file."""
    import onnx
    from onnx import numpy_helper

    outside = places(arrays)
    tensors = []
    for name, array in arrays.items():
        if name not in outside:
            tensors.append(numpy_helper.from_array(array, name))
            continue
        one = onnx.TensorProto(
            name=name,
            dims=array.shape,
            data_type=_code(array.dtype),
            data_location=onnx.TensorProto.EXTERNAL,
        )
        place = {
            "location": data_file or "weights",
            "offset": outside[name],
            "length": array.nbytes,
        }
        for key, value in place.items():
            one.external_data.add(key=key, value=str(value))
        tensors.append(one)
    return tensors


def places(arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Return where the large arrays of a large model are in its file of data: {name: offset}."""
    if sum(array.nbytes for array in arrays.values()) <= _MAX_INSIDE:
        return {}
    offsets, end = {}, 0
    for name, array in arrays.items():
        if array.nbytes >= _MIN_OUTSIDE:
            offsets[name] = end
            end += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    return offsets


def save(path: Path, proto: Any, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a model, and the file of data that its tensors name."""
    outside = [one.name for one in proto.graph.initializer if one.external_data]
    if outside:
        with atomic_file(data_path(path)) as stream:
            for name in outside:
                stream.write(b"\0" * (-stream.tell() % _ALIGNMENT))
                stream.write(np.ascontiguousarray(arrays[name]).data)
    with atomic_file(path) as stream:
        stream.write(proto.SerializeToString())


def data_path(path: Path) -> Path:
    """Return the path of the file of data of a model."""
    return path.with_name(f"{path.name}.data")


def _code(dtype: Any) -> int:
    from onnx import helper

    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def _info(tensor: Tensor, dtype: Any = None) -> Any:
    from onnx import helper

    shape = [size if isinstance(size, int) else str(size) for size in tensor.shape]
    return helper.make_tensor_value_info(
        tensor.name, _code(tensor.dtype if dtype is None else dtype), shape
    )


def _node(node: Node) -> Any:
    from onnx import helper

    attributes = {
        name: _attribute(value)
        for name, value in node.attributes.items()
        if not (isinstance(value, list) and not value)
    }
    return helper.make_node(node.op, node.inputs, node.outputs, node.name, **attributes)


def _attribute(value: Any) -> Any:
    if isinstance(value, np.dtype):
        return _code(value)
    if not isinstance(value, Graph):
        return value
    from onnx import helper

    return helper.make_graph(
        [_node(node) for node in value.nodes],
        "body",
        [_info(tensor, stored(tensor.dtype)) for tensor in value.inputs],
        [helper.make_empty_tensor_value_info(name) for name in value.outputs],
    )
