"""Comparison of runs, against SciPy and by hand."""

import itertools
import json
import re

import numpy as np
import pytest
import scipy.stats

from jaxnets.__main__ import main
from jaxnets.tools.comparison import Run, compare, read_run


def run(name, *values, unit="%", metric="digits, test accuracy"):
    return Run(name, metric, unit, values)


def test_pairs_are_tested_by_welch_and_corrected_by_holm():
    values = {"a": (0.90, 0.91, 0.92), "b": (0.93, 0.95, 0.96, 0.94), "c": (0.91, 0.93, 0.92)}
    found = compare([run(name, *each) for name, each in values.items()])
    plain = {
        first + second: scipy.stats.ttest_ind(values[first], values[second], equal_var=False).pvalue
        for first, second in ("ab", "ac", "bc")
    }
    factors = dict(zip(sorted(plain, key=plain.get), (3, 2, 1), strict=True))
    assert [d.first + d.second for d in found.differences] == ["ab", "ac", "bc"]
    for pair in found.differences:
        key = pair.first + pair.second
        assert pair.p_value == pytest.approx(factors[key] * plain[key])
        expected = np.mean(values[pair.second]) - np.mean(values[pair.first])
        assert pair.difference == pytest.approx(expected)
        assert pair.holds_up == (pair.p_value < 0.05)
    assert [pair.holds_up for pair in found.differences] == [True, False, False]


def test_corrected_p_values_are_monotonic_and_at_most_one():
    same = [
        run(name, 0.5, 0.5 + shift) for name, shift in zip("abc", (0.1, 0.11, 0.12), strict=True)
    ]
    plain = {
        first.name + second.name: scipy.stats.ttest_ind(
            first.values, second.values, equal_var=False
        ).pvalue
        for first, second in itertools.combinations(same, 2)
    }
    found = {pair.first + pair.second: pair.p_value for pair in compare(same).differences}
    assert max(found.values()) == 1.0
    ranked = [found[name] for name in sorted(plain, key=plain.get)]
    assert ranked == sorted(ranked)


def test_runs_without_variance_are_equal_or_different():
    found = compare([run("a", 0.9, 0.9), run("b", 0.9, 0.9), run("c", 0.8, 0.8)]).differences
    assert [pair.p_value for pair in found] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((0.9, 0.9, 0.9), (0.8, 0.9, 0.7)),
        ((0.1 + 0.2, 0.3, 0.3), (0.3, 0.3, 0.3)),
        ((0.5, 0.7), (0.6, 0.6)),
    ],
)
def test_seeds_with_identical_values_are_compared_without_a_warning(first, second):
    found = compare([run("a", *first), run("b", *second)]).differences[0]
    # Welch by hand: the run without variance contributes nothing to the standard error.
    errors = [np.var(values, ddof=1) / len(values) for values in (first, second)]
    t = (np.mean(second) - np.mean(first)) / np.sqrt(sum(errors))
    freedom = sum(errors) ** 2 / sum(e**2 / (len(first) - 1) for e in errors)
    assert found.p_value == pytest.approx(2 * scipy.stats.t.sf(abs(t), freedom))


def test_a_run_of_one_seed_is_listed_and_not_tested():
    found = compare([run("one", 0.9), run("three", 0.8, 0.81, 0.82)])
    assert found.differences == ()
    assert "one seed cannot be tested for significance: one; give --seeds 3" in str(found)


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([run("a", 0.9)], r"1 run\(s\) to compare; name two or more"),
        ([run("a", 0.9), run("a", 0.9)], "a run is named twice among a, a"),
        ([run("a", 0.9), run("b", 1.5, metric="text, loss")], "b has text, loss; compare like"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(runs, message):
    with pytest.raises(ValueError, match=message):
        compare(runs)


def write(folder, values, **fields):
    content = {"dataset": "digits", "metric": "test accuracy", "unit": "%", "values": values}
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps({**content, **fields}))
    return str(folder)


def test_the_command_shows_table_and_verdict(tmp_path, capsys):
    old = write(tmp_path / "old", [0.90, 0.91, 0.92], parameters=21482, train_seconds=8.2)
    new = write(tmp_path / "new", [0.95, 0.96, 0.97])
    assert main(["compare", old, new]) == 0
    head, first, second, blank, pair, note = capsys.readouterr().out.splitlines()
    assert head.split() == ["run", "digits,", "test", "accuracy", "seeds", "parameters", "training"]
    assert first.split() == [old, "91.00%", "+-", "2.48%", "3", "21,482", "8", "s"]
    assert second.split() == [new, "96.00%", "+-", "2.48%", "3"]
    assert blank == ""
    assert pair.startswith(f"{new} - {old}: +5.00%, p = 0.0036: holds up")
    assert "Holm's correction for 1 comparison(s)" in note
    assert main(["compare", "--json", old, new]) == 0
    assert json.loads(capsys.readouterr().out)["differences"][0]["holds_up"] is True


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (["0.9"], r'values\[0\] is "0.9", not a finite number or null'),
        ([True], r"values\[0\] is true"),
        ([10**400], r"values\[0\] is 10* \.\.\."),
        ({}, "values is {}, not a list"),
        ([], "it has no value"),
    ],
)
def test_values_that_are_no_numbers_are_refused_with_file_and_line(
    values, reason, tmp_path, capsys
):
    bad, good = write(tmp_path / "bad", values), write(tmp_path / "good", [0.9, 0.8])
    with pytest.raises(SystemExit) as stopped:
        main(["compare", good, bad])
    assert stopped.value.code == 2
    message = rf"error: .*bad/result\.json, line 1: not the result of a run: {reason}"
    assert re.match(message, capsys.readouterr().err)


def test_a_network_that_diverged_is_named_and_does_not_count(tmp_path, capsys):
    folders = [write(tmp_path / "a", [0.9, None, 0.8]), write(tmp_path / "b", [0.9, 0.8])]
    assert main(["compare", *folders]) == 0
    out = capsys.readouterr().out
    assert f"{folders[0]}: 1 of 3 networks diverged and do not count" in out
    assert "p = 1: may be chance" in out


def test_values_that_are_nearly_equal_are_compared_without_a_warning():
    found = compare([run("a", 0.9, 0.9, 0.9), run("b", 0.9, 0.9, 0.9 + 1e-16)]).differences
    assert found[0].p_value > 0.05


def test_folders_without_a_result_are_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["compare", str(tmp_path), "elsewhere"])
    assert stopped.value.code == 2
    assert "has no result.json (No such file or directory)" in capsys.readouterr().err
    (tmp_path / "result.json").write_text('{"metric": 1}')
    with pytest.raises(ValueError, match=r"json, line 1: not the result of a run: it has no 'dat"):
        read_run(tmp_path)
