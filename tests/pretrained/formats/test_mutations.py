"""Mutated files of every format give a value, or an error that names the file."""

import pathlib

import numpy as np
import pytest
import tensor_files as written
from mutations import Reader, campaign

from jaxnets.pretrained import read_tensors

GOLDEN = pathlib.Path(__file__).parent / "golden"
DTYPES = {name: written.DTYPES[name] for name in ("float32", "int64", "bool", "complex64")}
SMALL = {**DTYPES, "bfloat16": written.SMALL["bfloat16"]}


H5 = {name: dtype for name, dtype in SMALL.items() if dtype.kind != "c"}


def write_gguf(path, tree):
    blocks = written.random_blocks(0, shape=(256,))
    written.write_gguf(path, {"a": np.ones((2, 3), np.float32)}, quantized=blocks)


def write_onnx_numbers(path, tree):
    written.write_onnx(path, tree, raw=False)


WRITERS = {
    "safetensors": ("a.safetensors", written.write_safetensors, SMALL),
    "npz": ("a.npz", written.write_npz, DTYPES),
    "npz compressed": ("a.npz", written.write_npz_compressed, DTYPES),
    "npy": ("a.npy", written.write_npy, DTYPES),
    "h5": ("a.weights.h5", written.write_h5, H5),
    "keras": ("a.keras", written.write_keras, H5),
    "onnx": ("a.onnx", written.write_onnx, SMALL),
    "onnx numbers": ("a.onnx", write_onnx_numbers, SMALL),
    "gguf": ("a.gguf", write_gguf, DTYPES),
    "torch zip": ("zip.pt", None, None),
    "torch legacy": ("legacy.pt", None, None),
}


# A mutated size may be any that the format allows; arrays up to this one are read.
MOST_BYTES = 1 << 24


def read(folder):
    """Open the file of a folder and read its tensors."""
    tensors = read_tensors(next(folder.iterdir()))
    specs = tensors.specs.items()
    return [(spec, tensors[name]) for name, spec in specs if spec.nbytes < MOST_BYTES]


def check(value, contents):
    """Check that arrays are what the file says; most formats have no checksums."""
    for spec, array in value:
        assert (array.shape, array.dtype) == (spec.shape, spec.dtype)


def reader(format, tmp_path):
    name, write, dtypes = WRITERS[format]
    path = GOLDEN / name
    if write is not None:
        path = tmp_path / name
        write(path, written.random_tree(0, dtypes))
    content = path.read_bytes()
    if write is not None:
        path.unlink()
    return Reader({name: content}, read, check)


@pytest.mark.parametrize("format", WRITERS)
def test_a_mutated_file_gives_a_value_or_an_error_that_names_it(format, tmp_path):
    tally = campaign(format, reader(format, tmp_path), count=100, seed=0, folder=tmp_path)
    assert tally.read < tally.files


@pytest.mark.exhaustive
@pytest.mark.parametrize("format", WRITERS)
def test_every_mutated_file_gives_a_value_or_an_error_that_names_it(format, tmp_path):
    tally = campaign(format, reader(format, tmp_path), count=20_000, seed=1, folder=tmp_path)
    print(f"{format}: {tally}")
