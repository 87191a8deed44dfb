"""The decoder-only language model and its presets (GPT-2, LLaMA)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnets.checks import check_sizes
from jaxnets.core import Precision, record
from jaxnets.layers import Dense
from jaxnets.models.transformer.config import BlockConfig, build_preset
from jaxnets.models.transformer.embeddings import InputEmbedding
from jaxnets.models.transformer.stack import (
    Stack,
    StackCarry,
    cache_capacity,
)


class TransformerLM(nn.Module):
    """A decoder-only (causal) language model: token t + 1 is predicted from tokens 0 to t.

    Attributes:
        vocabulary_size: number of tokens.
        num_layers: number of blocks.
        config: options of the blocks.
        max_length: number of learned positions, the longest sequence; no limit with other kinds.
        tied: the output layer is the transposed token embedding instead of a kernel of its own.
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
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        check_sizes(vocabulary_size=self.vocabulary_size, max_length=self.max_length)
        super().__post_init__()

    def setup(self) -> None:
        config, policy = self.config, self.precision
        self.embedding = InputEmbedding(
            self.vocabulary_size, config, self.max_length, precision=policy
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
        return self._logits(self.stack(x, lengths, train=train))

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

    def room(self, carry: StackCarry) -> int:
        """Return the number of tokens that a carry has room for, including those it holds."""
        return cache_capacity(carry)

    def extend(
        self, tokens: jax.Array, carry: StackCarry, lengths: jax.Array | None = None
    ) -> tuple[jax.Array, StackCarry]:
        """Append tokens to each row of the cache.

        Args:
            tokens: integer [batch, time]; the first lengths[b] tokens are appended to row b.
            carry: as returned by `start` or an earlier call.
            lengths: integer [batch] in [0, time]; by default all tokens are appended.

        Returns:
            Next-token logits [batch, time, vocabulary_size], NaN beyond the capacity, and the next
            carry.

        Raises:
            ValueError: tokens or lengths that do not fit.
        """
        positions = carry["position"][:, None] + jnp.arange(tokens.shape[1])[None]
        x = self.embedding(tokens, lengths, positions=positions)
        x, carry = self.stack.extend(x, carry, lengths)
        return self._logits(x), carry

    def _logits(self, x: jax.Array) -> jax.Array:
        record(self, "features", x)
        logits = self.embedding.attend(x) if self.tied else self.head(x)
        return logits.astype(self.precision.output)


def gpt2_small(**fields: Any) -> TransformerLM:
    """Build GPT-2 small: 124,439,808 parameters; `fields` override its own and its config's.

    References:
        Radford et al. 2019, table 2, whose counts are wrong; these are of the released weights.
    """
    return _gpt2(12, 12, 768, fields)


def gpt2_medium(**fields: Any) -> TransformerLM:
    """Build GPT-2 medium: 354,823,168 parameters, as `gpt2_small`."""
    return _gpt2(24, 16, 1024, fields)


def gpt2_large(**fields: Any) -> TransformerLM:
    """Build GPT-2 large: 774,030,080 parameters, as `gpt2_small`."""
    return _gpt2(36, 20, 1280, fields)


def gpt2_xl(**fields: Any) -> TransformerLM:
    """Build GPT-2 XL: 1,557,611,200 parameters, as `gpt2_small`."""
    return _gpt2(48, 25, 1600, fields)


def llama2_7b(**fields: Any) -> TransformerLM:
    """Build LLaMA 2 7B: 6,738,415,616 parameters; `fields` override its own and its config's.

    References:
        Touvron et al. 2023, arXiv:2307.09288, table 1 (LLaMA 2 7B).
    """
    return _llama(32, 32, 4096, {"vocabulary_size": 32_000, "mlp_dim": 11_008}, fields)


def llama3_8b(**fields: Any) -> TransformerLM:
    """Build Llama 3 8B: 8,030,261,248 parameters; `fields` override its own and its config's.

    References:
        Grattafiori et al. 2024, arXiv:2407.21783, table 3.
    """
    preset = {
        "vocabulary_size": 128_256,
        "mlp_dim": 14_336,
        "num_kv_heads": 8,
        "rope_theta": 500_000.0,
    }
    return _llama(32, 32, 4096, preset, fields)


def tinyllama(**fields: Any) -> TransformerLM:
    """Build TinyLlama: 1,100,048,384 parameters; `fields` override its own and its config's.

    References:
        Zhang et al. 2024, arXiv:2401.02385, table 1.
    """
    preset = {"vocabulary_size": 32_000, "mlp_dim": 5632, "num_kv_heads": 4}
    return _llama(22, 32, 2048, preset, fields)


def _gpt2(num_layers: int, num_heads: int, features: int, fields: dict[str, Any]) -> TransformerLM:
    preset = {
        "vocabulary_size": 50_257,
        "num_layers": num_layers,
        "features": features,
        "num_heads": num_heads,
        "activation": "gelu_tanh",
        "norm_epsilon": 1e-5,
        "key_bias": True,
        "dropout_rate": 0.1,
        "attention_dropout_rate": 0.1,
    }
    return build_preset(TransformerLM, preset, fields)


def _llama(
    num_layers: int,
    num_heads: int,
    features: int,
    overrides: dict[str, Any],
    fields: dict[str, Any],
) -> TransformerLM:
    preset = {
        "num_layers": num_layers,
        "features": features,
        "num_heads": num_heads,
        "activation": "swiglu",
        "norm": "rms",
        "norm_epsilon": 1e-5,
        "positions": "rotary",
        "use_bias": False,
        "tied": False,
        **overrides,
    }
    return build_preset(TransformerLM, preset, fields)
