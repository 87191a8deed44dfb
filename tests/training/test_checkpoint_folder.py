"""Folders of checkpoints that a person renamed or changed are refused, and nothing is removed."""

import re
import shutil

import jax
import jax.numpy as jnp
import pytest
from checkpoint_problem import make_state, source, train_step

from jaxnets.training.checkpoint import (
    CheckpointError,
    all_steps,
    best_steps,
    latest_step,
    prune,
    restore,
    save,
    verify_names,
)
from jaxnets.training.checkpoint_folder import load_manifest, write_manifest
from jaxnets.training.hooks import Checkpointing, resume
from jaxnets.training.loop import fit


@pytest.fixture
def folder(tmp_path):
    for step in (10, 20):
        save(tmp_path, {"step": jnp.int32(step), "w": jnp.ones(2)}, step=step)
    return tmp_path


def assert_refused(folder, message):
    """Whoever reads or writes the folder is told, and all files stay."""
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    state = {"step": jnp.int32(0), "w": jnp.ones(2)}
    hooks = [Checkpointing(folder, every=1)]
    for use in (
        lambda: resume(folder, state),
        lambda: restore(folder, state),
        lambda: fit(train_step, make_state(), source, num_steps=1, hooks=hooks),
        lambda: verify_names(folder),
    ):
        with pytest.raises(CheckpointError, match=message):
            use()
    assert files == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("step", [10, 20])
@pytest.mark.parametrize("name", ["step_00000030", "step_00000005"])
def test_a_folder_renamed_to_another_step_is_refused(folder, step, name):
    (folder / f"step_{step:08d}").rename(folder / name)
    assert_refused(folder, rf"{name} was renamed: it holds step {step}; name it step_000000{step} ")


def test_a_copy_under_another_step_and_a_shortened_name_are_refused(folder):
    shutil.copytree(folder / "step_00000020", folder / "step_00000040")
    assert_refused(folder, "step_00000040 was renamed: it holds step 20")
    shutil.rmtree(folder / "step_00000040")
    (folder / "step_00000020").rename(folder / "step_20")
    assert_refused(folder, "step_20 was renamed; give it its name back")


@pytest.mark.parametrize("step", [10, 20])
def test_arrays_without_their_manifest_are_refused_by_all_that_would_remove_them(folder, step):
    (folder / f"step_{step:08d}" / "manifest.json").unlink()
    message = rf"step_000000{step} has arrays but no manifest.json; put it back, or move the folder"
    assert_refused(folder, message)
    for use in (
        lambda: save(folder, {"w": jnp.ones(2)}, step=30),
        lambda: prune(folder, keep=1),
        lambda: latest_step(folder),
    ):
        with pytest.raises(CheckpointError, match=message):
            use()
    assert (folder / f"step_{step:08d}" / "state_0").is_dir()


