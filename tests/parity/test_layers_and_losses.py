"""Layers and losses against torch, an independent reference. Optional: run with `-m parity`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets import functional
from jaxnets.functional import activations
from jaxnets.layers import normalization
from jaxnets.models.convolutional import resnet18
from jaxnets.objectives.losses import cross_entropy

torch = pytest.importorskip("torch", reason="torch is not installed (extra: parity)")
pytestmark = pytest.mark.parity


def to_torch(array):
    return torch.tensor(np.moveaxis(np.asarray(array), -1, 1).copy(), requires_grad=True)


def from_torch(tensor):
    return np.moveaxis(tensor.detach().numpy(), 1, -1)


@pytest.mark.parametrize(
    ("size", "stride", "padding", "dilation", "groups"),
    [(3, 1, 1, 1, 1), (3, 2, 1, 1, 1), (5, 1, 0, 1, 2), (3, 1, 2, 2, 1), (7, 2, 3, 1, 8)],
)
def test_convolution_and_its_gradients_equal_torch(size, stride, padding, dilation, groups):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 13, 11, 8)).astype(np.float32)
    kernel = rng.normal(size=(size, size, 8 // groups, 16)).astype(np.float32)

    def ours(x, kernel):
        return functional.convolution(
            x, kernel, strides=stride, padding=padding, dilation=dilation, groups=groups
        )

    y, pullback = jax.vjp(ours, x, kernel)
    dy = rng.normal(size=y.shape).astype(np.float32)
    dx, dkernel = pullback(dy)
    tx = to_torch(x)
    tkernel = torch.tensor(kernel.transpose(3, 2, 0, 1).copy(), requires_grad=True)
    ty = torch.nn.functional.conv2d(
        tx, tkernel, stride=stride, padding=padding, dilation=dilation, groups=groups
    )
    ty.backward(to_torch(dy))
    np.testing.assert_allclose(y, from_torch(ty), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dx, from_torch(tx.grad), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        dkernel, tkernel.grad.numpy().transpose(2, 3, 1, 0), rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize(("window", "stride", "padding"), [(2, 2, 0), (3, 2, 1), (3, 1, 0)])
def test_pooling_and_its_gradient_equal_torch(window, stride, padding):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 8, 8, 3)).astype(np.float32)
    pools = [
        (functional.max_pool, torch.nn.functional.max_pool2d, {}),
        (functional.average_pool, torch.nn.functional.avg_pool2d, {"count_include_pad": False}),
    ]
    for ours, theirs, options in pools:
        y, pullback = jax.vjp(lambda x, pool=ours: pool(x, window, stride, padding), x)
        tx = to_torch(x)
        ty = theirs(tx, window, stride, padding, **options)
        ty.backward(torch.ones_like(ty))
        np.testing.assert_allclose(y, from_torch(ty), rtol=1e-5, atol=1e-6)
        dx = pullback(jnp.ones_like(y))[0]
        np.testing.assert_allclose(dx, from_torch(tx.grad), rtol=1e-5, atol=1e-6)


def test_batch_norm_in_training_equals_torch():
    rng = np.random.default_rng(0)
    x = (3 + 2 * rng.normal(size=(4, 5, 5, 6))).astype(np.float32)
    module = normalization.BatchNorm()
    variables = module.init(jax.random.key(0), x)
    y, changed = module.apply(variables, x, train=True, mutable=["batch_stats"])
    reference = torch.nn.BatchNorm2d(6)
    ty = reference(to_torch(x))
    np.testing.assert_allclose(y, from_torch(ty), rtol=1e-4, atol=1e-5)
    stats = changed["batch_stats"]
    np.testing.assert_allclose(stats["mean"], reference.running_mean.numpy(), rtol=1e-5)
    # torch stores the unbiased variance, Flax and this library the biased one.
    biased = 0.9 + 0.1 * x.reshape(-1, 6).var(0)
    np.testing.assert_allclose(stats["var"], biased, rtol=1e-5)


@pytest.mark.parametrize("name", ["relu", "elu", "gelu", "silu", "softplus", "mish", "leaky_relu"])
def test_activations_equal_torch(name):
    x = np.linspace(-4, 4, 41, dtype=np.float32)
    expected = getattr(torch.nn.functional, name)(torch.tensor(x)).numpy()
    np.testing.assert_allclose(activations.activation(name)(x), expected, rtol=1e-5, atol=1e-6)


def test_smoothed_cross_entropy_equals_torch():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6, 4)).astype(np.float32)
    labels = rng.integers(0, 4, 6)
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(logits), torch.tensor(labels), label_smoothing=0.1, reduction="none"
    )
    found = cross_entropy(jnp.array(logits), jnp.array(labels), label_smoothing=0.1)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5)


def test_a_residual_stage_equals_the_same_layers_in_torch():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 8, 8, 3)).astype(np.float32)
    module = resnet18(10, stem="cifar", width=4, stage_sizes=(1, 1))
    variables = module.init(jax.random.key(0), x)
    # Parameters of zero (the last scale of a block) would hide its convolutions.
    params = jax.tree.map(
        lambda p: jnp.array(p + 0.3 * rng.normal(size=p.shape), jnp.float32), variables["params"]
    )
    found = module.apply({**variables, "params": params}, x)

    def kernel(tree):
        return torch.tensor(np.asarray(tree["kernel"]).transpose(3, 2, 0, 1).copy())

    def convolve(x, name, block, stride=1, padding=1):
        return torch.nn.functional.conv2d(x, kernel(block[name]), stride=stride, padding=padding)

    def norm(x, name, block):
        scale, bias = (torch.tensor(np.asarray(block[name][n])) for n in ("scale", "bias"))
        return torch.nn.functional.batch_norm(
            x, torch.zeros_like(scale), torch.ones_like(scale), scale, bias
        )

    relu = torch.nn.functional.relu
    y = relu(norm(convolve(to_torch(x), "stem_conv", params), "stem_norm", params))
    for stage, stride in ((1, 1), (2, 2)):
        block = params[f"stage_{stage}_block_1"]
        z = relu(norm(convolve(y, "conv_1", block, stride), "norm_1", block))
        z = norm(convolve(z, "conv_2", block), "norm_2", block)
        if stride == 2:
            y = norm(convolve(y, "shortcut_conv", block, 2, 0), "shortcut_norm", block)
        y = relu(y + z)
    head = params["head"]
    expected = y.mean((2, 3)).detach().numpy() @ np.asarray(head["kernel"]) + np.asarray(
        head["bias"]
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
