"""What encoder-decoder transformers share: a source, teacher forcing, decoding."""

from __future__ import annotations

import jax

from jaxnets.models.transformer.decoder import Decoder
from jaxnets.models.transformer.stack import StackCarry


class EncoderDecoder(Decoder):
    """An encoder of a source and a causal decoder of tokens with cross-attention.

    A subclass has what a `Decoder` needs, whose stack has cross-attention, and the method `encode`.
    """

    def encode(
        self, inputs: jax.Array, lengths: jax.Array | None = None, *, train: bool = False
    ) -> tuple[jax.Array, jax.Array | None]:
        """Encode a source.

        Args:
            inputs: the source [batch, source, ...].
            lengths: integer [batch] in [0, source]; by default all of it counts.
            train: training mode.

        Returns:
            Features [batch, steps, features] in the compute dtype, 0 beyond their lengths, and
            these lengths; None if all steps count.

        Raises:
            ValueError: a source or lengths that do not fit.
        """
        raise NotImplementedError

    def __call__(
        self,
        inputs: jax.Array,
        decoder_inputs: jax.Array,
        lengths: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Map source and shifted target (teacher forcing) to next-token logits of the target.

        `capture` records the weights of the cross-attention as
        ["decoder"]["layer_0"]["cross_attention"]["weights"], [batch, heads, target, source].

        Args:
            inputs: the source [batch, source, ...]; steps beyond the lengths have no influence.
            decoder_inputs: the target shifted right by one step, integer [batch, target].
            lengths: of the source, integer [batch] in [0, source]; by default all of it counts.
            train: training mode.

        Returns:
            [batch, target, vocabulary]; [:, t] predicts the token after decoder_inputs[:, t].

        Raises:
            ValueError: a source, tokens or lengths that do not fit.
        """
        context, lengths = self.encode(inputs, lengths, train=train)
        x = self.decoder_embedding(decoder_inputs, train=train)
        x = self.decoder(x, context=context, context_lengths=lengths, train=train)
        return self.logits(x)

    def start(self, source: jax.Array, lengths: jax.Array | None, capacity: int) -> StackCarry:
        """Encode the source and return a cache with an empty target.

        Args:
            source: [batch, source, ...].
            lengths: integer [batch] in [0, source]; None counts all of it.
            capacity: maximum number of tokens of the target.

        Returns:
            Arrays with a leading batch axis: keys and values of the source and of the target for
            each layer, "context_lengths" [batch] and "position" [batch].

        Raises:
            ValueError: a source or lengths that do not fit, a capacity beyond the learned
                positions.
        """
        self.decoder_embedding.check_capacity(capacity)
        context, lengths = self.encode(source, lengths)
        return self.decoder.start(
            source.shape[0], capacity, context=context, context_lengths=lengths
        )