def test_a_removal_that_was_killed_leaves_what_the_next_save_removes(folder, monkeypatch):
    def kill(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", kill)
        prune(folder, keep=1)
    assert (folder / "step_00000010").is_dir() and all_steps(folder) == [20]
    save(folder, {"w": jnp.ones(2)}, step=30)
    assert not (folder / "step_00000010").exists() and all_steps(folder) == [20, 30]


def test_other_names_are_left_alone(folder):
    (folder / "step_00000020_backup").mkdir()
    (folder / "step_00000020_backup" / "state_0").mkdir()
    (folder / "notes.txt").write_text("mine")
    save(folder, {"w": jnp.ones(2)}, step=30)
    assert all_steps(folder) == [10, 20, 30]
    assert (folder / "step_00000020_backup" / "state_0").is_dir()


def test_a_checkpoint_of_a_later_version_is_refused_and_not_taken_for_damaged(folder):
    newest = folder / "step_00000020"
    write_manifest(newest, {**load_manifest(newest), "format": 3})
    with pytest.raises(ValueError, match=re.escape(f"{newest} has format 3, and this version of")):
        restore(folder, {"step": jnp.int32(0), "w": jnp.ones(2)})


STATE = {"step": jnp.int32(0), "w": jnp.ones(2)}
ROWS = {"file": "history_0.jsonl", "rows": 1, "bytes": 9, "sha256": "", "last": ""}
SUMMARY = {"sums": {}, "step": 20}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": None}, "format is null, not an integer"),
        ({"step": "20"}, 'step is "20", not an integer'),
        ({"payload": "../step_00000010/state_0"}, "payload is '../step"),
        ({"files": {"../../secret": "0"}}, "'../../secret' is outside of the folder"),
        ({"files": {"/etc/passwd": "0"}}, "'/etc/passwd' is outside of the folder"),
        ({"files": ["state_0"]}, "files is .*, not an object"),
        ({"leaves": [{"path": "w", "dtype": "float32"}]}, "leaves: it has no 'shape'|'shape'"),
        ({"leaves": [{"path": "w", "dtype": "key<fry>", "shape": []}]}, "kind of key does not fit"),
        ({"history": SUMMARY}, "only one of history and rows"),
        ({"history": SUMMARY, "rows": [{**ROWS, "file": "../notes"}]}, "'../notes' is no file of"),
        ({"history": {**SUMMARY, "sums": {"loss": [1.0]}}, "rows": []}, "loss has 1 sums"),
    ],
)
def test_a_manifest_that_cannot_be_is_damaged_though_its_digest_fits(folder, changes, message):
    newest = folder / "step_00000020"
    write_manifest(newest, {**load_manifest(newest), **changes})
    with pytest.raises(CheckpointError, match=rf"{newest}/manifest.json, line 2: .*({message})"):
        restore(folder, STATE, step=20)
    with pytest.warns(UserWarning, match="trying the previous checkpoint"):
        assert int(restore(folder, STATE)[0]["step"]) == 10


def test_arrays_that_are_not_those_of_the_manifest_are_refused(tmp_path):
    key = jax.random.key(0)
    for name, state in (("one", {"w": jnp.ones(2), "key": key}), ("two", {"w": jnp.ones(3)})):
        save(tmp_path / name, state, step=20)
    one, two = (tmp_path / name / "step_00000020" for name in ("one", "two"))
    manifest = load_manifest(one)
    leaves = [{**leaf, "key": "rbg"} if "key" in leaf else leaf for leaf in manifest["leaves"]]
    write_manifest(one, {**manifest, "leaves": leaves})
    with pytest.raises(CheckpointError, match=rf"key in {one} has no random keys of key<fry>"):
        restore(tmp_path / "one", {"w": jnp.ones(2), "key": key})
    shutil.rmtree(one / "state_0")
    shutil.copytree(two / "state_0", one / "state_0")
    write_manifest(one, {**manifest, "files": load_manifest(two)["files"]})
    with pytest.raises(CheckpointError, match=rf"w is an array of \[3\] in {one}, not of \[2\]"):
        restore(tmp_path / "one", {"w": jnp.ones(2)})
    with pytest.raises(CheckpointError, match=f"key is not in the files of {one}"):
        restore(tmp_path / "one", {"key": key})
    shutil.rmtree(one / "state_0" / "d")
    files = {
        name: digest for name, digest in load_manifest(two)["files"].items() if "/d/" not in name
    }
    write_manifest(one, {**manifest, "files": files})
    with pytest.raises(CheckpointError, match=rf"cannot read the arrays in {one}/state_0"):
        restore(tmp_path / "one", {"w": jnp.ones(2)})


@pytest.mark.parametrize("history", ["told by hand", {"rows": 3}, {"rows": [1], "sums": {}}])
def test_metadata_that_are_called_history_are_none(tmp_path, history):
    state = {"step": jnp.int32(1), "w": jnp.ones(2)}
    save(tmp_path, state, metadata={"history": history}, step=1)
    with pytest.raises(ValueError, match=r"no checkpoint .* value of loss; there are values of no"):
        best_steps(tmp_path, "loss", "min")
