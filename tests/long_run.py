"""A training of hours in a process of its own: `long_run.py FOLDER SECONDS SHARE`.

It has all that could grow: checkpoints with the best ones, a log, validation, rows of the history,
prefetched batches. Every minute it appends a line to FOLDER/samples.jsonl. It uses at most SHARE of
one core, so that other work goes on. `growth` and `faults` judge the samples; in them `cpu_steps`
is the processor time of a step over that of the step alone.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import jaxnets as jn

#: The largest growth in percent an hour. One array, descriptor or thread more an hour is beyond it,
#: or a file that every tenth save leaves behind.
BOUNDS = {
    "memory_mb": 2.0,
    "live_arrays": 0.5,
    "descriptors": 3.0,
    "threads": 3.0,
    "folder_mb": 5.0,
    "cpu_steps": 10.0,
}
GROWING = ("cpu_ms", "wall_ms", "rows_mb", "log_mb")  # by design, or with the other work
EVERY = 500  # steps between rows and validations
SAVE_EVERY = 10 * EVERY
STEPS_ALONE = 200  # without hooks and batches, at every sample
WARM_UP = 0.1  # share of the samples that is left out
MEGABYTE = 1e6


def growth(samples: Sequence[Mapping[str, float]], name: str) -> tuple[float, float, float]:
    """Fit a line to a value, without the warm-up.

    Returns:
        The mean, the growth an hour, and the growth an hour in percent of the mean.
    """
    steady = samples[int(WARM_UP * len(samples)) :]
    hours = [sample["seconds"] / 3600 for sample in steady]
    values = [sample[name] for sample in steady]
    mean, slope = float(np.mean(values)), float(np.polyfit(hours, values, 1)[0])
    return mean, slope, 100 * slope / mean


def faults(samples: Sequence[Mapping[str, float]]) -> list[str]:
    """Return a sentence on each value that grows by more than its bound."""
    found = {name: growth(samples, name)[2] for name in BOUNDS}
    return [
        f"{name} grows by {percent:.2f}% an hour, more than {BOUNDS[name]}%"
        for name, percent in found.items()
        if not percent <= BOUNDS[name]
    ]


class Sampling:
    """A hook that samples the process every `interval` seconds, rests, and ends the training."""

    def __init__(
        self,
        folder: Path,
        step_alone: Callable[[], Any],
        *,
        seconds: float,
        share: float,
        interval: float,
    ) -> None:
        self._folder, self._step_alone = folder, step_alone
        self._seconds, self._share, self._interval = seconds, share, interval

    def start(self, history: jn.History, step: int) -> None:
        self._history = history
        self._began = self._last = time.perf_counter()
        self._called = self._sampled = (step, self._last, time.process_time())

    def __call__(self, step: int, state: Any, metrics: Mapping[str, Any]) -> None:
        _, wall, cpu = self._called
        rest = (time.process_time() - cpu) / self._share - (time.perf_counter() - wall)
        time.sleep(max(rest, 0.0))
        self._called = (step, time.perf_counter(), time.process_time())
        if self._called[1] - self._began > self._seconds:
            raise jn.StopTraining("the time is over")

    def commit(self, step: int, state: Any, *, last: bool) -> None:
        now = time.perf_counter()
        # At these steps as many metrics are queued each time.
        if step % EVERY or now - self._last < self._interval:
            return
        self._last = now
        jax.block_until_ready(state)
        began = time.process_time()
        steps, wall, cpu = np.subtract((step, now, began), self._sampled)
        for _ in range(STEPS_ALONE):  # other work of the machine slows both
            jax.block_until_ready(self._step_alone())
        alone = (time.process_time() - began) / STEPS_ALONE
        with (self._folder / "samples.jsonl").open("a") as file:
            sample = {
                "seconds": round(now - self._began, 1),
                "step": step,
                "memory_mb": memory_bytes() / MEGABYTE,
                "live_arrays": len(jax.live_arrays()),
                "descriptors": len(os.listdir("/proc/self/fd")),
                "threads": len(os.listdir("/proc/self/task")),
                **folder_sizes(self._folder),
                "rows": len(self._history.rows),
                "rows_mb": sum(map(row_bytes, self._history.rows)) / MEGABYTE,
                "cpu_steps": cpu / steps / alone,
                "cpu_ms": 1000 * cpu / steps,
                "wall_ms": 1000 * wall / steps,
            }
            file.write(json.dumps(sample) + "\n")
        self._sampled = (step, time.perf_counter(), time.process_time())


def memory_bytes() -> int:
    """Return the resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def row_bytes(row: Mapping[str, Any]) -> int:
    """Return the memory of a row of numbers."""
    return sys.getsizeof(row) + sum(map(sys.getsizeof, (*row.keys(), *row.values())))


def folder_sizes(folder: Path) -> dict[str, float]:
    """Return the size of the files of rows, which grow by design, and of all others."""
    sizes = {True: 0, False: 0}
    for path in folder.rglob("*"):
        if path.is_file():
            sizes[path.suffix == ".jsonl"] += path.stat().st_size
    return {"folder_mb": sizes[False] / MEGABYTE, "log_mb": sizes[True] / MEGABYTE}


def main(folder: Path, seconds: float, share: float) -> None:
    digits = jn.data.digits()
    parts = [
        {**part, "inputs": (part["inputs"] / 255).astype(np.float32)}
        for part in (digits.train, digits.test)
    ]
    module = jn.ConvNet((8, 16), hidden_features=(32,), norm="batch", dropout_rate=0.2)
    objective = jn.classification(module)
    update = jn.Update(objective, jn.with_parameter_average(optax.adam(1e-3), decay=0.99))
    key = jax.random.key(0)
    variables = jn.initialize(module, key, parts[0]["inputs"][:1])
    step = jn.jit_step(jn.make_train_step(update))
    first = jn.create_train_state(variables, update, rng=key)
    batch = {name: array[:32] for name, array in parts[0].items()}
    test = jn.data.sequential_batches(parts[1], 90)
    hooks = [
        jn.every(EVERY, jn.validation(jn.make_eval_step(objective), test)),
        jn.Checkpointing(
            folder / "checkpoints", every=SAVE_EVERY, keep=2, best=("validation/accuracy", "max")
        ),
        Sampling(
            folder,
            lambda: step(first, batch),
            seconds=seconds,
            share=share,
            interval=min(60.0, seconds / 20),
        ),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    _, history = jn.fit(
        step,
        first,
        jn.data.prefetch(jn.data.shuffled_batches(parts[0], 32, seed=0)),
        num_steps=10**9,
        hooks=hooks,
        writers=[jn.jsonl_writer(folder / "metrics.jsonl")],
        log_every=EVERY,
    )
    accuracy = history.column("validation/accuracy")[1][-1]
    jn.write_result(folder, dataset="digits", metric="accuracy", values=[accuracy], history=history)
    jn.write_report(folder)
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    for name in (*BOUNDS, *GROWING):
        mean, slope, percent = growth(samples, name)
        print(f"{name}: mean {mean:.4g}, growth {slope:.3g} an hour ({percent:.2f}%)")
    sys.exit("\n".join(faults(samples)))  # 0 if there are none


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))
