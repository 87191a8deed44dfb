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


def test_another_class_is_written_by_its_name(folder, tmp_path, capsys):
    target = tmp_path / "new"
    options = ["--architecture", "GPT2Model", "--layout", "torch"]
    assert main(["convert", str(folder), str(target), *options]) == 0
    assert capsys.readouterr().out.startswith(f"wrote {target}: TransformerLM")


def test_sizes_of_folders_inside_count(tmp_path, capsys):
    module = jn.transformer.SentenceEncoder(
        9, 1, jn.BlockConfig(8, 2, norm_first=False, key_bias=True, norm_epsilon=1e-12), 4,
        num_segments=2, embedding_norm=True,
    )  # fmt: skip
    variables = module.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    jn.pretrained.save(tmp_path / "own", PretrainedNetwork(module, variables))
    target = tmp_path / "new"
    assert main(["convert", str(tmp_path / "own"), str(target), "--layout", "torch"]) == 0
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    assert f" {size:,} bytes" in capsys.readouterr().out


def test_errors_are_one_line(folder, tmp_path, capsys):
    module = jn.MLP(features=(2,), num_outputs=2)
    variables = module.init(jax.random.key(0), jnp.zeros((1, 3)))
    jn.pretrained.save(tmp_path / "mlp", PretrainedNetwork(module, variables))
    cases = {
        ("missing", "new"): "missing does not exist",
        (str(folder), str(folder)): "exists; give another folder",
        (str(tmp_path / "mlp"), str(tmp_path / "new"), "--layout", "torch"): "jaxnets",
        (str(folder), str(tmp_path / "new"), "--architecture", "GPT2Tokenizer"): "GPT2LMHeadModel",
        (str(folder / "model.safetensors"), str(tmp_path / "new")): "architecture= resnet18, ",
    }
    for arguments, message in cases.items():
        with pytest.raises(SystemExit) as stopped:
            main(["convert", *arguments])
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
        assert message in error
    assert not (tmp_path / "new").exists()
