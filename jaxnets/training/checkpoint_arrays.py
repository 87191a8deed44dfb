"""The arrays of a checkpoint on disk, in Orbax's format. The only module that imports Orbax."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.training.checkpoint_folder import CheckpointError, Manifest

_ABSENT = 0  # in place of an array


def is_key(leaf: Any) -> bool:
    """Return whether an array is one of random keys."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def key_data(leaf: Any) -> Any:
    """Return the uint32 data of random keys, and other arrays as they are.

    Args:
        leaf: an array.
    """
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Silence Orbax's threads, which print tracebacks besides the error that is raised.

    After a failed read or write Orbax closes the event loop of the others, and each of them reports
    that as it ends.
    """
    logger, report = logging.getLogger("absl"), sys.unraisablehook
    level, last = logger.level, 0.0

    def keep_quiet(unraisable: Any) -> None:
        nonlocal last
        if str(unraisable.exc_value) == "Event loop is closed":
            last = time.monotonic()
        else:
            report(unraisable)

    logger.setLevel(logging.CRITICAL + 1)
    sys.unraisablehook = keep_quiet
    try:
        yield
    except Exception:
        last = time.monotonic()
        while time.monotonic() < last + 0.2:  # until the others have ended
            time.sleep(0.02)
        raise
    finally:
        logger.setLevel(level)
        sys.unraisablehook = report


def write_arrays(payload: Path, leaves: Mapping[str, Any]) -> None:
    """Write arrays into a new folder.

    Args:
        payload: the folder, which does not exist.
        leaves: {path in the state: array}.

    Raises:
        OSError, ValueError: the disk is full or not writable, as Orbax says it.
    """
    import orbax.checkpoint as ocp

    # Orbax does not accept arrays without elements; the manifest has their shape and dtype.
    stored = {path: _to_host(key_data(leaf)) for path, leaf in leaves.items() if leaf.size}
    with _quiet_orbax(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(payload, args=ocp.args.PyTreeSave(stored))


def _to_host(leaf: Any) -> Any:
    """Return an array on one device as a NumPy array; others as they are.

    Orbax reads `addressable_shards`, which ties an array on one device into a reference cycle: it
    would stay alive until Python's cyclic collector runs. See findings/addressable_shards_cycle.sh.
    """
    one_device = isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) == 1
    return np.asarray(leaf) if one_device else leaf


def read_arrays(folder: Path, manifest: Manifest, template: Any, targets: Mapping[str, Any]) -> Any:
    """Read the arrays of a template, with its shardings.

    Args:
        folder: of the checkpoint.
        manifest: of the checkpoint, which fits the template.
        template: pytree of the arrays to read.
        targets: its leaves by their paths.

    Returns:
        The pytree, with arrays of the template's dtypes.

    Raises:
        CheckpointError: the files do not have the arrays of the manifest.
        ValueError: values that the template's dtype cannot hold.
    """
    import orbax.checkpoint as ocp

    stored = {path: leaf for path, leaf in targets.items() if np.prod(leaf.shape, dtype=int)}
    arguments = {path: _restore_argument(leaf) for path, leaf in stored.items()}
    arrays = {}
    if stored:
        try:
            with _quiet_orbax(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                arrays = checkpointer.restore(
                    folder / manifest["payload"],
                    args=ocp.args.PyTreeRestore(
                        # An array that is not in the files would come back as its template.
                        item=dict.fromkeys(stored, _ABSENT),
                        restore_args=arguments,
                        partial_restore=True,
                    ),
                )
        except Exception as error:  # of any type, by what Orbax misses
            raise CheckpointError(
                f"cannot read the arrays in {folder / manifest['payload']}: {error}"
            ) from error
    keys = {leaf["path"]: leaf["key"] for leaf in manifest["leaves"] if "key" in leaf}
    leaves = []
    for path, target in targets.items():
        array = arrays.get(path)
        if isinstance(array, int):
            raise CheckpointError(f"{path} is not in the files of {folder}, as its manifest says")
        if array is None:
            array = np.zeros(target.shape, np.uint32 if path in keys else target.dtype)
        if path in keys:
            leaves.append(_wrap(path, array, keys[path], target, folder))
            continue
        if array.shape != target.shape:
            raise CheckpointError(
                f"{path} is an array of {list(array.shape)} in {folder}, not of "
                f"{list(target.shape)} as its manifest says"
            )
        array = _cast(path, array, target.dtype)
        # Uncommitted if the template is, so that jit can place it on any mesh.
        leaves.append(array if isinstance(target, np.ndarray) else jnp.asarray(array))
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _wrap(path: str, data: Any, impl: str, target: Any, folder: Path) -> Any:
    """Return an array of random keys."""
    try:
        keys = jax.random.wrap_key_data(jnp.asarray(data), impl=impl)
        right = (keys.shape, keys.dtype) == (target.shape, target.dtype)
    except (TypeError, ValueError):
        right = False
    if not right:
        raise CheckpointError(
            f"{path} in {folder} has no random keys of {target.dtype}, as its manifest says"
        )
    return keys


def _cast(path: str, array: Any, dtype: Any) -> Any:
    if array.dtype == dtype:
        return array
    xp = jnp if isinstance(array, jax.Array) else np
    with np.errstate(over="ignore"):
        converted = array.astype(dtype)
    if xp.any(xp.isfinite(array) & ~xp.isfinite(converted)):
        largest = float(xp.max(xp.where(xp.isfinite(array), xp.abs(array), 0)))
        raise ValueError(f"{path} has values up to {largest:.3g}, which {dtype} cannot hold")
    return converted


def _restore_argument(leaf: Any) -> Any:
    import orbax.checkpoint as ocp

    sharding = getattr(leaf, "sharding", None)
    if sharding is None or not getattr(leaf, "committed", True):
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=sharding)
