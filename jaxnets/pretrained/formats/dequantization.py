"""Blocks of quantized elements, as GGUF files have them, to float32.

A block has a scale, for some types a minimum, and a few bits for each element. The types ending in
_K have blocks of 256 elements with a quantized scale for each 16 or 32 of them. The layouts are the
structs of ggml-common.h, the formulas those of ggml-quants.c (llama.cpp).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from jaxnets.storage.byte_ranges import ByteRange, aligned_bytes

_CHUNK_BLOCKS = 1 << 13
_NIBBLES = np.array([0, 4], np.uint8)
_BITS = np.arange(8, dtype=np.uint8)


def dequantize(data: ByteRange, stored: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the elements of quantized blocks.

    Args:
        data: the blocks, one after another.
        stored: type of the blocks, one of `BLOCKS`.
        shape: of the result.

    Returns:
        [*shape] of float32.
    """
    num_elements, num_bytes = BLOCKS[stored]
    result = aligned_bytes(4 * math.prod(shape)).view(np.float32)
    blocks = result.reshape(-1, num_elements)
    for start in range(0, len(blocks), _CHUNK_BLOCKS):
        count = min(_CHUNK_BLOCKS, len(blocks) - start)
        raw = data.read(start * num_bytes, count * num_bytes).reshape(count, num_bytes)
        # Damaged scales may be infinite; the result then is, as in llama.cpp.
        with np.errstate(all="ignore"):
            blocks[start : start + count] = _FORMULAS[stored](raw).reshape(count, -1)
    return result.reshape(shape)


def _half(raw: np.ndarray, start: int) -> np.ndarray:
    """Return the float16 at a byte of every block, as float32 [blocks, 1]."""
    return raw[:, start : start + 2].copy().view("<f2").astype(np.float32)


def _nibbles(raw: np.ndarray, group: int) -> np.ndarray:
    """Return 4 bits an element [blocks, elements]: of each group of bytes the low ones first."""
    grouped = raw.reshape(len(raw), -1, 1, group) >> _NIBBLES[:, None]
    return (grouped & 0x0F).reshape(len(raw), -1)


def _fifth_bits(raw: np.ndarray) -> np.ndarray:
    """Return bit 4 of 32 elements from 4 bytes, the least significant bit first."""
    return ((raw[:, :, None] >> _BITS) & 1).reshape(len(raw), 32) << 4


def _q8_0(raw: np.ndarray) -> np.ndarray:
    return _half(raw, 0) * raw[:, 2:].view(np.int8).astype(np.float32)


def _q4_0(raw: np.ndarray) -> np.ndarray:
    return _half(raw, 0) * (_nibbles(raw[:, 2:], 16).astype(np.float32) - 8)


def _q4_1(raw: np.ndarray) -> np.ndarray:
    return _half(raw, 0) * _nibbles(raw[:, 4:], 16).astype(np.float32) + _half(raw, 2)


def _q5_0(raw: np.ndarray) -> np.ndarray:
    elements = _nibbles(raw[:, 6:], 16) | _fifth_bits(raw[:, 2:6])
    return _half(raw, 0) * (elements.astype(np.float32) - 16)


def _q5_1(raw: np.ndarray) -> np.ndarray:
    elements = _nibbles(raw[:, 8:], 16) | _fifth_bits(raw[:, 4:8])
    return _half(raw, 0) * elements.astype(np.float32) + _half(raw, 2)


def _scales(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return scales and minima [blocks, 8, 1] of the groups of 32, from 16 bytes of each block.

    They have 6 bits. The first four of either are the low bits of bytes 0 to 3 and 4 to 7; the
    others have 4 bits in bytes 8 to 11 and 2 bits at the top of the bytes of the first four.
    """
    first, second, rest = raw[:, 4:8], raw[:, 8:12], raw[:, 12:16]
    scales = np.hstack([first & 0x3F, (rest & 0x0F) | ((first >> 2) & 0x30)])
    minima = np.hstack([second & 0x3F, (rest >> 4) | ((second >> 2) & 0x30)])
    scale = _half(raw, 0) * scales.astype(np.float32)
    minimum = _half(raw, 2) * minima.astype(np.float32)
    return scale[:, :, None], minimum[:, :, None]


def _q4_k(raw: np.ndarray) -> np.ndarray:
    scale, minimum = _scales(raw)
    elements = _nibbles(raw[:, 16:], 32).reshape(-1, 8, 32)
    return scale * elements.astype(np.float32) - minimum


def _q5_k(raw: np.ndarray) -> np.ndarray:
    scale, minimum = _scales(raw)
    fifth = (raw[:, None, 16:48] >> _BITS[:, None]) & 1  # [blocks, 8, 32]
    elements = _nibbles(raw[:, 48:], 32).reshape(-1, 8, 32) | (fifth << 4)
    return scale * elements.astype(np.float32) - minimum


def _q6_k(raw: np.ndarray) -> np.ndarray:
    low = _nibbles(raw[:, :128], 64)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    high = (raw[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3
    elements = (low | (high.reshape(-1, 256) << 4)).view(np.int8) - np.int8(32)
    scale = _half(raw, 208) * raw[:, 192:208].view(np.int8).astype(np.float32)
    return scale[:, :, None] * elements.reshape(-1, 16, 16).astype(np.float32)


#: {type: (elements of a block, bytes of a block)}.
BLOCKS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "Q8_0": (32, 34),
        "Q4_0": (32, 18),
        "Q4_1": (32, 20),
        "Q5_0": (32, 22),
        "Q5_1": (32, 24),
        "Q4_K": (256, 144),
        "Q5_K": (256, 176),
        "Q6_K": (256, 210),
    }
)
_FORMULAS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
