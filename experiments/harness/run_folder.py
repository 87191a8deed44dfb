"""The folder of a run: its configuration, its state on disk, its result.

config.json     every option with its value
metrics.jsonl   one row per logged step
checkpoints/    training states; a resumed run starts from the latest
*.png           figures
report.html     everything on one page
result.json     written last: its presence marks a finished run
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import jax

#: Options that do not affect the result; a run may be resumed with other values.
NOT_PART_OF_THE_RUN = (
    *("out", "resume", "data", "checkpoint_every", "keep_freed_memory", "tensorboard", "workers"),
    "keep_memory",  # keep_freed_memory in folders of runs that began before its name changed
)


class RunError(Exception):
    """A run cannot be started or resumed; the message states the remedy."""


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

    def open(self, config: Any, *, resume: bool) -> dict[str, Any] | None:
        """Start or resume a run, or read its result.

        Args:
            config: dataclass of options.
            resume: continue an unfinished run.

        Returns:
            The result if the run is finished, else None.

        Raises:
            RunError: the folder contains another run, or an unfinished one without `resume`, or
                is not writable.
        """
        options = to_json(config)
        stored = self._read("config.json")
        if stored is not None:
            self._refuse_another_run(stored, options)
            result = self._read("result.json")
            if result is not None:
                return result
            if not resume and any(self.checkpoints.glob("*")):
                raise RunError(
                    f"{self.path} contains an unfinished run; continue it with --resume, or choose "
                    "another folder with --out"
                )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.write("config.json", options)
        except OSError as error:
            raise RunError(
                f"cannot write to {self.path}: {error.strerror}; choose another --out"
            ) from error
        return None

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON file atomically."""
        temporary = self.path / f"{name}.new"
        with temporary.open("w") as file:
            json.dump(content, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path / name)

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            return json.loads((self.path / name).read_text())
        except FileNotFoundError:
            return None
        except NotADirectoryError as error:
            raise RunError(f"{self.path} is a file; choose another --out") from error
        except ValueError as error:
            raise RunError(
                f"{self.path / name} is not valid JSON ({error}); remove the folder, or choose "
                "another --out"
            ) from error

    def _refuse_another_run(self, stored: dict[str, Any], options: dict[str, Any]) -> None:
        for name in sorted((stored.keys() | options.keys()) - set(NOT_PART_OF_THE_RUN)):
            if stored.get(name) != options.get(name):
                raise RunError(
                    f"{self.path} contains a run with {name} = {stored.get(name)!r}, not "
                    f"{options.get(name)!r}; choose another folder with --out"
                )


def to_json(config: Any) -> dict[str, Any]:
    """Return the options of a dataclass as JSON values."""
    plain = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in dataclasses.asdict(config).items()
    }
    return json.loads(json.dumps(plain))


def environment() -> dict[str, Any]:
    """Return what a result depends on besides the code: command, versions, devices."""
    import flax
    import optax

    return {
        "command": " ".join(["python -m", _module_name(), *sys.argv[1:]]),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "optax": optax.__version__,
        "devices": [str(device.device_kind) for device in jax.devices()],
        "cpu_cores": os.cpu_count(),
    }


def _module_name() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).stem
