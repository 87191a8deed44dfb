"""Residual networks: ResNet (He et al. 2016), Wide ResNet (2016), ResNet-9 (Page 2018).

The rank of the kernels follows that of the input: images [batch, height, width, channels], or
audio [batch, time, channels].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import flax.linen as nn
import jax

from jaxnets.checks import IMAGES_OR_AUDIO, check_rank, check_rate, check_sizes
from jaxnets.core import Precision, record
from jaxnets.functional.activations import Activation, activation
from jaxnets.functional.pooling import global_average_pool, max_pool
from jaxnets.layers import BatchNorm, Convolution, Dense, Dropout

#: The convolution of a bottleneck that has the stride of its block.
BottleneckStride: TypeAlias = Literal["3x3", "1x1"]

_HE_FAN_OUT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def _bias_free_convolution(
    features: int, kernel_size: int, strides: int, *, policy: Precision, name: str
) -> Convolution:
    """Build a convolution for use with batch norm: no bias, padding equal on both sides."""
    return Convolution(
        features,
        kernel_size,
        strides=strides,
        padding=kernel_size // 2,
        use_bias=False,
        kernel_init=_HE_FAN_OUT,
        precision=policy,
        name=name,
    )


class ResidualBlock(nn.Module):
    """A residual block: two 3x3 convolutions, or a bottleneck of 1x1, 3x3 and 1x1.

    The scale of the last batch norm starts at zero, so that the block starts as the identity
    (Goyal et al. 2017, arXiv:1706.02677, section 5.1).

    Attributes:
        features: channels inside the block; a bottleneck returns four times as many.
        strides: stride of the first 3x3 convolution (see `bottleneck_stride`) and of the shortcut.
        bottleneck: bottleneck block instead of the basic one.
        bottleneck_stride: the convolution of a bottleneck that has the stride, "3x3" or the first
            "1x1".
        activation: name or element-wise function.
        precision: dtypes.
    """

    features: int
    strides: int = 1
    bottleneck: bool = False
    bottleneck_stride: BottleneckStride = "3x3"
    activation: Activation = "relu"
    precision: Precision = Precision()

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, weights: jax.Array | None = None
    ) -> jax.Array:
        """Map [batch, ..., channels] to [batch, ..., features or 4 features]."""
        policy, act = self.precision, activation(self.activation)
        if self.bottleneck:
            early = self.bottleneck_stride == "1x1"
            layers = [
                (self.features, 1, self.strides if early else 1),
                (self.features, 3, 1 if early else self.strides),
                (4 * self.features, 1, 1),
            ]
        else:
            layers = [(self.features, 3, self.strides), (self.features, 3, 1)]
        y = x
        for index, (features, size, strides) in enumerate(layers, start=1):
            y = _bias_free_convolution(
                features, size, strides, policy=policy, name=f"conv_{index}"
            )(y)
            last = index == len(layers)
            init = nn.initializers.zeros if last else nn.initializers.ones
            norm = BatchNorm(scale_init=init, precision=policy, name=f"norm_{index}")
            y = norm(y, train=train, weights=weights)
            y = y if last else act(y)
        if x.shape[-1] != y.shape[-1] or self.strides != 1:
            x = _bias_free_convolution(
                y.shape[-1], 1, self.strides, policy=policy, name="shortcut_conv"
            )(x)
            x = BatchNorm(precision=policy, name="shortcut_norm")(x, train=train, weights=weights)
        return act(x + y)


class ResNet(nn.Module):
    """Residual network, version 1.5: the stride of a bottleneck is in its 3x3 convolution.

    Corresponds to `torchvision.models.ResNet` with `zero_init_residual=True`: the same
    architecture, padding, initialization of the convolutions and parameter counts.

    Differs from the paper, which puts the stride of a bottleneck in its first 1x1 convolution
    (`bottleneck_stride="1x1"`) and takes narrower networks for CIFAR-10 (section 4.2).

    Attributes:
        stage_sizes: number of blocks of each stage; each stage after the first halves the
            resolution and doubles the channels.
        bottleneck: bottleneck blocks instead of basic ones.
        num_outputs: size of the output; None returns the pooled features.
        stem: "imagenet" (7x7 convolution of stride 2 and a max pool: a quarter of the resolution)
            or "cifar" (3x3 convolution, full resolution).
        width: channels of the stem, and of the first stage.
        stage_features: channels inside the blocks of each stage; by default width, 2 width, ...
        bottleneck_stride: the convolution of a bottleneck that has the stride of its stage: "3x3"
            (version 1.5) or the first "1x1" (version 1, the paper).
        first_stage_strides: stride of the first stage; 2 halves the resolution there too.
        activation: name or element-wise function.
        precision: dtypes.

    Raises:
        ValueError: a field is out of range.

    References:
        He et al. 2016, arXiv:1512.03385, Table 1.
    """

    stage_sizes: Sequence[int] = (2, 2, 2, 2)
    bottleneck: bool = False
    num_outputs: int | None = 10
    stem: str = "imagenet"
    width: int = 64
    stage_features: Sequence[int] | None = None
    bottleneck_stride: BottleneckStride = "3x3"
    first_stage_strides: int = 1
    activation: Activation = "relu"
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        check_sizes(
            stage_sizes=self.stage_sizes,
            width=self.width,
            first_stage_strides=self.first_stage_strides,
        )
        if self.num_outputs is not None:
            check_sizes(num_outputs=self.num_outputs)
        if self.stage_features is not None:
            check_sizes(stage_features=self.stage_features)
            if len(self.stage_features) != len(self.stage_sizes):
                raise ValueError(
                    f"stage_sizes={self.stage_sizes} and stage_features={self.stage_features} "
                    "must have one entry per stage"
                )
        if self.stem not in ("imagenet", "cifar"):
            raise ValueError(f"unknown stem {self.stem!r}; choose 'imagenet' or 'cifar'")
        if self.bottleneck_stride not in ("3x3", "1x1"):
            raise ValueError(
                f"bottleneck_stride is {self.bottleneck_stride!r}; choose '3x3' or '1x1'"
            )
        activation(self.activation)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, inputs: jax.Array, *, train: bool = False, weights: jax.Array | None = None
    ) -> jax.Array:
        """Map images or audio to [batch, num_outputs], or to [batch, features] without a head.

        Records "stage_1", "stage_2", ... and "features".

        Args:
            inputs: [batch, height, width, channels] or [batch, time, channels].
            train: training mode.
            weights: [batch], 0 = padding, for the batch norms in training.

        Raises:
            ValueError: inputs of another rank.
        """
        check_rank(inputs, self, layouts=IMAGES_OR_AUDIO)
        policy, large = self.precision, self.stem == "imagenet"
        size, strides = (7, 2) if large else (3, 1)
        x = _bias_free_convolution(self.width, size, strides, policy=policy, name="stem_conv")(
            inputs
        )
        x = BatchNorm(precision=policy, name="stem_norm")(x, train=train, weights=weights)
        x = activation(self.activation)(x)
        x = max_pool(x, 3, 2, 1) if large else x
        widths = self.stage_features or [self.width * 2**i for i in range(len(self.stage_sizes))]
        stages = zip(self.stage_sizes, widths, strict=True)
        for stage, (num_blocks, features) in enumerate(stages, start=1):
            stage_strides = 2 if stage > 1 else self.first_stage_strides
            for block in range(1, num_blocks + 1):
                x = ResidualBlock(
                    features,
                    strides=stage_strides if block == 1 else 1,
                    bottleneck=self.bottleneck,
                    bottleneck_stride=self.bottleneck_stride,
                    activation=self.activation,
                    precision=policy,
                    name=f"stage_{stage}_block_{block}",
                )(x, train=train, weights=weights)
            record(self, f"stage_{stage}", x)
        x = global_average_pool(x)
        record(self, "features", x)
        if self.num_outputs is not None:
            x = Dense(self.num_outputs, precision=policy, name="head")(x)
        return x.astype(policy.output)


class WideBlock(nn.Module):
    """A pre-activation residual block: two 3x3 convolutions, each after its norm and activation.

    Attributes:
        features: output channels.
        strides: stride of the first convolution and of the shortcut.
        dropout_rate: dropout between the convolutions, in [0, 1).
        precision: dtypes.
    """

    features: int
    strides: int = 1
    dropout_rate: float = 0.0
    precision: Precision = Precision()

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, weights: jax.Array | None = None
    ) -> jax.Array:
        """Map [batch, ..., channels] to [batch, ..., features]."""
        policy = self.precision
        y = nn.relu(BatchNorm(precision=policy, name="norm_1")(x, train=train, weights=weights))
        if x.shape[-1] != self.features or self.strides > 1:
            x = _bias_free_convolution(
                self.features, 1, self.strides, policy=policy, name="shortcut"
            )(y)
        y = _bias_free_convolution(self.features, 3, self.strides, policy=policy, name="conv_1")(y)
        y = nn.relu(BatchNorm(precision=policy, name="norm_2")(y, train=train, weights=weights))
        y = Dropout(self.dropout_rate, name="dropout")(y, train=train)
        return x + _bias_free_convolution(self.features, 3, 1, policy=policy, name="conv_2")(y)


class WideResNet(nn.Module):
    """Wide pre-activation residual network for small images: few layers, many channels.

    Unrelated to torchvision's `wide_resnet50_2`, which widens the bottlenecks of `ResNet`.

    Attributes:
        depth: number of convolutions on the main path, 6 n + 4 for n blocks per stage.
        widen_factor: multiple of the 16, 32 and 64 channels of the stages.
        num_outputs: size of the output.
        dropout_rate: dropout inside the blocks, in [0, 1).
        precision: dtypes.

    Raises:
        ValueError: a field is out of range.

    References:
        Zagoruyko and Komodakis 2016, arXiv:1605.07146, Table 1.
    """

    depth: int = 16
    widen_factor: int = 4
    num_outputs: int = 10
    dropout_rate: float = 0.0
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        check_sizes(widen_factor=self.widen_factor, num_outputs=self.num_outputs)
        check_rate(self.dropout_rate)
        if self.depth < 10 or self.depth % 6 != 4:
            raise ValueError(f"depth={self.depth} must be 6 n + 4: 10, 16, 22, 28, 34, 40, ...")
        super().__post_init__()

    @nn.compact
    def __call__(
        self, inputs: jax.Array, *, train: bool = False, weights: jax.Array | None = None
    ) -> jax.Array:
        """Map images or audio to [batch, num_outputs].

        Records "stage_1", "stage_2", "stage_3" and "features".

        Args:
            inputs: [batch, height, width, channels] or [batch, time, channels].
            train: training mode.
            weights: [batch], 0 = padding, for the batch norms in training.

        Raises:
            ValueError: inputs of another rank.
        """
        check_rank(inputs, self, layouts=IMAGES_OR_AUDIO)
        policy = self.precision
        x = _bias_free_convolution(16, 3, 1, policy=policy, name="stem_conv")(inputs)
        for stage in (1, 2, 3):
            for block in range(1, (self.depth - 4) // 6 + 1):
                x = WideBlock(
                    self.widen_factor * 16 * 2 ** (stage - 1),
                    strides=2 if stage > 1 and block == 1 else 1,
                    dropout_rate=self.dropout_rate,
                    precision=policy,
                    name=f"stage_{stage}_block_{block}",
                )(x, train=train, weights=weights)
            record(self, f"stage_{stage}", x)
        x = nn.relu(BatchNorm(precision=policy, name="norm")(x, train=train, weights=weights))
        x = global_average_pool(x)
        record(self, "features", x)
        return Dense(self.num_outputs, precision=policy, name="head")(x).astype(policy.output)


class ResNet9(nn.Module):
    """A small residual network for fast training on small images.

    Convolutions of 1, 2, 4 and 8 times `width` channels, the last three followed by a 2x2 max
    pool, the second and fourth also by a residual pair; then global max pooling and a linear layer
    without bias, whose output is scaled down.

    Attributes:
        num_outputs: size of the output.
        width: channels of the first convolution.
        logit_scale: factor on the logits; below 1 it keeps the initial softmax soft.
        precision: dtypes.

    Raises:
        ValueError: a field is out of range.

    References:
        Page 2018, "How to train your ResNet" (the DAWNBench network for CIFAR-10).
    """

    num_outputs: int = 10
    width: int = 64
    logit_scale: float = 0.125
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        check_sizes(num_outputs=self.num_outputs, width=self.width)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, inputs: jax.Array, *, train: bool = False, weights: jax.Array | None = None
    ) -> jax.Array:
        """Map images or audio, 8 pixels a side or more, to [batch, num_outputs].

        Records "features".

        Args:
            inputs: [batch, height, width, channels] or [batch, time, channels].
            train: training mode.
            weights: [batch], 0 = padding, for the batch norms in training.

        Raises:
            ValueError: inputs of another rank.
        """
        check_rank(inputs, self, layouts=IMAGES_OR_AUDIO)
        policy = self.precision

        def layer(x: jax.Array, features: int, name: str) -> jax.Array:
            x = _bias_free_convolution(features, 3, 1, policy=policy, name=f"{name}_conv")(x)
            return nn.relu(
                BatchNorm(precision=policy, name=f"{name}_norm")(x, train=train, weights=weights)
            )

        x = layer(inputs, self.width, "prep")
        for stage, residual in ((1, True), (2, False), (3, True)):
            x = max_pool(layer(x, self.width * 2**stage, f"layer_{stage}"), 2)
            if residual:
                y = layer(x, x.shape[-1], f"residual_{stage}_1")
                x = x + layer(y, x.shape[-1], f"residual_{stage}_2")
        x = max_pool(x, x.shape[1:-1]).reshape(x.shape[0], -1)  # [batch, channels]
        record(self, "features", x)
        head = Dense(self.num_outputs, use_bias=False, precision=policy, name="head")
        return (self.logit_scale * head(x)).astype(policy.output)


def resnet18(num_classes: int = 1000, *, stem: str = "imagenet", **fields: Any) -> ResNet:
    """Build ResNet-18: 11,689,512 parameters for 1000 classes.

    Args:
        num_classes: size of the output.
        stem: "imagenet", or "cifar" for small images.
        fields: override the preset.

    References:
        He et al. 2016, arXiv:1512.03385, Table 1.
    """
    return _resnet((2, 2, 2, 2), False, num_classes, stem, fields)


def resnet34(num_classes: int = 1000, *, stem: str = "imagenet", **fields: Any) -> ResNet:
    """Build ResNet-34: 21,797,672 parameters for 1000 classes, as `resnet18`."""
    return _resnet((3, 4, 6, 3), False, num_classes, stem, fields)


def resnet50(num_classes: int = 1000, *, stem: str = "imagenet", **fields: Any) -> ResNet:
    """Build ResNet-50: 25,557,032 parameters for 1000 classes, as `resnet18`."""
    return _resnet((3, 4, 6, 3), True, num_classes, stem, fields)


def resnet101(num_classes: int = 1000, *, stem: str = "imagenet", **fields: Any) -> ResNet:
    """Build ResNet-101: 44,549,160 parameters for 1000 classes, as `resnet18`."""
    return _resnet((3, 4, 23, 3), True, num_classes, stem, fields)


def resnet152(num_classes: int = 1000, *, stem: str = "imagenet", **fields: Any) -> ResNet:
    """Build ResNet-152: 60,192,808 parameters for 1000 classes, as `resnet18`."""
    return _resnet((3, 8, 36, 3), True, num_classes, stem, fields)


def _resnet(
    sizes: Sequence[int], bottleneck: bool, num_classes: int, stem: str, fields: dict[str, Any]
) -> ResNet:
    preset: dict[str, Any] = {
        "stage_sizes": sizes,
        "bottleneck": bottleneck,
        "num_outputs": num_classes,
    }
    return ResNet(**(preset | {"stem": stem} | fields))


def wide_resnet28_10(num_classes: int = 10, **fields: Any) -> WideResNet:
    """Build WRN-28-10: 36,479,194 parameters for 10 classes.

    Args:
        num_classes: size of the output.
        fields: override the preset.

    References:
        Zagoruyko and Komodakis 2016, arXiv:1605.07146, Table 1.
    """
    return WideResNet(**({"depth": 28, "widen_factor": 10, "num_outputs": num_classes} | fields))


def wide_resnet40_4(num_classes: int = 10, **fields: Any) -> WideResNet:
    """Build WRN-40-4: 8.9 million parameters for 10 classes, as `wide_resnet28_10`."""
    return WideResNet(**({"depth": 40, "widen_factor": 4, "num_outputs": num_classes} | fields))


def wide_resnet16_4(num_classes: int = 10, **fields: Any) -> WideResNet:
    """Build WRN-16-4: 2.7 million parameters for 10 classes, as `wide_resnet28_10`."""
    return WideResNet(**({"depth": 16, "widen_factor": 4, "num_outputs": num_classes} | fields))


def resnet9(num_classes: int = 10, **fields: Any) -> ResNet9:
    """Build ResNet-9: 6,573,120 parameters for 10 classes of color images; `fields` override it."""
    return ResNet9(**({"num_outputs": num_classes} | fields))
