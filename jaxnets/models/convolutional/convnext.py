"""ConvNeXt of Liu et al. 2022: a residual network of depthwise convolutions, after transformers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax

from jaxnets.checks import IMAGES_OR_AUDIO, check_rank, check_rate, check_sizes
from jaxnets.core import Precision, record
from jaxnets.functional.activations import Activation, activation
from jaxnets.functional.channels import along_channels
from jaxnets.functional.pooling import global_average_pool
from jaxnets.layers import Convolution, Dense, Dropout, LayerNorm

_TRUNCATED = nn.initializers.truncated_normal(0.02)


class ConvNeXtBlock(nn.Module):
    """A 7x7 depthwise convolution, a layer norm and two pointwise layers as a residual branch.

    Attributes:
        dropout_rate: stochastic depth: probability of skipping the branch, in [0, 1).
        scale_init: initial layer scale: a trained factor per channel of the branch, near zero;
            None has none.
        activation: name or element-wise function.
        precision: dtypes.
    """

    dropout_rate: float = 0.0
    scale_init: float | None = 1e-6
    activation: Activation = "gelu"
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Map [batch, ..., channels] to the same shape."""
        policy, channels = self.precision, x.shape[-1]
        depthwise = Convolution(
            channels,
            7,
            groups=channels,
            kernel_init=_TRUNCATED,
            precision=policy,
            name="depthwise",
        )
        y = LayerNorm(precision=policy, name="norm")(depthwise(x))
        for features, name in ((4 * channels, "expand"), (channels, "reduce")):
            y = Dense(features, kernel_init=_TRUNCATED, precision=policy, name=name)(y)
            y = activation(self.activation)(y) if name == "expand" else y
        if self.scale_init is not None:
            init = nn.initializers.constant(self.scale_init)
            scale = self.param("scale", init, (channels,), policy.parameter)
            y = y * along_channels(scale.astype(y.dtype), y)
        return x + Dropout(self.dropout_rate, per_example=True, name="skip")(y, train=train)


