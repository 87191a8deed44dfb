"""ONNX files against their networks, at inputs and sizes of which the export knew nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from export_networks import NETWORKS
from jax import lax

import jaxnets as jn
from jaxnets.export.onnx import arithmetic, serialize

onnxruntime = pytest.importorskip("onnxruntime")

DAILY = ("bidirectional_lstm", "vqvae", "llama_extend")


def load(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def run(path, *inputs):
    session = load(path)
    names = [each.name for each in session.get_inputs()]
    return session.run(None, dict(zip(names, map(np.asarray, inputs), strict=True)))


def exported(tmp_path, function, *inputs, **options):
    """Export a function without weights, and return what the file computes."""
    path = tmp_path / "f.onnx"
    jn.export_onnx(path, lambda variables, *x: function(*x), {}, *inputs, **options)
    return lambda *values: run(path, *values)


def resized(network, batch):
    """Repeat or cut the examples of the inputs."""
    rows = np.arange(batch) % 3
    return jax.tree.map(lambda x: np.asarray(x)[rows], network.inputs)


@pytest.mark.parametrize(
    "name",
    [
        name if name in DAILY else pytest.param(name, marks=pytest.mark.exhaustive)
        for name in NETWORKS
    ],
)
def test_a_file_computes_the_outputs_of_its_network_for_every_batch(name, tmp_path):
    network = NETWORKS[name]()
    path = tmp_path / "network.onnx"
    error = jn.export_onnx(
        *(path, network.function, network.variables, *network.inputs),
        shapes=network.shapes,
        constraints=network.constraints,
    )
    assert error < 1e-5
    onnx.checker.check_model(path, full_check=True)
    inputs = jax.tree.map(jnp.asarray, resized(network, 4))
    outputs = run(path, *jax.tree.leaves(inputs))
    expected = jax.jit(network.function)(network.variables, *inputs)
    expected = jax.tree.leaves(expected._asdict() if hasattr(expected, "_asdict") else expected)
    for one, other in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_names_versions_and_sizes_are_in_the_file(tmp_path):
    module, x = jn.MLP(features=(4,), num_outputs=2), jnp.ones((1, 3))
    variables = module.init(jax.random.key(0), x)
    jn.export_onnx(tmp_path / "mlp.onnx", module, variables, x)
    model = onnx.load(tmp_path / "mlp.onnx")
    weights = {one.name for one in model.graph.initializer if one.name.startswith("params/")}
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    assert weights == {jax.tree_util.keystr(k, simple=True, separator="/") for k, _ in leaves}
    session = load(tmp_path / "mlp.onnx")
    assert [(one.name, one.shape) for one in session.get_inputs()] == [("inputs", ["batch", 3])]
    assert [(one.name, one.shape) for one in session.get_outputs()] == [("output", ["batch", 2])]
    assert session.get_modelmeta().custom_metadata_map["jaxnets"] == jn.__version__
    assert model.opset_import[0].version == serialize.OPSET
    assert any("MLP/hidden_0" in node.name or "MLP/" in node.name for node in model.graph.node)


def test_large_weights_are_in_a_file_beside_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr(serialize, "_MAX_INSIDE", 1000)
    network = NETWORKS["lenet5"]()
    path = tmp_path / "lenet5.onnx"
    jn.export_onnx(path, network.module, network.variables, *network.inputs)
    assert path.stat().st_size < 50_000 < (tmp_path / "lenet5.onnx.data").stat().st_size
    expected = network.function(network.variables, *network.inputs)
    np.testing.assert_allclose(run(path, *network.inputs)[0], expected, rtol=1e-4, atol=1e-5)


X = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
SMALL = np.float32([[1e-7, -1e-7, 1e-4, 0], [-1e-4, 1e-12, 0.5, -0.5]])
INTEGERS = np.array([[5, -7, 0, 3], [2**31 - 1, -(2**31), 8, -1]], np.int32)


def unary(x):
    return [
        *(jnp.exp(x), jnp.log(jnp.abs(x)), jnp.tanh(x), jnp.sin(x), jnp.cos(x), jnp.tan(x)),
        *(jnp.arcsin(x), jnp.arccos(x), jnp.arctan(x), jnp.sinh(x), jnp.cosh(x), jnp.arcsinh(x)),
        *(jnp.sqrt(jnp.abs(x)), lax.rsqrt(jnp.abs(x)), jnp.cbrt(x), lax.erf(x), lax.erfc(x)),
        *(jnp.abs(x), jnp.sign(x), jnp.floor(x), jnp.ceil(x), jnp.round(x), lax.round(x)),
        *(x**2, x**3, lax.integer_pow(x, -2), jnp.exp2(x), jax.nn.sigmoid(x), -x),
        *(jnp.isfinite(x), jnp.isnan(x), jax.nn.gelu(x), jax.nn.relu(x), jax.nn.softmax(x)),
        *(jnp.clip(x, -0.5, 0.5), jnp.square(x), jax.nn.log_softmax(x), jax.nn.silu(x)),
        *(lax.reduce_precision(x, 8, 7), jnp.arctanh(x / 200)),
    ]


def binary(x, y):
    return [
        *(x + y, x - y, x * y, x / y, jnp.maximum(x, y), jnp.minimum(x, y), jnp.abs(x) ** y),
        *(x == y, x != y, x < y, x <= y, x > y, x >= y, jnp.where(x < y, x, y), lax.rem(x, y)),
        *(jnp.logical_and(x < 0, y < 0), (x < 0) | (y < 0), (x < 0) ^ (y < 0), ~(x < 0)),
        *(x % y, x // y, jnp.add(x[:, :1], y), x[:1] * y, jnp.stack([x, y], 1)),
    ]


def integers(x):
    y = x[:, ::-1]
    return [
        *(x + y, x - y, x * y, lax.div(x, y), lax.rem(x, y), x % 5, x // 5, x & y, x | y, x ^ y),
        *(~x, x << 3, x >> 3, lax.shift_right_logical(x, jnp.int32(3)), x << 40, x >> 40),
        *(jnp.maximum(x, y), -x, jnp.abs(x), jnp.sign(x), x**2, x.astype(jnp.uint8)),
        *(x.astype(jnp.int8) * 3, x.astype(jnp.uint32) * 7, x.astype(jnp.uint32) >> 9),
        *(x.astype(jnp.int8).sum(1), x.astype(jnp.uint16) - 9, x.astype(bool), x.sum(0), x.max(1)),
        lax.bitcast_convert_type(x & 0x7F7FFFFF, jnp.float32),
    ]


def conversions(x):
    return [
        *(x.astype(t) for t in (jnp.int8, jnp.uint8, jnp.int16, jnp.int32, jnp.uint32, bool)),
        *((x * 1e9).astype(jnp.int32), (x / 0).astype(jnp.int32), (x * jnp.nan).astype(jnp.int32)),
        *(x.astype(jnp.bfloat16).astype(jnp.float32), x.astype(jnp.float16)),
    ]


def reductions(x):
    return [
        *(x.sum(), x.sum(0), x.max(1), x.min(1), x.prod(1), x.mean((0, 1)), x.var(1)),
        *((x > 0).all(1), (x > 0).any(0), x.argmax(1), x.argmin(0), jnp.cumsum(x, 1)),
        *(lax.cumsum(x, 1, reverse=True), jax.nn.logsumexp(x, 1), lax.reduce_sum(x, ())),
        *(lax.cummax(x, 1), lax.cummin(x, 1), lax.cumprod(x, 1), lax.cumlogsumexp(x, 1)),
        *(*lax.top_k(x, 2), jnp.sort(x, 1), jnp.argsort(x, 1), jnp.sort(x > 0, 1)),
        *lax.sort((x > 0, x, x[:, ::-1]), num_keys=2),
    ]


@pytest.mark.parametrize("function", [unary, conversions, reductions], ids=lambda f: f.__name__)
def test_operations_on_one_array(function, tmp_path):
    compute = exported(tmp_path, function, X, shapes=None)
    for x in (X, X * 1e-3, X * 300, np.where(X > 1, np.inf, -np.inf).astype(np.float32)):
        compare(compute(x), function(jnp.asarray(x)))


def test_operations_on_two_arrays(tmp_path):
    compute = exported(tmp_path, binary, X, X[::-1], shapes=None)
    for x, y in ((X, X[::-1]), (X, X), (X * 1e-3, X * 100)):
        compare(compute(x, y), binary(jnp.asarray(x), jnp.asarray(y)))


def test_integers_wrap_around(tmp_path):
    compute = exported(tmp_path, integers, INTEGERS, shapes=None)
    for x in (INTEGERS, INTEGERS[::-1] + 11, -INTEGERS // 3):
        compare(compute(x), integers(jnp.asarray(x)))


def test_small_values_keep_their_digits(tmp_path):
    compute = exported(tmp_path, lambda x: [jnp.log1p(x), jnp.expm1(x)], SMALL, shapes=None)
    for got, want in zip(compute(SMALL), (np.log1p(SMALL), np.expm1(SMALL)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


def compare(actual, expected):
    for i, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert one.dtype == other.dtype, i
        if one.dtype.kind != "f":
            np.testing.assert_array_equal(one, other, err_msg=str(i))
            continue
        np.testing.assert_allclose(one, other, rtol=3e-5, atol=1e-6, err_msg=str(i))


def gathers(x, i):
    return [
        *(x[i[:, 0]], jnp.take(x, i, 1, mode="clip"), jnp.take(x, i, 0, mode="fill")),
        *(jnp.take_along_axis(x, i, 1, mode="clip"), x[:, i[0, 0]], x[i, i[:, ::-1]], x[..., -1]),
        *(
            lax.dynamic_slice(x, (i[0, 0], i[0, 1]), (2, 3)),
            lax.dynamic_slice_in_dim(x, i[0, 0], 2),
        ),
        *(lax.dynamic_index_in_dim(x, i[1, 0], 1), jax.vmap(lambda row, j: row[j])(x, i[:, :2])),
        *(
            jax.vmap(lambda row, j: lax.dynamic_slice(row, (j,), (2,)))(x, i[:, 0]),
            x.at[i, 0].get(),
        ),
        jnp.asarray(INTEGERS)[i, 1],
    ]


def scatters(x, i):
    y = x[:, ::-1]
    return [
        *(x.at[i[:, 0]].add(y), x.at[i[0, 0]].set(7), x.at[:, i[0, 1]].set(y[:, 0])),
        *(x.at[i, i[:, ::-1]].add(1), x.at[i[:, 0]].max(y), x.at[i[:, 0]].min(y), x.at[:].set(y)),
        *(
            x.at[i[:, 0]].multiply(y),
            x.at[1:3].set(0),
            x.at[-1].add(1),
            (x > 0).at[i[0, 0]].set(True),
        ),
        lax.dynamic_update_slice(x, y[:2, :3], (i[0, 0], i[0, 1])),
        lax.dynamic_update_slice_in_dim(x, y[:, :2], i[1, 0], 1),
        jax.vmap(lambda row, j, v: lax.dynamic_update_slice(row, v, (j,)))(x, i[:, 0], y[:, :2]),
        jax.vmap(lambda row, j, v: row.at[j].set(v))(x, i[:, 0], y[:, 0]),
    ]


@pytest.mark.parametrize("function", [gathers, scatters], ids=lambda f: f.__name__)
@pytest.mark.parametrize("shapes", [None, "n, ..."], ids=str)
def test_indices_out_of_bounds_are_clamped_filled_or_dropped(function, shapes, tmp_path):
    indices = np.array([[0, 1, 3, 2], [2, 0, 1, 1], [1, 2, 0, 0]], np.int32)
    compute = exported(
        tmp_path, function, X, indices, shapes=shapes, constraints=["n >= 3"] if shapes else ()
    )
    for i in (indices, indices - 5, indices + 3, np.full_like(indices, 2**31 - 1), -indices):
        compare(compute(X, i), function(jnp.asarray(X), jnp.asarray(i)))


IMAGE = np.random.default_rng(0).normal(size=(2, 9, 8, 4)).astype(np.float32)
KERNEL = np.random.default_rng(1).normal(size=(3, 2, 4, 6)).astype(np.float32)


def convolutions(x):
    def convolve(kernel, *, strides=(1, 1), padding="SAME", **options):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, kernel, strides, padding, dimension_numbers=numbers, **options
        )

    grouped, depthwise = KERNEL[:, :, :2], KERNEL[:, :, :1, :4]
    return [
        *(convolve(KERNEL), convolve(KERNEL, strides=(2, 3)), convolve(KERNEL, padding="VALID")),
        *(convolve(KERNEL, padding=((2, -1), (0, 3))), convolve(KERNEL, rhs_dilation=(2, 2))),
        convolve(grouped, feature_group_count=2),
        convolve(depthwise, feature_group_count=4),
        convolve(KERNEL, padding=((1, 2), (0, 1)), lhs_dilation=(2, 2)),
        convolve(KERNEL, padding=((4, 3), (5, 0)), lhs_dilation=(3, 2), rhs_dilation=(1, 2)),
        convolve(grouped, padding=((1, 1), (1, 0)), lhs_dilation=(2, 1), feature_group_count=2),
        convolve(KERNEL, strides=(2, 1), padding=((1, 2), (0, 1)), lhs_dilation=(3, 2)),
        lax.conv_transpose(x, KERNEL, (2, 2), "SAME"),
    ]


def windows(x):
    pool = lambda start, f, **options: lax.reduce_window(x, start, f, **options)  # noqa: E731
    square = {"window_dimensions": (1, 2, 3, 1), "window_strides": (1, 2, 1, 1)}
    return [
        *(pool(-jnp.inf, lax.max, padding="SAME", **square),),
        *(
            pool(0.0, lax.add, padding="VALID", **square),
            pool(jnp.inf, lax.min, padding="SAME", **square),
        ),
        pool(0.0, lax.add, padding="SAME", window_dilation=(1, 2, 1, 1), **square),
        *(jnp.pad(x, ((0, 0), (1, 2), (0, 0), (3, 0)), constant_values=2), jnp.pad(x > 0, 1)),
        *(lax.pad(x, 1.0, ((0, 0, 0), (-1, 2, 3), (0, -2, 0), (1, 1, 1))), x[:, ::-1, :, ::2]),
        *(x[:, 1:4:2], jnp.repeat(x, 2, axis=1), jnp.roll(x, 1, 2), jnp.flip(x, (1, 2))),
        *(*jnp.split(x, 2, 3), x.transpose(2, 0, 3, 1), x.reshape(x.shape[0], -1)),
        *(jnp.einsum("bhwc,bvwc->bhv", x, x), jnp.einsum("bhwc,hwc->b", x, x[0])),
        *(
            jnp.einsum("bhwc,bhwc->wc", x, x),
            jnp.tensordot(x, x[0], ((1, 2), (0, 1))),
            x[..., 0] @ x[0, 0],
        ),
    ]


@pytest.mark.parametrize("function", [convolutions, windows], ids=lambda f: f.__name__)
@pytest.mark.parametrize("shapes", [None, "batch, ..."], ids=str)
def test_convolutions_windows_and_products(function, shapes, tmp_path):
    compute = exported(tmp_path, function, IMAGE, shapes=shapes)
    compare_loosely(compute(IMAGE), function(jnp.asarray(IMAGE)))


def compare_loosely(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)


def loops(x, n):
    def step(carry, row):
        return (carry[0] + row, carry[1] * 2), carry[0] * row

    first, last = jnp.zeros(x.shape[1:]), jnp.float32(1)
    total, rows = lax.scan(step, (first, last), x)
    _, backwards = lax.scan(step, (first, last), x, reverse=True)
    counted, _ = lax.scan(lambda c, _: (c + x[0], None), first, None, length=3)
    doubled = lax.while_loop(lambda c: c[0] < n[0], lambda c: (c[0] + 1, c[1] * 2), (0, x))
    chosen = lax.switch(n[0], [lambda x: x, lambda x: x * 2, lambda x: -x], x)
    taken = lax.cond(n[0] > 1, lambda x: x + 1, lambda x: jnp.zeros_like(x), x)
    summed = lax.fori_loop(0, n[0], lambda i, c: c + x[i % 3], jnp.zeros(x.shape[1:]))
    nested = jax.vmap(lambda row: lax.scan(lambda c, v: (c * 0.5 + v, c), 0.0, row)[1])(x)
    return [*total, rows, backwards, counted, *doubled, chosen, taken, summed, nested]


def test_loops_and_branches(tmp_path):
    compute = exported(tmp_path, loops, X, np.array([2], np.int32), shapes=None)
    for n in (0, 1, 2, 5):
        compare(compute(X, np.array([n], np.int32)), loops(jnp.asarray(X), jnp.array([n])))


def test_axes_that_were_not_broadcast_yet_meet_axes_of_size_1(tmp_path):
    def function(x):
        rows = jnp.zeros(x.shape[0]) + 1  # [batch], the same everywhere
        steps = lax.add(rows[:, None], jnp.arange(4.0)[None])  # [batch, 4]
        return jnp.concatenate([steps, x], 1)

    (got,) = exported(tmp_path, function, X)(X[:2])
    np.testing.assert_allclose(got, function(X[:2]))


def test_the_half_types_are_computed_in_float32(tmp_path):
    def function(x):
        half = x.astype(jnp.bfloat16)
        return half @ half.T, (x.astype(jnp.float16) * 3).astype(jnp.float32)

    compute = exported(tmp_path, function, X, tolerance=0.03)
    product, tripled = compute(X)
    assert product.dtype == np.float32
    np.testing.assert_allclose(product, X @ X.T, rtol=0.03, atol=0.05)
    np.testing.assert_allclose(tripled, 3 * X, rtol=1e-3)


def test_an_unknown_operation_is_named_with_its_place(tmp_path):
    def function(variables, x):
        with jax.named_scope("spectrum"):
            return jnp.abs(jnp.fft.rfft(x))

    with pytest.raises(ValueError, match=r"^fft in spectrum has no ONNX form: .* not known"):
        jn.export_onnx(tmp_path / "f.onnx", function, {}, X)
    assert list(tmp_path.iterdir()) == []


def test_a_difference_names_the_first_operation_that_differs(tmp_path, monkeypatch):
    monkeypatch.setitem(arithmetic.RULES, "tanh", lambda g, eqn, x: g.add("Erf", x))

    def function(variables, x):
        with jax.named_scope("gate"):
            y = jnp.tanh(x)
        return jnp.exp(y).sum(1)

    with pytest.raises(
        ValueError, match=r"differs .*batch=3.*first .* differs is tanh in gate, by"
    ):
        jn.export_onnx(tmp_path / "f.onnx", function, {}, X)
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_is_refused(tmp_path):
    path = tmp_path / "f.onnx"
    with pytest.raises(ValueError, match=r"does not trace with the symbolic sizes"):
        jn.export_onnx(path, lambda variables, x: x if x.shape[0] > 4 else -x, {}, X)
    with pytest.raises(ValueError, match=r"network refuses .*batch=1.*constraints"):
        jn.export_onnx(path, lambda variables, x: x.reshape(6, 2), {}, X)
    with pytest.raises(ValueError, match=r"\['time'\] cannot be read from the inputs"):
        jn.export_onnx(
            path, lambda variables, x: x, {}, np.ones((2, 6)), shapes="batch, batch*time"
        )
    with pytest.raises(ValueError, match=r"'x' names 2 of weights, inputs and outputs"):
        jn.export_onnx(path, lambda variables, x: x + variables["x"], {"x": X[0, 0]}, X)
    with pytest.raises(ValueError, match=r"complex64 have no place in an ONNX graph"):
        jn.export_onnx(path, lambda variables, x: x.real, {}, X + 0j)
