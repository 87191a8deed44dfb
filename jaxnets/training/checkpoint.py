"""Save and restore training states: atomic, with checksums.

A checkpoint is a folder `step_00000100` with the arrays in Orbax's format (`state_0/`) and a
`manifest.json` with the path of every leaf and the sha256 of every file. The rows of its history
are in `history_0.jsonl`, which the checkpoints of a run share and which only grows. The manifest is
renamed into place last, atomically: until then, and again while a checkpoint is removed, it is
called `manifest.json.new`. So a save that is killed at any moment leaves the earlier checkpoints
intact and no partial one, and its remains differ from a checkpoint that has lost its manifest.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import os
import re
import shutil
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxnets.core import tree_path
from jaxnets.storage import file_sha256
from jaxnets.training import row_files
from jaxnets.training.checkpoint_arrays import is_key, key_data, read_arrays, write_arrays
from jaxnets.training.checkpoint_folder import (
    CheckpointError,
    Leaf,
    Manifest,
    begin,
    complete_steps,
    folder_of,
    is_history,
    load_manifest,
    read_manifest,
    remove,
    remove_leftovers,
    remove_unused_rows,
    write_manifest,
)
from jaxnets.training.history import History, Mode, check_best, rank


def save(
    directory: str | os.PathLike[str],
    state: Any,
    *,
    metadata: Mapping[str, Any] | None = None,
    history: History | None = None,
    step: int | None = None,
) -> Path:
    """Write one checkpoint atomically.

    Replaces a checkpoint of the same step, and removes the remains of killed saves. With several
    processes, all of them call this, with a directory on a file system that they share.

    While it saves, at most one copy of the state is alive beyond the state, in the memory of the
    host; afterwards none. Of the history only the rows since the last checkpoint are written.

    Args:
        directory: folder of the run's checkpoints, created if missing; one run per folder.
        state: pytree of arrays, such as a `TrainState`; typed random keys are allowed.
        metadata: any JSON value; `restore` returns it.
        history: of the run, for `resume`; `restore` returns it as `metadata["history"]`.
        step: step of the checkpoint; `state.step` by default.

    Returns:
        Folder of the checkpoint.

    Raises:
        TypeError: a leaf is not an array, or the metadata is not JSON-serializable.
        ValueError: there is a history besides one in the metadata.
        CheckpointError: the disk is full, read-only or not writable; older checkpoints are intact.
            Or a folder was changed by hand, see `all_steps`; nothing is removed.
    """
    leaves = _named_leaves(state)
    step = int(np.max(np.asarray(state.step))) if step is None else step
    description = {
        "step": step,
        "leaves": [_describe(path, leaf) for path, leaf in leaves.items()],
        "metadata": json.loads(json.dumps(metadata or {})),
    }
    if history is not None:
        if "history" in description["metadata"]:
            raise ValueError("metadata has a 'history' and history= is given; give one of them")
        description["history"] = history.summary()
    folder = folder_of(directory, step)
    payload = None
    steps = all_steps(directory)
    try:
        if jax.process_index() == 0:
            Path(directory).mkdir(parents=True, exist_ok=True)
            remove_leftovers(Path(directory))
            begin(folder)
        multihost_utils.sync_global_devices("checkpoint folder is made")
        payload = next(p for n in itertools.count() if not (p := folder / f"state_{n}").exists())
        write_arrays(payload, leaves)
        if jax.process_index() == 0:
            files = {str(f.relative_to(folder)): file_sha256(f, sync=True) for f in _files(payload)}
            if history is not None:
                known = _row_parts(directory, [known for known in steps if known < step])
                description["rows"] = row_files.extend(folder.parent, history.rows, known)
            write_manifest(folder, {**description, "payload": payload.name, "files": files})
            for stale in folder.glob("state_*"):
                if stale != payload:
                    shutil.rmtree(stale)
            if step in steps:
                remove_unused_rows(folder.parent)
        multihost_utils.sync_global_devices("checkpoint is complete")
    # TensorStore reports a failed write, a full disk for one, as ValueError.
    except (OSError, ValueError) as error:
        for partial in folder.glob(f"{payload.name}*") if payload else ():
            shutil.rmtree(partial, ignore_errors=True)
        file = "" if str(folder.parent) in str(error) else f"{payload or folder}: "
        raise CheckpointError(
            f"cannot save step {step} in {directory}: free some space or choose a writable "
            f"directory; earlier checkpoints are intact; {file}{error}"
        ) from None  # what is behind it are the threads of Orbax
    return folder


def restore(
    directory: str | os.PathLike[str],
    template: Any,
    *,
    step: int | None = None,
    best: tuple[str, Mode] | None = None,
    cast: bool = False,
) -> tuple[Any, dict[str, Any]]:
    """Read a checkpoint, bit for bit, with the structure and the shardings of a template.

    Args:
        directory: folder of the run's checkpoints.
        template: pytree with the structure of the saved state, or a dictionary with some of its
            parts, such as `{"params": params}`: the other parts are not read. Leaves are arrays
            or `jax.ShapeDtypeStruct` (from `jax.eval_shape`); each leaf is restored with the
            sharding of its template. Devices, and their number, may differ from those of the save.
        step: the checkpoint to read; None: the newest intact one, with a warning for each damaged
            one that is skipped.
        best: (metric, "min" or "max"), as in `Checkpointing`: read the checkpoint with the best
            value of a metric; a damaged one is skipped with a warning.
        cast: convert floating leaves to the dtype of the template; otherwise another dtype is an
            error.

    Returns:
        State with the structure of `template`, and the metadata given to `save`; if it was given
        a history, `metadata["history"]` is that of `History.to_json`. Where the rows of a history
        are damaged, an earlier checkpoint with an intact history is preferred; without one there
        is a warning, and the history has the rows in front of the damage.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        CheckpointError: the checkpoint of `step`, or every checkpoint, is damaged; or a folder was
            changed by hand, see `all_steps`.
        ValueError: the structure, or shape or dtype of a leaf, differs from the template; no
            checkpoint has a value of `best`; a value is too large for the dtype of the template;
            or a later version of this library wrote the checkpoint. Floats of 16 bits may become
            wider ones without `cast`, such as a parameter average that was bfloat16.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> folder = tempfile.mkdtemp()
        >>> state = {"params": {"w": jnp.ones(2)}, "opt_state": {"nu": jnp.zeros(2)}}
        >>> path = save(folder, state, step=3)
        >>> halves = {"params": {"w": jnp.zeros(2, jnp.bfloat16)}}
        >>> restore(folder, halves, cast=True)[0]
        {'params': {'w': Array([1, 1], dtype=bfloat16)}}
    """
    steps = verify_names(directory)
    if not steps or step not in (None, *steps):
        available = f"there are steps {steps}" if steps else "there is none"
        wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
        raise FileNotFoundError(f"no {wanted} in {directory}: {available}")
    if step is not None and best is not None:
        raise ValueError(f"step={step} and best={best} are given; give one of them")
    candidates = steps[::-1] if step is None else [step]
    if best is not None:
        check_best(best)
        candidates = best_steps(directory, *best)
    other = "previous" if best is None else "next best"
    content = _first_intact(Path(directory), candidates, other)
    where = folder_of(directory, content.manifest["step"])
    targets = _named_leaves(template)
    _check_template(template, targets, content.manifest["leaves"], where, cast=cast)
    return read_arrays(where, content.manifest, template, targets), content.metadata


def all_steps(directory: str | os.PathLike[str]) -> list[int]:
    """Return the steps of all complete checkpoints.

    Args:
        directory: folder of the run's checkpoints; it need not exist.

    Returns:
        Steps in ascending order; [] if there are none.

    Raises:
        CheckpointError: a folder has the arrays of a checkpoint but no manifest, or a name that
            `save` does not give.
    """
    return complete_steps(Path(directory))


def latest_step(directory: str | os.PathLike[str]) -> int | None:
    """Return the step of the newest complete checkpoint.

    Args:
        directory: folder of the run's checkpoints; it need not exist.

    Returns:
        The step; None if there is no checkpoint.
    """
    return max(all_steps(directory), default=None)


def best_steps(directory: str | os.PathLike[str], metric: str, mode: Mode) -> list[int]:
    """Return the steps of the checkpoints by a metric, best first.

    Args:
        directory: folder of the run's checkpoints.
        metric: name of a value in the history, such as "validation/accuracy"; of a population
            its mean counts.
        mode: "min" if lower is better, "max" if higher is better.

    Returns:
        Steps of the checkpoints that have a value; of equal values the earlier one is first, and
        NaN and infinity are left out.

    Raises:
        ValueError: there are checkpoints, but none has a finite value of the metric.
    """
    steps = all_steps(directory)
    if not steps:
        return []
    history = History(rows=_rows(Path(directory), steps))
    values = dict(zip(*history.column(metric), strict=True))
    ranked = rank({step: values[step] for step in steps if step in values}, mode)
    if ranked:
        return ranked
    if values.keys() & set(steps):
        reason = f"has a finite value of {metric}"
    elif values:
        reason = (
            f"has a value of {metric}, which has values of other steps, such as {min(values)}; "
            "evaluate where checkpoints are saved"
        )
    else:
        names = sorted({name for row in history.rows for name in row} - {"step"})
        near = difflib.get_close_matches(metric, names, n=len(names) or 1, cutoff=0)
        reason = f"has a value of {metric}; there are values of {', '.join(near) or 'nothing'}"
    raise ValueError(f"no checkpoint in {directory} {reason}")


def verify(directory: str | os.PathLike[str], step: int) -> None:
    """Check the sha256 of every file of a checkpoint, and of the rows of its history.

    Raises:
        CheckpointError: a file is missing or damaged; the message has its name.
    """
    manifest = read_manifest(folder_of(directory, step))
    damaged = row_files.read(Path(directory), manifest.get("rows", ()))[1]
    if damaged is not None:
        raise CheckpointError(f"damaged checkpoint: {damaged} is truncated or altered")


def verify_names(directory: str | os.PathLike[str]) -> list[int]:
    """Check that every checkpoint is of the step that its folder is named after.

    Args:
        directory: folder of the run's checkpoints; it need not exist.

    Returns:
        The result of `all_steps`.

    Raises:
        CheckpointError: a folder was renamed; or as for `all_steps`.
    """
    steps = all_steps(directory)
    for step in steps:
        try:
            saved = load_manifest(folder_of(directory, step))["step"]
        except CheckpointError:
            continue  # which step it is of cannot be told; reading it reports the damage
        if saved != step:
            raise CheckpointError(
                f"{folder_of(directory, step)} was renamed: it holds step {saved}; name it "
                f"{folder_of(directory, saved).name} again, or move it away"
            )
    return steps


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
        remove(folder_of(directory, step))
    multihost_utils.sync_global_devices("checkpoints are pruned")
    return removed


def parameters_sha256(params: Any) -> str:
    """Return a digest of parameters, which depends on every path, dtype, shape and bit.

    Args:
        params: pytree of arrays.

    Returns:
        Hexadecimal sha256 over the leaves, sorted by path.

    Raises:
        ValueError: two leaves have the same path.
        TypeError: a leaf is no array.

    Example:
        >>> import jax.numpy as jnp
        >>> parameters_sha256({"a": jnp.zeros(2), "b": jnp.ones(3)})[:8]
        '3565bda7'
    """
    digest = hashlib.sha256()
    for path, leaf in sorted(_named_leaves(params).items()):
        array = np.asarray(key_data(leaf))
        digest.update(f"{path} {leaf.dtype} {array.shape}\n".encode())
        digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _named_leaves(tree: Any) -> dict[str, Any]:
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    leaves = {tree_path(path): leaf for path, leaf in pairs}
    if len(leaves) < len(pairs):
        raise ValueError("two leaves have the same path; do not use slashes in names")
    for path, leaf in leaves.items():
        if not (hasattr(leaf, "dtype") and hasattr(leaf, "shape")):
            raise TypeError(f"{path} is {leaf!r}, not an array; wrap it with jnp.asarray")
    return leaves


def _describe(path: str, leaf: Any) -> dict[str, Any]:
    description = {"path": path, "shape": list(leaf.shape), "dtype": str(leaf.dtype)}
    return description | ({"key": str(jax.random.key_impl(leaf))} if is_key(leaf) else {})


def _check_template(
    template: Any,
    targets: Mapping[str, Any],
    saved: Sequence[Leaf],
    where: Path,
    *,
    cast: bool,
) -> None:
    parts = jax.tree_util.tree_flatten_with_path(template, is_leaf=lambda x: x is not template)[0]
    names = [tree_path(path) for path, _ in parts]
    known = {
        leaf["path"]: leaf
        for leaf in saved
        if any(leaf["path"] == name or leaf["path"].startswith(f"{name}/") for name in names)
    }
    for path in [*known, *targets]:
        if path not in targets or path not in known:
            place = "the checkpoint only" if path in known else "the template only"
            raise ValueError(
                f"{path} is in {place}; {where} holds a different kind of state; to restore some "
                'parts of it, give only these: {"params": params}, and "model_state" where there '
                "are running statistics"
            )
        shapes = tuple(known[path]["shape"]), tuple(targets[path].shape)
        dtypes = known[path]["dtype"], str(targets[path].dtype)
        both_float = "key" not in known[path] and all(
            re.match(r"b?float\d", dtype) for dtype in dtypes
        )
        same = dtypes[0] == dtypes[1] or _widens(*dtypes) or (cast and both_float)
        if shapes[0] != shapes[1] or not same:
            remedy = "restore with the same configuration as saved"
            if shapes[0] == shapes[1] and both_float:
                remedy = "give cast=True to convert it"
            raise ValueError(
                f"{path} is {dtypes[0]}{list(shapes[0])} in {where} but {dtypes[1]}"
                f"{list(shapes[1])} in the template; {remedy}"
            )


def _widens(saved: str, wanted: str) -> bool:
    """Return whether floats of 16 bits are restored as wider ones, which changes no value."""
    if saved not in ("bfloat16", "float16"):
        return False
    return wanted in ("float32", "float64")


class _Content(NamedTuple):
    manifest: Manifest
    metadata: dict[str, Any]


def _first_intact(directory: Path, candidates: Sequence[int], other: str) -> _Content:
    """Return the first checkpoint that is intact, else the first whose history alone is damaged."""
    fallback = None
    for step in candidates:
        last = step == candidates[-1]
        try:
            manifest = read_manifest(folder_of(directory, step))
        except CheckpointError as error:
            if last and fallback is None:
                raise
            problem = str(error)
        else:
            metadata: dict[str, Any] = manifest["metadata"]
            rows, damaged = row_files.read(directory, manifest.get("rows", ()))
            if "history" in manifest:
                metadata = {**metadata, "history": {**manifest["history"], "rows": rows}}
            content = _Content(manifest, metadata)
            if damaged is None:
                return content
            fallback = fallback or content
            problem = f"damaged history of step {step}: {damaged} is truncated or altered"
        if last:
            break
        warnings.warn(f"{problem}; trying the {other} checkpoint", stacklevel=3)
    assert fallback is not None
    rows = fallback.metadata["history"]["rows"]
    warnings.warn(
        f"{problem}; no checkpoint has a whole history, so step {fallback.manifest['step']} is "
        f"restored with the {len(rows)} rows in front of the damage",
        stacklevel=3,
    )
    return fallback


def _row_parts(directory: str | os.PathLike[str], steps: Sequence[int]) -> list[row_files.Part]:
    """Return what is on disk of the history of the last of these checkpoints."""
    if not steps:
        return []
    try:
        return load_manifest(folder_of(directory, steps[-1])).get("rows", [])
    except CheckpointError:  # it is overwritten, or an earlier one was resumed from
        return []


def _rows(directory: Path, steps: Sequence[int]) -> list[Any]:
    """Return the rows of the newest history, which has those of all checkpoints."""
    for step in reversed(steps):
        try:
            manifest = load_manifest(folder_of(directory, step))
        except CheckpointError:
            continue
        if "history" in manifest:
            return row_files.read(directory, manifest["rows"])[0]
        former = manifest["metadata"].get("history")
        if is_history(former):
            return former["rows"]
    return []
