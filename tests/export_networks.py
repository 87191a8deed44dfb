"""Tiny networks of every family, with inputs at their edges, for the tests of exports."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxnets as jn
from jaxnets.functional.recurrence.cells import GRUCell, LSTMCell
from jaxnets.models.transformer.encoder import MaskedLM
from jaxnets.models.transformer.translator import TransformerTranslator

IMAGES, FRAMES = "batch, ...", "batch, time, ..."


@dataclasses.dataclass(frozen=True)
class Network:
    """A network, example inputs and the sizes that are symbolic in its export.

    Attributes:
        module: of this library.
        inputs: arrays.
        shapes: of the inputs, in the words of `jax.export.symbolic_args_specs`.
        method: of the module, or a function of it and its variables.
        constraints: on the symbolic sizes.
    """

    module: Any
    inputs: tuple[Any, ...]
    shapes: Any = IMAGES
    method: str | Callable[..., Any] = "__call__"
    constraints: tuple[str, ...] = ()

    @property
    def function(self):
        """Function of variables and inputs."""
        if callable(self.method):
            return functools.partial(self.method, self.module)
        return functools.partial(self.module.apply, method=self.method)

    @functools.cached_property
    def variables(self):
        """Random variables: biases, scales and statistics too."""
        shapes = jax.eval_shape(
            lambda *inputs: self.module.init(jax.random.key(0), *inputs), *self.init_inputs
        )
        rng = np.random.default_rng(0)

        def random(leaf):
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                return jnp.zeros(leaf.shape, leaf.dtype)
            values = rng.uniform(0.1, 0.9, leaf.shape) / max(leaf.shape, default=1)
            return jnp.asarray(values, leaf.dtype)

        return jax.tree.map(random, shapes)

    @property
    def init_inputs(self):
        """Inputs of the network as a whole, which may be others than those of the function."""
        if self.method == "__call__":
            return self.inputs
        if isinstance(self.module, TransformerTranslator | jn.RecurrentTranslator):
            return (TOKENS, TOKENS)
        return (TOKENS,)


def _values(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


TOKENS = np.array([[0, 1, 2, 3, 4, 5], [10, 10, 9, 0, 0, 0], [7, 8, 0, 10, 3, 6]], np.int32)
LENGTHS = np.array([6, 1, 0], np.int32)
IMAGE, SOUND = _values(3, 8, 8, 2), _values(3, 6, 5)
PLAIN = jn.BlockConfig(features=8, num_heads=2)


def block(**fields):
    """Options of blocks of 8 features."""
    return dataclasses.replace(PLAIN, **fields)


def start_and_extend(module, variables, tokens, lengths):
    """Process a prompt from an empty cache of 10 steps."""
    carry = module.apply(variables, tokens.shape[0], 10, method="start")
    return module.apply(variables, tokens, carry, lengths, method="extend")


def translate(module, variables, source, lengths, tokens):
    """Encode a source, and process the first tokens."""
    carry = module.apply(variables, source, lengths, 10, method="start")
    return module.apply(variables, tokens, carry, method="extend")


def carry_after(network):
    """Return the carry after a prompt."""
    return jax.jit(network.function)(network.variables, *network.inputs)[1]


def extending(network, shapes=(IMAGES, IMAGES)):
    """Make the network that appends single tokens."""
    return Network(network.module, (TOKENS[:, :1], carry_after(network)), shapes, "extend")


_LM = jn.TransformerLM(11, num_layers=2, config=PLAIN, max_length=12)
_LLAMA = jn.TransformerLM(
    11,
    num_layers=2,
    tied=False,
    config=block(
        num_kv_heads=1, activation="swiglu", norm="rms", positions="rotary", qk_norm=True, window=4
    ),
)
_RECURRENT_LM = jn.RecurrentLM(11, embedding_size=4, hidden_size=5, num_layers=2)
_PROMPT = ("batch, time", "batch")
_TRANSLATION = ("batch, source", "batch", "batch, target")
_EIGHT = jn.EncoderDecoderConfig((8, 8, 2), "convolutional", (4, 6))

#: {name: network}, made when it is asked for.
NETWORKS: dict[str, Callable[[], Network]] = {
    "mlp": lambda: Network(jn.MLP((7, 6), 3, norm="layer", residual=True), (_values(3, 4),)),
    "mlp_batch_norm": lambda: Network(jn.MLP((7,), 3, norm="batch"), (_values(3, 4),)),
    "mixer": lambda: Network(
        jn.MLPMixer(4, 6, 1, token_width=3, channel_width=5, num_outputs=3), (IMAGE,)
    ),
    "lenet5": lambda: Network(jn.LeNet5(), (_values(3, 28, 28, 1),)),
    "convnet": lambda: Network(jn.ConvNet((3, 4), hidden_features=(5,), norm="batch"), (IMAGE,)),
    "convnext": lambda: Network(jn.ConvNeXt((1, 1), (4, 6), 3, patch_size=2), (IMAGE,)),
    "resnet": lambda: Network(jn.ResNet((1, 1), num_outputs=3, width=4), (_values(3, 16, 16, 3),)),
    "resnet_bottleneck": lambda: Network(
        jn.ResNet((1, 1), True, 3, stem="cifar", width=4), (IMAGE,)
    ),
    "wide_resnet": lambda: Network(jn.WideResNet(10, 1, 3), (IMAGE,)),
    "resnet9": lambda: Network(jn.ResNet9(3, width=2), (_values(3, 32, 32, 3),)),
    "pilotnet": lambda: Network(jn.convolutional.pilotnet(), (_values(3, 66, 200, 3),)),
    "rnn": lambda: Network(jn.Recurrent(4, "rnn"), (SOUND,), FRAMES),
    "lstm": lambda: Network(
        jn.Recurrent(4, "lstm", 2), (SOUND, LENGTHS), ("batch, time, _", "batch")
    ),
    "bidirectional_lstm": lambda: Network(
        jn.Recurrent(4, "lstm", 2, bidirectional=True),
        (SOUND, LENGTHS),
        ("batch, time, _", "batch"),
    ),
    "lstm_options": lambda: Network(
        jn.Recurrent(4, LSTMCell(peephole=True), learned_carry=True),
        (SOUND, LENGTHS),
        ("batch, time, _", "batch"),
    ),
    "gru": lambda: Network(
        jn.Recurrent(5, "gru", residual=True), (SOUND, LENGTHS), ("batch, time, _", "batch")
    ),
    "gru_before": lambda: Network(jn.Recurrent(4, GRUCell(reset="before")), (SOUND,), FRAMES),
    "mgu": lambda: Network(jn.Recurrent(4, "mgu"), (SOUND,), FRAMES),
    "mingru": lambda: Network(jn.Recurrent(4, "mingru"), (SOUND, LENGTHS)),
    "minlstm": lambda: Network(jn.Recurrent(4, "minlstm"), (SOUND,)),
    "sequence_classifier": lambda: Network(
        jn.SequenceClassifier(3, 4, "gru", bidirectional=True, pool="max"),
        (SOUND, LENGTHS),
        ("batch, time, _", "batch"),
    ),
    "text_classifier": lambda: Network(
        jn.TextClassifier(11, 3, 4, 5, pool="mean"), (TOKENS, LENGTHS), _PROMPT
    ),
    "speech_recognizer": lambda: Network(
        jn.SpeechRecognizer(4, 4, (2,), 3, num_layers=1),
        (SOUND, LENGTHS),
        ("batch, 2*time, _", "batch"),
    ),
    "recurrent_lm": lambda: Network(_RECURRENT_LM, (TOKENS, LENGTHS), _PROMPT),
    "recurrent_translator": lambda: Network(
        jn.RecurrentTranslator(11, embedding_size=4, hidden_size=5),
        (TOKENS, TOKENS, LENGTHS),
        ("batch, source", "batch, target", "batch"),
    ),
    "recurrent_translator_luong": lambda: Network(
        jn.RecurrentTranslator(11, embedding_size=4, hidden_size=5, attention="luong"),
        (TOKENS, LENGTHS, TOKENS),
        _TRANSLATION,
        translate,
    ),
    "autoencoder": lambda: Network(jn.Autoencoder(_EIGHT, 3), (IMAGE,)),
    "autoencoder_dense": lambda: Network(
        jn.Autoencoder(jn.EncoderDecoderConfig((4, 4, 1), "dense", (6,)), 3, num_active=2),
        (_values(3, 4, 4, 1),),
    ),
    "vae": lambda: Network(jn.VAE(_EIGHT, 3), (np.abs(IMAGE) % 1,)),
    "vqvae": lambda: Network(
        jn.VQVAE(dataclasses.replace(_EIGHT, upsampling="transposed"), 5, 4), (IMAGE,)
    ),
    "dcgan_generator": lambda: Network(jn.DCGANGenerator((8, 8, 1), 4, 3), (_values(3, 4),)),
    "dcgan_discriminator": lambda: Network(jn.DCGANDiscriminator(3), (IMAGE,)),
    "resnet_generator": lambda: Network(
        jn.ResNetGenerator((8, 8, 3), 4, 4, num_classes=3),
        (_values(3, 4), np.array([0, 2, 1], np.int32)),
    ),
    "resnet_discriminator": lambda: Network(
        jn.ResNetDiscriminator(1, 1, 4, num_classes=3), (IMAGE, np.array([0, 2, 1], np.int32))
    ),
    "transformer_lm": lambda: Network(_LM, (TOKENS, LENGTHS), _PROMPT, constraints=("time <= 12",)),
    "transformer_lm_start": lambda: Network(
        _LM, (TOKENS, LENGTHS), _PROMPT, start_and_extend, ("time <= 10",)
    ),
    "transformer_lm_extend": lambda: extending(NETWORKS["transformer_lm_start"]()),
    "llama": lambda: Network(_LLAMA, (TOKENS,), "batch, time"),
    "llama_start": lambda: Network(_LLAMA, (TOKENS, LENGTHS), _PROMPT, start_and_extend),
    "llama_extend": lambda: extending(NETWORKS["llama_start"]()),
    "transformer_scanned": lambda: Network(
        jn.TransformerLM(11, num_layers=2, config=block(scan_layers=True, positions="alibi")),
        (TOKENS, LENGTHS),
        _PROMPT,
    ),
    "transformer_encoder": lambda: Network(
        jn.TransformerEncoder(11, num_layers=1, config=block(positions="relative")),
        (TOKENS, LENGTHS),
        _PROMPT,
    ),
    "transformer_classifier": lambda: Network(
        jn.TransformerClassifier(11, num_layers=1, config=block(norm_first=False), pool="mean"),
        (TOKENS, LENGTHS),
        _PROMPT,
        constraints=("time <= 512",),
    ),
    "masked_lm": lambda: Network(
        MaskedLM(11, num_layers=1, config=PLAIN),
        (TOKENS,),
        "batch, time",
        constraints=("time <= 512",),
    ),
    "transformer_translator": lambda: Network(
        jn.TransformerTranslator(
            11, num_layers=1, config=block(positions="sinusoidal"), max_length=12
        ),
        (TOKENS, TOKENS, LENGTHS),
        ("batch, source", "batch, target", "batch"),
    ),
    "transformer_translator_start": lambda: Network(
        jn.TransformerTranslator(
            11, num_layers=1, config=block(positions="sinusoidal"), max_length=12
        ),
        (TOKENS, LENGTHS, TOKENS),
        _TRANSLATION,
        translate,
    ),
    "vision_transformer": lambda: Network(
        jn.VisionTransformer(3, num_layers=1, config=PLAIN), (IMAGE,)
    ),
    "masked_autoencoder": lambda: Network(
        jn.MaskedAutoencoder(num_layers=1, config=PLAIN, decoder_config=PLAIN), (IMAGE,), IMAGES
    ),
    "audio_transformer": lambda: Network(
        jn.AudioTransformer(3, 1, block(positions="sinusoidal"), (2,)),
        (SOUND, LENGTHS),
        ("batch, 2*time, _", "batch"),
    ),
}
