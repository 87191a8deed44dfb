"""An encoder of audio frames, such as those of a log-mel spectrogram."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax

from jaxnets.checks import check_sizes
from jaxnets.core import Precision, record
from jaxnets.functional.lengths import mean_over_time
from jaxnets.layers import Dense, Dropout
from jaxnets.layers.subsampling import subsample
from jaxnets.models.transformer.config import BlockConfig
from jaxnets.models.transformer.embeddings import PositionEmbedding
from jaxnets.models.transformer.stack import Stack


class AudioTransformer(nn.Module):
    """Convolutional subsampling, transformer blocks, and the mean over time.

    Attributes:
        num_outputs: size of the output.
        num_layers: number of blocks.
        config: options of the blocks.
        strides: of each convolution along time.
        max_length: number of learned positions, in steps after the convolutions; no limit with
            other kinds.
        precision: dtypes.

    Raises:
        ValueError: a field is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> config = BlockConfig(features=16, positions="sinusoidal")
        >>> module = AudioTransformer(num_outputs=3, num_layers=2, config=config)
        >>> frames, lengths = jnp.ones((2, 20, 8)), jnp.array([20, 9])
        >>> module.apply(module.init(jax.random.key(0), frames), frames, lengths).shape
        (2, 3)

    References:
        Radford et al. 2022, arXiv:2212.04356, section 2.2 (convolutions with GELU before the
        encoder); Gong, Chung and Glass 2021, arXiv:2104.01778 (classification).
    """

    num_outputs: int = 10
    num_layers: int = 4
    config: BlockConfig = BlockConfig(positions="sinusoidal")
    strides: Sequence[int] = (2, 2)
    max_length: int = 1024
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        check_sizes(num_outputs=self.num_outputs, strides=self.strides, max_length=self.max_length)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, inputs: jax.Array, lengths: jax.Array | None = None, *, train: bool = False
    ) -> jax.Array:
        """Map [batch, frames, channels] to [batch, num_outputs]; records "features".

        Args:
            inputs: the frames; those beyond the lengths have no influence.
            lengths: integer [batch] in [0, frames]; by default all frames count.
            train: training mode.

        Raises:
            ValueError: inputs or lengths that do not fit.
        """
        config, policy = self.config, self.precision
        x, lengths = subsample(
            inputs,
            lengths,
            caller=self,
            features=config.features,
            strides=self.strides,
            activation_name="gelu",
            kernel_init=nn.initializers.lecun_normal(),
            precision=policy,
        )
        x = PositionEmbedding(config, self.max_length, policy, name="position")(x)
        x = Dropout(config.dropout_rate, name="dropout")(x, train=train)
        x = Stack(config, self.num_layers, precision=policy, name="stack")(x, lengths, train=train)
        x = mean_over_time(x, lengths)
        record(self, "features", x)
        init = config.kernel_init()
        head = Dense(self.num_outputs, kernel_init=init, precision=policy, name="head")
        return head(x).astype(policy.output)
