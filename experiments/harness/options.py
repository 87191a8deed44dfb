"""The options that every experiment has."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from experiments.harness.run_folder import RunError


@dataclasses.dataclass(frozen=True)
class Options:
    """How long, how many, with which optimizer, where to."""

    preset: str | None = None
    """Named recipe instead of the model's own; --help lists them."""
    epochs: float = 10.0
    """Passes over the training set."""
    steps: int | None = None
    """Training steps; overrides --epochs."""
    seeds: int = 1
    """Number of networks, trained at once as a population in one program."""
    seed: int = 0
    """Seed of the first network; the others count up from it."""
    executor: Literal["scan", "jit", "pmap", "sharded"] = "scan"
    """scan: many steps a dispatch; pmap, sharded: several devices."""
    steps_per_dispatch: int = 50
    """Steps in one dispatch of the scan executor."""
    batch_size: int = 128
    """Examples per step and network."""
    optimizer: Literal["adamw", "nesterov", "rmsprop", "lion", "muon", "relative_muon"] = "adamw"
    """sgd has Nesterov momentum 0.9; relative_muon is for convolutions behind which are norms."""
    learning_rate: float = 2e-3
    """Peak rate, after a linear warm-up; of relative_muon it is a share of each kernel's norm."""
    adam_share: float = 1.0
    """Share of the rate at which Adam trains what is no convolution (relative_muon)."""
    warmup: float = 0.15
    """Share of the steps in which the rate rises."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """What follows the warm-up: a cosine or a line down to --final-rate, or the peak rate."""
    final_rate: float = 0.0
    """Share of the peak rate at which the cosine or the line ends."""
    weight_decay: float = 0.05
    """Decoupled weight decay of kernels (adamw, lion, muon), or L2 penalty (sgd, rmsprop)."""
    beta2: float = 0.999
    """Decay of the average of squared gradients (adamw; what Muon leaves to Adam)."""
    clip: float = 0.0
    """Largest norm of the whole gradient; 0 is no limit."""
    average_decay: float = 0.0
    """Decay of the averaged parameters that are evaluated; 0 evaluates the last ones."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Dtype of matrix products and activations."""
    keep_freed_memory: bool = True
    """Keep freed memory in the process: faster steps on CPU, see jaxnets.keep_freed_memory."""
    log_every: int = 50
    """Steps between rows of the log."""
    eval_every: int | None = None
    """Steps between evaluations on held-out data, for the curves only; by default once an epoch."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; by default once an epoch."""
    tensorboard: bool = False
    """Write TensorBoard event files into the run folder too: numbers, pictures, histograms."""
    data: Path | None = None
    """Folder of the data set; by default it is searched for (see `python -m jaxnets doctor`)."""
    out: Path = Path("runs")
    """Folder of this run."""
    resume: bool = False
    """Continue an unfinished run."""


#: Numbers with a fraction that must not be 0; of the others 0 means "none".
_POSITIVE = ("epochs", "learning_rate")


def check(options: Options) -> None:
    """Refuse numbers that make no run.

    Raises:
        RunError: naming the option and what it may be.
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
