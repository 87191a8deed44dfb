"""The architectures as dataclasses; each side builds them in its own library.

Every measured process imports this module, so it imports no library.
"""

from __future__ import annotations

import abc
import dataclasses
import math


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network(abc.ABC):
    """An architecture.

    Attributes:
        num_outputs: classes, or size of the vocabulary; unused by generative networks of images.
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
        """Minimum and maximum of the inputs; None if they are unbounded."""
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
    """3x3 convolutions, each with ReLU and 2x2 max pooling, then dense layers with ReLU.

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
        """Features after the last pool, flattened."""
        shrunk = 2 ** len(self.channels)
        return self.image[0] // shrunk * (self.image[1] // shrunk) * self.channels[-1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Residual(Network):
    """ResNet-18 with the stem for CIFAR: a 3x3 convolution of stride 1, no pooling.

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
    """Pre-norm transformer blocks with an MLP of 4 x width and tanh GELU.

    Attributes:
        num_layers: number of blocks.
        num_heads: attention heads.
        width: features.
        scanned: scan over the stacked parameters of the blocks, so that one block is compiled;
            jaxnets only.
    """

    num_layers: int
    num_heads: int
    width: int
    scanned: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageTransformer(Blocks):
    """GPT: token and position embeddings, causal blocks, a norm, logits without a bias.

    Attributes:
        context: tokens, and number of learned positions.
        tied: share the token embeddings with the output layer.
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
class Llama(Network):
    """A LLaMA with tied embeddings, read from a folder of Hugging Face with random weights.

    Attributes:
        num_layers: number of blocks.
        num_heads: attention heads.
        num_kv_heads: heads of keys and values.
        width: features.
        mlp_dim: width of the feed-forward network.
        context: tokens.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    width: int
    mlp_dim: int
    context: int

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.context,)

    @property
    def reads_tokens(self) -> bool:
        return True

    @property
    def config(self) -> dict[str, object]:
        """The content of config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.num_outputs,
            "num_hidden_layers": self.num_layers,
            "hidden_size": self.width,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "intermediate_size": self.mlp_dim,
            "max_position_embeddings": self.context,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 100_000.0,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": None,  # no stop token: every call generates all tokens
        }

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors, by name; those of one axis are scales of norms."""
        width, kv_width = self.width, self.num_kv_heads * self.width // self.num_heads
        layer = {
            "input_layernorm": (width,),
            "self_attn.q_proj": (width, width),
            "self_attn.k_proj": (kv_width, width),
            "self_attn.v_proj": (kv_width, width),
            "self_attn.o_proj": (width, width),
            "post_attention_layernorm": (width,),
            "mlp.gate_proj": (self.mlp_dim, width),
            "mlp.up_proj": (self.mlp_dim, width),
            "mlp.down_proj": (width, self.mlp_dim),
        }
        layers = {
            f"model.layers.{index}.{name}.weight": shape
            for index in range(self.num_layers)
            for name, shape in layer.items()
        }
        ends = {
            "model.embed_tokens.weight": (self.num_outputs, width),
            "model.norm.weight": (width,),
        }
        return layers | ends


@dataclasses.dataclass(frozen=True, kw_only=True)
class SentenceFolder(Network):
    """The network of a folder of sentence-transformers, which the command line names."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        return ()

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
    """Token embeddings, LSTM layers, logits with a bias.

    Attributes:
        embedding: size of the token embeddings.
        hidden: size of the hidden states.
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
    """A GRU in each direction; the logits read the last states of both.

    Attributes:
        channels: features of a frame.
        hidden: size of the hidden states.
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
    """A dense encoder to mean and log variance, and a dense decoder to the logits of the pixels.

    Each has one hidden layer with ReLU.

    Attributes:
        image: height, width, channels.
        hidden: width of the hidden layers.
        latent: size of the code.
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
        """Elements of an image."""
        return math.prod(self.image)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdversarialPair(Network):
    """DCGAN with nearest-neighbor upsampling, and kernels that are a multiple of their strides.

    Generator: a dense layer to the smallest maps, then nearest-neighbor upsampling and 3x3
    convolutions, each followed by batch norm and ReLU, the last by tanh. Discriminator: 4x4
    convolutions of stride 2, each but the first followed by batch norm, leaky ReLU of slope 0.2,
    and a dense layer to the logit. No bias before a norm.

    Attributes:
        image: height, width, channels.
        latent: size of a latent.
        width: channels at half the size of the images.
        num_doublings: upsamplings of the generator, and strided convolutions of the discriminator.
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
        """Channels of the discriminator's convolutions; the generator's are the reverse."""
        return tuple(self.width * 2**index for index in range(self.num_doublings))

    @property
    def smallest(self) -> tuple[int, int]:
        """Height and width of the smallest maps."""
        shrunk = 2**self.num_doublings
        return self.image[0] // shrunk, self.image[1] // shrunk
