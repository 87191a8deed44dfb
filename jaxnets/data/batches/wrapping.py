"""What a source around another source says about its batches."""

from __future__ import annotations

import dataclasses

from jaxnets.core import BatchSource, is_endless, steps_per_batch


@dataclasses.dataclass(frozen=True, eq=False)
class AroundSource:
    """Batches made of those of another source, of which it has the end and the steps per batch.

    Attributes:
        source: the source of the batches.
    """

    source: BatchSource

    @property
    def endless(self) -> bool:
        """Whether the source has no end."""
        return is_endless(self.source)

    @property
    def steps_per_batch(self) -> int:
        """Steps per batch of the source."""
        return steps_per_batch(self.source)
