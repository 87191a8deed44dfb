"""Written safetensors files against the reader, and against the package of the format."""

import json
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from tensor_files import DTYPES, SMALL, assert_same, random_tree

from jaxnets.pretrained import read_tensors
from jaxnets.storage import write_safetensors

KINDS = {**{name: dtype for name, dtype in DTYPES.items() if name != "complex128"}, **SMALL}


def test_arrays_of_every_type_keep_their_bits(tmp_path):
    tree = random_tree(0, KINDS)
    write_safetensors(tmp_path / "a.safetensors", tree, {"format": "jaxnets", "ä": ""})
    tensors = read_tensors(tmp_path / "a.safetensors")
    assert_same(tensors, tree)
    assert tensors.metadata == {"format": "jaxnets", "ä": ""}


def test_the_package_of_the_format_reads_the_same(tmp_path):
    tree = random_tree(1, {name: DTYPES[name] for name in ("float32", "int8", "int64", "bool")})
    write_safetensors(tmp_path / "a.safetensors", tree)
    read = safetensors.numpy.load_file(tmp_path / "a.safetensors")
    assert read.keys() == tree.keys()
    assert all(read[name].tobytes() == array.tobytes() for name, array in tree.items())


def test_arrays_of_any_strides_and_byte_order_keep_their_values(tmp_path):
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    tree = {
        "transposed": array.T,
        "sliced": array[::2, 1:4],
        "backwards": array[::-1, ::-1],
        "column_major": np.asfortranarray(array),
        "expanded": np.broadcast_to(array[0], (3, 6)),
        "big_endian": array.astype(">f4"),
        "jax": jnp.asarray(array, jnp.bfloat16).T,
    }
    write_safetensors(tmp_path / "a.safetensors", tree)
    tensors = read_tensors(tmp_path / "a.safetensors")
    for name, expected in tree.items():
        np.testing.assert_array_equal(tensors[name], expected, err_msg=name)
    assert tensors["jax"].dtype == ml_dtypes.bfloat16


def test_every_array_is_aligned_in_the_file(tmp_path):
    tree = random_tree(2, KINDS)
    write_safetensors(tmp_path / "a.safetensors", tree)
    content = (tmp_path / "a.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    assert (8 + size) % 64 == 0
    for name, array in tree.items():
        assert header[name]["data_offsets"][0] % array.dtype.itemsize == 0


def test_an_array_that_cannot_be_read_leaves_the_existing_file(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", {"a": np.ones(3)})
    donated = jnp.ones(3)
    donated.delete()
    with pytest.raises(RuntimeError, match="deleted"):
        write_safetensors(tmp_path / "a.safetensors", {"a": donated})
    assert read_tensors(tmp_path / "a.safetensors")["a"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("array", "kind"),
    [
        (np.ones(2, np.complex128), "complex128"),
        (np.array(["a"]), "<U1"),
        (np.array([None]), "object"),
        (jax.random.key(0), "key<fry>"),
        ([1.0, 2.0], "list"),
        (3.0, "float"),
        (np.ones(2, ml_dtypes.int4), "int4"),
    ],
)
def test_types_that_the_format_does_not_have_are_refused(array, kind, tmp_path):
    with pytest.raises(TypeError, match=f"'a' has the type {kind}; convert it to an array of one"):
        write_safetensors(tmp_path / "a.safetensors", {"a": array})
    assert list(tmp_path.iterdir()) == []


def test_reserved_names_and_metadata_that_are_no_texts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="an array is named '__metadata__'; rename it"):
        write_safetensors(tmp_path / "a.safetensors", {"__metadata__": np.ones(2)})
    with pytest.raises(TypeError, match=r"metadata \{'step': 3\} hold no texts"):
        write_safetensors(tmp_path / "a.safetensors", {"a": np.ones(2)}, {"step": 3})
