"""Which algorithm computes a convolution and its gradients, read as a table."""

import importlib

import jax
import jax.numpy as jnp
import pytest

from jaxnets.functional.conv import selection
from jaxnets.functional.windows import ConvSpec, broadcast_to_axes, dilated_size, padding_pairs

# The package has a function of this name.
convolution = importlib.import_module("jaxnets.functional.conv.convolution")

TABLES = {
    "forward": (selection.FORWARD, convolution.FORWARD, {"pointwise", "xla"}),
    "input gradient": (selection.INPUT_GRADIENT, convolution.INPUT_GRADIENT, set()),
    "kernel gradient": (selection.KERNEL_GRADIENT, convolution.KERNEL_GRADIENT, set()),
}

GEMM, FROM_DY, INNERMOST = "im2col_matmul", "im2col_matmul_of_dy", "batch_innermost"
OFFSETS, FLIPPED, WINOGRAD, XLA = "offset_matmuls", "flipped_kernel", "winograd", "xla"
STRIDED = {"strides": 2}
# Shape of the input, shape of the kernel, options -> forward, input gradient, kernel gradient.
CASES = [
    # 3x3 kernels of many channels.
    ((32, 16, 16, 64), (3, 3, 64, 64), {}, (WINOGRAD, WINOGRAD, WINOGRAD)),
    ((32, 4, 4, 512), (3, 3, 512, 512), {}, (WINOGRAD, WINOGRAD, WINOGRAD)),
    ((32, 8, 8, 32), (3, 3, 32, 64), {}, (XLA, FLIPPED, WINOGRAD)),
    # A small batch does not pay for transforming the kernel, nor 3 outputs for 2 tiles of 2.
    ((4, 4, 4, 512), (3, 3, 512, 512), {}, (GEMM, FLIPPED, GEMM)),
    ((32, 3, 3, 64), (3, 3, 64, 64), {}, (GEMM, FLIPPED, GEMM)),
    # What Winograd's filtering does not compute, or not exactly enough.
    ((32, 16, 16, 64), (3, 3, 64, 64), STRIDED, (XLA, GEMM, GEMM)),
    ((32, 16, 16, 64), (3, 3, 64, 64), {"dilation": 2}, (XLA, FLIPPED, GEMM)),
    ((32, 16, 16, 64), (3, 3, 32, 64), {"groups": 2}, (XLA, FLIPPED, GEMM)),
    ((32, 16, 16, 64), (5, 5, 64, 64), {}, (XLA, FLIPPED, GEMM)),
    ((32, 16, 16, 64), (3, 1, 64, 64), {}, (XLA, FLIPPED, GEMM)),
    ((32, 16, 16, 64), (3, 3, 64, 64), {"dtype": jnp.float16}, (XLA, FLIPPED, GEMM)),
    # bfloat16.
    ((2, 12, 12, 128), (3, 3, 128, 128), {"dtype": jnp.bfloat16}, (OFFSETS, FLIPPED, OFFSETS)),
    ((2, 12, 12, 32), (3, 3, 32, 32), {"dtype": jnp.bfloat16}, (XLA, FLIPPED, OFFSETS)),
    ((2, 12, 12, 8), (3, 3, 8, 8), {"dtype": jnp.bfloat16}, (INNERMOST,) * 3),
    (
        (2, 12, 12, 256),
        (3, 3, 128, 256),
        {"dtype": jnp.bfloat16, "groups": 2},
        (XLA, FLIPPED, GEMM),
    ),
    # Few channels and features, unless their patches take too much memory or there are none.
    ((2, 9, 9, 1), (3, 3, 1, 8), {}, (INNERMOST,) * 3),
    ((2, 9, 9, 16), (3, 3, 16, 16), STRIDED, (INNERMOST,) * 3),
    ((2, 9, 9, 17), (3, 3, 17, 16), {}, (XLA, FLIPPED, GEMM)),
    ((2, 9, 9, 1), (3, 3, 1, 17), {}, (XLA, FLIPPED, GEMM)),
    ((256, 64, 64, 16), (5, 5, 16, 16), {}, (XLA, FLIPPED, GEMM)),
    ((0, 6, 6, 2), (3, 3, 2, 3), {}, (XLA, FLIPPED, GEMM)),
    # Small outputs of many channels.
    ((2, 2, 2, 20), (3, 3, 20, 4), {}, (GEMM, FLIPPED, FROM_DY)),
    ((2, 4, 4, 17), (3, 3, 17, 4), {}, (XLA, FLIPPED, FROM_DY)),
    ((2, 10, 40), (3, 40, 20), {}, (GEMM, FLIPPED, GEMM)),
    # Few features.
    ((2, 8, 8, 20), (3, 3, 20, 8), {}, (XLA, FLIPPED, FROM_DY)),
    ((2, 8, 8, 20), (3, 3, 20, 8), STRIDED, (XLA, GEMM, GEMM)),
    ((2, 8, 8, 64), (3, 3, 32, 4), {"groups": 2}, (XLA, FLIPPED, FROM_DY)),
    # One channel per group.
    ((2, 8, 8, 12), (3, 3, 1, 24), {"groups": 12}, (XLA, FLIPPED, "depthwise")),
    ((2, 8, 8, 12), (3, 3, 1, 24), {"groups": 12, "strides": 2}, (XLA, GEMM, "depthwise")),
]


def problem(x, kernel, *, dtype=jnp.float32, strides=1, padding="SAME", dilation=1, groups=1):
    axes = len(x) - 2
    strides, dilation = (broadcast_to_axes(v, axes, "") for v in (strides, dilation))
    pairs = padding_pairs(padding, x[1:-1], dilated_size(kernel[:-2], dilation), strides)
    operands = (jax.ShapeDtypeStruct(shape, dtype) for shape in (x, kernel))
    return selection.describe(*operands, ConvSpec(strides, pairs, dilation, groups))


@pytest.mark.parametrize(("x", "kernel", "options", "expected"), CASES)
def test_the_first_row_that_holds_runs(x, kernel, options, expected):
    case = problem(x, kernel, **options)
    assert tuple(selection.select(table, case) for table, *_ in TABLES.values()) == expected


def test_a_kernel_of_one_element_is_a_matmul_unless_it_has_padding_or_groups():
    for options in ({}, {"strides": (2, 3)}, {"dtype": jnp.bfloat16}):
        case = problem((2, 6, 6, 3), (1, 1, 3, 4), **options)
        assert selection.select(selection.FORWARD, case) == "pointwise"
    for options in ({"padding": [(0, 1), (0, 0)]}, {"groups": 3}):
        case = problem((2, 6, 6, 3), (1, 1, 3 // options.get("groups", 1), 6), **options)
        assert selection.select(selection.FORWARD, case) != "pointwise"


@pytest.mark.parametrize("column", range(3), ids=list(TABLES))
def test_every_row_has_a_function_a_reason_and_a_case_above(column):
    rows, functions, inline = list(TABLES.values())[column]
    names = [row.algorithm for row in rows]
    assert set(names) == set(functions) | inline and len(set(names)) == len(names)
    assert all(row.reason for row in rows)
    assert {expected[column] for *_, expected in CASES} | (inline - {XLA}) == set(names)


def test_the_output_size_is_that_of_the_convolution():
    case = problem((2, 9, 8, 3), (3, 2, 3, 4), strides=(2, 1), padding=[(-1, 0), (2, 1)])
    assert case.output_size == ((9 - 1 - 3) // 2 + 1, 8 + 3 - 2 + 1)
    assert problem((1, 9, 1), (3, 1, 1), dilation=4, padding="VALID").output_size == (1,)
