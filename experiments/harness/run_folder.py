"""The folder of a run: which run it is, its state on disk, its result.

config.json     experiment, code, data, and every option with its value
metrics.jsonl   one row per logged step
checkpoints/    training states; a resumed run starts from the latest
process_N.log   what process N of --processes printed; process 0 prints for all
*.png           figures
report.html     everything on one page
result.json     written last: its presence marks a finished run
.lock           while a process holds the folder
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

import jax

from experiments.harness.identity import code_version
from jaxnets.storage import FolderInUseError, lock_folder, read_json, write_json

#: Options that do not affect the result; a run may be resumed with other values.
NOT_PART_OF_THE_RUN = (
    *("out", "resume", "data", "checkpoint_every", "keep_freed_memory", "tensorboard", "workers"),
    *("other_code", "on_non_finite", "processes"),
)
_REMEDY = "remove the folder, or choose another with --out"


class RunError(Exception):
    """A run cannot be started or resumed; the message states the remedy."""


class Config(TypedDict):
    """The content of `config.json`.

    Attributes:
        experiment: its name.
        code: version of the code, see `code_version`, at the start and at every resumption with
            other code.
        data: digest of the data; None if the options determine them.
        options: {name: value}.
    """

    experiment: str
    code: list[dict[str, str]]
    data: str | None
    options: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """A run's folder on disk.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """The log: one JSON object per logged step."""
        return self.path / "metrics.jsonl"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder, so that no other process resumes the run.

        Raises:
            RunError: the folder is in use, is a file, or is not writable.
        """
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(lock_folder(self.path))
            except FolderInUseError as error:
                raise RunError(str(error)) from error
            except (FileExistsError, NotADirectoryError) as error:
                raise RunError(f"{self.path} is a file; choose another --out") from error
            except OSError as error:
                raise RunError(
                    f"cannot write to {self.path}: {error.strerror}; choose another --out"
                ) from error
            yield

    def check(self, experiment: str, options: Any, *, resume: bool, other_code: bool) -> None:
        """Compare a run with the one in the folder, without the data.

        Args:
            experiment: name.
            options: dataclass.
            resume: continue an unfinished run.
            other_code: accept a run that began with other code.

        Raises:
            RunError: the folder contains another run, one that nothing describes, or an unfinished
                one without `resume`.
            ValueError: `config.json` is damaged.
        """
        config = self.config()
        if config is None:
            remains = [name for name in ("result.json", "metrics.jsonl") if self._has(name)]
            remains += ["checkpoints"] if any(self.checkpoints.glob("*")) else []
            if remains:
                raise RunError(
                    f"{self.path} has {' and '.join(remains)}, but no config.json, which says of "
                    f"which run; put it back, {_REMEDY}"
                )
            return
        self._compare("experiment", config["experiment"], experiment)
        stored, given = config["options"], to_json(options)
        for name in sorted((stored.keys() | given.keys()) - set(NOT_PART_OF_THE_RUN)):
            self._compare(name, stored.get(name), given.get(name))
        if self._begun() and not other_code:
            last, now = config["code"][-1], code_version()
            for name in sorted(last.keys() | now.keys()):
                if last.get(name) != now.get(name):
                    raise RunError(
                        f"{self.path} contains a run of other code ({name} = {last.get(name)}, now "
                        f"{now.get(name)}); choose another folder with --out, or take it as it is "
                        "with --other-code"
                    )
        if self._begun() and not resume and not self._has("result.json"):
            raise RunError(
                f"{self.path} contains an unfinished run; continue it with --resume, or choose "
                "another folder with --out"
            )

    def open(
        self, experiment: str, options: Any, *, data: str | None, kind: type[Any]
    ) -> dict[str, Any] | None:
        """Start or resume the run, or read its result; after `check`.

        Args:
            experiment: name.
            options: dataclass.
            data: digest of the data.
            kind: type of the result, a `TypedDict`.

        Returns:
            The result if the run is finished, else None.

        Raises:
            RunError: the folder contains a run on other data.
            ValueError: `result.json` is damaged or not that of this experiment.
        """
        config = self.config()
        code = []
        if config is not None and self._begun():
            self._compare("data (sha256)", config["data"], data)
            if self._has("result.json"):
                return self.result(experiment, kind)
            code = config["code"]
        now = dict(code_version())
        if not code or code[-1] != now:
            code = [*code, now]
        new = Config(experiment=experiment, code=code, data=data, options=to_json(options))
        self.write("config.json", new)
        return None

    def config(self) -> Config | None:
        """Return what `config.json` says; None if there is none."""
        try:
            document = read_json(
                self.path / "config.json", what="the configuration of a run", remedy=_REMEDY
            )
        except FileNotFoundError:
            return None
        config = document.check(Config)
        if not config["code"]:
            raise document.error("it has no version of the code", key="code")
        return config

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file atomically, with a digest."""
        write_json(self.path / name, content)

    def is_finished(self) -> bool:
        """Return whether the run has a result."""
        return self._has("result.json")

    def result(self, experiment: str, kind: type[Any]) -> dict[str, Any]:
        """Read the result of a finished run.

        Args:
            experiment: name.
            kind: type of the result, a `TypedDict`.

        Raises:
            ValueError: `result.json` is damaged or not that of this experiment.
        """
        document = read_json(
            self.path / "result.json",
            what="the result of a run",
            remedy="remove it, and finish the run again with --resume",
        )
        result = document.check(kind)
        found = document.content.get("experiment")
        if found != experiment:
            raise document.error(f"experiment is {found!r}, not {experiment!r}", key="experiment")
        return dict(result)

    def _begun(self) -> bool:
        """Return whether the folder has anything that another run must not go on with."""
        return self._has("result.json") or any(self.checkpoints.glob("*"))

    def _has(self, name: str) -> bool:
        return (self.path / name).exists()

    def _compare(self, name: str, stored: Any, given: Any) -> None:
        if stored != given:
            raise RunError(
                f"{self.path} contains a run with {name} = {stored!r}, not {given!r}; choose "
                "another folder with --out"
            )


def to_json(config: Any) -> dict[str, Any]:
    """Return the options of a dataclass as JSON values."""
    plain = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in dataclasses.asdict(config).items()
    }
    return json.loads(json.dumps(plain))


def environment() -> dict[str, Any]:
    """Return what a result depends on besides the options: command, code, versions, devices."""
    return {
        "command": " ".join(["python -m", _module_name(), *sys.argv[1:]]),
        "python": platform.python_version(),
        **code_version(),
        "devices": [str(device.device_kind) for device in jax.devices()],
        "cpu_cores": os.cpu_count(),
    }


def _module_name() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).stem
