"""Every reader of data gives the right value of a damaged file, or names the file."""

import random

import mutated_readers  # noqa: F401  enters its readers
import mutated_runs  # noqa: F401
import pytest
from mutations import READERS, campaign, mutate

SEED = 0
FILES = 4_348  # of each reader


@pytest.mark.parametrize("name", READERS)
def test_a_mutated_file_is_read_right_or_named(name, tmp_path):
    with READERS[name]() as reader:
        campaign(name, reader, count=20, seed=SEED, folder=tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", READERS)
def test_every_mutated_file_is_read_right_or_named(name, tmp_path):
    with READERS[name]() as reader:
        tally = campaign(name, reader, count=FILES, seed=SEED + 1, folder=tmp_path)
    print(f"{name}: {tally}")


def test_mutations_are_a_pure_function_of_the_seed_and_change_something():
    content = bytes(range(256)) * 8

    def mutated(seed):
        return [mutate(content, random.Random(f"{seed} {n}"), b"other") for n in range(200)]

    assert mutated(0) == mutated(0) != mutated(1)
    assert content not in mutated(0)
    assert len(set(mutated(0))) > 190
