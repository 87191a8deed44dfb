"""Checkpoints: bitwise, atomic, with checksums and checks of the template."""

import asyncio
import dataclasses
import errno
import gc
import hashlib
import os
import resource
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoint_problem import (
    abstract,
    assert_bitwise_equal,
    at_step,
    flip,
    make_state,
)
from jax.sharding import NamedSharding, PartitionSpec

from jaxnets.training import checkpoint
from jaxnets.training.checkpoint import (
    CheckpointError,
    all_steps,
    latest_step,
    prune,
    restore,
    save,
    verify,
)
from jaxnets.training.hooks import resume
from jaxnets.training.optimizers import with_parameter_average


def test_every_kind_of_leaf_comes_back_bit_for_bit_with_the_metadata(tmp_path):
    state = at_step(12, seed=3)
    folder = save(tmp_path, state, metadata={"note": [1, 0.1, None]})
    assert folder == tmp_path / "step_00000012"
    for template in (make_state(9), abstract(state), jax.eval_shape(make_state)):
        restored, metadata = restore(tmp_path, template)
        assert_bitwise_equal(restored, state)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored))
        assert metadata == {"note": [1, 0.1, None]}
    assert jax.random.key_impl(restored.model_state["mixed"]["fast"]) == "rbg"


def test_numpy_leaves_stay_numpy(tmp_path):
    state = {"wide": np.arange(3, dtype=np.float64), "number": np.float64(0.1)}
    save(tmp_path, state, step=1)
    restored, _ = restore(tmp_path, jax.tree.map(np.asarray, state))
    assert isinstance(restored["wide"], np.ndarray) and restored["wide"].dtype == np.float64
    assert restored["number"] == 0.1


def test_a_state_moves_to_another_number_of_devices_and_back(tmp_path):
    devices = np.asarray(jax.devices())
    wide = jax.sharding.Mesh(devices[:4], ("data",))
    narrow = jax.sharding.Mesh(devices[:2], ("data",))
    state = make_state(1)

    def place(leaf, mesh):
        split = leaf.ndim == 2 and leaf.shape[0] == 8
        return NamedSharding(mesh, PartitionSpec("data") if split else PartitionSpec())

    def templates(mesh):
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place(leaf, mesh)),
            state,
        )

    save(tmp_path, jax.tree.map(lambda leaf: jax.device_put(leaf, place(leaf, wide)), state))
    for mesh in (narrow, wide):
        restored, _ = restore(tmp_path, templates(mesh))
        assert_bitwise_equal(restored, state)
        assert restored.params["linear"]["kernel"].sharding == place(jnp.ones((8, 2)), mesh)
        assert restored.rng.sharding.is_equivalent_to(place(state.rng, mesh), 0)
    on_one, _ = restore(tmp_path, abstract(state))
    assert_bitwise_equal(on_one, state)
    assert not on_one.params["linear"]["kernel"].committed
    save(tmp_path, on_one, step=1)
    spread, _ = restore(tmp_path, restored)
    assert spread.params["linear"]["kernel"].sharding.mesh == wide


@pytest.mark.four_devices
def test_a_restored_state_is_uncommitted_if_its_template_is(tmp_path):
    save(tmp_path, make_state())
    restored, _ = restore(tmp_path, make_state())
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    doubled = jax.jit(lambda x: 2 * x, in_shardings=everywhere)(restored.params["linear"]["bias"])
    assert len(doubled.sharding.device_set) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"params": {"linear": {"kernel": jnp.ones((8, 3)), "bias": jnp.zeros(2)}}},
            r"params/linear/kernel is float32\[8, 2\] in .* but float32\[8, 3\] in the template",
        ),
        (
            {"params": {"linear": {"kernel": jnp.ones((8, 2), jnp.bfloat16), "bias": jnp.ones(2)}}},
            r"params/linear/kernel is float32\[8, 2\] in .* but bfloat16\[8, 2\]",
        ),
        ({"params": {"linear": {"kernel": jnp.ones((8, 2))}}}, "params/linear/bias is in the chec"),
        ({"model_state": make_state().model_state | {"new": jnp.ones(1)}}, "model_state/new is in"),
        ({"rng": jax.random.key(0, impl="rbg")}, r"rng is key<fry>\[\] in .* but key<rbg>\[\]"),
    ],
)
def test_a_template_of_another_kind_is_refused_naming_the_leaf(two_checkpoints, change, message):
    with pytest.raises(ValueError, match=message):
        restore(two_checkpoints, dataclasses.replace(make_state(), **change))


