"""An experiment of a few seconds."""

import dataclasses

from experiments.classification import Config, ImageClassification
from experiments.harness.training import run
from jaxnets.data import digits

TINY = Config(
    model="mlp",
    steps=20,
    batch_size=32,
    steps_per_dispatch=5,
    log_every=5,
    eval_every=10,
    checkpoint_every=10,
)


def tiny(out, **changes):
    config = dataclasses.replace(TINY, out=out, **changes)
    return run("digits", config, lambda config: ImageClassification(config, digits()))
