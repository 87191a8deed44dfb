import h5py
import numpy as np
import pytest
from tensor_files import DTYPES, SMALL, assert_same, random_tree, write_h5, write_keras

from jaxnets.pretrained import read_tensors

KINDS = {
    **{name: dtype for name, dtype in DTYPES.items() if dtype.kind != "c"},
    "bfloat16": SMALL["bfloat16"],
}


def named(tree):
    return {name.replace(".", "/"): array for name, array in tree.items()}


@pytest.mark.parametrize("seed", range(2))
def test_arrays_of_every_type_have_their_bits(seed, tmp_path):
    tree = random_tree(seed, KINDS)
    write_h5(tmp_path / "a.weights.h5", tree)
    assert_same(read_tensors(tmp_path / "a.weights.h5"), named(tree))


def test_a_keras_archive_is_read_in_place_with_its_configuration(tmp_path):
    tree = random_tree(0, KINDS)
    write_keras(tmp_path / "a.keras", tree)
    tensors = read_tensors(tmp_path / "a.keras")
    assert_same(tensors, named(tree))
    assert tensors.metadata == {"config.json": '{"class_name": "Sequential"}'}


def test_big_endian_arrays_are_read_and_slices_of_them(tmp_path):
    array = np.arange(60.0).reshape(6, 10)
    write_h5(tmp_path / "a.h5", {"a": array.astype(">f8")})
    tensors = read_tensors(tmp_path / "a.h5")
    assert_same(tensors, {"a": array})
    np.testing.assert_array_equal(tensors.read("a", np.s_[::-2, 3:]), array[::-2, 3:])


def test_groups_of_many_members_are_read(tmp_path):
    tree = {f"layer{i}.{j}": np.full(2, i + j) for i in range(300) for j in range(2)}
    write_h5(tmp_path / "a.h5", tree)
    assert_same(read_tensors(tmp_path / "a.h5"), named(tree))


def test_attributes_do_not_matter(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["a"] = np.arange(3)
        for number in range(40):
            file["a"].attrs[f"n{number}"] = "text" * number
            file.attrs[f"n{number}"] = number
    assert read_tensors(tmp_path / "a.h5")["a"].tolist() == [0, 1, 2]


def test_an_empty_group_has_no_tensors(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_group("layers/dropout/vars")
    assert len(read_tensors(tmp_path / "a.h5")) == 0


@pytest.mark.parametrize("link", [h5py.SoftLink("/b"), h5py.ExternalLink("other.h5", "/a")])
def test_links_are_refused(link, tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["a"] = np.ones(3)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["a"] = link
    with pytest.raises(ValueError, match=r"a\.h5: .*(is a link|newer layout); save"):
        read_tensors(tmp_path / "a.h5")


def test_arrays_in_other_files_and_chunks_are_refused(tmp_path):
    (tmp_path / "secret").write_bytes(bytes(24))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("a", (3,), "f8", external=[(str(tmp_path / "secret"), 0, 24)])
    with h5py.File(tmp_path / "b.h5", "w") as file:
        layout = h5py.VirtualLayout((3,), "f8")
        layout[:] = h5py.VirtualSource(str(tmp_path / "c.h5"), "a", (3,))
        file.create_virtual_dataset("a", layout)
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file.create_dataset("a", data=np.ones(9), compression="gzip")
    with h5py.File(tmp_path / "d.h5", "w", libver="latest") as file:
        file["a"] = np.ones(3)
    for name in ("a.h5", "b.h5", "c.h5", "d.h5"):
        with pytest.raises(ValueError, match=rf"{name}: .*; save the weights anew"):
            read_tensors(tmp_path / name)


def test_other_types_and_cycles_are_refused(tmp_path):
    for array in (
        np.array([b"text"]),
        np.zeros(2, [("a", "f4")]),
        np.zeros(2, "V2"),
        np.ones(2, "c8"),
    ):
        with h5py.File(tmp_path / "b.h5", "w") as file:
            file["a"] = array
        with pytest.raises(ValueError, match=r"b\.h5: 'a' has the HDF5 type"):
            read_tensors(tmp_path / "b.h5")
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file.create_group("a")["b"] = file["/"]
    with pytest.raises(ValueError, match=r"c\.h5: the group 'a/b' contains itself"):
        read_tensors(tmp_path / "c.h5")
