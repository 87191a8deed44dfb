"""Batches of sentences of similar length, for the experiments on sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax

import jaxnets as jn
from experiments.harness.problem import Problem


class SentenceProblem(Problem):
    """A problem whose options include `buckets`; its batch_size counts sentences.

    A subclass sets the attributes in its constructor.

    Attributes:
        train: encoded examples, for `jaxnets.data.bucketed_batches`.
        tokens_per_batch: tokens of a training batch, padding included.
        tokens_per_pass: tokens of an evaluation batch, padding included.
    """

    config: Any
    train: Sequence[Any]
    tokens_per_batch: int
    tokens_per_pass: int

    def member_source(self, seed: int) -> jn.BatchSource:
        config = self.config
        return jn.data.bucketed_batches(
            self.train,
            tokens_per_batch=self.tokens_per_batch,
            seed=seed,
            num_buckets=config.buckets,
            batch_multiple=_multiple() if config.executor in ("pmap", "sharded") else 1,
            steps_per_shape=config.steps_per_dispatch if config.executor == "scan" else 1,
        )

    def one_pass(self, examples: Sequence[Any]) -> list[jn.Batch]:
        """Return batches that contain each encoded example once, with their "indices"."""
        source = jn.data.bucketed_pass(
            examples, tokens_per_batch=self.tokens_per_pass, num_buckets=self.config.buckets
        )
        return list(source(0))


def _multiple() -> int:
    """Return what the sizes of batches are multiples of: the same on 1, 2, 4 and 8 devices."""
    return math.lcm(8, jax.device_count())
