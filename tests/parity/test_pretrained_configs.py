"""Other names of entries of config.json: what transformers does. Run with `-m parity`."""

import json

import pytest

from jaxnets.pretrained.architectures import ARCHITECTURES

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.parity


@pytest.mark.parametrize("kind", [kind for kind in ARCHITECTURES if kind != "torchvision"])
def test_the_other_names_of_entries_are_those_of_transformers(kind):
    theirs = type(transformers.AutoConfig.for_model(kind)).attribute_map
    assert dict(ARCHITECTURES[kind].aliases) == theirs


def test_transformers_takes_another_name_for_the_entry_and_does_not_write_it(tmp_path):
    for entries, expected in (
        ({"num_hidden_layers": 3}, 3),
        ({"num_hidden_layers": 3, "n_layer": 5}, 3),  # which is refused here
        ({"n_layer": 5, "num_hidden_layers": 3}, 3),
    ):
        content = {"model_type": "gpt2", **entries}
        (tmp_path / "config.json").write_text(json.dumps(content))
        config = transformers.AutoConfig.from_pretrained(tmp_path)
        assert config.n_layer == expected
    config.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["n_layer"] == 3 and "num_hidden_layers" not in content