def test_averages_that_were_saved_in_16_bits_are_restored_as_float32(tmp_path):
    optimizer = with_parameter_average(optax.sgd(0.1), 0.9)
    params = {"w": jnp.full(3, 1.5, jnp.bfloat16), "b": jnp.ones((), jnp.float16)}
    wide = optimizer.init(params)
    narrow = wide._replace(average=params)  # as before float32 averages
    save(tmp_path, {"opt_state": narrow}, step=1)
    for template in ({"opt_state": wide}, jax.eval_shape(lambda: {"opt_state": wide})):
        restored, _ = restore(tmp_path, template)
        assert_bitwise_equal(restored, {"opt_state": wide})


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """Return a folder with the checkpoints of steps 1 and 2; copy it to change it."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for step in (1, 2):
        save(folder, at_step(step, seed=step))
    return folder


def payload_files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    "damage", [truncate, flip, Path.unlink, lambda path: path.write_bytes(b"")]
)
def test_damage_to_any_file_is_reported_and_the_previous_checkpoint_is_used(
    tmp_path, two_checkpoints, damage
):
    folder, template = tmp_path / "checkpoints", make_state()
    shutil.copytree(two_checkpoints, folder)
    damaged, intact = folder / "step_00000002", two_checkpoints / "step_00000002"
    files = payload_files(damaged)
    if damage is Path.unlink:
        files.remove(damaged / "manifest.json")  # without it there is no checkpoint
    for path in files:
        damage(path)
        with pytest.raises(CheckpointError, match=path.name):
            verify(folder, 2)
        if path in (files[0], files[-1]):
            with pytest.warns(UserWarning, match=path.name) as caught:
                restored, _ = restore(folder, template)
            assert len(caught) == 1 and "damaged" in str(caught[0].message)
            assert_bitwise_equal(restored, at_step(1, seed=1))
            with pytest.raises(CheckpointError, match=path.name):
                restore(folder, template, step=2)
        shutil.copy(intact / path.relative_to(damaged), path)
    verify(folder, 2)


def test_without_an_intact_checkpoint_there_is_an_error_and_no_new_start(tmp_path, two_checkpoints):
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    for step in (1, 2):
        flip(tmp_path / f"step_0000000{step}" / "manifest.json")
    with (
        pytest.warns(UserWarning, match="step_00000002"),
        pytest.raises(CheckpointError, match="step_00000001"),
    ):
        resume(tmp_path, make_state())


def test_a_missing_checkpoint_is_reported_with_the_steps_there_are(tmp_path, two_checkpoints):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*: there is none"):
        restore(tmp_path / "nowhere", make_state())
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 5 in .* steps \[1, 2\]"):
        restore(two_checkpoints, make_state(), step=5)
    assert latest_step(tmp_path / "nowhere") is None and latest_step(two_checkpoints) == 2


class Killed(BaseException):
    """Stands for the end of the process: `save` must not handle it."""


@pytest.mark.parametrize(
    ("victim", "step"),
    [
        *[("write_arrays", 1), ("file_sha256", 2), ("write_manifest", 1), ("replace", 2)],
        *[("write_arrays", 2), ("replace", 1)],
        pytest.param("file_sha256", 1, marks=pytest.mark.slow),
        pytest.param("write_manifest", 2, marks=pytest.mark.slow),
    ],
)
def test_a_save_killed_at_any_point_leaves_the_checkpoints_before(
    tmp_path, two_checkpoints, monkeypatch, victim, step
):
    """Also if the save replaces a checkpoint of the same step."""

    def kill(*args, **keywords):
        raise Killed

    shutil.copytree(two_checkpoints / "step_00000001", tmp_path / "step_00000001")
    with monkeypatch.context() as patch:
        patch.setattr(os if victim == "replace" else checkpoint, victim, kill)
        with pytest.raises(Killed):
            save(tmp_path, at_step(step, seed=2))
    assert all_steps(tmp_path) == [1]
    assert_bitwise_equal(restore(tmp_path, make_state())[0], at_step(1, seed=1))
    save(tmp_path, at_step(3, seed=3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000003"]
    save(tmp_path, at_step(1, seed=4))
    assert len(list((tmp_path / "step_00000001").iterdir())) == 2
    assert_bitwise_equal(restore(tmp_path, make_state(), step=1)[0], at_step(1, seed=4))


def test_a_full_disk_is_reported_and_loses_nothing(tmp_path, two_checkpoints, monkeypatch):
    """With a limit on file size the operating system itself refuses the write."""
    shutil.copytree(two_checkpoints / "step_00000001", tmp_path / "step_00000001")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(CheckpointError, match=f"cannot save step 2 in {tmp_path}: free some"):
            save(tmp_path, at_step(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left on device"):
            save(tmp_path, at_step(2))
    assert all_steps(tmp_path) == [1]
    assert_bitwise_equal(restore(tmp_path, make_state())[0], at_step(1, seed=1))


def test_a_file_in_the_way_of_the_directory_is_reported(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(CheckpointError, match=r"cannot save step 0 in .*taken"):
        save(tmp_path / "taken", make_state())


def test_a_leaf_that_is_no_array_is_refused_by_name(tmp_path):
    with pytest.raises(TypeError, match=r"params/scale is 3\.0, not an array"):
        save(tmp_path, {"params": {"scale": 3.0}}, step=1)
    with pytest.raises(ValueError, match="same path"):
        save(tmp_path, {"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)}, step=1)
    with pytest.raises(TypeError, match="not JSON serializable"):
        save(tmp_path, make_state(), metadata={"x": jnp.ones(1)})
    assert not list(tmp_path.iterdir())


def test_saving_and_restoring_work_inside_a_running_event_loop(tmp_path):
    async def notebook():
        save(tmp_path, at_step(1))
        return restore(tmp_path, make_state())[0]

    assert_bitwise_equal(asyncio.run(notebook()), at_step(1))


def test_nothing_written_or_read_is_a_pickle(tmp_path, monkeypatch):
    import pickle

    def refuse(*args, **keywords):
        raise AssertionError("pickle")

    for name in ("load", "loads", "dump", "dumps", "Unpickler", "Pickler"):
        monkeypatch.setattr(pickle, name, refuse)
    folder = save(tmp_path, at_step(1))
    restore(tmp_path, make_state())
    assert not [path for path in folder.rglob("*") if path.suffix in (".pkl", ".npy", ".pickle")]


def test_prune_keeps_the_newest_and_the_protected(tmp_path):
    for step in range(1, 7):
        save(tmp_path, {"x": jnp.ones(1)}, step=step)
    assert prune(tmp_path, keep=2, protect=[2]) == [1, 3, 4]
    assert all_steps(tmp_path) == [2, 5, 6]
    assert prune(tmp_path, keep=9) == []


def test_the_parameter_digest_depends_on_path_dtype_shape_and_bits_only():
    params = {"b": jnp.arange(4.0), "a": {"c": jnp.ones((2, 2))}}
    digest = checkpoint.parameters_sha256(params)
    content = b"a/c float32 (2, 2)\n" + np.ones(4, "<f4").tobytes()
    content += b"b float32 (4,)\n" + np.arange(4, dtype="<f4").tobytes()
    assert digest == hashlib.sha256(content).hexdigest()
    assert digest == checkpoint.parameters_sha256(jax.tree.map(np.asarray, params))
    for other in (
        {**params, "b": jnp.arange(4.0).at[0].set(-0.0)},
        {**params, "b": jnp.arange(4)},
        {**params, "b": jnp.arange(4.0)[None]},
        {"d": params["b"], "a": params["a"]},
    ):
        assert checkpoint.parameters_sha256(other) != digest


def live_bytes():
    """Return the size of all buffers; several arrays may be views of one."""
    buffers = {}
    for array in jax.live_arrays():
        split = len(array.sharding.device_set) > 1
        for part in [shard.data for shard in array.addressable_shards] if split else [array]:
            buffers[part.unsafe_buffer_pointer()] = part.nbytes
    return sum(buffers.values())


@pytest.fixture
def no_collector():
    """Keep Python's cyclic garbage collector from hiding what is tied into cycles."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize(
    "placed", ["uncommitted", "on one device", "on a mesh of one", "sharded", "replicated"]
)
def test_saving_keeps_one_copy_of_the_state_alive_at_most_and_none_afterwards(
    tmp_path, monkeypatch, placed
):
    devices = jax.devices() if placed in ("sharded", "replicated") else jax.devices()[:1]
    mesh = jax.sharding.Mesh(np.asarray(devices), ("data",))
    sharding = {
        "uncommitted": None,
        "on one device": jax.devices()[-1],
        "replicated": NamedSharding(mesh, PartitionSpec()),
    }.get(placed, NamedSharding(mesh, PartitionSpec("data")))

    def make():
        state = {"large": jnp.ones((512, 512)), "half": jnp.ones((512, 512), jnp.bfloat16)}
        return jax.device_put({**state, "keys": jax.random.split(jax.random.key(0), 8)}, sharding)

    after_writing = []

    def measured(path, sync):
        after_writing.append(live_bytes())
        return original(path, sync=sync)

    original = checkpoint.file_sha256
    monkeypatch.setattr(checkpoint, "file_sha256", measured)
    before = live_bytes()
    state = make()
    size = live_bytes() - before
    for step in range(3):
        save(tmp_path, state, step=step)
        assert max(after_writing) <= before + 2 * size
        assert live_bytes() <= before + size
    restored, _ = restore(tmp_path, state)
    assert_bitwise_equal(restored, state)
    del state, restored
    assert live_bytes() <= before


