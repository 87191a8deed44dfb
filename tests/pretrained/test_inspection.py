import json

import numpy as np
import pytest
from tensor_files import write_gguf, write_safetensors

from jaxnets.__main__ import main
from jaxnets.pretrained import inspect

TREE = {"wte.weight": np.ones((5, 4), np.float16), "bias": np.zeros(3, np.float32)}


@pytest.mark.parametrize(
    ("config", "architecture"),
    [
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "GPT2LMHeadModel"),
        ({"architectures": None, "model_type": "gpt2"}, "gpt2"),
        ({}, None),
    ],
)
def test_the_architecture_is_that_of_the_configuration(config, architecture, tmp_path):
    write_safetensors(tmp_path / "model.safetensors", TREE)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert inspect(tmp_path).architecture == architecture
    assert inspect(tmp_path / "model.safetensors").architecture is None


def test_the_architecture_of_a_gguf_file_is_that_of_its_metadata(tmp_path):
    write_gguf(tmp_path / "a.gguf", {"a": np.ones(3, np.float32)})
    assert inspect(tmp_path / "a.gguf").architecture == "llama"


def test_the_command_prints_names_shapes_types_and_sizes(tmp_path, capsys):
    write_safetensors(tmp_path / "model.safetensors", TREE)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert main(["inspect", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(lines[:3]) == [
        "bias        [3]     F32      12",
        "name        shape   type  bytes",
        "wte.weight  [5, 4]  F16      40",
    ]
    assert lines[4:] == ["2 tensors (1 F16, 1 F32), 23 elements, 52 bytes", "architecture: gpt2"]


def test_the_command_prints_json(tmp_path, capsys):
    write_safetensors(tmp_path / "model.safetensors", TREE)
    assert main(["inspect", "--json", str(tmp_path)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["num_parameters"], printed["bytes"], printed["architecture"]) == (23, 52, None)
    assert printed["tensors"]["bias"] == {
        "shape": [3],
        "dtype": "float32",
        "stored": "F32",
        "bytes": 12,
    }


@pytest.mark.parametrize("name", ["missing.npz", "a.txt", "damaged.gguf"])
def test_errors_of_the_command_are_one_line(name, tmp_path, capsys):
    (tmp_path / "a.txt").touch()
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF")
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", str(tmp_path / name)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("error: ") and name in error and error.count("\n") == 1
