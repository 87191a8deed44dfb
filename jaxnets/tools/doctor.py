"""Installation check: versions, devices, data sets, and two self-tests."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxnets
from jaxnets import data
from jaxnets.core import Update
from jaxnets.data.files import cache_folder
from jaxnets.host import usable_cores
from jaxnets.models.feedforward import MLP
from jaxnets.objectives.supervised import classification
from jaxnets.training.executors import jit_step
from jaxnets.training.initialization import initialize
from jaxnets.training.step import create_train_state, make_train_step

_PACKAGES = ("jaxnets", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")

#: Extra of this project -> the optional packages that it installs.
EXTRAS: Mapping[str, tuple[str, ...]] = {
    "pictures": ("matplotlib", "pillow"),
    "experiments": ("tyro", "jiwer", "sacrebleu"),
    "driving": ("gymnasium", "box2d", "pygame"),
    "docs": ("mkdocs-material", "mkdocstrings", "mkdocs-jupyter", "latex2mathml", "ruff"),
    "export": ("flatbuffers", "onnx", "onnxruntime"),
    "grain": ("grain",),
    "tensorboard": ("tensorboardX", "pillow"),
    "wandb": ("wandb",),
    "text": ("tokenizers",),
    "pretrained": ("pillow", "huggingface-hub"),
    "notebooks": ("jupyter-client", "nbclient", "ipykernel"),
    "parity": ("torch", "transformers", "safetensors", "librosa", "torchaudio"),
    "benchmark": (
        *("torch", "keras", "equinox", "transformers"),
        *("safetensors", "sentence-transformers"),
    ),
}

#: (package, version) -> its known bug and the remedy.
KNOWN_BAD: Mapping[tuple[str, str], str] = {
    ("jaxlib", "0.10.2"): (
        "computes wrong results on CPU without an error (jax issue 39103); "
        "install jax 0.10.1, or 0.12.0.1 or later on Python 3.12"
    ),
    ("jaxlib", "0.11.1"): (
        "copies the whole array for every small update inside a loop on CPU, slow but correct "
        "(jax issue 40101); install jax 0.12.0.1 or later"
    ),
}


@dataclasses.dataclass(frozen=True)
class Check:
    """Result of one self-test.

    Attributes:
        name: what it tests.
        error: the failure and the remedy; None if it passed.
        seconds: duration, compilation included.
    """

    name: str
    error: str | None
    seconds: float


@dataclasses.dataclass(frozen=True)
class Report:
    """Result of `examine`; prints as text.

    Attributes:
        versions: of Python and the packages; None for a package that is not installed.
        machine: processor, cores and memory.
        devices: one line for each device that JAX sees.
        settings: settings of JAX and environment variables.
        data: path of each data set, or how to get it.
        extras: for each extra, the packages that are missing.
        checks: the self-tests.
        problems: all that must be repaired before training, with the remedy.
    """

    versions: Mapping[str, str | None]
    machine: Mapping[str, str]
    devices: tuple[str, ...]
    settings: Mapping[str, str]
    data: Mapping[str, str]
    extras: Mapping[str, tuple[str, ...]]
    checks: tuple[Check, ...]
    problems: tuple[str, ...]

    @property
    def healthy(self) -> bool:
        """Whether there is no problem."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Return everything as a dict that `json.dumps` takes."""
        return {"healthy": self.healthy, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        sections: dict[str, Mapping[str, str]] = {
            "versions": {name: text or "not installed" for name, text in self.versions.items()},
            "machine": self.machine,
            "devices": {str(index): line for index, line in enumerate(self.devices)},
            "settings": self.settings,
            "data": self.data,
            "extras": {
                extra: f"missing {', '.join(missing)}; pip install 'jaxnets[{extra}]'"
                if missing
                else "present"
                for extra, missing in self.extras.items()
            },
            "self-tests": {
                check.name: f"{'FAILED' if check.error else 'passed'} in {check.seconds:.1f} s"
                for check in self.checks
            },
        }
        lines = []
        for title, rows in sections.items():
            width = max(map(len, rows))
            lines += [title, *(f"  {name:<{width}}  {value}" for name, value in rows.items()), ""]
        lines += [f"PROBLEM: {problem}" for problem in self.problems] or ["healthy"]
        return "\n".join(lines)


def examine() -> Report:
    """Check the installation, in some seconds and without network access.

    Returns:
        Report; problems are reported, never raised.
    """
    versions = {name: installed_version(name) for name in _PACKAGES}
    # A source checkout on the path has no metadata of an installation.
    versions["jaxnets"] = jaxnets.__version__
    checks = (
        _try("a training step runs and learns", _check_training),
        _try("compiled sums are exact", _check_sums),
    )
    return Report(
        versions={"python": platform.python_version(), **versions},
        machine=_machine(),
        devices=_devices(),
        settings=_settings(),
        data=_data(),
        extras={
            extra: tuple(name for name in names if installed_version(name) is None)
            for extra, names in EXTRAS.items()
        },
        checks=checks,
        problems=(
            *version_problems(versions),
            *(f"{check.name}: {check.error}" for check in checks if check.error),
        ),
    )


def installed_version(package: str) -> str | None:
    """Return the version of an installed package without importing it, None if there is none.

    Args:
        package: name as `pip` knows it.

    Example:
        >>> installed_version("no-such-package") is None
        True
    """
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def version_problems(versions: Mapping[str, str | None]) -> list[str]:
    """List missing packages and versions with known bugs.

    Args:
        versions: {package: version, or None if it is not installed}.

    Returns:
        One sentence for each missing package and known-bad version, with the remedy.

    Example:
        >>> version_problems({"jax": "0.12.0", "jaxlib": "0.12.0"})
        []
    """
    missing = [name for name, version in versions.items() if version is None]
    return [f"{name} is not installed; run `pip install {name}`" for name in missing] + [
        f"{package} {version} {problem}"
        for (package, version), problem in KNOWN_BAD.items()
        if versions.get(package) == version
    ]


def _try(name: str, check: Callable[[], str | None]) -> Check:
    began = time.perf_counter()
    try:
        error = check()
    except Exception as raised:  # any failure belongs into the report
        error = f"{type(raised).__name__}: {raised}"
    return Check(name, error, time.perf_counter() - began)


def _check_training() -> str | None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, size=32).astype(np.int32)
    inputs = np.eye(3, dtype=np.float32)[labels] + 0.1 * random.normal(size=(32, 3))
    batch = {"inputs": jnp.asarray(inputs, jnp.float32), "labels": jnp.asarray(labels)}
    module = MLP(features=(16,), num_outputs=3)
    update = Update(classification(module), optax.adam(0.1))
    key = jax.random.key(0)
    state = create_train_state(initialize(module, key, batch["inputs"]), update, rng=key)
    step = jit_step(make_train_step(update))
    losses = []
    for _ in range(10):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"].compute()))
    if math.isfinite(losses[-1]) and losses[-1] < losses[0]:
        return None
    return (
        f"the loss went from {losses[0]} to {losses[-1]} in ten steps; unset XLA_FLAGS, and "
        "install another version of jax if that does not help"
    )


