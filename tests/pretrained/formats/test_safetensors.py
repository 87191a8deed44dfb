import json
import struct

import numpy as np
import pytest
from tensor_files import DTYPES, SMALL, assert_same, random_tree, write_safetensors

from jaxnets.pretrained import read_tensors


@pytest.mark.parametrize("seed", range(3))
def test_arrays_of_every_type_have_their_bits(seed, tmp_path):
    kinds = {name: dtype for name, dtype in DTYPES.items() if name != "complex128"}
    tree = random_tree(seed, {**kinds, **SMALL})
    write_safetensors(tmp_path / "a.safetensors", tree)
    tensors = read_tensors(tmp_path / "a.safetensors")
    assert_same(tensors, tree)
    assert tensors.metadata == {"format": "np"}


def test_slices_are_those_of_numpy(tmp_path):
    array = np.arange(60, dtype=np.int32).reshape(6, 10)
    write_safetensors(tmp_path / "a.safetensors", {"a": array})
    tensors = read_tensors(tmp_path / "a.safetensors")
    for index in (np.s_[2:4,], np.s_[:, 3:100], np.s_[::-2, ::3], np.s_[-1:, -2:], np.s_[9:,]):
        np.testing.assert_array_equal(tensors.read("a", index), array[index])
    with pytest.raises(ValueError, match=r"a has shape \(6, 10\); give at most that many slices"):
        tensors.read("a", np.s_[:, :, :])


def test_arrays_lie_where_jax_takes_them_without_a_copy(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", {"a": np.ones(1), "b": np.ones((3, 3))})
    tensors = read_tensors(tmp_path / "a.safetensors")
    assert [array.ctypes.data % 64 for array in tensors.values()] == [0, 0]


def test_a_file_that_changes_after_it_was_opened_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": np.ones(4)})
    tensors = read_tensors(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(OSError, match=r"a\.safetensors was changed"):
        tensors["a"]


def write(path, header, size=16):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))


def entry(start, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, "'b' and 'a' overlap"),
        ({"a": entry(0, 8), "b": entry(12, 20)}, "lie outside"),
        ({"a": entry(0, 8), "b": entry(8, 12)}, "'b' ends at byte 8 of 4"),
        ({"a": entry(0, 8)}, "bytes 8 to 16 of its data belong to no tensor"),
        ({"a": entry(8, 16)}, "bytes 0 to 8 of its data belong to no tensor"),
        ({"a": entry(8, 0), "b": entry(8, 16)}, "data_offsets"),
        ({"a": entry(0, 16, (-2, -2))}, "shape"),
        ({"a": entry(0, 16, (2**62, 2**62))}, "shape"),
        ({"a": entry(0, 16, (2.0, 2))}, "shape"),
        ({"a": entry(0, 16, (4,), "F4")}, "the type 'F4', which is not read; convert"),
        ({"a": {"dtype": "F32"}}, "has not dtype, shape and data_offsets"),
        ({"__metadata__": {"a": 1}}, "__metadata__"),
        (b"[]", "no JSON object"),
        (b'{"a": 1', "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b'{"a": {}, "a": {}}', "'a' occurs twice"),
        (b"\xff\xff", "not UTF-8"),
    ],
)
def test_a_header_that_contradicts_its_file_is_refused(header, message, tmp_path):
    write(tmp_path / "a.safetensors", header)
    with pytest.raises(ValueError, match=rf"a\.safetensors: .*{message}"):
        read_tensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize("size", [2**63, 10**9, 100])
def test_a_header_of_absurd_size_is_refused(size, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", size) + b"{}")
    with pytest.raises(ValueError, match=r"a\.safetensors: "):
        read_tensors(tmp_path / "a.safetensors")


def test_booleans_other_than_0_and_1_are_refused(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", {"a": np.full(3, 2, np.uint8)})
    content = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(
        content.replace(b'"U8"', b'"BOOL"').replace(b" ", b"", 2)
    )
    tensors = read_tensors(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors: a boolean is neither 0 nor 1"):
        tensors["a"]
