"""The encoder-decoder transformer from sound to text, and its presets: Whisper."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.checks import check_sizes
from jaxnets.core import Precision
from jaxnets.layers import Dropout
from jaxnets.layers.subsampling import subsample
from jaxnets.models.transformer.config import BlockConfig, build_preset
from jaxnets.models.transformer.embeddings import InputEmbedding
from jaxnets.models.transformer.encoder_decoder import EncoderDecoder
from jaxnets.models.transformer.stack import Stack


class SpeechTransformer(EncoderDecoder):
    """Convolutions, an encoder of the sound, and a causal decoder of the text with cross-attention.

    The output layer is the transposed token embedding. Train it with
    `objectives.sequence.sequence_to_sequence` and decode it with `generate` or `beam_search`, whose
    prompts are the tokens that the text starts with.

    Attributes:
        vocabulary_size: number of tokens.
        num_layers: number of blocks of the encoder.
        num_decoder_layers: number of blocks of the decoder, by default `num_layers`.
        config: options of the blocks; their positions are those of the decoder. The encoder has
            sinusoids.
        strides: of each convolution along time.
        max_source_length: longest sound, in steps after the convolutions.
        max_length: number of learned positions of the decoder, the longest text; no limit with
            other kinds.
        precision: dtypes.

    Raises:
        ValueError: a field is out of range.

    Example:
        >>> module = SpeechTransformer(50, num_layers=1, config=BlockConfig(features=16))
        >>> frames, tokens = jnp.zeros((3, 20, 8)), jnp.zeros((3, 5), jnp.int32)
        >>> variables = module.init(jax.random.key(0), frames, tokens)
        >>> module.apply(variables, frames, tokens, jnp.array([20, 9, 1])).shape
        (3, 5, 50)

    References:
        Radford et al. 2022, arXiv:2212.04356, section 2.2 (Whisper); Dong, Xu and Xu 2018, ICASSP,
        "Speech-Transformer".
    """

    vocabulary_size: int
    num_layers: int = 4
    num_decoder_layers: int | None = None
    config: BlockConfig = BlockConfig()
    strides: Sequence[int] = (1, 2)
    max_source_length: int = 1500
    max_length: int = 448
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        check_sizes(vocabulary_size=self.vocabulary_size, num_layers=self.num_layers)
        check_sizes(max_source_length=self.max_source_length, max_length=self.max_length)
        check_sizes(strides=self.strides)
        if self.num_decoder_layers is not None:
            check_sizes(num_decoder_layers=self.num_decoder_layers)
        if self.config.features % 2 or self.config.features < 4:
            raise ValueError(
                f"{self.config.features} features do not form sines and cosines; give an even "
                "number from 4"
            )
        super().__post_init__()

    def setup(self) -> None:
        config, policy = self.config, self.precision
        self.encoder = SpeechEncoder(
            self.num_layers, config, self.strides, self.max_source_length, policy
        )
        self.embedding = InputEmbedding(
            self.vocabulary_size, config, self.max_length, precision=policy
        )
        count = self.num_layers if self.num_decoder_layers is None else self.num_decoder_layers
        self.decoder = Stack(config, count, causal=True, cross=True, precision=policy)

    @property
    def decoder_embedding(self) -> InputEmbedding:
        """The embedding of the text."""
        return self.embedding

    def encode(
        self, inputs: jax.Array, lengths: jax.Array | None = None, *, train: bool = False
    ) -> tuple[jax.Array, jax.Array | None]:
        """Encode a sound, [batch, frames, channels], as `EncoderDecoder.encode` says."""
        return self.encoder(inputs, lengths, train=train)

    def logits(self, x: jax.Array) -> jax.Array:
        """Map the decoder's features to next-token logits [..., vocabulary]."""
        return self.embedding.attend(x).astype(self.precision.output)


