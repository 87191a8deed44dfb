"""`python -m jaxnets convert`: a network in another layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnets as jn
from jaxnets.__main__ import main
from jaxnets.pretrained import PretrainedNetwork


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    module = jn.transformer.gpt2_small(num_layers=1, features=8, num_heads=2)
    variables = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    folder = tmp_path_factory.mktemp("gpt2") / "torch"
    jn.pretrained.save(folder, PretrainedNetwork(module, variables), layout="torch")
    return folder


def test_there_and_back_changes_no_array(folder, tmp_path, capsys):
    own, back = tmp_path / "own", tmp_path / "back"
    assert main(["convert", str(folder), str(own)]) == 0
    assert main(["convert", str(own), str(back), "--layout", "torch"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    original = jn.pretrained.read_tensors(folder)
    count = sum(np.prod(spec.shape) for spec in original.specs.values())
    assert first.startswith(f"wrote {own}: TransformerLM, {count:,} parameters, ")
    assert first.endswith(" bytes, layout jaxnets") and second.endswith(", layout torch")
    tensors = jn.pretrained.read_tensors(back)
    assert tensors.keys() == original.keys() != jn.pretrained.read_tensors(own).keys()
    for name in tensors:
        np.testing.assert_array_equal(tensors[name], original[name])


def test_errors_are_one_line(folder, tmp_path, capsys):
    module = jn.MLP(features=(2,), num_outputs=2)
    variables = module.init(jax.random.key(0), jnp.zeros((1, 3)))
    jn.pretrained.save(tmp_path / "mlp", PretrainedNetwork(module, variables))
    cases = {
        ("missing", "new"): "missing does not exist",
        (str(folder), str(folder)): "exists; give another folder",
        (str(tmp_path / "mlp"), str(tmp_path / "new"), "--layout", "torch"): "jaxnets",
    }
    for arguments, message in cases.items():
        with pytest.raises(SystemExit) as stopped:
            main(["convert", *arguments])
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
        assert message in error
    assert not (tmp_path / "new").exists()
