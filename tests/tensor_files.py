"""Small files of every format, written by the library of the format."""

import zipfile

import gguf
import h5py
import ml_dtypes
import numpy as np
import onnx
import safetensors.numpy

#: What `read_tensors` reads from each format, bit for bit.
DTYPES = {
    name: np.dtype(name)
    for name in (
        *("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
        *("float16", "float32", "float64", "complex64", "complex128"),
    )
}
SMALL = {
    name: np.dtype(getattr(ml_dtypes, name))
    for name in (
        "bfloat16",
        *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
    )
}
SHAPES = ((), (3,), (2, 5), (0, 4), (1, 2, 3, 4))


def random_tree(seed, dtypes):
    """Return {name: array of random bits}, one array for each type and shape."""
    rng = np.random.default_rng(seed)
    tree = {}
    for name, dtype in dtypes.items():
        for shape in SHAPES:
            size = int(np.prod(shape)) * dtype.itemsize
            raw = rng.integers(0, 2 if dtype.kind == "b" else 256, size, dtype=np.uint8)
            tree[f"{name}.{len(shape)}"] = raw.view(dtype).reshape(shape)
    return tree


def assert_same(tensors, tree):
    """Check that tensors have the names, types, shapes and bits of a tree, and say so before."""
    assert tensors.keys() == tree.keys()
    for name, array in tree.items():
        spec = tensors.specs[name]
        assert (spec.shape, spec.dtype, spec.nbytes) == (array.shape, array.dtype, array.nbytes)
        actual = tensors[name]
        assert (actual.shape, actual.dtype) == (array.shape, array.dtype), name
        assert actual.tobytes() == array.tobytes(), name


def write_safetensors(path, tree):
    safetensors.numpy.save_file(tree, path, metadata={"format": "np"})


def write_npz(path, tree):
    np.savez(path, **tree)


def write_npz_compressed(path, tree):
    np.savez_compressed(path, **tree)


def write_npy(path, tree):
    np.save(path, next(array for array in tree.values() if array.size > 3))


def write_h5(path, tree, **options):
    """Write arrays as Keras does: groups for layers, and bfloat16 as bytes without a type."""
    with h5py.File(path, "w") as file:
        for name, array in tree.items():
            name = name.replace(".", "/")
            if array.dtype == ml_dtypes.bfloat16:
                dataset = file.create_dataset(name, data=array.view("V2"))
                dataset.attrs["dtype"] = "bfloat16"
            else:
                file.create_dataset(name, data=array, **(options if array.ndim else {}))


def write_keras(path, tree):
    weights = path.with_suffix(".weights.h5")
    write_h5(weights, tree)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", '{"class_name": "Sequential"}')
        archive.write(weights, "model.weights.h5")
    weights.unlink()


def write_onnx(path, tree, *, raw=True):
    tensors = []
    for name, array in tree.items():
        tensor = onnx.numpy_helper.from_array(array, name)
        if not raw:
            kind = tensor.data_type
            values = array.ravel()
            if array.dtype in SMALL.values() or array.dtype == np.float16:
                values = values.view(f"u{array.dtype.itemsize}")
                tensor = onnx.TensorProto(name=name, data_type=kind, dims=array.shape)
                tensor.int32_data.extend(values.tolist())
            else:
                tensor = onnx.helper.make_tensor(name, kind, array.shape, values.tolist())
        tensors.append(tensor)
    graph = onnx.helper.make_graph([], "graph", [], [], initializer=tensors)
    path.write_bytes(onnx.helper.make_model(graph).SerializeToString())


QUANTIZED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "BF16")


def write_gguf(path, tree, *, quantized=None):
    """Write arrays, and blocks of random bytes as {name: (type, bytes)}."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_array("tokenizer.ggml.tokens", ["a", "ä", ""])
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.0, 2.0])
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    for name, array in tree.items():
        writer.add_tensor(name, array)
    for name, (stored, raw) in (quantized or {}).items():
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[stored])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_blocks(seed, shape=(3, 512)):
    """Return {type: (type, bytes)} of random blocks of every quantized type."""
    rng = np.random.default_rng(seed)
    blocks = {}
    for stored in QUANTIZED:
        elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[stored]]
        row = shape[-1] // elements * size
        blocks[stored] = (stored, rng.integers(0, 256, (*shape[:-1], row), dtype=np.uint8))
    return blocks
