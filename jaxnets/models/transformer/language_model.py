"""The decoder-only language model and its presets: GPT-2, LLaMA, Mistral, Qwen, Gemma."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxnets.checks import check_sizes
from jaxnets.core import Precision, record
from jaxnets.layers import Dense
from jaxnets.models.transformer.config import BlockConfig, build_preset
from jaxnets.models.transformer.decoder import Decoder
from jaxnets.models.transformer.embeddings import InputEmbedding
from jaxnets.models.transformer.stack import Stack, StackCarry


class TransformerLM(Decoder):
    """A decoder-only (causal) language model: token t + 1 is predicted from tokens 0 to t.

    Attributes:
        vocabulary_size: number of tokens.
        num_layers: number of blocks.
        config: options of the blocks.
        max_length: number of learned positions, the longest sequence; no limit with other kinds.
        tied: the output layer is the transposed token embedding instead of a kernel of its own.
        scale_embedding: multiply the token embeddings by sqrt(features), rounded to the compute
            dtype (Vaswani et al. 2017, section 3.4; Gemma). Sinusoidal positions always do.
        logit_softcap: bound the logits: logit_softcap tanh(logits / logit_softcap) (Gemma 2,
            arXiv:2408.00118, section 2).
        precision: dtypes.

    Raises:
        ValueError: a field is out of range.

    Example:
        Incremental decoding: a prompt, then single tokens:

        >>> module = TransformerLM(65, num_layers=2, config=BlockConfig(features=16))
        >>> tokens = jnp.zeros((3, 8), jnp.int32)
        >>> variables = module.init(jax.random.key(0), tokens)
        >>> carry = module.apply(variables, 3, 32, method="start")
        >>> logits, carry = module.apply(variables, tokens, carry, method="extend")
        >>> logits, carry = module.apply(variables, tokens[:, :1], carry, method="extend")
        >>> logits.shape, carry["position"].tolist()
        ((3, 1, 65), [9, 9, 9])

    References:
        Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2);
        Touvron et al. 2023, arXiv:2302.13971 (LLaMA).
    """

    vocabulary_size: int
    num_layers: int = 4
    config: BlockConfig = BlockConfig()
    max_length: int = 1024
    tied: bool = True
    scale_embedding: bool = False
    logit_softcap: float | None = None
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        check_sizes(vocabulary_size=self.vocabulary_size, max_length=self.max_length)
        cap = self.logit_softcap
        if cap is not None and not 0 < cap < math.inf:  # NaN too
            raise ValueError(f"logit_softcap is {cap}; give a positive number, or None")
        super().__post_init__()

    def setup(self) -> None:
        config, policy = self.config, self.precision
        self.embedding = InputEmbedding(
            self.vocabulary_size,
            config,
            self.max_length,
            scaled=self.scale_embedding,
            precision=policy,
        )
        self.stack = Stack(config, self.num_layers, causal=True, precision=policy)
        if not self.tied:
            self.head = Dense(
                self.vocabulary_size,
                use_bias=False,
                kernel_init=config.kernel_init(),
                precision=policy,
            )

    def __call__(
        self, tokens: jax.Array, lengths: jax.Array | None = None, *, train: bool = False
    ) -> jax.Array:
        """Map tokens to next-token logits; records "features".

        Args:
            tokens: integer [batch, time]; ids beyond the lengths may have any value.
            lengths: integer [batch] in [0, time]; by default all tokens count.
            train: training mode.

        Returns:
            [batch, time, vocabulary_size]; logits beyond the lengths have no meaning.

        Raises:
            ValueError: tokens or lengths that do not fit, more tokens than learned positions.
        """
        x = self.embedding(tokens, lengths, train=train)
        return self.logits(self.stack(x, lengths, train=train))

    def start(self, batch_size: int, capacity: int) -> StackCarry:
        """Return an empty key-value cache.

        Args:
            batch_size: number of rows.
            capacity: maximum number of tokens, prompt and continuation together.

        Returns:
            Arrays with a leading batch axis: keys and values [batch, capacity, heads, head_dim] of
            each layer, and "position" [batch].

        Raises:
            ValueError: a capacity beyond the learned positions.
        """
        self.embedding.check_capacity(capacity)
        return self.stack.start(batch_size, capacity)

    @property
    def decoder_embedding(self) -> InputEmbedding:
        """The embedding of the tokens."""
        return self.embedding

    @property
    def decoder(self) -> Stack:
        """The blocks."""
        return self.stack

    def logits(self, x: jax.Array) -> jax.Array:
        """Map features of the stack to next-token logits [..., vocabulary_size]."""
        record(self, "features", x)
        logits = self.embedding.attend(x) if self.tied else self.head(x)
        logits, cap = logits.astype(self.precision.output), self.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)


def gpt2_small(**fields: Any) -> TransformerLM:
    """Build GPT-2 small: 124,439,808 parameters; `fields` override its own and its config's.

    References:
        Radford et al. 2019, table 2, whose counts are wrong; these are of the released weights.
    """
    return _gpt2(fields, num_layers=12, num_heads=12, features=768)


def gpt2_medium(**fields: Any) -> TransformerLM:
    """Build GPT-2 medium: 354,823,168 parameters, as `gpt2_small`."""
    return _gpt2(fields, num_layers=24, num_heads=16, features=1024)


def gpt2_large(**fields: Any) -> TransformerLM:
    """Build GPT-2 large: 774,030,080 parameters, as `gpt2_small`."""
    return _gpt2(fields, num_layers=36, num_heads=20, features=1280)


def gpt2_xl(**fields: Any) -> TransformerLM:
    """Build GPT-2 XL: 1,557,611,200 parameters, as `gpt2_small`."""
    return _gpt2(fields, num_layers=48, num_heads=25, features=1600)


def llama2_7b(**fields: Any) -> TransformerLM:
    """Build LLaMA 2 7B: 6,738,415,616 parameters; `fields` override its own and its config's.

    References:
        Touvron et al. 2023, arXiv:2307.09288, table 1 (LLaMA 2 7B).
    """
    return _llama(
        fields,
        num_layers=32,
        num_heads=32,
        features=4096,
        vocabulary_size=32_000,
        mlp_dim=11_008,
    )


def llama3_8b(**fields: Any) -> TransformerLM:
    """Build Llama 3 8B: 8,030,261,248 parameters; `fields` override its own and its config's.

    References:
        Grattafiori et al. 2024, arXiv:2407.21783, table 3.
    """
    return _llama(
        fields,
        num_layers=32,
        num_heads=32,
        features=4096,
        vocabulary_size=128_256,
        mlp_dim=14_336,
        num_kv_heads=8,
        rope_theta=500_000.0,
    )


def tinyllama(**fields: Any) -> TransformerLM:
    """Build TinyLlama: 1,100,048,384 parameters; `fields` override its own and its config's.

    References:
        Zhang et al. 2024, arXiv:2401.02385, table 1.
    """
    return _llama(
        fields,
        num_layers=22,
        num_heads=32,
        features=2048,
        vocabulary_size=32_000,
        mlp_dim=5632,
        num_kv_heads=4,
    )


def mistral_7b(**fields: Any) -> TransformerLM:
    """Build Mistral 7B: 7,241,732,096 parameters; `fields` override its own and its config's.

    References:
        Jiang et al. 2023, arXiv:2310.06825, table 1.
    """
    return _llama(
        fields,
        num_layers=32,
        num_heads=32,
        features=4096,
        vocabulary_size=32_000,
        mlp_dim=14_336,
        num_kv_heads=8,
        window=4096,
    )


def smollm2_135m(**fields: Any) -> TransformerLM:
    """Build SmolLM2 135M: 134,515,008 parameters; `fields` override its own and its config's.

    References:
        Ben Allal et al. 2025, arXiv:2502.02737, section 6, and the published configuration.
    """
    return _llama(
        fields,
        num_layers=30,
        num_heads=9,
        features=576,
        vocabulary_size=49_152,
        mlp_dim=1536,
        num_kv_heads=3,
        rope_theta=100_000.0,
        tied=True,
    )


def qwen2_0_5b(**fields: Any) -> TransformerLM:
    """Build Qwen 2 0.5B: 494,032,768 parameters; `fields` override its own and its config's.

    References:
        Yang et al. 2024, arXiv:2407.10671, table 1, and the published configuration.
    """
    return _llama(
        fields,
        num_layers=24,
        num_heads=14,
        features=896,
        vocabulary_size=151_936,
        mlp_dim=4864,
        num_kv_heads=2,
        rope_theta=1_000_000.0,
        norm_epsilon=1e-6,
        qkv_bias=True,
        tied=True,
    )


def qwen3_0_6b(**fields: Any) -> TransformerLM:
    """Build Qwen 3 0.6B: 596,049,920 parameters; `fields` override its own and its config's.

    References:
        Yang et al. 2025, arXiv:2505.09388, table 1, and the published configuration.
    """
    return _llama(
        fields,
        num_layers=28,
        num_heads=16,
        features=1024,
        vocabulary_size=151_936,
        mlp_dim=3072,
        num_kv_heads=8,
        head_dim=128,
        rope_theta=1_000_000.0,
        norm_epsilon=1e-6,
        qk_norm=True,
        tied=True,
    )


def gemma2_2b(**fields: Any) -> TransformerLM:
    """Build Gemma 2 2B: 2,614,341,888 parameters; `fields` override its own and its config's.

    References:
        Gemma Team 2024, arXiv:2408.00118, table 1.
    """
    return _gemma(
        fields,
        num_layers=26,
        num_heads=8,
        features=2304,
        vocabulary_size=256_000,
        mlp_dim=9216,
        num_kv_heads=4,
        window=4096,
        global_every=2,
        attention_softcap=50.0,
        logit_softcap=30.0,
    )


def gemma3_1b(**fields: Any) -> TransformerLM:
    """Build Gemma 3 1B: 999,885,952 parameters; `fields` override its own and its config's.

    References:
        Gemma Team 2025, arXiv:2503.19786, section 2 and table 1, and the published configuration.
    """
    return _gemma(
        fields,
        num_layers=26,
        num_heads=4,
        features=1152,
        vocabulary_size=262_144,
        mlp_dim=6912,
        num_kv_heads=1,
        window=512,
        global_every=6,
        rope_theta=1_000_000.0,
        window_rope_theta=10_000.0,
        qk_norm=True,
    )


def _gpt2(fields: dict[str, Any], **preset: Any) -> TransformerLM:
    common = {
        "vocabulary_size": 50_257,
        "activation": "gelu_tanh",
        "norm_epsilon": 1e-5,
        "key_bias": True,
        "dropout_rate": 0.1,
        "attention_dropout_rate": 0.1,
    }
    return build_preset(TransformerLM, common | preset, fields)


def _llama(fields: dict[str, Any], **preset: Any) -> TransformerLM:
    common = {
        "activation": "swiglu",
        "norm": "rms",
        "norm_epsilon": 1e-5,
        "positions": "rotary",
        "use_bias": False,
        "tied": False,
    }
    return build_preset(TransformerLM, common | preset, fields)


def _gemma(fields: dict[str, Any], **preset: Any) -> TransformerLM:
    common = {
        "head_dim": 256,
        "activation": "geglu_tanh",
        "norm": "zero_centered_rms",
        "norm_epsilon": 1e-6,
        "branch_norm": True,
        "scale_embedding": True,
        "tied": True,
    }
    return _llama(fields, **(common | preset))
