"""Autoencoders: plain, variational, vector-quantized; and functions of a trained one."""

from jaxnets.models.autoencoder.encoder_decoder import (
    Decoder,
    Encoder,
    EncoderDecoderConfig,
    ResidualBlock,
    TiedDense,
)
from jaxnets.models.autoencoder.latent_space import (
    anomaly_score,
    decode,
    encode,
    interpolate,
    reconstruct,
    sample,
)
from jaxnets.models.autoencoder.plain import Autoencoder, AutoencoderOutput, keep_largest
from jaxnets.models.autoencoder.variational import (
    PYTORCH_INIT,
    VAE,
    Variational,
    vae_pytorch_example,
)
from jaxnets.models.autoencoder.vector_quantized import (
    VQVAE,
    Quantized,
    VectorQuantizer,
    check_codebook,
)

__all__ = [
    "PYTORCH_INIT",
    "VAE",
    "VQVAE",
    "Autoencoder",
    "AutoencoderOutput",
    "Decoder",
    "Encoder",
    "EncoderDecoderConfig",
    "Quantized",
    "ResidualBlock",
    "TiedDense",
    "Variational",
    "VectorQuantizer",
    "anomaly_score",
    "check_codebook",
    "decode",
    "encode",
    "interpolate",
    "keep_largest",
    "reconstruct",
    "sample",
    "vae_pytorch_example",
]
