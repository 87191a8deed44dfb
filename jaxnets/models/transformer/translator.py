"""The encoder-decoder transformer for texts, and its presets: translation, T5."""

from __future__ import annotations

import math
from typing import Any

import jax

from jaxnets.checks import check_sizes
from jaxnets.core import Precision
from jaxnets.layers import Dense
from jaxnets.models.transformer.config import BlockConfig, build_preset
from jaxnets.models.transformer.embeddings import InputEmbedding
from jaxnets.models.transformer.encoder_decoder import EncoderDecoder
from jaxnets.models.transformer.stack import Stack


class TransformerTranslator(EncoderDecoder):
    """An encoder of the source and a causal decoder of the target with cross-attention.

    Corresponds to `torch.nn.Transformer` with embeddings and output layer.

    Attributes:
        vocabulary_size: number of tokens of the source.
        target_vocabulary_size: number of tokens of the target; None shares one vocabulary and one
            embedding between both.
        num_layers: number of blocks of the encoder.
        num_decoder_layers: number of blocks of the decoder, by default `num_layers`.
        config: options of the blocks.
        max_length: number of learned positions, the longest sequence; no limit with other kinds.
        tied: the output layer is the transposed token embedding of the target instead of a kernel
            of its own.
        output_scale: factor of the decoder's features in front of the output layer, such as
            1 / sqrt(features) in T5, whose tied embeddings have variance 1.
        precision: dtypes.

    Raises:
        ValueError: a field is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> config = BlockConfig(features=16, positions="sinusoidal")
        >>> module = TransformerTranslator(50, num_layers=1, config=config)
        >>> source, target = jnp.zeros((3, 8), jnp.int32), jnp.zeros((3, 5), jnp.int32)
        >>> variables = module.init(jax.random.key(0), source, target)
        >>> module.apply(variables, source, target, jnp.array([8, 2, 5])).shape
        (3, 5, 50)

    References:
        Vaswani et al. 2017, arXiv:1706.03762; Xiong et al. 2020, arXiv:2002.04745 (norms first);
        Raffel et al. 2020, arXiv:1910.10683, section 2.1 (T5).
    """

    vocabulary_size: int
    target_vocabulary_size: int | None = None
    num_layers: int = 3
    num_decoder_layers: int | None = None
    config: BlockConfig = BlockConfig(positions="sinusoidal")
    max_length: int = 512
    tied: bool = True
    output_scale: float = 1.0
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        check_sizes(vocabulary_size=self.vocabulary_size, max_length=self.max_length)
        check_sizes(num_layers=self.num_layers)
        for name in ("target_vocabulary_size", "num_decoder_layers"):
            if getattr(self, name) is not None:
                check_sizes(**{name: getattr(self, name)})
        if not 0 < self.output_scale < math.inf:
            raise ValueError(f"output_scale is {self.output_scale}; give a positive number")
        super().__post_init__()

    def setup(self) -> None:
        config, policy = self.config, self.precision
        self.embedding = InputEmbedding(
            self.vocabulary_size, config, self.max_length, precision=policy
        )
        if self.target_vocabulary_size is not None:
            self.target_embedding = InputEmbedding(
                self.target_vocabulary_size, config, self.max_length, precision=policy
            )
        self.encoder = Stack(config, self.num_layers, precision=policy)
        count = self.num_layers if self.num_decoder_layers is None else self.num_decoder_layers
        self.decoder = Stack(config, count, causal=True, cross=True, precision=policy)
        if not self.tied:
            self.head = Dense(
                self.target_vocabulary_size or self.vocabulary_size,
                use_bias=False,
                kernel_init=config.kernel_init(),
                precision=policy,
            )

    @property
    def decoder_embedding(self) -> InputEmbedding:
        """The embedding of the target, which is that of the source where they share one."""
        shared = self.target_vocabulary_size is None
        return self.embedding if shared else self.target_embedding

    def encode(
        self, inputs: jax.Array, lengths: jax.Array | None = None, *, train: bool = False
    ) -> tuple[jax.Array, jax.Array | None]:
        """Encode a source, integer [batch, source], as `EncoderDecoder.encode` says."""
        x = self.embedding(inputs, lengths, train=train)
        return self.encoder(x, lengths, train=train), lengths

    def logits(self, x: jax.Array) -> jax.Array:
        """Map the decoder's features to next-token logits [..., vocabulary]."""
        if self.output_scale != 1:
            x = x * self.output_scale
        logits = self.decoder_embedding.attend(x) if self.tied else self.head(x)
        return logits.astype(self.precision.output)


def transformer_base(vocabulary_size: int = 37_000, **fields: Any) -> TransformerTranslator:
    """Build the base model of 2017: 63,073,280 parameters for 37,000 tokens.

    The paper states 65 million. Differs from the paper: the keys have no bias, which would cancel
    in the softmax; `key_bias=True` gives 63,082,496.

    Args:
        vocabulary_size: number of tokens that source and target share.
        fields: override those of the network and of its config.

    References:
        Vaswani et al. 2017, arXiv:1706.03762, table 3.
    """
    return _translator(512, 8, 0.1, vocabulary_size, fields)


