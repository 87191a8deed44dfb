"""The readers of runs and their parts, with small valid files for them; see `mutated_readers`."""

from __future__ import annotations

import contextlib
import hashlib
import html
import json
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from checkpoint_problem import make_state, raw, source, train_step
from mutations import Reader, reader, write, written
from tiny_run import TINY

from experiments.harness.run_folder import RunError, RunFolder
from jaxnets.tools.comparison import compare, read_run
from jaxnets.tools.report import write_report
from jaxnets.tools.results import Result, write_result
from jaxnets.training import checkpoint
from jaxnets.training.history import History
from jaxnets.training.hooks import Checkpointing, resume
from jaxnets.training.loop import fit
from jaxnets.training.writers import jsonl_writer

_STATE = {
    "kernel": jnp.arange(12.0).reshape(3, 4),
    "bias": jnp.ones(4, jnp.bfloat16),
    "step": jnp.int32(7),
}


@reader
def saved_state() -> Iterator[Reader]:
    template = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), _STATE)
    yield Reader(
        written(lambda folder: checkpoint.save(folder, _STATE, step=7, metadata={"a": [1]})),
        lambda folder: checkpoint.restore(folder, template),
    )


def _train(folder: Path) -> None:
    """Write the log and the checkpoints of steps 4 and 5."""
    fit(
        train_step,
        make_state(),
        source,
        num_steps=5,
        log_every=1,
        hooks=[Checkpointing(folder / "checkpoints", every=2, keep=2)],
        writers=[jsonl_writer(folder / "metrics.jsonl")],
    )


def _plain(state: Any, history: History) -> tuple[int, bytes, list[Any], dict[str, Any]]:
    """Return step and bits of a state, the rows and the sums of a history."""
    bits = b"".join(raw(leaf).tobytes() for leaf in jax.tree.leaves(state))
    content = history.to_json()
    return int(state.step), bits, content["rows"], content["sums"]


def _resumed(folder: Path) -> tuple[int, bytes, list[Any], dict[str, Any]]:
    """Resume; what is not the last state with all of its rows must come with a warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = _plain(*resume(folder, make_state(7)))
    if found[0] != 5 or len(found[2]) != 5:
        assert any(str(folder) in str(each.message) for each in caught)
    return found


class _Checkpoints:
    """What the two checkpoints of `_train` hold, and the check of what was resumed."""

    def __init__(self, contents: dict[str, bytes]) -> None:
        self._found = {}
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), contents)
            for step in (4, 5):
                state, metadata = checkpoint.restore(folder, make_state(7), step=step)
                self._found[step] = _plain(state, History.from_json(metadata["history"]))

    def check(self, value: tuple[int, bytes, list[Any], dict[str, Any]]) -> None:
        _, bits, rows, sums = self._found[value[0]]
        assert value[1] == bits and value[3] == sums
        assert value[2] == rows[: len(value[2])]


def _below(contents: dict[str, bytes], folder: str) -> dict[str, bytes]:
    return {
        name.removeprefix(folder): content
        for name, content in contents.items()
        if name.startswith(folder)
    }


@reader
def checkpoints_of_a_run() -> Iterator[Reader]:
    contents = _below(written(_train), "checkpoints/")
    known = _Checkpoints(contents)
    yield Reader(contents, _resumed, lambda value, _: known.check(value))


def _fix_checkpoints(contents: dict[str, bytes]) -> dict[str, bytes]:
    """Make every digest fit: of the files of arrays and of rows, and of the manifests."""
    fixed = dict(contents)
    for name, content in contents.items():
        folder, _, last = name.rpartition("/")
        if last != "manifest.json":
            continue
        body = content.partition(b"\n")[2]
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            manifest = json.loads(body)
            for file in manifest["files"]:
                if (path := f"{folder}/{file}") in contents:
                    manifest["files"][file] = hashlib.sha256(contents[path]).hexdigest()
            for part in manifest["rows"]:
                lines = contents[part["file"]][: part["bytes"]].splitlines(keepends=True)
                digest = ""
                for line in lines:
                    digest = hashlib.sha256(digest.encode() + line).hexdigest()
                last_digest = hashlib.sha256(lines[-1]).hexdigest()
                part |= {"sha256": digest, "last": last_digest, "rows": len(lines)}
            body = json.dumps(manifest).encode()
        fixed[name] = hashlib.sha256(body).hexdigest().encode() + b"\n" + body
    return fixed


@reader
def checkpoints_whose_digests_fit() -> Iterator[Reader]:
    contents = _below(written(_train), "checkpoints/")
    specs = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(make_state())]

    def read(folder: Path) -> Any:
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            state, history = resume(folder, make_state())
            checkpoint.best_steps(folder, "loss", "min")
        leaves = jax.tree.leaves(state)
        return [(leaf.shape, leaf.dtype) for leaf in leaves], history.to_json()["rows"]

    def check(value: Any, _: dict[str, bytes]) -> None:
        assert value[0] == specs
        assert all(type(row["step"]) is int for row in value[1])

    yield Reader(contents, read, check, _fix_checkpoints)


@reader
def log() -> Iterator[Reader]:
    contents = {"metrics.jsonl": written(_train)["metrics.jsonl"]}
    contents["metrics.jsonl"] += b'{"step": 6, "loss": null, "test/accuracy": 0.5}\n'

    def check(page: str, contents: dict[str, bytes]) -> None:
        rows = [json.loads(line) for line in contents["metrics.jsonl"].split(b"\n") if line.strip()]
        assert all(type(row["step"]) is int for row in rows)
        names = [name for row in rows for name, value in row.items() if value is not None]
        for name in {name for name in names if name != "step" and names.count(name) > 1}:
            assert html.escape(name.rsplit("/", 1)[-1]) in page  # a curve

    def read(folder: Path) -> str:
        return write_report(folder).read_text()

    yield Reader(contents, read, check)


@reader
def results() -> Iterator[Reader]:
    def make(folder: Path) -> None:
        for name, values in (("one", [0.5, 0.75, np.nan]), ("two", [0.25, 0.5])):
            write_result(folder / name, dataset="digits", metric="accuracy", values=values, steps=3)

    def read(folder: Path) -> Any:
        runs = [read_run(folder / name) for name in ("one", "two")]
        compare(runs)
        pages = [write_report(folder / name).read_text() for name in ("one", "two")]
        return [(run.values, page) for run, page in zip(runs, pages, strict=True)]

    contents = written(make)
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        known = read(Path(folder))

    def check(value: Any, contents: dict[str, bytes]) -> None:
        for run, content in zip(value, contents.values(), strict=True):
            file = json.loads(content)
            assert run[0] == tuple(each for each in file["values"] if each is not None)
            assert run in known or "sha256" not in file  # one file may be another

    yield Reader(contents, read, check)


@reader
def run_folder() -> Iterator[Reader]:
    def make(folder: Path) -> None:
        run = RunFolder(folder)
        run.check("digits", TINY, resume=False, other_code=False)
        run.open("digits", TINY, data="a digest", kind=Result)
        _train(folder)

    contents = written(make)
    known = _Checkpoints(_below(contents, "checkpoints/"))

    def read(folder: Path) -> Any:
        run = RunFolder(folder)
        with run.locked():
            try:
                run.check("digits", TINY, resume=True, other_code=False)
                assert run.open("digits", TINY, data="a digest", kind=Result) is None
            except RunError as error:
                raise ValueError(str(error)) from error
            found = _resumed(run.checkpoints)
        write_report(folder)
        return found

    yield Reader(contents, read, lambda value, _: known.check(value))
