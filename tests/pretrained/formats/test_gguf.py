import struct

import gguf
import numpy as np
import pytest
from tensor_files import DTYPES, assert_same, random_blocks, random_tree, write_gguf

from jaxnets.pretrained import read_tensors

#: Types that the format has without quantization.
PLAIN = {name: DTYPES[name] for name in ("float16", "float32", "float64", "int8", "int16", "int32")}


@pytest.mark.parametrize("seed", range(2))
def test_arrays_of_every_type_have_their_bits(seed, tmp_path):
    tree = {n: a for n, a in random_tree(seed, PLAIN).items() if a.ndim and a.size}
    write_gguf(tmp_path / "a.gguf", tree)
    assert_same(read_tensors(tmp_path / "a.gguf"), tree)


@pytest.mark.parametrize("seed", range(3))
def test_quantized_blocks_have_the_values_of_the_gguf_package(seed, tmp_path):
    blocks = random_blocks(seed)
    write_gguf(tmp_path / "a.gguf", {}, quantized=blocks)
    tensors = read_tensors(tmp_path / "a.gguf")
    for name, (stored, raw) in blocks.items():
        with np.errstate(all="ignore"):
            expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[stored])
        spec = tensors.specs[name]
        assert (spec.shape, spec.stored) == (expected.shape, stored)
        actual = tensors[name]
        assert actual.dtype == spec.dtype
        actual = np.asarray(actual, np.float32)
        np.testing.assert_array_equal(actual.view(np.uint32), expected.view(np.uint32))
        part = np.asarray(tensors.read(name, np.s_[1:, 5:9]), np.float32)
        np.testing.assert_array_equal(part, actual[1:, 5:9])


def test_more_blocks_than_are_converted_at_once(tmp_path):
    raw = np.random.default_rng(0).integers(0, 100, (2, 9000 * 18), dtype=np.uint8)
    write_gguf(tmp_path / "a.gguf", {}, quantized={"a": ("Q4_0", raw)})
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q4_0)
    np.testing.assert_array_equal(read_tensors(tmp_path / "a.gguf")["a"], expected)


def test_the_metadata_are_a_dict(tmp_path):
    write_gguf(tmp_path / "a.gguf", {"a": np.ones(3, np.float32)})
    assert read_tensors(tmp_path / "a.gguf").metadata == {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "tokenizer.ggml.tokens": ["a", "ä", ""],
        "tokenizer.ggml.scores": [0.5, -1.0, 2.0],
        "tokenizer.ggml.add_bos_token": True,
    }


def text(value):
    return struct.pack("<Q", len(value)) + value.encode()


def write(path, infos, *, fields=(), size=64, version=3, num_fields=None):
    """Write a file by hand: tensors (name, sizes, type, offset) and encoded fields."""
    count = len(fields) if num_fields is None else num_fields
    header = b"GGUF" + struct.pack("<IQQ", version, len(infos), count) + b"".join(fields)
    for name, sizes, kind, offset in infos:
        header += text(name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
        header += struct.pack("<IQ", kind, offset)
    path.write_bytes(header + bytes(-len(header) % 32) + bytes(size))


UINT32, ARRAY = 4, 9


def field(name, kind, value):
    return text(name) + struct.pack("<I", kind) + value


@pytest.mark.parametrize(
    ("infos", "options", "message"),
    [
        ([("a", (4,), 23, 0)], {}, "'a' has the type IQ4_XS, which is not read; convert it"),
        ([("a", (4,), 39, 0)], {}, "the type MXFP4"),
        ([("a", (4,), 77, 0)], {}, "the type number 77"),
        ([("a", (4,), 2, 0)], {}, "rows of 'a' are no blocks of 32"),
        ([("a", (40,), 0, 0)], {}, "lie outside"),
        ([("a", (4,), 0, 0), ("a", (4,), 0, 32)], {}, "'a' occurs twice"),
        ([("a", (9,), 0, 0), ("b", (4,), 0, 32)], {}, "'b' and 'a' overlap"),
        ([("a", (4,), 0, 8)], {}, "not aligned"),
        ([("a", (1,) * 5, 0, 0)], {}, "5 axes"),
        ([("a", (2**40, 2**40), 0, 0)], {}, "shape"),
        ([], {"version": 1}, "GGUF version is 1"),
        ([], {"version": 3 << 24}, "big-endian"),
        ([], {"num_fields": 2**63}, "the field '' occurs twice"),
        ([], {"fields": [field("a", 13, b"")]}, "type 13"),
        ([], {"fields": [field("a", ARRAY, struct.pack("<IQ", 4, 2**62))]}, "array"),
        ([], {"fields": [field("a", ARRAY, struct.pack("<IQ", 9, 1) * 20)]}, "nested too deeply"),
        ([], {"fields": [field("a", UINT32, bytes(4))] * 2}, "'a' occurs twice"),
        ([], {"fields": [field("general.alignment", UINT32, bytes(4))]}, "alignment is 0"),
        ([], {"fields": [field("split.count", UINT32, b"\3\0\0\0")]}, "one of 3 parts; merge"),
    ],
)
def test_a_header_that_contradicts_its_file_is_refused(infos, options, message, tmp_path):
    write(tmp_path / "a.gguf", infos, **options)
    with pytest.raises(ValueError, match=rf"a\.gguf: .*{message}"):
        read_tensors(tmp_path / "a.gguf")


def test_a_file_written_by_hand_is_read(tmp_path):
    write(tmp_path / "a.gguf", [("a", (4, 2), 0, 0)], fields=[field("b", UINT32, b"\5\0\0\0")])
    tensors = read_tensors(tmp_path / "a.gguf")
    assert tensors["a"].shape == (2, 4) and tensors.metadata == {"b": 5}
