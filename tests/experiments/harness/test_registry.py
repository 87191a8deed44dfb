"""Registered results: their tables in the pages, and the verdict on a rerun."""

import json
import re
import sys

import pytest

pytest.importorskip("tyro")

from experiments import reproduce
from experiments.harness import registry
from experiments.harness.run_folder import RunError


def entry(**fields):
    plain = {
        "name": "row",
        "data": "data",
        "network": "net",
        "command": "python -m experiments.digits",
        "value": 0.9,
        "decimals": 1,
        "goal": "max",
        "seeds": 3,
        "seconds": 1.0,
        "setting": registry.Setting("cores", "3.11", "0.10", "*"),
        "ci95": 0.01,
        "unit": "%",
    }
    return registry.Entry(**{**plain, **fields})


def test_both_pages_show_the_registered_results():
    entries = registry.load()
    for path, table, options in (
        (registry.RESULTS_PAGE, registry.full_table(entries), "--table"),
        (registry.README, registry.readme_table(entries), "--table --readme"),
    ):
        shown = registry.shown_table(path.read_text())
        assert shown == table, f"run `python -m experiments.reproduce {options}`"


def test_every_row_of_the_readme_links_to_its_row_of_the_full_table():
    page = registry.RESULTS_PAGE.read_text()
    short = registry.readme_table(registry.load())
    names = re.findall(r"\(docs/results\.md#(\w+)\)", short)
    assert len(names) == short.count("\n| [") == 10
    assert [name for name in names if page.count(f'<a id="{name}"></a>') != 1] == []


def test_a_row_shows_interval_remark_and_setting():
    rows = [entry(remark="greedy 1", reference="2 (paper)"), entry(name="other", readme="short")]
    full, short = registry.full_table(rows).splitlines(), registry.readme_table(rows).splitlines()
    assert full[2] == (
        '| <a id="row"></a>`row` | data | net | `python -m experiments.digits` '
        "| 90.0% +- 1.0% (greedy 1) | 3 | 1 s * | 2 (paper) |"
    )
    assert full[-1].endswith("Measured on: * cores, JAX 0.10, Python 3.11.")
    assert short[2:] == ["| [short](docs/results.md#other) | net | 90.0% +- 1.0% | 3 | 1 s |"]
    assert entry(ci95=0.0).show(0.9, 0.0) == "90.0% (all seeds)"
    assert entry(unit="", decimals=3).show(1.5, None) == "1.500"


@pytest.mark.parametrize(
    ("value", "ci95", "goal", "verdict"),
    [
        (0.885, 0.006, "max", "holds"),
        (0.88, 0.005, "max", "worse"),
        (0.88, 0.005, "min", "better"),
        (0.92, None, "max", "better"),
        (0.91, None, "max", "holds"),
    ],
)
def test_a_rerun_holds_within_both_intervals(value, ci95, goal, verdict):
    assert entry(goal=goal).judge({"value": value, "ci95": ci95}) == verdict


def test_one_seed_holds_within_the_tolerance_of_the_row():
    row = entry(ci95=None, value=38.84, unit="", decimals=2, tolerance=0.8)
    verdicts = [row.judge({"value": value, "ci95": None}) for value in (38.1, 38.0, 39.7)]
    assert verdicts == ["holds", "worse", "better"]


def test_a_table_is_written_between_the_markers_of_its_page(tmp_path, monkeypatch, capsys):
    for name, options, head in (
        ("RESULTS_PAGE", [], "| row | data |"),
        ("README", ["--readme"], "| data | network |"),
    ):
        path = tmp_path / name
        path.write_text("# Title\n\n<!-- results -->\nold\n<!-- end of results -->\nafter\n")
        monkeypatch.setattr(registry, name, path)
        assert reproduce.main(["--table", *options]) == 0
        page = path.read_text()
        assert page.startswith(f"# Title\n\n<!-- results -->\n{head}")
        assert page.endswith("\n<!-- end of results -->\nafter\n") and "old" not in page
    (tmp_path / "README").write_text("no markers")
    for arguments, error in (
        (["--table", "--readme"], "no table between <!-- results --> and <!-- end of results -->"),
        (["--table", "digits"], "--table writes all rows"),
    ):
        with pytest.raises(SystemExit):
            reproduce.main(arguments)
        assert error in capsys.readouterr().err


def test_a_known_command_has_its_results_whatever_its_folder():
    known = next(entry for entry in registry.load() if entry.reference)
    first, second = registry.notes(f"{known.command} --out elsewhere")
    assert first == f"the same command in docs/results.md: {known.show(known.value, known.ci95)}"
    assert second == f"published elsewhere: {known.reference}"
    assert registry.notes("python -m experiments.digits --seeds 77") == []


def test_a_registry_with_errors_names_the_row(tmp_path):
    path = tmp_path / "results.toml"
    settings = '[settings.here]\ncores = "c"\npython = "3"\njax = "0"\nmark = ""\n'
    path.write_text(settings + '[[result]]\nname = "odd"\nsetting = "here"\nspeed = 1\n')
    with pytest.raises(ValueError, match=r"result 'odd' of .*speed"):
        registry.load(path)
    path.write_text(settings + '[[result]]\nname = "odd"\nsetting = "there"\n')
    with pytest.raises(ValueError, match=r"result 'odd' of .*there"):
        registry.load(path)


def test_rows_are_run_and_read_again(tmp_path, monkeypatch, capsys):
    script = (
        "import json, pathlib, sys; out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1]); "
        "out.mkdir(parents=True, exist_ok=True); (out / 'result.json').write_text(json.dumps("
        "{'dataset': 'd', 'metric': 'm', 'unit': '%', 'values': [0.8], 'value': 0.8, 'ci95': None, "
        "'train_seconds': 2.0}))"
    )
    row = entry(command=f"python -c {json.dumps(script)}")
    monkeypatch.setattr(registry, "load", lambda: [row])
    assert reproduce.main(["row", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert printed == "row: worse; 80.0%, registered 90.0% +- 1.0%; 2 s, registered 1 s\n"


def test_unknown_rows_and_failing_commands_are_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        reproduce.main(["nonsense"])
    assert stopped.value.code == 2
    assert "unknown row 'nonsense'; choose from digits" in capsys.readouterr().err
    with pytest.raises(RunError, match=f"{sys.executable} -c .* ended with code 3"):
        reproduce.run("python -c 'raise SystemExit(3)'", tmp_path)
