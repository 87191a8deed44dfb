"""Layouts are inverted exactly, and are what torch's layers mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets.functional.patches import patchify
from jaxnets.pretrained import convolution_layouts as kernels
from jaxnets.pretrained import layouts


def numbers(*shape):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


CASES = [
    (layouts.Transpose(), [(5, 3)], [(3, 5)]),
    (kernels.ConvolutionKernel(), [(8, 3, 2)], [(2, 3, 8)]),
    (kernels.ConvolutionKernel(), [(8, 3, 2, 5)], [(2, 5, 3, 8)]),
    (kernels.TransposedConvolutionKernel(), [(3, 8, 5)], [(5, 3, 8)]),
    (
        kernels.TransposedConvolutionKernel(2, flip=False),
        [(6, 4, 2, 5)],
        [(2, 5, 3, 8)],
    ),
    (kernels.KerasTransposedKernel(), [(4, 5, 8, 3)], [(4, 5, 3, 8)]),
    (kernels.KerasTransposedKernel(flip=False), [(5, 8, 3)], [(5, 3, 8)]),
    (kernels.DepthwiseKernel(2), [(3, 5, 4, 2)], [(3, 5, 1, 8)]),
    (layouts.SplitHeads(3, axis=1), [(4, 6)], [(4, 3, 2)]),
    (layouts.JoinHeads(3, axis=1), [(4, 3, 2)], [(4, 6)]),
    (layouts.Split(3), [(6, 4)], [(2, 4)] * 3),
    (layouts.Split((4, 1, 1), axis=1), [(2, 6)], [(2, 4), (2, 1), (2, 1)]),
    (layouts.Join(2, axis=1), [(3, 2), (3, 2)], [(3, 4)]),
    (layouts.Blocks((2, 0, 1)), [(6, 4)], [(6, 4)]),
    (layouts.RotaryPairs(2), [(12, 5)], [(12, 5)]),
    (layouts.Squeeze((0, 2)), [(1, 3, 1)], [(3,)]),
    (kernels.PatchKernel((2, 3)), [(7, 4, 2, 3)], [(24, 7)]),
    (layouts.ChannelsFirstRows((3, 2, 4)), [(24, 5)], [(24, 5)]),
    (layouts.FromZeroCentered(), [(4,)], [(4,)]),
    (layouts.Sum(), [(4,), (4,)], [(4,)]),
]


@pytest.mark.parametrize(("layout", "stored", "ours"), CASES, ids=lambda x: str(x)[:30])
def test_layouts_have_their_shapes_and_are_undone_exactly(layout, stored, ours):
    tensors = [numbers(*shape) + 100 * index for index, shape in enumerate(stored)]
    arrays = layout.from_file(tensors)
    assert [array.shape for array in arrays] == ours
    shapes = jax.eval_shape(layout.from_file, tensors)  # without data
    assert [array.shape for array in shapes] == ours
    again = layout.from_file(layout.to_file(arrays))
    for one, other in zip(again, arrays, strict=True):
        np.testing.assert_array_equal(one, other)
    if not isinstance(layout, layouts.Sum):
        for one, other in zip(layout.to_file(arrays), tensors, strict=True):
            np.testing.assert_array_equal(one, other)


def test_only_permutations_are_axis_orders():
    """Others must not be read in parts."""
    permutations = {type(x) for x, *_ in CASES if isinstance(x, layouts.AxisOrder)}
    assert permutations == {layouts.Transpose, kernels.ConvolutionKernel}


def test_blocks_take_the_order_of_the_file():
    assert layouts.Blocks((2, 0, 1)).from_file([np.arange(6)])[0].tolist() == [4, 5, 0, 1, 2, 3]


def test_a_patch_kernel_is_the_convolution_of_its_patches():
    images, kernel = numbers(2, 4, 6, 3) / 100, numbers(5, 3, 2, 2) / 60
    dense = kernels.PatchKernel((2, 2)).from_file([kernel])[0]
    convolved = jax.lax.conv_general_dilated(
        images, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "OIHW", "NHWC")
    )
    np.testing.assert_allclose(
        patchify(jnp.asarray(images), 2) @ dense, convolved.reshape(2, 6, 5), rtol=1e-5
    )


def test_channels_first_rows_follow_a_flatten_of_channels_last():
    image = numbers(3, 2, 4)  # [height, width, channels]
    kernel = numbers(24, 5)  # of [channels, height, width] flattened
    rows = layouts.ChannelsFirstRows((3, 2, 4)).from_file([kernel])[0]
    np.testing.assert_array_equal(
        image.reshape(-1) @ rows, image.transpose(2, 0, 1).reshape(-1) @ kernel
    )


def test_rotary_pairs_bring_neighbors_to_halves():
    """Rotating neighbors in the file's order is rotating halves in ours."""
    query, angle = numbers(2 * 6), np.array([0.3, 0.7, 1.1])
    cos, sin = np.cos(angle), np.sin(angle)
    first, second = query.reshape(2, 3, 2)[..., 0], query.reshape(2, 3, 2)[..., 1]
    pairs = np.stack([first * cos - second * sin, second * cos + first * sin], -1).reshape(-1)
    halves = layouts.RotaryPairs(2).from_file([query])[0].reshape(2, 2, 3)
    rotated = np.stack(
        [halves[:, 0] * cos - halves[:, 1] * sin, halves[:, 1] * cos + halves[:, 0] * sin], 1
    ).reshape(-1)
    np.testing.assert_allclose(layouts.RotaryPairs(2).from_file([pairs])[0], rotated)


