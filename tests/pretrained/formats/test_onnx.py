import numpy as np
import onnx
import pytest
from tensor_files import DTYPES, SMALL, assert_same, random_tree, write_onnx

from jaxnets.pretrained import read_tensors

KINDS = {**DTYPES, **SMALL}


@pytest.mark.parametrize("seed", range(2))
def test_initializers_of_every_type_have_their_bits(seed, tmp_path):
    tree = random_tree(seed, KINDS)
    write_onnx(tmp_path / "a.onnx", tree)
    assert_same(read_tensors(tmp_path / "a.onnx"), tree)


def test_initializers_written_as_numbers_have_their_values(tmp_path):
    rng = np.random.default_rng(0)
    tree = {n: rng.normal(0, 9, (2, 3)).astype(dtype) for n, dtype in DTYPES.items()}
    tree |= {n: random_tree(0, SMALL)[f"{n}.2"] for n in SMALL}
    write_onnx(tmp_path / "a.onnx", tree, raw=False)
    assert_same(read_tensors(tmp_path / "a.onnx"), tree)


def write(path, *tensors):
    graph = onnx.helper.make_graph([], "graph", [], [], initializer=tensors)
    path.write_bytes(onnx.helper.make_model(graph).SerializeToString())


def test_data_in_another_file_are_refused(tmp_path):
    tensor = onnx.numpy_helper.from_array(np.ones(3), "a")
    onnx.external_data_helper.set_external_data(tensor, location="../secret")
    tensor.ClearField("raw_data")
    write(tmp_path / "a.onnx", tensor)
    with pytest.raises(ValueError, match=r"a\.onnx: the data of 'a' lie in another file"):
        read_tensors(tmp_path / "a.onnx")


def test_initializers_that_contradict_their_shape_or_are_texts_are_refused(tmp_path):
    array = onnx.numpy_helper.from_array(np.ones(3, np.float32), "a")
    short = onnx.TensorProto(name="a", data_type=1, dims=[4], raw_data=bytes(12))
    large = onnx.TensorProto(name="a", data_type=1, dims=[2**62, 4], raw_data=bytes(12))
    few = onnx.TensorProto(name="a", data_type=1, dims=[1000], float_data=[1.0])
    texts = onnx.helper.make_tensor("a", onnx.TensorProto.STRING, [1], [b"text"])
    cases = [
        ([array, array], "occurs twice"),
        ([short], "ends at byte 16 of 12"),
        ([large], "shape"),
        ([few], "fewer elements"),
        ([texts], "ONNX type 8"),
    ]
    for tensors, message in cases:
        write(tmp_path / "a.onnx", *tensors)
        with pytest.raises(ValueError, match=rf"a\.onnx: .*{message}"):
            read_tensors(tmp_path / "a.onnx")


def test_other_files_are_refused(tmp_path):
    for content in (b"", b"no model", bytes(100), b"\xff" * 100):
        (tmp_path / "a.onnx").write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.onnx: it is no ONNX file"):
            read_tensors(tmp_path / "a.onnx")
