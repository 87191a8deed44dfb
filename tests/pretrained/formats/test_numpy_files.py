import io
import zipfile

import ml_dtypes
import numpy as np
import pytest
from tensor_files import DTYPES, assert_same, random_tree, write_npz, write_npz_compressed

from jaxnets.pretrained import read_tensors


@pytest.mark.parametrize("write", [write_npz, write_npz_compressed])
@pytest.mark.parametrize("seed", range(2))
def test_arrays_of_every_type_have_their_bits(write, seed, tmp_path):
    tree = random_tree(seed, DTYPES)
    write(tmp_path / "a.npz", tree)
    assert_same(read_tensors(tmp_path / "a.npz"), tree)


@pytest.mark.parametrize("array", [np.float32(3), np.zeros((0, 2)), np.arange(6).reshape(2, 3)])
def test_the_array_of_an_npy_file_has_the_name_of_the_file(array, tmp_path):
    np.save(tmp_path / "weights.npy", array)
    tensors = read_tensors(tmp_path / "weights.npy")
    np.testing.assert_array_equal(tensors["weights"], array, strict=True)


def test_column_major_and_big_endian_arrays_have_their_values(tmp_path):
    array = np.arange(12.0).reshape(3, 4)
    np.savez(tmp_path / "a.npz", columns=np.asfortranarray(array), big=array.astype(">c8"))
    tensors = read_tensors(tmp_path / "a.npz")
    np.testing.assert_array_equal(tensors["columns"], array)
    np.testing.assert_array_equal(tensors["big"], array.astype(np.complex64), strict=True)
    np.testing.assert_array_equal(tensors.read("columns", np.s_[1:, ::2]), array[1:, ::2])


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_the_header_is_read(version, tmp_path):
    with open(tmp_path / "a.npy", "wb") as stream:
        np.lib.format.write_array(stream, np.arange(5), version=version)
    np.testing.assert_array_equal(read_tensors(tmp_path / "a.npy")["a"], np.arange(5))


@pytest.mark.parametrize(
    "array",
    [
        np.array([{}], object),
        np.array(["text"]),
        np.zeros(2, [("a", "f4"), ("b", "i2")]),
        np.zeros(2, ml_dtypes.bfloat16),
        np.zeros(2, "M8[s]"),
    ],
    ids=["object", "text", "fields", "bfloat16", "time"],
)
def test_other_arrays_are_refused_with_their_type(array, tmp_path):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=r"a\.npy: 'a' has the type .*, which is not read"):
        read_tensors(tmp_path / "a.npy")


def npy(header, data=b""):
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + data


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999999,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1 1,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1,), 'more': 1}",
        "{'descr': '<f4', 'fortran_order': False}",
        "__import__('os')",
    ],
)
def test_headers_that_contradict_the_data_are_refused(header, tmp_path):
    (tmp_path / "a.npy").write_bytes(npy(header, bytes(4)))
    with pytest.raises(ValueError, match=r"a\.npy: "):
        read_tensors(tmp_path / "a.npy")


def test_an_archive_with_other_members_or_two_of_a_name_is_refused(tmp_path):
    stream = io.BytesIO()
    np.save(stream, np.ones(2))
    for names in (["a.npy", "b.txt"], ["../a"]):
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            for name in names:
                archive.writestr(name, stream.getvalue())
        with pytest.raises(ValueError, match=r"a\.npz: its member .* is no array"):
            read_tensors(tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", stream.getvalue())
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a.npy", stream.getvalue())
    with pytest.raises(ValueError, match=r"a\.npz: member 'a\.npy' is .* there twice"):
        read_tensors(tmp_path / "a.npz")


def test_a_damaged_array_is_noticed_when_it_is_read(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.ones(3), b=np.zeros(3))
    content = (tmp_path / "a.npz").read_bytes()
    one = np.ones(3).tobytes()
    (tmp_path / "a.npz").write_bytes(content.replace(one, one[:-1] + b"\x00"))
    tensors = read_tensors(tmp_path / "a.npz")
    assert tensors["b"].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match=r"a\.npz: member 'a\.npy' is damaged"):
        tensors["a"]