class ConvNeXt(nn.Module):
    """ConvNeXt: a patchify stem and stages, each at half the resolution of the previous one.

    Corresponds to `torchvision.models.convnext.ConvNeXt`, with equal parameter counts.

    Attributes:
        stage_sizes: number of blocks of each stage.
        stage_features: channels of each stage.
        num_outputs: size of the output; None returns the pooled features.
        patch_size: kernel size and stride of the stem; 4 in the paper, 2 or 1 for small images.
        dropout_rate: stochastic depth of the last block, growing linearly from 0 at the first.
        scale_init: initial layer scale of each residual branch; None has no layer scale.
        activation: name or element-wise function.
        pooled_norm_epsilon: epsilon of the layer norm of the pooled features.
        precision: dtypes.

    Raises:
        ValueError: a field is out of range, or the input is too small for the stages.

    References:
        Liu et al. 2022, arXiv:2201.03545, section 3 and Table 9.
    """

    stage_sizes: Sequence[int] = (3, 3, 9, 3)
    stage_features: Sequence[int] = (96, 192, 384, 768)
    num_outputs: int | None = 10
    patch_size: int = 4
    dropout_rate: float = 0.0
    scale_init: float | None = 1e-6
    activation: Activation = "gelu"
    pooled_norm_epsilon: float = 1e-6
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        check_sizes(
            stage_sizes=self.stage_sizes,
            stage_features=self.stage_features,
            patch_size=self.patch_size,
        )
        if self.num_outputs is not None:
            check_sizes(num_outputs=self.num_outputs)
        check_rate(self.dropout_rate)
        activation(self.activation)
        if not 0 < self.pooled_norm_epsilon < math.inf:  # NaN too
            raise ValueError(
                f"pooled_norm_epsilon is {self.pooled_norm_epsilon}; give a positive number"
            )
        if len(self.stage_sizes) != len(self.stage_features):
            raise ValueError(
                f"stage_sizes={self.stage_sizes} and stage_features={self.stage_features} must "
                "have one entry per stage"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, inputs: jax.Array, *, train: bool = False) -> jax.Array:
        """Map images or audio to [batch, num_outputs], or to the pooled features without a head.

        Records "stage_1", "stage_2", ... and "features".

        Args:
            inputs: [batch, height, width, channels] or [batch, time, channels].
            train: training mode.

        Raises:
            ValueError: inputs of another rank, or too small for the stages.
        """
        check_rank(inputs, self, layouts=IMAGES_OR_AUDIO)
        policy = self.precision
        smallest = self.patch_size * 2 ** (len(self.stage_sizes) - 1)
        if min(inputs.shape[1:-1]) < smallest:
            raise ValueError(
                f"inputs of shape {inputs.shape} are too small: patch_size={self.patch_size} and "
                f"{len(self.stage_sizes)} stages need {smallest} a side; choose a smaller "
                "patch_size (2 for 28x28, 1 for 8x8) or resize the images"
            )
        x, block, last = inputs, 0, max(1, sum(self.stage_sizes) - 1)
        stages = zip(self.stage_sizes, self.stage_features, strict=True)
        for stage, (num_blocks, features) in enumerate(stages, start=1):
            if stage > 1:
                x = LayerNorm(precision=policy, name=f"reduce_{stage}_norm")(x)
            size = self.patch_size if stage == 1 else 2
            x = Convolution(
                features,
                size,
                strides=size,
                padding="VALID",
                kernel_init=_TRUNCATED,
                precision=policy,
                name="stem_conv" if stage == 1 else f"reduce_{stage}_conv",
            )(x)
            if stage == 1:
                x = LayerNorm(precision=policy, name="stem_norm")(x)
            for index in range(1, num_blocks + 1):
                x = ConvNeXtBlock(
                    dropout_rate=self.dropout_rate * block / last,
                    scale_init=self.scale_init,
                    activation=self.activation,
                    precision=policy,
                    name=f"stage_{stage}_block_{index}",
                )(x, train=train)
                block += 1
            record(self, f"stage_{stage}", x)
        norm = LayerNorm(self.pooled_norm_epsilon, precision=policy, name="norm")
        x = norm(global_average_pool(x))
        record(self, "features", x)
        if self.num_outputs is not None:
            head = Dense(self.num_outputs, kernel_init=_TRUNCATED, precision=policy, name="head")
            x = head(x)
        return x.astype(policy.output)


def convnext_tiny(num_classes: int = 1000, **fields: Any) -> ConvNeXt:
    """Build ConvNeXt-T: 28,589,128 parameters for 1000 classes.

    Args:
        num_classes: size of the output.
        fields: override the preset.

    References:
        Liu et al. 2022, arXiv:2201.03545, section 3 and Table 9.
    """
    return _convnext(3, 9, 96, 0.1, num_classes, fields)


def convnext_small(num_classes: int = 1000, **fields: Any) -> ConvNeXt:
    """Build ConvNeXt-S: 50,223,688 parameters for 1000 classes, as `convnext_tiny`."""
    return _convnext(3, 27, 96, 0.4, num_classes, fields)


def convnext_base(num_classes: int = 1000, **fields: Any) -> ConvNeXt:
    """Build ConvNeXt-B: 88,591,464 parameters for 1000 classes, as `convnext_tiny`."""
    return _convnext(3, 27, 128, 0.5, num_classes, fields)


def convnext_large(num_classes: int = 1000, **fields: Any) -> ConvNeXt:
    """Build ConvNeXt-L: 197,767,336 parameters for 1000 classes, as `convnext_tiny`."""
    return _convnext(3, 27, 192, 0.5, num_classes, fields)


def _convnext(
    short: int, long: int, width: int, dropout: float, num_classes: int, fields: dict[str, Any]
) -> ConvNeXt:
    preset: dict[str, Any] = {
        "stage_sizes": (short, short, long, short),
        "stage_features": (width, 2 * width, 4 * width, 8 * width),
        "dropout_rate": dropout,
        "num_outputs": num_classes,
    }
    return ConvNeXt(**(preset | fields))
