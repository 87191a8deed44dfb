"""The networks as numbers; each side builds them with its own means.

Imported by every process that is measured, so it knows no library.
"""

from __future__ import annotations

import abc
import dataclasses
import math


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network(abc.ABC):
    """An architecture as numbers.

    Attributes:
        num_outputs: classes, or tokens of the vocabulary; a generative network of images has
            neither.
    """

    num_outputs: int = 10

    @property
    @abc.abstractmethod
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example: [features], [height, width, channels], [time, channels], [time]."""

    @property
    def label_shape(self) -> tuple[int, ...]:
        """Shape of the labels of one example."""
        return ()

    @property
    def reads_tokens(self) -> bool:
        """Whether the inputs are token ids below `num_outputs`, and so are the labels."""
        return False

    @property
    def input_range(self) -> tuple[float, float] | None:
        """Least and greatest value of an input that has to lie in a range, else None."""
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perceptron(Network):
    """Dense layers with ReLU between them.

    Attributes:
        num_inputs: features of an example.
        features: widths of the hidden layers.
    """

    num_inputs: int
    features: tuple[int, ...]

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.num_inputs,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convolutional(Network):
    """3x3 convolutions, each with ReLU and a 2x2 max pool; then dense layers with ReLU between.

    Attributes:
        image: height, width, channels.
        channels: of each convolution.
        features: widths of the hidden dense layers.
    """

    image: tuple[int, int, int] = (28, 28, 1)
    channels: tuple[int, ...] = (32, 64)
    features: tuple[int, ...] = (256,)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.image

    @property
    def num_flat(self) -> int:
        """Features behind the last pool, all pixels side by side."""
        shrunk = 2 ** len(self.channels)
        return self.image[0] // shrunk * (self.image[1] // shrunk) * self.channels[-1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Residual(Network):
    """ResNet-18 with the stem for CIFAR: 3x3 of stride 1 and no pool.

    Attributes:
        image: height, width, channels.
        width: channels of the first stage, doubled in each of the others.
        num_stages: stages of two blocks.
    """

    image: tuple[int, int, int] = (32, 32, 3)
    width: int = 64
    num_stages: int = 4

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.image

    @property
    def stages(self) -> tuple[tuple[int, int], ...]:
        """Channels and stride of the first block of each stage."""
        return tuple((self.width * 2**stage, 2 if stage else 1) for stage in range(self.num_stages))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks(Network):
    """Transformer blocks: norm, attention, norm, four times as wide a layer with tanh GELU.

    Attributes:
        num_layers: number of blocks.
        num_heads: attention heads.
        width: features.
        scanned: compute the blocks in a loop over their stacked parameters, which is one block to
            compile; jaxnets only.
    """

    num_layers: int
    num_heads: int
    width: int
    scanned: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageTransformer(Blocks):
    """GPT: token and position vectors, causal blocks, a norm, logits without a bias.

    Attributes:
        context: tokens, and number of learned positions.
        tied: the logits are read off the token vectors.
    """

    context: int
    tied: bool = False

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.context,)

    @property
    def label_shape(self) -> tuple[int, ...]:
        return (self.context,)

    @property
    def reads_tokens(self) -> bool:
        return True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vision(Blocks):
    """A vision transformer: patches and a class token, learned positions, blocks, norm, logits.

    Attributes:
        image: height, width, channels.
        patch: side of a patch.
    """

    image: tuple[int, int, int] = (32, 32, 3)
    patch: int = 4

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.image

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return self.image[0] // self.patch * (self.image[1] // self.patch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecurrentLanguage(Network):
    """Token vectors, LSTM layers, logits with a bias.

    Attributes:
        embedding: size of the token vectors.
        hidden: size of the states.
        num_layers: number of layers.
        time: tokens.
    """

    embedding: int
    hidden: int
    num_layers: int
    time: int

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.time,)

    @property
    def label_shape(self) -> tuple[int, ...]:
        return (self.time,)

    @property
    def reads_tokens(self) -> bool:
        return True


@dataclasses.dataclass(frozen=True, kw_only=True)
class BidirectionalGRU(Network):
    """A GRU in each direction; the logits see the last state of both.

    Attributes:
        channels: features of a frame.
        hidden: size of the states.
        time: frames.
    """

    channels: int
    hidden: int
    time: int

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.time, self.channels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VariationalAutoencoder(Network):
    """A dense encoder to mean and log variance, a dense decoder to the logits of the pixels.

    Each has one hidden layer with ReLU.

    Attributes:
        image: height, width, channels.
        hidden: width of the hidden layers.
        latent: numbers of a code.
    """

    image: tuple[int, int, int] = (28, 28, 1)
    hidden: int = 512
    latent: int = 32

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.image

    @property
    def input_range(self) -> tuple[float, float] | None:
        return (0.0, 1.0)

    @property
    def num_pixels(self) -> int:
        """Numbers of an image."""
        return math.prod(self.image)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdversarialPair(Network):
    """DCGAN, without transposed convolutions and with kernels that fit their strides.

    Generator: a linear map to few pixels, then pixels are repeated and convolved 3x3; batch norm
    and ReLU behind each but the last, which ends in tanh. Discriminator: 4x4 convolutions of
    stride 2, batch norm behind each but the first, leaky ReLU of slope 0.2, a linear map to the
    logit. No bias in front of a norm.

    Attributes:
        image: height, width, channels.
        latent: numbers of a latent.
        width: channels at half the size of the images.
        num_doublings: how often the generator doubles the size, and the discriminator halves it.
    """

    image: tuple[int, int, int] = (32, 32, 1)
    latent: int = 64
    width: int = 64
    num_doublings: int = 3

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.image

    @property
    def input_range(self) -> tuple[float, float] | None:
        return (-1.0, 1.0)

    @property
    def channels(self) -> tuple[int, ...]:
        """Of the discriminator's convolutions; the generator's maps have them in reverse."""
        return tuple(self.width * 2**index for index in range(self.num_doublings))

    @property
    def smallest(self) -> tuple[int, int]:
        """Height and width of the smallest maps."""
        shrunk = 2**self.num_doublings
        return self.image[0] // shrunk, self.image[1] // shrunk