@pytest.mark.parametrize(
    ("layout", "shape", "ours"),
    [
        (layouts.RotaryPairs(2), (8, 0), (8, 0)),
        (kernels.DepthwiseKernel(), (0, 4, 2), (0, 1, 8)),
        (kernels.PatchKernel((2, 2)), (0, 3, 2, 2), (12, 0)),
    ],
    ids=lambda x: str(x),
)
def test_a_damaged_shape_without_elements_has_one_here_too(layout, shape, ours):
    shapes = jax.eval_shape(layout.from_file, [numbers(*shape)])
    assert shapes[0].shape == ours


@pytest.mark.parametrize(
    ("layout", "shape", "message"),
    [
        (layouts.Transpose(), (2, 3, 4), "3 axes, not 2"),
        (kernels.ConvolutionKernel(), (2, 3), "2 axes, and a convolution"),
        (
            kernels.TransposedConvolutionKernel(2),
            (3, 4, 5),
            "3 channels do not split into 2 groups",
        ),
        (kernels.TransposedConvolutionKernel(), (3, 4), "2 axes, and a convolution"),
        (kernels.KerasTransposedKernel(), (3, 4), "2 axes, and a convolution"),
        (kernels.DepthwiseKernel(), (3, 4), "2 axes, and a convolution"),
        (layouts.SplitHeads(4), (6, 2), "axis 0 of size 6 has no 4 heads"),
        (layouts.JoinHeads(4), (6, 2), r"axes 0 and 1 of \(6, 2\) are no 4 heads"),
        (layouts.JoinHeads(4, axis=1), (6, 4), r"axes 1 and 2 of \(6, 4\) are no 4 heads"),
        (layouts.Split(4), (6, 2), "axis 0 of size 6 has no 4 equal parts"),
        (layouts.Split((1, 2)), (6, 2), r"axis 0 of size 6 has no parts of sizes \(1, 2\)"),
        (layouts.RotaryPairs(4), (12, 2), "axis 0 of size 12 has no 4 heads of pairs"),
        (layouts.Squeeze((0,)), (2, 3), "size not equal to one"),
        (kernels.PatchKernel((2, 2)), (5, 3, 2, 4), r"a patch of \(2, 4\), not \(2, 2\)"),
        (layouts.ChannelsFirstRows((2, 2)), (5, 3), "5 rows are no flattened image of size"),
    ],
    ids=lambda x: str(x),
)
def test_shapes_that_do_not_fit_are_refused(layout, shape, message):
    with pytest.raises(ValueError, match=message):
        layout.from_file([numbers(*shape)])
