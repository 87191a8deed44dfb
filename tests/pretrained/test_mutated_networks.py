"""Mutated folders of networks, adapters and programs are loaded, or an error names the file."""

import mutated_networks
import pytest
from mutations import campaign


@pytest.mark.parametrize("name", mutated_networks.NETWORKS)
def test_a_mutated_network_is_loaded_or_named(name, tmp_path):
    with mutated_networks.NETWORKS[name]() as reader:
        campaign(name, reader, count=20, seed=0, folder=tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", mutated_networks.NETWORKS)
def test_every_mutated_network_is_loaded_or_named(name, tmp_path):
    with mutated_networks.NETWORKS[name]() as reader:
        tally = campaign(name, reader, count=20_000, seed=1, folder=tmp_path)
    print(f"{name}: {tally}")
