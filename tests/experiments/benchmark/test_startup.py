"""Times of the import and of the first step, with small networks."""

import pytest

from experiments.benchmark import startup
from experiments.benchmark.competitors import COMPETITORS
from experiments.benchmark.workloads import STARTS

TINY = startup.Config(rounds=1, tiny=True)


def test_every_network_and_side_is_known():
    for network, side in startup.FIRST_STEPS.values():
        assert COMPETITORS[side].takes_part(STARTS[network])


@pytest.mark.parametrize(
    "title", [pytest.param(title, marks=pytest.mark.slow) for title in startup.FIRST_STEPS]
)
def test_a_second_process_finds_all_programs_in_the_cache(title, tmp_path):
    network, side = startup.FIRST_STEPS[title]
    first = startup.first_step(network, side, TINY, tmp_path)
    cached = sorted((tmp_path / "cache").glob("*-cache"))
    assert len(cached) > 1
    second = startup.first_step(network, side, TINY, tmp_path)
    assert sorted((tmp_path / "cache").glob("*-cache")) == cached
    for each in (first, second):
        assert each["total"] == each["prepare"] + each["first"]
        assert min(each.values()) > 0


@pytest.mark.slow
def test_imports_are_timed():
    assert set(startup.import_times(TINY)) == set(startup.IMPORTS)


def test_no_rounds_are_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["startup", "--rounds", "0"])
    with pytest.raises(SystemExit, match="2"):
        startup.main()
    assert "rounds is 0" in capsys.readouterr().err
