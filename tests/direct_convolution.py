"""Convolution and its gradients by the definition, a NumPy loop over the kernel's offsets."""

from typing import NamedTuple

import numpy as np


class Convolved(NamedTuple):
    y: np.ndarray
    dx: np.ndarray
    dkernel: np.ndarray


def resolve_padding(padding, sizes, kernel_size, strides, dilation):
    """Return (low, high) per axis; "SAME" has ceil(size / stride) outputs, more padding behind."""
    if padding == "VALID":
        return [(0, 0)] * len(sizes)
    if padding != "SAME":
        return list(padding)
    pairs = []
    for size, kernel, stride, rate in zip(sizes, kernel_size, strides, dilation, strict=True):
        total = max((-(-size // stride) - 1) * stride + (kernel - 1) * rate + 1 - size, 0)
        pairs.append((total // 2, total - total // 2))
    return pairs


def direct_convolution(x, kernel, dy, *, strides, padding, dilation, groups=1):
    """Convolve in float64.

    Args:
        x: [batch, *sizes, channels].
        kernel: [*kernel_size, channels / groups, features].
        dy: function of the outputs that returns their cotangent.
        strides, padding, dilation: one value per axis; negative padding crops.
        groups: number of channel groups.

    Returns:
        Convolved.
    """
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    *kernel_size, width, features = kernel.shape
    pairs = resolve_padding(padding, x.shape[1:-1], kernel_size, strides, dilation)
    padded = np.pad(x, [(0, 0), *((max(a, 0), max(b, 0)) for a, b in pairs), (0, 0)])
    crop = tuple(slice(max(-a, 0), -max(-b, 0) or None) for a, b in pairs)
    padded = padded[:, *crop].reshape(len(x), *padded[:, *crop].shape[1:-1], groups, width)
    matrices = kernel.reshape(*kernel_size, width, groups, features // groups)
    sizes = [
        (n - (k - 1) * d - 1) // s + 1
        for n, k, d, s in zip(padded.shape[1:-2], kernel_size, dilation, strides, strict=True)
    ]

    def window(offset):
        axes = zip(offset, dilation, strides, sizes, strict=True)
        return (slice(None), *(slice(o * d, o * d + (n - 1) * s + 1, s) for o, d, s, n in axes))

    offsets = list(np.ndindex(*kernel_size))
    y = sum(np.einsum("...gc,cgf->...gf", padded[window(o)], matrices[o]) for o in offsets)
    cotangent = np.asarray(dy(y.reshape(*y.shape[:-2], features)), np.float64).reshape(y.shape)
    dpadded, dmatrices = np.zeros_like(padded), np.zeros_like(matrices)
    for o in offsets:
        dpadded[window(o)] += np.einsum("...gf,cgf->...gc", cotangent, matrices[o])
        rows = padded[window(o)].reshape(-1, groups, width)
        dmatrices[o] = np.einsum("rgc,rgf->cgf", rows, cotangent.reshape(len(rows), groups, -1))
    dx = np.zeros_like(x)
    inside = [
        (slice(max(-a, 0), n - max(-b, 0)), slice(max(a, 0), m - max(b, 0)))
        for (a, b), n, m in zip(pairs, x.shape[1:-1], padded.shape[1:-2], strict=True)
    ]
    to_x, from_padded = zip(*inside, strict=True)
    dx[:, *to_x] = dpadded[:, *from_padded].reshape(dx[:, *to_x].shape)
    y = y.reshape(*y.shape[:-2], features)
    return Convolved(y, dx, dmatrices.reshape(kernel.shape))
