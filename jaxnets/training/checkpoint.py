"""Save and restore training states: atomic, with checksums. The only module that imports Orbax.

A checkpoint is a folder `step_00000100` with the arrays in Orbax's format (`state_0/`) and a
`manifest.json` with the path of every leaf and the sha256 of every file. The manifest is renamed
into place last, atomically, and a folder without a manifest is not a checkpoint. So a save that is
killed at any moment leaves the earlier checkpoints intact and no partial one.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxnets.core import tree_path

_MANIFEST = "manifest.json"
_FOLDER = re.compile(r"step_(\d+)")


class CheckpointError(OSError):
    """A checkpoint cannot be written, or its files are damaged."""


def save(
    directory: str | os.PathLike[str],
    state: Any,
    *,
    metadata: Mapping[str, Any] | None = None,
    step: int | None = None,
) -> Path:
    """Write one checkpoint atomically.

    Replaces a checkpoint of the same step, and removes the remains of killed saves. With several
    processes, all of them call this, with a directory on a file system that they share.

    Args:
        directory: folder of the run's checkpoints, created if missing; one run per folder.
        state: pytree of arrays, such as a `TrainState`; typed random keys are allowed.
        metadata: any JSON value; `restore` returns it.
        step: step of the checkpoint; `state.step` by default.

    Returns:
        Folder of the checkpoint.

    Raises:
        TypeError: a leaf is not an array, or the metadata is not JSON-serializable.
        CheckpointError: the disk is full, read-only or not writable; older checkpoints are intact.
    """
    leaves = _named_leaves(state)
    step = int(np.max(np.asarray(state.step))) if step is None else step
    description = {
        "format": 1,
        "step": step,
        "leaves": [_describe(path, leaf) for path, leaf in leaves.items()],
        "metadata": json.loads(json.dumps(metadata or {})),
    }
    folder = _folder(directory, step)
    payload = None
    try:
        if jax.process_index() == 0:
            Path(directory).mkdir(parents=True, exist_ok=True)
            _remove_leftovers(Path(directory))
            folder.mkdir(exist_ok=True)
        multihost_utils.sync_global_devices("checkpoint folder is made")
        payload = next(p for n in itertools.count() if not (p := folder / f"state_{n}").exists())
        _write_arrays(payload, leaves)
        if jax.process_index() == 0:
            files = {str(f.relative_to(folder)): _digest(f, sync=True) for f in _files(payload)}
            _write_manifest(folder, {**description, "payload": payload.name, "files": files})
            for stale in folder.glob("state_*"):
                if stale != payload:
                    shutil.rmtree(stale)
        multihost_utils.sync_global_devices("checkpoint is complete")
    # TensorStore reports a failed write, a full disk for one, as ValueError.
    except (OSError, ValueError) as error:
        for partial in folder.glob(f"{payload.name}*") if payload else ():
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"cannot save step {step} in {directory}: free some space or choose a writable "
            f"directory; earlier checkpoints are intact; {error}"
        ) from error
    return folder


def restore(
    directory: str | os.PathLike[str], template: Any, *, step: int | None = None
) -> tuple[Any, dict[str, Any]]:
    """Read a checkpoint, bit for bit, with the structure and the shardings of a template.

    Args:
        directory: folder of the run's checkpoints.
        template: pytree with the structure of the saved state. Leaves are arrays or
            `jax.ShapeDtypeStruct` (from `jax.eval_shape`); each leaf is restored with the sharding
            of its template. Devices, and their number, may differ from those of the save.
        step: the checkpoint to read; None: the newest intact one, with a warning for each damaged
            one that is skipped.

    Returns:
        State with the structure of `template`, and the metadata given to `save`.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        CheckpointError: the checkpoint of `step`, or every checkpoint, is damaged.
        ValueError: the structure, or shape or dtype of a leaf, differs from the template. Floats of
            16 bits may become wider ones, such as a parameter average that was bfloat16.
    """
    steps = all_steps(directory)
    if not steps or step not in (None, *steps):
        available = f"there are steps {steps}" if steps else "there is none"
        wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
        raise FileNotFoundError(f"no {wanted} in {directory}: {available}")
    for candidate in reversed(steps) if step is None else [step]:
        try:
            manifest = _read_manifest(_folder(directory, candidate))
        except CheckpointError as error:
            if step is not None or candidate == steps[0]:
                raise
            warnings.warn(f"{error}; trying the previous checkpoint", stacklevel=2)
            continue
        break
    _check_template(_named_leaves(template), manifest["leaves"], _folder(directory, candidate))
    return _read_arrays(_folder(directory, candidate), manifest, template), manifest["metadata"]


def all_steps(directory: str | os.PathLike[str]) -> list[int]:
    """Return the steps of all complete checkpoints.

    Args:
        directory: folder of the run's checkpoints; it need not exist.

    Returns:
        Steps in ascending order; [] if there are none.
    """
    folders = Path(directory).glob("step_*") if Path(directory).is_dir() else ()
    matches = (_FOLDER.fullmatch(folder.name) for folder in folders if _exists(folder))
    return sorted(int(match[1]) for match in matches if match)


def latest_step(directory: str | os.PathLike[str]) -> int | None:
    """Return the step of the newest complete checkpoint.

    Args:
        directory: folder of the run's checkpoints; it need not exist.

    Returns:
        The step; None if there is no checkpoint.
    """
    return max(all_steps(directory), default=None)


def verify(directory: str | os.PathLike[str], step: int) -> None:
    """Check the sha256 of every file of a checkpoint.

    Raises:
        CheckpointError: a file is missing or damaged; the message has its name.
    """
    _read_manifest(_folder(directory, step))


def prune(
    directory: str | os.PathLike[str], *, keep: int, protect: Collection[int] = ()
) -> list[int]:
    """Remove all but the newest checkpoints.

    Args:
        directory: folder of the run's checkpoints.
        keep: number of the newest checkpoints to keep.
        protect: steps to keep in addition.

    Returns:
        The removed steps.
    """
    steps = all_steps(directory)
    removed = [step for step in steps[: max(len(steps) - keep, 0)] if step not in protect]
    multihost_utils.sync_global_devices("checkpoints are listed")
    for step in removed if jax.process_index() == 0 else ():
        folder = _folder(directory, step)
        # Without its manifest it is not a checkpoint, so a kill from here on leaves no partial one.
        (folder / _MANIFEST).unlink()
        shutil.rmtree(folder)
    multihost_utils.sync_global_devices("checkpoints are pruned")
    return removed


def parameters_sha256(params: Any) -> str:
    """Return a digest of parameters, which depends on every path, dtype, shape and bit.

    Args:
        params: pytree of arrays.

    Returns:
        Hexadecimal sha256 over the leaves, sorted by path.

    Example:
        >>> parameters_sha256({"a": jnp.zeros(2), "b": jnp.ones(3)})[:8]
        '3565bda7'
    """
    digest = hashlib.sha256()
    for path, leaf in sorted(_named_leaves(params).items()):
        array = np.asarray(_key_data(leaf))
        digest.update(f"{path} {leaf.dtype} {array.shape}\n".encode())
        digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()


def _folder(directory: str | os.PathLike[str], step: int) -> Path:
    return Path(directory).absolute() / f"step_{step:08d}"


def _exists(folder: Path) -> bool:
    return (folder / _MANIFEST).is_file()


def _remove_leftovers(directory: Path) -> None:
    for folder in directory.glob("step_*"):
        if _FOLDER.fullmatch(folder.name) and not _exists(folder):
            shutil.rmtree(folder)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _digest(path: Path, *, sync: bool = False) -> str:
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _named_leaves(tree: Any) -> dict[str, Any]:
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    leaves = {tree_path(path): leaf for path, leaf in pairs}
    if len(leaves) < len(pairs):
        raise ValueError("two leaves have the same path; do not use slashes in names")
    for path, leaf in leaves.items():
        if not (hasattr(leaf, "dtype") and hasattr(leaf, "shape")):
            raise TypeError(f"{path} is {leaf!r}, not an array; wrap it with jnp.asarray")
    return leaves


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_data(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _describe(path: str, leaf: Any) -> dict[str, Any]:
    description = {"path": path, "shape": list(leaf.shape), "dtype": str(leaf.dtype)}
    return description | ({"key": str(jax.random.key_impl(leaf))} if _is_key(leaf) else {})


@contextlib.contextmanager
def _quiet_absl() -> Iterator[None]:
    """Silence Orbax's threads, which log a traceback each besides the error that is raised."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _write_arrays(payload: Path, leaves: Mapping[str, Any]) -> None:
    import orbax.checkpoint as ocp

    # Orbax does not accept arrays without elements; the manifest has their shape and dtype.
    stored = {path: _key_data(leaf) for path, leaf in leaves.items() if leaf.size}
    with _quiet_absl(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(payload, args=ocp.args.PyTreeSave(stored))


def _read_arrays(folder: Path, manifest: Mapping[str, Any], template: Any) -> Any:
    import orbax.checkpoint as ocp

    targets = _named_leaves(template)
    stored = {path: leaf for path, leaf in targets.items() if np.prod(leaf.shape, dtype=int)}
    arguments = {path: _restore_argument(leaf) for path, leaf in stored.items()}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        arrays = checkpointer.restore(
            folder / manifest["payload"],
            args=ocp.args.PyTreeRestore(item=stored, restore_args=arguments),
        )
    keys = {leaf["path"]: leaf["key"] for leaf in manifest["leaves"] if "key" in leaf}
    leaves = []
    for path, target in targets.items():
        array = arrays.get(path, np.zeros(target.shape, None if path in keys else target.dtype))
        if path not in keys and array.dtype != target.dtype:
            array = array.astype(target.dtype)
        if not isinstance(target, np.ndarray):
            # Uncommitted if the template is, so that jit can place it on any mesh.
            array = jnp.asarray(array)
        leaves.append(jax.random.wrap_key_data(array, impl=keys[path]) if path in keys else array)
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _restore_argument(leaf: Any) -> Any:
    import orbax.checkpoint as ocp

    sharding = getattr(leaf, "sharding", None)
    if sharding is None or not getattr(leaf, "committed", True):
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=sharding)


