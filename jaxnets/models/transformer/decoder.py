"""What transformers that generate tokens share: decoding with a key-value cache."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnets.functional.lengths import last_step
from jaxnets.models.transformer.embeddings import InputEmbedding
from jaxnets.models.transformer.stack import StackCarry, cache_capacity


class Decoder(nn.Module):
    """A causal stack of blocks over tokens, with the decoding protocol of `generation.generate`.

    A subclass has `decoder_embedding`, the causal `Stack` `decoder`, each a layer or a property,
    and the methods `logits` and `start`.
    """

    @property
    def decoder_embedding(self) -> InputEmbedding:
        """The embedding of the tokens."""
        raise NotImplementedError

    def logits(self, x: jax.Array) -> jax.Array:
        """Map features of the stack, [..., features], to next-token logits [..., vocabulary]."""
        raise NotImplementedError

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
            Next-token logits [batch, time, vocabulary], NaN beyond the capacity, and the next
            carry.

        Raises:
            ValueError: tokens or lengths that do not fit.
        """
        x, carry = self._append(tokens, carry, lengths)
        return self.logits(x), carry

    def prefill(
        self, tokens: jax.Array, carry: StackCarry, lengths: jax.Array | None = None
    ) -> tuple[jax.Array, StackCarry]:
        """Append as `extend`; the logits [batch, vocabulary] are those after the last token."""
        x, carry = self._append(tokens, carry, lengths)
        return self.logits(last_step(x, lengths)), carry

    def _append(
        self, tokens: jax.Array, carry: StackCarry, lengths: jax.Array | None
    ) -> tuple[jax.Array, StackCarry]:
        positions = carry["position"][:, None] + jnp.arange(tokens.shape[1])[None]
        x = self.decoder_embedding(tokens, lengths, positions=positions)
        return self.decoder.extend(x, carry, lengths)
