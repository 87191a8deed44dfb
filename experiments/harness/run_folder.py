"""The folder of a run: its configuration, its state on disk, its result.

config.json     every option, as resolved
metrics.jsonl   one row per logged step
checkpoints/    what a resumed run starts from
*.png           figures
report.html     all of it on one page
result.json     written last; a folder that has it is finished
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

#: Options that say where or how a run is computed, not what it computes.
NOT_PART_OF_THE_RUN = (
    *("out", "resume", "data", "checkpoint_every", "keep_freed_memory", "tensorboard", "workers"),
)


class RunError(Exception):
    """A run that cannot be started or continued as asked; its text says what to do."""


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
        """The log, one JSON row per logged step."""
        return self.path / "metrics.jsonl"

    def open(self, config: Any, *, resume: bool) -> dict[str, Any] | None:
        """Begin, continue or recognize a run.

        Args:
            config: dataclass of options.
            resume: continue an unfinished run.

        Returns:
            The result if the run is finished, else None.

        Raises:
            RunError: the folder holds another run, or an unfinished one without `resume`, or
                cannot be written.
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
                    f"{self.path} holds an unfinished run; go on with --resume, or choose "
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
        """Write a JSON file atomically: whole or not at all."""
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
                f"{self.path / name} is not readable JSON ({error}); remove the folder, or choose "
                "another --out"
            ) from error

    def _refuse_another_run(self, stored: dict[str, Any], options: dict[str, Any]) -> None:
        for name in sorted((stored.keys() | options.keys()) - set(NOT_PART_OF_THE_RUN)):
            if stored.get(name) != options.get(name):
                raise RunError(
                    f"{self.path} holds a run with {name} = {stored.get(name)!r}, not "
                    f"{options.get(name)!r}; choose another folder with --out"
                )


def to_json(config: Any) -> dict[str, Any]:
    """Return the options of a dataclass as JSON can hold them."""
    plain = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in dataclasses.asdict(config).items()
    }
    return json.loads(json.dumps(plain))


def environment() -> dict[str, Any]:
    """Return what a number depends on besides the code: command, versions, device."""
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
