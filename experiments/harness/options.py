"""The options that every experiment has."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from experiments.harness.run_folder import RunError


@dataclasses.dataclass(frozen=True)
class Options:
    """Length, number of networks, optimizer, and output of a run."""

    preset: str | None = None
    """Recipe to use instead of the model's own; its names are above."""
    epochs: float = 10.0
    """Passes over the training set."""
    steps: int | None = None
    """Training steps; overrides --epochs."""
    seeds: int = 1
    """Number of networks, trained together as a population in one compiled program."""
    seed: int = 0
    """Seed of the first network; the others count up from it."""
    executor: Literal["scan", "jit", "pmap", "sharded"] = "scan"
    """scan runs many steps per dispatch; pmap and sharded use several devices."""
    processes: int = 1
    """Processes on this machine that train together (sharded); each has its own devices."""
    steps_per_dispatch: int = 50
    """Steps per dispatch of the scan executor."""
    batch_size: int = 128
    """Examples per step and network."""
    optimizer: Literal["adamw", "nesterov", "rmsprop", "lion", "muon", "relative_muon"] = "adamw"
    """nesterov: SGD with momentum 0.9; relative_muon: for convolutions followed by norms."""
    learning_rate: float = 2e-3
    """Peak learning rate after a linear warm-up; relative_muon: relative to each kernel's norm."""
    adam_share: float = 1.0
    """Adam's learning rate over --learning-rate, for all but convolutions (relative_muon)."""
    warmup: float = 0.15
    """Fraction of the steps in which the learning rate rises."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate after the warm-up: cosine or linear decay to --final-rate, or the peak."""
    final_rate: float = 0.0
    """Learning rate at the end of the decay, as a fraction of the peak."""
    weight_decay: float = 0.05
    """Decoupled weight decay of kernels (adamw, lion, muon), or L2 penalty (nesterov, rmsprop)."""
    beta2: float = 0.999
    """Decay of the second moment (adamw; parameters that the two kinds of Muon leave to Adam)."""
    clip: float = 0.0
    """Maximum global norm of the gradient; 0 disables clipping."""
    average_decay: float = 0.0
    """Decay of the moving average of the parameters; 0 disables it. The average is evaluated, with
    running statistics of batch norms that are computed for it, from 50 training batches."""
    on_non_finite: Literal["stop", "freeze"] = "stop"
    """A network that diverges stops the run, or freezes: it has no result, the others go on."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Dtype of matrix products and activations."""
    keep_freed_memory: bool = True
    """Call jaxnets.keep_freed_memory: faster steps on CPU."""
    log_every: int = 50
    """Steps between rows of the log."""
    eval_every: int | None = None
    """Steps between evaluations on held-out data, for the curves; by default one epoch."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; by default one epoch."""
    tensorboard: bool = False
    """Also write TensorBoard event files: scalars, images, histograms."""
    data: Path | None = None
    """Folder of the data set; `python -m jaxnets doctor` shows where it is searched by default."""
    out: Path = Path("runs")
    """Folder of this run."""
    resume: bool = False
    """Continue an unfinished run."""
    other_code: bool = False
    """Go on with a run that began with other code, or take its result."""


#: Floating-point options that must not be 0; in the others 0 disables something.
_POSITIVE = ("epochs", "learning_rate")


def check(options: Options) -> None:
    """Check that every numeric option is in its range.

    Raises:
        RunError: an option out of range; the message names it and its range.
    """
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        flag = field.name.replace("_", "-")
        may_be_zero = field.default == 0 if isinstance(value, int) else field.name not in _POSITIVE
        if may_be_zero and not value >= 0:
            raise RunError(f"--{flag} is {value}; give 0 or more")
        if not may_be_zero and not value > 0:
            raise RunError(f"--{flag} is {value}; give a number above 0")