def transformer_big(vocabulary_size: int = 37_000, **fields: Any) -> TransformerTranslator:
    """Build the big model of 2017: 214,226,944 parameters, as `transformer_base`.

    The paper states 213 million.
    """
    return _translator(1024, 16, 0.3, vocabulary_size, fields)


def _translator(
    features: int,
    num_heads: int,
    dropout_rate: float,
    vocabulary_size: int,
    fields: dict[str, Any],
) -> TransformerTranslator:
    preset = {
        "vocabulary_size": vocabulary_size,
        "num_layers": 6,
        "features": features,
        "num_heads": num_heads,
        "activation": "relu",
        "norm_first": False,
        "positions": "sinusoidal",
        "dropout_rate": dropout_rate,
        "init_std": None,
    }
    return build_preset(TransformerTranslator, preset, fields)


def t5_small(vocabulary_size: int = 32_128, **fields: Any) -> TransformerTranslator:
    """Build T5 small: 60,506,624 parameters.

    Dropout has one rate at all places of the paper, `dropout_rate`; the fields of single places
    override it. The decoder starts from token 0, the padding.

    Args:
        vocabulary_size: number of tokens that source and target share.
        fields: override those of the network and of its config.

    References:
        Raffel et al. 2020, arXiv:1910.10683, sections 2.1 and 3.7, and their published code.
    """
    return _t5(6, 512, 8, 2048, vocabulary_size, fields)


def t5_base(vocabulary_size: int = 32_128, **fields: Any) -> TransformerTranslator:
    """Build T5 base: 222,903,552 parameters, as `t5_small`."""
    return _t5(12, 768, 12, 3072, vocabulary_size, fields)


def t5_large(vocabulary_size: int = 32_128, **fields: Any) -> TransformerTranslator:
    """Build T5 large: 737,668,096 parameters, as `t5_small`."""
    return _t5(24, 1024, 16, 4096, vocabulary_size, fields)


def flan_t5_small(vocabulary_size: int = 32_128, **fields: Any) -> TransformerTranslator:
    """Build Flan-T5 small, which is T5 1.1 small: 76,961,152 parameters.

    It differs from `t5_small` in the gate of the feed-forward network, in its sizes and in an
    output layer of its own, which is not scaled.

    Args:
        vocabulary_size: number of tokens that source and target share.
        fields: override those of the network and of its config.

    References:
        Chung et al. 2022, arXiv:2210.11416; Shazeer 2020, arXiv:2002.05202 (the gate).
    """
    return _t5(8, 512, 6, 1024, vocabulary_size, _T5_1_1 | fields)


def flan_t5_base(vocabulary_size: int = 32_128, **fields: Any) -> TransformerTranslator:
    """Build Flan-T5 base, which is T5 1.1 base: 247,577,856 parameters, as `flan_t5_small`."""
    return _t5(12, 768, 12, 2048, vocabulary_size, _T5_1_1 | fields)


def flan_t5_large(vocabulary_size: int = 32_128, **fields: Any) -> TransformerTranslator:
    """Build Flan-T5 large, which is T5 1.1 large: 783,150,080 parameters, as `flan_t5_small`."""
    return _t5(24, 1024, 16, 2816, vocabulary_size, _T5_1_1 | fields)


_T5_1_1 = {"activation": "geglu_tanh", "tied": False, "output_scale": 1.0}


def _t5(
    num_layers: int,
    features: int,
    num_heads: int,
    mlp_dim: int,
    vocabulary_size: int,
    fields: dict[str, Any],
) -> TransformerTranslator:
    preset = {
        "vocabulary_size": vocabulary_size,
        "num_layers": num_layers,
        "features": features,
        "num_heads": num_heads,
        "head_dim": 64,
        "mlp_dim": mlp_dim,
        "activation": "relu",
        "output_scale": features**-0.5,
        **t5_options(fields.get("dropout_rate", 0.1)),
    }
    return build_preset(TransformerTranslator, preset, fields)


def t5_options(dropout_rate: float) -> dict[str, Any]:
    """Return the options of the blocks of every T5, whatever its size and activation.

    Args:
        dropout_rate: at all places of the paper, in [0, 1).

    References:
        Raffel et al. 2020, arXiv:1910.10683, section 2.1, and their published code.
    """
    return {
        "norm": "rms",
        "positions": "relative",
        "attention_scale": 1.0,
        "use_bias": False,
        "dropout_rate": dropout_rate,
        "attention_dropout_rate": dropout_rate,
        "mlp_dropout_rate": dropout_rate,
        "output_dropout_rate": dropout_rate,
        "init_std": "fan_in",
    }
