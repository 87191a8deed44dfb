import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from tensor_files import assert_same, write_gguf, write_safetensors

import jaxnets as jn
from jaxnets.pretrained import read_tensors

GOLDEN = pathlib.Path(__file__).parent / "golden"
FIRST = {"a": np.arange(3.0), "b": np.ones((2, 2), np.float32)}
SECOND = {"c": np.arange(4, dtype=np.int64)}
INDEX = "model.safetensors.index.json"


def write_shards(folder, weight_map=None):
    write_safetensors(folder / "model-1.safetensors", FIRST)
    write_safetensors(folder / "model-2.safetensors", SECOND)
    shards = {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}
    content = {"metadata": {"total_size": 72}, "weight_map": {**shards, **(weight_map or {})}}
    (folder / INDEX).write_text(json.dumps(content))


def test_shards_are_read_by_their_index(tmp_path):
    write_shards(tmp_path)
    write_safetensors(tmp_path / "consolidated.safetensors", {"z": np.ones(1)})
    for path in (tmp_path, str(tmp_path / INDEX)):
        assert_same(read_tensors(path), {**FIRST, **SECOND})


def test_shards_of_torch_are_read_by_their_index(tmp_path):
    shutil.copy(GOLDEN / "big.pt", tmp_path / "pytorch_model-1.bin")
    index = {"weight_map": {"a": "pytorch_model-1.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert read_tensors(tmp_path)["a"].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../model-1.safetensors"}, r"'\.\./model-1\.safetensors' is no file of its folder"),
        ({"a": "/etc/model-1.safetensors"}, "is no file of its folder"),
        ({"a": "below/model.safetensors"}, "is no file of its folder"),
        ({"a": "..\\model.safetensors"}, "is no file of its folder"),
        ({"a": ""}, "is no file of its folder"),
        ({"a": "model.pt"}, r"'model\.pt' is no \.safetensors file"),
        ({"a": 1}, "weight_map"),
        ({"d": "model-2.safetensors"}, "'d' not in the shard that it names"),
        ({"a": "model-2.safetensors"}, "'a' not in the shard that it names"),
    ],
)
def test_an_index_that_contradicts_its_shards_or_leaves_its_folder_is_refused(
    weight_map, message, tmp_path
):
    write_shards(tmp_path, weight_map)
    with pytest.raises(ValueError, match=rf"model\.safetensors\.index\.json.*{message}"):
        read_tensors(tmp_path)


def test_tensors_that_the_index_does_not_have_are_refused(tmp_path):
    write_shards(tmp_path)
    write_safetensors(tmp_path / "model-2.safetensors", {**SECOND, "stray": np.ones(1)})
    with pytest.raises(ValueError, match=r"index\.json.*does not have 'stray' of its shards"):
        read_tensors(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    write_shards(tmp_path)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-2\.safetensors is missing"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"a": 1, "a": 2}'])
def test_a_damaged_index_is_refused(text, tmp_path):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ValueError, match=r"index\.json.*get the folder anew"):
        read_tensors(tmp_path)


def test_safetensors_of_a_folder_come_before_other_files(tmp_path):
    shutil.copy(GOLDEN / "zip.pt", tmp_path / "pytorch_model.bin")
    shutil.copy(GOLDEN / "zip.pt", tmp_path / "training_args.bin")
    np.savez(tmp_path / "flax_model.npz", **FIRST)
    assert "model.weight" in read_tensors(tmp_path)
    write_safetensors(tmp_path / "model.safetensors", FIRST)
    assert_same(read_tensors(tmp_path), FIRST)


def test_the_only_file_of_a_folder_is_read_and_one_of_several_is_asked_for(tmp_path):
    (tmp_path / "README.md").touch()
    with pytest.raises(FileNotFoundError, match="has no file of tensors"):
        read_tensors(tmp_path)
    write_gguf(tmp_path / "small.gguf", {"a": np.ones(3, np.float32)})
    assert list(read_tensors(tmp_path)) == ["a"]
    np.savez(tmp_path / "b.npz", b=np.ones(3))
    with pytest.raises(ValueError, match=r"has 'b\.npz', 'small\.gguf'; give one of them"):
        read_tensors(tmp_path)


def test_files_of_other_formats_and_missing_ones_are_refused(tmp_path):
    (tmp_path / "a.msgpack").touch()
    with pytest.raises(ValueError, match=r"a\.msgpack: its format is not known; give a file"):
        read_tensors(tmp_path / "a.msgpack")
    for name in ("no.safetensors", "no.npz", "no.pt", "no.index.json", "no"):
        with pytest.raises(FileNotFoundError, match=name):
            read_tensors(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors: it is no regular file"):
        read_tensors(tmp_path / "a.safetensors")


def test_the_mapping_knows_sizes_before_it_reads(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", FIRST)
    tensors = jn.pretrained.read_tensors(tmp_path / "a.safetensors")
    assert (len(tensors), tensors.nbytes, "a" in tensors, "z" in tensors) == (2, 40, True, False)
    assert {name: spec.shape for name, spec in tensors.specs.items()} == {"a": (3,), "b": (2, 2)}
    assert repr(tensors) == f"Tensors(2 tensors, 40 bytes, in {tmp_path / 'a.safetensors'})"
    with pytest.raises(KeyError):
        tensors["z"]


USES = """
import sys
import jaxnets as jn
jn.pretrained.read_tensors(sys.argv[1])["a"]
heavy = {"torch", "tensorflow", "keras", "safetensors", "gguf", "onnx", "flax", "optax"}
print(sorted(heavy & set(sys.modules)))
"""


def test_reading_imports_neither_torch_nor_the_packages_of_the_formats(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", FIRST)
    run = subprocess.run(
        [sys.executable, "-c", USES, str(tmp_path / "a.safetensors")],
        capture_output=True,
        text=True,
        check=True,
        cwd=pathlib.Path(__file__).parents[3],
    )
    assert run.stdout.strip() == "[]"