def _check_template(targets: Mapping[str, Any], saved: list[dict[str, Any]], where: Path) -> None:
    known = {leaf["path"]: leaf for leaf in saved}
    for path in [*known, *targets]:
        if path not in targets or path not in known:
            place = "the checkpoint only" if path in known else "the template only"
            raise ValueError(f"{path} is in {place}; {where} holds a different kind of state")
        shapes = tuple(known[path]["shape"]), tuple(targets[path].shape)
        dtypes = known[path]["dtype"], str(targets[path].dtype)
        if shapes[0] != shapes[1] or not (dtypes[0] == dtypes[1] or _widens(*dtypes)):
            raise ValueError(
                f"{path} is {dtypes[0]}{list(shapes[0])} in {where} but {dtypes[1]}"
                f"{list(shapes[1])} in the template; restore with the same configuration as saved"
            )


def _widens(saved: str, wanted: str) -> bool:
    """Return whether floats of 16 bits are restored as wider ones, which changes no value."""
    if saved not in ("bfloat16", "float16"):
        return False
    return wanted in ("float32", "float64")


def _write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    body = json.dumps(content)
    temporary = folder / f"{_MANIFEST}.new"
    with temporary.open("w") as file:
        # The first line is the digest of every byte after it.
        file.write(f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / _MANIFEST)
    for path in (folder, folder.parent):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / _MANIFEST
    try:
        digest, _, body = path.read_bytes().partition(b"\n")
        if hashlib.sha256(body).hexdigest().encode() != digest:
            raise CheckpointError(f"damaged checkpoint: {path} is truncated or altered")
        manifest: dict[str, Any] = json.loads(body)
        for name, expected in manifest["files"].items():
            path = folder / name
            if _digest(path) != expected:
                raise CheckpointError(f"damaged checkpoint: {path} is truncated or altered")
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"damaged checkpoint: cannot read {path}: {error}") from error
    return manifest
