import json
import pathlib
import pickle
import struct
import zipfile

import numpy as np
import pytest
from tensor_files import DTYPES, SMALL

from jaxnets.pretrained import read_tensors

GOLDEN = pathlib.Path(__file__).parent / "golden"
VALUES = json.loads((GOLDEN / "values.json").read_text())


@pytest.mark.parametrize("layout", ["zip", "legacy"])
def test_every_tensor_of_a_file_of_torch_has_its_bits(layout):
    tensors = read_tensors(GOLDEN / f"{layout}.pt")
    assert tensors.keys() == VALUES.keys()
    for name, value in VALUES.items():
        array = tensors[name]
        assert array.dtype == {**DTYPES, **SMALL}[value["dtype"]], name
        assert array.shape == tensors.specs[name].shape == tuple(value["shape"])
        assert array.tobytes().hex() == value["bytes"], name


@pytest.mark.parametrize("layout", ["zip", "legacy"])
def test_values_that_are_no_tensors_are_metadata(layout):
    assert read_tensors(GOLDEN / f"{layout}.pt").metadata == {
        "lr": 0.1,
        "epoch": 3,
        "name": "run",
        "dtype": "torch.bfloat16",
        "size.0": 2,
        "size.1": 3,
        "nothing": None,
        "large": -(2**70),
    }


def test_the_bytes_of_a_big_endian_machine_are_swapped():
    array = read_tensors(GOLDEN / "big.pt")["a"]
    np.testing.assert_array_equal(array, np.arange(6, dtype=np.int32).reshape(2, 3))


def test_an_expanded_tensor_takes_the_memory_of_its_storage():
    array = read_tensors(GOLDEN / "zip.pt")["views.expanded"]
    assert array.strides == (0, 0) and not array.flags.writeable
    np.testing.assert_array_equal(array, np.full((5, 3), 2.5, np.float32))


def test_a_part_of_a_strided_tensor_is_read():
    tensors = read_tensors(GOLDEN / "legacy.pt")
    whole = np.arange(24.0, dtype=np.float32).reshape(4, 6)
    part = tensors.read("views.transposed", (slice(4, 1, -2), slice(1, None)))
    np.testing.assert_array_equal(part, whole.T[4:1:-2, 1:])
    assert tensors.read("views.whole", (slice(2, 2),)).shape == (0, 6)


class Called:
    def __reduce__(self):
        return print, ("called",)


def write_zip(path, tree, members=()):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps(tree, 2))
        for name, content in members:
            archive.writestr(name, content)


def test_other_objects_are_refused_by_name_and_not_called(tmp_path, capsys):
    write_zip(tmp_path / "a.pt", {"a": Called()})
    with pytest.raises(ValueError, match=r"a\.pt: it holds '__builtin__\.print'.*state_dict"):
        read_tensors(tmp_path / "a.pt")
    write_zip(tmp_path / "b.bin", {"a": np.ones(3)})
    with pytest.raises(ValueError, match=r"b\.bin: it holds 'numpy\..*_reconstruct'"):
        read_tensors(tmp_path / "b.bin")
    assert capsys.readouterr().out == ""


TENSOR = (
    b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storage"
    b"ctorch\n%(kind)s\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK%(count)ctQK\x00%(shape)s%(strides)s"
    b"\x89N%(bits)stRs."
)


def write_tensor(path, *, kind=b"FloatStorage", count=4, shape=(4,), strides=(1,), bits=b"N"):
    sizes = {
        name: b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", value) for value in values) + b"t"
        for name, values in (("shape", shape), ("strides", strides))
    }
    content = {b"kind": kind, b"count": count, b"bits": bits}
    content |= {name.encode(): value for name, value in sizes.items()}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", TENSOR % content)
        archive.writestr("a/data/0", np.arange(4, dtype=np.float32).tobytes())


def test_a_tensor_written_by_hand_is_read(tmp_path):
    write_tensor(tmp_path / "a.pt")
    assert read_tensors(tmp_path / "a.pt")["a"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (5,)}, "ends at byte 20 of 16"),
        ({"strides": (2,)}, "ends at byte 28 of 16"),
        ({"strides": (-1,)}, "strides"),
        ({"shape": (-4,)}, "shape"),
        ({"shape": (2, 2)}, "strides"),
        ({"shape": (2**40, 2**40), "strides": (0, 0)}, "shape"),
        ({"count": 5}, "has 16 bytes instead of 20"),
        ({"kind": b"QInt8Storage"}, r"holds 'torch\.QInt8Storage'"),
        ({"bits": b"}X\x03\x00\x00\x00abc\x88s"}, "other attributes than conj and neg"),
        ({"bits": b"}X\x04\x00\x00\x00conj\x88s"}, "conjugate of a float32"),
    ],
)
def test_a_tensor_that_contradicts_its_file_is_refused(change, message, tmp_path):
    write_tensor(tmp_path / "a.pt", **change)
    with pytest.raises(ValueError, match=rf"a\.pt: .*{message}"):
        read_tensors(tmp_path / "a.pt")


def test_a_huge_expanded_tensor_takes_no_memory(tmp_path):
    write_tensor(tmp_path / "a.pt", shape=(2**30, 2**30), strides=(0, 0))
    array = read_tensors(tmp_path / "a.pt")["a"]
    assert array.shape == (2**30, 2**30) and array[5, 7] == 0


def test_a_damaged_storage_is_noticed_when_it_is_read(tmp_path):
    path = tmp_path / "a.pt"
    write_tensor(path)
    content = path.read_bytes()
    path.write_bytes(content.replace(np.float32(3).tobytes(), np.float32(4).tobytes()))
    tensors = read_tensors(path)
    with pytest.raises(ValueError, match=r"a\.pt: member 'a/data/0' is damaged"):
        tensors["a"]


def test_a_list_that_contains_itself_and_two_equal_paths_are_refused(tmp_path):
    loop = []
    loop.append(loop)
    write_zip(tmp_path / "a.pt", loop)
    with pytest.raises(ValueError, match=r"a\.pt: .*contain themselves"):
        read_tensors(tmp_path / "a.pt")
    write_zip(tmp_path / "b.pt", {"a": {"b": 1}, "a.b": 2})
    with pytest.raises(ValueError, match=r"b\.pt: two members are named 'a\.b'"):
        read_tensors(tmp_path / "b.pt")


def test_nested_lists_that_double_at_every_level_are_refused_at_once(tmp_path):
    tree = []
    for _ in range(60):
        tree = [tree, tree]
    write_zip(tmp_path / "a.pt", tree)
    with pytest.raises(ValueError, match=r"a\.pt: .*contain themselves"):
        read_tensors(tmp_path / "a.pt")
