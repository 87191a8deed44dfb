"""The folder of a run: it knows its run, and refuses every other one."""

import dataclasses
import json

import numpy as np
import pytest

pytest.importorskip("tyro")

from experiments.harness import run_folder
from experiments.harness.identity import code_version, content_sha256
from experiments.harness.options import Options
from experiments.harness.run_folder import RunError, RunFolder
from jaxnets.data.datasets.text import TextDataset
from jaxnets.tools.results import Result, write_result

OPTIONS = Options()


def visit(path, *, options=OPTIONS, experiment="mnist", data="d1", resume=False, other_code=False):
    folder = RunFolder(path)
    with folder.locked():
        folder.check(experiment, options, resume=resume, other_code=other_code)
        return folder.open(experiment, options, data=data, kind=Result)


def begin(path):
    """Leave a run with a checkpoint."""
    assert visit(path) is None
    (path / "checkpoints" / "step_00000001").mkdir(parents=True)


def finish(path):
    begin(path)
    write_result(path, dataset="d", metric="m", values=[0.9], experiment="mnist")


def edit(path, name, **changes):
    content = json.loads((path / name).read_text())
    del content["sha256"]
    (path / name).write_text(json.dumps({**content, **changes}, indent=2))


def test_the_same_run_goes_on_and_has_its_result(tmp_path):
    begin(tmp_path)
    with pytest.raises(RunError, match="unfinished run; continue it with --resume"):
        visit(tmp_path)
    assert visit(tmp_path, resume=True, options=Options(resume=True)) is None
    write_result(tmp_path, dataset="d", metric="m", values=[0.9], experiment="mnist")
    assert visit(tmp_path)["values"] == [0.9]


@pytest.mark.parametrize("start", [begin, finish])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experiment": "fashion_mnist"}, "experiment = 'mnist', not 'fashion_mnist'"),
        ({"data": "d2"}, r"data \(sha256\) = 'd1', not 'd2'"),
        ({"data": None}, r"data \(sha256\) = 'd1', not None"),
        ({"options": Options(batch_size=7)}, "batch_size = 128, not 7"),
        ({"options": Options(clip=1.0)}, r"clip = 0\.0, not 1\.0"),
    ],
)
def test_another_run_is_refused(start, changes, message, tmp_path):
    start(tmp_path)
    with pytest.raises(RunError, match=f"contains a run with {message}; choose another folder"):
        visit(tmp_path, resume=True, **changes)


@pytest.mark.parametrize("start", [begin, finish])
@pytest.mark.parametrize("name", ["sources", "jax"])
def test_other_code_is_refused_unless_it_is_accepted(start, name, tmp_path, monkeypatch):
    start(tmp_path)
    before = dict(code_version())
    now = {**before, name: "later"}
    monkeypatch.setattr(run_folder, "code_version", lambda: now)
    with pytest.raises(RunError, match=rf"other code \({name} = .*, now later\).* --other-code"):
        visit(tmp_path, resume=True)
    found = visit(tmp_path, resume=True, other_code=True)
    config = RunFolder(tmp_path).config()
    if start is begin:  # goes on, and says with what
        assert found is None and config["code"] == [before, now]
        assert visit(tmp_path, resume=True) is None
    else:
        assert found["values"] == [0.9] and config["code"] == [before]


def test_a_run_that_has_trained_nothing_begins_anew_with_other_code(tmp_path, monkeypatch):
    visit(tmp_path)
    now = {**code_version(), "sources": "later"}
    monkeypatch.setattr(run_folder, "code_version", lambda: now)
    assert visit(tmp_path, data="d2") is None
    assert RunFolder(tmp_path).config()["code"] == [now]
    assert RunFolder(tmp_path).config()["data"] == "d2"


@pytest.mark.parametrize("start", [begin, finish])
def test_a_folder_without_its_configuration_is_refused(start, tmp_path):
    start(tmp_path)
    (tmp_path / "config.json").unlink()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RunError, match=r"checkpoints, but no config\.json"):
        visit(tmp_path, resume=True, options=Options(batch_size=7))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("config.json", {"options": {"batch_size": 7}}, None),
        ("config.json", {"code": []}, "it has no version of the code"),
        ("config.json", {"code": [1]}, r"code\[0\] is 1, not an object"),
        ("config.json", {"options": None}, "options is null"),
        ("result.json", {"values": "0.9"}, r'values is "0\.9", not a list'),
        ("result.json", {"experiment": "other"}, "experiment is 'other', not 'mnist'"),
    ],
)
def test_an_edited_file_is_refused_with_its_line(name, changes, message, tmp_path):
    finish(tmp_path)
    content = json.loads((tmp_path / name).read_text())
    (tmp_path / name).write_text(json.dumps({**content, **changes}))
    with pytest.raises(ValueError, match=rf"{name}, line 1: not .* a run: .*--"):
        visit(tmp_path)
    if message:  # without the digest too
        edit(tmp_path, name, **changes)
        with pytest.raises(ValueError, match=rf"{name}, line \d+: not .* a run: {message}"):
            visit(tmp_path)


def test_a_folder_of_an_earlier_version_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"batch_size": 128}))
    with pytest.raises(ValueError, match="it has no 'experiment'; remove the folder, or choose"):
        visit(tmp_path)


def test_the_digest_of_data_depends_on_every_name_type_shape_and_value():
    different = [
        *(None, True, 1, 1.0, "1", b"1", [], {}, [[]], [1], ["1"], {"1": None}, {"a": 1}),
        *(np.arange(4), np.arange(4.0), np.arange(4).reshape(2, 2), np.arange(4)[::-1]),
        *([np.arange(2), np.arange(2, 4)], [np.arange(2)], ["ab", "c"], ["a", "bc"], ["abc"]),
        *(TextDataset("t", "a", "b"), TextDataset("t", "ab", ""), np.float32(1), np.float64(1)),
    ]
    digests = [content_sha256(content) for content in different]
    assert len(set(digests)) == len(digests)
    assert content_sha256(np.arange(8)[::2]) == content_sha256(np.arange(0, 8, 2))
    assert content_sha256({"a": 1, "b": 2}) == content_sha256({"b": 2, "a": 1})
    for content in (object(), np.array([None]), {1, 2}):
        with pytest.raises(TypeError, match="has no digest"):
            content_sha256(content)


def test_every_option_that_is_not_compared_exists():
    from experiments.driving import Config as DrivingConfig

    names = {field.name for field in dataclasses.fields(DrivingConfig)}
    assert set(run_folder.NOT_PART_OF_THE_RUN) <= names