def test_dtypes_of_few_bits_come_back_bit_for_bit(tmp_path):
    state = {
        "float8": jnp.arange(-4, 4).astype(jnp.float8_e4m3fn),
        "int4": jnp.arange(-8, 8).astype(jnp.int4),
        "complex": jnp.arange(3) * (1 + 2j),
        "nan": jnp.array([jnp.nan, -0.0, jnp.inf], jnp.float16),
    }
    save(tmp_path, state, step=1)
    assert_bitwise_equal(restore(tmp_path, state)[0], state)


def test_a_full_disk_is_one_error_with_the_file_and_nothing_on_standard_error(
    tmp_path, monkeypatch, capfd
):
    """Also if it is the write of many arrays at once that fails."""
    unraisable = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    names = [f"layer_{index}" for index in range(30)]
    state = {name: np.random.default_rng(0).normal(size=(64, 512)) for name in names}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(CheckpointError) as caught:
            save(tmp_path, state, step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = str(caught.value)
    assert f"cannot save step 2 in {tmp_path}" in message and "step_00000002/state_0" in message
    assert "\n" not in message and caught.value.__suppress_context__
    assert unraisable == [] and capfd.readouterr().err == ""


def test_the_error_of_a_full_disk_has_a_file_where_the_system_gives_none(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(checkpoint, "write_arrays", full)
    with pytest.raises(CheckpointError, match=r"step_00000002/state_0: .*Disk quota exceeded"):
        save(tmp_path, at_step(2))


def trained(state):
    """Return a state whose optimizer is another one."""
    return dataclasses.replace(state, opt_state={"trace": state.params})


def test_parameters_are_restored_alone_and_into_a_state_of_another_optimizer(tmp_path):
    saved = at_step(3, seed=3)
    save(tmp_path, saved)
    other = trained(make_state(9))
    with pytest.raises(ValueError, match=r'to restore some parts of it, .*\{"params": params\}'):
        restore(tmp_path, other)
    with pytest.raises(ValueError, match="to restore some parts of it"):
        resume(tmp_path, other)
    parts, _ = restore(tmp_path, {"params": other.params})
    assert_bitwise_equal(parts, {"params": saved.params})
    names = ("step", "params", "model_state")
    parts, _ = restore(tmp_path, {name: getattr(other, name) for name in names})
    mixed = dataclasses.replace(other, **parts)
    assert int(mixed.step) == 3 and mixed.opt_state is other.opt_state
    assert_bitwise_equal(mixed.model_state, saved.model_state)


def test_some_parts_of_a_state_are_as_strict_as_a_whole_one(tmp_path):
    save(tmp_path, {"a": {"b": jnp.ones(1), "c": jnp.ones(1)}, "ab": {}, "d": jnp.ones(1)}, step=1)
    assert_bitwise_equal(restore(tmp_path, {"ab": {}})[0], {"ab": {}})
    for template, message in (
        ({"a": {"b": jnp.ones(1)}}, "a/c is in the checkpoint only"),
        ({"a": {}}, "a/b is in the checkpoint only"),
        ({"d": jnp.ones(1), "e": jnp.ones(1)}, "e is in the template only"),
        ({"d": jnp.ones(2)}, r"d is float32\[1\] in .* but float32\[2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            restore(tmp_path, template)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_floating_leaves_are_converted_to_the_dtype_of_the_template_on_request(tmp_path, dtype):
    saved = at_step(3, seed=3)
    save(tmp_path, saved)
    templates = {"params": jax.tree.map(lambda leaf: leaf.astype(dtype), saved.params)}
    with pytest.raises(ValueError, match=rf"but {dtype.__name__}.*; give cast=True to convert it"):
        restore(tmp_path, templates)
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("data",))
    for template in (
        templates,
        jax.tree.map(np.asarray, templates),
        jax.device_put(templates, NamedSharding(mesh, PartitionSpec())),
    ):
        restored, _ = restore(tmp_path, template, cast=True)
        assert_bitwise_equal(restored, templates)
        for leaf, target in zip(*map(jax.tree.leaves, (restored, template)), strict=True):
            assert type(leaf) is type(target)
            assert not isinstance(leaf, jax.Array) or leaf.sharding == target.sharding
    widened, _ = restore(tmp_path, jax.eval_shape(lambda: saved), cast=True)
    assert_bitwise_equal(widened, saved)
    with pytest.raises(ValueError, match=r"step is int32\[\] in .* but float16"):
        restore(tmp_path, {"step": jnp.float16(1)}, cast=True)


def test_a_conversion_that_would_make_infinities_is_refused(tmp_path):
    save(tmp_path, {"w": jnp.array([1.0, -1e6, jnp.inf])}, step=1)
    with pytest.raises(ValueError, match=r"w has values up to 1e\+06, which float16 cannot hold"):
        restore(tmp_path, {"w": jnp.zeros(3, jnp.float16)}, cast=True)
    restored, _ = restore(tmp_path, {"w": jnp.zeros(3, jnp.bfloat16)}, cast=True)
    assert restored["w"].tolist() == [1.0, float(jnp.bfloat16(-1e6)), float("inf")]