def _check_sums() -> str | None:
    # Small integers, whose sums are exact in float32. At this size the compiler selects the
    # kernel that is wrong in jaxlib 0.10.2.
    rows = (np.arange(3 * 40_000) % 50).reshape(-1, 3)
    matrix = np.array([[1, 2, 0], [0, 1, 3], [2, 0, 1]])
    expected = ((rows @ matrix.T) ** 2).sum(axis=1)

    @jax.jit
    def squared_norms(matrix: jax.Array, rows: jax.Array) -> jax.Array:
        return jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2))(rows)

    actual = squared_norms(jnp.asarray(matrix, jnp.float32), jnp.asarray(rows, jnp.float32))
    wrong = int(np.sum(np.asarray(actual) != expected))
    if not wrong:
        return None
    return f"{wrong} of {len(rows)} are wrong; install another version of jax"


def _machine() -> dict[str, str]:
    facts = {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": f"{usable_cores()} usable of {os.cpu_count()}",
    }
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        facts["memory"] = _gibibytes(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return facts


def _devices() -> tuple[str, ...]:
    try:
        devices = jax.devices()
    except RuntimeError as error:
        return (f"none: {error}",)
    return tuple(_describe(device) for device in devices)


def _describe(device: jax.Device) -> str:
    limit = (device.memory_stats() or {}).get("bytes_limit")
    memory = f", {_gibibytes(limit)} for JAX" if limit else ""
    kind = "" if device.device_kind == device.platform else f" {device.device_kind}"
    return f"{device.platform}{kind}{memory}"


def _settings() -> dict[str, str]:
    config = jax.config.values
    off = "off; set JAX_COMPILATION_CACHE_DIR to reuse compiled programs between runs"
    settings = {
        "compilation cache": config["jax_compilation_cache_dir"] or off,
        "double precision": "on" if config["jax_enable_x64"] else "off",
    }
    for name in ("JAX_PLATFORMS", "XLA_FLAGS"):
        if os.environ.get(name):
            settings[name] = os.environ[name]
    folder = os.environ.get("JAXNETS_DATA")
    if folder:
        exists = Path(folder).expanduser().is_dir()
        settings["JAXNETS_DATA"] = folder if exists else f"{folder} (no such folder)"
    return settings


def _data() -> dict[str, str]:
    paths = {"digits": "comes with scikit-learn"}
    for name, folder in data.locate().items():
        remedy = f"not found; downloaded to {cache_folder()} on first use, or set JAXNETS_DATA"
        paths[name] = remedy if folder is None else str(folder)
    return paths


def _gibibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