class SpeechEncoder(nn.Module):
    """Convolutional subsampling, fixed sinusoidal positions and transformer blocks.

    The sinusoids are a variable of the collection "constants", which training does not change:
    published weights hold them rounded.

    Attributes:
        num_layers: number of blocks.
        config: options of the blocks, without their positions.
        strides: of each convolution along time.
        max_length: longest sound, in steps after the convolutions.
        precision: dtypes.
    """

    num_layers: int
    config: BlockConfig
    strides: Sequence[int]
    max_length: int
    precision: Precision = Precision()

    @nn.compact
    def __call__(
        self, inputs: jax.Array, lengths: jax.Array | None = None, *, train: bool = False
    ) -> tuple[jax.Array, jax.Array | None]:
        """Map [batch, frames, channels] to features [batch, steps, features] and their lengths.

        Args:
            inputs: the frames; those beyond the lengths have no influence.
            lengths: integer [batch] in [0, frames]; by default all frames count.
            train: training mode.

        Raises:
            ValueError: inputs or lengths that do not fit, or a sound that is too long.
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
        steps = x.shape[1]
        if steps > self.max_length:
            raise ValueError(
                f"{inputs.shape[1]} frames are {steps} steps after the convolutions, more than the "
                f"{self.max_length} of the positions; cut the sound, or build the network with a "
                "larger max_source_length"
            )
        size = (self.max_length, config.features)
        positions = self.variable("constants", "position", _sinusoids, *size, policy.parameter)
        x = x + positions.value[None, :steps].astype(x.dtype)
        x = Dropout(config.dropout_rate, name="dropout")(x, train=train)
        blocks = dataclasses.replace(config, positions=None, rope_scaling=None)
        stack = Stack(blocks, self.num_layers, precision=policy, name="stack")
        return stack(x, lengths, train=train), lengths


def _sinusoids(length: int, features: int, dtype: Any) -> jax.Array:
    """Return the sines, then the cosines, of each position, as in Whisper's published code.

    The frequencies fall from 1 to exactly 1 / 10000, and sines and cosines do not alternate, unlike
    those of `sinusoidal_positions`.
    """
    half = features // 2
    frequencies = np.exp(-math.log(10_000) / (half - 1) * np.arange(half))
    angles = np.arange(length)[:, None] * frequencies[None]
    return jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], axis=1), dtype)


def whisper_tiny(vocabulary_size: int = 51_865, **fields: Any) -> SpeechTransformer:
    """Build Whisper tiny: 37,184,640 parameters for 80 mel features.

    Its inputs are the 3000 frames of `data.audio.WhisperFeatures`.

    Args:
        vocabulary_size: number of tokens; 51,864 for the English models.
        fields: override those of the network and of its config.

    References:
        Radford et al. 2022, arXiv:2212.04356, table 1.
    """
    return _whisper(4, 6, vocabulary_size, fields)


def whisper_base(vocabulary_size: int = 51_865, **fields: Any) -> SpeechTransformer:
    """Build Whisper base: 71,825,920 parameters, as `whisper_tiny`."""
    return _whisper(6, 8, vocabulary_size, fields)


def whisper_small(vocabulary_size: int = 51_865, **fields: Any) -> SpeechTransformer:
    """Build Whisper small: 240,582,912 parameters, as `whisper_tiny`."""
    return _whisper(12, 12, vocabulary_size, fields)


def whisper_medium(vocabulary_size: int = 51_865, **fields: Any) -> SpeechTransformer:
    """Build Whisper medium: 762,321,920 parameters, as `whisper_tiny`."""
    return _whisper(24, 16, vocabulary_size, fields)


def whisper_large(vocabulary_size: int = 51_865, **fields: Any) -> SpeechTransformer:
    """Build Whisper large, versions 1 and 2: 1,541,384,960 parameters, as `whisper_tiny`."""
    return _whisper(32, 20, vocabulary_size, fields)


def whisper_large_v3(vocabulary_size: int = 51_866, **fields: Any) -> SpeechTransformer:
    """Build Whisper large, version 3: 1,541,570,560 parameters, as `whisper_tiny`.

    Its frames have 128 mel features.
    """
    return _whisper(32, 20, vocabulary_size, fields)


def whisper_turbo(vocabulary_size: int = 51_866, **fields: Any) -> SpeechTransformer:
    """Build Whisper large v3 turbo: 806,958,080 parameters, as `whisper_tiny`.

    It is `whisper_large_v3` with 4 blocks in the decoder.
    """
    return _whisper(32, 20, vocabulary_size, {"num_decoder_layers": 4} | fields)


def _whisper(
    num_layers: int, num_heads: int, vocabulary_size: int, fields: dict[str, Any]
) -> SpeechTransformer:
    preset = {
        "vocabulary_size": vocabulary_size,
        "num_layers": num_layers,
        "features": 64 * num_heads,
        "num_heads": num_heads,
        "norm_epsilon": 1e-5,
    }
    return build_preset(SpeechTransformer, preset, fields)
