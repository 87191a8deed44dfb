"""Files of `torch.save` against the tensors that were saved."""

import itertools

import numpy as np
import pytest

from jaxnets.pretrained import read_tensors

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

DTYPES = (
    *("float32", "float64", "float16", "bfloat16", "uint8", "uint16", "uint32", "uint64"),
    *("int8", "int16", "int32", "int64", "bool", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
)


def random_tensor(rng):
    """Return a tensor of random type, bits, shape and strides."""
    name = DTYPES[rng.integers(len(DTYPES))]
    dtype = getattr(torch, name)
    size = torch.empty(0, dtype=dtype).element_size()
    shape = tuple(int(one) for one in rng.integers(0, 5, rng.integers(0, 5)))
    count = int(np.prod(shape)) + int(rng.integers(1, 9))
    most = 2 if name == "bool" else 256
    raw = torch.from_numpy(rng.integers(0, most, count * size, dtype=np.uint8))
    whole = raw.view(dtype)
    offset = count - int(np.prod(shape))
    tensor = whole[offset:].reshape(shape)
    if rng.random() < 0.5:
        tensor = tensor.permute(rng.permutation(len(shape)).tolist())
    if rng.random() < 0.3 and tensor.ndim:
        axis = int(rng.integers(tensor.ndim))
        tensor = tensor.narrow(axis, 0, tensor.shape[axis] // 2)
    if rng.random() < 0.2:
        tensor = tensor.unsqueeze(0).expand(3, *tensor.shape)
    if name.startswith("complex") and rng.random() < 0.5:
        tensor = tensor.conj()
    if name == "float32" and rng.random() < 0.5:
        tensor = torch._neg_view(tensor)
    if tensor.is_floating_point() and size > 1 and rng.random() < 0.3:
        return torch.nn.Parameter(tensor)
    return tensor


def random_tree(rng, depth=2):
    if depth == 0 or rng.random() < 0.5:
        return random_tensor(rng)
    members = [random_tree(rng, depth - 1) for _ in range(rng.integers(1, 5))]
    kind = rng.integers(3)
    return {f"m{i}": one for i, one in enumerate(members)} if kind else members


def leaves(name, value):
    if isinstance(value, torch.Tensor):
        yield name, value
        return
    for key, one in value.items() if isinstance(value, dict) else enumerate(value):
        yield from leaves(f"{name}.{key}", one)


def bits(tensor):
    tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return bytes(tensor.reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""


@pytest.mark.parametrize(
    ("legacy", "protocol", "seed"), list(itertools.product([False, True], [2, 4], range(10)))
)
def test_random_trees_have_the_bits_that_torch_saved(legacy, protocol, seed, tmp_path):
    rng = np.random.default_rng(seed)
    tree = {f"root{i}": random_tree(rng) for i in range(6)}
    torch.save(
        tree,
        tmp_path / "a.pt",
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=not legacy,
    )
    expected = {name: tensor for key, one in tree.items() for name, tensor in leaves(key, one)}
    actual = read_tensors(tmp_path / "a.pt")
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        array = actual[name]
        assert array.shape == tuple(tensor.shape), name
        assert f"torch.{array.dtype.name}" == str(tensor.dtype), name
        assert array.tobytes() == bits(tensor), name


def test_files_without_checksums_and_of_an_optimizer_are_read(tmp_path):
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    torch.serialization.set_crc32_options(False)
    try:
        content = {"model": network.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(content, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    tensors = read_tensors(tmp_path / "a.pt")
    state = optimizer.state_dict()["state"]
    np.testing.assert_array_equal(
        tensors["optimizer.state.0.exp_avg"], state[0]["exp_avg"].numpy(), strict=True
    )
    np.testing.assert_array_equal(tensors["model.0.weight"], network[0].weight.detach().numpy())
    assert tensors["model.1.num_batches_tracked"] == 1
    assert tensors.metadata["optimizer.param_groups.0.lr"] == 0.001
